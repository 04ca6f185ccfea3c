"""Workflows over HTTP: versions, validation, both languages, lists."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from http_client import Client, open_client, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import add_agent
from sqlalchemy import func, select
from stack import Servers, new_redis_url, stack_environment
from test_canvas import read
from test_graph import graphs

from opscore import canvas, engine
from opscore.config import Settings
from opscore.definition import parse
from opscore.models import Task, Workflow
from opscore.workflows import create_workflow

YAML_TYPES = ["application/yaml", "application/x-yaml", "text/yaml"]


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    """A client for tests that leave only workflows of their own behind."""
    with servers.new_database() as url:
        known = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(known) as client:
            yield client


def definition(id: str, *tasks: str, **more: Any) -> dict[str, Any]:
    listed = [{"taskId": task, "agentId": "writer"} for task in tasks or ("a",)]
    return {"id": id, "tasks": listed, **more}


def count(client: Client) -> int:
    with client.database.autocommit() as tx:
        return tx.execute(select(func.count()).select_from(Workflow)).scalar_one()


def test_a_created_workflow_is_version_1_and_found_where_the_answer_says(client: Client) -> None:
    document = definition("first", name="First")
    answer = client.post("/workflows", document)
    assert answer.status_code == 201, answer.json
    assert answer.json["workflowId"] == "first" and answer.json["version"] == 1
    members = {"workflowId", "version", "name", "definition", "createdAt", "archivedAt"}
    assert set(answer.json) == members and answer.json["archivedAt"] is None
    assert answer.json["definition"] == document and answer.json["createdAt"].endswith("Z")
    assert client.get(answer.headers["Location"]).json == answer.json


def test_the_same_document_again_is_no_new_version(client: Client) -> None:
    client.post("/workflows", definition("same"))
    again = client.post("/workflows", definition("same"))
    assert (again.status_code, again.json["version"]) == (200, 1)
    changed = client.post("/workflows", definition("same", "b"))
    assert (changed.status_code, changed.json["version"]) == (201, 2)
    back = client.post("/workflows", definition("same"))
    assert (back.status_code, back.json["version"]) == (201, 3)


def test_the_id_is_made_from_the_name_if_there_is_none(client: Client) -> None:
    document = {"name": "Weekly Report", "tasks": [{"taskId": "a", "agentId": "x"}]}
    assert client.post("/workflows", document).json["workflowId"] == "wf_weekly-report"
    del document["name"]
    errors = problem(client.post("/workflows", document), 422, "invalid_definition")["errors"]
    assert list(errors) == ["/id"]


@pytest.mark.parametrize("kind", YAML_TYPES)
def test_a_definition_may_be_yaml(client: Client, kind: str) -> None:
    name = kind.replace("/", "-")
    text = f"id: {name}\ntasks:\n  - taskId: a\n    agentId: writer\n"
    answer = client.post("/workflows", data=text, headers={"Content-Type": kind})
    assert answer.status_code == 201, answer.json
    assert answer.json["definition"] == definition(name)


def test_yaml_that_cannot_be_read_is_400_and_says_where(client: Client) -> None:
    headers = {"Content-Type": "text/yaml"}
    for text in ("a: [", "a: 1\na: 2", "a: &x 1\nb: *x", "!!python/object:os.system {}"):
        answer = client.post("/workflows", data=text, headers=headers)
        assert "line" in problem(answer, 400, "bad_request")["detail"], text


BAD = {
    "tasks": [
        {"taskId": "a", "agentId": "x", "dependsOn": ["b"], "colour": "red"},
        {"taskId": "b", "agentId": "x", "dependsOn": ["a", "nobody"]},
        {"taskId": "b", "agentId": "x", "parameters": {"p": "${tasks.zzz.output}"}},
        {"taskId": "c", "agentId": 7, "retry": {"maxAttempts": 0}},
    ],
    "inputSchema": {"type": "nothing"},
    "id": "no spaces",
}


@pytest.mark.parametrize("path", ["/workflows", "/workflows/validate"])
def test_all_faults_of_a_definition_come_back_at_once_and_nothing_is_written(
    client: Client, path: str
) -> None:
    before = count(client)
    errors = problem(client.post(path, BAD), 422, "invalid_definition")["errors"]
    for place in ("/tasks/0/colour", "/tasks/1/dependsOn/1", "/tasks/2/taskId", "/id"):
        assert place in errors, errors
    assert any(place.startswith("/inputSchema") for place in errors)
    assert any(place.startswith("/tasks/3/agentId") for place in errors)
    assert any(place.startswith("/tasks/3/retry") for place in errors)
    assert all(isinstance(said, list) and said for said in errors.values())
    assert count(client) == before


@pytest.mark.parametrize(
    "document", [[], 7, "text", None, {}, {"tasks": []}, {"tasks": {}}, {"id": "x\0", "tasks": [1]}]
)
def test_what_is_no_definition_is_422(client: Client, document: Any) -> None:
    import json

    headers = {"Content-Type": "application/json"}
    answer = client.post("/workflows", data=json.dumps(document), headers=headers)
    assert problem(answer, 422, "invalid_definition")["errors"]


def test_a_circle_is_refused_where_it_is(client: Client) -> None:
    document = definition("circle", "a", "b")
    document["tasks"][0]["dependsOn"] = ["b"]
    document["tasks"][1]["dependsOn"] = ["a"]
    errors = problem(client.post("/workflows", document), 422, "invalid_definition")["errors"]
    assert any("/tasks/" in place for place in errors)


def test_every_key_the_description_names_is_accepted_and_none_other(client: Client) -> None:
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    common = {"taskId": "a", "name": "A", "type": "agent", "onFailure": "continue"}
    policies = {
        "retry": {"maxAttempts": 2, "backoffSeconds": 1, "maxBackoffSeconds": 2.5},
        "busy": {"backoffSeconds": 1, "maxBackoffSeconds": 2, "maxWaitSeconds": 3},
        "forEach": {"items": "${input.list}", "maxParallel": 2, "tolerate": "10%"},
    }
    work = {"agentId": "x", "parameters": {"i": "${item}"}, "timeoutSeconds": 5, "dependsOn": []}
    labels = {"id": "every", "name": "N", "description": "D", "version": "v1"}
    work["fallback"] = ["y"]
    work["when"] = "true"
    top = {**labels, "inputSchema": {}, "output": 1, "maxConcurrentRuns": 3, "deadlineSeconds": 9}
    document = {**top, "tasks": [{**common, **policies, **work}]}
    assert client.post("/workflows/validate", document).status_code == 200
    assert set(schemas["WorkflowDefinition"]["properties"]) == set(document)
    others = {"agentCapability", "nextTaskId", "onTimeout", "seconds", "until", "workflowId"}
    others |= {"version"}
    assert set(schemas["TaskDefinition"]["properties"]) == {*document["tasks"][0], *others}
    for name, schema in [("retry", "RetryPolicy"), ("busy", "BusyPolicy")]:
        assert set(schemas[schema]["properties"]) == set(policies[name])
    assert set(schemas["ForEachDefinition"]["properties"]) == set(policies["forEach"])
    other = {"tasks": [{"taskId": "a", "agentCapability": "x", "nextTaskId": None}], "id": "o"}
    assert client.post("/workflows/validate", other).status_code == 200


def test_validating_says_what_creating_would_do_and_writes_nothing(client: Client) -> None:
    document = definition("valid", "b", "a")
    before = count(client)
    answer = client.post("/workflows/validate", document)
    assert answer.status_code == 200, answer.json
    expected = {"valid": True, "workflowId": "valid", "version": 1, "isNew": True}
    told = {"tasks": ["b", "a"], "graph": answer.json["graph"], "canvas": answer.json["canvas"]}
    assert answer.json == {**expected, **told}
    assert count(client) == before
    client.post("/workflows", document)
    assert client.post("/workflows/validate", document).json["isNew"] is False


def test_validating_tells_the_graph_whatever_way_it_is_written(client: Client) -> None:
    document = definition("graph", "a", "b")
    document["tasks"] += [
        {"taskId": "c", "type": "approval", "when": "tasks.a.output > 1"},
        {"taskId": "d", "agentCapability": "write", "forEach": {"items": "${tasks.b.output}"}},
        {"taskId": "e"},
    ]
    writer = {"agentId": "writer", "agentCapability": None}
    who = {"a": writer, "b": writer, "d": {"agentId": None, "agentCapability": "write"}}
    graph = [
        {
            "taskId": task,
            "type": "approval" if task == "c" else "agent",
            "agent": who.get(task),
            "forEach": task == "d",
            "dependsOn": [before] if before else [],
            "when": "tasks.a.output > 1" if task == "c" else None,
        }
        for before, task in zip(["", *"abcd"], "abcde", strict=True)
    ]
    listed = client.post("/workflows/validate", document).json
    assert listed["graph"] == graph
    # As `e` may be skipped, for all before it may be, the run has an end of its own.
    assert listed["canvas"]["messages"] == [{"chain": [*"abcde", "(end)"]}]
    for task, then in zip(document["tasks"], [*"bcde", None], strict=True):
        task["nextTaskId"] = then
    assert client.post("/workflows/validate", document).json == listed


def test_validating_shows_chords_joins_and_what_comes_later(client: Client) -> None:
    tasks = {"a": "", "b": "", "c": "a", "d": "ab", "e": "cd"}
    assert canvas_of(client, tasks) == {
        "messages": [{"chain": ["a", {"chord": {"header": ["c", "d"], "body": "e"}}]}, "b"],
        "joins": [{"taskId": "d", "after": ["b"]}],
        "later": [],
    }
    chord = {"chord": {"header": ["b", "c"], "body": "(end)"}}
    assert canvas_of(client, {"a": "", "b": "a", "c": "a"})["messages"] == [{"chain": ["a", chord]}]
    many = [f"t{n}" for n in range(30)]
    told = canvas_of(client, {**dict.fromkeys(many, ""), "last": many})
    assert told["later"] == ["last"] and told["joins"] == []
    assert [task for lane in told["messages"] for task in lane["lane"]] == many


def canvas_of(client: Client, edges: dict[str, str | list[str]]) -> Any:
    answer = client.post("/workflows/validate", {"id": "drawn", "tasks": listed(edges)})
    assert answer.status_code == 200, answer.json
    return answer.json["canvas"]


def listed(edges: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
    return [
        {"taskId": task, "agentId": "writer", "dependsOn": list(before)}
        for task, before in edges.items()
    ]


@st.composite
def documents(draw: st.DrawFn, far: str) -> dict[str, Any]:
    """A definition of any graph, done by agents here and behind HTTP, and by nobody."""
    nodes = draw(graphs(40))
    names = {node.id: f"t{n}" for n, node in enumerate(nodes)}
    tasks = listed({names[n.id]: [names[d] for d in n.depends_on] for n in nodes})
    for task in tasks:
        if (who := draw(st.sampled_from(["writer", far, ""]))) != "writer":
            del task["agentId"]
            task |= {"agentCapability": who} if who else {"type": "approval"}
    return {"id": "generated", "tasks": tasks}


@pytest.fixture(scope="module")
def far(client: Client) -> str:
    """The capability that only an agent behind HTTP has."""
    with client.database.transaction() as tx:
        add_agent(tx, "far", "fetch", kind="remote", capacity=1, contact_endpoint="https://a/")
    return "fetch"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_validating_tells_the_messages_that_a_run_submitted_now_would_send(
    client: Client, far: str, data: st.DataObject
) -> None:
    document = data.draw(documents(far))
    told = client.post("/workflows/validate", document).json["canvas"]
    celery = client.app.extensions["opscore"].dispatcher.app
    with client.database.transaction() as tx, tx.begin_nested() as trial:
        stored, _ = create_workflow(tx, parse(document))
        plan = engine.submit_run(tx, stored, engine.Submission(input={}))
        names = {id: name for id, name in tx.execute(select(Task.id, Task.definition_id))}
        trial.rollback()
    assert plan.drawn is not None
    sent = canvas.signatures(celery, plan.drawn, plan.nodes, plan.generation, None)
    text = json.dumps([read(one) for one in sent])
    for id, name in names.items():
        text = text.replace(str(id), name or "(end)")
    assert told["messages"] == json.loads(text)
    said = {join["taskId"]: set(join["after"]) for join in told["joins"]}
    for task in document["tasks"]:
        if task["taskId"] not in told["later"]:
            kept = said.get(task["taskId"], set())
            before = set().union(*(ahead(one, task["taskId"]) or () for one in told["messages"]))
            assert set(task["dependsOn"]) <= before | kept and not before & kept


def ahead(step: Any, task: str, over: frozenset[str] = frozenset()) -> frozenset[str] | None:
    """Return the tasks that are over when a message visits `task`; None if it does not."""
    for earlier, inner in parts(step):
        if inner == task:
            return over | earlier
        if not isinstance(inner, str) and (found := ahead(inner, task, over | earlier)) is not None:
            return found
    return None


def parts(step: Any) -> Iterator[tuple[frozenset[str], Any]]:
    """Yield what a step is made of, each with the tasks of the step that are over before it."""
    nothing: frozenset[str] = frozenset()
    if isinstance(step, str):
        return (yield nothing, step)
    ((word, inner),) = step.items()
    if word == "chain":
        yield from ((nothing.union(*map(done, inner[:n])), part) for n, part in enumerate(inner))
    elif word == "chord":
        yield from ((nothing, part) for part in inner["header"])
        yield nothing.union(*map(done, inner["header"])), inner["body"]
    elif word == "link":
        yield nothing, inner["task"]
        yield from ((frozenset({inner["task"]}), part) for part in inner["then"])
    else:
        yield from ((nothing, part) for part in inner)


def done(step: Any) -> frozenset[str]:
    """Return what is over when the next step begins; what is linked may not be."""
    if isinstance(step, str):
        return frozenset({step})
    if "link" in step:
        return frozenset({step["link"]["task"]})
    return frozenset().union(*(done(part) for _, part in parts(step)))


def test_a_workflow_is_got_by_version(client: Client) -> None:
    client.post("/workflows", definition("many", "a"))
    client.post("/workflows", definition("many", "b"))
    assert client.get("/workflows/many").json["version"] == 2
    assert client.get("/workflows/many?version=1").json["definition"] == definition("many", "a")
    problem(client.get("/workflows/many?version=3"), 404, "workflow_not_found")
    problem(client.get("/workflows/none"), 404, "workflow_not_found")
    for bad in ("0", "x", "99999999999999999999", "1.5", ""):
        answer = client.get(f"/workflows/many?version={bad}")
        assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/version"]


def test_lists_go_on_where_the_cursor_says(client: Client) -> None:
    for name in ("l1", "l2", "l3"):
        client.post("/workflows", definition(name))
    found, path = [], "/workflows?limit=2"
    while path:
        page = client.get(path).json
        assert set(page) == {"items", "nextCursor"} and len(page["items"]) <= 2
        found += [item["workflowId"] for item in page["items"]]
        cursor = page["nextCursor"]
        path = f"/workflows?limit=2&cursor={cursor}" if cursor else ""
    assert found[:3] == ["l3", "l2", "l1"] and len(found) == len(set(found))


def test_versions_are_listed_newest_first(client: Client) -> None:
    for task in ("a", "b", "c"):
        client.post("/workflows", definition("v", task))
    page = client.get("/workflows/v/versions?limit=2").json
    assert [item["version"] for item in page["items"]] == [3, 2]
    rest = client.get(f"/workflows/v/versions?cursor={page['nextCursor']}").json
    assert [item["version"] for item in rest["items"]] == [1] and rest["nextCursor"] is None
    problem(client.get("/workflows/none/versions"), 404, "workflow_not_found")


@pytest.mark.parametrize("path", ["/workflows", "/runs", "/agents", "/workflows/x/versions"])
@pytest.mark.parametrize("cursor", ["x", "e30=", "W10=", "WzEsMiwzXQ==", "bnVsbA==", "%00", "🙂"])
def test_a_cursor_that_is_none_is_named(client: Client, path: str, cursor: str) -> None:
    answer = client.get(f"{path}?cursor={cursor}")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/cursor"]


@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1.5", "", "9" * 5000])
def test_a_limit_that_is_none_is_named(client: Client, limit: str) -> None:
    answer = client.get(f"/workflows?limit={limit}")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/limit"]


def test_an_unknown_parameter_is_named_with_those_there_are(client: Client) -> None:
    errors = problem(client.get("/workflows?page=2"), 422, "invalid_request")["errors"]
    assert list(errors) == ["/page"] and "cursor, limit" in errors["/page"][0]
