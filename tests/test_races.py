"""Two at the same moment, on real connections: who wins, and that nobody is forgotten."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from sqlalchemy import text
from stack import wait_until
from test_engine import Desk, line_of, task

from opscore import engine
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.engine import Claimed, Finished, MustWait, Visit, Woken
from opscore.states import Reason
from workers.keeper import Round

T = TypeVar("T")
ROUNDS = 40


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def at_once(threads: ThreadPoolExecutor, *moves: Callable[[], T]) -> list[T]:
    """Start all moves behind one barrier and return what each came to."""
    barrier = threading.Barrier(len(moves))

    def go(move: Callable[[], T]) -> T:
        barrier.wait(10)
        return move()

    return [future.result(30) for future in [threads.submit(go, move) for move in moves]]


def woken_after(desk: Desk, wake: Callable[[Any], list[engine.Woken]]) -> list[engine.Woken]:
    with desk.database.autocommit() as tx:
        return wake(tx)


def test_of_many_visits_one_claims(desk: Desk, threads: ThreadPoolExecutor) -> None:
    for _ in range(10):
        desk.submit(task("a", "single"))
        answers = at_once(threads, *[lambda: desk.claim("a")] * 12)
        claimed = [answer for answer in answers if isinstance(answer, Claimed)]
        assert len(claimed) == 1
        desk.complete(claimed[0])


def test_the_last_two_dependencies_ending_together_wake_the_join_once(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(
            task("a", dependsOn=[]), task("b", dependsOn=[]), task("c", dependsOn=["a", "b"])
        )
        desk.park("c", desk.claim("c"))
        running = {name: desk.claim(name) for name in "ab"}

        def finish(name: str, running: dict[str, Claimed] = running) -> list[engine.Woken]:
            desk.complete(running[name])
            return woken_after(desk, lambda tx: engine.wake_successors(tx, running[name].task_id))

        woken = at_once(threads, lambda: finish("a"), lambda: finish("b"))
        assert sum(map(len, woken)) == 1


def test_a_join_that_parks_as_its_last_dependency_ends_is_not_forgotten(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("a"), task("b"))
        running = desk.claim("a")
        join = desk.id("b")

        def finish(running: Claimed = running) -> list[engine.Woken]:
            desk.complete(running)
            return woken_after(desk, lambda tx: engine.wake_successors(tx, running.task_id))

        def visit(join: Any = join) -> list[engine.Woken]:
            answer = desk.claim("b")
            if isinstance(answer, Claimed):
                return ["claimed"]  # type: ignore[list-item]
            desk.park("b", answer)
            return woken_after(desk, lambda tx: engine.wake_joins(tx, [join]))

        assert sum(map(len, at_once(threads, finish, visit))) == 1


def test_never_more_holders_than_capacity_and_everybody_gets_a_turn(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    from test_engine import agent

    from opscore import agents

    with desk.tx() as tx:
        agents.register_functions(tx, [agent("trio", 3)])
    names = [f"t{n}" for n in range(24)]
    desk.submit(*(task(name, "trio", dependsOn=[]) for name in names))
    ids = {desk.id(name): name for name in names}
    lock, holding, most = threading.Lock(), set[str](), 0
    kept = set[str]()

    def visit(name: str) -> list[str]:
        """Do what a worker does with one visit; return whom it woke."""
        nonlocal most
        woken: Sequence[Woken] = ()
        answer = desk.claim(name, has_slot=name in kept)
        if isinstance(answer, MustWait):
            desk.park(name, answer)
        elif isinstance(answer, Claimed):
            with lock:
                holding.add(name)
                most = max(most, len(holding))
            threading.Event().wait(0.005)
            with lock:
                holding.discard(name)
            woken = desk.complete(answer).woken
        if not woken:
            woken = woken_after(desk, lambda tx: engine.wake_line(tx, "trio"))
        names = [ids[w.task_id] for w in woken]
        kept.update(names)
        return names

    waiting = names
    while waiting:
        waiting = [name for woken in threads.map(visit, waiting) for name in woken]
    assert most <= 3
    assert {row.status for row in desk.rows("SELECT status FROM tasks WHERE kind = 'agent'")} == {
        "completed"
    }


def test_after_a_cancel_has_committed_nothing_starts(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(*(task(name, dependsOn=[]) for name in "abcd"))

        def cancel() -> None:
            with desk.tx() as tx:
                engine.cancel_run(tx, desk.plan.run_id)

        at_once(threads, cancel, *[lambda n=name: desk.claim(n) for name in "abcd"])
        statuses = [
            (row.status, row.attempt)
            for row in desk.rows("SELECT status, attempt FROM tasks WHERE run_id = :run")
        ]
        assert {*statuses} <= {("running", 1), ("cancelled", 0)}


def test_items_written_while_the_run_is_cancelled_are_cancelled_too(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 2}), task("z"))
        claimed = desk.claim("f")

        def expand(claimed: Claimed = claimed) -> Any:
            with desk.database.autocommit() as tx:
                return engine.expand_task(tx, claimed, list(range(20)), {"m": 1})

        def cancel() -> None:
            with desk.tx() as tx:
                engine.cancel_run(tx, desk.plan.run_id)

        at_once(threads, expand, cancel)
        open_tasks = desk.rows(
            "SELECT status FROM tasks WHERE run_id = :run AND status IN ('pending', 'waiting')"
        )
        assert open_tasks == []
        assert desk.rows("SELECT FROM slots WHERE pool LIKE 'items:%'") == [], "nor hold a slot"


WAITING_FOR_A_LOCK = """SELECT count(*) AS n FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database()"""


def test_a_duplicate_that_waited_for_the_row_does_not_take_what_moved_meanwhile(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    desk.submit(task("a"), task("each", forEach={"items": "${input.n}"}))
    desk.complete(desk.claim("a"))
    with desk.tx() as tx:
        tx.execute(text("SELECT 1 FROM tasks WHERE id = :id FOR UPDATE"), {"id": desk.id("each")})
        duplicate = threads.submit(lambda: desk.claim("each"))
        wait_until(lambda: desk.rows(WAITING_FOR_A_LOCK)[0].n == 1)
        visit = Visit(desk.id("each"), 1, uuid4())
        first = engine.claim_task(tx, visit, worker="w", lease_seconds=30)
        assert isinstance(first, Claimed)
        assert engine.expand_task(tx, first, [1, 2, 3], {"m": 1})
    assert duplicate.result(30) is None, "it saw a pending task; now it must ask again"


@pytest.mark.parametrize("waits_for", ["retry", "its agent"])
def test_a_slot_is_not_handed_to_who_ran_and_waits_for_something_else_meanwhile(
    desk: Desk, threads: ThreadPoolExecutor, waits_for: str
) -> None:
    first, second = line_of(desk, "abc", capacity=2)
    with desk.tx() as tx:
        tx.execute(text("SELECT FROM tasks WHERE id = :id FOR UPDATE"), {"id": first.task_id})
        finish = threads.submit(desk.complete, first)
        wait_until(lambda: desk.rows("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        assert desk.complete(second).woken
        third = desk.claim("c", has_slot=True)
        if waits_for == "retry":
            desk.fail(third, delay=3600)
        else:
            with desk.tx() as other:
                engine.release_attempt(
                    other, third, Reason.AGENT_BUSY, delay_seconds=3600, message={"m": 1}
                )
    finished = finish.result(20)
    assert isinstance(finished, Finished) and finished.woken == ()
    assert not isinstance(desk.claim("c", has_slot=True), Claimed), "an hour too early"


def test_two_failures_at_once_fail_the_run_once_and_never_lock_each_other(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(ROUNDS):
        desk.submit(*(task(name, dependsOn=[]) for name in "abc"))
        running = {name: desk.claim(name) for name in "abc"}

        def fail(name: str, running: dict[str, Claimed] = running) -> Any:
            failed = desk.fail(running[name], retryable=False)
            assert isinstance(failed, Finished)
            with desk.tx() as tx:
                return engine.settle_run(tx, desk.plan.run_id)

        settled = at_once(threads, *[lambda n=name: fail(n) for name in "abc"])
        assert len([ended for ended in settled if ended]) == 1
        assert desk.run().status == "failed" and desk.events().count("run.failed") == 1


def test_cancelling_as_the_last_task_ends_leaves_one_ending(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    from opscore.errors import RunFinished

    for _ in range(ROUNDS):
        desk.submit(task("a"))
        claimed = desk.claim("a")

        def settle() -> None:
            with desk.tx() as tx:
                engine.settle_run(tx, desk.plan.run_id)

        def cancel() -> None:
            try:
                with desk.tx() as tx:
                    engine.cancel_run(tx, desk.plan.run_id)
            except RunFinished:
                return
            settle()

        def finish(claimed: Claimed = claimed) -> None:
            finished = desk.complete(claimed, 1, 1)
            assert isinstance(finished, Finished)
            if finished.ends_run:
                settle()

        at_once(threads, cancel, finish)
        ended = [e for e in desk.events() if e in ("run.completed", "run.cancelled")]
        assert len(ended) == 1 and desk.run().finished_at is not None


def test_one_keeper_acts_at_a_time_and_a_silent_one_is_replaced(
    database: Database, dispatcher: Dispatcher, settings: Settings
) -> None:
    from sqlalchemy import text

    first, second = (Round(database, dispatcher, settings) for _ in range(2))
    assert first.run() and not second.run() and first.run()
    with database.transaction() as tx:
        tx.execute(text("UPDATE leases SET expires_at = now() - interval '1 s'"))
    assert second.run() and not first.run()
    second.resign()
    assert first.run()


def test_two_republishers_raise_the_generation_once(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    plan = desk.submit(task("a"))

    def republish() -> Any:
        with desk.tx() as tx:
            return engine.republish_run(tx, plan.run_id, 1)

    plans = at_once(threads, *[republish] * 8)
    assert [p.generation for p in plans if p is not None] == [2]


def test_a_claim_and_its_own_repetition_never_make_two_attempts(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(10):
        desk.submit(task("a"))
        token = uuid4()
        answers = at_once(threads, *[lambda t=token: desk.claim("a", token=t)] * 4)
        assert desk.task("a").attempt == 1
        assert any(isinstance(answer, Claimed) for answer in answers)


def test_items_released_at_once_are_never_more_than_max_parallel_and_none_is_forgotten(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    desk.submit(task("f", forEach={"items": "${input.n}", "maxParallel": 4}))
    with desk.database.autocommit() as tx:
        engine.expand_task(tx, desk.claim("f"), list(range(60)), {"m": "parent"})
    out = desk.rows(
        "SELECT index FROM tasks WHERE parent_id = :parent AND status = 'pending'",
        parent=desk.id("f"),
    )
    most, done = 0, 0

    def end(index: int) -> list[engine.Woken]:
        desk.complete(desk.claim("f", index))
        return woken_after(desk, lambda tx: engine.wake_parent(tx, desk.id("f")))

    numbers = {desk.id("f", index): index for index in range(60)}
    now = [row.index for row in out]
    while now:
        done += len(now)
        woken = at_once(threads, *[lambda index=index: end(index) for index in now])
        now = [numbers[w.task_id] for each in woken for w in each if w.is_item]
        most = max(most, len(now))
    assert (most, done) == (4, 60)


def test_runs_released_at_once_are_never_more_than_their_workflow_may_have(
    desk: Desk, threads: ThreadPoolExecutor
) -> None:
    for _ in range(30):
        desk.submit(task("a"), id="few", maxConcurrentRuns=7)

    def release() -> int:
        with desk.tx() as tx:
            return len(engine.release_runs(tx, "few"))

    assert sum(at_once(threads, *[release] * 12)) == 7
