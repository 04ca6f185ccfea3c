"""LLM agents: each step of their work, and what a run may spend on them."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

JSON = postgresql.JSONB(none_as_null=True)
ZERO = sa.text("0")


def upgrade() -> None:
    op.drop_constraint(op.f("ck_agents_kind"), "agents")
    op.create_check_constraint(
        op.f("ck_agents_kind"), "agents", "kind IN ('function', 'llm', 'remote')"
    )
    op.add_column("runs", sa.Column("budget", JSON))
    op.create_table(
        "agent_steps",
        sa.Column("task_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("input_tokens", sa.BigInteger(), server_default=ZERO, nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default=ZERO, nullable=False),
        sa.Column("cost_usd", sa.Float()),
        sa.Column("superseded", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_agent_steps_task_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("task_id", "number", name=op.f("pk_agent_steps")),
    )
    op.create_index(
        "ix_agent_steps_replies",
        "agent_steps",
        ["run_id"],
        postgresql_where=sa.text("kind = 'reply'"),
    )


def downgrade() -> None:
    op.drop_table("agent_steps")
    op.drop_column("runs", "budget")
    op.drop_constraint(op.f("ck_agents_kind"), "agents")
    op.execute("UPDATE agents SET kind = 'function' WHERE kind = 'llm'")
    op.create_check_constraint(op.f("ck_agents_kind"), "agents", "kind IN ('function', 'remote')")
