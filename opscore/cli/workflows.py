"""`opscore workflow`: definitions."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from opscore.cli import output
from opscore.cli.runs import follow, started
from opscore.cli.session import Group, Json, Session, asks, limited, quiet


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
    made = [session.client.workflows.create(_definition(file)) for file in files]
    said = "\n".join(f"{w['workflowId']} version {w['version']}" for w in made)
    session.show(made, lambda: click.echo(said))


@workflow.command(examples=("opscore workflow validate report.yaml",))
@_file
@asks
def validate(session: Session, file: Path) -> None:
    """Check a definition as `push` would, and write nothing."""
    verdict = session.client.workflows.validate(_definition(file))
    new = "would be" if verdict["isNew"] else "is already"
    said = f"Valid: it {new} version {verdict['version']} of {verdict['workflowId']}."
    session.show(verdict, lambda: click.echo(said))


@workflow.command(
    "list", examples=("opscore workflow list", "opscore workflow list --json | jq .[].workflowId")
)
@limited
@quiet("workflowId")
@asks
def list_(session: Session, limit: int | None) -> None:
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
        session.client.workflows.list(), limit, lambda found: output.table(found, columns, empty)
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
    if str(file) == "-":
        return sys.stdin.read()
    if not file.is_file():
        raise click.BadParameter(f"There is no file {file}.", param_hint="FILE")
    return file


def _show(found: Mapping[str, Any]) -> None:
    output.details(
        {
            "workflow": found["workflowId"],
            "version": found["version"],
            "name": found["name"],
            "created": output.moment(found["createdAt"]),
        }
    )
    output.block("definition", found["definition"])
