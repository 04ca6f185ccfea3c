"""What the statements share: who is ready, who stands in a line, and for how long."""

from opscore.models import listed
from opscore.states import TASK_ENDED

DEADLINE_GRACE_SECONDS = 5
"""The worker ends an attempt at its timeout; only when it could not does the deadline come."""
RESERVE_SECONDS = 5
"""A freed slot is kept this long for the first in line; then again for whoever is first."""
FIRST_IN_LINE = 32
"""Looked at for an agent's free slots: others may be waking the first of them at this moment."""
LOOK_AGAIN_SECONDS = 30
"""What a task waits for is looked at again after this, should nobody say that it came."""
ENDED = listed(TASK_ENDED)
RUN_OPEN = (  # see `still`
    "(coalesce(r.status) IN ('queued', 'running') AND r.cancel_requested_at IS NULL"
    " AND r.error IS NULL)"
)


def dependencies_over(row: str = "t", *, one_by_one: bool = False) -> str:
    """Return the condition that all dependencies of a row are over; in SQL.

    With `one_by_one` it is never planned as a join, which might read all tasks.
    """
    fence = " OFFSET 0" if one_by_one else ""
    return f"""NOT EXISTS (
    SELECT FROM tasks d WHERE d.id = ANY ({row}.depends_on) AND d.status NOT IN {ENDED}{fence})"""


def still(status: str, row: str = "t") -> str:
    """Return the condition on a row that is known by its id; in SQL.

    Written so that the planner does not think of the partial index on that status: one that is
    almost empty when a statement is prepared looks cheaper than the primary key.
    """
    return f"coalesce({row}.status) = '{status}'"


ITEMS_OVER = f"""NOT EXISTS (
    SELECT FROM tasks c WHERE c.parent_id = t.id AND c.status NOT IN {ENDED})"""
END = ""
"""The definition id of the implicit end; no task of a definition can have it."""
WAKE_AT = """to_char(wake_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
FREE = """s.holder IS NULL AND (s.reserved_until IS NULL OR s.reserved_until < now())"""
MAY_ASK = "({row}.not_before IS NULL OR {row}.not_before <= now())"
"""Whoever an agent itself sent away does not stand in its line until the time it named."""
_HAS_NONE_KEPT = "(w.kept_until IS NULL OR w.kept_until <= now())"
_STANDS = f"w.reason = 'agent_busy' AND {MAY_ASK.format(row='w')} AND {_HAS_NONE_KEPT}"
IN_LINE = f"w.status = 'waiting' AND {_STANDS}"
FOR_AGENT = "w.wanted_agent_id = {agent}"
FOR_CAPABILITY = "w.wanted_agent_id IS NULL AND w.wanted_capability = offered.capability"
"""Of `unnest(capabilities) AS offered (capability)`: a line's index is in order for one of them."""
ORDER = "ORDER BY w.priority DESC, w.waiting_since"


def find_line(many: str) -> str:
    """Return the part of a statement that finds, as `line`, the first `many` who wait for an agent.

    They wait for `:agent_id` itself or for a capability of it. Whoever was woken already
    `is_out`: a visit is on its way, and those behind wait for it. Whether somebody is in line is
    asked once more of the locked row: it may have run, and be waiting for something else.
    """
    return f"""first AS (
    (SELECT w.id, w.priority, w.waiting_since FROM tasks w
     WHERE {FOR_AGENT.format(agent=":agent_id")} AND {IN_LINE}
     {ORDER} LIMIT {FIRST_IN_LINE})
    UNION ALL
    SELECT f.* FROM agents a, unnest(a.capabilities) AS offered (capability), LATERAL (
        SELECT w.id, w.priority, w.waiting_since FROM tasks w
        WHERE {FOR_CAPABILITY} AND {IN_LINE}
        {ORDER} LIMIT {FIRST_IN_LINE}) AS f
    WHERE a.agent_id = :agent_id
), line AS MATERIALIZED (
    SELECT w.id, w.woken_at IS NOT NULL AS is_out, w.message FROM tasks w
    WHERE w.id = ANY (ARRAY(SELECT id FROM first)) AND {still("waiting", "w")} AND {_STANDS}
    {ORDER}, w.id
    LIMIT {many} FOR UPDATE OF w SKIP LOCKED
)"""


KEPT_UNTIL = f"now() + make_interval(secs => {RESERVE_SECONDS})"
KEEP = f"woken_at = coalesce(t.woken_at, now()), kept_until = {KEPT_UNTIL}, wake_at = NULL"
WOKEN = """t.id AS task_id, t.run_id, t.message, t.reason, t.timeout_seconds,
          t.parent_id IS NOT NULL AS is_item, r.generation, r.request_id"""
MINE = f"t.attempt = :attempt AND {still('running')}"


def backoff(base: str, cap: str, exponent: str) -> str:
    """Return seconds to wait in SQL: exponential, capped, with full jitter.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return f"random() * least({cap}, {base} * power(2, least({exponent}, 30)))"
