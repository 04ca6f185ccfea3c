"""The status of everything over HTTP: what its description says, also while servers are away."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from http_client import Client, open_client, problem
from redis import Redis
from rows import add_agent, add_run, add_task, add_waiting
from sqlalchemy import text
from stack import Servers, running_stack, stack_environment, wait_until

from opscore import migrations, presence
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE, QUEUES, TAKEN, Settings, lists_of
from opscore.presence import Presence
from opscore.servers import PostgresServer, RedisServer


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def work(client: Client) -> None:
    """Have a worker live, and keep house."""
    with client.database.transaction() as tx:
        presence.say(tx, Presence(uuid4(), "w@host", "host", 7, "prefork", 2, QUEUES, None))
        tx.execute(text("INSERT INTO leases VALUES ('keeper', 'w', now() + interval '1 hour')"))


def status(client: Client) -> dict[str, Any]:
    answer = client.get("/status")
    assert answer.status_code == 200, answer.json
    return dict(answer.json)


def codes(found: dict[str, Any]) -> list[str]:
    return [problem["code"] for problem in found["problems"]]


def check_members(value: Any, schema: dict[str, Any], known: dict[str, Any]) -> None:
    """Hold the members of an answer against its schema, all the way down."""
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for item in value:
            check_members(item, schema["items"], known)
    elif isinstance(value, dict) and "properties" in schema:
        assert set(value) == set(schema["properties"]) == set(schema["required"])
        for name, inner in value.items():
            check_members(inner, schema["properties"][name], known)


def test_everything_it_tells_is_described_and_told(client: Client) -> None:
    work(client)
    with client.database.transaction() as tx:
        add_agent(tx, "writer", "write", capacity=1, paused=True)
        run_id = add_run(tx, "running")
        add_waiting(tx, run_id, 2, agent_id="writer")
        add_task(tx, run_id, "ok", "waiting", reason="approval", items=0)
    found = status(client)
    known = client.get("/openapi.json").json["components"]["schemas"]
    check_members(found, {"$ref": "#/components/schemas/Status"}, known)
    for part in ("problems", "workers", "queues", "waiting", "runs", "approvals", "stuck"):
        assert found[part], part
    assert codes(found) == ["agent_paused"]
    line = found["fleet"]["lines"][0]
    assert (line["agentId"], line["unservedBecause"]) == ("writer", "agent writer is paused")
    (stuck,) = found["stuck"]
    assert (stuck["code"], stuck["runId"]) == ("nobody_serves", str(run_id))
    (asked,) = found["approvals"]
    assert (asked["runId"], asked["taskDefinitionId"]) == (str(run_id), "ok")


def test_it_wants_the_key(client: Client) -> None:
    problem(client.without_key().get("/status"), 401, "unauthorized")


def entry(queue: str) -> str:
    """What kombu writes of a message that a worker took."""
    return json.dumps([{"body": "", "headers": {}}, queue, queue])


def test_queues_are_as_long_as_their_lists_and_what_was_taken_is_told_by_queue(
    client: Client, redis_url: str
) -> None:
    work(client)
    with Redis.from_url(redis_url) as redis:
        plain, first = lists_of(AGENTS_QUEUE)
        redis.lpush(plain, "a", "b", "c")
        redis.lpush(first, "d")
        redis.lpush(CONTROL_QUEUE, "e")
        taken = {"1": entry(IO_QUEUE), "2": entry(IO_QUEUE), "3": "no message", "4": "[]"}
        redis.hset(TAKEN, mapping=taken)
    depths = {queue["name"]: queue for queue in status(client)["queues"]}
    assert {name: (queue["ready"], queue["unacked"]) for name, queue in depths.items()} == {
        AGENTS_QUEUE: (4, 0),
        CONTROL_QUEUE: (1, 0),
        IO_QUEUE: (0, 2),
    }
    with Redis.from_url(redis_url) as redis:
        redis.hset(TAKEN, mapping={str(n): entry(IO_QUEUE) for n in range(600)})
    assert {queue["unacked"] for queue in status(client)["queues"]} == {None}


def test_a_redis_that_is_away_or_frozen_is_told_within_three_seconds(
    database_url: str,
) -> None:
    with RedisServer.temporary() as redis:
        settings = Settings.from_env(stack_environment(database_url, redis.url))
        with open_client(settings) as client:
            work(client)
            assert status(client)["brokerError"] is None
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                for _ in range(2):
                    check_broker_away(client)
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            wait_until(lambda: status(client)["brokerError"], says=lambda said: said is None)
            redis.stop()
            check_broker_away(client)


def test_a_redis_without_room_for_messages_is_told_until_it_has_some(database_url: str) -> None:
    with RedisServer.temporary() as server, Redis.from_url(server.url) as redis:
        settings = Settings.from_env(stack_environment(database_url, server.url))
        with open_client(settings) as client:
            work(client)
            assert codes(status(client)) == []
            redis.config_set("maxmemory", "1")
            assert codes(status(client)) == ["broker_full"]
            redis.config_set("maxmemory", "1gb")
            assert codes(status(client)) == []


def check_broker_away(client: Client) -> None:
    began = time.monotonic()
    found = status(client)
    assert time.monotonic() - began < 3
    assert found["brokerError"] == "Redis does not answer." and codes(found) == ["broker_away"]
    assert {queue["ready"] for queue in found["queues"]} == {None}
    assert len(found["workers"]) == 1


def test_without_postgresql_it_is_503_as_everywhere(redis_url: str) -> None:
    with PostgresServer.temporary() as postgres:
        migrations.upgrade(postgres.url)
        settings = Settings.from_env(stack_environment(postgres.url, redis_url))
        with open_client(settings) as client:
            assert client.get("/status").status_code == 200
            postgres.stop()
            answer = client.get("/status")
            problem(answer, 503, "unavailable")
            assert answer.headers["Retry-After"]


def test_a_statement_that_waits_for_a_lock_is_503_in_seconds(client: Client) -> None:
    with client.database.transaction() as holder:
        holder.execute(text("LOCK TABLE schedules"))
        began = time.monotonic()
        problem(client.get("/status"), 503, "unavailable")
        assert time.monotonic() - began < 9


def test_it_tells_of_a_worker_that_works_and_of_one_that_is_frozen_without_asking_it(
    servers: Servers, tmp_path: Path
) -> None:
    environment = {"OPSCORE_AGENTS": "tests.fleet", "OPSCORE_KEEPER_SECONDS": "0.1"}
    with (
        running_stack(servers, tmp_path / "log", **environment) as stack,
        open_client(stack.settings) as client,
    ):
        assert codes(status(client)) == ["no_workers"]
        worker = stack.start_worker(concurrency=3)
        found = wait_until(lambda: status(client), says=lambda found: not found["problems"])
        (said,) = found["workers"]
        assert (said["pid"], said["concurrency"], said["pool"]) == (worker.pid, 3, "prefork")
        assert found["fleet"]["agents"]["available"] > 0
        os.killpg(worker.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert len(status(client)["workers"]) == 1, "it said so a moment ago"
            assert time.monotonic() - began < 3
        finally:
            os.killpg(worker.pid, signal.SIGCONT)
        worker.send_signal(signal.SIGTERM)
        worker.wait(20)
        assert codes(status(client)) == ["no_workers"]
