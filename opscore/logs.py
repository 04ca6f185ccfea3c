"""Log lines of every process: one JSON object (or one line of text) each, on standard error.

Ids of the request, run, task and attempt at hand are bound once, with `bind` or for a block with
`bound`, and then stand in every line, also in those of libraries. Never logged: inputs, outputs,
request bodies, keys.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

_ids: ContextVar[Mapping[str, Any]] = ContextVar("opscore_log_ids", default={})  # noqa: B039
_encode = json.JSONEncoder(default=str).encode


def bind(**ids: Any) -> None:
    """Have these ids in every line of this context from now on."""
    _ids.set({**_ids.get(), **ids})


def clear() -> None:
    """Forget the ids of this context."""
    _ids.set({})


@contextmanager
def bound(**ids: Any) -> Iterator[None]:
    """Have these ids in every line of the block."""
    token = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


_transitions: FilteringBoundLogger = structlog.get_logger("opscore.transitions")


def transition(event: str, *, is_warning: bool = False, **fields: Any) -> None:
    """Write the line of a transition: `fields` without None, and the request at hand.

    Whoever makes it may be at another task: of what is bound nothing else is taken.
    """
    request = _ids.get().get("request_id")
    told = {name: _plain(value) for name, value in fields.items() if value is not None}
    token = _ids.set({} if request is None else {"request_id": request})
    try:
        (_transitions.warning if is_warning else _transitions.info)(event, **told)
    finally:
        _ids.reset(token)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, int | list) else str(value)


def _add_ids(logger: Any, method: str, event: EventDict) -> EventDict:
    """Add what is bound; structlog's own way to this looks through all context variables."""
    return {**_ids.get(), **event}


_SHARED: tuple[Processor, ...] = (
    _add_ids,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
)
"""Applied to our own lines and to those of libraries alike."""

_pipeline: list[Processor] = []
"""What makes a line of ours; loggers made at import keep it, so it is changed in place."""


class _Lines:
    """Where our own lines end, and those of agents that use structlog."""

    def __init__(self, name: str = "agent", *_: Any) -> None:
        self.name = name

    def write(self, line: str) -> None:
        # Nobody may be left to read it, which is no reason to fail what the line tells of: the pipe
        # is broken, the stream closed, or (AttributeError) there was none at the start.
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(line + "\n")

    debug = info = warning = error = critical = write


class _Handler(logging.Handler):
    """Takes the lines of libraries; configuring again replaces it and leaves other handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def get(name: str) -> FilteringBoundLogger:
    """Return the logger called `name`; its lines are `log.info("event", key=value)`."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def configure(level: str = "INFO", fmt: str = "json") -> None:
    """Send the log lines of this process to standard error; call again to change it.

    `level` is DEBUG, INFO, WARNING or ERROR; `fmt` is `json` or `text`.
    """
    tail = _json_tail() if fmt == "json" else _text_tail()
    _pipeline[:] = [_from_level(level), *_SHARED, *tail]
    structlog.configure(
        processors=_pipeline,
        logger_factory=_Lines,
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [_handler(tail)]
    root.setLevel(level)
    logging.captureWarnings(True)


def _from_level(level: str) -> Processor:
    lowest = structlog.processors.NAME_TO_LEVEL[level.lower()]

    def drop_below(logger: Any, method: str, event: EventDict) -> EventDict:
        if structlog.processors.NAME_TO_LEVEL[method] < lowest:
            raise structlog.DropEvent
        return event

    return drop_below


def _handler(tail: tuple[Processor, ...]) -> _Handler:
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=(*_SHARED, structlog.stdlib.ExtraAdder()),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    return handler


def _json_tail() -> tuple[Processor, ...]:
    return (structlog.processors.format_exc_info, _as_json)


def _text_tail() -> tuple[Processor, ...]:
    return (
        structlog.dev.ConsoleRenderer(
            colors=_is_for_people(),
            sort_keys=False,
            timestamp_key="at",
            # The default shows local variables: inputs, outputs and passwords.
            exception_formatter=structlog.dev.plain_traceback,
        ),
    )


def _is_for_people() -> bool:
    """Tell a terminal that may show colours from a file or a pipe."""
    return sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _as_json(logger: Any, method: str, event: EventDict) -> str:
    """Write what every line has first: moment, level, logger, event."""
    first = {key: event[key] for key in ("at", "level", "logger", "event") if key in event}
    try:
        return _encode({**first, **event})
    except (TypeError, ValueError):  # a key that is no text, or a circle
        return _encode({key: repr(value) for key, value in {**first, **event}.items()})
