"""Branches, approvals, delays, sub-workflows; runs that are paused, due, bounded, tried again."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

MOMENT = sa.DateTime(timezone=True)
JSON = postgresql.JSONB(astext_type=sa.Text())
OPEN = "NOT status IN ('cancelled', 'completed', 'failed')"
INDEXES = {
    "ix_runs_start": ("start_at", "status = 'queued' AND reason = 'start_at'"),
    "ix_runs_deadline": ("deadline_at", f"deadline_at IS NOT NULL AND {OPEN}"),
    "ix_runs_parent_task_id": ("parent_task_id", "parent_task_id IS NOT NULL"),
}


def upgrade() -> None:
    for name in ("parent_task_id", "rerun_of"):
        op.add_column("runs", sa.Column(name, sa.Uuid()))
    op.add_column("runs", sa.Column("depth", sa.Integer(), server_default="0", nullable=False))
    for name in ("start_at", "deadline_at"):
        op.add_column("runs", sa.Column(name, MOMENT))
    for name, (column, condition) in INDEXES.items():
        op.create_index(name, "runs", [column], postgresql_where=sa.text(condition))
    op.add_column("tasks", sa.Column("item_kind", sa.Text()))
    op.add_column("tasks", sa.Column("tolerates", sa.Integer()))
    op.add_column(
        "tasks",
        sa.Column("undecided", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    for name in ("decision", "overrides"):
        op.add_column("tasks", sa.Column(name, JSON))
    op.add_column("tasks", sa.Column("child_run_id", sa.Uuid()))
    op.add_column("attempts", sa.Column("recall_at", MOMENT))
    op.create_index(
        "ix_attempts_recalls",
        "attempts",
        ["recall_at"],
        postgresql_where=sa.text("recall_at IS NOT NULL"),
    )
    op.execute("UPDATE tasks SET item_kind = 'agent' WHERE kind = 'for_each'")


def downgrade() -> None:
    op.drop_index("ix_attempts_recalls", table_name="attempts")
    op.drop_column("attempts", "recall_at")
    for name in (
        *("child_run_id", "overrides", "decision", "undecided", "tolerates", "item_kind"),
    ):
        op.drop_column("tasks", name)
    for name in INDEXES:
        op.drop_index(name, table_name="runs")
    for name in ("deadline_at", "start_at", "depth", "rerun_of", "parent_task_id"):
        op.drop_column("runs", name)
