"""Following a run: a tree of its tasks that lives on a terminal, a line an event elsewhere.

The tree has a line a task, and no more of them than the terminal has room for.
"""

import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import click

from opscore.cli import output

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from opscore.cli.session import Session
    from opscore.sdk.sync_client import Run

LOOK_SECONDS = 0.5
MOST_ITEMS = 8
"""Of a `forEach`, so many items have a line of their own: those that run, wait or failed."""
MOST_CHILDREN = 10
"""Sub-workflows whose tasks are looked up."""
BAR = 20
"""Characters of a bar."""
ROOM_ABOVE = 6
"""Lines of a terminal that are kept free of tasks."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status, as a shell has it."""
MARKS: Mapping[str, str] = {
    "completed": "✔",
    "failed": "✘",
    "cancelled": "✘",
    "skipped": "↷",
    "running": "▶",
    "waiting": "…",
    "pending": "·",
}


def watch_run(session: "Session", run_id: str) -> "Run":
    """Show what goes on in a run until it is over; return it."""
    run, screen = session.client.runs.get(run_id), output.console()
    try:
        if session.as_json:
            return run.wait()
        is_alive = screen.is_terminal and not screen.is_dumb_terminal
        return _draw(session, run) if is_alive else _print(run)
    except KeyboardInterrupt:
        click.echo(f"The run goes on; `opscore run cancel {run_id}` cancels it.", err=True)
        raise


def print_event(event: Mapping[str, Any], as_json: bool = False) -> None:
    """Print an event in a line."""
    if as_json:
        click.echo(output.as_json(event))
        return
    what = output.task_name(event) if event["taskId"] else ""
    because = f"  {event['reason']}" if event["reason"] else ""
    by = f"  by {event['by']}" if event["by"] else ""
    line = f"{output.moment(event['at'])}  {event['type']:<20} {what:<20}{because}{by}"
    click.echo(output.plain(line).rstrip())


def _print(run: "Run") -> "Run":
    was_over = run.is_over
    for event in run.events():
        print_event(event)
        if event["type"] == "task.waiting" and event["reason"] == "approval" and not was_over:
            output.say(_way_to_approve(event))
    return run.wait()


def _way_to_approve(task: Mapping[str, Any]) -> str:
    return f"opscore task approve {task['taskId']}"


def _draw(session: "Session", run: "Run") -> "Run":
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from opscore.sdk import OpsCoreSDKError
    from opscore.sdk.transport import Patience

    patience, children, screen = Patience(), Children(session), output.console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # shows the cursor again
    with Live(console=screen, auto_refresh=False) as live:
        while True:
            try:
                live.update(_tree(run.data, children, screen.height - ROOM_ABOVE), refresh=True)
                if run.is_over:
                    return run
                time.sleep(LOOK_SECONDS)
                run.refresh()
                patience.moved()
            except OpsCoreSDKError as error:
                pause = patience.pause(error)
                said = Text(output.plain(f"{error} It is asked again."), style="red")
                live.update(Group(_tree(run.data, None, screen.height - ROOM_ABOVE), said))
                live.refresh()
                time.sleep(pause)


class Children:
    """The runs of sub-workflows; those that are over are read once."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._over: dict[str, Mapping[str, Any]] = {}

    def get(self, run_id: str) -> Mapping[str, Any]:
        if run_id in self._over:
            return self._over[run_id]
        found = self._session.client.runs.detail(run_id)
        if found["finishedAt"] is not None:
            self._over[run_id] = found
        return found


def _tree(run: Mapping[str, Any], children: Children | None, room: int) -> "Tree":
    """Return what a run is drawn as; without what is below it if nobody can be asked."""
    from rich.text import Text
    from rich.tree import Tree

    took, why = output.between(run["startedAt"], run["finishedAt"]), output.reason(run)
    head = Text.assemble(
        (output.plain(run["workflowId"]), "bold"),
        f" v{run['version']}  ",
        output.cell(run["status"]),
        f"  {output.plain(why)}" if why else "",
        (f"  {took}" if took else "", "dim"),
        no_wrap=True,
    )
    tree = Tree(head, guide_style="dim")
    if run["status"] == "paused":
        tree.add(Text(f"opscore run resume {output.plain(run['runId'])}", "magenta"))
    _grow(tree, run["tasks"], children, room)
    return tree


def _grow(
    tree: "Tree", found: Sequence[Mapping[str, Any]], children: Children | None, room: int
) -> None:
    left, tasks = MOST_CHILDREN, [task for task in found if task["index"] is None]
    shown = _worth(tasks, found, room)
    for task in shown:
        branch = tree.add(_line(task))
        for item in _items(task, found):
            branch.add(_line(item))
        if _is_asking(task):
            branch.add(_way_to_approve(task))
        if children and task["childRunId"] and task["status"] != "completed" and left:
            left -= 1
            below = children.get(task["childRunId"])["tasks"]
            _grow(branch, below, children, max(MOST_ITEMS, room - len(shown)))
    if len(shown) < len(tasks):
        rest = Counter(task["status"] for task in tasks) - Counter(task["status"] for task in shown)
        told = ", ".join(f"{number} {status}" for status, number in rest.items())
        tree.add(f"and {rest.total()} more: {output.plain(told)}")


def _worth(
    tasks: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], room: int
) -> Sequence[Mapping[str, Any]]:
    """Return the tasks there is room for, in their order.

    First come those that ask somebody, run or failed, then those that wait.
    """
    ranks = {"running": 1, "failed": 1, "waiting": 2}
    ranked = sorted(
        range(len(tasks)),
        key=lambda at: 0 if _is_asking(tasks[at]) else ranks.get(tasks[at]["status"], 3),
    )
    rows = (1 + len(list(_items(tasks[at], found))) + _is_asking(tasks[at]) for at in ranked)
    fitting = sum(used <= room for used in accumulate(rows))
    return [tasks[at] for at in sorted(ranked[: max(fitting, 1)])]


def _is_asking(task: Mapping[str, Any]) -> bool:
    return (task["status"], task["reason"]) == ("waiting", "approval")


def _items(
    task: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the items of a `forEach` that are worth a line."""
    if task["items"]:
        name, quiet = task["taskDefinitionId"], ("completed", "pending", "cancelled", "skipped")
        own = [t for t in tasks if t["taskDefinitionId"] == name and t["index"] is not None]
        yield from [item for item in own if item["status"] not in quiet][:MOST_ITEMS]


def _line(task: Mapping[str, Any]) -> "Text":
    from rich.text import Text

    status = task["status"]
    name = task["taskDefinitionId"] if task["index"] is None else f"[{task['index']}]"
    parts: list[Any] = [
        (f"{MARKS.get(status, ' ')} ", output.STYLES.get(status, "")),
        (output.plain(name), "bold" if task["index"] is None else ""),
        "  ",
        output.cell(status),
    ]
    parts += [f"  {bar}" for bar in _bars(task)]
    took = output.between(task["startedAt"], task["finishedAt"])
    parts.append((f"  {took}" if took else "", "dim"))
    why = task["error"]["message"] if task["error"] else task["waitingFor"]
    if why:
        parts.append((f"  {output.short(why)}", "red" if task["error"] else "yellow"))
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _bars(task: Mapping[str, Any]) -> Iterator[str]:
    """Yield how far a task is: its items, or what its agent says."""
    counts, attempts = task["items"], task["attempts"]
    if counts and counts["total"]:
        done = counts["completed"] + counts["failed"] + counts["cancelled"]
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        yield f"{_bar(done / counts['total'])} {done}/{counts['total']}{failed}"
    elif task["status"] == "running" and attempts and attempts[-1]["progress"] is not None:
        progress, said = attempts[-1]["progress"], attempts[-1]["progressMessage"]
        yield f"{_bar(progress)} {progress:.0%}{f' {output.short(said)}' if said else ''}"


def _bar(part: float) -> str:
    full = int(BAR * part)
    return "━" * full + "─" * (BAR - full)
