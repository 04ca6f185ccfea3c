"""Whether the process answers, and whether what it needs does. Neither wants a key."""

from typing import Any

from web.current import parts
from web.openapi import Answers, Blueprint
from web.schemas import Health, Ready

blueprint = Blueprint("health", __name__, description="Whether the server lives.")
HEALTH = Answers(schema=Health, example={"status": "ok"})
READY = Answers(
    schema=Ready,
    about="Every part answers.",
    also={503: (Ready, "At least one part does not answer.")},
)


@blueprint.operation("GET", "/health", HEALTH, key=False)
def get_health() -> Any:
    """Answer as long as the process lives; touches nothing."""
    return {"status": "ok"}


@blueprint.operation("GET", "/ready", READY, key=False)
def get_ready() -> Any:
    """Say which parts answer: 200 if all do, else 503."""
    answers = parts().readiness.check()
    is_ready = all(said == "ok" for said in answers.values())
    return {"status": "ready" if is_ready else "unready", **answers}, 200 if is_ready else 503
