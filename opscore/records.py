"""The records of LLM agents' work: each step stored once, under the attempt that made it.

Whoever lost his attempt can store nothing more. The event that tells of a step is written with it;
its texts are shortened, and what looks like a secret is left out of them. The steps themselves hold
all that the agent needs to go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

from opscore.agentkit.model import Reply, Result, Usage
from opscore.agentkit.redaction import MAX_CALL_TEXT, redacted
from opscore.agentkit.steps import Asked, Began, Budget, Decided, Step, dump, kind_of, load
from opscore.db import Prepared, Tx, tell
from opscore.engine.clauses import MINE

_STEPS = Prepared(
    """
SELECT number, kind, data FROM agent_steps
WHERE task_id = :task_id AND NOT superseded ORDER BY number
"""
)
_NEXT = Prepared(
    "SELECT coalesce(max(number) + 1, 0) AS number FROM agent_steps WHERE task_id = :task_id"
)
_ADD = Prepared(
    f"""
WITH mine AS (  -- shared: whoever takes the attempt away waits for this, or this for him
    SELECT t.id, t.run_id FROM tasks t WHERE t.id = :task_id AND {MINE} FOR SHARE
), stored AS (
    INSERT INTO agent_steps (task_id, number, run_id, attempt, kind, data, model, input_tokens,
                             output_tokens, cost_usd)
    SELECT id, :number, run_id, :attempt, :kind, :data, :model, :input_tokens, :output_tokens,
           :cost_usd FROM mine
    -- Whoever had no answer asks again.
    ON CONFLICT (task_id, number) DO UPDATE SET attempt = excluded.attempt
    WHERE agent_steps.attempt = excluded.attempt
    RETURNING task_id, run_id, xmax = 0 AS is_new
), told AS (
    INSERT INTO events (run_id, task_id, type, data)
    SELECT run_id, task_id, :type, :told FROM stored WHERE is_new AND cast(:type AS text) <> ''
)
SELECT run_id, is_new FROM stored
""",
    json=("data", "told"),
)
_DECISION = Prepared(
    f"SELECT t.decision FROM tasks t WHERE t.id = :task_id AND {MINE} FOR NO KEY UPDATE"
)
_HEARD = Prepared("UPDATE tasks SET decision = NULL WHERE id = :task_id")
_BUDGET = Prepared(
    """
WITH RECURSIVE up AS (
    SELECT id, parent_task_id, budget, depth FROM runs WHERE id = :run_id
    UNION ALL
    SELECT r.id, r.parent_task_id, r.budget, r.depth
    FROM up JOIN tasks t ON t.id = up.parent_task_id JOIN runs r ON r.id = t.run_id
), top AS (
    SELECT id, budget FROM up WHERE budget IS NOT NULL ORDER BY depth LIMIT 1
), down AS (
    SELECT id FROM top
    UNION ALL
    SELECT r.id FROM down JOIN tasks t ON t.run_id = down.id AND t.child_run_id IS NOT NULL
    JOIN runs r ON r.parent_task_id = t.id
)
SELECT (SELECT budget FROM top) AS budget, coalesce(sum(s.input_tokens), 0) AS input_tokens,
       coalesce(sum(s.output_tokens), 0) AS output_tokens, sum(s.cost_usd) AS cost_usd
FROM down JOIN agent_steps s ON s.run_id = down.id AND s.kind = 'reply'
"""
)


def steps(tx: Tx, task_id: UUID) -> Sequence[Step]:
    """Return the steps of a task so far, oldest first."""
    return [load(row.kind, row.data) for row in _STEPS(tx, {"task_id": task_id})]


def next_number(tx: Tx, task_id: UUID) -> int:
    """Return the number of the step that comes next."""
    (number,) = _NEXT(tx, {"task_id": task_id}).scalars()
    return int(number)


def take_decision(tx: Tx, task_id: UUID, attempt: int) -> None:
    """Store what somebody decided of a call as a step, if somebody did; in one transaction."""
    row = _DECISION(tx, {"task_id": task_id, "attempt": attempt}).first()
    if row is None or row.decision is None:
        return
    said = row.decision
    asked = [step for step in steps(tx, task_id) if isinstance(step, Asked | Decided)]
    if asked and isinstance(asked[-1], Asked):
        step = Decided(said["approved"], said["comment"], said["principal"])
        add(tx, task_id, attempt, next_number(tx, task_id), step, {})
    _HEARD(tx, {"task_id": task_id})


def add(
    tx: Tx,
    task_id: UUID,
    attempt: int,
    number: int,
    step: Step,
    about: Mapping[str, Any],
    secrets: Sequence[str] = (),
) -> bool:
    """Store a step, once however often it is said; False if the attempt is over.

    `about` is told with it; `secrets` are texts that are not.
    """
    usage = step.usage if isinstance(step, Reply) else Usage()
    type, told = _told(step, about, secrets)
    values = {
        "task_id": task_id,
        "attempt": attempt,
        "number": number,
        "kind": kind_of(step),
        "data": dump(step) | _shown(step, secrets),
        "model": step.model if isinstance(step, Reply) else None,
        **asdict(usage),
        "type": type,
        "told": told,
    }
    row = _ADD(tx, values).first()
    if row is not None and row.is_new:
        ids = {"run_id": row.run_id, "task_id": task_id, "attempt": attempt}
        _log(tx, step, {**ids, "agent_id": about.get("agentId")}, secrets)
    return row is not None


def _shown(step: Step, secrets: Sequence[str]) -> dict[str, Any]:
    """Return what is shown of a call to whoever decides it: only the worker knows its secrets."""
    if not isinstance(step, Asked):
        return {}
    return {"shown": redacted(step.arguments, secrets, MAX_CALL_TEXT)}


def _log(tx: Tx, step: Step, ids: Mapping[str, Any], secrets: Sequence[str]) -> None:
    """Log a step; never what was written or answered, and a tool's name may be made up."""
    match step:
        case Reply(usage=Usage(into, out)):
            said: dict[str, Any] = {"model": step.model, "calls": len(step.calls)}
            tell(tx, "task.model_replied", **ids, **said, input_tokens=into, output_tokens=out)
        case Result():
            tool = redacted(step.tool, secrets)
            tell(tx, "task.tool_called", **ids, tool=tool, is_error=step.is_error)
        case Asked():
            tell(tx, "task.approval_asked", **ids, tool=step.tool)


def _told(
    step: Step, about: Mapping[str, Any], secrets: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Return the event that tells of a step; none of one that others tell of."""
    match step:
        case Reply():
            data = {
                "model": step.model,
                "inputTokens": step.usage.input_tokens,
                "outputTokens": step.usage.output_tokens,
                "costUsd": step.usage.cost_usd,
                "text": step.text,
                "calls": [{"tool": one.tool, "arguments": one.arguments} for one in step.calls],
            }
            return "task.model_replied", redacted({**about, **data}, secrets)
        case Result():
            data = {"tool": step.tool, "isError": step.is_error, "result": step.content}
            return "task.tool_called", redacted({**about, **data}, secrets)
        case Asked():
            data = {"tool": step.tool, "arguments": step.arguments, "again": step.again}
            return "task.approval_asked", redacted({**about, **data}, secrets)
        case Began() | Decided():
            return "", {}


def budget(tx: Tx, run_id: UUID) -> Budget:
    """Return what a run may spend on models, and what was spent of it.

    Runs of sub-workflows spend the budget of the run they stand below.
    """
    (row,) = _BUDGET(tx, {"run_id": run_id})
    said = row.budget or {}
    spent = Usage(int(row.input_tokens), int(row.output_tokens), row.cost_usd)
    return Budget(said.get("max_tokens"), said.get("max_cost_usd"), spent)
