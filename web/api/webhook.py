"""The webhook by which agents behind HTTP come and go: who signs needs no key.

The signature is checked over the body as it was sent, before anything of it is read.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from flask import request

from opscore.agents import Registration, deregister, register_remote
from opscore.errors import InvalidRequest
from opscore.remote import AGENT_PREFIX, UrlPolicy, check_signature, read_timestamp
from web.bodies import raw_body
from web.current import database, dispatcher, parts
from web.errors import Refused
from web.openapi import PREFIX, Answers, Blueprint
from web.schemas import Notice, Success

blueprint = Blueprint(
    "webhook",
    __name__,
    url_prefix=f"{PREFIX}/internal/agent",
    description="Where agents behind HTTP register.",
)
DONE = Answers(schema=Success, example={"status": "success", "message": "Agent a-1 registered"})
PROBLEMS = {
    400: "The body cannot be read, or the event is an unknown one.",
    401: "The signature is missing, wrong or stale, or the server has no OPSCORE_WEBHOOK_SECRET.",
    404: "Whoever deregisters is not registered.",
    409: "A notice of this agent that was signed later was taken already.",
}
EXAMPLE = {
    "event_type": "REGISTER",
    "agent_details": {
        "agentId": "a-1",
        "agentName": "Summarizer",
        "version": "1.0",
        "capabilities": ["summarize"],
        "contactEndpoint": "https://agent.example/task",
        "metadata": None,
    },
}
LONGEST_ECHO = 64


@blueprint.before_request  # type: ignore[untyped-decorator]
def check_proof() -> None:
    """Refuse what is not signed with the webhook's secret."""
    secret = parts().settings.webhook_secret
    if secret is None:
        raise _unsigned("The server has no OPSCORE_WEBHOOK_SECRET, so no agent can register.")
    timestamp, signature = (
        request.headers.get(f"{AGENT_PREFIX}-{name}") for name in ("Timestamp", "Signature")
    )
    if fault := check_signature(secret, timestamp, signature, raw_body(), datetime.now(UTC)):
        raise _unsigned(fault)


def _unsigned(detail: str) -> Refused:
    return Refused(401, detail, headers={"WWW-Authenticate": f"{AGENT_PREFIX}-Signature"})


@blueprint.operation(
    "POST",
    "/notify",
    DONE,
    body=Notice,
    example=EXAMPLE,
    problems=PROBLEMS,
    key=False,
    signed=True,
)
def notify(wanted: dict[str, Any]) -> Any:
    """Register an agent behind HTTP, or deregister it; once more changes nothing."""
    details = wanted["agent_details"]
    match wanted["event_type"]:
        case "REGISTER":
            return _done(_register(details))
        case "DEREGISTER":
            return _done(_deregister(details["agent_id"]))
        case other:
            sentence = f"There is no event {other[:LONGEST_ECHO]!r}; send REGISTER or DEREGISTER."
            raise Refused(400, sentence)


def _register(details: Mapping[str, Any]) -> str:
    """Write the agent; whoever waits for one like it may go there at once."""
    if faults := UrlPolicy(parts().settings.agent_hosts).faults(details["contact_endpoint"]):
        raise InvalidRequest({"/agent_details/contactEndpoint": faults})
    agent = Registration(**details)
    with database().transaction() as tx:
        register_remote(tx, agent, _signed_at())
    dispatcher().wake_line(agent.agent_id)
    return f"Agent {agent.agent_id} registered"


def _deregister(agent_id: str) -> str:
    with database().transaction() as tx:
        deregister(tx, agent_id, _signed_at())
    dispatcher().withdraw()
    return f"Agent {agent_id} deregistered"


def _signed_at() -> datetime:
    return read_timestamp(request.headers[f"{AGENT_PREFIX}-Timestamp"])


def _done(message: str) -> dict[str, str]:
    return {"status": "success", "message": message}
