"""`make bench` in small, on servers of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stack import ROOT

from bench.report import show

CONTENDERS = {
    "W2": {"opscore", "opscore-foreach", "celery"},
    "W4": {"opscore", "celery"},
    "W5": {"opscore"},
    "W6": {"opscore"},
}
EVERYWHERE = {
    "tasks_per_s",
    "cpu_s_per_1000",
    "redis_commands_per_task",
    "worker_rss_mib",
    "worker_pss_mib",
}
DURABLE = {"pg_commits_per_task", "pg_write_txns_per_task", "wal_bytes_per_task"}
OWN = {
    "W2": {"submitted_per_s"},
    "W4": {"p50_ms", "p95_ms", "p99_ms"},
    "W5": {"submitted_per_s", "makespan_over_ideal"},
    "W6": {"submitted_per_s", "post_p50_ms", "post_p99_ms", "completed_s"},
}


def run_bench(folder: Path, *options: str) -> tuple[Any, str]:
    """Run the benchmark with a folder for all it makes; return what it wrote and printed."""
    out = folder / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench", f"--out={out}", *options],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["bench.json"], "something was left behind"
    return json.loads(out.read_text()), done.stdout


@pytest.mark.timeout(120)
def test_a_small_round_gives_every_figure(tmp_path: Path) -> None:
    written, printed = run_bench(tmp_path, "--rounds=1", "--scale=0.05", "--only=W2,W4,W5,W6")
    assert written.pop("machine")["cores"] > 0
    assert {workload: set(contenders) for workload, contenders in written.items()} == CONTENDERS
    for workload, contenders in written.items():
        assert f"{workload}: " in printed
        for contender, figures in contenders.items():
            wanted = EVERYWHERE | OWN[workload] | (set() if contender == "celery" else DURABLE)
            assert all(len(values) == 1 for values in figures.values())
            small = {name for name in wanted if figures.get(name, [0])[0] <= 0}
            assert not small, (workload, contender, figures)


def test_ratios_are_those_of_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    celery, ours = {"tasks_per_s": [100.0, 200.0, 400.0]}, {"tasks_per_s": [150.0, 200.0, 300.0]}
    show({"W1": {"opscore": ours, "celery": celery}}, {"W1": "chains"}, markdown=True)
    assert "| tasks/s | 100 / 200 / 400 | 150 / 200 / 300 | 0.75 / 1.00 / 1.50 |" in (
        capsys.readouterr().out
    )
