"""A model that needs no provider: it answers as a script says. For demos and tests.

A script is a function from a request to a reply, found by its name: `scripted:echo` is built in.
Its usage is counted as a provider would, roughly: a token for four characters.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opscore.agentkit.model import Ask, Call, Reply, Request, Result, Usage
from opscore.errors import ConfigurationError

Script = Callable[[Request], Reply | str]
CHARACTERS_PER_TOKEN = 4


def echo(request: Request) -> str:
    """Answer with what was asked first."""
    return next(one.text for one in request.messages if isinstance(one, Ask))


_scripts: dict[str, Script] = {"echo": echo}
SCRIPTS: Mapping[str, Script] = _scripts


def script(name: str) -> Callable[[Script], Script]:
    """Make the function below the model `scripted:<name>`.

    It is asked anew for each reply and keeps nothing: what was done so far is in the request.

    Raises:
        ConfigurationError: another script has this name.
    """

    def declare(function: Script) -> Script:
        known = _scripts.get(name)
        if known is not None and known.__qualname__ != function.__qualname__:
            raise ConfigurationError([f"the script {name!r} is declared twice"])
        _scripts[name] = function
        return function

    return declare


def replies(*turns: Reply | str) -> Script:
    """Return a script that answers with these, one after the other; with the last for ever."""

    def answer(request: Request) -> Reply | str:
        before = sum(isinstance(one, Reply) for one in request.messages)
        return turns[min(before, len(turns) - 1)]

    return answer


def calls(*wanted: tuple[str, Any], text: str = "") -> Reply:
    """Return a reply that asks for tools: pairs of name and arguments."""
    return Reply(text, tuple(Call(f"call-{n}", *one) for n, one in enumerate(wanted, 1)))


class Scripted:
    """The model of a script."""

    def __init__(self, name: str, answer: Script) -> None:
        self.name = f"scripted:{name}"
        self._answer = answer

    async def complete(self, request: Request) -> Reply:
        said = self._answer(request)
        reply = Reply(said) if isinstance(said, str) else said
        if reply.usage == Usage():
            usage = Usage(_tokens(_written(request)), _tokens(_said(reply)), 0.0)
            reply = replace(reply, usage=usage)
        return replace(reply, model=self.name)


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _written(request: Request) -> str:
    texts = [request.instructions]
    for one in request.messages:
        match one:
            case Ask(text) | Result(content=text):
                texts.append(text)
            case Reply():
                texts.append(_said(one))
    return "".join(texts)


def _said(reply: Reply) -> str:
    return reply.text + "".join(f"{one.tool}{json.dumps(one.arguments)}" for one in reply.calls)
