"""Connections to PostgreSQL: the only place that opens one.

A `Database` belongs to the process that made it: after a fork the child makes its own, since a
socket shared by two processes corrupts both. `Tx` is what functions that read or change take;
whoever opened it commits.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg2
from psycopg2.extras import NamedTupleCursor
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from opscore import logs, tally
from opscore.tally import POOL_TIMEOUTS, Entry, Tally

Tx = Connection

CONNECT_TIMEOUT_SECONDS = 5
"""A server that does not answer the handshake by then is away."""
STATEMENT_TIMEOUT_SECONDS = 60
"""No statement of ours takes this long; one that does is stuck behind a lock or a dying disk."""


class Database:
    """A pool of connections to one PostgreSQL database, for one process."""

    def __init__(self, url: str, *, pool_size: int = 5, application: str = "opscore") -> None:
        self.tally = Tally()
        """What was counted by its transactions, and by whoever it belongs to."""
        self.pool_size = pool_size
        self.process = application.removeprefix("opscore-")
        """What kind of process it belongs to."""
        self._most_used = 0
        self._engine = create_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=10,
            # A pre-ping would cost every claim a round trip; a broken connection is found by use,
            # and every caller of a statement that matters repeats it.
            pool_pre_ping=False,
            pool_recycle=1800,
            use_native_hstore=False,  # or it asks for the type's number on every connection
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
                " -c plan_cache_mode=force_generic_plan -c jit=off"
                # They are planned once, perhaps while the tables are empty, and must not scan them
                # when they are full.
                " -c enable_seqscan=off",
            },
        )

    @contextmanager
    def transaction(self) -> Iterator[Tx]:
        """Commit everything done with the yielded `Tx`, or nothing when an exception leaves."""
        lines: list[Callable[[], None]] = []
        with _known_errors(), self._connect() as tx, tx.begin():
            tx.info[_LINES] = lines
            counted = self._begin(tx)
            yield tx
        self._count(counted)
        for write in lines:
            write()

    @contextmanager
    def autocommit(self) -> Iterator[Tx]:
        """Commit each statement by itself: one round trip instead of three.

        SQLAlchemy's own way to this sends a SET with every use.
        """
        with _known_errors(), self._connect() as tx:
            connection: Any = tx.connection.dbapi_connection
            connection.autocommit = True
            tx.info[_LINES] = None
            counted = self._begin(tx)
            try:
                yield tx
            finally:
                self._count(counted)
                if not connection.closed:
                    connection.autocommit = False

    def _connect(self) -> Tx:
        try:
            return self._engine.connect()
        except PoolTimeout:
            self.tally.add(POOL_TIMEOUTS, self.process)
            raise

    def _begin(self, tx: Tx) -> list[Entry]:
        assert isinstance(self._engine.pool, QueuePool)
        self._most_used = max(self._most_used, self._engine.pool.checkedout())
        return tally.begin(tx)

    def _count(self, counted: list[Entry]) -> None:
        if counted:
            self.tally.add_all(counted)

    def take_most_used(self) -> int:
        """Return how many connections were in use at once, at most, since this was last asked."""
        used, self._most_used = self._most_used, 0
        return used

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()


_LINES = "lines"
"""Under which a connection keeps the lines of its transaction; None: each statement commits."""


def tell(tx: Tx, event: str, *, is_warning: bool = False, **fields: Any) -> None:
    """Log a transition once it is committed; never if it is not.

    `event` is the type of its event, if it has one; `fields` are its ids (`run_id`, `task_id`,
    `attempt`, `agent_id`) and a little more, never inputs, outputs or words of people. None is left
    out.
    """
    write = partial(logs.transition, event, is_warning=is_warning, **fields)
    lines = tx.info.get(_LINES)
    if lines is None:
        write()
    else:
        lines.append(write)


@contextmanager
def savepoint(tx: Tx) -> Iterator[None]:
    """Keep what the block does, or nothing of it when an exception leaves: no line, no count."""
    lines = tx.info[_LINES]
    told = len(lines)
    try:
        with tally.kept(tx), tx.begin_nested():
            yield
    except BaseException:
        del lines[told:]
        raise


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


class Rows(list[Any]):
    """What a prepared statement answered: named tuples."""

    def first(self) -> Any | None:
        """Return the first row, or None."""
        return self[0] if self else None

    def scalars(self) -> list[Any]:
        """Return the first column."""
        return [row[0] for row in self]


class Prepared:
    """A statement that each connection plans once and then only executes.

    Planning the claim takes several times as long as running it, and SQLAlchemy's way to a result
    costs as much again, so these go to psycopg2 directly; errors are SQLAlchemy's all the same. A
    pooler between us and PostgreSQL must keep a session to its client: PgBouncer in transaction
    mode does not. Parameters are `:name`; those in `json` are stored as JSON, where None is JSON's
    null; in `json_or_null` None is SQL's.
    """

    _names = itertools.count(1)

    def __init__(
        self, statement: str, *, json: tuple[str, ...] = (), json_or_null: tuple[str, ...] = ()
    ) -> None:
        self._name = f"opscore_{next(self._names)}"
        numbered = text(statement).compile(dialect=_NUMBERED)
        self._prepare = f"PREPARE {self._name} AS {numbered}"
        self._parameters = tuple(numbered.positiontup or ())
        given = f" ({', '.join(['%s'] * len(self._parameters))})" if self._parameters else ""
        self._execute = f"EXECUTE {self._name}{given}"
        self._json, self._json_or_null = frozenset(json), frozenset(json_or_null)

    def __call__(self, tx: Tx, parameters: Mapping[str, Any] | None = None) -> Rows:
        """Run it on `tx` and return its rows."""
        values = [self._value(name, (parameters or {})[name]) for name in self._parameters]
        prepared: set[str] = tx.info.setdefault("prepared", set())
        connection: Any = tx.connection.dbapi_connection
        try:
            with connection.cursor(cursor_factory=NamedTupleCursor) as cursor:
                if self._name not in prepared:
                    cursor.execute(self._prepare)
                    prepared.add(self._name)
                cursor.execute(self._execute, values)
                return Rows(cursor.fetchall() if cursor.description else ())
        except psycopg2.Error as error:
            raise self._as_sqlalchemy(tx, connection, error) from error

    def _value(self, name: str, value: Any) -> Any:
        if name in self._json or (name in self._json_or_null and value is not None):
            return dump_json(value)
        return value

    def _as_sqlalchemy(self, tx: Tx, connection: Any, error: psycopg2.Error) -> Exception:
        """Return SQLAlchemy's error for psycopg2's; a lost connection takes the idle ones along."""
        lost = tx.dialect.is_disconnect(error, connection, None)
        if lost:
            tx.invalidate(error)
            tx.engine.dispose()
        wrapped: Exception = DBAPIError.instance(
            self._execute,
            None,
            error,
            psycopg2.Error,
            hide_parameters=True,
            connection_invalidated=lost,
        )
        return wrapped


def driver_url(url: str) -> str:
    """Name psycopg2 as the driver: SQLAlchemy 2.1 reads plain `postgresql://` as psycopg 3."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    return parsed.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def dump_json(value: Any) -> str:
    """Encode what has been checked as storable JSON; NaN is refused: PostgreSQL has none."""
    return _ENCODER.encode(value)
