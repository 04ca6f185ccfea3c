"""The demonstration of an LLM agent: start the stack, ask it, show each of its steps, stop.

    python -m examples.research.demo                    # three questions of its own
    python -m examples.research.demo "Who runs the bakery?"

It fails unless every question is answered; of its own ones also if the answers are not what they
must be, or the one that was asked before is not answered from memory.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.text import Text

if not __package__:  # run by its path
    sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples import demo
from examples.demo import Api, DemoFailed, Json, Stack
from examples.research import agents

WORKFLOW = "research"
QUESTIONS = (
    "How tall is the lighthouse, and who is its keeper in winter?",
    "Who decides whether the ferry sails?",
    "How tall is the lighthouse, and who is its keeper in winter?",
)
MUST_SAY = (("31 metres", "Ilse Marrow"), ("the harbour master",), ("31 metres", "Ilse Marrow"))
RUN_SECONDS = 120.0
"""For one question; a few seconds with the script."""
TOLD = ("task.model_replied", "task.tool_called")
SHOWN = 100
"""Characters of a result."""


def ask(console: Console, stack: Stack, api: Api, question: str) -> tuple[Json, list[Json]]:
    """Ask a question, show what the agent does while it does it; return the run and those steps."""
    console.print(f"\n{question}", style="bold", highlight=False)
    run_id = api.submit(WORKFLOW, {"question": question})
    steps: list[Json] = []
    for event in follow(stack, api, run_id):
        steps.append(event)
        for line in told(event):
            console.print(line, soft_wrap=True)
    run = api.run(run_id)
    if run["status"] != "completed":
        raise DemoFailed(f"The run ended as {run['status']}: {run['error']}")
    used = [one["data"] for one in steps if one["type"] == TOLD[0]]
    tokens = sum(one["inputTokens"] + one["outputTokens"] for one in used)
    cost = sum(one["costUsd"] or 0 for one in used)
    console.print(Text(run["output"]["answer"], "green"), soft_wrap=True)
    sources = ", ".join(run["output"]["sources"])
    console.print(
        Text(f"From {sources or 'nowhere'}; {len(used)} replies, {tokens:,} tokens, ${cost:.4f}"),
        soft_wrap=True,
    )
    return run, steps


def follow(stack: Stack, api: Api, run_id: str) -> Iterator[Json]:
    """Yield the agent's steps as they happen, until the run is over."""
    after, until = 0, monotonic() + RUN_SECONDS
    while True:
        is_over = api.run(run_id)["status"] in demo.ENDED
        page = api.ask("GET", f"/runs/{run_id}/events", params={"after": after})
        after = page["nextAfter"]
        yield from (event for event in page["items"] if event["type"] in TOLD)
        if is_over and not page["items"]:
            return
        if monotonic() > until:
            raise DemoFailed(f"Run {run_id} was not over within {RUN_SECONDS:g} s.")
        stack.check()


def told(event: Json) -> Iterator[Text]:
    """Return the lines that show a step."""
    data = event["data"]
    if event["type"] == TOLD[1]:
        mark, style = ("✘", "red") if data["isError"] else ("✔", "dim")
        yield Text(f"    {mark} {data['tool']}: {_short(data['result'])}", style)
        return
    usage = f"{data['inputTokens']:,} + {data['outputTokens']:,} tokens"
    yield Text(f"  {data['model']} ({usage}) {_short(data['text'])}".rstrip(), "cyan")
    for call in data["calls"]:
        yield Text(f"    → {call['tool']}({_short(json.dumps(call['arguments']))})")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def check(answers: Sequence[tuple[Json, list[Json]]]) -> None:
    """Make sure of the answers to the demonstration's own questions.

    Raises:
        DemoFailed
    """
    for (run, _), words in zip(answers, MUST_SAY, strict=True):
        if missing := [word for word in words if word not in run["output"]["answer"]]:
            raise DemoFailed(f"{run['output']!r} does not say {missing[0]!r}.")
    read = [one["data"].get("tool") == "read_document" for one in answers[-1][1]]
    if any(read):
        raise DemoFailed("What was asked before was not answered from memory.")


def main(questions: Sequence[str]) -> int:
    """Ask these questions, or the demonstration's own, and return the exit status."""

    def play(console: Console, stack: Stack) -> None:
        env = demo.start(console, stack, [WORKFLOW])
        with closing(Api(env, stack)) as api:
            answers = [ask(console, stack, api, one) for one in questions or QUESTIONS]
        if not questions:
            check(answers)

    options = {
        "agents": "examples.research.agents",
        "workflows": Path(__file__).parent / "workflows",
    }
    stack = Stack(demo.REPORTS / "agent.log", **options)
    if agents.SERVERS:  # they are started with the `python` of this environment
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        servers = Path(__file__).parent / "mcp.yaml"
        stack.environment = {"PATH": path, "OPSCORE_MCP_CONFIG": str(servers)}
    return demo.perform(play, stack)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
