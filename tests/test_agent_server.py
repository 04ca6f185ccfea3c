"""A function behind HTTP: how an agent server comes, takes work, reports, is told, and goes.

What stands in for opscore where its own processes would only be slow is the desk of `test_fleet`: a
plain HTTP server that notes every call and lets only the present token finish a task.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from stack import API_KEY, ROOT, Servers, Stack, running_stack, wait_until
from test_fleet import KEY, LONG, SECRET, Desk, signed
from werkzeug.serving import make_server

from opscore import AgentBusy, Context, GiveUp, RetryLater, agents, engine
from opscore.agentkit import Completed, Registry
from opscore.errors import ConfigurationError
from opscore.remote import Accepted
from opscore.sdk import agent_jobs, agent_orders
from opscore.sdk.agent_server import AgentServer
from web.app import create_app

Parameters = dict[str, Any]
Function = Callable[[Parameters, Context], Any]


@pytest.fixture
def desk() -> Iterator[Desk]:
    with a_desk() as desk:
        yield desk


@contextmanager
def a_desk() -> Iterator[Desk]:
    desk = Desk()
    thread = threading.Thread(target=desk.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield desk
    finally:
        desk.shutdown()
        desk.server_close()
        thread.join()


def server_for(api_url: str, **options: Any) -> AgentServer:
    given = {"api_url": api_url, "api_key": KEY, "webhook_secret": SECRET}
    return AgentServer("a", **{**given, "grace_seconds": LONG, **options})


@contextmanager
def serving(desk: Desk, function: Function, **options: Any) -> Iterator[str]:
    """Serve the function as agent `a`, known to the desk; yield its URL."""
    server = server_for(desk.url, **options)
    server.agent(function)
    with server.serving() as url:
        wait_until(lambda: desk.states("a"))
        yield url


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: Any


def send(url: str, method: str, raw: bytes | None = None, **headers: str) -> Reply:
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=LONG)
    try:
        connection.request(method, where.path or "/", raw, headers)
        answer = connection.getresponse()
        said = answer.read()
        assert b"Traceback" not in said
        return Reply(answer.status, dict(answer.headers), json.loads(said) if said else None)
    finally:
        connection.close()


@dataclass
class Order:
    """One attempt at a task, as opscore sends it; the desk holds it for the present one."""

    desk: Desk
    task: str = "t1"
    attempt: int = 1
    payload: Any = field(default_factory=lambda: {"n": 1})
    seconds: float = 60.0
    clock: float = 0.0
    """How far opscore's clock is ahead."""

    @property
    def token(self) -> str:
        return f"{self.task}-token-{self.attempt}"

    @property
    def message(self) -> dict[str, Any]:
        deadline = datetime.now(UTC) + timedelta(seconds=self.clock + self.seconds)
        return {
            "senderId": "opscore",
            "messageType": "workflow_task",
            "payload": self.payload,
            "task_name": "sort",
            "opscore_session_id": "r1",
            "opscore_task_id": self.task,
            "opscore_attempt_token": self.token,
            "sessionContext": {
                "workflowId": "w",
                "version": 1,
                "attempt": self.attempt,
                "deadline": deadline.isoformat().replace("+00:00", "Z"),
                "index": None,
            },
        }

    def to(self, url: str) -> Reply:
        self.desk.tokens[self.task] = self.token
        return deliver(url, self.message, clock=self.clock)

    def cancel(self, url: str) -> Reply:
        return deliver(url, self.message | {"messageType": "workflow_cancel", "payload": None})


def deliver(url: str, message: Any, *, clock: float = 0.0, **changed: str) -> Reply:
    """Send a message as opscore signs it, `changed` in its headers."""
    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    at = changed.pop("timestamp", str(int(time.time() + clock)))
    sent = {"X-OpsCore-Timestamp": at, "X-OpsCore-Signature": signed(at, raw)}
    return send(url, "POST", raw, **(sent | changed))


def in_background(work: Callable[[], Reply]) -> Callable[[], Reply]:
    """Begin the work; return what waits for what came of it."""
    answers: list[Reply] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()

    def answer() -> Reply:
        thread.join(LONG)
        return answers[0]

    return answer


class Work:
    """A function that says when it is at work, and goes on when it is let."""

    def __init__(self) -> None:
        self.calls: list[Parameters] = []
        self.contexts: list[Context] = []
        self.gate = threading.Event()

    def __call__(self, parameters: Parameters, context: Context) -> Any:
        self.contexts.append(context)
        self.calls.append(parameters)
        number = len(self.calls)
        while not self.gate.wait(0.02):
            if context.cancelled:
                return "half of it"
        return {"did": parameters, "call": number}


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.gate.set()


def results(desk: Desk, task: str = "t1") -> list[Any]:
    return desk.bodies(f"/tasks/{task}/result")


def notices(desk: Desk) -> list[str]:
    return [body["event_type"] for body in desk.bodies("/internal/agent/notify")]


def echo(parameters: Parameters, context: Context) -> Any:
    return parameters


async def echo_later(parameters: Parameters, context: Context) -> Any:
    await asyncio.sleep(0.01)
    return parameters


QUICK = {"answer_seconds": 0.05, "heartbeat_seconds": 0.3}
"""Accepts nearly at once, and beats ten times a second."""


# --- Coming and going -----------------------------------------------------------------------------


def test_it_registers_says_how_much_it_takes_and_is_idle_then(desk: Desk) -> None:
    more = {"capabilities": ["sort"], "name": "Sorter", "version": "2", "metadata": {"gpu": 1}}
    with serving(desk, echo, capacity=3, **more) as url:
        told = [(call.method, call.path, call.body) for call in desk.calls]
    about = {
        "agentId": "a",
        "agentName": "Sorter",
        "version": "2",
        "capabilities": ["sort"],
        "contactEndpoint": url,
        "metadata": {"gpu": 1},
    }
    register = {"event_type": "REGISTER", "agent_details": about}
    assert told[:3] == [
        ("POST", "/internal/agent/notify", register),
        ("PATCH", "/agents/a", {"capacity": 3, "heartbeatSeconds": 30.0}),
        ("POST", "/agent/a/state", {"state": "idle"}),
    ]


def test_it_registers_until_the_api_takes_it(desk: Desk) -> None:
    desk.outages += [503, 500]
    with serving(desk, echo):
        assert notices(desk) == ["REGISTER"]
        assert desk.outages == []


def test_it_shows_again_and_again_that_it_lives(desk: Desk) -> None:
    with serving(desk, echo, heartbeat_seconds=0.3):
        wait_until(lambda: desk.states("a"), says=lambda states: len(states) > 3)
    assert set(desk.states("a")) == {"idle"}


def test_it_deregisters_when_it_is_closed(desk: Desk) -> None:
    with serving(desk, echo) as url:
        pass
    assert notices(desk) == ["REGISTER", "DEREGISTER"]
    with pytest.raises(ConnectionRefusedError):
        send(url, "GET")


def test_closing_does_not_wait_long_for_an_api_that_is_away(work: Work) -> None:
    with a_desk() as desk:
        server = server_for(desk.url, **{**QUICK, "grace_seconds": 0.2})
        server.agent(work)
        context = server.serving()
        url = context.__enter__()
        wait_until(lambda: desk.states("a"))
        assert Order(desk).to(url).status == 202
    began = time.monotonic()
    context.__exit__(None, None, None)
    assert time.monotonic() - began < 12
    wait_until(lambda: work.contexts[0].cancelled)


def test_it_leaves_no_thread_behind(desk: Desk) -> None:
    before = set(threading.enumerate())
    with serving(desk, echo) as url:
        Order(desk).to(url)
    wait_until(lambda: set(threading.enumerate()) - before, says=lambda left: not left)


def test_it_can_come_again(desk: Desk) -> None:
    server = server_for(desk.url)
    server.agent(echo)
    for attempt in (1, 2):
        with server.serving() as url:
            assert Order(desk, f"t{attempt}").to(url).status == 200
            wait_until(lambda: notices(desk)[-1:] == ["REGISTER"])
    wait_until(lambda: notices(desk), says=lambda seen: seen == ["REGISTER", "DEREGISTER"] * 2)


# --- What is answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", [echo, echo_later])
def test_short_work_is_answered_at_once(desk: Desk, function: Function) -> None:
    with serving(desk, function) as url:
        answer = Order(desk, payload={"n": [1, "é", None]}).to(url)
    assert (answer.status, answer.body) == (
        200,
        {"status": "completed", "result": {"n": [1, "é", None]}},
    )
    assert results(desk) == []


@pytest.mark.parametrize("is_async", [False, True])
def test_longer_work_is_accepted_and_reported(desk: Desk, work: Work, is_async: bool) -> None:
    async def slowly(parameters: Parameters, context: Context) -> Any:
        return await asyncio.to_thread(work, parameters, context)

    with serving(desk, slowly if is_async else work, **QUICK) as url:
        answer = Order(desk).to(url)
        assert (answer.status, answer.body) == (202, {"status": "accepted"})
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
    assert given == {
        "agentId": "a",
        "opscore_attempt_token": "t1-token-1",
        "status": "completed",
        "result": {"did": {"n": 1}, "call": 1},
    }


def test_work_is_accepted_before_who_asks_has_no_time_left(desk: Desk, work: Work) -> None:
    with serving(desk, work, answer_seconds=LONG) as url:
        assert Order(desk, seconds=1.2).to(url).status == 202


def test_an_agent_is_told_its_attempt(desk: Desk) -> None:
    def tell(parameters: Parameters, context: Context) -> Any:
        left = (context.deadline - datetime.now(UTC)).total_seconds()
        return [context.run_id, context.task_id, context.idempotency_key, context.attempt, left]

    with serving(desk, tell) as url:
        *told, left = Order(desk, attempt=3, seconds=100).to(url).body["result"]
    assert told == ["r1", "t1", "t1", 3]
    assert 95 < left < 102


@pytest.mark.parametrize("ahead", [-250.0, 250.0])
def test_the_time_that_is_left_does_not_depend_on_the_agents_clock(
    desk: Desk, ahead: float
) -> None:
    with serving(desk, lambda _, context: not context.cancelled) as url:
        answer = Order(desk, seconds=20, clock=ahead).to(url)
    assert answer.body == {"status": "completed", "result": True}


def raiser(error: Exception) -> Function:
    def agent_function(parameters: Parameters, context: Context) -> Any:
        raise error

    return agent_function


OUTCOMES: list[tuple[Function, dict[str, Any]]] = [
    (
        raiser(RetryLater(7.5, "not yet")),
        {"code": "retry_later", "message": "not yet", "retryAfter": 7.5},
    ),
    (raiser(GiveUp("no way")), {"code": "gave_up", "message": "no way"}),
    (raiser(ValueError("odd")), {"code": "agent_error", "message": "ValueError: odd"}),
    (lambda _, context: {1, 2}, {"code": "invalid_output", "message": "A set is no JSON"}),
    (lambda _, context: float("nan"), {"code": "invalid_output", "message": "NaN"}),
    (lambda _, context: "x" * 2**20, {"code": "output_too_large", "message": "1,048,576"}),
]


@pytest.mark.parametrize(("function", "error"), OUTCOMES)
@pytest.mark.parametrize("is_accepted", [False, True])
def test_a_failure_has_the_code_that_it_has_inside_a_worker(
    desk: Desk, function: Function, error: dict[str, Any], is_accepted: bool
) -> None:
    gate = threading.Event()

    def gated(parameters: Parameters, context: Context) -> Any:
        gate.wait(LONG)
        return function(parameters, context)

    with serving(desk, gated if is_accepted else function, **(QUICK if is_accepted else {})) as url:
        answer = Order(desk).to(url)
        gate.set()
        told = wait_until(lambda: results(desk))[0] if is_accepted else answer.body
    assert answer.status == (202 if is_accepted else 200)
    said = dict(told["error"])
    assert told["status"] == "failed" and error["message"] in said.pop("message")
    assert said == {name: value for name, value in error.items() if name != "message"}


@pytest.mark.parametrize(("asked", "header"), [(7, "7"), (0.25, "0.25"), (1e7, "10000000")])
def test_a_busy_agent_says_when_to_come_again(desk: Desk, asked: float, header: str) -> None:
    with serving(desk, raiser(AgentBusy(asked))) as url:
        answer = Order(desk).to(url)
    assert (answer.status, answer.headers["Retry-After"]) == (429, header)
    assert answer.body["code"] == "agent_busy"


def test_a_busy_agent_that_names_no_time_leaves_it_to_the_task(desk: Desk) -> None:
    with serving(desk, raiser(AgentBusy())) as url:
        answer = Order(desk).to(url)
    assert answer.status == 429 and "Retry-After" not in answer.headers


def test_who_is_busy_only_after_it_accepted_reports_that(desk: Desk, work: Work) -> None:
    def late(parameters: Parameters, context: Context) -> Any:
        work(parameters, context)
        raise AgentBusy(9)

    with serving(desk, late, **QUICK) as url:
        assert Order(desk).to(url).status == 202
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
    assert given["error"]["code"] == "agent_busy" and given["error"]["retryAfter"] == 9


def test_an_agent_that_is_busy_for_a_while_says_idle_after_it(desk: Desk) -> None:
    with serving(desk, raiser(AgentBusy(0.5)), heartbeat_seconds=0.3) as url:
        Order(desk).to(url)
        told = wait_until(lambda: desk.states("a"), says=lambda seen: "active" in seen)
        wait_until(lambda: desk.states("a")[len(told) :], says=lambda seen: "idle" in seen)


def test_beyond_its_capacity_it_is_busy_and_says_when_there_is_room(desk: Desk, work: Work) -> None:
    with serving(desk, work, capacity=2, answer_seconds=0.05) as url:
        assert [Order(desk, f"t{n}").to(url).status for n in (1, 2)] == [202, 202]
        answer = Order(desk, "t3").to(url)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
        assert len(work.calls) == 2
        before = len(desk.states("a"))
        work.gate.set()
        wait_until(lambda: desk.states("a")[before:], seconds=5)  # long before it is due
        assert desk.states("a")[-1] == "idle"
        assert Order(desk, "t3", attempt=2).to(url).status == 200


def test_an_attempt_that_runs_out_of_time_is_reported(desk: Desk) -> None:
    async def for_ever(parameters: Parameters, context: Context) -> Any:
        await asyncio.Event().wait()

    with serving(desk, for_ever, **QUICK) as url:
        assert Order(desk, seconds=0.5).to(url).status == 202
        (given,) = wait_until(lambda: results(desk))
    assert given["error"]["code"] == "timeout"


def test_a_function_that_runs_out_of_time_sees_that(desk: Desk, work: Work) -> None:
    with serving(desk, work, **QUICK) as url:
        assert Order(desk, seconds=0.5).to(url).status == 202
        wait_until(lambda: work.contexts[0].cancelled)
        (given,) = wait_until(lambda: results(desk))
    assert given["error"]["code"] == "timeout", "not the half of a result it came to"


def test_what_an_agent_says_of_its_attempt_is_logged(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(parameters: Parameters, context: Context) -> Any:
        context.log("reading", pages=3)
        context.progress(0.5, "half way")
        raise ValueError("lost it")

    caplog.set_level(logging.INFO, "opscore.sdk")
    with serving(desk, talk) as url:
        Order(desk).to(url)
    assert 'task t1, attempt 1: reading {"pages": 3}' in caplog.messages
    assert "task t1, attempt 1: 50% half way" in caplog.messages
    (failed,) = [text for text in caplog.messages if "lost it" in text]
    assert "Traceback" in failed and "in talk" in failed


# --- The same task again --------------------------------------------------------------------------


def test_the_same_order_twice_at_once_is_done_once(desk: Desk, work: Work) -> None:
    with serving(desk, work, capacity=2) as url:
        answers = [in_background(lambda: Order(desk).to(url)) for _ in range(2)]
        wait_until(lambda: work.calls)
        work.gate.set()
        said = [answer().body["result"] for answer in answers]
    assert said == [{"did": {"n": 1}, "call": 1}] * 2
    assert len(work.calls) == 1


def test_a_newer_attempt_takes_over_what_is_under_way(desk: Desk, work: Work) -> None:
    with serving(desk, work, **QUICK) as url:
        assert Order(desk).to(url).status == 202
        assert Order(desk, attempt=2).to(url).status == 202, "though there is no room for another"
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
    assert given["opscore_attempt_token"] == "t1-token-2"
    assert given["result"]["call"] == 1 and len(work.calls) == 1


def test_a_newer_attempt_is_answered_with_what_an_older_one_began(desk: Desk, work: Work) -> None:
    with serving(desk, work) as url:
        first = in_background(lambda: Order(desk).to(url))
        wait_until(lambda: work.calls)
        second = in_background(lambda: Order(desk, attempt=2).to(url))
        work.gate.set()
        assert [answer().body["result"]["call"] for answer in (first, second)] == [1, 1]


@pytest.mark.parametrize("is_first_accepted", [True, False])
def test_what_is_answered_to_the_newer_attempt_is_not_reported_as_well(
    desk: Desk, work: Work, caplog: pytest.LogCaptureFixture, is_first_accepted: bool
) -> None:
    caplog.set_level(logging.INFO, "opscore.sdk")
    first, second = Order(desk, seconds=5), Order(desk, attempt=2)
    with serving(desk, work, answer_seconds=LONG) as url:
        older = in_background(lambda: first.to(url))  # waits for half of its time
        wait_until(lambda: work.calls)
        if is_first_accepted:
            assert older().status == 202
        newer = in_background(lambda: second.to(url))
        wait_until(lambda: [text for text in caplog.messages if "takes over" in text])
        assert older().status == 202
        work.gate.set()
        assert newer().body["result"]["call"] == 1
    assert results(desk) == []


def test_what_is_over_for_an_older_attempt_goes_on_for_the_newer(work: Work) -> None:
    jobs = some_jobs(work)
    first, second = an_order("t", 1), an_order("t", 2)
    assert jobs.ask(first, 0) == Accepted()
    ((job, order),) = jobs.accepted()
    assert jobs.ask(second, 0) == Accepted()
    jobs.settle(job, order)
    wait_until(lambda: work.contexts)
    assert not work.contexts[0].cancelled
    work.gate.set()
    given = wait_until(jobs.next_report)
    assert given is not None and given[1] is second


def test_an_older_attempt_that_comes_late_changes_nothing(desk: Desk, work: Work) -> None:
    late = Order(desk, payload={"n": 2}).message
    with serving(desk, work, **QUICK) as url:
        assert Order(desk, attempt=2).to(url).status == 202
        assert deliver(url, late).status == 202
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
        assert given["opscore_attempt_token"] == "t1-token-2"
        assert deliver(url, late).status == 200
    assert work.calls == [{"n": 1}]


def test_a_result_is_kept_for_who_asks_again(desk: Desk, work: Work) -> None:
    work.gate.set()
    with serving(desk, work) as url:
        said = [Order(desk, attempt=attempt).to(url) for attempt in (1, 1, 2)]
    assert [answer.status for answer in said] == [200] * 3
    assert [answer.body["result"]["call"] for answer in said] == [1] * 3


def test_a_kept_result_is_given_also_without_room(desk: Desk, work: Work) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        work.gate.set()
        assert Order(desk).to(url).status == 200
        work.gate.clear()
        assert Order(desk, "t2").to(url).status == 202
        assert Order(desk, attempt=2).to(url).status == 200
        work.gate.set()


def test_a_failure_is_not_kept_for_a_newer_attempt(desk: Desk) -> None:
    attempts: list[int] = []

    def second_time(parameters: Parameters, context: Context) -> Any:
        attempts.append(context.attempt)
        if context.attempt == 1:
            raise ValueError("not yet")
        return "done"

    with serving(desk, second_time) as url:
        said = [Order(desk, attempt=attempt).to(url).body["status"] for attempt in (1, 1, 2)]
    assert said == ["failed", "failed", "completed"]
    assert attempts == [1, 2], "the same attempt again is answered alike"


def test_other_parameters_are_other_work(desk: Desk, work: Work) -> None:
    with serving(desk, work, capacity=2, **QUICK) as url:
        assert Order(desk).to(url).status == 202
        assert Order(desk, attempt=2, payload={"n": 2}).to(url).status == 202
        assert work.contexts[0].cancelled and not work.contexts[1].cancelled
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
        assert given["result"]["did"] == {"n": 2}
        again = Order(desk, attempt=3, payload={"n": 3}).to(url)
    assert again.body["result"]["did"] == {"n": 3}


def test_what_was_told_to_stop_is_not_taken_over(desk: Desk) -> None:
    gate = threading.Event()
    calls: list[int] = []

    def stubborn(parameters: Parameters, context: Context) -> Any:
        calls.append(context.attempt)
        gate.wait(LONG)
        return context.cancelled

    with serving(desk, stubborn, **QUICK) as url:
        first = Order(desk)
        assert first.to(url).status == 202
        assert first.cancel(url).body == {"status": "cancelled"}
        assert Order(desk, attempt=2).to(url).status == 429, "the first is still at it"
        gate.set()
        answer = wait_until(
            lambda: Order(desk, attempt=3).to(url), says=lambda answer: answer.status == 200
        )
    assert answer.body["result"] is False and calls == [1, 3]
    assert results(desk) == []


def test_what_ran_out_of_time_is_not_taken_over(desk: Desk) -> None:
    gate = threading.Event()
    contexts: list[Context] = []

    def stubborn(parameters: Parameters, context: Context) -> Any:
        contexts.append(context)
        if context.attempt == 1:
            gate.wait(LONG)
        return context.attempt

    with serving(desk, stubborn, capacity=2, answer_seconds=0.5) as url:
        assert Order(desk, seconds=0.4).to(url).status == 202
        wait_until(lambda: contexts[0].cancelled)
        assert Order(desk, attempt=2).to(url).body["result"] == 2
        gate.set()


def test_what_ends_late_does_not_replace_what_a_newer_attempt_came_to(desk: Desk) -> None:
    gate, ended = threading.Event(), threading.Event()

    def stubborn(parameters: Parameters, context: Context) -> Any:
        if context.attempt == 1:
            gate.wait(LONG)
            ended.set()
        return context.attempt

    with serving(desk, stubborn, capacity=2, answer_seconds=0.5) as url:
        first = Order(desk)
        assert first.to(url).status == 202
        first.cancel(url)
        assert Order(desk, attempt=2).to(url).body["result"] == 2
        gate.set()
        ended.wait(LONG)
        wait_until(lambda: "t1" not in [thread.name for thread in threading.enumerate()])
        assert Order(desk, attempt=3).to(url).body["result"] == 2
    assert results(desk) == []


def some_jobs(function: Function, **options: Any) -> agent_jobs.Jobs:
    registry = Registry()
    registry.agent("a")(function)
    return agent_jobs.Jobs(registry["a"], 1, **options)


def an_order(task: str, attempt: int, **parameters: Any) -> agent_orders.Order:
    return agent_orders.Order(
        task_id=task,
        run_id="r",
        token=str(uuid4()),
        attempt=attempt,
        parameters=parameters,
        deadline=datetime.now(UTC) + timedelta(seconds=LONG),
        seconds=LONG,
    )


def test_so_many_results_are_kept() -> None:
    calls: list[str] = []

    def sized(parameters: Parameters, context: Context) -> Any:
        calls.append(context.task_id)
        return "x" * parameters["size"]

    jobs = some_jobs(sized, most_kept=3, most_kept_bytes=1000)

    def ask(task: str, attempt: int, size: int = 0) -> None:
        assert isinstance(jobs.ask(an_order(task, attempt, size=size), LONG), Completed)

    for task in ("a", "b", "c", "d"):
        ask(task, 1)
    ask("d", 2)
    ask("b", 2)
    assert calls == ["a", "b", "c", "d"], "three are kept"
    ask("a", 2)
    assert calls[4:] == ["a"], "the oldest was not"
    ask("e", 1, 900)
    ask("f", 1, 900)
    ask("a", 3)
    ask("e", 2, 900)
    assert calls[5:] == ["e", "f", "a", "e"], "nor are more bytes"


# --- What is told while it works ------------------------------------------------------------------


def test_an_accepted_attempt_is_kept_alive(desk: Desk, work: Work) -> None:
    path = "/tasks/t1/heartbeat"
    with serving(desk, work, **QUICK) as url:
        Order(desk).to(url)
        beats = wait_until(lambda: desk.bodies(path), says=lambda beats: len(beats) > 2)
        work.gate.set()
        wait_until(lambda: results(desk))
        before = len(desk.states("a"))
        wait_until(lambda: len(desk.states("a")), says=lambda now: now > before + 1)
        after = len(desk.bodies(path))
        wait_until(lambda: len(desk.states("a")), says=lambda now: now > before + 3)
        assert len(desk.bodies(path)) == after, "it is over"
    assert beats[0] == {"agentId": "a", "opscore_attempt_token": "t1-token-1"}


def test_a_newer_attempt_is_kept_alive_in_the_place_of_the_older(desk: Desk, work: Work) -> None:
    with serving(desk, work, **QUICK) as url:
        for attempt in (1, 2):
            Order(desk, attempt=attempt).to(url)
        wait_until(
            lambda: desk.bodies("/tasks/t1/heartbeat"),
            says=lambda beats: beats[-1:] and beats[-1]["opscore_attempt_token"] == "t1-token-2",
        )
        assert not work.contexts[0].cancelled
        work.gate.set()


def test_a_heartbeat_that_comes_too_late_stops_the_work(desk: Desk, work: Work) -> None:
    with serving(desk, work, **QUICK) as url:
        Order(desk).to(url)
        desk.tokens["t1"] = "another"
        wait_until(lambda: work.contexts[0].cancelled)
    assert results(desk) == []


def test_work_of_a_run_that_is_ending_may_stop_and_what_it_came_to_is_reported(
    desk: Desk, work: Work
) -> None:
    with serving(desk, work, **QUICK) as url:
        Order(desk).to(url)
        desk.cancelled.add("t1")
        wait_until(lambda: work.contexts[0].cancelled)
        (given,) = wait_until(lambda: results(desk))
        assert given["result"] == "half of it"
        desk.cancelled.clear()
        work.gate.set()
        again = Order(desk, attempt=2).to(url)
    assert again.body["result"]["call"] == 2, "half a result is nobody's else"


def test_opscore_calls_its_work_off(desk: Desk, work: Work) -> None:
    with serving(desk, work, **QUICK) as url:
        first, second = Order(desk), Order(desk, attempt=2)
        first.to(url)
        second.to(url)
        assert first.cancel(url).body == {"status": "unknown"}, "another attempt wants it"
        assert not work.contexts[0].cancelled
        assert second.cancel(url).body == {"status": "cancelled"}
        assert work.contexts[0].cancelled
        assert Order(desk, "t9").cancel(url).status == 200
    assert results(desk) == []


# --- What comes of it, and an API that is away ----------------------------------------------------


def test_a_result_is_reported_until_it_is_taken(desk: Desk, work: Work) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        Order(desk).to(url)
        desk.outages += [503, 429, 500, 401]
        work.gate.set()
        wait_until(lambda: results(desk))
        assert desk.outages == []
    assert len(results(desk)) == 1


def test_a_result_that_is_refused_for_good_is_not_sent_again(desk: Desk, work: Work) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        Order(desk).to(url)
        desk.tokens["t1"] = "another"
        work.gate.set()
        wait_until(lambda: results(desk))
    assert len(results(desk)) == 1, "closing would have waited for another"


@pytest.mark.parametrize(("status", "code"), [(413, "output_too_large"), (422, "invalid_output")])
def test_a_result_that_the_api_cannot_take_is_a_failure(
    desk: Desk, work: Work, status: int, code: str
) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        Order(desk).to(url)
        desk.outages.append(status)
        work.gate.set()
        (given,) = wait_until(lambda: results(desk))
    assert (given["status"], given["error"]["code"]) == ("failed", code)


def test_who_asks_again_while_a_result_is_to_be_reported_is_given_it(
    desk: Desk, work: Work
) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        Order(desk).to(url)
        desk.outages += [503] * 1000
        work.gate.set()
        wait_until(lambda: len(desk.outages), says=lambda left: left < 1000)
        assert Order(desk, attempt=2).to(url).body["result"]["call"] == 1
        desk.outages.clear()
    assert results(desk) == [], "the older attempt is over"


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"X-OpsCore-Signature": "0" * 64}, "does not match"),
        ({"X-OpsCore-Signature": "\xff"}, "does not match"),
        ({"X-OpsCore-Signature": ""}, "is missing"),
        ({"X-OpsCore-Timestamp": ""}, "is missing"),
        ({"X-OpsCore-Timestamp": "1000000000"}, "300 s from now"),
        ({"timestamp": "1000000000"}, "300 s from now"),
        ({"timestamp": str(int(time.time()) + 4000)}, "300 s from now"),
        ({"timestamp": "yesterday"}, "cannot be read"),
        ({"timestamp": "nan"}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("kind", ["workflow_task", "workflow_cancel"])
def test_what_is_not_signed_now_by_opscore_is_refused(
    desk: Desk, work: Work, changed: dict[str, str], said: str, kind: str
) -> None:
    with serving(desk, work, answer_seconds=0.05) as url:
        assert Order(desk).to(url).status == 202
        message = Order(desk, "t2").message if kind == "workflow_task" else Order(desk).message
        answer = deliver(url, message | {"messageType": kind}, **changed)
        assert answer.status == 401 and said in answer.body["detail"]
        assert answer.headers["WWW-Authenticate"] == "X-OpsCore-Signature"
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert len(work.calls) == 1 and not work.contexts[0].cancelled
        work.gate.set()


def test_a_signature_is_of_this_very_body(desk: Desk, work: Work) -> None:
    at, message = str(int(time.time())), json.dumps(Order(desk).message).encode()
    proof = {"timestamp": at, "X-OpsCore-Signature": signed(at, message)}
    with serving(desk, work) as url:
        assert deliver(url, message.replace(b'"n": 1', b'"n": 2'), **proof).status == 401
    assert work.calls == []


def test_a_signed_time_may_be_written_as_iso_8601(desk: Desk) -> None:
    now = datetime.now(UTC).isoformat()
    with serving(desk, echo) as url:
        assert deliver(url, Order(desk).message, timestamp=now).status == 200


def changed(desk: Desk, **members: Any) -> dict[str, Any]:
    return Order(desk).message | members


def test_orders_that_cannot_be_read_are_refused(desk: Desk, work: Work) -> None:
    no_time = {"sessionContext": {"attempt": 1, "deadline": "soon"}}
    wrong: list[tuple[Any, str, str]] = [
        (b"{", "invalid_json", "no JSON"),
        (b"\xff", "invalid_json", "no JSON"),
        (b"[" * 100_000, "invalid_json", "no JSON"),
        ([], "invalid_order", "an object"),
        ({}, "invalid_order", "messageType"),
        (changed(desk, messageType="greeting"), "invalid_order", "workflow_task"),
        (changed(desk, payload=[1]), "invalid_order", "payload must be an object"),
        (changed(desk, opscore_attempt_token=None), "invalid_order", "opscore_attempt_token"),
        (changed(desk, sessionContext=None), "invalid_order", "sessionContext.attempt"),
        (changed(desk, **no_time), "invalid_order", "sessionContext.deadline cannot be read"),
    ]
    with serving(desk, work) as url:
        for message, code, said in wrong:
            answer = deliver(url, message)
            assert (answer.status, answer.body["code"]) == (400, code), message
            assert said in answer.body["detail"]
            assert answer.body["title"] == "Bad Request" and answer.body["status"] == 400
    assert work.calls == []


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/", 405, "POST"),
        ("DELETE", "/", 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("POST", "/elsewhere", 404, None),
        ("GET", "/elsewhere", 404, None),
    ],
)
def test_wrong_methods_and_paths_are_refused(
    desk: Desk, method: str, path: str, status: int, allowed: str | None
) -> None:
    with serving(desk, echo) as url:
        answer = send(url + path, method, b"{}" if method == "POST" else None)
    assert (answer.status, answer.headers.get("Allow")) == (status, allowed)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_bodies_that_are_too_large_are_refused_unread(desk: Desk) -> None:
    with serving(desk, echo, max_body_bytes=2000) as url:
        assert Order(desk, payload={"text": "x" * 1000}).to(url).status == 200
        answer = Order(desk, "t2", payload={"text": "x" * 3000}).to(url)
        assert (answer.status, answer.body["code"]) == (413, "body_too_large")
        assert "2,000" in answer.body["detail"]


def test_who_sends_too_much_hears_so(desk: Desk) -> None:
    with serving(desk, echo, max_body_bytes=8 * 2**20) as url:
        assert Order(desk, payload={"text": "x" * 24 * 2**20}).to(url).status == 413


def test_what_a_task_may_be_given_is_taken(desk: Desk) -> None:
    with serving(desk, lambda parameters, _: len(parameters["text"])) as url:
        answer = Order(desk, payload={"text": "x" * 17 * 2**20}).to(url)
    assert answer.body["result"] == 17 * 2**20


def test_requests_that_are_no_http_or_stop_half_way_harm_nobody(desk: Desk) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    broken = {
        head + b"\r\n": b" 411 ",
        head + b"Content-Length: two\r\n\r\n": b" 400 ",
        head + b"Content-Length: -1\r\n\r\n": b" 400 ",
        head + b"Content-Length: 10\r\n\r\n12345": b" 400 ",
        head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": b" 411 ",
        b"nonsense\r\n\r\n": b"400",
    }
    with serving(desk, echo) as url:
        where = urlsplit(url)
        for request, status in broken.items():
            with socket.create_connection((where.hostname or "", where.port or 0), LONG) as line:
                line.sendall(request)
                line.shutdown(socket.SHUT_WR)
                said = b"".join(iter(lambda: line.recv(4096), b""))
            assert status in said and b"Traceback" not in said, request
        assert send(f"{url}/health", "GET").body == {"status": "ok"}


def test_an_agent_may_live_at_a_path_of_its_own(desk: Desk) -> None:
    server = server_for(desk.url, url="http://127.0.0.1:1/agents/a")
    server.agent(echo)
    with server.serving() as url:
        assert url == "http://127.0.0.1:1/agents/a"
        wait_until(lambda: desk.states("a"))
        (told,) = desk.bodies("/internal/agent/notify")
        assert told["agent_details"]["contactEndpoint"] == url


# --- Stopping -------------------------------------------------------------------------------------


def test_what_is_under_way_ends_within_the_grace_and_nothing_new_begins(
    desk: Desk, work: Work
) -> None:
    server = server_for(desk.url, capacity=3, **QUICK)
    server.agent(work)
    with server.serving() as url:
        wait_until(lambda: desk.states("a"))
        accepted = Order(desk)
        assert accepted.to(url).status == 202
        closing = threading.Thread(target=server.close)
        closing.start()
        answer = wait_until(
            lambda: Order(desk, "t2").to(url), says=lambda answer: answer.status == 503
        )
        assert answer.body["code"] == "stopping" and answer.headers["Retry-After"] == "5"
        assert Order(desk, attempt=2).to(url).status == 202, "what is under way may be taken over"
        assert notices(desk) == ["REGISTER"], "it is still at work"
        work.gate.set()
        closing.join(LONG)
    assert [given["opscore_attempt_token"] for given in results(desk)] == ["t1-token-2"]
    assert notices(desk) == ["REGISTER", "DEREGISTER"]
    assert desk.calls[-1].body["event_type"] == "DEREGISTER", "the last word, after the result"


def test_what_outlasts_the_grace_is_handed_back(desk: Desk) -> None:
    gate = threading.Event()
    contexts: list[Context] = []

    def stubborn(parameters: Parameters, context: Context) -> Any:
        contexts.append(context)
        gate.wait(LONG)

    server = server_for(desk.url, capacity=2, grace_seconds=0.3)
    server.agent(stubborn)
    with server.serving() as url:
        wait_until(lambda: desk.states("a"))
        waiting = in_background(lambda: Order(desk).to(url))
        wait_until(lambda: contexts)
        server.close()
        answer = waiting()
        assert (answer.status, answer.body["code"]) == (503, "stopping")
        assert contexts[0].cancelled
        gate.set()
    assert notices(desk) == ["REGISTER", "DEREGISTER"], "by which opscore takes it back"


def test_it_stops_when_it_has_answered(desk: Desk) -> None:
    answering = threading.Event()

    class Slow(AgentServer):
        def __call__(self, *request: Any) -> Any:
            answering.set()
            threading.Event().wait(0.3)
            return super().__call__(*request)

    server = Slow("a", api_url=desk.url, api_key=KEY, webhook_secret=SECRET)
    server.agent(echo)
    with server.serving() as url:
        answer = in_background(lambda: send(f"{url}/health", "GET"))
        answering.wait(LONG)
    assert not [one for one in threading.enumerate() if "process_request" in one.name]
    assert answer().status == 200


# --- Its settings ---------------------------------------------------------------------------------


def test_what_is_not_given_comes_from_the_environment(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSCORE_API_URL", desk.url)
    monkeypatch.setenv("OPSCORE_API_KEY", KEY)
    monkeypatch.setenv("OPSCORE_WEBHOOK_SECRET", SECRET)
    server = AgentServer("a")
    server.agent(echo)
    with server.serving() as url:
        assert Order(desk).to(url).status == 200
        wait_until(lambda: desk.states("a"))


def test_everything_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        AgentServer("a").start()
    for said in ("api_key", "webhook_secret", "OPSCORE_API_URL", "no url", "@server.agent"):
        assert said in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://x/", "http://0.0.0.0:9000", "http://"])
def test_a_url_that_cannot_be_called_is_refused(desk: Desk, url: str) -> None:
    server = server_for(desk.url, url=url)
    server.agent(echo)
    with pytest.raises(ConfigurationError, match="url="):
        server.start()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "capacity"),
        ({"capacity": None}, "capacity"),
        ({"capacity": 20_000}, "capacity"),
        ({"answer_seconds": -1}, "answer_seconds"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds"),
        ({"grace_seconds": "8"}, "grace_seconds"),
        ({"metadata": {"since": datetime.now(UTC)}}, "metadata/since"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AgentServer("a", **options)


def test_a_declaration_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="capability"):
        AgentServer("a", capabilities=["two words"]).agent(echo)
    server = AgentServer("a")
    server.agent(echo)
    with pytest.raises(ConfigurationError, match="one"):
        server.agent(echo_later)


def test_it_is_refused_before_it_is_started(desk: Desk) -> None:
    server = server_for(desk.url)
    server.agent(echo)
    httpd = make_server("127.0.0.1", 0, server.app, threaded=True)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        answer = Order(desk).to(f"http://127.0.0.1:{httpd.server_port}")
        assert (answer.status, answer.body["code"]) == (503, "not_started")
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def test_it_loads_no_server_no_broker_and_no_database() -> None:
    code = (
        "import sys, opscore.sdk.agent_server\n"
        "print({name.partition('.')[0] for name in sys.modules}"
        " & {'flask', 'werkzeug', 'celery', 'kombu', 'redis', 'sqlalchemy', 'psycopg2'})"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr


# --- With opscore itself --------------------------------------------------------------------------


class Site:
    """Workers, and an API that comes and goes at one address."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.open()

    def open(self) -> None:
        app = create_app(self.stack.settings)
        self._close_app = app.extensions["opscore"].close
        self._server = make_server("127.0.0.1", self.port, app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._close_app()

    @property
    def environment(self) -> dict[str, str]:
        """What an agent in a process of its own has to know."""
        return {
            "OPSCORE_API_URL": self.url,
            "OPSCORE_API_KEY": API_KEY,
            "OPSCORE_WEBHOOK_SECRET": SECRET,
        }

    @contextmanager
    def serving(self, name: str, function: Function, **options: Any) -> Iterator[AgentServer]:
        given = {"api_url": self.url, "api_key": API_KEY, "webhook_secret": SECRET}
        server = AgentServer(name, **{**given, "grace_seconds": 0, **options})
        server.agent(function)
        with server.serving():
            self.knows(name)
            yield server

    def knows(self, name: str) -> Any:
        """Wait until the agent is to be asked; return its row."""
        query = "SELECT * FROM agents WHERE agent_id = :id AND deregistered_at IS NULL"
        (row,) = wait_until(
            lambda: self.stack.rows(query, id=name),
            says=lambda rows: [row.state for row in rows] == ["idle"],
        )
        return row

    def submit(self, agent: str, *parameters: Parameters, **more: Any) -> Any:
        """Submit a run with a task for each of the parameters, side by side."""
        retry = {"maxAttempts": 3, "backoffSeconds": 0.1, "maxBackoffSeconds": 0.2}
        tasks = [
            {"taskId": f"t{n}", "agentId": agent, "dependsOn": [], "retry": retry, **more}
            for n in range(len(parameters))
        ]
        for task, given in zip(tasks, parameters, strict=True):
            task["parameters"] = given
        return self.stack.submit({"id": agent, "tasks": tasks})

    def tasks(self, run_id: Any) -> list[Any]:
        return [row for row in self.stack.tasks(run_id) if row.kind == "agent"]

    def task(self, run_id: Any) -> Any:
        (row,) = self.tasks(run_id)
        return row

    def is_accepted(self, run_id: Any) -> None:
        wait_until(lambda: self.task(run_id).reason, says=lambda reason: reason == "remote")

    def completed(self, run_id: Any) -> Any:
        run = self.stack.finished(run_id, 40)
        assert run.status == "completed", run.error
        assert self.stack.rows("SELECT * FROM slots WHERE holder IS NOT NULL") == []
        return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log = tmp_path_factory.mktemp("agent-server") / "log"
    settings = {
        "OPSCORE_AGENT_HOSTS": "127.0.0.1",
        "OPSCORE_WEBHOOK_SECRET": SECRET,
        "OPSCORE_LEASE_SECONDS": "3",
        "OPSCORE_RENEW_SECONDS": "1",
    }
    with running_stack(servers, log, **settings) as stack:
        stack.start_worker(pool="threads", concurrency=8)
        site = Site(stack)
        yield site
        site.close()


@pytest.mark.parametrize("function", [echo, echo_later])
@pytest.mark.parametrize("answer_seconds", [5.0, 0.0])
def test_a_workflow_runs_on_it(site: Site, function: Function, answer_seconds: float) -> None:
    document = {
        "id": "in-two-steps",
        "tasks": [
            {"taskId": "first", "agentCapability": "echo", "parameters": {"n": "${input.n}"}},
            {"taskId": "then", "agentId": "echo", "parameters": {"got": "${tasks.first.output}"}},
        ],
        "output": "${tasks.then.output}",
    }
    options = {"capabilities": ["echo"], "answer_seconds": answer_seconds}
    with site.serving("echo", function, **options):
        run_id = site.stack.submit(document, {"n": 7})
        assert site.completed(run_id).output == {"got": {"n": 7}}
    assert [row.attempt for row in site.tasks(run_id)] == [1, 1]


def test_no_more_is_given_to_it_than_it_takes(site: Site) -> None:
    lock, at_once, most = threading.Lock(), 0, 0

    def count(parameters: Parameters, context: Context) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.1)
        with lock:
            at_once -= 1

    with site.serving("counter", count, capacity=2, heartbeat_seconds=20):
        row = site.knows("counter")
        assert (row.capacity, row.heartbeat_seconds) == (2, 20)
        run_id = site.submit("counter", *({"n": n} for n in range(8)))
        site.completed(run_id)
    assert most == 2
    assert {(row.attempt, row.tries) for row in site.tasks(run_id)} == {(1, 0)}


@pytest.mark.parametrize("answer_seconds", [5.0, 0.0])
def test_who_is_busy_loses_no_attempt_and_who_fails_does(site: Site, answer_seconds: float) -> None:
    moods: list[Exception] = [AgentBusy(0.2), RetryLater(0.2), ValueError("odd")]

    def moody(parameters: Parameters, context: Context) -> Any:
        if context.attempt <= len(moods):
            raise moods[context.attempt - 1]
        return context.attempt

    with site.serving("moody", moody, answer_seconds=answer_seconds):
        run_id = site.submit("moody", {})
        assert site.completed(run_id).output == 4
    assert site.task(run_id).tries == 2
    errors = site.stack.rows(
        "SELECT error FROM attempts WHERE task_id = :id ORDER BY number", id=site.task(run_id).id
    )
    codes = [row.error and row.error["code"] for row in errors]
    assert codes == ["agent_busy", "retry_later", "agent_error", None]


@pytest.mark.parametrize("answer_seconds", [5.0, 0.0])
def test_who_wants_to_be_asked_later_is(site: Site, answer_seconds: float) -> None:
    asked: list[float] = []

    def later(parameters: Parameters, context: Context) -> Any:
        asked.append(time.monotonic())
        if context.attempt == 1:
            raise RetryLater(1.5)

    with site.serving("later", later, answer_seconds=answer_seconds):
        site.completed(site.submit("later", {}))
    assert asked[1] - asked[0] >= 1.4, "by its own backoff the task would come after 0.1 s"


def test_who_gives_up_is_not_asked_again(site: Site) -> None:
    with site.serving("quitter", raiser(GiveUp("no way"))):
        run_id = site.submit("quitter", {})
        assert site.stack.finished(run_id).status == "failed"
    row = site.task(run_id)
    assert (row.attempt, row.error["code"], row.error["message"]) == (1, "gave_up", "no way")


def test_it_is_told_that_its_run_was_cancelled(site: Site, work: Work) -> None:
    with site.serving("recalled", work, answer_seconds=0.05):
        run_id = site.submit("recalled", {})
        site.is_accepted(run_id)
        with site.stack.database.transaction() as tx:
            engine.cancel_run(tx, run_id)
        site.stack.dispatcher.follow_end(run_id)
        wait_until(lambda: work.contexts[0].cancelled)
    assert site.stack.finished(run_id).status == "cancelled"


def test_a_result_outlives_an_api_that_is_away(
    site: Site, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    with site.serving("patient", work, answer_seconds=0.05):
        run_id = site.submit("patient", {})
        site.is_accepted(run_id)
        site.close()
        try:
            work.gate.set()
            wait_until(lambda: [text for text in caplog.messages if "is kept" in text])
        finally:
            site.open()
        site.completed(run_id)
    assert len(work.calls) == 1 and site.task(run_id).attempt == 1


def test_it_waits_for_an_api_that_is_not_there_yet(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    server = AgentServer("early", api_url=site.url, api_key=API_KEY, webhook_secret=SECRET)
    server.agent(echo)
    site.close()
    try:
        context = server.serving()
        url = context.__enter__()
        wait_until(lambda: [text for text in caplog.messages if "registering" in text])
        assert send(f"{url}/health", "GET").status == 200
    finally:
        site.open()
    try:
        site.knows("early")
        site.completed(site.submit("early", {"n": 1}))
    finally:
        context.__exit__(None, None, None)


def test_it_comes_again_when_opscore_does_not_know_it_any_more(site: Site) -> None:
    with site.serving("forgotten", echo, heartbeat_seconds=0.6):
        with site.stack.database.transaction() as tx:
            agents.deregister(tx, "forgotten", datetime.now(UTC))
        run_id = site.submit("forgotten", {"n": 1})
        site.completed(run_id)
        site.knows("forgotten")


def test_a_worker_that_is_killed_costs_no_work_that_is_under_way(site: Site, work: Work) -> None:
    with site.serving("survivor", work, answer_seconds=30):
        run_id = site.submit("survivor", {})
        wait_until(lambda: work.calls)
        for worker in site.stack.workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        site.stack.start_worker(pool="threads", concurrency=8)
        wait_until(lambda: site.task(run_id).attempt, says=lambda attempt: attempt == 2)
        work.gate.set()
        assert site.completed(run_id).output == {"did": {}, "call": 1}
    assert (len(work.calls), site.task(run_id).lost) == (1, 1)


SLOW_AT_FIRST = """
import os, threading
from opscore.sdk.agent_server import AgentServer

server = AgentServer(
    os.environ["AGENT"],
    url=f"http://127.0.0.1:{os.environ['PORT']}",
    answer_seconds=0.1,
    heartbeat_seconds=2,
    grace_seconds=0.3,
)


@server.agent
def slow_at_first(parameters, context):
    threading.Event().wait(60 if context.attempt == 1 else 0)
    return context.attempt


if __name__ == "__main__":
    server.run(port=int(os.environ["PORT"]))
else:
    server.start()
"""
PYTHON = (sys.executable, "slow_at_first.py")
GUNICORN = (
    *(sys.executable, "-m", "gunicorn", "--workers", "1", "--threads", "4"),
    *("--bind", "127.0.0.1:{port}", "slow_at_first:server"),
)


@contextmanager
def running(
    site: Site, folder: Path, command: tuple[str, ...]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an agent in a process of its own, under its folder's name."""
    port = str(free_port())
    own = {"PORT": port, "AGENT": folder.name, "PYTHONPATH": str(ROOT)}
    with (folder / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            cwd=folder,
            env=os.environ | site.environment | own,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("command", [PYTHON, GUNICORN], ids=["run", "gunicorn"])
def test_a_server_that_is_killed_costs_an_attempt(
    site: Site, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "slow_at_first.py").write_text(SLOW_AT_FIRST)
    with running(site, tmp_path, command) as process:
        site.knows(tmp_path.name)
        run_id = site.submit(tmp_path.name, {})
        site.is_accepted(run_id)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with running(site, tmp_path, command) as process:
        assert site.completed(run_id).output == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
    first, _ = site.stack.rows(
        "SELECT error FROM attempts WHERE task_id = :id ORDER BY number", id=site.task(run_id).id
    )
    assert first.error["code"] == "agent_silent"


@pytest.mark.parametrize("command", [PYTHON, GUNICORN], ids=["run", "gunicorn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_hands_back_what_it_is_at(
    site: Site, tmp_path: Path, command: tuple[str, ...], number: signal.Signals
) -> None:
    (tmp_path / "slow_at_first.py").write_text(SLOW_AT_FIRST)
    log = tmp_path / "agent.log"
    with running(site, tmp_path, command) as process:
        site.knows(tmp_path.name)
        run_id = site.submit(tmp_path.name, {})
        site.is_accepted(run_id)
        process.send_signal(number)
        assert process.wait(LONG) == 0, log.read_text()
    (row,) = site.stack.rows("SELECT * FROM agents WHERE agent_id = :id", id=tmp_path.name)
    assert row.deregistered_at is not None, log.read_text()
    with running(site, tmp_path, command):
        assert site.completed(run_id).output == 2
    assert (site.task(run_id).tries, site.task(run_id).lost) == (0, 0), "that counts as nothing"
    assert "Traceback" not in log.read_text()


def test_the_example_summarizes(site: Site, tmp_path: Path) -> None:
    with running(site, tmp_path, (sys.executable, str(ROOT / "examples/remote_agent.py"))):
        site.knows("summarizer")
        text = "Queues are short. They were long yesterday."
        run_id = site.submit("summarizer", {"text": text})
        assert site.completed(run_id).output == {"summary": "Queues are short"}
    assert 'summarizing {"characters": 43}' in (tmp_path / "agent.log").read_text()
