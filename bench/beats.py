"""`make beats`: several beats at once, killed at random; and what a tick costs.

    python -m bench.beats [--seconds N] [--schedules N] [--beats N] [--others N] [--seed N]

Every second each schedule is due. Beats are killed (SIGKILL) and started again all the while. Then
every moment of every schedule must have fired exactly once, with one run. A firing is late by the
time from its moment to when a worker could take its visit off the queue. Beside the schedules that
fire stand others that do not. Ends with status 1 if something is not as it must be. No keeper runs:
what a killed beat committed and did not publish is counted, and would be left to that.
"""

import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from signal import SIGKILL, SIGTERM
from subprocess import Popen
from threading import Event, Thread
from typing import Any
from uuid import UUID

import click
from redis import Redis
from sqlalchemy import text

from opscore import migrations, schedules, workflows
from opscore.config import AGENTS_QUEUE, Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.processes import Program, has_ended, launch, signal_group, stop, wait_until
from opscore.servers import PostgresServer, RedisServer

ROOT = Path(__file__).parent.parent
WORKFLOW = {"id": "beats", "tasks": [{"taskId": "a", "agentId": "nobody"}]}
SCHEDULE: Mapping[str, Any] = {
    **{"workflow_id": "beats", "version": None, "agent_id": None, "cron": None},
    **{"every_seconds": 1.0, "timezone": "UTC", "input": {"at": "${firing.at}"}, "labels": {}},
    **{"start_at": None, "end_at": None, "priority": 1, "enabled": True, "jitter_seconds": 0.0},
    **{"overlap": "allow", "catch_up": "all", "catch_up_window_seconds": 3600.0},
}
KILL_EVERY_SECONDS = (4.0, 12.0)
AWAY_SECONDS = (0.0, 3.0)
START_SECONDS = 30.0
STEP = timedelta(seconds=1)
MOST_LATE_SECONDS = 1.5
"""99 of 100 firings are no later."""
MOST_TICK_MS = 10.0
TICKS = 200


@dataclass(frozen=True, slots=True)
class Scene:
    """How much of everything there is, and for how long."""

    seconds: float = 120.0
    schedules: int = 200
    beats: int = 3
    others: int = 10_000
    seed: int = 1
    kill_every: tuple[float, float] = KILL_EVERY_SECONDS


@dataclass
class Result:
    """What came of it."""

    moments: int = 0
    kills: int = 0
    unpublished: int = 0
    late: list[float] = field(default_factory=list)
    """Seconds, of each visit that came; in order."""
    tick_ms: list[float] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], percent: float) -> float:
    return values[math.ceil(len(values) * percent / 100) - 1] if values else math.nan


class Beats:
    """Beat processes, kept running."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.environment = dict(os.environ) | dict(environment)
        self.log = log
        self.processes: list[Popen[bytes]] = []

    def start(self) -> None:
        argv = [sys.executable, "-m", "opscore", "beat"]
        with self.log.open("ab") as log:
            program = Program("beat", argv, self.environment, folder=ROOT)
            self.processes.append(launch(program, log))

    def kill(self, process: Popen[bytes]) -> None:
        self.processes.remove(process)
        signal_group(process, SIGKILL)
        process.wait()

    def stop(self) -> None:
        for process in self.processes:
            stop(process, SIGTERM, START_SECONDS)

    def ended(self) -> list[int | None]:
        """Return how those ended that nobody asked to."""
        return [process.returncode for process in self.processes if has_ended(process)]


class Arrivals(Thread):
    """Takes visits off the queue, as workers do, and notes when each came."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(daemon=True)
        self.at: dict[UUID, float] = {}
        self.times: Counter[UUID] = Counter()
        self.has_ended = Event()
        self._redis_url = redis_url

    def run(self) -> None:
        with Redis.from_url(self._redis_url) as redis:
            while (entry := redis.brpop([AGENTS_QUEUE], timeout=1)) or not self.has_ended.is_set():
                if entry:
                    self._note(UUID(json.loads(entry[1])["headers"]["id"]))

    def _note(self, task_id: UUID) -> None:
        self.at.setdefault(task_id, time.time())
        self.times[task_id] += 1


def play(scene: Scene, environment: Mapping[str, str], folder: Path) -> Result:
    """Let beats fire, and judge what came of it; the database and Redis are fresh."""
    settings = Settings.from_env(environment)
    database = Database(settings.database_url)
    beats, arrivals = Beats(environment, folder / "beats.log"), Arrivals(settings.redis_url)
    result = Result()
    try:
        _fill(database, scene.others)
        result.tick_ms = _time_ticks(database)
        for _ in range(scene.beats):
            beats.start()
        _await(database, beats, scene.beats)
        arrivals.start()
        _create(database, scene.schedules)
        _disturb(beats, scene, result)
        beats.stop()
        arrivals.has_ended.set()
        arrivals.join()
        _judge(database, scene, arrivals, result)
    finally:
        beats.stop()
        database.close()
    return result


def _fill(database: Database, others: int) -> None:
    """Write schedules that are not due today."""
    with database.transaction() as tx:
        workflows.create_workflow(tx, parse(WORKFLOW))
        if others:
            schedules.create(tx, {**SCHEDULE, "name": "other", "every_seconds": 86_400.0})
            copied = "workflow_id, every_seconds, timezone, input, overlap, catch_up,"
            copied += " catch_up_window_seconds"
            statement = f"""
                INSERT INTO schedules (name, next_at, {copied})
                SELECT 'other-' || n, next_at + n * interval '1 s', {copied}
                FROM schedules, generate_series(2, :others) AS n"""
            tx.execute(text(statement), {"others": others})


def _time_ticks(database: Database) -> list[float]:
    """Return how many milliseconds ticks took that found nothing to do; in order."""
    took = []
    for _ in range(TICKS):
        began = time.perf_counter()
        with database.transaction() as tx:
            schedules.tick(tx, 20)
        took.append((time.perf_counter() - began) * 1000)
    return sorted(took)


def _await(database: Database, beats: Beats, count: int) -> None:
    """Wait until so many beats are there."""
    statement = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'beat' AND datname = current_database()"
    )

    def are_there() -> bool:
        with database.autocommit() as tx:
            return tx.execute(statement).scalar_one() >= count

    if not wait_until(are_there, START_SECONDS):
        raise RuntimeError(f"Beats do not start:\n{beats.log.read_text()[-4000:]}")


def _create(database: Database, count: int) -> None:
    for number in range(count):
        with database.transaction() as tx:
            schedules.create(tx, {**SCHEDULE, "name": f"every-{number}"})


def _disturb(beats: Beats, scene: Scene, result: Result) -> None:
    """Kill a beat now and then, and start another, until time is up."""
    chance = random.Random(scene.seed)
    end = time.monotonic() + scene.seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, chance.uniform(*scene.kill_every)))
        if time.monotonic() + AWAY_SECONDS[1] < end:
            beats.kill(chance.choice(beats.processes))
            result.kills += 1
            time.sleep(chance.uniform(*AWAY_SECONDS))
            beats.start()
    result.complaints += [f"A beat ended with status {status}." for status in beats.ended()]


def _judge(database: Database, scene: Scene, arrivals: Arrivals, result: Result) -> None:
    with database.autocommit() as tx:
        rows = tx.execute(text("SELECT * FROM schedules WHERE name LIKE 'every-%'")).all()
        fired = tx.execute(
            text(
                "SELECT f.schedule, f.moment, f.status, count(r.id) AS runs,"
                " min(t.id::text) AS task FROM firings f LEFT JOIN runs r ON r.id = f.run_id"
                " LEFT JOIN tasks t ON t.run_id = r.id"
                " GROUP BY f.schedule, f.moment ORDER BY f.moment"
            )
        ).all()
        runs = tx.execute(text("SELECT count(*) FROM runs")).scalar_one()
    by_name: dict[str, list[Any]] = {row.name: [] for row in rows}
    for firing in fired:
        by_name[firing.schedule].append(firing)
    for row in rows:
        result.complaints += faults(row, by_name[row.name])
    result.moments = len(fired)
    came = [(firing.moment, arrivals.at.get(UUID(firing.task))) for firing in fired if firing.task]
    result.late = sorted(at - moment.timestamp() for moment, at in came if at is not None)
    result.unpublished = len(fired) - len(result.late)
    result.complaints += _sums(result, scene, runs, max(arrivals.times.values(), default=0))


def faults(row: Any, firings: Sequence[Any]) -> Iterator[str]:
    """Say what is wrong with what one schedule fired."""
    count = (row.decided_at - row.created_at) // STEP
    wanted = [row.created_at + (number + 1) * STEP for number in range(count)]
    moments = [firing.moment for firing in firings]
    if moments != wanted:
        missing, more = len(set(wanted) - set(moments)), len(set(moments) - set(wanted))
        yield f"{row.name} fired {len(moments)} moments, {missing} are missing, {more} are none."
    if {(firing.status, firing.runs) for firing in firings} - {("started", 1)}:
        yield f"{row.name} has firings without exactly one run."


def _sums(result: Result, scene: Scene, runs: int, visits: int) -> Iterator[str]:
    """Say what is wrong with all of it together."""
    if runs != result.moments:
        yield f"There are {runs} runs for {result.moments} moments."
    if result.moments < scene.schedules * (scene.seconds - 3):
        yield f"Only {result.moments} moments have fired."
    if visits > 1:
        yield f"A visit was sent {visits} times."
    if (late := percentile(result.late, 99)) > MOST_LATE_SECONDS:
        yield f"One in a hundred is later than {late:.2f} s; {MOST_LATE_SECONDS} s are allowed."
    if (took := percentile(result.tick_ms, 50)) > MOST_TICK_MS:
        yield f"A tick costs {took:.1f} ms; {MOST_TICK_MS:g} ms are allowed."


@contextmanager
def _environment() -> Iterator[tuple[dict[str, str], Path]]:
    """Yield what processes need to work on servers of their own, and a folder for logs."""
    folder = Path(tempfile.mkdtemp(prefix="opscore-beats-"))
    try:
        with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
            migrations.upgrade(postgres.url)
            given = {"DATABASE_URL": postgres.url, "REDIS_URL": redis.url}
            yield {**given, "OPSCORE_API_KEY": "of-the-benchmark-" + "x" * 24}, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command()
@click.option("--seconds", default=Scene().seconds, show_default=True)
@click.option("--schedules", default=Scene().schedules, show_default=True, help="That fire.")
@click.option("--beats", default=Scene().beats, show_default=True)
@click.option("--others", default=Scene().others, show_default=True, help="That do not.")
@click.option("--seed", default=Scene().seed, show_default=True, help="Of who is killed when.")
def main(seconds: float, schedules: int, beats: int, others: int, seed: int) -> None:
    """Fire schedules with several beats, and kill those at random."""
    before = os.getloadavg()[0]
    with _environment() as (environment, folder):
        result = play(Scene(seconds, schedules, beats, others, seed), environment, folder)
    late, ticks = result.late, result.tick_ms
    click.echo(
        f"{schedules} schedules of every second, {beats} beats, {seconds:g} s: {result.moments}"
        f" moments fired, {result.kills} beats killed, {result.unpublished} left to the keeper\n"
        f"late, seconds: p50 {percentile(late, 50):.3f}, p99 {percentile(late, 99):.3f},"
        f" max {percentile(late, 100):.3f}\n"
        f"a tick beside {others} schedules, ms: p50 {percentile(ticks, 50):.1f},"
        f" p99 {percentile(ticks, 99):.1f}\n"
        f"load of the machine: {before:.1f} before, {os.getloadavg()[0]:.1f} after,"
        f" {os.cpu_count()} cores"
    )
    for complaint in result.complaints:
        click.echo(complaint, err=True)
    sys.exit(1 if result.complaints else 0)


if __name__ == "__main__":
    main()
