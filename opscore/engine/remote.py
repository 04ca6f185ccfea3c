"""Attempts that an agent behind HTTP has taken: they hold their slot and no worker.

The task waits as `remote` under the attempt's lease. Whoever shows the attempt's token ends it with
the statements of `outcomes`, as a worker would; nobody else can.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from opscore.db import Prepared, Tx, tell
from opscore.engine.claims import read_by
from opscore.engine.clauses import ATTEMPTED, IS_ABROAD, RUN_ALIVE, still
from opscore.engine.outcomes import Fenced, Finished, Parked, abandon_attempt, hand_back
from opscore.work import Claimed, Failure

_AWAIT = Prepared(
    f"""
WITH accepted AS (
    UPDATE tasks t
    SET status = 'waiting', reason = 'remote', message = coalesce(t.message, :message),
        wake_at = NULL, woken_at = NULL,
        lease_expires_at = least(t.deadline_at,
                                 now() + make_interval(secs => a.heartbeat_seconds))
    FROM agents a
    WHERE t.id = :task_id AND t.attempt = :attempt AND {still("running")} AND NOT t.ends_run
      AND t.lease_expires_at > now() AND a.agent_id = t.agent_id AND a.deregistered_at IS NULL
    RETURNING t.id, t.run_id, t.agent_id, t.attempt, t.lease_expires_at
), kept AS (
    UPDATE slots s SET lease_expires_at = accepted.lease_expires_at FROM accepted
    WHERE s.pool = accepted.agent_id AND s.holder = accepted.id
      AND s.attempt = accepted.attempt
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.waiting', jsonb_build_object(
        'reason', 'remote', 'attempt', attempt, 'agentId', agent_id)
    FROM accepted
)
SELECT id FROM accepted
""",
    json=("message",),
)


_IS_AWAITED = Prepared(
    f"SELECT 1 FROM tasks t WHERE t.id = :task_id AND t.attempt = :attempt AND {IS_ABROAD}"
)


def await_report(tx: Tx, claimed: Claimed, message: dict[str, Any]) -> Finished | Parked | Fenced:
    """Leave a running attempt to the agent that accepted it; its worker is free.

    `Fenced` also if the agent has reported already.
    """
    mine = {"task_id": claimed.task_id, "attempt": claimed.attempt}
    if _AWAIT(tx, mine | {"message": message}).first() is not None:
        tell(tx, "task.waiting", **claimed.ids, reason="remote")
        return Parked()
    if _IS_AWAITED(tx, mine).first() is not None:  # the answer was lost on the way
        return Parked()
    ended = abandon_attempt(tx, claimed)
    _RECALL(tx, mine)  # it has accepted what nobody wants
    return ended


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """The present attempt at a task, if an agent behind HTTP has it."""

    claimed: Claimed
    token: UUID
    requires_token: bool


_OPEN = Prepared(
    f"""
SELECT t.id AS task_id, t.run_id, t.attempt, t.kind, t.definition_id, t.parent_id,
       t.index AS item_index, t.item, false AS merges_input, false AS expanded, t.is_sink,
       t.agent_id, true AS has_slot, r.workflow_id, r.version, r.generation, t.timeout_seconds,
       t.deadline_at, t.overrides, NULL AS decision, NULL AS child, r.input, {read_by("t")},
       r.request_id, r.traceparent, t.claim_token, a.require_token
FROM tasks t JOIN runs r ON r.id = t.run_id JOIN agents a ON a.agent_id = t.agent_id
WHERE t.id = :task_id AND {ATTEMPTED} AND a.kind = 'remote' AND a.deregistered_at IS NULL
"""
)


def open_attempt(tx: Tx, task_id: UUID) -> OpenAttempt | None:
    """Return the attempt that an agent behind HTTP is at, for whoever reports of it."""
    row = _OPEN(tx, {"task_id": task_id}).first()
    if row is None:
        return None
    claimed = Claimed(**{name: getattr(row, name) for name in Claimed.__slots__})
    return OpenAttempt(claimed, row.claim_token, row.require_token)


_ASTRAY = Prepared(
    """
SELECT t.id, t.run_id, t.attempt FROM agents a
JOIN slots s ON s.pool = a.agent_id JOIN tasks t ON t.id = s.holder
WHERE a.deregistered_at IS NOT NULL
"""
)
_DEREGISTERED = Failure("agent_deregistered", "The agent was deregistered.")


def astray_attempts(tx: Tx) -> list[tuple[UUID, UUID, int]]:
    """Return (task, run, attempt) of what agents still have that were deregistered."""
    return [(row.id, row.run_id, row.attempt) for row in _ASTRAY(tx)]


def withdraw(tx: Tx, task_id: UUID, run_id: UUID, attempt: int) -> None:
    """Take an attempt from a deregistered agent: its task is tried again, and nothing counted."""
    hand_back(tx, task_id, run_id, attempt, _DEREGISTERED, abroad=True)


_BEAT = Prepared(
    f"""
WITH alive AS (
    UPDATE tasks t
    SET lease_expires_at = CASE WHEN {still("running")} THEN t.lease_expires_at
        ELSE least(t.deadline_at, now() + make_interval(secs => a.heartbeat_seconds)) END
    FROM agents a, runs r
    WHERE t.id = :task_id AND t.attempt = :attempt AND {ATTEMPTED}
      AND t.lease_expires_at > now() AND a.agent_id = t.agent_id AND r.id = t.run_id
    RETURNING t.id, t.agent_id, t.attempt, t.lease_expires_at, NOT {RUN_ALIVE} AS is_ending
), kept AS (
    UPDATE slots s SET lease_expires_at = alive.lease_expires_at FROM alive
    WHERE s.pool = alive.agent_id AND s.holder = alive.id AND s.attempt = alive.attempt
), seen AS (
    -- Others take an agent's row before a task's.
    UPDATE agents a SET seen_at = now()
    WHERE a.agent_id IN (SELECT k.agent_id FROM agents k JOIN alive USING (agent_id)
                         FOR NO KEY UPDATE OF k SKIP LOCKED)
)
SELECT lease_expires_at, is_ending FROM alive
"""
)


@dataclass(frozen=True, slots=True)
class Beat:
    lease_expires_at: datetime
    is_ending: bool
    """The run ends: the agent may stop."""


def keep_alive(tx: Tx, claimed: Claimed) -> Beat | None:
    """Renew an agent's lease by its heartbeat, never beyond the deadline; None if it is over."""
    row = _BEAT(tx, {"task_id": claimed.task_id, "attempt": claimed.attempt}).first()
    return None if row is None else Beat(row.lease_expires_at, row.is_ending)


_NOTE = Prepared(
    """
WITH noted AS (
    UPDATE attempts SET token = :token, report = :digest
    WHERE task_id = :task_id AND number = :attempt AND token IS NULL
    RETURNING agent_id
), seen AS (
    UPDATE agents a SET seen_at = now()
    WHERE a.agent_id IN (SELECT k.agent_id FROM agents k JOIN noted USING (agent_id)
                         FOR NO KEY UPDATE OF k SKIP LOCKED)
)
SELECT agent_id FROM noted
"""
)
_REPORTED = Prepared(
    """
SELECT 1 FROM attempts WHERE task_id = :task_id AND report = :digest
  AND token = coalesce(:token, token)
"""
)


def note_report(tx: Tx, claimed: Claimed, token: UUID, digest: str) -> bool:
    """Remember which result ended an attempt, so that the same again can be told from another.

    False if another did, at the same moment.
    """
    key = {"task_id": claimed.task_id, "attempt": claimed.attempt}
    return _NOTE(tx, key | {"token": token, "digest": digest}).first() is not None


def is_reported(tx: Tx, task_id: UUID, token: UUID | None, digest: str) -> bool:
    """Tell whether this very result ended an attempt at the task: that with `token`, if given."""
    given = {"task_id": task_id, "token": token, "digest": digest}
    return _REPORTED(tx, given).first() is not None


# --- Recalling -----------------------------------------------------------------------------------

RECALL_AGAIN_SECONDS = 30
RECALLED_FOR_SECONDS = 600
"""An agent that does not answer is told again and again for so long; its lease ran out long ago."""
_RECALL = Prepared(
    """
UPDATE attempts a SET recall_at = now(), token = t.claim_token
FROM tasks t
WHERE a.task_id = :task_id AND a.number = :attempt AND a.status = 'cancelled'
  AND t.id = a.task_id AND t.attempt = a.number
"""
)
_DUE_RECALLS = Prepared(
    f"""
WITH told AS (
    UPDATE attempts a
    SET recall_at = CASE WHEN a.finished_at > now() - make_interval(secs => {RECALLED_FOR_SECONDS})
                     THEN now() + make_interval(secs => {RECALL_AGAIN_SECONDS}) END
FROM (SELECT task_id, number FROM attempts WHERE recall_at <= now()
      ORDER BY recall_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED) AS due
    WHERE a.task_id = due.task_id AND a.number = due.number
    RETURNING a.task_id, a.number, a.recall_at
)
SELECT task_id, number FROM told WHERE recall_at IS NOT NULL
"""
)
_RECALLED = Prepared(
    """
SELECT t.id AS task_id, t.run_id, t.definition_id, t.index, a.number AS attempt, a.token,
       t.reason, a.agent_id, g.contact_endpoint, r.workflow_id, r.version, r.request_id
FROM attempts a JOIN tasks t ON t.id = a.task_id
     JOIN runs r ON r.id = t.run_id JOIN agents g ON g.agent_id = a.agent_id
WHERE a.task_id = :task_id AND a.number = :attempt AND a.recall_at IS NOT NULL
  AND g.contact_endpoint IS NOT NULL AND g.deregistered_at IS NULL
"""
)
_TOLD = Prepared(
    "UPDATE attempts SET recall_at = NULL WHERE task_id = :task_id AND number = :attempt"
)


def due_recalls(tx: Tx, limit: int) -> list[tuple[UUID, int]]:
    """Return (task, attempt) of what agents are to be told now that nobody wants."""
    return [(row.task_id, row.number) for row in _DUE_RECALLS(tx, {"limit": limit})]


def recalled_attempt(tx: Tx, task_id: UUID, attempt: int) -> Any:
    """Return what its agent knows a recalled attempt by; None if there is nobody to be told."""
    return _RECALLED(tx, {"task_id": task_id, "attempt": attempt}).first()


def note_recall(tx: Tx, task_id: UUID, attempt: int) -> None:
    """Note that the agent knows, or that there is none."""
    _TOLD(tx, {"task_id": task_id, "attempt": attempt})
