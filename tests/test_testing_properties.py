"""`opscore.testing` held against the engine: both play the same workflow with the same agents, and
must say the same of every task.

The other side is the real one: the engine's statements, and the code of workers and keeper, on
PostgreSQL. Only its clock is ours: in this database `now()` is a row, and `random()` is 1, so that
a day is over at once and every backoff is known. A worker is a thread that stops while its agent
is at work, until that clock has come so far; and nobody reads messages: what could move is visited.

`make test` plays the same hundred and twenty workflows every time. For more, with another seed:

    OPSCORE_PROPERTY_EXAMPLES=5000 OPSCORE_PROPERTY_SEED=7 \\
        .venv/bin/python -m pytest -s tests/test_testing_properties.py
"""

import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import Ignore, Retry
from redis import Redis
from sqlalchemy import text
from stack import Servers, new_redis_url, stack_environment

from celeryconfig import make_app
from opscore import AgentBusy, GiveUp, RetryLater, agents, engine, workflows
from opscore.agentkit import FunctionAgent
from opscore.agentkit.calling import AttemptTimedOut
from opscore.canvas import WAKES_HEADER
from opscore.config import AGENTS_QUEUE, FIRST, Settings
from opscore.db import Database
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.engine import DEADLINE_GRACE_SECONDS
from opscore.errors import ApprovalRefused
from opscore.testing import Run, after, approve, fake, reject, simulate
from workers.keeper import Round
from workers.leases import Leases
from workers.trips import Events, Patience, TaskFailed

EXAMPLES = int(os.environ.get("OPSCORE_PROPERTY_EXAMPLES", "120"))
SEED = int(os.environ.get("OPSCORE_PROPERTY_SEED", "1"))
SEEN: Counter[str] = Counter()
"""What came up, over all examples."""
EXPECTED = {
    *("run completed", "run failed", "run cancelled", "task skipped when"),
    *("task skipped upstream_skipped", "task cancelled upstream_failed"),
    *("task cancelled run_cancelled", "task cancelled deadline_exceeded", "deadline_exceeded"),
    *("agent_error", "gave_up", "retry_later", "timeout", "invalid_output", "output_too_large"),
    *("agent_busy_timeout", "agent_unavailable", "expression_error", "rejected"),
    *("child_failed", "invalid_input", "item_failed", "items_failed"),
}
"""What must come up, or the workflows have become too tame."""
MOST_MOMENTS = 3_000

CLOCK = """
CREATE SCHEMA virtual;
CREATE TABLE virtual.clock AS SELECT pg_catalog.now() AS at;
CREATE FUNCTION virtual.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT at FROM virtual.clock';
CREATE FUNCTION virtual.random() RETURNS float8 LANGUAGE sql AS 'SELECT 1::float8';
DO $$ DECLARE r record; BEGIN
    FOR r IN SELECT table_name, column_name FROM information_schema.columns
             WHERE table_schema = 'public' AND column_default = 'now()' LOOP
        EXECUTE format('ALTER TABLE %I ALTER %I SET DEFAULT virtual.now()',
                       r.table_name, r.column_name);
    END LOOP;
END $$;
"""
READY = text(
    """
SELECT t.id, r.generation, t.status, t.reason, t.attempt, t.woken_at FROM tasks t
JOIN runs r ON r.id = t.run_id
WHERE r.status IN ('queued', 'running') AND r.cancel_requested_at IS NULL AND r.error IS NULL
  AND r.reason IS NULL AND (t.status = 'waiting' AND t.woken_at IS NOT NULL
    OR t.status = 'pending' AND NOT EXISTS (
        SELECT FROM tasks d WHERE d.id = ANY (t.depends_on)
        AND d.status NOT IN ('completed', 'failed', 'cancelled', 'skipped')))
ORDER BY (t.reason LIKE 'agent%') IS TRUE DESC, r.id, t.position, t.index NULLS FIRST
"""
)
"""Who was woken for a slot is served first, as in a queue."""
NEXT = text(
    """
SELECT least(
    (SELECT min(t.wake_at) FROM tasks t WHERE t.status = 'waiting'),
    (SELECT min(r.deadline_at) FROM runs r
     WHERE r.status IN ('queued', 'running') AND r.cancel_requested_at IS NULL
       AND r.error IS NULL)) AS moment
"""
)
ASKED = "SELECT id, definition_id FROM tasks WHERE status = 'waiting' AND reason = 'approval'"
CLEAR = [
    "DELETE FROM runs",
    "DELETE FROM events",
    "UPDATE slots SET holder = NULL, attempt = NULL, lease_expires_at = NULL, reserved_for = NULL,"
    " reserved_until = NULL, held_at = NULL, freed_at = NULL, average_seconds = NULL",
]
RESTED = """
UPDATE slots s SET freed_at = now() - interval '1 h' * (100 - a.n)
FROM (SELECT agent_id, row_number() OVER (ORDER BY agent_id) AS n FROM agents) a
WHERE s.pool = a.agent_id
"""


# --- The agents

Step = tuple[float, Any]
"""How long it takes, and what comes of it: an output, or what is raised."""
Script = Callable[[dict[str, Any], int], Step]
"""Of the parameters, and the attempt."""

AGENTS: dict[str, dict[str, Any]] = {
    "free": {},
    "single": {"capacity": 1},
    "pair": {"capacity": 2},
    "cook": {"capacity": 1, "capabilities": ("cooking",)},
    "chef": {"capacity": 2, "capabilities": ("cooking",)},
    "maid": {"capabilities": ("cleaning",)},
    "gone": {"away": True},
    "gone-too": {"away": True},
}


@dataclass
class Case:
    """A workflow, the workflows below it, and what its agents and approvals do."""

    document: dict[str, Any]
    children: dict[str, dict[str, Any]]
    input: Any
    script: Script
    decisions: dict[str, tuple[float, bool]]
    agent_id: str | None
    start: datetime


# --- The engine, on its own clock


class Visitor(threading.Thread):
    """A worker at one visit: it runs while `go_on` waits, and stops while its agent works."""

    def __init__(self, visit: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._visit = visit
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.until: datetime | None = None
        """When its agent is done; None: it is not at one."""
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        self._may_run.acquire()
        try:
            self._visit()
        except BaseException as error:
            self.error = error
        self.until = None
        self._has_stopped.release()

    def go_on(self) -> None:
        self._may_run.release()
        assert self._has_stopped.acquire(timeout=30)
        if self.error is not None:
            raise self.error

    def work_until(self, moment: datetime) -> None:
        self.until = moment
        self._has_stopped.release()
        self._may_run.acquire()


class Engine:
    """The servers, and all that runs on them."""

    def __init__(self, database: Database, redis: Any, keeper: Round) -> None:
        self.database, self.redis, self.keeper = database, redis, keeper
        self.run_task: Any = None
        self.script: Script
        self.now = datetime.now(UTC)

    def rows(self, statement: Any, **parameters: Any) -> list[Any]:
        statement = text(statement) if isinstance(statement, str) else statement
        with self.database.autocommit() as tx:
            return list(tx.execute(statement, parameters))

    def change(self, *statements: str, **parameters: Any) -> None:
        with self.database.transaction() as tx:
            for statement in statements:
                tx.execute(text(statement), parameters)

    def set_clock(self, moment: datetime) -> None:
        self.now = moment
        self.change("UPDATE virtual.clock SET at = :at", at=moment)

    def agent(self, parameters: dict[str, Any], context: Any) -> Any:
        """Do what the script says, in so much time."""
        seconds, answer = self.script(parameters, context.attempt)
        limit = (context.deadline - self.now).total_seconds() - DEADLINE_GRACE_SECONDS
        visitor = threading.current_thread()
        assert isinstance(visitor, Visitor)
        visitor.work_until(self.now + timedelta(seconds=min(seconds, limit)))
        if seconds >= limit:
            raise AttemptTimedOut  # as the alarm does in a worker
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def play(self, case: Case) -> UUID:
        """Play a run to its end, and return its id."""
        self.redis.flushdb()
        self.change(*CLEAR)
        self.set_clock(case.start)
        # Who never did anything rested longest; of several the first by name.
        self.change(RESTED)
        self.script, self.decisions = case.script, case.decisions
        with self.database.transaction() as tx:
            for document in case.children.values():
                workflows.create_workflow(tx, parse(document))
            stored, _ = workflows.create_workflow(tx, parse(case.document))
            submission = engine.Submission(input=case.input, agent_id=case.agent_id)
            plan = engine.submit_run(tx, stored, submission)
        self.visited: set[Any] = set()
        self.at_work: list[Visitor] = []
        self.asked: dict[UUID, tuple[datetime, bool]] = {}
        self.keeper.dispatcher.publish(plan)
        self._visit_all()
        self._pass(self.now)
        for _ in range(MOST_MOMENTS):
            moment = self._next()
            if moment is None:
                return plan.run_id
            self._pass(moment)
        raise AssertionError("the run does not end")

    def _next(self) -> datetime | None:
        ((moment,),) = self.rows(NEXT)
        others = [visitor.until for visitor in self.at_work]
        others += [moment for moment, _ in self.asked.values()]
        known = [one for one in (moment, *others) if one is not None]
        return max(min(known), self.now) if known else None

    def _pass(self, moment: datetime) -> None:
        """Let the clock come to a moment: first what ends then, then the keeper."""
        self.set_clock(moment)
        for visitor in [one for one in self.at_work if one.until == moment]:
            self._go_on(visitor)
        for task_id in [id for id, (at, _) in self.asked.items() if at == moment]:
            self._decide(task_id, self.asked.pop(task_id)[1])
        self._visit_all()
        # What is past its moment is past it by a moment.
        self.set_clock(moment + timedelta(microseconds=1))
        self.keeper.settle()
        self.keeper.release()
        self.keeper.wake()
        self._visit_all()
        self.keeper.settle()
        self._visit_all()

    def _decide(self, task_id: UUID, approved: bool) -> None:
        with suppress(ApprovalRefused), self.database.transaction() as tx:
            engine.decide_approval(tx, task_id, approved=approved, comment=None, by="key:test")

    def _visit_all(self) -> None:
        """Visit whatever could move, in the order in which it came to be so."""
        known: deque[Any] = deque()
        while True:
            for row in self.rows(READY):
                if row not in self.visited:
                    self.visited.add(row)
                    known.append(row)
            if not known:
                break
            row = known.popleft()
            self._go_on(Visitor(partial(self.visit, row)))
        self._ask()

    def _go_on(self, visitor: Visitor) -> None:
        visitor.go_on()
        others = [one for one in self.at_work if one is not visitor]
        self.at_work = [*others, visitor] if visitor.until is not None else others

    def _ask(self) -> None:
        """Have somebody decide what is asked for by now."""
        for row in self.rows(ASKED):
            if row.definition_id in self.decisions and row.id not in self.visited:
                self.visited.add(row.id)
                seconds, approved = self.decisions[row.definition_id]
                self.asked[row.id] = (self.now + timedelta(seconds=seconds), approved)

    def visit(self, row: Any) -> None:
        """Do what a worker does with a visit's message, which is alone in its canvas."""
        is_kept = row.reason in ("agent_busy", "agent_unavailable")
        self.run_task.push_request(
            id=str(row.id),
            args=[str(row.id), row.generation],
            kwargs={},
            headers={WAKES_HEADER: True},
            delivery_info={"routing_key": AGENTS_QUEUE, "priority": FIRST if is_kept else 0},
            hostname="w",
        )
        try:
            with suppress(Ignore, Retry, TaskFailed):
                self.run_task.run(str(row.id), row.generation)
        finally:
            self.run_task.pop_request()


@pytest.fixture(scope="module")
def real(servers: Servers) -> Iterator[Engine]:
    with ExitStack() as cleanup:
        url = cleanup.enter_context(servers.new_database())
        environment = stack_environment(url, new_redis_url(servers))
        patched = cleanup.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            patched.setenv(name, value)
        database = Database(url)
        cleanup.callback(database.close)
        with database.transaction() as tx:
            tx.execute(text(CLOCK))
            name = url.rsplit("/", 1)[1]
            tx.execute(text(f"ALTER DATABASE {name} SET search_path = virtual, public, pg_catalog"))
            tx.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
        database.close()
        redis = cleanup.enter_context(Redis.from_url(environment["REDIS_URL"]))
        found = Settings.from_env(environment)
        dispatcher = Dispatcher(make_app(found), database, found)
        real = Engine(database, redis, Round(database, dispatcher, found))
        declared = [
            FunctionAgent(id, id, "1", one.get("capabilities", ()), one.get("capacity"), real.agent)
            for id, one in AGENTS.items()
        ]
        # Not above: what Celery is to do in a worker's process is said when they are imported.
        from workers.app import process
        from workers.tasks import run_task

        real.run_task = run_task
        held = {
            "settings": found,
            "database": database,
            "dispatcher": dispatcher,
            "leases": Leases(database, found, process.ending),
            "events": Events(dispatcher.app, dispatcher),
            "patience": Patience(),
            "agents": {one.agent_id: one for one in declared},
        }
        for name, value in held.items():
            patched.setitem(vars(process), name, value)
        with database.transaction() as tx:
            agents.register_functions(tx, declared)
            for id, one in AGENTS.items():
                agents.change(tx, id, {"paused": one.get("away", False)})
        yield real


# --- What is run


class Chance(Random):
    """What a workflow, and what comes of it, is left to."""

    def is_so(self, part: float) -> bool:
        return self.random() < part

    def seconds(self, most: float) -> float:
        """Return a time that hardly any other is the same as."""
        return self.randint(1, int(most * 1000)) / 1000


IDS = "abcdefg"
CHILDREN = ("below", "narrow", "deep")


def new_case(dice: int) -> Case:
    chance = Chance(dice)
    children = {
        "deep": document(chance, "deep", 2, ()),
        "below": document(chance, "below", 3, ("deep",)),
        "narrow": document(chance, "narrow", 2, ()) | {"maxConcurrentRuns": 2},
    }
    made = document(chance, "top", 6, CHILDREN)
    asked = [task for one in (made, *children.values()) for task in one["tasks"]]
    decisions = {
        task["taskId"]: (chance.seconds(200), chance.is_so(0.7))
        for task in asked
        if task.get("type") == "approval" and not is_silent(task["taskId"])
    }
    start = datetime.now(UTC)
    until = (start + timedelta(seconds=chance.seconds(200))).isoformat()
    input = {"n": chance.randint(0, 9), "list": [{"long": 1e18, "k": n} for n in range(3)]}
    input["until"] = until
    agent_id = chance.choice(["free", "pair", "cook"]) if chance.is_so(0.2) else None
    return Case(made, children, input, partial(answer, dice), decisions, agent_id, start)


def is_silent(id: str) -> bool:
    """Whether nobody decides this approval: those have a timeout."""
    return id[-1] in "ace"


def document(chance: Chance, name: str, most: int, below: tuple[str, ...]) -> dict[str, Any]:
    count = chance.randint(1, most)
    ids = [f"{name}-{id}" for id in IDS[:count]]
    style = chance.choice(["listed", "dependsOn", "dependsOn", "dependsOn", "nextTaskId"])
    tasks: list[dict[str, Any]] = []
    for n, id in enumerate(ids):
        before, edges = edges_of(chance, style, ids, n)
        tasks.append({"taskId": id, **edges, **task(chance, id, before, below)})
    made: dict[str, Any] = {"id": name, "tasks": tasks}
    if chance.is_so(0.5):
        made["output"] = output(chance, ids)
    if chance.is_so(0.15):
        made["deadlineSeconds"] = chance.seconds(600)
    if name != "top" and chance.is_so(0.1):
        made["inputSchema"] = {"type": "object", "required": [chance.choice(["n", "nothing"])]}
    return made


def edges_of(
    chance: Chance, style: str, ids: list[str], n: int
) -> tuple[list[str], dict[str, Any]]:
    """Return which tasks are surely over before this one, and how that is spelled."""
    if style == "dependsOn":
        before = sorted(chance.sample(ids[:n], min(n, chance.choice([0, 1, 1, 2]))))
        return before, {"dependsOn": before}
    if style == "nextTaskId":
        return ids[n - 1 : n], {"nextTaskId": ids[n + 1] if n + 1 < len(ids) else None}
    return ids[n - 1 : n], {}


def read(id: str, what: str) -> str:
    return f'tasks["{id}"].{what}'


def task(chance: Chance, id: str, before: list[str], below: tuple[str, ...]) -> dict[str, Any]:
    kind = chance.choice(["agent"] * 6 + ["approval", "delay"] + ["workflow"] * 2 * bool(below))
    made = KINDS[kind](chance, id, before, below)
    if chance.is_so(0.35):
        made["onFailure"] = "continue"
    if before and chance.is_so(0.3):
        made["when"] = condition(chance, chance.choice(before))
    return made


def condition(chance: Chance, id: str) -> str:
    if chance.is_so(0.1):
        return f"{read(id, 'output')}.v > 1"  # perhaps there is none
    return chance.choice(
        [
            f'{read(id, "status")} == "completed"',
            f'{read(id, "status")} != "completed"',
            f"{read(id, 'output')} == null",
            "input.n > 4",
        ]
    )


ABOVE = '${has(input.at) ? input.at : ""}'
"""Which run it is, by the tasks above: or all of a forEach would happen at the same moments."""


def parameters(chance: Chance, id: str, before: list[str], is_each: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"me": id, "place": "${index}" if is_each else 0}
    made["at"] = ABOVE
    if is_each:
        made["item"] = "${item}"
    for one in before:
        made["seen"] = f"${{{read(one, 'output')}}}"
        made["told"] = f"It was {chance.choice(['$${', ''])}${{{read(one, 'output')}}}."
    if before and chance.is_so(0.03):
        made["wrong"] = f"${{{read(before[0], 'output.zz')}}}"
    return made


def each(chance: Chance) -> dict[str, Any]:
    made: dict[str, Any] = {
        "items": chance.choice(["${input.list}", [1, 2, 3]] * 5 + ["${[]}", "${input.n}"])
    }
    if chance.is_so(0.5):
        made["maxParallel"] = chance.randint(1, 2)
    if chance.is_so(0.4):
        made["tolerate"] = chance.choice([0, 1, 2, "40%", "100%"])
    return {"forEach": made}


UNLIMITED = [{"agentId": "free"}, {"agentCapability": "cleaning"}]
LIMITED = [{"agentId": "single"}, {"agentId": "pair"}, {"agentCapability": "cooking"}]
AWAY = [{"agentId": "gone"}]
FALLEN_BACK = [
    {"agentId": "gone", "fallback": ["single", "free"]},
    {"agentId": "gone", "fallback": ["gone-too", "pair"]},
]


def for_agent(chance: Chance, id: str, before: list[str], below: Any) -> dict[str, Any]:
    is_each = chance.is_so(0.3)
    known = [*[UNLIMITED, LIMITED] * 4, FALLEN_BACK]
    if not is_each and id.startswith("top"):  # of several, any is overdue first
        known.append(AWAY)
    who = chance.choice(known)
    busy = {"backoffSeconds": chance.seconds(20), "maxWaitSeconds": 20 + chance.seconds(300)}
    if who is AWAY:
        # Whole looks of the keeper: at other moments the two have not been compared.
        busy["maxWaitSeconds"] = busy["backoffSeconds"] + 30 * chance.randint(1, 5)
    elif who is not UNLIMITED:
        # Else who is looked at first depends on backoffs, which the two have not been compared on.
        busy |= {"backoffSeconds": 0.0001, "maxBackoffSeconds": 0.0001}
    made = {
        "parameters": parameters(chance, id, before, is_each),
        "retry": {"maxAttempts": chance.randint(1, 3), "backoffSeconds": chance.seconds(20)},
        "busy": busy,
        "timeoutSeconds": 30 + chance.seconds(30),
        **chance.choice(who),
    }
    return made | (each(chance) if is_each else {})


def approval(chance: Chance, id: str, *_: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "approval"}
    if is_silent(id) or chance.is_so(0.5):
        made["timeoutSeconds"] = chance.seconds(200)
        made["onTimeout"] = chance.choice(["approve", "reject"])
    return made


def delay(chance: Chance, *_: Any) -> dict[str, Any]:
    if chance.is_so(0.4):
        return {"type": "delay", "until": "${input.until}"}
    seconds = [chance.seconds(100), f"${{input.n * 10 + {chance.randint(1, 9)}}}"] * 4
    return {"type": "delay", "seconds": chance.choice([*seconds, "${input.list}"])}


def sub_workflow(chance: Chance, id: str, before: list[str], below: Any) -> dict[str, Any]:
    is_each = chance.is_so(0.4)
    made: dict[str, Any] = {"type": "workflow", "workflowId": chance.choice(below)}
    place = f"{id}-${{index}}" if is_each else id
    made["parameters"] = {"n": "${input.n}", "list": "${input.list}", "at": f"{place} {ABOVE}"}
    made["parameters"]["until"] = "${input.until}"
    if chance.is_so(0.3):
        made["timeoutSeconds"] = chance.seconds(200)
    return made | (each(chance) if is_each else {})


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "agent": for_agent,
    "approval": approval,
    "delay": delay,
    "workflow": sub_workflow,
}


def output(chance: Chance, ids: list[str]) -> Any:
    one = chance.choice(ids)
    return chance.choice(
        [
            f"${{{read(one, 'output')}}}",
            {"status": f"${{{read(one, 'status')}}}", "error": f"${{{read(one, 'error')}}}"},
            # (Of the last task the engine renders what came from the agent, not what it stored.)
            f"It is ${{{read(one, 'status')}}}, says ${{run.workflowId}}.",
            {"sure": f"${{{read(one, 'status')}}}", "v": f"${{{read(one, 'output.v')}}}"},
        ]
    )


HOW = ["done"] * 20 + ["fails"] * 6 + ["later", "busy", "busy", "gives up", "odd"] * 2


def answer(dice: int, parameters: dict[str, Any], attempt: int) -> Step:
    """Say what comes of an attempt: the same whoever plays the run."""
    who = [parameters.get(name) for name in ("me", "place", "at")]
    chance = Chance(f"{dice} {who} {attempt}")
    seconds = chance.seconds(25)
    match chance.choice(
        ["done"] * 8 + ["fails"] * 3 + ["gives up", "later", "busy", "busy", "odd"]
    ):
        case "fails":
            return seconds, ValueError("it broke")
        case "gives up":
            return seconds, GiveUp("no use")
        case "later":
            return seconds, RetryLater(chance.seconds(50))
        case "busy":
            return seconds, AgentBusy(chance.choice([None, None, chance.seconds(50), 0]))
        case "odd":
            return chance.choice([(seconds, object()), (500, "late"), (seconds, "x" * 2**20)])
    made = [{"v": chance.randint(0, 9), "longer": 1, "k": [1.0, -0.0]}, {"v": 1e17}, None, 5]
    return seconds, chance.choice(made)


# --- What both say


def seen_by_engine(real: Engine, run_id: UUID) -> Any:
    (run,) = real.rows("SELECT * FROM runs WHERE id = :id", id=run_id)
    rows = real.rows(
        "SELECT t.*, (SELECT count(*) FROM attempts a WHERE a.task_id = t.id) AS attempts"
        " FROM tasks t WHERE t.run_id = :id AND t.kind <> 'end'"
        " ORDER BY t.position, t.index NULLS FIRST",
        id=run_id,
    )
    tasks = {}
    for row in rows:
        name = row.definition_id if row.index is None else f"{row.definition_id}[{row.index}]"
        child = row.child_run_id and seen_by_engine(real, row.child_run_id)
        said = (row.status, row.reason, row.error, row.output, row.attempts)
        tasks[name] = (*said, who(row.agent_id, row.attempts), child)
    seconds = (run.finished_at - run.created_at).total_seconds() if run.finished_at else None
    return plain((run.status, run.error, run.output, seconds, tasks))


def seen_by_simulation(run: Run) -> Any:
    tasks = {}
    for task in [one for top in run.tasks.values() for one in (top, *top.items)]:
        child = task.child and seen_by_simulation(task.child)
        said = (task.status, task.reason, task.error, task.output, task.attempts)
        tasks[task.name] = (*said, who(task.agent_id, task.attempts), child)
    return plain((run.status, run.error, run.output, run.seconds, tasks))


def who(agent_id: str | None, attempts: int) -> str | None:
    """Return whose task it was. Who waits for a capability is woken by any agent that has it."""
    return "cooking" if agent_id in ("cook", "chef") else agent_id if attempts else None


def plain(said: Any) -> Any:
    """Make comparable: ids are new each time, and the keeper is late by microseconds."""
    if isinstance(said, dict):
        return {key: plain(value) for key, value in said.items() if key != "taskId"}
    if isinstance(said, list | tuple):
        return [plain(value) for value in said]
    if isinstance(said, str):
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", said)
    return round(said, 3) if isinstance(said, float) else said


def played(case: Case) -> Run:
    def agent(parameters: dict[str, Any], context: Any) -> Any:
        return after(*case.script(parameters, context.attempt))

    return simulate(
        case.document,
        input=case.input,
        agents={id: fake(agent, **how) for id, how in AGENTS.items()},
        approvals={
            id: after(seconds, approve() if approved else reject())
            for id, (seconds, approved) in case.decisions.items()
        },
        workflows=case.children,
        agent_id=case.agent_id,
        at=case.start,
    )


def note_codes(said: Any) -> None:
    """Count the statuses, reasons and codes that came up, in sub-workflows too."""
    status, error, _, _, tasks = said
    SEEN[f"run {status}"] += 1
    SEEN[error["code"] if error else "no error"] += 1
    for status, reason, error, _, _, _, child in tasks.values():
        SEEN[f"task {status} {reason or ''}".strip()] += 1
        SEEN[error["code"] if error else "no error"] += 1
        if child:
            note_codes(child)


@pytest.mark.timeout(0)
def test_a_simulated_run_comes_to_what_the_engine_makes_of_it(real: Engine) -> None:
    for n in range(EXAMPLES):
        case = new_case(SEED * 1_000_000 + n)
        simulated = seen_by_simulation(played(case))
        told = json.dumps([case.document, case.children, case.input], indent=1)
        assert seen_by_engine(real, real.play(case)) == simulated, f"Example {n}: {told}"
        note_codes(simulated)
    print(f"seed {SEED}:", dict(sorted(SEEN.items())))
    assert not EXPECTED - SEEN.keys()
