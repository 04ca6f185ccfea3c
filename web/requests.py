"""What every request has: an id, a limit to its body, a line in the log, and sane headers.

The body is never read beyond the limit, and never logged.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from flask import Flask, Response, g, request
from werkzeug.exceptions import NotFound, RequestEntityTooLarge

from opscore import logs, tracing
from opscore.tally import HTTP, Tally

log = logs.get("opscore.web")

HEADER = "X-Request-ID"
UNTRACED = ("/health", "/ready", "/metrics")
"""Asked every few seconds, by machines."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id() -> str:
    """Return the id of the request at hand: the client's if it is usable, else a new one."""
    if "request_id" not in g:
        given = request.headers.get(HEADER, "")
        g.request_id = given if _ID.fullmatch(given) else uuid4().hex
    return str(g.request_id)


METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Any word can come as a method; metrics and traces know these."""


@contextmanager
def waiting() -> Iterator[None]:
    """Leave the block out of how long the request took: its client asked to wait."""
    began = time.monotonic()
    try:
        yield
    finally:
        g.waited = time.monotonic() - began


def register(app: Flask, tally: Tally) -> None:
    """Watch over every request of `app`, and count it; must come before what may refuse one."""
    app.before_request(_begin)
    app.before_request(_check_length)
    app.before_request(_check_path)
    app.after_request(partial(_end, tally))
    app.teardown_request(_forget)


def _begin() -> None:
    g.began = time.monotonic()
    logs.clear()
    logs.bind(request_id=request_id())
    if request.path not in UNTRACED:
        g.span = _span().__enter__()


def _span() -> tracing.Span:
    """Return the request's span, below the client's; named after the route, not the path."""
    route = _route()
    method = request.method if request.method in METHODS else "HTTP"
    about = {
        "http.request.method": method if method != "HTTP" else "_OTHER",
        "http.route": route,
        "url.path": request.path,
        "url.scheme": request.scheme,
        "opscore.request_id": request_id(),
    }
    name = method if route is None else f"{method} {route}"
    return tracing.span(name, "server", about, parent=request.headers.get("traceparent"))


def _route() -> str | None:
    """Return the template of the path: ids in paths would make each unique."""
    return request.url_rule.rule if request.url_rule else None


def _check_length() -> None:
    """Refuse a body by its announced length, also where no view would read it."""
    limit = request.max_content_length
    if limit is not None and (request.content_length or 0) > limit:
        raise RequestEntityTooLarge


def _check_path() -> None:
    """Nothing is named with a NUL, which PostgreSQL could not even look for."""
    if "\0" in request.path:
        raise NotFound


def _end(tally: Tally, response: Response) -> Response:
    response.headers[HEADER] = request_id()
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    route = _route()
    seconds = time.monotonic() - g.get("began", time.monotonic())
    log.info(
        "request",
        method=request.method,
        route=route,
        status=response.status_code,
        ms=round(seconds * 1000, 1),
    )
    if "span" in g:
        g.span.set(http__response__status_code=response.status_code)
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            g.span.fail(str(response.status_code))
    method = request.method if request.method in METHODS else "other"
    labels = (method, route or "", str(response.status_code))
    tally.add(HTTP, *labels, value=seconds - g.get("waited", 0.0))
    return response


def _forget(error: Any = None) -> None:
    if "span" in g:
        g.pop("span").__exit__()
    logs.clear()
