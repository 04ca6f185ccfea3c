"""Streams: the events of a run as they happen, as Server-Sent Events.

One thread a process, the listener, looks for what is new of every run that somebody follows, in one
statement for all; each client gets it through a queue of his own and causes no reads but those of
what happened before he came. A stream holds a thread of the server, as a long poll does. It ends
with its run; whoever is cut off before, because he reads too slowly or the process stops, goes on
where he was with `Last-Event-ID`. Who is gone is noticed at the next look.
"""

import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

from flask import Response, request
from sqlalchemy.exc import SQLAlchemyError

from opscore import logs
from opscore.db import Database
from opscore.errors import RunNotFound
from opscore.queries import News, find_news, get_news
from web.bodies import JSON
from web.errors import RETRY_AFTER_SECONDS, Refused
from web.requests import request_id
from web.schemas import Event

log = logs.get("opscore.web")

EVENT_STREAM = "text/event-stream"
LOOK_SECONDS = 0.2
"""Between two looks; an event is given out by the second look after it was written."""
AWAY_SECONDS = 1.0
"""Between two looks while the database is away."""
HEARTBEAT_SECONDS = 15.0
"""Of silence, after which a comment says that the stream lives; proxies cut what is silent longer,
mostly after 30 s or 60 s."""
STUCK_SECONDS = 30.0
"""A client that takes nothing for so long is cut off: else it would hold its thread for ever."""
STOPPING_SECONDS = 1.0
"""What a client that takes nothing is left when the process stops."""
RETRY_SECONDS = 2
"""What clients are told to wait before they come back."""
PAGE = 200
"""Events of a run read at once."""
MOST_WAITING = 2000
"""Messages that wait for a client to take them; one more, and it reads too slowly."""

_HANGS_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
"""The client is gone, or will send nothing more, which for a client that only listens is the same;
where there is no POLLRDHUP (macOS) that is noticed by the next heartbeats."""
_BEGIN = f"retry: {1000 * RETRY_SECONDS}\n\n".encode()
_HEARTBEAT = b": still here\n\n"
_END = b": the run is over\n\n"
_EVENT = Event()

Message = tuple[int, bytes]
"""An event's seq, and how it goes out."""


def is_wanted() -> bool:
    """Tell whether the client likes a stream better than a page of JSON."""
    accepted = request.accept_mimetypes
    return accepted.quality(EVENT_STREAM) > accepted.quality(JSON)


def answer(streams: "Streams", run_id: UUID, after: int) -> Response:
    """Return the stream of a run's events after one of them; 204 if the last of all was before.

    That is what has browsers, which come back when a stream ends, stay away.

    Raises:
        RunNotFound
        Refused: the process serves as many streams as it may.
    """
    stream = streams.open(run_id, after, request.environ.get("gunicorn.socket"), request_id())
    response = Response(status=204) if stream is None else Response(stream, mimetype=EVENT_STREAM)
    response.headers["X-Accel-Buffering"] = "no"
    response.vary.add("Accept")
    return response


class Stream:
    """What one client gets; the server writes what its iterator yields, then closes it."""

    def __init__(
        self,
        streams: "Streams",
        run_id: UUID,
        after: int,
        first: News,
        client: socket.socket | None,
        request_id: str | None,
    ) -> None:
        """`first` is what happened after `after`, as far as it makes a page."""
        self.run_id, self.client, self.request_id = run_id, client, request_id
        self.after = after
        """The last event that was read for it."""
        self._streams, self._first = streams, first
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._why: str | None = None
        self._giving_since: float | None = None

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces():
            self._giving_since = time.monotonic()
            yield piece
            self._giving_since = None

    def give(self, messages: Sequence[Message]) -> None:
        """Have what is new of the run wait for the client."""
        for seq, text in messages:
            if self._why is None and seq > self.after:
                self.after = seq
                self._waiting.put(text)
        if self._waiting.qsize() > MOST_WAITING:
            self.end("slow")

    def end(self, why: str) -> None:
        """End the stream: if the run is `over`, after all that waits for the client; else at once.

        May be called from a signal handler: nothing here waits for a lock.
        """
        self._why = self._why or why
        self._waiting.put(None)

    def is_stuck(self, seconds: float) -> bool:
        """Tell whether the client has taken nothing for so long."""
        since = self._giving_since
        return since is not None and time.monotonic() - since > seconds

    def cut(self) -> None:
        """Close the connection under whoever is writing to it."""
        if self.client is not None:
            with suppress(OSError):
                self.client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the stream's place back; the server calls it, whatever happened."""
        if self._streams.leave(self):
            ids = {"run_id": str(self.run_id), "request_id": self.request_id}
            log.info("stream.ended", **ids, because=self._why or "gone")

    def _pieces(self) -> Iterator[bytes]:
        yield _BEGIN
        try:
            yield from self._before()
        except RunNotFound:
            self.end("over")
        except SQLAlchemyError as error:
            log.warning("stream.database_away", error=type(error).__name__)
            self.end("database_away")
        yield from self._live()
        if self._why == "over":
            yield _END

    def _before(self) -> Iterator[bytes]:
        """Yield what happened so far, a page at a time; the listener goes on from there."""
        news = self._first
        while self._why is None:
            messages = _messages(news)
            if messages:
                self.after, _ = messages[-1]
                yield b"".join(text for _, text in messages)
            if news.is_all:
                return self.end("over")
            if len(messages) < PAGE:
                return self._streams.join(self)
            news = self._streams.read(self.run_id, self.after)

    def _live(self) -> Iterator[bytes]:
        """Yield what the listener finds, and a sign of life where it is nothing for a while."""
        while self._why in (None, "over"):
            try:
                text = self._waiting.get(timeout=self._streams.heartbeat_seconds)
            except Empty:
                yield _HEARTBEAT
                continue
            if text is None:
                return
            yield text


@dataclass(slots=True)
class _Feed:
    """A run that is followed: up to which event its news were found, and for whom."""

    after: int
    streams: set[Stream] = field(default_factory=set)


class Streams:
    """The streams of one process, and the listener that feeds them."""

    def __init__(
        self,
        database: Database,
        places: threading.Semaphore,
        *,
        look_seconds: float = LOOK_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """The listener shares the requests' pool: a stream that waits holds no connection."""
        self.look_seconds = look_seconds
        self.heartbeat_seconds = heartbeat_seconds
        self.stuck_seconds = stuck_seconds
        self._database, self._places = database, places
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._feeds: dict[UUID, _Feed] = {}
        self._open_since: str | None = None
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._listener: threading.Thread | None = None

    def open(
        self,
        run_id: UUID,
        after: int,
        client: socket.socket | None = None,
        request_id: str | None = None,
    ) -> Stream | None:
        """Begin a stream of the run's events above `after`; None if it is over and has none.

        `client`, the connection, tells when its client is gone, and can be cut.

        Raises:
            RunNotFound
            Refused: there are as many streams and long polls as there may be, or the process stops.
        """
        if self._stopping.is_set() or not self._places.acquire(blocking=False):
            raise _too_many()
        stream = None
        try:
            first = self.read(run_id, after)
            if first.events or not first.is_all:
                _limit_silence(client)
                stream = self._enter(Stream(self, run_id, after, first, client, request_id))
        finally:
            if stream is None:
                self._places.release()
        return stream

    def read(self, run_id: UUID, after: int) -> News:
        """Return a page of what happened in a run after an event."""
        with self._database.autocommit() as tx:
            return get_news(tx, run_id, after=after, limit=PAGE)

    def join(self, stream: Stream) -> None:
        """Have the listener feed a stream from where it is; if need be it goes back there."""
        with self._lock:
            if stream in self._open:
                feed = self._feeds.setdefault(stream.run_id, _Feed(stream.after))
                feed.after = min(feed.after, stream.after)
                feed.streams.add(stream)

    def leave(self, stream: Stream) -> bool:
        """Give a stream's place back; False if it was before."""
        with self._lock:
            if stream not in self._open:
                return False
            self._open.remove(stream)
            if feed := self._feeds.get(stream.run_id):
                feed.streams.discard(stream)
                if not feed.streams:
                    del self._feeds[stream.run_id]
        self._places.release()
        return True

    def stop(self) -> None:
        """End every stream, now and from now on. May be called from a signal handler."""
        self._stopping.set()
        self._wanted.set()
        for stream in tuple(self._open):
            stream.end("stopped")

    def close(self) -> None:
        """Stop, and wait for the listener."""
        self.stop()
        if self._listener is not None:
            self._listener.join()

    def _enter(self, stream: Stream) -> Stream:
        with self._lock:
            self._open.add(stream)
            if self._listener is None:
                self._listener = threading.Thread(target=self._listen, daemon=True, name="listener")
                self._listener.start()
        self._wanted.set()
        if self._stopping.is_set():  # it may have missed the new one
            stream.end("stopped")
        return stream

    def _listen(self) -> None:
        """Look, again and again, while there are streams; then wait for the next."""
        while not self._stopping.is_set():
            self._wanted.wait()
            self._stopping.wait(self._look())
        deadline = time.monotonic() + STOPPING_SECONDS
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        for stream in tuple(self._open):
            stream.cut()

    def _look(self) -> float:
        """Hand out what is new; return after how many seconds to look again."""
        try:
            self._check_clients()
            after = self._positions()
            return self._hand_out(after) if after else self.look_seconds
        except SQLAlchemyError as error:
            log.warning("streams.database_away", error=type(error).__name__)
        except Exception:
            # It must outlive any trouble with a single row or client; the next look meets it again.
            log.exception("streams.look_failed")
        return AWAY_SECONDS

    def _positions(self) -> dict[UUID, int]:
        """Return the runs that are followed, and up to which event; with no stream at all, rest."""
        with self._lock:
            if not self._open:
                self._wanted.clear()
            return {run_id: feed.after for run_id, feed in self._feeds.items()}

    def _hand_out(self, after: Mapping[UUID, int]) -> float:
        with self._database.autocommit() as tx:
            found, self._open_since = find_news(tx, after, open_since=self._open_since, limit=PAGE)
        for run_id, news in found.items():
            self._feed(run_id, after[run_id], news)
        return 0 if any(len(news.events) == PAGE for news in found.values()) else self.look_seconds

    def _feed(self, run_id: UUID, after: int, news: News) -> None:
        messages = _messages(news)
        with self._lock:
            feed = self._feeds.get(run_id)
            if feed is None or feed.after != after:  # somebody has come meanwhile
                return
            if messages:
                feed.after, _ = messages[-1]
            streams = tuple(feed.streams)
        for stream in streams:
            stream.give(messages)
            if news.is_all:
                stream.end("over")

    def _check_clients(self) -> None:
        """End the streams of clients that are gone or take nothing."""
        poll, by_number = select.poll(), {}
        for stream in tuple(self._open):
            if stream.is_stuck(self.stuck_seconds):
                stream.end("stuck")
                stream.cut()
            elif stream.client is not None and (number := stream.client.fileno()) >= 0:
                by_number[number] = stream
                poll.register(number, _HANGS_UP)
        for number, _ in poll.poll(0):
            by_number[number].end("gone")


def _messages(news: News) -> list[Message]:
    return [(event["seq"], _encode(event)) for event in news.events]


def _encode(event: Mapping[str, Any]) -> bytes:
    # In ASCII, as pages are: some clients take other characters of Unicode for ends of lines.
    data = json.dumps(_EVENT.dump(event), separators=(",", ":"))
    return f"id: {event['seq']}\nevent: {event['type']}\ndata: {data}\n\n".encode()


def _limit_silence(client: socket.socket | None) -> None:
    """Have a client whose machine no longer answers count as gone, where the system can tell."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if client is not None and option is not None:
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, option, int(1000 * STUCK_SECONDS))


def _too_many() -> Refused:
    return Refused(
        503,
        "This process serves as many streams and waiting requests as it may; try again shortly.",
        kind="too_many_streams",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )
