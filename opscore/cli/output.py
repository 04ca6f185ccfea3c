"""How things look for people: tables, details, times. Colours only on a terminal, and no NO_COLOR.

What agents and users wrote is printed without control characters: nobody's output moves a cursor.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLES: Mapping[str, str] = {
    "completed": "green",
    "started": "green",
    "ready": "green",
    "ok": "green",
    "idle": "green",
    "running": "cyan",
    "active": "cyan",
    "waiting": "yellow",
    "queued": "yellow",
    "paused": "magenta",
    "failed": "red",
    "error": "red",
    "lost": "red",
    "cancelled": "dim",
    "skipped": "dim",
    "pending": "dim",
}
"""By status."""
NOTHING = "-"
GAP = 2
"""Blanks between columns."""
NARROWEST = 12
"""Characters a column of text is left."""
LONGEST_VALUE = 60
"""Characters of a value in a table."""

_BLANKS = dict.fromkeys("\t\r\n", " ")
_WHOLE = re.compile(r"-|[0-9a-f-]{36}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_NOT_ASCII = re.compile("[^\n -~]")

Column = tuple[str, Callable[[Any], Any]]
"""A heading, and what stands below it of a row."""


@cache
def console() -> "Console":
    """Return where things are printed; as wide as it takes if that is no terminal."""
    from rich.console import Console

    screen = Console(highlight=False, markup=False, emoji=False)
    return screen if screen.is_terminal else Console(width=1_000_000, highlight=False)


def plain(value: Any) -> str:
    """Return a value as text that a terminal cannot take for orders."""
    if value is None:
        return NOTHING
    text = value if isinstance(value, str) else as_json(value)
    return "".join(
        c if c.isprintable() else _BLANKS.get(c, "\N{REPLACEMENT CHARACTER}") for c in text
    )


def lines(text: str) -> str:
    """Return text of several lines as `plain` has each of them."""
    return "\n".join(map(plain, text.splitlines()))


def say(text: str, err: bool = False) -> None:
    """Print text that holds what others wrote."""
    click.echo(lines(text), err=err)


def as_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON; what is no visible character, and may be an order, is escaped."""
    return _NOT_ASCII.sub(_escaped, json.dumps(value, indent=indent, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def cell(value: Any) -> "Text":
    """Return a value as it stands in a table; a status in its colour."""
    from rich.text import Text

    if isinstance(value, Text):
        return value
    return Text(plain(value), style=STYLES.get(value, "") if isinstance(value, str) else "")


def table(rows: Iterable[Any], columns: Sequence[Column], empty: str) -> None:
    """Print rows; `empty` says what to print if there are none.

    Where a terminal is too narrow, the last columns are left out: ids are never broken.
    """
    from rich.table import Table

    found = list(rows)
    if not found:
        click.echo(empty)
        return
    cells = [[cell(read(row)) for row in found] for _, read in columns]
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    shown = _fitting([head for head, _ in columns], cells)
    for (head, _), column in list(zip(columns, cells, strict=True))[:shown]:
        whole = not console().is_terminal or _is_whole(column)
        grid.add_column(head, no_wrap=whole, overflow="fold")
    for row in zip(*cells[:shown], strict=True):
        grid.add_row(*row)
    _print(grid)


def _fitting(heads: Sequence[str], columns: Sequence[Sequence["Text"]]) -> int:
    """Return how many columns have room beside each other, from the first on."""
    left = console().width
    for number, (head, column) in enumerate(zip(heads, columns, strict=True)):
        widest = max(len(head), *(text.cell_len for text in column))
        left -= widest if _is_whole(column) else max(len(head), min(widest, NARROWEST))
        if left < 0:
            return max(number, 1)
        left -= GAP
    return len(heads)


def _is_whole(column: Sequence["Text"]) -> bool:
    """Tell whether a column has what people copy, or read at a glance: ids and moments."""
    return all(_WHOLE.fullmatch(text.plain) for text in column)


def _print(thing: Any) -> None:
    """Print without the blanks with which rich fills lines up."""
    with console().capture() as capture:
        console().print(thing)
    for line in capture.get().rstrip("\n").split("\n"):
        click.echo(line.rstrip(), color=console().color_system is not None or None)


def echo(text: str) -> None:
    """Print text that may be styled; without its colours where none are wanted."""
    click.echo(text, color=False if console().no_color else None)


def details(members: Mapping[str, Any]) -> None:
    """Print what is known of one thing, a line each; what has no value is left out."""
    known = {name: value for name, value in members.items() if value not in (None, {}, [])}
    width = max(map(len, known), default=0) + 2
    for name, value in known.items():
        click.echo(f"{name + ':':<{width}}", nl=False)
        _print(cell(value))


def block(head: str, value: Any) -> None:
    """Print a value that may be large, as indented JSON below a heading."""
    click.echo(f"{head}:")
    text = value if isinstance(value, str) else as_json(value, indent=2)
    for line in text.splitlines():
        click.echo(f"  {plain(line)}")


def short(value: Any) -> str:
    """Return a value in a few words."""
    text = plain(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def moment(text: str | None) -> str | None:
    """Return a moment of the API in this machine's time, to the second."""
    if text is None:
        return None
    at = _read(text)
    with suppress(OverflowError):  # so late that there is none here
        at = at.astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S}"


def age(text: str | None) -> str | None:
    """Return how long ago a moment of the API was, or in how long it is."""
    if text is None:
        return None
    seconds = (datetime.now(UTC) - _read(text)).total_seconds()
    return span(seconds) if seconds >= 0 else f"in {span(-seconds)}"


def ago(text: str | None) -> str | None:
    """Return how long ago a moment of the API was, in words."""
    return None if text is None else f"{age(text)} ago"


def span(seconds: float) -> str:
    """Return a time in its largest unit that is not less than one."""
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def between(start: str | None, end: str | None) -> str | None:
    """Return how long something took, or takes so far."""
    if start is None:
        return None
    until = datetime.now(UTC) if end is None else _read(end)
    return span(max(0.0, (until - _read(start)).total_seconds()))


def _read(text: str) -> datetime:
    return datetime.fromisoformat(text)


def reason(run: Mapping[str, Any]) -> str | None:
    """Return why a run is not under way; from when on it is, if that is known."""
    if run["reason"] == "start_at" and run["startAt"]:
        return f"start_at {moment(run['startAt'])}"
    found: str | None = run["reason"]
    return found


def usage(used: Mapping[str, Any] | None) -> str | None:
    """Say what LLM agents have used."""
    if used is None:
        return None
    cost = "" if used["costUsd"] is None else f", {used['costUsd']:.4f} USD"
    tokens = used["inputTokens"] + used["outputTokens"]
    return f"{tokens:,} tokens in {used['replies']:,} replies{cost}"


def task_name(task: Mapping[str, Any]) -> str:
    """Return how a task of a run, or an item of its `forEach`, is called."""
    index = "" if task["index"] is None else f"[{task['index']}]"
    return f"{task['taskDefinitionId']}{index}"
