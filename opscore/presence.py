"""Which workers live: each says every few seconds that it does, in a row of its own.

A worker that is asked over Celery does not answer while it is busy or frozen; a row that grows old
tells that. Nothing else goes by these rows: who may do what is decided by leases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, text

from opscore.db import Tx
from opscore.models import Worker

SAY_SECONDS = 5.0
"""How often a worker says that it lives."""
DEAD_SECONDS = 20.0
"""Whoever said nothing for so long is taken for dead: a long round of the keeper's is no death."""
FORGET_SECONDS = 3600.0
"""Rows of the dead are deleted after this."""
KEEPER_LEASE_SECONDS = 5
"""The lease of the keeper, which acts in one of the workers: after this a silent one is replaced.
"""

_SAY = text(
    """
INSERT INTO workers (id, name, host, pid, pool, concurrency, queues, version, offer)
VALUES (:id, :name, :host, :pid, :pool, :concurrency, :queues, :version, :offer)
ON CONFLICT (id) DO UPDATE SET seen_at = now()
"""
).bindparams(
    bindparam("queues", type_=Worker.queues.type), bindparam("offer", type_=Worker.offer.type)
)
_LEAVE = text("DELETE FROM workers WHERE id = :id")
_FORGET = text("DELETE FROM workers WHERE seen_at < now() - make_interval(secs => :seconds)")
_OFFERS = text(
    """
SELECT DISTINCT offer FROM workers
WHERE seen_at > now() - make_interval(secs => :seconds) AND :queue = ANY (queues)
  AND offer <> '{}'
"""
).columns(offer=Worker.offer.type)
_LIVE = text(
    """
SELECT name, host, pid, pool, concurrency, queues, version, started_at, seen_at FROM workers
WHERE seen_at > now() - make_interval(secs => :seconds) ORDER BY name, started_at
"""
)


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker says of itself."""

    id: UUID
    """Its own from its start to its end."""
    name: str
    host: str
    pid: int
    """Of its main process."""
    pool: str
    """`prefork` or `threads`."""
    concurrency: int
    queues: Sequence[str]
    version: str | None
    """Of opscore, if known."""
    offer: Mapping[str, Any] = field(default_factory=dict)
    """What it has for LLM agents: the fields of `agentkit.llm.Offer`."""


def say(tx: Tx, worker: Presence) -> None:
    """Note that a worker lives at this moment."""
    tx.execute(_SAY, asdict(worker))


def leave(tx: Tx, worker_id: UUID) -> None:
    """Note that a worker has ended."""
    tx.execute(_LEAVE, {"id": worker_id})


def forget(tx: Tx) -> None:
    """Delete the rows of workers that died long ago without saying so."""
    tx.execute(_FORGET, {"seconds": FORGET_SECONDS})


def live(tx: Tx) -> list[dict[str, Any]]:
    """Return the workers that live, with `started_at` and `seen_at`, by name."""
    return [row._asdict() for row in tx.execute(_LIVE, {"seconds": DEAD_SECONDS})]


def offers(tx: Tx, queue: str) -> list[Mapping[str, Any]]:
    """Return what the workers that live and take from a queue have for LLM agents."""
    given = {"seconds": DEAD_SECONDS, "queue": queue}
    return [row.offer for row in tx.execute(_OFFERS, given)]
