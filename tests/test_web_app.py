"""What holds for every request: the key, ids, limits, problems, log lines, readiness, the docs."""

import hashlib
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import psutil
import pytest
import structlog
from http_client import Client, open_client, problem
from jsonschema import Draft202012Validator
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from stack import API_KEY, Servers, new_redis_url, stack_environment, wait_until

from opscore import errors, logs, migrations
from opscore.config import Settings
from opscore.errors import ConfigurationError, OpsCoreError
from opscore.servers import PostgresServer, RedisServer
from web.app import create_app
from web.auth import principal
from web.errors import STATUSES, pointers, status_of


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    """A client for tests that leave nothing behind."""
    with servers.new_database() as url:
        settings = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(settings) as client:
            yield client


@pytest.fixture
def fresh(settings: Settings) -> Iterator[Client]:
    """A client on a database of its own."""
    with open_client(settings) as client:
        yield client


def every_class(kind: type[OpsCoreError]) -> Iterator[type[OpsCoreError]]:
    for child in kind.__subclasses__():
        yield child
        yield from every_class(child)


# --- The key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json", "/docs", "/docs/start.js"])
def test_health_and_documentation_want_no_key(client: Client, path: str) -> None:
    assert client.without_key().get(path).status_code in (200, 503)


@pytest.mark.parametrize("path", ["/runs", "/nothing", "/runs/abc", "/agents/x", "/docsx"])
def test_everything_else_wants_the_key(client: Client, path: str) -> None:
    answer = client.without_key().get(path)
    assert "missing" in problem(answer, 401, "unauthorized")["detail"]
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Basic abc", "Bearer <key>"),
        ("key", "Bearer <key>"),
        ("", "Bearer <key>"),
        ("Bearer", "wrong"),
        ("Bearer wrong", "wrong"),
        ("Bearer schlüssel", "wrong"),
    ],
)
def test_a_wrong_key_is_told_what_is_wrong_and_nothing_of_the_right_one(
    client: Client, header: str, said: str
) -> None:
    answer = client.without_key().get("/runs", headers={"Authorization": header})
    assert said in problem(answer, 401, "unauthorized")["detail"]
    assert API_KEY not in answer.get_data(as_text=True)


def test_the_scheme_is_read_in_any_case(client: Client) -> None:
    header = {"Authorization": f"bearer {API_KEY}"}
    assert client.without_key().get("/runs", headers=header).status_code == 200


def test_whoever_asks_is_named_by_the_hash_of_the_key(client: Client) -> None:
    answer = answering(client, lambda: {"principal": principal()})
    digest = hashlib.sha256(API_KEY.encode()).hexdigest()
    assert answer.json == {"principal": f"key:{digest[:8]}"}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/docs", "/docs/start.js", "/internal/agent/notify"]
)
def test_a_wrong_method_needs_no_key_where_the_right_one_needs_none(
    client: Client, path: str
) -> None:
    problem(client.without_key().send("DELETE", path), 405, "method_not_allowed")
    problem(client.without_key().send("DELETE", "/runs"), 401, "unauthorized")


# --- Request ids and headers --------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a-B_3.x", "x" * 128])
def test_a_usable_request_id_is_kept(client: Client, given: str) -> None:
    answer = client.get("/health", headers={"X-Request-ID": given})
    assert answer.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ä", "a/b"])
def test_any_other_request_id_is_replaced(client: Client, given: str) -> None:
    made = client.get("/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert made != given and re.fullmatch(r"[A-Za-z0-9._-]{1,128}", made)


def test_every_answer_forbids_guessing_its_type(client: Client) -> None:
    for path in ("/health", "/nothing", "/docs", "/docs/swagger-ui.css", "/runs"):
        assert client.get(path).headers["X-Content-Type-Options"] == "nosniff"


# --- Problems -----------------------------------------------------------------------------------


def test_an_unknown_route_is_a_problem(client: Client) -> None:
    problem(client.get("/v1/nothing"), 404, "not_found")


def test_a_wrong_method_is_a_problem_that_allows_the_right_ones(client: Client) -> None:
    answer = client.send("DELETE", "/runs")
    problem(answer, 405, "method_not_allowed")
    assert {"GET", "POST"} <= set(answer.headers["Allow"].split(", "))


def test_a_path_with_nul_names_nothing(client: Client) -> None:
    problem(client.get("/agents/a%00b"), 404, "not_found")


@pytest.mark.parametrize("path", ["//runs", "/runs/", "/agents//state/history", "/agents/%2F"])
def test_a_path_is_taken_as_it_is_and_never_sent_elsewhere(client: Client, path: str) -> None:
    problem(client.get(path), 404, "not_found")


def test_every_error_of_ours_has_a_status() -> None:
    classes = [c for c in every_class(OpsCoreError) if c.__module__ == "opscore.errors"]
    families = set(STATUSES) - {OpsCoreError}
    assert len(classes) > 10
    assert [c for c in classes if not families & set(c.__mro__)] == []
    assert (status_of(errors.RunNotFound), status_of(errors.RunFinished)) == (404, 409)
    assert (status_of(errors.InvalidInput), status_of(errors.Unavailable)) == (422, 503)


@pytest.mark.parametrize(
    "error",
    [errors.Unavailable(), OperationalError("x", {}, Exception()), PoolTimeout()],
    ids=["ours", "connection", "pool"],
)
def test_a_server_that_is_away_is_503_with_the_time_to_wait(
    client: Client, error: Exception
) -> None:
    answer = raising(client, error)
    problem(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "5"


def test_an_accident_is_500_without_its_reason_and_logged_with_it(
    client: Client, lines: "Lines"
) -> None:
    answer = raising(client, RuntimeError("secret detail"))
    problem(answer, 500, "internal_error")
    assert "secret" not in answer.get_data(as_text=True)
    (line,) = [line for line in lines if line["event"] == "internal_error"]
    assert line["request_id"] == answer.headers["X-Request-ID"]
    assert "secret detail" in line["exception"] and "Traceback" in line["exception"]


def raising(client: Client, error: Exception) -> Any:
    """Ask a view that raises the error."""

    def view() -> None:
        raise error

    return answering(client, view)


def answering(client: Client, view: Callable[[], Any]) -> Any:
    """Ask this view."""
    views = client.app.view_functions
    before = views["runs.get_many"]
    views["runs.get_many"] = view
    answer = client.get("/runs")
    views["runs.get_many"] = before
    return answer


def test_nested_messages_become_json_pointers() -> None:
    nested = {"tasks": {0: {"a/b": ["x"]}, "_schema": ["y"]}, "~": ["z"], "_schema": ["top"]}
    assert dict(pointers(nested)) == {
        "/tasks/0/a~1b": ["x"],
        "/tasks": ["y"],
        "/~0": ["z"],
        "": ["top"],
    }


# --- Bodies -------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no body"),
        (b"  ", "no body"),
        (b"{", "line 1"),
        (b'{"a": 1', "line 1"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deep"),
        (b"<xml/>", "line 1"),
    ],
    ids=lambda value: repr(value[:12]),
)
@pytest.mark.parametrize(
    "path", ["/runs", "/workflows", "/workflows/validate", "/agent/a/workflow"]
)
def test_a_body_that_cannot_be_read_is_400_and_says_where(
    client: Client, path: str, body: bytes, said: str
) -> None:
    answer = client.post(path, data=body, headers=JSON)
    assert said.lower() in problem(answer, 400, "bad_request")["detail"].lower()


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"workflowId": "w", "input": {"a": ["\\u0000"]}}', "/input/a/0"),
        (b'{"workflowId": "w", "input": "\\ud800"}', "/input"),
        (b'{"workflowId": "w", "input": 123456789012345678901234567890}', "/input"),
        (b'{"workflowId": "w", "input": 1e999}', "/input"),
        (b'{"workflowId": "\\u0000"}', "/workflowId"),
    ],
)
def test_what_cannot_be_stored_is_422_and_says_where(
    client: Client, body: bytes, place: str
) -> None:
    answer = client.post("/runs", data=body, headers=JSON)
    assert list(problem(answer, 422, "invalid_request")["errors"]) == [place]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "text/yaml"]
)
def test_a_run_is_submitted_as_json_only(client: Client, kind: str) -> None:
    answer = client.post("/runs", data=b"{}", headers={"Content-Type": kind})
    assert "application/json" in problem(answer, 415, "unsupported_media_type")["detail"]


def test_a_definition_in_another_media_type_is_told_which_are_read(client: Client) -> None:
    answer = client.post("/workflows", data=b"{}", headers={"Content-Type": "text/plain"})
    assert "application/yaml" in problem(answer, 415, "unsupported_media_type")["detail"]


def test_a_compressed_body_is_refused(client: Client) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    problem(client.post("/runs", data=b"x", headers=headers), 415, "unsupported_media_type")


class Endless(BytesIO):
    """A body without end that counts what is read of it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 <= size <= 2**21, "reads without limit"
        self.taken += size
        return b" " * size

    def readinto(self, buffer: Any) -> int:
        self.taken += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("path", ["/runs", "/workflows", "/runs/abc/cancel", "/nothing"])
def test_a_body_announced_too_large_is_413_unread(client: Client, path: str) -> None:
    body = Endless()
    length = {"CONTENT_LENGTH": str(100 * 2**20)}
    answer = client.post(path, headers=JSON, input_stream=body, environ_overrides=length)
    detail = problem(answer, 413, "body_too_large")["detail"]
    assert "104,857,600 bytes" in detail and "at most 4,194,304 bytes" in detail
    assert body.taken == 0


def test_a_chunked_body_without_end_is_413_after_the_limit(client: Client) -> None:
    body = Endless()
    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    answer = client.post("/runs", headers=JSON, input_stream=body, environ_overrides=chunked)
    detail = problem(answer, 413, "body_too_large")["detail"]
    assert "more than 4,194,304 bytes" in detail and body.taken < 16 * 2**20


def test_the_limit_of_bodies_is_a_setting(settings: Settings) -> None:
    with open_client(replace(settings, max_body_bytes=1024)) as client:
        answer = client.post("/runs", json={"workflowId": "w", "input": "x" * 1024})
        problem(answer, 413, "body_too_large")


# --- Log lines ----------------------------------------------------------------------------------


class Lines:
    """The lines written to standard error so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._written = capsys, ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._written += self._capsys.readouterr().err
        return map(json.loads, self._written.splitlines())


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """The log lines of the test, as a process with `json` writes them."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    logs.configure("INFO", "json")
    yield Lines(capsys)
    root.handlers, _ = before, root.setLevel(level)


def test_a_request_is_one_line_with_its_id_and_never_its_body_or_key(
    client: Client, lines: Lines
) -> None:
    body = {"workflowId": "nope", "input": {"password": "hunter2"}}
    client.post("/runs?x=hunter2", json=body, headers={"X-Request-ID": "r-1"})
    client.get("/agents/hunter2")
    first, second = [line for line in lines if line["event"] == "request"]
    assert (first["method"], first["route"], first["status"]) == ("POST", "/v1/opscore/runs", 404)
    assert first["request_id"] == "r-1" and first["ms"] >= 0 and first["at"].endswith("Z")
    assert second["route"] == "/v1/opscore/agents/<agent_id>"
    assert "hunter2" not in json.dumps(list(lines)) and API_KEY not in json.dumps(list(lines))


def test_lines_of_libraries_are_json_with_the_ids_bound(lines: Lines) -> None:
    logs.bind(run_id="r")
    logging.getLogger("some.library").warning("it is %s", "late")
    logs.clear()
    (line,) = lines
    assert (line["event"], line["level"], line["logger"]) == (
        "it is late",
        "warning",
        "some.library",
    )
    assert line["run_id"] == "r"


def test_lines_of_ours_have_the_ids_of_their_block_and_the_error_they_tell(lines: Lines) -> None:
    log = logs.get("some.module")
    logs.bind(request_id="r")
    with logs.bound(task_id="t"):
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it.broke", tries=2)
    log.info("it.went_on")
    logs.clear()
    broke, went_on = lines
    assert broke["level"] == "error" and "ValueError: no" in broke["exception"]
    assert (broke["request_id"], broke["task_id"], broke["tries"]) == ("r", "t", 2)
    assert went_on["logger"] == "some.module" and went_on["at"].endswith("Z")
    assert went_on["request_id"] == "r" and "task_id" not in went_on


def test_a_logger_that_was_used_already_follows_the_level_and_format(lines: Lines) -> None:
    log = logs.get("some.module")
    log.info("heard")
    logs.configure("WARNING", "json")
    log.info("not heard")
    log.warning("heard again")
    assert [line["event"] for line in lines] == ["heard", "heard again"]


def test_no_line_can_fail_what_it_tells_of(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    circle: dict[Any, Any] = {(1, 2): "a key that is no text"}
    logs.get("some.module").info("odd", value=circle)
    (line,) = lines
    assert line["event"] == "'odd'" and "(1, 2)" in line["value"]
    monkeypatch.setattr(sys, "stderr", None)
    logs.get("some.module").info("nobody reads this")
    logging.getLogger("some.library").info("nor this")


def test_agents_may_use_structlog_without_a_name(lines: Lines) -> None:
    structlog.get_logger().info("hello")
    (line,) = lines
    assert (line["event"], line["logger"]) == ("hello", "agent")


# --- Readiness ----------------------------------------------------------------------------------


def test_health_touches_nothing(fresh: Client) -> None:
    client = fresh
    client.database.close()
    client.database.transaction = None  # type: ignore[method-assign,assignment]
    answer = client.get("/health")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


def keep(client: Client, expires: str = "now() + interval '10 s'") -> None:
    """Let a worker's keeper hold its lease."""
    with client.database.transaction() as tx:
        tx.execute(text(f"INSERT INTO leases VALUES ('keeper', 'w', {expires})"))


def test_ready_when_database_broker_and_a_worker_answer(fresh: Client) -> None:
    keep(fresh)
    answer = fresh.get("/ready")
    assert answer.status_code == 200, answer.json
    assert answer.json == {"status": "ready", "database": "ok", "broker": "ok", "workers": "ok"}


def test_unready_without_a_worker(client: Client) -> None:
    answer = client.get("/ready")
    assert (answer.status_code, answer.json["workers"]) == (503, "none")
    assert (answer.json["status"], answer.json["database"]) == ("unready", "ok")


def test_unready_on_an_older_schema(fresh: Client) -> None:
    with fresh.database.transaction() as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    answer = fresh.get("/ready")
    assert (answer.status_code, answer.json["database"]) == (503, "behind")


def signal_all(number: int, *pids: int) -> None:
    """Signal processes and their children: PostgreSQL has one for every connection."""
    for pid in pids:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            each.send_signal(number)


def test_frozen_servers_are_named_within_three_seconds_and_found_again() -> None:
    with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
        migrations.upgrade(postgres.url)
        settings = Settings(database_url=postgres.url, api_key="k" * 32, redis_url=redis.url)
        with open_client(settings) as client:
            keep(client, "now() + interval '1 hour'")
            assert client.get("/ready").status_code == 200
            for _ in range(2):
                signal_all(signal.SIGSTOP, postgres.pid, redis.pid)
                began = time.monotonic()
                answer = client.get("/ready")
                took = time.monotonic() - began
                signal_all(signal.SIGCONT, postgres.pid, redis.pid)
                assert answer.status_code == 503 and took < 3
                parts = {"database": "down", "broker": "down", "workers": "unknown"}
                assert answer.json == {"status": "unready", **parts}
                until_ready(client)


def until_ready(client: Client) -> None:
    wait_until(lambda: client.get("/ready").json, says=lambda answer: answer["status"] == "ready")


def test_a_process_refuses_to_start_on_a_database_without_our_schema(
    settings: Settings,
) -> None:
    url = settings.database_url.rsplit("/", 1)[0] + "/postgres"
    with pytest.raises(ConfigurationError, match="opscore db upgrade"):
        create_app(replace(settings, database_url=url))


# --- Documentation ------------------------------------------------------------------------------


def operations(client: Client) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in client.get("/openapi.json").json["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield f"{method.upper()} {path}", operation


def test_every_route_is_described(client: Client) -> None:
    described = {name for name, _ in operations(client)}
    for rule in client.app.url_map.iter_rules():
        if rule.endpoint.split(".")[0] != "docs":
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
                shape = re.sub(r"<[^>]+>", "{}", rule.rule)
                assert f"{method} {shape}" in {re.sub(r"{\w+}", "{}", d) for d in described}


def test_every_operation_describes_its_answers_and_its_errors(client: Client) -> None:
    seen = set()
    for name, operation in operations(client):
        assert operation["summary"] and operation["operationId"] not in seen
        seen.add(operation["operationId"])
        answers = operation["responses"]
        assert any(status.startswith("2") for status in answers), name
        for status, answer in answers.items():
            if status == "204":
                assert "content" not in answer, name
                continue
            kind = "application/json" if status < "400" or name == "GET /ready" else None
            kind = {("GET /metrics", "200"): "text/plain"}.get((name, status), kind)
            content = answer["content"][kind or "application/problem+json"]
            assert content["schema"], (name, status)
        if not name.endswith(("/health", "/ready")):
            assert {"401", "500", "503"} <= set(answers), name
        if "requestBody" in operation:
            assert {"400", "413", "415", "422"} <= set(answers), name
            for content in operation["requestBody"]["content"].values():
                assert content["schema"] and content["example"], name
        if "{" in name:
            assert "404" in answers, name


STARTS = ("POST /v1/opscore/runs", "POST /v1/opscore/agent/{agentId}/workflow")
STARTS += ("POST /v1/opscore/tasks", "POST /v1/opscore/runs/{runId}/rerun")
STARTS += ("POST /v1/opscore/schedules/{name}/trigger",)


def test_what_starts_a_run_describes_the_key_that_makes_it_safe_to_repeat(client: Client) -> None:
    for name, operation in operations(client):
        headers = [p for p in operation.get("parameters", []) if p["in"] == "header"]
        headers = [header for header in headers if header["name"] != "Last-Event-ID"]
        answers = operation["responses"]
        if name not in STARTS:
            assert headers == [] and "Idempotent-Replayed" not in str(answers), name
            continue
        (header,) = headers
        assert (header["name"], header["required"]) == ("Idempotency-Key", False)
        assert "24 hours" in header["description"] and "pattern" in header["schema"]
        assert set(answers["202"]["headers"]) == {"Location", "Idempotent-Replayed"}
        refusals = {"404", "409", "422"} | ({"413"} if "requestBody" in operation else set())
        assert refusals <= set(answers), name
        assert "Idempotency-Key" in answers["409"]["description"]


def test_the_description_names_the_key_and_only_things_that_exist(client: Client) -> None:
    answer = client.get("/openapi.json")
    document = answer.json
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["security"] == [{"key": []}]
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', answer.get_data(as_text=True)):
        found = document
        for step in reference.split("/"):
            found = found[step]


DETAILS = {"agentId": "a", "agentName": "A", "version": "1", "contactEndpoint": "https://a.example"}


def one_task(**more: Any) -> tuple[str, Any]:
    return "WorkflowDefinition", {"tasks": [{"taskId": "a", **more}]}


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        ("WorkflowDefinition", {"tasks": []}),
        ("WorkflowDefinition", {"tasks": [{}]}),
        ("WorkflowDefinition", {"tasks": [{"taskId": "a"}], "maxConcurrentRuns": 0}),
        ("WorkflowDefinition", {"tasks": [{"taskId": "a"}], "id": "no name"}),
        one_task(taskId="x" * 65),
        one_task(agentId=""),
        one_task(agentCapability="a b"),
        one_task(dependsOn=["ä"]),
        one_task(nextTaskId=""),
        one_task(fallback=["b", "b"]),
        one_task(retry={"maxAttempts": 101}),
        one_task(retry={"backoffSeconds": 0}),
        one_task(busy={"maxWaitSeconds": -1}),
        one_task(timeoutSeconds=1e300),
        one_task(forEach={"items": [], "maxParallel": 1001}),
        ("RunArguments", {"workflowId": "w", "labels": {"a": "x" * 257}}),
        ("RunArguments", {"workflowId": "w", "labels": {str(n): "" for n in range(33)}}),
        ("AgentChange", {"heartbeatSeconds": 0}),
        ("AgentDetails", {**DETAILS, "agentId": "a b"}),
        ("AgentDetails", {**DETAILS, "capabilities": [""]}),
    ],
)
def test_the_description_forbids_what_the_server_refuses(
    client: Client, schema: str, body: Any
) -> None:
    described = client.get("/openapi.json").json["components"]
    whole = {"$ref": f"#/components/schemas/{schema}", "components": described}
    assert list(Draft202012Validator(whole).iter_errors(body))


class References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.files += [v for k, v in attributes if k in ("src", "href") and v]

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() == "<script>" and data.strip():
            self.inline.append(data)


def test_the_pages_need_no_network_and_no_inline_script(client: Client) -> None:
    answer = client.get("/docs")
    page = References()
    page.feed(answer.get_data(as_text=True))
    assert len(page.files) == 4 and not page.inline
    for file in page.files:
        assert client.get("/" + file).status_code == 200, file
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    assert client.get("/docs/").headers["Location"].endswith("/docs")
    assert "Apache" in client.get("/docs/LICENSE").get_data(as_text=True)
    problem(client.get("/docs/nothing.js"), 404, "not_found")
