"""Blocks of tasks -> Celery's chains, groups and chords of visits.

Decides nothing about what may run, nor in which order: that is `graph`.
"""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from celery import Celery, Signature, chain, group

from opscore.config import AGENTS_QUEUE, IO_QUEUE
from opscore.graph import Block, Canvas, Node, Parallel, Series, is_nested, parts_of

RUN_TASK = "opscore.run_task"
RECALL = "opscore.recall"
HARD_LIMIT_GRACE_SECONDS = 30
"""After its timeout and this, a pool child that cannot be interrupted is killed."""
RECALL_SECONDS = 30
"""Then there is another message."""
WAKES_HEADER = "opscore_wakes"
LANE_HEADER = "opscore_lane"
REQUEST_HEADER = "opscore_request_id"


def visit(
    app: Celery,
    task_id: UUID,
    generation: int,
    *,
    timeout_seconds: float,
    wakes: bool = False,
    lane: bool = False,
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
        headers={WAKES_HEADER: wakes, LANE_HEADER: lane, REQUEST_HEADER: request_id},
    )


def recall(app: Celery, task_id: UUID, attempt: int) -> Signature:
    """Return the message that says: tell the agent that nobody wants this attempt any more."""
    return app.signature(
        RECALL, args=(str(task_id), attempt), immutable=True, queue=IO_QUEUE, expires=RECALL_SECONDS
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
            queue=node.queue,
        )
        linked = [signature(part) for part in canvas.links.get(block, ())]
        if linked:
            made.options["link"] = linked
        return made

    def message(block: Block) -> Signature:
        if isinstance(block, Series) and not any(map(is_nested, block.parts)):
            return line([signature(part) for part in block.parts])
        return signature(block)

    alone = [message(part) for block in canvas.blocks for part in parts_of(block, Parallel)]
    return alone + [
        lane_signature(app, part, generation, wakes=True, request_id=request_id)
        for lane in canvas.lanes
        for part in by_queue([known[task] for task in lane])
    ]


def by_queue(nodes: Sequence[Node]) -> list[list[Node]]:
    """Divide tasks that were to share a message: only those of one queue can."""
    parts: dict[str, list[Node]] = {}
    for node in nodes:
        parts.setdefault(node.queue, []).append(node)
    return list(parts.values())


def lane_signature(
    app: Celery,
    lane: Sequence[Node],
    generation: int,
    *,
    wakes: bool = False,
    request_id: str | None = None,
) -> Signature:
    """Return the message for tasks side by side: a chain in which nobody waits for anybody."""
    visits = [
        visit(
            app,
            node.id,
            generation,
            timeout_seconds=node.timeout_seconds,
            wakes=wakes,
            lane=len(lane) > 1,
            request_id=request_id,
            queue=node.queue,
        )
        for node in lane
    ]
    return line(visits)


def line(visits: Sequence[Signature]) -> Signature:
    """Return the message for visits one after the other, as Celery's `chain` would make it.

    That copies every signature several times, which took longer than sending the message.
    """
    first, *others = visits
    if others:
        first.options["chain"] = others[::-1]
    return first


# --- Told to people ------------------------------------------------------------------------------

Step = str | dict[str, Any]
"""A task's name; or `{chain: [step]}`, `{group: [step]}`, `{chord: {header: [step], body: step}}`,
`{link: {task: name, then: [step]}}` of a task that several follow, none of them its chain's next;
or `{lane: [name]}` of tasks side by side that share a message."""


def outline(canvas: Canvas, nodes: Sequence[Node], name: Callable[[UUID], str]) -> list[Step]:
    """Say which messages `signatures` makes, as Celery understands them."""
    known = {node.id: node for node in nodes}

    def step(block: Block) -> Step:
        if isinstance(block, Series):
            return _in_turn(block, step)
        if isinstance(block, Parallel):
            return {"group": [step(part) for part in block.parts]}
        linked = [step(part) for part in canvas.links.get(block, ())]
        return {"link": {"task": name(block), "then": linked}} if linked else name(block)

    alone = [step(part) for block in canvas.blocks for part in parts_of(block, Parallel)]
    lanes = [
        [name(node.id) for node in part]
        for lane in canvas.lanes
        for part in by_queue([known[task] for task in lane])
    ]
    return alone + [{"lane": lane} if len(lane) > 1 else lane[0] for lane in lanes]


def _in_turn(series: Series, step: Callable[[Block], Step]) -> Step:
    """Return a chain; a group in it and what follows that are a chord, as Celery makes it."""
    steps: list[Step] = []
    for part in reversed(series.parts):
        if isinstance(part, Parallel) and steps:
            header = [step(inner) for inner in part.parts]
            steps.append({"chord": {"header": header, "body": steps.pop()}})
        else:
            steps.append(step(part))
    return {"chain": steps[::-1]} if len(steps) > 1 else steps[0]
