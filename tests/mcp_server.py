"""An MCP server for tests, written with the official package: good tools, and bad ones.

python mcp_server.py                      over stdio
python mcp_server.py http <socket's fd>   streamable HTTP, on a socket that listens already
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcp.server import MCPServer
from mcp.types import (
    AudioContent,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

server = MCPServer("docs")


@server.tool()
def search(query: str, limit: int = 3) -> str:
    """Search the documents."""
    return f"{limit} hits for {query}"


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ValueError(why)


@server.tool()
async def hang() -> str:
    """Never answer."""
    await asyncio.sleep(600)
    return "?"


@server.tool()
def die() -> str:
    """End the server's process in the midst of a call."""
    os._exit(9)


@server.tool()
def environment() -> str:
    """Name the variables the server has."""
    return " ".join(sorted(os.environ))


@server.tool()
def variable(name: str) -> str:
    """Tell a variable."""
    return os.environ.get(name, "")


@server.tool()
async def pids(path: str) -> str:
    """Write down the server's process, and one that has left its group; neither minds SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stray = subprocess.Popen(
        ["sleep", "300"], start_new_session=True, stdin=subprocess.DEVNULL, stdout=2
    )
    Path(path).write_text(f"{os.getpid()} {stray.pid}")
    return "written"


@server.tool()
def mixed() -> CallToolResult:
    """Return parts of every kind."""
    return CallToolResult(
        content=[
            TextContent(type="text", text="a text"),
            ImageContent(type="image", data="aGk=", mime_type="image/png"),
            AudioContent(type="audio", data="aGk=", mime_type="audio/wav"),
            ResourceLink(type="resource_link", name="more", uri="file:///more"),
            EmbeddedResource(
                type="resource", resource=TextResourceContents(uri="file:///a", text="inner")
            ),
        ]
    )


@server.tool()
def long() -> str:
    """Return more than anybody reads."""
    return "x" * 1_000_000


@server.tool()
def endless() -> str:
    """Write a line without end."""
    while True:
        os.write(1, b"x" * 65536)


@server.tool(name="odd name/with:signs")
def odd() -> str:
    """Have a name that providers do not take."""
    return "odd"


@server.tool()
def delete_all() -> str:
    """Delete everything."""
    return "deleted"


def main() -> Any:
    if sys.argv[1:2] != ["http"]:
        return server.run("stdio")
    import uvicorn

    app = server.streamable_http_app()
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    listening = socket.socket(fileno=int(sys.argv[2]))
    return uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
