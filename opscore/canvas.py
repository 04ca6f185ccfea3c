"""What is left of a run -> chains, groups and chords of visits.

First pure: the graph becomes nested blocks, in which every order the canvas keeps is one the
definition asked for; an edge that blocks cannot express is left to the claim, and the task before
it then wakes the one after it. Then the blocks become Celery signatures. Decides nothing about what
may run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from celery import Celery, Signature, chain, group

from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE
from opscore.engine import Node

RUN_TASK = "opscore.run_task"
AHEAD = 25
"""Tasks that may follow in one message: a message carries all of its canvas that comes after it."""
MAX_NESTING = 3
"""Levels of chord headers: each holds a pooled connection while it is published."""
HARD_LIMIT_GRACE_SECONDS = 30
"""After its timeout and this, a pool child that cannot be interrupted is killed."""


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
    links: Mapping[UUID, Sequence[Block]]
    """Blocks that follow a task without being its chain's next: a fork without a join."""
    wakes: frozenset[UUID]
    """Tasks before an edge that no block expresses: finishing, they wake their successors."""
    beyond: tuple[UUID, ...]
    """Tasks too far ahead for a message now; waking them publishes their own segment."""


def build(nodes: Sequence[Node], start: Iterable[UUID] | None = None) -> Canvas:
    """Arrange the unfinished tasks that follow `start` (default: those that wait for nothing).

    `nodes` come in topological order. Only tasks all of whose dependencies are in the canvas are in
    it.
    """
    roots = {n.id for n in nodes if not n.depends_on} if start is None else set(start)
    chosen = _ahead(nodes, roots)
    inside = [node for node in nodes if node.id in chosen]
    graph = _Graph(inside, roots)
    blocks = graph.reduce()
    before: dict[UUID, frozenset[UUID]] = {}
    for block in blocks:
        _preceding(block, graph.links, frozenset(), before)
    wakes = {
        dependency
        for node in nodes
        for dependency in node.depends_on
        if dependency in chosen and dependency not in before.get(node.id, ())
    }
    beyond = tuple(n.id for n in nodes if n.id not in chosen) if start is None else ()
    return Canvas(blocks, graph.links, frozenset(wakes), beyond)


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
        head.block = Series((*_parts(head.block, Series), *_parts(tail.block, Series)))
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
        block = Parallel(tuple(part for item in items for part in _parts(item.block, Parallel)))
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
        latest = max(join.before, key=lambda before: self.items[before].depth)
        for before in join.before - {latest}:
            self.items[before].after.discard(name)
        join.before = {latest}


def _is_group(block: Block) -> bool:
    return isinstance(block, Parallel)


def _parts(block: Block, kind: type[Series] | type[Parallel]) -> tuple[Block, ...]:
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


# --- Celery -------------------------------------------------------------------------------------


def visit(
    app: Celery,
    task_id: UUID,
    generation: int,
    *,
    timeout_seconds: float,
    wakes: bool = False,
    request_id: str | None = None,
    queue: str = AGENTS_QUEUE,
) -> Signature:
    """Return the message that says: see whether you can move this task (I1)."""
    return app.signature(
        RUN_TASK,
        args=(str(task_id), generation),
        immutable=True,
        task_id=str(task_id),
        queue=queue,
        time_limit=timeout_seconds + HARD_LIMIT_GRACE_SECONDS,
        headers={"opscore_wakes": wakes, "opscore_request_id": request_id},
    )


def signatures(
    app: Celery, canvas: Canvas, nodes: Sequence[Node], generation: int, request_id: str | None
) -> list[Signature]:
    """Turn the blocks into signatures, each to be sent by itself."""
    known = {node.id: node for node in nodes}

    def signature(block: Block) -> Signature:
        if isinstance(block, Series):
            return chain(*map(signature, block.parts), app=app)
        if isinstance(block, Parallel):
            return group(list(map(signature, block.parts)), app=app)
        node = known[block]
        made = visit(
            app,
            block,
            generation,
            timeout_seconds=node.timeout_seconds,
            wakes=block in canvas.wakes,
            request_id=request_id,
            queue=CONTROL_QUEUE if node.is_end else AGENTS_QUEUE,
        )
        linked = [signature(part) for part in canvas.links.get(block, ())]
        if linked:
            made.options["link"] = linked
        return made

    return [signature(part) for block in canvas.blocks for part in _parts(block, Parallel)]
