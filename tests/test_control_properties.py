"""Runs under random interleavings of progress, upkeep, lost wakes and controls, on real servers.

There are no workers: each rule is one thing that a visit, a worker, the keeper, the clock or an
operator does, in any order, and with what must follow a commit left out at random. After each of
them nothing may contradict itself; at the end nothing but what was sent, and the keeper, must bring
every run to its end, and what had failed to completion once it is tried again.

`make test` takes the same few hundred examples every time. For more, with another seed:

    OPSCORE_PROPERTY_EXAMPLES=5000 OPSCORE_PROPERTY_SEED=7 \\
        .venv/bin/python -m pytest -s tests/test_control_properties.py
"""

import base64
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from sqlalchemy import text
from stack import Servers, new_redis_url, stack_environment
from test_engine import agent

from celeryconfig import make_app
from opscore import agents, canvas, dispatch, engine, work, workflows
from opscore.agentkit import Completed, Failed
from opscore.canvas import RUN_TASK, WAKES_HEADER
from opscore.config import QUEUES, SERVED_FIRST, Settings
from opscore.db import Database, Tx
from opscore.definition import parse
from opscore.dispatch import Dispatcher
from opscore.engine import (
    Claimed,
    Elsewhere,
    Failure,
    Fenced,
    Finished,
    Gone,
    Impossible,
    MustWait,
    Parked,
    Plan,
    Settled,
    Taker,
    Undecided,
    Visit,
    Wait,
)
from opscore.errors import (
    ApprovalRefused,
    NothingToRetry,
    OpsCoreError,
    RunEnding,
    RunFinished,
    RunNotFailed,
    RunNotPaused,
)
from opscore.states import RUN_ENDED, TASK_ENDED, Reason
from opscore.workflows import find_workflow
from workers.keeper import Round

T = TypeVar("T")
EXAMPLES = int(os.environ.get("OPSCORE_PROPERTY_EXAMPLES", "40"))
SEED = int(os.environ.get("OPSCORE_PROPERTY_SEED", "1"))
STEPS = 50
"""Rules of one example."""
MOST_OPEN, MOST_RUNS = 3, 9
ROUNDS = 20
"""Within so many rounds of upkeep, an hour each, everything that is not waited for must be over."""
DONE: Counter[str] = Counter()
"""What was done, over all examples."""


# --- What is run


def task(name: str, agent_id: str = "echo", **more: Any) -> dict[str, Any]:
    patient = {"backoffSeconds": 600, "maxBackoffSeconds": 600}
    return {
        "taskId": name,
        "agentId": agent_id,
        "retry": {"maxAttempts": 2} | patient,
        "busy": patient,
        **more,
    }


def each(items: int, most: int | None = None, **more: Any) -> dict[str, Any]:
    limit = {} if most is None else {"maxParallel": most}
    return {"forEach": {"items": f"${{{list(range(items))}}}"} | limit | more}


def child(name: str, **more: Any) -> dict[str, Any]:
    return {"taskId": name, "type": "workflow", "workflowId": "below", **more}


MONTH = 2_592_000
CAPABLE = {"taskId": "k", "agentCapability": "cooking", "dependsOn": []}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "below": [task("p"), task("q", "single")],
    "chain": [task("a"), task("b", "single"), task("c")],
    "diamond": [
        task("a", dependsOn=[]),
        task("b", "single", dependsOn=["a"]),
        task("c", "pair", dependsOn=["a"], onFailure="continue"),
        task("d", dependsOn=["b", "c"]),
    ],
    "side": [task("a", "single", dependsOn=[]), task("b", "single", dependsOn=[]), CAPABLE],
    "items": [task("a"), task("f", **each(3)), task("z")],
    "limited": [
        task("f", "single", **each(4, 2), dependsOn=[]),
        task("g", dependsOn=[]),
        task("z", dependsOn=["f", "g"]),
    ],
    "tolerant": [
        task("f", "pair", **each(4, 2, tolerate=1), dependsOn=[]),
        task("g", **each(2, 1, tolerate=0), dependsOn=[], onFailure="continue"),
        task("z", dependsOn=["f", "g"]),
    ],
    "branch": [
        task("a", dependsOn=[]),
        task("b", when="tasks.a.output > 4", dependsOn=["a"]),
        task("c", "single", when="tasks.a.output <= 4", dependsOn=["a"]),
        task("d", dependsOn=["b", "c"]),
        task("e", dependsOn=["b"]),
    ],
    "asks": [
        {"taskId": "ok", "type": "approval", "dependsOn": []},
        {"taskId": "soon", "type": "approval", "dependsOn": [], "timeoutSeconds": 60}
        | {"onTimeout": "approve"},
        task("a", "single", dependsOn=[]),
        task("z", dependsOn=["ok", "soon", "a"]),
    ],
    "delays": [task("a"), {"taskId": "d", "type": "delay", "seconds": 60}, task("b", "single")],
    "nests": [
        child("x", dependsOn=[]),
        task("a", "single", dependsOn=[]),
        task("z", dependsOn=["x", "a"]),
    ],
    "nested items": [child("f", **each(3, 2)), task("z")],
    "few": [task("a", "single"), task("b")],
    "long": [task(f"t{n}") for n in range(28)],
}
MORE: dict[str, dict[str, Any]] = {
    "few": {"maxConcurrentRuns": 1},
    "asks": {"deadlineSeconds": MONTH},
    "nests": {"deadlineSeconds": MONTH},
}
AGENTS = [agent("echo"), agent("single", 1), agent("pair", 2), agent("cook", 1, ("cooking",))]


# --- What must hold

GUARDS = """
CREATE TABLE changes (
    n bigint GENERATED ALWAYS AS IDENTITY, what text, id uuid, run_id uuid, kind text,
    old text, new text, transaction bigint);
CREATE FUNCTION note_run() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF OLD.status <> NEW.status THEN
        INSERT INTO changes (what, id, run_id, kind, old, new, transaction) VALUES (
            'run', NEW.id, NEW.id, 'run', OLD.status, NEW.status,
            pg_current_xact_id()::text::bigint);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER changes AFTER UPDATE OF status ON runs FOR EACH ROW EXECUTE FUNCTION note_run();
CREATE FUNCTION note_task() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF OLD.status IN ('completed', 'skipped') AND (
        OLD.output IS DISTINCT FROM NEW.output OR OLD.attempt <> NEW.attempt) THEN
        RAISE 'what is over was changed: task %', NEW.id;
    END IF;
    IF OLD.status <> NEW.status THEN
        IF NEW.status = 'running' AND EXISTS (
            SELECT FROM runs r WHERE r.id = NEW.run_id AND (
                r.status NOT IN ('queued', 'running') OR r.cancel_requested_at IS NOT NULL
                OR r.error IS NOT NULL OR r.reason IS NOT NULL)) THEN
            RAISE 'a task started in a run that takes none: %', NEW.id;
        END IF;
        INSERT INTO changes (what, id, run_id, kind, old, new, transaction) VALUES (
            'task', NEW.id, NEW.run_id, NEW.kind, OLD.status, NEW.status,
            pg_current_xact_id()::text::bigint);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER changes AFTER UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION note_task();
"""
"""Beside the rules and arrows of `stack.guard`."""
UNTOLD = text(
    """
SELECT c.what, c.kind, c.old, c.new, wanted.types, told.types AS told FROM changes c
CROSS JOIN LATERAL (SELECT CASE
    WHEN c.what = 'run' AND c.new = 'running' AND c.old = 'queued' THEN ARRAY['run.started']
    WHEN c.what = 'run' AND c.old = 'failed' THEN ARRAY['run.retried']
    WHEN c.what = 'run' AND c.new IN ('queued', 'running') THEN ARRAY['run.resumed']
    WHEN c.what = 'run' THEN ARRAY['run.' || c.new]
    WHEN c.kind = 'end' THEN NULL
    WHEN c.old IN ('failed', 'cancelled') THEN ARRAY['run.retried']
    WHEN c.new = 'running' THEN ARRAY['task.started']
    WHEN c.old = 'running' AND c.new = 'waiting'
        THEN ARRAY['task.waiting', 'task.retrying', 'task.lost', 'task.expanded']
    WHEN c.new NOT IN ('pending', 'waiting') THEN ARRAY['task.' || c.new] END AS types) AS wanted
CROSS JOIN LATERAL (
    SELECT array_agg(e.type) AS types FROM events e
    WHERE e.run_id = c.run_id AND e.transaction = c.transaction AND e.type = ANY (wanted.types)
      AND e.task_id IS NOT DISTINCT FROM
          CASE WHEN c.what = 'task' AND NOT wanted.types = ARRAY['run.retried'] THEN c.id END
) AS told
WHERE c.n > :since AND wanted.types IS NOT NULL AND cardinality(told.types) IS DISTINCT FROM 1
"""
)
"""Changes of a status without their one event, of the same transaction."""
WRONG = text(
    """
WITH o AS MATERIALIZED (
    SELECT t.*, t.status = 'running' AS runs,
           t.status NOT IN ('completed', 'failed', 'cancelled', 'skipped') AS is_open
    FROM tasks t
), live AS MATERIALIZED (
    SELECT r.*, r.status NOT IN ('completed', 'failed', 'cancelled') AS is_open FROM runs r
)
SELECT 'a slot is held by no running attempt' AS what, s.pool || s.number AS which
FROM slots s WHERE s.pool NOT LIKE '%:%' AND s.holder IS NOT NULL AND NOT EXISTS (
    SELECT FROM o WHERE o.id = s.holder AND o.runs AND o.attempt = s.attempt
                  AND o.agent_id = s.pool)
UNION ALL SELECT 'an attempt runs without its slot', o.id::text
FROM o JOIN agents a USING (agent_id) WHERE o.runs AND o.kind = 'agent' AND a.capacity IS NOT NULL
  AND NOT EXISTS (SELECT FROM slots s WHERE s.pool = o.agent_id AND s.holder = o.id)
UNION ALL SELECT 'more at once than the capacity', a.agent_id
FROM agents a JOIN o USING (agent_id) WHERE o.runs AND o.kind = 'agent'
GROUP BY a.agent_id, a.capacity HAVING count(*) > a.capacity
UNION ALL SELECT 'a task runs without an attempt, or an attempt without its task', o.id::text
FROM o LEFT JOIN attempts a ON a.task_id = o.id AND a.status = 'running'
WHERE o.kind = 'agent' AND (o.runs IS DISTINCT FROM (a.number IS NOT NULL)
                            OR a.number <> o.attempt)
UNION ALL SELECT 'more items out than maxParallel', p.id::text
FROM o p JOIN o c ON c.parent_id = p.id
WHERE c.is_open AND NOT (c.status = 'waiting' AND c.reason = 'max_parallel')
GROUP BY p.id, p.max_parallel HAVING count(*) > p.max_parallel
UNION ALL SELECT 'an item is out without a slot', c.id::text
FROM o p JOIN o c ON c.parent_id = p.id
WHERE p.max_parallel IS NOT NULL AND p.is_open AND c.is_open
  AND (c.status = 'waiting' AND c.reason = 'max_parallel')
      = EXISTS (SELECT FROM slots s WHERE s.pool = 'items:' || p.id AND s.holder = c.id)
UNION ALL SELECT 'slots of items are left', s.pool
FROM slots s JOIN o p ON s.pool = 'items:' || p.id WHERE NOT p.is_open OR p.runs
UNION ALL SELECT 'more runs under way than maxConcurrentRuns', r.workflow_id
FROM live r WHERE r.max_concurrent IS NOT NULL AND r.is_open AND r.reason IS NULL
GROUP BY r.workflow_id, r.max_concurrent HAVING count(*) > r.max_concurrent
UNION ALL SELECT 'a run is under way without a slot, or waits its turn with one', r.id::text
FROM live r WHERE r.max_concurrent IS NOT NULL AND r.is_open AND (r.reason IS NULL)
    <> EXISTS (SELECT FROM slots s WHERE s.pool = 'runs:' || r.workflow_id AND s.holder = r.id)
UNION ALL SELECT 'a run is over with open tasks', r.id::text
FROM live r JOIN o ON o.run_id = r.id WHERE NOT r.is_open AND o.is_open
UNION ALL SELECT 'a run is completed without all it needs', r.id::text
FROM live r JOIN o ON o.run_id = r.id WHERE r.status = 'completed'
  AND (o.status = 'cancelled' OR o.status = 'failed' AND NOT o.goes_on)
UNION ALL SELECT 'a run that is ending has tasks that may start', r.id::text
FROM live r JOIN o ON o.run_id = r.id WHERE r.is_open AND o.status IN ('pending', 'waiting')
  AND (r.cancel_requested_at IS NOT NULL OR r.error IS NOT NULL)
UNION ALL SELECT 'a task is paused in a run that is not', o.id::text
FROM live r JOIN o ON o.run_id = r.id
WHERE o.status = 'waiting' AND o.reason = 'paused' AND r.status <> 'paused'
UNION ALL SELECT 'a sub-workflow goes on without its run', c.id::text
FROM live c JOIN o t ON t.id = c.parent_task_id JOIN live r ON r.id = t.run_id
WHERE c.is_open AND c.cancel_requested_at IS NULL AND t.child_run_id = c.id
  AND (NOT r.is_open OR r.cancel_requested_at IS NOT NULL OR r.error IS NOT NULL)
"""
)
LEFT_OVER = text(
    """
SELECT 'a slot' AS what, s.pool FROM slots s
WHERE s.pool NOT LIKE 'runs:%' AND (s.holder IS NOT NULL OR s.pool LIKE 'items:%')
   OR EXISTS (SELECT FROM runs r WHERE r.id = s.holder
              AND r.status NOT IN ('completed', 'failed', 'cancelled'))
UNION ALL SELECT 'an attempt', task_id::text FROM attempts WHERE status = 'running'
UNION ALL SELECT 'a task', id::text FROM tasks
WHERE status NOT IN ('completed', 'failed', 'cancelled', 'skipped')
"""
)
AN_HOUR = [
    "UPDATE {table} SET " + ", ".join(f"{name} = {name} - interval '1 h'" for name in names)
    for names in (
        (
            "created_at",
            "started_at",
            "finished_at",
            "waiting_since",
            "wake_at",
            "woken_at",
            "not_before",
            "kept_until",
        ),
        ("created_at", "started_at", "finished_at", "generation_at", "start_at", "deadline_at"),
        ("reserved_until", "held_at", "freed_at", "rests_until"),
    )
]
MONTH_AGO = ", ".join(
    f"{name} = {name} - interval '{MONTH} s'" for name in ("created_at", "start_at", "deadline_at")
)
AGED = [
    statement.format(table=table)
    for statement, table in zip(AN_HOUR, ("tasks", "runs", "slots"), strict=True)
]


# --- The world


@dataclass(frozen=True)
class Mail:
    """A visit that was sent: its task, and what its message carries."""

    task_id: UUID
    generation: int
    wakes: bool = True
    has_slot: bool = False
    chain: Sequence[Any] = ()
    """What Celery would send when it returns, the next one last."""


@dataclass
class World:
    """The servers, and what processes of ours would be on them."""

    database: Database
    dispatcher: Dispatcher
    keeper: Round
    redis: Any

    def rows(self, statement: Any, **parameters: Any) -> list[Any]:
        statement = text(statement) if isinstance(statement, str) else statement
        with self.database.autocommit() as tx:
            return list(tx.execute(statement, parameters))

    def change(self, *statements: str, **parameters: Any) -> None:
        with self.database.transaction() as tx:
            for statement in statements:
                tx.execute(text(statement), parameters)

    def runs(self) -> list[Any]:
        return self.rows("SELECT * FROM runs ORDER BY id")

    def run(self, run_id: UUID) -> Any:
        (run,) = self.rows("SELECT * FROM runs WHERE id = :id", id=run_id)
        return run

    def tasks(self, run_id: UUID | None = None) -> list[Any]:
        return self.rows(
            "SELECT t.*, r.generation FROM tasks t JOIN runs r ON r.id = t.run_id"
            " WHERE r.id = coalesce(:id, r.id) ORDER BY r.id, t.position, t.index NULLS FIRST",
            id=run_id,
        )

    def keep(self, what: str) -> None:
        """Have the keeper do a part of its round."""
        getattr(self.keeper, what)()

    def clear(self) -> None:
        """Leave workflows and agents, and nothing else."""
        self.redis.flushdb()
        self.change(
            *(f"DELETE FROM {name}" for name in ("runs", "events", "changes")),
            "DELETE FROM slots WHERE pool LIKE 'items:%'",
            "UPDATE slots SET holder = NULL, attempt = NULL, lease_expires_at = NULL,"
            " reserved_for = NULL, reserved_until = NULL, rests_until = NULL, failures = 0",
        )

    def collect(self) -> Iterator[Mail]:
        """Take all that was sent out of Redis, in the order in which workers would get it."""
        queues = (*SERVED_FIRST, *QUEUES)
        with self.redis.pipeline() as pipe:
            for queue in queues:
                pipe.lrange(queue, 0, -1)
            *entries, _ = pipe.delete(*queues).execute()
        for queue, sent in zip(queues, entries, strict=True):
            for entry in reversed(sent):
                yield read_mail(json.loads(entry), has_slot=queue in SERVED_FIRST)


def read_mail(message: dict[str, Any], has_slot: bool) -> Mail:
    args, _, carried = json.loads(base64.b64decode(message["body"]))
    wakes = bool(message["headers"].get(WAKES_HEADER))
    return Mail(UUID(args[0]), args[1], wakes, has_slot, carried.get("chain") or ())


def following(mail: Mail) -> Iterator[Mail]:
    """Yield what comes after a message by its chain; what Celery would have to count is lost."""
    if mail.chain and mail.chain[-1]["task"] == RUN_TASK:
        yield replace(read_saved(mail.chain[-1]), chain=mail.chain[:-1])


def read_saved(message: dict[str, Any]) -> Mail:
    options = message["options"]
    wakes = bool((options.get("headers") or {}).get(WAKES_HEADER))
    task_id, generation = message["args"]
    return Mail(UUID(task_id), generation, wakes, chain=options.get("chain") or ())


@pytest.fixture(scope="module")
def world(servers: Servers) -> Iterator[World]:
    with ExitStack() as cleanup:
        url = cleanup.enter_context(servers.new_database())
        patched = cleanup.enter_context(pytest.MonkeyPatch.context())
        patched.setattr(dispatch, "IN_HAND_SECONDS", 0.0)
        quick = {"OPSCORE_LEASE_SECONDS": "1", "OPSCORE_RENEW_SECONDS": "0.1"}
        quick |= {"OPSCORE_RESCUE_SECONDS": "1"}
        environment = stack_environment(url, new_redis_url(servers), **quick)
        settings = Settings.from_env(environment)
        database = Database(url)
        cleanup.callback(database.close)
        redis = cleanup.enter_context(Redis.from_url(settings.redis_url))
        dispatcher = Dispatcher(make_app(settings), database, settings)
        world = World(database, dispatcher, Round(database, dispatcher, settings), redis)
        # Nobody pulls the plug here, and to wait for the disk took most of the time.
        name = url.rsplit("/", 1)[1]
        world.change(GUARDS, f"ALTER DATABASE {name} SET synchronous_commit = off")
        database.close()
        with database.transaction() as tx:
            agents.register_functions(tx, AGENTS)
            for name, tasks in SHAPES.items():
                document = {"id": name.replace(" ", "-"), "tasks": tasks, **MORE.get(name, {})}
                workflows.create_workflow(tx, parse(document))
        yield world


# --- What workers do


@dataclass(frozen=True)
class Held:
    """A claimed task, and the visit that claimed it."""

    claimed: Claimed
    mail: Mail


Decides = Callable[[Undecided], bool]
LATER = 600
"""Seconds: what is to wait does not come due by itself while an example runs."""


def spec_of(world: World, task: Claimed | Undecided) -> Any:
    with world.database.autocommit() as tx:
        return find_workflow(tx, task.workflow_id, task.version).definition.task(task.definition_id)


@dataclass
class Workers:
    """What workers do, a step at a time; with `lost` whoever does it dies after his commit."""

    world: World
    mail: deque[Mail] = field(default_factory=lambda: deque(maxlen=100))
    """What was sent and has not arrived."""
    held: list[Held] = field(default_factory=list)
    """Claims, also of attempts that are over by now."""

    def collect(self) -> None:
        self.mail.extend(self.world.collect())

    def publish(self, plans: Sequence[Plan], lost: bool = False) -> None:
        for plan in () if lost else plans:
            self.world.dispatcher.publish(plan)

    def do(self, statement: Callable[[Tx], T]) -> T:
        with self.world.database.autocommit() as tx:
            return statement(tx)

    def do_whole(self, statement: Callable[[Tx], T]) -> T:
        with self.world.database.transaction() as tx:
            return statement(tx)

    def decide(self, task_id: UUID, approved: bool, lost: bool = False) -> None:
        """Say something of an approval, whether or not it is asked for."""
        with suppress(ApprovalRefused):
            woken = self.do_whole(
                lambda tx: engine.decide_approval(
                    tx, task_id, approved=approved, comment=None, by="somebody"
                )
            )
            if not lost:
                self.world.dispatcher.wake(woken)

    # --- Visiting

    def visit(self, mail: Mail, lost: bool = False, decides: Decides | None = None) -> None:
        """Make a visit; `decides` says whether a task with a condition is to run."""
        for _ in range(6):
            visit = Visit(mail.task_id, mail.generation, uuid4(), mail.has_slot)
            answer = self._claim(visit)
            if isinstance(answer, Claimed):
                again = self._claim(visit)
                assert isinstance(again, Claimed) and again.attempt == answer.attempt
                self.held.append(Held(answer, mail))
                DONE["claimed"] += 1
                return
            if answer is not None and self._is_done_with(answer, mail, lost, decides):
                return
        raise AssertionError(f"a visit without end: {answer}")

    def _claim(self, visit: Visit) -> Any:
        return self.do(lambda tx: engine.claim_task(tx, visit, worker="w", lease_seconds=3600))

    def _is_done_with(
        self, answer: engine.Answer, mail: Mail, lost: bool, decides: Decides | None
    ) -> bool:
        match answer:
            case Settled(generation):
                self._go_on_after(mail, generation, lost)
            case Impossible(failure):
                self._give_up(mail, lambda tx: engine.fail_unclaimed(tx, mail.task_id, failure))
            case Undecided():
                return self._is_skipped(answer, mail, lost, decides)
            case Elsewhere():
                return self._is_kept(mail)
            case MustWait():
                return self._is_parked(answer, mail, lost)
        return True

    def _go_on_after(self, mail: Mail, generation: int, lost: bool) -> None:
        """Let the canvas go on after a task that is over, unless a newer one drives the run."""
        is_old = mail.generation < generation
        if not lost and (mail.wakes or is_old):
            woken = self.do(lambda tx: engine.wake_successors(tx, mail.task_id))
            self.world.dispatcher.wake(woken)
        if not (lost or is_old):
            self.mail.extend(following(mail))

    def _give_up(self, mail: Mail, statement: Callable[[Tx], Gone | None]) -> None:
        gone = self.do_whole(statement)
        if gone is not None and gone.finished is not None:
            self.world.dispatcher.follow(
                gone.finished, mail.task_id, gone.run_id, parent_id=gone.parent_id
            )

    def _is_skipped(self, task: Undecided, mail: Mail, lost: bool, decides: Decides | None) -> bool:
        decides = decides or (lambda task: work.holds(task, spec_of(self.world, task)))
        if not task.follows_skipped and decides(task):
            self.do(lambda tx: engine.decide_task(tx, task.task_id))
            return False
        skipped = self.do(lambda tx: engine.skip_task(tx, task.task_id, "when"))
        assert isinstance(skipped, Finished), "nobody moves it meanwhile"
        if not lost:
            self.world.dispatcher.follow(skipped, task.task_id, task.run_id)
        self._go_on_after(replace(mail, wakes=False), skipped.generation, lost)
        return True

    def _is_kept(self, mail: Mail) -> bool:
        message = self._saved(mail)
        kept = self.do(lambda tx: engine.keep_message(tx, mail.task_id, message, mail.generation))
        return kept is not None

    def _is_parked(self, wait: MustWait, mail: Mail, lost: bool) -> bool:
        message = self._saved(mail)
        overdue = self.do(
            lambda tx: engine.park_task(
                tx, mail.task_id, wait, message=message, generation=mail.generation
            )
        )
        if overdue:
            self._give_up(mail, lambda tx: engine.fail_overdue(tx, mail.task_id))
        elif not lost and wait.reason == Reason.DEPENDENCIES:
            woken = self.do(lambda tx: engine.wake_joins(tx, [mail.task_id]))
            self.world.dispatcher.wake(woken)
        elif not lost and wait.agent_id is not None:
            self.world.dispatcher.wake_line(wait.agent_id)
        return overdue is not None

    def _saved(self, mail: Mail) -> dict[str, Any]:
        """Return the visit as a message to be sent once more."""
        made = canvas.visit(
            self.world.dispatcher.app,
            mail.task_id,
            mail.generation,
            timeout_seconds=60,
            wakes=mail.wakes,
        )
        return {**made, "options": {**made["options"], "chain": list(mail.chain)}}

    # --- Ending

    def end(self, held: Held, how: str = "done", output: int = 5, lost: bool = False) -> None:
        """Say what came of a claimed task; whether anybody hears it is for the engine to say."""
        self.held.remove(held)
        claimed = held.claimed
        if how == "handed back":
            with self.world.database.transaction() as tx:
                engine.hand_back(tx, claimed.task_id, claimed.run_id, claimed.attempt)
        elif how in ("fails", "breaks"):
            self._fail(held, Failure("broken", "it broke", retryable=how == "fails"), lost)
        elif how == "busy" and claimed.kind == "agent":
            self._release(held, lost)
        else:
            self._record(held, self._work(claimed, output), how, lost)

    def _work(self, claimed: Claimed, output: int) -> Any:
        if claimed.kind == "end":
            return Completed(None)
        if claimed.kind == "agent":
            return Completed(output)
        spec = spec_of(self.world, claimed)
        if claimed.kind != "for_each":
            return work.finish(claimed, spec) if claimed.expanded else work.begin(claimed, spec)
        if not claimed.expanded:
            return work.items(claimed, spec.for_each.items)
        outputs, failed = self.do(lambda tx: engine.item_outputs(tx, claimed.task_id))
        return work.collected(outputs, failed, spec)

    def _record(self, held: Held, result: Any, how: str, lost: bool) -> None:
        match result:
            case Completed(output):
                self._complete(held, output, how, lost)
            case Failed():
                self._fail(held, Failure(result.code, result.message, retryable=False), lost)
            case Wait():
                message = self._saved(held.mail)
                if not self.do(lambda tx: engine.begin_wait(tx, held.claimed, result, message)):
                    self._abandon(held, lost)
            case work.Start():
                self._start(held, result, lost)
            case _:
                self._expand(held, result, lost)

    def _complete(self, held: Held, output: Any, how: str, lost: bool) -> None:
        claimed = held.claimed
        run_output, run_error = None, None
        if claimed.is_sink:
            stored = self.do(lambda tx: find_workflow(tx, claimed.workflow_id, claimed.version))
            run_output, run_error = work.run_result(claimed, lambda: stored.definition, output)
        ahead = [*following(held.mail)] if how == "with next" and not claimed.is_sink else []
        take = Taker(uuid4(), 3600, worker="w", lease_seconds=3600) if how == "taking" else None
        if ahead:
            then = Visit(ahead[0].task_id, ahead[0].generation, uuid4())
            finished = self.do(
                lambda tx: engine.complete_and_claim(
                    tx, claimed, output, then, worker="w", lease_seconds=3600
                )
            )
        else:
            finished = self.do(
                lambda tx: engine.complete_attempt(tx, claimed, output, run_output, run_error, take)
            )
        if isinstance(finished, Finished) and finished.next is not None:
            message = finished.next_message
            mail = ahead[0] if message is None else read_saved(message)
            self.held.append(Held(finished.next, mail))
            DONE["claimed with an outcome"] += 1
        self._after(held, finished, lost)

    def _fail(self, held: Held, failure: Failure, lost: bool) -> None:
        message = self._saved(held.mail)
        recorded = self.do_whole(
            lambda tx: engine.fail_attempt(
                tx, held.claimed, failure, delay_seconds=LATER, message=message
            )
        )
        self._after(held, recorded, lost)

    def _release(self, held: Held, lost: bool) -> None:
        message = self._saved(held.mail)
        recorded = self.do_whole(
            lambda tx: engine.release_attempt(
                tx, held.claimed, Reason.AGENT_BUSY, delay_seconds=LATER, message=message
            )
        )
        self._after(held, recorded, lost)

    def _abandon(self, held: Held, lost: bool) -> None:
        self._after(held, self.do_whole(lambda tx: engine.abandon_attempt(tx, held.claimed)), lost)

    def _expand(self, held: Held, values: list[Any], lost: bool) -> None:
        claimed, message = held.claimed, self._saved(held.mail)
        tolerates = spec_of(self.world, claimed).for_each.tolerated(len(values))
        nodes = self.do(lambda tx: engine.expand_task(tx, claimed, values, message, tolerates))
        if nodes is None:
            return self._abandon(held, lost)
        plan = Plan(claimed.run_id, claimed.generation, None, (), tuple(nodes))
        self._wait_for(claimed, [plan], lost)

    def _start(self, held: Held, start: work.Start, lost: bool) -> None:
        claimed, message = held.claimed, self._saved(held.mail)

        def begin(tx: Tx) -> list[Plan] | None:
            stored = find_workflow(tx, start.child.workflow_id)
            return engine.begin_child(tx, claimed, stored, start.input, message, None)

        plans = self.do_whole(begin)
        if plans is None:
            return self._abandon(held, lost)
        self._wait_for(claimed, plans, lost)

    def _wait_for(self, claimed: Claimed, plans: list[Plan], lost: bool) -> None:
        if not lost:
            for plan in plans:
                self.world.dispatcher.publish(plan)
            woken = self.do(lambda tx: engine.wake_parent(tx, claimed.task_id))
            self.world.dispatcher.wake(woken)

    def _after(self, held: Held, recorded: Finished | Parked | Fenced, lost: bool) -> None:
        claimed, mail = held.claimed, held.mail
        has_next = isinstance(recorded, Finished) and recorded.next is not None
        agent_id = claimed.agent_id if claimed.has_slot and not has_next else None
        DONE[type(recorded).__name__.lower()] += 1
        if lost or isinstance(recorded, Fenced):
            return
        if isinstance(recorded, Parked):
            if agent_id is not None:
                self.world.dispatcher.wake_line(agent_id)
            return
        is_old = mail.generation < recorded.generation
        self.world.dispatcher.follow(
            recorded,
            claimed.task_id,
            claimed.run_id,
            parent_id=claimed.parent_id,
            agent_id=agent_id,
            wakes=mail.wakes or is_old,
        )
        if not (is_old or recorded.failed_run or has_next):
            self.mail.extend(following(mail))


# --- What happens

DICE = st.integers(0, 2**32 - 1)
"""Each step throws its own: what is drawn outright comes in too few kinds, and too often alike."""
HOW = ("done", "done", "with next", "taking", "fails", "breaks", "breaks", "busy", "handed back")
UPKEEP = ("expire", "settle", "release", "wake", "rescue")
CONTROLS = ("pause", "resume", "retry", "cancel", "rerun")
PROGRESS = ("work",) * 4 + ("receive", "end", "end", "visit", "keep", "submit", "decide")
TROUBLE = ("go_silent", "pass_an_hour", "reach_deadline", "republish", "visit", "keep")
CONTROL = ("pause", "resume", "resume", "retry", "retry", "retry", "refuse")
MOODS = {
    "calm": PROGRESS * 4 + TROUBLE + CONTROL + ("cancel", "rerun"),
    "crowded": ("receive", "receive", "end", "visit", "submit") * 3 + PROGRESS + TROUBLE + CONTROL,
    "commanding": PROGRESS * 2 + CONTROL * 2 + ("cancel", "rerun"),
    "troubled": PROGRESS * 2 + TROUBLE * 2 + CONTROL,
}
"""How often what happens: an example has one of them."""


def refusal(name: str, run: Any) -> type[OpsCoreError] | None:
    """Return how a control of a run in this state is refused."""
    is_over = run.status in RUN_ENDED
    is_ending = run.cancel_requested_at is not None or run.error is not None
    is_paused = run.status == "paused"
    if name == "retry":
        return None if run.status == "failed" else RunNotFailed
    if name == "rerun" or (not is_over and name == "cancel"):
        return None
    if is_over:
        return RunFinished
    if name == "resume" and not is_paused:
        return RunNotPaused
    return RunEnding if is_ending else None


class Chance(Random):
    """What a step leaves to chance."""

    def one_of(self, rows: Sequence[Any]) -> Any:
        return self.choice(rows) if rows else None

    @property
    def is_lost(self) -> bool:
        """Whether whoever does it dies after his commit, before what must follow it."""
        return self.random() < 0.3

    @property
    def is_so(self) -> bool:
        return self.random() < 0.5


IMPOSSIBLE = object()
"""There is nothing to do it to."""


def call(control: Callable[..., T]) -> Callable[..., T]:
    def in_its_transaction(world: World, run: Any, *more: Any) -> T:
        with world.database.transaction() as tx:
            return control(tx, run.id, *more)

    return in_its_transaction


CALLS: dict[str, Callable[..., Any]] = {
    "pause": call(engine.pause_run),
    "resume": call(engine.resume_run),
    "cancel": call(engine.cancel_run),
    "retry": call(engine.retry_run),
    "rerun": call(engine.rerun),
}


class Interleaving(RuleBasedStateMachine):
    """An example: some runs, and what happens to them."""

    def __init__(self, world: World) -> None:
        super().__init__()
        world.clear()
        self.world, self.workers = world, Workers(world)
        self.told = 0
        self.runs: list[Any] = []
        self.has_room = True
        self.is_sound = False
        DONE["examples"] += 1

    @initialize(dice=DICE)
    def begin(self, dice: int) -> None:
        chance = Chance(dice)
        self.mood, self.doom = MOODS[chance.one_of(sorted(MOODS))], chance.randrange(12)
        self.submit(chance)

    @rule(dice=DICE)
    def step(self, dice: int) -> None:
        """Do one thing or, if there is nothing to do it to, another."""
        chance = Chance(dice)
        self.is_sound = False
        while (done := getattr(self, name := chance.one_of(self.mood))(chance)) is IMPOSSIBLE:
            pass
        DONE["steps"] += 1
        DONE[name] += 1
        note(f"{name} {done or ''}")

    # --- Progress

    def submit(self, chance: Chance) -> Any:
        if not self.has_room:
            return IMPOSSIBLE
        (moment,) = self.world.rows("SELECT now() + interval '30 min' AS at")
        start_at = moment.at if chance.random() < 0.1 else None
        shape = chance.one_of(sorted(SHAPES)).replace(" ", "-")
        with self.world.database.transaction() as tx:
            submission = engine.Submission(input={}, start_at=start_at)
            plan = engine.submit_run(tx, find_workflow(tx, shape), submission)
        self.workers.publish([plan], chance.is_lost)
        return shape

    def visit(self, chance: Chance) -> str:
        """A visit of any task comes, of any canvas there was: late, or once more."""
        tasks = self.world.tasks()
        is_open = [task for task in tasks if task.status not in TASK_ENDED]
        task = chance.one_of(is_open if is_open and chance.random() < 0.9 else tasks)
        mail = Mail(task.id, chance.randint(1, task.generation), has_slot=chance.is_so)
        runs = chance.is_so
        self.workers.visit(mail, chance.is_lost, lambda _: runs)
        return f"{task.definition_id} {task.index}"

    def receive(self, chance: Chance) -> Any:
        """One of the oldest messages arrives."""
        mail = self.workers.mail
        if not mail:
            return IMPOSSIBLE
        mail.rotate(-chance.randrange(min(3, len(mail))))
        self.workers.visit(mail.popleft())

    def work(self, chance: Chance) -> Any:
        """So it does, and the task is done at once if it may start."""
        before = len(self.workers.held)
        if self.receive(chance) is IMPOSSIBLE:
            return IMPOSSIBLE
        for held in self.workers.held[before:]:
            self.workers.end(held, chance.one_of(HOW), lost=chance.is_lost)

    def end(self, chance: Chance) -> Any:
        """Whoever claimed a task, even if he has lost it, says what came of it."""
        held, how = chance.one_of(self.workers.held), chance.one_of(HOW)
        if held is None:
            return IMPOSSIBLE
        self.workers.end(held, how, chance.randrange(10), chance.is_lost)
        return f"{held.claimed.definition_id} {held.claimed.item_index} {how}"

    def decide(self, chance: Chance) -> Any:
        task = chance.one_of([task for task in self.world.tasks() if task.kind == "approval"])
        if task is None:
            return IMPOSSIBLE
        self.workers.decide(task.id, chance.is_so, chance.is_lost)

    # --- Trouble and upkeep

    def keep(self, chance: Chance) -> str:
        what: str = chance.one_of(UPKEEP)
        self.world.keep(what)
        return what

    def go_silent(self, chance: Chance) -> Any:
        held = chance.one_of(self.workers.held)
        if held is None:
            return IMPOSSIBLE
        more = ", deadline_at = now() - interval '1 s'" if chance.is_so else ""
        self.world.change(
            f"UPDATE tasks SET lease_expires_at = now() - interval '1 s'{more}"
            " WHERE id = :id AND attempt = :attempt AND status = 'running'",
            id=held.claimed.task_id,
            attempt=held.claimed.attempt,
        )
        if chance.is_so:
            self.world.keep("expire")

    def pass_an_hour(self, chance: Chance | None = None) -> None:
        self.world.change("SET LOCAL session_replication_role = replica", *AGED)

    def reach_deadline(self, chance: Chance) -> Any:
        run = chance.one_of([run for run in self.runs if run.deadline_at])
        if run is None:
            return IMPOSSIBLE
        self.world.change(f"UPDATE runs SET {MONTH_AGO} WHERE id = :id", id=run.id)

    def republish(self, chance: Chance) -> None:
        run = chance.one_of(self.runs)
        self.world.dispatcher.republish(run.id, run.generation)

    # --- Controls

    def refuse(self, chance: Chance) -> Any:
        """Somebody asks for what cannot be: he is told so, and nothing is changed."""
        name = chance.one_of(CONTROLS[:-1])
        run = chance.one_of([run for run in self.runs if refusal(name, run)])
        if run is None:
            return IMPOSSIBLE
        with pytest.raises(OpsCoreError) as refused:
            CALLS[name](self.world, run)
        assert refused.type is refusal(name, run)
        assert refused.value.data.get("status", run.status) == run.status
        assert self.world.run(run.id) == run
        DONE[f"{name} refused"] += 1

    def _may(self, name: str, chance: Chance) -> Any:
        """Return a run that the control is not refused of."""
        return chance.one_of([run for run in self.runs if not refusal(name, run)])

    def pause(self, chance: Chance) -> Any:
        run = self._may("pause", chance)
        if run is None:
            return IMPOSSIBLE
        CALLS["pause"](self.world, run)
        assert self.world.run(run.id).status == "paused"

    def resume(self, chance: Chance) -> Any:
        run = self._may("resume", chance)
        if run is None:
            return IMPOSSIBLE
        self._resume(run, chance.is_lost)

    def _resume(self, run: Any, lost: bool = False) -> None:
        plans = CALLS["resume"](self.world, run)
        assert self.world.run(run.id).status in ("queued", "running")
        self.workers.publish(plans, lost)

    def cancel(self, chance: Chance) -> Any:
        run = self._may("cancel", chance)
        if run is None:
            return IMPOSSIBLE
        CALLS["cancel"](self.world, run)
        assert self.world.run(run.id).cancel_requested_at is not None
        if not chance.is_lost:
            self.world.dispatcher.follow_end(run.id)

    def retry(self, chance: Chance) -> Any:
        # Of a sub-workflow whose task is over nobody would be told.
        failed = [run for run in self.runs if run.status == "failed" and not run.parent_task_id]
        if not failed:
            return IMPOSSIBLE
        run = chance.one_of(failed)
        if self._can_retry(run):
            return self._retry(run, chance.is_so, chance.is_lost)
        with pytest.raises(NothingToRetry):
            CALLS["retry"](self.world, run, {})
        return None

    def _can_retry(self, run: Any) -> bool:
        """Tell whether a task failed: not only the output, or at its deadline the run."""
        tasks = self.world.tasks(run.id)
        return any(
            t.status == "cancelled" or (t.status == "failed" and not t.goes_on) for t in tasks
        )

    def _retry(self, run: Any, has_overrides: bool = False, lost: bool = False) -> None:
        failed = [t for t in self.world.tasks(run.id) if t.status == "failed" and not t.goes_on]
        names = {t.definition_id for t in failed if t.kind in ("agent", "workflow", "for_each")}
        given = {name: {"n": run.generation} for name in names if has_overrides}
        plans = CALLS["retry"](self.world, run, given)
        for task in self.world.tasks(run.id):
            assert task.status not in ("cancelled", "running")
            assert task.status != "failed" or task.goes_on
            if task.definition_id in given and task.status not in TASK_ENDED:
                assert task.overrides["n"] == run.generation
        self.workers.publish(plans, lost)

    def rerun(self, chance: Chance) -> Any:
        if not self.has_room:
            return IMPOSSIBLE
        run = chance.one_of(self.runs)
        plan = CALLS["rerun"](self.world, run)
        again = self.world.run(plan.run_id)
        assert (again.rerun_of, again.version, again.input) == (run.id, run.version, run.input)
        assert self.world.run(run.id) == run
        self.workers.publish([plan], chance.is_lost)

    # --- What must hold

    @invariant()
    def nothing_contradicts_itself(self) -> None:
        self.workers.collect()
        assert self.world.rows(WRONG) == []
        assert self.world.rows(UNTOLD, since=self.told) == []
        self.told = self.world.rows("SELECT coalesce(max(n), 0) AS n FROM changes")[0].n
        self.runs = self.world.runs()
        self.has_room = len(self._open()) < MOST_OPEN and len(self.runs) < MOST_RUNS
        self.is_sound = True

    def teardown(self) -> None:
        """Have all of it end, and what failed complete when it is tried again."""
        if not self.is_sound:
            return
        self._come_to_an_end(doom=self.doom)
        failed = [r for r in self.world.runs() if r.status == "failed" and not r.parent_task_id]
        failed = [run for run in failed if self._can_retry(run)]
        for run in failed:
            self._retry(run)
        self._come_to_an_end()
        assert {self.world.run(run.id).status for run in failed} <= {"completed"}
        DONE["runs"] += len(self.runs)
        DONE["tried again to completion"] += len(failed)

    def _come_to_an_end(self, doom: int | None = None) -> None:
        """Go on until every run is over; the outcome with the number `doom` is a failure."""
        outcomes = iter(range(10_000))
        for run in self.world.runs():
            if refusal("resume", self.world.run(run.id)) is None:
                self._resume(run)
        self.nothing_contradicts_itself()
        for _ in range(ROUNDS):
            if not self._open():
                break
            self.pass_an_hour()
            for what in UPKEEP:
                self.world.keep(what)
            self._go_on(lambda: "breaks" if next(outcomes) == doom else "done")
            self.nothing_contradicts_itself()
        assert not self._open(), self._what_is_open()
        assert self.world.rows(LEFT_OVER) == []

    def _go_on(self, how: Callable[[], str]) -> None:
        """Do what a patient operator and workers do, until nothing more is sent."""
        for task in self.world.tasks():
            if (task.status, task.reason) == ("waiting", "approval"):
                self.workers.decide(task.id, True)
        self.workers.collect()
        while self.workers.held or self.workers.mail:
            if self.workers.held:
                self.workers.end(self.workers.held[-1], how())
            else:
                self.workers.visit(self.workers.mail.popleft())
            self.workers.collect()

    def _open(self) -> list[Any]:
        return [run for run in self.runs if run.status not in RUN_ENDED]

    def _what_is_open(self) -> list[Any]:
        return [
            (
                run.workflow_id,
                run.status,
                run.reason,
                task.definition_id,
                task.index,
                task.status,
                task.reason,
            )
            for run in self._open()
            for task in self.world.tasks(run.id)
            if task.status not in TASK_ENDED
        ]


@pytest.mark.timeout(0)
def test_whatever_happens_in_whatever_order_no_run_contradicts_itself_or_is_left_behind(
    world: World,
) -> None:
    bounded = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(SEED)(lambda: Interleaving(world)), settings=bounded)
    print(f"seed {SEED}:", dict(sorted(DONE.items())))
    assert DONE["examples"] >= EXAMPLES and DONE["steps"] > 5 * EXAMPLES
    assert min(DONE[name] for name in CONTROLS) > 0
