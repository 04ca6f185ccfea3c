"""Tasks: what became of one, attempt by attempt."""

from typing import Any
from uuid import UUID

from opscore import queries
from web.current import database
from web.openapi import PREFIX, Answers, Blueprint
from web.schemas import Attempt, TaskDetail

blueprint = Blueprint(
    "tasks", __name__, url_prefix=f"{PREFIX}/tasks", description="Units of work of a run."
)
ATTEMPT = "/<task:task_id>/attempts/<int(max=2147483647):number>"


@blueprint.operation("GET", "/<task:task_id>", Answers(schema=TaskDetail))
def get_one(task_id: UUID) -> Any:
    """Get a task with its attempts and what the newest one logged."""
    with database().autocommit() as tx:
        return queries.get_task(tx, task_id)


@blueprint.operation("GET", ATTEMPT, Answers(schema=Attempt))
def get_attempt(task_id: UUID, number: int) -> Any:
    """Get one attempt at a task: its log, its progress, its error with traceback."""
    with database().autocommit() as tx:
        return queries.get_attempt(tx, task_id, number)
