"""What views need of the process they run in: its database, its dispatcher, its streams."""

from dataclasses import dataclass

from flask import Flask, current_app

from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.metrics import Teller
from web.polls import LongPolls
from web.ready import Readiness
from web.scrapes import Scrapes
from web.streams import Streams

_KEY = "opscore"


@dataclass(frozen=True, slots=True)
class Parts:
    """Made once per process, by `web.app.create_app`."""

    settings: Settings
    database: Database
    dispatcher: Dispatcher
    polls: LongPolls
    streams: Streams
    readiness: Readiness
    teller: Teller
    scrapes: Scrapes

    def stop_waiting(self) -> None:
        """Answer all who wait, now and from now on. May be called from a signal handler."""
        self.polls.stop()
        self.streams.stop()

    def close(self) -> None:
        """End what was started for the process."""
        self.stop_waiting()
        self.streams.close()
        self.teller.stop()
        self.scrapes.close()
        self.readiness.close()
        self.database.close()


def attach(app: Flask, parts: Parts) -> None:
    app.extensions[_KEY] = parts


def parts() -> Parts:
    found: Parts = current_app.extensions[_KEY]
    return found


def database() -> Database:
    return parts().database


def dispatcher() -> Dispatcher:
    return parts().dispatcher
