"""Every setting: its variable, default, unit and meaning; and how they must relate to each other.

`Settings.from_env(os.environ)` is called by entry points only; nothing here looks at the
environment by itself, so that a test, or a second stack in the same process, passes its own
mapping.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self
from urllib.parse import urlsplit

from marshmallow import EXCLUDE, Schema, ValidationError, validate
from marshmallow import fields as ma

from opscore.errors import ConfigurationError
from opscore.json_values import MAX_TEXT_BYTES

AGENTS_QUEUE = "opscore.agents"
"""Function and LLM agents."""
IO_QUEUE = "opscore.io"
"""Agents behind HTTP."""
CONTROL_QUEUE = "opscore.control"
"""What must never lie behind agent work."""
QUEUES = (AGENTS_QUEUE, CONTROL_QUEUE, IO_QUEUE)
FIRST = 1
"""The priority of visits that are served before all others of their queue, which have 0. As it
comes kombu serves a higher number later; `workers.consumer.Channel` turns that round."""


def lists_of(queue: str) -> tuple[str, str]:
    """Return the Redis lists of a queue, as kombu names them; the second is served first."""
    return queue, f"{queue}\x06\x16{FIRST}"


SERVED_FIRST = tuple(lists_of(queue)[1] for queue in (AGENTS_QUEUE, IO_QUEUE))
"""The Redis lists of those visits."""
TAKEN = "unacked"
"""The Redis hash of the messages that were taken and not acknowledged, as kombu names it: JSON of
message, exchange and the name of the queue."""
SET_ASIDE = "opscore.set_aside"
"""The Redis list of the newest queue entries that were no message, as JSON: `queue`, `reason`,
`at`, `bytes` (its whole length) and `entry`."""
SET_ASIDE_COUNT = "opscore.set_aside.count"
"""The Redis hash that says how many were set aside ever, per queue."""

DATABASE_POOL = "OPSCORE_DATABASE_POOL"
SECRET_LENGTH = 16
"""Characters; a shorter key is guessed rather than found."""


def _setting(variable: str, parsed_as: ma.Field[Any], doc: str, default: Any = ...) -> Any:
    """Declare one setting; without `default` it must be given."""
    metadata = {"variable": variable, "field": parsed_as, "doc": doc}
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class _Url(ma.String):
    """A URL of one of `schemes`, with a host."""

    def __init__(self, *schemes: str, example: str) -> None:
        super().__init__()
        self.schemes, self.example = schemes, example

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> str:
        text = str(super()._deserialize(value, attr, data, **kwargs))
        try:
            parts = urlsplit(text)
            good = parts.scheme in self.schemes and (parts.hostname or parts.scheme == "unix")
            _ = parts.port
        except ValueError:
            good = False
        if not good:
            raise ValidationError(f"must be a URL such as {self.example}")
        return text


class _Names(ma.Field[tuple[str, ...]]):
    """Names separated by commas."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> tuple[str, ...]:
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


class _Level(ma.String):
    """A word in capitals, however it was written."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> str:
        return str(super()._deserialize(value, attr, data, **kwargs)).upper()


def _seconds(low: float, high: float) -> ma.Field[Any]:
    return ma.Float(validate=validate.Range(low, high))


def _count(low: int, high: int) -> ma.Field[Any]:
    return ma.Integer(validate=validate.Range(low, high))


def _secret() -> ma.Field[Any]:
    return ma.String(
        validate=validate.Length(
            min=SECRET_LENGTH, error=f"must have at least {SECRET_LENGTH} characters"
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one process, checked."""

    database_url: str = _setting(
        "DATABASE_URL",
        _Url(
            "postgresql", "postgres", "postgresql+psycopg2", example="postgresql://user@host/name"
        ),
        "PostgreSQL, which holds what is true.",
    )
    api_key: str = _setting(
        "OPSCORE_API_KEY", _secret(), "The key clients send as `Authorization: Bearer`."
    )
    redis_url: str = _setting(
        "REDIS_URL",
        _Url("redis", "rediss", "unix", example="redis://:password@host:6379/0"),
        "Redis or Valkey, which carries the visits.",
        "redis://127.0.0.1:6379/0",
    )
    agents: tuple[str, ...] = _setting(
        "OPSCORE_AGENTS", _Names(), "Modules with agents that a worker imports, by commas.", ()
    )
    log_level: str = _setting(
        "OPSCORE_LOG_LEVEL",
        _Level(validate=validate.OneOf(["DEBUG", "INFO", "WARNING", "ERROR"])),
        "DEBUG, INFO, WARNING or ERROR.",
        "INFO",
    )
    log_format: str = _setting(
        "OPSCORE_LOG_FORMAT",
        ma.String(validate=validate.OneOf(["json", "text"])),
        "json (one object a line) or text.",
        "json",
    )
    lease_seconds: float = _setting(
        "OPSCORE_LEASE_SECONDS",
        _seconds(1, 3600),
        "Seconds after which an attempt whose worker is silent counts as lost.",
        30.0,
    )
    renew_seconds: float = _setting(
        "OPSCORE_RENEW_SECONDS",
        _seconds(0.1, 1200),
        "Seconds between two renewals of a lease; at least three fit into a lease.",
        10.0,
    )
    grace_seconds: float = _setting(
        "OPSCORE_GRACE_SECONDS",
        _seconds(0, 86_400),
        "Seconds a worker that is asked to stop lets its agents go on; then it hands their tasks "
        "back and ends. Whoever stops it must wait a little longer before killing it: Docker and "
        "`opscore down` wait 10 seconds, Kubernetes 30.",
        8.0,
    )
    keeper_seconds: float = _setting(
        "OPSCORE_KEEPER_SECONDS",
        _seconds(0.05, 60),
        "Seconds between two rounds of the keeper.",
        1.0,
    )
    max_lost: int = _setting(
        "OPSCORE_MAX_LOST",
        _count(1, 100),
        "Lost attempts after which a task fails as `worker_lost`: it may be what kills its worker.",
        3,
    )
    rescue_seconds: float = _setting(
        "OPSCORE_RESCUE_SECONDS",
        _seconds(1, 3600),
        "Seconds a task may lie ready without a visit before its run may be published again.",
        10.0,
    )
    alive_file: str | None = _setting(
        "OPSCORE_ALIVE_FILE",
        ma.String(),
        "File that a worker or a beat touches as long as it lives; `opscore alive` looks at it.",
        None,
    )
    firing_days: int = _setting(
        "OPSCORE_FIRING_DAYS",
        _count(1, 36_500),
        "Days after which firings and events of schedules are deleted; the newest 100 firings of "
        "each schedule stay.",
        90,
    )
    max_body_bytes: int = _setting(
        "OPSCORE_MAX_BODY_BYTES",
        _count(1024, MAX_TEXT_BYTES),
        "Bytes of the largest request body; with less than 4 MiB not every spelling of an input of "
        "1 MiB comes in.",
        MAX_TEXT_BYTES,
    )
    metrics_token: str | None = _setting(
        "OPSCORE_METRICS_TOKEN",
        _secret(),
        "Opens `GET /metrics`, as `Authorization: Bearer`, and nothing else; the key does, too.",
        None,
    )
    webhook_secret: str | None = _setting(
        "OPSCORE_WEBHOOK_SECRET",
        _secret(),
        "Signs what agents behind HTTP register with, and the work they get; without it none can.",
        None,
    )
    agent_hosts: tuple[str, ...] = _setting(
        "OPSCORE_AGENT_HOSTS",
        _Names(),
        "Hosts of agents that may lie in private networks, as patterns: `*.internal,10.1.*`.",
        (),
    )
    answer_seconds: float = _setting(
        "OPSCORE_ANSWER_SECONDS",
        _seconds(1, 3600),
        "Seconds an agent behind HTTP may take to answer a task; one that needs longer accepts it "
        "(202) and reports. Each that keeps silent holds a thread of a worker for as long.",
        60.0,
    )
    mcp_config: str | None = _setting(
        "OPSCORE_MCP_CONFIG",
        ma.String(),
        "YAML file of the MCP servers that LLM agents may use: `servers`, by name, each with "
        "`command` (`args`, `env`) or `url` (`headers`), `timeoutSeconds`, `enabled`, and patterns "
        "of its tools under `approval` and `once`.",
        None,
    )
    files: str | None = _setting(
        "OPSCORE_FILES",
        ma.String(),
        "Folder in which each run has one for the files of its LLM agents; all workers must see "
        "the same. Without it there are none.",
        None,
    )
    web_threads: int = _setting(
        "OPSCORE_WEB_THREADS",
        _count(2, 1000),
        "Requests a web process answers at once; half of them may be long polls and streams.",
        16,
    )
    database_pool: int = _setting(
        DATABASE_POOL,
        _count(1, 1000),
        "Connections a process may hold to PostgreSQL: one for each of its threads that uses it. "
        "Web and workers know how many those are if this is not set.",
        20,
    )

    @classmethod
    def from_env(cls, environment: Mapping[str, str], *, threads: int | str = 0) -> Self:
        """Read the settings from `environment`; an empty variable counts as absent.

        `threads`: how many threads of this process may use the database at once, or the name of
        the setting that says it. The pool becomes as large, or must be if it is given.

        Raises:
            ConfigurationError: naming every fault at once, never a secret's value.
        """
        declared = {f.metadata["variable"]: f for f in fields(cls)}
        given = {name: environment[name] for name in declared if environment.get(name)}
        schema = Schema.from_dict({name: f.metadata["field"] for name, f in declared.items()})
        faults = [
            f"{name} is not set: {f.metadata['doc']}"
            for name, f in declared.items()
            if name not in given and _is_required(f)
        ]
        try:
            values = schema(unknown=EXCLUDE).load(given)
        except ValidationError as error:
            by_variable: dict[str, list[str]] = dict(error.messages_dict)
            faults += [f"{name}: {' '.join(texts)}" for name, texts in by_variable.items()]
            values = error.valid_data
        known = {f.name: values.get(name, f.default) for name, f in declared.items()}
        needed = known[threads] if isinstance(threads, str) else threads
        if needed and DATABASE_POOL not in values:
            known["database_pool"] = needed
        faults += _lease_faults(known["lease_seconds"], known["renew_seconds"])
        faults += _pool_faults(known["database_pool"], needed)
        if faults:
            raise ConfigurationError(faults)
        return cls(**known)


def _lease_faults(lease_seconds: float, renew_seconds: float) -> list[str]:
    if lease_seconds >= 3 * renew_seconds:
        return []
    return [
        f"OPSCORE_LEASE_SECONDS ({lease_seconds:g}) must be at least three times "
        f"OPSCORE_RENEW_SECONDS ({renew_seconds:g}): set "
        f"OPSCORE_RENEW_SECONDS={math.floor(lease_seconds / 3 * 10) / 10:g} or a longer lease"
    ]


def _pool_faults(pool: int, threads: int) -> list[str]:
    if pool >= threads:
        return []
    return [
        f"{DATABASE_POOL} ({pool}) must be at least {threads}, one connection for each thread of "
        f"this process that uses the database: set {DATABASE_POOL}={threads}, leave it unset, or "
        "use fewer threads"
    ]


def _is_required(declared: Any) -> bool:
    return declared.default is MISSING


def installed_version() -> str | None:
    """Return the version of opscore; None of a source tree that is not installed."""
    try:
        return version("opscore")
    except PackageNotFoundError:
        return None
