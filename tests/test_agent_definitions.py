"""LLM agents that are defined over the API: judged by what workers have, and run by them."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from http_client import Client, open_client, problem
from rows import add_agent
from sqlalchemy import text
from stack import Servers, Stack, running_stack, wait_until

from opscore import agents, presence
from opscore.agentkit.llm import LLMAgent
from opscore.config import Settings
from opscore.db import Database
from opscore.errors import ConfigurationError
from opscore.presence import Presence

CLERK = {"agentId": "clerk", "model": "scripted:echo", "instructions": "Be brief."}
OFFER = {
    "tools": {"find": 5.0, "slow": 100.0},
    "scripts": ["echo"],
    "providers": ["scripted", "openai"],
    "servers": {"docs": 20.0},
    "built_in": ["http_get", "remember", "recall"],
}


def add_worker(database: Database, **values: Any) -> None:
    given = {"queues": ["opscore.agents"], "offer": OFFER, **values}
    about = ("w@h", "h", 1, "prefork", 1)
    with database.transaction() as tx:
        presence.say(tx, Presence(uuid4(), *about, version=None, **given))


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        add_worker(client.database)
        yield client


def test_a_definition_becomes_an_agent(client: Client) -> None:
    wanted = {**CLERK, "capabilities": ["look"], "capacity": 2, "limits": {"maxSteps": 3}}
    answer = client.post("/agents", wanted)
    assert answer.status_code == 201, answer.json
    assert (answer.json["agentId"], answer.json["version"]) == ("clerk", 1)
    assert answer.json["definition"]["limits"]["maxSteps"] == 3
    assert answer.json["definition"]["limits"]["callSeconds"] == 120
    agent = client.get("/agents/clerk").json
    assert (agent["kind"], agent["version"], agent["capacity"]) == ("llm", "1", 2)
    assert agent["capabilities"] == ["look"] and agent["available"]


def test_the_same_again_is_no_new_version_and_another_is(client: Client) -> None:
    assert [client.post("/agents", CLERK).status_code for _ in range(2)] == [201, 200]
    assert client.post("/agents", {**CLERK, "instructions": "Be long."}).json["version"] == 2
    assert client.post("/agents", CLERK).json["version"] == 3, "what was before comes back"
    page = client.get("/agents/clerk/versions?limit=2").json
    assert [one["version"] for one in page["items"]] == [3, 2]
    rest = client.get(f"/agents/clerk/versions?cursor={page['nextCursor']}").json
    assert [one["definition"]["instructions"] for one in rest["items"]] == ["Be brief."]
    assert client.get("/agents/clerk").json["version"] == "3"


@pytest.mark.parametrize(
    ("change", "place", "told"),
    [
        ({"agentId": "no id"}, "/agentId", "Must match"),
        ({"model": None}, "/model", "null"),
        ({"model": "gpt"}, "/model", 'write "provider:model"'),
        ({"model": "acme:x"}, "/model", "unknown provider 'acme'"),
        ({"model": "scripted:other"}, "/model", "unknown script 'other': there are echo"),
        ({"model": "anthropic:x"}, "/model", "no worker that lives has a key for anthropic"),
        ({"fallbackModels": ["openai:x", "google:y"]}, "/fallbackModels/1", "key for google"),
        ({"tools": ["find", "nope"]}, "/tools/1", "unknown tool 'nope': there are find, http_get"),
        ({"tools": ["slow"], "limits": {"callSeconds": 90}}, "/tools/0", "may take 100 s"),
        ({"tools": ["read_file"]}, "/tools/0", "unknown tool 'read_file'"),
        ({"tools": ["recall"]}, "/memory", "no memory: name its namespace"),
        ({"mcpServers": ["web"]}, "/mcpServers/0", "unknown MCP server 'web': there are docs"),
        ({"mcpServers": ["docs"]}, "/mcpServers", "none of whose tools it may call"),
        ({"permissions": {"mcp": ["docs/*"]}}, "/permissions/mcp", "no mcp_servers"),
        ({"outputSchema": {"type": "nonsense"}}, "/outputSchema/type", "no JSON Schema"),
        ({"limits": {"callSeconds": 700}}, "/limits/callSeconds", "must be less than"),
        ({"limits": {"maxSteps": 0}}, "/limits/maxSteps", "Must be from 1"),
        ({"limits": {"steps": 3}}, "/limits/steps", "Unknown"),
        ({"prompt": "x"}, "/prompt", "Unknown"),
    ],
)
def test_what_no_worker_can_run_is_refused_with_its_place(
    client: Client, change: dict[str, Any], place: str, told: str
) -> None:
    answer = client.post("/agents", {**CLERK, **change})
    errors = problem(answer, 422, "invalid_request")["errors"]
    assert place in errors and told in " ".join(errors[place]), errors
    problem(client.get("/agents/clerk/versions"), 404, "agent_not_found")


def test_one_worker_must_have_all_of_it(client: Client) -> None:
    other = {**OFFER, "tools": {"paint": 5.0}, "providers": ["scripted"]}
    add_worker(client.database, offer=other)
    assert client.post("/agents", {**CLERK, "tools": ["paint"]}).status_code == 201
    answer = client.post("/agents", {**CLERK, "tools": ["paint", "find"]})
    assert len(problem(answer, 422, "invalid_request")["errors"]) == 1


@pytest.mark.parametrize("queues", [[], ["opscore.io"]])
def test_without_a_worker_nobody_knows_what_there_is(client: Client, queues: list[str]) -> None:
    with client.database.transaction() as tx:
        tx.execute(text("DELETE FROM workers"))
    if queues:
        add_worker(client.database, queues=queues)
    errors = problem(client.post("/agents", CLERK), 422, "invalid_request")["errors"]
    assert errors[""][0].startswith("No worker lives")


@pytest.mark.parametrize(
    ("kind", "whose"),
    [("function", "an agent that workers declare"), ("llm", "an agent that workers declare")],
)
def test_an_id_that_is_taken_is_refused(client: Client, kind: str, whose: str) -> None:
    with client.database.transaction() as tx:
        add_agent(tx, "clerk", kind=kind)
    errors = problem(client.post("/agents", CLERK), 422, "invalid_request")["errors"]
    assert whose in errors["/agentId"][0]


def test_a_worker_that_declares_such_an_id_does_not_start(client: Client) -> None:
    client.post("/agents", CLERK)
    declared = LLMAgent(agent_id="clerk", model="scripted:echo")
    with pytest.raises(ConfigurationError, match="was defined over the API"):  # noqa: SIM117
        with client.database.transaction() as tx:
            agents.register_functions(tx, [declared])


# --- On real workers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("defined") / "worker.log"
    with running_stack(servers, log, OPSCORE_AGENTS="tests.llm_fleet") as stack:
        stack.start_worker(concurrency=1)
        yield stack


def test_a_worker_runs_what_was_defined_in_its_newest_version(stack: Stack) -> None:
    settings = stack.settings
    one = {"taskId": "t", "agentId": "defined", "parameters": {"goal": "hello"}}
    with open_client(settings) as client:
        wait_until(lambda: presence_of(stack))
        bad = {"agentId": "defined", "model": "scripted:echo", "tools": ["settle", "nope"]}
        errors = problem(client.post("/agents", bad), 422, "invalid_request")["errors"]
        assert "there are erase, http_get, " in errors["/tools/1"][0]
        good = {"agentId": "defined", "model": "scripted:echo", "tools": ["settle"]}
        assert client.post("/agents", good).status_code == 201
        assert stack.finished(stack.submit({"id": "w", "tasks": [one]})).output == "hello"
        good["outputSchema"] = {"type": "object"}
        assert client.post("/agents", good).json["version"] == 2
    run = stack.finished(stack.submit({"id": "w", "tasks": [one]}))
    assert (run.status, run.error["code"]) == ("failed", "invalid_answer")


def presence_of(stack: Stack) -> list[Any]:
    with stack.database.transaction() as tx:
        return presence.offers(tx, "opscore.agents")
