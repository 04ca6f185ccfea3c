"""The error tree: every error opscore raises on purpose, one `code` and one sentence each.

    OpsCoreError
    ├── ConfigurationError      a process refuses to start
    │   └── WrongRevision       the database is that of another version
    ├── UpgradeFailed           the tables are as they were
    ├── Invalid                 a document or value cannot be accepted; says where and why
    │   ├── InvalidDefinition
    │   ├── InvalidInput
    │   └── InvalidRequest
    ├── NotFound                AgentNotFound, MemoryNotFound, RunNotFound, ScheduleNotFound,
    │                           TaskNotFound, WorkflowNotFound
    ├── Conflict                KeyReused, WorkflowArchived, ScheduleExists, RunFinished, RunEnding,
    │                           RunNotPaused, RunNotFailed, NothingToRetry, ApprovalRefused,
    │                           ReportRefused, StaleNotice
    ├── Unavailable             a server we need is away
    └── AgentSignal             AgentBusy, RetryLater, GiveUp: what an agent may raise on purpose

The HTTP status of each lives in `web/errors.py` and nowhere else.
"""

from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any, ClassVar

Errors = Mapping[str, Sequence[str]]
"""JSON Pointer of the faulty place -> sentences about it."""


class OpsCoreError(Exception):
    """Something went wrong inside opscore."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str | None = None, **data: Any) -> None:
        self.data = data
        super().__init__(message or cleandoc(type(self).__doc__ or "").format(**data))


class ConfigurationError(OpsCoreError):
    """The settings cannot be used."""

    code = "invalid_configuration"

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("The settings cannot be used:\n" + "\n".join(f"  - {f}" for f in faults))


class WrongRevision(ConfigurationError):
    """The database is that of another version of opscore."""

    code = "wrong_revision"

    def __init__(self, sentence: str) -> None:
        super().__init__([sentence])
        self.args = (sentence,)


class UpgradeFailed(OpsCoreError):
    """The tables cannot be upgraded, and are as they were: {why}."""

    code = "upgrade_failed"


class Invalid(OpsCoreError):
    """The request cannot be accepted as it is."""

    code = "invalid"

    def __init__(self, errors: Errors, message: str | None = None) -> None:
        self.errors = {pointer: list(sentences) for pointer, sentences in errors.items()}
        super().__init__(message)


class InvalidDefinition(Invalid):
    """The workflow definition has faults."""

    code = "invalid_definition"


class InvalidInput(Invalid):
    """The input does not match the workflow's inputSchema."""

    code = "invalid_input"


class InvalidRequest(Invalid):
    """The request does not match its schema."""

    code = "invalid_request"


class NotFound(OpsCoreError):
    """There is no such thing."""

    code = "not_found"


class AgentNotFound(NotFound):
    """There is no agent {agent_id!r}; GET /v1/opscore/agents lists those there are."""

    code = "agent_not_found"


class MemoryNotFound(NotFound):
    """The agent has no memory {memory_id}."""

    code = "memory_not_found"


class RunNotFound(NotFound):
    """There is no run {run_id}."""

    code = "run_not_found"


class ScheduleNotFound(NotFound):
    """There is no schedule {name!r}."""

    code = "schedule_not_found"


class TaskNotFound(NotFound):
    """There is no task {task_id}."""

    code = "task_not_found"


class WorkflowNotFound(NotFound):
    """There is no workflow {workflow_id!r}."""

    code = "workflow_not_found"


class Conflict(OpsCoreError):
    """The present state does not allow this."""

    code = "conflict"


class KeyReused(Conflict):
    """This Idempotency-Key came with another request already; send this one with a new key."""

    code = "idempotency_key_reused"


class WorkflowArchived(Conflict):
    """Workflow {workflow_id!r} is archived; POST .../workflows/{workflow_id}/restore undoes it."""

    code = "workflow_archived"


class RunFinished(Conflict):
    """The run is over: its status is {status}; {way}."""

    code = "run_finished"


class ScheduleExists(Conflict):
    """There is a schedule {name!r} already: PATCH it, or choose another name."""

    code = "schedule_exists"


class RunEnding(Conflict):
    """The run is ending: it was cancelled, or failed and waits for what still runs."""

    code = "run_ending"


class RunNotPaused(Conflict):
    """Only a paused run can be resumed, and its status is {status}."""

    code = "run_not_paused"


class RunNotFailed(Conflict):
    """Only a failed run can be tried again, and its status is {status}; /rerun runs it anew."""

    code = "run_not_failed"


class NothingToRetry(Conflict):
    """No task of the run failed or was cancelled: none can be tried again. /rerun runs it anew."""

    code = "nothing_to_retry"


class ApprovalRefused(Conflict):
    """The approval cannot be decided."""

    code = "approval_refused"


class ReportRefused(Conflict):
    """What the agent reports is not of the present attempt."""

    code = "report_refused"


class StaleNotice(Conflict):
    """A notice of this agent that was signed later was taken already; sign a new one."""

    code = "stale_notice"


class Unavailable(OpsCoreError):
    """A server that is needed does not answer; try again shortly."""

    code = "unavailable"


class AgentSignal(OpsCoreError):
    """What an agent may raise on purpose."""

    code = "agent_signal"


class AgentBusy(AgentSignal):
    """The agent cannot take work now; waiting for it uses up no attempt.

    `retry_after` is in seconds; without it the task's own `busy` backoff decides.
    """

    code = "agent_busy"

    def __init__(self, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__("The agent is busy.")


class RetryLater(AgentSignal):
    """The attempt failed and should be tried again after `seconds`, if attempts are left."""

    code = "retry_later"

    def __init__(self, seconds: float, reason: str = "The agent asked to be tried again.") -> None:
        self.seconds = seconds
        super().__init__(reason)


class GiveUp(AgentSignal):
    """The task cannot succeed; do not try it again."""

    code = "gave_up"

    def __init__(self, reason: str = "The agent gave up.") -> None:
        super().__init__(reason)
