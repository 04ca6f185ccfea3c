"""Templates and their expressions: what they read, what they give, and what they refuse."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opscore.expressions import ITEM_NAMES, NAMES, ExpressionError, Template
from opscore.json_values import Faults

SCOPE = {
    "input": {
        "n": 3,
        "half": 0.5,
        "text": "é",
        "list": [1, 2, 3],
        "nothing": None,
        "people": [{"name": "Ada", "tags": ["x", "y"]}, {"name": "Bob", "tags": []}],
    },
    "tasks": {
        "a": {"output": {"z": 1}, "status": "completed", "error": None},
        "a-b": {"output": [], "status": "failed", "error": {"code": "gave_up"}},
    },
    "run": {"id": "r1", "workflowId": None},
    "item": {"k": 5},
    "index": 7,
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def compiled(value, names=ITEM_NAMES):
    faults = Faults()
    template = Template.compile(value, "/here", faults, names)
    assert faults == {}
    return template


def render(value, scope=SCOPE):
    return compiled(value).render(scope)


def faults_of(value, names=NAMES):
    faults = Faults()
    Template.compile(value, "/here", faults, names)
    return [sentence for sentences in faults.values() for sentence in sentences]


def failure_of(value, scope=SCOPE):
    with pytest.raises(ExpressionError) as caught:
        render(value, scope)
    return str(caught.value)


@given(JSON)
def test_json_without_expressions_renders_to_itself(value):
    if "${" not in json.dumps(value):
        assert render(value) == value


@given(JSON)
def test_any_input_comes_back_as_it_is_through_one_expression(value):
    assert render("${input}", {"input": value}) == value


@given(st.text())
def test_any_text_can_be_written_literally_by_doubling_the_sign(text):
    assert render(text.replace("${", "$${")) == text or "$${" in text


@given(st.text(alphabet="abtasksinput.[](){}'\"\\$ +-*/,:?!&|<=>0123456789uxr\n", max_size=60))
def test_no_text_makes_compiling_raise_or_rendering_raise_anything_else(text):
    faults = Faults()
    template = Template.compile(f"${{{text}}}", "/here", faults)
    if not faults:
        try:
            template.render(SCOPE)
        except ExpressionError as error:
            assert "/here" in str(error)


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("${input.n}", 3),
        ("${ input.n }", 3),
        ("${input.nothing}", None),
        ('${input["list"][1]}', 2),
        ("${tasks.a}", SCOPE["tasks"]["a"]),
        ("${tasks['a-b'].error.code}", "gave_up"),
        ("${run.workflowId}", None),
        ("${item.k + index}", 12),
        ("${double(input.n) * 1.5}", 4.5),
        (
            "n=${input.n} t=${input.text} l=${input.list} x=${input.nothing}",
            "n=3 t=é l=[1,2,3] x=null",
        ),
        ("${input.n}${input.n}", "33"),
        ("a $${input.n} b", "a ${input.n} b"),
        ("$${", "${"),
        ("$", "$"),
        ("${{'a': {'b': '}'}}}", {"a": {"b": "}"}}),
        ('${"""}"""}', "}"),
        ("${r'\\'}", "\\"),
        ("${'\\'}'}", "'}"),
        ("${input.n // } comment\n}", 3),
        ("${'tasks.zz + nope'}", "tasks.zz + nope"),
        ("${input.list.map(x, x * 2)}", [2, 4, 6]),
        ("${input.list.map(x, x > 1, x * 2)}", [4, 6]),
        ("${input.list.filter(x, x > 1 || false)}", [2, 3]),
        ("${input.list.all(x, x > 0) && input.list.exists_one(y, y == 2)}", True),
        ("${input.list.exists(x, [x].exists(y, y == 3))}", True),
        ("${input.people.map(p, p.tags.map(t, p.name + t))}", [["Adax", "Aday"], []]),
        ("${has(input.zz) ? 1 : 2}", 2),
        ("${type(input.n) == int}", True),
        ("${input.text.matches('^[a-z]$')}", False),
        ("${timestamp('2024-01-01T02:00:00+02:00')}", "2024-01-01T00:00:00Z"),
        ("${duration('90s')}", 90.0),
        ("${b'ab'}", "YWI="),
        ("${3u}", 3),
    ],
)
def test_an_expression_gives_its_value(template, value):
    assert render(template) == value


def test_expressions_are_found_at_any_depth_and_keep_their_type():
    template = {"a": [{"b": "${input.n}"}, "${input.list}"], "c": True, "d": 1.5}
    assert render(template) == {"a": [{"b": 3}, [1, 2, 3]], "c": True, "d": 1.5}


def test_a_template_says_which_tasks_it_reads_and_where():
    template = compiled(
        {"x": ["${tasks.a.output}"], "y/z": "${tasks['a-b'].status + tasks.a.status}"}
    )
    assert template.reads == (("/here/x/0", "a"), ("/here/y~1z", "a-b"), ("/here/y~1z", "a"))
    assert template.references == {"a", "a-b"}


def test_whether_a_template_is_one_expression_is_told():
    assert compiled("${input.list}").is_expression
    assert not compiled("${input.n}, ${input.n}").is_expression
    assert not compiled(["${input.n}"]).is_expression


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("${}", "empty"),
        ("${ // nothing\n}", "empty"),
        ("${1", "not closed"),
        ("${1 +}", "not CEL"),
        ("${1} ${1 /* no */}", "not CEL"),
        ("${inputt.x}", "did you mean 'input'?"),
        ("${[1].map(x, x) + x}", "no name 'x'"),
        ("${[1].map(x, y)}", "no name 'y'"),
        ("${item}", "no name 'item'"),
        ("${.input.x}", "no name '.input'"),
        ("${siz(input.x)}", "did you mean 'size'?"),
        ("${meter_(0, [])}", "no function 'meter_'"),
        ("${cel.bind(x, 1, x)}", "no name 'cel'"),
        ("${[1].map(input, 1)}", "bind another name"),
        ("${tasks}", "fixed id"),
        ("${tasks[input.x]}", "fixed id"),
        ("${tasks.map(t, t)}", "fixed id"),
        ("${tasks[0]}", "fixed id"),
        ("${tasks['a' + 'b']}", "fixed id"),
        ("${tasks.a.result}", "Only .output, .status or .error"),
        ("${tasks.a[input.x]}", "Only .output, .status or .error"),
        ("${tasks.a.size()}", "Only .output, .status or .error"),
        ("${tasks.fetch-logs.output}", 'tasks["my-id"]'),
        ("${run.name}", "run has only"),
        ("${input.x.matches(input.y)}", "literal"),
        ("${input.x.matches('(')}", "no regular expression"),
        ("${input.x.matches('(a{99}){99}')}", "too long or repeats too much"),
        ("${'" + "a" * 5_000 + "'}", "not closed within 4,096"),
        ("${" + "1+" * 600 + "1}", "more than 1,000"),
        ("${" + "[" * 33 + "]" * 33 + "}", "32 deep"),
        ("${" + "[1].map(x, " * 9 + "1" + ")" * 9 + "}", "8 deep"),
        ("${'\ud800'}", "not CEL"),
        ({"${input.x}": 1}, "Keys are not rendered"),
    ],
)
def test_a_bad_expression_is_refused_with_a_way_out(template, part):
    sentences = faults_of(template)
    assert any(part in sentence for sentence in sentences), sentences


def test_all_faults_of_a_template_come_at_once():
    faults = Faults()
    Template.compile({"a": "${x} ${y}", "b": ["${tasks}"]}, "/here", faults)
    assert {place: len(sentences) for place, sentences in faults.items()} == {
        "/here/a": 2,
        "/here/b/0": 1,
    }


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("${input.zz}", "input has no key 'zz'; it has half, list"),
        ("${input.zz + 1}", "no key 'zz'"),
        ("${input.list[9]}", "input.list has 3 items"),
        ("${input.nothing.x}", "input.nothing is null and has no 'x'"),
        ("${tasks.later.output}", "tasks has no key 'later'"),
        ("${input.n + input.half}", "mixing int"),
        ("${input.n / 0}", "division by zero"),
        ("${9223372036854775807 + 1}", "verflow"),
        ("${1.0 / 0.0}", "NaN or infinite"),
        ("${18446744073709551615u}", "64 bit"),
        ("${{1: 2}}", "keys that are no text"),
        ("${string(true)}", "string cannot be used on these values"),
        ("${timestamp('0000-01-01T00:00:00Z')}", "year 0"),
    ],
)
def test_a_failing_expression_names_place_expression_and_reason(template, part):
    message = failure_of({"p": template})
    assert message.startswith("/here/p: ${")
    assert part in message


@pytest.mark.parametrize(
    "expression",
    [
        "input.map(x, x)",
        "input.map(x, input)",
        "input.exists(x, input.map(y, y) == []) || true",
        "[1]" + ".map(x, [x, x])" * 60,
        "['a']" + ".map(x, x + x)" * 60,
        "[" + "input, " * 400 + "1]",
    ],
)
def test_an_expression_that_would_run_away_is_stopped(expression):
    started = time.process_time()
    assert "steps; use forEach" in failure_of(f"${{{expression}}}", {"input": ["a"] * 40_000})
    assert time.process_time() - started < 20


def test_texts_that_multiply_are_stopped():
    failure_of(["${input}" * 500] * 100, {"input": "a" * 500_000})


def test_loops_over_a_few_thousand_items_are_no_trouble():
    people = [{"id": n, "text": "a" * 300} for n in range(2_000)]
    scope = {"input": people}
    assert render("${input.map(p, p.id)}", scope) == list(range(2_000))
    assert len(render("${input.filter(p, p.id < 5)}", scope)) == 5
    assert render("${input.exists(p, p.id == 1999)}", scope) is True


def test_the_deepest_accepted_expressions_fit_in_a_threads_stack():
    nested = [o * 32 + "1" + c * 32 for o, c in ("()", "[]", ("{1:", "}"), ("-(", ")"))]
    chains = ["+".join(["1"] * 500), "input" + ".a" * 499, "!" * 998 + "true"]
    both = "(" * 32 + "+".join(["1"] * 180) + (")" + "+1" * 9) * 32
    loops = "[" * 24 + "[1].exists(x, " * 8 + "true" + ")" * 8 + "]" * 24
    script = (
        "import json, sys, threading\n"
        "from opscore.expressions import Template, ExpressionError\n"
        "from opscore.json_values import Faults\n"
        "def run():\n"
        "    for source in json.loads(sys.argv[1]):\n"
        "        faults = Faults()\n"
        "        template = Template.compile('${' + source + '}', '', faults)\n"
        "        try: faults or template.render({'input': {}})\n"
        "        except ExpressionError: pass\n"
        "threading.stack_size(2 * 1024 * 1024)\n"
        "thread = threading.Thread(target=run); thread.start(); thread.join(); print('alive')\n"
    )
    sources = json.dumps([*nested, *chains, both, loops])
    done = subprocess.run([sys.executable, "-c", script, sources], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr


def test_the_library_comes_without_its_command_line_which_still_can_be_had() -> None:
    program = (
        "import sys, opscore.expressions, opscore.input_schema\n"
        "assert 'prompt_toolkit' not in sys.modules and 'cel.cli' not in sys.modules\n"
        "import cel.cli\n"
        "assert 'prompt_toolkit' in sys.modules and cel.cli.app and cel.evaluate('1 + 1') == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
