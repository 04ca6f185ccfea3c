"""The fleet's play: runs through agents behind HTTP, of which a third is dead, deaf or lying.

Has a fleet (`fleet.py`) register with a stack of its own, sends runs through it, shows it live, and
judges what came of it: every run over as it must be, no slot held, no effect doubled or missing, no
lie believed. Starts and stops as `demo.py` does, and leaves as little behind.
"""

import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if not __package__:  # run by its path
    sys.path.append(str(Path(__file__).resolve().parent.parent))
from examples import demo
from examples.demo import Api, DemoFailed, Json, Line, Stack
from examples.fleet import LIE, TRUTH, Fleet, FleetFailed

PLAY_SECONDS = 80.0
"""For all runs to be over; about 15 on two cores."""
SETTLE_SECONDS = 10.0
"""After that, for slots to be free and agents to have ended."""
PARCELS = 3
"""Of one run."""

ROSTER: Sequence[tuple[str, str, Sequence[str], Json]] = [
    ("quick-1", "quick", ["sort", "pack"], {}),
    ("quick-2", "quick", ["weigh"], {"capacity": 4}),
    ("slow-1", "slow", ["sort"], {"seconds": 0.5}),
    ("slow-2", "slow", ["pack"], {"seconds": 0.8, "heartbeat_seconds": 0.3}),
    ("busy-1", "busy", ["sort"], {}),
    ("busy-2", "busy", ["pack"], {}),
    ("flaky-1", "flaky", ["pack"], {}),
    ("flaky-2", "flaky", [], {"faults": ["done, then cut"]}),
    ("deaf-1", "deaf", ["sort"], {}),
    ("dead-1", "dead", ["sort", "pack"], {}),
    ("dead-2", "dead", [], {"state": "error"}),
    ("lying-1", "lying", ["sort", "pack"], {}),
]

PATIENT: Json = {
    # Flaky agents fail each task a few times.
    "retry": {"maxAttempts": 6, "backoffSeconds": 0.2, "maxBackoffSeconds": 1},
    "busy": {"backoffSeconds": 0.5, "maxBackoffSeconds": 5, "maxWaitSeconds": 60},
    "timeoutSeconds": 5,
}
HASTY: Json = {"retry": {"maxAttempts": 2, "backoffSeconds": 0.2}, "timeoutSeconds": 1}


class Errand(NamedTuple):
    """A workflow, how often it is run, and how each run must end."""

    runs: int
    ends: str
    tasks: Mapping[str, Json]


ERRANDS: Mapping[str, Errand] = {
    "calls": Errand(2, "failed", {"call": {"agentId": "deaf-1", **HASTY}}),
    "visits": Errand(2, "failed", {"visit": {"agentId": "dead-1", **HASTY}}),
    "letters": Errand(4, "completed", {"stamp": {"agentId": "busy-1", **PATIENT}}),
    "parcels": Errand(
        22,
        "completed",
        {
            "sort": {"agentCapability": "sort", "dependsOn": [], **PATIENT},
            "weigh": {
                "agentId": "dead-2",
                "fallback": ["quick-2"],
                "dependsOn": ["sort"],
                **PATIENT,
            },
            "pack": {
                "agentCapability": "pack",
                "forEach": {"items": "${input.parcels}", "maxParallel": 2},
                "parameters": {"parcel": "${item}"},
                "dependsOn": ["sort"],
                **PATIENT,
            },
            # By name: what was done before the connection was cut is asked for where it was done.
            "send": {"agentId": "flaky-2", "dependsOn": ["weigh", "pack"], **PATIENT},
        },
    ),
}


def play(console: Console, stack: Stack) -> None:
    """Send runs through the fleet. Raises DemoFailed unless all goes as it must."""
    env = demo.start(console, stack)
    names = ("OPSCORE_API_URL", "OPSCORE_API_KEY", "OPSCORE_WEBHOOK_SECRET")
    fleet = Fleet(*(env[name] for name in names))
    stack.before_stop = fleet.stop
    with closing(Api(env, stack)) as api:
        _gather(fleet)
        started = time.monotonic()
        run_ids = _send(api)
        _follow(console, fleet, api)
        seconds = time.monotonic() - started
        runs = [api.run(run_id) for run_id in run_ids]
        console.print(f"\nThat took {seconds:.1f} s.", highlight=False)
        for account in _accounts(fleet, runs):
            console.print("", account)
        judge(console, fleet, runs, _list(api, "agents"))


def _gather(fleet: Fleet) -> None:
    for agent_id, temper, capabilities, options in ROSTER:
        fleet.add(agent_id, temper, capabilities, **options)
    try:
        fleet.register_all()
    except FleetFailed as error:
        raise DemoFailed(str(error)) from error


def _send(api: Api) -> list[str]:
    """Submit every run and return their ids."""
    run_ids = []
    for name, errand in ERRANDS.items():
        tasks = [{"taskId": task_id, **task} for task_id, task in errand.tasks.items()]
        api.ask("POST", "/workflows", json={"id": name, "tasks": tasks})
        for number in range(errand.runs):
            parcels = [f"{number}.{index}" for index in range(PARCELS)]
            run_ids.append(api.submit(name, {"parcels": parcels}))
    return run_ids


def _follow(console: Console, fleet: Fleet, api: Api) -> None:
    """Show the fleet until all is over and calm, or the time is."""
    end = time.monotonic() + PLAY_SECONDS
    with demo.Screen(console) as screen:
        while time.monotonic() < end:
            runs, agents = _list(api, "runs"), _list(api, "agents")
            screen.show(_drawn(fleet, agents, runs), [_line(runs)])
            if all(map(_is_over, runs)):
                end = min(end, time.monotonic() + SETTLE_SECONDS)
                if not _holders(agents) and not fleet.working():
                    return
            time.sleep(demo.POLL_SECONDS)


def _list(api: Api, what: str) -> list[Json]:
    items: list[Json] = api.ask("GET", f"/{what}", params={"limit": 200})["items"]
    return items


def _is_over(run: Json) -> bool:
    return run["status"] in demo.ENDED


def _holders(agents: Iterable[Json]) -> list[Json]:
    return [holder for agent in agents for holder in agent["holders"]]


# What is seen


def _drawn(fleet: Fleet, agents: Iterable[Json], runs: Iterable[Json]) -> Group:
    """Draw the fleet as it is: what opscore knows of each agent, and what it did."""
    seen = {agent["agentId"]: agent for agent in agents}
    effects = Counter(agent_id for agent_id, _, _ in list(fleet.effect_log))
    table = demo.table(
        "Agent", "Temper", "Says", numbers=["Slots held", "In line", "Orders", "Effects"]
    )
    for one in fleet.agents.values():
        now = seen[one.id]
        counts = (len(now["holders"]), now["waiting"], len(one.orders), effects[one.id])
        table.add_row(one.id, one.temper, now["state"], *map(str, counts))
    statuses = [(f"{count} {status}  ", demo.colour(status)) for status, count in _statuses(runs)]
    return Group(table, Text.assemble("Runs: ", *statuses))


def _line(runs: Iterable[Json]) -> Line:
    counts = ", ".join(f"{count} {status}" for status, count in _statuses(runs))
    return Line("runs", "runs:", counts)


def _statuses(runs: Iterable[Json]) -> list[tuple[str, int]]:
    return sorted(Counter(run["status"] for run in runs).items())


# What came of it


def _accounts(fleet: Fleet, runs: Sequence[Json]) -> list[Table]:
    """Return how runs, attempts and lies ended."""
    ends = demo.table("Workflow", "Tasks", "Its runs")
    for name, errand in ERRANDS.items():
        words = [_end(run) for run in runs if run["workflowId"] == name]
        ends.add_row(name, ", ".join(errand.tasks), _counted(words))
    attempts = demo.table("Agent", "Temper", "Its attempts")
    tries = [one for run in runs for task in run["tasks"] for one in task["attempts"]]
    for agent in fleet.agents.values():
        words = [_end(one) for one in tries if one["agentId"] == agent.id]
        attempts.add_row(agent.id, agent.temper, _counted(words))
    answers = demo.table("What liars said", "How it was answered")
    for lie in dict.fromkeys(lie for _, lie, _ in fleet.lies):
        answers.add_row(lie, _counted(status for _, told, status in fleet.lies if told == lie))
    return [ends, attempts, answers]


def _end(one: Json) -> str:
    """Say how a run or an attempt ended."""
    return str((one["error"] or {}).get("code", one["status"]))


def _counted(words: Iterable[object]) -> str:
    counts = Counter(words).most_common()
    return ", ".join(f"{count} x {word}" for word, count in counts) or "none"


def judge(console: Console, fleet: Fleet, runs: Sequence[Json], agents: Sequence[Json]) -> None:
    """Print the verdict. Raises DemoFailed unless it is a good one."""
    tasks = [task for run in runs for task in run["tasks"]]
    done = {task["taskId"] for task in tasks if task["status"] == "completed" and task["attempts"]}
    lies = [status for _, lie, status in fleet.lies if lie != TRUTH]
    verdict: Mapping[str, tuple[Collection[object], int]] = {
        "Runs not over": ([run for run in runs if not _is_over(run)], len(runs)),
        "Runs that did not end as they must": (
            [run for run in runs if run["status"] != ERRANDS[run["workflowId"]].ends],
            len(runs),
        ),
        "Slots still held": (_holders(agents), sum(agent["capacity"] for agent in agents)),
        "Effects doubled": (
            [key for key, count in fleet.effects.items() if count > 1],
            len(fleet.effects),
        ),
        "Effects missing": (done - fleet.effects.keys(), len(done)),
        "Orders badly signed": (
            fleet.refused,
            sum(len(one.orders) for one in fleet.agents.values()),
        ),
        "Lies accepted": ([status for status in lies if 200 <= status < 400], len(lies)),
        "Outputs with a lie": ([task for task in tasks if LIE in str(task["output"])], len(tasks)),
    }
    console.print()
    for words, (faults, total) in verdict.items():
        style = "bold red" if faults else "green"
        console.print(f"{words}: {len(faults)} of {total}", style=style, highlight=False)
    if any(faults for faults, _ in verdict.values()):
        raise DemoFailed("Not everything is as it must be.")


def main() -> int:
    """Play and return the exit status."""
    return demo.perform(play, Stack(demo.REPORTS / "fleet.log", workers=1))


if __name__ == "__main__":
    sys.exit(main())
