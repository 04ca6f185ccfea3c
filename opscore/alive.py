"""Whether a process of this machine lives, told without asking any server.

What restarts processes must not take a Redis or a PostgreSQL that is away for their death: workers
and beat touch a file as long as their loops turn, and web and Flower answer a request that touches
nothing.
"""

import http.client
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

DEAD_SECONDS = 120.0
"""Whoever gave no sign for so long is dead: a frozen PostgreSQL holds a loop up for less."""
ANSWER_SECONDS = 5.0
"""An answer that takes longer is none."""


def give_sign(path: str | None) -> None:
    """Touch the file, if there is to be one; whoever cannot goes on, and looks dead."""
    if path:
        with suppress(OSError):
            Path(path).touch()


def age_of_sign(path: str) -> float | None:
    """Return how many seconds ago the last sign was given; None if there was none yet."""
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return None


def answers(url: str) -> bool:
    """Tell whether a server of this machine answers 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port, timeout=ANSWER_SECONDS
    )
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
