"""LLM agents on scripted models, which die where their goal says so.

The goal of `six` is JSON: `folder`, where what was asked and what was done is written down, and
`die`, the place where the process kills itself the first time it comes there.
"""

import json
import os
import signal
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

from opscore.agentkit.context import Context
from opscore.agentkit.llm import Limits, LLMAgent
from opscore.agentkit.model import Ask, ModelBusy, Reply, Request
from opscore.agentkit.scripted import calls, script
from opscore.agentkit.tools import tool

PLACES = (
    *(f"model-{number}" for number in range(4)),
    *("note-one-before", "note-one-after", "settle-before", "settle-after", "note-three-after"),
)


def _order(request: Request) -> dict[str, Any]:
    first = next(one for one in request.messages if isinstance(one, Ask))
    order: dict[str, Any] = json.loads(first.text)
    return order


def come_to(folder: str, die: str, place: str) -> None:
    """Die here, the first time."""
    mark = Path(folder) / "died"
    if place == die and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def write(folder: str, name: str, line: str) -> None:
    with (Path(folder) / name).open("a") as file:
        file.write(f"{line}\n")


@script("six")
def six(request: Request) -> Reply | str:
    order = _order(request)
    scene = {"folder": order["folder"], "die": order.get("die", "")}
    number = sum(isinstance(one, Reply) for one in request.messages)
    write(scene["folder"], "asked", str(number))
    come_to(**scene, place=f"model-{number}")
    return (
        calls(("note", {"text": "one", **scene}), ("note", {"text": "two", **scene})),
        calls(("settle", {"amount": 5, **scene})),
        calls(("note", {"text": "three", **scene})),
        "All paid.",
    )[number]


@tool
def note(text: str, folder: str, die: str = "") -> str:
    """Write something down."""
    come_to(folder, die, f"note-{text}-before")
    write(folder, "done", f"note {text}")
    come_to(folder, die, f"note-{text}-after")
    return "noted"


@tool(once=True)
def settle(amount: int, folder: str, die: str = "") -> str:
    """Pay somebody."""
    come_to(folder, die, "settle-before")
    write(folder, "done", f"settle {amount}")
    come_to(folder, die, "settle-after")
    return "paid"


@tool(approval=True)
def erase(path: str) -> str:
    """Delete something."""
    return f"deleted {path}"


@script("deletes")
def deletes(request: Request) -> Reply | str:
    if len(request.messages) == 1:
        return calls(("erase", {"path": "/a"}))
    return f"heard: {getattr(request.messages[-1], 'content', '')}"


@script("limited")
def limited(request: Request) -> Reply | str:
    """Be rate limited once."""
    mark = Path(_order(request)["folder"]) / "limited"
    if not mark.exists():
        mark.touch()
        raise ModelBusy("429", retry_after=4.0)
    return "done"


@script("never")
def never(request: Request) -> Reply | str:
    order = _order(request)
    again = calls(("note", {"text": "again", "folder": order["folder"]}))
    return again if order["act"] else ""


SIXER = LLMAgent(agent_id="six", model="scripted:six", tools=["note", "settle"])
DELETER = LLMAgent(agent_id="deleter", model="scripted:deletes", tools=[erase], capacity=1)
LIMITED = LLMAgent(agent_id="limited", model="scripted:limited")
NEVER = LLMAgent(agent_id="never", model="scripted:never", tools=[note], limits=Limits(max_steps=3))
ECHO = LLMAgent(agent_id="llm-echo", model="scripted:echo", capabilities=["echo"])


@tool
def linger(folder: str, context: Context) -> str:
    """Work until nobody wants the result."""
    write(folder, "lingering", "yes")
    deadline, pause = monotonic() + 20, Event()
    while not context.cancelled and monotonic() < deadline:
        pause.wait(0.02)
    return "left off"


@script("lingers")
def lingers(request: Request) -> Reply | str:
    order = _order(request)
    write(order["folder"], "asked", "once")
    return calls(("linger", {"folder": order["folder"]}))


LINGERER = LLMAgent(agent_id="lingerer", model="scripted:lingers", tools=[linger])
