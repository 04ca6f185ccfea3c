"""Runs as a whole: submitted, cancelled, settled, and published again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select
from uuid6 import uuid7

from opscore import tally, tracing
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE
from opscore.db import Prepared, Tx, tell
from opscore.definition import Definition, TaskSpec
from opscore.engine.clauses import (
    DUE,
    END,
    ENDED,
    HAND_ON,
    HELD,
    PLACES,
    RUN_OPEN,
    free_slots,
    still,
)
from opscore.engine.outcomes import RUN_ENDS, request_cancel
from opscore.errors import AgentNotFound, InvalidRequest, RunFinished, RunNotFound
from opscore.expressions import Template
from opscore.graph import Canvas, Node, build
from opscore.json_values import Faults
from opscore.models import Agent, Run, listed
from opscore.slots import RUNS
from opscore.states import RUN_ENDED, RunStatus
from opscore.workflows import StoredWorkflow

# --- Submitting ----------------------------------------------------------------------------------

_TASK_COLUMNS = {
    "id": "uuid",
    "definition_id": "text",
    "kind": "text",
    "item_kind": "text",
    "undecided": "boolean",
    "position": "int",
    "max_parallel": "int",
    "depends_on": "uuid[]",
    "successors": "uuid[]",
    "reads": "text[]",
    "is_sink": "boolean",
    "wanted_agent_id": "text",
    "wanted_capability": "text",
    "fallback": "text[]",
    "line_agent_id": "text",
    "timeout_seconds": "float",
    "max_attempts": "int",
    "retry_backoff": "float",
    "retry_max_backoff": "float",
    "busy_backoff": "float",
    "busy_max_backoff": "float",
    "max_wait_seconds": "float",
    "goes_on": "boolean",
    "status": "text",
    "reason": "text",
}
_IS_REMOTE = """t.kind <> 'end' AND CASE
    WHEN t.wanted_agent_id IS NOT NULL THEN
        EXISTS (SELECT FROM agents a WHERE a.agent_id = t.wanted_agent_id AND a.kind = 'remote')
    ELSE EXISTS (SELECT FROM agents a
                 WHERE t.wanted_capability = ANY (a.capabilities) AND NOT a.closed
                 HAVING bool_and(a.kind = 'remote')) END"""
"""A visit can be made by every worker; those of the I/O queue wait for HTTP at little cost."""
_SUBMIT = Prepared(
    f"""
WITH run AS (
    INSERT INTO runs (id, workflow_id, version, agent_id, input, labels, priority, request_id,
                      traceparent, max_concurrent, parent_task_id, depth, rerun_of, schedule,
                      budget, start_at, deadline_at, reason)
    VALUES (:run_id, :workflow_id, :version, :agent_id, :input, :labels, :priority, :request_id,
            :traceparent, cast(:max_concurrent AS int), :parent_task_id, :depth, :rerun_of,
            :schedule, :budget, :start_at, coalesce(
                :deadline_at, greatest(cast(:start_at AS timestamptz), now())
                              + make_interval(secs => :deadline_seconds)),
            CASE WHEN cast(:start_at AS timestamptz) > now() THEN '{DUE}'
                 WHEN cast(:max_concurrent AS int) IS NOT NULL THEN '{HELD}' END)
    RETURNING *
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.queued', jsonb_strip_nulls(jsonb_build_object(
        'version', version, 'by', cast(:by AS text), 'rerunOf', rerun_of,
        'parentTaskId', parent_task_id))
    FROM run
), written AS (
    INSERT INTO tasks (run_id, priority, preferred_agent_id, queue, {", ".join(_TASK_COLUMNS)})
    SELECT run.id, run.priority, run.agent_id,
           CASE WHEN {_IS_REMOTE} THEN '{IO_QUEUE}' ELSE t.queue END,
           {", ".join(f"t.{name}" for name in _TASK_COLUMNS)}
    FROM run, jsonb_to_recordset(cast(:tasks AS jsonb)) AS t (
        queue text, {", ".join(f"{name} {kind}" for name, kind in _TASK_COLUMNS.items())})
    RETURNING id, queue
)
SELECT id FROM written WHERE queue = '{IO_QUEUE}'
""",
    json=("input", "labels", "tasks"),
    json_or_null=("budget",),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left of a run: the input of a canvas."""

    run_id: UUID
    generation: int
    request_id: str | None
    nodes: tuple[Node, ...]
    items: tuple[Node, ...] = ()
    """Items of expanded `forEach` tasks that need a visit of their own."""
    drawn: Canvas | None = None
    """The canvas, if it was drawn already and what lies beyond it is held back."""
    limited: str | None = None
    """The workflow, if the run waits for its turn among the runs of it: see `release_runs`."""
    is_due: bool = True
    """False of a run that begins later: see `begin_due_runs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a run is to be, beside its workflow."""

    input: Any
    agent_id: str | None = None
    """The agent it was triggered for: it runs the tasks that name nobody, and is preferred where it
    has the capability asked for; the input is then merged over the first task's parameters."""
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 1
    request_id: str | None = None
    traceparent: str | None = None
    """Below which its spans are, if this process makes none."""
    by: str | None = None
    """Who submits it."""
    start_at: datetime | None = None
    deadline_at: datetime | None = None
    deadline_seconds: float | None = None
    """Each instead of what the definition's `deadlineSeconds` says."""
    budget: Mapping[str, Any] | None = None
    """`{max_tokens, max_cost_usd}` for all of its LLM agents together; either may be None."""
    rerun_of: UUID | None = None
    schedule: str | None = None
    parent_task_id: UUID | None = None
    depth: int = 0


def submit_run(
    tx: Tx, stored: StoredWorkflow, submission: Submission, run_id: UUID | None = None
) -> Plan:
    """Write a run, all its tasks and the event, in one statement. Once it commits, the run is
    accepted.

    Raises:
        WorkflowArchived
        InvalidInput: the input breaks the workflow's inputSchema.
        InvalidRequest: a task names neither agent nor capability and there is no `agent_id`; or a
            moment is over that is to come.
        AgentNotFound: no agent is registered as `agent_id`.
    """
    stored.check_open()
    definition, agent_id = stored.definition, submission.agent_id
    definition.check_input(submission.input)
    _check_moments(tx, submission)
    check_agents(tx, definition, agent_id)
    run_id = run_id or uuid7()
    tasks, nodes, drawn = _draw(definition, agent_id)
    about = {
        "opscore.run_id": run_id,
        "opscore.workflow_id": stored.workflow_id,
        "opscore.workflow_version": stored.version,
        "opscore.schedule": submission.schedule,
        "opscore.request_id": submission.request_id,
    }
    with tracing.span("submit run", "producer", about):
        abroad = _SUBMIT(
            tx,
            {
                **{name: getattr(submission, name) for name in _AS_SUBMITTED},
                "run_id": run_id,
                "workflow_id": stored.workflow_id,
                "version": stored.version,
                "traceparent": tracing.current() or submission.traceparent,
                "labels": dict(submission.labels),
                "max_concurrent": definition.max_concurrent_runs,
                "deadline_seconds": submission.deadline_seconds or definition.deadline_seconds,
                "tasks": [_in_json(row) for row in tasks],
            },
        )
    tell(
        tx,
        "run.queued",
        run_id=run_id,
        workflow_id=stored.workflow_id,
        version=stored.version,
        tasks=len(tasks),
        by=submission.by,
        request_id=submission.request_id,
    )
    tally.count(tx, tally.RUNS_SUBMITTED)
    nodes = _sent_abroad(nodes, abroad.scalars())
    limited = None if definition.max_concurrent_runs is None else stored.workflow_id
    is_due = submission.start_at is None
    request_id = submission.request_id
    return Plan(run_id, 1, request_id, nodes, drawn=drawn, limited=limited, is_due=is_due)


_AS_SUBMITTED = (
    *("input", "agent_id", "priority", "request_id", "by", "start_at", "deadline_at"),
    *("rerun_of", "schedule", "parent_task_id", "depth", "budget"),
)
_NOW = Prepared("SELECT now()")


def _check_moments(tx: Tx, submission: Submission) -> None:
    """Refuse a start or a deadline that is over, and a deadline before the start."""
    start, deadline = submission.start_at, submission.deadline_at
    if start is None and deadline is None:
        return
    (now,) = _NOW(tx).scalars()
    faults: dict[str, list[str]] = {}
    if start is not None and start <= now:
        faults["/startAt"] = ["This moment is over; leave startAt out to start at once."]
    if deadline is not None and deadline <= max(now, start or now):
        after = "startAt" if start is not None and start > now else "now"
        faults["/deadlineAt"] = [f"A run cannot be over before it starts; name one after {after}."]
    if faults:
        raise InvalidRequest(faults)


def _in_json(row: dict[str, Any]) -> dict[str, Any]:
    ids = {name: [str(id) for id in row[name]] for name in ("depends_on", "successors")}
    return row | ids | {"id": str(row["id"])}


def _draw(
    definition: Definition, agent_id: str | None
) -> tuple[list[dict[str, Any]], tuple[Node, ...], Canvas]:
    """Return the rows of a run's tasks, the graph they are, and what is published of it first."""
    tasks = _task_rows(definition, agent_id)
    nodes = tuple(
        Node(row["id"], frozenset(row["depends_on"]), row["timeout_seconds"], row["queue"])
        for row in tasks
    )
    drawn = build(nodes)
    _hold_beyond(tasks, drawn)
    return tasks, nodes, drawn


def _sent_abroad(nodes: tuple[Node, ...], abroad: Sequence[UUID]) -> tuple[Node, ...]:
    remote = set(abroad)
    return tuple(replace(n, queue=IO_QUEUE) if n.id in remote else n for n in nodes)


@dataclass(frozen=True, slots=True)
class Draft:
    """A run that nobody submitted: its tasks' names, its graph, and what would be published."""

    names: Mapping[UUID, str]
    """As the definition has them; `END` for the implicit end."""
    nodes: tuple[Node, ...]
    drawn: Canvas


_ABROAD = Prepared(
    f"""
SELECT t.id FROM jsonb_to_recordset(cast(:tasks AS jsonb)) AS t (
    id uuid, kind text, wanted_agent_id text, wanted_capability text)
WHERE {_IS_REMOTE}
""",
    json=("tasks",),
)


def draft_run(tx: Tx, definition: Definition) -> Draft:
    """Return what a run of a definition would be if it were submitted now; write nothing."""
    tasks, nodes, drawn = _draw(definition, None)
    abroad = _ABROAD(tx, {"tasks": [_in_json(row) for row in tasks]}).scalars()
    names = {row["id"]: row["definition_id"] for row in tasks}
    return Draft(names, _sent_abroad(nodes, abroad), drawn)


def _hold_beyond(tasks: list[dict[str, Any]], drawn: Canvas) -> None:
    """Let what no message carries yet wait for its dependencies: waking it builds its segment."""
    beyond = set(drawn.beyond)
    for row in tasks:
        is_beyond = row["id"] in beyond
        row["status"] = "waiting" if is_beyond else "pending"
        row["reason"] = "dependencies" if is_beyond else None


def check_agents(tx: Tx, definition: Definition, agent_id: str | None) -> None:
    """Make sure that every task has somebody to do it, once the run is for this agent.

    Raises:
        InvalidRequest: a task names neither agent nor capability and there is no `agent_id`.
        AgentNotFound
    """
    if agent_id is None:
        definition.check_bound()
    else:
        known = select(Agent.agent_id).where(
            Agent.agent_id == agent_id, Agent.deregistered_at.is_(None)
        )
        if tx.execute(known).first() is None:
            raise AgentNotFound(agent_id=agent_id)


def _task_rows(definition: Definition, agent_id: str | None) -> list[dict[str, Any]]:
    """Return the rows of a run's tasks; with several leaves an implicit end joins them.

    So it does if the only leaf may be skipped, or fail and the run go on: whatever becomes of the
    tasks, the run's last one completes.
    """
    specs = list(definition.tasks)
    if len(definition.leaves) > 1 or _may_leave_nothing(definition.task(definition.leaves[0])):
        nothing = Template.compile({}, "", Faults())
        specs.append(TaskSpec(END, None, None, None, nothing, definition.leaves, type="end"))
    ids = {spec.id: uuid7() for spec in specs}
    after: dict[str, list[UUID]] = {spec.id: [] for spec in specs}
    for spec in specs:
        for name in spec.depends_on:
            after[name].append(ids[spec.id])
    rows = [_task_row(spec, position, ids, after[spec.id]) for position, spec in enumerate(specs)]
    for row, spec in zip(rows, specs, strict=True):
        if spec.type == "agent" and spec.agent_id is None and spec.capability is None:
            row["wanted_agent_id"] = agent_id
        row["line_agent_id"] = row["wanted_agent_id"]
        if not row["successors"]:
            row["is_sink"] = True
            row["reads"] = sorted(
                {*row["reads"], *output_reads(definition)} - {row["definition_id"]}
            )
    return rows


def _may_leave_nothing(leaf: TaskSpec) -> bool:
    return leaf.may_be_skipped or leaf.on_failure == "continue"


def output_reads(definition: Definition) -> frozenset[str]:
    """Return the tasks the run's output is made of: those its expression names, else the leaves."""
    return (
        frozenset(definition.leaves) if definition.output is None else definition.output_references
    )


def _task_row(
    spec: TaskSpec, position: int, ids: Mapping[str, UUID], successors: list[UUID]
) -> dict[str, Any]:
    each = spec.for_each
    return {
        "id": ids[spec.id],
        "definition_id": spec.id,
        "queue": AGENTS_QUEUE if spec.type == "agent" else CONTROL_QUEUE,
        "kind": spec.type if each is None else "for_each",
        "item_kind": spec.type if each else None,
        "undecided": spec.may_be_skipped,
        "position": position,
        "max_parallel": each.max_parallel if each else None,
        "depends_on": [ids[name] for name in spec.depends_on],
        "successors": successors,
        "reads": sorted(spec.references),
        "is_sink": False,
        "wanted_agent_id": spec.agent_id,
        "wanted_capability": spec.capability,
        "fallback": list(spec.fallback),
        "timeout_seconds": spec.timeout_seconds,
        "max_attempts": spec.retry.max_attempts,
        "retry_backoff": spec.retry.backoff_seconds,
        "retry_max_backoff": spec.retry.max_backoff_seconds,
        "busy_backoff": spec.busy.backoff_seconds,
        "busy_max_backoff": spec.busy.max_backoff_seconds,
        "max_wait_seconds": spec.busy.max_wait_seconds,
        "goes_on": spec.on_failure == "continue",
    }


# --- Cancelling and settling ---------------------------------------------------------------------


def cancel_run(tx: Tx, run_id: UUID, by: str | None = None) -> None:
    """Cancel a run: no task of it starts once this commits; running attempts are told.

    So are the runs of its sub-workflows. Call `settle_run` after the commit. Asking again while it
    ends changes nothing.

    Raises:
        RunNotFound: there is no such run.
        RunFinished: it is over already.
    """
    row = open_run(tx, run_id)
    if row.cancel_requested_at is None:
        request_cancel(tx, run_id, by)


def open_run(tx: Tx, run_id: UUID) -> Row[Any]:
    """Return what a control needs to know of a run that is not over, and lock it.

    Raises:
        RunNotFound: there is no such run.
        RunFinished: it is over already.
    """
    row = tx.execute(
        select(Run.status, Run.cancel_requested_at, Run.error, Run.started_at)
        .where(Run.id == run_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        raise RunNotFound(run_id=run_id)
    if row.status in RUN_ENDED:
        failed = row.status == RunStatus.FAILED
        way = "/retry tries again what failed of it" if failed else "/rerun runs it anew"
        raise RunFinished(status=row.status, way=way)
    return row


_SETTLE = Prepared(
    f"""
WITH settled AS (
    UPDATE runs r
    SET status = CASE WHEN r.cancel_requested_at IS NULL THEN 'failed' ELSE 'cancelled' END,
        reason = NULL, finished_at = now()
    WHERE r.id = :run_id AND r.status IN ('queued', 'running', 'paused')
      AND (r.error IS NOT NULL OR r.cancel_requested_at IS NOT NULL)
      AND NOT EXISTS (SELECT FROM tasks t WHERE t.run_id = r.id AND t.status NOT IN {ENDED})
    RETURNING r.id, r.status, r.error, r.parent_task_id, r.request_id,
              CASE WHEN r.max_concurrent IS NOT NULL THEN r.workflow_id END AS frees
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.' || status, jsonb_strip_nulls(jsonb_build_object('error', error)) FROM settled
)
SELECT parent_task_id, frees, status, error ->> 'code' AS code, request_id FROM settled
""",
)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that ended just now."""

    parent_task_id: UUID | None
    """The task that ran it as its sub-workflow: call `wake_parent`."""
    frees: str | None
    """The workflow whose next run may begin: call `release_runs`."""


def settle_run(tx: Tx, run_id: UUID) -> Ended | None:
    """End a run that fails or is cancelled once nothing of it runs any more."""
    row = _SETTLE(tx, {"run_id": run_id}).first()
    if row is None:
        return None
    tell(tx, RUN_ENDS[row.status], run_id=run_id, code=row.code, request_id=row.request_id)
    tally.count(tx, tally.RUNS_ENDED, row.status)
    return Ended(row.parent_task_id, row.frees)


_ENDING = Prepared(
    f"""
SELECT r.id FROM runs r WHERE r.status IN ('queued', 'running', 'paused')
  AND (r.error IS NOT NULL OR r.cancel_requested_at IS NOT NULL)
  AND NOT EXISTS (SELECT FROM tasks t WHERE t.run_id = r.id AND t.status NOT IN {ENDED})
LIMIT :limit
"""
)


def runs_to_settle(tx: Tx, limit: int) -> list[UUID]:
    """Return runs with nothing left to end, whose last finisher died before settling them."""
    return _ENDING(tx, {"limit": limit}).scalars()


# --- Runs of one workflow at once ----------------------------------------------------------------

_RELEASE_RUNS = Prepared(
    f"""
WITH {free_slots(f"'{RUNS}' || :workflow_id", "runs", listed(RUN_ENDED))}, line AS (
    SELECT id, priority, created_at FROM runs
    WHERE workflow_id = :workflow_id AND status = 'queued' AND reason = '{HELD}'
      AND cancel_requested_at IS NULL
    ORDER BY priority DESC, created_at, id
    LIMIT CASE WHEN EXISTS (
        SELECT FROM (SELECT definition FROM workflows WHERE workflow_id = :workflow_id
                     ORDER BY inline, version DESC LIMIT 1) AS newest
        WHERE definition ->> 'maxConcurrentRuns' IS NOT NULL) THEN {PLACES} END
    FOR NO KEY UPDATE SKIP LOCKED
), {HAND_ON}, released AS (
    UPDATE runs r SET reason = NULL, generation_at = now() FROM line
    WHERE r.id = line.id
    RETURNING r.id, line.priority, line.created_at, r.request_id
), told AS (
    INSERT INTO events (run_id, type) SELECT id, 'run.released' FROM released
)
SELECT id, request_id FROM released ORDER BY priority DESC, created_at, id
"""
)
_LIMITED = Prepared(
    f"SELECT DISTINCT workflow_id FROM runs WHERE status = 'queued' AND reason = '{HELD}'"
)


def release_runs(tx: Tx, workflow_id: str) -> list[UUID]:
    """Let the next runs of a workflow begin, up to its newest version's `maxConcurrentRuns`.

    Publish them. Called after a submission and when one is over, and every second by the keeper.
    """
    released = _RELEASE_RUNS(tx, {"workflow_id": workflow_id})
    for row in released:
        tell(tx, "run.released", run_id=row.id, request_id=row.request_id)
    return released.scalars()


def limited_workflows(tx: Tx) -> list[str]:
    """Return the workflows whose runs wait for their turn."""
    return _LIMITED(tx).scalars()


# --- Publishing again ----------------------------------------------------------------------------

_REPUBLISH = Prepared(
    f"""
WITH raised AS (
    UPDATE runs r SET generation = r.generation + 1, generation_at = now()
    WHERE r.id = :run_id AND r.generation = :generation AND {RUN_OPEN}
    RETURNING r.id, r.generation, r.request_id
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.republished', jsonb_build_object('generation', generation) FROM raised
)
SELECT generation, request_id FROM raised
""",
)
_NODES = Prepared(
    f"""
SELECT t.id, t.timeout_seconds, t.queue, r.generation, r.request_id,
       ARRAY(SELECT d.id FROM tasks d WHERE d.id = ANY (t.depends_on) AND d.status NOT IN {ENDED})
           AS depends_on
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.run_id = :run_id AND t.index IS NULL AND t.status NOT IN {ENDED} AND {RUN_OPEN}
ORDER BY t.position
""",
)
_LOOSE_ITEMS = Prepared(
    """
SELECT t.id, t.timeout_seconds, t.queue FROM tasks t
WHERE t.run_id = :run_id AND t.index IS NOT NULL AND t.status = 'pending' ORDER BY t.index
""",
)


def republish_run(tx: Tx, run_id: UUID, generation: int) -> Plan | None:
    """Raise the run's generation and return what is left of it; older canvases fade out (I7).

    None if the run is over or somebody raised its generation (from `generation`) already.
    """
    raised = _REPUBLISH(tx, {"run_id": run_id, "generation": generation}).first()
    if raised is None:
        return None
    tell(tx, "run.republished", run_id=run_id, **raised._asdict())
    return plan_run(tx, run_id)


def plan_run(tx: Tx, run_id: UUID) -> Plan | None:
    """Return what is left of an open run, under its present generation."""
    rows = _NODES(tx, {"run_id": run_id})
    if not rows:
        return None
    nodes = tuple(
        Node(row.id, frozenset(row.depends_on), row.timeout_seconds, row.queue) for row in rows
    )
    loose = _LOOSE_ITEMS(tx, {"run_id": run_id})
    items = tuple(Node(row.id, frozenset(), row.timeout_seconds, row.queue) for row in loose)
    return Plan(run_id, rows[0].generation, rows[0].request_id, nodes, items)


_HOLD_BACK = Prepared(
    f"""
UPDATE tasks t
SET status = 'waiting', reason = 'dependencies', message = NULL,
    wake_at = NULL, woken_at = NULL
WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.id = ANY (:task_ids)
               ORDER BY o.id FOR NO KEY UPDATE)
  AND ({still("pending")} OR {still("waiting")} AND t.reason = 'dependencies')
""",
)
_CARRY = Prepared(
    f"""
UPDATE tasks t SET status = 'pending', reason = NULL
WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.id = ANY (:task_ids) AND {still("waiting", "o")}
               AND o.reason = 'dependencies' AND o.message IS NULL AND o.woken_at IS NULL
               ORDER BY o.id FOR NO KEY UPDATE)
"""
)


def carry(tx: Tx, task_ids: Sequence[UUID]) -> None:
    """Note that tasks which were held back come by a message now: nobody has to wake them."""
    _CARRY(tx, {"task_ids": list(task_ids)})


def hold_back(tx: Tx, task_ids: Sequence[UUID]) -> None:
    """Let tasks wait for their dependencies without a message: waking them builds their segment.

    Call `wake_joins` after the commit: the last dependency may have finished at the same moment.
    """
    _HOLD_BACK(tx, {"task_ids": list(task_ids)})
