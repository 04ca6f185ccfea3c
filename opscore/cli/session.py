"""What every command shares that asks the API: which API, with which key, and how errors end it.

The API is the one that options name, else the environment, else the stack that was started in this
folder with `opscore up`. A key is never sent to another API than the one it was found with.
"""

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, update_wrapper
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click

from opscore.cli import output

if TYPE_CHECKING:
    from opscore.sdk import OpsCoreClientSync, OpsCoreSDKError, types

FAILED, USAGE, CONNECTION, AUTHENTICATION = 1, 2, 3, 4
"""Exit statuses."""
DATA = Path(".opscore")
RETRIES = 2
"""People look on; a program's client has more patience."""
QUIET = "opscore.quiet"
"""Where a command's context has the one member that is printed of what the API said."""
MOST = 1_000_000
"""Of a list, unless it is asked for whole."""
PRIORITIES = ("low", "normal", "high")
NO_API = (
    "No API to ask: give --api-url and --api-key, set OPSCORE_API_URL and OPSCORE_API_KEY, or start"
    " one here with `opscore up`."
)
HINTS: Mapping[str, str] = {
    "agent_not_found": "`opscore agent list` shows those there are.",
    "memory_not_found": "`opscore agent memories AGENT` shows what it remembers.",
    "run_not_found": "`opscore run list` shows those there are.",
    "schedule_not_found": "`opscore schedule list` shows those there are.",
    "task_not_found": "`opscore run show RUN` shows a run's tasks.",
    "workflow_not_found": "`opscore workflow list` shows those there are.",
}
"""By an error's code: what may help."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class _Told(click.Command):
    """A command that a list of commands describes by a whole sentence, not by half of one."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return (self.help or "").strip().partition("\n")[0]


class Command(_Told):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class Group(_Told, click.Group):
    """A group whose commands have examples."""

    command_class = Command
    group_class = type


class Session:
    """One call of the command line: whom it asks, and in what form it answers."""

    def __init__(
        self,
        ctx: click.Context,
        api_url: str | None,
        api_key: str | None,
        data: Path,
        as_json: bool,
    ) -> None:
        """The API's address and key may also have been given before the command's name."""
        before = ctx.find_root().params
        self._url = api_url or before.get("api_url") or os.environ.get("OPSCORE_API_URL")
        self._key = api_key or before.get("api_key")
        self.data, self.as_json = data, as_json
        self._ctx = ctx
        self._client: OpsCoreClientSync | None = None

    @property
    def url(self) -> str:
        return self._place[0]

    @property
    def is_local(self) -> bool:
        """The API is that of the stack in this folder."""
        return not self._url

    @property
    def client(self) -> "OpsCoreClientSync":
        """The client of the API that is asked."""
        if self._client is None:
            from opscore.sdk import OpsCoreClientSync

            url, key = self._place
            self._client = OpsCoreClientSync(url, key, retries=RETRIES)
            self._ctx.call_on_close(self._client.close)
        return self._client

    def show(self, value: Any, people: Callable[[], None]) -> None:
        """Print what the API said: for programs as it is, for people as `people` prints it."""
        if member := self._ctx.meta.get(QUIET):
            for item in value if isinstance(value, list) else [value]:
                click.echo(output.plain(item[member]))
        elif self.as_json:
            click.echo(output.as_json(value, indent=2))
        else:
            people()

    def show_list(
        self, items: Iterable[T], limit: int | None, people: Callable[[Sequence[T]], None]
    ) -> None:
        """Print the first items of a list, as `show`; say so if there are more."""
        found = list(islice(items, None if limit is None else limit + 1))
        shown = found if limit is None else found[:limit]
        self.show(shown, lambda: people(shown))
        if len(found) > len(shown):
            click.echo("There are more: --limit N, or --all.", err=True)

    @cached_property
    def _place(self) -> tuple[str, str]:
        """The API's address, and its key."""
        url, around = self._url, cast("Mapping[str, str]", os.environ)
        if not url:
            around = read_stack(self.data)
            url = around.get("OPSCORE_API_URL")
        key = self._key or around.get("OPSCORE_API_KEY")
        if not url:
            raise click.UsageError(NO_API)
        if not key:
            raise click.UsageError(f"No key for {url}: give --api-key, or set OPSCORE_API_KEY.")
        return url, key


def read_stack(data: Path) -> Mapping[str, str]:
    """Return what `opscore up` wrote of its stack; nothing if there is none.

    Raises:
        click.UsageError: it cannot be read, or says something else.
    """
    file = data / "opscore.env"
    try:
        words = shlex.split(file.read_text(encoding="utf-8"), comments=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{file} cannot be read: {error}.") from error
    found = dict(word.split("=", 1) for word in words if "=" in word)
    if not found.get("OPSCORE_API_URL"):
        raise click.UsageError(f"{file} is not what `opscore up` writes: it has no address.")
    return found


_URL = click.option("--api-url", metavar="URL", help="The API; OPSCORE_API_URL.")
_KEY = click.option("--api-key", metavar="KEY", help="Its key; OPSCORE_API_KEY.")
_DATA = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=DATA,
    show_default=True,
    help="Else: the folder of a stack started with `opscore up`.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, as the API gives it.")


def names_api(command: F) -> F:
    """Give a command the options that name the API to ask."""
    return _URL(_KEY(command))


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command its `Session` as first argument, and the options that go with it."""

    def ask(*args: Any, **kwargs: Any) -> None:
        from opscore.sdk import OpsCoreSDKError

        given = {name: kwargs.pop(name) for name in ("api_url", "api_key", "data", "as_json")}
        session = Session(click.get_current_context(), **given)
        try:
            command(session, *args, **kwargs)
        except OpsCoreSDKError as error:
            fail(error, session.as_json)
        except ValueError as error:  # what cannot be sent
            raise click.UsageError(str(error)) from error
        except (LookupError, TypeError, AttributeError) as error:
            fail(_unread(session.url, error), session.as_json)

    return names_api(_DATA(_JSON(update_wrapper(ask, command))))


def quiet(member: str) -> Callable[[F], F]:
    """Give a command `-q`: then it prints that member of what it got, and nothing else."""

    def keep(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
        if wanted:
            ctx.meta[QUIET] = member

    said = f"Print {'ids' if member.endswith('Id') else 'names'} only."
    return click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=keep, help=said)


def limited(command: F) -> F:
    """Give a command that lists its `limit`; None means all."""

    def read(ctx: click.Context, param: click.Parameter, every: bool) -> None:
        if every:
            ctx.params["limit"] = None

    number = click.IntRange(1, MOST)
    most = click.option(
        "-n", "--limit", type=number, default=50, show_default=True, help="At most."
    )
    every = click.option("--all", is_flag=True, expose_value=False, callback=read, help="All.")
    return every(most(command))


# --- How a command ends -------------------------------------------------------------------------


def fail(error: "OpsCoreSDKError", as_json: bool) -> NoReturn:
    """Say in a sentence what went wrong, and what may help; exit with its status."""
    from opscore.sdk import AuthenticationError, ConnectionError

    status = {AuthenticationError: AUTHENTICATION, ConnectionError: CONNECTION}
    if as_json:
        click.echo(output.as_json(_as_json(error)), err=True)
    else:
        click.echo(output.lines(f"Error: {error}"), err=True)
        if hint := hint_about(error):
            click.echo(f"Hint: {output.plain(hint)}", err=True)
    sys.exit(status.get(type(error), FAILED))


def _unread(url: str, error: Exception) -> "OpsCoreSDKError":
    """Return what it means that an answer has not the members it must have."""
    from opscore.sdk import OpsCoreSDKError

    return OpsCoreSDKError(
        f"What {url} answers cannot be read ({type(error).__name__}: {error}):"
        " it is not opscore, or of another version."
    )


def _as_json(error: "OpsCoreSDKError") -> dict[str, Any]:
    from opscore.sdk import ConnectionError

    said = {"status_code": "status", "code": "code", "errors": "errors", "request_id": "requestId"}
    found = {name: getattr(error, attribute, None) for attribute, name in said.items()}
    detail = getattr(error, "detail", str(error))
    code = "connection" if isinstance(error, ConnectionError) else "unexpected_answer"
    return {"error": {**found, "code": found["code"] or code, "detail": detail}}


def hint_about(error: "OpsCoreSDKError") -> str | None:
    """Return what may help, if anything is known to."""
    from opscore.sdk import AuthenticationError, ConnectionError, OpsCoreApiError, ServerError

    if isinstance(error, ConnectionError):
        return "Is it up? `opscore up` starts one here; --api-url names another."
    if isinstance(error, AuthenticationError):
        return "--api-key or OPSCORE_API_KEY must be the key the API was started with."
    if isinstance(error, ServerError):
        known = f", and its log has more under request id {error.request_id}"
        return f"`opscore doctor` says what is the matter{known if error.request_id else ''}."
    if not isinstance(error, OpsCoreApiError):
        return "--api-url, OPSCORE_API_URL or the stack in this folder named that address."
    return HINTS.get(error.code or "")


# --- What is given as text ----------------------------------------------------------------------


class Json(click.ParamType[Any]):
    """JSON as an argument: itself, `@file` for a file's, `-` for standard input's."""

    name = "JSON"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(self._text(value))
        except OSError as error:
            self.fail(f"{value[1:] or value} cannot be read: {error.strerror}.", param, ctx)
        except (ValueError, RecursionError) as error:
            self.fail(
                f"this is no JSON ({error}); @FILE reads a file, - standard input.", param, ctx
            )

    def _text(self, value: str) -> str:
        if value == "-":
            return standard_input()
        return Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value


def standard_input() -> str:
    """Return what it says.

    Raises:
        OSError: it is closed.
        ValueError: it is no text.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    return sys.stdin.read()


class Pair(click.ParamType[Any]):
    """`name=value`."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        name, equals, what = value.partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not of the form NAME=VALUE.", param, ctx)
        return name, what


class Moment(click.ParamType[Any]):
    """A moment in ISO 8601; without an offset it is in this machine's time."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from datetime import datetime

        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo else moment.astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time such as 2026-01-31T12:00.", param, ctx)


def labels(command: F) -> F:
    """Give a command `label`: pairs."""
    return click.option("-l", "--label", type=Pair(), multiple=True, help="May be repeated.")(
        command
    )


def budget(command: F) -> F:
    """Give a command `max_tokens` and `max_cost_usd`, for `budget_of`."""
    tokens = click.option("--max-tokens", type=click.IntRange(0), help="Its LLM agents may use.")
    cost = click.option("--max-cost-usd", type=click.FloatRange(0), help="They may cost.")
    return tokens(cost(command))


def budget_of(max_tokens: int | None, max_cost_usd: float | None) -> "types.Budget | None":
    """Return what LLM agents may spend; None: as much as they like."""
    if max_tokens is None and max_cost_usd is None:
        return None
    return {"maxTokens": max_tokens, "maxCostUsd": max_cost_usd}
