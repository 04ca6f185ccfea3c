"""Log lines: what each is called, what it says, and that it tells of what was committed only."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rows import add_agent
from stack import ROOT

from opscore import engine, logs
from opscore.db import Database, savepoint, tell
from opscore.definition import parse
from opscore.engine import Submission
from opscore.workflows import create_workflow

PAGE = (ROOT / "docs" / "logs.md").read_text()
WRITERS = {"debug", "info", "warning", "error", "exception", "tell", "transition"}
OF_SCHEDULES = {"_event", "_decision"}


# --- The table ----------------------------------------------------------------------------------


def names_in(path: Path) -> Iterator[str]:
    """Yield what the lines of a module are called."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in WRITERS:
                yield from (text for given in node.args[:2] for text in texts_of(given))
            case ast.Call(func=ast.Name(id=name)) if name in OF_SCHEDULES:
                yield from (f"schedule.{text}" for text in texts_of(node.args[0]))
            case ast.Assign(targets=[ast.Name(id="RUN_ENDS" | "TASK_ENDS")], value=ast.Dict()):
                yield from (text for given in node.value.values for text in texts_of(given))


def texts_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Constant(value=str() as text):
            yield text
        case ast.IfExp(body=one, orelse=other):
            yield from (*texts_of(one), *texts_of(other))


def named_in_the_code() -> set[str]:
    files = [
        path
        for folder in ("opscore", "web", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if not {"sdk", "cli"} & set(path.parts)  # these speak to people
    ]
    names = {name for path in files for name in names_in(path)}
    return {name for name in names if re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", name)}


def test_the_page_names_every_line_and_no_other() -> None:
    tables = PAGE[PAGE.index("## Transitions") : PAGE.index("## Request ids")]
    first = [row.split("|")[1] for row in tables.splitlines() if row.startswith("| `")]
    named = {name for cell in first for name in re.findall(r"`([a-z_.]+)`", cell)} - {"event"}
    assert named == named_in_the_code()


def test_each_event_of_a_run_has_a_line_of_its_name() -> None:
    sources = " ".join(path.read_text() for path in (ROOT / "opscore").rglob("*.py"))
    events = set(re.findall(r"'((?:run|task)\.[a-z_]+)'", sources))
    assert len(events) > 15 and events <= named_in_the_code()


# --- After the commit ---------------------------------------------------------------------------


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Yield what gives the lines of transitions since it was asked last."""
    logs.configure("INFO", "json")

    def read() -> list[dict[str, Any]]:
        told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        return [line for line in told if line["logger"] == "opscore.transitions"]

    yield read
    logs.configure("WARNING", "json")


Lines = Callable[[], list[dict[str, Any]]]


def test_a_transition_is_logged_once_it_is_committed(database: Database, lines: Lines) -> None:
    with database.transaction() as tx:
        tell(tx, "run.paused", run_id="r")
        assert lines() == []
    assert [line["event"] for line in lines()] == ["run.paused"]
    with database.autocommit() as tx:
        tell(tx, "run.started", run_id="r")
        assert [line["event"] for line in lines()] == ["run.started"]


def test_what_is_rolled_back_is_not_logged(database: Database, lines: Lines) -> None:
    with suppress(ZeroDivisionError), database.transaction() as tx:
        tell(tx, "run.paused", run_id="r")
        raise ZeroDivisionError
    assert lines() == []
    with database.transaction() as tx:
        tell(tx, "run.due", run_id="r")
        with suppress(ZeroDivisionError), savepoint(tx):
            tell(tx, "run.queued", run_id="r")
            raise ZeroDivisionError
        with savepoint(tx):
            tell(tx, "run.queued", run_id="s")
    assert [(line["event"], line["run_id"]) for line in lines()] == [
        ("run.due", "r"),
        ("run.queued", "s"),
    ]


def test_a_transition_has_the_request_and_nothing_else_that_is_bound(
    database: Database, lines: Lines
) -> None:
    bound = {"request_id": "q", "run_id": "another", "task_id": "t", "attempt": 3}
    with logs.bound(**bound), database.autocommit() as tx:
        tell(tx, "run.paused", run_id="r", by=None)
    (line,) = lines()
    assert {"at", "level", "logger", "event", "request_id", "run_id"} == set(line)
    assert (line["request_id"], line["run_id"]) == ("q", "r")


def test_many_tasks_that_are_cancelled_are_one_line(database: Database, lines: Lines) -> None:
    tasks = [{"taskId": f"t{n}", "agentId": "x", "dependsOn": []} for n in range(50)]
    with database.transaction() as tx:
        add_agent(tx, "x")
        stored, _ = create_workflow(tx, parse({"id": "wide", "tasks": tasks}))
        plan = engine.submit_run(tx, stored, Submission(input={"secret": "swordfish"}))
    with database.transaction() as tx:
        engine.cancel_run(tx, plan.run_id, "key:0")
    with database.autocommit() as tx:
        engine.settle_run(tx, plan.run_id)
    said = lines()
    assert [line["event"] for line in said] == [
        "run.queued",
        "run.cancel_requested",
        "task.cancelled",
        "run.cancelled",
    ]
    assert said[-2]["tasks"] == 50 and said[-2]["reason"] == "run_cancelled"
    assert {line["run_id"] for line in said} == {str(plan.run_id)} and "swordfish" not in str(said)


# --- For people ---------------------------------------------------------------------------------


def test_text_has_what_json_has_in_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "text")
    try:
        logs.transition("task.started", run_id="r", task="triage", attempt=1, wake_at=None)
    finally:
        logs.configure("WARNING", "json")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\S+Z \[info +\] task\.started +\[opscore\.transitions\]"
        r" run_id=r task=triage attempt=1",
        line,
    )
