"""Workflows: create versions of them, check them, read them."""

from typing import Any

from flask import url_for

from opscore import queries
from opscore.definition import parse
from opscore.workflows import archive_workflow, create_workflow, restore_workflow
from web import pages
from web.auth import principal
from web.current import database
from web.openapi import PREFIX, Answers, Blueprint
from web.schemas import WORKFLOW_FILTERS, Verdict, VersionArguments, Workflow

blueprint = Blueprint(
    "workflows",
    __name__,
    url_prefix=f"{PREFIX}/workflows",
    description="Definitions: named, versioned, never changed.",
)
DEFINITION = {
    "id": "report",
    "name": "Report",
    "tasks": [
        {"taskId": "fetch", "agentCapability": "fetch", "parameters": {"topic": "${input.topic}"}},
        {
            "taskId": "write",
            "agentId": "writer",
            "dependsOn": ["fetch"],
            "parameters": {"facts": "${tasks.fetch.output}"},
        },
    ],
    "output": "${tasks.write.output}",
}
EXAMPLE = {
    "workflowId": "report",
    "version": 1,
    "name": "Report",
    "definition": DEFINITION,
    "createdAt": "2026-01-31T12:00:00Z",
    "archivedAt": None,
}
CREATED = Answers(
    schema=Workflow,
    status=201,
    about="A new version was written.",
    example=EXAMPLE,
    has_location=True,
    also={200: (Workflow, "The newest version is this document already.")},
)
VERSIONS = Answers(schema=pages.page_of(Workflow, "WorkflowVersionPage"))
VERDICT = Answers(schema=Verdict)
ARCHIVED = Answers(
    schema=Workflow,
    about="It is archived; what exists of it goes on.",
    example={**EXAMPLE, "archivedAt": "2026-02-01T12:00:00Z"},
)
RESTORED = Answers(schema=Workflow, about="It is not archived.", example=EXAMPLE)
IS_ARCHIVED = {409: "The workflow is archived."}
WORKFLOWS = pages.page_arguments(pages.moment, pages.name, **WORKFLOW_FILTERS)
VERSION_PAGES = pages.page_arguments(pages.number)


@blueprint.operation("POST", "", CREATED, definition=True, example=DEFINITION, problems=IS_ARCHIVED)
def create(document: Any) -> Any:
    """Create a workflow, or its next version."""
    definition = parse(document)
    with database().transaction() as tx:
        stored, created = create_workflow(tx, definition)
        workflow = queries.get_workflow(tx, stored.workflow_id, stored.version)
    where = url_for(".get_one", workflow_id=stored.workflow_id, version=stored.version)
    return workflow, 201 if created else 200, {"Location": where}


@blueprint.operation(
    "POST", "/validate", VERDICT, definition=True, example=DEFINITION, problems=IS_ARCHIVED
)
def validate(document: Any) -> Any:
    """Check a definition as creating it would, and write nothing."""
    definition = parse(document)
    with database().transaction() as tx, tx.begin_nested() as trial:
        stored, created = create_workflow(tx, definition)
        trial.rollback()
    found = {"workflow_id": stored.workflow_id, "version": stored.version, "is_new": created}
    return {"valid": True, **found, "tasks": [task.id for task in definition.tasks]}


@blueprint.operation("GET", "", Answers(schema=pages.page_of(Workflow)), query=WORKFLOWS)
def get_many(wanted: dict[str, Any]) -> Any:
    """List the newest version of each workflow."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_workflows(tx, after=after, **wanted))


@blueprint.operation(
    "GET", "/<workflow_id>", Answers(schema=Workflow, example=EXAMPLE), query=VersionArguments
)
def get_one(wanted: dict[str, Any], workflow_id: str) -> Any:
    """Get one version of a workflow."""
    with database().autocommit() as tx:
        return queries.get_workflow(tx, workflow_id, wanted.get("version"))


@blueprint.operation("GET", "/<workflow_id>/versions", VERSIONS, query=VERSION_PAGES)
def get_versions(wanted: dict[str, Any], workflow_id: str) -> Any:
    """List the versions of a workflow."""
    with database().autocommit() as tx:
        page = queries.list_versions(
            tx, workflow_id, after=wanted.get("cursor"), limit=wanted["limit"]
        )
    return pages.answer(page)


@blueprint.operation("POST", "/<workflow_id>/archive", ARCHIVED)
def archive(workflow_id: str) -> Any:
    """Let a workflow get no new runs and versions until it is restored. Archiving twice is once."""
    with database().transaction() as tx:
        archive_workflow(tx, workflow_id, principal())
        return queries.get_workflow(tx, workflow_id)


@blueprint.operation("POST", "/<workflow_id>/restore", RESTORED)
def restore(workflow_id: str) -> Any:
    """Let an archived workflow get runs and versions again. Restoring twice is once."""
    with database().transaction() as tx:
        restore_workflow(tx, workflow_id)
        return queries.get_workflow(tx, workflow_id)
