"""What operators and clocks do with a run: pause and resume it, have what failed tried again, begin
it when it is due, end it at its deadline."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import select

from opscore.agentkit.loop import SETTLED_BY_RECORD
from opscore.db import Prepared, Tx, tell
from opscore.engine.clauses import DUE, END, HELD, RUN_ALIVE, still
from opscore.engine.outcomes import close_tasks, lock_run
from opscore.engine.runs import Plan, Submission, open_run, plan_run, submit_run
from opscore.errors import (
    InvalidRequest,
    NothingToRetry,
    RunEnding,
    RunNotFailed,
    RunNotFound,
    RunNotPaused,
)
from opscore.models import RUN_STATUS, Run, listed
from opscore.slots import ITEMS, RUNS
from opscore.states import RUN_ENDED, RunStatus
from opscore.workflows import find_workflow

# --- Pausing -------------------------------------------------------------------------------------

_PAUSE = Prepared(
    f"""
WITH paused AS (
    UPDATE runs r SET status = 'paused'
    WHERE r.id = :run_id AND r.status IN ('queued', 'running') AND {RUN_ALIVE}
    RETURNING r.id
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.paused', jsonb_strip_nulls(jsonb_build_object('by', cast(:by AS text)))
    FROM paused
)
SELECT id FROM paused
"""
)
_HELD_UP = """t.status = 'pending' OR t.status = 'waiting'
    AND t.reason IN ('agent_busy', 'agent_unavailable', 'dependencies', 'retry')"""
_HOLD_UP = Prepared(
    f"""
WITH run AS (  -- one that goes on at this moment is paused no more
    SELECT r.id FROM runs r WHERE r.id = :run_id AND {still("paused", "r")} FOR NO KEY UPDATE
)
UPDATE tasks t
SET status = 'waiting', reason = 'paused', waits = 0, waiting_since = NULL, woken_at = NULL,
    wake_at = NULL, kept_until = NULL,
    not_before = CASE WHEN t.reason = 'retry' THEN t.wake_at ELSE t.not_before END
WHERE t.id IN (SELECT t.id FROM run JOIN tasks t ON t.run_id = run.id WHERE {_HELD_UP}
               ORDER BY t.id FOR NO KEY UPDATE OF t)
  AND (coalesce(t.status) = 'pending' OR {still("waiting")}
       AND t.reason IN ('agent_busy', 'agent_unavailable', 'dependencies', 'retry'))
RETURNING t.id
"""
)
_STRAYS = Prepared(
    f"""
SELECT r.id FROM runs r
WHERE {RUN_STATUS} = 'paused' AND EXISTS (
    SELECT FROM tasks t WHERE t.run_id = r.id AND ({_HELD_UP}) OFFSET 0)
LIMIT :limit
"""
)
_CHILDREN = Prepared(
    f"""
SELECT c.id FROM tasks t JOIN runs c ON c.parent_task_id = t.id
WHERE t.run_id = :run_id AND t.child_run_id IS NOT NULL
  AND c.status NOT IN {listed(RUN_ENDED)} AND (c.status = 'paused') = :paused
  AND c.cancel_requested_at IS NULL AND c.error IS NULL
FOR NO KEY UPDATE OF c
"""
)


def pause_run(tx: Tx, run_id: UUID, by: str | None = None) -> None:
    """Start nothing more of a run, nor of its sub-workflows, until it is resumed.

    What runs goes on and ends. Pausing twice changes nothing.

    Raises:
        RunNotFound
        RunFinished: it is over already.
        RunEnding: it was cancelled, or it failed and waits for what still runs.
    """
    row = open_run(tx, run_id)
    if row.cancel_requested_at is not None or row.error is not None:
        raise RunEnding
    if row.status == RunStatus.PAUSED:
        return
    if _PAUSE(tx, {"run_id": run_id, "by": by}):
        tell(tx, "run.paused", run_id=run_id, by=by)
    # Repeated for those that a `forEach` wrote, or released, at this moment.
    while _HOLD_UP(tx, {"run_id": run_id}):
        pass
    pause_children(tx, run_id)


def pause_children(tx: Tx, run_id: UUID) -> None:
    """Pause the runs of a paused run's sub-workflows."""
    for child in _CHILDREN(tx, {"run_id": run_id, "paused": False}).scalars():
        pause_run(tx, child, "parent")


def hold_up_strays(tx: Tx, limit: int) -> None:
    """Hold up what came to wait after its run was paused, such as an attempt that failed."""
    for run_id in _STRAYS(tx, {"limit": limit}).scalars():
        _HOLD_UP(tx, {"run_id": run_id})


_RESUME = Prepared(
    f"""
WITH resumed AS (
    UPDATE runs r
    SET status = CASE WHEN r.started_at IS NULL THEN 'queued' ELSE 'running' END,
        generation = r.generation + 1, generation_at = now()
    WHERE r.id = :run_id AND r.status = 'paused' AND {RUN_ALIVE}
    RETURNING r.id, r.generation, r.reason, r.workflow_id
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.resumed', jsonb_strip_nulls(jsonb_build_object(
        'by', cast(:by AS text), 'generation', generation))
    FROM resumed
)
SELECT reason, workflow_id FROM resumed
"""
)
_LET_GO_ON = Prepared(
    f"""
UPDATE tasks t
SET status = CASE WHEN t.not_before > now() THEN 'waiting' ELSE 'pending' END,
    reason = CASE WHEN t.not_before > now() THEN 'retry' END,
    wake_at = CASE WHEN t.not_before > now() THEN t.not_before END,
    not_before = NULL
WHERE t.run_id = :run_id AND {still("waiting")} AND t.reason = 'paused'
"""
)


def resume_run(tx: Tx, run_id: UUID, by: str | None = None) -> list[Plan]:
    """Let a paused run go on, and its sub-workflows, also those somebody paused by themselves.

    Publish the plans after the commit. Who stood in a line stands at its end.

    Raises:
        RunNotFound
        RunFinished: it is over already.
        RunNotPaused
        RunEnding: it was cancelled while it was paused, or failed.
    """
    status = open_run(tx, run_id).status
    if status != RunStatus.PAUSED:
        raise RunNotPaused(status=status)
    row = _RESUME(tx, {"run_id": run_id, "by": by}).first()
    if row is None:
        raise RunEnding
    tell(tx, "run.resumed", run_id=run_id, by=by)
    _LET_GO_ON(tx, {"run_id": run_id})
    plans = _published(tx, run_id, row)
    for child in _CHILDREN(tx, {"run_id": run_id, "paused": True}).scalars():
        plans += resume_run(tx, child, "parent")
    return plans


def _published(tx: Tx, run_id: UUID, row: Any) -> list[Plan]:
    """Return what is to be published of a run that goes on: all of it, or whoever's turn it is."""
    if row.reason is not None:
        return [Plan(run_id, 0, None, (), limited=row.workflow_id, is_due=row.reason != DUE)]
    plan = plan_run(tx, run_id)
    return [] if plan is None else [plan]


# --- Trying again --------------------------------------------------------------------------------

_RETRY_RUN = Prepared(
    f"""
WITH reopened AS (
    UPDATE runs r
    SET status = 'queued', error = NULL, output = NULL, started_at = NULL, finished_at = NULL,
        generation = r.generation + 1, generation_at = now(),
        deadline_at = now() + (r.deadline_at - coalesce(r.start_at, r.created_at)),
        start_at = now(),
        reason = CASE WHEN r.max_concurrent IS NOT NULL THEN '{HELD}' END
    WHERE r.id = :run_id AND r.status = 'failed'
    RETURNING r.id, r.generation, r.reason, r.workflow_id, r.parent_task_id
), left_to_others AS (  -- it waits its turn again, and who holds a slot is under way
    UPDATE slots s SET holder = NULL FROM reopened
    WHERE s.pool = '{RUNS}' || reopened.workflow_id AND s.holder = reopened.id
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.retried', jsonb_strip_nulls(jsonb_build_object(
        'by', cast(:by AS text), 'generation', generation,
        'tasks', to_jsonb(cast(:tasks AS text[])),
        'parameters', nullif(cast(:overrides AS jsonb), '{{}}')))
    FROM reopened
)
SELECT reason, workflow_id, parent_task_id FROM reopened
""",
    json=("overrides",),
)
_AGAIN = """t.run_id = :run_id AND (t.status = 'cancelled' OR t.status = 'failed' AND (
    NOT t.goes_on OR EXISTS (SELECT FROM tasks p WHERE p.id = t.parent_id AND (
        p.status = 'cancelled' OR p.status = 'failed' AND NOT p.goes_on) OFFSET 0)))"""
_REOPEN = Prepared(
    f"""
WITH again AS MATERIALIZED (
    SELECT t.id, t.definition_id, t.kind, t.items, t.parent_id, t.error,
           row_number() OVER (PARTITION BY t.parent_id ORDER BY t.index) AS place,
           (SELECT p.max_parallel FROM tasks p WHERE p.id = t.parent_id) AS most
    FROM tasks t WHERE {_AGAIN}
), places AS (
    INSERT INTO slots (pool, number, holder)
    SELECT '{ITEMS}' || parent_id, place, id FROM again WHERE place <= most
), anew AS (  -- else an LLM agent goes on with what it has
    UPDATE agent_steps s SET superseded = true FROM again
    WHERE s.task_id = again.id AND NOT s.superseded
      AND (cast(:overrides AS jsonb) ? again.definition_id
           OR again.error ->> 'code' = ANY (cast(:settled AS text[])))
)
UPDATE tasks t
SET status = CASE WHEN waits_for IS NULL THEN 'pending' ELSE 'waiting' END, reason = waits_for,
    error = NULL, output = NULL, finished_at = NULL, ends_run = false, tries = 0, lost = 0,
    waits = 0, waiting_since = NULL, wake_at = NULL, woken_at = NULL, kept_until = NULL,
    not_before = NULL, message = NULL, decision = NULL,
    items = CASE WHEN waits_for = 'children' THEN t.items END,
    child_run_id = CASE WHEN more.parameters IS NULL THEN t.child_run_id END,
    overrides = coalesce(t.overrides, '{{}}') || coalesce(more.parameters, '{{}}')
FROM again CROSS JOIN LATERAL (SELECT CASE
    WHEN again.kind = 'for_each' AND again.items IS NOT NULL THEN 'children'
    WHEN again.place > again.most THEN 'max_parallel' END AS waits_for) AS next,
    LATERAL (SELECT cast(:overrides AS jsonb) -> again.definition_id AS parameters) AS more
WHERE t.id = again.id
RETURNING t.definition_id
""",
    json=("overrides",),
)
_WAITS_AGAIN = Prepared(
    f"""
UPDATE tasks t SET woken_at = NULL
WHERE t.id IN (SELECT id FROM tasks WHERE id = :task_id FOR NO KEY UPDATE SKIP LOCKED)
  AND {still("waiting")} AND t.reason = 'children'
"""
)


def retry_run(
    tx: Tx,
    run_id: UUID,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    by: str | None = None,
) -> list[Plan]:
    """Have what failed of a failed run tried again, and what was cancelled for it.

    Finished tasks keep their outputs. `overrides` (definition id -> parameters) are merged over the
    parameters of tasks that are tried again; a sub-workflow that gets some is run anew, else
    `begin_child` goes on with its run. Publish the plans after the commit.

    Raises:
        RunNotFound
        RunNotFailed
        NothingToRetry: no task failed; its output did, or its deadline passed at the last moment.
        InvalidRequest: `overrides` names a task that is not tried again.
    """
    status = tx.execute(
        select(Run.status).where(Run.id == run_id).with_for_update(key_share=True)
    ).scalar()
    if status is None:
        raise RunNotFound(run_id=run_id)
    if status != RunStatus.FAILED:
        raise RunNotFailed(status=status)
    _check_overrides(tx, run_id, overrides or {})
    settled = list(SETTLED_BY_RECORD)
    given = {"run_id": run_id, "overrides": dict(overrides or {}), "settled": settled}
    names = set(_REOPEN(tx, given).scalars())
    if not names:
        raise NothingToRetry
    tasks = sorted(names - {END})
    (row,) = _RETRY_RUN(tx, given | {"by": by, "tasks": tasks})
    tell(tx, "run.retried", run_id=run_id, by=by, tasks=len(tasks))
    # Whoever ran it may have been told already that it is over. (The task comes before its run.)
    _WAITS_AGAIN(tx, {"task_id": row.parent_task_id})
    return _published(tx, run_id, row)


def _check_overrides(tx: Tx, run_id: UUID, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    if not overrides:
        return
    tried = _TRIED(tx, {"run_id": run_id}).scalars()
    names = ", ".join(sorted(tried)) or "of this run nothing that takes any"
    sentence = f"Only what is tried again can get other parameters: {names}."
    if faults := {f"/parameters/{name}": [sentence] for name in set(overrides) - set(tried)}:
        raise InvalidRequest(faults)


_TRIED = Prepared(
    f"""
SELECT DISTINCT t.definition_id FROM tasks t
WHERE {_AGAIN} AND t.kind IN ('agent', 'workflow', 'for_each')
"""
)


def rerun(tx: Tx, run_id: UUID, *, request_id: str | None = None, by: str | None = None) -> Plan:
    """Submit another run of the same version with the same input, labels and priority.

    Raises:
        RunNotFound
        WorkflowArchived
        AgentNotFound: the agent that it was triggered for is not registered any more.
    """
    run = tx.execute(select(Run).where(Run.id == run_id)).one_or_none()
    if run is None:
        raise RunNotFound(run_id=run_id)
    stored = find_workflow(tx, run.workflow_id, run.version)
    submission = Submission(
        input=run.input,
        agent_id=run.agent_id,
        labels=run.labels,
        priority=run.priority,
        request_id=request_id,
        by=by,
        budget=run.budget,
        rerun_of=run_id,
    )
    return submit_run(tx, stored, submission)


# --- Clocks --------------------------------------------------------------------------------------

_BEGIN_DUE = Prepared(
    f"""
WITH due AS (
    SELECT id FROM runs WHERE status = 'queued' AND reason = '{DUE}' AND start_at <= now()
    ORDER BY start_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
), begun AS (
    UPDATE runs r
    SET reason = CASE WHEN r.max_concurrent IS NOT NULL THEN '{HELD}' END, generation_at = now()
    FROM due WHERE r.id = due.id AND {still("queued", "r")} AND r.reason = '{DUE}'
    RETURNING r.id, r.reason, r.workflow_id, r.request_id
), told AS (
    INSERT INTO events (run_id, type) SELECT id, 'run.due' FROM begun
)
SELECT id, reason, workflow_id, request_id FROM begun
"""
)
_OVERDUE = Prepared(
    f"""
SELECT r.id FROM runs r
WHERE r.deadline_at < now() AND NOT r.status IN {listed(RUN_ENDED)} AND {RUN_ALIVE}
ORDER BY r.deadline_at LIMIT :limit
"""
)
_FAIL_OVERDUE = Prepared(
    f"""
UPDATE runs r SET error = jsonb_build_object(
    'code', 'deadline_exceeded', 'message', 'The run was not over at its deadline.')
WHERE r.id = :run_id AND r.deadline_at < now() AND {RUN_ALIVE}
RETURNING r.id
"""
)


def begin_due_runs(tx: Tx, limit: int) -> list[Plan]:
    """Let runs begin whose `startAt` has come; publish the plans."""
    plans = []
    for row in _BEGIN_DUE(tx, {"limit": limit}):
        tell(tx, "run.due", run_id=row.id, request_id=row.request_id)
        plans += _published(tx, row.id, row)
    return plans


def overdue_runs(tx: Tx, limit: int) -> list[UUID]:
    """Return the runs that are not over at their deadline."""
    return _OVERDUE(tx, {"limit": limit}).scalars()


def fail_overdue_run(tx: Tx, run_id: UUID) -> bool:
    """Begin to fail a run that is not over at its deadline; what runs of it is told to stop.

    Call `settle_run` after the commit.
    """
    lock_run(tx, run_id)
    if _FAIL_OVERDUE(tx, {"run_id": run_id}).first() is None:
        return False
    tell(tx, "run.deadline_exceeded", is_warning=True, run_id=run_id)
    close_tasks(tx, run_id, "deadline_exceeded")
    return True
