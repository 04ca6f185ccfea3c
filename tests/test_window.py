"""What of the messages is sent to a model whose window is too small for all of them."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from opscore.agentkit.model import Ask, Call, Message, Reply, Result, ToolSpec
from opscore.agentkit.window import BYTES_PER_TOKEN, fitted

texts = st.text(max_size=30) | st.integers(0, 30).map(lambda n: "word " * 100 * n)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Draw a goal, then replies with their calls' results, and now and then a correction."""
    messages: list[Message] = [Ask(draw(texts))]
    for turn in range(draw(st.integers(0, 6))):
        ids = [f"{turn}-{n}" for n in range(draw(st.integers(0, 3)))]
        wanted = tuple(Call(id, "look", {"at": draw(st.integers())}) for id in ids)
        native = draw(st.none() | st.just({"seen": turn}))
        messages.append(Reply(draw(texts), wanted, native=native))
        messages += [Result(id, "look", draw(texts), draw(st.booleans())) for id in ids]
        if not ids and draw(st.booleans()):
            messages.append(Ask("Give the whole answer again."))
    return messages


def estimate(messages: Sequence[Message], fixed: str = "") -> int:
    """Count tokens as the documentation of `BYTES_PER_TOKEN` has them."""
    said = [fixed]
    for one in messages:
        match one:
            case Ask(text) | Result(content=text):
                said.append(text)
            case Reply():
                wanted = "".join(f"{call.tool}{json.dumps(call.arguments)}" for call in one.calls)
                said.append(one.text + wanted)
    return sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in said)


def bare(message: Message) -> Any:
    """Return all of a message that must stay as it is."""
    match message:
        case Ask(text):
            return text
        case Result():
            return message.call_id, message.tool, message.is_error
        case Reply():
            return message.calls, message.usage, message.model, message.is_cut


def text_of(message: Message) -> str:
    return message.content if isinstance(message, Result) else message.text


def is_short(message: Message) -> bool:
    """Whether nothing would be won by leaving out its text."""
    said = text_of(message).encode()
    return -(-len(said) // BYTES_PER_TOKEN) <= 14 or text_of(message).startswith("[left out: ")


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(1, 6_000))
def test_only_texts_are_left_out_and_no_more_than_must_be(
    messages: list[Message], tokens: int
) -> None:
    short = fitted(messages, tokens)
    # Nothing moves or vanishes: a goal, a call and its results stay as and where they are.
    assert list(map(bare, short)) == list(map(bare, messages))
    changed = [n for n, (a, b) in enumerate(zip(short, messages, strict=True)) if a != b]
    if estimate(messages) <= tokens:
        assert changed == []
    if estimate(short) > tokens:
        assert all(isinstance(one, Ask) or is_short(one) for one in short)
    for place in changed:
        size = len(text_of(messages[place]).encode())
        assert text_of(short[place]) == f"[left out: {size:,} bytes, to make room]"
        assert getattr(short[place], "native", None) is None
    if changed:  # the last to go had to go
        order = [n for kind in (Result, Reply) for n in changed if isinstance(messages[n], kind)]
        before = [*short]
        before[order[-1]] = messages[order[-1]]
        assert estimate(before) > tokens


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(1, 6_000))
def test_the_oldest_results_go_first_and_texts_of_the_model_after_all_of_them(
    messages: list[Message], tokens: int
) -> None:
    short = fitted(messages, tokens)
    kept = [n for n, (a, b) in enumerate(zip(short, messages, strict=True)) if a == b]
    gone = [n for n in range(len(messages)) if n not in kept]
    for kind in (Result, Reply):
        long = [n for n in kept if isinstance(messages[n], kind) and not is_short(messages[n])]
        assert all(
            one < min(long, default=one + 1) for one in gone if isinstance(messages[one], kind)
        )
    if any(isinstance(messages[n], Reply) for n in gone):
        assert all(is_short(one) for one in short if isinstance(one, Result))


def test_instructions_and_tools_take_their_part_of_the_window() -> None:
    messages = [Ask("go"), Reply("", (Call("1", "look", {}),)), Result("1", "look", "x" * 300)]
    tool = ToolSpec("look", "Look.", {"type": "object", "properties": {"at": {"const": "y" * 99}}})
    fixed = "Be brief." + tool.name + tool.description + json.dumps(tool.parameters)
    whole = estimate(messages, fixed)
    assert fitted(messages, whole, "Be brief.", [tool]) == messages
    short = fitted(messages, whole - 1, "Be brief.", [tool])
    assert short[2] == Result("1", "look", "[left out: 300 bytes, to make room]")
