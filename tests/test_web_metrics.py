"""`GET /metrics`: the numbers of a stack that worked, and all that is said of them elsewhere."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import promql_parser
import pytest
import yaml
from http_client import Client, open_client, problem
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, Expr, MatchOp, VectorSelector
from rows import add_agent, add_run, add_waiting
from sqlalchemy import text
from stack import API_KEY, ROOT, Servers, Stack, running_stack, stack_environment, wait_until
from test_engine import Desk, desk, task, two_in_line
from test_schedules import DEFAULTS
from test_web_process import ask, serving

from opscore import engine, migrations, presence, schedules, tally
from opscore.config import AGENTS_QUEUE, QUEUES, Settings
from opscore.db import Database
from opscore.dispatch import Dispatcher
from opscore.errors import ConfigurationError
from opscore.metrics import GAUGES, Teller
from opscore.presence import Presence
from opscore.servers import PostgresServer, RedisServer

__all__ = ["desk"]

TOKEN = "metrics-" + "t" * 16
Labels = dict[str, str]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
BOARD = ROOT / "deploy/grafana/opscore.json"
SELDOM = {tally.RESCUES.name, tally.POOL_TIMEOUTS.name}
"""What does not happen in a stack that is well; see `test_metrics`."""


class Series:
    """What a scrape told: the values by name and labels."""

    def __init__(self, told: str) -> None:
        self.values: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        self.kinds: dict[str, tuple[str, str]] = {}
        """Name of a family -> what it is, and what is said of it."""
        for family in text_string_to_metric_families(told):
            self.kinds[family.name] = (family.type, family.documentation)
            for sample in family.samples:
                self.values[sample.name].append((dict(sample.labels), sample.value))

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of those with these labels."""
        return sum(value for has, value in self.values[name] if labels.items() <= has.items())

    def labels(self, name: str) -> set[str]:
        return {label for has, _ in self.values[name] for label in has}


def scrape(client: Client) -> Series:
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return Series(answer.get_data(as_text=True))


@dataclass(frozen=True)
class Site:
    stack: Stack
    client: Client
    series: Series
    """A scrape after all of it, of what still was at work."""


def one(workflow_id: str, agent_id: str, **more: Any) -> dict[str, Any]:
    return {"id": workflow_id, "tasks": [{"taskId": "a", "agentId": agent_id, **more}]}


def rows(stack: Stack, statement: str) -> dict[str, int]:
    return {row[0]: row[1] for row in stack.rows(statement)}


@pytest.fixture(scope="module")
def site(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log = tmp_path_factory.mktemp("metrics") / "log"
    environment = {"OPSCORE_AGENTS": "tests.fleet", "OPSCORE_KEEPER_SECONDS": "0.1"}
    with running_stack(servers, log, **environment) as stack:
        settings = replace(stack.settings, metrics_token=TOKEN)
        with open_client(settings) as client:
            assert client.get("/ready").status_code == 503, "no worker lives"
            work(stack)
            leave_open(stack)
            for teller in (Teller(stack.database), client.app.extensions["opscore"].teller):
                teller.tell()
            yield Site(stack, client, scrape(client))


def work(stack: Stack) -> None:
    """Have runs end in every way, and stop the worker that ran them: it tells its last."""
    worker = stack.start_worker(concurrency=2)
    runs = [stack.submit(one("ok", "echo")) for _ in range(3)]
    fire(stack)
    in_turn = one("in-turn", "one-at-a-time", parameters={"seconds": 0.1})
    runs += [stack.submit(in_turn) for _ in range(4)]
    runs.append(stack.submit(one("no", "broken", retry={"maxAttempts": 2, "backoffSeconds": 0.1})))
    runs.append(stack.submit(one("busy", "says-busy", parameters={"times": 2})))
    (cancelled,) = [stack.submit(one("off", "nap", parameters={"seconds": 1}))]
    wait_until(lambda: stack.tasks(cancelled)[0].status, says=lambda status: status == "running")
    with stack.database.transaction() as tx:
        engine.cancel_run(tx, cancelled)
    for run_id in (*runs, cancelled):
        stack.finished(run_id)
    open_runs = "SELECT count(*) FROM runs WHERE finished_at IS NULL"
    wait_until(lambda: stack.rows(open_runs)[0][0], says=lambda number: number == 0)
    worker.terminate()
    assert worker.wait(20) == 0, stack.log.read_text()[-3000:]


def fire(stack: Stack) -> None:
    """Have a schedule fire that was due 30 seconds ago."""
    with stack.database.transaction() as tx:
        schedules.create(
            tx, {**DEFAULTS, "name": "s", "workflow_id": "ok", "every_seconds": 3600.0}
        )
        tx.execute(
            text(
                "UPDATE schedules SET created_at = created_at - make_interval(secs => 3630),"
                " decided_at = decided_at - make_interval(secs => 3630), next_at = now()"
            )
        )
        fired = schedules.tick(tx, 10)
    for plan in fired.plans:
        stack.dispatcher.publish(plan)


def leave_open(stack: Stack) -> None:
    """Have work that waits, so that there is of everything that can be told."""
    with stack.database.transaction() as tx:
        presence.say(tx, Presence(uuid4(), "w@host", "host", 7, "prefork", 2, QUEUES, None))
        add_agent(tx, "paused", capacity=2, paused=True)
        run_id = add_run(tx, "running")
        add_waiting(tx, run_id, 2, agent_id="paused", reason="agent_unavailable")
        add_waiting(tx, run_id, 3, agent_id="one-at-a-time")
        add_waiting(tx, run_id, 4, capability="rare")


# --- The numbers of work that was done


def test_every_metric_there_is_is_told_and_set_by_something(site: Site) -> None:
    for gauge in GAUGES:
        assert site.series.values[gauge.name], gauge.name
        assert site.series.labels(gauge.name) == set(gauge.labels)
        assert site.series.kinds[gauge.name] == ("gauge", gauge.about)
    for what in tally.ALL:
        sample = f"{what.name}_count" if what.bounds else f"{what.name}_total"
        assert site.series.labels(sample) == set(what.labels)
        kind = "histogram" if what.bounds else "counter"
        assert site.series.kinds[what.name] == (kind, what.about)
        assert (site.series(sample) > 0) != (what.name in SELDOM), what.name
    declared = {one.name for one in (*GAUGES, *tally.ALL)}
    assert set(site.series.kinds) == declared


def test_attempts_are_those_in_the_table(site: Site) -> None:
    ended = """
        SELECT CASE WHEN error ->> 'code' = 'agent_busy' THEN 'busy' ELSE status END, count(*)
        FROM attempts WHERE status <> 'running' GROUP BY 1"""
    found = rows(site.stack, ended)
    assert found["completed"] == 10 and found["failed"] == 2 and found["busy"] == 2
    for outcome in tally.ATTEMPTS.known:
        told = site.series("opscore_attempts_total", outcome=outcome)
        assert told == found.get(outcome, 0), outcome
    assert site.series("opscore_claim_to_start_seconds_count") == sum(found.values())
    seconds = site.series("opscore_claim_to_start_seconds_sum")
    assert 0 < seconds / sum(found.values()) < 1


def test_runs_are_those_in_the_table(site: Site) -> None:
    ours = "FROM runs WHERE workflow_id <> 'report'"
    found = rows(site.stack, f"SELECT status, count(*) {ours} GROUP BY 1")
    assert found == {"completed": 9, "failed": 1, "cancelled": 1}
    for status, count in found.items():
        assert site.series("opscore_runs_ended_total", status=status) == count
    assert site.series("opscore_runs_submitted_total") == sum(found.values())
    assert site.series("opscore_runs") == site.series("opscore_runs", status="running") == 1


def test_latencies_have_a_time_for_each_and_all_of_them_in_the_last_bucket(site: Site) -> None:
    assert 1 <= site.series("opscore_freed_to_next_seconds_count") <= 3, "one came first"
    assert site.series("opscore_schedule_lateness_seconds_count") == 1
    assert 30 <= site.series("opscore_schedule_lateness_seconds_sum") < 60
    assert site.series("opscore_firings_total", status="started") == 1
    for what in tally.ALL:
        if what.bounds:
            for labels, count in site.series.values[f"{what.name}_count"]:
                buckets = [
                    value
                    for has, value in site.series.values[f"{what.name}_bucket"]
                    if labels.items() <= has.items()
                ]
                assert buckets == sorted(buckets) and buckets[-1] == count


def test_requests_are_counted_by_their_template_and_without_the_time_they_asked_to_wait(
    site: Site,
) -> None:
    name = "opscore_http_request_duration_seconds"
    assert site.series(f"{name}_count", method="GET", route="/ready", status="503") == 1
    (run_id,) = site.stack.rows("SELECT id FROM runs WHERE workflow_id = 'report'")[0]
    teller = site.client.app.extensions["opscore"].teller
    for path in (f"/runs/{run_id}?waitSeconds=0.6", "/nowhere"):
        site.client.get(path)
    site.client.send("BREW", "/runs")
    teller.tell()
    series = scrape(site.client)
    route = "/v1/opscore/runs/<run:run_id>"
    assert series(f"{name}_count", route=route, status="200") == 1
    assert series(f"{name}_sum", route=route) < 0.5
    assert series(f"{name}_count", route="", status="404") == 1
    assert series(f"{name}_count", method="other") == 1


def test_what_waits_is_told_by_why_and_by_line(site: Site) -> None:
    series = site.series
    assert series("opscore_tasks_waiting", reason="agent_unavailable") == 2
    assert series("opscore_tasks_waiting", reason="agent_busy") == 7
    assert series("opscore_tasks", status="waiting") == 9
    lines = {"paused": 2, "one-at-a-time": 3, "echo": 0}
    assert {agent: series("opscore_agent_line", agent=agent) for agent in lines} == lines
    assert series("opscore_capability_line", capability="rare") == 4
    assert series("opscore_agents", availability="paused") == 1
    assert series("opscore_runs_stuck", code="nobody_serves") == 2, "a line each"
    assert series("opscore_problems", code="agent_paused") == 1
    assert series("opscore_tasks_waiting_oldest_seconds", reason="agent_busy") > 3600


def test_processes_tell_how_many_connections_they_used(site: Site) -> None:
    for process in ("web", "worker", "keeper"):
        assert site.series("opscore_processes", process=process) >= 1
        size = site.series("opscore_database_pool_size", process=process)
        assert 1 <= site.series("opscore_database_pool_used", process=process) <= size
        assert 0 < site.series("opscore_database_pool_fullest_ratio", process=process) <= 1


# --- What is, at this moment


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_client(settings) as client:
        yield client


def test_queues_tell_how_long_their_first_visit_has_waited(
    client: Client, desk: Desk, dispatcher: Dispatcher
) -> None:
    assert scrape(client)("opscore_queue_oldest_seconds", queue=AGENTS_QUEUE) == 0
    for _ in range(2):
        dispatcher.publish(desk.submit(task("a")))
        desk.alter("UPDATE runs SET generation_at = generation_at - interval '100 s'")
        desk.alter("UPDATE tasks SET created_at = created_at - interval '100 s'")
    series = scrape(client)
    assert series("opscore_queue_ready", queue=AGENTS_QUEUE) == 2
    assert 200 <= series("opscore_queue_oldest_seconds", queue=AGENTS_QUEUE) < 260
    assert series("opscore_tasks", status="pending") == 2
    desk.claim("a")
    series = scrape(client)
    assert series("opscore_tasks", status="running") == 1
    assert 200 <= series("opscore_queue_oldest_seconds", queue=AGENTS_QUEUE) < 260


def test_agents_tell_what_they_hold_and_who_stands_before_them(client: Client, desk: Desk) -> None:
    two_in_line(desk)
    series = scrape(client)
    for name in ("agent_slots", "agent_slots_held", "agent_running", "agent_line"):
        assert series(f"opscore_{name}", agent="single") == 1, name
    assert not [1 for has, _ in series.values["opscore_agent_slots"] if has["agent"] == "echo"]
    assert series("opscore_agent_running", agent="echo") == 0


def test_two_web_processes_that_are_stopped_tell_their_last(
    database: Database, environment: dict[str, str], tmp_path: Path
) -> None:
    with (
        serving(environment, tmp_path / "one.log") as (first, one),
        serving(environment, tmp_path / "other.log") as (second, other),
    ):
        for port in (one, one, other):
            assert ask(port, "GET", "/nowhere", Authorization=f"Bearer {API_KEY}")[0] == 404
        for process in (first, second):
            process.terminate()
            assert process.wait(20) == 0
    statement = "SELECT sum(n) FROM metrics, unnest(buckets) AS n WHERE labels = '{GET,\"\",404}'"
    with database.autocommit() as tx:
        assert tx.execute(text(statement)).scalar() == 3


def test_whatever_a_name_has_in_it_is_read_as_it_is(client: Client) -> None:
    odd = 'a "b" \\n c\nd \\ é,{}='
    with client.database.transaction() as tx:
        add_waiting(tx, add_run(tx, "running"), 2, capability=odd)
    assert scrape(client)("opscore_capability_line", capability=odd) == 2


# --- Who may ask, and what if a server is away


def test_the_token_opens_metrics_and_nothing_else(settings: Settings) -> None:
    with open_client(replace(settings, metrics_token=TOKEN)) as client:
        prometheus = Client(client.app, TOKEN)
        assert prometheus.get("/metrics").status_code == 200
        assert client.get("/metrics").status_code == 200
        for path in ("/runs", "/status", "/agents"):
            problem(prometheus.get(path), 401, "unauthorized")
        problem(prometheus.send("POST", "/metrics"), 405, "method_not_allowed")
        for key in (None, "", TOKEN + "t"):
            problem(Client(client.app, key).get("/metrics"), 401, "unauthorized")
    with open_client(settings) as client:
        problem(Client(client.app, TOKEN).get("/metrics"), 401, "unauthorized")


def test_a_token_that_could_be_guessed_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"OPSCORE_METRICS_TOKEN: .*16 characters"):
        Settings.from_env({**environment, "OPSCORE_METRICS_TOKEN": "short"})


def test_without_redis_the_rest_is_told(database_url: str) -> None:
    with (
        RedisServer.temporary() as redis,
        open_client(Settings.from_env(stack_environment(database_url, redis.url))) as client,
    ):
        assert scrape(client)("opscore_redis_up") == 1
        redis.stop()
        series = scrape(client)
    assert series.values["opscore_redis_up"] == [({}, 0)] and series.values["opscore_workers"]
    assert series("opscore_problems", code="broker_away") == 1
    for name in ("ready", "unacked", "oldest_seconds"):
        assert not series.values[f"opscore_queue_{name}"]


def refused_soon(client: Client) -> None:
    began = time.monotonic()
    answer = client.get("/metrics")
    problem(answer, 503, "unavailable")
    assert time.monotonic() - began < 4 and answer.headers["Retry-After"]


def test_without_postgresql_or_with_one_that_is_slow_it_is_503_soon(redis_url: str) -> None:
    with PostgresServer.temporary() as postgres:
        migrations.upgrade(postgres.url)
        settings = Settings.from_env(stack_environment(postgres.url, redis_url))
        with open_client(settings) as client:
            with client.database.transaction() as holder:
                holder.execute(text("LOCK TABLE metrics"))
                refused_soon(client)
            wait_until(lambda: client.get("/metrics").status_code, says=lambda s: s == 200)
            postgres.stop()
            refused_soon(client)


# --- What is said of it elsewhere


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Return every expression by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            where = f"{panel['title']} {target['refId']}"
            found[where] = target["expr"].replace("$__rate_interval", "5m")
    return found


def below(expr: Any) -> Iterator[Any]:
    """Yield an expression and all that it is made of."""
    yield expr
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if isinstance(part := getattr(expr, name, None), Expr):
            yield from below(part)
    for argument in getattr(expr, "args", ()):
        yield from below(argument)


def selectors(expr: Any) -> list[VectorSelector]:
    return [part for part in below(expr) if isinstance(part, VectorSelector)]


def matches(op: MatchOp, wanted: str, has: str) -> bool:
    is_so = has == wanted
    if op in (MatchOp.Re, MatchOp.NotRe):
        is_so = re.fullmatch(wanted, has) is not None
    return is_so == (op in (MatchOp.Equal, MatchOp.Re))


def selects(selector: VectorSelector, labels: Labels) -> bool:
    return all(
        one.name in labels and matches(one.op, one.value, labels[one.name])
        for one in selector.matchers.matchers
    )


@pytest.mark.parametrize("where", sorted(expressions()))
def test_every_expression_selects_series_that_are_told_by_labels_they_have(
    where: str, site: Site
) -> None:
    expr = promql_parser.parse(expressions()[where])
    found = selectors(expr)
    assert found, "it asks for nothing"
    for selector in found:
        series = [
            labels for labels, _ in site.series.values[selector.name] if selects(selector, labels)
        ]
        assert series, f"a scrape has nothing for {selector}"
    for part in below(expr):
        if isinstance(part, AggregateExpr) and part.modifier is not None:
            for selector in selectors(part.expr):
                known = site.series.labels(selector.name)
                assert set(part.modifier.labels) <= known, f"{part.modifier.labels}: {selector}"


def test_every_metric_is_shown_or_watched() -> None:
    asked = {s.name for e in expressions().values() for s in selectors(promql_parser.parse(e))}
    asked = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in asked}
    assert asked == {one.name for one in (*GAUGES, *tally.ALL)}


def test_alerts_say_what_is_so_and_what_to_do_by_labels_they_have() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        said = " ".join(rule["annotations"].values())
        kept = re.findall(r"by \((\w+)\) \(", rule["expr"])
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= set(kept), rule["alert"]


def test_panels_of_the_dashboard_lie_beside_each_other() -> None:
    board = json.loads(BOARD.read_text())
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["description"] and panel["targets"] for panel in panels())


PAGE = (ROOT / "docs/observe.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading."""
    part = PAGE[PAGE.index(f"## {heading}\n") :].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(labels: Iterable[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def test_the_page_names_every_metric_as_it_is() -> None:
    assert table("What is") == [
        [f"`{one.name}`", "gauge", named(one.labels), one.about] for one in GAUGES
    ]
    assert table("What happened") == [
        [
            f"`{one.name}`" if one.bounds else f"`{one.name}_total`",
            "histogram" if one.bounds else "counter",
            named(one.labels),
            one.about,
        ]
        for one in tally.ALL
    ]


def test_the_page_names_every_alert_as_it_is() -> None:
    assert table("Alerts") == [
        [
            f"`{rule['alert']}`",
            rule["labels"]["severity"],
            rule.get("for", "at once"),
            *(re.sub(r"{{.*?}}", "…", text) for text in rule["annotations"].values()),
        ]
        for rule in alerts()
    ]


def test_the_configuration_loads_the_rules_and_scrapes_with_the_token() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert config["rule_files"] == [ALERTS.name]
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["authorization"]["credentials_file"]
