"""What both clients decide alike: addresses, what is sent again and when, and how a stream reads.

Nothing here does any I/O; the clients do, each in its own way.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx2

from opscore.sdk.errors import (
    ConnectionError,
    OpsCoreApiError,
    OpsCoreSDKError,
    api_error,
    read_retry_after,
)

PREFIX = "/v1/opscore"
JSON = "application/json"
YAML = "application/yaml"
EVENT_STREAM = "text/event-stream"
PAGE_SIZE = 200
"""Of lists; the most the API gives."""
RETRIES = 4
"""How often a call is made again, by default."""
BACKOFF_SECONDS = 0.25
"""Before the first time, at most; it doubles with each, with full jitter."""
MAX_BACKOFF_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 60.0
"""Whoever is asked to wait for longer is told so instead."""
RECONNECT_SECONDS = 120.0
"""For so long a stream, or a wait, outlives that the API cannot be reached."""
LONG_POLL_SECONDS = 30.0
SILENCE_SECONDS = 45.0
"""A stream that says nothing for so long is dead: the API says that it lives every 15 s."""

_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
_REFUSED = (429, 503)
"""With these the API says: not now."""
_LOST = (502, 504)
"""With these something between says that it got no answer."""


def root_of(base_url: str) -> str:
    """Return the API's root: with or without a slash at its end, or `/v1`, means the same.

    Raises:
        ValueError: it is no URL of an HTTP server.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"base_url must be as in http://127.0.0.1:8000, not {base_url!r}.")
    if parts.query or parts.fragment:
        raise ValueError(f"base_url must have no query and no fragment: {base_url!r}.")
    root = base_url.rstrip("/").removesuffix(PREFIX).removesuffix("/v1").rstrip("/")
    try:
        httpx2.URL(root)
    except httpx2.InvalidURL as error:
        raise ValueError(f"base_url cannot be read: {error}") from None
    return root


def headers_of(api_key: str) -> dict[str, str]:
    """Return what goes with every call.

    Raises:
        ValueError: there is no key, or no header can hold it.
    """
    if not api_key:
        raise ValueError("api_key is empty.")
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ValueError("api_key holds a character that no key has.")
    return {"Authorization": f"Bearer {api_key}", "User-Agent": f"opscore-sdk/{_version()}"}


def _version() -> str:
    try:
        return version("opscore")
    except PackageNotFoundError:
        return "0"


def path(*parts: str) -> str:
    """Return a path below the prefix; each part is one segment, whatever it holds.

    Raises:
        ValueError: a part is empty, or would be taken for another path.
    """
    for part in parts:
        if part in ("", ".", ".."):
            raise ValueError(f"An id or a name is missing: {part!r} is none.")
    return "/".join([PREFIX, *(quote(part, safe="") for part in parts)])


def given(**members: Any) -> dict[str, Any]:
    """Return those members that are not None: left out, the API's own defaults count."""
    return {name: value for name, value in members.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the API, however often it is sent."""

    method: str
    path: str
    body: Any = None
    media_type: str = JSON
    """Of a body that is text already."""
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    """The same again changes nothing more: it is safe where the first answer was lost."""
    waits: float = 0.0
    """For so many seconds the API may keep the answer back."""

    @classmethod
    def get(cls, path: str, **query: Any) -> "Call":
        return cls("GET", path, query=given(**query), repeatable=True)

    @classmethod
    def start(cls, path: str, body: Any, key: str | None) -> "Call":
        """Return a call that starts work: its key has it start once, however often it is sent."""
        headers = {"Idempotency-Key": key or str(uuid4())}
        return cls("POST", path, body, headers=headers, repeatable=True)

    @classmethod
    def define(cls, path: str, definition: Mapping[str, Any] | str | Path) -> "Call":
        """Return a call that sends a definition: a mapping, the text of one in YAML, or a file."""
        if isinstance(definition, Mapping):
            return cls("POST", path, definition, repeatable=True)
        if isinstance(definition, str):
            return cls("POST", path, definition, YAML, repeatable=True)
        media_type = JSON if definition.suffix == ".json" else YAML
        return cls("POST", path, definition.read_text(), media_type, repeatable=True)

    def content(self) -> tuple[bytes | None, dict[str, str]]:
        """Return the body as it is sent, and the headers."""
        if self.body is None:
            return None, {**self.headers}
        is_text = isinstance(self.body, str)
        text = self.body if is_text else json.dumps(self.body, allow_nan=False)
        return text.encode(), {**self.headers, "Content-Type": self.media_type}


def pause_after(
    outcome: httpx2.Response | ConnectionError, call: Call, tried: int, retries: int
) -> float | None:
    """Return after how many seconds to send a call again; None if it is not to be.

    `tried` is how often it was sent, `retries` how often it may be again.
    """
    if tried > retries:
        return None
    if isinstance(outcome, ConnectionError):
        return backoff(tried) if call.repeatable or not outcome.was_sent else None
    if outcome.status_code not in (*_REFUSED, *(_LOST if call.repeatable else ())):
        return None
    asked = read_retry_after(outcome.headers) or 0.0
    return asked + backoff(tried) if asked <= MAX_RETRY_AFTER_SECONDS else None


def backoff(tried: int) -> float:
    """Return a pause in seconds that grows, and differs between clients."""
    return random.uniform(0, min(BACKOFF_SECONDS * 2 ** min(tried, 16), MAX_BACKOFF_SECONDS))


class Patience:
    """How long a stream, or a wait, outlives that the API is away."""

    def __init__(self) -> None:
        self._tried, self._since = 0, monotonic()

    def reset(self) -> None:
        """It is there."""
        self._tried, self._since = 0, monotonic()

    def pause(self, error: OpsCoreSDKError) -> float:
        """Return the seconds to rest before the next try.

        Raises:
            OpsCoreSDKError: the error itself, if another try would not help, or it is enough.
        """
        is_over = monotonic() - self._since > RECONNECT_SECONDS
        if is_over or not _is_passing(error):
            raise error
        self._tried += 1
        asked = getattr(error, "retry_after", None) or 0.0
        return min(asked, MAX_BACKOFF_SECONDS) + backoff(self._tried)


def _is_passing(error: OpsCoreSDKError) -> bool:
    if isinstance(error, OpsCoreApiError):
        return error.status_code in (*_REFUSED, *_LOST)
    return isinstance(error, ConnectionError)


def read(response: httpx2.Response) -> Any:
    """Return the value an answer holds, None if it has no body.

    Raises:
        OpsCoreApiError: it is no success.
        OpsCoreSDKError: it is no answer of opscore's.
    """
    if not response.is_success:
        raise api_error(response.status_code, response.headers, response.content)
    if not response.content:
        return None
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise OpsCoreSDKError(
            f"What answers at {response.url} is not opscore: its answer is no JSON. Check base_url."
        ) from None


def trouble(error: httpx2.RequestError, root: str) -> ConnectionError:
    """Return what a call means that got no answer."""
    if isinstance(error, httpx2.TimeoutException):
        sentence = f"{root} did not answer in time ({type(error).__name__})."
    else:
        sentence = f"{root} cannot be reached, or broke off: {error or type(error).__name__}"
    return ConnectionError(sentence, was_sent=not isinstance(error, _UNSENT))


def check_stream(response: httpx2.Response) -> None:
    """Make sure that an answer is a stream of events.

    Raises:
        OpsCoreSDKError: it is something else.
    """
    if not response.headers.get("Content-Type", "").startswith(EVENT_STREAM):
        raise OpsCoreSDKError(f"What answers at {response.url} is not opscore. Check base_url.")


class EventParser:
    """Reads Server-Sent Events, line by line: see the WHATWG's HTML standard, section 9.2."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> Iterator[Any]:
        """Take a line without its end; yield the event it completes, if it does."""
        if line == "" and self._data:
            text, self._data = "\n".join(self._data), []
            yield json.loads(text)
        elif line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
