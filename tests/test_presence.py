"""Workers say that they live, and their rows tell when they no longer do."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text
from stack import Servers, Stack, running_stack, wait_until

from opscore import presence
from opscore.config import QUEUES, installed_version
from opscore.db import Database
from opscore.presence import DEAD_SECONDS, FORGET_SECONDS, Presence


@pytest.fixture
def stack(servers: Servers, tmp_path: Path) -> Iterator[Stack]:
    with running_stack(servers, tmp_path / "log", OPSCORE_KEEPER_SECONDS="0.1") as stack:
        yield stack


def live(database: Database) -> list[dict[str, object]]:
    with database.autocommit() as tx:
        return presence.live(tx)


def age(database: Database, seconds: float) -> None:
    with database.transaction() as tx:
        tx.execute(
            text("UPDATE workers SET seen_at = seen_at - make_interval(secs => :seconds)"),
            {"seconds": seconds},
        )


def worker(name: str = "w@host") -> Presence:
    return Presence(uuid4(), name, "host", 7, "prefork", 2, ["opscore.io"], None)


def test_a_worker_says_what_it_is_until_it_is_stopped(stack: Stack) -> None:
    process = stack.start_worker(concurrency=3, pool="threads")
    (said,) = wait_until(lambda: live(stack.database))
    assert said["name"] == f"worker-{process.pid}@{socket.gethostname()}"
    assert (said["host"], said["pid"]) == (socket.gethostname(), process.pid)
    assert (said["pool"], said["concurrency"]) == ("threads", 3)
    assert said["queues"] == sorted(QUEUES)
    assert said["version"] == installed_version()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert stack.rows("SELECT * FROM workers") == []


def test_a_worker_that_is_frozen_is_taken_for_dead_and_is_there_again_when_it_goes_on(
    stack: Stack,
) -> None:
    process = stack.start_worker()
    wait_until(lambda: live(stack.database))
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        age(stack.database, DEAD_SECONDS)
        assert live(stack.database) == []
    finally:
        os.killpg(process.pid, signal.SIGCONT)
    (said,) = wait_until(lambda: live(stack.database))
    assert (said["pool"], said["pid"]) == ("prefork", process.pid)


def test_who_is_killed_is_dead_after_a_while_and_forgotten_later(database: Database) -> None:
    first, second = worker("a@host"), worker("b@host")
    with database.transaction() as tx:
        presence.say(tx, first)
        presence.say(tx, second)
    age(database, DEAD_SECONDS + 1)
    with database.transaction() as tx:
        presence.say(tx, second)
    assert [said["name"] for said in live(database)] == ["b@host"]
    age(database, FORGET_SECONDS - DEAD_SECONDS)
    with database.transaction() as tx:
        presence.forget(tx)
        left = tx.execute(text("SELECT name FROM workers")).scalars().all()
    assert left == ["b@host"]


def test_two_workers_of_one_name_are_two(database: Database) -> None:
    one, other = worker(), worker()
    with database.transaction() as tx:
        for said in (one, other, one):
            presence.say(tx, said)
    assert len(live(database)) == 2
    with database.transaction() as tx:
        presence.leave(tx, one.id)
    assert len(live(database)) == 1
