"""`opscore agent`: who does the work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import yaml

from opscore.cli import output
from opscore.cli.session import Group, Json, Session, asks, limited, quiet, standard_input

if TYPE_CHECKING:
    from opscore.sdk import types


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


@agent.command(examples=("opscore agent push clerk.yaml",))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@quiet("agentId")
@asks
def push(session: Session, file: Path) -> None:
    """Define an LLM agent, or its next version, from YAML or JSON; - reads standard input."""
    try:
        text = standard_input() if str(file) == "-" else file.read_text(encoding="utf-8")
        definition = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise click.BadParameter(f"{file} cannot be read: {why}.", param_hint="FILE") from error
    if not isinstance(definition, dict):
        raise click.BadParameter(f"{file} is no object of an agent.", param_hint="FILE")
    made = session.client.agents.define(cast("types.LLMDefinition", definition))
    session.show(made, lambda: output.say(f"{made['agentId']} version {made['version']}"))


@agent.command(examples=("opscore agent versions clerk",))
@click.argument("agent_id")
@limited
@asks
def versions(session: Session, agent_id: str, limit: int | None) -> None:
    """List the versions of an LLM agent that was defined by `push`, newest first."""
    columns: Sequence[output.Column] = (
        ("VERSION", lambda a: a["version"]),
        ("MODEL", lambda a: a["definition"]["model"]),
        ("TOOLS", lambda a: ", ".join(a["definition"]["tools"])),
        ("BY", lambda a: a["by"]),
        ("DEFINED", lambda a: output.moment(a["createdAt"])),
    )
    session.show_list(
        session.client.agents.versions(agent_id),
        limit,
        lambda found: output.table(found, columns, "No versions."),
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


@agent.command(
    examples=(
        "opscore agent memories researcher",
        'opscore agent memories researcher --query "invoices of Meyer"',
    )
)
@click.argument("agent_id")
@click.option("--query", help="What it finds with these words only, the best first.")
@click.option("--namespace", help="Those of this namespace only.")
@limited
@quiet("memoryId")
@asks
def memories(
    session: Session, agent_id: str, query: str | None, namespace: str | None, limit: int | None
) -> None:
    """List what an LLM agent remembers, newest first."""
    columns: Sequence[output.Column] = (
        ("MEMORY", lambda m: m["memoryId"]),
        ("ADDED", lambda m: output.age(m["addedAt"])),
        *((("SCORE", lambda m: f"{m['score']:.2f}"),) if query is not None else ()),
        ("NAMESPACE", lambda m: m["namespace"]),
        ("TEXT", lambda m: m["text"]),
    )
    session.show_list(
        session.client.agents.memories(agent_id, query=query, namespace=namespace),
        limit,
        lambda found: output.table(found, columns, "It remembers no such thing."),
    )


@agent.command(
    examples=(
        "opscore agent forget researcher 0197b5a0-0000-4000-8000-000000000000",
        "opscore agent forget researcher --all --namespace customers",
    )
)
@click.argument("agent_id")
@click.argument("memory_ids", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="All it remembers, instead of those named.")
@click.option("--namespace", help="With --all: all of this namespace only.")
@asks
def forget(
    session: Session,
    agent_id: str,
    memory_ids: Sequence[str],
    is_all: bool,
    namespace: str | None,
) -> None:
    """Have an LLM agent forget memories, for good."""
    if is_all == bool(memory_ids) or (namespace is not None and not is_all):
        raise click.UsageError("Name memories, or give --all, perhaps with --namespace.")
    agents, count = session.client.agents, len(memory_ids)
    if is_all:
        count = agents.forget_memories(agent_id, namespace=namespace)
    for memory_id in memory_ids:
        agents.forget_memory(agent_id, memory_id)
    session.show({"forgotten": count}, lambda: output.say(f"Forgotten: {count}."))


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
