"""Keeps the process of one MCP server: runs as a script between a worker and the server it started.

No process of the server outlives its task, whatever becomes of worker, task or server. The worker
holds the other end of a pipe, the lifeline; the kernel closes it with the worker, however that
ends. Then, or at SIGTERM, or when the server itself has ended, all processes that came of it get
SIGTERM, and after a moment SIGKILL. On Linux that holds for those too that left the process group:
orphans come to us. It imports the standard library only, and little of that.

    python -I -S mcp_keeper.py <lifeline's file descriptor> <command> [<argument>...]
"""

import contextlib
import os
import select
import signal
import sys
import time

POLITE_SECONDS = 0.3
"""Between a closed stdin with SIGTERM, and SIGKILL."""
GIVE_UP_SECONDS = 5.0
"""After that a process that even SIGKILL does not end is left."""
NO_COMMAND = 127
"""The exit status where the command cannot be started, as in shells."""
_PR_SET_CHILD_SUBREAPER = 36


def main(lifeline: int, command: list[str]) -> int:
    """Run the command until it or the lifeline ends, and return the status for our own end."""
    os.set_inheritable(lifeline, False)
    _take_in_orphans()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, _note)
    try:
        server = os.posix_spawnp(command[0], command, os.environ, setsigdef=_DEFAULTS)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return NO_COMMAND
    os.close(0)  # the server's alone, so that each side sees the other's end
    os.close(1)
    try:
        return _wait(server, lifeline, awake)
    finally:
        _end_all()


def _wait(server: int, lifeline: int, awake: int) -> int:
    """Return the server's status, or 0 if it is still there and has to go."""
    while True:
        ready, _, _ = select.select([lifeline, awake], [], [])
        if awake in ready:
            os.read(awake, 512)
        for pid, status in _reap():
            if pid == server:
                return os.waitstatus_to_exitcode(status) & 0xFF
        if lifeline in ready or _asked:
            return 0


_asked: list[int] = []
_DEFAULTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD)


def _note(number: int, _frame: object) -> None:
    if number != signal.SIGCHLD:
        _asked.append(number)


def _take_in_orphans() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> list[tuple[int, int]]:
    """Return the children that have ended, with their statuses."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(one)
    return ended


def _end_all() -> None:
    """End what came of the server; who is gone leaves us its children."""
    began = time.monotonic()
    _signal(signal.SIGTERM)
    if sys.platform != "linux":  # orphans go elsewhere: end the group, ourselves included
        time.sleep(POLITE_SECONDS)
        os.killpg(0, signal.SIGKILL)
    while (passed := time.monotonic() - began) < GIVE_UP_SECONDS:
        _reap()
        if not _children():
            return
        if passed >= POLITE_SECONDS:
            _signal(signal.SIGKILL)
        time.sleep(0.01)


def _signal(number: signal.Signals) -> None:
    for pid in _children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    if number == signal.SIGTERM:  # grandchildren, too; we have a handler
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(0, number)


def _children() -> list[int]:
    """Return our children; those that have ended and were not waited for are among them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return _children_of_all()


def _children_of_all() -> list[int]:
    """Look at every process, where the kernel keeps no list."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
