"""MCP servers and their tools, for one attempt of an agent.

Nothing of a server is trusted: it may be away, slow, or lie about anything. What it does is an
error of the call at hand, which the model is told; the attempt goes on. All of a server's
connection lives in a task of its own, in the attempt's event loop, and is closed with the attempt.
"""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from opscore.agentkit.context import Context, storable_text
from opscore.agentkit.llm import PROXY, LLMAgent, Permissions
from opscore.agentkit.mcp_config import Server
from opscore.agentkit.model import ToolSpec
from opscore.agentkit.redaction import redacted
from opscore.agentkit.tools import MAX_RESULT_BYTES, AnyTool, TimedOut, ToolFault, Unsure, told

if TYPE_CHECKING:
    from mcp import Client

log = logging.getLogger(__name__)  # opscore's own lines need what agents do without

MAX_TOOLS = 64
"""Of one server that the model sees as tools of their own; it can call all others by the proxy."""
MAX_SPEC_BYTES = 64 * 1024
"""Of those together, as JSON."""
MAX_SCHEMA_BYTES = 16 * 1024
MAX_DESCRIPTION_BYTES = 2048
MAX_LISTED = 1000
"""Tools of one server that are looked at."""
MAX_PAGES = 20
"""In which a server may list its tools."""
MAX_NAMED = 50
"""Tools that the description of the proxy names of each server."""
MAX_PARTS = 100
"""Of one result."""
MAX_HTTP_BYTES = 16 * 1024 * 1024
"""Of one HTTP response; a stream that is longer has ended."""
CLOSE_SECONDS = 0.8
"""For all servers; whoever is cancelled has a second, and processes end without us."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/ -]{1,128}", re.ASCII)
"""Of tools that are listed. Providers take less: see `_name_for`."""


@asynccontextmanager
async def opened(
    agent: LLMAgent, servers: Mapping[str, Server], taken: Sequence[str] = ()
) -> AsyncIterator[Mapping[str, AnyTool]]:
    """Give the tools of an agent's servers, and the proxy; close the servers afterwards, always.

    A server that cannot be opened costs no more than its tools. `taken` are names of other tools.
    """
    if not agent.mcp_servers:
        yield {}
        return
    lines = [_Line(servers[name], agent.permissions) for name in dict.fromkeys(agent.mcp_servers)]
    try:
        await asyncio.gather(*(line.open() for line in lines))
        tools: dict[str, AnyTool] = {PROXY: _Proxy(lines)}
        for line in lines:
            tools.update((tool.name, tool) for tool in line.tools([*taken, *tools]))
        yield tools
    finally:
        await _close(lines)


async def _close(lines: Sequence["_Line"]) -> None:
    tasks = [task for line in lines if (task := line.ending()) is not None]
    try:
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.sleep(0)
    finally:
        for line in lines:
            line.let_go()


class _Line:
    """The connection to one server: a task that opens it, holds it, and closes it."""

    def __init__(self, server: Server, permissions: Permissions) -> None:
        self.server, self._permissions = server, permissions
        self.listed: Sequence[Any] = ()
        """The tools that may be called, as the server describes them."""
        self.fault = ""
        """Why it cannot be used."""
        self._client: Client | None = None
        self._child: Any = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._over = asyncio.Event()

    def allows(self, tool: str) -> bool:
        return self._permissions.allows_mcp(self.server.name, tool)

    # Opening and closing

    async def open(self) -> None:
        """Open it, in time, or note why not."""
        self._task = asyncio.create_task(self._hold())
        await self._ready.wait()

    async def _hold(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self.server.seconds):
                    self._client = await self._connect(stack)
                    self.listed = await self._list()
                self._ready.set()
                await self._over.wait()
        except TimeoutError:
            self.fault = f"it did not answer within {self.server.seconds:g} s"
        except Exception as error:
            self.fault = _reason(error)
        finally:
            self._client = None
            self.fault = self._end or self.fault or "it is closed"
            if not self._over.is_set():
                self._complain()
            self._ready.set()

    @property
    def _end(self) -> str | None:
        """Say how the server's process ended, if it did."""
        return self._child.end if self._child is not None else None

    async def _connect(self, stack: AsyncExitStack) -> "Client":
        from mcp import Client

        transport = self._by_url(stack) if self.server.url else self._by_command()
        client = Client(await transport, cache=None)
        return await stack.enter_async_context(client)

    async def _by_command(self) -> Any:
        from opscore.agentkit import mcp_stdio

        self._child = mcp_stdio.Child(self.server.command, self.server.environment)
        return mcp_stdio.opened(self._child)

    async def _by_url(self, stack: AsyncExitStack) -> Any:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        http = httpx2.AsyncClient(
            headers={**self.server.headers, "Accept-Encoding": "identity"},
            # The end of waiting is ours; a stream of notes may be silent for as long as it likes.
            timeout=httpx2.Timeout(self.server.seconds, read=None),
            event_hooks={"response": [_bound]},
        )
        await stack.enter_async_context(http)
        return streamable_http_client(self.server.url, http_client=http)

    def _complain(self) -> None:
        said = self._child.said.decode(errors="replace") if self._child else ""
        told = {
            "server": self.server.name,
            "reason": redacted(self.fault, self.server.secrets),
            "stderr": redacted(said[-400:], self.server.secrets),
        }
        log.warning("mcp.server_failed", extra=told)

    def ending(self) -> asyncio.Task[None] | None:
        """Begin to close it, and return what will have ended then."""
        self._over.set()
        if self._task is not None and not self._ready.is_set():
            self._task.cancel()  # it is still being opened
        return self._task

    def let_go(self) -> None:
        if self._child is not None:
            self._child.let_go()

    # Its tools

    async def _list(self) -> Sequence[Any]:
        """Return what may be called of what the server has, in the order of names."""
        from mcp.types import ListToolsRequest, ListToolsResult, PaginatedRequestParams

        assert self._client is not None
        found: dict[str, Any] = {}
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            request = ListToolsRequest(params=PaginatedRequestParams(cursor=cursor))
            page = await self._client.session.send_request(request, ListToolsResult)
            for tool in page.tools[: MAX_LISTED - len(found)]:
                if _TOOL_NAME.fullmatch(tool.name) and self.allows(tool.name):
                    found.setdefault(tool.name, tool)
            cursor = page.next_cursor
            if not cursor or len(found) >= MAX_LISTED:
                break
        return [found[name] for name in sorted(found)]

    def tools(self, taken: Sequence[str]) -> Iterator["_ServerTool"]:
        """Give the tools that the model sees as such."""
        names, left = set(taken), MAX_SPEC_BYTES
        for one in self.listed[:MAX_TOOLS]:
            spec = _spec(_name_for(self.server.name, one.name, names), one)
            left -= len(json.dumps([spec.description, spec.parameters]))
            if left < 0:
                return
            names.add(spec.name)
            yield _ServerTool(self, one.name, spec)

    async def call(self, tool: str, arguments: Any) -> str:
        """Call a tool and return what the model is told.

        Raises:
            ToolFault
        """
        from mcp.types import CallToolRequest, CallToolRequestParams, CallToolResult

        name = self.server.name
        if not self.allows(tool):
            raise ToolFault(f"{name}/{tool} is not among what you may call.")
        if not isinstance(arguments, dict):
            raise ToolFault("The arguments must be an object.")
        if self._client is None:
            raise ToolFault(f"The MCP server {name} cannot be used: {self.fault}.")
        # Not by its `call_tool`, which holds results against a schema of the server's, at any cost.
        request = CallToolRequest(params=CallToolRequestParams(name=tool, arguments=arguments))
        result = await self._answer(
            self._client.session.send_request(request, CallToolResult), f"{name}/{tool}"
        )
        text = _text_of(result)
        if result.is_error:
            raise ToolFault(text or "The tool failed, and did not say why.")
        return text

    async def _answer(self, request: Any, name: str) -> Any:
        """Wait for an answer, while the connection is there, and no longer than may be."""
        from opscore.agentkit import mcp_stdio

        assert self._task is not None
        asking = asyncio.ensure_future(request)
        try:
            await asyncio.wait(
                [asking, self._task],
                timeout=self.server.seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if asking.done():
                return asking.result()
        except asyncio.CancelledError:
            if asking.cancelled():  # by the connection's end, not by ours
                raise Unsure(f"{name} failed: {self.fault or 'the connection ended'}.") from None
            raise
        except Exception as error:
            if self._child is not None and self._child.is_silent:
                await self._child.wait(mcp_stdio.ENDING_SECONDS)
            if self._end is not None and not self.fault:
                self.fault = self._end
                self._complain()
            raise _failure(name, error, self.fault) from None
        finally:
            asking.cancel()
        if self._task.done():
            raise Unsure(f"{name} failed: {self.fault}.")
        raise TimedOut(f"{name} did not answer within {self.server.seconds:g} s.")


class _ServerTool:
    """A tool of a server."""

    def __init__(self, line: _Line, tool: str, spec: ToolSpec) -> None:
        self._line, self._tool, self.spec = line, tool, spec

    @property
    def name(self) -> str:
        return self.spec.name

    def is_once(self, _arguments: Any) -> bool:
        return self._line.server.is_once(self._tool)

    def needs_approval(self, _arguments: Any) -> bool:
        return self._line.server.needs_approval(self._tool)

    async def call(self, arguments: Any, _context: Context) -> str:
        return await self._line.call(self._tool, arguments)


class _Proxy:
    """Calls any tool that may be called, of any server, by its own name."""

    name = PROXY

    def __init__(self, lines: Sequence[_Line]) -> None:
        self._lines = {line.server.name: line for line in lines}
        text = {"type": "string"}
        parameters = {
            "type": "object",
            "properties": {
                "server_name": {**text, "enum": list(self._lines)},
                "tool_name": text,
                "arguments": {"type": "object"},
            },
            "required": ["server_name", "tool_name"],
            "additionalProperties": False,
        }
        told = ["Call a tool of an MCP server.", *map(_about, lines)]
        self.spec = ToolSpec(PROXY, "\n".join(told), parameters)

    def is_once(self, arguments: Any) -> bool:
        line, tool, _ = self._read(arguments)
        return line is not None and line.server.is_once(tool)

    def needs_approval(self, arguments: Any) -> bool:
        line, tool, _ = self._read(arguments)
        return line is not None and line.allows(tool) and line.server.needs_approval(tool)

    async def call(self, arguments: Any, _context: Context) -> str:
        line, tool, given = self._read(arguments)
        if line is None:
            known = ", ".join(self._lines)
            raise ToolFault(f"Give server_name (one of {known}), tool_name, and arguments.")
        return await line.call(tool, given)

    def _read(self, arguments: Any) -> tuple[_Line | None, str, Any]:
        given = arguments if isinstance(arguments, dict) else {}
        server, tool = given.get("server_name"), given.get("tool_name")
        if not isinstance(server, str) or not isinstance(tool, str):
            return None, "", None
        return self._lines.get(server), tool, given.get("arguments") or {}


def _about(line: _Line) -> str:
    if line.fault:
        return f"The server {line.server.name} cannot be used now: {line.fault}."
    names = [one.name for one in line.listed]
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"Tools of {line.server.name}: {', '.join(names[:MAX_NAMED]) or 'none'}{more}."


# --- What a server says --------------------------------------------------------------------------


def _name_for(server: str, tool: str, taken: set[str]) -> str:
    """Return a name that providers take: the same for the same tool at every attempt."""
    plain = f"{server}__{tool}"
    name = re.sub(r"[^A-Za-z0-9_-]", "_", plain)
    if name == plain and len(name) <= 64 and name not in taken:
        return name
    return f"{name[:55]}_{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _spec(name: str, tool: Any) -> ToolSpec:
    description = _plain(tool.description or tool.title or tool.name, MAX_DESCRIPTION_BYTES)
    schema: Any = tool.input_schema
    is_fit = isinstance(schema, dict) and schema.get("type") == "object" and _is_small(schema)
    if is_fit:
        return ToolSpec(name, description, schema)
    note = "(The server gives no usable schema of the arguments.)"
    return ToolSpec(name, f"{description}\n{note}", {"type": "object"})


def _is_small(schema: Any) -> bool:
    from opscore.json_values import check_json

    return not check_json(schema, max_bytes=MAX_SCHEMA_BYTES)


def _plain(text: str, max_bytes: int) -> str:
    shown = "".join(one if one.isprintable() or one == "\n" else " " for one in text[:max_bytes])
    return storable_text(shown.strip(), max_bytes)


def _text_of(result: Any) -> str:
    """Return a result as text; what is none is described."""
    parts: list[str] = []
    size = 0
    for one in result.content[:MAX_PARTS]:
        parts.append(_part(one))
        size += len(parts[-1])
        if size > MAX_RESULT_BYTES:
            break
    if not parts and result.structured_content is not None:
        return told(result.structured_content)
    rest = len(result.content) - len(parts)
    if rest > 0:
        parts.append(f"[left out: {rest} more parts]")
    return told("\n".join(parts))


def _part(part: Any) -> str:
    match part.type:
        case "text":
            return str(part.text)
        case "resource":
            inner = part.resource
            if (text := getattr(inner, "text", None)) is not None:
                return f"[resource {inner.uri}]\n{text}"
            return f"[resource {inner.uri}, {inner.mime_type}: {len(inner.blob):,} bytes, no text]"
        case "resource_link":
            return f"[link to {part.uri}: {part.name}]"
        case kind:
            return f"[{kind}, {part.mime_type}: {len(part.data):,} bytes, no text]"


def _failure(name: str, error: Exception, fault: str) -> ToolFault:
    """Say what a request came to; only some answers say that it had no effect."""
    from mcp import MCPError

    sentence = f"{name} failed: {fault or _reason(error)}."
    is_answer = isinstance(error, MCPError) and error.code in _ANSWERS
    return ToolFault(sentence) if is_answer else Unsure(sentence)


_ANSWERS = (-32700, -32600, -32601, -32602)
"""Codes of JSON-RPC by which a server says that it did not do what it was asked."""


def _reason(error: BaseException) -> str:
    """Return an error in a short sentence; of several, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if type(error).__name__ == "ValidationError":
        first = error.errors()[0]  # type: ignore[attr-defined]
        return _plain(
            f"its answer is none: {'.'.join(map(str, first['loc']))}: {first['msg']}", 500
        )
    words = _plain(str(error), 500)
    is_said = type(error).__name__ == "MCPError" and words
    return words if is_said else f"{type(error).__name__}: {words}".removesuffix(": ")


async def _bound(response: Any) -> None:
    """Have a response end that is too long, or packed."""
    import httpx2

    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise httpx2.RemoteProtocolError("the answer is encoded, and only identity is accepted")
    stream = response.stream

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            received = 0
            async for some in stream:
                received += len(some)
                if received > MAX_HTTP_BYTES:
                    sentence = f"the answer has more than {MAX_HTTP_BYTES:,} bytes"
                    raise httpx2.RemoteProtocolError(sentence)
                yield some

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()
