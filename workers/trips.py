"""A trip: what one message has a worker do, from its first task to the last it goes on with.

A message carries what follows its task, and a worker that is done goes on with that itself as far
as Celery would have sent it to the same queue: no hop over the broker, no wait in line. What
follows is the rest of a chain, or of a lane: tasks side by side that share a message because there
are many of them. Nothing orders a lane, so nobody in it waits for a slow mate: after
`PATIENCE_SECONDS` its rest goes back to the queue, each task by itself. Celery knows of a message's
first task only; what Flower should hear of the others is told here.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from uuid import UUID, uuid4

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback  # type: ignore[attr-defined]
from celery import Celery, Task
from celery.app import trace
from celery.exceptions import Ignore, Retry
from sqlalchemy.exc import SQLAlchemyError

from opscore import logs, tracing
from opscore.canvas import HARD_LIMIT_GRACE_SECONDS, LANE_HEADER, RUN_TASK, WAKES_HEADER
from opscore.config import FIRST
from opscore.dispatch import LINES, BrokerErrors, Dispatcher
from opscore.engine import DEADLINE_GRACE_SECONDS, Claimed, Finished, Visit, Woken
from workers.consumer import EVENTS_SECONDS

log = logs.get(__name__)

LONGEST_TRIP = 20
"""Tasks of one trip; then the rest goes back to the queue, so that others have their turn."""
TRIP_SECONDS = 1.0
"""A trip that took this long goes on with nothing more."""
PATIENCE_SECONDS = 0.05
"""How long the tasks of a lane wait for the one that runs."""
IDLE_ROUNDS = 100
"""Empty looks after which the thread that watches the lanes sleeps until it is called."""


class TaskFailed(Exception):
    """The task failed for good, and its run with it."""


Outcome = Exception | None
"""How a visit ended: None lets the canvas go on; `Retry`, `Ignore` and `TaskFailed` do not."""


class OutcomeInfo(ExceptionInfo):
    """What Celery sends from a child to its parent of a visit that did not return.

    Of a traceback billiard copies the place of every instruction of every function in it: 6 MiB and
    milliseconds for each task that merely waits. Outcomes need none: they are no accidents.
    """

    def __init__(self, exc_info: Any = None, internal: bool = False) -> None:
        kind, outcome, _ = exc_info or sys.exc_info()
        if isinstance(outcome, Ignore | Retry | TaskFailed):
            told = ExceptionWithTraceback(outcome, "")
            vars(self).update(type=kind, exception=told, traceback="", internal=internal)
        else:
            super().__init__(exc_info, internal)


assert vars(trace)["ExceptionInfo"] is ExceptionInfo
vars(trace)["ExceptionInfo"] = OutcomeInfo


class Trip:
    """One message in one worker, and the thread that runs it.

    Another thread may `let_go`: what it touches, the request's chain, `owes`, and whether the
    present visit is of a lane, changes under the lock.
    """

    def __init__(
        self,
        task: "Task[Any, Any]",
        visit: Visit,
        dispatcher: Dispatcher,
        events: "Events",
        patience: "Patience",
    ) -> None:
        self.task = task
        self.request: Any = task.request
        self.visit = visit
        self.claimed: Claimed | None = None
        """The present task, if the one before it took it along."""
        self.claimed_next: Claimed | None = None
        """The next task, if the present one took it along."""
        self.span = tracing.Span()
        """Of the present attempt."""
        self.claimed_at = monotonic()
        """When the newest claim was answered."""
        self.owes: tuple[Finished, Claimed] | None = None
        """Whose successors were not woken yet."""
        self._dispatcher, self._events, self._patience = dispatcher, events, patience
        self._started = self._visit_started = monotonic()
        self._seconds: float = (self.request.timelimit or (None,))[0] or 0.0
        self._length = 1
        self._next: tuple[Visit, Any] | None = None
        self._taken = False
        """The next visit came with no message of its own."""
        self._lock = threading.Lock()

    @property
    def worker(self) -> str:
        return self.request.hostname or "?"

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.request.headers or {}

    @property
    def wakes(self) -> bool:
        """Some successor of the task does not come by this canvas: finishing, it must be woken."""
        return bool(self.headers.get(WAKES_HEADER))

    @property
    def is_lane(self) -> bool:
        return bool(self.headers.get(LANE_HEADER))

    @property
    def is_followed_by_mate(self) -> bool:
        """The next task of its lane is claimed already, and wakes what both have in common."""
        return self.is_lane and self.claimed_next is not None and not self._taken

    @property
    def has_moved(self) -> bool:
        """It is past the task that Celery knows of."""
        return self._length > 1

    @property
    def has_taken(self) -> bool:
        """It goes on with who was first in line for the slot that was freed."""
        return self._taken and self.claimed_next is not None

    @property
    def is_told(self) -> bool:
        """Celery has nothing to carry on, and what is to be said of its task was said here."""
        request = self.request
        return not (request.chain or request.chord or request.callbacks)

    # --- Going on -------------------------------------------------------------------------------

    def look_ahead(self) -> Visit | None:
        """Return the visit that would come next, if it may be made here."""
        try:
            with self._lock:
                upcoming = self._upcoming()
            if upcoming is None:
                self._next = None
            elif self._next is None or self._next[1] is not upcoming:
                task_id, generation = upcoming["args"]
                self._next = (Visit(UUID(task_id), generation, uuid4()), upcoming)
        except (AttributeError, KeyError, TypeError, ValueError):
            self._next = None  # what follows is no visit: Celery's to refuse
        return self._next[0] if self._next is not None else None

    def _upcoming(self) -> Any | None:
        request = self.request
        if not request.chain or request.callbacks:
            return None
        upcoming = request.chain[-1]
        # What was offered once may have been claimed by a statement whose answer was lost.
        is_offered = self._next is not None and self._next[1] is upcoming
        return upcoming if is_offered or self._may_go_on(upcoming) else None

    def _may_go_on(self, upcoming: dict[str, Any]) -> bool:
        """Tell whether this worker could get the message, and has the time for it."""
        options = upcoming["options"]
        return (
            upcoming["task"] == RUN_TASK
            and not upcoming.get("subtask_type")
            and self.request.delivery_info["routing_key"]
            == (options.get("queue") or options.get("routing_key"))
            and self._has_time_for(options["time_limit"])
        )

    def _has_time_for(self, limit: float) -> bool:
        """Celery's hard limit was set for the first task and ends the process, whoever runs."""
        gone = monotonic() - self._started
        needed = gone + limit - HARD_LIMIT_GRACE_SECONDS + DEADLINE_GRACE_SECONDS
        return self._length < LONGEST_TRIP and gone < TRIP_SECONDS and needed <= self._seconds

    def take(self, woken: Woken) -> bool:
        """Go on with a task that was just woken, if nothing else is to follow the present one."""
        request, message = self.request, woken.message
        has_next = self._taken or self.claimed_next is not None
        is_bound = request.chain or request.callbacks or request.chord or has_next
        try:
            if message is None or is_bound or not self._may_go_on(message):
                return False
            task_id, generation = message["args"]
        except (AttributeError, KeyError, TypeError, ValueError):
            return False  # the message was not made by us
        has_slot = woken.reason in LINES
        self._next = (Visit(UUID(task_id), generation, uuid4(), has_slot), message)
        self._taken = True
        return True

    def offer(self) -> float | None:
        """Return the longest timeout of a task it could go on with; None: something else is next.

        Of a task that is not known yet; it will be for the agent of the present one.
        """
        request = self.request
        if request.chain or request.callbacks or request.chord:
            return None
        gone = monotonic() - self._started
        within = self._seconds - gone - DEADLINE_GRACE_SECONDS
        return within if within > 0 and self._has_time_for(0) else None

    def go_on_with(self, claimed: Claimed, message: dict[str, Any], token: UUID) -> None:
        """Go on with who was first in line, whom the present task took along as it was offered."""
        self._next = (Visit(claimed.task_id, message["args"][1], token), message)
        self._taken, self.claimed_next = True, claimed

    def goes_on_after(self, outcome: Outcome) -> bool:
        """Move to the next visit if there is one and this one's outcome lets it come."""
        is_ours = self._taken or self.claimed_next is not None
        may = is_ours or outcome is None or self._is_survived(outcome)
        has_next = is_ours or self.look_ahead() is not None
        goes_on = may and has_next
        if goes_on or self.has_moved:
            self._events.ended(self.request, outcome, monotonic() - self._visit_started)
        return goes_on and self._move()

    def _is_survived(self, outcome: Exception) -> bool:
        """In a lane nobody comes after anybody; but a run that fails has no use for the rest."""
        return self.is_lane and not isinstance(outcome, TaskFailed)

    def _move(self) -> bool:
        """Become the next visit of the message, as Celery would have made it in its worker."""
        assert self._next is not None
        visit, upcoming = self._next
        request = self.request
        options = upcoming["options"]
        with self._lock:  # whoever gives a lane back sees the one visit or the other
            if self._taken:
                request.chain = options.get("chain")
            elif request.chain and request.chain[-1] is upcoming:
                request.chain.pop()
            elif self.claimed_next is None:  # given back meanwhile
                return False
            request.parent_id, request.id = request.id, options["task_id"]
            request.args, request.kwargs = upcoming["args"], upcoming["kwargs"]
            request.chord = options.get("chord")
            request.group, request.group_index = options.get("group_id"), options.get("group_index")
            request.callbacks, request.errbacks = options.get("link"), options.get("link_error")
            request.headers = options.get("headers")
            request.timelimit = [options["time_limit"], None]
        self._taken = False
        self.visit, self.claimed, self.claimed_next = visit, self.claimed_next, None
        self._length += 1
        self._visit_started = monotonic()
        self._events.began(request)
        return True

    def end(self, outcome: Outcome) -> None:
        """Leave nothing of the message behind that Celery will not send on."""
        if outcome is None or self._is_survived(outcome):
            self.give_back()
        self.pay()

    def message(self) -> dict[str, Any]:
        """Return the present visit as a message, with its place in the canvas."""
        signature: dict[str, Any] = dict(self.task.signature_from_request())
        return _alone(signature) if self.is_lane else signature

    # --- Lanes ----------------------------------------------------------------------------------

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Give the rest of a lane back, and wake what waits for it, if the block takes long."""
        if not self.is_lane or not (self.has_moved or self.request.chain):
            yield
            return
        self._patience.watch(self)
        try:
            yield
        finally:
            self._patience.forget(self)

    def let_go(self) -> None:
        """Leave nothing of a lane to a slow task: neither its rest nor its wakes."""
        self.give_back()
        self.pay()

    def give_back(self) -> None:
        """Send the rest of a lane back to where it was in line, each task by itself."""
        with self._lock:
            chain = self.request.chain if self.is_lane else None
            rest = list(chain or ())
        if rest and self._dispatcher.send([_alone(one) for one in reversed(rest)], priority=FIRST):
            with self._lock:
                if self.request.chain is chain:
                    self.request.chain = None

    def owe(self, finished: Finished, claimed: Claimed) -> None:
        """Leave the wakes of this task of a lane to the next."""
        with self._lock:
            self.owes = (finished, claimed)

    def owe_nothing(self) -> None:
        """Know that whoever was to be woken is being woken."""
        with self._lock:
            self.owes = None

    def pay(self) -> None:
        """Wake what the tasks of a lane left to their last one."""
        with self._lock:
            owes, self.owes = self.owes, None
        if owes is not None:
            finished, claimed = owes
            try:
                self._dispatcher.follow(
                    finished, claimed.task_id, claimed.run_id, parent_id=claimed.parent_id
                )
            except SQLAlchemyError:
                log.exception("lane.not_followed")


def _alone(visit: dict[str, Any]) -> dict[str, Any]:
    """Return a visit of a lane as a message without its lane."""
    options = {**visit["options"], "chain": None}
    options["headers"] = {**(options.get("headers") or {}), LANE_HEADER: False}
    return {**visit, "options": options}


class Patience:
    """The thread of a process that watches how long its lanes have waited."""

    def __init__(self) -> None:
        self._due: dict[Trip, float] = {}
        self._changed = threading.Condition()
        self._sleeps = True
        self._thread: threading.Thread | None = None

    def watch(self, trip: Trip) -> None:
        with self._changed:
            self._due[trip] = monotonic() + PATIENCE_SECONDS
            if self._sleeps:
                self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="patience", daemon=True)
                self._thread.start()

    def forget(self, trip: Trip) -> None:
        with self._changed:
            self._due.pop(trip, None)

    def _loop(self) -> None:
        empty = 0
        while True:
            with self._changed:
                self._sleeps = empty >= IDLE_ROUNDS
                self._changed.wait(None if self._sleeps else PATIENCE_SECONDS / 2)
                now = monotonic()
                empty = 0 if self._due else empty + 1
                ripe = [trip for trip, due in self._due.items() if due <= now]
                for trip in ripe:
                    del self._due[trip]
            for trip in ripe:
                try:
                    trip.let_go()
                except Exception:
                    # Without this thread a lane would wait for its slowest task.
                    log.exception("lane.not_given_back")


class Events:
    """What Flower hears of the tasks that Celery knows nothing of; lost without harm.

    A thread sends them some at a time: to send those of each trip took a fifth of a worker's time.
    """

    def __init__(self, app: Celery, dispatcher: Dispatcher) -> None:
        self._app = app
        self._dispatcher = dispatcher
        self._lock = threading.Lock()
        self._sender: Any = None
        self._told = threading.Event()
        self._thread: threading.Thread | None = None

    def began(self, request: Any) -> None:
        """Tell that a visit begins that Celery did not receive."""
        self._tell(
            "received",
            request,
            name=RUN_TASK,
            args=repr(tuple(request.args)),
            kwargs="{}",
            root_id=request.root_id,
            parent_id=request.parent_id,
            retries=0,
            eta=None,
            expires=None,
        )
        self._tell("started", request)

    def ended(self, request: Any, outcome: Outcome, seconds: float) -> None:
        """Tell how a visit ended, and how long it took."""
        if outcome is None:
            self._tell("succeeded", request, result="None", runtime=seconds)
        elif isinstance(outcome, Retry):
            self._tell("retried", request, exception=repr(outcome), traceback="")
        elif isinstance(outcome, TaskFailed):
            self._tell("failed", request, exception=repr(outcome), traceback="")

    def _tell(self, what: str, request: Any, **fields: Any) -> None:
        if not self._app.conf.worker_send_task_events:
            return
        sender = self._buffer(request.hostname)
        try:
            sender.send(f"task-{what}", uuid=request.id, **fields)
        except BrokerErrors as error:  # the buffer is full, and cannot be sent
            self._drop(sender, error)

    def _buffer(self, hostname: str) -> Any:
        with self._lock:
            if self._sender is None:
                self._sender = self._app.events.Dispatcher(
                    self._app.connection_for_write(),
                    hostname=hostname,
                    buffer_while_offline=False,
                    buffer_group=("task",),
                    buffer_limit=10_000,
                    on_send_buffered=self._told.set,
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="events", daemon=True)
                self._thread.start()
            return self._sender

    def _loop(self) -> None:
        while True:
            self._told.wait()
            sleep(EVENTS_SECONDS)
            self._told.clear()
            try:
                self.flush()
            except Exception:
                # Without this thread Flower would hear nothing more of this process.
                log.exception("events.not_sent")

    def flush(self) -> None:
        """Send what was told."""
        sender = self._sender
        if sender is not None and self._dispatcher.is_reachable():
            try:
                sender.flush()
            except BrokerErrors as error:
                self._drop(sender, error)

    def _drop(self, sender: Any, error: Exception) -> None:
        log.warning("events.not_sent", error=repr(error)[:300])
        with self._lock:
            if self._sender is sender:
                self._sender = None
