"""What an agent is told about its attempt, and what it may say while it works.

A `Context` buffers; whoever renews the attempt's lease drains the buffer and stores it. It holds no
connection, so that an agent's unit test makes one by hand: `Context.for_testing()`.
"""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Event, Lock
from typing import Any, Self

from opscore.agentkit.output import Unstorable, to_json

MAX_MESSAGE_BYTES = 4 * 1024
"""Of one log or progress message, or of an error's; longer ones are cut."""

MAX_FIELDS_BYTES = 16 * 1024
"""Of the fields of one log entry, as JSON; larger ones are left out."""

MAX_UNDRAINED = 1_000
"""Log entries held until they are drained; the oldest are cut, and counted."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One `context.log(...)`. `fields` is JSON that PostgreSQL can store."""

    at: datetime
    message: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest `context.progress(...)`. `fraction` is between 0 and 1."""

    at: datetime
    fraction: float
    message: str | None


class Context:
    """The attempt an agent works on. Safe to use from several threads."""

    __slots__ = (
        "_attempt",
        "_cancelled",
        "_cut",
        "_deadline",
        "_entries",
        "_lock",
        "_progress",
        "_request_id",
        "_run_id",
        "_task_id",
        "_traceparent",
    )

    def __init__(
        self,
        *,
        run_id: str,
        task_id: str,
        attempt: int,
        deadline: datetime,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> None:
        if deadline.tzinfo is None:
            raise ValueError("deadline must be an aware datetime, such as datetime.now(UTC)")
        self._run_id, self._task_id, self._attempt = run_id, task_id, attempt
        self._deadline = deadline.astimezone(UTC)
        self._request_id, self._traceparent = request_id, traceparent
        self._cancelled = Event()
        self._lock = Lock()
        self._entries: deque[LogEntry] = deque()
        self._cut = 0
        self._progress: Progress | None = None

    @classmethod
    def for_testing(
        cls,
        *,
        run_id: str = "test-run",
        task_id: str = "test-task",
        attempt: int = 1,
        deadline: datetime | None = None,
        request_id: str | None = None,
    ) -> Self:
        """Make a context for a unit test of an agent; without `deadline` it is ten minutes away."""
        deadline = deadline or datetime.now(UTC) + timedelta(minutes=10)
        return cls(
            run_id=run_id,
            task_id=task_id,
            attempt=attempt,
            deadline=deadline,
            request_id=request_id,
        )

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def task_id(self) -> str:
        return self._task_id

    @property
    def attempt(self) -> int:
        """Which try at the task this is, from 1."""
        return self._attempt

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at the task: hand it to services that honour one."""
        return self._task_id

    @property
    def deadline(self) -> datetime:
        """When the attempt is stopped (aware UTC)."""
        return self._deadline

    @property
    def request_id(self) -> str | None:
        """The `X-Request-ID` of the request that submitted the run; None if a schedule did."""
        return self._request_id

    @property
    def traceparent(self) -> str | None:
        """The span that the agent works for (W3C Trace Context); None without traces."""
        return self._traceparent

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the result any more; a long loop asks now and then."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Tell the agent to stop; it does so when it next asks `cancelled`."""
        self._cancelled.set()

    def log(self, message: object, /, **fields: Any) -> None:
        """Keep a message with the attempt. Never raises: what cannot be stored is described."""
        text = storable_text(message, MAX_MESSAGE_BYTES)
        entry = LogEntry(datetime.now(UTC), text, _storable_fields(fields))
        with self._lock:
            self._entries.append(entry)
            if len(self._entries) > MAX_UNDRAINED:
                self._entries.popleft()
                self._cut += 1

    def progress(self, fraction: float, message: object = None) -> None:
        """Say how far the work is, between 0 and 1; the newest report is kept.

        Raises:
            ValueError: `fraction` is not a number.
        """
        if not isinstance(fraction, int | float) or fraction != fraction:
            raise ValueError(f"fraction must be a number from 0 to 1, not {fraction!r}")
        text = None if message is None else storable_text(message, MAX_MESSAGE_BYTES)
        report = Progress(datetime.now(UTC), float(min(1, max(0, fraction))), text)
        with self._lock:
            self._progress = report

    def drain(self) -> tuple[list[LogEntry], Progress | None]:
        """Take the entries since the last call, oldest first, and the newest progress if it is new.

        Where entries were cut, the first one returned says how many.
        """
        with self._lock:
            entries, self._entries = list(self._entries), deque()
            cut, self._cut = self._cut, 0
            progress, self._progress = self._progress, None
        if cut:
            note = f"{cut} earlier entries were cut: more than {MAX_UNDRAINED} at once."
            entries.insert(0, LogEntry(entries[0].at, note, {"cut": cut}))
        return entries, progress


def storable_text(value: object, max_bytes: int, *, keep: str = "start") -> str:
    """Turn `value` into text that PostgreSQL can store, at most `max_bytes` long in UTF-8.

    NUL and lone surrogates are replaced. A longer text keeps its start, or with `keep="end"` its
    end.
    """
    data = _text(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    room = max_bytes - len("…".encode())
    if keep == "end":
        return "…" + data[-room:].decode(errors="ignore")
    return data[:room].decode(errors="ignore") + "…"


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} whose __str__ raised {type(error).__name__}>"


def _storable_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # What is no JSON is logged as its text: a log line should tell, not refuse.
        stored: dict[str, Any] = to_json(json.loads(json.dumps(fields, default=_text)))
    except (Unstorable, ValueError, TypeError, RecursionError) as error:
        return {"unstorable": storable_text(error, MAX_MESSAGE_BYTES)}
    if len(json.dumps(stored)) > MAX_FIELDS_BYTES:
        return {"unstorable": f"The fields take more than {MAX_FIELDS_BYTES} bytes as JSON."}
    return stored
