"""Makes what of the SDK is made: the sync client of the async one, and the types of the API's own
description. `make sdk` writes them; tests compare.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SDK = Path(__file__).parent.parent / "opscore" / "sdk"
SOURCE, TWIN, TYPES = SDK / "async_client.py", SDK / "sync_client.py", SDK / "types.py"

_WORDS = (
    (r"async (def|with|for) ", r"\1 "),
    (r"await ", ""),
    (r"\bAsync(Iterator|Generator)\b", r"\1"),
    (r"\bOpsCoreClientAsync\b", "OpsCoreClientSync"),
    (r"\bAsync(Run|Task|Workflow|Agent|Schedule)", r"\1"),
    (r"httpx2\.AsyncClient", "httpx2.Client"),
    (r"httpx2\.AsyncBaseTransport", "httpx2.BaseTransport"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\baclosing\b", "closing"),
    (r"\banyio\b", "time"),
    (r"\ba(close|read|iter_lines)\(\)", r"\1()"),
)
_HEAD = '''"""The client of the API; made of `async_client` by `make sdk`: change it there.

    with OpsCoreClientSync("http://127.0.0.1:8000", key) as client:
        run = client.runs.submit("report", {"topic": "queues"})
        print(run.wait(timeout=60).output)

How calls are made, and what they raise, is said there.
"""
'''
_TYPES_HEAD = '''"""The JSON of the API, made of its description at `/openapi.json` by `make sdk`.

Later versions of the API may add members to what they answer.
"""

from typing import Any, Literal, NotRequired, TypedDict
'''


def twin() -> str:
    """Return the sync client."""
    text = SOURCE.read_text()
    body = text[text.index('"""\n', 3) + 4 :]
    for pattern, by in _WORDS:
        body = re.sub(pattern, by, body)
    return _tidy(_HEAD + body, TWIN)


def types() -> str:
    """Return the types of everything the API takes and gives."""
    schemas = _description()["components"]["schemas"]
    return _tidy("\n\n".join([_TYPES_HEAD, *(_class(*each) for each in _ordered(schemas))]), TYPES)


def _description() -> Mapping[str, Any]:
    from flask import Flask

    from web.api import BLUEPRINTS
    from web.openapi import make_api

    api = make_api(Flask("description", static_folder=None))
    for blueprint in BLUEPRINTS:
        api.register_blueprint(blueprint)
    description: Mapping[str, Any] = api.spec.to_dict()
    return description


def _ordered(schemas: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield schemas, those that others name before them."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, Any]]:
        if name in done:
            return
        done.add(name)
        for other in re.findall(r"#/components/schemas/(\w+)", str(schemas[name])):
            yield from visit(other)
        yield name, schemas[name]

    for name in sorted(schemas):
        yield from visit(name)


def _class(name: str, schema: Mapping[str, Any]) -> str:
    if "properties" not in schema:
        return f"{name} = {_hint(schema)}"
    required = schema.get("required", ())
    lines = []
    for member, kind in schema.get("properties", {}).items():
        hint = _hint(kind)
        lines.append(f"    {member}: {hint if member in required else f'NotRequired[{hint}]'}")
    about = [f'    """{schema["description"]}"""\n'] if schema.get("description") else []
    return "\n".join([f"class {name}(TypedDict):", *about, *lines])


def _hint(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "allOf" in schema:
        return _hint(schema["allOf"][0])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(dict.fromkeys(_hint(choice) for choice in choices))
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in schema:
        return (
            f"Literal[{', '.join('None' if v is None else repr(str(v)) for v in schema['enum'])}]"
        )
    return " | ".join(_simple(kind, schema) for kind in kinds) or "Any"


def _simple(kind: str, schema: Mapping[str, Any]) -> str:
    if kind == "array":
        return f"list[{_hint(schema['items'])}]"
    if kind == "object":
        values = {} if "properties" in schema else schema.get("additionalProperties") or {}
        return f"dict[str, {_hint(values)}]"
    names = {
        "string": "str",
        "integer": "int",
        "number": "float",
        "boolean": "bool",
        "null": "None",
    }
    return names[kind]


def _tidy(text: str, path: Path) -> str:
    """Return text as the checks want it."""
    ruff = [Path(sys.executable).parent / "ruff"]
    for what in (
        ["check", "--fix", "--select=I,F401,UP028", "--unsafe-fixes", "--quiet"],
        ["format", "--quiet"],
    ):
        command = [*ruff, *what, "--stdin-filename", str(path), "-"]
        text = subprocess.run(
            command, input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


if __name__ == "__main__":
    TYPES.write_text(types())
    TWIN.write_text(twin())
