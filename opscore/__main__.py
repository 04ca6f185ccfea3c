"""The `opscore` command: what `cli` has, the stack, and each of its processes by itself.

Each command imports what it needs when it is called, so that `opscore --help` is quick.
"""

import os
import sys
import warnings
from errno import EPIPE
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from opscore.cli import COMMANDS, overview
from opscore.cli.session import Group, Session, asks, names_api
from opscore.errors import OpsCoreError

if TYPE_CHECKING:
    from opscore.config import Settings

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""
NO_SERVER = "This takes what servers need, and {} is not here: pip install 'opscore[server]'."


class _Main(Group):
    """Has what we raise on purpose end a command in one sentence, without a stack trace."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except OpsCoreError as error:
            if error.code == "stopped":
                sys.exit(INTERRUPTED)
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno in (None, EPIPE):  # who reads has left: click knows
                raise
            what = error.filename or "output"
            raise click.ClickException(f"{error.strerror}: {what}.") from error
        except ModuleNotFoundError as error:
            if (error.name or "opscore").partition(".")[0] in ("opscore", "web", "workers"):
                raise
            raise click.ClickException(NO_SERVER.format(error.name)) from error


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="opscore", message="%(package)s %(version)s")
@names_api
def main(**_: Any) -> None:
    """Run workflows of agent tasks.

    The API that commands ask is that of --api-url, else of OPSCORE_API_URL, else that of the stack
    which `opscore up` started in this folder.
    """


for command in COMMANDS:
    main.add_command(command)


_data = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".opscore"),
    show_default=True,
    help="Folder that keeps the stack's data, keys and log.",
)


@main.command(
    examples=(
        "opscore up",
        "opscore up --detach --agents my_agents --workflows workflows/",
    )
)
@_data
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the API; free by default.")
@click.option("--agents", help="Modules with agents, separated by commas.")
@click.option(
    "--workflows",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of workflows (*.json, *.yaml, *.yml) to create.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Processes that run agents.",
)
@click.option("--detach", is_flag=True, help="Return once everything is ready.")
def up(
    data: Path,
    port: int | None,
    agents: str | None,
    workflows: Path | None,
    workers: int,
    detach: bool,
) -> None:
    """Start the whole stack; DATABASE_URL and REDIS_URL, if set, are used."""
    from opscore import local

    options = local.Options(data, port, agents, workflows, workers)
    if detach:
        click.echo(local.up_detached(options, os.environ))
    else:
        local.up(options, os.environ)


@main.command(examples=("opscore down",))
@_data
def down(data: Path) -> None:
    """Stop the stack that runs on a data folder, and wait until it has ended."""
    from opscore import local

    click.echo("Stopped." if local.down(data) else f"Nothing runs on {data}.")


@main.command(examples=("opscore status", "opscore status --json | jq .waiting"))
@asks
def status(session: Session) -> None:
    """Show how everything is: processes, workers, queues, agents, what waits and why.

    The exit status is 0 if all is well. Processes are those of the stack in this folder.
    """
    is_up = _show_processes(session) if session.is_local else True
    sys.exit(0 if overview.show_status(session) and is_up else 1)


def _show_processes(session: Session) -> bool:
    """Print each process of the stack in this folder; return whether it is ready.

    If there is none to ask, that is all there is to say.
    """
    from opscore import local

    found = local.status(session.data)
    said = f"{found.phase}{f' (pid {found.pid})' if found.pid else ''}"
    if not found.processes:
        click.echo(said, err=session.as_json)
        click.echo("Hint: `opscore up` starts one here; --api-url names another API.", err=True)
        sys.exit(1)
    if not session.as_json:
        click.echo(said)
        overview.show_processes(found.processes)
    return found.is_ready


def _settings(threads: int | str = 0) -> "Settings":
    """Return the settings in the environment; the current folder's modules become importable.

    They come last, so that a folder `web` there does not stand in front of ours. `threads` is that
    of `Settings.from_env`.
    """
    from opscore.config import Settings

    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return Settings.from_env(os.environ, threads=threads)


@main.command(examples=("opscore web --host 0.0.0.0 --workers 2",))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--threads", type=click.IntRange(2), help="In each; OPSCORE_WEB_THREADS by default.")
def web(host: str, port: int, workers: int, threads: int | None) -> None:
    """Serve the HTTP API (gunicorn)."""
    if threads is not None:
        os.environ["OPSCORE_WEB_THREADS"] = str(threads)
    threads = _settings("web_threads").web_threads
    from gunicorn.app.wsgiapp import run

    sys.argv = [
        "gunicorn",
        f"--bind={host}:{port}",
        f"--workers={workers}",
        f"--threads={threads}",
        "--worker-class=web.server.Worker",
        "--no-control-socket",  # gunicorn would make one in the home folder
        "web.app:app_from_env()",
    ]
    run()


@main.command(
    examples=("opscore worker --concurrency 8", "opscore worker --queues opscore.io --pool threads")
)
@click.option("--queues", help="Queues to take from, separated by commas; all by default.")
@click.option("--pool", type=click.Choice(["prefork", "threads"]), default="prefork")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True)
@click.option("--name", help="Name of this worker, unique on this host; by its pid by default.")
def worker(queues: str | None, pool: str, concurrency: int, name: str | None) -> None:
    """Run tasks (Celery)."""
    from opscore.config import AGENTS_QUEUE, CONTROL_QUEUE, DATABASE_POOL, IO_QUEUE

    known = (AGENTS_QUEUE, IO_QUEUE, CONTROL_QUEUE)
    queues = queues or ",".join(known)
    # Those that run tasks in one process, one that renews their leases, and one for lanes.
    pool_size = _settings((concurrency if pool == "threads" else 1) + 2).database_pool
    os.environ[DATABASE_POOL] = str(pool_size)
    if unknown := set(queues.split(",")) - set(known):
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}: there are {', '.join(known)}", param_hint="--queues"
        )
    _tell_when_ready()
    _run_worker(queues, pool, concurrency, name or f"worker-{os.getpid()}")


def _run_worker(queues: str, pool: str, concurrency: int, name: str) -> NoReturn:
    """Do what `celery worker` does, without loading every other command of Celery with it."""
    from celery.concurrency import get_implementation
    from celery.utils.nodenames import host_format

    from celeryconfig import app

    _allow_root()
    app.set_default()
    import_module("workers.app")  # gives the worker its steps
    worker = app.Worker(
        hostname=host_format(f"{name}@%h"),
        pool_cls=get_implementation(pool),
        concurrency=concurrency,
        queues=queues,
        task_events=True,
        without_gossip=True,
        without_mingle=True,
    )
    worker.start()
    sys.exit(worker.exitcode)


def _tell_when_ready() -> None:
    """Make the file the supervisor waits for; let pool processes end with this one."""
    from celery.signals import worker_process_init, worker_ready

    from opscore.processes import die_with_parent

    if ready := os.environ.pop("OPSCORE_READY_FILE", None):
        worker_ready.connect(lambda **_: Path(ready).touch(), weak=False)
    worker_process_init.connect(lambda **_: die_with_parent(), weak=False)


@main.command(examples=("opscore beat",))
def beat() -> None:
    """Fire schedules (Celery beat); any number of beats may run."""
    settings = _settings()
    from opscore import migrations

    migrations.check(settings.database_url)  # Celery would tell it with a stack trace
    _use_celery(settings)
    _celery("beat", "--pidfile=", "--schedule=")


@main.command(examples=("FLOWER_BASIC_AUTH=me:secret opscore flower",))
def flower() -> None:
    """Show queues and workers (Flower); FLOWER_* variables are its options."""
    settings = _settings()
    if not os.environ.get("FLOWER_BASIC_AUTH"):
        raise click.ClickException("FLOWER_BASIC_AUTH is not set: name:password of who may look.")
    _use_celery(settings)
    os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")
    _hide_flower_metrics()
    _celery("flower")


def _hide_flower_metrics() -> None:
    """Take Flower's /metrics away: it would answer everybody, with no credentials.

    Raises: ClickException if it is not where it was.
    """
    from flower.urls import handlers

    shown = [h for h in handlers if not (isinstance(h, tuple) and h[0] == "/metrics")]
    if len(shown) != len(handlers) - 1:
        raise click.ClickException("This Flower keeps its /metrics elsewhere: take another one.")
    handlers[:] = shown


@main.command(
    examples=(
        "opscore alive --url http://127.0.0.1:8000/health",
        "OPSCORE_ALIVE_FILE=/tmp/opscore.alive opscore alive",
    )
)
@click.option("--url", help="Of a server on this machine, which must answer 200.")
@click.option(
    "--file",
    envvar="OPSCORE_ALIVE_FILE",
    help="What a worker or beat touches; OPSCORE_ALIVE_FILE by default.",
)
def alive(url: str | None, file: str | None) -> None:
    """Tell whether a process on this machine lives, for what watches over it.

    The exit status is 0 if it does, else 1. It asks neither PostgreSQL nor Redis: a process is not
    dead because one of them is away.
    """
    from opscore.alive import DEAD_SECONDS, age_of_sign, answers

    if url:
        if not answers(url):
            raise click.ClickException(f"{url} does not answer 200.")
        return
    if not file:
        raise click.UsageError("Give --url or --file, or set OPSCORE_ALIVE_FILE.")
    age = age_of_sign(file)
    if age is None or age > DEAD_SECONDS:
        since = "there never was one" if age is None else f"the last is {age:.0f} s old"
        raise click.ClickException(f"No sign of life in {file}: {since}.")


def _use_celery(settings: "Settings") -> None:
    """Have Celery commands use an app that knows the broker, and none of what a worker needs."""
    from celeryconfig import make_app

    make_app(settings).set_default()


def _celery(*arguments: str) -> NoReturn:
    """Become a Celery command and exit with it."""
    from celery.bin.celery import celery

    _allow_root()
    celery(args=list(arguments), prog_name="celery")
    sys.exit(0)


def _allow_root() -> None:
    """Have Celery run as root too, since nothing here is pickled."""
    from celery.exceptions import SecurityWarning

    if os.geteuid() == 0:
        os.environ.setdefault("C_FORCE_ROOT", "1")
        warnings.simplefilter("ignore", SecurityWarning)


@main.group()
def db() -> None:
    """The database."""


@db.command(examples=("DATABASE_URL=postgresql://localhost/opscore opscore db upgrade",))
def upgrade() -> None:
    """Bring the tables of DATABASE_URL up to date.

    All of it or nothing: it ends in a sentence if a table is in use for too long.
    """
    settings = _settings()
    from opscore import migrations

    migrations.upgrade(settings.database_url)


@db.command(examples=("opscore db current",))
def current() -> None:
    """Show the revision of DATABASE_URL, and the newest this version knows."""
    settings = _settings()
    from opscore import migrations

    revision = migrations.current(settings.database_url)
    click.echo(f"{revision or 'none'} (this version knows up to {migrations.NEWEST})")


@db.command(examples=("opscore db check && opscore web",))
def check() -> None:
    """Tell whether DATABASE_URL is at the revision this version needs.

    The exit status is 0 if it is, else 1, with a sentence that says what to do.
    """
    settings = _settings()
    from opscore import migrations

    migrations.check(settings.database_url)


if __name__ == "__main__":
    main(prog_name="opscore")
