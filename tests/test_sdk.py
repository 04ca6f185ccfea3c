"""The clients of the API: their surface, every operation, runs that end, and what errors mean."""

import asyncio
import copy
import inspect
import itertools
import json
import pickle
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import sdk_source
from http_client import Client, open_client
from rows import WORKER, add_agent
from sdk_clients import KINDS, Site, answering, open_sdk, open_site, scripted
from stack import (
    API_KEY,
    ROOT,
    Servers,
    new_redis_url,
    stack_environment,
    wait_until,
)
from test_fuzz import ask_for_approvals, fail_runs, open_attempts

from opscore import memories, sdk
from opscore.config import Settings
from opscore.sdk import OpsCoreClientAsync, OpsCoreClientSync, async_client, errors, sync_client
from web.api.tasks import TOKEN
from web.api.workflows import DEFINITION

SAY = {"taskId": "say", "agentId": "echo", "parameters": "${input}"}
ECHO = {"id": "echo", "tasks": [SAY]}
RESOURCES = ("workflows", "runs", "tasks", "agents", "schedules")


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(servers, tmp_path_factory.mktemp("sdk")) as site:
        yield site


@pytest.fixture(params=[f"{kind}, {way}" for kind in KINDS for way in ("in process", "by socket")])
def client(request: pytest.FixtureRequest, site: Site) -> Iterator[Any]:
    kind, way = request.param.split(", ")
    where = {"app": site.app} if way == "in process" else {"url": site.url}
    with open_sdk(kind, **where) as client:
        yield client


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- What is made, and what it loads ------------------------------------------------------------


def test_the_sync_client_and_the_types_are_what_make_sdk_makes_of_their_sources() -> None:
    assert sdk_source.TWIN.read_text() == sdk_source.twin()
    assert sdk_source.TYPES.read_text() == sdk_source.types()


def test_both_clients_have_the_same_surface() -> None:
    pairs = [(OpsCoreClientAsync, OpsCoreClientSync)]
    for name in ("Run", "Task", "Workflows", "Runs", "Tasks", "Agents", "Schedules"):
        pairs.append((getattr(async_client, f"Async{name}"), getattr(sync_client, name)))
    for theirs, ours in pairs:
        assert surface(theirs) == surface(ours)


def surface(kind: type[Any]) -> dict[str, Any]:
    """Return what a class offers: of its methods the parameters, without their types."""
    found: dict[str, Any] = {}
    for name, value in vars(kind).items():
        if callable(value) and (not name.startswith("_") or name == "__init__"):
            taken = inspect.signature(value).parameters.values()
            found[name] = [(each.name, each.kind, each.default) for each in taken]
        elif isinstance(value, property):
            found[name] = property
    return found


def test_the_sdk_loads_neither_flask_celery_nor_sqlalchemy() -> None:
    heavy = "{'flask', 'celery', 'sqlalchemy', 'web', 'workers', 'psycopg2'}"
    program = f"import sys, opscore.sdk; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


def test_the_clients_and_everything_they_raise_are_exported() -> None:
    raised = {name for name, it in vars(errors).items() if is_error(it)}
    clients = {"AgentServer", "OpsCoreClientAsync", "OpsCoreClientSync"}
    assert raised | clients == set(sdk.__all__)


def is_error(it: Any) -> bool:
    return inspect.isclass(it) and issubclass(it, sdk.OpsCoreSDKError)


@pytest.mark.parametrize(
    "error",
    [
        sdk.NotFoundError(404, "no", "run_not_found", {"/a": ["b"]}, "r-1", 2.0),
        sdk.RunFailed("r", "failed", {"code": "broken", "message": "it broke", "taskId": None}),
        sdk.ConnectionError("away", was_sent=False),
        sdk.WaitTimeout("not yet"),
    ],
)
def test_errors_survive_the_way_to_another_process(error: Exception) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))


# --- The older surface --------------------------------------------------------------------------


def test_the_older_surface_is_as_it_was(client: Any) -> None:
    assert client.update_state("value", "active", {"queue": 3}) == {
        "status": "success",
        "message": "State update accepted",
    }
    assert client.update_state("value", "idle")["status"] == "success"
    assert set(client.get_state("value")) == {"agentId", "state", "details", "timestamp"}
    client.workflows.create(ECHO)
    started = client.trigger_workflow("echo", "echo", {"word": "hello"})
    assert started["sessionId"] == started["runId"] and started["workflowId"] == "echo"
    run = client.runs.get(started["sessionId"]).wait(60)
    assert (run.status, run.output) == ("completed", {"word": "hello"})
    assert client.trigger_workflow("echo", "echo")["workflowId"] == "echo"
    inline = {"id": "inline", "tasks": [{"taskId": "any"}]}
    assert client.trigger_workflow("echo", workflow_definition=inline)["workflowId"] == "inline"


def test_the_older_names_of_arguments_and_their_defaults_are_as_they_were() -> None:
    for client in (OpsCoreClientAsync, OpsCoreClientSync):
        made = inspect.signature(client).parameters
        assert list(made)[:3] == ["base_url", "api_key", "timeout"]
        assert made["timeout"].default == 10.0
        for name, expected in [
            ("update_state", ["self", "agent_id", "state", "details"]),
            ("get_state", ["self", "agent_id"]),
            ("trigger_workflow", ["self", "agent_id", "workflow_definition_id", "initial_payload"]),
        ]:
            assert list(inspect.signature(getattr(client, name)).parameters)[: len(expected)] == (
                expected
            )
    assert issubclass(sdk.OpsCoreApiError, sdk.OpsCoreSDKError)
    assert issubclass(sdk.AuthenticationError, sdk.OpsCoreApiError)
    assert issubclass(sdk.NotFoundError, sdk.OpsCoreApiError)
    error = sdk.OpsCoreApiError(418, "short and stout")
    assert (error.status_code, error.detail, str(error)) == (418, *2 * ["short and stout"])


def test_empty_arguments_are_refused_and_nothing_is_sent(kind: str) -> None:
    with scripted(answering(500)) as server, open_sdk(kind, server.url) as client:
        for refused in (
            lambda: client.update_state("", "idle"),
            lambda: client.update_state("a", ""),
            lambda: client.get_state(""),
            lambda: client.trigger_workflow("", "w"),
            lambda: client.trigger_workflow("a", ""),
            lambda: client.runs.get(""),
            lambda: client.runs.submit("w", idempotency_key=""),
        ):
            with pytest.raises(ValueError):
                refused()
        assert server.requests == []
    for url, key in [("", "k"), ("http://h", "")]:
        with pytest.raises(ValueError):
            OpsCoreClientSync(url, key)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/opscore", "/v1/opscore/"])
@pytest.mark.parametrize("start", ["", "/behind/a/proxy"])
def test_the_base_url_may_end_in_many_ways(kind: str, start: str, end: str) -> None:
    said = answering(200, b'{"items": [], "nextCursor": null}')
    with scripted(said) as server, open_sdk(kind, server.url + start + end) as client:
        assert list(client.runs.list()) == []
        assert [request.path for request in server.requests] == [f"{start}/v1/opscore/runs"]


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "localhost", "ftp://h", "//h", "http://", "http://:8000"),
        *("http://h:port", "http://h?a=1", "http://h#a", "http://user:hunter2@h", "http://a b"),
    ],
)
def test_a_base_url_that_is_none_is_refused_at_once(url: str) -> None:
    for client in (OpsCoreClientAsync, OpsCoreClientSync):
        with pytest.raises(ValueError, match="base_url") as refused:
            client(url, "key")
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("given", [{"api_key": "a b"}, {"api_key": "a\n"}, {"api_key": "ä"}])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="api_key") as refused:
        OpsCoreClientSync("http://h", **given)
    assert given["api_key"] not in str(refused.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_in_which_nothing_can_be_done_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        OpsCoreClientSync("http://h", "key", timeout)


# --- Every operation ----------------------------------------------------------------------------


class Office:
    """The API in this process, nobody at work, and things to call each operation with."""

    def __init__(self, http: Client) -> None:
        self.app, self.database = http.app, http.database
        self.operations = {
            operation["operationId"]
            for path in http.get("/openapi.json").json["paths"].values()
            for operation in path.values()
            if "operationId" in operation
        }
        self._numbers = itertools.count()
        self._failed, self._asked = fail_runs(http), ask_for_approvals(http)
        self._open = open_attempts(http)
        with http.database.transaction() as tx:
            add_agent(tx, "writer", "write", capacity=2)
            remote = {"kind": "remote", "contact_endpoint": "https://a.example/"}
            add_agent(tx, "abroad", "fetch", capacity=40, **remote)
            tx.execute(WORKER)
        http.post("/agent/abroad/state", {"state": "idle"})
        http.post("/agents", {"agentId": "clerk", "model": "scripted:echo"})

    def name(self) -> str:
        return f"name-{next(self._numbers)}"

    def failed_run(self) -> str:
        return next(self._failed)[1]

    def memory(self) -> tuple[str, str]:
        """Have the writer remember something; return its id and its text."""
        text = self.name()
        with self.database.autocommit() as tx:
            return memories.add(tx, "writer", "notes", text), text

    def tried_task(self) -> str:
        return next(self._failed)[0]

    def asked_task(self) -> str:
        return next(self._asked)[0]

    def open_task(self) -> str:
        return next(self._open)[0]


@pytest.fixture(scope="module")
def office(servers: Servers) -> Iterator[Office]:
    with servers.new_database() as url:
        settings = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(settings) as http:
            yield Office(http)


def a_run(client: Any) -> str:
    run_id: str = client.runs.submit("report", {"topic": "queues"}).id
    return run_id


def a_paused_run(client: Any) -> str:
    run_id: str = client.runs.pause(a_run(client)).id
    return run_id


def a_schedule(client: Any, office: Office) -> str:
    wanted = {"name": office.name(), "workflowId": "report", "everySeconds": 60}
    name: str = client.schedules.create(wanted)["name"]
    return name


def a_workflow(client: Any, office: Office) -> str:
    name: str = client.workflows.create({**DEFINITION, "id": office.name()})["workflowId"]
    return name


def a_fired_schedule(client: Any, office: Office) -> str:
    name = a_schedule(client, office)
    client.schedules.trigger(name)
    return name


JOB = {"topic": "queues"}
CALLS: dict[str, Callable[[Any, Office], Any]] = {
    "workflows.create": lambda client, _: client.workflows.create(DEFINITION),
    "workflows.validate": lambda client, _: client.workflows.validate(DEFINITION),
    "workflows.list": lambda client, _: client.workflows.list(),
    "workflows.get": lambda client, _: client.workflows.get("report", 1),
    "workflows.archive": lambda client, office: client.workflows.archive(
        a_workflow(client, office)
    ),
    "workflows.restore": lambda client, office: client.workflows.restore(
        a_workflow(client, office)
    ),
    "workflows.versions": lambda client, _: client.workflows.versions("report"),
    "runs.submit": lambda client, _: client.runs.submit("report", JOB, labels={"team": "x"}),
    "runs.get": lambda client, office: client.runs.get(office.failed_run()),
    "runs.detail": lambda client, _: client.runs.detail(a_run(client)),
    "runs.watch": lambda client, _: client.runs.watch(a_run(client), 0),
    "runs.list": lambda client, _: client.runs.list(workflow_id="report"),
    "runs.tasks": lambda client, office: client.runs.tasks(office.failed_run()),
    "runs.events": lambda client, office: client.runs.events(office.failed_run()),
    "runs.history": lambda client, office: client.runs.history(office.failed_run()),
    "runs.cancel": lambda client, _: client.runs.cancel(a_run(client)),
    "runs.pause": lambda client, _: client.runs.pause(a_run(client)),
    "runs.resume": lambda client, _: client.runs.resume(a_paused_run(client)),
    "runs.retry": lambda client, office: client.runs.retry(office.failed_run(), {"a": {"b": 1}}),
    "runs.rerun": lambda client, _: client.runs.rerun(a_run(client)),
    "tasks.submit": lambda client, _: client.tasks.submit(JOB, agent_capability="write"),
    "tasks.list": lambda client, office: client.tasks.list(run_id=office.failed_run()),
    "tasks.get": lambda client, office: client.tasks.get(office.tried_task()),
    "tasks.attempt": lambda client, office: client.tasks.attempt(office.tried_task(), 1),
    "tasks.approve": lambda client, office: client.tasks.approve(office.asked_task(), "Good."),
    "tasks.reject": lambda client, office: client.tasks.reject(office.asked_task(), ""),
    "tasks.report_result": lambda client, office: client.tasks.report_result(
        office.open_task(), TOKEN, {"words": 120}
    ),
    "tasks.report_error": lambda client, office: client.tasks.report_error(
        office.open_task(), TOKEN, "It broke.", "broken"
    ),
    "tasks.heartbeat": lambda client, office: client.tasks.heartbeat(office.open_task(), TOKEN),
    "agents.list": lambda client, _: client.agents.list(capability="write"),
    "agents.get": lambda client, _: client.agents.get("abroad"),
    "agents.define": lambda client, _: client.agents.define(
        {"agentId": "clerk", "model": "scripted:echo"}
    ),
    "agents.versions": lambda client, _: client.agents.versions("clerk"),
    "agents.change": lambda client, _: client.agents.change("abroad", {"capacity": 50}),
    "agents.pause": lambda client, _: client.agents.pause("writer"),
    "agents.drain": lambda client, _: client.agents.drain("writer"),
    "agents.resume": lambda client, _: client.agents.resume("writer"),
    "agents.update_state": lambda client, _: client.agents.update_state("abroad", "idle"),
    "agents.get_state": lambda client, _: client.agents.get_state("abroad"),
    "agents.history": lambda client, _: client.agents.history("abroad"),
    "agents.memories": lambda client, office: client.agents.memories(
        "writer", query=office.memory()[1]
    ),
    "agents.forget_memory": lambda client, office: client.agents.forget_memory(
        "writer", office.memory()[0]
    ),
    "agents.forget_memories": lambda client, _: client.agents.forget_memories(
        "writer", namespace="notes"
    ),
    "schedules.create": lambda client, office: client.schedules.create(
        {"name": office.name(), "workflowId": "report", "cron": "*/90 * * * *"}
    ),
    "schedules.list": lambda client, _: client.schedules.list(),
    "schedules.get": lambda client, office: client.schedules.get(a_schedule(client, office)),
    "schedules.change": lambda client, office: client.schedules.change(
        a_schedule(client, office), {"overlap": "queue"}
    ),
    "schedules.delete": lambda client, office: client.schedules.delete(a_schedule(client, office)),
    "schedules.pause": lambda client, office: client.schedules.pause(a_schedule(client, office)),
    "schedules.resume": lambda client, office: client.schedules.resume(a_schedule(client, office)),
    "schedules.trigger": lambda client, office: client.schedules.trigger(
        a_schedule(client, office)
    ),
    "schedules.preview": lambda client, office: client.schedules.preview(
        a_schedule(client, office), 3
    ),
    "schedules.firings": lambda client, office: client.schedules.firings(
        a_fired_schedule(client, office)
    ),
    "schedules.events": lambda client, office: client.schedules.events(
        a_fired_schedule(client, office)
    ),
    "update_state": lambda client, _: client.update_state("abroad", "idle", {"queue": 0}),
    "get_state": lambda client, _: client.get_state("abroad"),
    "trigger_workflow": lambda client, _: client.trigger_workflow("writer", "report", JOB),
    "status": lambda client, _: client.status(),
    "health": lambda client, _: client.health(),
    "ready": lambda client, _: client.ready(),
}
"""Every method that stands for an operation, and a call of it that succeeds."""
NOT_FOR_CLIENTS = {"webhook_notify", "metrics_get_metrics"}
"""What agents behind HTTP call, with a signature instead of a key; and what Prometheus reads."""


def test_every_operation_is_reached_by_a_method_that_answers_what_its_types_say(
    office: Office, kind: str
) -> None:
    reached: set[str] = set()

    def watched(environ: dict[str, Any], start: Any) -> Any:
        endpoint, _ = office.app.url_map.bind_to_environ(environ).match()
        reached.add(endpoint.replace(".", "_"))
        return office.app(environ, start)

    with open_sdk(kind, app=watched) as client:
        for name, call in CALLS.items():
            answer, shapes = first_of(call(client, office), declared(name))
            assert any(has_shape(answer, shape) for shape in shapes), (name, answer)
    assert reached == office.operations - NOT_FOR_CLIENTS, "give the SDK a method, and CALLS a line"


def test_every_method_is_held_against_the_api() -> None:
    methods = {
        f"{resource}.{name}"
        for resource in RESOURCES
        for name in surface(getattr(sync_client, resource.title()))
    }
    general = {"__init__", "close", "send", "attempt", "pages", "stream"}
    assert methods | set(surface(OpsCoreClientSync)) - general == set(CALLS)


def declared(name: str) -> Any:
    """Return what a method is said to return."""
    *resource, name = name.split(".")
    of = getattr(sync_client, resource[0].title()) if resource else OpsCoreClientSync
    return typing.get_type_hints(getattr(of, name))["return"]


def first_of(value: Any, declared: Any) -> tuple[Any, Sequence[Any]]:
    """Return an answer, or the first of many, and the types that it may have."""
    if declared in (sync_client.Run, sync_client.Task):
        return value.data, typing.get_args(typing.get_type_hints(declared.__init__)["data"])
    if typing.get_origin(declared) in (Iterator, Generator, Sequence):
        return first_of(next(iter(value)), typing.get_args(declared)[0])
    if typing.get_origin(declared) is tuple:
        return first_of(value[0], typing.get_args(declared)[0])
    return value, [declared]


def has_shape(answer: Any, shape: Any) -> bool:
    """Tell whether an answer has the members that a type names, and no others."""
    if not typing.is_typeddict(shape):
        return isinstance(answer, shape)
    return bool(shape.__required_keys__ <= set(answer) <= set(shape.__annotations__))


# --- Runs that end ------------------------------------------------------------------------------

ASKS = {
    "id": "asks",
    "tasks": [
        {"taskId": "review", "type": "approval"},
        {"taskId": "say", "agentId": "value", "parameters": {"value": "${tasks.review.output}"}},
    ],
}
LONG = {"id": "long", "tasks": [{"taskId": "pause", "type": "delay", "seconds": 3600}]}
FAILS = {
    "id": "fails",
    "tasks": [
        {
            "taskId": "try",
            "agentId": "fails-when-told",
            "parameters": "${input}",
            "retry": {"maxAttempts": 1},
        }
    ],
}


def started(client: Any, document: dict[str, Any], input: Any = None, **more: Any) -> Any:
    client.workflows.create(document)
    return client.runs.submit(document["id"], input, **more)


def asked(client: Any, run_id: str) -> str:
    """Return the task that waits for an approval, once one does."""
    task = wait_until(
        lambda: next((t for t in client.runs.tasks(run_id) if t["reason"] == "approval"), None)
    )
    return str(task["taskId"])


def test_a_run_is_submitted_and_waited_for(client: Any) -> None:
    run = started(client, ECHO, {"word": "ä"}, labels={"of": "sdk"}, priority="high")
    assert (run.workflow_id, run.id in repr(run), "echo" in repr(run)) == ("echo", True, True)
    assert run.wait(timeout=60).status == run.status == "completed"
    assert (run.is_over, run.output, run.error, run.reason) == (True, {"word": "ä"}, None, None)
    assert run.raise_for_status().wait().refresh().id == run.id
    assert (run.data["labels"], run.data["priority"]) == ({"of": "sdk"}, "high")
    assert [task["taskDefinitionId"] for task in run.tasks()] == ["say"]
    assert run.id in {found["runId"] for found in client.runs.list(labels={"of": "sdk"})}


def test_the_same_key_gives_the_same_run(client: Any) -> None:
    client.workflows.create(ECHO)
    key = str(uuid4())
    first, again = (client.runs.submit("echo", {"n": 1}, idempotency_key=key) for _ in range(2))
    assert first.id == again.id
    assert client.runs.submit("echo", {"n": 1}).id != first.id
    with pytest.raises(sdk.ConflictError) as refused:
        client.runs.submit("echo", {"n": 2}, idempotency_key=key)
    assert refused.value.code == "idempotency_key_reused"


def test_a_wait_that_is_too_long_says_so_and_the_run_goes_on(client: Any) -> None:
    run = started(client, ASKS)
    asked(client, run.id)
    began = time.monotonic()
    with pytest.raises(sdk.WaitTimeout, match=r"is running after 0\.3 s") as waited:
        run.wait(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert isinstance(waited.value, TimeoutError) and isinstance(waited.value, sdk.OpsCoreSDKError)
    assert (run.status, run.is_over) == ("running", False)
    client.tasks.approve(asked(client, run.id))
    assert run.wait(60).status == "completed"


def test_a_wait_of_no_time_is_a_look(client: Any) -> None:
    run = started(client, LONG)
    with pytest.raises(sdk.WaitTimeout):
        run.wait(0)
    client.runs.cancel(run.id).wait(60)
    assert not run.is_over and run.wait(0).status == "cancelled"


def test_a_run_that_failed_raises_if_asked_and_can_be_tried_again(client: Any) -> None:
    run = started(client, FAILS, {"fails": True, "value": 7}).wait(60)
    assert (run.status, run.error["code"], run.output) == ("failed", "agent_error", None)
    with pytest.raises(sdk.RunFailed, match="it was told to") as failed:
        run.raise_for_status()
    assert (failed.value.run_id, failed.value.status) == (run.id, "failed")
    assert failed.value.error == run.error
    assert run.retry({"try": {"fails": False}}).status != "failed"
    assert run.wait(60).raise_for_status().output == 7
    other = run.rerun()
    assert other.id != run.id and other.wait(60).status == "failed"


def test_a_run_is_cancelled_and_once_more_changes_nothing(client: Any) -> None:
    run = started(client, LONG)
    assert run.cancel().id == run.id
    assert run.wait(60).status == "cancelled"
    assert run.cancel().status == "cancelled"
    with pytest.raises(sdk.RunFailed, match="was cancelled"):
        run.raise_for_status()
    done = started(client, ECHO).wait(60)
    with pytest.raises(sdk.ConflictError, match="completed") as refused:
        done.cancel()
    assert refused.value.code == "run_finished" and done.status == "completed"


def test_a_run_is_paused_and_resumed(client: Any) -> None:
    run = started(client, ASKS)
    assert (run.is_over, run.output, run.error) == (False, None, None)
    assert run.raise_for_status().id == run.id
    assert run.pause().status == "paused" and run.pause().status == "paused"
    assert run.resume().status in ("queued", "running")
    with pytest.raises(sdk.ConflictError):
        run.resume()
    assert client.tasks.approve(asked(client, run.id), "Looks good.")["runId"] == run.id
    output = run.wait(60).output
    assert (output["approved"], output["comment"]) == (True, "Looks good.")


def test_a_rejection_fails_the_run(client: Any) -> None:
    run = started(client, ASKS)
    client.tasks.reject(asked(client, run.id), "Not today.")
    with pytest.raises(sdk.RunFailed, match=r"Not today\. \(rejected\)"):
        run.wait(60).raise_for_status()


def test_a_task_for_an_agent_is_submitted_and_waited_for(client: Any) -> None:
    task = client.tasks.submit({"word": "hello"}, agent_id="async-echo", timeout_seconds=30)
    assert task.id in repr(task) and task.run_id == task.data["runId"]
    assert task.wait(60).output == {"word": "hello"}
    assert (task.status, task.is_over, task.error) == ("completed", True, None)
    assert task.raise_for_status().refresh().data["logs"][0]["message"] == "echoing"
    assert client.tasks.attempt(task.id, 1)["progressMessage"] == "half way"
    failed = client.tasks.submit({}, agent_id="gives-up").wait(60)
    with pytest.raises(sdk.RunFailed, match="nothing to be done") as error:
        failed.raise_for_status()
    assert error.value.run_id == failed.run_id


def test_events_are_followed_while_they_happen_until_the_run_is_over(client: Any) -> None:
    run = started(client, ASKS)
    if "http://opscore" not in str(client._root):  # in this process an answer comes as a whole
        asks = next(event for event in run.events() if event["reason"] == "approval")
        client.tasks.approve(asks["taskId"])
    else:
        client.tasks.approve(asked(client, run.id))
    said = list(run.events())
    assert [said[0]["type"], said[-1]["type"]] == ["run.queued", "run.completed"]
    seqs = [event["seq"] for event in said]
    assert seqs == sorted(set(seqs))
    assert list(client.runs.events(run.id, after=seqs[1])) == said[2:]
    assert list(run.events(after=seqs[-1])) == []
    assert run.refresh().status == "completed"


def test_lists_are_walked_page_by_page(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (async_client, sync_client):
        monkeypatch.setattr(module, "PAGE_SIZE", 2)
    batch = uuid4().hex
    runs = [started(client, LONG, labels={"batch": batch}) for _ in range(5)]
    found = [run["runId"] for run in client.runs.list(labels={"batch": batch})]
    assert found == [run.id for run in reversed(runs)]
    for run in runs[:2]:
        run.cancel().wait(60)
    status = ["queued", "running"]
    found = [run["runId"] for run in client.runs.list(labels={"batch": batch}, status=status)]
    assert found == [run.id for run in runs[:1:-1]]
    tasks = [{"taskId": f"t{n}", "agentId": "echo"} for n in range(5)]
    wide = started(client, {"id": "wide", "tasks": tasks})
    assert [task["taskDefinitionId"] for task in wide.tasks()] == [f"t{n}" for n in range(5)]
    only = client.runs.tasks(wide.id, task_definition_id="t3")
    assert [task["taskDefinitionId"] for task in only] == ["t3"]
    hour = timedelta(hours=1)
    now = datetime.now(UTC)
    assert list(client.runs.list(created_before=now - hour, labels={"batch": batch})) == []
    assert len(list(client.runs.list(created_after=now - hour, labels={"batch": batch}))) == 5


def test_a_page_is_fetched_when_it_is_needed(kind: str) -> None:
    first = answering(200, b'{"items": [{"runId": "a"}, {"runId": "b"}], "nextCursor": "next"}')
    last = answering(200, b'{"items": [{"runId": "c"}], "nextCursor": null}')
    with scripted(first, last) as server, open_sdk(kind, server.url) as client:
        runs = iter(client.runs.list(status=["failed", "cancelled"], labels={"a": "b:c"}))
        assert [next(runs)["runId"] for _ in range(2)] == ["a", "b"]
        assert len(server.requests) == 1
        assert [run["runId"] for run in runs] == ["c"]
        query = "status=failed&status=cancelled&label=a%3Ab%3Ac&limit=200"
        assert [urlsplit(request.target).query for request in server.requests] == [
            query,
            f"{query}&cursor=next",
        ]


def test_a_workflow_is_given_as_document_text_or_file(client: Any, tmp_path: Path) -> None:
    text = 'id: given\nname: "ä"\ntasks:\n  - {taskId: a, agentId: echo}\n'
    (tmp_path / "given.yaml").write_text(text, encoding="utf-8")
    document = {"id": "given", "name": "ä", "tasks": [{"taskId": "a", "agentId": "echo"}]}
    (tmp_path / "given.json").write_text(json.dumps(document))
    made = client.workflows.create(document)
    assert made["name"] == "ä"
    for same in (text, json.dumps(document), tmp_path / "given.yaml", tmp_path / "given.json"):
        assert client.workflows.create(same) == made
        assert client.workflows.validate(same)["isNew"] is False
    frozen = MappingProxyType({**document, "tasks": [MappingProxyType(document["tasks"][0])]})
    assert client.workflows.create(frozen) == made
    with pytest.raises(sdk.ValidationError) as refused:
        client.workflows.validate({**document, "colour": 1, "tasks": []})
    assert set(refused.value.errors) == {"/colour", "/tasks"}


def test_the_client_is_used_as_async_code_uses_it(site: Site) -> None:
    async def use() -> list[Any]:
        async with OpsCoreClientAsync(site.url, API_KEY) as client:
            await client.workflows.create(ECHO)
            runs = [await client.runs.submit("echo", {"n": n}) for n in range(5)]
            ended = await asyncio.gather(*(run.wait(60) for run in runs))
            async with aclosing(ended[0].events()) as events:
                kinds = [event["type"] async for event in events]
            assert kinds[-1] == "run.completed"
            return [run.output["n"] for run in ended]

    assert asyncio.run(use()) == [0, 1, 2, 3, 4]


# --- What errors mean ---------------------------------------------------------------------------


def test_what_the_api_refuses_is_raised_by_its_kind(client: Any, site: Site) -> None:
    with pytest.raises(sdk.NotFoundError) as refused:
        client.runs.get(str(uuid4()))
    error = refused.value
    assert (error.status_code, error.code, error.retry_after) == (404, "run_not_found", None)
    assert error.request_id and error.detail in str(error)
    with pytest.raises(sdk.NotFoundError):
        next(iter(client.runs.events(str(uuid4()))))
    with pytest.raises(sdk.ValidationError) as refused:
        client.workflows.create({"id": "x", "tasks": [{"taskId": "a", "colour": 1}]})
    place, sentences = next(iter(refused.value.errors.items()))
    assert place == "/tasks/0/colour"
    assert f"\n  {place}: {sentences[0]}" in str(refused.value)
    with pytest.raises(sdk.ValidationError) as refused:
        client.workflows.create("tasks: [")
    assert refused.value.status_code == 400
    client.workflows.create(ECHO)
    # Over a socket the API may break off before it has read it all.
    with pytest.raises((sdk.ValidationError, sdk.ConnectionError), match=r"5,000,0\d\d bytes"):
        client.runs.submit("echo", "x" * 5_000_000)
    with pytest.raises(sdk.ConflictError):
        client.tasks.approve(next(started(client, LONG).tasks())["taskId"])


def test_a_wrong_key_is_named_as_that(kind: str, site: Site) -> None:
    with open_sdk(kind, site.url, "wrong") as client:
        for refused in (
            lambda: client.runs.get(str(uuid4())),
            lambda: list(client.workflows.list()),
            lambda: list(client.runs.events(str(uuid4()))),
        ):
            with pytest.raises(sdk.AuthenticationError, match="key is wrong"):
                refused()
        assert client.health() == {"status": "ok"}


def problem(status: int, **more: Any) -> bytes:
    said = {"type": "about:blank", "title": "T", "status": status, "detail": "D", "code": "c"}
    return json.dumps({**said, "requestId": "r-1", **more}).encode()


@pytest.mark.parametrize(
    ("status", "kind_of_error"),
    [
        *((400, sdk.ValidationError), (401, sdk.AuthenticationError)),
        *((403, sdk.AuthenticationError), (404, sdk.NotFoundError), (409, sdk.ConflictError)),
        *((413, sdk.ValidationError), (414, sdk.ValidationError), (415, sdk.ValidationError)),
        *((422, sdk.ValidationError), (429, sdk.RateLimitError), (431, sdk.ValidationError)),
        *((418, sdk.OpsCoreApiError), (405, sdk.OpsCoreApiError), (500, sdk.ServerError)),
        *((502, sdk.ServerError), (503, sdk.ServerError), (504, sdk.ServerError)),
    ],
)
def test_each_status_has_its_error(kind: str, status: int, kind_of_error: type[Any]) -> None:
    body = problem(status, errors={"/a": ["b", "c"]})
    said = answering(status, body, Retry_After="7", Content_Type="application/problem+json")
    with scripted(said) as server, open_sdk(kind, server.url, retries=0) as client:
        with pytest.raises(sdk.OpsCoreApiError) as refused:
            client.workflows.get("w")
        error = refused.value
        assert type(error) is kind_of_error
        assert (error.status_code, error.code, error.detail) == (status, "c", "D")
        assert (error.errors, error.request_id) == ({"/a": ["b", "c"]}, "r-1")
        assert error.retry_after == 7.0
        assert str(error) == "D\n  /a: b\n  /a: c"
        assert len(server.requests) == 1


HTML = b"<html><body><h1>502 Bad  Gateway</h1>\n<hr>nginx</body></html>"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (502, HTML, "502, and no problem that opscore would answer: <html><body><h1>502 Bad Gat"),
        (503, b"", "503, and no problem that opscore would answer: no body"),
        (404, b'{"detail": "Not Found"}', '{"detail": "Not Found"}'),
        (400, b'{"detail": "no", "code": "c", "errors": ["a"]}', '"errors": ["a"]'),
        (400, b'{"detail": "no", "code": "c", "errors": {"a": 1}}', '"errors": {"a": 1}'),
        (400, b'{"detail": ["no"], "code": 7}', '"code": 7'),
        (400, b"[1, 2]", "[1, 2]"),
        (400, b"null", "null"),
        (500, b"\xff\xfe\x00", "500, and no problem"),
        (500, b"[" * 100_000, "[[[[["),
        (500, b"x" * 100_000, "xxxxx"),
    ],
)
def test_errors_that_are_not_of_opscore_are_told_as_they_came(
    kind: str, status: int, body: bytes, told: str
) -> None:
    said = answering(status, body, X_Request_ID="r-2")
    with scripted(said) as server, open_sdk(kind, server.url, retries=0) as client:
        with pytest.raises(sdk.OpsCoreApiError) as refused:
            client.workflows.get("w")
        error = refused.value
        assert told in str(error) and len(str(error)) < 300
        assert (error.status_code, error.code, error.errors) == (status, None, {})
        assert (error.request_id, error.retry_after) == ("r-2", None)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed_but_told(kind: str, status: int) -> None:
    said = answering(status, Location="https://elsewhere/v1/opscore/runs")
    with scripted(said) as server, open_sdk(kind, server.url) as client:
        with pytest.raises(sdk.OpsCoreApiError, match="redirects to https://elsewhere/"):
            client.runs.submit("w")
        with pytest.raises(sdk.OpsCoreApiError, match="redirects"):
            list(client.runs.events("r"))
        assert len(server.requests) == 2


@pytest.mark.parametrize("body", [b"", HTML, b"null", b"[]", b'"ok"', b"{", b"\xff"])
def test_a_success_that_is_none_of_opscore_says_to_check_the_address(
    kind: str, body: bytes
) -> None:
    with scripted(answering(200, body)) as server, open_sdk(kind, server.url) as client:
        for call in (
            lambda: client.workflows.get("w"),
            lambda: client.runs.submit("w"),
            lambda: list(client.runs.list()),
            lambda: client.health(),
            lambda: client.ready(),
            lambda: list(client.runs.events("r")),
        ):
            with pytest.raises(sdk.OpsCoreSDKError, match=r"is not opscore\. Check base_url") as it:
                call()
            assert server.url in str(it.value)
        assert len(server.requests) == 6


def test_what_is_not_ready_is_told_and_no_error(kind: str) -> None:
    body = b'{"status": "unready", "database": "ok", "broker": "down", "workers": "none"}'
    is_so = answering(503, body, Content_Type="application/json")
    is_away = answering(503, HTML, Content_Type="text/html")
    with scripted(is_so, is_away) as server, open_sdk(kind, server.url) as client:
        assert client.ready() == json.loads(body)
        with pytest.raises(sdk.ServerError):
            client.ready()
        assert len(server.requests) == 2
