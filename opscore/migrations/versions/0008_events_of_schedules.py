"""Events that are about a schedule instead of a run."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.alter_column("events", "run_id", nullable=True)
    op.add_column("events", sa.Column("schedule", sa.Text()))
    op.create_index(
        "ix_events_schedule",
        "events",
        ["schedule", "seq"],
        postgresql_where=sa.text("schedule IS NOT NULL"),
    )


def downgrade() -> None:
    op.execute("DELETE FROM events WHERE schedule IS NOT NULL")
    op.drop_index("ix_events_schedule", table_name="events")
    op.drop_column("events", "schedule")
    op.alter_column("events", "run_id", nullable=False)
