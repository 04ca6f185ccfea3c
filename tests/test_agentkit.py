"""Function agents: declaring and finding them, what they are told, what comes of a call."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from opscore import AgentBusy, Context, GiveUp, RetryLater, agent
from opscore.agentkit import Busy, Completed, Failed, Registry, call
from opscore.agentkit.context import MAX_UNDRAINED
from opscore.errors import ConfigurationError

LONG = 30.0
SHORT = 0.05
NEVER = threading.Event()
"""Nobody sets it: waiting for it is what an agent without end does."""


def outcome_of(function: Callable[..., Any], seconds: float = LONG, **parameters: Any) -> Any:
    registry = Registry()
    registry.agent("subject")(function)
    return call(registry["subject"], parameters, Context.for_testing(), seconds)


def in_a_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(LONG)
    return results[0]


# What comes of a call


def test_an_answer_completes() -> None:
    assert outcome_of(lambda parameters, context: parameters["n"] + 1, n=1) == Completed(2)


def test_an_async_agent_completes() -> None:
    async def double(parameters: dict[str, Any], context: Context) -> int:
        await asyncio.sleep(0)
        return int(parameters["n"]) * 2

    assert outcome_of(double, n=4) == Completed(8)


def test_a_plain_function_that_returns_a_coroutine_is_awaited() -> None:
    async def answer() -> str:
        return "late bound"

    assert outcome_of(lambda parameters, context: answer()) == Completed("late bound")


def test_an_agent_is_told_its_attempt() -> None:
    def tell(parameters: dict[str, Any], context: Context) -> list[Any]:
        return [context.run_id, context.task_id, context.attempt, context.idempotency_key]

    assert outcome_of(tell) == Completed(["test-run", "test-task", 1, "test-task"])


def test_changing_the_parameters_changes_nothing_of_the_callers() -> None:
    registry, given = Registry(), {"n": 1}
    registry.agent("subject")(lambda parameters, context: parameters.clear())
    call(registry["subject"], given, Context.for_testing(), LONG)
    assert given == {"n": 1}


def raiser(error: BaseException) -> Callable[..., Any]:
    def agent_function(parameters: dict[str, Any], context: Context) -> None:
        raise error

    return agent_function


@pytest.mark.parametrize(("asked", "given"), [(None, None), (5, 5.0), (-1, 0.0), ("soon", None)])
def test_agent_busy_is_busy(asked: Any, given: float | None) -> None:
    assert outcome_of(raiser(AgentBusy(asked))) == Busy(given)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (2.5, 2.5),
        (float("nan"), None),
        (float("inf"), 365 * 86_400.0),
        pytest.param(10**400, 365 * 86_400.0, id="huge"),
    ],
)
def test_retry_later_fails_and_may_be_retried_after_that_time(
    asked: float, given: float | None
) -> None:
    failed = outcome_of(raiser(RetryLater(asked, "no quota")))
    assert failed == Failed("retry_later", "no quota", retry_after=given)
    assert failed.retryable


def test_give_up_fails_for_good() -> None:
    assert outcome_of(raiser(GiveUp("no such page"))) == Failed(
        "gave_up", "no such page", retryable=False
    )


@pytest.mark.parametrize(
    "error", [ValueError("bad"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
def test_anything_else_raised_is_an_agent_error_with_its_traceback(error: BaseException) -> None:
    failed = outcome_of(raiser(error))
    assert (failed.code, failed.retryable) == ("agent_error", True)
    assert failed.message.startswith(type(error).__name__)
    assert failed.traceback.splitlines()[1].endswith("in agent_function")


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), KeyboardInterrupt()])
def test_what_an_async_agent_raises_is_an_agent_error_too(error: BaseException) -> None:
    async def fail(parameters: dict[str, Any], context: Context) -> None:
        raise error

    failed = outcome_of(fail)
    assert failed.code == "agent_error"
    assert failed.traceback.splitlines()[1].endswith("in fail")


def test_a_timeout_error_of_the_agents_own_is_no_timeout() -> None:
    async def fail(parameters: dict[str, Any], context: Context) -> None:
        raise TimeoutError("the page did not load")

    assert outcome_of(fail).code == "agent_error"


def test_messages_and_tracebacks_are_bounded_and_storable() -> None:
    def fail(parameters: dict[str, Any], context: Context) -> None:
        def deeper(level: int) -> None:
            if level == 0:
                raise ValueError("\0\ud800" + "é" * 10_000)
            exec("deeper(level - 1)", {"deeper": deeper, "level": level})

        deeper(100)

    failed = outcome_of(fail)
    assert len(failed.message.encode()) <= 4096
    assert len(failed.traceback.encode()) <= 8192
    assert "\0" not in failed.message
    assert failed.message.endswith("…")


def test_an_error_without_a_readable_message_is_still_an_outcome() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "whose __str__ raised RuntimeError" in outcome_of(raiser(Odd())).message


def test_a_worker_that_is_being_ended_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from billiard import common

    monkeypatch.setattr(common, "_should_have_exited", [True])
    with pytest.raises(SystemExit) as ended:
        outcome_of(raiser(SystemExit(-241)))
    assert ended.value.code == -241
    with pytest.raises(SystemExit):
        outcome_of(raiser(ValueError("clean-up failed on the way out")))


def test_celerys_own_shutdown_passes() -> None:
    from celery.exceptions import WorkerTerminate

    with pytest.raises(WorkerTerminate):
        outcome_of(raiser(WorkerTerminate(1)))


# Outputs


class Colour(StrEnum):
    RED = "red"


@dataclass
class Point:
    x: int
    labels: tuple[str, ...]


@pytest.mark.parametrize(
    ("returned", "stored"),
    [
        (None, None),
        ((1, 2.5, True, "é"), [1, 2.5, True, "é"]),
        (Colour.RED, "red"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00Z"),
        (datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T01:00:00Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (UUID(int=0), "00000000-0000-0000-0000-000000000000"),
        (Decimal("1.10"), "1.10"),
        ({"p": Point(1, ("a",))}, {"p": {"x": 1, "labels": ["a"]}}),
    ],
)
def test_python_values_are_stored_as_json(returned: Any, stored: Any) -> None:
    outcome = outcome_of(lambda parameters, context: returned)
    assert outcome == Completed(stored)
    assert type(outcome.output) is type(stored)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def shared(depth: int) -> list[Any]:
    value: list[Any] = [0]
    for _ in range(depth):
        value = [value, value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("returned", "place"),
    [
        ({"a/b": [0, float("nan")]}, "/a~1b/1"),
        (float("inf"), "as a whole"),
        ({"text": "a\0b"}, "/text"),
        (["\ud800"], "/0"),
        ({"a\0": 1}, "NUL"),
        ({"ids": {1, 2}}, "/ids"),
        ({"by_id": {1: "one"}}, "/by_id"),
        (datetime(2026, 1, 2), "time zone"),
        (b"bytes", "bytes"),
        (Point, "type"),
        (nested(65), "64 deep"),
        (endless(), "64 deep"),
        pytest.param(10**5000, "64 bit", id="huge-number"),
    ],
)
def test_an_output_that_is_no_storable_json_fails_for_good_naming_the_place(
    returned: Any, place: str
) -> None:
    failed = outcome_of(lambda parameters, context: returned)
    assert (failed.code, failed.retryable) == ("invalid_output", False)
    assert place in failed.message


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        pytest.param("x" * (2**20 - 1), "takes 1,048,577 bytes", id="text"),
        pytest.param(["x" * 2**20] * 30, "takes more than 16,777,216 bytes", id="shared-text"),
        pytest.param([0] * 600_000, "more than 550,000 values", id="list"),
        pytest.param(shared(50), "more than 550,000 values", id="shared-lists"),
    ],
)
def test_an_output_that_is_too_large_fails_for_good_and_says_how_large_it_is(
    returned: Any, told: str
) -> None:
    failed = outcome_of(lambda parameters, context: returned)
    assert (failed.code, failed.retryable) == ("output_too_large", False)
    assert told in failed.message


def test_the_largest_permitted_outputs_complete() -> None:
    assert isinstance(outcome_of(lambda parameters, context: nested(64)), Completed)
    assert isinstance(outcome_of(lambda parameters, context: "x" * (2**20 - 2)), Completed)


# Time limits


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Collect alarms that reach nobody; what a test finds of handler and timer it leaves behind.

    pytest's own time limit, which uses the same signal, is laid aside meanwhile.
    """
    rung: list[int] = []

    def ring(number: int, frame: object) -> None:
        rung.append(number)

    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, ring)
    yield rung
    found = signal.signal(signal.SIGALRM, before), signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, left)
    assert found == (ring, (0.0, 0.0))


def test_an_alarm_around_the_call_goes_on_where_it_was(alarms: list[int]) -> None:
    signal.setitimer(signal.ITIMER_REAL, LONG)
    outcome_of(lambda parameters, context: None, SHORT)
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    assert LONG - 5 < left <= LONG


def test_a_plain_agent_is_stopped_at_its_limit(alarms: list[int]) -> None:
    started = time.monotonic()
    failed = outcome_of(lambda parameters, context: NEVER.wait(LONG), SHORT)
    assert failed == Failed("timeout", "The agent did not finish within 0.05 s.")
    assert time.monotonic() - started < 2
    assert alarms == []


def test_a_limit_of_nothing_stops_the_agent_before_it_starts() -> None:
    called: list[bool] = []
    assert outcome_of(lambda parameters, context: called.append(True), 0).code == "timeout"
    assert called == []


def test_the_smallest_limits_hold(alarms: list[int]) -> None:
    for exponent in range(1, 10):
        limit = 10.0**-exponent / 10
        assert outcome_of(lambda parameters, context: NEVER.wait(LONG), limit).code == "timeout"


def test_catching_every_exception_does_not_defeat_the_limit(alarms: list[int]) -> None:
    def stubborn(parameters: dict[str, Any], context: Context) -> str:
        while True:
            try:
                NEVER.wait(LONG)
            except Exception:
                continue

    assert outcome_of(stubborn, SHORT).code == "timeout"


def test_swallowing_the_alarm_itself_only_delays_it(
    alarms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opscore.agentkit.calling.ALARM_AGAIN_SECONDS", SHORT)
    swallowed: list[bool] = []

    def stubborn(parameters: dict[str, Any], context: Context) -> None:
        while True:
            try:
                NEVER.wait(LONG)
            except BaseException:
                swallowed.append(True)
                if len(swallowed) == 3:
                    raise

    assert outcome_of(stubborn, SHORT).code == "timeout"
    assert len(swallowed) == 3


def test_an_answer_made_of_the_swallowed_alarm_is_still_a_timeout(alarms: list[int]) -> None:
    def stubborn(parameters: dict[str, Any], context: Context) -> str:
        with contextlib.suppress(BaseException):
            NEVER.wait(LONG)
        return "as if nothing had happened"

    assert outcome_of(stubborn, SHORT).code == "timeout"


def test_an_alarm_after_the_return_escapes_nowhere(alarms: list[int]) -> None:
    """Aim the alarm at the moment of return, many times, from before it to after it."""
    codes = set()
    for step in range(300):
        until = time.monotonic() + 0.002

        def spin(parameters: dict[str, Any], context: Context, until: float = until) -> str:
            while time.monotonic() < until:
                pass
            return "done"

        outcome = outcome_of(spin, 0.0018 + step * 0.000002)
        codes.add(outcome.code if isinstance(outcome, Failed) else "completed")
    assert codes <= {"timeout", "completed"}
    assert alarms == []


def test_an_agent_called_by_an_agent_has_a_limit_of_its_own(alarms: list[int]) -> None:
    def outer(parameters: dict[str, Any], context: Context) -> Any:
        inner = outcome_of(lambda parameters, context: NEVER.wait(LONG), SHORT)
        return inner.code

    assert outcome_of(outer) == Completed("timeout")


def test_an_agent_called_by_an_agent_cannot_outlast_it(alarms: list[int]) -> None:
    def outer(parameters: dict[str, Any], context: Context) -> None:
        outcome_of(lambda parameters, context: NEVER.wait(LONG), LONG)
        NEVER.wait(LONG)

    started = time.monotonic()
    assert outcome_of(outer, SHORT).code == "timeout"
    assert time.monotonic() - started < 2


def test_an_async_agent_is_cancelled_at_its_limit_and_may_clean_up(alarms: list[int]) -> None:
    cleaned: list[bool] = []

    async def endless_agent(parameters: dict[str, Any], context: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    assert outcome_of(endless_agent, SHORT).code == "timeout"
    assert cleaned == [True]


def test_an_async_agent_that_blocks_its_loop_is_stopped(
    alarms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opscore.agentkit.calling.ALARM_AGAIN_SECONDS", SHORT)

    async def blocking(parameters: dict[str, Any], context: Context) -> None:
        NEVER.wait(LONG)

    assert outcome_of(blocking, SHORT).code == "timeout"


def test_an_async_agent_that_swallows_its_cancellation_is_stopped(
    alarms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opscore.agentkit.calling.ALARM_AGAIN_SECONDS", SHORT)

    async def stubborn(parameters: dict[str, Any], context: Context) -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    assert outcome_of(stubborn, SHORT).code == "timeout"


def test_in_another_thread_a_late_answer_is_a_timeout_and_the_agent_is_told() -> None:
    told: list[bool] = []

    def wait_to_be_told(parameters: dict[str, Any], context: Context) -> str:
        while not context.cancelled:
            NEVER.wait(SHORT / 10)
        told.append(True)
        return "late"

    assert in_a_thread(lambda: outcome_of(wait_to_be_told, SHORT)).code == "timeout"
    assert told == [True]


def test_in_another_thread_an_async_agent_is_cancelled_at_its_limit() -> None:
    async def endless_agent(parameters: dict[str, Any], context: Context) -> None:
        await asyncio.Event().wait()

    assert in_a_thread(lambda: outcome_of(endless_agent, SHORT)).code == "timeout"


def test_in_another_thread_an_answer_in_time_completes() -> None:
    assert in_a_thread(lambda: outcome_of(lambda parameters, context: 1)) == Completed(1)


# Context


def test_a_context_gives_its_entries_and_newest_progress_once() -> None:
    context = Context.for_testing()
    context.log("fetched", pages=3)
    context.progress(0.25)
    context.progress(2, "nearly")
    entries, progress = context.drain()
    assert [(entry.message, entry.fields) for entry in entries] == [("fetched", {"pages": 3})]
    assert progress is not None
    assert (progress.fraction, progress.message) == (1.0, "nearly")
    assert context.drain() == ([], None)


def test_logging_never_raises_and_is_storable() -> None:
    context = Context.for_testing()
    context.log("\0" + "é" * 5000, when=datetime.now(UTC), path=Path("/x"), emoji="🙂")
    context.log("odd", number=float("nan"))
    context.log("odd", text="\0")
    context.log("large", text="x" * 20_000)
    context.log("endless", value=endless())
    (long, *odd), _ = context.drain()
    assert len(long.message.encode()) <= 4096
    assert "\0" not in long.message
    assert long.fields["path"] == "/x"
    assert long.fields["emoji"] == "🙂"
    assert [list(entry.fields) for entry in odd] == [["unstorable"]] * 4


def test_of_too_many_entries_the_oldest_are_cut_and_counted() -> None:
    context = Context.for_testing()
    for number in range(MAX_UNDRAINED + 7):
        context.log(f"{number}")
    entries, _ = context.drain()
    assert entries[0].fields == {"cut": 7}
    assert [entries[1].message, entries[-1].message] == ["7", str(MAX_UNDRAINED + 6)]


def test_entries_of_several_threads_are_all_kept_while_another_drains() -> None:
    context, seen, over = Context.for_testing(), [], threading.Event()

    def write() -> None:
        for number in range(200):
            context.log("entry", number=number)

    def drain() -> None:
        while not over.is_set():
            seen.extend(context.drain()[0])

    writers = [threading.Thread(target=write) for _ in range(4)]
    reader = threading.Thread(target=drain)
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join(LONG)
    over.set()
    reader.join(LONG)
    seen.extend(context.drain()[0])
    assert len(seen) == 800


@pytest.mark.parametrize("fraction", [float("nan"), "half", None])
def test_progress_that_is_no_number_is_refused(fraction: Any) -> None:
    with pytest.raises(ValueError, match="fraction must be a number"):
        Context.for_testing().progress(fraction)


def test_a_context_is_read_only_and_its_deadline_aware() -> None:
    context = Context.for_testing(
        deadline=datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))
    )
    assert context.deadline.isoformat() == "2025-12-31T23:00:00+00:00"
    with pytest.raises(AttributeError):
        context.attempt = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="aware"):
        Context.for_testing(deadline=datetime(2026, 1, 1))


def test_a_context_says_by_what_it_is_followed() -> None:
    context = Context.for_testing(request_id="r-1")
    assert (context.request_id, context.traceparent) == ("r-1", None)


def test_cancelling_is_seen() -> None:
    context = Context.for_testing()
    assert not context.cancelled
    context.cancel()
    assert context.cancelled


# Declaring and finding agents


def test_a_declared_function_stays_what_it_was() -> None:
    registry = Registry()

    @registry.agent("shout", capabilities=["text", "text"], capacity=2, version="3", name="Shouter")
    def shout(parameters: dict[str, Any], context: Context) -> str:
        return str(parameters["text"]).upper()

    assert shout({"text": "a"}, Context.for_testing()) == "A"
    declared = registry["shout"]
    assert declared.function is shout
    assert (declared.name, declared.version) == ("Shouter", "3")
    assert (declared.capabilities, declared.capacity) == (("text",), 2)


def test_a_plain_declaration_has_no_limit_and_is_named_by_its_id() -> None:
    registry = Registry()
    registry.agent("plain")(lambda parameters, context: None)
    declared = registry["plain"]
    assert (declared.name, declared.version, declared.capacity) == ("plain", "1", None)


def test_two_functions_with_one_id_are_refused_naming_both_places() -> None:
    def twin(parameters: dict[str, Any], context: Context) -> None: ...

    registry = Registry()
    registry.agent("twin")(twin)
    registry.agent("twin")(twin)  # the same function again: a module imported twice
    with pytest.raises(ConfigurationError, match=r"'twin'.* twice.*test_agentkit.py:\d+.*:\d+"):
        registry.agent("twin")(lambda parameters, context: None)


def generator(parameters: dict[str, Any], context: Context) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("declaration", "function", "fault"),
    [
        ({"agent_id": "no spaces"}, raiser, "bad id"),
        ({"agent_id": "x" * 65}, raiser, "bad id"),
        ({"agent_id": "a\n"}, raiser, "bad id"),
        ({"agent_id": None}, raiser, "bad id"),
        ({"capabilities": "text"}, raiser, r"write capabilities=\['text'\]"),
        ({"capabilities": ["a b"]}, raiser, "bad capability"),
        ({"capacity": 0}, raiser, "capacity=0"),
        ({"capacity": True}, raiser, "capacity=True"),
        ({"capacity": 1.5}, raiser, "capacity=1.5"),
        ({"version": 1}, raiser, 'such as version="1"'),
        ({"name": ""}, raiser, "name=''"),
        ({}, Point, "must stand above a function"),
        ({}, generator, "instead of yielding"),
        ({}, lambda parameters: None, r"f\(parameters, context\)"),
    ],
)
def test_a_bad_declaration_is_refused_with_the_way_out(
    declaration: dict[str, Any], function: Any, fault: str
) -> None:
    if function is raiser:
        function = lambda parameters, context: None  # noqa: E731
    with pytest.raises(ConfigurationError, match=fault):
        Registry().agent(**{"agent_id": "subject", **declaration})(function)


def test_every_fault_of_a_declaration_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        Registry().agent("no spaces", capacity=0)(generator)
    assert len(refused.value.faults) == 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder that is not on the Python path yet; what it added is removed."""
    known, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


DECLARATION = "from opscore import agent\n@agent('{id}')\ndef f(parameters, context): ...\n"


def test_modules_are_found_in_the_current_folder(folder: Path) -> None:
    from opscore.agentkit import load_agents

    (folder / "kit").mkdir()
    (folder / "kit" / "found_here.py").write_text(DECLARATION.format(id="found-here"))
    loaded = load_agents(["kit.found_here"])
    assert loaded["found-here"].function.__module__ == "kit.found_here"
    assert load_agents(["kit.found_here"])["found-here"] is loaded["found-here"]


def test_every_faulty_module_is_named_at_once(folder: Path) -> None:
    (folder / "raises.py").write_text("def f():\n    raise RuntimeError('boom')\nf()\n")
    (folder / "leaves.py").write_text("raise SystemExit(1)\n")
    (folder / "needs.py").write_text("import not_installed_anywhere\n")
    (folder / "plain.py").write_text("x = 1\n")
    (folder / "broken.py").write_text("def (:\n")
    (folder / "declares.py").write_text(DECLARATION.format(id="no spaces"))
    names = [
        "raises",
        "leaves",
        "needs",
        "plain",
        "broken",
        "declares",
        "missing",
        "a/plain.py",
        "",
    ]
    with pytest.raises(ConfigurationError) as refused:
        Registry().load(names)
    text = str(refused.value)
    assert len(refused.value.faults) == len(names)
    assert "module raises cannot be imported: RuntimeError: boom" in text
    assert "raises.py:2" in text
    assert "module leaves cannot be imported: SystemExit" in text
    assert "No module named 'not_installed_anywhere'" in text
    assert "module plain declares no agent" in text
    assert "module broken cannot be imported: SyntaxError" in text and "broken.py:1)" in text
    assert "frozen" not in text
    assert "module declares: @agent('no spaces') has a bad id" in text
    assert "there is no module missing" in text
    assert "a module's name, not a file's: a.plain" in text


def test_a_module_that_only_gathers_agents_counts(folder: Path) -> None:
    from opscore.agentkit import load_agents

    (folder / "gathered_one.py").write_text(DECLARATION.format(id="gathered-one"))
    (folder / "gathering.py").write_text("import gathered_one\n")
    assert "gathered-one" in load_agents(["gathering"])
    assert "gathered-one" in load_agents(["gathering", "gathered_one"])


def test_what_the_package_offers_loads_nothing_heavy() -> None:
    heavy = ["flask", "celery", "sqlalchemy", "asyncio", "cel"]
    program = f"import opscore, sys; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[]\n"
    assert callable(agent)
