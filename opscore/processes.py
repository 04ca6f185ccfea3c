"""Child processes: launch one, stop one, and keep a set of them running.

Owns the rules every child lives by: its own process group, one merged output, no life after ours,
restart with back-off, stop in reverse order with escalation. Knows nothing of what the programs do;
they come as data (`Program`).
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO

from opscore.errors import OpsCoreError

POLL_SECONDS = 0.02
"""How often a condition is looked at while waiting for it."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged user a program runs as, when we are root."""

    name: str
    uid: int
    gid: int


def _always_ready() -> bool:
    return True


def _nothing() -> None:
    pass


def _give_up(last_words: str) -> "Program | None":
    return None


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, how to know that it is ready, and how to stop it."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    folder: Path | None = None
    account: Account | None = None
    ready: Callable[[], bool] = _always_ready
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL  # what it gets if we are killed
    grace_seconds: float = 10.0  # between `stop_signal` and SIGKILL
    url: str | None = None  # where it listens, for people
    prepare: Callable[[], None] = _nothing  # before every launch
    again: "Callable[[str], Program | None]" = _give_up  # after it ended with these last words


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(death_signal: int = signal.SIGKILL) -> None:
    """Have this process get `death_signal` when the thread that made it ends (Linux only)."""
    if (libc := _libc()) is not None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)


def _before_exec(libc: ctypes.CDLL | None, death_signal: int, parent: int) -> None:
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew of our wish
        os._exit(1)


def launch(program: Program, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `program`; it dies with the calling *thread*, so call this from a lasting one.

    Raises: OSError when it cannot be executed.
    """
    account = program.account
    with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads; ours only execs
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            list(program.argv),
            env=dict(program.env),
            cwd=program.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C is ours to pass on, in order
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=None if account is None else [],
            preexec_fn=partial(_before_exec, _libc(), int(program.death_signal), os.getpid()),
        )


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal `process` and everything it started in its group, also if stopped by SIGSTOP."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGCONT)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether `process` has ended; if so, end what is left of its group, then reap it."""
    if process.returncode is not None:
        return True
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    signal_group(process, signal.SIGKILL)  # before reaping: the group's number is still its own
    process.wait()
    return True


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll `condition` for at most `seconds`; return what it last said."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return met


def stop(process: subprocess.Popen[bytes], stop_signal: int, grace_seconds: float) -> int:
    """Ask `process` to end, kill it after `grace_seconds`, and return its exit status."""
    if not has_ended(process):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(stop_signal)
            process.send_signal(signal.SIGCONT)
    if not wait_until(partial(has_ended, process), grace_seconds):
        signal_group(process, signal.SIGKILL)
        wait_until(partial(has_ended, process), grace_seconds)
    return process.wait()


# -- the supervisor --------------------------------------------------------------------------

START_SECONDS = 90.0
"""How long a stage may take until all of it is ready; a cold disk is slow."""
FIRST_DELAY_SECONDS = 0.5
LAST_DELAY_SECONDS = 10.0
"""A child that ended is started again after the first delay, doubled each time up to the last."""
STEADY_SECONDS = 30.0
"""A child that lived this long starts again with the first delay."""
HURRY_SECONDS = 1.0
"""What is left of every grace once we are asked to stop a second time."""
WATCH_SECONDS = 0.1
"""How often the children are looked after once everything is up."""
PROBE_SECONDS = 0.15
LAST_LINES = 15
LINE_BYTES = 65_536


class StartFailed(OpsCoreError):
    """A part of the stack did not start."""

    code = "start_failed"


class Stopped(OpsCoreError):
    """Stopped before everything was up."""

    code = "stopped"


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # ended by itself, waits for its next start
    STOPPED = "stopped"


class Child:
    """One program of the stack and the process it has at the moment."""

    def __init__(self, program: Program, say: Callable[[str, str], None]) -> None:
        self.program = program
        self.state = State.STARTING
        self.restarts = 0
        self.was_ready = False
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.process: subprocess.Popen[bytes]
        self.started = self.due = time.monotonic()
        self._delay = FIRST_DELAY_SECONDS
        self._next_probe = 0.0
        self._say = say
        self._reader: threading.Thread

    @property
    def last_words(self) -> str:
        self._reader.join(HURRY_SECONDS)
        return "\n".join(self.last_lines)

    def launch(self) -> None:
        self.program.prepare()
        self.state, self.started = State.STARTING, time.monotonic()
        self.process = launch(self.program, subprocess.PIPE)
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self._reader.start()

    def _read(self, output: IO[bytes]) -> None:
        with output:
            for line in iter(partial(output.readline, LINE_BYTES), b""):
                text = line.decode(errors="replace").rstrip()
                self.last_lines.append(text)
                self._say(self.program.name, text)

    def look(self) -> bool:
        """Move on to what is true now; return whether that is another state than before."""
        before = self.state
        if before is State.RESTARTING and time.monotonic() >= self.due:
            self._launch_again()
        elif before in (State.STARTING, State.READY) and has_ended(self.process):
            self._ended()
        elif before is State.STARTING and self._is_ready():
            self.state, self.was_ready = State.READY, True
        return self.state is not before

    def _is_ready(self) -> bool:
        """Ask the program, but not more often than every PROBE_SECONDS: it logs requests."""
        if (now := time.monotonic()) < self._next_probe:
            return False
        self._next_probe = now + PROBE_SECONDS
        return self.program.ready()

    def _launch_again(self) -> None:
        self.restarts += 1
        try:
            self.launch()
        except (OSError, OpsCoreError) as error:
            self._say(self.program.name, str(error))
            self._ended()

    def _ended(self) -> None:
        now = time.monotonic()
        if now - self.started >= STEADY_SECONDS:
            self._delay = FIRST_DELAY_SECONDS
        self.state, self.due = State.RESTARTING, now + self._delay
        self._delay = min(2 * self._delay, LAST_DELAY_SECONDS)

    def ask_to_stop(self) -> None:
        if self.state in (State.STARTING, State.READY) and not has_ended(self.process):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(self.program.stop_signal)
                self.process.send_signal(signal.SIGCONT)
        self.asked = time.monotonic()

    def is_gone(self, hurry: bool) -> bool:
        """Tell whether it has ended, killing it if it had its grace."""
        grace = min(self.program.grace_seconds, HURRY_SECONDS if hurry else math.inf)
        if not has_ended(self.process):
            if time.monotonic() - self.asked >= grace:
                signal_group(self.process, signal.SIGKILL)
            return False
        self.state = State.STOPPED
        return True


class Supervisor:
    """Keeps the children of each stage running, and ends them in reverse.

    `say(name, line)` gets every line the children print; `note(children)` is called after every
    change. SIGINT, SIGTERM and SIGHUP ask to stop; asked twice, it hurries.
    Everything but `call` happens in the thread that made it, which children do not outlive.
    """

    def __init__(
        self, say: Callable[[str, str], None], note: Callable[[Sequence[Child]], None]
    ) -> None:
        self._say = say
        self._note = note
        self._stages: list[list[Child]] = []
        self._asked = 0

    @property
    def children(self) -> list[Child]:
        return [child for stage in self._stages for child in stage]

    def listen(self) -> None:
        """Take the signals that ask to stop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked += 1

    def start(self, programs: Sequence[Program], timeout_seconds: float = START_SECONDS) -> None:
        """Start `programs` together, as the next stage, and wait until all are ready.

        Raises: StartFailed if one ends, or takes too long; Stopped if asked to stop meanwhile.
        """
        stage = [Child(program, self._say) for program in programs]
        self._stages.append([])
        for child in stage:
            child.launch()
            self._stages[-1].append(child)
        self._note(self.children)
        deadline = time.monotonic() + timeout_seconds
        while not all(child.was_ready for child in stage):
            self._tend(POLL_SECONDS)
            for child in stage:
                self._insist(child)
            if time.monotonic() > deadline:
                raise StartFailed(_not_ready(stage, timeout_seconds))

    def _insist(self, child: Child) -> None:
        """Start again what ended before it was ever ready, or give up."""
        if child.was_ready or child.state is not State.RESTARTING:
            return
        words = child.last_words
        program = child.program.again(words)
        if program is None:
            status = child.process.returncode
            raise StartFailed(f"{child.program.name} ended with status {status}:\n{words}")
        child.program = program
        child.launch()

    def call(self, function: Callable[[], None]) -> None:
        """Call `function` in a thread while the children are tended.

        Raises: what it raises; Stopped, leaving it behind, if asked to stop meanwhile.
        """
        outcome: Future[None] = Future()
        threading.Thread(target=_settle, args=[outcome, function], daemon=True).start()
        while not outcome.done():
            self._tend(POLL_SECONDS)
        outcome.result()

    def watch(self) -> None:
        """Keep everything running until asked to stop."""
        with contextlib.suppress(Stopped):
            while True:
                self._tend(WATCH_SECONDS)

    def _tend(self, seconds: float) -> None:
        """Look after every child, then rest for `seconds`."""
        if self._asked:
            raise Stopped
        changed = [child for child in self.children if child.look()]
        for child in changed:
            self._say(child.program.name, _report(child))
        if changed:
            self._note(self.children)
        time.sleep(seconds)

    def stop(self) -> None:
        """End everything, last stage first; within a stage all at once, last one first."""
        already = self._asked or 1
        for stage in reversed(self._stages):
            for child in reversed(stage):
                child.ask_to_stop()
            while not all([child.is_gone(self._asked > already) for child in stage]):
                time.sleep(POLL_SECONDS)
            self._note(self.children)


def _settle(outcome: "Future[None]", function: Callable[[], None]) -> None:
    try:
        function()
        outcome.set_result(None)
    except BaseException as error:
        outcome.set_exception(error)


def _report(child: Child) -> str:
    if child.state is State.RESTARTING:
        wait = max(child.due - time.monotonic(), 0)
        return f"ended with status {child.process.returncode}; starts again in {wait:.1f} s"
    return f"is {child.state} (pid {child.process.pid})"


def _not_ready(stage: Sequence[Child], seconds: float) -> str:
    late = [child for child in stage if not child.was_ready]
    names = ", ".join(child.program.name for child in late)
    words = "\n".join(child.last_lines[-1] for child in late if child.last_lines)
    return f"Not ready after {seconds:g} s: {names}.\n{words}"
