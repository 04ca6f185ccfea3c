"""The demonstration: start the stack, run the dependency audit over HTTP, show it, stop everything.

Talks to the stack as any client would: it knows its URL and key from `opscore.env`, and nothing
else. Whatever happens, Ctrl-C included, no process and no port outlives it.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "demo-report"
WORKFLOW = "dependency-audit"
WORKERS = 2

READY_SECONDS = 90.0
"""For the stack to be ready; a first start makes a database."""
RUN_SECONDS = 300.0
"""For the audit; a few seconds in an ordinary environment."""
STOP_SECONDS = 45.0
"""For the stack to stop in order; then it is killed."""
AWAY_SECONDS = 10.0
"""For the API to answer again: the stack restarts what dies."""
POLL_SECONDS = 0.25
LOG_LINES = 25

OURS = ("OPSCORE_", "FLOWER_", "CELERY_", "DATABASE_URL", "REDIS_URL", "PG")
"""Variables kept from the stack: the demonstration touches no server but its own."""

COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "cancelled": "red"}

Json = dict[str, Any]


class DemoFailed(Exception):
    """It cannot go on; the message says why."""


class Interrupted(BaseException):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `Interrupted`, once, and never while held."""

    def __init__(self) -> None:
        self._held = False
        self._asked: int | None = None
        self.hurry: Callable[[], None] = lambda: None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self._asked is not None:
            self.hurry()
            return
        self._asked = number
        if not self._held:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise what comes meanwhile at the end."""
        self._held = True
        yield
        self._held = False
        if self._asked is not None:
            raise Interrupted(self._asked)

    def hold(self) -> None:
        """Raise nothing any more."""
        self._held = True


class Stack:
    """`opscore up` as a child process in a session of its own, its data in a temporary folder."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._process: subprocess.Popen[bytes] | None = None
        self._data: Path | None = None
        self.log = REPORTS / "demo.log"

    def start(self) -> None:
        REPORTS.mkdir(exist_ok=True)
        given = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
        with self._signals.held(), self.log.open("wb") as log:
            self._data = Path(tempfile.mkdtemp(prefix="opscore-demo-"))
            self._process = self._launch(self._data, given, log)
        self._signals.hurry = self._ask_to_stop

    def _launch(
        self, data: Path, environment: Mapping[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        options = {
            "--data": data,
            "--agents": "examples.dependency_audit",
            "--workflows": ROOT / "examples",
            "--workers": WORKERS,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "opscore", "up", *(f"{k}={v}" for k, v in options.items())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
        )

    def wait_for_env(self) -> dict[str, str]:
        """Return what the stack wrote of where it is, once it has."""
        assert self._data is not None
        file = self._data / "opscore.env"
        self.wait_until(file.exists, READY_SECONDS, "The stack did not start")
        lines = shlex.split(file.read_text(), comments=True)
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def wait_until(self, condition: Callable[[], bool], seconds: float, failure: str) -> None:
        """Poll `condition`.

        Raises:
            DemoFailed: the stack ended, or `seconds` passed.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise DemoFailed(f"{failure} within {seconds:g} s.")
            time.sleep(POLL_SECONDS / 2)

    def check(self) -> None:
        """Raise DemoFailed if the stack has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise DemoFailed(f"The stack ended with status {self._process.returncode}.")

    def stop(self) -> bool:
        """Stop everything and remove the data; return False if it had to be killed."""
        in_order = True
        if self._process is not None:
            in_order = self._end(self._process)
        if self._data is not None:
            # As root, PostgreSQL's files lie elsewhere if the folders above are closed to it.
            shutil.rmtree((self._data / "postgres").resolve(), ignore_errors=True)
            shutil.rmtree(self._data, ignore_errors=True)
        return in_order

    def _end(self, process: subprocess.Popen[bytes]) -> bool:
        self._ask_to_stop()
        try:
            process.wait(STOP_SECONDS)
            return True
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False

    def _ask_to_stop(self) -> None:
        """Ask once more for each call; the stack hurries when it is asked twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def last_lines(self) -> list[str]:
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return []


class Api:
    """The calls of the demonstration. Each raises DemoFailed with the server's own words."""

    def __init__(self, env: Mapping[str, str], stack: Stack) -> None:
        self._stack = stack
        self._http = httpx2.Client(
            base_url=env["OPSCORE_API_URL"],
            headers={"Authorization": f"Bearer {env['OPSCORE_API_KEY']}"},
            timeout=10.0,
            trust_env=False,  # a proxy is no way to this machine
        )

    def close(self) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        """Tell whether every part answers and the workflow is there."""
        paths = ("/ready", f"/v1/opscore/workflows/{WORKFLOW}")
        try:
            return all(self._http.get(path).status_code == 200 for path in paths)
        except httpx2.TransportError:
            return False

    def submit(self, value: Json) -> str:
        """Start a run of the workflow and return its id."""
        run: Json = self._ask(
            "POST",
            "/v1/opscore/runs",
            json={"workflowId": WORKFLOW, "input": value},
        )
        return str(run["runId"])

    def run(self, run_id: str) -> Json:
        """Return the run with its tasks: when it is over, or soon."""
        run: Json = self._ask(
            "GET", f"/v1/opscore/runs/{run_id}", params={"waitSeconds": POLL_SECONDS}
        )
        return run

    def busy_agents(self) -> dict[str, int]:
        """Return how many attempts each agent that works has."""
        agents: Sequence[Json] = self._ask("GET", "/v1/opscore/agents")["items"]
        return {one["agentId"]: one["running"] for one in agents if one.get("running")}

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return _body(self._http.request(method, path, **more))
            except httpx2.TransportError as error:
                self._stack.check()
                if time.monotonic() > deadline:
                    raise DemoFailed(f"The API does not answer: {error}") from error
                time.sleep(POLL_SECONDS)


def _body(response: httpx2.Response) -> Any:
    if response.is_success:
        return response.json()
    try:
        problem = response.json()
        words = " ".join([problem["detail"], json.dumps(problem.get("errors", ""))])
    except (ValueError, KeyError, TypeError):
        words = response.text[:500]
    raise DemoFailed(f"The API answered {response.status_code}: {words}")


# What is seen


class Screen:
    """Shows a run as it goes: redrawn in place on a terminal, else a line for each change."""

    def __init__(self, console: Console, env: Mapping[str, str], run_id: str) -> None:
        self._console = console
        self._flower, self._run_id = env["FLOWER_URL"], run_id
        self._live: Live | None = None
        self._said: dict[str, str] = {}
        self._said_at = 0.0

    def __enter__(self) -> "Screen":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, run: Json, busy: Mapping[str, int]) -> None:
        if self._live is not None:
            self._live.update(self._drawn(run, busy))
        else:
            self._say(run)

    def _drawn(self, run: Json, busy: Mapping[str, int]) -> RenderableType:
        working = ", ".join(f"{agent} x{count}" for agent, count in busy.items())
        head = Text.assemble(
            "Run ", (self._run_id, "bold"), " is ", (run["status"], _colour(run["status"]))
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("Task", "Status", "Items", ""):
            table.add_column(title, header_style="dim")
        for task in _definition_tasks(run):
            status = Text(_standing(task), _colour(task["status"]))
            table.add_row(task["taskDefinitionId"], status, _counted(task), _bar(task))
        foot = Text(f"Agents at work: {working or 'none'}\nFlower: {self._flower}", "dim")
        return Group(head, table, foot)

    def _say(self, run: Json) -> None:
        """Say what changed; counts of items at most once a second."""
        self._say_once("run", f"run {self._run_id}: {run['status']}")
        counts_too = time.monotonic() - self._said_at >= 1
        for task in _definition_tasks(run):
            name, status = task["taskDefinitionId"], _standing(task)
            new = self._said.get(f"{name} status") != status
            self._said[f"{name} status"] = status
            if new or counts_too:
                self._say_once(name, f"  {name}: {status} {_counted(task)}".rstrip())

    def _say_once(self, what: str, words: str) -> None:
        if self._said.get(what) != words:
            self._said[what], self._said_at = words, time.monotonic()
            self._console.print(words, highlight=False, soft_wrap=True)


def _definition_tasks(run: Json) -> list[Json]:
    return [task for task in run["tasks"] if task.get("index") is None]


def _standing(task: Json) -> str:
    if task.get("reason") == "children":
        return "running its items"
    return f"{task['status']} ({task['reason']})" if task.get("reason") else str(task["status"])


def _colour(status: str) -> str:
    return COLOURS.get(status, "yellow")


def _ended(items: Json) -> int:
    return sum(items.get(status, 0) for status in ("completed", "failed", "cancelled"))


def _counted(task: Json) -> str:
    items = task.get("items")
    if not items or not items.get("total"):
        return ""
    parts = [f"{_ended(items)} of {items['total']}"]
    parts += [f"{items[name]} {name}" for name in ("running", "failed") if items.get(name)]
    return ", ".join(parts)


def _bar(task: Json) -> RenderableType:
    items = task.get("items")
    if not items or not items.get("total"):
        return ""
    return ProgressBar(total=items["total"], completed=_ended(items), width=30)


def _result(run: Json, seconds: float) -> RenderableType:
    summary = run["output"]["summary"]
    table = Table(title=f"The audit took {seconds:.1f} s", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("Distributions", "distributions", False),
        ("Megabytes on disk", "sizeBytes", False),
        ("Files compared with the hash in RECORD", "verified", False),
        ("Files changed since installation", "changed", True),
        ("Files missing", "missing", True),
        ("Requirements not met", "unmet", True),
        ("Licence unknown", "unknownLicence", True),
        ("Could not be audited", "notAudited", True),
    ]
    for words, key, alarming in rows:
        amount = summary[key] / 1e6 if key == "sizeBytes" else summary[key]
        style = "bold yellow" if alarming and amount else ""
        table.add_row(words, Text(f"{amount:,.0f}", style))
    return table


# What is done


def audit(console: Console, stack: Stack) -> None:
    """Start the stack, run the audit, show it and where its reports are."""
    with _status(console, "Starting PostgreSQL, Valkey, web, workers, beat and Flower"):
        stack.start()
        env = stack.wait_for_env()
        with contextlib.closing(Api(env, stack)) as api:
            stack.wait_until(api.is_ready, READY_SECONDS, "The API did not become ready")
    with contextlib.closing(Api(env, stack)) as api:
        console.print(f"The stack is up: {env['OPSCORE_API_URL']}/docs", soft_wrap=True)
        started = time.monotonic()
        run_id = api.submit({"folder": str(REPORTS)})
        run = _follow(console, env, api, run_id)
        seconds = time.monotonic() - started
    if run["status"] != "completed":
        raise DemoFailed(_why_failed(run))
    console.print(_result(run, seconds))
    for kind in ("markdown", "json"):
        console.print(f"Report: {_short(run['output'][kind])}", soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _status(console: Console, words: str) -> Iterator[None]:
    if console.is_terminal and not console.is_dumb_terminal:
        with console.status(f"{words} ..."):
            yield
    else:
        console.print(f"{words} ...", highlight=False)
        yield


def _follow(console: Console, env: Mapping[str, str], api: Api, run_id: str) -> Json:
    """Show the run until it is over, and return how it is then."""
    deadline = time.monotonic() + RUN_SECONDS
    with Screen(console, env, run_id) as screen:
        while True:
            run = api.run(run_id)
            screen.show(run, api.busy_agents())
            if run["status"] in ("completed", "failed", "cancelled"):
                return run
            if time.monotonic() > deadline:
                raise DemoFailed(f"The run is still {run['status']} after {RUN_SECONDS:g} s.")


def _why_failed(run: Json) -> str:
    failed = [
        f"  {task['taskDefinitionId']}: {task['error'].get('message')}"
        for task in run["tasks"]
        if task.get("error")
    ]
    why = (run.get("error") or {}).get("message") or run.get("reason") or ""
    return "\n".join([f"The run ended as {run['status']}. {why}".rstrip(), *failed[:5]])


def _short(path: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def main() -> int:
    """Run the demonstration and return its exit status."""
    console, signals = Console(), Signals()
    stack = Stack(signals)
    signals.listen()
    try:
        try:
            audit(console, stack)
            status = 0
        except DemoFailed as error:
            status = _fail(stack, str(error))
        except OSError as error:
            status = _fail(stack, f"The demonstration cannot go on: {error}")
        finally:
            signals.hold()
            in_order = _stop(console, stack)
    except Interrupted as interrupted:
        signals.hold()
        stack.stop()  # again: the signal may have come just before it was asked to
        return 128 + interrupted.number
    return status if in_order else _fail(stack, "The stack had to be killed.")


def _stop(console: Console, stack: Stack) -> bool:
    try:
        console.print("Stopping everything ...", highlight=False)
    finally:  # rich ends the program where nobody reads any more
        in_order = stack.stop()
    console.print("Everything is stopped.", highlight=False)
    return in_order


def _fail(stack: Stack, words: str) -> int:
    with contextlib.suppress(OSError):
        print(f"\nThe demonstration failed. {words}", file=sys.stderr)
        if lines := stack.last_lines():
            print(f"\nThe end of {_short(str(stack.log))}:", *lines, sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
