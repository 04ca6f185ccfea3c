"""Queue entries that are no visits: set aside, counted, and the worker goes on.

And a worker whose settings do not fit each other: refused in a sentence.
"""

import base64
import copy
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis
from stack import ROOT, Servers, Stack, running_stack, stack_environment, wait_until

from celeryconfig import make_app
from opscore import canvas
from opscore.config import (
    AGENTS_QUEUE,
    CONTROL_QUEUE,
    IO_QUEUE,
    SET_ASIDE,
    SET_ASIDE_COUNT,
    Settings,
)
from opscore.servers import RedisServer
from workers.consumer import Channel

QUEUES = (AGENTS_QUEUE, IO_QUEUE, CONTROL_QUEUE)
MARK = "do-not-log-me"
"""In every malformed entry below that has room for it."""
ROUNDS = 10
CHAIN = {"id": "chain", "tasks": [{"taskId": name, "agentId": "echo"} for name in "abcde"]}


def envelope(**headers: Any) -> dict[str, Any]:
    """Return what Celery publishes for a visit, made to carry the mark."""
    visit = [str(uuid4()), 1]
    return {
        "body": encoded([visit, {}, {"callbacks": None, "chain": None, "x": MARK}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": canvas.RUN_TASK, "id": visit[0], "mark": MARK, **headers},
        "properties": {
            "delivery_info": {"exchange": AGENTS_QUEUE, "routing_key": AGENTS_QUEUE},
            "delivery_tag": str(uuid4()),
            "body_encoding": "base64",
        },
    }


def encoded(body: Any) -> str:
    return base64.b64encode(json.dumps(body).encode()).decode()


def call(*args: Any, kwargs: Any = None, embed: Any = None) -> dict[str, Any]:
    body = [list(args), {} if kwargs is None else kwargs, embed]
    return envelope() | {"body": encoded(body)}


def without(*path: str) -> dict[str, Any]:
    made = copy.deepcopy(envelope())
    *above, last = path
    part = made
    for name in above:
        part = part[name]
    del part[last]
    return made


def changed(value: Any, *path: str) -> dict[str, Any]:
    made = without(*path)
    *above, last = path
    part = made
    for name in above:
        part = part[name]
    part[last] = value
    return made


GOOD_ID = str(uuid4())
SHAPES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"\x00\xff" + MARK.encode(), "no_json"),
    "nothing": (b"", "no_json"),
    "half an envelope": (json.dumps(envelope()).encode()[:200], "no_json"),
    "too deep to be read": (b"[" * 100_000, "no_envelope"),
    "too deep for the pool": (
        json.dumps(envelope(x=0)).replace('"x": 0', f'"x": {"[" * 600}{"]" * 600}').encode(),
        "no_envelope",
    ),
    "a list": ([MARK], "no_envelope"),
    "a string": (MARK, "no_envelope"),
    "a number": (7, "no_envelope"),
    "null": (None, "no_envelope"),
    "an empty object": ({}, "no_envelope"),
    "no properties": (without("properties"), "no_envelope"),
    "properties of another kind": (changed([MARK], "properties"), "no_envelope"),
    "no delivery tag": (without("properties", "delivery_tag"), "no_envelope"),
    "a delivery tag Redis refuses": (
        changed("\ud800", "properties", "delivery_tag"),
        "no_envelope",
    ),
    "a delivery tag of another kind": (changed([1], "properties", "delivery_tag"), "no_envelope"),
    "no delivery info": (without("properties", "delivery_info"), "no_envelope"),
    "no routing key": (without("properties", "delivery_info", "routing_key"), "no_envelope"),
    "bad base64": (changed("a", "body"), "no_envelope"),
    "an unknown body encoding": (changed("rot13", "properties", "body_encoding"), "no_envelope"),
    "headers of another kind": (changed([MARK], "headers"), "no_envelope"),
    "a body that is no string": (changed({"a": MARK}, "body"), "no_envelope"),
    "no headers": (without("headers"), "unknown_task"),
    "no task": (without("headers", "task"), "unknown_task"),
    "an unknown task": (envelope(task="tasks.add"), "unknown_task"),
    "a task of another kind": (envelope(task=[MARK]), "unknown_task"),
    "an older protocol": (
        {**without("headers"), "body": encoded({"task": canvas.RUN_TASK, "id": "1", "args": [1]})},
        "unknown_task",
    ),
    "no body": (without("body"), "no_call"),
    "a body that is no JSON": (
        changed(base64.b64encode(b"\xff{").decode(), "body"),
        "unreadable_body",
    ),
    "pickle": (changed("application/x-python-serialize", "content-type"), "unreadable_body"),
    "an unknown content type": (changed("image/png", "content-type"), "unreadable_body"),
    "plain text": (changed("text/plain", "content-type"), "unreadable_body"),
    "not compressed as it says": (envelope(compression="application/x-gzip"), "unreadable_body"),
    "an unknown compression": (envelope(compression="squeezed"), "unreadable_body"),
    "plain bytes": (changed("application/data", "content-type"), "no_call"),
    "a body that is no call": (envelope() | {"body": encoded({"args": [MARK]})}, "no_call"),
    "arguments of another kind": (envelope() | {"body": encoded(["x", {}, {}])}, "no_call"),
    "no id": (without("headers", "id"), "no_call"),
    "an id of another kind": (envelope(id=[MARK]), "no_call"),
    "a strange time limit": (envelope(timelimit=["soon", "later"]), "no_call"),
    "three time limits": (envelope(timelimit=[1, 2, 3]), "no_call"),
    "a moment that is none": (envelope(eta="tomorrow"), "no_call"),
    "strange stamps": (envelope(stamped_headers=5), "no_call"),
    "an end of another kind": (envelope(expires={"a": MARK}), "no_call"),
    "no arguments": (call(), "wrong_arguments"),
    "one argument": (call(GOOD_ID), "wrong_arguments"),
    "three arguments": (call(GOOD_ID, 1, 1), "wrong_arguments"),
    "no uuid": (call(MARK, 1), "wrong_arguments"),
    "a number for the id": (call(5, 1), "wrong_arguments"),
    "a generation in words": (call(GOOD_ID, "1"), "wrong_arguments"),
    "true for a generation": (call(GOOD_ID, True), "wrong_arguments"),
    "generation 0": (call(GOOD_ID, 0), "wrong_arguments"),
    "a generation no column holds": (call(GOOD_ID, 2**31), "wrong_arguments"),
    "an argument by name": (call(GOOD_ID, 1, kwargs={"x": MARK}), "wrong_arguments"),
}


def raw(shape: tuple[Any, str]) -> bytes:
    entry, _ = shape
    return entry if isinstance(entry, bytes) else json.dumps(entry).encode()


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("malformed") / "log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.fleet") as stack:
        yield stack


@pytest.fixture(scope="module")
def redis(stack: Stack) -> Iterator[Redis]:
    with Redis.from_url(stack.settings.redis_url) as redis:
        yield redis


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(request: Any, stack: Stack, redis: Redis) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that started on queues with every shape at their heads, and a visit behind."""
    redis.flushdb()
    run_id = stack.submit(CHAIN)
    for queue in QUEUES:
        redis.rpush(queue, *map(raw, SHAPES.values()))
    worker = stack.start_worker(pool=request.param)
    assert stack.finished(run_id).status == "completed"
    wait_until(lambda: counts(redis), says=lambda seen: seen == each(len(SHAPES)))
    yield worker
    assert worker.poll() is None and MARK.encode() not in stack.log.read_bytes()
    worker.terminate()
    assert worker.wait(20) == 0, stack.log.read_text()[-4000:]
    assert redis.zcard("unacked_index") == 0 and redis.hlen("unacked") == 0
    assert redis.llen(AGENTS_QUEUE) == 0, "nothing came back"


def counts(redis: Redis) -> dict[str, int]:
    found: Any = redis.hgetall(SET_ASIDE_COUNT)
    return {queue.decode(): int(count) for queue, count in found.items()}


def each(count: int) -> dict[str, int]:
    return dict.fromkeys(QUEUES, count)


def newest(redis: Redis, count: int) -> list[dict[str, Any]]:
    found: Any = redis.lrange(SET_ASIDE, 0, count - 1)
    return [json.loads(record) for record in found]


def warnings(stack: Stack) -> list[str]:
    return [line for line in stack.log.read_text().splitlines() if "message.set_aside" in line]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_no_visit_is_set_aside_from_every_queue(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis, shape: str
) -> None:
    entry, reason = raw(SHAPES[shape]), SHAPES[shape][1]
    logged = len(warnings(stack))
    redis.delete(SET_ASIDE, SET_ASIDE_COUNT)
    for queue in QUEUES:
        redis.lpush(queue, entry)
    wait_until(lambda: counts(redis), says=lambda seen: seen == each(1))
    records = newest(redis, 10)
    assert sorted(record["queue"] for record in records) == sorted(QUEUES)
    for record in records:
        assert (record["reason"], record["bytes"]) == (reason, len(entry))
        assert record["entry"] == entry.decode(errors="backslashreplace")[: 64 * 1024]
        assert datetime.fromisoformat(record["at"]).tzinfo is not None
    lines = warnings(stack)[logged:]
    assert len(lines) == 3 and all(f"reason={reason}" in line for line in lines)
    assert worker.poll() is None


def test_visits_between_malformed_entries_under_load_are_all_made(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    redis.delete(SET_ASIDE_COUNT)
    entries = [raw(shape) for shape in SHAPES.values()]
    runs = []
    for number in range(ROUNDS):
        for queue in QUEUES:
            redis.lpush(queue, *entries)
        runs.append(stack.submit(CHAIN))
        # Heads of the queues too, so that visits are overtaken.
        redis.rpush(QUEUES[number % 3], *entries[:5])
    assert [stack.finished(run_id, seconds=60).status for run_id in runs] == ["completed"] * ROUNDS
    whole = ROUNDS * (3 * len(entries) + 5)
    wait_until(lambda: sum(counts(redis).values()), seconds=60, says=lambda seen: seen == whole)
    rows = stack.rows("SELECT max(generation) AS generation FROM runs")
    assert rows[0].generation == 1, "no visit was lost and rescued"
    assert redis.llen(SET_ASIDE) == 1000
    assert worker.poll() is None


def test_a_long_entry_is_cut(worker: subprocess.Popen[bytes], redis: Redis) -> None:
    redis.delete(SET_ASIDE_COUNT)
    redis.lpush(AGENTS_QUEUE, b"\xff" * 2**20)
    wait_until(lambda: counts(redis), says=bool)
    (record,) = newest(redis, 1)
    assert record["bytes"] == 2**20 and len(record["entry"]) == 64 * 1024


def test_a_worker_connected_anew_sets_aside_as_before(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    redis.delete(SET_ASIDE_COUNT)
    redis.client_kill_filter(_type="normal", skipme=True)
    for queue in QUEUES:
        redis.lpush(queue, b"{}", raw(SHAPES["no arguments"]))
    run_id = stack.submit(CHAIN)
    wait_until(lambda: counts(redis), says=lambda seen: seen == each(2))
    assert stack.finished(run_id).status == "completed" and worker.poll() is None


def test_what_redis_does_not_keep_is_logged_and_the_worker_goes_on(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    redis.set(SET_ASIDE, "of another kind")
    before = stack.log.read_text().count("message.not_kept")
    redis.lpush(AGENTS_QUEUE, b"{}", raw(SHAPES["no arguments"]))
    run_id = stack.submit(CHAIN)
    wait_until(
        lambda: stack.log.read_text().count("message.not_kept"),
        says=lambda seen: seen == before + 2,
    )
    assert stack.finished(run_id).status == "completed" and worker.poll() is None
    redis.delete(SET_ASIDE)


@contextmanager
def stopped(redis: Redis, worker: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop `worker`; let it go on, and let Redis have all the memory it wants, afterwards."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        redis.config_set("maxmemory", "0")
        os.kill(worker.pid, signal.SIGCONT)


def test_a_worker_of_a_full_redis_empties_its_queues(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    with stopped(redis, worker):
        run_ids = [stack.submit(CHAIN) for _ in range(6)]
        redis.config_set("maxmemory", "1")
        os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: redis.llen(AGENTS_QUEUE), says=lambda length: length == 0)
    for run_id in [*run_ids, stack.submit(CHAIN)]:
        assert stack.finished(run_id).status == "completed"
    assert worker.poll() is None and "message.not_noted" in stack.log.read_text()


def test_a_worker_that_starts_on_a_full_redis_empties_its_queues(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    with stopped(redis, worker):
        run_ids = [stack.submit(CHAIN) for _ in range(6)]
        redis.config_set("maxmemory", "1")
        other = stack.start_worker()
        wait_until(lambda: redis.llen(AGENTS_QUEUE), says=lambda length: length == 0)
    for run_id in run_ids:
        assert stack.finished(run_id).status == "completed"
    other.terminate()
    assert other.wait(20) == 0 and "broker.full" in stack.log.read_text()


def test_what_was_taken_long_ago_is_looked_for_again_when_a_full_redis_has_room() -> None:
    """Celery as it comes ends the worker."""
    with RedisServer.temporary() as server, Redis.from_url(server.url) as redis:
        app = make_app(Settings.from_env(stack_environment("postgresql://h/d", server.url)))
        app.send_task("any", queue=AGENTS_QUEUE)
        with app.connection_for_read() as connection:
            connection.transport.Channel = Channel
            channel = connection.channel()
            assert channel.basic_get(AGENTS_QUEUE)
            redis.zadd("unacked_index", {tag: 0 for tag in redis.hkeys("unacked")})
            redis.config_set("maxmemory", "1")
            channel.qos.restore_visible(interval=1)
            assert redis.llen(AGENTS_QUEUE) == 0
            redis.config_set("maxmemory", "0")
            channel.qos.restore_visible(interval=1)
            assert redis.llen(AGENTS_QUEUE) == 1
        app.close()


def test_a_malformed_broadcast_is_dropped(
    worker: subprocess.Popen[bytes], stack: Stack, redis: Redis
) -> None:
    number = stack.settings.redis_url.rsplit("/", 1)[1]
    before = stack.log.read_text().count("broadcast.dropped")
    assert redis.publish(f"/{number}.celery.pidbox", "{}") == 1
    wait_until(lambda: stack.log.read_text().count("broadcast.dropped") > before)
    with stack.app.connection_for_write() as connection:
        assert stack.app.control.ping(timeout=10, limit=1, connection=connection)
    assert worker.poll() is None


# --- Settings of a worker -----------------------------------------------------------------------


def output(environment: dict[str, str], *command: str) -> str:
    """Return what a command that must refuse to start says."""
    done = subprocess.run(
        [sys.executable, "-m", "opscore", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_process_refuses_a_pool_too_small_for_its_threads_among_every_other_fault(
    environment: dict[str, str],
) -> None:
    given = environment | {"OPSCORE_DATABASE_POOL": "1", "OPSCORE_LEASE_SECONDS": "9"}
    for command, least in {
        ("worker", "--pool=threads", "--concurrency=8"): 10,
        ("worker", "--concurrency=8"): 3,
        ("web", "--threads=5"): 5,
    }.items():
        said = output(given, *command)
        assert "Traceback" not in said
        assert f"OPSCORE_DATABASE_POOL (1) must be at least {least}" in said
        assert "OPSCORE_LEASE_SECONDS (9) must be at least" in said


def test_a_worker_sizes_the_pool_of_each_process_by_its_threads(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tells.py").write_text(
        "import os\nraise ImportError('a pool of ' + os.environ['OPSCORE_DATABASE_POOL'])\n"
    )
    given = environment | {"OPSCORE_AGENTS": "tells", "PYTHONPATH": str(tmp_path)}
    assert "a pool of 32" in output(given, "worker", "--pool=threads", "--concurrency=30")
    assert "a pool of 3" in output(given, "worker", "--concurrency=30")


@pytest.mark.parametrize("verb", ["ack_log_error", "reject_log_error"])
def test_a_message_that_a_frozen_redis_did_not_acknowledge_keeps_no_place(verb: str) -> None:
    """Celery as it comes keeps it for good, and after `prefetch` of them takes no message."""
    with RedisServer.temporary() as redis:
        app = make_app(Settings.from_env(stack_environment("postgresql://h/d", redis.url)))
        app.send_task("any", queue=AGENTS_QUEUE)
        with app.connection_for_read() as connection:
            connection.transport.Channel = Channel
            channel = connection.channel()
            channel.basic_qos(0, 1, False)
            message = channel.basic_get(AGENTS_QUEUE)
            assert not channel.qos.can_consume()
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                getattr(message, verb)(logging.getLogger(), connection.connection_errors)
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            assert channel.qos.can_consume()
        app.close()


def test_taking_and_acknowledging_a_message_is_no_transaction_of_redis(
    worker: subprocess.Popen[bytes], redis: Redis
) -> None:
    def transactions() -> int:
        return int(redis.info("commandstats").get("cmdstat_multi", {}).get("calls", 0))

    def acknowledged() -> int:
        return int(redis.info("commandstats").get("cmdstat_hdel", {}).get("calls", 0))

    before, acknowledged_before = transactions(), acknowledged()
    for _ in range(20):
        redis.lpush(AGENTS_QUEUE, json.dumps(envelope()))
    wait_until(acknowledged, seconds=20, says=lambda calls: calls >= acknowledged_before + 20)
    assert transactions() - before < 20, "its mailbox has some of its own"
