"""Celery's consumer, made to survive the loss of its broker.

With late acknowledgement, Celery 5.7.0 exits when Redis goes away under a running task: closing
the dead connection's channels tries to give the unacknowledged messages back to a broker that is
gone, and only errors of broker libraries are swallowed there. Nothing needs giving back: the claim
decides.
"""

from typing import Any

import structlog
from celery.worker.consumer import Consumer as CeleryConsumer

log = structlog.get_logger()


class Consumer(CeleryConsumer):
    """Named in `celeryconfig` as `worker_consumer`."""

    def on_connection_error_after_connected(self, exc: Exception) -> Any:
        """Close the dead connection's channels ourselves, whatever they raise, then go on."""
        transport = getattr(self.connection, "_connection", None)
        for channel in list(getattr(transport, "channels", None) or ()):
            try:
                channel.close()
            except Exception as error:
                log.warning("broker.channel_lost", error=repr(error)[:300])
        return super().on_connection_error_after_connected(exc)
