"""Agents over HTTP, and the older way to start a workflow for one."""

from collections.abc import Iterator
from typing import Any

import pytest
from http_client import Client, open_client, problem
from rows import add_agent
from sqlalchemy import func, select, update
from werkzeug.test import TestResponse

from opscore import memories
from opscore.config import Settings
from opscore.models import Agent, Run, Workflow

UNBOUND = {"id": "report", "tasks": [{"taskId": "a"}, {"taskId": "b"}]}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        with client.database.transaction() as tx:
            add_agent(tx, "writer", "write", capacity=2)
        yield client


def count(client: Client, table: type[Any]) -> int:
    with client.database.autocommit() as tx:
        return tx.execute(select(func.count()).select_from(table)).scalar_one()


def test_agents_are_listed_and_got(client: Client) -> None:
    (shown,) = client.get("/agents").json["items"]
    assert shown == client.get("/agents/writer").json
    times = {key: shown.pop(key) for key in ("registeredAt", "updatedAt", "seenAt")}
    assert all(moment.endswith("Z") for moment in times.values())
    assert shown == {
        "agentId": "writer",
        "agentName": "Writer",
        "kind": "function",
        "version": "1",
        "capabilities": ["write"],
        "capacity": 2,
        "state": "idle",
        "stateAt": None,
        "available": True,
        "unavailableBecause": None,
        "paused": False,
        "draining": False,
        "contactEndpoint": None,
        "metadata": None,
        "heartbeatSeconds": None,
        "requireToken": True,
        "busyUntil": None,
        "running": 0,
        "holders": [],
        "waiting": 0,
        "line": [],
    }
    assert client.get("/agents?capability=read").json["items"] == []
    problem(client.get("/agents/nobody"), 404, "agent_not_found")


# --- What they remember ---------------------------------------------------------------------------

MEMORIES = "/agents/writer/memories"


@pytest.fixture
def remembering(client: Client) -> Client:
    with client.database.transaction() as tx:
        add_agent(tx, "other", kind="llm")
    for agent_id, namespace, text in [
        ("writer", "notes", "the cat is grey"),
        ("writer", "notes", "the dog is brown"),
        ("writer", "old", "a cat and a dog"),
        ("other", "notes", "the cat is white"),
    ]:
        with client.database.autocommit() as tx:
            memories.add(tx, agent_id, namespace, text, 3600 if namespace == "old" else None)
    return client


def told(client: Client, query: str = "") -> list[str]:
    return [one["text"] for one in client.get(MEMORIES + query).json["items"]]


def forget(client: Client, path: str) -> TestResponse:
    return client.send("DELETE", path)


def test_what_an_agent_remembers_is_listed_newest_first_and_in_pages(remembering: Client) -> None:
    assert told(remembering) == ["a cat and a dog", "the dog is brown", "the cat is grey"]
    assert told(remembering, "?namespace=notes") == ["the dog is brown", "the cat is grey"]
    page = remembering.get(f"{MEMORIES}?limit=2").json
    rest = remembering.get(f"{MEMORIES}?limit=2&cursor={page['nextCursor']}").json
    assert [one["text"] for one in rest["items"]] == ["the cat is grey"]
    assert rest["nextCursor"] is None
    (newest, *_) = page["items"]
    assert set(newest) == {"memoryId", "namespace", "text", "score", "addedAt", "expiresAt"}
    assert (newest["score"], newest["namespace"]) == (None, "old")
    assert newest["expiresAt"].endswith("Z") and page["items"][1]["expiresAt"] is None


def test_what_an_agent_remembers_is_found_as_it_finds_it(remembering: Client) -> None:
    assert told(remembering, "?query=grey+cat") == ["the cat is grey", "a cat and a dog"]
    assert told(remembering, "?query=cat&namespace=notes") == ["the cat is grey"]
    assert told(remembering, "?query=owl") == []
    assert told(remembering, "?query=&limit=1") == ["a cat and a dog"]
    (found,) = remembering.get(f"{MEMORIES}?query=grey").json["items"]
    assert found["score"] == 1
    cursor = remembering.get(f"{MEMORIES}?limit=1").json["nextCursor"]
    refused = problem(
        remembering.get(f"{MEMORIES}?query=a&cursor={cursor}"), 422, "invalid_request"
    )
    assert list(refused["errors"]) == ["/cursor"]


def test_an_agent_forgets_one_memory_those_of_a_namespace_or_all(remembering: Client) -> None:
    first = remembering.get(f"{MEMORIES}?query=grey").json["items"][0]["memoryId"]
    problem(forget(remembering, f"/agents/other/memories/{first}"), 404, "memory_not_found")
    assert forget(remembering, f"{MEMORIES}/{first}").status_code == 204
    problem(forget(remembering, f"{MEMORIES}/{first}"), 404, "memory_not_found")
    problem(forget(remembering, f"{MEMORIES}/none"), 404, "memory_not_found")
    assert forget(remembering, f"{MEMORIES}?namespace=old").json == {"forgotten": 1}
    assert told(remembering) == ["the dog is brown"]
    assert [forget(remembering, MEMORIES).json["forgotten"] for _ in "ab"] == [1, 0]
    assert len(remembering.get("/agents/other/memories").json["items"]) == 1
    for method in ("GET", "DELETE"):
        problem(remembering.send(method, "/agents/nobody/memories"), 404, "agent_not_found")


def test_what_a_deregistered_agent_remembers_can_be_looked_at_and_forgotten(
    remembering: Client,
) -> None:
    with remembering.database.transaction() as tx:
        tx.execute(update(Agent).values(deregistered_at=func.now()))
    assert told(remembering, "?query=grey") == ["the cat is grey"]
    assert forget(remembering, MEMORIES).json == {"forgotten": 3}


# --- The older way to start a workflow ------------------------------------------------------------


def test_a_workflow_is_triggered_by_its_id(client: Client) -> None:
    client.post("/workflows", UNBOUND)
    body = {"workflowDefinitionId": "report", "initialPayload": {"topic": "queues"}}
    answer = client.post("/agent/writer/workflow", body)
    assert answer.status_code == 202, answer.json
    run_id = answer.json["runId"]
    assert answer.json == {
        "sessionId": run_id,
        "runId": run_id,
        "workflowId": "report",
        "message": "Workflow triggered successfully",
    }
    run = client.get(answer.headers["Location"]).json
    assert (run["runId"], run["agentId"], run["version"]) == (run_id, "writer", 1)
    assert run["input"] == {"topic": "queues"}
    assert [task["agentId"] for task in run["tasks"]] == ["writer", "writer"]


@pytest.mark.parametrize("payload", [{}, {"initialPayload": None}, {"initialPayload": {}}])
def test_a_trigger_may_bring_its_definition_along(client: Client, payload: dict[str, Any]) -> None:
    answer = client.post("/agent/writer/workflow", {"workflowDefinition": UNBOUND, **payload})
    assert answer.status_code == 202, answer.json
    assert client.get(answer.headers["Location"]).json["input"] == {}
    assert client.get("/workflows").json["items"] == []
    problem(client.get("/workflows/report"), 404, "workflow_not_found")


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, ["/workflowDefinitionId"]),
        ({"workflowDefinitionId": None}, ["/workflowDefinitionId"]),
        (
            {"workflowDefinitionId": "x", "workflowDefinition": UNBOUND},
            ["/workflowDefinitionId"],
        ),
        ({"workflowDefinitionId": 7}, ["/workflowDefinitionId"]),
        ({"workflowDefinitionId": "x", "initialPayload": []}, ["/initialPayload"]),
        ({"workflowDefinitionId": "x", "payload": {}, "colour": 1}, ["/colour", "/payload"]),
    ],
)
def test_a_trigger_must_be_as_it_must_be(
    client: Client, body: dict[str, Any], places: list[str]
) -> None:
    answer = client.post("/agent/writer/workflow", body)
    assert sorted(problem(answer, 422, "invalid_request")["errors"]) == places
    assert count(client, Run) == 0


def test_faults_of_an_inline_definition_are_named_in_the_whole_body(client: Client) -> None:
    body = {"workflowDefinition": {"id": "x", "tasks": [{"taskId": "a", "colour": 1}]}}
    answer = client.post("/agent/writer/workflow", body)
    errors = problem(answer, 422, "invalid_definition")["errors"]
    assert list(errors) == ["/workflowDefinition/tasks/0/colour"]
    assert count(client, Workflow) == 0


def test_an_unknown_agent_or_workflow_is_404_and_nothing_is_written(client: Client) -> None:
    answer = client.post("/agent/nobody/workflow", {"workflowDefinition": UNBOUND})
    problem(answer, 404, "agent_not_found")
    answer = client.post("/agent/writer/workflow", {"workflowDefinitionId": "none"})
    problem(answer, 404, "workflow_not_found")
    assert count(client, Workflow) == count(client, Run) == 0
