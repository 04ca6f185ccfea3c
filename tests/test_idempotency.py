"""Requests that start runs, sent again: with the same Idempotency-Key none starts another."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from http_client import Client, open_client, problem
from redis import Redis
from rows import add_agent, add_run
from sqlalchemy import text
from stack import wait_until

from opscore import idempotency
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from workers.keeper import LIMIT, TIDY_EVERY, Round

DEFINITION = {
    "id": "report",
    "inputSchema": {"type": "object", "required": ["topic"]},
    "tasks": [{"taskId": "write", "agentId": "writer"}],
}
INLINE = {"id": "inline", "tasks": [{"taskId": "write"}]}
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "run": ("/runs", {"workflowId": "report", "input": {"topic": "queues"}}),
    "trigger": (
        "/agent/writer/workflow",
        {"workflowDefinitionId": "report", "initialPayload": {"topic": "queues"}},
    ),
    "inline": ("/agent/writer/workflow", {"workflowDefinition": INLINE}),
    "task": ("/tasks", {"taskType": "agent_run", "agentId": "writer", "inputData": {"n": 1}}),
}
RUN, BODY = STARTS["run"]


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        client.post("/workflows", DEFINITION)
        with client.database.transaction() as tx:
            add_agent(tx, "writer", "write")
            add_agent(tx, "reader")
        yield client


def post(client: Client, path: str = RUN, body: Any = BODY, key: str | None = None) -> Any:
    return client.post(path, body, headers={} if key is None else {"Idempotency-Key": key})


def count(client: Client, table: str) -> int:
    with client.database.autocommit() as tx:
        found: int = tx.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
        return found


def do(client: Client, statement: str) -> None:
    with client.database.transaction() as tx:
        tx.execute(text(statement))


def sent(settings: Settings) -> int:
    """Count the visits in the queues."""
    with Redis.from_url(settings.redis_url) as redis:
        lists = [key for key in redis.keys("opscore.*") if redis.type(key) == b"list"]
        return sum(redis.llen(key) for key in lists)


# --- Sent again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_the_same_request_with_the_same_key_starts_one_run(
    client: Client, settings: Settings, start: str
) -> None:
    first = post(client, *STARTS[start], key="k-1")
    assert first.status_code == 202, first.json
    assert "Idempotent-Replayed" not in first.headers
    before = sent(settings)
    again = post(client, *STARTS[start], key="k-1")
    assert (again.status_code, again.json) == (202, first.json)
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert count(client, "runs") == 1 and sent(settings) == before > 0
    assert client.get(again.headers["Location"]).status_code == 200


@pytest.mark.parametrize("start", STARTS)
def test_another_key_or_none_starts_another_run(client: Client, start: str) -> None:
    for n, key in enumerate(("k-1", "k-2", None, None), 1):
        answer = post(client, *STARTS[start], key=key)
        assert answer.status_code == 202 and "Idempotent-Replayed" not in answer.headers
        assert count(client, "runs") == n
    assert count(client, "idempotency_keys") == 2


def test_a_replay_shows_the_run_as_it_is_now(client: Client) -> None:
    run_id = post(client, key="k").json["runId"]
    client.post(f"/runs/{run_id}/cancel")
    again = post(client, key="k")
    assert (again.json["runId"], again.json["status"]) == (run_id, "cancelled")


def test_a_request_is_the_same_however_its_json_is_spelled(client: Client) -> None:
    spellings = (
        '{"workflowId": "report", "input": {"topic": "\\u00e9", "n": 1}}',
        '{"input":{"n":1,"topic":"é"},\n "workflowId":"report"}',
    )
    for spelling in spellings:
        headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
        answer = client.post(RUN, data=spelling.encode(), headers=headers)
        assert answer.status_code == 202, answer.json
    assert count(client, "runs") == 1 and "Idempotent-Replayed" in answer.headers


def test_a_key_is_the_same_with_and_without_quotes(client: Client) -> None:
    for key in (r"a\b", r'"a\\b"'):
        assert post(client, key=key).status_code == 202
    assert count(client, "runs") == 1
    for key in ('a"b', r'"a\"b"'):
        assert post(client, key=key).status_code == 202
    assert count(client, "runs") == 2


def test_a_replay_needs_no_broker_and_the_first_none_either(settings: Settings) -> None:
    with open_client(replace(settings, redis_url="redis://127.0.0.1:1/0")) as client:
        client.post("/workflows", DEFINITION)
        first, again = (post(client, key="k") for _ in range(2))
        assert (first.status_code, again.status_code) == (202, 202)
        assert first.json["runId"] == again.json["runId"]


def test_a_request_without_a_key_asks_nothing_of_keys(client: Client) -> None:
    do(client, "DROP TABLE idempotency_keys")
    for start in STARTS.values():
        assert post(client, *start).status_code == 202
    assert post(client, key="k").status_code == 500


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RUN, {**BODY, "input": {"topic": "else"}}),
        (RUN, {**BODY, "labels": {}}),
        (RUN, {"workflowId": "none"}),
        ("/agent/reader/workflow", STARTS["inline"][1]),
        STARTS["task"],
    ],
)
def test_a_key_that_came_with_another_request_is_409_and_starts_nothing(
    client: Client, path: str, body: Any
) -> None:
    run_id = post(client, key="k").json["runId"]
    answer = problem(post(client, path, body, key="k"), 409, "idempotency_key_reused")
    assert "new key" in answer["detail"]
    assert count(client, "runs") == 1
    assert post(client, key="k").json["runId"] == run_id


def test_the_same_body_for_another_agent_is_another_request(client: Client) -> None:
    _, body = STARTS["inline"]
    assert post(client, "/agent/writer/workflow", body, key="k").status_code == 202
    problem(post(client, "/agent/reader/workflow", body, key="k"), 409, "idempotency_key_reused")


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "a b",
        "ä",
        "a\tb",
        "x" * 256,
        "x" * 2**20,
        '"',
        '"a',
        '"a"b"',
        '""',
        '"a b"',
        "\x7f",
    ],
    ids=lambda key: ascii(key)[:12],
)
@pytest.mark.parametrize("start", STARTS)
def test_a_key_that_is_none_is_422_and_names_the_header(
    client: Client, start: str, key: str
) -> None:
    answer = problem(post(client, *STARTS[start], key=key), 422, "invalid_request")
    ((place, said),) = answer["errors"].items()
    assert place == "/Idempotency-Key" and "1 to 255" in said[0] and len(said[0]) < 200
    assert count(client, "runs") == count(client, "idempotency_keys") == 0


@pytest.mark.parametrize(
    "key", ["x", "x" * 255, "01890a5d-ac96-774b-bcce-b302099a8057", "!~", '"' + "x" * 255 + '"']
)
def test_a_key_may_be_of_all_visible_characters(client: Client, key: str) -> None:
    for _ in range(2):
        assert post(client, key=key).status_code == 202
    assert count(client, "runs") == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (RUN, {"workflowId": "none"}, 404),
        (RUN, {"workflowId": "report", "version": 7}, 404),
        (RUN, {"workflowId": "report", "input": {}}, 422),
        (RUN, {"workflowId": "report", "colour": "red"}, 422),
        ("/agent/nobody/workflow", STARTS["inline"][1], 404),
        ("/agent/writer/workflow", {"workflowDefinition": {"tasks": []}}, 422),
        ("/agent/writer/workflow", {"workflowDefinitionId": "none"}, 404),
        ("/tasks", {"taskType": "agent_run", "agentId": "nobody"}, 404),
        ("/tasks", {"taskType": "agent_run"}, 422),
    ],
)
def test_a_request_that_is_refused_leaves_no_key(
    client: Client, path: str, body: Any, status: int
) -> None:
    for _ in range(2):
        assert post(client, path, body, key="k").status_code == status
    assert count(client, "idempotency_keys") == count(client, "runs") == 0
    answer = post(client, key="k")
    assert answer.status_code == 202 and "Idempotent-Replayed" not in answer.headers


# --- At the same moment, and with faults between ------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_many_at_the_same_moment_start_one_run(client: Client, start: str) -> None:
    for n in range(1, 6):
        barrier = threading.Barrier(8)

        def submit(n: int, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            return post(client, *STARTS[start], key=f"k-{n}")

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(submit, [n] * 8))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.headers["Location"] for answer in answers}) == 1
        assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
        assert count(client, "runs") == n


class Meanwhile:
    """A request that waits, in a thread of its own, for who took its key before."""

    def __init__(self, client: Client, key: str) -> None:
        self.client = client
        self.threads = ThreadPoolExecutor(1)
        self.answer = self.threads.submit(post, client, key=key)
        wait_until(self.waits, says=bool)

    def waits(self) -> int:
        waiting = "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return count(self.client, waiting)

    def __enter__(self) -> "Meanwhile":
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown()


def request_digest(client: Client) -> str:
    """Return the digest of `BODY`, as the table has it."""
    post(client, key="sample")
    with client.database.autocommit() as tx:
        found: str = tx.execute(text("SELECT digest FROM idempotency_keys")).scalar_one()
        return found


def test_the_second_waits_for_the_first_and_finds_its_run(client: Client) -> None:
    digest = request_digest(client)
    with client.database.transaction() as tx:
        assert idempotency.take_key(tx, "k", digest) is None
        run_id = add_run(tx)
        idempotency.keep_run(tx, "k", run_id)
        meanwhile = Meanwhile(client, "k")
        assert not meanwhile.answer.done()
    with meanwhile:
        answer = meanwhile.answer.result(10)
    assert answer.json["runId"] == str(run_id)
    assert answer.headers["Idempotent-Replayed"] == "true"
    assert count(client, "runs") == 2


def test_the_second_does_the_work_of_a_first_that_failed(client: Client) -> None:
    digest = request_digest(client)
    with pytest.raises(ZeroDivisionError), client.database.transaction() as tx:
        idempotency.take_key(tx, "k", digest)
        lost = add_run(tx)
        idempotency.keep_run(tx, "k", lost)
        meanwhile = Meanwhile(client, "k")
        raise ZeroDivisionError
    with meanwhile:
        answer = meanwhile.answer.result(10)
    assert answer.status_code == 202 and "Idempotent-Replayed" not in answer.headers
    assert answer.json["runId"] != str(lost)
    assert client.get(f"/runs/{lost}").status_code == 404
    assert count(client, "runs") == 2


def test_the_second_with_another_body_is_409_once_the_first_has_committed(client: Client) -> None:
    with client.database.transaction() as tx:
        idempotency.take_key(tx, "k", "of another request")
        idempotency.keep_run(tx, "k", add_run(tx))
        meanwhile = Meanwhile(client, "k")
    with meanwhile:
        problem(meanwhile.answer.result(10), 409, "idempotency_key_reused")


@pytest.mark.parametrize("start", STARTS)
def test_a_fault_after_the_run_was_written_leaves_neither_run_nor_key(
    client: Client, start: str
) -> None:
    do(client, "ALTER TABLE idempotency_keys ADD CONSTRAINT fault CHECK (run_id IS NULL)")
    problem(post(client, *STARTS[start], key="k"), 500, "internal_error")
    for table in ("runs", "tasks", "events", "idempotency_keys"):
        assert count(client, table) == 0
    do(client, "ALTER TABLE idempotency_keys DROP CONSTRAINT fault")
    answer = post(client, *STARTS[start], key="k")
    assert answer.status_code == 202 and "Idempotent-Replayed" not in answer.headers


def test_a_fault_before_the_key_is_remembered_leaves_no_run(client: Client) -> None:
    do(client, "ALTER TABLE runs ADD CONSTRAINT fault CHECK (workflow_id <> 'report')")
    problem(post(client, key="k"), 500, "internal_error")
    assert count(client, "runs") == count(client, "idempotency_keys") == 0
    do(client, "ALTER TABLE runs DROP CONSTRAINT fault")
    assert "Idempotent-Replayed" not in post(client, key="k").headers


# --- A day later --------------------------------------------------------------------------------


def age(client: Client, interval: str) -> None:
    do(client, f"UPDATE idempotency_keys SET created_at = now() - interval '{interval}'")


def test_a_key_is_remembered_for_24_hours(client: Client) -> None:
    first = post(client, key="k").json["runId"]
    age(client, "23 hours 59 minutes")
    assert post(client, key="k").json["runId"] == first
    age(client, "24 hours 1 second")
    second = post(client, key="k")
    assert second.json["runId"] != first and "Idempotent-Replayed" not in second.headers
    again = post(client, key="k")
    assert again.json["runId"] == second.json["runId"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert count(client, "idempotency_keys") == 1


def test_after_24_hours_another_request_may_have_the_key(client: Client) -> None:
    post(client, key="k")
    age(client, "24 hours 1 second")
    other = {**BODY, "input": {"topic": "else"}}
    assert post(client, body=other, key="k").status_code == 202
    problem(post(client, key="k"), 409, "idempotency_key_reused")


def test_of_many_that_find_an_old_key_one_starts_a_run(client: Client) -> None:
    post(client, key="k")
    age(client, "25 hours")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: post(client, key="k"), range(8)))
    assert len({answer.json["runId"] for answer in answers}) == 1
    assert count(client, "runs") == 2


def remember(tx: Any, prefix: str, keys: int, interval: str) -> None:
    statement = (
        "INSERT INTO idempotency_keys (key, digest, run_id, created_at)"
        " SELECT :prefix || n, 'd', gen_random_uuid(), now() - cast(:age AS interval)"
        " FROM generate_series(1, :keys) AS n"
    )
    tx.execute(text(statement), {"prefix": prefix, "keys": keys, "age": interval})


def remembered(database: Database) -> int:
    with database.autocommit() as tx:
        found: int = tx.execute(text("SELECT count(*) FROM idempotency_keys")).scalar_one()
        return found


def test_the_keeper_forgets_old_keys_now_and_then_and_some_in_each_round(
    database: Database, dispatcher: Dispatcher, settings: Settings
) -> None:
    with database.transaction() as tx:
        remember(tx, "old", 2 * LIMIT + 1, "25 hours")
        remember(tx, "young", 3, "23 hours")
    keeper = Round(database, dispatcher, settings)
    for left in (LIMIT + 4, 4, 3, 3):
        assert keeper.run() and remembered(database) == left
    with database.transaction() as tx:
        remember(tx, "older", 1, "25 hours")
    assert keeper.run() and remembered(database) == 4
    keeper.count = TIDY_EVERY
    assert keeper.run() and remembered(database) == 3


def test_who_takes_an_old_key_and_who_forgets_it_do_not_disturb_each_other(
    database: Database,
) -> None:
    with database.transaction() as tx:
        remember(tx, "k", 1, "25 hours")
    with database.transaction() as tx:
        assert idempotency.take_key(tx, "k1", "d") is None
        with database.transaction() as other:
            assert idempotency.forget_keys(other, 10) == 0
        run_id = add_run(tx)
        idempotency.keep_run(tx, "k1", run_id)
    with database.transaction() as tx:
        assert idempotency.take_key(tx, "k1", "d") == run_id
