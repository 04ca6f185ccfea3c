"""Which runs are stuck: nothing of them moves by itself any more, or something is long overdue.

What that means exactly `find` says. It looks at what is open by the indexes of what is open, at so
many that it is quick, and at those that wait longest.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import TextClause, text

from opscore.db import Tx
from opscore.engine.clauses import DUE, ENDED, HELD, RUN_ALIVE, RUN_OPEN, SENT_AT, dependencies_over
from opscore.models import IN_LINE, listed
from opscore.problems import LONG_SECONDS, is_deserted, way_out, why
from opscore.queries import duration
from opscore.slots import RUNS
from opscore.states import RUN_ENDED, Reason

SHOWN = 20
"""Of all that is stuck, and of each kind."""
LATE_SECONDS = 60
"""The keeper looks every second, and is replaced in five."""
CANDIDATES = 500
"""Tasks or runs that are looked at one by one: those that wait longest."""
OF_EACH = 100
"""Tasks of one run that are looked at for a lost visit; and runs that are ending."""
OF_ALL = 10 * CANDIDATES
"""So for all runs."""

_LATE = f"now() - make_interval(secs => {LATE_SECONDS})"
_LONG_AGO = f"now() - make_interval(secs => {LONG_SECONDS})"
_OPEN = f"NOT r.status IN {listed(RUN_ENDED)}"
"""As the partial indexes have it."""
_TASK = "t.run_id, t.id AS task_id, t.definition_id AS task_definition_id, t.index"
_RUN = "r.id AS run_id, NULL::uuid AS task_id, NULL AS task_definition_id, NULL::int AS index"
_WOKEN_BY_US = listed(
    (Reason.DEPENDENCIES, Reason.CHILDREN, Reason.PAUSED, Reason.RETRY, Reason.DELAY)
)
"""The others wait for somebody to approve, an agent behind HTTP, or an item before them."""
_OF_TASK = "CROSS JOIN LATERAL (SELECT * FROM runs WHERE id = t.run_id OFFSET 0) AS r"


def _aged(statement: str) -> TextClause:
    seconds = "cast(extract(epoch FROM now() - since) AS float) AS seconds"
    return text(f"SELECT found.*, {seconds} FROM ({statement}) AS found")


_UPKEEP = _aged(
    f"""
(SELECT 'wake' AS what, {_TASK}, t.wake_at AS since FROM tasks t
 WHERE t.status = 'waiting' AND t.wake_at IS NOT NULL AND t.wake_at < {_LATE}
 ORDER BY t.wake_at LIMIT {SHOWN})
UNION ALL
(SELECT 'lease', {_TASK}, t.lease_expires_at FROM tasks t
 WHERE t.lease_expires_at < {_LATE} ORDER BY t.lease_expires_at LIMIT {SHOWN})
UNION ALL
(SELECT 'start', {_RUN}, r.start_at FROM runs r
 WHERE r.status = 'queued' AND r.reason = '{DUE}' AND r.start_at < {_LATE}
 ORDER BY r.start_at LIMIT {SHOWN})
UNION ALL
(SELECT 'deadline', {_RUN}, r.deadline_at FROM runs r
 WHERE r.deadline_at < {_LATE} AND {_OPEN} AND {RUN_ALIVE}
 ORDER BY r.deadline_at LIMIT {SHOWN})
UNION ALL
(SELECT 'end', {_RUN}, last.at
 FROM (SELECT * FROM runs r
       WHERE {_OPEN} AND (r.error IS NOT NULL OR r.cancel_requested_at IS NOT NULL)
       LIMIT {OF_EACH}) AS r
 CROSS JOIN LATERAL (
    SELECT max(t.finished_at) AS at, bool_and(t.status IN {ENDED}) AS is_over
    FROM tasks t WHERE t.run_id = r.id OFFSET 0) AS last
 WHERE last.is_over AND last.at < {_LATE}
 LIMIT {SHOWN})
"""
)
_NOBODY = _aged(
    f"""
WITH held AS MATERIALIZED (
    SELECT t.id, t.run_id, t.definition_id, t.index, t.reason, t.depends_on, t.child_run_id,
           t.started_at, t.created_at
    FROM tasks t
    WHERE t.status = 'waiting' AND t.reason NOT IN {IN_LINE} AND t.reason IN {_WOKEN_BY_US}
      AND t.wake_at IS NULL AND t.woken_at IS NULL
    ORDER BY t.id LIMIT {CANDIDATES}
)
SELECT t.reason AS what, {_TASK}, came.since FROM held t {_OF_TASK}
CROSS JOIN LATERAL (SELECT CASE t.reason
    WHEN 'dependencies' THEN (SELECT max(d.finished_at) FROM tasks d WHERE d.id = ANY (t.depends_on)
                              HAVING bool_and(d.status IN {ENDED}))
    WHEN 'children' THEN greatest(
        (SELECT max(c.finished_at) FROM tasks c WHERE c.parent_id = t.id),
        (SELECT c.finished_at FROM runs c WHERE c.id = t.child_run_id))
    WHEN 'paused' THEN r.generation_at
    ELSE coalesce(t.started_at, t.created_at) END AS since OFFSET 0) AS came
WHERE {RUN_OPEN} AND came.since < {_LATE}
  AND (t.reason <> 'children' OR NOT EXISTS (
      SELECT FROM tasks c WHERE c.parent_id = t.id AND c.status NOT IN {ENDED}
      AND c.reason IS DISTINCT FROM 'max_parallel' OFFSET 0) AND NOT EXISTS (
      SELECT FROM runs c WHERE c.id = t.child_run_id AND c.finished_at IS NULL OFFSET 0))
LIMIT {SHOWN}
"""
)
_VISITS = _aged(
    f"""
WITH published AS MATERIALIZED (
    SELECT r.id, r.generation_at FROM runs r
    WHERE {_OPEN} AND r.generation_at < {_LONG_AGO} AND {RUN_OPEN}
    ORDER BY r.generation_at LIMIT {CANDIDATES}
), pending AS MATERIALIZED (
    SELECT r.generation_at, t.* FROM published r CROSS JOIN LATERAL (
        SELECT t.id, t.run_id, t.definition_id, t.index, t.queue, t.created_at, t.woken_at,
               t.depends_on
        FROM tasks t WHERE t.run_id = r.id AND t.status = 'pending' LIMIT {OF_EACH}) AS t
    LIMIT {OF_ALL}
), ready AS MATERIALIZED (
    -- Most stand behind another of them, as `engine.unvisited_runs` has it.
    SELECT * FROM pending t
    WHERE t.queue = ANY (:queues)
      AND NOT EXISTS (SELECT FROM unnest(t.depends_on) AS d (id)
                      WHERE (d.id IN (SELECT id FROM pending)) IS NOT FALSE)
      AND {dependencies_over(one_by_one=True)}
)
(SELECT t.queue AS what, {_TASK}, sent.at AS since FROM ready t
 CROSS JOIN LATERAL (SELECT t.generation_at) AS r
 CROSS JOIN LATERAL (SELECT {SENT_AT} AS at OFFSET 0) AS sent
 WHERE sent.at < {_LONG_AGO}
 ORDER BY sent.at LIMIT {SHOWN})
UNION ALL
(SELECT t.queue, {_TASK}, t.woken_at FROM tasks t {_OF_TASK}
 WHERE t.status = 'waiting' AND t.woken_at IS NOT NULL AND t.woken_at < {_LONG_AGO}
   AND t.queue = ANY (:queues) AND {RUN_OPEN}
 ORDER BY t.woken_at LIMIT {SHOWN})
"""
)
_TURNS = _aged(
    f"""
SELECT held.workflow_id AS what, {_RUN}, greatest(r.created_at, r.generation_at) AS since,
       before.paused
FROM (SELECT DISTINCT workflow_id FROM runs
      WHERE status = 'queued' AND reason = '{HELD}') AS held
CROSS JOIN LATERAL (
    SELECT * FROM runs w
    WHERE w.workflow_id = held.workflow_id AND w.status = 'queued' AND w.reason = '{HELD}'
      AND w.cancel_requested_at IS NULL
    ORDER BY w.priority DESC, w.created_at, w.id LIMIT 1) AS r
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE h.status = 'paused') AS paused,
           count(*) FILTER (WHERE h.status IN ('queued', 'running')) AS moving,
           max(h.finished_at) AS over_at
    FROM slots s CROSS JOIN LATERAL (SELECT * FROM runs WHERE id = s.holder OFFSET 0) AS h
    WHERE s.pool = '{RUNS}' || held.workflow_id) AS before
WHERE before.moving = 0 AND greatest(r.created_at, r.generation_at) < {_LONG_AGO}
  AND coalesce(before.over_at < {_LATE}, true)
LIMIT {SHOWN}
"""
)

Row = Mapping[str, Any]

_LATE_WORDS: Mapping[str, str] = {
    "wake": "It was to be looked at again {ago} ago, and nobody did",
    "lease": "Whoever had it went silent {ago} ago, and nobody took it back",
    "start": "It was to begin {ago} ago, and nobody let it",
    "deadline": "Its deadline was {ago} ago, and nobody ended it",
    "end": "The last of it was over {ago} ago, and nobody ended it",
}
_ASK_KEEPER = (
    "The keeper does this, in one of the workers, and what needs messages only while Redis answers:"
    " see `keeper` and `queues`, start a worker (`opscore worker`), and look for `keeper` in the"
    " workers' logs."
)
_WAKE_WORDS: Mapping[str, str] = {
    "dependencies": "All that it depends on is over, for {ago}, and nobody woke it",
    "children": "All that it waited for is over, for {ago}, and nobody woke it",
    "paused": "It is held up for a pause of its run that ended {ago} ago",
}
_NO_MOMENT = "It waits ({what}), and there is no moment at which anybody looks at it again"
_PUBLISH_AGAIN = (
    "`opscore run pause {run_id}`, then `opscore run resume {run_id}`: that publishes again what is"
    " left of it."
)
_BEGIN_ANEW = "`opscore run cancel {run_id}`, then `opscore run rerun {run_id}`: it cannot go on."


def find(tx: Tx, lines: Iterable[Row], emptied: Collection[str]) -> list[dict[str, Any]]:
    """Return what is stuck, at most `SHOWN` and oldest first.

    A run that is not over, and that nobody paused, is stuck if

    - `upkeep_late`: what the keeper should have done for it is a minute late: a task's wake, the
      end of a silent worker's lease, its start, its deadline, its end;
    - `nobody_wakes`: a task of it waits, without a moment to look again, for what is over;
    - `visit_lost`: a visit was sent ten minutes ago, workers take from its queue and have emptied
      it, and nobody claimed the task;
    - `nobody_serves`: a task of it has stood for ten minutes in a line from which no agent takes;
    - `turn_blocked`: it has waited for ten minutes for its turn, and all before it are paused or
      over.

    A long queue, a busy agent, an approval nobody gave and a retry to come are no such thing.

    Each is `{code, run_id, task_id, task_definition_id, index, since, sentence, hint}`; without a
    task it is the run itself. `lines` are those of `status`, `emptied` the queues from which
    workers take and that have no message.
    """
    found = [_upkeep_late(row) for row in _rows(tx, _UPKEEP)]
    found += [_nobody_wakes(row) for row in _rows(tx, _NOBODY)]
    if emptied:
        found += [_visit_lost(row) for row in _rows(tx, _VISITS, queues=list(emptied))]
    found += [_turn_blocked(row) for row in _rows(tx, _TURNS)]
    found += [_nobody_serves(line) for line in lines if is_deserted(line)]
    return sorted(found, key=lambda one: one["since"])[:SHOWN]


def _rows(tx: Tx, statement: Any, **parameters: Any) -> list[dict[str, Any]]:
    return [row._asdict() for row in tx.execute(statement, parameters)]


def _told(code: str, row: Row, sentence: str, hint: str) -> dict[str, Any]:
    told = {"what": row["what"], "ago": duration(row["seconds"]), "run_id": row["run_id"]}
    words = {"sentence": sentence.format(**told) + ".", "hint": hint.format(**told)}
    return {"code": code, **{name: row[name] for name in _PLACE}, **words}


_PLACE = ("run_id", "task_id", "task_definition_id", "index", "since")


def _upkeep_late(row: Row) -> dict[str, Any]:
    return _told("upkeep_late", row, _LATE_WORDS[row["what"]], _ASK_KEEPER)


def _nobody_wakes(row: Row) -> dict[str, Any]:
    sentence = _WAKE_WORDS.get(row["what"], _NO_MOMENT)
    way = _BEGIN_ANEW if row["what"] == Reason.DELAY else _PUBLISH_AGAIN
    return _told("nobody_wakes", row, sentence, way)


def _visit_lost(row: Row) -> dict[str, Any]:
    sentence = (
        "Its visit was sent {ago} ago, nothing is left in the queue {what}, and nobody claimed it"
    )
    return _told("visit_lost", row, sentence, _PUBLISH_AGAIN)


def _turn_blocked(row: Row) -> dict[str, Any]:
    if row["paused"]:
        sentence = f"It waits for its turn, and {row['paused']} before it are paused"
        hint = "Resume or cancel them: `opscore run list --workflow {what} --status paused`."
        return _told("turn_blocked", row, sentence, hint)
    sentence = "It waits for its turn, and no run of {what} is under way"
    return _told("turn_blocked", row, sentence, _ASK_KEEPER)


def _nobody_serves(line: Row) -> dict[str, Any]:
    others = line["waiting"] - 1
    along = f", with {others} other{'s' if others > 1 else ''}" if others else ""
    sentence = f"It has stood in line for {duration(line['oldest_seconds'])}{along}: {why(line)}."
    place = {name: line[name] for name in _PLACE}
    return {"code": "nobody_serves", **place, "sentence": sentence, "hint": way_out(line)}
