"""The schema's history leads to the schema the code knows, from every revision, and back; and what
is said to who comes with another version.
"""

import ast
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from stack import ROOT, Servers, stack_environment
from test_web_process import ask, free_port, serving

from opscore import migrations
from opscore.config import installed_version
from opscore.errors import UpgradeFailed, WrongRevision
from opscore.models import Base

VERSIONS = Path(migrations.__file__).parent / "versions"
REVISIONS = sorted(path.name[:4] for path in VERSIONS.glob("[0-9]*.py"))
RUN, TASK = "00000000-0000-7000-8000-000000000001", "00000000-0000-7000-8000-000000000002"
ROWS: dict[str, tuple[str, ...]] = {
    "0001": (
        "INSERT INTO agents (agent_id, kind, name, version, capabilities, capacity)"
        " VALUES ('writer', 'function', 'writer', '1', '{}', 1)",
        "INSERT INTO slots (agent_id, number) VALUES ('writer', 1)",
        "INSERT INTO workflows (workflow_id, version, definition, digest)"
        " VALUES ('w', 1, '{}', 'd')",
        f"INSERT INTO runs (id, workflow_id, version, input) VALUES ('{RUN}', 'w', 1, '{{}}')",
        "INSERT INTO tasks (id, run_id, definition_id, kind, position, depends_on, successors,"
        " reads, wanted_agent_id, timeout_seconds, max_attempts, retry_backoff,"
        " retry_max_backoff, busy_backoff, busy_max_backoff, max_wait_seconds, goes_on, priority,"
        f" status, reason, waiting_since) VALUES ('{TASK}', '{RUN}', 'a', 'agent', 0, '{{}}',"
        " '{}', '{}', 'writer', 60, 3, 2, 60, 1, 60, 60, false, 1, 'waiting', 'agent_busy', now())",
        "INSERT INTO attempts (task_id, number, worker, status, finished_at)"
        f" VALUES ('{TASK}', 1, 'w@h', 'failed', now())",
        "INSERT INTO attempt_logs (task_id, attempt, line, at, message, fields)"
        f" VALUES ('{TASK}', 1, 1, now(), 'm', '{{}}')",
        f"INSERT INTO events (run_id, type) VALUES ('{RUN}', 'run.queued')",
        "INSERT INTO leases (name, holder, expires_at) VALUES ('keeper', 'h', now())",
    ),
    "0002": (
        "INSERT INTO agents (agent_id, kind, name, version, capabilities, capacity,"
        " contact_endpoint, state)"
        " VALUES ('far', 'remote', 'far', '1', '{}', 1, 'http://h', 'idle')",
        "INSERT INTO agent_reports (agent_id, state, at) VALUES ('far', 'idle', now())",
    ),
    "0003": ("INSERT INTO slots (pool, number) VALUES ('far', 1), ('items:x', 1), ('runs:w', 1)",),
    "0004": ("INSERT INTO idempotency_keys (key, digest) VALUES ('k', 'd')",),
    "0005": (
        "INSERT INTO runs (id, workflow_id, version, input, parent_task_id, depth, deadline_at)"
        f" VALUES (gen_random_uuid(), 'w', 1, '{{}}', '{TASK}', 1, now())",
    ),
    "0006": (
        "INSERT INTO schedules (name, workflow_id, cron, timezone, input, overlap, catch_up,"
        " catch_up_window_seconds) VALUES ('s', 'w', '@daily', 'UTC', '{}', 'skip', 'last', 60)",
        "INSERT INTO firings (schedule, moment, status, by) VALUES ('s', now(), 'waiting', 's')",
    ),
    "0007": ("INSERT INTO archived_workflows (workflow_id, by) VALUES ('w', 'key:x')",),
    "0008": ("INSERT INTO events (schedule, type) VALUES ('s', 'schedule.created')",),
    "0010": (
        "INSERT INTO workers (id, name, host, pid, pool, concurrency, queues)"
        " VALUES (gen_random_uuid(), 'w@h', 'h', 1, 'prefork', 1, '{opscore.agents}')",
    ),
    "0013": (
        "INSERT INTO agents (agent_id, kind, name, version, capabilities)"
        " VALUES ('model', 'llm', 'model', '1', '{}')",
        "INSERT INTO agent_steps (task_id, number, run_id, attempt, kind, data)"
        f" VALUES ('{TASK}', 0, '{RUN}', 1, 'reply', '{{}}')",
    ),
    "0014": (
        "INSERT INTO agent_memories (id, agent_id, namespace, text, digest, words)"
        " VALUES (gen_random_uuid(), 'model', 'n', 't', 'd', '')",
    ),
    "0015": (
        "INSERT INTO metrics (name, labels, value, buckets) VALUES ('m', '{}', 1, '{}')",
        "INSERT INTO processes (id, kind, batch, pool_size, pool_used)"
        " VALUES (gen_random_uuid(), 'web', 1, 1, 1)",
    ),
    "0016": (
        "INSERT INTO agent_definitions (agent_id, version, definition, digest, by)"
        " VALUES ('model', 1, '{}', 'd', 'key:x')",
    ),
}
"""Revision -> rows as its version wrote them. Whoever adds a table adds a row of it."""


@contextmanager
def database(servers: Servers, template: str = "template0") -> Iterator[str]:
    """Yield the URL of a database without tables, or of a copy; drop it at the end."""
    name = f"test_{secrets.token_hex(6)}"
    servers._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield servers.postgres.url.rsplit("/", 1)[0] + f"/{name}"
    finally:
        servers._execute(f"DROP DATABASE {name} WITH (FORCE)")


def go(url: str, revision: str, *, down: bool = False) -> None:
    step = command.downgrade if down else command.upgrade
    with migrations.connect(url) as connection, connection.begin():
        step(migrations.alembic_config(connection), revision)


def counts(connection: Connection) -> dict[str, int]:
    """Return how many rows each table has."""
    return {
        table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
        for table in inspect(connection).get_table_names()
    }


@pytest.fixture(scope="module")
def released(servers: Servers) -> Iterator[dict[str, str]]:
    """Revision -> the name of a database that was filled while each of them was the newest."""
    names: dict[str, str] = {}
    try:
        with database(servers) as url:
            for revision in REVISIONS:
                go(url, revision)
                with migrations.connect(url) as connection, connection.begin():
                    for statement in ROWS.get(revision, ()):
                        connection.exec_driver_sql(statement)
                names[revision] = f"at_{revision}_{secrets.token_hex(3)}"
                servers._execute(
                    f"CREATE DATABASE {names[revision]} TEMPLATE {url.rsplit('/', 1)[1]}"
                )
        yield names
    finally:
        for name in names.values():
            servers._execute(f"DROP DATABASE {name} WITH (FORCE)")


def assert_is_newest(connection: Connection) -> None:
    assert migrations.present(connection) == migrations.NEWEST
    context = MigrationContext.configure(connection)
    assert compare_metadata(context, Base.metadata) == []


def test_the_newest_revision_is_the_schema_of_the_models(database_url: str) -> None:
    with migrations.connect(database_url) as connection:
        assert_is_newest(connection)


def test_every_table_has_a_row_that_comes_along(servers: Servers, released: dict[str, str]) -> None:
    with (
        database(servers, released[migrations.NEWEST]) as url,
        migrations.connect(url) as connection,
    ):
        assert not [table for table, rows in counts(connection).items() if not rows]


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_of_every_revision_comes_along_with_what_is_in_it_and_goes_back(
    servers: Servers, released: dict[str, str], revision: str
) -> None:
    with database(servers, released[revision]) as url:
        with migrations.connect(url) as connection:
            before = counts(connection)
        migrations.upgrade(url)
        with migrations.connect(url) as connection:
            assert_is_newest(connection)
            after = counts(connection)
            assert {table: after[table] for table in before} == before
        go(url, revision, down=True)
        with migrations.connect(url) as connection:
            assert migrations.present(connection) == revision
            # Down to 0002 there are no slots of items and runs.
            gone = {"slots": after["slots"] - 1} if revision < "0003" else {}
            assert counts(connection) == before | {name: counts(connection)[name] for name in gone}
        migrations.upgrade(url)
        with migrations.connect(url) as connection:
            assert_is_newest(connection)


def test_what_the_first_revision_kept_means_the_same_and_what_it_has_no_place_for_goes(
    servers: Servers, released: dict[str, str]
) -> None:
    with database(servers, released["0001"]) as url:
        migrations.upgrade(url)
        with migrations.connect(url) as connection, connection.begin():
            row = connection.execute(text("SELECT * FROM tasks")).one()
            assert (row.line_agent_id, row.queue, row.fallback) == ("writer", "opscore.agents", [])
            agent = connection.execute(text("SELECT * FROM agents")).one()
            assert (agent.closed, agent.state, agent.require_token) == (False, "UNKNOWN", True)
            slots = connection.execute(text("SELECT pool, holder FROM slots ORDER BY pool")).all()
            assert [tuple(slot) for slot in slots] == [("writer", None)]
            connection.execute(text("INSERT INTO events (schedule, type) VALUES ('s', 'x')"))
            command.downgrade(migrations.alembic_config(connection), "0001")
            assert connection.execute(text("SELECT count(*) FROM events")).scalar() == 1


# --- While it is in use -------------------------------------------------------------------------


def test_an_upgrade_that_would_make_everybody_wait_changes_nothing_and_says_so(
    servers: Servers, released: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.2)
    with database(servers, released["0009"]) as url:
        with migrations.connect(url) as busy, busy.begin():
            busy.execute(text("LOCK TABLE schedules IN ACCESS SHARE MODE"))
            with pytest.raises(UpgradeFailed, match="in use") as failed:
                migrations.upgrade(url)
        assert "\n" not in str(failed.value)
        with migrations.connect(url) as connection:
            assert migrations.present(connection) == "0009"  # 0010 came before it, and went
            assert not inspect(connection).has_table("workers")
        migrations.upgrade(url)


def test_an_upgrade_that_postgresql_refuses_says_why_in_a_sentence(
    servers: Servers, released: dict[str, str]
) -> None:
    with database(servers, released["0009"]) as url:
        with migrations.connect(url) as connection, connection.begin():
            connection.exec_driver_sql("CREATE TABLE workers ()")
        said = opscore(url, "db", "upgrade")
        assert (said.returncode, said.stderr) == (
            1,
            "Error: The tables cannot be upgraded, and are as they were: PostgreSQL refused it:"
            ' relation "workers" already exists.\n',
        )


def test_two_upgrades_at_once_take_turns(servers: Servers, released: dict[str, str]) -> None:
    with database(servers, released["0001"]) as url:
        programs = [
            subprocess.Popen(
                [sys.executable, "-m", "opscore", "db", "upgrade"],
                env=environment(url),
                cwd=ROOT,
                stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        assert [program.communicate()[1] for program in programs] == [b"", b""]
        assert [program.returncode for program in programs] == [0, 0]
        with migrations.connect(url) as connection:
            assert_is_newest(connection)


def taken_away(revision: str) -> list[str]:
    """Return the steps of a revision that the version before it may not be able to live with."""
    (path,) = VERSIONS.glob(f"{revision}_*.py")
    (up,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "upgrade"
    ]
    steps = [ast.unparse(node) for node in ast.walk(up) if isinstance(node, ast.Call)]
    return [step for step in steps if BREAKS.search(step)]


BREAKS = re.compile(
    r"^op\.(drop_column|drop_table|rename_table)\("
    r"|^op\.alter_column\(.*(new_column_name|type_|nullable=False)"
    r"|^op\.add_column\((?!.*server_default).*nullable=False"
    # A table that grows is locked while an index is built: see docs/deploy.md.
    r"|^op\.create_index\((?!.*if_not_exists=True).*'(runs|tasks|attempts|events)'",
    re.DOTALL,
)
BEFORE_THE_RULE = "0011"
CONTRACTS: dict[str, str] = {}
"""Revision -> the first version that does without what it takes away."""


def test_the_version_before_can_live_with_every_revision_since_the_rule() -> None:
    broke = {revision for revision in REVISIONS if taken_away(revision)}
    assert {"0003", "0005", "0009"} <= broke and not {"0004", "0010", "0011"} & broke
    assert {r for r in broke if r > BEFORE_THE_RULE} == set(CONTRACTS)


# --- Another version ----------------------------------------------------------------------------


def environment(url: str, redis_url: str = "redis://127.0.0.1:1/0") -> dict[str, str]:
    return {**os.environ, **stack_environment(url, redis_url), "PYTHONPATH": str(ROOT)}


def opscore(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "opscore", *arguments],
        env=environment(url),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def make_newer(url: str) -> None:
    """Do to the database what an upgrade by a later version does."""
    with migrations.connect(url) as connection, connection.begin():
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN new_thing text")
        connection.exec_driver_sql("COMMENT ON TABLE alembic_version IS '7.8.9'")


def test_every_command_refuses_a_newer_database_in_one_sentence(database_url: str) -> None:
    make_newer(database_url)
    for arguments in (
        ["db", "upgrade"],
        ["db", "check"],
        ["web", f"--port={free_port()}"],
        ["worker", "--concurrency=1"],
        ["beat"],
    ):
        said = opscore(database_url, *arguments)
        assert said.returncode != 0, arguments
        sentences = [line for line in said.stderr.splitlines() if "9999" in line]
        assert len(sentences) == 1, said.stderr
        assert "knows revisions up to " + migrations.NEWEST in sentences[0]
        assert "run opscore 7.8.9 or newer." in sentences[0]
        assert "Traceback" not in said.stderr, said.stderr
    assert opscore(database_url, "db", "current").stdout.startswith("9999 ")


def test_the_stack_refuses_a_newer_database_in_the_same_sentence(
    database_url: str, tmp_path: Path
) -> None:
    make_newer(database_url)
    given = {
        name: value for name, value in environment(database_url).items() if name != "REDIS_URL"
    }
    said = subprocess.run(
        [sys.executable, "-m", "opscore", "up", "--data", str(tmp_path / "data"), "--detach"],
        env=given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 1
    assert "run opscore 7.8.9 or newer." in said.stderr and "unset it" not in said.stderr


def test_check_and_current_tell_where_a_database_is(
    servers: Servers, released: dict[str, str]
) -> None:
    with database(servers, released["0009"]) as url:
        said = opscore(url, "db", "check")
        assert said.returncode == 1
        assert said.stderr == (
            f"Error: The database is at revision 0009, this version needs {migrations.NEWEST}:"
            " run `opscore db upgrade`.\n"
        )
        newest = f"(this version knows up to {migrations.NEWEST})\n"
        assert opscore(url, "db", "current").stdout == f"0009 {newest}"
        assert opscore(url, "db", "upgrade").returncode == 0
        said = opscore(url, "db", "check")
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
        assert opscore(url, "db", "current").stdout == f"{migrations.NEWEST} {newest}"
    with database(servers) as url:
        assert opscore(url, "db", "current").stdout == f"none {newest}"


def test_an_upgrade_leaves_word_of_the_version_that_the_database_needs(servers: Servers) -> None:
    with database(servers) as url:
        migrations.upgrade(url)
        with migrations.connect(url) as connection:
            comment = text("SELECT obj_description('alembic_version'::regclass)")
            assert connection.execute(comment).scalar() == installed_version()
        # Nobody knows: a database of before this was noted.
        make_newer(url)
        with migrations.connect(url) as connection, connection.begin():
            connection.exec_driver_sql("COMMENT ON TABLE alembic_version IS NULL")
        with pytest.raises(WrongRevision, match="run the opscore that upgraded it, or newer"):
            migrations.check(url)


def test_a_web_process_serves_on_and_is_ready_after_a_newer_version_upgraded_the_database(
    environment: dict[str, str], database_url: str, tmp_path: Path
) -> None:
    def parts(port: int) -> Any:
        with suppress(OSError):
            return ask(port, "GET", "/ready")[1]

    with serving(environment, tmp_path / "log") as (_, port):
        assert parts(port)["database"] == "ok"
        make_newer(database_url)
        assert parts(port)["database"] == "ok"
        status, listed = ask(port, "GET", "/v1/opscore/runs")
        assert (status, listed["items"]) == (200, [])
