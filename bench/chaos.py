"""Fault injection: real processes are broken under load, and then nothing may be lost or doubled.

    python -m bench.chaos [--short] [--only name,...] [--seed N] [--out FILE] [--markdown]

Each case has a new database, an empty Redis and two workers of its own, keeps some runs of mixed
shapes open, injects its fault several times at random moments, and then looks at what PostgreSQL
has: opscore's own record, and beside it the log the agents wrote themselves. See `chaos_faults` for
the faults and `_broken_promises` for what must hold.

Recovery: at the moment a fault is over (a process was killed or stopped, a server is back), every
task that could have started, or whose attempt turns out lost, is noted; it has recovered once it is
claimed (anew). The time includes what it would have waited in line without any fault: compare the
row `none`.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos_faults import FAULTS, Case, Fault
from bench.chaos_site import ROOT, Arena, Directly, Load, OverHttp, Site, Sql
from opscore import logs, models

RECOVERY_LIMIT_SECONDS = 60.0
SHOWN = 20
"""Rows of each kind that a failure shows."""

SHORT_ENVIRONMENT = {
    "OPSCORE_LEASE_SECONDS": "3",
    "OPSCORE_RENEW_SECONDS": "1",
    "OPSCORE_KEEPER_SECONDS": "0.25",
    "OPSCORE_RESCUE_SECONDS": "2",
    "CHAOS_VISIBILITY_SECONDS": "2",
}


@dataclass(frozen=True)
class Form:
    """How much of it: the long form has opscore's own defaults, the short one quick leases."""

    short: bool
    window: int
    """Runs kept open."""
    pause: tuple[float, float]
    """Seconds between two injections."""
    patience_seconds: float
    """How long after the last fault runs may take to end before they count as lost."""

    def environment(self, fault: Fault) -> dict[str, str]:
        return {**fault.environment, **(SHORT_ENVIRONMENT if self.short else {})}

    def runs(self, fault: Fault) -> int:
        return fault.short_runs if self.short else fault.runs

    def times(self, fault: Fault) -> int:
        return fault.short_times if self.short else fault.times


LONG = Form(short=False, window=12, pause=(2, 6), patience_seconds=150)
SHORT = Form(short=True, window=8, pause=(0.1, 0.8), patience_seconds=70)


@dataclass
class Result:
    """What one case came to."""

    fault: str
    times: int
    runs: int = 0
    tasks: int = 0
    lost: int = 0
    """Runs that did not end, or not as they had to."""
    doubled: int = 0
    """Tasks whose effect was had twice, or that completed twice in the record."""
    attempts_lost: int = 0
    calls_repeated: int = 0
    """Calls of agents beyond one for each task; each belongs to an attempt that was lost."""
    republished: int = 0
    """How often a run's canvas was published again."""
    recovery: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seen: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    """What does not hold; empty when the case passes."""
    account: str = ""
    """Rows and logs that show a failure."""

    def recovery_p50(self) -> float:
        ordered = sorted(self.recovery)
        return round(ordered[len(ordered) // 2], 2) if ordered else 0.0

    def recovery_max(self) -> float:
        return round(max(self.recovery, default=0.0), 2)

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "lost": self.lost,
            "doubled": self.doubled,
            "recovery_s_p50": self.recovery_p50(),
            "recovery_s_max": self.recovery_max(),
            "times": self.times,
            "tasks": self.tasks,
            "attempts_lost": self.attempts_lost,
            "calls_repeated": self.calls_repeated,
            "republished": self.republished,
            "seconds": round(self.seconds, 1),
            "passed": not self.complaints,
            **self.seen,
        }


# --- One case -----------------------------------------------------------------------------------


def run_case(arena: Arena, fault: Fault, form: Form, seed: int) -> Result:
    """Inject a fault into a site of its own and return what came of it; call from main."""
    began = time.monotonic()
    folder = arena.folder / fault.name
    folder.mkdir(parents=True, exist_ok=True)
    result = Result(fault.name, form.times(fault))
    arena.mend()
    with _case(arena, fault, form, seed, folder) as case:
        try:
            _inject(case, fault, form, result)
        except Exception as error:  # the next case must have its turn, and the rows be looked at
            result.complaints.append(f"the case itself broke: {error!r}")
        arena.thaw()
        _judge(case, fault, result)
    result.seconds = time.monotonic() - began
    return result


@contextmanager
def _case(arena: Arena, fault: Fault, form: Form, seed: int, folder: Path) -> Iterator[Case]:
    chance = random.Random(f"{seed}:{fault.name}")
    with ExitStack() as cleanup:
        url = cleanup.enter_context(arena.new_database())
        cleanup.callback(arena.mend)  # the database is dropped even if the fault left it down
        site = Site(arena, url, folder, form.environment(fault), fault.tweak)
        cleanup.callback(site.close)
        site.start_workers(2)
        submit = OverHttp(site.start_web()) if fault.over_http else Directly(site)
        cleanup.enter_context(closing(submit))
        shapes = random.Random(chance.random())
        load = Load(submit, Sql(url), shapes, form.runs(fault), form.window)
        cleanup.callback(load.stop)
        yield Case(site, load, chance, form.short)


def _inject(case: Case, fault: Fault, form: Form, result: Result) -> None:
    site, load = case.site, case.load
    load.start()
    with fault.around(case):
        site.wait(lambda: completed(site) >= form.runs(fault) // 4, 30)
        for _ in range(result.times):
            site.pause(case.chance.uniform(*form.pause))
            fault.inject(case)
        _finish_load(case, form.patience_seconds)
        site.wait(lambda: _unfinished(site) == 0, form.patience_seconds)
    result.complaints += fault.check(case)


def _finish_load(case: Case, seconds: float) -> None:
    """Let the load come to its number of runs, looking after the processes meanwhile."""
    case.load.ask_to_finish()
    if not case.site.wait(case.load.is_over, seconds):
        raise RuntimeError(f"only {len(case.load.accepted)} runs were accepted")


def completed(site: Site) -> int:
    return int(site.sql.one("SELECT count(*) FROM tasks WHERE status = 'completed'"))


def _unfinished(site: Site) -> int:
    return int(site.sql.one("SELECT count(*) FROM runs WHERE finished_at IS NULL"))


# --- What must hold -----------------------------------------------------------------------------

_AGENT_TASKS = "tasks t WHERE t.kind = 'agent'"
_NOT_ONCE = """
SELECT t.id, t.run_id, t.definition_id, t.index, t.status, t.reason, t.attempt,
       count(a.number) FILTER (WHERE a.status = 'completed') AS completions
FROM tasks t JOIN runs r ON r.id = t.run_id AND r.status = 'completed'
LEFT JOIN attempts a ON a.task_id = t.id
GROUP BY t.id
HAVING t.status <> 'completed'
    OR t.kind = 'agent' AND count(*) FILTER (WHERE a.status = 'completed') <> 1
"""
_EFFECTS = """
SELECT t.id, t.run_id, coalesce(t.index::text, t.definition_id) AS label, count(e.key) AS effects
FROM tasks t JOIN runs r ON r.id = t.run_id AND r.status = 'completed'
LEFT JOIN chaos_effects e
  ON e.run_id = t.run_id AND e.label = coalesce(t.index::text, t.definition_id)
WHERE t.kind = 'agent' GROUP BY t.id HAVING count(e.key) <> 1
"""
_CALLED_TWICE = """
SELECT task_id, attempt, count(*) AS calls FROM chaos_calls GROUP BY 1, 2 HAVING count(*) > 1
"""
_LEFT_HELD = "SELECT * FROM slots WHERE holder IS NOT NULL"
_LEFT_RUNNING = "SELECT * FROM attempts WHERE status = 'running'"
_LEFT_IDLE = """
SELECT pid, application_name, query FROM pg_stat_activity
WHERE datname = current_database() AND state LIKE 'idle in transaction%%'
  AND state_change < clock_timestamp() - interval '2 s'
"""
_NOT_OF_A_LOST_WORKER = """
SELECT t.run_id, a.* FROM attempts a JOIN tasks t ON t.id = a.task_id
WHERE a.status NOT IN ('completed', 'lost', 'running')
  AND a.error->>'code' IS DISTINCT FROM 'worker_lost'
"""
_CALLS_REPEATED = "SELECT count(*) - count(DISTINCT task_id) FROM chaos_calls"
_LOST = """
SELECT count(*) FROM attempts WHERE status = 'lost' OR error->>'code' = 'worker_lost'
"""


def _judge(case: Case, fault: Fault, result: Result) -> None:
    """Fill in the figures and say what does not hold."""
    case.load.stop()
    sql = case.site.sql
    result.seen = case.seen
    result.runs = sql.one("SELECT count(*) FROM runs")
    result.tasks = sql.one(f"SELECT count(*) FROM {_AGENT_TASKS}")
    result.attempts_lost = sql.one(_LOST)
    result.calls_repeated = sql.one(_CALLS_REPEATED)
    result.republished = sql.one("SELECT coalesce(sum(generation - 1), 0) FROM runs")
    result.recovery = _recovery(case)
    for sentence, rows in _broken_promises(case, result):
        result.complaints.append(f"{sentence}: {len(rows)}" if rows else sentence)
        result.account += _shown(sentence, rows)
    result.complaints += _complaints(case, fault, result)
    if result.complaints:
        result.account += _logs(case.site)


def _broken_promises(case: Case, result: Result) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield what PostgreSQL shows to be wrong, with the rows that show it."""
    sql = case.site.sql
    if wrong := _wrong_runs(case):
        result.lost = len(wrong)
        yield "runs that did not end as they had to", wrong
        unfinished = "SELECT * FROM tasks WHERE run_id = ANY (%(ids)s::uuid[]) AND status <> %(s)s"
        ids = [row["id"] for row in wrong]
        yield "tasks of those runs", sql.rows(unfinished, ids=ids, s="completed")
    effects, twice = sql.rows(_EFFECTS), sql.rows(_NOT_ONCE)
    result.doubled = len(
        {e.id for e in effects if e.effects > 1} | {t.id for t in twice if t.completions > 1}
    )
    queries = (
        _CALLED_TWICE,
        _unruly(),
        _LEFT_HELD,
        _LEFT_RUNNING,
        _LEFT_IDLE,
        _NOT_OF_A_LOST_WORKER,
    )
    found = [effects, twice, *map(sql.rows, queries)]
    sentences = (
        "tasks whose agent did not have its effect exactly once",
        "tasks not completed exactly once in the record",
        "attempts whose agent was called twice",
        "rows that break a rule of theirs",
        "slots still held",
        "attempts still running",
        "sessions left idle in a transaction",
        "attempts that neither completed nor were lost",
    )
    yield from ((said, rows) for said, rows in zip(sentences, found, strict=True) if rows)


def _unruly() -> str:
    return " UNION ALL ".join(
        f"SELECT '{table}' AS tab, '{name}' AS rule, to_jsonb(t) AS row FROM {table} t"
        f" WHERE ({condition}) IS FALSE"
        for table, name, condition in models.rules()
    )


def _wrong_runs(case: Case) -> list[dict[str, Any]]:
    """Return the runs that were lost: accepted and not there, not over, or over otherwise."""
    rows = {row.id: row for row in case.site.sql.rows("SELECT *, error->>'code' AS code FROM runs")}
    missing = [id for id in case.load.accepted if id not in rows]
    wrong: list[dict[str, Any]] = [{"id": id, "status": "missing"} for id in missing]
    for id, row in rows.items():
        shape = case.load.accepted.get(id)
        # A run whose client got no answer, or a second one, has to end well too.
        wanted = (shape.error, shape.output) if shape else (None, row.output)
        status = "failed" if wanted[0] else "completed"
        if (row.status, row.code, row.output) != (status, *wanted):
            wrong.append({"wanted": wanted, **row._asdict()})
    return wrong


def _complaints(case: Case, fault: Fault, result: Result) -> list[str]:
    """Return what is wrong with the figures, the processes and the load."""
    slow = result.recovery_max()
    repeated, lost = result.calls_repeated, result.attempts_lost
    checks = {
        f"recovery took {slow:g} s": slow >= RECOVERY_LIMIT_SECONDS,
        f"{repeated} calls repeated, but {lost} attempts lost": repeated > lost,
        f"{lost} attempts lost, {repeated} calls repeated: none should be": (
            fault.exact and lost + repeated > 0
        ),
        f"the load broke: {case.load.broke}": case.load.broke is not None,
        f"submissions refused: {Counter(case.load.refused).most_common(3)}": (
            bool(case.load.refused) and not fault.may_refuse
        ),
    }
    return [said for said, is_wrong in checks.items() if is_wrong] + case.site.ended


_STARTS = (
    "SELECT task_id, number, status, started_at FROM attempts WHERE task_id = ANY (%(ids)s::uuid[])"
)
_ENDS = (
    "SELECT id, finished_at FROM tasks WHERE id = ANY (%(ids)s::uuid[]) AND finished_at IS NOT NULL"
)


def _recovery(case: Case) -> list[float]:
    """Return, for each task that a fault hit or held up, the seconds until its next claim."""
    noted = [task for moment in case.moments for task in moment]
    ids = list({task.id for task in noted})
    attempts: dict[str, list[Any]] = {id: [] for id in ids}
    for row in case.site.sql.rows(_STARTS, ids=ids):
        attempts[row.task_id].append(row)
    ends = dict(case.site.sql.rows(_ENDS, ids=ids))
    times = (_recovered(task, attempts[task.id], ends.get(task.id)) for task in noted)
    return [seconds for seconds in times if seconds is not None]


def _recovered(task: Any, attempts: Sequence[Any], ended: Any) -> float | None:
    """Return the seconds from the note to the next claim; None for an attempt nothing happened to.

    What has no attempts, such as an implicit end, has recovered when it is over.
    """
    if any(a.number == task.attempt and a.status == "completed" for a in attempts):
        return None
    first = min((a.started_at for a in attempts if a.number > task.attempt), default=ended)
    return None if first is None else max(0.0, (first - task.at).total_seconds())


def _shown(sentence: str, rows: Sequence[Any]) -> str:
    lines = [str(row._asdict() if hasattr(row, "_asdict") else row) for row in rows[:SHOWN]]
    more = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "\n".join([f"\n== {sentence}", *lines, *more, ""])


def _logs(site: Site) -> str:
    names = sorted(path.stem for path in site.folder.glob("*.log"))
    return "\n".join(f"\n== last lines of {name}\n{site.tail(name)}\n" for name in names)


# --- The report ---------------------------------------------------------------------------------

HEADS = ("fault", "times", "runs", "tasks", "lost", "doubled", "recovery p50", "recovery max")


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.fault,
        *(str(n) for n in (result.times, result.runs, result.tasks, result.lost, result.doubled)),
        f"{result.recovery_p50():.1f} s",
        f"{result.recovery_max():.1f} s",
    )


def table(results: Sequence[Result], markdown: bool) -> str:
    """Return the results as text, or as a table for a README."""
    rows = [HEADS, *map(_row, results)]
    if markdown:
        rule = ("---", *["---:"] * (len(HEADS) - 1))
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def save(results: Sequence[Result], out: Path, partial: bool) -> None:
    """Write the figures; those of some faults only go among what the file has."""
    old = json.loads(out.read_text()) if partial and out.exists() else {}
    new = {result.fault: result.as_json() for result in results}
    out.write_text(json.dumps(old | new, indent=2) + "\n")


def _chosen(only: str) -> list[Fault]:
    names = [name for name in only.split(",") if name] or list(FAULTS)
    if unknown := set(names) - set(FAULTS):
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}; there are {list(FAULTS)}")
    return [FAULTS[name] for name in names]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.chaos", description="Break things, count losses.")
    parser.add_argument("--short", action="store_true", help="fewer runs, leases of 3 s")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, help="the same moments and shapes again")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "chaos.json")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README")
    return parser.parse_args()


def main() -> int:
    """Run the chosen cases, print the table and write the figures; 1 if something does not hold."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave by the same clean-up
    logs.configure("ERROR", "text")  # that its broker is away is no news to this process
    arguments = _arguments()
    faults = _chosen(arguments.only)
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="opscore-chaos-"))
    try:
        results = _run(faults, SHORT if arguments.short else LONG, seed, folder)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        return 130
    print(table(results, arguments.markdown))
    save(results, arguments.out, partial=bool(arguments.only))
    if not _keep_accounts(results, folder):
        shutil.rmtree(folder)
        return 0
    print(f"\nRows and logs of what failed are in {folder}; --seed {seed} does it again.")
    return 1


def _run(faults: Sequence[Fault], form: Form, seed: int, folder: Path) -> list[Result]:
    results = []
    with Arena.open(folder) as arena:
        for fault in faults:
            results.append(run_case(arena, fault, form, seed))
            _tell(results[-1])
    return results


def _keep_accounts(results: Sequence[Result], folder: Path) -> bool:
    """Write down what shows each failure, beside the case's logs; False if there is none."""
    failed = [result for result in results if result.complaints]
    for result in failed:
        (folder / result.fault / "account.txt").write_text(result.account)
    return bool(failed)


def _tell(result: Result) -> None:
    verdict = "FAILED" if result.complaints else "passed"
    seen = ", ".join(f"{name} {value}" for name, value in result.seen.items())
    figures = (
        f"{result.runs} runs, {result.tasks} tasks, {result.attempts_lost} attempts lost,"
        f" {result.republished} canvases published again, recovery"
        f" {result.recovery_p50():.1f}/{result.recovery_max():.1f} s"
    )
    print(f"{verdict} {result.fault} ({result.seconds:.0f} s): {figures}; {seen}", flush=True)
    for complaint in result.complaints:
        print(f"    {complaint}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
