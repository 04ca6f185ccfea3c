"""What the expressions of a definition say for a claimed task: its parameters, its items, and what
its run comes to. Nothing here asks a database.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opscore import logs
from opscore.agentkit import Completed, Failed
from opscore.config import MAX_GATHERED_BYTES, MAX_VALUE_BYTES
from opscore.definition import (
    MAX_SECONDS,
    Approval,
    Child,
    Definition,
    Delay,
    TaskSpec,
    read_moment,
)
from opscore.engine import Claimed, Failure, Undecided, Wait
from opscore.expressions import ExpressionError, Template
from opscore.json_values import check_json, fresh, kind
from opscore.states import Reason, RunStatus

log = logs.get(__name__)


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


def holds(task: Undecided, spec: TaskSpec) -> bool:
    """Tell whether a task is to run. Raises ExpressionError, as `parameters` does."""
    return spec.when is None or spec.when.holds(_scope(task))


# --- What no agent does -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """A sub-workflow is to be started."""

    child: Child
    input: Any


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
