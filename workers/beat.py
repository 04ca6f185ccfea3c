"""Beat: fires schedules, and does nothing else; any number of them may run.

    celery -A workers.app beat -S workers.beat:Beat

Schedules are rows (see `opscore.schedules`); whoever locks one decides. A change is seen within a
second, and what is committed is published like any other run: should beat die in between, the
keeper does that.
"""

from typing import Any

from celery.beat import Scheduler
from sqlalchemy.exc import SQLAlchemyError

from opscore import logs, schedules
from workers.app import process

log = logs.get(__name__)

LONGEST_PAUSE_SECONDS = 0.5
"""Between two looks at what is due: a change of a schedule is seen within a second."""
SCHEDULES_AT_ONCE = 50
"""In one transaction: beats beside this one take others."""


class Beat(Scheduler):
    """Celery's scheduler, with rows for a schedule."""

    def setup_schedule(self) -> None:
        """Have nothing in memory: rows are the schedule."""

    def get_schedule(self) -> dict[str, Any]:
        return {}

    def set_schedule(self, schedule: Any) -> None: ...

    schedule = property(get_schedule, set_schedule)

    def tick(self, *_: Any, **__: Any) -> float:
        """Fire what is due, and return in how many seconds to look again."""
        try:
            while self._fire():
                pass
        except SQLAlchemyError as error:
            log.warning("beat.database_away", error=repr(error)[:300])
        return LONGEST_PAUSE_SECONDS

    def _fire(self) -> bool:
        """Fire some of what is due; False if that was all."""
        with process.database.transaction() as tx:
            fired = schedules.tick(tx, SCHEDULES_AT_ONCE)
        for plan in fired.plans:
            process.dispatcher.publish(plan)
        for run_id in fired.cancelled:
            process.dispatcher.follow_end(run_id)
        return fired.has_more

    def sync(self) -> None: ...

    def close(self) -> None: ...

    @property
    def info(self) -> str:
        return "    . schedules -> PostgreSQL"
