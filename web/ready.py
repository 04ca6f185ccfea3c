"""Whether the parts this process needs answer: PostgreSQL, the broker, a worker; and how long the
queues are.

Each is asked in a thread of its own and given up on after a second, since a frozen server keeps its
caller for as long as it likes; while one question hangs, no second one is asked.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from opscore import logs, migrations, queries
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Depth, Dispatcher

log = logs.get("opscore.web")

TIMEOUT_SECONDS = 1.0
"""How long one part may take to answer."""

Answer = Mapping[str, str]
"""Part -> `ok`, or what is the matter with it."""

Queues = tuple[Mapping[str, Depth] | None, bool]
"""How long each is, None if the broker does not answer; and whether it has no room for more."""

T = TypeVar("T")


class Probe(Generic[T]):
    """One question to one server; `silent` is said in its stead, of the parts named."""

    def __init__(self, ask: Callable[[], T], silent: T, *parts: str) -> None:
        self._ask, self._silent, self._parts = ask, silent, parts
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None
        self._answer = silent

    def start(self) -> threading.Thread:
        """Ask, unless the last question is still unanswered."""
        with self._lock:
            if self._running is None or not self._running.is_alive():
                self._running = threading.Thread(target=self._run, daemon=True, name="probe")
                self._running.start()
            return self._running

    def answer(self, running: threading.Thread, seconds: float = TIMEOUT_SECONDS) -> T:
        """Wait for the answer for at most so long."""
        running.join(seconds)
        return self._silent if running.is_alive() else self._answer

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except Exception as error:
            # Whatever it is: a part that cannot be asked is not ready.
            log.warning("part_down", parts=self._parts, error=type(error).__name__)
            self._answer = self._silent


class Readiness:
    """All questions of one process.

    The one to the database has a connection of its own: a pool in which every connection is busy is
    no reason to call PostgreSQL away.
    """

    def __init__(self, settings: Settings, dispatcher: Dispatcher) -> None:
        self._database = Database(settings.database_url, pool_size=1, application="opscore-ready")
        self._probes: tuple[Probe[Answer], ...] = (
            Probe(
                lambda: _ask_database(self._database),
                {"database": "down", "workers": "unknown"},
                *("database", "workers"),
            ),
            Probe(lambda: _ask_broker(dispatcher), {"broker": "down"}, "broker"),
        )
        self._queues: Probe[Queues] = Probe(
            lambda: (dispatcher.depths(), dispatcher.is_full()), (None, False), "queues"
        )

    def check(self) -> dict[str, str]:
        """Ask all parts at once; return every part's answer."""
        asked = [(probe, probe.start()) for probe in self._probes]
        return {part: said for probe, run in asked for part, said in probe.answer(run).items()}

    def queues(self) -> Queues:
        """Ask the broker how long each queue is."""
        return self._queues.answer(self._queues.start())

    def close(self) -> None:
        self._database.close()


def _ask_database(database: Database) -> Answer:
    with database.autocommit() as tx:
        # A newer one is no trouble: this process serves until it is replaced, too.
        if migrations.is_behind(migrations.present(tx)):
            return {"database": "behind", "workers": "unknown"}
        return {"database": "ok", "workers": "ok" if queries.has_workers(tx) else "none"}


def _ask_broker(dispatcher: Dispatcher) -> Answer:
    dispatcher.ping()
    return {"broker": "ok"}
