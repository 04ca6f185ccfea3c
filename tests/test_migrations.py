"""The schema's history leads to the schema the code knows, with data in it, and back."""

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from stack import Servers

from opscore import migrations
from opscore.models import Base


def test_the_newest_revision_is_the_schema_of_the_models(database_url: str) -> None:
    with migrations.connect(database_url) as connection:
        assert migrations.present(connection) == migrations.NEWEST
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []


def test_a_database_of_the_first_revision_comes_along_with_what_is_in_it(servers: Servers) -> None:
    servers._execute("CREATE DATABASE older")
    url = servers.postgres.url.rsplit("/", 1)[0] + "/older"
    try:
        with migrations.connect(url) as connection, connection.begin():
            command.upgrade(migrations.alembic_config(connection), "0001")
        with migrations.connect(url) as connection, connection.begin():
            fill(connection)
        migrations.upgrade(url)
        with migrations.connect(url) as connection, connection.begin():
            row = connection.execute(text("SELECT * FROM tasks")).one()
            assert (row.line_agent_id, row.queue, row.fallback) == ("writer", "opscore.agents", [])
            agent = connection.execute(text("SELECT * FROM agents")).one()
            assert (agent.closed, agent.state, agent.require_token) == (False, "UNKNOWN", True)
            slots = connection.execute(text("SELECT pool, holder FROM slots ORDER BY pool")).all()
            assert [tuple(slot) for slot in slots] == [("writer", None)]
            # What an older schema has no place for does not keep anybody from going back.
            connection.execute(text("INSERT INTO events (schedule, type) VALUES ('s', 'x')"))
            command.downgrade(migrations.alembic_config(connection), "0001")
        with migrations.connect(url) as connection:
            assert migrations.present(connection) == "0001"
            assert connection.execute(text("SELECT count(*) FROM tasks")).scalar() == 1
    finally:
        servers._execute("DROP DATABASE older WITH (FORCE)")


def fill(connection: object) -> None:
    """Write a run whose task waits for a busy agent, as the first revision kept it."""
    for statement in (
        "INSERT INTO agents (agent_id, kind, name, version, capabilities, capacity)"
        " VALUES ('writer', 'function', 'writer', '1', '{}', 1)",
        "INSERT INTO slots (agent_id, number) VALUES ('writer', 1)",
        "INSERT INTO workflows (workflow_id, version, definition, digest)"
        " VALUES ('w', 1, '{}', 'd')",
        "INSERT INTO runs (id, workflow_id, version, input)"
        " VALUES ('00000000-0000-7000-8000-000000000001', 'w', 1, '{}')",
        "INSERT INTO tasks (id, run_id, definition_id, kind, position, depends_on, successors,"
        " reads, wanted_agent_id, timeout_seconds, max_attempts, retry_backoff,"
        " retry_max_backoff, busy_backoff, busy_max_backoff, max_wait_seconds, goes_on, priority,"
        " status, reason, waiting_since) VALUES ('00000000-0000-7000-8000-000000000002',"
        " '00000000-0000-7000-8000-000000000001', 'a', 'agent', 0, '{}', '{}', '{}', 'writer', 60,"
        " 3, 2, 60, 1, 60, 60, false, 1, 'waiting', 'agent_busy', now())",
    ):
        connection.execute(text(statement))  # type: ignore[attr-defined]
