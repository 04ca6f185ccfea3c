"""Fixtures: one PostgreSQL and one Valkey a session, a fresh database a test."""

import os
from collections.abc import Iterator

import pytest
from stack import TEMPLATE, Servers, guard, new_redis_url, stack_environment

from celeryconfig import make_app
from opscore import migrations
from opscore.config import Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.servers import PostgresServer, RedisServer

for name in [name for name in os.environ if name.startswith(("OPSCORE_", "FLOWER_"))]:
    if not name.startswith("OPSCORE_PROPERTY_"):  # what a test itself is told
        del os.environ[name]
for name in ("DATABASE_URL", "REDIS_URL"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with PostgresServer.temporary() as postgres, RedisServer.temporary() as redis:
        servers = Servers(postgres, redis)
        servers._execute(f"CREATE DATABASE {TEMPLATE}")
        template = postgres.url.rsplit("/", 1)[0] + f"/{TEMPLATE}"
        migrations.upgrade(template)
        guard(template)
        yield servers


@pytest.fixture
def database_url(servers: Servers) -> Iterator[str]:
    with servers.new_database() as url:
        yield url


@pytest.fixture
def redis_url(servers: Servers) -> str:
    """The URL of an empty Redis database."""
    return new_redis_url(servers)


@pytest.fixture
def environment(database_url: str, redis_url: str) -> dict[str, str]:
    """The variables a process of this test's stack needs."""
    return stack_environment(database_url, redis_url)


@pytest.fixture
def settings(environment: dict[str, str]) -> Settings:
    return Settings.from_env(environment)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database_url, pool_size=20)
    yield database
    database.close()


@pytest.fixture
def dispatcher(settings: Settings, database: Database) -> Dispatcher:
    return Dispatcher(make_app(settings), database, settings)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "the API, in test_fuzz.py")
    group.addoption("--examples", type=int, help="Random requests an operation gets; else a few.")
    group.addoption("--seed", type=int, default=1, help="Of those requests.")
