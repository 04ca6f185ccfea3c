"""Statuses of runs, tasks and attempts, and the arrows between them, as data.

The engine's statements guard themselves; the tests hold every one of them against these arrows,
which they install as triggers, and compare the diagram of docs/concepts.md with them.
"""

from collections.abc import Mapping
from enum import StrEnum


class RunStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskStatus(StrEnum):
    PENDING = "pending"
    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


class AttemptStatus(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"


class AgentState(StrEnum):
    """What an agent says of itself; a report, never a lock."""

    UNKNOWN = "UNKNOWN"
    INITIALIZING = "initializing"
    IDLE = "idle"
    ACTIVE = "active"
    ERROR = "error"
    FINISHED = "finished"


class Reason(StrEnum):
    """Why a task waits."""

    AGENT_BUSY = "agent_busy"
    AGENT_UNAVAILABLE = "agent_unavailable"
    RETRY = "retry"
    REMOTE = "remote"
    DEPENDENCIES = "dependencies"
    MAX_PARALLEL = "max_parallel"
    CHILDREN = "children"
    APPROVAL = "approval"
    DELAY = "delay"
    PAUSED = "paused"


class FiringStatus(StrEnum):
    """What became of one moment of a schedule."""

    WAITING = "waiting"
    STARTED = "started"
    SKIPPED = "skipped"
    FAILED = "failed"


class Overlap(StrEnum):
    """What a schedule does while its run before is not over."""

    SKIP = "skip"
    QUEUE = "queue"
    CANCEL_PREVIOUS = "cancel_previous"
    ALLOW = "allow"


class CatchUp(StrEnum):
    """Which of the moments fire that were missed while no beat ran."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


_RUN_ENDS = {RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED}
_ENDS = {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED}

RUN_ARROWS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset(
        {RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FAILED, RunStatus.CANCELLED}
    ),
    RunStatus.RUNNING: frozenset({RunStatus.PAUSED, *_RUN_ENDS}),
    # What ran when it was paused may be the last of it.
    RunStatus.PAUSED: frozenset({RunStatus.QUEUED, RunStatus.RUNNING, *_RUN_ENDS}),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset({RunStatus.QUEUED}),  # somebody has what failed tried again
    RunStatus.CANCELLED: frozenset(),
}
TASK_ARROWS: Mapping[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.PENDING: frozenset(
        {
            *(TaskStatus.RUNNING, TaskStatus.WAITING),
            *(TaskStatus.SKIPPED, TaskStatus.FAILED, TaskStatus.CANCELLED),
        }
    ),
    TaskStatus.WAITING: frozenset(
        {TaskStatus.RUNNING, TaskStatus.PENDING, TaskStatus.SKIPPED, *_ENDS}
    ),
    TaskStatus.RUNNING: frozenset({TaskStatus.WAITING, *_ENDS}),
    TaskStatus.COMPLETED: frozenset(),
    # Of a failed run that is tried again.
    TaskStatus.FAILED: frozenset({TaskStatus.PENDING, TaskStatus.WAITING}),
    TaskStatus.CANCELLED: frozenset({TaskStatus.PENDING, TaskStatus.WAITING}),
    TaskStatus.SKIPPED: frozenset(),
}
ATTEMPT_ARROWS: Mapping[AttemptStatus, frozenset[AttemptStatus]] = {
    AttemptStatus.RUNNING: frozenset(set(AttemptStatus) - {AttemptStatus.RUNNING}),
    AttemptStatus.COMPLETED: frozenset(),
    AttemptStatus.FAILED: frozenset(),
    AttemptStatus.LOST: frozenset(),
    AttemptStatus.CANCELLED: frozenset(),
}


RUN_ENDED = frozenset(_RUN_ENDS)
TASK_ENDED = frozenset({*_ENDS, TaskStatus.SKIPPED})
