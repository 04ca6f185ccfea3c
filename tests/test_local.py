"""The embedded stack as people use it: the `opscore` command on a data folder."""

import base64
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from opscore.local import DataFolder, Options, Stack, StackError, post_workflows
from opscore.processes import wait_until
from opscore.servers import free_port, is_free

ROOT = Path(__file__).parents[1]
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("OPSCORE_", "FLOWER_")) and name not in ("DATABASE_URL", "REDIS_URL")
}
SETTINGS = {
    "DATABASE_URL": f"postgresql://nobody@127.0.0.1:{free_port()}/nothing",
    "OPSCORE_API_KEY": "k" * 32,
}


def opscore(
    *arguments: object, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the `opscore` command in `folder` and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "opscore", *map(str, arguments)],
        env={**CLEAN, "PYTHONPATH": str(ROOT), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- the data folder -------------------------------------------------------------------------


def test_the_data_folder_is_closed_to_other_users(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "new" / "data")
    with data.locked():
        assert stat.S_IMODE(data.path.stat().st_mode) & 0o067 == 0


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(StackError, match="holds other things"), DataFolder(tmp_path).locked():
        pass
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_one_supervisor_holds_a_folder_at_a_time(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    with data.locked():
        said = opscore("up", "--data", data.path)
        assert said.returncode == 1
        assert f"Another opscore (pid {os.getpid()}) runs on {data.path}" in said.stderr
        assert data.holder() == os.getpid()
    assert data.holder() is None


def test_the_environment_file_may_be_sourced(tmp_path: Path) -> None:
    data = DataFolder(tmp_path)
    values = {"A": "it's $HOME & more", "DATABASE_URL": "postgresql://u:p@h/n?a=b&c=d"}
    data.write_env(values)
    assert data.env() == values
    assert stat.S_IMODE(data.env_file.stat().st_mode) == 0o600
    script = f'. {data.env_file}; printf "%s\\n" "$A" "$DATABASE_URL"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert said.stdout.splitlines() == list(values.values())


def test_where_nothing_runs_status_and_down_say_so(tmp_path: Path) -> None:
    status = opscore("status", "--data", tmp_path / "none")
    assert (status.returncode, status.stdout) == (1, "not running\n")
    down = opscore("down", "--data", tmp_path / "none")
    assert (down.returncode, down.stdout) == (0, f"Nothing runs on {tmp_path / 'none'}.\n")
    assert not (tmp_path / "none").exists()


# -- refusals to start -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["web", "worker", "beat", "flower", "db upgrade"])
def test_each_process_refuses_to_start_and_names_every_fault(command: str) -> None:
    said = opscore(*command.split(), REDIS_URL="ftp://x")
    assert said.returncode == 1
    for name in ("DATABASE_URL is not set", "OPSCORE_API_KEY is not set", "REDIS_URL"):
        assert name in said.stderr
    assert "Traceback" not in said.stderr


def test_flower_is_not_shown_to_everybody() -> None:
    said = opscore("flower", **SETTINGS)
    assert said.returncode == 1
    assert "FLOWER_BASIC_AUTH is not set" in said.stderr


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_the_stack_names_every_fault_before_it_starts_anything(
    tmp_path: Path, detach: list[str]
) -> None:
    environment = {"OPSCORE_API_KEY": "short", "OPSCORE_LEASE_SECONDS": "long"}
    said = opscore("up", "--data", tmp_path / "data", *detach, **environment)
    assert said.returncode == 1
    assert "OPSCORE_API_KEY" in said.stderr
    assert "OPSCORE_LEASE_SECONDS" in said.stderr
    assert "short" not in said.stderr.replace("OPSCORE_API_KEY", "")
    assert not (tmp_path / "data/valkey/valkey.conf").exists()


def test_a_worker_is_given_its_whole_grace_before_it_is_killed(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    given = {**SETTINGS, "REDIS_URL": "redis://127.0.0.1:1/0", "OPSCORE_GRACE_SECONDS": "90"}
    with data.locked():
        stack = Stack(Options(data), given, data)
        programs = {program.name: program for program in stack._programs(stack._environment({}))}
        stack.log.close()
    for name in ("worker-agents", "worker-io", "worker-control"):
        assert programs[name].grace_seconds > 92


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        port = other.server_port
        said = opscore("up", "--data", tmp_path / "data", "--port", port)
    assert said.returncode == 1
    assert f"Port {port} is in use" in said.stderr


def test_a_given_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    given = {**SETTINGS, "REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    said = opscore("up", "--data", tmp_path / "data", **given)
    assert said.returncode == 1
    assert "REDIS_URL: no answer from Redis" in said.stderr
    assert "Traceback" not in said.stderr


# -- workflows of a folder -------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[HTTPServer]:
    """A stand-in for the API that knows good documents from bad ones."""

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind, key = self.headers["Content-Type"], self.headers["Authorization"]
            seen.append((self.path, kind, key, body))
            status, answer = self.answer(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
            if b"bad" in body:
                errors = {"/tasks/0": ["is strange", "is odd"]}
                return 422, {"detail": "It has faults.", "errors": errors}
            if b"archived" in body:
                return 409, {"detail": "It is archived.", "code": "workflow_archived"}
            return 201, {"workflowId": "w", "version": 1}

        def log_message(self, *_: object) -> None:
            pass

    seen: list[tuple[str, str, str, bytes]] = []
    with HTTPServer(("127.0.0.1", 0), Api) as server:
        server.seen = seen  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_workflows_are_posted_as_what_they_are(api: Any, tmp_path: Path) -> None:
    for name in ("b.yaml", "c.yml", "a.json", "README.md"):
        (tmp_path / name).write_text(name)
    said: list[str] = []
    post_workflows(tmp_path, f"http://127.0.0.1:{api.server_port}", "key", said.append)
    path, bearer = "/v1/opscore/workflows", "Bearer key"
    assert api.seen == [
        (path, "application/json", bearer, b"a.json"),
        (path, "application/yaml", bearer, b"b.yaml"),
        (path, "application/yaml", bearer, b"c.yml"),
    ]
    assert said[0] == "workflow w version 1 is new (a.json)"


def test_faulty_workflows_are_named_all_at_once(api: Any, tmp_path: Path) -> None:
    for name in ("a.json", "b.yaml"):
        (tmp_path / name).write_text("bad")
    (tmp_path / "c.json").write_text("good")
    with pytest.raises(StackError) as error:
        post_workflows(tmp_path, f"http://127.0.0.1:{api.server_port}", "key", print)
    for name in ("a.json", "b.yaml"):
        assert f"{tmp_path / name}: It has faults.\n  /tasks/0: is strange" in str(error.value)
    assert len(api.seen) == 3


def test_an_archived_workflow_is_named_and_no_fault(api: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("archived")
    said: list[str] = []
    post_workflows(tmp_path, f"http://127.0.0.1:{api.server_port}", "key", said.append)
    assert said == ["It is archived. (a.json)"]


# -- the whole stack -------------------------------------------------------------------------

AGENTS = """
from opscore import agent

@agent("greeter", capabilities=["greet"])
def greet(parameters, context):
    return "hello"
"""
WORKFLOW = "id: greeting\ntasks:\n  - taskId: hello\n    agentId: greeter\n"


class Running:
    """A stack in a folder of its own, and what its environment file says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / ".opscore"

    def up(self) -> subprocess.CompletedProcess[str]:
        arguments = ["--agents=my_agents", "--workflows=flows", "--workers=1", "--detach"]
        return opscore("up", *arguments, folder=self.folder)

    @property
    def env(self) -> dict[str, str]:
        lines = (self.data / "opscore.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def state(self) -> Any:
        return json.loads((self.data / "state.json").read_text())

    def process(self, name: str) -> Any:
        return next(p for p in self.state()["processes"] if p["name"] == name)

    def get(self, path: str, body: Any = None) -> Any:
        """Ask for what is there; with a body, POST it."""
        headers = {"Authorization": f"Bearer {self.env['OPSCORE_API_KEY']}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.env["OPSCORE_API_URL"] + path, data, headers)
        with urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def family(self) -> set[int]:
        """Return the supervisor's pid and those of everything below it."""
        parents = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                rest = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(rest[1])
        found = {self.state()["pid"]}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def ports(self) -> list[int]:
        names = ("OPSCORE_API_URL", "DATABASE_URL", "REDIS_URL", "FLOWER_URL")
        return [int(self.env[name].rsplit(":", 1)[1].split("/")[0]) for name in names]


def until(condition: Callable[[], bool], seen: Callable[[], object] = lambda: "") -> None:
    assert wait_until(condition, 30), seen()


def is_gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True


@pytest.fixture(scope="module")
def stack() -> Iterator[Running]:
    folder = Path(tempfile.mkdtemp(prefix="opscore-test-"))
    folder.chmod(0o755)  # nobody, who runs PostgreSQL for root, may pass
    (folder / "my_agents.py").write_text(AGENTS)
    (folder / "flows").mkdir()
    (folder / "flows/greeting.yaml").write_text(WORKFLOW)
    # Must not stand in front of ours.
    (folder / "web").mkdir()
    (folder / "web/__init__.py").write_text("raise SystemExit('not this one')")
    running = Running(folder)
    said = running.up()
    try:
        assert said.returncode == 0, said.stderr
        yield running
    finally:
        opscore("down", folder=folder)
        shutil.rmtree(folder)


def test_a_detached_stack_is_ready_and_says_where(stack: Running) -> None:
    assert stack.get("/ready")
    status = opscore("status", folder=stack.folder)
    assert status.returncode == 0, status.stdout
    processes, _, page = status.stdout.partition("\n\n")
    assert page.endswith("All is well.\n")
    names = [line.split()[0] for line in processes.splitlines()[2:]]
    servers = ["postgres", "valkey"]
    assert names == [
        *servers,
        "web",
        "worker-agents",
        "worker-io",
        "worker-control",
        "beat",
        "flower",
    ]
    assert set(stack.env) == {
        "OPSCORE_API_URL",
        "OPSCORE_API_KEY",
        "DATABASE_URL",
        "REDIS_URL",
        "FLOWER_URL",
        "FLOWER_BASIC_AUTH",
        "OPSCORE_WEBHOOK_SECRET",
    }


def test_no_secret_is_readable_by_others_or_logged(stack: Running) -> None:
    for name in ("opscore.env", "opscore.log", "state.json"):
        assert stat.S_IMODE((stack.data / name).stat().st_mode) == 0o600
    log = (stack.data / "opscore.log").read_text()
    for name in ("OPSCORE_API_KEY", "OPSCORE_WEBHOOK_SECRET"):
        assert stack.env[name] not in log
    for name in ("DATABASE_URL", "REDIS_URL", "FLOWER_BASIC_AUTH"):
        assert stack.env[name].split("@")[0].rsplit(":", 1)[1] not in log


def test_agents_and_workflows_of_the_current_folder_are_there(stack: Running) -> None:
    assert "greeter" in json.dumps(stack.get("/v1/opscore/agents"))
    assert stack.get("/v1/opscore/workflows/greeting")["version"] == 1


def test_flower_asks_who_looks(stack: Running) -> None:
    url = stack.env["FLOWER_URL"] + "/api/workers"
    with pytest.raises(HTTPError) as refused:
        urlopen(url, timeout=10)
    refused.value.close()
    assert refused.value.code == 401
    who = base64.b64encode(stack.env["FLOWER_BASIC_AUTH"].encode()).decode()
    with urlopen(Request(url, headers={"Authorization": f"Basic {who}"}), timeout=10) as answer:
        assert answer.status == 200


def test_beat_fires_schedules_and_keeps_no_file(stack: Running) -> None:
    every = {"name": "tick", "workflowId": "greeting", "everySeconds": 1, "overlap": "allow"}
    stack.get("/v1/opscore/schedules", every)

    def firings() -> Any:
        return stack.get("/v1/opscore/schedules/tick/firings")["items"]

    until(lambda: [f["runStatus"] for f in firings()].count("completed") >= 3, firings)
    assert not stack.get("/v1/opscore/schedules/tick/pause", {})["enabled"]
    assert {path.suffix for path in (stack.data / "run").iterdir()} <= {".ready"}
    here = {path.name for path in stack.folder.iterdir()} - {"__pycache__"}
    assert here == {".opscore", "flows", "my_agents.py", "web"}


@pytest.mark.parametrize("name", ["postgres", "valkey", "worker-agents", "beat", "web"])
def test_what_dies_comes_back_on_the_same_port(stack: Running, name: str) -> None:
    before = stack.process(name)
    os.kill(before["pid"], signal.SIGKILL)
    until(
        lambda: (
            (now := stack.process(name))["restarts"] == before["restarts"] + 1
            and now["state"] == "ready"
        ),
        stack.state,
    )
    assert stack.process(name)["url"] == before["url"]
    assert stack.process(name)["pid"] != before["pid"]
    until(lambda: opscore("status", folder=stack.folder).returncode == 0, stack.state)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_nothing_outlives_a_killed_supervisor_and_the_data_does(stack: Running) -> None:
    before, family = stack.env, stack.family()
    assert len(family) > 10
    os.kill(stack.state()["pid"], signal.SIGKILL)
    until(lambda: all(map(is_gone, family)), lambda: family)
    assert opscore("status", folder=stack.folder).returncode == 1
    assert stack.up().returncode == 0
    assert stack.env == before
    assert stack.get("/v1/opscore/workflows/greeting")["version"] == 1
    assert "greeting version 1 is there already" in (stack.data / "opscore.log").read_text()


def test_down_leaves_no_process_and_no_port(stack: Running) -> None:
    family, ports = stack.family(), stack.ports()
    asked = time.monotonic()
    assert opscore("down", folder=stack.folder).stdout == "Stopped.\n"
    assert time.monotonic() - asked < 30
    assert [pid for pid in family if not is_gone(pid)] == []
    assert all(is_free(port) for port in ports)
