"""The README tells the truth about the tree."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from stack import Servers, running_stack

from opscore.config import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_map_names_every_module_and_no_other() -> None:
    table = README[README.index("| Files | Own |") : README.index("## Settings")]
    named = set(re.findall(r"`(?:opscore/)?([a-z_]+\.py)`", table))
    there = {path.name for path in (ROOT / "opscore").glob("*.py")} - {"__init__.py"}
    assert named - {"celeryconfig.py", "tasks.py"} == there
    for folder in ("opscore/agentkit", "workers", "web", "examples", "tests"):
        assert f"{folder.removeprefix('opscore/')}/" in table and (ROOT / folder).is_dir()


def test_the_settings_it_names_exist() -> None:
    variables = set(re.findall(r"`(OPSCORE_[A-Z_]+|DATABASE_URL|REDIS_URL)`", README))
    declared = {field.metadata["variable"] for field in fields(Settings)}
    assert variables <= declared


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(shutil.which("curl") is None, reason="the tour is made with curl")
def test_the_tour_runs_as_it_is_written() -> None:
    (tour,) = re.findall(r"```sh\n(.+?)```", README, re.DOTALL)
    setup, _, script = tour.partition("\n")
    assert setup.startswith("make setup")
    folder = Path(tempfile.mkdtemp(prefix="opscore-test-"))
    folder.chmod(0o755)  # nobody, who runs PostgreSQL for root, may pass
    (folder / "examples").symlink_to(ROOT / "examples")
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": commands},
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
    assert "\ncompleted {" in done.stdout
    assert "run.completed" in done.stdout


def test_the_agent_it_shows_runs_as_pasted() -> None:
    (source,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(source, names)
    from opscore import AgentBusy, Context

    triage, write = names["triage"], names["write"]
    assert callable(triage) and triage({"ticket": "fire"}, Context.for_testing())["urgent"]
    assert callable(write)
    assert write({"topic": "queues"}, Context.for_testing()) == {"text": "All about queues"}
    with pytest.raises(AgentBusy):
        write({"topic": "queues", "quota": 0}, Context.for_testing())


def test_the_workflow_it_shows_runs_on_the_agents_it_shows(
    servers: Servers, tmp_path: Path
) -> None:
    (source,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    (document,) = re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    (tmp_path / "my_agents.py").write_text(source)
    env = {"OPSCORE_AGENTS": "my_agents", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with running_stack(servers, tmp_path / "log", **env) as stack:
        stack.start_worker()
        run_id = stack.submit(yaml.safe_load(document), {"tickets": ["fire", "water", "air"]})
        run = stack.finished(run_id)
        assert (run.status, run.output) == ("completed", {"text": "All about 3 tickets"})
