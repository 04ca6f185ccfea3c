"""Runs: submit them, follow them, and what operators do with them."""

from functools import partial
from typing import Any
from uuid import UUID

from flask import url_for

from opscore import engine, queries
from opscore.db import Tx
from opscore.engine import Plan, Submission
from opscore.workflows import find_workflow
from web import pages, streams
from web.auth import principal
from web.current import database, dispatcher, parts
from web.openapi import PREFIX, Answers, Blueprint
from web.requests import request_id, waiting
from web.schemas import (
    RUN_FILTERS,
    TASK_FILTERS,
    EventArguments,
    EventHeaders,
    EventPage,
    RetryArguments,
    Run,
    RunArguments,
    RunDetail,
    RunSummary,
    Task,
    WaitArguments,
)
from web.starting import Started, start

blueprint = Blueprint(
    "runs", __name__, url_prefix=f"{PREFIX}/runs", description="Executions of workflows."
)
NO_PLACE_RETRY_SECONDS = 1
RUNS = pages.page_arguments(pages.moment, pages.uuid, **RUN_FILTERS)
TASKS = pages.page_arguments(pages.number, pages.number, **TASK_FILTERS)
SUBMITTED = Answers(schema=Run, status=202, has_location=True, about="The run will be executed.")
CANCELLED = Answers(schema=Run, status=202, about="Nothing of it starts any more.")
PAUSED = Answers(schema=Run, status=202, about="Nothing of it starts until it is resumed.")
GOES_ON = Answers(schema=Run, status=202, about="It goes on.")
RETRY = {"parameters": {"fetch": {"url": "https://example.com/again"}}}
EVENTS = Answers(
    schema=EventPage,
    about="A page of them; or, if the client likes `text/event-stream` better, all of them as they"
    " happen until the run is over, each with its seq as `id` and the JSON of an item as `data`.",
    stream_example="id: 17\nevent: task.started\ndata: {...}\n\n: still here\n\n",
    also={204: (None, "Of a stream: the run is over, and nothing happened after that event.")},
)
EVENT_PROBLEMS = {
    503: "A server that is needed is away, or this process serves as many streams as it may"
    " (`too_many_streams`); `Retry-After` says when to try again."
}
SUBMIT = {"workflowId": "report", "input": {"topic": "queues"}, "labels": {"team": "support"}}


@blueprint.operation(
    "POST", "", SUBMITTED, body=RunArguments, example=SUBMIT, problems=[404], starts=True
)
def submit(key: str | None, wanted: dict[str, Any]) -> Any:
    """Submit a run of a workflow."""
    workflow_id, version = wanted.pop("workflow_id"), wanted.pop("version")
    submission = Submission(request_id=request_id(), by=principal(), **wanted)

    def submitted(tx: Tx) -> Plan:
        return engine.submit_run(tx, find_workflow(tx, workflow_id, version), submission)

    return _started(start(key, submitted, whole=False))


def _started(started: Started) -> Any:
    with database().autocommit() as tx:
        run = queries.get_run(tx, started.run_id)
    return run, 202, started.headers(url_for(".get_one", run_id=started.run_id))


@blueprint.operation("GET", "", Answers(schema=pages.page_of(RunSummary)), query=RUNS)
def get_many(wanted: dict[str, Any]) -> Any:
    """List runs."""
    after, limit = wanted.pop("cursor", None), wanted.pop("limit")
    with database().autocommit() as tx:
        runs = queries.RunFilter(labels=wanted.pop("label"), **wanted)
        return pages.answer(queries.list_runs(tx, runs, after=after, limit=limit))


@blueprint.operation("GET", "/<run:run_id>", Answers(schema=RunDetail), query=WaitArguments)
def get_one(wanted: dict[str, Any], run_id: UUID) -> Any:
    """Get a run with its tasks, if wanted as soon as it is over."""
    seconds, waited = wanted["wait_seconds"], True
    if seconds > 0:
        with waiting():
            waited = parts().polls.wait_for_run(database(), run_id, seconds)
    with database().autocommit() as tx:
        run = queries.get_run_detail(tx, run_id)
    return run, {} if waited else {"Retry-After": str(NO_PLACE_RETRY_SECONDS)}


@blueprint.operation("GET", "/<run:run_id>/tasks", Answers(schema=pages.page_of(Task)), query=TASKS)
def get_tasks(wanted: dict[str, Any], run_id: UUID) -> Any:
    """List a run's tasks and items, in the order of the definition."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_tasks(tx, run_id, after=after, **wanted))


@blueprint.operation(
    "GET",
    "/<run:run_id>/events",
    EVENTS,
    query=EventArguments,
    headers=EventHeaders,
    problems=EVENT_PROBLEMS,
)
def get_events(wanted: dict[str, Any], headers: dict[str, Any], run_id: UUID) -> Any:
    """List what happened in a run, oldest first, or follow it: see `Accept`."""
    after = wanted["after"]
    if streams.is_wanted():
        return streams.answer(parts().streams, run_id, headers.get("last_event_id", after))
    with database().autocommit() as tx:
        events = queries.list_events(tx, run_id, **wanted)
    page = {"items": events, "next_after": events[-1]["seq"] if events else after}
    return page, {"Vary": "Accept"}


@blueprint.operation("POST", "/<run:run_id>/cancel", CANCELLED, problems=[409])
def cancel(run_id: UUID) -> Any:
    """Cancel a run; asking again while it ends changes nothing."""
    with database().transaction() as tx:
        engine.cancel_run(tx, run_id, principal())
    dispatcher().follow_end(run_id)
    return _as_it_is(run_id)


@blueprint.operation("POST", "/<run:run_id>/pause", PAUSED, problems=[409])
def pause(run_id: UUID) -> Any:
    """Pause a run: what runs goes on and ends, nothing new starts. Pausing twice is once."""
    with database().transaction() as tx:
        engine.pause_run(tx, run_id, principal())
    return _as_it_is(run_id)


@blueprint.operation("POST", "/<run:run_id>/resume", GOES_ON, problems=[409])
def resume(run_id: UUID) -> Any:
    """Let a paused run go on."""
    with database().transaction() as tx:
        plans = engine.resume_run(tx, run_id, principal())
    return _goes_on(run_id, plans)


@blueprint.operation(
    "POST", "/<run:run_id>/retry", GOES_ON, body=RetryArguments, example=RETRY, problems=[409]
)
def retry(wanted: dict[str, Any], run_id: UUID) -> Any:
    """Have what failed of a failed run tried again; what is finished stays as it is."""
    with database().transaction() as tx:
        plans = engine.retry_run(tx, run_id, wanted["parameters"], principal())
    return _goes_on(run_id, plans)


@blueprint.operation("POST", "/<run:run_id>/rerun", SUBMITTED, starts=True)
def rerun(key: str | None, run_id: UUID) -> Any:
    """Submit another run of the same version, with the same input, labels and priority."""
    again = partial(engine.rerun, run_id=run_id, request_id=request_id(), by=principal())
    return _started(start(key, again))


def _goes_on(run_id: UUID, plans: list[Plan]) -> Any:
    for plan in plans:
        dispatcher().publish(plan)
    return _as_it_is(run_id)


def _as_it_is(run_id: UUID) -> Any:
    with database().autocommit() as tx:
        return queries.get_run(tx, run_id), 202
