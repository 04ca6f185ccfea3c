"""The arrows are data: the docs draw the same ones."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from opscore.states import ATTEMPT_ARROWS, RUN_ARROWS, TASK_ARROWS

CONCEPTS = (Path(__file__).parents[1] / "docs/concepts.md").read_text()


def drawn(table: str) -> set[tuple[str, str]]:
    """Read the arrows of a block such as `Run  queued → running → completed | failed`."""
    block = re.search(rf"^    {table} +((?:.+\n)(?: {{6,}}.+\n)*)", CONCEPTS, re.MULTILINE)
    assert block is not None, f"no diagram of {table}"
    arrows = set()
    for path in re.split(r"\n|  +", block[1].strip()):
        stops = [set(stop.split(" | ")) for stop in path.split(" → ")]
        for sources, targets in pairwise(stops):
            arrows |= {(source, target) for source in sources for target in targets}
    return arrows


@pytest.mark.parametrize(
    ("table", "arrows"),
    [("Run", RUN_ARROWS), ("Task", TASK_ARROWS), ("Attempt", ATTEMPT_ARROWS)],
)
def test_the_docs_draw_the_arrows_of_states(table: str, arrows: dict) -> None:  # type: ignore[type-arg]
    listed = {(str(source), str(target)) for source in arrows for target in arrows[source]}
    assert drawn(table) == listed
