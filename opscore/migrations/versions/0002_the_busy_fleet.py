"""Agents behind HTTP, what agents report, and lines of more than one kind."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

WAS = "status = 'waiting' AND reason = 'agent_busy'"
IN_LINE = "status = 'waiting' AND reason IN ('agent_busy', 'agent_unavailable')"
HELD_WAS = "status = 'waiting' AND reason <> 'agent_busy'"
HELD = "status = 'waiting' AND reason NOT IN ('agent_busy', 'agent_unavailable')"
UNDER_WAY = "max_concurrent IS NOT NULL AND reason IS NULL AND status IN ('queued', 'running')"
HELD_RUNS = "status = 'queued' AND reason = 'max_concurrent_runs'"
STATES = "state IN ('UNKNOWN', 'active', 'error', 'finished', 'idle', 'initializing')"
REMOTE = "kind <> 'remote' OR contact_endpoint IS NOT NULL AND capacity IS NOT NULL"
CLOSED = "paused OR draining OR deregistered_at IS NOT NULL"
MOMENT = sa.DateTime(timezone=True)
JSON = postgresql.JSONB(astext_type=sa.Text())


def upgrade() -> None:
    for name in ("paused", "draining", "state_lapses"):
        op.add_column("agents", _flag(name, "false"))
    op.add_column("agents", _flag("require_token", "true"))
    for name in ("deregistered_at", "state_at", "busy_until", "notified_at"):
        op.add_column("agents", sa.Column(name, MOMENT))
    op.add_column(
        "agents", sa.Column("seen_at", MOMENT, server_default=sa.text("now()"), nullable=False)
    )
    op.add_column("agents", sa.Column("contact_endpoint", sa.Text()))
    op.add_column("agents", sa.Column("details", JSON))
    op.add_column("agents", sa.Column("heartbeat_seconds", sa.Float()))
    op.add_column("agents", sa.Column("state", sa.Text(), server_default="UNKNOWN", nullable=False))
    op.add_column(
        "agents",
        sa.Column("closed", sa.Boolean(), sa.Computed(CLOSED, persisted=True), nullable=False),
    )
    op.drop_constraint(op.f("ck_agents_kind"), "agents", type_="check")
    op.create_check_constraint(op.f("ck_agents_kind"), "agents", "kind IN ('function', 'remote')")
    op.create_check_constraint(op.f("ck_agents_heartbeat"), "agents", "heartbeat_seconds > 0")
    op.create_check_constraint(op.f("ck_agents_state"), "agents", STATES)
    op.create_check_constraint(op.f("ck_agents_remote"), "agents", REMOTE)
    op.create_table(
        "agent_reports",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("details", JSON, nullable=True),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("received_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["agent_id"],
            ["agents.agent_id"],
            name=op.f("fk_agent_reports_agent_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agent_reports")),
    )
    op.create_index(
        op.f("ix_agent_reports_agent_id_at_id"), "agent_reports", ["agent_id", "at", "id"]
    )
    op.add_column("slots", sa.Column("held_at", MOMENT))
    for name in ("freed_at", "rests_until"):
        op.add_column("slots", sa.Column(name, MOMENT))
    op.add_column(
        "slots", sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False)
    )
    op.add_column("slots", sa.Column("average_seconds", sa.Float()))
    op.add_column("attempts", sa.Column("token", sa.Uuid()))
    op.add_column("attempts", sa.Column("report", sa.Text()))
    op.add_column("runs", sa.Column("max_concurrent", sa.Integer()))
    op.create_index(
        "ix_runs_under_way", "runs", ["workflow_id"], postgresql_where=sa.text(UNDER_WAY)
    )
    op.create_index(
        "ix_runs_held",
        "runs",
        ["workflow_id", sa.text("priority DESC"), "created_at", "id"],
        postgresql_where=sa.text(HELD_RUNS),
    )
    op.add_column(
        "tasks",
        sa.Column("fallback", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
    op.add_column("tasks", sa.Column("line_agent_id", sa.Text()))
    op.add_column(
        "tasks", sa.Column("queue", sa.Text(), server_default="opscore.agents", nullable=False)
    )
    op.execute("UPDATE tasks SET line_agent_id = wanted_agent_id WHERE status = 'waiting'")
    op.execute("UPDATE tasks SET queue = 'opscore.control' WHERE kind = 'end'")
    _index_tasks("line_agent_id", IN_LINE, HELD, "lease_expires_at IS NOT NULL")


def downgrade() -> None:
    _index_tasks("wanted_agent_id", WAS, HELD_WAS, "status = 'running'")
    for name in ("queue", "line_agent_id", "fallback"):
        op.drop_column("tasks", name)
    op.drop_index("ix_runs_held", table_name="runs")
    op.drop_index("ix_runs_under_way", table_name="runs")
    op.drop_column("runs", "max_concurrent")
    for name in ("report", "token"):
        op.drop_column("attempts", name)
    for name in ("average_seconds", "failures", "rests_until", "freed_at", "held_at"):
        op.drop_column("slots", name)
    op.drop_table("agent_reports")
    op.execute("DELETE FROM agents WHERE kind = 'remote'")
    for name in ("remote", "state", "heartbeat", "kind"):
        op.drop_constraint(op.f(f"ck_agents_{name}"), "agents", type_="check")
    op.create_check_constraint(op.f("ck_agents_kind"), "agents", "kind IN ('function')")
    for name in (
        *("closed", "state", "heartbeat_seconds", "details", "contact_endpoint", "seen_at"),
        *("busy_until", "state_at", "deregistered_at", "notified_at"),
        *("require_token", "state_lapses", "draining", "paused"),
    ):
        op.drop_column("agents", name)


def _flag(name: str, default: str) -> "sa.Column[bool]":
    return sa.Column(name, sa.Boolean(), server_default=sa.text(default), nullable=False)


def _index_tasks(line: str, in_line: str, held: str, leased: str) -> None:
    """Make those indexes of tasks anew whose condition is another one."""
    for name in ("line_capability", "line_agent", "leases", "held"):
        op.drop_index(f"ix_tasks_{name}", table_name="tasks")
    op.create_index("ix_tasks_held", "tasks", ["reason"], postgresql_where=sa.text(held))
    op.create_index(
        "ix_tasks_leases", "tasks", ["lease_expires_at"], postgresql_where=sa.text(leased)
    )
    first = sa.text("priority DESC")
    op.create_index(
        "ix_tasks_line_agent",
        "tasks",
        [line, first, "waiting_since"],
        postgresql_where=sa.text(in_line),
    )
    op.create_index(
        "ix_tasks_line_capability",
        "tasks",
        ["wanted_capability", first, "waiting_since"],
        postgresql_where=sa.text(f"{in_line} AND {line} IS NULL"),
    )
