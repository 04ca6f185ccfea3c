"""What Alembic runs: always online, on the connection that `opscore.migrations` hands it."""

from alembic import context

from opscore.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
