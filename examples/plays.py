"""Three plays on the stage that `demo.py` has: triage, research and incident.

    python -m examples.plays            # all of them
    python -m examples.plays triage     # one of them

Each submits runs of its workflow, does what people do with them (approve, reject), and shows what
came of it. It fails unless that is what it must be.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

if not __package__:  # run by its path
    sys.path.append(str(Path(__file__).resolve().parent.parent))
from examples import demo, incident_response, nightly_research, support_triage
from examples.demo import Api, DemoFailed, Json, Stack
from examples.fleet import Fleet

AGENTS = (
    "examples.support_triage,examples.nightly_research,examples.incident_response,examples.mail"
)
WORKFLOWS = ("support-triage", "nightly-research", "incident-response")
RUN_SECONDS = 60.0
"""For one run, or for what is waited for in it; a few seconds on two cores."""


class Stage(NamedTuple):
    """What a play has to hand."""

    console: Console
    stack: Stack
    api: Api
    env: Mapping[str, str]

    def say(self, words: str) -> None:
        self.console.print(words, highlight=False, soft_wrap=True)

    def submit(self, workflow: str, value: Json, **more: Any) -> str:
        """Start a run and return its id."""
        run = self.api.ask("POST", "/runs", json={"workflowId": workflow, "input": value, **more})
        self.say(f"\nRun {run['runId']} of {workflow} is {_standing(run)}.")
        return str(run["runId"])

    def asked(self, run_id: str) -> Json:
        """Return the task of a run that waits for somebody's word, once one does."""
        found: list[Json] = []

        def is_asked() -> bool:
            tasks = self.api.run(run_id)["tasks"]
            found[:] = [task for task in tasks if task["reason"] == "approval"]
            return bool(found)

        self.stack.wait_until(is_asked, RUN_SECONDS, f"Run {run_id} asked nobody")
        self.say(f"  {found[0]['taskDefinitionId']}: {found[0]['waitingFor']}")
        return found[0]

    def finished(self, run_id: str) -> Json:
        """Wait for a run to end, show its tasks and return it; DemoFailed unless it completed."""
        runs: list[Json] = []

        def is_over() -> bool:
            runs[:] = [self.api.run(run_id)]
            return runs[0]["status"] in demo.ENDED

        self.stack.wait_until(is_over, RUN_SECONDS, f"Run {run_id} was not over")
        table = demo.table("  Task", "Status", "Done by", "Came to")
        for task in runs[0]["tasks"]:
            if task["index"] is None:
                table.add_row(*_row(task))
        self.console.print(table)
        if runs[0]["status"] != "completed":
            raise DemoFailed(f"The run ended as {runs[0]['status']}: {runs[0]['error']}")
        return runs[0]


def _row(task: Json) -> tuple[str, Text, str, str]:
    status = Text(_standing(task), demo.colour(task["status"]))
    items = task["items"] or {}
    came_to = (task["error"] or {}).get("message", "")
    if items:
        came_to = f"{items['completed']} of {items['total']} items, {items['failed']} failed"
    done_by = task["agentId"] or task["agentCapability"] or task["type"]
    return f"  {task['taskDefinitionId']}", status, done_by, came_to


def _standing(one: Json) -> str:
    return f"{one['status']} ({one['reason']})" if one["reason"] else str(one["status"])


def _must_be(wanted: Any, found: Any) -> None:
    if found != wanted:
        raise DemoFailed(f"{found!r} is not {wanted!r}, which it must be.")


# --- The plays


def triage(stage: Stage) -> None:
    """Draft a reply twice: once it is approved, once it is rejected."""
    value = {"tickets": support_triage.SAMPLE, "folder": str(demo.REPORTS / "outbox")}
    for word, comment, way in [
        ("approve", "Fine.", "sent"),
        ("reject", "Ask them for the request id first.", "escalated"),
    ]:
        run_id = stage.submit("support-triage", value)
        task = stage.asked(run_id)
        stage.say(f"  {word}: {comment}")
        stage.api.ask("POST", f"/tasks/{task['taskId']}/{word}", json={"comment": comment})
        output = stage.finished(run_id)["output"]
        stage.say(f"  {output['ticketId']} was {output['way']}: {output['mail']['file']}")
        _must_be(way, output["way"])


def research(stage: Stage) -> None:
    """Study 200 stations, of which 15 are broken, in a second from now."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    value = {"stations": nightly_research.sample()}
    run_id = stage.submit("nightly-research", value, startAt=soon.isoformat())
    output = stage.finished(run_id)["output"]
    stage.say(f"  {output['text']}")
    _must_be((185, 15), (output["studied"], len(output["leftOut"])))


def incident(stage: Stage) -> None:
    """Have three incidents analysed: a bad one, none at all, and one when the analyst is dead."""
    names = ("OPSCORE_API_URL", "OPSCORE_API_KEY", "OPSCORE_WEBHOOK_SECRET")
    with Fleet(*(stage.env[name] for name in names)) as fleet:
        fleet.register(fleet.add("analyst", incident_response.Analyst))
        _respond(stage, bad=True, by="analyst")
        _respond(stage, bad=False, by="analyst")
    stage.say("\nThe analyst dies, and after a second of silence is not asked any more.")
    stage.api.ask("PATCH", "/agents/analyst", json={"heartbeatSeconds": 1})

    def is_away() -> bool:
        return not stage.api.ask("GET", "/agents/analyst")["available"]

    stage.stack.wait_until(is_away, RUN_SECONDS, "The analyst's silence was not noticed")
    _respond(stage, bad=True, by="stand-in-analyst")


def _respond(stage: Stage, *, bad: bool, by: str) -> None:
    value = {"logs": incident_response.sample(bad=bad), "folder": str(demo.REPORTS / "outbox")}
    output = stage.finished(stage.submit("incident-response", value))["output"]
    stage.say(f"  Severity {output['severity']}, says {output['analysedBy']}: {output['summary']}")
    _must_be((by, bad), (output["analysedBy"], output["page"] is not None))


PLAYS: Mapping[str, Callable[[Stage], None]] = {
    "triage": triage,
    "research": research,
    "incident": incident,
}


def main(names: Sequence[str]) -> int:
    """Play the plays of these names, or all of them, and return the exit status."""
    if unknown := set(names) - set(PLAYS):
        print(f"There is no {', '.join(sorted(unknown))}; there are {', '.join(PLAYS)}.")
        return 2

    def play(console: Console, stack: Stack) -> None:
        env = demo.start(console, stack, WORKFLOWS)
        with closing(Api(env, stack)) as api:
            for name in names or PLAYS:
                PLAYS[name](Stage(console, stack, api, env))

    options = {"agents": AGENTS, "workflows": demo.ROOT / "examples"}
    return demo.perform(play, Stack(demo.REPORTS / "plays.log", **options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
