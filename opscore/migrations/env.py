"""What Alembic runs: always online, on the connection that `opscore.migrations` hands it."""

from alembic import context
from sqlalchemy import text

from opscore.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata)
with context.begin_transaction():
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('opscore:migrate', 0))"))
    context.run_migrations()
