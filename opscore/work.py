"""What the expressions of a definition say for a claimed task: its parameters, its items, and what
its run comes to. Nothing here asks a database.
"""

from collections.abc import Callable
from typing import Any

from opscore import logs
from opscore.definition import Definition, TaskSpec
from opscore.engine import Claimed, Failure
from opscore.expressions import ExpressionError, Template
from opscore.json_values import check_json, fresh, kind

log = logs.get(__name__)


def parameters(claimed: Claimed, spec: TaskSpec) -> dict[str, Any]:
    """Render the parameters; the first task of a triggered run gets the input merged over them.

    An agent may change what it is given, and the next task reads the same input: it is a copy.
    """
    rendered: dict[str, Any] = spec.parameters.render(_scope(claimed))
    if claimed.merges_input and isinstance(claimed.input, dict):
        rendered = rendered | claimed.input
    return dict(fresh(rendered))


def items(claimed: Claimed, template: Template) -> list[Any]:
    """Render the items of a `forEach`. Raises ExpressionError, as `parameters` does."""
    values = template.render(_scope(claimed))
    if not isinstance(values, list):
        raise ExpressionError(f"forEach.items must give a list, not {kind(values)}.")
    _check(values, "The items")
    return values


def run_result(
    claimed: Claimed, read: Callable[[], Definition], output: Any
) -> tuple[Any, Failure | None]:
    """Return the output of a run whose last task this is, or why none can be made."""
    try:
        return _run_output(claimed, read(), output), None
    except ExpressionError as error:
        return None, Failure("expression_error", str(error))
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
            return output
        return {leaf: tasks[leaf]["output"] for leaf in definition.leaves}
    rendered = definition.output.render(_scope(claimed) | {"tasks": tasks})
    _check(rendered, "The run's output")
    return rendered


def _scope(claimed: Claimed) -> dict[str, Any]:
    run = {"id": str(claimed.run_id), "workflowId": claimed.workflow_id}
    scope = {"input": claimed.input, "tasks": claimed.tasks or {}, "run": run}
    if claimed.item_index is not None:
        scope |= {"item": claimed.item, "index": claimed.item_index}
    return scope


def _check(value: Any, what: str) -> None:
    """Make sure that an expression's value can be stored."""
    for pointer, sentences in check_json(value).items():
        raise ExpressionError(f"{what} cannot be stored: {pointer} {sentences[0]}".strip())
