"""The loop of LLM agents, on scripted models: every way it may end, and where it goes on."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from opscore.agentkit import Busy, Completed, Context, Failed, call
from opscore.agentkit.llm import Limits, LLMAgent
from opscore.agentkit.loop import MAX_CALLS, MAX_TEXT_BYTES
from opscore.agentkit.model import (
    Ask,
    Call,
    ModelAway,
    ModelBusy,
    ModelRefused,
    Reply,
    Request,
    Usage,
)
from opscore.agentkit.model import Result as ToolResult
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.scripted import calls, replies, script
from opscore.agentkit.steps import (
    Asked,
    Began,
    Budget,
    Decided,
    InMemory,
    Record,
    Step,
    dump,
    kind_of,
    load,
)
from opscore.agentkit.tools import ToolFault, tool
from opscore.errors import ConfigurationError

SEEN: list[Request] = []
"""The requests of the test at hand, as its model saw them."""
ANSWERS: dict[str, Callable[[Request], Reply | str]] = {}
EFFECTS: list[str] = []


@script("under-test")
def answer(request: Request) -> Reply | str:
    SEEN.append(request)
    return ANSWERS["main"](request)


@script("second")
def second(request: Request) -> Reply | str:
    SEEN.append(request)
    return ANSWERS["second"](request)


@tool
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    EFFECTS.append(f"add {a} {b}")
    return a + b


@tool
async def fail(why: str) -> None:
    """Fail."""
    raise ValueError(why)


@tool(once=True)
def pay(amount: float) -> str:
    """Pay somebody."""
    EFFECTS.append(f"pay {amount:g}")
    return "paid"


@tool(approval=True)
def delete(path: str) -> str:
    """Delete a file."""
    EFFECTS.append(f"delete {path}")
    return "deleted"


@tool(once=True, approval=True)
def launch(site: str) -> str:
    """Launch."""
    EFFECTS.append(f"launch {site}")
    return "launched"


@tool(seconds=0.05)
def sleep_long(context: Context) -> str:
    """Sleep until the attempt is over."""
    threading.Event().wait(5)
    return context.task_id


@tool
def large(size: int) -> str:
    """Return a text."""
    return "x" * size


@tool
async def broken_off() -> None:
    """Wait for something whose connection ended."""
    raise asyncio.CancelledError("closed")


@tool
def odd() -> None:
    """Fail with a text that cannot be stored."""
    raise ToolFault("nul \0, half \ud800")


@tool(seconds=0.05)
async def stubborn() -> str:
    """Not end when it is told to."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.sleep(1)
    return "late"


@tool(seconds=0.05)
def quick() -> str:
    """Be done at once."""
    return "in time"


@tool
async def hold_up() -> None:
    """Hold up the event loop, as a record does while its database is away."""
    threading.Event().wait(0.2)


@tool
def cancel(context: Context) -> str:
    """Hear that nobody wants the result."""
    context.cancel()
    return "heard"


TOOLS = [add, fail, pay, delete, launch, sleep_long, large]
TOOLS += [broken_off, odd, stubborn, quick, hold_up, cancel]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    SEEN.clear()
    ANSWERS.clear()
    EFFECTS.clear()
    yield


def agent(**values: Any) -> LLMAgent:
    return LLMAgent(**{"agent_id": "a", "model": "scripted:under-test", "tools": TOOLS, **values})


def run(
    *turns: Reply | str,
    record: Record | None = None,
    parameters: dict[str, Any] | None = None,
    means: Means | None = None,
    **values: Any,
) -> tuple[Any, Attempt]:
    """Run an agent whose model says these turns, and return what came of it."""
    if turns:
        ANSWERS["main"] = replies(*turns)
    attempt = Attempt(agent(**values), record or InMemory(), means or Means())
    given = {"goal": "Do it."} if parameters is None else parameters
    return call(attempt.as_function, given, Context.for_testing(), 20), attempt


def outcome(*turns: Reply | str, **values: Any) -> Any:
    return run(*turns, **values)[0]


def code(*turns: Reply | str, **values: Any) -> str:
    came = outcome(*turns, **values)
    assert isinstance(came, Failed), came
    assert not came.retryable
    return came.code


# --- Answers -------------------------------------------------------------------------------------


def test_a_text_is_the_answer() -> None:
    assert outcome("Forty-two.") == Completed("Forty-two.")


def test_the_model_sees_instructions_goal_context_and_tools() -> None:
    outcome("ok", parameters={"goal": "Sum up.", "files": ["a"]}, instructions="Be brief.")
    (request,) = SEEN
    assert request.instructions == "Be brief."
    assert request.messages == [Ask('Sum up.\n\nContext, as JSON:\n{"files": ["a"]}')]
    specs = {spec.name: spec for spec in request.tools}
    assert specs["add"].description == "Add two numbers."
    assert specs["add"].parameters == {
        "type": "object",
        "additionalProperties": False,
        "required": ["a"],
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
    }
    assert specs["sleep_long"].parameters["properties"] == {}


@pytest.mark.parametrize("parameters", [{}, {"goal": ""}, {"goal": 3}, {"goal": None}])
def test_without_a_goal_nothing_is_asked(parameters: dict[str, Any]) -> None:
    assert code("ok", parameters=parameters) == "no_goal"
    assert SEEN == []


def test_tools_are_called_several_at_once_and_answered_in_order() -> None:
    record = InMemory()
    came = outcome(calls(("add", {"a": 1}), ("add", {"a": 2, "b": 5})), "done", record=record)
    assert came == Completed("done")
    results = [one.content for one in SEEN[1].messages if isinstance(one, ToolResult)]
    assert results == ["2", "7"]
    assert [kind_of(step) for step in record.steps] == ["reply", "result", "result", "reply"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("nothing", {}, "There is no tool 'nothing'; there are: add, "),
        ("add", "{broken", "The arguments do not fit: arguments: "),
        ("add", {"a": "one"}, "The arguments do not fit: a: "),
        ("add", {"a": 1, "c": 2}, "The arguments do not fit: c: "),
        ("add", None, "The arguments do not fit: arguments: "),
        ("fail", {"why": "for fun"}, "ValueError: for fun"),
        ("sleep_long", {}, "sleep_long did not answer within 0.05 s."),
        ("stubborn", {}, "stubborn did not answer within 0.05 s."),
        ("broken_off", {}, "CancelledError: closed"),
        ("odd", {}, "nul \N{REPLACEMENT CHARACTER}, half ?"),
    ],
)
def test_a_call_that_comes_to_nothing_is_told_to_the_model(
    name: str, arguments: Any, told: str
) -> None:
    assert outcome(calls((name, arguments)), "done") == Completed("done")
    result = SEEN[1].messages[-1]
    assert isinstance(result, ToolResult) and result.is_error
    assert result.content.startswith(told)


def test_a_result_counts_that_came_while_the_event_loop_was_held_up() -> None:
    outcome(calls(("quick", {}), ("hold_up", {})), "done")
    results = [one for one in SEEN[1].messages if isinstance(one, ToolResult)]
    assert [one.content for one in results] == ["in time", "null"]


def test_who_is_told_that_nobody_wants_the_result_asks_no_model_again() -> None:
    record = InMemory()
    assert outcome(calls(("cancel", {})), "done", record=record) == Busy(None)
    assert len(SEEN) == 1 and kind_of(record.steps[-1]) == "result"


def test_a_large_result_is_cut() -> None:
    outcome(calls(("large", {"size": 100_000})), "done")
    result = SEEN[1].messages[-1]
    assert isinstance(result, ToolResult)
    assert result.content.endswith("x\n[cut: 67,232 bytes more]")


# --- Answers with a schema -----------------------------------------------------------------------

OBJECT = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "said", "value"),
    [
        (OBJECT, calls(("final_answer", {"n": 3})), {"n": 3}),
        (OBJECT, '{"n": 3}', {"n": 3}),
        (OBJECT, '```json\n{"n": 3}\n```', {"n": 3}),
        ({"type": "array"}, calls(("final_answer", {"answer": [1]})), [1]),
        ({"type": "string"}, "plain", "plain"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}, "7", 7),
    ],
)
def test_an_answer_that_fits_the_schema_is_taken(schema: Any, said: Any, value: Any) -> None:
    assert outcome(said, output_schema=schema) == Completed(value)
    assert "final_answer" in [spec.name for spec in SEEN[0].tools]


@pytest.mark.parametrize("wrong", [calls(("final_answer", {"n": "x"})), "no JSON", '{"n": "x"}'])
def test_an_answer_that_does_not_fit_may_be_corrected(wrong: Reply | str) -> None:
    came = outcome(wrong, calls(("final_answer", {"n": 3})), output_schema=OBJECT)
    assert came == Completed({"n": 3})
    correction = SEEN[1].messages[-1]
    told = correction.content if isinstance(correction, ToolResult) else correction.text  # type: ignore[union-attr]
    assert told.startswith("Your answer does not fit.") and told.endswith("the whole answer again.")


def test_a_schema_that_is_never_met_ends_after_the_corrections() -> None:
    assert code("nothing of the kind", output_schema=OBJECT) == "invalid_answer"
    assert len(SEEN) == 3


def test_what_was_wrong_with_an_answer_is_told_without_its_secrets() -> None:
    means = Means(environment={"OPENAI_API_KEY": "verysecret"})
    answer = calls(("final_answer", {"n": "verysecret"}))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    came = outcome(answer, output_schema=schema, means=means)
    assert isinstance(came, Failed) and came.code == "invalid_answer"
    assert came.message.endswith(
        "/n: Does not fit the schema: '[redacted]' is not of type 'integer'."
    )


def test_calls_beside_a_final_answer_are_not_made() -> None:
    both = calls(("pay", {"amount": 1}), ("final_answer", {"n": 3}))
    assert outcome(both, output_schema=OBJECT) == Completed({"n": 3})
    assert EFFECTS == []


def test_calls_beside_a_wrong_final_answer_have_results_all_the_same() -> None:
    both = calls(("pay", {"amount": 1}), ("final_answer", {}))
    assert outcome(both, '{"n": 1}', output_schema=OBJECT) == Completed({"n": 1})
    told = [one for one in SEEN[1].messages if isinstance(one, ToolResult)]
    assert [one.call_id for one in told] == ["call-1", "call-2"]
    assert EFFECTS == []


# --- Bad models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "empty_answer"),
        (" \n", "empty_answer"),
        ("x" * 1_000_000, "answer_cut"),
        (Reply("half of", is_cut=True), "answer_cut"),
        (calls(("add", {"a": 1})), "max_steps"),
        (calls(("nothing", {})), "max_steps"),
    ],
)
def test_a_model_that_never_answers_ends_in_a_typed_failure_with_its_record(
    said: Reply | str, why: str
) -> None:
    record = InMemory()
    assert code(said, record=record, limits=Limits(max_steps=5)) == why
    assert isinstance(record.steps[0], Reply)
    assert len(json.dumps([dump(step) for step in record.steps])) < 4 * MAX_TEXT_BYTES


def test_of_very_many_calls_at_once_some_are_made() -> None:
    record = InMemory()
    outcome(calls(*[("add", {"a": n}) for n in range(500)]), "done", record=record)
    assert len(EFFECTS) == MAX_CALLS


def test_calls_with_one_id_get_ids_of_their_own() -> None:
    twins = Reply(calls=(Call("", "add", {"a": 1}), Call("", "add", {"a": 2})), native={"raw": 1})
    record = InMemory()
    assert outcome(twins, "done", record=record) == Completed("done")
    assert [s.content for s in record.steps if isinstance(s, ToolResult)] == ["2", "3"]


def test_text_that_cannot_be_stored_is_made_so() -> None:
    record = InMemory()
    came = outcome(calls(("add\0", {"a": "\ud800"})), "nul \0 end", record=record)
    assert came == Completed("nul \N{REPLACEMENT CHARACTER} end")


# --- Limits --------------------------------------------------------------------------------------


def spending(tokens: int, cost: float | None = None) -> Reply:
    wanted = calls(("add", {"a": 1}))
    return Reply(calls=wanted.calls, usage=Usage(tokens - 1, 1, cost))


@pytest.mark.parametrize(
    ("limits", "why", "replies_made"),
    [
        (Limits(max_tokens=250), "max_tokens", 3),
        (Limits(max_cost_usd=0.25), "max_cost", 3),
        (Limits(max_steps=2), "max_steps", 2),
        (Limits(max_tokens=0), "max_tokens", 0),
    ],
)
def test_limits_end_the_work(limits: Limits, why: str, replies_made: int) -> None:
    record = InMemory()
    assert code(spending(100, 0.1), limits=limits, record=record) == why
    assert sum(isinstance(step, Reply) for step in record.steps) == replies_made


def test_all_tries_of_models_together_have_the_seconds_of_the_attempt() -> None:
    def away(_: Request) -> Reply:
        raise ModelAway("no route")

    ANSWERS["main"] = away
    assert code(limits=Limits(max_seconds=0.2, call_seconds=0.1), tools=[]) == "max_seconds"


@pytest.mark.parametrize(
    "budget", [Budget(max_tokens=0), Budget(max_cost_usd=0.0), Budget(max_tokens=150)]
)
def test_a_spent_budget_stops_further_calls(budget: Budget) -> None:
    record = InMemory(budget=budget)
    assert code(spending(100, 0.1), record=record) == "budget_spent"
    assert len(SEEN) == (2 if budget.max_tokens else 0)


def test_the_oldest_tool_results_are_left_out_first_and_never_the_goal() -> None:
    turns = [calls(("large", {"size": 3_000 + n})) for n in range(4)]
    goal = "g" * 900
    outcome(*turns, "done", parameters={"goal": goal}, limits=Limits(window_tokens=3_500))
    last = SEEN[-1].messages
    assert last[0] == Ask(goal)
    results = [one.content for one in last if isinstance(one, ToolResult)]
    assert [one.startswith("[left out") for one in results] == [True, True, False, False]


# --- Models that do not answer -------------------------------------------------------------------


def raising(error: Exception, *then: Reply | str) -> Callable[[Request], Reply | str]:
    """Return a script that raises once, if anything follows, else always."""
    left = [error]

    def answer(request: Request) -> Reply | str:
        if left or not then:
            raise left.pop() if then else error
        return replies(*then)(request)

    return answer


def test_a_model_that_was_away_for_a_moment_is_asked_again() -> None:
    ANSWERS["main"] = raising(ModelAway("503"), "done")
    assert outcome() == Completed("done")
    assert len(SEEN) == 2


def test_a_model_that_stays_away_fails_the_attempt_which_is_tried_again() -> None:
    ANSWERS["main"] = raising(ModelAway("503"))
    assert outcome() == Failed("model_unavailable", "503")
    assert len(SEEN) == 3


def test_a_model_that_refuses_fails_for_good() -> None:
    ANSWERS["main"] = raising(ModelRefused("401: bad key"))
    assert outcome() == Failed("model_refused", "401: bad key", retryable=False)
    assert len(SEEN) == 1


def test_a_rate_limited_model_gives_the_task_back() -> None:
    ANSWERS["main"] = raising(ModelBusy("429", retry_after=40.0))
    assert outcome() == Busy(40.0)
    assert len(SEEN) == 1


@pytest.mark.parametrize(
    "error", [ModelAway("503"), ModelBusy("429", 40.0), ModelRefused("401")], ids=repr
)
def test_a_fallback_answers_for_a_model_that_does_not(error: Exception) -> None:
    ANSWERS["main"], ANSWERS["second"] = raising(error), replies("from the second")
    record = InMemory()
    came = outcome(record=record, fallback_models=["scripted:second"])
    assert came == Completed("from the second")
    (reply,) = record.steps
    assert isinstance(reply, Reply) and reply.model == "scripted:second"


# --- Going on ------------------------------------------------------------------------------------


class Killed(BaseException):
    """The worker's end, as far as a test in one process can have it."""


class Dying(InMemory):
    """A record whose process is killed before, or right after, it stored so many steps."""

    def __init__(self, steps: Sequence[Step], number: int, *, after: bool) -> None:
        super().__init__(steps)
        self._number, self._after = number, after

    def add(self, step: Step) -> None:
        is_last = len(self.steps) >= self._number
        if len(self.steps) > self._number or (is_last and not self._after):
            raise Killed
        super().add(step)
        if is_last:
            raise Killed


TURNS = (
    calls(("add", {"a": 1}), ("add", {"a": 2})),
    calls(("pay", {"amount": 5})),
    "All paid.",
)
KINDS = ("reply", "result", "result", "reply", "began", "result", "reply")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(7), ids=[f"{n}-{kind}" for n, kind in enumerate(KINDS)])
def test_who_takes_it_up_again_goes_on_behind_the_last_step(number: int, after: bool) -> None:
    killed = Dying((), number, after=after)
    came = outcome(*TURNS, record=killed)
    assert isinstance(came, Failed) and "Killed" in came.message
    assert [kind_of(step) for step in killed.steps] == list(KINDS[: number + after])
    record = InMemory(killed.steps)
    came, attempt = run(*TURNS, record=record)
    # Nobody knows whether it paid if it was killed between these two.
    assert attempt.needs_approval == (
        KINDS[len(killed.steps) - 1 : len(killed.steps)] == ("began",)
    )
    if attempt.needs_approval:
        record.add(Decided(False, "It was paid."))
        came, attempt = run(*TURNS, record=record)
    assert came == Completed("All paid.")
    assert EFFECTS.count("pay 5") <= 1
    # A question in flight is asked again, and none of those that were answered.
    assert len(SEEN) == 3 + (KINDS[number] == "reply" and not after)


def test_a_step_is_the_same_after_it_was_stored() -> None:
    steps = [
        Reply("t", (Call("1", "add", {"a": 1}),), Usage(1, 2, 0.5), "m", {"n": [1]}, True),
        *(Began("1"), Asked("1", "add", {"a": 1}, again=True), Decided(True, "ok", "me")),
        ToolResult("1", "add", "2", True),
    ]
    assert [load(kind_of(one), json.loads(json.dumps(dump(one)))) for one in steps] == steps


# --- Approvals -----------------------------------------------------------------------------------


def test_a_call_that_needs_approval_waits_and_shows_its_arguments() -> None:
    record = InMemory()
    both = calls(("delete", {"path": "/a"}), ("add", {"a": 1}))
    _, attempt = run(both, "done", record=record)
    assert attempt.needs_approval
    assert record.steps[-1] == Asked("call-1", "delete", {"path": "/a"})
    assert EFFECTS == ["add 1 1"]
    _, attempt = run(both, "done", record=record)
    assert attempt.needs_approval and len(record.steps) == 3, "it is asked once"


@pytest.mark.parametrize(
    ("approved", "effects", "told"),
    [
        (True, ["delete /a"], "deleted"),
        (False, [], "Refused: this call was not allowed. They say: Not that one."),
    ],
)
def test_it_goes_on_with_what_was_decided(approved: bool, effects: list[str], told: str) -> None:
    record = InMemory()
    turns = (calls(("delete", {"path": "/a"})), "done")
    run(*turns, record=record)
    record.add(Decided(approved, None if approved else "Not that one.", "key:1"))
    assert outcome(*turns, record=record) == Completed("done")
    assert effects == EFFECTS
    result = SEEN[-1].messages[-1]
    assert isinstance(result, ToolResult) and result.content == told


@pytest.mark.parametrize(
    "path", ["x" * 4_001, "x" * 4_000 + "; rm -rf /"], ids=["long", "hidden behind the cut"]
)
def test_nobody_is_asked_about_what_he_cannot_see(path: str) -> None:
    record = InMemory()
    turns = (calls(("delete", {"path": path})), "done")
    assert outcome(*turns, record=record) == Completed("done")
    result = SEEN[-1].messages[-1]
    assert isinstance(result, ToolResult) and result.content.startswith("Not asked for")
    assert EFFECTS == [] and not any(isinstance(step, Asked) for step in record.steps)


def test_two_calls_are_asked_about_one_after_the_other() -> None:
    record = InMemory()
    turns = (calls(("delete", {"path": "/a"}), ("delete", {"path": "/b"})), "done")
    run(*turns, record=record)
    record.add(Decided(True))
    _, attempt = run(*turns, record=record)
    assert attempt.needs_approval and EFFECTS == ["delete /a"]
    record.add(Decided(False))
    assert outcome(*turns, record=record) == Completed("done")
    assert EFFECTS == ["delete /a"]


def test_an_approval_counts_for_one_call_only_also_after_a_crash() -> None:
    turns = (calls(("launch", {"site": "x"})), "done")
    record = InMemory()
    run(*turns, record=record)
    record.add(Decided(True))
    record.add(Began("call-1"))  # and there the worker died
    _, attempt = run(*turns, record=record)
    assert attempt.needs_approval and EFFECTS == []
    assert record.steps[-1] == Asked("call-1", "launch", {"site": "x"}, again=True)
    record.add(Decided(True, "It did not happen."))
    assert outcome(*turns, record=record) == Completed("done")
    assert EFFECTS == ["launch x"]


# --- Declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"agent_id": "no id"}, "has a bad id"),
        ({"model": "gpt-5"}, 'write "provider:model"'),
        ({"model": "acme:one"}, "has an unknown provider 'acme': there are openai, anthropic"),
        ({"model": "scripted:none"}, "has an unknown script 'none'"),
        ({"fallback_models": ["openai:"]}, 'write "provider:model"'),
        ({"tools": ["nope"]}, "has an unknown tool 'nope'"),
        ({"tools": ["mcp_proxy_tool"]}, "has a tool mcp_proxy_tool: that name is taken"),
        ({"tools": ["final_answer"]}, "has a tool final_answer: that name is taken"),
        ({"tools": [add], "limits": Limits(call_seconds=20)}, "may take 30 s: that must be less"),
        ({"limits": Limits(call_seconds=700)}, "call_seconds (700) must be less than max_seconds"),
        ({"limits": Limits(max_steps=0)}, "max_steps must be more than 0"),
        ({"limits": Limits(max_tokens=-1)}, "max_tokens must not be less than 0"),
        ({"output_schema": {"type": "nonsense"}}, "has a bad output_schema, /type"),
    ],
)
def test_what_can_be_known_is_refused_when_it_is_declared(
    values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        agent(**values)
    assert fault in str(refused.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        agent(agent_id="", model="x", tools=["nope"])
    assert len(refused.value.faults) == 3


def test_a_model_without_a_key_is_told() -> None:
    one = agent(model="openai:gpt-5", fallback_models=["google:gemini-3", "scripted:echo"])
    assert len(one.missing_keys({})) == 2
    assert one.missing_keys({"OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k"}) == []


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda: None, "the tool name '<lambda>' must be"),
        (lambda *many: None, "must be"),
    ],
)
def test_what_can_be_no_tool_is_refused(function: Any, fault: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        tool(function)
    assert fault in str(refused.value)


def test_a_tool_says_what_it_is_for_and_names_its_parameters() -> None:
    def quiet(a: int) -> int:
        return a

    def many(*values: int) -> None:
        """Take many."""

    for function, fault in ((quiet, "has no docstring"), (many, "takes *args or **kwargs")):
        with pytest.raises(ConfigurationError) as refused:
            tool(function)
        assert fault in str(refused.value)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_tool_without_a_time_is_refused(seconds: float) -> None:
    def late() -> None:
        """Be late."""

    with pytest.raises(ConfigurationError, match="that must be more than 0"):
        tool(seconds=seconds)(late)
