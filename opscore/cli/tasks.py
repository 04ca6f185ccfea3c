"""`opscore task`: single tasks: of runs, for one agent, and those that wait for an approval."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from opscore.cli import output
from opscore.cli.session import (
    FAILED,
    PRIORITIES,
    Group,
    Json,
    Session,
    asks,
    budget,
    budget_of,
    labels,
    limited,
    quiet,
)

STATUSES = ("pending", "waiting", "running", "completed", "failed", "cancelled", "skipped")


@click.group(cls=Group)
def task() -> None:
    """Tasks: what they did, and those that wait for somebody's word."""


@task.command(
    examples=(
        """opscore task submit --agent writer '{"topic": "queues"}'""",
        "opscore task submit --capability summarize @input.json --wait",
    )
)
@click.argument("input", type=Json())
@click.option("--agent", "agent_id", help="The agent that does it; or:")
@click.option("--capability", "agent_capability", help="What who does it must be able to do.")
@click.option("--priority", type=click.Choice(PRIORITIES))
@click.option("--timeout", "timeout_seconds", type=float, help="Seconds it may take.")
@click.option("--wait", is_flag=True, help="Wait for its end; the exit status tells how it ended.")
@budget
@labels
@quiet("taskId")
@asks
def submit(
    session: Session,
    input: Any,
    wait: bool,
    label: Sequence[tuple[str, str]],
    max_tokens: int | None,
    max_cost_usd: float | None,
    **given: Any,
) -> None:
    """Start a task for an agent, without a workflow. INPUT is a JSON object."""
    given |= {"labels": dict(label) or None, "budget": budget_of(max_tokens, max_cost_usd)}
    submitted = session.client.tasks.submit(input, **given)
    if not wait:
        said = f"Task {submitted.id} of run {submitted.run_id}."
        return session.show(submitted.data, lambda: output.say(said))
    try:
        submitted.wait()
    except KeyboardInterrupt:
        output.say(f"It goes on; `opscore task show {submitted.id}` tells how.", err=True)
        raise
    session.show(submitted.data, lambda: _outcome(submitted.data))
    if submitted.status != "completed":
        sys.exit(FAILED)


@task.command(
    "list",
    examples=(
        "opscore task list --reason approval",
        "opscore task list --status running --agent writer",
        "opscore task list --run 0192d3a0-… --status failed -q",
    ),
)
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="May be repeated.")
@click.option("--reason", help="Those that wait for this: approval, agent_busy, ...")
@click.option("--agent", "agent_id", help="Of this agent only.")
@click.option("--run", "run_id", help="Of this run only.")
@quiet("taskId")
@limited
@asks
def list_(session: Session, status: Sequence[Any], limit: int | None, **given: Any) -> None:
    """List tasks of all runs, newest first; by default those that wait."""
    if not status and (given["reason"] or not given["run_id"]):
        status = ("waiting",)
    columns: Sequence[output.Column] = (
        ("TASK ID", lambda t: t["taskId"]),
        ("TASK", output.task_name),
        ("STATUS", lambda t: t["status"]),
        ("BECAUSE", lambda t: t["waitingFor"] or t["reason"]),
        ("AGENT", lambda t: t["agentId"] or t["agentCapability"]),
        ("AGE", lambda t: output.age(t["createdAt"])),
        ("RUN", lambda t: t["runId"]),
    )
    found = session.client.tasks.list(status=status or None, **given)
    session.show_list(found, limit, lambda tasks: output.table(tasks, columns, "No such tasks."))


@task.command(examples=("opscore task show 0192d3a0-…",))
@click.argument("task_id")
@asks
def show(session: Session, task_id: str) -> None:
    """Show a task: what it waits for, its attempts, its output."""
    found = session.client.tasks.get(task_id)
    session.show(found, lambda: _show(found))


@task.command(examples=("opscore task logs 0192d3a0-…", "opscore task logs 0192d3a0-… --attempt 1"))
@click.argument("task_id")
@click.option("--attempt", type=click.IntRange(1), help="The newest by default.")
@asks
def logs(session: Session, task_id: str, attempt: int | None) -> None:
    """Print what an agent wrote to the log of an attempt, and its traceback if it failed."""
    number = attempt or len(session.client.tasks.get(task_id)["attempts"])
    if number == 0:
        return session.show(None, lambda: click.echo("No attempt was made yet."))
    found = session.client.tasks.attempt(task_id, number)
    session.show(found, lambda: _log(found))


CALL = "The number that `task show` tells of an LLM agent's call: only that one is decided."


@task.command(examples=("opscore task approve 0192d3a0-… --comment 'Looks good.'",))
@click.argument("task_id")
@click.option("--comment", help="Kept with the decision.")
@click.option("--call", type=int, help=CALL)
@asks
def approve(session: Session, task_id: str, comment: str | None, call: int | None) -> None:
    """Let a run go on behind an approval."""
    found = session.client.tasks.approve(task_id, comment, call=call)
    session.show(found, lambda: output.say(f"Approved; run {found['runId']} goes on."))


@task.command(examples=("opscore task reject 0192d3a0-… --comment 'Not like this.'",))
@click.argument("task_id")
@click.option("--comment", help="Kept with the decision.")
@click.option("--call", type=int, help=CALL)
@asks
def reject(session: Session, task_id: str, comment: str | None, call: int | None) -> None:
    """Fail an approval."""
    found = session.client.tasks.reject(task_id, comment, call=call)
    session.show(found, lambda: output.say(f"Rejected; see run {found['runId']}."))


def _show(task: Mapping[str, Any]) -> None:
    output.details(
        {
            "task": task["taskId"],
            "of": output.task_name(task),
            "run": task["runId"],
            "type": task["type"],
            "agent": task["agentId"] or task["agentCapability"],
            "status": task["status"],
            "because": task["waitingFor"] or task["reason"],
            "wakes": output.moment(task["wakeAt"]),
            "sub-workflow's run": task["childRunId"],
            "created": output.moment(task["createdAt"]),
            "took": output.between(task["startedAt"], task["finishedAt"]),
            "used": output.usage(task["usage"]),
        }
    )
    if task["call"]:
        again = ", which may have had its effect already" if task["call"]["again"] else ""
        what = f"approve or reject {task['call']['tool']}{again}: --call {task['call']['number']}"
        output.block(what, task["call"]["arguments"])
    if task["attempts"]:
        click.echo("\nAttempts:")
        output.table(task["attempts"], _ATTEMPTS, "")
    _outcome(task)


def _outcome(task: Mapping[str, Any]) -> None:
    if task["error"]:
        output.block("error", f"{task['error']['message']} ({task['error']['code']})")
    elif task["status"] == "completed":
        output.block("output", task["output"])


_ATTEMPTS: Sequence[output.Column] = (
    ("#", lambda a: a["number"]),
    ("STATUS", lambda a: a["status"]),
    ("AGENT", lambda a: a["agentId"]),
    ("STARTED", lambda a: output.moment(a["startedAt"])),
    ("TOOK", lambda a: output.between(a["startedAt"], a["finishedAt"])),
    ("ERROR", lambda a: a["error"] and output.short(a["error"]["message"])),
    ("WORKER", lambda a: a["worker"]),
)


def _log(attempt: Mapping[str, Any]) -> None:
    for line in attempt["logs"]:
        fields = "".join(f" {name}={output.plain(v)}" for name, v in line["fields"].items())
        output.say(output.plain(f"{output.moment(line['at'])}  {line['message']}{fields}"))
    error = attempt["error"]
    if error:
        output.block("error", error["traceback"] or f"{error['message']} ({error['code']})")
    elif not attempt["logs"]:
        click.echo("It wrote nothing.")
