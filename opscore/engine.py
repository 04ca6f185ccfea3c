"""Every change to a run, a task or an attempt, and nothing else changes them (I2).

Each change is one guarded statement; a guard that refuses is an answer, not an accident. The event
that tells of a change is written by the statement that makes it (I3). Callers own the transaction:
to submit, to claim and to finish as usual are single statements made for autocommit, everything
else wants `Database.transaction()`. Locks are taken run first, then task, then slot; several tasks
in the order of their ids, which is that of the graph within a run. Who claims begins with a slot,
and who frees one with a task in its line, but they wait for neither. Decisions use the database's
clock (I8). Nothing here publishes a message or calls an agent (I4): functions say who must be
visited next, and `dispatch` does it after the commit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select, text
from uuid6 import uuid7

from opscore.db import Prepared, Tx
from opscore.definition import Definition, TaskSpec
from opscore.errors import AgentNotFound, InvalidRequest, RunFinished, RunNotFound
from opscore.expressions import Template
from opscore.graph import Canvas, Node, build
from opscore.json_values import Faults
from opscore.models import Agent, Run, Task, listed
from opscore.states import RUN_ENDED, TASK_ENDED, Reason
from opscore.workflows import StoredWorkflow

DEADLINE_GRACE_SECONDS = 5
"""The worker ends an attempt at its timeout; only when it could not does the deadline come."""
RESERVE_SECONDS = 5
"""A freed slot is kept this long for the first in line; then again for whoever is first."""
FIRST_IN_LINE = 32
"""Looked at for an agent's free slots: others may be waking the first of them at this moment."""
LOOK_AGAIN_SECONDS = 30
"""What a task waits for is looked at again after this, should nobody say that it came."""


_ENDED = listed(TASK_ENDED)
_RUN_OPEN = (  # see `_still`
    "(coalesce(r.status) IN ('queued', 'running') AND r.cancel_requested_at IS NULL"
    " AND r.error IS NULL)"
)


def _dependencies_over(row: str = "t") -> str:
    return f"""NOT EXISTS (
    SELECT FROM tasks d WHERE d.id = ANY ({row}.depends_on) AND d.status NOT IN {_ENDED})"""


def _still(status: str, row: str = "t") -> str:
    """Return the condition on a row that is known by its id; in SQL.

    Written so that the planner does not think of the partial index on that status: one that is
    almost empty when a statement is prepared looks cheaper than the primary key.
    """
    return f"coalesce({row}.status) = '{status}'"


_ITEMS_OVER = f"""NOT EXISTS (
    SELECT FROM tasks c WHERE c.parent_id = t.id AND c.status NOT IN {_ENDED})"""


END = ""
"""The definition id of the implicit end; no task of a definition can have it."""
_WAKE_AT = """to_char(wake_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


# --- Submitting ---------------------------------------------------------------------------------


_TASK_COLUMNS = {
    "id": "uuid",
    "definition_id": "text",
    "kind": "text",
    "position": "int",
    "max_parallel": "int",
    "depends_on": "uuid[]",
    "successors": "uuid[]",
    "reads": "text[]",
    "is_sink": "boolean",
    "wanted_agent_id": "text",
    "wanted_capability": "text",
    "timeout_seconds": "float",
    "max_attempts": "int",
    "retry_backoff": "float",
    "retry_max_backoff": "float",
    "busy_backoff": "float",
    "busy_max_backoff": "float",
    "max_wait_seconds": "float",
    "goes_on": "boolean",
    "status": "text",
    "reason": "text",
}
_SUBMIT = Prepared(
    f"""
WITH run AS (
    INSERT INTO runs (id, workflow_id, version, agent_id, input, labels, priority, request_id)
    VALUES (:run_id, :workflow_id, :version, :agent_id, :input, :labels, :priority, :request_id)
    RETURNING *
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.queued', jsonb_build_object('version', version) FROM run
)
INSERT INTO tasks (run_id, priority, preferred_agent_id, {", ".join(_TASK_COLUMNS)})
SELECT run.id, run.priority, run.agent_id, {", ".join(f"t.{name}" for name in _TASK_COLUMNS)}
FROM run, jsonb_to_recordset(cast(:tasks AS jsonb)) AS t (
    {", ".join(f"{name} {kind}" for name, kind in _TASK_COLUMNS.items())})
""",
    json=("input", "labels", "tasks"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left of a run: the input of a canvas."""

    run_id: UUID
    generation: int
    request_id: str | None
    nodes: tuple[Node, ...]
    items: tuple[tuple[UUID, float], ...] = ()
    """Items of expanded `forEach` tasks that need a visit of their own: (task id, timeout)."""
    drawn: Canvas | None = None
    """The canvas, if it was drawn already and what lies beyond it is held back."""


def submit_run(
    tx: Tx,
    stored: StoredWorkflow,
    *,
    input: Any,
    agent_id: str | None = None,
    labels: Mapping[str, str] | None = None,
    priority: int = 1,
    request_id: str | None = None,
) -> Plan:
    """Write a run, all its tasks and the event, in one statement. Once it commits, the run is
    accepted.

    `agent_id` is the agent it was triggered for: it runs the tasks that name nobody, and is
    preferred where it has the capability asked for; the input is then merged over the first task's
    parameters.

    Raises:
        InvalidInput: the input breaks the workflow's inputSchema.
        InvalidRequest: a task names neither agent nor capability and there is no `agent_id`.
        AgentNotFound: no agent is registered as `agent_id`.
    """
    definition = stored.definition
    definition.check_input(input)
    _check_agents(tx, definition, agent_id)
    run_id = uuid7()
    tasks = _task_rows(definition, agent_id)
    nodes = tuple(
        Node(row["id"], frozenset(row["depends_on"]), row["timeout_seconds"], row["kind"] == "end")
        for row in tasks
    )
    drawn = build(nodes)
    _hold_beyond(tasks, drawn)
    _SUBMIT(
        tx,
        {
            "run_id": run_id,
            "workflow_id": stored.workflow_id,
            "version": stored.version,
            "agent_id": agent_id,
            "input": input,
            "labels": dict(labels or {}),
            "priority": priority,
            "request_id": request_id,
            "tasks": [_in_json(row) for row in tasks],
        },
    )
    return Plan(run_id, 1, request_id, nodes, drawn=drawn)


def _in_json(row: dict[str, Any]) -> dict[str, Any]:
    ids = {name: [str(id) for id in row[name]] for name in ("depends_on", "successors")}
    return row | ids | {"id": str(row["id"])}


def _hold_beyond(tasks: list[dict[str, Any]], drawn: Canvas) -> None:
    """Let what no message carries yet wait for its dependencies: waking it builds its segment."""
    beyond = set(drawn.beyond)
    for row in tasks:
        is_beyond = row["id"] in beyond
        row["status"] = "waiting" if is_beyond else "pending"
        row["reason"] = "dependencies" if is_beyond else None


def _check_agents(tx: Tx, definition: Definition, agent_id: str | None) -> None:
    if agent_id is None:
        if unbound := definition.unbound():
            sentence = (
                "The task names neither agentId nor agentCapability: name one, or trigger the"
            )
            raise InvalidRequest(
                {f"/tasks/{task}": [f"{sentence} workflow for an agent."] for task in unbound}
            )
    elif tx.execute(select(Agent.agent_id).where(Agent.agent_id == agent_id)).first() is None:
        raise AgentNotFound(agent_id=agent_id)


def _task_rows(definition: Definition, agent_id: str | None) -> list[dict[str, Any]]:
    """Return the rows of a run's tasks; with several leaves an implicit end joins them."""
    specs = list(definition.tasks)
    if len(definition.leaves) > 1:
        nothing = Template.compile({}, "", Faults())
        specs.append(TaskSpec(END, None, None, None, nothing, definition.leaves))
    ids = {spec.id: uuid7() for spec in specs}
    after: dict[str, list[UUID]] = {spec.id: [] for spec in specs}
    for spec in specs:
        for name in spec.depends_on:
            after[name].append(ids[spec.id])
    rows = [_task_row(spec, position, ids, after[spec.id]) for position, spec in enumerate(specs)]
    for row in rows:
        if row["wanted_agent_id"] is None and row["wanted_capability"] is None:
            row["wanted_agent_id"] = agent_id
        if not row["successors"]:
            row["is_sink"] = True
            row["reads"] = sorted(
                {*row["reads"], *output_reads(definition)} - {row["definition_id"]}
            )
    return rows


def output_reads(definition: Definition) -> frozenset[str]:
    """Return the tasks the run's output is made of: those its expression names, else the leaves."""
    return (
        frozenset(definition.leaves) if definition.output is None else definition.output_references
    )


def _task_row(
    spec: TaskSpec, position: int, ids: Mapping[str, UUID], successors: list[UUID]
) -> dict[str, Any]:
    each = spec.for_each
    return {
        "id": ids[spec.id],
        "definition_id": spec.id,
        "kind": "end" if spec.id == END else "agent" if each is None else "for_each",
        "position": position,
        "max_parallel": each.max_parallel if each else None,
        "depends_on": [ids[name] for name in spec.depends_on],
        "successors": successors,
        "reads": sorted(spec.references),
        "is_sink": False,
        "wanted_agent_id": spec.agent_id,
        "wanted_capability": spec.capability,
        "timeout_seconds": spec.timeout_seconds,
        "max_attempts": spec.retry.max_attempts,
        "retry_backoff": spec.retry.backoff_seconds,
        "retry_max_backoff": spec.retry.max_backoff_seconds,
        "busy_backoff": spec.busy.backoff_seconds,
        "busy_max_backoff": spec.busy.max_backoff_seconds,
        "max_wait_seconds": spec.busy.max_wait_seconds,
        "goes_on": spec.on_failure == "continue",
    }


# --- Claiming -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Visit:
    """A task's turn in a worker."""

    task_id: UUID
    generation: int
    """The message's: an older one may still do the work, but does not carry its canvas on."""
    token: UUID
    """Its own: who asks again after a lost answer is told by it that the claim is his."""
    has_slot: bool = False
    """A slot is kept for its task."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """This visit holds the task: run it, then record the outcome under `attempt`."""

    task_id: UUID
    run_id: UUID
    attempt: int
    kind: str
    definition_id: str
    parent_id: UUID | None
    item_index: int | None
    item: Any
    merges_input: bool
    """The first task of a run triggered for an agent: the input is merged over its parameters."""
    expanded: bool
    """A `forEach` whose items are over: collect them."""
    is_sink: bool
    agent_id: str | None
    has_slot: bool
    """Its end may free a slot somebody waits for."""
    workflow_id: str
    version: int
    generation: int
    timeout_seconds: float
    deadline_at: datetime
    input: Any
    tasks: Mapping[str, Any] | None
    """Definition id -> `{output, status, error}` of the tasks its expressions read."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The task is over, whoever did it: return normally, so that the canvas goes on."""

    generation: int


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another visit runs it, or it waits for its time: a newer canvas's visit is kept for later."""


@dataclass(frozen=True, slots=True)
class MustWait:
    """The task cannot start yet: park it. `agent_id` is an agent it could go to, if any."""

    reason: Reason
    agent_id: str | None


@dataclass(frozen=True, slots=True)
class Impossible:
    """The task can never start: it fails at once."""

    failure: "Failure"


@dataclass(frozen=True, slots=True)
class Void:
    """Nothing to do here any more: drop the message."""


Answer = Claimed | Settled | Elsewhere | MustWait | Impossible | Void

_FREE = """s.holder IS NULL AND (s.reserved_until IS NULL OR s.reserved_until < now())"""
_MAY_ASK = "({row}.not_before IS NULL OR {row}.not_before <= now())"
"""Whoever an agent itself sent away does not stand in its line until the time it named."""
_HAS_NONE_KEPT = "(w.kept_until IS NULL OR w.kept_until <= now())"
_STANDS = f"w.reason = 'agent_busy' AND {_MAY_ASK.format(row='w')} AND {_HAS_NONE_KEPT}"
_IN_LINE = f"w.status = 'waiting' AND {_STANDS}"
_FOR_AGENT = "w.wanted_agent_id = {agent}"
_FOR_CAPABILITY = "w.wanted_agent_id IS NULL AND w.wanted_capability = offered.capability"
"""Of `unnest(capabilities) AS offered (capability)`: a line's index is in order for one of them."""
_ORDER = "ORDER BY w.priority DESC, w.waiting_since"


def _first_ahead(whose: str) -> str:
    """Return the first of a line besides `ready`, if it is older than that; in SQL, a subquery."""
    return f"""(
    SELECT FROM (SELECT w.priority, w.waiting_since FROM tasks w
                 WHERE {whose} AND {_IN_LINE} AND w.id <> ready.id
                 {_ORDER} LIMIT 1) AS first
    WHERE first.priority > ready.priority OR first.priority = ready.priority
      AND first.waiting_since < coalesce(ready.waiting_since, now()))"""


_START = """status = 'running', reason = NULL, attempt = t.attempt + 1, claim_token = :token,
        started_at = coalesce(t.started_at, now()),
        deadline_at = now() + make_interval(secs => t.timeout_seconds + :grace),
        lease_expires_at = now() + make_interval(secs => least(:lease, t.timeout_seconds + :grace)),
        -- An old visit does the work, but a newer canvas's saved one must still go on after it.
        message = CASE WHEN t.visit_generation > :generation THEN t.message END,
        visit_generation = greatest(t.visit_generation, :generation),
        wake_at = NULL, woken_at = NULL, kept_until = NULL, not_before = NULL"""


_UNCOUNTED = "a.agent_id = t.wanted_agent_id AND a.capacity IS NULL"
_WAITED_FOR_NOTHING = f"({_still('pending')} OR {_still('waiting')} AND t.reason = 'dependencies')"


def _simple_claim(
    task: str,
    source: str,
    guard: str,
    *,
    agent: str = "agents",
    fits: str = _UNCOUNTED,
    state: str = _WAITED_FOR_NOTHING,
) -> str:
    """Return the part of a statement that claims `task` if that is simple, as `next`.

    Simple is a task that waits for nothing (but `guard`) and whose agent has no capacity to count:
    most are, and it takes a third of the time. So is one that a slot is kept for.
    """
    return f"""next AS (
    UPDATE tasks t SET {_START}, agent_id = a.agent_id
    FROM {source}, runs r, {agent} a
    WHERE t.id = {task} AND t.kind = 'agent' AND {state}
      AND r.id = t.run_id AND {_RUN_OPEN} AND {fits} AND {guard}
    RETURNING t.id AS task_id, t.run_id, t.kind, t.definition_id, t.parent_id,
              t.index AS item_index, t.item, t.is_sink, t.agent_id, t.attempt, t.timeout_seconds,
              t.deadline_at, t.lease_expires_at, t.reads, r.workflow_id, r.version, r.generation,
              r.agent_id IS NOT NULL AND t.position = 0 AS merges_input
), begun AS (
    INSERT INTO attempts (task_id, number, agent_id, worker, status)
    SELECT task_id, attempt, agent_id, :worker, 'running' FROM next
)"""


_NEXT_STARTED = """UNION ALL SELECT run_id, task_id, 'task.started', jsonb_build_object(
        'attempt', attempt, 'agentId', agent_id, 'worker', cast(:worker AS text)) FROM next"""
"""The event of a claimed `next`: it comes after those of the SELECT it is added to."""


def _read_by(claimed: str, but: str = "NULL") -> str:
    """Return the outcomes that a claimed task's expressions read, in SQL."""
    return f"""CASE WHEN {claimed}.reads <> '{{}}'
            THEN (SELECT jsonb_object_agg(d.definition_id, jsonb_build_object(
                      'output', d.output, 'status', d.status, 'error', d.error))
                  FROM tasks d WHERE d.run_id = {claimed}.run_id AND d.index IS NULL
                  AND d.definition_id = ANY ({claimed}.reads)
                  AND d.id IS DISTINCT FROM {but}) END AS tasks"""


def _first_claim(
    *,
    before: str = "",
    agent: str = "agents",
    fits: str = _UNCOUNTED,
    state: str = _WAITED_FOR_NOTHING,
    after: str = "",
) -> str:
    """Return the statement that claims a task if that is simple, and starts its run if it waits."""
    return f"""
WITH {before} starting AS (
    UPDATE runs r SET status = 'running', started_at = now()
    FROM tasks t, {agent} a
    WHERE t.id = :task_id AND t.kind = 'agent' AND {state} AND r.id = t.run_id
      AND {_still("queued", "r")} AND {_RUN_OPEN} AND {fits} AND {_dependencies_over()}
    RETURNING r.id
), {
        _simple_claim(
            ":task_id",
            "(SELECT count(*) FROM starting) AS first",
            _dependencies_over(),
            agent=agent,
            fits=fits,
            state=state,
        )
    } {after}, told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT id, NULL, 'run.started', '{{}}'::jsonb FROM starting {_NEXT_STARTED}
)
SELECT next.*, r.input, {_read_by("next")} FROM next JOIN runs r ON r.id = next.run_id
"""


_CLAIM_SIMPLY = Prepared(_first_claim())
_CLAIM_KEPT = Prepared(
    _first_claim(
        before="""kept AS (
    SELECT s.agent_id, s.number FROM slots s JOIN agents a USING (agent_id)
    WHERE s.reserved_for = :task_id AND s.reserved_until > now() AND s.holder IS NULL
      AND s.number <= a.capacity
    LIMIT 1 FOR UPDATE OF s SKIP LOCKED
),""",
        agent="kept",
        fits="true",
        state=f"{_still('waiting')} AND t.reason = 'agent_busy' AND {_MAY_ASK.format(row='t')}",
        after=""", held AS (
    UPDATE slots s
    SET holder = next.task_id, attempt = next.attempt, lease_expires_at = next.lease_expires_at,
        reserved_for = NULL, reserved_until = NULL
    FROM next, kept WHERE s.agent_id = kept.agent_id AND s.number = kept.number
)""",
    )
)
_CLAIM = Prepared(
    f"""
WITH t AS MATERIALIZED (
    SELECT t.*, r.status AS run_status, r.generation, r.workflow_id, r.version,
           {_RUN_OPEN} AS run_open,
           r.agent_id IS NOT NULL AND t.position = 0 AS merges_input
    FROM tasks t JOIN runs r ON r.id = t.run_id
    WHERE t.id = :task_id
), over AS (
    SELECT {_dependencies_over()} AS dependencies FROM t
), ready AS (
    SELECT t.* FROM t, over
    WHERE run_open AND over.dependencies AND (t.status = 'pending' OR t.status = 'waiting' AND
        CASE t.reason
            WHEN 'retry' THEN t.wake_at <= now() OR t.woken_at IS NOT NULL
            WHEN 'children' THEN true
            WHEN 'max_parallel' THEN false
            ELSE t.not_before IS NULL OR t.not_before <= now()
        END) AND (t.items IS NULL OR {_ITEMS_OVER})
), candidate AS (
    SELECT a.agent_id, a.capacity, a.capabilities,
           a.agent_id IS NOT DISTINCT FROM ready.preferred_agent_id AS preferred
    FROM agents a, ready
    WHERE ready.kind = 'agent' AND CASE
        WHEN ready.wanted_agent_id IS NOT NULL THEN a.agent_id = ready.wanted_agent_id
        ELSE ready.wanted_capability = ANY (a.capabilities) END
), slot AS (
    -- A free slot, unless somebody older waits for it who has none kept for him.
    SELECT s.agent_id, s.number
    FROM candidate c JOIN slots s USING (agent_id) CROSS JOIN ready
    WHERE s.number <= c.capacity
      AND s.holder IS NULL
      AND (s.reserved_for = :task_id AND s.reserved_until > now()
           OR {_FREE}
           AND NOT EXISTS {_first_ahead(_FOR_AGENT.format(agent="c.agent_id"))}
           AND NOT EXISTS (SELECT FROM unnest(c.capabilities) AS offered (capability)
                           WHERE EXISTS {_first_ahead(_FOR_CAPABILITY)}))
    ORDER BY (s.reserved_for = :task_id) DESC NULLS LAST, c.preferred DESC, s.number
    LIMIT 1
    FOR UPDATE OF s SKIP LOCKED
), unlimited AS (
    SELECT agent_id, NULL::int AS number FROM candidate
    WHERE capacity IS NULL ORDER BY preferred DESC, agent_id LIMIT 1
), chosen AS (
    SELECT * FROM slot
    UNION ALL SELECT * FROM unlimited WHERE NOT EXISTS (SELECT FROM slot)
    UNION ALL SELECT NULL, NULL FROM ready WHERE kind <> 'agent'
), starting AS (
    UPDATE runs r SET status = 'running', started_at = now()
    FROM ready, chosen
    WHERE r.id = ready.run_id AND r.status = 'queued' AND ready.run_status = 'queued'
      AND r.cancel_requested_at IS NULL AND r.error IS NULL
    RETURNING r.id
), claimed AS (
    UPDATE tasks t
    SET {_START}, agent_id = chosen.agent_id
    FROM ready CROSS JOIN chosen LEFT JOIN starting ON true
    -- As it was seen above: whoever waited here for the row's lock may find it moved.
    WHERE t.id = :task_id AND t.status = ready.status AND t.attempt = ready.attempt
      AND t.reason IS NOT DISTINCT FROM ready.reason
    RETURNING t.id, t.run_id, t.attempt, t.kind, t.agent_id, t.lease_expires_at, t.deadline_at,
              chosen.number
), held AS (
    UPDATE slots s
    SET holder = claimed.id, attempt = claimed.attempt, lease_expires_at = claimed.lease_expires_at,
        reserved_for = NULL, reserved_until = NULL
    FROM claimed
    WHERE s.agent_id = claimed.agent_id AND s.number = claimed.number
), begun AS (
    INSERT INTO attempts (task_id, number, agent_id, worker, status)
    SELECT id, attempt, agent_id, :worker, 'running' FROM claimed WHERE kind = 'agent'
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT id, NULL, 'run.started', '{{}}'::jsonb FROM starting
    UNION ALL SELECT run_id, id, 'task.started', jsonb_build_object(
        'attempt', attempt, 'agentId', agent_id, 'worker', cast(:worker AS text))
    FROM claimed WHERE kind <> 'end'
)
SELECT t.id AS task_id, t.run_id, t.kind, t.definition_id, t.parent_id, t.index AS item_index,
       t.item, t.items IS NOT NULL AS expanded, t.is_sink, t.merges_input, t.workflow_id, t.version,
       t.generation, t.timeout_seconds, t.status, t.visit_generation, t.wanted_agent_id, t.run_open,
       over.dependencies,
       claimed.id IS NOT NULL OR mine.held AS claimed,
       coalesce(claimed.attempt, t.attempt) AS attempt,
       coalesce(claimed.agent_id, t.agent_id) AS agent_id,
       coalesce(claimed.deadline_at, t.deadline_at) AS deadline_at,
       claimed.number IS NOT NULL OR mine.held AND t.kind = 'agent' AS has_slot,
       EXISTS (SELECT FROM ready) AS ready,
       EXISTS (SELECT FROM chosen) AS chosen,
       (SELECT agent_id FROM candidate ORDER BY preferred DESC LIMIT 1) AS candidate,
       CASE WHEN claimed.id IS NOT NULL OR mine.held
            THEN (SELECT input FROM runs WHERE id = t.run_id) END AS input,
       CASE WHEN (claimed.id IS NOT NULL OR mine.held) AND t.reads <> '{{}}'
            THEN (SELECT jsonb_object_agg(d.definition_id, jsonb_build_object(
                      'output', d.output, 'status', d.status, 'error', d.error))
                  FROM tasks d WHERE d.run_id = t.run_id AND d.index IS NULL
                  AND d.definition_id = ANY (t.reads)) END AS tasks
FROM t CROSS JOIN over LEFT JOIN claimed ON true
     CROSS JOIN LATERAL (SELECT t.status = 'running' AND t.claim_token = :token AS held) AS mine
""",
)


def claim_task(tx: Tx, visit: Visit, *, worker: str, lease_seconds: float) -> Answer | None:
    """Take the task for this visit if it may start now, with a slot of its agent.

    Returns None when another visit moved the task at the same moment: ask again.
    """
    parameters = {
        "task_id": visit.task_id,
        "generation": visit.generation,
        "token": visit.token,
        "worker": worker,
        "lease": lease_seconds,
        "grace": DEADLINE_GRACE_SECONDS,
    }
    statement = _CLAIM_KEPT if visit.has_slot else _CLAIM_SIMPLY
    if simple := statement(tx, parameters).first():
        return _simply_claimed(simple, simple.input, simple.tasks, has_slot=visit.has_slot)
    row = _CLAIM(tx, parameters).first()
    if row is None:
        return Void()
    if row.claimed:
        return Claimed(**{name: getattr(row, name) for name in Claimed.__slots__})
    if not row.run_open:
        return Void()
    if row.status in TASK_ENDED:
        return Settled(row.generation)
    if row.ready and row.chosen:
        return None
    return Elsewhere() if row.visit_generation > visit.generation else _refused(row)


def _simply_claimed(
    row: Any, input: Any, tasks: Mapping[str, Any] | None, *, has_slot: bool = False
) -> Claimed:
    """Return what `_simple_claim` claimed."""
    given = {"expanded": False, "has_slot": has_slot, "input": input, "tasks": tasks}
    named = {name: getattr(row, name) for name in Claimed.__slots__ if name not in given}
    return Claimed(**named, **given)


def _refused(row: Row[Any]) -> Answer:
    """Say why a task of an open run cannot start; for a visit as new as any other of it."""
    if row.status != "running" and not row.dependencies:
        return MustWait(Reason.DEPENDENCIES, None)
    if not row.ready:
        return Elsewhere()
    if row.candidate is not None:
        return MustWait(Reason.AGENT_BUSY, row.candidate)
    if row.wanted_agent_id is not None:
        sentence = f"No agent is registered as {row.wanted_agent_id!r}."
        return Impossible(Failure("agent_not_found", sentence))
    return MustWait(Reason.AGENT_UNAVAILABLE, None)


def _line(many: str) -> str:
    """Return the part of a statement that finds, as `line`, the first `many` who wait for an agent.

    They wait for `:agent_id` itself or for a capability of it. Whoever was woken already
    `is_out`: a visit is on its way, and those behind wait for it. Whether somebody is in line is
    asked once more of the locked row: it may have run, and be waiting for something else.
    """
    return f"""first AS (
    (SELECT w.id, w.priority, w.waiting_since FROM tasks w
     WHERE {_FOR_AGENT.format(agent=":agent_id")} AND {_IN_LINE}
     {_ORDER} LIMIT {FIRST_IN_LINE})
    UNION ALL
    SELECT f.* FROM agents a, unnest(a.capabilities) AS offered (capability), LATERAL (
        SELECT w.id, w.priority, w.waiting_since FROM tasks w
        WHERE {_FOR_CAPABILITY} AND {_IN_LINE}
        {_ORDER} LIMIT {FIRST_IN_LINE}) AS f
    WHERE a.agent_id = :agent_id
), line AS MATERIALIZED (
    SELECT w.id, w.woken_at IS NOT NULL AS is_out FROM tasks w
    WHERE w.id = ANY (ARRAY(SELECT id FROM first)) AND {_still("waiting", "w")} AND {_STANDS}
    {_ORDER}, w.id
    LIMIT {many} FOR UPDATE OF w SKIP LOCKED
)"""


_KEPT_UNTIL = f"now() + make_interval(secs => {RESERVE_SECONDS})"
_KEEP = f"woken_at = coalesce(t.woken_at, now()), kept_until = {_KEPT_UNTIL}, wake_at = NULL"
_WOKEN = """t.id AS task_id, t.run_id, t.message, t.reason, t.timeout_seconds,
          t.parent_id IS NOT NULL AS is_item, r.generation, r.request_id"""


# --- Finishing ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed."""

    code: str
    message: str
    traceback: str | None = None
    retryable: bool = True


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
    next: Claimed | None = None
    """The visit that was to follow, claimed in the same breath."""
    woken: "tuple[Woken, ...]" = ()
    """Who is kept the slot that was freed; if nobody, look at its line once more: somebody may have
    come to it meanwhile."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The task waits now; its visit is saved with it."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The attempt is no longer this worker's: drop its outcome."""


_FREED = """freed AS (
    UPDATE slots s SET holder = NULL, attempt = NULL, lease_expires_at = NULL FROM gone
    WHERE s.agent_id = gone.agent_id AND s.holder = gone.id AND s.attempt = gone.attempt
)"""


def _leave(
    change: str,
    guard: str,
    attempt: str,
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

    `then_told` adds the events of what comes `after`, to be told after the task's own.
    """
    freed = freed and f", {freed}"
    return f"""
WITH {before} gone AS (
    UPDATE tasks t SET {change}, lease_expires_at = NULL, deadline_at = NULL
    {source}
    WHERE t.id = :task_id AND {guard}
    RETURNING t.id, t.run_id, t.definition_id, t.kind, t.parent_id, t.index AS item_index,
              t.is_sink, t.goes_on, t.status, t.attempt, t.agent_id, t.ends_run, t.message,
              t.wake_at, t.output
), closed AS (
    UPDATE attempts a SET {attempt}, finished_at = now() FROM gone
    WHERE a.task_id = gone.id AND a.number = gone.attempt AND a.status = 'running'
) {freed} {after}, told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, {event} FROM gone WHERE kind <> 'end' {then_told}
)
SELECT {answer}
"""


_BRIEF = "cast(:error AS jsonb) - 'traceback'"
_MINE = f"t.attempt = :attempt AND {_still('running')}"
_HANDED_OVER = f"""freed AS (
    UPDATE slots s
    SET holder = NULL, attempt = NULL, lease_expires_at = NULL,
        reserved_for = CASE WHEN s.number <= a.capacity THEN next.id END,
        reserved_until = CASE WHEN s.number <= a.capacity AND next.id IS NOT NULL
                              THEN {_KEPT_UNTIL} END
    FROM gone JOIN agents a USING (agent_id) LEFT JOIN line AS next ON true
    WHERE s.agent_id = gone.agent_id AND s.holder = gone.id AND s.attempt = gone.attempt
    RETURNING s.reserved_for, next.is_out
), woken AS (
    UPDATE tasks t SET {_KEEP}
    FROM freed, runs r WHERE t.id = freed.reserved_for AND r.id = t.run_id
    RETURNING {_WOKEN}, freed.is_out
)"""
_COMPLETE = {
    "change": "status = 'completed', output = :output, finished_at = now(), waiting_since = NULL",
    "guard": _MINE,
    "attempt": "status = 'completed'",
    "event": "'task.completed', jsonb_build_object('attempt', attempt)",
    "answer": """gone.message AS saved, gone.ends_run, r.generation AS run_generation
    FROM gone JOIN runs r ON r.id = gone.run_id""",
    "freed": "",
}
_HAND_OVER = _COMPLETE | {
    "before": f"{_line('1')},",
    "answer": """gone.message AS saved, gone.ends_run, r.generation AS run_generation, woken.*
    FROM gone JOIN runs r ON r.id = gone.run_id LEFT JOIN woken ON NOT woken.is_out""",
    "freed": _HANDED_OVER,
}
_SETTLED = f""", settled AS (
    UPDATE runs r
    SET status = CASE WHEN cast(:run_error AS jsonb) IS NULL THEN 'completed' ELSE 'failed' END,
        output = :run_output, error = :run_error, finished_at = now()
    FROM gone
    WHERE r.id = gone.run_id AND {{ends}} AND {_still("running", "r")} AND {_RUN_OPEN}
    RETURNING r.id, r.status
)"""
_RUN_ENDED = "UNION ALL SELECT id, NULL, 'run.' || status, '{}' FROM settled"
_FINISH = {
    has_slot: Prepared(_leave(**(_HAND_OVER if has_slot else _COMPLETE)), json=("output",))
    for has_slot in (True, False)
}


def _last(leaving: Mapping[str, str]) -> Prepared:
    run = "run AS (SELECT id FROM runs WHERE id = :run_id FOR NO KEY UPDATE),"
    ending = {
        "before": run + leaving.get("before", ""),
        "source": "FROM run",
        "after": _SETTLED.format(ends="true"),
        "then_told": _RUN_ENDED,
    }
    return Prepared(
        _leave(**{**leaving, **ending}),
        json=("output",),
        json_or_null=("run_output", "run_error"),
    )


_FINISH_LAST = {True: _last(_HAND_OVER), False: _last(_COMPLETE)}
_FINISH_AND_CLAIM = {
    has_slot: Prepared(
        _leave(
            **_COMPLETE
            | {
                "freed": _FREED if has_slot else "",
                "after": ", "
                + _simple_claim(
                    ":next_id",
                    "gone",
                    f"""NOT gone.ends_run AND t.run_id = gone.run_id AND {_still("running", "r")}
      AND r.generation = :generation
      AND NOT EXISTS (SELECT FROM tasks d WHERE d.id = ANY (t.depends_on) AND d.id <> :task_id
                      AND d.status NOT IN {_ENDED})""",
                ),
                "then_told": _NEXT_STARTED,
                "answer": f"""gone.message AS saved, gone.ends_run, gone.output,
       r.generation AS run_generation, next.*, {_read_by("next", ":task_id")}
    FROM gone JOIN runs r ON r.id = gone.run_id LEFT JOIN next ON true""",
            }
        ),
        json=("output",),
    )
    for has_slot in (True, False)
}


def complete_attempt(
    tx: Tx,
    claimed: Claimed,
    output: Any,
    run_output: Any = None,
    run_error: Failure | None = None,
) -> Finished | Fenced:
    """Record success: status, output, event; the slot is kept for who is first in its line.

    The run's sink settles the run too: with `run_output`, or as failed with `run_error` if no
    output could be made. Outputs are storable JSON.
    """
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "output": output,
        "agent_id": claimed.agent_id,
    }
    if claimed.is_sink:
        error = None if run_error is None else _error(run_error)
        ending = {"run_id": claimed.run_id, "run_output": run_output, "run_error": error}
        row = _FINISH_LAST[claimed.has_slot](tx, parameters | ending).first()
    else:
        row = _FINISH[claimed.has_slot](tx, parameters).first()
    if row is None:
        return _repeated(tx, claimed)
    woken = _woken([row]) if claimed.has_slot and row.task_id is not None else []
    return Finished(row.run_generation, row.ends_run, message=row.saved, woken=tuple(woken))


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
    following = None if row.task_id is None else _following(claimed, row)
    return Finished(row.run_generation, row.ends_run, message=row.saved, next=following)


def _following(claimed: Claimed, row: Any) -> Claimed:
    """Return the claim that came with a finish; its statement could not see what it finished."""
    tasks = None if not row.reads else dict(row.tasks or {})
    if tasks is not None and claimed.parent_id is None and claimed.definition_id in row.reads:
        tasks[claimed.definition_id] = {"output": row.output, "status": "completed", "error": None}
    return _simply_claimed(row, claimed.input, tasks)


_RECORDED = Prepared(
    f"""
SELECT r.generation, t.ends_run, t.message, t.status, t.goes_on
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.id = :task_id AND t.attempt = :attempt AND t.status IN {_ENDED}
  AND NOT EXISTS (SELECT FROM attempts a WHERE a.task_id = t.id AND a.number = t.attempt
                  AND a.status IN ('lost', 'cancelled'))
""",
)


_KEPT_FOR = Prepared(
    f"""
SELECT {_WOKEN} FROM slots s JOIN tasks t ON t.id = s.reserved_for JOIN runs r ON r.id = t.run_id
WHERE s.agent_id = :agent_id AND s.reserved_until > now() AND {_still("waiting")}
"""
)


def _repeated(tx: Tx, claimed: Claimed) -> Finished | Fenced:
    """Tell an outcome whose answer was lost on the way from one that came too late."""
    parameters = {"task_id": claimed.task_id, "attempt": claimed.attempt}
    row = _RECORDED(tx, parameters).first()
    if row is None:
        return Fenced()
    failed_run = row.status == "failed" and not row.goes_on
    kept = _KEPT_FOR(tx, {"agent_id": claimed.agent_id}) if claimed.has_slot else []
    woken = tuple(_woken(kept))
    return Finished(row.generation, row.ends_run, failed_run, row.message, woken=woken)


def _backoff(base: str, cap: str, exponent: str) -> str:
    """Return seconds to wait in SQL: exponential, capped, with full jitter.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return f"random() * least({cap}, {base} * power(2, least({exponent}, 30)))"


_RETRY = Prepared(
    _leave(
        f"""status = 'waiting', reason = 'retry', tries = tries + 1, waits = 0,
        waiting_since = NULL, message = coalesce(t.message, :message), woken_at = NULL,
        wake_at = now() + make_interval(secs => coalesce(
            :delay, {_backoff("t.retry_backoff", "t.retry_max_backoff", "t.tries")}))""",
        f"{_MINE} AND t.tries + 1 < t.max_attempts AND NOT t.ends_run",
        "status = 'failed', error = :error",
        f"""'task.retrying', jsonb_build_object(
            'attempt', attempt, 'wakeAt', {_WAKE_AT}, 'error', {_BRIEF})""",
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
    message: dict[str, Any],
) -> Finished | Parked | Fenced:
    """Record a failure: park the task for its next attempt, or let it fail for good.

    `delay_seconds` is what the agent asked for; without it the task's own backoff decides. For
    good, under `onFailure: fail`, nothing of the run starts any more: what has not started is
    cancelled, and the run fails when its running attempts have ended.
    """
    error = _error(failure)
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "message": message,
        "delay": delay_seconds,
        "error": error,
    }
    if failure.retryable and _RETRY(tx, parameters).first() is not None:
        return Parked()
    ended = _end_task(tx, claimed.task_id, claimed.run_id, error, attempt=claimed.attempt)
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
    finished = _end_task(tx, task_id, row.run_id, _error(failure))
    return None if finished is None else Gone(row.run_id, row.parent_id, finished)


def fail_overdue(tx: Tx, task_id: UUID) -> Gone | None:
    """Let a task fail that waited longer than its `busy.maxWaitSeconds`; None if it moved on."""
    reason = tx.execute(select(Task.reason).where(Task.id == task_id)).scalar()
    if reason == Reason.AGENT_UNAVAILABLE:
        failure = Failure("agent_unavailable", "No agent that could take it came in time.")
    else:
        failure = Failure("agent_busy_timeout", "Its agent was busy for all of maxWaitSeconds.")
    return fail_unclaimed(tx, task_id, failure)


def _error(failure: Failure) -> dict[str, Any]:
    error = {"code": failure.code, "message": failure.message}
    return error | ({"traceback": failure.traceback} if failure.traceback else {})


_END_TASK = Prepared(
    _leave(
        f"""status = CASE WHEN r.cancel_requested_at IS NULL AND cast(:error AS jsonb) IS NOT NULL
                      THEN 'failed' ELSE 'cancelled' END,
        reason = CASE WHEN r.cancel_requested_at IS NOT NULL THEN 'run_cancelled'
                      WHEN cast(:error AS jsonb) IS NULL THEN 'upstream_failed' END,
        error = {_BRIEF}, finished_at = now(), waiting_since = NULL, wake_at = NULL""",
        f"""r.id = t.run_id
        AND CASE WHEN cast(:attempt AS int) IS NULL THEN t.status IN ('pending', 'waiting')
                 ELSE t.attempt = :attempt AND {_still("running")} END""",
        """status = CASE WHEN cast(:error AS jsonb) IS NULL THEN 'cancelled' ELSE 'failed' END,
        error = :error""",
        f"'task.' || status, jsonb_build_object('attempt', attempt, 'error', {_BRIEF})",
        source="FROM runs r",
        after=_SETTLED.format(ends="gone.status = 'failed' AND gone.goes_on AND gone.is_sink"),
        then_told=_RUN_ENDED,
        answer=f"""gone.*, r.generation, {_RUN_OPEN} AS run_open
        FROM gone JOIN runs r ON r.id = gone.run_id""",
    ),
    json_or_null=(
        "error",
        "run_output",
        "run_error",
    ),
)


def _end_task(
    tx: Tx,
    task_id: UUID,
    run_id: UUID,
    error: dict[str, Any] | None,
    *,
    attempt: int | None = None,
) -> Finished | None:
    """Fail a task for good and, unless it goes on, begin to fail its run.

    Without an error the task is given up with a run that is ending already. A sink that goes on
    completes the run, which then has no output.
    """
    _lock_run(tx, run_id)
    ending = {"run_output": None, "run_error": None}
    row = _END_TASK(tx, {"task_id": task_id, "error": error, "attempt": attempt, **ending}).first()
    if row is None:
        return None
    failed_run = row.status == "failed" and not row.goes_on
    if failed_run and row.run_open and error is not None:
        _fail_run(tx, row, error)
    return Finished(row.generation, row.ends_run or failed_run, failed_run, row.message)


def _lock_run(tx: Tx, run_id: UUID) -> None:
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
    _leave(
        "status = 'failed', reason = NULL, finished_at = now(), error = :error, wake_at = NULL",
        _still("waiting"),
        "status = 'failed'",
        "'task.failed', jsonb_build_object('error', cast(:error AS jsonb))",
    ),
    json=("error",),
)
_CLOSE = Prepared(
    """
WITH closing AS (
    UPDATE tasks t
    SET status = CASE t.status WHEN 'running' THEN 'running' ELSE 'cancelled' END,
        reason = CASE t.status WHEN 'running' THEN t.reason ELSE :reason END,
        finished_at = CASE t.status WHEN 'running' THEN NULL ELSE now() END,
        wake_at = NULL, ends_run = true
    WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.run_id = :run_id
                     AND o.status IN ('pending', 'waiting', 'running')
                   ORDER BY o.id FOR NO KEY UPDATE)
      AND (t.status IN ('pending', 'waiting') OR t.status = 'running' AND NOT t.ends_run)
    RETURNING t.id, t.run_id, t.status, t.kind
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.cancelled', jsonb_build_object('reason', cast(:reason AS text))
    FROM closing WHERE status = 'cancelled' AND kind <> 'end'
)
SELECT id FROM closing
""",
)


def _fail_run(tx: Tx, row: Row[Any], error: dict[str, Any]) -> None:
    """Mark the run as failing and cancel what has not started; the caller holds the run's lock."""
    if row.parent_id is not None:
        sentence = f"Item {row.item_index} failed: {error['message']}"
        item = {"code": "item_failed", "message": sentence}
        _FAIL_PARENT(tx, {"task_id": row.parent_id, "error": item})
    brief = {
        "code": error["code"],
        "message": f"Task {row.definition_id}: {error['message']}",
        "taskId": str(row.id),
        "taskDefinitionId": row.definition_id,
    }
    _FAIL_RUN(tx, {"run_id": row.run_id, "error": brief})
    _close_tasks(tx, row.run_id, "upstream_failed")


def _close_tasks(tx: Tx, run_id: UUID, reason: str) -> None:
    """Cancel what has not started; who is running learns that the run ends with it.

    Repeated, because a `forEach` that expands at this moment holds its row until its items are
    written, and a statement that waited for that row does not see them; the next one does.
    """
    while _CLOSE(tx, {"run_id": run_id, "reason": reason}):
        pass


_RELEASE = Prepared(
    _leave(
        f"""status = 'waiting', reason = :reason, waits = waits + 1, woken_at = NULL,
        waiting_since = coalesce(t.waiting_since, now()), message = coalesce(t.message, :message),
        (not_before, wake_at) = (SELECT moment, moment FROM (SELECT now() + make_interval(secs =>
            coalesce(:delay, {_backoff("t.busy_backoff", "t.busy_max_backoff", "t.waits")})))
            AS asked (moment))""",
        f"{_MINE} AND NOT t.ends_run",
        """status = 'cancelled', error = jsonb_build_object(
            'code', cast(:reason AS text), 'message', 'The agent took no work.')""",
        f"""'task.waiting', jsonb_build_object(
            'reason', cast(:reason AS text), 'wakeAt', {_WAKE_AT}, 'agentId', agent_id)""",
    ),
    json_or_null=("message",),
)


def release_attempt(
    tx: Tx,
    claimed: Claimed,
    reason: Reason,
    *,
    delay_seconds: float | None = None,
    message: dict[str, Any],
) -> Finished | Parked | Fenced:
    """Give a claimed task back because its agent took no work; that uses up no attempt.

    It is not asked again before `delay_seconds`, or the task's own backoff, have passed.
    """
    parameters = {
        "task_id": claimed.task_id,
        "attempt": claimed.attempt,
        "reason": str(reason),
        "message": message,
        "delay": delay_seconds,
    }
    if _RELEASE(tx, parameters).first() is not None:
        return Parked()
    return abandon_attempt(tx, claimed)


def abandon_attempt(tx: Tx, claimed: Claimed) -> Finished | Fenced:
    """Give up an attempt that has nothing to show because its run is ending."""
    ended = _end_task(tx, claimed.task_id, claimed.run_id, None, attempt=claimed.attempt)
    return ended or Fenced()


# --- forEach ------------------------------------------------------------------------------------

_EXPAND = Prepared(
    f"""
WITH expanded AS (
    UPDATE tasks t
    SET status = 'waiting', reason = 'children', items = :count,
        message = coalesce(t.message, :message),
        lease_expires_at = NULL, deadline_at = NULL, wake_at = NULL, woken_at = NULL
    WHERE t.id = :task_id AND t.attempt = :attempt AND {_still("running")} AND NOT t.ends_run
    RETURNING t.*
), items AS (
    INSERT INTO tasks (id, run_id, definition_id, kind, position, parent_id, index, item,
        depends_on, successors, reads, wanted_agent_id, wanted_capability, preferred_agent_id,
        timeout_seconds, max_attempts, retry_backoff, retry_max_backoff, busy_backoff,
        busy_max_backoff, max_wait_seconds, goes_on, priority, status, reason)
    SELECT i.id, e.run_id, e.definition_id, 'agent', e.position, e.id, i.index - 1, i.item, '{{}}',
        '{{}}', e.reads, e.wanted_agent_id, e.wanted_capability, e.preferred_agent_id,
        e.timeout_seconds, e.max_attempts, e.retry_backoff, e.retry_max_backoff, e.busy_backoff,
        e.busy_max_backoff, e.max_wait_seconds, e.goes_on, e.priority,
        CASE WHEN i.index <= coalesce(e.max_parallel, i.index) THEN 'pending' ELSE 'waiting' END,
        CASE WHEN i.index <= coalesce(e.max_parallel, i.index) THEN NULL ELSE 'max_parallel' END
    FROM expanded e,
        ROWS FROM (unnest(cast(:ids AS uuid[])), jsonb_array_elements(cast(:values AS jsonb)))
        WITH ORDINALITY AS i(id, item, index)
    RETURNING id, status, index, timeout_seconds
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.expanded', jsonb_build_object('items', items) FROM expanded
)
SELECT items.id, items.timeout_seconds FROM items WHERE status = 'pending' ORDER BY index
""",
    json=("values",),
    json_or_null=("message",),
)


def expand_task(
    tx: Tx, claimed: Claimed, values: Sequence[Any], message: dict[str, Any]
) -> list[tuple[UUID, float]] | None:
    """Write a row per item and park the `forEach` until they are over.

    Returns the (id, timeout) of the items to visit now: all of them, or the first `maxParallel`;
    None when the attempt is no longer this worker's or the run ends.
    """
    rows = _EXPAND(
        tx,
        {
            "task_id": claimed.task_id,
            "attempt": claimed.attempt,
            "count": len(values),
            "ids": [uuid7() for _ in values],
            "values": list(values),
            "message": message,
        },
    )
    return [(row.id, row.timeout_seconds) for row in rows] or None


def item_outputs(tx: Tx, task_id: UUID) -> list[Any]:
    """Return the outputs of an expanded `forEach`'s items, in item order."""
    query = select(Task.output).where(Task.parent_id == task_id).order_by(Task.index)
    return list(tx.execute(query).scalars())


# --- Parking and waking -------------------------------------------------------------------------


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


def _woken(rows: Iterable[Row[Any]]) -> list[Woken]:
    return [Woken(**{name: getattr(row, name) for name in Woken.__slots__}) for row in rows]


_PARK = Prepared(
    f"""
WITH before AS (
    SELECT reason FROM tasks WHERE id = :task_id
), parked AS (
    UPDATE tasks t
    SET status = 'waiting', reason = :reason, message = :message, visit_generation = :generation,
        waits = CASE WHEN :busy THEN t.waits + 1 ELSE 0 END,
        waiting_since = CASE WHEN :busy THEN coalesce(t.waiting_since, now()) END,
        wake_at = CASE WHEN :busy THEN now() + make_interval(secs =>
            {_backoff("t.busy_backoff", "t.busy_max_backoff", "t.waits")}) END,
        woken_at = NULL, kept_until = NULL, not_before = NULL
    WHERE t.id = :task_id AND t.status IN ('pending', 'waiting')
      AND t.visit_generation <= :generation
    RETURNING t.id, t.run_id, t.wake_at, t.waiting_since, t.max_wait_seconds
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, id, 'task.waiting', jsonb_build_object(
        'reason', cast(:reason AS text), 'wakeAt', {_WAKE_AT}, 'agentId', cast(:agent_id AS text))
    FROM parked, before WHERE before.reason IS DISTINCT FROM :reason
)
SELECT id, waiting_since + make_interval(secs => max_wait_seconds) < now() AS overdue FROM parked
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
    return None if row is None else bool(row.overdue)


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
WITH parent AS (
    SELECT id, max_parallel FROM tasks
    WHERE id = :parent_id AND status = 'waiting' AND max_parallel IS NOT NULL FOR UPDATE
), room AS (
    SELECT parent.max_parallel - count(c.id) AS places
    FROM parent LEFT JOIN tasks c ON c.parent_id = :parent_id AND c.status NOT IN {_ENDED}
        AND (c.status <> 'waiting' OR c.reason <> 'max_parallel')
    GROUP BY parent.max_parallel
), next AS (
    SELECT c.id FROM tasks c, parent WHERE c.parent_id = :parent_id
      AND {_still("waiting", "c")} AND c.status NOT IN {_ENDED} AND c.reason = 'max_parallel'
    ORDER BY c.index LIMIT (SELECT greatest(places, 0) FROM room)
)
UPDATE tasks t SET status = 'pending', reason = NULL, woken_at = now() FROM next, runs r
WHERE t.id = next.id AND {_still("waiting")} AND r.id = t.run_id
RETURNING {_WOKEN}
""",
)
_WAKE_JOINS = f"""
UPDATE tasks t SET woken_at = now(), wake_at = NULL
FROM runs r
WHERE t.id IN (SELECT o.id FROM tasks o WHERE {{which}}
               ORDER BY o.id FOR NO KEY UPDATE)
  AND r.id = t.run_id
  AND {_still("waiting")} AND t.reason = 'dependencies' AND t.woken_at IS NULL
  AND {_dependencies_over()}
RETURNING {_WOKEN}
"""
_WAKE_THESE = Prepared(
    _WAKE_JOINS.format(which=f"o.id = ANY (:task_ids) AND {_still('waiting', 'o')}")
)
_WAKE_SUCCESSORS = Prepared(
    _WAKE_JOINS.format(
        which=f"""o.id = ANY (ARRAY(SELECT unnest(successors) FROM tasks WHERE id = :task_id))
               AND {_still("waiting", "o")}"""
    ),
)
_WAKE_PARENT = Prepared(
    f"""
UPDATE tasks t SET woken_at = now(), wake_at = NULL
FROM runs r
WHERE t.id = :task_id AND r.id = t.run_id
  AND {_still("waiting")} AND t.reason = 'children' AND t.woken_at IS NULL AND {_ITEMS_OVER}
RETURNING {_WOKEN}
""",
)


def wake_joins(tx: Tx, task_ids: Sequence[UUID]) -> list[Woken]:
    """Wake those of the tasks that wait for dependencies which are all over."""
    return _woken(_WAKE_THESE(tx, {"task_ids": list(task_ids)}))


def wake_successors(tx: Tx, task_id: UUID) -> list[Woken]:
    """Wake the tasks after this one whose last dependency it was."""
    return _woken(_WAKE_SUCCESSORS(tx, {"task_id": task_id}))


def wake_parent(tx: Tx, parent_id: UUID) -> list[Woken]:
    """Wake a `forEach` whose items are over, or release the next items under its `maxParallel`."""
    parents = _woken(_WAKE_PARENT(tx, {"task_id": parent_id}))
    return parents or _woken(_RELEASE_ITEMS(tx, {"parent_id": parent_id}))


_WAKE_LINE = Prepared(
    f"""
WITH free AS MATERIALIZED (
    SELECT s.number FROM slots s JOIN agents a USING (agent_id)
    WHERE s.agent_id = :agent_id AND s.number <= a.capacity AND {_FREE}
    ORDER BY s.number FOR UPDATE OF s SKIP LOCKED
), {_line("(SELECT count(*) FROM free)")}, pairs AS (
    SELECT f.number, l.id, l.is_out
    FROM (SELECT number, row_number() OVER (ORDER BY number) AS n FROM free) f
    JOIN (SELECT id, is_out, row_number() OVER () AS n FROM line) l USING (n)
), kept AS (
    UPDATE slots s SET reserved_for = pairs.id, reserved_until = {_KEPT_UNTIL}
    FROM pairs WHERE s.agent_id = :agent_id AND s.number = pairs.number
), woken AS (
    UPDATE tasks t SET {_KEEP}
    FROM pairs, runs r
    WHERE t.id = pairs.id AND r.id = t.run_id AND {_still("waiting")}
    RETURNING {_WOKEN}, pairs.is_out
)
SELECT * FROM woken WHERE NOT is_out
"""
)


def wake_line(tx: Tx, agent_id: str) -> list[Woken]:
    """Keep the agent's free slots for the first in line, and wake those not yet on their way."""
    return _woken(_WAKE_LINE(tx, {"agent_id": agent_id}))


_LINES = Prepared(
    f"""
SELECT a.agent_id FROM agents a WHERE EXISTS (SELECT FROM slots s WHERE s.agent_id = a.agent_id AND
s.number <= a.capacity AND {_FREE})
  AND (EXISTS (SELECT FROM tasks w WHERE {_FOR_AGENT.format(agent="a.agent_id")}
               AND {_IN_LINE})
       OR EXISTS (SELECT FROM unnest(a.capabilities) AS offered (capability), tasks w
                  WHERE {_FOR_CAPABILITY} AND {_IN_LINE}))
"""
)


def agents_to_wake(tx: Tx) -> list[str]:
    """Return the agents with a free slot that is kept for nobody while somebody waits for one."""
    return _LINES(tx).scalars()


_WAKE_DUE = Prepared(
    f"""
WITH due AS MATERIALIZED (
    SELECT t.id, CASE t.reason
        WHEN 'dependencies' THEN {_dependencies_over()}
        WHEN 'children' THEN {_ITEMS_OVER}
        WHEN 'agent_busy' THEN t.not_before <= now() OR EXISTS (
            SELECT FROM agents a WHERE a.capacity IS NULL AND (a.agent_id = t.wanted_agent_id
                OR t.wanted_agent_id IS NULL AND t.wanted_capability = ANY (a.capabilities)))
        WHEN 'agent_unavailable' THEN true
        ELSE t.reason = 'retry' END AS ready
    FROM tasks t
    WHERE t.status = 'waiting' AND t.wake_at <= now()
    ORDER BY t.wake_at LIMIT :limit FOR UPDATE OF t SKIP LOCKED
), moved AS (
    UPDATE tasks t
    SET woken_at = CASE WHEN due.ready THEN now() END,
        wake_at = CASE WHEN NOT due.ready THEN now() + make_interval(secs => {LOOK_AGAIN_SECONDS})
            END
    FROM due, runs r
    WHERE t.id = due.id AND {_still("waiting")} AND r.id = t.run_id
    RETURNING {_WOKEN}, due.ready,
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


def wake_due(tx: Tx, limit: int) -> Due:
    """Wake parked tasks past their moment if what they wait for could now be had."""
    rows = _WAKE_DUE(tx, {"limit": limit})
    return Due(
        _woken(row for row in rows if not row.overdue),
        [row.task_id for row in rows if row.overdue],
    )


_WAKE_FORGOTTEN = Prepared(
    _WAKE_JOINS.format(
        which=f"""o.status = 'waiting' AND o.reason = 'dependencies' AND o.wake_at IS NULL
               AND o.woken_at IS NULL AND {_dependencies_over("o")}"""
    )
)


_PARENTS_OVER = Prepared(
    f"""
SELECT t.id FROM tasks t
WHERE t.status = 'waiting' AND t.reason = 'children' AND t.woken_at IS NULL
  AND ({_ITEMS_OVER} OR t.max_parallel IS NOT NULL)
"""
)


def wake_forgotten(tx: Tx) -> list[Woken]:
    """Wake joins and `forEach` tasks whose last one died between its commit and its wake."""
    woken = _woken(_WAKE_FORGOTTEN(tx))
    for parent_id in _PARENTS_OVER(tx).scalars():
        woken += wake_parent(tx, parent_id)
    return woken


# --- Cancelling and settling --------------------------------------------------------------------


def cancel_run(tx: Tx, run_id: UUID) -> None:
    """Cancel a run: no task of it starts once this commits; running attempts are told.

    Call `settle_run` after the commit. Asking again while it ends changes nothing.

    Raises:
        RunNotFound: there is no such run.
        RunFinished: it is over already.
    """
    row = tx.execute(
        select(Run.status, Run.cancel_requested_at)
        .where(Run.id == run_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        raise RunNotFound(run_id=run_id)
    if row.status in RUN_ENDED:
        raise RunFinished(status=row.status)
    if row.cancel_requested_at is None:
        _REQUEST_CANCEL(tx, {"run_id": run_id})
        _close_tasks(tx, run_id, "run_cancelled")


_REQUEST_CANCEL = Prepared(
    """
WITH asked AS (
    UPDATE runs r SET cancel_requested_at = now() WHERE r.id = :run_id RETURNING r.id
)
INSERT INTO events (run_id, type) SELECT id, 'run.cancel_requested' FROM asked
""",
)
_SETTLE = Prepared(
    f"""
WITH settled AS (
    UPDATE runs r
    SET status = CASE WHEN r.cancel_requested_at IS NULL THEN 'failed' ELSE 'cancelled' END,
        finished_at = now()
    WHERE r.id = :run_id AND r.status IN ('queued', 'running')
      AND (r.error IS NOT NULL OR r.cancel_requested_at IS NOT NULL)
      AND NOT EXISTS (SELECT FROM tasks t WHERE t.run_id = r.id AND t.status NOT IN {_ENDED})
    RETURNING r.id, r.status, r.error
)
INSERT INTO events (run_id, type, data)
SELECT id, 'run.' || status, jsonb_strip_nulls(jsonb_build_object('error', error)) FROM settled
RETURNING run_id
""",
)


def settle_run(tx: Tx, run_id: UUID) -> bool:
    """End a run that fails or is cancelled once nothing of it runs any more."""
    return _SETTLE(tx, {"run_id": run_id}).first() is not None


_ENDING = Prepared(
    f"""
SELECT r.id FROM runs r WHERE r.status IN ('queued', 'running') AND (r.error IS NOT NULL OR
r.cancel_requested_at IS NOT NULL)
  AND NOT EXISTS (SELECT FROM tasks t WHERE t.run_id = r.id AND t.status NOT IN {_ENDED})
LIMIT :limit
"""
)


def runs_to_settle(tx: Tx, limit: int) -> list[UUID]:
    """Return runs with nothing left to end, whose last finisher died before settling them."""
    return _ENDING(tx, {"limit": limit}).scalars()


# --- Leases -------------------------------------------------------------------------------------

_RENEW = Prepared(
    f"""
WITH mine AS MATERIALIZED (
    SELECT t.id FROM tasks t
    JOIN unnest(cast(:ids AS uuid[]), cast(:attempts AS int[])) AS held (id, attempt)
      ON t.id = held.id AND t.attempt = held.attempt
    WHERE {_still("running")} AND t.lease_expires_at > now()
    ORDER BY t.id FOR NO KEY UPDATE OF t
), renewed AS (
    UPDATE tasks t
    SET lease_expires_at = least(now() + make_interval(secs => :lease), t.deadline_at)
    FROM mine WHERE t.id = mine.id
    RETURNING t.id, t.run_id, t.attempt, t.lease_expires_at
), slots AS (
    UPDATE slots s SET lease_expires_at = renewed.lease_expires_at FROM renewed
    WHERE s.holder = renewed.id AND s.attempt = renewed.attempt
)
SELECT renewed.id, r.cancel_requested_at IS NOT NULL AS cancelled
FROM renewed JOIN runs r ON r.id = renewed.run_id
""",
)


def renew_leases(tx: Tx, held: Mapping[UUID, int], lease_seconds: float) -> dict[UUID, bool]:
    """Extend the leases of these attempts (task id -> attempt), never beyond their deadline.

    Returns task id -> whether its run was cancelled; an attempt that is missing was lost.
    """
    if not held:
        return {}
    rows = _RENEW(tx, {"ids": list(held), "attempts": list(held.values()), "lease": lease_seconds})
    return {row.id: row.cancelled for row in rows}


_HAND_BACK = Prepared(
    _leave(
        """status = 'waiting', reason = 'retry', wake_at = now(), woken_at = NULL, waits = 0,
        waiting_since = NULL""",
        f"{_MINE} AND NOT t.ends_run",
        """status = 'cancelled', error = jsonb_build_object(
            'code', 'worker_stopped', 'message', 'The worker was stopped.')""",
        f"""'task.waiting', jsonb_build_object(
            'reason', 'retry', 'wakeAt', {_WAKE_AT}, 'agentId', agent_id)""",
    ),
)


def hand_back(tx: Tx, task_id: UUID, attempt: int) -> bool:
    """Give a running attempt up because its worker ends: the task is tried again, at no cost to it.

    False if it is not this worker's any more, or its run is ending.
    """
    return _HAND_BACK(tx, {"task_id": task_id, "attempt": attempt}).first() is not None


def expired_attempts(tx: Tx, limit: int, lease_seconds: float = 0) -> list[UUID]:
    """Return the tasks whose running attempt let its lease run out.

    None within `lease_seconds` of the server's start: nobody could renew while it was away, and who
    is alive does so first.
    """
    query = select(Task.id).where(
        Task.status == "running",
        text("lease_expires_at < now()"),
        text("pg_postmaster_start_time() < now() - make_interval(secs => :lease)").bindparams(
            lease=lease_seconds
        ),
    )
    return list(tx.execute(query.order_by(Task.lease_expires_at).limit(limit)).scalars())


_LOSE = Prepared(
    _leave(
        """status = 'waiting', waits = 0, waiting_since = NULL, woken_at = NULL,
        reason = CASE WHEN t.items IS NULL THEN 'retry' ELSE 'children' END,
        wake_at = CASE WHEN t.items IS NULL THEN now() END,
        lost = t.lost + CASE WHEN t.deadline_at < now() THEN 0 ELSE 1 END,
        tries = t.tries + CASE WHEN t.deadline_at < now() THEN 1 ELSE 0 END""",
        """t.status = 'running' AND t.lease_expires_at < now() AND NOT t.ends_run
        AND CASE WHEN t.deadline_at < now() THEN t.tries + 1 < t.max_attempts
                 ELSE t.lost + 1 < :max_lost END""",
        """status = 'lost', error = jsonb_build_object(
            'code', 'worker_lost', 'message', 'The worker went silent.')""",
        "'task.lost', jsonb_build_object('attempt', attempt)",
        answer="run_id, parent_id FROM gone",
    ),
)
_EXPIRED = Prepared(
    f"""
SELECT t.run_id, t.parent_id, t.attempt, t.lost, t.ends_run, t.deadline_at < now() AS timed_out,
t.timeout_seconds FROM tasks t WHERE t.id = :task_id AND {_still("running")} AND t.lease_expires_at
< now() """,
)


def lose_attempt(tx: Tx, task_id: UUID, max_lost: int) -> Gone | None:
    """Take an expired attempt from its silent worker: it counts as lost and the task goes back to
    wait.

    The `max_lost`-th time, or past its deadline with no attempt left, the task fails for good. None
    if it was finished or renewed meanwhile.
    """
    back = _LOSE(tx, {"task_id": task_id, "max_lost": max_lost}).first()
    if back is not None:
        return Gone(back.run_id, back.parent_id, None)
    row = _EXPIRED(tx, {"task_id": task_id}).first()
    if row is None:
        return None
    if row.timed_out:
        error = _error(Failure("timeout", f"No answer within {row.timeout_seconds:g} seconds."))
    else:
        message = f"Its worker went silent {row.lost + 1} times; the task may be what kills it."
        error = _error(Failure("worker_lost", message))
    finished = _end_task(tx, task_id, row.run_id, error, attempt=row.attempt)
    return None if finished is None else Gone(row.run_id, row.parent_id, finished)


# --- Publishing again ---------------------------------------------------------------------------

_REPUBLISH = Prepared(
    f"""
WITH raised AS (
    UPDATE runs r SET generation = r.generation + 1, generation_at = now()
    WHERE r.id = :run_id AND r.generation = :generation AND {_RUN_OPEN}
    RETURNING r.id, r.generation
), told AS (
    INSERT INTO events (run_id, type, data)
    SELECT id, 'run.republished', jsonb_build_object('generation', generation) FROM raised
)
SELECT generation FROM raised
""",
)
_NODES = Prepared(
    f"""
SELECT t.id, t.timeout_seconds, t.kind, r.generation, r.request_id,
       ARRAY(SELECT d.id FROM tasks d WHERE d.id = ANY (t.depends_on) AND d.status NOT IN {_ENDED})
           AS depends_on
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.run_id = :run_id AND t.index IS NULL AND t.status NOT IN {_ENDED} AND {_RUN_OPEN}
ORDER BY t.position
""",
)
_LOOSE_ITEMS = Prepared(
    """
SELECT t.id, t.timeout_seconds FROM tasks t
WHERE t.run_id = :run_id AND t.index IS NOT NULL AND t.status = 'pending' ORDER BY t.index
""",
)


def republish_run(tx: Tx, run_id: UUID, generation: int) -> Plan | None:
    """Raise the run's generation and return what is left of it; older canvases fade out (I7).

    None if the run is over or somebody raised its generation (from `generation`) already.
    """
    raised = _REPUBLISH(tx, {"run_id": run_id, "generation": generation}).first()
    return None if raised is None else plan_run(tx, run_id)


def plan_run(tx: Tx, run_id: UUID) -> Plan | None:
    """Return what is left of an open run, under its present generation."""
    rows = _NODES(tx, {"run_id": run_id})
    if not rows:
        return None
    nodes = tuple(
        Node(row.id, frozenset(row.depends_on), row.timeout_seconds, row.kind == "end")
        for row in rows
    )
    loose = _LOOSE_ITEMS(tx, {"run_id": run_id})
    items = tuple((row.id, row.timeout_seconds) for row in loose)
    return Plan(run_id, rows[0].generation, rows[0].request_id, nodes, items)


_HOLD_BACK = Prepared(
    f"""
UPDATE tasks t
SET status = 'waiting', reason = 'dependencies', message = NULL,
    wake_at = NULL, woken_at = NULL
WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.id = ANY (:task_ids)
               ORDER BY o.id FOR NO KEY UPDATE)
  AND ({_still("pending")} OR {_still("waiting")} AND t.reason = 'dependencies')
""",
)


_CARRY = Prepared(
    f"""
UPDATE tasks t SET status = 'pending', reason = NULL
WHERE t.id IN (SELECT o.id FROM tasks o WHERE o.id = ANY (:task_ids) AND {_still("waiting", "o")}
               AND o.reason = 'dependencies' AND o.message IS NULL AND o.woken_at IS NULL
               ORDER BY o.id FOR NO KEY UPDATE)
"""
)


def carry(tx: Tx, task_ids: Sequence[UUID]) -> None:
    """Note that tasks which were held back come by a message now: nobody has to wake them."""
    _CARRY(tx, {"task_ids": list(task_ids)})


def hold_back(tx: Tx, task_ids: Sequence[UUID]) -> None:
    """Let tasks wait for their dependencies without a message: waking them builds their segment.

    Call `wake_joins` after the commit: the last dependency may have finished at the same moment.
    """
    _HOLD_BACK(tx, {"task_ids": list(task_ids)})


# --- Lost visits --------------------------------------------------------------------------------

LOST_BY_AGE_SECONDS = 600
"""If its queue does not tell, a visit that did not come for this long is lost."""
NOTHING = "-infinity"
"""What has left a queue whose oldest entry is unknown."""

_SENT_AT = """greatest(r.generation_at, t.created_at, t.woken_at,
    (SELECT max(d.finished_at) FROM tasks d WHERE d.id = ANY (t.depends_on)))"""
_IS_UNDER_WAY = "(t.status = 'pending' OR t.status = 'waiting' AND t.woken_at IS NOT NULL)"

_OLDEST = Prepared(
    f"""
SELECT CASE WHEN cardinality(cast(:task_ids AS uuid[])) = 0 THEN now()
            ELSE min({_SENT_AT}) END
FROM tasks t JOIN runs r ON r.id = t.run_id
WHERE t.id = ANY (:task_ids) AND {_IS_UNDER_WAY} AND {_RUN_OPEN} AND {_dependencies_over()}
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
    first: tuple[UUID, ...] | None = None
    """Whose visits are to be served before the others, whenever sent; None: not known."""


_LEFT = """CASE t.kind WHEN 'end' THEN cast(:control AS timestamptz)
    ELSE cast(:agents AS timestamptz) END"""
_LONG_AGO = f"now() - make_interval(secs => {LOST_BY_AGE_SECONDS})"
_NOT_FIRST = "t.id <> ALL (cast(:first AS uuid[]))"
_LOST = f"""coalesce({_NOT_FIRST}, true)
    AND sent.at < CASE WHEN {_LEFT} = '{NOTHING}' THEN {_LONG_AGO}
        WHEN cast(:first AS uuid[]) IS NULL THEN least({_LEFT}, {_LONG_AGO})
        ELSE {_LEFT} END"""

_UNVISITED = Prepared(
    f"""
WITH ready AS MATERIALIZED (
    SELECT id, run_id, kind, created_at, woken_at, depends_on FROM tasks t
    WHERE t.status = 'pending' AND {_dependencies_over()}
)
SELECT t.run_id, r.generation
FROM ready t
    -- OFFSET: one look for each task, where a plan made on empty tables might read them whole.
    CROSS JOIN LATERAL (SELECT status, cancel_requested_at, error, generation, generation_at
                        FROM runs WHERE id = t.run_id OFFSET 0) AS r
    CROSS JOIN LATERAL (SELECT {_SENT_AT} AS at OFFSET 0) AS sent
WHERE {_RUN_OPEN} AND {_LOST}
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
      AND t.woken_at < now() - make_interval(secs => :after)
      -- Who is woken for a slot is served first: who is not among those has left the queue.
      AND CASE WHEN t.reason = 'agent_busy'
               THEN coalesce({_NOT_FIRST}, sent.at < {_LONG_AGO}) ELSE {_LOST} END
    ORDER BY t.id LIMIT :limit FOR NO KEY UPDATE OF t SKIP LOCKED)
  AND {_still("waiting")} AND r.id = t.run_id
RETURNING {_WOKEN}
"""
)


def wake_lost(tx: Tx, left: Left, after_seconds: float, limit: int) -> list[Woken]:
    """Wake again the parked tasks whose wake was lost on its way, as `unvisited_runs` tells it."""
    return _woken(_WAKE_LOST(tx, _lost_parameters(left, after_seconds, limit)))


# --- What an attempt says while it runs ---------------------------------------------------------

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
