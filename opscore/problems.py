"""What is the matter with an installation, in words: what `status` found -> a sentence about each
thing that is not as it should be, and one about what to do.

Decides what counts as a problem, and reads nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opscore.queries import duration

Row = Mapping[str, Any]
Problem = dict[str, str]
"""`{code, sentence, hint}`."""

LATE_KEEPER_SECONDS = 5
"""Another one takes the lease within a second or two after it ran out."""
SKEW_SECONDS = 2
LONG_SECONDS = 600
"""Who waits for somebody that may come by himself is patient for so long."""
LINES_TOLD = 10
"""Lines that nobody serves, each a problem; those with the most tasks in them."""

_START_WORKER = "Start one: `opscore worker`."


def find(status: Row) -> list[Problem]:
    """Return what is the matter, what concerns everybody first; nothing if all is well."""
    return [
        *_database(status["database"]),
        *_broker(status),
        *_workers(status),
        *_keeper(status),
        *_beat(status["schedules"]),
        *_lines(status["fleet"]["lines"]),
        *_stuck(status["stuck"]),
    ]


def _problem(code: str, sentence: str, hint: str) -> Problem:
    return {"code": code, "sentence": sentence, "hint": hint}


def _database(database: Row) -> Iterator[Problem]:
    present, newest = database["revision"], database["newest_revision"]
    told = f"The database is at revision {present or 'none'}, and this process needs {newest}"
    if database["is_behind"]:
        sentence = f"{told}; nothing else of it can be told."
        yield _problem("database_behind", sentence, "Bring it up to date: `opscore db upgrade`.")
    elif present != newest:
        hint = "Start web, workers and beat anew with the version that upgraded it."
        yield _problem("database_ahead", f"{told}.", hint)
    skew = database["clock_skew_seconds"]
    if abs(skew) > SKEW_SECONDS:
        way = "ahead of" if skew > 0 else "behind"
        sentence = f"The database's clock is {abs(skew):.1f} s {way} that of this process."
        hint = "Have both machines keep time (NTP): what is due is decided by the database's clock."
        yield _problem("clock_skew", sentence, hint)


def _broker(status: Row) -> Iterator[Problem]:
    if status["broker_error"] is not None:
        sentence = f"{status['broker_error']} No visit reaches a worker."
        hint = "Start Redis, or see whether REDIS_URL names it; what is accepted meanwhile is kept."
        yield _problem("broker_away", sentence, hint)
    if status["broker_is_full"]:
        sentence = "Redis is full (maxmemory), and refuses messages: what is accepted waits."
        hint = "Start workers, give it more memory, or empty it: `FLUSHALL` loses nothing but time."
        yield _problem("broker_full", sentence, hint)


def _workers(status: Row) -> Iterator[Problem]:
    if status["database"]["is_behind"]:
        return
    if not status["workers"]:
        yield _problem("no_workers", "No worker lives: nothing is done.", _START_WORKER)
        return
    for queue in status["queues"]:
        if queue["ready"] and not queue["workers"]:
            name, number = queue["name"], queue["ready"]
            messages = f"{number} message{'s' if number > 1 else ''}"
            sentence = f"The queue {name} has {messages}, and no worker takes from it."
            hint = f"Start one that does: `opscore worker --queues {name}`."
            yield _problem("queue_without_workers", sentence, hint)


def _keeper(status: Row) -> Iterator[Problem]:
    late = status["keeper"]["late_seconds"]
    if not status["workers"] or (late is not None and late <= LATE_KEEPER_SECONDS):
        return
    since = "" if late is None else f" for {duration(late)}"
    sentence = f"No worker keeps house{since}: nothing that waits is woken, nothing lost is found."
    hint = "Look for `keeper` in the workers' logs, and start them anew if they are silent."
    yield _problem("keeper_silent", sentence, hint)


def _beat(schedules: Row) -> Iterator[Problem]:
    if late := schedules["late"]:
        who = "1 schedule is late" if late == 1 else f"{late} schedules are late"
        by = duration(schedules["worst_lag_seconds"])
        sentence = f"{who}, by up to {by}: no beat fires them, or it cannot keep up."
        yield _problem("schedules_late", sentence, "Start a beat, or one more: `opscore beat`.")


def _lines(lines: Iterable[Row]) -> Iterator[Problem]:
    unserved = [line for line in lines if _is_unserved(line)]
    for line in unserved[:LINES_TOLD]:
        number = line["waiting"]
        waits = "1 task waits" if number == 1 else f"{number} tasks wait"
        code = "agent_paused" if line["why"] == "paused" else "line_unserved"
        since = duration(line["oldest_seconds"])
        yield _problem(code, f"{waits}, for up to {since}: {why(line)}.", way_out(line))


def _is_unserved(line: Row) -> bool:
    """Tell whether somebody must do something, and not only agents say that they are free."""
    if line["why"] in ("not_ready", "none_ready"):
        return is_deserted(line)
    return line["why"] is not None


def is_deserted(line: Row) -> bool:
    """Tell whether a line has had nobody to serve it for long."""
    return line["why"] is not None and line["oldest_seconds"] >= LONG_SECONDS


def _stuck(stuck: Iterable[Row]) -> Iterator[Problem]:
    """Tell of what is stuck but for lines nobody serves: those are told by themselves."""
    found = [one for one in stuck if one["code"] != "nobody_serves"]
    if runs := sorted({str(one["run_id"]) for one in found}):
        who = "1 run is stuck" if len(runs) == 1 else f"{len(runs)} runs are stuck"
        sentence = f"{who}, such as {found[0]['run_id']}: {found[0]['sentence']}"
        yield _problem("runs_stuck", sentence, found[0]["hint"])


# --- Lines that nobody serves ---------------------------------------------------------------------

_WHY: Mapping[str, str] = {
    "unknown": "agent {agent} is not registered",
    "paused": "agent {agent} is paused",
    "draining": "agent {agent} is draining",
    "silent": "agent {agent} has not reported for longer than its heartbeatSeconds",
    "error": "agent {agent} reported error",
    "not_ready": "agent {agent} says that it is {state}, and has nothing of ours",
    "nobody": "no agent has the capability {capability}",
    "none_available": "no agent with the capability {capability} is available",
    "none_ready": "no agent with the capability {capability} says that it is free",
}
_IDLE = "it gets work once it reports idle (`opscore agent update-state {agent} idle`)."
_WAYS_OUT: Mapping[str, str] = {
    "unknown": "Register it, or cancel the runs that ask for it.",
    "paused": "Let it go on: `opscore agent resume {agent}`.",
    "draining": "Let it go on: `opscore agent resume {agent}`.",
    "silent": "Start it, or have it report its state in time.",
    "error": f"Mend it; {_IDLE}",
    "not_ready": f"Wait, or, if it is free: {_IDLE}",
    "nobody": "Start an agent that has it, or cancel the runs that ask for it.",
    "none_ready": "`opscore agent list --capability {capability}` shows who must report idle.",
    "none_available": "`opscore agent list --capability {capability}` says why each is not.",
}


def why(line: Row) -> str | None:
    """Say why nobody serves a line; None if somebody does."""
    return None if line["why"] is None else _WHY[line["why"]].format(**_names(line))


def way_out(line: Row) -> str:
    """Say what to do about it."""
    return _WAYS_OUT[line["why"]].format(**_names(line))


def _names(line: Row) -> dict[str, Any]:
    return {
        "agent": line["agent_id"],
        "capability": line["agent_capability"],
        "state": line["state"],
    }
