"""Prometheus' questions: answered soon, or not at all.

As in `web.ready`, a thread asks PostgreSQL, over a connection of its own, and is given up on; while
one question hangs no second one is asked, and who comes meanwhile waits for its answer.
"""

from opscore import metrics
from opscore.config import Settings
from opscore.db import Database
from opscore.errors import Unavailable
from opscore.metrics import Scrape
from web.ready import Probe, Readiness

TIMEOUT_SECONDS = 3.0
"""Of these Redis may take one."""


class Scrapes:
    """The scrapes of one process."""

    def __init__(self, settings: Settings, readiness: Readiness) -> None:
        self._database = Database(settings.database_url, pool_size=1, application="opscore-metrics")
        self._readiness = readiness
        self._probe: Probe[Scrape | None] = Probe(self._read, None, "metrics")

    def _read(self) -> Scrape:
        queues = self._readiness.queues()
        with self._database.transaction() as tx:
            return metrics.read(tx, *queues)

    def read(self) -> Scrape:
        """Return everything there is to tell.

        Raises:
            Unavailable: PostgreSQL did not answer in time.
        """
        scrape = self._probe.answer(self._probe.start(), TIMEOUT_SECONDS)
        if scrape is None:
            raise Unavailable
        return scrape

    def close(self) -> None:
        self._database.close()
