"""Tasks submitted by themselves, without a workflow; and how large what goes in and out may be."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import Client, open_client, problem
from redis import Redis
from rows import add_agent
from sqlalchemy import func, select, text
from stack import Servers, Stack, running_stack

from opscore.config import Settings
from opscore.models import Run, Workflow

MEBIBYTE = 2**20
JOB = {"taskType": "agent_run", "agentId": "writer", "inputData": {"topic": "queues"}}
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


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        with client.database.transaction() as tx:
            add_agent(tx, "writer", "write")
            add_agent(tx, "gone", deregistered_at=func.now())
        yield client


def count(client: Client, table: type[Run | Workflow]) -> int:
    with client.database.autocommit() as tx:
        return tx.execute(select(func.count()).select_from(table)).scalar_one()


# --- Submitting ---------------------------------------------------------------------------------


def test_a_task_by_itself_is_accepted_and_found_where_the_answer_says(client: Client) -> None:
    answer = client.post("/tasks", JOB, headers={"X-Request-ID": "r-1"})
    assert answer.status_code == 202, answer.json
    assert set(answer.json) == TASK
    assert answer.headers["Location"] == f"/v1/opscore/tasks/{answer.json['taskId']}"
    shown = client.get(answer.headers["Location"]).json
    assert {name: shown[name] for name in TASK} == answer.json
    assert (shown["taskDefinitionId"], shown["agentId"]) == ("agent_run", "writer")
    run = client.get(f"/runs/{answer.json['runId']}").json
    assert (run["workflowId"], run["agentId"], run["requestId"]) == ("agent-run", "writer", "r-1")
    assert (run["input"], run["status"]) == ({"topic": "queues"}, "queued")
    assert [task["taskId"] for task in run["tasks"]] == [answer.json["taskId"]]


def test_a_task_by_itself_is_published(client: Client, settings: Settings) -> None:
    client.post("/tasks", JOB)
    with Redis.from_url(settings.redis_url) as redis:
        assert redis.llen("opscore.agents") == 1


def test_labels_priority_and_timeout_are_kept(client: Client) -> None:
    more = {"labels": {"team": "support"}, "priority": "high", "timeoutSeconds": 7}
    task = client.post("/tasks", {**JOB, **more}).json
    run = client.get(f"/runs/{task['runId']}").json
    assert (run["labels"], run["priority"]) == ({"team": "support"}, "high")
    found = client.get("/runs?label=team:support&workflowId=agent-run").json["items"]
    assert [run["runId"] for run in found] == [task["runId"]]
    with client.database.autocommit() as tx:
        seconds = tx.execute(text("SELECT timeout_seconds FROM tasks")).scalar_one()
    assert seconds == 7


def test_input_labels_priority_and_timeout_may_be_left_out(client: Client) -> None:
    task = client.post("/tasks", {"taskType": "agent_run", "agentId": "writer"}).json
    run = client.get(f"/runs/{task['runId']}").json
    assert (run["input"], run["labels"], run["priority"]) == ({}, {}, "normal")
    with client.database.autocommit() as tx:
        assert tx.execute(text("SELECT timeout_seconds FROM tasks")).scalar_one() == 600


def test_tasks_that_are_alike_share_a_version(client: Client) -> None:
    jobs = (
        JOB,
        {**JOB, "inputData": {"topic": "else"}},
        {**JOB, "timeoutSeconds": 600},
        {**JOB, "timeoutSeconds": 5},
        {"taskType": "agent_run", "agentCapability": "write"},
        JOB,
    )
    runs = [client.post("/tasks", job).json["runId"] for job in jobs]
    versions = [client.get(f"/runs/{run_id}").json["version"] for run_id in runs]
    assert versions == [1, 1, 1, 2, 3, 1] and count(client, Workflow) == 3


def test_tasks_by_themselves_are_not_what_a_workflow_of_that_name_means(client: Client) -> None:
    client.post("/tasks", JOB)
    problem(client.post("/runs", {"workflowId": "agent-run"}), 404, "workflow_not_found")


@pytest.mark.parametrize("agent_id", ["nobody", "gone"])
def test_an_agent_that_is_not_there_is_404_and_nothing_is_written(
    client: Client, agent_id: str
) -> None:
    problem(client.post("/tasks", {**JOB, "agentId": agent_id}), 404, "agent_not_found")
    assert count(client, Run) == count(client, Workflow) == 0


def test_a_capability_nobody_offers_yet_is_accepted(client: Client) -> None:
    job = {"taskType": "agent_run", "agentCapability": "paint"}
    answer = client.post("/tasks", job)
    assert answer.status_code == 202
    assert (answer.json["agentId"], answer.json["agentCapability"]) == (None, "paint")


@pytest.mark.parametrize(
    ("more", "places"),
    [
        ({"taskType": "other"}, ["/taskType"]),
        ({"taskType": None}, ["/taskType"]),
        ({"taskType": 7}, ["/taskType"]),
        ({"agentCapability": "write"}, ["/agentId"]),
        ({"agentId": None}, ["/agentId"]),
        ({"agentId": "a b"}, ["/agentId"]),
        ({"agentId": "x" * 65}, ["/agentId"]),
        ({"agentId": 7}, ["/agentId"]),
        ({"agentId": ["writer"]}, ["/agentId"]),
        ({"agentCapability": ""}, ["/agentCapability"]),
        ({"inputData": None}, ["/inputData"]),
        ({"inputData": []}, ["/inputData"]),
        ({"inputData": "text"}, ["/inputData"]),
        ({"inputData": {"a": ["\0"]}}, ["/inputData/a/0"]),
        ({"labels": {"team": "x" * 10_000}}, ["/labels/team"]),
        ({"priority": "urgent"}, ["/priority"]),
        ({"timeoutSeconds": 0}, ["/timeoutSeconds"]),
        ({"timeoutSeconds": "5"}, ["/timeoutSeconds"]),
        ({"timeoutSeconds": 2_592_001}, ["/timeoutSeconds"]),
        ({"agent": "writer", "input": {}}, ["/agent", "/input"]),
    ],
)
def test_a_task_must_be_as_it_must_be(
    client: Client, more: dict[str, Any], places: list[str]
) -> None:
    answer = client.post("/tasks", {**JOB, **more})
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert sorted(errors) == places and all(errors.values())
    assert count(client, Run) == count(client, Workflow) == 0


@pytest.mark.parametrize("body", [[], "x", 7, {}])
def test_a_body_that_is_no_task_is_422(client: Client, body: Any) -> None:
    problem(client.post("/tasks", body), 422, "invalid_request")


def test_without_the_key_nothing_is_submitted(client: Client) -> None:
    problem(client.without_key().post("/tasks", JOB), 401, "unauthorized")
    assert count(client, Run) == 0


# --- How large what goes in may be --------------------------------------------------------------


def filled(size: int, character: str = "x") -> dict[str, str]:
    """Return an object of so many bytes as compact JSON in UTF-8, in whole characters."""
    room = size - len('{"a":""}')
    width = len(character.encode())
    return {"a": "x" * (room % width) + character * (room // width)}


ENDPOINTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "run": ("/runs", {"workflowId": "w"}, "input"),
    "trigger": ("/agent/writer/workflow", {"workflowDefinitionId": "w"}, "initialPayload"),
    "task": ("/tasks", {"taskType": "agent_run", "agentId": "writer"}, "inputData"),
}


@pytest.mark.parametrize("character", ["x", "é", "\N{GRINNING FACE}"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_input_may_have_a_mebibyte_and_no_byte_more(
    client: Client, endpoint: str, character: str
) -> None:
    client.post("/workflows", {"id": "w", "tasks": [{"taskId": "a", "agentId": "writer"}]})
    path, body, member = ENDPOINTS[endpoint]
    largest = {**body, member: filled(MEBIBYTE, character)}
    answer = client.post(path, largest)  # spelled with \u, as most clients do it
    assert answer.status_code == 202, answer.json
    assert client.get(f"/runs/{answer.json['runId']}").json["input"] == largest[member]
    answer = client.post(path, {**body, member: filled(MEBIBYTE + 1, character)})
    found = problem(answer, 422, "invalid_input")
    assert found["detail"] == "The input cannot be stored."
    ((place, (said,)),) = found["errors"].items()
    assert place == f"/{member}"
    assert said == "This takes 1,048,577 bytes as JSON; at most 1,048,576 bytes are allowed."
    assert count(client, Run) == 1


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_body_beyond_what_is_read_is_413_and_says_how_large_it_is(
    client: Client, endpoint: str
) -> None:
    path, body, member = ENDPOINTS[endpoint]
    raw = json.dumps({**body, member: filled(4 * MEBIBYTE)}).encode()
    answer = client.post(path, data=raw, headers={"Content-Type": "application/json"})
    detail = problem(answer, 413, "body_too_large")["detail"]
    assert f"{len(raw):,} bytes" in detail and "4,194,304 bytes" in detail


def test_what_agents_say_of_themselves_is_limited_but_for_a_result(client: Client) -> None:
    report = {"state": "idle", "details": filled(MEBIBYTE)}
    assert client.post("/agent/writer/state", report).status_code == 202
    report = {"state": "idle", "details": filled(MEBIBYTE + 1)}
    errors = problem(client.post("/agent/writer/state", report), 422, "invalid_request")["errors"]
    assert "1,048,577 bytes" in errors["/details"][0]


# --- How large what comes out may be ------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("jobs") / "log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.fleet") as stack:
        stack.start_worker()
        yield stack


@pytest.fixture(scope="module")
def site(stack: Stack) -> Iterator[Client]:
    with open_client(stack.settings) as client:
        yield client


def finished(site: Client, answer: Any) -> Any:
    assert answer.status_code == 202, answer.json
    run = site.get(f"/runs/{answer.json['runId']}?waitSeconds=30").json
    assert run["finishedAt"], run["status"]
    return run


def run(site: Client, *tasks: dict[str, Any], input: Any = None, **more: Any) -> Any:
    """Run an inline workflow whose tasks go to `sized`, unless they name another agent."""
    body = {"workflowDefinition": {"id": "w", "tasks": tasks, **more}, "initialPayload": input}
    return finished(site, site.post("/agent/sized/workflow", body))


def failure(run: Any) -> str:
    """Return what is said of an output that was too large."""
    assert (run["status"], run["output"]) == ("failed", None), run["error"]
    assert run["error"]["code"] == "output_too_large", run["error"]
    return str(run["error"]["message"])


def sized(task_id: str, size: int, **more: Any) -> dict[str, Any]:
    return {"taskId": task_id, "parameters": {"size": size}, **more}


@pytest.mark.parametrize("who", [{"agentId": "echo"}, {"agentCapability": "echo"}])
def test_a_task_of_a_mebibyte_goes_in_and_comes_out(site: Client, who: dict[str, str]) -> None:
    given = filled(MEBIBYTE, "é")
    answer = site.post("/tasks", {"taskType": "agent_run", **who, "inputData": given})
    ended = finished(site, answer)
    assert (ended["status"], ended["error"]) == ("completed", None)
    assert ended["output"] == given
    task = site.get(answer.headers["Location"]).json
    assert (task["status"], task["agentId"], task["output"]) == ("completed", "echo", given)


def test_an_output_beyond_a_mebibyte_fails_at_once_and_says_how_large_it_is(site: Client) -> None:
    ended = run(site, sized("a", MEBIBYTE + 1))
    assert "1,048,577 bytes as JSON; at most 1,048,576 bytes" in failure(ended)
    (task,) = ended["tasks"]
    assert len(task["attempts"]) == 1, "it is not tried again"
    assert task["error"]["code"] == "output_too_large"
    assert run(site, sized("a", MEBIBYTE))["status"] == "completed"


def test_a_run_s_output_may_have_a_mebibyte_and_no_byte_more(site: Client) -> None:
    half = sized("a", MEBIBYTE // 2)
    value = "${tasks.a.output}"
    two = "x" * (MEBIBYTE // 2 - len('{"a":,"b":""}'))
    ended = run(site, half, output={"a": value, "b": two})
    assert ended["status"] == "completed" and ended["output"]["b"] == two
    said = failure(run(site, half, output={"a": value, "b": two + "x"}))
    assert "The run's output" in said and "1,048,577 bytes as JSON" in said


def test_items_and_last_tasks_may_have_more_together(site: Client) -> None:
    each = {"items": [MEBIBYTE] * 3}
    items = {"taskId": "a", "forEach": each, "parameters": {"size": "${item}"}}
    ended = run(site, items)
    assert ended["status"] == "completed" and len(ended["output"]) == 3
    again = {"taskId": "b", "forEach": {"items": "${tasks.a.output}"}, "parameters": {"size": 4}}
    assert run(site, items, again)["output"] == ["xx"] * 3
    ended = run(site, sized("a", MEBIBYTE, dependsOn=[]), sized("b", MEBIBYTE, dependsOn=[]))
    assert ended["status"] == "completed" and set(ended["output"]) == {"a", "b"}


def test_items_that_are_too_large_together_fail_their_task(site: Client) -> None:
    each = {"items": [MEBIBYTE] * 17}
    items = {"taskId": "a", "forEach": each, "parameters": {"size": "${item}"}}
    ended = run(site, items)
    assert "16,777,216 bytes" in failure(ended)
    assert ended["tasks"][0]["items"]["completed"] == 17
    goes_on = run(site, items | {"onFailure": "continue"}, sized("b", 4))
    assert (goes_on["status"], goes_on["output"]) == ("completed", "xx")


def test_last_tasks_that_are_too_large_together_fail_the_run(site: Client) -> None:
    tasks = [sized(f"t{n}", MEBIBYTE, dependsOn=[]) for n in range(17)]
    said = failure(run(site, *tasks))
    assert "The run's output" in said and "16,777,216 bytes" in said


# --- Parameters that are one expression ---------------------------------------------------------


def test_parameters_may_be_one_expression_that_gives_an_object(site: Client) -> None:
    first = {"taskId": "a", "agentId": "echo", "parameters": "${input}"}
    second = {"taskId": "b", "agentId": "echo", "parameters": "${tasks.a.output.inner}"}
    assert run(site, first, second, input={"inner": {"n": 1}})["output"] == {"n": 1}


def test_parameters_that_give_no_object_fail_the_task(site: Client) -> None:
    task = {"taskId": "a", "agentId": "echo", "parameters": "${input.list}"}
    ended = run(site, task, input={"list": [1]})
    assert (ended["status"], ended["error"]["code"]) == ("failed", "expression_error")
    assert "must give an object, not a list" in ended["error"]["message"]
    assert len(ended["tasks"][0]["attempts"]) == 1
