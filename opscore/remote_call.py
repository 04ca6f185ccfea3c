"""The call of an agent behind HTTP.

It has one connection of its own: to an address that was checked, and up to its deadline. It follows
no redirect, uses no proxy, and trusts nothing of what comes back. What an answer means for the task
is decided in the engine.
"""

import json
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Thread
from time import monotonic
from typing import Any

import httpcore2
import httpx2

from opscore import tracing
from opscore.agentkit.calling import MAX_RETRY_AFTER_SECONDS, Busy, Failed, Outcome
from opscore.agentkit.context import storable_text
from opscore.json_values import MAX_TEXT_BYTES, MAX_VALUE_BYTES, kind, read_json
from opscore.remote import (
    OUR_PREFIX,
    WAY_IN,
    Accepted,
    Answer,
    Order,
    UrlPolicy,
    failure,
    read_report,
    signed_headers,
)

MAX_WIRE_BYTES = 2 * MAX_TEXT_BYTES
"""Of everything an agent sends in one call: heads and the framing of chunks have limits too."""
CONNECT_SECONDS = 10.0
"""For one address; an agent's name may have others."""
EXCERPT_BYTES = 500
"""Of an answer whose status says enough, for the error's message."""
EXCERPT_SECONDS = 2.0
"""For reading that. Agents whose client hangs up before that may drop what they began."""

Resolve = Callable[..., Sequence[tuple[int, int, int, str, tuple[Any, ...]]]]
"""Shaped like `socket.getaddrinfo`."""

_BUSY = (409, 423, 429, 503)


class Refused(Exception):
    """A name leads to where calls may not go."""


class InvalidAnswer(Exception):
    """What came is no answer; the message says why."""


class Caller:
    """Calls agents; one for a process, for all of its threads."""

    def __init__(
        self, policy: UrlPolicy, secret: str, *, resolve: Resolve = socket.getaddrinfo
    ) -> None:
        self._policy, self._secret, self._resolve = policy, secret, resolve
        self._tls = httpcore2.default_ssl_context()

    def call(self, order: Order) -> Answer:
        """Send `order` and return what came of it; never raises for what agent or network do.

        `Failed.code` is what `read_report` gives, or `agent_refused`, `agent_redirected`,
        `agent_failed`, `agent_unreachable`, `timeout`, `invalid_answer` or `url_refused`. Not
        retryable are `agent_refused`, `output_too_large` and `url_refused`.
        """
        if faults := self._policy.faults(order.url):
            return failure("url_refused", " ".join(faults), retryable=False)
        line = Line(self._policy, self._resolve, order.timeout_seconds)
        with tracing.part("POST", "client", _about(order)) as span:
            answer = self._answered(order, line, span)
            if isinstance(answer, Failed):
                span.fail(answer.code)
        return answer

    def _answered(self, order: Order, line: "Line", span: tracing.Span) -> Answer:
        try:
            return self._exchange(order, line, span)
        except Refused as refused:
            return failure("url_refused", str(refused), retryable=False)
        except InvalidAnswer as error:
            return failure("invalid_answer", f"The agent's answer is invalid: {error}")
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            return line.failure_of(error)
        finally:
            line.close()

    def _exchange(self, order: Order, line: "Line", span: tracing.Span) -> Answer:
        body = _body(order)
        url = httpx2.URL(order.url)
        target = httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        proof = signed_headers(self._secret, OUR_PREFIX, body, datetime.now(UTC))
        headers = [("Host", url.netloc.decode()), *_headers(order).items(), *proof.items()]
        connection = httpcore2.HTTPConnection(
            target.origin, ssl_context=self._tls, network_backend=line
        )
        with connection.stream("POST", target, headers=headers, content=body) as response:
            span.set(http__response__status_code=response.status)
            return _answer(response, line)


def _about(order: Order) -> dict[str, Any]:
    """Return what a span says of a call: the URL without its query, which may hold a secret."""
    url = httpx2.URL(order.url)
    return {
        "http.request.method": "POST",
        "server.address": url.host,
        "server.port": url.port or {"http": 80, "https": 443}[url.scheme],
        "url.full": str(url.copy_with(query=None, fragment=None)),
        "opscore.agent_id": order.agent_id,
    }


def _body(order: Order) -> bytes:
    message = {
        "senderId": "opscore",
        "messageType": "workflow_cancel" if order.recalls else "workflow_task",
        "payload": order.payload,
        "task_name": order.task_name,
        "opscore_session_id": order.run_id,
        "opscore_task_id": order.task_id,
        "opscore_attempt_token": order.token,
        "sessionContext": {
            "workflowId": order.workflow_id,
            "version": order.version,
            "attempt": order.attempt,
            "deadline": order.deadline.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "index": order.index,
        },
    }
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def _headers(order: Order) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": "opscore",
        # One for all attempts at the task; taking one back is another matter.
        "Idempotency-Key": order.task_id + (f".cancel.{order.attempt}" if order.recalls else ""),
        "X-OpsCore-Attempt": str(order.attempt),
    }
    carried = {"X-Request-ID": order.request_id, "traceparent": tracing.current()}
    return headers | {name: value for name, value in carried.items() if value}


def _answer(response: httpcore2.Response, line: "Line") -> Answer:
    status = response.status
    headers = {name.lower().decode(): value.decode("latin-1") for name, value in response.headers}
    if status == 200:
        return _report_of(response, headers)
    excerpt = _excerpt(response, line)
    if status == 202:
        return Accepted()
    if status in _BUSY:
        return Busy(_retry_after(headers))
    if status < 300:
        raise InvalidAnswer(f"status {status}; answer 200 with a result, or 202 to report later.")
    said = f"The agent answered {status}" + (f": {excerpt}" if excerpt else ".")
    if status < 400:
        place = headers.get("location", "nowhere")[:EXCERPT_BYTES]
        way_out = "Redirects are not followed: register the URL that does the work."
        return failure("agent_redirected", f"{said} It points to {place}. {way_out}")
    if status < 500:
        return failure("agent_refused", said, retryable=False)
    return failure("agent_failed", said, retry_after=_retry_after(headers))


def _report_of(response: httpcore2.Response, headers: Mapping[str, str]) -> Outcome:
    encoding = headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise InvalidAnswer(f"it is encoded ({encoding[:64]}), and only identity is accepted.")
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > MAX_TEXT_BYTES:
            return _too_large()
    try:
        report = read_json(bytes(body))
        if not isinstance(report, dict):
            raise ValueError(f"It must be an object, not {kind(report)}.")
        return read_report(report)
    except ValueError as error:
        raise InvalidAnswer(str(error)) from None


def _too_large() -> Failed:
    sentence = (
        f"The agent's answer is larger than {MAX_TEXT_BYTES:,} bytes; a result may take"
        f" {MAX_VALUE_BYTES:,} bytes as JSON."
    )
    return failure("output_too_large", sentence, retryable=False)


def _excerpt(response: httpcore2.Response, line: "Line") -> str:
    """Read a little of an answer whose status says enough; what goes wrong ends it."""
    line.deadline = min(line.deadline, monotonic() + EXCERPT_SECONDS)
    said = b""
    with suppress(OSError, httpcore2.ProtocolError, InvalidAnswer):
        for chunk in response.iter_stream():
            said += chunk
            if len(said) > EXCERPT_BYTES:
                break
    words = "".join(c if c.isprintable() else " " for c in said.decode(errors="replace")).split()
    return storable_text(" ".join(words), EXCERPT_BYTES)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given, re.ASCII):
        return min(float(given), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(given)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, min((aware - datetime.now(UTC)).total_seconds(), MAX_RETRY_AFTER_SECONDS))


class Line(httpcore2.NetworkBackend, httpcore2.NetworkStream):
    """The one connection of a call: to a checked address only, and up to its deadline only.

    The timeouts httpcore passes begin anew with every byte, so they are not what counts here.
    """

    def __init__(self, policy: UrlPolicy, resolve: Resolve, seconds: float) -> None:
        self._policy, self._resolve, self._seconds = policy, resolve, seconds
        self._socket: socket.socket | None = None
        self._received = 0
        self._has_ended = False
        self.deadline = monotonic() + seconds

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> "Line":
        """Connect to the first of the host's addresses that answers; all of them must be permitted.

        Raises:
            Refused
        """
        places = _in_time(self._left(), lambda: self._resolve(host, port, type=socket.SOCK_STREAM))
        for *_rest, (address, *_port) in places:
            if not self._policy.permits(host, address):
                raise Refused(f"The host {host} leads to {address}, no public address: {WAY_IN}")
        error: OSError = OSError("The name has no address.")
        for family, _type, _protocol, _name, place in places:
            try:
                self._connect(family, place)
                return self
            except OSError as failed:
                self.close()
                error = failed
        raise error

    def _connect(self, family: int, place: tuple[Any, ...]) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(min(self._left(), CONNECT_SECONDS))
        self._socket.connect(place)
        # Head and body are sent one after the other; Nagle would hold the body back.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, *_: Any, **__: Any
    ) -> "Line":
        secured = ssl_context.wrap_socket(
            self._limited(), server_hostname=server_hostname, do_handshake_on_connect=False
        )
        self._socket = secured
        secured.do_handshake()
        return self

    def read(self, max_bytes: int, *_: Any, **__: Any) -> bytes:
        data = self._limited().recv(max_bytes)
        self._received += len(data)
        self._has_ended = not data
        if self._received > MAX_WIRE_BYTES:
            raise InvalidAnswer(f"it takes more than {MAX_WIRE_BYTES:,} bytes to send.")
        return data

    def write(self, buffer: bytes, *_: Any, **__: Any) -> None:
        rest = memoryview(buffer)
        while rest:
            try:
                rest = rest[self._limited().send(rest) :]
            except ConnectionError as error:  # httpcore then looks for an answer, such as 413
                raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def failure_of(self, error: Exception) -> Failed:
        """Say what an error on this line came from."""
        if monotonic() >= self.deadline:
            return failure("timeout", f"The agent did not finish within {self._seconds:g} s.")
        reason = storable_text(getattr(error, "strerror", None) or error, EXCERPT_BYTES)
        if isinstance(error, httpcore2.ProtocolError) and not self._has_ended:
            return failure("invalid_answer", f"The agent's answer is no HTTP: {reason}")
        return failure("agent_unreachable", f"The connection to the agent failed: {reason}")

    def _limited(self) -> socket.socket:
        assert self._socket is not None
        self._socket.settimeout(self._left())
        return self._socket

    def _left(self) -> float:
        left = self.deadline - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


def _in_time(seconds: float, resolve: Callable[[], Any]) -> Any:
    """Call `resolve` in a thread of its own: resolvers know no timeout, and may take minutes.

    Raises:
        TimeoutError
    """
    found: Future[Any] = Future()

    def work() -> None:
        try:
            found.set_result(resolve())
        except Exception as error:
            found.set_exception(error)

    Thread(target=work, name="opscore-resolve", daemon=True).start()
    return found.result(seconds)
