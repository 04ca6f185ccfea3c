"""A fleet of fake remote agents to play with: one process, one server, an agent of each temper.

    with Fleet(api_url, api_key, secret) as fleet:
        fleet.add("sorter", "slow", ["sort"], seconds=2, heartbeat_seconds=0.5)
        fleet.register_all()

All that a remote agent needs, in nothing but the standard library. `fleet_demo.py` plays with it.
"""

import contextlib
import hmac
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.message import Message
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from typing import Any, NamedTuple, Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener
from uuid import uuid4

LOOPBACK = "127.0.0.1"
FRESH_SECONDS = 300.0
"""How far a signed timestamp may be from now."""
CALL_SECONDS = 10.0
"""For one call of the API, and for who calls an agent to send the next byte."""
PAUSE_SECONDS = 0.2
"""Before what the API could not take is sent again."""
LIE = "this is a lie"
"""What lies have in place of a result; it must be in no task's output."""
TRUTH = "the truth again"
"""The one thing a liar tries that is to be answered 200."""

Json = dict[str, Any]


class FleetFailed(Exception):
    """It cannot go on; the message says why."""


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """Sign a body and its time; the same in both directions."""
    signed = timestamp.encode() + b"." + body
    return hmac.new(secret.encode(), signed, "sha256").hexdigest()


def is_genuine(secret: str, headers: Message, body: bytes) -> bool:
    """Tell whether opscore signed this, and just now."""
    timestamp = headers.get("X-OpsCore-Timestamp", "")
    given, right = headers.get("X-OpsCore-Signature", ""), signature(secret, timestamp, body)
    try:
        is_fresh = abs(time.time() - _moment(timestamp)) <= FRESH_SECONDS
    except ValueError:
        return False
    return is_fresh and hmac.compare_digest(right.encode(), given.encode())


def _moment(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return datetime.fromisoformat(text).timestamp()


@dataclass(frozen=True)
class Order:
    """One attempt at a task, as opscore asked for it; `key` is the task's id, too."""

    key: str
    attempt: int
    token: str
    deadline: float
    body: Json

    @classmethod
    def read(cls, headers: Message, raw: bytes) -> Self:
        body = json.loads(raw)
        deadline = body["sessionContext"].get("deadline")
        return cls(
            headers["Idempotency-Key"],
            int(headers["X-OpsCore-Attempt"]),
            body["opscore_attempt_token"],
            _moment(deadline) if deadline else inf,
            body,
        )


@dataclass
class Job:
    """What an agent knows of one task, over all attempts: the newest order, and its result."""

    order: Order
    asked: int = 0
    is_working: bool = False
    is_wanted: bool = True
    result: Json | None = None


class Answer(NamedTuple):
    """What an agent answers, and what it does once that is sent."""

    status: int
    body: Json
    headers: Mapping[str, str] = {}
    then: Callable[[], None] = lambda: None


@dataclass(eq=False)
class Agent:
    """Works at once, or for `seconds` after a 202, and does the effect of each task once.

    Every temper has these options: `heartbeat_seconds` between two heartbeats of its work,
    `reports` active and idle around it, `state` to report when registered (None: nothing),
    `capacity` if it is not 1. Another temper is a class that overrides `answer`.
    """

    fleet: "Fleet" = field(repr=False)
    id: str
    capabilities: Sequence[str] = ()
    seconds: float = 0.0
    heartbeat_seconds: float | None = None
    reports: bool = False
    state: str | None = "idle"
    capacity: int | None = None

    def __post_init__(self) -> None:
        self.temper = type(self).__name__.lower()
        self.endpoint = f"{self.fleet.url}/agents/{self.id}"
        self.orders: list[Order] = []
        self.jobs: dict[str, Job] = {}
        self.delivered: set[str] = set()
        self._lock = threading.Lock()

    def ask(self, order: Order) -> Answer | None:
        """Note the order and answer it."""
        with self._lock:
            self.orders.append(order)
            job = self.jobs.setdefault(order.key, Job(order))
            job.order, job.asked = order, job.asked + 1
        return self.answer(job)

    def drop(self, body: Json) -> Answer:
        """Stop what nobody wants any more; any answer will do."""
        job = self.jobs.get(body["opscore_task_id"])
        if job is not None and job.order.token == body["opscore_attempt_token"]:
            job.is_wanted = False
        return Answer(200, {"status": "cancelled"})

    def answer(self, job: Job) -> Answer | None:
        """Answer the job's newest order; None cuts the connection."""
        if self.seconds and job.result is None:
            return Answer(202, {"status": "accepted"}, then=lambda: self.work(job))
        result = self.do(job)
        self.delivered.add(job.order.key)
        return Answer(200, {"status": "completed", "result": result})

    def work(self, job: Job) -> None:
        """Work on the job and hand its result in, unless that is under way or done."""
        with self._lock:
            if job.is_working or job.result is not None:
                return
            job.is_working = True
        self._report("active")
        if self._toil(job):
            self.do(job)
            self.hand_in(job)
        self._report("idle")
        job.is_working = False

    def do(self, job: Job) -> Json:
        """Do the task's effect, unless it is done, and return the result."""
        with self._lock:
            if job.result is None:
                order = job.order
                self.fleet.effect_log.append((self.id, order.key, order.attempt))
                job.result = {"by": self.id, "did": order.body["payload"]}
            return job.result

    def hand_in(self, job: Job) -> None:
        """Send the result for the newest order; who asks again now is answered with it."""
        done = {**self.proof(job.order), "status": "completed", "result": job.result}
        if self.fleet.insist(f"/tasks/{job.order.key}/result", done) == 200:
            self.delivered.add(job.order.key)

    def proof(self, order: Order) -> Json:
        return {"agentId": self.id, "opscore_attempt_token": order.token}

    def _toil(self, job: Job) -> bool:
        """Let the time pass; tell whether the work is still wanted then."""
        end = time.monotonic() + self.seconds
        step = self.heartbeat_seconds or PAUSE_SECONDS
        while (left := end - time.monotonic()) > 0:
            if self.fleet.stopping.wait(min(left, step)) or not job.is_wanted:
                return False
            if self.heartbeat_seconds:
                path = f"/tasks/{job.order.key}/heartbeat"
                status, said = self.fleet.call("POST", path, self.proof(job.order))
                if status == 409 or said.get("cancelled"):
                    return False
        return job.is_wanted and time.time() < job.order.deadline

    def _report(self, state: str) -> None:
        if self.reports:
            self.fleet.insist(f"/agent/{self.id}/state", {"state": state})


class Quick(Agent):
    """Answers at once."""


@dataclass(eq=False)
class Slow(Agent):
    """Accepts, works for a while, then hands its result in."""

    seconds: float = 1.0
    reports: bool = True


@dataclass(eq=False)
class Busy(Agent):
    """Has no time the first `refusals` times that it is asked for a task."""

    refusals: int = 2
    retry_after: int = 1

    def answer(self, job: Job) -> Answer | None:
        if job.asked > self.refusals:
            return super().answer(job)
        status = (409, 429, 503)[(job.asked - 1) % 3]
        return Answer(status, {"error": "busy"}, {"Retry-After": str(self.retry_after)})


@dataclass(eq=False)
class Flaky(Agent):
    """Has one of its faults each time that it is asked for a task, then works.

    A fault is `500`, `cut` (the connection, without an answer) or `done, then cut`.
    """

    faults: Sequence[str] = ("500", "cut")

    def answer(self, job: Job) -> Answer | None:
        if job.asked > len(self.faults):
            return super().answer(job)
        fault = self.faults[job.asked - 1]
        if fault == "done, then cut":
            self.do(job)
        return Answer(500, {"error": "out of order"}) if fault == "500" else None


class Deaf(Agent):
    """Lets everybody wait for an answer until the fleet stops."""

    def answer(self, job: Job) -> Answer | None:
        self.fleet.stopping.wait()
        return None


class Dead(Agent):
    """Nothing listens where it said that it lives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoint = f"{self.fleet.dead_url}/agents/{self.id}"


@dataclass(eq=False)
class Lying(Agent):
    """Says wrong things of its own task and another's, then what is true, then that again."""

    seconds: float = 0.3
    reports: bool = True

    def hand_in(self, job: Job) -> None:
        victim, task_id = self.fleet.other_job(self)
        mine, other = f"/tasks/{job.order.key}/result", f"/tasks/{task_id}/result"
        truth = {**self.proof(job.order), "status": "completed", "result": job.result}
        lie = {**truth, "result": LIE}
        details = {**self.proof(job.order), "opscore_task_id": task_id, "result": LIE}
        state = {"state": "active", "details": details}
        self._try("wrong token", mine, {**lie, "opscore_attempt_token": str(uuid4())})
        self._try("another's task", other, lie)
        self._try("another's task, in its name", other, {**lie, "agentId": victim.id})
        self._try("another's task, by state", f"/agent/{self.id}/state", state)
        signed_wrongly = self.fleet.notify("DEREGISTER", victim, secret="guessed")
        self.fleet.lies.append((self.id, "wrong signature", signed_wrongly))
        super().hand_in(job)
        self._try(TRUTH, mine, truth)
        self._try("another story", mine, lie)

    def _try(self, lie: str, path: str, body: Json) -> None:
        self.fleet.lies.append((self.id, lie, self.fleet.call("POST", path, body)[0]))


TEMPERS: Mapping[str, type[Agent]] = {
    kind.__name__.lower(): kind for kind in (Quick, Slow, Busy, Flaky, Deaf, Dead, Lying)
}


class Fleet:
    """Agents by their ids, the server they live in, and what they did; it serves until `stop`.

    `effect_log` has (agent id, idempotency key, attempt), `lies` (agent id, lie, HTTP status or 0
    for no answer), `refused` the paths of orders that were not signed as they should be.
    """

    def __init__(self, api_url: str, api_key: str, secret: str) -> None:
        self.agents: dict[str, Agent] = {}
        self.effect_log: list[tuple[str, str, int]] = []
        self.lies: list[tuple[str, str, int]] = []
        self.refused: list[str] = []
        self.stopping = threading.Event()
        self._api, self._key, self._secret = api_url.rstrip("/") + "/v1/opscore", api_key, secret
        self._open = build_opener(ProxyHandler({})).open  # a proxy is no way to this machine
        self._dead = socket.socket()  # bound, so that nobody else gets the port; never listens
        self._dead.bind((LOOPBACK, 0))
        self.dead_url = f"http://{LOOPBACK}:{self._dead.getsockname()[1]}"
        self._server = _Server(self)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every agent end what it does and close the server; the deaf hang up."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._dead.close()

    @property
    def effects(self) -> Counter[str]:
        """How often the effect of each task was done, by idempotency key."""
        return Counter(key for _, key, _ in list(self.effect_log))

    def working(self) -> list[tuple[Agent, Job]]:
        """Return who works on what."""
        agents = list(self.agents.values())
        jobs = [(one, job) for one in agents for job in list(one.jobs.values())]
        return [(one, job) for one, job in jobs if job.is_working]

    def other_job(self, agent: Agent) -> tuple[Agent, str]:
        """Return another agent and the id of a task that it works on; if none works, of none."""
        for one, job in self.working():
            if one is not agent:
                return one, job.order.key
        others = [one for one in list(self.agents.values()) if one is not agent]
        return (others or [agent])[0], str(uuid4())

    def add(
        self, id: str, temper: str | type[Agent], capabilities: Sequence[str] = (), **options: Any
    ) -> Agent:
        """Make an agent of this temper; the API knows it once it is registered."""
        kind = TEMPERS[temper] if isinstance(temper, str) else temper
        agent = self.agents[id] = kind(self, id, capabilities, **options)
        return agent

    def register_all(self) -> None:
        for agent in self.agents.values():
            self.register(agent)

    def register(self, agent: Agent) -> None:
        """Make the agent known and let it say its first state. Raises FleetFailed."""
        if (status := self.notify("REGISTER", agent)) != 200:
            raise FleetFailed(f"Registering {agent.id} was answered with {status}.")
        if agent.capacity is not None:
            self.ask("PATCH", f"/agents/{agent.id}", {"capacity": agent.capacity})
        if agent.state is not None:
            self.ask("POST", f"/agent/{agent.id}/state", {"state": agent.state})

    def notify(self, event: str, agent: Agent, secret: str | None = None) -> int:
        """Tell of an agent by the webhook; return the HTTP status."""
        about = {
            "agentId": agent.id,
            "agentName": f"{agent.id} ({agent.temper})",
            "version": "1.0",
            "capabilities": list(agent.capabilities),
            "contactEndpoint": agent.endpoint,
            "metadata": None,
        }
        body = {"event_type": event, "agent_details": about}
        timestamp = f"{time.time():.3f}"  # so that two of one second are told apart
        signed = signature(secret or self._secret, timestamp, _raw(body))
        proof = {"X-AgentKit-Timestamp": timestamp, "X-AgentKit-Signature": signed}
        return self.call("POST", "/internal/agent/notify", body, proof)[0]

    def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """Call the API. Raises FleetFailed unless it does what was asked."""
        status, said = self.call(method, path, body)
        if not 200 <= status < 300:
            raise FleetFailed(f"{method} {path} was answered with {status}: {said}")
        return said

    def insist(self, path: str, body: Json) -> int:
        """POST until the API can take it, or the fleet stops; return the HTTP status."""
        while True:
            status, _ = self.call("POST", path, body)
            if (0 < status < 500 and status != 429) or self.stopping.wait(PAUSE_SECONDS):
                return status

    def call(
        self, method: str, path: str, body: Json | None, proof: Mapping[str, str] | None = None
    ) -> tuple[int, Json]:
        """Call the API, with the key or another proof; return the HTTP status and what it said.

        The status is 0 if there was no answer.
        """
        headers = proof or {"Authorization": f"Bearer {self._key}"}
        headers = {**headers, "Content-Type": "application/json"}
        data = None if body is None else _raw(body)
        request = Request(self._api + path, data, headers, method=method)
        try:
            with self._open(request, timeout=CALL_SECONDS) as response:
                return response.status, json.load(response)
        except HTTPError as refusal:
            with refusal:
                return refusal.code, {"said": refusal.read(1000).decode(errors="replace")}
        except (OSError, HTTPException) as error:
            return 0, {"said": str(error)}

    def receive(self, path: str, headers: Message, body: bytes) -> Answer | None:
        """Let the agent who lives at `path` answer; None cuts the connection."""
        agent = self.agents.get(path.removeprefix("/agents/"))
        if agent is None:
            return Answer(404, {"error": "nobody lives here"})
        if not is_genuine(self._secret, headers, body):
            self.refused.append(path)
            return Answer(401, {"error": "not signed by opscore"})
        message = json.loads(body)
        if message["messageType"] == "workflow_cancel":
            return agent.drop(message)
        return agent.ask(Order.read(headers, body))


def _raw(body: Json) -> bytes:
    return json.dumps(body).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for every agent to end what it does
    request_queue_size = 128

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        super().__init__((LOOPBACK, 0), _Exchange)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked may have gone
            super().handle_error(request, client_address)


class _Exchange(BaseHTTPRequestHandler):
    """One request on one connection; the thread that answered it goes on to work."""

    server: _Server
    timeout = CALL_SECONDS

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.fleet.receive(self.path, self.headers, body)
        if answer is None:
            return
        raw = _raw(answer.body)
        self.send_response(answer.status)
        for name, text in {**answer.headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(raw)
        with contextlib.suppress(OSError):  # who asked may have gone with the answer
            self.connection.shutdown(socket.SHUT_WR)
        answer.then()

    def log_message(self, format: str, *args: Any) -> None:
        pass
