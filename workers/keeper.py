"""The keeper: the loop that wakes, rescues and tidies, and says that its worker lives.

A thread in every worker's main process, with its own connection; a row lease lets one act at a
time, so that a frozen holder is replaced in seconds. It needs neither beat nor Redis nor a worker
slot.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from celery import bootsteps
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from opscore import alive, engine, idempotency, logs, memories, metrics, presence, schedules
from opscore.config import Settings, installed_version
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.metrics import Teller
from opscore.presence import KEEPER_LEASE_SECONDS, Presence

log = logs.get(__name__)

RESCUE_EVERY = 5
"""Rounds between two looks for lost visits."""
TIDY_EVERY = 600
"""Rounds between two looks for what is only deleted."""
LIMIT = 500
"""Rows a round handles of each kind; the next round goes on."""

_LEAD = text(
    """
INSERT INTO leases (name, holder, expires_at)
VALUES ('keeper', :holder, now() + make_interval(secs => :seconds))
ON CONFLICT (name) DO UPDATE
SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE leases.holder = excluded.holder OR leases.expires_at < now()
RETURNING holder
"""
)
_RESIGN = text(
    "UPDATE leases SET expires_at = now() WHERE name = 'keeper' AND holder = :holder"
    " AND expires_at > now()"
)


class Round:
    """One pass of upkeep after another, by whoever holds the keeper's lease."""

    def __init__(self, database: Database, dispatcher: Dispatcher, settings: Settings) -> None:
        self.database = database
        self.dispatcher = dispatcher
        self.settings = settings
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self.count = 0
        self.has_more = False
        """A limit was reached: the next round follows at once."""
        self.is_untidy = False
        """So for what is deleted, which has no hurry: the next round goes on with it."""
        self.tidied: str | None = None
        """Behind the firings of which schedule it goes on."""

    def run(self) -> bool:
        """Do one round; False if another keeper leads."""
        with self.database.autocommit() as tx:
            led = tx.execute(
                _LEAD, {"holder": self.holder, "seconds": KEEPER_LEASE_SECONDS}
            ).first()
        if led is None:
            return False
        is_rescue = self.has_more or self.count % RESCUE_EVERY == 0
        self.has_more = False
        self.expire()
        self.settle()
        if self.dispatcher.is_reachable():
            self.release()
            self.wake()
            self.dispatcher.recall(LIMIT)
            if is_rescue:
                self.rescue()
        if self.is_untidy or self.count % TIDY_EVERY == 0:
            self.tidy()
        self.count += 1
        return True

    def resign(self) -> None:
        """Let another keeper lead at once."""
        with self.database.autocommit() as tx:
            tx.execute(_RESIGN, {"holder": self.holder})

    def expire(self) -> None:
        """Take expired attempts from workers that went silent."""
        with self.database.autocommit() as tx:
            expired = engine.expired_attempts(tx, LIMIT, self.settings.lease_seconds)
        for task_id in expired:
            with self.database.transaction() as tx:
                gone = engine.lose_attempt(tx, task_id, self.settings.max_lost)
            if gone is not None:
                self._follow(task_id, gone)
        self.dispatcher.withdraw()

    def wake(self) -> None:
        """Wake parked tasks whose moment has come, and the lines of agents with a free slot."""
        with self.database.autocommit() as tx:
            engine.hurry_astray(tx, LIMIT)
            due = engine.wake_due(tx, LIMIT)
            woken = [*due.woken]
            for agent_id in engine.agents_to_wake(tx):
                woken += engine.wake_line(tx, agent_id)
        self.dispatcher.wake(woken)
        self.has_more |= len(due.woken) + len(due.overdue) >= LIMIT
        for task_id in due.overdue:
            with self.database.transaction() as tx:
                gone = engine.fail_overdue(tx, task_id)
            if gone is not None:
                self._follow(task_id, gone)

    def _follow(self, task_id: Any, gone: engine.Gone) -> None:
        if gone.finished is not None:
            self.dispatcher.follow(gone.finished, task_id, gone.run_id, parent_id=gone.parent_id)

    def settle(self) -> None:
        """End runs at their deadline, and those whose last finisher died before it could."""
        with self.database.autocommit() as tx:
            overdue = engine.overdue_runs(tx, LIMIT)
        for run_id in overdue:
            with self.database.transaction() as tx:
                engine.fail_overdue_run(tx, run_id)
        with self.database.autocommit() as tx:
            over = engine.runs_to_settle(tx, LIMIT)
        for run_id in over:
            self.dispatcher.follow_end(run_id)

    def release(self) -> None:
        """Let runs begin that are due, or wait until fewer of their workflow are under way."""
        with self.database.autocommit() as tx:
            due = engine.begin_due_runs(tx, LIMIT)
            workflows = engine.limited_workflows(tx)
        for plan in due:
            self.dispatcher.publish(plan)
        for workflow_id in workflows:
            self.dispatcher.release_runs(workflow_id)

    def rescue(self) -> None:
        """Find tasks that could move but whose visit was lost; hold up those of paused runs."""
        with self.database.autocommit() as tx:
            engine.hold_up_strays(tx, LIMIT)
            woken = engine.wake_forgotten(tx)
        self.dispatcher.wake(woken)
        self.has_more |= self.dispatcher.rescue(LIMIT)

    def tidy(self) -> None:
        """Forget what is over: keys, old firings, expired memories, workers that died."""
        days = self.settings.firing_days
        with self.database.autocommit() as tx:
            presence.forget(tx)
            metrics.forget(tx)
            forgotten = (
                idempotency.forget_keys(tx, LIMIT),
                schedules.forget_events(tx, days, LIMIT),
                memories.forget_expired(tx, LIMIT),
            )
            self.tidied = schedules.forget_firings(tx, days, LIMIT, self.tidied or "")
        self.is_untidy = max(forgotten) >= LIMIT or self.tidied is not None


class Sign:
    """A worker's sign of life, given every few seconds."""

    def __init__(self, database: Database, worker: Presence) -> None:
        self.database = database
        self.worker = worker
        self._due = 0.0

    def give(self) -> None:
        """Say that the worker lives, if it is time to."""
        if time.monotonic() < self._due:
            return
        with self.database.autocommit() as tx:
            presence.say(tx, self.worker)
        self._due = time.monotonic() + presence.SAY_SECONDS

    def take_back(self) -> None:
        """Say that the worker has ended."""
        with self.database.autocommit() as tx:
            presence.leave(tx, self.worker.id)


OFFER = "opscore_offer"
"""Under which a worker's first step leaves what it has for LLM agents."""


def introduce(worker: Any) -> Presence:
    """Return what there is to say of one of Celery's workers."""
    pool = worker.pool_cls.__module__.rpartition(".")[2]
    return Presence(
        id=uuid4(),
        name=worker.hostname,
        host=socket.gethostname(),
        pid=os.getpid(),
        pool="threads" if pool == "thread" else pool,
        concurrency=worker.concurrency,
        queues=sorted(worker.app.amqp.queues.consume_from),
        version=installed_version(),
        offer=getattr(worker, OFFER, {}),
    )


class Keeper(bootsteps.StartStopStep):
    """Runs the rounds in a thread of the worker's main process, after its first fork."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, worker: Any) -> None:
        arguments = (worker.app, introduce(worker))
        self.thread = threading.Thread(target=self._loop, args=arguments, daemon=True)
        self.thread.start()

    def stop(self, worker: Any) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=KEEPER_LEASE_SECONDS)

    def _loop(self, app: Any, worker: Presence) -> None:
        settings = Settings.from_env(os.environ)
        database = Database(settings.database_url, pool_size=3, application="keeper")
        rounds = Round(database, Dispatcher(app, database, settings), settings)
        sign = Sign(database, worker)
        teller = Teller(database, is_steady=True)
        while not self.ended.is_set():
            for act in (rounds.run, sign.give):
                # Before each: a server that is frozen holds both up.
                alive.give_sign(settings.alive_file)
                self._try(act)
            self.ended.wait(0 if rounds.has_more else settings.keeper_seconds)
        self._end(rounds, sign)
        teller.stop()
        database.close()

    @staticmethod
    def _try(act: Callable[[], Any]) -> None:
        try:
            act()
        except SQLAlchemyError as error:
            log.warning("keeper.database_away", error=repr(error)[:300])
        except Exception:
            # The loop must outlive any single row's trouble; the next round meets it again.
            log.exception("keeper.round_failed")

    @staticmethod
    def _end(rounds: Round, sign: Sign) -> None:
        try:
            rounds.resign()
            sign.take_back()
        except SQLAlchemyError:
            log.info("keeper.lease_left_to_expire")
