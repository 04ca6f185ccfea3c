"""Schedules: each moment decided once, by whoever ticks."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from opscore import engine, schedules, workflows
from opscore.db import Database
from opscore.definition import parse

DEFAULTS: dict[str, Any] = {
    **{name: None for name in ("version", "agent_id", "cron", "every_seconds", "timezone")},
    **{"start_at": None, "end_at": None, "input": {}, "labels": {}, "enabled": True},
    **{"priority": 1, "jitter_seconds": 0.0, "overlap": "allow", "catch_up": "all"},
    **{"catch_up_window_seconds": 86_400.0},
}


class Clock:
    """Schedules of one workflow, and what they fired."""

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.transaction() as tx:
            document = {"id": "w", "tasks": [{"taskId": "a", "agentId": "x"}]}
            workflows.create_workflow(tx, parse(document))

    def create(self, name: str = "s", **values: Any) -> None:
        with self.database.transaction() as tx:
            schedules.create(tx, {**DEFAULTS, "workflow_id": "w", "name": name, **values})

    def pass_by(self, seconds: float, name: str = "s") -> None:
        """Let the schedule be so much older."""
        with self.database.transaction() as tx:
            tx.execute(
                text(
                    "UPDATE schedules SET created_at = created_at - :age, next_at = next_at - :age,"
                    " decided_at = decided_at - :age WHERE name = :name"
                ),
                {"age": timedelta(seconds=seconds), "name": name},
            )

    def tick(self) -> schedules.Fired:
        with self.database.transaction() as tx:
            return schedules.tick(tx, 50)

    def firings(self, name: str = "s") -> list[Any]:
        with self.database.autocommit() as tx:
            query = text("SELECT * FROM firings WHERE schedule = :name ORDER BY moment")
            return list(tx.execute(query, {"name": name}))


@pytest.fixture
def clock(database: Database) -> Clock:
    return Clock(database)


def test_what_has_come_fires_once(clock: Clock) -> None:
    clock.create(every_seconds=60.0)
    assert clock.tick().plans == []
    clock.pass_by(190)
    assert len(clock.tick().plans) == 3
    assert clock.tick().plans == []
    moments = [firing.moment for firing in clock.firings()]
    assert [b - a for a, b in zip(moments, moments[1:], strict=False)] == [
        timedelta(seconds=60)
    ] * 2


def test_the_moment_stands_in_the_input(clock: Clock) -> None:
    clock.create(every_seconds=60.0, input={"at": "${firing.at}", "of": "${firing.schedule}"})
    clock.pass_by(61)
    (plan,) = clock.tick().plans
    (firing,) = clock.firings()
    with clock.database.autocommit() as tx:
        query = text("SELECT input, schedule FROM runs WHERE id = :id")
        run = tx.execute(query, {"id": plan.run_id}).one()
    assert datetime.fromisoformat(run.input["at"]) == firing.moment.astimezone(UTC)
    assert (run.input["of"], run.schedule, firing.run_id) == ("s", "s", plan.run_id)


def test_a_run_that_is_not_over_is_not_overlapped(clock: Clock) -> None:
    clock.create(every_seconds=60.0, overlap="skip")
    clock.pass_by(130)
    assert len(clock.tick().plans) == 1
    assert [f.status for f in clock.firings()] == ["started", "skipped"]


def test_firings_wait_for_the_run_before(clock: Clock) -> None:
    clock.create(every_seconds=60.0, overlap="queue")
    clock.pass_by(190)
    (plan,) = clock.tick().plans
    assert [f.status for f in clock.firings()] == ["started", "waiting", "waiting"]
    assert clock.tick().plans == []
    with clock.database.transaction() as tx:
        engine.cancel_run(tx, plan.run_id)
        engine.settle_run(tx, plan.run_id)
    assert len(clock.tick().plans) == 1
    assert [f.status for f in clock.firings()] == ["started", "started", "waiting"]


def test_the_run_before_is_cancelled(clock: Clock) -> None:
    clock.create(every_seconds=60.0, overlap="cancel_previous")
    clock.pass_by(130)
    fired = clock.tick()
    assert len(fired.plans) == 2 and fired.cancelled == [fired.plans[0].run_id]
