"""How an attempt ends: with an output, items, a failure, or nothing done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select
from uuid6 import uuid7

from opscore import models, tally, work
from opscore.db import Prepared, Tx, tell
from opscore.engine.claims import (
    BY_SAVED,
    IS_IN_LINE,
    NEXT_STARTED,
    Visit,
    read_by,
    simple_claim,
    simply_claimed,
    tell_start,
)
from opscore.engine.clauses import (
    ATTEMPTED,
    DEADLINE_GRACE_SECONDS,
    ENDED,
    HAS_SURPLUS,
    IS_ABROAD,
    KEEP,
    KEPT_UNTIL,
    LEAST_REST_SECONDS,
    LONGEST_REST_SECONDS,
    MINE,
    RUN_ALIVE,
    RUN_OPEN,
    WAITS,
    WAKE_AT,
    WOKEN,
    backoff,
    find_line,
    is_open,
    is_ready,
    still,
    woken_for,
)
from opscore.engine.waits import Woken, as_woken
from opscore.graph import Node
from opscore.json_values import MAX_GATHERED_BYTES
from opscore.models import Run, Task
from opscore.slots import ITEMS
from opscore.states import RUN_ENDED, Reason, TaskStatus
from opscore.work import Claimed, Failure, as_error

# --- Finishing -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taker:
    """A worker that is free to go on with the first in line for the slot it frees."""

    token: UUID
    """As a visit's."""
    within_seconds: float
    """The longest timeout it has time for."""
    worker: str
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The outcome is recorded; says what must follow the commit."""

    generation: int
    ends_run: bool = False
    """The run may be over now: call `settle_run`."""
    failed_run: bool = False
    """The failure ends the run: nothing below the task may start."""
    message: dict[str, Any] | None = None
    """A newer canvas's visit that came meanwhile: publish it, so that its canvas goes on."""
    frees: str | None = None
    """The workflow whose next run may begin: call `release_runs`."""
    parent_task_id: UUID | None = None
    """The task that ran this run as its sub-workflow: call `wake_parent`."""
    next: Claimed | None = None
    """Who comes next here, claimed in the same breath: by the visit that was to follow, or as the
    first in line for the freed slot."""
    next_message: dict[str, Any] | None = None
    """The saved visit of who was first in line."""
    woken: tuple[Woken, ...] = ()
    """Who is to be visited for the slot that was freed. If nobody, look at its line once more:
    somebody may have come to it meanwhile, or be on his way to a slot that is kept no longer."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The task waits now; its visit is saved with it."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The attempt is no longer this worker's: drop its outcome."""


_LET_GO = "holder = NULL, attempt = NULL, lease_expires_at = NULL, freed_at = now()"
_RESTED = f"""failures = CASE WHEN :rests THEN s.failures + 1 ELSE s.failures END,
        rests_until = CASE WHEN :rests THEN now() + make_interval(secs =>
                least({LONGEST_REST_SECONDS}, power(2, least(s.failures, 30))))
            ELSE s.rests_until END"""
_TIMED = """failures = 0, rests_until = NULL,
        average_seconds = (SELECT coalesce(s.average_seconds * 0.8 + 0.2 * took, took)
        FROM (SELECT extract(epoch FROM now() - s.held_at) AS took) AS held)"""
"""How long a slot is held of late, for whoever wants to know when his turn comes."""


def _freed(change: str) -> str:
    """Return the part of `leave` that changes the slot of who leaves."""
    return f"""freed AS (
    UPDATE slots s SET {change} FROM gone
    WHERE s.pool = gone.agent_id AND s.holder = gone.id AND s.attempt = gone.attempt
)"""


_FREED = _freed(_LET_GO)


def leave(
    change: str,
    guard: str,
    attempt: str | None,
    event: str,
    *,
    source: str = "",
    before: str = "",
    after: str = "",
    then_told: str = "",
    answer: str = "gone.id FROM gone",
    freed: str = _FREED,
) -> str:
    """Return the statement by which a task leaves its attempt: row, attempt, slot, event.

    `attempt` None: the task is of a kind that has none.

    `then_told` adds the events of what comes `after`, to be told after the task's own.
    """
    freed = freed and f", {freed}"
    closed = (
        attempt
        and f""", closed AS (
    UPDATE attempts a SET {attempt}, finished_at = now() FROM gone
    WHERE a.task_id = gone.id AND a.number = gone.attempt AND a.status = 'running'
)"""
    )
    return f"""
WITH {before} gone AS (
    UPDATE tasks t SET {change}, lease_expires_at = NULL, deadline_at = NULL
    {source}
    WHERE t.id = :task_id AND {guard}
    RETURNING t.id, t.run_id, t.definition_id, t.kind, t.parent_id, t.index AS item_index,
              t.is_sink, t.goes_on, t.status, t.attempt, t.agent_id, t.ends_run, t.message,
              t.wake_at, t.output, t.reason
) {closed or ""} {freed} {after}, told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, {event} FROM gone WHERE kind <> 'end' {then_told}
)
SELECT {answer}
"""


_BRIEF = "cast(:error AS jsonb) - 'traceback'"
_CONCERNS = """
       CASE WHEN gone.is_sink AND r.max_concurrent IS NOT NULL THEN r.workflow_id END AS frees,
       CASE WHEN gone.is_sink THEN r.parent_task_id END AS parent_task_id"""
"""Whom else the end of the run concerns."""
_CAN_TAKE = f"""cast(:takes AS boolean) AND mine.stays AND t.timeout_seconds <= :within
      AND t.message #>> '{{options,task_id}}' = cast(t.id AS text)  -- it can be gone on with
      AND ({still("running", "r")} OR r.id IN (SELECT id FROM opening))"""
_HANDED_OVER = f"""{
    simple_claim(
        "line.id",
        "gone, mine, line",
        _CAN_TAKE,
        fits="a.agent_id = gone.agent_id",
        state=IS_IN_LINE,
        generation=BY_SAVED,
    )
}, starting AS (
    UPDATE runs r SET status = 'running', started_at = now()
    FROM next, opening WHERE r.id = opening.id AND r.id = next.run_id
    RETURNING r.id
), freed AS (
    UPDATE slots s
    SET holder = next.task_id, attempt = next.attempt, lease_expires_at = next.lease_expires_at,
        {_TIMED}, freed_at = now(), held_at = coalesce(next.started_at, s.held_at),
        reserved_for = kept.id,
        reserved_until = CASE WHEN kept.id IS NOT NULL THEN {KEPT_UNTIL} END
    FROM gone JOIN mine ON true LEFT JOIN next ON true
         LEFT JOIN line AS kept ON mine.stays AND next.task_id IS NULL
    WHERE s.pool = gone.agent_id AND s.number = mine.number
    RETURNING s.reserved_for, kept.is_out
), woken AS (
    UPDATE tasks t SET {KEEP}
    FROM freed, runs r WHERE t.id = freed.reserved_for AND r.id = t.run_id
    RETURNING {woken_for(":agent_id")}, freed.is_out
)"""
"""The slot goes to the first in line: `next` is started in it here, if that is simple and this
worker takes him; else it is kept for him, and he is `woken`. Nobody waits for his run's lock."""
_COMPLETE = {
    "change": "status = 'completed', output = :output, finished_at = now(), waiting_since = NULL",
    "guard": MINE,
    "attempt": "status = 'completed'",
    "event": "'task.completed', jsonb_build_object('attempt', attempt)",
    "answer": f"""gone.message AS saved, gone.ends_run, r.generation AS run_generation,
       {_CONCERNS}
    FROM gone JOIN runs r ON r.id = gone.run_id""",
    "freed": "",
}
_HAND_OVER = _COMPLETE | {
    "before": f"""{find_line("1")}, mine AS (
    SELECT s.number,
           NOT s.closed AND NOT {HAS_SURPLUS} AND {is_open()} AND {is_ready()} AS stays
    FROM slots s JOIN agents a ON a.agent_id = s.pool
    WHERE s.pool = :agent_id AND s.holder = :task_id AND s.attempt = :attempt
), opening AS (
    SELECT r.id FROM line JOIN tasks t USING (id) JOIN runs r ON r.id = t.run_id
    WHERE cast(:takes AS boolean) AND {still("queued", "r")} AND {RUN_OPEN}
    FOR NO KEY UPDATE OF r SKIP LOCKED
),""",
    "then_told": f"""UNION ALL SELECT id, NULL, 'run.started', '{{}}' FROM starting
    {NEXT_STARTED}""",
    "answer": f"""gone.message AS saved, gone.ends_run, r.generation AS run_generation,
       {_CONCERNS},
       next.*, line.message AS next_message, next_run.input, {read_by("next")},
       EXISTS (SELECT FROM starting) AS starts_run,
       {", ".join(f"woken.{name} AS woken_{name}" for name in Woken.__slots__)}
    FROM gone JOIN runs r ON r.id = gone.run_id LEFT JOIN woken ON NOT woken.is_out
         LEFT JOIN next ON true LEFT JOIN line ON line.id = next.task_id
         LEFT JOIN runs AS next_run ON next_run.id = next.run_id""",
    "freed": _HANDED_OVER,
}
_SETTLED = f""", settled AS (
    UPDATE runs r
    SET status = CASE WHEN cast(:run_error AS jsonb) IS NULL THEN 'completed' ELSE 'failed' END,
        output = :run_output, error = :run_error, finished_at = now()
    FROM gone
    WHERE r.id = gone.run_id AND coalesce(r.status) IN ('running', 'paused')
      AND {RUN_ALIVE}
    RETURNING r.id, r.status
)"""
_RUN_ENDED = "UNION ALL SELECT id, NULL, 'run.' || status, '{}' FROM settled"
_FINISH = {
    has_slot: Prepared(leave(**(_HAND_OVER if has_slot else _COMPLETE)), json=("output",))
    for has_slot in (True, False)
}


def _last(leaving: Mapping[str, str]) -> Prepared:
    run = "run AS (SELECT id FROM runs WHERE id = :run_id FOR NO KEY UPDATE),"
    ending = {
        "before": run + leaving.get("before", ""),
        "source": "FROM run",
        "after": _SETTLED,
        "then_told": _RUN_ENDED + " " + leaving.get("then_told", ""),
        "answer": "(SELECT status FROM settled) AS run_status, " + leaving["answer"],
    }
    return Prepared(
        leave(**{**leaving, **ending}),
        json=("output",),
        json_or_null=("run_output", "run_error"),
    )


_FINISH_LAST = {True: _last(_HAND_OVER), False: _last(_COMPLETE)}
_FINISH_AND_CLAIM = {
    has_slot: Prepared(
        leave(
            **_COMPLETE
            | {
                "freed": _freed(f"{_LET_GO}, {_TIMED}") if has_slot else "",
                "after": ", "
                + simple_claim(
                    ":next_id",
                    "gone",
                    f"""NOT gone.ends_run AND t.run_id = gone.run_id AND {still("running", "r")}
      AND r.generation = :generation
      AND NOT EXISTS (SELECT FROM tasks d WHERE d.id = ANY (t.depends_on) AND d.id <> :task_id
                      AND d.status NOT IN {ENDED})""",
                ),
                "then_told": NEXT_STARTED,
                "answer": f"""gone.message AS saved, gone.ends_run, gone.output,
       r.generation AS run_generation, next.*, {read_by("next", ":task_id")}
    FROM gone JOIN runs r ON r.id = gone.run_id LEFT JOIN next ON true""",
            }
        ),
        json=("output",),
    )
    for has_slot in (True, False)
}


def _note_end(tx: Tx, kind: str, outcome: str) -> None:
    """Count an attempt that ended; tasks of other kinds have none.

    One whose answer was lost on the way is not counted.
    """
    if kind == "agent":
        tally.count(tx, tally.ATTEMPTS, outcome)


def complete_attempt(
    tx: Tx,
    claimed: Claimed,
    output: Any,
    run_output: Any = None,
    run_error: Failure | None = None,
    take: Taker | None = None,
) -> Finished | Fenced:
    """Record success: status, output, event; the slot is kept for who is first in its line.

    With `take` he is started by the same statement, if that is simple: see `Finished.next`. The
    run's sink settles the run too: with `run_output`, or as failed with `run_error` if no output
    could be made. Outputs are storable JSON.
    """
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "output": output,
        "agent_id": claimed.agent_id,
        "takes": take is not None,
        "token": take.token if take else None,
        "within": take.within_seconds if take else None,
        "worker": take.worker if take else None,
        "lease": take.lease_seconds if take else None,
        "grace": DEADLINE_GRACE_SECONDS,
    }
    if claimed.is_sink:
        error = None if run_error is None else as_error(run_error)
        ending = {"run_id": claimed.run_id, "run_output": run_output, "run_error": error}
        row = _FINISH_LAST[claimed.has_slot](tx, parameters | ending).first()
        if row is not None and row.run_status is not None:
            tally.count(tx, tally.RUNS_ENDED, row.run_status)
    else:
        row = _FINISH[claimed.has_slot](tx, parameters).first()
    if row is None:
        return _repeated(tx, claimed, take)
    _tell_end(tx, claimed, row.run_status if claimed.is_sink else None)
    _note_end(tx, claimed.kind, tally.COMPLETED)
    if not claimed.has_slot:
        return Finished(
            row.run_generation,
            row.ends_run,
            message=row.saved,
            frees=row.frees,
            parent_task_id=row.parent_task_id,
        )
    following = None
    if row.task_id is not None:
        following = simply_claimed(row, row.input, row.tasks, has_slot=True)
        tell_start(tx, following, row.starts_run)
        tally.count(tx, tally.FREED_TO_NEXT, value=0.0)
    return Finished(
        row.run_generation,
        row.ends_run,
        message=row.saved,
        frees=row.frees,
        parent_task_id=row.parent_task_id,
        next=following,
        next_message=row.next_message,
        woken=tuple(as_woken([row], "woken_") if row.woken_task_id is not None else ()),
    )


def complete_and_claim(
    tx: Tx,
    claimed: Claimed,
    output: Any,
    then: Visit,
    *,
    worker: str,
    lease_seconds: float,
) -> Finished | Fenced:
    """Record success, and take the next task of the same run in the same statement if that is easy.

    Easy is a task that waits for nothing but this one and whose agent has no capacity to count. The
    others come with `claim_task`; so does one whose answer was lost here, by its token.
    """
    row = _FINISH_AND_CLAIM[claimed.has_slot](
        tx,
        {
            "task_id": claimed.task_id,
            "attempt": claimed.attempt,
            "output": output,
            "next_id": then.task_id,
            "generation": then.generation,
            "token": then.token,
            "worker": worker,
            "lease": lease_seconds,
            "grace": DEADLINE_GRACE_SECONDS,
        },
    ).first()
    if row is None:
        return _repeated(tx, claimed)
    _tell_end(tx, claimed, None)
    _note_end(tx, claimed.kind, tally.COMPLETED)
    following = None if row.task_id is None else _following(claimed, row)
    if following is not None:
        tell_start(tx, following, False)
    return Finished(row.run_generation, row.ends_run, message=row.saved, next=following)


RUN_ENDS = {
    "completed": "run.completed",
    "failed": "run.failed",
    "cancelled": "run.cancelled",
}
TASK_ENDS = {
    "completed": "task.completed",
    "failed": "task.failed",
    "cancelled": "task.cancelled",
    "skipped": "task.skipped",
}


def _tell_end(tx: Tx, claimed: Claimed, run_status: str | None) -> None:
    """Log that a task is completed, and its run over with it."""
    if claimed.kind != "end":
        tell(tx, "task.completed", **claimed.ids)
    if run_status is not None:
        tell(tx, RUN_ENDS[run_status], run_id=claimed.run_id, request_id=claimed.request_id)


def _following(claimed: Claimed, row: Any) -> Claimed:
    """Return the claim that came with a finish; its statement could not see what it finished."""
    tasks = None if not row.reads else dict(row.tasks or {})
    if tasks is not None and claimed.parent_id is None and claimed.definition_id in row.reads:
        tasks[claimed.definition_id] = {"output": row.output, "status": "completed", "error": None}
    return simply_claimed(row, claimed.input, tasks)


_RECORDED = Prepared(
    f"""
SELECT r.generation, t.ends_run, t.message, t.status, t.goes_on
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.id = :task_id AND t.attempt = :attempt AND t.status IN {ENDED}
  AND NOT EXISTS (SELECT FROM attempts a WHERE a.task_id = t.id AND a.number = t.attempt
                  AND a.status IN ('lost', 'cancelled'))
""",
)
_KEPT_FOR = Prepared(
    f"""
SELECT {WOKEN} FROM slots s JOIN tasks t ON t.id = s.reserved_for JOIN runs r ON r.id = t.run_id
WHERE s.pool = :agent_id AND s.reserved_until > now() AND {still("waiting")}
"""
)


_TAKEN = Prepared(
    f"""
SELECT t.id, t.run_id, t.attempt FROM slots s JOIN tasks t ON t.id = s.holder
WHERE s.pool = :agent_id AND t.claim_token = :token AND {still("running")}
"""
)


def _repeated(tx: Tx, claimed: Claimed, take: Taker | None = None) -> Finished | Fenced:
    """Tell an outcome whose answer was lost on the way from one that came too late.

    Who was taken along is handed back: his saved visit was in the answer.
    """
    if take is not None and claimed.has_slot:
        for taken in _TAKEN(tx, {"agent_id": claimed.agent_id, "token": take.token}):
            lost = Failure("answer_lost", "The answer of PostgreSQL was lost.")
            hand_back(tx, taken.id, taken.run_id, taken.attempt, lost)
    parameters = {"task_id": claimed.task_id, "attempt": claimed.attempt}
    row = _RECORDED(tx, parameters).first()
    if row is None:
        return Fenced()
    if claimed.kind != "end":
        tell(tx, TASK_ENDS[row.status], **claimed.ids)
    failed_run = row.status == "failed" and not row.goes_on
    kept = _KEPT_FOR(tx, {"agent_id": claimed.agent_id}) if claimed.has_slot else []
    woken = tuple(as_woken(kept))
    return Finished(row.generation, row.ends_run, failed_run, row.message, woken=woken)


_AGENT_IS_AWAY = frozenset(
    {"agent_unreachable", "agent_failed", "agent_redirected", "invalid_answer", "url_refused"}
)
"""Failures of an agent behind HTTP that say more of it than of the task."""
_RETRY = Prepared(
    leave(
        f"""status = 'waiting', reason = 'retry', tries = tries + 1, waits = 0,
        waiting_since = NULL, message = coalesce(t.message, :message), woken_at = NULL,
        wake_at = now() + make_interval(secs => coalesce(
            :delay, {backoff("t.retry_backoff", "t.retry_max_backoff", "t.tries")}))""",
        f"{MINE} AND t.tries + 1 < t.max_attempts AND NOT t.ends_run",
        "status = 'failed', error = :error",
        f"""'task.retrying', jsonb_build_object(
            'attempt', attempt, 'wakeAt', {WAKE_AT}, 'error', {_BRIEF})""",
        answer="gone.wake_at FROM gone",
        freed=_freed(f"{_LET_GO}, {_RESTED}"),
    ),
    json=("error",),
    json_or_null=("message",),
)


def fail_attempt(
    tx: Tx,
    claimed: Claimed,
    failure: Failure,
    *,
    delay_seconds: float | None = None,
    message: dict[str, Any] | None,
) -> Finished | Parked | Fenced:
    """Record a failure: park the task for its next attempt, or let it fail for good.

    `delay_seconds` is what the agent asked for; without it the task's own backoff decides. For
    good, under `onFailure: fail`, nothing of the run starts any more: what has not started is
    cancelled, and the run fails when its running attempts have ended.
    """
    error = as_error(failure)
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "message": message,
        "delay": delay_seconds,
        "error": error,
        "rests": failure.code in _AGENT_IS_AWAY,
    }
    if failure.retryable and (row := _RETRY(tx, parameters).first()) is not None:
        tell(tx, "task.retrying", **claimed.ids, code=failure.code, wake_at=row.wake_at)
        _note_end(tx, claimed.kind, tally.FAILED)
        return Parked()
    ended = end_task(tx, claimed.task_id, claimed.run_id, error, attempt=claimed.attempt)
    return ended or _repeated(tx, claimed)


@dataclass(frozen=True, slots=True)
class Gone:
    """A task that was moved by somebody other than its worker."""

    run_id: UUID
    parent_id: UUID | None
    finished: Finished | None
    """None if it goes back to wait."""


def fail_unclaimed(tx: Tx, task_id: UUID, failure: Failure) -> Gone | None:
    """Let a task fail that cannot start; None if it moved on."""
    row = tx.execute(select(Task.run_id, Task.parent_id).where(Task.id == task_id)).one_or_none()
    if row is None:
        return None
    finished = end_task(tx, task_id, row.run_id, as_error(failure))
    return None if finished is None else Gone(row.run_id, row.parent_id, finished)


_OVERDUE = Prepared(
    f"""
SELECT reason FROM tasks t
WHERE id = :task_id AND {WAITS} AND reason IN {models.IN_LINE}
  AND waiting_since + make_interval(secs => max_wait_seconds) < now()
FOR NO KEY UPDATE
"""
)


def fail_overdue(tx: Tx, task_id: UUID) -> Gone | None:
    """Let a task fail that waited longer than its `busy.maxWaitSeconds`; None if it moved on."""
    run_id = tx.execute(select(Task.run_id).where(Task.id == task_id)).scalar()
    if run_id is None:
        return None
    lock_run(tx, run_id)
    row = _OVERDUE(tx, {"task_id": task_id}).first()
    if row is None:
        return None
    return fail_unclaimed(tx, task_id, work.waited_too_long(row.reason))


_END_TASK = Prepared(
    leave(
        f"""status = CASE WHEN r.cancel_requested_at IS NULL AND cast(:error AS jsonb) IS NOT NULL
                      THEN 'failed' ELSE 'cancelled' END,
        reason = CASE WHEN r.cancel_requested_at IS NOT NULL THEN 'run_cancelled'
                      WHEN cast(:error AS jsonb) IS NULL THEN CASE r.error ->> 'code'
                          WHEN 'deadline_exceeded' THEN 'deadline_exceeded'
                          ELSE 'upstream_failed' END END,
        error = {_BRIEF}, finished_at = now(), waiting_since = NULL, wake_at = NULL""",
        f"""r.id = t.run_id
        AND CASE WHEN cast(:attempt AS int) IS NULL THEN {WAITS}
                 ELSE t.attempt = :attempt AND {ATTEMPTED}
                      AND (cast(:error AS jsonb) IS NOT NULL OR t.ends_run) END""",
        """status = CASE WHEN cast(:error AS jsonb) IS NULL THEN 'cancelled' ELSE 'failed' END,
        error = :error""",
        f"""'task.' || status, jsonb_strip_nulls(jsonb_build_object('attempt', attempt,
            'error', {_BRIEF}, 'reason', reason))""",
        source="FROM runs r",
        answer=f"""gone.*, r.generation, r.request_id, {RUN_ALIVE} AS run_alive
        FROM gone JOIN runs r ON r.id = gone.run_id""",
        freed=_freed(f"{_LET_GO}, {_RESTED}"),
    ),
    json_or_null=("error",),
)


def end_task(
    tx: Tx,
    task_id: UUID,
    run_id: UUID,
    error: dict[str, Any] | None,
    *,
    attempt: int | None = None,
) -> Finished | None:
    """Fail a task for good and, unless it goes on, begin to fail its run.

    Without an error the task is given up with a run that is ending already.
    """
    lock_run(tx, run_id)
    row = _END_TASK(
        tx,
        {
            "task_id": task_id,
            "error": error,
            "attempt": attempt,
            "rests": error is not None and error["code"] in _AGENT_IS_AWAY,
        },
    ).first()
    if row is None:
        return None
    if row.kind != "end":
        code = None if error is None else error["code"]
        ids = {"run_id": run_id, "task_id": task_id, "task": row.definition_id}
        ids |= {"attempt": attempt, "agent_id": row.agent_id, "request_id": row.request_id}
        tell(tx, TASK_ENDS[row.status], **ids, code=code, reason=row.reason)
    if attempt is not None:
        _note_end(tx, row.kind, _outcome_of(error))
    failed_run = row.status == "failed" and not (row.goes_on and _is_tolerated(tx, row))
    if failed_run and row.run_alive and error is not None:
        _fail_run(tx, row, error)
    return Finished(row.generation, row.ends_run or failed_run, failed_run, row.message)


def _outcome_of(error: dict[str, Any] | None) -> str:
    if error is None:
        return tally.CANCELLED
    return tally.LOST if error["code"] == "worker_lost" else tally.FAILED


_EXCEEDED = Prepared(
    """
SELECT 1 FROM tasks p WHERE p.id = :parent_id AND NOT p.goes_on AND p.tolerates < (
    SELECT count(*) FROM tasks c WHERE c.parent_id = p.id AND c.status = 'failed')
"""
)


def _is_tolerated(tx: Tx, row: Row[Any]) -> bool:
    """Tell whether a `forEach` may lose this item too; the caller holds the run's lock."""
    return row.parent_id is None or _EXCEEDED(tx, {"parent_id": row.parent_id}).first() is None


def lock_run(tx: Tx, run_id: UUID) -> None:
    """Let one change at a time decide the run's fate.

    Not FOR UPDATE: an expanding `forEach`, which holds its task, key-shares the run for the foreign
    key of its items, and the two would lock each other.
    """
    tx.execute(select(Run.id).where(Run.id == run_id).with_for_update(key_share=True))


_FAIL_RUN = Prepared(
    "UPDATE runs r SET error = :error WHERE r.id = :run_id AND r.error IS NULL",
    json=("error",),
)
_FAIL_PARENT = Prepared(
    leave(
        "status = 'failed', reason = NULL, finished_at = now(), error = :error, wake_at = NULL",
        still("waiting"),
        "status = 'failed'",
        "'task.failed', jsonb_build_object('error', cast(:error AS jsonb))",
        freed=f"cleared AS (DELETE FROM slots s USING gone WHERE s.pool = '{ITEMS}' || gone.id)",
    ),
    json=("error",),
)
_CLOSE = Prepared(
    f"""
WITH closing AS (
    UPDATE tasks t
    SET status = CASE t.status WHEN 'running' THEN 'running' ELSE 'cancelled' END,
        reason = CASE t.status WHEN 'running' THEN t.reason ELSE :reason END,
        finished_at = CASE t.status WHEN 'running' THEN NULL ELSE now() END,
        lease_expires_at = CASE t.status WHEN 'running' THEN t.lease_expires_at END,
        wake_at = NULL, ends_run = true
    WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.run_id = :run_id
                     AND o.status IN ('pending', 'waiting', 'running')
                   ORDER BY o.id FOR NO KEY UPDATE)
      AND (t.status IN ('pending', 'waiting') OR t.status = 'running' AND NOT t.ends_run)
    RETURNING t.id, t.run_id, t.status, t.kind, t.parent_id, t.agent_id, t.attempt, t.claim_token
), closed AS (  -- what an agent behind HTTP has taken
    UPDATE attempts a
    SET status = 'cancelled', finished_at = now(), recall_at = now(), token = closing.claim_token
    FROM closing
    WHERE closing.status = 'cancelled' AND a.task_id = closing.id AND a.number = closing.attempt
      AND a.status = 'running'
    RETURNING a.task_id
), freed AS (
    UPDATE slots s SET {_LET_GO} FROM closing
    WHERE closing.status = 'cancelled' AND s.pool = closing.agent_id AND s.holder = closing.id
), cleared AS (  -- by way of the items too: they may have been written while this waited
    DELETE FROM slots s WHERE s.pool IN (
        SELECT '{ITEMS}' || coalesce(parent_id, id) FROM closing
        WHERE kind = 'for_each' OR parent_id IS NOT NULL)
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.cancelled', jsonb_build_object('reason', cast(:reason AS text))
    FROM closing WHERE status = 'cancelled' AND kind <> 'end'
)
SELECT status = 'cancelled' AND kind <> 'end' AS is_cancelled,
       id IN (SELECT task_id FROM closed) AS had_attempt FROM closing
""",
)


def _fail_run(tx: Tx, row: Row[Any], error: dict[str, Any]) -> None:
    """Mark the run as failing and cancel what has not started; the caller holds the run's lock."""
    if row.parent_id is not None:
        each = work.failed_with_item(row.item_index, error, is_one_too_many=row.goes_on)
        if _FAIL_PARENT(tx, {"task_id": row.parent_id, "error": each}):
            ids = {"run_id": row.run_id, "task_id": row.parent_id, "task": row.definition_id}
            tell(tx, "task.failed", **ids, code=each["code"], request_id=row.request_id)
        error = each if row.goes_on else error
    brief = work.failed_with_task(row.id, row.definition_id, error)
    _FAIL_RUN(tx, {"run_id": row.run_id, "error": brief})
    close_tasks(tx, row.run_id, "upstream_failed")


def close_tasks(tx: Tx, run_id: UUID, reason: str) -> None:
    """Cancel what has not started; who is running learns that the run ends with it.

    Repeated, because a `forEach` that expands at this moment holds its row until its items are
    written, and a statement that waited for that row does not see them; the next one does.
    """
    count = 0
    while closed := _CLOSE(tx, {"run_id": run_id, "reason": reason}):
        count += sum(row.is_cancelled for row in closed)
        if cancelled := sum(row.had_attempt for row in closed):
            tally.count(tx, tally.ATTEMPTS, tally.CANCELLED, value=cancelled)
    if count:
        tell(tx, "task.cancelled", run_id=run_id, tasks=count, reason=reason)
    for child in _OPEN_CHILDREN(tx, {"run_id": run_id}).scalars():
        request_cancel(tx, child, "parent")


def request_cancel(tx: Tx, run_id: UUID, by: str | None) -> None:
    """Have a run end as cancelled: what has not started of it never will."""
    if _REQUEST_CANCEL(tx, {"run_id": run_id, "by": by}):
        tell(tx, "run.cancel_requested", run_id=run_id, by=by)
    close_tasks(tx, run_id, "run_cancelled")


_OPEN_CHILDREN = Prepared(
    f"""
SELECT c.id FROM tasks t JOIN runs c ON c.parent_task_id = t.id
WHERE t.run_id = :run_id AND t.child_run_id IS NOT NULL
  AND c.status NOT IN {models.listed(RUN_ENDED)}
FOR NO KEY UPDATE OF c
"""
)
_REQUEST_CANCEL = Prepared(
    """
WITH asked AS (
    UPDATE runs r SET cancel_requested_at = now()
    WHERE r.id = :run_id AND r.cancel_requested_at IS NULL RETURNING r.id
)
INSERT INTO events (run_id, type, data)
SELECT id, 'run.cancel_requested', jsonb_strip_nulls(jsonb_build_object('by', cast(:by AS text)))
FROM asked RETURNING run_id
""",
)
_RELEASE = Prepared(
    leave(
        """status = 'waiting', reason = :reason, waits = waits + 1, woken_at = NULL,
        waiting_since = coalesce(t.waiting_since, now()), message = coalesce(t.message, :message),
        (not_before, wake_at) = (
            SELECT CASE WHEN NOT EXISTS (SELECT FROM everybody) THEN moment END,
                   least(moment, coalesce(t.waiting_since, now())
                                 + make_interval(secs => t.max_wait_seconds))
            FROM asked)""",
        f"{MINE} AND NOT t.ends_run",
        """status = 'cancelled', error = jsonb_build_object(
            'code', cast(:reason AS text), 'message', 'The agent took no work.')""",
        f"""'task.waiting', jsonb_build_object(
            'reason', cast(:reason AS text), 'wakeAt', {WAKE_AT}, 'agentId', agent_id)""",
        answer="gone.wake_at FROM gone",
        before=f"""asked AS MATERIALIZED (
    SELECT now() + make_interval(secs => greatest({LEAST_REST_SECONDS}, coalesce(
        :delay, {backoff("t.busy_backoff", "t.busy_max_backoff", "t.waits")}))) AS moment
    FROM tasks t WHERE t.id = :task_id
), everybody AS (
    -- An agent behind HTTP that is busy is so for everybody; but who has a task does not wait for
    -- its row, which others take first.
    SELECT agent_id FROM agents
    WHERE agent_id = :agent_id AND kind = 'remote' AND :reason = '{Reason.AGENT_BUSY}'
    FOR NO KEY UPDATE SKIP LOCKED
),""",
        after=""", rests AS (
    UPDATE agents a SET busy_until = greatest(a.busy_until, asked.moment)
    FROM gone, asked, everybody WHERE a.agent_id = everybody.agent_id
)""",
    ),
    json_or_null=("message",),
)


def release_attempt(
    tx: Tx,
    claimed: Claimed,
    reason: Reason,
    *,
    delay_seconds: float | None = None,
    message: dict[str, Any] | None,
) -> Finished | Parked | Fenced:
    """Give a claimed task back because its agent took no work; that uses up no attempt.

    It is not asked again before `delay_seconds`, or the task's own backoff, have passed.
    """
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "agent_id": claimed.agent_id,
        "reason": str(reason),
        "message": message,
        "delay": delay_seconds,
    }
    if (row := _RELEASE(tx, parameters).first()) is not None:
        tell(tx, "task.waiting", **claimed.ids, reason=reason, wake_at=row.wake_at)
        is_busy = reason == Reason.AGENT_BUSY
        _note_end(tx, claimed.kind, tally.BUSY if is_busy else tally.UNAVAILABLE)
        return Parked()
    return abandon_attempt(tx, claimed)


_ASK = Prepared(
    leave(
        """status = 'waiting', reason = 'approval', waits = 0, waiting_since = NULL,
        woken_at = NULL, wake_at = NULL, not_before = NULL, decision = NULL,
        message = coalesce(t.message, :message)""",
        f"{MINE} AND NOT t.ends_run",
        """status = 'cancelled', error = jsonb_build_object(
            'code', 'needs_approval', 'message', 'Somebody has to decide a call first.')""",
        """'task.waiting', jsonb_build_object(
            'reason', 'approval', 'wakeAt', NULL, 'agentId', agent_id)""",
    ),
    json_or_null=("message",),
)


def ask_approval(
    tx: Tx, claimed: Claimed, message: dict[str, Any] | None
) -> Finished | Parked | Fenced:
    """Let a task of an LLM agent wait for somebody to decide a call; that uses up no attempt.

    Its record says which call (see `records`), and `decide_approval` wakes it.
    """
    given = {"task_id": claimed.task_id, "attempt": claimed.attempt, "message": message}
    if _ASK(tx, given).first() is not None:
        tell(tx, "task.waiting", **claimed.ids, reason=Reason.APPROVAL)
        _note_end(tx, claimed.kind, tally.UNDECIDED)
        return Parked()
    return abandon_attempt(tx, claimed)


STOPPING_SECONDS = 2
"""Who hands a task back has ended by then, and the agent with it."""

_HAND_BACK = Prepared(
    leave(
        f"""status = 'waiting', reason = 'retry', woken_at = NULL, waits = 0, waiting_since = NULL,
        wake_at = now() + make_interval(secs => {STOPPING_SECONDS})""",
        f"""t.attempt = :attempt AND NOT t.ends_run
        AND ({still("running")} OR cast(:abroad AS boolean) AND {IS_ABROAD})""",
        """status = 'cancelled', error = jsonb_build_object(
            'code', cast(:code AS text), 'message', cast(:sentence AS text))""",
        f"""'task.waiting', jsonb_build_object(
            'reason', 'retry', 'wakeAt', {WAKE_AT}, 'agentId', agent_id)""",
        answer="""gone.definition_id AS task, gone.agent_id, gone.wake_at, r.request_id
        FROM gone JOIN runs r ON r.id = gone.run_id""",
        freed=_freed(f"{_LET_GO}, reserved_for = gone.id, reserved_until = {KEPT_UNTIL}"),
    ),
)


_STOPPED = Failure("worker_stopped", "The worker was stopped.")


def hand_back(
    tx: Tx,
    task_id: UUID,
    run_id: UUID,
    attempt: int,
    why: Failure = _STOPPED,
    *,
    abroad: bool = False,
) -> bool:
    """Give an attempt up because its worker goes, or with `abroad` its agent: it is tried again.

    That counts neither as lost nor as failed, and its slot is kept for it. In a run that is ending
    the task ends too. False if the attempt is over already, or an agent behind HTTP has it.
    """
    lock_run(tx, run_id)
    given = {"task_id": task_id, "attempt": attempt, "abroad": abroad}
    said = {"code": why.code, "sentence": why.message}
    if (row := _HAND_BACK(tx, given | said).first()) is not None:
        ids = {"run_id": run_id, "task_id": task_id, "attempt": attempt, **row._asdict()}
        tell(tx, "task.waiting", **ids, reason="retry", code=why.code)
        tally.count(tx, tally.ATTEMPTS, tally.HANDED_BACK)
        return True
    return end_task(tx, task_id, run_id, None, attempt=attempt) is not None


def abandon_attempt(tx: Tx, claimed: Claimed) -> Finished | Fenced:
    """Give up an attempt that has nothing to show because its run is ending."""
    ended = end_task(tx, claimed.task_id, claimed.run_id, None, attempt=claimed.attempt)
    return ended or Fenced()


# --- forEach -------------------------------------------------------------------------------------

_EXPAND = Prepared(
    f"""
WITH expanded AS (
    UPDATE tasks t
    SET status = 'waiting', reason = 'children', items = :count, tolerates = :tolerates,
        message = coalesce(t.message, :message),
        lease_expires_at = NULL, deadline_at = NULL, wake_at = NULL, woken_at = NULL
    WHERE t.id = :task_id AND t.attempt = :attempt AND {still("running")} AND NOT t.ends_run
    RETURNING t.*
), items AS (
    INSERT INTO tasks (id, run_id, definition_id, kind, position, parent_id, index, item,
        depends_on, successors, reads, wanted_agent_id, wanted_capability, preferred_agent_id,
        fallback, line_agent_id, queue,
        timeout_seconds, max_attempts, retry_backoff, retry_max_backoff, busy_backoff,
        busy_max_backoff, max_wait_seconds, goes_on, overrides, priority, status, reason)
    SELECT i.id, e.run_id, e.definition_id, e.item_kind, e.position, e.id, i.index - 1, i.item,
        '{{}}', '{{}}', e.reads, e.wanted_agent_id, e.wanted_capability, e.preferred_agent_id,
        e.fallback, e.line_agent_id, e.queue,
        e.timeout_seconds, e.max_attempts, e.retry_backoff, e.retry_max_backoff, e.busy_backoff,
        e.busy_max_backoff, e.max_wait_seconds, e.goes_on OR e.tolerates IS NOT NULL, e.overrides,
        e.priority,
        CASE WHEN i.index <= coalesce(e.max_parallel, i.index) THEN 'pending' ELSE 'waiting' END,
        CASE WHEN i.index <= coalesce(e.max_parallel, i.index) THEN NULL ELSE 'max_parallel' END
    FROM expanded e,
        ROWS FROM (unnest(cast(:ids AS uuid[])), jsonb_array_elements(cast(:values AS jsonb)))
        WITH ORDINALITY AS i(id, item, index)
    RETURNING id, parent_id, status, index, timeout_seconds, queue
), held AS (
    INSERT INTO slots (pool, number, holder)
    SELECT '{ITEMS}' || i.parent_id, i.index + 1, i.id FROM items i, expanded e
    WHERE e.max_parallel IS NOT NULL AND i.status = 'pending'
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.expanded', jsonb_build_object('items', items) FROM expanded
)
SELECT id, timeout_seconds, queue FROM items WHERE status = 'pending' ORDER BY index
""",
    json=("values",),
    json_or_null=("message",),
)


def expand_task(
    tx: Tx,
    claimed: Claimed,
    values: Sequence[Any],
    message: dict[str, Any],
    tolerates: int | None = None,
) -> list[Node] | None:
    """Write a row per item and park the `forEach` until they are over.

    If it `tolerates` that some items fail it fails with the next, else `onFailure` decides. Returns
    the items to visit now: all of them, or the first `maxParallel`; None when the attempt is no
    longer this worker's or the run ends.
    """
    rows = _EXPAND(
        tx,
        {
            "task_id": claimed.task_id,
            "attempt": claimed.attempt,
            "count": len(values),
            "tolerates": tolerates,
            "ids": [uuid7() for _ in values],
            "values": list(values),
            "message": message,
        },
    )
    if rows:
        tell(tx, "task.expanded", **claimed.ids, items=len(values))
    return [Node(row.id, frozenset(), row.timeout_seconds, row.queue) for row in rows] or None


_ITEM_OUTPUTS = Prepared(
    f"""
WITH items AS MATERIALIZED (
    SELECT index, output, status FROM tasks WHERE parent_id = :task_id)
SELECT output, status FROM items
WHERE (SELECT coalesce(sum(octet_length(output::text)), 0) FROM items) <= {MAX_GATHERED_BYTES}
ORDER BY index
"""
)


def item_outputs(tx: Tx, task_id: UUID) -> tuple[list[Any], int] | None:
    """Return the outputs of an expanded `forEach`'s items, in item order, and how many failed.

    None if they are larger together than what may be gathered: no process could hold them.
    """
    rows = list(_ITEM_OUTPUTS(tx, {"task_id": task_id}))
    failed = sum(row.status == TaskStatus.FAILED for row in rows)
    return ([row.output for row in rows], failed) if rows else None


# --- What an attempt says while it runs ----------------------------------------------------------

LOG_LINES_KEPT = 1000
"""Lines kept of an attempt; the oldest are cut."""
_LOG = Prepared(
    """
INSERT INTO attempt_logs (task_id, attempt, line, at, message, fields)
SELECT :task_id, :attempt, e.line, e.at, e.message, e.fields
FROM jsonb_to_recordset(:entries) AS e (line int, at timestamptz, message text, fields jsonb)
WHERE EXISTS (SELECT FROM attempts a WHERE a.task_id = :task_id AND a.number = :attempt
              AND a.status = 'running')
ON CONFLICT DO NOTHING
""",
    json=("entries",),
)
_CUT_LOG = Prepared(
    "DELETE FROM attempt_logs WHERE task_id = :task_id AND attempt = :attempt AND line <= :line",
)
_PROGRESS = Prepared(
    """
UPDATE attempts SET progress = :fraction, progress_message = :message
WHERE task_id = :task_id AND number = :attempt AND status = 'running'
""",
)


def write_log(tx: Tx, task_id: UUID, attempt: int, entries: Sequence[Mapping[str, Any]]) -> None:
    """Append what an agent logged: `{line, at, message, fields}` each, `line` counted from 1."""
    if not entries:
        return
    where = {"task_id": task_id, "attempt": attempt}
    _LOG(tx, where | {"entries": [dict(entry) for entry in entries]})
    newest = max(entry["line"] for entry in entries)
    if newest > LOG_LINES_KEPT:
        _CUT_LOG(tx, where | {"line": newest - LOG_LINES_KEPT})


def write_progress(
    tx: Tx, task_id: UUID, attempt: int, fraction: float, message: str | None
) -> None:
    """Record how far an attempt says it is, from 0 to 1."""
    parameters = {"task_id": task_id, "attempt": attempt, "fraction": fraction, "message": message}
    _PROGRESS(tx, parameters)
