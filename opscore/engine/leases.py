"""Attempts whose worker lives, is stopped, or went silent."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import select, text

from opscore import tally
from opscore.db import Prepared, Tx, tell
from opscore.engine.clauses import ATTEMPTED, IS_ABROAD, backoff, still
from opscore.engine.outcomes import Gone, end_task, leave, lock_run
from opscore.models import Task
from opscore.work import Failure, as_error

_RENEW = Prepared(
    f"""
WITH mine AS MATERIALIZED (
    SELECT t.id FROM tasks t
    JOIN unnest(cast(:ids AS uuid[]), cast(:attempts AS int[])) AS held (id, attempt)
      ON t.id = held.id AND t.attempt = held.attempt
    WHERE {still("running")} AND t.lease_expires_at > now()
    ORDER BY t.id FOR NO KEY UPDATE OF t
), renewed AS (
    UPDATE tasks t
    SET lease_expires_at = least(now() + make_interval(secs => :lease), t.deadline_at)
    FROM mine WHERE t.id = mine.id
    RETURNING t.id, t.run_id, t.attempt, t.lease_expires_at
), slots AS (
    UPDATE slots s SET lease_expires_at = renewed.lease_expires_at FROM renewed
    WHERE s.holder = renewed.id AND s.attempt = renewed.attempt
)
SELECT renewed.id, r.cancel_requested_at IS NOT NULL
       OR coalesce(r.error ->> 'code' = 'deadline_exceeded', false) AS cancelled
FROM renewed JOIN runs r ON r.id = renewed.run_id
""",
)


def renew_leases(tx: Tx, held: Mapping[UUID, int], lease_seconds: float) -> dict[UUID, bool]:
    """Extend the leases of these attempts (task id -> attempt), never beyond their deadline.

    Returns task id -> whether nobody wants its result any more: its run was cancelled, or is over
    its deadline. An attempt that is missing was lost.
    """
    if not held:
        return {}
    rows = _RENEW(tx, {"ids": list(held), "attempts": list(held.values()), "lease": lease_seconds})
    return {row.id: row.cancelled for row in rows}


def expired_attempts(tx: Tx, limit: int, lease_seconds: float = 0) -> list[UUID]:
    """Return the tasks whose running attempt let its lease run out.

    None within `lease_seconds` of the server's start: nobody could renew while it was away, and who
    is alive does so first.
    """
    query = select(Task.id).where(
        text("lease_expires_at < now()"),
        text("pg_postmaster_start_time() < now() - make_interval(secs => :lease)").bindparams(
            lease=lease_seconds
        ),
    )
    return list(tx.execute(query.order_by(Task.lease_expires_at).limit(limit)).scalars())


_COUNTS_AS_LOST = "t.deadline_at >= now() AND t.status = 'running'"
"""A timeout, or an agent behind HTTP that went silent, is a failure; a silent worker is not."""
_LOSE = Prepared(
    leave(
        f"""status = 'waiting', waits = 0, waiting_since = NULL, woken_at = NULL,
        reason = CASE WHEN t.items IS NULL THEN 'retry' ELSE 'children' END,
        wake_at = CASE WHEN {IS_ABROAD} THEN now() + make_interval(secs =>
                {backoff("t.retry_backoff", "t.retry_max_backoff", "t.tries")})
            WHEN t.items IS NULL THEN now() END,
        lost = t.lost + CASE WHEN {_COUNTS_AS_LOST} THEN 1 ELSE 0 END,
        tries = t.tries + CASE WHEN {_COUNTS_AS_LOST} THEN 0 ELSE 1 END""",
        f"""{ATTEMPTED} AND t.lease_expires_at < now() AND NOT t.ends_run
        AND CASE WHEN {_COUNTS_AS_LOST} THEN t.lost + 1 < :max_lost
                 ELSE t.tries + 1 < t.max_attempts END""",
        """status = 'lost', error = jsonb_build_object(
            'code', cast(:code AS text), 'message', cast(:sentence AS text))""",
        "'task.lost', jsonb_build_object('attempt', attempt)",
        answer="""run_id, parent_id, gone.definition_id AS task, gone.attempt, gone.agent_id,
            gone.wake_at, r.request_id FROM gone JOIN runs r ON r.id = gone.run_id""",
    ),
)
_EXPIRED = Prepared(
    f"""
SELECT t.run_id, t.parent_id, t.kind, t.attempt, t.lost, t.deadline_at < now() AS timed_out,
       t.status = 'waiting' AS is_remote, t.timeout_seconds
FROM tasks t WHERE t.id = :task_id AND {ATTEMPTED} AND t.lease_expires_at < now()
FOR NO KEY UPDATE
""",
)


def lose_attempt(tx: Tx, task_id: UUID, max_lost: int) -> Gone | None:
    """Take an expired attempt from its silent worker or agent: the task goes back to wait.

    A silent worker's counts as lost, what timed out or went silent behind HTTP as failed. The
    `max_lost`-th time, or with no attempt left, the task fails for good. None if it was finished or
    renewed meanwhile.
    """
    run_id = tx.execute(select(Task.run_id).where(Task.id == task_id)).scalar()
    if run_id is None:
        return None
    lock_run(tx, run_id)
    row = _EXPIRED(tx, {"task_id": task_id}).first()
    if row is None:
        return None
    why = _why_lost(row)
    back = _LOSE(
        tx,
        {"task_id": task_id, "max_lost": max_lost, "code": why.code, "sentence": why.message},
    ).first()
    if back is not None:
        ids = {name: getattr(back, name) for name in ("run_id", "task", "attempt", "agent_id")}
        more = {"request_id": back.request_id, "code": why.code, "wake_at": back.wake_at}
        tell(tx, "task.lost", is_warning=True, task_id=task_id, **ids, **more)
        if row.kind == "agent":
            is_lost = why.code == "worker_lost"
            tally.count(tx, tally.ATTEMPTS, tally.LOST if is_lost else tally.FAILED)
        return Gone(back.run_id, back.parent_id, None)
    if why.code == "worker_lost":
        message = f"Its worker went silent {row.lost + 1} times; the task may be what kills it."
        why = Failure("worker_lost", message)
    finished = end_task(tx, task_id, row.run_id, as_error(why), attempt=row.attempt)
    return None if finished is None else Gone(row.run_id, row.parent_id, finished)


def _why_lost(row: Any) -> Failure:
    if row.timed_out:
        return Failure("timeout", f"No answer within {row.timeout_seconds:g} seconds.")
    if row.is_remote:
        return Failure("agent_silent", "The agent sent no heartbeat in time.")
    return Failure("worker_lost", "The worker went silent.")
