"""Agents: who can do what, who is at it, and what they say of themselves; and the older way to
start a workflow for one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from flask import url_for

from opscore import agents, logs, memories, presence, queries, reports
from opscore.agentkit.llm import Offer, faults_of
from opscore.config import AGENTS_QUEUE
from opscore.db import Tx
from opscore.definition import id_of, parse
from opscore.engine import Plan, Submission, submit_run
from opscore.errors import InvalidRequest
from opscore.reports import Accepted, Reporter
from opscore.workflows import StoredWorkflow, create_workflow, find_workflow
from web import pages
from web.auth import principal
from web.current import database, dispatcher
from web.errors import Refused, placed
from web.openapi import PREFIX, Answers, Blueprint
from web.requests import request_id
from web.schemas import (
    AGENT_FILTERS,
    MEMORY_FILTERS,
    Agent,
    AgentChange,
    AgentVersion,
    Forgotten,
    LLMDefinition,
    Memory,
    MemoryScope,
    StateOfAgent,
    StateReport,
    StateReported,
    Success,
    TriggerArguments,
    Triggered,
    camel,
)
from web.starting import Started, start

log = logs.get("opscore.web")
blueprint = Blueprint(
    "agents", __name__, url_prefix=PREFIX, description="Providers of capabilities."
)


AGENTS = pages.page_arguments(pages.moment, pages.name, **AGENT_FILTERS)
STATE = "/agent/<agent_id>/state"
REPORTS = pages.page_arguments(pages.moment, pages.seq)
HISTORY = Answers(schema=pages.page_of(StateReported))
MEMORIES = pages.page_arguments(pages.moment, pages.uuid, **MEMORY_FILTERS)
VERSIONS = pages.page_arguments(pages.number)
NO_WORKER = (
    "No worker lives that takes tasks of agents: start one, for it has the tools and models."
)
DEFINITION = {
    "agentId": "clerk",
    "model": "anthropic:claude-sonnet-5",
    "instructions": "You look after orders.",
    "tools": ["find_orders"],
    "limits": {"maxSteps": 12, "maxCostUsd": 0.5},
}
DEFINED = Answers(
    schema=AgentVersion,
    status=201,
    about="A new version was written; attempts that begin from now on are its.",
    has_location=True,
    also={200: (AgentVersion, "The newest version is this already.")},
)
FORGOTTEN = Answers(schema=None, status=204, about="It is gone, also from what the agent finds.")
REPORTED = Answers(
    schema=Success,
    status=202,
    about="It is in the agent's history, and its state if it is the newest.",
    example={"status": "success", "message": "State update accepted"},
)
REPORT = {"state": "idle", "timestamp": "2026-01-31T12:00:00Z", "details": {"queue": 0}}
REPORT_PROBLEMS = {
    400: "The body cannot be read, or its agentId is not that of the path.",
    409: "`details` tell of a task's end, and are refused as its result would be; nothing of the"
    " report is kept.",
}
STARTED = Answers(
    schema=Triggered, status=202, has_location=True, about="The run will be executed."
)
TRIGGER = {"workflowDefinitionId": "report", "initialPayload": {"topic": "queues"}}


@blueprint.operation("GET", "/agents", Answers(schema=pages.page_of(Agent)), query=AGENTS)
def get_many(wanted: dict[str, Any]) -> Any:
    """List agents."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_agents(tx, after=after, **wanted))


@blueprint.operation("POST", "/agents", DEFINED, body=LLMDefinition, example=DEFINITION)
def define(wanted: dict[str, Any]) -> Any:
    """Define an LLM agent, or its next version; some worker that lives must have all it needs."""
    with database().transaction() as tx:
        _check_definition(presence.offers(tx, AGENTS_QUEUE), wanted)
        version, is_new = agents.define(tx, wanted, principal())
        page = queries.list_agent_versions(tx, wanted["agent_id"], after=(version + 1,), limit=1)
    where = url_for(".get_versions", agent_id=wanted["agent_id"])
    return page.items[0], 201 if is_new else 200, {"Location": where}


def _check_definition(offers: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Refuse an agent that no worker can run, with what the one that comes nearest lacks."""
    if not offers:
        raise InvalidRequest({"": [NO_WORKER]})
    faults = min((faults_of(wanted, Offer(**offer)) for offer in offers), key=len)
    errors: dict[str, list[str]] = {}
    for place, sentence in faults:
        first, *rest = place.split("/")
        names = map(camel, rest) if first == "limits" else rest
        errors.setdefault("/".join(["", camel(first), *names]), []).append(f"It {sentence}.")
    if errors:
        raise InvalidRequest(errors)


@blueprint.operation(
    "GET",
    "/agents/<agent_id>/versions",
    Answers(schema=pages.page_of(AgentVersion)),
    query=VERSIONS,
)
def get_versions(wanted: dict[str, Any], agent_id: str) -> Any:
    """List the versions of an LLM agent that was defined here, newest first."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_agent_versions(tx, agent_id, after=after, **wanted))


@blueprint.operation("GET", "/agents/<agent_id>", Answers(schema=Agent))
def get_one(agent_id: str) -> Any:
    """Get an agent, what it does now, and who waits for it."""
    with database().autocommit() as tx:
        return queries.get_agent(tx, agent_id)


@blueprint.operation(
    "PATCH", "/agents/<agent_id>", Answers(schema=Agent), body=AgentChange, example={"capacity": 4}
)
def change(wanted: dict[str, Any], agent_id: str) -> Any:
    """Change how much an agent gets, and how it must report; what is left out stays."""
    with database().transaction() as tx:
        agents.change(tx, agent_id, wanted)
    dispatcher().wake_line(agent_id)
    with database().autocommit() as tx:
        return queries.get_agent(tx, agent_id)


@blueprint.operation("GET", STATE, Answers(schema=StateOfAgent))
def get_state(agent_id: str) -> Any:
    """Get an agent's state."""
    with database().autocommit() as tx:
        return queries.get_state(tx, agent_id)


@blueprint.operation(
    "POST", STATE, REPORTED, body=StateReport, example=REPORT, problems=REPORT_PROBLEMS
)
def report_state(wanted: dict[str, Any], agent_id: str) -> Any:
    """Report an agent's state; with a task's result in `details` it ends that attempt as well."""
    _check_same(wanted["agent_id"], agent_id)
    said = (wanted["state"], wanted["details"], wanted["timestamp"])
    with database().transaction() as tx:
        agents.report_state(tx, agent_id, *said)
        accepted = _accept_result(tx, agent_id, wanted["result"])
    if accepted is not None:
        reports.follow(dispatcher(), accepted)
    dispatcher().wake_line(agent_id)
    return {"status": "success", "message": "State update accepted"}


@blueprint.operation("GET", "/agents/<agent_id>/state/history", HISTORY, query=REPORTS)
def get_history(wanted: dict[str, Any], agent_id: str) -> Any:
    """List what an agent reported, newest first by its own clock."""
    after = wanted.pop("cursor", None)
    with database().autocommit() as tx:
        return pages.answer(queries.list_reports(tx, agent_id, after=after, **wanted))


@blueprint.operation(
    "GET", "/agents/<agent_id>/memories", Answers(schema=pages.page_of(Memory)), query=MEMORIES
)
def get_memories(wanted: dict[str, Any], agent_id: str) -> Any:
    """List what an LLM agent remembers, newest first; or what it would find."""
    after, query = wanted.pop("cursor", None), wanted.pop("query", None)
    if query is not None and after is not None:
        raise InvalidRequest({"/cursor": ["What is found is on one page; leave out one of both."]})
    with database().autocommit() as tx:
        if query is None:
            return pages.answer(queries.list_memories(tx, agent_id, after=after, **wanted))
        return pages.answer(queries.find_memories(tx, agent_id, query, **wanted))


@blueprint.operation("DELETE", "/agents/<agent_id>/memories/<memory:memory_id>", FORGOTTEN)
def forget_memory(agent_id: str, memory_id: UUID) -> Any:
    """Have an agent forget a memory."""
    with database().transaction() as tx:
        memories.forget_one(tx, agent_id, memory_id)
    log.info("memories.forgotten", agent_id=agent_id, count=1, by=principal())


@blueprint.operation(
    "DELETE", "/agents/<agent_id>/memories", Answers(schema=Forgotten), query=MemoryScope
)
def forget_memories(wanted: dict[str, Any], agent_id: str) -> Any:
    """Have an agent forget all it remembers, or all of a namespace."""
    with database().transaction() as tx:
        count = memories.forget(tx, agent_id, wanted.get("namespace"))
        if not count:
            queries.check_known(tx, agent_id)
    log.info("memories.forgotten", agent_id=agent_id, count=count, by=principal())
    return {"forgotten": count}


def _check_same(named: str | None, agent_id: str) -> None:
    if named not in (None, agent_id):
        raise Refused(400, "The agentId of the body is not that of the path.")


def _accept_result(tx: Tx, agent_id: str, told: dict[str, Any] | None) -> Accepted | None:
    """End the attempt that a report tells the end of; if that is refused, so is the report."""
    if told is None:
        return None
    reporter = Reporter(told["task_id"], agent_id, told["token"])
    return reports.accept_result(tx, reporter, told["outcome"])


@blueprint.operation(
    "POST",
    "/agent/<agent_id>/workflow",
    STARTED,
    body=TriggerArguments,
    example=TRIGGER,
    starts=True,
)
def trigger(key: str | None, wanted: dict[str, Any], agent_id: str) -> Any:
    """Start a run for an agent: tasks that name nobody run on it, elsewhere it is preferred."""
    workflow_id, store = _triggered_workflow(wanted)

    def submitted(tx: Tx) -> Plan:
        submission = Submission(
            input=wanted["initial_payload"] or {},
            agent_id=agent_id,
            request_id=request_id(),
            by=principal(),
        )
        with placed("/input", "/initialPayload"):
            return submit_run(tx, store(tx), submission)

    return _triggered(start(key, submitted), workflow_id)


def _triggered_workflow(wanted: dict[str, Any]) -> tuple[str, Callable[[Tx], StoredWorkflow]]:
    """Return the id of the workflow, and what finds it, or stores the one that came along.

    Raises:
        InvalidDefinition: with the faults' places in the whole body.
    """
    document = wanted["workflow_definition"]
    if document is None:
        workflow_id = wanted["workflow_definition_id"]
        return workflow_id, lambda tx: find_workflow(tx, workflow_id)
    with placed("", "/workflowDefinition"):
        definition = parse(document)
        workflow_id = id_of(definition)
    return workflow_id, lambda tx: create_workflow(tx, definition, inline=True)[0]


def _triggered(started: Started, workflow_id: str) -> Any:
    run_id = started.run_id
    body = {
        "session_id": run_id,
        "run_id": run_id,
        "workflow_id": workflow_id,
        "message": "Workflow triggered successfully",
    }
    return body, 202, started.headers(url_for("runs.get_one", run_id=run_id))
