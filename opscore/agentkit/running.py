"""Running an LLM agent as if it were a function: what it needs is put together for one attempt."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from opscore.agentkit.builtin import BUILT_IN, Fetch
from opscore.agentkit.context import Context
from opscore.agentkit.function import FunctionAgent
from opscore.agentkit.llm import KEYS, LLMAgent, Offer, missing_package
from opscore.agentkit.loop import Job, NeedsApproval, Stopped, goal_of, work
from opscore.agentkit.mcp_config import Server, server_faults
from opscore.agentkit.memory import Memory, Shelf
from opscore.agentkit.model import Model
from opscore.agentkit.providers import Hosted
from opscore.agentkit.providers import model_of as hosted
from opscore.agentkit.redaction import redacted
from opscore.agentkit.scripted import SCRIPTS, Scripted
from opscore.agentkit.steps import Record
from opscore.agentkit.tools import AnyTool
from opscore.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the process offers its LLM agents."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where keys are."""
    servers: Mapping[str, Server] = field(default_factory=dict)
    """MCP servers, by name."""
    files: Path | None = None
    """Where runs have their folders."""
    fetch: Fetch | None = None
    """Gets what a URL leads to."""
    memory: Callable[[str, str], Memory] = field(default_factory=Shelf)
    """Gives an agent's memory, by the agent's id and the namespace; in this process by default."""

    @property
    def secrets(self) -> Sequence[str]:
        """Texts that are shown to nobody."""
        names = chain.from_iterable(KEYS.values())
        keys = [self.environment[name] for name in names if self.environment.get(name)]
        return keys + [one for server in self.servers.values() for one in server.secrets]


def check_means(agents: Iterable[object], means: Means) -> None:
    """Make sure that LLM agents can have the servers and built-in tools they name.

    Raises:
        ConfigurationError: naming all they cannot have.
    """
    llms = [agent for agent in agents if isinstance(agent, LLMAgent)]
    faults = [f"LLMAgent({one.agent_id!r}) {fault}" for one in llms for fault in _lacks(one, means)]
    if faults:
        raise ConfigurationError(faults)


def _lacks(agent: LLMAgent, means: Means) -> Iterator[str]:
    yield from server_faults(agent, means.servers)
    for name in agent.built_in:
        if (fault := BUILT_IN[name].fault(agent, means)) is not None:
            yield fault


def offer_of(means: Means) -> Offer:
    """Return all that a process with these means has for LLM agents."""
    providers = [
        provider
        for provider, names in KEYS.items()
        if (not names or any(means.environment.get(name) for name in names))
        and missing_package(f"{provider}:") is None
    ]
    lacks = {
        *(("read_file", "write_file", "list_files") if means.files is None else ()),
        *(("http_get",) if means.fetch is None else ()),
    }
    return replace(
        Offer.here(),
        providers=providers,
        servers={one.name: one.seconds for one in means.servers.values() if one.enabled},
        built_in=[name for name in BUILT_IN if name not in lacks],
    )


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
        async with self._models() as models, self._tools(context) as tools:
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
            except Stopped as end:  # what is wrong with an answer names parts of it
                raise Stopped(end.code, redacted(str(end), self._means.secrets)) from None

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
    async def _tools(self, context: Context) -> AsyncIterator[Mapping[str, AnyTool]]:
        """Give all that the agent may call."""
        from opscore.agentkit import mcp

        agent, means = self._agent, self._means
        built_in = {name: BUILT_IN[name].make(agent, context, means) for name in agent.built_in}
        own: Mapping[str, AnyTool] = {**agent.toolbox, **built_in}
        async with mcp.opened(agent, means.servers, [*own]) as others:
            yield {**own, **others}


def model_of(name: str, environment: Mapping[str, str]) -> Model:
    """Return the model called `provider:model`.

    Raises:
        ConfigurationError: it needs a key or a package, and the worker has none.
    """
    provider, _, model = name.partition(":")
    if provider == "scripted":
        return Scripted(model, SCRIPTS[model])
    return hosted(name, environment)
