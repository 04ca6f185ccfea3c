"""Declaring function agents, and finding the modules that declare them.

The registry is of this process; which agents exist is written to PostgreSQL by the worker that
loads them. A faulty declaration is refused when its module is imported, not when a task first needs
it.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

from opscore.agentkit.llm import LLMAgent
from opscore.errors import ConfigurationError

AgentFunction = Callable[..., Any]
"""`(parameters: dict, context: Context) -> JSON`, or an `async def` of the same shape."""

Decorated = TypeVar("Decorated", bound=AgentFunction)

_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ID_RULE = "must be 1 to 64 letters, digits, '_', '.' or '-'"


@dataclass(frozen=True, slots=True)
class FunctionAgent:
    """An agent that is a Python function. `capacity` is in attempts at once; None is no limit."""

    agent_id: str
    name: str
    version: str
    capabilities: tuple[str, ...]
    capacity: int | None
    function: AgentFunction
    kind: ClassVar[str] = "function"


Agent = FunctionAgent | LLMAgent


class Registry(Mapping[str, Agent]):
    """The agents that have been declared, by id."""

    def __init__(self) -> None:
        self._agents: dict[str, Agent] = {}
        self._loaded: set[str] = set()

    def __getitem__(self, agent_id: str) -> Agent:
        return self._agents[agent_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._agents)

    def __len__(self) -> int:
        return len(self._agents)

    def agent(
        self,
        agent_id: str,
        *,
        capabilities: Sequence[str] = (),
        capacity: int | None = None,
        version: str = "1",
        name: str | None = None,
    ) -> Callable[[Decorated], Decorated]:
        """Declare the function below as an agent, and leave it as it is.

        Args:
            agent_id: its id, as in a workflow's `agentId`.
            capabilities: what it can do, as in a workflow's `agentCapability`.
            capacity: how many attempts it takes at once, over all workers; None is no limit.
            version: its version, for those who look at it.
            name: its name for people; the id where none is given.

        Raises:
            ConfigurationError: naming every fault of the declaration.
        """

        def declare(function: Decorated) -> Decorated:
            faults = _faults(agent_id, capabilities, capacity, version, name, function)
            if faults:
                raise ConfigurationError([f"@agent({agent_id!r}) {fault}" for fault in faults])
            title = agent_id if name is None else name
            unique = tuple(dict.fromkeys(capabilities))
            self.add(FunctionAgent(agent_id, title, version, unique, capacity, function))
            return function

        return declare

    def add(self, agent: Agent) -> None:
        """Register `agent`; one declared at the same place again replaces itself.

        Raises:
            ConfigurationError: another one has its id.
        """
        known = self._agents.get(agent.agent_id)
        if known and _place_of(known) != _place_of(agent):
            raise ConfigurationError(
                [
                    f"@agent({agent.agent_id!r}) is declared twice, at {_place_of(known)} "
                    f"and at {_place_of(agent)}: give one of them another id"
                ]
            )
        self._agents[agent.agent_id] = agent

    def declared(self, function: object) -> FunctionAgent | None:
        """Return what `@agent` above this very function says; None if there is none."""
        functions = (a for a in self._agents.values() if isinstance(a, FunctionAgent))
        return next((a for a in functions if a.function is function), None)

    def function(self, agent_id: str) -> FunctionAgent | None:
        """Return the function agent with this id; None if there is none."""
        found = self._agents.get(agent_id)
        return found if isinstance(found, FunctionAgent) else None

    def load(self, modules: Sequence[str]) -> Self:
        """Import `modules` from the Python path or the current folder; return all agents declared.

        Raises:
            ConfigurationError: naming every module that is missing, fails, or declares no agent.
        """
        _look_in_current_folder()
        faults = [fault for name in modules for fault in self._load(name)]
        if faults:
            raise ConfigurationError(faults)
        return self

    def _load(self, name: str) -> list[str]:
        if name in self._loaded:
            return []
        before = len(self._agents)
        try:
            module = importlib.import_module(name)
            for value in vars(module).values():
                if isinstance(value, LLMAgent):
                    self.add(value)
        except ConfigurationError as error:
            return [f"module {name}: {fault}" for fault in error.faults]
        except (Exception, SystemExit) as error:
            return [_import_fault(name, error)]
        if len(self._agents) == before and not self._declares_any(module):
            way = "put @agent(...) above a function in it, or an LLMAgent(...)"
            return [f"module {name} declares no agent: {way}"]
        self._loaded.add(name)
        return []

    def _declares_any(self, module: ModuleType) -> bool:
        held = {id(value) for value in vars(module).values()}
        functions = [a.function for a in self._agents.values() if isinstance(a, FunctionAgent)]
        names = [function.__module__ for function in functions]
        return any(
            name == module.__name__ or name.startswith(f"{module.__name__}.") for name in names
        ) or any(id(one) in held for one in (*functions, *self._agents.values()))


_REGISTRY = Registry()
agent = _REGISTRY.agent
declared = _REGISTRY.declared
load_agents = _REGISTRY.load


def _faults(
    agent_id: object,
    capabilities: object,
    capacity: object,
    version: object,
    name: object,
    function: object,
) -> list[str]:
    faults = []
    if not isinstance(agent_id, str) or not _ID.fullmatch(agent_id):
        faults.append(f"has a bad id: it {_ID_RULE}")
    if isinstance(capabilities, str):
        faults.append(f"needs a list of capabilities: write capabilities=[{capabilities!r}]")
    elif not _are_ids(capabilities):
        faults.append(f"has a bad capability among {capabilities!r}: each {_ID_RULE}")
    if not _is_capacity(capacity):
        faults.append(
            f"has capacity={capacity!r}: give a whole number from 1, or None for no limit"
        )
    if not isinstance(version, str) or not version:
        faults.append(f'has version={version!r}: give text, such as version="1"')
    if name is not None and (not isinstance(name, str) or not name):
        faults.append(f"has name={name!r}: give text, or leave it out")
    return faults + _function_faults(function)


def _are_ids(values: object) -> bool:
    return isinstance(values, Sequence | set | frozenset) and all(
        isinstance(value, str) and _ID.fullmatch(value) for value in values
    )


def _is_capacity(value: object) -> bool:
    return value is None or (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
    )


def _function_faults(function: object) -> list[str]:
    if not callable(function) or inspect.isclass(function):
        return ["must stand above a function"]
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return ["stands above a generator: return one value instead of yielding several"]
    try:
        inspect.signature(function).bind({}, None)
    except TypeError:
        return ["stands above a function that cannot be called as f(parameters, context)"]
    return []


def _place_of(agent: Agent) -> str:
    return _place(agent.function) if isinstance(agent, FunctionAgent) else f"LLMAgent {id(agent)}"


def _place(function: AgentFunction) -> str:
    """Say where `function` is written, the same for every import of that place."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{code.co_filename}:{code.co_firstlineno}"


def _look_in_current_folder() -> None:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a folder `web` there must not stand in front of ours


def _import_fault(name: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and _leads_to(error.name, name):
        way_out = f" (a module's name, not a file's: {_as_module(name)})" if _is_path(name) else ""
        return f"there is no module {name}{way_out}; looked on the Python path and in {Path.cwd()}"
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # its traceback ends in Python's own importing
        what, place = f"SyntaxError: {error.msg}", f"{error.filename}:{error.lineno}"
    else:
        where = next(
            frame
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if not frame.filename.startswith("<frozen ")
        )
        place = f"{where.filename}:{where.lineno}"
    return f"module {name} cannot be imported: {what} ({place})"


def _leads_to(missing: str, name: str) -> bool:
    return name == missing or name.startswith(f"{missing}.")


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".py")


def _as_module(name: str) -> str:
    return name.removesuffix(".py").strip("./").replace("/", ".")
