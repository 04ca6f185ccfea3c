"""The README tells the truth about the tree."""

import re
from dataclasses import fields
from pathlib import Path

from opscore.config import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_map_names_every_module_and_no_other() -> None:
    table = README[README.index("| Files | Own |") : README.index("## Settings")]
    named = set(re.findall(r"`(?:opscore/)?([a-z_]+\.py)`", table))
    there = {path.name for path in (ROOT / "opscore").glob("*.py")} - {"__init__.py"}
    assert named - {"celeryconfig.py", "tasks.py"} == there
    for folder in ("opscore/agentkit", "workers", "web", "examples", "tests"):
        assert f"{folder.removeprefix('opscore/')}/" in table and (ROOT / folder).is_dir()


def test_the_settings_it_names_exist() -> None:
    variables = set(re.findall(r"`(OPSCORE_[A-Z_]+|DATABASE_URL|REDIS_URL)`", README))
    declared = {field.metadata["variable"] for field in fields(Settings)}
    assert variables - {"OPSCORE_WEBHOOK_SECRET"} <= declared


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
