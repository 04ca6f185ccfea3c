"""The line to an MCP server that is a process of ours: a message a line, on its stdin and stdout.

The package's own transport holds lines of any length, takes seconds to end a server, and forgets it
when it is interrupted, or killed. This one is handed to its client instead; see `mcp_keeper`.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from opscore.agentkit import mcp_keeper

MAX_LINE_BYTES = 4 * 1024 * 1024
"""Of one message; a server that sends more has ended."""
MAX_STRAY_LINES = 100
"""Lines that are no messages: some servers greet on stdout."""
STDERR_BYTES = 2048
"""The end of what a server said on stderr, for the log."""
ENDING_SECONDS = 0.2
"""For a process whose stdout has ended to end as well, so that we can say how."""
GONE_SECONDS = 0.7
"""For the end of a server; whoever is cancelled has a second, and the rest goes on without us."""
_INHERITED = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER")
_KEEPER = mcp_keeper.__file__


class Child:
    """The process of a server, with its keeper."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            OSError
        """
        own = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        end, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", _KEEPER, str(end), *command],
                env=own | dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=[end],
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(end)
        self._own_end: int | None = None
        """Its status, if it had ended before we had it end."""
        self.is_silent = False
        """Its stdout has ended."""
        self.said = b""
        """The end of what it said on stderr."""

    def let_go(self) -> None:
        """Have it end; this is never waited for, and goes on should we end meanwhile."""
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            self._own_end = self.process.poll()
            os.close(lifeline)

    async def wait(self, seconds: float) -> None:
        """Wait until it has ended, but no longer than this."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.process.poll() is None:
                    await asyncio.sleep(0.01)

    async def gone(self) -> None:
        """Wait until it has ended after it was let go, but not for ever."""
        try:
            await self.wait(GONE_SECONDS)
        finally:
            status = self.process.poll()
            if status is not None and status < 0:  # the keeper was killed, and kept nothing
                self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def end(self) -> str | None:
        """Say how it ended; None if it has not, or not by itself."""
        status = self.process.poll() if self._lifeline >= 0 else self._own_end
        if status is None:
            return None
        if status == mcp_keeper.NO_COMMAND:
            return "it could not be started: there is no such command, or it cannot be executed"
        return f"it has ended, with status {status}"


@asynccontextmanager
async def opened(child: Child) -> AsyncIterator[tuple[Any, Any]]:
    """Speak with a server; at the end it is gone, or will be without us."""
    to_us, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, from_us = anyio.create_memory_object_stream[SessionMessage](0)
    ways: list[asyncio.Task[None]] = []
    pipes: list[asyncio.BaseTransport] = []
    try:
        stdout = await _reader(child.process.stdout, pipes)
        stderr = await _reader(child.process.stderr, pipes)
        stdin = await _writer(child.process.stdin, pipes)
        ways += map(
            asyncio.create_task,
            (_listen(stdout, to_us, child), _say(from_us, stdin, to_us), _overhear(stderr, child)),
        )
        yield incoming, outgoing
    finally:
        try:
            if child.is_silent:
                await child.wait(ENDING_SECONDS)
        finally:
            child.let_go()
        for pipe in pipes:
            pipe.close()
        for way in ways:
            way.cancel()
        for stream in (to_us, incoming, outgoing, from_us):
            stream.close()
        try:
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            await child.gone()


async def _reader(pipe: Any, pipes: list[asyncio.BaseTransport]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    pipes.append(transport)
    return reader


async def _writer(pipe: Any, pipes: list[asyncio.BaseTransport]) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), pipe
    )
    pipes.append(transport)
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _listen(stdout: asyncio.StreamReader, to_us: Any, child: Child) -> None:
    """Hand on what the server says, until it ends, or says what is none of its business."""
    stray = 0
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, ValueError, OSError):
        while stray <= MAX_STRAY_LINES and (line := await stdout.readline()):
            try:
                message = jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValueError:
                stray += 1
                continue
            await to_us.send(SessionMessage(message))
    child.is_silent = stdout.at_eof()
    to_us.close()


async def _say(from_us: Any, stdin: asyncio.StreamWriter, to_us: Any) -> None:
    try:
        async for one in from_us:
            text = one.message.model_dump_json(by_alias=True, exclude_unset=True)
            stdin.write(text.encode() + b"\n")
            await stdin.drain()
    except OSError:
        to_us.close()


async def _overhear(stderr: asyncio.StreamReader, child: Child) -> None:
    while some := await stderr.read(65536):
        child.said = (child.said + some)[-STDERR_BYTES:]
