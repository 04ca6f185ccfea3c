"""Idempotency keys: which run a client's request started, so that the same one again starts none.

A key is taken in the transaction that starts the run, so neither is ever there without the other.
"""

from uuid import UUID

from opscore.db import Prepared, Tx
from opscore.errors import KeyReused

REMEMBERED_SECONDS = 86_400
"""Whoever repeats a request later than this starts another run."""

_TAKE = Prepared(
    f"""
INSERT INTO idempotency_keys AS k (key, digest) VALUES (:key, :digest)
ON CONFLICT (key) DO UPDATE SET digest = excluded.digest, run_id = NULL, created_at = now()
WHERE k.created_at < now() - make_interval(secs => {REMEMBERED_SECONDS})
RETURNING key
"""
)
_FIND = Prepared("SELECT digest, run_id FROM idempotency_keys WHERE key = :key")
_KEEP = Prepared("UPDATE idempotency_keys SET run_id = :run_id WHERE key = :key")
_FORGET = Prepared(
    f"""
DELETE FROM idempotency_keys WHERE key IN (
    SELECT key FROM idempotency_keys
    WHERE created_at < now() - make_interval(secs => {REMEMBERED_SECONDS})
    ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED)
RETURNING key
"""
)


def take_key(tx: Tx, key: str, digest: str) -> UUID | None:
    """Take a key for the request of this digest, or return the run that this request started.

    Of two at the same moment the second waits until the first has committed, or takes the key if
    the first rolled back. Who gets None starts the run and calls `keep_run`, all in `tx`.

    Raises:
        KeyReused: it was taken for another request, less than 24 hours ago.
    """
    if _TAKE(tx, {"key": key, "digest": digest}):
        return None
    # The statement above has locked the row, though it left it as it was.
    (taken,) = _FIND(tx, {"key": key})
    if taken.digest != digest:
        raise KeyReused
    run_id: UUID = taken.run_id
    return run_id


def keep_run(tx: Tx, key: str, run_id: UUID) -> None:
    """Remember the run that the key's request has started."""
    _KEEP(tx, {"key": key, "run_id": run_id})


def forget_keys(tx: Tx, limit: int) -> int:
    """Delete keys older than 24 hours; return how many, at most `limit`."""
    return len(_FORGET(tx, {"limit": limit}))
