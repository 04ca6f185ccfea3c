"""Agents behind HTTP: signatures, URLs that may be called, and what comes of a call.

The agents are real servers on free ports of 127.0.0.1; what they send is written out byte by byte.
"""

import gzip
import hashlib
import hmac
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opscore.agentkit import Busy, Completed, Failed
from opscore.agentkit.calling import MAX_RETRY_AFTER_SECONDS
from opscore.agentkit.context import MAX_MESSAGE_BYTES
from opscore.remote import (
    OUR_PREFIX,
    Accepted,
    Answer,
    Order,
    UrlPolicy,
    check_signature,
    read_report,
    sign,
    signed_headers,
)
from opscore.remote_call import EXCERPT_BYTES, Caller

SECRET = "s3cret-for-tests-only"
NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
LONG = 20.0
SHORT = 0.15
PACE = 0.02
"""Seconds between two bytes of a slow agent: well below SHORT, so only an overall limit ends it."""
LOCAL = UrlPolicy(("127.0.0.1",))
DONE = b'{"status":"completed","result":"done"}'


# Agents


@dataclass
class Seen:
    """A request as it came in."""

    line: str
    headers: dict[str, str]
    body: bytes


Script = Callable[[socket.socket, "FakeAgent"], None]


@dataclass
class FakeAgent:
    """A server that gives every request the same answer: bytes, or what a script sends."""

    answer: bytes | Script
    reads: bool = True
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/task"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self) -> None:
        self.over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while not self.over.is_set():
            with suppress(OSError):
                connection, _ = self._listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(LONG)
            if self.reads:
                self.seen.append(_read_request(connection))
            if callable(self.answer):
                self.answer(connection, self)
            else:
                connection.sendall(self.answer)


def _read_request(connection: socket.socket) -> Seen:
    with connection.makefile("rb") as incoming:
        line = incoming.readline().decode().strip()
        pairs = (raw.decode().strip().partition(": ") for raw in iter(incoming.readline, b"\r\n"))
        headers = {name: value for name, _, value in pairs}
        return Seen(line, headers, incoming.read(int(headers["Content-Length"])))


@contextmanager
def agent(answer: bytes | Script, *, reads: bool = True) -> Iterator[FakeAgent]:
    fake = FakeAgent(answer, reads)
    try:
        yield fake
    finally:
        fake.stop()


def http(status: int, body: bytes = b"", **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in {"Content-Length": len(body), **named}.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Whatever", *lines, "", ""]).encode() + body


def drip(data: bytes, before: bytes = b"") -> Script:
    """Send `before` at once and then `data` byte after byte."""

    def script(connection: socket.socket, fake: FakeAgent) -> None:
        connection.sendall(before)
        for byte in data:
            if fake.over.wait(PACE):
                return
            connection.sendall(bytes([byte]))

    return script


def pour(chunk: bytes, before: bytes = b"") -> Script:
    """Send `before` and then `chunk` without end."""

    def script(connection: socket.socket, fake: FakeAgent) -> None:
        connection.sendall(before)
        while not fake.over.is_set():
            connection.sendall(chunk)

    return script


def silence(connection: socket.socket, fake: FakeAgent) -> None:
    fake.over.wait(LONG)


def order(url: str, **changes: Any) -> Order:
    given: dict[str, Any] = {
        "url": url,
        "payload": {"topic": "queues", "ü": [1, None]},
        "task_name": "fetch",
        "run_id": "run-1",
        "task_id": "task-7",
        "token": "5f0c6d1e-0000-4000-8000-000000000001",
        "attempt": 2,
        "deadline": datetime(2026, 1, 31, 13, 5, tzinfo=timezone(timedelta(hours=1))),
        "timeout_seconds": LONG,
        "workflow_id": "report",
        "version": 3,
        "request_id": "request-9",
    }
    return Order(**given | changes)


@cache
def local_caller() -> Caller:
    """One for all tests, as for all of a process: loading the certificates takes its time."""
    return Caller(LOCAL, SECRET)


def call(url: str, caller: Caller | None = None, **changes: Any) -> Answer:
    return (caller or local_caller()).call(order(url, **changes))


def answer_to(answer: bytes | Script, **changes: Any) -> Answer:
    with agent(answer) as fake:
        return call(fake.url, **changes)


def failed(answer: Answer, code: str, *, retryable: bool = True) -> str:
    """Check that the attempt failed so; return the message."""
    assert isinstance(answer, Failed), answer
    assert (answer.code, answer.retryable) == (code, retryable), answer
    assert 0 < len(answer.message.encode()) <= MAX_MESSAGE_BYTES
    return answer.message


def in_time(answer: Callable[[], Answer], seconds: float = 3.0) -> Answer:
    """Check that an answer with the limit SHORT comes not much later than that."""
    started = time.monotonic()
    given = answer()
    assert time.monotonic() - started < seconds
    return given


# Signatures


def test_a_signature_is_the_hmac_of_timestamp_dot_body() -> None:
    known = "32815b3dd5986c886dac10f8ce08855ee83ed43655833d32ab686df5228a4466"
    assert sign(SECRET, "1700000000", b'{"a":1}') == known


def test_what_is_signed_here_is_right_here() -> None:
    headers = signed_headers(SECRET, "X-Any", b"body", NOW)
    assert set(headers) == {"X-Any-Timestamp", "X-Any-Signature"}
    stamp, signature = headers["X-Any-Timestamp"], headers["X-Any-Signature"]
    assert check_signature(SECRET, stamp, signature, b"body", NOW) is None


EPOCH = int(NOW.timestamp())


@pytest.mark.parametrize(
    "timestamp",
    [
        f"{EPOCH}",
        f"{EPOCH}.25",
        f"{EPOCH - 300}",
        f"{EPOCH + 300}",
        "2026-01-31T12:00:00Z",
        "2026-01-31T12:00:00+00:00",
        "2026-01-31T17:29:59.5+05:30",
    ],
)
def test_a_timestamp_may_be_epoch_seconds_or_iso_with_an_offset(timestamp: str) -> None:
    signature = sign(SECRET, timestamp, b"body")
    assert check_signature(SECRET, timestamp, signature, b"body", NOW) is None


@pytest.mark.parametrize(
    ("timestamp", "fault"),
    [
        (None, "X-AgentKit-Timestamp is missing"),
        ("", "X-AgentKit-Timestamp is missing"),
        ("yesterday", "cannot be read"),
        ("-5", "cannot be read"),
        ("nan", "cannot be read"),
        ("inf", "cannot be read"),
        ("1_769_860_800", "cannot be read"),
        ("\uff11769860800", "cannot be read"),
        ("2026-01-31\ud80012:00:00+00:00", "cannot be read"),
        ("2026-13-31T12:00:00Z", "cannot be read"),
        ("2026-01-31T12:00:00", "names no time zone"),
        ("2026-01-31", "names no time zone"),
        (f"{EPOCH - 301}", "more than 300 s"),
        (f"{EPOCH + 301}", "more than 300 s"),
        (f"{EPOCH * 1000}", "more than 300 s"),
        ("9" * 5000, "more than 300 s"),
        ("2026-01-31T12:00:00+01:00", "more than 300 s"),
        ("0001-01-01T00:00:00+23:59", "more than 300 s"),
    ],
    ids=ascii,
)
def test_a_bad_timestamp_is_refused_in_a_sentence(timestamp: str | None, fault: str) -> None:
    signature = "" if timestamp is None else hmac.new(b"k", b"", "sha256").hexdigest()
    said = check_signature(SECRET, timestamp, signature or "x", b"body", NOW)
    assert said and fault in said and said.endswith(".") and len(said) < 300


@pytest.mark.parametrize(
    "signature",
    [
        sign(SECRET, f"{EPOCH}", b"other body"),
        sign("another secret", f"{EPOCH}", b"body"),
        sign(SECRET, f"{EPOCH + 1}", b"body"),
        sign(SECRET, f"{EPOCH}", b"body").upper(),
        sign(SECRET, f"{EPOCH}", b"body")[:-1],
        f"sha256={sign(SECRET, f'{EPOCH}', b'body')}",
        "é\ud800",
    ],
    ids=ascii,
)
def test_a_wrong_signature_is_refused_and_the_right_one_not_told(signature: str) -> None:
    said = check_signature(SECRET, f"{EPOCH}", signature, b"body", NOW)
    assert said and "does not match" in said
    assert sign(SECRET, f"{EPOCH}", b"body") not in said


def test_no_signature_is_right_without_a_secret() -> None:
    said = check_signature("", f"{EPOCH}", sign("", f"{EPOCH}", b"body"), b"body", NOW)
    assert said and "OPSCORE_WEBHOOK_SECRET" in said


def test_a_missing_signature_is_told_by_the_name_of_its_header() -> None:
    assert "X-AgentKit-Signature" in (check_signature(SECRET, f"{EPOCH}", None, b"", NOW) or "")
    said = check_signature(SECRET, f"{EPOCH}", "", b"", NOW, prefix=OUR_PREFIX)
    assert said and "X-OpsCore-Signature is missing" in said


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://agent.example/task",
        "https://agent.example:8443/task?x=1",
        "HTTPS://Agent.Example./task",
        "http://8.8.8.8/",
        "http://[2606:4700::1111]:8080/",
        "http://[::ffff:8.8.8.8]/",
        "http://[64:ff9b::8.8.8.8]/",
        "http://my_service:8080/",
        "http://bücher.example/ü",
        "http://10.example/",
        "http://0x.example/",
    ],
)
def test_a_public_url_has_no_fault(url: str) -> None:
    assert UrlPolicy().faults(url) == []


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "http://"),
        ("agent.example/task", "http://"),
        ("ftp://agent.example/", "http://"),
        ("file:///etc/passwd", "http://"),
        ("gopher://agent.example/", "http://"),
        ("//agent.example/", "http://"),
        ("http://user:pass@agent.example/", "credentials"),
        ("http://user@agent.example/", "credentials"),
        ("http://agent.example\\@127.0.0.1/", "credentials"),
        ("http:///task", "no host"),
        ("http://:80/", "no host"),
        ("http:agent.example", "no host"),
        ("http://agent.example:0/", "port"),
        ("http://agent.example:65536/", "port"),
        ("http://agent.example:-1/", "port"),
        ("http://agent.example:http/", "port"),
        ("http://agent.example/a b", "percent-encoded"),
        ("http://agent.example/\r\nX-Evil: 1", "percent-encoded"),
        ("http://agent.example/\ttab", "percent-encoded"),
        ("http://agent.example/\0", "percent-encoded"),
        ("http://agent.example/\ud800", "percent-encoded"),
        ("http://agent.example/\u2028", "percent-encoded"),
        (" http://agent.example/", "percent-encoded"),
        ("http://a..b/", "host name"),
        ("http://.b/", "host name"),
        ("http://%31%32%37.0.0.1/", "address in disguise"),
        ("http://agent%2eexample/", "host name"),
        ("http://agent,example/", "host name"),
        ("http://[fe80::1%25eth0]/", "host name"),
        (f"http://{'a' * 64}.example/", "host name"),
        (f"http://{'a.' * 127}example/", "host name"),
        ("http://\uff1127.0.0.1/", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://[1.2.3.4]/", "cannot be read"),
        ("http://256.1.1.1/", "cannot be read"),
        ("http://0177.0.0.1/", "cannot be read"),
        ("http://agent.example/" + "a" * 70_000, "cannot be read"),
        ("http://2130706433/", "address in disguise"),
        ("http://017700000001/", "address in disguise"),
        ("http://0x7f000001/", "address in disguise"),
        ("http://0x7f.1/", "address in disguise"),
        ("http://0/", "address in disguise"),
        ("http://127.1/", "address in disguise"),
        ("http://127.0.1/", "address in disguise"),
        ("http://0X7F.0.0.0x1/", "address in disguise"),
        ("http://127.1./", "address in disguise"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_faulty_url_is_refused_in_a_sentence_wherever_agents_may_be(url: str, fault: str) -> None:
    for policy in (UrlPolicy(), UrlPolicy(("*",))):
        said = " ".join(policy.faults(url))
        assert fault in said and said.endswith(".") and len(said) < 500
        assert "pass" not in said


def test_all_faults_of_a_url_are_told_at_once() -> None:
    assert len(UrlPolicy().faults("ftp://user@127.0.0.1:70000/")) == 4


LITERALS = [
    "127.0.0.1",
    "127.255.0.9",
    "127.0.0.1.",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a00:1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::1]",
    "[fe80::1]",
    "[fc00::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "localhost",
    "LocalHost.",
    "agent.localhost",
]


@pytest.mark.parametrize("host", LITERALS)
def test_an_address_that_is_not_public_is_refused_unless_its_host_is_listed(host: str) -> None:
    url = f"http://{host}:8080/task"
    (said,) = UrlPolicy(("*.agents.internal",)).faults(url)
    assert "OPSCORE_AGENT_HOSTS" in said
    assert UrlPolicy(("*",)).faults(url) == []


@pytest.mark.parametrize(
    ("pattern", "host", "is_allowed"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("10.1.*", "10.1.2.3", True),
        ("10.1.*", "10.2.2.3", False),
        ("::1", "[::1]", True),
        ("[::1]", "[0:0::1]", True),
        ("fd00:*", "[fd00::7]", True),
        ("[fd00:*]", "[fd00::7]", True),
        ("10.0.0.[12]", "10.0.0.2", True),
        ("LOCALHOST", "localhost", True),
        ("localhost", "localhost.", True),
        ("*.localhost", "localhost", False),
        ("", "127.0.0.1", False),
    ],
)
def test_a_listed_host_is_a_pattern_of_the_whole_host(
    pattern: str, host: str, is_allowed: bool
) -> None:
    assert (UrlPolicy((pattern,)).faults(f"http://{host}/") == []) is is_allowed


@settings(max_examples=80, deadline=None)
@given(st.text() | st.text().map(lambda text: f"http://{text}") | st.from_regex(r"http://[^/]*/"))
def test_no_text_at_all_makes_the_policy_raise(url: str) -> None:
    assert all(isinstance(fault, str) for fault in UrlPolicy(("*.x",)).faults(url))


# What an agent is sent


def test_an_agent_is_sent_the_whole_order() -> None:
    with agent(http(200, DONE)) as fake:
        assert call(fake.url + "?for=me", index=4) == Completed("done")
    (seen,) = fake.seen
    assert seen.line == "POST /task?for=me HTTP/1.1"
    assert json.loads(seen.body) == {
        "senderId": "opscore",
        "messageType": "workflow_task",
        "payload": {"topic": "queues", "ü": [1, None]},
        "task_name": "fetch",
        "opscore_session_id": "run-1",
        "opscore_task_id": "task-7",
        "opscore_attempt_token": "5f0c6d1e-0000-4000-8000-000000000001",
        "sessionContext": {
            "workflowId": "report",
            "version": 3,
            "attempt": 2,
            "deadline": "2026-01-31T12:05:00Z",
            "index": 4,
        },
    }
    assert b'{"topic":"queues","\xc3\xbc":[1,null]}' in seen.body


def test_an_agent_can_check_who_sent_the_order() -> None:
    with agent(http(200, DONE)) as fake:
        call(fake.url)
    (seen,) = fake.seen
    stamp = seen.headers["X-OpsCore-Timestamp"]
    expected = hmac.new(SECRET.encode(), f"{stamp}.".encode() + seen.body, hashlib.sha256)
    assert seen.headers["X-OpsCore-Signature"] == expected.hexdigest()
    assert abs(int(stamp) - time.time()) < LONG


def test_an_order_has_the_headers_agents_need() -> None:
    with agent(http(200, DONE)) as fake:
        call(fake.url)
        call(fake.url, request_id=None, attempt=3)
    first, second = (seen.headers for seen in fake.seen)
    assert first["Host"] == f"127.0.0.1:{fake.port}"
    assert first["Content-Type"] == "application/json"
    assert first["Accept-Encoding"] == "identity"
    assert (first["Idempotency-Key"], second["Idempotency-Key"]) == ("task-7", "task-7")
    assert (first["X-OpsCore-Attempt"], second["X-OpsCore-Attempt"]) == ("2", "3")
    assert first["X-Request-ID"] == "request-9" and "X-Request-ID" not in second


def test_no_proxy_of_the_environment_sees_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with agent(http(200, DONE)) as fake, agent(http(502)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert call(fake.url) == Completed("done")
    assert proxy.connections == 0


def test_threads_share_a_caller_and_get_their_own_answers() -> None:
    def echo(connection: socket.socket, fake: FakeAgent) -> None:
        connection.sendall(http(200, b'{"result":%d}' % connection.getpeername()[1]))

    caller, answers = Caller(LOCAL, SECRET), []
    with agent(echo) as fake:
        threads = [
            threading.Thread(target=lambda: answers.append(call(fake.url, caller)))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    assert len({answer.output for answer in answers}) == fake.connections == 16


# What an answer means


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({"status": "completed", "result": {"rows": [1, 2]}}, Completed({"rows": [1, 2]})),
        ({"status": "success", "result": "text"}, Completed("text")),
        ({"status": "completed"}, Completed(None)),
        ({"status": None, "result": 0}, Completed(0)),
        ({"result": None}, Completed(None)),
        ({"result": False, "error": None, "more": 1}, Completed(False)),
        ({"status": "failed", "error": "no luck"}, Failed("agent_error", "no luck")),
        ({"status": "error", "error": {"message": "x"}}, Failed("agent_error", "x")),
        (
            {"status": "failed", "error": {"code": "NO_QUOTA", "message": "x"}, "result": 1},
            Failed("no_quota", "x"),
        ),
        (
            {"status": "failed", "error": {"code": "gave_up", "message": "x"}},
            Failed("gave_up", "x", retryable=False),
        ),
        (
            {"status": "failed", "error": {"code": "E 42!", "message": "x"}},
            Failed("agent_error", "E 42!: x"),
        ),
        (
            {"status": "failed", "error": {"code": "x", "message": "y", "retryAfter": 2.5}},
            Failed("x", "y", retry_after=2.5),
        ),
        (
            {"error": {"message": "y", "retryAfter": 10**400}},
            Failed("agent_error", "y", retry_after=365 * 86_400.0),
        ),
        ({"error": {"code": "AGENT_BUSY", "retryAfter": 0}}, Busy(0.0)),
        ({"status": "failed", "error": {"code": "agent_busy", "message": "later"}}, Busy(None)),
        ({"error": "no status"}, Failed("agent_error", "no status")),
        ({"status": "failed", "error": "a\0b\ud800"}, Failed("agent_error", "a\ufffdb?")),
    ],
)
def test_a_report_is_an_outcome_alone_and_as_an_answer(body: Any, outcome: Any) -> None:
    assert read_report(body) == outcome
    assert answer_to(http(200, json.dumps(body).encode())) == outcome


@pytest.mark.parametrize("body", [{"status": "failed"}, {"status": "failed", "error": {}}])
def test_a_failure_without_a_reason_is_a_failure(body: Any) -> None:
    assert "did not say why" in failed(read_report(body), "agent_error")


def test_long_text_of_an_agent_is_cut() -> None:
    outcome = read_report(
        {"status": "failed", "error": {"code": "c" * 9000, "message": "ü" * 9000}}
    )
    assert failed(outcome, "agent_error").endswith("…")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, "neither|either"),
        ({"status": "done"}, "'done'"),
        ({"status": "COMPLETED" * 99}, "completed or failed"),
        ({"status": 1, "result": 1}, "a number"),
        ({"status": ["completed"]}, "a list"),
        ({"result": 1, "error": "x"}, "either"),
        ({"status": "failed", "error": 5}, "error must be text"),
        ({"status": "failed", "error": ["x"]}, "error must be text"),
        ({"status": "failed", "error": {"code": 5, "message": "x"}}, "code and message"),
        ({"status": "failed", "error": {"message": {"a": 1}}}, "code and message"),
        ({"status": "failed", "error": {"retryAfter": "soon"}}, "retryAfter must be a number"),
        ({"status": "failed", "error": {"retryAfter": -1}}, "retryAfter must be a number"),
        ({"status": "failed", "error": {"retryAfter": True}}, "retryAfter must be a number"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(body: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as refused:
        read_report(body)
    assert str(refused.value).endswith(".") and len(str(refused.value)) < 300
    failed(answer_to(http(200, json.dumps(body).encode())), "invalid_answer")


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "result",
    [
        rb'"a\u0000b"',
        rb'"\ud800"',
        rb'{"\u0000": 1}',
        b"1e999",
        b"9223372036854775808",
        b"9" * 10_000,
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_result_that_cannot_be_stored_fails_for_good(result: bytes) -> None:
    body = b'{"status":"completed","result":' + result + b"}"
    failed(answer_to(http(200, body)), "invalid_output", retryable=False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"OK",
        b"<html>It works!</html>",
        b"null",
        b"[]",
        b'"completed"',
        b"\xff\xfe",
        b'{"result": NaN}',
        b'{"result": 1, "result": 2}',
        b'{"result": ' + deep(64) + b"}",
        deep(200_000),
        b'{"result": 1} {"result": 2}',
        b'{"result": "' + b"\\" * 100_000,
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_body_that_is_no_report_is_an_invalid_answer(body: bytes) -> None:
    failed(answer_to(http(200, body)), "invalid_answer")


def test_an_agent_may_accept_and_report_later() -> None:
    assert answer_to(http(202)) == Accepted()
    assert answer_to(http(202, b"any text")) == Accepted()


@pytest.mark.parametrize("status", [409, 423, 429, 503])
def test_an_agent_that_is_busy_is_busy(status: int) -> None:
    assert answer_to(http(status, b"later")) == Busy()
    assert answer_to(http(status, Retry_After="7")) == Busy(7.0)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("9" * 400, MAX_RETRY_AFTER_SECONDS),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_SECONDS),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Sun, 06 Nov 99999999999 08:49:37 GMT", None),
        ("Sun, 99 Nov 2026 08:49:37 +9999", None),
    ],
)
def test_retry_after_is_honoured_where_it_can_be_read(given: str, seconds: float | None) -> None:
    assert answer_to(http(429, Retry_After=given)) == Busy(seconds)


def test_retry_after_may_be_a_date() -> None:
    answer = answer_to(
        http(
            503, Retry_After=format_datetime(datetime.now(UTC) + timedelta(minutes=2), usegmt=True)
        )
    )
    assert isinstance(answer, Busy) and answer.retry_after is not None
    assert 120 - LONG < answer.retry_after <= 120


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 418, 422, 499])
def test_an_agent_that_refuses_fails_the_task_for_good(status: int) -> None:
    said = failed(answer_to(http(status, b"no such topic")), "agent_refused", retryable=False)
    assert f"{status}" in said and "no such topic" in said


@pytest.mark.parametrize("status", [500, 501, 502, 504, 599, 999])
def test_an_agent_that_breaks_may_be_tried_again(status: int) -> None:
    assert f"{status}" in failed(answer_to(http(status)), "agent_failed")


def test_an_agent_that_breaks_may_say_when_it_is_tried_again() -> None:
    answer = answer_to(http(500, Retry_After="30"))
    assert isinstance(answer, Failed) and answer.retry_after == 30


@pytest.mark.parametrize("status", [201, 203, 204, 206])
def test_another_success_is_an_invalid_answer(status: int) -> None:
    head = b"HTTP/1.1 204 No Content\r\n\r\n" if status == 204 else http(status, DONE)
    assert "202" in failed(answer_to(head), "invalid_answer")


def test_what_an_agent_says_of_its_failure_is_cut_and_cleaned() -> None:
    text = b"\x1b[31mred\0\r\n\t  alert\xff" + b"x" * 5_000
    said = failed(answer_to(http(500, text)), "agent_failed")
    assert "[31mred alert\ufffdxxx" in said and said.isprintable()
    assert len(said.encode()) < EXCERPT_BYTES + 100


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_loopback_is_not_followed(status: int) -> None:
    with agent(http(200, DONE)) as secret:
        answer = answer_to(http(status, Location=secret.url))
    assert secret.connections == 0
    assert secret.url in failed(answer, "agent_redirected")
    assert "nowhere" in failed(answer_to(http(304)), "agent_redirected")


# Agents that are slow, endless or broken


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(drip(HEAD * 10), id="head"),
        pytest.param(drip(b"x" * 1000, HEAD), id="body"),
        pytest.param(
            drip(b"1\r\nx\r\n" * 200, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
            id="chunks",
        ),
        pytest.param(drip(b"x" * 1000, b"HTTP/1.1 200 OK\r\nX-Long: "), id="header"),
        pytest.param(drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 50), id="interim heads"),
        pytest.param(silence, id="silence"),
    ],
)
def test_a_byte_now_and_then_does_not_outlast_the_attempt(script: Script) -> None:
    with agent(script) as fake:
        answer = in_time(lambda: call(fake.url, timeout_seconds=SHORT))
    assert f"{SHORT:g} s" in failed(answer, "timeout")


def test_a_slow_body_does_not_hide_what_its_status_says() -> None:
    head = b"Retry-After: 3\r\nContent-Length: 1000\r\n\r\n"
    with agent(drip(b"x" * 1000, b"HTTP/1.1 503 No\r\n" + head)) as fake:
        assert in_time(lambda: call(fake.url)) == Busy(3.0)
    with agent(drip(b"x" * 1000, b"HTTP/1.1 202 Yes\r\n" + head)) as fake:
        assert in_time(lambda: call(fake.url)) == Accepted()


def test_an_agent_that_never_reads_the_order_does_not_outlast_the_attempt() -> None:
    with agent(silence, reads=False) as fake:
        payload = "x" * 12_000_000
        answer = in_time(lambda: call(fake.url, payload=payload, timeout_seconds=SHORT))
    failed(answer, "timeout")


def test_an_agent_that_reads_the_order_slowly_does_not_outlast_the_attempt() -> None:
    def sip(connection: socket.socket, fake: FakeAgent) -> None:
        while not fake.over.wait(PACE):
            connection.recv(65_536)

    with agent(sip, reads=False) as fake:
        payload = "x" * 12_000_000
        answer = in_time(lambda: call(fake.url, payload=payload, timeout_seconds=SHORT))
    failed(answer, "timeout")


def test_an_agent_that_never_accepts_the_connection_does_not_outlast_the_attempt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        failed(in_time(lambda: call(url, timeout_seconds=SHORT)), "timeout")


def test_a_resolver_that_hangs_does_not_outlast_the_attempt() -> None:
    over = threading.Event()

    def hang(*_: Any, **__: Any) -> list[Any]:
        over.wait(LONG)
        return []

    caller = Caller(UrlPolicy(), SECRET, resolve=hang)
    answer = in_time(lambda: call("http://agent.example/", caller, timeout_seconds=SHORT))
    over.set()
    failed(answer, "timeout")


@pytest.mark.parametrize("seconds", [0.0, -5.0])
def test_an_attempt_without_time_left_calls_nobody(seconds: float) -> None:
    with agent(http(200, DONE)) as fake:
        failed(call(fake.url, timeout_seconds=seconds), "timeout")
    assert fake.connections == 0


MEBIBYTE = 2**20


def padded(size: int) -> bytes:
    return DONE + b" " * (size - len(DONE))


def test_an_answer_may_take_four_mebibytes_and_no_byte_more() -> None:
    assert answer_to(http(200, padded(4 * MEBIBYTE))) == Completed("done")
    answer = answer_to(http(200, padded(4 * MEBIBYTE + 1)))
    said = failed(answer, "output_too_large", retryable=False)
    assert "larger than 4,194,304 bytes" in said and "1,048,576 bytes" in said


@pytest.mark.parametrize("spelling", ["x", "\\u00e9"])
def test_a_result_may_take_a_mebibyte_and_no_byte_more(spelling: str) -> None:
    character = json.loads(f'"{spelling}"')
    count = (MEBIBYTE - len('""')) // len(character.encode())
    said = f'{{"result": "{spelling * count}"}}'
    assert answer_to(http(200, said.encode())) == Completed(character * count)
    said = f'{{"result": "{spelling * count}x"}}'
    told = failed(answer_to(http(200, said.encode())), "output_too_large", retryable=False)
    assert "takes 1,048,577 bytes as JSON; at most 1,048,576 bytes" in told


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(pour(b"x" * 65_536, b"HTTP/1.1 200 OK\r\n\r\n"), id="body"),
        pytest.param(pour(b"10000\r\n" + b" " * 65_536 + b"\r\n", CHUNKED), id="chunks"),
    ],
)
def test_an_endless_body_is_cut_off(script: Script) -> None:
    failed(in_time(lambda: answer_to(script)), "output_too_large", retryable=False)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(pour(b"1;" + b"x" * 8_000 + b"\r\n \r\n", CHUNKED), id="framing"),
        pytest.param(pour(b"X-More: more\r\n" * 500, b"HTTP/1.1 200 OK\r\n"), id="headers"),
        pytest.param(pour(b"x" * 65_536), id="first line"),
        pytest.param(pour(b"HTTP/1.1 103 Hints\r\nX: " + b"x" * 4000 + b"\r\n\r\n"), id="heads"),
    ],
)
def test_an_endless_answer_is_cut_off(script: Script) -> None:
    failed(in_time(lambda: answer_to(script)), "invalid_answer")


def test_the_end_of_a_failure_s_endless_text_is_not_waited_for() -> None:
    script = pour(b"x" * 65_536, b"HTTP/1.1 500 No\r\n\r\n")
    failed(in_time(lambda: answer_to(script)), "agent_failed")


def test_a_compressed_answer_is_refused_without_unpacking_it() -> None:
    bomb = gzip.compress(b'{"result": "' + b"x" * 20_000_000 + b'"}', 1)
    assert len(bomb) < MEBIBYTE
    for encoding in ("gzip", "GZIP", "br", "identity, gzip"):
        answer = answer_to(http(200, bomb, Content_Encoding=encoding))
        assert "identity" in failed(answer, "invalid_answer")
    failed(answer_to(http(200, bomb)), "invalid_answer")


def test_an_answer_that_names_its_lack_of_an_encoding_is_taken() -> None:
    assert answer_to(http(200, DONE, Content_Encoding="Identity")) == Completed("done")


def test_chunks_and_interim_answers_are_understood() -> None:
    parts = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in DONE) + b"0\r\n\r\n"
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    assert answer_to(early + CHUNKED + parts) == Completed("done")
    assert answer_to(b"HTTP/1.0 200 OK\r\n\r\n" + DONE) == Completed("done")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"HTTP/1.1 200\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        CHUNKED + b"zz\r\nx\r\n",
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_no_http_is_an_invalid_answer(answer: bytes) -> None:
    assert "no HTTP" in failed(answer_to(answer), "invalid_answer")


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nCont", HEAD + DONE, CHUNKED + b"10\r\nx"],
    ids=["at once", "in the head", "in the body", "in a chunk"],
)
def test_an_answer_that_breaks_off_may_be_tried_again(answer: bytes) -> None:
    failed(answer_to(answer), "agent_unreachable")


def test_a_reset_connection_may_be_tried_again() -> None:
    def reset(connection: socket.socket, fake: FakeAgent) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    assert "reset" in failed(answer_to(reset), "agent_unreachable")


def test_an_answer_before_the_whole_order_was_read_counts() -> None:
    with agent(http(413, b"too large"), reads=False) as fake:
        answer = call(fake.url, payload="x" * 12_000_000)
    assert "413" in failed(answer, "agent_refused", retryable=False)


def test_nobody_there_may_be_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    assert "refused" in failed(call(url), "agent_unreachable")


def test_whatever_an_agent_sends_comes_to_an_outcome() -> None:
    caller, sent = Caller(LOCAL, SECRET), [b""]
    lines = st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 503 X\r\n\r\n", CHUNKED, b"", HEAD])

    def send(connection: socket.socket, fake: FakeAgent) -> None:
        connection.sendall(sent[0])

    with agent(send) as fake:

        @settings(max_examples=80, deadline=None)
        @given(lines, st.binary(max_size=200))
        def try_one(line: bytes, rest: bytes) -> None:
            sent[0] = line + rest
            assert isinstance(call(fake.url, caller), Failed | Busy)

        try_one()


# Where a name leads


Place = tuple[int, int, int, str, tuple[Any, ...]]
UNROUTED = "3ffe::1"
"""Public by the rules, and given back to IANA: nobody is there."""


def place(address: str, port: int) -> Place:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    rest = (0, 0) if ":" in address else ()
    return (family, socket.SOCK_STREAM, 6, "", (address, port, *rest))


@dataclass
class Resolver:
    """Leads every name to the next of `answers`, and to the last one from then on."""

    answers: list[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int, **_: Any) -> list[Place]:
        addresses = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(host)
        return [place(address, port) for address in addresses]


def test_a_name_that_is_rebound_never_leads_to_loopback() -> None:
    resolver = Resolver([[UNROUTED], ["127.0.0.1"]])
    with agent(http(200, DONE)) as fake:
        caller = Caller(UrlPolicy(), SECRET, resolve=resolver)
        url = f"http://evil.example:{fake.port}/"
        first = call(url, caller, timeout_seconds=SHORT)
        assert isinstance(first, Failed) and first.code in ("agent_unreachable", "timeout")
        assert resolver.asked == ["evil.example"]
        said = failed(call(url, caller), "url_refused", retryable=False)
    assert "127.0.0.1" in said and "OPSCORE_AGENT_HOSTS" in said
    assert fake.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], [UNROUTED, "127.0.0.1"], ["127.0.0.1", UNROUTED], ["::ffff:127.0.0.1"]],
)
def test_one_address_that_is_not_public_is_enough_to_refuse_a_name(addresses: list[str]) -> None:
    with agent(http(200, DONE)) as fake:
        caller = Caller(UrlPolicy(("127.0.0.1",)), SECRET, resolve=Resolver([addresses]))
        answer = call(f"http://evil.example:{fake.port}/", caller, timeout_seconds=SHORT)
    failed(answer, "url_refused", retryable=False)
    assert fake.connections == 0


def test_a_listed_name_may_lead_anywhere() -> None:
    resolver = Resolver([["127.0.0.1"]])
    with agent(http(200, DONE)) as fake:
        caller = Caller(UrlPolicy(("*.agents.internal",)), SECRET, resolve=resolver)
        url = f"http://One.agents.internal:{fake.port}/"
        assert call(url, caller) == Completed("done")
    assert fake.seen[0].headers["Host"] == f"one.agents.internal:{fake.port}"


def test_the_next_address_is_tried_where_nobody_answers() -> None:
    resolver = Resolver([["127.0.0.2", "127.0.0.1"]])
    with agent(http(200, DONE)) as fake:
        caller = Caller(UrlPolicy(("agent",)), SECRET, resolve=resolver)
        assert call(f"http://agent:{fake.port}/", caller) == Completed("done")


def test_a_name_that_leads_nowhere_may_be_tried_again() -> None:
    def unknown(*_: Any, **__: Any) -> list[Place]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    said = failed(
        call("http://agent.example/", Caller(UrlPolicy(), SECRET, resolve=unknown)),
        "agent_unreachable",
    )
    assert "Name or service not known" in said
    nowhere = Caller(UrlPolicy(), SECRET, resolve=Resolver([[]]))
    assert "no address" in failed(call("http://agent.example/", nowhere), "agent_unreachable")


def test_a_faulty_url_is_refused_before_its_name_is_looked_up() -> None:
    resolver = Resolver([["127.0.0.1"]])
    with agent(http(200, DONE)) as fake:
        caller = Caller(UrlPolicy(), SECRET, resolve=resolver)
        failed(call(fake.url, caller), "url_refused", retryable=False)
        failed(call("ftp://user@agent.example/", caller), "url_refused", retryable=False)
    assert (resolver.asked, fake.connections) == ([], 0)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of agent.internal that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "certificate.pem", folder / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=agent.internal", "-addext", "subjectAltName=DNS:agent.internal"]
    command = ["openssl", "req", "-x509", *kind, *name, "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made, key


def over_tls(certificate: tuple[Path, Path]) -> Script:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def script(connection: socket.socket, fake: FakeAgent) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            fake.seen.append(_read_request(secured))
            secured.sendall(http(200, DONE))

    return script


def test_the_certificate_must_be_the_names_not_the_address_s(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    policy = UrlPolicy(("*.internal",))
    caller = Caller(policy, SECRET, resolve=Resolver([["127.0.0.1"]]))
    with agent(over_tls(certificate), reads=False) as fake:
        good = call(f"https://agent.internal:{fake.port}/", caller)
        bad = call(f"https://other.internal:{fake.port}/", caller)
    assert good == Completed("done") and len(fake.seen) == 1
    assert "certificate" in failed(bad, "agent_unreachable")


def test_a_certificate_nobody_vouches_for_is_refused(certificate: tuple[Path, Path]) -> None:
    caller = Caller(UrlPolicy(("*.internal",)), SECRET, resolve=Resolver([["127.0.0.1"]]))
    with agent(over_tls(certificate), reads=False) as fake:
        answer = call(f"https://agent.internal:{fake.port}/", caller)
    assert fake.seen == []
    assert "certificate" in failed(answer, "agent_unreachable")


@pytest.mark.parametrize("script", [silence, drip(b"\x16\x03\x03\x40\x00" + b"x" * 500)])
def test_a_slow_handshake_does_not_outlast_the_attempt(script: Script) -> None:
    with agent(script, reads=False) as fake:
        url = f"https://127.0.0.1:{fake.port}/"
        failed(in_time(lambda: call(url, timeout_seconds=SHORT)), "timeout")


def test_an_agent_without_tls_may_be_tried_again() -> None:
    with agent(http(200, DONE), reads=False) as fake:
        failed(call(f"https://127.0.0.1:{fake.port}/"), "agent_unreachable")
