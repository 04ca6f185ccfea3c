"""What work costs: processor time and memory out of /proc, and the servers' own counters."""

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from redis import Redis

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MIB = 2**20
WRITE_TRANSACTIONS = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
WAL_BYTES = "SELECT pg_current_wal_lsn() - '0/0'"
COMMITS = "SELECT coalesce(sum(xact_commit), 0) FROM pg_stat_database WHERE datname = %s"
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"

Processes = Mapping[str, int]
"""The first process of each part of a contender; `client` is this process, alone."""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _cpu_seconds(pid: int, *, alone: bool) -> float:
    """Return user and system time of a process, and unless `alone` of all that came of it."""
    if alone:
        return sum(map(int, _stat(pid)[11:13])) / TICKS_PER_SECOND
    total = 0
    for one in _tree(pid):
        with suppress(OSError):  # ended meanwhile: its parent has its time
            total += sum(map(int, _stat(one)[11:15]))
    return total / TICKS_PER_SECOND


def cpu_seconds(processes: Processes) -> dict[str, float]:
    """Return the seconds of processor time each part has used so far, ended children included."""
    return {part: _cpu_seconds(pid, alone=part == "client") for part, pid in processes.items()}


def machine_seconds() -> float:
    """Return the processor seconds the whole machine has spent on anything but idling."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / TICKS_PER_SECOND


def wait_until_quiet(cores: float, patience_seconds: float = 60) -> None:
    """Wait until the machine has used less than `cores` for a second, or patience is over."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        before = machine_seconds()
        time.sleep(1)
        if machine_seconds() - before < cores:
            return


def memory_mib(pid: int) -> dict[str, float]:
    """Return peak RSS and present PSS of a process and those below it, added up."""
    rss = pss = 0
    for one in _tree(pid):
        rss += _kib(Path(f"/proc/{one}/status"), "VmHWM:")
        pss += _kib(Path(f"/proc/{one}/smaps_rollup"), "Pss:")
    return {"worker_rss_mib": rss * 1024 / MIB, "worker_pss_mib": pss * 1024 / MIB}


def _kib(path: Path, field: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def connect(url: str) -> Iterator["psycopg2.extensions.cursor"]:
    """Yield a cursor of a connection of its own, every statement its own transaction."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        yield connection.cursor()
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Counts:
    """What the servers have counted at one moment."""

    redis_commands: int
    write_transactions: int
    wal_bytes: int
    commits: int


class Counters:
    """Reads the servers' counters through connections that do not count themselves."""

    def __init__(self, postgres_url: str, redis: Redis, database: str) -> None:
        self._postgres_url = postgres_url
        self._redis = redis
        self._database = database

    def read(self) -> Counts:
        """Read them; the commits of a session's last second may be missing while it lives."""
        info = self._redis.info("stats")
        with connect(self._postgres_url) as cursor:
            writes, wal = _number(cursor, WRITE_TRANSACTIONS), _number(cursor, WAL_BYTES)
        return Counts(int(info["total_commands_processed"]), writes, wal, self.commits())

    def commits(self) -> int:
        with connect(self._postgres_url) as cursor:
            return _number(cursor, COMMITS, self._database)

    def final_commits(self, patience_seconds: float = 20) -> int:
        """Return the commits once every session has ended: ending, each reports what it has."""
        deadline = time.monotonic() + patience_seconds
        with connect(self._postgres_url) as cursor:
            while left := _number(cursor, SESSIONS, self._database):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{left} sessions are still in {self._database}.")
                time.sleep(0.02)
        return self.commits()


def _number(cursor: "psycopg2.extensions.cursor", statement: str, *values: str) -> int:
    cursor.execute(statement, values)
    (row,) = cursor.fetchall()
    return int(row[0])


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that is not below `percent` % of them."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100).__int__() - 1)]


def machine(postgres_url: str, redis: Redis) -> dict[str, str | int]:
    """Describe what all this ran on."""
    with connect(postgres_url) as cursor:
        cursor.execute("SHOW server_version")
        (row,) = cursor.fetchall()
    info = redis.info("server")
    server = "valkey" if "valkey_version" in info else "redis"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "postgres": str(row[0]),
        "redis": f"{server} {info.get('valkey_version') or info['redis_version']}",
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
