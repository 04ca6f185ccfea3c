"""Clients of opscore's HTTP API, and remote agents in a few lines.

Loads neither Flask, Celery nor SQLAlchemy.
"""

from typing import TYPE_CHECKING, Any

from opscore.sdk.async_client import OpsCoreClientAsync
from opscore.sdk.errors import (
    AuthenticationError,
    ConflictError,
    ConnectionError,
    NotFoundError,
    OpsCoreApiError,
    OpsCoreSDKError,
    RateLimitError,
    RunFailed,
    ServerError,
    ValidationError,
    WaitTimeout,
)
from opscore.sdk.sync_client import OpsCoreClientSync

if TYPE_CHECKING:
    from opscore.sdk.agent_server import AgentServer

__all__ = [
    "AgentServer",
    "AuthenticationError",
    "ConflictError",
    "ConnectionError",
    "NotFoundError",
    "OpsCoreApiError",
    "OpsCoreClientAsync",
    "OpsCoreClientSync",
    "OpsCoreSDKError",
    "RateLimitError",
    "RunFailed",
    "ServerError",
    "ValidationError",
    "WaitTimeout",
]


def __getattr__(name: str) -> Any:
    """Load what serves agents when it is asked for: clients do without it."""
    if name == "AgentServer":
        from opscore.sdk.agent_server import AgentServer

        return AgentServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
