"""Agents that run inside a worker.

`function` declares them, `context` is what they are handed, `calling` runs one and types its
outcome. Nothing in here knows of a database, a broker or a run's fate: what an outcome means is the
engine's.
"""

from opscore.agentkit.calling import Busy, Completed, Failed, Outcome, call, timed_out
from opscore.agentkit.context import Context, LogEntry, Progress
from opscore.agentkit.function import FunctionAgent, Registry, agent, declared, load_agents

__all__ = [
    "Busy",
    "Completed",
    "Context",
    "Failed",
    "FunctionAgent",
    "LogEntry",
    "Outcome",
    "Progress",
    "Registry",
    "agent",
    "call",
    "declared",
    "load_agents",
    "timed_out",
]
