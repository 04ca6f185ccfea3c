"""Claiming: whether a visit may have its task, and if not, why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from opscore import models, tally
from opscore.db import Prepared, Tx, tell
from opscore.engine.clauses import (
    DEADLINE_GRACE_SECONDS,
    FOR_AGENT,
    FOR_CAPABILITY,
    FREE,
    IN_LINE,
    ITEMS_OVER,
    MAY_ASK,
    ORDER,
    RUN_OPEN,
    dependencies_over,
    is_open,
    is_ready,
    rests,
    still,
)
from opscore.slots import ITEMS
from opscore.states import TASK_ENDED, Reason
from opscore.work import Claimed, Failure, Undecided


@dataclass(frozen=True, slots=True)
class Visit:
    """A task's turn in a worker."""

    task_id: UUID
    generation: int
    """The message's: an older one may still do the work, but does not carry its canvas on."""
    token: UUID
    """Its own: who asks again after a lost answer is told by it that the claim is his."""
    has_slot: bool = False
    """It was sent because a slot is kept for its task; only a hint."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The task is over, whoever did it: return normally, so that the canvas goes on."""

    generation: int


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another visit runs it, or it waits for its time: a newer canvas's visit is kept for later."""


@dataclass(frozen=True, slots=True)
class MustWait:
    """The task cannot start yet: park it. `agent_id` is an agent it could go to, if any."""

    reason: Reason
    agent_id: str | None


@dataclass(frozen=True, slots=True)
class Impossible:
    """The task can never start: it fails at once."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Void:
    """Nothing to do here any more: drop the message."""


Answer = Claimed | Settled | Elsewhere | MustWait | Impossible | Undecided | Void


def _nobody_ahead(task: str, agent: str) -> str:
    """Return the condition that nobody in an agent's lines is before a task; in SQL."""

    def first(whose: str) -> str:
        return f"""(
    SELECT FROM (SELECT w.priority, w.waiting_since FROM tasks w
                 WHERE {whose} AND {IN_LINE} AND w.id <> {task}.id
                 {ORDER} LIMIT 1) AS first
    WHERE first.priority > {task}.priority OR first.priority = {task}.priority
      AND first.waiting_since < coalesce({task}.waiting_since, now()))"""

    return f"""NOT EXISTS {first(FOR_AGENT.format(agent=f"{agent}.agent_id"))}
      AND NOT EXISTS (SELECT FROM unnest({agent}.capabilities) AS offered (capability)
                      WHERE EXISTS {first(FOR_CAPABILITY)})"""


def _start(generation: str) -> str:
    """Return the change of a task that starts, by a visit of this generation; in SQL."""
    return f"""status = 'running', reason = NULL, attempt = t.attempt + 1, claim_token = :token,
        started_at = coalesce(t.started_at, now()),
        deadline_at = now() + make_interval(secs => t.timeout_seconds + :grace),
        lease_expires_at = now() + make_interval(secs => least(:lease, t.timeout_seconds + :grace)),
        -- An old visit does the work, but a newer canvas's saved one must still go on after it.
        message = CASE WHEN t.visit_generation > {generation} THEN t.message END,
        visit_generation = greatest(t.visit_generation, {generation}),
        wake_at = NULL, woken_at = NULL, kept_until = NULL, not_before = NULL"""


_BY_MESSAGE, BY_SAVED = ":generation", "t.visit_generation"
_UNCOUNTED = "a.agent_id = t.wanted_agent_id AND a.capacity IS NULL AND NOT a.closed"
IS_IN_LINE = f"{still('waiting')} AND t.reason IN {models.IN_LINE} AND {MAY_ASK.format(row='t')}"
_WAITED_FOR_NOTHING = f"({still('pending')} OR {still('waiting')} AND t.reason = 'dependencies')"


def simple_claim(
    task: str,
    source: str,
    guard: str,
    *,
    agent: str = "agents",
    fits: str = _UNCOUNTED,
    state: str = _WAITED_FOR_NOTHING,
    generation: str = _BY_MESSAGE,
    freed: str = "NULL",
) -> str:
    """Return the part of a statement that claims `task` if that is simple, as `next`.

    Simple is a task that waits for nothing (but `guard`) and whose agent has no capacity to count:
    most are, and it takes a third of the time. So is one that a slot is kept for.
    """
    return f"""next AS (
    UPDATE tasks t SET {_start(generation)}, agent_id = a.agent_id
    FROM {source}, runs r, {agent} a
    WHERE t.id = {task} AND t.kind = 'agent' AND NOT t.undecided AND {state}
      AND r.id = t.run_id AND {RUN_OPEN} AND {fits} AND {guard}
    RETURNING t.id AS task_id, t.run_id, t.kind, t.definition_id, t.parent_id,
              t.index AS item_index, t.item, t.is_sink, t.agent_id, t.attempt, t.timeout_seconds,
              t.deadline_at, t.lease_expires_at, now() AS started_at, t.reads, t.overrides,
              r.workflow_id,
              r.version, r.generation, r.request_id, r.traceparent,
              r.agent_id IS NOT NULL AND t.position = 0 AS merges_input,
              cast({freed} AS float) AS freed_seconds
), begun AS (
    INSERT INTO attempts (task_id, number, agent_id, worker, status)
    SELECT task_id, attempt, agent_id, :worker, 'running' FROM next
)"""


NEXT_STARTED = """UNION ALL SELECT run_id, task_id, 'task.started', jsonb_build_object(
        'attempt', attempt, 'agentId', agent_id, 'worker', cast(:worker AS text)) FROM next"""
"""The event of a claimed `next`: it comes after those of the SELECT it is added to."""


def read_by(claimed: str, but: str = "NULL") -> str:
    """Return the outcomes that a claimed task's expressions read, in SQL."""
    return f"""CASE WHEN {claimed}.reads <> '{{}}'
            THEN (SELECT jsonb_object_agg(d.definition_id, jsonb_build_object(
                      'output', d.output, 'status', d.status, 'error', d.error))
                  FROM tasks d WHERE d.run_id = {claimed}.run_id AND d.index IS NULL
                  AND d.definition_id = ANY ({claimed}.reads)
                  AND d.id IS DISTINCT FROM {but}) END AS tasks"""


def _freed_ago(freed_at: str) -> str:
    """Return how long ago a slot was given back, if the task stood in line by then; in SQL."""
    return f"""CASE WHEN {freed_at} >= t.waiting_since
                   THEN extract(epoch FROM now() - {freed_at}) END"""


def _first_claim(
    *,
    before: str = "",
    agent: str = "agents",
    fits: str = _UNCOUNTED,
    state: str = _WAITED_FOR_NOTHING,
    freed: str = "NULL",
    after: str = "",
) -> str:
    """Return the statement that claims a task if that is simple, and starts its run if it waits."""
    return f"""
WITH {before} starting AS (
    UPDATE runs r SET status = 'running', started_at = now()
    FROM tasks t, {agent} a
    WHERE t.id = :task_id AND t.kind = 'agent' AND NOT t.undecided AND {state}
      AND r.id = t.run_id
      AND {still("queued", "r")} AND {RUN_OPEN} AND {fits} AND {dependencies_over()}
    RETURNING r.id
), {
        simple_claim(
            ":task_id",
            "(SELECT count(*) FROM starting) AS first",
            dependencies_over(),
            agent=agent,
            fits=fits,
            state=state,
            freed=freed,
        )
    } {after}, told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT id, NULL, 'run.started', '{{}}'::jsonb FROM starting {NEXT_STARTED}
)
SELECT next.*, r.input, {read_by("next")}, EXISTS (SELECT FROM starting) AS starts_run
FROM next JOIN runs r ON r.id = next.run_id
"""


_CLAIM_SIMPLY = Prepared(_first_claim())
_CLAIM_KEPT = Prepared(
    _first_claim(
        before=f"""kept AS (
    SELECT s.pool AS agent_id, s.number,
           -- Whom the agent itself had sent away did not wait for the slot.
           CASE WHEN (SELECT not_before FROM tasks WHERE id = :task_id) IS NULL
                THEN s.freed_at END AS freed_at
    FROM slots s JOIN agents a ON a.agent_id = s.pool
    WHERE s.reserved_for = :task_id AND s.reserved_until > now() AND s.holder IS NULL
      AND NOT s.closed AND {is_open()} AND {is_ready()}
    LIMIT 1 FOR UPDATE OF s SKIP LOCKED
),""",
        agent="kept",
        fits="true",
        state=IS_IN_LINE,
        freed=_freed_ago("a.freed_at"),
        after=""", held AS (
    UPDATE slots s
    SET holder = next.task_id, attempt = next.attempt, lease_expires_at = next.lease_expires_at,
        held_at = now(), reserved_for = NULL, reserved_until = NULL
    FROM next, kept WHERE s.pool = kept.agent_id AND s.number = kept.number
)""",
    )
)
_CLAIM = Prepared(
    f"""
WITH t AS MATERIALIZED (
    SELECT t.*, r.status AS run_status, r.generation, r.workflow_id, r.version,
           r.request_id, r.traceparent, {RUN_OPEN} AS run_open,
           r.agent_id IS NOT NULL AND t.position = 0 AS merges_input
    FROM tasks t JOIN runs r ON r.id = t.run_id
    WHERE t.id = :task_id
), over AS (
    SELECT {dependencies_over()} AS dependencies FROM t
), ready AS (
    SELECT t.* FROM t, over
    WHERE run_open AND over.dependencies AND (t.status = 'pending' OR t.status = 'waiting' AND
        CASE t.reason
            WHEN 'retry' THEN t.wake_at <= now() OR t.woken_at IS NOT NULL
            WHEN 'children' THEN true
            WHEN 'approval' THEN t.wake_at <= now() OR t.woken_at IS NOT NULL
            WHEN 'delay' THEN t.wake_at <= now() OR t.woken_at IS NOT NULL
            WHEN 'max_parallel' THEN false
            WHEN 'paused' THEN false
            WHEN 'remote' THEN false
            ELSE t.not_before IS NULL OR t.not_before <= now()
        END) AND (t.items IS NULL OR {ITEMS_OVER}) AND NOT t.undecided
), wanted AS (
    SELECT a.agent_id, a.capacity, a.capabilities, 0 AS place,
           a.agent_id IS NOT DISTINCT FROM ready.preferred_agent_id AS preferred,
           {is_open()} AS is_open, {is_ready()} AS is_ready, {rests("a")} AS rests
    FROM agents a, ready
    WHERE ready.kind = 'agent' AND CASE
        WHEN ready.wanted_agent_id IS NOT NULL THEN a.agent_id = ready.wanted_agent_id
        ELSE ready.wanted_capability = ANY (a.capabilities) END
    UNION ALL
    SELECT a.agent_id, a.capacity, a.capabilities, f.place, false, {is_open()}, {is_ready()}, false
    FROM ready, unnest(ready.fallback) WITH ORDINALITY AS f (id, place), agents a
    WHERE ready.kind = 'agent' AND a.agent_id = f.id
), candidate AS (
    -- Fallbacks are asked while none that is wanted is available, or was not there just now.
    SELECT * FROM wanted
    WHERE is_open AND (place > 0) = (
        SELECT NOT bool_or(is_open AND place = 0 AND NOT rests) AND bool_or(is_open AND place > 0)
        FROM wanted)
), able AS MATERIALIZED (
    -- Looked at once for each agent, however many slots it has.
    SELECT c.*, work.held, work.last,
           (ready.wanted_capability IS NULL OR c.place > 0 OR NOT {rests("c")})
           AND {_nobody_ahead("ready", "c")} AS is_turn,
           ready.tries > 0 AND c.agent_id IS NOT DISTINCT FROM ready.agent_id AS just_failed
    FROM candidate c CROSS JOIN ready
         CROSS JOIN LATERAL (SELECT count(h.holder) AS held, max(h.freed_at) AS last
                             FROM slots h WHERE h.pool = c.agent_id) AS work
    WHERE c.is_ready AND c.capacity IS NOT NULL
), slot AS (
    -- A free slot, unless somebody older waits for it who has none kept for him; of several agents
    -- that of who does least, then of who rested longest.
    SELECT s.pool AS agent_id, s.number, s.freed_at
    FROM able c JOIN slots s ON s.pool = c.agent_id
    WHERE NOT s.closed AND s.holder IS NULL
      AND (s.reserved_for = :task_id AND s.reserved_until > now() OR {FREE} AND c.is_turn)
    ORDER BY (s.reserved_for = :task_id AND s.reserved_until > now()) DESC NULLS LAST,
             c.preferred DESC, c.place, c.just_failed, c.held, c.last NULLS FIRST, s.number
    LIMIT 1
    FOR UPDATE OF s SKIP LOCKED
), unlimited AS (
    SELECT agent_id, NULL::int AS number, NULL::timestamptz AS freed_at FROM candidate
    WHERE capacity IS NULL ORDER BY preferred DESC, place, agent_id LIMIT 1
), chosen AS (
    SELECT * FROM slot
    UNION ALL SELECT * FROM unlimited WHERE NOT EXISTS (SELECT FROM slot)
    UNION ALL SELECT NULL, NULL, NULL FROM ready WHERE kind <> 'agent'
), starting AS (
    UPDATE runs r SET status = 'running', started_at = now()
    FROM ready, chosen
    WHERE r.id = ready.run_id AND {still("queued", "r")} AND ready.run_status = 'queued'
      AND r.cancel_requested_at IS NULL AND r.error IS NULL
    RETURNING r.id
), claimed AS (
    UPDATE tasks t
    SET {_start(_BY_MESSAGE)}, agent_id = chosen.agent_id
    FROM ready CROSS JOIN chosen LEFT JOIN starting ON true
    -- As it was seen above: whoever waited here for the row's lock may find it moved.
    WHERE t.id = :task_id AND t.status = ready.status AND t.attempt = ready.attempt
      AND t.reason IS NOT DISTINCT FROM ready.reason
      AND (t.decision IS NULL) = (ready.decision IS NULL)
      -- A pause holds up all others, but what waited for something else starts with its run.
      AND (ready.run_status <> 'queued' OR ready.items IS NULL OR starting.id IS NOT NULL)
    RETURNING t.id, t.run_id, t.attempt, t.kind, t.agent_id, t.lease_expires_at, t.deadline_at,
              chosen.number, chosen.freed_at
), held AS (
    UPDATE slots s
    SET holder = claimed.id, attempt = claimed.attempt, lease_expires_at = claimed.lease_expires_at,
        held_at = now(), reserved_for = NULL, reserved_until = NULL
    FROM claimed
    WHERE s.pool = claimed.agent_id AND s.number = claimed.number
), cleared AS (  -- whoever is sent to collect the items, they are over
    DELETE FROM slots s USING claimed
    WHERE claimed.kind = 'for_each' AND s.pool = '{ITEMS}' || claimed.id
), begun AS (
    INSERT INTO attempts (task_id, number, agent_id, worker, status)
    SELECT id, attempt, agent_id, :worker, 'running' FROM claimed WHERE kind = 'agent'
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT id, NULL, 'run.started', '{{}}'::jsonb FROM starting
    UNION ALL SELECT run_id, id, 'task.started', jsonb_build_object(
        'attempt', attempt, 'agentId', agent_id, 'worker', cast(:worker AS text))
    FROM claimed WHERE kind <> 'end'
)
SELECT t.id AS task_id, t.run_id, t.kind, t.definition_id, t.parent_id, t.index AS item_index,
       t.item, t.items IS NOT NULL AS expanded, t.is_sink, t.merges_input, t.workflow_id, t.version,
       t.generation, t.timeout_seconds, t.status, t.visit_generation, t.wanted_agent_id, t.run_open,
       over.dependencies, t.overrides, t.decision, t.undecided, t.request_id, t.traceparent,
       EXISTS (SELECT FROM starting) AS starts_run,
       t.depends_on <> '{{}}' AND NOT EXISTS (
           SELECT FROM tasks d WHERE d.id = ANY (t.depends_on) AND d.status <> 'skipped')
           AS follows_skipped,
       CASE WHEN t.child_run_id IS NOT NULL THEN (
           SELECT jsonb_build_object('runId', c.id, 'status', c.status, 'output', c.output,
                                     'error', c.error)
           FROM runs c WHERE c.id = t.child_run_id) END AS child,
       claimed.id IS NOT NULL OR mine.held AS claimed,
       coalesce(claimed.attempt, t.attempt) AS attempt,
       coalesce(claimed.agent_id, t.agent_id) AS agent_id,
       coalesce(claimed.deadline_at, t.deadline_at) AS deadline_at,
       claimed.number IS NOT NULL OR mine.held AND t.kind = 'agent' AS has_slot,
       CASE WHEN t.reason IN {models.IN_LINE} AND t.not_before IS NULL
            THEN cast({_freed_ago("claimed.freed_at")} AS float) END AS freed_seconds,
       EXISTS (SELECT FROM ready) AS ready,
       EXISTS (SELECT FROM chosen) AS chosen,
       (SELECT agent_id FROM candidate
        ORDER BY is_ready AND EXISTS (SELECT FROM slots s WHERE s.pool = candidate.agent_id
                                      AND NOT s.closed AND s.holder IS NULL) DESC,
                 preferred DESC, place, agent_id
        LIMIT 1) AS candidate,
       EXISTS (SELECT FROM wanted) AS is_known,
       CASE WHEN claimed.id IS NOT NULL OR mine.held OR t.undecided
            THEN (SELECT input FROM runs WHERE id = t.run_id) END AS input,
       CASE WHEN (claimed.id IS NOT NULL OR mine.held OR t.undecided) AND t.reads <> '{{}}'
            THEN (SELECT jsonb_object_agg(d.definition_id, jsonb_build_object(
                      'output', d.output, 'status', d.status, 'error', d.error))
                  FROM tasks d WHERE d.run_id = t.run_id AND d.index IS NULL
                  AND d.definition_id = ANY (t.reads)) END AS tasks
FROM t CROSS JOIN over LEFT JOIN claimed ON true
     CROSS JOIN LATERAL (SELECT t.status = 'running' AND t.claim_token = :token AS held) AS mine
""",
)


def claim_task(tx: Tx, visit: Visit, *, worker: str, lease_seconds: float) -> Answer | None:
    """Take the task for this visit if it may start now, with a slot of its agent.

    Returns None when another visit moved the task at the same moment: ask again.
    """
    parameters = {
        "task_id": visit.task_id,
        "generation": visit.generation,
        "token": visit.token,
        "worker": worker,
        "lease": lease_seconds,
        "grace": DEADLINE_GRACE_SECONDS,
    }
    statement = _CLAIM_KEPT if visit.has_slot else _CLAIM_SIMPLY
    if simple := statement(tx, parameters).first():
        _note_freed(tx, simple.freed_seconds)
        claimed = simply_claimed(simple, simple.input, simple.tasks, has_slot=visit.has_slot)
        tell_start(tx, claimed, simple.starts_run)
        return claimed
    row = _CLAIM(tx, parameters).first()
    if row is None:
        return Void()
    if row.claimed:
        _note_freed(tx, row.freed_seconds)
        claimed = Claimed(**{name: getattr(row, name) for name in Claimed.__slots__})
        tell_start(tx, claimed, row.starts_run)
        return claimed
    if not row.run_open:
        return Void()
    if row.status in TASK_ENDED:
        return Settled(row.generation)
    if row.ready and row.chosen:
        return None
    if row.undecided and row.dependencies and row.status != "running":
        return Undecided(**{name: getattr(row, name) for name in Undecided.__slots__})
    return Elsewhere() if row.visit_generation > visit.generation else _refused(row)


def _note_freed(tx: Tx, seconds: float | None) -> None:
    if seconds is not None:
        tally.count(tx, tally.FREED_TO_NEXT, value=seconds)


def simply_claimed(
    row: Any, input: Any, tasks: Mapping[str, Any] | None, *, has_slot: bool = False
) -> Claimed:
    """Return what `simple_claim` claimed."""
    given = {"expanded": False, "has_slot": has_slot, "input": input, "tasks": tasks}
    given |= {"decision": None, "child": None}
    named = {name: getattr(row, name) for name in Claimed.__slots__ if name not in given}
    return Claimed(**named, **given)


def tell_start(tx: Tx, claimed: Claimed, starts_run: bool) -> None:
    """Log that a task is claimed, and its run begun with it."""
    if starts_run:
        tell(tx, "run.started", run_id=claimed.run_id, request_id=claimed.request_id)
    if claimed.kind != "end":
        tell(tx, "task.started", **claimed.ids)


def _refused(row: Row[Any]) -> Answer:
    """Say why a task of an open run cannot start; for a visit as new as any other of it."""
    if row.status != "running" and not row.dependencies:
        return MustWait(Reason.DEPENDENCIES, None)
    if not row.ready:
        return Elsewhere()
    if row.candidate is not None:
        return MustWait(Reason.AGENT_BUSY, row.candidate)
    if row.wanted_agent_id is not None and not row.is_known:
        sentence = f"No agent is registered as {row.wanted_agent_id!r}."
        return Impossible(Failure("agent_not_found", sentence))
    return MustWait(Reason.AGENT_UNAVAILABLE, None)
