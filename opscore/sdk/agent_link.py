"""What an agent server says to opscore: that it is there and lives, what came of what it accepted,
and that it goes. Everything is sent again until it is answered.
"""

import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any
from urllib.parse import quote

import httpx2

from opscore.agentkit.calling import Busy, Completed, Failed, Outcome
from opscore.errors import AgentBusy
from opscore.remote import AGENT_PREFIX, sign
from opscore.sdk.agent_jobs import Job, Jobs
from opscore.sdk.agent_orders import Order

CALL_SECONDS = 10.0
"""For the API to take or give the next bytes of a call."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
"""Before what was not answered is sent again: twice as long each time, with jitter."""
BEATS = 3
"""In the time after which opscore takes a silent agent for dead."""
GOODBYE_SECONDS = 5.0
"""For saying that the agent goes. If nobody hears it, its leases run out."""
LAST_CALL_SECONDS = 2.0
SAID_CHARACTERS = 500
"""Of what the API says, for the log."""
_NOT_ITS_FAULT = frozenset({401, 403, 408, 425, 429})
"""Refusals that say nothing of the report they answer."""
_FAULTY = {400: "invalid_output", 413: "output_too_large", 422: "invalid_output"}

log = logging.getLogger(__name__)


class NotDone(Exception):
    """The API did not answer, or refused; the message says what."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the API answered; status 0 if it did not."""

    status: int
    said: str

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_final(self) -> bool:
        """The same again would be answered alike."""
        is_refusal = 400 <= self.status < 500 and self.status not in _NOT_ITS_FAULT
        return self.is_good or is_refusal

    @property
    def cancelled(self) -> bool:
        """A heartbeat learned that nobody wants the result."""
        try:
            body = json.loads(self.said)
        except ValueError:
            return False
        return isinstance(body, dict) and body.get("cancelled") is True

    def __str__(self) -> str:
        return f"{self.status or 'no answer'}: {self.said[:SAID_CHARACTERS]}"


class Api:
    """Calls opscore's API with the key, and its webhook with a signature."""

    def __init__(self, url: str, key: str, secret: str) -> None:
        self._secret = secret
        self.seconds = CALL_SECONDS
        self._http = httpx2.Client(
            base_url=url.rstrip("/") + "/v1/opscore",
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )

    def send(self, method: str, path: str, body: Any, proof: Mapping[str, str] = {}) -> Reply:
        raw = body if isinstance(body, bytes) else as_bytes(body)
        try:
            answer = self._http.request(
                method, path, content=raw, headers=dict(proof), timeout=self.seconds
            )
        except httpx2.HTTPError as error:
            return Reply(0, f"{type(error).__name__} {error}")
        return Reply(answer.status_code, answer.text)

    def notify(self, event: str, about: Mapping[str, Any]) -> Reply:
        raw = as_bytes({"event_type": event, "agent_details": about})
        at = f"{time.time():.6f}"  # of two notices the one that was signed later counts
        proof = {
            f"{AGENT_PREFIX}-Timestamp": at,
            f"{AGENT_PREFIX}-Signature": sign(self._secret, at, raw),
        }
        return self.send("POST", "/internal/agent/notify", raw, proof)

    def close(self) -> None:
        self._http.close()


class Link:
    """Keeps opscore informed of one agent, from two threads: one beats, one reports.

    `about`: the `agent_details` of its registration.
    """

    def __init__(
        self,
        api: Api,
        about: Mapping[str, Any],
        jobs: Jobs,
        *,
        capacity: int,
        heartbeat_seconds: float,
    ) -> None:
        self._api, self._about, self._jobs = api, about, jobs
        self._agent_id = str(about["agentId"])
        self._limits = {"capacity": capacity, "heartbeatSeconds": heartbeat_seconds}
        self._every = heartbeat_seconds / BEATS
        self._has_come = self._is_registered = False
        self._told: str | None = None
        self._nudge, self._is_over = Event(), Event()
        loops = (self._beat_on, self._report_on)
        self._threads = [Thread(target=loop, name="opscore-link", daemon=True) for loop in loops]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Say goodbye, once `Jobs` is closed: opscore takes back what this agent still has."""
        end = time.monotonic() + GOODBYE_SECONDS
        self._is_over.set()
        self._nudge.set()
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        self._api.seconds = LAST_CALL_SECONDS
        if self._has_come:
            self._say_goodbye(end)
        if not any(thread.is_alive() for thread in self._threads):
            self._api.close()

    def tell_state(self) -> None:
        """Report the agent's state soon: it may be another one."""
        self._told = None
        self._nudge.set()

    # --- that it is there

    def _beat_on(self) -> None:
        tries = 0
        while not self._is_over.is_set():
            self._nudge.clear()
            try:
                pause = self._beat()
                tries = 0
            except Exception as error:  # whatever it is: who beats no more gets no work
                is_known = isinstance(error, NotDone)
                log.warning("agent %s: %s", self._agent_id, error, exc_info=not is_known)
                pause = min(_pause(tries), self._every)
                tries += 1
            self._nudge.wait(pause)

    def _beat(self) -> float:
        """Say once that the agent and its work live; return in how many seconds to say it again.

        Raises:
            NotDone
        """
        if not self._is_registered:
            self._register()
        lives = [self._keep_alive(job, order) for job, order in self._jobs.accepted()]
        state, seconds = self._jobs.state()
        if state != self._told or not any(lives):  # each of these shows that the agent lives
            self._report_state(state)
        return min(seconds, self._every)

    def _register(self) -> None:
        """Come, and say how much work is welcome; the state is told by who calls this."""
        self._told = None
        _check(self._api.notify("REGISTER", self._about), "registering")
        self._has_come = True
        path = f"/agents/{self._agent_id}"
        _check(self._api.send("PATCH", path, self._limits), "saying its capacity")
        self._is_registered = True
        log.info("agent %s is registered at %s", self._agent_id, self._about["contactEndpoint"])

    def _report_state(self, state: str) -> None:
        self._told = state
        reply = self._api.send("POST", f"/agent/{self._agent_id}/state", {"state": state})
        if not reply.is_good:
            self._told = None
        if reply.status == 404:
            self._is_registered = False
        _check(reply, f"reporting {state}")

    def _keep_alive(self, job: Job, order: Order) -> bool:
        """Send the heartbeat of an attempt; False if it is over, or opscore cannot take it now.

        Raises:
            NotDone: nobody answers, and would for the others.
        """
        reply = self._api.send("POST", f"{_path(order)}/heartbeat", self._proof(order))
        if reply.status == 0:
            raise NotDone(f"the heartbeat of task {order.task_id} was answered with {reply}")
        if not reply.is_good:
            log.warning("the heartbeat of task %s was answered with %s", order.task_id, reply)
        if reply.status in (404, 409):
            self._jobs.settle(job, order)
        if reply.cancelled:
            job.context.cancel()
        return reply.is_good

    # --- what came of it

    def _report_on(self) -> None:
        tries = 0
        while (given := self._jobs.next_report()) is not None:
            job, order, outcome = given
            try:
                is_done = self._report(job, order, outcome)
            except Exception:  # without heartbeats opscore has it done again
                log.exception("the result of task %s is lost", order.task_id)
                self._jobs.settle(job, order)
                continue
            tries = 0 if is_done else tries + 1
            if not is_done:
                self._is_over.wait(_pause(tries - 1))

    def _report(self, job: Job, order: Order, outcome: Outcome) -> bool:
        """Report an outcome; False if that is to be tried again."""
        body = {**self._proof(order), **as_report(outcome)}
        reply = self._api.send("POST", f"{_path(order)}/result", body)
        if not reply.is_final:
            log.warning("the result of task %s is kept: %s", order.task_id, reply)
            self._jobs.report_again(job, outcome)
            return False
        if reply.status in _FAULTY and isinstance(outcome, Completed):
            said = f"opscore refused the result: {reply}"
            self._jobs.report_again(job, Failed(_FAULTY[reply.status], said, retryable=False))
            return True
        if not reply.is_good:
            log.warning("nobody wants the result of task %s: %s", order.task_id, reply)
        self._jobs.settle(job, order)
        return True

    def _proof(self, order: Order) -> dict[str, str]:
        return {"agentId": self._agent_id, "opscore_attempt_token": order.token}

    # --- that it goes

    def _say_goodbye(self, end: float) -> None:
        tries = 0
        while not (reply := self._api.notify("DEREGISTER", self._about)).is_good:
            if reply.status == 404:
                return
            pause = _pause(tries)
            if time.monotonic() + pause > end:
                log.warning("agent %s could not deregister: %s", self._agent_id, reply)
                return
            time.sleep(pause)
            tries += 1
        log.info("agent %s is deregistered", self._agent_id)


def as_report(outcome: Outcome) -> dict[str, Any]:
    """Return what a result and an answer tell of an outcome."""
    if isinstance(outcome, Completed):
        return {"status": "completed", "result": outcome.output}
    if isinstance(outcome, Busy):
        said = "The agent was busy, and said so after it had accepted the task."
        outcome = Failed(AgentBusy.code, said, retry_after=outcome.retry_after)
    error: dict[str, Any] = {"code": outcome.code, "message": outcome.message}
    if outcome.retry_after is not None:
        error["retryAfter"] = outcome.retry_after
    return {"status": "failed", "error": error}


def as_bytes(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _path(order: Order) -> str:
    return f"/tasks/{quote(order.task_id, safe='')}"


def _check(reply: Reply, doing: str) -> None:
    if not reply.is_good:
        raise NotDone(f"{doing} was answered with {reply}")


def _pause(tries: int) -> float:
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(tries, 10))
    return longest * random.uniform(0.5, 1)
