"""Schedules: each moment decided once, by whoever ticks."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any

import pytest
import structlog
from sqlalchemy import text
from stack import wait_until

from opscore import engine, schedules, workflows
from opscore.config import Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.errors import (
    AgentNotFound,
    InvalidInput,
    InvalidRequest,
    RunFinished,
    ScheduleExists,
    ScheduleNotFound,
    WorkflowArchived,
    WorkflowNotFound,
)
from opscore.expressions import FIRING_NAMES, Template
from opscore.json_values import Faults
from opscore.states import CatchUp, Overlap
from workers.keeper import LIMIT, TIDY_EVERY, Round

MINUTE = 60.0
DAYS_3 = 3 * 86_400.0
DEFAULTS: dict[str, Any] = {
    **{name: None for name in ("version", "agent_id", "cron", "every_seconds")},
    **{"timezone": "UTC", "start_at": None, "end_at": None, "input": {}, "labels": {}},
    **{"enabled": True, "priority": 1, "jitter_seconds": 0.0, "overlap": "allow"},
    **{"catch_up": "all", "catch_up_window_seconds": 86_400.0},
}


class Clock:
    """Schedules of one workflow, and what they fired."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.define()

    def define(self, **more: Any) -> None:
        document = {"id": "w", "tasks": [{"taskId": "a", "agentId": "x"}], **more}
        with self.database.transaction() as tx:
            workflows.create_workflow(tx, parse(document))

    def create(self, name: str = "s", **values: Any) -> list[str]:
        with self.database.transaction() as tx:
            return schedules.create(tx, {**DEFAULTS, "workflow_id": "w", "name": name, **values})

    def change(self, name: str = "s", **values: Any) -> list[str]:
        with self.database.transaction() as tx:
            return schedules.change(tx, name, values)

    def pass_by(self, seconds: float, name: str = "s") -> None:
        """Let the schedule, and all that it did, be so much older."""
        self.set_clock(seconds, name)
        statement = "UPDATE firings SET moment = moment - :age WHERE schedule = :name"
        self.execute(statement, age=timedelta(seconds=seconds), name=name)

    def set_clock(self, seconds: float, name: str = "s") -> None:
        """Set the clock forward, or back, as the schedule sees it; what it is anchored to stays."""
        self.execute(
            "UPDATE schedules SET created_at = created_at - :age, next_at = next_at - :age,"
            " decided_at = decided_at - :age WHERE name = :name",
            age=timedelta(seconds=seconds),
            name=name,
        )

    def execute(self, statement: str, **values: Any) -> Any:
        with self.database.transaction() as tx:
            result = tx.execute(text(statement), values)
            return list(result) if result.returns_rows else []

    def tick(self, limit: int = 50) -> schedules.Fired:
        """Do all that is to be done now."""
        fired = schedules.Fired(has_more=True)
        while fired.has_more:
            fired.has_more = False
            with self.database.transaction() as tx:
                fired.add(schedules.tick(tx, limit))
        return fired

    def firings(self, name: str = "s") -> list[Any]:
        return self.execute("SELECT * FROM firings WHERE schedule = :n ORDER BY moment", n=name)

    def events(self, name: str = "s") -> list[tuple[str, dict[str, Any]]]:
        """Return what was told of a schedule after its creation."""
        query = "SELECT type, data FROM events WHERE schedule = :n ORDER BY seq OFFSET 1"
        return [
            (row.type.removeprefix("schedule."), row.data) for row in self.execute(query, n=name)
        ]

    def statuses(self, name: str = "s") -> list[str]:
        return [firing.status for firing in self.firings(name)]

    def row(self, name: str = "s") -> Any:
        (row,) = self.execute("SELECT * FROM schedules WHERE name = :n", n=name)
        return row

    def end(self, run_id: Any) -> None:
        with self.database.transaction() as tx:
            engine.cancel_run(tx, run_id)
            engine.settle_run(tx, run_id)


@pytest.fixture
def clock(database: Database) -> Clock:
    return Clock(database)


# --- Moments ------------------------------------------------------------------------------------


def test_what_has_come_fires_once(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    assert clock.tick().plans == []
    clock.pass_by(190)
    assert len(clock.tick().plans) == 3
    assert clock.tick().plans == []
    moments = [firing.moment for firing in clock.firings()]
    distances = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert distances == [timedelta(seconds=MINUTE)] * 2


def test_the_moment_stands_in_the_input(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, input={"at": "${firing.at}", "of": "${firing.schedule}"})
    clock.pass_by(61)
    (plan,) = clock.tick().plans
    (firing,) = clock.firings()
    (run,) = clock.execute("SELECT input, schedule FROM runs WHERE id = :id", id=plan.run_id)
    assert datetime.fromisoformat(run.input["at"]) == firing.moment.astimezone(UTC)
    assert (run.input["of"], run.schedule, firing.run_id) == ("s", "s", plan.run_id)


def test_eight_who_tick_at_once_fire_every_moment_once(clock: Clock) -> None:
    names = [f"s{number}" for number in range(20)]
    for name in names:
        clock.create(name, every_seconds=MINUTE)
        clock.pass_by(25.5 * MINUTE, name)
    with ThreadPoolExecutor(8) as beats:
        fired = list(beats.map(lambda _: clock.tick(3), range(8)))
    # Who found every row locked by others has gone home: another tick does what is left.
    run_ids = [plan.run_id for each in [*fired, clock.tick()] for plan in each.plans]
    assert len(run_ids) == len(set(run_ids)) == 20 * 25
    assert sum(bool(each.plans) for each in fired) > 1, "nobody raced"
    for name in names:
        moments = [firing.moment for firing in clock.firings(name)]
        steps = {b - a for a, b in itertools.pairwise(moments)}
        assert len(moments) == 25 and steps == {timedelta(seconds=MINUTE)}


def test_beat_may_die_before_it_published(
    clock: Clock, settings: Settings, dispatcher: Dispatcher
) -> None:
    clock.create(every_seconds=MINUTE)
    clock.pass_by(61)
    (plan,) = clock.tick().plans
    age = "UPDATE runs SET created_at = created_at - :age, generation_at = generation_at - :age"
    clock.execute(age, age=timedelta(minutes=5))
    keeper = Round(clock.database, dispatcher, settings)

    def generation() -> int:
        keeper.rescue()
        (run,) = clock.execute("SELECT generation FROM runs WHERE id = :id", id=plan.run_id)
        return int(run.generation)

    wait_until(generation, says=lambda number: number > 1)
    assert clock.tick().plans == []


@pytest.mark.parametrize(
    ("catch_up", "window", "fired"),
    [("none", MINUTE, 0), ("last", MINUTE, 1), ("all", 7230.0, 2), ("all", 10 * DAYS_3, 72)],
)
def test_beat_was_down_for_three_days(
    clock: Clock, catch_up: str, window: float, fired: int
) -> None:
    clock.create(every_seconds=3600.0, catch_up=catch_up, catch_up_window_seconds=window)
    clock.pass_by(DAYS_3 + 1800)
    assert len(clock.tick().plans) == fired
    row = clock.row()
    newest = row.created_at + timedelta(hours=72)
    assert [f.moment for f in clock.firings()][-1:] == [newest][:fired]
    assert row.next_at == newest + timedelta(hours=1)
    clock.pass_by(1801)
    assert len(clock.tick().plans) == 1


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_a_clock_that_is_set_back_fires_nothing_twice(clock: Clock, catch_up: str) -> None:
    clock.create(every_seconds=600.0, catch_up=catch_up)
    clock.pass_by(605)
    assert len(clock.tick().plans) == 1
    clock.pass_by(-3600)
    assert clock.tick().plans == []
    clock.pass_by(3600)
    assert clock.tick().plans == []
    clock.pass_by(600)
    assert len(clock.tick().plans) == 1


@pytest.mark.parametrize(("catch_up", "fired"), [("none", 0), ("last", 1), ("all", 6)])
def test_a_clock_that_is_set_forward_is_like_a_beat_that_was_down(
    clock: Clock, catch_up: str, fired: int
) -> None:
    clock.create(every_seconds=600.0, catch_up=catch_up)
    clock.pass_by(3600 + 300)
    assert len(clock.tick().plans) == fired


@pytest.mark.parametrize(("catch_up", "fired"), [("none", 1), ("last", 1), ("all", 2)])
def test_with_jitter_it_fires_later_and_no_less(clock: Clock, catch_up: str, fired: int) -> None:
    clock.create(every_seconds=600.0, jitter_seconds=3000.0, catch_up=catch_up)
    row = clock.row()
    delay = (row.next_at - row.created_at).total_seconds() - 600
    assert 0 < delay < 3000
    clock.pass_by(delay + 590)
    assert clock.tick().plans == []
    clock.pass_by(20)
    assert len(clock.tick().plans) == 1
    row = clock.row()
    assert clock.firings()[0].moment == row.created_at + timedelta(seconds=600)
    assert row.next_at == row.created_at + timedelta(seconds=1200 + delay)
    clock.pass_by(1200)
    assert len(clock.tick().plans) == fired


def test_nothing_fires_before_it_starts_and_after_it_ends(clock: Clock) -> None:
    now = datetime.now(UTC)
    start, end = now + timedelta(minutes=10), now + timedelta(minutes=20)
    clock.create(every_seconds=300.0, start_at=start, end_at=end)
    assert clock.row().next_at == start
    statement = "UPDATE schedules SET start_at = start_at - :age, end_at = end_at - :age"
    clock.execute(statement, age=timedelta(hours=1))
    clock.pass_by(3600)
    assert len(clock.tick().plans) == 3
    assert clock.row().next_at is None and clock.row().enabled


def test_what_is_yet_to_come_by_its_jitter_is_not_lost_by_a_pause(clock: Clock) -> None:
    clock.create(every_seconds=600.0, jitter_seconds=3000.0)
    row = clock.row()
    delay = (row.next_at - row.created_at).total_seconds() - 600
    assert delay > 30
    clock.pass_by(600 + delay / 2)  # its moment has come, its time has not
    due = clock.row().next_at
    clock.change(enabled=False)
    with clock.database.transaction() as tx:
        first, *_ = schedules.preview(tx, "s", 3)
    clock.change(enabled=True)
    assert clock.row().next_at == due == first + timedelta(seconds=delay)
    with clock.database.transaction() as tx:
        assert schedules.preview(tx, "s", 1) == [first]
    clock.pass_by(delay / 2 + 1)
    assert len(clock.tick().plans) == 1
    clock.change(enabled=False)
    clock.pass_by(600)
    clock.change(enabled=True)
    assert clock.tick().plans == [], "what is missed while it is paused stays missed"


def test_after_a_wrong_clock_a_pause_has_a_schedule_go_on_and_fire_nothing_twice(
    clock: Clock,
) -> None:
    clock.create(every_seconds=600.0)
    clock.pass_by(1205)
    assert len(clock.tick().plans) == 2
    clock.set_clock(-1200)  # `created_at` and the moments stay where they are in time
    clock.execute("UPDATE firings SET moment = moment + interval '1200 seconds'")
    assert clock.row().next_at > datetime.now(UTC) + timedelta(seconds=1200)
    assert clock.tick().plans == []
    for enabled in (False, True):
        clock.change(enabled=enabled)
    assert clock.row().next_at < datetime.now(UTC) + timedelta(seconds=600)
    for fires in (0, 0, 1):
        clock.pass_by(600)
        assert len(clock.tick().plans) == fires
    runs = [firing.run_id for firing in clock.firings()]
    assert len(runs) == len(set(runs)) == 3


def test_every_second_and_up_to_a_day_later_it_fires_every_second(clock: Clock) -> None:
    clock.create(every_seconds=1.0, jitter_seconds=86_400.0, catch_up="none")
    row = clock.row()
    delay = (row.next_at - row.created_at).total_seconds() - 1
    assert 60 < delay < 86_400
    clock.pass_by(delay)
    assert clock.tick().plans == []
    for _ in range(3):
        clock.pass_by(1)
        assert len(clock.tick().plans) == 1
    first = clock.firings()[0].moment
    assert first == clock.row().created_at + timedelta(seconds=1)
    assert clock.row().next_at - clock.firings()[-1].moment == timedelta(seconds=delay + 1)


@pytest.mark.parametrize(("catch_up", "fired"), [("none", 0), ("last", 1), ("all", 3)])
@pytest.mark.parametrize("missed", [0.0, -0.001])
def test_an_end_that_is_a_moment_fires_and_none_after_it(
    clock: Clock, catch_up: str, fired: int, missed: float
) -> None:
    clock.create(every_seconds=MINUTE, catch_up=catch_up)
    row = clock.row()
    end = row.created_at + timedelta(seconds=3 * MINUTE + missed)
    clock.execute("UPDATE schedules SET end_at = :end", end=end)
    clock.set_clock(DAYS_3)
    statement = "UPDATE schedules SET end_at = end_at - :age, catch_up_window_seconds = 400000"
    clock.execute(statement, age=timedelta(seconds=DAYS_3))
    count = min(fired, 3 if missed == 0 else 2)
    assert len(clock.tick().plans) == count
    end = clock.row().end_at
    assert clock.row().next_at is None and all(firing.moment <= end for firing in clock.firings())
    assert clock.tick().plans == []


def test_a_schedule_of_a_version_fires_whatever_the_newest_wants(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, version=1)
    clock.define(inputSchema={"required": ["ticket"]})
    clock.pass_by(61)
    (plan,) = clock.tick().plans
    (run,) = clock.execute("SELECT version FROM runs WHERE id = :id", id=plan.run_id)
    assert run.version == 1
    clock.change(priority=2)
    with pytest.raises(InvalidInput):
        clock.change(version=None)
    with pytest.raises(InvalidInput):
        clock.change(version=2)


# --- Overlap ------------------------------------------------------------------------------------


def test_a_run_that_is_not_over_is_not_overlapped(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="skip")
    clock.pass_by(130)
    (plan,) = clock.tick().plans
    first, second = clock.firings()
    assert (first.status, second.status) == ("started", "skipped")
    assert second.error == {"code": "overlap", "message": f"Run {plan.run_id} is not over."}
    clock.end(plan.run_id)
    clock.pass_by(60)
    assert len(clock.tick().plans) == 1


def test_a_run_that_waits_for_its_turn_is_not_over(clock: Clock) -> None:
    clock.define(maxConcurrentRuns=1)
    clock.create("other", every_seconds=MINUTE)
    clock.create(every_seconds=MINUTE, overlap="skip")
    for name in ("other", "s"):
        clock.pass_by(61, name)
        clock.tick()
    assert [row.reason for row in clock.execute("SELECT DISTINCT reason FROM runs")] == [
        "max_concurrent_runs"
    ]
    clock.pass_by(60)
    assert clock.tick().plans == []
    assert clock.statuses() == ["started", "skipped"]


def test_firings_wait_for_the_run_before(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(190)
    (plan,) = clock.tick().plans
    assert clock.statuses() == ["started", "waiting", "waiting"]
    assert clock.tick().plans == []
    clock.end(plan.run_id)
    clock.execute("UPDATE firings SET decided_at = decided_at - interval '1 hour'")
    assert len(clock.tick().plans) == 1
    assert clock.statuses() == ["started", "started", "waiting"]
    first, second, _ = clock.firings()
    assert second.decided_at - first.decided_at > timedelta(minutes=59)


def test_one_of_eight_who_tick_starts_the_firing_that_waits(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(190)
    (plan,) = clock.tick().plans
    clock.end(plan.run_id)
    with ThreadPoolExecutor(8) as beats:
        fired = list(beats.map(lambda _: clock.tick(), range(8)))
    assert sum(len(each.plans) for each in fired) == 1
    assert clock.statuses() == ["started", "started", "waiting"]


def test_a_queue_has_an_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "LONGEST_QUEUE", 2)
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(5 * MINUTE + 1)
    clock.tick()
    assert clock.statuses() == ["started", "waiting", "waiting", "skipped", "skipped"]
    assert clock.firings()[-1].error["code"] == "queue_full"


def test_nothing_waits_any_more_once_firings_do_not(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(130)
    clock.tick()
    clock.change(overlap="allow")
    assert clock.statuses() == ["started", "skipped"]


def test_what_waits_while_a_schedule_is_paused_goes_on_waiting(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(130)
    (plan,) = clock.tick().plans
    clock.change(enabled=False)
    clock.end(plan.run_id)
    assert clock.tick().plans == []
    clock.change(enabled=True)
    assert len(clock.tick().plans) == 1


def test_a_full_queue_outlives_a_pause_and_goes_on_in_order(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(130.5 * MINUTE)
    (plan,) = clock.tick().plans
    expected = ["started"] + ["waiting"] * 100 + ["skipped"] * 29
    assert clock.statuses() == expected
    clock.change(enabled=False)
    clock.end(plan.run_id)
    clock.pass_by(10 * MINUTE)
    assert clock.tick().plans == [] and clock.statuses() == expected
    clock.change(enabled=True)
    for number in range(1, 4):
        (plan,) = clock.tick().plans
        assert clock.firings()[number].run_id == plan.run_id
        assert clock.tick().plans == []
        clock.end(plan.run_id)
    clock.change(enabled=False)
    clock.change(overlap="skip")
    assert clock.statuses() == ["started"] * 4 + ["skipped"] * 126
    told = [data["reason"] for type, data in clock.events() if type == "skipped"]
    assert told == ["queue_full"] * 29 + ["overlap"] * 97


def test_paused_schedules_stand_in_nobodys_way(clock: Clock) -> None:
    for name in ("a", "b", "c"):
        clock.create(name, every_seconds=MINUTE, overlap="queue")
        clock.pass_by(130, name)
    for plan in clock.tick().plans:
        clock.end(plan.run_id)
    for name in ("a", "b"):
        clock.change(name, enabled=False)
    with clock.database.transaction() as tx:
        assert len(schedules.tick(tx, 1).plans) == 1
    assert clock.statuses("c") == ["started", "started"]


def test_the_run_before_is_cancelled(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="cancel_previous")
    clock.pass_by(130)
    fired = clock.tick()
    assert len(fired.plans) == 2 and fired.cancelled == [fired.plans[0].run_id]
    (event,) = clock.execute("SELECT data FROM events WHERE type = 'run.cancel_requested'")
    assert event.data["by"] == "schedule:s"


def test_the_run_before_goes_on_if_the_next_cannot_start(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="cancel_previous")
    clock.pass_by(61)
    clock.tick()
    clock.define(inputSchema={"required": ["ticket"]})
    clock.pass_by(60)
    fired = clock.tick()
    assert (fired.plans, fired.cancelled) == ([], [])
    assert clock.statuses() == ["started", "failed"]


def test_all_run_at_once_where_they_may(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.pass_by(130)
    fired = clock.tick()
    assert (len(fired.plans), fired.cancelled) == (2, [])


# --- Trouble ------------------------------------------------------------------------------------


def test_a_firing_whose_input_fits_no_more_fails_and_the_schedule_stays(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.define(inputSchema={"required": ["ticket"]})
    clock.pass_by(61)
    assert clock.tick().plans == []
    (firing,) = clock.firings()
    assert (firing.status, firing.run_id) == ("failed", None)
    assert firing.error["code"] == "invalid_input" and "ticket" in firing.error["message"]
    clock.define(inputSchema={})
    clock.pass_by(60)
    assert len(clock.tick().plans) == 1


def test_a_firing_whose_workflow_is_gone_fails_and_the_schedule_stays(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.execute("DELETE FROM workflows")
    clock.pass_by(61)
    clock.tick()
    (firing,) = clock.firings()
    assert (firing.status, firing.error["code"]) == ("failed", "workflow_not_found")
    assert clock.row().enabled and clock.row().next_at > datetime.now(UTC)


def test_a_schedule_whose_times_cannot_be_read_any_more_says_so_once(clock: Clock) -> None:
    clock.create("bad", cron="* * * * *")
    clock.create(every_seconds=MINUTE)
    clock.execute("UPDATE schedules SET timezone = 'Mars/Olympus' WHERE name = 'bad'")
    for name in ("bad", "s"):
        clock.pass_by(120, name)
    assert len(clock.tick().plans) == 2
    (firing,) = clock.firings("bad")
    assert firing.status == "failed" and "Mars/Olympus" in firing.error["message"]
    assert clock.row("bad").next_at is None
    clock.change("bad", enabled=False)
    clock.change("bad", timezone="UTC", enabled=True)
    assert clock.row("bad").next_at is not None


def test_trouble_with_one_schedule_is_nobody_elses(clock: Clock) -> None:
    clock.create("bad", every_seconds=MINUTE)
    clock.create(every_seconds=MINUTE)
    # What no check of ours would let in: an input that is no JSON that can be stored.
    clock.execute("UPDATE schedules SET priority = 7, agent_id = 'x' WHERE name = 'bad'")
    clock.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.schedule = 'bad' THEN RAISE 'no'; END IF; RETURN NEW; END $$"
    )
    clock.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON firings FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    for name in ("bad", "s"):
        clock.pass_by(61, name)
    assert len(clock.tick().plans) == 1
    assert clock.firings("bad") == [] and clock.row("bad").rests_until > datetime.now(UTC)
    clock.execute("DROP TRIGGER refuse ON firings")
    statement = (
        "UPDATE schedules SET agent_id = NULL, priority = 1, rests_until = rests_until - :age"
    )
    clock.execute(statement, age=timedelta(seconds=30))
    assert len(clock.tick().plans) == 1


def test_a_firing_that_waits_and_is_in_trouble_is_left_alone_for_a_while(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = structlog.testing.LogCapture()
    monkeypatch.setattr(schedules, "log", structlog.wrap_logger(None, processors=[told]))
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(190)
    (plan,) = clock.tick().plans
    clock.end(plan.run_id)
    clock.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
    )
    clock.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON runs FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    for _ in range(3):
        assert clock.tick().plans == []
    in_trouble = [entry for entry in told.entries if entry["event"] == "schedule.trouble"]
    assert len(in_trouble) == 1, "it was tried every time"
    assert clock.statuses() == ["started", "waiting", "waiting"]
    clock.execute("DROP TRIGGER refuse ON runs")
    clock.execute("UPDATE schedules SET rests_until = now() WHERE name = 's'")
    assert len(clock.tick().plans) == 1


def test_a_change_ends_the_rest_after_trouble(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.pass_by(61)
    clock.execute("UPDATE schedules SET rests_until = now() + interval '1 hour'")
    assert clock.tick().plans == []
    clock.change(priority=2)
    assert len(clock.tick().plans) == 1


def test_a_tick_ends_soon_however_long_firings_take(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes one of its schedules waits for it, and so does whoever follows any run."""
    for name in ("a", "b"):
        clock.create(name, every_seconds=MINUTE)
        clock.pass_by(10.5 * MINUTE, name)
    monkeypatch.setattr(schedules, "MOST_SECONDS", 0.0)
    fired = []
    while not fired or fired[-1].has_more:
        with clock.database.transaction() as tx:
            fired.append(schedules.tick(tx, 50))
    assert max(len(each.plans) for each in fired) == 1
    for name in ("a", "b"):
        moments = [firing.moment for firing in clock.firings(name)]
        assert {b - a for a, b in itertools.pairwise(moments)} == {timedelta(seconds=MINUTE)}
        assert len(moments) == 10 and clock.row(name).next_at > datetime.now(UTC)
    names = [name for each in fired for name in each.told]
    assert len({event["schedule"] for event in names[:4]}) == 2, "each has its turn"


def test_what_an_input_says_is_read_once_for_many_firings(clock: Clock) -> None:
    parts = {"a": ["${firing.at}"] * 5_000, "b": ["x"] * 50_000}
    began = time.process_time()
    Template.compile(parts, "", Faults(), FIRING_NAMES)
    once = time.process_time() - began
    clock.create(every_seconds=MINUTE, input=parts)
    clock.pass_by(10.5 * MINUTE)
    began = time.process_time()
    assert len(clock.tick().plans) == 10
    assert time.process_time() - began < 6 * once


def test_what_waits_costs_a_tick_a_look_at_each_schedule(clock: Clock) -> None:
    for number in range(20):
        clock.create(f"s{number}", every_seconds=MINUTE, overlap="queue")
        clock.pass_by(MINUTE + 1, f"s{number}")
    clock.tick()
    clock.execute(
        "INSERT INTO firings (schedule, moment, status, by)"
        " SELECT name, now() - n * interval '1 second', 'waiting', 'schedule'"
        " FROM schedules, generate_series(1, 100) AS n"
    )

    def read() -> int:
        query = "SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'firings'"
        return int(clock.execute(query)[0][0])

    before = read()
    with clock.database.transaction() as tx:
        assert schedules.tick(tx, 50).plans == []
        tx.execute(text("SELECT pg_stat_force_next_flush()"))
    wait_until(read, says=lambda now: now > before)
    assert read() - before < 3 * 20


# --- Changes ------------------------------------------------------------------------------------


def test_what_was_missed_while_a_schedule_was_paused_is_not_caught_up(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.change(enabled=False)
    assert clock.row().next_at is None
    clock.pass_by(600)
    assert clock.tick().plans == []
    clock.change(enabled=True)
    assert clock.tick().plans == []
    clock.pass_by(61)
    assert len(clock.tick().plans) == 1


def test_other_times_count_from_now(clock: Clock) -> None:
    clock.create(cron="0 3 * * *", timezone="Asia/Tokyo")
    clock.pass_by(DAYS_3)
    clock.change(cron=None, every_seconds=MINUTE)
    row = clock.row()
    assert (row.cron, row.every_seconds, row.timezone) == (None, MINUTE, "UTC")
    assert clock.tick().plans == []
    clock.pass_by(61)
    assert len(clock.tick().plans) == 1


def test_another_label_changes_nothing_about_what_was_missed(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.pass_by(130)
    clock.change(labels={"team": "support"})
    (first, _) = clock.tick().plans
    (run,) = clock.execute("SELECT labels FROM runs WHERE id = :id", id=first.run_id)
    assert run.labels == {"team": "support"}


def test_a_schedule_is_deleted_with_the_firings_that_wait(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(130)
    (plan,) = clock.tick().plans
    with clock.database.transaction() as tx:
        schedules.remove(tx, "s")
    clock.end(plan.run_id)
    assert clock.tick().plans == [] and clock.firings() == []
    assert len(clock.execute("SELECT FROM runs")) == 1
    with pytest.raises(ScheduleNotFound), clock.database.transaction() as tx:
        schedules.remove(tx, "s")


def test_a_schedule_fires_when_it_is_told_to(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, overlap="skip")

    def trigger() -> Any:
        with clock.database.transaction() as tx:
            return schedules.trigger(tx, "s", by="key:test")

    with ThreadPoolExecutor(4) as people:
        plans = [future.result() for future in [people.submit(trigger) for _ in range(8)]]
    firings = clock.firings()
    assert {f.run_id for f in firings} == {plan.run_id for plan in plans} and len(firings) == 8
    assert {(f.status, f.by) for f in firings} == {("started", "key:test")}
    clock.pass_by(61)
    assert clock.tick().plans == [] and clock.statuses()[-1] == "skipped"


def test_the_next_moments_are_told_also_of_one_that_is_paused(clock: Clock) -> None:
    clock.create(cron="30 2 * * *", timezone="Europe/Berlin", enabled=False)
    with clock.database.transaction() as tx:
        moments = schedules.preview(tx, "s", 3)
    assert len(moments) == 3 and moments == sorted(moments) and moments[0] > datetime.now(UTC)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"input": {"a": "${nothing.here}"}}, InvalidRequest),
        ({"input": {"a": "${firing.at + 1}"}}, InvalidRequest),
        ({"input": {"ticket": 1}}, InvalidInput),
        ({"workflow_id": "nowhere"}, WorkflowNotFound),
        ({"version": 7}, WorkflowNotFound),
        ({"agent_id": "nobody"}, AgentNotFound),
        ({"every_seconds": 0.5}, InvalidRequest),
    ],
)
def test_what_could_not_fire_is_refused(
    clock: Clock, values: dict[str, Any], error: type[Exception]
) -> None:
    clock.define(inputSchema={"properties": {"ticket": {"type": "string"}}})
    with pytest.raises(error):
        clock.create(**{"every_seconds": MINUTE, **values})
    clock.create(every_seconds=MINUTE)
    with pytest.raises(error):
        clock.change(**values)
    with pytest.raises(ScheduleExists):
        clock.create(every_seconds=MINUTE)


# --- Events -------------------------------------------------------------------------------------


def moment_of(firing: Any) -> str:
    return str(firing.moment.astimezone(UTC).isoformat().replace("+00:00", "Z"))


def test_every_change_is_told_with_who_made_it(clock: Clock) -> None:
    clock.define(inputSchema={"properties": {"n": {}}})
    clock.create(every_seconds=MINUTE, input={"n": 1}, labels={"a": "b"})
    steps: list[tuple[dict[str, Any], list[tuple[str, Any]]]] = [
        ({"overlap": "queue", "priority": 2}, [("changed", ["priority", "overlap"])]),
        ({"overlap": "queue", "enabled": True}, []),
        ({"input": {"n": True}}, [("changed", ["input"])]),
        (
            {"jitter_seconds": 5.0, "enabled": False},
            [("changed", ["jitterSeconds"]), ("paused", None)],
        ),
        ({"enabled": False}, []),
        ({"cron": "@daily", "every_seconds": None}, [("changed", ["cron", "everySeconds"])]),
        ({"timezone": "Asia/Tokyo"}, [("changed", ["timezone"])]),
        (
            {"cron": None, "every_seconds": MINUTE},
            [("changed", ["cron", "everySeconds", "timezone"])],
        ),
        ({"enabled": True}, [("resumed", None)]),
    ]
    told = []
    for values, expected in steps:
        with clock.database.transaction() as tx:
            schedules.change(tx, "s", values, by="key:me")
        told += [
            (type, {"by": "key:me"} | ({"members": members} if members else {}))
            for type, members in expected
        ]
        assert clock.events() == told, values
    with clock.database.transaction() as tx:
        schedules.remove(tx, "s", by="key:me")
    assert clock.events() == [*told, ("deleted", {"by": "key:me"})]
    (first, *_) = clock.execute("SELECT type, run_id, data FROM events ORDER BY seq")
    assert (first.type, first.run_id, first.data) == ("schedule.created", None, {})


def test_what_is_refused_is_not_told(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    for values in ({"every_seconds": 0.1}, {"workflow_id": "nowhere"}):
        with pytest.raises((InvalidRequest, WorkflowNotFound)):
            clock.change(**values)
    with pytest.raises(ScheduleExists):
        clock.create(every_seconds=MINUTE)
    clock.define(inputSchema={"required": ["ticket"]})
    with pytest.raises(InvalidInput), clock.database.transaction() as tx:
        schedules.trigger(tx, "s", by="key:me")
    assert clock.events() == []


@pytest.mark.parametrize(
    ("overlap", "told"),
    [
        ("allow", ["fired", "fired", "fired"]),
        ("skip", ["fired", "skipped", "skipped"]),
        ("queue", ["fired", "queued", "queued"]),
        ("cancel_previous", ["fired", "fired", "fired"]),
    ],
)
def test_what_became_of_every_moment_is_told(clock: Clock, overlap: str, told: list[str]) -> None:
    clock.create(every_seconds=MINUTE, overlap=overlap)
    clock.pass_by(190)
    clock.tick()
    events, firings = clock.events(), clock.firings()
    assert [type for type, _ in events] == told
    more = {"skipped": {"reason": "overlap"}, "queued": {}}
    for (type, data), firing in zip(events, firings, strict=True):
        expected = {"by": "schedule:s", "moment": moment_of(firing)}
        expected |= more.get(type, {"runId": str(firing.run_id)})
        assert data.items() >= expected.items()
    assert [data["waiting"] for type, data in events if type == "queued"] in ([], [1, 2])


def test_what_waited_is_told_to_be_fired_or_skipped(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "LONGEST_QUEUE", 3)
    clock.create(every_seconds=MINUTE, overlap="queue")
    clock.pass_by(5 * MINUTE + 1)
    (plan,) = clock.tick().plans
    assert clock.events()[-1][1]["reason"] == "queue_full"
    clock.end(plan.run_id)
    clock.tick()
    _, second, third, fourth, _ = clock.firings()
    fired = {"by": "schedule:s", "moment": moment_of(second), "runId": str(second.run_id)}
    assert clock.events()[-1] == ("fired", fired)
    with clock.database.transaction() as tx:
        schedules.change(tx, "s", {"overlap": "allow"}, by="key:me")
    left = [
        ("skipped", {"by": "key:me", "moment": moment_of(firing), "reason": "overlap"})
        for firing in (third, fourth)
    ]
    assert clock.events()[-3:] == [("changed", {"by": "key:me", "members": ["overlap"]}), *left]


def test_what_did_not_fire_is_told_with_the_reason(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    clock.create("bad", cron="* * * * *")
    with clock.database.transaction() as tx:
        workflows.archive_workflow(tx, "w", "key:me")
    clock.execute("UPDATE schedules SET timezone = 'Mars/Olympus' WHERE name = 'bad'")
    for name in ("bad", "s"):
        clock.pass_by(61, name)
    clock.tick()
    for name, code in (("s", "workflow_archived"), ("bad", "invalid_request")):
        (firing,) = clock.firings(name)
        data = {"by": f"schedule:{name}", "moment": moment_of(firing), "error": firing.error}
        assert clock.events(name) == [("not_fired", data)] and firing.error["code"] == code


def test_who_had_it_fire_is_told(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE)
    with clock.database.transaction() as tx:
        plan = schedules.trigger(tx, "s", by="key:me")
    (firing,) = clock.firings()
    data = {"by": "key:me", "moment": moment_of(firing), "runId": str(plan.run_id)}
    assert clock.events() == [("triggered", data)]


def test_of_a_schedule_in_trouble_nothing_is_told_and_of_the_others_all(clock: Clock) -> None:
    clock.create("bad", every_seconds=MINUTE)
    clock.create(every_seconds=MINUTE)
    clock.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.name = 'bad' THEN RAISE 'no'; END IF; RETURN NEW; END $$"
    )
    for name in ("bad", "s"):
        clock.pass_by(61, name)
    trigger = "CREATE TRIGGER refuse BEFORE UPDATE OF decided_at ON schedules"
    clock.execute(f"{trigger} FOR EACH ROW EXECUTE FUNCTION refuse()")
    clock.tick()
    assert clock.events("bad") == [] == clock.firings("bad")
    assert [type for type, _ in clock.events()] == ["fired"]


def test_eight_who_tick_at_once_tell_each_moment_once_in_order(clock: Clock) -> None:
    names = [f"s{number}" for number in range(10)]
    for name in names:
        clock.create(name, every_seconds=MINUTE)
        clock.pass_by(25.5 * MINUTE, name)
    with ThreadPoolExecutor(8) as beats:
        list(beats.map(lambda _: clock.tick(3), range(8)))
    clock.tick()
    for name in names:
        told = [data["moment"] for _, data in clock.events(name)]
        assert told == [moment_of(firing) for firing in clock.firings(name)] and len(told) == 25


# --- Tidying ------------------------------------------------------------------------------------

DAYS = 90
OLD, YOUNG = timedelta(days=DAYS, seconds=1), timedelta(days=DAYS - 1)


def add_firings(
    clock: Clock, number: int, age: timedelta, name: str = "s", status: str = "started"
) -> None:
    """Write firings, a second apart, the newest of them so old; and an event of each."""
    values = {"name": name, "age": age, "number": number, "status": status}
    ages = "now() - :age - n * interval '1 second'"
    series = "generate_series(0, cast(:number AS int) - 1) AS n"
    clock.execute(
        "INSERT INTO firings (schedule, moment, status, by, decided_at)"
        f" SELECT :name, {ages}, :status, 'schedule', {ages} FROM {series}",
        **values,
    )
    statement = "INSERT INTO events (schedule, type, at) SELECT :name, 'schedule.fired',"
    clock.execute(f"{statement} {ages} FROM {series}", **values)


def forget(clock: Clock, limit: int = 1000) -> int:
    """Forget what is to be forgotten; return how many looks it took."""
    after: str | None = ""
    for looks in itertools.count(1):
        with clock.database.autocommit() as tx:
            after = schedules.forget_firings(tx, DAYS, limit, after or "")
        if after is None:
            return looks
    raise AssertionError


def test_old_firings_are_forgotten_and_young_ones_are_not(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, enabled=False)
    add_firings(clock, 30, OLD)
    add_firings(clock, 120, YOUNG)
    newest = clock.firings()[30:]
    assert forget(clock) == 1
    assert clock.firings() == newest
    forget(clock)
    assert clock.firings() == newest


def test_the_newest_100_firings_of_each_schedule_stay_however_old(clock: Clock) -> None:
    sizes = {"a": 99, "b": 100, "c": 101, "d": 150, "e": 0}
    for name, size in sizes.items():
        clock.create(name, every_seconds=MINUTE, enabled=False)
        if size:
            add_firings(clock, size, 4 * OLD, name)
    before = {name: clock.firings(name) for name in sizes}
    forget(clock)
    for name, size in sizes.items():
        assert clock.firings(name) == before[name][max(0, size - 100) :]


@pytest.mark.parametrize("status", ["waiting", "skipped", "failed"])
def test_a_firing_that_waits_is_not_forgotten(clock: Clock, status: str) -> None:
    clock.create(every_seconds=MINUTE, enabled=False)
    add_firings(clock, 5, 2 * OLD, status=status)
    add_firings(clock, 10, OLD)
    add_firings(clock, 100, YOUNG)
    forget(clock)
    assert len(clock.firings()) == (105 if status == "waiting" else 100)


def test_a_firing_above_what_is_decided_is_not_forgotten(clock: Clock) -> None:
    """It keeps its moment from firing again once time comes to it."""
    clock.create(every_seconds=MINUTE, enabled=False)
    add_firings(clock, 20, OLD)
    add_firings(clock, 100, YOUNG)
    (tenth, eleventh) = clock.firings()[9:11]
    statement = "UPDATE schedules SET decided_at = :moment"
    clock.execute(statement, moment=tenth.moment)
    forget(clock)
    assert clock.firings()[0].moment == eleventh.moment and len(clock.firings()) == 110


def test_a_firing_that_was_made_up_for_lately_is_not_forgotten(clock: Clock) -> None:
    clock.create(every_seconds=MINUTE, enabled=False)
    add_firings(clock, 20, OLD)
    add_firings(clock, 100, YOUNG)
    clock.execute("UPDATE firings SET decided_at = now()")
    forget(clock)
    assert len(clock.firings()) == 120


def test_firings_are_forgotten_some_at_a_time_schedule_by_schedule(clock: Clock) -> None:
    names = [f"s{number}" for number in range(7)]
    for name in names:
        clock.create(name, every_seconds=MINUTE, enabled=False)
        add_firings(clock, 108, OLD, name)
    clock.execute("DELETE FROM firings WHERE schedule = 's3'")
    left = [len(clock.firings(name)) for name in names]
    after: str | None = ""
    while after is not None:
        with clock.database.autocommit() as tx:
            after = schedules.forget_firings(tx, DAYS, 5, after)
        before, left = left, [len(clock.firings(name)) for name in names]
        assert sum(before) - sum(left) <= 5
    assert left == [100, 100, 100, 0, 100, 100, 100]


def test_the_keeper_forgets_firings_and_events_now_and_then_and_some_in_each_round(
    clock: Clock, settings: Settings, dispatcher: Dispatcher
) -> None:
    clock.create("gone", every_seconds=MINUTE)
    add_firings(clock, 2 * LIMIT, OLD, "gone")
    with clock.database.transaction() as tx:
        schedules.remove(tx, "gone")
    clock.create(every_seconds=MINUTE)
    add_firings(clock, LIMIT + 150, OLD)

    def left() -> tuple[int, int]:
        (row,) = clock.execute(
            "SELECT (SELECT count(*) FROM firings) AS firings,"
            " (SELECT count(*) FROM events WHERE at < now() - interval '90 days') AS events"
        )
        return row.firings, row.events

    keeper = Round(clock.database, dispatcher, settings)
    firings, events = LIMIT + 150, 3 * LIMIT + 150
    for _ in range(5):
        assert keeper.run()
        firings, events = max(100, firings - LIMIT), max(0, events - LIMIT)
        assert left() == (firings, events)
    assert not keeper.is_untidy
    # What happened lately is there, also to the schedule that is not.
    assert clock.events("gone")[-1][0] == "deleted"
    add_firings(clock, 1, 2 * OLD)
    assert keeper.run() and left() == (101, 1)
    keeper.count = TIDY_EVERY
    assert keeper.run() and left() == (100, 0)


def test_who_forgets_firings_disturbs_neither_beats_nor_who_deletes_the_schedule(
    clock: Clock,
) -> None:
    names = [f"s{number}" for number in range(12)]
    for name in names:
        clock.create(name, every_seconds=1.0)
        add_firings(clock, 600, OLD, name)
        clock.pass_by(30.5, name)
    ended = Event()

    def forget_all() -> None:
        while not ended.is_set():
            forget(clock, 7)

    def remove(name: str) -> None:
        with clock.database.transaction() as tx:
            schedules.remove(tx, name)

    with ThreadPoolExecutor(6) as threads:
        forgetting = [threads.submit(forget_all) for _ in range(2)]
        ticking = [threads.submit(clock.tick) for _ in range(3)]
        list(threads.map(remove, names[:6]))
        plans = [plan for future in ticking for plan in future.result().plans]
        ended.set()
        for future in forgetting:
            future.result()
    plans += clock.tick().plans
    forget(clock)
    for name in names:
        assert len(clock.firings(name)) == (0 if name in names[:6] else 100)
    assert len(plans) == len({plan.run_id for plan in plans}) >= 6 * 30


# --- All at once --------------------------------------------------------------------------------


class Crowd:
    """Beats, people and workers, each at some schedules at random, all at the same time."""

    NAMES = tuple(f"s{number}" for number in range(6))

    def __init__(self, clock: Clock, seed: int) -> None:
        self.clock = clock
        self.chance = random.Random(seed)
        self.ends_at = time.monotonic() + 5
        self.wakes = Event()

    def play(self) -> None:
        for name in self.NAMES:
            self.create(name)
        often = {self.tick: 3, self.change: 1, self.end_runs: 1, self.let_time_pass: 1}
        seldom = {self.trigger: 0.05, self.forget: 0.05, self.archive: 0.2, self.replace: 0.4}
        acts = [(act, 0.0) for act, number in often.items() for _ in range(number)]
        acts += seldom.items()
        with ThreadPoolExecutor(len(acts)) as threads:
            for future in [threads.submit(self._again, *act) for act in acts]:
                future.result()
        self.clock.tick()

    def _again(self, act: Callable[[], Any], pause: float) -> None:
        while time.monotonic() < self.ends_at:
            with suppress(ScheduleNotFound, ScheduleExists, WorkflowArchived):
                act()
            self.wakes.wait(pause)

    def one(self) -> str:
        return self.chance.choice(self.NAMES)

    def create(self, name: str) -> None:
        overlap = self.chance.choice(list(Overlap))
        self.clock.create(name, every_seconds=1.0, overlap=str(overlap))

    def tick(self) -> None:
        with self.clock.database.transaction() as tx:
            schedules.tick(tx, 3)

    def change(self) -> None:
        values: list[dict[str, Any]] = [
            *([{"enabled": True}] * 3 + [{"enabled": False}]),
            *([{"overlap": str(overlap)} for overlap in Overlap] * 2),
            *({"catch_up": str(catch_up)} for catch_up in CatchUp),
            *({"every_seconds": float(seconds)} for seconds in (1, 2)),
        ]
        self.clock.change(self.one(), **self.chance.choice(values))

    def trigger(self) -> None:
        with self.clock.database.transaction() as tx:
            schedules.trigger(tx, self.one(), by="key:test")

    def replace(self) -> None:
        name = self.one()
        with self.clock.database.transaction() as tx:
            schedules.remove(tx, name)
        self.create(name)

    def end_runs(self) -> None:
        for row in self.clock.execute("SELECT id FROM runs WHERE finished_at IS NULL LIMIT 5"):
            with suppress(RunFinished):
                self.clock.end(row.id)

    def let_time_pass(self) -> None:
        self.clock.set_clock(self.chance.choice([5.0, 20.0, -1.0]), self.one())

    def forget(self) -> None:
        with self.clock.database.autocommit() as tx:
            schedules.forget_firings(tx, 1, 100)

    def archive(self) -> None:
        with self.clock.database.transaction() as tx:
            workflows.archive_workflow(tx, "w", "key:test")
        self.wakes.wait(0.05)
        with self.clock.database.transaction() as tx:
            workflows.restore_workflow(tx, "w")


BOUNDS = ("created", "deleted")
DECIDED = ("fired", "skipped", "queued", "not_fired")


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_comes_together_every_moment_is_decided_once_and_told(
    clock: Clock, seed: int
) -> None:
    Crowd(clock, seed).play()
    kinds = Counter[str]()
    for name in Crowd.NAMES:
        events = [("created", {}), *clock.events(name)]
        kinds.update(type for type, _ in events)
        started = [data["runId"] for type, data in events if type in ("fired", "triggered")]
        runs = clock.execute("SELECT id FROM runs WHERE schedule = :n", n=name)
        assert len(started) == len(set(started)) and set(started) == {str(row.id) for row in runs}
        there = {moment_of(firing): firing for firing in clock.firings(name)}
        assert there.keys() == judge(events)
        for moment, status in statuses_told(events).items():
            assert there[moment].status == status
    assert all(kinds[kind] for kind in ("skipped", "queued", "triggered", "paused", "deleted"))
    assert kinds["fired"] > 10


def judge(events: list[tuple[str, dict[str, Any]]]) -> set[str]:
    """Hold a schedule's events against each other; return the moments of its present life."""
    lives: list[set[str]] = []
    is_paused = False
    waiting: set[str] = set()
    for type, data in events:
        moment = data.get("moment", "")
        if type in BOUNDS:
            lives.append(set())
            is_paused, waiting = False, set()
        elif type in ("paused", "resumed"):
            assert is_paused is (type == "resumed")
            is_paused = type == "paused"
        elif type in DECIDED and moment in waiting:
            assert type in ("fired", "skipped", "not_fired")
            assert not is_paused or type == "skipped"  # as nothing of it waits any more
            waiting.remove(moment)
        elif type in (*DECIDED, "triggered"):
            assert not is_paused or type == "triggered"
            assert moment not in lives[-1]
            lives[-1].add(moment)
            waiting |= {moment} if type == "queued" else set()
    return lives[-1]


def statuses_told(events: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Return what the newest event says of each moment of the schedule's present life."""
    said = {"fired": "started", "triggered": "started", "skipped": "skipped", "queued": "waiting"}
    last = max(number for number, (type, _) in enumerate(events) if type in BOUNDS)
    return {
        data["moment"]: said.get(type, "failed") for type, data in events[last:] if "moment" in data
    }
