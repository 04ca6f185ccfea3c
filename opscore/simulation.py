"""A run played in this process, on a clock of its own: what the engine would make of it, without
servers.

A task is a generator that yields until when it waits. What is written down elsewhere is used:
documents, expressions, calls, and in what words outcomes are told. What the engine says in SQL only
is said here once more, beside the name of its place there; tests/test_testing_properties.py holds
the two against each other. Nothing is lost here, and backoff has no jitter: it is the longest.
"""

import json
from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any
from uuid import UUID

from opscore import work
from opscore.agentkit import Busy, Completed, Context, Failed, Outcome, timed_out
from opscore.definition import Busy as BusyWait
from opscore.definition import Child, Definition, Find, ForEach, Retry, TaskSpec
from opscore.errors import Invalid
from opscore.expressions import ExpressionError
from opscore.json_values import MAX_GATHERED_BYTES, fresh
from opscore.states import RUN_ENDED, TASK_ENDED, Reason
from opscore.work import Claimed, Failure, Wait

LEAST_REST_SECONDS = 0.1  # as in engine.clauses

Json = dict[str, Any]


class NotFaked(Exception):
    """The run asks for somebody whom the test did not give."""


# --- What came of it -----------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Task:
    """What became of a task, or of an item of one. Moments are seconds from the beginning."""

    id: str
    index: int | None = None
    """Of an item of a `forEach`."""
    status: str = "pending"
    reason: str | None = None
    output: Any = None
    error: Json | None = None
    """`{code, message}`"""
    attempts: int = 0
    """How often it was an agent's turn; that it was busy counts."""
    agent_id: str | None = None
    started: float | None = None
    finished: float | None = None
    items: Sequence["Task"] = field(default_factory=list)
    child: "Run | None" = None
    """The run of a sub-workflow."""

    @property
    def name(self) -> str:
        return self.id if self.index is None else f"{self.id}[{self.index}]"

    def __repr__(self) -> str:
        return _shown(self.name, self.status, self.reason, self.error, *self.items)


@dataclass(eq=False, repr=False)
class Run:
    """What became of a run."""

    id: str
    workflow_id: str
    status: str = "queued"
    output: Any = None
    error: Json | None = None
    """`{code, message}`, with `taskDefinitionId` if it failed with a task."""
    seconds: float = 0.0
    """How long it would have taken, at most."""
    tasks: Mapping[str, Task] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """The tasks that started, in that order; of a `forEach` also its items: `triage[0]`."""
    _calls: Mapping[str, list[Json]] = field(default_factory=dict)

    def calls(self, agent_id: str) -> list[Json]:
        """Return the parameters of each call of an agent, in order, those of sub-workflows too.

        Raises:
            KeyError: no such agent was given.
        """
        return self._calls[agent_id]

    def __repr__(self) -> str:
        return _shown("Run", self.workflow_id, self.status, self.error, *self.tasks.values())


def _shown(*said: object) -> str:
    return f"<{' '.join(str(one) for one in said if one)}>"


# --- What plays ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Agent:
    """An agent: `call` does its work, and says how many seconds that takes."""

    id: str
    call: Callable[[Json, Context], tuple[Outcome, float]]
    capabilities: frozenset[str]
    capacity: int | None = None
    is_away: bool = False
    calls: list[Json] = field(default_factory=list)
    held: int = 0
    freed_at: float = -inf


@dataclass(frozen=True, slots=True)
class Decision:
    """What somebody says of an approval, so many seconds after he was asked."""

    approved: bool
    comment: str | None
    by: str
    seconds: float = 0.0


Life = Generator[float, None, Completed | Failed | Failure | None]
"""Yields until when a task waits, `inf` if somebody is to have it go on; returns what it came to,
None if it has nothing to show because its run ends."""


@dataclass(eq=False, repr=False, kw_only=True)
class _Row(Task):
    """A task under way, as the engine's row has it."""

    run: "_Play"
    spec: TaskSpec
    number: int
    life: Generator[float] = field(init=False)
    turn: int = 0
    """How often it went on: who was to have it go on from an earlier wait is too late."""
    before: list["_Row"] = field(default_factory=list)
    after: list["_Row"] = field(default_factory=list)
    parent: "_Row | None" = None
    item: Any = None
    items: list["_Row"] = field(default_factory=list)
    held_back: deque["_Row"] = field(default_factory=deque)
    open_items: int = 0
    child: "_Play | None" = None
    decision: Json | None = None
    waiting_since: float = inf
    """For an agent."""
    ends_run: bool = False

    def move(self, status: str, reason: str | None = None) -> None:
        self.status, self.reason = status, reason and str(reason)

    def read(self) -> Json:
        """Return what expressions see of it."""
        return {"output": self.output, "status": self.status, "error": self.error}


@dataclass(eq=False, repr=False, kw_only=True)
class _Play(Run):
    """A run under way."""

    definition: Definition
    input: Any
    agent_id: str | None
    parent: _Row | None
    began_at: float
    tasks: dict[str, _Row] = field(default_factory=dict)
    open: dict[_Row, None] = field(default_factory=dict)
    """Tasks and items that are not over."""
    is_cancelled: bool = False
    is_held: bool = True
    """It waits by `maxConcurrentRuns`."""

    @property
    def above(self) -> list[str]:
        """The workflows of the runs it stands below, and its own."""
        return [*(self.parent.run.above if self.parent else ()), self.workflow_id]

    @property
    def is_alive(self) -> bool:
        """Whether it is neither over nor ending: engine.clauses.RUN_ALIVE."""
        return not (self.status in RUN_ENDED or self.is_cancelled or self.error)


class Simulation:
    """The runs of one test, their agents and their clock."""

    def __init__(
        self, agents: Iterable[Agent], find: Find, said: Mapping[str, Decision], start: datetime
    ) -> None:
        self._agents = {agent.id: agent for agent in agents}
        self._find, self._said, self._start = find, said, start
        self._now = 0.0
        self._moments: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count(1)
        self._in_line: list[_Row] = []
        self._held: defaultdict[str, list[_Play]] = defaultdict(list)
        self._under_way: Counter[str] = Counter()
        self._unasked: list[str] = []

    def play(self, workflow_id: str, input: Any, agent_id: str | None) -> Run:
        """Play a run of a workflow to its end.

        Raises:
            InvalidInput, InvalidRequest: the run would be refused.
            NotFaked: it asks for an agent or an approval that nobody gave.
        """
        run = self._submit(workflow_id, input, agent_id=agent_id)
        while self._moments:
            self._now, _, do = heappop(self._moments)
            do()
        if run.status not in RUN_ENDED:
            ways = ", ".join(f"{id!r}: approve()" for id in dict.fromkeys(self._unasked))
            raise NotFaked(f"It waits for somebody's word for ever: pass approvals={{{ways}}}.")
        return run

    def _at(self, moment: float, do: Callable[[], None]) -> None:
        """Have something happen then; of what happens at one moment, what was said first."""
        heappush(self._moments, (max(self._now, moment), next(self._numbers), do))

    def _go_on(self, task: _Row, moment: float = 0.0) -> None:
        """Have a task go on, at once or then, unless it did before, or is over."""
        self._at(moment, partial(self._resume, task, task.turn))

    def _resume(self, task: _Row, turn: int) -> None:
        if task.turn == turn and task in task.run.open:
            task.turn += 1
            if (moment := next(task.life, inf)) < inf:
                self._go_on(task, moment)

    # --- Runs

    def _submit(
        self,
        workflow_id: str,
        input: Any,
        *,
        agent_id: str | None = None,
        parent: _Row | None = None,
        child: Child | None = None,
    ) -> _Play:
        """Accept a run: engine.runs.submit_run."""
        definition = self._find(workflow_id, child.version if child else None)
        definition.check_input(input)
        if agent_id is None:
            definition.check_bound()
        run = _Play(
            id=str(UUID(int=next(self._numbers))),
            workflow_id=workflow_id,
            definition=definition,
            input=as_stored(input),
            agent_id=agent_id,
            parent=parent,
            began_at=self._now,
            _calls={agent.id: agent.calls for agent in self._agents.values()},
        )
        for spec in definition.tasks:
            run.tasks[spec.id] = task = self._row(run, spec)
            task.before = [run.tasks[id] for id in spec.depends_on]
            for earlier in task.before:
                earlier.after.append(task)
        if seconds := (child and child.timeout_seconds) or definition.deadline_seconds:
            self._at(self._now + seconds, partial(self._reach_deadline, run))
        self._held[workflow_id].append(run)
        self._release(workflow_id)
        return run

    def _row(self, run: _Play, spec: TaskSpec, **more: Any) -> _Row:
        row = _Row(id=spec.id, run=run, spec=spec, number=next(self._numbers), **more)
        row.life = self._live(row)
        run.open[row] = None
        return row

    def _release(self, workflow_id: str) -> None:
        """Begin the runs whose turn it is: engine.runs.release_runs."""
        most = self._find(workflow_id, None).max_concurrent_runs or inf
        while self._held[workflow_id] and self._under_way[workflow_id] < most:
            run = self._held[workflow_id].pop(0)
            run.is_held = False
            self._under_way[workflow_id] += 1
            for task in run.tasks.values():
                if not task.before:
                    self._go_on(task)

    def _settle(self, run: _Play) -> None:
        """End a run nothing of which is open: engine.outcomes._SETTLED, engine.runs.settle_run."""
        if run.open or run.status in RUN_ENDED:
            return
        if run.is_alive:
            end = self._claimed(next(iter(run.tasks.values())), is_end=True)
            output, why = work.run_result(end, lambda: run.definition, None)
            run.output, run.error = as_stored(output), work.as_error(why) if why else None
        run.status = "cancelled" if run.is_cancelled else "failed" if run.error else "completed"
        run.seconds = self._now - run.began_at
        if run.parent is not None:
            self._go_on(run.parent)
        if run.is_held:
            self._held[run.workflow_id].remove(run)
        else:
            self._under_way[run.workflow_id] -= 1
            self._release(run.workflow_id)

    def _reach_deadline(self, run: _Play) -> None:
        """Let a run fail that is not over: engine.controls.fail_overdue_run."""
        if run.is_alive:
            sentence = "The run was not over at its deadline."
            run.error = {"code": "deadline_exceeded", "message": sentence}
            self._close(run, "deadline_exceeded")
            self._settle(run)

    def _close(self, run: _Play, reason: str) -> None:
        """Cancel what has not started, sub-workflows too: engine.outcomes.close_tasks."""
        for task in list(run.open):
            if task.status == "running":
                task.ends_run = True
                continue
            self._end(task, "cancelled", reason)
            if task.child is not None and task.child.status not in RUN_ENDED:
                task.child.is_cancelled = True
                self._close(task.child, "run_cancelled")
                self._settle(task.child)

    # --- Tasks

    def _live(self, task: _Row) -> Generator[float]:
        """Take a task from its first visit to its end: workers.tasks._visit."""
        try:
            if why := self._skips(task):
                self._end(task, "skipped", why)
                return self._follow(task)
            outcome = yield from self._work(task)
        except ExpressionError as error:
            outcome = Failed("expression_error", str(error))
        match outcome:
            case Completed(output):
                task.output = as_stored(output)
                self._end(task, "completed")
            case None:  # it has nothing to show, and its run ends: engine.outcomes._END_TASK
                why = (task.run.error or {}).get("code")
                why = why if why == "deadline_exceeded" else "upstream_failed"
                self._end(task, "cancelled", "run_cancelled" if task.run.is_cancelled else why)
            case _:
                self._fail(task, {"code": outcome.code, "message": outcome.message})
        self._follow(task)

    def _skips(self, task: _Row) -> str | None:
        """Say why a task is skipped: workers.tasks._decide. Raises ExpressionError."""
        if task.parent is not None:
            return None
        if {before.status for before in task.before} == {"skipped"}:
            return "upstream_skipped"
        return None if work.holds(self._claimed(task), task.spec) else "when"

    def _work(self, task: _Row) -> Life:
        """Do it: workers.tasks._result."""
        if task.spec.for_each and task.parent is None:
            return self._do_each(task, task.spec.for_each)
        return self._have_done(task) if task.spec.type == "agent" else self._wait(task)

    def _begin(self, task: _Row) -> None:
        if task.started is None:
            task.started = self._now
            task.run.order.append(task.name)

    def _end(self, task: _Row, status: str, reason: str | None = None) -> None:
        if task.status == "waiting" and task in self._in_line:
            self._in_line.remove(task)
        task.move(status, reason)
        task.finished = self._now
        del task.run.open[task]
        if task.parent is not None:
            task.parent.open_items -= 1

    def _follow(self, task: _Row) -> None:
        """Do what the end of a task asks for: dispatch.Dispatcher.follow."""
        for later in task.after:
            if all(before.status in TASK_ENDED for before in later.before):
                self._go_on(later)
        parent = task.parent
        if parent is not None and not parent.open_items:
            self._go_on(parent)
        elif parent is not None and parent in parent.run.open and parent.held_back:
            item = parent.held_back.popleft()
            item.move("pending")
            self._go_on(item)
        self._settle(task.run)

    def _fail(self, task: _Row, error: Json) -> None:
        """Let a task fail for good, and its run unless it goes on: engine.outcomes.end_task."""
        run, parent, task.error = task.run, task.parent, error
        if run.is_cancelled:
            return self._end(task, "cancelled", "run_cancelled")
        self._end(task, "failed")
        if not run.is_alive or _is_tolerated(task):
            return
        if parent is not None and task.index is not None:
            is_one_too_many = _tolerates(parent) is not None
            each = work.failed_with_item(task.index, error, is_one_too_many=is_one_too_many)
            self._end(parent, "failed")
            parent.error, error = each, each if is_one_too_many else error
        run.error = work.failed_with_task(UUID(int=task.number), task.id, error)
        self._close(run, "upstream_failed")

    def _claimed(self, task: _Row, *, is_end: bool = False) -> Claimed:
        """Return a task, or the implicit end of its run, as the engine hands it out.

        What nobody reads of it here is None.
        """
        run, child, seconds = task.run, task.child, task.spec.timeout_seconds
        reads = run.tasks if is_end else task.spec.references
        known: Json = {
            **dict.fromkeys(Claimed.__slots__),
            "task_id": UUID(int=task.number),
            "run_id": UUID(run.id),
            "kind": "end" if is_end else task.spec.type,
            "definition_id": task.id,
            "item_index": task.index,
            "item": task.item,
            "merges_input": run.agent_id is not None and task.spec is run.definition.tasks[0],
            "workflow_id": run.workflow_id,
            "deadline_at": self._start + timedelta(seconds=self._now + seconds),
            "decision": task.decision,
            "child": vars(child) | {"runId": child.id} if child else None,
            "input": run.input,
            "tasks": {id: run.tasks[id].read() for id in reads},
        }
        return Claimed(**known)

    # --- What no agent does

    def _do_each(self, task: _Row, each: ForEach) -> Life:
        """Have a `forEach` done, item by item: engine.outcomes.expand_task."""
        self._begin(task)
        values = work.items(self._claimed(task), each.items)
        if not values:
            return Completed([])
        task.move("waiting", "children")
        task.open_items = len(values)
        for index, value in enumerate(values):
            item = self._row(task.run, task.spec, parent=task, index=index, item=as_stored(value))
            task.items.append(item)
            if index < (each.max_parallel or inf):
                self._go_on(item)
            else:
                item.move("waiting", "max_parallel")
                task.held_back.append(item)
        yield inf
        return _collected(task)

    def _wait(self, task: _Row) -> Life:
        """Wait for a decision, a moment, or the run of a sub-workflow: engine.steps."""
        self._begin(task)
        begun = work.begin(self._claimed(task), task.spec)
        if isinstance(begun, Wait):
            task.move("waiting", begun.reason)
            yield self._until(task, begun)
        else:
            child = begun.child
            try:
                work.check_nesting(child.workflow_id, task.run.above)
                run = self._submit(child.workflow_id, begun.input, parent=task, child=child)
            except (Invalid, work.CannotNest) as error:
                return work.not_begun(error)
            task.child = run
            task.move("waiting", "children")
            yield inf
        return work.finish(self._claimed(task), task.spec)

    def _until(self, task: _Row, wait: Wait) -> float:
        """Say until when it waits: until somebody decides, if he does so in time."""
        until = inf if wait.seconds is None else self._now + wait.seconds
        if wait.until is not None:
            until = (wait.until - self._start).total_seconds()
        said = self._said.get(task.id) if wait.reason == Reason.APPROVAL else None
        if said is not None and self._now + said.seconds < until:
            decision = {"approved": said.approved, "comment": said.comment, "principal": said.by}
            task.decision, until = decision, self._now + said.seconds
        elif until == inf:
            self._unasked.append(task.id)
        return until

    # --- What an agent does

    def _have_done(self, task: _Row) -> Life:
        """Have an agent do it, as often as it may be tried: engine.outcomes.fail_attempt."""
        retry, tries = task.spec.retry, 0
        while True:
            outcome = yield from self._attempt(task, tries)
            if not isinstance(outcome, Failed) or not outcome.retryable:
                return outcome
            if task.ends_run or tries + 1 >= retry.max_attempts:
                return outcome
            task.move("waiting", "retry")
            task.waiting_since = inf
            yield self._now + _backoff(outcome.retry_after, retry, tries)
            tries += 1

    def _attempt(self, task: _Row, tries: int) -> Life:
        """Make one attempt that counts, waiting for agents that are busy: engine.claims._CLAIM,
        engine.waits.park_task, engine.outcomes.release_attempt."""
        busy, waits = task.spec.busy, 0
        while True:
            there, until = self._candidates(task), inf
            free = [(n, one) for n, one in there if one.held < (one.capacity or inf)]
            if free:
                agent = min(free, key=partial(_rank, task, tries))[1]
                outcome = yield from self._call(task, agent)
                if not isinstance(outcome, Busy):
                    return outcome
                if task.ends_run:
                    return None
                rest = _backoff(outcome.retry_after, busy, waits)
                until = self._now + max(LEAST_REST_SECONDS, rest)
            reason = Reason.AGENT_BUSY if there else Reason.AGENT_UNAVAILABLE
            task.move("waiting", reason)
            task.waiting_since = min(task.waiting_since, self._now)
            if not free:
                insort(self._in_line, task, key=lambda one: (one.waiting_since, one.number))
            overdue_at = task.waiting_since + busy.max_wait_seconds
            yield min(until, overdue_at)
            if until >= overdue_at and (free or task in self._in_line):
                return work.waited_too_long(reason)
            waits += 1

    def _candidates(self, task: _Row) -> list[tuple[int, Agent]]:
        """Return who may be asked: `fallback`, by its place, while nobody who is wanted is there.

        Raises:
            NotFaked: nobody was given that could be asked.
        """
        spec = task.spec
        wanted = [id for id, one in self._agents.items() if spec.capability in one.capabilities]
        if spec.capability is None:
            wanted = [str(spec.agent_id or task.run.agent_id)]
        there = [(0, agent) for agent in self._there(task, wanted or [str(spec.capability)])]
        return there or list(enumerate(self._there(task, spec.fallback), 1))

    def _there(self, task: _Row, ids: Iterable[str]) -> list[Agent]:
        for id in ids:
            if id not in self._agents:
                way = f"pass agents={{{id!r}: fake(...)}}, or a function (parameters, context)"
                raise NotFaked(f"Task {task.name!r} asks for {id!r}, whom nobody fakes: {way}.")
        return [self._agents[id] for id in ids if not self._agents[id].is_away]

    def _call(self, task: _Row, agent: Agent) -> Generator[float, None, Outcome]:
        """Call an agent, and let the time pass that this takes: workers.tasks._call."""
        self._begin(task)
        task.move("running")
        task.attempts, task.agent_id = task.attempts + 1, agent.id
        claimed, limit = self._claimed(task), task.spec.timeout_seconds
        try:
            parameters = work.parameters(claimed, task.spec)
        except ExpressionError as error:
            return Failed("expression_error", str(error), retryable=False)
        ids = {"run_id": task.run.id, "task_id": str(claimed.task_id)}
        context = Context(**ids, attempt=task.attempts, deadline=claimed.deadline_at)
        agent.held += 1
        agent.calls.append(fresh(parameters))
        outcome, seconds = agent.call(parameters, context)
        if seconds >= limit:
            outcome, seconds = timed_out(limit), limit
        yield self._now + seconds
        self._at(self._now, partial(self._free, agent))
        return outcome

    def _free(self, agent: Agent) -> None:
        """Have who waits longest go on with an agent that is free: engine.waits.wake_line."""
        agent.held -= 1
        agent.freed_at = self._now
        for task in self._in_line:
            if any(one is agent for _, one in self._candidates(task)):
                self._in_line.remove(task)
                return self._resume(task, task.turn)


# --- Rules that ask nobody -----------------------------------------------------------------------


def as_stored(value: Any) -> Any:
    """Return JSON as PostgreSQL's jsonb gives it back: keys by length, large numbers without .0."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return {key: as_stored(value[key]) for key in keys}
    if isinstance(value, list):
        return [as_stored(item) for item in value]
    if isinstance(value, float):
        return int(value) if 1e16 <= abs(value) < 2**63 else value + 0.0
    return value


def _backoff(asked: float | None, how: Retry | BusyWait, exponent: int) -> float:
    """Return what an agent asked for, else backoff without jitter: engine.clauses.backoff."""
    longest = how.backoff_seconds * 2.0 ** min(exponent, 30)
    return min(how.max_backoff_seconds, longest) if asked is None else asked


def _rank(task: _Row, tries: int, one: tuple[int, Agent]) -> tuple[Any, ...]:
    """Order agents that are free, the first one first: engine.claims._CLAIM."""
    place, agent = one
    is_preferred = place == 0 and agent.id == task.run.agent_id
    has_just_failed = tries > 0 and agent.id == task.agent_id
    load = (has_just_failed, agent.held, agent.freed_at) if agent.capacity is not None else ()
    return (agent.capacity is None, not is_preferred, place, *load, agent.id)


def _tolerates(task: _Row) -> int | None:
    each = task.spec.for_each
    return each.tolerated(len(task.items)) if each else None


def _is_tolerated(task: _Row) -> bool:
    """Whether its run, or its `forEach`, may go on without it: engine.outcomes._EXCEEDED."""
    most = _tolerates(task.parent) if task.parent else None
    if most is None or task.parent is None or task.spec.on_failure == "continue":
        return task.spec.on_failure == "continue"
    return sum(item.status == "failed" for item in task.parent.items) <= most


def _collected(task: _Row) -> Completed | Failed:
    """Collect a `forEach`'s items: engine.outcomes.item_outputs."""
    done = [item.output for item in task.items if item.status == "completed"]
    size = sum(len(json.dumps(output, ensure_ascii=False).encode()) for output in done)
    if size > MAX_GATHERED_BYTES:
        return work.too_much_collected()
    failed = sum(item.status == "failed" for item in task.items)
    return work.collected([item.output for item in task.items], failed, task.spec)
