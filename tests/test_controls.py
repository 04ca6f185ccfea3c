"""What operators and clocks do with a run, and what its tasks wait for, at every moment of it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from stack import Servers, wait_until
from test_engine import Desk, hand_back, line_of, places, release, serve, task
from test_races import WAITING_FOR_A_LOCK, at_once

from opscore import engine, workflows
from opscore.db import Database
from opscore.definition import parse
from opscore.engine import (
    CannotNest,
    Claimed,
    Elsewhere,
    Failure,
    Fenced,
    Finished,
    MustWait,
    Parked,
    Plan,
    Taker,
    Undecided,
    Visit,
    Void,
    Wait,
    Woken,
)
from opscore.errors import (
    AgentNotFound,
    ApprovalRefused,
    InvalidInput,
    InvalidRequest,
    NothingToRetry,
    OpsCoreError,
    RunEnding,
    RunFinished,
    RunNotFailed,
    RunNotFound,
    RunNotPaused,
    TaskNotFound,
    WorkflowArchived,
)
from opscore.states import Reason
from opscore.workflows import find_workflow

ROUNDS = 12
ONCE = {"maxAttempts": 1}


@pytest.fixture(scope="module")
def database(servers: Servers) -> Iterator[Database]:
    with servers.new_database() as url:
        database = Database(url, pool_size=20)
        yield database
        database.close()


@pytest.fixture
def desk(database: Database) -> Desk:
    """A desk of its own on a database without rows."""
    with database.transaction() as tx:
        for table in ("runs", "slots", "events", "agents", "workflows", "archived_workflows"):
            tx.execute(text(f"DELETE FROM {table}"))
    return Desk(database)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def pause(desk: Desk) -> None:
    with desk.tx() as tx:
        engine.pause_run(tx, desk.plan.run_id, "key:test")


def resume(desk: Desk) -> list[Plan]:
    with desk.tx() as tx:
        return engine.resume_run(tx, desk.plan.run_id, "key:test")


def cancel(desk: Desk) -> None:
    with desk.tx() as tx:
        engine.cancel_run(tx, desk.plan.run_id, "key:test")


def retry(desk: Desk, **overrides: Any) -> list[Plan]:
    with desk.tx() as tx:
        return engine.retry_run(tx, desk.plan.run_id, overrides, "key:test")


def rerun(desk: Desk) -> Plan:
    with desk.tx() as tx:
        return engine.rerun(tx, desk.plan.run_id, request_id="again", by="key:test")


def settle(desk: Desk) -> Any:
    with desk.tx() as tx:
        return engine.settle_run(tx, desk.plan.run_id)


def hold_up(desk: Desk) -> None:
    with desk.database.autocommit() as tx:
        engine.hold_up_strays(tx, 10)


def break_down(desk: Desk, name: str, index: int | None = None) -> None:
    """Have a task fail for good, and its run with it."""
    assert isinstance(desk.fail(desk.claim(name, index), retryable=False), Finished)
    settle(desk)


def lose(desk: Desk, name: str, max_lost: int = 3) -> None:
    """Have the worker of a running task go silent for longer than its lease."""
    past = "lease_expires_at = now() - interval '1 s'"
    desk.alter(f"UPDATE tasks SET {past} WHERE id = :id", id=desk.id(name))
    with desk.tx() as tx:
        assert engine.lose_attempt(tx, desk.id(name), max_lost) is not None


def wake_parent(desk: Desk, task_id: UUID) -> list[Woken]:
    with desk.database.autocommit() as tx:
        return engine.wake_parent(tx, task_id)


def wake_due(desk: Desk) -> list[UUID]:
    """Let every moment come that a task waits for, and return whom the keeper then wakes."""
    desk.alter("UPDATE tasks SET wake_at = now() WHERE wake_at IS NOT NULL")
    with desk.database.autocommit() as tx:
        return [woken.task_id for woken in engine.wake_due(tx, 10).woken]


def state(desk: Desk, *names: str) -> list[str]:
    """Return the status of each, with the reason of who waits."""
    rows = [desk.task(name) for name in names]
    return [f"{row.status} {row.reason}" if row.status == "waiting" else row.status for row in rows]


def items(desk: Desk, name: str = "f") -> str:
    """Return the first letter of each item's status; of who waits, of the reason."""
    rows = desk.rows("SELECT * FROM tasks WHERE parent_id = :id ORDER BY index", id=desk.id(name))
    return "".join((row.reason if row.status == "waiting" else row.status)[0] for row in rows)


def spread(desk: Desk, values: list[Any], tolerates: int | None = None) -> None:
    with desk.database.autocommit() as tx:
        assert engine.expand_task(tx, desk.claim("f"), values, {"m": "f"}, tolerates)


def each(most: int | None = None, **more: Any) -> dict[str, Any]:
    limit = {} if most is None else {"maxParallel": most}
    return task("f", forEach={"items": "${input.n}"} | limit, **more)


def approval(name: str, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "type": "approval", **more}


def child(name: str, workflow_id: str = "below", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "type": "workflow", "workflowId": workflow_id, **more}


def create(desk: Desk, workflow_id: str, *tasks: dict[str, Any], **document: Any) -> None:
    with desk.tx() as tx:
        workflows.create_workflow(tx, parse({"id": workflow_id, "tasks": list(tasks), **document}))


def ask(desk: Desk, name: str, seconds: float | None = None) -> Claimed:
    """Have an approval asked for, as its first visit does."""
    claimed = desk.claim(name)
    with desk.database.autocommit() as tx:
        assert engine.begin_wait(tx, claimed, Wait(Reason.APPROVAL, seconds), {"of": name})
    return claimed


def decide(desk: Desk, name: str, approved: bool = True) -> list[Woken]:
    with desk.tx() as tx:
        return engine.decide_approval(
            tx, desk.id(name), approved=approved, comment="so be it", by="key:test"
        )


def begin(
    desk: Desk, name: str, workflow_id: str = "below", index: int | None = None, input: Any = None
) -> Plan:
    """Start the run of a sub-workflow, as the first visit of its task does; return its plan."""
    plan = begin_claimed(desk, desk.claim(name, index), workflow_id, input)
    assert plan is not None
    return plan


def begin_claimed(
    desk: Desk, claimed: Claimed, workflow_id: str = "below", input: Any = None
) -> Plan | None:
    """Return its plan: one of nothing if it goes on with a run that needs none."""
    with desk.tx() as tx:
        stored = find_workflow(tx, workflow_id)
        plans = engine.begin_child(tx, claimed, stored, input or {}, {"of": "child"}, None)
    if plans == []:
        (row,) = desk.rows("SELECT child_run_id FROM tasks WHERE id = :id", id=claimed.task_id)
        return Plan(row.child_run_id, 0, None, ())
    return plans and plans[0]


@contextmanager
def at(desk: Desk, plan: Plan) -> Iterator[None]:
    """Look at another run meanwhile."""
    before, desk.plan = desk.plan, plan
    try:
        yield
    finally:
        desk.plan = before


# --- Refusals

CONTROLS = {"cancel": cancel, "pause": pause, "resume": resume, "retry": retry}


def finish(desk: Desk, status: str) -> None:
    """Submit a run that comes to this end."""
    desk.submit(task("a", retry=ONCE), task("b"))
    if status == "completed":
        desk.do("a")
        desk.do("b")
    elif status == "failed":
        break_down(desk, "a")
    else:
        cancel(desk)
        settle(desk)
    assert desk.run().status == status


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_control_of_a_run_that_is_over_is_refused_with_its_status(
    desk: Desk, status: str
) -> None:
    finish(desk, status)
    before = desk.run(), desk.events(), state(desk, "a", "b")
    for name, control in CONTROLS.items():
        if (name, status) == ("retry", "failed"):
            continue
        with pytest.raises((RunFinished, RunNotFailed)) as refused:
            control(desk)
        assert refused.value.data["status"] == status, name
    assert (desk.run(), desk.events(), state(desk, "a", "b")) == before


@pytest.mark.parametrize("control", [*CONTROLS.values(), rerun])
def test_a_control_of_no_run_is_refused(desk: Desk, control: Callable[[Desk], Any]) -> None:
    desk.plan = Plan(uuid4(), 1, None, ())
    with pytest.raises(RunNotFound):
        control(desk)


@pytest.mark.parametrize("why", ["cancelled", "failing"])
def test_a_run_that_is_ending_is_neither_paused_nor_resumed_nor_tried_again(
    desk: Desk, why: str
) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    desk.claim("b")
    if why == "cancelled":
        cancel(desk)
    else:
        break_down(desk, "a")
    before = desk.events()
    for control, refusal in ((pause, RunEnding), (resume, RunNotPaused), (retry, RunNotFailed)):
        with pytest.raises(refusal):
            control(desk)
    assert desk.events() == before and desk.run().status == "running"


@pytest.mark.parametrize("why", ["cancelled", "failing"])
def test_a_run_that_ends_while_it_is_paused_is_refused_as_ending(desk: Desk, why: str) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    running = desk.claim("a")
    desk.claim("b")
    pause(desk)
    if why == "cancelled":
        cancel(desk)
    else:
        desk.fail(running, retryable=False)
    assert desk.run().status == "paused"
    for control in (pause, resume):
        with pytest.raises(RunEnding):
            control(desk)


def test_only_who_is_paused_is_resumed_and_only_who_failed_is_tried_again(desk: Desk) -> None:
    desk.submit(task("a"))
    for _ in range(2):
        with pytest.raises(RunNotPaused):
            resume(desk)
        with pytest.raises(RunNotFailed) as refused:
            retry(desk)
        assert refused.value.data == {"status": desk.run().status}
        desk.claim("a")
    pause(desk)
    with pytest.raises(RunNotFailed):
        retry(desk)


# --- Pausing


def test_nothing_of_a_paused_run_starts_and_pausing_twice_is_once(desk: Desk) -> None:
    desk.submit(
        task("a", dependsOn=[]), task("b", "single", dependsOn=[]), task("c", dependsOn=["a"])
    )
    for _ in range(2):
        pause(desk)
        assert desk.run().status == "paused"
        assert state(desk, "a", "b", "c") == ["waiting paused"] * 3
        assert [desk.claim(name) for name in "abc"] == [Void()] * 3
    assert desk.events() == ["run.queued", "run.paused"]
    (event,) = desk.rows("SELECT data FROM events WHERE run_id = :run AND type = 'run.paused'")
    assert event.data == {"by": "key:test"}


def test_a_resumed_run_is_published_anew_and_all_of_it_may_start(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    pause(desk)
    (plan,) = resume(desk)
    assert plan.generation == 2 and [n.id for n in plan.nodes] == [desk.id("a"), desk.id("b")]
    assert desk.run().status == "queued" and state(desk, "a", "b") == ["pending"] * 2
    desk.do("a")
    pause(desk)
    (plan,) = resume(desk)
    assert plan.generation == 3 and [n.id for n in plan.nodes] == [desk.id("b")]
    assert desk.run().status == "running"
    desk.do("b")
    assert desk.run().status == "completed"
    assert [e for e in desk.events() if "paused" in e or "resumed" in e] == [
        *("run.paused", "run.resumed"),
        *("run.paused", "run.resumed"),
    ]


def test_a_pause_does_not_shorten_the_wait_of_who_is_to_be_tried_again(desk: Desk) -> None:
    desk.submit(task("a"))
    desk.fail(desk.claim("a"), delay=3600)
    moment = desk.task("a").wake_at
    pause(desk)
    assert state(desk, "a") == ["waiting paused"] and wake_due(desk) == []
    resume(desk)
    assert state(desk, "a") == ["waiting retry"] and desk.task("a").wake_at == moment
    assert desk.claim("a") == Elsewhere(), "an hour too early"
    assert wake_due(desk) == [desk.id("a")] and desk.claim("a").attempt == 2


def test_who_is_paused_in_a_line_lets_those_behind_him_pass(desk: Desk) -> None:
    (first,) = line_of(desk, "ab")
    before = desk.plan
    desk.submit(task("c", "team"))
    desk.park("c", desk.claim("c"))
    with at(desk, before):
        pause(desk)
        assert state(desk, "b") == ["waiting paused"]
    assert [woken.task_id for woken in desk.complete(first).woken] == [desk.id("c")]
    assert isinstance(desk.claim("c", has_slot=True), Claimed)


def test_a_slot_kept_for_who_is_paused_meanwhile_goes_to_the_next_when_that_time_is_over(
    desk: Desk,
) -> None:
    (first,) = line_of(desk, "ab")
    before = desk.plan
    desk.submit(task("c", "team"))
    desk.park("c", desk.claim("c"))
    assert [woken.message for woken in desk.complete(first).woken] == [{"of": "b"}]
    with at(desk, before):
        pause(desk)
        assert desk.claim("b", has_slot=True) == Void()
    desk.alter("UPDATE slots SET reserved_until = now() WHERE reserved_for IS NOT NULL")
    assert serve(desk) == [{"of": "c"}]


def test_what_runs_when_its_run_is_paused_ends_and_nothing_follows_it(desk: Desk) -> None:
    desk.submit(task("a"), task("b"), task("c"))
    running = desk.claim("a")
    pause(desk)
    then = Visit(desk.id("b"), 1, uuid4())
    with desk.database.autocommit() as tx:
        finished = engine.complete_and_claim(
            tx, running, "kept", then, worker="w", lease_seconds=30
        )
    assert isinstance(finished, Finished) and finished.next is None
    assert state(desk, "a", "b") == ["completed", "waiting paused"]
    with desk.database.autocommit() as tx:
        assert engine.wake_successors(tx, desk.id("a")) == []
    assert desk.claim("b") == Void() and desk.run().status == "paused"
    resume(desk)
    desk.do("b")
    assert desk.task("a").output == "kept"


def test_who_frees_a_slot_does_not_go_on_with_a_task_of_a_paused_run(desk: Desk) -> None:
    (first,) = line_of(desk, "a")
    desk.submit(task("b", "team"))
    desk.park("b", desk.claim("b"))
    pause(desk)
    taken = desk.complete(first, take=Taker(uuid4(), 600, worker="w", lease_seconds=30))
    assert taken.next is None and taken.woken == ()


@pytest.mark.parametrize("ends", ["fails", "is busy", "is handed back", "is lost"])
def test_an_attempt_that_ends_in_a_paused_run_is_not_followed_by_another_until_it_goes_on(
    desk: Desk, ends: str
) -> None:
    desk.submit(task("a", "single"))
    running = desk.claim("a")
    pause(desk)
    if ends == "fails":
        assert desk.fail(running, delay=3600) == Parked()
    elif ends == "is busy":
        with desk.tx() as tx:
            engine.release_attempt(tx, running, Reason.AGENT_BUSY, delay_seconds=3600, message={})
    elif ends == "is handed back":
        assert hand_back(desk, running)
    else:
        lose(desk, "a")
    assert desk.claim("a") == Void(), "also before the keeper has looked"
    hold_up(desk)
    assert state(desk, "a") == ["waiting paused"]
    assert desk.claim("a") == Void() and wake_due(desk) == [] and serve(desk) == []
    resume(desk)
    if ends != "is lost":
        assert state(desk, "a") == ["waiting retry"], "its moment has not come"
        assert wake_due(desk) == [desk.id("a")]
    assert desk.claim("a").attempt == 2


def test_who_was_parked_by_a_visit_that_came_before_the_pause_is_paused_too(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    wait = desk.claim("b")
    pause(desk)
    assert desk.park("b", wait) is None, "it moved: visit it again"
    assert state(desk, "b") == ["waiting paused"]


def test_only_paused_runs_are_held_up(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    hold_up(desk)
    assert state(desk, "a", "b") == ["pending"] * 2


def test_a_stray_whose_run_goes_on_as_the_keeper_looks_is_not_held_up(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    desk.submit(task("a"), task("b"))
    running = desk.claim("a")
    pause(desk)
    desk.fail(running, delay=3600)
    with desk.tx() as tx:
        engine.resume_run(tx, desk.plan.run_id)
        held_up = threads.submit(hold_up, desk)
        wait_until(lambda: held_up.done() or desk.rows(WAITING_FOR_A_LOCK)[0].n == 1)
    held_up.result(20)
    assert desk.run().status == "running" and state(desk, "a") == ["waiting retry"]


def test_what_runs_as_the_last_of_a_paused_run_completes_it(desk: Desk) -> None:
    desk.submit(task("a"))
    running = desk.claim("a")
    pause(desk)
    desk.complete(running, 1, {"n": 1})
    assert (desk.run().status, desk.run().output) == ("completed", {"n": 1})
    with pytest.raises(RunFinished):
        resume(desk)


def test_what_fails_for_good_in_a_paused_run_fails_it(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    running = desk.claim("a")
    pause(desk)
    assert desk.fail(running, retryable=False).ends_run
    settle(desk)
    assert desk.run().status == "failed" and state(desk, "a", "b") == ["failed", "cancelled"]
    retry(desk)
    assert desk.run().status == "queued", "it was paused before, and is not now"


def test_a_paused_run_can_be_cancelled(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    pause(desk)
    cancel(desk)
    assert settle(desk) and desk.run().status == "cancelled"
    assert state(desk, "a", "b") == ["cancelled"] * 2


def test_a_run_paused_before_its_turn_lets_others_begin_and_then_waits_its_turn(
    desk: Desk,
) -> None:
    one = {"id": "few", "maxConcurrentRuns": 1}
    first, second, third = (desk.submit(task("a"), **one) for _ in range(3))
    assert release(desk) == [first.run_id]
    with at(desk, second):
        pause(desk)
        assert desk.run().reason == "max_concurrent_runs" and desk.claim("a") == Void()
    with at(desk, first):
        assert desk.do("a").frees == "few"
    assert release(desk) == [third.run_id]
    with at(desk, second):
        (plan,) = resume(desk)
        assert (plan.limited, plan.nodes, plan.is_due) == ("few", (), True)
        assert desk.run().status == "queued" and desk.claim("a") == Void()
        assert release(desk) == []
    with at(desk, third):
        desk.do("a")
    assert release(desk) == [second.run_id]
    with at(desk, second):
        desk.do("a")
        assert desk.run().status == "completed"


def test_a_run_paused_under_way_keeps_its_place_among_those_of_its_workflow(desk: Desk) -> None:
    one = {"id": "few", "maxConcurrentRuns": 1}
    first, second = (desk.submit(task("a"), **one) for _ in range(2))
    assert release(desk) == [first.run_id]
    with at(desk, first):
        pause(desk)
        assert release(desk) == []
        (plan,) = resume(desk)
        assert plan.limited is None and len(plan.nodes) == 1
        desk.do("a")
    assert release(desk) == [second.run_id]


def due(desk: Desk) -> list[Plan]:
    with desk.database.autocommit() as tx:
        return engine.begin_due_runs(tx, 10)


def submit_later(desk: Desk, hours: int = 1, **document: Any) -> Plan:
    with desk.tx() as tx:
        stored, _ = workflows.create_workflow(
            tx, parse({"id": "w", "tasks": [task("a")], **document})
        )
        moment = desk.rows("SELECT now() + make_interval(hours => :n) AS at", run=None, n=hours)
        desk.plan = engine.submit_run(
            tx, stored, engine.Submission(input={}, start_at=moment[0].at)
        )
    return desk.plan


def come(desk: Desk) -> None:
    """Let the moment come at which the run is to begin."""
    desk.alter("UPDATE runs SET start_at = now() WHERE id = :run")


@pytest.mark.parametrize("is_over", [False, True])
def test_a_run_paused_before_its_moment_begins_no_sooner_and_only_when_it_goes_on(
    desk: Desk, is_over: bool
) -> None:
    desk.plan = Plan(uuid4(), 1, None, ())
    submit_later(desk)
    pause(desk)
    if is_over:
        come(desk)
    assert due(desk) == [] and desk.claim("a") == Void()
    (plan,) = resume(desk)
    assert not plan.is_due and desk.claim("a") == Void()
    if not is_over:
        assert due(desk) == []
        come(desk)
    (plan,) = due(desk)
    assert [node.id for node in plan.nodes] == [desk.id("a")]
    desk.do("a")
    assert desk.run().status == "completed"


def test_a_pause_takes_the_runs_of_sub_workflows_along_at_every_depth(desk: Desk) -> None:
    create(desk, "deepest", task("z"))
    create(desk, "below", child("y", "deepest"))
    desk.submit(child("x"))
    plans = [desk.plan, begin(desk, "x")]
    with at(desk, plans[1]):
        plans.append(begin(desk, "y", "deepest"))
    pause(desk)
    for plan in plans:
        with at(desk, plan):
            assert desk.run().status == "paused" and "run.paused" in desk.events()
    with at(desk, plans[2]):
        assert desk.claim("z") == Void()
    resumed = resume(desk)
    assert [plan.run_id for plan in resumed] == [plan.run_id for plan in plans]
    assert {plan.generation for plan in resumed} == {2}
    with at(desk, plans[2]):
        desk.do("z")
        assert desk.run().status == "completed"


def test_a_sub_workflow_that_was_paused_or_over_before_does_not_hinder_a_pause(
    desk: Desk,
) -> None:
    create(desk, "below", task("z"))
    desk.submit(*(child(name, dependsOn=[]) for name in "xyv"))
    paused, over, ends = (begin(desk, name) for name in "xyv")
    with at(desk, paused):
        pause(desk)
    with at(desk, over):
        desk.do("z")
    with at(desk, ends):
        desk.claim("z")
        cancel(desk)
    pause(desk)
    assert [plan.run_id for plan in resume(desk)] == [desk.plan.run_id, paused.run_id]
    with at(desk, ends):
        assert desk.run().status == "running" and desk.run().cancel_requested_at is not None


def test_a_sub_workflow_that_begins_in_a_paused_run_is_paused_until_that_goes_on(
    desk: Desk,
) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    claimed = desk.claim("x")
    pause(desk)
    plan = begin_claimed(desk, claimed)
    assert plan is not None and state(desk, "x") == ["waiting children"]
    with at(desk, plan):
        assert desk.run().status == "paused" and desk.claim("p") == Void()
    assert [p.run_id for p in resume(desk)] == [desk.plan.run_id, plan.run_id]
    with at(desk, plan):
        desk.do("p")
        assert desk.run().status == "completed"


def test_what_is_said_of_an_approval_while_its_run_is_paused_counts_when_it_goes_on(
    desk: Desk,
) -> None:
    desk.submit(approval("ok"), task("z"))
    ask(desk, "ok")
    pause(desk)
    assert state(desk, "ok") == ["waiting approval"], "it is asked for all the same"
    assert [woken.task_id for woken in decide(desk, "ok")] == [desk.id("ok")]
    assert desk.claim("ok") == Void()
    (plan,) = resume(desk)
    assert desk.id("ok") in {node.id for node in plan.nodes}
    claimed = desk.claim("ok")
    assert claimed.expanded and claimed.decision["approved"] is True


def test_a_delay_that_passes_while_its_run_is_paused_is_over_when_it_goes_on(desk: Desk) -> None:
    desk.submit({"taskId": "d", "type": "delay", "seconds": 60}, task("z"))
    claimed = desk.claim("d")
    with desk.database.autocommit() as tx:
        assert engine.begin_wait(tx, claimed, Wait(Reason.DELAY, 60), {"of": "d"})
    pause(desk)
    assert wake_due(desk) == [desk.id("d")] and desk.claim("d") == Void()
    resume(desk)
    assert desk.claim("d").expanded


def test_an_item_whose_turn_comes_in_a_paused_run_is_held_up_and_keeps_its_slot(
    desk: Desk,
) -> None:
    desk.submit(each(1), task("z"))
    spread(desk, [1, 2, 3])
    first = desk.claim("f", 0)
    pause(desk)
    desk.complete(first)
    assert [woken.task_id for woken in wake_parent(desk, desk.id("f"))] == [desk.id("f", 1)]
    assert desk.claim("f", 1) == Void()
    hold_up(desk)
    assert items(desk) == "cpm" and places(desk) == [desk.id("f", 1)]
    (plan,) = resume(desk)
    assert [node.id for node in plan.items] == [desk.id("f", 1)]
    desk.complete(desk.claim("f", 1))
    assert [woken.task_id for woken in wake_parent(desk, desk.id("f"))] == [desk.id("f", 2)]


def test_items_written_while_the_run_is_paused_wait_until_it_goes_on(desk: Desk) -> None:
    desk.submit(each(), task("z"))
    claimed = desk.claim("f")
    pause(desk)
    with desk.database.autocommit() as tx:
        assert engine.expand_task(tx, claimed, [1, 2], {"m": "f"})
    assert [desk.claim("f", n) for n in range(2)] == [Void()] * 2
    hold_up(desk)
    assert items(desk) == "pp" and desk.task("f", 0).reason == "paused"
    (plan,) = resume(desk)
    assert [node.id for node in plan.items] == [desk.id("f", 0), desk.id("f", 1)]


# --- Trying again


def test_what_failed_is_tried_again_with_what_was_cancelled_for_it_and_nothing_else(
    desk: Desk,
) -> None:
    desk.submit(task("a"), task("b", retry={"maxAttempts": 2}), task("c"))
    desk.do("a", "kept")
    desk.fail(desk.claim("b"))
    break_down(desk, "b")
    before = desk.task("a")
    (plan,) = retry(desk)
    assert plan.generation == 2 and [n.id for n in plan.nodes] == [desk.id("b"), desk.id("c")]
    run = desk.run()
    assert (run.status, run.error, run.finished_at, run.started_at) == ("queued", None, None, None)
    assert desk.task("a") == before and state(desk, "b", "c") == ["pending"] * 2
    assert (desk.task("b").attempt, desk.task("b").tries, desk.task("b").error) == (2, 0, None)
    assert desk.fail(desk.claim("b")) == Parked(), "it has all its attempts again"
    assert desk.claim("b").attempt == 4
    attempts = desk.rows("SELECT status FROM attempts WHERE task_id = :id", id=desk.id("b"))
    assert [row.status for row in attempts] == ["failed"] * 3 + ["running"]
    (event,) = desk.rows("SELECT data FROM events WHERE run_id = :run AND type = 'run.retried'")
    assert event.data == {"by": "key:test", "generation": 2, "tasks": ["b", "c"]}


def test_parameters_are_merged_over_those_of_what_failed_and_recorded(desk: Desk) -> None:
    desk.submit(task("a", parameters={"x": 0, "y": 0}, retry=ONCE), task("b"))
    break_down(desk, "a")
    retry(desk, a={"x": 1, "z": {"deep": 1}}, b={"q": 1})
    assert desk.claim("a").overrides == {"x": 1, "z": {"deep": 1}}
    (event,) = desk.rows("SELECT data FROM events WHERE run_id = :run AND type = 'run.retried'")
    assert event.data["parameters"] == {"a": {"x": 1, "z": {"deep": 1}}, "b": {"q": 1}}
    lose(desk, "a", max_lost=1)
    settle(desk)
    assert desk.run().status == "failed"
    retry(desk, a={"x": 2})
    assert desk.claim("a").overrides == {"x": 2, "z": {"deep": 1}}, "those of before still hold"


@pytest.mark.parametrize("name", ["done", "ok", "nobody", ""])
def test_parameters_of_what_is_not_tried_again_are_refused_and_nothing_is(
    desk: Desk, name: str
) -> None:
    desk.submit(
        task("done", dependsOn=[]),
        task("a", dependsOn=["done"]),
        approval("ok", dependsOn=["a"]),
        task("z", dependsOn=["a"]),
    )
    desk.do("done")
    break_down(desk, "a")
    before = desk.run(), desk.events()
    with pytest.raises(InvalidRequest) as refused:
        retry(desk, **{name: {"x": 1}, "a": {"x": 1}})
    assert list(refused.value.errors) == [f"/parameters/{name}"]
    assert "a, z" in refused.value.errors[f"/parameters/{name}"][0]
    assert (desk.run(), desk.events()) == before


def test_a_run_is_tried_again_once_and_again_when_it_failed_again(desk: Desk) -> None:
    desk.submit(task("a", retry=ONCE), task("b"))
    for generation in (2, 3):
        break_down(desk, "a")
        (plan,) = retry(desk)
        assert plan.generation == generation
        with pytest.raises(RunNotFailed) as refused:
            retry(desk)
        assert refused.value.data == {"status": "queued"}
    desk.do("a")
    desk.do("b")
    assert desk.run().status == "completed" and desk.run().error is None


def test_whoever_ran_before_the_retry_can_write_nothing_after_it(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    stale = desk.claim("a")
    lose(desk, "a", max_lost=1)
    settle(desk)
    retry(desk)
    assert desk.complete(stale, "late") == Fenced() == desk.fail(stale)
    fresh = desk.claim("a")
    assert desk.complete(stale, "late") == Fenced() == desk.fail(stale)
    assert isinstance(desk.complete(fresh, "good"), Finished) and desk.task("a").output == "good"


def test_a_failure_that_was_gone_on_after_is_not_tried_again(desk: Desk) -> None:
    desk.submit(task("a", onFailure="continue", retry=ONCE), task("b", retry=ONCE))
    assert not desk.fail(desk.claim("a")).failed_run
    break_down(desk, "b")
    before = desk.task("a")
    with pytest.raises(InvalidRequest):
        retry(desk, a={})
    retry(desk)
    assert desk.task("a") == before and state(desk, "b") == ["pending"]


def test_an_approval_is_asked_for_anew_if_it_was_cancelled_or_rejected(desk: Desk) -> None:
    desk.submit(*(approval(name, dependsOn=[]) for name in ("ok", "no")))
    ask(desk, "ok")
    ask(desk, "no")
    decide(desk, "no", approved=False)
    rejected = desk.claim("no")
    assert rejected.decision["approved"] is False
    with desk.tx() as tx:
        failure = Failure("rejected", "so be it", retryable=False)
        engine.fail_attempt(tx, rejected, failure, message=None)
    settle(desk)
    assert desk.run().status == "failed" and state(desk, "ok", "no") == ["cancelled", "failed"]
    with pytest.raises(ApprovalRefused):
        decide(desk, "ok")
    retry(desk)
    for name in ("ok", "no"):
        with pytest.raises(ApprovalRefused, match="not asked for yet"):
            decide(desk, name)
        claimed = ask(desk, name)
        assert not claimed.expanded and claimed.decision is None
        assert len(decide(desk, name)) == 1
        assert desk.claim(name).decision["approved"] is True


def test_the_failed_items_come_back_in_order_and_never_more_than_max_parallel(desk: Desk) -> None:
    desk.submit(each(2), task("z"))
    spread(desk, list(range(6)))
    desk.complete(desk.claim("f", 0), "kept")
    wake_parent(desk, desk.id("f"))
    break_down(desk, "f", 2)
    assert items(desk) == "ccfccc" and places(desk) == []
    before = desk.task("f", 0)
    (plan,) = retry(desk, f={"x": 1})
    assert items(desk) == "cppmmm" and state(desk, "f") == ["waiting children"]
    assert places(desk) == [desk.id("f", 1), desk.id("f", 2)]
    assert [node.id for node in plan.items] == places(desk)
    assert desk.task("f", 0) == before and desk.claim("f", 3) == Elsewhere()
    for n in range(1, 6):
        claimed = desk.claim("f", n)
        assert claimed.overrides == {"x": 1}
        desk.complete(claimed, n)
        woken = [woken.task_id for woken in wake_parent(desk, desk.id("f"))]
        assert woken == [desk.id("f", n + 2) if n < 4 else desk.id("f")] * (n != 4)
    assert desk.claim("f").expanded and places(desk) == []
    with desk.database.autocommit() as tx:
        assert engine.item_outputs(tx, desk.id("f")) == (["kept", 1, 2, 3, 4, 5], 0)


def test_parameters_of_a_retry_reach_items_that_are_written_only_then(desk: Desk) -> None:
    desk.submit(each(2), task("z"))
    break_down(desk, "f")
    (plan,) = retry(desk, f={"x": 1})
    assert state(desk, "f") == ["pending"] and plan.items == ()
    spread(desk, [1, 2, 3])
    assert desk.claim("f", 0).overrides == {"x": 1} == desk.task("f", 2).overrides


def test_every_item_that_failed_is_tried_again_also_those_that_were_tolerated(
    desk: Desk,
) -> None:
    desk.submit(each(1, retry=ONCE), task("z"))
    spread(desk, list(range(5)), tolerates=1)
    desk.complete(desk.claim("f", 0))
    wake_parent(desk, desk.id("f"))
    assert not desk.fail(desk.claim("f", 1)).failed_run
    wake_parent(desk, desk.id("f"))
    break_down(desk, "f", 2)
    assert items(desk) == "cffcc" and desk.run().status == "failed"
    retry(desk)
    assert items(desk) == "cpmmm" and places(desk) == [desk.id("f", 1)]
    assert not desk.fail(desk.claim("f", 1)).failed_run, "one may fail again"
    wake_parent(desk, desk.id("f"))
    assert desk.fail(desk.claim("f", 2)).failed_run
    settle(desk)
    retry(desk)
    assert items(desk) == "cpmmm"


def test_what_failed_within_what_a_completed_for_each_tolerates_stays_as_it_is(
    desk: Desk,
) -> None:
    desk.submit(each(retry=ONCE), task("z", retry=ONCE))
    spread(desk, [1, 2], tolerates=1)
    desk.complete(desk.claim("f", 0))
    desk.fail(desk.claim("f", 1))
    desk.do("f", [None, None])
    break_down(desk, "z")
    retry(desk)
    assert items(desk) == "cf" and state(desk, "f", "z") == ["completed", "pending"]


def test_the_items_of_a_for_each_that_failed_and_was_gone_on_after_stay_as_they_are(
    desk: Desk,
) -> None:
    desk.submit(each(1, retry=ONCE, onFailure="continue"), task("z", retry=ONCE))
    spread(desk, [1, 2], tolerates=0)
    for n in range(2):
        assert not desk.fail(desk.claim("f", n)).failed_run
        wake_parent(desk, desk.id("f"))
    assert not desk.fail(desk.claim("f"), retryable=False).failed_run, "too many items failed"
    break_down(desk, "z")
    retry(desk)
    assert state(desk, "f", "z") == ["failed", "pending"]
    assert items(desk) == "ff" and places(desk) == []


def test_the_run_of_a_failed_sub_workflow_is_tried_again_itself(desk: Desk) -> None:
    create(desk, "below", task("p"), task("q", retry=ONCE))
    desk.submit(child("x"), task("z"))
    below = begin(desk, "x")
    with at(desk, below):
        desk.do("p", "kept")
        break_down(desk, "q")
    assert [woken.task_id for woken in wake_parent(desk, desk.id("x"))] == [desk.id("x")]
    claimed = desk.claim("x")
    assert claimed.expanded and claimed.child["status"] == "failed"
    desk.fail(claimed, retryable=False)
    settle(desk)
    (plan,) = retry(desk)
    assert plan.run_id == desk.plan.run_id and state(desk, "x", "z") == ["pending"] * 2
    plan = begin(desk, "x")
    assert (plan.run_id, plan.generation) == (below.run_id, 2)
    assert state(desk, "x") == ["waiting children"] and desk.claim("x") == Elsewhere()
    with at(desk, below):
        assert desk.run().status == "queued" and state(desk, "p", "q") == ["completed", "pending"]
        (event,) = desk.rows("SELECT data FROM events WHERE run_id = :run AND type = 'run.retried'")
        assert event.data["by"] == "parent"
        desk.complete(desk.claim("q"), 1, "below")
    wake_parent(desk, desk.id("x"))
    claimed = desk.claim("x")
    assert claimed.expanded and claimed.child["output"] == "below"


def end_with(desk: Desk, name: str) -> None:
    """Complete the last task, whose run fails all the same."""
    with desk.tx() as tx:
        failure = Failure("expression_error", "no such key")
        engine.complete_attempt(tx, desk.claim(name), None, None, failure)
    assert desk.run().status == "failed" and desk.task(name).status == "completed"


def test_a_run_of_which_no_task_failed_is_not_tried_again(desk: Desk) -> None:
    desk.submit(task("a"))
    end_with(desk, "a")
    with pytest.raises(NothingToRetry):
        retry(desk)
    assert desk.run().status == "failed" and "run.retried" not in desk.events()


def test_a_sub_workflow_of_which_no_task_failed_is_run_anew(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    below = begin(desk, "x")
    with at(desk, below):
        end_with(desk, "p")
    wake_parent(desk, desk.id("x"))
    desk.fail(desk.claim("x"), retryable=False)
    settle(desk)
    retry(desk)
    assert begin(desk, "x").run_id != below.run_id


def test_whoever_was_told_that_a_sub_workflow_is_over_waits_again_if_that_is_tried_again(
    desk: Desk,
) -> None:
    create(desk, "below", task("p", retry=ONCE))
    desk.submit(child("x"))
    below = begin(desk, "x")
    with at(desk, below):
        break_down(desk, "p")
    assert len(wake_parent(desk, desk.id("x"))) == 1
    with at(desk, below):
        retry(desk)
    assert desk.task("x").woken_at is None
    with at(desk, below):
        desk.do("p")
    assert len(wake_parent(desk, desk.id("x"))) == 1


def test_who_is_woken_in_paused_runs_hides_nobody_whose_wake_was_lost(desk: Desk) -> None:
    for _ in range(3):
        desk.submit(approval("ok"))
        ask(desk, "ok")
        decide(desk, "ok")
        pause(desk)
    desk.submit(approval("ok"))
    ask(desk, "ok")
    decide(desk, "ok")
    desk.alter("UPDATE tasks SET woken_at = now() - interval '1 h'")
    left = engine.Left("infinity", "infinity", "infinity", first=())
    with desk.database.autocommit() as tx:
        assert [woken.task_id for woken in engine.wake_lost(tx, left, 1, 2)] == [desk.id("ok")]


def test_a_sub_workflow_that_was_cancelled_with_its_parent_is_run_anew(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x", dependsOn=[]), task("a", dependsOn=[]))
    below = begin(desk, "x")
    break_down(desk, "a")
    with at(desk, below):
        assert settle(desk) and desk.run().status == "cancelled"
    retry(desk)
    again = begin(desk, "x")
    assert again.run_id != below.run_id and desk.task("x").child_run_id == again.run_id


def test_a_sub_workflow_that_gets_other_parameters_is_run_anew_with_them(desk: Desk) -> None:
    create(desk, "below", task("p", retry=ONCE))
    desk.submit(child("x"))
    below = begin(desk, "x", input={"n": 1})
    with at(desk, below):
        break_down(desk, "p")
    wake_parent(desk, desk.id("x"))
    break_down(desk, "x")
    retry(desk, x={"n": 2})
    claimed = desk.claim("x")
    assert not claimed.expanded and claimed.overrides == {"n": 2} and claimed.child is None
    again = begin_claimed(desk, claimed, input={"n": 2})
    assert again is not None and again.run_id != below.run_id


def test_a_sub_workflow_that_was_over_before_its_task_was_cancelled_is_not_run_again(
    desk: Desk,
) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x", dependsOn=[]), task("a", dependsOn=[]))
    below = begin(desk, "x")
    with at(desk, below):
        desk.complete(desk.claim("p"), 1, "kept")
    break_down(desk, "a")
    assert state(desk, "x") == ["cancelled"]
    retry(desk)
    plan = begin(desk, "x")
    assert (plan.run_id, plan.nodes) == (below.run_id, ())
    assert [woken.task_id for woken in wake_parent(desk, desk.id("x"))] == [desk.id("x")]
    assert desk.claim("x").child["output"] == "kept"
    with at(desk, below):
        assert desk.task("p").attempt == 1


def test_failed_sub_workflows_of_items_come_back_as_their_items_have_their_turn(
    desk: Desk,
) -> None:
    create(desk, "below", task("p", retry=ONCE))
    desk.submit(child("f", forEach={"items": "${input.n}", "maxParallel": 1}))
    spread(desk, [1, 2, 3], tolerates=1)
    plans = []
    for n in range(2):
        plans.append(begin(desk, "f", index=n))
        with at(desk, plans[n]):
            break_down(desk, "p")
        wake_parent(desk, desk.id("f", n))
        desk.fail(desk.claim("f", n), retryable=False)
        wake_parent(desk, desk.id("f"))
    settle(desk)
    assert items(desk) == "ffc" and desk.run().status == "failed"
    retry(desk)
    for n in range(2):
        assert items(desk) == "c" * n + "p" + "m" * (2 - n)
        assert begin(desk, "f", index=n).run_id == plans[n].run_id
        with at(desk, plans[n]):
            desk.do("p")
        wake_parent(desk, desk.id("f", n))
        desk.complete(desk.claim("f", n))
        wake_parent(desk, desk.id("f"))
    assert items(desk) == "ccp"


def test_what_is_tried_again_of_a_sub_workflow_in_a_paused_run_is_paused(desk: Desk) -> None:
    create(desk, "below", task("p", retry=ONCE))
    desk.submit(child("x", dependsOn=[]), child("y", dependsOn=[]))
    failed, over = begin(desk, "x"), begin(desk, "y")
    with at(desk, over):
        desk.do("p")
    with at(desk, failed):
        break_down(desk, "p")
    wake_parent(desk, desk.id("x"))
    break_down(desk, "x")
    retry(desk)
    claimed = [desk.claim(name) for name in "xy"]
    pause(desk)
    for one in claimed:
        assert begin_claimed(desk, one) is not None
    for plan, status in ((failed, "paused"), (over, "completed")):
        with at(desk, plan):
            assert desk.run().status == status
    assert [plan.run_id for plan in resume(desk)] == [desk.plan.run_id, failed.run_id]


def test_every_retry_gives_the_run_its_whole_time_again_and_no_more(desk: Desk) -> None:
    desk.submit(task("a", retry=ONCE), deadlineSeconds=3600)
    for _ in range(3):
        desk.alter(
            "UPDATE runs SET created_at = created_at - interval '1 h',"
            " start_at = start_at - interval '1 h', deadline_at = deadline_at - interval '1 h'"
        )
        with desk.database.autocommit() as tx:
            assert engine.overdue_runs(tx, 10) == [desk.plan.run_id]
        assert fail_overdue(desk) and settle(desk)
        assert desk.run().error["code"] == "deadline_exceeded"
        retry(desk)
        (left,) = desk.rows(
            "SELECT extract(epoch FROM deadline_at - now()) AS s FROM runs WHERE id = :run"
        )
        assert 3590 < left.s <= 3600
    desk.do("a")
    assert desk.run().status == "completed"


def test_a_run_that_is_tried_again_waits_its_turn_again(desk: Desk) -> None:
    one = {"id": "few", "maxConcurrentRuns": 1}
    first, second = (desk.submit(task("a", retry=ONCE), **one) for _ in range(2))
    assert release(desk) == [first.run_id]
    with at(desk, first):
        break_down(desk, "a")
        (plan,) = retry(desk)
        assert (plan.limited, plan.nodes, desk.run().reason) == ("few", (), "max_concurrent_runs")
        assert desk.claim("a") == Void()
    assert release(desk) == [first.run_id], "it was the first, and its slot is free"
    assert release(desk) == []
    with at(desk, first):
        break_down(desk, "a")
        assert release(desk) == [second.run_id]
        retry(desk)
        assert release(desk) == []
    with at(desk, second):
        desk.do("a")
    assert release(desk) == [first.run_id]
    with at(desk, first):
        desk.do("a")
        assert desk.run().status == "completed"


# --- Running anew


def test_a_rerun_is_a_run_of_its_own_of_the_same_version_with_the_same_input(desk: Desk) -> None:
    create(desk, "w", task("a", parameters={"x": 1}))
    with desk.tx() as tx:
        stored = find_workflow(tx, "w")
        submission = engine.Submission(
            input={"n": 5}, labels={"team": "x"}, priority=2, agent_id="echo"
        )
        desk.plan = engine.submit_run(tx, stored, submission)
    create(desk, "w", task("b"))
    first = desk.run()
    plan = rerun(desk)
    with at(desk, plan):
        again = desk.run()
        (event,) = desk.rows("SELECT type, data FROM events WHERE run_id = :run")
        assert state(desk, "a") == ["pending"]
    assert again.id != first.id and again.rerun_of == first.id and again.request_id == "again"
    for name in ("workflow_id", "version", "input", "labels", "priority", "agent_id"):
        assert getattr(again, name) == getattr(first, name), name
    assert (again.status, again.generation, again.parent_task_id) == ("queued", 1, None)
    assert event.type == "run.queued"
    assert event.data == {"version": 1, "by": "key:test", "rerunOf": str(first.id)}
    assert desk.run() == first


@pytest.mark.parametrize("status", ["queued", "paused", "completed", "failed", "cancelled"])
def test_a_run_can_be_run_anew_at_every_moment(desk: Desk, status: str) -> None:
    if status in ("queued", "paused"):
        desk.submit(task("a"), task("b"))
        if status == "paused":
            pause(desk)
    else:
        finish(desk, status)
    before = desk.run(), desk.events()
    with at(desk, rerun(desk)):
        desk.do("a")
        desk.do("b")
        assert desk.run().status == "completed"
    assert (desk.run(), desk.events()) == before and before[0].status == status


def test_a_rerun_waits_its_turn_among_the_runs_of_its_workflow(desk: Desk) -> None:
    first = desk.submit(task("a"), id="few", maxConcurrentRuns=1)
    assert release(desk) == [first.run_id]
    plan = rerun(desk)
    assert plan.limited == "few" and release(desk) == []
    desk.do("a")
    assert release(desk) == [plan.run_id]


def test_a_run_for_an_agent_that_is_gone_is_not_run_anew(desk: Desk) -> None:
    create(desk, "w", task("a"))
    with desk.tx() as tx:
        submission = engine.Submission(input={}, agent_id="echo")
        desk.plan = engine.submit_run(tx, find_workflow(tx, "w"), submission)
    desk.alter("UPDATE agents SET deregistered_at = now() WHERE agent_id = 'echo'")
    with pytest.raises(AgentNotFound):
        rerun(desk)
    assert desk.rows("SELECT count(*) AS n FROM runs")[0].n == 1


def test_what_was_a_sub_workflow_is_run_anew_by_itself(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    with at(desk, begin(desk, "x")):
        with at(desk, rerun(desk)):
            assert (desk.run().parent_task_id, desk.run().depth) == (None, 0)
            assert desk.do("p").parent_task_id is None
        assert desk.do("p").parent_task_id is not None


# --- Cancelling


def test_a_cancelled_run_takes_its_sub_workflows_along_at_every_depth(desk: Desk) -> None:
    create(desk, "deepest", task("z", dependsOn=[]), task("v", dependsOn=[]))
    create(desk, "below", child("y", "deepest"))
    desk.submit(child("x"))
    top, below = desk.plan, begin(desk, "x")
    with at(desk, below):
        deepest = begin(desk, "y", "deepest")
    with at(desk, deepest):
        running = desk.claim("v")
    cancel(desk)
    cancel(desk)
    for plan, by in ((top, "key:test"), (below, "parent"), (deepest, "parent")):
        with at(desk, plan):
            asked = desk.rows(
                "SELECT data FROM events WHERE run_id = :run AND type = 'run.cancel_requested'"
            )
            assert [event.data for event in asked] == [{"by": by}]
    with at(desk, deepest):
        assert desk.claim("z") == Void() and state(desk, "z", "v") == ["cancelled", "running"]
        with desk.database.autocommit() as tx:
            assert engine.renew_leases(tx, {running.task_id: 1}, 30) == {running.task_id: True}
            ready = engine.runs_to_settle(tx, 10)
        assert set(ready) == {top.run_id, below.run_id}, "something of the deepest still runs"
        assert desk.complete(running).ends_run
        ended = settle(desk)
        assert desk.run().status == "cancelled" and ended.parent_task_id is not None
    assert wake_parent(desk, ended.parent_task_id) == []


def test_a_cancelled_run_takes_the_runs_of_its_items_along_but_not_what_is_over(
    desk: Desk,
) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("f", forEach={"items": "${input.n}"}))
    spread(desk, [1, 2, 3])
    over, alive = begin(desk, "f", index=0), begin(desk, "f", index=1)
    with at(desk, over):
        desk.do("p")
    cancel(desk)
    assert settle(desk) and items(desk) == "ccc"
    with at(desk, over):
        assert desk.run().status == "completed"
    with at(desk, alive):
        assert settle(desk) and desk.run().status == "cancelled"


def test_no_sub_workflow_begins_once_its_run_is_cancelled(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    claimed = desk.claim("x")
    cancel(desk)
    assert begin_claimed(desk, claimed) is None
    with desk.tx() as tx:
        assert isinstance(engine.abandon_attempt(tx, claimed), Finished)
    assert settle(desk) and desk.rows("SELECT count(*) AS n FROM runs")[0].n == 1


def test_a_failing_run_that_is_cancelled_ends_as_cancelled(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    running = desk.claim("b")
    break_down(desk, "a")
    cancel(desk)
    desk.complete(running)
    assert settle(desk) and desk.run().status == "cancelled"
    with pytest.raises(RunNotFailed) as refused:
        retry(desk)
    assert refused.value.data == {"status": "cancelled"}


@pytest.mark.parametrize("reason", ["max_concurrent_runs", "start_at"])
def test_a_run_cancelled_before_it_began_never_begins(desk: Desk, reason: str) -> None:
    if reason == "start_at":
        desk.plan = Plan(uuid4(), 1, None, ())
        submit_later(desk)
    else:
        desk.submit(task("a"), id="few", maxConcurrentRuns=1)
    assert desk.run().reason == reason
    cancel(desk)
    come(desk)
    assert due(desk) == [] and release(desk) == [] and desk.claim("a") == Void()
    assert settle(desk) and (desk.run().status, desk.run().reason) == ("cancelled", None)
    assert due(desk) == [] and release(desk) == []


# --- Clocks


def test_a_run_begins_when_its_moment_has_come_and_once(desk: Desk) -> None:
    desk.plan = Plan(uuid4(), 1, None, ())
    submit_later(desk)
    assert due(desk) == [] and desk.claim("a") == Void()
    come(desk)
    assert desk.claim("a") == Void(), "the keeper says when"
    (plan,) = due(desk)
    assert (plan.run_id, plan.is_due, len(plan.nodes)) == (desk.plan.run_id, True, 1)
    assert due(desk) == [] and isinstance(desk.claim("a"), Claimed)


def test_a_run_whose_moment_has_come_still_waits_its_turn(desk: Desk) -> None:
    first = desk.submit(task("a"), id="few", maxConcurrentRuns=1)
    assert release(desk) == [first.run_id]
    submit_later(desk, id="few", maxConcurrentRuns=1)
    come(desk)
    (plan,) = due(desk)
    assert (plan.limited, plan.nodes) == ("few", ())
    assert desk.run().reason == "max_concurrent_runs" and release(desk) == []
    with at(desk, first):
        desk.do("a")
    assert release(desk) == [desk.plan.run_id]


def pass_deadline(desk: Desk) -> list[UUID]:
    desk.alter("UPDATE runs SET deadline_at = now() - interval '1 s' WHERE id = :run")
    with desk.database.autocommit() as tx:
        return engine.overdue_runs(tx, 10)


def fail_overdue(desk: Desk) -> bool:
    with desk.tx() as tx:
        return engine.fail_overdue_run(tx, desk.plan.run_id)


@pytest.mark.parametrize("moment", ["queued", "held", "to begin later", "running", "paused"])
def test_whatever_a_run_does_at_its_deadline_it_fails(desk: Desk, moment: str) -> None:
    if moment == "to begin later":
        desk.plan = Plan(uuid4(), 1, None, ())
        submit_later(desk, deadlineSeconds=60)
    else:
        few = {"id": "few", "maxConcurrentRuns": 1} if moment == "held" else {}
        desk.submit(task("a"), deadlineSeconds=60, **few)
    assert not fail_overdue(desk), "not yet"
    running = desk.claim("a") if moment == "running" else None
    if moment == "paused":
        pause(desk)
    assert pass_deadline(desk) == [desk.plan.run_id]
    assert fail_overdue(desk) and not fail_overdue(desk)
    with desk.database.autocommit() as tx:
        assert engine.overdue_runs(tx, 10) == []
    assert desk.claim("a") in (Void(), None)
    if running is not None:
        assert not settle(desk)
        with desk.database.autocommit() as tx:
            assert engine.renew_leases(tx, {running.task_id: 1}, 30) == {running.task_id: True}
        assert desk.complete(running, "late").ends_run
    assert settle(desk)
    assert (desk.run().status, desk.run().error["code"]) == ("failed", "deadline_exceeded")
    assert state(desk, "a") == ["completed" if running else "cancelled"]


def test_a_run_that_is_over_or_ending_has_no_deadline_any_more(desk: Desk) -> None:
    desk.submit(task("a"), deadlineSeconds=60)
    desk.claim("a")
    cancel(desk)
    assert pass_deadline(desk) == [] and not fail_overdue(desk)
    desk.submit(task("a"), deadlineSeconds=60)
    desk.do("a")
    assert pass_deadline(desk) == [] and not fail_overdue(desk)
    assert desk.run().status == "completed"


def test_a_run_over_its_deadline_takes_its_sub_workflows_along(desk: Desk) -> None:
    create(desk, "below", approval("ok"))
    desk.submit(child("x"), deadlineSeconds=60)
    below = begin(desk, "x")
    pass_deadline(desk)
    assert fail_overdue(desk) and settle(desk)
    with at(desk, below):
        assert settle(desk) and desk.run().status == "cancelled"


def test_a_sub_workflow_that_takes_too_long_fails_and_its_task_learns_why(desk: Desk) -> None:
    create(desk, "below", approval("ok"))
    desk.submit(child("x"))
    with at(desk, begin(desk, "x")):
        pass_deadline(desk)
        assert fail_overdue(desk)
        ended = settle(desk)
    assert [woken.task_id for woken in wake_parent(desk, ended.parent_task_id)] == [desk.id("x")]
    assert desk.claim("x").child["error"]["code"] == "deadline_exceeded"


# --- Branches


def branch(desk: Desk) -> None:
    desk.submit(
        task("a"),
        task("b", when="tasks.a.output > 5", parameters={"x": "${tasks.a.output}"}),
        task("c"),
    )
    desk.do("a", 7)


def skip(desk: Desk, name: str, reason: str = "when") -> Finished | None:
    with desk.database.autocommit() as tx:
        return engine.skip_task(tx, desk.id(name), reason)


def test_a_task_with_a_condition_starts_only_when_it_is_decided(desk: Desk) -> None:
    branch(desk)
    answer = desk.claim("b")
    assert isinstance(answer, Undecided) and not answer.follows_skipped
    assert answer.tasks["a"]["output"] == 7 and state(desk, "b") == ["pending"]
    for _ in range(2):
        with desk.database.autocommit() as tx:
            engine.decide_task(tx, desk.id("b"))
    assert isinstance(desk.claim("b"), Claimed)
    assert skip(desk, "b") is None, "it runs"


def test_a_task_is_not_decided_before_what_it_depends_on_is_over(desk: Desk) -> None:
    desk.submit(task("a"), task("b", when="true"))
    answer = desk.claim("b")
    assert isinstance(answer, MustWait) and answer.reason == Reason.DEPENDENCIES


def test_a_skipped_task_lets_go_on_what_follows_it_and_is_skipped_once(desk: Desk) -> None:
    branch(desk)
    assert skip(desk, "b") == Finished(1)
    assert skip(desk, "b") is None
    row = desk.task("b")
    assert (row.status, row.reason, row.attempt) == ("skipped", "when", 0)
    answer = desk.claim("c")
    assert isinstance(answer, Undecided) and answer.follows_skipped
    assert skip(desk, "c", "upstream_skipped")
    desk.complete(desk.claim(""), None, run_output=None)
    assert desk.run().status == "completed" and desk.events().count("task.skipped") == 2


def test_nothing_is_skipped_in_a_run_that_takes_no_tasks(desk: Desk) -> None:
    branch(desk)
    pause(desk)
    assert skip(desk, "b") is None and desk.claim("b") == Void()
    resume(desk)
    assert isinstance(desk.claim("b"), Undecided)
    cancel(desk)
    assert skip(desk, "b") is None and state(desk, "b") == ["cancelled"]


def test_what_was_skipped_stays_so_and_what_was_not_decided_is_decided_by_a_retry(
    desk: Desk,
) -> None:
    desk.submit(
        task("a", when="false", dependsOn=[]),
        task("b", dependsOn=[], retry=ONCE),
        task("c", when="tasks.a.status == 'skipped'", dependsOn=["a", "b"]),
    )
    assert skip(desk, "a")
    break_down(desk, "b")
    assert state(desk, "a", "b", "c") == ["skipped", "failed", "cancelled"]
    retry(desk)
    assert state(desk, "a", "b", "c") == ["skipped", "pending", "pending"]
    desk.do("b")
    assert isinstance(desk.claim("c"), Undecided)


# --- Waiting


def test_what_waits_holds_no_lease_and_is_claimed_once_more_when_its_time_is_over(
    desk: Desk,
) -> None:
    desk.submit({"taskId": "d", "type": "delay", "seconds": 60})
    claimed = desk.claim("d")
    wait = Wait(Reason.DELAY, 60)
    with desk.database.autocommit() as tx:
        assert engine.begin_wait(tx, claimed, wait, {"of": "d"})
        assert not engine.begin_wait(tx, claimed, wait, {"of": "d"}), "it waits already"
    row = desk.task("d")
    assert (row.status, row.reason, row.lease_expires_at) == ("waiting", "delay", None)
    assert row.message == {"of": "d"} and desk.claim("d") == Elsewhere()
    assert wake_due(desk) == [desk.id("d")]
    claimed = desk.claim("d")
    assert claimed.expanded and isinstance(desk.complete(claimed), Finished)
    assert desk.run().status == "completed"
    assert desk.rows("SELECT FROM attempts") == [], "no agent was asked"


def test_nothing_begins_to_wait_in_a_run_that_ends(desk: Desk) -> None:
    desk.submit(approval("ok"))
    claimed = desk.claim("ok")
    cancel(desk)
    with desk.database.autocommit() as tx:
        assert not engine.begin_wait(tx, claimed, Wait(Reason.APPROVAL), {})
    with desk.tx() as tx:
        assert isinstance(engine.abandon_attempt(tx, claimed), Finished)
    assert settle(desk) and state(desk, "ok") == ["cancelled"]


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_approval_whose_worker_is_lost_is_neither_forgotten_nor_asked_twice(
    desk: Desk, is_begun: bool
) -> None:
    desk.submit(approval("ok"))
    if is_begun:
        ask(desk, "ok")
        decide(desk, "ok")
    desk.claim("ok")
    lose(desk, "ok")
    with desk.database.autocommit() as tx:
        engine.wake_forgotten(tx)
    claimed = desk.claim("ok")
    assert claimed.expanded is is_begun
    assert (claimed.decision or {}).get("approved") is (True if is_begun else None)


# --- Approvals


def test_an_approval_is_decided_once_by_whoever_comes_first(desk: Desk) -> None:
    desk.submit(approval("ok"), task("z"))
    with pytest.raises(ApprovalRefused, match="not asked for yet"):
        decide(desk, "ok")
    ask(desk, "ok")
    (woken,) = decide(desk, "ok", approved=False)
    assert woken.message == {"of": "ok"} and "task.rejected" in desk.events()
    with pytest.raises(ApprovalRefused, match="rejected already, by key:test"):
        decide(desk, "ok")
    claimed = desk.claim("ok")
    assert claimed.decision == {"approved": False, "comment": "so be it", "principal": "key:test"}
    with pytest.raises(ApprovalRefused, match="rejected already"):
        decide(desk, "ok")


def test_only_an_approval_is_approved(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    with pytest.raises(ApprovalRefused, match="no approval"):
        decide(desk, "a")
    for task_id in (uuid4(), desk.id("")):
        with desk.tx() as tx, pytest.raises(TaskNotFound):
            engine.decide_approval(tx, task_id, approved=True, comment=None, by="x")


@pytest.mark.parametrize("end", [cancel, pass_deadline])
def test_nobody_approves_what_is_over_with_its_run(desk: Desk, end: Any) -> None:
    desk.submit(approval("ok"))
    ask(desk, "ok")
    end(desk)
    fail_overdue(desk)
    with pytest.raises(ApprovalRefused, match="It is over: its status is cancelled"):
        decide(desk, "ok")


def test_an_approval_whose_time_is_over_is_not_decided_any_more(desk: Desk) -> None:
    desk.submit(approval("ok", timeoutSeconds=60))
    ask(desk, "ok", seconds=60)
    desk.alter("UPDATE tasks SET wake_at = now() - interval '1 s'")
    with pytest.raises(ApprovalRefused):
        decide(desk, "ok")
    pause(desk)
    assert wake_due(desk) == [desk.id("ok")]
    with pytest.raises(ApprovalRefused):
        decide(desk, "ok")
    resume(desk)
    assert desk.claim("ok", generation=2).decision is None


# --- Sub-workflows


def test_the_run_of_a_sub_workflow_knows_where_it_comes_from_and_its_task_waits_for_it(
    desk: Desk,
) -> None:
    create(desk, "below", task("p"))
    create(desk, "w", child("x"), task("z"))
    with desk.tx() as tx:
        submission = engine.Submission(
            input={}, labels={"team": "x"}, priority=2, request_id="asked"
        )
        desk.plan = engine.submit_run(tx, find_workflow(tx, "w"), submission)
    plan = begin(desk, "x", input={"n": 1})
    row = desk.task("x")
    assert (row.status, row.reason, row.child_run_id) == ("waiting", "children", plan.run_id)
    assert row.lease_expires_at is None and desk.claim("x") == Elsewhere()
    with at(desk, plan):
        run = desk.run()
        assert (run.parent_task_id, run.depth, run.input) == (row.id, 1, {"n": 1})
        assert (run.labels, run.priority, run.request_id) == ({"team": "x"}, 2, "asked")
        assert desk.do("p").parent_task_id == row.id
    (woken,) = wake_parent(desk, row.id)
    assert woken.task_id == row.id and woken.message == {"of": "child"}
    assert wake_parent(desk, row.id) == [], "once"
    claimed = desk.claim("x")
    assert claimed.child["status"] == "completed" and claimed.expanded


def test_a_sub_workflow_whose_end_nobody_told_of_is_found_by_the_keeper(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    with at(desk, begin(desk, "x")):
        desk.do("p")
    with desk.database.autocommit() as tx:
        assert [woken.task_id for woken in engine.wake_forgotten(tx)] == [desk.id("x")]


def test_a_sub_workflow_begins_once_however_often_it_is_asked(desk: Desk) -> None:
    create(desk, "below", task("p"))
    desk.submit(child("x"))
    claimed = desk.claim("x")
    assert begin_claimed(desk, claimed) is not None
    assert begin_claimed(desk, claimed) is None
    assert desk.rows("SELECT count(*) AS n FROM runs")[0].n == 2


def test_no_workflow_runs_below_itself_nor_more_than_so_many_below_each_other(
    desk: Desk,
) -> None:
    create(desk, "deep-9", task("p"))
    for n in reversed(range(9)):
        create(desk, f"deep-{n}", child("x", f"deep-{n + 1}"))
    with desk.tx() as tx:
        submission = engine.Submission(input={})
        desk.plan = engine.submit_run(tx, find_workflow(tx, "deep-0"), submission)
    for n in range(1, 8):
        desk.plan = begin(desk, "x", f"deep-{n}")
    claimed = desk.claim("x")
    for workflow_id in ("deep-0", "deep-7", "deep-8"):
        with pytest.raises(CannotNest):
            begin_claimed(desk, claimed, workflow_id)
    assert state(desk, "x") == ["running"]


def test_a_sub_workflow_that_refuses_its_input_leaves_nothing_behind(desk: Desk) -> None:
    create(desk, "below", task("p"), inputSchema={"type": "object", "required": ["n"]})
    desk.submit(child("x"))
    claimed = desk.claim("x")
    with pytest.raises(InvalidInput):
        begin_claimed(desk, claimed)
    assert state(desk, "x") == ["running"] and desk.task("x").child_run_id is None
    assert isinstance(desk.fail(claimed, retryable=False), Finished)


def test_a_sub_workflow_of_an_archived_workflow_goes_on_and_none_begins(desk: Desk) -> None:
    create(desk, "below", task("p", retry=ONCE))
    desk.submit(child("x"))
    plan = begin(desk, "x")
    with desk.tx() as tx:
        workflows.archive_workflow(tx, "below", "key:test")
    with at(desk, plan):
        break_down(desk, "p")
    wake_parent(desk, desk.id("x"))
    desk.fail(desk.claim("x"), retryable=False)
    settle(desk)
    assert desk.run().status == "failed"
    retry(desk)
    again = begin(desk, "x")
    assert again.run_id == plan.run_id
    with at(desk, again):
        desk.do("p")
        assert desk.run().status == "completed"
    wake_parent(desk, desk.id("x"))
    desk.fail(desk.claim("x"), retryable=False)
    settle(desk)
    retry(desk, x={"n": 2})  # with other parameters it is run anew
    claimed = desk.claim("x")
    with pytest.raises(WorkflowArchived):
        begin_claimed(desk, claimed)
    assert state(desk, "x") == ["running"]


# --- At the same moment


def tried(control: Callable[[], Any]) -> Callable[[], Any]:
    """Return the control as one whose refusal is its answer."""

    def answer() -> Any:
        try:
            return control()
        except OpsCoreError as error:
            return type(error)

    return answer


def test_of_two_pauses_or_resumes_at_once_one_counts(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), task("b"))
        assert at_once(threads, *[lambda: pause(desk)] * 3) == [None] * 3
        answers = at_once(threads, *[tried(lambda: resume(desk))] * 3)
        assert answers.count(RunNotPaused) == 2
        assert desk.run().generation == 2 and state(desk, "a", "b") == ["pending"] * 2
        assert desk.events() == ["run.queued", "run.paused", "run.resumed"]


def test_after_a_pause_has_committed_nothing_starts(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(*(task(name, dependsOn=[]) for name in "abc"))

        def pause_and_look() -> Any:
            pause(desk)
            return state(desk, *"abc")

        seen, *_ = at_once(
            threads, pause_and_look, *[lambda n=name: desk.claim(n) for name in "abc"]
        )
        assert seen == state(desk, *"abc") and {*seen} <= {"running", "waiting paused"}


def test_a_pause_and_a_resume_at_once_leave_the_run_as_the_later_said(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), task("b"))
        pause(desk)
        _, answer = at_once(threads, tried(lambda: pause(desk)), tried(lambda: resume(desk)))
        expected = {"queued": "pending", "paused": "waiting paused"}[desk.run().status]
        assert state(desk, "a", "b") == [expected] * 2 and isinstance(answer, list)


def test_a_pause_as_the_last_task_ends_leaves_the_run_over(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"))
        running = desk.claim("a")
        paused, finished = at_once(
            threads, tried(lambda: pause(desk)), lambda r=running: desk.complete(r, 1, 1)
        )
        assert paused in (None, RunFinished) and isinstance(finished, Finished)
        assert desk.run().status == "completed"


@pytest.mark.parametrize("other", [pause, resume])
def test_a_cancel_at_the_moment_of_another_control_wins(
    desk: Desk, threads: ThreadPoolExecutor, other: Callable[[Desk], Any]
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), task("b"))
        if other is resume:
            pause(desk)
        at_once(threads, tried(lambda: other(desk)), lambda: cancel(desk))
        assert state(desk, "a", "b") == ["cancelled"] * 2 and desk.claim("a") == Void()
        assert settle(desk) and desk.run().status == "cancelled"


def test_of_two_retries_at_once_one_counts(desk: Desk, threads: ThreadPoolExecutor) -> None:
    for _ in range(ROUNDS):
        desk.submit(each(1), task("z"))
        spread(desk, [1, 2, 3])
        break_down(desk, "f", 0)
        answers = at_once(threads, *[tried(lambda: retry(desk))] * 3)
        assert answers.count(RunNotFailed) == 2
        assert desk.run().generation == 2 and items(desk) == "pmm"
        assert places(desk) == [desk.id("f", 0)]
        cancel(desk)


def test_a_retry_and_a_cancel_at_once_leave_a_run_that_can_end(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), task("b"))
        break_down(desk, "a")
        _, answer = at_once(threads, lambda: retry(desk), tried(lambda: cancel(desk)))
        if answer is RunFinished:
            assert desk.run().status == "queued" and state(desk, "a") == ["pending"]
        else:
            assert settle(desk) and desk.run().status == "cancelled"


def test_an_approval_decided_by_two_at_once_has_one_decision(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(approval("ok"))
        ask(desk, "ok")
        yes, no = at_once(
            threads,
            tried(lambda: decide(desk, "ok", True)),
            tried(lambda: decide(desk, "ok", False)),
        )
        assert [yes, no].count(ApprovalRefused) == 1
        decision = desk.claim("ok").decision
        assert decision["approved"] is (no is ApprovalRefused)
        said = [e for e in desk.events() if e in ("task.approved", "task.rejected")]
        assert said == ["task.approved" if decision["approved"] else "task.rejected"]


def test_a_skip_and_a_cancel_at_once_leave_one_end(desk: Desk, threads: ThreadPoolExecutor) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a", when="false"), task("b"))
        skipped, _ = at_once(threads, lambda: skip(desk, "a"), lambda: cancel(desk))
        assert state(desk, "a") == ["cancelled" if skipped is None else "skipped"]
        ends = [e for e in desk.events() if e in ("task.cancelled", "task.skipped")]
        assert len(ends) == 2, "of each task one"
        assert settle(desk) and desk.run().status == "cancelled"


def test_a_sub_workflow_that_begins_as_its_run_is_cancelled_is_cancelled_or_not_begun(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    create(desk, "below", task("p"))
    for _ in range(ROUNDS):
        desk.submit(child("x"))
        claimed = desk.claim("x")
        plan, _ = at_once(threads, lambda c=claimed: begin_claimed(desk, c), lambda: cancel(desk))
        if plan is None:
            assert state(desk, "x") == ["running"]
        else:
            with at(desk, plan):
                assert desk.claim("p") == Void() and settle(desk)
            assert state(desk, "x") == ["cancelled"]


def test_a_sub_workflow_that_begins_as_its_run_is_paused_is_paused_too(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    create(desk, "below", task("p"))
    for _ in range(ROUNDS):
        desk.submit(child("x"))
        claimed = desk.claim("x")
        plan, _ = at_once(threads, lambda c=claimed: begin_claimed(desk, c), lambda: pause(desk))
        with at(desk, plan):
            assert desk.run().status == "paused" and state(desk, "p") == ["waiting paused"]


def test_a_deadline_at_the_moment_the_last_task_ends_leaves_one_end(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), deadlineSeconds=60)
        running = desk.claim("a")
        pass_deadline(desk)
        failed, finished = at_once(
            threads, lambda: fail_overdue(desk), lambda r=running: desk.complete(r, 1, 1)
        )
        assert isinstance(finished, Finished)
        settle(desk)
        assert desk.run().status == ("failed" if failed else "completed")
