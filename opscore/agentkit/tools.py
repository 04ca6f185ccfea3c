"""Tools: what a model may call, mostly Python functions.

A tool's JSON Schema comes from its signature, its description from its docstring. Arguments are
checked before it is called, and whatever it raises is an error the model is told. `once` marks an
effect that must not happen twice: see `loop`.
"""

import contextvars
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from opscore.agentkit.context import Context, storable_text
from opscore.agentkit.model import ToolSpec
from opscore.agentkit.output import Unstorable, to_json
from opscore.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio

MAX_RESULT_BYTES = 32 * 1024
"""Of what a model is told of one call, unless its tool says otherwise; longer results are cut."""
TOOL_SECONDS = 30.0
"""What a tool may take, unless it says otherwise."""
STOPPING_SECONDS = 0.5
"""Given to an `async def` tool after that, to clean up."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What all providers take."""

Function = TypeVar("Function", bound=Callable[..., Any])


class ToolFault(Exception):
    """The call came to nothing; the model is told this sentence."""


class Unsure(ToolFault):
    """Nobody knows whether the call had its effect."""


class TimedOut(Unsure):
    """It did not end in time, and may go on."""


class AnyTool(Protocol):
    """What a model may call: see `Tool`."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> ToolSpec:
        """The tool as a model sees it."""

    def is_once(self, arguments: Any) -> bool:
        """Say whether the effect of such a call must not happen twice."""

    def needs_approval(self, arguments: Any) -> bool:
        """Say whether somebody must say yes to such a call."""

    async def call(self, arguments: Any, context: Context) -> str:
        """Call it and return what the model is told.

        Raises:
            ToolFault: nothing came of it; `Unsure`: or perhaps something did.
        """


@dataclass(frozen=True)
class Tool:
    """A function a model may call."""

    name: str
    description: str
    function: Callable[..., Any]
    seconds: float = TOOL_SECONDS
    once: bool = False
    """Its effect must not happen twice."""
    approval: bool = False
    """Somebody must say yes to each call."""
    max_bytes: int = MAX_RESULT_BYTES
    """Of what a model is told of one call; longer results are cut."""

    def is_once(self, _arguments: Any) -> bool:
        return self.once

    def needs_approval(self, _arguments: Any) -> bool:
        return self.approval

    @cached_property
    def spec(self) -> ToolSpec:
        """The tool as a model sees it."""
        return ToolSpec(self.name, self.description, self._schema)

    @cached_property
    def _schema(self) -> Mapping[str, Any]:
        schema: dict[str, Any] = self._arguments.model_json_schema()
        schema.pop("title", None)
        for one in schema.get("properties", {}).values():
            one.pop("title", None)
        return schema

    @cached_property
    def _context_names(self) -> frozenset[str]:
        return frozenset(
            name
            for name, one in inspect.signature(self.function, eval_str=True).parameters.items()
            if one.annotation is Context
        )

    @cached_property
    def _arguments(self) -> Any:
        from pydantic import ConfigDict, create_model

        parameters = inspect.signature(self.function, eval_str=True).parameters
        fields: dict[str, Any] = {
            name: (
                Any if one.annotation is one.empty else one.annotation,
                ... if one.default is one.empty else one.default,
            )
            for name, one in parameters.items()
            if name not in self._context_names
        }
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)

    def check(self) -> list[str]:
        """Say what is wrong with the tool."""
        if not _NAME.fullmatch(self.name):
            return [f"the tool name {self.name!r} must be 1 to 64 letters, digits, '_' or '-'"]
        kinds = {one.kind for one in inspect.signature(self.function).parameters.values()}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return [f"the tool {self.name} takes *args or **kwargs: name each parameter"]
        if not 0 < self.seconds < math.inf:
            return [f"the tool {self.name} may take {self.seconds:g} s: that must be more than 0"]
        if not self.description:
            return [f"the tool {self.name} has no docstring, by which a model knows what it is for"]
        try:
            _ = self.spec
        except Exception as error:  # pydantic's, of an annotation it has no schema for
            return [f"the tool {self.name} has a parameter without a JSON Schema: {error}"]
        return []

    async def call(self, arguments: Any, context: Context) -> str:
        """Call it and return what the model is told.

        Raises:
            ToolFault: bad arguments, an exception, no answer in time, or no JSON.
        """
        import asyncio  # a tenth of a second that a process with plain agents need not spend

        given = self._checked(arguments) | dict.fromkeys(self._context_names, context)
        # Not by `asyncio.timeout`: what came while others held the event loop up came in time, a
        # tool's own CancelledError is none of ours, and one that swallows it is not waited for.
        answering = asyncio.ensure_future(self._answer(given))
        answering.add_done_callback(_seen)
        try:
            done, _ = await asyncio.wait([answering], timeout=self.seconds)
            if not done:
                answering.cancel()
                await asyncio.wait([answering], timeout=STOPPING_SECONDS)
                raise TimedOut(f"{self.name} did not answer within {self.seconds:g} s.")
        finally:
            answering.cancel()
        try:
            return told(answering.result(), self.max_bytes)
        except ToolFault:
            raise
        except (Exception, asyncio.CancelledError) as error:
            raise _fault(error) from error

    def _checked(self, arguments: Any) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            model = self._arguments.model_validate(arguments)
        except ValidationError as error:
            faults = "; ".join(
                f"{'/'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}"
                for one in error.errors(include_url=False)[:5]
            )
            raise ToolFault(f"The arguments do not fit: {faults}") from None
        return {name: getattr(model, name) for name in type(model).model_fields}

    async def _answer(self, given: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**given)
        return await in_thread(lambda: self.function(**given))


def _seen(answering: "asyncio.Future[Any]") -> None:
    """Keep what comes after the time from being logged as an exception that nobody retrieved."""
    if not answering.cancelled():
        answering.exception()


def _fault(error: BaseException) -> ToolFault:
    return ToolFault(storable_text(f"{type(error).__name__}: {error}", MAX_RESULT_BYTES))


def told(value: Any, max_bytes: int = MAX_RESULT_BYTES) -> str:
    """Return a tool's result as the text a model gets: text as it is, all else as JSON.

    Raises:
        ToolFault: it is no JSON.
    """
    if not isinstance(value, str):
        try:
            value = json.dumps(to_json(value), ensure_ascii=False)
        except Unstorable as error:
            raise ToolFault(str(error)) from None
    text = storable_text(value, len(value) * 4)
    return cut(text, max_bytes)


def cut(text: str, most: int) -> str:
    """Return text of at most `most` bytes, which says how much was cut."""
    whole = text.encode()
    if len(whole) <= most:
        return text
    return f"{whole[:most].decode(errors='ignore')}\n[cut: {len(whole) - most:,} bytes more]"


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a thread that nobody waits for once its time is over.

    The event loop's own threads would hold up the end of the attempt until they have ended.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            outcome = (future.set_result, context.run(function))
        except BaseException as error:
            # StopIteration cannot be set on a future, and what ends a thread ends no worker.
            is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            told = error if is_plain else RuntimeError(f"{type(error).__name__}: {error}")
            outcome = (future.set_exception, told)
        with suppress(RuntimeError):  # the attempt is over, and its loop closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="tool", daemon=True).start()
    return await future


class Toolbox(Mapping[str, Tool]):
    """The tools declared in this process, by name."""

    def __init__(self) -> None:
        self._tools: dict[str, Tool] = {}

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    def add(self, tool: Tool) -> None:
        """Make a tool known.

        Raises:
            ConfigurationError: it cannot be one, or another function has its name.
        """
        faults = tool.check()
        known = self._tools.get(tool.name)
        if known is not None and _place(known.function) != _place(tool.function):
            faults.append(f"the tool {tool.name} is declared twice: give one of them another name")
        if faults:
            raise ConfigurationError(faults)
        self._tools[tool.name] = tool


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))


TOOLS = Toolbox()


@overload
def tool(function: Function, /) -> Function: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    seconds: float = TOOL_SECONDS,
    once: bool = False,
    approval: bool = False,
) -> Callable[[Function], Function]: ...
def tool(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    seconds: float = TOOL_SECONDS,
    once: bool = False,
    approval: bool = False,
) -> Any:
    """Declare the function below as a tool, and leave it as it is.

    Args:
        name: what models and agents call it; the function's name where none is given.
        description: what models are told it is for; the docstring where none is given.
        seconds: how long a call may take.
        once: its effect must not happen twice: after a crash in its midst somebody is asked.
        approval: each call waits until somebody has said yes to its arguments.

    A parameter annotated as `Context` gets the attempt's, and models do not see it.

    Raises:
        ConfigurationError: naming every fault of the declaration.
    """

    def declare(function: Function) -> Function:
        title = name or function.__name__
        words = description or inspect.getdoc(function) or ""
        TOOLS.add(Tool(title, words, function, seconds, once, approval))
        return function

    return declare if function is None else declare(function)
