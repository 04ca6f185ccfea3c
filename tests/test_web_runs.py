"""Runs and their tasks over HTTP: submit, follow, wait, cancel."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from http_client import Client, open_client, problem
from redis import Redis
from rows import FAULT, NOW, add_attempt, add_event, add_items, add_log, add_run, add_task
from sqlalchemy import func, select, text

from opscore.config import Settings
from opscore.models import Run

DEFINITION = {
    "id": "report",
    "inputSchema": {"type": "object", "required": ["topic"]},
    "tasks": [
        {"taskId": "fetch", "agentId": "reader"},
        {"taskId": "write", "agentId": "writer", "parameters": {"t": "${input.topic}"}},
    ],
}
RUN = {
    "runId",
    "workflowId",
    "version",
    "agentId",
    "status",
    "reason",
    "input",
    "output",
    "error",
    "labels",
    "priority",
    "requestId",
    "cancelRequestedAt",
    "parentTaskId",
    "rerunOf",
    "schedule",
    "startAt",
    "deadlineAt",
    "createdAt",
    "startedAt",
    "finishedAt",
    "budget",
    "usage",
}
TASK = {
    "taskId",
    "runId",
    "taskDefinitionId",
    "index",
    "agentId",
    "agentCapability",
    "type",
    "childRunId",
    "status",
    "reason",
    "wakeAt",
    "waitingFor",
    "queue",
    "output",
    "error",
    "createdAt",
    "startedAt",
    "finishedAt",
    "attempts",
    "items",
    "usage",
    "call",
}

EVENT = {"seq", "at", "type", "taskId", "taskDefinitionId", "index", "by", "reason", "data"}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def submit(client: Client, **more: Any) -> Any:
    client.post("/workflows", DEFINITION)
    body = {"workflowId": "report", "input": {"topic": "queues"}, **more}
    return client.post("/runs", body)


def count(client: Client) -> int:
    with client.database.autocommit() as tx:
        return tx.execute(select(func.count()).select_from(Run)).scalar_one()


# --- Submitting ---------------------------------------------------------------------------------


def test_a_submitted_run_is_accepted_and_found_where_the_answer_says(client: Client) -> None:
    client.post("/workflows", DEFINITION)
    body = {"workflowId": "report", "input": {"topic": "ä"}, "labels": {"team": "x"}}
    answer = client.post("/runs", {**body, "priority": "high"}, headers={"X-Request-ID": "r-1"})
    assert answer.status_code == 202, answer.json
    assert set(answer.json) == RUN
    run = client.get(answer.headers["Location"]).json
    assert set(run) == {*RUN, "tasks"}
    assert answer.json == {key: value for key, value in run.items() if key != "tasks"}
    assert (run["status"], run["priority"], run["labels"]) == ("queued", "high", {"team": "x"})
    assert (run["input"], run["requestId"], run["version"]) == ({"topic": "ä"}, "r-1", 1)
    assert [task["taskDefinitionId"] for task in run["tasks"]] == ["fetch", "write"]
    for task in run["tasks"]:
        assert set(task) == TASK
        assert (task["status"], task["attempts"], task["index"]) == ("pending", [], None)
    assert run["tasks"][1]["waitingFor"] == "task fetch is not over"


def test_a_submitted_run_is_published(client: Client, settings: Settings) -> None:
    assert submit(client).status_code == 202
    with Redis.from_url(settings.redis_url) as redis:
        assert sum(redis.llen(key) for key in redis.keys("opscore.*") if redis.type(key) == b"list")


def test_a_run_is_accepted_while_the_broker_is_away(settings: Settings) -> None:
    with open_client(replace(settings, redis_url="redis://127.0.0.1:1/0")) as client:
        answer = submit(client)
        assert answer.status_code == 202 and count(client) == 1


def test_a_run_may_be_of_an_older_version(client: Client) -> None:
    client.post("/workflows", DEFINITION)
    client.post("/workflows", {**DEFINITION, "name": "newer"})
    assert submit(client, version=1).json["version"] == 1
    assert submit(client).json["version"] in (2, 3)
    problem(submit(client, version=9), 404, "workflow_not_found")


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ([], [""]),
        ("x", [""]),
        ({}, ["/workflowId"]),
        ({"workflowId": 7}, ["/workflowId"]),
        ({"workflowId": None}, ["/workflowId"]),
        ({"workflowId": "report", "version": "1"}, ["/version"]),
        ({"workflowId": "report", "version": 0}, ["/version"]),
        ({"workflowId": "report", "version": True}, ["/version"]),
        ({"workflowId": "report", "version": 2**31}, ["/version"]),
        ({"workflowId": "report", "priority": "urgent"}, ["/priority"]),
        ({"workflowId": "report", "priority": 1}, ["/priority"]),
        ({"workflowId": "report", "labels": []}, ["/labels"]),
        ({"workflowId": "report", "labels": {"a b": "x", "c": 1}}, ["/labels/a b", "/labels/c"]),
        ({"workflowId": "report", "labels": {str(n): "" for n in range(33)}}, ["/labels"]),
        ({"workflowId": "report", "labels": {"team": "x" * 10_000}}, ["/labels/team"]),
        (
            {"workflowId": "report", "labels": {"x" * 10_000: "y", "é": ""}},
            ["/labels", "/labels/é"],
        ),
        ({"workflowId": "report", "inputs": {}, "x/y": 1}, ["/inputs", "/x~1y"]),
    ],
)
def test_a_submission_must_be_as_it_must_be(client: Client, body: Any, places: list[str]) -> None:
    errors = problem(client.post("/runs", body), 422, "invalid_request")["errors"]
    assert sorted(errors) == places
    assert count(client) == 0


def test_the_longest_labels_are_kept_and_found(client: Client) -> None:
    labels = {"n" * 60 + f".{n:03}": "é" * 255 + str(n % 10) for n in range(32)}
    run = submit(client, labels=labels).json
    assert run["labels"] == labels
    name, value = next(iter(labels.items()))
    assert runs(client, f"label={name}:{value}") == [run["runId"]]
    assert runs(client, f"label={name}:{value}x") == runs(client, "label=n:" + "x" * 10_000) == []


def test_an_unknown_member_is_told_which_there_are(client: Client) -> None:
    answer = client.post("/runs", {"workflowId": "report", "inputs": {}})
    (said,) = problem(answer, 422, "invalid_request")["errors"]["/inputs"]
    assert said == (
        "Unknown; known here: budget, deadlineAt, input, labels, priority, startAt, version,"
        " workflowId."
    )


def test_an_input_against_the_schema_is_422_under_input(client: Client) -> None:
    errors = problem(submit(client, input={}), 422, "invalid_input")["errors"]
    assert all(place.startswith("/input") for place in errors)
    assert count(client) == 0


def test_a_workflow_without_agents_cannot_be_submitted_by_itself(client: Client) -> None:
    client.post("/workflows", {"id": "w", "tasks": [{"taskId": "a"}]})
    problem(client.post("/runs", {"workflowId": "w"}), 422, "invalid_request")
    problem(client.post("/runs", {"workflowId": "none"}), 404, "workflow_not_found")
    assert count(client) == 0


# --- Lists --------------------------------------------------------------------------------------


@pytest.fixture
def listed(client: Client) -> list[str]:
    with client.database.transaction() as tx:
        made = [
            add_run(
                tx,
                ("queued", "running", "failed")[n % 3],
                labels={"n": str(n), "odd": str(n % 2)},
                created_at=NOW + timedelta(seconds=n),
            )
            for n in range(6)
        ]
    return [str(run_id) for run_id in made]


def runs(client: Client, query: str) -> list[str]:
    answer = client.get(f"/runs?{query}")
    assert answer.status_code == 200, answer.json
    return [item["runId"] for item in answer.json["items"]]


def test_runs_are_listed_newest_first_without_input_and_output(
    client: Client, listed: list[str]
) -> None:
    page = client.get("/runs?limit=4").json
    assert [item["runId"] for item in page["items"]] == listed[:1:-1]
    assert set(page["items"][0]) == RUN - {"input", "output", "budget", "usage"}
    assert runs(client, f"cursor={page['nextCursor']}") == listed[1::-1]


def test_runs_are_filtered(client: Client, listed: list[str]) -> None:
    assert runs(client, "status=queued&status=running") == [listed[n] for n in (4, 3, 1, 0)]
    assert runs(client, "label=odd:1&label=n:3") == [listed[3]]
    assert runs(client, "label=odd:1&label=odd:1") == [listed[n] for n in (5, 3, 1)]
    assert runs(client, "label=odd:1&label=odd:0") == runs(client, "label=odd:1&label=n:2") == []
    assert runs(client, "label=odd:1&status=running&workflowId=report") == [listed[1]]
    assert runs(client, "workflowId=other") == []
    after, before = "2026-01-31T12:00:01Z", "2026-01-31T13:00:04%2B01:00"
    assert runs(client, f"createdAfter={after}&createdBefore={before}") == [listed[3], listed[2]]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("status=done", "/status/0"),
        ("label=x", "/label/0"),
        ("label=a:%00", "/label"),
        ("createdAfter=2026-01-31T12:00:00", "/createdAfter"),
        ("createdAfter=2026-01-31", "/createdAfter"),
        ("createdBefore=yesterday", "/createdBefore"),
        ("colour=red", "/colour"),
    ],
)
def test_a_filter_that_means_nothing_is_named(client: Client, query: str, place: str) -> None:
    errors = problem(client.get(f"/runs?{query}"), 422, "invalid_request")["errors"]
    assert list(errors) == [place]


def test_a_naive_time_is_told_to_carry_its_offset(client: Client) -> None:
    answer = client.get("/runs?createdAfter=2026-01-31T12:00:00")
    (said,) = problem(answer, 422, "invalid_request")["errors"]["/createdAfter"]
    assert "offset" in said and "2026-01-31T12:00:00Z" in said


# --- Following ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["abc", "0", "01890a5d-ac96-774b-bcce-b302099a8057", "%F0%9F", "x" * 300]
)
def test_an_id_nobody_has_is_404(client: Client, id: str) -> None:
    for path in ("", "/tasks", "/events", "?waitSeconds=1"):
        problem(client.get(f"/runs/{id}{path}"), 404, "run_not_found")
    problem(client.post(f"/runs/{id}/cancel"), 404, "run_not_found")
    problem(client.get(f"/tasks/{id}"), 404, "task_not_found")
    problem(client.get(f"/tasks/{id}/attempts/1"), 404, "task_not_found")


def busy_run(client: Client) -> tuple[UUID, UUID]:
    """Write a run in the middle of things; return its id and its failed task's."""
    with client.database.transaction() as tx:
        run_id = add_run(tx, "running")
        task_id = add_task(tx, run_id, "a", "failed", attempt=1)
        fault = {"code": "agent_failed", "message": "no", "traceback": "at line 1"}
        add_attempt(tx, task_id, 1, "failed", error=fault, progress=0.5)
        add_log(tx, task_id, 1, 1, "hello", n=1)
        each = {"kind": "for_each", "items": 3, "position": 1}
        parent = add_task(tx, run_id, "each", "waiting", reason="children", **each)
        add_items(tx, run_id, parent, ["completed", "failed", "pending"])
        line = {"line_agent_id": "writer", "waiting_since": NOW, "wake_at": NOW}
        add_task(tx, run_id, "z", "waiting", reason="agent_busy", position=2, **line)
        add_event(tx, run_id, "run.started")
        add_event(tx, run_id, "task.failed", task_id, attempt=1)
    return run_id, task_id


def test_a_run_shows_its_tasks_items_waits_and_attempts(client: Client) -> None:
    run_id, _ = busy_run(client)
    tasks = client.get(f"/runs/{run_id}").json["tasks"]
    assert [(task["taskDefinitionId"], task["index"]) for task in tasks] == [
        ("a", None),
        ("each", None),
        ("z", None),
        ("each", 1),
        ("each", 2),
        ("each", 0),
    ]
    failed, each, waiting = tasks[:3]
    (attempt,) = failed["attempts"]
    assert (attempt["number"], attempt["worker"], attempt["status"]) == (1, "w@host", "failed")
    assert attempt["error"] == failed["error"] == {"code": "agent_failed", "message": "no"}
    assert each["items"] == {
        "total": 3,
        "pending": 1,
        "waiting": 0,
        "running": 0,
        "completed": 1,
        "failed": 1,
        "cancelled": 0,
    }
    assert waiting["wakeAt"] == "2026-01-31T12:00:00Z"
    assert waiting["waitingFor"] == (
        "waiting for agent writer: busy, next in line; it is tried again at 2026-01-31T12:00:00Z"
    )


def test_tasks_of_a_run_are_paged_and_filtered(client: Client) -> None:
    run_id, _ = busy_run(client)
    first = client.get(f"/runs/{run_id}/tasks?limit=4").json
    rest = client.get(f"/runs/{run_id}/tasks?limit=4&cursor={first['nextCursor']}").json
    found = [(t["taskDefinitionId"], t["index"]) for t in first["items"] + rest["items"]]
    assert found == [("a", None), ("each", None), *(("each", n) for n in range(3)), ("z", None)]
    failed = client.get(f"/runs/{run_id}/tasks?status=failed&taskDefinitionId=each").json["items"]
    assert [task["index"] for task in failed] == [1]
    answer = client.get(f"/runs/{run_id}/tasks?status=odd")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/status/0"]


def test_a_task_and_its_attempt_show_logs_progress_and_traceback(client: Client) -> None:
    run_id, task_id = busy_run(client)
    task = client.get(f"/tasks/{task_id}").json
    assert set(task) == {*TASK, "logs"} and task["runId"] == str(run_id)
    line = {"line": 1, "at": "2026-01-31T12:00:00Z", "message": "hello", "fields": {"n": 1}}
    assert task["logs"] == [line]
    attempt = client.get(f"/tasks/{task_id}/attempts/1").json
    assert attempt["error"]["traceback"] == "at line 1" and attempt["logs"] == [line]
    assert (attempt["taskId"], attempt["progress"]) == (str(task_id), 0.5)
    for number in ("2", "0", "99999999999", "x"):
        answer = client.get(f"/tasks/{task_id}/attempts/{number}")
        assert answer.status_code == 404


def test_a_fault_has_every_member_also_where_nothing_is_known_of_it(client: Client) -> None:
    with client.database.transaction() as tx:
        run_id = add_run(tx, "failed")
        task_id = add_task(tx, run_id, "a", "failed", attempt=1)
        add_attempt(tx, task_id, 1, "lost", error=FAULT)
    assert client.get(f"/runs/{run_id}").json["error"] == {**FAULT, "taskId": None}
    attempt = client.get(f"/tasks/{task_id}/attempts/1").json
    assert attempt["error"] == {**FAULT, "traceback": None}


def test_a_run_that_failed_says_with_which_task(client: Client) -> None:
    known = {"taskId": str(uuid4()), "taskDefinitionId": "fetch"}
    with client.database.transaction() as tx:
        run_id = add_run(tx, "failed", error={**FAULT, **known})
    assert client.get(f"/runs/{run_id}").json["error"] == {**FAULT, "taskId": known["taskId"]}
    assert client.get("/runs").json["items"][0]["error"]["taskId"] == known["taskId"]


def test_events_are_followed_from_where_one_was(client: Client) -> None:
    run_id, task_id = busy_run(client)
    page = client.get(f"/runs/{run_id}/events?limit=1").json
    (first,) = page["items"]
    assert set(first) == EVENT
    assert first["type"] == "run.started" and page["nextAfter"] == first["seq"]
    page = client.get(f"/runs/{run_id}/events?after={page['nextAfter']}").json
    (second,) = page["items"]
    assert (second["taskId"], second["data"]) == (str(task_id), {"attempt": 1})
    assert (second["by"], first["by"]) == ("worker:w@host", None)
    end = client.get(f"/runs/{run_id}/events?after={page['nextAfter']}").json
    assert end == {"items": [], "nextAfter": second["seq"]}
    for bad in ("-1", "x", str(2**63)):
        answer = client.get(f"/runs/{run_id}/events?after={bad}")
        assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/after"]


# --- Waiting ------------------------------------------------------------------------------------


def end_run(client: Client, run_id: UUID) -> None:
    statement = "UPDATE runs SET status = 'completed', finished_at = now() WHERE id = :id"
    with client.database.transaction() as tx:
        tx.execute(text(statement), {"id": run_id})


def test_waiting_ends_as_soon_as_the_run_does(client: Client) -> None:
    with client.database.transaction() as tx:
        run_id = add_run(tx, "running")
    threading.Timer(0.5, end_run, [client, run_id]).start()
    began = time.monotonic()
    run = client.get(f"/runs/{run_id}?waitSeconds=20").json
    assert run["status"] == "completed" and 0.4 < time.monotonic() - began < 5


def test_waiting_ends_when_the_time_is_over(client: Client) -> None:
    with client.database.transaction() as tx:
        run_id = add_run(tx, "running")
    began = time.monotonic()
    answer = client.get(f"/runs/{run_id}?waitSeconds=0.4")
    assert answer.json["status"] == "running" and 0.4 <= time.monotonic() - began < 5
    assert "Retry-After" not in answer.headers


@pytest.mark.parametrize("seconds", ["-1", "61", "x", "nan", "inf", ""])
def test_a_wait_out_of_bounds_is_named(client: Client, seconds: str) -> None:
    answer = client.get(f"/runs/{uuid4()}?waitSeconds={seconds}")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/waitSeconds"]


def test_waiting_holds_no_connection_and_too_many_are_answered_at_once(settings: Settings) -> None:
    with open_client(replace(settings, database_pool=2, web_threads=2)) as client:
        with client.database.transaction() as tx:
            run_id = add_run(tx, "running")
        path = f"/runs/{run_id}?waitSeconds=20"
        waiting = threading.Thread(target=client.get, args=[path])
        waiting.start()
        polls = client.app.extensions["opscore"].polls
        deadline = time.monotonic() + 5
        while polls._places._value and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        began = time.monotonic()
        answer = client.get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (200, "1")
        with client.database.transaction(), client.database.transaction():
            assert time.monotonic() - began < 5
        polls.stop()
        waiting.join(5)
        assert not waiting.is_alive()


# --- Cancelling ---------------------------------------------------------------------------------


def test_a_queued_run_is_cancelled_with_its_tasks(client: Client) -> None:
    run_id = submit(client).json["runId"]
    answer = client.post(f"/runs/{run_id}/cancel")
    assert answer.status_code == 202 and set(answer.json) == RUN, answer.json
    assert answer.json["status"] == "cancelled" and answer.json["cancelRequestedAt"]
    run = client.get(f"/runs/{run_id}").json
    assert {task["status"] for task in run["tasks"]} == {"cancelled"}


def test_a_run_that_is_over_cannot_be_cancelled(client: Client) -> None:
    with client.database.transaction() as tx:
        run_id = add_run(tx, "completed")
    answer = problem(client.post(f"/runs/{run_id}/cancel"), 409, "run_finished")
    assert "completed" in answer["detail"]
