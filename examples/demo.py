"""The demonstration: start the stack, run the dependency audit over HTTP, show it, stop everything.

Talks to the stack as any client would: it knows its URL and key from `opscore.env`, and nothing
else. Whatever happens, Ctrl-C included, no process and no port outlives it. `fleet_demo.py` has
its own play on the same stage.
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
from typing import Any, NamedTuple

import httpx2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "demo-report"
PREFIX = "/v1/opscore"
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
ENDED = ("completed", "failed", "cancelled")

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
    """`opscore up` as a child process in a session of its own, its data in a temporary folder.

    `options` are more options of that command. `before_stop` is called whenever `stop` is.
    """

    def __init__(self, log: Path, **options: object) -> None:
        self.log = log
        self.signals = Signals()
        self.environment: dict[str, str] = {}
        """More of it than the demonstration's own."""
        self.before_stop: Callable[[], object] = lambda: None
        self._options = {"workers": WORKERS, **options}
        self._process: subprocess.Popen[bytes] | None = None
        self._data: Path | None = None

    def start(self) -> None:
        self.log.parent.mkdir(exist_ok=True)
        given = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
        with self.signals.held(), self.log.open("wb") as log:
            self._data = Path(tempfile.mkdtemp(prefix="opscore-demo-"))
            options = {"data": self._data, **self._options}.items()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opscore", "up", *(f"--{k}={v}" for k, v in options)],
                cwd=ROOT,
                env=given
                | self.environment
                | {"TMPDIR": str(self._data)},  # what is killed leaves its files there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches us alone, and we pass it on once
            )
        self.signals.hurry = self._ask_to_stop

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
        self.before_stop()
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

    def is_ready(self, workflows: Sequence[str] = ()) -> bool:
        """Tell whether every part answers and the workflows are there."""
        paths = ("/ready", *(f"{PREFIX}/workflows/{name}" for name in workflows))
        try:
            return all(self._http.get(path).status_code == 200 for path in paths)
        except httpx2.TransportError:
            return False

    def submit(self, workflow: str, value: Json) -> str:
        """Start a run of the workflow and return its id."""
        run: Json = self.ask("POST", "/runs", json={"workflowId": workflow, "input": value})
        return str(run["runId"])

    def run(self, run_id: str) -> Json:
        """Return the run with its tasks: when it is over, or soon."""
        run: Json = self.ask("GET", f"/runs/{run_id}", params={"waitSeconds": POLL_SECONDS})
        return run

    def busy_agents(self) -> dict[str, int]:
        """Return how many attempts each agent that works has."""
        agents: Sequence[Json] = self.ask("GET", "/agents")["items"]
        return {one["agentId"]: one["running"] for one in agents if one.get("running")}

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """Call once the API answers; return what it says."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return _body(self._http.request(method, PREFIX + path, **more))
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


class Line(NamedTuple):
    """What is said of one thing: at once when its status changes; of its counts now and then."""

    name: str
    status: str
    counts: str = ""


class Screen:
    """Shows what goes on: redrawn in place on a terminal, else a line for each change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._statuses: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._said_at = 0.0

    def __enter__(self) -> "Screen":
        if _is_screen(self._console):
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, drawn: RenderableType, lines: Sequence[Line]) -> None:
        if self._live is not None:
            self._live.update(drawn)
        else:
            self._say(lines)

    def _say(self, lines: Sequence[Line]) -> None:
        """Say what changed; counts at most once a second."""
        counts_too = time.monotonic() - self._said_at >= 1
        for name, status, counts in lines:
            if self._statuses.get(name) != status or counts_too:
                self._say_once(name, f"{status} {counts}".rstrip())
            self._statuses[name] = status

    def _say_once(self, name: str, words: str) -> None:
        if self._said.get(name) != words:
            self._said[name], self._said_at = words, time.monotonic()
            self._console.print(words, highlight=False, soft_wrap=True)


def _is_screen(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def table(*titles: str, numbers: Sequence[str] = ()) -> Table:
    """Return a table without lines; `numbers` are the titles of more columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title)
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def _drawn(run: Json, busy: Mapping[str, int], flower: str) -> RenderableType:
    working = ", ".join(f"{agent} x{count}" for agent, count in busy.items())
    head = Text.assemble(
        "Run ", (run["runId"], "bold"), " is ", (run["status"], colour(run["status"]))
    )
    tasks = table("Task", "Status", "Items", "")
    for task in _definition_tasks(run):
        status = Text(_standing(task), colour(task["status"]))
        tasks.add_row(task["taskDefinitionId"], status, _counted(task), _bar(task))
    foot = Text(f"Agents at work: {working or 'none'}\nFlower: {flower}", "dim")
    return Group(head, tasks, foot)


def _lines(run: Json) -> list[Line]:
    lines = [Line("run", f"run {run['runId']}: {run['status']}")]
    for task in _definition_tasks(run):
        name = task["taskDefinitionId"]
        lines.append(Line(name, f"  {name}: {_standing(task)}", _counted(task)))
    return lines


def _definition_tasks(run: Json) -> list[Json]:
    return [task for task in run["tasks"] if task.get("index") is None]


def _standing(task: Json) -> str:
    if task.get("reason") == "children":
        return "running its items"
    return f"{task['status']} ({task['reason']})" if task.get("reason") else str(task["status"])


def colour(status: str) -> str:
    return COLOURS.get(status, "yellow")


def _ended(items: Json) -> int:
    return sum(items.get(status, 0) for status in ENDED)


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
    """Run the audit, show it and where its reports are."""
    env = start(console, stack, [WORKFLOW])
    with contextlib.closing(Api(env, stack)) as api:
        started = time.monotonic()
        run_id = api.submit(WORKFLOW, {"folder": str(REPORTS)})
        run = _follow(console, env, api, run_id)
        seconds = time.monotonic() - started
    if run["status"] != "completed":
        raise DemoFailed(_why_failed(run))
    console.print(_result(run, seconds))
    for kind in ("markdown", "json"):
        console.print(f"Report: {_short(run['output'][kind])}", soft_wrap=True, highlight=False)


def start(console: Console, stack: Stack, workflows: Sequence[str] = ()) -> dict[str, str]:
    """Start the stack and return where it is, once it is ready and has the workflows."""
    with _status(console, "Starting PostgreSQL, Valkey, web, workers, beat and Flower"):
        stack.start()
        env = stack.wait_for_env()
        with contextlib.closing(Api(env, stack)) as api:
            failure = "The API did not become ready"
            stack.wait_until(lambda: api.is_ready(workflows), READY_SECONDS, failure)
    console.print(f"The stack is up: {env['OPSCORE_API_URL']}/docs", soft_wrap=True)
    return env


@contextlib.contextmanager
def _status(console: Console, words: str) -> Iterator[None]:
    if _is_screen(console):
        with console.status(f"{words} ..."):
            yield
    else:
        console.print(f"{words} ...", highlight=False)
        yield


def _follow(console: Console, env: Mapping[str, str], api: Api, run_id: str) -> Json:
    """Show the run until it is over, and return how it is then."""
    deadline = time.monotonic() + RUN_SECONDS
    with Screen(console) as screen:
        while True:
            run = api.run(run_id)
            screen.show(_drawn(run, api.busy_agents(), env["FLOWER_URL"]), _lines(run))
            if run["status"] in ENDED:
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


def perform(work: Callable[[Console, Stack], None], stack: Stack) -> int:
    """Do the work, stop everything whatever happens, and return the exit status."""
    console, signals = Console(), stack.signals
    signals.listen()
    try:
        try:
            work(console, stack)
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


def main() -> int:
    """Run the demonstration and return its exit status."""
    options = {"agents": "examples.dependency_audit", "workflows": ROOT / "examples"}
    return perform(audit, Stack(REPORTS / "demo.log", **options))


if __name__ == "__main__":
    sys.exit(main())
