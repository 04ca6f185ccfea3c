"""Sending visits: what a broker that is away may cost, and what rescue publishes again."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from sqlalchemy.exc import TimeoutError as PoolTimeout
from stack import stack_environment, wait_until
from test_engine import Desk, agent, task

from celeryconfig import make_app
from opscore import agents, canvas, dispatch, engine
from opscore.config import AGENTS_QUEUE, FIRST, SERVED_FIRST, Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.engine import Failure
from opscore.errors import Unavailable
from opscore.servers import RedisServer
from opscore.states import Reason
from workers import consumer


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


@pytest.fixture(scope="module")
def broker() -> Iterator[RedisServer]:
    """A Redis of its own, to be stopped and frozen."""
    with RedisServer.temporary() as server:
        yield server


@pytest.fixture
def dispatcher(
    broker: RedisServer, database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Dispatcher:
    monkeypatch.setattr(dispatch, "IN_HAND_SECONDS", 0.0)
    with Redis.from_url(broker.url) as redis:
        redis.flushall()
    settings = Settings.from_env(stack_environment(database_url, broker.url))
    return Dispatcher(make_app(settings), database, settings)


def visits(broker: RedisServer, *queues: str) -> list[dict[str, Any]]:
    """Return what lies in the queues, the next to be served last."""
    with Redis.from_url(broker.url) as redis:
        entries: list[Any] = []
        for queue in queues or (AGENTS_QUEUE, SERVED_FIRST[0]):
            entries += redis.lrange(queue, 0, -1)
        return [json.loads(message) for message in entries]


def test_a_message_carries_ids_and_nothing_of_input_or_output(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    plan = desk.submit(task("a", parameters={"p": "secret parameter"}), input={"x": "secret input"})
    assert dispatcher.publish(plan)
    (message,) = visits(broker)
    assert message["headers"]["id"] == str(desk.id("a"))
    assert message["headers"]["argsrepr"] == f"('{desk.id('a')}', 1)"
    assert "secret" not in json.dumps(message)


def test_a_broker_that_is_away_costs_a_moment_and_no_run(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BREAKER_SECONDS", 0.2)
    plan = desk.submit(task("a"))
    broker.stop()
    try:
        began = time.monotonic()
        assert dispatcher.publish(plan) is False
        assert time.monotonic() - began < 2
        assert not dispatcher.is_reachable()
        with pytest.raises(Unavailable):
            dispatcher.ping()
        for _ in range(3):
            assert dispatcher.republish(plan.run_id, 1) is False
        assert desk.run().generation == 1, "no generation is raised for nothing"
    finally:
        broker.start()
    age(desk)
    wait_until(lambda: dispatcher.is_reachable())
    dispatcher.rescue()
    assert len(visits(broker)) == 1 and desk.run().generation == 2


def age(desk: Desk, seconds: int = 30) -> None:
    """Let the runs and tasks of the desk have been there for a while."""
    for table, columns in (("runs", ("created_at", "generation_at")), ("tasks", ("created_at",))):
        moved = ", ".join(f"{c} = {c} - make_interval(secs => {seconds})" for c in columns)
        desk.alter(f"UPDATE {table} SET {moved}")


def test_rescue_leaves_alone_what_merely_waits_its_turn(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    for _ in range(5):
        dispatcher.publish(desk.submit(task("a")))
    age(desk)
    dispatcher.rescue()
    assert len(visits(broker)) == 5
    assert desk.rows("SELECT max(generation) AS g FROM runs")[0].g == 1


def test_rescue_publishes_again_what_an_emptied_redis_forgot(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    dispatcher.publish(desk.submit(task("a")))
    with Redis.from_url(broker.url) as redis:
        redis.flushall()
    dispatcher.rescue()
    assert visits(broker) == [], "too early to tell"
    age(desk)
    dispatcher.rescue()
    assert len(visits(broker)) == 1


def test_a_visit_that_a_later_run_overtook_is_lost_though_the_queue_is_full(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    forgotten = desk.submit(task("a"))
    age(desk)
    dispatcher.publish(desk.submit(task("a")))
    desk.claim("a")
    dispatcher.publish(desk.submit(task("a")))
    dispatcher.rescue()
    generations = desk.rows("SELECT id, generation FROM runs")
    assert {r.generation for r in generations if r.id == forgotten.run_id} == {2}
    assert {r.generation for r in generations if r.id != forgotten.run_id} == {1}


def test_a_visit_that_left_its_queue_just_now_may_be_in_a_workers_hands(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "IN_HAND_SECONDS", 0.3)
    desk.submit(task("a"))
    age(desk)
    dispatcher.rescue()
    assert visits(broker) == []
    wait_until(lambda: dispatcher.rescue() or visits(broker))
    assert len(visits(broker)) == 1


def test_a_visit_that_waits_for_a_day_behind_others_is_late_and_not_lost(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    for _ in range(3):
        dispatcher.publish(desk.submit(task("a")))
    age(desk, 86_400)
    dispatcher.rescue()
    assert len(visits(broker)) == 3


def test_what_a_segment_carries_is_not_taken_for_forgotten(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    desk.submit(*(task(f"t{n}") for n in range(60)))
    dispatcher.publish(desk.plan)
    desk.alter(
        "UPDATE tasks SET status = 'completed', started_at = now(), finished_at = now()"
        " WHERE position < 26"
    )
    with desk.database.autocommit() as tx:
        dispatcher.wake(engine.wake_forgotten(tx))
    assert len(visits(broker)) == 2, "the first canvas and one segment"
    desk.complete(desk.claim("t26"))
    with desk.database.autocommit() as tx:
        assert engine.wake_forgotten(tx) == [], "its visit is on its way"


def test_a_wake_that_was_lost_is_repeated_and_one_that_is_late_is_not(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    desk.submit(task("a"))
    signature = canvas.visit(dispatcher.app, desk.id("a"), 1, timeout_seconds=60)
    with desk.tx() as tx:
        engine.fail_attempt(
            tx, desk.claim("a"), Failure("x", "x"), delay_seconds=0, message=dict(signature)
        )
        dispatcher.wake(engine.wake_due(tx, 10).woken)
    assert len(visits(broker)) == 1
    desk.alter("UPDATE tasks SET woken_at = now() - interval '30 s'")
    age(desk)
    dispatcher.rescue()
    assert len(visits(broker)) == 1, "it lies in the queue and merely waits its turn"
    with Redis.from_url(broker.url) as redis:
        redis.flushall()
    dispatcher.rescue()
    assert len(visits(broker)) == 1
    dispatcher.rescue()
    assert len(visits(broker)) == 1, "it was sent a moment ago"


def test_visits_of_the_highest_priority_are_served_before_others_in_their_order(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    desk.submit(*(task(name, dependsOn=[]) for name in "abcd"))
    messages = [
        dict(canvas.visit(dispatcher.app, desk.id(name), 1, timeout_seconds=60)) for name in "abcd"
    ]
    dispatcher.send(messages[3:])
    assert dispatcher.send(messages[:3], priority=FIRST)
    app = dispatcher.app
    with app.connection_for_read() as connection:
        connection.transport.Channel = consumer.Channel
        queue = app.amqp.queues[AGENTS_QUEUE](connection.default_channel)
        served: list[str] = []
        with connection.Consumer([queue], callbacks=[lambda _, m: served.append(m.headers["id"])]):
            while len(served) < 4:
                connection.drain_events(timeout=5)
    assert served == [str(desk.id(name)) for name in "abcd"]


def busy_pair(desk: Desk, dispatcher: Dispatcher) -> Any:
    """Return the claim of a task for whose slot another waits."""
    desk.submit(*(task(name, "single", dependsOn=[]) for name in "ab"))
    held = desk.claim("a")
    message = dict(canvas.visit(dispatcher.app, desk.id("b"), 1, timeout_seconds=60))
    wait = desk.claim("b")
    with desk.database.autocommit() as tx:
        engine.park_task(tx, desk.id("b"), wait, message=message, generation=1)
    return held


def test_who_was_handed_a_slot_is_sent_though_the_database_goes_away_then(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = busy_pair(desk, dispatcher)
    finished = desk.complete(held)

    def fail(*_: Any) -> None:
        raise PoolTimeout("no connection")

    monkeypatch.setattr(engine, "wake_successors", fail)
    with pytest.raises(PoolTimeout):
        dispatcher.follow(finished, held.task_id, held.run_id, agent_id="single")
    assert [visit["headers"]["id"] for visit in visits(broker)] == [str(desk.id("b"))]


def test_a_lost_wake_for_a_slot_is_repeated_however_long_the_queue_is(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    held = busy_pair(desk, dispatcher)
    plan = desk.plan
    desk.submit(task("long-ago"))
    age(desk, 3600)
    dispatcher.send([canvas.visit(dispatcher.app, desk.id("long-ago"), 1, timeout_seconds=60)])
    desk.plan = plan
    (woken,) = desk.complete(held).woken
    desk.alter(
        "UPDATE tasks SET waiting_since = now() - interval '40 s',"
        " woken_at = now() - interval '30 s' WHERE woken_at IS NOT NULL"
    )
    dispatcher.wake([woken])
    dispatcher.rescue()
    assert len(visits(broker)) == 2, "it waits at the front, for a worker that has time"
    with Redis.from_url(broker.url) as redis:
        redis.rpop(SERVED_FIRST[0])
    dispatcher.rescue()
    dispatcher.rescue()
    assert [visit["headers"]["id"] for visit in visits(broker)][1:] == [str(woken.task_id)]


def test_who_is_served_first_hides_no_lost_visit_of_the_others(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    held = busy_pair(desk, dispatcher)
    (woken,) = desk.complete(held).woken
    desk.alter("UPDATE tasks SET waiting_since = now() - interval '2 h' WHERE woken_at IS NOT NULL")
    dispatcher.wake([woken])
    lost = desk.submit(task("lost"))
    age(desk, 3600)
    dispatcher.rescue()
    dispatcher.rescue()
    assert desk.rows("SELECT generation FROM runs WHERE id = :run", run=lost.run_id)[0][0] == 2
    assert len(visits(broker, SERVED_FIRST[0])) == 1


def crowd(desk: Desk, dispatcher: Dispatcher, count: int) -> None:
    """Have `count` tasks woken for as many slots, and no worker for any of them."""
    with desk.tx() as tx:
        agents.register_functions(tx, [agent("wide", count)])
    desk.submit(*(task(f"t{n}", "wide", dependsOn=[]) for n in range(count)))
    for number in range(count):
        message = dict(canvas.visit(dispatcher.app, desk.id(f"t{number}"), 1, timeout_seconds=60))
        with desk.database.autocommit() as tx:
            wait = engine.MustWait(Reason.AGENT_BUSY, "wide")
            engine.park_task(tx, desk.id(f"t{number}"), wait, message=message, generation=1)
    with desk.database.autocommit() as tx:
        while woken := engine.wake_line(tx, "wide"):
            dispatcher.wake(woken)


def test_however_many_wait_to_be_served_first_nobody_is_taken_for_lost(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        dispatcher.publish(desk.submit(task("behind")))
    age(desk, 3600)
    crowd(desk, dispatcher, 260)
    before = len(visits(broker))
    for most in (5000, 100):
        monkeypatch.setattr(dispatch, "MOST_FIRST", most)
        for _ in range(3):
            desk.alter("UPDATE tasks SET woken_at = woken_at - interval '11 s'")
            dispatcher.rescue()
        assert len(visits(broker)) == before
    desk.alter("UPDATE tasks SET woken_at = woken_at - interval '11 min'")
    with Redis.from_url(broker.url) as redis:
        redis.ltrim(SERVED_FIRST[0], 0, 199)
    dispatcher.rescue()
    assert len(visits(broker)) > before, "who is too many to be told apart is judged by age"


def test_a_lost_attempt_brings_its_run_under_a_new_generation(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    desk.submit(task("a"), task("b"))
    desk.claim("a")
    desk.alter("UPDATE tasks SET lease_expires_at = now() - interval '1 s' WHERE attempt = 1")
    with desk.tx() as tx:
        (expired,) = engine.expired_attempts(tx, 10)
        engine.lose_attempt(tx, expired, 3)
    with desk.database.autocommit() as tx:
        due = engine.wake_due(tx, 10)
    assert dispatcher.wake(due.woken)
    (message,) = visits(broker)
    assert message["headers"]["argsrepr"].endswith("2)") and desk.run().generation == 2


def test_a_frozen_broker_does_not_hang_a_submission(
    desk: Desk, dispatcher: Dispatcher, broker: RedisServer
) -> None:
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert dispatcher.publish(desk.submit(task("a"))) is False
        assert dispatcher.publish(desk.submit(task("a"))) is False, "the breaker spares the wait"
        assert time.monotonic() - began < 8
    finally:
        os.kill(broker.pid, signal.SIGCONT)
