"""An MCP server that lies, over stdio and by hand: as its argument says."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

HOW = sys.argv[1] if len(sys.argv) > 1 else ""
OBJECT = {"type": "object"}


def tool(name: str, schema: Any = OBJECT, **more: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": schema, **more}


def tools(cursor: str | None) -> dict[str, Any]:
    match HOW:
        case "many":
            return {"tools": [tool(f"t{number}") for number in range(3000)]}
        case "endless-list":
            number = int(cursor or 0)
            return {"tools": [tool(f"t{number}")], "nextCursor": str(number + 1)}
        case "schemas":
            large = {"type": "object", "description": "x" * 1_000_000}
            deep: dict[str, Any] = {"type": "object"}
            for _ in range(60):
                deep = {"type": "object", "properties": {"a": deep}}
            return {
                "tools": [
                    *(tool("large", large), tool("deep", deep)),
                    *(
                        tool("many", OBJECT | {"x": [0] * 9000}),
                        tool("bad\nname\x1b[31m"),
                        tool("n" * 500),
                    ),
                    tool("told", description="\x1b[31mred\0\n" + "y" * 100_000),
                ]
            }
        case "schema-trap":  # a pattern that takes for ever
            trap = {"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}
            return {"tools": [tool("ask", outputSchema=trap)]}
        case "no-object":
            return {"tools": [{"name": "a", "inputSchema": 7}]}
        case "same":
            return {"tools": [tool("a b"), tool("a_b"), tool("a.b"), tool("a_b")]}
    return {"tools": [tool("ask")]}


ANSWERS: dict[str, Any] = {
    "schema-trap": {"content": [], "structuredContent": {"a": "a" * 40 + "!"}},
    "parts": {"content": [{"type": "text", "text": "z"}] * 10_000},
    "no-result": {"content": "nothing"},
    "input": {"resultType": "input_required", "inputRequests": {}},
}


def called() -> Any:
    match HOW:
        case "endless-line":
            while True:
                os.write(1, b"x" * 65536)
        case "flood":
            about = {"level": "info", "data": "x"}
            while True:
                say({"jsonrpc": "2.0", "method": "notifications/message", "params": about})
        case "ends":
            os._exit(4)
        case "silent":
            time.sleep(600)
    return ANSWERS.get(HOW, {"content": [{"type": "text", "text": "answered"}]})


def say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def stay() -> None:
    """Mind no SIGTERM, and start a process that has left the group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stray = subprocess.Popen(["sleep", "300"], start_new_session=True)
    with open(sys.argv[2], "w") as file:
        file.write(f"{os.getpid()} {stray.pid}")


def begin() -> None:
    """Do what a server does before it hears anything."""
    if HOW in ("deaf", "stubborn"):
        stay()
    if HOW == "deaf":
        time.sleep(600)
    if HOW == "greets":
        print("Welcome to the server!\n{}", flush=True)


def main() -> None:
    begin()
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" not in asked:
            continue
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": asked["id"]}
        params = asked.get("params") or {}
        match asked["method"]:
            case "initialize":
                about = {"name": "liar", "version": "1"}
                answer["result"] = {
                    "protocolVersion": "2025-06-18",
                    "capabilities": {"tools": {}},
                    "serverInfo": about,
                }
            case "tools/list":
                answer["result"] = tools(params.get("cursor"))
            case "tools/call":
                answer["result"] = called()
            case _:
                answer["error"] = {"code": -32601, "message": "Method not found"}
        say(answer)


main()
