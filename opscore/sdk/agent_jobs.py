"""The work an agent server has in hand: each task once at a time, whatever comes of its attempts.

A job is one run of the function. A newer attempt with the same parameters takes over the job under
way, and is given the result of one that is done. Nothing here knows of HTTP.
"""

import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from threading import Condition, Event, Thread
from time import monotonic
from typing import Any

from opscore.agentkit.calling import Busy, Completed, Failed, Outcome, call
from opscore.agentkit.context import Context
from opscore.agentkit.function import FunctionAgent
from opscore.remote import Accepted
from opscore.sdk.agent_orders import Order

MOST_KEPT = 1_000
"""Results kept for who asks again; the oldest go first."""
MOST_KEPT_BYTES = 64 * 2**20
"""So they do beyond this, as JSON: one may have 1 MiB."""
COME_AGAIN_SECONDS = 5.0
"""Whoever was sent away is asked for sooner, by a report of `idle`."""

log = logging.getLogger(__name__)


class LoggedContext(Context):
    """opscore has no place for what an agent behind HTTP says of its attempt: it is logged here."""

    __slots__ = ()

    def log(self, message: object, /, **fields: Any) -> None:
        super().log(message, **fields)
        for entry in self.drain()[0]:
            self._tell(f"{entry.message} {json.dumps(entry.fields) if entry.fields else ''}")

    def progress(self, fraction: float, message: object = None) -> None:
        super().progress(fraction, message)
        if progress := self.drain()[1]:
            self._tell(f"{progress.fraction:.0%} {progress.message or ''}")

    def _tell(self, text: str) -> None:
        log.info("task %s, attempt %d: %s", self.task_id, self.attempt, text.strip())


@dataclass(eq=False, slots=True)
class Job:
    """One run of the function, for the newest attempt that asked for it."""

    order: Order
    context: Context
    outcome: Outcome | None = None
    is_accepted: bool = False
    """`order` was answered without an outcome, which is to be reported."""
    is_over: Event = field(default_factory=Event)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What came of a task, without its parameters, which may be large."""

    token: str
    attempt: int
    digest: bytes
    outcome: Outcome
    is_whole: bool
    size: int

    def answers(self, order: Order) -> bool:
        """A failure answers no newer attempt: that is there to try again."""
        is_news = order.follows(self.token, self.attempt)
        return not is_news or (self.is_whole and order.digest == self.digest)


class Jobs:
    """Runs an agent's function, up to `capacity` times at once, each in a thread of its own.

    `on_room` is called when there may be room again and opscore knows of none.
    """

    def __init__(
        self,
        agent: FunctionAgent,
        capacity: int,
        on_room: Callable[[], None] = lambda: None,
        *,
        most_kept: int = MOST_KEPT,
        most_kept_bytes: int = MOST_KEPT_BYTES,
    ) -> None:
        self._agent, self._capacity, self._on_room = agent, capacity, on_room
        self._most_kept, self._most_kept_bytes = most_kept, most_kept_bytes
        self._changed = Condition()
        self._jobs: dict[str, Job] = {}
        """By task: what is under way, and what is to be reported."""
        self._working = 0
        self._reports: deque[Job] = deque()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._busy_until = 0.0
        self._owes_idle = False
        self.is_closing = False
        self._is_closed = False

    # --- what is asked

    def ask(self, order: Order, patience: float) -> Outcome | Accepted:
        """Return what comes of an order within `patience` seconds; what takes longer is accepted,
        and its outcome is given by `next_report`.

        `Busy` if there is no room, or nothing new is begun any more.
        """
        with self._changed:
            kept = self._kept.get(order.task_id)
            if kept is not None and kept.answers(order):
                self._leave_behind(order)
                return kept.outcome
            job = self._join(order) or self._begin(order)
        if job is None:
            return Busy(COME_AGAIN_SECONDS)
        job.is_over.wait(patience)
        with self._changed:
            if job.outcome is not None:
                return job.outcome
            if self._is_present(job) and job.order.token == order.token:
                job.is_accepted = True
            return Accepted()

    def recall(self, task_id: str, token: str) -> bool:
        """Stop what nobody wants any more; False if another attempt does, or it is over."""
        with self._changed:
            job = self._jobs.get(task_id)
            if job is None or job.order.token != token:
                return False
            self._drop(job)
            return True

    def _join(self, order: Order) -> Job | None:
        """Let an order have what comes of the job under way, unless it needs one of its own."""
        job = self._jobs.get(order.task_id)
        if job is None or not order.follows(job.order.token, job.order.attempt):
            return job
        # What was told to stop may come to half of a result.
        is_of_use = job.outcome is None and not job.context.cancelled
        if not is_of_use or order.digest != job.order.digest:
            return None
        log.info("task %s: attempt %d takes over", order.task_id, order.attempt)
        job.order, job.is_accepted = order, False
        return job

    def _begin(self, order: Order) -> Job | None:
        self._leave_behind(order)
        if self.is_closing or self._working >= self._capacity:
            self._owes_idle = True
            return None
        context = LoggedContext(
            run_id=order.run_id,
            task_id=order.task_id,
            attempt=order.attempt,
            deadline=order.deadline,
            request_id=order.request_id,
            traceparent=order.traceparent,
        )
        job = Job(order, context)
        Thread(target=self._work, args=(job, order), name=order.task_id, daemon=True).start()
        self._working += 1
        self._jobs[order.task_id] = job
        return job

    def _leave_behind(self, order: Order) -> None:
        """Stop what was for an older attempt, and what of it was to be reported."""
        job = self._jobs.get(order.task_id)
        if job is not None and order.follows(job.order.token, job.order.attempt):
            self._drop(job)

    def _drop(self, job: Job) -> None:
        job.context.cancel()
        job.is_accepted = False
        if self._is_present(job):
            del self._jobs[job.order.task_id]
        self._changed.notify_all()

    def _is_present(self, job: Job) -> bool:
        return self._jobs.get(job.order.task_id) is job

    # --- what is done

    def _work(self, job: Job, order: Order) -> None:
        outcome = call(self._agent, order.parameters, job.context, order.seconds)
        _log_outcome(order, outcome)
        size = len(json.dumps(outcome.output)) if isinstance(outcome, Completed) else 0
        with self._changed:
            self._working -= 1
            if job.outcome is None:  # else it was given up
                self._end(job, outcome, size)
            owes_idle = self._owes_idle
            self._changed.notify_all()
        if owes_idle:
            self._on_room()

    def _end(self, job: Job, outcome: Outcome, size: int) -> None:
        job.outcome = outcome
        if isinstance(outcome, Busy):
            self._busy_until = max(self._busy_until, monotonic() + (outcome.retry_after or 0))
        elif self._is_present(job):
            self._keep(job, outcome, size)
        if job.is_accepted:
            self._reports.append(job)
        elif self._is_present(job):
            del self._jobs[job.order.task_id]
        job.is_over.set()

    def _keep(self, job: Job, outcome: Outcome, size: int) -> None:
        order = job.order
        is_whole = isinstance(outcome, Completed) and not job.context.cancelled
        if order.task_id in self._kept:
            self._kept_bytes -= self._kept.pop(order.task_id).size
        kept = _Kept(order.token, order.attempt, order.digest, outcome, is_whole, size)
        self._kept[order.task_id] = kept
        self._kept_bytes += size
        while len(self._kept) > self._most_kept or self._kept_bytes > self._most_kept_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].size

    # --- what is to be said

    def state(self) -> tuple[str, float]:
        """Return the state to report, and after how many seconds it is to be looked at again."""
        with self._changed:
            left = self._busy_until - monotonic()
            self._owes_idle = self._working >= self._capacity or left > 0 or self.is_closing
            return "active" if self._owes_idle else "idle", left if left > 0 else inf

    def accepted(self) -> list[tuple[Job, Order]]:
        """Return what opscore waits for."""
        with self._changed:
            return [(job, job.order) for job in self._jobs.values() if job.is_accepted]

    def next_report(self) -> tuple[Job, Order, Outcome] | None:
        """Wait for an outcome that is to be reported; None: there will be none any more."""
        with self._changed:
            while self._reports or not self._is_closed:
                while self._reports:
                    job = self._reports.popleft()
                    if job.is_accepted and job.outcome is not None:
                        return job, job.order, job.outcome
                if not self._is_closed:
                    self._changed.wait()
            return None

    def report_again(self, job: Job, outcome: Outcome) -> None:
        """Have an outcome reported after the others that are to be."""
        with self._changed:
            job.outcome = outcome
            self._reports.append(job)

    def settle(self, job: Job, order: Order) -> None:
        """Note that an attempt is over: nothing more is to be said of it."""
        with self._changed:
            if job.order is order:
                self._drop(job)

    # --- the end

    def close(self, grace: float) -> None:
        """Begin nothing new, let what is under way end and be reported, and give the rest up."""
        with self._changed:
            self.is_closing = True
            self._changed.wait_for(lambda: not self._working and not self._jobs, grace)
            for job in list(self._jobs.values()):
                what = "is handed back" if job.outcome is None else "could not be reported"
                log.warning("task %s, attempt %d %s", job.order.task_id, job.order.attempt, what)
                job.outcome = job.outcome or Busy(COME_AGAIN_SECONDS)
                job.is_over.set()
                self._drop(job)
            self._is_closed = True
            self._changed.notify_all()


def _log_outcome(order: Order, outcome: Outcome) -> None:
    told = f"task {order.task_id}, attempt {order.attempt}"
    if isinstance(outcome, Failed):
        lines = f"\n{outcome.traceback}" if outcome.traceback else ""
        log.warning("%s failed as %s: %s%s", told, outcome.code, outcome.message, lines)
    else:
        log.info("%s: %s", told, type(outcome).__name__.lower())
