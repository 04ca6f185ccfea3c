"""The text of a CEL expression: what it reads, and how its loops are kept within bounds. Pure.

`cel` runs uninterruptibly, its parser recurses on the thread's stack, and its `map` copies its list
at every step. So length and depth are limited before it sees a text, and every loop is rewritten to
ask a meter at each step. Refused: unknown names and functions, `tasks` without a fixed id.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from opscore.cel_library import cel
from opscore.input_schema import check_pattern, pattern_weight
from opscore.json_values import unknown

MAX_LENGTH = 4_096
"""Characters of one expression."""
MAX_TOKENS = 1_000
"""With MAX_BRACKETS this keeps the parser within 2 MiB of stack; threads have 8."""
MAX_BRACKETS = 32
MAX_LOOPS_DEEP = 8

_TASK_FIELDS = ("output", "status", "error")
_RUN_FIELDS = ("id", "workflowId")
_FIRING_FIELDS = ("at", "schedule")
_LITERALS = {"true", "false", "null", "in"}
_TYPES = {"bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"}
_MACROS = {"all", "exists", "exists_one", "existsOne", "filter", "map"}
_FUNCTIONS = _TYPES - {"bool", "list", "map", "null_type"} | {
    *("contains", "duration", "dyn", "endsWith", "matches", "size", "startsWith", "timestamp"),
    *("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours"),
    *("getMilliseconds", "getMinutes", "getMonth", "getSeconds"),
}
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|//[^\n]*)+)
      | (?P<text>[bB]?[rR](?:\"{3}.*?\"{3}|'{3}.*?'{3}|"[^"\n]*"|'[^'\n]*')
        | [bB]?(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}
          |"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
      | (?P<number>0[xX][0-9a-fA-F]+[uU]?|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?[uU]?)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<mark>.)""",
    re.X | re.S | re.A,
)
_SIMPLE = re.compile(r"""[^{}'"/]*\}""")
_PLAIN_TEXT = re.compile(r"""("[^"\\]*"|'[^'\\]*')""")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}

Path = tuple[str | int, ...]


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


def scan(source: str, start: int, stop: int) -> Iterator[Token]:
    """Yield the tokens, without spaces and comments; what is no token comes sign by sign."""
    for match in _TOKEN.finditer(source, start, stop):
        if match.lastgroup != "space":
            yield Token(match.lastgroup or "", match[0], match.start(), match.end())


def find_end(text: str, start: int) -> int | None:
    """Return where the } stands that closes an expression starting here; None if none does."""
    stop = min(len(text), start + MAX_LENGTH + 1)
    if simple := _SIMPLE.match(text, start, stop):
        return simple.end() - 1
    depth = 0
    for token in scan(text, start, stop):
        depth += {"{": 1, "}": -1}.get(token.text, 0)
        if depth < 0:
            return token.start
    return None


@dataclass(slots=True)
class Loop:
    """A macro with a bound name, or the whole expression: what each of its steps reads."""

    binder: str = ""
    macro: str = ""
    opened: int = -1  # the token that is its bracket
    start: int = 0  # of its first argument after the name
    stop: int = 0  # where that argument ends
    arguments: int = 1
    characters: int = 0  # of its own tokens
    pattern_weight: int = 0
    paths: list[Path] = field(default_factory=list)  # in scope; they are the same at every step
    bound_paths: list[Path] = field(default_factory=list)  # from names that loops bind
    inner: list[int] = field(default_factory=list)  # numbers of the loops within it

    @property
    def binders(self) -> list[str]:
        return list(dict.fromkeys(str(path[0]) for path in self.bound_paths))


class Reading:
    """One pass over an expression. Loop number 0 is the whole of it."""

    def __init__(self, source: str, names: frozenset[str]) -> None:
        tokens = list(scan(source, 0, len(source)))
        _check_size(tokens)
        self._tokens = [*tokens, *[Token("end", "", len(source), len(source))] * 4]
        self._names = names
        self._open: list[int] = []
        self._active = [0]
        self.source = source
        self.faults: list[str] = []
        self.tasks: dict[str, None] = {}
        self.loops = [Loop()]
        index = 0
        while index < len(tokens):
            index = self._step(index)
        one_path = tokens[0].kind == "name" and _path(self._tokens, 0)[1] == len(tokens)
        self.is_path = one_path and bool(self.loops[0].paths)

    def _step(self, index: int) -> int:
        token, loop = self._tokens[index], self.loops[self._active[-1]]
        loop.characters += len(token.text)
        if token.kind == "name":
            return self._name(index)
        if token.text in ("(", "[", "{"):
            self._open.append(index)
        elif token.text in (")", "]", "}") and self._open:
            self._close(loop, token)
        elif token.text == "," and self._open and self._open[-1] == loop.opened:
            loop.arguments += 1
            loop.stop = loop.stop or token.start
        return index + 1

    def _close(self, loop: Loop, token: Token) -> None:
        if self._open.pop() == loop.opened:
            loop.stop = loop.stop or token.start
            self._active.pop()

    def _name(self, index: int) -> int:
        selected = index > 0 and self._tokens[index - 1].text == "."
        token, after, binder, comma = self._tokens[index : index + 4]
        if after.text == "(":
            if token.text == "matches":
                self._match(index)
            macro = selected and token.text in _MACROS
            if macro and binder.kind == "name" and comma.text == ",":
                return self._enter(Loop(binder.text, token.text, index + 1, comma.end))
            return index + 1
        if selected or token.text in _LITERALS:
            return index + 1
        return self._root(index)

    def _enter(self, loop: Loop) -> int:
        if loop.binder in self._names:
            self.faults.append(f"{loop.binder!r} means something already; bind another name.")
        if len(self._active) > MAX_LOOPS_DEEP:
            raise ValueError(f"Loops may be nested at most {MAX_LOOPS_DEEP} deep.")
        number = len(self.loops)
        for outer in self._active:
            self.loops[outer].inner.append(number)
        self._open.append(loop.opened)
        self._active.append(number)
        self.loops.append(loop)
        return loop.opened + 3

    def _match(self, index: int) -> None:
        pattern, closing = self._tokens[index + 2 : index + 4]
        if pattern.kind != "text" or closing.text != ")":
            self.faults.append('matches() takes one literal: text.matches("^[a-z]+$").')
        elif fault := check_pattern(_unquoted(pattern.text)):
            self.faults.append(fault)
        self.loops[self._active[-1]].pattern_weight += pattern_weight(pattern.text)

    def _root(self, index: int) -> int:
        name, loop = self._tokens[index].text, self.loops[self._active[-1]]
        path, after = _path(self._tokens, index)
        if any(name == self.loops[number].binder for number in self._active):
            loop.bound_paths.append(path)
        elif name in self._names:
            self._check_root(path, self._tokens[after].text)
            loop.paths.append(path)
        elif name not in _TYPES:
            self.faults.append(self._unknown(index))
        return after

    def _check_root(self, path: Path, after: str) -> None:
        if path[0] == "run" and len(path) > 1 and path[1] not in _RUN_FIELDS:
            self.faults.append("run has only .id and .workflowId.")
        if path[0] == "firing" and len(path) > 1 and path[1] not in _FIRING_FIELDS:
            self.faults.append("firing has only .at and .schedule.")
        if path[0] != "tasks":
            return
        if len(path) < 2 or not isinstance(path[1], str):
            self.faults.append('After tasks comes a fixed id: tasks.name or tasks["my-id"].')
            return
        self.tasks[path[1]] = None
        if (path[2] not in _TASK_FIELDS) if len(path) > 2 else after in (".", "["):
            self.faults.append(
                "Only .output, .status or .error may follow a task;"
                f' an id with a dot is written tasks["{path[1]}..."].'
            )

    def _unknown(self, index: int) -> str:
        name = self._tokens[index].text
        if index and self._tokens[index - 1].text == "-":
            return f'There is no name {name!r}; an id with "-" is written tasks["my-id"].'
        return unknown(name, self._names, "There is no name")

    def compile(self) -> cel.Program:
        """Compile, with every loop on the meter. Raises ValueError if it is no CEL.

        The program calls `meter_(loop, bound values)` before each step, true meaning go on, and
        `keep_(loop, element, predicate)`, returning the predicate, for each element a filter tries.
        """
        program = _compiled(self.source)
        self.faults += self._unseen(program)
        return _compiled(self._metered()) if self.loops[1:] and not self.faults else program

    def _unseen(self, program: cel.Program) -> list[str]:
        """Say which names `cel` knows of that this reading did not account for."""
        seen = {token.text for token in self._tokens if token.kind == "name"}
        names = [name for name in program.variables() if name not in seen]
        calls = {name for name in program.functions() if name.isidentifier()} - _FUNCTIONS
        return [unknown(name, self._names, "There is no name") for name in names] + [
            unknown(name, _FUNCTIONS, "There is no function") for name in sorted(calls)
        ]

    def _metered(self) -> str:
        source = self.source
        edits: list[tuple[int, str]] = []
        for number, loop in enumerate(self.loops[1:], 1):
            call = f" meter_({number}, [{', '.join(loop.binders)}])"
            if loop.macro == "map" and loop.arguments == 1:
                edits.append((loop.start, f"{call},"))
            elif loop.macro == "filter":
                edits.append((loop.start, f"{call} ? keep_({number}, {loop.binder}, ("))
                edits.append((loop.stop, ")) : false"))
            else:
                edits += [(loop.start, f"{call} ? ("), (loop.stop, ") : false")]
        for position, text in sorted(edits, reverse=True):
            source = source[:position] + text + source[position:]
        return source


def _path(tokens: list[Token], index: int) -> tuple[Path, int]:
    """Follow the fixed selections after a name: `.key`, `["key"]`, `[0]`."""
    steps: list[str | int] = [tokens[index].text]
    index += 1
    while (step := _selection(*tokens[index : index + 3])) is not None:
        steps.append(step)
        index += 2 if tokens[index].text == "." else 3
    return tuple(steps), index


def _selection(
    mark: Token, key: Token | None = None, after: Token | None = None
) -> str | int | None:
    if key is None or after is None:
        return None
    if mark.text == "." and key.kind == "name" and after.text != "(":
        return None if key.text in _LITERALS else key.text
    if mark.text == "[" and after.text == "]":
        if _PLAIN_TEXT.fullmatch(key.text):
            return key.text[1:-1]
        if re.fullmatch("[0-9]{1,9}", key.text):
            return int(key.text)
    return None


def _check_size(tokens: list[Token]) -> None:
    if not tokens:
        raise ValueError("The expression is empty.")
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"The expression has more than {MAX_TOKENS:,} words and signs.")
    depth = 0
    for token in tokens:
        depth += _BRACKETS.get(token.text, 0)
        if depth > MAX_BRACKETS:
            raise ValueError(f"Brackets may be nested at most {MAX_BRACKETS} deep.")


def _compiled(source: str) -> cel.Program:
    try:
        return cel.compile(source)
    except ValueError as error:
        found = re.search(r"ERROR: <input>:\d+:(\d+): (.*?)(?: expecting \{.*)?$", str(error), re.M)
        where = f"{found[2]} (column {found[1]})" if found else str(error)
        raise ValueError(f"This is not CEL: {where[:200]}.") from None


def _unquoted(text: str) -> str:
    try:
        return str(cel.evaluate(text))
    except ValueError:
        return text
