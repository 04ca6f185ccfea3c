"""The HTTP status of every error, and its body: RFC 9457 `application/problem+json`.

    {"type", "title", "status", "detail", "code", "errors"?, "requestId"}

`errors` maps a JSON Pointer to sentences about the place it names; a query parameter is named as if
it were a member of the body. An accident is logged with its traceback and answered without one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import sqlalchemy.exc
from flask import Flask, Response, current_app, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from opscore import logs
from opscore.errors import (
    AgentSignal,
    ConfigurationError,
    Conflict,
    Invalid,
    NotFound,
    OpsCoreError,
    Unavailable,
    UpgradeFailed,
)
from web.requests import request_id

log = logs.get("opscore.web")

PROBLEM = "application/problem+json"
RETRY_AFTER_SECONDS = 5
"""What a client is told to wait when a server we need is away."""

STATUSES: Mapping[type[OpsCoreError], int] = {
    Invalid: 422,
    NotFound: 404,
    Conflict: 409,
    Unavailable: 503,
    ConfigurationError: 500,
    UpgradeFailed: 500,
    AgentSignal: 500,
    OpsCoreError: 500,
}
"""An error has the status of its nearest ancestor here."""

AWAY = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.TimeoutError,
)
"""How SQLAlchemy says that PostgreSQL, or a connection of the pool, cannot be had in time."""

CODES: Mapping[int, str] = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
}


class Refused(HTTPException):
    """The request is refused for a reason only HTTP knows, such as its media type.

    `kind` is the problem's code, where its status does not say it all.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = status
        self.kind = kind
        self.headers = dict(headers or {})

    def get_headers(self, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        return list(self.headers.items())


def status_of(error: type[OpsCoreError]) -> int:
    """Return the HTTP status of a class of errors."""
    return next(STATUSES[kind] for kind in error.__mro__ if kind in STATUSES)


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Mapping[str, Sequence[str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make the answer that tells of an error."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if errors:
        body["errors"] = dict(errors)
    text = current_app.json.dumps({**body, "requestId": request_id()})
    return Response(text + "\n", status, dict(headers or {}), content_type=PROBLEM)


def pointers(messages: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Turn marshmallow's nested messages into (JSON Pointer, sentences)."""
    if isinstance(messages, Mapping):
        for key, inner in messages.items():
            step = "" if key == "_schema" else "/" + str(key).replace("~", "~0").replace("/", "~1")
            yield from pointers(inner, path + step)
    else:
        # marshmallow puts a validator's mapping of messages into a list.
        nested = [inner for inner in messages if isinstance(inner, Mapping)]
        for inner in nested:
            yield from pointers(inner, path)
        if not nested:
            yield path, [str(sentence) for sentence in messages]


@contextmanager
def placed(before: str, now: str) -> Iterator[None]:
    """Name faults by the place that what is faulty has in the body: `now` instead of `before`."""
    try:
        yield
    except Invalid as error:
        moved = {
            now + place.removeprefix(before) if place.startswith(before) else place: said
            for place, said in error.errors.items()
        }
        raise type(error)(moved, str(error)) from error


def register(app: Flask) -> None:
    """Answer every error of `app` with a problem."""
    app.register_error_handler(OpsCoreError, _answer_own)
    app.register_error_handler(HTTPException, _answer_http)
    for kind in AWAY:
        app.register_error_handler(kind, _answer_away)
    app.register_error_handler(Exception, _answer_accident)


def _answer_own(error: OpsCoreError) -> Response:
    status = status_of(type(error))
    if status == 500:
        return _answer_accident(error)
    if status == 503:
        return _answer_away(error)
    errors = error.errors if isinstance(error, Invalid) else None
    return problem(status, error.code, str(error), errors=errors)


def _answer_http(error: HTTPException) -> ResponseReturnValue:
    """Keep the headers (`Allow`, `Location`, ...) that belong to the status."""
    if error.response is not None or error.code is None or error.code < 400:
        return error.get_response()
    if isinstance(error.__cause__, OpsCoreError):
        return _answer_own(error.__cause__)
    code = CODES.get(error.code, HTTPStatus(error.code).name.lower())
    if isinstance(error, Refused) and error.kind is not None:
        code = error.kind
    kept = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type",)}
    return problem(error.code, code, _detail(error), headers=kept)


def _detail(error: HTTPException) -> str:
    if error.code == 404:
        return f"There is nothing at {request.path}; /docs lists what there is."
    if error.code == 405:
        return f"{request.method} is not possible at {request.path}; the Allow header says what is."
    if error.code == 413:
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        size = request.content_length
        told = f"{size:,}" if size else f"more than {limit:,}"
        return f"The request body has {told} bytes; at most {limit:,} bytes are read."
    return error.description or HTTPStatus(error.code or 500).description


def _answer_away(error: Exception) -> Response:
    log.warning("unavailable", error=type(error).__name__)
    detail = str(error) if isinstance(error, Unavailable) else str(Unavailable())
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return problem(503, Unavailable.code, detail, headers=headers)


def _answer_accident(error: Exception) -> Response:
    log.error("internal_error", exc_info=error)
    detail = "Something went wrong on our side; the log has it under this request id."
    return problem(500, OpsCoreError.code, detail)
