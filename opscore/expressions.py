"""Templates: JSON in which texts hold ${...} in CEL. Compiled once, rendered often. Pure.

JSON integers are CEL ints (64 bit) and numbers with a point doubles; CEL mixes the two only in
comparisons: write `double(input.n) * 1.5`. Times come out as ISO 8601 in UTC with Z, durations as
seconds, bytes as base64; objects that CEL builds have their keys sorted, and a loop over an
object's keys takes them in any order. No rendering runs away: what it reads, builds and repeats
is metered.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any

from opscore.cel_library import cel
from opscore.cel_source import MAX_LENGTH, Loop, Path, Reading, find_end
from opscore.errors import OpsCoreError
from opscore.json_values import INT64, MAX_DEPTH, Faults, at, kind

MAX_WORK = 5_000_000
"""Units of about a microsecond, in the worst case, that one rendering may take."""
STEP_WORK = 20
"""Units of one step of a loop, before anything is read."""
NAMES = frozenset({"input", "tasks", "run"})
ITEM_NAMES = NAMES | {"item", "index"}
FIRING_NAMES = frozenset({"firing"})

_CEL_FAULTS = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError)

Scope = Mapping[str, Any]


class ExpressionError(OpsCoreError):
    """An expression could not be evaluated."""

    code = "expression_error"


class _Meter:
    """What is left of the work one rendering may take."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, work: int) -> bool:
        self.left -= work
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class _Expression:
    source: str
    pointer: str
    loops: tuple[Loop, ...]
    program: cel.Program | None  # None: nothing but one path, which needs no CEL

    def evaluate(self, scope: Scope, meter: _Meter) -> Any:
        try:
            if self.program is None:
                return _follow(scope, self.loops[0].paths[0])
            value = _run(self.program, self.loops, scope, meter)
            if meter.left >= 0:
                return _json_value(value)
        except BaseException as error:
            if not isinstance(error, _CEL_FAULTS) and not _is_panic(error):
                raise
            if meter.left >= 0:
                raise self.fault(_reason(error)) from None
        raise self.fault(f"it takes more than {MAX_WORK:,} steps; use forEach or an agent for this")

    def fault(self, reason: str) -> ExpressionError:
        source = self.source if len(self.source) <= 200 else f"{self.source[:200]}…"
        sentence = f"{self.pointer}: ${{{source}}} cannot be evaluated: {reason}."
        return ExpressionError(sentence, pointer=self.pointer, expression=self.source)


# --- evaluation


def _run(program: cel.Program, loops: tuple[Loop, ...], scope: Scope, meter: _Meter) -> Any:
    """Execute, on the meter. What a `map` or `filter` has gathered is copied at each step."""
    paths = {path for loop in loops for path in loop.paths}
    sizes = {path: _size_at(scope, path) for path in paths}
    fixed = [loop.characters // 32 + sum(sizes[path] for path in loop.paths) for loop in loops]
    gathered = [0] * len(loops)

    def step(number: int, bound: list[Any]) -> bool | None:
        loop = loops[number]
        values = dict(zip(loop.binders, bound, strict=True))
        size = fixed[number] + sum(_size_at(values, path) for path in loop.bound_paths)
        for inner in loop.inner:
            gathered[inner] = 0
        gathered[number] += 1 + size if loop.macro == "map" else 0
        # Not a boolean: an error that stops the loop, or what is left of it costs nothing.
        return meter.spend(STEP_WORK + _cost(loop, size) + gathered[number]) or None

    def keep(number: int, element: Any, kept: Any) -> Any:
        gathered[number] += 1 + _size(element) if kept is True else 0
        return kept

    if not meter.spend(_cost(loops[0], fixed[0])):
        return None
    return program.execute(cel.Context(_narrowed(scope, paths), {"meter_": step, "keep_": keep}))


def _cost(loop: Loop, size: int) -> int:
    """Add what regular expressions take: compiled at each step, run over all that is read."""
    weight = loop.pattern_weight
    return size + weight * weight + size * weight // 10


def _size(value: Any) -> int:
    """Measure in units of about 100 bytes: for values, containers and every 32 characters."""
    text = json.dumps(value, default=str, skipkeys=True)
    return 1 + len(text) // 32 + text.count(",") + 2 * (text.count("[") + text.count("{"))


def _size_at(scope: Scope, path: Path) -> int:
    value: Any = scope
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return 1
    return _size(value)


def _narrowed(scope: Scope, paths: set[Path]) -> dict[str, Any]:
    """Keep only what is read: everything given to CEL is copied."""
    result: dict[str, Any] = {}
    for root in {str(path[0]) for path in paths if path[0] in scope}:
        keys = {path[1] if len(path) > 1 else None for path in paths if path[0] == root}
        whole = scope[root]
        if isinstance(whole, Mapping) and all(isinstance(key, str) for key in keys):
            whole = {key: whole[key] for key in keys if key in whole}
        result[root] = whole
    return result


def _follow(scope: Scope, path: Path) -> Any:
    """Select a value step by step. Raises ValueError saying which step leads nowhere."""
    value: Any = scope
    for number, step in enumerate(path):
        so_far = _spell(path[:number])
        if isinstance(value, Mapping) and isinstance(step, str):
            if step not in value:
                known = ", ".join(sorted(value)[:10])[:200] or "nothing"
                raise ValueError(f"{so_far} has no key {step!r}; it has {known}")
        elif not (isinstance(value, list) and isinstance(step, int)):
            raise ValueError(f"{so_far} is {kind(value)} and has no {step!r}")
        elif step >= len(value):
            raise ValueError(f"{so_far} has {len(value)} items, counted from 0, so no {step}")
        value = value[step]
    return value


def _spell(path: Path) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).lstrip(".") or "the scope"


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # Rust's; it derives from BaseException


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")[:300]
    if isinstance(error, KeyError):
        return f"there is no key {text}"
    if found := re.match(r"Undefined variable or function: '(\w+)'", text):
        return f"{found[1]} cannot be used on these values"
    return text or type(error).__name__


def _json_value(value: Any, depth: int = 0) -> Any:
    """Turn what CEL gives into JSON. Raises ValueError if it cannot be."""
    if isinstance(value, list | dict) and depth >= MAX_DEPTH:
        raise ValueError(f"its value is nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_json_value(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("its value has keys that are no text; use string(key)")
        # Sorted, for CEL's own order changes from one rendering to the next.
        return {key: _json_value(value[key], depth + 1) for key in sorted(value)}
    return _json_scalar(value)


def _json_scalar(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        raise ValueError("its value is NaN or infinite, which is not JSON")
    if isinstance(value, int) and value not in INT64:
        raise ValueError("its value does not fit in 64 bit")
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise ValueError(f"its value is a {type(value).__name__}, which is not JSON")


# --- templates

_Render = Callable[[Scope, _Meter], Any]


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON value whose texts may hold ${...}.

    A text that is exactly one ${...} keeps the value's type; within text the value is written out,
    text as it is and everything else as compact JSON. `$${` is a literal `${`.
    """

    value: Any
    reads: tuple[tuple[str, str], ...]
    """(JSON Pointer of the expression, id of the task it reads), in order."""
    _render: _Render = field(repr=False, compare=False)

    @classmethod
    def compile(
        cls, value: Any, pointer: str, faults: Faults, names: frozenset[str] = NAMES
    ) -> "Template":
        """Compile a value nested at most 64 deep, adding what is wrong with it to `faults`."""
        compiler = _Compiler(faults, names)
        render = compiler.value(value, pointer)
        return cls(value, tuple(compiler.reads), render)

    @classmethod
    def condition(cls, source: str, pointer: str, faults: Faults) -> "Template":
        """Compile one bare expression, as `when` has it, adding what is wrong with it to `faults`.

        It must come to true or false; `holds` evaluates it.
        """
        compiler = _Compiler(faults, NAMES)
        parts = compiler.expression(source, pointer)
        return cls(source, tuple(compiler.reads), parts[0].evaluate if parts else _nothing)

    def holds(self, scope: Scope) -> bool:
        """Evaluate a condition.

        Raises:
            ExpressionError: it cannot be evaluated, or is neither true nor false.
        """
        value = self._render(scope, _Meter())
        if not isinstance(value, bool):
            sentence = f"`{self.value[:200]}` must come to true or false, not to {kind(value)}."
            raise ExpressionError(sentence, expression=self.value)
        return value

    @property
    def is_expression(self) -> bool:
        """Whether it is exactly one ${...}, whose value may be of any type."""
        text = self.value
        return isinstance(text, str) and text[:2] == "${" and find_end(text, 2) == len(text) - 1

    @property
    def references(self) -> frozenset[str]:
        """The ids of the tasks it reads."""
        return frozenset(task for _, task in self.reads)

    def render(self, scope: Scope) -> Any:
        """Return the value with every expression evaluated; parts of the scope are shared.

        `scope` holds input, tasks, run, and for an item of a forEach item and index.

        Raises:
            ExpressionError: naming the place, the expression and what is missing.
        """
        return self._render(scope, _Meter())


def _nothing(scope: Scope, meter: _Meter) -> Any:
    return None


class _Compiler:
    """Compiles one template: collects faults and references as it goes."""

    def __init__(self, faults: Faults, names: frozenset[str]) -> None:
        self.faults = faults
        self.names = names
        self.reads: list[tuple[str, str]] = []

    def value(self, value: Any, pointer: str) -> _Render:
        if isinstance(value, str):
            return self._text(value, pointer)
        if isinstance(value, list):
            items = [self.value(item, at(pointer, n)) for n, item in enumerate(value)]
            return lambda scope, meter: [render(scope, meter) for render in items]
        if isinstance(value, Mapping):
            members = [(key, self._member(key, item, pointer)) for key, item in value.items()]
            return lambda scope, meter: {key: render(scope, meter) for key, render in members}
        return lambda scope, meter: value

    def _member(self, key: str, value: Any, pointer: str) -> _Render:
        if "${" in key:
            self.faults.add(at(pointer, key), "Keys are not rendered; put ${...} into a value.")
        return self.value(value, at(pointer, key))

    def _text(self, text: str, pointer: str) -> _Render:
        parts = self._parts(text, pointer)
        if len(parts) == 1 and isinstance(parts[0], _Expression):
            return parts[0].evaluate
        return lambda scope, meter: _join(parts, scope, meter)

    def _parts(self, text: str, pointer: str) -> list[str | _Expression]:
        parts: list[str | _Expression] = []
        done = 0
        while (start := text.find("${", done)) >= 0:
            if start > done and text[start - 1] == "$":
                parts.append(text[done : start - 1] + "${")
                done = start + 2
                continue
            if (stop := find_end(text, start + 2)) is None:
                sentence = f"This ${{ is not closed within {MAX_LENGTH:,} characters: "
                way = " Write $${ for the two signs themselves."
                self.faults.add(pointer, sentence + text[start : start + 100] + way)
                return []
            parts += [text[done:start]] if start > done else []
            parts += self.expression(text[start + 2 : stop], pointer)
            done = stop + 1
        return parts + ([text[done:]] if done < len(text) else [])

    def expression(self, source: str, pointer: str) -> list[_Expression]:
        """Compile one expression; nothing, and a fault, if it cannot be."""
        try:
            reading = Reading(source, self.names)
            program = None if reading.is_path else reading.compile()
        except ValueError as error:
            self.faults.add(pointer, f"${{{source[:100]}}}: {error}")
            return []
        for sentence in dict.fromkeys(reading.faults):
            self.faults.add(pointer, f"${{{source[:100]}}}: {sentence}")
        self.reads += [(pointer, task) for task in reading.tasks]
        return [_Expression(source, pointer, tuple(reading.loops), program)]


def _join(parts: list[str | _Expression], scope: Scope, meter: _Meter) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        texts.append(_as_text(part.evaluate(scope, meter)))
        if not meter.spend(len(texts[-1]) // 32):
            raise part.fault("the texts together grow too long; use an agent for this")
    return "".join(texts)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
