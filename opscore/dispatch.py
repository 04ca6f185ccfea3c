"""The only code that sends messages: publish after a commit, wake, rescue.

Nothing here may lose work by failing: what cannot be sent stays in PostgreSQL, parked or unvisited,
and the keeper sends it later. So every broker error ends in one log line, and while the broker is
away a breaker spares everybody the wait for its timeout. Rescue also looks at the heads of the
queues, to tell a visit that was lost from one that is late.
"""

import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain
from typing import Any
from uuid import UUID

from celery import Celery, Signature
from kombu.exceptions import KombuError, OperationalError
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from opscore import canvas, engine, graph, logs, tally, tracing
from opscore.config import FIRST, QUEUES, SERVED_FIRST, TAKEN, Settings, lists_of
from opscore.db import Database, Tx
from opscore.engine import Finished, Left, Plan, Woken
from opscore.errors import Unavailable
from opscore.states import Reason

log = logs.get(__name__)

BREAKER_SECONDS = 5.0
"""After a failed send nobody tries again for this long."""
BATCH = 500
"""Messages sent in one pipeline."""
PING_SECONDS = 1.0
IN_HAND_SECONDS = 2.0
"""A worker visits the last task of a message within this time, or gives it back."""
HEAD = 200
"""Entries looked at to learn how old the oldest visit of a queue is; some are double or late."""
MOST_FIRST = 5000
"""Entries looked at to learn who is served first; there are as many as workers are behind."""

HEAD_SHOWN = 20
"""Entries looked at to tell people the same."""
MOST_TAKEN = 500
"""Messages looked at to learn which queue each was taken from; workers hold a few each."""
LINES = (Reason.AGENT_BUSY, Reason.AGENT_UNAVAILABLE)

_SENDING = {
    "messaging.system": "redis",
    "messaging.operation.name": "send",
    "messaging.operation.type": "send",
}
MESSAGES = "messaging.batch.message_count"

BrokerErrors = (OperationalError, KombuError, RedisError, OSError)


Take = Callable[[Woken], bool]


def _take_nothing(woken: Woken) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Depth:
    """How many messages a queue has."""

    ready: int
    """That no worker has taken."""
    taken: int | None
    """That workers have, or died with; None: there are very many."""
    head: tuple[UUID, ...] | None = None
    """The tasks next in line; None: what lies there is unknown."""


class Dispatcher:
    """Sends visits for one process."""

    def __init__(self, app: Celery, database: Database, settings: Settings) -> None:
        self.app = app
        self.database = database
        self.settings = settings
        self._broken = False
        self._closed_until = 0.0
        self._seen: deque[tuple[float, Left]] = deque()

    def publish(self, plan: Plan, start: Iterable[UUID] | None = None) -> bool:
        """Send the canvas of what is left of a run; False if the broker did not take it.

        With `start`, only what follows these tasks and no others: a segment. A run that waits for
        its turn is sent when it comes, perhaps at once; one that is to begin later, by the keeper.
        """
        if not plan.is_due:
            return True
        if plan.limited is not None:
            return self.release_runs(plan.limited)
        messages, woken = self._messages(plan, start)
        sent = self.send(messages, run_id=str(plan.run_id))
        return self.wake(woken) and sent

    def _messages(
        self, plan: Plan, start: Iterable[UUID] | None = None
    ) -> tuple[list[Signature], list[Woken]]:
        """Return the messages of a canvas, and the tasks beyond it that could start meanwhile."""
        start = None if start is None else set(start)
        drawn = plan.drawn or graph.build(plan.nodes, start)
        woken: list[Woken] = []
        carried = sorted(drawn.inside - (start or set()))
        if plan.drawn is None and (carried or drawn.beyond):
            with self.database.transaction() as tx:
                engine.carry(tx, carried)
                engine.hold_back(tx, drawn.beyond)
            with self.database.autocommit() as tx:
                woken = engine.wake_joins(tx, drawn.beyond)
        signatures = canvas.signatures(
            self.app, drawn, plan.nodes, plan.generation, plan.request_id
        )
        return [*signatures, *self._items(plan)], woken

    def wake(self, woken: Iterable[Woken], take: Take = _take_nothing) -> bool:
        """Send the visits of woken tasks: the saved message, a plain one, or a whole segment.

        `take` is offered each with a saved message: whoever takes it makes the visit himself.
        """
        woken = list(woken)
        _tell_woken(woken)
        messages: list[Signature | dict[str, Any]] = []
        first: list[dict[str, Any]] = []
        segments: defaultdict[UUID, set[UUID]] = defaultdict(set)
        dead: dict[UUID, int] = {}
        for task in woken:
            if task.message is not None:
                if take(task):
                    continue
                # Who waited for a slot, and has one now, does not stand in line once more.
                (first if task.reason in LINES else messages).append(_sent_to(task))
            elif task.is_item:
                messages.append(
                    canvas.visit(
                        self.app,
                        task.task_id,
                        task.generation,
                        timeout_seconds=task.timeout_seconds,
                        request_id=task.request_id,
                        queue=task.queue,
                    )
                )
            elif task.reason == Reason.DEPENDENCIES:
                segments[task.run_id].add(task.task_id)
            else:
                dead[task.run_id] = task.generation
        sent = self.send(first, priority=FIRST)
        sent &= self.send(messages)
        for run_id, start in segments.items():
            sent &= self._publish_segment(run_id, start)
        for run_id, generation in dead.items():
            sent &= self.republish(run_id, generation)
        return sent

    def wake_line(self, agent_id: str) -> bool:
        """Wake who can have a free slot of an agent, because something changed about it."""
        with self.database.autocommit() as tx:
            woken = engine.wake_line(tx, agent_id)
        return self.wake(woken)

    def withdraw(self) -> None:
        """Take from deregistered agents what they still have, each by itself."""
        with self.database.autocommit() as tx:
            astray = engine.astray_attempts(tx)
        for task_id, run_id, attempt in astray:
            with self.database.transaction() as tx:
                engine.withdraw(tx, task_id, run_id, attempt)

    def recall(self, limit: int) -> None:
        """Have agents told of the attempts that nobody wants any more."""
        with self.database.autocommit() as tx:
            due = engine.due_recalls(tx, limit)
        self.send([canvas.recall(self.app, task_id, attempt) for task_id, attempt in due])

    def follow(
        self,
        finished: Finished,
        task_id: UUID,
        run_id: UUID,
        *,
        parent_id: UUID | None = None,
        agent_id: str | None = None,
        wakes: bool = True,
        take: Take = _take_nothing,
    ) -> None:
        """Do what an outcome asks for, after its commit.

        `agent_id` is the agent whose slot was freed; `wakes` is false for a task all of whose
        successors come by the canvas that visited it; for an item its `parent_id` is woken
        instead. `take` is as in `wake`.
        """
        woken, frees = list(finished.woken), finished.frees
        line = None if woken else agent_id
        wakes = wakes and parent_id is None and not finished.failed_run
        try:
            waiting = {parent_id, finished.parent_task_id} - {None}
            if finished.ends_run or waiting or wakes or line:
                with self.database.autocommit() as tx:
                    if finished.ends_run and (ended := engine.settle_run(tx, run_id)):
                        waiting.add(ended.parent_task_id)
                        frees = ended.frees
                    for task in filter(None, waiting):
                        woken += engine.wake_parent(tx, task)
                    if wakes:
                        woken += engine.wake_successors(tx, task_id)
                    if line:
                        woken += engine.wake_line(tx, line)
        finally:
            # Who was woken counts on it, whatever became of the statements.
            if finished.message is not None and not finished.failed_run:
                self.send([finished.message], task_id=str(task_id))
            self.wake(woken, take)
        if frees is not None:
            self.release_runs(frees)

    def follow_end(self, run_id: UUID) -> None:
        """End a run that was cancelled, or is over its deadline, if nothing of it runs any more."""
        self.follow(Finished(0, ends_run=True), run_id, run_id, wakes=False)

    def _items(self, plan: Plan) -> list[Signature]:
        items = {node.id: node for node in plan.items}
        return [
            canvas.lane_signature(self.app, part, plan.generation, request_id=plan.request_id)
            for lane in graph.lanes(list(items))
            for part in canvas.by_queue([items[task] for task in lane])
        ]

    def _publish_segment(self, run_id: UUID, start: set[UUID]) -> bool:
        with self.database.transaction() as tx:
            plan = engine.plan_run(tx, run_id)
        if plan is None:
            return True
        alive = start & {node.id for node in plan.nodes}
        return self.publish(replace(plan, items=()), alive)

    def release_runs(self, workflow_id: str) -> bool:
        """Send the next runs of a workflow that has room for them; the keeper looks too."""
        with self.database.transaction() as tx:
            released = engine.release_runs(tx, workflow_id)
        sent = True
        for run_id in released:
            with self.database.transaction() as tx:
                plan = engine.plan_run(tx, run_id)
            sent &= plan is None or self.publish(plan)
        return sent

    def republish(self, run_id: UUID, generation: int) -> bool:
        """Publish what is left of a run under a new generation, unless somebody just did."""
        if not self.is_reachable():
            return False
        plan = self._plan_again(run_id, generation)
        return plan is None or self.publish(plan)

    def _plan_again(self, run_id: UUID, generation: int) -> Plan | None:
        with self.database.transaction() as tx:
            plan = engine.republish_run(tx, run_id, generation)
        return plan

    def rescue(self, limit: int = 500) -> bool:
        """Send again what should have been visited and was not: its visit was lost.

        Lost, not late: queues are first in, first out, so a visit that was sent before the oldest
        entry of its queue has left it. Returns whether there may be more than `limit` to send.
        """
        if not self.is_reachable():
            return False
        after = self.settings.rescue_seconds
        with self.database.autocommit() as tx:
            left = self._left_before(tx)
            if left is None or self._broken:
                return False
            runs = engine.unvisited_runs(tx, left, after, limit)
            woken = engine.wake_lost(tx, left, after, limit)
        has_more = limit in (len(runs), len(woken))
        self.database.tally.add_all([(tally.RESCUES, (tally.WAKE,), 1.0)] * len(woken))
        messages: list[Signature | dict[str, Any]] = []
        for run_id, generation in runs:
            if plan := self._plan_again(run_id, generation):
                self.database.tally.add(tally.RESCUES, tally.RUN)
                more, beyond = self._messages(plan)
                messages += more
                woken += beyond
        self.send(messages)
        self.wake(woken)
        return has_more

    def _left_before(self, tx: Tx) -> Left | None:
        """Return what has left the queues, as two looks agree; None before the second.

        What left since the first may be in a worker's hands, and come back.
        """
        heads, served_first = self._heads()
        agents, control, io = (self._left(tx, heads.get(queue)) for queue in QUEUES)
        now = time.monotonic()
        seen = Left(agents, control, io, served_first)
        self._seen.append((now, seen))
        while len(self._seen) > 1 and self._seen[1][0] <= now - IN_HAND_SECONDS:
            self._seen.popleft()
        seen_at, before = self._seen[0]
        if seen_at > now - IN_HAND_SECONDS:
            return None
        return Left(
            agents=_earlier(before.agents, seen.agents),
            control=_earlier(before.control, seen.control),
            io=_earlier(before.io, seen.io),
            first=_both(before.first, seen.first),
        )

    def _left(self, tx: Tx, head: Sequence[UUID] | None) -> datetime | str:
        """Return the moment before which everything sent to a queue with this head has left it."""
        oldest = None if head is None else engine.oldest_visit(tx, head)
        if oldest is None:
            return engine.NOTHING
        # A run may have been published some time after a younger one.
        return oldest - timedelta(seconds=self.settings.rescue_seconds if head else 0)

    def _heads(self) -> tuple[dict[str, list[UUID] | None], tuple[UUID, ...] | None]:
        """Return the tasks next in line in each queue, and those that are served before them.

        None: what lies there is unknown.
        """
        try:
            with self._redis() as redis, redis.pipeline(transaction=False) as pipe:
                for queue in QUEUES:
                    pipe.lrange(queue, -HEAD, -1)
                for queue in SERVED_FIRST:
                    pipe.lrange(queue, 0, MOST_FIRST)
                answers = pipe.execute()
        except RedisError as error:
            self._break(error)
            return {}, None
        heads = dict(zip(QUEUES, map(_visited, answers[: len(QUEUES)]), strict=True))
        first = list(chain(*answers[len(QUEUES) :]))
        return heads, None if len(first) > MOST_FIRST else tuple(_visited(first) or ())

    def depths(self) -> dict[str, Depth]:
        """Count the messages of each queue, those that are served first included.

        Raises:
            Unavailable: the broker did not answer within a second.
        """
        try:
            with self._redis() as redis, redis.pipeline(transaction=False) as pipe:
                lists = list(chain.from_iterable(map(lists_of, QUEUES)))
                for name in lists:
                    pipe.llen(name)
                for name in lists:
                    pipe.lrange(name, -HEAD_SHOWN, -1)
                pipe.hlen(TAKEN)
                *answers, number = pipe.execute()
                lengths, heads = answers[: len(lists)], answers[len(lists) :]
                entries = redis.hvals(TAKEN) if number <= MOST_TAKEN else None
        except RedisError as error:
            raise Unavailable("Redis does not answer.") from error
        taken = None if entries is None else _taken_from(entries)
        # Each queue has two lists.
        pairs = zip(QUEUES, lengths[::2], lengths[1::2], heads[::2], heads[1::2], strict=True)
        return {
            name: Depth(plain + first, None if taken is None else taken[name], _head(*entries))
            for name, plain, first, *entries in pairs
        }

    def is_full(self) -> bool:
        """Tell whether the broker answers and yet refuses what is sent, for lack of memory.

        Raises:
            Unavailable: it did not answer within a second.
        """
        try:
            with self._redis() as redis:
                memory = redis.info(section="memory")
        except ResponseError:  # it may not be asked: no proof
            return False
        except RedisError as error:
            raise Unavailable("Redis does not answer.") from error
        used = int(memory["used_memory"]) - int(memory.get("mem_not_counted_for_evict", 0))
        return 0 < int(memory.get("maxmemory", 0)) < used

    def is_reachable(self) -> bool:
        """Say whether the broker is worth a try: after a failure it must first answer a ping."""
        if time.monotonic() < self._closed_until:
            return False
        if self._broken:
            try:
                self.ping()
            except Unavailable as error:
                self._break(error)
        return not self._broken

    def send(
        self,
        messages: Sequence[Signature | dict[str, Any]],
        *,
        priority: int = 0,
        **context: Any,
    ) -> bool:
        """Send messages in one go; False if the broker did not take them.

        Those of priority `FIRST` are served before all others of their queue, in their order.
        """
        if not messages:
            return True
        if not self.is_reachable():
            log.warning("dispatch.skipped", messages=len(messages), **context)
            return False
        try:
            with self._sending(len(messages)), self.app.producer_or_acquire() as producer:
                _keep_client(producer.channel)
                with producer.batch(BATCH) if len(messages) > 1 else nullcontext():
                    for message in messages:
                        if not isinstance(message, Signature):
                            message = self.app.signature(message)
                        # In Redis a queue is there once somebody sends to it.
                        message.apply_async(producer=producer, declare=[], priority=priority)
        except BrokerErrors as error:
            self._break(error, **context)
            return False
        return True

    @contextmanager
    def _sending(self, count: int) -> Iterator[None]:
        """Have what is sent in the trace at hand, if there is one."""
        with tracing.part("send", "client", _SENDING | {MESSAGES: count}) as span:
            try:
                yield
            except BrokerErrors as error:
                span.fail(type(error).__name__)
                raise

    def _break(self, error: BaseException, **context: Any) -> None:
        self._broken = True
        self._closed_until = time.monotonic() + BREAKER_SECONDS
        log.warning("dispatch.broker_away", error=repr(error)[:300], **context)

    @contextmanager
    def _redis(self) -> Iterator[Redis]:
        client = Redis.from_url(
            self.settings.redis_url,
            socket_timeout=PING_SECONDS,
            socket_connect_timeout=PING_SECONDS,
        )
        try:
            yield client
        finally:
            client.close()

    def ping(self) -> None:
        """Ask the broker whether it is there.

        Raises:
            Unavailable: it did not answer within a second.
        """
        try:
            with self._redis() as redis:
                redis.ping()
        except RedisError as error:
            raise Unavailable("Redis does not answer.") from error
        self._broken = False


def _tell_woken(woken: Sequence[Woken]) -> None:
    """Log who is visited again: one by its ids, more of them as a number."""
    if len(woken) == 1:
        (one,) = woken
        ids: dict[str, Any] = {
            "run_id": one.run_id,
            "task_id": one.task_id,
            "request_id": one.request_id,
        }
        logs.transition("task.woken", **ids, reason=one.reason)
    elif woken:
        logs.transition("task.woken", tasks=len(woken))


def _sent_to(task: Woken) -> dict[str, Any]:
    """Return a woken task's message for the queue of the agent that a slot is kept of."""
    message = task.message or {}
    options = message.get("options", {})
    if options.get("queue", task.queue) == task.queue:
        return message
    return {**message, "options": {**options, "queue": task.queue}}


def _both(one: tuple[UUID, ...] | None, other: tuple[UUID, ...] | None) -> tuple[UUID, ...] | None:
    return None if one is None or other is None else one + other


def _keep_client(channel: Any) -> None:
    """Have a channel of kombu's keep its client: it makes a new one for every message."""
    if "_create_client" not in vars(channel):
        make, client = channel._create_client, channel._create_client()
        channel._create_client = lambda asynchronous=False: make(True) if asynchronous else client


def _earlier(one: datetime | str, other: datetime | str) -> datetime | str:
    if isinstance(one, str) or isinstance(other, str):
        return engine.NOTHING
    return min(one, other)


def _taken_from(entries: Iterable[bytes | str]) -> Counter[str]:
    """Count messages that workers have by the queue they came from."""
    taken = Counter[str]()
    for entry in entries:
        with suppress(ValueError, TypeError, KeyError, IndexError):
            taken[str(json.loads(entry)[2])] += 1
    return taken


def _head(*lists: Sequence[bytes]) -> tuple[UUID, ...] | None:
    visited = _visited(list(chain(*lists)))
    return None if visited is None else tuple(visited)


def _visited(entries: Sequence[bytes]) -> list[UUID] | None:
    """Return the tasks that these entries of a queue visit; None if there are only others."""
    tasks = []
    for entry in entries:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            tasks.append(UUID(json.loads(entry)["headers"]["id"]))
    return tasks if tasks or not entries else None
