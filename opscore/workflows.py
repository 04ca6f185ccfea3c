"""The store of workflow definitions: immutable versions, found again compiled.

A document that is the newest version's own again makes no new version. A definition that came
inline with a trigger is kept too, since its runs must mean the same next month, but it is never
`latest`. A workflow may be archived: it is found as before, for the runs it has, and gets no more.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, delete, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as upsert

from opscore import slots
from opscore.db import Prepared, Tx
from opscore.definition import Definition, check_children, id_of, parse
from opscore.errors import WorkflowArchived, WorkflowNotFound
from opscore.models import ArchivedWorkflow, Workflow

CACHED_DEFINITIONS = 256
"""Compiled definitions a process keeps."""


@dataclass(frozen=True, slots=True)
class StoredWorkflow:
    """A definition with the name and version it is stored under."""

    workflow_id: str
    version: int
    definition: Definition
    archived_at: datetime | None = None

    def check_open(self) -> None:
        """Make sure that it gets new runs.

        Raises:
            WorkflowArchived
        """
        if self.archived_at is not None:
            raise WorkflowArchived(workflow_id=self.workflow_id)


_compiled: dict[tuple[str, int, str], Definition] = {}


def create_workflow(
    tx: Tx, definition: Definition, *, inline: bool = False
) -> tuple[StoredWorkflow, bool]:
    """Store a definition as the next version; True if one was written.

    Its id is the document's, else made from its name.

    Raises:
        InvalidDefinition: it has neither id nor name; or it runs another workflow that is not
            there, is archived, or leads back to it.
        WorkflowArchived
    """
    workflow_id = id_of(definition)
    _check_children(tx, workflow_id, definition)
    digest = _digest(definition)
    same = _same_version(tx, workflow_id, digest, inline)
    if same is None:
        _lock(tx, workflow_id)  # two creations at once count up one after the other
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


def _lock(tx: Tx, workflow_id: str) -> None:
    """Have who else writes a version of the workflow, or archives it, wait for this transaction."""
    tx.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"),
        {"key": f"workflow:{workflow_id}"},
    )


def _is_created(tx: Tx, workflow_id: str) -> bool:
    """Tell whether a workflow is more than what came inline: then those do not speak for it."""
    created = select(Workflow.version).where(Workflow.workflow_id == workflow_id, ~Workflow.inline)
    return tx.execute(created.limit(1)).first() is not None


# --- Archiving ----------------------------------------------------------------------------------


def archive_workflow(tx: Tx, workflow_id: str, by: str) -> None:
    """Let a workflow get no new runs and versions; those that exist go on. Twice is once.

    A run that is submitted at this moment may still come to be.

    Raises:
        WorkflowNotFound: also if all there is of it came inline.
    """
    _lock(tx, workflow_id)
    if not _is_created(tx, workflow_id):
        raise no_workflow(workflow_id)
    values = {"workflow_id": workflow_id, "by": by}
    tx.execute(upsert(ArchivedWorkflow).values(**values).on_conflict_do_nothing())


def restore_workflow(tx: Tx, workflow_id: str) -> None:
    """Undo `archive_workflow`; of one that is not archived nothing changes.

    Raises:
        WorkflowNotFound: also if all there is of it came inline.
    """
    if not _is_created(tx, workflow_id):
        raise no_workflow(workflow_id)
    tx.execute(delete(ArchivedWorkflow).where(ArchivedWorkflow.workflow_id == workflow_id))


# --- Finding ------------------------------------------------------------------------------------

_FIND = Prepared(
    """
SELECT version, digest, (
    SELECT archived_at FROM archived_workflows WHERE workflow_id = :workflow_id) AS archived_at
FROM workflows
WHERE workflow_id = :workflow_id AND version = coalesce(
    :version, (SELECT max(version) FROM workflows WHERE workflow_id = :workflow_id AND NOT inline))
"""
)


def find_workflow(tx: Tx, workflow_id: str, version: int | None = None) -> StoredWorkflow:
    """Return a version of a workflow, the newest by default; also if it is archived.

    Raises:
        WorkflowNotFound: no such workflow, or no such version of it.
    """
    row = _FIND(tx, {"workflow_id": workflow_id, "version": version}).first()
    if row is None:
        raise no_workflow(workflow_id, version)
    definition = _compile(tx, workflow_id, row.version, row.digest)
    return StoredWorkflow(workflow_id, row.version, definition, row.archived_at)


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
    """Return the version that is this document: any inline one, but only the newest created.

    Raises:
        WorkflowArchived
    """
    same = (
        select(case((Workflow.digest == digest, Workflow.version)))
        .where(Workflow.workflow_id == workflow_id, Workflow.inline == inline)
        .order_by(Workflow.version.desc())
        .limit(1)
    )
    if inline:
        same = same.where(Workflow.digest == digest)
    archived_at = select(ArchivedWorkflow.archived_at).where(
        ArchivedWorkflow.workflow_id == workflow_id
    )
    row = tx.execute(select(archived_at.scalar_subquery(), same.scalar_subquery())).one()
    if row[0] is not None:
        raise WorkflowArchived(workflow_id=workflow_id)
    version: int | None = row[1]
    return version


def _check_children(tx: Tx, workflow_id: str, definition: Definition) -> None:
    """Make sure that the workflows a definition runs get runs, and do not lead back to it.

    Raises:
        InvalidDefinition
    """
    named = [(child.workflow_id, child.version) for _, child in definition.children()]

    def find(child: str, version: int | None) -> Definition:
        found = find_workflow(tx, child, version)
        if (child, version) in named:
            found.check_open()
        return found.definition

    check_children(workflow_id, definition, find)


def _digest(definition: Definition) -> str:
    canonical = json.dumps(definition.document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
