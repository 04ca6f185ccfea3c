"""Agents behind HTTP: the signatures of both directions, which URLs may be called, and the call.

A call has one connection of its own: to an address that was checked, and up to its deadline. It
follows no redirect, uses no proxy, and trusts nothing of what comes back. What an answer means for
the task is decided in the engine; there is no database in here.
"""

import hmac
import json
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Thread
from time import monotonic
from typing import Any

import httpcore2
import httpx2

from opscore.agentkit.calling import MAX_RETRY_AFTER_SECONDS, Busy, Completed, Failed
from opscore.agentkit.context import MAX_MESSAGE_BYTES, storable_text
from opscore.agentkit.output import Unstorable, to_json
from opscore.json_values import kind, read_json

AGENT_PREFIX = "X-AgentKit"
"""Of the headers that sign what agents send to us."""
OUR_PREFIX = "X-OpsCore"
"""Of the headers that sign what we send to agents."""
SIGNATURE_SECONDS = 300
"""How far a signature's timestamp may be from now, either way."""

MAX_ANSWER_BYTES = 1_048_576
MAX_WIRE_BYTES = 2 * MAX_ANSWER_BYTES
"""Of everything an agent sends in one call: heads and the framing of chunks have limits too."""
CONNECT_SECONDS = 10.0
"""For one address; an agent's name may have others."""
EXCERPT_BYTES = 500
"""Of an answer whose status says enough, for the error's message."""
EXCERPT_SECONDS = 2.0
"""For reading that. Agents whose client hangs up before that may drop what they began."""

Resolve = Callable[..., Sequence[tuple[int, int, int, str, tuple[Any, ...]]]]
"""Shaped like `socket.getaddrinfo`."""


# --- signatures


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return the lower-case hex HMAC-SHA256 of timestamp, "." and body."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, "sha256").hexdigest()


def signed_headers(secret: str, prefix: str, body: bytes, now: datetime) -> dict[str, str]:
    """Return the two headers that prove who sent `body`, and when."""
    timestamp = str(int(now.timestamp()))
    return {f"{prefix}-Timestamp": timestamp, f"{prefix}-Signature": sign(secret, timestamp, body)}


def check_signature(
    secret: str,
    timestamp: str | None,
    signature: str | None,
    body: bytes,
    now: datetime,
    prefix: str = AGENT_PREFIX,
) -> str | None:
    """Say what is wrong with a signature and how to mend it; None means that it is right."""
    if not secret:  # anybody can sign with an empty one
        return "No signature is right while OPSCORE_WEBHOOK_SECRET is not set: set it."
    for name, given in (("Timestamp", timestamp), ("Signature", signature)):
        if not given:
            return f"The header {prefix}-{name} is missing: sign the request."
    assert timestamp and signature
    try:
        age = abs((read_timestamp(timestamp) - now).total_seconds())
    except ValueError as error:
        return f"{prefix}-Timestamp {error}"
    if age > SIGNATURE_SECONDS:
        return (
            f"{prefix}-Timestamp is more than {SIGNATURE_SECONDS} s from now, which is "
            f"{now.astimezone(UTC):%FT%TZ}: sign each request anew, and set the sender's clock."
        )
    expected = sign(secret, timestamp, body)
    if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
        return (
            f"{prefix}-Signature does not match: send the lower-case hex HMAC-SHA256, keyed with "
            'OPSCORE_WEBHOOK_SECRET, of the timestamp as sent, "." and the body\'s very bytes.'
        )
    return None


def read_timestamp(timestamp: str) -> datetime:
    """Return when something was signed. Raises ValueError, the end of a sentence about it."""
    way_out = "send seconds since 1970, or ISO 8601 such as 2026-01-31T12:00:00Z."
    if re.fullmatch(r"\d+(\.\d+)?", timestamp, re.ASCII):
        return _since_1970(float(timestamp))
    try:
        moment = datetime.fromisoformat(timestamp if timestamp.isascii() else "")
    except ValueError:
        raise ValueError(f"cannot be read: {way_out}") from None
    if moment.tzinfo is None:
        raise ValueError(f"names no time zone: {way_out}")
    return moment


def _since_1970(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # milliseconds, for example
        return datetime.max.replace(tzinfo=UTC)


# --- which URLs may be called

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}", re.ASCII)
_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)", re.ASCII)
"""No name ends like this, but resolvers read 127.1, 0x7f000001 and 2130706433 as addresses."""
_WAY_IN = "list the host in OPSCORE_AGENT_HOSTS if agents may be there."


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Which URLs agents may have. `allowed_hosts`: fnmatch patterns of hosts that may be anywhere.

    Other hosts must have public addresses only.
    """

    allowed_hosts: tuple[str, ...] = ()

    def faults(self, url: str) -> list[str]:
        """Say what is wrong with a URL as it is written; names are not resolved."""
        if any(character.isspace() or not character.isprintable() for character in url):
            return ["The URL holds a space or a control character: write it percent-encoded."]
        try:
            parts = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            return [f"The URL cannot be read ({error}): write it as in https://agent.example/task."]
        checks = (
            (parts.scheme in ("http", "https"), "The URL must begin with http:// or https://."),
            (not parts.userinfo, "The URL must hold no credentials: requests are signed instead."),
            (
                parts.port is None or 1 <= parts.port <= 65535,
                "The URL's port must be between 1 and 65535.",
            ),
        )
        faults = [sentence for good, sentence in checks if not good]
        host_fault = self._host_fault(parts.raw_host.decode().removesuffix("."))
        return [*faults, host_fault] if host_fault else faults

    def permits(self, host: str, address: str) -> bool:
        """Say whether a call to `host` may connect to `address`."""
        return self._allows(host) or _is_public(ip_address(address))

    def _host_fault(self, host: str) -> str | None:
        address = _literal(host)
        if not host:
            return "The URL names no host: write it as in https://agent.example/task."
        if address is None and _NUMBER.fullmatch(host):
            return f"The host {host[:64]} is an address in disguise: write it as four numbers."
        if address is None and not _NAME.fullmatch(host):
            return "The URL's host is no host name: use letters, digits, '-', '_' and '.'."
        is_local = f".{host}".endswith(".localhost")
        if (is_local or (address and not _is_public(address))) and not self._allows(host):
            return f"The host {host} is not on the public network: {_WAY_IN}"
        return None

    def _allows(self, host: str) -> bool:
        host = str(_literal(host) or host.removesuffix("."))
        patterns = [pattern.lower() for pattern in self.allowed_hosts]
        # The brackets of an IPv6 address, as URLs have them, would be a choice to fnmatch.
        bare = [pattern.strip("[]") if ":" in pattern else pattern for pattern in patterns]
        return any(fnmatchcase(host, pattern) for pattern in bare)


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return None if "%" in host else ip_address(host)
    except ValueError:
        return None


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner or address in _NAT64:
            return _is_public(inner or IPv4Address(int(address) & 0xFFFF_FFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


# --- what agents report

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_FINAL_CODES = ("gave_up", "invalid_output")
"""Not retryable when a function agent's attempt ends with them, so not here either."""


def read_report(body: Mapping[str, Any]) -> Completed | Failed:
    """Turn `{"status", "result", "error"}` into an outcome.

    Raises:
        ValueError: it is none; the sentence says why.
    """
    match body.get("status"), body.get("result"), body.get("error"):
        case "completed" | "success", result, _:
            return _completed(result)
        case "failed" | "error", _, error:
            return _failed(error)
        case None, result, None if "result" in body:
            return _completed(result)
        case None, None, error if error is not None:
            return _failed(error)
        case None, _, _:
            raise ValueError("Without a status there must be either a result or an error.")
        case status, _, _:
            told = repr(status[:64]) if isinstance(status, str) else kind(status)
            raise ValueError(f"The status must be completed or failed, not {told}.")


def _completed(result: object) -> Completed | Failed:
    try:
        return Completed(to_json(result))
    except Unstorable as error:
        return _failure("invalid_output", str(error), retryable=False)


def _failed(error: object) -> Failed:
    given = error if isinstance(error, Mapping) else {"message": error}
    code, message = given.get("code") or "agent_error", given.get("message")
    if not isinstance(code, str) or not isinstance(message, str | None):
        raise ValueError("The error must be text, or an object whose code and message are text.")
    text = message or "The agent reported a failure and did not say why."
    if not _CODE.fullmatch(code.lower()):
        code, text = "agent_error", f"{code[:64]}: {text}"
    return _failure(code.lower(), text, retryable=code.lower() not in _FINAL_CODES)


def _failure(
    code: str, message: str, *, retryable: bool = True, retry_after: float | None = None
) -> Failed:
    text = storable_text(message, MAX_MESSAGE_BYTES)
    return Failed(code, text, retryable=retryable, retry_after=retry_after)


# --- the call

_BUSY = (409, 423, 429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One attempt at a task, to be sent. `timeout_seconds` is what is left until `deadline`."""

    url: str
    payload: Any
    task_name: str
    run_id: str
    task_id: str
    token: str
    attempt: int
    deadline: datetime
    timeout_seconds: float
    workflow_id: str
    version: int
    index: int | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The agent took the work and will report later."""


Answer = Completed | Failed | Busy | Accepted


class _Refused(Exception):
    """A name leads to where calls may not go."""


class _InvalidAnswer(Exception):
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
        retryable are `agent_refused` and `url_refused`.
        """
        if faults := self._policy.faults(order.url):
            return _failure("url_refused", " ".join(faults), retryable=False)
        line = _Line(self._policy, self._resolve, order.timeout_seconds)
        try:
            return self._exchange(order, line)
        except _Refused as refused:
            return _failure("url_refused", str(refused), retryable=False)
        except _InvalidAnswer as error:
            return _failure("invalid_answer", f"The agent's answer is invalid: {error}")
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            return line.failure(error)
        finally:
            line.close()

    def _exchange(self, order: Order, line: "_Line") -> Answer:
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
            return _answer(response, line)


def _body(order: Order) -> bytes:
    message = {
        "senderId": "opscore",
        "messageType": "workflow_task",
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
        "Idempotency-Key": order.task_id,
        "X-OpsCore-Attempt": str(order.attempt),
    }
    return headers | ({"X-Request-ID": order.request_id} if order.request_id else {})


def _answer(response: httpcore2.Response, line: "_Line") -> Answer:
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
        raise _InvalidAnswer(f"status {status}; answer 200 with a result, or 202 to report later.")
    said = f"The agent answered {status}" + (f": {excerpt}" if excerpt else ".")
    if status < 400:
        place = headers.get("location", "nowhere")[:EXCERPT_BYTES]
        way_out = "Redirects are not followed: register the URL that does the work."
        return _failure("agent_redirected", f"{said} It points to {place}. {way_out}")
    if status < 500:
        return _failure("agent_refused", said, retryable=False)
    return _failure("agent_failed", said, retry_after=_retry_after(headers))


def _report_of(response: httpcore2.Response, headers: Mapping[str, str]) -> Completed | Failed:
    encoding = headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise _InvalidAnswer(f"it is encoded ({encoding[:64]}), and only identity is accepted.")
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise _InvalidAnswer(f"it is larger than {MAX_ANSWER_BYTES:,} bytes.")
    try:
        report = read_json(bytes(body))
        if not isinstance(report, dict):
            raise ValueError(f"It must be an object, not {kind(report)}.")
        return read_report(report)
    except ValueError as error:
        raise _InvalidAnswer(str(error)) from None


def _excerpt(response: httpcore2.Response, line: "_Line") -> str:
    """Read a little of an answer whose status says enough; what goes wrong ends it."""
    line.deadline = min(line.deadline, monotonic() + EXCERPT_SECONDS)
    said = b""
    with suppress(OSError, httpcore2.ProtocolError, _InvalidAnswer):
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


class _Line(httpcore2.NetworkBackend, httpcore2.NetworkStream):
    """The one connection of a call: to a checked address only, and up to its deadline only.

    The timeouts httpcore passes begin anew with every byte, so they are not what counts here.
    """

    def __init__(self, policy: UrlPolicy, resolve: Resolve, seconds: float) -> None:
        self._policy, self._resolve, self._seconds = policy, resolve, seconds
        self._socket: socket.socket | None = None
        self._received = 0
        self._has_ended = False
        self.deadline = monotonic() + seconds

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> "_Line":
        """Connect to the first of the host's addresses that answers; all of them must be permitted.

        Raises:
            _Refused
        """
        places = _in_time(self._left(), lambda: self._resolve(host, port, type=socket.SOCK_STREAM))
        for *_rest, (address, *_port) in places:
            if not self._policy.permits(host, address):
                raise _Refused(f"The host {host} leads to {address}, no public address: {_WAY_IN}")
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
    ) -> "_Line":
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
            raise _InvalidAnswer(f"it takes more than {MAX_WIRE_BYTES:,} bytes to send.")
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

    def failure(self, error: Exception) -> Failed:
        """Say what an error on this line came from."""
        if monotonic() >= self.deadline:
            return _failure("timeout", f"The agent did not finish within {self._seconds:g} s.")
        reason = storable_text(getattr(error, "strerror", None) or error, EXCERPT_BYTES)
        if isinstance(error, httpcore2.ProtocolError) and not self._has_ended:
            return _failure("invalid_answer", f"The agent's answer is no HTTP: {reason}")
        return _failure("agent_unreachable", f"The connection to the agent failed: {reason}")

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
