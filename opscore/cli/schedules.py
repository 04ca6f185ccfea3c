"""`opscore schedule`: recurring workflows."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from opscore.cli import output
from opscore.cli.runs import started
from opscore.cli.session import (
    PRIORITIES,
    Group,
    Json,
    Moment,
    Session,
    asks,
    labels,
    limited,
    quiet,
)

if TYPE_CHECKING:
    from opscore.sdk import types

F = TypeVar("F", bound=Callable[..., Any])

CLEARED: Mapping[str, str] = {
    "version": "version",
    "agent": "agentId",
    "start-at": "startAt",
    "end-at": "endAt",
}
"""What a schedule need not have, and the member that holds it."""


@click.group(cls=Group)
def schedule() -> None:
    """Recurring workflows: create them, change them, see what became of them."""


_MEMBERS = (
    click.option("--workflow", "workflowId", help="The workflow's id."),
    click.option("--version", type=click.IntRange(1), help="Of it; the newest by default."),
    click.option("--agent", "agentId", help="The agent for tasks that name none."),
    click.option("--cron", help="Five fields, or @hourly and the like."),
    click.option("--every", "everySeconds", type=float, help="Instead: seconds between two."),
    click.option("--timezone", help="Of --cron, such as Europe/Berlin; UTC by default."),
    click.option("--input", type=Json(), help="JSON; may hold ${firing.at}. @FILE reads a file."),
    click.option("--priority", type=click.Choice(PRIORITIES)),
    click.option("--start-at", "startAt", type=Moment(), help="Nothing fires before."),
    click.option("--end-at", "endAt", type=Moment(), help="Nothing fires after."),
    click.option("--jitter", "jitterSeconds", type=float, help="It fires so much later, at most."),
    click.option(
        "--overlap",
        type=click.Choice(["skip", "queue", "cancel_previous", "allow"]),
        help="While the run before is not over; skip by default.",
    ),
    click.option(
        "--catch-up",
        "catchUp",
        type=click.Choice(["none", "last", "all"]),
        help="Of what was missed while no beat ran; last by default.",
    ),
    click.option(
        "--catch-up-window", "catchUpWindowSeconds", type=float, help="With all: how far back."
    ),
    labels,
)
"""Their names are the members they become."""


def _members(command: F) -> F:
    for option in reversed(_MEMBERS):
        command = option(command)
    return command


def _body(label: Sequence[tuple[str, str]], members: Mapping[str, Any]) -> dict[str, Any]:
    body = {name: _plain(value) for name, value in members.items() if value is not None}
    return {**body, **({"labels": dict(label)} if label else {})}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


@schedule.command(
    examples=(
        "opscore schedule create nightly --workflow report --cron '30 2 * * *'",
        "opscore schedule create pulse --workflow ping --every 60 --overlap queue",
        """opscore schedule create log --workflow ping --cron @daily --input '"${firing.at}"'""",
    )
)
@click.argument("name")
@_members
@click.option("--paused", is_flag=True, help="It fires once it is resumed.")
@asks
def create(
    session: Session, name: str, paused: bool, label: Sequence[tuple[str, str]], **members: Any
) -> None:
    """Create a schedule; it fires from now on."""
    body = {"name": name, **_body(label, members), **({"enabled": False} if paused else {})}
    _show(session, session.client.schedules.create(cast("types.ScheduleArguments", body)))


@schedule.command(
    examples=(
        "opscore schedule change nightly --overlap queue",
        "opscore schedule change nightly --cron '0 4 * * *' --timezone Europe/Berlin",
        "opscore schedule change nightly --clear end-at",
    )
)
@click.argument("name")
@_members
@click.option(
    "--clear", type=click.Choice(list(CLEARED)), multiple=True, help="It has none any more."
)
@asks
def change(
    session: Session,
    name: str,
    clear: Sequence[str],
    label: Sequence[tuple[str, str]],
    **members: Any,
) -> None:
    """Change a schedule; what is not named stays. Other times count from now."""
    body = {**{CLEARED[what]: None for what in clear}, **_body(label, members)}
    if not body:
        raise click.UsageError("Nothing to change is named: see --help.")
    for one, other in (("cron", "everySeconds"), ("everySeconds", "cron")):
        if one in body:
            body.setdefault(other, None)
    _show(session, session.client.schedules.change(name, cast("types.ScheduleChange", body)))


@schedule.command("list", examples=("opscore schedule list", "opscore schedule list --json"))
@limited
@quiet("name")
@asks
def list_(session: Session, limit: int | None) -> None:
    """List schedules."""
    columns: Sequence[output.Column] = (
        ("NAME", lambda s: s["name"]),
        ("WORKFLOW", lambda s: s["workflowId"]),
        ("WHEN", _when),
        ("NEXT", _next),
        ("OVERLAP", lambda s: s["overlap"]),
    )
    empty = "No schedules; `opscore schedule create` makes one."
    session.show_list(
        session.client.schedules.list(), limit, lambda found: output.table(found, columns, empty)
    )


@schedule.command(examples=("opscore schedule show nightly",))
@click.argument("name")
@asks
def show(session: Session, name: str) -> None:
    """Show a schedule."""
    _show(session, session.client.schedules.get(name))


@schedule.command(examples=("opscore schedule delete nightly",))
@click.argument("name")
@asks
def delete(session: Session, name: str) -> None:
    """Delete a schedule with its history; its runs stay."""
    session.client.schedules.delete(name)
    session.show({"name": name}, lambda: output.say(f"Deleted {name}."))


@schedule.command(examples=("opscore schedule pause nightly",))
@click.argument("name")
@asks
def pause(session: Session, name: str) -> None:
    """Let a schedule not fire; what is missed meanwhile is not caught up."""
    _show(session, session.client.schedules.pause(name))


@schedule.command(examples=("opscore schedule resume nightly",))
@click.argument("name")
@asks
def resume(session: Session, name: str) -> None:
    """Let a schedule fire again, from now on."""
    _show(session, session.client.schedules.resume(name))


@schedule.command(examples=("opscore schedule trigger nightly",))
@click.argument("name")
@quiet("runId")
@asks
def trigger(session: Session, name: str) -> None:
    """Have a schedule fire now, whatever its times and its overlap say."""
    run = session.client.schedules.trigger(name)
    session.show(run.data, lambda: started(run.id))


@schedule.command(examples=("opscore schedule preview nightly -n 3",))
@click.argument("name")
@click.option("-n", "--count", type=click.IntRange(1), default=10, show_default=True)
@asks
def preview(session: Session, name: str, count: int) -> None:
    """List the next moments at which a schedule fires, its jitter not counted."""
    moments = session.client.schedules.preview(name, count)
    columns: Sequence[output.Column] = (
        ("UTC", lambda moment: moment),
        ("HERE", output.moment),
        ("IN", lambda moment: (output.age(moment) or "").removeprefix("in ")),
    )
    session.show(moments, lambda: output.table(moments, columns, "It fires never again."))


@schedule.command(
    examples=("opscore schedule history nightly", "opscore schedule history nightly -n 5")
)
@click.argument("name")
@limited
@asks
def history(session: Session, name: str, limit: int | None) -> None:
    """List what became of a schedule's moments, newest first, with their runs."""
    columns: Sequence[output.Column] = (
        ("MOMENT", lambda f: output.moment(f["moment"])),
        ("FIRING", lambda f: f["status"]),
        ("RUN", lambda f: f["runId"]),
        ("RUN IS", lambda f: f["runStatus"]),
        ("WHY", lambda f: f["error"] and f["error"]["message"]),
        ("BY", lambda f: f["by"]),
    )
    session.show_list(
        session.client.schedules.firings(name),
        limit,
        lambda found: output.table(found, columns, "It has not fired yet."),
    )


@schedule.command(
    examples=("opscore schedule events nightly", "opscore schedule events nightly -n 5")
)
@click.argument("name")
@limited
@asks
def events(session: Session, name: str, limit: int | None) -> None:
    """List what happened to a schedule, newest first: changes, and what fired or could not."""
    columns: Sequence[output.Column] = (
        ("AT", lambda e: output.moment(e["at"])),
        ("EVENT", lambda e: e["type"]),
        ("BY", lambda e: e["by"]),
        ("WHY", lambda e: e["reason"]),
        ("MORE", lambda e: output.short(e["data"]) if e["data"] else None),
    )
    session.show_list(
        session.client.schedules.events(name),
        limit,
        lambda found: output.table(found, columns, "Nothing has happened to it."),
    )


def _when(schedule: Mapping[str, Any]) -> str:
    if schedule["cron"] is not None:
        return f"{schedule['cron']} ({schedule['timezone']})"
    return f"every {output.span(schedule['everySeconds'])}"


def _next(schedule: Mapping[str, Any]) -> str:
    if not schedule["enabled"]:
        return "paused"
    return output.moment(schedule["nextAt"]) or "never again"


def _show(session: Session, schedule: Mapping[str, Any]) -> None:
    session.show(schedule, lambda: _details(schedule))


def _details(schedule: Mapping[str, Any]) -> None:
    version = schedule["version"]
    output.details(
        {
            "name": schedule["name"],
            "workflow": f"{schedule['workflowId']} {f'version {version}' if version else 'latest'}",
            "agent": schedule["agentId"],
            "when": _when(schedule),
            "next": _next(schedule),
            "from": output.moment(schedule["startAt"]),
            "until": output.moment(schedule["endAt"]),
            "jitter": f"{schedule['jitterSeconds']:g} s" if schedule["jitterSeconds"] else None,
            "overlap": schedule["overlap"],
            "catch up": schedule["catchUp"],
            "priority": schedule["priority"],
            "labels": schedule["labels"],
            "input": schedule["input"],
        }
    )
    for warning in schedule.get("warnings", ()):
        output.say(f"Warning: {warning}", err=True)
