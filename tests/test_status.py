"""What everything is at: counts of what is open, what is stuck, and what is said about it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from rows import FAULT, NOW, add_agent, add_attempt, add_run, add_task, add_waiting
from sqlalchemy import event, insert, text, update
from sqlalchemy.exc import DBAPIError, OperationalError

from opscore import presence, problems, status
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE, QUEUES
from opscore.db import Database, Tx
from opscore.dispatch import Depth
from opscore.models import Run, Schedule, Slot, Task, Workflow
from opscore.presence import Presence
from opscore.status import APPROVALS_SHOWN, LINES_SHOWN

EMPTY = {queue: Depth(0, 0) for queue in QUEUES}
Row = Mapping[str, Any]


def ago(seconds: float) -> Any:
    """A moment of the database's, so long ago."""
    return text(f"now() - interval '{seconds} s'")


def moment(tx: Tx, seconds: float) -> datetime:
    found: datetime = tx.execute(text(f"SELECT now() - interval '{seconds} s'")).scalar_one()
    return found


def read(database: Database, depths: Mapping[str, Depth] | None = EMPTY) -> dict[str, Any]:
    with database.transaction() as tx:
        return status.read(tx, depths)


def work(tx: Tx, *queues: str, name: str = "w@host") -> None:
    """Have a worker live, and keep house."""
    taken = queues or QUEUES
    presence.say(tx, Presence(uuid4(), name, "host", 7, "prefork", 2, taken, "1"))
    tx.execute(
        text(
            "INSERT INTO leases VALUES ('keeper', :name, now() + interval '4 s')"
            " ON CONFLICT DO NOTHING"
        ),
        {"name": name},
    )


def codes(found: Row) -> list[str]:
    return [problem["code"] for problem in found["problems"]]


@pytest.fixture
def worked(database: Database) -> Database:
    """A database with a worker that takes from every queue."""
    with database.transaction() as tx:
        work(tx)
    return database


# --- Who works ----------------------------------------------------------------------------------


def test_with_a_worker_and_nothing_to_do_nothing_is_the_matter(worked: Database) -> None:
    found = read(worked)
    assert found["problems"] == []
    (worker,) = found["workers"]
    assert (worker["name"], worker["queues"]) == ("w@host", list(QUEUES))
    expected = [{"name": name, "ready": 0, "unacked": 0, "workers": 1} for name in QUEUES]
    assert found["queues"] == expected
    assert found["keeper"]["holder"] == "w@host" and found["keeper"]["late_seconds"] == 0
    assert found["broker_error"] is None


def test_without_a_worker_that_is_all_that_is_said_of_workers(database: Database) -> None:
    found = read(database)
    assert codes(found) == ["no_workers"] and found["workers"] == []
    assert found["keeper"] == {"holder": None, "renewed_at": None, "late_seconds": None}
    assert "opscore worker" in found["problems"][0]["hint"]


def test_a_queue_with_work_from_which_no_worker_takes_is_named(database: Database) -> None:
    with database.transaction() as tx:
        work(tx, AGENTS_QUEUE, CONTROL_QUEUE)
    assert codes(read(database)) == []
    found = read(database, {**EMPTY, IO_QUEUE: Depth(3, None), AGENTS_QUEUE: Depth(5, 1)})
    (problem,) = found["problems"]
    assert problem["code"] == "queue_without_workers"
    assert (
        problem["sentence"] == "The queue opscore.io has 3 messages, and no worker takes from it."
    )
    assert problem["hint"] == "Start one that does: `opscore worker --queues opscore.io`."
    depths = {queue["name"]: (queue["ready"], queue["unacked"]) for queue in found["queues"]}
    assert depths == {AGENTS_QUEUE: (5, 1), CONTROL_QUEUE: (0, 0), IO_QUEUE: (3, None)}


def test_without_redis_the_rest_is_told_all_the_same(worked: Database) -> None:
    found = read(worked, None)
    assert codes(found) == ["broker_away"] and found["broker_error"]
    assert {(queue["ready"], queue["unacked"]) for queue in found["queues"]} == {(None, None)}
    assert len(found["workers"]) == 1


def test_a_keeper_that_is_silent_is_said_to_be(worked: Database) -> None:
    with worked.transaction() as tx:
        tx.execute(text("UPDATE leases SET expires_at = now() - interval '3 s'"))
    assert codes(read(worked)) == [], "another one may take over at this moment"
    with worked.transaction() as tx:
        tx.execute(text("UPDATE leases SET expires_at = now() - interval '180 s'"))
    found = read(worked)
    assert codes(found) == ["keeper_silent"] and "for 3 min" in found["problems"][0]["sentence"]
    assert 180 <= found["keeper"]["late_seconds"] < 200
    renewed = found["keeper"]["renewed_at"]
    with worked.transaction() as tx:
        assert 185 <= (moment(tx, 0) - renewed).total_seconds() < 205


# --- What waits ---------------------------------------------------------------------------------


def test_what_waits_is_counted_by_reason_with_the_oldest_and_the_next(worked: Database) -> None:
    with worked.transaction() as tx:
        add_agent(tx, "writer", capacity=1)
        run_id = add_run(tx, "running")
        add_waiting(tx, run_id, 3, agent_id="writer", since=moment(tx, 60), wake_at=moment(tx, -9))
        ago_90, ago_30 = moment(tx, 90), moment(tx, 30)
        add_task(tx, run_id, "r", "waiting", reason="retry", wake_at=moment(tx, -5), tries=1)
        add_task(tx, run_id, "s", "waiting", reason="approval", started_at=ago_90, items=0)
        add_task(tx, run_id, "t", "waiting", reason="approval", started_at=ago_30, items=0)
        add_task(tx, run_id, "u", "running")
    waiting = {row["reason"]: row for row in read(worked)["waiting"]}
    assert {reason: row["count"] for reason, row in waiting.items()} == {
        "agent_busy": 3,
        "retry": 1,
        "approval": 2,
    }
    assert 60 <= waiting["agent_busy"]["oldest_seconds"] < 70
    assert 90 <= waiting["approval"]["oldest_seconds"] < 100
    assert waiting["approval"]["next_wake_at"] is None
    assert waiting["agent_busy"]["next_wake_at"] > waiting["retry"]["next_wake_at"]


def test_runs_that_are_not_over_are_counted_by_status_and_reason(worked: Database) -> None:
    with worked.transaction() as tx:
        for name in ("completed", "failed", "cancelled", "paused", "running"):
            add_run(tx, name)
        oldest = add_run(tx, "running", created_at=moment(tx, 300))
        add_run(tx, "queued", reason="start_at", start_at=moment(tx, -60))
    runs = read(worked)["runs"]
    assert [(row["status"], row["reason"], row["count"]) for row in runs] == [
        ("paused", None, 1),
        ("queued", "start_at", 1),
        ("running", None, 2),
    ]
    assert runs[-1]["oldest_run_id"] == oldest and 300 <= runs[-1]["oldest_seconds"] < 310


def test_approvals_are_told_by_who_was_asked_first_and_not_if_they_are_decided(
    worked: Database,
) -> None:
    with worked.transaction() as tx:
        run_id = add_run(tx, "running", workflow_id="release")
        asked = []
        for n in range(APPROVALS_SHOWN + 2):
            since = moment(tx, 100 - n)
            task = add_task(
                tx, run_id, f"a{n}", "waiting", reason="approval", started_at=since, attempt=1
            )
            add_attempt(tx, task, 1, started_at=since)
            asked.append((task, since))
        tx.execute(update(Task).where(Task.id == asked[0][0]).values(decision={"approved": True}))
    approvals = read(worked)["approvals"]
    expected = asked[1 : APPROVALS_SHOWN + 1]
    assert [(row["task_id"], row["since"]) for row in approvals] == expected
    first = approvals[0]
    assert (first["run_id"], first["workflow_id"]) == (run_id, "release")
    assert (first["task_definition_id"], first["index"]) == ("a1", None)


# --- The fleet ----------------------------------------------------------------------------------


def add_remote(tx: Tx, agent_id: str, *capabilities: str, **more: Any) -> None:
    values = {"kind": "remote", "contact_endpoint": "http://a/", "state": "idle", **more}
    add_agent(tx, agent_id, *capabilities, capacity=1, **values)


def hold(tx: Tx, agent_id: str, task_id: UUID) -> None:
    held = {"holder": task_id, "attempt": 1, "lease_expires_at": ago(-60)}
    tx.execute(update(Slot).where(Slot.pool == agent_id, Slot.number == 1).values(held))


def test_agents_are_counted_by_what_keeps_work_from_them_and_by_state(worked: Database) -> None:
    with worked.transaction() as tx:
        add_agent(tx, "busy", capacity=2)
        add_agent(tx, "free", capacity=3)
        add_agent(tx, "paused", paused=True)
        add_remote(tx, "draining", draining=True)
        add_remote(tx, "silent", heartbeat_seconds=5, seen_at=NOW)
        add_remote(tx, "broken", state="error")
        add_remote(tx, "at-it", state="active", state_lapses=True)
        add_remote(tx, "gone", deregistered_at=NOW)
        run_id = add_run(tx, "running")
        task = add_task(tx, run_id, "a", "running", agent_id="busy", attempt=1)
        hold(tx, "busy", task)
    fleet = read(worked)["fleet"]
    counts = {"total": 7, "available": 3, "paused": 1, "draining": 1, "silent": 1, "error": 1}
    assert fleet["agents"] == counts
    assert {state: count for state, count in fleet["states"].items() if count} == {
        "active": 2,
        "idle": 4,
        "error": 1,
    }
    assert fleet["slots"] == {"held": 1, "total": 9}


def test_the_longest_lines_are_told_with_their_oldest(worked: Database) -> None:
    with worked.transaction() as tx:
        run_id = add_run(tx, "running")
        add_agent(tx, "writer", "write", capacity=1)
        add_waiting(tx, run_id, 9, agent_id="writer", since=moment(tx, 120))
        add_waiting(tx, run_id, 20, capability="write", since=moment(tx, 40), reason="agent_busy")
        for n in range(LINES_SHOWN):
            add_agent(tx, f"a{n}", capacity=1)
            add_waiting(tx, run_id, 2, agent_id=f"a{n}", since=moment(tx, 2))
    found = read(worked)
    first, second, *others = found["fleet"]["lines"]
    assert (first["agent_id"], first["agent_capability"], first["waiting"]) == (None, "write", 20)
    assert (second["agent_id"], second["agent_capability"], second["waiting"]) == (
        "writer",
        None,
        9,
    )
    assert 120 <= second["oldest_seconds"] < 130 and second["unserved_because"] is None
    assert len(others) == LINES_SHOWN - 2 and {line["waiting"] for line in others} == {2}
    assert codes(found) == []


@pytest.mark.parametrize(
    ("agent", "code", "because", "way"),
    [
        ({"paused": True}, "agent_paused", "agent far is paused", "`opscore agent resume far`"),
        (
            {"draining": True},
            "line_unserved",
            "agent far is draining",
            "`opscore agent resume far`",
        ),
        (
            {"state": "error"},
            "line_unserved",
            "agent far reported error",
            "update-state far idle`)",
        ),
        (
            {"heartbeat_seconds": 5, "seen_at": NOW},
            "line_unserved",
            "agent far has not reported for longer than its heartbeatSeconds",
            "Start it",
        ),
        ({"deregistered_at": NOW}, "line_unserved", "agent far is not registered", "Register it"),
    ],
)
def test_a_line_that_nobody_serves_is_a_problem_and_after_ten_minutes_its_first_is_stuck(
    worked: Database, agent: dict[str, Any], code: str, because: str, way: str
) -> None:
    with worked.transaction() as tx:
        add_remote(tx, "far", **agent)
        run_id = add_run(tx, "running")
        first, *_ = add_waiting(tx, run_id, 3, agent_id="far", since=moment(tx, 500))
    found = read(worked)
    (problem,) = found["problems"]
    assert (problem["code"], found["stuck"]) == (code, [])
    assert problem["sentence"] == f"3 tasks wait, for up to 8 min: {because}."
    assert way in problem["hint"]
    assert found["fleet"]["lines"][0]["unserved_because"] == because
    with worked.transaction() as tx:
        tx.execute(update(Task).values(waiting_since=Task.waiting_since - timedelta(minutes=5)))
    found = read(worked)
    (stuck,) = found["stuck"]
    assert (stuck["code"], stuck["task_id"], stuck["run_id"]) == ("nobody_serves", first, run_id)
    assert stuck["sentence"] == f"It has stood in line for 13 min, with 2 others: {because}."
    assert way in stuck["hint"]
    assert codes(found) == [code], "which says it already"


@pytest.mark.parametrize(
    ("agents", "because"),
    [
        ([], "no agent has the capability fetch"),
        ([{"paused": True}, {"state": "error"}], "no agent with the capability fetch is available"),
    ],
)
def test_a_line_for_a_capability_that_nobody_offers_is_a_problem(
    worked: Database, agents: list[dict[str, Any]], because: str
) -> None:
    with worked.transaction() as tx:
        for n, values in enumerate(agents):
            add_remote(tx, f"far{n}", "fetch", **values)
        add_waiting(tx, add_run(tx, "running"), capability="fetch", since=moment(tx, 700))
    found = read(worked)
    assert found["fleet"]["lines"][0]["unserved_because"] == because
    assert codes(found) == ["line_unserved"]
    assert [one["code"] for one in found["stuck"]] == ["nobody_serves"]
    with worked.transaction() as tx:
        add_remote(tx, "able", "fetch")
    assert codes(read(worked)) == [] and read(worked)["stuck"] == []


def test_an_agent_that_never_says_that_it_is_free_is_a_problem_after_ten_minutes(
    worked: Database,
) -> None:
    with worked.transaction() as tx:
        add_remote(tx, "far", "fetch", state="UNKNOWN")
        run_id = add_run(tx, "running")
        task, *_ = add_waiting(tx, run_id, agent_id="far", since=moment(tx, 500))
        add_waiting(tx, run_id, capability="fetch", since=moment(tx, 500))
    assert codes(read(worked)) == []
    with worked.transaction() as tx:
        tx.execute(update(Task).values(waiting_since=Task.waiting_since - timedelta(minutes=5)))
    found = read(worked)
    assert codes(found) == ["line_unserved"] * 2
    assert "says that it is UNKNOWN" in str(found["problems"])
    assert [one["code"] for one in found["stuck"]] == ["nobody_serves"] * 2
    with worked.transaction() as tx:
        hold(tx, "far", task)
    assert codes(read(worked)) == [], "it is at something of ours"


# --- What is stuck ------------------------------------------------------------------------------


Made = tuple[UUID, UUID | None]
"""The run, and the task if it is one."""


def overdue_wake(tx: Tx, seconds: float) -> Made:
    run_id = add_run(tx, "running")
    values = {"reason": "retry", "wake_at": moment(tx, seconds)}
    return run_id, add_task(tx, run_id, "a", "waiting", **values)


def silent_worker(tx: Tx, seconds: float) -> Made:
    run_id = add_run(tx, "running")
    return run_id, add_task(tx, run_id, "a", "running", lease_expires_at=moment(tx, seconds))


def late_start(tx: Tx, seconds: float) -> Made:
    return add_run(tx, "queued", reason="start_at", start_at=moment(tx, seconds)), None


def past_deadline(tx: Tx, seconds: float) -> Made:
    return add_run(tx, "running", deadline_at=moment(tx, seconds)), None


def not_settled(tx: Tx, seconds: float) -> Made:
    run_id = add_run(tx, "running", error=FAULT)
    add_task(tx, run_id, "a", "failed", finished_at=moment(tx, seconds))
    return run_id, None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (overdue_wake, "It was to be looked at again 3 min ago, and nobody did."),
        (silent_worker, "Whoever had it went silent 3 min ago, and nobody took it back."),
        (late_start, "It was to begin 3 min ago, and nobody let it."),
        (past_deadline, "Its deadline was 3 min ago, and nobody ended it."),
        (not_settled, "The last of it was over 3 min ago, and nobody ended it."),
    ],
)
def test_what_the_keeper_should_have_done_a_minute_ago_is_stuck(
    worked: Database, make: Callable[[Tx, float], Made], sentence: str
) -> None:
    with worked.transaction() as tx:
        make(tx, 30)
    assert read(worked)["stuck"] == [], "it is a bit late"
    with worked.transaction() as tx:
        run_id, task = make(tx, 180)
    found = read(worked)
    (stuck,) = found["stuck"]
    assert (stuck["code"], stuck["run_id"], stuck["task_id"]) == ("upkeep_late", run_id, task)
    assert stuck["sentence"] == sentence and "keeper" in stuck["hint"]
    (problem,) = found["problems"]
    assert problem["code"] == "runs_stuck"
    assert problem["sentence"] == f"1 run is stuck, such as {run_id}: {sentence}"


def forgotten_join(tx: Tx, run_id: UUID) -> UUID:
    done = add_task(tx, run_id, "a", "completed", finished_at=moment(tx, 180))
    return add_task(tx, run_id, "b", "waiting", reason="dependencies", depends_on=[done])


def forgotten_items(tx: Tx, run_id: UUID) -> UUID:
    parent = add_task(tx, run_id, "a", "waiting", reason="children", kind="for_each", items=2)
    over = {"parent_id": parent, "finished_at": moment(tx, 180)}
    add_task(tx, run_id, "a", "completed", index=0, **over)
    add_task(tx, run_id, "a", "waiting", reason="max_parallel", index=1, parent_id=parent)
    return parent


def forgotten_child(tx: Tx, run_id: UUID) -> UUID:
    child = add_run(tx, "completed", finished_at=moment(tx, 180))
    more = {"kind": "workflow", "items": 0, "child_run_id": child}
    return add_task(tx, run_id, "a", "waiting", reason="children", **more)


def held_up(tx: Tx, run_id: UUID) -> UUID:
    tx.execute(update(Run).where(Run.id == run_id).values(generation_at=moment(tx, 180)))
    return add_task(tx, run_id, "a", "waiting", reason="paused")


def without_a_moment(tx: Tx, run_id: UUID) -> UUID:
    return add_task(tx, run_id, "a", "waiting", reason="retry", created_at=moment(tx, 180))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (forgotten_join, "All that it depends on is over, for 3 min, and nobody woke it."),
        (forgotten_items, "All that it waited for is over, for 3 min, and nobody woke it."),
        (forgotten_child, "All that it waited for is over, for 3 min, and nobody woke it."),
        (held_up, "It is held up for a pause of its run that ended 3 min ago."),
        (without_a_moment, "It waits (retry), and there is no moment at which"),
    ],
)
def test_a_task_that_nobody_wakes_is_stuck_unless_its_run_is_paused(
    worked: Database, make: Callable[[Tx, UUID], UUID], sentence: str
) -> None:
    with worked.transaction() as tx:
        run_id = add_run(tx, "running")
        task = make(tx, run_id)
    (stuck,) = read(worked)["stuck"]
    assert (stuck["code"], stuck["run_id"], stuck["task_id"]) == ("nobody_wakes", run_id, task)
    assert stuck["sentence"].startswith(sentence)
    assert stuck["hint"].startswith(f"`opscore run pause {run_id}`")
    with worked.transaction() as tx:
        tx.execute(update(Run).where(Run.id == run_id).values(status="paused"))
    assert read(worked)["stuck"] == []


def never_visited(tx: Tx, run_id: UUID, seconds: float) -> UUID:
    past = moment(tx, seconds)
    tx.execute(update(Run).where(Run.id == run_id).values(generation_at=past))
    done = add_task(tx, run_id, "a", "completed", created_at=past, finished_at=past)
    first = add_task(tx, run_id, "b", created_at=past, depends_on=[done])
    add_task(tx, run_id, "c", created_at=past, depends_on=[first])
    return first


def never_came(tx: Tx, run_id: UUID, seconds: float) -> UUID:
    return add_task(tx, run_id, "a", "waiting", reason="retry", woken_at=moment(tx, seconds))


@pytest.mark.parametrize("make", [never_visited, never_came])
def test_a_visit_that_left_an_empty_queue_ten_minutes_ago_is_lost(
    worked: Database, make: Callable[[Tx, UUID, float], UUID]
) -> None:
    with worked.transaction() as tx:
        make(tx, add_run(tx, "running"), 500)
    assert read(worked)["stuck"] == [], "the rescue may yet find it"
    with worked.transaction() as tx:
        run_id = add_run(tx, "running")
        task = make(tx, run_id, 700)
    assert read(worked, {**EMPTY, AGENTS_QUEUE: Depth(1, 0)})["stuck"] == [], "it may be late"
    assert read(worked, None)["stuck"] == [], "nobody knows"
    (stuck,) = read(worked)["stuck"]
    assert (stuck["code"], stuck["run_id"], stuck["task_id"]) == ("visit_lost", run_id, task)
    assert "sent 12 min ago" in stuck["sentence"] and AGENTS_QUEUE in stuck["sentence"]
    with worked.transaction() as tx:
        tx.execute(text("DELETE FROM workers"))
        work(tx, IO_QUEUE)
    assert read(worked)["stuck"] == [], "nobody takes from that queue"


def test_a_run_whose_turn_does_not_come_is_stuck(worked: Database) -> None:
    with worked.transaction() as tx:
        before = add_run(tx, "running", workflow_id="w")
        tx.execute(insert(Slot).values(pool="runs:w", number=1, holder=before))
        held = {"workflow_id": "w", "reason": "max_concurrent_runs", "max_concurrent": 1}
        held |= {"created_at": moment(tx, 700), "generation_at": moment(tx, 700)}
        waits = add_run(tx, "queued", **held)
    assert read(worked)["stuck"] == [], "one is under way"
    with worked.transaction() as tx:
        tx.execute(update(Run).where(Run.id == before).values(status="paused"))
    (stuck,) = read(worked)["stuck"]
    assert (stuck["code"], stuck["run_id"], stuck["task_id"]) == ("turn_blocked", waits, None)
    assert stuck["sentence"] == "It waits for its turn, and 1 before it are paused."
    assert "`opscore run list --workflow w --status paused`" in stuck["hint"]
    with worked.transaction() as tx:
        over = {"status": "completed", "finished_at": moment(tx, 2)}
        tx.execute(update(Run).where(Run.id == before).values(over))
    assert read(worked)["stuck"] == [], "it is let go at this moment"
    with worked.transaction() as tx:
        tx.execute(update(Run).where(Run.id == before).values(finished_at=moment(tx, 90)))
    (stuck,) = read(worked)["stuck"]
    assert stuck["sentence"] == "It waits for its turn, and no run of w is under way."


def test_what_only_takes_its_time_is_not_stuck(worked: Database) -> None:
    with worked.transaction() as tx:
        day = moment(tx, 86_400)
        add_agent(tx, "writer", capacity=1)
        run_id = add_run(tx, "running", created_at=day, generation_at=day)
        tasks = [
            ("busy", "waiting", {"reason": "agent_busy", "line_agent_id": "writer"}),
            ("retry", "waiting", {"reason": "retry", "wake_at": moment(tx, -3600)}),
            ("approval", "waiting", {"reason": "approval", "items": 0}),
            ("delay", "waiting", {"reason": "delay", "wake_at": moment(tx, -3600)}),
            ("running", "running", {"lease_expires_at": moment(tx, -20)}),
        ]
        for name, kind, more in tasks:
            task = add_task(
                tx, run_id, name, kind, created_at=day, started_at=day, waiting_since=day, **more
            )
            add_task(tx, run_id, f"after {name}", created_at=day, depends_on=[task])
            later = {"reason": "dependencies", "depends_on": [task]}
            add_task(tx, run_id, f"later {name}", "waiting", created_at=day, **later)
        add_run(tx, "paused", created_at=day, generation_at=day)
        add_run(tx, "queued", reason="start_at", start_at=moment(tx, -60), created_at=day)
    found = read(worked)
    assert found["stuck"] == [] and found["problems"] == []


def test_no_more_than_twenty_are_told_and_those_are_the_oldest(worked: Database) -> None:
    with worked.transaction() as tx:
        for n in range(30):
            overdue_wake(tx, 1000 + n)
            silent_worker(tx, 2000 + n)
    stuck = read(worked)["stuck"]
    assert len(stuck) == status.stuck.SHOWN
    moments = [one["since"] for one in stuck]
    with worked.transaction() as tx:
        assert moments == sorted(moments) and moments[-1] < moment(tx, 2000)


# --- Schedules and the database -----------------------------------------------------------------


def add_schedule(tx: Tx, name: str, next_at: datetime | None, **more: Any) -> None:
    row = {"name": name, "workflow_id": "w", "every_seconds": 60, "timezone": "UTC", "input": {}}
    row |= {"overlap": "skip", "catch_up": "last", "catch_up_window_seconds": 60}
    tx.execute(insert(Schedule).values({**row, "next_at": next_at, **more}))


def test_schedules_that_no_beat_fires_are_late(worked: Database) -> None:
    with worked.transaction() as tx:
        add_schedule(tx, "to-come", moment(tx, -60))
        add_schedule(tx, "due", moment(tx, 1))
        add_schedule(tx, "never", None)
        add_schedule(tx, "paused", moment(tx, 500), enabled=False)
    found = read(worked)
    counts = {name: found["schedules"][name] for name in ("enabled", "due", "late")}
    assert counts == {"enabled": 3, "due": 1, "late": 0} and codes(found) == []
    with worked.transaction() as tx:
        add_schedule(tx, "late", moment(tx, 90))
    found = read(worked)
    assert (found["schedules"]["late"], codes(found)) == (1, ["schedules_late"])
    assert 90 <= found["schedules"]["worst_lag_seconds"] < 100
    assert "`opscore beat`" in found["problems"][0]["hint"]


def test_a_database_that_is_behind_or_ahead_is_said_to_be(worked: Database) -> None:
    with worked.transaction() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = read(worked)
    assert codes(found) == ["database_ahead"] and len(found["workers"]) == 1
    with worked.transaction() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '0001'"))
        tx.execute(text("DROP TABLE workers"))
    older = read(worked)
    assert codes(older) == ["database_behind"]
    assert "`opscore db upgrade`" in older["problems"][0]["hint"]
    assert set(older) == set(found) and older["database"]["revision"] == "0001"
    assert set(older["fleet"]) == set(found["fleet"])


def test_clocks_that_differ_are_said_to(worked: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(read(worked)["database"]["clock_skew_seconds"]) < 1
    for skew, way in ((3.5, "behind"), (-3.5, "ahead of")):
        now = time.time
        monkeypatch.setattr(time, "time", lambda now=now, skew=skew: now() + skew)
        found = read(worked)
        monkeypatch.undo()
        assert codes(found) == ["clock_skew"]
        assert f"3.5 s {way} that of this process" in found["problems"][0]["sentence"]


# --- What it costs ------------------------------------------------------------------------------


def test_nothing_can_be_written_in_its_transaction_and_all_of_it_is_of_one_moment(
    worked: Database,
) -> None:
    with worked.transaction() as tx:
        assert status.read(tx, EMPTY)["runs"] == []
        with worked.transaction() as other:
            add_run(other, "running")
        assert tx.execute(text("SELECT count(*) FROM runs")).scalar() == 0
        with pytest.raises(DBAPIError, match="read-only"):
            tx.execute(text("DELETE FROM workers"))


def test_a_statement_that_takes_too_long_is_given_up_on(worked: Database) -> None:
    with worked.transaction() as holder:
        holder.execute(text("LOCK TABLE tasks"))
        began = time.monotonic()
        with pytest.raises(OperationalError):
            read(worked)
        assert time.monotonic() - began < 3 * status.STATEMENT_SECONDS


def fill(tx: Tx, ended: int, open_runs: int) -> None:
    """Write runs of a task each: those that are over, and those whose task waits."""
    tx.execute(insert(Workflow).values(workflow_id="w", version=1, definition={}, digest=""))
    for n in range(20):
        add_agent(tx, f"a{n}", "write", capacity=2)
    tx.execute(
        text(
            """
WITH made AS (
    INSERT INTO runs (id, workflow_id, version, status, input, created_at, started_at, finished_at,
                      generation_at)
    SELECT gen_random_uuid(), 'w', 1, CASE WHEN n > :open THEN 'completed' ELSE 'running' END, '{}',
           now() - n * interval '1 s', now(), CASE WHEN n > :open THEN now() END,
           now() - n * interval '1 s'
    FROM generate_series(1, :runs) AS n RETURNING id, status
), numbered AS (SELECT *, row_number() OVER () AS n FROM made)
INSERT INTO tasks (id, run_id, definition_id, kind, position, depends_on, successors, reads,
    wanted_agent_id, line_agent_id, timeout_seconds, max_attempts, retry_backoff, retry_max_backoff,
    busy_backoff, busy_max_backoff, max_wait_seconds, goes_on, priority, status, reason,
    waiting_since, wake_at, finished_at, queue)
SELECT gen_random_uuid(), id, 'a', 'agent', 0, '{}', '{}', '{}', 'a' || n % 20, 'a' || n % 20, 60,
    3, 2, 60, 1, 60, 60, false, 1, CASE WHEN status = 'completed' THEN status ELSE 'waiting' END,
    CASE WHEN status = 'running' THEN
         (ARRAY['agent_busy', 'approval', 'retry', 'dependencies'])[1 + n % 4] END,
    CASE WHEN status = 'running' AND n % 4 = 0 THEN now() END,
    CASE WHEN status = 'running' AND n % 4 = 2 THEN now() + interval '1 h' END,
    CASE WHEN status = 'completed' THEN now() END, 'opscore.agents'
FROM numbered
"""
        ),
        {"runs": ended + open_runs, "open": open_runs},
    )


def whole_reads(plan: Mapping[str, Any], partial: set[str]) -> Iterator[str]:
    """Yield the nodes of a plan that read all of a table which grows with what is over."""
    table, index = plan.get("Relation Name"), plan.get("Index Name")
    is_bounded = "Index Cond" in plan or index in partial
    if plan["Node Type"] == "Seq Scan" and table in ("runs", "tasks", "attempts"):
        yield f"Seq Scan on {table}"
    if index is not None and not is_bounded and table in ("runs", "tasks", "attempts"):
        yield f"all of {index}"
    for child in plan.get("Plans", ()):
        yield from whole_reads(child, partial)


def test_it_reads_by_the_indexes_of_what_is_open_beside_many_runs_that_are_over(
    worked: Database,
) -> None:
    with worked.transaction() as tx:
        fill(tx, ended=30_000, open_runs=4_000)
    with worked.autocommit() as tx:
        tx.execute(text("ANALYZE"))
    executed: list[tuple[str, Any]] = []

    def note(*about: Any) -> None:
        executed.append((about[2], about[3]))

    with worked.transaction() as tx:
        event.listen(tx, "before_cursor_execute", note)
        found = status.read(tx, EMPTY)
        event.remove(tx, "before_cursor_execute", note)
        assert sum(row["count"] for row in found["waiting"]) == 4_000
        query = "SELECT indexrelid::regclass::text FROM pg_index WHERE indpred IS NOT NULL"
        partial = set(tx.execute(text(query)).scalars())
        cursor = tx.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
        read_whole = []
        for statement, parameters in executed:
            if not statement.startswith("SET"):
                cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
                ((tree,),) = cursor.fetchall()
                tree = json.loads(tree) if isinstance(tree, str) else tree
                read_whole += list(whole_reads(tree[0]["Plan"], partial))
        assert len(executed) > 10 and read_whole == []


def test_problems_are_in_the_order_of_whom_they_concern(database: Database) -> None:
    with database.transaction() as tx:
        add_schedule(tx, "late", moment(tx, 90))
        add_agent(tx, "writer", capacity=1, paused=True)
        add_waiting(tx, add_run(tx, "running"), agent_id="writer", since=moment(tx, 1))
    found = read(database, None)
    assert codes(found) == ["broker_away", "no_workers", "schedules_late", "agent_paused"]
    for problem in found["problems"]:
        assert set(problem) == {"code", "sentence", "hint"}
        assert all(said.strip() and said.endswith(".") for said in list(problem.values())[1:])
    assert problems.find(found | {"fleet": {"lines": []}}) == found["problems"][:3]
