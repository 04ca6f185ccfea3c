"""Starting runs by requests, each once: a request that is sent again with the same Idempotency-Key
finds the run it started, and starts none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from opscore import idempotency
from opscore.db import Tx
from opscore.engine import Plan
from web.bodies import digest
from web.current import database, dispatcher

REPLAYED_HEADER = "Idempotent-Replayed"


@dataclass(frozen=True, slots=True)
class Started:
    """The run that a request started, now or when it was first sent."""

    run_id: UUID
    is_replay: bool = False

    def headers(self, location: str) -> dict[str, str]:
        """Return the headers of the answer; `location` is where that which was started is found."""
        replayed = {REPLAYED_HEADER: "true"} if self.is_replay else {}
        return {"Location": location, **replayed}


def start(key: str | None, submit: Callable[[Tx], Plan], *, whole: bool = True) -> Started:
    """Submit a run and publish it, unless this request did with this key.

    `whole`: what `submit` does is all or nothing; without it every statement counts by itself.

    Raises:
        KeyReused: the key came with another request.
    """
    if key is not None:
        return _start_once(key, submit)
    with database().transaction() if whole else database().autocommit() as tx:
        plan = submit(tx)
    dispatcher().publish(plan)
    return Started(plan.run_id)


def _start_once(key: str, submit: Callable[[Tx], Plan]) -> Started:
    with database().transaction() as tx:
        started = idempotency.take_key(tx, key, digest())
        if started is not None:
            return Started(started, is_replay=True)
        plan = submit(tx)
        idempotency.keep_run(tx, key, plan.run_id)
    dispatcher().publish(plan)
    return Started(plan.run_id)
