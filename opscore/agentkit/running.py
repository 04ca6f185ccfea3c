"""Running an LLM agent as if it were a function: what it needs is put together for one attempt."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from opscore.agentkit.context import Context
from opscore.agentkit.function import FunctionAgent
from opscore.agentkit.llm import KEYS, LLMAgent
from opscore.agentkit.loop import Job, NeedsApproval, goal_of, work
from opscore.agentkit.model import Model
from opscore.agentkit.providers import Hosted
from opscore.agentkit.providers import model_of as hosted
from opscore.agentkit.scripted import SCRIPTS, Scripted
from opscore.agentkit.steps import Record
from opscore.agentkit.tools import Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the process offers its LLM agents."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where keys are."""

    @property
    def secrets(self) -> Sequence[str]:
        """Texts that are shown to nobody."""
        names = chain.from_iterable(KEYS.values())
        return [self.environment[name] for name in names if self.environment.get(name)]


class Attempt:
    """One attempt of an LLM agent at a task."""

    def __init__(self, agent: LLMAgent, record: Record, means: Means) -> None:
        self._agent, self._record, self._means = agent, record, means
        self.needs_approval = False
        """It ended because somebody has to decide a call."""

    @property
    def as_function(self) -> FunctionAgent:
        """The agent as `calling.call` takes one."""
        agent = self._agent
        return FunctionAgent(
            agent.agent_id,
            agent.name,
            agent.version,
            tuple(agent.capabilities),
            agent.capacity,
            self._run,
        )

    async def _run(self, parameters: Mapping[str, Any], context: Context) -> Any:
        goal = goal_of(parameters)
        async with self._models() as models, self._tools() as tools:
            job = Job(
                agent=self._agent,
                goal=goal,
                context=context,
                record=self._record,
                models=models,
                tools=tools,
            )
            try:
                return await work(job)
            except NeedsApproval:
                self.needs_approval = True
                return None

    @asynccontextmanager
    async def _models(self) -> AsyncIterator[Sequence[Model]]:
        """Give the agent's models, and close their connections: those belong to this event loop."""
        models = [model_of(name, self._means.environment) for name in self._agent.models]
        async with AsyncExitStack() as stack:
            for model in models:
                if isinstance(model, Hosted):
                    stack.push_async_callback(model.close)
            yield models

    @asynccontextmanager
    async def _tools(self) -> AsyncIterator[Mapping[str, Tool]]:
        """Give all that the agent may call."""
        yield self._agent.toolbox


def model_of(name: str, environment: Mapping[str, str]) -> Model:
    """Return the model called `provider:model`.

    Raises:
        ConfigurationError: it needs a key or a package, and the worker has none.
    """
    provider, _, model = name.partition(":")
    if provider == "scripted":
        return Scripted(model, SCRIPTS[model])
    return hosted(name, environment)
