"""The API as gunicorn serves it: starting, large bodies, waiting clients, stopping."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rows import add_run
from stack import API_KEY, ROOT, wait_until

from opscore.db import Database

MEGABYTE = 2**20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    environment: dict[str, str], log: Path, *, port: int | None = None, threads: int = 4
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run `opscore web` and wait until it answers; yield the process and its port."""
    port = port or free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "opscore", "web", f"--port={port}", f"--threads={threads}"],
            cwd=ROOT,
            env=os.environ | environment | {"OPSCORE_LOG_FORMAT": "json"},
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process, port
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        return ask(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        sent = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json", **headers}
        connection.request(method, path, body, sent, encode_chunked=not isinstance(body, bytes))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def raw(method: str, path: str, headers: str = "", body: bytes = b"") -> bytes:
    """Return a request as it goes over the wire, with the key."""
    always = f"Host: x\r\nConnection: close\r\nAuthorization: Bearer {API_KEY}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{always}{headers}\r\n".encode() + body


def test_bodies_of_100_mb_are_refused_without_being_kept(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(environment, tmp_path / "log") as (process, port):
        before = memory(process)
        assert refused(port, {"Content-Length": str(100 * MEGABYTE)}, b"x" * MEGABYTE) == 413
        chunk = b"100000\r\n" + b" " * MEGABYTE + b"\r\n"
        assert refused(port, {"Transfer-Encoding": "chunked"}, chunk) == 413
        assert ask(port, "GET", "/health")[0] == 200
        assert memory(process) - before < 30 * MEGABYTE


def test_a_head_that_is_too_large_to_be_read_is_refused_with_a_problem(
    environment: dict[str, str], tmp_path: Path
) -> None:
    path = "/v1/opscore/runs"
    body = b'{"workflowId": "w"}'
    with serving(environment, tmp_path / "log") as (_, port):
        for size in (10_000, MEGABYTE):
            status, said = ask(port, "POST", path, body, **{"Idempotency-Key": "k" * size})
            assert (status, said["status"], said["code"]) == (431, 431, "headers_too_large")
            assert "8,190 bytes" in said["detail"] and "255 characters" in said["detail"]
            assert {"type", "title", "requestId"} < set(said)
        status, said = ask(port, "GET", f"{path}?label=n:{'x' * 10_000}")
        assert (status, said["status"], said["code"]) == (414, 414, "uri_too_long")
        assert "4,094 bytes" in said["detail"]
        status, said = ask(port, "POST", path, body, **{"Idempotency-Key": "k" * 5000})
        assert (status, list(said["errors"])) == (422, ["/Idempotency-Key"])
        assert ask(port, "GET", "/health")[0] == 200


RUNS = "/v1/opscore/runs"
CHUNKED = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
ODD_REQUESTS: dict[str, tuple[bytes, int]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", 400),
    "a header of 64 KB": (raw("GET", RUNS, f"X-Long: {'x' * 2**16}\r\n"), 431),
    "a path of 64 KB": (raw("GET", f"{RUNS}/{'x' * 2**16}"), 414),
    "a NUL in a header": (raw("GET", RUNS, "X-Odd: a\0b\r\n"), 400),
    "a NUL in a path": (raw("GET", f"{RUNS}/a\0b"), 400),
    "a path that is no UTF-8": (raw("GET", f"{RUNS}/%ff"), 404),
    "slashes in an id": (raw("GET", "/v1/opscore/agents/a%2F%2Fb"), 404),
    "dots for an id": (raw("GET", "/v1/opscore/agents/%2e%2e"), 404),
    "a query that is no UTF-8": (raw("GET", f"{RUNS}?workflowId=%ff"), 200),
    "an unknown method": (raw("BREW", RUNS), 405),
    "another server's name": (raw("GET", f"http://elsewhere.example{RUNS}"), 200),
    "a key twice": (raw("GET", RUNS, "Authorization: Bearer x\r\n"), 401),
    "a body where none is read": (raw("GET", RUNS, "Content-Length: 2\r\n", b"{}"), 200),
    "a length that is no number": (raw("POST", RUNS, "Content-Length: x\r\n"), 400),
    "a length below 0": (raw("POST", RUNS, "Content-Length: -1\r\n"), 400),
    "two ways to tell the length": (raw("POST", RUNS, f"{CHUNKED}Content-Length: 2\r\n"), 400),
    "a chunk without a size": (raw("POST", RUNS, CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk of less than nothing": (raw("POST", RUNS, CHUNKED, b"-2\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk that is too short": (raw("POST", RUNS, CHUNKED, b"1\r\n{}\r\n0\r\n\r\n"), 400),
    "chunks that end too soon": (raw("POST", RUNS, CHUNKED, b"9\r\n{}"), 400),
    "good chunks": (raw("POST", RUNS, CHUNKED, b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"), 422),
}


def refused(port: int, headers: dict[str, str], piece: bytes) -> int:
    """Send a hundred pieces as a body, as far as the server listens; return the status."""
    lines = {"Host": "x", "Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **headers}.items())
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(f"POST /v1/opscore/runs HTTP/1.1\r\n{head}\r\n".encode())
        sender = threading.Thread(target=send_all, args=[sock, piece])
        sender.start()
        answer = b""
        while b"requestId" not in answer and (more := sock.recv(4096)):
            answer += more
        sender.join(20)
        assert not sender.is_alive()
    assert b"body_too_large" in answer, answer
    return int(answer.split()[1])


def test_no_odd_request_is_an_accident(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(environment, log) as (_, port):
        found = {name: status_of(port, request) for name, (request, _) in ODD_REQUESTS.items()}
        assert found == {name: status for name, (_, status) in ODD_REQUESTS.items()}
        assert ask(port, "GET", "/health")[0] == 200
    assert "Traceback" not in log.read_text()


def status_of(port: int, request: bytes) -> int:
    """Send bytes, and nothing after them; return the status of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return int(sock.recv(4096).split()[1])


def send_all(sock: socket.socket, piece: bytes) -> None:
    try:
        for _ in range(100):
            sock.sendall(piece)
    except OSError:
        return


def memory(process: subprocess.Popen[bytes]) -> int:
    return sum(child.memory_info().rss for child in psutil.Process(process.pid).children())


def test_stopping_answers_clients_that_wait_and_leaves_nothing_behind(
    environment: dict[str, str], tmp_path: Path, database: Database
) -> None:
    with database.transaction() as tx:
        run_id = add_run(tx, "running")
    log = tmp_path / "log"
    with serving(environment, log) as (process, port):
        found: list[tuple[int, Any]] = []
        path = f"/v1/opscore/runs/{run_id}?waitSeconds=60"
        waiting = threading.Thread(target=lambda: found.append(ask(port, "GET", path)))
        waiting.start()
        threading.Event().wait(0.5)
        assert waiting.is_alive()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        waiting.join(5)
        assert process.returncode == 0 and time.monotonic() - began < 10, log.read_text()
        ((status, run),) = found
        assert (status, run["status"]) == (200, "running")
    requests = [json.loads(line) for line in log.read_text().splitlines() if "route" in line]
    assert requests[-1]["route"] == "/v1/opscore/runs/<run:run_id>"
    assert API_KEY not in log.read_text()


def test_a_server_refuses_to_start_on_an_empty_database_and_says_what_to_do(
    environment: dict[str, str],
) -> None:
    url = re.sub(r"/\w+$", "/postgres", environment["DATABASE_URL"])
    found = start_failing(environment | {"DATABASE_URL": url})
    assert "opscore db upgrade" in found and "Traceback" not in found


def test_a_server_refuses_to_start_and_names_every_missing_setting() -> None:
    found = start_failing({})
    assert "DATABASE_URL" in found and "OPSCORE_API_KEY" in found and "Traceback" not in found


def start_failing(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "opscore", "web", f"--port={free_port()}"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        timeout=30,
        text=True,
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_server_that_is_killed_leaves_no_process_behind_though_somebody_follows_a_run(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    with database.transaction() as tx:
        run_id = add_run(tx, "running")
    with serving(environment, tmp_path / "log") as (process, port):
        children = psutil.Process(process.pid).children()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            path = f"/v1/opscore/runs/{run_id}/events"
            client.sendall(raw("GET", path, "Accept: text/event-stream\r\n"))
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            process.kill()
            process.wait()
            wait_until(lambda: not any(child.is_running() for child in children), seconds=30)
