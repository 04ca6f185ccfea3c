"""The Celery settings, each with its reason, made from `Settings`.

Used by whatever speaks Celery: web (publishes), workers, beat and Flower. `app` is for the `celery`
command: it reads the environment when it is first configured, not at import.
"""

import os
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend
from kombu import Exchange, Queue

from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, FIRST, IO_QUEUE, Settings

VISIBILITY_TIMEOUT_SECONDS = 12 * 3600
"""Redis gives a message that was not acknowledged out again after this. It is not our recovery
(leases are), only a last broom; the claim makes the double harmless."""
SOCKET_TIMEOUT_SECONDS = 3
"""Longer than any answer of a Redis that is well; a frozen one must not hang a request."""


class ChordBackend(RedisBackend):
    """Counts the parts of chords and does nothing else: nobody reads a result.

    Celery's own subscribes to every task it publishes, which doubles the commands of a wide run.
    """

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing."""

    def add_pending_result(self, result: Any, *_: Any, **__: Any) -> Any:
        """Remember nothing."""
        return result


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Return the configuration of a Celery app."""
    sockets = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_keepalive": True,
    }
    return {
        "broker_url": settings.redis_url,
        # Counts the parts of a chord; no result is stored, outputs live in PostgreSQL.
        "result_backend": f"celeryconfig:ChordBackend+{settings.redis_url}",
        "task_ignore_result": True,
        # A chord may wait for an approval, or for an agent that is busy all day.
        "result_chord_expires": 3 * 86_400,
        # Ids travel, nothing else: no pickle, ever.
        "task_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "enable_utc": True,
        "timezone": "UTC",
        # A message is acknowledged after its work: a killed child gives a quick second visit.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # Outcomes are rows; Celery must not repeat what it takes for a failure.
        "task_acks_on_failure_or_timeout": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # Fair: a worker takes no visit before it has a free child for it.
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": True,  # Flower
        "task_send_sent_event": False,
        # Schedules are rows, which any number of beats may fire.
        "beat_scheduler": "workers.beat:Beat",
        # Survives a restart of Redis under running tasks.
        "worker_consumer": "workers.consumer:Consumer",
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a broker may be away for a night
        "broker_pool_acquire_timeout": 10,
        # A chord's header holds a connection a level while it is published, in every thread.
        "broker_pool_limit": 4 * settings.database_pool,
        "broker_transport_options": {
            "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
            # Who is first is decided by rows; what they put first has a list of its own.
            "priority_steps": [0, FIRST],
            "health_check_interval": 25,
            **sockets,
        },
        "redis_socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "redis_socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
        "result_backend_transport_options": {"retry_policy": {"timeout": 5.0}},
        # Whoever publishes has PostgreSQL behind it: fail fast, the keeper tries again.
        "task_publish_retry": False,
        # A typo in a queue's name must fail, not feed a queue nobody reads.
        "task_create_missing_queues": False,
        "task_queues": [
            Queue(name, Exchange(name), routing_key=name)
            for name in (AGENTS_QUEUE, IO_QUEUE, CONTROL_QUEUE)
        ],
        "task_default_queue": AGENTS_QUEUE,
    }


app = Celery("opscore", include=["workers.tasks"])
app.add_defaults(lambda: celery_settings(Settings.from_env(os.environ)))


def make_app(settings: Settings) -> Celery:
    """Return a Celery app that publishes with these settings, without contacting anything."""
    app = Celery("opscore", set_as_current=False)
    app.conf.update(celery_settings(settings))
    # A request must not wait while kombu tries a refused connection again and again.
    app.conf.broker_transport_options |= {"max_retries": 0}
    return app
