"""Asking models: again after a while, then the next one.

A provider that wants to be left alone for longer than a moment is not waited for here: the task
parks as busy, without a worker.
"""

import asyncio
import random
from collections.abc import Callable, Sequence

from opscore.agentkit.model import (
    Model,
    ModelAway,
    ModelBusy,
    ModelError,
    ModelRefused,
    Reply,
    Request,
)
from opscore.errors import AgentBusy

TRIES = 3
"""Of one model, for one reply."""
BACKOFF_SECONDS = 0.5
"""Before the second try; doubled for each after it, with full jitter."""
PATIENCE_SECONDS = 3.0
"""A provider that asks for more than this is not waited for."""
GRACE_SECONDS = 2.0
"""A model's own client ends a call that takes too long; if it does not, it is ended from here."""

Pause = Callable[[float], "asyncio.Future[None]"]


async def ask(models: Sequence[Model], request: Request) -> Reply:
    """Return the reply of the first model that gives one.

    Raises:
        AgentBusy: all that gave none are rate limited; when the first of them may be asked again.
        ModelError: the first model's, if that is not busy; else the worst of the others'.
    """
    errors: list[ModelError] = []
    for model in models:
        try:
            return await _insist(model, request)
        except ModelError as error:
            errors.append(error)
    busy = [error for error in errors if isinstance(error, ModelBusy)]
    if len(busy) == len(errors):
        known = [error.retry_after for error in busy if error.retry_after is not None]
        raise AgentBusy(min(known, default=None)) from busy[0]
    raise next(error for error in errors if not isinstance(error, ModelBusy))


async def _insist(model: Model, request: Request) -> Reply:
    for number in range(1, TRIES + 1):
        try:
            return await _once(model, request)
        except ModelRefused:
            raise
        except ModelError as error:
            pause = _pause(error, number)
            if number == TRIES or pause > PATIENCE_SECONDS:
                raise
            await asyncio.sleep(pause)
    raise AssertionError("unreachable")


def _pause(error: ModelError, number: int) -> float:
    asked = error.retry_after if isinstance(error, ModelBusy) else None
    backoff: float = random.uniform(0.5, 1) * BACKOFF_SECONDS * 2 ** (number - 1)
    return backoff if asked is None else max(asked, 0.0)


async def _once(model: Model, request: Request) -> Reply:
    try:
        async with asyncio.timeout(request.timeout_seconds + GRACE_SECONDS):
            return await model.complete(request)
    except TimeoutError:
        sentence = f"{model.name} did not answer within {request.timeout_seconds:g} s."
        raise ModelAway(sentence) from None
