"""The example's fleet of remote agents: how each temper answers, and what it does once.

What stands in for opscore here is a plain HTTP server that notes every call, checks the proof of
each, and lets only the present token finish a task.
"""

import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from stack import ROOT, wait_until

from examples.fleet import LIE, Agent, Answer, Fleet, FleetFailed, Job

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
PREFIX = "/v1/opscore"
LONG = 20.0


class Call(NamedTuple):
    """A call of the API that came with the proof it needs."""

    method: str
    path: str
    body: Any


class Desk(ThreadingHTTPServer):
    """The side of the API that agents see; `tokens` has the present one of each task."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Clerk)
        self.calls: list[Call] = []
        self.tokens: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.outages: list[int] = []
        """Statuses to answer the next calls with, whatever they are."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str) -> list[Any]:
        return [call.body for call in list(self.calls) if call.path == path]

    def states(self, agent_id: str) -> list[str]:
        return [body["state"] for body in self.bodies(f"/agent/{agent_id}/state")]


class _Clerk(BaseHTTPRequestHandler):
    server: Desk
    timeout = LONG

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self._answer(self.path.removeprefix(PREFIX), raw)
        said = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_PATCH = do_POST

    def _answer(self, path: str, raw: bytes) -> tuple[int, Any]:
        if self.server.outages:
            return self.server.outages.pop(0), {}
        if not self._is_proven(path, raw):
            return 401, {}
        body = json.loads(raw)
        self.server.calls.append(Call(self.command, path, body))
        if not path.startswith("/tasks/"):
            return 202 if path.endswith("/state") else 200, {"status": "success"}
        task_id = path.split("/")[2]
        if self.server.tokens.get(task_id) != body["opscore_attempt_token"]:
            return 409, {}
        return 200, {"taskId": task_id, "cancelled": task_id in self.server.cancelled}

    def _is_proven(self, path: str, raw: bytes) -> bool:
        if path != "/internal/agent/notify":
            return self.headers["Authorization"] == f"Bearer {KEY}"
        timestamp = self.headers["X-AgentKit-Timestamp"]
        is_fresh = abs(float(timestamp) - time.time()) < 300
        return is_fresh and self.headers["X-AgentKit-Signature"] == signed(timestamp, raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def signed(timestamp: str, raw: bytes) -> str:
    return hmac.new(SECRET.encode(), timestamp.encode() + b"." + raw, hashlib.sha256).hexdigest()


@pytest.fixture
def desk() -> Iterator[Desk]:
    server = Desk()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fleet(desk: Desk) -> Iterator[Fleet]:
    with Fleet(desk.url, KEY, SECRET) as fleet:
        yield fleet


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


@contextmanager
def asking(
    desk: Desk, agent: Agent, task_id: str = "t1", attempt: int = 1, **changed: str
) -> Iterator[HTTPConnection]:
    """Send an order as opscore does, with `changed` headers; yield the connection."""
    token = desk.tokens[task_id] = f"{task_id}-token-{attempt}"
    body = {
        "senderId": "opscore",
        "messageType": "workflow_task",
        "payload": {"n": 1},
        "task_name": "sort",
        "opscore_session_id": "r1",
        "opscore_task_id": task_id,
        "opscore_attempt_token": token,
        "sessionContext": {"attempt": attempt, "deadline": "2999-01-01T00:00:00Z"},
    }
    raw, timestamp = json.dumps(body).encode(), changed.pop("timestamp", str(int(time.time())))
    headers = {
        "Content-Type": "application/json",
        "X-OpsCore-Timestamp": timestamp,
        "X-OpsCore-Signature": signed(timestamp, raw),
        "Idempotency-Key": task_id,
        "X-OpsCore-Attempt": str(attempt),
        **changed,
    }
    where = urlsplit(agent.endpoint)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=LONG)
    try:
        connection.request("POST", where.path, raw, headers)
        yield connection
    finally:
        connection.close()


def ask(desk: Desk, agent: Agent, *order: Any, **changed: str) -> Reply:
    with asking(desk, agent, *order, **changed) as connection, connection.getresponse() as answer:
        return Reply(answer.status, dict(answer.headers), json.loads(answer.read()))


def results(desk: Desk, task_id: str = "t1") -> list[Any]:
    return desk.bodies(f"/tasks/{task_id}/result")


# Who is there


def test_agents_register_by_the_signed_webhook_and_say_that_they_are_idle(
    desk: Desk, fleet: Fleet
) -> None:
    fleet.add("a", "quick", ["sort", "pack"])
    fleet.add("b", "dead", capacity=3, state="error")
    fleet.add("c", "quick", state=None)
    fleet.register_all()
    told = [body["agent_details"] for body in desk.bodies("/internal/agent/notify")]
    assert [one["agentId"] for one in told] == ["a", "b", "c"]
    assert told[0]["capabilities"] == ["sort", "pack"]
    assert told[0]["contactEndpoint"] == f"{fleet.url}/agents/a"
    assert [desk.states(agent_id) for agent_id in "abc"] == [["idle"], ["error"], []]
    assert Call("PATCH", "/agents/b", {"capacity": 3}) in desk.calls


def test_a_registration_that_is_refused_is_an_error(desk: Desk) -> None:
    with Fleet(desk.url, KEY, "another secret") as fleet:
        fleet.add("a", "quick")
        with pytest.raises(FleetFailed, match="401"):
            fleet.register_all()


def test_a_temper_or_an_option_that_is_none_is_refused(fleet: Fleet) -> None:
    with pytest.raises(KeyError):
        fleet.add("a", "merry")
    with pytest.raises(TypeError):
        fleet.add("a", "quick", refusals=3)


# What is answered


def test_a_quick_agent_answers_at_once(desk: Desk, fleet: Fleet) -> None:
    answer = ask(desk, fleet.add("a", "quick"))
    assert (answer.status, answer.body["status"]) == (200, "completed")
    assert answer.body["result"] == {"by": "a", "did": {"n": 1}}


@pytest.mark.parametrize(
    "changed",
    [
        {"X-OpsCore-Signature": "0" * 64},
        {"X-OpsCore-Signature": "\xff"},
        {"X-OpsCore-Signature": ""},
        {"timestamp": "1000000000"},
        {"timestamp": "yesterday"},
        {"timestamp": "nan"},
    ],
)
def test_an_order_that_is_not_signed_now_by_opscore_is_refused(
    desk: Desk, fleet: Fleet, changed: dict[str, str]
) -> None:
    assert ask(desk, fleet.add("a", "quick"), **changed).status == 401
    assert (fleet.refused, fleet.effect_log) == (["/agents/a"], [])


def test_a_signed_time_may_be_written_as_iso_8601(desk: Desk, fleet: Fleet) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    assert ask(desk, fleet.add("a", "quick"), timestamp=now).status == 200


def test_a_slow_agent_accepts_and_hands_in_later(desk: Desk, fleet: Fleet) -> None:
    agent = fleet.add("a", "slow", seconds=0.1)
    assert ask(desk, agent).status == 202
    (given,) = wait_until(lambda: results(desk))
    assert given == {
        "agentId": "a",
        "opscore_attempt_token": "t1-token-1",
        "status": "completed",
        "result": {"by": "a", "did": {"n": 1}},
    }
    wait_until(lambda: desk.states("a"), says=lambda seen: seen == ["active", "idle"])


def test_a_slow_agent_shows_that_it_lives_when_told_to(desk: Desk, fleet: Fleet) -> None:
    ask(desk, fleet.add("a", "slow", seconds=0.2, heartbeat_seconds=0.02))
    wait_until(lambda: results(desk))
    beats = desk.bodies("/tasks/t1/heartbeat")
    assert len(beats) > 1
    assert beats[0] == {"agentId": "a", "opscore_attempt_token": "t1-token-1"}


def test_work_that_a_heartbeat_finds_cancelled_has_no_effect(desk: Desk, fleet: Fleet) -> None:
    desk.cancelled.add("t1")
    ask(desk, fleet.add("a", "slow", seconds=LONG, heartbeat_seconds=0.02))
    wait_until(lambda: desk.states("a"), says=lambda seen: seen == ["active", "idle"])
    assert (fleet.effect_log, results(desk)) == ([], [])


def test_a_result_is_sent_until_the_api_can_take_it(desk: Desk, fleet: Fleet) -> None:
    desk.outages += [503, 429]
    agent = fleet.add("a", "quick", seconds=0.01)
    ask(desk, agent)
    wait_until(lambda: agent.delivered)
    assert (desk.outages, len(results(desk))) == ([], 1)


def test_a_busy_agent_says_when_to_come_again_and_counts_each_task_by_itself(
    desk: Desk, fleet: Fleet
) -> None:
    agent = fleet.add("a", "busy", refusals=3, retry_after=7)
    answers = [ask(desk, agent, "t1", attempt) for attempt in (1, 2, 3, 4)]
    assert [answer.status for answer in answers] == [409, 429, 503, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert ask(desk, agent, "t2").status == 409


def test_a_flaky_agent_fails_cuts_the_connection_and_then_works(desk: Desk, fleet: Fleet) -> None:
    agent = fleet.add("a", "flaky")
    assert ask(desk, agent, "t1", 1).status == 500
    with pytest.raises((HTTPException, ConnectionError)):
        ask(desk, agent, "t1", 2)
    assert ask(desk, agent, "t1", 3).status == 200
    assert fleet.effect_log == [("a", "t1", 3)]


def test_a_deaf_agent_lets_wait_until_the_fleet_stops(desk: Desk, fleet: Fleet) -> None:
    ears = fleet.add("a", "deaf")
    with asking(desk, ears) as connection:
        wait_until(lambda: ears.orders)
        connection.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)
        connection.sock.settimeout(LONG)
        fleet.stop()
        assert connection.sock.recv(1) == b""


def test_nothing_listens_where_a_dead_agent_says_it_lives(desk: Desk, fleet: Fleet) -> None:
    with pytest.raises(ConnectionRefusedError):
        ask(desk, fleet.add("a", "dead"))


def test_another_temper_is_a_class(desk: Desk, fleet: Fleet) -> None:
    class Teapot(Agent):
        def answer(self, job: Job) -> Answer | None:
            return Answer(418, {"error": job.order.body["task_name"]})

    answer = ask(desk, fleet.add("a", Teapot))
    assert (answer.status, answer.body) == (418, {"error": "sort"})


# What is done once


def test_asked_again_an_agent_answers_with_what_it_has(desk: Desk, fleet: Fleet) -> None:
    agent = fleet.add("a", "flaky", faults=["done, then cut"])
    with pytest.raises((HTTPException, ConnectionError)):
        ask(desk, agent, "t1", 1)
    assert ask(desk, agent, "t1", 2).body == ask(desk, agent, "t1", 3).body
    assert fleet.effect_log == [("a", "t1", 1)]
    assert fleet.effects == {"t1": 1}


def test_asked_again_while_it_works_an_agent_hands_in_once_for_the_newest_attempt(
    desk: Desk, fleet: Fleet
) -> None:
    asked_twice = threading.Event()

    class Patient(Agent):
        def do(self, job: Job) -> dict[str, Any]:
            asked_twice.wait(LONG)
            return super().do(job)

    agent = fleet.add("a", Patient, seconds=0.01)
    assert [ask(desk, agent, "t1", attempt).status for attempt in (1, 2)] == [202, 202]
    asked_twice.set()
    wait_until(lambda: agent.delivered)
    assert [given["opscore_attempt_token"] for given in results(desk)] == ["t1-token-2"]
    assert fleet.effect_log == [("a", "t1", 2)]


def test_what_two_agents_do_for_one_task_is_counted_as_two(desk: Desk, fleet: Fleet) -> None:
    for attempt, agent_id in enumerate(["a", "b"], start=1):
        ask(desk, fleet.add(agent_id, "quick"), "t1", attempt)
    assert fleet.effects == {"t1": 2}


# What is said that is not so


def test_a_lying_agent_tries_every_lie_and_then_tells_the_truth(desk: Desk, fleet: Fleet) -> None:
    honest = fleet.add("honest", "slow", seconds=LONG)
    ask(desk, honest, "theirs")
    wait_until(lambda: honest.jobs["theirs"].is_working)
    liar = fleet.add("liar", "lying", seconds=0.01)
    ask(desk, liar, "mine")
    wait_until(lambda: liar.delivered and not liar.jobs["mine"].is_working)
    assert fleet.lies == [
        ("liar", "wrong token", 409),
        ("liar", "another's task", 409),
        ("liar", "another's task, in its name", 409),
        ("liar", "another's task, by state", 202),
        ("liar", "wrong signature", 401),
        ("liar", "the truth again", 200),
        ("liar", "another story", 200),
    ]
    said = [given["result"] for given in results(desk, "mine")]
    truth = {"by": "liar", "did": {"n": 1}}
    assert said == [LIE, truth, truth, LIE]
    assert fleet.effects == {"mine": 1}


# The end


def test_stopping_waits_for_who_works_and_leaves_nothing_behind(desk: Desk) -> None:
    ended = threading.Event()

    class Lingering(Agent):
        def work(self, job: Job) -> None:
            super().work(job)
            threading.Event().wait(0.3)
            ended.set()

    before = set(threading.enumerate())
    with Fleet(desk.url, KEY, SECRET) as fleet:
        worker = fleet.add("worker", Lingering, seconds=LONG)
        ask(desk, worker)
        wait_until(lambda: worker.jobs["t1"].is_working)
    assert ended.is_set()
    wait_until(lambda: set(threading.enumerate()) - before, says=lambda left: not left)
    with pytest.raises(ConnectionRefusedError):
        ask(desk, worker)
    assert (fleet.effect_log, results(desk)) == ([], [])


def test_an_agent_needs_nothing_but_the_standard_library() -> None:
    without_packages = [sys.executable, "-I", "-S", str(ROOT / "examples" / "fleet.py")]
    done = subprocess.run(without_packages, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
