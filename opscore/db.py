"""Connections to PostgreSQL: the only place that opens one.

A `Database` belongs to the process that made it: after a fork the child makes its own, since a
socket shared by two processes corrupts both. `Tx` is what functions that read or change take;
whoever opened it commits.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg2
from sqlalchemy import Connection, CursorResult, bindparam, create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

Tx = Connection

CONNECT_TIMEOUT_SECONDS = 5
"""A server that does not answer the handshake by then is away."""
STATEMENT_TIMEOUT_SECONDS = 60
"""No statement of ours takes this long; one that does is stuck behind a lock or a dying disk."""


class Database:
    """A pool of connections to one PostgreSQL database, for one process."""

    def __init__(self, url: str, *, pool_size: int = 5, application: str = "opscore") -> None:
        self._engine = create_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=10,
            # A pre-ping would cost every claim a round trip; a broken connection is found by use,
            # and every caller of a statement that matters repeats it.
            pool_pre_ping=False,
            pool_recycle=1800,
            json_serializer=dump_json,
            json_deserializer=load_json,
            hide_parameters=True,  # inputs and outputs stay out of errors and logs
            connect_args={
                "application_name": application,
                "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                "keepalives_idle": 30,
                "tcp_user_timeout": 30_000,  # milliseconds; a host that died must not be waited for
                "options": f"-c statement_timeout={STATEMENT_TIMEOUT_SECONDS}s"
                " -c idle_in_transaction_session_timeout=60s -c timezone=UTC"
                # Our prepared statements are looked up by key: one plan fits every value.
                " -c plan_cache_mode=force_generic_plan",
            },
        )
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def transaction(self) -> Iterator[Tx]:
        """Commit everything done with the yielded `Tx`, or nothing when an exception leaves."""
        with _known_errors(), self._engine.begin() as tx:
            yield tx

    @contextmanager
    def autocommit(self) -> Iterator[Tx]:
        """Commit each statement by itself: one round trip instead of three."""
        with _known_errors(), self._autocommit.connect() as tx:
            yield tx

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()


@contextmanager
def _known_errors() -> Iterator[None]:
    """Raise as SQLAlchemy's what psycopg2 raises when a broken connection goes back to the pool."""
    try:
        yield
    except psycopg2.Error as error:
        raise OperationalError("(closing the connection)", None, error) from error


def load_json(text: str) -> Any:
    """Decode what PostgreSQL stored: it writes a large float as a whole number."""
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    value = int(digits)
    return value if -(2**63) <= value < 2**63 else float(digits)


_NUMBERED = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


class Prepared:
    """A statement that each connection plans once and then only executes.

    Planning the claim takes several times as long as running it. A pooler between us and
    PostgreSQL must keep a session to its client: PgBouncer in transaction mode does not. Parameters
    are `:name`; `types` names those whose Python values need a SQLAlchemy type to become SQL.
    """

    _names = itertools.count(1)

    def __init__(self, statement: str, **types: Any) -> None:
        self._name = f"opscore_{next(self._names)}"
        numbered = text(statement).compile(dialect=_NUMBERED)
        names = list(numbered.positiontup or ())
        self._prepare = text(f"PREPARE {self._name} AS {_literal(str(numbered))}")
        given = ", ".join(f":{name}" for name in names)
        self._execute = text(
            f"EXECUTE {self._name} ({given})" if names else f"EXECUTE {self._name}"
        )
        self._execute = self._execute.bindparams(
            *(bindparam(name, type_=kind) for name, kind in types.items())
        )

    def __call__(self, tx: Tx, parameters: Mapping[str, Any] | None = None) -> CursorResult[Any]:
        """Run it on `tx` and return its rows."""
        prepared: set[str] = tx.info.setdefault("prepared", set())
        if self._name not in prepared:
            tx.execute(self._prepare)
            prepared.add(self._name)
        return tx.execute(self._execute, dict(parameters or {}))


def _literal(statement: str) -> str:
    """Keep `text` from reading colons of a statement as parameters."""
    return statement.replace(":", "\\:")


def driver_url(url: str) -> str:
    """Name psycopg2 as the driver: SQLAlchemy 2.1 reads plain `postgresql://` as psycopg 3."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    return parsed.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


def dump_json(value: Any) -> str:
    """Encode what has been checked as storable JSON; NaN is refused: PostgreSQL has none."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
