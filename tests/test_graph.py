"""The graph becomes blocks: nothing is lost, nothing comes early, nothing waits for a stranger."""

from collections import defaultdict
from itertools import chain
from uuid import UUID, uuid4

from hypothesis import given, settings
from hypothesis import strategies as st

from opscore.graph import (
    AHEAD,
    LANE,
    LANES,
    WIDE,
    Block,
    Canvas,
    Node,
    Parallel,
    Series,
    build,
    lanes,
)

Edges = dict[str, str]


def graph(edges: Edges) -> list[Node]:
    """Make nodes of `{"c": "ab"}`: c depends on a and b. Ids are the letters' own."""
    return [
        Node(uid(name), frozenset(uid(d) for d in dependencies), 60.0)
        for name, dependencies in edges.items()
    ]


def uid(name: str | int) -> UUID:
    return UUID(int=ord(name) if isinstance(name, str) else name + 1)


def drawn(block: Block) -> str:
    """Write a block as text: `a>(b|c)>d`."""
    if isinstance(block, Series):
        return ">".join(map(drawn, block.parts))
    if isinstance(block, Parallel):
        return "(" + "|".join(sorted(map(drawn, block.parts))) + ")"
    return chr(block.int)


def test_a_line_is_one_chain() -> None:
    made = build(graph({"a": "", "b": "a", "c": "b"}))
    assert [drawn(block) for block in made.blocks] == ["a>b>c"]
    assert not made.wakes and not made.beyond and not made.links


def test_a_diamond_is_a_chord_inside_a_chain() -> None:
    made = build(graph({"a": "", "b": "a", "c": "a", "d": "bc"}))
    assert [drawn(block) for block in made.blocks] == ["a>(b|c)>d"]
    assert not made.wakes


def test_a_fork_without_a_join_is_a_link_or_a_group_and_no_barrier() -> None:
    made = build(graph({"a": "", "b": "a", "c": "a", "d": "b"}))
    assert carried_before(made)[uid("c")] == {uid("a")}
    assert carried_before(made)[uid("d")] == {uid("a"), uid("b")}


def test_in_an_n_graph_the_edge_no_canvas_can_express_is_left_to_the_claim() -> None:
    made = build(graph({"a": "", "b": "", "c": "a", "d": "ab", "e": "cd"}))
    before = carried_before(made)
    assert uid("b") not in before[uid("c")], "c must not wait for b"
    late = {uid("a"), uid("b")} - before[uid("d")]
    assert len(late) == 1 and late <= made.wakes, "whoever does not bring d must wake it"


def test_what_is_too_far_ahead_is_held_back() -> None:
    nodes = [Node(uid(n), frozenset({uid(n - 1)} if n else ()), 60.0) for n in range(200)]
    made = build(nodes)
    assert len(made.beyond) == 200 - AHEAD - 1
    assert made.wakes == {uid(AHEAD)}, "the last of the segment wakes the first beyond"


def test_siblings_too_many_for_one_message_are_held_back_together() -> None:
    nodes = [Node(uid(0), frozenset(), 60.0)]
    nodes += [Node(uid(n), frozenset({uid(0)}), 60.0) for n in range(1, 2001)]
    nodes.append(Node(uid(2001), frozenset(n.id for n in nodes[1:]), 60.0))
    made = build(nodes)
    assert made.blocks == (uid(0),) and made.wakes == {uid(0)}


def test_many_side_by_side_share_messages_and_their_join_is_left_to_the_claim() -> None:
    nodes = [Node(uid(n), frozenset(), 60.0) for n in range(2000)]
    nodes.append(Node(uid(2000), frozenset(n.id for n in nodes), 60.0))
    made = build(nodes)
    assert made.blocks == () and made.beyond == (uid(2000),)
    assert [task for lane in made.lanes for task in lane] == [n.id for n in nodes[:2000]]
    assert max(map(len, made.lanes)) == LANE
    assert made.wakes == {n.id for n in nodes[:2000]}


def test_few_side_by_side_are_a_chord() -> None:
    nodes = [Node(uid(n), frozenset(), 60.0) for n in range(WIDE)]
    nodes.append(Node(uid(WIDE), frozenset(n.id for n in nodes), 60.0))
    made = build(nodes)
    assert made.lanes == () and not made.beyond
    assert carried_before(made)[uid(WIDE)] == {n.id for n in nodes[:WIDE]}


def test_lanes_are_several_and_lose_nobody() -> None:
    for count in (1, 2, WIDE, WIDE + 1, 50, 99, 1000):
        ids = [uid(n) for n in range(count)]
        made = lanes(ids)
        assert [task for lane in made for task in lane] == ids
        assert len(made) == count if count <= WIDE else len(made) >= LANES
    assert lanes([]) == ()


def test_a_segment_takes_only_what_follows_its_start_alone() -> None:
    nodes = graph({"a": "", "b": "", "c": "a", "d": "ab"})
    made = build(nodes, start={uid("a")})
    assert set(carried_before(made)) == {uid("a"), uid("c")}, "d also waits for b: it is woken"
    assert made.wakes == {uid("a")}


def nodes_left(nodes: list[Node], over: set[UUID]) -> list[Node]:
    return [
        Node(node.id, node.depends_on - over, node.timeout_seconds)
        for node in nodes
        if node.id not in over
    ]


def carried_before(made: Canvas) -> dict[UUID, set[UUID]]:
    """Return for each task in the canvas those that must be over before its visit is published."""
    before: dict[UUID, set[UUID]] = {}

    def walk(block: Block, over: set[UUID]) -> set[UUID]:
        if isinstance(block, Series):
            for part in block.parts:
                over = walk(part, over)
            return over
        if isinstance(block, Parallel):
            return over.union(*(walk(part, over) for part in block.parts))
        assert block not in before, "a task is visited once"
        before[block] = over
        for linked in made.links.get(block, ()):
            walk(linked, over | {block})
        return over | {block}

    for block in [*made.blocks, *chain.from_iterable(made.lanes)]:
        walk(block, set())
    return before


@st.composite
def graphs(draw: st.DrawFn, size: int = 60) -> list[Node]:
    """Any graph, and some that begin with many tasks side by side."""
    count = draw(st.integers(1, size))
    nodes = [Node(uid(n), frozenset(), 60.0) for n in range(min(count, draw(st.integers(0, 40))))]
    for n in range(len(nodes), count):
        among = draw(st.sets(st.integers(max(0, n - 8), n - 1), max_size=3)) if n else set()
        nodes.append(Node(uid(n), frozenset(map(uid, among)), 60.0))
    return nodes


def ancestors(nodes: list[Node]) -> dict[UUID, set[UUID]]:
    known: dict[UUID, set[UUID]] = {}
    for node in nodes:
        known[node.id] = set(node.depends_on).union(*(known[d] for d in node.depends_on))
    return known


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_every_task_is_visited_once_behind_its_ancestors_only_or_woken_or_held_back(
    nodes: list[Node],
) -> None:
    made = build(nodes)
    before, known = carried_before(made), ancestors(nodes)
    assert set(before) | set(made.beyond) == {node.id for node in nodes}
    assert not set(before) & set(made.beyond) and set(made.joins) <= set(before)
    for node in nodes:
        if node.id in before:
            assert before[node.id] <= known[node.id], "no barrier the definition did not ask for"
            kept = node.depends_on - before[node.id]
            assert kept <= made.wakes and kept == made.joins.get(node.id, frozenset())
        else:
            assert node.depends_on & set(before) <= made.wakes


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_the_same_graph_is_drawn_alike_whatever_its_tasks_ids(nodes: list[Node]) -> None:
    others = {node.id: uuid4() for node in nodes}
    known = {other: id for id, other in others.items()}

    def renamed(block: Block) -> Block:
        if isinstance(block, UUID):
            return known[block]
        return type(block)(tuple(map(renamed, block.parts)))

    again = [Node(others[n.id], frozenset(others[d] for d in n.depends_on), 60.0) for n in nodes]
    made, remade = build(nodes), build(again)
    assert made.blocks == tuple(map(renamed, remade.blocks))
    links = {known[task]: list(map(renamed, then)) for task, then in remade.links.items()}
    assert dict(made.links) == links
    assert made.lanes == tuple(tuple(known[task] for task in lane) for lane in remade.lanes)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_segments_published_as_they_are_woken_cover_the_whole_graph(
    nodes: list[Node], data: st.DataObject
) -> None:
    """Play the engine: finish tasks in any order; each task must get exactly one visit in time."""
    state = Play(nodes)
    state.publish(build(nodes))
    while state.ready:
        state.finish(data.draw(st.sampled_from(sorted(state.ready))))
    assert state.over == {node.id for node in nodes}


class Play:
    """A run without a database: what the claim, the wakes and the canvas do, in memory."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.after: defaultdict[UUID, set[UUID]] = defaultdict(set)
        for node in nodes:
            for dependency in node.depends_on:
                self.after[dependency].add(node.id)
        self.over: set[UUID] = set()
        self.ready: set[UUID] = set()
        self.parked: set[UUID] = set()
        self.held: set[UUID] = set()
        self.wakes: set[UUID] = set()
        self.triggers: dict[UUID, set[UUID]] = {}

    def publish(self, made: Canvas) -> None:
        self.held |= set(made.beyond)
        self.wakes |= made.wakes
        for task, before in carried_before(made).items():
            assert task not in self.triggers, "a second visit"
            self.triggers[task] = before
            self.held.discard(task)
        self.visit_those_due()

    def visit_those_due(self) -> None:
        for task, before in self.triggers.items():
            if before <= self.over and task not in self.over | self.ready | self.parked:
                done = self.nodes[task].depends_on <= self.over
                (self.ready if done else self.parked).add(task)

    def finish(self, task: UUID) -> None:
        self.ready.discard(task)
        self.over.add(task)
        self.visit_those_due()
        if task not in self.wakes:
            return
        woken = {t for t in self.after[task] if self.nodes[t].depends_on <= self.over}
        self.ready |= woken & self.parked
        self.parked -= woken
        if start := woken & self.held:
            self.publish(build(nodes_left(list(self.nodes.values()), self.over), start))
