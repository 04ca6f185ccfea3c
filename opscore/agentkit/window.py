"""Short-term memory: what of the messages is sent to a model whose window is too small for all.

Left out are the oldest tool results, then the oldest texts of the model; never the goal, and never
a message as a whole, since each call must be followed by its result.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from opscore.agentkit.model import Ask, Message, Reply, Result, ToolSpec

BYTES_PER_TOKEN = 3
"""Fewer than any provider's on average, so that an estimate is rather too high."""
LEFT_OUT = "[left out: {bytes:,} bytes, to make room]"


def fitted(
    messages: Sequence[Message], tokens: int, instructions: str = "", tools: Sequence[ToolSpec] = ()
) -> Sequence[Message]:
    """Return the messages, shortened to about so many tokens as far as they can be."""
    fixed = instructions + "".join(
        tool.name + tool.description + json.dumps(dict(tool.parameters)) for tool in tools
    )
    excess = _tokens(fixed) + sum(map(_size, messages)) - tokens
    shortened = list(messages)
    for kind in (Result, Reply):
        for place, message in enumerate(shortened):
            if excess <= 0:
                return shortened
            if isinstance(message, kind):
                shortened[place] = _without_text(message)
                excess -= _size(message) - _size(shortened[place])
    return shortened


def _without_text(message: Message) -> Message:
    short: Message
    match message:
        case Result(content=text):
            short = replace(message, content=LEFT_OUT.format(bytes=len(text.encode())))
        case Reply(text=text) if text:
            # Its native form holds the text as well.
            cut = LEFT_OUT.format(bytes=len(text.encode()))
            short = replace(message, text=cut, native=None)
        case _:
            return message
    return short if _size(short) < _size(message) else message


def _size(message: Message) -> int:
    match message:
        case Ask(text) | Result(content=text):
            return _tokens(text)
        case Reply():
            calls = "".join(f"{call.tool}{json.dumps(call.arguments)}" for call in message.calls)
            return _tokens(message.text + calls)


def _tokens(text: str) -> int:
    return ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN)
