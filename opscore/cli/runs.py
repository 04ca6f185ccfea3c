"""`opscore run`: executions of workflows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from opscore.cli import output
from opscore.cli.session import (
    FAILED,
    PRIORITIES,
    Group,
    Json,
    Moment,
    Session,
    asks,
    budget,
    budget_of,
    labels,
    limited,
    quiet,
)

if TYPE_CHECKING:
    from opscore.sdk.sync_client import Run

STATUSES = ("queued", "running", "paused", "completed", "failed", "cancelled")


@click.group(cls=Group)
def run() -> None:
    """Runs: start them, follow them, steer them."""


_run = click.argument("run_id", metavar="RUN")


@run.command(
    examples=(
        """opscore run submit report '{"topic": "queues"}'""",
        "opscore run submit report @input.json --watch",
        "opscore run submit report --priority high --start-at 2026-12-01T06:00",
    )
)
@click.argument("workflow_id", metavar="WORKFLOW")
@click.argument("input", type=Json(), required=False)
@click.option("--version", type=click.IntRange(1), help="Of the workflow; the newest by default.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="normal by default.")
@click.option("--start-at", type=Moment(), help="It begins then.")
@click.option("--deadline-at", type=Moment(), help="It fails if it is not over by then.")
@click.option(
    "--key", "idempotency_key", help="With the same key the same run is given again, for 24 hours."
)
@budget
@labels
@click.option("--watch", is_flag=True, help="Follow it; the exit status tells how it ended.")
@quiet("runId")
@asks
def submit(
    session: Session,
    workflow_id: str,
    input: Any,
    label: Sequence[tuple[str, str]],
    watch: bool,
    max_tokens: int | None,
    max_cost_usd: float | None,
    **given: Any,
) -> None:
    """Start a run of a workflow. INPUT is JSON; @FILE reads a file, - standard input."""
    given |= {"labels": dict(label) or None, "budget": budget_of(max_tokens, max_cost_usd)}
    found = session.client.runs.submit(workflow_id, input, **given)
    _begun(session, found, watch)


@run.command(
    "list",
    examples=(
        "opscore run list --status running --status queued",
        "opscore run list --workflow report --label team=support -n 5",
    ),
)
@click.option("--workflow", "workflow_id", help="Of this workflow only.")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="May be repeated.")
@click.option("--created-after", type=Moment())
@click.option("--created-before", type=Moment())
@labels
@limited
@quiet("runId")
@asks
def list_(
    session: Session,
    status: Sequence[Any],
    label: Sequence[tuple[str, str]],
    limit: int | None,
    **given: Any,
) -> None:
    """List runs, newest first."""
    columns: Sequence[output.Column] = (
        ("RUN", lambda r: r["runId"]),
        ("WORKFLOW", lambda r: f"{r['workflowId']} v{r['version']}"),
        ("STATUS", lambda r: r["status"]),
        ("BECAUSE", _because),
        ("AGE", lambda r: output.age(r["createdAt"])),
        ("TOOK", lambda r: output.between(r["startedAt"], r["finishedAt"])),
    )
    found = session.client.runs.list(status=status or None, labels=dict(label) or None, **given)
    empty = "No such runs; `opscore run submit WORKFLOW` starts one."
    session.show_list(found, limit, lambda runs: output.table(runs, columns, empty))


@run.command(examples=("opscore run show 0192d3a0-…", "opscore run show 0192d3a0-… --json"))
@_run
@asks
def show(session: Session, run_id: str) -> None:
    """Show a run: its tasks, why they wait, its output."""
    found = session.client.runs.detail(run_id)
    session.show(found, lambda: _show(found))


@run.command(examples=("opscore run watch 0192d3a0-…",))
@_run
@asks
def watch(session: Session, run_id: str) -> None:
    """Follow a run to its end; the exit status is 0 if it was completed, else 1."""
    follow(session, run_id)


@run.command(
    examples=(
        "opscore run events 0192d3a0-…",
        "opscore run events 0192d3a0-… --follow --json | jq .type",
    )
)
@_run
@click.option("--follow", is_flag=True, help="Go on with what happens, until the run is over.")
@click.option("--after", type=click.IntRange(0), default=0, help="Only what has a larger seq.")
@asks
def events(session: Session, run_id: str, follow: bool, after: int) -> None:
    """Print what happened in a run, oldest first; with --json one event a line."""
    from opscore.cli.watch import print_event

    runs = session.client.runs
    for event in runs.events(run_id, after=after) if follow else runs.history(run_id, after=after):
        print_event(event, session.as_json)


@run.command(examples=("opscore run cancel 0192d3a0-…",))
@_run
@asks
def cancel(session: Session, run_id: str) -> None:
    """Cancel a run: nothing of it starts any more."""
    _steered(session, session.client.runs.cancel(run_id))


@run.command(examples=("opscore run pause 0192d3a0-…",))
@_run
@asks
def pause(session: Session, run_id: str) -> None:
    """Pause a run: what runs goes on and ends, nothing new starts."""
    _steered(session, session.client.runs.pause(run_id))


@run.command(examples=("opscore run resume 0192d3a0-…",))
@_run
@asks
def resume(session: Session, run_id: str) -> None:
    """Let a paused run go on."""
    _steered(session, session.client.runs.resume(run_id))


@run.command(
    examples=(
        "opscore run retry 0192d3a0-…",
        """opscore run retry 0192d3a0-… --parameters '{"fetch": {"url": "https://…"}}' --watch""",
    )
)
@_run
@click.option("--parameters", type=Json(), help="JSON: task id -> members that are to be others.")
@click.option("--watch", is_flag=True, help="Follow it; the exit status tells how it ended.")
@quiet("runId")
@asks
def retry(session: Session, run_id: str, parameters: Any, watch: bool) -> None:
    """Have what failed of a failed run tried again; what is finished stays as it is."""
    _begun(session, session.client.runs.retry(run_id, parameters), watch)


@run.command(examples=("opscore run rerun 0192d3a0-… --watch",))
@_run
@click.option("--watch", is_flag=True, help="Follow it; the exit status tells how it ended.")
@quiet("runId")
@asks
def rerun(session: Session, run_id: str, watch: bool) -> None:
    """Start another run of the same version with the same input."""
    _begun(session, session.client.runs.rerun(run_id), watch)


def follow(session: Session, run_id: str) -> NoReturn:
    """Follow a run to its end, print how it ended, and exit with its status."""
    from opscore.cli.watch import watch_run

    found = watch_run(session, run_id)
    session.show(found.data, lambda: _end(found.data))
    click.get_current_context().exit(0 if found.status == "completed" else FAILED)


def started(run_id: str) -> None:
    output.say(f"Run {run_id}; `opscore run watch {run_id}` follows it.")


def _begun(session: Session, found: "Run", watch: bool) -> None:
    if watch:
        follow(session, found.id)
    session.show(found.data, lambda: started(found.id))


def _steered(session: Session, found: "Run") -> None:
    reason = f" ({found.reason})" if found.reason else ""
    session.show(found.data, lambda: output.say(f"Run {found.id} is {found.status}{reason}."))


def _because(run: Mapping[str, Any]) -> str | None:
    return output.short(run["error"]["message"]) if run["error"] else output.reason(run)


def _show(run: Mapping[str, Any]) -> None:
    output.details(
        {
            "run": run["runId"],
            "workflow": f"{run['workflowId']} version {run['version']}",
            "status": run["status"],
            "because": run["reason"],
            "agent": run["agentId"],
            "labels": run["labels"],
            "priority": run["priority"],
            "schedule": run["schedule"],
            "rerun of": run["rerunOf"],
            "created": output.moment(run["createdAt"]),
            "begins": output.moment(run["startAt"]),
            "deadline": output.moment(run["deadlineAt"]),
            "took": output.between(run["startedAt"], run["finishedAt"]),
            "used": output.usage(run["usage"]),
            "input": output.short(run["input"]),
        }
    )
    click.echo()
    output.table(run["tasks"], _TASKS, "No tasks.")
    click.echo()
    _end(run)


def _end(run: Mapping[str, Any]) -> None:
    if run["error"]:
        output.block("error", f"{run['error']['message']} ({run['error']['code']})")
    elif run["status"] == "completed":
        output.block("output", run["output"])
    elif run["status"] == "cancelled":
        click.echo("It was cancelled.")


def _why(task: Mapping[str, Any]) -> str | None:
    if task["error"]:
        return output.short(task["error"]["message"])
    found: str | None = task["waitingFor"] or task["reason"]
    return found


_TASKS: Sequence[output.Column] = (
    ("TASK ID", lambda t: t["taskId"]),
    ("TASK", output.task_name),
    ("STATUS", lambda t: t["status"]),
    ("BECAUSE", _why),
    ("TRIES", lambda t: len(t["attempts"]) or None),
    ("TOOK", lambda t: output.between(t["startedAt"], t["finishedAt"])),
)
