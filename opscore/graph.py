"""A run's unfinished tasks -> blocks one after the other and side by side; pure.

Every order the blocks keep is one the definition asked for; an edge that they cannot express is
left to the claim, and the task before it then wakes the one after it. `canvas` makes Celery's
chains, groups and chords of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

AHEAD = 25
"""Tasks that may follow in one message: a message carries all of its canvas that comes after it."""
MAX_NESTING = 3
"""Levels of chord headers: each holds a pooled connection while it is published."""
WIDE = AHEAD
"""More tasks than this side by side go into lanes, and what joins them is left to the claim: in a
chord each would cost Redis and the worker more than the task itself."""
LANE = 20
"""Tasks of one lane at most."""
LANES = 5
"""At least this many lanes, so that several workers begin at once."""


@dataclass(frozen=True, slots=True)
class Node:
    """An unfinished task: `depends_on` names unfinished tasks only."""

    id: UUID
    depends_on: frozenset[UUID]
    timeout_seconds: float
    queue: str = ""
    """Where its visit goes."""


@dataclass(frozen=True, slots=True)
class Series:
    """Blocks one after the other."""

    parts: tuple["Block", ...]


@dataclass(frozen=True, slots=True)
class Parallel:
    """Blocks side by side."""

    parts: tuple["Block", ...]


Block = UUID | Series | Parallel


@dataclass(frozen=True, slots=True)
class Canvas:
    """The blocks to publish now, side by side, and what they leave to the claim."""

    blocks: tuple[Block, ...]
    lanes: tuple[tuple[UUID, ...], ...]
    """Tasks side by side that share a message: whoever has it does them in turn, or gives them
    back."""
    links: Mapping[UUID, Sequence[Block]]
    """Blocks that follow a task without being its chain's next: a fork without a join."""
    joins: Mapping[UUID, frozenset[UUID]]
    """Tasks in it -> those they depend on that no block puts before them: the claim waits."""
    wakes: frozenset[UUID]
    """Tasks before an edge that no block expresses: finishing, they wake their successors."""
    inside: frozenset[UUID]
    """All tasks that come by it."""
    beyond: tuple[UUID, ...]
    """Tasks too far ahead for a message now; waking them publishes their own segment."""


def build(nodes: Sequence[Node], start: Iterable[UUID] | None = None) -> Canvas:
    """Arrange the unfinished tasks that follow `start` (default: those that wait for nothing).

    `nodes` come in topological order. Only tasks all of whose dependencies are in the canvas are in
    it.
    """
    roots = {n.id for n in nodes if not n.depends_on} if start is None else set(start)
    groups = _wide(nodes, roots)
    wide = {task for group in groups for task in group}
    chosen = _ahead(nodes, roots - wide)
    inside = [node for node in nodes if node.id in chosen]
    graph = _Graph(inside, roots)
    blocks = graph.reduce()
    before: dict[UUID, frozenset[UUID]] = {}
    for block in blocks:
        _preceding(block, graph.links, frozenset(), before)
    chosen |= wide
    kept = {n.id: (n.depends_on & chosen).difference(before.get(n.id, ())) for n in nodes}
    wakes = frozenset[UUID]().union(*kept.values())
    joins = {task: left for task, left in kept.items() if left and task in chosen}
    beyond = tuple(n.id for n in nodes if n.id not in chosen) if start is None else ()
    shared = tuple(lane for group in groups for lane in lanes(group))
    return Canvas(blocks, shared, graph.links, joins, wakes, frozenset(chosen), beyond)


def _wide(nodes: Sequence[Node], roots: set[UUID]) -> list[list[UUID]]:
    """Return the roots that stand side by side with very many others before the same tasks."""
    after: dict[UUID, list[UUID]] = {node.id: [] for node in nodes if node.id in roots}
    for node in nodes:
        for dependency in node.depends_on:
            if dependency in after:
                after[dependency].append(node.id)
    alike: dict[tuple[UUID, ...], list[UUID]] = {}
    for root, successors in after.items():
        alike.setdefault(tuple(successors), []).append(root)
    return [group for group in alike.values() if len(group) > WIDE]


def lanes(tasks: Sequence[UUID]) -> tuple[tuple[UUID, ...], ...]:
    """Share tasks side by side out among messages; a message each if there are few."""
    size = min(LANE, len(tasks) // LANES) if len(tasks) > WIDE else 1
    return tuple(tuple(tasks[i : i + size]) for i in range(0, len(tasks), size))


def _ahead(nodes: Sequence[Node], roots: set[UUID]) -> set[UUID]:
    """Choose the roots and up to `AHEAD` tasks after them; siblings together or not at all."""
    siblings: dict[frozenset[UUID], list[UUID]] = {}
    for node in nodes:
        if node.id not in roots:
            siblings.setdefault(node.depends_on, []).append(node.id)
    chosen, room = set(roots), AHEAD
    for dependencies, ids in siblings.items():
        if dependencies and dependencies <= chosen and len(ids) <= room:
            chosen.update(ids)
            room -= len(ids)
    return chosen


@dataclass(slots=True)
class _Item:
    """A block under construction, known by the id of its first task."""

    block: Block
    depth: int
    end: UUID | None
    """The task it ends with; None if it ends with a group."""
    nesting: int = 0
    before: set[UUID] = field(default_factory=set)
    after: set[UUID] = field(default_factory=set)


class _Graph:
    """A graph that is folded, step by step, into blocks."""

    def __init__(self, nodes: Sequence[Node], roots: set[UUID]) -> None:
        self.items: dict[UUID, _Item] = {}
        self.links: dict[UUID, list[Block]] = {}
        ancestors: dict[UUID, set[UUID]] = {}
        for node in nodes:
            known = set() if node.id in roots else set(node.depends_on)
            ancestors[node.id] = known.union(*(ancestors[d] for d in known))
            direct = {d for d in known if not any(d in ancestors[e] for e in known)}
            depth = 1 + max((self.items[d].depth for d in direct), default=0)
            self.items[node.id] = _Item(node.id, depth, node.id, before=direct)
            for dependency in direct:
                self.items[dependency].after.add(node.id)

    def reduce(self) -> tuple[Block, ...]:
        """Fold until nothing is joined to anything, and return what is left, side by side."""
        while any(item.before for item in self.items.values()):
            folded = self._fold_series() | self._fold_parallel()
            if not folded and not self._link_leaf():
                self._cut()
        return tuple(item.block for item in self.items.values())

    def _fold_series(self) -> bool:
        """Append every block's only successor that has no other predecessor."""
        folded = False
        for first in list(self.items):
            while first in self.items and len(self.items[first].after) == 1:
                (then,) = self.items[first].after
                if self.items[then].before != {first}:
                    break
                self._append(first, then)
                folded = True
        return folded

    def _append(self, first: UUID, then: UUID) -> None:
        head, tail = self.items[first], self.items.pop(then)
        head.block = Series((*parts_of(head.block, Series), *parts_of(tail.block, Series)))
        head.end, head.nesting = tail.end, max(head.nesting, tail.nesting)
        head.after = tail.after
        for after in tail.after:
            self.items[after].before = self.items[after].before - {then} | {first}

    def _fold_parallel(self) -> bool:
        """Put blocks with the same predecessors and successors side by side."""
        alike: dict[tuple[frozenset[UUID], frozenset[UUID]], list[UUID]] = {}
        for name, item in self.items.items():
            if item.before or item.after:
                alike.setdefault((frozenset(item.before), frozenset(item.after)), []).append(name)
        for names in alike.values():
            if len(names) > 1 and self._may_join(names):
                self._join(names)
                return True
        return False

    def _may_join(self, names: Sequence[UUID]) -> bool:
        """Keep a chord's header from nesting too deep, or having an element end in a bare group."""
        items = [self.items[name] for name in names]
        return not items[0].after or all(
            item.nesting < MAX_NESTING and (item.end is not None or _is_group(item.block))
            for item in items
        )

    def _join(self, names: Sequence[UUID]) -> None:
        keep, *others = names
        items = [self.items[name] for name in names]
        nesting = 1 + max(item.nesting - _is_group(item.block) for item in items)
        block = Parallel(tuple(part for item in items for part in parts_of(item.block, Parallel)))
        for name in others:
            gone = self.items.pop(name)
            for before in gone.before:
                self.items[before].after.discard(name)
            for after in gone.after:
                self.items[after].before.discard(name)
        kept = self.items[keep]
        kept.block, kept.end, kept.nesting = block, None, nesting

    def _link_leaf(self) -> bool:
        """Hang a block nothing follows on the task before it: a fork without a barrier."""
        for name, item in self.items.items():
            if item.after or len(item.before) != 1:
                continue
            (before,) = item.before
            end = self.items[before].end
            if end is not None:
                self.links.setdefault(end, []).append(item.block)
                self.items[before].after.discard(name)
                del self.items[name]
                return True
        return False

    def _cut(self) -> None:
        """Leave all but the latest dependency of the shallowest join to the claim."""
        name, join = min(
            ((n, i) for n, i in self.items.items() if len(i.before) > 1), key=lambda x: x[1].depth
        )
        # The first of equals in the graph's order, or it would be another one each time.
        in_order = (before for before in self.items if before in join.before)
        latest = max(in_order, key=lambda before: self.items[before].depth)
        for before in join.before - {latest}:
            self.items[before].after.discard(name)
        join.before = {latest}


def is_nested(block: Block) -> bool:
    """Tell a block from a single task."""
    return isinstance(block, Series | Parallel)


def _is_group(block: Block) -> bool:
    return isinstance(block, Parallel)


def parts_of(block: Block, kind: type[Series] | type[Parallel]) -> tuple[Block, ...]:
    """Return the parts of a block of this kind; any other is its own only part."""
    return block.parts if isinstance(block, kind) else (block,)


def _preceding(
    block: Block,
    links: Mapping[UUID, Sequence[Block]],
    over: frozenset[UUID],
    before: dict[UUID, frozenset[UUID]],
) -> frozenset[UUID]:
    """Note which tasks are over when each visit is published; return those over after `block`."""
    if isinstance(block, Series):
        for part in block.parts:
            over = _preceding(part, links, over, before)
        return over
    if isinstance(block, Parallel):
        return over.union(*(_preceding(part, links, over, before) for part in block.parts))
    before[block] = over
    done = over | {block}
    for linked in links.get(block, ()):
        _preceding(linked, links, done, before)
    return done
