"""Agents that audit the Python distributions installed beside them.

`list-distributions` finds them, `audit-distribution` looks at one, `write-report` joins what was
found. Each is a plain function of its parameters, so that another environment is audited by naming
its folders. The workflow that puts them together is `dependency_audit.yaml`.
"""

import csv
import hashlib
import json
import os
import platform
import re
import stat
import sys
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from opscore import Context, GiveUp, agent

SHOWN_PER_DISTRIBUTION = 5
"""Changed files, missing files and notes named one by one; the rest is counted."""

LARGEST_SHOWN = 10
"""Rows of the report's table of sizes."""

LICENCE_CHARACTERS = 60
"""A longer `License` field is a licence's text, not its name."""

CHECKED_HASHES = frozenset({"sha256", "sha384", "sha512"})
"""What a RECORD may use; other hashes count as unverified."""

Json = dict[str, Any]


# Finding them


@agent("list-distributions", capabilities=["inventory"])
def list_distributions(parameters: Json, context: Context) -> Json:
    """List the distributions in `paths`, by default where this Python looks for its modules.

    Answers `{python, platform, paths, distributions: [{name, version, metadata, shadowed}]}`, where
    `metadata` is the folder an audit reads and `shadowed` tells that another one comes first.
    """
    paths = parameters.get("paths") or sys.path
    folders = [str(path) for path in dict.fromkeys(map(Path, paths)) if path.is_dir()]
    if not folders:
        raise GiveUp(f"None of these is a folder: {', '.join(map(str, paths))}")
    folders = [folder for folder in folders if any(_metadata_in(Path(folder)))] or folders
    seen: set[str] = set()
    found = [_listed(path, seen) for folder in folders for path in _metadata_in(Path(folder))]
    context.log("listed", distributions=len(found), folders=len(folders))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "paths": folders,
        "distributions": sorted(found, key=lambda one: (one["name"].casefold(), one["shadowed"])),
    }


def _metadata_in(folder: Path) -> Iterator[Path]:
    for pattern in ("*.dist-info", "*.egg-info"):
        yield from sorted(folder.glob(pattern))


def _listed(path: Path, seen: set[str]) -> Json:
    name, version = _identity(path)
    shadowed = canonicalize_name(name) in seen
    seen.add(canonicalize_name(name))
    return {"name": name, "version": version, "metadata": str(path), "shadowed": shadowed}


def _identity(path: Path) -> tuple[str, str | None]:
    """Read name and version; where the metadata is broken the folder's name has to do."""
    fields = _fields(path)
    from_folder, _, rest = path.stem.partition("-")
    name, version = fields.get("Name"), fields.get("Version")
    return _clean(name or from_folder), _clean(version or rest) or None


def _fields(path: Path) -> Mapping[str, Any]:
    try:
        return metadata.Distribution.at(path).metadata or {}  # type: ignore[return-value]
    except Exception:  # whatever it raises, another Python version raises something else
        return {}


# Looking at one


@dataclass
class Findings:
    """What the files of one distribution came to. Lists hold paths as RECORD has them."""

    files: int = 0
    size_bytes: int = 0
    verified: int = 0
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@agent("audit-distribution", capabilities=["audit"])
def audit_distribution(parameters: Json, context: Context) -> Json:
    """Audit `distribution`, one of those listed; its requirements are looked for in `paths`.

    Answers `{name, version, metadata, licence, sizeBytes, files, verified, changed, changedCount,
    missing, missingCount, unmet: [{requirement, found}], notes}`. Without a RECORD `sizeBytes` is
    null.
    """
    listed = parameters["distribution"]
    path = Path(listed["metadata"])
    distribution = metadata.Distribution.at(path)
    notes = _notes(path, distribution, listed)
    record = _record(distribution)
    if record is None:
        notes.append("no RECORD: its files are unknown")
    findings = _examine(path.parent, record or [], context)
    unmet, unreadable = _unmet(distribution, parameters.get("paths") or sys.path)
    context.log("audited", files=findings.files, bytes=findings.size_bytes)
    return {
        **{key: listed[key] for key in ("name", "version", "metadata")},
        "licence": _licence(_fields(path)),
        "sizeBytes": None if record is None else findings.size_bytes,
        "files": findings.files,
        "verified": findings.verified,
        "changed": findings.changed[:SHOWN_PER_DISTRIBUTION],
        "changedCount": len(findings.changed),
        "missing": findings.missing[:SHOWN_PER_DISTRIBUTION],
        "missingCount": len(findings.missing),
        "unmet": unmet,
        "notes": (notes + unreadable)[:SHOWN_PER_DISTRIBUTION],
    }


def _notes(path: Path, distribution: metadata.Distribution, listed: Json) -> list[str]:
    notes = []
    if not path.exists():
        notes.append("it went away while the audit ran")
    elif not _fields(path).get("Name"):
        notes.append("its metadata cannot be read")
    if listed.get("shadowed"):
        notes.append("shadowed: another one of that name comes first")
    origin = _origin(distribution)
    return [*notes, origin] if origin else notes


def _origin(distribution: metadata.Distribution) -> str | None:
    """Say where a distribution that came from no index came from."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = _clean(origin.get("url", ""))
        editable = origin.get("dir_info", {}).get("editable", False)
    except (OSError, ValueError, AttributeError):
        return "its direct_url.json cannot be read"
    if not url:
        return None
    return f"editable, from {url}" if editable else f"installed from {url}"


def _record(distribution: metadata.Distribution) -> list[tuple[str, str]] | None:
    """Return (path, hash) of every file installed, or None if nobody wrote that down."""
    try:
        text = distribution.read_text("RECORD")
        if text is None:
            return None
        rows = list(csv.reader(text.splitlines()))
    except (OSError, ValueError, csv.Error):
        return None
    # Without NUL, which no path may have and no report could say.
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows if row and "\0" not in row[0]]


def _examine(root: Path, record: Sequence[tuple[str, str]], context: Context) -> Findings:
    findings = Findings()
    for number, (name, recorded) in enumerate(record):
        if context.cancelled:
            raise GiveUp("The audit was cancelled.")
        if number % 500 == 0:
            context.progress(number / len(record))
        _examine_file(root / name, name, recorded, findings)
    return findings


def _examine_file(path: Path, name: str, recorded: str, findings: Findings) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return
        findings.files += 1
        findings.size_bytes += status.st_size
        same = _matches(path, recorded)
    except OSError:
        if recorded:  # what has no hash, such as bytecode, may come and go
            findings.missing.append(name)
        return
    findings.verified += same is not None
    if same is False:
        findings.changed.append(name)


def _matches(path: Path, recorded: str) -> bool | None:
    """Compare a file with its hash in RECORD (`sha256=...`); None where it has none we check."""
    algorithm, _, expected = recorded.partition("=")
    if algorithm not in CHECKED_HASHES:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).digest()
    return urlsafe_b64encode(digest).decode().rstrip("=") == expected.rstrip("=")


def _licence(fields: Mapping[str, Any]) -> str | None:
    """Name the licence as the metadata does: as an expression, in words, or by its classifiers."""
    declared = [fields.get("License-Expression"), fields.get("License")]
    for text in (_clean(one or "").strip() for one in declared):
        if text and text.upper() != "UNKNOWN" and _is_short(text):
            return text
    get_all = getattr(fields, "get_all", lambda _: None)
    classifiers = [_clean(one) for one in get_all("Classifier") or []]
    names = [one.split(" :: ")[-1] for one in classifiers if one.startswith("License ::")]
    precise = [name for name in names if name != "OSI Approved"]
    return ", ".join(dict.fromkeys(precise))[: LICENCE_CHARACTERS * 2] or None


def _is_short(licence: str) -> bool:
    return len(licence) <= LICENCE_CHARACTERS and "\n" not in licence


def _unmet(
    distribution: metadata.Distribution, paths: Sequence[str]
) -> tuple[list[Json], list[str]]:
    """Return the requirements that nothing installed meets, and notes on unreadable ones.

    Requirements of extras are left out: nobody can tell which extras were asked for.
    """
    unmet, notes = [], []
    for text in _requirements(distribution):
        try:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found, met = _look_for(requirement, paths)
        except (InvalidRequirement, ValueError):  # an undefined marker, or a version that is none
            notes.append(f"unreadable requirement: {_clean(text)[:100]}")
            continue
        if not met:
            unmet.append({"requirement": _clean(text), "found": found})
    return unmet, notes


def _requirements(distribution: metadata.Distribution) -> list[str]:
    with suppress(Exception):  # broken metadata, of which there is a note already
        return distribution.requires or []
    return []


def _look_for(requirement: Requirement, paths: Sequence[str]) -> tuple[str | None, bool]:
    """Return the version installed of what is required, if any, and whether it will do."""
    candidates = metadata.distributions(name=requirement.name, path=list(paths))
    installed = next(iter(candidates), None)
    if installed is None:
        return None, False
    version = _clean(installed.version or "")
    return version or None, requirement.specifier.contains(version, prereleases=True)


def _clean(text: object) -> str:
    """Drop from metadata what no JSON may hold: NUL and lone surrogates."""
    return str(text).replace("\0", "").encode(errors="replace").decode()


# Joining


@agent("write-report", capabilities=["report"])
def write_report(parameters: Json, context: Context) -> Json:
    """Write `audit-report.md` and `audit-report.json` about `audits` into `folder`.

    `environment` is what `list-distributions` answered; an audit that failed is null. Answers
    `{summary, markdown, json}`, the last two being the files' paths.
    """
    environment, results = parameters["environment"], parameters["audits"]
    audits = [one for one in results if one is not None]
    summary = _summary(audits, failed=len(results) - len(audits))
    written = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = {key: environment[key] for key in ("python", "platform", "paths")}
    folder = Path(parameters["folder"]).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / "audit-report.md", folder / "audit-report.json"
    document = {"written": written, **about, "summary": summary, "distributions": audits}
    _write(data, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    _write(markdown, "\n".join(_markdown(written, about, summary, audits)) + "\n")
    context.log("written", folder=str(folder))
    return {"summary": summary, "markdown": str(markdown), "json": str(data)}


def _write(path: Path, text: str) -> None:
    """Replace `path` whole: a second attempt, or a reader, never meets half a report."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _summary(audits: Sequence[Json], *, failed: int) -> Json:
    def total(key: str) -> int:
        return sum(one[key] or 0 for one in audits)

    return {
        "distributions": len(audits),
        "sizeBytes": total("sizeBytes"),
        "files": total("files"),
        "verified": total("verified"),
        "changed": total("changedCount"),
        "missing": total("missingCount"),
        "unmet": sum(len(one["unmet"]) for one in audits),
        "unknownLicence": sum(one["licence"] is None for one in audits),
        "notAudited": failed,
    }


def _markdown(written: str, about: Json, summary: Json, audits: Sequence[Json]) -> Iterator[str]:
    yield from ("# Dependency audit", "")
    yield f"Python {about['python']} on {about['platform']}, {written}  "
    yield from (f"Looked in: {', '.join(f'`{path}`' for path in about['paths'])}", "")
    yield from _totals(summary)
    yield from _attention(audits)
    yield from _sizes(summary, audits)
    yield from _licences(audits)
    yield from _all(audits)


def _totals(summary: Json) -> Iterator[str]:
    rows = [
        ("Distributions", f"{summary['distributions']:,}"),
        ("Size on disk", size(summary["sizeBytes"])),
        ("Files", f"{summary['files']:,}"),
        ("Files compared with the hash in RECORD", f"{summary['verified']:,}"),
        ("Files changed since installation", _flagged(summary["changed"])),
        ("Files missing", _flagged(summary["missing"])),
        ("Requirements not met", _flagged(summary["unmet"])),
        ("Licence unknown", _flagged(summary["unknownLicence"])),
    ]
    if summary["notAudited"]:
        rows.append(("Could not be audited", _flagged(summary["notAudited"])))
    yield from _table(["", ""], rows)


def _attention(audits: Sequence[Json]) -> Iterator[str]:
    yield from ("## What needs a look", "")
    rows = [(_title(one), what, which) for one in audits for what, which in _faults(one)]
    if not rows:
        yield from ("Nothing: every requirement is met, every file is as installed.", "")
        return
    rows.sort(key=lambda row: _RANK[row[1]])
    yield from _table(["Distribution", "What", "Which"], rows)


_RANK = {"unmet": 0, "changed": 1, "missing": 2, "licence unknown": 3, "note": 4}
"""What the table of the report puts first."""


def _faults(one: Json) -> Iterator[tuple[str, str]]:
    for unmet in one["unmet"]:
        yield "unmet", f"`{unmet['requirement']}`, found: {unmet['found'] or 'nothing'}"
    for what in ("changed", "missing"):
        if one[f"{what}Count"]:
            yield what, _some(one[what], one[f"{what}Count"])
    if one["licence"] is None:
        yield "licence unknown", ""
    for note in one["notes"]:
        yield "note", note


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names):,} more" if count > len(names) else ""
    return ", ".join(f"`{name}`" for name in names) + more


def _sizes(summary: Json, audits: Sequence[Json]) -> Iterator[str]:
    yield from ("## Largest", "")
    largest = sorted(audits, key=lambda one: -(one["sizeBytes"] or 0))[:LARGEST_SHOWN]
    whole = summary["sizeBytes"] or 1
    rows = [
        (_title(one), size(one["sizeBytes"]), _share(one["sizeBytes"], whole), one["files"])
        for one in largest
    ]
    yield from _table(["Distribution", "Size", "Share", "Files"], rows)


def _licences(audits: Sequence[Json]) -> Iterator[str]:
    yield from ("## Licences", "")
    counts = Counter(one["licence"] or "unknown" for one in audits)
    yield from _table(["Licence", "Distributions"], counts.most_common())


def _all(audits: Sequence[Json]) -> Iterator[str]:
    yield from ("## All", "")
    rows = [
        (
            _title(one),
            one["licence"] or "unknown",
            size(one["sizeBytes"]),
            _flagged(one["changedCount"] + one["missingCount"]),
            _flagged(len(one["unmet"])),
        )
        for one in audits
    ]
    yield from _table(["Distribution", "Licence", "Size", "Changed or missing", "Unmet"], rows)


def _title(one: Json) -> str:
    return f"{one['name']} {one['version'] or '(no version)'}"


def _share(part: int | None, whole: int) -> str:
    return "-" if part is None else f"{part / whole:.0%}"


def _flagged(count: int) -> str:
    return f"**{count:,}**" if count else "0"


def size(count: int | None) -> str:
    """Say a number of bytes in words; None, which is unknown, as a dash."""
    if count is None:
        return "-"
    amount, units = float(count), iter(("B", "kB", "MB"))
    for unit in units:
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield _row(head)
    yield _row(["---"] * len(head))
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(value: object) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
