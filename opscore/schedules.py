"""Schedules: recurring workflows, each of whose moments is decided exactly once.

Any number of beats may tick at once: who locked a schedule's row decides, in one transaction, what
fires of the moments that have come, writes the firings with their runs, and says when the next is
due. When that is, is `recurrence`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from opscore import engine, logs
from opscore.db import Tx
from opscore.engine import Plan, Submission
from opscore.errors import InvalidRequest, OpsCoreError, ScheduleExists, ScheduleNotFound
from opscore.expressions import FIRING_NAMES, Template
from opscore.json_values import Faults
from opscore.models import Firing, Run, Schedule
from opscore.recurrence import Recurrence, jitter, missed
from opscore.states import RUN_ENDED, FiringStatus, Overlap
from opscore.workflows import find_workflow

log = logs.get(__name__)

MOST_AT_ONCE = 100
"""Moments of one schedule that a tick fires; the next tick goes on."""
LONGEST_QUEUE = 1_000
"""Firings that wait for the run before them; one more is skipped."""
_TIMES = ("cron", "every_seconds", "timezone", "start_at", "end_at")


@dataclass(slots=True)
class Fired:
    """What a tick decided: publish the plans, and settle the runs it cancelled."""

    plans: list[Plan] = field(default_factory=list)
    cancelled: list[UUID] = field(default_factory=list)
    has_more: bool = False
    """There may be more to do at once."""


# --- Changing them ------------------------------------------------------------------------------


def create(tx: Tx, values: Mapping[str, Any]) -> list[str]:
    """Write a schedule; return what in it looks as if something else was meant.

    Raises:
        InvalidRequest, InvalidInput, WorkflowNotFound: what cannot be, at its place.
        ScheduleExists
    """
    now = _now(tx)
    recurrence = _check(tx, values, now)
    next_at = _due(values["name"], values["jitter_seconds"], recurrence.next_after(now))
    statement = (
        upsert(Schedule)
        .values(**values, decided_at=now, next_at=next_at, created_at=now)
        .on_conflict_do_nothing()
        .returning(Schedule.name)
    )
    if tx.execute(statement).first() is None:
        raise ScheduleExists(name=values["name"])
    return recurrence.warnings()


def change(tx: Tx, name: str, values: Mapping[str, Any]) -> list[str]:
    """Change a schedule. Other times count from now; one that was paused does not catch up.

    Raises:
        ScheduleNotFound
        InvalidRequest, InvalidInput, WorkflowNotFound: as `create`.
    """
    row = _locked(tx, name)
    now = _now(tx)
    whole = {**row, **values}
    recurrence = _check(tx, whole, row["created_at"])
    begins_anew = any(key in values and values[key] != row[key] for key in _TIMES)
    begins_anew |= whole["enabled"] and not row["enabled"]
    after = now if begins_anew else row["decided_at"]
    next_at = _due(name, whole["jitter_seconds"], recurrence.next_after(after))
    tx.execute(
        update(Schedule)
        .where(Schedule.name == name)
        .values(**values, decided_at=after, next_at=next_at, updated_at=now)
    )
    return recurrence.warnings()


def remove(tx: Tx, name: str) -> None:
    """Delete a schedule with the history of its firings; its runs stay.

    Raises:
        ScheduleNotFound
    """
    statement = delete(Schedule).where(Schedule.name == name).returning(Schedule.name)
    if tx.execute(statement).first() is None:
        raise ScheduleNotFound(name=name)


def trigger(tx: Tx, name: str, *, by: str, request_id: str | None = None) -> Plan:
    """Have a schedule fire now, whatever its times and its `overlap` say.

    Raises:
        ScheduleNotFound
        InvalidInput, InvalidRequest, WorkflowNotFound, AgentNotFound: as `submit_run`.
    """
    row = _locked(tx, name)
    moment = _now(tx)
    plan = _submit(tx, row, moment, by=by, request_id=request_id)
    _write(tx, name, moment, FiringStatus.STARTED, by=by, run_id=plan.run_id)
    return plan


def preview(tx: Tx, name: str, count: int) -> list[datetime]:
    """Return the next moments at which a schedule fires, at most so many.

    Raises:
        ScheduleNotFound
    """
    row = _locked(tx, name)
    return recurrence_of(row).preview(max(_now(tx), row["decided_at"]), count)


def recurrence_of(row: Mapping[str, Any]) -> Recurrence:
    """Return when a schedule fires.

    Raises:
        InvalidRequest: its times cannot be.
    """
    return Recurrence.parse(row["created_at"], **{key: row[key] for key in _TIMES})


def _check(tx: Tx, values: Mapping[str, Any], created_at: datetime) -> Recurrence:
    """Make sure that a schedule could fire as it is."""
    recurrence = recurrence_of({**values, "created_at": created_at})
    faults = Faults()
    template = Template.compile(values["input"], "/input", faults, FIRING_NAMES)
    if faults:
        raise InvalidRequest(faults)
    definition = find_workflow(tx, values["workflow_id"], values["version"]).definition
    definition.check_input(template.render(_scope(values["name"], created_at)))
    engine.check_agents(tx, definition, values["agent_id"])
    return recurrence


def _locked(tx: Tx, name: str) -> dict[str, Any]:
    statement = select(*Schedule.__table__.c).where(Schedule.name == name).with_for_update()
    row = tx.execute(statement).one_or_none()
    if row is None:
        raise ScheduleNotFound(name=name)
    return row._asdict()


def _now(tx: Tx) -> datetime:
    now: datetime = tx.execute(select(func.now())).scalar_one()
    return now.astimezone(UTC)


def _due(name: str, jitter_seconds: float, moment: datetime | None) -> datetime | None:
    return None if moment is None else moment + jitter(name, moment, jitter_seconds)


# --- Firing -------------------------------------------------------------------------------------


def tick(tx: Tx, limit: int) -> Fired:
    """Decide what fires of the schedules that are due, at most `limit` of them.

    All of it commits together; call it again while there is something to do.
    """
    fired = Fired()
    now = _now(tx)
    due = (
        select(*Schedule.__table__.c)
        .where(Schedule.enabled, Schedule.next_at <= now)
        .order_by(Schedule.next_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = tx.execute(due).all()
    for row in rows:
        _decide(tx, row._asdict(), now, fired)
    _start_waiting(tx, limit, fired)
    fired.has_more = len(rows) == limit
    return fired


def _decide(tx: Tx, row: Mapping[str, Any], now: datetime, fired: Fired) -> None:
    """Fire what has come of one schedule, and say when it is due next."""
    recurrence, name = recurrence_of(row), row["name"]
    # With jitter a later moment may be due before an earlier one; they are decided in their order.
    first = recurrence.next_after(row["decided_at"])
    until = max(now - timedelta(seconds=row["jitter_seconds"]), min(first or now, now))
    due = missed(
        recurrence,
        row["decided_at"],
        until,
        row["catch_up"],
        row["catch_up_window_seconds"],
        MOST_AT_ONCE,
    )
    for moment in due.moments:
        _fire(tx, row, moment, fired)
    has_more = due.next_at is not None and due.next_at <= until
    decided_at = due.moments[-1] if has_more else max(until, row["decided_at"])
    next_at = _due(name, row["jitter_seconds"], due.next_at)
    values = {"decided_at": decided_at, "next_at": next_at}
    tx.execute(update(Schedule).where(Schedule.name == name).values(**values))


def _fire(tx: Tx, row: Mapping[str, Any], moment: datetime, fired: Fired) -> None:
    """Decide one moment, by what the schedule's runs before do."""
    name = row["name"]
    if not _write(tx, name, moment, FiringStatus.WAITING):
        return
    before = [] if row["overlap"] == Overlap.ALLOW else _open_runs(tx, name)
    match row["overlap"]:
        case Overlap.CANCEL_PREVIOUS:
            for run_id in before:
                engine.cancel_run(tx, run_id, f"schedule:{name}")
            fired.cancelled += before
        case Overlap.SKIP if before:
            return _end(tx, name, moment, FiringStatus.SKIPPED, "overlap", before[0])
        case Overlap.QUEUE if before or _waiting(tx, name) > 1:
            if _waiting(tx, name) > LONGEST_QUEUE:
                _end(tx, name, moment, FiringStatus.SKIPPED, "queue_full", None)
            return None
    return _start(tx, row, moment, fired)


def _start(tx: Tx, row: Mapping[str, Any], moment: datetime, fired: Fired) -> None:
    """Submit the run of a firing; one that cannot be is recorded with the reason."""
    name = row["name"]
    try:
        with tx.begin_nested():
            plan = _submit(tx, row, moment, by=f"schedule:{name}")
    except OpsCoreError as error:
        log.warning("schedule.not_fired", schedule=name, moment=moment.isoformat(), code=error.code)
        values: dict[str, Any] = {"status": FiringStatus.FAILED, "error": _told(error)}
    else:
        fired.plans.append(plan)
        values = {"status": FiringStatus.STARTED, "run_id": plan.run_id}
    where = (Firing.schedule == name, Firing.moment == moment)
    tx.execute(update(Firing).where(*where).values(**values))


def _told(error: OpsCoreError) -> dict[str, Any]:
    faults = getattr(error, "errors", {})
    said = [f"{place}: {sentences[0]}" for place, sentences in list(faults.items())[:3]]
    return {"code": error.code, "message": " ".join([str(error), *said])}


def _submit(
    tx: Tx,
    row: Mapping[str, Any],
    moment: datetime,
    *,
    by: str,
    request_id: str | None = None,
) -> Plan:
    stored = find_workflow(tx, row["workflow_id"], row["version"])
    template = Template.compile(row["input"], "/input", Faults(), FIRING_NAMES)
    submission = Submission(
        input=template.render(_scope(row["name"], moment)),
        agent_id=row["agent_id"],
        labels=row["labels"],
        priority=row["priority"],
        request_id=request_id,
        by=by,
        schedule=row["name"],
    )
    return engine.submit_run(tx, stored, submission)


def _scope(name: str, moment: datetime) -> dict[str, Any]:
    at = moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return {"firing": {"at": at, "schedule": name}}


def _write(
    tx: Tx,
    name: str,
    moment: datetime,
    status: FiringStatus,
    *,
    by: str = "schedule",
    run_id: UUID | None = None,
) -> bool:
    """Write a firing; False if the moment was decided already."""
    statement = (
        upsert(Firing)
        .values(schedule=name, moment=moment, status=status, by=by, run_id=run_id)
        .on_conflict_do_nothing()
        .returning(Firing.moment)
    )
    return tx.execute(statement).first() is not None


def _end(
    tx: Tx, name: str, moment: datetime, status: FiringStatus, code: str, run_id: UUID | None
) -> None:
    message = "As many firings wait as may." if run_id is None else f"Run {run_id} is not over."
    where = (Firing.schedule == name, Firing.moment == moment)
    error = {"code": code, "message": message}
    tx.execute(update(Firing).where(*where).values(status=status, error=error))


def _open_runs(tx: Tx, name: str) -> list[UUID]:
    is_open = Run.status.not_in([str(status) for status in RUN_ENDED])
    statement = select(Run.id).where(Run.schedule == name, is_open).order_by(Run.created_at)
    return list(tx.execute(statement).scalars())


def _waiting(tx: Tx, name: str) -> int:
    waiting = (Firing.schedule == name, Firing.status == FiringStatus.WAITING)
    return tx.execute(select(func.count()).select_from(Firing).where(*waiting)).scalar_one()


def _start_waiting(tx: Tx, limit: int, fired: Fired) -> None:
    """Start the first firings that waited for a run before them which is over."""
    is_open = Run.status.not_in([str(status) for status in RUN_ENDED])
    before = select(Run.id).where(Run.schedule == Schedule.name, is_open).exists()
    waiting = select(Firing.moment).where(
        Firing.schedule == Schedule.name, Firing.status == FiringStatus.WAITING
    )
    ready = (
        select(*Schedule.__table__.c)
        .where(waiting.exists(), ~before)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    for found in tx.execute(ready).all():
        row = found._asdict()
        first = select(func.min(Firing.moment)).where(
            Firing.schedule == row["name"], Firing.status == FiringStatus.WAITING
        )
        moment = tx.execute(first).scalar()
        if moment is not None and not _open_runs(tx, row["name"]):
            _start(tx, row, moment, fired)
