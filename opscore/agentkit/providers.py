"""Models of OpenAI, Anthropic, Google and OpenRouter: what is said, how they answer and fail.

The formats are pydantic-ai's model classes, without its agent loop, imported where such a model is
made and nowhere before. Nothing is asked twice from here: `asking` says when. Replies come whole:
streaming is not used. OpenAI is spoken to by Chat Completions, not by Responses: it keeps nothing
at OpenAI, and is what gateways and servers of one's own speak behind `OPENAI_BASE_URL`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING, Any

from opscore.agentkit.llm import KEYS, missing_package
from opscore.agentkit.model import (
    Ask,
    Call,
    Message,
    ModelAway,
    ModelBusy,
    ModelError,
    ModelRefused,
    Reply,
    Request,
    Result,
    Usage,
)
from opscore.agentkit.redaction import redacted
from opscore.errors import ConfigurationError

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from openai import AsyncOpenAI
    from pydantic_ai.messages import (
        ModelMessage,
        ModelRequestPart,
        ModelResponse,
        ModelResponsePart,
    )
    from pydantic_ai.models import Model as LibraryModel
    from pydantic_ai.models import ModelRequestParameters

BASE_URLS: Mapping[str, tuple[str, str]] = {
    "openai": ("OPENAI_BASE_URL", "https://api.openai.com/v1"),
    "anthropic": ("ANTHROPIC_BASE_URL", "https://api.anthropic.com"),
    "google": ("GOOGLE_GEMINI_BASE_URL", "https://generativelanguage.googleapis.com"),
    "openrouter": ("OPENROUTER_BASE_URL", "https://openrouter.ai/api/v1"),
}
"""Provider -> the environment variable that may hold another address for it, and its own."""

CONNECT_SECONDS = 10.0
"""A provider that takes no connection within this is away, however long a reply may take."""
ANTHROPIC_MAX_TOKENS = 20_000
"""Of a reply, where nothing is said: Anthropic wants a limit, and longer replies to be streamed."""
MAX_TOKENS = 1_000_000_000
"""Of one reply, whatever it says."""
UNREADABLE = "unreadable_arguments"
"""Stands for what a model wrote as arguments that is no object, when it is shown that again."""
_PORTABLE_ID = re.compile(r"[A-Za-z0-9_-]{1,40}")
"""Ids of calls that all providers take."""
_UNFIT_FOR_NAMES = re.compile(r"[^A-Za-z0-9_-]")
_COME_AGAIN = (408, 409, 425)
"""Statuses below 500 of requests that may fare better another time."""


def model_of(name: str, environment: Mapping[str, str]) -> "Hosted":
    """Return the model called `provider:model`, with key and address from an environment.

    Raises:
        ConfigurationError: there is no key, or what the extra `agents` brings is not installed.
    """
    provider, _, model = name.partition(":")
    if (fault := missing_package(name)) is not None:
        raise ConfigurationError([fault])
    key = next((environment[one] for one in KEYS[provider] if environment.get(one)), None)
    if key is None:
        raise ConfigurationError([f"{name}: {' or '.join(KEYS[provider])} is not set"])
    return Hosted(name, model, key, _MAKERS[provider], environment)


class Hosted:
    """A model at a provider. It belongs to the event loop that it is first asked in."""

    def __init__(
        self,
        name: str,
        model: str,
        key: str,
        make: "_Maker",
        environment: Mapping[str, str],
    ) -> None:
        # One to three seconds the first time, which are not to count as waiting for an answer.
        import_module(f"pydantic_ai.models.{name.partition(':')[0]}")
        self.name = name
        self._model, self._key, self._make, self._environment = model, key, make, environment
        self._made: tuple[AsyncClient, LibraryModel] | None = None

    async def complete(self, request: Request) -> Reply:
        """Answer; see `model.Model`."""
        try:
            return await self._complete(request)
        except ModelError as error:
            failure = error
        except Exception as fault:
            failure = self._failure(fault)
        # What the library raised holds requests, with keys in them, and goes no further.
        failure.__context__ = failure.__cause__ = None
        raise failure.with_traceback(None)

    async def close(self) -> None:
        """Close its connections."""
        if self._made is not None:
            await self._made[0].aclose()
            self._made = None

    async def _complete(self, request: Request) -> Reply:
        model = self._opened()
        messages = list(_told(request.messages, self.name))
        settings: dict[str, Any] = {"timeout": request.timeout_seconds}
        if self.name.startswith("anthropic:"):
            settings["max_tokens"] = ANTHROPIC_MAX_TOKENS
        if request.max_output_tokens is not None:
            settings["max_tokens"] = request.max_output_tokens
        limit = request.timeout_seconds
        try:
            # Theirs is a limit between two bytes, this is one of the whole.
            async with asyncio.timeout(limit):
                response = await model.request(messages, settings, _parameters(request))  # type: ignore[arg-type]
        except TimeoutError:
            raise ModelAway(f"{self.name} did not answer within {limit:g} s.") from None
        return self._reply(response)

    def _opened(self) -> "LibraryModel":
        if self._made is None:
            from httpx2 import Timeout
            from pydantic_ai.models import create_async_httpx2_client

            client = create_async_httpx2_client(timeout=Timeout(None, connect=CONNECT_SECONDS))
            provider = self.name.partition(":")[0]
            variable, own = BASE_URLS[provider]
            address = self._environment.get(variable) or own
            model = self._make(self._model, self._key, address, client, self._environment)
            self._made = client, model
        return self._made[1]

    def _reply(self, response: "ModelResponse") -> Reply:
        from pydantic_ai.messages import TextPart, ToolCallPart

        self._check_finish(response)
        parts = response.parts
        calls = tuple(
            Call(part.tool_call_id, part.tool_name, _arguments(part.args))
            for part in parts
            if isinstance(part, ToolCallPart)
        )
        return Reply(
            text="".join(part.content for part in parts if isinstance(part, TextPart)),
            calls=calls,
            usage=_usage(response),
            model=self.name,
            native=_native(response, calls),
            is_cut=response.finish_reason == "length",
        )

    def _check_finish(self, response: "ModelResponse") -> None:
        details = response.provider_details or {}
        if not (response.parts or response.finish_reason or response.usage.total_tokens):
            raise ModelAway(f"{self.name} gave no sound answer: there is nothing in it.")
        if response.finish_reason == "content_filter":
            said = details.get("refusal") or details.get("block_reason")
            said = said or details.get("finish_reason") or "content filter"
            raise ModelRefused(self._clean(f"{self.name} refused to answer: {said}"))
        if response.finish_reason == "error":
            said = details.get("finish_reason") or "error"
            raise ModelAway(self._clean(f"{self.name} broke off its answer: {said}"))

    # Errors

    def _failure(self, fault: Exception) -> ModelError:
        from pydantic_ai import exceptions as theirs

        status = getattr(fault, "status_code", None)
        if isinstance(fault, theirs.ModelTimeoutError):
            sentence = f"{self.name} took too long: {fault.phase or 'no answer'}."
        elif isinstance(fault, theirs.ModelConnectionError):
            sentence = f"{self.name} cannot be reached: {fault.message}"
        elif isinstance(fault, theirs.ModelHTTPError):
            sentence = f"{self.name} answered {status}: {_said(fault.body)}"
        elif isinstance(fault, theirs.UserError):
            sentence = f"{self.name} cannot be asked this: {fault}"
        elif isinstance(fault, theirs.AgentRunError):
            sentence = f"{self.name} gave no sound answer: {_first_line(fault)}"
        else:
            sentence = f"{self.name} gave no sound answer: {type(fault).__name__}."
        wait = _amount(getattr(fault, "retry_after", None))
        kind = _kind(fault, wait)
        sentence = self._clean(sentence)
        return ModelBusy(sentence, wait) if kind is ModelBusy else kind(sentence)

    def _clean(self, sentence: str) -> str:
        clean: str = redacted(" ".join(sentence.split()), [self._key])
        return clean


def _kind(fault: Exception, wait: float | None) -> type[ModelError]:
    """Say which of our errors one of theirs is."""
    from pydantic_ai import exceptions as theirs

    if isinstance(fault, theirs.ModelRateLimitError | theirs.ModelOverloadedError):
        return ModelBusy
    if isinstance(fault, theirs.ModelQuotaExceededError):
        # A spent day at Google passes; an empty account does not.
        return ModelBusy if wait is not None else ModelRefused
    if isinstance(fault, theirs.ModelRequestRejectedError | theirs.UserError):
        return ModelRefused
    status = getattr(fault, "status_code", 500)
    if status >= 500 and wait is not None:
        return ModelBusy
    return ModelAway if status >= 500 or status in _COME_AGAIN else ModelRefused


def _said(body: object) -> str:
    """Return the provider's sentence from the body of an error."""
    for _ in range(3):
        if not isinstance(body, Mapping):
            break
        body = body.get("error", body.get("message", ""))
    return str(body or "no reason given")


def _first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), "")


def _amount(value: object) -> float | None:
    is_one = isinstance(value, int | float) and isfinite(value) and value >= 0
    return float(value) if is_one else None  # type: ignore[arg-type]


# --- What is said to them -------------------------------------------------------------------------


def _parameters(request: Request) -> "ModelRequestParameters":
    from pydantic_ai.messages import InstructionPart
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.tools import ToolDefinition

    # Not strict: a schema reaches the model as it is written, and its answer is checked here.
    tools = [
        ToolDefinition(
            name=tool.name,
            description=tool.description,
            parameters_json_schema=dict(tool.parameters),
            strict=False,
        )
        for tool in request.tools
    ]
    instructions = [InstructionPart(content=request.instructions)] if request.instructions else []
    return ModelRequestParameters(function_tools=tools, instruction_parts=instructions)


def _told(messages: Sequence[Message], name: str) -> "Iterator[ModelMessage]":
    """Tell the story as messages of the library, for the model of a name."""
    from pydantic_ai.messages import ModelRequest

    ids: dict[str, str] = {}
    for is_reply, group in groupby(messages, lambda one: isinstance(one, Reply)):
        if not is_reply:
            yield ModelRequest([_part(one, ids) for one in group])
            continue
        for reply in group:
            assert isinstance(reply, Reply)
            own = _again(reply) if reply.model == name else None
            ids = {call.id: call.id if own else _portable_id(call.id) for call in reply.calls}
            yield own or _rebuilt(reply, ids)


def _part(message: Message, ids: Mapping[str, str]) -> "ModelRequestPart":
    from pydantic_ai.messages import ToolReturnPart, UserPromptPart

    if isinstance(message, Result):
        return ToolReturnPart(
            _portable_name(message.tool),
            message.content,
            ids.get(message.call_id, message.call_id),
            outcome="failed" if message.is_error else "success",
        )
    assert isinstance(message, Ask)
    return UserPromptPart(message.text)


def _again(reply: Reply) -> "ModelResponse | None":
    """Return a reply as its model gave it, if that is known and can still be read."""
    from pydantic import ValidationError
    from pydantic_ai.messages import ModelMessagesTypeAdapter, ModelResponse

    if reply.native is None:
        return None
    try:
        (response,) = ModelMessagesTypeAdapter.validate_python(reply.native)
    except (ValidationError, ValueError):  # of another version of the library
        return None
    return response if isinstance(response, ModelResponse) else None


def _rebuilt(reply: Reply, ids: Mapping[str, str]) -> "ModelResponse":
    """Make a reply from its text and calls, such that any provider takes it."""
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart

    parts: list[ModelResponsePart] = [TextPart(reply.text)] if reply.text.strip() else []
    for call in reply.calls:
        is_object = isinstance(call.arguments, dict)
        arguments = call.arguments if is_object else {UNREADABLE: str(call.arguments)}
        parts.append(ToolCallPart(_portable_name(call.tool), arguments, ids[call.id]))
    return ModelResponse(parts)


def _portable_id(id: str) -> str:
    if _PORTABLE_ID.fullmatch(id):
        return id
    return f"call_{sha256(id.encode(errors='replace')).hexdigest()[:32]}"


def _portable_name(tool: str) -> str:
    """Return the name of a tool, also of one that a model made up, as all providers take it."""
    return _UNFIT_FOR_NAMES.sub("_", tool)[:64] or "_"


# --- What they say ------------------------------------------------------------------------------


def _arguments(written: str | Mapping[str, Any] | None) -> Any:
    """Return an object, or the text that should have been one."""
    if not isinstance(written, str):
        return dict(written or {})
    if not written.strip():
        return {}
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return value if isinstance(value, dict) else written


def _usage(response: "ModelResponse") -> Usage:
    def counted(tokens: int) -> int:
        return min(max(tokens, 0), MAX_TOKENS)

    used = response.usage
    cost = _amount(_cost(response))
    return Usage(counted(used.input_tokens), counted(used.output_tokens), cost)


def _cost(response: "ModelResponse") -> float | None:
    """Return what OpenRouter says it took, else what the library's table of prices comes to."""
    details = response.provider_details or {}
    if response.provider_name == "openrouter" and "cost" in details:
        upstream = details.get("upstream_inference_cost") if details.get("is_byok") else None
        return float(details["cost"]) + float(upstream or 0.0)
    try:
        return float(response.cost().total_price)
    except (LookupError, ValueError, AssertionError):
        return None


def _native(response: "ModelResponse", calls: Sequence[Call]) -> Any:
    """Return what the model must see again as it was; None if text and calls say it all."""
    from pydantic_ai.messages import ModelMessagesTypeAdapter

    is_sound = all(
        isinstance(call.arguments, dict) and _portable_name(call.tool) == call.tool
        for call in calls
    )
    if not is_sound or all(map(_is_plain, response.parts)):
        return None
    return ModelMessagesTypeAdapter.dump_python([response], mode="json")


def _is_plain(part: "ModelResponsePart") -> bool:
    from pydantic_ai.messages import TextPart, ToolCallPart

    return isinstance(part, TextPart | ToolCallPart) and not part.provider_details


# --- The four -----------------------------------------------------------------------------------

_Maker = Callable[[str, str, str, "AsyncClient", Mapping[str, str]], "LibraryModel"]
"""From the model's name, key, address, HTTP client and the environment."""


def _openai(
    model: str, key: str, address: str, client: "AsyncClient", environment: Mapping[str, str]
) -> "LibraryModel":
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    sdk = _openai_sdk(key, address, client)
    sdk.organization = environment.get("OPENAI_ORG_ID")
    sdk.project = environment.get("OPENAI_PROJECT_ID")
    return OpenAIChatModel(model, provider=OpenAIProvider(openai_client=sdk))


def _openrouter(
    model: str, key: str, address: str, client: "AsyncClient", _environment: Mapping[str, str]
) -> "LibraryModel":
    from pydantic_ai.models.openrouter import OpenRouterModel
    from pydantic_ai.providers.openrouter import OpenRouterProvider

    sdk = _openai_sdk(key, address, client)
    sdk._custom_headers = {}  # those of OPENAI_CUSTOM_HEADERS
    return OpenRouterModel(model, provider=OpenRouterProvider(openai_client=sdk))


def _openai_sdk(key: str, address: str, client: "AsyncClient") -> "AsyncOpenAI":
    from openai import AsyncOpenAI

    sdk = AsyncOpenAI(api_key=key, base_url=address, http_client=client, max_retries=0)
    # It has taken these from the process's environment, also where it speaks to OpenRouter, and
    # takes them again in each copy of itself, so that pydantic-ai must have no reason to make one.
    sdk.organization = sdk.project = None
    return sdk


def _anthropic(
    model: str, key: str, address: str, client: "AsyncClient", _environment: Mapping[str, str]
) -> "LibraryModel":
    from anthropic import AsyncAnthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    sdk = AsyncAnthropic(api_key=key, base_url=address, http_client=client, max_retries=0)
    return AnthropicModel(model, provider=AnthropicProvider(anthropic_client=sdk))


def _google(
    model: str, key: str, address: str, client: "AsyncClient", _environment: Mapping[str, str]
) -> "LibraryModel":
    from google.genai.types import HttpRetryOptions
    from pydantic_ai.models.google import GoogleModel
    from pydantic_ai.providers.google import GoogleProvider

    once = HttpRetryOptions(attempts=1)
    provider = GoogleProvider(api_key=key, base_url=address, http_client=client, retry_options=once)
    return GoogleModel(model, provider=provider)


_MAKERS: Mapping[str, _Maker] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "google": _google,
    "openrouter": _openrouter,
}
