"""Requests nobody thought of: schemathesis over the whole description, on real data.

It makes them from `/openapi.json` alone, good ones and bad ones, and holds every answer against it.
`make test` sends some thousands, always the same; `make fuzz` goes on for as long as it is told to.
What an operation needs to be there is put there by `fill`, by the names of the parameters.
"""

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any
from uuid import UUID

import pytest
from http_client import Client, open_client
from rows import (
    FAULT,
    WORKER,
    add_agent,
    add_attempt,
    add_event,
    add_items,
    add_log,
    add_run,
    add_task,
)
from schemathesis import Config, openapi
from schemathesis.engine import events, from_schema
from schemathesis.engine.statistic import Statistic
from schemathesis.transport.wsgi import WSGI_TRANSPORT
from sqlalchemy import text
from stack import API_KEY, Servers, new_redis_url, stack_environment
from test_engine import Desk, task

from opscore import canvas, engine, logs, memories
from opscore.config import IO_QUEUE, Settings
from opscore.remote import AGENT_PREFIX, sign
from opscore.states import Reason, RunStatus, TaskStatus
from web.api.tasks import TOKEN
from web.api.workflows import DEFINITION
from web.bodies import YAML

SECRET = "the-secret-of-the-webhook"
TO_BE_SIGNED = "sign"
FEW = 20
"""How many random requests an operation gets in `make test`, beside those that follow from it."""
EACH = 40
"""How many runs and open tasks there are, for requests use them up."""
KNOWN = 0.8
"""How many of the ids in requests are of something that is there."""
SHELVED = "shelved"
"""The workflow that may be archived: with the other one nothing could be started any more."""
DIARIST = "diarist"
"""The agent whose memories are forgotten one by one: another's are forgotten all at once."""
JUDGED = ["2xx", "400", "401", "404", "409", "422"]
"""What may become of a body or a cursor that fits its schema. No schema tells what an expression
means, which URLs are allowed, what a function agent has, or of which list a cursor is (422); nor
that an id is that of the path, or that YAML's 1e3 is a number (400). And what a schedule says may
not fit its workflow any more (422)."""


# --- What is there ------------------------------------------------------------------------------


def fill(client: Client) -> dict[str, list[Any]]:
    """Write some of everything; return ids by the name of the parameter that takes them.

    Behind the name of an operation those that it can do something with.
    """
    for name in ("report", SHELVED):
        client.post("/workflows", {**DEFINITION, "id": name})
    runs, tasks = _rows(client)
    for state in ("error", "active", "idle"):
        client.post("/agent/abroad/state", {"state": state, "details": {"queue": 1}})
    asked, failed = [], list(fail_runs(client))
    for task_id, run_id in itertools.chain(failed, open_attempts(client)):
        tasks.append(task_id)
        runs.append(run_id)
    for task_id, _ in ask_for_approvals(client):
        tasks.insert(0, task_id)
        asked.append(task_id)
    agents = ["writer", "abroad"]
    for _ in range(EACH):
        runs.append(client.post("/runs", {"workflowId": "report"}).json["runId"])
    return {
        "runId": runs[::-1],
        "runs_retry runId": [run_id for _, run_id in failed],
        "taskId": tasks[::-1],
        "tasks_approve taskId": asked,
        "tasks_reject taskId": asked[::-1],
        "agentId": agents,
        "memoryId": _memories(client),
        "agents_forget_memory agentId": [DIARIST],
        "agents_get_versions agentId": [_defined(client)],
        "model": [MODEL],
        "workflowId": ["report"],
        "workflows_archive workflowId": [SHELVED],
        "number": [1],
        "name": _schedules(client),
    }


def _rows(client: Client) -> tuple[list[str], list[str]]:
    """Write what only time would make: runs and tasks in every status, and a keeper."""
    runs, tasks = [], []
    with client.database.transaction() as tx:
        add_agent(tx, "writer", "write", capacity=3)
        add_agent(
            tx,
            "abroad",
            "fetch",
            capacity=EACH,
            kind="remote",
            contact_endpoint="https://a.example/",
        )
        tx.execute(WORKER)
        tx.execute(text("INSERT INTO leases VALUES ('keeper', 'w', now() + interval '1 day')"))
        for status in RunStatus:
            runs.append(add_run(tx, status, labels={"team": "support"}))
            for number, kind in enumerate(TaskStatus):
                reason = "retry" if kind is TaskStatus.WAITING else None
                tasks.append(add_task(tx, runs[-1], kind, kind, position=number, reason=reason))
                add_attempt(tx, tasks[-1], 1, "failed", error=FAULT, agent_id="writer")
                add_log(tx, tasks[-1], 1, 1, "tried", times=3)
                add_event(tx, runs[-1], f"task.{kind}", tasks[-1], attempt=1)
            add_items(tx, runs[-1], tasks[-1], ["completed", "pending"])
    return [str(run) for run in runs], [str(task) for task in tasks]


MODEL = "scripted:echo"


def _defined(client: Client) -> str:
    """Define an LLM agent."""
    answer = client.post("/agents", {"agentId": "defined", "model": MODEL})
    assert answer.status_code == 201, answer.json
    return "defined"


def _schedules(client: Client) -> list[str]:
    """Write schedules, each of which fired; there are many, for requests delete them."""
    names = [f"every-{number}" for number in range(2 * EACH)]
    for name in names:
        wanted = {"name": name, "workflowId": "report", "everySeconds": 60, "overlap": "allow"}
        assert client.post("/schedules", wanted).status_code == 201
        assert client.post(f"/schedules/{name}/trigger").status_code == 202
    return names


def _memories(client: Client) -> list[str]:
    """Have an agent remember things."""
    with client.database.transaction() as tx:
        add_agent(tx, DIARIST, kind="llm")
        return [memories.add(tx, DIARIST, "notes", f"note {n}") for n in range(EACH)]


def open_attempts(client: Client) -> Iterator[tuple[str, str]]:
    """Give an agent tasks whose token is that of the description's example."""
    desk = Desk(client.database)
    celery = client.app.extensions["opscore"].dispatcher.app
    for _ in range(EACH):
        desk.submit(task("a", "abroad"), task("b"))
        claimed = desk.claim("a", token=UUID(TOKEN), lease_seconds=3600)
        visit = canvas.visit(celery, claimed.task_id, 1, timeout_seconds=60, queue=IO_QUEUE)
        with desk.tx() as tx:
            engine.await_report(tx, claimed, message=dict(visit))
        yield str(claimed.task_id), str(claimed.run_id)


def ask_for_approvals(client: Client) -> Iterator[tuple[str, str]]:
    """Ask for approvals, as a worker does."""
    desk = Desk(client.database)
    celery = client.app.extensions["opscore"].dispatcher.app
    for _ in range(EACH):
        desk.submit({"taskId": "ok", "type": "approval"})
        claimed = desk.claim("ok")
        visit = canvas.visit(celery, claimed.task_id, 1, timeout_seconds=60)
        with desk.database.autocommit() as tx:
            engine.begin_wait(tx, claimed, engine.Wait(Reason.APPROVAL), dict(visit))
        yield str(claimed.task_id), str(claimed.run_id)


def fail_runs(client: Client) -> Iterator[tuple[str, str]]:
    """Have runs fail, as a worker does."""
    desk = Desk(client.database)
    for _ in range(EACH):
        desk.submit(task("a"), task("b"))
        claimed = desk.claim("a")
        desk.fail(claimed, retryable=False)
        with desk.tx() as tx:
            engine.settle_run(tx, claimed.run_id)
        yield str(claimed.task_id), str(claimed.run_id)


# --- How it is asked ----------------------------------------------------------------------------


class Signed:
    """The application behind a client that signs what is to be signed, as it goes out."""

    def __init__(self, client: Client) -> None:
        self.app = client.app

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        signature, timestamp = (
            f"HTTP_{AGENT_PREFIX}_{name}".replace("-", "_").upper()
            for name in ("Signature", "Timestamp")
        )
        if environ.get(timestamp) == TO_BE_SIGNED:
            environ[timestamp] = str(int(time.time()))
        if environ.get(signature) == TO_BE_SIGNED:
            body = environ["wsgi.input"].read()
            environ["wsgi.input"] = BytesIO(body)
            environ[signature] = sign(SECRET, environ.get(timestamp, ""), body)
        return self.app(environ, start)


def description(client: Client, ids: Mapping[str, list[Any]], *, is_whole: bool) -> dict[str, Any]:
    """Return the description, with an id that is there as the example of everything in a path.

    Unless it is the whole one, YAML has a single name, for every other doubles what is sent.
    """
    document: dict[str, Any] = client.get("/openapi.json").json
    left = {name: itertools.cycle(values) for name, values in ids.items()}
    for path in document["paths"].values():
        shared = path.pop("parameters", [])
        for operation in path.values():
            for name in () if is_whole else YAML[1:]:
                operation.get("requestBody", {}).get("content", {}).pop(name, None)
            # Each operation has examples of its own, for some use theirs up.
            operation["parameters"] = [
                _with_example(parameter, operation["operationId"], left)
                for parameter in shared + operation.get("parameters", [])
            ]
    return document


def _with_example(
    parameter: dict[str, Any], operation: str, left: Mapping[str, Iterator[Any]]
) -> dict[str, Any]:
    name = parameter["name"]
    known = left.get(f"{operation} {name}") or left.get(name)
    if parameter["in"] != "path" or known is None:
        return parameter
    return {**parameter, "example": next(known)}


OF_THEIR_OWN = {"agents_define", "runs_retry"}
"""Operations that are told more than the others."""


def judging(document: dict[str, Any]) -> list[str]:
    """Return the operations that judge more than the form of what they are sent."""
    return [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
        if "requestBody" in operation
        or {"cursor", "Idempotency-Key"} & {given["name"] for given in operation["parameters"]}
    ]


def shadowed(document: dict[str, Any]) -> list[str]:
    """Return the paths that one with a name in it takes as well, and so its methods, too."""
    named = [re.sub(r"{\w+}", "[^/]+", path) for path in document["paths"] if "{" in path]
    return [path for path in document["paths"] if any(re.fullmatch(shape, path) for shape in named)]


def configuration(
    document: dict[str, Any], ids: Mapping[str, list[Any]], *, examples: int, seed: int
) -> Config:
    """Return what schemathesis is told, in the words of its own file."""
    known = {name: {"dictionary": name, "probability": KNOWN} for name in ids}
    judged = {"positive_data_acceptance": {"expected-statuses": JUDGED}}
    return Config.from_dict(
        {
            "seed": seed,
            "cache": {"enabled": False},
            "suppress-health-check": ["all"],
            "continue-on-failure": True,
            # Where events are streamed to who asks for that, they are listed to who asks for this.
            "headers": {"Accept": "application/json"},
            "auth": {
                "openapi": {
                    "key": {"bearer": API_KEY},
                    "signature": {"api_key": TO_BE_SIGNED},
                    "timestamp": {"api_key": TO_BE_SIGNED},
                }
            },
            "dictionaries": {name: {"values": values} for name, values in ids.items()},
            "parameters": {
                **{f"path.{name}": values for name, values in known.items()},
                "body.workflowId": known["workflowId"],
                "body.workflowDefinitionId": known["workflowId"],
            },
            "generation": {"max-examples": examples, "database": "none"},
            "phases": {"stateful": {"generation": {"max-examples": max(1, examples // 4)}}},
            # With literals of our source, the same seed would send other requests tomorrow.
            "analysis": {"constants": {"enabled": False}},
            "operations": [
                {
                    # Of all runs few have failed, and each of those is tried again once.
                    "include-operation-id": ["runs_retry"],
                    "checks": judged,
                    "parameters": {"path.runId": known["runs_retry runId"]},
                },
                {
                    "include-operation-id": sorted(
                        {*judging(document)} - {"agents_define", "runs_retry"}
                    ),
                    "checks": judged,
                },
                {
                    "include-operation-id": ["workflows_archive"],
                    "parameters": {"path.workflowId": known["workflows_archive workflowId"]},
                },
                {
                    "include-operation-id": ["agents_forget_memory"],
                    "parameters": {"path.agentId": known["agents_forget_memory agentId"]},
                },
                {
                    "include-operation-id": ["agents_get_versions"],
                    "parameters": {"path.agentId": known["agents_get_versions agentId"]},
                },
                {
                    "include-operation-id": ["agents_define"],
                    "checks": judged,
                    "parameters": {"body.model": known["model"]},
                },
                {
                    "include-path": shadowed(document),
                    "checks": {"allow_header_conformance": {"enabled": False}},
                },
            ],
        }
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the line of every request out of the log."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    logs.configure("ERROR", "text")
    yield
    logs.configure("INFO", "text")
    root.handlers, _ = before, root.setLevel(level)


@contextmanager
def checks_that_ask_again() -> Iterator[None]:
    """Let checks send requests of their own.

    schemathesis 4.32 hands them options that only a socket knows, and fails in this process.
    """
    send = WSGI_TRANSPORT.send

    def in_process(case: Any, *, session: Any = None, **options: Any) -> Any:
        for name in ("max_redirects", "verify", "cert"):
            options.pop(name, None)
        return send(case, session=session, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGI_TRANSPORT, "send", in_process)
        yield


# --- What came of it ----------------------------------------------------------------------------


@dataclass
class Report:
    """What was sent, and what was wrong with the answers."""

    config: Config
    operations: set[str]
    statistic: Statistic = field(default_factory=Statistic)
    cases: Counter[str] = field(default_factory=Counter)
    succeeded: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0

    def note(self, event: Any) -> None:
        match event:
            case events.ScenarioFinished():
                self.statistic.on_scenario_finished(event.recorder)
                self.cases[event.phase.value] += len(event.recorder.cases)
                self.succeeded |= set(succeeded(event.recorder))
            case events.NonFatalError():
                self.errors.append(f"{event.label}: {event.value!r}")
            case events.FatalError():
                self.errors.append(repr(event.exception))
            case events.EngineFinished():
                self.seconds = event.running_time

    @property
    def summary(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in self.cases.items())
        return (
            f"{len(self.statistic.tested_operations)} of {len(self.operations)} operations,"
            f" {self.statistic.total_cases} test cases ({phases}),"
            f" {self.statistic.total_failures} failures, {len(self.errors)} errors"
            f" in {self.seconds:.0f} s; seed {self.config.seed}"
        )

    @property
    def faults(self) -> list[str]:
        how = {"index": None, "config": self.config.output}
        found = [
            f"{label}\n{group.format(curl=group.code_sample, **how)}"
            for label, groups in self.statistic.failures.items()
            for group in groups.values()
        ]
        return found + self.errors


def succeeded(recorder: Any) -> Iterator[str]:
    for case_id, interaction in recorder.interactions.items():
        case, response = recorder.cases[case_id].value, interaction.response
        is_its_own = case.method.upper() == case.operation.method.upper()
        if is_its_own and response is not None and 200 <= response.status_code < 300:
            yield case.operation.label


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    with servers.new_database() as url:
        settings = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(replace(settings, webhook_secret=SECRET)) as client:
            # As in a process that is told to stop: who waits for a run is answered at once.
            client.app.extensions["opscore"].polls.stop()
            yield client


@pytest.fixture(scope="module")
def report(client: Client, request: pytest.FixtureRequest) -> Report:
    """Send them all."""
    examples, seed = (request.config.getoption(name) for name in ("--examples", "--seed"))
    is_long, examples = examples is not None, examples or FEW
    with quiet(), checks_that_ask_again():
        ids = fill(client)
        document = description(client, ids, is_whole=is_long)
        config = configuration(document, ids, examples=examples, seed=seed)
        schema = openapi.from_dict(document, config=config)
        schema.app = Signed(client)
        report = Report(config, {found.ok().label for found in schema.get_all_operations()})
        for event in from_schema(schema).execute():
            report.note(event)
    print(f"\n{report.summary}")
    return report


def test_no_request_is_answered_otherwise_than_described(report: Report) -> None:
    if report.faults:
        pytest.fail("\n\n".join([report.summary, *report.faults]), pytrace=False)


def test_every_operation_is_reached_and_succeeds(report: Report) -> None:
    assert report.statistic.tested_operations == report.operations
    assert report.operations - report.succeeded == set(), "put what these need into `fill`"
