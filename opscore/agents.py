"""Agents as the database knows them: registration, what they report, and their slots.

An agent's slots are rows, one per unit of capacity; the engine's claim takes them and its outcomes
free them. Nothing an agent reports frees or keeps a slot: it only says whether the agent is to be
asked.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy import func, insert, literal_column, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from opscore import engine, slots
from opscore.db import Prepared, Tx, dump_json, tell
from opscore.errors import AgentNotFound, ConfigurationError, InvalidRequest, StaleNotice
from opscore.models import Agent, AgentDefinition, AgentReport
from opscore.states import AgentState

REMOTE_CAPACITY = 1
"""Of an agent behind HTTP, until somebody who knows it says otherwise."""


class Declared(Protocol):
    """What an agent in a worker says of itself; `capacity` None means no limit."""

    @property
    def kind(self) -> str:
        """`function` or `llm`."""

    @property
    def agent_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def capabilities(self) -> Sequence[str]: ...
    @property
    def capacity(self) -> int | None: ...


def register_functions(tx: Tx, agents: Iterable[Declared]) -> None:
    """Write the agents a worker offers; a known one gets the newest declaration.

    Raises:
        ConfigurationError: one of their ids is that of an agent behind HTTP, or of one that was
            defined over the API.
    """
    declared = sorted(agents, key=lambda agent: agent.agent_id)
    ids = [agent.agent_id for agent in declared]
    abroad = select(Agent.agent_id).where(
        Agent.agent_id.in_(ids), Agent.kind == "remote", Agent.deregistered_at.is_(None)
    )
    faults = [
        f"agent {agent_id!r} is registered as one behind HTTP: rename the function agent,"
        " or deregister the other"
        for agent_id in sorted(tx.execute(abroad).scalars())
    ]
    defined = select(AgentDefinition.agent_id).where(AgentDefinition.agent_id.in_(ids)).distinct()
    faults += [
        f"agent {agent_id!r} was defined over the API: give the one that is declared another id"
        for agent_id in sorted(tx.execute(defined).scalars())
    ]
    if faults:
        raise ConfigurationError(faults)
    for agent in declared:
        _offer(tx, agent)
    tell(tx, "agent.registered", agents=[agent.agent_id for agent in declared])


def _offer(tx: Tx, agent: Declared) -> None:
    values = {
        "kind": agent.kind,
        "name": agent.name,
        "version": agent.version,
        "capabilities": list(agent.capabilities),
        "capacity": agent.capacity,
        "contact_endpoint": None,
        "heartbeat_seconds": None,
    }
    _upsert(tx, agent.agent_id, values)
    slots.set_capacity(tx, agent.agent_id, agent.capacity or 0)


def _upsert(tx: Tx, agent_id: str, values: Mapping[str, Any], **if_new: Any) -> bool:
    """Write an agent, and tell whether it is new; of a known one what is not given stays."""
    statement: Any = (
        upsert(Agent)
        .values(agent_id=agent_id, **values, **if_new)
        .on_conflict_do_update(
            index_elements=[Agent.agent_id],
            set_={**values, "deregistered_at": None, "updated_at": func.now()},
        )
        .returning(literal_column("xmax = 0"))
    )
    return bool(tx.execute(statement).scalar())


# --- Defined over the API ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Defined:
    """An LLM agent that was defined over the API, as `agents` keeps it."""

    agent_id: str
    name: str
    version: str
    capabilities: Sequence[str]
    capacity: int | None
    kind: str = "llm"


def define(tx: Tx, values: Mapping[str, Any], by: str) -> tuple[int, bool]:
    """Write a version of an LLM agent, and offer it; return the version, and whether it is new.

    `values` are the fields of `agentkit.llm.LLMAgent`, judged by whoever calls. The same as the
    newest version is no new one.

    Raises:
        InvalidRequest: another kind of agent has its id, or a worker declares it.
    """
    agent_id = values["agent_id"]
    tx.execute(_TURN, {"key": f"agent:{agent_id}"})
    newest = find_definition(tx, agent_id)
    _check_free(tx, agent_id, is_ours=newest is not None)
    digest = hashlib.sha256(dump_json(_sorted(values)).encode()).hexdigest()
    version = newest.version if newest is not None else 0
    is_new = newest is None or newest.digest != digest
    if is_new:
        version += 1
        row = {"agent_id": agent_id, "version": version, "definition": dict(values)}
        tx.execute(insert(AgentDefinition).values(**row, digest=digest, by=by))
    offered = (values["capabilities"], values["capacity"])
    _offer(tx, Defined(agent_id, values["name"] or agent_id, str(version), *offered))
    tell(tx, "agent.defined", agent_id=agent_id, version=version, by=by)
    engine.hurry(tx, agent_id)
    return version, is_new


_TURN = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))")


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list | tuple) else value


def _check_free(tx: Tx, agent_id: str, *, is_ours: bool) -> None:
    known = select(Agent.kind).where(Agent.agent_id == agent_id, Agent.deregistered_at.is_(None))
    kind = tx.execute(known.with_for_update()).scalar()
    if kind is not None and not is_ours:
        whose = "an agent behind HTTP" if kind == "remote" else "an agent that workers declare"
        raise InvalidRequest({"/agentId": [f"This is the id of {whose}; choose another one."]})


def find_definition(tx: Tx, agent_id: str) -> Any | None:
    """Return `version`, `definition` and `digest` of the newest version of an LLM agent defined
    over the API; None if there is none.
    """
    query = select(AgentDefinition).where(AgentDefinition.agent_id == agent_id)
    return tx.execute(query.order_by(AgentDefinition.version.desc()).limit(1)).one_or_none()


# --- Behind HTTP ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What an agent behind HTTP says of itself."""

    agent_id: str
    name: str
    version: str
    capabilities: Sequence[str]
    contact_endpoint: str
    details: Any = None


def register_remote(tx: Tx, agent: Registration, signed_at: datetime) -> None:
    """Write an agent behind HTTP, and `UNKNOWN` as its state if it is new.

    A known one keeps its state, its capacity, and what operators set.

    Raises:
        InvalidRequest: a function agent has its id.
        StaleNotice: a notice of this agent that was signed later was taken already.
    """
    _take_notice(tx, agent.agent_id, signed_at, is_new=True)
    values = {
        "notified_at": signed_at,
        "kind": "remote",
        "name": agent.name,
        "version": agent.version,
        "capabilities": list(agent.capabilities),
        "contact_endpoint": agent.contact_endpoint,
        "details": agent.details,
        "seen_at": func.now(),
    }
    if _upsert(tx, agent.agent_id, values, capacity=REMOTE_CAPACITY):
        slots.set_capacity(tx, agent.agent_id, REMOTE_CAPACITY)
        _write_report(tx, agent.agent_id, AgentState.UNKNOWN, None, None)
    tell(tx, "agent.registered", agent_id=agent.agent_id)


def _take_notice(tx: Tx, agent_id: str, signed_at: datetime, *, is_new: bool) -> None:
    """Refuse what was said of an agent before what is known: somebody sends it once more."""
    known = tx.execute(
        select(Agent.kind, Agent.notified_at, Agent.deregistered_at)
        .where(Agent.agent_id == agent_id)
        .with_for_update()
    ).one_or_none()
    if known is not None and known.kind != "remote":
        sentence = "A function agent of the workers has this id; choose another one."
        raise InvalidRequest({"/agent_details/agentId": [sentence]})
    if known is None or known.notified_at is None:
        return
    # A second may be all that a signature tells apart; then the goodbye was the later word.
    is_late = signed_at == known.notified_at and is_new and known.deregistered_at is not None
    if signed_at < known.notified_at or is_late:
        raise StaleNotice


def deregister(tx: Tx, agent_id: str, signed_at: datetime) -> None:
    """Give an agent nothing more. What it has is withdrawn after the commit: see `dispatch`.

    Raises:
        AgentNotFound
        InvalidRequest: it is a function agent.
        StaleNotice: a notice of this agent that was signed later was taken already.
    """
    _take_notice(tx, agent_id, signed_at, is_new=False)
    statement = (
        update(Agent)
        .where(Agent.agent_id == agent_id, Agent.deregistered_at.is_(None))
        .values(deregistered_at=func.now(), updated_at=func.now(), notified_at=signed_at)
        .returning(Agent.agent_id)
    )
    if tx.execute(statement).first() is None:
        raise AgentNotFound(agent_id=agent_id)
    tell(tx, "agent.deregistered", agent_id=agent_id)


def change(tx: Tx, agent_id: str, values: Mapping[str, Any]) -> None:
    """Change what operators decide: `capacity`, `paused`, `draining`, `heartbeat_seconds`,
    `require_token`.

    Raises:
        AgentNotFound
        InvalidRequest: the capacity of a function agent, which its declaration says.
    """
    row = tx.execute(
        select(Agent.kind)
        .where(Agent.agent_id == agent_id, Agent.deregistered_at.is_(None))
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise AgentNotFound(agent_id=agent_id)
    if row.kind != "remote":
        declared = [n for n in ("capacity", "heartbeat_seconds", "require_token") if n in values]
        if declared:
            raise InvalidRequest(
                {
                    f"/{_CAMEL[name]}": ["Of a function agent its declaration says this."]
                    for name in declared
                }
            )
    if values:
        tx.execute(update(Agent).where(Agent.agent_id == agent_id).values(**values))
        tell(tx, "agent.changed", agent_id=agent_id, members=sorted(values))
    if values.get("capacity"):
        slots.set_capacity(tx, agent_id, values["capacity"])
    if values.keys() & {"paused", "draining"}:
        engine.hurry(tx, agent_id)


_CAMEL = {
    "capacity": "capacity",
    "heartbeat_seconds": "heartbeatSeconds",
    "require_token": "requireToken",
}


def report_state(
    tx: Tx,
    agent_id: str,
    state: AgentState,
    details: Any = None,
    at: datetime | None = None,
) -> None:
    """Add a report to an agent's history; the newest, by the agent's own clock, is its state.

    `at` is never later than now.

    Raises:
        AgentNotFound
    """
    _write_report(tx, agent_id, state, details, at)
    given = {"agent_id": agent_id, "state": str(state), "at": at}
    if _REPORT(tx, given | {"ours": _is_of_a_task(details)}).first() is None:
        raise AgentNotFound(agent_id=agent_id)
    tell(tx, "agent.reported", agent_id=agent_id, state=state)
    if state in (AgentState.IDLE, AgentState.FINISHED):
        _WAKE_SLOTS(tx, {"agent_id": agent_id})


_WAKE_SLOTS = Prepared("UPDATE slots SET rests_until = NULL WHERE pool = :agent_id")
"""Of an agent that says that it is free: it is there again."""


def _is_of_a_task(details: Any) -> bool:
    return isinstance(details, dict) and "opscore_task_id" in details


_REPORT = Prepared(
    """
UPDATE agents a
SET seen_at = now(), state = CASE WHEN is_newest THEN cast(:state AS text) ELSE a.state END,
    state_at = CASE WHEN is_newest THEN moment ELSE a.state_at END,
    state_lapses = CASE WHEN is_newest THEN :ours OR is_at_it ELSE a.state_lapses END,
    busy_until = CASE WHEN is_newest AND :state IN ('idle', 'finished') THEN NULL
                      ELSE a.busy_until END
FROM (SELECT k.agent_id, moment, k.state_at IS NULL OR moment >= k.state_at AS is_newest,
             EXISTS (SELECT FROM slots s WHERE s.pool = k.agent_id
                     AND s.holder IS NOT NULL) AS is_at_it
      FROM agents k, (SELECT least(coalesce(cast(:at AS timestamptz), now()), now()) AS moment) AS c
      WHERE k.agent_id = :agent_id AND k.deregistered_at IS NULL FOR NO KEY UPDATE OF k) AS known
WHERE a.agent_id = known.agent_id
RETURNING a.agent_id
"""
)


def _write_report(
    tx: Tx, agent_id: str, state: AgentState, details: Any, at: datetime | None
) -> None:
    """Append to the history; nothing is written for an agent that is not there."""
    known = select(Agent.agent_id).where(
        Agent.agent_id == agent_id, Agent.deregistered_at.is_(None)
    )
    if tx.execute(known).first() is None:
        raise AgentNotFound(agent_id=agent_id)
    moment = func.least(func.coalesce(at, func.now()), func.now())
    values = {"agent_id": agent_id, "state": str(state), "details": details, "at": moment}
    tx.execute(insert(AgentReport).values(**values))


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An agent that no module of a worker declares."""

    kind: str
    contact_endpoint: str | None
    """Where one behind HTTP takes work."""


def find(tx: Tx, agent_id: str | None) -> Elsewhere | None:
    """Return what is known of an agent; None if it is not there."""
    query = select(Agent.kind, Agent.contact_endpoint).where(
        Agent.agent_id == agent_id, Agent.deregistered_at.is_(None)
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else Elsewhere(*row)
