"""What Prometheus is told: how everything is at this moment, and what happened since ever.

What is, is read as `status` reads it, by the indexes of what is open. What happened was counted by
each process (see `tally`), and each adds its counts to those of all in one table every few seconds:
so whoever is asked tells of the whole installation, and no restart begins anew. A process that is
killed takes its last seconds along. Telling may fail, and is tried again: it costs no outcome.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from opscore import engine, logs, status, tally
from opscore.config import installed_version
from opscore.db import Database, Prepared, Tx
from opscore.dispatch import Depth
from opscore.models import IN_LINE
from opscore.presence import DEAD_SECONDS, FORGET_SECONDS
from opscore.states import Reason
from opscore.tally import Counted, Counts

log = logs.get(__name__)

TELL_SECONDS = 5.0
LAST_WORDS_SECONDS = 2.0
"""How long a process that ends takes to tell what it counted last."""

# --- Telling --------------------------------------------------------------------------------------

_TELL = Prepared(
    """
WITH told AS (
    INSERT INTO processes (id, kind, batch, pool_size, pool_used)
    VALUES (:id, :kind, :batch, :pool_size, :pool_used)
    ON CONFLICT (id) DO UPDATE
    SET batch = excluded.batch, pool_size = excluded.pool_size, pool_used = excluded.pool_used,
        seen_at = now()
    WHERE processes.batch < excluded.batch
    RETURNING 1
)
INSERT INTO metrics AS m (name, labels, value, buckets)
SELECT c.name, c.labels, c.value, c.buckets
FROM told, jsonb_to_recordset(:counts) AS c (
    name text, labels text[], value float, buckets bigint[])
ORDER BY c.name, c.labels  -- all in one order, or two could wait for each other
ON CONFLICT (name, labels) DO UPDATE
SET value = m.value + excluded.value,
    buckets = ARRAY(SELECT coalesce(a, 0) + coalesce(b, 0)
                    FROM unnest(m.buckets, excluded.buckets) WITH ORDINALITY AS u (a, b, n)
                    ORDER BY n)
""",
    json=("counts",),
)
_FORGET = text("DELETE FROM processes WHERE seen_at < now() - make_interval(secs => :seconds)")


class Teller:
    """Adds what a process counts to what all have counted, from a thread of its own.

    It starts when there is something to tell, and ends with `stop` or the process. `is_steady`: it
    starts at once, and tells also that there is nothing new: of processes that are few and matter.
    """

    def __init__(self, database: Database, *, is_steady: bool = False) -> None:
        self.database = database
        self.is_steady = is_steady
        self._id = uuid4()
        self._batch = 0
        self._untold: Counts = {}
        self._telling = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if is_steady:
            self._start()
        else:
            database.tally.on_first = self._start

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="teller", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._ended.wait(TELL_SECONDS)
            try:
                self.tell()
            except SQLAlchemyError as error:
                log.warning("metrics.not_told", error=repr(error)[:300])
            except Exception:
                # Without this thread the process would count for nobody.
                log.exception("metrics.not_told")

    def stop(self) -> None:
        """Tell what was counted last; not for long."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(LAST_WORDS_SECONDS)

    def tell(self) -> None:
        """Tell what was counted since the last time, once: what failed is told again first.

        Raises SQLAlchemyError.
        """
        with self._telling:
            if not self._untold:
                self._untold = self.database.tally.take()
                self._batch += 1
            if self._untold or self.is_steady:
                with self.database.autocommit() as tx:
                    _TELL(tx, self._told())
            self._untold = {}

    def _told(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "kind": self.database.process,
            "batch": self._batch,
            "pool_size": self.database.pool_size,
            "pool_used": self.database.take_most_used(),
            "counts": [
                {"name": name, "labels": labels, "value": value, "buckets": list(map(int, buckets))}
                for (name, labels), (value, *buckets) in self._untold.items()
            ],
        }


def forget(tx: Tx) -> None:
    """Delete the rows of processes that told nothing for long."""
    tx.execute(_FORGET, {"seconds": FORGET_SECONDS})


# --- What there is to read ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gauge:
    """Something that is so much at this moment."""

    name: str
    about: str
    labels: tuple[str, ...] = ()


BUILD = Gauge("opscore_build_info", "1, with the version of the web process asked.", ("version",))
REDIS_UP = Gauge("opscore_redis_up", "Whether Redis answers; without it no queue is told.")
PROBLEMS = Gauge(
    "opscore_problems",
    "What `opscore doctor` finds to be the matter, by code.",
    ("code",),
)
RUNS = Gauge(
    "opscore_runs",
    "Runs that are not over. The reason is why a queued one waits, else empty.",
    ("status", "reason"),
)
RUNS_OLDEST = Gauge(
    "opscore_runs_oldest_seconds", "Since the oldest of them was accepted.", ("status", "reason")
)
STUCK = Gauge(
    "opscore_runs_stuck",
    "Runs that do not move by themselves any more, by why; no more than 20 are looked for.",
    ("code",),
)
TASKS = Gauge("opscore_tasks", "Tasks that are not over.", ("status",))
WAITING = Gauge("opscore_tasks_waiting", "Tasks that wait, by why.", ("reason",))
WAITING_OLDEST = Gauge(
    "opscore_tasks_waiting_oldest_seconds",
    "Since the one that has waited longest waits; of what stands in no line, since it began.",
    ("reason",),
)
QUEUE_READY = Gauge(
    "opscore_queue_ready", "Messages of a queue that no worker has taken.", ("queue",)
)
QUEUE_UNACKED = Gauge(
    "opscore_queue_unacked",
    "Messages that workers took and are not done with; not told if there are more than 500.",
    ("queue",),
)
QUEUE_OLDEST = Gauge(
    "opscore_queue_oldest_seconds",
    "Since the oldest of the next 20 visits in a queue could be made; 0 if the queue is empty, not"
    " told if none of the 20 is a visit to be made.",
    ("queue",),
)
QUEUE_WORKERS = Gauge("opscore_queue_workers", "Workers that live and take a queue.", ("queue",))
WORKERS = Gauge("opscore_workers", "Workers that live.")
AGENTS = Gauge(
    "opscore_agents",
    "Agents that are registered, by whether they get work: available, or paused, draining, silent"
    " or error.",
    ("availability",),
)
AGENT_SLOTS = Gauge(
    "opscore_agent_slots", "The capacity of an agent; not told of one without a limit.", ("agent",)
)
AGENT_SLOTS_HELD = Gauge(
    "opscore_agent_slots_held", "Slots of an agent that attempts hold.", ("agent",)
)
AGENT_RUNNING = Gauge(
    "opscore_agent_running", "Attempts that an agent is at, also one without a limit.", ("agent",)
)
AGENT_LINE = Gauge(
    "opscore_agent_line", "Tasks that stand in line for an agent itself.", ("agent",)
)
CAPABILITY_LINE = Gauge(
    "opscore_capability_line",
    "Tasks that stand in line for whichever agent with a capability is free first.",
    ("capability",),
)
KEEPER_LATE = Gauge(
    "opscore_keeper_late_seconds",
    "Since no keeper keeps house any more; 0 while one does, not told if none ever did.",
)
SCHEDULES = Gauge("opscore_schedules_enabled", "Schedules that are not paused.")
SCHEDULES_LATE = Gauge(
    "opscore_schedules_late", "Schedules a moment of which is overdue by more than 5 s."
)
SCHEDULE_LAG = Gauge(
    "opscore_schedule_lag_seconds", "Since the most overdue moment of a schedule was due."
)
PROCESSES = Gauge(
    "opscore_processes",
    "Processes that told what they count in the last 20 s; a worker's only while it works.",
    ("process",),
)
POOL_SIZE = Gauge(
    "opscore_database_pool_size",
    "Connections to PostgreSQL that the processes of a kind may hold together.",
    ("process",),
)
POOL_USED = Gauge(
    "opscore_database_pool_used",
    "The most each of them used at once in its last 5 s, added up.",
    ("process",),
)
POOL_FULLEST = Gauge(
    "opscore_database_pool_fullest_ratio",
    "The same of the one that used most of its own, as a part of those it may hold.",
    ("process",),
)
CLOCK_SKEW = Gauge(
    "opscore_database_clock_skew_seconds",
    "How far PostgreSQL's clock is ahead of that of the web process asked.",
)
GAUGES = (
    *(BUILD, REDIS_UP, PROBLEMS, RUNS, RUNS_OLDEST, STUCK, TASKS, WAITING, WAITING_OLDEST),
    *(QUEUE_READY, QUEUE_UNACKED, QUEUE_OLDEST, QUEUE_WORKERS, WORKERS, AGENTS),
    *(AGENT_SLOTS, AGENT_SLOTS_HELD, AGENT_RUNNING, AGENT_LINE, CAPABILITY_LINE),
    *(KEEPER_LATE, SCHEDULES, SCHEDULES_LATE, SCHEDULE_LAG),
    *(PROCESSES, POOL_SIZE, POOL_USED, POOL_FULLEST, CLOCK_SKEW),
)

# --- Reading --------------------------------------------------------------------------------------

_COUNTS = text("SELECT name, labels, value, buckets FROM metrics ORDER BY name, labels")
_NOW = text("SELECT now()")
_OPEN_TASKS = text(
    """
SELECT 'pending' AS status, count(*) AS number FROM tasks WHERE status = 'pending'
UNION ALL
SELECT 'running', count(*) FROM tasks WHERE lease_expires_at IS NOT NULL AND status = 'running'
"""
)
_AGENTS = text(
    f"""
SELECT a.agent_id, CASE WHEN a.capacity IS NOT NULL THEN s.number END AS slots, s.held,
       coalesce(running.count, 0) AS running, coalesce(line.count, 0) AS line
FROM agents a CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE s.lease_expires_at > now()) AS held,
           count(*) FILTER (WHERE NOT s.closed) AS number
    FROM slots s WHERE s.pool = a.agent_id OFFSET 0) AS s
LEFT JOIN (SELECT agent_id, count(*) FROM tasks WHERE lease_expires_at IS NOT NULL
           GROUP BY agent_id) AS running USING (agent_id)
LEFT JOIN (SELECT line_agent_id AS agent_id, count(*) FROM tasks
           WHERE status = 'waiting' AND reason IN {IN_LINE} AND line_agent_id IS NOT NULL
           GROUP BY line_agent_id) AS line USING (agent_id)
WHERE a.deregistered_at IS NULL ORDER BY a.agent_id
"""
)
_CAPABILITIES = text(
    f"""
SELECT wanted_capability, count(*) FROM tasks
WHERE status = 'waiting' AND reason IN {IN_LINE} AND line_agent_id IS NULL
GROUP BY wanted_capability ORDER BY wanted_capability
"""
)
_PROCESSES = text(
    """
SELECT kind, count(*) AS number, sum(pool_size) AS size, sum(pool_used) AS used,
       max(cast(pool_used AS float) / pool_size) AS fullest
FROM processes WHERE seen_at > now() - make_interval(secs => :seconds)
GROUP BY kind ORDER BY kind
"""
)

Sample = tuple[Gauge, tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Scrape:
    """All there is to tell."""

    gauges: Mapping[Gauge, Mapping[tuple[str, ...], float]]
    counts: Mapping[Counted, Mapping[tuple[str, ...], tuple[float, list[int]]]]
    """By the values of the labels: how many, or the sum of seconds and how many in each bucket."""


def read(tx: Tx, depths: Mapping[str, Depth] | None, is_full: bool = False) -> Scrape:
    """Return everything; what is given is as for `status.read`."""
    found = status.read(tx, depths, is_full)
    samples = [
        *_overall(found),
        *_work(tx, found),
        *_queues(tx, found, depths or {}),
        *_agents(tx, found),
        *_schedules(found),
        *_processes(tx),
    ]
    gauges: dict[Gauge, dict[tuple[str, ...], float]] = {gauge: {} for gauge in GAUGES}
    for gauge, labels, value in samples:
        gauges[gauge][labels] = value
    return Scrape(gauges, _counts(tx))


def _overall(found: Mapping[str, Any]) -> Iterator[Sample]:
    yield BUILD, (installed_version() or "",), 1
    yield REDIS_UP, (), found["broker_error"] is None
    for problem in found["problems"]:
        yield PROBLEMS, (problem["code"],), 1
    yield CLOCK_SKEW, (), found["database"]["clock_skew_seconds"]
    if found["keeper"]["late_seconds"] is not None:
        yield KEEPER_LATE, (), found["keeper"]["late_seconds"]


def _work(tx: Tx, found: Mapping[str, Any]) -> Iterator[Sample]:
    for name in ("queued", "running", "paused"):
        yield RUNS, (name, ""), 0
    for row in found["runs"]:
        labels = (row["status"], row["reason"] or "")
        yield RUNS, labels, row["count"]
        yield RUNS_OLDEST, labels, row["oldest_seconds"]
    for code in {run["code"] for run in found["stuck"]}:
        yield STUCK, (code,), sum(run["code"] == code for run in found["stuck"])
    for row in tx.execute(_OPEN_TASKS):
        yield TASKS, (row.status,), row.number
    yield TASKS, ("waiting",), sum(row["count"] for row in found["waiting"])
    for reason in Reason:
        yield WAITING, (reason,), 0
    for row in found["waiting"]:
        yield WAITING, (row["reason"],), row["count"]
        yield WAITING_OLDEST, (row["reason"],), max(0.0, row["oldest_seconds"])


def _queues(tx: Tx, found: Mapping[str, Any], depths: Mapping[str, Depth]) -> Iterator[Sample]:
    yield WORKERS, (), len(found["workers"])
    for queue in found["queues"]:
        name: tuple[str, ...] = (queue["name"],)
        yield QUEUE_WORKERS, name, queue["workers"]
        if queue["ready"] is not None:
            yield QUEUE_READY, name, queue["ready"]
        if queue["unacked"] is not None:
            yield QUEUE_UNACKED, name, queue["unacked"]
    now = tx.execute(_NOW).scalar_one()
    for queue_name, depth in depths.items():
        oldest = None if depth.head is None else engine.oldest_visit(tx, depth.head)
        if oldest is not None:
            yield QUEUE_OLDEST, (queue_name,), max(0.0, (now - oldest).total_seconds())


def _agents(tx: Tx, found: Mapping[str, Any]) -> Iterator[Sample]:
    for availability, count in found["fleet"]["agents"].items():
        if availability != "total":
            yield AGENTS, (availability,), count
    for row in tx.execute(_AGENTS):
        name = (row.agent_id,)
        if row.slots is not None:
            yield AGENT_SLOTS, name, row.slots
            yield AGENT_SLOTS_HELD, name, row.held
        yield AGENT_RUNNING, name, row.running
        yield AGENT_LINE, name, row.line
    for capability, count in tx.execute(_CAPABILITIES):
        yield CAPABILITY_LINE, (capability,), count


def _schedules(found: Mapping[str, Any]) -> Iterator[Sample]:
    schedules = found["schedules"]
    yield SCHEDULES, (), schedules["enabled"]
    yield SCHEDULES_LATE, (), schedules["late"]
    yield SCHEDULE_LAG, (), schedules["worst_lag_seconds"] or 0


def _processes(tx: Tx) -> Iterator[Sample]:
    for row in tx.execute(_PROCESSES, {"seconds": DEAD_SECONDS}):
        name = (row.kind,)
        yield PROCESSES, name, row.number
        yield POOL_SIZE, name, row.size
        yield POOL_USED, name, row.used
        yield POOL_FULLEST, name, row.fullest


def _counts(tx: Tx) -> dict[Counted, dict[tuple[str, ...], tuple[float, list[int]]]]:
    known = {what.name: what for what in tally.ALL}
    counts = {
        what: {labels: (0.0, _empty(what)) for labels in _at_first(what)} for what in tally.ALL
    }
    for name, labels, value, buckets in tx.execute(_COUNTS):
        what = known.get(name)
        # Of another version, this one does not know what it means.
        if what and len(labels) == len(what.labels) and len(buckets) == len(_empty(what)):
            counts[what][tuple(labels)] = (value, buckets)
    return counts


def _empty(what: Counted) -> list[int]:
    return [0] * (len(what.bounds) + 1) if what.bounds else []


def _at_first(what: Counted) -> Iterable[tuple[str, ...]]:
    return [(value,) for value in what.known] if what.labels else [()]
