"""Schedules over HTTP: every operation, and what cannot be."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from http_client import Client, open_client, problem
from sqlalchemy import text

from opscore import schedules
from opscore.config import Settings

DEFINITION = {
    "id": "report",
    "inputSchema": {"type": "object", "properties": {"topic": {"type": "string"}}},
    "tasks": [{"taskId": "a", "agentId": "writer"}],
}
NIGHTLY = {"name": "nightly", "workflowId": "report", "cron": "30 2 * * *"}
DEFAULTS = {
    **{"timezone": "UTC", "overlap": "skip", "catchUp": "last", "catchUpWindowSeconds": 86400.0},
    **{"enabled": True, "jitterSeconds": 0.0, "priority": "normal", "labels": {}, "input": {}},
    **{"version": None, "agentId": None, "everySeconds": None, "startAt": None, "endAt": None},
}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        assert client.post("/workflows", DEFINITION).status_code == 201
        yield client


def create(client: Client, **more: Any) -> Any:
    answer = client.post("/schedules", {**NIGHTLY, **more})
    assert answer.status_code == 201, answer.json
    return answer.json


def patch(client: Client, **values: Any) -> Any:
    return client.send("PATCH", "/schedules/nightly", json=values)


def fire(client: Client, seconds: float) -> None:
    """Let so much time pass, and a beat look."""
    with client.database.transaction() as tx:
        age = {"age": timedelta(seconds=seconds)}
        statement = (
            "UPDATE schedules SET created_at = created_at - :age, next_at = next_at - :age,"
            " decided_at = decided_at - :age"
        )
        tx.execute(text(statement), age)
        schedules.tick(tx, 50)


def test_a_schedule_is_created_with_defaults_and_found_where_the_answer_says(
    client: Client,
) -> None:
    answer = client.post("/schedules", NIGHTLY)
    assert (answer.status_code, answer.json["warnings"]) == (201, [])
    body = {name: value for name, value in answer.json.items() if name != "warnings"}
    assert body.items() >= {**NIGHTLY, **DEFAULTS}.items()
    next_at = datetime.fromisoformat(body["nextAt"])
    assert (next_at.hour, next_at.minute) == (2, 30) and next_at > datetime.now(UTC)
    assert client.get(answer.headers["Location"]).json == body


def test_a_name_is_taken_once(client: Client) -> None:
    create(client)
    problem(client.post("/schedules", NIGHTLY), 409, "schedule_exists")


@pytest.mark.parametrize(
    ("values", "pointer"),
    [
        ({"cron": "0 * * * * *"}, "/cron"),
        ({"cron": "every day"}, "/cron"),
        ({"cron": "61 * * * *"}, "/cron"),
        ({"cron": "0 0 31 2 *"}, "/cron"),
        ({"cron": "@often"}, "/cron"),
        ({"cron": None}, "/cron"),
        ({"cron": 5}, "/cron"),
        ({"everySeconds": 60}, "/cron"),
        ({"cron": None, "everySeconds": 0.5}, "/everySeconds"),
        ({"cron": None, "everySeconds": 0}, "/everySeconds"),
        ({"cron": None, "everySeconds": "60"}, "/everySeconds"),
        ({"cron": None, "everySeconds": 60, "timezone": "Asia/Tokyo"}, "/timezone"),
        ({"timezone": "Mars/Olympus"}, "/timezone"),
        ({"timezone": None}, "/timezone"),
        ({"startAt": "2099-01-02T00:00:00Z", "endAt": "2099-01-01T00:00:00Z"}, "/endAt"),
        ({"startAt": "2099-01-02T00:00:00"}, "/startAt"),
        ({"input": {"topic": 5}}, "/input/topic"),
        ({"input": {"topic": "${nobody}"}}, "/input/topic"),
        ({"input": {"topic": "${firing.on}"}}, "/input/topic"),
        ({"overlap": "perhaps"}, "/overlap"),
        ({"catchUp": "some"}, "/catchUp"),
        ({"catchUpWindowSeconds": 0}, "/catchUpWindowSeconds"),
        ({"jitterSeconds": -1}, "/jitterSeconds"),
        ({"jitterSeconds": "1"}, "/jitterSeconds"),
        ({"priority": "urgent"}, "/priority"),
        ({"enabled": "yes"}, "/enabled"),
        ({"labels": {"a": 1}}, "/labels/a"),
        ({"version": 0}, "/version"),
        ({"crom": "* * * * *"}, "/crom"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(
    client: Client, values: dict[str, Any], pointer: str
) -> None:
    def refused(answer: Any) -> None:
        code = "invalid_input" if values.get("input") == {"topic": 5} else "invalid_request"
        assert list(problem(answer, 422, code)["errors"]) == [pointer]

    refused(client.post("/schedules", {**NIGHTLY, **values}))
    assert client.get("/schedules").json["items"] == []
    before = create(client)
    if values != {"cron": None, "everySeconds": 60, "timezone": "Asia/Tokyo"}:
        refused(patch(client, **values))
    assert client.get("/schedules/nightly").json.items() <= before.items()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({**NIGHTLY, "name": "a b"}, "/name"),
        ({"workflowId": "report", "cron": "@daily"}, "/name"),
        ({"name": "nightly", "cron": "@daily"}, "/workflowId"),
    ],
)
def test_a_schedule_has_a_name_and_a_workflow(
    client: Client, body: dict[str, Any], pointer: str
) -> None:
    answer = problem(client.post("/schedules", body), 422, "invalid_request")
    assert list(answer["errors"]) == [pointer]


def test_a_schedule_of_what_is_not_there_is_refused(client: Client) -> None:
    for values, code in [
        ({"workflowId": "nowhere"}, "workflow_not_found"),
        ({"version": 7}, "workflow_not_found"),
        ({"agentId": "nobody"}, "agent_not_found"),
    ]:
        problem(client.post("/schedules", {**NIGHTLY, **values}), 404, code)


def test_a_cron_that_looks_wrong_is_accepted_with_a_warning(client: Client) -> None:
    (warning,) = create(client, cron="*/90 * * * *")["warnings"]
    assert "*/90" in warning
    assert len(patch(client, cron="*/45 * * * *").json["warnings"]) == 1
    assert patch(client, cron="@hourly").json["warnings"] == []


def test_a_change_changes_what_it_names(client: Client) -> None:
    before = create(client, labels={"team": "support"}, timezone="Asia/Tokyo")
    after = patch(client, overlap="queue", priority="high").json
    assert (after["overlap"], after["priority"]) == ("queue", "high")
    same = set(before) - {"overlap", "priority", "updatedAt"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    after = patch(client, cron=None, everySeconds=90).json
    assert (after["cron"], after["everySeconds"], after["timezone"]) == (None, 90.0, "UTC")
    assert patch(client, everySeconds=None, cron="@daily").json["everySeconds"] is None
    problem(client.send("PATCH", "/schedules/nobody", json={}), 404, "schedule_not_found")


def test_a_schedule_is_paused_and_resumed(client: Client) -> None:
    create(client)
    for _ in range(2):
        paused = client.post("/schedules/nightly/pause").json
        assert (paused["enabled"], paused["nextAt"]) == (False, None)
    for _ in range(2):
        resumed = client.post("/schedules/nightly/resume").json
        assert resumed["enabled"] and resumed["nextAt"]


def test_a_schedule_can_be_paused_whatever_is_wrong_with_it(client: Client) -> None:
    create(client)
    with client.database.transaction() as tx:
        tx.execute(text("UPDATE schedules SET timezone = 'Mars/Olympus'"))
        tx.execute(text("DELETE FROM workflows"))
    assert client.post("/schedules/nightly/pause").status_code == 200
    answer = problem(client.post("/schedules/nightly/resume"), 422, "invalid_request")
    assert list(answer["errors"]) == ["/timezone"]
    problem(client.get("/schedules/nightly/preview"), 422, "invalid_request")


def test_the_next_moments_are_listed(client: Client) -> None:
    create(client, cron="0 12 * * *", timezone="Asia/Tokyo")
    items = client.get("/schedules/nightly/preview?count=3").json["items"]
    assert len(items) == 3 and all(item.endswith("T03:00:00Z") for item in items)
    assert len(client.get("/schedules/nightly/preview").json["items"]) == 10
    for count in ("0", "201", "few"):
        answer = client.get(f"/schedules/nightly/preview?count={count}")
        assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/count"]
    problem(client.get("/schedules/nobody/preview"), 404, "schedule_not_found")


def test_triggered_again_with_the_same_key_it_fires_once(client: Client) -> None:
    create(client, input={"topic": "${firing.schedule}"}, labels={"team": "support"})
    key = {"Idempotency-Key": "once"}
    first, again = (client.post("/schedules/nightly/trigger", headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json["runId"] == again.json["runId"]
    assert again.headers["Idempotent-Replayed"] == "true"
    run = client.get(first.headers["Location"]).json
    assert (run["schedule"], run["input"], run["labels"]) == (
        *("nightly", {"topic": "nightly"}),
        {"team": "support"},
    )
    (firing,) = client.get("/schedules/nightly/firings").json["items"]
    assert (firing["runId"], firing["runStatus"]) == (run["runId"], "queued")
    assert firing["status"] == "started" and firing["by"].startswith("key:")
    create(client, name="other")
    other = client.post("/schedules/other/trigger", headers=key)
    problem(other, 409, "idempotency_key_reused")
    problem(client.post("/schedules/nobody/trigger"), 404, "schedule_not_found")


def test_firings_are_listed_with_what_became_of_them_newest_first(client: Client) -> None:
    create(client, cron=None, everySeconds=60, catchUp="all")
    fire(client, 190)
    first = client.get("/schedules/nightly/firings?limit=2").json
    cursor = first["nextCursor"]
    rest = client.get(f"/schedules/nightly/firings?limit=2&cursor={cursor}").json
    assert rest["nextCursor"] is None
    firings = first["items"] + rest["items"]
    assert [f["status"] for f in firings] == ["skipped", "skipped", "started"]
    assert firings[0]["moment"] > firings[1]["moment"] > firings[2]["moment"]
    assert firings[0]["error"]["code"] == "overlap" and firings[0]["runId"] is None
    assert (firings[2]["error"], firings[2]["runStatus"]) == (None, "queued")
    problem(client.get("/schedules/nobody/firings"), 404, "schedule_not_found")


def test_a_firing_that_failed_says_why(client: Client) -> None:
    create(client, cron=None, everySeconds=60)
    client.post("/workflows", {**DEFINITION, "inputSchema": {"required": ["ticket"]}})
    fire(client, 61)
    (firing,) = client.get("/schedules/nightly/firings").json["items"]
    assert (firing["status"], firing["runId"], firing["runStatus"]) == ("failed", None, None)
    assert firing["error"]["code"] == "invalid_input" and "/input" in firing["error"]["message"]
    assert client.get("/schedules/nightly").json["enabled"]


def test_events_are_listed_newest_first_with_who_did_what(client: Client) -> None:
    create(client, cron=None, everySeconds=60)
    create(client, name="other")
    patch(client, overlap="queue")
    for action in ("pause", "resume"):
        client.post(f"/schedules/nightly/{action}")
    run = client.post("/schedules/nightly/trigger").json
    client.post("/workflows", {**DEFINITION, "inputSchema": {"required": ["ticket"]}})
    client.post(f"/runs/{run['runId']}/cancel")
    fire(client, 61)
    first = client.get("/schedules/nightly/events?limit=4").json
    rest = client.get(f"/schedules/nightly/events?limit=4&cursor={first['nextCursor']}").json
    assert rest["nextCursor"] is None
    events = first["items"] + rest["items"]
    kinds = ["not_fired", "triggered", "resumed", "paused", "changed", "created"]
    assert [event["type"] for event in events] == [f"schedule.{kind}" for kind in kinds]
    seqs = [event["seq"] for event in events]
    assert seqs == sorted(seqs, reverse=True) and len(first["items"]) == 4
    members = set(client.get(f"/runs/{run['runId']}/events").json["items"][0])
    assert {frozenset(event) for event in events} == {frozenset(members)}
    for name in ("taskId", "taskDefinitionId", "index"):
        assert {event[name] for event in events} == {None}
    not_fired, triggered, *_, changed, created = events
    assert (not_fired["by"], not_fired["reason"]) == ("schedule:nightly", "invalid_input")
    assert not_fired["data"].keys() == {"moment", "error"}
    assert triggered["by"].startswith("key:") and triggered["data"]["runId"] == run["runId"]
    assert (changed["data"], created["data"]) == ({"members": ["overlap"]}, {})
    assert {event["by"] for event in events[1:]} == {triggered["by"]}


def test_events_of_a_schedule_that_was_deleted_are_there_and_of_none_are_not(
    client: Client,
) -> None:
    create(client)
    client.send("DELETE", "/schedules/nightly")
    events = client.get("/schedules/nightly/events").json["items"]
    assert [event["type"] for event in events] == ["schedule.deleted", "schedule.created"]
    problem(client.get("/schedules/nobody/events"), 404, "schedule_not_found")
    answer = client.get("/schedules/nightly/events?cursor=WyJhIl0=")
    assert list(problem(answer, 422, "invalid_request")["errors"]) == ["/cursor"]


def test_schedules_are_listed_in_pages(client: Client) -> None:
    for name in ("a", "b", "c"):
        create(client, name=name)
    first = client.get("/schedules?limit=2").json
    rest = client.get(f"/schedules?limit=2&cursor={first['nextCursor']}").json
    assert [s["name"] for s in first["items"] + rest["items"]] == ["c", "b", "a"]
    assert rest["nextCursor"] is None


def test_a_schedule_is_deleted_and_its_runs_stay(client: Client) -> None:
    create(client)
    run = client.post("/schedules/nightly/trigger").json
    answer = client.send("DELETE", "/schedules/nightly")
    assert (answer.status_code, answer.data) == (204, b"")
    problem(client.get("/schedules/nightly"), 404, "schedule_not_found")
    problem(client.send("DELETE", "/schedules/nightly"), 404, "schedule_not_found")
    assert client.get(f"/runs/{run['runId']}").json["schedule"] == "nightly"
