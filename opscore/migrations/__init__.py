"""The schema's history, applied by Alembic; `opscore db upgrade` is `upgrade`.

Every process checks at start that the schema is the one it knows, and refuses to run on another.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, create_engine, inspect, pool, text
from sqlalchemy.exc import DBAPIError

from opscore.db import CONNECT_TIMEOUT_SECONDS, driver_url
from opscore.errors import ConfigurationError

if TYPE_CHECKING:
    from alembic.config import Config

NEWEST = "0011"
"""The revision this code knows; said here so that a start need not load Alembic to find it."""


def alembic_config(connection: Connection) -> "Config":
    """Return what Alembic's commands want, bound to an open connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config


def connect(database_url: str) -> Connection:
    """Open a connection of its own, outside any pool."""
    engine = create_engine(
        driver_url(database_url),
        poolclass=pool.NullPool,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS},
    )
    return engine.connect()


def upgrade(database_url: str) -> None:
    """Bring the schema to the newest revision; two at once do it one after the other.

    Raises:
        ConfigurationError: the database does not answer.
    """
    from alembic import command

    with _reached(database_url) as connection, connection.begin():
        command.upgrade(alembic_config(connection), "head")


def _reached(database_url: str) -> Connection:
    try:
        return connect(database_url)
    except DBAPIError as error:
        sentence = str(error.orig).strip().splitlines()[0]
        fault = f"DATABASE_URL: PostgreSQL does not answer: {sentence}"
        raise ConfigurationError([fault]) from error


def present(connection: Connection) -> str | None:
    """Return the revision of a database; None before its first upgrade."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def check(database_url: str) -> None:
    """Make sure that the database answers and has the newest schema.

    Raises:
        ConfigurationError: it does not, with the command that helps.
    """
    with _reached(database_url) as connection:
        revision = present(connection)
    if revision != NEWEST:
        raise ConfigurationError(
            [
                f"The database is at revision {revision or 'none'}, this version needs {NEWEST}: "
                "run `opscore db upgrade`"
            ]
        )
