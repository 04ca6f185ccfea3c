"""Agents that read logs and judge an incident: two functions for the evidence, and an analyst who
works behind HTTP, with a function that stands in for it.

The workflows that put them together are `incident_evidence.yaml` and `incident_response.yaml`;
pages go out through `mail.py`.
"""

import re
from collections import Counter
from typing import Any

from examples import fleet
from opscore import Context, agent

BAD = frozenset({"ERROR", "FATAL"})
SEVERITIES = (0.01, 0.05, 0.2)
"""The error rate from which severity is 1, 2 and 3; below the first it is 0."""

Json = dict[str, Any]


def sample(*, bad: bool) -> list[Json]:
    """Make the logs of a minute to try it with; if it is `bad`, payments fail for half of it."""
    return [
        {"service": name, "lines": _lines(bad_from=30 if bad and name == "payments" else 60)}
        for name in ("checkout", "payments", "search")
    ]


def _lines(bad_from: int) -> list[str]:
    good = [f"INFO served request {1000 + second}" for second in range(bad_from)]
    bad = [f"ERROR no answer in {3000 + second} ms" for second in range(bad_from, 60)]
    return [f"2026-01-31T12:00:{n:02}Z {line}" for n, line in enumerate(good + bad)]


@agent("read-log", capabilities=["read-log"])
def read_log(parameters: Json, context: Context) -> Json:
    """Answer `{service, lines, errors, first, messages: {text: count}}` of the `log`.

    Messages that differ in numbers only are counted as one; `first` is the time of the first error.
    """
    log = parameters["log"]
    rows = [line.split(" ", 2) for line in log["lines"]]
    errors = [(row[0], row[2]) for row in rows if len(row) == 3 and row[1] in BAD]
    messages = Counter(re.sub(r"\d+", "#", text) for _, text in errors)
    return {
        "service": log["service"],
        "lines": len(rows),
        "errors": len(errors),
        "first": errors[0][0] if errors else None,
        "messages": dict(messages),
    }


@agent("weigh-evidence", capabilities=["weigh"])
def weigh_evidence(parameters: Json, context: Context) -> Json:
    """Join the `readings` of all logs: `{lines, errors, rate, suspect, first, message}`.

    The suspect is the service with most errors, null if there are none.
    """
    readings = parameters["readings"]
    lines, errors = (sum(one[key] for one in readings) for key in ("lines", "errors"))
    worst = max(readings, key=lambda one: one["errors"])
    messages = Counter(worst["messages"]).most_common(1)
    return {
        "lines": lines,
        "errors": errors,
        "rate": round(errors / lines, 4) if lines else 0.0,
        "suspect": worst["service"] if errors else None,
        "first": worst["first"],
        "message": messages[0][0] if messages else None,
    }


def judge(evidence: Json) -> Json:
    """Say how bad it is: `{severity, summary}`."""
    severity = sum(evidence["rate"] >= least for least in SEVERITIES)
    summary = f"{evidence['errors']} of {evidence['lines']} lines are errors"
    if evidence["suspect"]:
        summary += f", most of {evidence['suspect']} since {evidence['first']}"
        summary += f": {evidence['message']}"
    return {"severity": severity, "summary": f"{summary}."}


@agent("stand-in-analyst", capabilities=["analyse"])
def stand_in(parameters: Json, context: Context) -> Json:
    """Judge the `evidence` while the analyst behind HTTP is away."""
    return {**judge(parameters["evidence"]), "by": "stand-in-analyst"}


class Analyst(fleet.Agent):
    """The same judgement behind HTTP; a `Fleet` has it live somewhere."""

    def do(self, job: fleet.Job) -> Json:
        super().do(job)
        job.result = {**judge(job.order.body["payload"]["evidence"]), "by": self.id}
        return job.result
