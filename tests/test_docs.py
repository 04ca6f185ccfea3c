"""The docs tell the truth: what they show runs, what they list is all there is, every link leads
somewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import docs_source
import pytest
import yaml
from stack import Servers, Stack, running_stack, wait_until

from opscore import definition, engine, remote, remote_call
from opscore.agentkit import Completed, Context, call
from opscore.agentkit.llm import Limits
from opscore.agentkit.mcp_config import load_servers
from opscore.agentkit.running import Attempt, Means
from opscore.agentkit.steps import InMemory
from opscore.config import Settings
from opscore.errors import AgentBusy, GiveUp
from opscore.states import Reason

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text() for page in sorted(DOCS.glob("*.md"))}
TEXTS = {**PAGES, **{f: (ROOT / f).read_text() for f in ("CONTRIBUTING.md", "SECURITY.md")}}
TOUR = ("getting-started.md", "operations.md", "schedules.md")
"""Walked in this order, in one shell."""
SETTING = r"`(OPSCORE_[A-Z_]+|DATABASE_URL|REDIS_URL)`"
OF_CLIENTS = {"OPSCORE_API_URL"}


@dataclass(frozen=True)
class Fence:
    language: str
    title: str
    text: str


def fences(page: str) -> list[Fence]:
    """Return the code blocks of a page."""
    found = re.findall(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', page, re.M | re.S)
    return [Fence(*each) for each in found]


def programs(page: str, word: str) -> list[str]:
    """Return the programs in Python of a page that have this word."""
    return [f.text for f in fences(page) if f.language == "python" and word in f.text]


def settings_declared() -> set[str]:
    return {field.metadata["variable"] for field in fields(Settings)} | OF_CLIENTS


def make_targets(text: str) -> set[str]:
    """Return the make targets that a text names. All of them must be there."""
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.M))
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named <= there
    return named


# --- What is made ---------------------------------------------------------------------------------


def test_what_is_made_is_what_make_docs_makes_of_its_sources() -> None:
    for page, text in docs_source.pages().items():
        assert page.read_text() == text, f"{page.name}: `make docs`"


# --- What is listed -------------------------------------------------------------------------------


def first_cells(page: str, heading: str) -> set[str]:
    """Return what is in code in the first column of the tables below a heading."""
    level = heading.partition(" ")[0]
    section = re.split(rf"^#{{1,{len(level)}}} ", page.partition(f"\n{heading}\n")[2], flags=re.M)[
        0
    ]
    assert section, heading
    rows = re.findall(r"^\| ([^|]+) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_settings_they_name_exist() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(SETTING, text)}
    assert named and named <= settings_declared()


def test_the_make_targets_they_name_exist() -> None:
    assert {target for text in TEXTS.values() for target in make_targets(text)} >= {"chaos", "docs"}


def test_they_name_every_reason_to_wait() -> None:
    named = first_cells(PAGES["concepts.md"], "## How waiting works")
    assert named - {"reason"} == set(Reason)


def test_they_name_all_that_an_agent_is_told_and_may_say() -> None:
    named = {name.partition("(")[0] for name in first_cells(PAGES["agents.md"], "### The context")}
    of_workers = {"cancel", "drain", "for_testing"}
    assert named == {name for name in vars(Context) if not name.startswith("_")} - of_workers


def test_they_name_every_key_of_a_definition() -> None:
    named = first_cells(PAGES["workflows.md"], "## The document")
    keys = definition._TOP | definition._EVERY_TASK | set().union(*definition._TYPES.values())
    assert named == keys


def test_they_name_every_code_of_a_task_that_failed() -> None:
    sources = [*(ROOT / "opscore").rglob("*.py"), *(ROOT / "workers").glob("*.py")]
    text = "".join(source.read_text() for source in sources)
    codes = set(re.findall(r'(?:Failure|Failed|failure)\(\s*"([a-z_]+)"', text))
    handed_back = {"answer_lost", "worker_stopped"}  # of attempts whose task has not failed
    named = first_cells(PAGES["workflows.md"], "## Failure")
    assert codes - handed_back - {"internal_error"} <= named


def test_they_name_every_problem_and_all_that_is_stuck() -> None:
    found = (ROOT / "opscore/problems.py").read_text()
    codes = {*re.findall(r'_problem\("([a-z_]+)"', found), "agent_paused", "line_unserved"}
    assert first_cells(PAGES["operations.md"], "### Problems") - {"code"} == codes
    stuck = (ROOT / "opscore/stuck.py").read_text()
    codes = {*re.findall(r'_told\("([a-z_]+)"', stuck), "nobody_serves"}
    assert first_cells(PAGES["operations.md"], "### Stuck") - {"code"} == codes


def test_what_dies_is_back_after_what_make_chaos_measured() -> None:
    section = PAGES["operations.md"].partition("## When a part dies")[2].partition("\n## ")[0]
    told = re.findall(r"([\d.]+) s, at most ([\d.]+) s", section)
    table = (ROOT / "README.md").read_text().partition("| fault |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \|.* ([\d.]+) s \| ([\d.]+) s \|$", table, re.M)
    measured = [(p50, most) for name, p50, most in rows if not name.startswith("none")]
    assert sorted(told) == sorted(measured)


# --- What is shown --------------------------------------------------------------------------------


def script_of(pages: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the pages' shell commands, and what each block of them must say, if anything.

    A block with a title is a file, written where it stands. Before each block of commands its
    number is printed.
    """
    script, told = [], []
    for fence in (fence for page in pages for fence in fences(PAGES[page])):
        if fence.title:
            script.append(f"cat > '{fence.title}' <<'~~~'\n{fence.text}~~~\n")
        elif fence.language == "sh" and not fence.text.startswith("make setup"):
            script.append(f"printf '\\n~~~ %s\\n' {len(told)}\n{fence.text}")
            told.append("")
        elif fence.language == "text":
            told[-1] = fence.text
    return "".join(script), told


def pattern(line: str) -> str:
    """Return what a line of a page stands for: another id, number or pid will do, and … is any."""
    found = re.split(
        r"([0-9a-f]{8}(?:-[0-9a-f]{4,12}){4}|(?<=key:)[0-9a-f]{8}|\d[\d.,:-]*|…)", line
    )
    parts = []
    for number, part in enumerate(found):
        if number % 2 == 0:
            words = [re.escape(word) for word in re.split(r"\s+", part)]
            parts.append(r"\s+".join(words))
        else:
            parts.append(".*" if part == "…" else r"[0-9a-f.,:-]+")
    return "".join(parts).replace("@vm", r"@\S+")


def missing(told: str, said: str) -> str | None:
    """Return the first line that should have been said, in this order, and was not."""
    lines = iter(said.splitlines())
    for line in told.splitlines():
        wanted = re.compile(pattern(line.strip()))
        if line.strip() != "…" and not any(wanted.fullmatch(each.strip()) for each in lines):
            return line
    return None


@pytest.mark.skipif(shutil.which("curl") is None, reason="the tour is made with curl")
def test_the_tours_run_as_they_are_written() -> None:
    script, told = script_of(TOUR)
    folder = Path(tempfile.mkdtemp(prefix="opscore-test-"))
    folder.chmod(0o755)  # nobody, who runs PostgreSQL for root, may pass
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": commands, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=110,
        )
    finally:
        down = [sys.executable, "-m", "opscore", "down", "--data", str(folder / ".opscore")]
        subprocess.run(down, env=environment, cwd=folder, capture_output=True)
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout
    _, *said = re.split(r"^~~~ \d+\n", done.stdout, flags=re.M)
    assert len(said) == len(told)
    for wanted, answer in zip(told, said, strict=True):
        assert (line := missing(wanted, answer)) is None, (line, answer)


def one_program(page: str, word: str) -> str:
    (source,) = programs(PAGES[page], word)
    return source


def test_the_remote_agent_they_show_is_the_example() -> None:
    example = (ROOT / "examples/remote_agent.py").read_text()
    assert example.endswith(f'"""\n\n{one_program("agents.md", "AgentServer")}')


def test_the_task_they_show_is_what_an_agent_behind_http_gets() -> None:
    shown = next(f.text for f in fences(PAGES["agents.md"]) if "senderId" in f.text)
    task = json.loads(shown)
    context = task["sessionContext"]
    order = remote.Order(
        url="",
        payload=task["payload"],
        task_name=task["task_name"],
        run_id=task["opscore_session_id"],
        task_id=task["opscore_task_id"],
        token=task["opscore_attempt_token"],
        attempt=context["attempt"],
        deadline=datetime.fromisoformat(context["deadline"]),
        timeout_seconds=600,
        workflow_id=context["workflowId"],
        version=context["version"],
        index=context["index"],
    )
    assert json.loads(remote_call._body(order)) == task
    answer = next(f.text for f in fences(PAGES["agents.md"]) if '"result"' in f.text)
    assert remote.read_report(json.loads(answer)) == Completed({"summary": "The parameters."})


def test_the_llm_agent_they_show_works_with_the_script_they_show() -> None:
    page = "llm-agents.md"
    names: dict[str, Any] = {"__name__": "my_models"}
    exec(one_program(page, "# my_models.py"), names)
    exec(one_program(page, "@script"), names)
    clerk = replace(names["CLERK"], model="scripted:clerk", fallback_models=())
    assert len(names["CLERK"].missing_keys({})) == 2
    attempt = Attempt(clerk, InMemory(), Means())
    parameters = {"goal": "Ada wants her money back."}
    answer = call(attempt.as_function, parameters, Context.for_testing(), 20)
    order = '[{"id": "o-1", "customer": "ada", "total": 30}]'
    assert answer == Completed({"done": True, "note": order})


def test_the_limits_they_list_have_these_defaults() -> None:
    table = PAGES["llm-agents.md"].split("| Limit | Default | |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    told = {name.strip("` "): default for names, default in rows for name in names.split(",")}
    limits = asdict(Limits())
    of_one = {name: told[name] for name in limits if told[name]}
    assert set(told) == set(limits)
    said = {"none": None, **{f"{v:,g}": v for v in limits.values() if v is not None}}
    assert {name: said[default] for name, default in of_one.items()} == limits


def test_the_file_of_mcp_servers_they_show_is_one(tmp_path: Path) -> None:
    (shown,) = [f.text for f in fences(PAGES["llm-agents.md"]) if f.language == "yaml"]
    (tmp_path / "mcp.yaml").write_text(shown)
    given = {"DOCS_TOKEN": "one", "WEB_TOKEN": "two"}
    servers = load_servers(str(tmp_path / "mcp.yaml"), given)
    assert servers["docs"].environment == {"TOKEN": "one"}
    assert servers["web"].headers == {"Authorization": "Bearer two"}


def test_the_agents_they_show_run_as_pasted() -> None:
    names: dict[str, Any] = {"__name__": "my_agents"}
    exec(one_program("getting-started.md", "# my_agents.py"), names)
    triage, write, context = names["triage"], names["write"], Context.for_testing()
    assert triage({"ticket": "fire"}, context)["urgent"]
    with pytest.raises(GiveUp):
        triage({"ticket": ""}, context)
    assert write({"topic": "queues"}, context) == {"text": "All about queues"}
    with pytest.raises(AgentBusy):
        write({"topic": "queues", "quota": 0}, context)


def workflows_shown() -> list[str]:
    """Return the documents of workflows.md."""
    shown = [f.text for f in fences(PAGES["workflows.md"]) if f.language == "yaml"]
    return [text for text in shown if text.startswith("id: ")]


def test_the_unit_test_they_show_passes_as_pasted(tmp_path: Path) -> None:
    digest, _ = workflows_shown()
    agents = one_program("getting-started.md", "# my_agents.py")
    for name, source in [("my_agents.py", agents), ("support-digest.yaml", digest)]:
        (tmp_path / name).write_text(source)
    (tmp_path / "test_digest.py").write_text(one_program("testing.md", "opscore.testing"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_digest.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_workflows_they_show_run_on_the_agents_they_show(
    servers: Servers, tmp_path: Path
) -> None:
    first, second = workflows_shown()
    (tmp_path / "my_agents.py").write_text(one_program("getting-started.md", "# my_agents.py"))
    env = {"OPSCORE_AGENTS": "my_agents", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with running_stack(servers, tmp_path / "log", **env) as stack:
        stack.start_worker()
        tickets = {"tickets": ["fire", "water", "air"]}
        run = stack.finished(stack.submit(yaml.safe_load(first), tickets))
        assert (run.status, run.output) == ("completed", {"text": "All about 3 tickets"})
        for approved, output in [
            (True, {"sent": {"text": "All about All about 3 tickets"}, "escalated": None}),
            (False, {"sent": None, "escalated": {"text": "All about no"}}),
        ]:
            run_id = stack.submit(yaml.safe_load(second), tickets)
            decide(stack, run_id, approved)
            run = stack.finished(run_id)
            assert (run.status, run.output) == ("completed", output)


def decide(stack: Stack, run_id: Any, approved: bool) -> None:
    """Approve or reject what a run asks for, once it does."""
    (task,) = wait_until(
        lambda: [task for task in stack.tasks(run_id) if task.reason == "approval"]
    )
    with stack.database.transaction() as tx:
        woken = engine.decide_approval(tx, task.id, approved=approved, comment="no", by="key:test")
    stack.dispatcher.wake(woken)


def test_the_defaults_they_show_are_those_of_a_definition() -> None:
    (shown,) = [f.text for f in fences(PAGES["workflows.md"]) if f.text.startswith("retry: ")]
    task = {"taskId": "a", "agentId": "a"}
    plain = definition.parse({"id": "a", "tasks": [task]})
    told = definition.parse({"id": "a", "tasks": [task | yaml.safe_load(shown)]})
    assert plain.tasks == told.tasks


# --- The site -------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page of the site leads to, what it loads, and where in it one can be led."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.assets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.hrefs.append(given["href"])
        elif tag != "a":
            self.assets += [given[name] for name in ("src", "href", "srcset") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)


def test_the_site_has_every_page_its_links_lead_somewhere_and_it_loads_nothing_from_elsewhere(
    site: Path,
) -> None:
    built = {page.name: Links(page.read_text()) for page in site.glob("*.html")}
    assert {Path(name).stem for name in PAGES} == {Path(name).stem for name in built} - {"404"}
    wrong = []
    for name, page in built.items():
        wrong += [(name, to) for to in page.assets if urlsplit(to).netloc]
        for href in page.hrefs:
            to = urlsplit(href)
            target = to.path.strip("/") or name
            if to.netloc or (name, target) == ("404.html", "."):
                continue
            there = built.get(target)
            if there is None or (to.fragment and unquote(to.fragment) not in there.ids):
                wrong.append((name, href))
    assert wrong == []


def test_the_site_can_be_searched_and_its_code_is_shown_as_code(site: Path) -> None:
    found = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert {Path(entry["location"].partition("#")[0] or "index.html").stem for entry in found} == {
        Path(name).stem for name in PAGES
    }
    for page in site.glob("*.html"):
        text = page.read_text()
        for unread in ("```", "{#", "\\|"):  # signs of Markdown that nothing took
            assert unread not in text, (page.name, unread)
