"""Counting: what happened counts once, by whoever did it, and all of it comes together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from stack import wait_until
from test_engine import Desk, agent, desk, taker, task, two_in_line
from test_schedules import Clock

from opscore import agents, engine, metrics, tally
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.errors import InvalidRequest
from opscore.metrics import Teller
from opscore.states import Reason
from opscore.tally import ATTEMPTS, FIRINGS, FREED_TO_NEXT, LATENESS, RUNS_ENDED, RUNS_SUBMITTED

__all__ = ["desk"]


def counted(database: Database, what: tally.Counted) -> dict[tuple[str, ...], float]:
    """Take what a process counted of one thing since this was last asked; the rest is dropped."""
    taken = database.tally.take().items()
    return {labels: row[0] for (name, labels), row in taken if name == what.name}


def told(database: Database, what: tally.Counted) -> dict[tuple[str, ...], tuple[float, list[int]]]:
    """Return what a scrape would tell of one thing."""
    with database.transaction() as tx:
        return dict(metrics.read(tx, None).counts[what])


# --- Counting


def test_what_is_rolled_back_did_not_happen(database: Database) -> None:
    with suppress(ValueError), database.transaction() as tx:
        tally.count(tx, RUNS_SUBMITTED)
        raise ValueError
    assert counted(database, RUNS_SUBMITTED) == {}
    with database.transaction() as tx:
        tally.count(tx, RUNS_SUBMITTED)
        with suppress(ValueError), tally.kept(tx):
            tally.count(tx, RUNS_SUBMITTED)
            raise ValueError
        assert counted(database, RUNS_SUBMITTED) == {}, "it has not committed yet"
    assert counted(database, RUNS_SUBMITTED) == {(): 1}


def test_what_each_statement_commits_by_itself_counts_whatever_comes_next(
    database: Database,
) -> None:
    with suppress(ValueError), database.autocommit() as tx:
        tally.count(tx, RUNS_SUBMITTED)
        raise ValueError
    assert counted(database, RUNS_SUBMITTED) == {(): 1}


def test_a_bucket_ends_with_its_bound(database: Database) -> None:
    low, high = LATENESS.bounds[0], LATENESS.bounds[-1]
    for seconds in (0.0, low, low + 0.001, high, high + 1):
        database.tally.add(LATENESS, value=seconds)
    Teller(database).tell()
    ((_, buckets),) = told(database, LATENESS).values()
    assert (buckets[:2], buckets[-2:], sum(buckets)) == ([2, 1], [1, 1], 5)


# --- Telling


def test_many_who_tell_at_once_lose_nothing_and_count_nothing_twice(
    database: Database, settings: Settings
) -> None:
    def work(number: int) -> None:
        own = Database(settings.database_url, pool_size=2, application="opscore-web")
        teller = Teller(own)
        for step in range(40):
            # In another order each: rows are locked in one.
            for outcome in ATTEMPTS.known[:: 1 if number % 2 else -1]:
                own.tally.add(ATTEMPTS, outcome)
            own.tally.add(LATENESS, value=step)
            teller.tell()
        teller.stop()
        own.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert {value for value, _ in told(database, ATTEMPTS).values()} == {240}
    ((seconds, buckets),) = told(database, LATENESS).values()
    assert (seconds, sum(buckets)) == (6 * sum(range(40)), 240)


def test_a_batch_whose_answer_was_lost_is_told_again_and_counts_once(database: Database) -> None:
    teller = Teller(database, is_steady=True)
    teller.stop()
    database.tally.add(ATTEMPTS, "lost")
    teller._untold, teller._batch = database.tally.take(), teller._batch + 1
    with database.autocommit() as tx:  # and the process does not learn of it
        metrics._TELL(tx, teller._told())
    database.tally.add(ATTEMPTS, "lost")
    teller.tell()
    assert told(database, ATTEMPTS)[("lost",)][0] == 1
    teller.tell()
    assert told(database, ATTEMPTS)[("lost",)][0] == 2


def test_what_could_not_be_told_is_told_later(database: Database) -> None:
    teller = Teller(database, is_steady=True)
    teller.stop()
    rename = "ALTER TABLE {} RENAME TO {}"
    with database.transaction() as tx:
        tx.execute(text(rename.format("metrics", "away")))
    for _ in range(2):
        database.tally.add(ATTEMPTS, "lost")
        with pytest.raises(ProgrammingError):
            teller.tell()
    with database.transaction() as tx:
        tx.execute(text(rename.format("away", "metrics")))
    teller.tell()
    teller.tell()
    assert told(database, ATTEMPTS)[("lost",)][0] == 2


def test_a_process_that_ends_tells_its_last_and_one_with_nothing_to_tell_has_no_thread(
    database: Database,
) -> None:
    teller = Teller(database)
    assert teller._thread is None
    database.tally.add(ATTEMPTS, "lost")
    teller.stop()
    assert told(database, ATTEMPTS)[("lost",)][0] == 1


def test_counts_of_another_version_are_not_told(database: Database) -> None:
    with database.transaction() as tx:
        for name, labels, buckets in (("other", "{}", "{}"), (LATENESS.name, "{}", "{1,2}")):
            tx.execute(
                text(
                    "INSERT INTO metrics VALUES (:n, cast(:l AS text[]), 1, cast(:b AS bigint[]))"
                ),
                {"n": name, "l": labels, "b": buckets},
            )
    assert sum(told(database, LATENESS)[()][1]) == 0


def test_who_finds_no_connection_of_the_pool_is_counted(settings: Settings) -> None:
    small = Database(settings.database_url, pool_size=1, application="worker")
    small._engine.pool._timeout = 0.1  # type: ignore[attr-defined]
    with small.autocommit(), pytest.raises(PoolTimeout), small.autocommit():
        pass
    assert counted(small, tally.POOL_TIMEOUTS) == {("worker",): 1}
    assert small.take_most_used() == 1 and small.take_most_used() == 0
    small.close()


# --- What the engine counts

Act = Callable[[Desk], Any]


def complete(desk: Desk) -> None:
    desk.do("a")


def complete_with_the_next(desk: Desk) -> None:
    claimed = desk.claim("a")
    then = engine.Visit(desk.id("b"), 1, UUID(int=1))
    with desk.database.autocommit() as tx:
        engine.complete_and_claim(tx, claimed, None, then, worker="w", lease_seconds=30)


def fail(desk: Desk) -> None:
    desk.fail(desk.claim("a"))


def fail_for_good(desk: Desk) -> None:
    desk.fail(desk.claim("a"), retryable=False)


def lose(desk: Desk, most: int = 3) -> None:
    desk.claim("a")
    desk.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE attempt = 1")
    with desk.tx() as tx:
        engine.lose_attempt(tx, desk.id("a"), most)


def lose_for_good(desk: Desk) -> None:
    lose(desk, 1)


def time_out(desk: Desk) -> None:
    desk.claim("a")
    desk.alter(
        "UPDATE tasks SET deadline_at = now() - interval '1 s', lease_expires_at = deadline_at"
        " - interval '1 h' WHERE attempt = 1"
    )
    with desk.tx() as tx:
        engine.lose_attempt(tx, desk.id("a"), 3)


def release(desk: Desk, reason: Reason = Reason.AGENT_BUSY) -> None:
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.release_attempt(tx, claimed, reason, message={})


def release_unloaded(desk: Desk) -> None:
    release(desk, Reason.AGENT_UNAVAILABLE)


def hand_back(desk: Desk) -> None:
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.hand_back(tx, claimed.task_id, claimed.run_id, claimed.attempt)


def cancel(desk: Desk) -> None:
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.cancel_run(tx, claimed.run_id)
    with desk.tx() as tx:
        engine.abandon_attempt(tx, claimed)


def cancel_what_an_agent_has(desk: Desk) -> None:
    claimed = desk.claim("a")
    with desk.tx() as tx:
        engine.await_report(tx, claimed, {})
    with desk.tx() as tx:
        engine.cancel_run(tx, claimed.run_id)


def fail_unclaimed(desk: Desk) -> None:
    with desk.tx() as tx:
        engine.fail_unclaimed(tx, desk.id("a"), engine.Failure("no", "no"))


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (complete, "completed"),
        (complete_with_the_next, "completed"),
        (fail, "failed"),
        (fail_for_good, "failed"),
        (time_out, "failed"),
        (lose, "lost"),
        (lose_for_good, "lost"),
        (release, "busy"),
        (release_unloaded, "unavailable"),
        (hand_back, "handed_back"),
        (cancel, "cancelled"),
        (cancel_what_an_agent_has, "cancelled"),
        (fail_unclaimed, None),
    ],
)
def test_every_end_of_an_attempt_counts_once(desk: Desk, act: Act, outcome: str | None) -> None:
    desk.submit(task("a"), task("b"))
    desk.database.tally.take()
    act(desk)
    ends = desk.rows("SELECT * FROM attempts WHERE status <> 'running'")
    assert len(ends) == (outcome is not None)
    assert counted(desk.database, ATTEMPTS) == ({} if outcome is None else {(outcome,): 1})


def test_a_fenced_outcome_counts_for_nobody(desk: Desk) -> None:
    desk.submit(task("a"))
    claimed = desk.claim("a")
    desk.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE attempt = 1")
    with desk.tx() as tx:
        engine.lose_attempt(tx, claimed.task_id, 3)
    desk.database.tally.take()
    desk.complete(claimed)
    desk.fail(claimed)
    assert counted(desk.database, ATTEMPTS) == {}


def test_every_end_of_a_run_counts_once(desk: Desk) -> None:
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("one", capacity=1)])
    ends: dict[str, Act] = {
        "completed": lambda desk: desk.complete(desk.claim("a"), {}, {}),
        "failed": lambda desk: desk.fail(desk.claim("a"), retryable=False),
        "cancelled": lambda desk: None,
    }
    for status, act in ends.items():
        for agent_id in ("echo", "one"):
            run_id = desk.submit(task("a", agent_id)).run_id
            act(desk)
            with desk.tx() as tx:
                if status == "cancelled":
                    engine.cancel_run(tx, run_id)
            for _ in range(2):
                with desk.tx() as tx:
                    engine.settle_run(tx, run_id)
            assert desk.run().status == status
            assert counted(desk.database, RUNS_ENDED) == {(status,): 1}


def test_what_cannot_be_submitted_is_no_run(desk: Desk) -> None:
    desk.database.tally.take()
    desk.submit(task("a"))
    with pytest.raises(InvalidRequest):
        desk.submit({"taskId": "a"})
    assert counted(desk.database, RUNS_SUBMITTED) == {(): 1}


# --- From a freed slot to who is next


def test_who_is_started_by_the_statement_that_frees_the_slot_waited_for_nobody(desk: Desk) -> None:
    first, _ = two_in_line(desk)
    desk.complete(first, take=taker())
    assert counted(desk.database, FREED_TO_NEXT) == {(): 0.0}


@pytest.mark.parametrize("has_slot", [True, False])
def test_the_time_is_that_from_the_slots_end_to_the_claim(desk: Desk, has_slot: bool) -> None:
    first, _ = two_in_line(desk)
    desk.complete(first)
    desk.alter("UPDATE slots SET freed_at = freed_at - interval '3 s'")
    desk.alter("UPDATE tasks SET waiting_since = waiting_since - interval '9 s'")
    desk.database.tally.take()
    assert isinstance(desk.claim("a", has_slot=has_slot), engine.Claimed)
    ((_, seconds),) = counted(desk.database, FREED_TO_NEXT).items()
    assert 3 <= seconds < 8


def test_who_was_sent_away_by_the_agent_itself_did_not_wait_for_a_slot(desk: Desk) -> None:
    desk.submit(task("a", "single"))
    release(desk)
    desk.alter("UPDATE tasks SET not_before = now() - interval '1 s'")
    desk.alter("UPDATE slots SET freed_at = now() - interval '3 s'")
    with desk.database.autocommit() as tx:
        engine.wake_line(tx, "single")
    desk.database.tally.take()
    assert isinstance(desk.claim("a", has_slot=True), engine.Claimed)
    assert counted(desk.database, FREED_TO_NEXT) == {}


def test_a_slot_that_was_free_before_anybody_stood_in_line_kept_nobody_waiting(desk: Desk) -> None:
    desk.submit(task("a", "single"), task("b", "single"))
    desk.do("a")
    desk.alter("UPDATE slots SET freed_at = freed_at - interval '1 h'")
    desk.claim("b")
    assert counted(desk.database, FREED_TO_NEXT) == {}


# --- Schedules, and the keeper


def test_firings_count_by_what_became_of_them_and_by_how_late_they_were(database: Database) -> None:
    with database.transaction() as tx:
        agents.register_functions(tx, [agent("x")])
    clock = Clock(database)
    clock.create(every_seconds=3600.0, overlap="skip")
    clock.pass_by(3600.0 + 30)
    clock.tick()
    taken = database.tally.take()
    assert taken[(FIRINGS.name, ("started",))] == [1]
    seconds, *buckets = taken[(LATENESS.name, ())]
    assert 30 <= seconds < 50 and sum(buckets) == 1
    clock.pass_by(3600.0)
    clock.tick()
    assert counted(database, FIRINGS) == {("skipped",): 1}
    clock.change(overlap="queue")
    clock.pass_by(3600.0)
    clock.tick()
    assert counted(database, FIRINGS) == {("waiting",): 1}
    with database.transaction() as tx:
        tx.execute(
            text(
                "UPDATE runs SET status = 'cancelled', cancel_requested_at = now(),"
                " finished_at = now()"
            )
        )
    clock.tick()
    taken = database.tally.take()
    assert taken[(FIRINGS.name, ("started",))] == [1] and (LATENESS.name, ()) not in taken
    clock.change(overlap="allow", workflow_id="w", version=None)
    clock.execute("UPDATE schedules SET version = 9")
    clock.pass_by(3600.0)
    clock.tick()
    taken = database.tally.take()
    assert taken[(FIRINGS.name, ("failed",))] == [1] and (RUNS_SUBMITTED.name, ()) not in taken


def test_what_the_keeper_sends_again_is_counted(
    desk: Desk, dispatcher: Dispatcher, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opscore.dispatch.IN_HAND_SECONDS", 0.0)
    desk.submit(task("a"))
    desk.alter("UPDATE runs SET generation_at = now() - interval '1 h'")
    desk.alter("UPDATE tasks SET created_at = now() - interval '1 h'")
    dispatcher.database.tally.take()
    with Redis.from_url(settings.redis_url) as redis:
        wait_until(lambda: dispatcher.rescue() or redis.llen("opscore.agents"))
    assert counted(dispatcher.database, tally.RESCUES) == {("run",): 1}


def test_rows_of_processes_that_are_gone_are_forgotten(database: Database) -> None:
    teller = Teller(database, is_steady=True)
    teller.tell()
    teller.stop()

    def processes() -> float:
        with database.transaction() as tx:
            return metrics.read(tx, None).gauges[metrics.PROCESSES].get((database.process,), 0)

    assert processes() == 1
    with database.transaction() as tx:
        tx.execute(text("UPDATE processes SET seen_at = now() - interval '30 s'"))
    assert processes() == 0
    with database.transaction() as tx:
        tx.execute(text("UPDATE processes SET seen_at = now() - interval '2 h'"))
        metrics.forget(tx)
        assert tx.execute(text("SELECT count(*) FROM processes")).scalar() == 0
