"""The schema's history, applied by Alembic; `opscore db upgrade` is `upgrade`.

Every process checks at start that the schema is the one it knows, and refuses to run on another.
One that runs already goes on while a newer version changes the schema: a revision may therefore
only do what the version before it can live with (docs/deploy.md has the rule for authors).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from psycopg2.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import Connection, create_engine, inspect, pool, text
from sqlalchemy.exc import DBAPIError

from opscore.config import installed_version
from opscore.db import CONNECT_TIMEOUT_SECONDS, driver_url
from opscore.errors import ConfigurationError, UpgradeFailed, WrongRevision

if TYPE_CHECKING:
    from alembic.config import Config

NEWEST = "0016"
"""The revision this code knows; said here so that a start need not load Alembic to find it."""
LOCK_TIMEOUT_SECONDS = 5
"""How long an upgrade waits for a table: as long as it waits, everybody else waits behind it."""

_TURN = text("SELECT pg_advisory_xact_lock(hashtextextended('opscore:migrate', 0))")
_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :timeout, true)")
_MADE_BY = text("SELECT obj_description(to_regclass('alembic_version'), 'pg_class')")


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
    """Bring the schema to the newest revision, all of it or nothing; two at once take turns.

    Raises:
        ConfigurationError: the database does not answer.
        WrongRevision: a newer version upgraded it.
        UpgradeFailed: a table was in use for too long, or something else was refused.
    """
    from alembic import command

    with _reached(database_url) as connection, _told(), connection.begin():
        connection.execute(_TURN)
        connection.execute(_LOCK_TIMEOUT, {"timeout": f"{LOCK_TIMEOUT_SECONDS}s"})
        revision = present(connection)
        _refuse_newer(connection, revision)
        if revision == NEWEST:
            return
        command.upgrade(alembic_config(connection), "head")
        _sign(connection)


def _reached(database_url: str) -> Connection:
    try:
        return connect(database_url)
    except DBAPIError as error:
        fault = f"DATABASE_URL: PostgreSQL does not answer: {_sentence(error)}"
        raise ConfigurationError([fault]) from error


@contextmanager
def _told() -> Iterator[None]:
    """Say in a sentence why PostgreSQL refused an upgrade."""
    try:
        yield
    except DBAPIError as error:
        in_use = isinstance(error.orig, LockNotAvailable | DeadlockDetected)
        why = (
            f"a table is in use, and everybody else would wait behind the upgrade, which waits"
            f" {LOCK_TIMEOUT_SECONDS} s at most: try again"
            if in_use
            else f"PostgreSQL refused it: {_sentence(error)}"
        )
        raise UpgradeFailed(why=why) from error


def _sentence(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0]


def _sign(connection: Connection) -> None:
    """Have the database say which version it needs, to older ones that do not know its revision."""
    if version := installed_version():
        words = connection.execute(text("SELECT quote_literal(:v)"), {"v": version}).scalar_one()
        connection.execute(text(f"COMMENT ON TABLE alembic_version IS {words}"))


def present(connection: Connection) -> str | None:
    """Return the revision of a database; None before its first upgrade."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def is_behind(revision: str | None) -> bool:
    """Tell whether a database of this revision lacks what this code needs.

    Revisions are numbers of one length. A newer one has all that it needs, if its author kept to
    the rule.
    """
    return revision is None or revision < NEWEST


def current(database_url: str) -> str | None:
    """Return the revision of the database that `database_url` names.

    Raises:
        ConfigurationError: it does not answer.
    """
    with _reached(database_url) as connection:
        return present(connection)


def check(database_url: str) -> None:
    """Make sure that the database answers and has the newest schema.

    Raises:
        ConfigurationError: it does not answer.
        WrongRevision: it has another, with what helps.
    """
    with _reached(database_url) as connection:
        revision = present(connection)
        _refuse_newer(connection, revision)
    if is_behind(revision):
        raise WrongRevision(
            f"The database is at revision {revision or 'none'}, this version needs {NEWEST}: "
            "run `opscore db upgrade`."
        )


def _refuse_newer(connection: Connection, revision: str | None) -> None:
    if revision is None or revision <= NEWEST:
        return
    needed = connection.execute(_MADE_BY).scalar()
    needed = f"opscore {needed} or newer" if needed else "the opscore that upgraded it, or newer"
    ours = installed_version()
    raise WrongRevision(
        f"The database is at revision {revision}, and this opscore{f' {ours}' if ours else ''}"
        f" knows revisions up to {NEWEST}: run {needed}."
    )
