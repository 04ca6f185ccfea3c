"""MCP servers of LLM agents: good ones, dead, slow and lying ones, and what is left of them."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mcp_server
import pytest
from stack import ROOT, wait_until

from opscore.agentkit import Completed, Context, Failed, call
from opscore.agentkit.llm import PROXY, Limits, LLMAgent, Permissions
from opscore.agentkit.mcp import MAX_TOOLS
from opscore.agentkit.mcp_config import Server, load_servers
from opscore.agentkit.model import Reply, Request, ToolSpec
from opscore.agentkit.model import Result as ToolResult
from opscore.agentkit.running import Attempt, Means, check_means
from opscore.agentkit.scripted import calls, replies, script
from opscore.agentkit.steps import Asked, Began, Decided, InMemory
from opscore.agentkit.tools import MAX_RESULT_BYTES, tool
from opscore.errors import ConfigurationError

SERVER = mcp_server.__file__
LIAR = str(Path(SERVER).with_name("mcp_liar.py"))
ANSWERS: dict[str, Callable[[Request], Reply | str]] = {}
SEEN: list[Request] = []


@script("with-mcp")
def answer(request: Request) -> Reply | str:
    SEEN.append(request)
    return ANSWERS["main"](request)


def liar(how: str, *more: str, seconds: float = 10, **values: Any) -> Server:
    command = (sys.executable, "-S", LIAR, how, *more)
    return Server(name="liar", command=command, seconds=seconds, **values)


def agent(*servers: str, **values: Any) -> LLMAgent:
    allowed = values.pop("permissions", Permissions(mcp=("*",)))
    return LLMAgent(
        **{
            "agent_id": "a",
            "model": "scripted:with-mcp",
            "mcp_servers": servers,
            "permissions": allowed,
            **values,
        }
    )


def run(
    servers: list[Server],
    *wanted: tuple[str, Any],
    record: InMemory | None = None,
    seconds: float = 30,
    **values: Any,
) -> tuple[Any, list[ToolResult], Mapping[str, ToolSpec]]:
    """Make these calls; return what came of it, their results, and the tools the model saw."""
    SEEN.clear()
    ANSWERS["main"] = replies(calls(*wanted), "done") if wanted else replies("done")
    record = record or InMemory()
    one = agent(*(server.name for server in servers), **values)
    means = Means(servers={server.name: server for server in servers})
    came = call(
        Attempt(one, record, means).as_function, {"goal": "g"}, Context.for_testing(), seconds
    )
    results = [step for step in record.steps if isinstance(step, ToolResult)]
    return came, results, {spec.name: spec for spec in SEEN[0].tools} if SEEN else {}


def by_proxy(tool: str, arguments: Any = None, server: str = "docs") -> tuple[str, Any]:
    return PROXY, {"server_name": server, "tool_name": tool, "arguments": arguments or {}}


# --- Good servers --------------------------------------------------------------------------------


@contextmanager
def served_over_http() -> Iterator[str]:
    """Serve the test server on a socket that listens from the beginning."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, SERVER, "http", str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
        )
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        finally:
            process.kill()
            process.wait()


CALLS: Mapping[str, tuple[str, Any]] = {
    "direct": ("docs__search", {"query": "q"}),
    "proxied": by_proxy("search", {"query": "q", "limit": 1}),
    "bad arguments": ("docs__search", {"limit": 1}),
    "no object": ("docs__search", [1]),
    "error": ("docs__fail", {"why": "reasons"}),
    "unknown": by_proxy("nope"),
    "unknown server": by_proxy("search", server="other"),
    "not allowed": by_proxy("delete_all"),
    "not listed": ("docs__delete_all", {}),
    "mixed": ("docs__mixed", {}),
    "long": ("docs__long", {}),
    "odd": by_proxy("odd name/with:signs"),
    "environment": ("docs__environment", {}),
    "variable": ("docs__variable", {"name": "GIVEN"}),
}
ALLOWED = Permissions(mcp=("docs/[!d]*",))


@pytest.fixture(scope="module", params=["stdio", "http"])
def told(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What came of each of the calls, over either way; and the tools, as `tools`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", "postgresql://secret")
        if request.param == "stdio":
            command = (sys.executable, SERVER)
            server = Server(name="docs", command=command, environment={"GIVEN": "given"})
            came, results, tools = run([server], *CALLS.values(), permissions=ALLOWED)
        else:
            with served_over_http() as url:
                server = Server(name="docs", url=url)
                came, results, tools = run([server], *CALLS.values(), permissions=ALLOWED)
    assert came == Completed("done"), came
    by_id = {result.call_id: result for result in results}
    ordered = [by_id[f"call-{number}"] for number in range(1, len(CALLS) + 1)]
    yield {**dict(zip(CALLS, ordered, strict=True)), "tools": tools, "way": request.param}


@pytest.mark.parametrize(
    ("what", "content"),
    [("direct", "3 hits for q"), ("proxied", "1 hits for q"), ("odd", "odd")],
)
def test_a_tool_is_called_directly_and_by_the_proxy(
    told: dict[str, Any], what: str, content: str
) -> None:
    assert (told[what].content, told[what].is_error) == (content, False)


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("bad arguments", "query"),
        ("no object", "The arguments must be an object."),
        ("error", "Error executing tool fail"),
        ("unknown", "nope"),
        ("unknown server", "Give server_name (one of docs), tool_name, and arguments."),
        ("not allowed", "docs/delete_all is not among what you may call."),
        ("not listed", "There is no tool 'docs__delete_all'; there are: docs__endless,"),
    ],
)
def test_what_does_not_work_is_a_tools_error(told: dict[str, Any], what: str, content: str) -> None:
    assert told[what].is_error
    assert content in told[what].content


def test_parts_that_are_no_text_are_described(told: dict[str, Any]) -> None:
    assert told["mixed"].content.splitlines() == [
        "a text",
        "[image, image/png: 4 bytes, no text]",
        "[audio, audio/wav: 4 bytes, no text]",
        "[link to file:///more: more]",
        *("[resource file:///a]", "inner"),
    ]


def test_a_long_result_is_cut(told: dict[str, Any]) -> None:
    assert told["long"].content[:100] == "x" * 100
    assert len(told["long"].content) < MAX_RESULT_BYTES + 100
    assert "[cut: 967,232 bytes more]" in told["long"].content


def test_a_model_sees_the_tools_that_are_allowed_with_their_schemas(told: dict[str, Any]) -> None:
    tools = told["tools"]
    search = tools["docs__search"]
    assert search.description == "Search the documents."
    assert search.parameters["required"] == ["query"]
    assert "docs__odd_name_with_signs_f60b658b" in tools
    assert not {"docs__delete_all", "docs__die"} & set(tools)
    assert "Tools of docs: endless, environment, fail, hang," in tools[PROXY].description


def test_a_process_gets_no_more_of_our_environment_than_it_needs(told: dict[str, Any]) -> None:
    names = set(told["environment"].content.split())
    is_ours = told["way"] == "stdio"  # behind the URL it was started by the test
    assert ("DATABASE_URL" in names, "GIVEN" in names) == (not is_ours, is_ours)
    assert told["variable"].content == ("given" if is_ours else "")


def test_headers_are_sent_to_a_server_behind_a_url() -> None:
    heard: list[bytes] = []
    with _answering(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", heard) as url:
        server = Server(name="web", url=url, headers={"X-Key": "the key"}, seconds=5)
        came, _, tools = run([server])
    assert came == Completed("done")
    assert b"x-key: the key" in heard[0].lower()
    assert "The server web cannot be used now" in tools[PROXY].description


@contextmanager
def _answering(answer: bytes, heard: list[bytes], again: bytes = b"") -> Iterator[str]:
    """Answer each connection with these bytes; `again` for ever after."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(connection: socket.socket) -> None:
            with connection:
                try:
                    heard.append(connection.recv(65536))
                    connection.sendall(answer)
                    while again:
                        connection.sendall(again)
                except OSError:
                    return

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=[connection], daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


# --- Bad servers ---------------------------------------------------------------------------------


def script_of(code: str, seconds: float = 5) -> Server:
    return Server(name="liar", command=(sys.executable, "-S", "-c", code), seconds=seconds)


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (Server(name="liar", command=("no-such-command",)), "it could not be started"),
        (script_of("raise SystemExit(3)"), "it has ended, with status 3"),
        (script_of("import time; time.sleep(600)", 0.5), "it did not answer within 0.5 s"),
        (script_of("while True: print('x')"), "Connection closed"),
        (script_of("import os\nwhile True: os.write(1, b'x' * 65536)"), "Connection closed"),
        (liar("no-object"), "its answer is none: tools.0.inputSchema: "),
        (Server(name="liar", url="http://127.0.0.1:9/mcp", seconds=5), "ConnectError"),
    ],
    ids=["no command", "ends", "hangs", "garbage", "endless line", "no schema", "refused"],
)
def test_a_server_that_cannot_be_opened_costs_its_tools_only(server: Server, reason: str) -> None:
    good = liar("")
    good = Server(name="good", command=good.command)
    wanted = [("good__ask", {}), by_proxy("ask", server="liar"), ("liar__ask", {})]
    came, results, tools = run([server, good], *wanted)
    assert came == Completed("done")
    told = {result.call_id: result for result in results}
    assert told["call-1"].content == "answered"
    assert told["call-2"].is_error
    assert told["call-2"].content.startswith("The MCP server liar cannot be used: ")
    assert reason in told["call-2"].content
    assert told["call-3"].content == f"There is no tool 'liar__ask'; there are: good__ask, {PROXY}."
    assert f"The server liar cannot be used now: {_reason(told['call-2'])}" in (
        tools[PROXY].description
    )


def _reason(result: ToolResult) -> str:
    return result.content.removeprefix("The MCP server liar cannot be used: ")


@pytest.mark.parametrize(
    ("answer", "again", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b"x" * 65536, "more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", b"", "is encoded"),
        (
            b"HTTP/1.1 307 No\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
            b"",
            "",
        ),
        (b"garbage\r\n\r\n", b"", ""),
    ],
    ids=["endless", "encoded", "redirect", "no HTTP"],
)
def test_a_lying_server_behind_a_url_costs_its_tools_only(
    answer: bytes, again: bytes, reason: str
) -> None:
    heard: list[bytes] = []
    with _answering(answer, heard, again) as url:
        server = Server(name="liar", url=url, seconds=5)
        came, results, _ = run([server], by_proxy("ask", server="liar"))
    assert came == Completed("done")
    assert results[0].content.startswith("The MCP server liar cannot be used: ")
    assert reason in results[0].content


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ends", "liar/ask failed: it has ended, with status 4."),
        ("silent", "liar/ask did not answer within 3 s."),
        ("flood", "liar/ask did not answer within 3 s."),
        ("endless-line", "liar/ask failed: Connection closed."),
        ("no-result", "liar/ask failed: its answer is none: content: "),
        ("input", "liar/ask failed: "),
        ("parts", "z\nz\n"),
        ("schema-trap", '{"a": "aaa'),
        ("greets", "answered"),
    ],
)
def test_a_server_that_fails_in_a_call_is_a_tools_error(how: str, said: str) -> None:
    came, results, _ = run([liar(how, seconds=3)], ("liar__ask", {}))
    assert came == Completed("done")
    assert results[0].content.startswith(said)
    assert results[0].is_error == (how not in ("parts", "schema-trap", "greets"))
    assert len(results[0].content) < MAX_RESULT_BYTES + 100


def test_of_thousands_of_tools_a_model_sees_some_and_calls_all() -> None:
    came, results, tools = run([liar("many")], by_proxy("t2999", server="liar"))
    assert came == Completed("done")
    assert results[0].content == "answered"
    assert len(tools) == 1 + MAX_TOOLS
    assert "and 950 more" in tools[PROXY].description


def test_a_list_without_end_is_not_read_to_it() -> None:
    came, _, tools = run([liar("endless-list")])
    assert came == Completed("done")
    assert len(tools) == 1 + 20


def test_schemas_and_names_that_are_none_or_too_large_are_left_out() -> None:
    came, _, tools = run([liar("schemas")])
    assert came == Completed("done")
    shown = {name for name in tools if name != PROXY}
    assert shown == {f"liar__{name}" for name in ("deep", "large", "many", "told")}
    for name in ("large", "many", "deep"):
        assert tools[f"liar__{name}"].parameters == {"type": "object"}
        assert "no usable schema" in tools[f"liar__{name}"].description
    told = tools["liar__told"].description
    assert told.startswith("[31mred") and "\x1b" not in told and "\0" not in told
    assert len(told.encode()) <= 2048


def test_names_are_unique_and_the_same_at_every_attempt() -> None:
    _, _, first = run([liar("same")])
    _, _, again = run([liar("same")])
    assert list(first) == list(again)
    assert len(first) == 1 + 3 and "liar__a_b" in first


# --- What needs somebody's word, and what must not happen twice ----------------------------------


@pytest.mark.parametrize(
    "wanted", [("liar__ask", {}), by_proxy("ask", server="liar")], ids=["direct", "proxy"]
)
def test_a_marked_tool_waits_for_approval_whichever_way_it_is_called(
    wanted: tuple[str, Any],
) -> None:
    server = liar("", approval=("as*",))
    record = InMemory()
    _, results, _ = run([server], wanted, record=record)
    assert (record.steps[-1], results) == (Asked("call-1", *wanted), [])
    record.add(Decided(True))
    came, results, _ = run([server], wanted, record=record)
    assert (came, results[0].content) == (Completed("done"), "answered")


@pytest.mark.parametrize(
    "wanted", [("liar__ask", {}), by_proxy("ask", server="liar")], ids=["direct", "proxy"]
)
@pytest.mark.parametrize("how", ["ends", "silent"])
def test_of_a_once_tool_that_gave_no_answer_nobody_knows_whether_it_happened(
    wanted: tuple[str, Any], how: str
) -> None:
    record = InMemory()
    _, results, _ = run([liar(how, once=("ask",), seconds=2)], wanted, record=record)
    assert Began("call-1") in record.steps
    assert results[0].content.endswith("It is not known whether this call had its effect.")


def test_of_a_once_tool_whose_server_is_gone_after_a_crash_nobody_knows_either() -> None:
    record = InMemory([calls(("liar__ask", {})), Began("call-1")])
    server = Server(name="liar", command=("no-such-command",), once=("ask",))
    _, results, _ = run([server], record=record)
    assert results[0].is_error
    assert results[0].content.endswith("It is not known whether this call had its effect.")


# --- Nothing is left -----------------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has ended, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(path: Path) -> None:
    pids = [int(pid) for pid in path.read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: [is_gone(pid) for pid in pids], seconds=5, says=all)


def test_no_process_survives_an_attempt_that_succeeds(tmp_path: Path) -> None:
    server = Server(name="docs", command=(sys.executable, SERVER))
    came, results, _ = run([server], ("docs__pids", {"path": str(tmp_path / "pids")}))
    assert (came, results[0].content) == (Completed("done"), "written")
    all_gone(tmp_path / "pids")


@pytest.mark.parametrize("server_seconds", [2.0, 20.0], ids=["opening fails", "agent times out"])
def test_no_process_survives_a_server_that_ignores_everything(
    tmp_path: Path, server_seconds: float
) -> None:
    server = liar("deaf", str(tmp_path / "pids"), seconds=server_seconds)
    came, _, _ = run([server], seconds=3.5)
    assert isinstance(came, Failed if server_seconds > 2 else Completed)
    all_gone(tmp_path / "pids")


def test_no_process_survives_an_attempt_in_a_thread_that_is_not_the_main_one(
    tmp_path: Path,
) -> None:
    server = liar("deaf", str(tmp_path / "pids"), seconds=2)
    came: list[Any] = []
    thread = threading.Thread(target=lambda: came.append(run([server])))
    thread.start()
    thread.join(20)
    assert came[0][0] == Completed("done")
    all_gone(tmp_path / "pids")


@tool
async def block(seconds: float) -> None:
    """Block the whole event loop."""
    threading.Event().wait(seconds)


def test_no_process_survives_an_attempt_that_only_an_alarm_ends(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    server = liar("stubborn", str(path))
    record = InMemory()
    wanted = ("block", {"seconds": 30})
    came, _, _ = run([server], wanted, record=record, seconds=4, tools=[block])
    assert isinstance(came, Failed) and came.code == "timeout"
    assert isinstance(record.steps[-1], Reply), "the alarm rang in the midst of `block`"
    all_gone(path)


def test_a_server_behind_a_url_that_never_answers_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        server = Server(name="web", url=url, seconds=0.5)
        came, _, tools = run([server], seconds=5)
    assert came == Completed("done")
    assert "did not answer within 0.5 s" in tools[PROXY].description


HOLDER = """
import sys, time
from opscore.agentkit.mcp_stdio import Child
child = Child(sys.argv[1:], {})
print(child.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["worker", "keeper asked to end"])
def test_no_process_survives_a_killed_worker(tmp_path: Path, victim: str) -> None:
    pids = tmp_path / "pids"
    command = (sys.executable, "-S", LIAR, "deaf", str(pids))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *command], stdout=subprocess.PIPE, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None
        keeper = int(holder.stdout.readline())
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        if victim == "worker":
            holder.kill()
        else:
            os.kill(keeper, signal.SIGTERM)
        all_gone(pids)
        wait_until(lambda: is_gone(keeper), seconds=5)
        holder.kill()


# --- The file ------------------------------------------------------------------------------------

FILE = """
servers:
  docs:
    command: python
    args: [-m, docs]
    env: {TOKEN: "${DOCS_TOKEN}", PLAIN: "$${x}"}
    timeoutSeconds: 7.5
    approval: ["delete_*"]
    once: ["send_*"]
  web: {url: "https://${HOST}/mcp", headers: {Authorization: "Bearer ${WEB_TOKEN}"}}
  off: {command: x, env: {A: "${NOT_SET}"}, enabled: false}
"""
GIVEN = {"DOCS_TOKEN": "docs-secret", "HOST": "mcp.example", "WEB_TOKEN": "web-secret"}


def load(tmp_path: Path, text: str, environment: Mapping[str, str] = GIVEN) -> Mapping[str, Server]:
    path = tmp_path / "mcp.yaml"
    path.write_text(text)
    return load_servers(str(path), environment)


def test_the_file_names_servers(tmp_path: Path) -> None:
    servers = load(tmp_path, FILE)
    docs, web = servers["docs"], servers["web"]
    assert docs.command == ("python", "-m", "docs")
    assert docs.environment == {"TOKEN": "docs-secret", "PLAIN": "${x}"}
    assert (docs.seconds, docs.secrets) == (7.5, ("docs-secret",))
    assert docs.needs_approval("delete_all") and not docs.needs_approval("send_it")
    assert docs.is_once("send_it") and not docs.is_once("delete_all")
    assert (web.url, web.headers) == (
        "https://mcp.example/mcp",
        {"Authorization": "Bearer web-secret"},
    )
    assert [server.enabled for server in servers.values()] == [True, True, False]
    means = Means(servers=servers, environment={"OPENAI_API_KEY": "openai-secret"})
    assert set(means.secrets) == {"docs-secret", "mcp.example", "web-secret", "openai-secret"}


def test_all_faults_of_the_file_are_told_at_once_with_their_places(tmp_path: Path) -> None:
    text = """
    more: 1
    servers:
      both: {command: x, url: "https://a.example"}
      neither: {enabled: true, comand: x}
      a__b: {command: x}
      text: 7
      wrong: {command: [x], args: y, env: [], timeoutSeconds: 0, enabled: 3, approval: [1]}
      keys: {command: x, headers: {A: b}, timeout: 3}
      unset: {command: x, env: {A: "${NOT_SET}"}}
      url: {url: "ftp://x", headers: {"a b": "c"}}
      login: {url: "https://u:p@x.example"}
    """
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, text)
    told = [fault.partition("mcp.yaml: ")[2] for fault in refused.value.faults]
    assert told == [
        "more: is not known here; known are servers",
        "servers.both: must have either command or url",
        "servers.neither: must have either command or url",
        "servers.neither.comand: is not known here; known are command, args, env, enabled, "
        "timeoutSeconds, approval, once, url, headers",
        "servers.a__b: a name must be 1 to 32 letters, digits, '-', and single '_' between them",
        "servers.text: must be an object",
        "servers.wrong.enabled: must be true or false",
        "servers.wrong.command: must be a text: a program; what it gets stands in args",
        "servers.wrong.env: must be an object of texts",
        "servers.wrong.timeoutSeconds: must be a number of seconds, more than 0 and at most 3600",
        "servers.wrong.approval: must be a list of texts",
        "servers.keys.headers: is not known here; known are command, args, env, enabled, "
        "timeoutSeconds, approval, once",
        "servers.keys.timeout: is not known here; known are command, args, env, enabled, "
        "timeoutSeconds, approval, once",
        "servers.unset.env.A: ${NOT_SET} is not set in the environment",
        "servers.url.url: must be a URL such as https://mcp.example/mcp",
        "servers.url.headers.a b: is no header: names and values are printable ASCII",
        "servers.login.url: must hold no credentials: put them in headers",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("servers: [", "This is not YAML"),
        ("[1]", 'must be an object with "servers"'),
        ("servers: {a: {command: x}, a: {command: y}}", "a"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=r"OPSCORE_MCP_CONFIG: .*mcp\.yaml: ") as refused:
        load(tmp_path, text)
    assert fault in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_servers(str(tmp_path / "nope.yaml"), {})
    assert load_servers(None, {}) == {}


@pytest.mark.parametrize(
    ("server", "fault"),
    [
        ("nope", "has an unknown MCP server 'nope': there are docs, off, web"),
        ("off", "has the MCP server off, which is not enabled"),
        ("web", "has the MCP server web, whose timeoutSeconds (20) must be less than"),
    ],
)
def test_an_agent_whose_server_is_none_is_refused_when_a_worker_starts(
    tmp_path: Path, server: str, fault: str
) -> None:
    one = agent(server, limits=Limits(call_seconds=20))
    with pytest.raises(ConfigurationError) as refused:
        check_means([one], Means(servers=load(tmp_path, FILE)))
    assert fault in str(refused.value)
    check_means([agent("docs")], Means(servers=load(tmp_path, FILE)))
