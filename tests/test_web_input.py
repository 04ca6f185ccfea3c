"""What no client should send, to every operation the description names, in every place it names.

Which operations, bodies and parameters there are is read from the description: none is listed here.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from http_client import Client, open_client, problem
from stack import Servers, new_redis_url, stack_environment
from test_web_app import operations
from werkzeug.test import TestResponse

from opscore.config import Settings
from opscore.remote import AGENT_PREFIX, sign
from web.bodies import JSON, YAML

SECRET = "the-secret-of-the-webhook"
NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    """A client for what is refused: there is nothing, before and after."""
    with servers.new_database() as url:
        settings = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(replace(settings, webhook_secret=SECRET)) as client:
            yield client


def with_body(
    client: Client, *, only_if_needed: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every operation that takes a body, and what it takes, by media type."""
    for name, operation in operations(client):
        body = operation.get("requestBody")
        if body and (body["required"] or not only_if_needed):
            yield name, body["content"]


def send(
    client: Client, name: str, body: bytes | None = None, kind: str = JSON, **headers: str
) -> TestResponse:
    """Send a request with the key, and signed; what is left of its path names nobody."""
    method, path = name.split(" ", 1)
    now = str(int(time.time()))
    proof = {
        f"{AGENT_PREFIX}-Timestamp": now,
        f"{AGENT_PREFIX}-Signature": sign(SECRET, now, body or b""),
    }
    if body is not None:
        proof["Content-Type"] = kind
    path = re.sub(r"{\w+}", NOBODY, path.replace("{number}", "1"))
    return client.send(method, path, data=body, headers={**proof, **headers})


def parameters(client: Client, where: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield every operation with each of its parameters there, and an example of its body."""
    for path, methods in client.get("/openapi.json").json["paths"].items():
        shared = methods.pop("parameters", [])
        for method, operation in methods.items():
            body = operation.get("requestBody", {"content": {JSON: {}}})["content"][JSON]
            for parameter in shared + operation.get("parameters", []):
                if parameter["in"] == where:
                    yield f"{method.upper()} {path}", parameter, body.get("example")


# --- Bodies -------------------------------------------------------------------------------------


def spoilt(value: Any, text: str, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the value with one of its texts replaced, for each of them, and where that is."""
    if isinstance(value, str):
        yield place, text
    elif isinstance(value, dict):
        for name, inner in value.items():
            for where, other in spoilt(inner, text, f"{place}/{name}"):
                yield where, {**value, name: other}
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            for where, other in spoilt(inner, text, f"{place}/{number}"):
                yield where, [*value[:number], other, *value[number + 1 :]]


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "\udfff\ud800"])
def test_a_text_that_cannot_be_stored_is_named_wherever_it_stands(
    client: Client, text: str
) -> None:
    found = 0
    for name, content in with_body(client):
        for kind in content:
            for place, body in spoilt(content[kind]["example"], text):
                answer = send(client, name, json.dumps(body).encode(), kind)
                found += 1
                if kind in YAML and answer.status_code == 400:  # YAML has no such signs at all
                    assert "line 1" in answer.get_json(force=True)["detail"], (name, place)
                else:
                    errors = problem(answer, 422, answer.get_json(force=True)["code"])["errors"]
                    assert place in errors, (name, kind, place)
    assert found > 50


@pytest.mark.parametrize(
    "number", ["1" + "0" * 400, "1" + "0" * 5000, "-1e400", "1e400", "NaN", "Infinity"]
)
def test_a_number_that_cannot_be_stored_is_refused_wherever_it_stands(
    client: Client, number: str
) -> None:
    for name, content in with_body(client):
        for place, body in spoilt(content[JSON]["example"], "?"):
            answer = send(client, name, json.dumps(body).replace('"?"', number).encode())
            assert answer.status_code in (400, 422), (name, place)
            problem(answer, answer.status_code, answer.get_json(force=True)["code"])


@pytest.mark.parametrize(
    "body",
    [b"", b" \n", b"{", b"[" * 100_000, b'{"a":' * 65 + b"0" + b"}" * 65, b"\xff\xfe{\0}\0"],
    ids=["nothing", "blank", "half", "deep", "too deep", "UTF-16"],
)
def test_a_body_that_cannot_be_read_is_400_everywhere(client: Client, body: bytes) -> None:
    for name, _ in with_body(client, only_if_needed=not body):
        problem(send(client, name, body), 400, "bad_request")


@pytest.mark.parametrize("body", [b"null", b"0", b'""', b"[]", b"true", b"[{}]"])
def test_a_body_that_is_no_object_is_422_everywhere(client: Client, body: bytes) -> None:
    for name, _ in with_body(client):
        answer = send(client, name, body)
        problem(answer, 422, answer.get_json(force=True)["code"])


@pytest.mark.parametrize(
    "kind",
    [
        "",
        ";",
        "json",
        "text/plain",
        "text/json",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/problem+json",
        "application/json, application/json",
        "application/json\xff",
    ],
)
def test_another_media_type_is_415_everywhere(client: Client, kind: str) -> None:
    for name, _ in with_body(client):
        problem(send(client, name, b"{}", kind), 415, "unsupported_media_type")


def test_a_compressed_body_is_415_everywhere(client: Client) -> None:
    for name, _ in with_body(client):
        answer = send(client, name, b"{}", **{"Content-Encoding": "gzip"})
        problem(answer, 415, "unsupported_media_type")


# --- Queries and paths --------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["%00", "a%00b", "true%00"])
def test_a_nul_is_named_in_every_parameter(client: Client, value: str) -> None:
    for name, parameter, _ in parameters(client, "query"):
        answer = send(client, f"{name}?{parameter['name']}={value}")
        errors = problem(answer, 422, "invalid_request")["errors"]
        assert list(errors) == [f"/{parameter['name']}"]


@pytest.mark.parametrize(
    "value", ["9" * 5000, "-1", "1e400", "nan", "inf", "0x1", "1_0", "%201", "", "²", "٣"]
)
def test_a_number_that_is_none_is_named_in_every_parameter(client: Client, value: str) -> None:
    found = 0
    for name, parameter, _ in parameters(client, "query"):
        if parameter["schema"]["type"] in ("integer", "number"):
            answer = send(client, f"{name}?{parameter['name']}={value}")
            errors = problem(answer, 422, "invalid_request")["errors"]
            assert list(errors) == [f"/{parameter['name']}"], name
            found += 1
    assert found > 5


@pytest.mark.parametrize(
    "value",
    [
        "%ED%A0%80",
        "%FF",
        "x" * 60_000,
        "'",
        "%25",
        "%E2%80%AE",
        "null",
        "2026-13-01",
        "W10=",
        "e30=",
    ],
    ids=lambda value: value[:9],
)
def test_no_value_of_a_parameter_is_an_accident(client: Client, value: str) -> None:
    for name, parameter, _ in parameters(client, "query"):
        answer = send(client, f"{name}?{parameter['name']}={value}")
        assert answer.status_code in (200, 404, 422), (name, parameter["name"])


@pytest.mark.parametrize(
    "value",
    ["a%00b", "%ED%A0%80", "%FF", "a%2Fb", "%2F", "%2e%2e", "%0d%0aX:1", "x" * 60_000, "9" * 5000],
    ids=lambda value: value[:9],
)
def test_a_path_that_names_nothing_is_404_everywhere(client: Client, value: str) -> None:
    for name, parameter, example in parameters(client, "path"):
        path = name.replace(f"{{{parameter['name']}}}", value)
        answer = send(client, path, None if example is None else json.dumps(example).encode())
        problem(answer, 404, answer.get_json(force=True)["code"])


# --- Methods and headers ------------------------------------------------------------------------


def test_head_is_answered_as_get_without_the_body(client: Client) -> None:
    for name, _ in operations(client):
        if name.startswith("GET"):
            whole, head = send(client, name), send(client, name.replace("GET", "HEAD"))
            assert (head.status_code, head.data) == (whole.status_code, b""), name
            assert head.content_type == whole.content_type


def test_options_and_wrong_methods_say_which_are_allowed(client: Client) -> None:
    for name, _ in operations(client):
        method, path = name.split()
        for other, status in (("OPTIONS", 200), ("TRACE", 405), ("PROPFIND", 405), ("X" * 99, 405)):
            answer = send(client, f"{other} {path}")
            assert (answer.status_code, method in answer.allow) == (status, True), name


@pytest.mark.parametrize(
    "header",
    ["Accept", "Cookie", "Host", "If-None-Match", "Range", "Last-Event-ID", "Idempotency-Key"],
)
@pytest.mark.parametrize("value", ["\xff", "x" * 65_536, ",;=", "bytes=0-1"], ids=lambda v: v[:9])
def test_no_header_is_an_accident(client: Client, header: str, value: str) -> None:
    for name, content in with_body(client):
        body = json.dumps(content[JSON]["example"]).encode()
        answer = send(client, name, body, **{header: value})
        assert answer.status_code < 500, (name, answer.data)
