"""Every change of a run, a task or an attempt: what moves, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from opscore import agents, engine, workflows
from opscore.db import Database, Tx
from opscore.definition import parse
from opscore.engine import (
    Claimed,
    Elsewhere,
    Failure,
    Fenced,
    Finished,
    Impossible,
    MustWait,
    Parked,
    Settled,
    Taker,
    Visit,
    Void,
)
from opscore.errors import AgentNotFound, InvalidInput, InvalidRequest, RunFinished, RunNotFound
from opscore.states import TASK_ARROWS, TASK_ENDED, Reason, TaskStatus


class Desk:
    """One run under test: its tasks by definition id, and short ways to move them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.transaction() as tx:
            agents.register_functions(tx, [agent("echo"), agent("single", capacity=1)])

    def submit(self, *tasks: dict[str, Any], input: Any = None, **document: Any) -> engine.Plan:
        document = {"id": "w", "tasks": list(tasks), **document}
        with self.database.transaction() as tx:
            stored, _ = workflows.create_workflow(tx, parse(document))
            self.plan = engine.submit_run(tx, stored, engine.Submission(input=input or {}))
        return self.plan

    def id(self, name: str, index: int | None = None) -> UUID:
        rows = self.rows("SELECT id, definition_id, index FROM tasks WHERE run_id = :run")
        return next(r.id for r in rows if (r.definition_id, r.index) == (name, index))

    def task(self, name: str, index: int | None = None) -> Any:
        (row,) = self.rows("SELECT * FROM tasks WHERE id = :id", id=self.id(name, index))
        return row

    def run(self) -> Any:
        (row,) = self.rows("SELECT * FROM runs WHERE id = :run")
        return row

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        with self.database.autocommit() as tx:
            return list(tx.execute(text(statement), {"run": self.plan.run_id} | parameters))

    def alter(self, statement: str, **parameters: Any) -> None:
        """Change rows behind the engine's back, such as to age them."""
        with self.database.transaction() as tx:
            tx.execute(text("SET LOCAL session_replication_role = replica"))  # no arrows, no keys
            tx.execute(text(statement), {"run": self.plan.run_id} | parameters)

    def claim(
        self,
        name: str,
        index: int | None = None,
        *,
        generation: int = 1,
        token: UUID | None = None,
        worker: str = "w",
        lease_seconds: float = 30,
        has_slot: bool = False,
    ) -> Any:
        visit = Visit(self.id(name, index), generation, token or uuid4(), has_slot)
        with self.database.autocommit() as tx:
            return engine.claim_task(tx, visit, worker=worker, lease_seconds=lease_seconds)

    def complete(
        self,
        claimed: Claimed,
        output: Any = None,
        run_output: Any = None,
        take: engine.Taker | None = None,
    ) -> Any:
        with self.database.autocommit() as tx:
            return engine.complete_attempt(tx, claimed, output, run_output, take=take)

    def fail(self, claimed: Claimed, *, retryable: bool = True, delay: float = 0) -> Any:
        failure = Failure("broken", "it broke", "Traceback ...", retryable)
        with self.database.transaction() as tx:
            return engine.fail_attempt(tx, claimed, failure, delay_seconds=delay, message={"m": 1})

    def park(self, name: str, wait: MustWait, generation: int = 1) -> bool | None:
        with self.database.autocommit() as tx:
            return engine.park_task(
                tx, self.id(name), wait, message={"of": name}, generation=generation
            )

    def do(self, name: str, output: Any = None) -> Finished:
        finished = self.complete(self.claim(name), output)
        assert isinstance(finished, Finished)
        return finished

    def events(self) -> list[str]:
        return [
            r.type for r in self.rows("SELECT type FROM events WHERE run_id = :run ORDER BY seq")
        ]

    @contextmanager
    def tx(self) -> Iterator[Tx]:
        with self.database.transaction() as tx:
            yield tx


def agent(agent_id: str, capacity: int | None = None, capabilities: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        **{"kind": "function", "agent_id": agent_id, "name": agent_id, "version": "1"},
        capabilities=capabilities,
        capacity=capacity,
    )


def task(name: str, agent_id: str = "echo", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, **more}


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


# --- Submitting


def test_a_submitted_run_has_all_its_tasks_pending_and_an_event(desk: Desk) -> None:
    desk.submit(task("a"), task("b"), input={"x": 1})
    assert desk.run().status == "queued" and desk.run().input == {"x": 1}
    assert [desk.task(n).status for n in "ab"] == ["pending", "pending"]
    assert desk.task("b").depends_on == [desk.id("a")] and desk.task("b").is_sink
    assert desk.events() == ["run.queued"]


def test_several_leaves_are_joined_by_an_implicit_end_which_is_the_only_sink(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    rows = desk.rows("SELECT kind FROM tasks WHERE run_id = :run AND is_sink")
    assert [row.kind for row in rows] == ["end"]


def test_input_that_breaks_the_schema_writes_nothing(desk: Desk) -> None:
    desk.submit(task("a"))
    schema = {"type": "object", "required": ["x"]}
    with pytest.raises(InvalidInput):
        desk.submit(task("a"), inputSchema=schema, id="strict")
    assert desk.rows("SELECT count(*) AS n FROM runs")[0].n == 1


def test_a_task_that_names_nobody_needs_an_agent_to_be_triggered_for(desk: Desk) -> None:
    with pytest.raises(InvalidRequest) as refused:
        desk.submit({"taskId": "a"})
    assert "/tasks/a" in refused.value.errors


def test_a_run_for_an_unknown_agent_is_refused(desk: Desk) -> None:
    with desk.tx() as tx:
        stored, _ = workflows.create_workflow(tx, parse({"id": "w", "tasks": [{"taskId": "a"}]}))
        with pytest.raises(AgentNotFound):
            engine.submit_run(tx, stored, engine.Submission(input={}, agent_id="nobody"))


# --- Claiming


def test_the_first_claim_starts_the_run_and_the_attempt(desk: Desk) -> None:
    desk.submit(task("a"))
    claimed = desk.claim("a")
    assert isinstance(claimed, Claimed) and claimed.attempt == 1
    assert desk.run().status == "running" and desk.task("a").status == "running"
    assert desk.events() == ["run.queued", "run.started", "task.started"]
    (attempt,) = desk.rows("SELECT * FROM attempts")
    assert (attempt.number, attempt.status, attempt.worker) == (1, "running", "w")


def test_the_same_visit_asking_again_gets_the_same_claim(desk: Desk) -> None:
    desk.submit(task("a", "single"))
    token = uuid4()
    assert desk.claim("a", token=token) == desk.claim("a", token=token)


def test_a_task_that_runs_is_elsewhere_for_any_other_visit(desk: Desk) -> None:
    desk.submit(task("a"))
    desk.claim("a")
    assert desk.claim("a") == Elsewhere()


def test_a_task_that_is_over_is_settled(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    desk.do("a")
    assert desk.claim("a") == Settled(1)


def test_a_visit_of_an_older_generation_may_still_do_the_work(desk: Desk) -> None:
    plan = desk.submit(task("a"))
    with desk.tx() as tx:
        engine.republish_run(tx, plan.run_id, 1)
    claimed = desk.claim("a", generation=1)
    assert isinstance(claimed, Claimed) and claimed.generation == 2


def test_a_claim_sees_the_outputs_its_expressions_read_and_no_others(desk: Desk) -> None:
    desk.submit(
        task("a"), task("b"), task("c", parameters={"x": "${tasks.a.output.n}"}), input={"i": 1}
    )
    desk.do("a", {"n": 7})
    desk.do("b", {"n": 8})
    claimed = desk.claim("c")
    assert claimed.tasks["a"] == {"output": {"n": 7}, "status": "completed", "error": None}
    assert "b" not in claimed.tasks and claimed.input == {"i": 1}


def test_a_task_with_open_dependencies_must_wait(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    answer = desk.claim("b")
    assert isinstance(answer, MustWait) and answer.reason == Reason.DEPENDENCIES


def test_an_agent_nobody_registered_is_said_at_once(desk: Desk) -> None:
    desk.submit(task("a", "nobody"))
    answer = desk.claim("a")
    assert isinstance(answer, Impossible) and answer.failure.code == "agent_not_found"


def test_a_capability_nobody_has_is_waited_for(desk: Desk) -> None:
    desk.submit({"taskId": "a", "agentCapability": "rare"})
    answer = desk.claim("a")
    assert isinstance(answer, MustWait) and answer.reason == Reason.AGENT_UNAVAILABLE


def test_a_capability_is_served_by_an_agent_that_has_it(desk: Desk) -> None:
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("expert", 1, ("rare",))])
    desk.submit({"taskId": "a", "agentCapability": "rare"})
    assert desk.claim("a").agent_id == "expert"


def test_a_visit_of_no_task_is_void(desk: Desk) -> None:
    desk.submit(task("a"))
    with desk.database.autocommit() as tx:
        visit = Visit(uuid4(), 1, uuid4())
        answer = engine.claim_task(tx, visit, worker="w", lease_seconds=1)
    assert answer == Void()


# --- Slots


def test_a_slot_is_held_by_one_attempt_and_freed_by_its_outcome(desk: Desk) -> None:
    desk.submit(task("a", "single", dependsOn=[]), task("b", "single", dependsOn=[]))
    first = desk.claim("a")
    answer = desk.claim("b")
    assert isinstance(answer, MustWait) and answer.reason == Reason.AGENT_BUSY
    desk.complete(first)
    assert isinstance(desk.claim("b"), Claimed)


def test_a_freed_slot_is_kept_for_who_waits_longest_and_no_newcomer_takes_it(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "abcd"))
    first = desk.claim("a")
    for name in "bc":
        assert desk.park(name, desk.claim(name)) is False
    (woken,) = desk.complete(first).woken
    assert woken.message == {"of": "b"} and woken.task_id == desk.id("b")
    with desk.database.autocommit() as tx:
        assert engine.wake_line(tx, "single") == [], "there is no other slot"
    assert isinstance(desk.claim("d"), MustWait), "a newcomer"
    assert isinstance(desk.claim("c"), MustWait), "the second in line"
    assert isinstance(desk.claim("b"), Claimed)


def test_who_comes_for_a_slot_that_is_kept_gets_that_slot_and_gives_it_back(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "abc"))
    first = desk.claim("a")
    for name in "bc":
        desk.park(name, desk.claim(name))
    desk.complete(first)
    second = desk.claim("b", has_slot=True)
    assert isinstance(second, Claimed) and second.has_slot and second.agent_id == "single"
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert (slot.holder, slot.attempt, slot.reserved_for) == (second.task_id, 1, None)
    assert slot.lease_expires_at == desk.task("b").lease_expires_at
    assert isinstance(desk.claim("c", has_slot=True), MustWait), "none is kept for it"
    desk.complete(second)
    assert isinstance(desk.claim("c"), Claimed)


def line_of(desk: Desk, names: str, capacity: int = 1) -> list[Claimed]:
    """Submit a task for each name: the first hold the slots of `team`, the others wait in line."""
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("team", capacity)])
    desk.submit(*(task(n, "team", dependsOn=[]) for n in names))
    held = [desk.claim(n) for n in names[:capacity]]
    for name in names[capacity:]:
        desk.park(name, desk.claim(name))
    return held


def lapse(desk: Desk) -> None:
    """Let the time pass that a slot is kept."""
    past = "now() - interval '1 s'"
    desk.alter(f"UPDATE slots SET reserved_until = {past} WHERE reserved_for IS NOT NULL")
    desk.alter(f"UPDATE tasks SET kept_until = {past} WHERE kept_until IS NOT NULL")


def serve(desk: Desk) -> list[Any]:
    """Do what the keeper does for the lines, and return the messages of who was woken."""
    with desk.database.autocommit() as tx:
        lines = engine.agents_to_wake(tx)
        return [woken.message for agent_id in lines for woken in engine.wake_line(tx, agent_id)]


def test_a_slot_that_was_kept_too_long_is_for_whoever_is_first_in_line(desk: Desk) -> None:
    (first,) = line_of(desk, "abc")
    desk.complete(first)
    lapse(desk)
    assert isinstance(desk.claim("c", has_slot=True), MustWait)
    assert isinstance(desk.claim("b", has_slot=True), Claimed), "its turn all the same"


def test_however_long_a_visit_is_on_its_way_its_slot_is_kept_and_nobody_behind_is_woken(
    desk: Desk,
) -> None:
    (first,) = line_of(desk, "abcd")
    assert [woken.message for woken in desk.complete(first).woken] == [{"of": "b"}]
    for _ in range(3):
        lapse(desk)
        assert serve(desk) == [], "there is one slot, and one is on its way to it"
        assert isinstance(desk.claim("c"), MustWait)
    second = desk.claim("b", has_slot=True)
    assert isinstance(second, Claimed)
    assert [woken.message for woken in desk.complete(second).woken] == [{"of": "c"}]


def test_a_slot_freed_meanwhile_is_kept_for_who_is_on_his_way_and_the_next_woken_for_another(
    desk: Desk,
) -> None:
    one, other = line_of(desk, "abcde", capacity=2)
    assert [woken.message for woken in desk.complete(one).woken] == [{"of": "c"}]
    lapse(desk)
    assert desk.complete(other).woken == (), "its own lapsed, and he is the first in line"
    assert serve(desk) == [{"of": "d"}]
    kept = desk.rows("SELECT reserved_for FROM slots WHERE pool = 'team' ORDER BY number")
    assert {row.reserved_for for row in kept} == {desk.id("c"), desk.id("d")}
    assert isinstance(desk.claim("d", has_slot=True), Claimed)
    assert isinstance(desk.claim("c", has_slot=True), Claimed)


def test_who_comes_takes_the_slot_that_is_kept_for_him_and_none_that_was(desk: Desk) -> None:
    one, other = line_of(desk, "abc", capacity=2)
    desk.complete(one)
    lapse(desk)
    desk.complete(other)
    assert isinstance(desk.claim("c"), Claimed)
    slots = desk.rows("SELECT * FROM slots WHERE pool = 'team' ORDER BY number")
    assert [slot.holder for slot in slots] == [None, desk.id("c")]
    assert all(
        slot.reserved_until is None or slot.reserved_until < slot.now
        for slot in desk.rows("SELECT reserved_until, now() FROM slots WHERE pool = 'team'")
    )


def hand_back(desk: Desk, claimed: Claimed) -> bool:
    with desk.tx() as tx:
        return engine.hand_back(tx, claimed.task_id, claimed.run_id, claimed.attempt)


def test_what_a_stopped_worker_hands_back_is_tried_again_with_its_slot_kept_and_nothing_counted(
    desk: Desk,
) -> None:
    (first,) = line_of(desk, "ab")
    assert hand_back(desk, first) and not hand_back(desk, first)
    task = desk.task("a")
    assert (task.status, task.reason, task.lost, task.tries) == ("waiting", "retry", 0, 0)
    assert isinstance(desk.complete(first), engine.Fenced), "the agent went on, to no effect"
    assert serve(desk) == [] and isinstance(desk.claim("b"), MustWait)
    desk.alter("UPDATE tasks SET wake_at = now() WHERE reason = 'retry'")
    again = desk.claim("a")
    assert isinstance(again, Claimed) and (again.attempt, again.has_slot) == (2, True)
    rows = desk.rows("SELECT status, error FROM attempts ORDER BY number")
    assert [row.status for row in rows] == ["cancelled", "running"]
    assert rows[0].error["code"] == "worker_stopped"


def test_what_is_handed_back_in_a_run_that_is_ending_ends(desk: Desk) -> None:
    desk.submit(task("a", "single"), task("b"))
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.cancel_run(tx, claimed.run_id)
    assert hand_back(desk, claimed) and desk.task("a").status == "cancelled"
    with desk.tx() as tx:
        assert engine.settle_run(tx, claimed.run_id)
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert slot.holder is None and desk.run().status == "cancelled"


def test_who_is_parked_again_stands_in_line_as_if_never_woken(desk: Desk) -> None:
    (first,) = line_of(desk, "abc")
    desk.complete(first)
    desk.park("b", MustWait(Reason.AGENT_BUSY, "team"))
    assert desk.task("b").kept_until is None
    lapse(desk)
    assert serve(desk) == [{"of": "b"}]


def test_a_kept_slot_starts_the_run_of_who_waited_before_its_first_task(desk: Desk) -> None:
    desk.submit(task("a", "single"))
    first = desk.claim("a")
    plan = desk.plan
    desk.submit(task("a", "single"))
    desk.park("a", desk.claim("a"))
    assert desk.run().status == "queued"
    (woken,) = desk.complete(first).woken
    assert woken.run_id != plan.run_id
    claimed = desk.claim("a", has_slot=True)
    assert isinstance(claimed, Claimed) and claimed.is_sink and desk.run().status == "running"
    assert desk.events()[-2:] == ["run.started", "task.started"]


def test_a_newcomer_does_not_overtake_who_waits_without_a_reservation(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "abc"))
    first = desk.claim("a")
    desk.park("b", desk.claim("b"))
    desk.complete(first)
    assert isinstance(desk.claim("c"), MustWait)
    assert isinstance(desk.claim("b"), Claimed), "whose turn it is needs no reservation"


def test_a_high_priority_waits_in_front(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "abc"))
    first = desk.claim("a")
    for name in "bc":
        desk.park(name, desk.claim(name))
    desk.alter("UPDATE tasks SET priority = 2 WHERE id = :id", id=desk.id("c"))
    assert [woken.message for woken in desk.complete(first).woken] == [{"of": "c"}]


def test_a_slot_beyond_the_capacity_is_kept_for_nobody(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "ab"))
    first = desk.claim("a")
    desk.park("b", desk.claim("b"))
    desk.alter("UPDATE slots SET closed = true WHERE pool = 'single'")
    assert desk.complete(first).woken == ()
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert (slot.holder, slot.reserved_for) == (None, None)


def test_an_outcome_that_came_too_late_hands_nothing_over(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "ab"))
    late = desk.claim("a")
    desk.park("b", desk.claim("b"))
    desk.alter("UPDATE tasks SET attempt = 2 WHERE id = :id", id=late.task_id)
    assert isinstance(desk.complete(late), Fenced)
    assert desk.task("b").woken_at is None


def test_who_was_handed_the_slot_is_told_again_if_the_answer_was_lost(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "ab"))
    first = desk.claim("a")
    desk.park("b", desk.claim("b"))
    assert desk.complete(first).woken == desk.complete(first).woken != ()


def taker(within: float = 600) -> Taker:
    return Taker(uuid4(), within, worker="taker", lease_seconds=30)


def two_in_line(desk: Desk, **more: Any) -> tuple[Claimed, dict[str, Any]]:
    """Submit a run that holds the slot of `single`, and one that waits for it."""
    desk.submit(task("a", "single"))
    first = desk.claim("a")
    desk.submit(task("a", "single", parameters={"x": "${input.x}"}, **more), input={"x": 1})
    message = {"options": {"task_id": str(desk.id("a"))}, "args": [str(desk.id("a")), 1]}
    with desk.database.autocommit() as tx:
        wait = desk.claim("a")
        engine.park_task(tx, desk.id("a"), wait, message=message, generation=1)
    return first, message


def test_who_is_first_in_line_can_be_started_by_the_statement_that_frees_the_slot(
    desk: Desk,
) -> None:
    first, message = two_in_line(desk)
    finished = desk.complete(first, take=taker())
    assert finished.woken == () and finished.next_message == message
    taken = finished.next
    assert isinstance(taken, Claimed) and taken.has_slot and taken.is_sink
    assert (taken.task_id, taken.attempt, taken.input) == (desk.id("a"), 1, {"x": 1})
    assert desk.events() == ["run.queued", "task.waiting", "run.started", "task.started"]
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert (slot.holder, slot.attempt, slot.reserved_for) == (taken.task_id, 1, None)
    assert slot.lease_expires_at == desk.task("a").lease_expires_at
    (attempt,) = desk.rows("SELECT * FROM attempts WHERE task_id = :id", id=taken.task_id)
    assert (attempt.worker, attempt.agent_id) == ("taker", "single")
    assert desk.task("a").message is None and desk.run().status == "running"
    assert desk.complete(taken).generation == 1 and desk.run().status == "completed"


def test_a_visit_that_is_on_its_way_meanwhile_is_a_duplicate_of_who_was_taken(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    desk.alter("UPDATE tasks SET woken_at = now() WHERE id = :id", id=desk.id("a"))
    assert isinstance(desk.complete(first, take=taker()).next, Claimed)
    assert isinstance(desk.claim("a"), Elsewhere)
    with desk.database.autocommit() as tx:
        assert engine.keep_message(tx, desk.id("a"), {"m": 1}, 1) is False


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tasks SET timeout_seconds = 601 WHERE id = :id",
        "UPDATE tasks SET message = '{}' WHERE id = :id",
    ],
)
def test_who_cannot_be_gone_on_with_is_woken_instead(desk: Desk, change: str) -> None:
    first, _ = two_in_line(desk)
    desk.alter(change, id=desk.id("a"))
    finished = desk.complete(first, take=taker())
    assert finished.next is None and [w.task_id for w in finished.woken] == [desk.id("a")]


def test_nobody_is_taken_into_a_slot_beyond_the_capacity(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    desk.alter("UPDATE slots SET closed = true WHERE pool = 'single'")
    finished = desk.complete(first, take=taker())
    assert finished.next is None and finished.woken == ()
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert (slot.holder, slot.reserved_for) == (None, None)


def test_nobody_of_a_cancelled_run_is_taken(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    desk.alter("UPDATE runs SET cancel_requested_at = now() WHERE id = :run")
    assert desk.complete(first, take=taker()).next is None
    assert desk.task("a").status == "waiting" and desk.run().status == "queued"


def test_who_finishes_waits_for_no_lock_of_the_run_he_would_start(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    with desk.tx() as tx:
        tx.execute(text("SELECT FROM runs WHERE id = :run FOR UPDATE"), {"run": desk.plan.run_id})
        finished = desk.complete(first, take=taker())
    assert finished.next is None and [w.task_id for w in finished.woken] == [desk.id("a")]


def test_an_outcome_that_came_too_late_takes_nobody(desk: Desk) -> None:
    late, _ = two_in_line(desk)
    desk.alter("UPDATE tasks SET attempt = 2 WHERE id = :id", id=late.task_id)
    assert isinstance(desk.complete(late, take=taker()), Fenced)
    assert desk.task("a").status == "waiting" and desk.run().status == "queued"


def test_who_was_taken_is_handed_back_if_the_answer_was_lost(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    take = taker()
    assert desk.complete(first, take=take).next is not None
    again = desk.complete(first, take=take)
    assert isinstance(again, Finished) and again.next is None
    assert (desk.task("a").status, desk.task("a").reason) == ("waiting", "retry")
    assert desk.task("a").lost == desk.task("a").tries == 0
    (slot,) = desk.rows("SELECT * FROM slots WHERE pool = 'single'")
    assert (slot.holder, slot.reserved_for) == (None, desk.id("a"))


def test_somebody_who_waits_for_a_capability_is_handed_the_slot(desk: Desk) -> None:
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("cook", 1, ("cooking",))])
    by_name = task("a", "cook", dependsOn=[])
    desk.submit(by_name, {"taskId": "b", "agentCapability": "cooking", "dependsOn": []})
    first = desk.claim("a")
    desk.park("b", desk.claim("b"))
    (woken,) = desk.complete(first).woken
    assert woken.task_id == desk.id("b")
    assert isinstance(desk.claim("b", has_slot=True), Claimed)


def test_the_slot_of_a_silent_worker_is_free_when_its_lease_is_over(desk: Desk) -> None:
    desk.submit(*(task(n, "single", dependsOn=[]) for n in "ab"))
    silent = desk.claim("a")
    desk.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE attempt = 1")
    assert isinstance(desk.claim("b"), MustWait), "until its attempt is fenced it may still work"
    with desk.database.autocommit() as tx:
        assert engine.renew_leases(tx, {silent.task_id: 1}, 30) == {}, "too late to come back"
    expire(desk)
    assert isinstance(desk.claim("b"), Claimed)


def test_a_smaller_capacity_lets_running_attempts_end_and_admits_no_more(desk: Desk) -> None:
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("pair", 2)])
    desk.submit(*(task(n, "pair", dependsOn=[]) for n in "abc"))
    first, second = desk.claim("a"), desk.claim("b")
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("pair", 1)])
    held = desk.rows("SELECT holder FROM slots WHERE pool = 'pair' AND number = 2")[0].holder
    desk.complete(first if first.task_id == held else second)
    assert isinstance(desk.claim("c"), MustWait)


# --- Finishing


def test_the_last_task_settles_the_run_with_its_output(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    desk.do("a", 1)
    desk.complete(desk.claim("b"), 2, {"sum": 3})
    assert (desk.run().status, desk.run().output) == ("completed", {"sum": 3})
    assert desk.events()[-2:] == ["task.completed", "run.completed"]


def test_an_outcome_written_twice_is_written_once_and_answered_alike(desk: Desk) -> None:
    desk.submit(task("a"))
    claimed = desk.claim("a")
    assert desk.complete(claimed, 1) == desk.complete(claimed, 1)
    assert desk.events().count("task.completed") == 1


def test_a_worker_that_lost_its_lease_can_write_nothing(desk: Desk) -> None:
    desk.submit(task("a"))
    stale = desk.claim("a")
    expire(desk)
    fresh = desk.claim("a")
    assert fresh.attempt == 2
    assert desk.complete(stale, "late") == Fenced()
    assert desk.fail(stale) == Fenced()
    assert isinstance(desk.complete(fresh, "good"), Finished)
    assert desk.task("a").output == "good"
    statuses = desk.rows("SELECT number, status FROM attempts ORDER BY number")
    assert [(r.number, r.status) for r in statuses] == [(1, "lost"), (2, "completed")]


def test_a_lost_for_each_waits_for_its_items_again(desk: Desk) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}"}))
    expand(desk, [1, 2])
    desk.alter("UPDATE tasks SET status = 'completed', finished_at = now() WHERE index IS NOT NULL")
    assert desk.claim("f").expanded, "it collects"
    desk.alter("UPDATE tasks SET status = 'pending', finished_at = NULL WHERE index IS NOT NULL")
    expire(desk)
    assert (desk.task("f").status, desk.task("f").reason) == ("waiting", "children")
    assert desk.claim("f") == Elsewhere(), "its items are not over"


def test_a_retryable_failure_parks_the_task_until_its_moment(desk: Desk) -> None:
    desk.submit(task("a"))
    assert desk.fail(desk.claim("a"), delay=60) == Parked()
    row = desk.task("a")
    assert (row.status, row.reason, row.tries, row.message) == ("waiting", "retry", 1, {"m": 1})
    assert desk.claim("a") == Elsewhere(), "no visit starts it before its time"
    desk.alter("UPDATE tasks SET wake_at = now()")
    with desk.database.autocommit() as tx:
        (woken,) = engine.wake_due(tx, 10).woken
    assert woken.message == {"m": 1}
    assert desk.claim("a").attempt == 2


def test_the_last_allowed_attempt_fails_the_task_and_cancels_what_has_not_started(
    desk: Desk,
) -> None:
    desk.submit(task("a", retry={"maxAttempts": 2}), task("b"))
    desk.fail(desk.claim("a"))
    finished = desk.fail(desk.claim("a"))
    assert isinstance(finished, Finished) and finished.failed_run and finished.ends_run
    assert desk.run().status == "running", "settled after the commit"
    with desk.tx() as tx:
        assert engine.settle_run(tx, desk.plan.run_id)
    assert desk.run().status == "failed" and desk.run().error["code"] == "broken"
    assert (desk.task("b").status, desk.task("b").reason) == ("cancelled", "upstream_failed")
    assert "traceback" not in desk.task("a").error


def test_a_failing_run_waits_for_its_running_attempts_and_keeps_their_outcome(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    running = desk.claim("b")
    desk.fail(desk.claim("a"), retryable=False)
    with desk.tx() as tx:
        assert not engine.settle_run(tx, desk.plan.run_id)
    finished = desk.complete(running, "kept")
    assert finished.ends_run
    with desk.tx() as tx:
        assert engine.settle_run(tx, desk.plan.run_id)
    assert desk.task("b").output == "kept" and desk.run().status == "failed"


def test_a_failure_of_a_failing_run_is_not_tried_again(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    running = desk.claim("b")
    desk.fail(desk.claim("a"), retryable=False)
    assert isinstance(desk.fail(running), Finished)
    assert desk.task("b").status == "failed"


def test_on_failure_continue_lets_the_followers_run(desk: Desk) -> None:
    desk.submit(task("a", onFailure="continue"), task("b"))
    finished = desk.fail(desk.claim("a"), retryable=False)
    assert isinstance(finished, Finished) and not finished.failed_run
    assert isinstance(desk.claim("b"), Claimed)


def test_a_last_task_that_fails_but_goes_on_completes_the_run(desk: Desk) -> None:
    desk.submit(task("a", onFailure="continue"))
    desk.fail(desk.claim("a"), retryable=False)
    desk.complete(desk.claim(""), None, run_output="made at the end")
    assert (desk.run().status, desk.run().output) == ("completed", "made at the end")


def test_an_agent_that_sent_a_task_away_is_not_asked_again_before_its_time(desk: Desk) -> None:
    desk.submit(task("a", "single", dependsOn=[]), task("b", "single", dependsOn=[]))
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.release_attempt(
            tx, claimed, Reason.AGENT_BUSY, delay_seconds=30, message={"of": "a"}
        )
    with desk.database.autocommit() as tx:
        assert engine.wake_line(tx, "single") == [] and engine.agents_to_wake(tx) == []
        assert engine.wake_due(tx, 10).woken == []
    assert desk.claim("a") == Elsewhere(), "not even a stray visit asks"
    assert isinstance(desk.claim("b"), Claimed), "others do not wait behind it"
    desk.alter("UPDATE tasks SET not_before = now(), wake_at = now() WHERE status = 'waiting'")
    with desk.database.autocommit() as tx:
        assert [woken.message for woken in engine.wake_due(tx, 10).woken] == [{"of": "a"}]


def test_busy_gives_the_task_back_without_using_up_an_attempt(desk: Desk) -> None:
    desk.submit(task("a", retry={"maxAttempts": 1}))
    for _ in range(3):
        claimed = desk.claim("a")
        with desk.tx() as tx:
            engine.release_attempt(
                tx, claimed, Reason.AGENT_BUSY, delay_seconds=0, message={"m": 1}
            )
        desk.alter("UPDATE tasks SET not_before = now() WHERE run_id = :run")
    row = desk.task("a")
    assert (row.status, row.reason, row.tries, row.waits) == ("waiting", "agent_busy", 0, 3)
    assert isinstance(desk.complete(desk.claim("a")), Finished)


# --- Parking, waking, generations


def test_a_join_is_woken_by_its_last_dependency_once(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]), task("c", dependsOn=["a", "b"]))
    desk.park("c", desk.claim("c"))
    desk.do("a")
    with desk.database.autocommit() as tx:
        assert engine.wake_successors(tx, desk.id("a")) == []
    desk.do("b")
    with desk.database.autocommit() as tx:
        (woken,) = engine.wake_successors(tx, desk.id("b"))
        assert woken.message == {"of": "c"}
        assert engine.wake_successors(tx, desk.id("a")) == []


def test_a_newer_visit_replaces_a_parked_message_and_an_older_one_does_not(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    wait = desk.claim("b")
    desk.park("b", wait, generation=2)
    assert desk.park("b", wait, generation=1) is None
    assert desk.park("b", wait, generation=3) is False


def test_a_newer_visit_is_kept_while_the_task_runs_and_given_out_when_it_is_over(
    desk: Desk,
) -> None:
    desk.submit(task("a"), task("b"))
    claimed = desk.claim("a", generation=1)
    with desk.database.autocommit() as tx:
        assert not engine.keep_message(tx, desk.id("a"), {"g": 1}, 1), "a duplicate"
        assert engine.keep_message(tx, desk.id("a"), {"g": 2}, 2)
    assert desk.complete(claimed).message == {"g": 2}


def test_a_late_visit_of_an_older_canvas_does_not_fight_the_parked_one(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    desk.park("b", desk.claim("b", generation=2), generation=2)
    assert desk.claim("b", generation=1) == Elsewhere()
    with desk.database.autocommit() as tx:
        assert engine.keep_message(tx, desk.id("b"), {"g": 1}, 1) is False


def test_a_newer_visit_to_a_task_that_just_ended_is_told_to_look_again(desk: Desk) -> None:
    desk.submit(task("a"), task("b"))
    desk.do("a")
    with desk.database.autocommit() as tx:
        assert engine.keep_message(tx, desk.id("a"), {"g": 2}, 2) is None


def test_a_generation_is_raised_once_by_whoever_comes_first(desk: Desk) -> None:
    plan = desk.submit(task("a"), task("b"))
    desk.do("a")
    with desk.tx() as tx:
        again = engine.republish_run(tx, plan.run_id, 1)
        assert again is not None and again.generation == 2
        assert [node.id for node in again.nodes] == [desk.id("b")]
        assert engine.republish_run(tx, plan.run_id, 1) is None


def test_waiting_too_long_for_an_agent_fails_the_task(desk: Desk) -> None:
    desk.submit(
        task("a", "single", dependsOn=[]),
        task("b", "single", dependsOn=[], busy={"maxWaitSeconds": 5}),
    )
    desk.claim("a")
    desk.park("b", desk.claim("b"))
    desk.alter("UPDATE tasks SET waiting_since = now() - interval '6 s', wake_at = now()")
    with desk.database.autocommit() as tx:
        assert engine.wake_due(tx, 10).overdue == [desk.id("b")]
    with desk.tx() as tx:
        gone = engine.fail_overdue(tx, desk.id("b"))
    assert gone is not None and desk.task("b").error["code"] == "agent_busy_timeout"


def test_whoever_waits_for_an_agent_is_looked_at_when_he_has_waited_as_long_as_he_may(
    desk: Desk,
) -> None:
    busy = {"backoffSeconds": 600, "maxBackoffSeconds": 600, "maxWaitSeconds": 5}
    desk.submit(task("a", "single", dependsOn=[]), task("b", "single", dependsOn=[], busy=busy))
    desk.claim("a")
    desk.park("b", desk.claim("b"))
    row = desk.task("b")
    assert row.wake_at - row.waiting_since <= timedelta(seconds=5)


def test_whoever_waits_for_an_agent_that_is_away_is_looked_at_when_his_time_is_up(
    desk: Desk,
) -> None:
    desk.submit(task("a", "single", busy={"maxWaitSeconds": 5}))
    desk.alter("UPDATE agents SET paused = true WHERE agent_id = 'single'")
    desk.park("a", desk.claim("a"))
    desk.alter("UPDATE tasks SET wake_at = now()")
    with desk.database.autocommit() as tx:
        assert engine.wake_due(tx, 10).overdue == []
    row = desk.task("a")
    assert (row.status, row.reason) == ("waiting", "agent_unavailable")
    assert row.wake_at - row.waiting_since <= timedelta(seconds=6)


# --- forEach


def test_a_for_each_holds_no_slot_of_a_fallback(desk: Desk) -> None:
    desk.submit(task("a", "echo", fallback=["single"], forEach={"items": [1]}))
    desk.claim("a")
    (slot,) = desk.rows("SELECT holder FROM slots WHERE pool = 'single'")
    assert slot.holder is None


def test_items_become_tasks_and_their_outputs_come_back_in_item_order(desk: Desk) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}"}, parameters={"v": "${item}"}))
    items = expand(desk, ["x", None, {"y": 1}])
    assert [desk.task("f", n).item for n in range(3)] == ["x", None, {"y": 1}]
    for n in (2, 0, 1):
        desk.complete(desk.claim("f", n), f"out {n}")
    with desk.database.autocommit() as tx:
        (woken,) = engine.wake_parent(tx, desk.id("f"))
        assert engine.item_outputs(tx, desk.id("f")) == (["out 0", "out 1", "out 2"], 0)
    assert woken.message == {"m": "parent"} and len(items) == 3
    assert desk.claim("f").expanded


def test_at_most_max_parallel_items_are_out(desk: Desk) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 2}))
    assert len(expand(desk, list(range(5)))) == 2
    assert desk.task("f", 2).reason == "max_parallel"
    assert desk.claim("f", 2) == Elsewhere(), "a stray visit does not break the limit"
    desk.complete(desk.claim("f", 0))
    with desk.database.autocommit() as tx:
        assert [w.task_id for w in engine.wake_parent(tx, desk.id("f"))] == [desk.id("f", 2)]
        assert engine.wake_parent(tx, desk.id("f")) == []


def places(desk: Desk) -> list[Any]:
    rows = desk.rows("SELECT holder FROM slots WHERE pool LIKE 'items:%' ORDER BY number")
    return [row.holder for row in rows]


def test_items_hold_slots_until_they_are_over_and_who_collects_them_takes_them_away(
    desk: Desk,
) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 2}))
    expand(desk, list(range(3)))
    assert places(desk) == [desk.id("f", 0), desk.id("f", 1)]
    desk.complete(desk.claim("f", 0))
    with desk.database.autocommit() as tx:
        engine.wake_parent(tx, desk.id("f"))
    assert places(desk) == [desk.id("f", 2), desk.id("f", 1)]
    desk.complete(desk.claim("f", 1))
    with desk.database.autocommit() as tx:
        assert engine.wake_parent(tx, desk.id("f")) == []
    assert places(desk) == [desk.id("f", 2), None]
    desk.complete(desk.claim("f", 2))
    with desk.database.autocommit() as tx:
        assert len(engine.wake_parent(tx, desk.id("f"))) == 1
    assert isinstance(desk.claim("f"), Claimed) and places(desk) == []


def test_items_leave_no_slots_though_a_visit_comes_before_the_wake_of_the_last(
    desk: Desk,
) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 2}), task("z"))
    expand(desk, list(range(2)))
    desk.complete(desk.claim("f", 0))
    desk.complete(desk.claim("f", 1))
    collecting = desk.claim("f")
    with desk.database.autocommit() as tx:
        assert engine.wake_parent(tx, desk.id("f")) == []
    assert collecting.expanded and places(desk) == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_ends_takes_the_slots_of_its_items_away(desk: Desk, fails: bool) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 2}))
    expand(desk, list(range(3)))
    assert len(places(desk)) == 2
    if fails:
        desk.fail(desk.claim("f", 0), retryable=False)
    else:
        cancel(desk)
    assert places(desk) == []


def test_an_item_that_fails_for_good_fails_the_whole(desk: Desk) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}"}))
    expand(desk, [1, 2, 3])
    desk.fail(desk.claim("f", 1), retryable=False)
    assert desk.task("f").status == "failed" and desk.task("f").error["code"] == "item_failed"
    assert desk.task("f", 0).status == desk.task("f", 2).status == "cancelled"
    assert desk.run().error["code"] == "broken"


def expand(desk: Desk, values: list[Any]) -> Any:
    claimed = desk.claim("f")
    with desk.database.autocommit() as tx:
        return engine.expand_task(tx, claimed, values, {"m": "parent"})


# --- Cancelling


def test_a_cancelled_run_starts_nothing_and_ends_when_what_runs_has_ended(desk: Desk) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]), task("c", dependsOn=["a"]))
    running = desk.claim("a")
    cancel(desk)
    assert desk.claim("b") == Void()
    assert desk.run().status == "running" and desk.run().cancel_requested_at is not None
    with desk.database.autocommit() as tx:
        assert engine.renew_leases(tx, {running.task_id: 1}, 30) == {running.task_id: True}
    assert desk.complete(running, "done").ends_run
    with desk.tx() as tx:
        assert engine.settle_run(tx, desk.plan.run_id)
    assert desk.run().status == "cancelled" and desk.task("a").output == "done"


def test_cancelling_twice_is_once_and_cancelling_the_finished_is_refused(desk: Desk) -> None:
    desk.submit(task("a"))
    cancel(desk)
    with pytest.raises(RunFinished) as refused:
        cancel(desk)
    assert "cancelled" in str(refused.value)
    assert desk.events().count("run.cancel_requested") == 1
    with desk.tx() as tx, pytest.raises(RunNotFound):
        engine.cancel_run(tx, uuid4())


def cancel(desk: Desk) -> None:
    with desk.tx() as tx:
        engine.cancel_run(tx, desk.plan.run_id)
    with desk.tx() as tx:
        engine.settle_run(tx, desk.plan.run_id)


# --- Leases


def expire(desk: Desk, max_lost: int = 3) -> list[Any]:
    desk.alter(
        "UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE status = 'running'"
    )
    gone = []
    with desk.database.autocommit() as tx:
        expired = engine.expired_attempts(tx, 100)
    for task_id in expired:
        with desk.tx() as tx:
            gone.append(engine.lose_attempt(tx, task_id, max_lost))
    return gone


def test_a_lease_is_renewed_but_never_beyond_the_deadline(desk: Desk) -> None:
    desk.submit(task("a", timeoutSeconds=10))
    claimed = desk.claim("a")
    with desk.database.autocommit() as tx:
        assert engine.renew_leases(tx, {claimed.task_id: 1}, 3600) == {claimed.task_id: False}
        assert engine.renew_leases(tx, {claimed.task_id: 2}, 3600) == {}, "not this attempt"
    row = desk.task("a")
    assert row.lease_expires_at == row.deadline_at


def test_nobody_is_lost_right_after_postgresql_came_back(desk: Desk) -> None:
    desk.submit(task("a"))
    desk.claim("a")
    desk.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s'")
    with desk.database.autocommit() as tx:
        assert engine.expired_attempts(tx, 10, lease_seconds=86_400) == []
        assert engine.expired_attempts(tx, 10, lease_seconds=0) == [desk.id("a")]


def test_a_task_that_loses_its_worker_too_often_fails(desk: Desk) -> None:
    desk.submit(task("a", retry={"maxAttempts": 1}), task("b"))
    for _ in range(2):
        desk.claim("a")
        (gone,) = expire(desk)
        assert gone.finished is None, "a lost attempt is not a failed one"
    desk.claim("a")
    (gone,) = expire(desk)
    assert gone.finished.failed_run and desk.task("a").error["code"] == "worker_lost"


def test_an_attempt_past_its_deadline_counts_as_a_timeout(desk: Desk) -> None:
    desk.submit(task("a", retry={"maxAttempts": 1}))
    desk.claim("a")
    desk.alter("UPDATE tasks SET deadline_at = now() - interval '2 s'")
    (gone,) = expire(desk)
    assert gone.finished is not None and desk.task("a").error["code"] == "timeout"


# --- Arrows and rules

REFUSED = [
    (source, target)
    for source in TaskStatus
    for target in TaskStatus
    if target != source and target not in TASK_ARROWS[source] and source in TASK_ENDED
]


@pytest.mark.parametrize(("source", "target"), REFUSED)
def test_nothing_moves_a_task_that_is_over(
    desk: Desk, source: TaskStatus, target: TaskStatus
) -> None:
    desk.submit(task("a", dependsOn=[]), task("b", dependsOn=[]))
    claimed = desk.claim("a")
    desk.alter(
        "UPDATE tasks SET status = :status, finished_at = now(), lease_expires_at = NULL,"
        " error = '{}' WHERE id = :id",
        status=str(source),
        id=claimed.task_id,
    )
    wait = MustWait(Reason.AGENT_BUSY, None)
    moves = {
        TaskStatus.RUNNING: lambda: desk.claim("a"),
        TaskStatus.WAITING: lambda: (desk.park("a", wait), desk.fail(claimed)),
        TaskStatus.COMPLETED: lambda: desk.complete(claimed),
        TaskStatus.FAILED: lambda: desk.fail(claimed, retryable=False),
        TaskStatus.CANCELLED: lambda: cancel(desk),
        TaskStatus.PENDING: lambda: wake_all(desk),
        TaskStatus.SKIPPED: lambda: expire(desk),
    }
    moves[target]()
    assert desk.task("a").status == source


def wake_all(desk: Desk) -> None:
    with desk.database.autocommit() as tx:
        engine.wake_due(tx, 10)
        engine.wake_forgotten(tx)
        engine.wake_joins(tx, [desk.id("a")])


@pytest.mark.parametrize(
    "broken",
    [
        "UPDATE tasks SET finished_at = now()",
        "UPDATE tasks SET status = 'running'",
        "UPDATE tasks SET status = 'completed'",
        "UPDATE tasks SET status = 'waiting'",
        "UPDATE tasks SET status = 'waiting', reason = 'mood'",
        "UPDATE tasks SET status = 'failed', finished_at = now()",
        "UPDATE tasks SET status = 'strange'",
        "UPDATE runs SET status = 'completed'",
        "UPDATE runs SET status = 'failed', finished_at = now()",
        "UPDATE runs SET status = 'cancelled', finished_at = now()",
        "UPDATE runs SET started_at = now()",
        "UPDATE slots SET holder = gen_random_uuid()",
        "UPDATE slots SET reserved_for = gen_random_uuid()",
        "UPDATE agents SET capacity = 0",
    ],
)
def test_the_tables_refuse_rows_that_contradict_themselves(desk: Desk, broken: str) -> None:
    from sqlalchemy.exc import IntegrityError

    desk.submit(task("a"))
    with pytest.raises(IntegrityError):
        desk.alter(broken)


# --- Runs of one workflow at once


def limited(desk: Desk, most: int = 2) -> engine.Plan:
    return desk.submit(task("a"), id="few", maxConcurrentRuns=most)


def release(desk: Desk) -> list[UUID]:
    with desk.tx() as tx:
        return engine.release_runs(tx, "few")


def test_runs_beyond_the_limit_of_their_workflow_wait_and_begin_in_order(desk: Desk) -> None:
    plans = [limited(desk) for _ in range(5)]
    assert desk.run().reason == "max_concurrent_runs" and plans[0].limited == "few"
    assert isinstance(desk.claim("a"), Void), "nothing of it starts"
    assert release(desk) == [plan.run_id for plan in plans[:2]] and release(desk) == []
    with desk.database.autocommit() as tx:
        assert engine.limited_workflows(tx) == ["few"]
        left = engine.Left("infinity", "infinity", "infinity", first=())
        lost = engine.unvisited_runs(tx, left, 0, 9)
    assert {run_id for run_id, _ in lost} == {plan.run_id for plan in plans[:2]}
    desk.plan = plans[1]
    finished = desk.complete(desk.claim("a"))
    assert finished.frees == "few"
    assert release(desk) == [plans[2].run_id]
    assert "run.released" in desk.events()


def test_a_high_priority_begins_first_and_a_cancelled_run_never(desk: Desk) -> None:
    first, second, third = (limited(desk, 1) for _ in range(3))
    desk.alter("UPDATE runs SET priority = 2 WHERE id = :run")
    desk.plan = first
    with desk.tx() as tx:
        engine.cancel_run(tx, first.run_id)
        assert engine.settle_run(tx, first.run_id)
    assert (desk.run().status, desk.run().reason) == ("cancelled", None)
    assert release(desk) == [third.run_id]
    assert release(desk) == [] and second.limited == "few"


def test_a_run_that_failed_or_was_cancelled_makes_room_too(desk: Desk) -> None:
    first, second = limited(desk, 1), limited(desk, 1)
    assert release(desk) == [first.run_id]
    desk.plan = first
    desk.fail(desk.claim("a"), retryable=False)
    with desk.tx() as tx:
        engine.settle_run(tx, first.run_id)
    assert release(desk) == [second.run_id]


def test_after_its_limit_fell_a_workflow_begins_no_run_until_fewer_are_under_way(
    desk: Desk,
) -> None:
    plans = [limited(desk, 3) for _ in range(3)]
    assert len(release(desk)) == 3
    desk.plan = plans[0]
    desk.complete(desk.claim("a"))
    last = [limited(desk, 1) for _ in range(2)]
    assert release(desk) == []
    desk.plan = plans[1]
    desk.complete(desk.claim("a"))
    assert release(desk) == []
    desk.plan = plans[2]
    desk.complete(desk.claim("a"))
    assert release(desk) == [last[0].run_id]


def test_a_run_that_is_tried_again_waits_for_its_turn_and_holds_none_meanwhile(desk: Desk) -> None:
    first, second = limited(desk, 1), limited(desk, 1)
    assert release(desk) == [first.run_id]
    desk.plan = first
    desk.fail(desk.claim("a"), retryable=False)
    with desk.tx() as tx:
        engine.settle_run(tx, first.run_id)
        engine.retry_run(tx, first.run_id)
    assert (desk.run().status, desk.run().reason) == ("queued", "max_concurrent_runs")
    assert release(desk) == [first.run_id], "it came first"
    desk.complete(desk.claim("a"))
    assert release(desk) == [second.run_id]


def test_the_newest_version_says_how_many_runs_may_be_under_way(desk: Desk) -> None:
    plans = [limited(desk, 1), limited(desk, 10)]
    assert release(desk) == [plan.run_id for plan in plans]
    waiting = limited(desk, 2)
    assert release(desk) == []
    desk.submit(task("b"), id="few")
    assert release(desk) == [waiting.run_id], "the newest has no limit"
