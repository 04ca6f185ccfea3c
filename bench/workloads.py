"""The shapes that are run, as data: how many runs, and the tasks of each."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.agents import NAP_SECONDS

Drive = Literal["burst", "one by one", "http"]
Document = dict[str, Any]

NARROW = 50
AGENT, NAP_AGENT, TEAM = "bench", "bench-nap", "bench-team"
TEAM_CAPACITY = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """`runs` workflows: a chain of `length`, or with `width` a task, so many, and one that joins.

    `tasks` counts what a user counts: not the parent of `forEach`, nor an implicit end.
    """

    name: str
    about: str
    runs: int
    length: int = 1
    width: int = 0
    drive: Drive = "burst"
    agent: str = AGENT
    ideal_seconds_per_task: float = 0
    capacity: int = 0
    """Of its agent, if that is what is measured."""
    concurrency: int = 2
    """Worker processes."""
    contenders: tuple[str, ...] = ("opscore", "celery")

    @property
    def tasks_per_run(self) -> int:
        return self.width + 2 if self.width else self.length

    @property
    def tasks(self) -> int:
        return self.runs * self.tasks_per_run

    @property
    def narrow(self) -> "Workload":
        """The same, but never so wide that rehearsing it takes as long as measuring it."""
        return replace(self, width=min(self.width, NARROW))

    def scaled(self, factor: float) -> "Workload":
        """Return a smaller one: fewer runs, or if there is only one, a narrower."""
        if self.runs > 1:
            return replace(self, runs=max(2, round(self.runs * factor)))
        return replace(self, width=max(2, round(self.width * factor)))

    def document(self, for_each: bool) -> Document:
        """Return the definition, a fan either as a static graph or as a `forEach`."""
        tasks = self._fan(for_each) if self.width else self._chain()
        return {"id": self.name.lower(), "tasks": tasks}

    def _chain(self) -> list[Document]:
        return [{"taskId": f"t{n}", "agentId": self.agent} for n in range(self.length)]

    def _fan(self, for_each: bool) -> list[Document]:
        first: Document = {"taskId": "first", "agentId": self.agent, "dependsOn": []}
        part: Document = {"agentId": self.agent, "dependsOn": ["first"]}
        if for_each:
            items = list(range(self.width))
            parts = [{"taskId": "parts", "forEach": {"items": items}, **part}]
        else:
            parts = [{"taskId": f"part-{n}", **part} for n in range(self.width)]
        join = {"taskId": "join", "agentId": self.agent, "dependsOn": [p["taskId"] for p in parts]}
        return [first, *parts, join]


_ALL = ("opscore", "opscore-foreach", "celery")
_ONLY = ("opscore",)
WORKLOADS = (
    Workload("W1", "500 x chain of 5", 500, length=5),
    Workload("W2", "50 x (1 -> 50 -> 1)", 50, width=50, contenders=_ALL),
    Workload("W3", "1 x (1 -> 2,000 -> 1)", 1, width=2000, contenders=_ALL),
    Workload("W4", "200 single tasks, one after the other", 200, drive="one by one"),
    Workload(
        "W5",
        "200 tasks of 50 ms on an agent of capacity 1",
        200,
        agent=NAP_AGENT,
        ideal_seconds_per_task=NAP_SECONDS,
        capacity=1,
        contenders=_ONLY,
    ),
    Workload(
        "W7",
        "2,000 tasks of 50 ms on an agent of capacity 4",
        2000,
        agent=TEAM,
        ideal_seconds_per_task=NAP_SECONDS / TEAM_CAPACITY,
        capacity=TEAM_CAPACITY,
        concurrency=TEAM_CAPACITY + 2,  # who is free puts the others in line
        contenders=_ONLY,
    ),
    Workload("W6", "400 single tasks over HTTP, 8 clients", 400, drive="http", contenders=_ONLY),
)
