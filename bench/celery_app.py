"""Bare Celery as it comes: default settings, a Redis broker and result backend, no-op tasks."""

import os
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.backends.redis import RedisBackend

REDIS_URL = "BENCH_REDIS_URL"
READY_FILE = "BENCH_READY_FILE"


class QuietBackend(RedisBackend):
    """For the client: results are polled, since subscribing to each costs more than the work."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing."""

    def add_pending_result(self, result: Any, *_: Any, **__: Any) -> Any:
        """Remember nothing: a group would subscribe to each of its parts."""
        return result


def make_client(redis_url: str) -> Celery:
    """Return an app that publishes the tasks below."""
    backend = f"{__name__}:{QuietBackend.__name__}+{redis_url}"
    return Celery("bench", broker=redis_url, backend=backend, set_as_current=False)


app = Celery("bench", set_as_current=False)
app.add_defaults(
    lambda: {"broker_url": os.environ[REDIS_URL], "result_backend": os.environ[REDIS_URL]}
)


@app.task(name="bench.noop")
def noop() -> None:
    return None


@app.task(name="bench.join")
def join(results: list[None]) -> None:
    return None


@signals.worker_ready.connect
def tell_ready(**_: Any) -> None:
    if ready := os.environ.get(READY_FILE):
        Path(ready).touch()
