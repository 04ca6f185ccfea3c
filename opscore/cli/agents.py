"""`opscore agent`: who does the work."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from opscore.cli import output
from opscore.cli.session import Group, Json, Session, asks, limited, quiet


@click.group(cls=Group)
def agent() -> None:
    """Agents: who there is, what they do, who waits for them."""


@agent.command(
    "list", examples=("opscore agent list", "opscore agent list --capability summarize --json")
)
@click.option("--capability", help="Those that have it only.")
@limited
@quiet("agentId")
@asks
def list_(session: Session, capability: str | None, limit: int | None) -> None:
    """List agents."""
    columns: Sequence[output.Column] = (
        ("AGENT", lambda a: a["agentId"]),
        ("KIND", lambda a: a["kind"]),
        ("STATE", lambda a: a["state"]),
        ("TAKES WORK", _takes_work),
        ("RUNNING", _running),
        ("WAITING", lambda a: a["waiting"]),
        ("SEEN", lambda a: output.age(a["seenAt"])),
        ("CAPABILITIES", lambda a: ", ".join(a["capabilities"])),
    )
    empty = "No agents: workers register theirs when they start, those behind HTTP by webhook."
    session.show_list(
        session.client.agents.list(capability=capability),
        limit,
        lambda found: output.table(found, columns, empty),
    )


@agent.command(examples=("opscore agent show writer",))
@click.argument("agent_id")
@asks
def show(session: Session, agent_id: str) -> None:
    """Show an agent: who holds it, and who waits for it."""
    found = session.client.agents.get(agent_id)
    session.show(found, lambda: _show(found))


@agent.command("get-state", examples=("opscore agent get-state writer",))
@click.argument("agent_id")
@asks
def get_state(session: Session, agent_id: str) -> None:
    """Show the state that an agent reported last."""
    found = session.client.get_state(agent_id)
    members = {
        "agent": found["agentId"],
        "state": found["state"],
        "reported": output.moment(found["timestamp"]),
        "details": found["details"],
    }
    session.show(found, lambda: output.details(members))


@agent.command(
    "update-state",
    examples=(
        "opscore agent update-state summarizer idle",
        """opscore agent update-state summarizer error --details '{"why": "no model"}'""",
    ),
)
@click.argument("agent_id")
@click.argument("state")
@click.option("--details", type=Json(), help="JSON; @FILE reads a file, - standard input.")
@asks
def update_state(session: Session, agent_id: str, state: str, details: Any) -> None:
    """Report an agent's state, as the agent itself would."""
    answer = session.client.update_state(agent_id, state, details)
    session.show(answer, lambda: output.say(answer["message"]))


@agent.command(examples=("opscore agent history summarizer -n 5",))
@click.argument("agent_id")
@limited
@asks
def history(session: Session, agent_id: str, limit: int | None) -> None:
    """List what an agent reported of its state, newest first."""
    columns: Sequence[output.Column] = (
        ("REPORTED", lambda r: output.moment(r["timestamp"])),
        ("STATE", lambda r: r["state"]),
        ("DETAILS", lambda r: None if r["details"] is None else output.short(r["details"])),
    )
    session.show_list(
        session.client.agents.history(agent_id),
        limit,
        lambda found: output.table(found, columns, "It has reported nothing."),
    )


@agent.command(examples=("opscore agent pause writer",))
@click.argument("agent_id")
@asks
def pause(session: Session, agent_id: str) -> None:
    """Give an agent nothing new until it is resumed; what it has it may finish."""
    _changed(session, session.client.agents.pause(agent_id))


@agent.command(examples=("opscore agent drain writer",))
@click.argument("agent_id")
@asks
def drain(session: Session, agent_id: str) -> None:
    """Give an agent nothing new, since it is to go away; others are preferred."""
    _changed(session, session.client.agents.drain(agent_id))


@agent.command(examples=("opscore agent resume writer",))
@click.argument("agent_id")
@asks
def resume(session: Session, agent_id: str) -> None:
    """Give an agent work again that was paused or drained."""
    _changed(session, session.client.agents.resume(agent_id))


@agent.command(examples=("opscore agent set-capacity summarizer 4",))
@click.argument("agent_id")
@click.argument("capacity", type=click.IntRange(1))
@asks
def set_capacity(session: Session, agent_id: str, capacity: int) -> None:
    """Say how many attempts an agent may have at once."""
    _changed(session, session.client.agents.change(agent_id, {"capacity": capacity}))


def _changed(session: Session, found: Mapping[str, Any]) -> None:
    said = f"{found['agentId']}: takes work: {_takes_work(found)}; running {_running(found)}."
    session.show(found, lambda: output.say(said))


def _takes_work(agent: Mapping[str, Any]) -> str:
    return "yes" if agent["available"] else f"no: {agent['unavailableBecause']}"


def _running(agent: Mapping[str, Any]) -> str:
    capacity = agent["capacity"]
    return f"{agent['running']}" if capacity is None else f"{agent['running']} of {capacity}"


def _show(agent: Mapping[str, Any]) -> None:
    output.details(
        {
            "agent": agent["agentId"],
            "name": agent["agentName"],
            "kind": f"{agent['kind']}, version {agent['version']}",
            "capabilities": ", ".join(agent["capabilities"]),
            "state": agent["state"],
            "takes work": _takes_work(agent),
            "running": _running(agent),
            "waiting": agent["waiting"],
            "endpoint": agent["contactEndpoint"],
            "heartbeat": f"{agent['heartbeatSeconds']:g} s" if agent["heartbeatSeconds"] else None,
            "seen": output.ago(agent["seenAt"]),
            "registered": output.moment(agent["registeredAt"]),
            "metadata": agent["metadata"],
        }
    )
    if agent["holders"]:
        click.echo("\nIt works on:")
        output.table(agent["holders"], _HOLDERS, "")
    if agent["line"]:
        click.echo("\nThe first who wait for it:")
        output.table(agent["line"], _LINE, "")


_HOLDERS: Sequence[output.Column] = (
    ("TASK ID", lambda h: h["taskId"]),
    ("TASK", lambda h: h["taskDefinitionId"]),
    ("ATTEMPT", lambda h: h["attempt"]),
    ("RUN", lambda h: h["runId"]),
)
_LINE: Sequence[output.Column] = (
    ("#", lambda w: w["position"]),
    ("TASK ID", lambda w: w["taskId"]),
    ("TASK", lambda w: w["taskDefinitionId"]),
    ("WAITS", lambda w: output.age(w["waitingSince"])),
    ("STARTS ABOUT", lambda w: output.age(w["estimatedStartAt"])),
    ("RUN", lambda w: w["runId"]),
)
