"""Agents of the fault injection, and the log of what they did.

`chaos_calls` is the plain log: a row for every call, held against nothing. `chaos_effects` is what
an agent does that checks its idempotency key. Both lie beside opscore's own tables and are written
over a connection opscore knows nothing of.
"""

import os
import signal
import threading
import time
from typing import Any
from uuid import uuid4

import psycopg2
from psycopg2.extensions import connection as Connection

from opscore import Context, agent

TABLES = """
CREATE TABLE chaos_calls (
    call uuid PRIMARY KEY,
    run_id uuid NOT NULL,
    task_id uuid NOT NULL,
    attempt int NOT NULL,
    label text NOT NULL,
    pid int NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);
CREATE INDEX ON chaos_calls (pid) WHERE finished_at IS NULL;
CREATE TABLE chaos_effects (
    key text PRIMARY KEY,
    run_id uuid NOT NULL,
    label text NOT NULL,
    attempt int NOT NULL
);
CREATE TABLE chaos_gate (opened_at timestamptz NOT NULL DEFAULT clock_timestamp());
"""
_BEGIN = """
INSERT INTO chaos_calls (call, run_id, task_id, attempt, label, pid)
VALUES (%(call)s, %(run_id)s, %(task_id)s, %(attempt)s, %(label)s, %(pid)s) ON CONFLICT DO NOTHING
"""
_EFFECT = """
INSERT INTO chaos_effects (key, run_id, label, attempt)
VALUES (%(key)s, %(run_id)s, %(label)s, %(attempt)s) ON CONFLICT DO NOTHING
"""
_END = "UPDATE chaos_calls SET finished_at = clock_timestamp() WHERE call = %(call)s"
PATIENCE_SECONDS = 60.0
"""The log is in the PostgreSQL the faults restart: an agent waits for it rather than fail."""

_connections: dict[int, Connection] = {}


def _write(statement: str, row: dict[str, Any]) -> None:
    """Run a statement that may be repeated, until the log has answered."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with _connection().cursor() as cursor:
                cursor.execute(statement, row)
            return
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            _connections.pop(os.getpid(), None)
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _connection() -> Connection:
    """Return this process's own connection; one made before a fork is its parent's."""
    pid = os.getpid()
    if pid not in _connections:
        _connections[pid] = psycopg2.connect(os.environ["DATABASE_URL"], connect_timeout=3)
        _connections[pid].autocommit = True
    return _connections[pid]


def _work(parameters: dict[str, Any], context: Context) -> str:
    """Note the call, have the effect half way through the time it takes, and answer the label."""
    label = str(parameters["label"])
    row = {
        "call": str(uuid4()),
        "run_id": context.run_id,
        "task_id": context.task_id,
        "key": context.idempotency_key,
        "attempt": context.attempt,
        "label": label,
        "pid": os.getpid(),
    }
    _write(_BEGIN, row)
    if parameters.get("kills"):
        os.kill(os.getpid(), signal.SIGKILL)
    half = float(parameters.get("ms", 0)) / 2000
    threading.Event().wait(half)
    _write(_EFFECT, row)
    threading.Event().wait(half)
    _write(_END, row)
    return label


@agent("chaos-work")
def work(parameters: dict[str, Any], context: Context) -> str:
    return _work(parameters, context)


@agent("chaos-gated")
def gated(parameters: dict[str, Any], context: Context) -> str:
    """Do the same, but take a second for it as long as the gate is closed."""
    with _connection().cursor() as cursor:
        cursor.execute("SELECT count(*) FROM chaos_gate")
        is_open = bool((cursor.fetchone() or (0,))[0])
    return _work(parameters | {"ms": 0 if is_open else 1000}, context)


@agent("chaos-narrow", capacity=2)
def narrow(parameters: dict[str, Any], context: Context) -> str:
    """Do the same, but never more than two at once."""
    return _work(parameters, context)
