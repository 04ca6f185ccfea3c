"""What goes in and out, one block per resource. No database access in here.

JSON is camelCase, Python snake_case. In arguments unknown members are errors; in answers every
member is always there, null if it has no value. Times go out as RFC 3339 in UTC with `Z`, and come
in with an offset or not at all.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import EXCLUDE, RAISE, Schema, ValidationError, fields, validate, validates_schema

from opscore.states import AttemptStatus, RunStatus, TaskStatus

PRIORITIES: Mapping[str, int] = {"low": 0, "normal": 1, "high": 2}
LARGEST_INTEGER = 2**31 - 1
"""What an `integer` of PostgreSQL holds."""
DEFAULT_LIMIT = 50
LARGEST_LIMIT = 200
LARGEST_SEQ = 2**63 - 1
LONGEST_WAIT_SECONDS = 60
MOST_LABELS = 32
LONGEST_LABEL = 256
_LABEL_NAME = re.compile(r"[A-Za-z0-9_./-]{1,64}")


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


class _Camel(Schema):
    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        field_obj.data_key = field_obj.data_key or camel(field_name)


class Arguments(_Camel):
    """Something a client sends."""

    class Meta:
        unknown = RAISE

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        known = ", ".join(sorted(camel(name) for name in self.load_fields))
        self.error_messages["unknown"] = f"Unknown; known here: {known}."
        self.error_messages["type"] = "Must be a JSON object."


class Answer(_Camel):
    """Something a client gets; later versions may add members."""

    class Meta:
        unknown = EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        super().on_bind_field(field_name, field_obj)
        field_obj.required = True


def _about(text: str, **more: Any) -> dict[str, Any]:
    return {"description": text, **more} if text else more


def _text(text: str = "", *, null: bool = False, **more: Any) -> fields.String:
    return fields.String(allow_none=null, metadata=_about(text, **more))


def _whole(text: str, *, null: bool = False, low: int = 0, **more: Any) -> fields.Integer:
    bounds = validate.Range(low, LARGEST_INTEGER, error="Must be from {min} to {max}.")
    return fields.Integer(
        strict=True, allow_none=null, validate=bounds, metadata=_about(text), **more
    )


def _json(text: str, **more: Any) -> fields.Raw:
    return fields.Raw(allow_none=True, metadata=_about(text), **more)


def _uuid(text: str, *, null: bool = False) -> fields.UUID:
    return fields.UUID(allow_none=null, metadata=_about(text))


class Moment(fields.AwareDateTime):
    """A moment with its offset; written in UTC."""

    default_error_messages = {  # noqa: RUF012 - marshmallow's own spelling
        "invalid": "Must be a time such as 2026-01-31T12:00:00Z.",
        "invalid_awareness": "Must carry its offset: 2026-01-31T12:00:00Z, or +01:00 for Z"
        " (in a URL, + is written %2B).",
    }

    def __init__(self, text: str, *, null: bool = False, **more: Any) -> None:
        super().__init__(allow_none=null, metadata=_about(text), **more)

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else rfc3339(value)


def rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _one_of(kinds: Any, text: str = "", **more: Any) -> fields.String:
    names = [str(kind) for kind in kinds]
    check = validate.OneOf(names, error="Must be one of {choices}.")
    return fields.String(validate=check, metadata=_about(text), **more)


def _several(kinds: Any, text: str) -> fields.List[Any]:
    return fields.List(_one_of(kinds), load_default=list, metadata=_about(text))


class Priority(fields.Field[int]):
    """Who is first among those who wait; stored as a number."""

    def __init__(self, text: str, **more: Any) -> None:
        kinds = {"type": "string", "enum": list(PRIORITIES)}
        super().__init__(metadata=_about(text, **kinds), **more)

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return next(name for name, number in PRIORITIES.items() if number == value)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> int:
        if not isinstance(value, str) or value not in PRIORITIES:
            raise ValidationError(f"Must be one of {', '.join(PRIORITIES)}.")
        return PRIORITIES[value]


class Limit(fields.Integer):
    """The size of a page."""

    def __init__(self) -> None:
        super().__init__(
            load_default=DEFAULT_LIMIT,
            validate=validate.Range(1, LARGEST_LIMIT, error="Must be from {min} to {max}."),
            metadata=_about("How many items at most."),
        )


# --- Errors -------------------------------------------------------------------------------------


class Problem(Answer):
    """An error (RFC 9457)."""

    type = _text("Always `about:blank`: the code says which error it is.")
    title = _text("The HTTP status in words.")
    status = fields.Integer(metadata=_about("The HTTP status."))
    detail = _text("What is wrong, and the way out, for people.")
    code = _text("Which error it is, for programs.", example="run_not_found")
    request_id = _text("Stands in the log lines of this request, too.")
    errors = fields.Dict(
        keys=fields.String(),
        values=fields.List(fields.String()),
        metadata=_about(
            "JSON Pointer of each faulty place -> sentences about it; only where places are known.",
            example={"/tasks/1/dependsOn/0": ["There is no task 'fetsh'; did you mean 'fetch'?"]},
        ),
    )

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        super().on_bind_field(field_name, field_obj)
        field_obj.required = field_name != "errors"


class Fault(Answer):
    """Why something failed."""

    code = _text(example="agent_failed")
    message = _text(example="ValueError: no such ticket")


class RunFault(Fault):
    """Why a run failed."""

    task_id = fields.Raw(
        allow_none=True, metadata=_about("The task that failed, if one did.", type="string")
    )


class AttemptFault(Fault):
    """Why an attempt failed."""

    traceback = _text("Where in the agent's code.", null=True)


# --- Workflows ----------------------------------------------------------------------------------


class RetryPolicy(Arguments):
    """When a failed attempt is followed by another: doubling pauses with full jitter."""

    max_attempts = fields.Integer(metadata=_about("Attempts in all.", default=3))
    backoff_seconds = fields.Float(metadata=_about("The first pause.", default=2))
    max_backoff_seconds = fields.Float(metadata=_about("The longest pause.", default=60))


class BusyPolicy(Arguments):
    """How long, and how often tried, a task waits for its agent."""

    backoff_seconds = fields.Float(metadata=_about("The first pause.", default=1))
    max_backoff_seconds = fields.Float(metadata=_about("The longest pause.", default=60))
    max_wait_seconds = fields.Float(metadata=_about("Then the task fails.", default=86400))


class ForEachDefinition(Arguments):
    """Runs the task once for every item of a list."""

    items = _json("A list, or an expression for one.", required=True)
    max_parallel = fields.Integer(metadata=_about("How many items at once; no limit if left out."))


class TaskDefinition(Arguments):
    """One task of a workflow."""

    task_id = _text("Unique within the workflow; `[A-Za-z0-9_.-]{1,64}`.", example="fetch")
    name = _text("A label.")
    type = _one_of(["agent"], "What kind of task it is.")
    agent_id = _text("The agent that does it.")
    agent_capability = _text("Or: what an agent must be able to do.")
    parameters = fields.Dict(metadata=_about("What the agent gets; `${...}` are CEL expressions."))
    depends_on = fields.List(fields.String(), metadata=_about("Tasks that must be over before."))
    next_task_id = _text("The older spelling of a single edge.", null=True)
    for_each = fields.Nested(ForEachDefinition)
    retry = fields.Nested(RetryPolicy)
    busy = fields.Nested(BusyPolicy)
    timeout_seconds = fields.Float(metadata=_about("Of one attempt.", default=600))
    on_failure = _one_of(["fail", "continue"], "What its final failure means for the run.")


class WorkflowDefinition(Arguments):
    """A workflow as its author writes it, in JSON or YAML."""

    id = _text("The workflow's id; made from the name if left out.", example="report")
    name = _text("A label.", example="Report")
    description = _text("A label.")
    version = _text("A label; opscore counts its own versions.")
    input_schema = fields.Dict(metadata=_about("JSON Schema that a run's input must match."))
    tasks = fields.List(fields.Nested(TaskDefinition), required=True)
    output = _json("The run's output, usually with `${...}`.")


class Workflow(Answer):
    """One version of a workflow; it never changes."""

    workflow_id = _text(example="report")
    version = fields.Integer(metadata=_about("1, 2, 3 ...", example=1))
    name = _text(null=True)
    definition = fields.Dict(metadata=_about("The document as it was created."))
    created_at = Moment("When this version was created.")


class Verdict(Answer):
    """A definition in which nothing is wrong."""

    valid = fields.Boolean(metadata=_about("Always true: faults are answered with 422."))
    workflow_id = _text("The id it would be created under.")
    version = fields.Integer(metadata=_about("The version it would be."))
    is_new = fields.Boolean(
        metadata=_about("Whether creating it would write that version; false if it is the newest.")
    )
    tasks = fields.List(fields.String(), metadata=_about("Its task ids, dependencies first."))


class VersionArguments(Arguments):
    version = fields.Integer(
        validate=validate.Range(1, LARGEST_INTEGER, error="Must be from {min} to {max}."),
        metadata=_about("Which version; the newest if left out."),
    )


# --- Runs ---------------------------------------------------------------------------------------


def _check_labels(labels: Mapping[str, Any]) -> None:
    faults: dict[str, list[str]] = {}
    for name, value in labels.items():
        if not _LABEL_NAME.fullmatch(name):
            faults[name] = [f"A label's name must match {_LABEL_NAME.pattern}."]
        elif not isinstance(value, str) or len(value) > LONGEST_LABEL:
            faults[name] = [f"Must be a string of at most {LONGEST_LABEL} characters."]
    if faults:
        raise ValidationError(faults)
    if len(labels) > MOST_LABELS:
        raise ValidationError(f"At most {MOST_LABELS} labels.")


def _labels(**more: Any) -> fields.Dict:
    return fields.Dict(
        metadata=_about(
            "Words of your own to find runs by.",
            additionalProperties={"type": "string"},
            example={"team": "support"},
        ),
        **more,
    )


class RunArguments(Arguments):
    """A run to be started."""

    workflow_id = fields.String(required=True, metadata=_about("Which workflow.", example="report"))
    version = _whole("Which version of it; the newest if left out.", low=1, load_default=None)
    input = _json("Must match the workflow's `inputSchema`; `{}` if left out.", load_default=dict)
    labels = _labels(load_default=dict, validate=_check_labels)
    priority = Priority("Who is first among those who wait.", load_default=PRIORITIES["normal"])


class LabelFilter(fields.Field[tuple[str, str]]):
    """`key:value`."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> tuple[str, str]:
        name, colon, wanted = str(value).partition(":")
        if not colon or not name:
            raise ValidationError("Must be of the form key:value.")
        return name, wanted


RUN_FILTERS: Mapping[str, fields.Field[Any]] = {
    "workflow_id": _text("Runs of this workflow only."),
    "status": _several(RunStatus, "Runs with one of these statuses only."),
    "label": fields.List(
        LabelFilter(metadata={"type": "string"}),
        load_default=list,
        metadata=_about("`key:value`; several: runs that have them all."),
    ),
    "created_after": Moment("Runs submitted after this moment."),
    "created_before": Moment("Runs submitted before this moment."),
}


class WaitArguments(Arguments):
    wait_seconds = fields.Float(
        load_default=0.0,
        validate=validate.Range(0, LONGEST_WAIT_SECONDS, error="Must be from {min} to {max}."),
        metadata=_about(
            "Answer when the run is over, or after so many seconds. A server with too many"
            " waiting requests answers at once, with `Retry-After`."
        ),
    )


class RunSummary(Answer):
    """A run as lists show it: without its input and output."""

    run_id = _uuid("Unique for ever.")
    workflow_id = _text(example="report")
    version = fields.Integer(metadata=_about("Of the workflow.", example=1))
    agent_id = _text("The agent it was triggered for, if any.", null=True)
    status = _one_of(RunStatus)
    reason = _text("Why it has this status, where that is not plain.", null=True)
    error = fields.Nested(RunFault, allow_none=True)
    labels = _labels()
    priority = Priority("Who is first among those who wait.")
    request_id = _text("Of the request that submitted it.", null=True)
    cancel_requested_at = Moment("Set once somebody cancelled it.", null=True)
    created_at = Moment("When it was submitted.")
    started_at = Moment("When its first task started.", null=True)
    finished_at = Moment("When it ended.", null=True)


class Run(RunSummary):
    """One execution of one version of a workflow."""

    input = _json("As submitted.")
    output = _json("What the workflow's `output` says, else the last tasks' outputs.")


class AttemptSummary(Answer):
    """One try at a task by one worker."""

    number = fields.Integer(metadata=_about("1, 2, 3 ..."))
    agent_id = _text(null=True)
    worker = _text("The worker that made it.")
    status = _one_of(AttemptStatus)
    progress = fields.Float(allow_none=True, metadata=_about("From 0 to 1, as the agent said."))
    progress_message = _text(null=True)
    started_at = Moment("When it started.")
    finished_at = Moment("When it ended.", null=True)
    error = fields.Nested(Fault, allow_none=True)


class ItemCounts(Answer):
    """How many items of a `forEach` have which status."""

    total = fields.Integer()
    pending = fields.Integer()
    waiting = fields.Integer()
    running = fields.Integer()
    completed = fields.Integer()
    failed = fields.Integer()
    cancelled = fields.Integer()


class Task(Answer):
    """One node of a workflow within one run, or one item of its `forEach`."""

    task_id = _uuid("Unique for ever; also the Celery task id.")
    run_id = _uuid("The run it belongs to.")
    task_definition_id = _text("The definition's `taskId`.", example="fetch")
    index = fields.Integer(
        allow_none=True, metadata=_about("Of an item of a `forEach`, from 0; else null.")
    )
    agent_id = _text("The agent of the newest attempt, else the one asked for.", null=True)
    agent_capability = _text("The capability asked for.", null=True)
    status = _one_of(TaskStatus)
    reason = _text("Why it waits, or was cancelled.", null=True)
    wake_at = Moment("When it is tried again, if nothing wakes it before.", null=True)
    waiting_for = _text(
        "The same in plain words.",
        null=True,
        example="agent writer is busy; tried again at 2026-01-31T12:00:00Z",
    )
    output = _json("What the agent returned; of a `forEach`, the list of its items' outputs.")
    error = fields.Nested(Fault, allow_none=True)
    created_at = Moment("When its row was written.")
    started_at = Moment("When its first attempt started.", null=True)
    finished_at = Moment("When it ended.", null=True)
    attempts = fields.List(fields.Nested(AttemptSummary))
    items = fields.Nested(
        ItemCounts, allow_none=True, metadata=_about("Of a `forEach` task; else null.")
    )


class RunDetail(Run):
    """A run with its tasks."""

    tasks = fields.List(
        fields.Nested(Task),
        metadata=_about(
            "Every task of the definition in its order, then at most 200 items of `forEach`"
            " tasks, failures and waits first; all of them are paged at `/tasks`."
        ),
    )


TASK_FILTERS: Mapping[str, fields.Field[Any]] = {
    "status": _several(TaskStatus, "Tasks with one of these statuses only."),
    "task_definition_id": _text("The task of this id and its items only."),
}


class Event(Answer):
    """A fact about a run; never changes."""

    seq = fields.Integer(metadata=_about("Rises, with gaps."))
    at = Moment("When it happened.")
    type = _text(example="task.completed")
    task_id = _uuid("The task it is about, if any.", null=True)
    task_definition_id = _text(null=True)
    index = fields.Integer(allow_none=True, metadata=_about("Of the item it is about, if any."))
    data = fields.Dict(metadata=_about("More, by type."))


class EventArguments(Arguments):
    after = fields.Integer(
        load_default=0,
        validate=validate.Range(0, LARGEST_SEQ, error="Must be from {min} to {max}."),
        metadata=_about("Events with a higher `seq` only: the `nextAfter` of the page before."),
    )
    limit = Limit()


class EventPage(Answer):
    """Events in their order."""

    items = fields.List(fields.Nested(Event))
    next_after = fields.Integer(
        metadata=_about("Send it as `after` to go on; there may be more at any time until the end.")
    )


# --- Tasks --------------------------------------------------------------------------------------


class LogLine(Answer):
    """A line an agent wrote with `context.log`."""

    line = fields.Integer()
    at = Moment("When it was written.")
    message = _text()
    fields_ = fields.Dict(attribute="fields", data_key="fields")


class TaskDetail(Task):
    """A task with all its attempts and what the newest one logged."""

    logs = fields.List(
        fields.Nested(LogLine), metadata=_about("Of the newest attempt: its last 1000 lines.")
    )


class Attempt(AttemptSummary):
    """One try at a task, with everything that is known of it."""

    task_id = _uuid("The task.")
    error = fields.Nested(AttemptFault, allow_none=True)
    logs = fields.List(fields.Nested(LogLine), metadata=_about("Its last 1000 lines."))


# --- Agents -------------------------------------------------------------------------------------


class Holder(Answer):
    """An attempt that holds a slot."""

    slot = fields.Integer()
    task_id = _uuid("The task.")
    run_id = _uuid("Its run.")
    task_definition_id = _text(example="fetch")
    attempt = fields.Integer()
    lease_expires_at = Moment("The slot is free then at the latest, unless renewed.")


class Agent(Answer):
    """A named provider of capabilities."""

    agent_id = _text(example="writer")
    agent_name = _text()
    kind = _one_of(["function"])
    version = _text()
    capabilities = fields.List(fields.String())
    capacity = fields.Integer(
        allow_none=True, metadata=_about("How many attempts at once; null means no limit.")
    )
    state = _one_of(["idle", "active"], "active while it runs an attempt.")
    running = fields.Integer(metadata=_about("Attempts it runs now."))
    holders = fields.List(fields.Nested(Holder), metadata=_about("Who holds its slots."))
    waiting = fields.Integer(metadata=_about("Tasks that wait because it is busy."))
    registered_at = Moment("When it was first registered.")
    updated_at = Moment("When it was last registered.")


AGENT_FILTERS: Mapping[str, fields.Field[Any]] = {
    "capability": _text("Agents with this capability only."),
}


_ONE_DEFINITION = "Give exactly one of workflowDefinitionId and workflowDefinition."


def _check_payload(payload: Any) -> None:
    if payload is not None and not isinstance(payload, dict):
        raise ValidationError("Must be a JSON object.")


class TriggerArguments(Arguments):
    """A run for one agent; exactly one of the two definitions must be given."""

    workflow_definition_id = fields.String(
        allow_none=True, load_default=None, metadata=_about("The id of a workflow.")
    )
    workflow_definition = fields.Raw(
        allow_none=True,
        load_default=None,
        metadata=_about("Or the whole definition.", type="object"),
    )
    initial_payload = fields.Raw(
        allow_none=True,
        load_default=None,
        validate=_check_payload,
        metadata=_about("The run's input, merged over the first task's parameters.", type="object"),
    )

    @validates_schema
    def check_definition(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        by_id, inline = data["workflow_definition_id"], data["workflow_definition"]
        if (by_id is None) == (inline is None):
            raise ValidationError(_ONE_DEFINITION, "workflowDefinitionId")


class Triggered(Answer):
    """The run that was started."""

    session_id = _uuid("The same as `runId`.")
    run_id = _uuid("The run.")
    workflow_id = _text(example="report")
    message = _text(example="Workflow triggered successfully")


# --- Health -------------------------------------------------------------------------------------


class Health(Answer):
    """The process answers."""

    status = _one_of(["ok"])


class Ready(Answer):
    """Which parts answer."""

    status = _one_of(["ready", "unready"])
    database = _one_of(["ok", "down", "behind"], "behind: run `opscore db upgrade`.")
    broker = _one_of(["ok", "down"])
    workers = _one_of(["ok", "none", "unknown"], "unknown: the database, which knows, is down.")
