"""LLM agents on real workers: killed at each step, asked about, limited; and what of it is seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from llm_fleet import PLACES
from stack import Servers, Stack, running_stack, wait_until

from opscore import engine
from opscore.errors import OpsCoreError

CRISP = {"OPSCORE_LEASE_SECONDS": "1.5", "OPSCORE_RENEW_SECONDS": "0.5"}


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("llm") / "worker.log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.llm_fleet", **CRISP) as stack:
        stack.start_worker(concurrency=3)
        yield stack


def submit(stack: Stack, agent_id: str, goal: Any, **task: Any) -> UUID:
    goal = goal if isinstance(goal, str) else json.dumps(goal)
    one = {"taskId": "t", "agentId": agent_id, "parameters": {"goal": goal}, **task}
    run_id: UUID = stack.submit({"id": "w", "tasks": [one]})
    return run_id


def the_task(stack: Stack, run_id: UUID) -> Any:
    (task,) = (task for task in stack.tasks(run_id) if task.kind != "end")
    return task


def asked(stack: Stack, run_id: UUID) -> Any:
    return wait_until(lambda: the_task(stack, run_id), says=lambda task: task.reason == "approval")


def decide(stack: Stack, task_id: UUID, approved: bool, comment: str | None = None) -> None:
    with stack.database.transaction() as tx:
        woken = engine.decide_approval(
            tx, task_id, approved=approved, comment=comment, by="key:test"
        )
    stack.dispatcher.wake(woken)


def events(stack: Stack, run_id: UUID, type: str) -> list[Any]:
    rows = stack.rows(
        "SELECT data FROM events WHERE run_id = :id AND type = :type ORDER BY seq",
        id=run_id,
        type=type,
    )
    return [row.data for row in rows]


# --- Killed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[UUID, Path]]:
    """A run for each place in which its worker is killed, all of them at once."""
    runs = {}
    for place in PLACES:
        folder = tmp_path_factory.mktemp(place)
        runs[place] = submit(stack, "six", {"folder": str(folder), "die": place}), folder
    return runs


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_worker_costs_no_answer_that_was_given(
    stack: Stack, killed: dict[str, tuple[UUID, Path]], place: str
) -> None:
    run_id, folder = killed[place]
    if place.startswith("settle"):  # nobody knows whether it paid
        task = asked(stack, run_id)
        decide(stack, task.id, place == "settle-before", "Looked it up.")
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", "All paid.")
    assert (folder / "died").exists()
    questions = (folder / "asked").read_text().split()
    again = [place.removeprefix("model-")] if place.startswith("model") else []
    assert sorted(questions) == sorted(["0", "1", "2", "3", *again])
    done = (folder / "done").read_text().splitlines()
    assert done.count("settle 5") == 1
    assert set(done) == {"note one", "note two", "note three", "settle 5"}
    assert the_task(stack, run_id).lost == 1


# --- Approvals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("approved", "heard"),
    [
        (True, "heard: deleted /a"),
        (False, "heard: Refused: this call was not allowed. They say: Keep it."),
    ],
)
def test_a_call_waits_for_approval_without_a_worker_or_a_slot(
    stack: Stack, approved: bool, heard: str
) -> None:
    run_id = submit(stack, "deleter", "Delete it.")
    task = asked(stack, run_id)
    assert task.status == "waiting"
    (slot,) = stack.rows("SELECT holder FROM slots WHERE pool = 'deleter'")
    assert slot.holder is None
    (shown,) = events(stack, run_id, "task.approval_asked")
    assert (shown["tool"], shown["arguments"]) == ("erase", {"path": "/a"})
    decide(stack, task.id, approved, None if approved else "Keep it.")
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", heard)
    assert the_task(stack, run_id).tries == 0


def refusal(stack: Stack, task_id: UUID) -> str:
    with pytest.raises(OpsCoreError) as refused:
        decide(stack, task_id, True)
    return str(refused.value)


def test_an_approval_is_decided_once_and_whoever_comes_later_is_told(stack: Stack) -> None:
    run_id = submit(stack, "deleter", "Delete it.")
    task = asked(stack, run_id)
    with stack.database.transaction() as tx:
        engine.pause_run(tx, run_id)
    decide(stack, task.id, False)
    assert refusal(stack, task.id) == "It was rejected already, by key:test."
    with stack.database.transaction() as tx:
        plans = engine.resume_run(tx, run_id)
    for plan in plans:
        stack.dispatcher.publish(plan)
    assert stack.finished(run_id).output.startswith("heard: Refused")
    assert refusal(stack, task.id) == "The task is no approval: its type is agent."


# --- Cancelled -----------------------------------------------------------------------------------


def test_of_a_cancelled_run_no_model_is_asked_anything_more(stack: Stack, tmp_path: Path) -> None:
    run_id = submit(stack, "lingerer", {"folder": str(tmp_path)})
    wait_until(lambda: (tmp_path / "lingering").exists())
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, run_id, "key:test")
    assert stack.finished(run_id).status == "cancelled"
    task = the_task(stack, run_id)
    assert (task.status, task.reason, task.error) == ("cancelled", "run_cancelled", None)
    assert (tmp_path / "asked").read_text().split() == ["once"]


# --- Busy and stopped ----------------------------------------------------------------------------


def test_a_rate_limited_provider_parks_the_task(stack: Stack, tmp_path: Path) -> None:
    run_id = submit(stack, "limited", {"folder": str(tmp_path)})
    task = wait_until(
        lambda: the_task(stack, run_id), says=lambda task: task.reason == "agent_busy"
    )
    assert task.lease_expires_at is None
    run = stack.finished(run_id)
    assert (run.status, run.output) == ("completed", "done")


@pytest.mark.parametrize(("act", "code"), [(True, "max_steps"), (False, "empty_answer")])
def test_an_agent_that_comes_to_nothing_fails_with_its_record_kept(
    stack: Stack, tmp_path: Path, act: bool, code: str
) -> None:
    run_id = submit(stack, "never", {"folder": str(tmp_path), "act": act})
    run = stack.finished(run_id)
    assert (run.status, run.error["code"]) == ("failed", code)
    (row,) = stack.rows(
        "SELECT count(*) AS steps FROM agent_steps WHERE run_id = :id AND kind = 'reply'",
        id=run_id,
    )
    assert row.steps == 3


def test_an_llm_agent_is_found_by_its_capability(stack: Stack) -> None:
    one = {"taskId": "t", "agentCapability": "echo", "parameters": {"goal": "hello"}}
    assert stack.finished(stack.submit({"id": "w", "tasks": [one]})).output == "hello"


def test_replies_and_calls_are_events_of_the_run(stack: Stack, tmp_path: Path) -> None:
    run_id = submit(stack, "six", {"folder": str(tmp_path)})
    stack.finished(run_id)
    replied = events(stack, run_id, "task.model_replied")
    assert [one["model"] for one in replied] == ["scripted:six"] * 4
    assert all(one["inputTokens"] > 0 and one["costUsd"] == 0 for one in replied)
    scene = {"folder": str(tmp_path), "die": ""}
    assert replied[0]["calls"][0] == {"tool": "note", "arguments": {"text": "one", **scene}}
    called = events(stack, run_id, "task.tool_called")
    assert [(one["tool"], one["arguments"], one["result"]) for one in called][2] == (
        *("settle", {"amount": 5, **scene}, "paid"),
    )
