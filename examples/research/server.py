"""An MCP server over standard input and output, with one tool: what words of Skerrow mean.

python -m examples.research.server
"""

from pathlib import Path

import yaml
from mcp.server import MCPServer

GLOSSARY = Path(__file__).parent / "glossary.yaml"

server = MCPServer("glossary", instructions="Words that are peculiar to Skerrow.")


@server.tool()
def define(text: str) -> dict[str, str]:
    """Define the words of a text that stand in the glossary; others are left out."""
    meanings: dict[str, str] = yaml.safe_load(GLOSSARY.read_text())
    return {word: meaning for word, meaning in meanings.items() if word in text.lower()}


if __name__ == "__main__":
    server.run()
