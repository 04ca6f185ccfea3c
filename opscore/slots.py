"""Slots: so many at once and never more, of an agent's attempts, a `forEach`'s items or a
workflow's runs.

Each is a row that names its holder, and only whoever has locked the free row (SKIP LOCKED) gives
it to one. An attempt holds its slot under its lease; an item or a run, which may wait for days,
until it is over, so that no crash can keep a slot and none needs to be given back.
"""

from sqlalchemy import text

from opscore.db import Tx

ITEMS = "items:"
RUNS = "runs:"
"""Before a task's or a workflow's id they name a pool. An agent's is its id: that has no colon."""

_COUNT = text("SELECT count(*) FROM slots WHERE pool = :pool AND NOT closed")
_ALL = text(
    """
SELECT number, holder FROM slots WHERE pool = :pool
ORDER BY holder IS NULL, reserved_until > now() IS NOT TRUE, number FOR UPDATE
"""
)
_OPEN = text("UPDATE slots SET closed = false WHERE pool = :pool AND number = ANY (:numbers)")
_CLOSE = text("UPDATE slots SET closed = true WHERE pool = :pool AND number = ANY (:numbers)")
_DELETE = text("DELETE FROM slots WHERE pool = :pool AND number = ANY (:numbers)")
_ADD = text("INSERT INTO slots (pool, number) SELECT :pool, unnest(cast(:numbers AS int[]))")


def set_capacity(tx: Tx, pool: str, capacity: int) -> None:
    """Give a pool so many slots; who changes it at the same moment must have been locked out.

    Those that are held are kept first. Of what is held beyond the capacity nobody is turned out,
    but as long as there are more holders than that no slot is free.
    """
    if tx.execute(_COUNT, {"pool": pool}).scalar() == capacity:
        return
    rows = tx.execute(_ALL, {"pool": pool}).all()
    kept, surplus = rows[:capacity], rows[capacity:]
    known = {row.number for row in rows}
    fresh = (n for n in range(1, capacity + len(known) + 1) if n not in known)
    for statement, numbers in (
        (_OPEN, [row.number for row in kept]),
        (_CLOSE, [row.number for row in surplus if row.holder is not None]),
        (_DELETE, [row.number for row in surplus if row.holder is None]),
        (_ADD, [number for number, _ in zip(fresh, range(capacity - len(kept)), strict=False)]),
    ):
        if numbers:
            tx.execute(statement, {"pool": pool, "numbers": numbers})
