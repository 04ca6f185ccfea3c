"""Finding the events of schedules that are old."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_index(
        "ix_events_schedule_at",
        "events",
        ["at"],
        postgresql_where=sa.text("schedule IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_events_schedule_at", table_name="events")
