"""`opscore.testing` as its users have it. Whether it is right is for `test_testing_properties`."""

import asyncio
import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples import support_triage
from opscore import AgentBusy, Context, GiveUp, RetryLater, agent
from opscore.agentkit import Registry, load_agents, scripted
from opscore.agentkit.llm import LLMAgent
from opscore.agentkit.model import ModelBusy, Reply, Request
from opscore.agentkit.tools import TOOLS, tool
from opscore.errors import InvalidDefinition, InvalidInput, InvalidRequest
from opscore.testing import NotFaked, after, approve, fake, reject, simulate

EXAMPLES = Path(__file__).parents[1] / "examples"


def task(name: str, agent_id: str = "echo", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, **more}


def flow(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "w", "tasks": list(tasks), **more}


def echo(parameters: dict[str, Any], context: Context) -> dict[str, Any]:
    return parameters


def each(items: Any = "${input}", **more: Any) -> dict[str, Any]:
    return {"forEach": {"items": items, **more}, "parameters": {"n": "${item}"}}


# --- What is run


def test_an_example_runs_with_its_own_agents_and_one_that_is_faked() -> None:
    def run(**said: Any) -> Any:
        return simulate(
            EXAMPLES / "support_triage.yaml",
            input={"tickets": support_triage.SAMPLE},
            agents={
                "classify-ticket": support_triage.classify_ticket,
                "draft-reply": support_triage.draft_reply,
                "write-mail": fake("m-1"),
            },
            approvals=said,
        )

    sent = run(review=after(60, approve()))
    assert (sent.status, sent.output["way"], sent.seconds) == ("completed", "sent", 60)
    assert sent.tasks["escalate"].status == "skipped" and sent.tasks["escalate"].reason == "when"
    assert sent.calls("write-mail")[0]["to"] == "bob@example.com"
    assert run(review=reject("Not today.")).output["reason"] == "Not today."
    silent = run()
    assert (silent.output["way"], silent.seconds) == ("escalated", 3600)


def test_a_workflow_is_a_file_a_document_or_its_text(tmp_path: Path) -> None:
    document = flow(task("a"), output="${tasks.a.status}")
    (tmp_path / "w.json").write_text(json.dumps(document))
    (tmp_path / "w.yaml").write_text("id: w\ntasks: [{taskId: a, agentId: echo}]\n")
    for given in (document, json.dumps(document), tmp_path / "w.json", tmp_path / "w.yaml"):
        assert simulate(given, agents={"echo": echo}).status == "completed"


def test_the_name_of_a_file_as_text_is_told_from_a_document() -> None:
    with pytest.raises(InvalidDefinition) as refused:
        simulate("flows/w.yaml")
    assert "pass Path('flows/w.yaml')" in refused.value.errors[""][0]


def test_a_definition_is_refused_with_all_of_its_faults() -> None:
    with pytest.raises(InvalidDefinition) as refused:
        simulate(flow(task("a", dependsOn=["x"]), task("b", when="tasks.zz.output")))
    assert {"/tasks/0/dependsOn/0", "/tasks/1/when"} <= set(refused.value.errors)


def test_what_is_refused_shows_its_faults_and_where_they_are() -> None:
    faulty = {"id": "below", "tasks": [task("b", nope=1)]}
    with pytest.raises(InvalidDefinition) as refused:
        simulate(flow(task("a")), workflows={"below": faulty})
    (shown,) = refused.value.__notes__
    assert shown.startswith("workflows['below'] /tasks/0/nope: There is no key 'nope'")
    with pytest.raises(InvalidInput) as wrong:
        simulate(flow(task("a"), inputSchema={"required": ["n"]}), agents={"echo": echo})
    assert wrong.value.__notes__[0].startswith("/input: ")


def test_an_input_that_breaks_its_schema_is_refused() -> None:
    schema = {"type": "object", "required": ["n"]}
    with pytest.raises(InvalidInput) as refused:
        simulate(flow(task("a"), inputSchema=schema), agents={"echo": echo})
    assert "/input" in refused.value.errors


def test_a_workflow_needs_an_id_or_a_name() -> None:
    with pytest.raises(InvalidDefinition):
        simulate({"tasks": [task("a")]}, agents={"echo": echo})
    named = simulate({"name": "My Flow", "tasks": [task("a")]}, agents={"echo": echo})
    assert named.workflow_id == "wf_my-flow"


def test_a_run_that_is_triggered_for_an_agent_gives_it_what_nobody_is_named_for() -> None:
    document = flow({"taskId": "a", "parameters": {"x": 1, "y": 1}}, {"taskId": "b"})
    with pytest.raises(InvalidRequest):
        simulate(document, agents={"echo": echo})
    run = simulate(document, input={"y": 2}, agents={"echo": echo}, agent_id="echo")
    assert run.calls("echo") == [{"x": 1, "y": 2}, {}]


# --- Who is missing


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (flow(task("a", "writer")), ["'a'", "agents={'writer': fake(...)}"]),
        (flow({"taskId": "a", "agentCapability": "write"}), ["'a'", "agents={'write': fake("]),
        (flow(task("a", "gone", fallback=["other"])), ["'a'", "agents={'other': fake(...)}"]),
        (flow(task("f", "writer", **each([1]))), ["'f[0]'", "agents={'writer': fake(...)}"]),
        (flow({"taskId": "a", "type": "approval"}), ["approvals={'a': approve()}"]),
        (
            flow({"taskId": "a", "type": "workflow", "workflowId": "below"}),
            ["workflows={'below': ...}"],
        ),
    ],
)
def test_who_is_asked_for_and_was_not_given_is_named_with_what_to_pass(
    document: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(NotFaked) as missing:
        simulate(document, agents={"gone": fake(away=True)})
    assert all(part in str(missing.value) for part in says), missing.value


def test_who_is_never_asked_for_need_not_be_given() -> None:
    run = simulate(flow(task("a"), task("b", "dear", when="false")), agents={"echo": echo})
    assert run.status == "completed" and run.tasks["b"].status == "skipped"


def test_an_approval_that_is_none_is_refused_and_so_is_what_stands_for_nobody() -> None:
    with pytest.raises(ValueError, match="'nod'; there are \\['ok'\\]"):
        simulate(flow({"taskId": "ok", "type": "approval"}), approvals={"nod": approve()})
    for odd in ({"text": "hi"}, GiveUp, None):
        with pytest.raises(TypeError, match="fake"):
            simulate(flow(task("a")), agents={"echo": odd})  # type: ignore[dict-item]


def test_the_calls_of_an_agent_nobody_gave_are_not_simply_none() -> None:
    run = simulate(flow(task("a")), agents={"echo": echo})
    with pytest.raises(KeyError):
        run.calls("ecko")


# --- Who stands for an agent


def test_a_fake_gives_its_answers_in_turn_and_then_the_last_one() -> None:
    tasks = [task(name, "writer") for name in "abc"]
    run = simulate(flow(*tasks), agents={"writer": fake("one", "two")})
    assert [one.output for one in run.tasks.values()] == ["one", "two", "two"]
    assert simulate(flow(task("a")), agents={"echo": fake()}).output is None


def test_exceptions_among_the_answers_are_raised_and_functions_called() -> None:
    writer = fake(ValueError("no"), AgentBusy, echo)
    run = simulate(flow(task("a", "writer", parameters={"x": 1})), agents={"writer": writer})
    assert (run.output, run.tasks["a"].attempts) == ({"x": 1}, 3)
    dead = simulate(flow(task("a", "writer")), agents={"writer": fake(GiveUp("no use"))})
    assert dead.error is not None
    assert (dead.status, dead.error["code"], dead.tasks["a"].attempts) == ("failed", "gave_up", 1)
    assert dead.error["message"] == "Task a: no use" and dead.error["taskDefinitionId"] == "a"


def test_a_fake_starts_anew_in_every_run() -> None:
    writer = fake("one", "two")
    for _ in range(2):
        assert simulate(flow(task("a", "writer")), agents={"writer": writer}).output == "one"


def test_a_function_sees_the_attempt_and_may_say_how_long_it_took() -> None:
    def slow_at_first(parameters: dict[str, Any], context: Context) -> Any:
        return after(700, "late") if context.attempt == 1 else after(5, "in time")

    run = simulate(flow(task("a", timeoutSeconds=60)), agents={"echo": slow_at_first})
    assert (run.output, run.seconds) == ("in time", 60 + 2 + 5)


def test_an_async_agent_works_also_where_a_loop_runs() -> None:
    async def answer(parameters: dict[str, Any], context: Context) -> Any:
        await asyncio.sleep(0)
        return after(3, {"n": parameters["n"]})

    def run() -> Any:
        return simulate(flow(task("a", parameters={"n": 1})), agents={"echo": answer})

    async def inside() -> Any:
        return run()

    for one in (run(), asyncio.run(inside())):
        assert (one.output, one.seconds) == ({"n": 1}, 3)


def test_what_an_agent_does_to_its_parameters_is_seen_by_nobody() -> None:
    def spoil(parameters: dict[str, Any], context: Context) -> int:
        parameters["list"].append("spoiled")
        return len(parameters["list"])

    tasks = [task(name, parameters={"list": "${input.list}"}) for name in "ab"]
    run = simulate(flow(*tasks), input={"list": [1]}, agents={"echo": spoil})
    assert run.calls("echo") == [{"list": [1]}] * 2 and run.output == 2


def test_what_the_declaration_of_an_agent_says_counts() -> None:
    registry = Registry()

    @registry.agent("cook", capabilities=["cooking"], capacity=1)
    def cook(parameters: dict[str, Any], context: Context) -> Any:
        return after(10, parameters["n"])

    document = flow({"taskId": "f", "agentCapability": "cooking", **each([1, 2, 3])})
    run = simulate(document, agents=registry)
    assert (run.output, run.seconds) == ([1, 2, 3], 30)
    assert simulate(document, agents={"cooking": cook}).seconds == 10  # not of `@agent`: no limit


@pytest.fixture
def effects() -> list[str]:
    """What the tool of `clerk` did."""
    return []


@pytest.fixture
def clerk(effects: list[str], monkeypatch: pytest.MonkeyPatch) -> LLMAgent:
    """An LLM agent that files something, is rate limited once, then says how that went."""
    monkeypatch.setattr(TOOLS, "_tools", {})
    monkeypatch.setattr(scripted, "_scripts", {})
    monkeypatch.setattr("opscore.agentkit.llm.SCRIPTS", scripted._scripts)
    monkeypatch.setattr("opscore.agentkit.running.SCRIPTS", scripted._scripts)

    @tool
    def file_it(text: str) -> str:
        """File something."""
        effects.append(text)
        return "filed"

    @tool(approval=True)
    def burn_it(text: str) -> str:
        """Burn something."""
        return "burnt"

    limits = [ModelBusy("429", retry_after=60)]

    @scripted.script("clerk")
    def work(request: Request) -> Reply | str:
        goal = getattr(request.messages[0], "text", "")
        if len(request.messages) == 1:
            return scripted.calls(("burn_it" if "burn" in goal else "file_it", {"text": goal}))
        if limits:
            raise limits.pop()
        return f"{goal}: {getattr(request.messages[-1], 'content', '')}"

    return LLMAgent(
        agent_id="any", model="scripted:clerk", tools=[file_it, burn_it], capabilities=["clerk"]
    )


def test_an_llm_agent_goes_on_where_it_was_rate_limited(
    clerk: LLMAgent, effects: list[str]
) -> None:
    one = {"taskId": "t", "agentCapability": "clerk", "parameters": {"goal": "A 7"}}
    run = simulate(flow(one), agents={"clerk-1": clerk})
    assert (run.status, run.output, run.seconds) == ("completed", "A 7: filed", 60)
    assert effects == ["A 7"] and run.tasks["t"].agent_id == "clerk-1"


def test_an_llm_agent_that_asks_for_an_approval_fails_and_says_that_this_is_not_played(
    clerk: LLMAgent,
) -> None:
    one = task("t", "clerk-1", parameters={"goal": "burn it"})
    run = simulate(flow(one), agents={"clerk-1": clerk})
    assert run.status == "failed" and "approvals of calls are not played" in str(run.error)


def test_the_agents_of_modules_are_given_as_they_were_loaded_and_overridden() -> None:
    @agent("of-test-testing", capabilities=["of-test-testing"], capacity=1)
    def one_at_a_time(parameters: dict[str, Any], context: Context) -> Any:
        return after(10, None)

    document = flow({"taskId": "f", "agentCapability": "of-test-testing", **each([1, 2])})
    known = load_agents([])
    assert simulate(document, agents={**known}).seconds == 20
    assert simulate(document, agents={"x": one_at_a_time}).seconds == 20
    assert simulate(document, agents={**known, "of-test-testing": fake(1)}).output == [1, 1]


# --- Time


def test_failures_are_tried_again_after_the_longest_backoff_there_may_be() -> None:
    retry = {"maxAttempts": 5, "backoffSeconds": 10, "maxBackoffSeconds": 30}
    run = simulate(flow(task("a", retry=retry)), agents={"echo": fake(*[OSError("x")] * 4, 1)})
    assert (run.output, run.seconds) == (1, 10 + 20 + 30 + 30)
    run = simulate(flow(task("a")), agents={"echo": fake(RetryLater(100), OSError("down"))})
    assert (run.status, run.tasks["a"].attempts, run.seconds) == ("failed", 3, 100 + 4)
    assert run.tasks["a"].error == {"code": "agent_error", "message": "OSError: down"}


def test_that_an_agent_is_busy_uses_up_no_attempt_until_it_is_too_long() -> None:
    busy = {"busy": {"backoffSeconds": 10, "maxBackoffSeconds": 20, "maxWaitSeconds": 100}}
    once = task("a", retry={"maxAttempts": 1}, **busy)
    run = simulate(flow(once), agents={"echo": fake(AgentBusy(), AgentBusy(), AgentBusy(1), "ok")})
    assert (run.output, run.tasks["a"].attempts, run.seconds) == ("ok", 4, 10 + 20 + 1)
    run = simulate(flow(once), agents={"echo": fake(AgentBusy())})
    assert run.error is not None
    assert (run.error["code"], run.seconds) == ("agent_busy_timeout", 100)


def test_who_takes_longer_than_its_timeout_has_not_answered() -> None:
    run = simulate(flow(task("a")), agents={"echo": fake(after(600, "late"))})
    assert run.error is not None
    assert (run.error["code"], run.seconds) == ("timeout", 3 * 600 + 2 + 4)


def test_a_line_before_an_agent_is_served_in_order_and_that_takes_its_time() -> None:
    agents = {"pair": fake(lambda p, c: after(p["n"], p["n"]), capacity=2)}
    run = simulate(flow(task("f", "pair", **each([5, 3, 1, 1]))), agents=agents)
    items = run.tasks["f"].items
    assert [(one.started, one.finished) for one in items] == [(0, 5), (0, 3), (3, 4), (4, 5)]
    assert run.seconds == 5
    wait = {"busy": {"maxWaitSeconds": 4}}
    run = simulate(flow(task("f", "pair", **each([5, 5, 1]), **wait)), agents=agents)
    assert run.tasks["f"].items[2].error == {
        "code": "agent_busy_timeout",
        "message": "Its agent was busy for all of maxWaitSeconds.",
    }


def test_of_several_with_a_capability_who_does_least_is_asked_then_who_rested_longest() -> None:
    slow = fake(lambda p, c: after(10, None), capabilities=["work"], capacity=2)
    agents = {"anna": slow, "berta": slow}
    document = flow({"taskId": "f", "agentCapability": "work", **each([1, 2, 3])})
    run = simulate(document, agents=agents)
    assert [one.agent_id for one in run.tasks["f"].items] == ["anna", "berta", "anna"]
    tasks = [{"taskId": name, "agentCapability": "work"} for name in "abc"]
    run = simulate(flow(*tasks), agents=agents)
    assert [one.agent_id for one in run.tasks.values()] == ["anna", "berta", "anna"]


def test_a_fallback_is_asked_while_who_is_wanted_is_away() -> None:
    document = flow(task("a", "writer", fallback=["ghost", "echo"]))
    away = fake(away=True)
    run = simulate(document, agents={"writer": away, "ghost": away, "echo": fake("boo")})
    assert (run.output, run.tasks["a"].agent_id) == ("boo", "echo")
    run = simulate(document, agents={"writer": fake("me"), "ghost": away, "echo": fake("boo")})
    assert run.output == "me"
    alone = flow(task("a", "writer", busy={"maxWaitSeconds": 60}))
    run = simulate(alone, agents={"writer": away})
    assert run.error is not None
    assert (run.error["code"], run.seconds) == ("agent_unavailable", 60)


def test_a_delay_is_over_when_it_is_over() -> None:
    start = datetime(2030, 1, 31, 12, tzinfo=UTC)
    document = flow(
        {"taskId": "a", "type": "delay", "seconds": "${input.n * 2}"},
        {"taskId": "b", "type": "delay", "until": "2030-01-31T13:00:00+01:00"},
        {"taskId": "c", "type": "delay", "until": "2030-02-01T12:00:00Z"},
    )
    run = simulate(document, input={"n": 30}, at=start)
    assert [one.finished for one in run.tasks.values()] == [60, 60, 86_400]


def test_a_deadline_fails_what_is_not_over_and_what_runs_is_let_end() -> None:
    document = flow(task("a", dependsOn=[]), task("b", dependsOn=["a"]), deadlineSeconds=10)
    run = simulate(document, agents={"echo": fake(after(15, "late"))})
    assert run.error is not None
    assert (run.status, run.error["code"], run.seconds) == ("failed", "deadline_exceeded", 15)
    assert (run.tasks["a"].status, run.tasks["a"].output) == ("completed", "late")
    assert (run.tasks["b"].status, run.tasks["b"].reason) == ("cancelled", "deadline_exceeded")


# --- Rules


def test_tasks_run_in_their_order_with_what_they_read() -> None:
    run = simulate(
        flow(
            task("z", parameters={"n": "${input.n + 1}"}, dependsOn=["b", "c"]),
            task("b", parameters={"n": 1}, dependsOn=[]),
            task("c", parameters={"n": "${tasks.b.output}"}, dependsOn=["b"]),
            output={"z": "${tasks.z.output.n}", "who": "${run.workflowId}"},
        ),
        input={"n": 1},
        agents={"echo": echo},
    )
    assert run.order == ["b", "c", "z"] and run.output == {"z": 2, "who": "w"}
    assert run.calls("echo") == [{"n": 1}, {"n": {"n": 1}}, {"n": 2}]


def test_approvals_say_who_decided_and_with_what_words() -> None:
    document = flow(
        {"taskId": "ok", "type": "approval", "onFailure": "continue"},
        output={"said": "${tasks.ok.output}", "why": "${tasks.ok.error}"},
    )
    run = simulate(document, approvals={"ok": approve("fine", by="key:ann")})
    said = {"approved": True, "comment": "fine", "principal": "key:ann"}
    assert run.output == {"said": said, "why": None}
    run = simulate(document, approvals={"ok": reject()})
    assert run.output["why"] == {"code": "rejected", "message": "Rejected by key:test."}


def test_a_decision_that_comes_too_late_is_the_timeouts() -> None:
    ask = {"taskId": "ok", "type": "approval", "timeoutSeconds": 60, "onTimeout": "approve"}
    run = simulate(flow(ask), approvals={"ok": after(60, reject())})
    assert (run.status, run.output["principal"], run.seconds) == ("completed", "timeout", 60)


def test_items_fail_their_for_each_unless_it_tolerates_that() -> None:
    def odd_fails(parameters: dict[str, Any], context: Context) -> Any:
        if parameters["n"] % 2:
            raise GiveUp("odd")
        return parameters["n"]

    def run(**more: Any) -> Any:
        one = task("f", **each([2, 3, 4, 5], maxParallel=1, **more.pop("each", {})), **more)
        return simulate(flow(one, task("z", "end")), agents={"echo": odd_fails, "end": fake(0)})

    failed = run()
    assert failed.error["code"] == "gave_up"
    assert failed.tasks["f"].error["code"] == "item_failed"
    states = [(one.status, one.reason) for one in failed.tasks["f"].items]
    cancelled = ("cancelled", "upstream_failed")
    assert states == [("completed", None), ("failed", None), cancelled, cancelled]
    assert run(onFailure="continue").tasks["f"].output == [2, None, 4, None]
    assert run(each={"tolerate": "50%"}).tasks["f"].output == [2, None, 4, None]
    assert run(each={"tolerate": 1}).error["code"] == "items_failed"
    lenient = run(each={"tolerate": 1}, onFailure="continue")
    assert (lenient.status, lenient.tasks["f"].error["code"]) == ("completed", "items_failed")


def test_outputs_that_cannot_be_stored_fail_as_they_would() -> None:
    def code(output: Any) -> Any:
        run = simulate(flow(task("a")), agents={"echo": fake(output)})
        assert run.error is not None and run.tasks["a"].attempts == 1
        return run.error["code"]

    assert code({"nan": math.nan}) == "invalid_output"
    assert code(object()) == "invalid_output"
    assert code("x" * 2**20) == "output_too_large"
    wide = flow(task("f", **each(list(range(17)))))
    run = simulate(wide, agents={"echo": fake("x" * (2**20 - 2))})
    assert run.error is not None and run.error["code"] == "output_too_large"
    run = simulate(flow(task("a"), output="${input.nothing}"), agents={"echo": echo})
    assert (run.status, run.tasks["a"].status) == ("failed", "completed")


# --- Sub-workflows


BELOW = {"id": "below", "tasks": [task("b", parameters={"n": "${input.n}"})]}


def call(**more: Any) -> dict[str, Any]:
    return {"taskId": "x", "type": "workflow", "workflowId": "below", **more}


def test_a_sub_workflow_is_run_with_its_input_and_seen_below_its_task() -> None:
    document = flow(call(parameters={"n": "${input.n}"}))
    run = simulate(document, input={"n": 7}, agents={"echo": echo}, workflows={"below": BELOW})
    child = run.tasks["x"].child
    assert run.output == {"n": 7} and child is not None
    assert (child.workflow_id, child.status, child.order) == ("below", "completed", ["b"])
    assert run.calls("echo") == [{"n": 7}]


def test_a_sub_workflow_may_be_faked_and_is_called_with_its_input() -> None:
    document = flow(call(parameters={"n": 7}))
    run = simulate(document, workflows={"below": fake({"text": "hi"})})
    assert (run.output, run.calls("below")) == ({"text": "hi"}, [{"n": 7}])
    run = simulate(document, workflows={"below": fake(GiveUp("no"))})
    assert run.error is not None and run.error["code"] == "child_failed"
    with pytest.raises(ValueError, match="both"):
        simulate(document, agents={"below": echo}, workflows={"below": fake(1)})


def test_sub_workflows_of_items_wait_for_their_turn_and_fail_at_their_timeout() -> None:
    document = flow(call(forEach={"items": [1, 2, 3]}, parameters={"n": "${item}"}))
    agents = {"echo": fake(after(10, 1))}
    limited = {**BELOW, "maxConcurrentRuns": 1}
    assert simulate(document, agents=agents, workflows={"below": limited}).seconds == 30
    late = flow(call(timeoutSeconds=5, parameters={"n": 1}))
    run = simulate(late, agents=agents, workflows={"below": BELOW})
    child = run.tasks["x"].child
    assert child is not None and child.error is not None and run.error is not None
    assert (run.error["code"], child.error["code"]) == ("child_failed", "deadline_exceeded")


def test_an_input_that_a_sub_workflow_refuses_fails_its_task() -> None:
    below = {**BELOW, "inputSchema": {"type": "object", "required": ["n"]}}
    run = simulate(flow(call()), workflows={"below": below})
    assert run.error is not None and run.error["code"] == "invalid_input"


def test_workflows_that_lead_back_to_themselves_are_refused() -> None:
    back = {"id": "below", "tasks": [{"taskId": "y", "type": "workflow", "workflowId": "w"}]}
    with pytest.raises(InvalidDefinition, match="faults") as refused:
        simulate(flow(call()), workflows={"below": back})
    assert "w → below → w" in refused.value.errors["/tasks/0/workflowId"][0]


# --- The whole


def test_what_became_of_a_run_is_shown_where_an_assertion_fails() -> None:
    run = simulate(flow(task("a"), task("b")), agents={"echo": fake(GiveUp("no use"))})
    assert "w failed" in repr(run) and "<b cancelled upstream_failed>" in repr(run)
    assert "gave_up" in repr(run) and "no use" in repr(run)


def test_two_runs_of_the_same_are_the_same() -> None:
    tickets = [{"id": str(n), "from": "ann@example.com", "text": "down"} for n in range(20)]

    def run() -> Any:
        return simulate(
            EXAMPLES / "support_triage.yaml",
            input={"tickets": tickets},
            agents={
                "classify": fake(OSError("x"), AgentBusy(), {"urgency": 1}, capacity=3),
                "draft-reply": fake({"ticketId": "1", "to": "a", "subject": "b", "text": "c"}),
                "write-mail": fake(after(1, "sent")),
            },
            approvals={"review": approve()},
        )

    one, other = run(), run()
    assert (repr(one), one.order, one.seconds) == (repr(other), other.order, other.seconds)
    assert one.status == "completed"


def test_a_thousand_tasks_in_a_row_and_as_many_side_by_side_are_run() -> None:
    names = [f"t{n}" for n in range(1000)]
    side = [task(f"s{n}", dependsOn=["t999"]) for n in range(1000)]
    row = [task("t0", dependsOn=[])]
    row += [task(name, dependsOn=[before]) for before, name in pairwise(names)]
    run = simulate(flow(*row, *side, output="${size(tasks.t0.output)}"), agents={"echo": echo})
    assert run.status == "completed" and len(run.calls("echo")) == 2000


def test_importing_it_loads_no_server_and_no_database() -> None:
    source = "import sys, opscore.testing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "opscore" in loaded and not loaded & {"flask", "celery", "sqlalchemy", "redis", "kombu"}
