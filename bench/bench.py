"""`make bench`: opscore beside bare Celery, in interleaved rounds, on servers of its own."""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from redis import Redis

from bench import measure, report
from bench.contenders import CONTENDERS, ROOT, BenchError, OpsCore, Servers, Session
from bench.drives import drive
from bench.measure import Counts
from bench.workloads import WORKLOADS, Workload
from opscore.servers import PostgresServer, RedisServer

Measured = dict[str, dict[str, dict[str, list[float]]]]


def _names(known: Sequence[str]) -> Any:
    """Make a callback that splits an option by commas and refuses what is not known."""

    def split(context: click.Context, option: click.Parameter, value: str) -> list[str]:
        names = value.split(",")
        if strangers := set(names) - set(known):
            raise click.BadParameter(
                f"{', '.join(sorted(strangers))}: there are {', '.join(known)}"
            )
        return names

    return split


_WORKLOAD_NAMES = [workload.name for workload in WORKLOADS]


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=5, help="How often each is measured.")
@click.option("--only", default=",".join(_WORKLOAD_NAMES), callback=_names(_WORKLOAD_NAMES))
@click.option("--contender", default=",".join(CONTENDERS), callback=_names(list(CONTENDERS)))
@click.option(
    "--scale", type=click.FloatRange(0, min_open=True), default=1.0, help="Of every size."
)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "bench" / "last.json")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--keep-log", is_flag=True, help="Leave the logs of all processes, and say where.")
@click.option("--quiet", type=float, help="Wait until the machine uses fewer cores than this.")
def main(
    rounds: int,
    only: list[str],
    contender: list[str],
    scale: float,
    out: Path,
    markdown: bool,
    keep_log: bool,
    quiet: float | None,
) -> None:
    """Measure opscore beside bare Celery and write every round's figures to a JSON file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up
    workloads = [w.scaled(scale) for w in WORKLOADS if w.name in only]
    measured: Measured = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with _servers(keep_log) as servers:
        machine = measure.machine(servers.postgres.url, Redis.from_url(servers.redis.url))
        for number in range(rounds):
            for workload in workloads:
                names = [name for name in contender if name in workload.contenders]
                for name in names if number % 2 == 0 else reversed(names):
                    if quiet is not None:
                        measure.wait_until_quiet(quiet)
                    figures = _measure(servers, workload, CONTENDERS[name], number)
                    for figure, value in figures.items():
                        measured[workload.name][name][figure].append(value)
    out.write_text(json.dumps({**measured, "machine": machine}, indent=1) + "\n")
    report.show(measured, {w.name: w.about for w in WORKLOADS}, markdown=markdown)
    click.echo(f"\n{machine}\nWritten to {out}.")


@contextmanager
def _servers(keep_log: bool) -> Iterator[Servers]:
    folder = Path(tempfile.mkdtemp(prefix="opscore-bench-"))
    try:
        with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
            servers = Servers(postgres, redis, folder)
            servers.prepare()
            yield servers
    finally:
        if keep_log:
            click.echo(f"Logs: {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(
    servers: Servers, workload: Workload, kind: type[Session], number: int
) -> dict[str, float]:
    """Set a contender up for a workload, run it, and return what it took."""
    log = servers.folder / f"{workload.name}-{kind.name}-{number + 1}.log"
    with kind(servers, workload, log) as session:
        session.warm_up()
        figures = _run(session)
    _say(number, workload, session, figures)
    return figures


def _run(session: Session) -> dict[str, float]:
    tasks = session.workload.tasks
    counts, cpu = session.counters.read(), measure.cpu_seconds(session.processes)
    machine = measure.machine_seconds()
    driven = drive(session)
    machine = measure.machine_seconds() - machine
    used = measure.cpu_seconds(session.processes)
    used = {part: seconds - cpu[part] for part, seconds in used.items()}
    after = session.counters.read()
    polls = session.polls
    memory = measure.memory_mib(session.processes["worker"])
    if (completed := session.completed_tasks()) != tasks:
        raise BenchError(f"{completed} of {tasks} tasks are completed.\n{session.tail()}")
    return {
        "tasks_per_s": tasks / driven.seconds,
        **driven.figures,
        "cpu_s_per_1000": sum(used.values()) * 1000 / tasks,
        **{f"cpu_{part}_s_per_1000": seconds * 1000 / tasks for part, seconds in used.items()},
        **_server_figures(session, counts, after, polls),
        **memory,
        "other_load_cores": max(0.0, machine - sum(used.values())) / driven.seconds,
    }


def _server_figures(
    session: Session, before: Counts, after: Counts, polls: int
) -> dict[str, float]:
    """Return what the servers did for each task, without what only watched."""
    tasks = session.workload.tasks
    commands = after.redis_commands - before.redis_commands
    if not isinstance(session, OpsCore):
        return {"redis_commands_per_task": (commands - polls) / tasks}
    session.stop()
    commits = session.counters.final_commits() - before.commits - session.polls
    return {
        "redis_commands_per_task": commands / tasks,
        "pg_commits_per_task": commits / tasks,
        "pg_write_txns_per_task": (after.write_transactions - before.write_transactions) / tasks,
        "wal_bytes_per_task": (after.wal_bytes - before.wal_bytes) / tasks,
    }


def _say(number: int, workload: Workload, session: Session, figures: dict[str, float]) -> None:
    chosen = {name: figures[name] for name in ("tasks_per_s", "cpu_s_per_1000", "other_load_cores")}
    values = ", ".join(f"{report.LABELS[name]} {value:.2f}" for name, value in chosen.items())
    now = time.strftime("%H:%M:%S")
    click.echo(f"{now} round {number + 1} {workload.name} {session.name}: {values}", err=True)


if __name__ == "__main__":
    main()
