"""Signs of life, for what watches over processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

from stack import ROOT, Servers, running_stack, wait_until
from test_web_process import free_port, serving

from opscore.alive import DEAD_SECONDS


def alive(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "opscore", "alive", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_file_that_is_touched_is_a_sign_and_an_old_one_is_none(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    said = alive(OPSCORE_ALIVE_FILE=str(sign))
    assert said.returncode == 1 and "there never was one" in said.stderr
    sign.touch()
    assert alive(OPSCORE_ALIVE_FILE=str(sign)).returncode == 0
    old = time.time() - DEAD_SECONDS - 10
    os.utime(sign, (old, old))
    said = alive("--file", str(sign))
    assert said.returncode == 1 and "130 s old" in said.stderr
    assert alive().returncode == 2


def test_a_server_that_answers_200_lives(environment: dict[str, str], tmp_path: Path) -> None:
    with serving(environment, tmp_path / "log") as (_, port):
        url = f"http://127.0.0.1:{port}"
        assert alive("--url", f"{url}/health").returncode == 0
        assert alive("--url", f"{url}/nothing").returncode == 1
    said = alive("--url", f"http://127.0.0.1:{free_port()}/health")
    assert said.returncode == 1 and "does not answer 200" in said.stderr


def test_a_worker_gives_signs_also_while_its_servers_are_away(
    servers: Servers, tmp_path: Path
) -> None:
    sign = tmp_path / "sign"
    with running_stack(servers, tmp_path / "log", OPSCORE_ALIVE_FILE=str(sign)) as stack:
        stack.start_worker(pool="threads")
        wait_until(sign.exists)
        name = stack.settings.database_url.rsplit("/", 1)[1]
        servers._execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        servers._execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        since = time.time()
        wait_until(lambda: sign.stat().st_mtime, says=lambda at: at > since + 1)
        servers._execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_worker_without_a_place_for_signs_works_on(servers: Servers, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "missing" / "sign")
    with running_stack(servers, tmp_path / "log", OPSCORE_ALIVE_FILE=nowhere) as stack:
        stack.start_worker(pool="threads")
        wait_until(lambda: stack.rows("SELECT name FROM workers"))
        assert alive("--file", nowhere).returncode == 1
