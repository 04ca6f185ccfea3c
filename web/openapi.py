"""The description of the API at `/openapi.json`, its pages at `/docs`, and how views are declared.

flask-smorest gathers it from the views. Changed here: errors are problems, every operation names
all it may answer, a definition may come as YAML, and the pages come from this package alone.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypeVar

from flask import Blueprint as PlainBlueprint
from flask import Flask, jsonify, redirect, send_from_directory, url_for
from flask_smorest import Api as SmorestApi  # type: ignore[import-untyped]
from flask_smorest import Blueprint as SmorestBlueprint
from flask_smorest.spec.plugins import FlaskPlugin  # type: ignore[import-untyped]
from marshmallow import Schema
from werkzeug import Response

from opscore.config import installed_version
from opscore.remote import AGENT_PREFIX
from web.bodies import JSON, YAML, Parser, read_definition
from web.errors import PROBLEM
from web.ids import MemoryId, RunId, TaskId
from web.schemas import STEP, STEP_NAME, KeyHeader, Problem, WorkflowDefinition, camel
from web.starting import REPLAYED_HEADER
from web.streams import EVENT_STREAM

View = TypeVar("View", bound=Callable[..., Any])

PREFIX = "/v1/opscore"
STATIC = Path(__file__).parent / "static" / "swagger"
KEY_SCHEME = "key"
TEXT = "text/plain"
SIGNATURE_SCHEMES: Mapping[str, tuple[str, str]] = {
    "signature": (
        f"{AGENT_PREFIX}-Signature",
        "Lower-case hex HMAC-SHA256, keyed with the server's OPSCORE_WEBHOOK_SECRET, of the"
        ' timestamp as sent, "." and the body\'s bytes.',
    ),
    "timestamp": (
        f"{AGENT_PREFIX}-Timestamp",
        "When it was signed: seconds since 1970, or ISO 8601 with its offset; at most 300 s from"
        " now.",
    ),
}
"""What proves, instead of the key, who sent a request: name -> its header and what that holds."""
MEANINGS: Mapping[int, str] = {
    400: "The body cannot be read: it is not UTF-8, or not JSON (or YAML).",
    401: "The key is missing or wrong.",
    404: "There is no such thing.",
    409: "The present state does not allow this.",
    413: "The body is larger than the limit.",
    415: "The body is of another media type.",
    422: "Something in the request is not as it must be; `errors` says where.",
    500: "An accident; the log has it under the request id.",
    503: "A server that is needed is away; `Retry-After` says when to try again.",
}
LOCATION = {"Location": {"description": "Where it is now.", "schema": {"type": "string"}}}
REPLAYED = {
    REPLAYED_HEADER: {
        "description": "`true`: the Idempotency-Key came before, and this is what it started then.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}
NOT_STARTED = {
    409: "The Idempotency-Key came with another request already, or the workflow is archived."
}
DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The pages may load nothing from elsewhere; Swagger UI writes inline styles."""
ABOUT = """
    Runs workflows of agent tasks and shows what is going on and why.

    Errors are `application/problem+json` (RFC 9457). What starts a run takes an `Idempotency-Key`,
    so that it is safe to send again. Lists are pages, newest first: send
    `nextCursor` as `cursor` for the next one. Every answer carries `X-Request-ID`: the client's
    own, if it sent one.
"""


class Api(SmorestApi):  # type: ignore[misc]
    DEFAULT_ERROR_RESPONSE_NAME = None

    """The gatherer, without what it would add of its own."""

    def _register_error_handlers(self) -> None: ...
    def _register_responses(self) -> None: ...
    def _register_etag_headers(self) -> None: ...
    def _register_pagination_header(self) -> None: ...


class _Paths(FlaskPlugin):  # type: ignore[misc]
    """Writes the parameters of paths in camelCase, as everything in JSON is."""

    @staticmethod
    def flaskpath2openapi(path: str) -> str:
        return re.sub(
            r"\{(\w+)\}", lambda m: f"{{{camel(m[1])}}}", FlaskPlugin.flaskpath2openapi(path)
        )

    def rule_to_params(self, rule: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = super().rule_to_params(rule)
        return [{**parameter, "name": camel(parameter["name"])} for parameter in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What an operation answers when all is well."""

    schema: type[Schema] | None
    status: int = 200
    about: str | None = None
    example: Any = None
    has_location: bool = False
    also: Mapping[int, tuple[type[Schema] | None, str]] = field(default_factory=dict)
    """Other statuses, with a body of their own or none, and what they mean."""
    text_example: str | None = None
    """Of an operation that answers with plain text: some of it."""
    stream_example: str | None = None
    """Of an operation that also answers with a stream of events: how one begins."""


class Blueprint(SmorestBlueprint):  # type: ignore[misc]
    """The operations on one resource."""

    ARGUMENTS_PARSER = Parser()

    def operation(
        self,
        method: str,
        rule: str,
        answers: Answers,
        *,
        query: Schema | type[Schema] | None = None,
        headers: type[Schema] | None = None,
        body: type[Schema] | None = None,
        definition: bool = False,
        example: Any = None,
        problems: Collection[int] | Mapping[int, str] = (),
        key: bool = True,
        signed: bool = False,
        starts: bool = False,
    ) -> Callable[[View], View]:
        """Declare a view: what it takes, what it answers, and so what it may refuse.

        The view gets the checked query, headers and body first, those it has, then what its path
        names; with `definition` it gets the document of a workflow, read but not checked.
        `problems` are what does not follow from the rest, perhaps with their meanings here.
        `signed`: it wants a signature instead of the key. `starts`: it starts a run, and gets the
        Idempotency-Key before all else, for `starting.start`; None if none was sent.
        """
        wants_proof = key or signed
        told = _told(problems, starts)
        meanings = {**MEANINGS, **told}

        def decorate(view: View) -> View:
            declared = self._answering(view, answers, starts)
            for status in _problems(rule, query or headers, body or definition, told, wants_proof):
                declared = self.alt_response(
                    status, schema=Problem, content_type=PROBLEM, description=meanings[status]
                )(declared)
            # The last one's argument comes first.
            for location, schema in (("headers", headers), ("query", query)):
                if schema is not None:
                    declared = self.arguments(schema, location=location)(declared)
            if body is not None:
                required = not getattr(body, "MAY_BE_LEFT_OUT", False)
                declared = self.arguments(body, example=example, required=required)(declared)
            if definition:
                declared = self._reading_definition(declared, example)
            if starts:
                declared = self.arguments(KeyHeader, location="headers")(declared)
            more = _security(key, signed)
            declared = self.doc(operationId=f"{self.name}_{view.__name__}", **more)(declared)
            self.route(rule, methods=[method])(declared)
            return view

        return decorate

    def _answering(self, view: Any, answers: Answers, starts: bool) -> Any:
        for status, (schema, about) in answers.also.items():
            view = self.alt_response(status, schema=schema, success=True, description=about)(view)
        if answers.stream_example is not None:
            view = self.alt_response(
                answers.status,
                schema={"type": "string"},
                content_type=EVENT_STREAM,
                description=answers.about,
                example=answers.stream_example,
            )(view)
        text = answers.text_example
        return self.response(
            answers.status,
            answers.schema if text is None else {"type": "string"},
            content_type=None if text is None else TEXT,
            description=answers.about,
            example=answers.example if text is None else text,
            headers=(LOCATION if answers.has_location else {}) | (REPLAYED if starts else {}),
        )(view)

    def _reading_definition(self, view: Any, example: Any) -> Any:
        @wraps(view)
        def with_document(*args: Any, **kwargs: Any) -> Any:
            return view(read_definition(), *args, **kwargs)

        content = {"schema": WorkflowDefinition, "example": example}
        body = {"required": True, "content": {kind: content for kind in (JSON, *YAML)}}
        return self.doc(requestBody=body)(with_document)

    def _prepare_arguments_doc(self, doc: Any, doc_info: Any, **kwargs: Any) -> Any:
        """Drop what webargs says of its own errors: `operation` declares ours."""
        doc_info.get("arguments", {}).pop("responses", None)
        return super()._prepare_arguments_doc(doc, doc_info, **kwargs)


def _security(key: bool, signed: bool) -> dict[str, Any]:
    if signed:
        return {"security": [{name: [] for name in SIGNATURE_SCHEMES}]}
    return {} if key else {"security": []}


def _told(problems: Collection[int] | Mapping[int, str], starts: bool) -> dict[int, str]:
    """Return statuses with what they mean."""
    ours = {422: MEANINGS[422], **NOT_STARTED} if starts else {}
    if isinstance(problems, Mapping):
        return {**ours, **problems}
    return {**ours, **{status: MEANINGS[status] for status in problems}}


def _problems(
    rule: str, arguments: Any, body: Any, more: Collection[int], wants_proof: bool
) -> list[int]:
    """Return every error status that follows from how an operation is declared."""
    found = set(more)
    if wants_proof:
        found |= {401, 500, 503}
    if "<" in rule:
        found.add(404)
    if arguments is not None:
        found.add(422)
    if body:
        found |= {400, 413, 415, 422}
    return sorted(found)


def make_api(app: Flask) -> Api:
    """Attach the description to `app`."""
    app.url_map.converters.update(memory=MemoryId, run=RunId, task=TaskId)
    api = Api(
        app,
        spec_kwargs={
            "title": "opscore",
            "version": installed_version() or "0",
            "openapi_version": "3.1.0",
            "info": {"description": cleandoc(ABOUT)},
            "flask_plugin": _Paths(),
            "security": [{KEY_SCHEME: []}],
        },
    )
    api.spec.components.security_scheme(
        KEY_SCHEME, {"type": "http", "scheme": "bearer", "description": "The OPSCORE_API_KEY."}
    )
    for name, (header, about) in SIGNATURE_SCHEMES.items():
        scheme = {"type": "apiKey", "in": "header", "name": header, "description": about}
        api.spec.components.security_scheme(name, scheme)
    api.spec.components.schema(STEP_NAME, dict(STEP))
    for converter in (MemoryId, RunId, TaskId):
        api.register_converter(converter, lambda _: {"type": "string", "format": "uuid"})
    app.register_blueprint(_docs(api))
    return api


def _docs(api: Api) -> PlainBlueprint:
    docs = PlainBlueprint("docs", __name__)

    @docs.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(api.spec.to_dict())

    @docs.get("/")
    def root() -> Response:
        return redirect(url_for("docs.page"))

    @docs.get("/docs", strict_slashes=True)
    def page() -> Response:
        return _static("index.html")

    @docs.get("/docs/")
    def slash() -> Response:
        return redirect(url_for("docs.page"), 308)

    @docs.get("/docs/<name>")
    def file(name: str) -> Response:
        return _static(name)

    return docs


def _static(name: str) -> Response:
    response = send_from_directory(STATIC, name, conditional=True)
    response.headers["Content-Security-Policy"] = DOCS_POLICY
    response.headers["Cache-Control"] = "no-cache"
    return response
