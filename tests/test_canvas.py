"""Blocks become Celery's messages."""

from celery import Celery
from test_graph import uid

from celeryconfig import make_app
from opscore import canvas
from opscore.canvas import LANE_HEADER, WAKES_HEADER
from opscore.config import Settings
from opscore.graph import MAX_NESTING, Block, Node, Parallel, Series, build


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


def nesting(block: Block) -> int:
    if isinstance(block, Parallel):
        return 1 + max(map(nesting, block.parts))
    return max(map(nesting, block.parts)) if isinstance(block, Series) else 0
