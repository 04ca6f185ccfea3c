"""Whole runs on real workers: submitted, carried by chains and chords, and finished."""

import os
import random
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from redis import Redis
from sqlalchemy import text
from stack import Servers, Stack, running_stack, stack_environment, wait_until

from opscore import engine
from opscore.servers import RedisServer


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("stack") / "worker.log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.fleet") as stack:
        stack.start_worker(concurrency=2)
        yield stack


def task(name: str, agent_id: str = "echo", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, **more}


def finish(stack: Stack, *tasks: dict[str, Any], input: Any = None, **document: Any) -> Any:
    document = {"id": "w", "tasks": list(tasks), **document}
    return stack.finished(stack.submit(document, input))


def test_outputs_flow_along_a_chain(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", parameters={"n": "${input.n}"}),
        task("b", parameters={"n": "${tasks.a.output.n + 1}"}),
        task("c", parameters={"text": "got ${tasks.b.output.n}"}),
        input={"n": 1},
    )
    assert (run.status, run.output) == ("completed", {"text": "got 2"})


def test_a_diamond_joins_after_both_sides(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", dependsOn=[]),
        task("b", "value", dependsOn=["a"], parameters={"value": 1}),
        task("c", "value", dependsOn=["a"], parameters={"value": 2}),
        task("d", dependsOn=["b", "c"], parameters={"s": "${[tasks.b.output, tasks.c.output]}"}),
        output="${tasks.d.output.s}",
    )
    assert run.output == [1, 2]


def test_without_an_output_expression_several_leaves_make_an_object(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", "value", dependsOn=[], parameters={"value": 1}),
        task("b", "value", dependsOn=[], parameters={"value": 2}),
    )
    assert run.output == {"a": 1, "b": 2}


def test_next_task_id_is_a_chain_too(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", "value", parameters={"value": 1}, nextTaskId="b"),
        task("b", "value", parameters={"value": "${tasks.a.output + 1}"}, nextTaskId=None),
    )
    assert run.output == 2


@pytest.mark.parametrize("limit", [{}, {"maxParallel": 7}])
def test_300_items_come_back_in_item_order(stack: Stack, limit: dict[str, int]) -> None:
    run = finish(
        stack,
        task("f", "value", forEach={"items": "${input}"} | limit, parameters={"value": "${item}"}),
        input=[n * n for n in range(300)],
    )
    assert run.output == [n * n for n in range(300)]


def test_an_empty_list_is_over_at_once(stack: Stack) -> None:
    run = finish(
        stack,
        task("f", forEach={"items": "${input}"}),
        task("z", parameters={"n": "${size(tasks.f.output)}"}),
        input=[],
    )
    assert run.output == {"n": 0}


def test_items_that_are_no_list_fail_the_task_by_name(stack: Stack) -> None:
    run = finish(stack, task("f", forEach={"items": "${input.x}"}), input={"x": 3})
    assert run.status == "failed" and run.error["code"] == "expression_error"
    assert "list" in run.error["message"]


def test_a_failure_is_tried_again_and_each_attempt_is_kept(stack: Stack) -> None:
    retry = {"maxAttempts": 3, "backoffSeconds": 0.05}
    run_id = stack.submit(
        {"id": "w", "tasks": [task("a", "fails-until", parameters={"attempt": 3}, retry=retry)]}
    )
    assert stack.finished(run_id).output == 3
    attempts = stack.rows(
        "SELECT a.* FROM attempts a JOIN tasks t ON t.id = a.task_id"
        " WHERE t.run_id = :id ORDER BY number",
        id=run_id,
    )
    assert [a.status for a in attempts] == ["failed", "failed", "completed"]
    assert "attempt 1 is too early" in attempts[0].error["message"]
    assert "ValueError" in attempts[0].error["traceback"]


def test_giving_up_fails_at_once_and_what_follows_is_cancelled(stack: Stack) -> None:
    run_id = stack.submit({"id": "w", "tasks": [task("a", "gives-up"), task("b")]})
    assert stack.finished(run_id).error["code"] == "gave_up"
    assert [(t.status, t.reason) for t in stack.tasks(run_id)] == [
        ("failed", None),
        ("cancelled", "upstream_failed"),
    ]


def test_on_failure_continue_shows_followers_what_happened(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", "gives-up", onFailure="continue"),
        task("b", parameters={"s": "${tasks.a.status}", "c": "${tasks.a.error.code}"}),
    )
    assert run.output == {"s": "failed", "c": "gave_up"}


def test_an_item_that_fails_under_continue_leaves_a_null(stack: Stack) -> None:
    run = finish(
        stack,
        task(
            "f",
            "fails-until",
            forEach={"items": "${input}"},
            parameters={"attempt": "${item}"},
            onFailure="continue",
            retry={"maxAttempts": 1},
        ),
        input=[1, 5, 1],
    )
    assert (run.status, run.output) == ("completed", [1, None, 1])


def test_a_timeout_ends_the_attempt_and_frees_the_worker(stack: Stack) -> None:
    run = finish(stack, task("a", "too-slow", timeoutSeconds=0.3, retry={"maxAttempts": 1}))
    assert run.error["code"] == "timeout"
    assert finish(stack, task("a")).status == "completed"


def test_an_expression_that_fails_at_run_time_fails_the_task(stack: Stack) -> None:
    run = finish(stack, task("a", parameters={"x": "${input.nothing.here}"}), input={})
    assert run.error["code"] == "expression_error"


def test_an_output_expression_that_fails_fails_the_run_and_keeps_the_task(stack: Stack) -> None:
    run_id = stack.submit({"id": "w", "tasks": [task("a")], "output": "${input.nothing}"})
    run = stack.finished(run_id)
    assert (run.status, run.error["code"]) == ("failed", "expression_error")
    assert stack.tasks(run_id)[0].status == "completed"


def test_logs_and_progress_of_an_async_agent_are_kept_with_its_attempt(stack: Stack) -> None:
    run_id = stack.submit({"id": "w", "tasks": [task("a", "async-echo", parameters={"x": 1})]})
    assert stack.finished(run_id).output == {"x": 1}
    (task_row,) = stack.tasks(run_id)
    (line,) = stack.rows("SELECT * FROM attempt_logs WHERE task_id = :id", id=task_row.id)
    assert (line.message, line.fields) == ("echoing", {"size": 1})
    (attempt,) = stack.rows("SELECT * FROM attempts WHERE task_id = :id", id=task_row.id)
    assert (attempt.progress, attempt.progress_message) == (0.5, "half way")


def test_an_agent_that_takes_one_at_a_time_serves_in_order_of_arrival(stack: Stack) -> None:
    names = [f"t{n}" for n in range(8)]
    run_id = stack.submit(
        {
            "id": "w",
            "tasks": [
                task(
                    name,
                    "one-at-a-time",
                    dependsOn=[],
                    parameters={"seconds": 0.1},
                    retry={"maxAttempts": 1},
                )
                for name in names
            ],
        }
    )
    waiting = wait_until(
        lambda: [t for t in stack.tasks(run_id) if t.reason == "agent_busy"],
        says=lambda rows: len(rows) >= 3,
    )
    assert all(t.wake_at is not None for t in waiting)
    assert stack.finished(run_id).status == "completed"
    tasks = [t for t in stack.tasks(run_id) if t.kind == "agent"]
    assert all(t.tries == 0 and t.attempt == 1 for t in tasks)
    spans = sorted((t.started_at, t.finished_at) for t in tasks)
    assert all(first[1] <= then[0] for first, then in pairwise(spans)), "never two at once"
    queue = sorted((t for t in tasks if t.waits), key=lambda t: t.id)
    waits = stack.rows(
        "SELECT task_id, min(seq) AS since FROM events WHERE run_id = :id AND type = 'task.waiting'"
        " GROUP BY task_id ORDER BY since",
        id=run_id,
    )
    starts = {t.id: t.started_at for t in queue}
    order = [starts[w.task_id] for w in waits if w.task_id in starts]
    assert order == sorted(order), "first come, first served"


def test_an_agent_that_says_busy_is_asked_again_without_using_up_attempts(stack: Stack) -> None:
    run_id = stack.submit(
        {
            "id": "w",
            "tasks": [task("a", "says-busy", parameters={"times": 2}, retry={"maxAttempts": 1})],
        }
    )
    assert stack.finished(run_id).output == 3
    assert stack.tasks(run_id)[0].tries == 0


def test_an_agent_with_free_slots_that_says_busy_is_left_alone_for_as_long_as_it_asked(
    stack: Stack,
) -> None:
    run_id = stack.submit(
        {"id": "w", "tasks": [task("a", "busy-writer", parameters={"seconds": 2})]}
    )
    run = stack.finished(run_id)
    assert run.output == 2, "one attempt sent away, one done"
    assert (run.finished_at - run.started_at).total_seconds() >= 2


@pytest.mark.parametrize(
    "document",
    [
        {"tasks": [task("a")], "output": "${'nul: \\u0000'}"},
        {"tasks": [task("f", forEach={"items": "${['nul: \\u0000']}"})]},
        {"tasks": [task("f", forEach={"items": "${input.x}"})]},
    ],
)
def test_what_cannot_be_stored_fails_at_once_and_says_why(
    stack: Stack, document: dict[str, Any]
) -> None:
    run = stack.finished(stack.submit({"id": "w", **document}, {"x": {"no": "list"}}), seconds=10)
    assert (run.status, run.error["code"]) == ("failed", "expression_error")


def test_in_the_graph_a_c_a_d_b_d_c_starts_though_b_still_runs(stack: Stack) -> None:
    nap = {"seconds": 1.5}
    run_id = stack.submit(
        {
            "id": "w",
            "tasks": [
                task("a", dependsOn=[]),
                task("b", "nap", dependsOn=[], parameters=nap),
                task("c", dependsOn=["a"]),
                task("d", dependsOn=["a", "b"]),
                task("e", dependsOn=["c", "d"]),
            ],
        }
    )
    assert stack.finished(run_id).status == "completed"
    rows = {t.definition_id: t for t in stack.tasks(run_id)}
    assert rows["c"].finished_at < rows["b"].finished_at
    assert rows["d"].started_at >= rows["b"].finished_at


def random_graph(chance: random.Random, size: int) -> list[dict[str, Any]]:
    """Return tasks in a random order whose edges make a graph without circles."""
    tasks = []
    for n in range(size):
        among = range(max(0, n - 10), n)
        after = chance.sample(among, min(len(among), chance.choice([0, 1, 1, 1, 2, 2, 3])))
        tasks.append(task(f"t{n}", dependsOn=[f"t{m}" for m in after]))
    chance.shuffle(tasks)
    return tasks


@pytest.mark.parametrize("seed", range(6))
def test_random_graphs_of_60_tasks_run_each_once_after_all_it_depends_on(
    stack: Stack, seed: int
) -> None:
    tasks = random_graph(random.Random(seed), 60)
    run_id = stack.submit({"id": f"random-{seed}", "tasks": tasks})
    assert stack.finished(run_id, seconds=60).status == "completed"
    rows = {t.definition_id: t for t in stack.tasks(run_id)}
    attempts = stack.rows(
        "SELECT count(*) AS n FROM attempts a JOIN tasks t ON t.id = a.task_id WHERE run_id = :id",
        id=run_id,
    )
    assert attempts[0].n == 60
    for one in tasks:
        row = rows[one["taskId"]]
        assert row.status == "completed" and row.attempt == 1
        assert all(rows[name].finished_at <= row.started_at for name in one["dependsOn"])
    assert stack.run(run_id).generation == 1, "nothing had to be rescued"


def test_200_in_a_row_and_200_side_by_side_are_published_in_segments(stack: Stack) -> None:
    row = stack.submit({"id": "row", "tasks": [task(f"t{n}") for n in range(200)]})
    side = [f"s{n}" for n in range(200)]
    wide = stack.submit(
        {
            "id": "wide",
            "tasks": [
                task("a", dependsOn=[]),
                *(task(name, dependsOn=["a"]) for name in side),
                task("z", dependsOn=side),
            ],
        }
    )
    for run_id in (row, wide):
        assert stack.finished(run_id, seconds=60).status == "completed"
        assert stack.run(run_id).generation == 1


def test_a_cancelled_run_stops_and_the_running_agent_is_told(
    servers: Servers, tmp_path: Path
) -> None:
    quick = {"OPSCORE_LEASE_SECONDS": "3", "OPSCORE_RENEW_SECONDS": "0.5"}
    with running_stack(servers, tmp_path / "log", OPSCORE_AGENTS="tests.fleet", **quick) as stack:
        stack.start_worker()
        run_id = stack.submit({"id": "w", "tasks": [task("a", "until-told"), task("b")]})
        wait_until(lambda: stack.tasks(run_id)[0].status, says=lambda s: s == "running")
        with stack.database.transaction() as tx:
            engine.cancel_run(tx, run_id)
        assert stack.finished(run_id, seconds=15).status == "cancelled"
        first, second = stack.tasks(run_id)
        assert first.output == "told" and second.status == "cancelled"


def test_a_run_cancelled_before_any_worker_is_up_never_starts(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", OPSCORE_AGENTS="tests.fleet") as stack:
        run_id = stack.submit({"id": "w", "tasks": [task("a")]})
        with stack.database.transaction() as tx:
            engine.cancel_run(tx, run_id)
        with stack.database.transaction() as tx:
            assert engine.settle_run(tx, run_id)
        after = stack.submit({"id": "v", "tasks": [{"taskId": "a", "agentCapability": "echo"}]})
        stack.start_worker()
        assert stack.finished(after).status == "completed"
        assert stack.tasks(run_id)[0].attempt == 0


QUICK = {
    "OPSCORE_AGENTS": "tests.fleet",
    "OPSCORE_LEASE_SECONDS": "2",
    "OPSCORE_RENEW_SECONDS": "0.5",
    "OPSCORE_KEEPER_SECONDS": "0.2",
    "OPSCORE_RESCUE_SECONDS": "1",
}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_must_stop_hands_back_what_does_not_end_in_time(
    servers: Servers, tmp_path: Path, pool: str
) -> None:
    env = {"OPSCORE_AGENTS": "tests.fleet", "OPSCORE_GRACE_SECONDS": "0.5"}
    with running_stack(servers, tmp_path / "log", **env) as stack:
        leaving = stack.start_worker(pool=pool)
        tasks = [task("a", "slow-at-first"), task("b")]
        run_id = stack.submit({"id": "w", "tasks": tasks})
        wait_until(lambda: stack.tasks(run_id)[0].status, says=lambda s: s == "running")
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(timeout=10) == 0
        first = stack.tasks(run_id)[0]
        assert (first.status, first.reason, first.lost, first.tries) == ("waiting", "retry", 0, 0)
        assert not stack.rows("SELECT FROM slots WHERE holder IS NOT NULL")
        (counted,) = stack.rows("SELECT labels, value FROM metrics WHERE name = 'opscore_attempts'")
        assert tuple(counted) == (["handed_back"], 1), "it ended at once, and told of it before"
        stack.start_worker(pool=pool)
        assert stack.finished(run_id, seconds=15).status == "completed", "no lease was waited for"
        attempts = stack.rows("SELECT status, error FROM attempts ORDER BY number, started_at")
        assert [attempt.status for attempt in attempts] == ["cancelled", "completed", "completed"]
        assert attempts[0].error["code"] == "worker_stopped"


def test_a_line_is_served_in_order_though_no_worker_was_free_for_longer_than_a_slot_is_kept(
    servers: Servers, tmp_path: Path
) -> None:
    env = {"OPSCORE_AGENTS": "tests.fleet", "OPSCORE_GRACE_SECONDS": "60"}
    with running_stack(servers, tmp_path / "log", **env) as stack:

        def submit(agent_id: str, seconds: float, status: str) -> UUID:
            one = task("t", agent_id, parameters={"seconds": seconds})
            run_id = stack.submit({"id": agent_id, "tasks": [one]})
            wait_until(lambda: stack.tasks(run_id)[0].status, says=lambda s: s == status)
            return run_id

        leaving = stack.start_worker(concurrency=1)
        submit("one-at-a-time", 10, "running")
        stack.start_worker(concurrency=1)
        line = [submit("one-at-a-time", 0.1, "waiting") for _ in range(4)]
        submit("nap", 16, "running")
        leaving.send_signal(signal.SIGTERM)  # it ends its task first, which frees the slot
        for run_id in line:
            stack.finished(run_id, seconds=60)
        began = [stack.tasks(run_id)[0].started_at for run_id in line]
        assert began == sorted(began)


def test_a_task_whose_worker_is_killed_is_done_by_the_next_attempt(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        stack.start_worker()
        run_id = stack.submit(
            {"id": "w", "tasks": [task("a", "kills-worker", parameters={"times": 1}), task("b")]}
        )
        assert stack.finished(run_id, seconds=60).status == "completed"
        attempts = stack.rows(
            "SELECT status FROM attempts WHERE agent_id = 'kills-worker' ORDER BY number"
        )
        assert [a.status for a in attempts] == ["lost", "completed"]


def test_a_task_that_kills_its_worker_every_time_fails_by_name(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        stack.start_worker()
        run_id = stack.submit({"id": "w", "tasks": [task("a", "kills-worker")]})
        assert stack.finished(run_id, seconds=60).error["code"] == "worker_lost"


def test_a_whole_worker_killed_and_a_redis_that_forgot_everything_cost_only_time(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        worker = stack.start_worker()
        graph = random_graph(random.Random(7), 30)
        runs = [stack.submit({"id": "w", "tasks": graph}) for _ in range(4)]
        wait_until(
            lambda: stack.rows("SELECT count(*) AS n FROM tasks WHERE status = 'completed'")[0].n,
            says=lambda n: n >= 20,
        )
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait(10)
        with Redis.from_url(stack.settings.redis_url) as redis:
            redis.flushdb()
        stack.start_worker()
        began = time.monotonic()
        for run_id in runs:
            assert stack.finished(run_id, seconds=60).status == "completed"
        assert time.monotonic() - began < 60
        doubled = stack.rows(
            "SELECT task_id FROM attempts WHERE status = 'completed' GROUP BY 1 HAVING count(*) > 1"
        )
        assert doubled == []


def test_a_definition_this_version_cannot_read_fails_the_run_by_name_and_blames_no_worker(
    servers: Servers, tmp_path: Path
) -> None:
    once = {"retry": {"maxAttempts": 1}, "onFailure": "continue", "dependsOn": []}
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        run_id = stack.submit({"id": "w", "tasks": [task("a", **once), task("b", **once)]})
        with stack.database.transaction() as tx:
            tx.execute(text("UPDATE workflows SET definition = '{}'"))
        stack.start_worker()
        run = stack.finished(run_id)
        assert (run.status, run.error["code"]) == ("failed", "internal_error")
        assert {t.error["code"] for t in stack.tasks(run_id) if t.kind == "agent"} == {
            "internal_error"
        }


def test_an_outcome_the_database_refuses_fails_its_task_at_once(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        with stack.database.transaction() as tx:
            tx.execute(
                text(
                    "ALTER TABLE tasks ADD CHECK (definition_id <> 'a' OR output IS NULL) NOT VALID"
                )
            )
        stack.start_worker()
        once = {"retry": {"maxAttempts": 1}}
        run = stack.finished(stack.submit({"id": "w", "tasks": [task("a", **once)]}))
        assert (run.status, run.error["code"]) == ("failed", "internal_error")


def test_a_worker_survives_a_restart_of_redis_under_its_tasks(
    servers: Servers, tmp_path: Path
) -> None:
    """Celery 5.7.0 as it comes exits here: see workers/consumer.py."""
    with RedisServer.temporary() as redis, servers.new_database() as url:
        environment = stack_environment(url, redis.url, **QUICK)
        stack = Stack(environment, tmp_path / "log")
        try:
            worker = stack.start_worker()
            nap = {"seconds": 1}
            document = {
                "id": "w",
                "tasks": [task(f"t{n}", "nap", parameters=nap, dependsOn=[]) for n in range(4)],
            }
            runs = []
            for kill in (False, True, True):
                runs.append(stack.submit(document))
                wait_until(
                    lambda: {t.status for t in stack.tasks(runs[-1])},
                    says=lambda statuses: "running" in statuses,
                )
                if kill:
                    os.kill(redis.pid or 0, signal.SIGKILL)
                else:
                    redis.stop()
                redis.start()
            for run_id in runs:
                assert stack.finished(run_id, seconds=60).status == "completed"
            assert worker.poll() is None, "the same worker all along"
        finally:
            stack.stop()


def test_a_run_whose_publication_never_happened_is_found_and_published(
    servers: Servers, tmp_path: Path
) -> None:
    from opscore import workflows
    from opscore.definition import parse

    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        stack.start_worker()
        with stack.database.transaction() as tx:
            stored, _ = workflows.create_workflow(
                tx, parse({"id": "w", "tasks": [task("a"), task("b")]})
            )
            plan = engine.submit_run(tx, stored, engine.Submission(input={}))
        assert stack.finished(plan.run_id, seconds=30).status == "completed"
        assert stack.run(plan.run_id).generation == 2


def test_a_worker_without_the_agent_leaves_the_task_waiting_and_another_does_it(
    servers: Servers, tmp_path: Path
) -> None:
    with running_stack(servers, tmp_path / "log", **QUICK) as stack:
        knows = stack.start_worker()
        knows.send_signal(signal.SIGTERM)
        knows.wait(20)
        stack.environment["OPSCORE_AGENTS"] = "tests.other_fleet"
        stack.start_worker()
        run_id = stack.submit(
            {
                "id": "w",
                "tasks": [task("a", busy={"backoffSeconds": 0.1, "maxBackoffSeconds": 0.2})],
            }
        )
        wait_until(lambda: stack.tasks(run_id)[0].reason, says=lambda r: r == "agent_unavailable")
        stack.environment["OPSCORE_AGENTS"] = "tests.fleet"
        stack.start_worker()
        assert stack.finished(run_id, seconds=30).status == "completed"
