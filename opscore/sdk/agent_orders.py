"""What comes to an agent server over HTTP: bodies, orders, and the problems that answer bad ones.

Everything that counts is read from the body, which is signed; headers are not.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http import HTTPStatus
from typing import Any, NamedTuple
from wsgiref.types import InputStream, WSGIEnvironment

from opscore.remote import OUR_PREFIX, check_signature, read_timestamp

CHUNK_BYTES = 64 * 1024
MOST_SECONDS = 365 * 86_400.0
"""A task has no more time than this, whatever its deadline."""


class Reply(NamedTuple):
    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = {}


class Problem(Exception):
    """The request is refused; in keywords of headers `_` stands for `-`."""

    def __init__(self, status: int, code: str, detail: str, **headers: str) -> None:
        super().__init__(detail)
        told = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = Reply(status, {**told, "detail": detail, "code": code}, named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One attempt at a task, which has `seconds` from now to `deadline`.

    `task_id` is the same for all attempts, and their Idempotency-Key.
    """

    task_id: str
    run_id: str
    token: str
    attempt: int
    parameters: dict[str, Any]
    deadline: datetime
    seconds: float
    request_id: str | None = None
    traceparent: str | None = None
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self.parameters, sort_keys=True)
        object.__setattr__(self, "digest", sha256(text.encode()).digest())

    def follows(self, token: str, attempt: int) -> bool:
        """Tell whether this attempt came after that one, which is over then."""
        return self.token != token and self.attempt >= attempt


def read_body(environ: WSGIEnvironment, most: int) -> bytes:
    """Read the body, of at most so many bytes. Raises Problem."""
    given = environ.get("CONTENT_LENGTH") or ""
    if not given and environ["REQUEST_METHOD"] in ("POST", "PUT", "PATCH"):
        raise Problem(411, "length_required", "Send the body's length as Content-Length.")
    if given and not (given.isascii() and given.isdecimal()):
        raise Problem(400, "bad_request", "The Content-Length is no number.")
    source, length = environ["wsgi.input"], int(given[:20] or 0)
    if length > most:
        _skip(source, min(length, 4 * most))  # who still sends hears no answer
        sentence = f"The body has {length:,} bytes; at most {most:,} bytes are read."
        raise Problem(413, "body_too_large", sentence)
    body = b""
    with suppress(OSError):
        body = source.read(length) if length else b""
    if len(body) < length:
        raise Problem(400, "bad_request", "The body is shorter than its Content-Length.")
    return body


def _skip(source: InputStream, length: int) -> None:
    with suppress(OSError):
        while length > 0 and (chunk := source.read(min(length, CHUNK_BYTES))):
            length -= len(chunk)


def check_proof(environ: WSGIEnvironment, body: bytes, secret: str) -> datetime:
    """Return when opscore signed this. Raises Problem if it did not, or not just now."""
    timestamp, signature = (
        environ.get(f"HTTP_{OUR_PREFIX}-{name}".replace("-", "_").upper())
        for name in ("Timestamp", "Signature")
    )
    now = datetime.now(UTC)
    if fault := check_signature(secret, timestamp, signature, body, now, OUR_PREFIX):
        raise Problem(401, "unauthorized", fault, WWW_Authenticate=f"{OUR_PREFIX}-Signature")
    return read_timestamp(timestamp or "")


def read_message(body: bytes) -> dict[str, Any]:
    """Read what opscore signed. Raises Problem."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "invalid_json", f"The body is no JSON: {error}.") from None
    if not isinstance(message, dict):
        raise Problem(400, "invalid_order", "The body must be an object.")
    if message.get("messageType") not in ("workflow_task", "workflow_cancel"):
        sentence = "The messageType must be workflow_task or workflow_cancel."
        raise Problem(400, "invalid_order", sentence)
    return message


def read_order(
    message: Mapping[str, Any], signed_at: datetime, environ: WSGIEnvironment | None = None
) -> Order:
    """Read a task. How much time it has is a matter of opscore's clock alone. Raises Problem.

    `environ` has the ids by which it is followed, and nothing else of what it is.
    """
    values = {path: _member(message, path) for path in _MEMBERS}
    faults = [
        f"{path} must be {_WORDS[kind]}."
        for path, kind in _MEMBERS.items()
        if type(values[path]) is not kind
    ]
    if faults:
        raise Problem(400, "invalid_order", " ".join(faults))
    task_id, run_id, token, parameters, attempt, deadline = values.values()
    try:
        left = (read_timestamp(deadline) - signed_at).total_seconds()
    except ValueError as error:
        raise Problem(400, "invalid_order", f"sessionContext.deadline {error}") from None
    seconds = min(left, MOST_SECONDS)
    return Order(
        task_id=task_id,
        run_id=run_id,
        token=token,
        attempt=attempt,
        parameters=parameters,
        deadline=datetime.now(UTC) + timedelta(seconds=seconds),
        seconds=seconds,
        request_id=(environ or {}).get("HTTP_X_REQUEST_ID"),
        traceparent=(environ or {}).get("HTTP_TRACEPARENT"),
    )


_MEMBERS = {
    "opscore_task_id": str,
    "opscore_session_id": str,
    "opscore_attempt_token": str,
    "payload": dict,
    "sessionContext.attempt": int,
    "sessionContext.deadline": str,
}
_WORDS = {str: "text", int: "a number", dict: "an object"}


def _member(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = message.get(name) if isinstance(message, dict) else None
    return message
