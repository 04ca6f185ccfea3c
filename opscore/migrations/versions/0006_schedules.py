"""Schedules and their firings."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

MOMENT = sa.DateTime(timezone=True)
JSON = postgresql.JSONB(astext_type=sa.Text())
NOW = sa.text("now()")
OPEN = "schedule IS NOT NULL AND NOT status IN ('cancelled', 'completed', 'failed')"


def upgrade() -> None:
    op.create_table(
        "schedules",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("name", "workflow_id")),
        sa.Column("version", sa.Integer()),
        sa.Column("agent_id", sa.Text()),
        sa.Column("cron", sa.Text()),
        sa.Column("every_seconds", sa.Float()),
        sa.Column("timezone", sa.Text(), nullable=False),
        sa.Column("input", JSON, nullable=False),
        sa.Column("labels", JSON, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("priority", sa.Integer(), server_default="1", nullable=False),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("start_at", MOMENT),
        sa.Column("end_at", MOMENT),
        sa.Column("jitter_seconds", sa.Float(), server_default="0", nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("catch_up", sa.Text(), nullable=False),
        sa.Column("catch_up_window_seconds", sa.Float(), nullable=False),
        sa.Column("decided_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("next_at", MOMENT),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("updated_at", MOMENT, server_default=NOW, nullable=False),
        sa.CheckConstraint(
            "(cron IS NULL) <> (every_seconds IS NULL)", name=op.f("ck_schedules_recurrence")
        ),
        sa.CheckConstraint(
            "overlap IN ('allow', 'cancel_previous', 'queue', 'skip')",
            name=op.f("ck_schedules_overlap"),
        ),
        sa.CheckConstraint(
            "catch_up IN ('all', 'last', 'none')", name=op.f("ck_schedules_catch_up")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_schedules")),
    )
    op.create_index(op.f("ix_schedules_created_at_name"), "schedules", ["created_at", "name"])
    op.create_index(
        "ix_schedules_due", "schedules", ["next_at"], postgresql_where=sa.text("enabled")
    )
    op.create_table(
        "firings",
        sa.Column("schedule", sa.Text(), nullable=False),
        sa.Column("moment", MOMENT, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("error", JSON),
        sa.Column("run_id", sa.Uuid()),
        sa.Column("decided_at", MOMENT, server_default=NOW, nullable=False),
        sa.CheckConstraint(
            "status IN ('failed', 'skipped', 'started', 'waiting')", name=op.f("ck_firings_status")
        ),
        sa.ForeignKeyConstraint(
            ["schedule"], ["schedules.name"], name=op.f("fk_firings_schedule"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("schedule", "moment", name=op.f("pk_firings")),
    )
    op.create_index(
        "ix_firings_waiting",
        "firings",
        ["schedule", "moment"],
        postgresql_where=sa.text("status = 'waiting'"),
    )
    op.add_column("runs", sa.Column("schedule", sa.Text()))
    op.create_index("ix_runs_schedule", "runs", ["schedule"], postgresql_where=sa.text(OPEN))


def downgrade() -> None:
    op.drop_index("ix_runs_schedule", table_name="runs")
    op.drop_column("runs", "schedule")
    op.drop_table("firings")
    op.drop_table("schedules")
