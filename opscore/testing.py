"""Unit tests of workflows: a definition is run in this process, with faked agents and no servers.

    run = simulate(Path("digest.yaml"), input={"tickets": []}, agents={"writer": fake("All well.")})
    assert run.output == "All well."

Statuses, reasons, errors and outputs are the engine's. Time is virtual: what waits or takes long
does so in `run.seconds` only; but an agent that really sleeps is waited for. What operators do to a
run, such as pausing it, is not played.
"""

import inspect
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from opscore import agentkit
from opscore.agentkit import Context, FunctionAgent, Outcome
from opscore.agentkit.function import AgentFunction
from opscore.agentkit.llm import LLMAgent
from opscore.definition import Approval, Definition, check_children, id_of, parse, read_document
from opscore.errors import GiveUp, Invalid, InvalidDefinition
from opscore.simulation import Agent, Decision, NotFaked, Run, Simulation, Task

__all__ = ["NotFaked", "Run", "Task", "after", "approve", "fake", "reject", "simulate"]

HUNG_SECONDS = 60.0
"""An agent that really takes this long is stopped: its attempt has timed out."""


@dataclass(frozen=True, slots=True, eq=False)
class Fake:
    """What stands for an agent: see `fake`."""

    answers: Sequence[Any]
    capabilities: Sequence[str] = ()
    capacity: int | None = None
    away: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class After:
    """An answer that takes its time: see `after`."""

    seconds: float
    answer: Any


Stand = Fake | FunctionAgent | AgentFunction | LLMAgent
"""Who stands for an agent."""
Document = Path | Mapping[str, Any] | str
"""A file in JSON or YAML, a document, or the text of one in YAML."""


def fake(
    *answers: Any,
    capabilities: Sequence[str] = (),
    capacity: int | None = None,
    away: bool = False,
) -> Fake:
    """Stand for an agent that gives one of these answers a call, and the last one ever after.

    An exception is raised, a function `(parameters, context)` is called, anything else is the
    output: `fake(AgentBusy(), ValueError("no"), {"sent": True})`. `capacity` is how many tasks it
    does at a time; one that is `away` is not available.
    """
    return Fake(answers or (None,), capabilities, capacity, away)


def after(seconds: float, answer: Any) -> Any:
    """Have an answer of `fake` take so long, or what a function returns, or a decision."""
    if isinstance(answer, Decision):
        return replace(answer, seconds=answer.seconds + seconds)
    return After(seconds, answer)


def approve(comment: str | None = None, *, by: str = "key:test") -> Decision:
    """Approve, as soon as it is asked for."""
    return Decision(True, comment, by)


def reject(comment: str | None = None, *, by: str = "key:test") -> Decision:
    """Reject, as soon as it is asked for."""
    return Decision(False, comment, by)


@contextmanager
def _showing_faults(where: str = "") -> Iterator[None]:
    """Have a traceback show every fault of what is refused."""
    try:
        yield
    except Invalid as error:
        if not hasattr(error, "__notes__"):
            for pointer, sentences in error.errors.items():
                error.add_note(f"{where}{pointer}: {' '.join(sentences)}")
        raise


@_showing_faults()
def simulate(
    workflow: Document,
    *,
    input: Any = None,
    agents: Mapping[str, Stand] | None = None,
    approvals: Mapping[str, Decision] | None = None,
    workflows: Mapping[str, Document | Fake] | None = None,
    agent_id: str | None = None,
    at: datetime | None = None,
) -> Run:
    """Run a workflow to its end and return what became of it.

    Args:
        workflow: what is run.
        input: its input; without one it is `{}`.
        agents: id or capability -> `fake(...)`, or a function `(parameters, context)`; if that is
            one below `@agent`, its capabilities and its capacity count. An `LLMAgent` works with
            its model and its tools, and remembers until the end; give it a scripted model.
        approvals: task -> `approve()` or `reject()`; of others nobody says anything.
        workflows: id -> a sub-workflow, in whatever version; a `fake` is called with its input.
        agent_id: the agent it is triggered for.
        at: when it begins, an aware moment; else now.

    Raises:
        InvalidDefinition, InvalidInput, InvalidRequest: it would be refused; with every fault.
        NotFaked: it asks for an agent, an approval or a workflow that is not given.
    """
    stands, documents = dict(agents or {}), {}
    for id, one in (workflows or {}).items():
        if isinstance(one, Fake) and stands.setdefault(id, one) is not one:
            raise ValueError(f"agents and workflows both have {id!r}: give it a document.")
        task = {"taskId": id, "agentId": id, "parameters": "${input}"}
        with _showing_faults(f"workflows[{id!r}] "):
            documents[id] = _read({"id": id, "tasks": [task]} if isinstance(one, Fake) else one)
    definition = _read(workflow)
    documents[workflow_id := id_of(definition)] = definition

    def find(id: str, version: int | None) -> Definition:
        if id not in documents:
            way = f"pass workflows={{{id!r}: ...}}, a document or fake(...)"
            raise NotFaked(f"A task runs the workflow {id!r}, which is not there: {way}.")
        return documents[id]

    check_children(workflow_id, definition, find)
    _check_approvals(approvals or (), documents.values())
    players = [_player(id, stand) for id, stand in stands.items()]
    simulation = Simulation(players, find, approvals or {}, at or datetime.now(UTC))
    return simulation.play(workflow_id, {} if input is None else input, agent_id)


def _read(workflow: Document) -> Definition:
    if isinstance(workflow, Mapping):
        return parse(dict(workflow))
    if isinstance(workflow, Path):
        is_json = workflow.suffix == ".json"
        return parse(read_document(workflow.read_bytes(), "json" if is_json else "yaml"))
    document = read_document(workflow, "yaml")
    if isinstance(document, str):
        way = f"pass Path({document[:100]!r}) if that is a file"
        raise InvalidDefinition({"": [f"This text is no document; {way}."]})
    return parse(document)


def _check_approvals(names: Iterable[str], documents: Iterable[Definition]) -> None:
    tasks = [task for definition in documents for task in definition.tasks]
    known = {task.id for task in tasks if isinstance(task.does, Approval)}
    if wrong := sorted(set(names) - known):
        raise ValueError(f"There is no approval {wrong[0]!r}; there are {sorted(known)}.")


def _player(id: str, stand: Stand) -> Agent:
    if isinstance(stand, LLMAgent):
        stand = Fake([_worker(stand)], stand.capabilities, stand.capacity)
    if not isinstance(stand, Fake):
        declared = stand if isinstance(stand, FunctionAgent) else agentkit.declared(stand)
        if declared is not None:
            stand = Fake([declared.function], declared.capabilities, declared.capacity)
        elif callable(stand) and not inspect.isclass(stand):
            stand = Fake([stand])
        else:
            raise TypeError(f"agents[{id!r}] must be fake(...) or a function, not {stand!r}.")
    offers = frozenset({id, *stand.capabilities})
    return Agent(id, _Caller(id, stand.answers), offers, stand.capacity, stand.away)


def _worker(agent: LLMAgent) -> AgentFunction:
    """Return a function that works as the agent does, and goes on where an attempt before ended."""
    from opscore.agentkit.running import Attempt, Means  # with asyncio, for who has such agents
    from opscore.agentkit.steps import InMemory

    means, records = Means(environment=os.environ), defaultdict[str, InMemory](InMemory)

    async def work(parameters: Mapping[str, Any], context: Context) -> Any:
        attempt = Attempt(agent, records[context.task_id], means)
        output = await attempt.as_function.function(parameters, context)
        if attempt.needs_approval:
            raise GiveUp("It asks whether it may call a tool; approvals of calls are not played.")
        return output

    return work


class _Caller:
    """Calls who stands for an agent, as a worker would, and says how long that took."""

    def __init__(self, id: str, answers: Sequence[Any]) -> None:
        self._agent = FunctionAgent(id, id, "1", (), None, self._answer)
        self._answers = list(answers)
        self._seconds = 0.0

    def __call__(self, parameters: dict[str, Any], context: Context) -> tuple[Outcome, float]:
        self._seconds = 0.0
        call = partial(agentkit.call, self._agent, parameters, context, HUNG_SECONDS)
        if "asyncio" not in sys.modules or not sys.modules["asyncio"]._get_running_loop():
            return call(), self._seconds
        with ThreadPoolExecutor(1) as thread:  # an `async def` agent gets a loop of its own
            return thread.submit(call).result(), self._seconds

    def _answer(self, parameters: dict[str, Any], context: Context) -> Any:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return self._told(answer, parameters, context)

    def _told(self, answer: Any, parameters: dict[str, Any], context: Context) -> Any:
        """Raise, call or return what is given as an answer, once its time is taken down."""
        if isinstance(answer, After):
            self._seconds += answer.seconds
            return self._told(answer.answer, parameters, context)
        is_class = inspect.isclass(answer)
        if isinstance(answer, BaseException) or (is_class and issubclass(answer, BaseException)):
            raise answer
        result = answer(parameters, context) if callable(answer) else answer
        if inspect.isawaitable(result):
            return self._awaited(result, parameters, context)
        return self._told(result, parameters, context) if isinstance(result, After) else result

    async def _awaited(self, result: Any, parameters: dict[str, Any], context: Context) -> Any:
        value = await result
        return self._told(value, parameters, context) if isinstance(value, After) else value
