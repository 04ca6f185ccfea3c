"""A client of the HTTP API in the test's own process, with the key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask
from werkzeug.test import TestResponse

from opscore.config import Settings
from opscore.db import Database
from web.app import create_app

PREFIX = "/v1/opscore"
OUTSIDE = ("/health", "/ready", "/metrics", "/docs", "/openapi.json")


class Client:
    """Sends JSON, with the key unless told otherwise; paths are relative to `/v1/opscore`."""

    def __init__(self, app: Flask, key: str | None) -> None:
        self.app = app
        self.database: Database = app.extensions["opscore"].database
        self._http = app.test_client()
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def get(self, path: str, **more: Any) -> TestResponse:
        return self.send("GET", path, **more)

    def post(self, path: str, json: Any = None, **more: Any) -> TestResponse:
        return self.send("POST", path, **({"json": json} if json is not None else {}), **more)

    def send(
        self, method: str, path: str, headers: dict[str, str] | None = None, **more: Any
    ) -> TestResponse:
        full = path if path.startswith(("/v1", *OUTSIDE)) else PREFIX + path
        headers = {**self._headers, **(headers or {})}
        return self._http.open(full, method=method, headers=headers, buffered=True, **more)

    def without_key(self) -> "Client":
        return Client(self.app, None)


@contextmanager
def open_client(settings: Settings) -> Iterator[Client]:
    app = create_app(settings)
    yield Client(app, settings.api_key)
    app.extensions["opscore"].close()


def problem(answer: TestResponse, status: int, code: str) -> dict[str, Any]:
    """Check that the answer is a whole problem of this status and code; return its body."""
    body: dict[str, Any] = answer.get_json(force=True)
    assert (answer.status_code, body.get("code")) == (status, code), answer.get_data(as_text=True)
    assert answer.content_type == "application/problem+json"
    assert body["status"] == status and body["title"] and body["type"] == "about:blank"
    assert isinstance(body["detail"], str) and body["detail"]
    assert body["requestId"] == answer.headers["X-Request-ID"]
    assert "Traceback" not in answer.get_data(as_text=True)
    return body
