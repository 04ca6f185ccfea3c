"""Attempts that an agent behind HTTP has: how they end, and what they hold meanwhile."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from test_agents import Fleet
from test_engine import task
from test_races import at_once

from opscore import agents, engine, reports
from opscore.agentkit import Busy, Completed, Failed, Outcome
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.engine import Claimed, Fenced, Finished, MustWait, Parked
from opscore.errors import ReportRefused, RunFinished
from opscore.reports import Reporter
from opscore.states import Reason
from workers.keeper import Round


class Abroad(Fleet):
    """A fleet with one agent that accepts work and reports later."""

    def __init__(self, database: Database, dispatcher: Dispatcher) -> None:
        super().__init__(database, dispatcher)
        self.token = uuid4()
        self.register("r")

    def give(self, name: str = "a", **more: Any) -> Claimed:
        """Claim a task for the agent, which accepts it."""
        self.token = uuid4()
        claimed = self.claim(name, token=self.token, **more)
        assert isinstance(claimed, Claimed), claimed
        with self.tx() as tx:
            parked = engine.await_report(tx, claimed, message={"of": name})
        assert isinstance(parked, Parked)
        return claimed

    def result(
        self, outcome: Outcome, name: str = "a", token: UUID | None = None
    ) -> reports.Accepted | None:
        with self.tx() as tx:
            reporter = Reporter(self.id(name), "r", token or self.token)
            return reports.accept_result(tx, reporter, outcome)

    def beat(self, name: str = "a") -> engine.Beat:
        with self.tx() as tx:
            return reports.accept_heartbeat(tx, Reporter(self.id(name), "r", self.token))

    def expire(self) -> None:
        self.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE run_id = :run")
        self.keep_house()

    def keep_house(self) -> None:
        """Do what the keeper does, as if PostgreSQL had started long ago."""
        settings = self.dispatcher.settings
        with self.database.autocommit() as tx:
            expired = engine.expired_attempts(tx, 100, 0)
        for task_id in expired:
            with self.tx() as tx:
                engine.lose_attempt(tx, task_id, settings.max_lost)
        Round(self.database, self.dispatcher, settings).settle()

    def slot(self) -> Any:
        (row,) = self.rows_of("SELECT * FROM slots WHERE pool = 'r'")
        return row

    def attempt(self, name: str = "a") -> Any:
        query = "SELECT * FROM attempts WHERE task_id = :id ORDER BY number DESC LIMIT 1"
        (row,) = self.rows_of(query, id=self.id(name))
        return row


@pytest.fixture
def abroad(database: Database, dispatcher: Dispatcher) -> Abroad:
    return Abroad(database, dispatcher)


@pytest.fixture
def threads() -> Any:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_an_accepted_task_waits_as_remote_and_holds_its_slot_and_no_claim(abroad: Abroad) -> None:
    abroad.submit(task("a", "r", timeoutSeconds=60), task("b", "r"))
    claimed = abroad.give()
    row = abroad.task("a")
    assert (row.status, row.reason, row.wake_at) == ("waiting", "remote", None)
    assert row.lease_expires_at == row.deadline_at == abroad.slot().lease_expires_at
    assert abroad.slot().holder == row.id and abroad.attempt().status == "running"
    assert isinstance(abroad.claim("a"), engine.Elsewhere)
    assert abroad.events()[-1] == "task.waiting" and claimed.has_slot


def test_a_result_ends_the_attempt_and_gives_its_visit_out(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"), task("b"))
    abroad.give()
    accepted = abroad.result(Completed({"x": 1}))
    assert accepted is not None and isinstance(accepted.recorded, Finished)
    assert accepted.recorded.message == {"of": "a"}
    assert abroad.task("a").output == {"x": 1} and abroad.slot().holder is None
    assert abroad.slot().average_seconds is not None
    assert isinstance(abroad.claim("a"), engine.Settled)


def test_the_last_result_ends_the_run_with_its_output(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"), input={"n": 2}, output="${tasks.a.output.x + input.n}")
    abroad.give()
    abroad.result(Completed({"x": 1}))
    assert (abroad.run().status, abroad.run().output) == ("completed", 3)


def test_an_output_that_cannot_be_made_fails_the_run(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"), output="${tasks.a.output.x}")
    abroad.give()
    abroad.result(Completed({"y": 1}))
    assert abroad.run().error["code"] == "expression_error"


def test_a_failure_is_tried_again_by_its_saved_visit(abroad: Abroad) -> None:
    abroad.submit(task("a", "r", retry={"maxAttempts": 2}))
    abroad.give()
    accepted = abroad.result(Failed("agent_error", "no"))
    assert accepted is not None and isinstance(accepted.recorded, Parked)
    row = abroad.task("a")
    assert (row.reason, row.tries, row.message) == ("retry", 1, {"of": "a"})
    assert abroad.slot().holder is None
    abroad.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
    abroad.give()
    abroad.result(Failed("agent_error", "no"))
    abroad.keep_house()
    assert abroad.run().status == "failed" and abroad.task("a").error["message"] == "no"


def test_a_failure_that_names_a_time_is_tried_again_after_it(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.give()
    abroad.result(Failed("retry_later", "not yet", retry_after=3600))
    (row,) = abroad.rows_of("SELECT wake_at - now() AS rest FROM tasks WHERE agent_id = 'r'")
    assert 3590 < row.rest.total_seconds() <= 3600


def test_an_agent_that_is_busy_after_all_has_its_task_wait_and_no_attempt_is_counted(
    abroad: Abroad,
) -> None:
    abroad.submit(task("a", "r"), task("b", "r", dependsOn=[]))
    abroad.give()
    accepted = abroad.result(Busy(3600))
    assert accepted is not None and isinstance(accepted.recorded, Parked)
    row, attempt = abroad.task("a"), abroad.attempt()
    assert (row.reason, row.tries, row.lost, row.message) == ("agent_busy", 0, 0, {"of": "a"})
    assert (attempt.status, attempt.error["code"]) == ("cancelled", "agent_busy")
    assert abroad.slot().holder is None
    assert abroad.wait("b") == Reason.AGENT_BUSY and abroad.wake_line("r") == []
    assert abroad.result(Busy(3600)) is None, "the same again is no news"
    abroad.report("r", "idle")
    assert abroad.wake_line("r") == ["a"], "it kept its place in the line"


def test_an_agent_may_be_busy_before_the_worker_heard_that_it_accepted(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    claimed = abroad.claim("a", token=abroad.token)
    assert abroad.result(Busy(0)) is not None
    with abroad.tx() as tx:
        assert isinstance(engine.await_report(tx, claimed, message={}), Fenced)
    abroad.alter("UPDATE tasks SET wake_at = now(), not_before = now() WHERE run_id = :run")
    abroad.report("r", "idle")
    abroad.give()
    abroad.result(Completed(1))
    abroad.keep_house()
    assert abroad.run().status == "completed"


def test_a_result_that_comes_before_the_worker_heard_that_it_was_accepted(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"), task("b"))
    claimed = abroad.claim("a", token=abroad.token)
    assert abroad.result(Completed(1)) is not None
    with abroad.tx() as tx:
        assert isinstance(engine.await_report(tx, claimed, message={}), Fenced)
    assert isinstance(abroad.claim("a", token=abroad.token), engine.Settled)


def test_of_two_results_at_once_one_ends_the_attempt(
    abroad: Abroad, threads: ThreadPoolExecutor
) -> None:
    def report(output: int) -> Any:
        try:
            return abroad.result(Completed(output))
        except ReportRefused as refused:
            return refused

    for _ in range(10):
        abroad.submit(task("a", "r"))
        abroad.give()
        answers = at_once(threads, lambda: report(1), lambda: report(2), lambda: report(3))
        accepted = [a for a in answers if isinstance(a, reports.Accepted)]
        assert len(accepted) == 1 and abroad.task("a").output in (1, 2, 3)
        assert sum(isinstance(a, ReportRefused) for a in answers) == 2


def test_the_same_result_again_is_no_news_and_another_is_refused(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.give()
    abroad.result(Completed(1))
    assert abroad.result(Completed(1)) is None
    with pytest.raises(ReportRefused):
        abroad.result(Completed(2))


def test_a_failed_result_again_is_no_news_while_the_next_attempt_runs(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.give()
    first = abroad.token
    abroad.result(Failed("agent_error", "no"))
    abroad.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
    abroad.give()
    assert abroad.result(Failed("agent_error", "no"), token=first) is None
    with pytest.raises(ReportRefused):
        abroad.result(Completed(1), token=first)
    assert abroad.task("a").reason == "remote"


def test_silence_beyond_the_timeout_ends_the_attempt_as_a_failure(abroad: Abroad) -> None:
    abroad.submit(task("a", "r", retry={"maxAttempts": 2}))
    abroad.give()
    abroad.alter("UPDATE tasks SET deadline_at = now() - interval '1 s' WHERE run_id = :run")
    abroad.expire()
    row = abroad.task("a")
    assert (row.status, row.reason, row.tries, row.lost) == ("waiting", "retry", 1, 0)
    assert abroad.slot().holder is None
    assert abroad.attempt().error["code"] == "timeout"
    with pytest.raises(ReportRefused):
        abroad.result(Completed(1))


def test_a_missed_heartbeat_ends_the_attempt_and_one_in_time_does_not(abroad: Abroad) -> None:
    abroad.change("r", heartbeat_seconds=30)
    abroad.submit(task("a", "r", retry={"maxAttempts": 1}))
    abroad.give()
    row = abroad.task("a")
    assert row.lease_expires_at < row.deadline_at
    abroad.alter("UPDATE tasks SET lease_expires_at = now() + interval '1 s' WHERE run_id = :run")
    beat = abroad.beat()
    assert beat.lease_expires_at == abroad.task("a").lease_expires_at > row.lease_expires_at
    assert not beat.is_ending
    abroad.expire()
    assert abroad.run().status == "failed"
    assert abroad.task("a").error["code"] == "agent_silent"


def test_no_heartbeat_holds_an_attempt_beyond_its_deadline(abroad: Abroad) -> None:
    abroad.change("r", heartbeat_seconds=3000)
    abroad.submit(task("a", "r", timeoutSeconds=10))
    abroad.give()
    assert abroad.beat().lease_expires_at == abroad.task("a").deadline_at


def cancel(abroad: Abroad) -> None:
    with abroad.tx() as tx:
        engine.cancel_run(tx, abroad.plan.run_id)
    with abroad.tx() as tx:
        engine.settle_run(tx, abroad.plan.run_id)


def fail_beside(abroad: Abroad) -> None:
    abroad.fail(abroad.claim("b"), retryable=False)
    with abroad.tx() as tx:
        engine.settle_run(tx, abroad.plan.run_id)


@pytest.mark.parametrize(
    ("end", "status"), [(cancel, "cancelled"), (fail_beside, "failed")], ids=["cancel", "fail"]
)
def test_a_run_that_ends_takes_its_tasks_from_the_agents_and_frees_their_slots(
    abroad: Abroad, end: Callable[[Abroad], None], status: str
) -> None:
    abroad.submit(task("a", "r", dependsOn=[]), task("b", dependsOn=[]))
    abroad.give()
    end(abroad)
    assert abroad.run().status == status and abroad.task("a").status == "cancelled"
    assert abroad.slot().holder is None and abroad.attempt().status == "cancelled"
    for say in (lambda: abroad.result(Completed(1)), abroad.beat):
        with pytest.raises(ReportRefused):
            say()
    with pytest.raises(RunFinished), abroad.tx() as tx:
        engine.cancel_run(tx, abroad.plan.run_id)


def test_a_task_that_was_accepted_in_a_run_that_ends_is_given_up(abroad: Abroad) -> None:
    abroad.submit(task("a", "r", dependsOn=[]), task("b", dependsOn=[]))
    claimed = abroad.claim("a", token=abroad.token)
    cancel(abroad)
    with abroad.tx() as tx:
        ended = engine.await_report(tx, claimed, message={})
    assert isinstance(ended, Finished) and ended.ends_run
    assert abroad.task("a").status == "cancelled" and abroad.slot().holder is None


def test_a_deregistered_agent_loses_what_it_accepted(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.give()
    abroad.deregister("r")
    assert abroad.task("a").reason == "retry" and abroad.slot().holder is None
    with pytest.raises(ReportRefused):
        abroad.result(Completed(1))


def test_who_waits_for_the_slot_is_woken_by_the_result(abroad: Abroad) -> None:
    abroad.submit(*(task(n, "r", dependsOn=[]) for n in "abc"))
    abroad.give("a")
    for name in "bc":
        abroad.wait(name)
    accepted = abroad.result(Completed(1))
    assert accepted is not None and isinstance(accepted.recorded, Finished)
    assert [w.task_id for w in accepted.recorded.woken] == [abroad.id("b")]
    assert [w.queue for w in accepted.recorded.woken] == ["opscore.io"]
    assert isinstance(abroad.claim("c"), MustWait)


def test_a_newer_canvas_finds_an_accepted_task_and_goes_on_after_it(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"), task("b"))
    abroad.give()
    with abroad.tx() as tx:
        engine.republish_run(tx, abroad.plan.run_id, 1)
    assert isinstance(abroad.claim("a", generation=2), engine.Elsewhere)
    with abroad.database.autocommit() as tx:
        assert engine.keep_message(tx, abroad.id("a"), {"of": "second"}, 2) is True
    accepted = abroad.result(Completed(1))
    assert accepted is not None and isinstance(accepted.recorded, Finished)
    assert accepted.recorded.message == {"of": "second"}


# --- Statements that are repeated, or come too late


def test_accepting_can_be_repeated_after_a_lost_answer(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    claimed = abroad.give()
    with abroad.tx() as tx:
        assert isinstance(engine.await_report(tx, claimed, message={"of": "a"}), Parked)
    assert abroad.task("a").reason == "remote" and abroad.events().count("task.waiting") == 1


def test_a_stalled_visit_does_not_park_a_task_that_an_agent_has(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.report("r", "active")
    wait = abroad.claim("a")
    abroad.report("r", "idle")
    abroad.give()
    assert abroad.park("a", wait) is None
    assert abroad.task("a").reason == "remote" and abroad.result(Completed(1)) is not None


def test_neither_a_heartbeat_nor_an_answer_revives_a_lease_that_is_over(abroad: Abroad) -> None:
    abroad.submit(task("a", "r", dependsOn=[]), task("b", "r", dependsOn=[]))
    abroad.give()
    over = "UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE run_id = :run"
    abroad.alter(over + " AND status = 'waiting'")
    with pytest.raises(ReportRefused):
        abroad.beat()
    abroad.keep_house()
    row = abroad.task("a")
    assert (row.status, row.reason, row.tries) == ("waiting", "retry", 1)
    late = abroad.claim("b", token=abroad.token)
    abroad.alter(over + " AND status = 'running'")
    with abroad.tx() as tx:
        assert isinstance(engine.await_report(tx, late, message={}), Fenced)
    assert abroad.task("b").status == "running", "the keeper gives it back"


def test_a_stopping_worker_does_not_take_back_what_an_agent_accepted(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    claimed = abroad.give()
    with abroad.tx() as tx:
        assert not engine.hand_back(tx, claimed.task_id, claimed.run_id, claimed.attempt)
    assert abroad.result(Completed(1)) is not None


def test_an_agent_that_went_silent_is_asked_again_after_a_pause(abroad: Abroad) -> None:
    abroad.change("r", heartbeat_seconds=30)
    abroad.submit(task("a", "r", retry={"backoffSeconds": 1000, "maxBackoffSeconds": 1000}))
    abroad.give()
    abroad.expire()
    seconds = "SELECT extract(epoch FROM wake_at - now()) AS n FROM tasks WHERE run_id = :run"
    assert abroad.rows(seconds)[0].n > 0


def test_a_result_shows_that_its_agent_lives(abroad: Abroad) -> None:
    abroad.submit(task("a", "r"))
    abroad.give()
    abroad.alter("UPDATE agents SET seen_at = now() - interval '1 h'")
    abroad.result(Completed(1))
    (row,) = abroad.rows_of(
        "SELECT now() - seen_at < interval '1 min' AS fresh FROM agents WHERE agent_id = 'r'"
    )
    assert row.fresh


def test_what_an_agent_got_while_it_was_deregistered_is_withdrawn(abroad: Abroad) -> None:
    abroad.change("r", capacity=2)
    abroad.submit(task("a", "r", dependsOn=[]), task("b", "r", dependsOn=[]))
    abroad.give("a")
    with abroad.tx() as tx:
        agents.deregister(tx, "r", datetime.now(UTC))
        late = abroad.claim("b", token=abroad.token)
        with abroad.tx() as other:
            engine.await_report(other, late, message={"of": "b"})
    with pytest.raises(ReportRefused):
        abroad.result(Completed(1), "b")
    abroad.dispatcher.withdraw()
    for name in "ab":
        row = abroad.task(name)
        assert (row.reason, row.tries, row.lost) == ("retry", 0, 0)
    assert abroad.rows_of("SELECT * FROM slots WHERE holder IS NOT NULL") == []
