"""A Python function as a remote agent: it registers, takes signed work over HTTP and reports.

    server = AgentServer("summarizer", capabilities=["summarize"], capacity=4)

    @server.agent
    def summarize(parameters, context):
        return {"summary": parameters["text"][:100]}

    server.run(port=9000)

Under gunicorn or waitress the server is the WSGI application: see `AgentServer.start`. It is one
process with threads: what it knows of its tasks is in its memory.
"""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from http import HTTPStatus
from math import inf
from socketserver import TCPServer, ThreadingMixIn
from time import monotonic
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

import httpx2

from opscore.agentkit.calling import Busy, Outcome
from opscore.agentkit.function import AgentFunction, FunctionAgent, Registry
from opscore.errors import ConfigurationError
from opscore.json_values import MAX_GATHERED_BYTES, check_json
from opscore.remote import Accepted, UrlPolicy
from opscore.sdk.agent_jobs import COME_AGAIN_SECONDS, Jobs
from opscore.sdk.agent_link import Api, Link, as_bytes, as_report
from opscore.sdk.agent_orders import (
    Problem,
    Reply,
    check_proof,
    read_body,
    read_message,
    read_order,
)

LARGEST_CAPACITY = 10_000
"""That opscore allows."""
MAX_BODY_BYTES = 2 * MAX_GATHERED_BYTES
"""Of a task's parameters, which may hold whole outputs of other tasks."""
CLIENT_SECONDS = 30.0
"""For who calls us to send or take the next bytes, served by `run`."""
LAST_ANSWER_SECONDS = 2.0
"""For the answers that are being sent when `run` stops."""
HEALTH, LOOPBACK, EVERYWHERE = "/health", "127.0.0.1", "0.0.0.0"

log = logging.getLogger(__name__)
Decorated = TypeVar("Decorated", bound=AgentFunction)


class AgentServer:
    """One remote agent, and the WSGI application that it is.

    Args:
        agent_id: its id, as in a workflow's `agentId`.
        capabilities: what it can do, as in a workflow's `agentCapability`.
        capacity: how many attempts it takes at once.
        url: where opscore reaches it; `run` knows that if opscore is on the same machine.
        api_url, api_key, webhook_secret: else OPSCORE_API_URL, OPSCORE_API_KEY and
            OPSCORE_WEBHOOK_SECRET.
        name, version, metadata: for those who look at it.
        answer_seconds: what takes longer is accepted, and reported later. Less than opscore's
            OPSCORE_ANSWER_SECONDS, and than half of the task's time counts if that is shorter.
        heartbeat_seconds: opscore takes it for dead if it is silent for so long.
        grace_seconds: what is under way when it stops may go on for so long; then it is handed
            back, and opscore has it done again.
        max_body_bytes: more is not read.

    Raises:
        ConfigurationError: naming every fault.
    """

    def __init__(
        self,
        agent_id: str,
        *,
        capabilities: Sequence[str] = (),
        capacity: int = 1,
        url: str | None = None,
        api_url: str | None = None,
        api_key: str | None = None,
        webhook_secret: str | None = None,
        name: str | None = None,
        version: str = "1",
        metadata: Mapping[str, Any] | None = None,
        answer_seconds: float = 5.0,
        heartbeat_seconds: float = 30.0,
        grace_seconds: float = 8.0,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        given = os.environ.get
        self.agent_id, self._capacity = agent_id, capacity
        self._metadata = None if metadata is None else dict(metadata)
        self._api_url = api_url or given("OPSCORE_API_URL", "")
        self._api_key = api_key or given("OPSCORE_API_KEY", "")
        self._secret = webhook_secret or given("OPSCORE_WEBHOOK_SECRET", "")
        self._url = url
        self._answer_seconds, self._heartbeat_seconds = answer_seconds, heartbeat_seconds
        self._grace_seconds, self._max_body_bytes = grace_seconds, max_body_bytes
        self._registry = Registry()
        self._declare = self._registry.agent(
            agent_id, capabilities=capabilities, capacity=capacity, version=version, name=name
        )
        self._jobs: Jobs | None = None
        self._link: Link | None = None
        self._path = "/"
        self._process_id = 0
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        if faults := list(self._faults()):
            raise ConfigurationError(faults)

    @property
    def app(self) -> "AgentServer":
        """The WSGI application."""
        return self

    def agent(self, function: Decorated) -> Decorated:
        """Make the function below the agent, `(parameters, context) -> JSON`, and leave it as is.

        Raises:
            ConfigurationError: naming every fault of the declaration.
        """
        known = self._registry.function(self.agent_id)
        if known is not None and known.function is not function:
            raise ConfigurationError([f"agent {self.agent_id!r} has a function: one is all it has"])
        return self._declare(function)

    # --- coming and going

    def run(self, host: str | None = None, port: int = 9000) -> None:
        """Serve until SIGINT or SIGTERM, or `close` in another thread; a second signal kills.

        Without `host` it listens where the `url` leads from: on this machine alone, or everywhere.
        The server is Python's own, with threads. Where strangers can connect, use gunicorn or
        waitress behind a proxy that buffers.

        Raises:
            ConfigurationError: naming everything that is missing.
        """
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
            logging.getLogger("httpx2").setLevel(logging.WARNING)
        with self.serving(host, port), _on_signals(self._is_closing.set):
            self._is_closing.wait()

    @contextmanager
    def serving(self, host: str | None = None, port: int = 0) -> Iterator[str]:
        """Serve in threads of their own, registered, and yield the URL; port 0 takes a free one.

        Raises:
            ConfigurationError: naming everything that is missing.
        """
        is_local = not self._url or httpx2.URL(self._url).host in ("localhost", LOOPBACK)
        host = host or (LOOPBACK if is_local else EVERYWHERE)
        server = make_server(host, port, self, _Server, _Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        try:
            url = self._url or f"http://{host}:{server.server_port}"
            self.start(url)
            thread.start()
            log.info("agent %s serves at %s", self.agent_id, url)
            yield url
        finally:
            self.close()
            if thread.is_alive():
                server.shutdown()
                thread.join()
            server.server_close()

    def start(self, url: str | None = None) -> None:
        """Register, and keep in touch with opscore, in the background until `close` or the exit.

        For servers other than `run`, which are one process with threads: end the module with
        `server.start()`, then `gunicorn --workers 1 --threads 16 module:server`.

        Raises:
            ConfigurationError: naming everything that is missing.
        """
        url = self._url or url or ""
        agent = self._registry.function(self.agent_id)
        faults = list(self._missing(url))
        if faults or agent is None:
            lacks = f"agent {self.agent_id!r} has no function: put @server.agent above one"
            raise ConfigurationError([*faults, *([] if agent else [lacks])])
        if self._process_id == os.getpid():
            return
        self._is_closing.clear()
        self._path = httpx2.URL(url).path.rstrip("/") or "/"
        self._jobs = jobs = Jobs(agent, self._capacity, lambda: link.tell_state())
        self._link = link = Link(
            Api(self._api_url, self._api_key, self._secret),
            self._about(agent, url),
            jobs,
            capacity=self._capacity,
            heartbeat_seconds=self._heartbeat_seconds,
        )
        self._process_id = os.getpid()
        atexit.register(self.close)
        link.start()

    def close(self) -> None:
        """Take nothing new, let what is under way end within the grace, report it, and deregister.

        What is left then is handed back: opscore has it done again.
        """
        self._is_closing.set()
        with self._lock:
            if self._jobs is None or self._link is None or self._process_id != os.getpid():
                return
            self._jobs.close(self._grace_seconds)
            self._link.close()
            self._process_id = 0
            atexit.unregister(self.close)

    def _about(self, agent: FunctionAgent, url: str) -> dict[str, Any]:
        return {
            "agentId": agent.agent_id,
            "agentName": agent.name,
            "version": agent.version,
            "capabilities": list(agent.capabilities),
            "contactEndpoint": url,
            "metadata": self._metadata,
        }

    def _faults(self) -> Iterator[str]:
        numbers = {
            "capacity": (self._capacity, 1, LARGEST_CAPACITY),
            "answer_seconds": (self._answer_seconds, 0, 3600),
            "heartbeat_seconds": (self._heartbeat_seconds, 0.1, 2_592_000),
            "grace_seconds": (self._grace_seconds, 0, 86_400),
            "max_body_bytes": (self._max_body_bytes, 1024, inf),
        }
        for name, (value, low, high) in numbers.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                yield f"{name} must be a number from {low:,} to {high:,}, not {value!r}"
        for pointer, said in check_json(self._metadata).items():
            yield f"metadata{pointer} cannot be sent: {' '.join(said)}"

    def _missing(self, url: str) -> Iterator[str]:
        for name, value in (
            ("api_key", self._api_key),
            ("webhook_secret", self._secret),
            ("api_url", self._api_url),
        ):
            if not value:
                yield f"there is no {name}: give it, or set OPSCORE_{name.upper()}"
        for name, address in (("api_url", self._api_url), ("url", url)):
            for fault in UrlPolicy(("*",)).faults(address) if address else ():
                yield f"{name}={address!r}: {fault}"
        if not url:
            yield "there is no url: say where opscore reaches the agent"
        if url and httpx2.URL(url).host in (EVERYWHERE, "::"):
            yield f"url={url!r} is no place: say where opscore reaches the agent, with url=..."

    # --- what is asked

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request; what goes wrong is a problem, never a traceback."""
        try:
            reply = self._answer(environ)
        except Problem as problem:
            reply = problem.reply
        except Exception:
            log.exception("a request broke")
            said = "Something went wrong in the agent's server; its log says what."
            reply = Problem(500, "internal_error", said).reply
        body = as_bytes(reply.body) + b"\n"
        kind = "application/json" if reply.status < 400 else "application/problem+json"
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}
        status = f"{reply.status} {HTTPStatus(reply.status).phrase}"
        start_response(status, list(headers.items()))
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def _answer(self, environ: WSGIEnvironment) -> Reply:
        body = read_body(environ, self._max_body_bytes)  # first: who still sends hears no answer
        method = environ["REQUEST_METHOD"]
        path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).rstrip("/") or "/"
        if path == HEALTH and method in ("GET", "HEAD"):
            return Reply(200, {"status": "ok"})
        if path not in (HEALTH, "/", self._path):
            sentence = f"There is nothing at {path[:200]}: work goes to {self._path}."
            raise Problem(404, "not_found", sentence)
        if path == HEALTH or method != "POST":
            allowed = "GET, HEAD" if path == HEALTH else "POST"
            sentence = f"{method[:20]} is not possible here; {allowed} is."
            raise Problem(405, "method_not_allowed", sentence, Allow=allowed)
        signed_at = check_proof(environ, body, self._secret)
        return self._work(read_message(body), signed_at, environ)

    def _work(
        self, message: dict[str, Any], signed_at: datetime, environ: WSGIEnvironment
    ) -> Reply:
        jobs = self._jobs
        if jobs is None or self._process_id != os.getpid():
            sentence = "The agent is not started: start() is to be called in each serving process."
            raise Problem(503, "not_started", sentence, Retry_After=_decimal(COME_AGAIN_SECONDS))
        if message["messageType"] == "workflow_cancel":
            named = [str(message.get(f"opscore_{name}")) for name in ("task_id", "attempt_token")]
            return Reply(200, {"status": "cancelled" if jobs.recall(*named) else "unknown"})
        order = read_order(message, signed_at, environ)
        outcome = jobs.ask(order, min(self._answer_seconds, order.seconds / 2))
        return _reply_of(outcome, is_closing=jobs.is_closing)


def _reply_of(outcome: Outcome | Accepted, *, is_closing: bool) -> Reply:
    if isinstance(outcome, Accepted):
        return Reply(202, {"status": "accepted"})
    if not isinstance(outcome, Busy):
        return Reply(200, as_report(outcome))
    wait = {} if outcome.retry_after is None else {"Retry_After": _decimal(outcome.retry_after)}
    if is_closing:
        raise Problem(503, "stopping", "The agent is stopping; ask again later.", **wait)
    raise Problem(429, "agent_busy", "The agent takes no work now; ask again later.", **wait)


def _decimal(seconds: float) -> str:
    """Write seconds without an exponent; opscore reads fractions."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


@contextmanager
def _on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at the first SIGINT or SIGTERM; the next finds things as they were before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def restore() -> None:
        for number in signals:
            signal.signal(number, before[number])

    def handle(*_: object) -> None:
        restore()
        act()

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        restore()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request; closing waits a moment for the answers that are being sent."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks the name up, which may take long
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()
        self._answering: set[threading.Thread] = set()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._answering.add(threading.current_thread())
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._answering.discard(threading.current_thread())

    def server_close(self) -> None:
        super().server_close()
        end = monotonic() + LAST_ANSWER_SECONDS
        for thread in list(self._answering):
            thread.join(max(0, end - monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection broke", exc_info=True)  # `AgentServer` answers for its own faults


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
