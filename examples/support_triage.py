"""Agents that sort support tickets by their words and draft replies.

The workflow that puts them together is `support_triage.yaml`; what they draft goes out through
`mail.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from opscore import Context, GiveUp, agent

TOPICS: Mapping[str, frozenset[str]] = {
    "access": frozenset({"login", "password", "locked", "account", "reset"}),
    "billing": frozenset({"invoice", "charged", "refund", "payment", "twice"}),
    "outage": frozenset({"down", "error", "timeout", "unreachable", "production"}),
}
"""The words that speak for each."""
URGENCY: Mapping[str, int] = {"down": 3, "production": 3, "urgent": 2, "cannot": 2, "twice": 1}
FIRST_STEPS: Mapping[str, str] = {
    "access": "We sent you a link to set a new password; it is good for an hour.",
    "billing": "We are looking at your payments and will refund what was charged too much.",
    "outage": "We are at it, and will write again within the hour.",
    "other": "We read it and will write again today.",
}

SAMPLE = [
    {"id": "T-1", "from": "ann@example.com", "text": "I was charged twice, please refund."},
    {"id": "T-2", "from": "bob@example.com", "text": "URGENT: production is down, error 503!"},
    {"id": "T-3", "from": "cyd@example.com", "text": "How do I reset my password?"},
    {"id": "T-4", "from": "dan@example.com", "text": "Thank you for the nice manual."},
]
"""Tickets to try it with."""

Json = dict[str, Any]


@agent("classify-ticket", capabilities=["classify"])
def classify_ticket(parameters: Json, context: Context) -> Json:
    """Answer the `ticket` with its `topic`, by most words that speak for it, and its `urgency`."""
    ticket = parameters["ticket"]
    words = re.findall(r"[a-z]+", ticket["text"].lower())
    spoken = {topic: sum(word in known for word in words) for topic, known in TOPICS.items()}
    best = max(spoken, key=lambda topic: spoken[topic])
    urgency = sum(URGENCY.get(word, 0) for word in words)
    return {**ticket, "topic": best if spoken[best] else "other", "urgency": urgency}


@agent("draft-reply", capabilities=["draft"])
def draft_reply(parameters: Json, context: Context) -> Json:
    """Draft a reply to the most urgent of `tickets`: `{ticketId, to, subject, text}`.

    Of several that are as urgent it is the first.
    """
    ticket = max(parameters["tickets"], key=lambda one: one["urgency"])
    if "@" not in ticket["from"]:
        raise GiveUp(f"Ticket {ticket['id']} is from {ticket['from']!r}, which is no address.")
    name = ticket["from"].partition("@")[0].capitalize()
    quoted = "\n".join(f"> {line}" for line in ticket["text"].splitlines())
    steps = FIRST_STEPS[ticket["topic"]]
    return {
        "ticketId": ticket["id"],
        "to": ticket["from"],
        "subject": f"Re: your ticket {ticket['id']} ({ticket['topic']})",
        "text": f"Dear {name},\n\nthank you for writing. {steps}\n\n{quoted}\n",
    }
