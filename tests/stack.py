"""What tests share: servers, a stack of workers on databases of its own, and waiting.

Nothing is mocked: the embedded servers come with the test requirements.
"""

import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg2
from redis import Redis

from celeryconfig import make_app
from opscore import engine, models, workflows
from opscore.config import Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.servers import PostgresServer, RedisServer
from opscore.states import ATTEMPT_ARROWS, RUN_ARROWS, TASK_ARROWS

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
API_KEY = "key-" + secrets.token_urlsafe(24)
TEMPLATE = "opscore_template"


def wait_until(
    probe: Callable[[], T], *, seconds: float = 20, says: Callable[[T], bool] = bool
) -> T:
    """Return what `probe` gives as soon as it satisfies `says`; fail with the last value seen."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not says(last := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s; the last value was {last!r}")
        pause.wait(0.02)
    return last


@dataclass(frozen=True)
class Servers:
    postgres: PostgresServer
    redis: RedisServer

    @contextmanager
    def new_database(self) -> Iterator[str]:
        """Yield the URL of a fresh database with the newest schema; drop it at the end."""
        name = f"test_{secrets.token_hex(6)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        try:
            yield self.postgres.url.rsplit("/", 1)[0] + f"/{name}"
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        connection = psycopg2.connect(self.postgres.url)
        connection.autocommit = True
        connection.cursor().execute(statement)
        connection.close()


def guard(url: str) -> None:
    """Have the tables refuse rows that break a rule of theirs and changes `states` does not list.

    Only here: in production the engine's guards are trusted; in the tests every statement of every
    test is held against the rules and the arrows.
    """
    arrows = {"runs": RUN_ARROWS, "tasks": TASK_ARROWS, "attempts": ATTEMPT_ARROWS}
    connection = psycopg2.connect(url)
    for table, allowed in arrows.items():
        pairs = [f"'{source}>{target}'" for source in allowed for target in allowed[source]]
        connection.cursor().execute(
            f"""
            CREATE FUNCTION guard_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF OLD.status <> NEW.status
                   AND (OLD.status || '>' || NEW.status) <> ALL (ARRAY[{", ".join(pairs)}]) THEN
                    RAISE 'no arrow in states.py: {table} % > %', OLD.status, NEW.status;
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER arrows BEFORE UPDATE OF status ON {table}
            FOR EACH ROW EXECUTE FUNCTION guard_{table}();
            """
        )
    for table, name, condition in models.rules():
        connection.cursor().execute(
            f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition})"
        )
    connection.commit()
    connection.close()


_redis_numbers = itertools.cycle(range(1, 16))


def new_redis_url(servers: Servers) -> str:
    """Return the URL of an empty Redis database; number 0 is that of `test_celery`'s worker."""
    url = servers.redis.url.rsplit("/", 1)[0] + f"/{next(_redis_numbers)}"
    with Redis.from_url(url) as redis:
        redis.flushdb()
    return url


def stack_environment(database_url: str, redis_url: str, **more: str) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "OPSCORE_API_KEY": API_KEY,
        "OPSCORE_LOG_FORMAT": "text",
        **more,
    }


class Stack:
    """Workers on a database and a Redis of their own, driven without HTTP."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = environment
        self.settings = Settings.from_env(environment)
        self.database = Database(self.settings.database_url, pool_size=10)
        self.app = make_app(self.settings)
        self.dispatcher = Dispatcher(self.app, self.database, self.settings)
        self.log = log
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(
        self, *, concurrency: int = 2, pool: str = "prefork"
    ) -> subprocess.Popen[bytes]:
        """Start a worker process that consumes every queue and wait until it is ready."""
        options = ["--concurrency", str(concurrency), "--pool", pool]
        before = self.log.read_text().count(" ready.") if self.log.exists() else 0
        with self.log.open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "opscore", "worker", *options],
                # A killed worker leaves its temporary folder: in ours, which pytest removes.
                env=os.environ | self.environment | {"TMPDIR": str(self.log.parent)},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.workers.append(worker)
        wait_until(
            lambda: (worker.poll(), self.log.read_text()),
            seconds=30,
            says=lambda seen: seen[0] is not None or seen[1].count(" ready.") > before,
        )
        assert worker.poll() is None, self.log.read_text()
        return worker

    def stop(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        self.app.close()
        self.database.close()

    def submit(self, document: dict[str, Any], input: Any = None, **options: Any) -> Any:
        """Create the workflow, submit a run of it, publish it, and return the run's id."""
        with self.database.transaction() as tx:
            stored, _ = workflows.create_workflow(tx, parse(document))
            plan = engine.submit_run(
                tx, stored, engine.Submission(input={} if input is None else input, **options)
            )
        self.dispatcher.publish(plan)
        return plan.run_id

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        from sqlalchemy import text

        with self.database.autocommit() as tx:
            return list(tx.execute(text(statement), parameters))

    def run(self, run_id: Any) -> Any:
        (row,) = self.rows("SELECT * FROM runs WHERE id = :id", id=run_id)
        return row

    def tasks(self, run_id: Any) -> list[Any]:
        return self.rows(
            "SELECT * FROM tasks WHERE run_id = :id ORDER BY position, index", id=run_id
        )

    def finished(self, run_id: Any, seconds: float = 30) -> Any:
        """Wait for the run to end and return its row."""
        try:
            return wait_until(
                lambda: self.run(run_id),
                seconds=seconds,
                says=lambda run: run.finished_at is not None,
            )
        except AssertionError as error:
            tasks = [(t.definition_id, t.index, t.status, t.reason) for t in self.tasks(run_id)]
            tail = self.log.read_text()[-4000:]
            raise AssertionError(f"{error}\n{tasks}\n{tail}") from None


@contextmanager
def running_stack(servers: Servers, log: Path, **environment: str) -> Iterator[Stack]:
    """Yield a stack without workers yet; stop whatever was started at the end."""
    with ExitStack() as cleanup:
        url = cleanup.enter_context(servers.new_database())
        stack = Stack(stack_environment(url, new_redis_url(servers), **environment), log)
        cleanup.callback(stack.stop)
        yield stack
