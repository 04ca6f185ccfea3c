"""Archived workflows: nothing starts a run of one or writes a version; what exists goes on."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from http_client import Client, open_client, problem
from rows import add_agent
from sqlalchemy import text

from opscore import schedules
from opscore.config import Settings

REPORT = {"id": "report", "tasks": [{"taskId": "write", "agentId": "writer"}]}
ABOVE = {"id": "above", "tasks": [{"taskId": "x", "type": "workflow", "workflowId": "report"}]}
EVERY = {"name": "every", "workflowId": "report", "everySeconds": 60}
OTHER = {**REPORT, "tasks": [{"taskId": "other", "agentId": "writer"}]}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        assert client.post("/workflows", REPORT).status_code == 201
        with client.database.transaction() as tx:
            add_agent(tx, "writer", "write")
        yield client


def archive(client: Client, workflow_id: str = "report") -> Any:
    answer = client.post(f"/workflows/{workflow_id}/archive")
    assert answer.status_code == 200, answer.json
    return answer.json


def restore(client: Client, workflow_id: str = "report") -> Any:
    answer = client.post(f"/workflows/{workflow_id}/restore")
    assert answer.status_code == 200, answer.json
    return answer.json


def submit(client: Client, **more: Any) -> Any:
    return client.post("/runs", {"workflowId": "report", **more})


def execute(client: Client, statement: str, **values: Any) -> list[Any]:
    with client.database.transaction() as tx:
        result = tx.execute(text(statement), values)
        return list(result) if result.returns_rows else []


def count(client: Client, table: str) -> int:
    return int(execute(client, f"SELECT count(*) FROM {table}")[0][0])


def tick(client: Client, seconds: float) -> None:
    """Let so much time pass, and a beat look."""
    age = timedelta(seconds=seconds)
    columns = {"schedules": ("created_at", "next_at", "decided_at"), "firings": ("moment",)}
    for table, names in columns.items():
        moved = ", ".join(f"{name} = {name} - :age" for name in names)
        execute(client, f"UPDATE {table} SET {moved}", age=age)
    with client.database.transaction() as tx:
        schedules.tick(tx, 50)


# --- What it says


def test_archiving_and_restoring_answer_as_getting_does_and_twice_is_once(client: Client) -> None:
    client.post("/workflows", OTHER)
    archived = archive(client)
    assert archived["version"] == 2 and archived["archivedAt"]
    assert archive(client) == archived == client.get("/workflows/report").json
    assert client.get("/workflows/report?version=1").json["archivedAt"] == archived["archivedAt"]
    versions = client.get("/workflows/report/versions").json["items"]
    assert [item["archivedAt"] for item in versions] == [archived["archivedAt"]] * 2
    ((by,),) = execute(client, "SELECT by FROM archived_workflows")
    assert by.startswith("key:")
    restored = restore(client)
    assert restored == {**archived, "archivedAt": None}
    assert restore(client) == restored == client.get("/workflows/report").json


@pytest.mark.parametrize("action", ["archive", "restore"])
def test_what_was_never_created_is_not_archived(client: Client, action: str) -> None:
    job = {"taskType": "agent_run", "agentId": "writer"}
    assert client.post("/tasks", job).status_code == 202
    for name in ("nowhere", "agent-run"):
        problem(client.post(f"/workflows/{name}/{action}"), 404, "workflow_not_found")
    assert count(client, "archived_workflows") == 0


def test_a_list_has_those_that_are_archived_or_those_that_are_not(client: Client) -> None:
    for number in range(4):
        client.post("/workflows", {**REPORT, "id": f"w{number}"})
    for number in (0, 2, 3):
        archive(client, f"w{number}")

    def listed(query: str) -> list[str]:
        found, cursor = [], ""
        while cursor is not None:
            page = client.get(f"/workflows?limit=2{query}{cursor}").json
            found += [item["workflowId"] for item in page["items"]]
            cursor = page["nextCursor"] and f"&cursor={page['nextCursor']}"
        return found

    assert listed("") == listed("&archived=false") == ["w1", "report"]
    assert listed("&archived=true") == ["w3", "w2", "w0"]
    for word in ("yes", "1", "True", ""):
        answer = client.get(f"/workflows?archived={word}")
        assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/archived"]


# --- What it refuses

DOCUMENT = {"workflowDefinition": {"id": "report", "tasks": [{"taskId": "inline"}]}}
STARTS: dict[str, Callable[[Client], Any]] = {
    "run": submit,
    "run of a version": lambda client: submit(client, version=1),
    "run that begins later": lambda client: submit(client, startAt="2099-01-01T00:00:00Z"),
    "trigger": lambda client: client.post(
        "/agent/writer/workflow", {"workflowDefinitionId": "report"}
    ),
    "inline": lambda client: client.post("/agent/writer/workflow", DOCUMENT),
    "version": lambda client: client.post("/workflows", OTHER),
    "same version": lambda client: client.post("/workflows", REPORT),
    "validation": lambda client: client.post("/workflows/validate", OTHER),
    "schedule": lambda client: client.post("/schedules", EVERY),
    "schedule that is paused": lambda client: client.post(
        "/schedules", {**EVERY, "enabled": False}
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_nothing_begins_of_an_archived_workflow_until_it_is_restored(
    client: Client, start: str
) -> None:
    archive(client)
    tables = ("runs", "workflows", "schedules", "idempotency_keys")
    before = [count(client, table) for table in tables]
    with_key = Client(client.app, None)
    with_key._headers = {**client._headers, "Idempotency-Key": "k"}
    for sender in (client, with_key):
        detail = problem(STARTS[start](sender), 409, "workflow_archived")["detail"]
        assert "'report' is archived" in detail and "/workflows/report/restore" in detail
    assert [count(client, table) for table in tables] == before
    restore(client)
    assert STARTS[start](with_key).status_code in (200, 201, 202)


def test_a_run_is_not_run_anew_and_every_other_control_of_it_works(client: Client) -> None:
    run_id = submit(client).json["runId"]
    archive(client)
    problem(client.post(f"/runs/{run_id}/rerun"), 409, "workflow_archived")
    for control in ("pause", "resume", "cancel"):
        assert client.post(f"/runs/{run_id}/{control}").status_code == 202
    restore(client)
    assert client.post(f"/runs/{run_id}/rerun").status_code == 202


def test_what_a_key_started_is_still_answered(client: Client) -> None:
    key = {"Idempotency-Key": "k"}
    body = {"workflowId": "report"}
    run_id = client.post("/runs", body, headers=key).json["runId"]
    archive(client)
    again = client.post("/runs", body, headers=key)
    assert (again.status_code, again.json["runId"]) == (202, run_id)


def test_a_definition_that_runs_an_archived_workflow_is_refused_at_its_place(
    client: Client,
) -> None:
    archive(client)
    for path in ("/workflows", "/workflows/validate"):
        errors = problem(client.post(path, ABOVE), 422, "invalid_definition")["errors"]
        (sentence,) = errors["/tasks/0/workflowId"]
        assert "'report' is archived" in sentence and "/workflows/report/restore" in sentence
    restore(client)
    client.post("/workflows", ABOVE)
    archive(client)
    top = {"id": "top", "tasks": [{"taskId": "x", "type": "workflow", "workflowId": "above"}]}
    assert client.post("/workflows", top).status_code == 201  # it says nothing of `report` itself


# --- Schedules


def test_firings_of_an_archived_workflow_fail_and_the_schedule_stays(client: Client) -> None:
    client.post("/schedules", EVERY)
    archive(client)
    tick(client, 61)
    (firing,) = client.get("/schedules/every/firings").json["items"]
    assert (firing["status"], firing["runId"]) == ("failed", None)
    assert firing["error"]["code"] == "workflow_archived"
    problem(client.post("/schedules/every/trigger"), 409, "workflow_archived")
    restore(client)
    tick(client, 60)
    newest, _ = client.get("/schedules/every/firings").json["items"]
    assert newest["status"] == "started" and count(client, "runs") == 1


def test_a_schedule_of_an_archived_workflow_is_only_paused_resumed_and_deleted(
    client: Client,
) -> None:
    client.post("/workflows", {**REPORT, "id": "another"})
    client.post("/schedules", EVERY)
    archive(client)
    for values in ({"priority": "high"}, {"everySeconds": 90}, {"workflowId": "report"}):
        answer = client.send("PATCH", "/schedules/every", json=values)
        problem(answer, 409, "workflow_archived")
    assert client.get("/schedules/every/preview").status_code == 200
    for enabled in (False, True):
        path = "/schedules/every/" + ("resume" if enabled else "pause")
        assert client.post(path).json["enabled"] is enabled
        answer = client.send("PATCH", "/schedules/every", json={"enabled": enabled})
        assert answer.status_code == 200
    elsewhere = client.send("PATCH", "/schedules/every", json={"workflowId": "another"})
    assert elsewhere.status_code == 200
    problem(
        client.send("PATCH", "/schedules/every", json={"workflowId": "report"}),
        *(409, "workflow_archived"),
    )
    assert client.send("DELETE", "/schedules/every").status_code == 204


# --- At the same moment


def test_who_submits_while_it_is_archived_is_told_so_or_has_a_run(client: Client) -> None:
    ended = threading.Event()

    def toggle() -> None:
        while not ended.is_set():
            archive(client)
            restore(client)

    def start(number: int) -> tuple[int, str]:
        name = list(STARTS)[number % len(STARTS)]
        answer = STARTS[name](Client(client.app, client._headers["Authorization"][7:]))
        return answer.status_code, answer.json.get("code", "")

    with ThreadPoolExecutor(4) as threads:
        toggling = threads.submit(toggle)
        answers = Counter(threads.map(start, range(300)))
        ended.set()
        toggling.result()
    assert set(answers) <= {
        *((200, ""), (201, ""), (202, "")),
        *((409, "workflow_archived"), (409, "schedule_exists")),
    }
    assert answers[202, ""] and answers[409, "workflow_archived"]
    assert count(client, "runs") == answers[202, ""]


def test_who_writes_a_version_and_who_archives_come_one_after_the_other(client: Client) -> None:
    def write(number: int) -> int:
        tasks = [{"taskId": f"t{number}", "agentId": "writer"}]
        return client.post("/workflows", {**REPORT, "tasks": tasks}).status_code

    with ThreadPoolExecutor(8) as threads:
        for round in range(10):
            writing = [threads.submit(write, 8 * round + n) for n in range(6)]
            newest = threads.submit(archive, client).result()["version"]
            answers = [future.result() for future in writing]
            assert set(answers) <= {201, 409}
            # What it answers is the newest version there will be.
            assert client.get("/workflows/report").json["version"] == newest
            restore(client)
