"""The four providers, each in its own format over HTTP: what is asked, answered, and goes wrong."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from wires import WIRES, Answer, Calls, Google, OpenAI, Server, Wire, in_seconds

from opscore.agentkit import Busy, Completed, Context, Failed, call, llm
from opscore.agentkit.llm import LLMAgent, check_keys
from opscore.agentkit.model import (
    Ask,
    Call,
    Message,
    ModelAway,
    ModelBusy,
    ModelError,
    ModelRefused,
    Reply,
    Request,
    Result,
    ToolSpec,
    Usage,
)
from opscore.agentkit.providers import model_of
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.steps import InMemory, dump, kind_of, load
from opscore.agentkit.tools import tool
from opscore.errors import ConfigurationError

KEY = "sk-proj-Abc123Def456Ghi789Jkl"
LOOK = ToolSpec(
    "look",
    "Look something up.",
    {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
)
OPENAI, ANTHROPIC, GOOGLE, OPENROUTER = WIRES
every = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.model.partition(":")[0])


@tool
def weather(city: str) -> str:
    """Say how the weather is."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server().running() as server:
        yield server


def environment(server: Server, *wires: Wire) -> dict[str, str]:
    """Return where keys and addresses are, of some or all."""
    found = {}
    for wire in wires or WIRES:
        found |= {wire.key_name: KEY, wire.url_name: server.url + wire.url_path}
    return found


def ask(server: Server, wire: Wire, *messages: Message, **request: Any) -> Reply:
    """Ask a model once."""

    async def asked() -> Reply:
        model = model_of(wire.model, environment(server, wire))
        values = {"timeout_seconds": 10.0, "tools": [LOOK], **request}
        try:
            return await model.complete(Request("Be brief.", messages or [Ask("Hi.")], **values))
        finally:
            await model.close()

    return asyncio.run(asked())


def failures(server: Server, wire: Wire, answers: Sequence[Answer]) -> list[ModelError]:
    """Ask once for each of some answers, none of which is one."""

    async def asked() -> list[ModelError]:
        model, faults = model_of(wire.model, environment(server, wire)), []
        for answer in answers:
            server.tell(answer)
            with pytest.raises(ModelError) as caught:
                await model.complete(Request("", [Ask("Hi.")], timeout_seconds=10))
            faults.append(caught.value)
            assert len(server.seen) == 1
        await model.close()
        return faults

    return asyncio.run(asked())


def failure(server: Server, wire: Wire, *messages: Message, **request: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ask(server, wire, *messages, **request)
    return caught.value


def run(server: Server, *models: str, **values: Any) -> tuple[Any, InMemory]:
    """Have an agent do a task; return what came of it, and its record."""
    agent = LLMAgent(
        agent_id="a", model=models[0], fallback_models=models[1:], tools=[weather], **values
    )
    record = InMemory()
    attempt = Attempt(agent, record, Means(environment=environment(server)))
    goal = {"goal": "How is the weather?"}
    return call(attempt.as_function, goal, Context.for_testing(), 30), record


# --- Answers -------------------------------------------------------------------------------------


@every
def test_a_text_comes_with_what_it_took(server: Server, wire: Wire) -> None:
    server.tell(wire.text("Hello."))
    reply = ask(server, wire)
    assert (reply.text, reply.calls, reply.model) == ("Hello.", (), wire.model)
    assert reply.usage == Usage(1000, 100, pytest.approx(wire.cost))
    assert not reply.is_cut
    (seen,) = server.seen
    assert seen.path == wire.path
    assert seen.headers[wire.key_header] == wire.key_prefix + KEY
    assert wire.instructions(seen.body) == "Be brief."
    assert wire.tools(seen.body) == {"look": LOOK.parameters}
    assert "Hi." in json.dumps(seen.body)


@every
def test_calls_come_back_with_their_results_in_the_next_request(server: Server, wire: Wire) -> None:
    server.tell(wire.calls([("look", {"q": "a"}), ("look", {"q": "b"})], "Let me see."))
    reply = ask(server, wire)
    assert reply.text == "Let me see."
    assert [(one.tool, one.arguments) for one in reply.calls] == [
        ("look", {"q": "a"}),
        ("look", {"q": "b"}),
    ]
    first, second = reply.calls
    assert first.id and second.id and first.id != second.id
    server.tell(wire.text("Done."))
    results = [Result(first.id, "look", "found a"), Result(second.id, "look", "no b", True)]
    again = load(kind_of(reply), json.loads(json.dumps(dump(reply))))
    assert isinstance(again, Reply)
    assert ask(server, wire, Ask("Hi."), again, *results).text == "Done."
    (seen,) = server.seen
    assert wire.told_calls(seen.body) == [
        (first.id, "look", {"q": "a"}),
        (second.id, "look", {"q": "b"}),
    ]
    (one, good), (other, bad) = wire.told_results(seen.body)
    assert (one, other) == (first.id, second.id)
    assert good == "found a" and "no b" in bad


@every
def test_an_agent_uses_its_tools_and_answers_as_its_schema_says(server: Server, wire: Wire) -> None:
    server.tell(
        wire.calls([("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]),
        wire.calls([("final_answer", {"days": "two"})]),
        wire.calls([("final_answer", {"days": 2})]),
    )
    schema = {
        "type": "object",
        "required": ["days"],
        "properties": {"days": {"type": "integer"}},
    }
    outcome, record = run(server, wire.model, output_schema=schema)
    assert outcome == Completed({"days": 2})
    _first, second, third = (one.body for one in server.seen)
    assert wire.tools(second)["final_answer"] == schema
    assert [content for _, content in wire.told_results(second)] == [
        "rain in Oslo",
        "rain in Rome",
    ]
    assert "Your answer does not fit" in json.dumps(third)
    assert record.budget().spent == Usage(3000, 300, pytest.approx(3 * wire.cost))


@every
def test_a_reply_cut_at_its_limit_says_so(server: Server, wire: Wire) -> None:
    server.tell(wire.text("Once upon", "length"))
    reply = ask(server, wire, max_output_tokens=2)
    assert (reply.text, reply.is_cut) == ("Once upon", True)
    assert '_tokens": 2' in json.dumps(server.seen[0].body) or '"maxOutputTokens": 2' in json.dumps(
        server.seen[0].body
    )


@every
def test_an_answer_withheld_by_a_filter_is_a_refusal(server: Server, wire: Wire) -> None:
    server.tell(wire.text("", "content_filter"))
    assert "refused to answer" in str(refused := failure(server, wire))
    assert isinstance(refused, ModelRefused)


def test_a_refusal_and_a_blocked_prompt_are_refusals_too(server: Server) -> None:
    server.tell(OPENAI.text(None, refusal="I cannot help."))  # type: ignore[call-arg]
    assert "I cannot help." in str(failure(server, OPENAI))
    blocked = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {}}
    server.tell(blocked)
    assert "PROHIBITED_CONTENT" in str(refused := failure(server, GOOGLE))
    assert isinstance(refused, ModelRefused)


@every
def test_an_empty_answer_is_one_and_can_be_asked_about(server: Server, wire: Wire) -> None:
    server.tell(wire.text(""), wire.text("Hello."))
    outcome, _record = run(server, wire.model)
    assert outcome == Completed("Hello.")
    assert "You answered nothing" in json.dumps(server.seen[1].body)


# --- What they must see again ---------------------------------------------------------------------


def signed(wire: Wire, calls: Calls) -> Any:
    """Return calls that come with what the provider wants to see again, and where that is."""
    told = wire.calls(calls)
    if wire is ANTHROPIC:
        thought = {"type": "thinking", "thinking": "Hm.", "signature": "c2lnbmVk"}
        told["content"].insert(0, thought)
    elif wire is GOOGLE:
        told["candidates"][0]["content"]["parts"][0]["thoughtSignature"] = "c2lnbmVk"
    else:
        thought = {"type": "reasoning.text", "text": "Hm.", "signature": "c2lnbmVk", "index": 0}
        told["choices"][0]["message"].update(
            {
                "reasoning": "Hm.",
                "reasoning_details": [{**thought, "format": "anthropic-claude-v1"}],
            }
        )
    return told


@pytest.mark.parametrize("wire", WIRES[1:], ids=lambda wire: wire.model.partition(":")[0])
def test_signatures_go_back_to_the_model_that_gave_them_and_to_no_other(
    server: Server, wire: Wire
) -> None:
    server.tell(signed(wire, [("look", {"q": "a"})]))
    told = ask(server, wire)
    reply = load("reply", json.loads(json.dumps(dump(told))))
    assert isinstance(reply, Reply) and "Hm." not in reply.text
    result = Result(reply.calls[0].id, "look", "found")
    for other in WIRES:
        server.tell(other.text("Done."))
        ask(server, other, Ask("Hi."), reply, result)
        (seen,) = server.seen
        assert ("c2lnbmVk" in json.dumps(seen.body)) == (other is wire)
        assert other.told_calls(seen.body) == [(reply.calls[0].id, "look", {"q": "a"})]
        assert "found" in other.told_results(seen.body)[0][1]


def test_what_another_version_has_stored_is_left_out(server: Server) -> None:
    reply = Reply("", (Call("c1", "look", {"q": "a"}),), model=GOOGLE.model, native=[{"kind": "x"}])
    server.tell(GOOGLE.text("Done."))
    assert ask(server, GOOGLE, Ask("Hi."), reply, Result("c1", "look", "found")).text == "Done."
    assert GOOGLE.told_calls(server.seen[0].body) == [("c1", "look", {"q": "a"})]


@every
def test_history_of_any_make_becomes_a_request_that_all_take(server: Server, wire: Wire) -> None:
    odd = Reply(
        " ",
        (
            Call("functions.look:0", "look at.this", {"q": "a"}),
            Call("x" * 200, "look", '{"q": tru'),
            Call("ok_1", "l" * 100, {}),
        ),
        model="other:model",
    )
    results = [Result(one.id, one.tool, f"result {n}") for n, one in enumerate(odd.calls)]
    server.tell(wire.text("Done."))
    ask(server, wire, Ask("Hi."), odd, *results, Ask("And?"))
    (seen,) = server.seen
    told = wire.told_calls(seen.body)
    assert [one[0] for one in told] == [one[0] for one in wire.told_results(seen.body)]
    assert all(id.replace("_", "").isalnum() and len(id) <= 40 for id, _, _ in told)
    assert [one[1:] for one in told] == [
        ("look_at_this", {"q": "a"}),
        ("look", {"unreadable_arguments": '{"q": tru'}),
        ("l" * 64, {}),
    ]


def test_arguments_that_are_no_object_stay_as_they_were_written(server: Server) -> None:
    written = ['{"q": tru', "[1]", "", '{"q": "a"}', "[" * 100_000]
    server.tell(OPENAI.calls([("look", one) for one in written]))
    reply = ask(server, OPENAI)
    assert [one.arguments for one in reply.calls] == [
        *written[:2],
        {},
        {"q": "a"},
        written[4],
    ]


def test_calls_without_an_id_get_one(server: Server) -> None:
    told = OPENAI.calls([("look", {"q": "a"}), ("look", {"q": "b"})])
    for one in told["choices"][0]["message"]["tool_calls"]:
        one["id"] = ""
    server.tell(told)
    first, second = ask(server, OPENAI).calls
    assert first.id and second.id and first.id != second.id


# --- Prices ---------------------------------------------------------------------------------------


def test_nothing_is_known_of_the_price_of_an_unknown_model(server: Server) -> None:
    told = OPENAI.text("Hello.")
    told["model"] = "our-own-7b"
    server.tell(told)
    assert ask(server, OPENAI).usage == Usage(1000, 100, None)


def test_openrouter_with_a_key_of_ones_own_costs_what_both_take(server: Server) -> None:
    told = OPENROUTER.text("Hello.")
    details = {"upstream_inference_cost": 0.5}
    told["usage"].update({"cost": 0.25, "is_byok": True, "cost_details": details})
    server.tell(told)
    assert ask(server, OPENROUTER).usage.cost_usd == 0.75


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_what_cannot_have_been_used_is_not_counted(server: Server, cost: float) -> None:
    told = OPENROUTER.text("Hello.")
    told["usage"].update({"cost": cost, "prompt_tokens": 10**30})
    server.tell(told)
    assert ask(server, OPENROUTER).usage == Usage(1_000_000_000, 100, None)


# --- Errors ---------------------------------------------------------------------------------------


@every
def test_what_will_not_fare_better_is_refused_with_the_reason(server: Server, wire: Wire) -> None:
    statuses = [400, 401, 403, 404, 413, 422]
    told = [Answer(wire.error(one, f"The key {KEY} is bad."), one) for one in statuses]
    faults = failures(server, wire, told)
    assert all(isinstance(fault, ModelRefused) for fault in faults)
    assert [str(fault) for fault in faults] == [
        f"{wire.model} answered {one}: The key [redacted] is bad." for one in statuses
    ]
    server.tell(told[1])
    outcome, _record = run(server, wire.model)
    assert outcome == Failed("model_refused", str(faults[1]), retryable=False)
    assert len(server.seen) == 1


@every
def test_a_rate_limit_parks_the_task_for_as_long_as_it_says(server: Server, wire: Wire) -> None:
    headers = [
        {"Retry-After": "30"},
        {"Retry-After": in_seconds(31)},
        {"retry-after-ms": "30000"},
        {"Retry-After": "soon"},
    ]
    limit = wire.error(429, "Too many requests.")
    *faults, untold = failures(server, wire, [Answer(limit, 429, one) for one in headers])
    for fault in faults:
        assert isinstance(fault, ModelBusy) and fault.retry_after is not None
        assert 20 < fault.retry_after <= 31
    assert isinstance(untold, ModelBusy) and untold.retry_after is None
    server.tell(Answer(limit, 429, headers[0]))
    assert run(server, wire.model)[0] == Busy(30.0)
    assert len(server.seen) == 1


@every
def test_a_short_rate_limit_is_waited_for(server: Server, wire: Wire) -> None:
    slow = Answer(wire.error(429, "Too many requests."), 429, {"retry-after-ms": "10"})
    server.tell(slow, wire.text("Hello."))
    assert run(server, wire.model)[0] == Completed("Hello.")
    assert len(server.seen) == 2


def test_googles_own_word_for_when_is_heard(server: Server) -> None:
    told = GOOGLE.error(429, "Quota exceeded.")
    kind = "type.googleapis.com/google.rpc."
    quota = {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}
    told["error"]["details"] = [
        {"@type": f"{kind}QuotaFailure", "violations": [quota]},
        {"@type": f"{kind}RetryInfo", "retryDelay": "39.5s"},
    ]
    server.tell(Answer(told, 429))
    busy = failure(server, GOOGLE)
    assert isinstance(busy, ModelBusy) and busy.retry_after == 39.5


def test_an_empty_account_is_no_rate_limit(server: Server) -> None:
    told = OPENAI.error(429, "You exceeded your current quota.")
    told["error"].update(type="insufficient_quota", code="insufficient_quota")
    server.tell(Answer(told, 429))
    assert isinstance(failure(server, OPENAI), ModelRefused)


@every
def test_an_overloaded_provider_is_busy(server: Server, wire: Wire) -> None:
    after = {"Retry-After": "9"}
    told = [Answer(wire.error(one, "Overloaded."), one, after) for one in (529, 503, 500)]
    for fault in failures(server, wire, told):
        assert isinstance(fault, ModelBusy) and fault.retry_after == 9


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opscore.agentkit.asking.BACKOFF_SECONDS", 0.001)


@every
@pytest.mark.usefixtures("at_once")
def test_a_fault_of_the_server_is_asked_again(server: Server, wire: Wire) -> None:
    fault = Answer(wire.error(500, "Internal."), 500)
    server.tell(fault, fault, wire.text("Hello."))
    assert run(server, wire.model)[0] == Completed("Hello.")
    assert len(server.seen) == 3
    server.tell(fault)
    outcome, _record = run(server, wire.model)
    assert outcome == Failed("model_unavailable", f"{wire.model} answered 500: Internal.")
    assert len(server.seen) == 3


GARBAGE: Sequence[Answer] = (
    Answer(b"<html>It works!</html>"),
    Answer(b"<html>It works!</html>", headers={"Content-Type": "text/html"}),
    Answer(b""),
    Answer(b"null"),
    Answer(b"[1]"),
    Answer(b'"yes"'),
    Answer({}),
    Answer({"choices": [], "content": None, "candidates": [{}]}),
    Answer({"choices": [{"message": 1}], "content": [{"type": "text"}], "candidates": 7}),
    Answer(b"\xff\xfe\x00"),
    Answer(b"<html>Bad gateway</html>", 502),
)


@every
def test_garbage_is_no_answer(server: Server, wire: Wire) -> None:
    for garbage, fault in zip(GARBAGE, failures(server, wire, GARBAGE), strict=True):
        assert isinstance(fault, ModelAway), garbage
        assert wire.model in str(fault) and len(str(fault)) <= 501


@every
def test_a_body_cut_in_its_midst_is_no_answer(server: Server, wire: Wire) -> None:
    server.tell(Answer(wire.text("Hello."), cut=True))
    assert isinstance(failure(server, wire), ModelAway)
    assert len(server.seen) == 1


@every
@pytest.mark.parametrize("way", [{"is_silent": True}, {"drips": True}], ids=["silent", "dripping"])
def test_a_call_ends_at_its_limit(server: Server, wire: Wire, way: dict[str, bool]) -> None:
    server.tell(Answer(wire.text("Hello."), **way))
    fault = failure(server, wire, timeout_seconds=0.4)
    assert isinstance(fault, ModelAway)
    assert str(fault) == f"{wire.model} did not answer within 0.4 s."
    assert len(server.seen) == 1


@every
def test_a_provider_that_is_not_there_is_away(wire: Wire) -> None:
    nowhere = Server()
    nowhere.server_close()
    assert isinstance(fault := failure(nowhere, wire), ModelAway)
    assert str(fault).startswith(f"{wire.model} cannot be reached: ")


LEAKS: Sequence[Answer] = (
    Answer(f"nothing but {KEY}".encode()),
    Answer({"error": {"message": f"{KEY} " * 500}}, 401),
    Answer({"error": {"message": "x" * 490 + KEY}}, 400),
    Answer({"error": {"message": KEY}}, 429),
    Answer({"error": KEY}, 500),
    Answer(KEY.encode(), 403),
    Answer({"id": KEY, "choices": KEY, "content": KEY, "candidates": KEY}),
    Answer(b"{}", cut=True),
)


@every
def test_a_key_is_in_nothing_that_is_told(server: Server, wire: Wire) -> None:
    for fault in failures(server, wire, LEAKS):
        told = "".join(traceback.format_exception(fault)) + repr(fault)
        assert KEY[:20] not in told
        assert fault.__cause__ is None and fault.__context__ is None
        assert len(str(fault)) <= 501
    means = Means(environment=environment(server))
    model = model_of(wire.model, means.environment)
    assert KEY not in repr(means) and KEY not in repr(model)


# --- One after the other --------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(4))
@pytest.mark.usefixtures("at_once")
def test_another_provider_goes_on_where_the_first_fails(server: Server, first: int) -> None:
    one, other = WIRES[first], WIRES[(first + 1) % 4]
    gone = Answer(one.error(401, "Your key was revoked."), 401)
    server.tell(signed(one, [("weather", {"city": "Oslo"})]), gone, other.text("It rains."))
    outcome, record = run(server, one.model, other.model)
    assert outcome == Completed("It rains.")
    assert [seen.path for seen in server.seen] == [one.path, one.path, other.path]
    body = server.seen[-1].body
    assert [one[1:] for one in other.told_calls(body)] == [("weather", {"city": "Oslo"})]
    assert [one[1] for one in other.told_results(body)] == ["rain in Oslo"]
    models = [step.model for step in record.steps if isinstance(step, Reply)]
    assert models == [one.model, other.model]


def test_nothing_is_left_open(server: Server) -> None:
    for wire in WIRES:
        server.tell(wire.text("Hello."))
        assert run(server, wire.model)[0] == Completed("Hello.")
    server.tell(Answer(GOOGLE.text("Hello."), is_silent=True))
    assert isinstance(failure(server, GOOGLE, timeout_seconds=0.2), ModelAway)
    gc.collect()  # what is not closed warns, and a warning is an error


# --- What must be there ---------------------------------------------------------------------------


@every
def test_a_model_without_a_key_is_refused(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.key_name, KEY)  # of the process: it is not looked for there
    with pytest.raises(ConfigurationError, match=f"{wire.key_name}.* is not set"):
        model_of(wire.model, {})
    with pytest.raises(ConfigurationError, match=f"{wire.key_name}.* is not set"):
        check_keys([LLMAgent(agent_id="a", model=wire.model)], {})
    check_keys([LLMAgent(agent_id="a", model=wire.model)], {wire.key_name: KEY})


def test_google_takes_either_name_for_its_key(server: Server) -> None:
    server.tell(GOOGLE.text("Hello."))
    found = {"GEMINI_API_KEY": KEY, GOOGLE.url_name: server.url}

    async def asked() -> Reply:
        model = model_of(GOOGLE.model, found)
        try:
            return await model.complete(Request("", [Ask("Hi.")]))
        finally:
            await model.close()

    assert asyncio.run(asked()).text == "Hello."
    assert server.seen[0].headers[GOOGLE.key_header] == KEY


def test_what_the_process_has_for_openai_does_not_go_to_openrouter(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-ours")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-ours")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-gateway: secret-of-ours")
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-ours")
    server.tell(OPENROUTER.text("Hello."))
    ask(server, OPENROUTER)
    told = json.dumps(server.seen[0].headers)
    assert "of-ours" not in told and KEY in told


@every
def test_a_worker_without_the_extra_is_told_what_to_install(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = wire.model.partition(":")[0]
    gone = ("no_such_package", "no_such_package.inside")
    monkeypatch.setattr(llm, "PACKAGES", {**llm.PACKAGES, provider: gone})
    agent = LLMAgent(agent_id="a", model="scripted:echo", fallback_models=[wire.model])
    with pytest.raises(ConfigurationError) as caught:
        check_keys([agent], {wire.key_name: KEY})
    assert "pip install 'opscore[agents]'" in str(caught.value)
    with pytest.raises(ConfigurationError, match="pip install"):
        model_of(wire.model, {wire.key_name: KEY})


def test_an_openrouter_model_without_its_maker_is_refused(server: Server) -> None:
    with pytest.raises(ConfigurationError, match='such as "openai/gpt-5"'):
        LLMAgent(agent_id="a", model="openrouter:gpt-4.1")


SCRIPTED = """
import sys
import opscore, opscore.agentkit, opscore.agentkit.providers
from opscore.agentkit import Context, call
from opscore.agentkit.llm import LLMAgent, check_keys
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.steps import InMemory
import workers.app, workers.llm

agent = LLMAgent(agent_id="a", model="scripted:echo")
check_keys([agent, LLMAgent(agent_id="b", model="google:x")], {"GOOGLE_API_KEY": "k"})
attempt = Attempt(agent, InMemory(), Means())
print(call(attempt.as_function, {"goal": "Hi."}, Context.for_testing(), 5).output)
heavy = {"pydantic_ai", "openai", "anthropic", "google.genai", "genai_prices", "httpx2"}
print(sorted(heavy & set(sys.modules)))
"""


def test_scripted_agents_load_nothing_of_the_providers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTED], capture_output=True, text=True, env={**os.environ}
    )
    assert (done.stdout, done.stderr) == ("Hi.\n[]\n", "")


def test_the_wires_are_four() -> None:
    assert [wire.model.partition(":")[0] for wire in WIRES] == [
        one for one in llm.KEYS if one != "scripted"
    ]
    assert isinstance(OPENAI, OpenAI) and isinstance(GOOGLE, Google)
