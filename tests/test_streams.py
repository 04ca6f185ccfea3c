"""Streams of events: none is missed or doubled, none holds what it must not, all end."""

import http.client
import json
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from http_client import PREFIX, Client, open_client, problem
from rows import add_event, add_run, add_task
from sqlalchemy import event, select, text
from stack import API_KEY, Servers, wait_until
from test_web_process import ask, serving
from werkzeug.test import TestResponse

from opscore.config import Settings
from opscore.db import Database, Tx
from opscore.errors import RunNotFound
from opscore.models import Event
from web import streams as module
from web.errors import Refused
from web.streams import Stream, Streams

LOOK = 0.02
LARGE = 20_000_000
"""Bytes, more than a connection holds."""
SSE = {"Accept": "text/event-stream"}


class Reader:
    """A client: reads a stream in a thread of its own, as the server would write it."""

    def __init__(self, stream: Stream | None, limit: int | None = None) -> None:
        assert stream is not None
        self.stream, self.limit = stream, limit
        self.text = ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for piece in self.stream:
            self.text += piece.decode()
            if self.limit is not None and len(self.ids) >= self.limit:
                break
        self.stream.close()

    @property
    def ids(self) -> list[int]:
        return ids_in(self.text)

    @property
    def types(self) -> list[str]:
        return values_in(self.text, "event")

    def ended(self) -> str:
        self.thread.join(20)
        assert not self.thread.is_alive(), self.text
        return self.text


def values_in(text: str, name: str) -> list[str]:
    """Return the values of one field of all messages that are whole."""
    whole = text[: text.rfind("\n\n") + 2].splitlines()
    return [line.removeprefix(f"{name}: ") for line in whole if line.startswith(f"{name}: ")]


def ids_in(text: str) -> list[int]:
    return [int(value) for value in values_in(text, "id")]


@pytest.fixture
def make(database: Database) -> Iterator[Callable[..., Streams]]:
    with ExitStack() as cleanup:

        def make(places: int = 8, **more: Any) -> Streams:
            limit = threading.BoundedSemaphore(places)
            streams = Streams(database, limit, **{"look_seconds": LOOK, **more})
            cleanup.callback(streams.close)
            return streams

        yield make


@pytest.fixture
def tx(database: Database) -> Iterator[Tx]:
    with database.autocommit() as tx:
        yield tx


def end_run(tx: Tx, run_id: UUID) -> None:
    """End the run and say so, in one statement as the engine does."""
    tx.execute(
        text(
            "WITH ended AS (UPDATE runs SET status = 'completed', finished_at = now()"
            " WHERE id = :id RETURNING id)"
            " INSERT INTO events (run_id, type) SELECT id, 'run.completed' FROM ended"
        ),
        {"id": run_id},
    )


def seqs(tx: Tx, run_id: UUID) -> list[int]:
    found = tx.execute(select(Event.seq).where(Event.run_id == run_id).order_by(Event.seq))
    return list(found.scalars())


# --- In order, once ------------------------------------------------------------------------------


def test_a_stream_begins_with_what_happened_goes_on_with_what_happens_and_ends_with_the_run(
    make: Callable[..., Streams], tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    add_event(tx, run_id, "run.queued")
    add_event(tx, run_id, "run.started")
    reader = Reader(make().open(run_id, 0))
    wait_until(lambda: reader.types, says=lambda types: types == ["run.queued", "run.started"])
    add_event(tx, run_id, "task.started")
    wait_until(lambda: reader.types[2:], says=lambda types: types == ["task.started"])
    end_run(tx, run_id)
    said = reader.ended()
    assert said.startswith("retry: 2000\n\nid: ") and said.endswith("}\n\n: the run is over\n\n")
    assert reader.ids == seqs(tx, run_id)


def test_streams_neither_skip_nor_double_what_commits_out_of_order_nor_do_those_that_come_back(
    make: Callable[..., Streams], database: Database, tx: Tx
) -> None:
    run_id, other = add_run(tx, "running"), add_run(tx, "running")
    streams = make(places=50)
    readers = [Reader(streams.open(run_id, 0))]
    returning = Returning(streams, run_id)
    dice = random.Random(7)
    for _ in range(20):
        write_out_of_order(database, run_id, dice)
        add_event(tx, other, "elsewhere")
        if dice.random() < 0.4:
            readers.append(Reader(streams.open(run_id, 0)))
    with database.transaction() as slow:
        add_event(slow, run_id, "slow")
        for _ in range(5):
            write_out_of_order(database, run_id, dice)
        for reader in readers:
            assert len(reader.ids) <= 20 * 5
    end_run(tx, run_id)
    expected = seqs(tx, run_id)
    assert len(expected) == 25 * 5 + 2
    for reader in readers:
        reader.ended()
        assert reader.ids == expected
    assert returning.ended() == expected


def write_out_of_order(database: Database, run_id: UUID, dice: random.Random) -> None:
    """Write five events, each in a transaction of its own; these begin and commit in any order."""
    opened = [database.transaction() for _ in range(5)]
    written = [transaction.__enter__() for transaction in opened]
    for transaction in dice.sample(written, 5):
        transaction.execute(text("SELECT pg_current_xact_id()"))
    for transaction in written:
        add_event(transaction, run_id, "task.started")
    for transaction in dice.sample(opened, 5):
        transaction.__exit__(None, None, None)
        threading.Event().wait(dice.random() * 2 * LOOK)  # somebody may look now


class Returning:
    """A client that leaves after a few messages and comes back with the last one's id."""

    def __init__(self, streams: Streams, run_id: UUID) -> None:
        self.streams, self.run_id, self.ids = streams, run_id, list[int]()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while stream := self.streams.open(self.run_id, self.ids[-1] if self.ids else 0):
            reader = Reader(stream, limit=3)
            reader.ended()
            self.ids += reader.ids

    def ended(self) -> list[int]:
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.ids


def test_whoever_comes_later_gets_what_others_had_before_also_if_it_seems_unsettled_again(
    make: Callable[..., Streams], database: Database, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    streams = make()
    with database.transaction() as slow:
        slow.execute(text("SELECT 1"))  # began, but has written nothing
        early = Reader(streams.open(run_id, 0))
        add_event(tx, run_id, "a")
        wait_until(lambda: early.types, says=lambda types: types == ["a"])
        slow.execute(text("SELECT pg_current_xact_id()"))
        late = Reader(streams.open(run_id, 0))
        wait_until(lambda: streams._feeds[run_id].streams, says=lambda found: len(found) == 2)
        assert late.types == []
    add_event(tx, run_id, "b")
    for reader in (early, late):
        wait_until(lambda reader=reader: reader.types, says=lambda types: types == ["a", "b"])


def test_a_long_past_is_read_in_pages_before_the_present(
    make: Callable[..., Streams], tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    rows = [{"run_id": run_id, "type": "task.started", "data": {}} for _ in range(450)]
    tx.execute(Event.__table__.insert(), rows)
    reader = Reader(make().open(run_id, 0))
    wait_until(lambda: len(reader.ids), says=lambda number: number == 450)
    tx.execute(Event.__table__.insert(), rows)
    end_run(tx, run_id)
    reader.ended()
    assert reader.ids == seqs(tx, run_id) and len(reader.ids) == 901


def test_a_stream_goes_on_after_the_event_it_is_told(make: Callable[..., Streams], tx: Tx) -> None:
    run_id = add_run(tx, "running")
    for type in ("a", "b", "c"):
        add_event(tx, run_id, type)
    end_run(tx, run_id)
    streams = make(places=1)
    every = seqs(tx, run_id)
    for position in range(len(every) - 1):
        reader = Reader(streams.open(run_id, every[position]))
        reader.ended()
        assert reader.ids == every[position + 1 :]
    assert streams.open(run_id, every[-1]) is None


def test_a_run_that_is_deleted_ends_its_streams(make: Callable[..., Streams], tx: Tx) -> None:
    run_id = add_run(tx, "running")
    streams = make()
    reader = Reader(streams.open(run_id, 0))
    wait_until(lambda: run_id in streams._feeds)
    tx.execute(text("DELETE FROM runs"))
    assert reader.ended().endswith(": the run is over\n\n")


def test_silence_is_broken_by_a_comment(make: Callable[..., Streams], tx: Tx) -> None:
    run_id = add_run(tx, "running")
    reader = Reader(make(heartbeat_seconds=0.05).open(run_id, 0))
    wait_until(lambda: reader.text.count(": still here\n\n"), says=lambda number: number > 2)
    assert reader.ids == []


# --- What it costs -------------------------------------------------------------------------------


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """Collect the statements that are executed on all connections."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        seen.append(statement)

    event.listen(database._engine, "before_cursor_execute", note)
    yield seen
    event.remove(database._engine, "before_cursor_execute", note)


def test_a_look_is_one_statement_for_all_streams_and_without_streams_there_is_none(
    make: Callable[..., Streams], database: Database, tx: Tx
) -> None:
    runs = [add_run(tx, "running") for _ in range(4)]
    streams = make(places=20, look_seconds=0.2)
    readers = [Reader(streams.open(run_id, 0)) for run_id in runs for _ in range(5)]
    wait_until(lambda: [len(f.streams) for f in streams._feeds.values()] == [5, 5, 5, 5])
    with statements(database) as seen:
        wait_until(lambda: len(seen), says=lambda number: number >= 3)
        assert all("wanted" in statement for statement in seen)
        began = len(seen)
        for run_id in runs:
            end_run(tx, run_id)
        for reader in readers:
            assert len(ids_in(reader.ended())) == 1
        # Two looks show what is new; a busy machine may fit some more in between.
        looks = [statement for statement in seen[began:] if "wanted" in statement]
        assert len(looks) < len(readers) and len(seen) == began + len(looks) + len(runs)
    wait_until(lambda: not streams._wanted.is_set())
    with statements(database) as seen:
        threading.Event().wait(0.6)
        assert seen == []


def test_a_place_is_taken_as_long_as_a_stream_is_open_and_without_one_it_is_503(
    make: Callable[..., Streams], tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    streams = make(places=2)
    with pytest.raises(RunNotFound):
        streams.open(uuid4(), 0)
    first, second = streams.open(run_id, 0), streams.open(run_id, 0)
    assert first is not None and second is not None
    with pytest.raises(Refused) as refused:
        streams.open(run_id, 0)
    assert (refused.value.code, refused.value.kind) == (503, "too_many_streams")
    first.close()
    first.close()
    assert streams.open(run_id, 0) is not None
    with pytest.raises(Refused):
        streams.open(run_id, 0)


def test_a_client_that_does_not_keep_up_is_cut_off_and_goes_on_where_it_was(
    make: Callable[..., Streams], tx: Tx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    run_id = add_run(tx, "running")
    streams = make()
    slow = streams.open(run_id, 0)
    assert slow is not None
    pieces = iter(slow)
    assert next(pieces) == b"retry: 2000\n\n"
    add_event(tx, run_id, "a")
    add_event(tx, run_id, "b")
    got = next(pieces).decode()
    for _ in range(11):
        add_event(tx, run_id, "c")
    wait_until(lambda: slow._why, says=lambda why: why == "slow")
    got += "".join(piece.decode() for piece in pieces)
    slow.close()
    end_run(tx, run_id)
    reader = Reader(streams.open(run_id, ids_in(got)[-1]))
    reader.ended()
    assert ids_in(got) + reader.ids == seqs(tx, run_id)


@contextmanager
def connected(streams: Streams, run_id: UUID) -> Iterator[socket.socket]:
    """Yield the client's side of a connection on which a stream is being written."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = socket.create_connection(listening.getsockname(), timeout=20)
        server, _ = listening.accept()
    stream = streams.open(run_id, 0, server)
    assert stream is not None

    def write() -> None:
        try:
            for piece in stream:
                server.sendall(piece)
        except OSError:
            pass
        finally:
            stream.close()
            server.close()

    writer = threading.Thread(target=write)
    writer.start()
    with client:
        yield client
    writer.join(20)
    assert not writer.is_alive()


def free_places(streams: Streams) -> int:
    return streams._places._value  # type: ignore[attr-defined, no-any-return]


def test_the_place_of_a_client_that_is_gone_is_free_at_once(
    make: Callable[..., Streams], tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    streams = make(places=1)
    with connected(streams, run_id) as client:
        assert client.recv(100) == b"retry: 2000\n\n"
        client.close()
        wait_until(lambda: free_places(streams) == 1, seconds=5)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system cannot tell")
def test_a_machine_that_no_longer_answers_counts_as_gone(
    make: Callable[..., Streams], tx: Tx
) -> None:
    tcp, (local, other) = socket.socket(), socket.socketpair()
    with tcp, local, other:
        for client in (tcp, local):
            stream = make().open(add_run(tx, "running"), 0, client)
            assert stream is not None
            stream.close()
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


def test_a_client_that_takes_nothing_is_cut_off(make: Callable[..., Streams], tx: Tx) -> None:
    run_id = add_run(tx, "running")
    streams = make(places=1, stuck_seconds=0.3)
    with connected(streams, run_id):
        add_event(tx, run_id, "large", text="x" * LARGE)
        wait_until(lambda: free_places(streams) == 1, seconds=10)


def test_stopping_ends_all_streams_at_once_also_of_clients_that_take_nothing(
    make: Callable[..., Streams], tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    add_event(tx, run_id, "large", text="x" * LARGE)
    streams = make()
    readers = [Reader(streams.open(run_id, 0)) for _ in range(3)]
    with connected(streams, run_id):
        wait_until(lambda: [len(reader.ids) for reader in readers], says=lambda n: n == [1, 1, 1])
        streams.stop()
        for reader in readers:
            assert "the run is over" not in reader.ended()
        streams.close()
        wait_until(lambda: not streams._open, seconds=5)
    with pytest.raises(Refused):
        streams.open(run_id, 0)


# --- Trouble -------------------------------------------------------------------------------------


@contextmanager
def away(servers: Servers, tx: Tx) -> Iterator[None]:
    """Have the database take no connections, and end all but ours."""
    name = tx.execute(text("SELECT current_database()")).scalar()
    servers._execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    tx.execute(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    )
    yield
    servers._execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_streams_outlive_a_database_that_is_away_and_miss_nothing(
    make: Callable[..., Streams],
    servers: Servers,
    tx: Tx,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "AWAY_SECONDS", 0.05)
    run_id = add_run(tx, "running")
    add_event(tx, run_id, "before")
    streams = make(heartbeat_seconds=0.05)
    reader = Reader(streams.open(run_id, 0))
    wait_until(lambda: reader.types, says=lambda types: types == ["before"])
    wait_until(lambda: run_id in streams._feeds)
    written = ""

    def complaints() -> int:
        nonlocal written
        captured = capsys.readouterr()
        written += captured.out + captured.err
        return written.count("streams.database_away")

    with away(servers, tx):
        add_event(tx, run_id, "meanwhile")
        wait_until(complaints, says=lambda number: number > 2)
        seen = reader.text.count(": still here")
        wait_until(lambda: reader.text.count(": still here") > seen)
        assert reader.types == ["before"]
    add_event(tx, run_id, "after")
    end_run(tx, run_id)
    reader.ended()
    assert reader.types == ["before", "meanwhile", "after", "run.completed"]


# --- Over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def follow(client: Client, path: str, **headers: str) -> TestResponse:
    """Ask for a stream; what it says is not read yet."""
    sent = {**client._headers, **SSE, **headers}
    return client._http.get(f"{PREFIX}{path}", headers=sent)


def finished_run(client: Client) -> UUID:
    with client.database.autocommit() as tx:
        run_id = add_run(tx, "running")
        task_id = add_task(tx, run_id, "fetch", "completed")
        add_event(tx, run_id, "run.queued", by="key:0123abcd")
        said = "two\nlines, a snowman ☃ and \u2028"
        add_event(tx, run_id, "task.started", task_id, attempt=1, worker="w@host", said=said)
        end_run(tx, run_id)
    return run_id


def test_messages_have_the_seq_as_id_the_type_and_the_json_of_the_page(client: Client) -> None:
    run_id = finished_run(client)
    page = client.get(f"/runs/{run_id}/events")
    items = page.json["items"]
    assert [(item["type"], item["by"]) for item in items] == [
        ("run.queued", "key:0123abcd"),
        ("task.started", "worker:w@host"),
        ("run.completed", None),
    ]
    answer = follow(client, f"/runs/{run_id}/events", **{"X-Request-ID": "r-1"})
    said = answer.get_data(as_text=True)
    assert answer.status_code == 200
    assert [json.loads(data) for data in values_in(said, "data")] == items
    assert ids_in(said) == [item["seq"] for item in items]
    assert values_in(said, "event") == [item["type"] for item in items]
    assert answer.mimetype == "text/event-stream" and answer.headers["X-Request-ID"] == "r-1"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Vary"] == page.headers["Vary"] == "Accept"
    assert "Content-Length" not in answer.headers


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/event-stream", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=0.5, application/json", False),
        ("text/event-stream", True),
        ("text/event-stream, application/json;q=0.9", True),
        ("application/json;q=0.1, text/event-stream;q=0.2, */*;q=0.1", True),
    ],
)
def test_who_likes_a_stream_better_gets_one(
    client: Client, accept: str | None, is_stream: bool
) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = client.get(f"/runs/{finished_run(client)}/events", headers=headers)
    assert answer.mimetype == ("text/event-stream" if is_stream else "application/json")


def test_last_event_id_says_where_to_go_on_and_so_does_after_without_it(client: Client) -> None:
    path = f"/runs/{finished_run(client)}/events"
    first, second, last = ids_in(follow(client, path).get_data(as_text=True))
    for query, header, expected in (
        (f"?after={first}", {}, [second, last]),
        ("", {"Last-Event-ID": str(second)}, [last]),
        (f"?after={first}", {"Last-Event-ID": str(second)}, [last]),
    ):
        assert ids_in(follow(client, path + query, **header).get_data(as_text=True)) == expected
    answer = follow(client, path, **{"Last-Event-ID": str(last)})
    assert (answer.status_code, answer.get_data()) == (204, b"")


@pytest.mark.parametrize("given", ["", "x", "-1", "1.5", str(2**63), "1 OR 1"])
def test_a_last_event_id_that_is_none_is_named(client: Client, given: str) -> None:
    path = f"/runs/{finished_run(client)}/events"
    answer = follow(client, path, **{"Last-Event-ID": given})
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/Last-Event-ID"]


def test_a_stream_of_no_run_is_404_and_without_key_401(client: Client) -> None:
    problem(follow(client, f"/runs/{uuid4()}/events"), 404, "run_not_found")
    problem(follow(client, "/runs/abc/events"), 404, "run_not_found")
    problem(follow(client.without_key(), f"/runs/{uuid4()}/events"), 401, "unauthorized")


def test_streams_and_long_polls_share_their_places_and_others_need_none(settings: Settings) -> None:
    with open_client(replace(settings, web_threads=4)) as client:
        with client.database.autocommit() as tx:
            path = f"/runs/{add_run(tx, 'running')}"
        waiting = threading.Thread(target=client.get, args=[f"{path}?waitSeconds=60"])
        waiting.start()
        places = client.app.extensions["opscore"].polls._places
        wait_until(lambda: places._value == 1)
        stream = follow(client, f"{path}/events")
        assert stream.status_code == 200
        answer = follow(client, f"{path}/events")
        assert "as many streams" in problem(answer, 503, "too_many_streams")["detail"]
        assert answer.headers["Retry-After"] == "5"
        assert client.get(f"{path}?waitSeconds=60").headers["Retry-After"] == "1"
        assert client.get(f"{path}/events").status_code == 200
        stream.close()
        assert follow(client, f"{path}/events").status_code == 200
        client.app.extensions["opscore"].stop_waiting()
        waiting.join(5)
        assert not waiting.is_alive()


def test_asking_for_the_headers_alone_leaves_no_stream_behind(settings: Settings) -> None:
    with open_client(replace(settings, web_threads=2)) as client:
        with client.database.autocommit() as tx:
            path = f"/runs/{add_run(tx, 'running')}/events"
        for _ in range(3):
            assert client.send("HEAD", path, headers=SSE).status_code == 200


def test_the_description_has_both_media_types_and_the_header(client: Client) -> None:
    document = client.get("/openapi.json").json
    operation = document["paths"][f"{PREFIX}/runs/{{runId}}/events"]["get"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert content["text/event-stream"]["example"].startswith("id: ")
    assert ("header", "Last-Event-ID") in {(p["in"], p["name"]) for p in operation["parameters"]}
    assert "too_many_streams" in operation["responses"]["503"]["description"]


# --- Served by gunicorn --------------------------------------------------------------------------


@contextmanager
def listening(port: int, run_id: UUID, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Authorization": f"Bearer {API_KEY}", **SSE, **headers}
    connection.request("GET", f"{PREFIX}/runs/{run_id}/events", headers=sent)
    answer = connection.getresponse()
    # A client that goes away closes at once what has not been read.
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    try:
        yield answer
    finally:
        answer.close()
        connection.close()


def read_message(answer: http.client.HTTPResponse) -> str:
    said = b""
    while not said.endswith(b"\n\n"):
        said += answer.readline()
    return said.decode()


def test_a_served_stream_is_not_held_back_frees_its_thread_and_is_ended_by_sigterm(
    environment: dict[str, str], tmp_path: Path, tx: Tx
) -> None:
    run_id = add_run(tx, "running")
    log = tmp_path / "log"
    with serving(environment, log) as (process, port):
        with ExitStack() as clients:
            for _ in range(2):  # of four threads
                answer = clients.enter_context(listening(port, run_id))
                assert answer.status == 200 and read_message(answer) == "retry: 2000\n\n"
            add_event(tx, run_id, "run.started")
            assert "event: run.started\n" in read_message(answer)
            with listening(port, run_id) as refused:
                assert refused.status == 503
            assert ask(port, "GET", f"{PREFIX}/runs/{run_id}")[0] == 200
        wait_until(lambda: is_welcome(port, run_id), seconds=5)
        with listening(port, run_id) as last:
            assert "retry" in read_message(last) and "run.started" in read_message(last)
            stop(process)
            assert last.read() == b""
        assert process.returncode == 0, log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    route = "/v1/opscore/runs/<run:run_id>/events"
    assert {200, 503} <= {line["status"] for line in lines if line.get("route") == route}
    ended = [line for line in lines if line["event"] == "stream.ended"]
    assert {line["because"] for line in ended} == {"gone", "stopped"}
    assert all(line["run_id"] == str(run_id) and line["request_id"] for line in ended)
    assert "Traceback" not in log.read_text()


def test_ctrl_c_ends_streams_too(environment: dict[str, str], tmp_path: Path, tx: Tx) -> None:
    run_id = add_run(tx, "running")
    with serving(environment, tmp_path / "log") as (process, port), listening(port, run_id) as last:
        assert read_message(last) == "retry: 2000\n\n"
        stop(process, signal.SIGINT)
        assert last.read() == b""


def is_welcome(port: int, run_id: UUID) -> bool:
    with listening(port, run_id) as answer:
        return answer.status == 200


def stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
    process.wait(10)
