"""Who may ask: whoever sends the key as `Authorization: Bearer <key>`.

Prometheus may have a token of its own, which opens `/metrics` and nothing else.

Everything wants it but the health checks, the documentation, and the agents' webhook, which wants a
signature instead. What is wrong is said, never what the key is or how much of it was right.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from flask import Flask, current_app, g, request
from werkzeug.exceptions import MethodNotAllowed

from web.errors import Refused

OPEN_ENDPOINTS = frozenset(
    {
        "health.get_health",
        "health.get_ready",
        "docs.openapi",
        "docs.page",
        "docs.slash",
        "docs.file",
        "webhook.notify",
    }
)
"""Flask endpoints that want no key."""
METRICS = "metrics.get_metrics"
"""The one that the token for metrics opens, too."""


def register(app: Flask, api_key: str, metrics_token: str | None = None) -> None:
    """Refuse requests without the key with 401."""
    expected = _digest(api_key)
    of_metrics = (expected, *([] if metrics_token is None else [_digest(metrics_token)]))
    name = f"key:{expected.hex()[:8]}"

    def check_key() -> None:
        endpoint = _endpoint()
        if endpoint not in OPEN_ENDPOINTS:
            accepted = of_metrics if endpoint == METRICS else (expected,)
            _check(request.headers.get("Authorization"), accepted)
            g.principal = name

    app.before_request(check_key)


def principal() -> str:
    """Return who sends the request at hand, as events name him; only where a key is wanted.

    Today that is always `key:` and the first 8 hex digits of the SHA-256 of the key; never the key.
    """
    return str(g.principal)


def _endpoint() -> str | None:
    """Return what the path is of, also where the method is not one of those it has."""
    error = request.routing_exception
    urls = current_app.create_url_adapter(request)
    if urls is None or not isinstance(error, MethodNotAllowed) or not error.valid_methods:
        return request.endpoint
    return str(urls.match(method=next(iter(error.valid_methods)))[0])


def _check(header: str | None, accepted: Sequence[bytes]) -> None:
    if header is None:
        raise _unauthorized("The Authorization header is missing; send `Bearer <key>` in it.")
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer":
        raise _unauthorized("The Authorization header must be of the form `Bearer <key>`.")
    given = _digest(key.strip())
    if not any([hmac.compare_digest(given, one) for one in accepted]):
        raise _unauthorized("The key is wrong; it must be the OPSCORE_API_KEY of the server.")


def _unauthorized(detail: str) -> Refused:
    return Refused(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    """Hash, so that comparing takes equally long whatever the lengths."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
