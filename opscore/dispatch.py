"""The only code that sends messages: publish after a commit, wake, rescue.

Nothing here may lose work by failing: what cannot be sent stays in PostgreSQL, parked or unvisited,
and the keeper sends it later. So every broker error ends in one log line, and while the broker is
away a breaker spares everybody the wait for its timeout. Rescue also looks at the heads of the
queues, to tell a visit that was lost from one that is late.
"""

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from celery import Celery, Signature
from kombu.exceptions import KombuError, OperationalError
from redis import Redis
from redis.exceptions import RedisError

from opscore import canvas, engine, graph, logs
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, FIRST, SERVED_FIRST, Settings
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

BrokerErrors = (OperationalError, KombuError, RedisError, OSError)


Take = Callable[[Woken], bool]


def _take_nothing(woken: Woken) -> bool:
    return False


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

        With `start`, only what follows these tasks and no others: a segment.
        """
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
        messages: list[Signature | dict[str, Any]] = []
        first: list[dict[str, Any]] = []
        segments: defaultdict[UUID, set[UUID]] = defaultdict(set)
        dead: dict[UUID, int] = {}
        for task in woken:
            if task.message is not None:
                if take(task):
                    continue
                # Who waited for a slot, and has one now, does not stand in line once more.
                (first if task.reason == Reason.AGENT_BUSY else messages).append(task.message)
            elif task.is_item:
                messages.append(
                    self._visit(
                        task.task_id, task.generation, task.timeout_seconds, task.request_id
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
        woken = list(finished.woken)
        line = None if woken else agent_id
        wakes = wakes and parent_id is None and not finished.failed_run
        try:
            if finished.ends_run or parent_id or wakes or line:
                with self.database.autocommit() as tx:
                    if finished.ends_run:
                        engine.settle_run(tx, run_id)
                    if parent_id:
                        woken += engine.wake_parent(tx, parent_id)
                    if wakes:
                        woken += engine.wake_successors(tx, task_id)
                    if line:
                        woken += engine.wake_line(tx, line)
        finally:
            # Who was woken counts on it, whatever became of the statements.
            if finished.message is not None and not finished.failed_run:
                self.send([finished.message], task_id=str(task_id))
            self.wake(woken, take)

    def _items(self, plan: Plan) -> list[Signature]:
        timeouts = dict(plan.items)
        return [
            canvas.lane_signature(
                self.app, lane, timeouts, plan.generation, request_id=plan.request_id
            )
            for lane in graph.lanes(list(timeouts))
        ]

    def _visit(
        self, task_id: UUID, generation: int, timeout_seconds: float, request_id: str | None
    ) -> Signature:
        return canvas.visit(
            self.app,
            task_id,
            generation,
            timeout_seconds=timeout_seconds,
            request_id=request_id,
        )

    def _publish_segment(self, run_id: UUID, start: set[UUID]) -> bool:
        with self.database.transaction() as tx:
            plan = engine.plan_run(tx, run_id)
        if plan is None:
            return True
        alive = start & {node.id for node in plan.nodes}
        return self.publish(replace(plan, items=()), alive)

    def republish(self, run_id: UUID, generation: int) -> bool:
        """Publish what is left of a run under a new generation, unless somebody just did."""
        if not self.is_reachable():
            return False
        plan = self._plan_again(run_id, generation)
        return plan is None or self.publish(plan)

    def _plan_again(self, run_id: UUID, generation: int) -> Plan | None:
        with self.database.transaction() as tx:
            plan = engine.republish_run(tx, run_id, generation)
        if plan is not None:
            log.info("run.republished", run_id=str(run_id), generation=plan.generation)
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
        messages: list[Signature | dict[str, Any]] = []
        for run_id, generation in runs:
            if plan := self._plan_again(run_id, generation):
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
        agents, control = (self._left(tx, heads.get(q)) for q in (AGENTS_QUEUE, CONTROL_QUEUE))
        now = time.monotonic()
        seen = Left(agents, control, served_first)
        self._seen.append((now, seen))
        while len(self._seen) > 1 and self._seen[1][0] <= now - IN_HAND_SECONDS:
            self._seen.popleft()
        seen_at, before = self._seen[0]
        if seen_at > now - IN_HAND_SECONDS:
            return None
        return Left(
            agents=_earlier(before.agents, seen.agents),
            control=_earlier(before.control, seen.control),
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
        queues = (AGENTS_QUEUE, CONTROL_QUEUE)
        try:
            with self._redis() as redis, redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.lrange(queue, -HEAD, -1)
                pipe.lrange(SERVED_FIRST, 0, MOST_FIRST)
                *heads, first = pipe.execute()
        except RedisError as error:
            self._break(error)
            return {}, None
        served_first = None if len(first) > MOST_FIRST else tuple(_visited(first) or ())
        return dict(zip(queues, map(_visited, heads), strict=True)), served_first

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
            with self.app.producer_or_acquire() as producer:
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


def _visited(entries: Sequence[bytes]) -> list[UUID] | None:
    """Return the tasks that these entries of a queue visit; None if there are only others."""
    tasks = []
    for entry in entries:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            tasks.append(UUID(json.loads(entry)["headers"]["id"]))
    return tasks if tasks or not entries else None
