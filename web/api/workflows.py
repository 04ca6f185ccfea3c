"""Workflows: create versions of them, check them, read them."""

from typing import Any

from flask import url_for

from opscore import canvas, engine, queries
from opscore.definition import TaskSpec, parse
from opscore.engine import Draft
from opscore.workflows import archive_workflow, create_workflow, restore_workflow
from web import pages
from web.auth import principal
from web.current import database
from web.openapi import PREFIX, Answers, Blueprint
from web.schemas import IMPLICIT_END, WORKFLOW_FILTERS, Verdict, VersionArguments, Workflow

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
JUDGED = Answers(
    schema=Verdict,
    about="Nothing is wrong with it.",
    example={
        "valid": True,
        "workflowId": "report",
        "version": 1,
        "isNew": True,
        "tasks": ["fetch", "write"],
        "graph": [
            {
                "taskId": "fetch",
                "type": "agent",
                "agent": {"agentId": None, "agentCapability": "fetch"},
                "forEach": False,
                "dependsOn": [],
                "when": None,
            },
            {
                "taskId": "write",
                "type": "agent",
                "agent": {"agentId": "writer", "agentCapability": None},
                "forEach": False,
                "dependsOn": ["fetch"],
                "when": None,
            },
        ],
        "canvas": {"messages": [{"chain": ["fetch", "write"]}], "joins": [], "later": []},
    },
)
VERSIONS = Answers(schema=pages.page_of(Workflow, "WorkflowVersionPage"))
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
    "POST", "/validate", JUDGED, definition=True, example=DEFINITION, problems=IS_ARCHIVED
)
def validate(document: Any) -> Any:
    """Check a definition as creating it would, write nothing, and say what a run of it becomes."""
    definition = parse(document)
    with database().transaction() as tx, tx.begin_nested() as trial:
        stored, created = create_workflow(tx, definition)
        trial.rollback()
        draft = engine.draft_run(tx, definition)
    found = {"workflow_id": stored.workflow_id, "version": stored.version, "is_new": created}
    told = {"graph": [_node(task) for task in definition.tasks], "canvas": _canvas(draft)}
    return {"valid": True, **found, "tasks": [task.id for task in definition.tasks], **told}


def _node(task: TaskSpec) -> dict[str, Any]:
    named = {"agent_id": task.agent_id, "agent_capability": task.capability}
    return {
        "task_id": task.id,
        "type": task.type,
        "agent": named if any(named.values()) else None,
        "for_each": task.for_each is not None,
        "depends_on": list(task.depends_on),
        "when": task.when.value if task.when else None,
    }


def _canvas(draft: Draft) -> dict[str, Any]:
    names = {task: name or IMPLICIT_END for task, name in draft.names.items()}
    order = list(names)
    joins = draft.drawn.joins
    return {
        "messages": canvas.outline(draft.drawn, draft.nodes, names.__getitem__),
        "joins": [
            {"task_id": names[task], "after": [names[d] for d in order if d in joins[task]]}
            for task in order
            if task in joins
        ],
        "later": [names[task] for task in draft.drawn.beyond],
    }


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
