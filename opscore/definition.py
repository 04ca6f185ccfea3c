"""Workflow documents: what can be wrong with one, and the graph of tasks it becomes. Pure.

Owns every default and limit of a definition. Refuses, all faults at once and each under its JSON
Pointer, what could not run: unknown keys, dangling ids, circles, expressions that read what is
not there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import heappop, heappush
from math import isfinite
from typing import Any, Literal

from opscore.errors import (
    InvalidDefinition,
    InvalidInput,
    InvalidRequest,
    WorkflowArchived,
    WorkflowNotFound,
)
from opscore.expressions import ITEM_NAMES, NAMES, Template
from opscore.input_schema import Schema
from opscore.json_values import Faults, at, check_json, kind, read_json, read_yaml, unknown

MAX_TASKS = 5_000
MAX_SECONDS = 2_592_000.0
"""30 days: no wait, timeout or backoff may be longer."""
DEFAULT_TIMEOUT_SECONDS = 600.0
MAX_ATTEMPTS = 100
MAX_PARALLEL = 1_000
MAX_FALLBACKS = 16
MAX_CONCURRENT_RUNS = 10_000
"""Each of them is a row that creating the workflow writes."""
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOP = {"id", "name", "description", "version", "inputSchema", "tasks", "output"}
_TOP |= {"maxConcurrentRuns", "deadlineSeconds"}
_EVERY_TASK = {"taskId", "name", "type", "dependsOn", "nextTaskId", "when", "onFailure"}
_TYPES: Mapping[str, set[str]] = {
    "agent": {
        *("agentId", "agentCapability", "fallback", "forEach", "parameters"),
        *("retry", "busy", "timeoutSeconds"),
    },
    "approval": {"timeoutSeconds", "onTimeout"},
    "delay": {"seconds", "until"},
    "workflow": {"workflowId", "version", "forEach", "parameters", "timeoutSeconds"},
}
"""What each type of task may say beside what all may."""
CONTROL_TIMEOUT_SECONDS = 60.0
"""Of the visits of tasks that no agent does."""
PERCENTAGE = r"^[0-9]{1,3}(\.[0-9]{1,3})?%$"
_PERCENTAGE = re.compile(PERCENTAGE, re.ASCII)
_BACKOFF = ("backoffSeconds", "maxBackoffSeconds")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often to try, and how long to wait between: doubling, full jitter."""

    max_attempts: int = 3
    backoff_seconds: float = 2.0
    max_backoff_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Busy:
    """How long to wait for a busy agent: each time doubling with full jitter, and altogether."""

    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    max_wait_seconds: float = 86_400.0


_RETRY, _BUSY = Retry(), Busy()


@dataclass(frozen=True, slots=True)
class ForEach:
    """One row per item; `items` renders to a list, `max_parallel` None means all at once."""

    items: Template
    max_parallel: int | None = None
    tolerate: int | str | None = None
    """How many items may fail: a number, or a percentage as text; None: `onFailure` decides."""

    def tolerated(self, count: int) -> int | None:
        """Return how many of so many items may fail."""
        if isinstance(self.tolerate, str):
            return int(count * float(self.tolerate[:-1]) / 100)
        return self.tolerate


@dataclass(frozen=True, slots=True)
class Approval:
    """Somebody is to say yes or no; None: however long it takes."""

    timeout_seconds: float | None
    on_timeout: Literal["reject", "approve"]


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait `seconds`, a number, or `until`, a moment in ISO 8601; the other is None."""

    seconds: Template | None
    until: Template | None


@dataclass(frozen=True, slots=True)
class Child:
    """Run another workflow, its newest version unless one is named; None: however long it takes."""

    workflow_id: str
    version: int | None
    timeout_seconds: float | None


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One node. Naming neither agent nor capability, it can run only for an agent's own trigger."""

    id: str
    name: str | None
    agent_id: str | None
    capability: str | None
    parameters: Template
    depends_on: tuple[str, ...]
    type: str = "agent"
    does: Approval | Delay | Child | None = None
    """What is done; None: an agent does it."""
    when: Template | None = None
    may_be_skipped: bool = False
    """By its own `when`, or because all that it depends on may be."""
    for_each: ForEach | None = None
    retry: Retry = _RETRY
    busy: Busy = _BUSY
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    on_failure: Literal["fail", "continue"] = "fail"
    fallback: tuple[str, ...] = ()
    """Agents that are asked, in this order, while none of those it names is available."""

    def templates(self) -> list[Template]:
        """Return all that is rendered for it."""
        found = [self.parameters, self.for_each and self.for_each.items, self.when]
        if isinstance(self.does, Delay):
            found += [self.does.seconds, self.does.until]
        return [template for template in found if template]

    @property
    def references(self) -> frozenset[str]:
        """The ids of the tasks that it reads."""
        return frozenset().union(*(template.references for template in self.templates()))


@dataclass(frozen=True, slots=True)
class Definition:
    """A document found good. `tasks` come in topological order, stable to the order listed."""

    id: str | None
    name: str | None
    description: str | None
    label: str | None
    document: Mapping[str, Any]
    input_schema: Mapping[str, Any] | None
    tasks: tuple[TaskSpec, ...]
    output: Template | None
    output_references: frozenset[str]
    leaves: tuple[str, ...]
    max_concurrent_runs: int | None
    """Runs of it that are under way at once; the others wait their turn."""
    deadline_seconds: float | None
    """A run that is not over so long after it was submitted, or its `startAt`, fails."""
    _schema: Schema | None = field(repr=False, compare=False)
    _by_id: Mapping[str, TaskSpec] = field(repr=False, compare=False)

    def task(self, id: str) -> TaskSpec:
        """Return a task. Raises KeyError."""
        return self._by_id[id]

    def check_input(self, value: Any) -> None:
        """Accept a run's input. Raises InvalidInput with every fault, under /input."""
        if faults := check_json(value, "/input"):
            raise InvalidInput(faults, "The input cannot be stored.")
        if self._schema and (faults := self._schema.check(value, "/input")):
            raise InvalidInput(faults)

    def unbound(self) -> tuple[str, ...]:
        """Return the ids of the tasks that name neither agent nor capability."""
        return tuple(
            t.id
            for t in self.tasks
            if t.type == "agent" and t.agent_id is None and t.capability is None
        )

    def check_bound(self) -> None:
        """Make sure that each task names who is to do it. Raises InvalidRequest."""
        sentence = "The task names neither agentId nor agentCapability: name one, or trigger the"
        if unbound := self.unbound():
            raise InvalidRequest(
                {f"/tasks/{task}": [f"{sentence} workflow for an agent."] for task in unbound}
            )

    def children(self) -> Iterator[tuple[str, Child]]:
        """Yield the tasks that run another workflow, with which."""
        for task in self.tasks:
            if isinstance(task.does, Child):
                yield task.id, task.does


def read_document(raw: bytes | str, kind: Literal["json", "yaml"]) -> Any:
    """Read a document's text. Raises InvalidDefinition naming line and column."""
    try:
        return read_json(raw) if kind == "json" else read_yaml(raw)
    except ValueError as error:
        raise InvalidDefinition({"": [str(error)]}) from None


def parse(document: Any, *, is_stored: bool = False) -> Definition:
    """Turn a document into a definition. Raises InvalidDefinition with every fault.

    Of a stored one the inputSchema was checked when it came; it is compiled when it is used.
    """
    faults = check_json(document)
    if faults.fatal:
        raise InvalidDefinition(faults)
    top = _Fields(document, "", _TOP, faults)
    if not top.is_object:
        raise InvalidDefinition(faults)
    schema = None
    if (shape := top.get("inputSchema", dict)) is not None:
        schema = Schema(shape) if is_stored else Schema.compile(shape, "/inputSchema", faults)
    output = Template.compile(top.values["output"], "/output", faults) if "output" in top else None
    rows = _rows(top)
    specs = [_task(row) for row in rows]
    if not is_stored:
        _check_to_come(rows, specs)
    graph = _Graph(rows, faults)
    graph.check_tasks(specs)
    graph.check_reads(output.reads if output else (), None)
    id, name, description, label = (
        top.id("id"),
        *(top.get(key, str) for key in ("name", "description", "version")),
    )
    max_concurrent_runs = top.whole("maxConcurrentRuns", MAX_CONCURRENT_RUNS)
    deadline_seconds = top.seconds_or_none("deadlineSeconds")
    _check_own_id(top, rows)
    if faults:
        raise InvalidDefinition(faults)
    tasks = _sorted(specs, graph)
    depended_on = {id for task in tasks for id in task.depends_on}
    return Definition(
        id=id,
        name=name,
        description=description,
        label=label,
        document=document,
        input_schema=shape,
        tasks=tasks,
        output=output,
        output_references=output.references if output else frozenset(),
        leaves=tuple(task.id for task in tasks if task.id not in depended_on),
        max_concurrent_runs=max_concurrent_runs,
        deadline_seconds=deadline_seconds,
        _schema=schema,
        _by_id={task.id: task for task in tasks},
    )


def _sorted(specs: list[TaskSpec], graph: "_Graph") -> tuple[TaskSpec, ...]:
    """Put the tasks in order, each with what it depends on and whether it may be skipped."""
    found: dict[str, TaskSpec] = {}
    for n in graph.order:
        depends_on = graph.depends_on(n)
        follows_skipped = bool(depends_on) and all(found[id].may_be_skipped for id in depends_on)
        may = specs[n].when is not None or follows_skipped
        found[specs[n].id] = replace(specs[n], depends_on=depends_on, may_be_skipped=may)
    return tuple(found.values())


def _check_own_id(top: "_Fields", rows: list["_Fields"]) -> None:
    for row in rows:
        if "id" in top and row.values.get("workflowId") == top.values["id"]:
            row.fault("workflowId", "A workflow cannot run itself; name another one.")


# --- what a store asks


def id_of(definition: Definition) -> str:
    """Return the id a definition is stored under: its own, else one made from its name.

    Raises:
        InvalidDefinition: it has neither.
    """
    if definition.id is not None:
        return definition.id
    slug = re.sub(r"[^a-z0-9]+", "-", (definition.name or "").lower()).strip("-")
    if not slug:
        raise InvalidDefinition({"/id": ["Give the workflow an id, or a name to make one from."]})
    return f"wf_{slug}"[:64]


Find = Callable[[str, int | None], Definition]
"""Returns a version of a workflow, the newest by default. Raises WorkflowNotFound."""


def check_children(workflow_id: str, definition: Definition, find: Find) -> None:
    """Make sure that the workflows a definition runs are there, and do not lead back to it.

    `find` returns one of them, or raises WorkflowNotFound or WorkflowArchived.

    Raises:
        InvalidDefinition
    """
    faults = {}
    places = {task["taskId"]: n for n, task in enumerate(definition.document["tasks"])}
    for task, child in definition.children():
        if sentence := _why_no_child(workflow_id, child, find):
            faults[f"/tasks/{places[task]}/workflowId"] = [sentence]
    if faults:
        raise InvalidDefinition(faults)


def _why_no_child(workflow_id: str, child: Child, find: Find) -> str | None:
    seen: set[tuple[str, int | None]] = set()
    ways = [[(child.workflow_id, child.version)]]
    while ways:
        way = ways.pop()
        if way[-1][0] == workflow_id:
            circle = " → ".join([workflow_id, *(id for id, _ in way)])
            return f"This leads back to the workflow itself: {circle}; name another one."
        if way[-1] in seen:
            continue
        seen.add(way[-1])
        try:
            found = find(*way[-1])
        except (WorkflowNotFound, WorkflowArchived) as error:
            if len(seen) == 1:
                is_missing = isinstance(error, WorkflowNotFound)
                return f"{error} Create it first." if is_missing else str(error)
            continue
        ways += [[*way, (below.workflow_id, below.version)] for _, below in found.children()]
    return None


# --- fields


class _Fields:
    """One object of the document: its keys checked, its values handed out by type."""

    def __init__(self, value: Any, pointer: str, known: set[str], faults: Faults) -> None:
        self.pointer = pointer
        self.faults = faults
        self.is_object = isinstance(value, dict)
        self.values: Mapping[str, Any] = value if self.is_object else {}
        if not self.is_object:
            faults.add(pointer, f"This must be an object, not {kind(value)}.")
        for key in self.values:
            if key not in known:
                faults.add(at(pointer, key), unknown(key, known, "There is no key"))

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def fault(self, key: str, sentence: str) -> None:
        self.faults.add(at(self.pointer, key), sentence)

    def get(self, key: str, wanted: type) -> Any:
        """Return a value of that type; None, and a fault unless it is absent, if it is not."""
        if key not in self.values or isinstance(self.values[key], wanted):
            return self.values.get(key)
        hint = "text (put quotes around it)" if wanted is str else kind(wanted())
        self.fault(key, f"This must be {hint} or be left out; it is {kind(self.values[key])}.")
        return None

    def id(self, key: str, required: bool = False) -> str | None:
        value: str | None = self.get(key, str)
        if value is None and required and key not in self.values:
            self.fault(key, f"Each task needs a {key}.")
        elif value is not None and not _ID.fullmatch(value):
            self.fault(key, "Ids have 1 to 64 letters, digits, or the signs _ . and -")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        value = self.values.get(key, choices[0])
        if value in choices:
            return value
        self.fault(key, f"This must be {' or '.join(map(repr, choices))}.")
        return choices[0]

    def seconds(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and isfinite(value) and 0 < value <= MAX_SECONDS:
            return float(value)
        self.fault(key, f"This must be a number of seconds above 0, at most {MAX_SECONDS:,.0f}.")
        return default

    def seconds_or_none(self, key: str) -> float | None:
        return self.seconds(key, DEFAULT_TIMEOUT_SECONDS) if key in self else None

    def whole(self, key: str, most: int) -> int | None:
        value = self.values.get(key)
        if type(value) is int and 1 <= value <= most:
            return value
        if key in self.values:
            self.fault(key, f"This must be a whole number from 1 to {most:,}.")
        return None

    def inner(self, key: str, *known: str) -> "_Fields":
        return _Fields(self.values.get(key, {}), at(self.pointer, key), set(known), self.faults)

    def condition(self, key: str) -> Template | None:
        source = self.get(key, str)
        if source is None:
            return None
        if source.startswith("${"):
            self.fault(key, "Here the expression stands by itself: write it without ${ and }.")
            return None
        return Template.condition(source, at(self.pointer, key), self.faults)

    def template(self, key: str, names: frozenset[str] = NAMES) -> Template:
        return Template.compile(self.values.get(key, {}), at(self.pointer, key), self.faults, names)


# --- tasks


def _rows(top: _Fields) -> list[_Fields]:
    tasks = top.get("tasks", list)
    if tasks is not None and len(tasks) > MAX_TASKS:
        top.fault("tasks", f"There are {len(tasks):,} tasks; at most {MAX_TASKS:,} are allowed.")
        return []
    if tasks == [] or "tasks" not in top:
        top.fault("tasks", "A workflow needs a list of at least one task.")
    rows = [
        _Fields(t, at("/tasks", n), _EVERY_TASK | _own_keys(t), top.faults)
        for n, t in enumerate(tasks or ())
    ]
    return [row for row in rows if row.is_object]


def _own_keys(task: Any) -> set[str]:
    type = task.get("type", "agent") if isinstance(task, Mapping) else "agent"
    return _TYPES.get(type, set().union(*_TYPES.values())) if isinstance(type, str) else set()


def _task(row: _Fields) -> TaskSpec:
    type = row.choice("type", tuple(_TYPES))
    if "agentId" in row and "agentCapability" in row:
        row.fault("agentCapability", "Name either agentId or agentCapability, not both.")
    for_each = _for_each(row) if "forEach" in row else None
    parameters = _parameters(row, ITEM_NAMES if for_each else NAMES)
    when = row.condition("when")
    does = _DOES[type](row) if type in _DOES else None
    is_agents = does is None
    return TaskSpec(
        id=row.id("taskId", required=True) or "",
        type=type,
        does=does,
        when=when,
        name=row.get("name", str),
        agent_id=row.id("agentId"),
        capability=row.id("agentCapability"),
        parameters=parameters,
        depends_on=(),
        for_each=for_each,
        retry=_retry(row.inner("retry", "maxAttempts", *_BACKOFF)),
        busy=_busy(row.inner("busy", "maxWaitSeconds", *_BACKOFF)),
        timeout_seconds=row.seconds("timeoutSeconds", DEFAULT_TIMEOUT_SECONDS)
        if is_agents
        else CONTROL_TIMEOUT_SECONDS,
        on_failure=row.choice("onFailure", ("fail", "continue")),
        fallback=_fallback(row),
    )


def _parameters(row: _Fields, names: frozenset[str]) -> Template:
    """Compile an object, or the one expression that gives it when the task runs."""
    template = row.template("parameters", names)
    if not isinstance(template.value, str):
        row.get("parameters", dict)
    elif not template.is_expression:
        row.fault("parameters", 'This must be an object, or one expression such as "${input}".')
    return template


def _approval(row: _Fields) -> Approval:
    if "onTimeout" in row and "timeoutSeconds" not in row:
        row.fault("onTimeout", "This needs timeoutSeconds, after which it happens.")
    on_timeout = row.choice("onTimeout", ("reject", "approve"))
    return Approval(row.seconds_or_none("timeoutSeconds"), on_timeout)


def _delay(row: _Fields) -> Delay:
    if ("seconds" in row) == ("until" in row):
        row.fault("seconds", "A delay needs either seconds or until.")
        return Delay(None, None)
    if "until" in row:
        until = row.template("until")
        try:
            if not until.is_expression:
                read_moment(until.value)
        except ValueError as error:
            row.fault("until", str(error))
        return Delay(None, until)
    seconds = row.template("seconds")
    if not seconds.is_expression:
        row.seconds("seconds", 0.0)
    return Delay(seconds, None)


def _check_to_come(rows: list[_Fields], specs: list[TaskSpec]) -> None:
    """Refuse a delay until a moment that is over when the definition comes."""
    for row, spec in zip(rows, specs, strict=True):
        if isinstance(spec.does, Delay) and spec.does.until and not spec.does.until.is_expression:
            with suppress(ValueError):
                if read_moment(row.values["until"]) <= datetime.now(UTC):
                    row.fault("until", "This moment is over; name one that is to come.")


def read_moment(value: Any) -> datetime:
    """Read a moment in ISO 8601 with its offset. Raises ValueError with a sentence."""
    sentence = "This must be a moment such as 2026-01-31T12:00:00Z, with Z or its offset"
    if not isinstance(value, str):
        raise ValueError(f"{sentence}, not {kind(value)}.")
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{sentence}; this is {value[:100]!r}.") from None


def _child(row: _Fields) -> Child:
    id = row.id("workflowId", required=True) or ""
    return Child(id, row.whole("version", 2**31 - 1), row.seconds_or_none("timeoutSeconds"))


_DOES: Mapping[str, Callable[[_Fields], Approval | Delay | Child]] = {
    "approval": _approval,
    "delay": _delay,
    "workflow": _child,
}


def _fallback(row: _Fields) -> tuple[str, ...]:
    """Read the agents that take over, each named once."""
    ids: list[str] = []
    for n, id in enumerate(row.get("fallback", list) or ()):
        pointer = at(row.pointer, "fallback", n)
        if not isinstance(id, str) or not _ID.fullmatch(id):
            row.faults.add(pointer, "This must be the id of an agent.")
        elif id in ids or id == row.values.get("agentId"):
            row.faults.add(pointer, "This agent is named already; name it once.")
        else:
            ids.append(id)
    if len(ids) > MAX_FALLBACKS:
        row.fault("fallback", f"At most {MAX_FALLBACKS} agents.")
    if ids and "agentId" not in row and "agentCapability" not in row:
        row.fault("fallback", "Name the agent or capability that is wanted first.")
    return tuple(ids)


def _for_each(row: _Fields) -> ForEach:
    fields = row.inner("forEach", "items", "maxParallel", "tolerate", "forEach")
    if "forEach" in fields:
        way = "have type: workflow run another workflow, which has it, for each item."
        fields.fault("forEach", f"A forEach cannot stand inside another: {way}")
    items = fields.template("items")
    if "items" not in fields:
        fields.fault("items", 'forEach needs items: one expression such as "${input.list}".')
    elif not items.is_expression and not isinstance(items.value, list):
        fields.fault("items", 'This must be a list, or one expression such as "${input.list}".')
    return ForEach(items, fields.whole("maxParallel", MAX_PARALLEL), _tolerate(fields))


def _tolerate(fields: _Fields) -> int | str | None:
    value = fields.values.get("tolerate")
    is_count = type(value) is int and value >= 0
    is_part = isinstance(value, str) and _PERCENTAGE.fullmatch(value) and float(value[:-1]) <= 100
    if is_count or is_part:
        return value
    if "tolerate" in fields:
        fields.fault("tolerate", 'This must be a whole number of items, or a part such as "10%".')
    return None


def _retry(fields: _Fields) -> Retry:
    attempts = fields.whole("maxAttempts", MAX_ATTEMPTS) or _RETRY.max_attempts
    return Retry(attempts, *_backoff(fields, _RETRY.backoff_seconds))


def _busy(fields: _Fields) -> Busy:
    longest = fields.seconds("maxWaitSeconds", _BUSY.max_wait_seconds)
    return Busy(*_backoff(fields, _BUSY.backoff_seconds), longest)


def _backoff(fields: _Fields, default: float) -> tuple[float, float]:
    first = fields.seconds("backoffSeconds", default)
    most = fields.seconds("maxBackoffSeconds", max(60.0, first))
    if most < first:
        fields.fault("maxBackoffSeconds", f"This must not be less than backoffSeconds ({first:g}).")
    return first, most


# --- the graph


class _Graph:
    """The edges between tasks, by position: both spellings, or else the order listed."""

    def __init__(self, rows: list[_Fields], faults: Faults) -> None:
        self.faults = faults
        self.ids = [str(row.values.get("taskId")) for row in rows]
        self.position: dict[str, int] = {}
        self.before: list[dict[int, str]] = [{} for _ in rows]  # task before -> the edge's pointer
        for n, row in enumerate(rows):
            if self.position.setdefault(self.ids[n], n) != n and "taskId" in row:
                row.fault(
                    "taskId", f"{rows[self.position[self.ids[n]]].pointer} has this id already."
                )
        self._read_edges(rows)
        self.order = self._sorted()
        self._find_circles()
        self._ancestors: dict[int, int] = {}  # a bit for each task that runs before
        for n in self.order:
            self._ancestors[n] = 0
            for earlier in self.before[n]:
                self._ancestors[n] |= self._ancestors[earlier] | 1 << earlier

    def _read_edges(self, rows: list[_Fields]) -> None:
        older = [row for row in rows if "nextTaskId" in row]
        self.listed = not older and not any("dependsOn" in row for row in rows)
        if older and any("dependsOn" in row for row in rows):
            older[0].fault("nextTaskId", "Use either dependsOn or nextTaskId throughout, not both.")
        for n, row in enumerate(rows):
            if self.listed and n:
                self.before[n][n - 1] = row.pointer
            for k, id in enumerate(row.get("dependsOn", list) or ()):
                self._edge(
                    self._find(id, n, pointer := at(row.pointer, "dependsOn", k)), n, pointer
                )
            if (id := row.values.get("nextTaskId")) is not None:
                pointer = at(row.pointer, "nextTaskId")
                self._edge(n, self._find(id, n, pointer), pointer)

    def _find(self, id: Any, own: int, pointer: str) -> int | None:
        if not isinstance(id, str):
            self.faults.add(pointer, f"This must be the id of a task, not {kind(id)}.")
        elif id not in self.position:
            self.faults.add(pointer, unknown(id, self.position.keys(), "There is no task"))
        elif id == self.ids[own]:
            self.faults.add(pointer, "A task cannot wait for itself; name another one.")
        else:
            return self.position[id]
        return None

    def _edge(self, earlier: int | None, later: int | None, pointer: str) -> None:
        if earlier is None or later is None:
            return
        if earlier in self.before[later]:
            self.faults.add(pointer, "This dependency is named already; name it once.")
        self.before[later].setdefault(earlier, pointer)

    def _sorted(self) -> list[int]:
        """Return the positions in topological order, without tasks on or behind a circle."""
        after: list[list[int]] = [[] for _ in self.ids]
        for n, before in enumerate(self.before):
            for earlier in before:
                after[earlier].append(n)
        missing = [len(before) for before in self.before]
        ready = [n for n, count in enumerate(missing) if count == 0]
        order = []
        while ready:
            order.append(n := heappop(ready))
            for later in after[n]:
                missing[later] -= 1
                if missing[later] == 0:
                    heappush(ready, later)
        return order

    def _find_circles(self) -> None:
        """Walk back from every task that cannot be sorted; each has one such task before it."""
        stuck = set(range(len(self.ids))) - set(self.order)
        walked: dict[int, int] = {}
        for start in sorted(stuck):
            trail = []
            n = start
            while n not in walked:
                walked[n] = start
                trail.append(n)
                n = min(self.before[n].keys() & stuck)
            if walked[n] == start:
                self._tell_circle(trail[trail.index(n) :][::-1])

    def _tell_circle(self, circle: list[int]) -> None:
        first = circle.index(min(circle))
        circle = circle[first:] + circle[: first + 1]
        names = [self.ids[n] for n in circle]
        if len(names) > 12:
            names = [*names[:6], "…", *names[-5:]]
        pointer = self.before[circle[0]][circle[-2]]
        path = " → ".join(names)
        self.faults.add(pointer, f"These tasks wait for each other: {path}; remove one dependency.")

    def depends_on(self, n: int) -> tuple[str, ...]:
        return tuple(self.ids[earlier] for earlier in self.before[n])

    def check_tasks(self, specs: Iterable[TaskSpec]) -> None:
        for position, spec in enumerate(specs):
            for template in spec.templates():
                self.check_reads(template.reads, position)

    def check_reads(self, reads: Iterable[tuple[str, str]], reader: int | None) -> None:
        """Refuse to read a task that does not run before; reader None reads when all is over."""
        for pointer, id in reads:
            read = self.position.get(id)
            if read is None:
                sentence = unknown(id, self.position.keys(), "There is no task")
            elif reader is None or self._runs_before(read, reader):
                continue
            elif id == self.ids[reader]:
                sentence = "A task cannot read itself."
            else:
                way = "list it earlier" if self.listed else "make this task depend on it"
                sentence = f"Task {id!r} does not run before this one; {way}."
            self.faults.add(pointer, sentence)

    def _runs_before(self, earlier: int, later: int) -> bool:
        """Answer; behind a circle, which is a fault of its own, give the benefit of the doubt."""
        if later not in self._ancestors:
            return earlier != later
        return bool(self._ancestors[later] >> earlier & 1)
