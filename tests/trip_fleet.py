"""Agents for the tests of trips: they tell where they ran, and wait for what the test says."""

import os
import threading
import time
from pathlib import Path
from typing import Any

from opscore import AgentBusy, Context, GiveUp, RetryLater, agent

Parameters = dict[str, Any]


def _here(parameters: Parameters, context: Context) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "thread": threading.get_ident(),
        "attempt": context.attempt,
        "value": parameters.get("value"),
    }


def _wait(parameters: Parameters) -> None:
    """Sleep, or wait until the file `gate` is there, at most 20 s."""
    threading.Event().wait(parameters.get("seconds", 0))
    if parameters.get("reached"):
        Path(parameters["reached"]).touch()
    if parameters.get("gate"):
        until = time.monotonic() + 20
        while not Path(parameters["gate"]).exists() and time.monotonic() < until:
            threading.Event().wait(0.01)


@agent("where", capabilities=["where"])
def where(parameters: Parameters, context: Context) -> Any:
    _wait(parameters)
    return _here(parameters, context)


@agent("where-one", capacity=1)
def where_one(parameters: Parameters, context: Context) -> Any:
    _wait(parameters)
    return _here(parameters, context)


@agent("where-two", capacity=2)
def where_two(parameters: Parameters, context: Context) -> Any:
    _wait(parameters)
    return _here(parameters, context)


@agent("later-once")
def later_once(parameters: Parameters, context: Context) -> Any:
    """Ask to be tried again, the first time, if told to."""
    if context.attempt == 1 and parameters.get("later", True):
        raise RetryLater(parameters.get("seconds", 0.1))
    return _here(parameters, context)


@agent("busy-once")
def busy_once(parameters: Parameters, context: Context) -> Any:
    if context.attempt == 1 and parameters.get("busy", True):
        raise AgentBusy(retry_after=0.1)
    return _here(parameters, context)


@agent("fails-if")
def fails_if(parameters: Parameters, context: Context) -> Any:
    if parameters.get("fails"):
        raise GiveUp("told to")
    _wait(parameters)
    return _here(parameters, context)


@agent("dies-once")
def dies_once(parameters: Parameters, context: Context) -> Any:
    if context.attempt == 1 and parameters.get("dies"):
        os.kill(os.getpid(), 9)
    return _here(parameters, context)


@agent("spoils")
def spoils(parameters: Parameters, context: Context) -> Any:
    """Change what it was handed, as careless code does."""
    parameters["box"]["list"].append("spoiled")
    return len(parameters["box"]["list"])
