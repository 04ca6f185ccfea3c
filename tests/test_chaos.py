"""The short form of every fault: see `bench.chaos` for what must hold after each."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stack import guard

from bench import chaos
from bench.chaos_faults import FAULTS
from bench.chaos_site import Arena
from opscore.servers import is_free

pytestmark = pytest.mark.timeout(240)  # a case that fails waits for long before it says so
SEED = int(os.environ.get("CHAOS_SEED", "20"))
"""Any other will do as well; a fixed one makes a failure easy to see again."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    before = set(psutil.Process().children(recursive=True))
    with Arena.open(tmp_path_factory.mktemp("chaos"), guard) as arena:
        yield arena
    _, alive = psutil.wait_procs(
        set(psutil.Process().children(recursive=True)) - before, timeout=10
    )
    assert not alive, alive
    assert is_free(arena.postgres.port) and is_free(arena.redis.port)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "none"])
def test_nothing_is_lost_or_doubled_by(name: str, arena: Arena) -> None:
    result = chaos.run_case(arena, FAULTS[name], chaos.SHORT, SEED)
    assert not result.complaints, "\n".join([f"seed {SEED}", *result.complaints, result.account])


def test_a_case_that_lost_something_says_what_and_fails(arena: Arena, tmp_path: Path) -> None:
    """Hold that the suite can see: a run is made to end otherwise than it had to."""

    def tamper(case: chaos.Case) -> None:
        over = "SELECT count(*) FROM runs WHERE finished_at IS NOT NULL"
        assert case.site.wait(lambda: case.site.sql.one(over) > 0, 30)
        case.site.sql.rows("UPDATE chaos_effects SET label = 'other'")
        case.site.sql.rows("UPDATE runs SET output = '0' WHERE finished_at IS NOT NULL")
        case.mark()

    fault = chaos.Fault("tampered", tamper, short_times=1, short_runs=4)
    result = chaos.run_case(arena, fault, chaos.SHORT, SEED)
    assert result.lost > 0 and "effect exactly once" in " ".join(result.complaints)
    assert "wanted" in result.account and "last lines of w1" in result.account
    assert {"runs", "lost", "doubled", "recovery_s_max"} <= set(result.as_json())
    chaos.save([result], tmp_path / "chaos.json", partial=False)
    assert json.loads((tmp_path / "chaos.json").read_text())["tampered"]["lost"] == result.lost
