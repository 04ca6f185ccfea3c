"""What operators do with runs, over HTTP: each control, and each answer to one that cannot be."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from http_client import Client, open_client, problem
from sqlalchemy import text

from opscore import canvas, engine
from opscore.config import Settings
from opscore.states import Reason

DOCUMENT = {"id": "w", "tasks": [{"taskId": "a", "agentId": "x"}, {"taskId": "b", "agentId": "x"}]}
ASKS = {"id": "asks", "tasks": [{"taskId": "ok", "type": "approval"}]}
COLUMNS = "status = :status, finished_at = now(), started_at = now()"
CONTROLS = ("cancel", "pause", "resume", "retry")


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def submit(client: Client, document: dict[str, Any] | None = None, **more: Any) -> str:
    document = document or DOCUMENT
    created = client.post("/workflows", document)
    assert created.status_code in (200, 201), created.json
    answer = client.post("/runs", {"workflowId": document["id"], **more})
    assert answer.status_code == 202, answer.json
    return str(answer.json["runId"])


def change(client: Client, statement: str, **parameters: Any) -> None:
    with client.database.transaction() as tx:
        tx.execute(text(statement), parameters)


def end(client: Client, run_id: str, status: str) -> None:
    """Have the run be over, as workers would have left it."""
    more = {"failed": ', error = \'{"code": "x", "message": "no"}\''}
    more["cancelled"] = ", cancel_requested_at = now()"
    change(
        client, "UPDATE runs SET status = 'running', started_at = now() WHERE id = :id", id=run_id
    )
    statement = f"UPDATE runs SET {COLUMNS}{more.get(status, '')} WHERE id = :id"
    change(client, statement, id=run_id, status=status)


def ask(client: Client, run_id: str) -> str:
    """Have the run's approval asked for, as a worker does."""
    with client.database.autocommit() as tx:
        query = text("SELECT id FROM tasks WHERE run_id = :id AND kind = 'approval'")
        task_id = tx.execute(query, {"id": run_id}).scalar_one()
        visit = engine.Visit(task_id, 1, uuid4())
        claimed = engine.claim_task(tx, visit, worker="w", lease_seconds=30)
        assert isinstance(claimed, engine.Claimed)
        app = client.app.extensions["opscore"].dispatcher.app
        message = canvas.visit(app, task_id, 1, timeout_seconds=60)
        assert engine.begin_wait(tx, claimed, engine.Wait(Reason.APPROVAL), dict(message))
    return str(task_id)


def types(client: Client, run_id: str) -> list[str]:
    return [event["type"] for event in client.get(f"/runs/{run_id}/events").json["items"]]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_control_on_a_finished_run_is_409_with_its_status(
    client: Client, control: str, status: str
) -> None:
    run_id = submit(client)
    end(client, run_id, status)
    before = types(client, run_id)
    if (control, status) == ("retry", "failed"):
        return
    code = "run_not_failed" if control == "retry" else "run_finished"
    said = problem(client.post(f"/runs/{run_id}/{control}"), 409, code)["detail"]
    assert status in said
    assert client.get(f"/runs/{run_id}").json["status"] == status
    assert types(client, run_id) == before


@pytest.mark.parametrize("control", [*CONTROLS, "rerun"])
def test_a_control_of_no_run_is_404(client: Client, control: str) -> None:
    problem(client.post(f"/runs/{uuid4()}/{control}"), 404, "run_not_found")


def test_a_paused_run_goes_on_when_it_is_resumed(client: Client) -> None:
    run_id = submit(client)
    for _ in range(2):
        answer = client.post(f"/runs/{run_id}/pause")
        assert (answer.status_code, answer.json["status"]) == (202, "paused")
    tasks = client.get(f"/runs/{run_id}").json["tasks"]
    assert [task["reason"] for task in tasks] == ["paused", "paused"]
    answer = client.post(f"/runs/{run_id}/resume")
    assert (answer.status_code, answer.json["status"]) == (202, "queued")
    said = problem(client.post(f"/runs/{run_id}/resume"), 409, "run_not_paused")["detail"]
    assert "status is queued" in said
    assert types(client, run_id) == ["run.queued", "run.paused", "run.resumed"]


def test_a_run_that_ends_cannot_be_paused(client: Client) -> None:
    run_id = submit(client)
    change(
        client,
        "UPDATE tasks SET status = 'running', started_at = now(), attempt = 1,"
        " lease_expires_at = now() + interval '1 h' WHERE run_id = :id AND definition_id = 'a'",
        id=run_id,
    )
    assert client.post(f"/runs/{run_id}/cancel").status_code == 202
    assert client.post(f"/runs/{run_id}/cancel").status_code == 202, "asking again is no fault"
    problem(client.post(f"/runs/{run_id}/pause"), 409, "run_ending")
    problem(client.post(f"/runs/{run_id}/resume"), 409, "run_not_paused")


def test_a_paused_run_can_be_cancelled(client: Client) -> None:
    run_id = submit(client)
    client.post(f"/runs/{run_id}/pause")
    answer = client.post(f"/runs/{run_id}/cancel")
    assert (answer.status_code, answer.json["status"]) == (202, "cancelled")


def fail(client: Client, run_id: str) -> None:
    """Have the run's first task fail for good, as a worker does."""
    with client.database.transaction() as tx:
        query = text("SELECT id FROM tasks WHERE run_id = :id AND definition_id = 'a'")
        task_id = tx.execute(query, {"id": run_id}).scalar_one()
        failure = engine.Failure("broken", "no")
        gone = engine.fail_unclaimed(tx, task_id, failure)
        assert gone is not None
        engine.settle_run(tx, UUID(run_id))


def test_what_failed_is_tried_again_and_who_asked_for_it_is_told(client: Client) -> None:
    run_id = submit(client)
    fail(client, run_id)
    assert client.get(f"/runs/{run_id}").json["status"] == "failed"
    parameters = {"a": {"n": 1}}
    answer = client.post(f"/runs/{run_id}/retry", {"parameters": parameters})
    assert (answer.status_code, answer.json["status"]) == (202, "queued"), answer.json
    tasks = client.get(f"/runs/{run_id}").json["tasks"]
    assert [(task["status"], task["error"]) for task in tasks] == [("pending", None)] * 2
    (event,) = [
        e for e in client.get(f"/runs/{run_id}/events").json["items"] if "retr" in e["type"]
    ]
    assert event["type"] == "run.retried" and event["data"]["parameters"] == parameters
    problem(client.post(f"/runs/{run_id}/retry"), 409, "run_not_failed")


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"c": {}}, "/parameters/c"),
        ([], "/parameters"),
        ({"a": 1}, "/parameters/a"),
    ],
)
def test_parameters_of_what_is_not_tried_again_are_refused(
    client: Client, parameters: Any, place: str
) -> None:
    run_id = submit(client)
    fail(client, run_id)
    answer = client.post(f"/runs/{run_id}/retry", {"parameters": parameters})
    assert place in problem(answer, 422, "invalid_request")["errors"]
    assert client.get(f"/runs/{run_id}").json["status"] == "failed"


def test_another_run_of_the_same_is_found_where_the_answer_says(client: Client) -> None:
    run_id = submit(client, input={"n": 1}, labels={"team": "x"}, priority="high")
    end(client, run_id, "completed")
    answer = client.post(f"/runs/{run_id}/rerun")
    assert answer.status_code == 202, answer.json
    run = client.get(answer.headers["Location"]).json
    assert (run["rerunOf"], run["runId"] != run_id) == (run_id, True)
    assert (run["input"], run["labels"], run["priority"]) == ({"n": 1}, {"team": "x"}, "high")


# --- Approvals


def test_an_approval_is_decided_once(client: Client) -> None:
    run_id = submit(client, ASKS)
    task_id = ask(client, run_id)
    answer = client.post(f"/tasks/{task_id}/approve", {"comment": "fine"})
    assert answer.status_code == 202, answer.json
    for word in ("approve", "reject"):
        said = problem(client.post(f"/tasks/{task_id}/{word}"), 409, "approval_refused")["detail"]
        assert "approved already, by key:" in said
    (event,) = [
        e
        for e in client.get(f"/runs/{run_id}/events").json["items"]
        if e["type"] == "task.approved"
    ]
    assert event["data"]["comment"] == "fine" and event["taskId"] == task_id


def test_a_word_without_a_comment_needs_no_body(client: Client) -> None:
    task_id = ask(client, submit(client, ASKS))
    assert client.post(f"/tasks/{task_id}/reject").status_code == 202


@pytest.mark.parametrize("word", ["approve", "reject"])
def test_what_is_no_approval_or_not_asked_for_yet_cannot_be_decided(
    client: Client, word: str
) -> None:
    problem(client.post(f"/tasks/{uuid4()}/{word}"), 404, "task_not_found")
    run = client.get(f"/runs/{submit(client)}").json
    answer = client.post(f"/tasks/{run['tasks'][0]['taskId']}/{word}")
    assert "no approval" in problem(answer, 409, "approval_refused")["detail"]
    run = client.get(f"/runs/{submit(client, ASKS)}").json
    answer = client.post(f"/tasks/{run['tasks'][0]['taskId']}/{word}")
    assert "not asked for yet" in problem(answer, 409, "approval_refused")["detail"]


def test_a_cancelled_runs_approval_cannot_be_decided(client: Client) -> None:
    run_id = submit(client, ASKS)
    task_id = ask(client, run_id)
    client.post(f"/runs/{run_id}/cancel")
    said = problem(client.post(f"/tasks/{task_id}/approve"), 409, "approval_refused")["detail"]
    assert "cancelled" in said


@pytest.mark.parametrize(
    ("body", "place"),
    [({"comment": 5}, "/comment"), ({"comment": "x" * 4097}, "/comment"), ({"why": ""}, "/why")],
)
def test_a_comment_is_a_text_of_reasonable_length(
    client: Client, body: dict[str, Any], place: str
) -> None:
    task_id = ask(client, submit(client, ASKS))
    answer = client.post(f"/tasks/{task_id}/approve", body)
    assert place in problem(answer, 422, "invalid_request")["errors"]


# --- Moments


def moment(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    ("given", "places"),
    [
        ({"startAt": -10}, ["/startAt"]),
        ({"deadlineAt": -10}, ["/deadlineAt"]),
        ({"startAt": 600, "deadlineAt": 300}, ["/deadlineAt"]),
        ({"startAt": -10, "deadlineAt": -5}, ["/startAt", "/deadlineAt"]),
    ],
)
def test_a_moment_that_cannot_be_is_refused(
    client: Client, given: dict[str, float], places: list[str]
) -> None:
    client.post("/workflows", DOCUMENT)
    moments = {name: moment(seconds) for name, seconds in given.items()}
    answer = client.post("/runs", {"workflowId": "w", **moments})
    assert sorted(problem(answer, 422, "invalid_request")["errors"]) == sorted(places)
    assert client.get("/runs").json["items"] == []


def test_a_run_that_begins_later_says_when(client: Client) -> None:
    run_id = submit(client, startAt=moment(600), deadlineAt=moment(900))
    run = client.get(f"/runs/{run_id}").json
    assert (run["status"], run["reason"]) == ("queued", "start_at")
    assert run["startAt"] < run["deadlineAt"]


# --- Sub-workflows


def test_a_workflow_that_is_not_there_or_leads_back_cannot_be_run(client: Client) -> None:
    def runs(id: str, other: str) -> dict[str, Any]:
        return {"id": id, "tasks": [{"taskId": "t", "type": "workflow", "workflowId": other}]}

    answer = client.post("/workflows", runs("a", "b"))
    (said,) = problem(answer, 422, "invalid_definition")["errors"]["/tasks/0/workflowId"]
    assert "Create it first" in said
    client.post("/workflows", {**DOCUMENT, "id": "b"})
    assert client.post("/workflows", runs("a", "b")).status_code == 201
    assert client.post("/workflows", runs("c", "a")).status_code == 201
    answer = client.post("/workflows", runs("b", "c"))
    (said,) = problem(answer, 422, "invalid_definition")["errors"]["/tasks/0/workflowId"]
    assert "leads back" in said
    assert client.get("/workflows/b").json["version"] == 1
