"""MCP servers and built-in tools of LLM agents on real workers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import mcp_server
import pytest
from stack import ROOT, Servers, Stack, running_stack, wait_until
from test_mcp import all_gone, served_over_http

CRISP = {"OPSCORE_LEASE_SECONDS": "1.5", "OPSCORE_RENEW_SECONDS": "0.5"}
SECRET = "tok-en-of-the-docs"
FILE = """
servers:
  docs: {{command: {python}, args: [{server}], env: {{GIVEN: "${{DOCS_TOKEN}}"}}}}
  web: {{url: "{url}"}}
  dead: {{command: no-such-command}}
"""


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("mcp")
    with served_over_http() as url:
        config = folder / "mcp.yaml"
        config.write_text(FILE.format(python=sys.executable, server=mcp_server.__file__, url=url))
        more = {
            "OPSCORE_AGENTS": "tests.mcp_fleet",
            "OPSCORE_MCP_CONFIG": str(config),
            "OPSCORE_FILES": str(folder / "files"),
            "OPSCORE_AGENT_HOSTS": "127.0.0.1",
            "DOCS_TOKEN": SECRET,
            "WEB_URL": url,
        }
        with running_stack(servers, folder / "worker.log", **CRISP, **more) as stack:
            stack.start_worker(concurrency=2)
            yield stack


def submit(stack: Stack, *wanted: tuple[str, Any], **task: Any) -> UUID:
    goal = json.dumps({"calls": wanted})
    one = {"taskId": "t", "agentId": "caller", "parameters": {"goal": goal}, **task}
    run_id: UUID = stack.submit({"id": "w", "tasks": [one]})
    return run_id


def told(stack: Stack, run_id: UUID) -> list[str]:
    run = stack.finished(run_id)
    assert run.status == "completed", run.error
    results: list[str] = json.loads(run.output)
    return results


def proxied(server: str, tool: str, **arguments: Any) -> tuple[str, Any]:
    given = {"server_name": server, "tool_name": tool, "arguments": arguments}
    return "mcp_proxy_tool", given


def test_an_agent_in_a_worker_calls_servers_of_both_kinds_beside_a_dead_one(
    stack: Stack, tmp_path: Path
) -> None:
    run_id = submit(
        stack,
        ("docs__search", {"query": "a"}),
        ("web__search", {"query": "b"}),
        proxied("dead", "search", query="c"),
        ("docs__environment", {}),
        ("docs__pids", {"path": str(tmp_path / "pids")}),
    )
    docs, web, dead, environment, _ = told(stack, run_id)
    assert (docs, web) == ("3 hits for a", "3 hits for b")
    assert dead.startswith("The MCP server dead cannot be used: it could not be started")
    assert "GIVEN" in environment
    assert not {"DATABASE_URL", "OPSCORE_API_KEY", "DOCS_TOKEN"} & set(environment.split())
    all_gone(tmp_path / "pids")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_no_process_of_a_server_survives_a_killed_child_of_a_worker(
    stack: Stack, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    hanging = submit(
        stack,
        ("docs__pids", {"path": str(path)}),
        ("docs__hang", {}),
        retry={"maxAttempts": 1},
        timeoutSeconds=8,
    )
    wait_until(lambda: path.exists() and len(path.read_text().split()) == 2)
    before = path.read_text()
    child = parent(parent(int(before.split()[0])))  # above the server's keeper
    assert parent(child) == stack.workers[0].pid
    os.kill(child, signal.SIGKILL)
    (tmp_path / "before").write_text(before)
    all_gone(tmp_path / "before")
    # Another child takes the task up again, and that is ended at its limit; it calls `pids` once
    # more unless its result was stored.
    assert stack.finished(hanging).error["code"] == "timeout"
    all_gone(path)


def test_events_hide_what_looks_like_a_secret_and_what_servers_are_given(stack: Stack) -> None:
    run_id = submit(
        stack,
        ("log_in", {"user": "ada", "password": "hunter2hunter2"}),
        ("docs__variable", {"name": "GIVEN"}),
    )
    assert told(stack, run_id)[1] == SECRET, "the agent itself gets it"
    rows = stack.rows("SELECT type, data FROM events WHERE run_id = :id ORDER BY seq", id=run_id)
    steps = [row for row in rows if row.type in ("task.model_replied", "task.tool_called")]
    assert len(steps) == 4
    shown = json.dumps([row.data for row in steps])
    assert "ada" in shown and "[redacted]" in shown
    for secret in ("hunter2", "sk-live", SECRET):
        assert secret not in shown
    assert SECRET not in stack.log.read_text()


def test_files_of_a_run_are_there_for_its_other_tasks_and_for_no_other_run(stack: Stack) -> None:
    def task(name: str, *wanted: tuple[str, Any]) -> dict[str, Any]:
        goal = json.dumps({"calls": wanted})
        return {"taskId": name, "agentId": "caller", "parameters": {"goal": goal}}

    write = task("write", ("write_file", {"path": "notes/a.md", "text": "héllo"}))
    read = task(
        "read",
        ("read_file", {"path": "notes/a.md"}),
        ("list_files", {}),
        ("read_file", {"path": "../../mcp.yaml"}),
    )
    run_id = stack.submit({"id": "files", "tasks": [write, read]})
    content, listed, outside = told(stack, run_id)
    assert (content, json.loads(listed)) == ("héllo", {"notes/a.md": 6})
    assert outside == "'../../mcp.yaml' is no path here: give one such as notes/plan.md."
    assert told(stack, submit(stack, ("list_files", {}))) == ["{}"]


def test_a_page_is_got_from_hosts_that_are_allowed_only(stack: Stack) -> None:
    url = stack.environment["WEB_URL"]
    run_id = submit(
        stack,
        ("http_get", {"url": url}),
        ("http_get", {"url": url.replace("127.0.0.1", "localhost")}),
    )
    page, refused = told(stack, run_id)
    assert page.startswith(f"{url}\nstatus 4")
    assert refused.startswith("The host localhost is not on the public network")


def test_a_worker_whose_agents_lack_something_does_not_start(stack: Stack, tmp_path: Path) -> None:
    config = tmp_path / "mcp.yaml"
    config.write_text("servers: {docs: {command: x, enabled: false}}")
    environment = os.environ | stack.environment | {"OPSCORE_MCP_CONFIG": str(config)}
    del environment["OPSCORE_FILES"]
    ended = subprocess.run(
        [sys.executable, "-m", "opscore", "worker"],
        env=environment | {"TMPDIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    for fault in (
        "LLMAgent('caller') has the MCP server docs, which is not enabled",
        "LLMAgent('caller') has an unknown MCP server 'web': there are docs",
        "set OPSCORE_FILES to a folder",
    ):
        assert fault in ended.stdout + ended.stderr
