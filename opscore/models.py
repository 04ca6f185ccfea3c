"""Every table, index and rule for rows, in one file.

Statuses are text (a native enum is awkward to extend). What must hold of each row of the tables
that every task changes is said in `HOLDS`, by name: the tests have PostgreSQL check it with every
statement and `make chaos` looks for rows that break it. In the schema they are no CHECKs, whose
text PostgreSQL reads anew with each statement: that was a quarter of all of its work here.
Durations are seconds.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Computed,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TSVECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from opscore.config import AGENTS_QUEUE
from opscore.states import (
    RUN_ENDED,
    TASK_ENDED,
    AgentState,
    AttemptStatus,
    CatchUp,
    FiringStatus,
    Overlap,
    Reason,
    RunStatus,
    TaskStatus,
)

Json = Any


def _among(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(str(v)) for v in sorted(values))})"


def listed(statuses: Iterable[str]) -> str:
    """Return statuses for `IN`; a partial index and a query that write it alike find each other."""
    return "(" + ", ".join(f"'{status}'" for status in sorted(statuses)) + ")"


IN_LINE = listed((Reason.AGENT_BUSY, Reason.AGENT_UNAVAILABLE))
"""The reasons of those who stand in a line."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own spelling
        str: Text,
        datetime: DateTime(timezone=True),
        uuid.UUID: Uuid,
        float: Float,
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        list[uuid.UUID]: ARRAY(Uuid),
    }


class Workflow(Base):
    """One version of a workflow; never changed once written."""

    __tablename__ = "workflows"

    workflow_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    definition: Mapped[dict[str, Any]]
    digest: Mapped[str]
    """SHA-256 of the document: the same document again is the same version."""
    inline: Mapped[bool] = mapped_column(server_default=text("false"))
    """Came with a trigger and was never created: it is not what `latest` means."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint("version >= 1", name="version"),
        Index(None, "workflow_id", "digest"),
    )


class ArchivedWorkflow(Base):
    """A workflow that gets no new runs and versions; those that exist go on."""

    __tablename__ = "archived_workflows"

    workflow_id: Mapped[str] = mapped_column(primary_key=True)
    archived_at: Mapped[datetime] = mapped_column(server_default=func.now())
    by: Mapped[str]


class Agent(Base):
    """A named provider of capabilities."""

    __tablename__ = "agents"

    agent_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    version: Mapped[str]
    capabilities: Mapped[list[str]]
    capacity: Mapped[int | None]
    """How many attempts at once; null means no limit, and then there are no slots."""
    contact_endpoint: Mapped[str | None]
    """Where a remote agent takes work."""
    details: Mapped[Json] = mapped_column(JSONB(none_as_null=True), nullable=True)
    """What it said of itself when it registered: `metadata` on the wire."""
    paused: Mapped[bool] = mapped_column(server_default=text("false"))
    draining: Mapped[bool] = mapped_column(server_default=text("false"))
    deregistered_at: Mapped[datetime | None]
    closed: Mapped[bool] = mapped_column(
        Computed("paused OR draining OR deregistered_at IS NOT NULL", persisted=True)
    )
    """Gets nothing new, whatever it reports."""
    heartbeat_seconds: Mapped[float | None]
    """It is silent, and gets nothing, if it reported nothing for so long."""
    require_token: Mapped[bool] = mapped_column(server_default=text("true"))
    """Only who shows an attempt's token may end it."""
    state: Mapped[str] = mapped_column(server_default=AgentState.UNKNOWN)
    """The newest in its history."""
    state_at: Mapped[datetime | None]
    """By the agent's clock; null until its first report, which outranks the registration's."""
    state_lapses: Mapped[bool] = mapped_column(server_default=text("false"))
    """It was reported of an attempt of ours, and says nothing once that is over."""
    busy_until: Mapped[datetime | None]
    """It refused work and is not asked again before this, unless it says that it is free."""
    notified_at: Mapped[datetime | None]
    """When the newest notice of the webhook about it was signed: an older one changes nothing."""
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When it last said anything."""
    registered_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(_among("kind", ["function", "llm", "remote"]), name="kind"),
        CheckConstraint("capacity >= 1", name="capacity"),
        CheckConstraint("heartbeat_seconds > 0", name="heartbeat"),
        CheckConstraint(_among("state", AgentState), name="state"),
        CheckConstraint(
            "kind <> 'remote' OR contact_endpoint IS NOT NULL AND capacity IS NOT NULL",
            name="remote",
        ),
    )


class AgentReport(Base):
    """What an agent said of its state; append-only."""

    __tablename__ = "agent_reports"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.agent_id", ondelete="CASCADE"))
    state: Mapped[str]
    details: Mapped[Json] = mapped_column(JSONB(none_as_null=True), nullable=True)
    at: Mapped[datetime]
    """By the agent's clock, but never later than ours."""
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index(None, "agent_id", "at", "id"),)


class Slot(Base):
    """One of so many that may be at something at once: see `slots`.

    An agent's is free, held by an attempt, or kept for a woken task.
    """

    __tablename__ = "slots"

    pool: Mapped[str] = mapped_column(primary_key=True)
    """Whose it is: an agent's id; `items:` and a `forEach`'s id, `runs:` and a workflow's."""
    number: Mapped[int] = mapped_column(primary_key=True)
    closed: Mapped[bool] = mapped_column(server_default=text("false"))
    """Beyond the capacity: nobody takes it again."""
    holder: Mapped[uuid.UUID | None]
    """The task whose attempt holds it; the item or run that holds it until it is over."""
    attempt: Mapped[int | None]
    lease_expires_at: Mapped[datetime | None]
    """Of an attempt."""
    reserved_for: Mapped[uuid.UUID | None] = mapped_column(index=True)
    """The woken task it is kept for until `reserved_until`."""
    reserved_until: Mapped[datetime | None]
    held_at: Mapped[datetime | None]
    """When it was last taken."""
    freed_at: Mapped[datetime | None]
    """When it was last given back: of equal agents the one that rested longest is asked."""
    failures: Mapped[int] = mapped_column(server_default=text("0"))
    """In a row, of the kind that says that its agent is not there."""
    rests_until: Mapped[datetime | None]
    """After such a failure nobody gets it by a capability before this."""
    average_seconds: Mapped[float | None]
    """How long it was held of late: each time counts for a fifth, what was before for the rest."""

    HOLDS: ClassVar[Mapping[str, str]] = {
        "number": "number >= 1",
        "holder": "CASE WHEN strpos(pool, ':') > 0 THEN attempt IS NULL"
        " ELSE (holder IS NULL) = (attempt IS NULL) END",
        "leased": "(attempt IS NULL) = (lease_expires_at IS NULL)",
        "reserved": "(reserved_for IS NULL) = (reserved_until IS NULL)",
    }
    __table_args__ = (Index("ix_slots_closed", "pool", postgresql_where=text("closed")),)


RUN_STATUS = "status || ''"
"""A run's status, for whoever looks at the runs of all workflows."""


class Run(Base):
    """One execution of one workflow version with one input."""

    __tablename__ = "runs"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    workflow_id: Mapped[str]
    version: Mapped[int]
    agent_id: Mapped[str | None]
    """The agent it was triggered for, if any."""
    status: Mapped[str] = mapped_column(server_default=RunStatus.QUEUED)
    reason: Mapped[str | None]
    generation: Mapped[int] = mapped_column(server_default=text("1"))
    """Raised by every publication of a canvas; only the newest goes on."""
    generation_at: Mapped[datetime] = mapped_column(server_default=func.now())
    priority: Mapped[int] = mapped_column(server_default=text("1"))
    """0 low, 1 normal, 2 high: who is first among those who wait."""
    labels: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    max_concurrent: Mapped[int | None]
    """How many runs of its workflow may be under way at once; while it waits for that it is
    `queued` with the reason `max_concurrent_runs`."""
    input: Mapped[Json] = mapped_column(JSONB)
    output: Mapped[Json] = mapped_column(JSONB(none_as_null=True), nullable=True)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """`{code, message, taskId?}`; set while it still runs, it means: ends as failed, start
    nothing."""
    request_id: Mapped[str | None]
    traceparent: Mapped[str | None]
    """Of its submission: below it are the spans of its attempts (see `tracing`)."""
    cancel_requested_at: Mapped[datetime | None]
    parent_task_id: Mapped[uuid.UUID | None]
    """The task of another run that runs this one as its sub-workflow."""
    depth: Mapped[int] = mapped_column(server_default=text("0"))
    """How many runs it stands below."""
    budget: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """`{max_tokens, max_cost_usd}`, either may be null: what its LLM agents may spend together."""
    rerun_of: Mapped[uuid.UUID | None]
    """The run it is another of, with the same version and input."""
    schedule: Mapped[str | None]
    """The schedule that fired it; also if somebody had it fire."""
    start_at: Mapped[datetime | None]
    """It is `queued` with the reason `start_at` until then. Of a run that was tried again, when
    that was asked for: its time counts from there."""
    deadline_at: Mapped[datetime | None]
    """It fails if it is not over by then."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    HOLDS: ClassVar[Mapping[str, str]] = {
        "status": _among("status", RunStatus),
        "finished": f"({_among('status', RUN_ENDED)}) = (finished_at IS NOT NULL)",
        "queued": "status <> 'queued' OR started_at IS NULL",
        "started": "status NOT IN ('running', 'completed') OR started_at IS NOT NULL",
        "failed": "status <> 'failed' OR error IS NOT NULL",
        "cancelled": "status <> 'cancelled' OR cancel_requested_at IS NOT NULL",
        "priority": "priority BETWEEN 0 AND 2",
        "generation": "generation >= 1",
    }
    __table_args__ = (
        ForeignKeyConstraint(
            ["workflow_id", "version"], ["workflows.workflow_id", "workflows.version"]
        ),
        Index(None, "created_at", "id"),
        Index(None, "workflow_id", "status", "created_at", "id"),
        # An expression, or a list of one workflow's runs is planned by way of this index.
        Index("ix_runs_status", text(f"({RUN_STATUS})"), "created_at", "id"),
        Index(None, "labels", postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}),
        Index(
            "ix_runs_held",
            "workflow_id",
            text("priority DESC"),
            "created_at",
            "id",
            postgresql_where=text("status = 'queued' AND reason = 'max_concurrent_runs'"),
        ),
        Index(
            "ix_runs_start",
            "start_at",
            postgresql_where=text("status = 'queued' AND reason = 'start_at'"),
        ),
        Index(
            "ix_runs_deadline",
            "deadline_at",
            postgresql_where=text(f"deadline_at IS NOT NULL AND NOT {_among('status', RUN_ENDED)}"),
        ),
        Index(
            "ix_runs_schedule",
            "schedule",
            postgresql_where=text(f"schedule IS NOT NULL AND NOT {_among('status', RUN_ENDED)}"),
        ),
        Index(
            "ix_runs_parent_task_id",
            "parent_task_id",
            postgresql_where=text("parent_task_id IS NOT NULL"),
        ),
        Index(
            "ix_runs_open",
            "generation_at",
            postgresql_where=text(f"NOT {_among('status', RUN_ENDED)}"),
        ),
    )


class Task(Base):
    """One node of a workflow within one run; also one row per item of a `forEach`."""

    __tablename__ = "tasks"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    definition_id: Mapped[str]
    """The definition's taskId; empty for the implicit end."""
    kind: Mapped[str]
    """`agent`, `approval`, `delay`, `workflow` (a sub-workflow), `for_each` (the parent of items)
    or `end` (the implicit last task)."""
    item_kind: Mapped[str | None]
    """What the items of a `forEach` are: `agent` or `workflow`."""
    position: Mapped[int]
    """Its place in the definition's topological order."""
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    index: Mapped[int | None]
    item: Mapped[Json] = mapped_column(JSONB(none_as_null=False), nullable=True)
    items: Mapped[int | None]
    """How many items a `forEach` was expanded into; null before that. 0 with what waits for
    something else than an agent (an approval, a moment, a sub-workflow) once it was begun."""
    tolerates: Mapped[int | None]
    """How many items of the `forEach` may fail; null: its `onFailure` decides."""
    undecided: Mapped[bool] = mapped_column(server_default=text("false"))
    """Whether it runs at all is to be said first: by its `when`, or because all that it depends on
    was skipped."""
    decision: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """What was said of an approval: `{approved, comment, principal}`."""
    child_run_id: Mapped[uuid.UUID | None]
    """The run of its sub-workflow."""
    overrides: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """Merged over its parameters since somebody had the run tried again with them."""
    max_parallel: Mapped[int | None]

    depends_on: Mapped[list[uuid.UUID]]
    successors: Mapped[list[uuid.UUID]]
    reads: Mapped[list[str]]
    """Definition ids of the tasks whose outputs its expressions read."""
    is_sink: Mapped[bool] = mapped_column(server_default=text("false"))

    wanted_agent_id: Mapped[str | None]
    wanted_capability: Mapped[str | None]
    fallback: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    """Agents to ask, in this order, while none of those it wants is available."""
    line_agent_id: Mapped[str | None]
    """In whose line it stands; null: in that of all agents with the wanted capability."""
    queue: Mapped[str] = mapped_column(server_default=AGENTS_QUEUE)
    """Where its visits go, unless it is woken for a slot of an agent of another kind."""
    preferred_agent_id: Mapped[str | None]
    agent_id: Mapped[str | None]
    """The agent of the newest attempt."""
    timeout_seconds: Mapped[float]
    max_attempts: Mapped[int]
    retry_backoff: Mapped[float]
    retry_max_backoff: Mapped[float]
    busy_backoff: Mapped[float]
    busy_max_backoff: Mapped[float]
    max_wait_seconds: Mapped[float]
    goes_on: Mapped[bool]
    """`onFailure: continue`: its failure does not end the run."""
    priority: Mapped[int]

    status: Mapped[str]
    reason: Mapped[str | None]
    output: Mapped[Json] = mapped_column(JSONB(none_as_null=True), nullable=True)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))

    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    """The number of the newest attempt: the fence."""
    tries: Mapped[int] = mapped_column(server_default=text("0"))
    """Attempts that failed; `max_attempts` of them are the end."""
    lost: Mapped[int] = mapped_column(server_default=text("0"))
    """Attempts whose worker went silent."""
    claim_token: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    ends_run: Mapped[bool] = mapped_column(server_default=text("false"))
    """The run ends when its running attempts have: whoever finishes this one settles the run."""

    message: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """The parked visit, a Celery signature with its place in the canvas."""
    visit_generation: Mapped[int] = mapped_column(server_default=text("0"))
    """The newest generation whose visit claimed the task or lies in `message`."""
    waiting_since: Mapped[datetime | None]
    """Its place in line: kept while it waits for the same kind of thing."""
    waits: Mapped[int] = mapped_column(server_default=text("0"))
    """How often in a row it was parked as busy; the exponent of the backoff."""
    wake_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    """Its agent took no work and is not asked again before this."""
    woken_at: Mapped[datetime | None]
    """When its newest wake was decided; null again with every park."""
    kept_until: Mapped[datetime | None]
    """A slot is kept for it; as the slot's `reserved_until`, but under the lock of its own row."""

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    HOLDS: ClassVar[Mapping[str, str]] = {
        "kind": _among("kind", ["agent", "approval", "delay", "workflow", "for_each", "end"]),
        "status": _among("status", TaskStatus),
        "finished": f"({_among('status', TASK_ENDED)}) = (finished_at IS NOT NULL)",
        "lease": "(status = 'running' OR status = 'waiting' AND reason = 'remote')"
        " = (lease_expires_at IS NOT NULL)",
        "started": "status <> 'running' OR started_at IS NOT NULL",
        "reason": f"status <> 'waiting' OR ({_among('reason', Reason)}) IS TRUE",
        "failed": "status <> 'failed' OR error IS NOT NULL",
        "item": "(parent_id IS NULL) = (index IS NULL)",
    }
    __table_args__ = (
        Index(None, "run_id", "position", "index"),
        Index(
            "ix_tasks_items",
            "parent_id",
            "index",
            unique=True,
            postgresql_where=text("parent_id IS NOT NULL"),
        ),
        Index(
            "ix_tasks_items_next",
            "parent_id",
            "index",
            postgresql_where=text("status = 'waiting' AND reason = 'max_parallel'"),
        ),
        Index(
            "ix_tasks_leases",
            "lease_expires_at",
            postgresql_where=text("lease_expires_at IS NOT NULL"),
        ),
        Index(
            "ix_tasks_wakes",
            "wake_at",
            # NOT NULL, or a statement planned early may read all who wait by way of this index.
            postgresql_where=text("status = 'waiting' AND wake_at IS NOT NULL"),
        ),
        Index(
            "ix_tasks_held",
            "reason",
            postgresql_where=text(f"status = 'waiting' AND reason NOT IN {IN_LINE}"),
        ),
        Index(
            "ix_tasks_woken",
            "woken_at",
            postgresql_where=text("status = 'waiting' AND woken_at IS NOT NULL"),
        ),
        Index(
            "ix_tasks_items_open",
            "parent_id",
            postgresql_where=text(f"parent_id IS NOT NULL AND status NOT IN {listed(TASK_ENDED)}"),
        ),
        Index("ix_tasks_pending", "run_id", postgresql_where=text("status = 'pending'")),
        Index(
            "ix_tasks_line_agent",
            "line_agent_id",
            text("priority DESC"),
            "waiting_since",
            postgresql_where=text(f"status = 'waiting' AND reason IN {IN_LINE}"),
        ),
        Index(
            "ix_tasks_line_capability",
            "wanted_capability",
            text("priority DESC"),
            "waiting_since",
            postgresql_where=text(
                f"status = 'waiting' AND reason IN {IN_LINE} AND line_agent_id IS NULL"
            ),
        ),
    )


class Attempt(Base):
    """One try at a task by one worker."""

    __tablename__ = "attempts"

    task_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    agent_id: Mapped[str | None]
    worker: Mapped[str]
    status: Mapped[str]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """`{code, message, traceback?}`."""
    progress: Mapped[float | None]
    progress_message: Mapped[str | None]
    token: Mapped[uuid.UUID | None]
    """What its agent showed when it reported the result."""
    report: Mapped[str | None]
    """SHA-256 of that result: the same again gets the same answer."""
    recall_at: Mapped[datetime | None]
    """When its agent is to be told (again) that nobody wants it any more."""
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    HOLDS: ClassVar[Mapping[str, str]] = {
        "status": _among("status", AttemptStatus),
        "finished": "(status = 'running') = (finished_at IS NULL)",
        "number": "number >= 1",
        "progress": "progress BETWEEN 0 AND 1",
    }
    __table_args__ = (
        Index("ix_attempts_recalls", "recall_at", postgresql_where=text("recall_at IS NOT NULL")),
    )


class AttemptLog(Base):
    """A line an agent wrote with `context.log`."""

    __tablename__ = "attempt_logs"

    task_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    message: Mapped[str]
    fields: Mapped[dict[str, Any]]

    __table_args__ = (
        ForeignKeyConstraint(
            ["task_id", "attempt"], ["attempts.task_id", "attempts.number"], ondelete="CASCADE"
        ),
    )


class AgentStep(Base):
    """A step of an LLM agent's work on a task, stored as it came: see `agentkit.steps`."""

    __tablename__ = "agent_steps"

    task_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[uuid.UUID]
    attempt: Mapped[int]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]
    model: Mapped[str | None]
    """Who replied."""
    input_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    output_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cost_usd: Mapped[float | None]
    """Null: nothing was paid, or no price is known."""
    superseded: Mapped[bool] = mapped_column(server_default=text("false"))
    """The task was begun anew: it counts for what was spent, and for nothing else."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    __table_args__ = (
        Index("ix_agent_steps_replies", "run_id", postgresql_where=text("kind = 'reply'")),
    )


class AgentDefinition(Base):
    """One version of an LLM agent that was defined over the API; never changed once written."""

    __tablename__ = "agent_definitions"

    agent_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    definition: Mapped[dict[str, Any]]
    """The fields of `agentkit.llm.LLMAgent`."""
    digest: Mapped[str]
    """SHA-256 of it: the same again is the same version."""
    by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class AgentMemory(Base):
    """A text that an LLM agent keeps beyond its task: see `memories`."""

    __tablename__ = "agent_memories"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    agent_id: Mapped[str]
    """No foreign key: what an agent remembers outlives its registration, and can be deleted."""
    namespace: Mapped[str]
    digest: Mapped[str]
    """SHA-256 of the text: the same one again is the same row."""
    text: Mapped[str]
    words: Mapped[Any] = mapped_column(TSVECTOR)
    """As `agentkit.memory` has them, and where they stand: ` agent` and ` agent/namespace`."""
    added_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    """When it was added last."""
    expires_at: Mapped[datetime | None] = mapped_column()
    """It is not found after that, and is deleted."""

    __table_args__ = (
        Index("uq_agent_memories_text", "agent_id", "namespace", "digest", unique=True),
        Index("ix_agent_memories_added", "agent_id", "namespace", "added_at"),
        Index("ix_agent_memories_words", "words", postgresql_using="gin"),
        Index(
            "ix_agent_memories_expires",
            "expires_at",
            postgresql_where=expires_at.is_not(None),
        ),
    )


class Event(Base):
    """An append-only fact about a run or a schedule, written in the transaction of the change it
    tells."""

    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    run_id: Mapped[uuid.UUID | None]
    """No foreign key: its check would lock the run's row for every change of every task."""
    schedule: Mapped[str | None]
    """No foreign key: what is told of a schedule outlives it."""
    task_id: Mapped[uuid.UUID | None]
    type: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    transaction: Mapped[int] = mapped_column(
        BigInteger, server_default=text("pg_current_xact_id()::text::bigint")
    )
    """Sequences commit out of order: who resumes reads only what is settled, see `queries`."""

    HOLDS: ClassVar[Mapping[str, str]] = {"subject": "(run_id IS NULL) <> (schedule IS NULL)"}
    __table_args__ = (
        Index(None, "run_id", "seq"),
        Index(
            "ix_events_schedule",
            "schedule",
            "seq",
            postgresql_where=text("schedule IS NOT NULL"),
        ),
        Index("ix_events_schedule_at", "at", postgresql_where=text("schedule IS NOT NULL")),
    )


class IdempotencyKey(Base):
    """A key that came with a request which started a run, so that it is started once."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    """SHA-256 of the request: with another one the key is refused."""
    run_id: Mapped[uuid.UUID | None]
    """Null only within the transaction that starts the run. No foreign key: it is soon deleted."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index(None, "created_at"),)


class Schedule(Base):
    """A recurring workflow."""

    __tablename__ = "schedules"

    name: Mapped[str] = mapped_column(primary_key=True)
    workflow_id: Mapped[str]
    version: Mapped[int | None]
    """Null: the newest when it fires."""
    agent_id: Mapped[str | None]
    cron: Mapped[str | None]
    every_seconds: Mapped[float | None]
    timezone: Mapped[str]
    """Of `cron`."""
    input: Mapped[Json] = mapped_column(JSONB)
    """May hold `${firing.at}`."""
    labels: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    priority: Mapped[int] = mapped_column(server_default=text("1"))
    enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    start_at: Mapped[datetime | None]
    end_at: Mapped[datetime | None]
    jitter_seconds: Mapped[float] = mapped_column(server_default=text("0"))
    overlap: Mapped[str]
    catch_up: Mapped[str]
    catch_up_window_seconds: Mapped[float]
    decided_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """What of its moments fires is decided up to here, and never again."""
    next_at: Mapped[datetime | None]
    """When the next moment is due, its jitter included; null: it is paused, or never again."""
    rests_until: Mapped[datetime | None]
    """After trouble nobody foresaw no beat looks at it before this."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint("(cron IS NULL) <> (every_seconds IS NULL)", name="recurrence"),
        CheckConstraint(_among("overlap", Overlap), name="overlap"),
        CheckConstraint(_among("catch_up", CatchUp), name="catch_up"),
        Index(None, "created_at", "name"),
        Index("ix_schedules_due", "next_at", postgresql_where=text("enabled")),
    )


class Firing(Base):
    """One moment of a schedule, decided once."""

    __tablename__ = "firings"

    schedule: Mapped[str] = mapped_column(
        ForeignKey("schedules.name", ondelete="CASCADE"), primary_key=True
    )
    moment: Mapped[datetime] = mapped_column(primary_key=True)
    status: Mapped[str]
    """`waiting` for the run before it to be over, `started`, `skipped` or `failed`."""
    by: Mapped[str]
    """`schedule`, or who had it fire."""
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """`{code, message}` of one that failed or was skipped."""
    run_id: Mapped[uuid.UUID | None]
    decided_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(_among("status", FiringStatus), name="status"),
        Index(
            "ix_firings_waiting",
            "schedule",
            "moment",
            postgresql_where=text("status = 'waiting'"),
        ),
    )


class Worker(Base):
    """A worker's main process, which says every few seconds that it lives: see `presence`."""

    __tablename__ = "workers"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    """As attempts and Flower have it; unique if whoever starts workers takes care of it."""
    host: Mapped[str]
    pid: Mapped[int]
    pool: Mapped[str]
    concurrency: Mapped[int]
    queues: Mapped[list[str]]
    version: Mapped[str | None]
    offer: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    """What it has for LLM agents: see `agentkit.llm.Offer`."""
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Process(Base):
    """A process that tells what it counted: see `metrics`."""

    __tablename__ = "processes"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """`web`, `worker` (a child of a pool, or a worker with threads), `keeper` or `beat`."""
    batch: Mapped[int]
    """The newest counts it told: the same again, after a lost answer, change nothing."""
    pool_size: Mapped[int]
    pool_used: Mapped[int]
    """The most connections it used at once, since it told the last time."""
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Metric(Base):
    """What all processes counted of one thing, ever."""

    __tablename__ = "metrics"

    name: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[list[str]] = mapped_column(primary_key=True)
    """Their values, in the order of their declaration in `tally`."""
    value: Mapped[float]
    """Of a histogram the sum of seconds."""
    buckets: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    """How many fell into each, from the lowest to that without an end; empty if it is none."""


class Lease(Base):
    """A role only one process may act in at a time, such as the keeper's."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]


def rules() -> Iterator[tuple[str, str, str]]:
    """Return table, name and condition of what holds of rows."""
    for table in (Slot, Run, Task, Attempt, Event):
        for name, condition in table.HOLDS.items():
            yield table.__tablename__, name, condition
