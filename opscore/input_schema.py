"""inputSchema: JSON Schema 2020-12, compiled once, harmless to check. Pure.

Refuses what would reach out (remote references) or run away: endless references, schemas whose
parts multiply, and regular expressions, which run in `cel`'s engine, linear in the text; it knows
neither look-around nor back-references. `format` is not checked.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, cached_property
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from opscore.cel_library import cel

if TYPE_CHECKING:
    # Ten megabytes that a worker, which checks no input, need not hold.
    from jsonschema.exceptions import ValidationError

from opscore.json_values import MAX_FAULTS, Faults, at, check_json

MAX_SCHEMA_BYTES = 102_400
MAX_PATTERN_WEIGHT = 500
"""Length plus counted repeats of a regular expression: bounds the time to compile and run it."""
MAX_KEYWORDS = 250_000
"""Schema keywords applied to one input, a few seconds; references could multiply without end."""
MAX_KEYWORDS_WHEN_COMPILED = 10_000
"""The same for the trial on empty values, which no honest schema needs to exceed."""

_MATCHES = cel.compile("text.matches(pattern)")


def pattern_weight(pattern: str) -> int:
    """Estimate what a regular expression costs; counted repeats of groups multiply."""
    found = re.findall(r"\{(\d{1,9})(?:,(\d{0,9}))?\}", pattern)
    counts = [max(int(least), int(most or 0), 1) for least, most in found]
    return len(pattern) + (prod(counts) if "){" in pattern else sum(counts))


def check_pattern(pattern: str) -> str | None:
    """Say why a regular expression cannot be used; None if it can."""
    if pattern_weight(pattern) > MAX_PATTERN_WEIGHT:
        return "The regular expression is too long or repeats too much; make it simpler."
    try:
        _MATCHES.execute({"text": "", "pattern": pattern})
    except (ValueError, RuntimeError):
        return "This is no regular expression; look-around and back-references are not supported."
    return None


_left: ContextVar[list[int]] = ContextVar("_left")
Keyword = Callable[[Any, Any, Any, Any], Any]


class _TooMuch(Exception):
    """The schema would take too long on this input."""


def _counted(keyword: Keyword) -> Keyword:
    def check(
        validator: Any, value: Any, instance: Any, schema: Any
    ) -> "Iterator[ValidationError]":
        left = _left.get()
        left[0] -= 1
        if left[0] < 0:
            raise _TooMuch
        yield from keyword(validator, value, instance, schema) or ()

    return check


def _pattern(validator: Any, pattern: str, text: Any, schema: Any) -> "Iterator[ValidationError]":
    """Match in time linear in the text, which Python's own `re` does not promise."""
    from jsonschema.exceptions import ValidationError

    if isinstance(text, str) and not _MATCHES.execute({"text": text, "pattern": pattern}):
        yield ValidationError(f"does not match the pattern {pattern!r}")


def _unique_items(
    validator: Any, wanted: Any, items: Any, schema: Any
) -> "Iterator[ValidationError]":
    """Compare by canonical text: jsonschema's own way is quadratic."""
    from jsonschema.exceptions import ValidationError

    if wanted and isinstance(items, list):
        numbers = json.loads(json.dumps(items), parse_float=_plain_number)
        if len({json.dumps(item, sort_keys=True) for item in numbers}) < len(items):
            yield ValidationError("has items that are equal")


def _plain_number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


@cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator, validators

    ours: dict[str, Keyword] = {"pattern": _pattern, "uniqueItems": _unique_items}
    keywords = {**Draft202012Validator.VALIDATORS, **ours}
    return validators.extend(  # type: ignore[no-untyped-call]
        Draft202012Validator, {name: _counted(check) for name, check in keywords.items()}
    )


_NAMED_SCHEMAS = {"properties", "$defs", "definitions", "dependentSchemas"}
_PLAIN_VALUES = {"const", "enum", "default", "examples", "required", "dependentRequired"}


class Schema:
    """An inputSchema (JSON Schema 2020-12), compiled once, when it is first used."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        # The two would make the validator change its own class and its base address.
        self._schema = {k: v for k, v in schema.items() if k not in ("$schema", "$id")}

    @cached_property
    def _validator(self) -> Any:
        from referencing import Registry

        return _validator_class()(self._schema, registry=Registry())

    @classmethod
    def compile(cls, schema: Mapping[str, Any], pointer: str, faults: Faults) -> "Schema | None":
        """Add what is wrong with the schema to `faults`; return it if nothing is."""
        found = _schema_faults(schema, pointer)
        if not found:
            compiled = cls(schema)
            if compiled._endless():
                found.add(pointer, "References go round or multiply without end; use fewer $ref.")
        for place, sentences in found.items():
            for sentence in sentences:
                if sentence not in faults.get(place, []):
                    faults.add(place, sentence)
        return None if found else compiled

    def _endless(self) -> bool:
        samples: list[Any] = [None, "", 0, [], {}]
        return any(self.check(value, "", MAX_KEYWORDS_WHEN_COMPILED).fatal for value in samples)

    def check(self, value: Any, pointer: str, keywords: int = MAX_KEYWORDS) -> Faults:
        """Say where a value does not fit."""
        faults = Faults()
        token = _left.set([keywords])
        try:
            for error in islice(self._validator.iter_errors(value), MAX_FAULTS):
                faults.add(at(pointer, *error.absolute_path), _sentence(error))
        except (_TooMuch, RecursionError):
            faults.add(pointer, "inputSchema takes too long to check on this input.", fatal=True)
        finally:
            _left.reset(token)
        return faults


def _sentence(error: "ValidationError") -> str:
    return f"Does not fit inputSchema: {_shortened(error.message)}."


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def _schema_faults(schema: Mapping[str, Any], pointer: str) -> Faults:
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    faults = check_json(schema, pointer, MAX_SCHEMA_BYTES)
    if faults:
        return faults
    meta = Draft202012Validator(Draft202012Validator.META_SCHEMA)
    for error in islice(meta.iter_errors(schema), MAX_FAULTS):
        sentence = f"This is no JSON Schema: {_shortened(error.message)}."
        faults.add(at(pointer, *error.absolute_path), sentence)
    if faults:
        return faults
    resource = DRAFT202012.create_resource({k: v for k, v in schema.items() if k != "$id"})
    lookup = Registry().with_resource("", resource).resolver("").lookup
    parts = list(_subschemas(schema, pointer))
    targets = {id(part) for _, part in parts}
    for place, part in parts:
        for key, value in part.items():
            fault = _keyword_fault(key, value, place == pointer)
            if key in ("$ref", "$dynamicRef"):
                fault = _reference_fault(value, lookup, targets)
            if fault:
                faults.add(at(place, key), fault)
    return faults


def _subschemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    stack: list[tuple[str, Any, bool]] = [(pointer, schema, False)]
    while stack:
        place, part, named = stack.pop()
        if isinstance(part, list):
            stack.extend((at(place, n), item, False) for n, item in enumerate(part))
        elif isinstance(part, dict):
            if not named:
                yield place, part
            members = ((k, v) for k, v in part.items() if named or k not in _PLAIN_VALUES)
            stack.extend((at(place, k), v, not named and k in _NAMED_SCHEMAS) for k, v in members)


def _keyword_fault(key: str, value: Any, root: bool) -> str | None:
    if key == "pattern":
        return check_pattern(value)
    if key == "patternProperties":
        return "patternProperties is not supported; use properties or propertyNames."
    if key == "$schema" and (not root or "2020-12" not in value):
        return "Only JSON Schema 2020-12 is supported; leave $schema out."
    if key == "$id" and not root:
        return "$id is accepted only at the top; refer to parts as #/$defs/name."
    return None


def _reference_fault(reference: str, lookup: Callable[[str], Any], targets: set[int]) -> str | None:
    """Follow only what was itself checked as a schema."""
    from referencing.exceptions import Unresolvable

    if not reference.startswith("#"):
        return "Only references within the schema are followed; write #/$defs/name."
    try:
        found = lookup(reference).contents
    except (Unresolvable, LookupError, ValueError, TypeError, AttributeError):
        found = None
    if reference == "#" or isinstance(found, bool) or id(found) in targets:
        return None
    return f"There is no schema at {reference[:100]!r}; write #/$defs/name."
