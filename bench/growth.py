"""`make growth`: whether work costs more once the tables are full of runs that are over.

    python -m bench.growth [--runs N | --short] [--rounds N] [--out FILE] [--markdown]

The same is measured in turn on two databases of one server, with N finished runs of 5 tasks and
with a fiftieth of them: machines get faster and slower by the minute. In both some hundred open
runs wait, so that the partial indexes are not empty. Ends with status 1 if something on a task's
way, the search for lost visits or a read costs more than `LIMIT` times as much, if a plan reads a
big table whole, or if a scrape of the metrics takes longer than `SCRAPE_MS`.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import click
from redis import Redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import event, text

from bench import agents, measure
from bench.contenders import ROOT, BenchError, OpsCore, Servers
from bench.drives import drive
from bench.measure import connect
from bench.workloads import WORKLOADS, Workload
from opscore import engine, metrics, migrations, presence, queries, slots, status, workflows
from opscore.agentkit import load_agents
from opscore.agents import register_functions
from opscore.config import QUEUES
from opscore.db import Database, Prepared, Tx
from opscore.definition import parse
from opscore.dispatch import Depth
from opscore.engine import Claimed, Failure, Left, MustWait, Plan, Visit
from opscore.presence import Presence
from opscore.queries import RunFilter, TaskFilter
from opscore.servers import PostgresServer, RedisServer
from opscore.workflows import StoredWorkflow
from web.api.metrics import render

LIMIT = 1.2
"""What may cost so many times as much on large tables as on small ones."""
NOISE_MS = 0.1
"""A statement that takes no longer than this above the limit has not grown, it was disturbed."""
SCRAPE_MS = 100
"""At the 99th percentile, on large tables: all of `GET /metrics` but Redis and HTTP."""
SMALLER = 50
"""The small database has one finished run where the large one has so many."""
PASSES = 12
EXECUTIONS = 20
"""In each pass."""
BUDGET_SECONDS = 0.4
"""A statement so slow that its executions take longer than this is executed less often."""
LEAST_EXECUTIONS = 5
SHORT_RUNS = 20_000
OPEN_RUNS = 100
"""Of each kind: runs whose task waits for a retry, a busy agent, another task."""
DAY_SECONDS = 86_400
DAYS = 90
"""Over which the loaded runs are spread."""
LEASE_SECONDS = 30.0
WORKER = "growth"
BUSY_AGENT = "bench-held"
SIZES = ("small", "large")
BIG = ("runs", "tasks", "attempts", "events")
RUNS_MEASURED = {"W1": 200, "W2": 20, "W4": 200}
GATED_STATEMENTS = (
    "claim_task",
    "complete_attempt",
    "complete_attempt, last",
    "complete_and_claim",
    "unvisited_runs",
    "wake_lost",
)
"""And every read."""
GATED_WORKLOADS = ("W1", "W2")

EVERY_TASK = (
    *("claim_simply", "claim_kept", "claim", "finish", "finish, slot", "finish_last"),
    *("finish_last, slot", "finish_and_claim", "finish_and_claim, slot"),
)
"""The prepared statements behind the gated functions."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class State:
    """What was measured on tables of one size."""

    workloads: dict[str, Figures]
    """Medians."""
    statements: Figures
    """Name -> median in ms."""
    scrape_p99_ms: float
    plans: list["Explained"]


# --- The command --------------------------------------------------------------------------------


@click.command(context_settings={"show_default": True})
@click.option("--runs", type=click.IntRange(100), default=1_000_000, help="Loaded, of 5 tasks.")
@click.option("--short", is_flag=True, help=f"Load only {SHORT_RUNS:,} runs.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Of each workload; medians.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "bench" / "growth.json")
@click.option("--plans", type=click.Path(path_type=Path), help="[default: OUT with .plans.txt]")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--quiet", type=float, help="Wait until the machine uses fewer cores than this.")
def main(
    runs: int,
    short: bool,
    rounds: int,
    out: Path,
    plans: Path | None,
    markdown: bool,
    quiet: float | None,
) -> None:
    """Measure on small tables and on large ones, and compare."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up
    runs = SHORT_RUNS if short else runs
    plans = plans or out.with_suffix(".plans.txt")
    with _servers() as (small_site, large_site):
        machine = measure.machine(large_site.postgres.url, Redis.from_url(large_site.redis.url))
        for site, finished in ((small_site, runs // SMALLER), (large_site, runs)):
            fill_open(site.url)
            loading = load(site.postgres.url, site.url, finished)
        small, large = _measure((small_site, large_site), rounds, quiet)
        sizes = _sizes(large_site.url)
    written = _as_json(small, large) | {"loaded": loading, "tables": sizes, "machine": machine}
    complaints, notes = judge(small, large), unbounded(large)
    written |= {"complaints": complaints, "notes": notes}
    out.write_text(json.dumps(written, indent=1) + "\n")
    plans.write_text("\n".join(_all_plans(small, large)))
    _show(small, large, sizes, markdown=markdown)
    click.echo(f"\n{machine}\nLoaded in {loading['seconds']:.0f} s. Written to {out} and {plans}.")
    for sentence in [*(f"Note: {note}" for note in notes), *complaints]:
        click.echo(sentence, err=True)
    sys.exit(1 if complaints else 0)


@dataclass(frozen=True, slots=True)
class _Site(Servers):
    """Servers whose sessions all work on one database, which is there already."""

    database: str

    @property
    def url(self) -> str:
        return self.database_url(self.database)

    @contextmanager
    def new_database(self) -> Iterator[str]:
        yield self.url


@contextmanager
def _servers() -> Iterator[tuple[_Site, _Site]]:
    folder = Path(tempfile.mkdtemp(prefix="opscore-growth-"))
    try:
        with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
            small, large = (_Site(postgres, redis, folder, f"growth_{s}") for s in SIZES)
            for site in (small, large):
                with connect(postgres.url) as cursor:
                    cursor.execute(f"CREATE DATABASE {site.database}")
                migrations.upgrade(site.url)
            yield small, large
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(sites: Sequence[_Site], rounds: int, quiet: float | None) -> list[State]:
    """Measure on each site in turn, as often as `rounds` and `PASSES` say."""
    watches = [_Stopwatch() for _ in sites]
    for _, (site, watch) in itertools.product(range(PASSES), zip(sites, watches, strict=True)):
        time_statements(site.url, watch)
    _say(f"{len(watches[0].medians())} statements timed")
    figures = [_Measured() for _ in sites]
    smaller = [replace(w, runs=RUNS_MEASURED[w.name]) for w in WORKLOADS if w.name in RUNS_MEASURED]
    for number, workload in itertools.product(range(rounds), smaller):
        for site, measured in zip(sites, figures, strict=True):
            if quiet is not None:
                measure.wait_until_quiet(quiet)
            for name, value in _run(site, workload, number).items():
                measured[workload.name][name].append(value)
    return [
        State(measured.medians(), watch.medians(), watch.p99("scrape"), explain_all(site.url))
        for site, measured, watch in zip(sites, figures, watches, strict=True)
    ]


class _Measured(defaultdict[str, defaultdict[str, list[float]]]):
    """Workload -> figure -> a value for each round."""

    def __init__(self) -> None:
        super().__init__(lambda: defaultdict(list))

    def medians(self) -> dict[str, Figures]:
        return {
            workload: {name: median(values) for name, values in figures.items()}
            for workload, figures in self.items()
        }


def _say(sentence: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {sentence}", err=True)


# --- Workloads ----------------------------------------------------------------------------------


def _run(site: _Site, workload: Workload, number: int) -> Figures:
    """Run a workload once, as `bench.bench` does."""
    log = site.folder / f"{site.database}-{workload.name}-{number}.log"
    with OpsCore(site, workload, log) as session:
        session.warm_up()
        machine, before = measure.machine_seconds(), measure.cpu_seconds(session.processes)
        driven = drive(session)
        machine = measure.machine_seconds() - machine
        cpu = sum(measure.cpu_seconds(session.processes).values()) - sum(before.values())
        if (completed := session.completed_tasks()) != workload.tasks:
            raise BenchError(f"{completed} of {workload.tasks} are completed.\n{session.tail()}")
    figures = {
        "tasks_per_s": workload.tasks / driven.seconds,
        "cpu_s_per_1000": cpu * 1000 / workload.tasks,
        "other_load_cores": max(0.0, machine - cpu) / driven.seconds,
    }
    if "p50_ms" in driven.figures:
        figures["p50_ms"] = driven.figures["p50_ms"]
    values = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    _say(f"round {number + 1} {workload.name} {site.database}: {values}")
    return figures


# --- What is open all the while -----------------------------------------------------------------


def _chain(workflow_id: str, agent_id: str) -> dict[str, Any]:
    tasks = [{"taskId": f"t{n}", "agentId": agent_id} for n in range(5)]
    return {"id": workflow_id, "tasks": [task | {"retry": {"maxAttempts": 3}} for task in tasks]}


def fill_open(url: str) -> None:
    """Write the runs that wait: `OPEN_RUNS` for a retry, for a busy agent and for another task."""
    database = Database(url, application="growth")
    with database.transaction() as tx:
        register_functions(tx, load_agents([agents.__name__]).values())
        tx.execute(
            text(
                "INSERT INTO agents (agent_id, kind, name, version, capabilities, capacity)"
                " VALUES (:id, 'function', :id, '1', '{}', 1)"
            ),
            {"id": BUSY_AGENT},
        )
        slots.set_capacity(tx, BUSY_AGENT, 1)
        tx.execute(
            text(
                "UPDATE slots SET holder = gen_random_uuid(), attempt = 1,"
                " lease_expires_at = now() + make_interval(secs => :day) WHERE pool = :id"
            ),
            {"id": BUSY_AGENT, "day": DAY_SECONDS},
        )
        free, _ = workflows.create_workflow(tx, parse(_chain("growth", "bench")))
        held, _ = workflows.create_workflow(tx, parse(_chain("growth-held", BUSY_AGENT)))
        _have_worker(tx)
    for fill, stored in ((_fill_retry, free), (_fill_busy, held), (_fill_dependent, free)):
        for _ in range(OPEN_RUNS):
            with database.transaction() as tx:
                fill(tx, engine.submit_run(tx, stored, engine.Submission(input={})))
    with database.transaction() as tx:
        tx.execute(
            text(
                "UPDATE tasks SET wake_at = now() + make_interval(secs => :day)"
                " WHERE status = 'waiting' AND wake_at IS NOT NULL"
            ),
            {"day": DAY_SECONDS},
        )
    database.close()


def _have_worker(tx: Tx) -> None:
    """Write a worker that lives all the while, or the status would not look for lost visits."""
    presence.say(tx, Presence(uuid4(), WORKER, "host", 1, "prefork", 1, QUEUES, None))
    tx.execute(
        text("UPDATE workers SET seen_at = now() + make_interval(secs => :day)"),
        {"day": DAY_SECONDS},
    )


def _claim(tx: Tx, task_id: UUID) -> Claimed:
    answer = engine.claim_task(
        tx, Visit(task_id, 1, uuid4()), worker=WORKER, lease_seconds=LEASE_SECONDS
    )
    assert isinstance(answer, Claimed), answer
    return answer


def _fill_retry(tx: Tx, plan: Plan) -> None:
    claimed = _claim(tx, plan.nodes[0].id)
    failure = Failure("growth", "It is to wait.")
    engine.fail_attempt(tx, claimed, failure, delay_seconds=DAY_SECONDS, message={})


def _fill_busy(tx: Tx, plan: Plan) -> None:
    task_id = plan.nodes[0].id
    visit = Visit(task_id, 1, uuid4())
    wait = engine.claim_task(tx, visit, worker=WORKER, lease_seconds=LEASE_SECONDS)
    assert isinstance(wait, MustWait), wait
    engine.park_task(tx, task_id, wait, message={}, generation=1)


def _fill_dependent(tx: Tx, plan: Plan) -> None:
    _fill_retry(tx, plan)
    engine.hold_back(tx, [node.id for node in plan.nodes[1:]])


# --- Single statements --------------------------------------------------------------------------


class _Stopwatch:
    """Executes and remembers how long it took, by name."""

    tx: Tx

    def __init__(self) -> None:
        self._took: defaultdict[str, list[float]] = defaultdict(list)
        self._before: dict[str, int] = {}

    def begin(self, tx: Tx) -> None:
        """Begin a pass."""
        self.tx = tx
        self._before = {name: len(took) for name, took in self._took.items()}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **rest: Any) -> Any:
        began = time.perf_counter()
        answer = function(self.tx, *args, **rest)
        self._took[name].append(time.perf_counter() - began)
        return answer

    def is_patient(self, name: str) -> bool:
        """Tell whether it may be executed once more."""
        took = self._took[name][self._before.get(name, 0) :]
        return len(took) < LEAST_EXECUTIONS or sum(took) < BUDGET_SECONDS

    def medians(self) -> Figures:
        """Return ms by name."""
        return {name: median(took) * 1000 for name, took in self._took.items()}

    def p99(self, name: str) -> float:
        """Return the 99th percentile in ms."""
        return sorted(self._took[name])[int(len(self._took[name]) * 0.99)] * 1000


def time_statements(url: str, watch: _Stopwatch) -> None:
    """Execute opscore's own functions by themselves."""
    database = Database(url, application="growth")
    with database.transaction() as tx:
        stored = workflows.find_workflow(tx, "growth")
    with database.autocommit() as tx:
        watch.begin(tx)
        for _ in range(EXECUTIONS):
            _walk_run(watch, stored)
            _cancel_run(watch, stored)
        finished = _some_finished(tx)
        for name, function in {**_upkeep(), **_reads(finished)}.items():
            for _ in range(EXECUTIONS):
                if watch.is_patient(name):
                    watch(name, function)
    database.close()


def _walk_run(watch: _Stopwatch, stored: StoredWorkflow) -> None:
    """Take a chain of 5 from its submission to its end, in all the ways a task can take."""
    own = {"worker": WORKER, "lease_seconds": LEASE_SECONDS}
    plan = watch("submit_run", engine.submit_run, stored, engine.Submission(input={}))
    ids = [node.id for node in plan.nodes]

    def visit(position: int) -> Visit:
        return Visit(ids[position], 1, uuid4())

    for position in (0, 2):
        claimed = watch("claim_task", engine.claim_task, visit(position), **own)
        watch("renew_leases", engine.renew_leases, {claimed.task_id: 1}, LEASE_SECONDS)
        then = visit(position + 1)
        both = watch("complete_and_claim", engine.complete_and_claim, claimed, {}, then, **own)
        watch("complete_attempt", engine.complete_attempt, both.next, {})
        watch("wake_successors", engine.wake_successors, both.next.task_id)
    last = watch("claim_task", engine.claim_task, visit(4), **own)
    watch("complete_attempt, last", engine.complete_attempt, last, {}, {})


def _cancel_run(watch: _Stopwatch, stored: StoredWorkflow) -> None:
    plan = engine.submit_run(watch.tx, stored, engine.Submission(input={}))
    watch("republish_run", engine.republish_run, plan.run_id, plan.generation)
    watch("cancel_run", engine.cancel_run, plan.run_id)
    watch("settle_run", engine.settle_run, plan.run_id)


def _upkeep() -> dict[str, Callable[[Tx], Any]]:
    """Return what the keeper does in every round, when nothing is due."""
    sent = Left("infinity", "infinity", "infinity")
    limit = 500
    return {
        "expired_attempts": lambda tx: engine.expired_attempts(tx, limit, LEASE_SECONDS),
        "runs_to_settle": lambda tx: engine.runs_to_settle(tx, limit),
        "wake_due": lambda tx: engine.wake_due(tx, limit),
        "agents_to_wake": engine.agents_to_wake,
        "wake_line": lambda tx: engine.wake_line(tx, BUSY_AGENT),
        "wake_forgotten": engine.wake_forgotten,
        "unvisited_runs": lambda tx: engine.unvisited_runs(tx, sent, 10, limit),
        "wake_lost": lambda tx: engine.wake_lost(tx, sent, 10, limit),
    }


def _some_finished(tx: Tx) -> list[UUID]:
    query = "SELECT id FROM runs WHERE status = 'completed' ORDER BY random() LIMIT :limit"
    return list(tx.execute(text(query), {"limit": EXECUTIONS}).scalars())


def _reads(finished: Sequence[UUID]) -> dict[str, Callable[[Tx], Any]]:
    """Return the reads of the API: its lists, and what it shows of one of these runs."""
    lists = {f"list_runs, {name}": _list(wanted) for name, wanted in _filters().items()}
    return lists | {
        "list_runs, far page": _list(RunFilter(), datetime.now(UTC) - timedelta(days=DAYS / 2)),
        "get_run_detail": _each(finished, queries.get_run_detail),
        "list_tasks": _each(finished, queries.list_tasks, after=None, limit=50),
        "list_events": _each(finished, queries.list_events, after=0, limit=100),
        **{f"find_tasks, {name}": _find(wanted) for name, wanted in _task_filters().items()},
        "status": lambda tx: status.read(tx, {queue: Depth(0, 0) for queue in QUEUES}),
        "scrape": lambda tx: render(metrics.read(tx, {q: Depth(0, 0, ()) for q in QUEUES})),
    }


def _filters() -> dict[str, RunFilter]:
    return {
        "first page": RunFilter(),
        "workflow": RunFilter(workflow_id="growth-1"),
        "workflow and status": RunFilter(workflow_id="growth-1", status=["failed"]),
        "workflow that never failed": RunFilter(workflow_id="growth-6", status=["failed"]),
        "open": RunFilter(status=["queued", "running"]),
        "status without runs": RunFilter(status=["paused"]),
        "label without runs": RunFilter(labels=[("team", "nobody")]),
        "last day": RunFilter(created_after=datetime.now(UTC) - timedelta(days=1)),
    }


def _task_filters() -> dict[str, TaskFilter]:
    return {
        "first page": TaskFilter(),
        "waiting": TaskFilter(status=["waiting"]),
        "approvals": TaskFilter(reason=["approval"]),
        "pending": TaskFilter(status=["pending"]),
    }


def _find(wanted: TaskFilter) -> Callable[[Tx], Any]:
    return lambda tx: queries.find_tasks(tx, wanted, after=None, limit=50)


def _list(wanted: RunFilter, before: datetime | None = None) -> Callable[[Tx], Any]:
    after = None if before is None else (before, UUID(int=2**128 - 1))
    return lambda tx: queries.list_runs(tx, wanted, after=after, limit=50)


def _each(ids: Sequence[UUID], function: Callable[..., Any], **rest: Any) -> Callable[[Tx], Any]:
    """Return a read that takes the next id with every call."""
    left = itertools.cycle(ids)
    return lambda tx: function(tx, next(left), **rest)


# --- Loading ------------------------------------------------------------------------------------

_WHILE_LOADING = {
    "fsync": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "full_page_writes": "off",
    "max_wal_size": "'16GB'",
    "checkpoint_timeout": "'1h'",
}
_MAKE_ID = """
CREATE FUNCTION growth_id(n bigint, k int, ms bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(k), 3, '0') || '8'
            || substr(md5(n || ':' || k), 1, 15))::uuid
$$
"""
"""A UUID of version 7 that can be made again: the n-th run's with k = 0, its tasks' with 1 to 5."""
_EACH_RUN = """
FROM (
    SELECT n, ms, to_timestamp(ms / 1000.0) AS at, growth_id(n, 0, ms) AS run_id,
           CASE WHEN n % 7 = 6 OR n % 100 > 2 THEN 'completed'  -- one workflow never fails
                WHEN n % 100 < 2 THEN 'failed' ELSE 'cancelled' END AS outcome,
           ARRAY(SELECT growth_id(n, k, ms) FROM generate_series(1, 5) k) AS ids
    FROM (SELECT n, {begin} + n * {span} / {runs} AS ms FROM generate_series(0, {runs} - 1) n) s
    OFFSET 0
) r
"""
_EACH_TASK = (
    _EACH_RUN
    + """CROSS JOIN LATERAL (
    SELECT p, ids[p + 1] AS id, outcome = 'completed' OR p < 3 AS ran,
           CASE WHEN outcome = 'completed' OR p < 2 THEN 'completed'
                WHEN p = 2 THEN outcome ELSE 'cancelled' END AS status
    FROM generate_series(0, 4) p OFFSET 0) t
"""
)
_ERROR = """'{{"code": "agent_error", "message": "The agent raised ValueError: no such order."}}'"""
_RUNS = (
    f"""
INSERT INTO runs (id, workflow_id, version, status, labels, input, output, error,
    cancel_requested_at, generation_at, created_at, started_at, finished_at)
SELECT run_id, 'growth-' || n % 7, 1, outcome,
       jsonb_build_object('team', 'team-' || n % 20), jsonb_build_object('order', n),
       CASE outcome WHEN 'completed' THEN jsonb_build_object('total', n % 1000) END,
       CASE outcome WHEN 'failed' THEN {_ERROR}::jsonb END,
       CASE outcome WHEN 'cancelled' THEN at + interval '1 s' END,
       at, at, at + interval '10 ms', at + interval '2 s'
"""
    + _EACH_RUN
)
_TASKS = (
    f"""
INSERT INTO tasks (id, run_id, definition_id, kind, position, depends_on, successors, reads,
    is_sink, wanted_agent_id, agent_id, timeout_seconds, max_attempts, retry_backoff,
    retry_max_backoff, busy_backoff, busy_max_backoff, max_wait_seconds, goes_on, priority, status,
    reason, output, error, attempt, claim_token, visit_generation, created_at, started_at,
    finished_at)
SELECT id, run_id, 't' || p, 'agent', p,
       CASE WHEN p > 0 THEN ARRAY[ids[p]] ELSE '{{{{}}}}' END,
       CASE WHEN p < 4 THEN ARRAY[ids[p + 2]] ELSE '{{{{}}}}' END, '{{{{}}}}',
       p = 4, 'bench', CASE WHEN ran THEN 'bench' END, 300, 3, 1, 60, 1, 30, 3600, false, 1, status,
       CASE WHEN status = 'cancelled' AND outcome = 'failed' THEN 'upstream_failed'
            WHEN status = 'cancelled' THEN 'run_cancelled' END,
       CASE status WHEN 'completed' THEN jsonb_build_object('value', n) END,
       CASE status WHEN 'failed' THEN {_ERROR}::jsonb END,
       ran::int, CASE WHEN ran THEN id END, ran::int, at,
       CASE WHEN ran THEN at + p * interval '300 ms' END, at + (p + 1) * interval '300 ms'
"""
    + _EACH_TASK
)
_ATTEMPTS = (
    f"""
INSERT INTO attempts (task_id, number, agent_id, worker, status, error, started_at, finished_at)
SELECT id, 1, 'bench', 'growth', status, CASE status WHEN 'failed' THEN {_ERROR}::jsonb END,
       at + p * interval '300 ms', at + (p + 1) * interval '300 ms'
"""
    + _EACH_TASK
    + "WHERE ran"
)
_EVENTS = (
    """
INSERT INTO events (run_id, task_id, type, data, at)
SELECT run_id, CASE WHEN e BETWEEN 2 AND 11 THEN ids[e / 2] END,
       CASE WHEN e = 0 THEN 'run.queued' WHEN e = 1 THEN 'run.started'
            WHEN e = 12 THEN 'run.' || outcome
            WHEN e % 2 = 0 THEN 'task.started'
            WHEN outcome = 'completed' OR e < 6 THEN 'task.completed'
            WHEN e = 7 THEN 'task.' || outcome
            ELSE 'task.cancelled' END,
       CASE WHEN e BETWEEN 2 AND 11
            THEN jsonb_build_object('attempt', 1, 'agentId', 'bench', 'worker', 'growth')
            ELSE '{{}}' END,
       at + e * interval '150 ms'
"""
    + _EACH_RUN
    + """CROSS JOIN generate_series(0, 12) e
WHERE outcome = 'completed' OR e < 8 OR e % 2 = 1 OR e = 12
"""
)
_LOOSE_INDEXES = """
SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid)
FROM pg_index i
WHERE i.indrelid = ANY (%s::regclass[])
  AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid)
"""


def load(server_url: str, url: str, runs: int) -> dict[str, float]:
    """Write so many finished runs, as fast as PostgreSQL can, and leave it as it was before."""
    began = time.perf_counter()
    with _loose_settings(server_url):
        with connect(url) as cursor:
            cursor.execute(_MAKE_ID)
            workflow_rows = [(f"growth-{n}",) for n in range(7)]
            cursor.executemany(
                "INSERT INTO workflows (workflow_id, version, definition, digest)"
                " VALUES (%s, 1, '{}', '')",
                workflow_rows,
            )
            indexes = _drop_indexes(cursor)
        begin = int((time.time() - DAYS * DAY_SECONDS) * 1000)
        sizes = {"begin": begin, "span": DAYS * DAY_SECONDS * 1000, "runs": f"{runs}::bigint"}
        statements = [s.format_map(sizes) for s in (_EVENTS, _TASKS, _ATTEMPTS, _RUNS)]
        _execute_all(url, statements)
        _say(f"{runs:,} runs written, {time.perf_counter() - began:.0f} s")
        _execute_all(url, indexes)
        with connect(url) as cursor:
            cursor.execute("DROP FUNCTION growth_id")
            cursor.execute("VACUUM (ANALYZE, PARALLEL 0)")
            cursor.execute("CHECKPOINT")
    os.sync()  # what was written without fsync must not be written while the rest is measured
    seconds = time.perf_counter() - began
    _say(f"loaded in {seconds:.0f} s")
    return {"runs": runs, "seconds": round(seconds, 1)}


@contextmanager
def _loose_settings(server_url: str) -> Iterator[None]:
    with connect(server_url) as cursor:
        for name, value in _WHILE_LOADING.items():
            cursor.execute(f"ALTER SYSTEM SET {name} = {value}")
        cursor.execute("SELECT pg_reload_conf()")
    yield  # a server left with these is removed with the benchmark
    with connect(server_url) as cursor:
        for name in _WHILE_LOADING:
            cursor.execute(f"ALTER SYSTEM RESET {name}")
        cursor.execute("SELECT pg_reload_conf()")
        cursor.execute("CHECKPOINT")


def _drop_indexes(cursor: Any) -> list[str]:
    """Drop the indexes no constraint needs; return what makes them again."""
    cursor.execute(_LOOSE_INDEXES, [list(BIG)])
    found = cursor.fetchall()
    for name, _ in found:
        cursor.execute(f"DROP INDEX {name}")
    return [definition for _, definition in found]


def _execute_all(url: str, statements: Iterable[str]) -> None:
    """Execute each by itself, two at a time."""

    def execute(statement: str) -> None:
        with connect(url) as cursor:
            # The rows refer to each other as they should: nothing needs to look it up.
            cursor.execute("SET session_replication_role = replica")
            cursor.execute("SET maintenance_work_mem = '1GB'")
            cursor.execute(statement)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, statements))


def _sizes(url: str) -> dict[str, dict[str, int]]:
    """Return rows and bytes (indexes included) of each big table."""
    sizes = {}
    with connect(url) as cursor:
        for table in BIG:
            cursor.execute(f"SELECT count(*), pg_total_relation_size('{table}') FROM {table}")
            (row,) = cursor.fetchall()
            sizes[table] = {"rows": int(row[0]), "bytes": int(row[1])}
    return sizes


# --- Plans --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """How a plan reads a big table."""

    table: str
    index: str | None
    """None: it scans the table."""
    bounded: bool
    """It has a condition on the index."""
    partial: bool
    """The index has only some rows of the table."""

    @property
    def is_whole(self) -> bool:
        """Tell whether it could read every row of the table."""
        return not self.bounded and not self.partial

    def __str__(self) -> str:
        if self.index is None:
            return f"{self.table}: SEQ SCAN"
        return f"{self.table}: {self.index}{'' if self.bounded else ' (whole)'}"


@dataclass(frozen=True, slots=True)
class Explained:
    """A statement's plan; `statement` has its name in the code, private ones without `_`."""

    statement: str
    text: str
    accesses: tuple[Access, ...]
    is_list: bool
    """It reads a page in an index's order, so it need not have a condition on it."""

    def scans(self) -> list[Access]:
        return [a for a in self.accesses if a.is_whole and not (self.is_list and a.index)]


_PARTIAL = "SELECT indexrelid::regclass::text FROM pg_index WHERE indpred IS NOT NULL"


def explain_all(url: str) -> list[Explained]:
    """Explain every statement of the engine, and the reads, as a process of opscore has them."""
    database = Database(url, application="growth")
    with database.autocommit() as tx:
        prepared = _prepared_statements()
        finished = _some_finished(tx)
        partial = set(tx.execute(text(_PARTIAL)).scalars())
        explained = [
            *(_explain_prepared(tx, name, one, partial) for name, one in prepared.items()),
            *_explain_called(tx, "expired_attempts", _upkeep()["expired_attempts"], partial),
        ]
        for name, function in _reads(finished).items():
            explained += _explain_called(tx, name, function, partial)
    database.close()
    return explained


def _prepared_statements() -> dict[str, Prepared]:
    """Return the engine's statements; some there are once without and once with a slot."""
    found = {}
    parts = [vars(part) for part in vars(engine).values() if isinstance(part, ModuleType)]
    for name, value in itertools.chain.from_iterable(part.items() for part in parts):
        if isinstance(value, Prepared):
            found[name] = value
        elif isinstance(value, dict) and all(isinstance(v, Prepared) for v in value.values()):
            found |= {f"{name}, slot" if slot else name: one for slot, one in value.items()}
    return found


def _explain_prepared(tx: Tx, name: str, statement: Prepared, partial: set[str]) -> Explained:
    """Explain the generic plan, the only one these statements get: any value shows it."""
    cursor = tx.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
    values = ", ".join(["NULL"] * len(statement._parameters))
    prepared = tx.info.setdefault("prepared", set())
    if statement._name not in prepared:
        cursor.execute(statement._prepare)
        prepared.add(statement._name)
    execute = f"EXECUTE {statement._name}{f'({values})' if values else ''}"
    return _explain(cursor, name.strip("_").lower(), execute, None, partial)


def _explain_called(
    tx: Tx, name: str, function: Callable[[Tx], Any], partial: set[str]
) -> list[Explained]:
    """Call a function and explain what it executed through SQLAlchemy."""
    executed: list[tuple[str, Any]] = []

    def note(*about: Any) -> None:
        if not about[2].startswith("SET "):
            executed.append((about[2], about[3]))

    event.listen(tx, "before_cursor_execute", note)
    function(tx)
    event.remove(tx, "before_cursor_execute", note)
    cursor = tx.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
    is_list = "list_runs" in name or name == "find_tasks, first page"
    names = [name if len(executed) == 1 else f"{name} #{n + 1}" for n in range(len(executed))]
    return [
        _explain(cursor, called, statement, parameters, partial, is_list=is_list)
        for called, (statement, parameters) in zip(names, executed, strict=True)
    ]


def _explain(
    cursor: Any,
    name: str,
    statement: str,
    parameters: Any,
    partial: set[str],
    *,
    is_list: bool = False,
) -> Explained:
    cursor.execute(f"EXPLAIN {statement}", parameters)
    plan = "\n".join(line for (line,) in cursor.fetchall())
    cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
    ((tree,),) = cursor.fetchall()
    tree = json.loads(tree) if isinstance(tree, str) else tree
    accesses = dict.fromkeys(_accesses(tree[0]["Plan"], partial))
    return Explained(name, plan, tuple(accesses), is_list)


def _accesses(
    node: Mapping[str, Any], partial: set[str], above: str | None = None
) -> Iterator[Access]:
    """Yield how big tables are read; the index of a bitmap is below the node with its table."""
    kind, table, index = node["Node Type"], node.get("Relation Name", above), node.get("Index Name")
    if table in BIG and (kind == "Seq Scan" or index is not None):
        yield Access(table, index, "Index Cond" in node, index in partial)
    for child in node.get("Plans", ()):
        yield from _accesses(child, partial, table if kind.startswith("Bitmap") else None)


# --- Judging and showing ------------------------------------------------------------------------


def judge(small: State, large: State) -> list[str]:
    """Return what costs too much on large tables, a sentence each."""
    complaints = []
    for workload in GATED_WORKLOADS:
        before, after = (s.workloads[workload]["cpu_s_per_1000"] for s in (small, large))
        if after > before * LIMIT:
            complaints.append(
                f"{workload}: CPU s/1,000 tasks grew from {before:.2f} to {after:.2f}."
            )
    for name in (*GATED_STATEMENTS, *_reads(())):
        before, after = small.statements[name], large.statements[name]
        if after > before * LIMIT + NOISE_MS:
            complaints.append(f"{name}: grew from {before:.2f} to {after:.2f} ms.")
    if large.scrape_p99_ms > SCRAPE_MS:
        complaints.append(f"A scrape takes {large.scrape_p99_ms:.0f} ms at p99.")
    return complaints + _scans("small", small) + _scans("large", large)


def _scans(size: str, state: State) -> list[str]:
    return [
        f"{one.statement}: on {size} tables it reads all of {scan}."
        for one in state.plans
        for scan in one.scans()
    ]


def unbounded(state: State) -> list[str]:
    """Return which statements of every task read a partial index whole: that grows with what is
    open, not with what is over, so it is told and not judged."""
    return [
        f"{one.statement} reads {access}."
        for one in state.plans
        for access in one.accesses
        if one.statement in EVERY_TASK and access.partial and not access.bounded
    ]


def _as_json(small: State, large: State) -> dict[str, Any]:
    return {
        "workloads": dict(zip(SIZES, (small.workloads, large.workloads), strict=True)),
        "scrape_p99_ms": dict(zip(SIZES, (small.scrape_p99_ms, large.scrape_p99_ms), strict=True)),
        "statements_ms": dict(zip(SIZES, (small.statements, large.statements), strict=True)),
        "plans": {one.statement: list(map(str, one.accesses)) for one in large.plans},
    }


def _all_plans(small: State, large: State) -> Iterator[str]:
    for size, state in zip(SIZES[::-1], (large, small), strict=True):
        for one in state.plans:
            yield f"=== {one.statement} ({size} tables)\n{one.text}\n"


def _show(
    small: State, large: State, sizes: Mapping[str, Mapping[str, int]], *, markdown: bool
) -> None:
    rows = ", ".join(f"{size['rows']:,} {table}" for table, size in sizes.items())
    gigabytes = sum(size["bytes"] for size in sizes.values()) / 1e9
    title = f"Large: {rows}; {gigabytes:.1f} GB"
    _print(title, ["", *SIZES, "ratio"], list(_ratios(small, large)), markdown)
    plans = [[one.statement, ", ".join(map(str, one.accesses))] for one in large.plans]
    _print("Indexes used on large tables", ["statement", "table: index"], plans, markdown)


def _ratios(small: State, large: State) -> Iterator[list[str]]:
    for workload, figures in large.workloads.items():
        for name, after in figures.items():
            yield _ratio(f"{workload} {name}", small.workloads[workload][name], after)
    yield _ratio("scrape, p99 ms", small.scrape_p99_ms, large.scrape_p99_ms)
    for name, after in large.statements.items():
        yield _ratio(f"{name}, ms", small.statements[name], after)


def _ratio(name: str, before: float, after: float) -> list[str]:
    ratio = "" if name.endswith("other_load_cores") else f"{after / before:.2f}"
    return [name, f"{before:,.2f}", f"{after:,.2f}", ratio]


def _print(title: str, heads: list[str], rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        print(f"\n### {title}\n")
        for row in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows):
            print(f"| {' | '.join(row)} |")
        return
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number and len(heads) > 2 else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


if __name__ == "__main__":
    main()
