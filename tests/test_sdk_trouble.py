"""The clients where something goes wrong: nothing is done twice, no event lost, nothing leaks."""

import asyncio
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psutil
import pytest
from rows import add_event, add_run
from sdk_clients import (
    KINDS,
    Act,
    Request,
    Scripted,
    Site,
    answer,
    answering,
    hanging,
    losing,
    open_sdk,
    open_site,
    passing,
    resetting,
    saying,
    scripted,
)
from stack import API_KEY, ROOT, Servers, wait_until
from test_streams import end_run, seqs
from test_web_process import free_port, serving

from opscore import sdk
from opscore.db import Database
from opscore.sdk import OpsCoreClientAsync, OpsCoreClientSync, async_client, sync_client, transport

ECHO = {"id": "echo", "tasks": [{"taskId": "say", "agentId": "echo", "parameters": "${input}"}]}
LONG = {"id": "long", "tasks": [{"taskId": "pause", "type": "delay", "seconds": 3600}]}


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(servers, tmp_path_factory.mktemp("trouble")) as site:
        with open_sdk("sync", site.url) as client:
            client.workflows.create(ECHO)
            client.workflows.create(LONG)
        yield site


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rest for a tenth of the time between tries."""
    monkeypatch.setattr(transport, "BACKOFF_SECONDS", transport.BACKOFF_SECONDS / 10)
    monkeypatch.setattr(transport, "MAX_BACKOFF_SECONDS", transport.MAX_BACKOFF_SECONDS / 10)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- Sent again, done once ----------------------------------------------------------------------

closing = saying(b"")
LOSSES: dict[str, Callable[[int], Act]] = {
    "the answer is lost": lambda port: losing(port, closing),
    "the answer is lost by a reset": lambda port: losing(port, resetting),
    "the answer is cut off in its head": lambda port: losing(port, saying(b"HTTP/1.1 202 Acc")),
    "the answer is cut off in its body": lambda port: losing(port, saying(answer(202, b"{}")[:-1])),
    "the answer does not come": lambda port: losing(port, hanging),
    "the answer is not HTTP": lambda port: losing(port, saying(b"\x16\x03\x01\r\n\r\n")),
    "a proxy has lost it": lambda port: losing(port, answering(502, b"<html>")),
    "a proxy has waited long enough": lambda port: losing(port, answering(504)),
    "the database was lost after the commit": lambda port: losing(port, answering(503)),
    "it is not now, but at once": lambda port: answering(503, Retry_After="0"),
    "it is not now": lambda port: answering(503),
    "it is too much": lambda port: answering(429, Retry_After="0"),
    "the request is reset": lambda port: resetting,
    "the request is not answered": lambda port: hanging,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_submission_that_is_sent_again_starts_one_run(
    kind: str, site: Site, loss: Callable[[int], Act]
) -> None:
    name = uuid4().hex
    with scripted(loss(site.port), passing(site.port)) as server:
        with open_sdk(kind, server.url, timeout=1) as client:
            run = client.runs.submit("echo", {"name": name}, labels={"name": name})
        assert len(server.requests) >= 2
        key = same_key(server.requests)
    assert [found.id for found in runs_named(site, name)] == [UUID(run.id)]
    rows = site.stack.rows("SELECT run_id FROM idempotency_keys WHERE key = :key", key=key)
    assert [row.run_id for row in rows] == [UUID(run.id)]


def same_key(requests: Sequence[Request]) -> str:
    (key,) = {request.headers["idempotency-key"] for request in requests}
    (_,) = {request.body for request in requests}
    return key


def runs_named(site: Site, name: str) -> list[Any]:
    return site.stack.rows("SELECT id FROM runs WHERE labels ->> 'name' = :name", name=name)


STARTS: dict[str, Callable[[Any], Any]] = {
    "rerun": lambda client: client.runs.rerun(client.runs.submit("echo").id),
    "a task": lambda client: client.tasks.submit({"n": 1}, agent_id="echo"),
    "a trigger": lambda client: client.trigger_workflow("echo", "echo", {"n": 1}),
    "a schedule": lambda client: client.schedules.trigger(a_schedule(client)),
}


def a_schedule(client: Any) -> str:
    name = f"s-{uuid4().hex}"
    client.schedules.create({"name": name, "workflowId": "echo", "cron": "0 0 1 1 *"})
    return name


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_whatever_starts_a_run_starts_one_if_its_answer_is_lost(
    kind: str, site: Site, start: Callable[[Any], Any]
) -> None:
    before = count_runs(site)
    with scripted(passing(site.port)) as server, open_sdk(kind, server.url) as client:
        start(client)
        alone, prepared = count_runs(site) - before, len(server.requests) - 1
    with scripted(
        *[passing(site.port)] * prepared, losing(site.port, closing), passing(site.port)
    ) as server:
        with open_sdk(kind, server.url) as client:
            start(client)
        same_key(server.requests[prepared:])
        assert len(server.requests) == prepared + 2
    assert count_runs(site) - before == 2 * alone


def count_runs(site: Site) -> int:
    (row,) = site.stack.rows("SELECT count(*) AS n FROM runs")
    return int(row.n)


def test_a_cancel_whose_answer_is_lost_is_no_conflict(kind: str, site: Site) -> None:
    losses = losing(site.port, closing)
    with scripted(passing(site.port), losses, passing(site.port)) as server:
        with open_sdk(kind, server.url) as client:
            assert client.runs.submit("long").cancel().wait(60).status == "cancelled"
        told = [request.path.rsplit("/", 1)[1] for request in server.requests]
    assert told[:3] == ["runs", "cancel", "cancel"]


ONCE: dict[str, Callable[[Any], Any]] = {
    "resume": lambda client: client.runs.resume("r"),
    "retry": lambda client: client.runs.retry("r"),
    "approve": lambda client: client.tasks.approve("t"),
    "reject": lambda client: client.tasks.reject("t"),
    "update_state": lambda client: client.update_state("a", "idle"),
    "create": lambda client: client.schedules.create({"name": "s"}),
    "delete": lambda client: client.schedules.delete("s"),
}


@pytest.mark.parametrize("call", ONCE.values(), ids=ONCE)
def test_what_cannot_be_repeated_is_not_sent_again_when_it_may_have_been_done(
    kind: str, call: Callable[[Any], Any]
) -> None:
    acts = [closing, resetting, saying(b"HTTP/1.1 2"), answering(503, Retry_After="0")]
    with scripted(*acts) as server, open_sdk(kind, server.url) as client:
        for number in range(1, 4):
            with pytest.raises(sdk.ConnectionError) as lost:
                call(client)
            assert lost.value.was_sent and len(server.requests) == number
        with pytest.raises(sdk.ServerError) as away:
            call(client)
        assert away.value.retry_after == 0.0 and len(server.requests) == 4


def test_what_cannot_be_repeated_is_not_sent_again_when_no_answer_comes(kind: str) -> None:
    with scripted(hanging) as server, open_sdk(kind, server.url, timeout=0.2) as client:
        with pytest.raises(sdk.ConnectionError, match="did not answer in time") as late:
            client.tasks.approve("t")
        assert late.value.was_sent and len(server.requests) == 1


@pytest.mark.parametrize("call", ONCE.values(), ids=ONCE)
def test_what_cannot_be_repeated_is_sent_again_when_it_was_refused(
    kind: str, call: Callable[[Any], Any]
) -> None:
    with scripted(answering(429), answering(409)) as server:
        with open_sdk(kind, server.url) as client, pytest.raises(sdk.ConflictError):
            call(client)
        assert len(server.requests) == 2


REPEATABLE: dict[str, Callable[[Any], Any]] = {
    "get": lambda client: client.runs.get("r"),
    "list": lambda client: next(iter(client.runs.list())),
    "cancel": lambda client: client.runs.pause("r"),
    "create": lambda client: client.workflows.create({"id": "w"}),
    "validate": lambda client: client.workflows.validate({"id": "w"}),
    "report_result": lambda client: client.tasks.report_result("t", "token", 1),
    "heartbeat": lambda client: client.tasks.heartbeat("t", "token"),
    "change": lambda client: client.agents.change("a", {"paused": True}),
    "trigger": lambda client: client.schedules.trigger("s"),
}


@pytest.mark.parametrize("call", REPEATABLE.values(), ids=REPEATABLE)
def test_what_can_be_repeated_is_until_it_is_enough(kind: str, call: Callable[[Any], Any]) -> None:
    with (
        scripted(closing, answering(503), answering(502, b"<html>")) as server,
        open_sdk(kind, server.url, retries=2) as client,
    ):
        with pytest.raises(sdk.ServerError, match="<html>"):
            call(client)
        assert len(server.requests) == 3
    with scripted(closing) as server, open_sdk(kind, server.url, retries=0) as client:
        with pytest.raises(sdk.ConnectionError):
            call(client)
        assert len(server.requests) == 1


class Late:
    """A server that is not there before somebody was refused."""

    def __init__(self, *acts: Act) -> None:
        self.port, self.acts = free_port(), acts
        self.server: Scripted | None = None
        self.refused = 0

    def come(self) -> None:
        self.refused += 1
        if self.server is None:
            self.server = Scripted(*self.acts, port=self.port)

    def transport(self, kind: str) -> Any:
        return SyncToLate(self) if kind == "sync" else AsyncToLate(self)


class SyncToLate(httpx2.HTTPTransport):
    def __init__(self, late: Late) -> None:
        super().__init__()
        self.late = late

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return super().handle_request(request)
        except httpx2.ConnectError:
            self.late.come()
            raise


class AsyncToLate(httpx2.AsyncHTTPTransport):
    def __init__(self, late: Late) -> None:
        super().__init__()
        self.late = late

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await super().handle_async_request(request)
        except httpx2.ConnectError:
            self.late.come()
            raise


@pytest.mark.parametrize("call", ONCE.values(), ids=ONCE)
def test_a_refused_connection_is_tried_again_whatever_it_was_for(
    kind: str, call: Callable[[Any], Any]
) -> None:
    late = Late(answering(409))
    url = f"http://127.0.0.1:{late.port}"
    with (
        open_sdk(kind, url, transport=late.transport(kind)) as client,
        pytest.raises(sdk.ConflictError),
    ):
        call(client)
    assert late.server is not None
    assert (late.refused, len(late.server.requests)) == (1, 1)
    late.server.close()


def test_a_closed_port_is_told_as_that(kind: str) -> None:
    with open_sdk(kind, f"http://127.0.0.1:{free_port()}", retries=1) as client:
        for call in (client.health, client.ready, partial(client.runs.submit, "w")):
            with pytest.raises(sdk.ConnectionError, match="cannot be reached") as refused:
                call()
            assert not refused.value.was_sent


def test_a_name_that_nobody_has_is_told_as_that(kind: str) -> None:
    with (
        open_sdk(kind, "http://nobody.invalid", retries=0) as client,
        pytest.raises(sdk.ConnectionError, match=r"nobody\.invalid cannot be reached"),
    ):
        client.runs.get("r")


def test_a_server_that_never_answers_is_given_up(kind: str) -> None:
    began = time.monotonic()
    with scripted(hanging) as server, open_sdk(kind, server.url, timeout=0.2, retries=1) as client:
        with pytest.raises(sdk.ConnectionError, match="did not answer in time"):
            client.runs.submit("w")
        assert len(server.requests) == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_told_to_come_back_much_later_is_told_so_at_once(kind: str, status: int) -> None:
    began = time.monotonic()
    with scripted(answering(status, Retry_After="61")) as server:
        with open_sdk(kind, server.url) as client, pytest.raises(sdk.OpsCoreApiError) as refused:
            client.runs.submit("w")
        assert (refused.value.retry_after, len(server.requests)) == (61.0, 1)
    assert time.monotonic() - began < 10


def test_who_is_told_to_come_back_soon_comes_back_then(kind: str) -> None:
    said = b'{"items": [], "nextCursor": null}'
    with (
        scripted(answering(503, Retry_After="1"), answering(200, said)) as server,
        open_sdk(kind, server.url) as client,
    ):
        began = time.monotonic()
        assert list(client.runs.list()) == []
        assert 1 <= time.monotonic() - began < 10


@pytest.mark.parametrize("said", ["", "soon", "-1", "1.5", "Fri, 31 Dec 1999 23:59:59 GMT", "²"])
def test_a_retry_after_that_is_no_number_of_seconds_counts_for_nothing(said: str) -> None:
    headers = httpx2.Headers({"Retry-After": said.encode()})
    assert sdk.errors.read_retry_after(headers) is None


def test_pauses_grow_and_differ_and_have_a_limit() -> None:
    for tried, most in [(0, 0), (1, 0.025), (2, 0.05), (3, 0.1), (6, 0.8), (7, 0.8), (10**6, 0.8)]:
        pauses = [transport.backoff(tried) for _ in range(200)]
        assert min(pauses) >= 0.0 and most / 2 <= max(pauses) <= most
        assert len(set(pauses)) > 100 or not tried


# --- Waits that outlive trouble -----------------------------------------------------------------


def run_in(status: str) -> bytes:
    finished = "2026-01-31T12:00:00Z" if status == "completed" else None
    said = {"runId": "r", "workflowId": "w", "status": status, "finishedAt": finished}
    return json.dumps({**said, "output": 7, "error": None, "tasks": []}).encode()


def test_a_wait_outlives_what_passes(kind: str) -> None:
    goes_on, over = answering(200, run_in("running")), answering(200, run_in("completed"))
    troubles = [closing, resetting, hanging, answering(503, Retry_After="0"), answering(502, b"<")]
    with scripted(goes_on, *troubles, goes_on, over) as server:
        with (
            open_sdk(kind, server.url, timeout=1, retries=0) as client,
            pytest.MonkeyPatch.context() as patch,
        ):
            for module in (async_client, sync_client):
                patch.setattr(module, "LONG_POLL_SECONDS", 0.1)
            assert client.runs.get("r").wait().output == 7
        assert len(server.requests) == 3 + len(troubles)


def test_a_long_wait_outlives_more_trouble_than_the_api_may_be_away_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_SECONDS", 0.5)
    for module in (async_client, sync_client):
        monkeypatch.setattr(module, "LONG_POLL_SECONDS", 0.3)
    goes_on, over = answering(200, run_in("running")), answering(200, run_in("completed"))

    def waits(connection: socket.socket, request: Request) -> None:
        threading.Event().wait(0.3)
        goes_on(connection, request)

    with scripted(goes_on, *[closing, waits] * 4, over) as server:
        with open_sdk(kind, server.url) as client:
            assert client.runs.get("r").wait(60).output == 7
        assert len(server.requests) == 10


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_wait_ends_with_what_does_not_pass(kind: str, status: int) -> None:
    with scripted(answering(200, run_in("running")), answering(status)) as server:
        with open_sdk(kind, server.url) as client:
            run = client.runs.get("r")
            with pytest.raises(sdk.OpsCoreApiError) as refused:
                run.wait()
        assert (refused.value.status_code, len(server.requests)) == (status, 2)


def test_a_wait_for_which_there_is_no_place_rests_before_it_asks_again(kind: str) -> None:
    no_place = answering(200, run_in("running"), Retry_After="1")
    with scripted(no_place, no_place, answering(200, run_in("completed"))) as server:
        with open_sdk(kind, server.url) as client:
            run = client.runs.get("r")
            began = time.monotonic()
            run.wait()
            assert 1 <= time.monotonic() - began < 10
        assert len(server.requests) == 3


def test_a_wait_ends_in_time_also_if_nobody_answers(kind: str) -> None:
    goes_on = answering(200, run_in("running"))
    for trouble in (hanging, closing, answering(503), answering(429, Retry_After="60"), goes_on):
        with (
            scripted(goes_on, trouble) as server,
            open_sdk(kind, server.url, timeout=0.2) as client,
        ):
            run = client.runs.get("r")
            began = time.monotonic()
            with pytest.raises(sdk.WaitTimeout):
                run.wait(timeout=0.3)
            assert 0.3 <= time.monotonic() - began < 10


def test_a_wait_that_is_answered_too_early_rests_longer_and_longer(kind: str) -> None:
    with (
        scripted(answering(200, run_in("running"))) as server,
        open_sdk(kind, server.url) as client,
    ):
        run = client.runs.get("r")
        with pytest.raises(sdk.WaitTimeout):
            run.wait(timeout=0.5)
        assert len(server.requests) < 40


def test_a_wait_ends_if_the_api_is_away_for_too_long(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_SECONDS", 0.3)
    with (
        scripted(answering(200, run_in("running"))) as server,
        open_sdk(kind, server.url, timeout=1) as client,
    ):
        run = client.runs.get("r")
        server.close()
        with pytest.raises(sdk.ConnectionError, match="cannot be reached"):
            run.wait(timeout=60)


# --- Streams ------------------------------------------------------------------------------------

EVENTS = [{"seq": seq, "type": "task.started", "data": {"n": "ä"}} for seq in (3, 7, 20)]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
ENDING = HEAD + b"Connection: close\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def message(event: dict[str, Any]) -> str:
    return f"id: {event['seq']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n"


def in_lines(event: dict[str, Any]) -> str:
    lines = json.dumps(event, indent=1).splitlines()
    return "".join(f"data:{line}\n" for line in lines) + f": between\nid: {event['seq']}\n\n"


WRITTEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "as the API does": message,
    "with CRLF": lambda event: message(event).replace("\n", "\r\n"),
    "with CR": lambda event: message(event).replace("\n", "\r"),
    "in several data lines": in_lines,
    "in several data lines with CRLF": lambda event: in_lines(event).replace("\n", "\r\n"),
    "with comments": lambda event: f": still here\n\n\n\n:\n{message(event)}: still here\n\n",
    "without spaces": lambda event: f"data:{json.dumps(event)}\nretry:1\n\n",
}


def streaming(
    write: Callable[[dict[str, Any]], str], cut: int | None = None, head: bytes = ENDING
) -> Act:
    """Stream the events that the client has not; the first time cut after so many bytes."""
    first = threading.Semaphore(1)

    def act(connection: socket.socket, request: Request) -> None:
        after = int(request.headers["last-event-id"])
        text = "".join(write(event) for event in EVENTS if event["seq"] > after).encode()
        if not text:
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            return
        text = text[: cut if first.acquire(blocking=False) else None]
        if head is CHUNKED:
            text = f"{len(text):x}\r\n".encode() + text + b"\r\n" if text else b""
        connection.sendall(head + text)

    return act


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_a_stream_that_is_cut_at_any_byte_gives_every_event_once(
    kind: str, write: Callable[[dict[str, Any]], str]
) -> None:
    size = len("".join(write(event) for event in EVENTS[:2]).encode())
    with scripted(closing) as server, open_sdk(kind, server.url) as client:
        for cut in range(len(write(EVENTS[0])) - 2, size + 1):
            server.begin(streaming(write, cut))
            assert list(client.runs.events("r")) == EVENTS, cut


@pytest.mark.parametrize("cut", [0, 1, 60, 100, 150])
def test_a_stream_that_breaks_off_gives_every_event_once(kind: str, cut: int) -> None:
    with scripted(streaming(message, cut, CHUNKED)) as server, open_sdk(kind, server.url) as client:
        assert list(client.runs.events("r")) == EVENTS
        assert len(server.requests) == 3  # cut; the rest, without an end; nothing more


def test_a_stream_outlives_what_passes_and_goes_on_where_it_was(kind: str) -> None:
    whole = streaming(message)
    troubles = [answering(503, Retry_After="0"), closing, resetting, answering(502, b"<html>")]
    one = saying(ENDING + message(EVENTS[0]).encode())
    with scripted(*troubles, one, *troubles, whole) as server:
        with open_sdk(kind, server.url, retries=0) as client:
            assert list(client.runs.events("r")) == EVENTS
        told = [request.headers["last-event-id"] for request in server.requests]
        assert told == ["0"] * 5 + ["3"] * 5 + ["20"]
        assert {request.headers["accept"] for request in server.requests} == {"text/event-stream"}


def test_a_quiet_stream_may_break_off_after_longer_than_the_api_may_be_away(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_SECONDS", 0.3)

    def quiet(connection: socket.socket, request: Request) -> None:
        connection.sendall(CHUNKED)
        threading.Event().wait(0.5)

    with (
        scripted(quiet, quiet, closing, streaming(message)) as server,
        open_sdk(kind, server.url) as client,
    ):
        assert list(client.runs.events("r")) == EVENTS


def test_a_stream_that_says_nothing_any_more_is_made_anew(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (async_client, sync_client):
        monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)

    def dead(connection: socket.socket, request: Request) -> None:
        connection.sendall(CHUNKED)
        connection.recv(1)

    with (
        scripted(dead, hanging, streaming(message)) as server,
        open_sdk(kind, server.url) as client,
    ):
        assert list(client.runs.events("r")) == EVENTS


def test_a_stream_ends_if_the_api_is_away_for_too_long(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_SECONDS", 0.3)
    with scripted(saying(CHUNKED)) as server, open_sdk(kind, server.url) as client:
        events = client.runs.events("r")
        server.close()
        with pytest.raises(sdk.ConnectionError, match="cannot be reached"):
            next(events)


@pytest.mark.parametrize("data", ["{", "[]", "null", "{}", '{"seq": "1"}', '{"seq": null}'])
def test_what_is_no_event_is_told_as_that(kind: str, data: str) -> None:
    said = saying(ENDING + f"data: {data}\n\n".encode())
    with (
        scripted(said) as server,
        open_sdk(kind, server.url) as client,
        pytest.raises(sdk.OpsCoreSDKError, match="is not opscore"),
    ):
        list(client.runs.events("r"))


@pytest.mark.parametrize("status", [401, 404, 422, 500])
def test_a_stream_ends_with_what_does_not_pass(kind: str, status: int) -> None:
    one = saying(ENDING + message(EVENTS[0]).encode())
    with scripted(one, answering(status)) as server, open_sdk(kind, server.url) as client:
        events = client.runs.events("r")
        assert next(events) == EVENTS[0]
        with pytest.raises(sdk.OpsCoreApiError) as refused:
            next(events)
        assert refused.value.status_code == status


# --- The server dies ----------------------------------------------------------------------------


def test_events_and_waits_outlive_a_server_that_is_killed_or_stopped(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    port = free_port()
    run, followed = partial(serving, environment, port=port, threads=16), Followed()
    with database.autocommit() as tx, ThreadPoolExecutor() as readers:
        run_id = add_run(tx, "running")
        args = (f"http://127.0.0.1:{port}", run_id)
        found = [readers.submit(followed.follow, kind, *args) for kind in KINDS]
        found += [readers.submit(wait_for, kind, *args) for kind in KINDS]
        for life, end in enumerate((kill, terminate)):
            with run(tmp_path / f"{life}.log") as (web, _):
                add_event(tx, run_id, f"life.{life}")
                followed.wait_for(seqs(tx, run_id))
                end(web)
            add_event(tx, run_id, f"between.{life}")
            assert not any(future.done() for future in found)
        with run(tmp_path / "last.log"):
            end_run(tx, run_id)
            ended = [future.result(60) for future in found]
        expected = seqs(tx, run_id)
    assert ended == [expected, expected, "completed", "completed"]


class Followed:
    """The events that clients have got, as they come."""

    def __init__(self) -> None:
        self.seqs: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def follow(self, kind: str, url: str, run_id: UUID) -> list[int]:
        """Note the events of a run; return all of them."""
        with open_sdk(kind, url) as client:
            for event in client.runs.events(str(run_id)):
                self.seqs[kind].append(event["seq"])
        return self.seqs[kind]

    def wait_for(self, seqs: list[int]) -> None:
        wait_until(lambda: self.seqs, says=lambda got: all(got[kind] == seqs for kind in KINDS))


def wait_for(kind: str, url: str, run_id: UUID) -> str:
    with open_sdk(kind, url, retries=20) as client:
        status: str = client.runs.get(str(run_id)).wait(60).status
    return status


def kill(web: subprocess.Popen[bytes]) -> None:
    """Kill the server, and first the process that serves for it, which would outlive it."""
    for child in psutil.Process(web.pid).children():
        child.kill()
    web.kill()
    web.wait(10)


def terminate(web: subprocess.Popen[bytes]) -> None:
    web.terminate()
    web.wait(60)


# --- Users in a hurry ---------------------------------------------------------------------------

ODD = ["a/b", "../agents", "..", ".", "a?b=c", "a b", "ä☃", "a#b", "%2e%2e", "a%2Fb", "a\0b"]
ODD += [
    "a\nb",
    "x" * 5000,
    "{runId}",
    "a;b",
    "a\\b",
    "\ud800",
    "validate",
    None,
    7,
    UUID("01890a5d-ac96-774b-bcce-b302099a8057"),
]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_an_odd_id_names_nothing_and_reaches_no_other_operation(
    kind: str, site: Site, odd: Any
) -> None:
    asked_for: list[str] = []

    def watched(environ: dict[str, Any], start: Any) -> Any:
        asked_for.append(environ["PATH_INFO"])
        return site.app(environ, start)

    with open_sdk(kind, app=watched) as client:
        for call, expected in (
            (client.workflows.get, f"/v1/opscore/workflows/{odd}"),
            (client.runs.get, f"/v1/opscore/runs/{odd}"),
            (client.runs.cancel, f"/v1/opscore/runs/{odd}/cancel"),
            (client.tasks.get, f"/v1/opscore/tasks/{odd}"),
            (client.agents.get, f"/v1/opscore/agents/{odd}"),
            (client.schedules.delete, f"/v1/opscore/schedules/{odd}"),
        ):
            asked_for.clear()
            with pytest.raises((ValueError, sdk.NotFoundError)):
                call(odd)
            assert asked_for in ([], [expected])
            assert asked_for == [] or "/" not in odd
    with open_sdk(kind, site.url) as client, pytest.raises((ValueError, sdk.OpsCoreApiError)):
        client.agents.get(odd)


@pytest.mark.parametrize(
    ("input", "told"),
    [
        ({"x": math.nan}, "not JSON compliant"),
        ([math.inf], "not JSON compliant"),
        ({"x": {1, 2}}, "there is none for a set"),
        ({"at": datetime.now(UTC)}, "there is none for a datetime"),
        (b"bytes", "there is none for a bytes"),
        ({(1, 2): 3}, "keys must be"),
    ],
)
def test_what_is_no_json_is_refused_and_nothing_is_sent(kind: str, input: Any, told: str) -> None:
    with scripted(answering(500)) as server, open_sdk(kind, server.url) as client:
        for call in (
            partial(client.runs.submit, "w", input),
            partial(client.tasks.submit, {"input": input}, agent_id="a"),
            partial(client.update_state, "a", "idle", {"details": input}),
            partial(client.workflows.create, {"id": input}),
        ):
            with pytest.raises(ValueError, match=told):
                call()
        assert server.requests == []


def test_what_holds_itself_is_refused(kind: str) -> None:
    round_: list[Any] = []
    round_.append(round_)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with scripted(answering(500)) as server, open_sdk(kind, server.url) as client:
        for input in (round_, deep):
            with pytest.raises(ValueError, match="cannot be sent as JSON"):
                client.runs.submit("w", input)
        assert server.requests == []


def test_moments_without_a_zone_are_refused_and_others_are_sent_whole(kind: str) -> None:
    naive, aware = datetime(2099, 1, 1, 12), datetime(2099, 1, 1, 12, tzinfo=UTC)
    with scripted(answering(409)) as server, open_sdk(kind, server.url) as client:
        for call in (
            partial(client.runs.submit, "w", start_at=naive),
            partial(client.runs.submit, "w", deadline_at=naive),
            partial(client.runs.list, created_after=naive),
            partial(client.agents.update_state, "a", "idle", None, naive),
        ):
            with pytest.raises(ValueError, match="carries no time zone"):
                call()
        assert server.requests == []
        with pytest.raises(sdk.ConflictError):
            client.runs.submit("w", start_at=aware)
        assert json.loads(server.requests[0].body)["startAt"] == "2099-01-01T12:00:00+00:00"


@pytest.mark.parametrize("key", ["a b", "a\nb", "ä", "a\0"])
def test_a_key_that_no_header_can_hold_is_refused(kind: str, key: str) -> None:
    with scripted(answering(500)) as server, open_sdk(kind, server.url) as client:
        with pytest.raises(ValueError, match="idempotency_key"):
            client.runs.submit("w", idempotency_key=key)
        assert server.requests == []


def test_a_closed_client_says_so(kind: str) -> None:
    whole = streaming(message)
    with scripted(answering(200, run_in("running")), whole) as server:
        with open_sdk(kind, server.url) as client:
            run, events = client.runs.get("r"), client.runs.events("r")
            assert next(events) == EVENTS[0]
            client.close()
            client.close()
            for call in (client.health, run.refresh, partial(next, client.runs.events("r"))):
                with pytest.raises(RuntimeError, match="closed"):
                    call()
            with pytest.raises(RuntimeError, match="closed"):
                list(events)
        wait_until(lambda: server.connections, says=lambda count: count == 0)


def test_threads_share_a_client(site: Site) -> None:
    with OpsCoreClientSync(site.url, API_KEY) as client, ThreadPoolExecutor(8) as threads:

        def use(number: int) -> Any:
            run = client.runs.submit("echo", {"number": number}).wait(60)
            assert [event["type"] for event in run.events()][-1] == "run.completed"
            return run.output["number"]

        assert list(threads.map(use, range(24))) == list(range(24))


def test_a_wait_and_a_stream_that_are_cancelled_leave_no_connection(site: Site) -> None:
    def stream(connection: socket.socket, request: Request) -> None:
        connection.sendall(CHUNKED)
        connection.recv(1)

    async def cancel(server: Scripted, wait: Callable[[Any], Any], open_ones: int) -> None:
        async with OpsCoreClientAsync(server.url, API_KEY) as client:
            run = await client.runs.get("r")
            waiting = asyncio.create_task(wait(run))
            await until(lambda: len(server.requests) > 1 and server.connections == open_ones)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: server.connections == 0)
            server.begin(answering(200, run_in("completed")))
            assert (await run.wait(5)).output == 7  # the client is as good as before

    async def read(run: Any) -> None:
        async for _ in run.events():
            raise AssertionError

    for act, wait, open_ones in (
        (hanging, lambda run: run.wait(), 1),
        (stream, read, 1),
        (answering(503, Retry_After="30"), lambda run: run.wait(), 0),
    ):
        with scripted(answering(200, run_in("running")), act) as server:
            asyncio.run(cancel(server, wait, open_ones))


async def until(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not probe():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_stream_that_is_not_read_to_its_end_leaves_no_connection() -> None:
    def endless(connection: socket.socket, request: Request) -> None:
        connection.sendall(ENDING + message(EVENTS[0]).encode())
        connection.recv(1)

    async def break_off(server: Scripted) -> None:
        async with OpsCoreClientAsync(server.url, API_KEY) as client:
            async for _ in client.runs.events("r"):
                break
            await until(lambda: server.connections == 0)
            events = client.runs.events("r")
            await anext(events)
            assert server.connections == 1
            await events.aclose()
            await until(lambda: server.connections == 0)

    with scripted(endless) as server:
        with OpsCoreClientSync(server.url, API_KEY) as client:
            for _ in client.runs.events("r"):
                break
            wait_until(lambda: server.connections, says=lambda count: count == 0)
            events = client.runs.events("r")
            next(events)
            assert server.connections == 1
            events.close()
            wait_until(lambda: server.connections, says=lambda count: count == 0)
        asyncio.run(break_off(server))
        assert len(server.requests) == 4


CARELESS = """
import asyncio, gc
from opscore import sdk

URL, KEY = {url!r}, {key!r}

def sync():
    with sdk.OpsCoreClientSync(URL, KEY) as client:
        run = client.runs.submit("echo", {{"n": 1}})
        for _ in run.events():
            break
        left = client.runs.events(run.id)
        next(left)
        next(client.runs.list())
        try:
            client.runs.get("nothing")
        except sdk.NotFoundError:
            pass
        run.wait(60)
    return left

async def careless():
    async with sdk.OpsCoreClientAsync(URL, KEY) as client:
        run = await client.runs.submit("long")
        async for _ in run.events():
            break
        left = client.runs.events(run.id)
        await anext(left)
        await anext(client.runs.list())
        waiting = asyncio.create_task(run.wait())
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        try:
            await client.runs.get("nothing")
        except sdk.NotFoundError:
            pass
        await run.cancel()
    return left

sync(), asyncio.run(careless()), gc.collect()
print("done")
"""


def test_careless_use_leaves_nothing_that_python_warns_of(site: Site) -> None:
    program = CARELESS.format(url=site.url, key=API_KEY)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_a_client_whose_connections_are_all_in_use_says_so() -> None:
    one = httpx2.HTTPTransport(limits=httpx2.Limits(max_connections=1))
    first = saying(ENDING + message(EVENTS[0]).encode())

    def endless(connection: socket.socket, request: Request) -> None:
        first(connection, request)
        connection.recv(1)

    with (
        scripted(endless) as server,
        OpsCoreClientSync(server.url, API_KEY, 0.2, retries=1, transport=one) as client,
    ):
        events = client.runs.events("r")
        next(events)
        with pytest.raises(sdk.ConnectionError, match="hold all connections") as full:
            client.runs.get("r")
        assert not full.value.was_sent and len(server.requests) == 1


def test_proxies_of_the_environment_are_used_and_no_proxy_is_heeded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answering(200, run_in("completed"))
    with scripted(said) as proxy, scripted(said) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        with open_sdk(kind, "http://opscore.invalid") as client:
            client.runs.get("r")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with open_sdk(kind, server.url) as client:
            client.runs.get("r")
        assert [request.target for request in proxy.requests] == [
            "http://opscore.invalid/v1/opscore/runs/r"
        ]
        assert len(server.requests) == 1
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with (
        open_sdk(kind, "http://opscore.invalid", retries=0) as client,
        pytest.raises(sdk.ConnectionError),
    ):
        client.runs.get("r")
