"""LLM agents that call what their goal says, and answer with what they were told.

The goal is JSON: `calls`, a list of names with arguments.
"""

import json

from opscore.agentkit.llm import LLMAgent, Permissions
from opscore.agentkit.model import Ask, Reply, Request, Result
from opscore.agentkit.scripted import calls, script
from opscore.agentkit.tools import tool


@script("calls-what-it-should")
def answer(request: Request) -> Reply | str:
    results = [one.content for one in request.messages if isinstance(one, Result)]
    if results:
        return json.dumps(results)
    first = next(one for one in request.messages if isinstance(one, Ask))
    return calls(*[(name, arguments) for name, arguments in json.loads(first.text)["calls"]])


@tool
def log_in(user: str, password: str) -> str:
    """Log in."""
    return f"{user} has the key sk-live-0123456789abcdefghij"


CALLER = LLMAgent(
    agent_id="caller",
    model="scripted:calls-what-it-should",
    mcp_servers=["docs", "web", "dead"],
    tools=[log_in, "http_get", "read_file", "write_file", "list_files"],
    permissions=Permissions(mcp=("*/*",), hosts=("127.0.0.1",)),
)
