"""Following a run: a tree of its tasks that lives on a terminal, a line an event elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
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
    run = session.client.runs.get(run_id)
    try:
        if session.as_json:
            return run.wait()
        return _draw(session, run) if output.console().is_terminal else _print(run)
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
    for event in run.events():
        print_event(event)
    return run.wait()


def _draw(session: "Session", run: "Run") -> "Run":
    from rich.live import Live

    from opscore.sdk import OpsCoreSDKError
    from opscore.sdk.transport import Patience

    patience, children = Patience(), Children(session)
    with Live(console=output.console(), auto_refresh=False) as live:
        while True:
            try:
                live.update(_tree(run.data, children), refresh=True)
                if run.is_over:
                    return run
                time.sleep(LOOK_SECONDS)
                run.refresh()
                patience.moved()
            except OpsCoreSDKError as error:
                time.sleep(patience.pause(error))


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


def _tree(run: Mapping[str, Any], children: Children) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    took = output.between(run["startedAt"], run["finishedAt"])
    head = Text.assemble(
        (output.plain(run["workflowId"]), "bold"),
        f" v{run['version']}  ",
        output.cell(run["status"]),
        f"  {run['reason'] or ''}  " if run["reason"] else "  ",
        (took or "", "dim"),
    )
    tree = Tree(head, guide_style="dim")
    _grow(tree, run["tasks"], children)
    return tree


def _grow(tree: "Tree", tasks: Sequence[Mapping[str, Any]], children: Children) -> None:
    left = MOST_CHILDREN
    for task in tasks:
        if task["index"] is not None:
            continue
        branch = tree.add(_line(task))
        for item in _items(task, tasks):
            branch.add(_line(item))
        if task["childRunId"] and task["status"] != "completed" and left:
            left -= 1
            _grow(branch, children.get(task["childRunId"])["tasks"], children)


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
    why = task["error"]["message"] if task["error"] else task["waitingFor"]
    if why:
        parts.append((f"  {output.short(why)}", "red" if task["error"] else "yellow"))
    took = output.between(task["startedAt"], task["finishedAt"])
    parts.append((f"  {took}" if took else "", "dim"))
    return Text.assemble(*parts)


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
