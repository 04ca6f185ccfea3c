"""Agents for the tests of the command line."""

from typing import Any

from opscore import Context, GiveUp, agent
from opscore.agentkit.llm import LLMAgent
from opscore.agentkit.model import Ask, Reply, Request
from opscore.agentkit.scripted import calls, script

Parameters = dict[str, Any]
HOSTILE = "\x1b]0;owned\x07\x1b[31mred"
"""What a terminal would take for orders."""


@agent("echo", capabilities=["echo"], capacity=2)
def echo(parameters: Parameters, context: Context) -> Any:
    """Give back what it gets; say so in a way that no terminal should see."""
    context.log(f"echoing {HOSTILE}", size=len(parameters))
    return parameters


@agent("grumpy")
def grumpy(parameters: Parameters, context: Context) -> Any:
    if parameters.get("mood") != "good":
        raise GiveUp(f"not today {HOSTILE}")
    return "well, then"


@script("diarist")
def keep(request: Request) -> Reply | str:
    """Remember what was asked."""
    first = request.messages[0]
    if len(request.messages) == 1 and isinstance(first, Ask):
        return calls(("remember", {"text": first.text}))
    return "kept"


DIARIST = LLMAgent(agent_id="diarist", model="scripted:diarist", tools=["remember"], memory="diary")
