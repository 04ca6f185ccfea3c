"""Runs as operators see them, on real workers: branches, approvals, delays, controls, clocks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from stack import Servers, Stack, running_stack, wait_until

from opscore import engine, queries, workflows
from opscore.definition import parse
from opscore.errors import InvalidDefinition, InvalidRequest, OpsCoreError


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("operating") / "worker.log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.fleet") as stack:
        stack.start_worker(concurrency=2)
        yield stack


def task(name: str, agent_id: str = "value", value: Any = 0, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, "parameters": {"value": value}, **more}


def approval(name: str, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "type": "approval", **more}


def child(name: str, workflow_id: str, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "type": "workflow", "workflowId": workflow_id, **more}


def submit(stack: Stack, *tasks: dict[str, Any], input: Any = None, **document: Any) -> UUID:
    run_id: UUID = stack.submit({"id": "w", "tasks": list(tasks), **document}, input)
    return run_id


def finish(stack: Stack, *tasks: dict[str, Any], input: Any = None, **document: Any) -> Any:
    return stack.finished(submit(stack, *tasks, input=input, **document))


def create(stack: Stack, workflow_id: str, *tasks: dict[str, Any], **document: Any) -> None:
    with stack.database.transaction() as tx:
        workflows.create_workflow(tx, parse({"id": workflow_id, "tasks": list(tasks), **document}))


def statuses(stack: Stack, run_id: UUID) -> dict[str, str]:
    return {
        t.definition_id: t.status
        for t in stack.tasks(run_id)
        if t.index is None and t.kind != "end"
    }


def named(stack: Stack, run_id: UUID, name: str) -> Any:
    return next(t for t in stack.tasks(run_id) if t.definition_id == name and t.index is None)


def waits(stack: Stack, run_id: UUID, name: str, reason: str) -> Any:
    return wait_until(
        lambda: named(stack, run_id, name),
        says=lambda task: (task.status, task.reason) == ("waiting", reason),
    )


def decide(stack: Stack, task_id: UUID, approved: bool, comment: str | None = None) -> None:
    with stack.database.transaction() as tx:
        woken = engine.decide_approval(
            tx, task_id, approved=approved, comment=comment, by="key:test"
        )
    stack.dispatcher.wake(woken)


def events(stack: Stack, run_id: UUID) -> list[str]:
    rows = stack.rows("SELECT type FROM events WHERE run_id = :id ORDER BY seq", id=run_id)
    return [row.type for row in rows]


# --- Branches


@pytest.mark.parametrize(("score", "taken", "left"), [(9, "good", "bad"), (1, "bad", "good")])
def test_a_run_takes_the_branch_whose_condition_holds(
    stack: Stack, score: int, taken: str, left: str
) -> None:
    run_id = submit(
        stack,
        task("judge", value="${input.score}", dependsOn=[]),
        task("good", value="praise", dependsOn=["judge"], when="tasks.judge.output > 5"),
        task("bad", value="help", dependsOn=["judge"], when="tasks.judge.output <= 5"),
        task("then", value="${tasks." + left + ".output}", dependsOn=[left]),
        task("last", value="${[tasks.good.output, tasks.bad.output]}", dependsOn=["good", "bad"]),
        input={"score": score},
        output="${tasks.last.output}",
    )
    run = stack.finished(run_id)
    assert run.status == "completed", run.error
    assert statuses(stack, run_id) == {
        "judge": "completed",
        taken: "completed",
        left: "skipped",
        "then": "skipped",
        "last": "completed",
    }
    assert sorted(map(str, run.output)) == sorted(["None", "praise" if score > 5 else "help"])
    assert events(stack, run_id).count("task.skipped") == 2
    reasons = {t.definition_id: t.reason for t in stack.tasks(run_id) if t.status == "skipped"}
    assert reasons == {left: "when", "then": "upstream_skipped"}


def test_a_run_whose_every_task_is_skipped_is_completed(stack: Stack) -> None:
    run = finish(stack, task("a", when="false"), task("b"))
    assert (run.status, run.output) == ("completed", None)


def test_a_skipped_for_each_has_no_items(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", forEach={"items": "${[1, 2]}"}, when="input.go"),
        task("b", value="${tasks.a.status}", dependsOn=["a"], when="true"),
        input={"go": False},
    )
    assert run.status == "completed", run.error
    assert statuses(stack, run.id) == {"a": "skipped", "b": "skipped"}


def test_a_condition_that_cannot_be_evaluated_fails_its_task(stack: Stack) -> None:
    run = finish(stack, task("a", when="input.x > 1"))
    assert run.status == "failed" and run.error["code"] == "expression_error"
    run = finish(stack, task("a", when="1"))
    assert "true or false" in run.error["message"]


def test_a_failure_that_goes_on_can_be_branched_on(stack: Stack) -> None:
    run = finish(
        stack,
        task("a", "broken", retry={"maxAttempts": 1}, onFailure="continue"),
        task("b", value="${tasks.a.error.code}", when="tasks.a.status == 'failed'"),
    )
    assert (run.status, run.output) == ("completed", "agent_error")


# --- Approvals


def test_an_approval_waits_for_a_word_and_says_whose_it_was(stack: Stack) -> None:
    run_id = submit(stack, task("a"), approval("ok"), task("z", value="${tasks.ok.output}"))
    task_id = waits(stack, run_id, "ok", "approval").id
    decide(stack, task_id, True, "fine")
    run = stack.finished(run_id)
    assert run.output == {"approved": True, "comment": "fine", "principal": "key:test"}
    assert "task.approved" in events(stack, run_id)


def test_a_rejection_takes_another_branch(stack: Stack) -> None:
    run_id = submit(
        stack,
        approval("ok", onFailure="continue", dependsOn=[]),
        task("yes", dependsOn=["ok"], when="tasks.ok.status == 'completed'"),
        task("no", value="${tasks.ok.error}", dependsOn=["ok"], when="tasks.ok.status == 'failed'"),
    )
    decide(stack, waits(stack, run_id, "ok", "approval").id, False, "too dear")
    run = stack.finished(run_id)
    assert run.status == "completed", run.error
    assert run.output == {"yes": None, "no": {"code": "rejected", "message": "too dear"}}


def test_a_rejection_fails_the_run(stack: Stack) -> None:
    run_id = submit(stack, approval("ok"), task("z"))
    decide(stack, waits(stack, run_id, "ok", "approval").id, False)
    run = stack.finished(run_id)
    assert (run.status, run.error["code"]) == ("failed", "rejected")
    assert "key:test" in run.error["message"]


@pytest.mark.parametrize(
    ("on_timeout", "status"), [({}, "failed"), ({"onTimeout": "approve"}, "completed")]
)
def test_nobodys_word_in_time_is_an_answer_too(
    stack: Stack, on_timeout: dict[str, str], status: str
) -> None:
    run = finish(stack, approval("ok", timeoutSeconds=0.2, **on_timeout))
    assert run.status == status
    if status == "failed":
        assert "0.2 seconds" in run.error["message"]
    else:
        assert run.output["principal"] == "timeout"


# --- Delays


def test_a_delay_passes_after_its_seconds(stack: Stack) -> None:
    run_id = submit(
        stack, {"taskId": "d", "type": "delay", "seconds": "${input.s}"}, input={"s": 1}
    )
    assert stack.finished(run_id).status == "completed"
    (waited,) = stack.rows(
        "SELECT extract(epoch FROM finished_at - started_at) AS s FROM tasks"
        " WHERE run_id = :id AND kind = 'delay'",
        id=run_id,
    )
    assert 1 <= waited.s < 4


def test_a_delay_until_a_moment_that_is_over_passes_at_once(stack: Stack) -> None:
    delay = {"taskId": "d", "type": "delay", "until": "${input.t}"}
    assert finish(stack, delay, input={"t": "2001-01-01T00:00:00Z"}).status == "completed"


@pytest.mark.parametrize(("field", "value"), [("seconds", "soon"), ("until", 5), ("seconds", -1)])
def test_a_delay_that_is_none_fails_by_name(stack: Stack, field: str, value: Any) -> None:
    run = finish(stack, {"taskId": "d", "type": "delay", field: "${input.x}"}, input={"x": value})
    assert run.error["code"] == "expression_error" and field in run.error["message"]


# --- Sub-workflows


def test_a_sub_workflow_gets_parameters_and_passes_its_output_up(stack: Stack) -> None:
    create(stack, "double", task("d", value="${input.n * 2}"))
    run_id = submit(
        stack,
        child("x", "double", parameters={"n": 21}),
        task("z", value="${tasks.x.output + 0}"),
    )
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", 42)
    below = stack.run(named(stack, run_id, "x").child_run_id)
    assert below.parent_task_id == named(stack, run_id, "x").id and below.depth == 1


def test_each_item_can_run_a_workflow_that_has_items_itself(stack: Stack) -> None:
    create(stack, "squares", task("s", forEach={"items": "${input.n}"}, value="${item * item}"))
    each = {"items": "${input}", "maxParallel": 2}
    run = finish(
        stack,
        child("x", "squares", forEach=each, parameters={"n": "${item}"}),
        input=[[1, 2], [3], [], [4]],
    )
    assert (run.status, run.output) == ("completed", [[1, 4], [9], [], [16]])


def test_a_sub_workflow_that_fails_fails_its_task(stack: Stack) -> None:
    create(stack, "breaks", task("b", "broken", retry={"maxAttempts": 1}))
    run = finish(stack, child("x", "breaks"))
    assert (run.status, run.error["code"]) == ("failed", "child_failed")
    run = finish(stack, child("x", "breaks", onFailure="continue"), output="${tasks.x.status}")
    assert (run.status, run.output) == ("completed", "failed")


def test_a_sub_workflow_whose_input_is_refused_fails_its_task(stack: Stack) -> None:
    create(stack, "strict", task("b"), inputSchema={"type": "object", "required": ["n"]})
    run = finish(stack, child("x", "strict"))
    assert run.error["code"] == "invalid_input" and "'n'" in run.error["message"]
    assert stack.rows("SELECT FROM runs WHERE workflow_id = 'strict'") == []


def test_a_sub_workflow_that_is_archived_fails_its_task_at_once(stack: Stack) -> None:
    create(stack, "shelved", task("b"))
    create(stack, "outer", child("x", "shelved"))
    with stack.database.transaction() as tx:
        workflows.archive_workflow(tx, "shelved", "key:test")
        outer = workflows.find_workflow(tx, "outer")
        plan = engine.submit_run(tx, outer, engine.Submission(input={}))
    stack.dispatcher.publish(plan)
    run = stack.finished(plan.run_id)
    assert (run.status, run.error["code"]) == ("failed", "workflow_archived")
    assert "restore" in run.error["message"] and named(stack, plan.run_id, "x").attempt == 1
    assert stack.rows("SELECT FROM runs WHERE workflow_id = 'shelved'") == []


def test_runs_stand_at_most_nine_deep(stack: Stack) -> None:
    create(stack, "deep-0", task("b"))
    for n in range(1, 10):
        create(stack, f"deep-{n}", child("x", f"deep-{n - 1}"))
    assert finish(stack, child("x", "deep-6")).status == "completed"
    run = finish(stack, child("x", "deep-9"))
    assert run.status == "failed" and "cannot_nest" not in str(run.output)


def test_a_cancelled_run_takes_its_sub_workflows_along(stack: Stack) -> None:
    create(stack, "asks", approval("ok"), task("never"))
    run_id = submit(stack, child("x", "asks"))
    below = waits(stack, run_id, "x", "children").child_run_id
    waits(stack, below, "ok", "approval")
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
    stack.dispatcher.follow_end(run_id)
    assert stack.run(run_id).status == "cancelled"
    assert stack.finished(below).status == "cancelled"
    assert statuses(stack, below) == {"ok": "cancelled", "never": "cancelled"}


# --- forEach.tolerate


def test_some_items_may_fail(stack: Stack) -> None:
    run = finish(
        stack,
        {
            "taskId": "f",
            "agentId": "fails-when-told",
            "forEach": {"items": "${input}", "tolerate": "20%"},
            "parameters": {"fails": "${item == 3}", "value": "${item}"},
            "retry": {"maxAttempts": 1},
        },
        input=[1, 2, 3, 4, 5],
    )
    assert (run.status, run.output) == ("completed", [1, 2, None, 4, 5])


@pytest.mark.parametrize("on_failure", ["fail", "continue"])
def test_one_more_is_too_many(stack: Stack, on_failure: str) -> None:
    run = finish(
        stack,
        {
            "taskId": "f",
            "agentId": "fails-when-told",
            "forEach": {"items": "${input}", "tolerate": 1, "maxParallel": 1},
            "parameters": {"fails": "${item > 1}", "value": "${item}"},
            "retry": {"maxAttempts": 1},
            "onFailure": on_failure,
        },
        input=[1, 2, 3, 4],
        output="${tasks.f.error}",
    )
    if on_failure == "continue":
        assert run.output["code"] == "items_failed" and "3 of 4" in run.output["message"]
    else:
        assert (run.status, run.error["code"]) == ("failed", "items_failed")
        assert "forEach.tolerate" in run.error["message"]
        assert [t.status for t in stack.tasks(run.id) if t.index is not None] == [
            *("completed", "failed", "failed", "cancelled")
        ]


# --- Controls


def test_nothing_starts_while_a_run_is_paused_and_all_of_it_after(stack: Stack) -> None:
    run_id = submit(
        stack,
        task("slow", "nap", dependsOn=[]) | {"parameters": {"seconds": 0.5}},
        task("then", dependsOn=["slow"]),
        task("each", forEach={"items": "${[1, 2, 3]}", "maxParallel": 1}, dependsOn=["then"]),
    )
    wait_until(lambda: named(stack, run_id, "slow").status, says=lambda s: s == "running")
    with stack.database.transaction() as tx:
        engine.pause_run(tx, run_id, "key:test")
        engine.pause_run(tx, run_id, "key:test")
    wait_until(lambda: named(stack, run_id, "slow").status, says=lambda s: s == "completed")
    assert stack.run(run_id).status == "paused"
    assert named(stack, run_id, "then").reason == "paused"
    with stack.database.transaction() as tx:
        plans = engine.resume_run(tx, run_id, "key:test")
    for plan in plans:
        stack.dispatcher.publish(plan)
    assert stack.finished(run_id).status == "completed"
    assert events(stack, run_id).count("run.paused") == 1
    started = stack.rows(
        "SELECT e.type FROM events e WHERE run_id = :id AND type IN"
        " ('task.started', 'run.paused', 'run.resumed') ORDER BY seq",
        id=run_id,
    )
    assert [e.type for e in started][:3] == ["task.started", "run.paused", "run.resumed"]


def test_what_failed_is_tried_again_with_other_parameters_and_the_rest_is_kept(
    stack: Stack,
) -> None:
    run_id = submit(
        stack,
        task("a", value=1),
        task("b", "fails-when-told", retry={"maxAttempts": 1})
        | {"parameters": {"fails": True, "value": "${tasks.a.output}"}},
        task("c", value="${tasks.b.output + 1}"),
    )
    assert stack.finished(run_id).status == "failed"
    with stack.database.transaction() as tx:
        plans = engine.retry_run(tx, run_id, {"b": {"fails": False}}, "key:test")
    for plan in plans:
        stack.dispatcher.publish(plan)
    run = stack.finished(run_id)
    assert (run.status, run.output, run.error) == ("completed", 2, None)
    assert [t.attempt for t in stack.tasks(run_id)] == [1, 2, 1]


def test_only_the_items_that_failed_are_tried_again(stack: Stack) -> None:
    run_id = submit(
        stack,
        {
            "taskId": "f",
            "agentId": "fails-when-told",
            "forEach": {"items": "${input}", "maxParallel": 2},
            "parameters": {"fails": "${item == 2}", "value": "${item}"},
            "retry": {"maxAttempts": 1},
        },
        task("z", value="${tasks.f.output}"),
        input=[1, 2, 3, 4, 5],
    )
    assert stack.finished(run_id).status == "failed"
    before = {t.index: t.attempt for t in stack.tasks(run_id) if t.status == "completed"}
    with stack.database.transaction() as tx:
        plans = engine.retry_run(tx, run_id, {"f": {"fails": False}})
    for plan in plans:
        stack.dispatcher.publish(plan)
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", [1, 2, 3, 4, 5])
    after = {t.index: t.attempt for t in stack.tasks(run_id)}
    assert {index: after[index] for index in before} == before and after[1] == 2


def test_the_run_of_a_failed_sub_workflow_is_itself_tried_again(stack: Stack) -> None:
    create(
        stack,
        "flips",
        task("a", value=1),
        task("b", "fails-until", retry={"maxAttempts": 1}) | {"parameters": {"attempt": 2}},
    )
    run_id = submit(stack, child("x", "flips"), task("z", value="${tasks.x.output}"))
    assert stack.finished(run_id).status == "failed"
    below = named(stack, run_id, "x").child_run_id
    with stack.database.transaction() as tx:
        plans = engine.retry_run(tx, run_id)
    for plan in plans:
        stack.dispatcher.publish(plan)
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", 2), run.error
    assert named(stack, run_id, "x").child_run_id == below
    assert [t.attempt for t in stack.tasks(below)] == [1, 2]


def test_a_run_is_run_anew(stack: Stack) -> None:
    first = finish(stack, task("a", value="${input.n}"), input={"n": 5})
    with stack.database.transaction() as tx:
        plan = engine.rerun(tx, first.id)
    stack.dispatcher.publish(plan)
    again = stack.finished(plan.run_id)
    assert (again.output, again.rerun_of, again.version) == (5, first.id, first.version)


def test_whoever_looks_at_a_run_is_told_what_it_waits_for(stack: Stack) -> None:
    create(stack, "asks", approval("ok"))
    run_id = submit(
        stack,
        approval("ok", dependsOn=[]),
        approval("soon", timeoutSeconds=3600, dependsOn=[]),
        {"taskId": "nap", "type": "delay", "seconds": 3600, "dependsOn": []},
        child("below", "asks", dependsOn=[]),
        task("broken", "broken", retry={"backoffSeconds": 3600}, dependsOn=[]),
    )
    for name, reason in {
        "ok": "approval",
        "soon": "approval",
        "nap": "delay",
        "below": "children",
    }.items():
        waits(stack, run_id, name, reason)
    waits(stack, run_id, "broken", "retry")
    with stack.database.transaction() as tx:
        engine.pause_run(tx, run_id)
        ok, soon, nap, below, broken = (
            one["waiting_for"] for one in queries.get_run_detail(tx, run_id)["tasks"]
        )
        approve(tx, named(stack, run_id, "ok").id)
        decided = queries.get_task(tx, named(stack, run_id, "ok").id)["waiting_for"]
        engine.cancel_run(tx, run_id)
    assert ok == "waiting for somebody to approve or reject it"
    assert soon.startswith(f"{ok}, until 20") and decided == "approved by key:test; it goes on"
    assert nap.startswith("waiting until 20")
    assert (below, broken) == ("its sub-workflow is not over", "the run is paused")


def refusal(stack: Stack, control: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(OpsCoreError) as refused, stack.database.transaction() as tx:
        control(tx, *args)
    return str(refused.value)


approve = partial(engine.decide_approval, approved=True, comment=None, by="key:test")


def test_whoever_asks_for_what_cannot_be_is_told_what_can(stack: Stack) -> None:
    run_id = submit(stack, task("a"), approval("ok"), approval("then"))
    ok = waits(stack, run_id, "ok", "approval").id
    no, later = (named(stack, run_id, name).id for name in ("a", "then"))
    assert refusal(stack, approve, no) == "The task is no approval: its type is agent."
    assert refusal(stack, approve, later).endswith(
        "decide it once its status is waiting and its reason approval."
    )
    assert "its status is running; /rerun" in refusal(stack, engine.retry_run, run_id)
    only = "Only a paused run can be resumed, and its status is running."
    assert refusal(stack, engine.resume_run, run_id) == only
    decide(stack, ok, True)
    assert refusal(stack, approve, ok) == "It was approved already, by key:test."
    waits(stack, run_id, "then", "approval")
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id)
    stack.dispatcher.follow_end(run_id)
    assert refusal(stack, approve, later).startswith("It is over: its status is cancelled")
    over = "The run is over: its status is cancelled; /rerun runs it anew."
    for control in (engine.cancel_run, engine.pause_run, engine.resume_run):
        assert refusal(stack, control, run_id) == over
    assert "its status is cancelled; /rerun" in refusal(stack, engine.retry_run, run_id)


def test_a_paused_run_that_fails_meanwhile_cannot_be_resumed(stack: Stack) -> None:
    run_id = submit(
        stack,
        task("slow", "until-told", dependsOn=[]),
        approval("ok", dependsOn=[]),
    )
    wait_until(lambda: named(stack, run_id, "slow").status, says=lambda s: s == "running")
    ok = waits(stack, run_id, "ok", "approval").id
    with stack.database.transaction() as tx:
        engine.pause_run(tx, run_id)
        # As the failure of another task leaves it while this one goes on.
        why = text("""UPDATE runs SET error = '{"code": "c", "message": "m"}' WHERE id = :id""")
        tx.execute(why, {"id": run_id})
    assert refusal(stack, engine.resume_run, run_id).startswith("The run is ending")
    assert "too late" in refusal(stack, approve, ok)


def test_what_cannot_get_other_parameters_is_named_with_what_can(stack: Stack) -> None:
    broken = task("b", "broken", retry={"maxAttempts": 1})
    run_id = stack.finished(submit(stack, task("a"), broken)).id
    over = "The run is over: its status is failed; /retry tries again what failed of it."
    assert refusal(stack, engine.pause_run, run_id) == over
    asked = stack.finished(submit(stack, approval("ok", timeoutSeconds=0.1))).id
    for failed, name, names in (
        (run_id, "a", "b"),
        (asked, "ok", "of this run nothing that takes any"),
    ):
        with pytest.raises(InvalidRequest) as refused, stack.database.transaction() as tx:
            engine.retry_run(tx, failed, {name: {"x": 1}})
        sentence = f"Only what is tried again can get other parameters: {names}."
        assert refused.value.errors == {f"/parameters/{name}": [sentence]}


def test_a_workflow_cannot_lead_back_to_itself_by_a_later_version(stack: Stack) -> None:
    create(stack, "lowest", task("a"))
    create(stack, "middle", child("x", "lowest"))
    create(stack, "highest", child("x", "middle"))
    sentence = "This leads back to the workflow itself: lowest → highest → middle → lowest; name"
    for below, said in [
        (child("x", "highest"), f"{sentence} another one."),
        (
            child("x", "middle", version=7),
            "There is no version 7 of workflow 'middle'. Create it first.",
        ),
        (child("x", "nowhere"), "There is no workflow 'nowhere'. Create it first."),
    ]:
        with pytest.raises(InvalidDefinition) as refused:
            create(stack, "lowest", task("a"), below)
        assert refused.value.errors == {"/tasks/1/workflowId": [said]}


# --- Clocks


def test_a_run_begins_when_it_is_due(stack: Stack) -> None:
    (moment,) = stack.rows("SELECT now() + interval '1.5 s' AS at")
    run_id = stack.submit({"id": "w", "tasks": [task("a")]}, start_at=moment.at)
    assert (stack.run(run_id).status, stack.run(run_id).reason) == ("queued", "start_at")
    assert stack.finished(run_id).started_at >= moment.at


def test_a_run_that_is_not_over_at_its_deadline_fails_and_what_runs_is_told(stack: Stack) -> None:
    run_id = submit(stack, task("a", "until-told"), task("b"), deadlineSeconds=1.5)
    run = stack.finished(run_id, seconds=60)
    assert (run.status, run.error["code"]) == ("failed", "deadline_exceeded")
    assert statuses(stack, run_id)["b"] == "cancelled"


def test_a_run_that_waits_for_somebody_fails_at_its_deadline(stack: Stack) -> None:
    run = finish(stack, approval("ok"), deadlineSeconds=0.5)
    assert (run.status, run.error["code"]) == ("failed", "deadline_exceeded")


def test_no_row_breaks_a_rule_and_no_slot_is_left(stack: Stack) -> None:
    with stack.database.autocommit() as tx:
        held = tx.execute(text("SELECT * FROM slots WHERE holder IS NOT NULL")).all()
    assert held == []
