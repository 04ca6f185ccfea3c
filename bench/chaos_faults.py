"""The faults: each is data plus a function that injects it once.

A function returns when the fault is over, and calls `case.mark()` at that moment: recovery is
measured from there. `FAULTS` lists them all.
"""

import base64
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psutil  # type: ignore[import-untyped]
from redis import Redis
from redis.exceptions import RedisError

from bench.chaos_site import Load, Popen, Shape, Site, task
from celeryconfig import make_app
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE, SERVED_FIRST
from opscore.processes import wait_until

QUEUES = (AGENTS_QUEUE, IO_QUEUE, CONTROL_QUEUE)
LISTS = (*QUEUES, *SERVED_FIRST)
CATCH_SECONDS = 30.0
"""How long to look for a process in the middle of an agent's call; the load is never idle."""
IN_FLIGHT_SECONDS = 0.05
"""What a process had sent before it was stopped is done by then."""

_READY = """
SELECT t.id, t.attempt, t.status, clock_timestamp() AS at
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE r.status IN ('queued', 'running') AND r.error IS NULL AND (
    t.status = 'running'
    OR t.status IN ('pending', 'waiting')
       AND coalesce(t.reason, '') NOT IN ('children', 'max_parallel')
       AND NOT EXISTS (SELECT FROM tasks d WHERE d.id = ANY (t.depends_on)
                       AND d.status NOT IN ('completed', 'failed', 'cancelled', 'skipped')))
"""
_CALLS = """
SELECT c.task_id, c.attempt FROM chaos_calls c
JOIN attempts a ON a.task_id = c.task_id AND a.number = c.attempt AND a.status = 'running'
WHERE c.finished_at IS NULL AND c.pid = ANY (%(pids)s)
"""
_STILL_HELD = """
SELECT count(*) FROM attempts a
JOIN unnest(%(tasks)s::uuid[], %(numbers)s::int[]) AS held (task_id, number)
  ON a.task_id = held.task_id AND a.number = held.number
WHERE a.status = 'running'
"""


@dataclass
class Case:
    """One fault at work: where, under which load, and what was seen of it."""

    site: Site
    load: Load
    chance: random.Random
    short: bool
    moments: list[list[Any]] = field(default_factory=list)
    """For each time a fault was over: the tasks that ran or could have started."""
    seen: dict[str, int] = field(default_factory=dict)
    """Figures of the fault's own, for the report."""

    def mark(self) -> None:
        self.moments.append(self.site.sql.rows(_READY))

    def count(self, name: str, by: int = 1) -> None:
        self.seen[name] = self.seen.get(name, 0) + by

    def seconds(self, low: float, high: float) -> float:
        """Return a random time; the short form takes a quarter of it."""
        return self.chance.uniform(low, high) * (0.25 if self.short else 1)

    def some_worker(self) -> str:
        return self.chance.choice(sorted(self.site.workers))


Inject = Callable[[Case], None]


def _nothing(case: Case) -> AbstractContextManager[object]:
    return nullcontext()


def _no_complaint(case: Case) -> list[str]:
    return []


@dataclass(frozen=True)
class Fault:
    """What is done to the site, how often, and what must be seen besides what always holds."""

    name: str
    inject: Inject
    times: int = 4
    short_times: int = 2
    runs: int = 120
    """At least; the load goes on for as long as there is something to inject."""
    short_runs: int = 16
    around: Callable[[Case], AbstractContextManager[object]] = _nothing
    """Goes on during the whole case."""
    check: Callable[[Case], list[str]] = _no_complaint
    """Returns what is wrong, in sentences."""
    over_http: bool = False
    may_refuse: bool = False
    """A submission may be refused or go unanswered while the fault lasts."""
    exact: bool = False
    """No attempt may be lost."""
    environment: Mapping[str, str] = field(default_factory=dict)
    tweak: str = ""
    """Python run at the start of each process, where no setting reaches."""


# --- Processes ----------------------------------------------------------------------------------


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop(pids: list[int]) -> None:
    _signal(pids, signal.SIGSTOP)
    wait_until(lambda: all(map(_is_stopped, pids)), 1)
    time.sleep(IN_FLIGHT_SECONDS)


def _is_stopped(pid: int) -> bool:
    """Tell whether a process has taken note of SIGSTOP: the signal is sent, not done."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True


def _caught(case: Case, choose: Callable[[], list[int]]) -> list[Any]:
    """Stop what `choose` names, at a moment when one of them is in an agent's call.

    Returns the calls they are in: (task_id, attempt).
    """
    deadline = time.monotonic() + CATCH_SECONDS
    while time.monotonic() < deadline:
        pids = choose()
        _stop(pids)
        if calls := case.site.sql.rows(_CALLS, pids=pids):
            return calls
        _signal(pids, signal.SIGCONT)
        case.site.pause(0.02)
    raise RuntimeError("no process was in an agent's call: the load is too low for this fault")


def kill_child(case: Case) -> None:
    chosen: list[int] = []

    def one_child() -> list[int]:
        worker = case.site.workers[case.some_worker()]
        chosen[:] = [case.chance.choice(case.site.children(worker) or [worker.pid])]
        return chosen

    _caught(case, one_child)
    _signal(chosen, signal.SIGKILL)
    case.mark()


def _group(case: Case, worker: Popen) -> list[int]:
    return [worker.pid, *case.site.children(worker)]


def kill_worker(case: Case) -> None:
    """Kill a worker in the middle of its tasks; a supervisor starts another after a while."""
    name = case.some_worker()
    _caught(case, lambda: _group(case, case.site.workers[name]))
    case.site.kill_worker(name)
    case.mark()
    case.site.pause(case.seconds(2, 5))
    case.site.start_workers()


def freeze_worker(case: Case) -> None:
    """Stop a worker until its leases are lost, then let it go on."""
    worker = case.site.workers[case.some_worker()]
    calls = _caught(case, lambda: _group(case, worker))
    case.mark()
    held = {"tasks": [c.task_id for c in calls], "numbers": [c.attempt for c in calls]}
    limit = 2 * case.site.settings.lease_seconds + 20
    try:
        if not case.site.wait(lambda: case.site.sql.one(_STILL_HELD, **held) == 0, limit):
            raise RuntimeError(f"attempts of a frozen worker are not lost after {limit:g} s")
        case.site.pause(case.seconds(1, 4))
    finally:
        _signal(_group(case, worker), signal.SIGCONT)
    case.count("calls_frozen", len(calls))


_REFUSED = """
SELECT count(*) FROM chaos_calls c
JOIN attempts a ON a.task_id = c.task_id AND a.number = c.attempt
WHERE a.status = 'lost' AND c.finished_at > a.finished_at
"""


def late_results_were_refused(case: Case) -> list[str]:
    """Hold that thawed agents came to their ends, so that there was something to refuse."""
    frozen = case.seen.get("calls_frozen", 0)
    wait_until(lambda: case.site.sql.one(_REFUSED) >= frozen, 10)
    case.seen["refused"] = case.site.sql.one(_REFUSED)
    if case.seen["refused"] >= frozen > 0:
        return []
    return [f"of {frozen} frozen calls only {case.seen['refused']} came late and were refused"]


def roll(case: Case) -> None:
    """Replace every worker, one after the other."""
    for name in sorted(case.site.workers):
        case.site.shut_down_worker(name)
        case.site.start_workers()
    case.mark()


def poison(case: Case) -> None:
    """Submit a run whose second task kills whoever executes it."""
    deadly = task("deadly", 0)
    deadly["parameters"] |= {"kills": True}
    document = {"id": "poison", "tasks": [task("first", 0), deadly, task("last", 0)]}
    case.load.put(Shape(document, {}, None, error="worker_lost"))
    case.mark()


_POISONED = """
SELECT count(*) FROM attempts a JOIN tasks t ON t.id = a.task_id
WHERE t.definition_id = 'deadly' AND (a.status = 'lost' OR a.error->>'code' = 'worker_lost')
GROUP BY t.id
"""


def each_was_tried_three_times(case: Case) -> list[str]:
    tries = [row.count for row in case.site.sql.rows(_POISONED)]
    return [] if set(tries) == {3} else [f"attempts at the deadly tasks: {tries}, not 3 each"]


# --- Redis --------------------------------------------------------------------------------------


def _kill_redis(case: Case) -> None:
    os.kill(case.site.arena.redis.pid, signal.SIGKILL)
    case.site.arena.redis.stop()  # reaps it


def redis_restart(case: Case) -> None:
    _kill_redis(case)
    case.site.pause(case.seconds(0.5, 4))
    case.site.arena.redis.start()
    case.mark()


def redis_wiped(case: Case) -> None:
    _kill_redis(case)
    case.site.pause(case.seconds(0.5, 4))
    shutil.rmtree(case.site.arena.redis.home / "appendonlydir")
    case.site.arena.redis.start()
    case.mark()


def flushall(case: Case) -> None:
    with case.site.arena.client() as redis:
        redis.flushall()
    case.mark()


_REPUBLISHED = "SELECT coalesce(sum(generation - 1), 0) FROM runs"
_UNVISITED = "SELECT count(*) FROM tasks WHERE status = 'pending' AND definition_id = 'queued'"


def backlog(case: Case) -> None:
    """Queue very many tasks behind slow workers, look on for a while, then empty Redis."""
    sql = case.site.sql
    queued = Shape({"id": "queued", "tasks": [task("queued", 0, "chaos-gated")]}, {}, "queued")
    for _ in range(200 if case.short else 10_000):
        case.load.put(queued)
    before = sql.one(_REPUBLISHED)
    case.site.pause(4 * case.site.settings.rescue_seconds)
    case.count("sent_though_only_late", int(sql.one(_REPUBLISHED) - before))
    with case.site.arena.client() as redis:
        redis.flushall()
        began = time.monotonic()
        is_queued_again = case.site.wait(
            lambda: bool(redis.llen(AGENTS_QUEUE) >= sql.one(_UNVISITED)), 120
        )
    case.count("requeued_s", round(time.monotonic() - began) if is_queued_again else 999)
    sql.rows("INSERT INTO chaos_gate DEFAULT VALUES")


def backlog_waited_and_came_back(case: Case) -> list[str]:
    flood, seconds = case.seen["sent_though_only_late"], case.seen["requeued_s"]
    checks = {
        f"{flood} runs were published again that merely waited their turn": flood > 0,
        f"an emptied queue was full again only after {seconds} s": seconds >= 60,
    }
    return [said for said, is_wrong in checks.items() if is_wrong]


def redis_frozen(case: Case) -> None:
    os.kill(case.site.arena.redis.pid, signal.SIGSTOP)
    try:
        # Longer than the clients' patience (3 s), or they would not even notice.
        case.site.pause(4 + case.seconds(0, 8))
    finally:
        case.site.arena.thaw()
    case.mark()


def redis_down_at_submit(case: Case) -> None:
    """Submit with Redis down; whoever is not accepted at once counts as refused."""
    _kill_redis(case)
    try:
        for _ in range(5):
            began = time.monotonic()
            case.load.put(_plain())
            slowest = max(case.seen.get("slowest_ms", 0), int(1000 * (time.monotonic() - began)))
            case.seen["slowest_ms"] = slowest
        case.site.pause(case.seconds(0.5, 4))
    finally:
        case.site.arena.redis.start()
    case.mark()


def _plain() -> Shape:
    return Shape({"id": "plain", "tasks": [task("a", 10), task("b", 0)]}, {}, "b")


# --- PostgreSQL and web -------------------------------------------------------------------------


def postgres_restart(case: Case) -> None:
    """Restart PostgreSQL as after `immediate`: no checkpoint, sessions cut off, recovery."""
    postgres = case.site.arena.postgres
    os.kill(postgres.pid, signal.SIGQUIT)
    postgres.stop()
    case.site.pause(case.seconds(0.5, 4))
    postgres.start()
    case.mark()


def web_killed(case: Case) -> None:
    """Kill web's processes while submissions are committed and their publication hangs."""
    sql = case.site.sql
    stored = "SELECT count(*) FROM runs"
    before = sql.one(stored)
    clients = [threading.Thread(target=case.load.put, args=[_plain()]) for _ in range(3)]
    os.kill(case.site.arena.redis.pid, signal.SIGSTOP)
    try:
        for client in clients:
            client.start()
        if not wait_until(lambda: sql.one(stored) > before, 10):
            raise RuntimeError("nothing was committed while Redis hung")
        _signal(case.site.children(case.site.others["web"]), signal.SIGKILL)
    finally:
        case.site.arena.thaw()
        for client in clients:
            client.join()
    case.mark()


def some_went_unanswered(case: Case) -> list[str]:
    """Hold that runs were committed whose client got no answer, so that the fault was real."""
    case.seen["unanswered"] = case.site.sql.one("SELECT count(*) FROM runs") - len(
        case.load.accepted
    )
    return [] if case.seen["unanswered"] > 0 else ["no submission was cut off after its commit"]


# --- Messages -----------------------------------------------------------------------------------


def _until(stopped: threading.Event, look: Callable[[], None], seconds: float) -> None:
    while not stopped.wait(seconds):
        try:
            look()
        except RedisError:
            continue


@contextmanager
def _watching(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `look` again and again beside the block."""
    stopped = threading.Event()
    thread = threading.Thread(target=_until, args=(stopped, look, seconds))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


class _Doubler:
    """Puts a copy of every message it sees beside it, under a delivery tag of its own."""

    def __init__(self, case: Case, redis: Redis) -> None:
        self.case, self.redis = case, redis
        self.known: set[str] = set()

    def __call__(self) -> None:
        for queue in LISTS:
            for raw in self._strings(self.redis.lrange(queue, 0, -1)):
                self._copy(json.loads(raw), queue)
        for raw in self._strings(self.redis.hvals("unacked")):  # taken before we saw it
            message, _, queue = json.loads(raw)
            self._copy(message, queue)

    @staticmethod
    def _strings(answer: Any) -> list[bytes]:
        return list(answer)

    def _copy(self, message: dict[str, Any], queue: str) -> None:
        properties = message["properties"]
        if properties["delivery_tag"] in self.known:
            return
        tag = str(uuid4())
        self.known |= {properties["delivery_tag"], tag}
        copy = message | {"properties": properties | {"delivery_tag": tag}}
        self.redis.lpush(queue, json.dumps(copy))
        self.case.count("copies")


@contextmanager
def every_message_twice(case: Case) -> Iterator[None]:
    with case.site.arena.client() as redis, _watching(_Doubler(case, redis), 0.01):
        yield


def go_on(case: Case) -> None:
    """Inject nothing more than what goes on around; only mark a moment."""
    case.mark()


def most_were_copied(case: Case) -> list[str]:
    visits = case.site.sql.one("SELECT count(*) FROM runs")
    copies = case.seen.get("copies", 0)
    return [] if copies >= visits else [f"only {copies} copies for {visits} runs"]


def _envelope(body: bytes, headers: dict[str, Any], queue: str, **more: Any) -> dict[str, Any]:
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": str(uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": queue, "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
        },
    } | more


def _malformed(queue: str) -> list[bytes]:
    """Return entries no worker can use: no envelope, a broken one, a foreign body."""
    nobody = {"lang": "py", "task": "nobody.knows", "id": str(uuid4())}
    ours = nobody | {"task": "opscore.run_task"}
    empty = b"[[], {}, {}]"
    envelopes = [
        _envelope(empty, nobody, queue),
        _envelope(empty, {}, queue),
        _envelope(b"{}", {}, queue),
        _envelope(b"{}", ours, queue),
        _envelope(b"not json", ours, queue),
        _envelope(b"\xff\xfe", ours, queue),
        _envelope(b"\x80\x04N.", ours, queue) | {"content-type": "application/x-python-serialize"},
        _envelope(b"hello", {}, queue) | {"content-type": "text/plain"},
        _envelope(empty, ours, queue) | {"body": "%%% no base64"},
        _envelope(empty, ours | {"eta": "yesterday", "expires": "never"}, queue),
        _envelope(empty, ours | {"timelimit": "soon", "retries": "x"}, queue),
        {"body": None, "headers": None, "properties": {"delivery_tag": None}},
    ]
    raw = [
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"",
        b"not json",
        b"\xff\x00\xfe",
        b'"text"',
        b'{"body": {}}',
    ]
    return [*raw, *(json.dumps(envelope).encode() for envelope in envelopes)]


REDELIVERED = re.compile(r"redelivered\W+true")
"""How kombu marks a message that it gives out again."""
WRONG_ARGUMENTS: tuple[list[Any], ...] = (
    [],
    [1],
    ["no uuid", 1],
    [str(uuid4()), "one"],
    [str(uuid4()), 1],
    [None, None],
    [str(uuid4()), 1, 2, 3],
    [{"task": 1}, [1]],
)


def malformed(case: Case) -> None:
    """Put what nobody can use into every queue, among the rest."""
    app = make_app(case.site.settings)
    with case.site.arena.client() as redis:
        for queue in QUEUES:
            entries = _malformed(queue)
            case.chance.shuffle(entries)
            for entry in entries:
                redis.lpush(queue, entry)
            case.count("malformed", len(entries) + len(WRONG_ARGUMENTS) + 1)
            for arguments in WRONG_ARGUMENTS:
                app.send_task("opscore.run_task", args=arguments, queue=queue)
            app.send_task("foreign.work", kwargs={"x": 1}, queue=queue)
    app.close()
    case.mark()


def queues_are_empty(case: Case) -> list[str]:
    """Hold that what nobody can use was taken out, rather than going round for ever."""
    with case.site.arena.client() as redis:

        def left() -> dict[str, int]:
            lengths = {queue: int(redis.llen(queue)) for queue in LISTS}
            lengths["unacked"] = int(redis.hlen("unacked"))
            return {queue: length for queue, length in lengths.items() if length}

        wait_until(lambda: not left(), 15)
        return [f"messages still lie in the broker: {rest}"] if (rest := left()) else []


def _count_redeliveries(case: Case, stopped: threading.Event) -> None:
    """Listen to Redis for messages pushed back; they are gone too soon to be found by looking."""
    with case.site.arena.client() as redis, redis.monitor() as monitor:
        while not stopped.is_set():
            command = monitor.next_command()["command"]
            if command.startswith(("LPUSH", "RPUSH")) and REDELIVERED.search(command):
                case.count("redelivered")


@contextmanager
def counting_redeliveries(case: Case) -> Iterator[None]:
    stopped = threading.Event()
    thread = threading.Thread(target=_count_redeliveries, args=[case, stopped])
    thread.start()
    try:
        yield
    finally:
        stopped.set()  # keepers and consumers send commands all the time: it notices soon
        thread.join()


def submit_slow(case: Case) -> None:
    """Submit a run whose task takes longer than the broker's visibility timeout."""
    ms = int(1000 * (case.chance.uniform(3.5, 4) if case.short else case.chance.uniform(8, 20)))
    slow = {"id": "slow", "tasks": [task("slow", ms), task("after", 0)]}
    case.load.put(Shape(slow, {}, "after"))
    case.mark()


def some_were_redelivered(case: Case) -> list[str]:
    return [] if case.seen.get("redelivered") else ["the broker gave no message out again"]


_BRIEF_VISIBILITY = """
import os, celeryconfig
celeryconfig.VISIBILITY_TIMEOUT_SECONDS = float(os.environ["CHAOS_VISIBILITY_SECONDS"])
from kombu.transport.redis import Channel
Channel.unacked_restore_interval = Channel.unacked_restore_throttle = 1
"""
"""There is no setting for it; and as it comes kombu looks only every 100 s."""


# --- Beat ---------------------------------------------------------------------------------------


def beat(case: Case) -> None:
    """Kill whatever beat there is, and run two at once."""
    for name in [name for name in case.site.others if name.startswith("beat")]:
        case.site.kill_other(name)
    case.mark()
    for _ in range(2):
        case.count("beats")
        case.site.start_beat(f"beat{case.seen['beats']}")


# --- All of them --------------------------------------------------------------------------------

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none", go_on, exact=True),
        Fault("kill_child", kill_child, times=6),
        Fault("kill_worker", kill_worker),
        Fault("freeze_worker", freeze_worker, 2, 1, check=late_results_were_refused),
        Fault("redis_restart", redis_restart, short_times=1),
        Fault("redis_wiped", redis_wiped, short_times=1),
        Fault("flushall", flushall, times=6),
        Fault("backlog", backlog, 1, 1, check=backlog_waited_and_came_back, exact=True),
        Fault("postgres_restart", postgres_restart, may_refuse=True),
        Fault(
            "web_killed", web_killed, check=some_went_unanswered, over_http=True, may_refuse=True
        ),
        Fault(
            "doubled", go_on, 4, 1, short_runs=8, around=every_message_twice, check=most_were_copied
        ),
        Fault("malformed", malformed, check=queues_are_empty),
        Fault("redis_frozen", redis_frozen, short_times=1),
        Fault("beat", beat, exact=True),
        Fault(
            "poison",
            poison,
            check=each_was_tried_three_times,
            environment={"OPSCORE_LEASE_SECONDS": "6", "OPSCORE_RENEW_SECONDS": "2"},
        ),
        Fault(
            "visibility",
            submit_slow,
            short_times=1,
            around=counting_redeliveries,
            check=some_were_redelivered,
            exact=True,
            environment={"CHAOS_VISIBILITY_SECONDS": "5"},
            tweak=_BRIEF_VISIBILITY,
        ),
        Fault("rolling_restart", roll, times=2, short_times=1, exact=True),
        Fault("redis_down_at_submit", redis_down_at_submit, over_http=True),
    )
}
