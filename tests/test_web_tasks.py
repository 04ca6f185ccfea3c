"""Lists of tasks across runs: what waits for whom, page by page, at the cost of what is open."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from http_client import Client, open_client, problem
from rows import NOW, add_items, add_run, add_task
from sqlalchemy import event, text
from stack import Servers, new_redis_url, stack_environment
from test_status import fill, whole_reads
from uuid6 import uuid7

from opscore import queries
from opscore.config import Settings
from opscore.db import Database
from opscore.queries import TaskFilter
from opscore.states import TASK_ENDED


@pytest.fixture(scope="module")
def client(servers: Servers) -> Iterator[Client]:
    with servers.new_database() as url:
        settings = Settings.from_env(stack_environment(url, new_redis_url(servers)))
        with open_client(settings) as client:
            yield client


@pytest.fixture(scope="module")
def tasks(client: Client) -> dict[str, str]:
    """Name -> id of tasks of two runs, in the order in which they were written."""
    found: dict[str, UUID] = {}
    with client.database.transaction() as tx:
        first, second = add_run(tx, "running", id=uuid7()), add_run(tx, "failed", id=uuid7())

        def add(name: str, run_id: UUID, status: str, **more: Any) -> None:
            found[name] = add_task(tx, run_id, name, status, id=uuid7(), **more)

        add("done", first, "completed", agent_id="writer")
        add("asks", first, "waiting", reason="approval", wanted_agent_id=None, items=0)
        add("later", first, "pending")
        add("at-it", first, "running", agent_id="reader", wanted_agent_id="writer")
        add("broke", second, "failed", agent_id="reader")
        add("asks-too", second, "waiting", reason="approval", wanted_agent_id=None, items=0)
        add("tries", second, "waiting", reason="retry", agent_id="reader", wake_at=NOW)
        add("stands", second, "waiting", reason="agent_busy", line_agent_id="writer")
        add("end", second, "waiting", reason="dependencies", kind="end")
    return {"first": str(first), "second": str(second)} | {n: str(i) for n, i in found.items()}


def listed(client: Client, query: str = "") -> list[str]:
    """Return the names of what is listed, all pages of it."""
    found, cursor = [], ""
    while cursor is not None:
        answer = client.get(f"/tasks?limit=2&{query}{cursor and f'&cursor={cursor}'}")
        assert answer.status_code == 200, answer.json
        assert len(answer.json["items"]) <= 2
        found += [task["taskDefinitionId"] for task in answer.json["items"]]
        cursor = answer.json["nextCursor"]
    return found


EVERY = ["stands", "tries", "asks-too", "broke", "at-it", "later", "asks", "done"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", EVERY),
        ("status=waiting&reason=approval", ["asks-too", "asks"]),
        ("reason=approval", ["asks-too", "asks"]),
        ("reason=approval&reason=agent_busy", ["stands", "asks-too", "asks"]),
        ("status=waiting", ["stands", "tries", "asks-too", "asks"]),
        ("status=pending&status=running", ["at-it", "later"]),
        ("status=pending&reason=retry", []),
        ("status=waiting&status=running&agentId=reader", ["tries", "at-it"]),
        ("reason=agent_busy&agentId=writer", ["stands"]),
        ("runId={second}", ["stands", "tries", "asks-too", "broke"]),
        ("runId={first}&status=completed&status=running", ["at-it", "done"]),
        ("runId={first}&agentId=writer", ["later", "done"]),
        ("runId={second}&reason=retry", ["tries"]),
        ("runId={unknown}", []),
    ],
)
def test_tasks_are_listed_newest_first_by_what_they_are(
    client: Client, tasks: dict[str, str], query: str, names: list[str]
) -> None:
    unknown = "00000000-0000-7000-8000-000000000000"
    assert listed(client, query.format(unknown=unknown, **tasks)) == names


def test_a_task_of_the_list_is_as_in_the_list_of_its_run(
    client: Client, tasks: dict[str, str]
) -> None:
    (ours,) = client.get(f"/tasks?reason=retry&runId={tasks['second']}").json["items"]
    of_run = client.get(f"/runs/{tasks['second']}/tasks").json["items"]
    assert ours in of_run and ours["waitingFor"]
    assert set(ours) | {"logs"} == set(client.get(f"/tasks/{ours['taskId']}").json)


@pytest.mark.parametrize("status", sorted(TASK_ENDED))
def test_what_is_over_is_listed_of_one_run_only_and_the_way_out_is_said(
    client: Client, tasks: dict[str, str], status: str
) -> None:
    for query in (f"status={status}", f"status=waiting&status={status}&agentId=writer"):
        errors = problem(client.get(f"/tasks?{query}"), 422, "invalid_request")["errors"]
        assert status in errors["/status"][0] and "give a runId" in errors["/status"][0]
        assert client.get(f"/tasks?{query}&runId={tasks['first']}").status_code == 200


def test_the_tasks_of_an_agent_want_something_narrower_with_it(client: Client) -> None:
    errors = problem(client.get("/tasks?agentId=writer"), 422, "invalid_request")["errors"]
    assert "give a status among pending, waiting, running" in errors["/agentId"][0]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("status=open", "/status/0"),
        ("reason=run_cancelled", "/reason/0"),
        ("runId=7", "/runId"),
        ("agent=writer", "/agent"),
        ("cursor=x", "/cursor"),
        ("cursor=WyJub25lIl0=", "/cursor"),
        ("limit=0", "/limit"),
    ],
)
def test_what_is_wrong_with_a_query_is_named(client: Client, query: str, place: str) -> None:
    errors = problem(client.get(f"/tasks?{query}"), 422, "invalid_request")["errors"]
    assert list(errors) == [place]


def test_pages_neither_repeat_nor_skip_while_tasks_come_and_go(client: Client) -> None:
    with client.database.transaction() as tx:
        run_id = add_run(tx, "running", id=uuid7())
        parent = add_task(tx, run_id, "each", "waiting", reason="children", kind="for_each")
        add_items(tx, run_id, parent, ["pending"] * 5)
    query = f"/tasks?status=pending&runId={run_id}&limit=3"
    first = client.get(query).json
    with client.database.transaction() as tx:
        add_task(tx, run_id, "new", id=uuid7())
        gone = first["items"][0]["taskId"]
        tx.execute(text("DELETE FROM tasks WHERE id = :id"), {"id": UUID(gone)})
    rest = client.get(f"{query}&cursor={first['nextCursor']}").json
    found = [
        task["index"] for task in (*first["items"], *rest["items"]) if task["index"] is not None
    ]
    assert sorted(found) == [0, 1, 2, 3, 4] and rest["nextCursor"] is None


def test_no_list_reads_all_tasks_there_ever_were(database: Database) -> None:
    with database.transaction() as tx:
        fill(tx, ended=20_000, open_runs=2_000)
        run_id = add_run(tx, "running", workflow_id="w")
        # So many in one that to look through all, in the order of the page, seems cheap.
        tx.execute(
            text("UPDATE tasks SET run_id = :run_id WHERE status = 'completed'"), {"run_id": run_id}
        )
    with database.autocommit() as tx:
        tx.execute(text("ANALYZE"))
        query = "SELECT indexrelid::regclass::text FROM pg_index WHERE indpred IS NOT NULL"
        partial = set(tx.execute(text(query)).scalars())
        for wanted in (
            TaskFilter(status=["waiting"]),
            TaskFilter(reason=["approval"]),
            TaskFilter(reason=["agent_busy"], agent_id="a1"),
            TaskFilter(status=["pending", "running"]),
            TaskFilter(run_id=run_id),
            TaskFilter(run_id=run_id, status=["completed"]),
        ):
            executed: list[tuple[str, Any]] = []

            def note(*about: Any, executed: list[tuple[str, Any]] = executed) -> None:
                executed.append((about[2], about[3]))

            event.listen(tx, "before_cursor_execute", note)
            queries.find_tasks(tx, wanted, after=(uuid7(),), limit=50)
            event.remove(tx, "before_cursor_execute", note)
            cursor = tx.connection.dbapi_connection.cursor()  # type: ignore[union-attr]
            cursor.execute(f"EXPLAIN (FORMAT JSON) {executed[0][0]}", executed[0][1])
            ((tree,),) = cursor.fetchall()
            tree = json.loads(tree) if isinstance(tree, str) else tree
            assert list(whole_reads(tree[0]["Plan"], partial)) == [], wanted
            assert "pk_tasks" not in by_order(tree[0]["Plan"]), wanted


def by_order(plan: dict[str, Any]) -> set[str]:
    """Return the indexes that are read backwards: in the order of the page, past all others."""
    found = {plan["Index Name"]} if plan.get("Scan Direction") == "Backward" else set()
    return found.union(*(by_order(child) for child in plan.get("Plans", ())))
