"""Agents as the database knows them: registration and the slots that are their capacity.

An agent's slots are rows, one per unit of capacity; the engine's claim takes them and its outcomes
free them. Nothing an agent reports frees or keeps a slot.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from sqlalchemy import delete, func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert

from opscore.db import Tx
from opscore.models import Agent, Slot


class Declared(Protocol):
    """What an agent in a worker says of itself; `capacity` None means no limit."""

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
    """Write the function agents a worker offers; a known one gets the newest declaration."""
    for agent in sorted(agents, key=lambda agent: agent.agent_id):
        values = {
            "kind": "function",
            "name": agent.name,
            "version": agent.version,
            "capabilities": list(agent.capabilities),
            "capacity": agent.capacity,
        }
        tx.execute(
            upsert(Agent)
            .values(agent_id=agent.agent_id, **values)
            .on_conflict_do_update(
                index_elements=[Agent.agent_id], set_=values | {"updated_at": func.now()}
            )
        )
        set_capacity(tx, agent.agent_id, agent.capacity)


def set_capacity(tx: Tx, agent_id: str, capacity: int | None) -> None:
    """Give an agent as many slots as its capacity.

    A slot beyond it that is held stays until its attempt ends; no claim takes it again.
    """
    wanted = capacity or 0
    existing = set(tx.execute(select(Slot.number).where(Slot.agent_id == agent_id)).scalars())
    missing = sorted(set(range(1, wanted + 1)) - existing)
    if missing:
        tx.execute(insert(Slot), [{"agent_id": agent_id, "number": n} for n in missing])
    tx.execute(
        delete(Slot).where(
            Slot.agent_id == agent_id,
            Slot.number > wanted,
            Slot.holder.is_(None),
        )
    )
