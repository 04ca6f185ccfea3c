"""What `pip install opscore` brings is enough for clients and agents, as the docs say, and what
a built wheel holds is enough for servers.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from importlib.metadata import distribution, packages_distributions, requires, version
from pathlib import Path
from typing import Any

import httpx2
import pytest
from packaging.requirements import Requirement
from stack import Servers, new_redis_url, stack_environment, wait_until
from test_migrations import database
from test_web_process import answers, free_port

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
        if not module.name.endswith(".mcp_stdio"):  # of the extra `agents`, and imported with it
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
    assert run(COMMAND, "--version").stdout == f"opscore {version('opscore')}\n"
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


# --- From a wheel -------------------------------------------------------------------------------


def setup_cfg(section: str, name: str) -> str:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings[section][name]


VERSION = setup_cfg("metadata", "version")
PACKAGES = ("opscore", "web", "workers")


def pip(*arguments: "str | Path") -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "bench")
    shutil.copytree(ROOT, folder / "tree", ignore=skipped)
    options = ["--no-index", "--no-deps", "--no-build-isolation"]
    pip("wheel", *options, "--wheel-dir", folder, folder / "tree")
    (made,) = folder.glob("*.whl")
    return made


class Environment:
    """A virtual environment with the wheel in it, and what it asks for."""

    def __init__(self, folder: Path, wheel: Path, extra: str = "") -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin/python"
        pip("--python", self.python, "install", "--no-index", "--no-deps", wheel)
        (self.site,) = folder.glob("lib/python*/site-packages")
        for name in required(None, extra):
            self._link(name)
        self.command = folder / "bin/opscore"

    def _link(self, name: str) -> None:
        """Make one distribution of ours importable there."""
        there = distribution(name)
        tops = {file.parts[0] for file in there.files or [] if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            link = self.site / top
            if not link.exists():
                link.symlink_to(Path(str(there.locate_file(top))).resolve())

    def environment(self, **more: str) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return mine | more

    def run(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.command, *arguments],
            cwd=self.site.parent,  # nothing of the tree lies there
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
        )

    @contextmanager
    def serving(self, **more: str) -> Iterator[int]:
        port = free_port()
        process = subprocess.Popen(
            [self.command, "web", f"--port={port}"],
            cwd=self.site.parent,
            env=self.environment(**more),
            stderr=subprocess.PIPE,
        )
        try:
            wait_until(lambda: answers(port) or process.poll() is not None)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield port
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert held == there | {"celeryconfig.py"}
    assert {"opscore/py.typed", "opscore/migrations/versions/0001_the_first_schema.py"} <= held


def test_the_wheel_says_its_version_and_its_licenses(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"opscore-{VERSION}.dist-info"
    said = archive.read(f"{info}/METADATA").decode().split("\n\n")[0].splitlines()
    assert {f"Version: {VERSION}", "License-Expression: Apache-2.0"} <= set(said)
    for name in ("LICENSE", "NOTICE", "web/static/swagger/LICENSE", "web/static/swagger/NOTICE"):
        assert archive.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()
    # The standard text, to the letter.
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "web/static/swagger/LICENSE").read_bytes()
    assert VERSION not in "".join(path.read_text() for path in (ROOT / "opscore").rglob("*.py"))


def test_what_is_vendored_says_whose_it_is() -> None:
    notice = (ROOT / "NOTICE").read_text()
    for folder in {path.parent for path in (ROOT / "web/static").rglob("*.js")}:
        assert str(folder.relative_to(ROOT)) in notice
        assert (folder / "LICENSE").is_file() and (folder / "NOTICE").is_file()
        copyrights = [line for line in (folder / "NOTICE").read_text().splitlines() if "20" in line]
        assert copyrights and all(line in notice for line in copyrights)


def test_installed_alone_it_is_a_client(wheel: Path, tmp_path: Path) -> None:
    client = Environment(tmp_path / "env", wheel)
    assert client.run("--version").stdout == f"opscore {VERSION}\n"
    assert "Commands:" in client.run("--help").stdout
    said = client.run("db", "upgrade")
    assert said.returncode == 1 and "pip install 'opscore[server]'" in said.stderr
    done = subprocess.run(
        [client.python, "-c", "import opscore.sdk, opscore.agentkit; opscore.sdk.AgentServer"],
        cwd=tmp_path,
        env=client.environment(),
    )
    assert done.returncode == 0


def test_installed_for_servers_it_makes_the_tables_and_serves(
    wheel: Path, tmp_path: Path, servers: Servers
) -> None:
    server = Environment(tmp_path / "env", wheel, "server")
    with database(servers) as url:
        settings = stack_environment(url, new_redis_url(servers))
        done = server.run("db", "upgrade", **settings)
        assert done.returncode == 0, done.stderr
        assert server.run("db", "check", **settings).returncode == 0
        with server.serving(**settings) as port:
            api = httpx2.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True)
            assert api.get("/health").json() == {"status": "ok"}
            page: Any = api.get("/docs")
            assert page.status_code == 200 and "swagger-ui-bundle.js" in page.text
            assert api.get("/docs/swagger-ui-bundle.js").status_code == 200
            assert api.get("/openapi.json").json()["info"]["version"] == VERSION
            api.close()
