"""opscore runs workflows of agent tasks over Celery, with PostgreSQL holding what is true.

What an author of agents needs is here; everything else is imported from its own module. Importing
this package loads neither Flask, Celery nor SQLAlchemy.
"""

from opscore.agentkit import Context, agent
from opscore.errors import AgentBusy, GiveUp, RetryLater

__all__ = ["AgentBusy", "Context", "GiveUp", "RetryLater", "agent"]
