"""Every read: runs, tasks, attempts, events, workflows, agents, and whether workers live.

Nothing here changes a row. A read of many things is a handful of statements whatever their number;
lists are keyset pages, newest first unless said otherwise. Rows come back as mappings whose keys
are the API's names in snake_case. The implicit end of a run is never shown.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    String,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import JSONB, aggregate_order_by, distinct_on
from sqlalchemy.orm import aliased

from opscore.db import Tx
from opscore.errors import AgentNotFound, RunNotFound, TaskNotFound, WorkflowNotFound
from opscore.models import (
    RUN_STATUS,
    Agent,
    Attempt,
    AttemptLog,
    Event,
    Lease,
    Run,
    Slot,
    Task,
    Workflow,
)
from opscore.states import RUN_ENDED, Reason, RunStatus, TaskStatus

ITEMS_SHOWN = 200
"""Item rows in the detail of a run; the rest is paged."""
ATTEMPTS_SHOWN = 20
"""Newest attempts shown with each task of a list; the task's own page has them all."""
LOG_LINES_SHOWN = 1000
"""Newest log lines shown with an attempt."""

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
    Run.created_at,
    Run.started_at,
    Run.finished_at,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs to list; what is left out does not matter."""

    workflow_id: str | None = None
    status: Sequence[str] = ()
    labels: Mapping[str, str] | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def conditions(self) -> Iterable[ColumnElement[bool]]:
        """Return what runs must meet, but for their status."""
        if self.workflow_id is not None:
            yield Run.workflow_id == self.workflow_id
        if self.labels:
            yield Run.labels.contains(dict(self.labels))
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
    statement = select(*_SUMMARY, Run.input, Run.output).where(Run.id == run_id)
    row = _row(tx, statement)
    if row is None:
        raise RunNotFound(run_id=run_id)
    return dict(row)


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
    Task.index,
    Task.position,
    _place.label("place"),
    Task.items.label("item_count"),
    func.coalesce(Task.agent_id, Task.wanted_agent_id).label("agent_id"),
    Task.wanted_agent_id,
    Task.wanted_capability.label("agent_capability"),
    Task.status,
    Task.reason,
    case((Task.status == TaskStatus.WAITING, Task.wake_at)).label("wake_at"),
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
    """Add `attempts`, `items` and `waiting_for` to rows of tasks, in two statements for all."""
    attempts = _attempts(tx, [row["task_id"] for row in rows], attempts_shown)
    items = _item_counts(tx, rows)
    return [
        {
            **row,
            "attempts": attempts.get(row["task_id"], []),
            "items": (counts := items.get(row["task_id"])),
            "waiting_for": describe_wait(row, counts),
        }
        for row in rows
    ]


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


def _logs(tx: Tx, task_id: UUID, number: int) -> Sequence[Row]:
    statement = (
        select(AttemptLog.line, AttemptLog.at, AttemptLog.message, AttemptLog.fields)
        .where(AttemptLog.task_id == task_id, AttemptLog.attempt == number)
        .order_by(AttemptLog.line.desc())
        .limit(LOG_LINES_SHOWN)
    )
    return _rows(tx, statement)[::-1]


def describe_wait(task: Row, items: Mapping[str, int] | None = None) -> str | None:
    """Say in plain words why a task does not run yet; None if nothing is known."""
    if names := task["open_dependencies"]:
        return f"{_named(names)} {'are' if len(names) > 1 else 'is'} not over"
    if task["status"] != TaskStatus.WAITING:
        return None
    return _WAITS[Reason(task["reason"])](task, items or {})


def _wanted(task: Row) -> str:
    if task["wanted_agent_id"] is not None:
        return f"agent {task['wanted_agent_id']}"
    return f"every agent with capability {task['agent_capability']}"


def _again(task: Row) -> str:
    if task["wake_at"] is None:
        return ""
    at = task["wake_at"].astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return f"; it is tried again at {at}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"task{'s' if len(names) > 1 else ''} {shown}"


_WAITS: Mapping[Reason, Callable[[Row, Mapping[str, int]], str]] = {
    Reason.AGENT_BUSY: lambda task, _: f"{_wanted(task)} is busy{_again(task)}",
    Reason.AGENT_UNAVAILABLE: lambda task, _: (
        f"agent {task['wanted_agent_id']} is unavailable{_again(task)}"
        if task["wanted_agent_id"] is not None
        else f"no agent with capability {task['agent_capability']} is available{_again(task)}"
    ),
    Reason.RETRY: lambda task, _: (
        f"{task['tries']} of {task['max_attempts']} attempts failed{_again(task)}"
        if task["tries"]
        else f"its worker was stopped or lost{_again(task)}"
    ),
    Reason.DEPENDENCIES: lambda task, _: f"tasks it depends on are not over{_again(task)}",
    Reason.MAX_PARALLEL: lambda task, _: "as many items as maxParallel allows are out already",
    Reason.CHILDREN: lambda task, items: (
        f"{sum(items.get(status, 0) for status in ('completed', 'failed', 'cancelled'))} "
        f"of {items.get('total', 0)} items are over"
    ),
}


# --- Events -------------------------------------------------------------------------------------


def list_events(tx: Tx, run_id: UUID, *, after: int, limit: int) -> Sequence[Row]:
    """Return the run's events above `after`, ascending.

    Only those below the oldest transaction still open: one with a lower `seq` cannot appear later.

    Raises:
        RunNotFound
    """
    is_run_over(tx, run_id)
    settled = func.pg_snapshot_xmin(func.pg_current_snapshot())
    statement = (
        select(
            Event.seq,
            Event.at,
            Event.type,
            Event.task_id,
            Task.definition_id.label("task_definition_id"),
            Task.index,
            Event.data,
        )
        .outerjoin(Task, Task.id == Event.task_id)
        .where(
            Event.run_id == run_id,
            Event.seq > after,
            Event.transaction < cast(cast(settled, String), Event.transaction.type),
            func.coalesce(Task.kind, "") != "end",
        )
        .order_by(Event.seq)
        .limit(limit)
    )
    return _rows(tx, statement)


# --- Workflows ----------------------------------------------------------------------------------

_WORKFLOW = (
    Workflow.workflow_id,
    Workflow.version,
    Workflow.name,
    Workflow.definition,
    Workflow.created_at,
)


def list_workflows(tx: Tx, *, after: Key | None, limit: int) -> Page:
    """Return a page of the newest version of each workflow that was created by name."""
    newest = (
        select(*_WORKFLOW)
        .ext(distinct_on(Workflow.workflow_id))
        .where(~Workflow.inline)
        .order_by(Workflow.workflow_id, Workflow.version.desc())
        .subquery()
    )
    statement = select(newest)
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
        select(*_WORKFLOW)
        .where(Workflow.workflow_id == workflow_id, wanted)
        .order_by(Workflow.version.desc())
        .limit(1)
    )
    row = _row(tx, statement)
    if row is None:
        raise _no_workflow(workflow_id, version)
    return row


def list_versions(tx: Tx, workflow_id: str, *, after: Key | None, limit: int) -> Page:
    """Return a page of the workflow's versions, newest first.

    Raises:
        WorkflowNotFound
    """
    statement = select(*_WORKFLOW).where(Workflow.workflow_id == workflow_id, ~Workflow.inline)
    if after is not None:
        statement = statement.where(tuple_(Workflow.version) < after)
    page = _page(tx, statement.order_by(Workflow.version.desc()), limit, "version")
    if not page.items and after is None:
        raise _no_workflow(workflow_id)
    return page


def _no_workflow(workflow_id: str, version: int | None = None) -> WorkflowNotFound:
    if version is None:
        return WorkflowNotFound(workflow_id=workflow_id)
    return WorkflowNotFound(f"There is no version {version} of workflow {workflow_id!r}.")


# --- Agents -------------------------------------------------------------------------------------

_AGENT = (
    Agent.agent_id,
    Agent.name.label("agent_name"),
    Agent.kind,
    Agent.version,
    Agent.capabilities,
    Agent.capacity,
    Agent.registered_at,
    Agent.updated_at,
)


def list_agents(tx: Tx, *, capability: str | None = None, after: Key | None, limit: int) -> Page:
    """Return a page of agents, each as `get_agent` has it."""
    statement = select(*_AGENT)
    if capability is not None:
        statement = statement.where(literal(capability) == any_(Agent.capabilities))
    if after is not None:
        statement = statement.where(tuple_(Agent.registered_at, Agent.agent_id) < after)
    statement = statement.order_by(Agent.registered_at.desc(), Agent.agent_id.desc())
    page = _page(tx, statement, limit, "registered_at", "agent_id")
    return Page(_with_work(tx, page.items), page.next)


def get_agent(tx: Tx, agent_id: str) -> dict[str, Any]:
    """Return the agent with what it does now: `state`, `running`, `holders`, `waiting`.

    `holders` are the attempts that hold its slots (an agent without `capacity` has none),
    `waiting` is how many tasks wait because it is busy.

    Raises:
        AgentNotFound
    """
    row = _row(tx, select(*_AGENT).where(Agent.agent_id == agent_id))
    if row is None:
        raise AgentNotFound(agent_id=agent_id)
    return _with_work(tx, [row])[0]


def _with_work(tx: Tx, agents: Sequence[Row]) -> list[dict[str, Any]]:
    """Add to each agent what it does, in three statements for all."""
    ids = [agent["agent_id"] for agent in agents]
    holders = _holders(tx, ids)
    running = _running(tx, ids)
    by_agent, by_capability = _lines(tx)
    return [
        {
            **agent,
            "state": "active" if running.get(agent["agent_id"]) else "idle",
            "running": running.get(agent["agent_id"], 0),
            "holders": holders.get(agent["agent_id"], []),
            "waiting": by_agent.get(agent["agent_id"], 0)
            + sum(by_capability.get(name, 0) for name in agent["capabilities"]),
        }
        for agent in agents
    ]


def _holders(tx: Tx, agents: Sequence[str]) -> dict[str, list[Row]]:
    statement = (
        select(
            Slot.agent_id,
            Slot.number.label("slot"),
            Slot.holder.label("task_id"),
            Task.run_id,
            Task.definition_id.label("task_definition_id"),
            Slot.attempt,
            Slot.lease_expires_at,
        )
        .join(Task, Task.id == Slot.holder)
        .where(Slot.agent_id.in_(agents), Slot.lease_expires_at > func.now())
        .order_by(Slot.agent_id, Slot.number)
    )
    found: dict[str, list[Row]] = {}
    for row in _rows(tx, statement):
        found.setdefault(row["agent_id"], []).append(row)
    return found


def _running(tx: Tx, agents: Sequence[str]) -> dict[str, int]:
    statement = (
        select(Task.agent_id, func.count())
        .where(Task.status == literal_column("'running'"), Task.agent_id.in_(agents))
        .group_by(Task.agent_id)
    )
    return {agent: number for agent, number in tx.execute(statement) if agent is not None}


def _lines(tx: Tx) -> tuple[dict[str, int], dict[str, int]]:
    """Count who waits for a busy agent: by agent, and by capability where no agent is named."""
    in_line = and_(
        Task.status == literal_column("'waiting'"), Task.reason == literal_column("'agent_busy'")
    )
    capability = case((Task.wanted_agent_id.is_(None), Task.wanted_capability))
    statement = (
        select(Task.wanted_agent_id, capability, func.count())
        .where(in_line)
        .group_by(Task.wanted_agent_id, capability)
    )
    by_agent: dict[str, int] = {}
    by_capability: dict[str, int] = {}
    for agent, name, number in tx.execute(statement):
        line, key = (by_agent, agent) if agent is not None else (by_capability, name)
        line[key] = number
    return by_agent, by_capability


# --- Workers ------------------------------------------------------------------------------------


def has_workers(tx: Tx) -> bool:
    """Tell whether a worker lives: the keeper, which runs in every worker, holds its lease."""
    lease = select(true()).where(Lease.name == "keeper", Lease.expires_at > func.now())
    return tx.execute(lease).first() is not None
