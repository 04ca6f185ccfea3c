"""Workflow documents: the graph they become, and every way they can be wrong."""

import json
import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opscore.definition import Busy, Retry, parse, read_document
from opscore.errors import InvalidDefinition, InvalidInput
from opscore.json_values import MAX_FAULTS, check_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
KEYS = st.sampled_from(
    [
        *("id", "name", "version", "inputSchema", "tasks", "output", "taskId", "type", "agentId"),
        *("agentCapability", "dependsOn", "nextTaskId", "forEach", "items", "maxParallel"),
        *("parameters", "retry", "busy", "maxAttempts", "backoffSeconds", "timeoutSeconds"),
        *("onFailure", "$ref", "pattern", "properties", "when", "seconds", "until", "workflowId"),
        *("tolerate", "onTimeout", "deadlineSeconds"),
    ]
)
WORDS = JSON | st.sampled_from(
    ["a", "b", "${tasks.a.output}", "${input.x}", "agent", "delay", "workflow", "#", "object"]
)
DOCUMENTS = st.recursive(
    WORDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner), max_leaves=25
)


def task(id, *depends_on, **more):
    return {"taskId": id, "dependsOn": list(depends_on), **more}


def faults_of(document):
    with pytest.raises(InvalidDefinition) as caught:
        parse(document)
    return caught.value.errors


def fault_at(document, pointer):
    faults = faults_of(document)
    assert list(faults) == [pointer], faults
    return " ".join(faults[pointer])


def input_faults(schema, value):
    with pytest.raises(InvalidInput) as caught:
        parse({"inputSchema": schema, "tasks": [task("a")]}).check_input(value)
    return caught.value.errors


# --- good documents


def test_without_edges_tasks_run_in_the_order_listed():
    definition = parse({"tasks": [{"taskId": id} for id in "cab"]})
    assert [(t.id, t.depends_on) for t in definition.tasks] == [
        ("c", ()),
        ("a", ("c",)),
        ("b", ("a",)),
    ]
    assert definition.leaves == ("b",)


def test_an_empty_depends_on_counts_as_naming_it():
    definition = parse({"tasks": [{"taskId": "a", "dependsOn": []}, {"taskId": "b"}]})
    assert [t.depends_on for t in definition.tasks] == [(), ()]
    assert definition.leaves == ("a", "b")


def test_depends_on_is_sorted_topologically_and_otherwise_as_listed():
    definition = parse({"tasks": [task("d", "b", "c"), task("c", "a"), task("b", "a"), task("a")]})
    assert [t.id for t in definition.tasks] == ["a", "c", "b", "d"]
    assert definition.task("d").depends_on == ("b", "c")


def test_next_task_id_is_the_older_spelling_of_one_edge():
    tasks = [
        {"taskId": "a", "nextTaskId": "c"},
        {"taskId": "b", "nextTaskId": "c"},
        {"taskId": "c", "nextTaskId": None},
    ]
    definition = parse({"tasks": tasks})
    assert definition.task("c").depends_on == ("a", "b")
    assert definition.leaves == ("c",)


def test_a_full_document_is_read():
    document = {
        "id": "digest",
        "name": "Digest",
        "description": "All of it",
        "version": "1.0",
        "inputSchema": {"type": "object"},
        "tasks": [
            {
                "taskId": "triage",
                "name": "Triage",
                "type": "agent",
                "agentCapability": "triage",
                "dependsOn": [],
                "forEach": {"items": "${input.tickets}", "maxParallel": 8},
                "parameters": {"ticket": "${item}", "n": "${index}"},
                "retry": {"maxAttempts": 4, "backoffSeconds": 1, "maxBackoffSeconds": 9},
                "busy": {"backoffSeconds": 2, "maxBackoffSeconds": 8, "maxWaitSeconds": 3600},
                "timeoutSeconds": 120,
                "onFailure": "continue",
            },
            task("write", "triage", agentId="writer", parameters={"t": "${tasks.triage.output}"}),
            task("free", "write"),
        ],
        "output": "${tasks.write.output}",
    }
    definition = parse(document)
    triage, write, _ = definition.tasks
    assert (definition.id, definition.name, definition.label) == ("digest", "Digest", "1.0")
    assert definition.document is document
    assert triage.for_each.max_parallel == 8
    assert triage.retry == Retry(4, 1.0, 9.0)
    assert triage.busy == Busy(2.0, 8.0, 3600.0)
    assert (triage.timeout_seconds, triage.on_failure) == (120.0, "continue")
    assert (write.agent_id, write.capability, write.references) == ("writer", None, {"triage"})
    assert definition.output_references == {"write"}
    assert definition.unbound() == ("free",)


def test_parameters_may_be_one_expression():
    first, second = parse(
        {
            "tasks": [
                task("a", parameters="${input}"),
                task("b", "a", parameters="${tasks.a.output}"),
            ]
        }
    ).tasks
    assert first.parameters.render({"input": {"n": 1}}) == {"n": 1}
    assert second.references == {"a"}


def test_defaults_are_as_documented():
    (only,) = parse({"tasks": [{"taskId": "a"}]}).tasks
    assert only.retry == Retry(3, 2.0, 60.0)
    assert only.busy == Busy(1.0, 60.0, 86_400.0)
    assert (only.timeout_seconds, only.on_failure, only.for_each) == (600.0, "fail", None)
    assert only.parameters.render({}) == {}


def test_a_long_backoff_raises_the_default_longest_one():
    (only,) = parse({"tasks": [{"taskId": "a", "retry": {"backoffSeconds": 120}}]}).tasks
    assert only.retry == Retry(3, 120.0, 120.0)


# --- bad documents


@pytest.mark.parametrize(
    ("document", "pointer", "part"),
    [
        ([], "", "must be an object"),
        ({}, "/tasks", "at least one"),
        ({"tasks": []}, "/tasks", "at least one"),
        ({"tasks": {}}, "/tasks", "must be a list"),
        ({"tasks": [task("a")], "inputScheme": {}}, "/inputScheme", "did you mean 'inputSchema'?"),
        ({"tasks": [task("a")], "version": 1.0}, "/version", "quotes"),
        ({"tasks": [task("a")], "id": "a b"}, "/id", "letters"),
        ({"tasks": [task("a", whenn="true")]}, "/tasks/0/whenn", "did you mean 'when'?"),
        ({"tasks": [task("a", when="${true}")]}, "/tasks/0/when", "without ${"),
        ({"tasks": [task("a", when="1 +")]}, "/tasks/0/when", "1 +"),
        ({"tasks": [task("a", when=True)]}, "/tasks/0/when", "text"),
        ({"tasks": [task("a", when="tasks.b.output")]}, "/tasks/0/when", "no task 'b'"),
        ({"tasks": [task("a", when="item == 1")]}, "/tasks/0/when", "no name 'item'"),
        ({"tasks": [task("a", seconds=5)]}, "/tasks/0/seconds", "no key 'seconds'"),
        ({"tasks": [task("a"), "b"]}, "/tasks/1", "must be an object, not text"),
        ({"tasks": [{}]}, "/tasks/0/taskId", "needs a taskId"),
        ({"tasks": [task("a"), task("é")]}, "/tasks/1/taskId", "letters"),
        ({"tasks": [task("a"), task("a")]}, "/tasks/1/taskId", "/tasks/0 has this id"),
        ({"tasks": [task("a", type="poll")]}, "/tasks/0/type", "'agent' or 'approval'"),
        (
            {"tasks": [task("a", type="approval", agentId="x")]},
            "/tasks/0/agentId",
            "no key 'agentId'",
        ),
        (
            {"tasks": [task("a", type="approval", onTimeout="approve")]},
            "/tasks/0/onTimeout",
            "timeoutSeconds",
        ),
        ({"tasks": [task("a", type="delay")]}, "/tasks/0/seconds", "either seconds or until"),
        ({"tasks": [task("a", type="delay", seconds=-1)]}, "/tasks/0/seconds", "above 0"),
        ({"tasks": [task("a", type="delay", until="noon")]}, "/tasks/0/until", "'noon'"),
        ({"tasks": [task("a", type="delay", until="2001-01-01")]}, "/tasks/0/until", "offset"),
        (
            {"tasks": [task("a", type="delay", until="2001-01-01T00:00:00Z")]},
            "/tasks/0/until",
            "is over",
        ),
        (
            {"tasks": [task("a", type="delay", forEach={"items": []}, seconds=1)]},
            "/tasks/0/forEach",
            "no key 'forEach'",
        ),
        ({"tasks": [task("a", type="workflow")]}, "/tasks/0/workflowId", "needs a workflowId"),
        (
            {"id": "w", "tasks": [task("a", type="workflow", workflowId="w")]},
            "/tasks/0/workflowId",
            "cannot run itself",
        ),
        (
            {"tasks": [task("a", forEach={"items": [], "forEach": {"items": []}})]},
            "/tasks/0/forEach/forEach",
            "another workflow",
        ),
        *(
            (
                {"tasks": [task("a", forEach={"items": [], "tolerate": tolerate})]},
                "/tasks/0/forEach/tolerate",
                '"10%"',
            )
            for tolerate in (-1, 1.5, True, "10", "101%", "ten%", None)
        ),
        ({"tasks": [task("a")], "deadlineSeconds": 0}, "/deadlineSeconds", "above 0"),
        ({"tasks": [task("a", agentId=None)]}, "/tasks/0/agentId", "left out"),
        ({"tasks": [task("a", parameters=[])]}, "/tasks/0/parameters", "must be an object"),
        ({"tasks": [task("a", parameters=None)]}, "/tasks/0/parameters", "must be an object"),
        ({"tasks": [task("a", parameters="x")]}, "/tasks/0/parameters", "or one expression such"),
        ({"tasks": [task("a", parameters="")]}, "/tasks/0/parameters", "or one expression such"),
        ({"tasks": [task("a", parameters="$${a}")]}, "/tasks/0/parameters", "or one expression"),
        (
            {"tasks": [task("a", parameters="${input} ${run}")]},
            "/tasks/0/parameters",
            "or one expression",
        ),
        ({"tasks": [task("a", parameters="${nothing}")]}, "/tasks/0/parameters", "'nothing'"),
        ({"tasks": [task("a", onFailure="skip")]}, "/tasks/0/onFailure", "'fail' or 'continue'"),
        ({"tasks": [{"taskId": "a", "dependsOn": "b"}]}, "/tasks/0/dependsOn", "must be a list"),
        ({"tasks": [task("a"), task("b", 5)]}, "/tasks/1/dependsOn/0", "id of a task"),
        ({"tasks": [task("fetch"), task("b", "fetc")]}, "/tasks/1/dependsOn/0", "'fetch'?"),
        ({"tasks": [task("a", "a")]}, "/tasks/0/dependsOn/0", "itself"),
        ({"tasks": [task("a"), task("b", "a", "a")]}, "/tasks/1/dependsOn/1", "once"),
        ({"tasks": [{"taskId": "a", "nextTaskId": "b"}]}, "/tasks/0/nextTaskId", "no task 'b'"),
        (
            {"tasks": [{"taskId": "a", "nextTaskId": "b"}, task("b")]},
            "/tasks/0/nextTaskId",
            "either dependsOn or nextTaskId",
        ),
        (
            {"tasks": [task("a", agentId="x", agentCapability="y")]},
            "/tasks/0/agentCapability",
            "not both",
        ),
        ({"tasks": [task("a", forEach={})]}, "/tasks/0/forEach/items", "forEach needs items"),
        (
            {"tasks": [task("a", forEach={"items": "x"})]},
            "/tasks/0/forEach/items",
            "one expression",
        ),
        (
            {"tasks": [task("a", forEach={"items": "${item}"})]},
            "/tasks/0/forEach/items",
            "no name 'item'",
        ),
        ({"tasks": [task("a", parameters={"x": "${item}"})]}, "/tasks/0/parameters/x", "'item'"),
        ({"tasks": [task("a")], "output": "${tasks.b.output}"}, "/output", "no task 'b'"),
        ({"tasks": [task("\0")]}, "/tasks/0/taskId", "NUL"),
    ],
)
def test_a_fault_is_named_at_its_place_with_the_way_out(document, pointer, part):
    assert part in fault_at(document, pointer)


def test_a_task_may_be_skipped_by_its_own_condition_or_when_all_before_it_may():
    document = {
        "tasks": [
            task("a"),
            task("b", "a", when="tasks.a.output > 1"),
            task("c", "b"),
            task("d", "a", "c"),
        ]
    }
    may = {t.id: t.may_be_skipped for t in parse(document).tasks}
    assert may == {"a": False, "b": True, "c": True, "d": False}
    assert parse(document).task("b").references == {"a"}


def test_a_stored_delay_may_be_over():
    document = {"tasks": [task("a", type="delay", until="2001-01-01T00:00:00Z")]}
    assert parse(document, is_stored=True).tasks[0].type == "delay"


@pytest.mark.parametrize(
    ("tolerate", "count", "tolerated"),
    [(None, 9, None), (0, 9, 0), (3, 9, 3), ("10%", 200, 20), ("10%", 9, 0), ("33.3%", 10, 3)],
)
def test_a_part_of_the_items_is_rounded_down(tolerate, count, tolerated):
    each = {"items": "${input.n}"} | ({} if tolerate is None else {"tolerate": tolerate})
    spec = parse({"tasks": [task("a", forEach=each)]}).tasks[0]
    assert spec.for_each.tolerated(count) == tolerated


@pytest.mark.parametrize("seconds", [0, -1, True, "5", None, float("nan"), float("inf"), 2_592_001])
def test_seconds_are_positive_finite_and_at_most_thirty_days(seconds):
    faults = faults_of(
        {"tasks": [task("a", timeoutSeconds=seconds, busy={"maxWaitSeconds": seconds})]}
    )
    assert set(faults) == {"/tasks/0/timeoutSeconds", "/tasks/0/busy/maxWaitSeconds"}


@pytest.mark.parametrize("attempts", [0, 101, True, 2.0, "3", None])
def test_attempts_are_whole_numbers_within_range(attempts):
    document = {"tasks": [task("a", retry={"maxAttempts": attempts})]}
    assert "1 to 100" in fault_at(document, "/tasks/0/retry/maxAttempts")


def test_the_longest_backoff_is_not_below_the_first():
    document = {"tasks": [task("a", retry={"backoffSeconds": 9, "maxBackoffSeconds": 8})]}
    assert "backoffSeconds (9)" in fault_at(document, "/tasks/0/retry/maxBackoffSeconds")


def test_a_circle_is_named_task_by_task():
    document = {"tasks": [task("a", "c"), task("b", "a"), task("c", "b"), task("d", "c")]}
    assert "a → b → c → a" in fault_at(document, "/tasks/0/dependsOn/0")


def test_circles_that_do_not_touch_are_all_named():
    document = {"tasks": [task("a", "b"), task("b", "a"), task("c", "d"), task("d", "c")]}
    assert set(faults_of(document)) == {"/tasks/0/dependsOn/0", "/tasks/2/dependsOn/0"}


def test_reading_a_task_that_is_no_ancestor_is_refused():
    document = {
        "tasks": [
            task("a"),
            task("b", "a", parameters={"ok": "${tasks.a.output}", "no": "${tasks.c.output}"}),
            task("c", "b", forEach={"items": "${tasks.c.output}"}, parameters={"ok": "${tasks.a}"}),
        ]
    }
    assert faults_of(document) == {
        "/tasks/1/parameters/no": [
            "Task 'c' does not run before this one; make this task depend on it."
        ],
        "/tasks/2/forEach/items": ["A task cannot read itself."],
    }


def test_all_faults_come_at_once():
    document = {
        "naem": "x",
        "inputSchema": {"type": "objct"},
        "tasks": [
            task("a", "zz", retry={"maxAttempts": 0}, parameters={"x": "${1 +}"}),
            task("a", "b"),
            task("b", "b", timeoutSeconds="soon"),
        ],
        "output": "${tasks.q.output} ${nope}",
    }
    assert set(faults_of(document)) == {
        "/naem",
        "/inputSchema/type",
        "/tasks/0/dependsOn/0",
        "/tasks/0/retry/maxAttempts",
        "/tasks/0/parameters/x",
        "/tasks/1/taskId",
        "/tasks/2/dependsOn/0",
        "/tasks/2/timeoutSeconds",
        "/output",
    }


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(DOCUMENTS | st.fixed_dictionaries({"tasks": st.lists(st.dictionaries(KEYS, WORDS))}))
def test_parse_raises_nothing_but_invalid_definition(document):
    try:
        parse(document)
    except InvalidDefinition as error:
        assert error.errors
        assert all(pointer == "" or pointer[0] == "/" for pointer in error.errors)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.randoms(use_true_random=False))
def test_random_graphs_come_back_in_order_and_a_bent_edge_is_found(size, chance):
    edges = {n: sorted(chance.sample(range(n), chance.randint(0, min(n, 3)))) for n in range(size)}
    edges[size - 1] = sorted({*edges[size - 1], 0})
    rows = [
        task(
            f"t{n}",
            *(f"t{k}" for k in before),
            parameters={"x": [f"${{tasks.t{k}.output}}" for k in before]},
        )
        for n, before in edges.items()
    ]
    chance.shuffle(rows)
    definition = parse({"tasks": rows})
    seen = set()
    for spec in definition.tasks:
        assert seen.issuperset(spec.depends_on)
        seen.add(spec.id)
    assert len(seen) == size
    assert set(definition.leaves) == seen - {
        id for spec in definition.tasks for id in spec.depends_on
    }
    first = next(row for row in rows if row["taskId"] == "t0")
    first["dependsOn"] = [f"t{size - 1}"]
    rows[-1]["onFailure"] = "shrug"
    faults = faults_of({"tasks": rows})
    assert any("wait for each other" in s for sentences in faults.values() for s in sentences)
    assert f"/tasks/{size - 1}/onFailure" in faults


# --- limits


@pytest.mark.parametrize("bent", [False, True])
def test_five_thousand_tasks_in_a_row_take_about_a_second(bent):
    rows = [task(f"t{n}", *([f"t{n - 1}"] if n else [])) for n in range(5_000)]
    for n, row in enumerate(rows[1:], 1):
        row["parameters"] = {"x": f"${{tasks.t{n // 2}.output}}"}
    rows[0]["dependsOn"] = ["t4999"] if bent else []
    random.Random(1).shuffle(rows)
    started = time.process_time()
    if bent:
        assert len(faults_of({"tasks": rows})) == 1
    else:
        assert len(parse({"tasks": rows}).tasks) == 5_000
    assert time.process_time() - started < 5  # a loaded machine; alone it is below one


def test_more_than_five_thousand_tasks_are_refused():
    assert "at most 5,000" in fault_at({"tasks": [task(f"t{n}") for n in range(5_001)]}, "/tasks")


def test_a_document_beyond_one_mebibyte_is_refused():
    assert "1,048,576 bytes" in fault_at({"tasks": [task("a")], "output": "x" * 1_048_576}, "")


def test_thousands_of_faults_are_cut_short():
    faults = faults_of({"tasks": [{f"unknown{n}": 1} for n in range(5_000)]})
    assert sum(map(len, faults.values())) == MAX_FAULTS
    assert "more than 500" in faults[""][0]


@pytest.mark.parametrize("depth", [65, 100_000])
def test_deep_nesting_is_refused_without_recursion(depth):
    value = []
    for _ in range(depth):
        value = [value]
    assert "64 deep" in " ".join(*faults_of({"tasks": [task("a")], "output": value}).values())


@pytest.mark.parametrize(
    ("value", "pointer", "part"),
    [
        ({"a": ["x\0"]}, "/a/0", "NUL"),
        ({"a\0": 1}, "", "NUL"),
        ({"a/b~": "\ud800"}, "/a~1b~0", "surrogate"),
        ([float("nan")], "/0", "NaN"),
        ([float("inf")], "/0", "NaN"),
        ([2**63], "/0", "64 bit"),
        ([(1,)], "/0", "tuple"),
        ({1: 2}, "", "Keys must be text"),
        (["x" * 99], "", "100 bytes"),
    ],
)
def test_what_is_not_storable_json_is_told(value, pointer, part):
    faults = check_json(value, max_bytes=100)
    assert part in " ".join(faults[pointer])


@given(
    st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(), st.lists)
)
def test_the_size_limit_is_that_of_compact_json(value):
    try:
        exact = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    except UnicodeEncodeError:
        return
    if "\\u0000" not in json.dumps(value):
        assert not check_json(value, max_bytes=exact)
        assert check_json(value, max_bytes=exact - 1).fatal


def test_shared_parts_count_as_often_as_they_appear():
    value = ["x" * 100]
    for _ in range(40):
        value = [value, value]
    assert check_json(value).fatal


# --- input


def test_input_faults_are_all_told_under_input():
    schema = {
        "type": "object",
        "required": ["tickets"],
        "properties": {
            "tickets": {"type": "array", "items": {"type": "integer"}},
            "n": {"minimum": 3},
        },
        "additionalProperties": False,
    }
    faults = input_faults(schema, {"tickets": [1, "x", 2, None], "n": 1, "zz": 0})
    assert set(faults) == {"/input", "/input/tickets/1", "/input/tickets/3", "/input/n"}
    assert set(input_faults(schema, {})) == {"/input"}


def test_without_a_schema_any_storable_json_is_accepted():
    definition = parse({"tasks": [task("a")]})
    for value in (None, 1, "x", [], {"a": [1.5]}):
        definition.check_input(value)
    with pytest.raises(InvalidInput) as caught:
        definition.check_input({"a": "\0"})
    assert list(caught.value.errors) == ["/input/a"]


@pytest.mark.parametrize(
    ("schema", "pointer", "part"),
    [
        ({"type": "objct"}, "/type", "no JSON Schema"),
        (
            {"properties": {"a": {"$ref": "https://x.test/s"}}},
            "/properties/a/$ref",
            "within the schema",
        ),
        ({"$ref": "#/$defs/none"}, "/$ref", "no schema at"),
        ({"$ref": "#/const", "const": {"$ref": "https://x.test"}}, "/$ref", "no schema at"),
        ({"$ref": "#"}, "", "without end"),
        ({"pattern": "("}, "/pattern", "no regular expression"),
        ({"pattern": "(?=a)b"}, "/pattern", "look-around"),
        ({"pattern": "a" * 501}, "/pattern", "too long"),
        ({"patternProperties": {"(a+)+$": {}}}, "/patternProperties", "not supported"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "/$schema", "2020-12"),
        ({"properties": {"a": {"$id": "b"}}}, "/properties/a/$id", "at the top"),
        ({"description": "x" * 102_400}, "", "102,400 bytes"),
    ],
)
def test_a_schema_that_could_do_harm_is_refused(schema, pointer, part):
    assert part in fault_at({"inputSchema": schema, "tasks": [task("a")]}, f"/inputSchema{pointer}")


def test_references_that_multiply_are_refused():
    defs = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)} | {
        "a40": {}
    }
    document = {"inputSchema": {"$ref": "#/$defs/a0", "$defs": defs}, "tasks": [task("a")]}
    assert "multiply" in fault_at(document, "/inputSchema")


def test_references_within_the_schema_are_followed():
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://x.test/tree",
        "$defs": {"leaf": {"type": "string"}},
        "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
    }
    assert set(input_faults(schema, {"next": {"next": {"leaf": 1}}})) == {"/input/next/next/leaf"}


def test_patterns_and_unique_items_take_linear_time():
    schema = {
        "properties": {
            "a": {"pattern": "^(a+)+$"},
            "b": {"uniqueItems": True},
            "c": {"uniqueItems": True},
        }
    }
    value = {"a": "a" * 10_000 + "b", "b": [{"n": n} for n in range(20_000)], "c": [1, True, 1.0]}
    started = time.process_time()
    assert set(input_faults(schema, value)) == {"/input/a", "/input/c"}
    assert time.process_time() - started < 5


# --- reading text


def test_json_and_yaml_read_to_the_same_document():
    text = "id: a\nversion: '1.0'\ntasks:\n  - {taskId: b, retry: {maxAttempts: 2}}\n"
    as_json = (
        '{"id": "a", "version": "1.0", "tasks": [{"taskId": "b", "retry": {"maxAttempts": 2}}]}'
    )
    assert read_document(text, "yaml") == read_document(as_json.encode(), "json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("yes", "yes"),
        ("on: off", {"on": "off"}),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("12:30:00", "12:30:00"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("-5", -5),
        ("1.5e3", 1500.0),
        ("~", None),
        ("a:", {"a": None}),
        ("'5'", "5"),
        (".inf", ".inf"),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_yaml_has_only_the_scalars_of_json(text, value):
    assert read_document(text, "yaml") == value


@pytest.mark.parametrize(
    ("kind", "text", "part"),
    [
        ("json", "", "line 1, column 1"),
        ("json", '{\n "a": 1,}', "line 2, column 9"),
        ("json", '{"a": NaN}', "NaN"),
        ("json", '{"a": 1, "a": 2}', "'a' appears twice"),
        ("json", b'{"a": "\xff"}', "not UTF-8"),
        ("json", "[" * 100_000, "line 1, column 65"),
        ("json", '"' + "\\" * 100_001, "line 1"),
        ("json", '{"a": ' * 65, "Nested deeper"),
        ("json", "x" * 5_000_000, "longer than"),
        ("yaml", "", "empty"),
        ("yaml", "a: [1", "line 2, column 1"),
        ("yaml", "a: &x 1", "Anchors and aliases"),
        ("yaml", "a: *x", "Anchors and aliases"),
        ("yaml", "a: !!python/object:os.system x", "Tags"),
        ("yaml", "a: 1\nb: 2\na: 3", "'a' appears twice: line 3, column 1"),
        ("yaml", "1: a", "Keys must be text"),
        ("yaml", "true: a", "Keys must be text"),
        ("yaml", "? [a]\n: b", "Keys must be text"),
        ("yaml", "a\n---\nb", "one document"),
        ("yaml", "[" * 10_000, "Nested deeper"),
        ("yaml", "- " * 10_000, "Nested deeper"),
        ("yaml", "a: \0", "not YAML"),
        ("yaml", b"\xff\xfe\xff", "not UTF-8"),
        ("yaml", "a: '\ud800'", "not YAML"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_its_place(kind, text, part):
    with pytest.raises(InvalidDefinition) as caught:
        read_document(text, kind)
    assert part in caught.value.errors[""][0]


def test_numbers_beyond_all_bounds_are_read_cheaply_and_refused_after():
    assert list(check_json(read_document('{"a": 1e999, "b": ' + "9" * 50_000 + "}", "json"))) == [
        "/a",
        "/b",
    ]
    assert list(check_json(read_document("a: 1e999", "yaml"))) == ["/a"]


@given(st.text() | st.binary(), st.sampled_from(["json", "yaml"]))
def test_reading_raises_nothing_but_invalid_definition(text, kind):
    try:
        read_document(text, kind)
    except InvalidDefinition as error:
        assert list(error.errors) == [""]


# --- Fallbacks, and runs at once


def test_fallbacks_are_agents_named_once_behind_one_that_is_wanted() -> None:
    task = {"taskId": "a", "agentId": "x", "fallback": ["y", "z"]}
    assert parse({"id": "w", "tasks": [task]}).task("a").fallback == ("y", "z")
    faults = {
        "/tasks/0/fallback/0": {"fallback": [7]},
        "/tasks/0/fallback/1": {"fallback": ["y", "x"]},
        "/tasks/0/fallback": {"fallback": "y"},
    }
    for pointer, change in faults.items():
        with pytest.raises(InvalidDefinition) as refused:
            parse({"id": "w", "tasks": [task | change]})
        assert list(refused.value.errors) == [pointer]
    with pytest.raises(InvalidDefinition) as refused:
        parse({"id": "w", "tasks": [{"taskId": "a", "fallback": ["y"]}]})
    assert list(refused.value.errors) == ["/tasks/0/fallback"]


@pytest.mark.parametrize("most", [0, -1, 1.5, "2", True, None, 10_001])
def test_runs_at_once_are_a_whole_number_of_rows_soon_written(most: object) -> None:
    with pytest.raises(InvalidDefinition) as refused:
        parse({"id": "w", "maxConcurrentRuns": most, "tasks": [{"taskId": "a", "agentId": "x"}]})
    assert list(refused.value.errors) == ["/maxConcurrentRuns"]
