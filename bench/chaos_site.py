"""What the faults are injected into: servers, workers as processes, and the load on them.

Everything listens on loopback, keeps its files in one temporary folder and ends with us. Processes
must be started from a lasting thread: the main one.
"""

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import psycopg2
from psycopg2.extras import NamedTupleCursor
from redis import Redis
from sqlalchemy.exc import SQLAlchemyError

from bench.chaos_agents import TABLES
from celeryconfig import make_app
from opscore import engine, migrations, workflows
from opscore.config import Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.processes import Program, has_ended, launch, signal_group, stop, wait_until
from opscore.servers import PostgresServer, RedisServer, free_port

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0
GRACE_SECONDS = 60.0
"""How long a worker may take for its warm shutdown."""
ENOUGH_ENDED = 6
"""A case in which more processes ended by themselves than this is over."""
TEMPLATE = "chaos_template"
KEY = secrets.token_urlsafe(24)
OURS = ("OPSCORE_", "FLOWER_", "DATABASE_URL", "REDIS_URL")

Document = dict[str, Any]
Popen = subprocess.Popen[bytes]


class Sql:
    """One connection to the case's database that comes back after a restart of the server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg2.extensions.connection | None = None

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self._rows(statement, parameters)
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                self.close()
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def one(self, statement: str, **parameters: Any) -> Any:
        """Return the only value of the only row."""
        return self.rows(statement, **parameters)[0][0]

    def _rows(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        if self._connection is None:
            self._connection = psycopg2.connect(self._url, connect_timeout=3)
            self._connection.autocommit = True
        with self._connection.cursor(cursor_factory=NamedTupleCursor) as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall()) if cursor.description else []

    def close(self) -> None:
        if self._connection is not None:
            with suppress(psycopg2.Error):
                self._connection.close()
            self._connection = None


# --- Servers ------------------------------------------------------------------------------------


@dataclass
class Arena:
    """The servers of a whole suite; each case gets a new database and an empty Redis."""

    postgres: PostgresServer
    redis: RedisServer
    folder: Path
    cases: int = 0

    @classmethod
    @contextmanager
    def open(cls, folder: Path, prepare: Callable[[str], None] | None = None) -> Iterator["Arena"]:
        """Start the servers; `prepare` may add to the template database, given its URL."""
        with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
            arena = cls(postgres, redis, folder)
            arena._execute(f"CREATE DATABASE {TEMPLATE}")
            template = arena._url(TEMPLATE)
            migrations.upgrade(template)
            if prepare is not None:
                prepare(template)
            with closing(Sql(template)) as sql:
                sql.rows(TABLES)
            try:
                yield arena
            finally:
                arena.thaw()

    def _url(self, database: str) -> str:
        return self.postgres.url.rsplit("/", 1)[0] + f"/{database}"

    def _execute(self, statement: str) -> None:
        with closing(Sql(self.postgres.url)) as sql:
            sql.rows(statement)

    @contextmanager
    def new_database(self) -> Iterator[str]:
        self.cases += 1
        name = f"chaos_{self.cases}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        try:
            yield self._url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def mend(self) -> None:
        """Have both servers up and Redis empty, whatever a case left of them."""
        self.thaw()
        for server in (self.postgres, self.redis):
            if not server.answers():
                server.start()
        with self.client() as redis:
            redis.flushall()

    def thaw(self) -> None:
        for server in (self.postgres, self.redis):
            with suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)

    def client(self) -> Redis:
        return Redis.from_url(self.redis.url, socket_timeout=5, socket_connect_timeout=5)


# --- Processes ----------------------------------------------------------------------------------


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


class Site:
    """The processes of one case, on a database of its own."""

    def __init__(
        self, arena: Arena, url: str, folder: Path, environment: Mapping[str, str], tweak: str
    ) -> None:
        self.arena, self.folder, self.tweak = arena, folder, tweak
        self.environment = {
            "DATABASE_URL": url,
            "REDIS_URL": arena.redis.url,
            "OPSCORE_API_KEY": KEY,
            "OPSCORE_LOG_FORMAT": "text",
            "OPSCORE_AGENTS": "bench.chaos_agents",
            **environment,
        }
        self.settings = Settings.from_env(self.environment)
        self.sql = Sql(url)
        self.workers: dict[str, Popen] = {}
        self.others: dict[str, Popen] = {}
        self.ended: list[str] = []
        """Processes that ended though nobody asked them to."""
        self._count = 0

    def start_workers(self, count: int = 1, concurrency: int = 2) -> None:
        """Start workers side by side and wait until each is ready to take tasks."""
        fresh = {}
        for _ in range(count):
            self._count += 1
            name = f"w{self._count}"
            arguments = ("worker", "--concurrency", str(concurrency), "--name", name)
            fresh[name] = self._start(name, *arguments, OPSCORE_READY_FILE=str(self._ready(name)))
        self.workers |= fresh
        for name, process in fresh.items():
            self._await(name, process, self._ready(name).exists)

    def _ready(self, name: str) -> Path:
        return self.folder / f"{name}.ready"

    def _start(self, name: str, *arguments: str, **more: str) -> Popen:
        code = f"{self.tweak}\nfrom opscore.__main__ import main\nmain(prog_name='opscore')"
        outside = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        program = Program(
            name=name,
            argv=_python("-c", code, *arguments),
            # A killed process leaves its temporary folder: in ours, which is removed.
            env=outside | self.environment | {"TMPDIR": str(self.folder)} | more,
            folder=ROOT,
        )
        with self.log(name).open("ab") as log:
            return launch(program, log)

    def _await(self, name: str, process: Popen, is_ready: Callable[[], bool]) -> None:
        wait_until(lambda: has_ended(process) or is_ready(), START_SECONDS)
        if has_ended(process) or not is_ready():
            raise RuntimeError(f"{name} does not start:\n{self.tail(name)}")

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def tail(self, name: str, lines: int = 40) -> str:
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])

    def start_web(self) -> str:
        """Serve the API from two gunicorn workers and return its address."""
        port = free_port()
        arguments = ("--port", str(port), "--workers", "2", "--threads", "4")
        self.others["web"] = self._start("web", "web", *arguments)
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with suppress(httpx2.HTTPError):
                return httpx2.get(f"{url}/health").status_code == 200
            return False

        self._await("web", self.others["web"], answers)
        return url

    def start_beat(self, name: str) -> None:
        self.others[name] = self._start(name, "beat")

    def kill_other(self, name: str) -> None:
        self._end(self.others.pop(name))

    def kill_worker(self, name: str) -> None:
        self._end(self.workers.pop(name))

    @staticmethod
    def _end(process: Popen) -> None:
        signal_group(process, signal.SIGKILL)
        process.wait()

    def shut_down_worker(self, name: str) -> None:
        """End a worker as a deployment does, and wait until it has finished what it holds."""
        process = self.workers.pop(name)
        if (status := stop(process, signal.SIGTERM, GRACE_SECONDS)) != 0:
            self.ended.append(f"{name} answered SIGTERM with status {status}")

    @staticmethod
    def children(process: Popen) -> list[int]:
        """Return the living processes that `process` made."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def supervise(self) -> None:
        """Note which processes ended by themselves; where no worker is left, start new ones."""
        for processes in (self.workers, self.others):
            for name, process in list(processes.items()):
                if has_ended(process):
                    del processes[name]
                    self.ended.append(f"{name} ended by itself with status {process.returncode}")
        if len(self.ended) > ENOUGH_ENDED:
            raise RuntimeError("processes end again and again")
        if self._count and not self.workers:
            self.start_workers(2)

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition while looking after the processes; tell whether it came true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.supervise()
            if wait_until(condition, 0.5):
                return True
        return False

    def pause(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def close(self) -> None:
        for process in (*self.workers.values(), *self.others.values()):
            self._end(process)
        self.sql.close()


# --- Load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A workflow, the input of its runs, and what they must come to."""

    document: Document
    input: Any
    output: Any
    error: str | None = None
    """The code its runs must fail with."""


def task(name: str, ms: int, agent: str = "chaos-work", **more: Any) -> Document:
    return {"taskId": name, "agentId": agent, "parameters": {"label": name, "ms": ms}, **more}


def _agent(chance: random.Random) -> str:
    return "chaos-narrow" if chance.random() < 0.1 else "chaos-work"


def _duration(chance: random.Random) -> int:
    """Return milliseconds: half of the agents answer at once."""
    return chance.choice([0, 0, 0, 10, 30, 100])


def chain(chance: random.Random, length: int = 5) -> Shape:
    tasks = [task(f"t{n}", _duration(chance), _agent(chance)) for n in range(length)]
    return Shape({"id": "chain", "tasks": tasks}, {}, f"t{length - 1}")


def fan(chance: random.Random, width: int = 20) -> Shape:
    side = [task(f"s{n}", _duration(chance), dependsOn=["first"]) for n in range(width)]
    first, last = task("first", 0), task("last", 0, dependsOn=[s["taskId"] for s in side])
    return Shape({"id": "fan", "tasks": [first | {"dependsOn": []}, *side, last]}, {}, "last")


def each(chance: random.Random, items: int = 50) -> Shape:
    limit = chance.choice([{}, {"maxParallel": 10}])
    only = task("each", 0) | {
        "forEach": {"items": "${input}", **limit},
        "parameters": {"label": "${index}", "ms": "${item}"},
    }
    return Shape(
        {"id": "each", "tasks": [only]},
        [_duration(chance) for _ in range(items)],
        [str(n) for n in range(items)],
    )


def graph(chance: random.Random) -> Shape:
    """Return a graph of 8 to 20 tasks, each after up to three of the ten before it."""
    tasks, read = [], set()
    for n in range(chance.randint(8, 20)):
        among = range(max(0, n - 10), n)
        after = [f"t{m}" for m in chance.sample(among, min(n, chance.choice([0, 1, 1, 2, 3])))]
        read.update(after)
        tasks.append(task(f"t{n}", _duration(chance), _agent(chance), dependsOn=after))
    leaves = [t["taskId"] for t in tasks if t["taskId"] not in read]
    output = leaves[0] if len(leaves) == 1 else {leaf: leaf for leaf in leaves}
    chance.shuffle(tasks)
    return Shape({"id": "graph", "tasks": tasks}, {}, output)


MIX = (chain, graph, chain, fan, graph, chain, each, chain)
"""In the proportion they are submitted."""

Submit = Callable[[Shape], str]
"""Submit a run of a shape and return its id, or raise `NotAccepted`."""


class NotAccepted(Exception):
    """Nobody promised to execute this run."""


class Directly:
    """Submits as the API does, without HTTP."""

    def __init__(self, site: Site) -> None:
        self._database = Database(site.settings.database_url)
        self._app = make_app(site.settings)
        self._dispatcher = Dispatcher(self._app, self._database, site.settings)

    def __call__(self, shape: Shape) -> str:
        try:
            with self._database.transaction() as tx:
                stored, _ = workflows.create_workflow(tx, parse(shape.document))
                plan = engine.submit_run(tx, stored, engine.Submission(input=shape.input))
        except SQLAlchemyError as error:
            raise NotAccepted(repr(error)) from error
        with suppress(SQLAlchemyError):  # accepted already: what is not sent is rescued
            self._dispatcher.publish(plan)
        return str(plan.run_id)

    def close(self) -> None:
        self._app.close()
        self._database.close()


class OverHttp:
    """Submits as a client does that tries again when it gets no answer."""

    def __init__(self, url: str) -> None:
        key = {"Authorization": f"Bearer {KEY}"}
        self._client = httpx2.Client(base_url=f"{url}/v1/opscore", headers=key, timeout=30)

    def __call__(self, shape: Shape) -> str:
        try:
            made = self._client.post("/workflows", json=shape.document)
            wanted = {"workflowId": shape.document["id"], "input": shape.input}
            version = {"version": made.json()["version"]}
            answer = self._client.post("/runs", json=wanted | version)
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            raise NotAccepted(repr(error)) from error
        if answer.status_code != 202:
            raise NotAccepted(f"{answer.status_code} {answer.text[:200]}")
        return str(answer.json()["runId"])

    def close(self) -> None:
        self._client.close()


@dataclass
class Load:
    """Keeps `window` runs open, from a thread of its own, until `enough` were accepted."""

    submit: Submit
    sql: Sql
    chance: random.Random
    enough: int
    window: int
    accepted: dict[str, Shape] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    broke: str | None = None
    _last: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="load")

    def start(self) -> None:
        self._thread.start()

    def ask_to_finish(self) -> None:
        """Submit what is missing to `enough`, then no more."""
        self._last.set()

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Submit nothing more, whatever is missing."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.sql.close()

    def put(self, shape: Shape) -> bool:
        """Submit a run; False if nobody accepted it."""
        try:
            self.accepted[self.submit(shape)] = shape
        except NotAccepted as error:
            self.refused.append(str(error))
            return False
        return True

    def _run(self) -> None:
        try:
            while not self._over.is_set() and not self._is_done():
                if not self._is_room() or not self.put(self._next()):
                    self._over.wait(0.05)
        except Exception as error:
            self.broke = repr(error)

    def _is_done(self) -> bool:
        return self._last.is_set() and len(self.accepted) >= self.enough

    def _is_room(self) -> bool:
        unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL"
        return bool(self.sql.one(unfinished) < self.window)

    def _next(self) -> Shape:
        shapes: Sequence[Callable[[random.Random], Shape]] = MIX
        return shapes[len(self.accepted) % len(shapes)](self.chance)
