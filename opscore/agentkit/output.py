"""Turning what an agent returned into JSON that can be stored, or saying why it cannot be.

Agents return Python values; this makes plain JSON values of them. What of those may be stored is
decided in `json_values`, for what agents return as for what clients send.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

MAX_LEVELS = 100
"""Where the walk stops; more than may be stored, so that what may be stored decides."""

MAX_VALUES = 550_000
"""Where the walk gives up: no output that may be stored holds more, and one that shares its parts
can be small in memory and all but endless written out."""

FAULTS_SHOWN = 3


class Unstorable(Exception):
    """The output is no JSON that can be stored; the message names the place."""

    code = "invalid_output"

    def __init__(self, *faults: tuple[str, str]) -> None:
        said = [f"{f'at {place}' if place else 'as a whole'}: {words}" for place, words in faults]
        super().__init__(f"The output cannot be stored, {'; '.join(said[:FAULTS_SHOWN])}")


class TooLarge(Unstorable):
    """The output is larger than what is stored."""

    code = "output_too_large"


def to_json(output: object) -> Any:
    """Return `output` as plain JSON values that `json_values.check_json` accepts.

    Taken are what `json.dumps` takes, with text as keys, and besides: aware datetimes (in UTC, with
    Z), dates, UUIDs and Decimals (as text) and dataclasses (as objects). Tuples become lists.

    Raises:
        Unstorable: naming the first places that are something else.
    """
    # Not above: authors of agents import this package, and should not wait for CEL and jsonschema.
    from opscore.json_values import check_json

    try:
        value = _Walk().plain(output, "", 0)
    except Unstorable:
        raise
    except Exception as error:  # a mapping or number of the agent's own making
        raise Unstorable(("", f"reading it raised {type(error).__name__}: {error}")) from error
    if faults := check_json(value):
        kind = TooLarge if faults.too_large else Unstorable
        raise kind(*((place, " ".join(said)) for place, said in faults.items()))
    return value


class _Walk:
    """One way through an output, counting values as it goes."""

    def __init__(self) -> None:
        self._values = 0

    def plain(self, value: object, place: str, level: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise TooLarge(("", f"It holds more than {MAX_VALUES:,} values."))
        if value is None or isinstance(value, bool):
            return value
        for kind, convert in _SCALARS:
            if isinstance(value, kind):
                return convert(value, place)
        if level > MAX_LEVELS:
            return []
        if isinstance(value, list | tuple):
            return [self.plain(v, f"{place}/{n}", level + 1) for n, v in enumerate(value)]
        return {
            _key(key, place): self.plain(item, f"{place}/{_escaped(key)}", level + 1)
            for key, item in _members(value, place)
        }


def _members(value: object, place: str) -> Iterable[tuple[object, object]]:
    if isinstance(value, Mapping):
        return value.items()
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    raise Unstorable((place, f"A {type(value).__name__} is no JSON: return text, lists, dicts ..."))


def _key(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise Unstorable((place, f"The key {key!r} is no text: write str(key)."))
    return str.__str__(key)


def _escaped(key: object) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _datetime(value: datetime, place: str) -> str:
    if value.tzinfo is None:
        raise Unstorable((place, "The datetime names no time zone: write datetime.now(UTC)."))
    return value.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


# In this order: a StrEnum is text, a datetime is a date too.
_SCALARS: tuple[tuple[type, Callable[[Any, str], Any]], ...] = (
    (str, lambda value, _: str.__str__(value)),
    (int, lambda value, _: int(value)),
    (float, lambda value, _: float(value)),
    (datetime, _datetime),
    (date, lambda value, _: value.isoformat()),
    (UUID, lambda value, _: str(value)),
    (Decimal, lambda value, _: str(value)),
)
