"""What happened, counted: which counts there are, and the tally each process keeps of them.

Counting changes a dictionary under a lock. What is counted with `count` belongs to a transaction
and counts once that commits. `metrics` adds the tallies of all processes up in PostgreSQL.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from opscore.states import RUN_ENDED, FiringStatus


@dataclass(frozen=True, slots=True)
class Counted:
    """Something that is counted; with `bounds`, a histogram of seconds."""

    name: str
    """As Prometheus has it, without `_total`."""
    about: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """The upper ends of the buckets but the last, which has none. Other bounds want another name:
    what was counted by the old ones cannot be told by the new ones."""
    known: tuple[str, ...] = ()
    """What the one label can be: all of them are told from the start, as 0, or the first of each
    kind would not be seen as a change."""


_MOMENTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

COMPLETED, FAILED, LOST, CANCELLED = "completed", "failed", "lost", "cancelled"
BUSY, UNAVAILABLE, HANDED_BACK = "busy", "unavailable", "handed_back"
UNDECIDED = "undecided"
RUN, WAKE = "run", "wake"

RUNS_SUBMITTED = Counted(
    "opscore_runs_submitted", "Runs accepted, those of sub-workflows and schedules included."
)
RUNS_ENDED = Counted(
    "opscore_runs_ended",
    "Runs that ended, by how. A failed run that is tried again ends once more.",
    ("status",),
    known=tuple(sorted(map(str, RUN_ENDED))),
)
ATTEMPTS = Counted(
    "opscore_attempts",
    "Attempts that ended, by outcome. lost: the worker went silent; busy and unavailable: the agent"
    " took no work; handed_back: the worker was stopped, or the agent deregistered; undecided: an"
    " LLM agent waits for a call to be approved.",
    ("outcome",),
    known=(COMPLETED, FAILED, LOST, CANCELLED, BUSY, UNAVAILABLE, HANDED_BACK, UNDECIDED),
)
CLAIM_TO_START = Counted(
    "opscore_claim_to_start_seconds",
    "From the claim of an attempt to the call of its agent, by the worker's clock.",
    bounds=_MOMENTS,
)
FREED_TO_NEXT = Counted(
    "opscore_freed_to_next_seconds",
    "From when a slot was given back to the claim of who stood in line for it; 0 if the statement"
    " that freed the slot claimed it.",
    bounds=(*_MOMENTS, 30.0, 60.0),
)
RESCUES = Counted(
    "opscore_keeper_rescues",
    "What the keeper sent again because its visit was lost: whole runs, or wakes of single tasks.",
    ("kind",),
    known=(RUN, WAKE),
)
FIRINGS = Counted(
    "opscore_firings",
    "Moments of schedules, by what became of them: what a beat decided, and what somebody"
    " triggered. One that waited is counted again when it is started.",
    ("status",),
    known=tuple(map(str, FiringStatus)),
)
LATENESS = Counted(
    "opscore_schedule_lateness_seconds",
    "From when a moment of a schedule was due, its jitter included, to the start of its run; of"
    " what is caught up, too. What waited for the run before it does not count.",
    bounds=(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0),
)
HTTP = Counted(
    "opscore_http_request_duration_seconds",
    "From when a request was read to when its answer begins, without the time that it asked to wait"
    " for a run. The route is a template; empty if the path is none of ours.",
    ("method", "route", "status"),
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
POOL_TIMEOUTS = Counted(
    "opscore_database_pool_timeouts",
    "How often a process waited in vain, for 10 s, for one of its own connections to PostgreSQL to"
    " be free.",
    ("process",),
    known=("web", "worker", "keeper", "beat"),
)
ALL = (
    *(RUNS_SUBMITTED, RUNS_ENDED, ATTEMPTS, CLAIM_TO_START, FREED_TO_NEXT),
    *(RESCUES, FIRINGS, LATENESS, HTTP, POOL_TIMEOUTS),
)

Entry = tuple[Counted, tuple[str, ...], float]
Key = tuple[str, tuple[str, ...]]
Counts = dict[Key, list[float]]
"""Name and values of the labels -> how many; of a histogram the sum of seconds, then how many fell
into each bucket."""

_COUNTED = "counted"
"""Where a connection keeps what its transaction counts."""


class Tally:
    """The counts of one process, since they were last taken."""

    def __init__(self) -> None:
        self.on_first: Callable[[], None] | None = None
        """Called, once, when there is something to be told."""
        self._lock = threading.Lock()
        self._counts: Counts = {}

    def add(self, what: Counted, *labels: str, value: float = 1.0) -> None:
        """Count `value` more; of a histogram, one more that took `value` seconds."""
        self.add_all([(what, labels, value)])

    def add_all(self, entries: Iterable[Entry]) -> None:
        with self._lock:
            for what, labels, value in entries:
                key = (what.name, labels)
                row = self._counts.get(key)
                if row is None:
                    row = self._counts[key] = [0.0] * (2 + len(what.bounds) if what.bounds else 1)
                row[0] += value
                if what.bounds:
                    row[1 + bisect_left(what.bounds, value)] += 1
            first = self.on_first if self._counts else None
            if first is not None:
                self.on_first = None
        if first is not None:
            first()

    def take(self) -> Counts:
        """Return what was counted, and begin anew."""
        with self._lock:
            taken, self._counts = self._counts, {}
        return taken


def begin(tx: Connection) -> list[Entry]:
    """Have what is counted with a connection from now on go to the list that is returned."""
    entries: list[Entry] = []
    tx.info[_COUNTED] = entries
    return entries


def count(tx: Connection, what: Counted, *labels: str, value: float = 1.0) -> None:
    """Count, as `Tally.add` does, if and when the transaction commits."""
    entries: Any = tx.info.get(_COUNTED)
    if entries is not None:  # a connection that no `Database` opened
        entries.append((what, labels, value))


@contextmanager
def kept(tx: Connection) -> Iterator[None]:
    """Drop what the block counts if an exception leaves it: around a savepoint."""
    entries: list[Entry] = tx.info.get(_COUNTED, [])
    before = len(entries)
    try:
        yield
    except BaseException:
        del entries[before:]
        raise
