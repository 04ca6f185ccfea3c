"""`opscore status` and `opscore doctor`: how everything is, and what is the matter with it.

Whatever the API has to say comes from one page of its own; here it is only shown.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from opscore.cli import output
from opscore.cli.session import FAILED, Command, Session, asks, hint_about


def show_status(session: Session) -> bool:
    """Print what the API says of everything; return whether all is well."""
    found = session.client.status()
    session.show(found, lambda: _show(found))
    return not found["problems"]


def show_processes(processes: Sequence[Mapping[str, Any]]) -> None:
    """Print the processes of a stack: `{name, state, pid, restarts, since, url}`."""
    output.table(processes, _PROCESSES, "")
    click.echo()


@click.command(cls=Command, examples=("opscore doctor", "opscore doctor --json"))
@asks
def doctor(session: Session) -> None:
    """Say what is the matter, and what to do about it; the exit status is 1 if something is."""
    checks = list(_examine(session))
    session.show([asdict(check) for check in checks], lambda: _tell(checks))
    if any(not check.is_ok for check in checks):
        click.get_current_context().exit(FAILED)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and if it is not well, what to do."""

    name: str
    is_ok: bool
    found: str
    hint: str | None = None


def _examine(session: Session) -> Iterator[Check]:
    from opscore.sdk import OpsCoreSDKError

    yield _address(session)
    try:
        found = session.client.status()
    except OpsCoreSDKError as error:
        yield Check("api", False, str(error), hint_about(error))
        return
    yield Check("api", True, f"{session.url} answers, and takes the key.")
    yield from _parts(found)
    for problem in found["problems"]:
        yield Check(problem["code"], False, problem["sentence"], problem["hint"])


def _address(session: Session) -> Check:
    where = "by --api-url or OPSCORE_API_URL" if not session.is_local else f"in {session.data}"
    both = session.is_local and os.environ.get("OPSCORE_API_KEY")
    aside = "; OPSCORE_API_KEY is not sent there" if both else ""
    return Check("settings", True, f"The API is {session.url}, named {where}{aside}.")


def _parts(found: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the parts that are well; what is wrong with others is said by the problems."""
    wrong = {problem["code"] for problem in found["problems"]}
    for name, codes, said in (
        ("database", {"database_behind", "database_ahead"}, _database),
        ("clocks", {"clock_skew"}, _clocks),
        ("redis", {"broker_away", "broker_full"}, _queues),
        ("workers", {"no_workers", "queue_without_workers", "database_behind"}, _workers),
        ("keeper", {"keeper_silent", "no_workers", "database_behind"}, _keeper),
        ("schedules", {"schedules_late", "database_behind"}, _schedules),
        ("agents", {"agent_paused", "line_unserved", "database_behind"}, _agents),
        ("runs", {"runs_stuck", "database_behind"}, _runs),
    ):
        if not codes & wrong:
            yield Check(name, True, said(found))


def _database(found: Mapping[str, Any]) -> str:
    return f"It is at revision {found['database']['revision']}, the newest."


def _clocks(found: Mapping[str, Any]) -> str:
    return f"Database and API differ by {abs(found['database']['clockSkewSeconds']):.1f} s."


def _queues(found: Mapping[str, Any]) -> str:
    return f"{sum(queue['ready'] or 0 for queue in found['queues'])} messages wait in its queues."


def _workers(found: Mapping[str, Any]) -> str:
    return f"{_count(len(found['workers']), 'worker')} alive, at every queue that has messages."


def _keeper(found: Mapping[str, Any]) -> str:
    return f"{found['keeper']['holder']} keeps house."


def _schedules(found: Mapping[str, Any]) -> str:
    return f"{_count(found['schedules']['enabled'], 'schedule')} enabled, none is late."


def _agents(found: Mapping[str, Any]) -> str:
    agents = found["fleet"]["agents"]
    return f"{agents['available']} of {agents['total']} take work; nobody waits for one in vain."


def _runs(found: Mapping[str, Any]) -> str:
    return f"{_count(sum(runs['count'] for runs in found['runs']), 'run')} open, none is stuck."


def _count(number: int, word: str) -> str:
    return f"{number} {word} is" if number == 1 else f"{number} {word}s are"


def _tell(checks: Sequence[Check]) -> None:
    for check in checks:
        mark = click.style("✔", fg="green") if check.is_ok else click.style("✘", fg="red")
        output.echo(f"{mark} {check.name}: {output.plain(check.found)}")
        if check.hint:
            output.echo(f"    → {output.plain(check.hint)}")
    wrong = sum(not check.is_ok for check in checks)
    click.echo("All is well." if not wrong else f"{_count(wrong, 'thing')} the matter.")


# --- The page -----------------------------------------------------------------------------------


def _show(found: Mapping[str, Any]) -> None:
    _section("Workers", found["workers"], _WORKERS, "No worker lives: `opscore worker`.")
    _section("Queues", found["queues"], _QUEUES, "")
    agents, slots = found["fleet"]["agents"], found["fleet"]["slots"]
    click.echo(
        f"Agents: {agents['total']}, {agents['available']} of them take work;"
        f" {slots['held']} of {slots['total']} slots held.\n"
    )
    _section("Longest lines", found["fleet"]["lines"], _LINES, None)
    _section("Waiting", found["waiting"], _WAITING, None)
    _section("To `opscore task approve`, or `reject`", found["approvals"], _APPROVALS, None)
    _section("Runs that are not over", found["runs"], _RUNS, "No run is open.")
    _section("Stuck", found["stuck"], _STUCK, None)
    for problem in found["problems"]:
        output.echo(click.style(f"Problem: {output.plain(problem['sentence'])}", fg="red"))
        click.echo(f"    → {output.plain(problem['hint'])}")
    if not found["problems"]:
        click.echo("All is well.")


def _section(
    head: str, rows: Sequence[Any], columns: Sequence[output.Column], empty: str | None
) -> None:
    """Print a table below its heading; nothing if there are no rows and nothing to say of it."""
    if rows or empty:
        click.echo(f"{head}:")
        output.table(rows, columns, empty or "")
        click.echo()


def _ago(name: str) -> Any:
    return lambda row: output.span(row[name])


_PROCESSES: Sequence[output.Column] = (
    ("PROCESS", lambda p: p["name"]),
    ("STATE", lambda p: p["state"]),
    ("PID", lambda p: p["pid"]),
    ("RESTARTS", lambda p: p["restarts"]),
    ("UP", lambda p: output.span(time.time() - p["since"])),
    ("URL", lambda p: p["url"]),
)
_WORKERS: Sequence[output.Column] = (
    ("WORKER", lambda w: w["name"]),
    ("POOL", lambda w: f"{w['concurrency']} {w['pool']}"),
    ("QUEUES", lambda w: ", ".join(w["queues"])),
    ("PID", lambda w: w["pid"]),
    ("VERSION", lambda w: w["version"]),
    ("SEEN", lambda w: output.ago(w["seenAt"])),
)
_QUEUES: Sequence[output.Column] = (
    ("QUEUE", lambda q: q["name"]),
    ("READY", lambda q: q["ready"]),
    ("UNACKED", lambda q: q["unacked"]),
    ("WORKERS", lambda q: q["workers"]),
)
_LINES: Sequence[output.Column] = (
    ("FOR", lambda line: line["agentId"] or f"any that can {line['agentCapability']}"),
    ("WAITING", lambda line: line["waiting"]),
    ("OLDEST", _ago("oldestSeconds")),
    ("NOBODY SERVES IT", lambda line: line["unservedBecause"]),
)
_WAITING: Sequence[output.Column] = (
    ("REASON", lambda w: w["reason"]),
    ("TASKS", lambda w: w["count"]),
    ("OLDEST", _ago("oldestSeconds")),
    ("NEXT LOOK", lambda w: output.age(w["nextWakeAt"])),
)
_APPROVALS: Sequence[output.Column] = (
    ("TASK ID", lambda a: a["taskId"]),
    ("TASK", output.task_name),
    ("WORKFLOW", lambda a: a["workflowId"]),
    ("SINCE", lambda a: output.ago(a["since"])),
)
_RUNS: Sequence[output.Column] = (
    ("STATUS", lambda r: r["status"]),
    ("REASON", lambda r: r["reason"]),
    ("RUNS", lambda r: r["count"]),
    ("OLDEST", _ago("oldestSeconds")),
    ("OLDEST RUN", lambda r: r["oldestRunId"]),
)
_STUCK: Sequence[output.Column] = (
    ("RUN", lambda s: s["runId"]),
    ("TASK", lambda s: output.task_name(s) if s["taskId"] else None),
    ("WHY", lambda s: s["sentence"]),
    ("WHAT TO DO", lambda s: s["hint"]),
)
