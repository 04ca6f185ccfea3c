"""What is read: pages that neither repeat nor skip, details in a handful of statements."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import pytest
from rows import (
    NOW,
    add_agent,
    add_attempt,
    add_event,
    add_items,
    add_log,
    add_run,
    add_task,
    add_waiting,
    add_workflow,
)
from sqlalchemy import ColumnElement, event, insert, text, update
from sqlalchemy.exc import IntegrityError

from opscore import queries
from opscore.db import Database, Tx
from opscore.errors import AgentNotFound, RunNotFound, TaskNotFound, WorkflowNotFound
from opscore.models import Event, Lease, Slot
from opscore.queries import RunFilter
from opscore.states import Reason


@pytest.fixture
def tx(database: Database) -> Iterator[Tx]:
    with database.autocommit() as tx:
        yield tx


@contextmanager
def statements(tx: Tx) -> Iterator[list[str]]:
    """Collect the statements executed within."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        seen.append(statement)

    event.listen(tx, "before_cursor_execute", note)
    yield seen
    event.remove(tx, "before_cursor_execute", note)


def walk(tx: Tx, wanted: RunFilter, limit: int) -> list[UUID]:
    found, after = [], None
    while True:
        page = queries.list_runs(tx, wanted, after=after, limit=limit)
        found += [row["run_id"] for row in page.items]
        if (after := page.next) is None:
            return found


# --- Runs ---------------------------------------------------------------------------------------


def test_pages_of_runs_show_every_run_once_newest_first_also_when_moments_are_equal(tx: Tx) -> None:
    runs = [add_run(tx, created_at=NOW + timedelta(seconds=n // 3)) for n in range(10)]
    found = walk(tx, RunFilter(), 3)
    assert sorted(found) == sorted(runs) and len(found) == 10
    assert set(found[:1]) == {runs[9]} and set(found[1:4]) == set(runs[6:9])


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (RunFilter(workflow_id="b"), 6),
        (RunFilter(status=["running", "failed", "running"]), 8),
        (RunFilter(workflow_id="b", status=["running", "failed"]), 4),
    ],
)
def test_pages_of_runs_of_several_statuses_are_in_one_order(
    tx: Tx, wanted: RunFilter, count: int
) -> None:
    statuses = ["queued", "running", "failed"]
    for n in range(12):
        created_at = NOW + timedelta(seconds=n // 2)
        add_run(tx, statuses[n // 2 % 3], workflow_id="ab"[n % 2], created_at=created_at)
    found = walk(tx, wanted, 3)
    assert len(set(found)) == len(found) == count
    assert found == sorted(found, key=lambda run: order_of(tx, run), reverse=True)


def order_of(tx: Tx, run: UUID) -> tuple[datetime, UUID]:
    return queries.get_run(tx, run)["created_at"], run


def test_runs_that_come_while_paging_make_none_repeat_or_vanish(tx: Tx) -> None:
    runs = [add_run(tx, created_at=NOW + timedelta(seconds=n)) for n in range(4)]
    first = queries.list_runs(tx, RunFilter(), after=None, limit=2)
    add_run(tx, created_at=NOW + timedelta(seconds=9))
    rest = queries.list_runs(tx, RunFilter(), after=first.next, limit=2)
    assert [row["run_id"] for row in [*first.items, *rest.items]] == runs[::-1]
    assert rest.next is None


def test_filters_of_runs_hold_together(tx: Tx) -> None:
    wanted = add_run(tx, "running", workflow_id="b", labels={"team": "x", "k": "1"}, created_at=NOW)
    add_run(tx, "running", workflow_id="a", labels={"team": "x"}, created_at=NOW)
    add_run(tx, "completed", workflow_id="b", labels={"team": "x", "k": "1"}, created_at=NOW)
    add_run(tx, "running", workflow_id="b", labels={"team": "y", "k": "1"}, created_at=NOW)
    every = RunFilter(
        workflow_id="b",
        status=["running", "queued"],
        labels=[("team", "x"), ("k", "1")],
        created_after=NOW - timedelta(seconds=1),
        created_before=NOW + timedelta(seconds=1),
    )
    assert walk(tx, every, 50) == [wanted]
    assert walk(tx, RunFilter(created_after=NOW), 50) == []
    assert walk(tx, RunFilter(created_before=NOW), 50) == []


def test_the_detail_of_a_run_has_its_tasks_in_the_order_of_the_definition_without_the_end(
    tx: Tx,
) -> None:
    run_id = add_run(tx, "running")
    b = add_task(tx, run_id, "b", position=1)
    a = add_task(tx, run_id, "a", "completed", output=[1], position=0)
    add_task(tx, run_id, "", kind="end", position=2)
    detail = queries.get_run_detail(tx, run_id)
    assert [task["task_id"] for task in detail["tasks"]] == [a, b]
    assert detail["tasks"][0]["output"] == [1]
    assert detail["tasks"][0]["items"] is None


def test_the_detail_shows_at_most_200_items_failures_first_then_waits(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    parent = add_task(tx, run_id, "each", "waiting", reason="children", kind="for_each", items=300)
    add_items(tx, run_id, parent, ["completed"] * 296 + ["pending", "running", "failed", "failed"])
    add_task(tx, run_id, "later", "waiting", reason="dependencies", position=2)
    tasks = queries.get_run_detail(tx, run_id)["tasks"]
    assert [task["task_definition_id"] for task in tasks[:2]] == ["each", "later"]
    items = tasks[2:]
    assert len(items) == 200
    assert [task["status"] for task in items[:4]] == ["failed", "failed", "running", "pending"]
    assert [task["index"] for task in items[4:6]] == [0, 1]
    assert tasks[0]["items"] == {
        "total": 300,
        "pending": 1,
        "waiting": 0,
        "running": 1,
        "completed": 296,
        "failed": 2,
        "cancelled": 0,
    }


def test_a_detail_is_a_handful_of_statements_and_quick_for_10000_items(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    parent = add_task(
        tx, run_id, "each", "waiting", reason="children", kind="for_each", items=10_000
    )
    add_items(
        tx, run_id, parent, ["completed"] * 5000 + ["pending"] * 5000, output={"n": "x" * 500}
    )
    for number in (1, 2):
        add_attempt(tx, parent, number, "completed")
    began = time.monotonic()
    with statements(tx) as seen:
        detail = queries.get_run_detail(tx, run_id)
    assert len(seen) <= 6, seen
    assert time.monotonic() - began < 2
    assert len(detail["tasks"]) == 201


def test_attempts_come_with_their_task_without_traceback_and_only_the_newest(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    task = add_task(tx, run_id, "a", "failed", attempt=25)
    for number in range(1, 26):
        add_attempt(
            tx, task, number, "failed", error={"code": "c", "message": "m", "traceback": "t"}
        )
    (shown,) = queries.get_run_detail(tx, run_id)["tasks"]
    assert [attempt["number"] for attempt in shown["attempts"]] == list(range(6, 26))
    assert shown["attempts"][0]["error"] == {"code": "c", "message": "m"}
    assert len(queries.get_task(tx, task)["attempts"]) == 25


def test_a_run_is_over_when_it_has_ended(tx: Tx) -> None:
    assert queries.is_run_over(tx, add_run(tx, "failed"))
    assert not queries.is_run_over(tx, add_run(tx, "running"))
    with pytest.raises(RunNotFound):
        queries.is_run_over(tx, uuid4())


# --- Tasks --------------------------------------------------------------------------------------


def test_pages_of_tasks_go_through_the_definition_and_its_items(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    add_task(tx, run_id, "a", position=0)
    parent = add_task(tx, run_id, "each", "waiting", reason="children", kind="for_each", position=1)
    add_items(tx, run_id, parent, ["pending"] * 5)
    add_task(tx, run_id, "z", position=2)
    add_task(tx, run_id, "", kind="end", position=3)
    found, after = [], None
    while True:
        page = queries.list_tasks(tx, run_id, after=after, limit=3)
        found += [(row["task_definition_id"], row["index"]) for row in page.items]
        if (after := page.next) is None:
            break
    assert found == [("a", None), ("each", None), *[("each", n) for n in range(5)], ("z", None)]


def test_tasks_are_filtered_by_status_and_definition(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    add_task(tx, run_id, "a", "failed")
    parent = add_task(tx, run_id, "each", "waiting", reason="children", kind="for_each", position=1)
    add_items(tx, run_id, parent, ["failed", "completed"])
    failed = queries.list_tasks(
        tx, run_id, status=["failed"], task_definition_id="each", after=None, limit=9
    )
    assert [(row["task_definition_id"], row["index"]) for row in failed.items] == [("each", 0)]


def test_tasks_of_no_run_are_not_an_empty_page(tx: Tx) -> None:
    with pytest.raises(RunNotFound):
        queries.list_tasks(tx, uuid4(), after=None, limit=9)


def test_a_task_shows_what_its_newest_attempt_logged(tx: Tx) -> None:
    task = add_task(tx, add_run(tx, "running"), "a", "running", attempt=2)
    add_attempt(tx, task, 1, "failed")
    add_attempt(tx, task, 2, progress=0.5, progress_message="half")
    add_log(tx, task, 1, 1, "old")
    add_log(tx, task, 2, 1, "first", n=1)
    add_log(tx, task, 2, 2, "second")
    shown = queries.get_task(tx, task)
    assert [line["message"] for line in shown["logs"]] == ["first", "second"]
    assert shown["attempts"][1]["progress"] == 0.5


def test_the_implicit_end_is_no_task_to_be_seen(tx: Tx) -> None:
    end = add_task(tx, add_run(tx, "running"), "", kind="end")
    with pytest.raises(TaskNotFound):
        queries.get_task(tx, end)


def test_an_attempt_is_shown_with_its_traceback(tx: Tx) -> None:
    task = add_task(tx, add_run(tx, "running"), "a", "failed")
    add_attempt(tx, task, 1, "failed", error={"code": "c", "message": "m", "traceback": "at x"})
    assert queries.get_attempt(tx, task, 1)["error"]["traceback"] == "at x"
    with pytest.raises(TaskNotFound, match="no attempt 2"):
        queries.get_attempt(tx, task, 2)


def test_what_a_task_waits_for_is_said_in_words(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    wake = {"wake_at": NOW}
    a = add_task(tx, run_id, "a", "waiting", reason="dependencies", **wake)
    add_task(tx, run_id, "b", "waiting", reason="retry", tries=1, position=1, **wake)
    add_task(tx, run_id, "c", depends_on=[a], position=2)
    nobody = {"wanted_agent_id": None, "wanted_capability": "sum"}
    add_task(tx, run_id, "d", "waiting", reason="agent_unavailable", position=3, **nobody)
    each = {"kind": "for_each", "items": 2, "position": 4}
    parent = add_task(tx, run_id, "each", "waiting", reason="children", **each)
    add_items(tx, run_id, parent, ["completed", "waiting"], reason="max_parallel")
    add_task(tx, run_id, "e", "running", position=5)
    lease = {"agent_id": "r", "lease_expires_at": NOW}
    add_task(tx, run_id, "f", "waiting", reason="remote", position=6, **lease)
    spare = {"fallback": ["s", "t"]}
    add_task(tx, run_id, "g", "waiting", reason="agent_unavailable", position=7, **spare, **wake)
    add_task(tx, run_id, "h", "waiting", reason="agent_unavailable", position=8)
    more = {"position": 9, **nobody, **spare}
    add_task(tx, run_id, "i", "waiting", reason="agent_unavailable", **more)
    add_task(tx, run_id, "j", "waiting", reason="retry", position=10)
    said = [task["waiting_for"] for task in queries.get_run_detail(tx, run_id)["tasks"]]
    assert said == [
        "tasks it depends on are not over; it is tried again at 2026-01-31T12:00:00Z",
        "1 of 3 attempts failed; it is tried again at 2026-01-31T12:00:00Z",
        "task a is not over",
        "no agent with capability sum is available",
        "1 of 2 items are over",
        None,
        "agent r has it and reports when it is done; until 2026-01-31T12:00:00Z",
        "none of the agents writer, s, t is available; it is tried again at 2026-01-31T12:00:00Z",
        "agent writer is unavailable",
        "no agent with capability sum is available, nor s, t",
        "it goes on in another attempt",
        "as many items as maxParallel allows are out already",
        None,
    ]


@pytest.mark.parametrize(
    ("reason", "more", "said"),
    [
        (
            "approval",
            {"decision": None, "wake_at": NOW},
            "waiting for somebody to approve or reject it, until 2026-01-31T12:00:00Z",
        ),
        (
            "approval",
            {"decision": {"approved": True, "principal": "key:x"}},
            "approved by key:x; it goes on",
        ),
        ("delay", {"wake_at": NOW}, "waiting until 2026-01-31T12:00:00Z"),
        ("delay", {"wake_at": None}, "its delay is over"),
        ("paused", {}, "the run is paused"),
        ("children", {"items": None}, "its sub-workflow is not over"),
    ],
)
def test_waits_for_no_agent_are_said_in_words_too(
    reason: str, more: dict[str, object], said: str
) -> None:
    task = {"status": "waiting", "reason": reason, "open_dependencies": None, **more}
    assert queries.describe_wait(task) == said


def test_there_are_words_for_every_reason_to_wait() -> None:
    assert set(Reason) <= set(queries._WAITS)


# --- Lines --------------------------------------------------------------------------------------


def hold_slot(tx: Tx, agent_id: str, number: int, run_id: UUID) -> None:
    """Have a task of the run hold a slot of the agent, since `number` seconds after `NOW`."""
    task = add_task(tx, run_id, f"held-{number}", "running", agent_id=agent_id, attempt=1)
    held = {"holder": task, "attempt": 1, "held_at": NOW + timedelta(seconds=number)}
    tx.execute(
        update(Slot)
        .where(Slot.pool == agent_id, Slot.number == number)
        .values(**held, lease_expires_at=text("now() + interval '9 s'"))
    )


def waits(tx: Tx, run_id: UUID) -> list[str]:
    tasks = queries.list_tasks(tx, run_id, status=["waiting"], after=None, limit=200).items
    return sorted(task["waiting_for"] for task in tasks)


def test_a_wait_for_a_busy_agent_says_with_which_runs_how_many_are_ahead_and_how_long(
    tx: Tx,
) -> None:
    add_agent(tx, "writer", "write", capacity=5)
    add_agent(tx, "editor", "write", capacity=1)
    set_pace(tx, "writer", *[100.0] * 5)
    run_id, *others = (add_run(tx, "running") for _ in range(6))
    for number, holder in enumerate([others[0], others[0], run_id, *others[1:3]], start=1):
        hold_slot(tx, "writer", number, holder)
    hold_slot(tx, "editor", 1, others[3])
    add_waiting(tx, run_id, 7, agent_id="writer", wake_at=NOW)
    mine = f"busy with run {others[0]}, this run, run {others[1]} and 1 more"
    assert waits(tx, run_id) == sorted(
        f"waiting for agent writer: {mine}, {place}"
        for place in (
            "next in line, about 100 s",
            *(f"{n} ahead, about 100 s" for n in (1, 2, 3, 4)),
            *(f"{n} ahead, about 3 min" for n in (5, 6)),
        )
    )


def test_a_wait_for_a_capability_says_what_all_who_have_it_are_busy_with(tx: Tx) -> None:
    for agent in ("writer", "editor"):
        add_agent(tx, agent, "write", capacity=1)
    run_id, first, second = (add_run(tx, "running") for _ in range(3))
    hold_slot(tx, "writer", 1, first)
    hold_slot(tx, "editor", 1, second)
    add_waiting(tx, run_id, capability="write", wake_at=NOW)
    add_waiting(tx, run_id, agent_id="nobody", wake_at=None)
    spare = {"wanted_agent_id": "writer", "line_agent_id": "editor"}
    add_waiting(tx, run_id, **spare)
    assert waits(tx, run_id) == [
        f"waiting for agent editor, which it falls back on: busy with run {second}, next in line",
        "waiting for agent nobody: busy, next in line",
        "waiting for an agent with capability write: busy with"
        f" {', '.join(f'run {run}' for run in sorted([first, second]))}, next in line;"
        f" it is tried again at 2026-01-31T12:00:00Z",
    ]


def test_what_agents_are_busy_with_is_one_statement_for_all_who_wait(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    for number in range(20):
        add_agent(tx, f"a{number}", capacity=1)
        hold_slot(tx, f"a{number}", 1, run_id)
        add_waiting(tx, run_id, 5, agent_id=f"a{number}")
    with statements(tx) as seen:
        assert len(queries.list_tasks(tx, run_id, after=None, limit=200).items) == 120
    assert len(seen) == 6, seen


def places(tx: Tx, run_id: UUID) -> dict[UUID, tuple[int | None, float | None]]:
    """Return position and seconds to the estimated start of the tasks that stand in a line."""
    (now,) = tx.execute(text("SELECT now()")).one()
    tasks = queries.list_tasks(tx, run_id, after=None, limit=200).items
    return {task["task_id"]: place_of(task, now) for task in tasks if task["queue"] is not None}


def place_of(task: queries.Row, now: datetime) -> tuple[int | None, float | None]:
    at = task["queue"]["estimated_start_at"]
    return task["queue"]["position"], None if at is None else round((at - now).total_seconds(), 1)


def set_pace(tx: Tx, agent_id: str, *seconds: float | None) -> None:
    for number, average in enumerate(seconds, start=1):
        where = (Slot.pool == agent_id, Slot.number == number)
        tx.execute(update(Slot).where(*where).values(average_seconds=average))


def test_a_place_in_line_counts_those_before_by_priority_and_then_by_time(tx: Tx) -> None:
    add_agent(tx, "writer", "write", capacity=1)
    run_id, other = add_run(tx, "running"), add_run(tx, "running")
    first, second = add_waiting(tx, run_id, 2, agent_id="writer", since=NOW)
    (early,) = add_waiting(tx, other, agent_id="writer", since=NOW - timedelta(days=1))
    (high,) = add_waiting(tx, run_id, agent_id="writer", since=NOW + timedelta(days=1), priority=2)
    (low,) = add_waiting(tx, run_id, agent_id="writer", since=NOW - timedelta(days=2), priority=0)
    (same,) = add_waiting(tx, run_id, agent_id="writer", since=NOW)
    gone = {"reason": "agent_unavailable", "priority": 2}
    (away,) = add_waiting(tx, run_id, agent_id="writer", **gone)
    found = {task: place for task, (place, _) in places(tx, run_id).items()}
    assert found == {away: 1, high: 2, first: 4, same: 4, second: 6, low: 7}
    assert places(tx, other)[early][0] == 3


def test_those_who_wait_elsewhere_or_for_something_else_are_not_in_line(tx: Tx) -> None:
    add_agent(tx, "writer", "write", capacity=1)
    run_id, other = add_run(tx, "running"), add_run(tx, "running")
    before = {"since": NOW - timedelta(days=1)}
    add_waiting(tx, other, agent_id="reader", **before)
    add_waiting(tx, other, capability="write", **before)
    add_task(tx, other, "retry", "waiting", reason="retry", line_agent_id="writer")
    add_task(tx, other, "done", "completed", line_agent_id="writer", waiting_since=NOW)
    (mine,) = add_waiting(tx, run_id, agent_id="writer")
    add_task(tx, run_id, "pending")
    assert places(tx, run_id) == {mine: (1, None)}


def test_whoever_asks_for_a_capability_stands_in_its_own_line(tx: Tx) -> None:
    add_agent(tx, "writer", "write", "edit", capacity=1)
    run_id = add_run(tx, "running")
    tasks = [
        *add_waiting(tx, run_id, 2, capability="write"),
        *add_waiting(tx, run_id, 2, capability="edit"),
    ]
    assert [places(tx, run_id)[task][0] for task in tasks] == [1, 2, 1, 2]


def test_a_start_is_estimated_from_the_slots_that_serve_the_line(tx: Tx) -> None:
    add_agent(tx, "a", "write", capacity=2)
    add_agent(tx, "b", "write", "edit", capacity=1)
    add_agent(tx, "paused", "write", capacity=9, paused=True)
    set_pace(tx, "a", 10, None)
    set_pace(tx, "b", 20)
    set_pace(tx, "paused", 1000)
    run_id = add_run(tx, "running")
    by_capability = add_waiting(tx, run_id, 4, capability="write")
    by_name = add_waiting(tx, run_id, 3, agent_id="a")
    told = places(tx, run_id)
    assert [told[task] for task in by_capability] == [(1, 15), (2, 15), (3, 15), (4, 30)]
    assert [told[task] for task in by_name] == [(1, 10), (2, 10), (3, 20)]


def test_no_start_is_estimated_where_nothing_is_known_or_nobody_serves(tx: Tx) -> None:
    add_agent(tx, "new", capacity=1)
    add_agent(tx, "gone", "write", capacity=1, deregistered_at=NOW)
    set_pace(tx, "gone", 10)
    run_id = add_run(tx, "running")
    tasks = [
        *add_waiting(tx, run_id, agent_id="new"),
        *add_waiting(tx, run_id, agent_id="gone"),
        *add_waiting(tx, run_id, capability="write"),
        *add_waiting(tx, run_id, agent_id="never-seen"),
    ]
    assert places(tx, run_id) == {task: (1, None) for task in tasks}


def test_places_far_back_in_a_long_line_are_told_quickly_in_one_statement(tx: Tx) -> None:
    add_agent(tx, "writer", "write", capacity=1)
    add_waiting(tx, add_run(tx, "running"), queries.PLACES_COUNTED - 1, capability="write")
    run_id = add_run(tx, "running")
    last, *others = add_waiting(tx, run_id, 100, capability="write", since=NOW + timedelta(days=1))
    began = time.monotonic()
    with statements(tx) as seen:
        found = places(tx, run_id)
    assert time.monotonic() - began < 1
    assert len([statement for statement in seen if "shown" in statement]) == 1
    assert found[last] == (queries.PLACES_COUNTED, None)
    assert {found[task] for task in others} == {(None, None)}


# --- Events -------------------------------------------------------------------------------------


def test_events_of_schedules_are_no_runs(tx: Tx) -> None:
    run_id = add_run(tx)
    for type in ("a", "b"):
        tx.execute(insert(Event).values(schedule="s", type=f"schedule.{type}"))
        add_event(tx, run_id, type)
    news = queries.get_news(tx, run_id, after=0, limit=9)
    assert [event["type"] for event in news.events] == ["a", "b"]


@pytest.mark.parametrize("both", [True, False])
def test_an_event_is_about_a_run_or_a_schedule(tx: Tx, both: bool) -> None:
    about = {"run_id": uuid4(), "schedule": "s"} if both else {}
    with pytest.raises(IntegrityError, match="subject"):
        tx.execute(insert(Event).values(type="x", **about))


def test_events_are_read_in_order_from_where_the_reader_was(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    task = add_task(tx, run_id, "a")
    end = add_task(tx, run_id, "", kind="end")
    add_event(tx, run_id, "run.queued")
    add_event(tx, run_id, "task.started", task, attempt=1)
    add_event(tx, run_id, "task.completed", end)
    add_event(tx, add_run(tx), "run.queued")
    first, second = queries.list_events(tx, run_id, after=0, limit=9)
    assert (first["type"], first["task_id"], first["data"]) == ("run.queued", None, {})
    assert (second["task_id"], second["task_definition_id"]) == (task, "a")
    assert second["data"] == {"attempt": 1}
    assert queries.list_events(tx, run_id, after=first["seq"], limit=9) == [second]


def test_no_event_is_read_above_a_transaction_that_is_still_open(
    database: Database, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    with database.transaction() as slow:
        add_event(slow, run_id, "early")
        add_event(tx, run_id, "late")
        assert queries.list_events(tx, run_id, after=0, limit=9) == []
    assert [e["type"] for e in queries.list_events(tx, run_id, after=0, limit=9)] == [
        "early",
        "late",
    ]


def test_no_event_is_read_while_one_of_a_younger_transaction_with_a_lower_seq_is_to_come(
    database: Database, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    with database.transaction() as younger:
        with database.transaction() as older:
            older.execute(text("SELECT pg_current_xact_id()"))
            add_event(younger, run_id, "early")
            add_event(older, run_id, "late")
        assert queries.list_events(tx, run_id, after=0, limit=9) == []
    assert [e["type"] for e in queries.list_events(tx, run_id, after=0, limit=9)] == [
        "early",
        "late",
    ]


def at(seconds: float) -> ColumnElement[datetime]:
    return text(f"now() + interval '{seconds} s'")  # type: ignore[return-value]


def test_an_event_that_is_not_settled_holds_back_those_behind_it(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    for type, seconds in (("a", -9), ("b", 9), ("c", -9)):
        tx.execute(insert(Event).values(run_id=run_id, type=type, data={}, at=at(seconds)))
    assert [e["type"] for e in queries.list_events(tx, run_id, after=0, limit=9)] == ["a"]


def test_a_clock_that_is_set_back_hides_no_event_for_long_and_settles_none_too_early(
    database: Database, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    tx.execute(insert(Event).values(run_id=run_id, type="a", data={}, at=at(3600)))
    with database.transaction() as slow:
        add_event(slow, run_id, "b")
        tx.execute(insert(Event).values(run_id=run_id, type="c", data={}, at=at(-9)))
        assert [e["type"] for e in queries.list_events(tx, run_id, after=0, limit=9)] == ["a"]
    events = queries.list_events(tx, run_id, after=0, limit=9)
    assert [e["type"] for e in events] == ["a", "b", "c"]


def test_an_event_says_who_did_it_or_asked_for_it_and_why(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    task = add_task(tx, run_id, "a")
    add_attempt(tx, task, 1, "failed", worker="w1@host", agent_id="writer")
    add_attempt(tx, task, 2, "lost", worker="w2@host", agent_id="writer")
    add_attempt(tx, task, 3, "completed", worker="w3@host", agent_id="r", report="digest")
    fault = {"code": "agent_failed", "message": "no"}
    lost = {"code": "worker_lost", "message": "silent"}
    told: list[tuple[str, UUID | None, dict[str, object], str | None, str | None]] = [
        ("run.queued", None, {"by": "key:0123abcd", "version": 1}, "key:0123abcd", None),
        ("run.started", None, {}, None, None),
        ("run.republished", None, {"generation": 2}, "keeper", None),
        ("run.republished", None, {"by": "key:0123abcd"}, "key:0123abcd", None),
        ("task.started", task, {"attempt": 1, "worker": "w1@host"}, "worker:w1@host", None),
        ("task.retrying", task, {"attempt": 1, "error": fault}, "worker:w1@host", "agent_failed"),
        ("task.waiting", task, {"reason": "agent_busy"}, None, "agent_busy"),
        ("task.lost", task, {"attempt": 2}, "keeper", None),
        ("task.failed", task, {"attempt": 2, "error": lost}, "keeper", "worker_lost"),
        ("task.started", task, {"attempt": 3, "worker": "w3@host"}, "worker:w3@host", None),
        ("task.waiting", task, {"attempt": 3, "reason": "remote"}, "worker:w3@host", "remote"),
        ("task.completed", task, {"attempt": 3}, "agent:r", None),
        ("task.completed", task, {"by": "key:0123abcd"}, "key:0123abcd", None),
        ("task.cancelled", task, {"reason": "run_cancelled"}, None, "run_cancelled"),
        ("run.completed", None, {}, None, None),
    ]
    for type, of, data, _, _ in told:
        add_event(tx, run_id, type, of, **data)
    events = queries.list_events(tx, run_id, after=0, limit=99)
    assert [(e["type"], e["by"], e["reason"]) for e in events] == [
        (type, by, reason) for type, _, _, by, reason in told
    ]
    shown = [
        {name: value for name, value in data.items() if name != "by"} for *_, data, _, _ in told
    ]
    assert [event["data"] for event in events] == shown


def test_what_happens_to_a_for_each_was_done_by_the_worker_that_started_it(tx: Tx) -> None:
    run_id = add_run(tx, "running")
    each = add_task(tx, run_id, "each", "waiting", reason="children", kind="for_each")
    other = add_task(tx, run_id, "other", "waiting", reason="children", kind="for_each")
    for task, number in ((each, 1), (other, 1), (each, 2)):
        worker = f"w{number}@{'each' if task == each else 'other'}"
        add_event(tx, run_id, "task.started", task, attempt=number, worker=worker)
        type, data = ("task.expanded", {"items": 2}) if number == 1 else ("task.completed", {})
        add_event(tx, run_id, type, task, **data, **({"attempt": 2} if number == 2 else {}))
    add_event(tx, run_id, "task.failed", each, error={"code": "item_failed", "message": "m"})
    events = queries.list_events(tx, run_id, after=0, limit=99)
    assert [
        (event["type"], event["by"]) for event in events if event["type"] != "task.started"
    ] == [
        ("task.expanded", "worker:w1@each"),
        ("task.expanded", "worker:w1@other"),
        ("task.completed", "worker:w2@each"),
        ("task.failed", None),
    ]


def test_events_of_a_restored_dump_are_read_though_their_transactions_are_of_another_server(
    tx: Tx,
) -> None:
    run_id = add_run(tx, "completed")
    tx.execute(insert(Event).values(run_id=run_id, type="old", data={}, transaction=2**62))
    assert [e["type"] for e in queries.list_events(tx, run_id, after=0, limit=9)] == ["old"]


def test_the_news_of_a_run_are_all_when_it_is_over_and_every_event_is_settled(
    database: Database, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    add_event(tx, run_id, "run.queued")
    assert not queries.get_news(tx, run_id, after=0, limit=9).is_all
    tx.execute(text("UPDATE runs SET status = 'completed', finished_at = now()"))
    with database.transaction() as slow:
        slow.execute(text("SELECT pg_current_xact_id()"))
        add_event(tx, run_id, "run.completed")
        news = queries.get_news(tx, run_id, after=0, limit=9)
        assert ([e["type"] for e in news.events], news.is_all) == (["run.queued"], False)
    news = queries.get_news(tx, run_id, after=0, limit=9)
    assert ([e["type"] for e in news.events], news.is_all) == (
        ["run.queued", "run.completed"],
        True,
    )
    assert not queries.get_news(tx, run_id, after=0, limit=2).is_all
    assert queries.get_news(tx, run_id, after=news.events[-1]["seq"], limit=2).is_all


def test_the_news_of_many_runs_are_found_by_one_statement_also_if_one_is_gone(tx: Tx) -> None:
    runs = [add_run(tx, "running") for _ in range(3)]
    for run_id in runs:
        for type in ("a", "b", "c"):
            add_event(tx, run_id, type)
    gone = uuid4()
    _, open_since = queries.find_news(tx, {gone: 0}, open_since=None, limit=2)
    with statements(tx) as seen:
        after = {run_id: 0 for run_id in [*runs, gone]}
        found, _ = queries.find_news(tx, after, open_since=open_since, limit=2)
    assert len(seen) == 1
    assert {run: [e["type"] for e in news.events] for run, news in found.items()} == {
        **{run_id: ["a", "b"] for run_id in runs},
        gone: [],
    }
    assert {run for run, news in found.items() if news.is_all} == {gone}


# --- Workflows ----------------------------------------------------------------------------------


def test_workflows_are_listed_by_their_newest_version_and_inline_ones_not(tx: Tx) -> None:
    add_workflow(tx, "a", 1, created_at=NOW)
    add_workflow(tx, "a", 2, created_at=NOW + timedelta(seconds=5))
    add_workflow(tx, "b", 1, created_at=NOW + timedelta(seconds=1))
    add_workflow(tx, "c", 1, inline=True)
    first = queries.list_workflows(tx, after=None, limit=1)
    rest = queries.list_workflows(tx, after=first.next, limit=5)
    found = [(row["workflow_id"], row["version"]) for row in [*first.items, *rest.items]]
    assert found == [("a", 2), ("b", 1)] and rest.next is None


def test_a_workflow_is_its_newest_version_unless_one_is_named(tx: Tx) -> None:
    add_workflow(tx, "a", 1)
    add_workflow(tx, "a", 2)
    add_workflow(tx, "a", 3, inline=True)
    assert queries.get_workflow(tx, "a")["version"] == 2
    assert queries.get_workflow(tx, "a", 3)["version"] == 3
    with pytest.raises(WorkflowNotFound, match="version 4"):
        queries.get_workflow(tx, "a", 4)
    versions = queries.list_versions(tx, "a", after=None, limit=1)
    assert [row["version"] for row in versions.items] == [2]
    rest = queries.list_versions(tx, "a", after=versions.next, limit=9)
    assert [row["version"] for row in rest.items] == [1]
    with pytest.raises(WorkflowNotFound):
        queries.list_versions(tx, "none", after=None, limit=1)


# --- Agents -------------------------------------------------------------------------------------


def test_an_agent_shows_who_holds_its_slots_and_how_many_wait(tx: Tx) -> None:
    add_agent(tx, "writer", "write", capacity=2)
    add_agent(tx, "reader", "read")
    run_id = add_run(tx, "running")
    task = add_task(tx, run_id, "a", "running", agent_id="writer", attempt=1)
    tx.execute(
        update(Slot)
        .where(Slot.pool == "writer", Slot.number == 1)
        .values(holder=task, attempt=1, lease_expires_at=text("now() + interval '9 s'"))
    )
    add_waiting(tx, run_id, agent_id="writer")
    add_waiting(tx, run_id, capability="write", reason="agent_unavailable")
    add_waiting(tx, run_id, agent_id="other")
    writer = queries.get_agent(tx, "writer")
    assert (writer["state"], writer["running"], writer["waiting"]) == ("active", 1, 2)
    (holder,) = writer["holders"]
    assert (holder["slot"], holder["task_id"], holder["run_id"]) == (1, task, run_id)
    assert holder["task_definition_id"] == "a"
    reader = queries.get_agent(tx, "reader")
    assert (reader["state"], reader["holders"], reader["waiting"]) == ("idle", [], 0)


def test_what_an_agent_behind_http_accepted_counts_as_running(tx: Tx) -> None:
    remote = {"kind": "remote", "contact_endpoint": "http://x/", "state": "idle"}
    add_agent(tx, "r", capacity=2, **remote)
    held = {"agent_id": "r", "lease_expires_at": NOW}
    run_id = add_run(tx, "running")
    add_task(tx, run_id, "a", "waiting", reason="remote", **held)
    add_task(tx, run_id, "b", "running", agent_id="r")
    add_task(tx, run_id, "c", "completed", agent_id="r")
    agent = queries.get_agent(tx, "r")
    assert (agent["running"], agent["state"]) == (2, "idle")


def test_an_agent_shows_the_first_in_its_line_of_those_who_name_it_and_those_who_do_not(
    tx: Tx,
) -> None:
    add_agent(tx, "writer", "write", "edit", capacity=2)
    add_agent(tx, "other", "write", capacity=1)
    set_pace(tx, "writer", 10, 30)
    run_id = add_run(tx, "running")
    hour = timedelta(hours=1)
    third = add_waiting(tx, run_id, agent_id="writer", since=NOW)[0]
    second = add_waiting(tx, run_id, capability="edit", since=NOW - hour)[0]
    first = add_waiting(tx, run_id, capability="write", since=NOW + hour, priority=2)[0]
    rest = add_waiting(tx, run_id, 30, capability="write", since=NOW + hour)
    writer = queries.get_agent(tx, "writer")
    line = writer["line"]
    assert [waiter["task_id"] for waiter in line] == [first, second, third, *rest[:17]]
    assert [waiter["position"] for waiter in line] == list(range(1, 21))
    assert writer["waiting"] == 33
    (now,) = tx.execute(text("SELECT now()")).one()
    starts = [round((w["estimated_start_at"] - now).total_seconds()) for w in line[:4]]
    assert starts == [20, 20, 40, 40]
    assert (line[0]["priority"], line[0]["run_id"], line[0]["waiting_since"]) == (
        2,
        run_id,
        NOW + hour,
    )
    listed = {a["agent_id"]: a for a in queries.list_agents(tx, after=None, limit=9).items}
    assert listed["writer"]["line"][:2] == [
        {**waiter, "estimated_start_at": again["estimated_start_at"]}
        for waiter, again in zip(line, listed["writer"]["line"][:2], strict=False)
    ]
    assert [waiter["task_id"] for waiter in listed["other"]["line"]] == [first, *rest[:19]]
    assert listed["other"]["line"][0]["estimated_start_at"] is None


def test_a_deregistered_agent_is_not_to_be_found(tx: Tx) -> None:
    add_agent(tx, "gone", "write", deregistered_at=NOW)
    assert queries.list_agents(tx, after=None, limit=9).items == []
    for read in (queries.get_agent, queries.get_state, queries.check_agent):
        with pytest.raises(AgentNotFound):
            read(tx, "gone")
    with pytest.raises(AgentNotFound):
        queries.list_reports(tx, "gone", after=None, limit=9)


def test_until_when_an_agent_is_busy_is_told_while_it_lies_ahead(tx: Tx) -> None:
    add_agent(tx, "past", busy_until=NOW)
    add_agent(tx, "ahead", busy_until=NOW + timedelta(days=36_500))
    assert queries.get_agent(tx, "past")["busy_until"] is None
    assert queries.get_agent(tx, "ahead")["busy_until"] is not None


def test_agents_are_listed_in_pages_in_a_handful_of_statements(tx: Tx) -> None:
    for number in range(5):
        add_agent(tx, f"a{number}", "write", capacity=1)
    add_agent(tx, "b", "read")
    with statements(tx) as seen:
        first = queries.list_agents(tx, capability="write", after=None, limit=3)
    rest = queries.list_agents(tx, capability="write", after=first.next, limit=3)
    found = [row["agent_id"] for row in [*first.items, *rest.items]]
    assert sorted(found) == [f"a{number}" for number in range(5)]
    assert len(seen) <= 5, seen


def test_an_unknown_agent_is_said_to_be_unknown(tx: Tx) -> None:
    with pytest.raises(AgentNotFound):
        queries.get_agent(tx, "nobody")


# --- Workers ------------------------------------------------------------------------------------


def test_workers_live_while_the_keeper_renews_its_lease(database: Database, tx: Tx) -> None:
    assert not queries.has_workers(tx)
    with database.transaction() as change:
        change.execute(
            Lease.__table__.insert().values(
                name="keeper", holder="w", expires_at=text("now() + interval '5 s'")
            )
        )
    assert queries.has_workers(tx)
    with database.transaction() as change:
        change.execute(update(Lease).values(expires_at=text("now() - interval '1 s'")))
    assert not queries.has_workers(tx)
