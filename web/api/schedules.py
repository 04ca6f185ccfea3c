"""Schedules: recurring workflows, when they fire, and what became of each firing."""

from typing import Any

from flask import url_for

from opscore import queries, schedules
from opscore.db import Tx
from opscore.engine import Plan
from web import pages
from web.auth import principal
from web.current import database
from web.openapi import PREFIX, Answers, Blueprint
from web.requests import request_id
from web.schemas import (
    Event,
    Firing,
    Preview,
    PreviewArguments,
    Run,
    Schedule,
    ScheduleArguments,
    ScheduleChange,
    ScheduleWithWarnings,
)
from web.starting import start

blueprint = Blueprint(
    "schedules", __name__, url_prefix=f"{PREFIX}/schedules", description="Recurring workflows."
)
CREATE = {"name": "nightly", "workflowId": "report", "cron": "30 2 * * *", "timezone": "Asia/Tokyo"}
CHANGE = {"overlap": "queue"}
CREATED = Answers(
    schema=ScheduleWithWarnings, status=201, has_location=True, about="It fires from now on."
)
CHANGED = Answers(schema=ScheduleWithWarnings)
IS_ARCHIVED = {409: "The workflow is archived; the schedule can be paused, resumed and deleted."}
DELETED = Answers(schema=None, status=204, about="It fires no more; its runs stay.")
FIRED = Answers(schema=Run, status=202, has_location=True, about="The run will be executed.")
SCHEDULES = pages.page_arguments(pages.moment, pages.name)
FIRINGS = pages.page_arguments(pages.moment)
EVENTS = pages.page_arguments(pages.seq)
EVENT_PAGE = Answers(schema=pages.page_of(Event, "ScheduleEventPage"))


@blueprint.operation(
    "POST", "", CREATED, body=ScheduleArguments, example=CREATE, problems=[404, 409]
)
def create(wanted: dict[str, Any]) -> Any:
    """Create a schedule; `warnings` say what in it looks as if something else was meant."""
    with database().transaction() as tx:
        warnings = schedules.create(tx, wanted, by=principal())
        schedule = queries.get_schedule(tx, wanted["name"])
    return {**schedule, "warnings": warnings}, 201, {"Location": _where(wanted["name"])}


@blueprint.operation("GET", "", Answers(schema=pages.page_of(Schedule)), query=SCHEDULES)
def get_many(wanted: dict[str, Any]) -> Any:
    """List schedules."""
    after, limit = wanted.pop("cursor", None), wanted.pop("limit")
    with database().autocommit() as tx:
        return pages.answer(queries.list_schedules(tx, after=after, limit=limit))


@blueprint.operation("GET", "/<name>", Answers(schema=Schedule))
def get_one(name: str) -> Any:
    """Get a schedule."""
    with database().autocommit() as tx:
        return queries.get_schedule(tx, name)


@blueprint.operation(
    "PATCH", "/<name>", CHANGED, body=ScheduleChange, example=CHANGE, problems=IS_ARCHIVED
)
def change(wanted: dict[str, Any], name: str) -> Any:
    """Change a schedule. Other times count from now."""
    with database().transaction() as tx:
        warnings = schedules.change(tx, name, wanted, by=principal())
        return {**queries.get_schedule(tx, name), "warnings": warnings}


@blueprint.operation("DELETE", "/<name>", DELETED)
def delete(name: str) -> Any:
    """Delete a schedule and its firings; its events stay."""
    with database().transaction() as tx:
        schedules.remove(tx, name, by=principal())


@blueprint.operation("POST", "/<name>/pause", CHANGED)
def pause(name: str) -> Any:
    """Let a schedule not fire until it is resumed; what is missed meanwhile is not caught up."""
    return _switch(name, False)


@blueprint.operation("POST", "/<name>/resume", CHANGED)
def resume(name: str) -> Any:
    """Let a schedule fire again, from now on."""
    return _switch(name, True)


def _switch(name: str, enabled: bool) -> Any:
    with database().transaction() as tx:
        warnings = schedules.change(tx, name, {"enabled": enabled}, by=principal())
        return {**queries.get_schedule(tx, name), "warnings": warnings}


@blueprint.operation("POST", "/<name>/trigger", FIRED, starts=True)
def trigger(key: str | None, name: str) -> Any:
    """Have a schedule fire now, whatever its times and its `overlap` say."""
    by, request = principal(), request_id()

    def submitted(tx: Tx) -> Plan:
        return schedules.trigger(tx, name, by=by, request_id=request)

    started = start(key, submitted)
    with database().autocommit() as tx:
        run = queries.get_run(tx, started.run_id)
    return run, 202, started.headers(url_for("runs.get_one", run_id=started.run_id))


@blueprint.operation("GET", "/<name>/preview", Answers(schema=Preview), query=PreviewArguments)
def preview(wanted: dict[str, Any], name: str) -> Any:
    """List the next moments at which a schedule fires, its jitter not counted.

    One that is over stands there as long as it is yet to fire by its jitter.
    """
    with database().transaction() as tx:
        return {"items": schedules.preview(tx, name, wanted["count"])}


@blueprint.operation("GET", "/<name>/firings", Answers(schema=pages.page_of(Firing)), query=FIRINGS)
def get_firings(wanted: dict[str, Any], name: str) -> Any:
    """List what became of a schedule's moments, newest first."""
    after, limit = wanted.pop("cursor", None), wanted.pop("limit")
    with database().autocommit() as tx:
        return pages.answer(queries.list_firings(tx, name, after=after, limit=limit))


@blueprint.operation("GET", "/<name>/events", EVENT_PAGE, query=EVENTS)
def get_events(wanted: dict[str, Any], name: str) -> Any:
    """List what happened to a schedule, newest first, also to one that was deleted."""
    after, limit = wanted.pop("cursor", None), wanted.pop("limit")
    with database().autocommit() as tx:
        return pages.answer(queries.list_schedule_events(tx, name, after=after, limit=limit))


def _where(name: str) -> str:
    return url_for(".get_one", name=name)
