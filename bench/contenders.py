"""The contenders, each with real worker processes and servers of the benchmark's own.

A session is one contender set up for one workload: it starts the workers, submits, says how many
runs are over, and stops everything. How often it was asked is counted, so that watching it can be
taken out of the figures.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import click
from celery import Signature, chain, group
from redis import Redis

from bench import celery_app
from bench.http_client import HttpClient
from bench.measure import Counters, Processes, connect
from bench.workloads import Workload
from celeryconfig import make_app
from opscore import engine, migrations, workflows
from opscore.config import Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.processes import Program, has_ended, launch, stop, wait_until
from opscore.servers import PostgresServer, RedisServer, free_port
from opscore.workflows import StoredWorkflow

ROOT = Path(__file__).parent.parent
WARM_UP_RUNS = 4
START_SECONDS = 60.0
STOP_SECONDS = 15.0
STATISTICS_SECONDS = 1.05
"""A PostgreSQL session reports its commits at the first statement after this."""
SINGLE = Workload("single", "one task", 1)
TEMPLATE = "bench_template"
DATABASE = "bench"
OPSCORE_REDIS, CELERY_REDIS = 0, 1


class BenchError(click.ClickException):
    """A contender did not do what it was asked: its figures would be worth nothing."""


@dataclass(frozen=True, slots=True)
class Servers:
    """PostgreSQL and Redis of the benchmark, and where its processes log."""

    postgres: PostgresServer
    redis: RedisServer
    folder: Path

    def prepare(self) -> None:
        """Make the database that each session gets a copy of."""
        self._execute(f"CREATE DATABASE {TEMPLATE}")
        migrations.upgrade(self.database_url(TEMPLATE))

    def redis_url(self, number: int) -> str:
        return self.redis.url.rsplit("/", 1)[0] + f"/{number}"

    def database_url(self, name: str) -> str:
        return self.postgres.url.rsplit("/", 1)[0] + f"/{name}"

    @contextmanager
    def new_database(self) -> Iterator[str]:
        self._execute(f"CREATE DATABASE {DATABASE} TEMPLATE {TEMPLATE}")
        try:
            yield self.database_url(DATABASE)
        finally:
            self._execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        with connect(self.postgres.url) as cursor:
            cursor.execute(statement)


class Session(AbstractContextManager["Session"], ABC):
    """One contender with its workers, ready for one workload."""

    name: ClassVar[str]

    def __init__(self, servers: Servers, workload: Workload, log: Path) -> None:
        self.servers = servers
        self.workload = workload
        self.log = log
        self.polls = 0
        self.counters = Counters(servers.postgres.url, Redis.from_url(servers.redis.url), DATABASE)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            with Redis.from_url(self.servers.redis.url) as redis:
                redis.flushall()
            self._open(cleanup)
            cleanup.callback(self.stop)
            self._start()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def processes(self) -> Processes:
        """The parts whose processor time counts."""
        own = {part: child.pid for part, child in self._children.items()}
        return own | {"redis": self.servers.redis.pid, "client": os.getpid()}

    @abstractmethod
    def _open(self, cleanup: ExitStack) -> None:
        """Make the client and what it needs."""

    @abstractmethod
    def _start(self) -> None:
        """Start the workers and whatever else runs."""

    def submit(self) -> str:
        """Submit a run of the workload and return what it is known by."""
        return self._submit(self.workload)

    @abstractmethod
    def _submit(self, workload: Workload) -> str: ...

    @abstractmethod
    def _over(self, runs: list[str]) -> int: ...

    def count_over(self, runs: list[str]) -> int:
        """Return how many of these runs are over."""
        self.polls += 1
        return self._over(runs)

    @abstractmethod
    def completed_tasks(self) -> int:
        """Return how many of the workload's tasks the record says are completed."""

    def warm_up(self) -> None:
        """Run a little of what will be measured, so that everything has been used once."""
        count = min(WARM_UP_RUNS, self.workload.runs)
        self.wait([self._submit(self.rehearsal) for _ in range(count)])

    @property
    def rehearsal(self) -> Workload:
        """What is run before the clock starts."""
        return self.workload.narrow

    def wait(self, runs: Sequence[str], *, seconds: float = 180, pause: float = 0.02) -> None:
        """Wait until all of these runs are over, looking every `pause` seconds."""
        left, deadline = list(runs), time.monotonic() + seconds
        while left:
            head = left[:100]
            if self.count_over(head) == len(head):
                del left[:100]
                continue
            if time.monotonic() > deadline:
                raise BenchError(f"{len(left)} runs are not over after {seconds} s.\n{self.tail()}")
            time.sleep(pause)

    def tail(self) -> str:
        return f"{self.log}:\n{self.log.read_text(errors='replace')[-3000:]}"

    def stop(self) -> None:
        """Kill the processes: nothing of theirs is needed any more, and Celery takes 3 s to end."""
        for child in reversed(self._children.values()):
            stop(child, signal.SIGKILL, STOP_SECONDS)

    def _launch(self, part: str, module: str, *arguments: str, **environment: str) -> None:
        """Start a Python module in the project's folder and leave it starting."""
        program = Program(
            name=part,
            argv=[sys.executable, "-m", module, *arguments],
            env=dict(os.environ) | {"TMPDIR": str(self.servers.folder)} | environment,
            folder=ROOT,
        )
        with self.log.open("ab") as log:
            self._children[part] = launch(program, log)

    def _wait_for_file(self, part: str, ready: Path) -> None:
        child = self._children[part]
        wait_until(lambda: ready.exists() or has_ended(child), START_SECONDS)
        if not ready.exists():
            raise BenchError(f"The {part} did not start.\n{self.tail()}")
        ready.unlink()


class OpsCore(Session):
    """Ours: a run is committed, then published; it is over when PostgreSQL says so."""

    name = "opscore"
    for_each = False

    def _open(self, cleanup: ExitStack) -> None:
        self.api_key = secrets.token_urlsafe(24)
        self.database_url = cleanup.enter_context(self.servers.new_database())
        self.environment = {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.servers.redis_url(OPSCORE_REDIS),
            "OPSCORE_API_KEY": self.api_key,
            "OPSCORE_AGENTS": "bench.agents",
        }
        settings = Settings.from_env(self.environment)
        self.database = Database(settings.database_url, application="bench")
        cleanup.callback(self.database.close)
        app = make_app(settings)
        cleanup.callback(app.close)
        self.dispatcher = Dispatcher(app, self.database, settings)
        self._watch = ExitStack()
        cleanup.callback(self._watch.close)
        self._cursor = self._watch.enter_context(connect(self.database_url))
        self._cursor.execute(
            "PREPARE over AS SELECT count(*) FROM runs"
            " WHERE id = ANY ($1::uuid[]) AND finished_at IS NOT NULL"
        )
        self._cursor.execute("SET plan_cache_mode = force_generic_plan")

    def _start(self) -> None:
        ready = self.servers.folder / "ready"
        options = ("--concurrency", str(self.workload.concurrency))
        self._launch(
            "worker",
            "opscore",
            "worker",
            *options,
            OPSCORE_READY_FILE=str(ready),
            **self.environment,
        )
        self._wait_for_file("worker", ready)
        self._stored: dict[Workload, StoredWorkflow] = {}
        self.workflow_id = self._create(self.workload).workflow_id
        if self.workload.drive == "http":
            self._start_web()

    def _start_web(self) -> None:
        self.port = free_port()
        self._launch("web", "opscore", "web", "--port", str(self.port), **self.environment)
        child = self._children["web"]
        wait_until(lambda: self._serves() or has_ended(child), START_SECONDS)
        if not self._serves():
            raise BenchError(f"The web did not start.\n{self.tail()}")

    def _serves(self) -> bool:
        with HttpClient(self.port, self.api_key) as client:
            return client.is_served()

    def _create(self, workload: Workload) -> StoredWorkflow:
        definition = parse(workload.document(self.for_each))
        with self.database.transaction() as tx:
            self._stored[workload] = workflows.create_workflow(tx, definition)[0]
        return self._stored[workload]

    @property
    def processes(self) -> Processes:
        return {**super().processes, "pg": self.servers.postgres.pid}

    def _submit(self, workload: Workload) -> str:
        stored = self._stored.get(workload) or self._create(workload)
        with self.database.autocommit() as tx:
            plan = engine.submit_run(tx, stored, engine.Submission(input={}))
        self.dispatcher.publish(plan)
        return str(plan.run_id)

    @property
    def rehearsal(self) -> Workload:
        """The workload's own workflow: each worker process compiles it once in its life."""
        return self.workload

    def warm_up(self) -> None:
        super().warm_up()
        time.sleep(STATISTICS_SECONDS)
        self.wait([self._submit(SINGLE) for _ in range(WARM_UP_RUNS)])
        self._completed_before = self._count_completed()
        self.polls = 0

    def _over(self, runs: list[str]) -> int:
        # Prepared: to plan it at each look would take longer than to look.
        self._cursor.execute("EXECUTE over (%s::uuid[])", [runs])
        return self._one()

    def completed_tasks(self) -> int:
        return self._count_completed() - self._completed_before

    def freed_to_next(self, capacity: int) -> list[float]:
        """Return the seconds between each end on a busy agent and the start that it made room for.

        With n slots the (k + n)-th start follows the k-th end.
        """
        self.polls += 1
        self._cursor.execute(
            """
            WITH done AS (
                SELECT a.started_at, a.finished_at FROM attempts a JOIN tasks t ON t.id = a.task_id
                WHERE t.wanted_agent_id = %s ORDER BY a.started_at DESC LIMIT %s
            ), ends AS (
                SELECT finished_at, row_number() OVER (ORDER BY finished_at) AS k FROM done
            ), starts AS (
                SELECT started_at, row_number() OVER (ORDER BY started_at) AS k FROM done
            )
            SELECT extract(epoch FROM started_at - finished_at)
            FROM ends JOIN starts ON starts.k = ends.k + %s
            """,
            [self.workload.agent, self.workload.tasks, capacity],
        )
        return [float(row[0]) for row in self._cursor.fetchall()]

    def _count_completed(self) -> int:
        self.polls += 1
        self._cursor.execute(
            "SELECT count(*) FROM tasks WHERE status = 'completed' AND kind <> 'end'"
            " AND NOT (kind = 'for_each' AND index IS NULL)"
        )
        return self._one()

    def _one(self) -> int:
        (row,) = self._cursor.fetchall()
        return int(row[0])

    def stop(self) -> None:
        """Stop the processes and every connection, so that PostgreSQL has all of its counts."""
        super().stop()
        self._watch.close()
        self.database.close()


class OpsCoreForEach(OpsCore):
    """Ours, with a `forEach` in place of many tasks: its parent waits in PostgreSQL."""

    name = "opscore-foreach"
    for_each = True

    @property
    def rehearsal(self) -> Workload:
        """A narrow one: there is nothing of size to compile."""
        return self.workload.narrow


class BareCelery(Session):
    """Celery's own canvas, nothing durable; a run is over when its last result is in Redis."""

    name = "celery"

    def _open(self, cleanup: ExitStack) -> None:
        self.url = self.servers.redis_url(CELERY_REDIS)
        self.redis = cleanup.enter_context(Redis.from_url(self.url))
        self.app = celery_app.make_client(self.url)
        cleanup.callback(self.app.close)

    def _start(self) -> None:
        ready = self.servers.folder / "ready"
        environment = {celery_app.REDIS_URL: self.url, celery_app.READY_FILE: str(ready)}
        app = f"--app={celery_app.__name__}:app"
        options = f"--concurrency={self.workload.concurrency}"
        self._launch("worker", "celery", app, "worker", options, **environment)
        self._wait_for_file("worker", ready)

    def warm_up(self) -> None:
        super().warm_up()
        self._completed_before = self._count_completed()
        self.polls = 0

    def _submit(self, workload: Workload) -> str:
        result = self._canvas(workload).apply_async()
        return f"celery-task-meta-{result.id}"

    def _canvas(self, workload: Workload) -> Signature:
        if not workload.width:
            return chain(*(self._noop() for _ in range(workload.length)), app=self.app)
        parts = group([self._noop() for _ in range(workload.width)], app=self.app)
        return chain(self._noop(), parts, self.app.signature("bench.join"), app=self.app)

    def _noop(self) -> Signature:
        return self.app.signature("bench.noop", immutable=True)

    def _over(self, runs: list[str]) -> int:
        return int(self.redis.exists(*runs))

    def completed_tasks(self) -> int:
        return self._count_completed() - self._completed_before

    def _count_completed(self) -> int:
        keys = list(self.redis.scan_iter("celery-task-meta-*", count=1000))
        results = self.redis.mget(keys) if keys else []
        return sum(json.loads(result)["status"] == "SUCCESS" for result in results)


CONTENDERS: dict[str, type[Session]] = {
    kind.name: kind for kind in (OpsCore, OpsCoreForEach, BareCelery)
}
