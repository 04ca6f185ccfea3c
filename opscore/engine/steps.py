"""What no agent does: branches, approvals, delays and sub-workflows.

Each is claimed like any other task, says what it waits for, and waits without a worker; a visit
wakes it when that has come, and finishes it.
"""

from typing import Any
from uuid import UUID

from sqlalchemy import func, literal_column, select
from uuid6 import uuid7

from opscore.db import Prepared, Tx, tell
from opscore.engine.clauses import MINE, RUN_ALIVE, RUN_OPEN, WAITS, WAKE_AT, WOKEN, still
from opscore.engine.controls import pause_children, retry_run
from opscore.engine.outcomes import Finished, leave, lock_run
from opscore.engine.runs import Plan, Submission, submit_run
from opscore.engine.waits import Woken, as_woken
from opscore.errors import ApprovalRefused, OpsCoreError, TaskNotFound
from opscore.models import Run, Task
from opscore.states import Reason, RunStatus
from opscore.work import Claimed, Wait, check_nesting
from opscore.workflows import StoredWorkflow

# --- Branches ------------------------------------------------------------------------------------

_UNDECIDED = f"t.id = :task_id AND t.undecided AND {WAITS}"
_DECIDE = Prepared(f"UPDATE tasks t SET undecided = false WHERE {_UNDECIDED} RETURNING id")
_SKIP = Prepared(
    f"""
WITH skipped AS (
    UPDATE tasks t
    SET status = 'skipped', reason = :reason, finished_at = now(), undecided = false,
        wake_at = NULL, woken_at = NULL
    FROM runs r WHERE {_UNDECIDED} AND r.id = t.run_id AND {RUN_OPEN}
    RETURNING t.id, t.run_id, t.definition_id, t.message, r.generation, r.request_id
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.skipped', jsonb_build_object('reason', cast(:reason AS text))
    FROM skipped
)
SELECT run_id, definition_id, message, generation, request_id FROM skipped
"""
)


def decide_task(tx: Tx, task_id: UUID) -> None:
    """Note that a task is to run: its `when` holds, or it has none."""
    _DECIDE(tx, {"task_id": task_id})


def skip_task(tx: Tx, task_id: UUID, reason: str) -> Finished | None:
    """Skip a task; None if it moved, or its run takes no tasks now."""
    row = _SKIP(tx, {"task_id": task_id, "reason": reason}).first()
    if row is None:
        return None
    ids = {"run_id": row.run_id, "task_id": task_id, "task": row.definition_id}
    tell(tx, "task.skipped", **ids, reason=reason, request_id=row.request_id)
    return Finished(row.generation, message=row.message)


# --- Waiting -------------------------------------------------------------------------------------

_BEGIN_WAIT = Prepared(
    leave(
        """status = 'waiting', reason = :reason, items = 0, woken_at = NULL,
        message = coalesce(t.message, :message),
        wake_at = coalesce(:until, now() + make_interval(secs => :seconds))""",
        f"{MINE} AND NOT t.ends_run",
        None,
        f"""'task.waiting', jsonb_build_object(
            'reason', cast(:reason AS text), 'wakeAt', {WAKE_AT})""",
        answer="gone.wake_at FROM gone",
        freed="",
    ),
    json=("message",),
)


def begin_wait(tx: Tx, claimed: Claimed, wait: Wait, message: dict[str, Any]) -> bool:
    """Let a claimed task wait, with its visit saved; False if the attempt is over or its run ends.

    When the time is over it is claimed once more, as `expanded`.
    """
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "reason": str(wait.reason),
        "seconds": wait.seconds,
        "until": wait.until,
        "message": message,
    }
    row = _BEGIN_WAIT(tx, parameters).first()
    if row is None:
        return False
    tell(tx, "task.waiting", **claimed.ids, reason=wait.reason, wake_at=row.wake_at)
    return True


# --- Approvals -----------------------------------------------------------------------------------

_ASKED = """(
    SELECT max(s.number) FROM agent_steps s WHERE s.task_id = {row}.id AND s.kind = 'asked')"""
"""Which call of an LLM agent is asked about, by the step that asks; null of an approval."""
_APPROVE = Prepared(
    f"""
WITH decided AS (
    UPDATE tasks t SET decision = :decision, woken_at = now(), wake_at = NULL
    FROM runs r
    WHERE t.id = :task_id AND {still("waiting")} AND t.reason = 'approval' AND t.decision IS NULL
      AND t.woken_at IS NULL AND (t.wake_at IS NULL OR t.wake_at > now())
      AND (cast(:call AS int) IS NULL OR :call = {_ASKED.format(row="t")})
      AND r.id = t.run_id AND {RUN_ALIVE}
    RETURNING {WOKEN}
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, task_id, :type, jsonb_strip_nulls(jsonb_build_object(
        'by', cast(:decision AS jsonb) -> 'principal',
        'comment', cast(:decision AS jsonb) -> 'comment'))
    FROM decided
)
SELECT * FROM decided
""",
    json=("decision",),
)


def decide_approval(
    tx: Tx, task_id: UUID, *, approved: bool, comment: str | None, by: str, call: int | None = None
) -> list[Woken]:
    """Record what somebody says of an approval; its visit, to be sent after the commit, ends it.

    With `call` of that call of an LLM agent alone: it may ask about the next one by now.

    Raises:
        TaskNotFound
        ApprovalRefused: it is no approval, is not asked for yet, or is decided.
    """
    decision = {"approved": approved, "comment": comment, "principal": by}
    type = "task.approved" if approved else "task.rejected"
    given = {"task_id": task_id, "decision": decision, "type": type, "call": call}
    woken = as_woken(_APPROVE(tx, given))
    if not woken:
        raise _why_refused(tx, task_id, call)
    ids: dict[str, Any] = {"run_id": woken[0].run_id, "task_id": task_id}
    tell(tx, "task.approved" if approved else "task.rejected", **ids, by=by)
    return woken


def _why_refused(tx: Tx, task_id: UUID, call: int | None) -> OpsCoreError:
    query = (
        select(
            func.coalesce(Task.item_kind, Task.kind).label("type"),
            *(Task.status, Task.reason, Task.decision, Run.status.label("run_status")),
            literal_column(_ASKED.format(row="tasks")).label("call"),
        )
        .join(Run, Run.id == Task.run_id)
        .where(Task.id == task_id, Task.kind != "end")
    )
    row = tx.execute(query).one_or_none()
    if row is None:
        return TaskNotFound(task_id=task_id)
    if row.decision is not None:
        said = "approved" if row.decision["approved"] else "rejected"
        return ApprovalRefused(f"It was {said} already, by {row.decision['principal']}.")
    if row.type != "approval" and row.reason != Reason.APPROVAL:
        return ApprovalRefused(f"The task is no approval: its type is {row.type}.")
    if row.status in ("pending", "waiting") and row.reason != Reason.APPROVAL:
        way = "decide it once its status is waiting and its reason approval"
        return ApprovalRefused(f"It is not asked for yet; {way}.")
    if row.status == "waiting" and call not in (None, row.call):
        return ApprovalRefused(f"It does not ask about call {call} now, but about {row.call}.")
    if row.status == "waiting":
        return ApprovalRefused("It is too late: its timeoutSeconds have passed, or its run ends.")
    return ApprovalRefused(f"It is over: its status is {row.status}, its run's {row.run_status}.")


# --- Sub-workflows -------------------------------------------------------------------------------

_BEGIN_CHILD = Prepared(
    leave(
        """status = 'waiting', reason = 'children', items = 0, woken_at = NULL, wake_at = NULL,
        message = coalesce(t.message, :message), child_run_id = :run_id""",
        f"{MINE} AND NOT t.ends_run",
        None,
        """'task.waiting', jsonb_build_object(
            'reason', 'children', 'childRunId', cast(:run_id AS text))""",
        freed="",
    ),
    json=("message",),
)
_EARLIER_CHILD = Prepared(
    """
SELECT c.id, c.status FROM tasks t JOIN runs c ON c.id = t.child_run_id
WHERE t.id = :task_id AND c.cancel_requested_at IS NULL
  -- Unless there is nothing of it to be tried again: see `retry_run`.
  AND (c.status <> 'failed' OR EXISTS (
      SELECT FROM tasks d WHERE d.run_id = c.id
      AND (d.status = 'cancelled' OR d.status = 'failed' AND NOT d.goes_on) OFFSET 0))
FOR NO KEY UPDATE OF c
"""
)
_ANCESTORS = Prepared(
    """
WITH RECURSIVE line AS (
    SELECT id, workflow_id, depth, parent_task_id, priority, labels, status FROM runs
    WHERE id = :run_id
    UNION ALL
    SELECT r.id, r.workflow_id, r.depth, r.parent_task_id, r.priority, r.labels, r.status
    FROM line JOIN tasks t ON t.id = line.parent_task_id JOIN runs r ON r.id = t.run_id
)
SELECT * FROM line ORDER BY depth DESC
"""
)


def begin_child(
    tx: Tx,
    claimed: Claimed,
    stored: StoredWorkflow,
    input: Any,
    message: dict[str, Any],
    deadline_seconds: float | None,
) -> list[Plan] | None:
    """Start the run of a sub-workflow and let its task wait for it, all in this transaction.

    A task that is tried again goes on with the run it had, unless that was cancelled: what failed
    of it is tried again. Below a paused run it is paused too. None if the attempt is over or its
    run ends. Publish the plans after the commit, then call `wake_parent`: it may be over already.

    Raises:
        CannotNest
        WorkflowArchived: and the task has no run to go on with.
        InvalidInput, InvalidRequest: the run cannot be submitted; as for `submit_run`.
    """
    lock_run(tx, claimed.run_id)  # a pause at this moment takes the new run along, or is seen here
    above = list(_ANCESTORS(tx, {"run_id": claimed.run_id}))
    check_nesting(stored.workflow_id, [run.workflow_id for run in above])
    submission = Submission(
        input=input,
        labels=above[0].labels,
        priority=above[0].priority,
        request_id=claimed.request_id,
        traceparent=claimed.traceparent,
        deadline_seconds=deadline_seconds,
        parent_task_id=claimed.task_id,
        depth=len(above),
    )
    mine = {"task_id": claimed.task_id, "attempt": claimed.attempt}
    earlier = _EARLIER_CHILD(tx, mine).first()
    run_id = uuid7() if earlier is None else earlier.id
    if _BEGIN_CHILD(tx, mine | {"run_id": run_id, "message": message}).first() is None:
        return None
    tell(tx, "task.waiting", **claimed.ids, reason="children", child_run_id=run_id)
    plans = []
    if earlier is None:
        plans = [submit_run(tx, stored, submission, run_id)]
    elif earlier.status == RunStatus.FAILED:
        plans = retry_run(tx, run_id, by="parent")
    if above[0].status == RunStatus.PAUSED:
        pause_children(tx, claimed.run_id)
    return plans
