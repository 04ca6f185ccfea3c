"""What goes in and out, one block per resource. No database access in here.

JSON is camelCase, Python snake_case. In arguments unknown members are errors, except at the
webhook; in answers every member is always there, null if it has no value. Times go out as RFC 3339
in UTC with `Z`, and come in with an offset or not at all.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from marshmallow import (
    EXCLUDE,
    RAISE,
    Schema,
    ValidationError,
    fields,
    post_load,
    validate,
    validates_schema,
)

from opscore import definition
from opscore.definition import DEFAULT_TIMEOUT_SECONDS, MAX_SECONDS
from opscore.json_values import check_json
from opscore.recurrence import MAX_EVERY_SECONDS
from opscore.remote import read_report
from opscore.states import (
    AgentState,
    AttemptStatus,
    CatchUp,
    FiringStatus,
    Overlap,
    Reason,
    RunStatus,
    TaskStatus,
)

PRIORITIES: Mapping[str, int] = {"low": 0, "normal": 1, "high": 2}
LARGEST_INTEGER = 2**31 - 1
"""What an `integer` of PostgreSQL holds."""
DEFAULT_LIMIT = 50
LARGEST_LIMIT = 200
LARGEST_SEQ = 2**63 - 1
LONGEST_WAIT_SECONDS = 60
MOST_LABELS = 32
LONGEST_LABEL = 256
LONGEST_NAME = 256
LONGEST_COMMENT = 4096
MAX_JITTER_SECONDS = 86_400
LONGEST_URL = 2048
MOST_CAPABILITIES = 256
LARGEST_CAPACITY = 10_000
"""Each unit of it is a row."""
LONGEST_HEARTBEAT_SECONDS = 2_592_000
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LABEL_NAME = re.compile(r"[A-Za-z0-9_./-]{1,64}")
_KEY = re.compile(r"[!-~]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
"""A string as RFC 9651 writes it."""


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


class _Camel(Schema):
    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        field_obj.data_key = field_obj.data_key or camel(field_name)


class Arguments(_Camel):
    """Something a client sends."""

    MAY_BE_LEFT_OUT: ClassVar[bool] = False
    """As a body: none is an empty object then."""

    class Meta:
        unknown = RAISE

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        known = ", ".join(sorted(str(field.data_key) for field in self.load_fields.values()))
        self.error_messages["unknown"] = f"Unknown; known here: {known}."
        self.error_messages["type"] = "Must be a JSON object."


class Answer(_Camel):
    """Something a client gets; later versions may add members."""

    class Meta:
        unknown = EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        super().on_bind_field(field_name, field_obj)
        field_obj.required = True
        if field_obj.allow_none:
            field_obj.dump_default = None


def _about(text: str, **more: Any) -> dict[str, Any]:
    return {"description": text, **more} if text else more


def _text(text: str = "", *, null: bool = False, **more: Any) -> fields.String:
    return fields.String(allow_none=null, metadata=_about(text, **more))


def _whole(
    text: str, *, null: bool = False, low: int = 0, high: int = LARGEST_INTEGER, **more: Any
) -> fields.Integer:
    bounds = validate.Range(low, high, error="Must be from {min} to {max}.")
    return fields.Integer(
        strict=True, allow_none=null, validate=bounds, metadata=_about(text), **more
    )


def _json(text: str, **more: Any) -> fields.Raw:
    return fields.Raw(allow_none=True, metadata=_about(text), **more)


def _uuid(text: str, *, null: bool = False, **more: Any) -> fields.UUID:
    return fields.UUID(allow_none=null, metadata=_about(text), **more)


def _check_size(value: Any) -> None:
    if faults := check_json(value):
        raise ValidationError(faults[""])


def _check_id(value: str) -> None:
    if not _ID.fullmatch(value):
        raise ValidationError(f"Must match {_ID.pattern}.")


def _id(text: str, **more: Any) -> fields.String:
    pattern = f"^{_ID.pattern}$"
    return fields.String(validate=_check_id, metadata=_about(text, pattern=pattern), **more)


def _words(text: str, longest: int, **more: Any) -> fields.String:
    bounds = validate.Length(1, longest, error="Must have from {min} to {max} characters.")
    return fields.String(validate=bounds, metadata=_about(text), **more)


class Flag(fields.Field[bool]):
    """JSON's true or false, and no word for it."""

    def __init__(self, text: str, **more: Any) -> None:
        super().__init__(metadata=_about(text, type="boolean"), **more)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ValidationError("Must be true or false.")
        return value


class Switch(fields.Field[bool]):
    """`true` or `false` in a URL, and no other word for it."""

    def __init__(self, text: str, **more: Any) -> None:
        super().__init__(metadata=_about(text, type="boolean"), **more)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> bool:
        if value not in ("true", "false"):
            raise ValidationError("Must be true or false.")
        return bool(value == "true")


class Number(fields.Float):
    """A number, and no text that looks like one."""

    def _validated(self, value: Any) -> float:
        if isinstance(value, str):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class Seconds(Number):
    """A number of seconds in a body: no text, and more than none unless it may be none."""

    def __init__(
        self, text: str, longest: float, *, may_be_none: bool = False, **more: Any
    ) -> None:
        sentence = (
            "Must be {min} to {max}."
            if may_be_none
            else "Must be more than {min}, and at most {max}."
        )
        bounds = validate.Range(0, longest, min_inclusive=may_be_none, error=sentence)
        least = {} if may_be_none else {"exclusiveMinimum": 0}
        super().__init__(validate=bounds, metadata=_about(text, **least), **more)


class Moment(fields.AwareDateTime):
    """A moment with its offset; written in UTC."""

    default_error_messages = {  # noqa: RUF012 - marshmallow's own spelling
        "invalid": "Must be a time such as 2026-01-31T12:00:00Z.",
        "invalid_awareness": "Must carry its offset: 2026-01-31T12:00:00Z, or +01:00 for Z"
        " (in a URL, + is written %2B).",
    }

    def __init__(self, text: str, *, null: bool = False, **more: Any) -> None:
        super().__init__(allow_none=null, metadata=_about(text), **more)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> datetime:
        moment: datetime = super()._deserialize(value, attr, data, **kwargs)
        try:
            return moment.astimezone(UTC)
        except OverflowError:  # PostgreSQL would store it, and nobody could read it again
            raise self.make_error("invalid", input=value) from None

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
        attribute="taskId",
        allow_none=True,
        metadata=_about("The task that failed, if one did.", type="string"),
    )


class AttemptFault(Fault):
    """Why an attempt failed."""

    traceback = _text("Where in the agent's code.", null=True)


# --- Workflows ----------------------------------------------------------------------------------


def _seconds(text: str, **more: Any) -> fields.Float:
    bounds = {"exclusiveMinimum": 0, "maximum": definition.MAX_SECONDS}
    return fields.Float(metadata=_about(text, **bounds, **more))


def _count(text: str, most: int, **more: Any) -> fields.Integer:
    return fields.Integer(metadata=_about(text, minimum=1, maximum=most, **more))


class RetryPolicy(Arguments):
    """When a failed attempt is followed by another: doubling pauses with full jitter."""

    max_attempts = _count("Attempts in all.", definition.MAX_ATTEMPTS, default=3)
    backoff_seconds = _seconds("The first pause.", default=2)
    max_backoff_seconds = _seconds("The longest pause.", default=60)


class BusyPolicy(Arguments):
    """How long, and how often tried, a task waits for its agent."""

    backoff_seconds = _seconds("The first pause.", default=1)
    max_backoff_seconds = _seconds("The longest pause.", default=60)
    max_wait_seconds = _seconds("Then the task fails.", default=86400)


class ForEachDefinition(Arguments):
    """Runs the task once for every item of a list."""

    items = _json("A list, or an expression for one.", required=True)
    max_parallel = _count("How many items at once; no limit if left out.", definition.MAX_PARALLEL)
    tolerate = fields.Raw(
        metadata=_about(
            'How many items may fail: a number, or a part such as `"10%"`.',
            oneOf=[
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": definition.PERCENTAGE},
            ],
        )
    )


class TaskDefinition(Arguments):
    """One task of a workflow."""

    task_id = _id("Unique within the workflow.", required=True)
    name = _text("A label.")
    type = _one_of(
        ["agent", "approval", "delay", "workflow"],
        "Who does it: an agent, somebody who says yes or no, the clock, or another workflow.",
    )
    when = _text("An expression without `${}`; the task is skipped unless it comes to true.")
    agent_id = _id("The agent that does it.")
    agent_capability = _id("Or: what an agent must be able to do.")
    fallback = fields.List(
        _id("An agent."),
        metadata=_about(
            "Agents asked, in this order, while none of those it wants is available.",
            maxItems=definition.MAX_FALLBACKS,
            uniqueItems=True,
        ),
    )
    parameters = fields.Raw(
        metadata=_about(
            "What the agent gets; `${...}` are CEL expressions. One expression that gives an object"
            " will do.",
            type=["object", "string"],
        )
    )
    depends_on = fields.List(_id("A task."), metadata=_about("Tasks that must be over before."))
    next_task_id = _id("The older spelling of a single edge.", allow_none=True)
    for_each = fields.Nested(ForEachDefinition)
    retry = fields.Nested(RetryPolicy)
    busy = fields.Nested(BusyPolicy)
    timeout_seconds = _seconds(
        "Of one attempt, 600 if left out; of an approval or a sub-workflow in all, no limit if left"
        " out."
    )
    on_timeout = _one_of(["reject", "approve"], "What an approval comes to that nobody decided.")
    seconds = fields.Raw(
        metadata=_about(
            "Of a delay: how long, a number or an expression.", type=["number", "string"]
        )
    )
    until = _text("Of a delay: a moment in ISO 8601, or an expression.")
    workflow_id = _id("Of a sub-workflow: which. `parameters` are its input.")
    version = _count("Of a sub-workflow; the newest if left out.", LARGEST_INTEGER)
    on_failure = _one_of(["fail", "continue"], "What its final failure means for the run.")


class WorkflowDefinition(Arguments):
    """A workflow as its author writes it, in JSON or YAML."""

    id = _id("The workflow's id; made from the name if left out.")
    name = _text("A label.", example="Report")
    description = _text("A label.")
    version = _text("A label; opscore counts its own versions.")
    input_schema = fields.Dict(metadata=_about("JSON Schema that a run's input must match."))
    max_concurrent_runs = _count(
        "How many of its runs may be under way at once; no limit if left out.",
        definition.MAX_CONCURRENT_RUNS,
    )
    tasks = fields.List(
        fields.Nested(TaskDefinition),
        required=True,
        metadata={"minItems": 1, "maxItems": definition.MAX_TASKS},
    )
    deadline_seconds = _seconds(
        "A run that is not over so long after it was submitted, or its `startAt`, fails; the wait"
        " for its turn counts."
    )
    output = _json("The run's output, usually with `${...}`.")


WORKFLOW_FILTERS: Mapping[str, fields.Field[Any]] = {
    "archived": Switch("Those that are archived; else those that are not.", load_default=False),
}


class Workflow(Answer):
    """One version of a workflow; its definition never changes."""

    workflow_id = _text(example="report")
    version = fields.Integer(metadata=_about("1, 2, 3 ...", example=1))
    name = _text(null=True)
    definition = fields.Dict(metadata=_about("The document as it was created."))
    created_at = Moment("When this version was created.")
    archived_at = Moment(
        "Since when the workflow gets no new runs and versions; null: it does.", null=True
    )


STEP_NAME = "Step"
_STEP: Mapping[str, Any] = {"$ref": f"#/components/schemas/{STEP_NAME}"}
_STEPS: Mapping[str, Any] = {"type": "array", "items": _STEP}


def _object(**properties: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _word(word: str, about: str, shape: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**_object(**{word: shape}), "description": about}


IMPLICIT_END = "(end)"
"""How a run's implicit last task is named where its canvas is told; no task can have this id."""
STEP: Mapping[str, Any] = {
    "description": "A task's id, or steps put together by the one word that is its member.",
    "oneOf": [
        {"type": "string", "description": "The definition's `taskId`."},
        _word("chain", "One after the other.", _STEPS),
        _word("group", "Side by side.", _STEPS),
        _word(
            "chord",
            "Those of the header side by side, and when all of them are over, the body.",
            _object(header=_STEPS, body=_STEP),
        ),
        _word(
            "link",
            "A task, and what is published when it is over, side by side.",
            _object(task={"type": "string"}, then=_STEPS),
        ),
        _word(
            "lane",
            "Many tasks side by side share messages: whoever has this one does these in turn, or"
            " gives them back.",
            {"type": "array", "items": {"type": "string"}},
        ),
    ],
}
"""Recursive, so written by hand; `openapi` names it."""


class AgentAskedFor(Answer):
    """Who is to do a task: one of the two is null."""

    agent_id = _text("This agent.", null=True)
    agent_capability = _text("Or: any with this capability.", null=True)


class GraphTask(Answer):
    """A task of a definition, and what it waits for."""

    task_id = _text(example="fetch")
    type = _one_of(["agent", "approval", "delay", "workflow"], "Who does it.")
    agent = fields.Nested(
        AgentAskedFor,
        allow_none=True,
        metadata=_about("Null: none, or the one that the workflow is triggered for."),
    )
    for_each = fields.Boolean(metadata=_about("It is done for every item of a list."))
    depends_on = fields.List(
        fields.String(),
        metadata=_about("Tasks that must be over before, however the document says so."),
    )
    when = _text("The expression that decides whether it is skipped.", null=True)


class Join(Answer):
    """What a task waits for that no message says."""

    task_id = _text(example="merge")
    after = fields.List(fields.String(), metadata=_about("Tasks it depends on."))


class CanvasOutline(Answer):
    """What is published of a run when it is submitted. `(end)` is the last task of one that several
    tasks could end, or one that may be skipped or fail: it does nothing but end the run.
    """

    messages = fields.List(
        fields.Raw(metadata={"allOf": [_STEP]}),
        metadata=_about("Each is sent by itself, at once."),
    )
    joins = fields.List(
        fields.Nested(Join),
        metadata=_about(
            "The edges that chains and chords cannot express: such a task is visited, and waits in"
            " the database until the last of these is over."
        ),
    )
    later = fields.List(
        fields.String(),
        metadata=_about(
            "Tasks too far ahead for a message now. Each waits until all that it depends on is"
            " over; then what follows it is drawn and published."
        ),
    )


class Verdict(Answer):
    """A definition in which nothing is wrong, and what becomes of it."""

    valid = fields.Boolean(metadata=_about("Always true: faults are answered with 422."))
    workflow_id = _text("The id it would be created under.")
    version = fields.Integer(metadata=_about("The version it would be."))
    is_new = fields.Boolean(
        metadata=_about("Whether creating it would write that version; false if it is the newest.")
    )
    tasks = fields.List(fields.String(), metadata=_about("Its task ids, dependencies first."))
    graph = fields.List(fields.Nested(GraphTask), metadata=_about("The same, with their edges."))
    canvas = fields.Nested(
        CanvasOutline,
        metadata=_about("The Celery canvas of a run of it, were it submitted at this moment."),
    )


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
            # Under no place of its own: whatever came as a name may be as long as a body.
            place = name if len(name) <= LONGEST_LABEL else "_schema"
            faults[place] = [f"A label's name must match {_LABEL_NAME.pattern}."]
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
            additionalProperties={"type": "string", "maxLength": LONGEST_LABEL},
            maxProperties=MOST_LABELS,
            example={"team": "support"},
        ),
        **more,
    )


MOST_TOKENS = 2**53
LONGEST_TEXT = 256
LONGEST_INSTRUCTIONS = 100_000
MOST_USD = 1e9
_COST = validate.Range(0, MOST_USD, error="Must be from {min} to {max}.")


class Budget(Arguments):
    """What all LLM agents of a run may spend together; then they are asked nothing more."""

    max_tokens = _whole("Of input and output.", null=True, high=MOST_TOKENS, load_default=None)
    max_cost_usd = Number(
        allow_none=True,
        load_default=None,
        validate=_COST,
        metadata=_about("By the providers' list prices, as far as they are known."),
    )


def _budget() -> fields.Nested:
    about = _about("What its LLM agents may spend together; without limit if left out.")
    return fields.Nested(Budget, allow_none=True, load_default=None, metadata=about)


class RunArguments(Arguments):
    """A run to be started."""

    workflow_id = fields.String(required=True, metadata=_about("Which workflow.", example="report"))
    version = _whole("Which version of it; the newest if left out.", low=1, load_default=None)
    input = _json("Must match the workflow's `inputSchema`; `{}` if left out.", load_default=dict)
    labels = _labels(load_default=dict, validate=_check_labels)
    priority = Priority("Who is first among those who wait.", load_default=PRIORITIES["normal"])
    start_at = Moment("When to begin; at once if left out.", null=True, load_default=None)
    deadline_at = Moment(
        "When it fails if it is not over; instead of the definition's `deadlineSeconds`.",
        null=True,
        load_default=None,
    )
    budget = _budget()


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    faults = {
        name: ["Must be an object: it is merged over the task's parameters."]
        for name, value in parameters.items()
        if not isinstance(value, dict)
    }
    if faults:
        raise ValidationError(faults)


class RetryArguments(Arguments):
    """How what failed is to be tried again."""

    MAY_BE_LEFT_OUT = True

    parameters = fields.Dict(
        keys=fields.String(),
        load_default=dict,
        validate=_check_parameters,
        metadata=_about(
            "The definition's `taskId` -> what is merged over its parameters.",
            additionalProperties={"type": "object"},
        ),
    )


class IdempotencyKey(fields.Field[str]):
    """A client's own name for a request: as it is, or as a string in quotes (RFC 9651)."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> str:
        quoted = _QUOTED.fullmatch(value)
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else value
        if not _KEY.fullmatch(key) or (key.startswith('"') and not quoted):
            raise ValidationError(
                "Must have 1 to 255 visible ASCII characters, no spaces, with or without quotes"
                " around them; a new UUID for each run will do."
            )
        return key


class KeyHeader(Schema):
    """What makes it safe to send a request again."""

    class Meta:
        unknown = EXCLUDE

    key = IdempotencyKey(
        data_key="Idempotency-Key",
        metadata=_about(
            "Sent again within 24 hours, the same request with the same key starts nothing, and is"
            " answered with what it started the first time.",
            type="string",
            maxLength=512,
            pattern=r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$',
        ),
    )

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> str | None:
        """Return the key alone, or None."""
        return data.get("key")


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
        LabelFilter(metadata={"type": "string", "pattern": "^[^:]+:"}),
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
    parent_task_id = _uuid("The task that runs it as its sub-workflow, if any.", null=True)
    rerun_of = _uuid("The run it is another of, if any.", null=True)
    schedule = _text("The schedule that fired it, if any.", null=True)
    start_at = Moment("When it was to begin, or was tried again; null: at once.", null=True)
    deadline_at = Moment("It fails if it is not over by then.", null=True)
    created_at = Moment("When it was submitted.")
    started_at = Moment("When its first task started.", null=True)
    finished_at = Moment("When it ended.", null=True)


class Usage(Answer):
    """What LLM agents have used."""

    replies = fields.Integer(metadata=_about("Of models."))
    input_tokens = fields.Integer()
    output_tokens = fields.Integer()
    cost_usd = fields.Float(allow_none=True, metadata=_about("Null while no price is known."))


class Run(RunSummary):
    """One execution of one version of a workflow."""

    budget = fields.Nested(Budget, allow_none=True)
    usage = fields.Nested(
        Usage, allow_none=True, metadata=_about("Of its LLM agents; null if they asked nothing.")
    )
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


class QueuePlace(Answer):
    """Where a task stands in the line for its agent."""

    position = fields.Integer(
        allow_none=True, metadata=_about("1 is next; null if 10,000 others are before it.")
    )
    estimated_start_at = Moment(
        "If agents go on as fast as of late; null while that is unknown.", null=True
    )


class CallAskedAbout(Answer):
    """A call of a tool that somebody is to decide."""

    number = fields.Integer(
        metadata=_about("Names it in `/approve` and `/reject`, as `call`.", example=4)
    )
    tool = _text(example="delete_file")
    arguments = _json("What the model wrote; what looks like a secret is left out.")
    again = fields.Boolean(
        metadata=_about("It was under way when its worker died, and may have had its effect.")
    )


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
    type = _one_of(["agent", "approval", "delay", "workflow"], "Who does it.")
    child_run_id = _uuid("The run of its sub-workflow, once it began.", null=True)
    status = _one_of(TaskStatus)
    reason = _text("Why it waits, was skipped or was cancelled.", null=True)
    wake_at = Moment("When it is tried again, if nothing wakes it before.", null=True)
    waiting_for = _text(
        "The same in plain words.",
        null=True,
        example="waiting for agent writer: busy with this run, 3 ahead, about 40 s",
    )
    queue = fields.Nested(
        QueuePlace, allow_none=True, metadata=_about("While it waits for an agent; else null.")
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
    usage = fields.Nested(
        Usage, allow_none=True, metadata=_about("Of its LLM agent; null if it asked nothing.")
    )
    call = fields.Nested(
        CallAskedAbout,
        allow_none=True,
        metadata=_about("What its LLM agent wants to do, while it waits for `approval` of that."),
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


ALL_TASKS_FILTERS: Mapping[str, fields.Field[Any]] = {
    "status": _several(
        TaskStatus,
        "Tasks with one of these statuses only; without a `runId`, pending, running and waiting.",
    ),
    "reason": _several(Reason, "Tasks that wait for one of these reasons only."),
    "agent_id": _text(
        "Tasks with this `agentId` only; with a `runId`, a `reason`, or a `status` of those."
    ),
    "run_id": _uuid("Tasks of this run only."),
}


class Event(Answer):
    """A fact about a run or a schedule; never changes."""

    seq = fields.Integer(metadata=_about("Rises, with gaps."))
    at = Moment("When it happened.")
    type = _text(example="task.completed")
    task_id = _uuid("The task it is about, if any.", null=True)
    task_definition_id = _text(null=True)
    index = fields.Integer(allow_none=True, metadata=_about("Of the item it is about, if any."))
    by = _text(
        "Who did it or asked for it: `key:...` (the key's name), `worker:...`, `agent:...` (one"
        " behind HTTP, which reported it), `schedule:...` (a beat) or `keeper`; null if it followed"
        " from what was before.",
        null=True,
        example="worker:worker-17@host",
    )
    reason = _text(
        "Why, in one word: what it waits for, why it was cancelled, the code of the error.",
        null=True,
        example="agent_busy",
    )
    data = fields.Dict(metadata=_about("More, by type."))


class EventArguments(Arguments):
    after = fields.Integer(
        load_default=0,
        validate=validate.Range(0, LARGEST_SEQ, error="Must be from {min} to {max}."),
        metadata=_about("Events with a higher `seq` only: the `nextAfter` of the page before."),
    )
    limit = Limit()


class EventHeaders(Arguments):
    """What a client that follows events says when it comes back."""

    class Meta:
        unknown = EXCLUDE

    last_event_id = fields.Integer(
        data_key="Last-Event-ID",
        validate=validate.Range(0, LARGEST_SEQ, error="Must be from {min} to {max}."),
        error_messages={"invalid": "Must be the id of an event, which is a whole number."},
        metadata=_about("Of a stream: events with a higher `seq` only, whatever `after` says."),
    )


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


class Proof(Arguments):
    """Who says something of a task, and what shows that it is his to say."""

    agent_id = fields.String(
        allow_none=True,
        load_default=None,
        metadata=_about("Who says so; may be left out with a token."),
    )
    opscore_attempt_token = _uuid(
        "What came with the task. An agent with `requireToken: false` may leave it out.",
        null=True,
        load_default=None,
        data_key="opscore_attempt_token",
    )
    attempt_token = _uuid("Another spelling of it.", null=True, load_default=None)

    @validates_schema
    def check_token(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if len({data["opscore_attempt_token"], data["attempt_token"]} - {None}) > 1:
            sentence = "This is not the opscore_attempt_token; send one of them."
            raise ValidationError(sentence, "attemptToken")

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return `agent_id` and `token`."""
        token = data["opscore_attempt_token"] or data["attempt_token"]
        return {"agent_id": data["agent_id"], "token": token}


class TaskResult(Proof):
    """How an attempt at a task ended."""

    status = fields.String(
        allow_none=True,
        validate=validate.OneOf(
            ["completed", "failed", "success", "error"], error="Must be one of {choices}."
        ),
        metadata=_about(
            "success is read as completed, error as failed. Without a status there must be either"
            " a result or an error."
        ),
    )
    result = _json("The task's output.")
    error = _json(
        "What went wrong: text, or `{code, message, retryAfter}`. It is tried again after that many"
        " seconds, if it is; with the code `agent_busy` it did not fail, and waits."
    )

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return `agent_id`, `token` and `outcome`."""
        try:
            return {**super().read(data), "outcome": read_report(data)}
        except ValueError as error:
            raise ValidationError(str(error)) from None


class Comment(Arguments):
    """Why something was decided so, and of which call."""

    MAY_BE_LEFT_OUT = True

    call = _whole(
        "The `call.number` that was read of an LLM agent's task: refused if it asks about another"
        " call by now.",
        null=True,
        high=2**31 - 1,
        load_default=None,
    )
    comment = fields.String(
        allow_none=True,
        load_default=None,
        validate=validate.Length(max=LONGEST_COMMENT, error="At most {max} characters."),
        metadata=_about("For whoever reads it later."),
    )


_ONE_AGENT = "Give exactly one of agentId and agentCapability."


class JobArguments(Arguments):
    """A task without a workflow, for one agent; exactly one of the two ways to name it."""

    task_type = fields.String(
        required=True,
        validate=validate.OneOf(["agent_run"], error="Must be one of {choices}."),
        metadata=_about("What kind of task it is."),
    )
    agent_id = _id("The agent that does it.", load_default=None)
    agent_capability = _id("Or: what an agent must be able to do.", load_default=None)
    input_data = fields.Dict(load_default=dict, metadata=_about("What the agent gets."))
    labels = _labels(load_default=dict, validate=_check_labels)
    priority = Priority("Who is first among those who wait.", load_default=PRIORITIES["normal"])
    timeout_seconds = Seconds("Of one attempt.", MAX_SECONDS, load_default=DEFAULT_TIMEOUT_SECONDS)
    budget = _budget()

    @validates_schema
    def check_agent(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if (data["agent_id"] is None) == (data["agent_capability"] is None):
            raise ValidationError(_ONE_AGENT, "agentId")


class Accepted(Answer):
    """The result counts."""

    task_id = _uuid("The task.")
    status = _one_of(["accepted"])


class Heartbeat(Answer):
    """How long an agent may be silent now."""

    task_id = _uuid("The task.")
    lease_expires_at = Moment("The attempt ends if no heartbeat or result comes before this.")
    cancelled = fields.Boolean(metadata=_about("The run ends: nobody wants the result any more."))


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


# --- Schedules ----------------------------------------------------------------------------------


class ScheduleChange(Arguments):
    """What is to be another; `cron` and `everySeconds` change places by one of them being null."""

    workflow_id = fields.String(metadata=_about("Which workflow.", example="report"))
    version = _whole("Which version of it; null: the newest when it fires.", low=1, null=True)
    agent_id = _id("The agent that it is for, as when it is triggered.", allow_none=True)
    cron = fields.String(
        allow_none=True,
        metadata=_about(
            "Five fields, or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.",
            example="30 2 * * *",
        ),
    )
    every_seconds = Seconds(
        "Or: at intervals, counted from `startAt`, else from its creation; at least 1.",
        MAX_EVERY_SECONDS,
        allow_none=True,
    )
    timezone = fields.String(
        metadata=_about("IANA name, for `cron`; UTC if left out.", example="Europe/Berlin")
    )
    input = _json("The run's input; `${firing.at}` and `${firing.schedule}` may stand in it.")
    labels = _labels(validate=_check_labels)
    priority = Priority("Who is first among those who wait.")
    enabled = Flag("Whether it fires.")
    start_at = Moment("Nothing fires before.", null=True)
    end_at = Moment("Nothing fires after.", null=True)
    jitter_seconds = Seconds(
        "It fires up to so much later than its moments, always by the same time.",
        MAX_JITTER_SECONDS,
        may_be_none=True,
    )
    overlap = _one_of(Overlap, "What to do while the run before is not over.")
    catch_up = _one_of(CatchUp, "Which moments fire that were missed while no beat ran.")
    catch_up_window_seconds = Seconds(
        "With `all`: how far back.", definition.MAX_SECONDS, allow_none=False
    )


class ScheduleArguments(ScheduleChange):
    """A schedule to be created."""

    name = _id("Unique.", required=True)

    @post_load
    def fill(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Say what is left out."""
        return {**_SCHEDULE_DEFAULTS, **data}

    @validates_schema
    def check_workflow(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if "workflow_id" not in data:
            raise ValidationError("Name the workflow that it runs.", "workflowId")


_SCHEDULE_DEFAULTS: Mapping[str, Any] = {
    **{name: None for name in ("version", "agent_id", "cron", "every_seconds")},
    **{"timezone": "UTC", "start_at": None, "end_at": None},
    **{"input": {}, "labels": {}, "enabled": True},
    **{"priority": PRIORITIES["normal"], "jitter_seconds": 0.0, "overlap": str(Overlap.SKIP)},
    **{"catch_up": str(CatchUp.LAST), "catch_up_window_seconds": 86_400.0},
}


class Schedule(Answer):
    """A recurring workflow."""

    name = _text(example="nightly")
    workflow_id = _text(example="report")
    version = fields.Integer(allow_none=True, metadata=_about("Null: the newest when it fires."))
    agent_id = _text(null=True)
    cron = _text(null=True, example="30 2 * * *")
    every_seconds = fields.Float(allow_none=True)
    timezone = _text("Of `cron`.", example="Europe/Berlin")
    input = _json("As it was given.")
    labels = _labels()
    priority = Priority("Who is first among those who wait.")
    enabled = fields.Boolean()
    start_at = Moment("Nothing fires before.", null=True)
    end_at = Moment("Nothing fires after.", null=True)
    jitter_seconds = fields.Float()
    overlap = _one_of(Overlap)
    catch_up = _one_of(CatchUp)
    catch_up_window_seconds = fields.Float()
    next_at = Moment("When it fires next; null: it is paused, or never again.", null=True)
    created_at = Moment("When it was created.")
    updated_at = Moment("When it was changed.")


class ScheduleWithWarnings(Schedule):
    """A recurring workflow, and what in it looks as if something else was meant."""

    warnings = fields.List(fields.String())


class PreviewArguments(Arguments):
    count = fields.Integer(
        load_default=10,
        validate=validate.Range(1, LARGEST_LIMIT, error="Must be from {min} to {max}."),
        metadata=_about("How many."),
    )


class Preview(Answer):
    """The next moments at which a schedule fires."""

    items = fields.List(Moment("A moment."))


class Firing(Answer):
    """One moment of a schedule, and what became of it."""

    moment = Moment("When it was due, its jitter not counted.")
    status = _one_of(FiringStatus)
    by = _text("`schedule`, or who had it fire.", example="schedule")
    error = fields.Nested(Fault, allow_none=True)
    run_id = _uuid("The run it started.", null=True)
    run_status = _text("What that run is now.", null=True, example="completed")
    decided_at = Moment("When it was decided.")


# --- Agents -------------------------------------------------------------------------------------


class Holder(Answer):
    """An attempt that holds a slot."""

    slot = fields.Integer()
    task_id = _uuid("The task.")
    run_id = _uuid("Its run.")
    task_definition_id = _text(example="fetch")
    attempt = fields.Integer()
    lease_expires_at = Moment("The slot is free then at the latest, unless renewed.")


class Waiter(Answer):
    """A task in an agent's line."""

    position = fields.Integer(metadata=_about("1 is next."))
    task_id = _uuid("The task.")
    run_id = _uuid("Its run.")
    task_definition_id = _text(example="fetch")
    waiting_since = Moment("When it came to the line.", null=True)
    priority = Priority("Of its run; higher ones are before it.")
    estimated_start_at = Moment(
        "If all before it are done here, as fast as of late; null while that is unknown.",
        null=True,
    )


class Agent(Answer):
    """A named provider of capabilities."""

    agent_id = _text(example="writer")
    agent_name = _text()
    kind = _one_of(
        ["function", "llm", "remote"],
        "function: in the workers; llm: a language model, there too; remote: behind HTTP.",
    )
    version = _text()
    capabilities = fields.List(fields.String())
    capacity = fields.Integer(
        allow_none=True, metadata=_about("How many attempts at once; null means no limit.")
    )
    state = _one_of(
        AgentState, "What a remote agent said last. Of a function agent: active while it runs."
    )
    state_at = Moment("When it said so, by its own clock.", null=True)
    available = fields.Boolean(
        metadata=_about("Whether it gets work, as soon as it has a free slot and is not busy.")
    )
    unavailable_because = _text(
        "Why not: paused, draining, reported error, silent for so many seconds.",
        null=True,
        example="silent for 45 s",
    )
    paused = fields.Boolean(metadata=_about("An operator wants it to get nothing for now."))
    draining = fields.Boolean(metadata=_about("It ends what it has, and gets nothing new."))
    contact_endpoint = _text("Where a remote agent takes work.", null=True)
    metadata = fields.Raw(
        allow_none=True, metadata=_about("What it said of itself when it registered.")
    )
    heartbeat_seconds = fields.Float(
        allow_none=True, metadata=_about("It is silent if it says nothing for so long; or null.")
    )
    require_token = fields.Boolean(
        metadata=_about("Only who shows an attempt's token may report its result.")
    )
    seen_at = Moment("When it last said anything.")
    busy_until = Moment("It refused work, and is not asked before this.", null=True)
    running = fields.Integer(metadata=_about("Attempts it has now."))
    holders = fields.List(fields.Nested(Holder), metadata=_about("Who holds its slots."))
    waiting = fields.Integer(metadata=_about("Tasks in its line."))
    line = fields.List(fields.Nested(Waiter), metadata=_about("The first 20 of them."))
    registered_at = Moment("When it was first registered.")
    updated_at = Moment("When it was last registered.")


def _words_list(text: str, longest: int, most: int, **more: Any) -> fields.List[Any]:
    bounds = validate.Length(max=most, error="At most {max} of them.")
    of = _words("", longest)
    return fields.List(of, load_default=list, validate=bounds, metadata=_about(text), **more)


class LLMPermissions(Arguments):
    """What an agent may reach beyond its own tools, as patterns; else nothing."""

    mcp = _words_list("Tools of MCP servers, as `docs/*`.", LONGEST_TEXT, 100)
    hosts = _words_list("Hosts of `http_get`, as `*.example.com`.", LONGEST_TEXT, 100)


class LLMLimits(Arguments):
    """How much an agent may do at one task."""

    max_steps = _whole("Replies of models.", low=1, high=10_000, load_default=20)
    max_tokens = _whole("Over all attempts.", null=True, high=MOST_TOKENS, load_default=None)
    max_cost_usd = Number(
        allow_none=True, load_default=None, validate=_COST, metadata=_about("Over all attempts.")
    )
    max_seconds = Seconds("Of one attempt.", MAX_SECONDS, load_default=600.0)
    call_seconds = Seconds("Of one question to a model.", MAX_SECONDS, load_default=120.0)
    window_tokens = _whole("Sent at most.", low=1, high=10**8, load_default=100_000)
    corrections = _whole("Of an answer that is none.", high=100, load_default=2)


class LLMDefinition(Arguments):
    """A language model with instructions and tools, as an agent."""

    agent_id = _id("As in a workflow's `agentId`.", required=True)
    name = fields.String(
        load_default="",
        validate=validate.Length(max=LONGEST_TEXT, error="At most {max} characters."),
        metadata=_about("For people; the id if left out."),
    )
    model = _words("`provider:model`.", LONGEST_TEXT, required=True)
    fallback_models = _words_list("Asked in order while the one before does not.", LONGEST_TEXT, 10)
    instructions = fields.String(
        load_default="",
        validate=validate.Length(max=LONGEST_INSTRUCTIONS, error="At most {max} characters."),
        metadata=_about("What it is told before every task."),
    )
    tools = _words_list("Of the workers' tools, by name.", 64, 100)
    mcp_servers = _words_list("Of the workers' MCP servers, by name.", 64, 100)
    memory = _words("The namespace of what it remembers.", 64, allow_none=True, load_default=None)
    output_schema = fields.Dict(
        allow_none=True, load_default=None, metadata=_about("JSON Schema of its answers.")
    )
    permissions = fields.Nested(LLMPermissions, load_default=lambda: LLMPermissions().load({}))
    limits = fields.Nested(LLMLimits, load_default=lambda: LLMLimits().load({}))
    capabilities = fields.List(_id(""), load_default=list, metadata=_about("What it can do."))
    capacity = _whole("Tasks at once; no limit if null.", null=True, low=1, load_default=None)


class AgentVersion(Answer):
    """One version of an LLM agent that was defined here; it never changes."""

    agent_id = _text(example="clerk")
    version = fields.Integer(metadata=_about("1, 2, 3 ...", example=1))
    definition = fields.Nested(LLMDefinition)
    by = _text("Who defined it.")
    created_at = Moment("When this version was defined.")


AGENT_FILTERS: Mapping[str, fields.Field[Any]] = {
    "capability": _text("Agents with this capability only."),
}


class AgentChange(Arguments):
    """What operators decide about an agent; what is left out stays."""

    capacity = _whole("How many attempts at once; of remote agents.", low=1, high=LARGEST_CAPACITY)
    paused = Flag("Give it nothing for now.")
    draining = Flag("Let it end what it has, and give it nothing new.")
    heartbeat_seconds = Seconds(
        "It counts as silent if it says nothing for so long; null: never. Of remote agents.",
        LONGEST_HEARTBEAT_SECONDS,
        allow_none=True,
    )
    require_token = Flag("false: its id is proof enough of a result. Of remote agents.")


class Memory(Answer):
    """A text that an LLM agent remembers beyond its tasks."""

    memory_id = _uuid("Its own.")
    namespace = _text("Of the agent's memory.", example="research")
    text = _text(example="The invoices of Meyer come in March.")
    score = fields.Float(
        allow_none=True,
        metadata=_about("Of a search: 1 has all words of the query. Null where nothing was asked."),
    )
    added_at = Moment("When it was added, or added again.")
    expires_at = Moment("When it is forgotten by itself.", null=True)


MEMORY_FILTERS: Mapping[str, fields.Field[Any]] = {
    "query": _text("Those that share words with this only, the best first, on one page."),
    "namespace": _text("Those of this namespace only."),
}


class MemoryScope(Arguments):
    """Which of an agent's memories."""

    namespace = _text("Those of this namespace only.")


class Forgotten(Answer):
    forgotten = fields.Integer(metadata=_about("How many memories that were."))


class AgentDetails(Arguments):
    """What an agent behind HTTP says of itself; to deregister, its `agentId` is enough."""

    class Meta:
        unknown = EXCLUDE

    agent_id = _id(f"Its own name for itself; matches `{_ID.pattern}`.", required=True)
    agent_name = _words("For people.", LONGEST_NAME, required=True, attribute="name")
    version = _words("A label.", LONGEST_NAME, required=True)
    capabilities = fields.List(
        _id("What it can do."),
        load_default=list,
        validate=validate.Length(max=MOST_CAPABILITIES, error="At most {max} capabilities."),
        metadata=_about("What it can do; tasks may ask for it."),
    )
    contact_endpoint = _words("The URL that takes work, by POST.", LONGEST_URL, required=True)
    metadata = fields.Dict(
        allow_none=True,
        load_default=None,
        attribute="details",
        validate=_check_size,
        metadata=_about("Anything else; kept and shown."),
    )

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Name each capability once."""
        return data | {"capabilities": list(dict.fromkeys(data.get("capabilities", [])))}


class Notice(Arguments):
    """An agent behind HTTP comes or goes."""

    class Meta:
        unknown = EXCLUDE

    event_type = fields.String(
        required=True,
        data_key="event_type",
        metadata=_about("Whether it comes or goes.", enum=["REGISTER", "DEREGISTER"]),
    )
    agent_details = fields.Nested(AgentDetails, required=True, data_key="agent_details")

    def load(self, data: Any, **kwargs: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("event_type") != "REGISTER":
            others = set(AgentDetails().load_fields) - {"agent_id"}
            kwargs["partial"] = {f"agent_details.{name}" for name in others}
        return super().load(data, **kwargs)


class Success(Answer):
    """It is done."""

    status = _one_of(["success"])
    message = _text(example="Agent a-1 registered")


_STATE_WORDS: Mapping[str, AgentState] = {
    **{str(state).lower(): state for state in AgentState},
    "busy": AgentState.ACTIVE,
}


class StateWord(fields.Field[AgentState]):
    """A state in any case; `BUSY` means active."""

    def __init__(self, text: str, **more: Any) -> None:
        super().__init__(metadata=_about(text, type="string", examples=list(AgentState)), **more)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> AgentState:
        known = _STATE_WORDS.get(value.lower()) if isinstance(value, str) else None
        if known is None:
            raise ValidationError(f"Must be one of {', '.join(AgentState)}, BUSY.")
        return known


class ResultInDetails(TaskResult):
    """How an attempt ended, in the details of a state report."""

    class Meta:
        unknown = EXCLUDE

    opscore_task_id = _uuid("The task.", required=True, data_key="opscore_task_id")

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return `task_id`, `token` and `outcome`."""
        said = super().read(data)
        return {name: said[name] for name in ("token", "outcome")} | {
            "task_id": data["opscore_task_id"]
        }


def _check_details(details: Any) -> None:
    """Refuse what is too large, but for a result: that ends its attempt, whatever its size."""
    if isinstance(details, dict):
        details = {name: value for name, value in details.items() if name != "result"}
    _check_size(details)


class StateReport(Arguments):
    """What an agent says of itself."""

    agent_id = fields.String(
        allow_none=True, load_default=None, metadata=_about("As in the path, if it is sent.")
    )
    timestamp = Moment(
        "When it was so, by the agent's clock; now if left out, or later than now.",
        null=True,
        load_default=None,
    )
    state = StateWord("In any case; BUSY means active.", required=True)
    details = _json(
        "Anything. With `opscore_task_id`, `opscore_attempt_token` and `result` or `error` it"
        " ends that task's attempt, too; a result of null only if the state is idle or finished.",
        load_default=None,
        validate=_check_details,
    )

    @post_load
    def read(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `result`: how an attempt at a task ended, if `details` say so."""
        details = data["details"]
        if not _tells_a_result(data["state"], details):
            return data | {"result": None}
        status = "completed" if details.get("error") is None else "failed"
        try:
            return data | {"result": ResultInDetails().load({**details, "status": status})}
        except ValidationError as error:
            raise ValidationError({"details": error.messages}) from None


def _tells_a_result(state: AgentState, details: Any) -> bool:
    """Tell whether details end a task: an agent at work may send its members with nothing in."""
    if not isinstance(details, dict) or "opscore_task_id" not in details:
        return False
    if details.get("error") is not None or details.get("result") is not None:
        return True
    return "result" in details and state in (AgentState.IDLE, AgentState.FINISHED)


class StateOfAgent(Answer):
    """What an agent said of itself last, or what is known of it."""

    agent_id = _text(example="writer")
    state = _one_of(AgentState)
    details = _json("As reported with it.")
    timestamp = Moment("Since when; by the agent's clock, if it said so.")


class StateReported(StateOfAgent):
    """One report of an agent; it never changes."""

    received_at = Moment("When it came, by our clock.")


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


# --- Status -------------------------------------------------------------------------------------


def _number(text: str = "") -> fields.Integer:
    return fields.Integer(metadata=_about(text))


def _seconds_since(text: str, *, null: bool = False) -> fields.Float:
    return fields.Float(allow_none=null, metadata=_about(text))


class WorkerThatLives(Answer):
    """A worker, which said that it lives in the last 20 seconds."""

    name = _text("As attempts and Flower have it.", example="worker-17@host")
    host = _text()
    pid = _number("Of its main process.")
    pool = _text("`prefork` or `threads`.", example="prefork")
    concurrency = _number("So many tasks at once.")
    queues = fields.List(fields.String(), metadata=_about("Those it takes from."))
    version = _text("Of opscore, if known.", null=True)
    started_at = Moment("When it first said so.")
    seen_at = Moment("When it last said so.")


class QueueDepth(Answer):
    """A queue in Redis, and who takes from it."""

    name = _text(example="opscore.agents")
    ready = fields.Integer(
        allow_none=True,
        metadata=_about("Messages that no worker has taken; null while Redis does not answer."),
    )
    unacked = fields.Integer(
        allow_none=True,
        metadata=_about("Those that workers have, or died with; null if there are very many."),
    )
    workers = _number("Workers that take from it.")


class AgentCounts(Answer):
    """How many agents there are, each counted once by the first that is so."""

    total = _number()
    available = _number("They get work, as soon as they have a free slot and are not busy.")
    paused = _number()
    draining = _number()
    silent = _number("For longer than their `heartbeatSeconds`.")
    error = _number("They reported it.")


class SlotCounts(Answer):
    """The slots of all agents that have a capacity."""

    held = _number("By attempts.")
    total = _number()


class LineLength(Answer):
    """Who waits for an agent, or for any with a capability."""

    agent_id = _text("The agent they wait for.", null=True)
    agent_capability = _text("Or the capability.", null=True)
    waiting = _number("Tasks in it.")
    oldest_seconds = _seconds_since("How long the first to come has waited.")
    unserved_because = _text(
        "Why nobody takes from it, if so.", null=True, example="agent writer is paused"
    )


class FleetStatus(Answer):
    """The agents, and the lines before them."""

    agents = fields.Nested(AgentCounts)
    states = fields.Dict(
        keys=fields.String(),
        values=fields.Integer(),
        metadata=_about("State -> how many agents are in it.", example={"idle": 3}),
    )
    slots = fields.Nested(SlotCounts)
    lines = fields.List(fields.Nested(LineLength), metadata=_about("The ten longest."))


class WaitingTasks(Answer):
    """Tasks that wait for one reason."""

    reason = _text(example="agent_busy")
    count = _number()
    oldest_seconds = _seconds_since(
        "How long ago the first of them came to its line; or was begun, where there is no line; or"
        " was submitted, if it was not."
    )
    next_wake_at = Moment("When the first of them is looked at again.", null=True)


class OpenRuns(Answer):
    """Runs that are not over, of one status and reason."""

    status = _one_of(RunStatus)
    reason = _text(null=True)
    count = _number()
    oldest_seconds = _seconds_since("How long ago the first of them was submitted.")
    oldest_run_id = _uuid("That one.")


class ApprovalAsked(Answer):
    """A task that waits for somebody to approve or reject it."""

    task_id = _uuid("POST its `/approve` or `/reject`.")
    run_id = _uuid("Its run.")
    task_definition_id = _text(example="review")
    index = fields.Integer(allow_none=True, metadata=_about("Of an item, if it is one."))
    workflow_id = _text(example="report")
    since = Moment("When it was asked.")


class Stuck(Answer):
    """A run that does not move by itself any more, or of which something is long overdue."""

    code = _one_of(
        ["upkeep_late", "nobody_wakes", "visit_lost", "nobody_serves", "turn_blocked"],
        "upkeep_late: the keeper is a minute late with it. nobody_wakes: it waits for what is over."
        " visit_lost: sent ten minutes ago, gone from its queue, and not claimed. nobody_serves:"
        " in line for ten minutes, and no agent takes from it. turn_blocked: waiting for ten"
        " minutes for its turn, behind runs that are paused or over.",
    )
    run_id = _uuid("The run.")
    task_id = _uuid("The task, unless it is the run itself.", null=True)
    task_definition_id = _text(null=True, example="fetch")
    index = fields.Integer(allow_none=True, metadata=_about("Of an item, if it is one."))
    since = Moment("Since when.")
    sentence = _text("What is the matter.")
    hint = _text("What to do.")


class KeeperStatus(Answer):
    """Who wakes what waits and finds what is lost: one of the workers."""

    holder = _text("Host, pid and a word of its own.", null=True, example="host:17:0f3a9c2e")
    renewed_at = Moment("When it last said so.", null=True)
    late_seconds = _seconds_since(
        "How long its lease has been over; 0 if all is well, null if nobody has it.", null=True
    )


class ScheduleCounts(Answer):
    """The schedules that are not paused."""

    enabled = _number()
    due = _number("Their moment has come.")
    late = _number("By more than 5 s.")
    worst_lag_seconds = _seconds_since("By how much the latest is.")


class DatabaseStatus(Answer):
    """The database as this process sees it."""

    revision = _text("Of its schema.", null=True)
    newest_revision = _text("That this process knows.")
    clock_skew_seconds = _seconds_since("Its clock minus that of this process.")


class Trouble(Answer):
    """Something that is not as it should be."""

    code = _text("Which, for programs.", example="no_workers")
    sentence = _text("What is the matter.", example="No worker lives: nothing is done.")
    hint = _text("What to do.", example="Start one: `opscore worker`.")


class Status(Answer):
    """What the whole installation is at, as of one moment."""

    problems = fields.List(
        fields.Nested(Trouble),
        metadata=_about("Empty if all is well. With `database_behind` the rest is not known."),
    )
    workers = fields.List(fields.Nested(WorkerThatLives))
    queues = fields.List(fields.Nested(QueueDepth))
    broker_error = _text("Why the depths of the queues are null, if they are.", null=True)
    fleet = fields.Nested(FleetStatus)
    waiting = fields.List(fields.Nested(WaitingTasks))
    runs = fields.List(fields.Nested(OpenRuns))
    approvals = fields.List(
        fields.Nested(ApprovalAsked), metadata=_about("The first 20; all of them are at `/tasks`.")
    )
    stuck = fields.List(fields.Nested(Stuck), metadata=_about("At most 20, oldest first."))
    keeper = fields.Nested(KeeperStatus)
    schedules = fields.Nested(ScheduleCounts)
    database = fields.Nested(DatabaseStatus)


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
