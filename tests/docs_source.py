"""Makes what of the docs is made: the HTTP reference of the API's own description, the settings of
`opscore/config.py`, the command line of its commands. `make docs` writes them; a test compares.

Of each page the part above MARK is written by hand.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click
from sdk_source import _description

DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- Made by `make docs` from here on. -->\n"
LARGEST = 2**31 - 1
"""Of what a column holds; it is no limit that is worth telling."""
METHODS = ("get", "post", "patch", "put", "delete")


def pages() -> dict[Path, str]:
    """Return the whole text of each page that is made."""
    made = {"http.md": http(), "settings.md": settings(), "cli.md": commands()}
    return {DOCS / name: f"{_head(DOCS / name)}{MARK}\n{text}" for name, text in made.items()}


def _head(page: Path) -> str:
    return page.read_text().partition(MARK)[0]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; nothing without rows."""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    rule = f"|{'---|' * len(heads)}"
    return "\n".join([f"| {' | '.join(heads)} |", rule, *lines]) if lines else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


# --- HTTP ----------------------------------------------------------------------------------------


def http() -> str:
    """Return a section per resource, one about the codes, and one about each object."""
    description = _description()
    operations = [
        (path, method, entry[method], entry.get("parameters", []))
        for path, entry in description["paths"].items()
        for method in METHODS
        if method in entry
    ]
    sections = []
    for tag in description["tags"]:
        sections += [f"## {tag['name'].capitalize()}", tag["description"]]
        for path, method, operation, shared in operations:
            if tag["name"] in operation["tags"]:
                sections += _operation(path, method, operation, shared)
    sections += ["## Problem codes", _CODES_ABOUT, _codes(), "## Objects"]
    for name, schema in sorted(description["components"]["schemas"].items()):
        sections += _object(name, schema)
    return _joined(sections)


def _operation(
    path: str, method: str, operation: Mapping[str, Any], shared: Sequence[Any]
) -> Iterator[str]:
    yield f"### `{method.upper()} {path}` {{#{operation['operationId']}}}"
    yield " ".join(operation["summary"].split())
    yield " ".join(operation.get("description", "").split())
    yield _proof(operation)
    parameters = [*shared, *operation.get("parameters", [])]
    heads = ("Parameter", "In", "Type", "Meaning")
    yield _table(heads, [_parameter(parameter) for parameter in parameters])
    yield from _body(operation.get("requestBody"))
    answers = {s: a for s, a in sorted(operation["responses"].items()) if int(s) < 400}
    yield _table(("Answer", "Body", "Meaning"), [_answer(*each) for each in answers.items()])
    yield from _problems(operation["responses"])


def _proof(operation: Mapping[str, Any]) -> str:
    match operation.get("security"):
        case None:
            return ""
        case []:
            return "Takes no key."
        case _:
            return "Takes [a signature](agents.md#signatures) instead of the key."


def _parameter(parameter: Mapping[str, Any]) -> Sequence[str]:
    need = " *required*" if parameter.get("required") and parameter["in"] != "path" else ""
    schema = parameter["schema"]
    about = parameter.get("description") or schema.get("description", "")
    return f"`{parameter['name']}`{need}", parameter["in"], _type(schema), about + _default(schema)


def _body(body: Mapping[str, Any] | None) -> Iterator[str]:
    if body is None:
        return
    (kind, content), *others = body["content"].items()
    kinds = " or ".join(f"`{kind}`" for kind in [kind, *(other for other, _ in others)])
    name = content["schema"].get("$ref", "").rsplit("/", 1)[-1]
    may = "" if body.get("required") else ", which may be left out"
    yield f"Body, {kinds}{may}: {_type(content['schema'])}" + ("." if name else "")
    if content.get("example"):
        yield _json(content["example"])


def _answer(status: str, answer: Mapping[str, Any]) -> Sequence[str]:
    kinds = answer.get("content", {})
    bodies = [_type(content["schema"]) for kind, content in kinds.items() if "json" in kind]
    bodies += [f"`{kind}`" for kind in kinds if "json" not in kind]
    headers = ", ".join(f"`{name}`" for name in answer.get("headers", {}))
    is_told = answer["description"] != HTTPStatus(int(status)).phrase
    told = [answer["description"]] * is_told + [f"Headers: {headers}."] * bool(headers)
    return status, " or ".join(bodies), " ".join(told)


def _problems(responses: Mapping[str, Any]) -> Iterator[str]:
    from web.openapi import MEANINGS

    told = {s: a["description"] for s, a in sorted(responses.items()) if int(s) >= 400}
    own = [f"{status}: {text}" for status, text in told.items() if text != MEANINGS[int(status)]]
    if told:
        yield " ".join([f"[Problems](#problem-codes): {', '.join(told)}.", *own])


_CODES_ABOUT = """\
The `code` of a problem says more than its status. What the statuses mean where an operation says \
nothing else, and the codes:"""


def _codes() -> str:
    from web.openapi import MEANINGS

    codes = _codes_by_status()
    rows = [
        (str(status), MEANINGS.get(status, _phrase(status)), _told_codes(told))
        for status, told in sorted(codes.items())
    ]
    return _table(("Status", "Meaning", "Codes"), rows)


def _phrase(status: int) -> str:
    return f"{HTTPStatus(status).phrase}."


def _told_codes(codes: Mapping[str, str]) -> str:
    return "<br>".join(f"`{code}`{f': {text}' if text else ''}" for code, text in codes.items())


def _codes_by_status() -> dict[int, dict[str, str]]:
    """Return status -> code -> its sentence, if it says more than the status does."""
    from opscore.errors import Conflict, Invalid, NotFound, Unavailable
    from web.errors import CODES, status_of
    from web.server import REFUSALS

    found: dict[int, dict[str, str]] = {status: {code: ""} for status, code in CODES.items()}
    for status, code, _ in REFUSALS.values():
        found.setdefault(status, {})[code] = ""
    found.setdefault(503, {})["too_many_streams"] = ""
    waiting = [Invalid, NotFound, Conflict, Unavailable]
    while waiting:
        kind = waiting.pop(0)
        waiting += kind.__subclasses__()
        if kind.__module__ == "opscore.errors":
            found.setdefault(status_of(kind), {})[kind.code] = _said(kind)
    return found


def _said(kind: type[Exception]) -> str:
    """Return the sentence of an error, without what it names; none of those that are kinds."""
    from web.errors import STATUSES

    return "" if kind in STATUSES else re.sub(r"\{[^}]*\}", "…", inspect.getdoc(kind) or "")


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name} {{#schema-{name.lower()}}}"
    yield schema.get("description", "")
    required = schema.get("required", ())
    is_asked = schema.get("additionalProperties") is False
    if "properties" not in schema:
        yield f"{_type(schema)}."
    rows = [
        (
            f"`{member}`" + (" *required*" if is_asked and member in required else ""),
            _type(kind),
            kind.get("description", "") + _default(kind),
        )
        for member, kind in schema.get("properties", {}).items()
    ]
    yield _table(("Member", "Type", "Meaning"), rows)


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default in (None, "", [], {}) else f" Default: `{json.dumps(default)}`."


def _type(schema: Mapping[str, Any]) -> str:
    """Return a type in words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#schema-{name.lower()})"
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return " or ".join(_simple(kind, schema) for kind in kinds) or "any JSON"


def _simple(kind: str, schema: Mapping[str, Any]) -> str:
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), Mapping):
        return f"object of {_type(values)}" if values else "object"
    if kind == "string":
        return {"uuid": "UUID", "date-time": "moment"}.get(schema.get("format", ""), "text")
    word = {"integer": "whole number"}.get(kind, kind)
    if kind not in ("integer", "number"):
        return word
    bounds = [f"from {_number(schema['minimum'])}"] if "minimum" in schema else []
    if schema.get("maximum", LARGEST) < LARGEST:
        bounds.append(f"to {_number(schema['maximum'])}")
    return " ".join([word, *bounds])


def _number(value: float) -> str:
    return f"{value:,}".removesuffix(".0")


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"


# --- settings ------------------------------------------------------------------------------------


def settings() -> str:
    """Return a table of all settings."""
    from opscore.config import Settings

    rows = [
        (
            f"`{declared.metadata['variable']}`",
            _kind(declared.metadata["field"]),
            _value(declared.default),
            declared.metadata["doc"],
        )
        for declared in fields(Settings)
    ]
    return _joined([_table(("Variable", "Kind", "Default", "Meaning"), rows)])


def _value(default: Any) -> str:
    if default is MISSING:
        return "*required*"
    if default is None or default == ():
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _kind(parsed_as: Any) -> str:
    """Return what a value must be, in words."""
    from opscore.config import _Names, _Url

    if isinstance(parsed_as, _Url):
        return f"URL such as `{parsed_as.example}`"
    if isinstance(parsed_as, _Names):
        return "names, by commas"
    check = parsed_as.validate
    if choices := getattr(check, "choices", None):
        return " or ".join(f"`{choice}`" for choice in choices)
    if hasattr(check, "equal"):
        return f"text of {check.min} characters or more"
    if hasattr(check, "max"):
        number = "whole number" if type(parsed_as).__name__ == "Integer" else "number"
        return f"{number} from {check.min:,} to {check.max:,}"
    return "text"


# --- the command line ----------------------------------------------------------------------------


def commands() -> str:
    """Return a section for each group of commands, and one for those without a group."""
    from opscore.__main__ import main

    groups = {n: c for n, c in main.commands.items() if isinstance(c, click.Group)}
    others = {n: c for n, c in main.commands.items() if n not in groups}
    every = [*others.values(), *(c for group in groups.values() for c in group.commands.values())]
    options = Counter(option for command in every for option in _options(command))
    shared = {option: None for option, count in options.items() if count > len(every) / 2}
    sections = ["## Options of every command that asks the API", _table(_OPTION, shared)]
    for name, group in sorted(groups.items()):
        sections += [f"## opscore {name}", _sentences(group.help)]
        for own, command in group.commands.items():
            sections += _command(("opscore", name, own), command, shared)
    sections += ["## The stack, and each of its processes"]
    for name, command in others.items():
        sections += _command(("opscore", name), command, shared)
    return _joined(sections)


_OPTION = ("Option", "Meaning")


def _command(names: Sequence[str], command: click.Command, shared: Container[Any]) -> Iterator[str]:
    yield f"### {' '.join(names)}"
    yield _sentences(command.help)
    pieces = command.collect_usage_pieces(click.Context(command))
    usage = " ".join([*names, *pieces])
    yield "```console\n" + "\n".join([usage, "", *getattr(command, "examples", ())]) + "\n```"
    yield _table(_OPTION, [option for option in _options(command) if option not in shared])


def _options(command: click.Command) -> list[tuple[str, str]]:
    """Return each option that says what it means, with that."""
    context = click.Context(command)
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    told = [record for record in records if record and record[1] and "--help" not in record[0]]
    return [(_option(name), about.replace("*", r"\*")) for name, about in told]


def _option(name: str) -> str:
    """Return an option with its choices as words: in code a table cannot show the signs between."""
    option, _, choices = name.partition(" [")
    words = ", ".join(f"`{choice}`" for choice in choices.removesuffix("]").split("|"))
    return f"`{option}` {words}" if choices else f"`{name}`"


def _sentences(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("*", r"\*")


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
