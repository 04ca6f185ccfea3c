"""Waiting: tasks are parked with a reason, and woken when what they wait for is there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select

from opscore import models
from opscore.config import CONTROL_QUEUE, IO_QUEUE
from opscore.db import Prepared, Tx, tell
from opscore.engine.claims import MustWait
from opscore.engine.clauses import (
    BUSY_LOOK_AGAIN_SECONDS,
    ENDED,
    FOR_AGENT,
    FOR_CAPABILITY,
    FREE,
    HAND_ON,
    IN_LINE,
    ITEMS_OVER,
    KEEP,
    KEPT_UNTIL,
    LOOK_AGAIN_SECONDS,
    PLACES,
    RESERVE_SECONDS,
    RUN_OPEN,
    SENT_AT,
    WAITS,
    WAKE_AT,
    WOKEN,
    backoff,
    dependencies_over,
    find_line,
    free_slots,
    is_open,
    is_ready,
    rests,
    still,
    woken_for,
)
from opscore.models import Task
from opscore.slots import ITEMS
from opscore.states import TASK_ENDED, Reason

# --- Parking and waking --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Woken:
    """A task to visit again: by its saved message, or, if it has none, as `reason` says."""

    task_id: UUID
    run_id: UUID
    generation: int
    """The run's, now."""
    request_id: str | None
    message: dict[str, Any] | None
    reason: str | None
    is_item: bool
    timeout_seconds: float
    queue: str
    """Where the visit goes; its message may name another."""


def as_woken(rows: Iterable[Row[Any]], prefix: str = "") -> list[Woken]:
    """Return what a statement returned as `WOKEN`, each column named with `prefix`."""
    names = {name: prefix + name for name in Woken.__slots__}
    return [Woken(**{name: getattr(row, col) for name, col in names.items()}) for row in rows]


_PARK = Prepared(
    f"""
WITH before AS (
    SELECT reason FROM tasks WHERE id = :task_id
), parked AS (
    UPDATE tasks t
    SET status = 'waiting', reason = :reason, message = :message, visit_generation = :generation,
        waits = CASE WHEN :busy THEN t.waits + 1 ELSE 0 END,
        waiting_since = CASE WHEN :busy THEN coalesce(t.waiting_since, now()) END,
        line_agent_id = CASE WHEN t.wanted_agent_id IS NOT NULL OR :agent_id = ANY (t.fallback)
                             THEN coalesce(:agent_id, t.wanted_agent_id) END,
        wake_at = CASE WHEN :busy THEN least(
            now() + make_interval(secs =>
                {backoff("t.busy_backoff", "t.busy_max_backoff", "t.waits")}),
            coalesce(t.waiting_since, now()) + make_interval(secs => t.max_wait_seconds)) END,
        woken_at = NULL, kept_until = NULL, not_before = NULL
    WHERE t.id = :task_id AND {WAITS} AND t.reason IS DISTINCT FROM 'paused'
      AND t.visit_generation <= :generation
    RETURNING t.id, t.run_id, t.definition_id, t.wake_at, t.waiting_since, t.max_wait_seconds
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.waiting', jsonb_build_object(
        'reason', cast(:reason AS text), 'wakeAt', {WAKE_AT}, 'agentId', cast(:agent_id AS text))
    FROM parked, before WHERE before.reason IS DISTINCT FROM :reason
)
SELECT run_id, definition_id, wake_at, before.reason IS DISTINCT FROM :reason AS is_new,
       waiting_since + make_interval(secs => max_wait_seconds) < now() AS overdue
FROM parked, before
""",
    json=("message",),
)


def park_task(
    tx: Tx,
    task_id: UUID,
    wait: MustWait,
    *,
    message: dict[str, Any],
    generation: int,
) -> bool | None:
    """Put an unclaimed task to wait, with its message saved.

    Who parks runs the matching wake after the commit, or it may wait for what came at the same
    moment. Returns whether it has now waited longer than it may; None when it moved meanwhile:
    visit it again.
    """
    row = _PARK(
        tx,
        {
            "task_id": task_id,
            "reason": str(wait.reason),
            "busy": wait.reason in (Reason.AGENT_BUSY, Reason.AGENT_UNAVAILABLE),
            "agent_id": wait.agent_id,
            "message": message,
            "generation": generation,
        },
    ).first()
    if row is None:
        return None
    if row.is_new:
        ids = {"run_id": row.run_id, "task_id": task_id, "task": row.definition_id}
        more = {"agent_id": wait.agent_id, "reason": wait.reason, "wake_at": row.wake_at}
        tell(tx, "task.waiting", **ids, **more)
    return bool(row.overdue)


_KEEP_MESSAGE = Prepared(
    """
UPDATE tasks t SET message = :message, visit_generation = :generation
WHERE t.id = :task_id AND t.status IN ('waiting', 'running') AND t.visit_generation < :generation
RETURNING t.id
""",
    json=("message",),
)


def keep_message(tx: Tx, task_id: UUID, message: dict[str, Any], generation: int) -> bool | None:
    """Save a newer canvas's visit with a task that runs or waits, to be published when it is over.

    False when the task has a visit as new; None when it ended meanwhile: visit it again.
    """
    parameters = {"task_id": task_id, "message": message, "generation": generation}
    if _KEEP_MESSAGE(tx, parameters).first() is not None:
        return True
    status = tx.execute(select(Task.status).where(Task.id == task_id)).scalar()
    return None if status in TASK_ENDED else False


_RELEASE_ITEMS = Prepared(
    f"""
WITH {free_slots(f"'{ITEMS}' || cast(:parent_id AS uuid)", "tasks", ENDED)}, line AS (
    SELECT c.id FROM tasks c
    WHERE c.parent_id = :parent_id AND c.status = 'waiting' AND c.reason = 'max_parallel'
    ORDER BY c.index LIMIT {PLACES} FOR NO KEY UPDATE SKIP LOCKED
), {HAND_ON}
UPDATE tasks t SET status = 'pending', reason = NULL, woken_at = now() FROM line, runs r
WHERE t.id = line.id AND r.id = t.run_id
RETURNING {WOKEN}
""",
)
_WAKE_JOINS = f"""
UPDATE tasks t SET woken_at = now(), wake_at = NULL
FROM runs r
WHERE t.id IN (SELECT o.id FROM tasks o WHERE {{which}}
               ORDER BY o.id FOR NO KEY UPDATE)
  AND r.id = t.run_id
  AND {still("waiting")} AND t.reason = 'dependencies' AND t.woken_at IS NULL
  AND {dependencies_over()}
RETURNING {WOKEN}
"""
_WAKE_THESE = Prepared(
    _WAKE_JOINS.format(which=f"o.id = ANY (:task_ids) AND {still('waiting', 'o')}")
)
_WAKE_SUCCESSORS = Prepared(
    _WAKE_JOINS.format(
        which=f"""o.id = ANY (ARRAY(SELECT unnest(successors) FROM tasks WHERE id = :task_id))
               AND {still("waiting", "o")}"""
    ),
)
_WAKE_PARENT = Prepared(
    f"""
UPDATE tasks t SET woken_at = now(), wake_at = NULL
FROM runs r
WHERE t.id = :task_id AND r.id = t.run_id
  AND {still("waiting")} AND t.reason = 'children' AND t.woken_at IS NULL AND {ITEMS_OVER}
RETURNING {WOKEN}
""",
)


def wake_joins(tx: Tx, task_ids: Sequence[UUID]) -> list[Woken]:
    """Wake those of the tasks that wait for dependencies which are all over."""
    return as_woken(_WAKE_THESE(tx, {"task_ids": list(task_ids)}))


def wake_successors(tx: Tx, task_id: UUID) -> list[Woken]:
    """Wake the tasks after this one whose last dependency it was."""
    return as_woken(_WAKE_SUCCESSORS(tx, {"task_id": task_id}))


def wake_parent(tx: Tx, parent_id: UUID) -> list[Woken]:
    """Wake a `forEach` whose items are over, or release the next items under its `maxParallel`."""
    parents = as_woken(_WAKE_PARENT(tx, {"task_id": parent_id}))
    return parents or as_woken(_RELEASE_ITEMS(tx, {"parent_id": parent_id}))


_WAKE_LINE = Prepared(
    f"""
WITH free AS MATERIALIZED (
    SELECT s.number FROM slots s JOIN agents a ON a.agent_id = s.pool
    WHERE s.pool = :agent_id AND {FREE}
      AND {is_open()} AND {is_ready()}
    ORDER BY s.number FOR UPDATE OF s SKIP LOCKED
), {find_line("(SELECT count(*) FROM free)")}, pairs AS (
    SELECT f.number, l.id, l.is_out
    FROM (SELECT number, row_number() OVER (ORDER BY number) AS n FROM free) f
    JOIN (SELECT id, is_out, row_number() OVER () AS n FROM line) l USING (n)
), kept AS (
    UPDATE slots s SET reserved_for = pairs.id, reserved_until = {KEPT_UNTIL}
    FROM pairs WHERE s.pool = :agent_id AND s.number = pairs.number
), woken AS (
    UPDATE tasks t SET {KEEP}
    FROM pairs, runs r
    WHERE t.id = pairs.id AND r.id = t.run_id AND {still("waiting")}
    RETURNING {woken_for(":agent_id")}, pairs.is_out
)
SELECT * FROM woken WHERE NOT is_out
"""
)


def wake_line(tx: Tx, agent_id: str) -> list[Woken]:
    """Keep the agent's free slots for the first in line, and wake those not yet on their way."""
    return as_woken(_WAKE_LINE(tx, {"agent_id": agent_id}))


_LINES = Prepared(
    f"""
SELECT a.agent_id FROM agents a
WHERE {is_open()} AND {is_ready()}
  AND EXISTS (SELECT FROM slots s WHERE s.pool = a.agent_id AND {FREE})
  AND (EXISTS (SELECT FROM tasks w WHERE {FOR_AGENT.format(agent="a.agent_id")}
               AND {IN_LINE})
       OR NOT {rests("a")}
          AND EXISTS (SELECT FROM unnest(a.capabilities) AS offered (capability), tasks w
                      WHERE {FOR_CAPABILITY} AND {IN_LINE}))
"""
)


def agents_to_wake(tx: Tx) -> list[str]:
    """Return the agents with a free slot that is kept for nobody while somebody waits for one."""
    return _LINES(tx).scalars()


_WANTED = """CASE WHEN t.wanted_agent_id IS NOT NULL THEN a.agent_id = t.wanted_agent_id
    ELSE t.wanted_capability = ANY (a.capabilities) END"""
_IS_WITH_FALLBACK = """(t.line_agent_id IS NOT NULL
    AND t.line_agent_id IS DISTINCT FROM t.wanted_agent_id)"""
_WAKE_DUE = Prepared(
    f"""
WITH due AS MATERIALIZED (
    SELECT t.id, CASE t.reason
        WHEN 'dependencies' THEN {dependencies_over()}
        WHEN 'children' THEN {ITEMS_OVER}
        WHEN 'approval' THEN true
        WHEN 'delay' THEN true
        -- Whoever stands in the line of an agent that is away goes to another, or is told so.
        WHEN 'agent_busy' THEN coalesce(t.not_before <= now(), false)
            OR EXISTS (SELECT FROM agents a WHERE {_WANTED} AND {is_open()}
                       AND (a.capacity IS NULL OR {_IS_WITH_FALLBACK}))
            OR NOT EXISTS (SELECT FROM agents a
                           WHERE {is_open()} AND CASE WHEN t.line_agent_id IS NULL THEN {_WANTED}
                               ELSE a.agent_id = t.line_agent_id END)
        WHEN 'agent_unavailable' THEN EXISTS (
            SELECT FROM agents a WHERE {is_open()} AND ({_WANTED} OR a.agent_id = ANY (t.fallback)))
        ELSE t.reason = 'retry' END AS ready
    FROM tasks t
    WHERE t.status = 'waiting' AND t.wake_at <= now()
    ORDER BY t.wake_at LIMIT :limit FOR UPDATE OF t SKIP LOCKED
), moved AS (
    UPDATE tasks t
    SET woken_at = CASE WHEN due.ready THEN now() END,
        wake_at = CASE WHEN due.ready THEN NULL
            WHEN t.reason IN {models.IN_LINE} THEN least(
                now() + make_interval(secs => CASE
                    WHEN t.reason = 'agent_busy' AND NOT {_IS_WITH_FALLBACK}
                    THEN {BUSY_LOOK_AGAIN_SECONDS} ELSE {LOOK_AGAIN_SECONDS} END),
                greatest(t.waiting_since + make_interval(secs => t.max_wait_seconds),
                         now() + make_interval(secs => 1)))
            ELSE now() + make_interval(secs => {LOOK_AGAIN_SECONDS}) END
    FROM due, runs r
    WHERE t.id = due.id AND {still("waiting")} AND r.id = t.run_id
    RETURNING {WOKEN}, due.ready,
        t.waiting_since + make_interval(secs => t.max_wait_seconds) < now() AS overdue
)
SELECT * FROM moved WHERE ready OR overdue
"""
)


@dataclass(frozen=True, slots=True)
class Due:
    """Parked tasks whose moment has come, and those that have waited longer than they may."""

    woken: list[Woken]
    overdue: list[UUID]


_HURRY = Prepared(
    f"""
UPDATE tasks SET wake_at = now() WHERE id IN (
    SELECT id FROM tasks
    WHERE status = 'waiting' AND reason IN {models.IN_LINE} AND line_agent_id = :agent_id
      AND not_before IS NULL AND woken_at IS NULL AND wake_at > now()
    FOR NO KEY UPDATE SKIP LOCKED)
"""
)


def hurry(tx: Tx, agent_id: str) -> None:
    """Have who stands in an agent's line looked at in the keeper's next round."""
    _HURRY(tx, {"agent_id": agent_id})


_HURRY_ASTRAY = Prepared(
    f"""
UPDATE tasks SET wake_at = now() WHERE id IN (
    -- LATERAL: one look for each agent that is away, where a join might read all lines.
    SELECT astray.id FROM agents a CROSS JOIN LATERAL (
        SELECT t.id FROM tasks t
        WHERE t.line_agent_id = a.agent_id AND t.status = 'waiting' AND t.reason = 'agent_busy'
          AND t.not_before IS NULL AND t.woken_at IS NULL AND t.wake_at > now()
        LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED) AS astray
    WHERE NOT {is_open()})
"""
)


def hurry_astray(tx: Tx, limit: int) -> None:
    """Have who stands in the line of an agent that went away looked at now: see `wake_due`."""
    _HURRY_ASTRAY(tx, {"limit": limit})


def wake_due(tx: Tx, limit: int) -> Due:
    """Wake parked tasks past their moment if what they wait for could now be had."""
    rows = _WAKE_DUE(tx, {"limit": limit})
    return Due(
        as_woken(row for row in rows if not row.overdue),
        [row.task_id for row in rows if row.overdue],
    )


_WAKE_FORGOTTEN = Prepared(
    _WAKE_JOINS.format(
        which=f"""o.status = 'waiting' AND o.reason = 'dependencies' AND o.wake_at IS NULL
               AND o.woken_at IS NULL AND {dependencies_over("o")}"""
    )
)
_PARENTS_OVER = Prepared(
    f"""
SELECT t.id FROM tasks t
WHERE t.status = 'waiting' AND t.reason = 'children' AND t.woken_at IS NULL
  AND ({ITEMS_OVER} OR t.max_parallel IS NOT NULL)
"""
)


def wake_forgotten(tx: Tx) -> list[Woken]:
    """Wake joins and `forEach` tasks whose last one died between its commit and its wake."""
    woken = as_woken(_WAKE_FORGOTTEN(tx))
    for parent_id in _PARENTS_OVER(tx).scalars():
        woken += wake_parent(tx, parent_id)
    return woken


# --- Lost visits ---------------------------------------------------------------------------------

LOST_BY_AGE_SECONDS = 600
"""If its queue does not tell, a visit that did not come for this long is lost."""
NOTHING = "-infinity"
"""What has left a queue whose oldest entry is unknown."""
_IS_UNDER_WAY = "(t.status = 'pending' OR t.status = 'waiting' AND t.woken_at IS NOT NULL)"
_OLDEST = Prepared(
    f"""
SELECT CASE WHEN cardinality(cast(:task_ids AS uuid[])) = 0 THEN now()
            ELSE min({SENT_AT}) END
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.id = ANY (:task_ids) AND {_IS_UNDER_WAY} AND {RUN_OPEN} AND {dependencies_over()}
"""
)


def oldest_visit(tx: Tx, task_ids: Sequence[UUID]) -> datetime | None:
    """Return when the first of these visits was sent, now if there are none; None: all late."""
    (row,) = _OLDEST(tx, {"task_ids": list(task_ids)})
    moment: datetime | None = row[0]
    return moment


@dataclass(frozen=True, slots=True)
class Left:
    """Visits sent before these moments (or `NOTHING`) have left their queue."""

    agents: datetime | str
    control: datetime | str
    io: datetime | str
    first: tuple[UUID, ...] | None = None
    """Whose visits are to be served before the others, whenever sent; None: not known."""


_LEFT = f"""CASE t.queue WHEN '{CONTROL_QUEUE}' THEN cast(:control AS timestamptz)
    WHEN '{IO_QUEUE}' THEN cast(:io AS timestamptz)
    ELSE cast(:agents AS timestamptz) END"""
_LONG_AGO = f"now() - make_interval(secs => {LOST_BY_AGE_SECONDS})"
_NOT_FIRST = "t.id <> ALL (cast(:first AS uuid[]))"
_LOST = f"""coalesce({_NOT_FIRST}, true)
    AND sent.at < CASE WHEN {_LEFT} = '{NOTHING}' THEN {_LONG_AGO}
        WHEN cast(:first AS uuid[]) IS NULL THEN least({_LEFT}, {_LONG_AGO})
        ELSE {_LEFT} END"""
_UNVISITED = Prepared(
    f"""
WITH pending AS MATERIALIZED (
    SELECT id, run_id, queue, created_at, woken_at, depends_on FROM tasks WHERE status = 'pending'
), ready AS MATERIALIZED (
    SELECT * FROM pending t
    -- Most stand behind another of them: to see that costs no look at the table. (IS NOT FALSE, or
    -- it is planned as a join.)
    WHERE NOT EXISTS (SELECT FROM unnest(t.depends_on) AS d (id)
                      WHERE (d.id IN (SELECT id FROM pending)) IS NOT FALSE)
      AND {dependencies_over(one_by_one=True)}
)
SELECT t.run_id, r.generation
FROM ready t
    -- OFFSET: one look for each task, where a plan made on empty tables might read them whole.
    CROSS JOIN LATERAL (SELECT status, reason, cancel_requested_at, error, generation, generation_at
                        FROM runs WHERE id = t.run_id OFFSET 0) AS r
    CROSS JOIN LATERAL (SELECT {SENT_AT} AS at OFFSET 0) AS sent
WHERE {RUN_OPEN} AND {_LOST}
  AND sent.at < now() - make_interval(secs => :after * power(2, least(r.generation, 2) - 1))
GROUP BY t.run_id, r.generation
LIMIT :limit
"""
)


def unvisited_runs(tx: Tx, left: Left, after_seconds: float, limit: int) -> list[tuple[UUID, int]]:
    """Return (id, generation) of runs with a task that could start and whose visit was lost.

    Lost is not late: the visit has left its queue, `after_seconds` ago at least, and did not come.
    After the first generation it is twice the time.
    """
    rows = _UNVISITED(tx, _lost_parameters(left, after_seconds, limit))
    return [(row.run_id, row.generation) for row in rows]


def _lost_parameters(left: Left, after_seconds: float, limit: int) -> dict[str, Any]:
    return {
        "agents": left.agents,
        "control": left.control,
        "io": left.io,
        "first": None if left.first is None else list(left.first),
        "after": after_seconds,
        "limit": limit,
    }


_WAKE_LOST = Prepared(
    f"""
UPDATE tasks t SET woken_at = now() FROM runs r
WHERE t.id IN (
    SELECT t.id FROM tasks t CROSS JOIN LATERAL (SELECT t.woken_at AS at) AS sent
    WHERE t.status = 'waiting' AND t.woken_at IS NOT NULL
      -- Who is woken for a slot is served first: who is not among those has left the queue, and
      -- others stand behind him.
      AND t.woken_at < now() - make_interval(secs =>
          least(:after, CASE WHEN t.reason IN {models.IN_LINE} THEN {RESERVE_SECONDS} END))
      AND CASE WHEN t.reason IN {models.IN_LINE}
               THEN coalesce({_NOT_FIRST}, sent.at < {_LONG_AGO}) ELSE {_LOST} END
      AND EXISTS (SELECT FROM runs r WHERE r.id = t.run_id AND {RUN_OPEN} OFFSET 0)
    ORDER BY t.id LIMIT :limit FOR NO KEY UPDATE OF t SKIP LOCKED)
  AND {still("waiting")} AND r.id = t.run_id
RETURNING {WOKEN}
"""
)


def wake_lost(tx: Tx, left: Left, after_seconds: float, limit: int) -> list[Woken]:
    """Wake again the parked tasks whose wake was lost on its way, as `unvisited_runs` tells it."""
    return as_woken(_WAKE_LOST(tx, _lost_parameters(left, after_seconds, limit)))
