"""JSON from outside: strict reading, and the limits of what can be stored. Pure.

Faults are found all at once, as JSON Pointer -> sentences. JSON and YAML are read to the same
values: text keys only, no duplicate keys, no NaN, no anchors, no dates, no tags.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from json.encoder import encode_basestring
from math import isfinite
from typing import Any

import yaml

MAX_VALUE_BYTES = 2**20
"""Bytes of an input, an output, or any other value that is stored, as compact JSON in UTF-8."""
MAX_TEXT_BYTES = 4 * MAX_VALUE_BYTES
"""Bytes of the text that such a value comes in: spaces, characters spelled as `\\u00e9` (which
takes three times as many) and what stands beside it may take the rest."""
MAX_GATHERED_BYTES = 16 * MAX_VALUE_BYTES
"""Bytes of values that were let through one by one and are put together: the outputs of a
`forEach`'s items, and of a run's last tasks."""
MAX_DEPTH = 64
"""Objects and arrays inside each other."""
MAX_FAULTS = 500
"""Faults told one by one; a longer list helps nobody."""
INT64 = range(-(2**63), 2**63)


class Faults(dict[str, list[str]]):
    """Collected faults; `fatal` when the value cannot even be looked at further."""

    fatal = False
    too_large = False

    def __init__(self) -> None:
        self._count = 0

    def add(self, pointer: str, sentence: str, *, fatal: bool = False) -> None:
        self.fatal = self.fatal or fatal
        self._count += 1
        if self._count < MAX_FAULTS:
            self.setdefault(pointer, []).append(sentence)
        elif self._count == MAX_FAULTS:
            self.setdefault("", []).append(f"There are more than {MAX_FAULTS} faults; mend these.")


def at(pointer: str, *keys: str | int) -> str:
    """Extend a JSON Pointer."""
    for key in keys:
        if isinstance(key, str) and ("~" in key or "/" in key):
            key = key.replace("~", "~0").replace("/", "~1")
        pointer = f"{pointer}/{key}"
    return pointer


def kind(value: object) -> str:
    """Name a JSON value's type as people say it."""
    names = {bool: "true or false", str: "text", int: "a number", float: "a number"}
    names |= {dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def unknown(word: str, known: Collection[str], sentence: str) -> str:
    """Word a fault about a name that is not among the known ones."""
    if len(word) > 64:
        return f"{sentence} {word[:64] + '…'!r}."
    if len(known) <= 100 and (near := get_close_matches(word, sorted(known), 1)):
        return f"{sentence} {word!r}; did you mean {near[0]!r}?"
    if 0 < len(known) <= 13:
        return f"{sentence} {word!r}; there are {', '.join(sorted(known))}."
    return f"{sentence} {word!r}."


# --- what can be stored


def check_json(value: object, pointer: str = "", max_bytes: int = MAX_VALUE_BYTES) -> Faults:
    """Say why a value is not storable JSON; nothing said means that it is.

    Refused: other types than JSON's, keys that are no text, NaN and infinity, integers beyond
    64 bit, NUL, lone surrogates, nesting beyond 64, more than `max_bytes` as compact JSON.
    Shared parts count as often as they appear. The walk goes on beyond the limit, to say how large
    the value is, but not without end.
    """
    faults = Faults()
    size, measured = 0, max(max_bytes, MAX_GATHERED_BYTES)
    stack: list[tuple[object, int, tuple[Any, ...] | None]] = [(value, 1, None)]
    while stack:
        item, depth, trail = stack.pop()
        size += _own_size(item, lambda s, t=trail, **k: faults.add(_pointer(pointer, t), s, **k))
        if size > measured:
            break
        if depth > MAX_DEPTH and isinstance(item, dict | list):
            sentence = f"Objects and lists may be nested at most {MAX_DEPTH} deep."
            faults.add(_pointer(pointer, trail), sentence, fatal=True)
        elif isinstance(item, dict):
            stack.extend((v, depth + 1, (trail, k)) for k, v in reversed(item.items()))
        elif isinstance(item, list):
            numbered = zip(range(len(item) - 1, -1, -1), reversed(item), strict=True)
            stack.extend((v, depth + 1, (trail, n)) for n, v in numbered)
    if size > max_bytes:
        faults.too_large = True
        told = f"{size:,}" if size <= measured else f"more than {measured:,}"
        sentence = f"This takes {told} bytes as JSON; at most {max_bytes:,} bytes are allowed."
        faults.add(pointer, sentence, fatal=True)
    return faults


def _pointer(start: str, trail: tuple[Any, ...] | None) -> str:
    keys = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    return at(start, *reversed(keys))


def _own_size(item: object, fault: Callable[..., None]) -> int:
    """Return the bytes a value takes without its members, telling its own faults."""
    if isinstance(item, str):
        return _text_size(item, fault)
    if isinstance(item, dict):
        if any(not isinstance(key, str) for key in item):
            fault("Keys must be text.", fatal=True)
        members = sum(_text_size(key, fault) + 2 for key in item if isinstance(key, str))
        return max(2, 1 + members)
    if isinstance(item, list):
        return max(2, 1 + len(item))
    if isinstance(item, int | float) and not isinstance(item, bool):
        return _number_size(item, fault)
    if item is None or isinstance(item, bool):
        return 5 if item is False else 4
    fault(f"This is {kind(item)}, which is not JSON.", fatal=True)
    return 0


def _text_size(text: str, fault: Callable[..., None]) -> int:
    if "\0" in text:
        fault("NUL characters (\\u0000) cannot be stored; remove them.")
    try:
        return len(encode_basestring(text).encode())
    except UnicodeEncodeError:
        fault("Half of a surrogate pair (\\ud800 to \\udfff) is no character; remove it.")
        return len(text)


def _number_size(number: float, fault: Callable[..., None]) -> int:
    if isinstance(number, float) and not isfinite(number):
        fault("NaN and infinity are not JSON; use null or text.")
    elif isinstance(number, int) and number not in INT64:
        fault("Integers must fit in 64 bit; write larger ones as text.")
        return 20
    return len(repr(number))


# --- reading


def read_json(raw: bytes | str) -> Any:
    """Read strict JSON. Raises ValueError with a sentence that names the place."""
    text = _decode(raw)
    _check_brackets(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=lambda digits: int(digits[:40]),  # as far beyond 64 bit, without the cost
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno}, column {error.colno}.") from None


def _decode(raw: bytes | str) -> str:
    if len(raw) > MAX_TEXT_BYTES:
        raise ValueError(f"The text is longer than {MAX_TEXT_BYTES:,} bytes.")
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text is not UTF-8: byte {error.start} is wrong.") from None


def _check_brackets(text: str) -> None:
    depth = 0
    # A string that never ends is one match too: tried again from every quote in it, it would take
    # the square of its length.
    for match in re.finditer(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            line, column = text.count("\n", 0, match.start()) + 1, match.start()
            column -= text.rfind("\n", 0, match.start())
            raise ValueError(f"Nested deeper than {MAX_DEPTH}: line {line}, column {column}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"The key {twice[:64]!r} appears twice in one object.")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; use null or text.")


_YAML_SCALARS: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"(~|null|Null|NULL|)"), lambda _: None),
    (re.compile(r"true|false"), lambda text: text == "true"),
    (re.compile(r"[-+]?\d{1,40}", re.A), int),
    (re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.A), float),
)
"""YAML 1.2's JSON-like scalars; dates, `yes`, `on`, `0x10` and the like stay text."""


def read_yaml(raw: bytes | str) -> Any:
    """Read one YAML document as JSON. Raises ValueError with a sentence that names the place."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _build(yaml.parse(_decode(raw), Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "at its end"
        raise ValueError(f"This is not YAML: {error.problem or error.context}: {place}.") from None
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise ValueError(f"This is not YAML: {' '.join(str(error).split())}.") from None


_ABSENT: Any = object()


def _build(events: Iterator[Any]) -> Any:
    """Build the value from events, without recursion. A frame is [container, waiting key]."""
    root: list[Any] = []
    frames: list[list[Any]] = [[root, _ABSENT]]
    for event in events:
        _check_event(event, root)
        if isinstance(event, yaml.ScalarEvent):
            _put(frames, event, _scalar(event))
        elif isinstance(event, yaml.CollectionStartEvent):
            child: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            _put(frames, event, child)
            frames.append([child, _ABSENT])
            if len(frames) > MAX_DEPTH + 1:
                raise _yaml_fault(event, f"Nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            frames.pop()
    if not root:
        raise ValueError("The text is empty.")
    return root[0]


def _check_event(event: Any, root: list[Any]) -> None:
    if getattr(event, "anchor", None):
        raise _yaml_fault(event, "Anchors and aliases (& and *) are not accepted; repeat the part")
    if getattr(event, "tag", None) not in (None, "!"):
        raise _yaml_fault(event, "Tags (!) are not accepted; leave them out")
    if isinstance(event, yaml.DocumentStartEvent) and root:
        raise _yaml_fault(event, "Only one document is accepted")


def _put(frames: list[list[Any]], event: Any, value: Any) -> None:
    container, key = frames[-1]
    if isinstance(container, list):
        container.append(value)
    elif key is not _ABSENT:
        container[key] = value
        frames[-1][1] = _ABSENT
    elif not isinstance(value, str):
        raise _yaml_fault(event, "Keys must be text; put quotes around it")
    elif value in container:
        raise _yaml_fault(event, f"The key {value[:64]!r} appears twice")
    else:
        frames[-1][1] = value


def _scalar(event: Any) -> Any:
    if event.style:
        return event.value
    found = (read for pattern, read in _YAML_SCALARS if pattern.fullmatch(event.value))
    return next(found, str)(event.value)


def _yaml_fault(event: Any, sentence: str) -> ValueError:
    mark = event.start_mark
    return ValueError(f"{sentence}: line {mark.line + 1}, column {mark.column + 1}.")


def fresh(value: Any) -> Any:
    """Return the same JSON in objects and lists of its own."""
    if isinstance(value, dict):
        return {key: fresh(member) for key, member in value.items()}
    return [fresh(item) for item in value] if isinstance(value, list) else value
