"""Slots for the items of a `forEach` and the runs of a workflow, as for an agent's attempts."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

HELD = "status = 'waiting' AND reason = 'max_parallel'"
UNDER_WAY = "max_concurrent IS NOT NULL AND reason IS NULL AND status IN ('queued', 'running')"
ITEMS = f"""
INSERT INTO slots (pool, number, holder)
SELECT 'items:' || p.id, place, i.id
FROM tasks p CROSS JOIN generate_series(1, p.max_parallel) AS place
LEFT JOIN (SELECT id, parent_id, row_number() OVER (PARTITION BY parent_id) AS n FROM tasks
           WHERE parent_id IS NOT NULL AND status IN ('pending', 'running', 'waiting')
             AND NOT ({HELD})) AS i ON i.parent_id = p.id AND i.n = place
WHERE p.kind = 'for_each' AND p.status = 'waiting' AND p.reason = 'children'
"""
RUNS = f"""
INSERT INTO slots (pool, number, closed, holder)
SELECT 'runs:' || w.workflow_id, place, place > w.most, r.id
FROM (SELECT DISTINCT ON (workflow_id) workflow_id,
             coalesce(cast(definition ->> 'maxConcurrentRuns' AS int), 0) AS most
      FROM workflows ORDER BY workflow_id, inline, version DESC) AS w
CROSS JOIN LATERAL (SELECT count(*) AS under_way FROM runs
                    WHERE workflow_id = w.workflow_id AND {UNDER_WAY}) AS now
CROSS JOIN LATERAL generate_series(1, greatest(w.most, now.under_way)) AS place
LEFT JOIN (SELECT id, workflow_id, row_number() OVER (PARTITION BY workflow_id) AS n FROM runs
           WHERE {UNDER_WAY}) AS r ON r.workflow_id = w.workflow_id AND r.n = place
"""


def upgrade() -> None:
    op.drop_constraint(op.f("fk_slots_agent_id"), "slots", type_="foreignkey")
    op.alter_column("slots", "agent_id", new_column_name="pool")
    op.add_column(
        "slots", sa.Column("closed", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.execute(
        "UPDATE slots s SET closed = true FROM agents a"
        " WHERE a.agent_id = s.pool AND s.number > coalesce(a.capacity, 0)"
    )
    op.create_index("ix_slots_closed", "slots", ["pool"], postgresql_where=sa.text("closed"))
    op.create_index(
        "ix_tasks_items_next", "tasks", ["parent_id", "index"], postgresql_where=sa.text(HELD)
    )
    op.drop_index("ix_runs_under_way", table_name="runs")
    op.execute(ITEMS)
    op.execute(RUNS)


def downgrade() -> None:
    op.execute("DELETE FROM slots WHERE pool LIKE 'items:%' OR pool LIKE 'runs:%'")
    op.create_index(
        "ix_runs_under_way", "runs", ["workflow_id"], postgresql_where=sa.text(UNDER_WAY)
    )
    op.drop_index("ix_tasks_items_next", table_name="tasks")
    op.drop_index("ix_slots_closed", table_name="slots")
    op.drop_column("slots", "closed")
    op.alter_column("slots", "pool", new_column_name="agent_id")
    op.create_foreign_key(
        op.f("fk_slots_agent_id"), "slots", "agents", ["agent_id"], ["agent_id"], ondelete="CASCADE"
    )
