"""Log lines of every process: one JSON object (or one line of text) each, on standard error.

Ids of the request, run, task and attempt at hand are bound once with `bind` and then stand in every
line, also in those of libraries. Never logged: inputs, outputs, request bodies, keys.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars as bind
from structlog.contextvars import clear_contextvars as clear
from structlog.contextvars import unbind_contextvars as unbind
from structlog.typing import Processor

__all__ = ["bind", "clear", "configure", "get", "unbind"]

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
)
"""Applied to our own lines and to those of libraries alike."""


class _Handler(logging.StreamHandler[Any]):
    """Ours, so that configuring again replaces it and leaves other handlers alone."""


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger called `name`; its lines are `log.info("event", key=value)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def configure(level: str = "INFO", fmt: str = "json") -> None:
    """Send the log lines of this process to standard error; call again to change it.

    `level` is DEBUG, INFO, WARNING or ERROR; `fmt` is `json` or `text`.
    """
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # Caching would keep the former set-up in loggers made at import.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [_handler(fmt)]
    root.setLevel(level)
    logging.captureWarnings(True)


def _handler(fmt: str) -> _Handler:
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_json_tail() if fmt == "json" else _text_tail()),
            ],
        )
    )
    return handler


def _json_tail() -> tuple[Processor, ...]:
    return (
        structlog.processors.format_exc_info,
        _named,
        structlog.processors.JSONRenderer(default=str),
    )


def _text_tail() -> tuple[Processor, ...]:
    return (
        structlog.dev.ConsoleRenderer(
            colors=False,
            timestamp_key="at",
            # The default shows local variables: inputs, outputs and passwords.
            exception_formatter=structlog.dev.plain_traceback,
        ),
    )


def _named(logger: Any, method: str, event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put what every line has first: moment, level, logger, event."""
    first = {key: event[key] for key in ("at", "level", "logger", "event") if key in event}
    return {**first, **event}
