"""Keyset pages: `limit` and an opaque `cursor` in, `{items, nextCursor}` out, newest first.

A cursor is the sort key of the last row seen, so that a page costs the same wherever it lies, and
rows that come meanwhile make none repeat or vanish.
"""

import base64
import binascii
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

from marshmallow import Schema, ValidationError, fields

from opscore.queries import Page
from web.schemas import LARGEST_INTEGER, LARGEST_SEQ, Answer, Arguments, Limit

Part = Callable[[Any], Any]
"""Reads one part of a sort key from JSON; raises ValueError or TypeError for what is none."""


def moment(value: Any) -> datetime:
    read = datetime.fromisoformat(value)
    if read.tzinfo is None:
        raise ValueError("naive")
    try:
        return read.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("out of range") from error


def name(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("no name")
    return value


def number(value: Any) -> int:
    if type(value) is not int or not -1 <= value <= LARGEST_INTEGER:
        raise ValueError("no number")
    return value


def seq(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_SEQ:
        raise ValueError("no number of a row")
    return value


def uuid(value: Any) -> UUID:
    return UUID(value)


class Cursor(fields.Field[tuple[Any, ...]]):
    """The `nextCursor` of the page before, read as a sort key of the given parts."""

    def __init__(self, *parts: Part) -> None:
        super().__init__(
            metadata={"description": "The `nextCursor` of the page before.", "type": "string"},
        )
        self.parts = parts

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            key = json.loads(base64.urlsafe_b64decode(str(value).encode()))
            return tuple(part(given) for part, given in zip(self.parts, key, strict=True))
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise ValidationError(
                "This is no cursor of this list; leave it out to begin at the start."
            ) from None


def encode(key: tuple[Any, ...] | None) -> str | None:
    """Make the opaque cursor of a sort key."""
    if key is None:
        return None
    return base64.urlsafe_b64encode(json.dumps(key, default=str).encode()).decode()


def page_arguments(*key: Part, **more: fields.Field[Any]) -> Arguments:
    """Make the query schema of a list sorted by `key`, with filters."""
    members = {**more, "limit": Limit(), "cursor": Cursor(*key)}
    return Arguments.from_dict(members, name="Arguments")()  # type: ignore[return-value]


@cache
def page_of(schema: type[Answer], name: str | None = None) -> type[Schema]:
    """Return the answer schema of a list; `name` is its own in the description."""
    return Answer.from_dict(
        {
            "items": fields.List(fields.Nested(schema)),
            "next_cursor": fields.String(
                allow_none=True,
                metadata={"description": "Send it as `cursor` for the next page; null at the end."},
            ),
        },
        name=name or schema.__name__ + "Page",
    )


def answer(page: Page) -> dict[str, Any]:
    return {"items": page.items, "next_cursor": encode(page.next)}
