"""The supervisor, with tiny stand-in programs, in a process of its own as `opscore up` has it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opscore.processes import Program, StartFailed, Supervisor, wait_until

ROOT = Path(__file__).parents[1]

STAND_IN = """
import os, pathlib, signal, sys
name, folder, manner = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
def note(event):
    with open(folder / "events", "a") as events: events.write(f"{event} {name}\\n")
def leave(*_):
    note("down")
    os._exit(0)
deaf = {"stubborn", "deaf"} & {*manner}
signal.signal(signal.SIGTERM, (lambda *_: print("asked", flush=True)) if deaf else leave)
note("up")
if "parent" in manner and (child := os.fork()) == 0:
    (folder / f"{name}.child").write_text(str(os.getpid()))
    while True: signal.pause()
(folder / f"{name}.pid").write_text(str(os.getpid()))
if "silent" not in manner: (folder / f"{name}.ready").touch()
print(f"hello from {name}", flush=True)
while True: signal.pause()
"""

SUPERVISOR = """
import json, os, pathlib, sys, time
from opscore.processes import Program, Stopped, Supervisor
folder, stages = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
def say(name, line): print(f"{name} | {line}", flush=True)
def note(children):
    state = [(c.program.name, c.state, c.restarts) for c in children]
    (folder / "state.new").write_text(json.dumps(state))
    (folder / "state.new").rename(folder / "state")
def program(name, *manner):
    ready = folder / f"{name}.ready"
    argv = [sys.executable, "-S", str(folder / "stand_in.py"), name, str(folder), *manner]
    return Program(name, argv, dict(os.environ), prepare=lambda: ready.unlink(missing_ok=True),
                   ready=ready.exists, grace_seconds=0.3 if "stubborn" in manner else 20)
supervisor = Supervisor(say, note)
supervisor.listen()
try:
    for stage in stages: supervisor.start([program(*p) for p in stage])
    (folder / "everything.ready").touch()
    supervisor.watch()
except Stopped:
    print("stopped early", flush=True)
finally:
    supervisor.stop()
"""


class Running:
    """A supervisor of stand-ins, and the folder they leave their marks in."""

    def __init__(self, folder: Path, *stages: list[list[str]]) -> None:
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        with open(folder / "output", "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, str(folder), json.dumps(stages)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def events(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "events").read_text().splitlines()
        return []

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def states(self) -> Any:
        return json.loads((self.folder / "state").read_text())

    def pid(self, name: str, of: str = "pid") -> int:
        path = self.folder / f"{name}.{of}"
        until(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())

    def until_ready(self) -> None:
        until((self.folder / "everything.ready").exists, self.output)


def until(condition: Callable[[], bool], seen: Callable[[], object] = lambda: "") -> None:
    assert wait_until(condition, 20), seen()


def is_gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*stages: list[list[str]]) -> Running:
        started.append(Running(tmp_path, *stages))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


def test_stages_start_in_order_and_stop_in_reverse(run: Callable[..., Running]) -> None:
    stack = run([["a"]], [["b"]], [["c"]])
    stack.until_ready()
    assert stack.events() == ["up a", "up b", "up c"]
    stack.process.terminate()
    assert stack.process.wait(20) == 0
    assert stack.events()[3:] == ["down c", "down b", "down a"]
    assert "a | hello from a" in stack.output()


def test_a_stage_waits_until_the_one_before_is_ready(run: Callable[..., Running]) -> None:
    stack = run([["a", "silent"]], [["b"]])
    stack.pid("a")
    assert stack.events() == ["up a"]
    (stack.folder / "a.ready").touch()
    stack.until_ready()
    assert stack.events() == ["up a", "up b"]


def test_a_dead_child_is_started_again_after_a_growing_delay(run: Callable[..., Running]) -> None:
    stack = run([["a"], ["b"]])
    stack.until_ready()
    for deaths in (1, 2):
        (stack.folder / "a.pid").rename(stack.folder / "a.old")
        os.kill(stack.pid("a", "old"), signal.SIGKILL)
        until(lambda n=deaths: ["a", "ready", n] in stack.states(), stack.output)  # type: ignore[misc]
    assert "ended with status -9; starts again in 0.5 s" in stack.output()
    assert "ended with status -9; starts again in 1.0 s" in stack.output()
    assert ["b", "ready", 0] in stack.states()


def test_what_a_dead_child_leaves_behind_is_ended(run: Callable[..., Running]) -> None:
    stack = run([["a", "parent"]])
    stack.until_ready()
    grandchild = stack.pid("a", "child")
    os.kill(stack.pid("a"), signal.SIGKILL)
    until(lambda: is_gone(grandchild))


def test_a_child_that_does_not_stop_is_killed(run: Callable[..., Running]) -> None:
    stack = run([["a"]], [["b", "stubborn"]])
    stack.until_ready()
    stack.process.terminate()
    assert stack.process.wait(20) == 0
    assert is_gone(stack.pid("b"))
    assert stack.events()[-1] == "down a"


def test_a_frozen_child_is_stopped(run: Callable[..., Running]) -> None:
    stack = run([["a"]])
    stack.until_ready()
    os.kill(stack.pid("a"), signal.SIGSTOP)
    stack.process.terminate()
    assert stack.process.wait(20) == 0
    assert stack.events()[-1] == "down a"


def test_a_signal_during_the_start_ends_what_was_started(run: Callable[..., Running]) -> None:
    stack = run([["a"]], [["b", "silent"]], [["c"]])
    stack.pid("b")
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(20) == 0
    assert stack.events() == ["up a", "up b", "down b", "down a"]
    assert "stopped early" in stack.output()


def test_a_second_signal_hurries(run: Callable[..., Running]) -> None:
    stack = run([["a", "deaf"]])
    stack.until_ready()
    asked = time.monotonic()
    stack.process.send_signal(signal.SIGINT)
    until(lambda: "a | asked" in stack.output(), stack.output)
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(20) == 0
    assert time.monotonic() - asked < 10  # its grace is 20 s


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_nothing_survives_a_killed_supervisor(run: Callable[..., Running]) -> None:
    stack = run([["a"]], [["b", "stubborn"]])
    stack.until_ready()
    stack.process.kill()
    until(lambda: all(is_gone(stack.pid(name)) for name in "ab"))


def _shell(name: str, script: str, **more: Any) -> Program:
    return Program(name, ["/bin/sh", "-c", script], dict(os.environ), **more)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(lambda name, line: None, lambda children: None)
    yield made
    made.stop()


def test_a_start_fails_with_the_last_words(supervisor: Supervisor) -> None:
    broken = _shell("broken", "echo no such thing; exit 3", ready=lambda: False)
    with pytest.raises(StartFailed, match=r"(?s)broken ended with status 3:.*no such thing"):
        supervisor.start([_shell("well", "sleep 60"), broken])


def test_a_start_fails_if_somebody_is_late(supervisor: Supervisor) -> None:
    late = _shell("late", "echo still thinking; sleep 60", ready=lambda: False)
    with pytest.raises(StartFailed, match=r"(?s)late.*still thinking"):
        supervisor.start([_shell("well", "sleep 60"), late], timeout_seconds=0.3)


def test_a_program_may_be_tried_again_in_another_way(supervisor: Supervisor) -> None:
    heard: list[str] = []

    def again(words: str) -> Program:
        heard.append(words)
        return _shell("p", "sleep 60")

    supervisor.start([_shell("p", "echo taken; exit 1", ready=lambda: False, again=again)])
    assert heard == ["taken"]


def test_a_call_passes_errors_on(supervisor: Supervisor) -> None:
    def fail() -> None:
        raise StartFailed("because")

    with pytest.raises(StartFailed, match="because"):
        supervisor.call(fail)
