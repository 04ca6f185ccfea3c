"""The embedded stack: every process of opscore on one machine, kept in one data folder.

Owns the data folder (its lock, its keys, its state file) and the list of what runs in which order.
Servers come from `servers`, the keeping alive from `processes`. Refuses a folder it did not make,
and a second stack on the same folder.
"""

import fcntl
import http.client
import importlib
import json
import logging
import math
import os
import secrets
import shlex
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE, Settings
from opscore.errors import ConfigurationError, OpsCoreError, WorkflowArchived, WrongRevision
from opscore.processes import Child, Program, State, Supervisor, wait_until
from opscore.servers import (
    LOOPBACK,
    PostgresServer,
    RedisServer,
    Server,
    admit,
    can_reach,
    free_port,
    is_alive,
    is_collision,
    is_free,
    port_like,
    server_account,
    write_private,
)

WORKER_ENDS_SECONDS = 3.0
"""A worker needs no longer than this after its grace to hand back what it holds, and end."""
DOWN_SECONDS = 60.0
"""How long `down` waits; a stack that is asked once ends in less."""
LOG_BYTES = 10_000_000
"""Size at which `opscore.log` becomes `opscore.log.1`."""
IO_THREADS = 16
"""Of the worker that calls agents behind HTTP."""
CONTROL_THREADS = 2
"""Of the worker for what must never lie behind agent work."""
HTTP_SECONDS = 5.0
WORKFLOW_TYPES = {
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92)
"""ANSI colours of the prefixes, taken in turn."""


class StackError(OpsCoreError):
    """The stack cannot do this."""

    code = "stack_error"


@dataclass(frozen=True, slots=True)
class Options:
    """What `opscore up` was asked for."""

    data: Path = Path(".opscore")
    port: int | None = None
    agents: str | None = None
    workflows: Path | None = None
    workers: int = 4


# -- the data folder -------------------------------------------------------------------------


class DataFolder:
    """One stack's folder: servers' data, `opscore.env`, `opscore.log`, `state.json`, `lock`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    @property
    def env_file(self) -> Path:
        return self.path / "opscore.env"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be and hold it; nobody else runs a stack on it meanwhile.

        Raises: StackError if somebody holds it, or if it is no folder of ours.
        """
        self._make()
        with open(self / "lock", "a+") as lock:
            if not wait_until(partial(_try_lock, lock.fileno(), fcntl.LOCK_EX), 1.0):
                raise StackError(
                    f"Another opscore (pid {self.holder()}) runs on {self.path}:"
                    f" `{self.command('down')}` stops it."
                )
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _make(self) -> None:
        if not self.path.exists():
            self.path.mkdir(mode=0o700, parents=True)
        if self.path.stat().st_uid != os.geteuid():
            raise StackError(f"{self.path} belongs to another account; choose another --data.")
        if not (self / "lock").exists() and any(self.path.iterdir()):
            raise StackError(f"{self.path} holds other things; choose another --data.")
        self.path.chmod(0o700)
        (self / "run").mkdir(exist_ok=True)
        account = server_account()
        if account and can_reach(account, self.path.resolve().parent):
            admit(account, self.path)

    def holder(self) -> int | None:
        """Return the pid of the supervisor that holds the folder, or None."""
        try:
            with open(self / "lock", "r+") as lock:
                if _try_lock(lock.fileno(), fcntl.LOCK_SH):
                    return None
                return int(lock.read() or 0) or None
        except (FileNotFoundError, ValueError):
            return None
        except PermissionError as error:
            raise StackError(f"{self.path} belongs to another account.") from error

    def command(self, verb: str) -> str:
        """Return how to type `opscore verb` for this folder."""
        default = self.path == Options().data.absolute()
        return f"opscore {verb}" + ("" if default else f" --data {shlex.quote(str(self.path))}")

    def env(self) -> dict[str, str]:
        """Return what `opscore.env` holds; nothing if it is not there."""
        with suppress(FileNotFoundError):
            words = shlex.split(self.env_file.read_text(), comments=True)
            return dict(word.split("=", 1) for word in words if "=" in word)
        return {}

    def write_env(self, values: Mapping[str, str]) -> None:
        """Write `opscore.env` so that a shell may source it."""
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
        write_private(self.env_file, "".join(lines))

    def state(self) -> dict[str, Any]:
        """Return what the supervisor last wrote of itself; nothing if it never did."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            state: dict[str, Any] = json.loads((self / "state.json").read_text())
            return state
        return {}

    def write_state(self, state: Mapping[str, Any]) -> None:
        write_private(self / "state.json", json.dumps(state, indent=1))


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", opener=partial(os.open, mode=0o600))


class Log:
    """Every line of every process, prefixed, to standard output and to a file."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = _PrivateFile(path, maxBytes=LOG_BYTES, backupCount=1)
        self._screen: Any = sys.stdout
        self._coloured = sys.stdout is not None and sys.stdout.isatty()
        self._names: dict[str, int] = {}

    def __call__(self, name: str, line: str) -> None:
        """Write one line; threads may call this at once."""
        text = f"{name:<14} | {line}"
        with self._lock:
            self._file.emit(logging.makeLogRecord({"msg": text}))
            self._show(name, line, text)

    def _show(self, name: str, line: str, text: str) -> None:
        colour = self._names.setdefault(name, COLOURS[len(self._names) % len(COLOURS)])
        if self._coloured:
            text = f"\x1b[{colour}m{name:<14} |\x1b[0m {line}"
        try:
            if self._screen is not None:
                self._screen.write(text + "\n")
                self._screen.flush()
        except (OSError, ValueError):  # nobody reads any more: the file goes on
            self._screen = None

    def close(self) -> None:
        self._file.close()


# -- the stack -------------------------------------------------------------------------------


def up(options: Options, environment: Mapping[str, str]) -> None:
    """Run the stack until SIGINT or SIGTERM; both end it in order.

    Raises: OpsCoreError with what keeps it from starting; `Stopped` if it was asked to stop before.
    """
    data = DataFolder(options.data)
    with data.locked():
        Stack(options, environment, data).run()


class Stack:
    """One run of the stack."""

    def __init__(self, options: Options, given: Mapping[str, str], data: DataFolder) -> None:
        self.options = options
        self.data = data
        self.log = Log(data / "opscore.log")
        self._kept = data.env()
        self._given = _without_ours(given, data)
        flower = port_like(_port(self._kept, "FLOWER_URL"))
        self._ports = {"web": self._web_port(), "flower": flower}
        self._phase = "starting"
        self._supervisor = Supervisor(self.log, self._note)

    def run(self) -> None:
        """Start everything in order, keep it running until asked to stop, end it in reverse."""
        self._supervisor.listen()
        try:
            self._note([])
            self._start()
            self._announce()
            self._supervisor.watch()
        finally:
            self._enter("stopping")
            self._supervisor.stop()
            self._enter("stopped")
            self.log.close()

    def _start(self) -> None:
        threading.Thread(target=importlib.import_module, args=["opscore.migrations"]).start()
        # Faults of the settings first, before anything is made or runs.
        probe = {"DATABASE_URL": "postgresql://to-come"} | self._environment({})
        Settings.from_env(probe, threads="web_threads")
        servers = self._servers()
        self._supervisor.start([server.program() for server in servers.values()])
        environment = self._environment(servers)
        self._supervisor.call(partial(_reach_redis, environment["REDIS_URL"]))
        self._supervisor.call(partial(_migrate, environment["DATABASE_URL"]))
        self._supervisor.start(self._programs(environment))
        self.data.write_env(self._published(environment))
        if self.options.workflows:
            folder, key = self.options.workflows, environment["OPSCORE_API_KEY"]
            say = partial(self.log, "opscore")
            self._supervisor.call(lambda: post_workflows(folder, self._api, key, say))

    def _servers(self) -> dict[str, Server]:
        """Return the servers to start, by the variable that names each."""
        servers: dict[str, Server] = {}
        if not self._given.get("DATABASE_URL"):
            servers["DATABASE_URL"] = PostgresServer(self.data / "postgres")
        if not self._given.get("REDIS_URL"):
            servers["REDIS_URL"] = RedisServer(self.data / "valkey")
        return servers

    @property
    def _api(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['web']}"

    @property
    def _flower(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['flower']}"

    def _environment(self, servers: Mapping[str, Server]) -> dict[str, str]:
        """Return the environment of our processes: the caller's, completed."""
        made = {
            "OPSCORE_API_KEY": secrets.token_urlsafe(32),
            "OPSCORE_WEBHOOK_SECRET": secrets.token_urlsafe(32),
            "FLOWER_BASIC_AUTH": f"opscore:{secrets.token_urlsafe(16)}",
        }
        kept = {name: self._kept.get(name) or value for name, value in made.items()}
        self._kept.update(kept)
        environment = {
            "OPSCORE_LOG_FORMAT": "text",
            # A stack to try things on: agents behind HTTP may run beside it.
            "OPSCORE_AGENT_HOSTS": f"{LOOPBACK},localhost",
            "PYTHONUNBUFFERED": "1",
            **kept,
            **{name: value for name, value in self._given.items() if value},
            **{name: server.url for name, server in servers.items()},
        }
        if self.options.agents is not None:
            environment["OPSCORE_AGENTS"] = self.options.agents
        return _with_our_code(environment)

    def _published(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return what `opscore.env` shall hold."""
        names = ("OPSCORE_API_KEY", "DATABASE_URL", "REDIS_URL")
        secret = ("FLOWER_BASIC_AUTH", "OPSCORE_WEBHOOK_SECRET")
        return {
            "OPSCORE_API_URL": self._api,
            **{name: environment[name] for name in names},
            "FLOWER_URL": self._flower,
            **{name: environment[name] for name in secret},
        }

    def _programs(self, environment: Mapping[str, str]) -> list[Program]:
        agents = [f"--queues={AGENTS_QUEUE}", "--pool=prefork"]
        io = [f"--queues={IO_QUEUE}", "--pool=threads"]
        control = [f"--queues={CONTROL_QUEUE}", "--pool=threads"]
        return [
            self._web(environment),
            self._worker("worker-agents", environment, *agents, workers=self.options.workers),
            self._worker("worker-io", environment, *io, workers=IO_THREADS),
            self._worker("worker-control", environment, *control, workers=CONTROL_THREADS),
            _ours("beat", environment, "beat"),
            self._flower_program(environment),
        ]

    def _web(self, environment: Mapping[str, str]) -> Program:
        port = self._ports["web"]
        return _ours(
            "web",
            environment,
            *("web", f"--host={LOOPBACK}", f"--port={port}"),
            ready=partial(is_up, port, "/ready"),
            again=partial(self._again, "web", partial(self._web, environment)),
            url=self._api,
        )

    def _flower_program(self, environment: Mapping[str, str]) -> Program:
        port = self._ports["flower"]
        return _ours(
            "flower",
            {**environment, "FLOWER_ADDRESS": LOOPBACK, "FLOWER_PORT": str(port)},
            "flower",
            ready=partial(is_up, port, "/healthcheck"),
            again=partial(self._again, "flower", partial(self._flower_program, environment)),
            url=self._flower,
        )

    def _worker(
        self, name: str, environment: Mapping[str, str], *arguments: str, workers: int
    ) -> Program:
        """Return a worker, ready once it has made the file it is told of."""
        ready = self.data / f"run/{name}.ready"
        return _ours(
            name,
            {**environment, "OPSCORE_READY_FILE": str(ready)},
            *("worker", f"--name={name}", f"--concurrency={workers}", *arguments),
            prepare=partial(ready.unlink, missing_ok=True),
            ready=ready.exists,
            grace_seconds=Settings.from_env(environment).grace_seconds + WORKER_ENDS_SECONDS,
        )

    def _again(self, name: str, program: Callable[[], Program], last_words: str) -> Program | None:
        """Return `program` on another port if somebody took the one we chose."""
        wanted = name == "web" and self.options.port is not None
        if wanted or not is_collision(last_words):
            return None
        self._ports[name] = free_port()
        return program()

    def _web_port(self) -> int:
        wanted = self.options.port
        if wanted is None:
            return port_like(_port(self._kept, "OPSCORE_API_URL"))
        if not is_free(wanted):
            raise StackError(f"Port {wanted} is in use; choose another --port, or none.")
        return wanted

    def _announce(self) -> None:
        self._enter("ready")
        for line in summary(self.data).splitlines():
            self.log("opscore", line)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._note(self._supervisor.children)

    def _note(self, children: Sequence[Child]) -> None:
        """Write down how everything is, for `status` and `up --detach`."""
        state = {
            "pid": os.getpid(),
            "phase": self._phase,
            "api": self._api,
            "flower": self._flower,
            "processes": [_described(child) for child in children],
        }
        try:
            self.data.write_state(state)
        except OSError as error:  # disk full, folder removed: go on, and end well
            self.log("opscore", f"state.json could not be written: {error}")


def _described(child: Child) -> dict[str, Any]:
    return {
        "name": child.program.name,
        "pid": child.process.pid,
        "state": child.state,
        "restarts": child.restarts,
        "since": time.time() - (time.monotonic() - child.started),
        "url": child.program.url,
    }


def _ours(name: str, environment: Mapping[str, str], *arguments: str, **more: Any) -> Program:
    """Return `opscore <arguments>` as a program, in this interpreter and the current folder."""
    return Program(name, [*_OPSCORE, *arguments], environment, **more)


_OPSCORE = (sys.executable, "-P", "-m", "opscore")
"""-P: a folder `web` of the user's must not stand in front of ours."""


def _with_our_code(environment: dict[str, str]) -> dict[str, str]:
    """Let child processes import us also where we are not installed, as in a checkout."""
    root = str(Path(__file__).parents[1])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


def _without_ours(given: Mapping[str, str], data: DataFolder) -> dict[str, str]:
    """Forget server URLs that are of this very stack: somebody sourced our `opscore.env`."""
    ours = {"DATABASE_URL": data / "postgres", "REDIS_URL": data / "valkey"}
    return {
        name: value
        for name, value in given.items()
        if name not in ("OPSCORE_API_URL", "FLOWER_URL")
        and not (name in ours and Server.is_of(ours[name], value))
    }


def _port(values: Mapping[str, str], name: str) -> int | None:
    with suppress(ValueError):
        return urlsplit(values.get(name, "")).port
    return None


def _migrate(url: str) -> None:
    from opscore import migrations  # not above: only `up` needs it, and it is slow

    try:
        migrations.upgrade(url)
    except WrongRevision:
        raise
    except ConfigurationError as error:
        hint = "It is set in your environment: unset it to have a server started."
        raise StackError(f"{error.faults[0].rstrip('.')}. {hint}") from error


def _reach_redis(url: str) -> None:
    """Raise StackError if no Redis answers at `url`."""
    try:
        with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        hint = "It is set in your environment: unset it to have a server started."
        raise StackError(f"REDIS_URL: no answer from Redis: {error}. {hint}") from error


# -- what is asked over HTTP -----------------------------------------------------------------


def is_up(port: int, path: str) -> bool:
    """Tell whether `path` of a local server answers 200."""
    try:
        return _ask(port, "GET", path)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _ask(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=HTTP_SECONDS)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post_workflows(folder: Path, api: str, key: str, say: Callable[[str], None]) -> None:
    """Create every workflow of `folder` that is new or changed.

    Raises: StackError with all faults of all files; the good ones are created all the same.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in WORKFLOW_TYPES)
    if not files:
        say(f"{folder} holds no workflow (*.json, *.yaml, *.yml)")
    faults = [fault for file in files if (fault := _post_workflow(file, api, key, say))]
    if faults:
        raise StackError("\n".join(faults))


def _post_workflow(file: Path, api: str, key: str, say: Callable[[str], None]) -> str | None:
    """Create the workflow in `file`; return what is wrong with it."""
    status, answer = _ask(
        urlsplit(api).port or 80,
        "POST",
        "/v1/opscore/workflows",
        file.read_bytes(),
        Content_Type=WORKFLOW_TYPES[file.suffix],
        Authorization=f"Bearer {key}",
    )
    try:
        said = json.loads(answer)
    except ValueError:
        said = {}
    if said.get("code") == WorkflowArchived.code:
        say(f"{said.get('detail')} ({file.name})")
        return None
    if status not in (200, 201):
        return "\n".join([f"{file}: {said.get('detail', f'HTTP {status}')}", *_faults(said)])
    new = "is new" if status == 201 else "is there already"
    say(f"workflow {said.get('workflowId')} version {said.get('version')} {new} ({file.name})")
    return None


def _faults(problem: Mapping[str, Any]) -> Iterator[str]:
    for pointer, sentences in (problem.get("errors") or {}).items():
        for sentence in sentences:
            yield f"  {pointer or '/'}: {sentence}"


# -- seen from outside -----------------------------------------------------------------------


def up_detached(options: Options, environment: Mapping[str, str]) -> str:
    """Run the stack in a session of its own; return what to tell people once it is ready.

    Raises: StackError with what it said, if it ended before.
    """
    data = DataFolder(options.data)
    with tempfile.TemporaryFile() as words:
        if (pid := os.fork()) == 0:
            _become_background(words.fileno())
            os._exit(_up_and_say(options, environment))
        status = _first_status(data, pid)
        if status is not None:
            words.seek(0)
            raise StackError(words.read().decode(errors="replace").strip())
    return summary(data)


def _become_background(words: int) -> None:
    """Leave the terminal; what still goes to standard error ends up in `words`."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle, target in ((nothing, 0), (nothing, 1), (words, 2)):
        os.dup2(handle, target)


def _up_and_say(options: Options, environment: Mapping[str, str]) -> int:
    try:
        up(options, environment)
    except OpsCoreError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _first_status(data: DataFolder, pid: int) -> int | None:
    """Wait until the stack `pid` is ready, then return None; its wait status if it ended."""
    ended = 0, 0

    def is_decided() -> bool:
        nonlocal ended
        ended = os.waitpid(pid, os.WNOHANG)
        return ended[0] == pid or _is_ready(data, pid)

    try:
        wait_until(is_decided, math.inf)  # it gives up by itself
    except BaseException:  # Ctrl-C: nobody else knows of it, so end it
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    return ended[1] if ended[0] else None


def _is_ready(data: DataFolder, pid: int) -> bool:
    state = data.state()
    return state.get("pid") == pid and state.get("phase") == "ready"


def summary(data: DataFolder) -> str:
    """Return where a running stack is found, and how it is stopped."""
    state = data.state()
    return "\n".join(
        [
            f"opscore is ready: {state['api']} (documentation: {state['api']}/docs)",
            f"Flower:           {state['flower']}",
            f"Keys and URLs:    {data.env_file}",
            f"To stop it:       {data.command('down')}",
        ]
    )


def down(path: Path) -> bool:
    """Stop the stack that runs on `path`; return False if there was none.

    Raises: StackError if it does not end, or is not ours to end.
    """
    data = DataFolder(path)
    pid = data.holder()
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise StackError(f"The stack (pid {pid}) belongs to another account.") from error
    except ProcessLookupError:
        pass
    if not wait_until(lambda: data.holder() != pid, DOWN_SECONDS):
        raise StackError(f"The stack (pid {pid}) has not ended after {DOWN_SECONDS:g} s.")
    wait_until(lambda: not is_alive(pid), 2)  # it let go; its last breath takes a moment
    return True


@dataclass(frozen=True, slots=True)
class Status:
    """How a stack is: what its supervisor wrote, and what is so now."""

    phase: str
    pid: int | None
    processes: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    api: str | None = None

    @property
    def is_ready(self) -> bool:
        """Everything runs and the API says that it is ready."""
        return self.phase == "ready" and all(p["state"] == State.READY for p in self.processes)


def status(path: Path) -> Status:
    """Return how the stack on `path` is."""
    data = DataFolder(path)
    pid, state = data.holder(), data.state()
    if pid is None or state.get("pid") != pid:
        return Status("not running" if pid is None else "starting", pid)
    processes = [
        p if is_alive(p["pid"]) else {**p, "state": State.RESTARTING} for p in state["processes"]
    ]
    phase = state["phase"]
    if phase == "ready" and not is_up(urlsplit(state["api"]).port or 80, "/ready"):
        phase = "not ready"
    return Status(phase, pid, processes, state["api"])
