"""What an agent behind HTTP says of an attempt it has: its result, and that it is alive.

The attempt's token proves who may say so. An agent that knows no tokens needs
`requireToken: false`; then its id must do.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID

from opscore import engine, tracing, work, workflows
from opscore.agentkit import Busy, Completed, Failed, Outcome
from opscore.db import Tx, tell
from opscore.dispatch import Dispatcher
from opscore.engine import Beat, Claimed, Failure, Fenced, Finished, OpenAttempt, Parked
from opscore.errors import ReportRefused
from opscore.queries import check_task
from opscore.states import Reason


@dataclass(frozen=True, slots=True)
class Reporter:
    """Who says something of a task, and the proof that it is his."""

    task_id: UUID
    agent_id: str | None
    token: UUID | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A result was recorded; `follow` does what it asks for, after the commit."""

    claimed: Claimed
    recorded: Finished | Parked


def accept_result(tx: Tx, reporter: Reporter, outcome: Outcome) -> Accepted | None:
    """End the attempt with what its agent reports; None: it did, with this very result.

    Raises:
        TaskNotFound
        ReportRefused: the attempt is over, or not the reporter's.
    """
    digest = _digest(outcome)
    check_task(tx, reporter.task_id)
    try:
        attempt = _check(engine.open_attempt(tx, reporter.task_id), reporter)
        claimed = attempt.claimed
        engine.lock_run(tx, claimed.run_id)
        with tracing.span(
            f"report {claimed.definition_id}",
            "consumer",
            tracing.about(claimed.traced),
            parent=claimed.traceparent,
        ) as span:
            span.came_to(outcome)
            recorded = _record(tx, claimed, outcome)
        # Of two at once the second finds the attempt ended, as if his own answer had been lost.
        is_first = engine.note_report(tx, claimed, attempt.token, digest)
        if isinstance(recorded, Fenced) or not is_first:
            raise ReportRefused("The attempt ended at this moment.")
    except ReportRefused:
        if engine.is_reported(tx, reporter.task_id, reporter.token, digest):
            return None
        raise
    tell(tx, "attempt.reported", **claimed.ids)
    return Accepted(claimed, recorded)


def accept_heartbeat(tx: Tx, reporter: Reporter) -> Beat:
    """Renew the lease of the attempt an agent is at.

    Raises:
        TaskNotFound
        ReportRefused: the attempt is over, or not the reporter's.
    """
    check_task(tx, reporter.task_id)
    attempt = _check(engine.open_attempt(tx, reporter.task_id), reporter)
    beat = engine.keep_alive(tx, attempt.claimed)
    if beat is None:
        raise ReportRefused("The attempt ended at this moment.")
    return beat


def follow(dispatcher: Dispatcher, accepted: Accepted) -> None:
    """Wake whom a recorded result concerns; must follow its commit."""
    claimed = accepted.claimed
    if isinstance(accepted.recorded, Finished):
        dispatcher.follow(
            accepted.recorded,
            claimed.task_id,
            claimed.run_id,
            parent_id=claimed.parent_id,
            agent_id=claimed.agent_id,
        )
    elif claimed.agent_id is not None:
        dispatcher.wake_line(claimed.agent_id)


def _check(attempt: OpenAttempt | None, reporter: Reporter) -> OpenAttempt:
    """Make sure that the reporter is whom the present attempt was given to."""
    if attempt is None:
        raise ReportRefused("No agent is at this task: the attempt is over.")
    if reporter.token is None and attempt.requires_token:
        raise ReportRefused(
            "Send the opscore_attempt_token that came with the task, or PATCH the agent with"
            " requireToken: false."
        )
    if reporter.token not in (None, attempt.token):
        raise ReportRefused("The token is that of another attempt, which is over.")
    if reporter.token is None and reporter.agent_id is None:
        raise ReportRefused("Say with agentId who reports.")
    if reporter.agent_id not in (None, attempt.claimed.agent_id):
        raise ReportRefused("Another agent has this task.")
    return attempt


def _record(tx: Tx, claimed: Claimed, outcome: Outcome) -> Finished | Parked | Fenced:
    if isinstance(outcome, Busy):
        return engine.release_attempt(
            tx, claimed, Reason.AGENT_BUSY, delay_seconds=outcome.retry_after, message=None
        )
    if isinstance(outcome, Failed):
        failure = Failure(outcome.code, outcome.message, outcome.traceback, outcome.retryable)
        return engine.fail_attempt(
            tx, claimed, failure, delay_seconds=outcome.retry_after, message=None
        )
    run_output, run_error = None, None
    if claimed.is_sink:
        run_output, run_error = work.run_result(
            claimed,
            lambda: workflows.find_workflow(tx, claimed.workflow_id, claimed.version).definition,
            outcome.output,
        )
    return engine.complete_attempt(tx, claimed, outcome.output, run_output, run_error)


def _digest(outcome: Outcome) -> str:
    said: dict[str, Any]
    match outcome:
        case Completed(output):
            said = {"result": output}
        case Failed(code, message):
            said = {"code": code, "message": message}
        case Busy(seconds):
            said = {"busy": seconds}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
