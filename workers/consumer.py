"""Celery's consumer, made to survive the loss of its broker and whatever lies in its queues.

With late acknowledgement, Celery 5.7.0 exits when Redis goes away under a running task: closing
the dead connection's channels tries to give the unacknowledged messages back to a broker that is
gone, and only errors of broker libraries are swallowed there. Nothing needs giving back: the claim
decides.

A queue entry that kombu or Celery cannot read ends a plain worker, at every start if it comes back.
Here an entry that is no visit is set aside (see `config.SET_ASIDE`), and the worker goes on.

A Redis that is full ends a plain worker, too, so that nobody would be left to empty it. Here what
was taken is worked on without Redis' note of it.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from queue import Empty
from threading import RLock
from time import monotonic, time
from typing import Any
from uuid import UUID

from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.asynchronous import get_event_loop
from kombu.transport import redis, virtual
from kombu.utils.json import dumps
from redis.exceptions import OutOfMemoryError

from opscore import logs
from opscore.canvas import RUN_TASK
from opscore.config import SET_ASIDE, SET_ASIDE_COUNT

log = logs.get(__name__)
celery_log = logging.getLogger(__name__)

EVENTS_SECONDS = 0.25
"""How old an event may be when Flower hears of it."""
KEPT_ENTRIES = 1000
"""The newest entries set aside that are kept for whoever looks for their sender."""
KEPT_CHARACTERS = 64 * 1024
"""Of each: enough for any message of ours, and no way to fill Redis."""
MOST_BRACKETS = 200
"""In one entry; ours have ten (a body is encoded). JSON can be nested so deep that it is read and
yet cannot be written for the pool, which would cost the worker a place of its pool for good."""

NO_JSON = "no_json"
NO_ENVELOPE = "no_envelope"
UNREADABLE_BODY = "unreadable_body"
UNKNOWN_TASK = "unknown_task"
NO_CALL = "no_call"
WRONG_ARGUMENTS = "wrong_arguments"


class NoEnvelope(Exception):
    """The JSON is not what kombu writes."""


class Message(virtual.Message):
    """A message whose parts are known to be there, before kombu counts on them."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            properties = payload["properties"]
            delivery = properties["delivery_info"]
            names = properties["delivery_tag"], delivery["exchange"], delivery["routing_key"]
            # Redis refuses a tag with half a surrogate pair.
            if not all(isinstance(name, str) and name.isascii() for name in names):
                raise NoEnvelope
            super().__init__(payload, channel=channel, **options)
        except Exception as error:
            raise NoEnvelope from error

    def ack_log_error(self, logger: Any, errors: Any, multiple: bool = False) -> None:
        """Acknowledge, or give the worker's place for another message free all the same."""
        try:
            self.ack(multiple=multiple)
        except errors as error:
            self._give_place_free(error)

    def reject_log_error(self, logger: Any, errors: Any, requeue: bool = False) -> None:
        """Reject, or give the worker's place for another message free all the same."""
        try:
            self.reject(requeue=requeue)
        except errors as error:
            self._give_place_free(error)

    def _give_place_free(self, error: Exception) -> None:
        """Go on without Redis knowing: one day it gives the message out again, to no effect.

        Celery as it comes would count the message as at work for ever, and after a few of them take
        no other.
        """
        log.warning("message.not_acknowledged", error=repr(error)[:300])
        channel: Any = self.channel
        virtual.QoS.ack(channel.qos, str(self.delivery_tag))
        if isinstance(error, BrokenPipeError):
            raise error  # the connection is to be made anew


class QoS(redis.QoS):
    """Remembers in Redis what was taken and not acknowledged.

    A message goes to the pool first and Redis is told at the next turn of the loop: to wait for its
    answer in between took a single task a tenth of its time. Who dies in that moment leaves the
    message to the rescue, as who dies right after taking it does.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._untold: deque[tuple[Any, str]] = deque()
        self._telling = RLock()  # a signal handler may acknowledge

    def append(self, message: Any, delivery_tag: str) -> None:
        virtual.QoS.append(self, message, delivery_tag)
        self._untold.append((message, delivery_tag))
        hub = get_event_loop()
        if hub is None:
            self._tell()
        else:
            hub.call_soon(hub.call_soon, self._tell_if_open)  # the pool is written to in between

    def _tell_if_open(self) -> None:
        channel: Any = self.channel
        if not channel.closed:
            self._tell()

    def _tell(self) -> None:
        # Whoever acknowledges, in a thread of the pool, must come after who told of that message.
        with self._telling:
            if not self._untold:
                return
            with self.pipe_or_acquire() as pipe:
                while self._untold:
                    message, tag = self._untold.popleft()
                    came = message.delivery_info
                    entry = dumps([message._raw, came["exchange"], came["routing_key"]])
                    pipe.zadd(self.unacked_index_key, {tag: time()})
                    pipe.hset(self.unacked_key, tag, entry)
                try:
                    pipe.execute()
                except OutOfMemoryError as error:
                    # As if it died right after taking it: the rescue finds what is lost.
                    log.warning("message.not_noted", error=repr(error)[:300])

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Put back what was taken too long ago; with no room for it in Redis, another time."""
        try:
            super().restore_visible(*args, **options)
        except OutOfMemoryError as error:
            log.warning("broker.full", error=repr(error)[:300])

    def ack(self, delivery_tag: str) -> None:
        self._tell()
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._tell()
        super().reject(delivery_tag, requeue)

    def restore_unacked(self, client: Any = None) -> Any:
        self._tell()
        return super().restore_unacked(client)

    @contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        """Have both commands sent at once, but as no transaction, which makes four of two.

        Half done they leave a mark without a message, which kombu drops, or a message without a
        mark, which nobody looks for.
        """
        if pipe is not None:
            yield pipe
        else:
            channel: Any = self.channel
            with channel.conn_or_acquire(client) as acquired:
                yield acquired.pipeline(transaction=False)


class Channel(redis.Channel):
    """Takes entries from the queues, and sets aside those that are no message."""

    Message = Message
    QoS = QoS
    _taken: tuple[str, bytes] = ("", b"")
    """The queue and the entry that is being looked at."""
    _pooled_client: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The queues are looked at in this order: what is to be served first lies in `FIRST`.
        self.priority_steps = sorted(self.priority_steps, reverse=True)

    def _queue_bind(self, *args: Any) -> None:
        """Tell Redis which queue an exchange feeds, which it knows from earlier, or will later."""
        try:
            super()._queue_bind(*args)  # type: ignore[misc]
        except OutOfMemoryError as error:
            log.warning("broker.full", error=repr(error)[:300])

    def priority(self, n: int) -> int:
        """Return the step of a message's priority; kombu wants the steps in ascending order."""
        return max((step for step in self.priority_steps if step <= n), default=0)

    def set_aside(self, reason: str) -> None:
        """Keep the entry at hand where operators find it; without Redis only the log tells."""
        queue, entry = self._taken
        log.warning("message.set_aside", queue=queue, reason=reason)
        record = {
            "queue": queue,
            "reason": reason,
            "at": datetime.now(UTC).isoformat(),
            "bytes": len(entry),
            "entry": entry[:KEPT_CHARACTERS].decode(errors="backslashreplace")[:KEPT_CHARACTERS],
        }
        try:
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                pipe.lpush(SET_ASIDE, json.dumps(record, ensure_ascii=False))
                pipe.ltrim(SET_ASIDE, 0, KEPT_ENTRIES - 1)
                pipe.hincrby(SET_ASIDE_COUNT, queue, 1)
                pipe.execute()
        except self.connection.connection_errors + self.connection.channel_errors as error:
            log.warning("message.not_kept", queue=queue, error=repr(error)[:300])

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Have clients show us each entry before kombu reads it.

        kombu makes one for every acknowledgement, which takes longer than the command.
        """
        client = None if asynchronous else self._pooled_client
        if client is None:
            client = super()._create_client(asynchronous)  # type: ignore[misc]
            client.set_response_callback("BRPOP", self._take)
        if not asynchronous:
            self._pooled_client = client
        return client

    def _take(self, reply: Any, **_: Any) -> Any:
        if reply:
            key, entry = reply
            self._taken = key.decode().rsplit(self.sep, 1)[0], entry
            if entry.count(b"[") + entry.count(b"{") > MOST_BRACKETS:
                raise NoEnvelope
        return reply

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except NoEnvelope:
            self.set_aside(NO_ENVELOPE)
        except ValueError:
            # Of JSON: what is raised behind `Message` ends in `Consumer.create_task_handler`.
            self.set_aside(NO_JSON)
        raise Empty

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        try:
            return super()._deliver_fanout_message(message, exchange)  # type: ignore[misc]
        except NoEnvelope:
            log.warning("broadcast.dropped", reason=NO_ENVELOPE)
            return False


class Consumer(CeleryConsumer):
    """Named in `celeryconfig` as `worker_consumer`."""

    connection_errors: tuple[type[Exception], ...]
    channel_errors: tuple[type[Exception], ...]
    strategies: dict[str, Any]
    hub: Any
    pool: Any
    _flush_events: Callable[[], None]
    _flushes_at = 0.0

    def on_send_event_buffered(self) -> Any:
        """Send Flower's events some at a time: Celery sends them with every turn of its loop."""
        now = monotonic()
        if self.hub and now >= self._flushes_at:
            self._flushes_at = now + EVENTS_SECONDS
            self.hub.call_later(EVENTS_SECONDS, self._flush_events)

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """Connect with channels of ours."""
        connection: Any = self.app.connection_for_read(heartbeat=heartbeat)
        # Not a transport of our own: kombu knows by the scheme of the URL what TLS needs.
        connection.transport.Channel = Channel
        return self.ensure_connected(connection)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        """Hand on visits only, and set aside what Celery cannot take all the same."""
        handle = super().create_task_handler(*args, **options)
        # kombu counts KeyError as a lost connection; here it is a key that the message lacks.
        lost = tuple({*self.connection_errors, *self.channel_errors} - {KeyError})

        def handle_visit(message: Any) -> None:
            if fault := _fault(message, self.strategies):
                return self._refuse(message, fault)
            try:
                handle(message)
            except lost:
                raise
            except Exception as error:
                log.warning("message.unexpected", error=type(error).__name__)
                self._refuse(message, NO_CALL)
            else:
                self._write_to_pool()

        return handle_visit

    def _write_to_pool(self) -> None:
        """Have a free child get its message now; the loop asks Redis for the next one first."""
        write = getattr(self.hub, "consolidate_callback", None)  # only a pool of processes has one
        if write is not None:
            write(list(self.pool._pool._all_inqueues))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Set aside a body that cannot be decompressed."""
        self._refuse(message, UNREADABLE_BODY)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Set aside what Celery itself refuses, such as a moment that is none."""
        self._refuse(message, NO_CALL)

    def _refuse(self, message: Any, reason: str) -> None:
        message.channel.set_aside(reason)
        if not message.acknowledged:
            message.reject_log_error(celery_log, self.connection_errors)

    def on_connection_error_after_connected(self, exc: Exception) -> Any:
        """Close the dead connection's channels ourselves, whatever they raise, then go on."""
        transport = getattr(self.connection, "_connection", None)
        for channel in list(getattr(transport, "channels", None) or ()):
            try:
                channel.close()
            except Exception as error:
                log.warning("broker.channel_lost", error=repr(error)[:300])
        return super().on_connection_error_after_connected(exc)


def _fault(message: Any, tasks: Mapping[str, Any]) -> str | None:
    """Return why the message must not reach the pool, if so.

    An error while Celery hands it over would cost the worker a free place of its pool for good.
    """
    headers = message.headers
    task = headers.get("task")
    if not isinstance(task, str) or task not in tasks:
        return UNKNOWN_TASK
    try:
        payload = message.payload
    except Exception:
        return UNREADABLE_BODY
    match payload:
        case [list() as args, dict() as kwargs, dict() | None] if _is_call(headers):
            is_good = task != RUN_TASK or (not kwargs and _are_arguments(args))
            return None if is_good else WRONG_ARGUMENTS
    return NO_CALL


def _is_call(headers: Mapping[str, Any]) -> bool:
    """Tell whether the headers that Celery uses on the way to the pool are what they must be."""
    limits = headers.get("timelimit")
    if limits is not None:
        if not isinstance(limits, list) or len(limits) != 2:
            return False
        if not all(limit is None or type(limit) in (int, float) for limit in limits):
            return False
    return (
        isinstance(headers.get("id"), str)
        and isinstance(headers.get("stamped_headers"), list | None)
        and isinstance(headers.get("stamps"), dict | None)
    )


def _are_arguments(args: list[Any]) -> bool:
    """Tell whether these are a task's id and a generation (I1)."""
    match args:
        case [str() as task_id, int() as generation] if 0 < generation < 2**31:
            try:
                UUID(task_id)
            except ValueError:
                return False
            return generation is not True
    return False
