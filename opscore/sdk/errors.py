"""What the clients raise: one tree, and how an answer becomes a leaf of it.

OpsCoreSDKError
├── ConnectionError         the API cannot be reached, or broke off
├── WaitTimeout             it is not over yet (also a TimeoutError)
├── RunFailed               a run ended otherwise than completed
└── OpsCoreApiError         the API refused
    ├── AuthenticationError     401, 403
    ├── NotFoundError           404
    ├── ConflictError           409
    ├── ValidationError         400, 413, 414, 415, 422, 431
    ├── RateLimitError          429
    └── ServerError             5xx
"""

import json
from collections.abc import Mapping
from typing import Any

LONGEST_QUOTE = 200
"""Of an answer that is no problem of ours, so many characters are shown."""


class OpsCoreSDKError(Exception):
    """Something went wrong between a client and the API."""


class ConnectionError(OpsCoreSDKError):
    """The API could not be reached, did not answer in time, or broke off.

    `was_sent`: it may have got the request all the same.
    """

    def __init__(self, message: str, was_sent: bool = True) -> None:
        self.was_sent = was_sent
        super().__init__(message)


class WaitTimeout(OpsCoreSDKError, TimeoutError):
    """What was waited for is not over yet; it goes on."""


class RunFailed(OpsCoreSDKError):
    """A run failed or was cancelled. `status`; `error`: `{code, message, ...}` or None."""

    def __init__(self, run_id: str, status: str, error: Mapping[str, Any] | None) -> None:
        self.run_id, self.status, self.error = run_id, status, error
        super().__init__(run_id, status, error)

    def __str__(self) -> str:
        because = f": {self.error['message']} ({self.error['code']})" if self.error else "."
        ended = "was cancelled" if self.status == "cancelled" else self.status
        return f"Run {self.run_id} {ended}{because}"


class OpsCoreApiError(OpsCoreSDKError):
    """The API answered with an error.

    `errors`: JSON Pointer of a faulty place -> sentences about it; `request_id` is in the server's
    log, too; `retry_after` is in seconds, None if the API named none.
    """

    def __init__(
        self,
        status_code: int,
        detail: str,
        code: str | None = None,
        errors: Mapping[str, list[str]] | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status_code, self.detail, self.code = status_code, detail, code
        self.errors, self.request_id, self.retry_after = dict(errors or {}), request_id, retry_after
        super().__init__(status_code, detail, code, errors, request_id, retry_after)

    def __str__(self) -> str:
        places = "".join(
            f"\n  {pointer or '(the whole)'}: {sentence}"
            for pointer, sentences in self.errors.items()
            for sentence in sentences
        )
        return f"{self.detail}{places}"


class AuthenticationError(OpsCoreApiError):
    """The key is missing or wrong, or may not do this."""


class NotFoundError(OpsCoreApiError):
    """There is no such thing."""


class ConflictError(OpsCoreApiError):
    """The present state does not allow this."""


class ValidationError(OpsCoreApiError):
    """Something in the request is not as it must be; `errors` says where."""


class RateLimitError(OpsCoreApiError):
    """Too much was asked at once; `retry_after` says when to ask again."""


class ServerError(OpsCoreApiError):
    """The API had an accident, or a server it needs is away."""


_BY_STATUS: Mapping[int, type[OpsCoreApiError]] = {
    400: ValidationError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: ValidationError,
    414: ValidationError,
    415: ValidationError,
    422: ValidationError,
    431: ValidationError,
    429: RateLimitError,
}


def api_error(status: int, headers: Mapping[str, str], body: bytes) -> OpsCoreApiError:
    """Return what an answer that is no success means."""
    problem = _read_problem(body)
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else OpsCoreApiError)
    return kind(
        status,
        problem.get("detail") or _foreign(status, headers, body),
        problem.get("code"),
        problem.get("errors"),
        problem.get("requestId") or headers.get("X-Request-ID"),
        read_retry_after(headers),
    )


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds an answer asks to wait; None if it does not say so in seconds."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() else None


def _read_problem(body: bytes) -> Mapping[str, Any]:
    """Return the problem that a body tells of; nothing if that is none of opscore's."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return problem if isinstance(problem, dict) and _is_ours(problem) else {}


def _is_ours(problem: Mapping[str, Any]) -> bool:
    errors = problem.get("errors", {})
    return (
        all(isinstance(problem.get(name), str) for name in ("detail", "code"))
        and isinstance(errors, dict)
        and all(isinstance(sentences, list) for sentences in errors.values())
    )


def _foreign(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """Say what something else than opscore answered: a proxy, or the wrong server."""
    if 300 <= status < 400:
        return f"{status}: it redirects to {headers.get('Location')}; use that server's base_url."
    text = " ".join(body[: 4 * LONGEST_QUOTE].decode(errors="replace").split())[:LONGEST_QUOTE]
    return f"{status}, and no problem that opscore would answer: {text or 'no body'}"
