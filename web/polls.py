"""Long polls: a request that waits until a run is over, without holding a connection meanwhile.

Each holds a thread of the server, so they share so many places with the streams; who finds none is
answered at once with what is so now. Stopping the process ends them all.
"""

import threading
import time
from uuid import UUID

from opscore import queries
from opscore.db import Database

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 0.25
"""The pause between two looks doubles from the first to the longest: short runs answer at once."""


class LongPolls:
    """The long polls of one process."""

    def __init__(self, places: threading.Semaphore) -> None:
        self._places = places
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End every wait, now and from now on. May be called from a signal handler."""
        self._stopping.set()

    def wait_for_run(self, database: Database, run_id: UUID, seconds: float) -> bool:
        """Return when the run is over or `seconds` have passed; False if no place was free.

        Raises:
            RunNotFound
        """
        if not self._places.acquire(blocking=False):
            return False
        try:
            self._watch(database, run_id, time.monotonic() + seconds)
        finally:
            self._places.release()
        return True

    def _watch(self, database: Database, run_id: UUID, until: float) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not _is_over(database, run_id) and (left := until - time.monotonic()) > 0:
            if self._stopping.wait(min(pause, left)):
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _is_over(database: Database, run_id: UUID) -> bool:
    with database.autocommit() as tx:
        return queries.is_run_over(tx, run_id)
