"""The work of a claimed task: what the engine hands out, what the definition's expressions say of
it, and in what words an outcome is told. Nothing here asks a database.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from opscore import logs
from opscore.agentkit import Completed, Failed
from opscore.definition import (
    MAX_SECONDS,
    Approval,
    Child,
    Definition,
    Delay,
    TaskSpec,
    read_moment,
)
from opscore.errors import Invalid, OpsCoreError
from opscore.expressions import ExpressionError, Template
from opscore.json_values import MAX_GATHERED_BYTES, MAX_VALUE_BYTES, check_json, fresh, kind
from opscore.states import Reason, RunStatus

log = logs.get(__name__)


# --- What the engine hands out ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed."""

    code: str
    message: str
    traceback: str | None = None
    retryable: bool = True


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
    """It was begun, and what it waited for is over: items to collect, a decision, a moment, a run.
    """
    is_sink: bool
    agent_id: str | None
    has_slot: bool
    """Its end may free a slot somebody waits for."""
    workflow_id: str
    version: int
    generation: int
    timeout_seconds: float
    deadline_at: datetime
    overrides: Mapping[str, Any] | None
    """Merged over its parameters."""
    decision: Mapping[str, Any] | None
    """`{approved, comment, principal}` of an approval somebody decided."""
    child: Mapping[str, Any] | None
    """`{runId, status, output, error}` of the run of its sub-workflow."""
    input: Any
    tasks: Mapping[str, Any] | None
    """Definition id -> `{output, status, error}` of the tasks its expressions read."""
    request_id: str | None
    """Of the request that submitted its run."""
    traceparent: str | None
    """Of the submission of its run: see `tracing`."""

    @property
    def ids(self) -> dict[str, Any]:
        """What its log lines say of it."""
        return {
            "run_id": self.run_id,
            "task_id": self.task_id,
            "task": self.definition_id,
            "attempt": self.attempt,
            "agent_id": self.agent_id,
            "request_id": self.request_id,
        }

    @property
    def traced(self) -> dict[str, Any]:
        """What a span says of it."""
        workflow = {"workflow_id": self.workflow_id, "workflow_version": self.version}
        return {**self.ids, **workflow, "item_index": self.item_index}


@dataclass(frozen=True, slots=True)
class Undecided:
    """The task could start, but is to be skipped unless its `when` holds: `decide_task`, or
    `skip_task`."""

    task_id: UUID
    run_id: UUID
    definition_id: str
    workflow_id: str
    version: int
    follows_skipped: bool
    """All that it depends on was skipped, and so is this."""
    input: Any
    tasks: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Wait:
    """What a task waits for, until a moment or for so many seconds; neither: without limit."""

    reason: Reason
    seconds: float | None = None
    until: datetime | None = None


# --- Expressions ---------------------------------------------------------------------------------


class TooLarge(ExpressionError):
    """An expression's value is larger than what is stored."""

    code = "output_too_large"


def parameters(claimed: Claimed, spec: TaskSpec) -> dict[str, Any]:
    """Render the parameters; the first task of a triggered run gets the input merged over them.

    An agent may change what it is given, and the next task reads the same input: it is a copy.

    Raises:
        ExpressionError: an expression has no value, or what should be an object is none.
    """
    rendered = spec.parameters.render(_scope(claimed))
    if not isinstance(rendered, dict):
        raise ExpressionError(f"The parameters must give an object, not {kind(rendered)}.")
    if claimed.merges_input and isinstance(claimed.input, dict):
        rendered = rendered | claimed.input
    return dict(fresh(rendered | dict(claimed.overrides or {})))


def items(claimed: Claimed, template: Template) -> list[Any]:
    """Render the items of a `forEach`. Raises ExpressionError, as `parameters` does."""
    values = template.render(_scope(claimed))
    if not isinstance(values, list):
        raise ExpressionError(f"forEach.items must give a list, not {kind(values)}.")
    _check(values, "The items", MAX_GATHERED_BYTES)
    return values


def holds(task: Claimed | Undecided, spec: TaskSpec) -> bool:
    """Tell whether a task is to run. Raises ExpressionError, as `parameters` does."""
    return spec.when is None or spec.when.holds(_scope(task))


# --- What no agent does -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """A sub-workflow is to be started."""

    child: Child
    input: Any


MAX_DEPTH = 8
"""Runs that may stand below each other, the first included."""


class CannotNest(OpsCoreError):
    """The workflow {workflow_id!r} cannot run below itself, nor {most} runs below each other."""

    code = "cannot_nest"


def check_nesting(workflow_id: str, above: Collection[str]) -> None:
    """Accept a sub-workflow below runs of these workflows. Raises CannotNest."""
    if len(above) >= MAX_DEPTH or workflow_id in above:
        raise CannotNest(workflow_id=workflow_id, most=MAX_DEPTH + 1)


def not_begun(error: OpsCoreError) -> Failed:
    """Say why a sub-workflow was not begun, with the first faults of what it was given."""
    faults = list(error.errors.items())[:3] if isinstance(error, Invalid) else []
    told = [str(error), *(f"{pointer}: {said[0]}" for pointer, said in faults)]
    return Failed(error.code, " ".join(told), retryable=False)


def begin(claimed: Claimed, spec: TaskSpec) -> Wait | Start:
    """Say what a task that no agent does waits for. Raises ExpressionError."""
    match spec.does:
        case Approval(timeout_seconds):
            return Wait(Reason.APPROVAL, seconds=timeout_seconds)
        case Delay(seconds=None, until=Template() as until):
            return Wait(Reason.DELAY, until=_moment(until.render(_scope(claimed))))
        case Delay(seconds=Template() as seconds):
            return Wait(Reason.DELAY, seconds=_seconds(seconds.render(_scope(claimed))))
        case Child() as child:
            return Start(child, parameters(claimed, spec))
    raise ValueError(f"{spec.type} tasks are done by agents")


def finish(claimed: Claimed, spec: TaskSpec) -> Completed | Failed:
    """Say what came of it, when what it waited for is over."""
    match spec.does:
        case Approval() as approval:
            return _decided(claimed.decision, approval)
        case Child():
            return _ended(claimed.child or {})
    return Completed(None)


def collected(outputs: list[Any], failed: int, spec: TaskSpec) -> Completed | Failed:
    """Say what came of a `forEach`, of whose items so many failed."""
    tolerated = spec.for_each.tolerated(len(outputs)) if spec.for_each else None
    if tolerated is None or failed <= tolerated:
        return Completed(outputs)
    sentence = f"{failed} of {len(outputs)} items failed; {tolerated} may fail (forEach.tolerate)."
    return Failed("items_failed", sentence, retryable=False)


def too_much_collected() -> Failed:
    """Say that the outputs of a `forEach`'s items are too large together."""
    sentence = f"The items' outputs take more than {MAX_GATHERED_BYTES:,} bytes together."
    return Failed("output_too_large", f"{sentence} Let each return less.", retryable=False)


def _decided(decision: Mapping[str, Any] | None, approval: Approval) -> Completed | Failed:
    if decision is None:
        approved = approval.on_timeout == "approve"
        decision = {"approved": approved, "comment": None, "principal": "timeout"}
    if decision["approved"]:
        return Completed(dict(decision))
    if decision["principal"] == "timeout":
        sentence = f"Nobody decided within {approval.timeout_seconds:g} seconds."
    else:
        sentence = decision["comment"] or f"Rejected by {decision['principal']}."
    return Failed("rejected", sentence, retryable=False)


def _ended(child: Mapping[str, Any]) -> Completed | Failed:
    if child.get("status") == RunStatus.COMPLETED:
        return Completed(child["output"])
    why = (child.get("error") or {}).get("message", "")
    sentence = f"Run {child.get('runId')} of the sub-workflow is {child.get('status')}. {why}"
    return Failed("child_failed", sentence.strip(), retryable=False)


def _moment(value: Any) -> datetime:
    try:
        return read_moment(value)
    except ValueError as error:
        raise ExpressionError(f"until: {error}") from None


def _seconds(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= MAX_SECONDS:
        return float(value)
    sentence = f"seconds must come to a number from 0 to {MAX_SECONDS:,.0f}"
    raise ExpressionError(f"{sentence}; it is {json.dumps(value)[:100]}.")


# --- In what words ------------------------------------------------------------------------------


def as_error(failure: Failure) -> dict[str, Any]:
    """Return a failure as it is stored."""
    error = {"code": failure.code, "message": failure.message}
    return error | ({"traceback": failure.traceback} if failure.traceback else {})


def waited_too_long(reason: str | None) -> Failure:
    """Say that no agent took a task within its `busy.maxWaitSeconds`."""
    if reason == Reason.AGENT_UNAVAILABLE:
        return Failure("agent_unavailable", "No agent that could take it came in time.")
    return Failure("agent_busy_timeout", "Its agent was busy for all of maxWaitSeconds.")


def failed_with_item(
    index: int, error: Mapping[str, Any], *, is_one_too_many: bool
) -> dict[str, Any]:
    """Return the error of a `forEach` that fails with this item: at once, or beyond `tolerate`."""
    sentence = f"Item {index} failed: {error['message']}"
    if is_one_too_many:
        sentence = f"More items failed than forEach.tolerate allows. {sentence}"
        return {"code": "items_failed", "message": sentence}
    return {"code": "item_failed", "message": sentence}


def failed_with_task(task_id: UUID, definition_id: str, error: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error of a run that fails with this task."""
    return {
        "code": error["code"],
        "message": f"Task {definition_id}: {error['message']}",
        "taskId": str(task_id),
        "taskDefinitionId": definition_id,
    }


# --- What a run comes to ------------------------------------------------------------------------


def run_result(
    claimed: Claimed, read: Callable[[], Definition], output: Any
) -> tuple[Any, Failure | None]:
    """Return the output of a run whose last task this is, or why none can be made."""
    try:
        return _run_output(claimed, read(), output), None
    except ExpressionError as error:
        return None, Failure(error.code, str(error))
    except Exception as error:
        log.exception("attempt.broke")
        return None, accident(error)


def accident(error: Exception) -> Failure:
    """Return what is said of a fault that is ours."""
    return Failure("internal_error", f"opscore itself failed: {type(error).__name__}.")


def _run_output(claimed: Claimed, definition: Definition, output: Any) -> Any:
    """Make the run's output: of its expression, else of the outputs of the last tasks."""
    tasks = dict(claimed.tasks or {})
    if claimed.kind != "end":
        done = {"output": output, "status": "completed", "error": None}
        tasks[claimed.definition_id] = done
    if definition.output is None:
        if len(definition.leaves) == 1:
            return tasks[definition.leaves[0]]["output"]
        gathered = {leaf: tasks[leaf]["output"] for leaf in definition.leaves}
        _check(gathered, "The run's output", MAX_GATHERED_BYTES)
        return gathered
    rendered = definition.output.render(_scope(claimed) | {"tasks": tasks})
    _check(rendered, "The run's output", MAX_VALUE_BYTES)
    return rendered


def _scope(claimed: Claimed | Undecided) -> dict[str, Any]:
    run = {"id": str(claimed.run_id), "workflowId": claimed.workflow_id}
    scope = {"input": claimed.input, "tasks": claimed.tasks or {}, "run": run}
    if isinstance(claimed, Claimed) and claimed.item_index is not None:
        scope |= {"item": claimed.item, "index": claimed.item_index}
    return scope


def _check(value: Any, what: str, max_bytes: int) -> None:
    """Make sure that an expression's value can be stored."""
    faults = check_json(value, max_bytes=max_bytes)
    if faults.too_large:
        raise TooLarge(f"{what} cannot be stored: {' '.join(faults[''])}")
    for pointer, sentences in faults.items():
        raise ExpressionError(f"{what} cannot be stored: {pointer} {sentences[0]}")
