"""Calling a function agent under a time limit, and typing what came of it.

`call` never raises for what an agent does, `sys.exit()` included; it does let a worker that is
being ended end. What each outcome means for the task is decided in the engine.

In a process's main thread (a prefork child) an agent is stopped at its limit by SIGALRM, which is
ours while it runs; billiard and Celery leave that signal alone. Code that stays inside one C call
is stopped when that returns. In any other thread Python offers no way to stop code: the agent runs
on to its end, sees `context.cancelled` from the limit on, and its late result counts as a timeout.
"""

import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import FrameType
from typing import Any

from opscore.agentkit.context import MAX_MESSAGE_BYTES, Context, storable_text
from opscore.agentkit.function import AgentFunction, FunctionAgent
from opscore.agentkit.model import ModelError, ModelRefused
from opscore.agentkit.output import Unstorable, to_json
from opscore.errors import AgentBusy, GiveUp, RetryLater

MAX_TRACEBACK_BYTES = 8 * 1024
"""The innermost part is kept."""

ALARM_AGAIN_SECONDS = 1.0
"""An alarm that agent code swallowed (`except:`, a `__del__`) is raised again after this long. Also
how long a cancelled `async def` agent may take to clean up."""

MIN_ALARM_SECONDS = 0.001
"""Zero would disarm the timer, and so would what the kernel rounds to it."""

MAX_RETRY_AFTER_SECONDS = 365 * 86_400.0
"""What an agent asks for beyond this is cut to it."""

_MACHINERY = (__name__, "asyncio.")
"""Modules whose frames lead to the agent's code and say nothing about it."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The agent answered. `output` is JSON that PostgreSQL can store."""

    output: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed. `retry_after` (seconds) is what the agent asked for, if it did.

    `code` is `agent_error`, `timeout`, `retry_later`, `gave_up`, `invalid_output` or
    `output_too_large`, the last three of which are not retryable; or what `loop` and `model` name.
    """

    code: str
    message: str
    traceback: str | None = None
    retryable: bool = True
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Busy:
    """The agent takes no work now. `retry_after` (seconds) is what it asked for, if it did."""

    retry_after: float | None = None


Outcome = Completed | Failed | Busy


class AttemptTimedOut(BaseException):
    """The time limit is over; no Exception, so that an agent's `except Exception` lets it pass."""


def call(
    agent: FunctionAgent, parameters: Mapping[str, Any], context: Context, timeout_seconds: float
) -> Outcome:
    """Run `agent` once and return what came of it.

    An `async def` agent gets an event loop of its own. What an output may hold: see
    `output.to_json`. What comes after the limit, were it an answer, is a timeout: by then the lease
    may be over.

    Raises:
        SystemExit: the worker is being ended; the agent's attempt is not over in any way.
    """
    started = monotonic()
    try:
        output = _run(agent.function, dict(parameters), context, timeout_seconds)
    except AttemptTimedOut:
        return _timed_out(timeout_seconds, context)
    except BaseException as error:
        _let_worker_end(error)
        outcome: Outcome | None = _outcome_of(error)
    else:
        outcome = None
    if monotonic() - started >= timeout_seconds:
        return _timed_out(timeout_seconds, context)
    return outcome or _completed(output)


def _run(
    function: AgentFunction, parameters: dict[str, Any], context: Context, seconds: float
) -> Any:
    if seconds <= 0:
        raise AttemptTimedOut
    if threading.current_thread() is threading.main_thread():
        grace = ALARM_AGAIN_SECONDS if inspect.iscoroutinefunction(function) else 0.0
        with _Alarm(seconds + grace):
            return _guarded(function, parameters, context, seconds)
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        return _guarded(function, parameters, context, seconds)
    finally:
        timer.cancel()


def _guarded(
    function: AgentFunction, parameters: dict[str, Any], context: Context, seconds: float
) -> Any:
    """Hold agent code: an alarm is raised in what runs below this frame, and nowhere else."""
    result = function(parameters, context)
    return _awaited(result, seconds) if inspect.isawaitable(result) else result


def _awaited(awaitable: Awaitable[Any], seconds: float) -> Any:
    import asyncio  # a tenth of a second that a process with plain agents only need not spend

    async def limited() -> Any:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await awaitable
        except TimeoutError:
            if limit.expired():
                raise AttemptTimedOut from None
            raise

    return asyncio.run(limited())


class _Alarm:
    """Raise `AttemptTimedOut` in the guarded code after `seconds`, and again until it has left.

    An alarm that comes while our own code runs, before the agent or after it, raises nothing. An
    alarm around this one (an agent that calls an agent) is shorter or goes on where it was.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    def __enter__(self) -> None:
        self._started = monotonic()
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        self._outer, _ = signal.setitimer(signal.ITIMER_REAL, max(self._seconds, MIN_ALARM_SECONDS))
        if 0 < self._outer < self._seconds:
            signal.setitimer(signal.ITIMER_REAL, self._outer)

    def __exit__(self, *_: object) -> None:
        self._over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler or signal.SIG_DFL)
        if self._outer:
            left = self._outer - (monotonic() - self._started)
            signal.setitimer(signal.ITIMER_REAL, max(left, MIN_ALARM_SECONDS))

    def _ring(self, _signal: int, frame: FrameType | None) -> None:
        if self._over:
            return
        signal.setitimer(signal.ITIMER_REAL, ALARM_AGAIN_SECONDS)
        if _is_guarded(frame):
            raise AttemptTimedOut


def _is_guarded(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _guarded.__code__:
            return True
        frame = frame.f_back
    return False


def _let_worker_end(error: BaseException) -> None:
    """Raise SystemExit if `error` comes from the worker being ended, not from the agent.

    In a prefork child billiard's handler of SIGTERM and SIGQUIT raises SystemExit wherever the
    agent happens to be and sets a flag, which tells it from an agent's own `sys.exit()`; what the
    agent's clean-up made of it does not matter. WorkerShutdown and WorkerTerminate are raised in a
    worker's main process, which runs agents in the solo pool only. Celery's hard
    limit (see `canvas.visit`) kills the child, and nothing here sees it; where an operator sets a
    soft one, SoftTimeLimitExceeded is an Exception like any other: a retryable `agent_error`.
    """
    billiard = sys.modules.get("billiard.common")
    if billiard is not None and billiard.terminate_handler_fired():
        raise error if isinstance(error, SystemExit) else SystemExit(1) from error
    if isinstance(error, SystemExit) and type(error).__module__ == "celery.exceptions":
        raise error


def _timed_out(seconds: float, context: Context) -> Failed:
    context.cancel()  # for what the agent may have left running in threads of its own
    return timed_out(seconds)


def timed_out(seconds: float) -> Failed:
    """Return what came of an agent that was not done within its limit."""
    return Failed("timeout", f"The agent did not finish within {seconds:g} s.")


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, AgentBusy):
        return Busy(_delay(getattr(error, "retry_after", None)))
    if isinstance(error, RetryLater):
        delay = _delay(getattr(error, "seconds", None))
        return Failed(error.code, _message_of(error), retry_after=delay)
    if isinstance(error, GiveUp):
        return Failed(error.code, _message_of(error), retryable=False)
    if isinstance(error, ModelError):
        is_final = isinstance(error, ModelRefused)
        return Failed(error.code, _message_of(error), retryable=not is_final)
    message = f"{type(error).__name__}: {_message_of(error)}".removesuffix(": ")
    return Failed(
        "agent_error", storable_text(message, MAX_MESSAGE_BYTES), traceback=_traceback_of(error)
    )


def _message_of(error: BaseException) -> str:
    return storable_text(error, MAX_MESSAGE_BYTES)


def _delay(seconds: object) -> float | None:
    if not isinstance(seconds, int | float) or seconds != seconds:
        return None
    return float(max(0.0, min(seconds, MAX_RETRY_AFTER_SECONDS)))


def _traceback_of(error: BaseException) -> str:
    """Format where `error` was raised, from the agent's own first line on."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__", "").startswith(_MACHINERY):
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    return storable_text("".join(lines), MAX_TRACEBACK_BYTES, keep="end")


def _completed(output: object) -> Outcome:
    try:
        return Completed(to_json(output))
    except Unstorable as error:
        return Failed(error.code, storable_text(error, MAX_MESSAGE_BYTES), retryable=False)
