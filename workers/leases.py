"""Keeping the leases of the attempts this process runs, and storing what they say meanwhile.

A daemon thread, so that it outlives a warm shutdown and ends with the process: as long as an
attempt runs here, its lease is renewed here (I5), though never beyond its deadline. What a worker
that is asked to stop cannot end in time is handed back.
"""

import mmap
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from opscore import engine, logs
from opscore.agentkit import Context
from opscore.config import Settings
from opscore.db import Database

log = logs.get(__name__)

FLUSH_SECONDS = 1.0
"""How long a line an agent logged may take to be seen."""


class Ending:
    """When a worker that was asked to stop hands back what it holds, told to all its processes.

    Made before the first fork, so that the memory is shared: children that are not forked (macOS)
    never learn of it, and their attempts are left to their leases.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, struct.calcsize("d"))

    def set(self, grace_seconds: float) -> None:
        """Begin the grace; a second request changes nothing."""
        if not self.moment:
            self._memory[:] = struct.pack("d", monotonic() + grace_seconds)

    @property
    def moment(self) -> float:
        """On the clock of `monotonic`, which all processes share; 0 while nobody asked."""
        moment: float = struct.unpack("d", self._memory[:])[0]
        return moment

    @property
    def has_come(self) -> bool:
        return 0 < self.moment <= monotonic()


@dataclass(slots=True)
class _Held:
    attempt: int
    context: Context
    lines: int = 0


class Leases:
    """The attempts of this process."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        ending: Ending,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """`tell` is called once something was handed back: the process ends soon."""
        self._database = database
        self._tell = tell
        self._settings = settings
        self._ending = ending
        self._held: dict[UUID, _Held] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._renewed_at = monotonic()

    @contextmanager
    def hold(self, task_id: UUID, context: Context) -> Iterator[None]:
        """Renew the lease while the block runs; what the attempt said is stored when it leaves."""
        held = _Held(context.attempt, context)
        with self._lock:
            self._held[task_id] = held
            self._start()
        try:
            yield
        finally:
            with self._lock:
                self._held.pop(task_id, None)
            self._flush(task_id, held)

    def _start(self) -> None:
        if self._thread is None:
            self._renewed_at = monotonic()
            self._thread = threading.Thread(target=self._loop, name="leases", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(self._pause())
            try:
                self._round()
            except Exception:
                # Without this thread every attempt of the process would be lost.
                log.exception("lease.round_failed")

    def _pause(self) -> float:
        """Return the seconds until something is due: at the latest what a stop has hand back."""
        seconds = min(FLUSH_SECONDS, self._settings.renew_seconds)
        left = self._ending.moment - monotonic()
        return min(seconds, left) if left > 0 else seconds

    def _round(self) -> None:
        """Renew what is due, then store what was said: a slow log must not cost a lease."""
        with self._lock:
            held = dict(self._held)
        if held and monotonic() - self._renewed_at >= self._settings.renew_seconds:
            self._renew(held)
        for task_id, attempt in held.items():
            self._flush(task_id, attempt)
        if self._ending.has_come:
            self._hand_back()

    def _hand_back(self) -> None:
        """Give up what is still running; should it end after all, its outcome is refused."""
        with self._lock:
            held = dict(self._held)
        any_back = False
        for task_id, one in held.items():
            one.context.cancel()
            try:
                with self._database.transaction() as tx:
                    is_back = engine.hand_back(tx, task_id, UUID(one.context.run_id), one.attempt)
            except SQLAlchemyError as error:
                log.warning("attempt.left_to_its_lease", error=repr(error)[:300])
                continue
            any_back |= is_back
        if any_back:
            self._tell()

    def _renew(self, held: dict[UUID, _Held]) -> None:
        """Renew all leases at once; a lost or cancelled attempt's agent is told to stop."""
        try:
            with self._database.autocommit() as tx:
                attempts = {task_id: one.attempt for task_id, one in held.items()}
                answers = engine.renew_leases(tx, attempts, self._settings.lease_seconds)
        except SQLAlchemyError as error:
            log.warning("lease.renewal_failed", error=repr(error)[:300])
            return
        self._renewed_at = monotonic()
        for task_id, one in held.items():
            if answers.get(task_id, True):
                one.context.cancel()

    def _flush(self, task_id: UUID, held: _Held) -> None:
        """Store what the attempt said; failing costs a line of its log, never its outcome."""
        with self._flushing:
            entries, progress = held.context.drain()
            if not entries and progress is None:
                return
            lines = [
                {
                    "line": held.lines + number,
                    "at": entry.at.isoformat(),
                    "message": entry.message,
                    "fields": dict(entry.fields),
                }
                for number, entry in enumerate(entries, 1)
            ]
            held.lines += len(lines)
            try:
                with self._database.transaction() as tx:
                    engine.write_log(tx, task_id, held.attempt, lines)
                    if progress is not None:
                        engine.write_progress(
                            tx, task_id, held.attempt, progress.fraction, progress.message
                        )
            except SQLAlchemyError as error:
                log.warning("attempt.log_failed", task_id=str(task_id), error=repr(error)[:300])
