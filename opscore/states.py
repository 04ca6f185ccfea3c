"""Statuses of runs, tasks and attempts, and the arrows between them, as data.

The engine's statements guard themselves; the tests hold every one of them against these arrows,
which they install as triggers, and compare the README's diagram with them.
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


_ENDS = {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED}

RUN_ARROWS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.RUNNING: frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.PAUSED: frozenset(),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}
TASK_ARROWS: Mapping[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.PENDING: frozenset(
        {TaskStatus.RUNNING, TaskStatus.WAITING, TaskStatus.FAILED, TaskStatus.CANCELLED}
    ),
    TaskStatus.WAITING: frozenset({TaskStatus.RUNNING, TaskStatus.PENDING, *_ENDS}),
    TaskStatus.RUNNING: frozenset({TaskStatus.WAITING, *_ENDS}),
    TaskStatus.COMPLETED: frozenset(),
    TaskStatus.FAILED: frozenset(),
    TaskStatus.CANCELLED: frozenset(),
    TaskStatus.SKIPPED: frozenset(),
}
ATTEMPT_ARROWS: Mapping[AttemptStatus, frozenset[AttemptStatus]] = {
    AttemptStatus.RUNNING: frozenset(set(AttemptStatus) - {AttemptStatus.RUNNING}),
    AttemptStatus.COMPLETED: frozenset(),
    AttemptStatus.FAILED: frozenset(),
    AttemptStatus.LOST: frozenset(),
    AttemptStatus.CANCELLED: frozenset(),
}


RUN_ENDED = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED})
TASK_ENDED = frozenset({*_ENDS, TaskStatus.SKIPPED})
