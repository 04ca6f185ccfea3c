"""Schedules: recurring workflows, each of whose moments is decided exactly once.

Any number of beats may tick at once: who locked a schedule's row decides, in one transaction, what
fires of the moments that have come, writes the firings with their runs, and says when the next is
due. When that is, is `recurrence`'s. Locks are taken in one order: schedule, firing, run. Each
change and each decision is told by an event, under the lock, so that those of a schedule are in
order.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from uuid6 import uuid7

from opscore import engine, logs, tally
from opscore.db import Prepared, Tx, savepoint, tell
from opscore.engine import Plan, Submission
from opscore.errors import (
    InvalidRequest,
    OpsCoreError,
    RunFinished,
    ScheduleExists,
    ScheduleNotFound,
)
from opscore.expressions import FIRING_NAMES, ExpressionError, Template
from opscore.json_values import Faults
from opscore.models import Firing, Schedule, listed
from opscore.recurrence import Due, Recurrence, jitter, missed
from opscore.states import RUN_ENDED, FiringStatus, Overlap
from opscore.workflows import find_workflow

log = logs.get(__name__)

MOST_AT_ONCE = 10
"""Moments of one schedule that a tick fires; others have their turn, then the next goes on."""
MOST_SECONDS = 0.5
"""After this a tick begins nothing more: whoever changes one of its schedules waits for it, and
streams give out no event that is newer than a transaction which still writes."""
LONGEST_QUEUE = 100
"""Firings that wait for the run before them; one more is skipped."""
KEPT_FIRINGS = 100
"""The newest of each schedule, however old: what a yearly one did is worth knowing."""
CACHED_RECURRENCES = 1_024
"""That a process keeps, parsed."""
CACHED_INPUTS = 256
"""So many, compiled. They may be large."""
REST_SECONDS = 10.0
"""After trouble nobody foresaw, a schedule is left alone for so long."""
UTC_ZONE = "UTC"
_ANY_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)
_TIMES = ("cron", "every_seconds", "timezone", "start_at", "end_at")
_MEMBERS = (
    *("workflow_id", "version", "agent_id", *_TIMES, "input", "labels", "priority"),
    *("jitter_seconds", "overlap", "catch_up", "catch_up_window_seconds"),
)
"""What of a schedule may be changed; beside these it is paused and resumed."""
Told = Mapping[str, Any]
"""An event to be written."""


@dataclass(slots=True)
class Fired:
    """What a tick decided: publish the plans, and settle the runs it cancelled."""

    began: float = field(default_factory=time.monotonic)
    plans: list[Plan] = field(default_factory=list)
    cancelled: list[UUID] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    """The events of it."""
    has_more: bool = False
    """There may be more to do at once."""

    def add(self, other: "Fired") -> None:
        self.plans += other.plans
        self.cancelled += other.cancelled
        self.told += other.told
        self.has_more |= other.has_more

    def is_late(self) -> bool:
        """Tell whether the tick has lasted as long as it may."""
        return time.monotonic() - self.began > MOST_SECONDS


# --- Changing them ------------------------------------------------------------------------------


def create(tx: Tx, values: Mapping[str, Any], *, by: str | None = None) -> list[str]:
    """Write a schedule; return what in it looks as if something else was meant.

    Raises:
        InvalidRequest, InvalidInput, WorkflowNotFound, WorkflowArchived, AgentNotFound: what
            cannot be.
        ScheduleExists
    """
    now = _now(tx)
    recurrence = _check(tx, values, now)
    row = {**values, "decided_at": now, "created_at": now}
    statement = (
        upsert(Schedule)
        .values(**row, next_at=_next_at(row, recurrence))
        .on_conflict_do_nothing()
        .returning(Schedule.name)
    )
    if tx.execute(statement).first() is None:
        raise ScheduleExists(name=values["name"])
    _tell(tx, [_event("created", values["name"], by)])
    return recurrence.warnings()


def change(tx: Tx, name: str, values: Mapping[str, Any], *, by: str | None = None) -> list[str]:
    """Change a schedule. Other times count from now; one that was paused does not catch up.

    Whatever is wrong with a schedule, it can be paused; and resumed, if its times can be read.

    Raises:
        ScheduleNotFound
        InvalidRequest, InvalidInput, WorkflowNotFound, WorkflowArchived, AgentNotFound: as
            `create`.
    """
    before = _locked(tx, name)
    row = {**before, **values}
    if values.get("every_seconds") is not None and "timezone" not in values:
        row["timezone"] = UTC_ZONE
    now = _now(tx)
    recurrence = None
    if set(values) - {"enabled"}:
        recurrence = _check(tx, row, row["created_at"])
    elif row["enabled"]:
        recurrence = recurrence_of(row)
    if any(row[key] != before[key] for key in _TIMES):
        row["decided_at"] = now
    elif row["enabled"] and not before["enabled"]:
        # What is missed is missed; what is yet to come by its jitter is not. A moment above `now`
        # was decided by a clock that was wrong.
        row["decided_at"] = max(now - _delay(row), min(row["decided_at"], now))
    row |= {"next_at": _next_at(row, recurrence), "rests_until": None, "updated_at": now}
    tx.execute(update(Schedule).where(Schedule.name == name).values(**row))
    told = list(_changes(before, row, by))
    if before["overlap"] == Overlap.QUEUE != row["overlap"]:
        told += _leave_queue(tx, name, by)
    _tell(tx, told)
    return recurrence.warnings() if recurrence else []


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], by: str | None) -> Iterator[Told]:
    changed = [name for name in _MEMBERS if _canonical(before[name]) != _canonical(after[name])]
    if changed:
        yield _event("changed", after["name"], by, members=[_camel(name) for name in changed])
    if before["enabled"] != after["enabled"]:
        yield _event("resumed" if after["enabled"] else "paused", after["name"], by)


def _canonical(value: Any) -> str:
    """Write a value so that it tells 1 from true, which Python takes for equal."""
    return json.dumps(value, sort_keys=True, default=str)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def remove(tx: Tx, name: str, *, by: str | None = None) -> None:
    """Delete a schedule with its firings, also those that wait; its runs and events stay.

    Raises:
        ScheduleNotFound
    """
    statement = delete(Schedule).where(Schedule.name == name).returning(Schedule.name)
    if tx.execute(statement).first() is None:
        raise ScheduleNotFound(name=name)
    _tell(tx, [_event("deleted", name, by)])


def trigger(tx: Tx, name: str, *, by: str, request_id: str | None = None) -> Plan:
    """Have a schedule fire now, whatever its times and its `overlap` say.

    Raises:
        ScheduleNotFound
        InvalidInput, InvalidRequest, WorkflowNotFound, WorkflowArchived, AgentNotFound: as
            `submit_run`.
    """
    row = _locked(tx, name)
    moment = _now(tx)
    plan = _submit(tx, row, moment, uuid7(), by=by, request_id=request_id)
    _write(tx, name, moment, FiringStatus.STARTED, by=by, run_id=plan.run_id)
    tally.count(tx, tally.FIRINGS, FiringStatus.STARTED)
    told = {"moment": _iso(moment), "runId": str(plan.run_id)}
    _tell(tx, [_event("triggered", name, by, **told)])
    return plan


def preview(tx: Tx, name: str, count: int) -> list[datetime]:
    """Return the next moments at which a schedule fires, or would if it were not paused.

    They are without jitter: one that is over is among them as long as it is yet to fire by it.

    Raises:
        ScheduleNotFound
    """
    row = _read(tx, name, is_locked=False)
    return recurrence_of(row).preview(max(_now(tx) - _delay(row), row["decided_at"]), count)


def recurrence_of(row: Mapping[str, Any]) -> Recurrence:
    """Return when a schedule fires.

    Raises:
        InvalidRequest: its times cannot be.
    """
    return _parsed(row["created_at"], *(row[key] for key in _TIMES))


@lru_cache(CACHED_RECURRENCES)
def _parsed(created_at: datetime, *times: Any) -> Recurrence:
    return Recurrence.parse(created_at, **dict(zip(_TIMES, times, strict=True)))


def _check(tx: Tx, row: Mapping[str, Any], created_at: datetime) -> Recurrence:
    """Make sure that a schedule could fire as it is."""
    recurrence = recurrence_of({**row, "created_at": created_at})
    faults = Faults()
    template = Template.compile(row["input"], "/input", faults, FIRING_NAMES)
    if faults:
        raise InvalidRequest(faults)
    stored = find_workflow(tx, row["workflow_id"], row["version"])
    stored.check_open()
    definition = stored.definition
    try:
        definition.check_input(template.render(_scope(row["name"], created_at)))
    except ExpressionError as error:
        raise InvalidRequest({"/input": [str(error)]}) from error
    engine.check_agents(tx, definition, row["agent_id"])
    return recurrence


def _leave_queue(tx: Tx, name: str, by: str | None) -> list[Told]:
    """Skip the firings that wait; return the events of it."""
    waiting = (Firing.schedule == name, Firing.status == FiringStatus.WAITING)
    error = {"code": "overlap", "message": "It waited, and firings no longer do."}
    statement = (
        update(Firing)
        .where(*waiting)
        .values(status=FiringStatus.SKIPPED, error=error, decided_at=func.now())
        .returning(Firing.moment)
    )
    skipped = sorted(tx.execute(statement).scalars())
    reason = error["code"]
    return [_event("skipped", name, by, moment=_iso(at), reason=reason) for at in skipped]


def _locked(tx: Tx, name: str) -> dict[str, Any]:
    return _read(tx, name, is_locked=True)


def _read(tx: Tx, name: str, *, is_locked: bool) -> dict[str, Any]:
    statement = select(*Schedule.__table__.c).where(Schedule.name == name)
    row = tx.execute(statement.with_for_update() if is_locked else statement).one_or_none()
    if row is None:
        raise ScheduleNotFound(name=name)
    return row._asdict()


def _now(tx: Tx) -> datetime:
    """Return the database's time: of this statement, as who waited for a row comes after others."""
    now: datetime = tx.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def _next_at(row: Mapping[str, Any], recurrence: Recurrence | None) -> datetime | None:
    """Return when a schedule is due next, after what is decided."""
    if recurrence is None or not row["enabled"]:
        return None
    return _later(recurrence.next_after(row["decided_at"]), _delay(row))


def _later(moment: datetime | None, delay: timedelta) -> datetime | None:
    try:
        return None if moment is None else moment + delay
    except OverflowError:  # in the year 10,000
        return None


def _delay(row: Mapping[str, Any]) -> timedelta:
    """Return how much later than its moments a schedule fires.

    The same for all of its moments: so they keep their order and their distance, and which of them
    were missed does not depend on chance. Schedules are spread, which is what jitter is for.
    """
    return jitter(row["name"], _ANY_MOMENT, row["jitter_seconds"])


# --- Telling ------------------------------------------------------------------------------------

_TELL = Prepared(
    """
INSERT INTO events (schedule, type, data)
SELECT schedule, type, data
FROM jsonb_to_recordset(:events) AS e (schedule text, type text, data jsonb)
""",
    json=("events",),
)


def _event(type: str, name: str, by: str | None, **data: Any) -> Told:
    """Return an event of a schedule; `by` is who did it: of a beat, the schedule."""
    return {
        "schedule": name,
        "type": f"schedule.{type}",
        "data": ({} if by is None else {"by": by}) | data,
    }


def _tell(tx: Tx, events: Sequence[Told]) -> None:
    """Write events in one statement, however many, and log them once they are committed."""
    if not events:
        return
    _TELL(tx, {"events": list(events)})
    for event in events:
        data = event["data"]
        brief = {name: data.get(name) for name in ("by", "moment", "reason")}
        code = data.get("error", {}).get("code")
        ids = {"schedule": event["schedule"], "run_id": data.get("runId")}
        is_warning = event["type"] == "schedule.not_fired"
        tell(tx, event["type"], is_warning=is_warning, **ids, **brief, code=code)


# --- Firing -------------------------------------------------------------------------------------

_WAITING = Prepared(
    f"""
WITH RECURSIVE waiting AS (  -- from schedule to schedule, however many firings of each wait
    (SELECT schedule FROM firings WHERE status = 'waiting' ORDER BY schedule LIMIT 1)
    UNION ALL
    SELECT (SELECT f.schedule FROM firings f WHERE f.status = 'waiting' AND f.schedule > w.schedule
            ORDER BY f.schedule LIMIT 1)
    FROM waiting w WHERE w.schedule IS NOT NULL
)
SELECT w.schedule FROM waiting w
WHERE EXISTS (
    SELECT FROM schedules s WHERE s.name = w.schedule AND s.enabled
      AND (s.rests_until < now()) IS NOT FALSE OFFSET 0)
  AND NOT EXISTS (
    SELECT FROM runs r WHERE r.schedule = w.schedule AND NOT r.status IN {listed(RUN_ENDED)}
    OFFSET 0)
ORDER BY random()  -- so that none stands in the way of others for ever
LIMIT :limit
"""
)
_OPEN_RUNS = Prepared(
    f"""
SELECT id FROM runs r WHERE r.schedule = :name AND NOT r.status IN {listed(RUN_ENDED)} ORDER BY id
"""
)
_WRITE = Prepared(
    """
INSERT INTO firings (schedule, moment, status, by, error, run_id)
VALUES (:schedule, :moment, :status, :by, :error, :run_id)
ON CONFLICT DO NOTHING RETURNING 1
""",
    json_or_null=("error",),
)
_DECIDED = Prepared(
    """
UPDATE schedules SET decided_at = :decided_at, next_at = :next_at WHERE name = :name RETURNING 1
"""
)


def tick(tx: Tx, limit: int) -> Fired:
    """Decide what fires of the schedules that are due, at most `limit` of them.

    All of it commits together; call it again while there is something to do.
    """
    fired = Fired()
    now = _now(tx)
    due = _lock(tx, Schedule.next_at <= now, limit)
    _each(tx, due, fired, partial(_decide, now=now))
    names = _WAITING(tx, {"limit": limit}).scalars()
    if names:
        _each(tx, _lock(tx, Schedule.name.in_(names), limit), fired, _start_next)
    _tell(tx, fired.told)
    fired.has_more |= len(due) == limit
    return fired


def _lock(tx: Tx, condition: Any, limit: int) -> list[dict[str, Any]]:
    """Lock schedules that are not paused, do not rest, and that no other beat has locked."""
    is_awake = (Schedule.rests_until >= func.now()).is_not(True)
    statement = (
        select(*Schedule.__table__.c)
        .where(Schedule.enabled, condition, is_awake)
        .order_by(Schedule.next_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [row._asdict() for row in tx.execute(statement)]


Decide = Callable[[Tx, Mapping[str, Any], Fired], None]


def _each(tx: Tx, rows: Sequence[Mapping[str, Any]], fired: Fired, decide: Decide) -> None:
    """Decide about one schedule, then others until it is late: the rest is the next tick's."""
    for number, row in enumerate(rows):
        if number and fired.is_late():
            fired.has_more = True
            return
        _apart(tx, row, fired, decide)


def _apart(tx: Tx, row: Mapping[str, Any], fired: Fired, decide: Decide) -> None:
    """Decide about one schedule, so that trouble with it is nobody else's."""
    own = Fired(fired.began)
    try:
        with savepoint(tx):
            decide(tx, row, own)
    except Exception:
        # Any: beat must outlive a single schedule's trouble. A lost connection ends the next line.
        log.exception("schedule.trouble", schedule=row["name"])
        later = func.clock_timestamp() + timedelta(seconds=REST_SECONDS)
        this = Schedule.name == row["name"]
        tx.execute(update(Schedule).where(this).values(rests_until=later))
    else:
        fired.add(own)


def _decide(tx: Tx, row: Mapping[str, Any], fired: Fired, now: datetime) -> None:
    """Fire what has come of one schedule, and say when it is due next."""
    try:
        recurrence = recurrence_of(row)
    except InvalidRequest as error:
        return _give_up(tx, row, error, fired)
    delay = _delay(row)
    until = now - delay
    decided, window = row["decided_at"], row["catch_up_window_seconds"]
    due = missed(recurrence, decided, until, row["catch_up"], window, MOST_AT_ONCE)
    for number, moment in enumerate(due.moments, 1):
        _fire(tx, row, moment, fired, until)
        if fired.is_late() and number < len(due.moments):
            due = Due(due.moments[:number], due.moments[number])
            break
    if due.next_at is not None and due.next_at <= until:
        # There are more: whoever became due meanwhile is first.
        fired.has_more = True
        return _decided(tx, row, due.moments[-1], now)
    return _decided(tx, row, max(until, decided), _later(due.next_at, delay))


def _give_up(tx: Tx, row: Mapping[str, Any], error: OpsCoreError, fired: Fired) -> None:
    """Record that a schedule's times cannot be read any more; it fires again once it is changed."""
    name, moment = row["name"], row["next_at"]
    _write(tx, name, moment, FiringStatus.FAILED, error=_told(error))
    _not_fired(tx, name, moment, error, fired)
    _decided(tx, row, row["decided_at"], None)


def _decided(
    tx: Tx, row: Mapping[str, Any], decided_at: datetime, next_at: datetime | None
) -> None:
    _DECIDED(tx, {"name": row["name"], "decided_at": decided_at, "next_at": next_at})


def _fire(tx: Tx, row: Mapping[str, Any], moment: datetime, fired: Fired, until: datetime) -> None:
    """Decide one moment, by what the schedule's runs before do; those up to `until` are due."""
    name, overlap = row["name"], row["overlap"]
    before = [] if overlap == Overlap.ALLOW else _open_runs(tx, name)
    if overlap == Overlap.SKIP and before:
        _skip(tx, name, moment, "overlap", f"Run {before[0]} is not over.", fired)
    elif overlap == Overlap.QUEUE and (before or _waiting(tx, name)):
        _queue(tx, name, moment, fired)
    else:
        run_id = uuid7()
        is_new = _write(tx, name, moment, FiringStatus.STARTED, run_id=run_id)
        if is_new and _start(tx, row, moment, run_id, fired):
            late = (until - moment).total_seconds() + time.monotonic() - fired.began
            tally.count(tx, tally.LATENESS, value=late)
            _cancel(tx, name, before, fired)


def _queue(tx: Tx, name: str, moment: datetime, fired: Fired) -> None:
    waiting = _waiting(tx, name)
    if waiting >= LONGEST_QUEUE:
        sentence = f"{LONGEST_QUEUE} firings wait already."
        _skip(tx, name, moment, "queue_full", sentence, fired)
    elif _write(tx, name, moment, FiringStatus.WAITING):
        tally.count(tx, tally.FIRINGS, FiringStatus.WAITING)
        fired.told.append(_decision("queued", name, moment, waiting=waiting + 1))


def _skip(tx: Tx, name: str, moment: datetime, code: str, sentence: str, fired: Fired) -> None:
    error = {"code": code, "message": sentence}
    if _write(tx, name, moment, FiringStatus.SKIPPED, error=error):
        tally.count(tx, tally.FIRINGS, FiringStatus.SKIPPED)
        fired.told.append(_decision("skipped", name, moment, reason=code))


def _cancel(tx: Tx, name: str, runs: list[UUID], fired: Fired) -> None:
    for run_id in runs:
        with suppress(RunFinished):  # at this moment
            engine.cancel_run(tx, run_id, _beat(name))
            fired.cancelled.append(run_id)


def _start_next(tx: Tx, row: Mapping[str, Any], fired: Fired) -> None:
    """Start the first firing that waits, if the run before it is over."""
    name, run_id = row["name"], uuid7()
    waits = (Firing.schedule == name, Firing.status == FiringStatus.WAITING)
    if _open_runs(tx, name):  # since it was looked for
        return
    first = select(func.min(Firing.moment)).where(*waits).scalar_subquery()
    statement = (
        update(Firing)
        .where(*waits, Firing.moment == first)
        .values(status=FiringStatus.STARTED, run_id=run_id, decided_at=func.now())
        .returning(Firing.moment)
    )
    moment = tx.execute(statement).scalar()
    if moment is not None:
        _start(tx, row, moment, run_id, fired)


def _start(tx: Tx, row: Mapping[str, Any], moment: datetime, run_id: UUID, fired: Fired) -> bool:
    """Submit the run of a firing; if that cannot be, record the reason and return False."""
    name = row["name"]
    try:
        fired.plans.append(_submit(tx, row, moment, run_id, by=_beat(name)))
    except OpsCoreError as error:
        _not_fired(tx, name, moment, error, fired)
        where = (Firing.schedule == name, Firing.moment == moment)
        values = {"status": FiringStatus.FAILED, "error": _told(error), "run_id": None}
        tx.execute(update(Firing).where(*where).values(**values))
        return False
    tally.count(tx, tally.FIRINGS, FiringStatus.STARTED)
    fired.told.append(_decision("fired", name, moment, runId=str(run_id)))
    return True


def _not_fired(tx: Tx, name: str, moment: datetime, error: OpsCoreError, fired: Fired) -> None:
    tally.count(tx, tally.FIRINGS, FiringStatus.FAILED)
    fired.told.append(_decision("not_fired", name, moment, error=_told(error)))


def _decision(type: str, name: str, moment: datetime, **data: Any) -> Told:
    """Return the event of what a beat decided of a moment."""
    return _event(type, name, _beat(name), moment=_iso(moment), **data)


def _beat(name: str) -> str:
    """Name a beat as events do: by the schedule it acts for."""
    return f"schedule:{name}"


def _told(error: OpsCoreError) -> dict[str, Any]:
    faults = getattr(error, "errors", {})
    said = [f"{place}: {sentences[0]}" for place, sentences in list(faults.items())[:3]]
    return {"code": error.code, "message": " ".join([str(error), *said])}


def _submit(
    tx: Tx,
    row: Mapping[str, Any],
    moment: datetime,
    run_id: UUID,
    *,
    by: str,
    request_id: str | None = None,
) -> Plan:
    stored = find_workflow(tx, row["workflow_id"], row["version"])
    submission = Submission(
        input=_template(row).render(_scope(row["name"], moment)),
        agent_id=row["agent_id"],
        labels=row["labels"],
        priority=row["priority"],
        request_id=request_id,
        by=by,
        schedule=row["name"],
    )
    return engine.submit_run(tx, stored, submission, run_id)


_compiled: dict[tuple[str, datetime], Template] = {}


def _template(row: Mapping[str, Any]) -> Template:
    """Return what a schedule says of its input: to compile a large one takes seconds."""
    key = (row["name"], row["updated_at"])
    template = _compiled.get(key)
    if template is None:
        template = Template.compile(row["input"], "/input", Faults(), FIRING_NAMES)
        if len(_compiled) >= CACHED_INPUTS:
            _compiled.clear()
        _compiled[key] = template
    return template


def _scope(name: str, moment: datetime) -> dict[str, Any]:
    return {"firing": {"at": _iso(moment), "schedule": name}}


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _write(
    tx: Tx,
    name: str,
    moment: datetime,
    status: FiringStatus,
    *,
    by: str = "schedule",
    error: dict[str, Any] | None = None,
    run_id: UUID | None = None,
) -> bool:
    """Write a firing; False if the moment was decided already."""
    values = {"schedule": name, "moment": moment, "status": status, "by": by}
    return bool(_WRITE(tx, {**values, "error": error, "run_id": run_id}))


def _open_runs(tx: Tx, name: str) -> list[UUID]:
    return _OPEN_RUNS(tx, {"name": name}).scalars()


def _waiting(tx: Tx, name: str) -> int:
    waiting = (Firing.schedule == name, Firing.status == FiringStatus.WAITING)
    return tx.execute(select(func.count()).select_from(Firing).where(*waiting)).scalar_one()


# --- Tidying ------------------------------------------------------------------------------------

_BEFORE = "now() - make_interval(days => :days)"
_FORGET_FIRINGS = Prepared(
    f"""
WITH page AS MATERIALIZED (
    SELECT name, decided_at FROM schedules WHERE name > :after ORDER BY name LIMIT :limit
), forgotten AS (
    DELETE FROM firings WHERE ctid = ANY (ARRAY(
        SELECT old.ctid FROM page s
        CROSS JOIN LATERAL (  -- most have none that are old: for them nothing more is read
            SELECT f.schedule FROM firings f
            WHERE f.schedule = s.name AND f.moment < {_BEFORE} LIMIT 1) AS has
        CROSS JOIN LATERAL (
            SELECT f.moment FROM firings f WHERE f.schedule = has.schedule
            ORDER BY f.moment DESC OFFSET {KEPT_FIRINGS - 1} LIMIT 1) AS kept
        CROSS JOIN LATERAL (
            SELECT f.ctid FROM firings f
            WHERE f.schedule = has.schedule AND f.moment < least(kept.moment, {_BEFORE})
              -- One above that makes its moment unique.
              AND f.moment <= s.decided_at
              AND f.status <> 'waiting' AND f.decided_at < {_BEFORE}
            -- Whoever deletes the schedule has them in another order.
            ORDER BY f.moment LIMIT :limit FOR UPDATE SKIP LOCKED) AS old
        LIMIT :limit))
    RETURNING 1
)
SELECT (SELECT count(*) FROM forgotten) AS forgotten, max(name) AS last, count(*) AS looked_at
FROM page
"""
)
_FORGET_EVENTS = Prepared(
    f"""
DELETE FROM events WHERE seq = ANY (ARRAY(
    SELECT seq FROM events WHERE schedule IS NOT NULL AND at < {_BEFORE}
    ORDER BY at LIMIT :limit))
RETURNING 1
"""
)


def forget_firings(tx: Tx, days: int, limit: int, after: str = "") -> str | None:
    """Delete firings that were decided so long ago, but for the newest `KEPT_FIRINGS` of each
    schedule.

    At most `limit` of them, of at most `limit` schedules behind the name `after`. Return behind
    which to go on; None: that was all.
    """
    (row,) = _FORGET_FIRINGS(tx, {"days": days, "limit": limit, "after": after})
    if row.forgotten >= limit:
        return after
    last: str | None = row.last if row.looked_at >= limit else None
    return last


def forget_events(tx: Tx, days: int, limit: int) -> int:
    """Delete events of schedules, also of deleted ones, that are so old; return how many."""
    return len(_FORGET_EVENTS(tx, {"days": days, "limit": limit}))
