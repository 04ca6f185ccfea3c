"""An attempt of an LLM agent in a worker: the loop, with its record in PostgreSQL."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from opscore import agentkit, memories, records
from opscore.agentkit import Completed, Context, Outcome
from opscore.agentkit.llm import LLMAgent
from opscore.agentkit.model import Call, Reply, Result
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.steps import Budget, Step, Superseded
from opscore.db import Tx
from opscore.work import Claimed

T = TypeVar("T")


class Insist(Protocol):
    """Runs statements that are safe to repeat until the database has answered."""

    def __call__(self, statement: Callable[[Tx], T], *, whole: bool = False) -> T: ...


@dataclass(frozen=True, slots=True)
class Undecided:
    """The agent goes on when somebody has decided a call."""


class Stored:
    """The record of one attempt."""

    def __init__(self, claimed: Claimed, insist: Insist, secrets: Sequence[str] = ()) -> None:
        self._claimed, self._insist, self._secrets = claimed, insist, secrets
        self._number = 0
        self._calls: dict[str, Call] = {}

    def load(self) -> Sequence[Step]:
        """Return the steps, with what was decided since the last of them."""
        task_id, attempt = self._claimed.task_id, self._claimed.attempt

        def read(tx: Tx) -> tuple[Sequence[Step], int]:
            records.take_decision(tx, task_id, attempt)
            return records.steps(tx, task_id), records.next_number(tx, task_id)

        steps, self._number = self._insist(read, whole=True)
        for step in steps:
            self._see(step)
        return steps

    def add(self, step: Step) -> None:
        """Store a step; see `steps.Record`."""
        claimed, number = self._claimed, self._number
        self._see(step)
        about: dict[str, Any] = {"attempt": claimed.attempt, "agentId": claimed.agent_id}
        if isinstance(step, Result) and step.call_id in self._calls:
            about["arguments"] = self._calls[step.call_id].arguments
        is_mine = self._insist(
            lambda tx: records.add(
                tx, claimed.task_id, claimed.attempt, number, step, about, self._secrets
            )
        )
        if not is_mine:
            raise Superseded
        self._number += 1

    def budget(self) -> Budget:
        """Return what the run may still spend."""
        return self._insist(lambda tx: records.budget(tx, self._claimed.run_id))

    def _see(self, step: Step) -> None:
        if isinstance(step, Reply):
            self._calls = {call.id: call for call in step.calls}


def call(
    agent: LLMAgent,
    claimed: Claimed,
    parameters: dict[str, Any],
    context: Context,
    insist: Insist,
    means: Means,
) -> Outcome | Undecided:
    """Have the agent go on with its task, and return what came of it."""
    means = replace(means, memory=partial(memories.Stored, insist))
    attempt = Attempt(agent, Stored(claimed, insist, means.secrets), means)
    outcome = agentkit.call(attempt.as_function, parameters, context, claimed.timeout_seconds)
    if attempt.needs_approval and isinstance(outcome, Completed):
        return Undecided()
    return outcome
