"""The examples: the audit's agents, on a small folder of distributions made for each test; the
fleet's play; and triage, research and incident on real workers.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from stack import API_KEY, Servers, running_stack, wait_until
from werkzeug.serving import make_server

from examples import incident_response, nightly_research, plays, support_triage
from examples.demo import DemoFailed
from examples.dependency_audit import (
    audit_distribution,
    list_distributions,
    size,
    write_report,
)
from examples.fleet import LIE, TRUTH, Fleet
from examples.fleet_demo import judge
from examples.mail import write_mail
from opscore import Context, GiveUp
from opscore.agentkit import load_agents
from opscore.definition import parse, read_document
from web.app import create_app

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"python": "3.11.0", "platform": "Test", "paths": ["/site-packages"]}


def install(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    fields: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    record: bool = True,
) -> Path:
    """Install a distribution of one module as pip would; return its metadata's folder."""
    files = {f"{name}.py": f"name = {name!r}\n"} if files is None else files
    where = folder / f"{name}-{version}.dist-info"
    where.mkdir(parents=True)
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (where / "METADATA").write_text("\n".join([*head, *fields]) + "\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    if record:
        lines = [f"{path},{recorded(text)},{len(text)}" for path, text in files.items()]
        (where / "RECORD").write_text("\n".join([*lines, f"{where.name}/RECORD,,"]) + "\n")
    return where


def recorded(text: str) -> str:
    digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256={digest.rstrip('=')}"


def listed(folder: Path) -> list[dict[str, Any]]:
    found = list_distributions({"paths": [str(folder)]}, Context.for_testing())
    distributions: list[dict[str, Any]] = found["distributions"]
    return distributions


def audits(folder: Path) -> dict[str, Any]:
    """Audit every distribution in `folder`; the findings by name."""
    paths = [str(folder)]
    found = [
        audit_distribution({"distribution": one, "paths": paths}, Context.for_testing())
        for one in listed(folder)
    ]
    return {one["name"]: one for one in found}


def report(folder: Path, results: Sequence[Any]) -> Any:
    parameters = {"environment": ENVIRONMENT, "audits": results, "folder": str(folder)}
    return write_report(parameters, Context.for_testing())


# Listing


def test_distributions_are_listed_by_name_with_shadowed_ones_marked(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    install(first, "Beta", "2.0")
    install(first, "alpha")
    install(second, "beta", "1.0")
    paths = [str(first), str(tmp_path / "missing"), str(second), str(first)]
    found = list_distributions({"paths": paths}, Context.for_testing())
    rows = [(one["name"], one["version"], one["shadowed"]) for one in found["distributions"]]
    assert rows == [("alpha", "1.0", False), ("Beta", "2.0", False), ("beta", "1.0", True)]
    assert found["paths"] == [str(first), str(second)]


def test_without_paths_this_environment_is_listed() -> None:
    found = list_distributions({"paths": []}, Context.for_testing())
    assert "pytest" in [one["name"] for one in found["distributions"]]


def test_folders_that_are_not_there_are_given_up_on(tmp_path: Path) -> None:
    with pytest.raises(GiveUp, match="missing"):
        listed(tmp_path / "missing")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00broken", b"Summary: nameless\n"])
def test_broken_metadata_is_listed_by_its_folders_name_and_noted(
    tmp_path: Path, content: bytes
) -> None:
    where = install(tmp_path, "odd", "1.5")
    (where / "METADATA").write_bytes(content)
    (one,) = listed(tmp_path)
    assert (one["name"], one["version"]) == ("odd", "1.5")
    assert "its metadata cannot be read" in audits(tmp_path)["odd"]["notes"]


# Auditing


def test_an_untouched_distribution_is_fine(tmp_path: Path) -> None:
    install(
        tmp_path, "fine", fields=["License-Expression: MIT"], files={"fine/__init__.py": "12345"}
    )
    one = audits(tmp_path)["fine"]
    recorded_itself = (tmp_path / "fine-1.0.dist-info" / "RECORD").stat().st_size
    assert one["licence"] == "MIT"
    assert (one["files"], one["verified"]) == (2, 1)
    assert one["sizeBytes"] == 5 + recorded_itself
    assert [one["changed"], one["missing"], one["unmet"], one["notes"]] == [[], [], [], []]


def test_a_tampered_file_is_found(tmp_path: Path) -> None:
    install(tmp_path, "tampered")
    (tmp_path / "tampered.py").write_text("import os\n")
    one = audits(tmp_path)["tampered"]
    assert (one["changed"], one["changedCount"]) == (["tampered.py"], 1)


def test_a_missing_file_is_found_unless_it_has_no_hash(tmp_path: Path) -> None:
    where = install(tmp_path, "holes")
    (tmp_path / "holes.py").unlink()
    with (where / "RECORD").open("a") as record:
        record.write("__pycache__/holes.cpython-311.pyc,,\n")
    one = audits(tmp_path)["holes"]
    assert (one["missing"], one["missingCount"], one["changed"]) == (["holes.py"], 1, [])


def test_of_many_changed_files_a_few_are_named_and_all_are_counted(tmp_path: Path) -> None:
    files = {f"many/part{number}.py": "before" for number in range(12)}
    install(tmp_path, "many", files=files)
    for path in files:
        (tmp_path / path).write_text("after")
    one = audits(tmp_path)["many"]
    assert (len(one["changed"]), one["changedCount"]) == (5, 12)


def test_without_a_record_the_size_is_unknown_and_that_is_noted(tmp_path: Path) -> None:
    install(tmp_path, "bare", record=False)
    one = audits(tmp_path)["bare"]
    assert one["sizeBytes"] is None
    assert one["notes"] == ["no RECORD: its files are unknown"]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b'"never closed', b"only-a-path\n\n,,,\n", b"a\0b,sha256=x,1\n", b"x,md9=y,1\n"],
)
def test_a_broken_record_ends_nothing(tmp_path: Path, content: bytes) -> None:
    where = install(tmp_path, "odd")
    (where / "RECORD").write_bytes(content)
    assert json.dumps(audits(tmp_path)["odd"])


def test_a_folder_a_pipe_and_an_unreadable_name_in_a_record_are_passed_over(tmp_path: Path) -> None:
    import os

    where = install(tmp_path, "odd")
    os.mkfifo(tmp_path / "pipe")
    (where / "RECORD").write_text(f"pipe,sha256=x,1\n.,sha256=x,1\n{'n' * 300},sha256=x,1\n")
    one = audits(tmp_path)["odd"]
    assert (one["files"], one["changedCount"], one["missingCount"]) == (0, 0, 1)


def test_an_editable_installation_says_where_it_comes_from(tmp_path: Path) -> None:
    where = install(tmp_path, "mine")
    origin = {"url": "file:///src/mine", "dir_info": {"editable": True}}
    (where / "direct_url.json").write_text(json.dumps(origin))
    assert audits(tmp_path)["mine"]["notes"] == ["editable, from file:///src/mine"]


@pytest.mark.parametrize("content", ["[]", "{", '{"dir_info": 1, "url": "x"}', "\\"])
def test_a_broken_origin_is_noted(tmp_path: Path, content: str) -> None:
    (install(tmp_path, "odd") / "direct_url.json").write_text(content)
    assert audits(tmp_path)["odd"]["notes"] == ["its direct_url.json cannot be read"]


def test_an_older_egg_info_is_audited_too(tmp_path: Path) -> None:
    where = tmp_path / "old-0.9.egg-info"
    where.mkdir()
    (where / "PKG-INFO").write_text("Name: old\nVersion: 0.9\nLicense: BSD\n")
    (where / "requires.txt").write_text("absent>=1\n")
    one = audits(tmp_path)["old"]
    assert (one["version"], one["licence"]) == ("0.9", "BSD")
    assert one["unmet"] == [{"requirement": "absent>=1", "found": None}]


def test_a_distribution_that_went_away_is_noted(tmp_path: Path) -> None:
    gone = {"name": "gone", "version": "1", "metadata": str(tmp_path / "gone-1.dist-info")}
    parameters = {"distribution": gone, "paths": [str(tmp_path)]}
    one = audit_distribution(parameters, Context.for_testing())
    assert "it went away while the audit ran" in one["notes"]


def test_unmet_requirements_are_found(tmp_path: Path) -> None:
    required = [
        "present>=2",
        "Present>=1",
        "absent",
        "absent; python_version < '3'",
        "absent; extra == 'fast'",
        "not a requirement ===",
        f"absent2; python_version >= '{sys.version_info.major}'",
    ]
    install(tmp_path, "needy", fields=[f"Requires-Dist: {text}" for text in required])
    install(tmp_path, "present", "1.5rc1")
    one = audits(tmp_path)["needy"]
    assert [(unmet["requirement"].split(";")[0], unmet["found"]) for unmet in one["unmet"]] == [
        ("present>=2", "1.5rc1"),
        ("absent", None),
        ("absent2", None),
    ]
    assert one["notes"] == ["unreadable requirement: not a requirement ==="]


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        (["License-Expression: MIT OR Apache-2.0", "License: ignored"], "MIT OR Apache-2.0"),
        (["License: BSD"], "BSD"),
        (["License: UNKNOWN"], None),
        (["License: " + "word " * 50], None),
        (["License: UNKNOWN", "Classifier: License :: OSI Approved :: MIT License"], "MIT License"),
        (["Classifier: License :: OSI Approved"], None),
        ([], None),
    ],
)
def test_the_licence_is_what_the_metadata_says_best(
    tmp_path: Path, fields: list[str], licence: str | None
) -> None:
    install(tmp_path, "licensed", fields=fields)
    assert audits(tmp_path)["licensed"]["licence"] == licence


def test_a_cancelled_audit_stops(tmp_path: Path) -> None:
    install(tmp_path, "any")
    context = Context.for_testing()
    context.cancel()
    with pytest.raises(GiveUp):
        audit_distribution({"distribution": listed(tmp_path)[0]}, context)


# Reporting


def test_the_reports_tell_what_needs_a_look_first(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "good", fields=["License-Expression: MIT"])
    install(site, "bad", fields=["Requires-Dist: absent>1"])
    (site / "bad.py").write_text("tampered")
    answer = report(tmp_path / "new" / "folder", [*audits(site).values(), None])
    text = Path(answer["markdown"]).read_text()
    document = json.loads(Path(answer["json"]).read_text())
    assert answer["summary"] == document["summary"]
    assert answer["summary"]["distributions"] == 2
    assert (answer["summary"]["changed"], answer["summary"]["unmet"]) == (1, 1)
    assert (answer["summary"]["unknownLicence"], answer["summary"]["notAudited"]) == (1, 1)
    rows = [line for line in text.splitlines() if line.startswith("| bad 1.0 |")]
    assert rows[:3] == [
        "| bad 1.0 | unmet | `absent>1`, found: nothing |",
        "| bad 1.0 | changed | `bad.py` |",
        "| bad 1.0 | licence unknown |  |",
    ]
    assert [one["name"] for one in document["distributions"]] == ["bad", "good"]


def test_a_report_about_nothing_is_still_a_report(tmp_path: Path) -> None:
    text = Path(report(tmp_path, [])["markdown"]).read_text()
    assert "Nothing: every requirement is met" in text


def test_writing_again_replaces_the_reports_and_leaves_nothing_else(tmp_path: Path) -> None:
    report(tmp_path, [])
    report(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "audit-report.json",
        "audit-report.md",
    ]


def test_what_would_break_a_table_is_escaped(tmp_path: Path) -> None:
    install(tmp_path, "odd", fields=["License: a|b"])
    text = Path(report(tmp_path, list(audits(tmp_path).values()))["markdown"]).read_text()
    assert "| odd 1.0 | a\\|b |" in text


@pytest.mark.parametrize(
    ("count", "words"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes_are_said_in_words(count: int | None, words: str) -> None:
    assert size(count) == words


def test_the_workflow_is_a_good_definition_of_agents_that_exist() -> None:
    text = (ROOT / "examples" / "dependency_audit.yaml").read_text()
    definition = parse(read_document(text, "yaml"))
    agents = load_agents(["examples.dependency_audit"])
    able = {capability for one in agents.values() for capability in one.capabilities}
    assert [task.id for task in definition.tasks] == ["inventory", "audit", "report"]
    assert all(task.agent_id in agents or task.capability in able for task in definition.tasks)
    definition.check_input({})
    definition.check_input({"folder": "here", "paths": ["/site-packages"]})


# The fleet's play


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for all temporary files of a play; it must be as empty afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="opscore-test-"))
    folder.chmod(0o755)  # PostgreSQL, which does not run as root, must reach its data in there
    yield folder
    shutil.rmtree(folder)


@contextmanager
def playing(folder: Path, name: str = "fleet_demo.py") -> Iterator[subprocess.Popen[str]]:
    play = subprocess.Popen(
        [sys.executable, ROOT / "examples" / name],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with play:
        try:
            yield play
        finally:  # it is over, unless the test failed
            play.terminate()
            with suppress(subprocess.TimeoutExpired):
                play.wait(60)
            play.kill()


def left_behind(folder: Path) -> list[Any]:
    """Return the files of a play that is over, and those of its processes that still run."""
    running = []
    for process in psutil.process_iter():
        try:
            said = [process.environ().get("TMPDIR", ""), *process.cmdline()]
        except psutil.Error:  # it has ended, or is somebody else's
            continue
        if any(str(folder) in text for text in said):
            running.append((process.pid, said))
    return [*folder.iterdir(), *running]


@pytest.mark.timeout(120)
def test_the_fleets_play_has_a_good_verdict_and_leaves_nothing_behind(folder: Path) -> None:
    with playing(folder) as play:
        assert left_behind(folder), "what runs is seen"
        said, _ = play.communicate()
    assert play.returncode == 0, said
    for words in ("Runs not over", "Slots still held", "Effects doubled", "Lies accepted"):
        assert f"\n{words}: 0 of " in said
    assert "another's task" in said
    assert left_behind(folder) == []


@pytest.mark.timeout(120)
def test_the_fleets_play_leaves_nothing_behind_when_it_is_interrupted(folder: Path) -> None:
    with playing(folder) as play:
        assert play.stdout is not None
        assert any("running" in line for line in play.stdout), "the play was over"
        play.send_signal(signal.SIGINT)
        said, _ = play.communicate()
    assert (play.returncode, said.splitlines()[-1]) == (130, "Everything is stopped."), said
    assert left_behind(folder) == []


TASK = {"taskId": "t1", "attempts": [{}], "status": "completed", "output": "as it is"}
RUN = {"workflowId": "letters", "status": "completed", "tasks": [TASK]}
HOLDER = {"taskId": "t1"}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("Runs not over", {"runs": [RUN | {"status": "running"}]}),
        ("Runs that did not end as they must", {"runs": [RUN | {"workflowId": "calls"}]}),
        ("Slots still held", {"holders": [HOLDER]}),
        ("Effects doubled", {"effects": [("a", "t1", 1), ("b", "t1", 2)]}),
        ("Effects missing", {"effects": []}),
        ("Orders badly signed", {"refused": ["/agents/a"]}),
        ("Lies accepted", {"lies": [("a", "another's task", 200), ("a", TRUTH, 200)]}),
        ("Outputs with a lie", {"runs": [RUN | {"tasks": [TASK | {"output": [LIE]}]}]}),
        ("", {}),
    ],
)
def test_the_verdict_on_the_fleet_names_what_is_not_as_it_must_be(
    words: str, fault: dict[str, Any]
) -> None:
    console = Console(record=True, file=io.StringIO(), width=100)
    with Fleet("http://127.0.0.1:1", "key", "secret") as fleet:
        fleet.effect_log += fault.get("effects", [("a", "t1", 1)])
        fleet.lies += fault.get("lies", [("a", "another's task", 409), ("a", TRUTH, 200)])
        fleet.refused += fault.get("refused", [])
        agents = [{"capacity": 1, "holders": fault.get("holders", [])}]
        with pytest.raises(DemoFailed) if fault else nullcontext():
            judge(console, fleet, fault.get("runs", [RUN]), agents)
    bad = [line.split(":")[0] for line in console.export_text().splitlines() if ": 1 of" in line]
    assert words in bad if fault else not bad


# Triage, research, incident

SECRET = "a-secret-that-signs"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def api(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an API with workers that have the agents of the three plays."""
    log = tmp_path_factory.mktemp("plays") / "log"
    names = {"OPSCORE_AGENTS": plays.AGENTS, "OPSCORE_AGENT_HOSTS": "127.0.0.1"}
    with running_stack(servers, log, OPSCORE_WEBHOOK_SECRET=SECRET, **names) as stack:
        stack.start_worker()
        app = create_app(stack.settings)
        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()
        app.extensions["opscore"].close()


@pytest.fixture
def fleet(api: str) -> Iterator[Fleet]:
    """A client of that API, with room for agents behind HTTP."""
    with Fleet(api, API_KEY, SECRET) as fleet:
        yield fleet
        for agent in fleet.agents.values():
            fleet.notify("DEREGISTER", agent)


def document(name: str) -> Json:
    read: Json = read_document((ROOT / "examples" / f"{name}.yaml").read_text(), "yaml")
    return read


def submit(fleet: Fleet, workflow: Json, value: Json) -> str:
    fleet.ask("POST", "/workflows", workflow)
    run = fleet.ask("POST", "/runs", {"workflowId": workflow["id"], "input": value})
    return str(run["runId"])


def ended(fleet: Fleet, run_id: str, status: str = "completed") -> Json:
    run = fleet.ask("GET", f"/runs/{run_id}?waitSeconds=30")
    assert run["status"] == status, run
    return run


def standing(run: Json) -> dict[str, str]:
    return {task["taskDefinitionId"]: task["status"] for task in run["tasks"]}


def asked(fleet: Fleet, run_id: str) -> Json:
    """Return the task that waits for somebody's word."""
    (task,) = wait_until(
        lambda: [
            task
            for task in fleet.ask("GET", f"/runs/{run_id}")["tasks"]
            if task["reason"] == "approval"
        ]
    )
    return dict(task)


def test_a_reply_that_is_approved_is_sent(fleet: Fleet, tmp_path: Path) -> None:
    value = {"tickets": support_triage.SAMPLE, "folder": str(tmp_path)}
    run_id = submit(fleet, document("support_triage"), value)
    task = asked(fleet, run_id)
    fleet.ask("POST", f"/tasks/{task['taskId']}/approve", {"comment": "Fine."})
    run = ended(fleet, run_id)
    assert (standing(run)["send"], standing(run)["escalate"]) == ("completed", "skipped")
    (mail,) = tmp_path.iterdir()
    assert run["output"] == {
        "way": "sent",
        "ticketId": "T-2",
        "reason": None,
        "mail": {"to": "bob@example.com", "file": str(mail)},
    }
    assert "> URGENT: production is down" in mail.read_text()


@pytest.mark.parametrize("comment", ["Ask for the request id.", None])
def test_a_reply_that_is_rejected_is_handed_on_with_the_reason(
    fleet: Fleet, tmp_path: Path, comment: str | None
) -> None:
    workflow = document("support_triage")
    if comment is None:  # nobody says a word
        (review,) = [task for task in workflow["tasks"] if task["taskId"] == "review"]
        review["timeoutSeconds"] = 0.2
    value = {"tickets": support_triage.SAMPLE, "folder": str(tmp_path)}
    run_id = submit(fleet, workflow, value)
    if comment is not None:
        task = asked(fleet, run_id)
        fleet.ask("POST", f"/tasks/{task['taskId']}/reject", {"comment": comment})
    run = ended(fleet, run_id)
    assert (standing(run)["send"], standing(run)["escalate"]) == ("skipped", "completed")
    (mail,) = tmp_path.iterdir()
    output = run["output"]
    assert (output["way"], output["mail"]["to"]) == ("escalated", "second-line@example.com")
    assert output["reason"] == (comment or "Nobody decided within 0.2 seconds.")
    assert output["reason"] in mail.read_text()


def test_tickets_are_sorted_by_their_words() -> None:
    found = [
        support_triage.classify_ticket({"ticket": ticket}, Context.for_testing())
        for ticket in support_triage.SAMPLE
    ]
    assert [(one["topic"], one["urgency"]) for one in found] == [
        *(("billing", 1), ("outage", 8), ("access", 0), ("other", 0))
    ]
    nobody = {"tickets": [found[0] | {"from": "a stranger"}]}
    with pytest.raises(GiveUp, match="no address"):
        support_triage.draft_reply(nobody, Context.for_testing())


def test_a_mail_that_is_written_again_is_the_same_mail(tmp_path: Path) -> None:
    parameters = {
        "to": "a@example.com",
        "subject": "on\ntwo lines",
        "text": "Ä",
        "folder": tmp_path,
    }
    first = write_mail(parameters, Context.for_testing())
    assert write_mail(parameters, Context.for_testing(attempt=2)) == first
    (file,) = tmp_path.iterdir()
    assert "Subject: on two lines\n" in file.read_text()


def test_research_goes_without_the_stations_that_are_broken_and_names_them(fleet: Fleet) -> None:
    stations = nightly_research.sample(200, broken=20)
    run = ended(fleet, submit(fleet, document("nightly_research"), {"stations": stations}))
    output = run["output"]
    assert (output["studied"], len(output["leftOut"])) == (180, 20)
    assert output["leftOut"][:2] == ["station-000", "station-010"]
    assert all(name in output["text"] for name in output["leftOut"])
    assert output["warming"][0]["trend"] > 0.3 and output["cooling"][0]["trend"] < -0.3
    assert run["deadlineAt"] is not None


def test_research_fails_if_more_stations_are_broken_than_may_be(fleet: Fleet) -> None:
    stations = nightly_research.sample(200, broken=21)
    run_id = submit(fleet, document("nightly_research"), {"stations": stations})
    run = ended(fleet, run_id, "failed")
    assert run["tasks"][0]["items"]["failed"] == 21
    assert "More items failed than forEach.tolerate allows" in run["tasks"][0]["error"]["message"]
    assert standing(run)["digest"] == "cancelled"


def test_a_bad_incident_is_analysed_behind_http_and_pages_somebody(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.register(fleet.add("analyst", incident_response.Analyst))
    run = respond(fleet, tmp_path, bad=True)
    (page,) = tmp_path.iterdir()
    assert run["output"]["page"]["file"] == str(page)
    assert run["output"] | {"page": None} == {
        "severity": 2,
        "summary": "30 of 180 lines are errors, most of payments since 2026-01-31T12:00:30Z: no"
        " answer in # ms.",
        "analysedBy": "analyst",
        "page": None,
    }
    (evidence,) = [task for task in run["tasks"] if task["taskDefinitionId"] == "evidence"]
    child = ended(fleet, evidence["childRunId"])
    assert child["parentTaskId"] == evidence["taskId"]
    assert child["output"] == evidence["output"]


def test_nobody_is_paged_for_nothing(fleet: Fleet, tmp_path: Path) -> None:
    fleet.register(fleet.add("analyst", incident_response.Analyst))
    run = respond(fleet, tmp_path, bad=False)
    assert (run["output"]["severity"], run["output"]["page"]) == (0, None)
    assert standing(run)["page"] == "skipped" and list(tmp_path.iterdir()) == []


def test_somebody_stands_in_for_an_analyst_who_is_dead(fleet: Fleet, tmp_path: Path) -> None:
    fleet.register(fleet.add("analyst", "dead"))
    fleet.ask("PATCH", "/agents/analyst", {"heartbeatSeconds": 0.1})
    wait_until(lambda: not fleet.ask("GET", "/agents/analyst")["available"])
    run = respond(fleet, tmp_path, bad=True)
    assert run["output"]["analysedBy"] == "stand-in-analyst"
    assert len(list(tmp_path.iterdir())) == 1


def respond(fleet: Fleet, folder: Path, *, bad: bool) -> Json:
    fleet.ask("POST", "/workflows", document("incident_evidence"))
    value = {"logs": incident_response.sample(bad=bad), "folder": str(folder)}
    return ended(fleet, submit(fleet, document("incident_response"), value))


@pytest.mark.timeout(120)
def test_the_three_plays_end_as_they_must_and_leave_nothing_behind(folder: Path) -> None:
    with playing(folder, "plays.py") as play:
        said, _ = play.communicate()
    assert play.returncode == 0, said
    for words in ("was sent:", "was escalated:", "15 left out", "says stand-in-analyst"):
        assert words in said
    assert left_behind(folder) == []


def test_a_play_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plays.main(["traige"]) == 2
    assert "There is no traige; there are triage, research, incident." in capsys.readouterr().out
