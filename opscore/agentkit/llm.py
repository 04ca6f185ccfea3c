"""Declaring an LLM agent, with everything that can be wrong with the declaration.

What can be known at once is refused at once: an unknown provider, tool or script, limits that
contradict each other, a schema that is none. Whether there is a key for a model, and what speaks to
its provider, is known to the worker that loads the agent: `check_keys`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Self

from opscore.agentkit.builtin import BUILT_IN, OF_MEMORY
from opscore.agentkit.scripted import SCRIPTS
from opscore.agentkit.tools import TOOLS, Tool
from opscore.errors import ConfigurationError

if TYPE_CHECKING:
    from opscore.input_schema import Schema

KEYS: Mapping[str, tuple[str, ...]] = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "google": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "openrouter": ("OPENROUTER_API_KEY",),
    "scripted": (),
}
"""Provider -> the environment variables any of which may hold its key; none: it needs no key."""

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "openai": ("pydantic_ai", "openai"),
    "anthropic": ("pydantic_ai", "anthropic"),
    "google": ("pydantic_ai", "google.genai"),
    "openrouter": ("pydantic_ai", "openai"),
    "scripted": (),
}
"""Provider -> what of the extra `agents` speaks to it."""

FINAL_ANSWER = "final_answer"
"""The tool by which an agent with an output schema answers."""
INSTALL = "pip install 'opscore[agents]'"
PROXY = "mcp_proxy_tool"
"""The tool by which a model calls any tool of any MCP server."""
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


Fault = tuple[str, str]
"""Where a declaration is faulty, as `limits/call_seconds`, and what about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a process has for LLM agents. None: it is not known, and not asked."""

    tools: Mapping[str, float]
    """Name -> how many seconds it may take; those that are built in besides."""
    scripts: Collection[str]
    providers: Collection[str] | None = None
    servers: Mapping[str, float] | None = None
    """MCP servers that are enabled: name -> `timeoutSeconds`."""
    built_in: Collection[str] = tuple(BUILT_IN)

    @classmethod
    def here(cls) -> Self:
        """Return what was declared in this process."""
        return cls(tools={tool.name: tool.seconds for tool in TOOLS.values()}, scripts=(*SCRIPTS,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much an agent may do at one task, over all of its attempts; and for how long at a time.

    A tool takes less than a model, a model less than an attempt.
    """

    max_steps: int = 20
    """Replies of models."""
    max_tokens: int | None = None
    max_cost_usd: float | None = None
    max_seconds: float = 600.0
    """Of one attempt; the task's `timeoutSeconds` ends it too."""
    call_seconds: float = 120.0
    """Of one call of a model."""
    window_tokens: int = 100_000
    """What is sent to a model at most; the oldest tool results are left out first."""
    corrections: int = 2
    """How often an answer that is none may be given anew."""

    def faults(self) -> Iterator[Fault]:
        """Say what is wrong with them."""
        for name in ("max_steps", "max_seconds", "call_seconds", "window_tokens"):
            if not getattr(self, name) > 0:
                yield f"limits/{name}", f"{name} must be more than 0"
        for name in ("max_tokens", "max_cost_usd", "corrections"):
            if (getattr(self, name) or 0) < 0:
                yield f"limits/{name}", f"{name} must not be less than 0"
        if self.call_seconds >= self.max_seconds:
            yield (
                "limits/call_seconds",
                f"call_seconds ({self.call_seconds:g}) must be less than "
                f"max_seconds ({self.max_seconds:g})",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What an agent may reach beyond its own tools, as patterns such as `docs/*`; else nothing."""

    mcp: tuple[str, ...] = ()
    """Tools of MCP servers, as `server/tool`."""
    hosts: tuple[str, ...] = ()
    """Hosts of `http_get`."""

    def allows_mcp(self, server: str, tool: str) -> bool:
        """Say whether a tool of a server may be called."""
        return any(fnmatchcase(f"{server}/{tool}", pattern) for pattern in self.mcp)

    def allows_host(self, host: str) -> bool:
        """Say whether something may be fetched from a host."""
        return any(fnmatchcase(host.lower(), pattern.lower()) for pattern in self.hosts)


@dataclass(frozen=True, kw_only=True)
class LLMAgent:
    """An agent that is a language model with instructions and tools.

    Args:
        agent_id: its id, as in a workflow's `agentId`.
        model: `provider:model`; providers are `openai`, `anthropic`, `google`, `openrouter` and
            `scripted`. There is no default.
        fallback_models: asked in this order when the one before gives no answer.
        instructions: what it is told before every task.
        tools: its tools, by name or as the functions that `@tool` stands above; built in are
            `http_get` (of hosts in `permissions.hosts`), `read_file`, `write_file` and `list_files`
            in a folder of the run, `remember` and `recall`.
        mcp_servers: MCP servers, by their names in the file that `OPSCORE_MCP_CONFIG` names; which
            of their tools it may call is said in `permissions.mcp`.
        memory: the namespace of what it remembers (the name of one, as ids are); None: it has no
            memory. It is used by the tools `remember` and `recall` alone.
        output_schema: JSON Schema of its answers; None: they are text.
        capabilities, capacity, version, name: as of a function agent.

    Raises:
        ConfigurationError: naming every fault of the declaration.
    """

    agent_id: str
    model: str
    fallback_models: Sequence[str] = ()
    instructions: str = ""
    tools: Sequence[str | Callable[..., Any]] = ()
    mcp_servers: Sequence[str] = ()
    memory: str | None = None
    output_schema: Mapping[str, Any] | None = None
    permissions: Permissions = field(default_factory=Permissions)
    limits: Limits = field(default_factory=Limits)
    capabilities: Sequence[str] = ()
    capacity: int | None = None
    version: str = "1"
    name: str = ""

    kind: ClassVar[str] = "llm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.agent_id)
        if faults := [fault for _, fault in self.faults(Offer.here())]:
            raise ConfigurationError([f"LLMAgent({self.agent_id!r}) {one}" for one in faults])

    @property
    def models(self) -> tuple[str, ...]:
        """All of its models, in the order they are asked."""
        return (self.model, *self.fallback_models)

    @cached_property
    def toolbox(self) -> Mapping[str, Tool]:
        """Its tools that are functions, by name."""
        return {name: TOOLS[name] for name in map(_tool_name, self.tools) if name in TOOLS}

    @cached_property
    def built_in(self) -> tuple[str, ...]:
        """The names of its tools that are built in."""
        names = dict.fromkeys(map(_tool_name, self.tools))
        return tuple(name for name in names if name not in TOOLS)

    @cached_property
    def answer(self) -> "Schema | None":
        """The schema of its answers, compiled."""
        if self.output_schema is None:
            return None
        from opscore.input_schema import Schema

        return Schema(self.output_schema)

    def missing_keys(self, environment: Mapping[str, str]) -> list[str]:
        """Say which of its models there is no key for in an environment."""
        return [
            f"LLMAgent({self.agent_id!r}) has the model {model}, and {' or '.join(names)} is not "
            "set where the worker runs"
            for model in self.models
            if (names := KEYS[model.partition(":")[0]])
            and not any(environment.get(name) for name in names)
        ]

    def faults(self, offer: Offer) -> Iterator[Fault]:
        """Say what is wrong with the agent for a process that has so much."""
        if not _ID.fullmatch(self.agent_id):
            yield "agent_id", "has a bad id: it must be 1 to 64 letters, digits, '_', '.' or '-'"
        places = ["model", *(f"fallback_models/{n}" for n in range(len(self.fallback_models)))]
        for place, model in zip(places, self.models, strict=True):
            yield from ((place, fault) for fault in _model_faults(model, offer))
        for number, name in enumerate(map(_tool_name, self.tools)):
            yield from ((f"tools/{number}", fault) for fault in self._tool_faults(name, offer))
        yield from (("memory", fault) for fault in self._memory_faults())
        yield from self.limits.faults()
        yield from self._schema_faults()
        yield from self._server_faults(offer)

    def _tool_faults(self, name: str, offer: Offer) -> Iterator[str]:
        built_in = BUILT_IN[name].seconds if name in offer.built_in else None
        seconds = offer.tools.get(name, built_in)
        if name in (FINAL_ANSWER, PROXY):
            yield f"has a tool {name}: that name is taken, give it another"
        elif seconds is None:
            there = ", ".join(sorted({*offer.tools, *offer.built_in}))
            yield f"has an unknown tool {name!r}: there are {there}"
        elif name in offer.tools and name in BUILT_IN:
            yield f"has a tool {name}, as one is called that is built in: rename it"
        elif seconds >= self.limits.call_seconds:
            yield (
                f"has the tool {name}, which may take {seconds:g} s: that must be "
                f"less than limits.call_seconds ({self.limits.call_seconds:g})"
            )

    def _memory_faults(self) -> Iterator[str]:
        tools = [name for name in map(_tool_name, self.tools) if name in OF_MEMORY]
        if self.memory is None and tools:
            yield f"has the tool {tools[0]}, and no memory: name its namespace"
        if self.memory is not None and not tools:
            yield f"has a memory, and no tool to use it: list {' or '.join(OF_MEMORY)}"
        if self.memory is not None and not _ID.fullmatch(self.memory):
            yield "has a bad memory: its namespace must be 1 to 64 letters, digits, '_', '.' or '-'"

    def _schema_faults(self) -> Iterator[Fault]:
        if self.output_schema is None:
            return
        from opscore.input_schema import Schema
        from opscore.json_values import Faults

        faults = Faults()
        Schema.compile(self.output_schema, "", faults)
        for place, sentences in faults.items():
            told = f"has a bad output_schema, {place or 'as a whole'}: {' '.join(sentences)}"
            yield f"output_schema{place}", told

    def _server_faults(self, offer: Offer) -> Iterator[Fault]:
        if self.permissions.mcp and not self.mcp_servers:
            yield "permissions/mcp", "has permissions for MCP tools, and no mcp_servers: name them"
        if self.mcp_servers and not self.permissions.mcp:
            way = 'give permissions.mcp, "docs/*"'
            yield "mcp_servers", f"has mcp_servers none of whose tools it may call: {way}"
        for place, name in enumerate(self.mcp_servers if offer.servers is not None else ()):
            seconds = (offer.servers or {}).get(name)
            if seconds is None:
                there = ", ".join(sorted(offer.servers or ())) or "none"
                yield (
                    f"mcp_servers/{place}",
                    f"has an unknown MCP server {name!r}: there are {there}",
                )
            elif seconds >= self.limits.call_seconds:
                yield (
                    f"mcp_servers/{place}",
                    f"has the MCP server {name}, whose timeoutSeconds ({seconds:g}) must be less "
                    f"than limits.call_seconds ({self.limits.call_seconds:g})",
                )


class _Draft(LLMAgent):
    """One that nobody has judged yet."""

    def __post_init__(self) -> None:
        pass


def faults_of(values: Mapping[str, Any], offer: Offer) -> list[Fault]:
    """Say what is wrong with an agent of these values: see `agent_of`."""
    return list(_Draft(**_parts(values)).faults(offer))


def agent_of(values: Mapping[str, Any], version: int) -> LLMAgent:
    """Return the agent of stored values: the fields of `LLMAgent`, nested ones as mappings.

    Raises:
        ConfigurationError: this process has not all that it needs.
    """
    return LLMAgent(**_parts(values), version=str(version))


def _parts(values: Mapping[str, Any]) -> dict[str, Any]:
    permissions = {name: tuple(patterns) for name, patterns in values["permissions"].items()}
    return {
        **values,
        "permissions": Permissions(**permissions),
        "limits": Limits(**values["limits"]),
    }


def _tool_name(tool: str | Callable[..., Any]) -> str:
    if isinstance(tool, str):
        return tool
    found = (one.name for one in TOOLS.values() if one.function is tool)
    return next(found, getattr(tool, "__name__", repr(tool)))


def _model_faults(model: str, offer: Offer) -> Iterator[str]:
    provider, separator, name = model.partition(":")
    if not separator or not name:
        yield f'has the model {model!r}: write "provider:model", such as "openai:gpt-5"'
    elif provider not in KEYS:
        yield f"has an unknown provider {provider!r}: there are {', '.join(KEYS)}"
    elif provider == "openrouter" and "/" not in name:
        yield f'has the model {model!r}: OpenRouter\'s are "maker/model", such as "openai/gpt-5"'
    elif provider == "scripted" and name not in offer.scripts:
        yield f"has an unknown script {name!r}: there are {', '.join(sorted(offer.scripts))}"
    elif offer.providers is not None and provider not in offer.providers:
        yield f"has the model {model!r}: no worker that lives has a key for {provider}"


def missing_package(model: str) -> str | None:
    """Say what to install for a model, in a sentence; None if all is there. Imports none of it."""
    needed = PACKAGES[model.partition(":")[0]]
    return None if all(map(_is_installed, needed)) else f"{model} needs: {INSTALL}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is in
        return False


def check_keys(agents: Iterable[object], environment: Mapping[str, str]) -> None:
    """Make sure that each model of each LLM agent has its key, and the packages that speak to it.

    Raises:
        ConfigurationError: naming all that are missing.
    """
    llms = [agent for agent in agents if isinstance(agent, LLMAgent)]
    faults = [fault for one in llms for fault in one.missing_keys(environment)]
    faults += [
        f"LLMAgent({one.agent_id!r}) has the model {fault}"
        for one in llms
        for model in one.models
        if (fault := missing_package(model)) is not None
    ]
    if faults:
        raise ConfigurationError(faults)
