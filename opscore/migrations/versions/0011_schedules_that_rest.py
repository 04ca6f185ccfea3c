"""Schedules that are left alone after trouble, also those of which only a firing waits."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("schedules", sa.Column("rests_until", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("schedules", "rests_until")
