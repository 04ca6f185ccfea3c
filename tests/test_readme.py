"""The README tells the truth about the tree."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack import API_KEY, Servers, Stack, running_stack, wait_until
from test_web_process import serving

from opscore import engine
from opscore.config import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_map_names_every_module_and_no_other() -> None:
    table = README[README.index("| Files | Own |") : README.index("## Settings")]
    named = set(re.findall(r"`(?:opscore/)?([a-z_]+\.py)`", table))
    there = {path.name for path in (ROOT / "opscore").glob("*.py")} - {"__init__.py"}
    assert named - {"celeryconfig.py", "tasks.py"} == there
    for folder in (
        "opscore/agentkit",
        "opscore/sdk",
        "opscore/cli",
        "workers",
        "web",
        "examples",
        "tests",
        "deploy",
    ):
        assert table.count(f"`{folder}/`") == 1 and (ROOT / folder).is_dir()


def test_the_settings_it_names_exist() -> None:
    variables = set(re.findall(r"`(OPSCORE_[A-Z_]+|DATABASE_URL|REDIS_URL)`", README))
    declared = {field.metadata["variable"] for field in fields(Settings)}
    assert variables - {"OPSCORE_API_URL"} <= declared  # which is the clients'


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(shutil.which("curl") is None, reason="the tour is made with curl")
def test_the_tours_run_as_they_are_written() -> None:
    tours = re.findall(r"```sh\n(.+?)```", README, re.DOTALL)
    setup, _, script = "".join(tours).partition("\n")  # all in one shell
    assert setup.startswith("make setup")
    folder = Path(tempfile.mkdtemp(prefix="opscore-test-"))
    folder.chmod(0o755)  # nobody, who runs PostgreSQL for root, may pass
    (folder / "examples").symlink_to(ROOT / "examples")
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": commands, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=110,
        )
    finally:
        subprocess.run(
            [sys.executable, "-m", "opscore", "down", "--data", str(folder / ".opscore")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=folder,
            capture_output=True,
        )
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [
        *("look version 1", "run.completed", "output:\n  {", "list-distributions", "All is well."),
        *("completed {", "run.completed", "release version 1"),
        *("because:  start_at", " is cancelled.", " is paused.", "\nRun "),
        *("Approved; run ", "Looks good.", "Rejected; see run ", "Not today."),
        *("error:\n  Task list: ", "(gave_up)", "\nRun ", "Approved; run ", "All is well."),
        *("name:     nightly", "IN\n", "output:\n  {", "started", "completed", "every 15 min"),
        *("next:     paused", "look is archived.", "look is not archived.", "Deleted nightly."),
        *("schedule.deleted", "schedule.paused", "schedule.changed", "schedule.triggered"),
        "Stopped.",
    ]
    rest = done.stdout
    for words in told:
        before, found, rest = rest.partition(words)
        assert found, (words, before)


def python_with(word: str) -> str:
    """Return the one program it shows that has this word."""
    shown = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    (source,) = [source for source in shown if word in source]
    return str(source)


def test_the_remote_agent_it_shows_is_the_example() -> None:
    example = (ROOT / "examples/remote_agent.py").read_text()
    assert example.endswith(f'"""\n\n{python_with("AgentServer")}')


def test_the_agent_it_shows_runs_as_pasted() -> None:
    source = python_with("# my_agents.py")
    names: dict[str, object] = {"__name__": "my_agents"}
    exec(source, names)
    from opscore import AgentBusy, Context

    triage, write = names["triage"], names["write"]
    assert callable(triage) and triage({"ticket": "fire"}, Context.for_testing())["urgent"]
    assert callable(write)
    assert write({"topic": "queues"}, Context.for_testing()) == {"text": "All about queues"}
    with pytest.raises(AgentBusy):
        write({"topic": "queues", "quota": 0}, Context.for_testing())


def test_the_unit_test_it_shows_passes_as_pasted(tmp_path: Path) -> None:
    agents, test = python_with("# my_agents.py"), python_with("opscore.testing")
    digest, _ = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    for name, source in [("my_agents.py", agents), ("support-digest.yaml", digest)]:
        (tmp_path / name).write_text(source)
    (tmp_path / "test_digest.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_digest.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_workflows_and_the_client_it_shows_run_on_the_agents_it_shows(
    servers: Servers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client, source = python_with("OpsCoreClientSync"), python_with("# my_agents.py")
    first, second = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    (tmp_path / "my_agents.py").write_text(source)
    env = {"OPSCORE_AGENTS": "my_agents", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with running_stack(servers, tmp_path / "log", **env) as stack:
        stack.start_worker()
        tickets = {"tickets": ["fire", "water", "air"]}
        run = stack.finished(stack.submit(yaml.safe_load(first), tickets))
        assert (run.status, run.output) == ("completed", {"text": "All about 3 tickets"})
        for approved, output in [
            (True, {"sent": {"text": "All about All about 3 tickets"}, "escalated": None}),
            (False, {"sent": None, "escalated": {"text": "All about no"}}),
        ]:
            run_id = stack.submit(yaml.safe_load(second), tickets)
            decide(stack, run_id, approved)
            run = stack.finished(run_id)
            assert (run.status, run.output) == ("completed", output)
        with serving(stack.environment, tmp_path / "web.log") as (_, port):
            monkeypatch.setenv("OPSCORE_API_URL", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("OPSCORE_API_KEY", API_KEY)
            capsys.readouterr()
            exec(client, {})
        said = capsys.readouterr().out.splitlines()
        assert [said[0], *said[-2:]] == [
            "run.queued None",
            "run.completed None",
            "{'text': 'All about 3 tickets'}",
        ]


def decide(stack: Stack, run_id: Any, approved: bool) -> None:
    """Approve or reject what a run asks for, once it does."""
    (task,) = wait_until(
        lambda: [task for task in stack.tasks(run_id) if task.reason == "approval"]
    )
    with stack.database.transaction() as tx:
        woken = engine.decide_approval(tx, task.id, approved=approved, comment="no", by="key:test")
    stack.dispatcher.wake(woken)
