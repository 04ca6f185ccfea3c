"""The command line, as a process, against an API and workers that run."""

import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from cli_fleet import HOSTILE
from stack import API_KEY, ROOT, Servers, running_stack, wait_until
from test_web_process import free_port, serving

from opscore.__main__ import main
from opscore.cli.session import read_stack
from opscore.sdk import OpsCoreClientSync

REPORT = {
    "id": "report",
    "name": "Report",
    "inputSchema": {"type": "object", "required": ["topics"]},
    "tasks": [
        {
            "taskId": "fetch",
            "agentCapability": "echo",
            "forEach": {"items": "${input.topics}"},
            "parameters": {"topic": "${item}"},
        },
        {"taskId": "write", "agentId": "grumpy", "parameters": {"mood": "${input.mood}"}},
    ],
    "output": "${tasks.write.output}",
}
ASKING = {
    "id": "asking",
    "tasks": [
        {"taskId": "ok", "type": "approval"},
        {"taskId": "after", "agentId": "echo", "parameters": {"said": "${tasks.ok.output}"}},
    ],
}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)

    def is_fine(self) -> str:
        assert (self.code, self.err) == (0, ""), self
        return self.out


class Desk:
    """Somebody with the command line and a stack."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.client = OpsCoreClientSync(url, API_KEY)
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
            "PYTHONPATH": str(ROOT),
            "OPSCORE_API_URL": url,
            "OPSCORE_API_KEY": API_KEY,
        }

    def start(self, *words: str, **more: Any) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "opscore", *words],
            cwd=self.folder,
            text=True,
            **{
                "env": self.environment,
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                **more,
            },
        )
        self.started.append(process)
        return process

    def leave(self) -> None:
        """End what a test that failed has left."""
        self.client.close()
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def run(self, *words: str, input: str | None = None, **environment: str | None) -> Said:
        changed = {**self.environment, **environment}
        env = {name: value for name, value in changed.items() if value is not None}
        process = self.start(*words, env=env, stdin=subprocess.PIPE)
        out, err = process.communicate(input, timeout=60)
        assert "Traceback" not in err, err
        return Said(process.returncode, out, err)

    def submit(self, workflow: str, input: Any, *words: str) -> str:
        if not words:  # quicker, where it is not what is tested
            return self.client.runs.submit(workflow, input).id
        run_id = self.run("run", "submit", workflow, json.dumps(input), "--json", *words).json()
        return str(run_id["runId"])

    def asked(self, run_id: str) -> str:
        """Return the task of a run that waits for an approval, once it does."""
        waiting = partial(self.client.tasks.list, reason="approval", run_id=run_id)
        return str(wait_until(lambda: [task["taskId"] for task in waiting()])[-1])


@pytest.fixture(scope="module")
def desk(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("cli")
    agents = {"OPSCORE_AGENTS": "cli_fleet", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with running_stack(servers, folder / "worker.log", **agents) as stack:
        stack.start_worker(pool="threads", concurrency=4)
        with serving(stack.environment, folder / "web.log") as (_, port):
            here = Desk(f"http://127.0.0.1:{port}", folder)
            for document in (REPORT, ASKING):
                here.run("workflow", "push", "-", input=json.dumps(document)).is_fine()
            yield here
            here.leave()


def leaves(command: click.Command, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, *names, name)
    else:
        yield names, command


LEAVES = dict(leaves(main))


# --- Help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_the_help_of_every_command_has_examples_that_are_its_own_and_can_be_read(
    names: tuple[str, ...],
) -> None:
    command = LEAVES[names]
    with click.Context(command, info_name=" ".join(names)) as context:
        shown = command.get_help(context)
    examples = getattr(command, "examples", ())
    assert examples and "Examples:" in shown
    for example in examples:
        assert example in shown and len(example) <= 90
        words = shlex.split(example.partition(" | ")[0])
        words = words[words.index("opscore") :]  # before it there may be variables
        assert tuple(words[: len(names) + 1]) == ("opscore", *names)
        command.make_context(names[-1], words[len(names) + 1 :], resilient_parsing=True)


def test_help_comes_at_once_and_loads_neither_servers_nor_a_client() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = (
        "import sys; from opscore.__main__ import main; main(['--help'], standalone_mode=False);"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("Usage:"), done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {"celery", "flask", "sqlalchemy", "marshmallow", "httpx2", "rich"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_a_list_of_commands_breaks_off_no_sentence() -> None:
    for group in (main, *(one for one in main.commands.values() if isinstance(one, click.Group))):
        told = group.get_help(click.Context(group, max_content_width=80)).partition("Commands:")[2]
        assert told and "..." not in told


# --- How commands end ---------------------------------------------------------------------------


def test_without_any_api_it_says_how_to_name_one(desk: Desk) -> None:
    said = desk.run("run", "list", OPSCORE_API_URL=None)
    assert (said.code, said.out) == (2, "")
    assert "--api-url" in said.err and "OPSCORE_API_URL" in said.err and "opscore up" in said.err


def test_where_nobody_listens_it_ends_with_3(desk: Desk) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = desk.run("run", "list", "--api-url", url)
    assert said.code == 3
    assert said.err.startswith(f"Error: {url} cannot be reached") and "Hint: " in said.err
    said = desk.run("--api-url", url, "run", "list", "--json")
    assert said.code == 3 and json.loads(said.err)["error"]["code"] == "connection"


@pytest.mark.parametrize("url", ["nowhere", "ftp://x", "http://", "http://[::1"])
def test_what_is_no_address_is_wrong_usage(desk: Desk, url: str) -> None:
    said = desk.run("run", "list", "--api-url", url)
    assert said.code == 2 and "Error: " in said.err


def test_with_a_wrong_key_it_ends_with_4(desk: Desk) -> None:
    for place in (["--api-key", "wrong", "run", "list"], ["run", "list", "--api-key", "wrong"]):
        said = desk.run(*place)
        assert said.code == 4 and "Hint: " in said.err


def test_without_a_key_it_says_so_and_does_not_take_that_of_another_api(desk: Desk) -> None:
    folder = desk.folder / "stack"
    folder.mkdir()
    (folder / "opscore.env").write_text(f"OPSCORE_API_URL={desk.url}\nOPSCORE_API_KEY={API_KEY}\n")
    data = ["--data", str(folder)]
    bare: dict[str, str | None] = {"OPSCORE_API_URL": None, "OPSCORE_API_KEY": None}
    assert desk.run("run", "list", *data, **bare).code == 0
    said = desk.run("run", "list", *data, **bare | {"OPSCORE_API_URL": desk.url})
    assert said.code == 2 and "No key" in said.err
    assert desk.run("run", "list", *data, **bare | {"OPSCORE_API_KEY": "of another"}).code == 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("run show nothing", "run list"),
        ("run watch 01890a5d-ac96-774b-bcce-b302099a8057", "run list"),
        ("task show 01890a5d-ac96-774b-bcce-b302099a8057", "run show"),
        ("agent show nobody", "agent list"),
        ("agent get-state nobody", "agent list"),
        ("workflow show nothing", "workflow list"),
        ("schedule show nothing", "schedule list"),
        ("run submit nothing", "workflow list"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence_with_a_hint(
    desk: Desk, words: str, hint: str
) -> None:
    said = desk.run(*words.split())
    assert (said.code, said.out) == (1, "")
    error, hinted = said.err.splitlines()
    assert error.startswith("Error: There is no ") and f"`opscore {hint}" in hinted
    problem = json.loads(desk.run(*words.split(), "--json").err)["error"]
    assert problem["status"] == 404 and problem["code"].endswith("_not_found")
    assert f"Error: {problem['detail']}" == error and problem["requestId"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "submit", "report", "{bad"],
        ["run", "submit", "report", "@nowhere.json"],
        ["run", "list", "--label", "team"],
        ["run", "list", "--status", "finished"],
        ["run", "submit", "report", "--start-at", "tomorrow"],
        ["run", "show", ""],
        ["run", "frobnicate"],
        ["run", "list", "--limit", "0"],
        ["workflow", "push", "nowhere.yaml"],
        ["schedule", "change", "nightly"],
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_asked(desk: Desk, words: list[str]) -> None:
    said = desk.run(*words, OPSCORE_API_URL=f"http://127.0.0.1:{free_port()}")
    assert (said.code, said.out) == (2, ""), said
    assert "Error: " in said.err


def test_faults_of_a_definition_are_shown_all_with_their_places(desk: Desk) -> None:
    document = {"id": "w", "tasks": [{"taskId": "a", "dependsOn": ["b"]}, {"taskId": "a"}]}
    for verb in ("validate", "push"):
        said = desk.run("workflow", verb, "-", input=json.dumps(document))
        assert said.code == 1 and said.err.count("\n  /tasks/") >= 2
    assert desk.run("workflow", "show", "w").code == 1


EVIL = "\x1b[2J\x1b]0;mine\x07\x9b31m"


@contextmanager
def answering(status: int, kind: str, body: str) -> Iterator[str]:
    """Serve the same answer to everything; give the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "body", ["{}", '{"items": [1], "nextCursor": null}', "[1]", f"<html>{EVIL}</html>"]
)
def test_what_answers_nonsense_is_told_in_a_sentence(desk: Desk, body: str) -> None:
    with answering(200, "application/json", body) as url:
        said = desk.run("run", "list", "--api-url", url)
        assert said.code == 1 and f"{url}" in said.err and "not opscore" in said.err
        said = desk.run("doctor", "--json", "--api-url", url)
        assert said.code == 1 and "not opscore" in f"{said.out}{said.err}"


def test_no_error_of_the_api_moves_the_cursor(desk: Desk) -> None:
    problem = {
        "detail": f"There is no {EVIL}.",
        "code": "internal_error",
        "errors": {f"/{EVIL}": [EVIL, "second"]},
        "requestId": EVIL,
    }
    for body in (json.dumps(problem), f"<p>{EVIL}</p>"):
        with answering(500, "application/problem+json", body) as url:
            for words in (["run", "list"], ["doctor"]):
                code, drawn = on_terminal(desk, *words, "--api-url", url, NO_COLOR="1")
                assert code == 1 and not set(drawn) & {"\x1b", "\x07", "\x9b"}, drawn


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("workflow push folder", "folder cannot be read: Is a directory"),
        ("workflow push latin.yaml", "latin.yaml cannot be read: 'utf-8'"),
        ("workflow push empty.yaml", "empty.yaml is empty"),
        ("workflow push - - < one.yaml", "can be read once"),
        ("workflow push - <&-", "cannot be read: it is closed"),
        ("run submit report - <&-", "cannot be read: it is closed"),
        ("run submit report @deep.json", "this is no JSON"),
        ("run list > /dev/full", "No space left on device"),
        ("run list -l a=$(head -c 70000 /dev/zero | tr '\\0' x)", "no URL can be made"),
        ("run show $(head -c 70000 /dev/zero | tr '\\0' x)", "too long for an id"),
    ],
)
def test_what_cannot_be_read_or_written_is_told_in_a_sentence(
    desk: Desk, script: str, said: str
) -> None:
    folder = desk.folder / "odd"
    (folder / "folder").mkdir(parents=True, exist_ok=True)
    (folder / "latin.yaml").write_bytes(b"id: w\xff")
    (folder / "empty.yaml").write_text("\n")
    (folder / "one.yaml").write_text("id: w\ntasks: [{taskId: a, agentId: echo}]\n")
    (folder / "deep.json").write_text("[" * 100_000)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m opscore {script}"],
        cwd=folder,
        env=desk.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (1 if "full" in script else 2)
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["OPSCORE_API_URL='http", "\ud8ff", "FOO=1", None])
def test_a_foreign_file_of_a_stack_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "opscore.env"
    if text is None:
        file.mkdir()
    else:
        file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(click.UsageError, match=str(file)):
        read_stack(tmp_path)


def test_of_several_files_it_tells_which_was_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("id: one\ntasks: [{taskId: a, agentId: echo}]\n")
    (tmp_path / "two.yaml").write_text("id: two\ntasks: []\n")
    files = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    said = desk.run("workflow", "push", *files)
    assert said.code == 1 and said.err.startswith(f"{files[1]}: not created; before it: one vers")
    assert json.loads(desk.run("workflow", "push", *files, "--json").err)["error"]["status"] == 422


# --- Workflows and runs -------------------------------------------------------------------------


def test_a_workflow_is_pushed_from_a_file_and_shown(desk: Desk) -> None:
    file = desk.folder / "small.yaml"
    file.write_text("id: small\ntasks:\n  - {taskId: only, agentId: echo}\n")
    assert "would be version 1 of small" in desk.run("workflow", "validate", str(file)).is_fine()
    assert desk.run("workflow", "push", str(file)).is_fine() == "small version 1\n"
    assert "is already version 1" in desk.run("workflow", "validate", str(file)).is_fine()
    assert "small" in desk.run("workflow", "list").is_fine()
    shown = desk.run("workflow", "show", "small", "--version", "1", "--json").json()
    assert shown["definition"]["tasks"] == [{"taskId": "only", "agentId": "echo"}]
    assert '"taskId": "only"' in desk.run("workflow", "show", "small").is_fine()


def test_a_workflow_is_explained_archived_and_restored(desk: Desk) -> None:
    file = desk.folder / "graph.json"
    tasks = [
        {"taskId": "first", "agentCapability": "echo", "dependsOn": []},
        {"taskId": "left", "agentId": "echo", "dependsOn": ["first"]},
        {"taskId": "right", "type": "approval", "dependsOn": ["first"], "when": "true"},
        {"taskId": "last", "agentId": "echo", "dependsOn": ["left", "right"]},
    ]
    file.write_text(json.dumps({"id": "graph", "tasks": tasks}))
    of_file = desk.run("workflow", "explain", str(file)).is_fine()
    assert re.search(r"^first +agent +any that can echo +- +-$", of_file, re.MULTILINE)
    assert re.search(r"^last +agent +echo +left, right +-$", of_file, re.MULTILINE)
    assert "  chain\n    first\n    chord\n" in of_file
    assert desk.run("workflow", "push", str(file), "-q").is_fine() == "graph\n"
    assert desk.run("workflow", "explain", "graph").is_fine() == of_file
    assert desk.run("workflow", "archive", "graph").is_fine() == "graph is archived.\n"
    assert "graph" not in desk.run("workflow", "list", "-q").is_fine().split()
    assert desk.run("workflow", "list", "--archived", "-q").is_fine() == "graph\n"
    said = desk.run("run", "submit", "graph")
    assert said.code == 1 and "archived" in said.err
    assert desk.run("workflow", "restore", "graph").is_fine() == "graph is not archived.\n"
    assert desk.run("workflow", "list", "--archived").is_fine().startswith("No workflows")
    desk.run("run", "cancel", desk.submit("graph", {})).is_fine()


def test_a_run_is_watched_to_its_end_and_its_output_shown(desk: Desk) -> None:
    given = json.dumps({"topics": ["a", "b"], "mood": "good"})
    said = desk.run("run", "submit", "report", given, "--label", "team=a", "--watch").is_fine()
    assert re.search(r"task\.completed +fetch\[1\]", said) and "run.completed" in said
    assert said.endswith("output:\n  well, then\n")
    listed = desk.run("run", "list", "--label", "team=a", "--status", "completed", "--json").json()
    run_id = listed[0]["runId"]
    assert run_id in desk.run("run", "list", "-n", "5").out
    shown = desk.run("run", "show", run_id).is_fine()
    assert '{"team": "a"}' in shown and "fetch[0]" in shown and shown.endswith("  well, then\n")
    assert "well, then" in desk.run("run", "watch", run_id).is_fine()
    final = desk.run("run", "watch", run_id, "--json").json()
    assert final["output"] == "well, then" and len(final["tasks"]) == 4


def test_a_run_that_fails_ends_the_watch_with_1_and_is_tried_again(desk: Desk) -> None:
    run_id = desk.submit("report", {"topics": [], "mood": "bad"})
    said = desk.run("run", "watch", run_id)
    assert said.code == 1 and "not today" in said.out and "(gave_up)" in said.out
    assert HOSTILE not in said.out and "\x1b" not in said.out and "\x07" not in said.out
    mended = json.dumps({"write": {"mood": "good"}})
    again = desk.run("run", "retry", run_id, "--parameters", mended, "--watch")
    assert again.is_fine().endswith("  well, then\n")
    other = desk.run("run", "rerun", run_id, "--watch")
    assert other.code == 1 and run_id not in other.out


def test_a_run_is_paused_resumed_and_cancelled(desk: Desk) -> None:
    run_id = desk.submit("asking", {})
    desk.asked(run_id)
    assert desk.run("run", "pause", run_id).is_fine() == f"Run {run_id} is paused.\n"
    assert desk.run("run", "pause", run_id).code == 0
    assert desk.run("run", "resume", run_id).code == 0
    said = desk.run("run", "resume", run_id)
    assert said.code == 1 and "Only a paused run can be resumed" in said.err
    assert desk.run("run", "cancel", run_id).code == 0
    said = desk.run("run", "watch", run_id)
    assert said.code == 1 and said.out.endswith("It was cancelled.\n")


def test_the_same_key_gives_the_same_run(desk: Desk) -> None:
    given = {"topics": [], "mood": "good"}
    first = desk.submit("report", given, "--key", "of-today")
    assert desk.submit("report", given, "--key", "of-today") == first
    said = desk.run("run", "submit", "report", '{"topics": [1]}', "--key", "of-today")
    assert said.code == 1 and "Idempotency-Key" in said.err


def test_events_are_lines_and_json_a_line_each(desk: Desk) -> None:
    run_id = desk.submit("report", {"topics": [1], "mood": "good"}, "--priority", "high")
    followed = desk.run("run", "events", run_id, "--follow", "--json").is_fine()
    events = [json.loads(line) for line in followed.splitlines()]
    assert [events[0]["type"], events[-1]["type"]] == ["run.queued", "run.completed"]
    told = desk.run("run", "events", run_id).is_fine().splitlines()
    assert len(told) == len(events)
    rest = desk.run("run", "events", run_id, "--after", str(events[-2]["seq"])).is_fine()
    assert rest.splitlines() == told[-1:]


def test_input_comes_from_a_file_or_standard_input(desk: Desk) -> None:
    text = json.dumps({"topics": [], "mood": "good"})
    (desk.folder / "input.json").write_text(text)
    for how, piped in (("@input.json", None), ("-", text)):
        said = desk.run("run", "submit", "report", how, "--watch", "--json", input=piped)
        assert said.json()["output"] == "well, then"


def test_a_list_says_that_there_is_more(desk: Desk) -> None:
    for _ in range(3):
        desk.submit("report", {"topics": [], "mood": "good"})
    said = desk.run("run", "list", "-n", "2")
    assert said.code == 0 and len(said.out.splitlines()) == 3 and "--all" in said.err
    said = desk.run("run", "list", "--all", "--json")
    assert len(said.json()) >= 3 and said.err == ""


# --- Tasks and agents ---------------------------------------------------------------------------


def test_a_task_is_submitted_and_waited_for(desk: Desk) -> None:
    said = desk.run("task", "submit", '{"n": 1}', "--agent", "echo", "--wait", "--json").json()
    assert said["output"] == {"n": 1}
    task_id = said["taskId"]
    shown = desk.run("task", "show", task_id).is_fine()
    assert "completed" in shown and '"n": 1' in shown
    logs = desk.run("task", "logs", task_id).is_fine()
    assert "echoing" in logs and "size=1" in logs and "\x1b" not in logs
    failed = desk.run("task", "submit", "{}", "--agent", "grumpy", "--wait")
    assert failed.code == 1 and "(gave_up)" in failed.out
    assert "Task " in desk.run("task", "submit", "{}", "--capability", "echo").is_fine()
    said = desk.run("task", "submit", "{}")
    assert said.code == 1 and "agent" in said.err


def test_an_approval_is_given_and_refused(desk: Desk) -> None:
    run_id = desk.submit("asking", {})
    task = desk.asked(run_id)
    assert task in desk.run("run", "show", run_id).is_fine()
    assert "goes on" in desk.run("task", "approve", task, "--comment", "Fine.").is_fine()
    final = desk.run("run", "watch", run_id, "--json").json()
    assert final["output"]["said"]["comment"] == "Fine."
    said = desk.run("task", "approve", task)
    assert said.code == 1 and said.err.startswith("Error: ")
    other = desk.submit("asking", {})
    assert "Rejected" in desk.run("task", "reject", desk.asked(other), "--comment", "No").is_fine()
    said = desk.run("run", "watch", other)
    assert said.code == 1 and "No (rejected)" in said.out


def test_agents_are_listed_shown_and_steered(desk: Desk) -> None:
    listed = desk.run("agent", "list").is_fine()
    assert re.search(r"^echo +function +\w+ +yes", listed, re.MULTILINE)
    only = desk.run("agent", "list", "--capability", "echo", "--json").json()
    assert [agent["agentId"] for agent in only] == ["echo"]
    assert "capabilities: echo" in desk.run("agent", "show", "echo").is_fine()
    assert "no: paused" in desk.run("agent", "pause", "grumpy").is_fine()
    assert "yes" in desk.run("agent", "resume", "grumpy").is_fine()
    assert "no: " in desk.run("agent", "drain", "grumpy").is_fine()
    assert "yes" in desk.run("agent", "resume", "grumpy").is_fine()
    said = desk.run("agent", "set-capacity", "echo", "5")
    assert said.code == 1 and "/capacity: Of a function agent" in said.err
    desk.run("agent", "update-state", "grumpy", "idle", "--details", '{"n": 1}').is_fine()
    assert '{"n": 1}' in desk.run("agent", "get-state", "grumpy").is_fine()
    assert desk.run("agent", "history", "grumpy", "-n", "1").out.splitlines()[1].count("idle") == 1
    triggered = desk.run(
        *("workflow", "trigger", "echo", "report"),
        *("--payload", '{"topics": [], "mood": "good"}', "--watch"),
    )
    assert triggered.is_fine().endswith("well, then\n")


def test_what_an_agent_remembers_is_shown_found_and_forgotten(desk: Desk) -> None:
    for goal in ("the cat is grey", f"the dog is brown {HOSTILE}", "the cow is away"):
        given = ("task", "submit", json.dumps({"goal": goal}), "--agent", "diarist", "--wait")
        assert "kept" in desk.run(*given).is_fine()
    listed = desk.run("agent", "memories", "diarist").is_fine().splitlines()
    assert [line.split("diary")[1].strip()[:7] for line in listed[1:]] == [
        *("the cow", "the dog", "the cat")
    ]
    assert "\x1b" not in "".join(listed)
    found = desk.run("agent", "memories", "diarist", "--query", "which cat").is_fine()
    assert re.search(r"0\.\d\d +diary +the cat is grey$", found, re.MULTILINE)
    assert "no such thing" in desk.run("agent", "memories", "diarist", "--query", "owl").is_fine()
    first, *_ = ids = desk.run("agent", "memories", "diarist", "-q").is_fine().split()
    assert desk.run("agent", "forget", "diarist", first).is_fine() == "Forgotten: 1.\n"
    said = desk.run("agent", "forget", "diarist", first)
    assert said.code == 1 and "has no memory" in said.err and "agent memories" in said.err
    for wrong in ([], [first, "--all"], [first, "--namespace", "diary"]):
        assert desk.run("agent", "forget", "diarist", *wrong).code == 2
    assert desk.run("agent", "forget", "diarist", "--all", "--namespace", "x", "--json").json() == {
        "forgotten": 0
    }
    assert desk.run("agent", "forget", "diarist", "--all", "--json").json() == {
        "forgotten": len(ids) - 1
    }
    assert "no such thing" in desk.run("agent", "memories", "diarist").is_fine()
    assert desk.run("agent", "memories", "nobody").code == 1


def test_what_waits_is_listed_by_what_it_waits_for(desk: Desk) -> None:
    run_id = desk.run("run", "submit", "asking", "-q").is_fine().strip()
    task = desk.asked(run_id)
    assert task in desk.run("task", "list", "--reason", "approval", "-q").is_fine().split()
    of_run = desk.run("task", "list", "--run", run_id).is_fine()
    assert re.search(rf"^{task} +ok +waiting +waiting for somebody", of_run, re.MULTILINE)
    assert re.search(r"^\S+ +after +pending", of_run, re.MULTILINE)
    assert desk.run("task", "list", "--run", run_id, "--status", "failed").out == "No such tasks.\n"
    assert task in desk.run("status").out and run_id in desk.run("run", "list", "-q").out.split()
    desk.run("task", "approve", task).is_fine()
    again = desk.run("run", "rerun", run_id, "-q").is_fine().strip()
    assert again != run_id
    desk.run("run", "cancel", again).is_fine()


# --- How everything is --------------------------------------------------------------------------


def test_a_paused_agent_that_is_waited_for_is_the_matter(desk: Desk) -> None:
    said = desk.run("doctor")
    assert said.code == 0 and said.out.endswith("All is well.\n"), said
    assert desk.run("status").is_fine().endswith("All is well.\n")
    desk.run("agent", "pause", "grumpy").is_fine()
    task = desk.run("task", "submit", '{"mood": "good"}', "--agent", "grumpy", "-q").is_fine()
    wait_until(lambda: list(desk.client.tasks.list(status=["waiting"], agent_id="grumpy")))
    said = desk.run("doctor")
    assert said.code == 1 and "✘ agent_paused: 1 task waits" in said.out
    assert "    → Let it go on: `opscore agent resume grumpy`.\n1 thing is the matter." in said.out
    checks = desk.run("doctor", "--json")
    assert [c["name"] for c in json.loads(checks.out) if not c["is_ok"]] == ["agent_paused"]
    said = desk.run("status")
    assert said.code == 1 and "Problem: 1 task waits" in said.out
    assert "grumpy  1 " in said.out and desk.run("status", "--json").code == 1
    desk.run("agent", "resume", "grumpy").is_fine()
    wait_until(lambda: desk.client.tasks.get(task.strip())["status"] == "completed")


def test_an_api_that_is_away_is_the_matter(desk: Desk) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = desk.run("doctor", "--api-url", url)
    assert (
        said.code == 1
        and f"✘ api: {url} cannot be reached" in said.out
        and "opscore up" in said.out
    )
    assert desk.run("status", "--api-url", url).code == 3
    here = ["--data", str(desk.folder / "empty")]
    said = desk.run("status", *here, OPSCORE_API_URL=None)
    assert said.code == 1 and "opscore up" in said.err
    assert desk.run("doctor", *here, OPSCORE_API_URL=None).code == 2


def test_without_a_worker_it_says_to_start_one(servers: Servers, tmp_path: Path) -> None:
    with (
        running_stack(servers, tmp_path / "worker.log") as stack,
        serving(stack.environment, tmp_path / "web.log") as (_, port),
    ):
        bare = Desk(f"http://127.0.0.1:{port}", tmp_path)
        for words in ("doctor", "status"):
            said = bare.run(words)
            assert (
                said.code == 1 and "No worker lives" in said.out and "`opscore worker`" in said.out
            )


# --- Schedules ----------------------------------------------------------------------------------


def test_a_schedule_is_created_changed_triggered_and_deleted(desk: Desk) -> None:
    given = ["--workflow", "report", "--input", '{"topics": [], "mood": "good"}']
    said = desk.run("schedule", "create", "nightly", *given, "--cron", "*/90 * * * *", "--paused")
    assert said.code == 0 and "Warning: */90" in said.err and "paused" in said.out
    assert desk.run("schedule", "create", "nightly", *given, "--every", "60").code == 1
    changed = desk.run("schedule", "change", "nightly", "--every", "90", "--label", "a=b").is_fine()
    assert "every 90 s" in changed and '{"a": "b"}' in changed
    changed = desk.run(
        *("schedule", "change", "nightly", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin"),
        *("--end-at", "2099-01-01T00:00", "--overlap", "queue", "--catch-up", "all", "--json"),
    ).json()
    assert (changed["cron"], changed["everySeconds"]) == ("30 2 * * *", None)
    assert (
        desk.run("schedule", "change", "nightly", "--clear", "end-at", "--json").json()["endAt"]
        is None
    )
    assert "30 2 * * * (Europe/Berlin)" in desk.run("schedule", "list").is_fine()
    assert "enabled" not in desk.run("schedule", "show", "nightly").is_fine()
    assert desk.run("schedule", "resume", "nightly", "--json").json()["enabled"] is True
    assert desk.run("schedule", "pause", "nightly", "--json").json()["enabled"] is False
    assert len(desk.run("schedule", "preview", "nightly", "-n", "3").is_fine().splitlines()) == 4
    run = desk.run("schedule", "trigger", "nightly", "--json").json()
    assert desk.run("run", "watch", run["runId"]).code == 0
    told = desk.run("schedule", "history", "nightly").is_fine()
    assert re.search(rf"started +{run['runId']} +completed", told)
    assert "nightly" in desk.run("schedule", "list", "-q").is_fine().split()
    told = desk.run("schedule", "events", "nightly").is_fine()
    assert [line.split()[2] for line in told.splitlines()[1:3]] == [
        "schedule.triggered",
        "schedule.paused",
    ]
    assert len(desk.run("schedule", "events", "nightly", "--all", "--json").json()) == 7
    assert desk.run("schedule", "delete", "nightly").is_fine() == "Deleted nightly.\n"
    assert desk.run("schedule", "show", "nightly").code == 1


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["--cron", "* * * * * *"], "/cron"),
        (["--cron", "x"], "/cron"),
        (["--cron", "@daily", "--timezone", "Mars"], "/timezone"),
        (["--every", "0.5"], "/everySeconds"),
        ([], "/cron"),
        (["--cron", "@daily", "--every", "60"], "/cron"),
        (["--every", "60", "--start-at", "2030-01-02", "--end-at", "2030-01-01"], "/endAt"),
        (["--every", "60", "--input", "{}"], "/input"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_the_place(
    desk: Desk, words: Sequence[str], place: str
) -> None:
    fine = [] if "--input" in words else ["--input", '{"topics": []}']
    said = desk.run("schedule", "create", "bad", "--workflow", "report", *fine, *words)
    assert said.code == 1 and f"\n  {place}" in said.err, said
    assert "bad" not in [schedule["name"] for schedule in desk.client.schedules.list()]


# --- Terminals ----------------------------------------------------------------------------------


def on_terminal(
    desk: Desk, *words: str, until: str | None = None, **environment: str
) -> tuple[int, str]:
    """Run a command on a terminal of 24 lines of 80 columns; return its status and what it drew.

    Once it has drawn `until`, it is asked to end.
    """
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    env = {**desk.environment, "TERM": "xterm-256color", **environment}
    process = desk.start(*words, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    drawn = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([master], [], [], 60)[0]:
        try:
            drawn += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if until and until in drawn.decode(errors="replace"):
            process.terminate()
            until = None
    os.close(master)
    return process.wait(10), drawn.decode()


def test_a_watch_draws_a_tree_on_a_terminal(desk: Desk) -> None:
    run_id = desk.submit("asking", {})
    task = desk.asked(run_id)
    watch = desk.start("task", "approve", task)
    code, drawn = on_terminal(desk, "run", "watch", run_id)
    watch.communicate()
    assert code == 0 and "asking" in drawn and "├──" in drawn and "output:" in drawn
    assert "\x1b[32m" in drawn
    code, drawn = on_terminal(desk, "run", "watch", run_id, NO_COLOR="1")
    assert code == 0 and "├──" in drawn and not re.search(r"\x1b\[3\dm", drawn)


def test_a_watch_has_room_on_any_terminal_and_leaves_the_cursor_as_it_was(desk: Desk) -> None:
    tasks = [{"taskId": f"t{n}", "type": "approval", "dependsOn": []} for n in range(10)]
    tasks += [{"taskId": f"last{n}", "agentId": "echo", "dependsOn": ["t0"]} for n in range(30)]
    document = json.dumps({"id": "tall", "tasks": tasks})
    desk.run("workflow", "push", "-", input=document).is_fine()
    run_id = desk.run("run", "submit", "tall", "-q").is_fine().strip()
    desk.asked(run_id)
    desk.run("run", "pause", run_id).is_fine()
    way = f"opscore run resume {run_id}"
    code, drawn = on_terminal(desk, "run", "watch", run_id, until=" more: ")
    assert code == 128 + signal.SIGTERM and "\x1b[?25h" in drawn
    assert f"opscore task approve {desk.asked(run_id)}" in drawn
    assert way in drawn and "and 31 more: " in drawn and "last0" not in drawn
    desk.run("run", "cancel", run_id).is_fine()


def test_a_run_that_begins_later_says_when(desk: Desk) -> None:
    run_id = desk.submit("asking", {}, "--start-at", "2099-01-01T00:00")
    assert "start_at 2099-01-01 00:00:00" in desk.run("run", "list", "-n", "1").out
    _, drawn = on_terminal(desk, "run", "watch", run_id, until="start_at 2099-01-01 00:00:00")
    assert "start_at 2099-01-01 00:00:00" in drawn
    desk.run("run", "cancel", run_id).is_fine()


def test_no_id_is_broken_on_a_narrow_terminal(desk: Desk) -> None:
    run_id = desk.submit("asking", {})
    task = desk.asked(run_id)
    for words, wanted in (
        (["run", "list"], f"{run_id}  asking"),
        (["run", "show", run_id], f"{task}  ok "),
        (["task", "list", "--run", run_id], f"{task}  ok "),
        (["status"], f"{task}  ok "),
    ):
        drawn = re.sub(r"\x1b\[\d*m", "", on_terminal(desk, *words)[1])
        assert wanted in drawn and max(map(len, drawn.splitlines())) <= 80, drawn
    assert run_id in desk.run("task", "list", "--run", run_id).is_fine(), "elsewhere there is room"
    desk.run("run", "cancel", run_id).is_fine()


def test_no_agent_and_no_user_moves_the_cursor(desk: Desk) -> None:
    run_id = desk.submit("report", {"topics": [HOSTILE], "mood": HOSTILE})
    for words in (["run", "watch", run_id], ["run", "show", run_id], ["run", "list"]):
        _, drawn = on_terminal(desk, *words)
        assert "\x07" not in drawn and "\x1b]" not in drawn
        assert "not today" in drawn and "\x1b[31mred" not in drawn


def test_ctrl_c_ends_the_watch_and_not_the_run(desk: Desk) -> None:
    run_id = desk.submit("asking", {})
    desk.asked(run_id)
    watch = desk.start("run", "watch", run_id)
    assert watch.stdout is not None
    while "task.waiting" not in watch.stdout.readline():
        assert watch.poll() is None
    assert re.fullmatch(r"opscore task approve [0-9a-f-]{36}\n", watch.stdout.readline())
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=20)
    assert watch.returncode == 130 and "The run goes on" in err and "Traceback" not in err
    assert desk.run("run", "cancel", run_id, "--json").json()["status"] in (
        "waiting",
        "running",
        "cancelled",
    )


def test_a_reader_that_leaves_is_no_accident(desk: Desk) -> None:
    for _ in range(2):
        desk.submit("report", {"topics": [], "mood": "good"})
    lister = desk.start("run", "list", "--all", "--json")
    assert lister.stdout is not None
    lister.stdout.close()
    assert lister.stderr is not None
    assert "Traceback" not in lister.stderr.read()
    lister.stderr.close()
    lister.wait(20)
