"""What both clients decide alike: addresses, what is sent again and when, and how a stream reads.

Nothing here talks to anybody; the clients do, each in its own way.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
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
"""For so long a stream, or a wait, outlives that the API is away."""
LONG_POLL_SECONDS = 30.0
LARGE_BYTES = 4 * 2**20
"""What has more, the API may refuse by breaking off before it has read it all."""
SILENCE_SECONDS = 45.0
"""A stream that says nothing for so long is dead: the API says that it lives every 15 s."""

LONGEST_PART = 1024
"""Characters of a segment of a path; the API's ids and names are shorter."""

Definition = Mapping[str, Any] | str | Path
"""A workflow: its document, the text of one in YAML or JSON, or the file that holds it."""

_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
_REFUSED = (429,)
"""The API has done nothing."""
_LOST = (502, 503, 504)
"""The API, or something on the way to it, lost what it needs; perhaps after it was done."""


def root_of(base_url: str) -> str:
    """Return the API's root: with or without a slash at its end, or `/v1`, means the same.

    Raises:
        ValueError: it is no URL of an HTTP server.
    """
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("base_url must hold no user and no password: the key is all it takes.")
    is_http = parts.scheme in ("http", "https") and parts.hostname
    if not is_http or any(character.isspace() for character in base_url):
        raise ValueError(f"base_url must be as in http://127.0.0.1:8000, not {base_url!r}.")
    if parts.query or parts.fragment:
        raise ValueError(f"base_url must have no query and no fragment: {base_url!r}.")
    root = base_url.rstrip("/").removesuffix(PREFIX).removesuffix("/v1").rstrip("/")
    try:
        httpx2.URL(root)
    except httpx2.InvalidURL as error:
        raise ValueError(f"base_url cannot be read: {error}") from None
    return root


def seconds_of(timeout: float) -> float:
    """Return the client's timeout.

    Raises:
        ValueError: nothing can be done in it.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, not {timeout!r}.")
    return timeout


def headers_of(api_key: str) -> dict[str, str]:
    """Return what goes with every call.

    Raises:
        ValueError: there is no key, or no header can hold it.
    """
    key = _visible("api_key", api_key)
    return {"Authorization": f"Bearer {key}", "User-Agent": f"opscore-sdk/{_version()}"}


def _visible(name: str, text: str) -> str:
    if not filled(name, text).isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{name} must be of visible ASCII characters, without spaces.")
    return text


def _version() -> str:
    try:
        return version("opscore")
    except PackageNotFoundError:
        return "0"


def path(*parts: str) -> str:
    """Return a path below the prefix; each part is one segment of it.

    Raises:
        ValueError: a part is empty, too long, or would lead elsewhere.
    """
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", "..") or "/" in part:
            raise ValueError(f"{part!r} is no id and no name of anything.")
        if len(part) > LONGEST_PART:
            raise ValueError(f"What begins with {part[:64]!r} is too long for an id or a name.")
    return "/".join([PREFIX, *(quote(part, safe="") for part in parts)])


def given(**members: Any) -> dict[str, Any]:
    """Return those members that are not None: left out, the API's own defaults count."""
    return {name: value for name, value in members.items() if value is not None}


def filled(name: str, text: str) -> str:
    """Return what must not be empty.

    Raises:
        ValueError: it is.
    """
    if not text:
        raise ValueError(f"{name} is empty.")
    return text


def moment(at: datetime | None) -> str | None:
    """Write a moment as the API reads it.

    Raises:
        ValueError: it carries no time zone.
    """
    if at is not None and at.tzinfo is None:
        raise ValueError(f"{at} carries no time zone: use datetime.now(UTC) or the like.")
    return at.isoformat() if at else None


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
        """Return a call that starts work: its key has it start once, however often it is sent.

        Raises:
            ValueError: no header can hold the key.
        """
        key = str(uuid4()) if key is None else _visible("idempotency_key", key)
        return cls("POST", path, body, headers={"Idempotency-Key": key}, repeatable=True)

    @classmethod
    def define(cls, path: str, definition: Definition) -> "Call":
        """Return a call that sends a definition."""
        media_type = YAML
        if isinstance(definition, Path):
            media_type = JSON if definition.suffix == ".json" else YAML
            definition = definition.read_text(encoding="utf-8")
        return cls("POST", path, definition, media_type, repeatable=True)

    def content(self) -> tuple[bytes | None, dict[str, str]]:
        """Return the body as it is sent, and the headers.

        Raises:
            ValueError: it cannot be written as JSON.
        """
        if self.body is None:
            return None, {**self.headers}
        if isinstance(self.body, str):
            return self.body.encode(), {**self.headers, "Content-Type": self.media_type}
        return _json(self.body), {**self.headers, "Content-Type": JSON}


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"This cannot be sent as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"there is none for a {type(value).__name__}")


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
    """Return a pause in seconds that grows, and differs between clients; none after no try."""
    most = BACKOFF_SECONDS * 2.0 ** min(tried - 1, 16) if tried else 0.0
    return random.uniform(0, min(most, MAX_BACKOFF_SECONDS))


class Patience:
    """How often, and for how long, a stream or a wait is tried again."""

    def __init__(self) -> None:
        self._in_vain = 0
        self._away_since: float | None = None

    def answered(self) -> None:
        """The API is there; from now on it may be away for as long again."""
        self._away_since = None

    def moved(self) -> None:
        """It went as it should: the next try is made at once."""
        self._in_vain, self._away_since = 0, None

    def pause(self, error: OpsCoreSDKError | None = None) -> float:
        """Return the seconds to rest before the next try, after an error or an end without one.

        Raises:
            OpsCoreSDKError: the error itself, if another try would not help, or it is enough.
        """
        asked = 0.0 if error is None else self._bear(error)
        pause = asked + backoff(self._in_vain)
        self._in_vain += 1
        return pause

    def _bear(self, error: OpsCoreSDKError) -> float:
        now = monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > RECONNECT_SECONDS or not _is_passing(error):
            raise error
        asked = getattr(error, "retry_after", None) or 0.0
        return min(asked, MAX_RETRY_AFTER_SECONDS)


def _is_passing(error: OpsCoreSDKError) -> bool:
    if isinstance(error, OpsCoreApiError):
        return error.status_code in (*_REFUSED, *_LOST)
    return isinstance(error, ConnectionError)


def read(response: httpx2.Response, *, also: int | None = None) -> Any:
    """Return the value an answer holds, None if it has no body.

    `also` is a status that is no error, if what comes with it is no problem.

    Raises:
        OpsCoreApiError: it is no success.
        OpsCoreSDKError: it is no answer of opscore's.
    """
    media_type = response.headers.get("Content-Type")
    if not response.is_success and (response.status_code != also or media_type != JSON):
        raise api_error(response.status_code, response.headers, response.content)
    if response.status_code == 204:
        return None
    value = _read_json(response.content)
    if not isinstance(value, dict):
        raise not_opscore(response)
    return value


def _read_json(text: str | bytes) -> Any:
    """Return what JSON says; None, as it does for null, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def not_opscore(response: httpx2.Response) -> OpsCoreSDKError:
    """Return what it means that an answer is not of the form it must have."""
    return OpsCoreSDKError(
        f"What answers {response.status_code} at {response.url} is not opscore. Check base_url."
    )


def trouble(error: httpx2.RequestError, root: str, content: bytes = b"") -> ConnectionError:
    """Return what a call means that got no answer."""
    if isinstance(error, httpx2.PoolTimeout):
        sentence = "Streams and waits hold all connections that this client may have."
    elif isinstance(error, httpx2.TimeoutException):
        sentence = f"{root} did not answer in time ({type(error).__name__})."
    else:
        sentence = f"{root} cannot be reached, or broke off: {str(error) or type(error).__name__}."
    if len(content) > LARGE_BYTES:
        sentence += f" It takes no request that is too large; this one has {len(content):,} bytes."
    return ConnectionError(sentence, was_sent=not isinstance(error, _UNSENT))


def check_stream(response: httpx2.Response) -> None:
    """Make sure that an answer is a stream of events.

    Raises:
        OpsCoreApiError: it is no success.
        OpsCoreSDKError: it is no answer of opscore's.
    """
    if not response.is_success:
        raise api_error(response.status_code, response.headers, response.content)
    if not response.headers.get("Content-Type", "").startswith(EVENT_STREAM):
        raise not_opscore(response)


class EventParser:
    """Reads Server-Sent Events as the API writes them; one that was cut off is none.

    httpx2 has a reader, too; after a cut between CR and LF it takes half an event for a whole one.
    """

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> str | None:
        """Take a line without its end; return the data of the event it completes, if it does."""
        if line == "" and self._data:
            text, self._data = "\n".join(self._data), []
            return text
        if line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
        return None


def read_event(response: httpx2.Response, text: str) -> Any:
    """Return the event that a stream's data holds.

    Raises:
        OpsCoreSDKError: it holds none.
    """
    event = _read_json(text)
    if not isinstance(event, dict) or not isinstance(event.get("seq"), int):
        raise not_opscore(response)
    return event
