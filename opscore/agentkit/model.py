"""What the loop and models say to each other: messages, tool calls, replies; and how models fail.

A model is one method, `complete`. Nothing of a provider's format is known here; what a provider
wants to see again of its own reply travels in `Reply.native`, unread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Call:
    """A model asks for a tool. `arguments` is an object, or the text it wrote if that is none."""

    id: str
    """Its own among the calls of one reply at least."""
    tool: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call, in the words the model gets."""

    call_id: str
    tool: str
    content: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What one or more replies took. `cost_usd` is None where no price is known."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered: text, calls, or both."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    """The full name of who answered, such as `openai:gpt-5`; a fallback's where that was asked."""
    native: Any = None
    """JSON that the same model's adapter wants to see again; other models' adapters ignore it."""
    is_cut: bool = False
    """The model stopped at its limit of tokens."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What we say to a model: the goal, or what was wrong with its answer."""

    text: str


Message = Ask | Reply | Result


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model sees it. `parameters` is a JSON Schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model. Each call of a `Reply` in it is followed by its `Result`."""

    instructions: str
    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    max_output_tokens: int | None = None
    timeout_seconds: float = 120.0


class Model(Protocol):
    """One model of one provider."""

    @property
    def name(self) -> str:
        """`provider:model`."""

    async def complete(self, request: Request) -> Reply:
        """Answer.

        Raises:
            ModelError: one of those below.
        """


class ModelError(Exception):
    """A model gave no answer. `code` is stored with the attempt, the message too."""

    code = "model_error"


class ModelBusy(ModelError):
    """Rate limited, or overloaded: asked again later. `retry_after` is in seconds."""

    code = "model_busy"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class ModelAway(ModelError):
    """No sound answer came: a fault of the server or network, silence, or garbage."""

    code = "model_unavailable"


class ModelRefused(ModelError):
    """The provider will answer this no better another time: a bad key, a bad request."""

    code = "model_refused"
