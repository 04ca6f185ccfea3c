"""The status of the whole installation, on one page."""

from typing import Any

from opscore import status
from web.current import database, parts
from web.openapi import PREFIX, Answers, Blueprint
from web.schemas import Status

blueprint = Blueprint("status", __name__, url_prefix=PREFIX, description="How everything is.")


@blueprint.operation("GET", "/status", Answers(schema=Status))
def get_status() -> Any:
    """Get who works, what waits and for how long, what is stuck, and what is to be done about it.

    Asks no worker: it costs the same however many there are, and however busy.
    """
    queues = parts().readiness.queues()
    with database().transaction() as tx:
        return status.read(tx, *queues)
