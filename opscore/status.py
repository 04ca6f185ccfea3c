"""What the whole installation is at: who works, what waits and for how long, what is the matter.

Reads what is open by the indexes of what is open, and never looks at what is over: it costs the
same after a million runs. Nothing is changed, and nobody is asked who may not answer.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import TextClause, text

from opscore import migrations, presence, problems, stuck
from opscore.config import QUEUES
from opscore.db import Tx
from opscore.dispatch import Depth
from opscore.engine.clauses import is_open, says_it_is_free
from opscore.models import IN_LINE, listed
from opscore.presence import KEEPER_LEASE_SECONDS
from opscore.states import RUN_ENDED, AgentState

STATEMENT_SECONDS = 3
"""More than any of these takes; one that does is given up on, and so is the whole answer."""
LINES_SHOWN = 10
MOST_LINES = 100
"""Lines looked at that nobody serves, beside the longest."""
APPROVALS_SHOWN = 20
LATE_SCHEDULE_SECONDS = 5
"""Beat looks every second."""
BROKER_ERROR = "Redis does not answer."

Row = dict[str, Any]

_SINCE = "coalesce(waiting_since, started_at, created_at)"
_IN_LINE = f"status = 'waiting' AND reason IN {IN_LINE}"
_ELSEWHERE = f"status = 'waiting' AND reason NOT IN {IN_LINE}"


def _age(since: str) -> str:
    return f"cast(extract(epoch FROM now() - {since}) AS float)"


_BEGIN = (
    text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"),
    text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"),
)
_WAITING = text(
    " UNION ALL ".join(
        f"""
SELECT reason, count(*) AS count, {_age(f"min({_SINCE})")} AS oldest_seconds,
       min(wake_at) AS next_wake_at
FROM tasks WHERE {condition} GROUP BY reason"""
        for condition in (_IN_LINE, _ELSEWHERE)
    )
)
_RUNS = text(
    f"""
SELECT open.status, open.reason, open.count, {_age("open.since")} AS oldest_seconds,
       oldest.id AS oldest_run_id
FROM (SELECT status, reason, count(*) AS count, min(created_at) AS since FROM runs
      WHERE NOT status IN {listed(RUN_ENDED)} GROUP BY status, reason) AS open
CROSS JOIN LATERAL (
    SELECT r.id FROM runs r WHERE r.created_at = open.since AND r.status = open.status
    AND r.reason IS NOT DISTINCT FROM open.reason ORDER BY r.id LIMIT 1) AS oldest
ORDER BY open.status, open.reason
"""
)
_APPROVALS = text(
    f"""
SELECT t.id AS task_id, t.run_id, t.definition_id AS task_definition_id, t.index,
       (SELECT r.workflow_id FROM runs r WHERE r.id = t.run_id) AS workflow_id,
       coalesce((SELECT a.started_at FROM attempts a
                 WHERE a.task_id = t.id AND a.number = t.attempt), {_SINCE}) AS since
FROM (SELECT * FROM tasks
      WHERE {_ELSEWHERE} AND reason = 'approval' AND decision IS NULL
      ORDER BY {_SINCE}, id LIMIT {APPROVALS_SHOWN}) AS t
ORDER BY since, t.id
"""
)
_FLEET = f"""
fleet AS MATERIALIZED (
    SELECT a.agent_id, a.capabilities, a.state_now AS state, CASE
        WHEN a.paused THEN 'paused' WHEN a.draining THEN 'draining'
        WHEN NOT a.is_open AND a.heartbeat_seconds IS NOT NULL
             AND a.seen_at <= now() - make_interval(secs => a.heartbeat_seconds) THEN 'silent'
        WHEN NOT a.is_open THEN 'error' END AS unavailable,
        NOT a.says_it_is_free AND NOT EXISTS (
            SELECT FROM slots h WHERE h.pool = a.agent_id AND h.holder IS NOT NULL
        ) AS says_it_is_not_free
    FROM (SELECT a.*, {is_open()} AS is_open, {says_it_is_free()} AS says_it_is_free,
                 CASE WHEN a.kind = 'remote' THEN a.state
                      WHEN a.agent_id IN (
                          SELECT agent_id FROM tasks WHERE lease_expires_at IS NOT NULL
                      ) THEN 'active' ELSE 'idle' END AS state_now
          FROM agents a WHERE a.deregistered_at IS NULL OFFSET 0) AS a
)"""
"""The agents that are there: what each says it is, and why it gets nothing, if it does not."""
_AGENTS = text(
    f"""
WITH {_FLEET}
SELECT state, unavailable, count(*) AS count FROM fleet GROUP BY state, unavailable
"""
)
_SLOTS = text(
    """
SELECT cast(coalesce(sum(held), 0) AS int) AS held,
       cast(coalesce(sum(number), 0) AS int) AS total
FROM agents a CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE s.lease_expires_at > now()) AS held,
           count(*) FILTER (WHERE NOT s.closed) AS number
    FROM slots s WHERE s.pool = a.agent_id OFFSET 0) AS s
WHERE a.deregistered_at IS NULL
"""
)
_LINES = text(
    f"""
WITH {_FLEET}, served AS (
    SELECT agent_id AS agent, '' AS capability, state, coalesce(unavailable,
           CASE WHEN says_it_is_not_free THEN 'not_ready' END) AS why
    FROM fleet
    UNION ALL
    SELECT '', offered.capability, NULL, CASE
           WHEN NOT bool_or(unavailable IS NULL) THEN 'none_available'
           WHEN bool_and(unavailable IS NOT NULL OR says_it_is_not_free) THEN 'none_ready' END
    FROM fleet, unnest(capabilities) AS offered (capability) GROUP BY offered.capability
), lines AS MATERIALIZED (
    SELECT line_agent_id AS agent, '' AS capability, count(*) AS waiting,
           coalesce(min(waiting_since), now()) AS since
    FROM tasks WHERE {_IN_LINE} AND line_agent_id IS NOT NULL GROUP BY line_agent_id
    UNION ALL
    SELECT '', wanted_capability, count(*), coalesce(min(waiting_since), now())
    FROM tasks WHERE {_IN_LINE} AND line_agent_id IS NULL GROUP BY wanted_capability
), told AS (
    SELECT l.*, s.state, CASE WHEN s.agent IS NOT NULL THEN s.why
                              WHEN l.agent <> '' THEN 'unknown' ELSE 'nobody' END AS why,
           row_number() OVER (ORDER BY l.waiting DESC, l.since, l.agent, l.capability) AS place
    FROM lines l LEFT JOIN served s USING (agent, capability)
)
SELECT nullif(told.agent, '') AS agent_id, nullif(told.capability, '') AS agent_capability,
       told.waiting, {_age("told.since")} AS oldest_seconds, told.state, told.why, told.place,
       told.since, first.*
FROM (SELECT * FROM told WHERE place <= {LINES_SHOWN} OR why IS NOT NULL
      ORDER BY place LIMIT {MOST_LINES}) AS told
LEFT JOIN LATERAL (
    (SELECT id AS task_id, run_id, definition_id AS task_definition_id, index FROM tasks
     WHERE {_IN_LINE} AND line_agent_id = told.agent AND waiting_since = told.since LIMIT 1)
    UNION ALL
    (SELECT id, run_id, definition_id, index FROM tasks
     WHERE {_IN_LINE} AND line_agent_id IS NULL AND wanted_capability = told.capability
       AND waiting_since = told.since LIMIT 1)
    LIMIT 1) AS first ON true
ORDER BY place
"""
)
"""A line is an agent's, or that of all with a capability."""
_KEEPER = text(
    f"""
SELECT holder, expires_at - make_interval(secs => {KEEPER_LEASE_SECONDS}) AS renewed_at,
       greatest(0, {_age("expires_at")}) AS late_seconds
FROM leases WHERE name = 'keeper'
"""
)
_SCHEDULES = text(
    f"""
SELECT count(*) AS enabled, count(*) FILTER (WHERE next_at <= now()) AS due,
       count(*) FILTER (WHERE {_age("next_at")} > {LATE_SCHEDULE_SECONDS}) AS late,
       greatest(0, {_age("min(next_at)")}) AS worst_lag_seconds
FROM schedules WHERE enabled
"""
)
_CLOCK = text("SELECT cast(extract(epoch FROM clock_timestamp()) AS float)")


def read(tx: Tx, depths: Mapping[str, Depth] | None, is_full: bool = False) -> Row:
    """Return the status of everything; `depths` are those of the queues, None if Redis is away.

    `is_full` tells that Redis has no room for more messages. `tx` is a transaction in which nothing
    was done yet; all is as of one moment.
    """
    for statement in _BEGIN:
        tx.execute(statement)
    database = _database(tx)
    found: Row = {
        "database": database,
        "broker_error": BROKER_ERROR if depths is None else None,
        "broker_is_full": is_full,
    }
    found |= _nothing() if database["is_behind"] else _parts(tx, depths or {})
    found["queues"] = _queues(found["workers"], depths or {})
    lines = found["fleet"]["lines"]
    shown = [{**line, "unserved_because": problems.why(line)} for line in lines[:LINES_SHOWN]]
    return {**found, "problems": problems.find(found), "fleet": {**found["fleet"], "lines": shown}}


def _rows(tx: Tx, statement: TextClause) -> list[Row]:
    return [row._asdict() for row in tx.execute(statement)]


def _database(tx: Tx) -> Row:
    revision, newest = migrations.present(tx), migrations.NEWEST
    before = time.time()
    theirs = tx.execute(_CLOCK).scalar_one()
    ours = (before + time.time()) / 2
    return {
        "revision": revision,
        "newest_revision": newest,
        "is_behind": migrations.is_behind(revision),
        "clock_skew_seconds": round(theirs - ours, 3),
    }


def _parts(tx: Tx, depths: Mapping[str, Depth]) -> Row:
    workers = presence.live(tx)
    lines = _rows(tx, _LINES)
    emptied = {
        queue
        for worker in workers
        for queue in worker["queues"]
        if queue in depths and not depths[queue].ready
    }
    return {
        "workers": workers,
        "fleet": {**_agents(tx), "slots": _rows(tx, _SLOTS)[0], "lines": lines},
        "waiting": _rows(tx, _WAITING),
        "runs": _rows(tx, _RUNS),
        "approvals": _rows(tx, _APPROVALS),
        "stuck": stuck.find(tx, lines, emptied),
        "keeper": next(iter(_rows(tx, _KEEPER)), NO_KEEPER),
        "schedules": _rows(tx, _SCHEDULES)[0],
    }


NO_KEEPER: Row = {"holder": None, "renewed_at": None, "late_seconds": None}
NO_AGENTS: Row = {
    "agents": dict.fromkeys(("total", "available", "paused", "draining", "silent", "error"), 0),
    "states": dict.fromkeys(map(str, AgentState), 0),
}


def _nothing() -> Row:
    """Return the parts of a database whose tables may not be there."""
    lists = ("workers", "waiting", "runs", "approvals", "stuck")
    counts = ("enabled", "due", "late", "worst_lag_seconds")
    return {
        **{name: [] for name in lists},
        "fleet": {**NO_AGENTS, "slots": {"held": 0, "total": 0}, "lines": []},
        "keeper": NO_KEEPER,
        "schedules": dict.fromkeys(counts, 0),
    }


def _agents(tx: Tx) -> Row:
    """Count the agents by why they get nothing, if they do not, and by what they say they are."""
    agents, states = dict(NO_AGENTS["agents"]), dict(NO_AGENTS["states"])
    for row in _rows(tx, _AGENTS):
        agents["total"] += row["count"]
        agents[row["unavailable"] or "available"] += row["count"]
        states[row["state"]] += row["count"]
    return {"agents": agents, "states": states}


def _queues(workers: Iterable[Row], depths: Mapping[str, Depth]) -> list[Row]:
    takers = Counter(queue for worker in workers for queue in worker["queues"])
    return [
        {
            "name": name,
            "ready": depths[name].ready if depths else None,
            "unacked": depths[name].taken if depths else None,
            "workers": takers[name],
        }
        for name in QUEUES
    ]
