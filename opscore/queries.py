"""Every read: runs, tasks, attempts, events, workflows, agents, and whether workers live.

Nothing here changes a row. A read of many things is a handful of statements whatever their number;
lists are keyset pages, newest first unless said otherwise. Rows come back as mappings whose keys
are the API's names in snake_case. The implicit end of a run is never shown.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, takewhile
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Float,
    Select,
    Text,
    any_,
    bindparam,
    case,
    cast,
    false,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB, aggregate_order_by, distinct_on
from sqlalchemy.orm import aliased

from opscore import memories
from opscore.agentkit.redaction import redacted
from opscore.db import Tx
from opscore.engine.clauses import FOR_CAPABILITY, ORDER, is_open, still
from opscore.errors import (
    AgentNotFound,
    InvalidRequest,
    RunNotFound,
    ScheduleNotFound,
    TaskNotFound,
)
from opscore.models import (
    IN_LINE,
    RUN_STATUS,
    Agent,
    AgentDefinition,
    AgentMemory,
    AgentReport,
    AgentStep,
    ArchivedWorkflow,
    Attempt,
    AttemptLog,
    Event,
    Firing,
    Lease,
    Run,
    Schedule,
    Slot,
    Task,
    Workflow,
    listed,
)
from opscore.states import RUN_ENDED, Reason, RunStatus, TaskStatus
from opscore.workflows import no_workflow

ITEMS_SHOWN = 200
"""Item rows in the detail of a run; the rest is paged."""
ATTEMPTS_SHOWN = 20
"""Newest attempts shown with each task of a list; the task's own page has them all."""
LOG_LINES_SHOWN = 1000
"""Newest log lines shown with an attempt."""
LINE_SHOWN = 20
"""The first of its line that are shown with an agent."""
PLACES_COUNTED = 10_000
"""Whoever stands further back in a line is not told his place: to count costs a look at each."""
RUNS_NAMED = 3
"""Runs named of those that an agent is busy with; of the others only how many."""

Row = Mapping[str, Any]
Statement = Select[*tuple[Any, ...]]
Key = tuple[Any, ...]
"""The sort key of the last row of a page: where the next one begins."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a list, and where the rest begins (None: this is the end)."""

    items: Sequence[Row]
    next: Key | None


def _rows(tx: Tx, statement: Statement) -> list[Row]:
    return [row._asdict() for row in tx.execute(statement)]


def _row(tx: Tx, statement: Statement) -> Row | None:
    row = tx.execute(statement).one_or_none()
    return None if row is None else row._asdict()


def _page(tx: Tx, statement: Statement, limit: int, *key: str) -> Page:
    """Read one row more than asked for: its presence says that the list goes on."""
    rows = _rows(tx, statement.limit(limit + 1))
    items = rows[:limit]
    more = len(rows) > limit
    return Page(items, tuple(items[-1][name] for name in key) if more else None)


# --- Runs ---------------------------------------------------------------------------------------

_SUMMARY = (
    Run.id.label("run_id"),
    Run.workflow_id,
    Run.version,
    Run.agent_id,
    Run.status,
    Run.reason,
    Run.error,
    Run.labels,
    Run.priority,
    Run.request_id,
    Run.cancel_requested_at,
    Run.parent_task_id,
    Run.rerun_of,
    Run.schedule,
    Run.start_at,
    Run.deadline_at,
    Run.created_at,
    Run.started_at,
    Run.finished_at,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs to list; what is left out does not matter."""

    workflow_id: str | None = None
    status: Sequence[str] = ()
    labels: Sequence[tuple[str, str]] = ()
    """Those of all of these; two values of one label has no run."""
    created_after: datetime | None = None
    created_before: datetime | None = None

    def conditions(self) -> Iterable[ColumnElement[bool]]:
        """Return what runs must meet, but for their status."""
        if self.workflow_id is not None:
            yield Run.workflow_id == self.workflow_id
        for name, value in self.labels:
            yield Run.labels.contains({name: value})
        if self.created_after is not None:
            yield Run.created_at > self.created_after
        if self.created_before is not None:
            yield Run.created_at < self.created_before


def list_runs(tx: Tx, wanted: RunFilter, *, after: Key | None, limit: int) -> Page:
    """Return a page of runs, without their inputs and outputs."""
    statement = select(*_SUMMARY).where(*wanted.conditions())
    if after is not None:
        statement = statement.where(tuple_(Run.created_at, Run.id) < after)
    statement = statement.order_by(Run.created_at.desc(), Run.id.desc())
    if wanted.status or wanted.workflow_id is not None:
        of_one = wanted.workflow_id is not None
        statement = _by_status(statement, wanted.status or list(RunStatus), limit, of_one)
    return _page(tx, statement, limit, "created_at", "run_id")


def _by_status(
    statement: Statement, among: Sequence[str], limit: int, of_one_workflow: bool
) -> Statement:
    """Find the runs of each status by itself: an index gives those in order, however many others.

    One that gives them in order whatever their status would have to be read past all others.
    """
    statuses = func.unnest(cast(sorted(set(among)), ARRAY(Text)))
    each = statuses.table_valued("status").render_derived()
    status = Run.status if of_one_workflow else literal_column(f"({RUN_STATUS})")
    found = statement.where(status == each.c.status).limit(limit + 1).lateral("found")
    together = select(found).select_from(each).join(found, true())
    return together.order_by(found.c.created_at.desc(), found.c.run_id.desc())


def get_run(tx: Tx, run_id: UUID) -> dict[str, Any]:
    """Return the run itself, without its tasks.

    Raises:
        RunNotFound
    """
    statement = select(*_SUMMARY, Run.budget, Run.input, Run.output).where(Run.id == run_id)
    row = _row(tx, statement)
    if row is None:
        raise RunNotFound(run_id=run_id)
    used = select(*_USED).where(AgentStep.run_id == run_id, _IS_REPLY)
    return {**row, "usage": next((one for one in _rows(tx, used) if one["replies"]), None)}


_IS_REPLY = literal_column("kind = 'reply'", Boolean)
"""As the index of them has it."""
_USED = (
    func.count().label("replies"),
    cast(func.sum(AgentStep.input_tokens), BigInteger).label("input_tokens"),
    cast(func.sum(AgentStep.output_tokens), BigInteger).label("output_tokens"),
    func.sum(AgentStep.cost_usd).label("cost_usd"),
)


def get_run_detail(tx: Tx, run_id: UUID) -> dict[str, Any]:
    """Return the run with `tasks`: one row for every task of the definition, in its order, then at
    most `ITEMS_SHOWN` items of its `forEach` tasks, failures first, waits second.

    Raises:
        RunNotFound
    """
    return {**get_run(tx, run_id), "tasks": _with_parts(tx, _detail_rows(tx, run_id))}


def is_run_over(tx: Tx, run_id: UUID) -> bool:
    """Tell whether the run has ended.

    Raises:
        RunNotFound
    """
    status = tx.execute(select(Run.status).where(Run.id == run_id)).scalar_one_or_none()
    if status is None:
        raise RunNotFound(run_id=run_id)
    return status in RUN_ENDED


# --- Tasks --------------------------------------------------------------------------------------

_dependency = aliased(Task)
_open_dependencies = (
    select(func.array_agg(aggregate_order_by(_dependency.definition_id, _dependency.position)))
    .where(_dependency.id == any_(Task.depends_on), _dependency.finished_at.is_(None))
    .correlate(Task)
    .scalar_subquery()
)
_place = func.coalesce(Task.index, -1)
"""An item's index; -1 puts the definition's own row before its items."""
_TASK = (
    Task.id.label("task_id"),
    Task.run_id,
    Task.definition_id.label("task_definition_id"),
    Task.kind,
    func.coalesce(Task.item_kind, Task.kind).label("type"),
    Task.child_run_id,
    Task.index,
    Task.position,
    _place.label("place"),
    Task.items.label("item_count"),
    func.coalesce(Task.agent_id, Task.wanted_agent_id).label("agent_id"),
    Task.wanted_agent_id,
    Task.wanted_capability.label("agent_capability"),
    Task.status,
    Task.reason,
    Task.decision,
    case((Task.status == TaskStatus.WAITING, Task.wake_at)).label("wake_at"),
    Task.fallback,
    Task.line_agent_id,
    Task.lease_expires_at,
    Task.output,
    Task.error,
    Task.attempt,
    Task.tries,
    Task.max_attempts,
    Task.max_parallel,
    Task.created_at,
    Task.started_at,
    Task.finished_at,
    case((Task.status.in_([TaskStatus.PENDING, TaskStatus.WAITING]), _open_dependencies)).label(
        "open_dependencies"
    ),
)
_URGENCY = case(
    {
        TaskStatus.FAILED: 0,
        TaskStatus.WAITING: 1,
        TaskStatus.RUNNING: 2,
        TaskStatus.PENDING: 3,
        TaskStatus.CANCELLED: 4,
    },
    value=Task.status,
    else_=5,
)
"""What a reader looks for first."""


def list_tasks(
    tx: Tx,
    run_id: UUID,
    *,
    status: Sequence[str] = (),
    task_definition_id: str | None = None,
    after: Key | None,
    limit: int,
) -> Page:
    """Return a page of a run's tasks and items, in the order of the definition.

    Raises:
        RunNotFound
    """
    is_run_over(tx, run_id)
    statement = select(*_TASK).where(Task.run_id == run_id, Task.kind != "end")
    if status:
        statement = statement.where(Task.status.in_(status))
    if task_definition_id is not None:
        statement = statement.where(Task.definition_id == task_definition_id)
    if after is not None:
        statement = statement.where(tuple_(Task.position, _place) > after)
    page = _page(tx, statement.order_by(Task.position, _place), limit, "position", "place")
    return Page(_with_parts(tx, page.items), page.next)


_HELD = f"status = 'waiting' AND reason NOT IN {IN_LINE}"
_STANDING = f"status = 'waiting' AND reason IN {IN_LINE}"
_OPEN_TASKS: Mapping[str, Sequence[str]] = {
    TaskStatus.PENDING: ("status = 'pending'",),
    TaskStatus.WAITING: (_HELD, _STANDING),
    TaskStatus.RUNNING: ("status = 'running' AND lease_expires_at IS NOT NULL",),
}
"""Status of tasks that are not over -> their parts, each as a partial index has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Which tasks to list; what is left out does not matter."""

    status: Sequence[str] = ()
    reason: Sequence[str] = ()
    """Those that wait for one of these."""
    agent_id: str | None = None
    """Of the newest attempt, else the one asked for."""
    run_id: UUID | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.status or self.reason) and self.agent_id is None and self.run_id is None

    def places(self) -> Sequence[str]:
        """Return the conditions under which indexes find all that are meant, and few others.

        Raises:
            InvalidRequest: there are none: it would be a look at every task there ever was.
        """
        if self.run_id is not None:
            return ("run_id = :run_id",)
        statuses = set(self.status or (_OPEN_TASKS if self.reason else ()))
        if not statuses:
            raise InvalidRequest({"/agentId": [_NOT_OF_ALL]})
        if ended := sorted(statuses - _OPEN_TASKS.keys()):
            raise InvalidRequest({"/status": [_OVER_BY_RUN.format(", ".join(ended))]})
        if self.reason:
            statuses &= {TaskStatus.WAITING}
        return [part for status in sorted(statuses) for part in _OPEN_TASKS[status]]

    def conditions(self) -> Iterable[ColumnElement[bool]]:
        """Return what tasks must meet."""
        yield Task.kind != "end"
        if self.status:
            yield Task.status.in_(self.status)
        if self.reason:
            yield Task.status == TaskStatus.WAITING
            yield Task.reason.in_(self.reason)
        if self.agent_id is not None:
            yield func.coalesce(Task.agent_id, Task.wanted_agent_id) == self.agent_id


_NOT_OF_ALL = (
    f"Not of all tasks there ever were: give a status among {', '.join(_OPEN_TASKS)}, a reason, or"
    " a runId with it."
)
_OVER_BY_RUN = (
    "Tasks that are over ({}) are listed of one run only: give a runId with it. GET"
    " /v1/opscore/runs?status=failed lists the runs that failed."
)


def find_tasks(tx: Tx, wanted: TaskFilter, *, after: Key | None, limit: int) -> Page:
    """Return a page of tasks and items of all runs, by when their rows were written.

    Raises:
        InvalidRequest: the filter would have it look at every task there ever was.
    """
    conditions = list(wanted.conditions())
    if after is not None:
        conditions.append(tuple_(Task.id) < after)
    # Ids rise with time.
    chosen = _chosen_tasks(wanted, conditions).limit(limit + 1)
    statement = select(*_TASK).where(Task.id.in_(chosen)).order_by(Task.id.desc())
    page = _page(tx, statement.params(run_id=wanted.run_id), limit, "task_id")
    return Page(_with_parts(tx, page.items), page.next)


def _chosen_tasks(wanted: TaskFilter, conditions: Sequence[ColumnElement[bool]]) -> Select[UUID]:
    if wanted.is_empty:
        return select(Task.id).where(*conditions).order_by(Task.id.desc())
    # OFFSET: put in order when they are found, or all others may be read in that order on the way.
    parts = [
        select(Task.id).where(text(place), *conditions).offset(literal_column("0"))
        for place in wanted.places()
    ]
    found = union_all(*parts or [select(Task.id).where(false())]).subquery()
    return select(found.c.id).order_by(found.c.id.desc())


def get_task(tx: Tx, task_id: UUID) -> dict[str, Any]:
    """Return the task with all its attempts, oldest first, and `logs` of the newest.

    Raises:
        TaskNotFound
    """
    statement = select(*_TASK).where(Task.id == task_id, Task.kind != "end")
    row = _row(tx, statement)
    if row is None:
        raise TaskNotFound(task_id=task_id)
    (task,) = _with_parts(tx, [row], attempts_shown=None)
    newest = max((attempt["number"] for attempt in task["attempts"]), default=0)
    return {**task, "logs": _logs(tx, task_id, newest)}


def check_task(tx: Tx, task_id: UUID) -> None:
    """Make sure that there is such a task.

    Raises:
        TaskNotFound
    """
    if tx.execute(select(true()).where(Task.id == task_id, Task.kind != "end")).first() is None:
        raise TaskNotFound(task_id=task_id)


def get_attempt(tx: Tx, task_id: UUID, number: int) -> dict[str, Any]:
    """Return one attempt with its `logs` and, in its error, the traceback.

    Raises:
        TaskNotFound: there is no such task, or no such attempt at it.
    """
    statement = select(*_ATTEMPT, Attempt.error).where(
        Attempt.task_id == task_id, Attempt.number == number
    )
    row = _row(tx, statement)
    if row is None:
        raise TaskNotFound(f"There is no attempt {number} at task {task_id}.")
    return {**row, "logs": _logs(tx, task_id, number)}


def _detail_rows(tx: Tx, run_id: UUID) -> Sequence[Row]:
    is_item = Task.parent_id.is_not(None)
    order = (Task.position, Task.index)
    items = select(Task.id).where(Task.run_id == run_id, is_item).order_by(_URGENCY, *order)
    statement = (
        select(*_TASK)
        .where(
            Task.run_id == run_id,
            Task.kind != "end",
            or_(Task.parent_id.is_(None), Task.id.in_(items.limit(ITEMS_SHOWN))),
        )
        .order_by(is_item, case((is_item, _URGENCY)), *order)
    )
    return _rows(tx, statement)


_ATTEMPT = (
    Attempt.task_id,
    Attempt.number,
    Attempt.agent_id,
    Attempt.worker,
    Attempt.status,
    Attempt.progress,
    Attempt.progress_message,
    Attempt.started_at,
    Attempt.finished_at,
)


def _with_parts(
    tx: Tx, rows: Sequence[Row], *, attempts_shown: int | None = ATTEMPTS_SHOWN
) -> list[dict[str, Any]]:
    """Add `attempts`, `items`, `queue`, `waiting_for`, `usage` and `call` to rows of tasks, in a
    statement each.
    """
    attempts = _attempts(tx, [row["task_id"] for row in rows], attempts_shown)
    items = _item_counts(tx, rows)
    in_line = [row for row in rows if _stands_in_line(row)]
    places = _places(tx, in_line)
    holding = _holding_runs(tx, in_line)
    used = _usage(tx, [row["task_id"] for row in rows if row["kind"] == "agent"])
    calls = _calls_asked_about(tx, [row["task_id"] for row in rows if _asks_about_call(row)])
    tasks = [
        {
            **row,
            "attempts": attempts.get(row["task_id"], []),
            "items": items.get(row["task_id"]),
            "queue": places.get(row["task_id"]),
            "busy_with": holding.get(_line(row)),
            "usage": used.get(row["task_id"]),
            "call": calls.get(row["task_id"]),
        }
        for row in rows
    ]
    return [{**task, "waiting_for": describe_wait(task)} for task in tasks]


def _usage(tx: Tx, tasks: Sequence[UUID]) -> dict[UUID, Row]:
    """Return what the LLM agents of tasks have used."""
    if not tasks:
        return {}
    statement = (
        select(AgentStep.task_id, *_USED)
        .where(_of_tasks(tasks), _IS_REPLY)
        .group_by(AgentStep.task_id)
    )
    return {row["task_id"]: row for row in _rows(tx, statement)}


def _of_tasks(tasks: Sequence[UUID]) -> ColumnElement[bool]:
    ids = bindparam("tasks", list(tasks), type_=Task.depends_on.type)
    return AgentStep.task_id == any_(ids)


def _asks_about_call(task: Row) -> bool:
    asked = (TaskStatus.WAITING, Reason.APPROVAL, "agent")
    return (task["status"], task["reason"], task["kind"]) == asked


def _calls_asked_about(tx: Tx, tasks: Sequence[UUID]) -> dict[UUID, Row]:
    """Return the newest call that each of the tasks asks about."""
    if not tasks:
        return {}
    statement = (
        select(AgentStep.task_id, AgentStep.number, AgentStep.data)
        .where(_of_tasks(tasks), AgentStep.kind == "asked")
        .order_by(AgentStep.task_id, AgentStep.number.desc())
        .ext(distinct_on(AgentStep.task_id))
    )
    return {
        row["task_id"]: {
            **row["data"],
            "number": row["number"],
            # Of steps that are older, what looks like a secret is all that is known.
            "arguments": row["data"].get("shown", redacted(row["data"]["arguments"])),
        }
        for row in _rows(tx, statement)
    }


def _stands_in_line(task: Row) -> bool:
    reasons = (Reason.AGENT_BUSY, Reason.AGENT_UNAVAILABLE)
    return task["status"] == TaskStatus.WAITING and task["reason"] in reasons


def _line(task: Row) -> tuple[str | None, str | None]:
    """Return the agent, or the capability, in whose line a task stands."""
    agent_id = task["line_agent_id"]
    return agent_id, None if agent_id else task["agent_capability"]


def _attempts(tx: Tx, tasks: Sequence[UUID], shown: int | None) -> dict[UUID, list[Row]]:
    """Return the newest attempts at each of the tasks, oldest first, without tracebacks."""
    newest = func.row_number().over(partition_by=Attempt.task_id, order_by=Attempt.number.desc())
    error = Attempt.error.op("-", return_type=JSONB())(literal_column("'traceback'"))
    of_tasks = Attempt.task_id == any_(bindparam("tasks", list(tasks), type_=Task.depends_on.type))
    ranked = select(*_ATTEMPT, error.label("error"), newest.label("newest")).where(of_tasks)
    inner = ranked.subquery()
    statement = select(inner).order_by(inner.c.task_id, inner.c.number)
    if shown is not None:
        statement = statement.where(inner.c.newest <= shown)
    found: dict[UUID, list[Row]] = {}
    for row in _rows(tx, statement):
        found.setdefault(row["task_id"], []).append(row)
    return found


def _item_counts(tx: Tx, rows: Sequence[Row]) -> dict[UUID, dict[str, int]]:
    """Count the items of the `forEach` tasks among the rows, by status."""
    names = [status for status in TaskStatus if status is not TaskStatus.SKIPPED]
    counts = {
        row["task_id"]: {"total": row["item_count"] or 0, **{str(name): 0 for name in names}}
        for row in rows
        if row["kind"] == "for_each"
    }
    if any(count["total"] for count in counts.values()):
        statement = (
            select(Task.parent_id, Task.status, func.count())
            .where(Task.parent_id.in_(counts))
            .group_by(Task.parent_id, Task.status)
        )
        for parent_id, status, number in tx.execute(statement):
            counts[parent_id][status] = number
    return counts


_WAITS_IN_LINE = f"w.status = 'waiting' AND w.reason IN {IN_LINE}"
"""As the indexes of the lines have it. A line is an agent's, or that of all with a capability."""
_PLACES = text(
    f"""
WITH shown AS MATERIALIZED (
    SELECT w.id, coalesce(w.line_agent_id, '') AS agent,
           CASE WHEN w.line_agent_id IS NULL THEN w.wanted_capability ELSE '' END AS capability
    FROM tasks w WHERE w.id = ANY (cast(:tasks AS uuid[]))
      AND {still("waiting", "w")} AND w.reason IN {IN_LINE}
), lines AS MATERIALIZED (
    SELECT DISTINCT agent, capability FROM shown
), ranked AS (
    SELECT first.id, rank() OVER (
        PARTITION BY l.agent, l.capability ORDER BY first.priority DESC, first.waiting_since
    ) AS position
    FROM lines l CROSS JOIN LATERAL (
        (SELECT w.id, w.priority, w.waiting_since FROM tasks w
         WHERE w.line_agent_id = l.agent AND {_WAITS_IN_LINE}
         {ORDER} LIMIT {PLACES_COUNTED})
        UNION ALL
        (SELECT w.id, w.priority, w.waiting_since FROM tasks w
         WHERE w.line_agent_id IS NULL AND w.wanted_capability = l.capability AND {_WAITS_IN_LINE}
         {ORDER} LIMIT {PLACES_COUNTED})) AS first
), places AS MATERIALIZED (
    SELECT * FROM ranked WHERE id = ANY (cast(:tasks AS uuid[]))
), paces AS MATERIALIZED (
    SELECT l.agent, l.capability, count(*) AS slots, avg(s.average_seconds) AS seconds
    FROM lines l JOIN agents a ON a.agent_id = l.agent OR l.capability = ANY (a.capabilities)
    JOIN slots s ON s.pool = a.agent_id AND NOT s.closed
    WHERE {is_open()}
    GROUP BY l.agent, l.capability
)
SELECT task_id, position, now() + make_interval(secs => seconds) AS estimated_start_at, seconds
FROM (SELECT shown.id AS task_id, places.position,
             ceil(places.position / cast(paces.slots AS float)) * paces.seconds AS seconds
      FROM shown LEFT JOIN places USING (id) LEFT JOIN paces USING (agent, capability)) AS told
"""
)


def _places(tx: Tx, in_line: Sequence[Row]) -> dict[UUID, Row]:
    """Return the places of tasks in line, and in how many `seconds` their turn may come."""
    tasks = [row["task_id"] for row in in_line]
    found = tx.execute(_PLACES, {"tasks": tasks}) if tasks else ()
    return {row.task_id: row._asdict() for row in found}


_HOLDING_RUNS = text(
    f"""
WITH lines (agent, capability, agent_id) AS (
    SELECT id, NULL, id FROM unnest(cast(:agents AS text[])) AS id
    UNION ALL
    SELECT NULL, offered.capability, a.agent_id
    FROM unnest(cast(:capabilities AS text[])) AS offered (capability)
         JOIN agents a ON offered.capability = ANY (a.capabilities)
), holding AS (
    SELECT l.agent, l.capability, t.run_id, min(s.held_at) AS since
    FROM lines l JOIN slots s ON s.pool = l.agent_id JOIN tasks t ON t.id = s.holder
    WHERE s.lease_expires_at > now()
    GROUP BY l.agent, l.capability, t.run_id
)
SELECT agent, capability, count(*) AS number,
       (array_agg(run_id ORDER BY since, run_id))[1:{RUNS_NAMED}] AS first
FROM holding GROUP BY agent, capability
"""
)


def _holding_runs(
    tx: Tx, in_line: Sequence[Row]
) -> dict[tuple[str | None, str | None], tuple[int, Sequence[UUID]]]:
    """Return for each line how many runs hold slots of who serves it, and those that did first."""
    lines = {_line(row) for row in in_line}
    if not lines:
        return {}
    names = {
        "agents": sorted(agent for agent, _ in lines if agent),
        "capabilities": sorted(name for _, name in lines if name),
    }
    found = tx.execute(_HOLDING_RUNS, names)
    return {(row.agent, row.capability): (row.number, row.first) for row in found}


def _logs(tx: Tx, task_id: UUID, number: int) -> Sequence[Row]:
    statement = (
        select(AttemptLog.line, AttemptLog.at, AttemptLog.message, AttemptLog.fields)
        .where(AttemptLog.task_id == task_id, AttemptLog.attempt == number)
        .order_by(AttemptLog.line.desc())
        .limit(LOG_LINES_SHOWN)
    )
    return _rows(tx, statement)[::-1]


def describe_wait(task: Row) -> str | None:
    """Say in plain words why a task does not run yet; None if nothing is known."""
    if names := task["open_dependencies"]:
        return f"{_named(names)} {'are' if len(names) > 1 else 'is'} not over"
    if task["status"] != TaskStatus.WAITING:
        return None
    return _WAITS[task["reason"]](task)


def _busy(task: Row) -> str:
    line, wanted = task["line_agent_id"], task["wanted_agent_id"]
    whom = f"agent {line or wanted}"
    if line is None and wanted is None:
        whom = f"an agent with capability {task['agent_capability']}"
    elif line is not None and line != wanted:
        whom += ", which it falls back on"
    place = task["queue"] or {}
    said = [_busy_with(task), *_ahead(place)]
    known = place.get("seconds")
    when = _again(task) if known is None else f", about {duration(known)}"
    return f"waiting for {whom}: {', '.join(said)}{when}"


def _busy_with(task: Row) -> str:
    if task["busy_with"] is None:
        return "busy"
    number, first = task["busy_with"]
    runs = ["this run" if run == task["run_id"] else f"run {run}" for run in first]
    more = f" and {number - len(runs)} more" if number > len(runs) else ""
    return f"busy with {', '.join(runs)}{more}"


def _ahead(place: Row) -> Iterable[str]:
    if place:
        position = place["position"]
        if position is None:
            yield f"more than {PLACES_COUNTED} ahead"
        else:
            yield f"{position - 1} ahead" if position > 1 else "next in line"


def duration(seconds: float) -> str:
    """Say how long about: in the largest unit of which there are two."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(1, math.ceil(seconds))} s"


def _unavailable(task: Row) -> str:
    wanted, others = task["wanted_agent_id"], ", ".join(task["fallback"])
    if wanted is None:
        said = f"no agent with capability {task['agent_capability']} is available"
        return f"{said}, nor {others}" if others else said
    if others:
        return f"none of the agents {wanted}, {others} is available"
    return f"agent {wanted} is unavailable"


def _children(task: Row) -> str:
    items = task["items"]
    if items is None:
        return "its sub-workflow is not over"
    over = sum(items[status] for status in ("completed", "failed", "cancelled"))
    return f"{over} of {items['total']} items are over"


def _approval(task: Row) -> str:
    if task["decision"] is not None:
        said = "approved" if task["decision"]["approved"] else "rejected"
        return f"{said} by {task['decision']['principal']}; it goes on"
    until = "" if task["wake_at"] is None else f", until {_moment(task['wake_at'])}"
    what = f"its call of {task['call']['tool']}" if task.get("call") else "it"
    return f"waiting for somebody to approve or reject {what}{until}"


def _delay(task: Row) -> str:
    return f"waiting until {_moment(task['wake_at'])}" if task["wake_at"] else "its delay is over"


def _again(task: Row) -> str:
    return "" if task["wake_at"] is None else f"; it is tried again at {_moment(task['wake_at'])}"


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"task{'s' if len(names) > 1 else ''} {shown}"


_WAITS: Mapping[str, Callable[[Row], str]] = {
    Reason.AGENT_BUSY: _busy,
    Reason.AGENT_UNAVAILABLE: lambda task: f"{_unavailable(task)}{_again(task)}",
    Reason.REMOTE: lambda task: (
        f"agent {task['agent_id']} has it and reports when it is done; until"
        f" {_moment(task['lease_expires_at'])}"
    ),
    Reason.RETRY: lambda task: (
        f"{task['tries']} of {task['max_attempts']} attempts failed{_again(task)}"
        if task["tries"]
        else f"it goes on in another attempt{_again(task)}"
    ),
    Reason.DEPENDENCIES: lambda task: f"tasks it depends on are not over{_again(task)}",
    Reason.MAX_PARALLEL: lambda _: "as many items as maxParallel allows are out already",
    Reason.CHILDREN: _children,
    Reason.APPROVAL: _approval,
    Reason.DELAY: _delay,
    Reason.PAUSED: lambda _: "the run is paused",
}


# --- Events -------------------------------------------------------------------------------------


_OPEN_SINCE = """(
    SELECT cast(least(now(), min(coalesce(a.xact_start, '-infinity'))) AS text)
    FROM pg_stat_activity a
    WHERE a.backend_xid IS NOT NULL AND a.datname = current_database()
      AND a.pid <> pg_backend_pid())"""
"""Since when the oldest transaction that is writing is open; if there is none, now."""
_IS_SETTLED = """((e.at < cast(:open_since AS timestamptz)
     OR e.at > now() + interval '1 minute')  -- the clock was set back
    -- The same by numbers, which alone do not tell: a younger transaction may have been first to
    -- draw a seq. Those of a dump that was restored are of another server.
    AND (e.transaction < s.oldest OR e.transaction >= s.next))"""
_BY = """CASE
    WHEN e.data ->> 'by' IS NOT NULL THEN e.data ->> 'by'
    WHEN e.type IN ('run.republished', 'task.lost') THEN 'keeper'
    WHEN e.data #>> '{error,code}' IN ('worker_lost', 'agent_silent') THEN 'keeper'
    WHEN a.report IS NOT NULL AND e.type NOT IN ('task.started', 'task.waiting')
        THEN 'agent:' || a.agent_id
    ELSE 'worker:' || coalesce(e.data ->> 'worker', a.worker,
        -- A `forEach` has no attempts to ask.
        CASE WHEN e.kind = 'for_each' AND (e.type = 'task.expanded' OR e.data ? 'attempt') THEN (
            SELECT b.data ->> 'worker' FROM events b
            WHERE b.run_id = e.run_id AND b.seq < e.seq AND b.task_id = e.task_id
              AND b.type = 'task.started'
            ORDER BY b.seq DESC LIMIT 1) END)
    END"""
"""What the writer said, else whose attempt it tells of."""
_NEWS = text(
    f"""
WITH wanted AS MATERIALIZED (
    SELECT w.run_id, w.after, coalesce((
        SELECT r.status IN {listed(RUN_ENDED)} FROM runs r WHERE r.id = w.run_id), true) AS is_over
    FROM unnest(cast(:runs AS uuid[]), cast(:after AS bigint[])) AS w (run_id, after)
), s AS (
    SELECT cast(cast(pg_snapshot_xmin(seen) AS text) AS bigint) AS oldest,
           cast(cast(pg_snapshot_xmax(seen) AS text) AS bigint) AS next
    FROM pg_current_snapshot() AS seen
)
SELECT w.run_id, w.is_over, {_OPEN_SINCE} AS open_since, {_IS_SETTLED} AS is_settled,
       e.seq, e.at, e.type, e.task_id, e.task_definition_id, e.index, {_BY} AS by,
       coalesce(e.data ->> 'reason', e.data #>> '{{error,code}}') AS reason, e.data - 'by' AS data
FROM wanted w CROSS JOIN s LEFT JOIN LATERAL (
    SELECT e.*, t.definition_id AS task_definition_id, t.index, t.kind
    FROM events e LEFT JOIN tasks t ON t.id = e.task_id
    WHERE e.run_id = w.run_id AND e.seq > w.after AND coalesce(t.kind, '') <> 'end'
    ORDER BY e.seq LIMIT :limit) AS e ON true
LEFT JOIN attempts a ON a.task_id = e.task_id AND a.number = cast(e.data ->> 'attempt' AS int)
ORDER BY w.run_id, e.seq
"""
)
_EVENT = ("seq", "at", "type", "task_id", "task_definition_id", "index", "by", "reason", "data")
_RUN_NOW = text(
    f"SELECT status IN {listed(RUN_ENDED)} AS is_over, {_OPEN_SINCE} AS open_since"
    " FROM runs WHERE id = :run_id"
)


@dataclass(frozen=True, slots=True)
class News:
    """What happened in a run after what was known of it."""

    events: Sequence[Row]
    """In their order; there may be more."""
    is_all: bool
    """The run is over, and no event of it is left."""


def list_events(tx: Tx, run_id: UUID, *, after: int, limit: int) -> Sequence[Row]:
    """Return the run's events above `after`, ascending: those of `get_news`.

    Raises:
        RunNotFound
    """
    return get_news(tx, run_id, after=after, limit=limit).events


def get_news(tx: Tx, run_id: UUID, *, after: int, limit: int) -> News:
    """Return what happened in a run after the event `after`, as far as it is settled.

    `by` says who did it or asked for it: `key:...`, `worker:...`, `agent:...` or `keeper`; None if
    it followed from what happened before. `reason` is one word for why.

    Raises:
        RunNotFound
    """
    run = tx.execute(_RUN_NOW, {"run_id": run_id}).one_or_none()
    if run is None:
        raise RunNotFound(run_id=run_id)
    found, _ = find_news(tx, {run_id: after}, open_since=run.open_since, limit=limit)
    return found[run_id]


def find_news(
    tx: Tx, after: Mapping[UUID, int], *, open_since: str | None, limit: int
) -> tuple[dict[UUID, News], str]:
    """Return what happened in each run after an event, in one statement; and the next `open_since`.

    Sequences commit out of order: an event is settled, and given out, when none with a lower `seq`
    can come any more. Whatever was written before the oldest transaction that is open now began is
    there for the next statement to see; so `open_since` is what an earlier statement said, and
    without it nothing is settled yet. `limit` events of each run are looked at.
    """
    wanted = {"runs": list(after), "after": list(after.values())}
    rows = tx.execute(_NEWS, {**wanted, "open_since": open_since, "limit": limit}).all()
    by_run = {run: list(group) for run, group in groupby(rows, key=lambda row: row.run_id)}
    return {run: _news(group, limit) for run, group in by_run.items()}, rows[0].open_since


def _news(rows: Sequence[Any], limit: int) -> News:
    """Take the events up to the first that is not settled: those behind it must not overtake it."""
    events = [row for row in rows if row.seq is not None]
    settled = list(takewhile(lambda row: row.is_settled, events))
    shown = [{name: values[name] for name in _EVENT} for values in (r._mapping for r in settled)]
    return News(shown, rows[0].is_over and len(settled) == len(events) < limit)


# --- Workflows ----------------------------------------------------------------------------------

_WORKFLOW = (
    Workflow.workflow_id,
    Workflow.version,
    Workflow.name,
    Workflow.definition,
    Workflow.created_at,
)


def list_workflows(tx: Tx, *, archived: bool = False, after: Key | None, limit: int) -> Page:
    """Return a page of the newest version of each workflow that was created by name.

    `archived`: of those that are archived; else of those that are not.
    """
    newest = (
        select(*_WORKFLOW)
        .ext(distinct_on(Workflow.workflow_id))
        .where(~Workflow.inline)
        .order_by(Workflow.workflow_id, Workflow.version.desc())
        .subquery()
    )
    archived_at = ArchivedWorkflow.archived_at
    statement = (
        select(newest, archived_at)
        .outerjoin(ArchivedWorkflow, ArchivedWorkflow.workflow_id == newest.c.workflow_id)
        .where(archived_at.is_not(None) if archived else archived_at.is_(None))
    )
    if after is not None:
        statement = statement.where(tuple_(newest.c.created_at, newest.c.workflow_id) < after)
    statement = statement.order_by(newest.c.created_at.desc(), newest.c.workflow_id.desc())
    return _page(tx, statement, limit, "created_at", "workflow_id")


def get_workflow(tx: Tx, workflow_id: str, version: int | None = None) -> Row:
    """Return one version of a workflow, by default the newest.

    Raises:
        WorkflowNotFound
    """
    wanted = ~Workflow.inline if version is None else Workflow.version == version
    statement = (
        _workflow_versions()
        .where(Workflow.workflow_id == workflow_id, wanted)
        .order_by(Workflow.version.desc())
        .limit(1)
    )
    row = _row(tx, statement)
    if row is None:
        raise no_workflow(workflow_id, version)
    return row


def _workflow_versions() -> Statement:
    return select(*_WORKFLOW, ArchivedWorkflow.archived_at).outerjoin(
        ArchivedWorkflow, ArchivedWorkflow.workflow_id == Workflow.workflow_id
    )


def list_versions(tx: Tx, workflow_id: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of the workflow's versions, newest first.

    Raises:
        WorkflowNotFound
    """
    statement = _workflow_versions().where(Workflow.workflow_id == workflow_id, ~Workflow.inline)
    if after is not None:
        statement = statement.where(tuple_(Workflow.version) < after)
    page = _page(tx, statement.order_by(Workflow.version.desc()), limit, "version")
    if not page.items and after is None:
        raise no_workflow(workflow_id)
    return page


# --- Agents -------------------------------------------------------------------------------------

_IS_OPEN = is_open("agents")
_SILENT_SECONDS = "extract(epoch FROM now() - agents.seen_at)"
_AGENT = (
    Agent.agent_id,
    Agent.name.label("agent_name"),
    Agent.kind,
    Agent.version,
    Agent.capabilities,
    Agent.capacity,
    Agent.state,
    Agent.state_at,
    Agent.paused,
    Agent.draining,
    Agent.contact_endpoint,
    Agent.details.label("metadata"),
    Agent.heartbeat_seconds,
    Agent.require_token,
    Agent.seen_at,
    case((Agent.busy_until > func.now(), Agent.busy_until)).label("busy_until"),
    literal_column(_IS_OPEN, Boolean).label("available"),
    literal_column(_SILENT_SECONDS, Float).label("silent_seconds"),
    Agent.registered_at,
    Agent.updated_at,
)
_IS_THERE = Agent.deregistered_at.is_(None)


def list_agents(tx: Tx, *, capability: str | None = None, after: Key | None, limit: int) -> Page:
    """Return a page of agents, each as `get_agent` has it."""
    statement = select(*_AGENT).where(_IS_THERE)
    if capability is not None:
        statement = statement.where(literal(capability) == any_(Agent.capabilities))
    if after is not None:
        statement = statement.where(tuple_(Agent.registered_at, Agent.agent_id) < after)
    statement = statement.order_by(Agent.registered_at.desc(), Agent.agent_id.desc())
    page = _page(tx, statement, limit, "registered_at", "agent_id")
    return Page(_with_work(tx, page.items), page.next)


def get_agent(tx: Tx, agent_id: str) -> dict[str, Any]:
    """Return the agent with what it does now: `state`, `running`, `holders`, `waiting`, `line`.

    `holders` are the attempts that hold its slots (an agent without `capacity` has none),
    `waiting` is how many tasks stand in its line, `line` the first of them.

    Raises:
        AgentNotFound: also if it was deregistered.
    """
    row = _row(tx, select(*_AGENT).where(Agent.agent_id == agent_id, _IS_THERE))
    if row is None:
        raise AgentNotFound(agent_id=agent_id)
    return _with_work(tx, [row])[0]


def check_agent(tx: Tx, agent_id: str) -> None:
    """Make sure that there is such an agent.

    Raises:
        AgentNotFound: also if it was deregistered.
    """
    if tx.execute(select(true()).where(Agent.agent_id == agent_id, _IS_THERE)).first() is None:
        raise AgentNotFound(agent_id=agent_id)


def list_agent_versions(tx: Tx, agent_id: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of the versions of an LLM agent that was defined over the API.

    Raises:
        AgentNotFound: none was.
    """
    columns = [getattr(AgentDefinition, name) for name in _AGENT_VERSION]
    statement = select(*columns).where(AgentDefinition.agent_id == agent_id)
    if after is not None:
        statement = statement.where(AgentDefinition.version < after[0])
    page = _page(tx, statement.order_by(AgentDefinition.version.desc()), limit, "version")
    if not page.items and after is None:
        raise AgentNotFound(agent_id=agent_id)
    return page


_AGENT_VERSION = ("agent_id", "version", "definition", "by", "created_at")


def get_state(tx: Tx, agent_id: str) -> dict[str, Any]:
    """Return the agent's `state`, the `details` reported with it, and since when it is so.

    Raises:
        AgentNotFound: also if it was deregistered.
    """
    # The registration's own report may bear a later time than the agent's clock gives the first.
    details = (
        select(AgentReport.details)
        .where(AgentReport.agent_id == Agent.agent_id, AgentReport.at <= Agent.state_at)
        .order_by(AgentReport.at.desc(), AgentReport.id.desc())
        .limit(1)
        .correlate(Agent)
        .scalar_subquery()
    )
    since = func.coalesce(Agent.state_at, Agent.registered_at)
    row = _row(
        tx,
        select(
            Agent.agent_id,
            Agent.kind,
            Agent.state,
            details.label("details"),
            since.label("timestamp"),
        ).where(Agent.agent_id == agent_id, _IS_THERE),
    )
    if row is None:
        raise AgentNotFound(agent_id=agent_id)
    return {**row, "state": _state(row, _running(tx, [agent_id]))}


def list_reports(tx: Tx, agent_id: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of what the agent reported, newest first by its own clock.

    Raises:
        AgentNotFound: also if it was deregistered.
    """
    check_agent(tx, agent_id)
    statement = select(
        AgentReport.id,
        AgentReport.agent_id,
        AgentReport.state,
        AgentReport.details,
        AgentReport.at.label("timestamp"),
        AgentReport.received_at,
    ).where(AgentReport.agent_id == agent_id)
    if after is not None:
        statement = statement.where(tuple_(AgentReport.at, AgentReport.id) < after)
    statement = statement.order_by(AgentReport.at.desc(), AgentReport.id.desc())
    return _page(tx, statement, limit, "timestamp", "id")


_MEMORY = (
    AgentMemory.id.label("memory_id"),
    AgentMemory.namespace,
    AgentMemory.text,
    null().label("score"),
    AgentMemory.added_at,
    AgentMemory.expires_at,
)


def list_memories(
    tx: Tx, agent_id: str, *, namespace: str | None = None, after: Key | None, limit: int
) -> Page:
    """Return a page of what an agent remembers, newest first.

    Raises:
        AgentNotFound: there never was one; one that was deregistered may have left something.
    """
    check_known(tx, agent_id)
    statement = select(*_MEMORY).where(
        AgentMemory.agent_id == agent_id,
        AgentMemory.expires_at.is_(None) | (AgentMemory.expires_at > func.now()),
    )
    if namespace is not None:
        statement = statement.where(AgentMemory.namespace == namespace)
    if after is not None:
        statement = statement.where(tuple_(AgentMemory.added_at, AgentMemory.id) < after)
    statement = statement.order_by(AgentMemory.added_at.desc(), AgentMemory.id.desc())
    return _page(tx, statement, limit, "added_at", "memory_id")


def find_memories(
    tx: Tx, agent_id: str, query: str, *, namespace: str | None = None, limit: int
) -> Page:
    """Return what an agent remembers that shares words with a query, as the agent finds it.

    Raises:
        AgentNotFound: see `list_memories`.
    """
    check_known(tx, agent_id)
    found = memories.search(tx, agent_id, namespace, query, limit)
    return Page([{**row._asdict(), "memory_id": row.id} for row in found], None)


def check_known(tx: Tx, agent_id: str) -> None:
    """Make sure that there is such an agent, or was.

    Raises:
        AgentNotFound
    """
    if tx.execute(select(true()).where(Agent.agent_id == agent_id)).first() is None:
        raise AgentNotFound(agent_id=agent_id)


def _with_work(tx: Tx, agents: Sequence[Row]) -> list[dict[str, Any]]:
    """Add to each agent what it does and who waits for it, in four statements for all."""
    ids = [agent["agent_id"] for agent in agents]
    holders = _holders(tx, ids)
    running = _running(tx, ids)
    waiting = _waiting(tx, agents)
    lines = _lines(tx, ids)
    return [
        {
            **agent,
            "state": _state(agent, running),
            "unavailable_because": _why_unavailable(agent),
            "running": running.get(agent["agent_id"], 0),
            "holders": holders.get(agent["agent_id"], []),
            "waiting": waiting[agent["agent_id"]],
            "line": lines.get(agent["agent_id"], []),
        }
        for agent in agents
    ]


def _state(agent: Row, running: Mapping[str, int]) -> str:
    if agent["kind"] == "remote":
        return str(agent["state"])
    return "active" if running.get(agent["agent_id"]) else "idle"


def _why_unavailable(agent: Row) -> str | None:
    if agent["available"]:
        return None
    for name in ("paused", "draining"):
        if agent[name]:
            return name
    limit, silent = agent["heartbeat_seconds"], agent["silent_seconds"]
    if limit is not None and silent >= limit:
        return f"silent for {silent:.0f} s"
    return "reported error"


def _holders(tx: Tx, agents: Sequence[str]) -> dict[str, list[Row]]:
    statement = (
        select(
            Slot.pool.label("agent_id"),
            Slot.number.label("slot"),
            Slot.holder.label("task_id"),
            Task.run_id,
            Task.definition_id.label("task_definition_id"),
            Slot.attempt,
            Slot.lease_expires_at,
        )
        .join(Task, Task.id == Slot.holder)
        .where(Slot.pool.in_(agents), Slot.lease_expires_at > func.now())
        .order_by(Slot.pool, Slot.number)
    )
    found: dict[str, list[Row]] = {}
    for row in _rows(tx, statement):
        found.setdefault(row["agent_id"], []).append(row)
    return found


def _running(tx: Tx, agents: Sequence[str]) -> dict[str, int]:
    """Count the attempts of each: those in workers, and those that agents behind HTTP took."""
    statement = (
        select(Task.agent_id, func.count())
        .where(Task.lease_expires_at.is_not(None), Task.agent_id.in_(agents))
        .group_by(Task.agent_id)
    )
    return {agent: number for agent, number in tx.execute(statement) if agent is not None}


_WAITING = text(
    f"""
SELECT w.line_agent_id AS agent, NULL AS capability, count(*) AS number FROM tasks w
WHERE w.line_agent_id = ANY (cast(:agents AS text[])) AND {_WAITS_IN_LINE}
GROUP BY w.line_agent_id
UNION ALL
SELECT NULL, w.wanted_capability, count(*) FROM tasks w
WHERE w.line_agent_id IS NULL AND w.wanted_capability = ANY (cast(:capabilities AS text[]))
  AND {_WAITS_IN_LINE}
GROUP BY w.wanted_capability
"""
)


def _waiting(tx: Tx, agents: Sequence[Row]) -> dict[str, int]:
    """Count who stands in the line of each of the agents, and of each of its capabilities."""
    ids = [agent["agent_id"] for agent in agents]
    offered = {name for agent in agents for name in agent["capabilities"]}
    rows = tx.execute(_WAITING, {"agents": ids, "capabilities": sorted(offered)})
    number = {(row.agent, row.capability): row.number for row in rows}
    return {
        agent["agent_id"]: number.get((agent["agent_id"], None), 0)
        + sum(number.get((None, name), 0) for name in agent["capabilities"])
        for agent in agents
    }


_WAITER = "w.id, w.run_id, w.definition_id, w.waiting_since, w.priority"
_LINES = text(
    f"""
SELECT a.agent_id, l.position, l.id AS task_id, l.run_id, l.definition_id AS task_definition_id,
       l.waiting_since, l.priority, now() + make_interval(
           secs => ceil(l.position / cast(pace.slots AS float)) * pace.seconds
       ) AS estimated_start_at
FROM agents a CROSS JOIN LATERAL (
    SELECT w.*, row_number() OVER ({ORDER}, w.id) AS position FROM (
        (SELECT {_WAITER} FROM tasks w WHERE w.line_agent_id = a.agent_id AND {_WAITS_IN_LINE}
         {ORDER} LIMIT {LINE_SHOWN})
        UNION ALL
        SELECT first.* FROM unnest(a.capabilities) AS offered (capability), LATERAL (
            SELECT {_WAITER} FROM tasks w WHERE {FOR_CAPABILITY} AND {_WAITS_IN_LINE}
            {ORDER} LIMIT {LINE_SHOWN}) AS first
    ) AS w ORDER BY position LIMIT {LINE_SHOWN}
) AS l CROSS JOIN LATERAL (
    SELECT nullif(count(*), 0) AS slots, avg(s.average_seconds) AS seconds FROM slots s
    WHERE s.pool = a.agent_id AND NOT s.closed AND {is_open()}
) AS pace
WHERE a.agent_id = ANY (cast(:agents AS text[]))
ORDER BY a.agent_id, l.position
"""
)


def _lines(tx: Tx, agents: Sequence[str]) -> dict[str, list[Row]]:
    """Return the first who wait for each agent, and when their turn there may come."""
    found: dict[str, list[Row]] = {}
    for row in tx.execute(_LINES, {"agents": list(agents)}):
        found.setdefault(row.agent_id, []).append(row._asdict())
    return found


# --- Schedules ----------------------------------------------------------------------------------

_SCHEDULE = tuple(Schedule.__table__.c)


def list_schedules(tx: Tx, *, after: Key | None, limit: int) -> Page:
    """Return a page of schedules."""
    statement = select(*_SCHEDULE)
    if after is not None:
        statement = statement.where(tuple_(Schedule.created_at, Schedule.name) < after)
    statement = statement.order_by(Schedule.created_at.desc(), Schedule.name.desc())
    return _page(tx, statement, limit, "created_at", "name")


def get_schedule(tx: Tx, name: str) -> Row:
    """Return a schedule.

    Raises:
        ScheduleNotFound
    """
    row = _row(tx, select(*_SCHEDULE).where(Schedule.name == name))
    if row is None:
        raise ScheduleNotFound(name=name)
    return row


def list_firings(tx: Tx, name: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of what became of a schedule's moments and of their runs, newest first.

    Raises:
        ScheduleNotFound
    """
    get_schedule(tx, name)
    statement = (
        select(*Firing.__table__.c, Run.status.label("run_status"))
        .outerjoin(Run, Run.id == Firing.run_id)
        .where(Firing.schedule == name)
    )
    if after is not None:
        statement = statement.where(tuple_(Firing.moment) < after)
    return _page(tx, statement.order_by(Firing.moment.desc()), limit, "moment")


_SCHEDULE_EVENT = (
    *(Event.seq, Event.at, Event.type, Event.task_id),
    *(literal_column("NULL").label(name) for name in ("task_definition_id", "index")),
    literal_column("data ->> 'by'").label("by"),
    literal_column("coalesce(data ->> 'reason', data #>> '{error,code}')").label("reason"),
    literal_column("data - 'by'", JSONB).label("data"),
)


def list_schedule_events(tx: Tx, name: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of what happened to a schedule, newest first, as `get_news` has it of a run.

    Also of one that was deleted.

    Raises:
        ScheduleNotFound: and nothing is known of one that was.
    """
    statement = select(*_SCHEDULE_EVENT).where(Event.schedule == name)
    if after is not None:
        statement = statement.where(tuple_(Event.seq) < after)
    page = _page(tx, statement.order_by(Event.seq.desc()), limit, "seq")
    if not page.items:
        get_schedule(tx, name)
    return page


# --- Workers ------------------------------------------------------------------------------------


def has_workers(tx: Tx) -> bool:
    """Tell whether a worker lives: the keeper, which runs in every worker, holds its lease."""
    lease = select(true()).where(Lease.name == "keeper", Lease.expires_at > func.now())
    return tx.execute(lease).first() is not None
