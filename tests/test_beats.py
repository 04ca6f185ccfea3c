"""Beat as a process: several of them, killed at random, cut off from PostgreSQL; `make beats`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from stack import ROOT, wait_until

from bench.beats import SCHEDULE, WORKFLOW, Scene, faults, play
from opscore import schedules, workflows
from opscore.db import Database
from opscore.definition import parse


@pytest.mark.timeout(120)
def test_of_two_beats_killed_at_random_every_moment_fires_once(
    environment: dict[str, str], tmp_path: Path
) -> None:
    scene = Scene(seconds=10, schedules=20, beats=2, others=200, kill_every=(2.0, 4.0))
    result = play(scene, environment, tmp_path)
    assert result.complaints == [], (tmp_path / "beats.log").read_text()[-4000:]
    assert result.kills and result.moments >= 140


def test_a_moment_that_is_missing_or_has_two_runs_is_seen() -> None:
    """Hold that the test above can see."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    row = SimpleNamespace(name="s", created_at=start, decided_at=start + timedelta(seconds=3.5))
    good = [
        SimpleNamespace(moment=start + timedelta(seconds=number), status="started", runs=1)
        for number in (1, 2, 3)
    ]
    assert list(faults(row, good)) == []
    assert list(faults(row, good[1:])) == ["s fired 2 moments, 1 are missing, 0 are none."]
    good[0].runs = 2
    assert list(faults(row, good)) == ["s has firings without exactly one run."]


def test_beat_as_celery_starts_it_outlives_its_connections_and_keeps_no_file(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    with database.transaction() as tx:
        workflows.create_workflow(tx, parse(WORKFLOW))
        schedules.create(tx, {**SCHEDULE, "name": "tick"})
    log = tmp_path / "log"
    (folder := tmp_path / "here").mkdir()
    with log.open("wb") as output:
        beat = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "workers.app", "beat"],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(_fired(database), says=lambda count: count >= 2)
        with database.autocommit() as tx:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            assert tx.execute(text(f"{cut} WHERE application_name = 'beat'")).all()
        before = _fired(database)()
        wait_until(_fired(database), says=lambda count: count >= before + 2)
    finally:
        beat.send_signal(signal.SIGTERM)
        status = beat.wait(20)
    assert status == 0, log.read_text()
    assert list(folder.iterdir()) == []
    assert "Traceback" not in log.read_text()
    with database.autocommit() as tx:
        moments: list[Any] = list(
            tx.execute(text("SELECT moment FROM firings ORDER BY moment")).scalars()
        )
    steps = {later - earlier for earlier, later in pairwise(moments)}
    assert steps == {timedelta(seconds=1)}


def _fired(database: Database) -> Callable[[], int]:
    def count() -> int:
        with database.autocommit() as tx:
            return int(tx.execute(text("SELECT count(*) FROM firings")).scalar_one())

    return count
