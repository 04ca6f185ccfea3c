"""What `pip install opscore` brings is enough for clients and agents, as the README says."""

import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WITHOUT_OTHERS = """
import pkgutil, sys
from importlib.abc import MetaPathFinder

others = set(sys.argv.pop(1).split(","))

class Others(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Others())
"""
IMPORT_ALL = """
import opscore, opscore.cli, opscore.sdk
for package in (opscore.cli, opscore.sdk, opscore.agentkit):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        __import__(module.name)
opscore.sdk.AgentServer
"""
COMMAND = "from opscore.__main__ import main; main()"


def required(name: str | None, extra: str = "") -> set[str]:
    """Return the distributions that one needs, and those they need, in turn."""
    if name is None:
        settings = ConfigParser()
        settings.read(ROOT / "setup.cfg")
        wanted = settings["options"]["install_requires"].splitlines()
        if extra:
            wanted += settings["options.extras_require"][extra].splitlines()
    else:
        wanted = requires(name) or []
    found = set()
    for line in filter(None, wanted):
        requirement = Requirement(line)
        if name is None or (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            found.add(distribution(requirement.name).metadata["Name"].lower())
            for below in requirement.extras or {""}:
                found |= required(requirement.name, below)
    return found


def run(program: str, *arguments: str, extra: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a program where only what is required can be imported."""
    brought = required(None, extra)
    others = [
        module
        for module, owners in packages_distributions().items()
        if module not in ("opscore", "web", "workers", "celeryconfig")
        and not {owner.lower() for owner in owners} & brought
    ]
    assert {"celery", "flask", "marshmallow", "sqlalchemy"} <= set(others)
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_OTHERS + program, ",".join(others), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_agents_the_sdk_and_the_command_line_need_nothing_else() -> None:
    done = run(IMPORT_ALL)
    assert done.returncode == 0, done.stderr


def test_the_command_line_works_and_says_what_servers_need() -> None:
    assert run(COMMAND, "--help").returncode == 0
    said = run(COMMAND, "run", "list", "--api-url", "http://127.0.0.1:1", "--api-key", "k")
    assert said.returncode == 3, said.stderr
    for command in (["up"], ["web"], ["worker"], ["beat"], ["db", "upgrade"]):
        said = run(COMMAND, *command)
        assert (said.returncode, said.stdout) == (1, ""), said.stderr
        assert "pip install 'opscore[server]'" in said.stderr and "Traceback" not in said.stderr


def test_playing_workflows_needs_what_its_extra_brings() -> None:
    assert run("import opscore.testing").returncode == 1
    done = run("import opscore.testing", extra="testing")
    assert done.returncode == 0, done.stderr
