"""Agents for the tests: each does one small thing."""

import asyncio
import os
import threading
from typing import Any

from opscore import AgentBusy, Context, GiveUp, RetryLater, agent

Parameters = dict[str, Any]


@agent("echo", capabilities=["echo"])
def echo(parameters: Parameters, context: Context) -> Any:
    return parameters


@agent("value", capabilities=["value"])
def value(parameters: Parameters, context: Context) -> Any:
    return parameters.get("value")


@agent("async-echo")
async def async_echo(parameters: Parameters, context: Context) -> Any:
    await asyncio.sleep(0)
    context.log("echoing", size=len(parameters))
    context.progress(0.5, "half way")
    return parameters


@agent("nap")
def nap(parameters: Parameters, context: Context) -> Any:
    threading.Event().wait(parameters.get("seconds", 0.05))
    return {"pid": os.getpid()}


@agent("one-at-a-time", capacity=1)
def one_at_a_time(parameters: Parameters, context: Context) -> Any:
    threading.Event().wait(parameters.get("seconds", 0.05))
    return parameters.get("value")


@agent("slow-at-first", capacity=1)
def slow_at_first(parameters: Parameters, context: Context) -> Any:
    threading.Event().wait(60 if context.attempt == 1 else 0)
    return context.attempt


@agent("fails-until")
def fails_until(parameters: Parameters, context: Context) -> Any:
    if context.attempt < parameters["attempt"]:
        raise ValueError(f"attempt {context.attempt} is too early")
    return context.attempt


@agent("fails-when-told")
def fails_when_told(parameters: Parameters, context: Context) -> Any:
    if parameters["fails"]:
        raise ValueError("it was told to")
    return parameters["value"]


@agent("broken")
def broken(parameters: Parameters, context: Context) -> Any:
    raise ValueError("it always does")


@agent("asks-later")
def asks_later(parameters: Parameters, context: Context) -> Any:
    if context.attempt == 1:
        raise RetryLater(parameters.get("seconds", 0.2))
    return context.attempt


@agent("says-busy")
def says_busy(parameters: Parameters, context: Context) -> Any:
    if context.attempt <= parameters["times"]:
        raise AgentBusy(retry_after=0.1)
    return context.attempt


@agent("busy-writer", capacity=2)
def busy_writer(parameters: Parameters, context: Context) -> Any:
    """Take no work at first, though a slot is free."""
    if context.attempt == 1:
        raise AgentBusy(retry_after=parameters["seconds"])
    return context.attempt


@agent("gives-up")
def gives_up(parameters: Parameters, context: Context) -> Any:
    raise GiveUp("there is nothing to be done")


@agent("until-told")
def until_told(parameters: Parameters, context: Context) -> Any:
    """Wait until the run is cancelled, at most 30 s."""
    for _ in range(300):
        if context.cancelled:
            return "told"
        threading.Event().wait(0.1)
    return "not told"


@agent("too-slow")
def too_slow(parameters: Parameters, context: Context) -> Any:
    threading.Event().wait(60)


@agent("kills-worker")
def kills_worker(parameters: Parameters, context: Context) -> Any:
    if context.attempt <= parameters.get("times", 99):
        os.kill(os.getpid(), 9)
    return context.attempt


@agent("sized")
def sized(parameters: Parameters, context: Context) -> Any:
    """Return text of so many bytes as JSON."""
    return "x" * (parameters["size"] - 2)
