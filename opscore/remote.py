"""What opscore and agents behind HTTP have to agree on: signatures of both directions, which URLs
may be called, what is sent, and what is reported. The call itself is `remote_call`.
"""

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

from opscore.agentkit.calling import MAX_RETRY_AFTER_SECONDS, Busy, Completed, Failed, Outcome
from opscore.agentkit.context import MAX_MESSAGE_BYTES, storable_text
from opscore.agentkit.output import Unstorable, to_json
from opscore.errors import AgentBusy
from opscore.json_values import kind

AGENT_PREFIX = "X-AgentKit"
"""Of the headers that sign what agents send to us."""
OUR_PREFIX = "X-OpsCore"
"""Of the headers that sign what we send to agents."""
SIGNATURE_SECONDS = 300
"""How far a signature's timestamp may be from now, either way."""


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
WAY_IN = "list the host in OPSCORE_AGENT_HOSTS if agents may be there."


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
        import httpx2  # megabytes that a worker without such agents need not hold

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
            return f"The host {host} is not on the public network: {WAY_IN}"
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
_FINAL_CODES = ("gave_up", "invalid_output", "output_too_large")
"""Not retryable when a function agent's attempt ends with them, so not here either."""


def read_report(body: Mapping[str, Any]) -> Outcome:
    """Turn `{"status", "result", "error"}` into an outcome.

    An error is text or `{"code", "message", "retryAfter"}`; the code `agent_busy` says that the
    agent took no work after all.

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
        return failure(error.code, str(error), retryable=False)


def _failed(error: object) -> Failed | Busy:
    given = error if isinstance(error, Mapping) else {"message": error}
    said, message = given.get("code") or "agent_error", given.get("message")
    if not isinstance(said, str) or not isinstance(message, str | None):
        raise ValueError("The error must be text, or an object whose code and message are text.")
    code, wait = said.lower(), _wait(given.get("retryAfter"))
    if code == AgentBusy.code:
        return Busy(wait)
    text = message or "The agent reported a failure and did not say why."
    if not _CODE.fullmatch(code):
        code, text = "agent_error", f"{said[:64]}: {text}"
    return failure(code, text, retryable=code not in _FINAL_CODES, retry_after=wait)


def _wait(seconds: Any) -> float | None:
    if seconds is None:
        return None
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not seconds >= 0:  # NaN is none either
        raise ValueError("The error's retryAfter must be a number of seconds from 0.")
    return float(min(seconds, MAX_RETRY_AFTER_SECONDS))


def failure(
    code: str, message: str, *, retryable: bool = True, retry_after: float | None = None
) -> Failed:
    text = storable_text(message, MAX_MESSAGE_BYTES)
    return Failed(code, text, retryable=retryable, retry_after=retry_after)


# --- what is sent, and what comes of it


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
    agent_id: str | None = None
    recalls: bool = False
    """Nobody wants the attempt any more: `payload` is null, and any answer will do."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The agent took the work and will report later."""


Answer = Outcome | Accepted
