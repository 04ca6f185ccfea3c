"""Rows for tests of what only reads: each as a run in that state would have left it."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import insert, text
from sqlalchemy.dialects.postgresql import insert as upsert

from opscore.db import Tx
from opscore.models import Agent, Attempt, AttemptLog, Event, Run, Slot, Task, Workflow

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
ENDED = ("completed", "failed", "cancelled", "skipped")
FAULT = {"code": "agent_failed", "message": "no"}


WORKER = text(
    """
INSERT INTO workers (id, name, host, pid, pool, concurrency, queues, offer, seen_at)
VALUES (gen_random_uuid(), 'w@h', 'h', 1, 'prefork', 1, '{opscore.agents}', cast(:offer AS jsonb),
        now() + interval '1 day')
"""
).bindparams(offer='{"tools": {}, "scripts": ["echo"], "providers": ["scripted"]}')
"""One that lives for longer than the fuzz, and has a model."""


def add_workflow(tx: Tx, workflow_id: str = "report", version: int = 1, **values: Any) -> None:
    row = {
        "workflow_id": workflow_id,
        "version": version,
        "definition": {"id": workflow_id, "tasks": [{"taskId": "a", "agentId": "writer"}]},
        "digest": f"{workflow_id} {version}",
        **values,
    }
    tx.execute(upsert(Workflow).values(row).on_conflict_do_nothing())


def add_run(tx: Tx, status: str = "queued", **values: Any) -> UUID:
    row: dict[str, Any] = {
        "id": uuid4(),
        "workflow_id": "report",
        "version": 1,
        "status": status,
        "input": {},
        "started_at": None if status == "queued" else NOW,
        "finished_at": NOW if status in ENDED else None,
        "error": FAULT if status == "failed" else None,
        "cancel_requested_at": NOW if status == "cancelled" else None,
        **values,
    }
    add_workflow(tx, row["workflow_id"], row["version"])
    tx.execute(insert(Run).values(row))
    return UUID(str(row["id"]))


def task_row(run_id: UUID, definition_id: str, status: str = "pending", **values: Any) -> Any:
    return {
        "id": uuid4(),
        "run_id": run_id,
        "definition_id": definition_id,
        "kind": "agent",
        "position": 0,
        "parent_id": None,
        "index": None,
        "depends_on": [],
        "successors": [],
        "reads": [],
        "wanted_agent_id": "writer",
        "timeout_seconds": 60.0,
        "max_attempts": 3,
        "retry_backoff": 2.0,
        "retry_max_backoff": 60.0,
        "busy_backoff": 1.0,
        "busy_max_backoff": 60.0,
        "max_wait_seconds": 60.0,
        "goes_on": False,
        "priority": 1,
        "status": status,
        "error": FAULT if status == "failed" else None,
        "started_at": NOW if status in ("running", "completed") else None,
        "finished_at": NOW if status in ENDED else None,
        "lease_expires_at": NOW + timedelta(hours=1) if status == "running" else None,
        **values,
    }


def add_task(
    tx: Tx, run_id: UUID, definition_id: str, status: str = "pending", **more: Any
) -> UUID:
    row = task_row(run_id, definition_id, status, **more)
    tx.execute(insert(Task).values(row))
    return UUID(str(row["id"]))


def add_items(tx: Tx, run_id: UUID, parent: UUID, statuses: list[str], **more: Any) -> None:
    rows = [
        task_row(run_id, "each", status, parent_id=parent, index=index, position=1, **more)
        for index, status in enumerate(statuses)
    ]
    tx.execute(insert(Task), rows)


def add_attempt(tx: Tx, task_id: UUID, number: int, status: str = "running", **more: Any) -> None:
    row = {
        "task_id": task_id,
        "number": number,
        "worker": "w@host",
        "status": status,
        "finished_at": None if status == "running" else NOW,
        **more,
    }
    tx.execute(insert(Attempt).values(row))


def add_log(tx: Tx, task_id: UUID, attempt: int, line: int, message: str, **fields: Any) -> None:
    tx.execute(
        insert(AttemptLog).values(
            task_id=task_id, attempt=attempt, line=line, at=NOW, message=message, fields=fields
        )
    )


def add_event(tx: Tx, run_id: UUID, type: str, task_id: UUID | None = None, **data: Any) -> None:
    tx.execute(insert(Event).values(run_id=run_id, task_id=task_id, type=type, data=data))


def add_agent(
    tx: Tx, agent_id: str, *capabilities: str, capacity: int | None = None, **values: Any
) -> None:
    row = {
        "agent_id": agent_id,
        "kind": "function",
        "name": agent_id.title(),
        "version": "1",
        "capabilities": list(capabilities),
        "capacity": capacity,
        **values,
    }
    tx.execute(insert(Agent).values(row))
    for number in range(1, (capacity or 0) + 1):
        tx.execute(insert(Slot).values(pool=agent_id, number=number))


def add_waiting(
    tx: Tx,
    run_id: UUID,
    count: int = 1,
    *,
    agent_id: str | None = None,
    capability: str | None = None,
    since: datetime = NOW,
    **more: Any,
) -> list[UUID]:
    """Add tasks that wait for an agent, or any with a capability, each a second after the last."""
    line = {"wanted_agent_id": agent_id, "line_agent_id": agent_id, "wanted_capability": capability}
    values = {"reason": "agent_busy", **line, **more}
    rows = [
        task_row(run_id, f"w{n}", "waiting", waiting_since=since + timedelta(seconds=n), **values)
        for n in range(count)
    ]
    tx.execute(insert(Task), rows)
    return [row["id"] for row in rows]
