"""Runs on agents behind HTTP: real workers, real HTTP, and the example's fleet of every temper."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from stack import API_KEY, Servers, Stack, running_stack, wait_until
from werkzeug.serving import make_server

from examples.fleet import Fleet, Slow
from opscore import engine
from opscore.config import QUEUES, SERVED_FIRST
from web.app import create_app

SECRET = "a-secret-that-signs"


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("fleet") / "log"
    hosts = {"OPSCORE_AGENT_HOSTS": "127.0.0.1", "OPSCORE_WEBHOOK_SECRET": SECRET}
    quick = {"OPSCORE_LEASE_SECONDS": "3", "OPSCORE_RENEW_SECONDS": "1"}
    agents = {"OPSCORE_AGENTS": "fleet"}
    path = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    with running_stack(servers, log, **hosts, **quick, **agents, **path) as stack:
        stack.start_worker(pool="threads", concurrency=8)
        yield stack


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, create_app(stack.settings), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fleet(api: str) -> Iterator[Fleet]:
    with Fleet(api, API_KEY, SECRET) as fleet:
        yield fleet
        for agent in fleet.agents.values():
            fleet.notify("DEREGISTER", agent)


def each(count: int, **task: Any) -> dict[str, Any]:
    """A workflow of so many tasks side by side."""
    tasks = [{"taskId": f"t{n}", "dependsOn": [], **task} for n in range(count)]
    return {"id": "fleet", "tasks": tasks}


def join(fleet: Fleet, agent_id: str, temper: str, **options: Any) -> Any:
    fleet.add(agent_id, temper, **options)
    agent = fleet.agents[agent_id]
    fleet.register(agent)
    return agent


def assert_once(stack: Stack, fleet: Fleet, run_id: Any) -> None:
    """Every task completed, its effect happened once, and nobody holds a slot."""
    for row in stack.tasks(run_id):
        if row.kind == "agent":
            assert row.status == "completed", (row.definition_id, row.error)
            assert fleet.effects[str(row.id)] == 1
    assert stack.rows("SELECT * FROM slots WHERE holder IS NOT NULL") == []


@pytest.mark.parametrize(
    ("temper", "options"),
    [
        ("quick", {}),
        ("slow", {"seconds": 0.2}),
        ("busy", {"refusals": 1, "retry_after": 1}),
        ("flaky", {}),
    ],
)
def test_agents_of_every_temper_do_each_task_once(
    stack: Stack, fleet: Fleet, temper: str, options: dict[str, Any]
) -> None:
    join(fleet, temper, temper, **options)
    retry = {"maxAttempts": 5, "backoffSeconds": 0.1, "maxBackoffSeconds": 0.2}
    run_id = stack.submit(each(4, agentId=temper, retry=retry))
    assert stack.finished(run_id, 40).status == "completed"
    assert_once(stack, fleet, run_id)
    if temper == "busy":
        assert {row.tries for row in stack.tasks(run_id)} == {0}, "busy is no failure"


def test_what_comes_after_an_accepted_task_starts_when_its_result_has_come(
    stack: Stack, fleet: Fleet
) -> None:
    join(fleet, "slow", "slow", seconds=0.2, capacity=3)
    document = {
        "id": "fleet",
        "tasks": [
            {
                "taskId": "parts",
                "agentId": "slow",
                "forEach": {"items": "${input.list}"},
                "parameters": {"n": "${item}"},
                "dependsOn": [],
            },
            {"taskId": "then", "agentId": "slow", "dependsOn": ["parts"]},
        ],
        "output": "${size(tasks.parts.output)}",
    }
    run_id = stack.submit(document, {"list": [1, 2, 3, 4]})
    run = stack.finished(run_id)
    assert (run.status, run.output, run.generation) == ("completed", 4, 1)
    assert_once(stack, fleet, run_id)


def test_a_liar_harms_nobody_but_itself(stack: Stack, fleet: Fleet) -> None:
    join(fleet, "honest", "slow", seconds=0.5)
    join(fleet, "liar", "lying", seconds=0.2)
    honest = stack.submit(each(3, agentId="honest"))
    lying = stack.submit(each(2, agentId="liar"))
    for run_id in (honest, lying):
        assert stack.finished(run_id, 40).status == "completed"
        assert_once(stack, fleet, run_id)
    assert fleet.lies
    wrong = [(lie, status) for _, lie, status in fleet.lies if not 400 <= status < 500]
    assert all(status == 200 for _, status in wrong), "only the very same result again is no news"
    assert "lie" not in str([row.output for row in stack.tasks(honest)])


def test_a_dead_or_deaf_agent_is_given_up_in_time(stack: Stack, fleet: Fleet) -> None:
    join(fleet, "dead", "dead")
    join(fleet, "deaf", "deaf")
    retry = {"maxAttempts": 2, "backoffSeconds": 0.1, "maxBackoffSeconds": 0.1}
    runs = {
        agent: stack.submit(each(1, agentId=agent, timeoutSeconds=1, retry=retry))
        for agent in ("dead", "deaf")
    }
    codes = {}
    for agent, run_id in runs.items():
        assert stack.finished(run_id, 40).status == "failed"
        codes[agent] = stack.tasks(run_id)[0].error["code"]
    assert codes == {"dead": "agent_unreachable", "deaf": "timeout"}
    assert stack.rows("SELECT * FROM slots WHERE holder IS NOT NULL") == []


def test_an_agent_that_falls_ill_is_replaced_and_one_that_recovers_is_asked_again(
    stack: Stack, fleet: Fleet
) -> None:
    ill = join(fleet, "ill", "quick", state="error")
    join(fleet, "well", "quick")
    replaced = stack.submit(each(1, agentId="ill", fallback=["well"]))
    waits = stack.submit(each(1, agentId="ill"))
    assert stack.finished(replaced).status == "completed"
    assert stack.tasks(replaced)[0].agent_id == "well"
    wait_until(
        lambda: stack.tasks(waits)[0].reason, says=lambda reason: reason == "agent_unavailable"
    )
    fleet.call("POST", f"/agent/{ill.id}/state", {"state": "idle"})
    assert stack.finished(waits).status == "completed"
    assert stack.tasks(waits)[0].agent_id == "ill"


def test_a_worker_that_dies_costs_an_accepted_task_nothing(
    stack: Stack, fleet: Fleet, tmp_path: Path
) -> None:
    join(fleet, "slow", "slow", seconds=1.5)
    run_id = stack.submit(each(1, agentId="slow"))
    wait_until(lambda: stack.tasks(run_id)[0].reason, says=lambda reason: reason == "remote")
    for worker in stack.workers:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    wait_until(lambda: stack.run(run_id), says=lambda run: run.finished_at is not None)
    stack.start_worker(pool="threads", concurrency=8)
    assert stack.run(run_id).status == "completed"
    assert_once(stack, fleet, run_id)
    (row,) = stack.tasks(run_id)
    assert (row.attempt, row.lost) == (1, 0)


def test_an_agent_is_told_that_nobody_wants_what_it_accepted(stack: Stack, fleet: Fleet) -> None:
    agent = join(fleet, "recalled", "slow", seconds=60)
    run_id = stack.submit(each(1, agentId="recalled"))
    (key,) = wait_until(lambda: list(agent.jobs))
    wait_until(lambda: [t.reason for t in stack.tasks(run_id)], says=lambda all: "remote" in all)
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
    stack.dispatcher.follow_end(run_id)
    assert stack.run(run_id).status == "cancelled"
    wait_until(lambda: agent.jobs[key].is_wanted, says=lambda wanted: not wanted)
    attempt = "SELECT recall_at, status FROM attempts WHERE task_id = :id"
    (told,) = wait_until(
        lambda: stack.rows(attempt, id=key), says=lambda rows: rows[0].recall_at is None
    )
    assert told.status == "cancelled" and fleet.refused == [], "it was signed"
    wait_until(lambda: agent.jobs[key].is_working, says=lambda working: not working)
    assert fleet.effects[key] == 0 and len(agent.orders) == 1


def test_an_agent_that_accepts_what_nobody_wants_is_told_so(stack: Stack, fleet: Fleet) -> None:
    class Thoughtful(Slow):
        def answer(self, job: Any) -> Any:
            gate.wait(20)
            return super().answer(job)

    gate = threading.Event()
    agent = fleet.add("thoughtful", Thoughtful, seconds=60)
    fleet.register(agent)
    run_id = stack.submit(each(1, agentId="thoughtful"))
    (key,) = wait_until(lambda: list(agent.jobs))
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
    gate.set()
    assert stack.finished(run_id).status == "cancelled"
    wait_until(lambda: agent.jobs[key].is_wanted, says=lambda wanted: not wanted)


def test_who_waits_for_an_agent_costs_the_broker_and_the_workers_nothing(
    stack: Stack, fleet: Fleet
) -> None:
    agent = join(fleet, "patient", "slow", seconds=60)
    run_id = stack.submit(each(100, agentId="patient", timeoutSeconds=100))
    wait_until(
        lambda: [row.reason for row in stack.tasks(run_id) if row.kind == "agent"],
        says=lambda reasons: sorted(map(str, reasons)) == ["agent_busy"] * 99 + ["remote"],
        seconds=40,
    )
    with Redis.from_url(stack.settings.redis_url) as redis:
        assert [redis.llen(queue) for queue in (*QUEUES, *SERVED_FIRST)] == [0] * 5
        wait_until(lambda: redis.hlen("unacked"), says=lambda n: n == 0)
        tasks = commands(redis)
        pause = threading.Event()
        pause.wait(3)
        # One worker: a look for messages a second, its events, and the keeper's looks.
        assert commands(redis) - tasks < 3 * 15
    positions = {row.waiting_since for row in stack.tasks(run_id) if row.reason == "agent_busy"}
    assert None not in positions and agent.orders
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
        engine.settle_run(tx, run_id)
    assert stack.run(run_id).status == "cancelled"
    assert stack.rows("SELECT * FROM slots WHERE holder IS NOT NULL") == []


def commands(redis: "Redis[bytes]") -> int:
    return int(redis.info("stats")["total_commands_processed"])
