"""Traces, sent by OTLP over HTTP: from a request through the visits of its run to the agents.

A run keeps the `traceparent` of its submission, and every attempt at a task of it begins there:
messages carry nothing of it and may be lost. On if the environment names an endpoint
(`OTEL_EXPORTER_OTLP_ENDPOINT`); else nothing is imported, and a span is one object that does
nothing. Never in a span: inputs, outputs, texts of errors, queries of URLs.
"""

import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Self

from opscore import logs

log = logs.get(__name__)

FLUSH_SECONDS = 1.5
"""The longest that the end of a process waits for a collector."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Kind = Literal["internal", "server", "client", "producer", "consumer"]


class Span:
    """A stretch of work, current in its block. This one does nothing: there are no traces."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def rename(self, name: str) -> None:
        """Give it another name."""

    def set(self, **attributes: Any) -> None:
        """Add attributes, in names of which `__` stands for a dot; None is left out."""

    def fail(self, code: str) -> None:
        """Say that the work failed, as `code`."""

    def came_to(self, result: object) -> None:
        """Say what came of it: the kind of the result, and the `code` of one that has one."""


_NOTHING = Span()


class _Recorded(Span):
    """A span that is sent, if its trace is sampled."""

    __slots__ = ("_span", "_token", "_tracing")

    def __init__(self, tracing: "_Tracing", span: Any) -> None:
        self._tracing, self._span = tracing, span

    def __enter__(self) -> Self:
        trace, context = self._tracing.trace, self._tracing.context
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(self, *_: object) -> None:
        self._tracing.context.detach(self._token)
        self._span.end()

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, **attributes: Any) -> None:
        self._span.set_attributes(_given({n.replace("__", "."): v for n, v in attributes.items()}))

    def fail(self, code: str) -> None:
        self._span.set_attribute("error.type", code)
        self._span.set_status(self._tracing.trace.StatusCode.ERROR)

    def came_to(self, result: object) -> None:
        kind = "unavailable" if result is None else type(result).__name__.lower()
        self._span.set_attribute("opscore.outcome", kind)
        if code := getattr(result, "code", None):
            self.fail(code)


class _Tracing:
    """What a process needs to make spans; the thread that sends them starts with the first."""

    def __init__(self, service: str) -> None:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.trace, self.context = trace, context
        self._resource: Any = Resource
        self._provides: Any = TracerProvider
        self._sends: Any = lambda: BatchSpanProcessor(OTLPSpanExporter())
        self._service = service
        self._propagator = TraceContextTextMapPropagator()
        self._kinds = {kind.name.lower(): kind for kind in trace.SpanKind}
        self._lock = threading.Lock()
        self._provider: Any = None
        self._tracer: Any = None

    def forget(self) -> None:
        """Start anew in a child: the parent's thread is not there."""
        self._lock = threading.Lock()
        self._provider = self._tracer = None

    def span(
        self, name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Any]
    ) -> _Recorded:
        within = None if parent is None else self._propagator.extract({"traceparent": parent})
        tracer = self._tracer or self._started()
        span = tracer.start_span(
            name, within, kind=self._kinds[kind], attributes=_given(attributes)
        )
        return _Recorded(self, span)

    def current(self) -> Any:
        """Return the context of the span at hand, or None."""
        context = self.trace.get_current_span().get_span_context()
        return context if context.is_valid else None

    def _started(self) -> Any:
        with self._lock:
            if self._tracer is None:
                # At the interpreter's end it would wait for a collector; `stop` does not for long.
                resource = self._resource.create(self._about_us())
                self._provider = self._provides(resource=resource, shutdown_on_exit=False)
                self._provider.add_span_processor(self._sends())
                self._tracer = self._provider.get_tracer("opscore")
                self._offer()
        return self._tracer

    def _offer(self) -> None:
        """Have spans that agents make themselves sent, too, unless they see to that."""
        if isinstance(self.trace.get_tracer_provider(), self.trace.ProxyTracerProvider):
            self.trace.set_tracer_provider(self._provider)

    def _about_us(self) -> dict[str, str]:
        about = {"service.instance.id": f"{socket.gethostname()}:{os.getpid()}"}
        given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in given:
            about["service.name"] = self._service
        return about

    def stop(self) -> None:
        provider, self._provider = self._provider, None
        if provider is not None:
            # Its own limits are for each try, and it tries again.
            ending = threading.Thread(target=provider.shutdown, name="opscore-spans", daemon=True)
            ending.start()
            ending.join(FLUSH_SECONDS)


_tracing: _Tracing | None = None


def start(service: str) -> None:
    """Have this process and its children make spans, if the environment wants any.

    `service` is its name unless `OTEL_SERVICE_NAME` says another. Starts no thread.
    """
    global _tracing
    if _tracing is not None or not _is_wanted():
        return
    try:
        _tracing = _Tracing(service)
    except ImportError as error:
        log.warning("traces.not_installed", error=repr(error)[:300], way="opscore[otel]")
        return
    os.register_at_fork(after_in_child=_tracing.forget)


def _is_wanted() -> bool:
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not is_disabled and any(os.environ.get(name) for name in _ENDPOINTS)


def stop() -> None:
    """Send what was not sent yet, in `FLUSH_SECONDS` at most; then make no more spans."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is not None:
        with suppress(RuntimeError):  # no thread starts any more
            tracing.stop()


def span(
    name: str,
    kind: Kind = "internal",
    attributes: Mapping[str, Any] | None = None,
    *,
    parent: str | None = None,
) -> Span:
    """Return a span to be entered, below the one at hand or below `parent`, a traceparent.

    What is no traceparent, or none at all, begins a trace. Attributes that are None are left out.
    """
    return _NOTHING if _tracing is None else _tracing.span(name, kind, parent, attributes or {})


def part(name: str, kind: Kind = "internal", attributes: Mapping[str, Any] | None = None) -> Span:
    """Return a span below the one at hand; without one, nothing: it begins no trace."""
    return (
        _NOTHING if _tracing is None or _tracing.current() is None else span(name, kind, attributes)
    )


def current() -> str | None:
    """Return the span at hand as a traceparent (W3C Trace Context), if there is one."""
    found = None if _tracing is None else _tracing.current()
    if found is None:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def about(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our own attributes: their names begin with `opscore.`."""
    return {f"opscore.{name}": value for name, value in fields.items()}


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
