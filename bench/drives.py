"""How a workload is driven, and the figures only that way of driving gives."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from bench.contenders import OpsCore, Session
from bench.http_client import HttpClient
from bench.measure import percentile
from bench.workloads import Drive

BURST_PAUSE_SECONDS = 0.02
SINGLE_PAUSE_SECONDS = 0.0005
HTTP_CLIENTS = 8
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Driven:
    """`seconds` go from the first submission until the last run was seen to be over."""

    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


def drive(session: Session) -> Driven:
    """Run the session's workload and wait until all of it is over."""
    return _DRIVES[session.workload.drive](session)


def _burst(session: Session) -> Driven:
    """Submit as fast as one client can."""
    began = time.perf_counter()
    runs = [session.submit() for _ in range(session.workload.runs)]
    submitting = time.perf_counter() - began
    session.wait(runs, pause=BURST_PAUSE_SECONDS)
    seconds = time.perf_counter() - began
    figures = {"submitted_per_s": len(runs) / submitting}
    if ideal := session.workload.ideal_seconds_per_task * session.workload.tasks:
        figures["makespan_over_ideal"] = seconds / ideal
    if session.workload.capacity:
        assert isinstance(session, OpsCore)
        gaps = session.freed_to_next(session.workload.capacity)
        figures["freed_to_next_p95_ms"] = percentile(gaps, 95) * 1000
    return Driven(seconds, figures)


def _one_by_one(session: Session) -> Driven:
    """Submit a run when the one before it is over, and time each."""
    began = time.perf_counter()
    took = []
    for _ in range(session.workload.runs):
        submitted = time.perf_counter()
        session.wait([session.submit()], pause=SINGLE_PAUSE_SECONDS)
        took.append(time.perf_counter() - submitted)
    return Driven(time.perf_counter() - began, _milliseconds("", took))


def _over_http(session: Session) -> Driven:
    """Submit from several clients at once, each its next as soon as the last is answered."""
    assert isinstance(session, OpsCore)
    shares = [len(range(n, session.workload.runs, HTTP_CLIENTS)) for n in range(HTTP_CLIENTS)]
    with ThreadPoolExecutor(HTTP_CLIENTS) as pool:
        began = time.perf_counter()
        answers = list(chain(*pool.map(lambda share: _submit_all(session, share), shares)))
        submitting = time.perf_counter() - began
        session.wait([run for run, _ in answers], pause=BURST_PAUSE_SECONDS)
        seconds = time.perf_counter() - began
    figures = {"submitted_per_s": len(answers) / submitting, "completed_s": seconds}
    return Driven(seconds, figures | _milliseconds("post_", [took for _, took in answers]))


def _submit_all(session: OpsCore, count: int) -> list[tuple[str, float]]:
    with HttpClient(session.port, session.api_key) as client:
        return [client.submit(session.workflow_id) for _ in range(count)]


def _milliseconds(prefix: str, seconds: list[float]) -> dict[str, float]:
    return {f"{prefix}p{p}_ms": percentile(seconds, p) * 1000 for p in PERCENTILES}


_DRIVES: dict[Drive, Callable[[Session], Driven]] = {
    "burst": _burst,
    "one by one": _one_by_one,
    "http": _over_http,
}
