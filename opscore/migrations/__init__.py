"""The schema's history, applied by Alembic; `opscore db upgrade` is `upgrade`.

Every process checks at start that the schema is the one it knows, and refuses to run on another.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, pool
from sqlalchemy.exc import DBAPIError

from opscore.db import CONNECT_TIMEOUT_SECONDS, driver_url
from opscore.errors import ConfigurationError


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def _connect(database_url: str) -> Connection:
    engine = create_engine(
        driver_url(database_url),
        poolclass=pool.NullPool,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS},
    )
    return engine.connect()


def upgrade(database_url: str) -> None:
    """Bring the schema to the newest revision; two at once do it one after the other."""
    with _connect(database_url) as connection, connection.begin():
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def newest() -> str | None:
    """Return the revision this code knows."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def present(connection: Connection) -> str | None:
    """Return the revision of a database; None before its first upgrade."""
    return MigrationContext.configure(connection).get_current_revision()


def check(database_url: str) -> None:
    """Make sure that the database answers and has the newest schema.

    Raises:
        ConfigurationError: it does not, with the command that helps.
    """
    try:
        with _connect(database_url) as connection:
            revision = present(connection)
    except DBAPIError as error:
        text = str(error.orig).strip().splitlines()[0]
        raise ConfigurationError([f"DATABASE_URL: PostgreSQL does not answer: {text}"]) from error
    if revision != newest():
        raise ConfigurationError(
            [
                f"The database is at revision {revision or 'none'}, this version needs {newest()}: "
                "run `opscore db upgrade`"
            ]
        )
