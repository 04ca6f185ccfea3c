"""What LLM agents remember, in PostgreSQL: texts of an agent in a namespace, found by their words.

Words are `agentkit.memory`'s and not those of a text search configuration, which belongs to one
language. A row's words begin with where it stands, so that the index of words finds those of one
namespace alone, however many others have the same ones.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar
from uuid import UUID

from opscore.agentkit.memory import (
    MAX_TEXTS,
    SCORE_DIGITS,
    STEM_COUNTS,
    Found,
    checked,
    may_go_on,
    query_words,
    words_of,
)
from opscore.db import Prepared, Tx
from opscore.errors import MemoryNotFound

T = TypeVar("T")

_LASTS = "(expires_at IS NULL OR expires_at > now())"
_HIS = """agent_id = :agent_id
    AND (cast(:namespace AS text) IS NULL OR namespace = cast(:namespace AS text))"""

_ADD = Prepared(
    f"""
WITH kept AS (
    INSERT INTO agent_memories (agent_id, namespace, digest, text, words, expires_at)
    VALUES (:agent_id, :namespace, :digest, :text, array_to_tsvector(cast(:words AS text[])),
            now() + make_interval(secs => :seconds))
    ON CONFLICT (agent_id, namespace, digest) DO UPDATE
    SET added_at = clock_timestamp(), words = excluded.words, expires_at = excluded.expires_at
    RETURNING id
), bound AS (
    SELECT m.added_at FROM agent_memories m
    WHERE m.agent_id = :agent_id AND m.namespace = :namespace
    AND m.id NOT IN (SELECT id FROM kept)
    ORDER BY m.added_at DESC OFFSET {MAX_TEXTS - 1} LIMIT 1
), gone AS (
    -- Whoever adds one of these again at this moment has locked it, and keeps it.
    DELETE FROM agent_memories WHERE id IN (
        SELECT m.id FROM agent_memories m
        WHERE m.agent_id = :agent_id AND m.namespace = :namespace
        AND m.added_at <= (SELECT added_at FROM bound) AND m.id NOT IN (SELECT id FROM kept)
        FOR UPDATE SKIP LOCKED)
)
SELECT id FROM kept
"""
)
_SEARCH = Prepared(
    f"""
WITH wanted AS (
    SELECT word, goes_on,
           cast(place || ' & ' || quoted AS tsquery) AS whole,
           cast(place || ' & ' || quoted || CASE WHEN goes_on THEN ':*' ELSE '' END AS tsquery)
           AS start
    FROM (SELECT word, goes_on, '''' || word || '''' AS quoted,
                 '''' || cast(:place AS text) || '''' AS place
          FROM unnest(cast(:words AS text[]), cast(:go_on AS boolean[])) AS w (word, goes_on)
         ) AS each
), hits AS (
    SELECT w.word, m.id, CASE WHEN m.words @@ w.whole THEN 1.0 ELSE {STEM_COUNTS} END AS share
    FROM wanted w JOIN agent_memories m ON m.words @@ w.start AND {_LASTS}
), counted AS (
    SELECT count(*) AS texts FROM agent_memories WHERE {_HIS} AND {_LASTS}
), weights AS (
    SELECT w.word, ln(1 + texts::float / greatest(count(h.id), 1)) AS weight
    FROM counted, wanted w LEFT JOIN hits h ON h.word = w.word GROUP BY w.word, texts
), scores AS (
    SELECT h.id, round(cast(sum(h.share * g.weight) / (SELECT sum(weight) FROM weights) AS numeric),
                       {SCORE_DIGITS}) AS score
    FROM hits h JOIN weights g ON g.word = h.word GROUP BY h.id
)
SELECT m.id, m.namespace, m.text, m.added_at, m.expires_at, s.score
FROM scores s JOIN agent_memories m ON m.id = s.id
ORDER BY s.score DESC, m.added_at DESC LIMIT :limit
"""
)
_NEWEST = Prepared(
    f"""
SELECT id, namespace, text, added_at, expires_at, 0.0 AS score FROM agent_memories
WHERE {_HIS} AND {_LASTS} ORDER BY added_at DESC LIMIT :limit
"""
)
_FORGET = Prepared(
    f"""
DELETE FROM agent_memories WHERE {_HIS}
AND (cast(:id AS uuid) IS NULL OR id = cast(:id AS uuid))
AND (cast(:before AS timestamptz) IS NULL OR added_at < cast(:before AS timestamptz))
RETURNING id
"""
)
_FORGET_EXPIRED = Prepared(
    """
DELETE FROM agent_memories WHERE id IN (
    SELECT id FROM agent_memories WHERE expires_at <= now()
    ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED)
RETURNING id
"""
)


def add(
    tx: Tx, agent_id: str, namespace: str, text: str, expires_in_seconds: float | None = None
) -> str:
    """Keep a text and return its id: see `agentkit.memory.Memory`.

    Raises:
        ValueError: it cannot be kept.
    """
    kept, digest = checked(text, expires_in_seconds)
    values = {
        "agent_id": agent_id,
        "namespace": namespace,
        "digest": digest,
        "text": kept,
        "words": [_place(agent_id), _place(agent_id, namespace), *words_of(kept)],
        "seconds": expires_in_seconds,
    }
    (id,) = _ADD(tx, values).scalars()
    return str(id)


def search(tx: Tx, agent_id: str, namespace: str | None, query: str, limit: int) -> Sequence[Any]:
    """Return rows that share words with a query, best first; the newest if it has no word.

    Without `namespace` those of all of the agent's.
    """
    words = query_words(query)
    whose = {"agent_id": agent_id, "namespace": namespace, "limit": limit}
    if not words:
        return _NEWEST(tx, whose)
    wanted = {
        "words": words,
        "go_on": list(map(may_go_on, words)),
        "place": _place(agent_id, namespace),
    }
    return _SEARCH(tx, whose | wanted)


def forget(
    tx: Tx,
    agent_id: str,
    namespace: str | None,
    *,
    id: UUID | None = None,
    before: datetime | None = None,
) -> int:
    """Delete an agent's texts: one, what is older, or all; return how many."""
    wanted = {"agent_id": agent_id, "namespace": namespace, "id": id and str(id), "before": before}
    return len(_FORGET(tx, wanted))


def forget_one(tx: Tx, agent_id: str, memory_id: UUID) -> None:
    """Delete a text of an agent.

    Raises:
        MemoryNotFound
    """
    if not forget(tx, agent_id, None, id=memory_id):
        raise MemoryNotFound(memory_id=memory_id)


def forget_expired(tx: Tx, limit: int) -> int:
    """Delete texts whose time is over; return how many, at most `limit`."""
    return len(_FORGET_EXPIRED(tx, {"limit": limit}))


def _place(agent_id: str, namespace: str | None = None) -> str:
    """Return the word by which the texts of an agent, or of one namespace, are found.

    No word of a text has a blank, and no id a slash.
    """
    return f" {agent_id}" if namespace is None else f" {agent_id}/{namespace}"


class Statements(Protocol):
    """Runs statements that are safe to repeat, one transaction each."""

    def __call__(self, statement: Callable[[Tx], T], /) -> T: ...


class Stored:
    """The memory of an agent in a namespace."""

    def __init__(self, run: Statements, agent_id: str, namespace: str) -> None:
        self._run, self._whose = run, (agent_id, namespace)

    def add(self, text: str, *, expires_in_seconds: float | None = None) -> str:
        return self._run(lambda tx: add(tx, *self._whose, text, expires_in_seconds))

    def search(self, query: str, limit: int = 5) -> Sequence[Found]:
        rows = self._run(lambda tx: search(tx, *self._whose, query, limit))
        return [Found(str(row.id), row.text, float(row.score), row.added_at) for row in rows]

    def forget(self, which: str | datetime | None) -> int:
        if isinstance(which, datetime):
            return self._run(lambda tx: forget(tx, *self._whose, before=which))
        try:
            id = None if which is None else UUID(which)
        except ValueError:  # nobody has it
            return 0
        return self._run(lambda tx: forget(tx, *self._whose, id=id))
