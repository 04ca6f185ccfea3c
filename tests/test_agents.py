"""Agents: what they register and report, which of them gets a task, and who waits for them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from test_engine import Desk, agent, task

from opscore import agents, canvas, engine
from opscore.agents import Registration
from opscore.config import AGENTS_QUEUE
from opscore.db import Database, Tx
from opscore.dispatch import Dispatcher
from opscore.engine import Claimed, Impossible, MustWait
from opscore.engine.clauses import LEAST_REST_SECONDS
from opscore.errors import AgentNotFound, ConfigurationError, InvalidRequest, StaleNotice
from opscore.states import AgentState, Reason
from workers.keeper import Round


class Fleet(Desk):
    """A desk with agents behind HTTP."""

    def __init__(self, database: Database, dispatcher: Dispatcher) -> None:
        super().__init__(database)
        self.dispatcher = dispatcher

    def register(
        self,
        agent_id: str,
        *capabilities: str,
        state: str | None = "idle",
        signed_at: datetime | None = None,
        **changes: Any,
    ) -> None:
        with self.tx() as tx:
            agents.register_remote(
                tx,
                Registration(
                    agent_id=agent_id,
                    name=agent_id,
                    version="1",
                    capabilities=capabilities,
                    contact_endpoint=f"http://agents.example/{agent_id}",
                ),
                signed_at or datetime.now(UTC),
            )
            if changes:
                agents.change(tx, agent_id, changes)
        if state is not None:
            self.report(agent_id, state)

    def report(
        self, agent_id: str, state: str, at: datetime | None = None, details: Any = None
    ) -> None:
        with self.tx() as tx:
            agents.report_state(tx, agent_id, AgentState(state), details, at)

    def change(self, agent_id: str, **values: Any) -> None:
        with self.tx() as tx:
            agents.change(tx, agent_id, values)

    def deregister(self, agent_id: str, signed_at: datetime | None = None) -> None:
        with self.tx() as tx:
            agents.deregister(tx, agent_id, signed_at or datetime.now(UTC))
        self.dispatcher.withdraw()

    def agent(self, agent_id: str) -> Any:
        (row,) = self.rows_of("SELECT * FROM agents WHERE agent_id = :id", id=agent_id)
        return row

    def history(self, agent_id: str) -> list[str]:
        order = "SELECT state FROM agent_reports WHERE agent_id = :id ORDER BY at, id"
        return [row.state for row in self.rows_of(order, id=agent_id)]

    def rows_of(self, statement: str, **parameters: Any) -> list[Any]:
        with self.database.autocommit() as tx:
            return list(tx.execute(text(statement), parameters))

    def wake_line(self, agent_id: str) -> list[str]:
        """Wake who can have a free slot of the agent; returns their names."""
        with self.database.autocommit() as tx:
            woken = engine.wake_line(tx, agent_id)
        return [self.name_of(w.task_id) for w in woken]

    def name_of(self, task_id: Any) -> str:
        (row,) = self.rows_of("SELECT definition_id FROM tasks WHERE id = :id", id=task_id)
        return str(row.definition_id)

    def wait(self, name: str) -> Reason:
        """Visit a task that cannot start and park it; returns its reason."""
        answer = self.claim(name)
        assert isinstance(answer, MustWait), answer
        visit = canvas.visit(
            self.dispatcher.app, self.id(name), 1, timeout_seconds=60, queue=AGENTS_QUEUE
        )
        with self.tx() as tx:
            engine.park_task(tx, self.id(name), answer, message=dict(visit), generation=1)
        return answer.reason

    def upkeep(self) -> None:
        Round(self.database, self.dispatcher, self.dispatcher.settings).wake()


@pytest.fixture
def fleet(database: Database, dispatcher: Dispatcher) -> Fleet:
    return Fleet(database, dispatcher)


def by(capability: str, name: str = "a", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentCapability": capability, "dependsOn": [], **more}


# --- Registration and reports


def test_a_new_agent_is_unknown_and_a_known_one_keeps_its_state_and_settings(fleet: Fleet) -> None:
    fleet.register("r", "cook", state=None)
    assert fleet.agent("r").state == "UNKNOWN" and fleet.history("r") == ["UNKNOWN"]
    fleet.report("r", "idle")
    fleet.change("r", capacity=3, heartbeat_seconds=30)
    fleet.register("r", "bake", state=None)
    row = fleet.agent("r")
    assert (row.state, row.capacity, row.heartbeat_seconds) == ("idle", 3, 30)
    assert row.capabilities == ["bake"] and fleet.history("r") == ["UNKNOWN", "idle"]


def test_any_report_outranks_the_registration_however_old_it_is(fleet: Fleet) -> None:
    fleet.register("r", state=None)
    fleet.report("r", "idle", datetime(2020, 1, 1, tzinfo=UTC))
    assert fleet.agent("r").state == "idle"


def test_a_late_report_is_history_and_a_future_one_counts_as_now(fleet: Fleet) -> None:
    fleet.register("r", state=None)
    now = datetime.now(UTC)
    fleet.report("r", "idle", now - timedelta(seconds=10))
    fleet.report("r", "active", now - timedelta(seconds=20))
    assert fleet.agent("r").state == "idle"
    fleet.report("r", "error", now + timedelta(days=1))
    fleet.report("r", "finished")
    assert fleet.agent("r").state == "finished", "an hour ahead must not outrank what comes later"
    assert fleet.history("r") == ["active", "idle", "UNKNOWN", "error", "finished"]


def test_who_is_not_registered_reports_nothing(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.deregister("r")
    for agent_id in ("r", "nobody"):
        with pytest.raises(AgentNotFound):
            fleet.report(agent_id, "idle")
        with pytest.raises(AgentNotFound):
            fleet.deregister(agent_id)


def test_what_was_signed_before_the_newest_notice_changes_nothing(fleet: Fleet) -> None:
    first, second, third = (datetime.now(UTC) + timedelta(seconds=n) for n in range(3))
    fleet.register("r", state=None, signed_at=first)
    fleet.deregister("r", second)
    with pytest.raises(StaleNotice):
        fleet.register("r", state=None, signed_at=first)
    assert fleet.agent("r").deregistered_at is not None
    fleet.register("r", state=None, signed_at=third)
    with pytest.raises(StaleNotice):
        fleet.deregister("r", second)
    fleet.register("r", state=None, signed_at=third)
    assert fleet.agent("r").deregistered_at is None, "the same once more is harmless"
    fleet.deregister("r", third)
    with pytest.raises(StaleNotice):
        fleet.register("r", state=None, signed_at=third)


def test_a_function_agent_and_one_behind_http_cannot_have_the_same_id(fleet: Fleet) -> None:
    fleet.register("r")
    with fleet.tx() as tx, pytest.raises(ConfigurationError, match="'r'"):
        agents.register_functions(tx, [agent("r")])
    fleet.deregister("r")
    with fleet.tx() as tx:
        agents.register_functions(tx, [agent("r")])
    assert fleet.agent("r").kind == "function" and fleet.agent("r").deregistered_at is None


def test_a_function_agent_is_declared_by_its_module_alone(fleet: Fleet) -> None:
    with pytest.raises(InvalidRequest):
        fleet.register("single", state=None)
    with pytest.raises(InvalidRequest):
        fleet.deregister("single")
    with pytest.raises(InvalidRequest) as refused:
        fleet.change("single", capacity=5)
    assert list(refused.value.errors) == ["/capacity"]


# --- Who is asked


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        ("idle", None),
        ("finished", None),
        ("active", Reason.AGENT_BUSY),
        ("initializing", Reason.AGENT_BUSY),
        (None, Reason.AGENT_BUSY),
        ("error", Reason.AGENT_UNAVAILABLE),
    ],
)
def test_a_remote_agent_is_asked_only_when_it_said_that_it_is_free(
    fleet: Fleet, state: str | None, answer: Reason | None
) -> None:
    fleet.register("r", state=state)
    fleet.submit(task("a", "r"))
    claimed = fleet.claim("a")
    assert isinstance(claimed, Claimed) if answer is None else claimed.reason == answer


CLOSED: list[Callable[[Fleet], None]] = [
    lambda fleet: fleet.change("r", paused=True),
    lambda fleet: fleet.change("r", draining=True),
    lambda fleet: fleet.deregister("r"),
    lambda fleet: fleet.report("r", "error"),
    lambda fleet: fleet.alter(
        "UPDATE agents SET heartbeat_seconds = 5, seen_at = now() - interval '6 s'"
        " WHERE agent_id = 'r'"
    ),
]


@pytest.mark.parametrize("close", CLOSED, ids=["paused", "draining", "gone", "error", "silent"])
def test_an_agent_that_is_away_gets_nothing_and_its_tasks_wait_or_go_elsewhere(
    fleet: Fleet, close: Callable[[Fleet], None]
) -> None:
    fleet.register("r", "cook")
    fleet.submit(
        task("named", "r", dependsOn=[]),
        by("cook", "any"),
        task("safe", "r", dependsOn=[], fallback=["nobody", "other"]),
        by("cook", "also", fallback=["other"]),
    )
    close(fleet)
    assert fleet.wait("named") == Reason.AGENT_UNAVAILABLE
    assert fleet.wait("any") == Reason.AGENT_UNAVAILABLE
    fleet.register("other", capacity=2)
    for name in ("safe", "also"):
        assert fleet.claim(name).agent_id == "other"


def test_a_fallback_is_not_asked_while_the_named_agent_is_merely_busy(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.register("other")
    fleet.submit(task("a", "r", fallback=["other"]))
    assert fleet.wait("a") == Reason.AGENT_BUSY
    assert fleet.task("a").line_agent_id == "r"


def test_a_fallback_is_asked_after_the_named_agent_was_not_there(fleet: Fleet) -> None:
    fleet.register("dead")
    away = engine.Failure("agent_unreachable", "Connection refused.")

    def fail_at(agent_id: str, attempt: int) -> None:
        claimed = fleet.claim("a")
        assert (claimed.agent_id, claimed.attempt) == (agent_id, attempt)
        with fleet.tx() as tx:
            engine.fail_attempt(tx, claimed, away, delay_seconds=0, message={"m": 1})

    fleet.submit(task("a", "dead", fallback=["other"], retry={"maxAttempts": 9}))
    fail_at("dead", 1)
    fail_at("dead", 2)  # there is nobody else
    fleet.register("other")
    fail_at("other", 3)
    fleet.alter("UPDATE slots SET rests_until = now() - interval '1 s'")
    fail_at("dead", 4)


def test_who_waits_for_a_fallback_stands_in_its_line(fleet: Fleet) -> None:
    fleet.register("r", state="error")
    fleet.register("other")
    fleet.submit(*(task(n, "r", dependsOn=[], fallback=["other"]) for n in "ab"))
    first = fleet.claim("a")
    assert fleet.wait("b") == Reason.AGENT_BUSY
    assert [w.task_id for w in fleet.complete(first).woken] == [fleet.id("b")]
    assert fleet.claim("b").agent_id == "other"


def test_an_agent_nobody_ever_registered_fails_the_task_at_once(fleet: Fleet) -> None:
    fleet.submit(task("a", "nobody"))
    answer = fleet.claim("a")
    assert isinstance(answer, Impossible) and answer.failure.code == "agent_not_found"


def test_of_equals_the_least_loaded_is_asked_and_then_who_rested_longest(fleet: Fleet) -> None:
    for name in ("x", "y", "z"):
        fleet.register(name, "cook", capacity=2)
    fleet.submit(*(by("cook", f"t{n}") for n in range(6)))
    asked = [fleet.claim(f"t{n}") for n in range(6)]
    assert sorted(c.agent_id for c in asked[:3]) == ["x", "y", "z"]
    assert sorted(c.agent_id for c in asked[3:]) == ["x", "y", "z"]
    for name in ("y", "x"):
        for claimed in asked:
            if claimed.agent_id == name:
                fleet.complete(claimed)
    fleet.submit(by("cook"))
    assert fleet.claim("a").agent_id == "y"


# --- States of an agent that is at our work


def test_what_an_agent_says_of_our_work_lapses_with_it(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "abc"))
    for state in ("active", "error"):
        first = fleet.claim("a" if state == "active" else "b")
        fleet.report("r", state)
        fleet.complete(first)
    assert isinstance(fleet.claim("c"), Claimed), "it forgot to say that it is idle"


def test_a_report_of_our_work_that_comes_late_lapses_too(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "ab"))
    fleet.complete(fleet.claim("a"))
    fleet.report("r", "active", details={"opscore_task_id": str(fleet.id("a"))})
    assert isinstance(fleet.claim("b"), Claimed)


def test_work_of_others_keeps_an_agent_busy_until_it_says_that_it_is_free(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r"))
    assert fleet.wait("a") == Reason.AGENT_BUSY
    assert fleet.wake_line("r") == []
    fleet.report("r", "idle")
    assert fleet.wake_line("r") == ["a"]


def test_no_report_frees_a_slot(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "ab"))
    assert isinstance(fleet.claim("a"), Claimed)
    fleet.report("r", "idle")
    assert fleet.wait("b") == Reason.AGENT_BUSY and fleet.wake_line("r") == []


def test_an_agent_that_refuses_rests_for_everybody_until_its_time_or_its_word(fleet: Fleet) -> None:
    fleet.register("r", "cook")
    fleet.register("other", "cook", state="error")
    fleet.submit(by("cook", "a"), by("cook", "b"))
    first = fleet.claim("a")
    with fleet.tx() as tx:
        engine.release_attempt(tx, first, Reason.AGENT_BUSY, delay_seconds=3600, message={"m": 1})
    assert fleet.task("a").tries == 0
    assert fleet.wait("b") == Reason.AGENT_BUSY and fleet.wake_line("r") == []
    fleet.report("other", "idle")
    assert fleet.wake_line("other") == ["a"], "another agent may take it at once"
    fleet.report("r", "idle")
    assert fleet.wake_line("r") == ["b"]


def test_a_worker_that_cannot_call_an_agent_does_not_ask_for_it_at_once_again(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.submit(task("a", "r"))
    first = fleet.claim("a")
    with fleet.tx() as tx:
        engine.release_attempt(tx, first, Reason.AGENT_UNAVAILABLE, message={"m": 1})
    assert fleet.wake_line("r") == []


@pytest.mark.parametrize("agent_id", ["r", "single"])
def test_an_agent_that_is_busy_for_no_time_at_all_rests_a_moment(
    fleet: Fleet, agent_id: str
) -> None:
    fleet.register("r")
    fleet.submit(task("a", agent_id))
    first = fleet.claim("a")
    rest = "SELECT cast(extract(epoch FROM wake_at - now()) AS float) FROM tasks WHERE id = :id"
    with fleet.tx() as tx:
        engine.release_attempt(tx, first, Reason.AGENT_BUSY, delay_seconds=0, message={"m": 1})
        assert tx.execute(text(rest), {"id": first.task_id}).scalar() == LEAST_REST_SECONDS


def test_an_agent_that_is_not_there_rests_and_draws_no_work_from_others(fleet: Fleet) -> None:
    fleet.register("dead", "cook")
    fleet.submit(*(by("cook", name) for name in "abc"), task("named", "dead", dependsOn=[]))
    lost = fleet.claim("a")
    away = engine.Failure("agent_unreachable", "Connection refused.")
    with fleet.tx() as tx:
        engine.fail_attempt(tx, lost, away, delay_seconds=0, message={"m": 1})
    (slot,) = fleet.rows_of("SELECT *, rests_until - now() AS rest FROM slots WHERE pool = 'dead'")
    assert slot.failures == 1 and 0 < slot.rest.total_seconds() <= 1
    assert fleet.wait("b") == Reason.AGENT_BUSY and fleet.wake_line("dead") == []
    fleet.register("alive", "cook")
    assert fleet.wake_line("alive") == ["b"]
    named = fleet.claim("named")
    assert isinstance(named, Claimed), "who asks for nobody else has backoff of its own"
    fleet.fail(named)
    fleet.report("dead", "idle")
    assert fleet.claim("c").agent_id == "dead", "it says that it is there again"


def test_each_failure_of_an_agent_doubles_its_rest_and_a_success_ends_it(fleet: Fleet) -> None:
    fleet.register("r")
    away = engine.Failure("agent_unreachable", "Connection refused.")
    for failures in range(1, 9):
        fleet.submit(task("a", "r", retry={"maxAttempts": 1 + failures % 2}))
        claimed = fleet.claim("a")
        with fleet.tx() as tx:
            engine.fail_attempt(tx, claimed, away, message={"m": 1})
            (slot,) = tx.execute(
                text(
                    "SELECT failures, extract(epoch FROM rests_until - now())"
                    " AS rest FROM slots WHERE pool = 'r'"
                )
            )
        assert (slot.failures, slot.rest) == (failures, min(60, 2 ** (failures - 1)))
        fleet.alter("UPDATE slots SET rests_until = now() - interval '1 s'")
    fleet.submit(task("a", "r"))
    fleet.complete(fleet.claim("a"))
    (slot,) = fleet.rows_of("SELECT * FROM slots WHERE pool = 'r'")
    assert (slot.failures, slot.rests_until) == (0, None)


def test_a_task_that_failed_on_an_agent_is_tried_on_another(fleet: Fleet) -> None:
    fleet.register("x", "cook", capacity=2)
    fleet.register("y", "cook", capacity=2)
    fleet.submit(by("cook", "a"), by("cook", "b"))
    first = fleet.claim("a")
    fleet.fail(first)
    if first.agent_id == "x":
        assert fleet.claim("b").agent_id == "y", "so that x does less"
    assert fleet.claim("a").agent_id != first.agent_id


def test_a_refusal_is_remembered_though_the_agent_reports_at_that_moment(fleet: Fleet) -> None:
    fleet.register("r", "cook")
    fleet.submit(by("cook"))
    first = fleet.claim("a")
    with fleet.tx() as tx:
        agents.report_state(tx, "r", AgentState.ACTIVE, {"opscore_task_id": str(fleet.id("a"))})
        with fleet.tx() as other:
            engine.release_attempt(
                other, first, Reason.AGENT_BUSY, delay_seconds=3600, message={"m": 1}
            )
    assert fleet.wake_line("r") == [] and isinstance(fleet.claim("a"), engine.Elsewhere)


def test_the_longest_refusal_counts_and_ends_with_the_agents_word(fleet: Fleet) -> None:
    fleet.register("r", "cook", capacity=2)
    fleet.submit(by("cook", "a"), by("cook", "b"))
    for claimed, seconds in ((fleet.claim("a"), 3600), (fleet.claim("b"), 1)):
        with fleet.tx() as tx:
            engine.release_attempt(
                tx, claimed, Reason.AGENT_BUSY, delay_seconds=seconds, message={"m": 1}
            )
    (row,) = fleet.rows_of(
        "SELECT busy_until - now() > interval '59 min' AS long FROM agents WHERE agent_id = 'r'"
    )
    assert row.long
    fleet.report("r", "idle")
    assert sorted(fleet.wake_line("r")) == ["a", "b"]


def test_no_refusal_is_longer_than_the_task_waits(fleet: Fleet) -> None:
    for agent_id in ("r", "single"):
        if agent_id == "r":
            fleet.register("r")
        fleet.submit(task("a", agent_id, busy={"maxWaitSeconds": 60}))
        first = fleet.claim("a")
        with fleet.tx() as tx:
            engine.release_attempt(
                tx, first, Reason.AGENT_BUSY, delay_seconds=3600, message={"m": 1}
            )
        fleet.alter(
            "UPDATE tasks SET waiting_since = waiting_since - interval '61 s',"
            " wake_at = wake_at - interval '61 s' WHERE run_id = :run"
        )
        fleet.upkeep()
        assert fleet.task("a").error["code"] == "agent_busy_timeout"


def test_a_claim_costs_no_more_with_many_slots(fleet: Fleet) -> None:
    took = {}
    for capacity in (10, 3000):
        fleet.register(f"r{capacity}", f"cook{capacity}", capacity=capacity)
        fleet.submit(*(by(f"cook{capacity}", f"t{n}") for n in range(5)))
        began = monotonic()
        for n in range(5):
            assert isinstance(fleet.claim(f"t{n}"), Claimed)
        took[capacity] = monotonic() - began
    assert took[3000] < took[10] + 1


def held(fleet: Fleet) -> int:
    return len(fleet.rows_of("SELECT FROM slots WHERE holder IS NOT NULL"))


def test_after_its_capacity_fell_an_agent_takes_nothing_until_it_holds_less(fleet: Fleet) -> None:
    fleet.register("r", capacity=4)
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "abcdefg"))
    running = {name: fleet.claim(name) for name in "abcd"}
    for name in "ab":
        fleet.complete(running[name])
    fleet.change("r", capacity=2)
    assert held(fleet) == 2 and isinstance(fleet.claim("e"), MustWait)
    fleet.change("r", capacity=1)
    fleet.complete(running["c"])
    assert held(fleet) == 1 and isinstance(fleet.claim("e"), MustWait)
    fleet.change("r", capacity=3)
    assert [isinstance(fleet.claim(name), Claimed) for name in "efg"] == [True, True, False]
    assert held(fleet) == 3


# --- Waiting


def test_who_waits_for_an_agent_that_comes_back_is_served_in_order(fleet: Fleet) -> None:
    fleet.register("r", state="error")
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "abc"))
    for name in "abc":
        assert fleet.wait(name) == Reason.AGENT_UNAVAILABLE
    fleet.report("r", "idle")
    assert fleet.wake_line("r") == ["a"]
    assert isinstance(fleet.claim("b"), MustWait)
    assert isinstance(fleet.claim("a"), Claimed)


def test_the_keeper_sends_nobody_to_an_agent_that_is_away(fleet: Fleet) -> None:
    fleet.register("r", state="error")
    fleet.submit(task("a", "r"))
    fleet.wait("a")
    fleet.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
    fleet.upkeep()
    assert fleet.task("a").woken_at is None
    fleet.report("r", "idle")
    fleet.upkeep()
    assert fleet.task("a").woken_at is not None


def test_who_stands_in_the_line_of_an_agent_that_went_away_is_sent_to_another(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r", fallback=["other"]))
    assert fleet.wait("a") == Reason.AGENT_BUSY
    fleet.register("other")
    fleet.change("r", paused=True)
    fleet.upkeep()
    assert fleet.task("a").woken_at is not None
    assert fleet.claim("a").agent_id == "other"


def test_the_line_of_an_agent_that_fell_silent_goes_to_its_fallback_at_once(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r", fallback=["other"]))
    fleet.wait("a")
    fleet.alter("UPDATE tasks SET wake_at = now() + interval '1 h' WHERE run_id = :run")
    fleet.upkeep()
    assert fleet.task("a").woken_at is None
    fleet.register("other")
    fleet.alter(
        "UPDATE agents SET heartbeat_seconds = 5, seen_at = now() - interval '6 s'"
        " WHERE agent_id = 'r'"
    )
    fleet.upkeep()
    assert fleet.task("a").woken_at is not None and fleet.claim("a").agent_id == "other"


def test_who_waits_in_a_line_is_looked_at_again_and_again(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r", busy={"maxWaitSeconds": 60}))
    fleet.wait("a")
    for _ in range(3):
        fleet.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
        fleet.upkeep()
        assert fleet.task("a").wake_at is not None
    fleet.alter(
        "UPDATE tasks SET waiting_since = now() - interval '61 s', wake_at = now()"
        " WHERE run_id = :run"
    )
    fleet.upkeep()
    assert fleet.task("a").error["code"] == "agent_busy_timeout"


def test_who_waits_for_a_fallback_goes_back_when_the_named_agent_is_there_again(
    fleet: Fleet,
) -> None:
    fleet.register("r", state="error")
    fleet.register("other")
    fleet.submit(*(task(n, "r", dependsOn=[], fallback=["other"]) for n in "ab"))
    fleet.claim("a")
    fleet.wait("b")
    assert fleet.task("b").line_agent_id == "other"
    fleet.report("r", "idle")
    fleet.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run AND status = 'waiting'")
    fleet.upkeep()
    assert fleet.task("b").woken_at is not None and fleet.claim("b").agent_id == "r"


def test_a_task_that_was_given_out_meanwhile_is_not_overdue(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r", busy={"maxWaitSeconds": 60}))
    fleet.wait("a")
    fleet.report("r", "idle")
    claimed = fleet.claim("a")
    with fleet.tx() as tx:
        engine.await_report(tx, claimed, message={})
    fleet.alter("UPDATE tasks SET waiting_since = now() - interval '61 s' WHERE run_id = :run")
    with fleet.tx() as tx:
        assert engine.fail_overdue(tx, fleet.id("a")) is None
        unclaimed = engine.Failure("agent_not_found", "no")
        assert engine.fail_unclaimed(tx, fleet.id("a"), unclaimed) is None
    assert fleet.task("a").reason == "remote"


def test_who_waits_in_a_line_is_seldom_looked_at_but_never_too_late(fleet: Fleet) -> None:
    fleet.register("r", state="active")
    fleet.submit(task("a", "r", busy={"maxWaitSeconds": 100}), id="short")
    fleet.wait("a")
    short = fleet.plan
    fleet.submit(task("a", "r"))
    fleet.wait("a")
    fleet.alter("UPDATE tasks SET wake_at = now()")
    fleet.upkeep()
    seconds = "SELECT extract(epoch FROM wake_at - now()) AS n FROM tasks WHERE run_id = :run"
    assert 290 < fleet.rows(seconds)[0].n <= 300
    fleet.plan = short
    assert 90 < fleet.rows(seconds)[0].n <= 100


def test_a_task_of_an_agent_that_stays_away_fails_when_its_time_is_over(fleet: Fleet) -> None:
    fleet.register("r", state="error")
    fleet.submit(task("a", "r", busy={"maxWaitSeconds": 60}))
    fleet.wait("a")
    fleet.alter(
        "UPDATE tasks SET waiting_since = now() - interval '61 s', wake_at = now()"
        " WHERE run_id = :run"
    )
    fleet.upkeep()
    assert fleet.task("a").error["code"] == "agent_unavailable"
    assert fleet.run().status == "failed"


def test_what_a_deregistered_agent_had_is_tried_again_and_what_it_says_is_refused(
    fleet: Fleet,
) -> None:
    fleet.register("r", "cook")
    fleet.submit(by("cook"))
    first = fleet.claim("a")
    fleet.deregister("r")
    row = fleet.task("a")
    assert (row.status, row.reason, row.tries, row.lost) == ("waiting", "retry", 0, 0)
    assert isinstance(fleet.complete(first), engine.Fenced)
    (slot,) = fleet.rows_of("SELECT * FROM slots WHERE pool = 'r'")
    assert slot.holder is None
    fleet.register("other", "cook")
    fleet.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
    assert fleet.claim("a").agent_id == "other"


def test_a_draining_agent_ends_what_it_has_and_takes_nothing_new(fleet: Fleet) -> None:
    fleet.register("r")
    fleet.submit(*(task(n, "r", dependsOn=[]) for n in "ab"))
    first = fleet.claim("a")
    assert fleet.wait("b") == Reason.AGENT_BUSY
    fleet.change("r", draining=True)
    assert fleet.complete(first).woken == ()
    assert fleet.wait("b") == Reason.AGENT_UNAVAILABLE
    fleet.change("r", draining=False)
    assert fleet.wake_line("r") == ["b"]


def test_a_paused_function_agent_without_capacity_gets_nothing_either(fleet: Fleet) -> None:
    fleet.submit(task("a"))
    fleet.change("echo", paused=True)
    assert fleet.wait("a") == Reason.AGENT_UNAVAILABLE
    fleet.change("echo", paused=False)
    fleet.upkeep()
    assert fleet.task("a").woken_at is not None


def begin_and_end(tx: Tx, task_id: UUID) -> Iterator[int]:
    """Make a visit to its end; yields how many slots were held meanwhile."""
    one = engine.Visit(task_id, 1, uuid4())
    answer = engine.claim_task(tx, one, worker="w", lease_seconds=30)
    if isinstance(answer, MustWait):
        engine.park_task(tx, task_id, answer, message={}, generation=1)
    elif isinstance(answer, Claimed):
        yield tx.execute(text("SELECT count(*) FROM slots WHERE holder IS NOT NULL")).scalar() or 0
        engine.complete_attempt(tx, answer, None)


def test_never_more_attempts_than_capacity_whatever_changes_at_once(fleet: Fleet) -> None:
    fleet.register("r", capacity=3)
    ids = [fleet.submit(task("a", "r")).nodes[0].id for _ in range(40)]
    held: list[int] = []

    def visit_some(number: int) -> None:
        for task_id in ids[number::8]:
            with fleet.database.autocommit() as tx:
                held.extend(begin_and_end(tx, task_id))

    def disturb() -> None:
        for round in range(10):
            fleet.change("r", capacity=1 + round % 3)

    with ThreadPoolExecutor(10) as pool:
        for future in [*(pool.submit(visit_some, n) for n in range(8)), pool.submit(disturb)]:
            future.result(60)
    assert 1 <= max(held) <= 3
    (running,) = fleet.rows_of("SELECT count(*) AS n FROM tasks WHERE status = 'running'")
    assert running.n == 0


def test_the_visits_of_what_only_remote_agents_do_go_to_their_workers(fleet: Fleet) -> None:
    fleet.register("r", "cook", "walk")
    with fleet.tx() as tx:
        agents.register_functions(tx, [agent("home", capabilities=("walk",))])
    fleet.submit(task("a", "r", dependsOn=[]), by("cook", "b"), by("walk", "c"), task("d"))
    queues = {name: fleet.task(name).queue for name in "abcd"}
    assert queues == {
        "a": "opscore.io",
        "b": "opscore.io",
        "c": "opscore.agents",
        "d": "opscore.agents",
    }
