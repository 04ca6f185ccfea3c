"""gunicorn's worker, but for how it refuses what is too large to be read as a request at all."""

import json
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from gunicorn import util
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.workers.gthread import ThreadWorker

from opscore import tracing

REFUSALS = {
    LimitRequestHeaders: (
        431,
        "headers_too_large",
        "A header, or all of them together, is too large. One may have {0:,} bytes with its name;"
        " an Idempotency-Key has 255 characters at most.",
    ),
    LimitRequestLine: (
        414,
        "uri_too_long",
        "The path with its query is too long. The first line of a request may have {1:,} bytes.",
    ),
}
"""Status, code and detail; limits of gunicorn are put in."""


class Worker(ThreadWorker):  # type: ignore[misc]
    """Answers with a problem (see `web.errors`) also where no view can.

    Ends with its parent, also if that was killed while clients wait.
    """

    def run(self) -> None:
        try:
            super().run()
        finally:
            tracing.stop()

    def is_parent_alive(self) -> bool:
        is_alive = bool(super().is_parent_alive())
        if not is_alive:
            self.wsgi.extensions["opscore"].stop_waiting()
        return is_alive

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        refusal = REFUSALS.get(type(exc))
        if refusal is None:
            super().handle_error(req, client, addr, exc)
            return
        status, code, detail = refusal
        told = detail.format(self.cfg.limit_request_field_size, self.cfg.limit_request_line)
        self.log.warning("Refused a request from %s: %s", (addr or ("",))[0], exc)
        util.write_nonblock(client, _answer(status, code, told))


def _answer(status: int, code: str, detail: str) -> bytes:
    title, request_id = HTTPStatus(status).phrase, uuid4().hex
    said = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    body = json.dumps({**said, "requestId": request_id}) + "\n"
    head = (
        f"HTTP/1.1 {status} {title}",
        "Connection: close",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        f"X-Request-ID: {request_id}",
        "X-Content-Type-Options: nosniff",
        "Cache-Control: no-store",
    )
    return "\r\n".join((*head, "", body)).encode()
