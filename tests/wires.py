"""The formats of the providers of models, as their references give them, and a server of them."""

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import time
from typing import Any


@dataclass
class Answer:
    """What the server answers."""

    body: Any
    """JSON, or bytes as they are."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    """The connection ends in the midst of the body."""
    drips: bool = False
    """A byte now and then, and never the last."""
    is_silent: bool = False
    """Nothing comes."""


@dataclass
class Seen:
    """A request as the server got it."""

    path: str
    headers: Mapping[str, str]
    body: Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.path, headers, json.loads(text)))
        told = self.server.answers
        answer = told.popleft() if len(told) > 1 else told[0]
        if answer.is_silent:
            self.server.let_go.wait(20)
            self.close_connection = True
            return
        with suppress(ConnectionError):  # who asked has gone
            self.answer(answer)

    def answer(self, answer: Answer) -> None:
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.close_connection = answer.cut or answer.drips
        self.send_response(answer.status)
        kept = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**kept, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.drips:
            for byte in data[:-1]:
                self.wfile.write(bytes([byte]))
                if self.server.let_go.wait(0.05):
                    return
        else:
            self.wfile.write(data[: len(data) // 2] if answer.cut else data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers with what it was told, the last of it for ever; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: deque[Answer] = deque()
        self.seen: list[Seen] = []
        self.let_go = threading.Event()
        """Ends answers that do not come."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def tell(self, *answers: Any) -> None:
        """Say what is answered from now on, and forget what was asked."""
        told = [one if isinstance(one, Answer) else Answer(one) for one in answers]
        self.answers, self.seen = deque(told), []

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.let_go.set()
            self.shutdown()
            self.server_close()
            thread.join()


Calls = Sequence[tuple[str, Any]]


class OpenAI:
    """Chat Completions."""

    model = "openai:gpt-4.1"
    key_name, url_name, url_path = "OPENAI_API_KEY", "OPENAI_BASE_URL", "/v1"
    path = "/v1/chat/completions"
    key_header, key_prefix = "authorization", "Bearer "
    cost = (1000 - 200) * 2e-6 + 200 * 0.5e-6 + 100 * 8e-6
    """In USD, of `text`: 1,000 tokens in, 200 of which were cached, and 100 out."""

    def text(self, text: str | None, finish: str = "stop", **message: Any) -> Any:
        return self._completion({"content": text, "refusal": None, **message}, finish)

    def calls(self, calls: Calls, text: str | None = None) -> Any:
        told = [
            {
                "id": f"call_Ab{n}",
                "type": "function",
                "function": {"name": tool, "arguments": _text(arguments)},
            }
            for n, (tool, arguments) in enumerate(calls)
        ]
        return self._completion(
            {"content": text, "refusal": None, "tool_calls": told}, "tool_calls"
        )

    def _completion(self, message: Any, finish: str) -> Any:
        return {
            "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
            "object": "chat.completion",
            "created": 1741569952,
            "model": "gpt-4.1-2025-04-14",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "annotations": [], **message},
                    "logprobs": None,
                    "finish_reason": finish,
                }
            ],
            "usage": {
                "prompt_tokens": 1000,
                "completion_tokens": 100,
                "total_tokens": 1100,
                "prompt_tokens_details": {"cached_tokens": 200, "audio_tokens": 0},
                "completion_tokens_details": {
                    "reasoning_tokens": 40,
                    "audio_tokens": 0,
                    "accepted_prediction_tokens": 0,
                    "rejected_prediction_tokens": 0,
                },
            },
            "service_tier": "default",
            "system_fingerprint": "fp_fc9f1d7035",
        }

    def error(self, status: int, message: str) -> Any:
        kinds = {401: "invalid_request_error", 429: "requests", 500: "server_error"}
        codes = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
        return {
            "error": {
                "message": message,
                "type": kinds.get(status, "invalid_request_error"),
                "param": None,
                "code": codes.get(status),
            }
        }

    def instructions(self, body: Any) -> str:
        return str(next(one["content"] for one in body["messages"] if one["role"] == "system"))

    def tools(self, body: Any) -> Mapping[str, Any]:
        return {
            one["function"]["name"]: one["function"]["parameters"] for one in body.get("tools", [])
        }

    def told_calls(self, body: Any) -> list[tuple[str, str, Any]]:
        """Return the calls that a request tells of: id, tool and arguments."""
        return [
            (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for one in body["messages"]
            for call in one.get("tool_calls") or []
        ]

    def told_results(self, body: Any) -> list[tuple[str, str]]:
        """Return the results that a request tells of: id and content."""
        return [
            (one["tool_call_id"], one["content"])
            for one in body["messages"]
            if one["role"] == "tool"
        ]


class OpenRouter(OpenAI):
    """Chat Completions, with OpenRouter's own fields."""

    model = "openrouter:anthropic/claude-sonnet-4.5"
    key_name, url_name, url_path = "OPENROUTER_API_KEY", "OPENROUTER_BASE_URL", "/api/v1"
    path = "/api/v1/chat/completions"
    cost = 0.0123

    def _completion(self, message: Any, finish: str) -> Any:
        told = super()._completion({"reasoning": None, **message}, finish)
        told.update(
            {"id": "gen-1762-AbC", "provider": "Anthropic", "model": "anthropic/claude-4.5-sonnet"}
        )
        told["choices"][0]["native_finish_reason"] = finish
        told["usage"].update({"cost": self.cost, "is_byok": False})
        return told

    def error(self, status: int, message: str) -> Any:
        return {"error": {"message": message, "code": status}, "user_id": "user_2"}


class Anthropic:
    """Messages."""

    model = "anthropic:claude-sonnet-5"
    key_name, url_name, url_path = "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", ""
    path = "/v1/messages"
    key_header, key_prefix = "authorization", "Bearer "
    cost = 700 * 2e-6 + 100 * 2.5e-6 + 200 * 0.2e-6 + 100 * 10e-6

    def text(self, text: str | None, finish: str = "stop") -> Any:
        reasons = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
        content = [{"type": "text", "text": text, "citations": None}] if text else []
        return self._message(content, reasons[finish])

    def calls(self, calls: Calls, text: str | None = None) -> Any:
        content: list[Any] = [{"type": "text", "text": text}] if text else []
        content += [
            {"type": "tool_use", "id": f"toolu_01A{n}", "name": tool, "input": arguments}
            for n, (tool, arguments) in enumerate(calls)
        ]
        return self._message(content, "tool_use")

    def _message(self, content: Any, reason: str) -> Any:
        return {
            "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-5",
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {
                "input_tokens": 700,
                "cache_creation_input_tokens": 100,
                "cache_read_input_tokens": 200,
                "output_tokens": 100,
                "service_tier": "standard",
            },
        }

    def error(self, status: int, message: str) -> Any:
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            429: "rate_limit_error",
            500: "api_error",
            529: "overloaded_error",
        }
        kind = {"type": kinds.get(status, "api_error"), "message": message}
        return {"type": "error", "error": kind, "request_id": "req_011CSHoEeqs5C35K2UUqR7Fy"}

    def instructions(self, body: Any) -> str:
        told = body["system"]
        return told if isinstance(told, str) else "".join(one["text"] for one in told)

    def tools(self, body: Any) -> Mapping[str, Any]:
        return {one["name"]: one["input_schema"] for one in body.get("tools", [])}

    def _blocks(self, body: Any, kind: str) -> list[Any]:
        contents = [one["content"] for one in body["messages"] if isinstance(one["content"], list)]
        return [block for content in contents for block in content if block["type"] == kind]

    def told_calls(self, body: Any) -> list[tuple[str, str, Any]]:
        told = self._blocks(body, "tool_use")
        return [(one["id"], one["name"], one["input"]) for one in told]

    def told_results(self, body: Any) -> list[tuple[str, str]]:
        return [
            (one["tool_use_id"], _flat(one["content"])) for one in self._blocks(body, "tool_result")
        ]


class Google:
    """generateContent of the Gemini API."""

    model = "google:gemini-2.5-flash"
    key_name, url_name, url_path = "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL", ""
    path = "/v1beta/models/gemini-2.5-flash:generateContent"
    key_header, key_prefix = "x-goog-api-key", ""
    cost = 800 * 0.3e-6 + 200 * 0.03e-6 + 100 * 2.5e-6

    def text(self, text: str | None, finish: str = "stop") -> Any:
        reasons = {"stop": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}
        return self._content([{"text": text}] if text else [], reasons[finish])

    def calls(self, calls: Calls, text: str | None = None) -> Any:
        parts: list[Any] = [{"text": text}] if text else []
        parts += [{"functionCall": {"name": tool, "args": arguments}} for tool, arguments in calls]
        return self._content(parts, "STOP")

    def _content(self, parts: Any, reason: str) -> Any:
        return {
            "candidates": [
                {
                    "content": {"parts": parts, "role": "model"} if parts else {"role": "model"},
                    "finishReason": reason,
                    "index": 0,
                }
            ],
            "usageMetadata": {
                "promptTokenCount": 1000,
                "cachedContentTokenCount": 200,
                "candidatesTokenCount": 60,
                "thoughtsTokenCount": 40,
                "totalTokenCount": 1100,
                "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}],
            },
            "modelVersion": "gemini-2.5-flash",
            "responseId": "mtBlaPqDLeKSvdIP2p6x0Qw",
        }

    def error(self, status: int, message: str) -> Any:
        names = {
            400: "INVALID_ARGUMENT",
            401: "UNAUTHENTICATED",
            429: "RESOURCE_EXHAUSTED",
            500: "INTERNAL",
        }
        return {
            "error": {"code": status, "message": message, "status": names.get(status, "UNKNOWN")}
        }

    def instructions(self, body: Any) -> str:
        return "".join(part["text"] for part in body["systemInstruction"]["parts"])

    def tools(self, body: Any) -> Mapping[str, Any]:
        return {
            one["name"]: one["parameters_json_schema"]
            for group in body.get("tools", [])
            for one in group["functionDeclarations"]
        }

    def _parts(self, body: Any, kind: str) -> list[Any]:
        parts = [part for content in body["contents"] for part in content["parts"]]
        return [part[kind] for part in parts if kind in part]

    def told_calls(self, body: Any) -> list[tuple[str, str, Any]]:
        return [
            (one.get("id", ""), one["name"], one["args"])
            for one in self._parts(body, "functionCall")
        ]

    def told_results(self, body: Any) -> list[tuple[str, str]]:
        return [
            (one.get("id", ""), _flat(one["response"]))
            for one in self._parts(body, "functionResponse")
        ]


Wire = OpenAI | Anthropic | Google
WIRES: Sequence[Wire] = (OpenAI(), Anthropic(), Google(), OpenRouter())


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _flat(content: Any) -> str:
    """Return the text of a result, whatever it is wrapped in."""
    if isinstance(content, str):
        return content
    inner = content.values() if isinstance(content, dict) else [one["text"] for one in content]
    return "".join(map(str, inner))


def in_seconds(seconds: float) -> str:
    """Return a moment as HTTP writes one."""
    return formatdate(time() + seconds, usegmt=True)
