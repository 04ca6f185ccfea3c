"""`opscore workflow`: definitions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from opscore.cli import output
from opscore.cli.runs import follow, started
from opscore.cli.session import (
    Group,
    Json,
    Session,
    asks,
    limited,
    quiet,
    standard_input,
)


@click.group(cls=Group)
def workflow() -> None:
    """Workflows: definitions in versions that are never changed."""


_file = click.argument("file", type=click.Path(path_type=Path, allow_dash=True))


@workflow.command(
    examples=("opscore workflow push report.yaml", "opscore workflow push a.yaml b.yaml")
)
@click.argument("files", type=click.Path(path_type=Path, allow_dash=True), nargs=-1, required=True)
@quiet("workflowId")
@asks
def push(session: Session, files: Sequence[Path]) -> None:
    """Create workflows, or their next versions, from YAML or JSON; - reads standard input."""
    from opscore.sdk import OpsCoreSDKError

    if sum(str(file) == "-" for file in files) > 1:
        raise click.UsageError("Standard input (-) can be read once.")
    definitions = {file: _definition(file) for file in files}
    made: list[Any] = []
    try:
        for definition in definitions.values():
            made.append(session.client.workflows.create(definition))
    except OpsCoreSDKError:
        if len(files) > 1 and not session.as_json:
            said = ", ".join(map(_created, made)) or "nothing"
            output.say(f"{list(definitions)[len(made)]}: not created; before it: {said}.", err=True)
        raise
    session.show(made, lambda: output.say("\n".join(map(_created, made))))


def _created(made: Mapping[str, Any]) -> str:
    return f"{made['workflowId']} version {made['version']}"


@workflow.command(examples=("opscore workflow validate report.yaml",))
@_file
@asks
def validate(session: Session, file: Path) -> None:
    """Check a definition as `push` would, and write nothing."""
    verdict = session.client.workflows.validate(_definition(file))
    new = "would be" if verdict["isNew"] else "is already"
    said = f"Valid: it {new} version {verdict['version']} of {verdict['workflowId']}."
    session.show(verdict, lambda: output.say(said))


@workflow.command(
    "list", examples=("opscore workflow list", "opscore workflow list --archived --json")
)
@click.option("--archived", is_flag=True, help="Those that are archived.")
@limited
@quiet("workflowId")
@asks
def list_(session: Session, archived: bool, limit: int | None) -> None:
    """List workflows."""
    columns: Sequence[output.Column] = (
        ("WORKFLOW", lambda w: w["workflowId"]),
        ("VERSION", lambda w: w["version"]),
        ("NAME", lambda w: w["name"]),
        ("TASKS", lambda w: len(w["definition"]["tasks"])),
        ("CREATED", lambda w: output.moment(w["createdAt"])),
    )
    empty = "No workflows; `opscore workflow push FILE` creates one."
    session.show_list(
        session.client.workflows.list(archived=archived),
        limit,
        lambda found: output.table(found, columns, empty),
    )


@workflow.command(
    examples=("opscore workflow show report", "opscore workflow show report --version 2 --json")
)
@click.argument("workflow_id")
@click.option("--version", type=click.IntRange(1), help="The newest by default.")
@asks
def show(session: Session, workflow_id: str, version: int | None) -> None:
    """Show a workflow: its definition."""
    found = session.client.workflows.get(workflow_id, version)
    session.show(found, lambda: _show(found))


@workflow.command(examples=("opscore workflow explain report", "opscore workflow explain a.yaml"))
@click.argument("workflow", metavar="WORKFLOW|FILE")
@click.option("--version", type=click.IntRange(1), help="Of a workflow; the newest by default.")
@asks
def explain(session: Session, workflow: str, version: int | None) -> None:
    """Show the graph of a definition, and the chains and chords that a run of it becomes."""
    file, workflows = Path(workflow), session.client.workflows
    definition: Path | str | Mapping[str, Any]
    if workflow == "-" or file.is_file():
        definition = _definition(file)
    else:
        definition = workflows.get(workflow, version)["definition"]
    verdict = workflows.validate(definition)
    session.show(verdict, lambda: _explain(verdict))


@workflow.command(examples=("opscore workflow archive report",))
@click.argument("workflow_id", metavar="WORKFLOW")
@asks
def archive(session: Session, workflow_id: str) -> None:
    """Let a workflow get no new runs and versions; what there is of it goes on."""
    found = session.client.workflows.archive(workflow_id)
    session.show(found, lambda: output.say(f"{workflow_id} is archived."))


@workflow.command(examples=("opscore workflow restore report",))
@click.argument("workflow_id", metavar="WORKFLOW")
@asks
def restore(session: Session, workflow_id: str) -> None:
    """Let an archived workflow get runs and versions again."""
    found = session.client.workflows.restore(workflow_id)
    session.show(found, lambda: output.say(f"{workflow_id} is not archived."))


@workflow.command(
    examples=(
        "opscore workflow trigger writer report",
        """opscore workflow trigger writer report --payload '{"topic": "queues"}' --watch""",
    )
)
@click.argument("agent_id")
@click.argument("workflow_id")
@click.option("--payload", type=Json(), help="JSON object; @FILE reads a file, - standard input.")
@click.option("--watch", is_flag=True, help="Follow the run to its end.")
@quiet("runId")
@asks
def trigger(session: Session, agent_id: str, workflow_id: str, payload: Any, watch: bool) -> None:
    """Start a workflow for an agent; `opscore run submit` starts one for whoever can."""
    answer = session.client.trigger_workflow(agent_id, workflow_id, payload)
    if watch:
        follow(session, answer["runId"])
    session.show(answer, lambda: started(answer["runId"]))


def _definition(file: Path) -> Path | str:
    """Return what to send of a file: itself, or what standard input says."""
    is_piped = str(file) == "-"
    try:
        text = standard_input() if is_piped else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise click.BadParameter(f"{file} cannot be read: {why}.", param_hint="FILE") from error
    if not text.strip():
        raise click.BadParameter(f"{file} is empty.", param_hint="FILE")
    return text if is_piped else file


def _show(found: Mapping[str, Any]) -> None:
    output.details(
        {
            "workflow": found["workflowId"],
            "version": found["version"],
            "name": found["name"],
            "created": output.moment(found["createdAt"]),
            "archived": output.moment(found["archivedAt"]),
        }
    )
    output.block("definition", found["definition"])


def _explain(verdict: Mapping[str, Any]) -> None:
    output.table(verdict["graph"], _GRAPH, "")
    canvas = verdict["canvas"]
    click.echo("\nWhen a run is submitted, these messages go out:")
    for step in canvas["messages"]:
        _print_step(step)
    if canvas["joins"]:
        click.echo("\nThese wait in the database for what no message says:")
        for join in canvas["joins"]:
            output.say(f"  {join['taskId']} for {', '.join(join['after'])}")
    if canvas["later"]:
        output.say(f"\nDrawn later, when it is their turn: {', '.join(canvas['later'])}")


def _print_step(step: Any, depth: int = 1) -> None:
    """Print a part of a canvas, what is in it indented."""
    if isinstance(step, str):
        output.say(f"{'  ' * depth}{step}")
        return
    for word, inside in step.items():
        output.say(f"{'  ' * depth}{word}")
        for below in inside if isinstance(inside, list) else _parts(inside):
            _print_step(below, depth + 1)


def _parts(inside: Any) -> list[Any]:
    """Return the parts of a chord, or of a link, by their names."""
    if isinstance(inside, str):
        return [inside]
    return [part if name == "task" else {name: part} for name, part in inside.items()]


def _who(task: Mapping[str, Any]) -> str | None:
    if task["agent"] is None:
        return None
    capability = task["agent"]["agentCapability"]
    return f"any that can {capability}" if capability else str(task["agent"]["agentId"])


_GRAPH: Sequence[output.Column] = (
    ("TASK", lambda t: t["taskId"]),
    ("TYPE", lambda t: f"{t['type']}{' for each' if t['forEach'] else ''}"),
    ("AGENT", _who),
    ("AFTER", lambda t: ", ".join(t["dependsOn"]) or None),
    ("WHEN", lambda t: t["when"]),
)
