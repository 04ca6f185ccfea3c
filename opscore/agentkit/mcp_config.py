"""The file of MCP servers, which `OPSCORE_MCP_CONFIG` names: read and checked when a worker starts.

    servers:
      docs: {command: python, args: [-m, docs_server], env: {TOKEN: "${DOCS_TOKEN}"}}
      web:
        url: https://mcp.example/mcp
        headers: {Authorization: "Bearer ${WEB_TOKEN}"}
        timeoutSeconds: 20      # for opening it, and for each call of a tool
        approval: ["delete_*"]  # somebody must say yes to each call of these tools
        once: ["send_*"]        # the effect of these must not happen twice
        enabled: true

`${VAR}`, in values of `env` and `headers` and in `url`, is taken from the worker's environment. A
server's process gets what `env` names, and of the worker's own no more than PATH, HOME and such.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opscore.errors import ConfigurationError

if TYPE_CHECKING:
    from opscore.agentkit.llm import LLMAgent

TIMEOUT_SECONDS = 20.0
MAX_BYTES = 1024 * 1024
_NAME = re.compile(r"(?=.{1,32}$)[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*", re.ASCII)
_VARIABLE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}", re.ASCII)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_SHARED = ("enabled", "timeoutSeconds", "approval", "once")
_OF_COMMAND = ("command", "args", "env", *_SHARED)
_OF_URL = ("url", "headers", *_SHARED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How to reach an MCP server: a command or a URL."""

    name: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = TIMEOUT_SECONDS
    """For opening it, and for each call."""
    approval: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    enabled: bool = True
    secrets: tuple[str, ...] = ()
    """The values of the variables that it refers to."""

    def needs_approval(self, tool: str) -> bool:
        """Say whether somebody must agree to calls of a tool."""
        return any(fnmatchcase(tool, pattern) for pattern in self.approval)

    def is_once(self, tool: str) -> bool:
        """Say whether a tool has an effect that must not happen twice."""
        return any(fnmatchcase(tool, pattern) for pattern in self.once)


def load_servers(path: str | None, environment: Mapping[str, str]) -> Mapping[str, Server]:
    """Return the servers of a file, by name; none without a file.

    Raises:
        ConfigurationError: naming every fault, with its place, and never a variable's value.
    """
    if path is None:
        return {}
    from opscore.json_values import read_yaml

    try:
        with Path(path).open("rb") as file:
            document = read_yaml(file.read(MAX_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError([f"OPSCORE_MCP_CONFIG: {path}: {reason}"]) from None
    reader = _Reader(environment)
    servers = reader.servers(document)
    if reader.faults:
        raise ConfigurationError([f"OPSCORE_MCP_CONFIG: {path}: {one}" for one in reader.faults])
    return servers


def server_faults(agent: "LLMAgent", servers: Mapping[str, Server]) -> Iterator[str]:
    """Say which of the servers that an agent names it cannot have."""
    for name in agent.mcp_servers:
        server = servers.get(name)
        if server is None:
            known = ", ".join(sorted(servers)) or "none: set OPSCORE_MCP_CONFIG"
            yield f"has an unknown MCP server {name!r}: there are {known}"
        elif not server.enabled:
            yield f"has the MCP server {name}, which is not enabled"
        elif server.seconds >= agent.limits.call_seconds:
            yield (
                f"has the MCP server {name}, whose timeoutSeconds ({server.seconds:g}) must be "
                f"less than limits.call_seconds ({agent.limits.call_seconds:g})"
            )
    if agent.mcp_servers and not _has_package():
        yield "has MCP servers, and the package `mcp` is missing: install opscore[agents]"


def _has_package() -> bool:
    """Import the package, which takes a second: before a worker forks, and in no one's time."""
    try:
        import mcp
    except ImportError:
        return False
    return bool(mcp)


class _Reader:
    """Reads a document, and collects what is wrong with it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.faults: list[str] = []

    def servers(self, document: Any) -> dict[str, Server]:
        if not isinstance(document, dict) or not isinstance(document.get("servers"), dict):
            self.faults.append('must be an object with "servers", an object of servers by name')
            return {}
        self._unknown("", document, ("servers",))
        return {
            name: server
            for name, given in document["servers"].items()
            if (server := self._server(name, given)) is not None
        }

    def _server(self, name: str, given: Any) -> Server | None:
        at = f"servers.{name}"
        if not _NAME.fullmatch(name):
            way = "1 to 32 letters, digits, '-', and single '_' between them"
            self._fault(at, f"a name must be {way}")
            return None
        if not isinstance(given, dict):
            self._fault(at, "must be an object")
            return None
        if ("command" in given) == ("url" in given):
            self._fault(at, "must have either command or url")
            self._unknown(at, given, dict.fromkeys(_OF_COMMAND + _OF_URL))
            return None
        self._unknown(at, given, _OF_COMMAND if "command" in given else _OF_URL)
        used: dict[str, str] = {}
        enabled = self._flag(f"{at}.enabled", given.get("enabled", True))
        values = used if enabled else None
        return Server(
            name=name,
            command=self._command(at, given) if "command" in given else (),
            environment=self._texts(f"{at}.env", given.get("env", {}), values),
            url=self._url(f"{at}.url", given["url"], values) if "url" in given else "",
            headers=self._headers(f"{at}.headers", given.get("headers", {}), values),
            seconds=self._seconds(f"{at}.timeoutSeconds", given.get("timeoutSeconds")),
            approval=self._list(f"{at}.approval", given.get("approval", [])),
            once=self._list(f"{at}.once", given.get("once", [])),
            enabled=enabled,
            secrets=tuple(used.values()),
        )

    def _fault(self, at: str, sentence: str) -> None:
        self.faults.append(f"{at}: {sentence}")

    def _unknown(self, at: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
        for key in given:
            if key not in known:
                place = f"{at}.{key}".removeprefix(".")
                self._fault(place, f"is not known here; known are {', '.join(known)}")

    def _flag(self, at: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self._fault(at, "must be true or false")
        return value is True

    def _command(self, at: str, given: Mapping[str, Any]) -> tuple[str, ...]:
        command = given["command"]
        if not isinstance(command, str) or not command.strip() or "\0" in command:
            self._fault(f"{at}.command", "must be a text: a program; what it gets stands in args")
            return ()
        return (command, *self._list(f"{at}.args", given.get("args", [])))

    def _list(self, at: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, list) and all(
            isinstance(one, str) and "\0" not in one for one in value
        ):
            return tuple(value)
        self._fault(at, "must be a list of texts")
        return ()

    def _texts(self, at: str, value: Any, used: dict[str, str] | None) -> dict[str, str]:
        if not isinstance(value, dict):
            self._fault(at, "must be an object of texts")
            return {}
        return {name: self._text(f"{at}.{name}", one, used) for name, one in value.items()}

    def _headers(self, at: str, value: Any, used: dict[str, str] | None) -> dict[str, str]:
        headers = self._texts(at, value, used)
        for name, one in headers.items():
            if not _HEADER.fullmatch(name) or not (one.isascii() and one.isprintable()):
                self._fault(f"{at}.{name}", "is no header: names and values are printable ASCII")
        return headers

    def _url(self, at: str, value: Any, used: dict[str, str] | None) -> str:
        url = self._text(at, value, used)
        try:
            parts = urlsplit(url)
            _ = parts.port
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_url = False
        if not is_url and used is not None:
            self._fault(at, "must be a URL such as https://mcp.example/mcp")
        elif is_url and parts.username is not None:
            self._fault(at, "must hold no credentials: put them in headers")
        return url

    def _text(self, at: str, value: Any, used: dict[str, str] | None) -> str:
        """Return a text with its variables' values, noted in `used`; None: as it stands."""
        if not isinstance(value, str) or "\0" in value:
            self._fault(at, "must be a text")
            return ""
        if used is None:
            return value
        for name in filter(None, _VARIABLE.findall(value)):
            if name not in self._environment:
                self._fault(at, f"${{{name}}} is not set in the environment")
            used[name] = self._environment.get(name, "")
        return _VARIABLE.sub(lambda one: used[one[1]] if one[1] else "$", value)

    def _seconds(self, at: str, value: Any) -> float:
        if value is None:
            return TIMEOUT_SECONDS
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= 3600:
            self._fault(at, "must be a number of seconds, more than 0 and at most 3600")
            return TIMEOUT_SECONDS
        return float(value)
