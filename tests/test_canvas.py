"""Blocks become Celery's messages."""

from functools import cache
from typing import Any

from celery import Celery, Signature, chord, group
from celery.canvas import _chain, maybe_signature
from hypothesis import given, settings
from test_graph import graph, graphs, uid

from celeryconfig import make_app
from opscore import canvas
from opscore.canvas import LANE_HEADER, WAKES_HEADER
from opscore.config import Settings
from opscore.graph import MAX_NESTING, Block, Node, Parallel, Series, build


@cache
def app() -> Celery:
    return make_app(
        Settings.from_env({"DATABASE_URL": "postgresql://h/d", "OPSCORE_API_KEY": "k" * 20})
    )


def test_messages_stay_small_and_headers_shallow() -> None:
    nodes = [Node(uid(0), frozenset(), 60.0)]
    for level in range(8):
        (join,) = nodes[-1:]
        wide = [Node(uid(100 * level + n + 1), frozenset({join.id}), 60.0) for n in range(3)]
        nodes += [*wide, Node(uid(100 * level + 50), frozenset(n.id for n in wide), 60.0)]
    made = build(nodes)
    assert max(nesting(block) for block in made.blocks) <= MAX_NESTING
    (signature,) = canvas.signatures(app(), made, nodes, 1, None)
    assert len(str(dict(signature))) < 60_000


def test_a_lane_is_a_chain_whose_tasks_know_that_nothing_orders_them() -> None:
    nodes = [Node(uid(n), frozenset(), 60.0) for n in range(100)]
    nodes.append(Node(uid(100), frozenset(n.id for n in nodes), 60.0))
    made = build(nodes)
    signatures = canvas.signatures(app(), made, nodes, 1, None)
    assert len(signatures) == len(made.lanes) == 5
    for signature in signatures:
        for visit in (signature, *signature.options["chain"]):
            assert visit.options["headers"][LANE_HEADER]
            assert visit.options["headers"][WAKES_HEADER], "the join comes by no message"


def test_the_outline_is_written_in_words() -> None:
    nodes = graph({"a": "", "b": "a", "c": "a", "d": "bc", "e": "d"})
    assert outlined(nodes) == [
        {"chain": ["a", {"chord": {"header": ["b", "c"], "body": "d"}}, "e"]}
    ]
    nodes = graph({"a": "", "b": "a", "c": "a", "d": "bc", "e": "bc", "f": "de"})
    inner = {"chord": {"header": ["d", "e"], "body": "f"}}
    assert outlined(nodes) == [{"chain": ["a", {"chord": {"header": ["b", "c"], "body": inner}}]}]
    nodes = graph({"a": "", "b": "", "c": "a", "d": "ab", "e": "cd"})
    assert outlined(nodes) == [
        {"chain": ["a", {"chord": {"header": ["c", "d"], "body": "e"}}]},
        "b",
    ]


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_the_outline_says_what_celery_is_about_to_send(nodes: list[Node]) -> None:
    made = build(nodes)
    sent = canvas.signatures(app(), made, nodes, 1, None)
    assert canvas.outline(made, nodes, str) == [read(one) for one in sent]


def outlined(nodes: list[Node]) -> list[canvas.Step]:
    return canvas.outline(build(nodes), nodes, lambda id: chr(id.int))


def read(signature: Signature) -> canvas.Step:
    """Say what Celery makes of a signature when it is sent; tasks by their ids."""
    signature = maybe_signature(signature, app=app())
    if isinstance(signature, chord):
        header: Any = read(group(signature.tasks))
        return {"chord": {"header": header["group"], "body": read(signature.body)}}
    if isinstance(signature, group):
        return {"group": [read(part) for part in signature.tasks]}
    if isinstance(signature, _chain):
        steps, _ = signature.prepare_steps((), {}, signature.tasks)
        read_steps = [read(step) for step in reversed(steps)]
        return {"chain": read_steps} if len(steps) > 1 else read_steps[0]
    return read_visit(signature)


def read_visit(signature: Signature) -> canvas.Step:
    name, options = str(signature.args[0]), signature.options
    linked = [read(part) for part in options.get("link") or ()]
    step: Any = {"link": {"task": name, "then": linked}} if linked else name
    behind = [read(part) for part in reversed(options.get("chain") or ())]
    word = "lane" if options["headers"][LANE_HEADER] else "chain"
    return {word: [step, *behind]} if behind else step


def nesting(block: Block) -> int:
    if isinstance(block, Parallel):
        return 1 + max(map(nesting, block.parts))
    return max(map(nesting, block.parts)) if isinstance(block, Series) else 0
