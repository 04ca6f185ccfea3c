"""The store of workflow definitions: immutable versions, found again compiled.

A document that is the newest version's own again makes no new version. A definition that came
inline with a trigger is kept too, since its runs must mean the same next month, but it is never
`latest`.
"""

import hashlib
import json
import re
from dataclasses import dataclass

from sqlalchemy import func, insert, select, text

from opscore import slots
from opscore.db import Prepared, Tx
from opscore.definition import Child, Definition, parse
from opscore.errors import InvalidDefinition, WorkflowNotFound
from opscore.models import Workflow

CACHED_DEFINITIONS = 256
"""Compiled definitions a process keeps."""


@dataclass(frozen=True, slots=True)
class StoredWorkflow:
    """A definition with the name and version it is stored under."""

    workflow_id: str
    version: int
    definition: Definition


_compiled: dict[tuple[str, int, str], Definition] = {}


def create_workflow(
    tx: Tx, definition: Definition, *, inline: bool = False
) -> tuple[StoredWorkflow, bool]:
    """Store a definition as the next version; True if one was written.

    Its id is the document's, else made from its name.

    Raises:
        InvalidDefinition: it has neither id nor name; or it runs another workflow that is not
            there, or that leads back to it.
    """
    workflow_id = id_of(definition)
    check_children(tx, workflow_id, definition)
    digest = _digest(definition)
    same = _same_version(tx, workflow_id, digest, inline)
    if same is None:
        # Two creations at once count up one after the other.
        tx.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"),
            {"key": f"workflow:{workflow_id}"},
        )
        same = _same_version(tx, workflow_id, digest, inline)
    if same is not None:
        return StoredWorkflow(workflow_id, same, definition), False
    version = 1 + (
        tx.execute(
            select(func.max(Workflow.version)).where(Workflow.workflow_id == workflow_id)
        ).scalar()
        or 0
    )
    tx.execute(
        insert(Workflow).values(
            workflow_id=workflow_id,
            version=version,
            name=definition.name,
            definition=dict(definition.document),
            digest=digest,
            inline=inline,
        )
    )
    if not inline or not _is_created(tx, workflow_id):
        slots.set_capacity(tx, slots.RUNS + workflow_id, definition.max_concurrent_runs or 0)
    return StoredWorkflow(workflow_id, version, definition), True


def id_of(definition: Definition) -> str:
    """Return the id a definition is stored under: its own, else one made from its name.

    Raises:
        InvalidDefinition: it has neither.
    """
    if definition.id is not None:
        return definition.id
    slug = re.sub(r"[^a-z0-9]+", "-", (definition.name or "").lower()).strip("-")
    if not slug:
        raise InvalidDefinition({"/id": ["Give the workflow an id, or a name to make one from."]})
    return f"wf_{slug}"[:64]


def _is_created(tx: Tx, workflow_id: str) -> bool:
    """Tell whether a workflow is more than what came inline: then those do not speak for it."""
    created = select(Workflow.version).where(Workflow.workflow_id == workflow_id, ~Workflow.inline)
    return tx.execute(created.limit(1)).first() is not None


_FIND = Prepared(
    """
SELECT version, digest FROM workflows
WHERE workflow_id = :workflow_id AND version = coalesce(
    :version, (SELECT max(version) FROM workflows WHERE workflow_id = :workflow_id AND NOT inline))
"""
)


def find_workflow(tx: Tx, workflow_id: str, version: int | None = None) -> StoredWorkflow:
    """Return a version of a workflow, the newest by default.

    Raises:
        WorkflowNotFound: no such workflow, or no such version of it.
    """
    row = _FIND(tx, {"workflow_id": workflow_id, "version": version}).first()
    if row is None:
        raise no_workflow(workflow_id, version)
    return StoredWorkflow(
        workflow_id, row.version, _compile(tx, workflow_id, row.version, row.digest)
    )


def no_workflow(workflow_id: str, version: int | None = None) -> WorkflowNotFound:
    """Return the error that says so, of a workflow or of a version of it."""
    if version is None:
        return WorkflowNotFound(workflow_id=workflow_id)
    return WorkflowNotFound(f"There is no version {version} of workflow {workflow_id!r}.")


def _compile(tx: Tx, workflow_id: str, version: int, digest: str) -> Definition:
    key = (workflow_id, version, digest)
    definition = _compiled.get(key)
    if definition is None:
        where = (Workflow.workflow_id == workflow_id, Workflow.version == version)
        definition = parse(
            tx.execute(select(Workflow.definition).where(*where)).scalar_one(), is_stored=True
        )
        if len(_compiled) >= CACHED_DEFINITIONS:
            _compiled.clear()
        _compiled[key] = definition
    return definition


def _same_version(tx: Tx, workflow_id: str, digest: str, inline: bool) -> int | None:
    """Return the version that is this document: any inline one, but only the newest created."""
    query = (
        select(Workflow.version, Workflow.digest)
        .where(Workflow.workflow_id == workflow_id, Workflow.inline == inline)
        .order_by(Workflow.version.desc())
        .limit(1)
    )
    if inline:
        query = query.where(Workflow.digest == digest)
    newest = tx.execute(query).one_or_none()
    return newest.version if newest is not None and newest.digest == digest else None


def check_children(tx: Tx, workflow_id: str, definition: Definition) -> None:
    """Make sure that the workflows a definition runs are there, and do not lead back to it.

    Raises:
        InvalidDefinition
    """
    faults = {}
    places = {task["taskId"]: n for n, task in enumerate(definition.document["tasks"])}
    for task, child in definition.children():
        if sentence := _why_no_child(tx, workflow_id, child):
            faults[f"/tasks/{places[task]}/workflowId"] = [sentence]
    if faults:
        raise InvalidDefinition(faults)


def _why_no_child(tx: Tx, workflow_id: str, child: Child) -> str | None:
    seen: set[tuple[str, int | None]] = set()
    ways = [[(child.workflow_id, child.version)]]
    while ways:
        way = ways.pop()
        if way[-1][0] == workflow_id:
            circle = " → ".join([workflow_id, *(id for id, _ in way)])
            return f"This leads back to the workflow itself: {circle}; name another one."
        if way[-1] in seen:
            continue
        seen.add(way[-1])
        try:
            found = find_workflow(tx, *way[-1]).definition
        except WorkflowNotFound as error:
            if len(seen) == 1:
                return f"{error} Create it first."
            continue
        ways += [[*way, (below.workflow_id, below.version)] for _, below in found.children()]
    return None


def _digest(definition: Definition) -> str:
    canonical = json.dumps(definition.document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
