"""Both clients of the SDK behind one surface, so that a test is written once; and servers that do
with each request what they are told.
"""

import http.client
import inspect
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal
from flask import Flask
from stack import API_KEY, Servers, Stack, running_stack
from test_web_process import serving

from opscore.sdk import OpsCoreClientAsync, OpsCoreClientSync, async_client
from web.app import create_app

KINDS = ("sync", "async")


# --- One surface --------------------------------------------------------------------------------


class Blocking:
    """Something of the async client, as the sync one has it: calls block, iterators are plain."""

    def __init__(self, portal: BlockingPortal, it: Any) -> None:
        self._portal, self._it = portal, it

    def __getattr__(self, name: str) -> Any:
        return self._plain(getattr(self._it, name))

    def __repr__(self) -> str:
        return repr(self._it)

    def _plain(self, value: Any) -> Any:
        if inspect.isasyncgen(value):
            return self._iterate(value)
        if callable(value):
            return partial(self._call, value)
        is_ours = type(value).__module__ == async_client.__name__
        return Blocking(self._portal, value) if is_ours else value

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def outcome() -> Any:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value

        return self._plain(self._portal.call(outcome))

    def _iterate(self, values: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._portal.call(values.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(values.aclose)


class InProcess(httpx2.AsyncBaseTransport):
    """Calls a WSGI application in a thread; an answer comes as a whole."""

    def __init__(self, app: Any) -> None:
        self._wsgi = httpx2.WSGITransport(app)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await anyio.to_thread.run_sync(self._answer, request)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        answer = self._wsgi.handle_request(request)
        try:
            return httpx2.Response(
                answer.status_code, headers=answer.headers.raw, content=answer.read()
            )
        finally:
            answer.close()


@contextmanager
def open_sdk(
    kind: str, url: str = "http://opscore", key: str = API_KEY, *, app: Any = None, **options: Any
) -> Iterator[Any]:
    """Yield a client of either kind; of an application in this process, if there is one."""
    with ExitStack() as cleanup:
        if kind == "sync":
            in_process = {} if app is None else {"transport": httpx2.WSGITransport(app)}
            yield cleanup.enter_context(OpsCoreClientSync(url, key, **in_process, **options))
            return
        in_process = {} if app is None else {"transport": InProcess(app)}
        portal = cleanup.enter_context(start_blocking_portal())
        client = Blocking(portal, OpsCoreClientAsync(url, key, **in_process, **options))
        cleanup.callback(client.close)
        yield client


@dataclass(frozen=True)
class Site:
    """A worker, and the API both in this process and in one of its own."""

    stack: Stack
    app: Flask
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def open_site(servers: Servers, folder: Path) -> Iterator[Site]:
    with ExitStack() as cleanup:
        agents = {"OPSCORE_AGENTS": "tests.fleet"}
        stack = cleanup.enter_context(running_stack(servers, folder / "worker.log", **agents))
        app = create_app(stack.settings)
        cleanup.callback(app.extensions["opscore"].close)
        web = serving(stack.environment, folder / "web.log", threads=16)
        _, port = cleanup.enter_context(web)
        stack.start_worker(concurrency=2)
        yield Site(stack, app, port)


# --- Servers that do as they are told -----------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    """By their names in lower case."""
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


Act = Callable[[socket.socket, Request], None]
"""What a server does with a request; the connection is closed afterwards."""


class Scripted:
    """A server that does one thing after the other, the last of them for ever; notes requests."""

    def __init__(self, *acts: Act, port: int = 0) -> None:
        self.requests: list[Request] = []
        self._acts = list(acts)
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", port), backlog=64)
        self._open: set[socket.socket] = set()
        self.port = int(self._listening.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def begin(self, *acts: Act) -> None:
        """From now on do these."""
        with self._lock:
            self._acts = list(acts)

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                thread = threading.Thread(target=self._serve, args=[connection], daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        with suppress(OSError), connection:
            if (request := read_request(connection)) is not None:
                self._next_act(request)(connection, request)
        with self._lock:
            self._open.discard(connection)

    def _next_act(self, request: Request) -> Act:
        with self._lock:
            self.requests.append(request)
            return self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]


@contextmanager
def scripted(*acts: Act) -> Iterator[Scripted]:
    server = Scripted(*acts)
    try:
        yield server
    finally:
        server.close()


def read_request(connection: socket.socket) -> Request | None:
    """Return the next request, None if the client has left."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        if not (more := connection.recv(65536)):
            return None
        body += more
    method, target, _ = first.split(" ")
    return Request(method, target, headers, body)


def saying(data: bytes) -> Act:
    """Send these bytes, and nothing after them."""
    return lambda connection, request: connection.sendall(data)


def answering(status: int, body: bytes = b"", **headers: str) -> Act:
    """Answer; `Content_Type="text/html"` is a header."""
    return saying(answer(status, body, **headers))


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    given = {"Content-Length": str(len(body)), "Connection": "close", **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Said", *lines, "", ""]).encode() + body


def resetting(connection: socket.socket, request: Request) -> None:
    """Break the connection off, with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hanging(connection: socket.socket, request: Request) -> None:
    """Never answer; wait until the client leaves."""
    connection.recv(1)


def losing(port: int, then: Act) -> Act:
    """Have the request done by the server at a port, lose its answer, and do something else."""

    def act(connection: socket.socket, request: Request) -> None:
        forward(port, request)
        then(connection, request)

    return act


def passing(port: int) -> Act:
    """Have the request done by the server at a port, and pass its answer on."""

    def act(connection: socket.socket, request: Request) -> None:
        status, headers, body = forward(port, request)
        connection.sendall(answer(status, body, **headers))

    return act


def forward(port: int, request: Request) -> tuple[int, dict[str, str], bytes]:
    upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {**request.headers, "connection": "close"}
        upstream.request(request.method, request.target, request.body, headers)
        got = upstream.getresponse()
        kept = {name: got.headers[name] for name in ("Content-Type", "Retry-After", "Location")}
        return got.status, {n: v for n, v in kept.items() if v is not None}, got.read()
    finally:
        upstream.close()
