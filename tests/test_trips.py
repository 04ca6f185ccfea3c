"""Trips: what a worker goes on with by itself, and that nothing is lost or doubled by it.

`stack` is a worker of each pool. What a trip is to be seen by is where its tasks ran (`place`):
nothing but a trip keeps 20 tasks in one of four processes.
"""

import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery.app import trace
from celery.app.task import Context as Request
from celery.exceptions import Ignore, Retry
from stack import Servers, Stack, running_stack, stack_environment, wait_until

from celeryconfig import make_app
from opscore import canvas, engine, workflows
from opscore.config import AGENTS_QUEUE, SERVED_FIRST, Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import IN_HAND_SECONDS, Dispatcher
from opscore.engine import Visit, Woken
from opscore.graph import WIDE, Node, build
from opscore.servers import RedisServer
from opscore.states import Reason
from workers.trips import (
    LONGEST_TRIP,
    PATIENCE_SECONDS,
    TRIP_SECONDS,
    Events,
    Patience,
    TaskFailed,
    Trip,
)

AGENTS = {"OPSCORE_AGENTS": "tests.fleet,tests.trip_fleet", "OPSCORE_KEEPER_SECONDS": "0.2"}
QUICK = AGENTS | {
    "OPSCORE_LEASE_SECONDS": "2",
    "OPSCORE_RENEW_SECONDS": "0.5",
    "OPSCORE_RESCUE_SECONDS": "1",
}
SIDE = WIDE + 5
"""Tasks side by side that go into lanes."""
WORKERS = 4

PREFORK = pytest.mark.parametrize("stack", ["prefork"], indirect=True)
"""For what takes long and is the same in threads."""


@pytest.fixture(scope="module", params=["prefork", "threads"])
def stack(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("stack") / "worker.log"
    with running_stack(servers, log, **AGENTS) as stack:
        stack.start_worker(concurrency=WORKERS, pool=request.param)
        yield stack


def task(name: str, agent_id: str = "where", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, **more}


def each(agent_id: str = "where", **more: Any) -> dict[str, Any]:
    """A task whose items are the input; what an item holds are its parameters."""
    names = ("value", "seconds", "gate", "reached", "later", "busy", "fails", "dies")
    parameters = {name: f"${{has(item.{name}) ? item.{name} : null}}" for name in names}
    parameters["seconds"] = "${has(item.seconds) ? item.seconds : 0}"
    limit = more.pop("limit", {})
    return task(
        "each", agent_id, forEach={"items": "${input}"} | limit, parameters=parameters, **more
    )


def submit(stack: Stack, *tasks: dict[str, Any], input: Any = None, times: int = 1) -> UUID:
    """Submit a run, and publish its canvas so many times."""
    with stack.database.transaction() as tx:
        stored, _ = workflows.create_workflow(tx, parse({"id": "w", "tasks": list(tasks)}))
        plan = engine.submit_run(
            tx, stored, engine.Submission(input={} if input is None else input)
        )
    for _ in range(times):
        stack.dispatcher.publish(plan)
    return plan.run_id


def attempts(stack: Stack, run_id: UUID, status: str | None = None) -> list[Any]:
    return stack.rows(
        "SELECT a.*, t.definition_id, t.index FROM attempts a JOIN tasks t ON t.id = a.task_id"
        " WHERE t.run_id = :id AND (cast(:status AS text) IS NULL OR a.status = :status)"
        " ORDER BY a.started_at, a.number",
        id=run_id,
        status=status,
    )


def work(stack: Stack, run_id: UUID) -> list[Any]:
    """The tasks that an agent did."""
    return [t for t in stack.tasks(run_id) if t.kind == "agent"]


def outputs(stack: Stack, run_id: UUID) -> dict[str, Any]:
    return {t.definition_id: t.output for t in stack.tasks(run_id) if t.index is None}


def place(output: Any) -> tuple[int, int]:
    return output["pid"], output["thread"]


def completed(stack: Stack, run_id: UUID) -> int:
    return [t.status for t in work(stack, run_id)].count("completed")


def finish_each_once(stack: Stack, run_id: UUID, seconds: float = 30) -> None:
    assert stack.finished(run_id, seconds).status == "completed"
    assert all((t.status, t.attempt) == ("completed", 1) for t in work(stack, run_id))
    assert len(attempts(stack, run_id)) == len(work(stack, run_id))


def most_at_once(spans: list[Any]) -> int:
    moments = [(s.started_at, 1) for s in spans] + [(s.finished_at, -1) for s in spans]
    now, most = 0, 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most


def cancel(stack: Stack, run_id: UUID) -> None:
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
    with stack.database.transaction() as tx:
        engine.settle_run(tx, run_id)


def reach(gate: Path) -> dict[str, str]:
    """Parameters of a task that tells when it is under way, and waits for its gate."""
    return {"reached": f"{gate}.reached", "gate": str(gate)}


def wait_at(gate: Path) -> None:
    wait_until(Path(f"{gate}.reached").exists)


# --- Chains


def test_a_chain_runs_in_one_process_and_each_task_is_recorded_as_its_own(stack: Stack) -> None:
    names = [f"t{n}" for n in range(10)]
    run_id = submit(stack, *map(task, names))
    finish_each_once(stack, run_id)
    assert len({place(output) for output in outputs(stack, run_id).values()}) == 1
    rows = attempts(stack, run_id)
    assert [a.definition_id for a in rows] == names
    assert all((a.status, a.number, a.agent_id) == ("completed", 1, "where") for a in rows)
    assert len({a.worker for a in rows}) == 1 and rows[0].worker != "?"
    assert all(a.finished_at <= b.started_at for a, b in pairwise(rows))


def test_the_events_of_a_chain_come_in_the_order_of_its_tasks(stack: Stack) -> None:
    run_id = submit(stack, task("a"), task("b"), task("c"))
    finish_each_once(stack, run_id)
    events = stack.rows(
        "SELECT e.type, t.definition_id AS name, e.data FROM events e"
        " LEFT JOIN tasks t ON t.id = e.task_id WHERE e.run_id = :id ORDER BY e.seq",
        id=run_id,
    )
    pairs = [(f"task.{what}", name) for name in "abc" for what in ("started", "completed")]
    assert [(e.type, e.name) for e in events] == [
        ("run.queued", None),
        ("run.started", None),
        *pairs,
        ("run.completed", None),
    ]
    started = [e.data for e in events if e.type == "task.started"]
    assert all((d["attempt"], d["agentId"]) == (1, "where") and d["worker"] for d in started)


@pytest.mark.parametrize(
    ("agent_id", "first"), [("later-once", "failed"), ("busy-once", "cancelled")]
)
def test_a_chain_stops_at_a_parked_task_and_goes_on_after_it(
    stack: Stack, agent_id: str, first: str
) -> None:
    run_id = submit(stack, task("a"), task("b", agent_id), task("c"), task("d"))
    assert stack.finished(run_id).status == "completed"
    rows = [(a.definition_id, a.number, a.status) for a in attempts(stack, run_id)]
    assert rows == [
        ("a", 1, "completed"),
        ("b", 1, first),
        ("b", 2, "completed"),
        ("c", 1, "completed"),
        ("d", 1, "completed"),
    ]
    done = outputs(stack, run_id)
    assert place(done["b"]) == place(done["c"]) == place(done["d"])


def test_a_chain_stops_at_a_task_that_failed_for_good(stack: Stack) -> None:
    wrong = task("b", "fails-if", parameters={"fails": True})
    run_id = submit(stack, task("a"), wrong, task("c"))
    assert stack.finished(run_id).status == "failed"
    assert [t.status for t in work(stack, run_id)] == ["completed", "failed", "cancelled"]
    run_id = submit(stack, task("a"), wrong | {"onFailure": "continue"}, task("c"))
    assert stack.finished(run_id).status == "completed"
    assert [t.status for t in work(stack, run_id)] == ["completed", "failed", "completed"]


VALUES = {
    "z": 1.0,
    "a": -0.0,
    "large": 1e300,
    "whole": 2**53,
    "none": None,
    "nested": [[], {}, {"b": [None, {"a": 1}], "a": 2.5}],
    "text": 'é𝄞"\\\n',
    "": "empty",
}


def test_an_output_reaches_the_next_task_exactly_as_after_a_round_trip_through_postgresql(
    stack: Stack,
) -> None:
    """A task that names a capability is not claimed with the finish of the one before it."""
    shown = {"value": ["${tasks.a.output}", "is ${tasks.a.output} ${tasks.a.status}"]}
    first = task("a", "value", parameters={"value": "${input}"})
    by_name = task("b", parameters=shown)
    by_capability = {"taskId": "b", "agentCapability": "where", "parameters": shown}
    seen = []
    for second in (by_name, by_capability):
        run_id = submit(stack, first, second, input=VALUES)
        finish_each_once(stack, run_id)
        done = outputs(stack, run_id)
        assert done["a"] == VALUES
        seen.append(json.dumps(done["b"]["value"]))
    assert seen[0] == seen[1]


def test_what_an_agent_does_to_its_parameters_does_not_reach_the_next_task(stack: Stack) -> None:
    shown = task("b", "echo", parameters={"list": "${input.list}"})
    spoils = task("a", "spoils", parameters={"box": "${input}"})
    run_id = submit(stack, spoils, shown, input={"list": [1]})
    finish_each_once(stack, run_id)
    assert outputs(stack, run_id)["b"] == {"list": [1]}


@PREFORK
def test_a_chain_of_200_has_its_turns_and_completes(stack: Stack) -> None:
    run_id = submit(stack, *(task(f"t{n}") for n in range(200)))
    finish_each_once(stack, run_id, seconds=60)
    assert stack.run(run_id).generation == 1
    rows = attempts(stack, run_id)
    assert [a.definition_id for a in rows] == [f"t{n}" for n in range(200)]


@PREFORK
def test_each_task_of_a_chain_keeps_its_own_timeout(stack: Stack) -> None:
    once = {"retry": {"maxAttempts": 1}, "onFailure": "continue"}
    run_id = submit(
        stack,
        task("long", timeoutSeconds=600),
        task("short", timeoutSeconds=0.3, parameters={"seconds": 1}, **once),
        task("tiny", timeoutSeconds=0.5),
        task("longest", timeoutSeconds=600, parameters={"seconds": 0.6}),
    )
    assert stack.finished(run_id).status == "completed"
    short = next(t for t in work(stack, run_id) if t.definition_id == "short")
    assert (short.status, short.error["code"]) == ("failed", "timeout")
    assert [t.status for t in work(stack, run_id)].count("completed") == 3
    assert len(attempts(stack, run_id)) == 4


# --- Lanes


def test_a_slow_task_of_a_lane_does_not_hold_its_mates(stack: Stack, tmp_path: Path) -> None:
    gates = [tmp_path / "first", tmp_path / "third"]
    items: list[Any] = [{"value": n} for n in range(SIDE)]
    items[0] |= reach(gates[0])
    items[2] |= {"gate": str(gates[1])}
    run_id = submit(stack, each(), task("z"), input=items)
    wait_at(gates[0])
    wait_until(lambda: completed(stack, run_id), says=lambda n: n == SIDE - 2)
    for gate in gates:
        gate.touch()
    finish_each_once(stack, run_id)
    assert [output["value"] for output in outputs(stack, run_id)["each"]] == list(range(SIDE))
    assert stack.run(run_id).generation == 1


@pytest.mark.parametrize(("agent_id", "asked"), [("later-once", "later"), ("busy-once", "busy")])
@pytest.mark.parametrize("which", ["last", "all"])
def test_a_lane_goes_on_over_its_parked_tasks_and_its_join_runs_once(
    stack: Stack, agent_id: str, asked: str, which: str
) -> None:
    """Whoever parks last must wake the join for those that left that to him."""
    parked = {"last": [SIDE - 1], "all": list(range(SIDE))}[which]
    items = [{asked: n in parked} for n in range(SIDE)]
    run_id = submit(stack, each(agent_id), task("z"), input=items)
    assert stack.finished(run_id).status == "completed"
    assert len(attempts(stack, run_id)) == SIDE + len(parked) + 1
    assert len([a for a in attempts(stack, run_id) if a.definition_id == "z"]) == 1
    assert stack.run(run_id).generation == 1


@PREFORK
@pytest.mark.parametrize("last", ["where", "later-once", "busy-once", "where-one"])
def test_tasks_side_by_side_wake_what_joins_them_once_and_after_all(
    stack: Stack, last: str
) -> None:
    side = [task(f"s{n}", dependsOn=[]) for n in range(SIDE)]
    side[-1]["agentId"] = last
    names = [one["taskId"] for one in side]
    joins = [task("y", dependsOn=names), task("z", dependsOn=names)]
    run_id = submit(stack, *side, *joins, task("end", dependsOn=["y", "z"]))
    assert stack.finished(run_id).status == "completed"
    rows = attempts(stack, run_id, "completed")
    assert sorted(a.definition_id for a in rows) == sorted([*names, "y", "z", "end"])
    ended = max(a.finished_at for a in rows if a.definition_id in names)
    assert all(a.started_at >= ended for a in rows if a.definition_id not in names)


@pytest.mark.parametrize(("agent_id", "capacity"), [("where-one", 1), ("where-two", 2)])
def test_a_lane_of_an_agent_with_few_slots_parks_and_goes_on(
    stack: Stack, agent_id: str, capacity: int
) -> None:
    items = [{"seconds": 0.005} for _ in range(SIDE)]
    run_id = submit(stack, each(agent_id), task("z"), input=items)
    finish_each_once(stack, run_id)
    spans = [t for t in work(stack, run_id) if t.index is not None]
    assert most_at_once(spans) <= capacity
    slots = stack.rows("SELECT * FROM slots WHERE pool = :id AND holder IS NOT NULL", id=agent_id)
    assert slots == []


def test_a_task_of_a_lane_that_fails_ends_the_run_and_what_has_not_started(
    stack: Stack, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    items = [{"gate": str(gate)} for _ in range(4 * WORKERS + SIDE)]
    items[0] = {"fails": True}
    run_id = submit(stack, each("fails-if"), task("z"), input=items)
    wait_until(lambda: stack.run(run_id).error)
    gate.touch()
    run = stack.finished(run_id)
    assert (run.status, run.error["code"]) == ("failed", "gave_up")
    statuses = [t.status for t in work(stack, run_id)]
    assert statuses.count("failed") == 1 and statuses.count("cancelled") > SIDE / 2
    assert len(attempts(stack, run_id)) == len(statuses) - statuses.count("cancelled")


def test_a_task_of_a_lane_that_fails_under_continue_costs_its_mates_nothing(stack: Stack) -> None:
    wrong = {0, 1, 7, SIDE - 1}
    items = [{"fails": n in wrong, "value": n} for n in range(SIDE)]
    run_id = submit(stack, each("fails-if", onFailure="continue"), task("z"), input=items)
    assert stack.finished(run_id).status == "completed"
    done = [output and output["value"] for output in outputs(stack, run_id)["each"]]
    assert done == [None if n in wrong else n for n in range(SIDE)]
    assert len(attempts(stack, run_id)) == SIDE + 1


@PREFORK
def test_a_run_of_1000_items_completes_by_turns(stack: Stack) -> None:
    run_id = submit(stack, each(), input=[{"value": n} for n in range(1000)])
    finish_each_once(stack, run_id, seconds=60)
    assert [o["value"] for o in outputs(stack, run_id)["each"]] == list(range(1000))
    assert stack.run(run_id).generation == 1


@PREFORK
def test_never_more_items_are_out_than_max_parallel_though_they_go_in_lanes(stack: Stack) -> None:
    limit = WIDE + 3
    items = [{"seconds": 0.06 if n % 7 == 0 else 0} for n in range(4 * limit)]
    run_id = submit(stack, each(limit={"maxParallel": limit}), input=items)
    most = 0

    def look() -> bool:
        nonlocal most
        out = stack.rows(
            "SELECT count(*) AS n FROM tasks WHERE run_id = :id AND index IS NOT NULL AND"
            " (status IN ('pending', 'running') OR reason NOT IN ('max_parallel', 'children'))",
            id=run_id,
        )
        most = max(most, out[0].n)
        return stack.run(run_id).finished_at is not None

    wait_until(look)
    finish_each_once(stack, run_id)
    assert limit / 2 < most <= limit


# --- Copies, and newer canvases


def side_by_side(count: int = SIDE) -> list[dict[str, Any]]:
    side = [task(f"s{n}", dependsOn=[]) for n in range(count)]
    return [*side, task("z", dependsOn=[one["taskId"] for one in side]), task("y", dependsOn=["z"])]


def diamonds() -> list[dict[str, Any]]:
    tasks = [task("t0", dependsOn=[])]
    for n in range(0, 9, 3):
        tasks += [task(f"t{n + 1}", dependsOn=[f"t{n}"]), task(f"t{n + 2}", dependsOn=[f"t{n}"])]
        tasks.append(task(f"t{n + 3}", dependsOn=[f"t{n + 1}", f"t{n + 2}"]))
    return tasks


@pytest.mark.parametrize(
    "tasks",
    [[task(f"t{n}") for n in range(25)], side_by_side(), diamonds(), [each(), task("z")]],
    ids=["chain", "lanes", "diamonds", "items"],
)
def test_messages_that_come_three_times_do_each_task_once(
    stack: Stack, tasks: list[dict[str, Any]]
) -> None:
    run_id = submit(stack, *tasks, input=[{}] * SIDE, times=3)
    finish_each_once(stack, run_id)


def test_an_older_canvas_does_its_tasks_work_and_the_newer_one_carries_on(
    stack: Stack, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run_id = submit(stack, task("a", parameters=reach(gate)), task("b"), task("c"))
    wait_at(gate)
    for generation in (1, 2):
        assert stack.dispatcher.republish(run_id, generation)
    gate.touch()
    finish_each_once(stack, run_id)
    rows = {t.definition_id: t for t in work(stack, run_id)}
    assert stack.run(run_id).generation == 3
    assert [rows[name].visit_generation for name in "bc"] == [3, 3], "the older one stopped at a"


@PREFORK
@pytest.mark.parametrize("tasks", [side_by_side(60), diamonds()], ids=["lanes", "diamonds"])
def test_publishing_again_and_again_in_the_middle_of_trips_does_each_task_once(
    stack: Stack, tasks: list[dict[str, Any]]
) -> None:
    for one in tasks:
        one["parameters"] = {"seconds": 0.01}
    run_id = submit(stack, *tasks)

    def republish() -> bool:
        run = stack.run(run_id)
        if run.finished_at is None and run.generation < 6:
            stack.dispatcher.republish(run_id, run.generation)
        return run.finished_at is not None

    wait_until(republish)
    finish_each_once(stack, run_id)


@pytest.mark.parametrize(
    "tasks", [[task(f"t{n}") for n in range(150)], side_by_side(300)], ids=["chain", "lanes"]
)
def test_nothing_starts_after_a_cancel_in_the_middle_of_a_trip(
    stack: Stack, tasks: list[dict[str, Any]]
) -> None:
    for one in tasks:
        one["parameters"] = {"seconds": 0.02}
    run_id = submit(stack, *tasks)
    wait_until(lambda: completed(stack, run_id), says=lambda n: n >= 15)
    cancel(stack, run_id)
    begun = len(attempts(stack, run_id))
    assert stack.finished(run_id).status == "cancelled"
    after = submit(stack, *(task(f"t{n}", dependsOn=[]) for n in range(2 * SIDE)))
    finish_each_once(stack, after)
    assert len(attempts(stack, run_id)) == begun < len(tasks)
    assert {t.status for t in work(stack, run_id)} == {"completed", "cancelled"}


# --- Freed slots


def linked(agent_id: str) -> list[dict[str, Any]]:
    """A graph in which the parked task `p` has a link besides what follows it in its chain."""
    edges = {"p": "a", "c": "p", "d": "p", "e": "cd", "f": "a", "g": "cf", "h": "peg"}
    tasks = [task("a", dependsOn=[])]
    tasks += [task(name, dependsOn=list(after)) for name, after in edges.items()]
    tasks[1]["agentId"] = agent_id
    return tasks


def followers(agent_id: str) -> dict[str, list[dict[str, Any]]]:
    p = task("p", agent_id, dependsOn=[])
    return {
        "alone": [p],
        "chain": [p, task("q", dependsOn=["p"]), task("r", dependsOn=["q"])],
        "header": [p, task("o", dependsOn=[]), task("j", dependsOn=["p", "o"])],
        "chain in a header": [
            p,
            task("q", dependsOn=["p"]),
            task("o", dependsOn=[]),
            task("j", dependsOn=["q", "o"]),
            task("k", dependsOn=["j"]),
        ],
        "before a chord": [
            p,
            task("q", dependsOn=["p"]),
            task("o", dependsOn=["p"]),
            task("j", dependsOn=["q", "o"]),
        ],
        "link": linked(agent_id),
    }


@pytest.mark.parametrize("kind", list(followers("where-one")))
def test_a_task_taken_over_with_a_freed_slot_runs_here_and_what_follows_it_goes_on(
    stack: Stack, tmp_path: Path, kind: str
) -> None:
    gate = tmp_path / "gate"
    holder = submit(stack, task("holder", "where-one", parameters=reach(gate)))
    wait_at(gate)
    run_id = submit(stack, *followers("where-one")[kind])
    wait_until(
        lambda: {t.definition_id: t.reason for t in work(stack, run_id)},
        says=lambda reasons: reasons["p"] == "agent_busy",
    )
    gate.touch()
    finish_each_once(stack, run_id)
    first = outputs(stack, holder)["holder"]
    assert place(outputs(stack, run_id)["p"]) == place(first)
    assert stack.run(run_id).generation == 1


@PREFORK
def test_a_line_before_one_slot_is_served_in_order_by_whoever_holds_it(
    stack: Stack, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    holder = submit(stack, task("holder", "where-one", parameters=reach(gate)))
    wait_at(gate)
    line = []
    for _ in range(LONGEST_TRIP + 5):
        line.append(submit(stack, task("p", "where-one"), task("q")))
        wait_until(lambda: work(stack, line[-1])[0].reason == "agent_busy")
    gate.touch()
    for run_id in [holder, *line]:
        finish_each_once(stack, run_id)
    rows = [work(stack, run_id)[0] for run_id in line]
    # In order of their starts: a claim that waited for the lock of the slot began before that was
    # freed, by the clock of its statement.
    assert all(a.started_at < b.started_at for a, b in pairwise(rows))


# --- Faults


@contextmanager
def short_lived_stack(
    servers: Servers, tmp_path: Path, environment: dict[str, str]
) -> Iterator[Stack]:
    """A stack whose workers do not end in peace, which takes two seconds each."""
    with running_stack(servers, tmp_path / "log", **environment) as stack:
        yield stack
        for worker in stack.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)


def test_a_child_killed_in_the_middle_of_a_lane_costs_its_task_one_attempt(
    servers: Servers, tmp_path: Path
) -> None:
    with short_lived_stack(servers, tmp_path, QUICK) as stack:
        stack.start_worker(concurrency=2)
        items = [{"dies": n in (3, SIDE - 1), "value": n} for n in range(SIDE)]
        run_id = submit(stack, each("dies-once"), task("z"), input=items)
        assert stack.finished(run_id, seconds=60).status == "completed"
        done = [a for a in attempts(stack, run_id, "completed") if a.definition_id == "each"]
        assert sorted(a.index for a in done) == list(range(SIDE))
        lost = attempts(stack, run_id, "lost")
        assert {a.index for a in lost} == {3, SIDE - 1}
        assert len(attempts(stack, run_id)) == SIDE + len(lost) + 1
        assert [o["value"] for o in outputs(stack, run_id)["each"]] == list(range(SIDE))


def test_a_worker_killed_in_the_middle_of_lanes_and_chains_costs_only_what_ran(
    servers: Servers, tmp_path: Path
) -> None:
    with short_lived_stack(servers, tmp_path, QUICK) as stack:
        worker = stack.start_worker(concurrency=2)
        quick = {"seconds": 0.01}
        chain = submit(stack, *(task(f"t{n}", parameters=quick) for n in range(40)))
        items = submit(stack, each(), task("z"), input=[quick] * 60)
        side = side_by_side(60)
        for one in side:
            one["parameters"] = quick
        runs = [chain, items, submit(stack, *side)]
        wait_until(lambda: sum(completed(stack, run) for run in runs), says=lambda n: n >= 40)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(10)
        left = stack.rows("SELECT id FROM tasks WHERE status = 'running' AND kind = 'agent'")
        stack.start_worker(concurrency=2)
        for run_id in runs:
            assert stack.finished(run_id, seconds=60).status == "completed"
            done = attempts(stack, run_id, "completed")
            assert len(done) == len({a.task_id for a in done}) == len(work(stack, run_id))
        lost = {a.task_id for run_id in runs for a in attempts(stack, run_id, "lost")}
        assert lost == {row.id for row in left}


def test_a_warm_shutdown_in_the_middle_of_trips_loses_no_attempt(
    servers: Servers, tmp_path: Path
) -> None:
    with short_lived_stack(servers, tmp_path, QUICK) as stack:
        worker = stack.start_worker(concurrency=2)
        quick = {"seconds": 0.02}
        runs = [submit(stack, *(task(f"t{n}", parameters=quick) for n in range(40)))]
        runs.append(submit(stack, each(), task("z"), input=[quick] * 60))
        wait_until(lambda: sum(completed(stack, run) for run in runs), says=lambda n: n >= 15)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert stack.rows("SELECT 1 FROM tasks WHERE status = 'running'") == []
        assert sum(completed(stack, run) for run in runs) < 90
        stack.start_worker(concurrency=2)
        for run_id in runs:
            finish_each_once(stack, run_id)


def test_without_redis_trips_go_on_as_far_as_they_can_and_all_completes_when_it_is_back(
    servers: Servers, tmp_path: Path
) -> None:
    """One worker is in a lane it would give back, one in a chain that is longer than a trip."""
    with RedisServer.temporary() as redis, servers.new_database() as url:
        stack = Stack(stack_environment(url, redis.url, **QUICK), tmp_path / "log")
        try:
            worker = stack.start_worker(concurrency=2)
            lane, chain = tmp_path / "lane", tmp_path / "chain"
            items: list[Any] = [{"value": n} for n in range(SIDE)]
            items[1] = {"gate": str(lane)} | {"reached": f"{lane}.reached", "seconds": 0}
            tasks = [task(f"t{n}") for n in range(2 * LONGEST_TRIP)]
            tasks[1]["parameters"] = reach(chain)
            runs = [submit(stack, *tasks)]
            wait_at(chain)
            runs.append(submit(stack, each(), task("z"), input=items))
            wait_at(lane)
            redis.stop()
            chain.touch()
            wait_until(lambda: completed(stack, runs[0]), says=lambda n: n >= LONGEST_TRIP)
            lane.touch()
            wait_until(lambda: work(stack, runs[1])[1].status == "completed")
            redis.start()
            for run_id in runs:
                finish_each_once(stack, run_id, seconds=60)
            assert worker.poll() is None
        finally:
            stack.stop()


def test_lanes_and_tasks_given_back_that_wait_behind_a_slow_task_are_not_taken_for_lost(
    servers: Servers, tmp_path: Path
) -> None:
    """The keeper looks four times a second, for visits that did not come for one."""
    patient = QUICK | {"OPSCORE_LEASE_SECONDS": "30", "OPSCORE_KEEPER_SECONDS": "0.05"}
    with short_lived_stack(servers, tmp_path, patient) as stack:
        stack.start_worker(concurrency=1)
        gate = tmp_path / "gate"
        run_id = submit(stack, each(), input=[reach(gate)] * SIDE)
        wait_at(gate)
        behind = submit(stack, *side_by_side())
        age = "SELECT extract(epoch FROM now() - generation_at) AS age FROM runs WHERE id = :id"
        wait_until(lambda: stack.rows(age, id=behind)[0].age, says=lambda age: age > 2)
        assert [stack.run(one).generation for one in (run_id, behind)] == [1, 1]
        assert len(attempts(stack, run_id)) == 1 and attempts(stack, behind) == []
        gate.touch()
        wait_until(lambda: completed(stack, run_id), says=bool)


# --- One trip by itself


class Message:
    """What Celery hands a task: a request of its own, and how to make a message of it."""

    def __init__(self, signature: Any) -> None:
        options = signature["options"]
        chain = options.get("chain")
        self.request: Any = Request(
            id=options["task_id"],
            args=signature["args"],
            kwargs={},
            headers=options["headers"],
            chain=chain,
            timelimit=[options["time_limit"], None],
            delivery_info={"exchange": "", "routing_key": options["queue"]},
        )


class Desk:
    """A broker of its own, and trips that nobody runs."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.app = make_app(settings)
        self.dispatcher = Dispatcher(self.app, database, settings)

    def visits(self, timeouts: list[float], **options: Any) -> list[Any]:
        made = [
            canvas.visit(self.app, uuid4(), 1, timeout_seconds=seconds, **options)
            for seconds in timeouts
        ]
        return json.loads(json.dumps(made))

    def trip(self, *timeouts: float, lane: bool = False) -> Trip:
        first, *rest = self.visits(list(timeouts), lane=lane)
        first["options"]["chain"] = rest[::-1]
        visit = Visit(UUID(first["args"][0]), 1, uuid4())
        events = Events(self.app, self.dispatcher)
        task: Any = Message(first)
        return Trip(task, visit, self.dispatcher, events, Patience())

    def woken(self, timeout: float) -> Woken:
        (message,) = self.visits([timeout])
        task_id = UUID(message["args"][0])
        return Woken(
            task_id, uuid4(), 1, None, message, Reason.AGENT_BUSY, False, timeout, AGENTS_QUEUE
        )

    def queued(self) -> list[str]:
        with self.dispatcher._redis() as redis:
            entries: list[Any] = []
            for queue in (AGENTS_QUEUE, SERVED_FIRST[0]):
                entries += redis.lrange(queue, 0, -1)
        return [json.loads(entry)["headers"]["id"] for entry in reversed(entries)]


@pytest.fixture
def desk(settings: Settings, database: Database) -> Iterator[Desk]:
    desk = Desk(settings, database)
    yield desk
    desk.app.close()


def test_a_trip_ends_after_its_longest_length(desk: Desk) -> None:
    trip = desk.trip(*[60.0] * 50)
    moves = 1
    while trip.goes_on_after(None):
        moves += 1
    assert moves == LONGEST_TRIP and trip.look_ahead() is None
    assert len(trip.request.chain) == 50 - LONGEST_TRIP, "Celery sends what is left"


@pytest.mark.parametrize(
    ("first", "then", "goes_on"), [(60, 60, True), (600, 1, True), (60, 84, True), (60, 86, False)]
)
def test_a_trip_takes_no_task_that_may_outlast_the_hard_limit_celery_set_for_its_first(
    desk: Desk, first: float, then: float, goes_on: bool
) -> None:
    trip = desk.trip(first, then)
    assert (trip.look_ahead() is not None) == goes_on
    assert trip.goes_on_after(None) == goes_on


def test_a_trip_moves_on_as_the_next_message_and_keeps_nothing_of_the_last(desk: Desk) -> None:
    trip = desk.trip(60, 50)
    request, upcoming = trip.request, trip.request.chain[0]
    request.chord, request.group, request.group_index = {"task": "chord"}, "group", 3
    request.errbacks = [{"task": "errback"}]
    first = request.id
    assert trip.goes_on_after(None) and trip.has_moved
    assert (request.id, request.parent_id) == (upcoming["options"]["task_id"], first)
    assert (request.chord, request.group, request.group_index) == (None, None, None)
    assert (request.callbacks, request.errbacks, request.chain) == (None, None, [])
    assert request.timelimit == [80, None] and request.headers == upcoming["options"]["headers"]
    assert (str(trip.visit.task_id), trip.claimed) == (upcoming["args"][0], None)


def test_the_rest_of_a_lane_goes_back_to_the_front_in_its_order_each_by_itself(desk: Desk) -> None:
    for other in desk.visits([60, 60]):
        desk.app.signature(other).apply_async()
    behind = desk.queued()
    trip = desk.trip(*[60.0] * 5, lane=True)
    rest = [visit["args"][0] for visit in reversed(trip.request.chain)]
    trip.give_back()
    assert desk.queued() == rest + behind
    assert trip.look_ahead() is None and not trip.goes_on_after(None)


def test_a_lane_holds_only_tasks_before_the_same_joins() -> None:
    """The last one wakes for all."""
    ids = {name: uuid4() for n in range(SIDE) for name in (f"a{n}", f"b{n}")}
    nodes = [Node(task_id, frozenset(), 60.0) for task_id in ids.values()]
    for side in "ab":
        before = frozenset(task_id for name, task_id in ids.items() if name[0] == side)
        nodes.append(Node(uuid4(), before, 60.0))
    sides = {task_id: name[0] for name, task_id in ids.items()}
    lanes = build(nodes).lanes
    assert sorted(task_id for lane in lanes for task_id in lane) == sorted(ids.values())
    assert all(len({sides[task_id] for task_id in lane}) == 1 for lane in lanes)


def test_a_trip_takes_no_message_that_is_none_of_ours(desk: Desk) -> None:
    trip, woken = desk.trip(60), desk.woken(60)
    message: Any = woken.message
    for odd in ({"time_limit": None}, {"queue": None, "routing_key": None}, {"time_limit": "x"}):
        assert not trip.take(replace(woken, message=message | {"options": odd}))
    assert not trip.take(replace(woken, message={"task": "opscore.run_task"}))
    assert trip.take(woken)


def test_what_was_claimed_is_visited_though_its_lane_was_given_back_and_a_slot_freed(
    desk: Desk,
) -> None:
    trip = desk.trip(60, 60, 60, lane=True)
    then = trip.look_ahead()
    claimed: Any = object()
    trip.claimed_next = claimed
    trip.give_back()
    assert not trip.take(desk.woken(60))
    assert trip.goes_on_after(None) and (trip.visit, trip.claimed) == (then, claimed)


def test_a_lane_leaves_its_wakes_to_a_mate_and_never_to_who_was_first_in_line(desk: Desk) -> None:
    trip = desk.trip(60, 60, lane=True)
    assert not trip.is_followed_by_mate
    mate: Any = object()
    trip.look_ahead()
    trip.claimed_next = mate
    assert trip.is_followed_by_mate
    last, woken = desk.trip(60, lane=True), desk.woken(60)
    stranger: Any = SimpleNamespace(task_id=woken.task_id)
    assert last.offer() is not None and woken.message is not None
    last.go_on_with(stranger, woken.message, uuid4())
    assert last.has_taken and not last.is_followed_by_mate
    assert last.goes_on_after(None) and last.visit.task_id == woken.task_id


def test_what_was_claimed_is_visited_though_the_visit_before_broke_after_its_end(
    desk: Desk,
) -> None:
    trip = desk.trip(60, 60)
    then = trip.look_ahead()
    claimed: Any = object()
    trip.claimed_next = claimed
    assert trip.goes_on_after(Ignore()) and (trip.visit, trip.claimed) == (then, claimed)


def test_rescue_waits_longer_than_a_trip_can_hold_a_task() -> None:
    assert IN_HAND_SECONDS >= TRIP_SECONDS + 2 * PATIENCE_SECONDS


def test_a_chain_is_never_given_back_out_of_its_order(desk: Desk) -> None:
    trip = desk.trip(60, 60, 60)
    trip.give_back()
    assert desk.queued() == [] and trip.look_ahead() is not None


def test_nothing_is_taken_over_by_who_has_something_to_follow(desk: Desk) -> None:
    woken = desk.woken(60)
    assert not desk.trip(60, 60).take(woken)
    for name in ("chord", "callbacks"):
        trip = desk.trip(60)
        setattr(trip.request, name, [{"task": "other"}])
        assert not trip.take(woken)
    trip = desk.trip(60)
    assert trip.take(woken) and not trip.take(woken), "one at a time"
    assert trip.goes_on_after(None)
    assert trip.visit.task_id == woken.task_id and trip.visit.has_slot


# --- What Celery and Flower hear

OUTCOMES = [Ignore(), Retry("parked"), TaskFailed("it broke")]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: type(outcome).__name__)
def test_an_outcome_reaches_celerys_parent_without_a_traceback(outcome: Exception) -> None:
    try:
        raise outcome
    except type(outcome):
        told = pickle.loads(pickle.dumps(trace.ExceptionInfo(internal=True)))
    assert (type(told.exception), told.type) == (type(outcome), type(outcome))
    assert str(told.exception) == str(outcome)
    assert (told.traceback, told.tb, told.internal) == ("", None, True)


def test_an_accident_keeps_its_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        told = pickle.loads(pickle.dumps(trace.ExceptionInfo()))
    assert "ValueError: no" in told.traceback and told.tb is not None


def test_flower_hears_of_every_task_of_a_trip_in_order(stack: Stack) -> None:
    heard: list[tuple[str, str]] = []
    state = stack.app.events.State()  # what Flower makes of it
    three = {"id": "three", "tasks": [{"taskId": name, "agentId": "echo"} for name in "abc"]}

    def hear(event: dict[str, Any]) -> None:
        if event["type"].startswith("task-"):
            heard.append((event["uuid"], event["type"]))
            state.event(event)

    def listen(connection: Any, seconds: float) -> None:
        with suppress(TimeoutError):
            connection.drain_events(timeout=seconds)

    with stack.app.connection_for_read() as connection:
        receiver = stack.app.events.Receiver(connection, handlers={"*": hear})
        with receiver.consumer_context() as (consuming, _, _consumers):
            listen(consuming, 0.1)  # subscribes
            run_id = stack.submit(three)
            ids = [str(task.id) for task in stack.tasks(run_id)]
            steps = ("task-received", "task-started", "task-succeeded")
            deadline = time.monotonic() + 20
            while not {(id, step) for id in ids for step in steps} <= set(heard):
                assert time.monotonic() < deadline, heard
                listen(consuming, 1)
    assert sum(id in ids for id, _ in heard) == 9
    # The first is told of by two processes, by Celery's parent and by its child.
    for id in ids[1:]:
        assert tuple(what for one, what in heard if one == id) == steps
    for id in ids:
        assert state.tasks[id].state == "SUCCESS"
