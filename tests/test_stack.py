"""The main job end to end: `opscore up --detach`, all of it over HTTP, Flower, `opscore down`."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from stack import ROOT, wait_until

from opscore.local import DataFolder
from opscore.servers import is_free

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("OPSCORE_", "FLOWER_")) and name not in ("DATABASE_URL", "REDIS_URL")
}
YAML = """
id: {id}
tasks:
  - {{taskId: first, agentId: echo, parameters: {{n: "${{input.n}}"}}}}
  - {{taskId: second, agentId: value, parameters: {{value: "${{tasks.first.output.n + 1}}"}}}}
"""


def opscore(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "opscore", *arguments],
        env=CLEAN,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Site:
    """A running stack as a client sees it."""

    api: httpx2.Client
    flower: httpx2.Client
    environment: dict[str, str]
    log: Path

    def create(self, document: dict[str, Any]) -> dict[str, Any]:
        answer = self.api.post("/v1/opscore/workflows", json=document)
        assert answer.status_code in (200, 201), answer.text
        body: dict[str, Any] = answer.json()
        return body

    def submit(self, workflow: str, input: Any = None) -> str:
        body = {"workflowId": workflow, "input": {} if input is None else input}
        answer = self.api.post("/v1/opscore/runs", json=body)
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["runId"]
        assert answer.headers["Location"].endswith(f"/v1/opscore/runs/{run_id}")
        return run_id

    def run(self, run_id: str, **query: Any) -> dict[str, Any]:
        answer = self.api.get(f"/v1/opscore/runs/{run_id}", params=query)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def in_flower(self, task_id: str) -> dict[str, Any]:
        """Return what Flower knows of a task; nothing before its first event came."""
        answer = self.flower.get(f"/api/task/info/{task_id}")
        info: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
        return info

    def result(self, run_id: str) -> dict[str, Any]:
        """Wait by long poll, as a client would."""
        return wait_until(
            lambda: self.run(run_id, waitSeconds=10),
            seconds=60,
            says=lambda run: run["finishedAt"] is not None,
        )

    def do(self, *tasks: dict[str, Any], input: Any = None, **more: Any) -> dict[str, Any]:
        self.create({"id": "adhoc", "tasks": list(tasks), **more})
        return self.result(self.submit("adhoc", input))


def task(name: str, agent_id: str = "echo", **more: Any) -> dict[str, Any]:
    return {"taskId": name, "agentId": agent_id, **more}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    flows = tmp_path_factory.mktemp("flows")
    (flows / "two.yaml").write_text(YAML.format(id="two"))
    data = DataFolder(Path(tempfile.mkdtemp(prefix="opscore-test-")))
    agents = ["--agents", "tests.fleet", "--workers", "2"]
    opscore(
        *("up", "--data", str(data.path), "--workflows", str(flows)),
        *agents,
        "--detach",
    )
    environment = data.env()
    supervisor = psutil.Process(data.holder())
    processes = [supervisor, *supervisor.children(recursive=True)]
    key = {"Authorization": f"Bearer {environment['OPSCORE_API_KEY']}"}
    name, password = environment["FLOWER_BASIC_AUTH"].split(":", 1)
    try:
        with (
            httpx2.Client(base_url=environment["OPSCORE_API_URL"], headers=key, timeout=30) as api,
            httpx2.Client(base_url=environment["FLOWER_URL"], auth=(name, password)) as flower,
        ):
            yield Site(api, flower, environment, data.path / "opscore.log")
    finally:
        opscore("down", "--data", str(data.path))
        shutil.rmtree(data.path)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, alive
    for url in ("OPSCORE_API_URL", "FLOWER_URL", "DATABASE_URL", "REDIS_URL"):
        assert is_free(httpx2.URL(environment[url]).port or 0), url


def test_the_stack_is_ready_and_says_of_what(site: Site) -> None:
    assert site.api.get("/health").json() == {"status": "ok"}
    ready = site.api.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert set(site.environment) == {
        "OPSCORE_API_URL",
        "OPSCORE_API_KEY",
        "DATABASE_URL",
        "REDIS_URL",
        "FLOWER_URL",
        "FLOWER_BASIC_AUTH",
        "OPSCORE_WEBHOOK_SECRET",
    }


def test_workflows_of_the_folder_are_there_and_run(site: Site) -> None:
    run = site.result(site.submit("two", {"n": 4}))
    assert (run["status"], run["output"], run["version"]) == ("completed", 5, 1)
    first = run["tasks"][0]
    assert first["taskDefinitionId"] == "first" and first["output"] == {"n": 4}
    assert [(a["number"], a["status"]) for a in first["attempts"]] == [(1, "completed")]


def test_yaml_and_json_make_versions_and_the_same_document_none(site: Site) -> None:
    kind = {"Content-Type": "application/yaml"}
    path = "/v1/opscore/workflows"
    assert site.api.post(path, content=YAML.format(id="v"), headers=kind).status_code == 201
    assert site.api.post(path, content=YAML.format(id="v"), headers=kind).status_code == 200
    assert site.create({"id": "v", "tasks": [task("a")]})["version"] == 2
    assert [v["version"] for v in site.api.get(f"{path}/v/versions").json()["items"]] == [2, 1]
    assert "v" in [w["workflowId"] for w in site.api.get(path).json()["items"]]


def test_every_fault_of_a_definition_comes_back_and_nothing_is_written(site: Site) -> None:
    document = {
        "id": "faulty",
        "tasks": [
            task("a", dependsOn=["b"]),
            task("b", dependsOn=["a"], parameters={"x": "${nope}"}),
            task("b", colour="red"),
        ],
    }
    answer = site.api.post("/v1/opscore/workflows", json=document)
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.json()["errors"]) >= 4
    assert site.api.get("/v1/opscore/workflows/faulty").status_code == 404
    assert site.api.post("/v1/opscore/workflows/validate", json=document).status_code == 422


def test_the_shapes_of_the_main_job(site: Site) -> None:
    diamond = site.do(
        task("a", dependsOn=[], parameters={"n": 2}),
        task("b", "value", dependsOn=["a"], parameters={"value": "${tasks.a.output.n * 10}"}),
        task("c", "value", dependsOn=["a"], parameters={"value": "${tasks.a.output.n * 100}"}),
        task(
            "d",
            "value",
            dependsOn=["b", "c"],
            parameters={"value": "${tasks.b.output + tasks.c.output}"},
        ),
    )
    assert diamond["output"] == 220
    each = site.do(
        task("f", "value", forEach={"items": "${input}"}, parameters={"value": "${item}"}),
        input=list(range(300)),
    )
    assert each["output"] == list(range(300))
    assert each["tasks"][0]["items"]["completed"] == 300
    rows = site.api.get(f"/v1/opscore/runs/{each['runId']}/tasks", params={"limit": 200}).json()
    assert len(rows["items"]) == 200 and rows["nextCursor"]


def test_input_is_checked_before_anything_is_written(site: Site) -> None:
    schema = {"type": "object", "required": ["n"]}
    site.create({"id": "strict", "inputSchema": schema, "tasks": [task("a")]})
    body = {"workflowId": "strict", "input": {}}
    answer = site.api.post("/v1/opscore/runs", json=body)
    assert answer.status_code == 422 and list(answer.json()["errors"]) == ["/input"]
    assert site.api.get("/v1/opscore/runs", params={"workflowId": "strict"}).json()["items"] == []


def test_retries_timeouts_and_failures_are_told(site: Site) -> None:
    retry = {"maxAttempts": 2, "backoffSeconds": 0.05}
    run = site.do(task("a", "fails-until", parameters={"attempt": 2}, retry=retry))
    assert [a["status"] for a in run["tasks"][0]["attempts"]] == ["failed", "completed"]
    slow = site.do(task("a", "too-slow", timeoutSeconds=0.2, retry={"maxAttempts": 1}))
    assert (slow["status"], slow["error"]["code"]) == ("failed", "timeout")
    gave_up = site.do(task("a", "gives-up"), task("b"))
    assert [t["status"] for t in gave_up["tasks"]] == ["failed", "cancelled"]
    assert gave_up["tasks"][1]["reason"] == "upstream_failed"
    on = site.do(
        task("a", "gives-up", onFailure="continue"),
        task("b", parameters={"s": "${tasks.a.status}"}),
    )
    assert on["output"] == {"s": "failed"}


def test_a_busy_agent_makes_tasks_wait_visibly_here_and_in_flower(site: Site) -> None:
    names = [f"t{n}" for n in range(5)]
    site.create(
        {
            "id": "queue",
            "tasks": [
                task(
                    name,
                    "one-at-a-time",
                    dependsOn=[],
                    parameters={"seconds": 1},
                    retry={"maxAttempts": 1},
                )
                for name in names
            ],
        }
    )
    run_id = site.submit("queue")
    waiting = wait_until(
        lambda: [t for t in site.run(run_id)["tasks"] if t["reason"] == "agent_busy"],
        says=lambda rows: len(rows) >= 2,
    )
    assert all(t["status"] == "waiting" and t["wakeAt"] for t in waiting)
    shown = wait_until(
        lambda: site.in_flower(waiting[-1]["taskId"]),
        says=lambda info: info.get("state") == "RETRY",
    )
    assert shown["name"] == "opscore.run_task"
    run = site.result(run_id)
    assert run["status"] == "completed"
    assert all(len(t["attempts"]) == 1 for t in run["tasks"]), "waiting used up no attempt"


def test_flower_hears_of_every_task_of_a_chain_done_in_one_go(site: Site) -> None:
    last = {"retry": {"maxAttempts": 1}, "onFailure": "fail"}
    run = site.do(task("a", "echo"), task("b", "echo"), task("c", "gives-up", **last))
    states = {t["taskDefinitionId"]: t["taskId"] for t in run["tasks"]}
    for name, state in (("a", "SUCCESS"), ("b", "SUCCESS"), ("c", "FAILURE")):
        wait_until(
            lambda name=name: site.in_flower(states[name]),
            says=lambda info, state=state: (
                (info.get("state"), info.get("name")) == (state, "opscore.run_task")
            ),
        )


def test_flower_shows_workers_queues_and_a_failure_in_red(site: Site) -> None:
    workers = site.flower.get("/api/workers", params={"refresh": "true"}, timeout=20).json()
    assert any(name.startswith("worker-agents@") for name in workers)
    queues = {queue["name"] for worker in workers.values() for queue in worker["active_queues"]}
    assert {"opscore.agents", "opscore.control"} <= queues
    lengths = site.flower.get("/api/queues/length").json()["active_queues"]
    assert {"opscore.agents", "opscore.control"} <= {queue["name"] for queue in lengths}
    run = site.do(task("a", "gives-up"))
    failed = run["tasks"][0]["taskId"]
    wait_until(
        lambda: site.in_flower(failed),
        says=lambda info: info.get("state") == "FAILURE",
    )
    told = site.in_flower(failed)
    assert failed in told["args"] and told["uuid"] == failed and told["name"] == "opscore.run_task"


def test_flower_shows_nothing_to_who_has_no_password_and_its_metrics_to_nobody(site: Site) -> None:
    base = site.environment["FLOWER_URL"]
    pages = ["/", "/workers", "/tasks", "/broker", f"/worker/w@{base}", "/task/x"]
    calls = [
        "/api/workers",
        "/api/tasks",
        "/api/task/types",
        "/api/queues/length",
        "/api/task/info/x",
    ]
    for path in pages + calls:
        assert httpx2.get(base + path).status_code == 401, path
        assert httpx2.get(base + path, auth=("opscore", "wrong")).status_code == 401, path
    assert httpx2.post(f"{base}/api/worker/shutdown/w").status_code == 401
    for answer in (httpx2.get(f"{base}/metrics"), site.flower.get("/metrics")):
        assert answer.status_code == 404 and "flower_" not in answer.text
    assert httpx2.get(f"{base}/healthcheck").text == "OK"


def test_runs_are_listed_filtered_and_paged_newest_first(site: Site) -> None:
    site.create({"id": "listed", "tasks": [task("a")]})
    ids = [site.submit("listed") for _ in range(3)]
    for run_id in ids:
        site.result(run_id)
    query = {"workflowId": "listed", "status": "completed", "limit": 2}
    page = site.api.get("/v1/opscore/runs", params=query).json()
    then = site.api.get("/v1/opscore/runs", params={**query, "cursor": page["nextCursor"]}).json()
    assert [r["runId"] for r in page["items"] + then["items"]] == ids[::-1]
    assert then["nextCursor"] is None


def test_events_tell_the_run_in_order(site: Site) -> None:
    run_id = site.submit("two", {"n": 1})
    site.result(run_id)
    events = site.api.get(f"/v1/opscore/runs/{run_id}/events").json()["items"]
    assert [event["type"] for event in events] == [
        "run.queued",
        "run.started",
        "task.started",
        "task.completed",
        "task.started",
        "task.completed",
        "run.completed",
    ]


def test_a_cancelled_run_ends_cancelled_and_cannot_be_cancelled_again(site: Site) -> None:
    site.create({"id": "long", "tasks": [task("a", "nap", parameters={"seconds": 3}), task("b")]})
    run_id = site.submit("long")
    wait_until(lambda: site.run(run_id)["status"], says=lambda status: status == "running")
    assert site.api.post(f"/v1/opscore/runs/{run_id}/cancel").status_code == 202
    run = site.result(run_id)
    assert run["status"] == "cancelled" and run["tasks"][1]["status"] == "cancelled"
    again = site.api.post(f"/v1/opscore/runs/{run_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "run_finished")


def test_the_older_trigger_works_by_id_and_inline(site: Site) -> None:
    path = "/v1/opscore/agent/echo/workflow"
    first = site.api.post(
        path, json={"workflowDefinitionId": "two", "initialPayload": {"n": 8}}
    ).json()
    assert first["sessionId"] == first["runId"] and first["workflowId"] == "two"
    assert site.result(first["runId"])["output"] == 9
    inline = {
        "id": "inline",
        "name": "Inline",
        "tasks": [{"taskId": "only", "parameters": {"k": 1}}],
    }
    body = {"workflowDefinition": inline, "initialPayload": {"x": 2}}
    second = site.api.post(path, json=body)
    assert second.status_code == 202
    assert site.result(second.json()["sessionId"])["output"] == {"k": 1, "x": 2}
    unknown = site.api.post("/v1/opscore/agent/nobody/workflow", json=body)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "agent_not_found")


def test_agents_of_the_workers_are_listed_with_capacity_and_state(site: Site) -> None:
    agents = {a["agentId"]: a for a in site.api.get("/v1/opscore/agents").json()["items"]}
    assert agents["one-at-a-time"]["capacity"] == 1 and agents["echo"]["capacity"] is None
    assert agents["echo"]["capabilities"] == ["echo"] and agents["echo"]["kind"] == "function"


def test_what_an_agent_logs_is_shown_with_its_attempt(site: Site) -> None:
    run = site.do(task("a", "async-echo", parameters={"x": 1}))
    shown = site.api.get(f"/v1/opscore/tasks/{run['tasks'][0]['taskId']}").json()
    assert "echoing" in str(shown)


def test_without_the_key_nothing_but_health_and_docs_is_open(site: Site) -> None:
    with httpx2.Client(base_url=site.environment["OPSCORE_API_URL"]) as stranger:
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert stranger.get(path, follow_redirects=True).status_code == 200
        refused = stranger.get("/v1/opscore/runs")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        wrong = stranger.get("/v1/opscore/runs", headers={"Authorization": "Bearer " + "x" * 40})
        assert wrong.status_code == 401


def test_a_body_over_the_limit_is_refused_without_being_read(site: Site) -> None:
    def flood() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    began = time.monotonic()
    try:
        kind = {"Content-Type": "application/json"}
        answer = site.api.post("/v1/opscore/runs", content=flood(), headers=kind)
    except httpx2.WriteError:
        pass  # the server closed the connection while we were still sending
    else:
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert time.monotonic() - began < 10
    assert site.api.get("/health").status_code == 200


def test_a_request_id_is_taken_and_reaches_the_workers_log(site: Site) -> None:
    mark = "review-me-42"
    headers = {"X-Request-ID": mark}
    body = {"workflowId": "two", "input": {"n": 1}}
    answer = site.api.post("/v1/opscore/runs", json=body, headers=headers)
    assert answer.headers["X-Request-ID"] == mark
    site.result(answer.json()["runId"])
    lines = [line for line in site.log.read_text().splitlines() if mark in line]
    assert any("task.completed" in line for line in lines)
