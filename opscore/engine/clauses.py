"""What the statements share: who is ready, who stands in a line, and for how long."""

from opscore import models
from opscore.config import AGENTS_QUEUE, IO_QUEUE
from opscore.models import listed
from opscore.states import RUN_ENDED, TASK_ENDED, AgentState

DEADLINE_GRACE_SECONDS = 5
"""The worker ends an attempt at its timeout; only when it could not does the deadline come."""
RESERVE_SECONDS = 5
"""A freed slot is kept this long for the first in line; then again for whoever is first."""
FIRST_IN_LINE = 32
"""Looked at for an agent's free slots: others may be waking the first of them at this moment."""
LONGEST_REST_SECONDS = 60
"""An agent that is not there gets no work by its capabilities after each failure, for twice as long
each time, up to this: else it would be free at once, and draw what others could do."""
LEAST_REST_SECONDS = 0.1
"""Whoever said that it is busy is not asked again before this, whatever it named."""
LOOK_AGAIN_SECONDS = 30
"""What a task waits for is looked at again after this, should nobody say that it came."""
BUSY_LOOK_AGAIN_SECONDS = 300
"""So is who stands in a line, whom somebody wakes as soon as there is a slot."""
ENDED = listed(TASK_ENDED)
HELD = "max_concurrent_runs"
"""The reason of a queued run that waits until fewer of its workflow are under way."""
DUE = "start_at"
"""The reason of a queued run that is to begin later."""
RUN_OPEN = (  # see `still`
    "(coalesce(r.status) IN ('queued', 'running') AND r.cancel_requested_at IS NULL"
    " AND r.error IS NULL AND r.reason IS NULL)"
)
"""Tasks of it may start."""
RUN_ALIVE = (
    "(coalesce(r.status) IN ('queued', 'running', 'paused') AND r.cancel_requested_at IS NULL"
    " AND r.error IS NULL)"
)
"""It is not ending: it may be paused, or wait for its turn."""


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


IS_ABROAD = f"{still('waiting')} AND t.reason = 'remote'"
"""An agent behind HTTP has accepted it."""
WAITS = f"({still('pending')} OR {still('waiting')} AND t.reason <> 'remote')"
"""Nobody is at it."""
ATTEMPTED = f"({still('running')} OR {IS_ABROAD})"
"""Its attempt is not over: a worker is at it, or the agent behind HTTP that accepted it."""
ITEMS_OVER = f"""(NOT EXISTS (
    SELECT FROM tasks c WHERE c.parent_id = t.id AND c.status NOT IN {ENDED} OFFSET 0)
    AND NOT EXISTS (
    SELECT FROM runs c WHERE c.id = t.child_run_id AND c.status NOT IN {listed(RUN_ENDED)}
    OFFSET 0))"""
"""So is the run of its sub-workflow."""
SENT_AT = """greatest(r.generation_at, t.created_at, t.woken_at,
    (SELECT max(d.finished_at) FROM tasks d WHERE d.id = ANY (t.depends_on)))"""
"""When the visit of a task that could start was sent, if it was."""
END = ""
"""The definition id of the implicit end; no task of a definition can have it."""
WAKE_AT = """to_char(wake_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
HAS_SURPLUS = """EXISTS (
    SELECT FROM slots x WHERE x.pool = s.pool AND x.closed AND x.holder IS NOT NULL)"""
"""More are at it than the capacity is now: for each of them one free slot stays empty."""
FREE = f"""s.holder IS NULL AND NOT s.closed
    AND (s.reserved_until IS NULL OR s.reserved_until < now())
    AND (NOT {HAS_SURPLUS} OR (
        SELECT count(*) FROM slots x
        WHERE x.pool = s.pool AND NOT x.closed AND x.holder IS NULL AND x.number < s.number
    ) >= (
        SELECT count(*) FROM slots x
        WHERE x.pool = s.pool AND x.closed AND x.holder IS NOT NULL))"""
MAY_ASK = "({row}.not_before IS NULL OR {row}.not_before <= now())"
"""Whoever an agent itself sent away does not stand in its line until the time it named."""
_HAS_NONE_KEPT = "(w.kept_until IS NULL OR w.kept_until <= now())"
_STANDS = f"w.reason IN {models.IN_LINE} AND {MAY_ASK.format(row='w')} AND {_HAS_NONE_KEPT}"
IN_LINE = f"w.status = 'waiting' AND {_STANDS}"
FOR_AGENT = "w.line_agent_id = {agent}"
FOR_CAPABILITY = "w.line_agent_id IS NULL AND w.wanted_capability = offered.capability"
"""Of `unnest(capabilities) AS offered (capability)`: a line's index is in order for one of them."""
ORDER = "ORDER BY w.priority DESC, w.waiting_since"


def rests(agent: str) -> str:
    """Return the condition that an agent gets nothing by its capabilities for a while; in SQL."""
    return f"""EXISTS (
    SELECT FROM slots h WHERE h.pool = {agent}.agent_id AND h.rests_until > now())"""


def free_slots(pool: str, holders: str, over: str) -> str:
    """Return the part of a statement that locks, as `free`, the slots whose holder is over; in SQL.

    Who finds one locked leaves it to whoever is giving it away at this moment. `room` says how many
    `places` there are to be given.
    """
    is_over = f"""(s.holder IS NULL OR EXISTS (
        SELECT FROM {holders} h WHERE h.id = s.holder AND h.status IN {over} OFFSET 0))"""
    return f"""free AS MATERIALIZED (
    SELECT s.pool, s.number, s.closed FROM slots s
    WHERE s.pool = {pool} AND {is_over} FOR UPDATE OF s SKIP LOCKED
), room AS (
    SELECT greatest(0, (SELECT count(*) FROM free WHERE NOT closed) - (
        SELECT count(*) FROM slots s
        WHERE s.pool = {pool} AND s.closed AND NOT {is_over})) AS places
)"""


PLACES = "(SELECT places FROM room)"
HAND_ON = """held AS (
    UPDATE slots s SET holder = line.id
    FROM (SELECT *, row_number() OVER (PARTITION BY closed) AS n FROM free) AS free
         LEFT JOIN (SELECT id, row_number() OVER () AS n FROM line) AS line
         ON line.n = free.n AND NOT free.closed
    WHERE s.pool = free.pool AND s.number = free.number
)"""
"""The free slots go to those in `line`, who are no more than `PLACES`."""


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
    WHERE a.agent_id = :agent_id AND NOT {rests("a")}
), line AS MATERIALIZED (
    SELECT w.id, w.woken_at IS NOT NULL AS is_out, w.message FROM tasks w
    WHERE w.id = ANY (ARRAY(SELECT id FROM first)) AND {still("waiting", "w")} AND {_STANDS}
    {ORDER}, w.id
    LIMIT {many} FOR UPDATE OF w SKIP LOCKED
)"""


KEPT_UNTIL = f"now() + make_interval(secs => {RESERVE_SECONDS})"
KEEP = f"woken_at = coalesce(t.woken_at, now()), kept_until = {KEPT_UNTIL}, wake_at = NULL"


def woken(queue: str = "t.queue") -> str:
    """Return the columns of a `Woken`, for `queue` an expression; in SQL."""
    return f"""t.id AS task_id, t.run_id, t.message, t.reason, t.timeout_seconds,
          {queue} AS queue, t.parent_id IS NOT NULL AS is_item, r.generation, r.request_id"""


WOKEN = woken()


def woken_for(agent: str) -> str:
    """Return the same for tasks that a slot of this agent is kept for: its workers visit them."""
    return woken(f"""CASE (SELECT kind FROM agents WHERE agent_id = {agent})
              WHEN 'remote' THEN '{IO_QUEUE}' ELSE '{AGENTS_QUEUE}' END""")


MINE = f"t.attempt = :attempt AND {ATTEMPTED}"
_FREE_STATES = listed((AgentState.IDLE, AgentState.FINISHED))


def is_open(row: str = "a") -> str:
    """Return the condition that an agent is available, at once or in time; in SQL.

    An `error` that was reported of an attempt of ours lapses with it.
    """
    return f"""(NOT {row}.closed
    AND ({row}.heartbeat_seconds IS NULL
         OR {row}.seen_at > now() - make_interval(secs => {row}.heartbeat_seconds))
    AND ({row}.kind <> 'remote' OR {row}.state <> '{AgentState.ERROR}'
         OR {row}.state_lapses AND NOT EXISTS (
             SELECT FROM slots h WHERE h.pool = {row}.agent_id AND h.holder IS NOT NULL)))"""


def is_ready(row: str = "a") -> str:
    """Return the condition that an open agent takes work now, if it has a free slot; in SQL.

    What an agent behind HTTP said while it was at an attempt of ours told of that; slots count it.
    """
    return f"""({says_it_is_free(row)}
    AND ({row}.kind <> 'remote' OR {row}.busy_until IS NULL OR {row}.busy_until <= now()))"""


def says_it_is_free(row: str = "a") -> str:
    """Return the condition that nothing an agent said keeps work from it; in SQL."""
    return f"({row}.kind <> 'remote' OR {row}.state IN {_FREE_STATES} OR {row}.state_lapses)"


def backoff(base: str, cap: str, exponent: str) -> str:
    """Return seconds to wait in SQL: exponential, capped, with full jitter.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return f"random() * least({cap}, {base} * power(2, least({exponent}, 30)))"
