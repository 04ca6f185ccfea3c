"""Beat: fires schedules, and does nothing else; any number of them may run.

    celery -A workers.app beat -S workers.beat:Beat

Schedules are rows (see `opscore.schedules`); whoever locks one decides. A change is seen within a
second, and what is committed is published like any other run: should beat die in between, the
keeper does that. It keeps nothing, in no file.
"""

import os
from typing import Any

from celery import signals
from celery.beat import Scheduler
from sqlalchemy.exc import SQLAlchemyError

from opscore import alive, logs, migrations, schedules, tracing
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.metrics import Teller

log = logs.get(__name__)

PAUSE_SECONDS = 0.2
"""Between two looks at what is due: so late a firing may be, and so late a change is seen."""
SCHEDULES_AT_ONCE = 20
"""In one transaction: what is committed is published, and beats beside this one take others."""


class Beat(Scheduler):
    """Celery's scheduler, with rows for a schedule."""

    def setup_schedule(self) -> None:
        """Connect, and make sure that the rows are there."""
        settings = Settings.from_env(os.environ)
        migrations.check(settings.database_url)
        self.alive_file = settings.alive_file
        self.database = Database(settings.database_url, pool_size=3, application="beat")
        self.dispatcher = Dispatcher(self.app, self.database, settings)
        self.teller = Teller(self.database, is_steady=True)
        tracing.start("opscore-beat")

    def tick(self, *_: Any, **__: Any) -> float:
        """Fire what is due, and return in how many seconds to look again."""
        alive.give_sign(self.alive_file)
        try:
            return 0 if self.fire() else PAUSE_SECONDS
        except SQLAlchemyError as error:
            log.warning("beat.database_away", error=repr(error)[:300])
        except Exception:
            # Whatever is wrong with one firing, the others have their time.
            log.exception("beat.tick_failed")
        return PAUSE_SECONDS

    def fire(self) -> bool:
        """Fire some of what is due; False if that was all."""
        with self.database.transaction() as tx:
            fired = schedules.tick(tx, SCHEDULES_AT_ONCE)
        for plan in fired.plans:
            self.dispatcher.publish(plan)
        for run_id in fired.cancelled:
            self.dispatcher.follow_end(run_id)
        return fired.has_more

    def close(self) -> None:
        """Tell what was counted last, and let go of the database."""
        self.teller.stop()
        self.database.close()
        tracing.stop()

    @property
    def info(self) -> str:
        return "    . schedules -> PostgreSQL"


@signals.setup_logging.connect
def configure_logging(**_: Any) -> None:
    """Log as every opscore process does."""
    settings = Settings.from_env(os.environ)
    logs.configure(settings.log_level, settings.log_format)
