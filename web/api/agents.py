"""Agents: who can do what, and who is at it; and the older way to start a workflow for one."""

from typing import Any
from uuid import UUID

from flask import url_for

from opscore import queries
from opscore.db import Tx
from opscore.definition import parse
from opscore.engine import submit_run
from opscore.errors import InvalidDefinition
from opscore.workflows import StoredWorkflow, create_workflow, find_workflow
from web import pages
from web.current import database, dispatcher
from web.openapi import PREFIX, Answers, Blueprint
from web.requests import request_id
from web.schemas import AGENT_FILTERS, Agent, TriggerArguments, Triggered

blueprint = Blueprint(
    "agents", __name__, url_prefix=PREFIX, description="Providers of capabilities."
)
AGENTS = pages.page_arguments(pages.moment, pages.name, **AGENT_FILTERS)
STARTED = Answers(
    schema=Triggered, status=202, has_location=True, about="The run will be executed."
)
TRIGGER = {"workflowDefinitionId": "report", "initialPayload": {"topic": "queues"}}


@blueprint.operation("GET", "/agents", Answers(schema=pages.page_of(Agent)), query=AGENTS)
def get_many(wanted: dict[str, Any]) -> Any:
    """List agents."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_agents(tx, after=after, **wanted))


@blueprint.operation("GET", "/agents/<agent_id>", Answers(schema=Agent))
def get_one(agent_id: str) -> Any:
    """Get an agent and what it does now."""
    with database().autocommit() as tx:
        return queries.get_agent(tx, agent_id)


@blueprint.operation(
    "POST", "/agent/<agent_id>/workflow", STARTED, body=TriggerArguments, example=TRIGGER
)
def trigger(wanted: dict[str, Any], agent_id: str) -> Any:
    """Start a run for an agent: tasks that name nobody run on it, elsewhere it is preferred."""
    with database().transaction() as tx:
        stored = _triggered_workflow(tx, wanted)
        given = wanted["initial_payload"] or {}
        submission = submit_run(tx, stored, input=given, agent_id=agent_id, request_id=request_id())
    dispatcher().publish(submission)
    return _triggered(submission.run_id, stored)


def _triggered_workflow(tx: Tx, wanted: dict[str, Any]) -> StoredWorkflow:
    """Find the workflow by its id, or store the one that came along.

    Raises:
        WorkflowNotFound
        InvalidDefinition: with the faults' places in the whole body.
    """
    document = wanted["workflow_definition"]
    if document is None:
        return find_workflow(tx, wanted["workflow_definition_id"])
    try:
        return create_workflow(tx, parse(document), inline=True)[0]
    except InvalidDefinition as error:
        raise InvalidDefinition(
            {f"/workflowDefinition{place}": said for place, said in error.errors.items()}
        ) from error


def _triggered(run_id: UUID, stored: StoredWorkflow) -> Any:
    body = {
        "session_id": run_id,
        "run_id": run_id,
        "workflow_id": stored.workflow_id,
        "message": "Workflow triggered successfully",
    }
    return body, 202, {"Location": url_for("runs.get_one", run_id=run_id)}
