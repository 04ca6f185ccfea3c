"""One trace, and one request id, from the client's request to the agents; and what a collector that
is away does to nobody.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from stack import API_KEY, ROOT, Servers, Stack, running_stack, wait_until
from test_fleet import SECRET
from test_schedules import Clock
from test_web_process import serving

from opscore import Context, tracing
from opscore.db import Database
from opscore.sdk.agent_server import AgentServer

KINDS = {
    number: name.removeprefix("SPAN_KIND_").lower() for name, number in SentSpan.SpanKind.items()
}


class Sent(NamedTuple):
    """A span as a collector gets it."""

    name: str
    kind: str
    service: str
    trace: str
    id: str
    parent: str
    about: dict[str, Any]
    is_error: bool


class Collector:
    """Takes spans by OTLP over HTTP, or takes them and says nothing."""

    def __init__(self, *, is_silent: bool = False) -> None:
        self.spans: list[Sent] = []
        self.ended = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if is_silent:
                    collector.ended.wait(60)
                    return
                collector.spans += spans_of(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def open(self) -> Iterator["Collector"]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def trace(self, id: str, *names: str) -> list[Sent]:
        """Return the spans of a trace as soon as all of these are there."""

        def found() -> list[Sent]:
            return [span for span in list(self.spans) if span.trace == id]

        return wait_until(found, says=lambda spans: set(names) <= {span.name for span in spans})


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Sent]:
    for resource in request.resource_spans:
        service = plain(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                is_error = span.status.code == span.status.STATUS_CODE_ERROR
                assert not span.status.message and not span.events
                about = plain(span.attributes)
                yield Sent(span.name, KINDS[span.kind], service, *ids, about, is_error)


def plain(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def one(spans: list[Sent], name: str) -> Sent:
    (found,) = [span for span in spans if span.name == name]
    return found


class Site:
    """Web and workers on servers of their own, an agent behind HTTP, and who gets the spans."""

    def __init__(self, stack: Stack, api: httpx2.Client, collector: Collector, log: Path) -> None:
        self.stack, self.api, self.collector, self.log = stack, api, collector, log
        self.calls: list[tuple[str | None, str | None]] = []

    def push(self, id: str, *tasks: dict[str, Any]) -> str:
        answer = self.api.post("/v1/opscore/workflows", json={"id": id, "tasks": list(tasks)})
        assert answer.status_code == 201, answer.text
        return id

    def submit(self, id: str, headers: dict[str, str] | None = None, **more: Any) -> str:
        body = {"workflowId": id, "input": {}, **more}
        answer = self.api.post("/v1/opscore/runs", json=body, headers=headers or {})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["runId"])

    def asked(self, run_id: str) -> str:
        """Return the approval that a run waits for."""
        path = f"/v1/opscore/tasks?runId={run_id}&reason=approval"
        return str(wait_until(lambda: self.api.get(path).json()["items"])[0]["taskId"])

    def control(self, path: str, body: Any = None) -> None:
        answer = self.api.post(f"/v1/opscore/{path}", json=body)
        assert answer.status_code == 202, answer.text

    def lines(self, mark: str) -> list[dict[str, Any]]:
        """Return the log lines of web and workers in which `mark` stands."""
        texts = self.log.read_text() + self.stack.log.read_text()
        return [json.loads(line) for line in texts.splitlines() if mark in line]


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tracing")
    with (
        Collector().open() as collector,
        running_stack(
            servers,
            folder / "worker.log",
            OPSCORE_AGENTS="traced_fleet",
            PYTHONPATH=str(ROOT / "tests"),
            OPSCORE_LOG_FORMAT="json",
            OPSCORE_WEBHOOK_SECRET=SECRET,
            OPSCORE_AGENT_HOSTS="127.0.0.1",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_BSP_SCHEDULE_DELAY="50",
            OTEL_EXPORTER_OTLP_TIMEOUT="60",  # what a stop would wait for, if it did
        ) as stack,
        serving(stack.environment, folder / "web.log") as (_, port),
        httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {API_KEY}"}
        ) as api,
    ):
        stack.start_worker()
        site = Site(stack, api, collector, folder / "web.log")
        abroad = AgentServer(
            "abroad", api_url=str(api.base_url), api_key=API_KEY, webhook_secret=SECRET
        )

        def follow(parameters: dict[str, Any], context: Context) -> Any:
            site.calls.append((context.request_id, context.traceparent))
            return "done"

        abroad.agent(follow)
        with abroad.serving():
            state = "/v1/opscore/agent/abroad/state"
            wait_until(lambda: api.get(state).json(), says=lambda it: it.get("state") == "idle")
            yield site


def a_traceparent() -> tuple[str, str, str]:
    """Return the ids of a trace and of a span of a client, and how he sends them."""
    trace, span = uuid4().hex, uuid4().hex[:16]
    return trace, span, f"00-{trace}-{span}-01"


def task(name: str, agent: str, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent, **more}


# --- Traces -------------------------------------------------------------------------------------


def test_a_run_is_one_trace_from_its_clients_span_to_its_agents(site: Site) -> None:
    secret = {"secret": "swordfish"}
    here, there = (
        task("here", "tells", parameters=secret),
        task("there", "abroad", parameters=secret),
    )
    site.push("chain", here, task("aside", "async-tells"), there)
    trace, client, sent = a_traceparent()
    run_id = site.submit("chain", {"traceparent": sent}, input=secret)
    run = site.stack.finished(run_id)
    assert run.status == "completed"
    calls = ("call tells", "its own", "its own, too", "POST")
    spans = site.collector.trace(trace, "task here", "task aside", "task there", "send", *calls)

    request = one(spans, "POST /v1/opscore/runs")
    submission = one(spans, "submit run")
    assert (request.parent, request.kind, request.service) == (client, "server", "opscore-web")
    assert (submission.parent, submission.kind) == (request.id, "producer")
    assert one(spans, "send").parent == request.id
    assert request.about["http.response.status_code"] == 202
    assert request.about["http.route"] == request.about["url.path"] == "/v1/opscore/runs"

    attempts = {name: one(spans, f"task {name}") for name in ("here", "aside", "there")}
    for name, attempt in attempts.items():
        assert (attempt.parent, attempt.kind) == (submission.id, "consumer")
        assert attempt.service == "opscore-worker" and not attempt.is_error
        said = {name: attempt.about[f"opscore.{name}"] for name in ("run_id", "task", "attempt")}
        assert said == {"run_id": run_id, "task": name, "attempt": 1}
        assert attempt.about["opscore.outcome"] == "completed"
    call = one(spans, "call tells")
    assert (call.parent, call.kind) == (attempts["here"].id, "internal")
    assert one(spans, "its own").parent == call.id
    assert one(spans, "its own, too").parent == one(spans, "call async-tells").id
    over_http = one(spans, "POST")
    assert (over_http.parent, over_http.kind) == (attempts["there"].id, "client")
    assert over_http.about["http.response.status_code"] == 200
    assert over_http.about["opscore.agent_id"] == "abroad"
    assert site.calls[-1][1] == f"00-{trace}-{over_http.id}-01"
    assert site.stack.tasks(run_id)[0].output["traceparent"] == (
        f"00-{trace}-{attempts['here'].id}-01"
    )
    assert "swordfish" not in str(spans)


def test_a_task_that_waited_is_in_the_trace_of_its_run_still(site: Site) -> None:
    site.push("slow", task("a", "one-at-a-time", parameters={"seconds": 0.5}))
    site.push("busy", task("a", "one-at-a-time"), task("b", "says-busy"))
    before = site.submit("slow")
    wait_until(lambda: site.stack.tasks(before)[0].status == "running")
    trace, _, sent = a_traceparent()
    run_id = site.submit("busy", {"traceparent": sent})
    assert site.stack.finished(run_id).status == "completed"
    parked = site.stack.rows(
        "SELECT data FROM events WHERE run_id = :id AND type = 'task.waiting'", id=run_id
    )
    assert len(parked) == 2

    def attempts() -> list[Sent]:
        return [
            span for span in site.collector.spans if span.trace == trace and span.name[0] == "t"
        ]

    found = wait_until(attempts, says=lambda spans: len(spans) == 3)
    outcomes = sorted(
        (s.name, s.about["opscore.attempt"], s.about["opscore.outcome"]) for s in found
    )
    assert outcomes == [
        ("task a", 1, "completed"),
        ("task b", 1, "busy"),
        ("task b", 2, "completed"),
    ]
    submission = one(site.collector.trace(trace, "submit run"), "submit run")
    assert {span.parent for span in found} == {submission.id}


def test_a_run_that_the_keeper_publishes_is_in_its_trace(site: Site) -> None:
    site.push("later", task("a", "tells"))
    trace, _, sent = a_traceparent()
    moment = datetime.now(UTC) + timedelta(seconds=1)
    run_id = site.submit("later", {"traceparent": sent}, startAt=moment.isoformat())
    assert site.stack.finished(run_id).status == "completed"
    spans = site.collector.trace(trace, "task a")
    assert one(spans, "task a").parent == one(spans, "submit run").id


def test_a_sub_workflow_goes_on_with_the_trace_below_its_task(site: Site) -> None:
    site.push("inner", task("deep", "tells"))
    site.push("outer", {"taskId": "sub", "type": "workflow", "workflowId": "inner"})
    trace, _, sent = a_traceparent()
    run_id = site.submit("outer", {"traceparent": sent})
    assert site.stack.finished(run_id).status == "completed"

    def submissions() -> list[Sent]:
        spans = site.collector.trace(trace, "task deep")
        return [span for span in spans if span.name == "submit run"]

    first, second = sorted(
        wait_until(submissions, says=lambda found: len(found) == 2),
        key=lambda span: span.about["opscore.workflow_id"] == "inner",
    )
    spans = site.collector.trace(trace, "task sub", "task deep")
    begins = [span for span in spans if span.id == second.parent]
    assert [span.name for span in begins] == ["task sub"] and begins[0].parent == first.id
    assert one(spans, "task deep").parent == second.id


def test_a_failure_is_told_by_its_code_and_not_in_words(site: Site) -> None:
    site.push("fails", task("a", "gives-up", parameters={"secret": "swordfish"}))
    trace, _, sent = a_traceparent()
    site.stack.finished(site.submit("fails", {"traceparent": sent}))
    spans = site.collector.trace(trace, "task a", "call gives-up")
    for name in ("task a", "call gives-up"):
        assert one(spans, name).is_error and one(spans, name).about["error.type"] == "gave_up"
    assert "swordfish" not in str(spans)


def test_a_client_that_samples_nothing_is_followed_in_that(site: Site) -> None:
    site.push("unseen", task("a", "tells"))
    trace, _, sent = a_traceparent()
    run_id = site.submit("unseen", {"traceparent": sent[:-1] + "0"})
    seen, _, other = a_traceparent()
    site.stack.finished(run_id)
    site.stack.finished(site.submit("unseen", {"traceparent": other}))
    site.collector.trace(seen, "task a")
    assert [span for span in site.collector.spans if span.trace == trace] == []
    assert site.stack.run(run_id).traceparent.startswith(f"00-{trace}-")


def test_requests_without_a_traceparent_or_with_a_bad_one_begin_traces(site: Site) -> None:
    site.push("alone", task("a", "tells"))
    runs = [site.submit("alone"), site.submit("alone", {"traceparent": "00-swordfish"})]
    traces = {site.stack.run(run_id).traceparent.split("-")[1] for run_id in runs}
    assert len(traces) == 2
    for trace in traces:
        assert one(site.collector.trace(trace, "POST /v1/opscore/runs"), "submit run")
    assert not [s for s in site.collector.spans if "/health" in s.name]


def test_each_firing_of_a_schedule_begins_a_trace(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector().open() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        tracing.start("opscore-test")
        try:
            clock = Clock(database)
            clock.define()
            for name in ("one", "two"):
                clock.create(name, every_seconds=60)
                clock.pass_by(60, name)
            fired = clock.tick()
        finally:
            tracing.stop()
    assert len(fired.plans) == 2
    spans = {span.about["opscore.schedule"]: span for span in collector.spans}
    assert set(spans) == {"one", "two"} and spans["one"].trace != spans["two"].trace
    assert {span.parent for span in spans.values()} == {""}


# --- Request ids --------------------------------------------------------------------------------


def test_a_request_id_is_in_every_line_up_to_the_agents(site: Site) -> None:
    site.push("followed", task("here", "tells"), task("there", "abroad"))
    mark = f"follow-{uuid4().hex}"
    run_id = site.submit("followed", {"X-Request-ID": mark})
    run = site.stack.finished(run_id)
    assert run.status == "completed" and run.request_id == mark
    here, there = site.stack.tasks(run_id)
    assert here.output["requestId"] == mark and site.calls[-1][0] == mark

    def lines() -> list[dict[str, Any]]:
        return site.lines(mark)

    found = wait_until(lines, says=lambda said: any(x["event"] == "run.completed" for x in said))
    told = [(line["event"], line.get("task")) for line in found if line["event"] != "request"]
    assert told == [
        ("run.queued", None),
        ("run.started", None),
        ("task.started", "here"),
        ("task.completed", "here"),
        ("task.started", "there"),
        ("task.completed", "there"),
        ("run.completed", None),
    ]
    assert {line["run_id"] for line in found if line["event"] != "request"} == {run_id}
    (done,) = [
        line for line in found if (line["event"], line.get("task")) == ("task.completed", "there")
    ]
    ids = {name: done[name] for name in ("task_id", "attempt", "agent_id")}
    assert ids == {"task_id": str(there.id), "attempt": 1, "agent_id": "abroad"}
    assert [line["request_id"] for line in found] == [mark] * len(found)


def test_each_event_is_one_line_of_its_name_by_whoever_made_it(site: Site) -> None:
    site.push(
        "forms",
        task("each", "tells", forEach={"items": "${[1, 2, 3]}", "maxParallel": 2}),
        task("never", "tells", when="1 > 2", dependsOn=["each"]),
        {"taskId": "ask", "type": "approval", "dependsOn": ["each"]},
        {"taskId": "rest", "type": "delay", "seconds": 0.1, "dependsOn": ["ask", "never"]},
        task("again", "says-busy", dependsOn=["rest"]),
    )
    site.push("broken", task("a", "gives-up", parameters={"secret": "s"}), task("b", "tells"))
    whole, called_off, broken = (site.submit(id) for id in ("forms", "forms", "broken"))
    asked = {run: site.asked(run) for run in (whole, called_off)}
    site.control(f"runs/{whole}/pause")
    site.control(f"runs/{whole}/resume")
    site.control(f"tasks/{asked[whole]}/approve", {"comment": "swordfish"})
    site.control(f"runs/{called_off}/cancel")
    site.stack.finished(broken)
    site.control(f"runs/{broken}/retry", {})
    ends = [site.stack.finished(run).status for run in (whole, called_off, broken)]
    assert ends == ["completed", "cancelled", "failed"]
    runs = {whole, called_off, broken}

    def told() -> Counter[tuple[str, str]]:
        counted: Counter[tuple[str, str]] = Counter()
        for line in site.lines("opscore.transitions"):
            event, run_id = line["event"], line.get("run_id")
            if run_id in runs and event != "task.woken":
                counted[event, run_id] += line.get("tasks", 1) if event == "task.cancelled" else 1
        return counted

    rows = site.stack.rows(
        "SELECT type, run_id FROM events WHERE run_id::text = ANY (:runs)", runs=[*runs]
    )
    events = Counter((row.type, str(row.run_id)) for row in rows)
    assert len({type for type, _ in events}) >= 15
    wait_until(lambda: (told() - events, events - told()), says=lambda both: not any(both))
    assert "swordfish" not in site.log.read_text() + site.stack.log.read_text()


# --- Off, and away ------------------------------------------------------------------------------

LOOK = """
import sys
from opscore import tracing
tracing.start("opscore-test")
with tracing.span("x", "server", {"a": 1}, parent="00-1-1-01") as span, tracing.part("y"):
    span.set(b=2)
assert tracing.current() is None
tracing.stop()
print([name for name in sys.modules if name.startswith("opentelemetry")])
import opscore.sdk, opscore.testing, web.app, workers.tasks, workers.beat
# Of its own accord redis-py loads metrics of what is installed.
ours = ("opentelemetry.exporter", "opentelemetry.sdk.trace", "opentelemetry.proto")
print([name for name in sys.modules if name.startswith(ours)])
"""


@pytest.mark.parametrize(
    "environment",
    [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}],
    ids=["no endpoint", "disabled"],
)
def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded(
    environment: dict[str, str],
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n[]\n"), done.stderr


def test_a_collector_that_says_nothing_keeps_nobody(servers: Servers, tmp_path: Path) -> None:
    with (
        Collector(is_silent=True).open() as silent,
        running_stack(
            servers,
            tmp_path / "worker.log",
            OPSCORE_AGENTS="traced_fleet",
            PYTHONPATH=str(ROOT / "tests"),
            OTEL_EXPORTER_OTLP_ENDPOINT=silent.url,
            OTEL_BSP_SCHEDULE_DELAY="50",
            OTEL_EXPORTER_OTLP_TIMEOUT="60",  # what a stop would wait for, if it did
        ) as stack,
        serving(stack.environment, tmp_path / "web.log") as (web, port),
        httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {API_KEY}"}
        ) as api,
    ):
        worker = stack.start_worker()
        site = Site(stack, api, silent, tmp_path / "web.log")
        site.push("runs", task("a", "tells"), task("b", "tells"))
        for _ in range(3):
            assert stack.finished(site.submit("runs")).status == "completed"
        for process in (worker, web):
            process.send_signal(signal.SIGTERM)
        assert (worker.wait(20), web.wait(20)) == (0, 0)


END = """
import time
from opscore import tracing
tracing.start("opscore-test")
with tracing.span("one"):
    assert tracing.current() is not None
began = time.monotonic()
tracing.stop()
assert tracing.current() is None
print(time.monotonic() - began)
"""
"""In a process of its own: what exporters leave behind goes on for a while in ours."""


@pytest.mark.parametrize("is_silent", [True, False], ids=["silent", "dead"])
def test_the_end_of_a_process_waits_for_no_collector(is_silent: bool) -> None:
    with Collector(is_silent=True).open() as silent, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"http://127.0.0.1:{bound.getsockname()[1]}"
        url = silent.url if is_silent else dead
        done = subprocess.run(
            [sys.executable, "-c", END],
            cwd=ROOT,
            env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": url},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < tracing.FLUSH_SECONDS + 1
