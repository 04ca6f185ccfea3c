"""The README tells the truth about the tree."""

import re
from pathlib import Path

from test_docs import SETTING, fences, make_targets, programs, settings_declared

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_map_names_every_module_and_no_other() -> None:
    table = README[README.index("| Files | Own |") :]
    named = set(re.findall(r"`(?:opscore/)?([a-z_]+\.py)`", table))
    there = {path.name for path in (ROOT / "opscore").glob("*.py")} - {"__init__.py"}
    assert named - {"celeryconfig.py", "tasks.py"} == there
    for folder in (
        "opscore/agentkit",
        "opscore/sdk",
        "opscore/cli",
        "workers",
        "web",
        "docs",
        "examples",
        "tests",
        "deploy",
    ):
        assert table.count(f"`{folder}/`") == 1 and (ROOT / folder).is_dir()


def test_the_settings_it_names_exist() -> None:
    assert set(re.findall(SETTING, README)) <= settings_declared()


def test_the_make_targets_it_names_exist() -> None:
    assert make_targets(README) >= {"demo", "test", "chaos", "bench", "docs"}


def test_the_files_it_links_to_and_names_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:[a-z]+/)?[A-Z]+\.md)`", README)
    assert len(links) > 10 and "CONTRIBUTING.md" in named
    assert [name for name in links + named if not (ROOT / name).is_file()] == []
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    assert pages == set(links)


def test_its_tour_is_a_shorter_way_through_getting_started() -> None:
    """Which `test_docs.test_the_tours_run_as_they_are_written` walks."""
    (agents,) = programs(README, "# my_agents.py")
    page = (ROOT / "docs/getting-started.md").read_text()
    assert programs(page, "# my_agents.py") == [agents]
    shown = [fence.text for fence in fences(README) if fence.language == "sh"]
    *way, stop = "".join(shown).splitlines()
    steps = iter("".join(f.text for f in fences(page) if f.language == "sh").splitlines())
    assert [step for step in way if step not in steps] == []  # in this order
    assert stop == "opscore down"
