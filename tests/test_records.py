"""The records of LLM agents' work: stored once, by who has the task; and what is read of them."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from http_client import Client, open_client, problem
from rows import add_agent, add_attempt, add_run, add_task
from sqlalchemy import text

from opscore import engine, records
from opscore.agentkit.model import Reply, Result, Usage
from opscore.agentkit.scripted import calls
from opscore.agentkit.steps import Asked, Began, Budget, Decided
from opscore.config import Settings
from opscore.db import Database

REPLY = replace(calls(("pay", {"amount": 5, "api_key": "k"})), usage=Usage(70, 30, 0.25), model="m")


class Case:
    """A run with a task that an attempt is at."""

    def __init__(self, database: Database, **run: Any) -> None:
        self.database = database
        with database.transaction() as tx:
            self.run_id = add_run(tx, "running", **run)
            self.task_id = self.new_task(tx)

    def new_task(self, tx: Any, run_id: UUID | None = None, **values: Any) -> UUID:
        task_id = add_task(tx, run_id or self.run_id, "t", "running", attempt=1, **values)
        add_attempt(tx, task_id, 1)
        return task_id

    def add(self, number: int, step: Any, attempt: int = 1, **about: Any) -> bool:
        with self.database.autocommit() as tx:
            return records.add(tx, self.task_id, attempt, number, step, about)

    def steps(self) -> list[Any]:
        with self.database.autocommit() as tx:
            return list(records.steps(tx, self.task_id))

    def execute(self, statement: str, **values: Any) -> Any:
        with self.database.transaction() as tx:
            return tx.execute(text(statement), {"task": self.task_id, "run": self.run_id, **values})

    def events(self) -> list[str]:
        with self.database.autocommit() as tx:
            rows = tx.execute(text("SELECT type FROM events ORDER BY seq"))
            return [row.type for row in rows]


@pytest.fixture
def case(database: Database) -> Case:
    return Case(database)


def test_steps_come_back_as_they_were(case: Case) -> None:
    steps = [REPLY, Began("call-1"), Result("call-1", "pay", "paid"), Reply("done", model="m")]
    assert all(case.add(number, step) for number, step in enumerate(steps))
    assert case.steps() == steps
    assert case.events() == ["task.model_replied", "task.tool_called", "task.model_replied"]


def test_a_step_that_is_said_twice_is_stored_and_told_once(case: Case) -> None:
    assert case.add(0, REPLY) and case.add(0, REPLY)
    assert case.steps() == [REPLY]
    assert case.events() == ["task.model_replied"]


@pytest.mark.parametrize(
    "loss",
    [
        "UPDATE tasks SET status = 'waiting', reason = 'retry', lease_expires_at = NULL"
        " WHERE id = :task",
        "UPDATE tasks SET attempt = 2 WHERE id = :task",
    ],
)
def test_who_lost_the_attempt_stores_nothing(case: Case, loss: str) -> None:
    case.execute(loss)
    assert not case.add(0, REPLY)
    assert case.steps() == [] and case.events() == []


def test_the_next_attempt_sees_all_that_the_last_one_could_store(case: Case) -> None:
    """Whoever takes an attempt away waits for a step that is being stored, or refuses it."""
    with case.database.transaction() as tx:
        assert records.add(tx, case.task_id, 1, 0, REPLY, {})
        loser = threading.Thread(
            target=case.execute, args=("UPDATE tasks SET attempt = 2 WHERE id = :task",)
        )
        loser.start()
        loser.join(0.2)
        assert loser.is_alive(), "it took the attempt from under a step"
    loser.join(10)
    assert case.steps() == [REPLY]
    assert not case.add(1, REPLY)


def test_a_decision_becomes_a_step_once(case: Case) -> None:
    case.add(0, REPLY)
    case.add(1, Asked("call-1", "pay", {"amount": 5}))
    said = '{"approved": true, "comment": "ok", "principal": "key:1"}'
    case.execute("UPDATE tasks SET decision = cast(:said AS jsonb) WHERE id = :task", said=said)
    for _ in range(2):
        with case.database.transaction() as tx:
            records.take_decision(tx, case.task_id, 1)
    assert case.steps()[2:] == [Decided(True, "ok", "key:1")]


# --- Budgets -------------------------------------------------------------------------------------


def budget(case: Case, run_id: UUID | None = None) -> Budget:
    with case.database.autocommit() as tx:
        return records.budget(tx, run_id or case.run_id)


def test_without_a_budget_nothing_is_limited(case: Case) -> None:
    case.add(0, REPLY)
    assert budget(case).fault is None


def test_all_tasks_and_runs_below_share_a_budget(database: Database) -> None:
    case = Case(database, budget={"max_tokens": 250, "max_cost_usd": None})
    case.add(0, REPLY)
    first = case.task_id
    with database.transaction() as tx:
        child = uuid4()
        case.execute("UPDATE tasks SET child_run_id = :child WHERE id = :task", child=child)
        add_run(tx, "running", id=child, parent_task_id=first, depth=1)
        case.task_id = case.new_task(tx, child)
    case.add(0, REPLY)
    for run_id in (case.run_id, child):
        assert budget(case, run_id) == Budget(250, None, Usage(140, 60, 0.5))
        assert budget(case, run_id).fault is None
    case.add(1, REPLY)
    fault = "The run has used 300 of 250 tokens."
    assert budget(case).fault == budget(case, child).fault == fault


# --- Tried again ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "overrides", "left"),
    [
        ("model_refused", None, 1),
        ("timeout", None, 1),
        ("max_steps", None, 0),
        ("invalid_answer", None, 0),
        ("output_too_large", None, 0),
        ("model_refused", {"t": {"goal": "Another."}}, 0),
    ],
)
def test_a_run_tried_again_goes_on_with_its_record_unless_that_is_the_fault(
    case: Case, code: str, overrides: Any, left: int
) -> None:
    case.add(0, REPLY)
    error = {"code": code, "message": "no"}
    with case.database.transaction() as tx:
        case.execute("UPDATE attempts SET status = 'failed', finished_at = now()")
        case.execute(
            "UPDATE tasks SET status = 'failed', error = cast(:error AS jsonb), "
            " finished_at = now(), lease_expires_at = NULL WHERE id = :task",
            error=f'{{"code": "{code}", "message": "no"}}',
        )
        case.execute(
            "UPDATE runs SET status = 'failed', error = cast(:error AS jsonb), finished_at = now()"
            " WHERE id = :run",
            error='{"code": "x", "message": "no"}',
        )
    with case.database.transaction() as tx:
        engine.retry_run(tx, case.run_id, overrides)
    assert error["code"] == code and len(case.steps()) == left
    assert budget(case).spent == Usage(), "of a run without a budget nothing is counted"


# --- What is read of them ------------------------------------------------------------------------


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def test_runs_and_tasks_show_what_was_used(client: Client, case: Case) -> None:
    body = client.get(f"/runs/{case.run_id}").json
    assert (body["usage"], body["budget"]) == (None, None)
    assert body["tasks"][0]["usage"] is None
    case.add(0, REPLY)
    case.add(1, replace(REPLY, usage=Usage(1, 2, None)))
    used = {"replies": 2, "inputTokens": 71, "outputTokens": 32, "costUsd": 0.25}
    body = client.get(f"/runs/{case.run_id}").json
    assert (body["usage"], body["tasks"][0]["usage"]) == (used, used)
    assert client.get(f"/tasks/{case.task_id}").json["usage"] == used


def test_a_task_that_waits_for_approval_shows_the_call_without_its_secrets(
    client: Client, case: Case
) -> None:
    case.add(0, REPLY)
    asked = Asked("call-1", "pay", {"amount": 5, "api_key": "k", "to": "verysecret"}, again=True)
    with case.database.autocommit() as tx:
        assert records.add(tx, case.task_id, 1, 1, asked, {}, ["verysecret"])
    assert case.steps()[1] == asked
    case.execute(
        "UPDATE tasks SET status = 'waiting', reason = 'approval', lease_expires_at = NULL"
        " WHERE id = :task"
    )
    task = client.get(f"/tasks/{case.task_id}").json
    arguments = {"amount": 5, "api_key": "[redacted]", "to": "[redacted]"}
    assert task["call"] == {"number": 1, "tool": "pay", "arguments": arguments, "again": True}
    assert task["waitingFor"] == "waiting for somebody to approve or reject its call of pay"
    (listed,) = client.get("/tasks?reason=approval").json["items"]
    assert listed["call"] == task["call"]


def test_a_decision_counts_for_the_call_that_was_meant(client: Client, case: Case) -> None:
    asked = Asked("call-1", "pay", {"amount": 5})
    for number, step in enumerate([REPLY, asked, Decided(True), replace(asked, call_id="call-2")]):
        case.add(number, step)
    case.execute(
        "UPDATE tasks SET status = 'waiting', reason = 'approval', lease_expires_at = NULL"
        " WHERE id = :task"
    )
    assert client.get(f"/tasks/{case.task_id}").json["call"]["number"] == 3
    late = client.post(f"/tasks/{case.task_id}/approve", {"call": 1})
    assert (
        problem(late, 409, "approval_refused")["detail"]
        == "It does not ask about call 1 now, but about 3."
    )
    assert client.post(f"/tasks/{case.task_id}/approve", {"call": 3}).status_code == 202
    again = client.post(f"/tasks/{case.task_id}/approve", {"call": 3})
    assert problem(again, 409, "approval_refused")["detail"].startswith("It was approved already")


def test_events_hide_what_looks_like_a_secret(client: Client, case: Case) -> None:
    case.add(0, REPLY, attempt=1)
    (event,) = client.get(f"/runs/{case.run_id}/events").json["items"]
    assert event["data"]["calls"] == [
        {"tool": "pay", "arguments": {"amount": 5, "api_key": "[redacted]"}}
    ]


def test_a_name_that_a_model_made_up_is_logged_without_its_secrets(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    case.add(0, REPLY)
    with case.database.autocommit() as tx:
        made_up = Result("call-1", "use verysecret", "There is no such tool.", is_error=True)
        records.add(tx, case.task_id, 1, 1, made_up, {}, ["verysecret"])
    logged = "".join(capfd.readouterr())
    assert "use [redacted]" in logged and "verysecret" not in logged


def test_a_run_is_submitted_with_a_budget(client: Client, database: Database) -> None:
    with database.transaction() as tx:
        add_agent(tx, "writer")
        add_run(tx)  # and its workflow with it
    wanted = {"workflowId": "report", "input": {}, "budget": {"maxTokens": 0}}
    answer = client.post("/runs", wanted)
    assert answer.status_code == 202, answer.json
    kept = {"maxTokens": 0, "maxCostUsd": None}
    assert answer.json["budget"] == kept
    again = client.post(f"/runs/{answer.json['runId']}/rerun", {})
    assert again.json["budget"] == kept
    job = {"taskType": "agent_run", "agentId": "writer", "budget": {"maxCostUsd": 0.5}}
    run_id = client.post("/tasks", job).json["runId"]
    assert client.get(f"/runs/{run_id}").json["budget"] == {"maxTokens": None, "maxCostUsd": 0.5}


@pytest.mark.parametrize(
    ("budget", "place"),
    [
        ({"maxTokens": -1}, "/budget/maxTokens"),
        ({"maxTokens": 1.5}, "/budget/maxTokens"),
        ({"maxCostUsd": -0.1}, "/budget/maxCostUsd"),
        ({"maxCostUsd": "1"}, "/budget/maxCostUsd"),
        ({"max": 1}, "/budget/max"),
        (3, "/budget"),
    ],
)
def test_a_bad_budget_is_refused(client: Client, budget: Any, place: str) -> None:
    answer = client.post("/runs", {"workflowId": "report", "input": {}, "budget": budget})
    assert set(problem(answer, 422, "invalid_request")["errors"]) == {place}
