"""The loop of an LLM agent: goal → reply → tool calls → reply → ... → an answer that fits.

Every step is stored before the next begins, so that whoever starts the loop anew goes on behind the
last one. Nothing is done twice but what was under way: a question to a model, or calls of tools
that are not `once`. Of a `once` call that was under way nobody knows whether it happened, and
somebody is asked.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

from opscore.agentkit.asking import ask
from opscore.agentkit.context import Context, storable_text
from opscore.agentkit.llm import FINAL_ANSWER, LLMAgent
from opscore.agentkit.model import (
    Ask,
    Call,
    Message,
    Model,
    Reply,
    Request,
    Result,
    ToolSpec,
)
from opscore.agentkit.redaction import MAX_CALL_TEXT, MAX_CHARACTERS, is_shown_whole
from opscore.agentkit.steps import Asked, Began, Decided, Record, Step, total
from opscore.agentkit.tools import AnyTool, ToolFault, Unsure, cut
from opscore.agentkit.window import fitted
from opscore.errors import AgentBusy, GiveUp

MAX_TEXT_BYTES = 256 * 1024
"""Of a reply's text, and of the arguments of each of its calls."""
MAX_CALLS = 32
"""In one reply."""


SETTLED_BY_RECORD = (
    *("invalid_answer", "empty_answer", "answer_cut"),
    *("max_steps", "max_tokens", "max_cost"),
    *("invalid_output", "output_too_large"),
)
"""Codes of failures to which the same record would always lead again."""


class Stopped(GiveUp):
    """The agent did not come to an answer; `code` says why. What it did is in the record."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code  # type: ignore[misc]
        super().__init__(reason)


class NeedsApproval(Exception):
    """The agent can go on when somebody has decided a call; its record says which."""


# --- Planning ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """What a planner sees of the work."""

    goal: str
    """The goal, and what else the task was given."""
    steps: Sequence[Step]
    agent: LLMAgent
    tools: Sequence[ToolSpec]


@dataclass(frozen=True, slots=True)
class Answer:
    """The work is done."""

    value: Any


@dataclass(frozen=True, slots=True)
class Act:
    """Calls to be made before the model is asked again."""

    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Question:
    """What the model is to be asked next."""

    messages: Sequence[Message]


Turn = Answer | Act | Question


class Planner(Protocol):
    """Says what comes next. It keeps nothing: all that happened is in the view."""

    def next(self, view: View) -> Turn:
        """Return the next turn.

        Raises:
            Stopped: there is none.
        """


class React:
    """Reason and act: whatever the model calls is done, and its first answer that fits is taken."""

    def next(self, view: View) -> Turn:
        messages, faults, newest = _story(view)
        if newest is None:
            return Question(messages)
        if newest.open:
            return Act(newest.open)
        if newest.is_answer and newest.fault is None:
            return Answer(newest.value)
        if newest.fault is not None and faults > view.agent.limits.corrections:
            raise Stopped(newest.code, newest.fault)
        return Question(messages)


REACT = React()


@dataclass(frozen=True, slots=True)
class _Newest:
    """The newest reply, and what is to be made of it."""

    open: Sequence[Call] = ()
    """Its calls without a result."""
    value: Any = None
    is_answer: bool = False
    fault: str | None = None
    """Why its answer cannot be taken."""
    code: str = "invalid_answer"


def _story(view: View) -> tuple[list[Message], int, _Newest | None]:
    """Tell the work as messages; return also how many answers were none, and the newest reply."""
    messages: list[Message] = [Ask(view.goal)]
    faults, newest = 0, None
    for reply, results in turns(view.steps):
        newest = _read(view.agent, reply, results)
        faults += newest.fault is not None
        messages.append(reply)
        messages += [results[call.id] for call in reply.calls if call.id in results]
        if newest.fault is not None:
            messages += _correction(reply, results, newest.fault)
    return messages, faults, newest


def turns(steps: Sequence[Step]) -> list[tuple[Reply, dict[str, Result]]]:
    """Return each reply with the results of its calls, by call id."""
    told: list[tuple[Reply, dict[str, Result]]] = []
    for step in steps:
        match step:
            case Reply():
                told.append((step, {}))
            case Result():
                told[-1][1][step.call_id] = step
    return told


def _read(agent: LLMAgent, reply: Reply, results: Mapping[str, Result]) -> _Newest:
    """Say what a reply comes to."""
    final = next((call for call in reply.calls if call.tool == FINAL_ANSWER), None)
    if final is not None and agent.answer is not None:
        return _checked(agent, _unwrapped(agent, final.arguments))
    if reply.calls:
        return _Newest(open=[call for call in reply.calls if call.id not in results])
    if reply.is_cut:
        return _Newest(fault="Your answer was cut off: it is too long.", code="answer_cut")
    if not reply.text.strip():
        return _Newest(fault="You answered nothing.", code="empty_answer")
    if agent.answer is None:
        return _Newest(value=reply.text, is_answer=True)
    return _checked(agent, _parsed(reply.text))


def _checked(agent: LLMAgent, value: Any) -> _Newest:
    from opscore.json_values import check_json

    assert agent.answer is not None
    faults = check_json(value) or agent.answer.check(value, "")
    if not faults:
        return _Newest(value=value, is_answer=True)
    told = "; ".join(f"{at or 'as a whole'}: {' '.join(said)}" for at, said in faults.items())
    told = told.replace("inputSchema", "the schema")
    return _Newest(fault=cut(f"Your answer does not fit. {told}", 2048))


def _parsed(text: str) -> Any:
    stripped = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return text


def _correction(reply: Reply, results: Mapping[str, Result], fault: str) -> list[Message]:
    """Tell the model what was wrong; each of its calls must have a result."""
    way = "Give the whole answer again."
    if not reply.calls:
        return [Ask(f"{fault} {way}")]
    untold = [call for call in reply.calls if call.id not in results]
    return [
        Result(
            call.id, call.tool, f"{fault} {way}" if call.tool == FINAL_ANSWER else NOT_DONE, True
        )
        for call in untold
    ]


UNKNOWN = "It is not known whether this call had its effect."
TOO_LARGE_TO_SHOW = (
    "Not asked for: somebody must read all of this call before it is made, and there is too much"
    f" of it. A text may have {MAX_CALL_TEXT:,} characters, all of them {MAX_CHARACTERS:,}."
)
NOT_DONE = "Not done: you gave your final answer at the same time."


_SHARED: tuple[str, ...] = ("$defs", "definitions")
"""What references name from the top."""


def final_tool(agent: LLMAgent) -> ToolSpec | None:
    """Return the tool by which an agent with an output schema answers."""
    if agent.output_schema is None:
        return None
    schema: dict[str, Any] = dict(agent.output_schema)
    if not _is_object(schema):
        kept = {name: schema.pop(name) for name in _SHARED if name in schema}
        schema = {"type": "object", "required": ["answer"], "properties": {"answer": schema}}
        schema.update(kept)
    return ToolSpec(FINAL_ANSWER, "Give your final answer, when all is done.", schema)


def _is_object(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "object"


def _unwrapped(agent: LLMAgent, arguments: Any) -> Any:
    if _is_object(agent.output_schema or {}) or not isinstance(arguments, dict):
        return arguments
    return arguments.get("answer")


# --- Working -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt of an agent at a task, with all it needs."""

    agent: LLMAgent
    goal: str
    context: Context
    record: Record
    models: Sequence[Model]
    tools: Mapping[str, AnyTool]
    """All that it may call, those of MCP servers included."""
    planner: Planner = REACT


async def work(job: Job) -> Any:
    """Go on with a task until there is an answer, and return it.

    Raises:
        Stopped: there will be none.
        NeedsApproval: somebody has to decide first.
        AgentBusy, ModelError: no model gave a reply, now.
        Superseded: the attempt is over.
    """
    return await _Worker(job).work()


class _Worker:
    def __init__(self, job: Job) -> None:
        self._job, self._agent = job, job.agent
        self._steps = list(job.record.load())
        self._until = monotonic() + job.agent.limits.max_seconds
        own = [tool.spec for tool in job.tools.values()]
        final = final_tool(job.agent)
        self._specs = own if final is None else [*own, final]

    async def work(self) -> Any:
        while True:
            view = View(self._job.goal, tuple(self._steps), self._agent, self._specs)
            match self._job.planner.next(view):
                case Answer(value):
                    return value
                case Act(calls):
                    self._check_wanted()
                    await self._act(calls)
                case Question(messages):
                    self._check_wanted()
                    await self._ask(messages)

    def _check_wanted(self) -> None:
        """Leave off where nobody wants the result: its run was cancelled, or the attempt taken."""
        if self._job.context.cancelled:
            raise AgentBusy  # which uses up no attempt, should it be ours still

    def _add(self, step: Step) -> None:
        self._job.record.add(step)
        self._steps.append(step)

    # Asking

    async def _ask(self, messages: Sequence[Message]) -> None:
        self._check_limits()
        limits = self._agent.limits
        left = max(self._until - monotonic(), 0.1)
        request = Request(
            instructions=self._agent.instructions,
            messages=fitted(messages, limits.window_tokens, self._agent.instructions, self._specs),
            tools=self._specs,
            timeout_seconds=min(limits.call_seconds, left),
        )
        try:
            # All models and tries together; `ask` has none of its own.
            async with asyncio.timeout(left) as limit:
                reply = await ask(self._job.models, request)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._out_of_time() from None
        self._add(_bounded(reply))

    def _out_of_time(self) -> Stopped:
        sentence = f"No answer after {self._agent.limits.max_seconds:g} s (maxSeconds)."
        return Stopped("max_seconds", sentence)

    def _check_limits(self) -> None:
        limits = self._agent.limits
        replies = [step for step in self._steps if isinstance(step, Reply)]
        used = total([reply.usage for reply in replies])
        if len(replies) >= limits.max_steps:
            raise Stopped("max_steps", f"No answer after {len(replies)} replies (maxSteps).")
        if limits.max_tokens is not None and used.tokens >= limits.max_tokens:
            raise Stopped("max_tokens", f"No answer after {used.tokens:,} tokens (maxTokens).")
        if limits.max_cost_usd is not None and (used.cost_usd or 0.0) >= limits.max_cost_usd:
            sentence = f"No answer after {used.cost_usd or 0.0:.4f} USD (maxCostUsd)."
            raise Stopped("max_cost", sentence)
        if monotonic() >= self._until:
            raise self._out_of_time()
        if (fault := self._job.record.budget().fault) is not None:
            raise Stopped("budget_spent", fault)

    # Acting

    async def _act(self, calls: Sequence[Call]) -> None:
        """Make the calls that can be made, all at once; then ask about the first that cannot."""
        waiting = [call for call in calls if not self._may_be_made(call)]
        ready = [call for call in calls if call not in waiting]
        if ready:
            await asyncio.gather(*map(self._call, ready))
        elif waiting:
            self._ask_somebody(waiting[0])
            raise NeedsApproval

    def _may_be_made(self, call: Call) -> bool:
        tool = self._job.tools.get(call.tool)
        if tool is None or self._decision(call) is not None:
            return True
        if self._is_unknown(call):
            return False
        return not tool.needs_approval(call.arguments) or self._is_too_large_to_show(call)

    @staticmethod
    def _is_too_large_to_show(call: Call) -> bool:
        """Whether somebody would decide what he cannot see: it is not asked for."""
        return not is_shown_whole(call.arguments, MAX_CALL_TEXT)

    def _since_reply(self) -> list[Step]:
        newest = max(n for n, step in enumerate(self._steps) if isinstance(step, Reply))
        return self._steps[newest + 1 :]

    def _is_unknown(self, call: Call) -> bool:
        """Whether the call was being made when everything stopped, and must not be made twice."""
        return Began(call.id) in self._since_reply()

    def _decision(self, call: Call) -> Decided | None:
        """Return what was said of a call, unless it was begun after that."""
        asked, decided = None, None
        for step in self._since_reply():
            match step:
                case Asked():
                    asked = step.call_id
                case Decided() if asked == call.id:
                    decided = step
                case Began(call_id) if call_id == call.id:
                    decided = None
        return decided

    def _ask_somebody(self, call: Call) -> None:
        since = self._since_reply()
        newest = next((s for s in reversed(since) if isinstance(s, Asked | Decided)), None)
        if not (isinstance(newest, Asked) and newest.call_id == call.id):
            self._add(Asked(call.id, call.tool, call.arguments, again=self._is_unknown(call)))

    async def _call(self, call: Call) -> None:
        tool = self._job.tools.get(call.tool)
        if tool is None:
            known = ", ".join(sorted(self._job.tools)) or "none"
            unknown = f" {UNKNOWN}" if self._is_unknown(call) else ""
            self._tell(call, f"There is no tool {call.tool!r}; there are: {known}.{unknown}")
            return
        decided = self._decision(call)
        if decided is not None and not decided.approved:
            self._tell(call, self._refusal(call, decided))
            return
        if decided is None and tool.needs_approval(call.arguments):
            self._tell(call, TOO_LARGE_TO_SHOW)
            return
        is_once = tool.is_once(call.arguments)
        if is_once:
            self._add(Began(call.id))
        try:
            result = await tool.call(call.arguments, self._job.context)
        except ToolFault as fault:
            unknown = f" {UNKNOWN}" if is_once and isinstance(fault, Unsure) else ""
            self._tell(call, f"{fault}{unknown}")
        else:
            self._add(Result(call.id, call.tool, result))

    def _refusal(self, call: Call, decided: Decided) -> str:
        comment = f" They say: {decided.comment}" if decided.comment else ""
        if self._is_unknown(call):
            return f"{UNKNOWN} It is not made again.{comment}"
        return f"Refused: this call was not allowed.{comment}"

    def _tell(self, call: Call, fault: str) -> None:
        text = storable_text(fault, MAX_TEXT_BYTES)
        self._add(Result(call.id, call.tool, text, is_error=True))


def _bounded(reply: Reply) -> Reply:
    """Return a reply that can be stored, and in which each call has an id of its own."""
    text = storable_text(reply.text, MAX_TEXT_BYTES)
    calls = tuple(_storable(call) for call in reply.calls[:MAX_CALLS])
    if len({call.id for call in calls}) < len(calls) or not all(call.id for call in calls):
        calls = tuple(replace(call, id=f"call-{n}") for n, call in enumerate(calls, 1))
    if text == reply.text and calls == reply.calls and _is_storable(reply.native):
        return reply
    is_cut = reply.is_cut or len(text) < len(reply.text)
    return replace(reply, text=text, calls=calls, native=None, is_cut=is_cut)


def _is_storable(value: Any, max_bytes: int = 8 * MAX_TEXT_BYTES) -> bool:
    from opscore.json_values import check_json

    return not check_json(value, max_bytes=max_bytes)


def _storable(call: Call) -> Call:
    arguments = call.arguments
    if not _is_storable(arguments, MAX_TEXT_BYTES):
        arguments = storable_text(arguments, 1024)
    return Call(storable_text(call.id, 256), storable_text(call.tool, 256), arguments)


def goal_of(parameters: Mapping[str, Any]) -> str:
    """Return what an agent is asked: `goal`, and all else a task was given as context.

    Raises:
        Stopped: there is no goal.
    """
    goal = parameters.get("goal")
    if not isinstance(goal, str) or not goal.strip():
        raise Stopped("no_goal", "parameters.goal must be a text: what the agent is to do.")
    rest = {name: value for name, value in parameters.items() if name != "goal"}
    if not rest:
        return goal
    return f"{goal}\n\nContext, as JSON:\n{json.dumps(rest, ensure_ascii=False)}"
