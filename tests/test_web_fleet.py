"""Agents behind HTTP over HTTP: how they come and go, what they report, what they hand in."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from http_client import Client, open_client, problem
from sqlalchemy import text
from stack import Servers, new_redis_url, stack_environment
from test_engine import Desk
from werkzeug.test import TestResponse

from opscore import canvas, engine
from opscore.config import IO_QUEUE, Settings
from opscore.engine import Claimed, MustWait
from opscore.remote import sign

SECRET = "the-secret-of-the-webhook"
NOTIFY = "/internal/agent/notify"
DETAILS = {
    "agentId": "a-1",
    "agentName": "Summarizer",
    "version": "1.0",
    "capabilities": ["summarize"],
    "contactEndpoint": "https://agents.internal/a-1",
    "metadata": None,
}
REGISTER = {"event_type": "REGISTER", "agent_details": DETAILS}
DEREGISTER = {"event_type": "DEREGISTER", "agent_details": {"agentId": "a-1"}}
EVERY_STATE = ["UNKNOWN", "initializing", "idle", "active", "error", "finished"]


def with_webhook(settings: Settings) -> Settings:
    return replace(settings, webhook_secret=SECRET, agent_hosts=("*.internal",))


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return with_webhook(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


@dataclass(frozen=True)
class Given:
    """An attempt that an agent has, and the paths to report of it."""

    task_id: UUID
    token: str

    @property
    def result(self) -> str:
        return f"/tasks/{self.task_id}/result"

    @property
    def heartbeat(self) -> str:
        return f"/tasks/{self.task_id}/heartbeat"

    def says(self, **more: Any) -> dict[str, Any]:
        return {"agentId": "a-1", "opscore_attempt_token": self.token, **more}


class Fleet(Desk):
    """One agent behind HTTP, registered and idle, and short ways to give it work."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.database)
        self.client = client
        notify(client, REGISTER)
        self.report("idle")

    def report(self, state: str, **more: Any) -> TestResponse:
        return self.client.post("/agent/a-1/state", {"state": state, **more})

    def give(self, name: str = "a", *, accepts: bool = True) -> Given:
        """Claim a task for the agent, which accepts it unless told otherwise."""
        token = uuid4()
        claimed = self.claim(name, token=token)
        assert isinstance(claimed, Claimed), claimed
        if accepts:
            with self.tx() as tx:
                parked = engine.await_report(tx, claimed, message=self.message(name))
            assert isinstance(parked, engine.Parked)
        return Given(claimed.task_id, str(token))

    def give_one(self, **more: Any) -> Given:
        """Submit a run of one task and give that to the agent."""
        self.submit({"taskId": "a", "agentId": "a-1", **more})
        return self.give()

    def give_again(self) -> Given:
        """Give the agent the task that waits to be tried again."""
        self.alter("UPDATE tasks SET wake_at = now() WHERE run_id = :run")
        return self.give()

    def message(self, name: str) -> dict[str, Any]:
        app = self.client.app.extensions["opscore"].dispatcher.app
        return dict(canvas.visit(app, self.id(name), 1, timeout_seconds=60, queue=IO_QUEUE))

    def wait(self, name: str) -> None:
        """Visit a task that cannot start, and park it."""
        answer = self.claim(name)
        assert isinstance(answer, MustWait), answer
        with self.tx() as tx:
            engine.park_task(tx, self.id(name), answer, message=self.message(name), generation=1)

    def shown(self) -> dict[str, Any]:
        return dict(self.client.get("/agents/a-1").json)

    def history(self) -> list[str]:
        items = self.client.get("/agents/a-1/state/history").json["items"]
        return [item["state"] for item in items]

    def kept_for(self) -> UUID | None:
        """Return whom the agent's free slot is kept for."""
        with self.database.autocommit() as tx:
            query = "SELECT reserved_for FROM slots WHERE pool = 'a-1' ORDER BY number"
            return (
                UUID(str(found)) if (found := tx.execute(text(query)).scalars().first()) else None
            )


@pytest.fixture
def fleet(client: Client) -> Fleet:
    return Fleet(client)


@contextmanager
def new_client(servers: Servers) -> Iterator[Client]:
    with servers.new_database() as url:
        environment = stack_environment(url, new_redis_url(servers))
        with open_client(with_webhook(Settings.from_env(environment))) as client:
            yield client


@pytest.fixture(scope="module")
def empty(servers: Servers) -> Iterator[Client]:
    """A client for tests of what is refused: there is no agent, before and after."""
    with new_client(servers) as client:
        yield client


class Still(Fleet):
    """A fleet for tests of what is refused: its agent has an attempt, before and after."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.given = self.give_one()
        self.before = (self.shown(), self.history())

    def is_as_before(self) -> bool:
        task = self.client.get(f"/tasks/{self.given.task_id}").json
        return task["reason"] == "remote" and self.before == (self.shown(), self.history())


@pytest.fixture(scope="module")
def still(servers: Servers) -> Iterator[Still]:
    with new_client(servers) as client:
        yield Still(client)


def notify(
    client: Client,
    body: Any,
    *,
    secret: str = SECRET,
    at: str | None = None,
    kind: str = "application/json",
    **headers: str | None,
) -> TestResponse:
    """Send a signed webhook; `headers` replace those of the signature, None leaves one out."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    at = str(int(datetime.now(UTC).timestamp())) if at is None else at
    sent = {"timestamp": at, "signature": sign(secret, at, raw)} | headers
    proof = {f"X-AgentKit-{name}": value for name, value in sent.items() if value is not None}
    keyless = client.without_key()
    return keyless.post(NOTIFY, data=raw, headers={"Content-Type": kind, **proof})


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def changed(details: dict[str, Any], event: str = "REGISTER") -> dict[str, Any]:
    """Return a registration with other details; `...` leaves one out."""
    merged = {name: value for name, value in (DETAILS | details).items() if value is not ...}
    return {"event_type": event, "agent_details": merged}


def count(client: Client, table: str) -> int:
    with client.database.autocommit() as tx:
        return int(tx.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


# --- Coming and going -----------------------------------------------------------------------------


def test_a_signed_registration_is_answered_and_the_agent_is_there_at_once(client: Client) -> None:
    answer = notify(client, REGISTER)
    assert answer.status_code == 200, answer.json
    assert answer.json == {"status": "success", "message": "Agent a-1 registered"}
    shown = client.get("/agents/a-1").json
    times = {name: shown.pop(name) for name in ("registeredAt", "updatedAt", "seenAt")}
    assert all(moment.endswith("Z") for moment in times.values())
    assert shown == {
        "agentId": "a-1",
        "agentName": "Summarizer",
        "kind": "remote",
        "version": "1.0",
        "capabilities": ["summarize"],
        "capacity": 1,
        "state": "UNKNOWN",
        "stateAt": None,
        "available": True,
        "unavailableBecause": None,
        "paused": False,
        "draining": False,
        "contactEndpoint": "https://agents.internal/a-1",
        "metadata": None,
        "heartbeatSeconds": None,
        "requireToken": True,
        "busyUntil": None,
        "running": 0,
        "holders": [],
        "waiting": 0,
        "line": [],
    }
    assert client.get("/agents").json["items"] == [client.get("/agents/a-1").json]


def test_the_state_can_be_read_directly_after_the_registration(client: Client) -> None:
    notify(client, REGISTER)
    answer = client.get("/agent/a-1/state")
    registered = client.get("/agents/a-1").json["registeredAt"]
    assert answer.status_code == 200
    assert answer.json == {
        "agentId": "a-1",
        "state": "UNKNOWN",
        "details": None,
        "timestamp": registered,
    }


def test_a_registration_keeps_what_the_agent_says_of_itself(client: Client) -> None:
    metadata = {"team": "support", "gpu": [1, 2.5, None]}
    twice = ["sum", "add", "sum"]
    notify(client, changed({"metadata": metadata, "capabilities": twice}))
    shown = client.get("/agents/a-1").json
    assert shown["metadata"] == metadata and shown["capabilities"] == ["sum", "add"]


def test_what_has_a_default_may_be_left_out(client: Client) -> None:
    answer = notify(client, changed({"capabilities": ..., "metadata": ...}))
    assert answer.status_code == 200
    shown = client.get("/agents/a-1").json
    assert (shown["capabilities"], shown["metadata"]) == ([], None)


def test_unknown_keys_are_ignored_here(client: Client) -> None:
    body = changed({"colour": "red"}) | {"sent_by": "agentkit 9"}
    assert notify(client, body).status_code == 200


@pytest.mark.parametrize("form", ["epoch", "fraction", "iso", "offset"])
def test_the_time_of_a_signature_is_in_seconds_or_iso_8601(client: Client, form: str) -> None:
    now = datetime.now(UTC)
    written = {
        "epoch": str(int(now.timestamp())),
        "fraction": f"{now.timestamp():.3f}",
        "iso": now.isoformat().replace("+00:00", "Z"),
        "offset": (now + timedelta(hours=2)).isoformat().replace("+00:00", "+02:00"),
    }
    assert notify(client, REGISTER, at=written[form]).status_code == 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timestamp": None, "signature": None}, "X-AgentKit-Timestamp is missing"),
        ({"signature": None}, "X-AgentKit-Signature is missing"),
        ({"signature": ""}, "X-AgentKit-Signature is missing"),
        ({"secret": "another-secret-than-ours"}, "does not match"),
        ({"signature": "0" * 64}, "does not match"),
        ({"signature": "schlüssel"}, "does not match"),
        ({"at": "9" * 400}, "300 s from now"),
        ({"at": "2026-01-31T12:00:00"}, "no time zone"),
        ({"at": "yesterday"}, "cannot be read"),
        ({"at": "nan"}, "cannot be read"),
    ],
)
def test_what_is_not_signed_now_with_the_secret_is_refused_and_nothing_is_written(
    empty: Client, changes: dict[str, Any], said: str
) -> None:
    answer = notify(empty, REGISTER, **changes)
    assert said in problem(answer, 401, "unauthorized")["detail"]
    assert answer.headers["WWW-Authenticate"] == "X-AgentKit-Signature"
    assert SECRET not in answer.get_data(as_text=True)
    assert count(empty, "agents") == 0


@pytest.mark.parametrize("seconds", [310, -310])
def test_a_signature_is_too_old_or_too_new_after_five_minutes(empty: Client, seconds: int) -> None:
    moment = ago(seconds)
    for at in (str(int(moment.timestamp())), moment.isoformat()):
        answer = notify(empty, REGISTER, at=at)
        assert "300 s from now" in problem(answer, 401, "unauthorized")["detail"]
    assert count(empty, "agents") == 0


def test_a_signature_is_of_this_body_and_this_time(client: Client) -> None:
    raw, at = json.dumps(REGISTER).encode(), str(int(ago(10).timestamp()))
    stolen = sign(SECRET, at, raw)
    for answer in (
        notify(client, raw + b" ", at=at, signature=stolen),
        notify(client, raw, signature=stolen),
        notify(client, raw, at=at, signature=stolen.upper()),
    ):
        problem(answer, 401, "unauthorized")
    assert notify(client, raw, at=at, signature=stolen).status_code == 200


def test_the_key_is_no_signature(empty: Client) -> None:
    problem(empty.post(NOTIFY, REGISTER), 401, "unauthorized")


def test_without_a_secret_nobody_registers_and_is_told_why(settings: Settings) -> None:
    with open_client(replace(settings, webhook_secret=None)) as client:
        for answer in (notify(client, REGISTER), client.post(NOTIFY, REGISTER)):
            detail = problem(answer, 401, "unauthorized")["detail"]
            assert "OPSCORE_WEBHOOK_SECRET" in detail


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff", b'{"event_type": NaN}', b'{"a": 1, "a": 2}'])
def test_the_signature_is_checked_before_the_body_is_read(empty: Client, raw: bytes) -> None:
    problem(notify(empty, raw, secret="another-secret-than-ours"), 401, "unauthorized")
    problem(notify(empty, raw), 400, "bad_request")


def test_a_signed_body_of_another_kind_is_not_read(empty: Client) -> None:
    problem(notify(empty, REGISTER, kind="text/plain"), 415, "unsupported_media_type")
    problem(notify(empty, b" " * (2**22 + 1)), 413, "body_too_large")


@pytest.mark.parametrize("event", ["HEARTBEAT", "register", "", "x" * 5000])
def test_an_unknown_event_is_400(empty: Client, event: str) -> None:
    for details in (DETAILS, {"agentId": "a-1"}):
        answer = notify(empty, {"event_type": event, "agent_details": details})
        detail = problem(answer, 400, "bad_request")["detail"]
        assert "REGISTER or DEREGISTER" in detail and len(detail) < 200
    assert count(empty, "agents") == 0


@pytest.mark.parametrize(
    ("details", "places"),
    [
        ({"agentId": ...}, ["agentId"]),
        ({"agentId": ""}, ["agentId"]),
        ({"agentId": "a" * 65}, ["agentId"]),
        ({"agentId": "a/b"}, ["agentId"]),
        ({"agentId": "a\n"}, ["agentId"]),
        ({"agentId": 7}, ["agentId"]),
        ({"agentName": ...}, ["agentName"]),
        ({"agentName": ""}, ["agentName"]),
        ({"agentName": "x" * 257}, ["agentName"]),
        ({"agentName": "a\0b"}, ["agentName"]),
        ({"version": 1}, ["version"]),
        ({"version": None}, ["version"]),
        ({"capabilities": "sum"}, ["capabilities"]),
        ({"capabilities": None}, ["capabilities"]),
        ({"capabilities": ["sum", "a b", "", "x" * 65]}, [f"capabilities/{n}" for n in (1, 2, 3)]),
        ({"capabilities": [f"c{n}" for n in range(257)]}, ["capabilities"]),
        ({"metadata": []}, ["metadata"]),
        ({"metadata": "red"}, ["metadata"]),
        pytest.param({"metadata": {"a": "x" * 2**20}}, ["metadata"], id="large metadata"),
        ({"contactEndpoint": ...}, ["contactEndpoint"]),
        ({"contactEndpoint": None}, ["contactEndpoint"]),
        ({"contactEndpoint": "https://agents.internal/" + "a" * 2048}, ["contactEndpoint"]),
        ({"contactEndpoint": "agents.internal/a-1"}, ["contactEndpoint"]),
        ({"contactEndpoint": "ftp://agents.internal/a-1"}, ["contactEndpoint"]),
        ({"contactEndpoint": "http://user:pass@agents.internal/"}, ["contactEndpoint"]),
        ({"contactEndpoint": "http://127.0.0.1:8080/"}, ["contactEndpoint"]),
        ({"contactEndpoint": "http://169.254.169.254/latest"}, ["contactEndpoint"]),
        ({"contactEndpoint": "http://10.0.0.7/"}, ["contactEndpoint"]),
        ({"contactEndpoint": "http://localhost/"}, ["contactEndpoint"]),
        ({"agentId": 7, "version": 1, "metadata": 3}, ["agentId", "metadata", "version"]),
    ],
)
def test_faulty_details_are_named_all_at_once_and_nothing_is_written(
    empty: Client, details: dict[str, Any], places: list[str]
) -> None:
    answer = notify(empty, changed(details))
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert sorted(errors) == [f"/agent_details/{place}" for place in places]
    assert count(empty, "agents") == 0


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ([], [""]),
        ({}, ["/agent_details", "/event_type"]),
        ({"event_type": 7, "agent_details": {"agentId": "a-1"}}, ["/event_type"]),
        ({"event_type": "REGISTER", "agent_details": None}, ["/agent_details"]),
        ({"event_type": "REGISTER", "agent_details": [1]}, ["/agent_details"]),
        ({"event_type": "DEREGISTER", "agent_details": {}}, ["/agent_details/agentId"]),
    ],
)
def test_a_notice_must_be_as_it_must_be(empty: Client, body: Any, places: list[str]) -> None:
    errors = problem(notify(empty, body), 422, "invalid_request")["errors"]
    assert sorted(errors) == places


def test_agents_may_be_in_private_networks_where_the_settings_say_so(settings: Settings) -> None:
    with open_client(replace(settings, agent_hosts=("127.0.0.1",))) as client:
        body = changed({"contactEndpoint": "http://127.0.0.1:8080/"})
        assert notify(client, body).status_code == 200


def test_the_id_of_a_function_agent_is_taken(fleet: Fleet, client: Client) -> None:
    answer = notify(client, changed({"agentId": "echo"}))
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert list(errors) == ["/agent_details/agentId"]
    assert client.get("/agents/echo").json["kind"] == "function"


def test_registering_again_keeps_the_state_and_what_operators_set(
    fleet: Fleet, client: Client
) -> None:
    client.send("PATCH", "/agents/a-1", json={"capacity": 3, "paused": True})
    elsewhere = "https://agents.internal/elsewhere"
    notify(client, changed({"version": "2.0", "contactEndpoint": elsewhere}))
    shown = fleet.shown()
    assert (shown["version"], shown["contactEndpoint"]) == ("2.0", elsewhere)
    assert (shown["state"], shown["capacity"], shown["paused"]) == ("idle", 3, True)
    assert fleet.history() == ["idle", "UNKNOWN"]


def test_a_notice_that_was_signed_before_the_newest_is_refused(
    fleet: Fleet, client: Client
) -> None:
    for notice in (REGISTER, DEREGISTER):
        answer = notify(client, notice, at=str(int(ago(60).timestamp())))
        problem(answer, 409, "stale_notice")
    assert fleet.shown()["available"] is not None


def test_a_replayed_registration_is_harmless(fleet: Fleet, client: Client) -> None:
    at = str(int(ago(-5).timestamp()))
    before = fleet.shown()
    for _ in range(2):
        assert notify(client, REGISTER, at=at).status_code == 200
    assert {**fleet.shown(), "updatedAt": 0, "seenAt": 0} == {**before, "updatedAt": 0, "seenAt": 0}
    assert count(client, "agent_reports") == 2


def test_whoever_deregisters_is_gone(fleet: Fleet, client: Client) -> None:
    answer = notify(client, DEREGISTER)
    assert answer.json == {"status": "success", "message": "Agent a-1 deregistered"}
    for answer in (
        client.get("/agents/a-1"),
        client.get("/agent/a-1/state"),
        client.get("/agents/a-1/state/history"),
        client.send("PATCH", "/agents/a-1", json={"paused": True}),
        fleet.report("idle"),
        notify(client, DEREGISTER),
    ):
        problem(answer, 404, "agent_not_found")
    assert "a-1" not in [agent["agentId"] for agent in client.get("/agents").json["items"]]


def test_whoever_deregisters_loses_what_he_has_and_his_result_comes_too_late(
    fleet: Fleet, client: Client
) -> None:
    given = fleet.give_one()
    notify(client, DEREGISTER)
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["reason"]) == ("waiting", "retry")
    problem(client.post(given.result, given.says(result=1)), 409, "report_refused")


def test_whoever_comes_back_has_his_state_and_is_given_work_at_once(
    fleet: Fleet, client: Client
) -> None:
    fleet.submit({"taskId": "a", "agentCapability": "summarize"})
    notify(client, DEREGISTER)
    fleet.wait("a")
    assert fleet.task("a").reason == "agent_unavailable" and fleet.kept_for() is None
    notify(client, REGISTER, at=str(int(ago(-1).timestamp())))
    assert fleet.shown()["state"] == "idle"
    assert fleet.kept_for() == fleet.id("a")


# --- State ----------------------------------------------------------------------------------------


def test_a_state_is_reported_in_any_case(fleet: Fleet) -> None:
    for state in EVERY_STATE:
        for word in (state, state.lower(), state.upper(), state.title()):
            answer = fleet.report(word)
            assert answer.status_code == 202, answer.json
            assert answer.json == {"status": "success", "message": "State update accepted"}
            assert fleet.shown()["state"] == fleet.history()[0] == state


def test_busy_means_active(fleet: Fleet, client: Client) -> None:
    fleet.report("BUSY")
    assert client.get("/agent/a-1/state").json["state"] == "active"


def test_a_report_is_read_back_as_it_was_made(fleet: Fleet, client: Client) -> None:
    said = {"agentId": "a-1", "timestamp": "2025-04-20T19:20:00+02:00", "details": {"n": [1]}}
    fleet.report("active", **said)
    # The fixture's own report is newer.
    assert client.get("/agent/a-1/state").json["state"] == "idle"
    (late,) = [
        item
        for item in client.get("/agents/a-1/state/history").json["items"]
        if item["timestamp"].startswith("2025")
    ]
    received = late.pop("receivedAt")
    assert received.endswith("Z") and received[:4] >= "2026"
    assert late == {
        "agentId": "a-1",
        "state": "active",
        "details": {"n": [1]},
        "timestamp": "2025-04-20T17:20:00Z",
    }


def test_details_are_anything_and_belong_to_the_newest_report(fleet: Fleet, client: Client) -> None:
    for details in ({}, {"progress": 0.5}, [1, 2], "words", 0, False, None):
        fleet.report("active", details=details)
        assert client.get("/agent/a-1/state").json["details"] == details


def test_the_newest_by_the_agents_clock_is_the_state(fleet: Fleet, client: Client) -> None:
    fleet.report("active", timestamp=ago(20).isoformat(), details="late")
    assert client.get("/agent/a-1/state").json["state"] == "idle"
    moment = datetime.now(UTC).isoformat()
    fleet.report("error", timestamp=moment, details="newest")
    fleet.report("active", timestamp=ago(10).isoformat(), details="late")
    answer = client.get("/agent/a-1/state").json
    assert (answer["state"], answer["details"]) == ("error", "newest")
    assert answer["timestamp"] == moment.replace("+00:00", "Z")
    assert fleet.shown()["stateAt"] == answer["timestamp"]


def test_of_two_reports_of_the_same_moment_the_later_one_counts(
    fleet: Fleet, client: Client
) -> None:
    moment = datetime.now(UTC).isoformat()
    fleet.report("active", timestamp=moment, details=1)
    fleet.report("finished", timestamp=moment, details=2)
    answer = client.get("/agent/a-1/state").json
    assert (answer["state"], answer["details"]) == ("finished", 2)
    assert fleet.history()[:2] == ["finished", "active"]


def test_a_time_to_come_is_taken_as_now(fleet: Fleet, client: Client) -> None:
    for year in ("2999", "9999"):
        fleet.report("active", timestamp=f"{year}-12-31T23:59:59Z")
        answer = client.get("/agent/a-1/state").json
        assert answer["state"] == "active"
        assert datetime.fromisoformat(answer["timestamp"]) <= datetime.now(UTC)
        fleet.report("idle")
        assert client.get("/agent/a-1/state").json["state"] == "idle"


def test_registration_ranks_below_any_report_however_slow_the_agents_clock(
    client: Client,
) -> None:
    notify(client, REGISTER)
    said = {"state": "idle", "timestamp": "2001-01-01T00:00:00Z", "details": "first words"}
    client.post("/agent/a-1/state", said)
    answer = client.get("/agent/a-1/state").json
    assert (answer["state"], answer["details"]) == ("idle", "first words")
    assert answer["timestamp"] == "2001-01-01T00:00:00Z"


def test_the_history_is_paged_newest_first_and_keeps_everything(
    fleet: Fleet, client: Client
) -> None:
    moments = [ago(seconds).isoformat() for seconds in (100, 300, 200, 200, 200)]
    for number, moment in enumerate(moments):
        fleet.report("active", timestamp=moment, details=number)
    found: list[Any] = []
    path = "/agents/a-1/state/history?limit=2"
    cursor = ""
    while True:
        page = client.get(path + cursor).json
        assert len(page["items"]) <= 2
        found += [(item["state"], item["details"]) for item in page["items"]]
        if page["nextCursor"] is None:
            break
        cursor = f"&cursor={page['nextCursor']}"
    assert found == [
        ("idle", None),
        ("UNKNOWN", None),
        *[("active", number) for number in (0, 4, 3, 2, 1)],
    ]


@pytest.mark.parametrize("query", ["cursor=x", "cursor=WzEsMl0=", "limit=0", "order=asc"])
def test_a_page_of_the_history_is_asked_for_as_any_other(still: Still, query: str) -> None:
    answer = still.client.get(f"/agents/a-1/state/history?{query}")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/" + query.split("=")[0]]


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, ["/state"]),
        ({"state": "sleeping"}, ["/state"]),
        ({"state": ""}, ["/state"]),
        ({"state": None}, ["/state"]),
        ({"state": 7}, ["/state"]),
        ({"state": ["idle"]}, ["/state"]),
        ({"state": "idle", "timestamp": "2026-01-31T12:00:00"}, ["/timestamp"]),
        ({"state": "idle", "timestamp": "yesterday"}, ["/timestamp"]),
        ({"state": "idle", "timestamp": 1769860800}, ["/timestamp"]),
        ({"state": "idle", "timestamp": "0001-01-01T00:00:00+14:00"}, ["/timestamp"]),
        ({"state": "idle", "agentId": 7}, ["/agentId"]),
        ({"state": "idle", "colour": "red"}, ["/colour"]),
        ({"state": "idle", "details": {"a": ["\0"]}}, ["/details/a/0"]),
    ],
)
def test_a_report_must_be_as_it_must_be(
    still: Still, body: dict[str, Any], places: list[str]
) -> None:
    answer = still.client.post("/agent/a-1/state", body)
    assert sorted(problem(answer, 422, "invalid_request")["errors"]) == places
    assert still.is_as_before()


def test_a_report_for_another_agent_than_the_paths_is_400(still: Still) -> None:
    detail = problem(still.report("active", agentId="a-2"), 400, "bad_request")["detail"]
    assert "path" in detail and still.is_as_before()


@pytest.mark.parametrize("path", ["/agent/nobody/state", "/agents/nobody/state/history"])
def test_an_agent_nobody_registered_has_no_state(empty: Client, path: str) -> None:
    problem(empty.get(path), 404, "agent_not_found")
    if path.startswith("/agent/"):
        problem(empty.post(path, {"state": "idle"}), 404, "agent_not_found")
    assert count(empty, "agent_reports") == 0


def test_who_reports_wants_the_key(empty: Client) -> None:
    keyless = empty.without_key()
    for method, path in (
        ("POST", "/agent/a-1/state"),
        ("GET", "/agent/a-1/state"),
        ("GET", "/agents/a-1/state/history"),
        ("PATCH", "/agents/a-1"),
        ("POST", f"/tasks/{uuid4()}/result"),
        ("POST", f"/tasks/{uuid4()}/heartbeat"),
    ):
        problem(keyless.send(method, path, json={}), 401, "unauthorized")


def test_an_agent_that_becomes_idle_is_given_the_first_in_its_line(fleet: Fleet) -> None:
    fleet.report("active")
    fleet.submit({"taskId": "a", "agentId": "a-1"})
    fleet.wait("a")
    assert fleet.kept_for() is None
    fleet.report("IDLE")
    assert fleet.kept_for() == fleet.id("a")


def test_the_state_of_a_function_agent_is_what_it_does(fleet: Fleet, client: Client) -> None:
    assert client.get("/agent/echo/state").json["state"] == "idle"
    fleet.submit({"taskId": "a", "agentId": "echo"})
    fleet.claim("a")
    answer = client.get("/agent/echo/state").json
    assert (answer["state"], answer["details"]) == ("active", None)
    assert client.get("/agents/echo").json["state"] == "active"


# --- Results in state reports ---------------------------------------------------------------------


def details(given: Given, **more: Any) -> dict[str, Any]:
    proof = {"opscore_task_id": str(given.task_id), "opscore_attempt_token": given.token}
    return {name: value for name, value in (proof | more).items() if value is not ...}


@pytest.mark.parametrize(
    ("state", "said", "output"),
    [
        ("idle", {"result": {"words": 12}}, {"words": 12}),
        ("active", {"result": 0}, 0),
        ("finished", {"result": None}, None),
        ("idle", {"result": "x", "error": None, "status": "whatever"}, "x"),
    ],
)
def test_a_report_with_a_result_ends_the_task_as_well(
    fleet: Fleet, client: Client, state: str, said: dict[str, Any], output: Any
) -> None:
    given = fleet.give_one()
    answer = fleet.report(state, details=details(given, **said))
    assert answer.status_code == 202, answer.json
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["output"]) == ("completed", output)
    run = client.get(f"/runs/{task['runId']}").json
    assert (run["status"], run["output"]) == ("completed", output)
    assert fleet.history()[0] == state and fleet.shown()["holders"] == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("out of ink", "agent_error", "out of ink"),
        ({"code": "no_ink", "message": "out of ink"}, "no_ink", "out of ink"),
    ],
)
def test_a_report_with_an_error_fails_the_attempt(
    fleet: Fleet, client: Client, error: Any, code: str, message: str
) -> None:
    given = fleet.give_one(retry={"maxAttempts": 1})
    fleet.report("error", details=details(given, error=error, result=None))
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["error"]) == ("failed", {"code": code, "message": message})
    assert fleet.history()[0] == "error"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("active", {}),
        ("active", {"result": None, "error": None}),
        ("idle", {"error": None}),
        ("error", {"progress": 1}),
    ],
)
def test_a_report_of_a_task_without_its_result_ends_nothing(
    fleet: Fleet, client: Client, state: str, said: dict[str, Any]
) -> None:
    given = fleet.give_one()
    assert fleet.report(state, details=details(given, **said)).status_code == 202
    assert client.get(f"/tasks/{given.task_id}").json["reason"] == "remote"


@pytest.mark.parametrize("state", ["idle", "finished", "error", "active"])
def test_after_its_result_an_agent_is_given_the_next_whatever_it_said(
    fleet: Fleet, state: str
) -> None:
    fleet.submit(*({"taskId": name, "agentId": "a-1", "dependsOn": []} for name in "ab"))
    given = fleet.give()
    fleet.wait("b")
    fleet.report(state, details=details(given, result=1))
    assert fleet.kept_for() == fleet.id("b")


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        ({"opscore_attempt_token": str(uuid4())}, 409, "report_refused"),
        ({"opscore_attempt_token": ...}, 409, "report_refused"),
        ({"opscore_task_id": str(uuid4())}, 404, "task_not_found"),
        ({"opscore_task_id": "task_7"}, 422, "invalid_request"),
        ({"opscore_task_id": None}, 422, "invalid_request"),
        ({"opscore_attempt_token": "mine"}, 422, "invalid_request"),
        ({"error": ["out", "of", "ink"]}, 422, "invalid_request"),
        ({"error": {"code": 7}}, 422, "invalid_request"),
    ],
)
def test_of_a_report_whose_result_is_refused_nothing_is_kept(
    still: Still, said: dict[str, Any], status: int, code: str
) -> None:
    answer = still.report("error", details=details(still.given, **{"result": 1, **said}))
    body = problem(answer, status, code)
    if status == 422:
        assert all(place.startswith("/details") for place in body["errors"])
    assert still.is_as_before()


def test_faults_of_a_result_in_details_are_named_in_the_whole_body(still: Still) -> None:
    said = {"opscore_task_id": "task_7", "opscore_attempt_token": 7}
    answer = still.report("idle", details=details(still.given, result=1, **said))
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert sorted(errors) == ["/details/opscore_attempt_token", "/details/opscore_task_id"]
    assert still.is_as_before()


def test_one_agent_cannot_end_the_task_of_another_by_its_state(
    fleet: Fleet, client: Client
) -> None:
    notify(client, changed({"agentId": "liar"}))
    given = fleet.give_one()
    body = {"state": "idle", "details": details(given, result="a lie")}
    problem(client.post("/agent/liar/state", body), 409, "report_refused")
    problem(client.post("/agent/nobody/state", body), 404, "agent_not_found")
    assert client.get("/agent/liar/state").json["state"] == "UNKNOWN"


def test_the_same_report_twice_is_accepted_twice(fleet: Fleet) -> None:
    given = fleet.give_one()
    for _ in range(2):
        assert fleet.report("idle", details=details(given, result=1)).status_code == 202
    problem(fleet.report("idle", details=details(given, result=2)), 409, "report_refused")
    assert fleet.history() == ["idle", "idle", "idle", "UNKNOWN"]


def test_an_agent_without_tokens_needs_only_the_tasks_id_if_it_may(
    fleet: Fleet, client: Client
) -> None:
    client.send("PATCH", "/agents/a-1", json={"requireToken": False})
    given = fleet.give_one()
    fleet.report("idle", details=details(given, result=1, opscore_attempt_token=...))
    assert client.get(f"/tasks/{given.task_id}").json["status"] == "completed"


# --- Results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "output"),
    [
        ({"status": "completed", "result": {"rows": 3}}, {"rows": 3}),
        ({"status": "completed", "result": {"rows": 3}, "error": None}, {"rows": 3}),
        ({"status": "success", "result": [1.5, None]}, [1.5, None]),
        ({"status": "completed"}, None),
        ({"result": "words"}, "words"),
        ({"status": None, "result": None}, None),
    ],
)
def test_a_result_completes_the_task_and_its_run(
    fleet: Fleet, client: Client, said: dict[str, Any], output: Any
) -> None:
    given = fleet.give_one()
    answer = client.post(given.result, given.says(**said))
    assert answer.status_code == 200, answer.json
    assert answer.json == {"taskId": str(given.task_id), "status": "accepted"}
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["output"]) == ("completed", output)
    assert [attempt["status"] for attempt in task["attempts"]] == ["completed"]
    assert client.get(f"/runs/{task['runId']}").json["status"] == "completed"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"status": "failed", "error": "no ink"}, {"code": "agent_error", "message": "no ink"}),
        ({"status": "error", "error": {"code": "Ink"}}, {"code": "ink"}),
        ({"status": "failed"}, {"code": "agent_error"}),
        ({"error": "no ink", "result": None, "status": "failed"}, {"message": "no ink"}),
        ({"error": "no ink"}, {"message": "no ink"}),
    ],
)
def test_a_failure_is_retried_while_attempts_are_left(
    fleet: Fleet, client: Client, said: dict[str, Any], error: dict[str, Any]
) -> None:
    given = fleet.give_one(retry={"maxAttempts": 2})
    assert client.post(given.result, given.says(**said)).status_code == 200
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["reason"]) == ("waiting", "retry")
    assert task["attempts"][0]["error"].items() >= error.items()
    again = fleet.give_again()
    assert client.post(again.result, again.says(**said)).status_code == 200
    task = client.get(f"/tasks/{given.task_id}").json
    assert task["status"] == "failed" and task["error"].items() >= error.items()
    assert client.get(f"/runs/{task['runId']}").json["status"] == "failed"


def test_an_agent_that_gives_up_is_not_asked_again(fleet: Fleet, client: Client) -> None:
    given = fleet.give_one()
    error = {"code": "gave_up", "message": "there is no such ticket"}
    client.post(given.result, given.says(status="failed", error=error))
    assert client.get(f"/tasks/{given.task_id}").json["error"] == error


@pytest.mark.parametrize("spelling", ["opscore_attempt_token", "attemptToken"])
@pytest.mark.parametrize("named", [{}, {"agentId": "a-1"}, {"agentId": None}])
def test_the_token_is_proof_enough_in_both_spellings(
    fleet: Fleet, client: Client, spelling: str, named: dict[str, Any]
) -> None:
    given = fleet.give_one()
    proof = {spelling: given.token, **named}
    assert client.post(given.heartbeat, proof).status_code == 200
    assert client.post(given.result, proof | {"result": 1}).status_code == 200


def test_two_tokens_that_differ_prove_nothing(still: Still) -> None:
    for path, more in ((still.given.result, {"result": 1}), (still.given.heartbeat, {})):
        answer = still.client.post(path, still.given.says(attemptToken=str(uuid4()), **more))
        assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/attemptToken"]
    assert still.is_as_before()


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ({"opscore_attempt_token": str(uuid4())}, "another attempt"),
        ({"opscore_attempt_token": None}, "opscore_attempt_token"),
        ({"opscore_attempt_token": None, "agentId": None}, "opscore_attempt_token"),
        ({"agentId": "a-2"}, "Another agent"),
        ({"agentId": "a-2", "opscore_attempt_token": str(uuid4())}, "another attempt"),
    ],
)
def test_only_who_has_the_attempt_may_speak_of_it(
    still: Still, proof: dict[str, Any], said: str
) -> None:
    for path, more in ((still.given.result, {"result": "a lie"}), (still.given.heartbeat, {})):
        answer = still.client.post(path, {**still.given.says(**more), **proof})
        assert said in problem(answer, 409, "report_refused")["detail"]
    assert still.is_as_before()


def test_an_agent_that_knows_no_tokens_is_known_by_its_id_if_it_may(
    fleet: Fleet, client: Client
) -> None:
    client.send("PATCH", "/agents/a-1", json={"requireToken": False})
    given = fleet.give_one()
    problem(client.post(given.result, {"result": 1}), 409, "report_refused")
    problem(client.post(given.result, {"agentId": "a-2", "result": 1}), 409, "report_refused")
    assert client.post(given.heartbeat, {"agentId": "a-1"}).status_code == 200
    for _ in range(2):
        answer = client.post(given.result, {"agentId": "a-1", "result": 1})
        assert answer.status_code == 200, answer.json


def test_a_result_may_have_a_mebibyte_and_one_byte_more_ends_the_attempt_for_good(
    fleet: Fleet, client: Client
) -> None:
    largest = "\N{GRINNING FACE}" * ((2**20 - 4) // 4) + "xx"
    given = fleet.give_one()
    assert client.post(given.result, given.says(result=largest)).status_code == 200
    assert client.get(f"/tasks/{given.task_id}").json["output"] == largest
    given = fleet.give_one()
    assert client.post(given.result, given.says(result=largest + "x")).status_code == 200
    check_too_large(client.get(f"/tasks/{given.task_id}").json)


def check_too_large(task: dict[str, Any]) -> None:
    assert (task["status"], task["error"]["code"]) == ("failed", "output_too_large"), task["error"]
    assert "1,048,577 bytes as JSON; at most 1,048,576" in task["error"]["message"]
    assert len(task["attempts"]) == 1


def test_a_result_in_a_state_report_is_as_large_as_any(fleet: Fleet, client: Client) -> None:
    largest = "x" * (2**20 - 2)
    given = fleet.give_one()
    assert fleet.report("idle", details=details(given, result=largest)).status_code == 202
    assert client.get(f"/tasks/{given.task_id}").json["output"] == largest
    given = fleet.give_one()
    assert fleet.report("idle", details=details(given, result=largest + "x")).status_code == 202
    check_too_large(client.get(f"/tasks/{given.task_id}").json)


def test_the_same_result_twice_is_answered_alike_and_another_one_is_refused(
    fleet: Fleet, client: Client
) -> None:
    given = fleet.give_one()
    first, again = (client.post(given.result, given.says(result={"n": 1})) for _ in range(2))
    assert (first.status_code, first.json) == (again.status_code, again.json)
    problem(client.post(given.result, given.says(result={"n": 2})), 409, "report_refused")
    problem(client.post(given.result, given.says(status="failed")), 409, "report_refused")
    problem(client.post(given.heartbeat, given.says()), 409, "report_refused")
    assert client.get(f"/tasks/{given.task_id}").json["output"] == {"n": 1}


def test_a_result_of_an_attempt_that_is_over_is_refused_and_the_present_one_goes_on(
    fleet: Fleet, client: Client
) -> None:
    old = fleet.give_one()
    client.post(old.result, old.says(status="failed", error="no ink"))
    new = fleet.give_again()
    problem(client.post(old.result, old.says(result="late")), 409, "report_refused")
    problem(client.post(old.heartbeat, old.says()), 409, "report_refused")
    same = client.post(old.result, old.says(status="failed", error="no ink"))
    assert same.status_code == 200, same.json
    assert client.get(f"/tasks/{new.task_id}").json["reason"] == "remote"
    assert client.post(new.result, new.says(result="in time")).status_code == 200
    assert client.get(f"/tasks/{new.task_id}").json["output"] == "in time"


def test_a_result_for_a_cancelled_task_is_refused(fleet: Fleet, client: Client) -> None:
    given = fleet.give_one()
    client.post(f"/runs/{fleet.plan.run_id}/cancel")
    problem(client.post(given.result, given.says(result=1)), 409, "report_refused")
    problem(client.post(given.heartbeat, given.says()), 409, "report_refused")
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["output"]) == ("cancelled", None)
    assert fleet.shown()["holders"] == []


def test_a_task_that_nobody_has_takes_no_result(fleet: Fleet, client: Client) -> None:
    fleet.submit({"taskId": "a", "agentId": "a-1"}, {"taskId": "b", "agentId": "echo"})
    for name in "ab":
        given = Given(fleet.id(name), str(uuid4()))
        problem(client.post(given.result, given.says(result=1)), 409, "report_refused")
        problem(client.post(given.heartbeat, given.says()), 409, "report_refused")


@pytest.mark.parametrize("task_id", ["01890a5d-ac96-774b-bcce-b302099a8057", "task_7", "0"])
def test_a_task_that_is_not_there_takes_no_result(empty: Client, task_id: str) -> None:
    given = {"opscore_attempt_token": str(uuid4())}
    problem(empty.post(f"/tasks/{task_id}/result", {**given, "result": 1}), 404, "task_not_found")
    problem(empty.post(f"/tasks/{task_id}/heartbeat", given), 404, "task_not_found")


def test_an_agent_that_reports_before_it_answered_the_call_is_believed(
    fleet: Fleet, client: Client
) -> None:
    fleet.submit({"taskId": "a", "agentId": "a-1"})
    given = fleet.give(accepts=False)
    assert client.post(given.result, given.says(result=1)).status_code == 200
    assert client.get(f"/tasks/{given.task_id}").json["status"] == "completed"


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, [""]),
        ({"status": "done", "result": 1}, ["/status"]),
        ({"status": 7}, ["/status"]),
        ({"error": None}, [""]),
        ({"error": ["no", "ink"]}, [""]),
        ({"status": "failed", "error": 7}, [""]),
        ({"status": "failed", "error": {"code": 7}}, [""]),
        ({"result": 1, "colour": "red"}, ["/colour"]),
        ({"result": 1, "agentId": 7}, ["/agentId"]),
        ({"result": 1, "opscore_attempt_token": "mine"}, ["/opscore_attempt_token"]),
        ({"result": 1, "attemptToken": 7}, ["/attemptToken"]),
        ({"result": {"a": ["\ud800", 2**70]}}, ["/result/a/0", "/result/a/1"]),
    ],
)
def test_a_result_must_be_as_it_must_be(
    still: Still, body: dict[str, Any], places: list[str]
) -> None:
    answer = still.client.post(still.given.result, body)
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert sorted(errors) == places and all(errors.values())
    assert still.is_as_before()


def test_an_unknown_member_is_told_the_known_ones_as_they_are_spelled(still: Still) -> None:
    answer = still.client.post(still.given.heartbeat, still.given.says(token="x"))
    (said,) = problem(answer, 422, "invalid_request")["errors"]["/token"]
    assert said == "Unknown; known here: agentId, attemptToken, opscore_attempt_token."


@pytest.mark.parametrize(
    ("raw", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"result": NaN}', "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * (2**22 + 1), "application/json", 413),
    ],
)
def test_a_result_that_cannot_be_read_is_refused(
    still: Still, raw: bytes, kind: str, status: int
) -> None:
    answer = still.client.post(still.given.result, data=raw, headers={"Content-Type": kind})
    assert answer.status_code == status and still.is_as_before()


def test_a_result_wakes_the_next_of_its_run_and_of_the_agents_line(
    fleet: Fleet, client: Client
) -> None:
    def waits(name: str, *before: str) -> dict[str, Any]:
        return {"taskId": name, "agentId": "a-1", "dependsOn": list(before)}

    fleet.submit(waits("a"), waits("b"))
    given = fleet.give()
    fleet.wait("b")
    client.post(given.result, given.says(result=1))
    assert fleet.kept_for() == fleet.id("b")


# --- Heartbeats -----------------------------------------------------------------------------------


def test_a_heartbeat_renews_the_lease_of_its_attempt(fleet: Fleet, client: Client) -> None:
    client.send("PATCH", "/agents/a-1", json={"heartbeatSeconds": 30})
    given = fleet.give_one(timeoutSeconds=600)
    fleet.alter("UPDATE tasks SET lease_expires_at = now() + interval '1 s' WHERE run_id = :run")
    answer = client.post(given.heartbeat, given.says())
    assert answer.status_code == 200, answer.json
    lease = datetime.fromisoformat(answer.json["leaseExpiresAt"])
    assert answer.json == {
        "taskId": str(given.task_id),
        "leaseExpiresAt": answer.json["leaseExpiresAt"],
        "cancelled": False,
    }
    assert 25 < (lease - datetime.now(UTC)).total_seconds() <= 30
    assert fleet.task("a").lease_expires_at == lease
    (holder,) = fleet.shown()["holders"]
    assert holder["leaseExpiresAt"] == answer.json["leaseExpiresAt"]


def test_a_heartbeat_does_not_move_the_deadline(fleet: Fleet, client: Client) -> None:
    given = fleet.give_one(timeoutSeconds=60)
    answer = client.post(given.heartbeat, given.says()).json
    assert datetime.fromisoformat(answer["leaseExpiresAt"]) == fleet.task("a").deadline_at


def test_a_heartbeat_tells_that_the_run_ends(fleet: Fleet, client: Client) -> None:
    fleet.submit({"taskId": "a", "agentId": "a-1"})
    given = fleet.give(accepts=False)
    client.post(f"/runs/{fleet.plan.run_id}/cancel")
    answer = client.post(given.heartbeat, given.says())
    assert (answer.status_code, answer.json["cancelled"]) == (200, True)


# --- What operators change ------------------------------------------------------------------------


def test_what_is_changed_is_answered_and_the_rest_stays(fleet: Fleet, client: Client) -> None:
    for change in (
        {"capacity": 7},
        {"heartbeatSeconds": 0.5},
        {"heartbeatSeconds": 45},
        {"heartbeatSeconds": None},
        {"requireToken": False},
        {},
        {"paused": True},
        {"paused": False},
        {"draining": True},
        {"draining": False},
        {"capacity": 1, "paused": True, "draining": True, "requireToken": True},
    ):
        before = fleet.shown()
        answer = client.send("PATCH", "/agents/a-1", json=change)
        assert answer.status_code == 200, answer.json
        assert answer.json == fleet.shown()
        after = {**before, **change}
        closed = next((name for name in ("paused", "draining") if after[name]), None)
        told = {"available": closed is None, "unavailableBecause": closed}
        assert answer.json == after | told


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 0},
        {"capacity": -1},
        {"capacity": 1.5},
        {"capacity": 2.0},
        {"capacity": "2"},
        {"capacity": True},
        {"capacity": None},
        {"capacity": 10_001},
        {"capacity": 2**40},
        {"paused": "yes"},
        {"paused": 1},
        {"paused": None},
        {"draining": 0},
        {"requireToken": "false"},
        {"heartbeatSeconds": 0},
        {"heartbeatSeconds": -1},
        {"heartbeatSeconds": "30"},
        {"heartbeatSeconds": True},
        {"heartbeatSeconds": 1e300},
        {"state": "idle"},
    ],
)
def test_a_change_must_be_as_it_must_be(still: Still, change: dict[str, Any]) -> None:
    answer = still.client.send("PATCH", "/agents/a-1", json={"draining": True, **change})
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/" + next(iter(change))]
    assert still.is_as_before()


@pytest.mark.parametrize(
    "change", [{"capacity": 2}, {"heartbeatSeconds": 5}, {"requireToken": False}]
)
def test_of_a_function_agent_its_declaration_says_the_rest(
    fleet: Fleet, client: Client, change: dict[str, Any]
) -> None:
    answer = client.send("PATCH", "/agents/single", json=change)
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/" + next(iter(change))]
    assert client.send("PATCH", "/agents/single", json={"paused": True}).status_code == 200
    problem(client.send("PATCH", "/agents/nobody", json={"paused": True}), 404, "agent_not_found")


@pytest.mark.parametrize(
    ("before", "after"),
    [({"paused": True}, {"paused": False}), ({"draining": True}, {"draining": False})],
)
def test_whoever_is_let_go_on_is_given_the_first_in_line(
    fleet: Fleet, client: Client, before: dict[str, Any], after: dict[str, Any]
) -> None:
    client.send("PATCH", "/agents/a-1", json=before)
    fleet.submit({"taskId": "a", "agentId": "a-1"})
    fleet.wait("a")
    assert fleet.task("a").reason == "agent_unavailable"
    client.send("PATCH", "/agents/a-1", json=after)
    assert fleet.kept_for() == fleet.id("a")


def test_more_capacity_is_given_out_at_once_and_less_takes_nothing_away(
    fleet: Fleet, client: Client
) -> None:
    fleet.submit(*({"taskId": name, "agentId": "a-1", "dependsOn": []} for name in "abc"))
    fleet.give("a")
    fleet.wait("b")
    client.send("PATCH", "/agents/a-1", json={"capacity": 2})
    assert fleet.task("b").woken_at is not None
    fleet.claim("b", has_slot=True)
    shown = client.send("PATCH", "/agents/a-1", json={"capacity": 1}).json
    assert (shown["capacity"], shown["running"], len(shown["holders"])) == (1, 2, 2)


# --- What is shown --------------------------------------------------------------------------------


def test_an_agent_says_whether_it_gets_work_and_why_not(fleet: Fleet, client: Client) -> None:
    for limit, closed, state, because in (
        (None, (), "idle", None),
        (None, (), "active", None),
        (None, (), "initializing", None),
        (None, (), "error", "reported error"),
        (None, ("paused", "draining"), "error", "paused"),
        (None, ("draining",), "error", "draining"),
        (30, (), "idle", "silent for 45 s"),
        (60, (), "idle", None),
        (60, (), "error", "reported error"),
    ):
        fleet.report(state)
        change = {name: name in closed for name in ("paused", "draining")}
        client.send("PATCH", "/agents/a-1", json=change | {"heartbeatSeconds": limit})
        with fleet.tx() as tx:
            tx.execute(text("UPDATE agents SET seen_at = now() - interval '45 s'"))
        shown = fleet.shown()
        assert (shown["available"], shown["unavailableBecause"]) == (because is None, because)


def test_an_agent_shows_what_it_has_and_who_waits_for_it(fleet: Fleet, client: Client) -> None:
    fleet.submit(*({"taskId": name, "agentId": "a-1", "dependsOn": []} for name in "abc"))
    given = fleet.give("a")
    fleet.wait("c")
    fleet.wait("b")
    shown = fleet.shown()
    (holder,) = shown["holders"]
    assert holder == {
        "slot": 1,
        "taskId": str(given.task_id),
        "runId": str(fleet.plan.run_id),
        "taskDefinitionId": "a",
        "attempt": 1,
        "leaseExpiresAt": holder["leaseExpiresAt"],
    }
    assert (shown["running"], shown["waiting"]) == (1, 2)
    first, second = shown["line"]
    assert first == {
        "position": 1,
        "taskId": str(fleet.id("c")),
        "runId": str(fleet.plan.run_id),
        "taskDefinitionId": "c",
        "waitingSince": first["waitingSince"],
        "priority": "normal",
        "estimatedStartAt": None,
    }
    assert (second["position"], second["taskDefinitionId"]) == (2, "b")
    tasks = {task["taskDefinitionId"]: task for task in client.get(tasks_of(fleet)).json["items"]}
    assert {name: task["queue"] for name, task in tasks.items()} == {
        "a": None,
        "b": {"position": 2, "estimatedStartAt": None},
        "c": {"position": 1, "estimatedStartAt": None},
    }


def tasks_of(fleet: Fleet) -> str:
    return f"/runs/{fleet.plan.run_id}/tasks"


def test_a_task_that_an_agent_has_says_so(fleet: Fleet, client: Client) -> None:
    given = fleet.give_one()
    task = client.get(f"/tasks/{given.task_id}").json
    assert (task["status"], task["reason"], task["agentId"]) == ("waiting", "remote", "a-1")
    assert task["waitingFor"].startswith("agent a-1 has it and reports when it is done; until 20")


def test_when_a_turn_comes_is_told_from_how_long_the_slot_was_held_of_late(
    fleet: Fleet, client: Client
) -> None:
    fleet.submit(*({"taskId": name, "agentId": "a-1", "dependsOn": []} for name in "ab"))
    fleet.give("a")
    fleet.wait("b")
    with fleet.tx() as tx:
        tx.execute(text("UPDATE slots SET average_seconds = 90 WHERE pool = 'a-1'"))
    task = client.get(f"/tasks/{fleet.id('b')}").json
    (waiter,) = fleet.shown()["line"]
    for told in (task["queue"], waiter):
        left = datetime.fromisoformat(told["estimatedStartAt"]) - datetime.now(UTC)
        assert 80 < left.total_seconds() <= 90


# --- The description ------------------------------------------------------------------------------


def test_the_webhook_is_described_with_its_signature_instead_of_the_key(empty: Client) -> None:
    document = empty.get("/openapi.json").json
    operation = document["paths"]["/v1/opscore" + NOTIFY]["post"]
    assert operation["security"] == [{"signature": [], "timestamp": []}]
    schemes = document["components"]["securitySchemes"]
    assert schemes["signature"]["name"] == "X-AgentKit-Signature"
    assert schemes["timestamp"]["name"] == "X-AgentKit-Timestamp"
    assert set(operation["responses"]) == {
        *("200", "400", "401", "404", "409", "413", "415", "422", "500", "503")
    }
    assert "signature" in operation["responses"]["401"]["description"]
    assert "event" in operation["responses"]["400"]["description"]


def test_the_examples_of_the_description_are_accepted(fleet: Fleet, client: Client) -> None:
    def example(method: str, path: str) -> Any:
        operation = client.get("/openapi.json").json["paths"]["/v1/opscore" + path][method]
        return operation["requestBody"]["content"]["application/json"]["example"]

    given = fleet.give_one()
    hosts = {"agent_details": {**DETAILS, **example("post", NOTIFY)["agent_details"]}}
    assert notify(client, example("post", NOTIFY) | hosts).status_code == 200
    state = example("post", "/agent/{agentId}/state")
    assert client.post("/agent/a-1/state", state).status_code == 202
    change = example("patch", "/agents/{agentId}")
    assert client.send("PATCH", "/agents/a-1", json=change).status_code == 200
    own = {"opscore_attempt_token": given.token}
    beat = example("post", "/tasks/{taskId}/heartbeat") | own
    assert client.post(given.heartbeat, beat).status_code == 200
    result = example("post", "/tasks/{taskId}/result") | own
    assert client.post(given.result, result).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("get", "/agent/{agentId}/state", {"404"}),
        ("post", "/agent/{agentId}/state", {"400", "404", "409", "422"}),
        ("get", "/agents/{agentId}/state/history", {"404", "422"}),
        ("patch", "/agents/{agentId}", {"400", "404", "422"}),
        ("post", "/tasks/{taskId}/result", {"400", "404", "409", "422"}),
        ("post", "/tasks/{taskId}/heartbeat", {"400", "404", "409", "422"}),
    ],
)
def test_what_may_be_refused_is_described(
    empty: Client, method: str, path: str, statuses: set[str]
) -> None:
    operation = empty.get("/openapi.json").json["paths"]["/v1/opscore" + path][method]
    refused = {status for status in operation["responses"] if status >= "400"}
    assert statuses | {"401", "500", "503"} == refused - {"413", "415"}
