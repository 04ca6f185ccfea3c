"""Agents for the tests of traces and request ids: they say by what they are followed."""

import threading
from typing import Any

from opentelemetry import trace

from opscore import AgentBusy, Context, GiveUp, agent

Parameters = dict[str, Any]


@agent("tells")
def tells(parameters: Parameters, context: Context) -> Any:
    with trace.get_tracer("an agent").start_as_current_span("its own"):
        return {"requestId": context.request_id, "traceparent": context.traceparent}


@agent("async-tells")
async def async_tells(parameters: Parameters, context: Context) -> Any:
    with trace.get_tracer("an agent").start_as_current_span("its own, too"):
        return context.request_id


@agent("one-at-a-time", capacity=1)
def one_at_a_time(parameters: Parameters, context: Context) -> Any:
    threading.Event().wait(parameters.get("seconds", 0))


@agent("says-busy")
def says_busy(parameters: Parameters, context: Context) -> Any:
    if context.attempt == 1:
        raise AgentBusy(retry_after=0.1)


@agent("gives-up")
def gives_up(parameters: Parameters, context: Context) -> Any:
    raise GiveUp(f"nothing can be done about {parameters['secret']}")
