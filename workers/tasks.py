"""What a visit does: one task function, read from top to bottom.

A visit claims its task, runs the agent under the lease, records the outcome, and only then lets the
canvas go on. A trip (see `trips`) makes the visits of one message one after the other, and each
tells it how it ended; Celery hears of the first only. All of that is for the canvas: the truth is
written already.

    returns     the task is over; the canvas goes on
    Retry       the task waits in PostgreSQL, its message saved with it (Flower shows RETRY)
    Ignore      nothing to do here, or a newer canvas drives the run
    TaskFailed  the task failed and nothing below it may run (Flower shows FAILURE)
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

from celery import Task
from celery.exceptions import Ignore, Retry
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celeryconfig import app
from opscore import agentkit, agents, engine, logs, remote, tally, tracing, work
from opscore.agentkit import Busy, Completed, Context, Failed
from opscore.agentkit.function import Agent
from opscore.agentkit.llm import LLMAgent
from opscore.canvas import RECALL, RECALL_SECONDS, REQUEST_HEADER, RUN_TASK
from opscore.config import FIRST
from opscore.db import Tx
from opscore.definition import ForEach, TaskSpec
from opscore.engine import Claimed, Failure, Finished, MustWait, Parked, Visit
from opscore.errors import OpsCoreError
from opscore.expressions import ExpressionError
from opscore.states import Reason
from opscore.workflows import find_workflow
from workers import llm
from workers.app import process
from workers.trips import Outcome, TaskFailed, Trip

log = logs.get(__name__)

T = TypeVar("T")

DATABASE_PATIENCE_SECONDS = 5.0
"""The longest pause between two tries at a database that is away."""


@app.task(bind=True, name=RUN_TASK, throws=(TaskFailed,))
def run_task(self: "Task[Any, Any]", task_id: str, generation: int) -> None:
    """See whether the task can be moved, and move it; then go on with what the message carries."""
    # What is served before all others was mostly sent for a slot that is kept.
    has_slot = (self.request.delivery_info or {}).get("priority") == FIRST
    visit = Visit(UUID(task_id), generation, uuid4(), has_slot)
    trip = Trip(self, visit, process.dispatcher, process.events, process.patience)
    while trip.goes_on_after(outcome := _outcome(trip)):
        pass
    trip.end(outcome)
    if trip.has_moved and (outcome is not None or trip.is_told):
        raise Ignore
    if outcome is not None:
        raise outcome


@app.task(name=RECALL)
def recall(task_id: str, attempt: int) -> None:
    """Tell an agent behind HTTP that nobody wants an attempt any more."""
    one = UUID(task_id)
    order = _insist(lambda tx: engine.recalled_attempt(tx, one, attempt))
    if order is not None and process.settings.webhook_secret is not None:
        answer = process.caller.call(_recalling(order))
        if isinstance(answer, Failed) and answer.code in NOT_THERE:
            return
        ids = {"run_id": order.run_id, "task_id": one, "task": order.definition_id}
        more = {"agent_id": order.agent_id, "request_id": order.request_id}
        logs.transition("attempt.recalled", **ids, attempt=attempt, **more)
    _insist(lambda tx: engine.note_recall(tx, one, attempt))


NOT_THERE = ("agent_unreachable", "timeout")
"""It is told again."""


def _recalling(row: Any) -> remote.Order:
    return remote.Order(
        url=row.contact_endpoint,
        payload=None,
        task_name=row.definition_id,
        run_id=str(row.run_id),
        task_id=str(row.task_id),
        token=str(row.token),
        attempt=row.attempt,
        deadline=datetime.now(UTC) + timedelta(seconds=RECALL_SECONDS),
        timeout_seconds=RECALL_SECONDS,
        workflow_id=row.workflow_id,
        version=row.version,
        index=row.index,
        request_id=row.request_id,
        recalls=True,
    )


def _outcome(trip: Trip) -> Outcome:
    """Make the trip's present visit and return what it tells Celery."""
    request_id = trip.claimed.request_id if trip.claimed else trip.headers.get(REQUEST_HEADER)
    with logs.bound(task_id=str(trip.visit.task_id), request_id=request_id):
        try:
            _visit(trip)
        except (Ignore, Retry, TaskFailed) as outcome:
            return outcome
        except Exception:
            # The row has not moved, or its lease runs out; the rest of the message must go on.
            log.exception("visit.broke")
            return Ignore()
    return None


def _visit(trip: Trip) -> None:
    """Claim, and do what the answer says; ask again while others move the task meanwhile."""
    while True:
        answer = trip.claimed or _claimed(trip)
        if isinstance(answer, Claimed):
            return _run(trip, answer)
        if answer is not None and _is_done_with(trip, answer):
            return None
        # Others move the task at this moment; whoever would agree with nobody must not spin.
        time.sleep(random.uniform(0, 0.1))


def _claimed(trip: Trip) -> engine.Answer | None:
    answer = _insist(lambda tx: _claim(tx, trip))
    trip.claimed_at = time.monotonic()
    return answer


def _is_done_with(trip: Trip, answer: engine.Answer) -> bool:
    """Do what a refusal asks for; False: the task moved, and is to be visited again."""
    match answer:
        case engine.Settled(generation):
            _go_on_after(trip, generation)
        case engine.Impossible(failure):
            _fail_unclaimed(trip, failure)
        case engine.Undecided():
            return _decide(trip, answer)
        case engine.Void():
            raise Ignore
        case engine.Elsewhere():
            _leave_to_the_other(trip)
            return False
        case MustWait():
            _park(trip, answer)
            return False
    return True


def _decide(trip: Trip, task: engine.Undecided) -> bool:
    """Skip a task, or go on to claim it, as its `when` says; False: it moved meanwhile."""
    try:
        runs = not task.follows_skipped and work.holds(task, _spec(task))
    except ExpressionError as error:
        _fail_unclaimed(trip, Failure("expression_error", str(error)))
        return True
    if runs:
        _insist(lambda tx: engine.decide_task(tx, task.task_id))
        _visit(trip)
        return True
    reason = "upstream_skipped" if task.follows_skipped else "when"
    skipped = _insist(lambda tx: engine.skip_task(tx, task.task_id, reason))
    if skipped is None:
        return False
    process.dispatcher.follow(skipped, task.task_id, task.run_id)
    if trip.visit.generation < skipped.generation or skipped.message is not None:
        raise Ignore
    return True


def _spec(task: Claimed | engine.Undecided) -> TaskSpec:
    return process.definition(task.workflow_id, task.version, _insist).task(task.definition_id)


def _claim(tx: Tx, trip: Trip) -> engine.Answer | None:
    return engine.claim_task(
        tx, trip.visit, worker=trip.worker, lease_seconds=process.settings.lease_seconds
    )


def _insist(statement: Callable[[Tx], T], *, whole: bool = False) -> T:
    """Run statements that are safe to repeat until the database has answered; `whole`: all or none.

    Giving up would lose an outcome; waiting costs a worker slot, and without the database no slot
    is worth anything. Whoever was fenced meanwhile is told so by the statement. Celery's hard limit
    (see `canvas.visit`) bounds the wait in a pool child: its attempt then counts as lost.
    """
    connect = process.database.transaction if whole else process.database.autocommit
    pause = 0.05
    while True:
        try:
            with connect() as tx:
                return statement(tx)
        except (DBAPIError, PoolTimeout) as error:
            if not _is_away(error):
                raise
            log.warning("database.away", error=repr(error)[:300])
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, DATABASE_PATIENCE_SECONDS)


def _is_away(error: DBAPIError | PoolTimeout) -> bool:
    """Tell a database that is away, or busy with itself, from a statement it refuses."""
    if isinstance(error, PoolTimeout) or error.connection_invalidated:
        return True
    code = getattr(error.orig, "pgcode", None)
    return code is None or code[:2] in ("08", "25", "40", "53", "55", "57")


# --- Running ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Items:
    """What a `forEach` is to be expanded into, and how many of them may fail."""

    values: list[Any]
    tolerates: int | None


Result = (
    Completed
    | Failed
    | Busy
    | llm.Undecided
    | remote.Accepted
    | Items
    | engine.Wait
    | work.Start
    | None
)
"""What the work of a visit came to; None: this worker does not have the agent."""


def _run(trip: Trip, claimed: Claimed) -> None:
    """Do the work of a claimed task and record what came of it."""
    with (
        logs.bound(run_id=str(claimed.run_id), attempt=claimed.attempt, agent_id=claimed.agent_id),
        _attempt(claimed) as trip.span,
    ):
        try:
            result = _result(trip, claimed)
            trip.span.came_to(result)
            _record(trip, claimed, result)
        except DBAPIError as error:
            log.exception("attempt.not_recorded")
            _record_failure(trip, claimed, _accident(error))


def _attempt(claimed: Claimed) -> tracing.Span:
    """Return the span of an attempt; the implicit end of a run is none."""
    if claimed.kind == "end":
        return tracing.Span()
    about, parent = tracing.about(claimed.traced), claimed.traceparent
    return tracing.span(f"task {claimed.definition_id}", "consumer", about, parent=parent)


def _record(trip: Trip, claimed: Claimed, result: Result) -> None:
    match result:
        case Completed(output):
            _complete(trip, claimed, output)
        case Failed():
            _record_failure(trip, claimed, result)
        case Items() | engine.Wait() | work.Start():
            _leave(trip, claimed, result)
        case remote.Accepted():
            _await_report(trip, claimed)
        case Busy(retry_after):
            _release(trip, claimed, Reason.AGENT_BUSY, retry_after)
        case llm.Undecided():
            _ask_approval(trip, claimed)
        case None:
            _release(trip, claimed, Reason.AGENT_UNAVAILABLE, None)


def _leave(trip: Trip, claimed: Claimed, result: Items | engine.Wait | work.Start) -> None:
    """Let the task wait, without a worker, for what the result names."""
    match result:
        case Items():
            _expand(trip, claimed, result)
        case engine.Wait():
            _wait(trip, claimed, result)
        case work.Start():
            _start(trip, claimed, result)


def _accident(error: Exception) -> Failed:
    failure = work.accident(error)
    return Failed(failure.code, failure.message)


def _result(trip: Trip, claimed: Claimed) -> Result:
    """Do the work, outside any transaction; an accident of ours is a failure with its own name."""
    try:
        if claimed.kind == "end":
            return Completed(None)
        spec = _spec(claimed)
        if claimed.kind == "for_each" and spec.for_each is not None:
            return _items(claimed, spec, spec.for_each)
        if claimed.kind != "agent":
            return work.finish(claimed, spec) if claimed.expanded else work.begin(claimed, spec)
        return _call(trip, claimed, work.parameters(claimed, spec))
    except ExpressionError as error:
        return Failed("expression_error", str(error), retryable=False)
    except Exception as error:
        log.exception("attempt.broke")
        return _accident(error)


def _items(claimed: Claimed, spec: TaskSpec, each: ForEach) -> Result:
    """Make the items of a `forEach`, or collect what they came to."""
    if claimed.expanded:
        return _gathered(claimed, spec)
    values = work.items(claimed, each.items)
    return Items(values, each.tolerated(len(values))) if values else Completed([])


def _gathered(claimed: Claimed, spec: TaskSpec) -> Completed | Failed:
    """Collect the outputs of a `forEach`'s items."""
    gathered = _insist(lambda tx: engine.item_outputs(tx, claimed.task_id))
    return work.collected(*gathered, spec) if gathered else work.too_much_collected()


def _call(trip: Trip, claimed: Claimed, parameters: dict[str, Any]) -> Result:
    """Call the agent under the lease, outside any transaction; None if it is not loaded here."""
    agent, url = _agent(claimed.agent_id or "")
    if agent is None and url is None:
        log.warning("agent.not_loaded")
        return None
    context = Context(
        run_id=str(claimed.run_id),
        task_id=str(claimed.task_id),
        attempt=claimed.attempt,
        deadline=claimed.deadline_at,
        request_id=claimed.request_id,
        traceparent=tracing.current(),
    )
    process.database.tally.add(tally.CLAIM_TO_START, value=time.monotonic() - trip.claimed_at)
    with process.leases.hold(claimed.task_id, context), trip.patience():
        if agent is not None:
            return _call_here(agent, parameters, context, claimed)
        return process.caller.call(_order(trip, claimed, url or "", parameters))


def _agent(agent_id: str) -> tuple[Agent | None, str | None]:
    """Return the agent, if it works in here, or where one behind HTTP takes work."""
    agent = process.agents.get(agent_id)
    if agent is not None:
        return agent, None
    known = _insist(lambda tx: agents.find(tx, agent_id))
    if known is not None and known.kind == "llm":
        return process.defined_agent(agent_id, _insist), None
    # Without a secret nothing that is sent could be signed.
    can_call = known is not None and process.settings.webhook_secret is not None
    return None, known.contact_endpoint if known is not None and can_call else None


def _call_here(
    agent: Agent, parameters: dict[str, Any], context: Context, claimed: Claimed
) -> agentkit.Outcome | llm.Undecided:
    with tracing.part(f"call {claimed.agent_id}") as span:
        span.set(opscore__agent_id=claimed.agent_id)
        if isinstance(agent, LLMAgent):
            outcome = llm.call(agent, claimed, parameters, context, _insist, process.means)
        else:
            outcome = agentkit.call(agent, parameters, context, claimed.timeout_seconds)
        if not isinstance(outcome, llm.Undecided):
            span.came_to(outcome)
    return outcome


def _order(trip: Trip, claimed: Claimed, url: str, parameters: dict[str, Any]) -> remote.Order:
    return remote.Order(
        url=url,
        payload=parameters,
        task_name=claimed.definition_id,
        run_id=str(claimed.run_id),
        task_id=str(claimed.task_id),
        token=str(trip.visit.token),
        attempt=claimed.attempt,
        deadline=claimed.deadline_at,
        timeout_seconds=min(claimed.timeout_seconds, process.settings.answer_seconds),
        workflow_id=claimed.workflow_id,
        version=claimed.version,
        index=claimed.item_index,
        request_id=claimed.request_id,
        agent_id=claimed.agent_id,
    )


def _await_report(trip: Trip, claimed: Claimed) -> None:
    """Leave the task to the agent that accepted it, unless it has reported meanwhile."""
    message = trip.message()
    recorded = _insist(lambda tx: engine.await_report(tx, claimed, message), whole=True)
    if isinstance(recorded, Parked):
        raise Retry(message=str(Reason.REMOTE))
    _after(trip, claimed, recorded)


def _expand(trip: Trip, claimed: Claimed, items: Items) -> None:
    """Write a task per item and publish their visits; the last to end wakes this one."""
    message = trip.message()
    nodes = _insist(
        lambda tx: engine.expand_task(tx, claimed, items.values, message, items.tolerates)
    )
    if nodes is None:
        return _after_fence(trip, claimed)
    plan = engine.Plan(claimed.run_id, claimed.generation, claimed.request_id, (), tuple(nodes))
    _leave_to(trip, claimed, [plan])


def _leave_to(trip: Trip, claimed: Claimed, plans: list[engine.Plan]) -> None:
    """Publish what the task waits for from now on."""
    for plan in plans:
        process.dispatcher.publish(plan)
    _wake_now(lambda tx: engine.wake_parent(tx, claimed.task_id))
    raise Retry(message=str(Reason.CHILDREN))


def _wait(trip: Trip, claimed: Claimed, wait: engine.Wait) -> None:
    """Leave the task until its moment, or somebody's word, has come."""
    message = trip.message()
    if not _insist(lambda tx: engine.begin_wait(tx, claimed, wait, message)):
        return _after_fence(trip, claimed)
    raise Retry(message=str(wait.reason))


def _start(trip: Trip, claimed: Claimed, start: work.Start) -> None:
    """Start the run of a sub-workflow; its end wakes this task."""
    message, child = trip.message(), start.child

    def begin(tx: Tx) -> list[engine.Plan] | None:
        stored = find_workflow(tx, child.workflow_id, child.version)
        return engine.begin_child(tx, claimed, stored, start.input, message, child.timeout_seconds)

    try:
        plans = _insist(begin, whole=True)
    except OpsCoreError as error:
        return _record_failure(trip, claimed, work.not_begun(error))
    if plans is None:
        return _after_fence(trip, claimed)
    _leave_to(trip, claimed, plans)


def _fenced(trip: Trip) -> None:
    log.warning("attempt.fenced")
    trip.span.set(opscore__outcome="fenced")


def _after_fence(trip: Trip, claimed: Claimed) -> None:
    """Drop what this visit has: the attempt was lost, or the run is ending."""
    _fenced(trip)
    finished = _insist(lambda tx: engine.abandon_attempt(tx, claimed), whole=True)
    if isinstance(finished, Finished):
        process.dispatcher.follow(finished, claimed.task_id, claimed.run_id, wakes=False)
    raise Ignore


# --- Recording ----------------------------------------------------------------------------------


def _complete(trip: Trip, claimed: Claimed, output: Any) -> None:
    """Record success, and the run's output with it if this is its last task."""
    run_output, run_error = None, None
    if claimed.is_sink:
        read = partial(process.definition, claimed.workflow_id, claimed.version, _insist)
        run_output, run_error = work.run_result(claimed, read, output)
    then = None if claimed.is_sink else trip.look_ahead()
    take = None if then is not None else _take_first_in_line(trip, claimed)
    finished = _insist(
        lambda tx: (
            engine.complete_attempt(tx, claimed, output, run_output, run_error, take)
            if then is None
            else _complete_and_claim(tx, trip, claimed, output, then)
        )
    )
    if isinstance(finished, Finished):
        trip.claimed_at = time.monotonic()
        if take is not None and finished.next is not None and finished.next_message is not None:
            trip.go_on_with(finished.next, finished.next_message, take.token)
        else:
            trip.claimed_next = finished.next
    _after(trip, claimed, finished)


def _take_first_in_line(trip: Trip, claimed: Claimed) -> engine.Taker | None:
    """Offer to go on with who waits for the slot that this task frees."""
    within = trip.offer() if claimed.has_slot else None
    if within is None or process.ending.moment:
        return None
    return engine.Taker(uuid4(), within, trip.worker, process.settings.lease_seconds)


def _complete_and_claim(
    tx: Tx, trip: Trip, claimed: Claimed, output: Any, then: Visit
) -> Finished | engine.Fenced:
    return engine.complete_and_claim(
        tx,
        claimed,
        output,
        then,
        worker=trip.worker,
        lease_seconds=process.settings.lease_seconds,
    )


def _record_failure(trip: Trip, claimed: Claimed, failed: Failed) -> None:
    """Record a failure: the task is tried again later, or fails for good."""
    failure = Failure(failed.code, failed.message, failed.traceback, failed.retryable)
    message = trip.message()
    recorded = _insist(
        lambda tx: engine.fail_attempt(
            tx, claimed, failure, delay_seconds=failed.retry_after, message=message
        ),
        whole=True,
    )
    _after(trip, claimed, recorded, failed.message)


def _release(trip: Trip, claimed: Claimed, reason: Reason, retry_after: float | None) -> None:
    """Give the task back: its agent took no work, which is not a failure."""
    message = trip.message()
    recorded = _insist(
        lambda tx: engine.release_attempt(
            tx, claimed, reason, delay_seconds=retry_after, message=message
        ),
        whole=True,
    )
    _after(trip, claimed, recorded)


def _ask_approval(trip: Trip, claimed: Claimed) -> None:
    """Leave the task until somebody has decided a call of its agent."""
    message = trip.message()
    recorded = _insist(lambda tx: engine.ask_approval(tx, claimed, message), whole=True)
    _after(trip, claimed, recorded)


def _after(
    trip: Trip,
    claimed: Claimed,
    recorded: Finished | Parked | engine.Fenced,
    complaint: str = "",
) -> None:
    """Wake whom the outcome concerns, and tell Celery how the canvas goes on."""
    agent_id = claimed.agent_id if claimed.has_slot and not trip.has_taken else None
    match recorded:
        case engine.Fenced():
            _fenced(trip)
            if claimed.agent_id in process.agents:
                raise Ignore
            # An agent behind HTTP may have reported before it answered; then the canvas goes on.
            trip.claimed, trip.visit = None, replace(trip.visit, token=uuid4())
            _visit(trip)
        case Parked():
            if agent_id is not None:
                _wake_now(lambda tx: engine.wake_line(tx, agent_id))
            raise Retry(message="parked")
        case Finished():
            is_old = trip.visit.generation < recorded.generation
            _follow(trip, claimed, recorded, agent_id, is_old)
            if recorded.failed_run:
                raise TaskFailed(complaint)
            if is_old:
                raise Ignore


def _follow(
    trip: Trip, claimed: Claimed, finished: Finished, agent_id: str | None, is_old: bool
) -> None:
    """Do what must follow the commit, if anything; most tasks have nothing to wake.

    In a lane, whose tasks all have the same successors, the last one wakes them for all.
    """
    wakes = trip.wakes or is_old
    parent_id = claimed.parent_id
    if trip.is_followed_by_mate:
        trip.owe(replace(finished, message=None), claimed)
        wakes, parent_id = False, None
    ends = finished.ends_run or finished.frees is not None
    ends = ends or finished.parent_task_id is not None
    if wakes or parent_id or agent_id or ends or finished.message is not None:
        if wakes or parent_id:
            trip.owe_nothing()
        try:
            process.dispatcher.follow(
                finished,
                claimed.task_id,
                claimed.run_id,
                parent_id=parent_id,
                agent_id=agent_id,
                wakes=wakes,
                take=trip.take,
            )
        except SQLAlchemyError:
            # The outcome is recorded, and the next task may be ours already: the keeper wakes.
            log.exception("attempt.not_followed")


# --- Not running --------------------------------------------------------------------------------


def _go_on_after(trip: Trip, generation: int) -> None:
    """Somebody did the task: let this canvas go on, unless a newer one drives the run."""
    if trip.wakes or trip.visit.generation < generation:
        _wake_now(lambda tx: engine.wake_successors(tx, trip.visit.task_id))
    if trip.visit.generation < generation:
        raise Ignore


def _leave_to_the_other(trip: Trip) -> None:
    """Save a newer canvas's visit with the task, unless it ended; a duplicate is dropped."""
    message = trip.message()
    kept = _insist(
        lambda tx: engine.keep_message(tx, trip.visit.task_id, message, trip.visit.generation)
    )
    if kept is False:
        raise Ignore
    if kept:
        raise Retry(message="elsewhere")


def _park(trip: Trip, wait: MustWait) -> None:
    """Put the task to wait, unless it moved meanwhile: then it is visited again."""
    message = trip.message()
    overdue = _insist(
        lambda tx: engine.park_task(
            tx, trip.visit.task_id, wait, message=message, generation=trip.visit.generation
        )
    )
    if overdue is None:
        return
    if overdue:
        _give_up(trip, lambda tx: engine.fail_overdue(tx, trip.visit.task_id))
        raise Ignore
    if wait.reason == Reason.DEPENDENCIES:
        _wake_now(lambda tx: engine.wake_joins(tx, [trip.visit.task_id]))
    elif wait.agent_id is not None:
        agent_id = wait.agent_id
        _wake_now(lambda tx: engine.wake_line(tx, agent_id))
    raise Retry(message=str(wait.reason))


def _give_up(trip: Trip, statement: Callable[[Tx], engine.Gone | None]) -> None:
    """Fail a task that never started, and tell Celery how the canvas goes on."""
    gone = _insist(statement, whole=True)
    if gone is None or gone.finished is None:
        raise Ignore
    process.dispatcher.follow(
        gone.finished, trip.visit.task_id, gone.run_id, parent_id=gone.parent_id
    )
    if gone.finished.failed_run:
        raise TaskFailed
    if trip.visit.generation < gone.finished.generation or gone.finished.message is not None:
        raise Ignore


def _fail_unclaimed(trip: Trip, failure: Failure) -> None:
    fail = partial(engine.fail_unclaimed, task_id=trip.visit.task_id, failure=failure)
    _give_up(trip, fail)


def _wake_now(statement: Callable[[Tx], list[engine.Woken]]) -> None:
    """Wake after our own commit: what we wait for may have come at the same moment."""
    process.dispatcher.wake(_insist(statement))
