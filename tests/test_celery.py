"""What we lean on in Celery itself, on a real worker and a real Redis, without our engine.

Each canvas is run by a stand-in for the visit that only notes its turn; should a new Celery break
one of these, the engine would still finish every run, but slowly, by rescue.
"""

import json
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.exceptions import Ignore, Retry
from hypothesis import HealthCheck, given, settings
from stack import Servers, stack_environment, wait_until
from test_graph import ancestors, carried_before, graph, graphs, nodes_left, uid

from celeryconfig import celery_settings
from opscore import canvas
from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, Settings
from opscore.graph import Canvas, Node, build


@pytest.fixture(scope="session")
def celery_config(servers: Servers) -> dict[str, Any]:
    # Number 0, which no test is given: this worker lives as long as the session, and would take
    # the visits of a test on the same number.
    environment = stack_environment("postgresql://h/d", servers.redis.url)
    return celery_settings(Settings.from_env(environment))


@pytest.fixture(scope="session")
def celery_worker_parameters() -> dict[str, Any]:
    queues = (AGENTS_QUEUE, CONTROL_QUEUE)
    return {"queues": queues, "perform_ping_check": False, "shutdown_timeout": 30}


class Notes:
    """What the stand-in for the visit saw, and how it shall behave."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self.lock:
            self.visits: list[UUID] = []
            self.parking: set[UUID] = set()
            self.stopping: set[UUID] = set()
            self.parked: dict[UUID, Any] = {}

    def times(self, task: UUID) -> int:
        return self.visits.count(task)


@pytest.fixture(scope="session")
def every_note(celery_session_app: Celery) -> Notes:
    notes = Notes()

    # Not shared: else every app that is made later in this process would have it, too.
    @celery_session_app.task(bind=True, name=canvas.RUN_TASK, shared=False)
    def visit(self: Any, task_id: str, generation: int) -> None:
        task = UUID(task_id)
        with notes.lock:
            if task in notes.parking:
                notes.parking.discard(task)
                notes.parked[task] = json.loads(json.dumps(self.signature_from_request()))
                raise Retry(message="parked")
            notes.visits.append(task)
            if task in notes.stopping:
                raise Ignore

    return notes


@pytest.fixture
def notes(every_note: Notes, celery_session_worker: Any) -> Iterator[Notes]:
    every_note.clear()
    yield every_note


def publish(app: Celery, nodes: list[Node]) -> Canvas:
    drawn = build(nodes)
    for signature in canvas.signatures(app, drawn, nodes, 1, "request"):
        signature.apply_async()
    return drawn


def test_a_diamond_is_visited_in_order(celery_session_app: Celery, notes: Notes) -> None:
    publish(celery_session_app, graph({"a": "", "b": "a", "c": "a", "d": "bc"}))
    wait_until(lambda: list(notes.visits), says=lambda seen: len(seen) == 4)
    assert notes.visits[0] == uid("a") and notes.visits[-1] == uid("d")


@pytest.mark.parametrize("who", "abcd")
def test_a_parked_visit_published_again_goes_on_in_its_place(
    celery_session_app: Celery, notes: Notes, who: str
) -> None:
    """First of a chain, header of a chord, body of a chord: each keeps its place."""
    notes.parking = {uid(who)}
    publish(celery_session_app, graph({"a": "", "b": "a", "c": "a", "d": "bc", "e": "d"}))
    wait_until(lambda: dict(notes.parked), says=lambda parked: uid(who) in parked)
    assert uid("e") not in notes.visits
    message = notes.parked[uid(who)]
    assert message["options"]["headers"]["opscore_request_id"] == "request"
    celery_session_app.signature(message).apply_async()
    wait_until(lambda: list(notes.visits), says=lambda seen: len(seen) == 5)
    assert notes.visits[-2:] == [uid("d"), uid("e")]
    assert all(notes.times(uid(name)) == 1 for name in "abcde")


def test_a_doubled_header_does_not_fire_the_chord_early(
    celery_session_app: Celery, notes: Notes
) -> None:
    notes.parking = {uid("c")}
    publish(celery_session_app, graph({"b": "", "c": "", "d": "bc"}))
    wait_until(lambda: dict(notes.parked), says=bool)
    wait_until(lambda: notes.times(uid("b")), says=bool)
    again = notes.parked[uid("c")]
    notes.parking = {uid("c")}
    celery_session_app.signature(again).apply_async()
    wait_until(lambda: set(notes.parking), says=lambda parking: not parking)
    assert notes.times(uid("d")) == 0
    celery_session_app.signature(again).apply_async()
    wait_until(lambda: notes.times(uid("d")), says=bool)


def test_a_visit_that_is_ignored_stops_its_canvas(celery_session_app: Celery, notes: Notes) -> None:
    notes.stopping = {uid("a")}
    publish(celery_session_app, graph({"a": "", "b": "a"}))
    publish(celery_session_app, graph({"y": "", "z": "y"}))
    wait_until(lambda: notes.times(uid("z")), says=bool)
    assert notes.times(uid("a")) == 1 and notes.times(uid("b")) == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(nodes=graphs(size=20))
def test_whatever_the_graph_its_canvas_visits_each_task_once_behind_ancestors_only(
    celery_session_app: Celery, notes: Notes, nodes: list[Node]
) -> None:
    notes.clear()
    drawn = publish(celery_session_app, nodes)
    expected = {node.id for node in nodes} - set(drawn.beyond)
    wait_until(lambda: set(notes.visits), says=lambda seen: seen == expected)
    assert len(notes.visits) == len(expected)
    carried = carried_before(drawn)
    known = ancestors(nodes)
    for place, task in enumerate(notes.visits):
        assert carried[task] <= set(notes.visits[:place]) and carried[task] <= known[task]
    assert nodes_left(nodes, expected) == [] or drawn.beyond
