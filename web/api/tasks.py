"""Tasks: submit one by itself, list those of all runs, see what became of one, attempt by attempt;
and what agents behind HTTP report of theirs.
"""

from typing import Any
from uuid import UUID

from flask import url_for

from opscore import queries, reports
from opscore.db import Tx
from opscore.definition import Definition, parse
from opscore.engine import Plan, Submission, decide_approval, submit_run
from opscore.reports import Reporter
from opscore.workflows import create_workflow
from web import pages
from web.auth import principal
from web.current import database, dispatcher
from web.errors import placed
from web.openapi import PREFIX, Answers, Blueprint
from web.requests import request_id
from web.schemas import (
    ALL_TASKS_FILTERS,
    Accepted,
    Attempt,
    Comment,
    Heartbeat,
    JobArguments,
    Proof,
    Task,
    TaskDetail,
    TaskResult,
)
from web.starting import start

blueprint = Blueprint(
    "tasks", __name__, url_prefix=f"{PREFIX}/tasks", description="Units of work of a run."
)
DECIDED = Answers(schema=TaskDetail, status=202, about="The run goes on with it.")
NOT_ASKED = {409: "It is no approval, is not asked for yet, or is over."}
COMMENT = {"comment": "Looks good."}
WORKFLOW_ID = "agent-run"
"""Of tasks without a workflow; equal ones share a version."""
SUBMITTED = Answers(schema=Task, status=202, has_location=True, about="The task will be done.")
SUBMIT = {"taskType": "agent_run", "agentId": "writer", "inputData": {"topic": "queues"}}
TASKS = pages.page_arguments(pages.uuid, **ALL_TASKS_FILTERS)
NO_AGENT = {404: "There is no such agent, or it has deregistered."}
ATTEMPT = "/<task:task_id>/attempts/<int(max=2147483647):number>"
TOKEN = "0b4b5b4e-9a0c-4d27-9c53-1f0f3f6f6c11"
RESULT = {"opscore_attempt_token": TOKEN, "status": "completed", "result": {"words": 120}}
NOT_YOURS = {
    409: "The attempt is over, or another agent's, or the token is missing; or another result of"
    " it was accepted."
}


@blueprint.operation(
    "POST", "", SUBMITTED, body=JobArguments, example=SUBMIT, problems=NO_AGENT, starts=True
)
def submit(key: str | None, wanted: dict[str, Any]) -> Any:
    """Submit a task for an agent, without a workflow: it is a run of this task alone."""
    definition = _definition(wanted)
    submission = Submission(
        input=wanted["input_data"],
        agent_id=wanted["agent_id"],
        labels=wanted["labels"],
        priority=wanted["priority"],
        budget=wanted["budget"],
        request_id=request_id(),
        by=principal(),
    )

    def submitted(tx: Tx) -> Plan:
        stored, _ = create_workflow(tx, definition, inline=True)
        with placed("/input", "/inputData"):
            return submit_run(tx, stored, submission)

    started = start(key, submitted)
    with database().autocommit() as tx:
        (task,) = queries.list_tasks(tx, started.run_id, after=None, limit=1).items
    return task, 202, started.headers(url_for(".get_one", task_id=task["task_id"]))


def _definition(wanted: dict[str, Any]) -> Definition:
    """Return the workflow of such a task. It names no agent: the run is submitted for one."""
    task = {"taskId": wanted["task_type"], "parameters": "${input}"}
    task["timeoutSeconds"] = wanted["timeout_seconds"]
    if wanted["agent_capability"] is not None:
        task["agentCapability"] = wanted["agent_capability"]
    return parse({"id": WORKFLOW_ID, "tasks": [task]})


@blueprint.operation("GET", "", Answers(schema=pages.page_of(Task)), query=TASKS)
def get_many(wanted: dict[str, Any]) -> Any:
    """List tasks of all runs, such as all that wait for an approval. Those that are over are listed
    of one run only.
    """
    after, limit = wanted.pop("cursor", None), wanted.pop("limit")
    with database().autocommit() as tx:
        tasks = queries.TaskFilter(**wanted)
        return pages.answer(queries.find_tasks(tx, tasks, after=after, limit=limit))


@blueprint.operation("GET", "/<task:task_id>", Answers(schema=TaskDetail))
def get_one(task_id: UUID) -> Any:
    """Get a task with its attempts and what the newest one logged."""
    with database().autocommit() as tx:
        return queries.get_task(tx, task_id)


@blueprint.operation("GET", ATTEMPT, Answers(schema=Attempt))
def get_attempt(task_id: UUID, number: int) -> Any:
    """Get one attempt at a task: its log, its progress, its error with traceback."""
    with database().autocommit() as tx:
        return queries.get_attempt(tx, task_id, number)


@blueprint.operation(
    "POST",
    "/<task:task_id>/approve",
    DECIDED,
    body=Comment,
    example=COMMENT,
    problems=NOT_ASKED,
)
def approve(wanted: dict[str, Any], task_id: UUID) -> Any:
    """Say yes: an approval completes; an LLM agent makes the call it waits with."""
    return _decide(task_id, True, **wanted)


@blueprint.operation(
    "POST", "/<task:task_id>/reject", DECIDED, body=Comment, example=COMMENT, problems=NOT_ASKED
)
def reject(wanted: dict[str, Any], task_id: UUID) -> Any:
    """Say no: an approval fails as `rejected`, and its `onFailure` decides; an LLM agent is told
    that the call was refused, and goes on.
    """
    return _decide(task_id, False, **wanted)


def _decide(task_id: UUID, approved: bool, comment: str | None, call: int | None) -> Any:
    said: dict[str, Any] = {"approved": approved, "comment": comment, "call": call}
    with database().transaction() as tx:
        woken = decide_approval(tx, task_id, by=principal(), **said)
    dispatcher().wake(woken)
    with database().autocommit() as tx:
        return queries.get_task(tx, task_id), 202


@blueprint.operation(
    "POST",
    "/<task:task_id>/result",
    Answers(schema=Accepted, about="It counts; the same result once more is answered alike."),
    body=TaskResult,
    example=RESULT,
    problems=NOT_YOURS,
)
def accept_result(wanted: dict[str, Any], task_id: UUID) -> Any:
    """Hand in the result of the attempt that an agent accepted."""
    reporter = Reporter(task_id, wanted["agent_id"], wanted["token"])
    with database().transaction() as tx:
        accepted = reports.accept_result(tx, reporter, wanted["outcome"])
    if accepted is not None:
        reports.follow(dispatcher(), accepted)
    return {"task_id": task_id, "status": "accepted"}


@blueprint.operation(
    "POST",
    "/<task:task_id>/heartbeat",
    Answers(schema=Heartbeat),
    body=Proof,
    example={"opscore_attempt_token": TOKEN},
    problems={409: "The attempt is over, or another agent's, or the token is missing."},
)
def accept_heartbeat(wanted: dict[str, Any], task_id: UUID) -> Any:
    """Say that an agent is still at a task, and learn whether anybody still wants it done."""
    reporter = Reporter(task_id, wanted["agent_id"], wanted["token"])
    with database().transaction() as tx:
        beat = reports.accept_heartbeat(tx, reporter)
    lease = beat.lease_expires_at
    return {"task_id": task_id, "lease_expires_at": lease, "cancelled": beat.is_ending}
