"""The record of an LLM agent's work on one task: what was answered, begun, done, asked and decided.

Each step is stored as it comes. Whoever takes the task up again, after a crash, a retry or an
approval, loads them and goes on behind the last one. A step of a call stands after the reply that
asked for it, and before the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from opscore.agentkit.model import Call, Reply, Result, Usage


@dataclass(frozen=True, slots=True)
class Began:
    """A call of a `once` tool is being made: without a result nobody knows what came of it."""

    call_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody is to say whether a call is made: for the first time, or (`again`) perhaps not."""

    call_id: str
    tool: str
    arguments: Any
    again: bool = False


@dataclass(frozen=True, slots=True)
class Decided:
    """What somebody said of the call that was asked about last."""

    approved: bool
    comment: str | None = None
    by: str | None = None


Step = Reply | Began | Result | Asked | Decided
_KINDS: Mapping[str, type[Any]] = {
    "reply": Reply,
    "began": Began,
    "result": Result,
    "asked": Asked,
    "decided": Decided,
}


def kind_of(step: Step) -> str:
    """Return the word by which a kind of step is stored."""
    return next(name for name, kind in _KINDS.items() if isinstance(step, kind))


def dump(step: Step) -> dict[str, Any]:
    """Return a step as it is stored, beside its kind."""
    return asdict(step)


def load(kind: str, data: Mapping[str, Any]) -> Step:
    """Return a step as it was before it was stored."""
    values = {name: value for name, value in data.items() if name != "shown"}  # see `records`
    if kind == "reply":
        values["calls"] = tuple(Call(**call) for call in values["calls"])
        values["usage"] = Usage(**values["usage"])
    step: Step = _KINDS[kind](**values)
    return step


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend on models, over all of its tasks, and what it has spent."""

    max_tokens: int | None = None
    max_cost_usd: float | None = None
    spent: Usage = field(default_factory=Usage)

    @property
    def fault(self) -> str | None:
        """Say what is spent, in a sentence; None if something is left."""
        if self.max_tokens is not None and self.spent.tokens >= self.max_tokens:
            return f"The run has used {self.spent.tokens:,} of {self.max_tokens:,} tokens."
        cost = self.spent.cost_usd or 0.0
        if self.max_cost_usd is not None and cost >= self.max_cost_usd:
            return f"The run has cost {cost:.4f} of {self.max_cost_usd:g} USD."
        return None


class Record(Protocol):
    """Where the steps of one attempt are stored."""

    def load(self) -> Sequence[Step]:
        """Return what was stored of the task, by all of its attempts, oldest first."""

    def add(self, step: Step) -> None:
        """Store a step; it is safe when this returns.

        Raises:
            Superseded: the attempt is over, and whoever has the task now goes on without this.
        """

    def budget(self) -> Budget:
        """Return what the run may still spend."""


class Superseded(Exception):
    """The attempt was lost or ended: nothing of it counts any more."""


class InMemory:
    """A record for tests and trials."""

    def __init__(self, steps: Sequence[Step] = (), budget: Budget | None = None) -> None:
        self.steps = list(steps)
        self._budget = budget or Budget()

    def load(self) -> Sequence[Step]:
        return tuple(self.steps)

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def budget(self) -> Budget:
        spent = total([step.usage for step in self.steps if isinstance(step, Reply)])
        return Budget(self._budget.max_tokens, self._budget.max_cost_usd, spent)


def total(usages: Sequence[Usage]) -> Usage:
    """Add up; the cost is None if none is known."""
    costs = [usage.cost_usd for usage in usages if usage.cost_usd is not None]
    return Usage(
        sum(usage.input_tokens for usage in usages),
        sum(usage.output_tokens for usage in usages),
        sum(costs) if costs else None,
    )
