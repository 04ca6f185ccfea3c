"""Request bodies: which media types are read, and how strictly.

JSON everywhere; YAML as well where a workflow definition is the body. What cannot be read at all is
400, another media type 415; what reads well but breaks the schema, or cannot be stored, is 422.
"""

import json
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any, NoReturn

from flask import Request, g, request
from gunicorn.http.errors import ParseException
from marshmallow import Schema, ValidationError, fields
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge

from opscore import json_values
from opscore.errors import InvalidRequest
from opscore.json_values import MAX_TEXT_BYTES
from web.errors import Refused, pointers

JSON = "application/json"
YAML = ("application/yaml", "application/x-yaml", "text/yaml")
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
"""How numbers are written in a query; Python reads 1_0 and Arabic digits, too."""


def read_json() -> Any:
    """Return the body of the request at hand, which must be JSON that can be stored.

    How large its parts may be is decided where each of them belongs.
    """
    value = _read(json_values.read_json, (JSON,))
    if faults := json_values.check_json(value, max_bytes=MAX_TEXT_BYTES):
        raise InvalidRequest(faults)
    g.body = value
    return value


def digest() -> str:
    """Return the SHA-256 of the request at hand: its method, its path, and what its JSON says.

    Spaces, the order of members and the spelling of characters make no difference.
    """
    said = [request.method, request.path, g.get("body")]
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_definition() -> Any:
    """Return the body of the request at hand, in JSON or YAML; not yet checked."""
    read = json_values.read_yaml if request.mimetype in YAML else json_values.read_json
    return _read(read, (JSON, *YAML))


def raw_body() -> bytes:
    """Return the body of the request at hand as it was sent."""
    try:
        body = request.get_data(cache=True)
    except ParseException as error:
        raise Refused(400, f"The body cannot be read. {error}") from None
    if request.content_length is None and len(body) >= (request.max_content_length or 0):
        raise RequestEntityTooLarge  # werkzeug cuts a chunked body off at the limit, silently
    return body


def _read(read: Callable[[bytes], Any], accepted: tuple[str, ...]) -> Any:
    _check_media_type(accepted)
    body = raw_body()
    if not body.strip():
        raise Refused(400, f"The request has no body; send one as Content-Type: {accepted[0]}.")
    try:
        return read(body)
    except ValueError as error:
        raise Refused(400, f"The body cannot be read. {error}") from None


def _check_media_type(accepted: tuple[str, ...]) -> None:
    if request.mimetype not in accepted:
        given = f"is {request.mimetype}" if request.mimetype else "has no Content-Type"
        wanted = " or ".join(accepted)
        raise Refused(415, f"The body {given}; send it as Content-Type: {wanted}.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(415, "A compressed body is not read; send it without Content-Encoding.")


class Parser(FlaskParser):
    """Fills the schemas of views: unknown members are errors, also in the query string."""

    DEFAULT_UNKNOWN_BY_LOCATION = {"json": None, "query": None}  # noqa: RUF012 - as in webargs

    def load_json(self, req: Request, schema: Schema) -> Any:
        if getattr(schema, "MAY_BE_LEFT_OUT", False) and not raw_body():
            return {}
        return read_json()

    def load_querystring(self, req: Request, schema: Schema) -> Any:
        numbers = {f.data_key for f in schema.load_fields.values() if isinstance(f, fields.Number)}
        for name, value in req.args.items(multi=True):
            if "\0" in value:
                raise InvalidRequest({f"/{name}": ["NUL characters (%00) mean nothing here."]})
            if name in numbers and not _NUMBER.fullmatch(value):
                raise InvalidRequest({f"/{name}": ["Must be a number, such as 10."]})
        return super().load_querystring(req, schema)

    def handle_error(
        self,
        error: ValidationError,
        req: Request,
        schema: Schema,
        *,
        error_status_code: int | None,
        error_headers: Any,
    ) -> NoReturn:
        by_location: dict[str, Any] = error.messages_dict
        raise InvalidRequest(dict(pointers(*by_location.values())))
