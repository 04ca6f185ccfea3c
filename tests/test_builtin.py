"""Built-in tools of LLM agents: files in a run's folder, and pages; and no way out of either."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opscore import pages
from opscore.agentkit import Completed, Context, call
from opscore.agentkit.builtin import MAX_FILE_BYTES, MAX_FILES, Files, Page
from opscore.agentkit.llm import Limits, LLMAgent, Permissions
from opscore.agentkit.model import Result as ToolResult
from opscore.agentkit.running import Attempt, Means, check_means
from opscore.agentkit.scripted import SCRIPTS, calls, replies, script
from opscore.agentkit.steps import InMemory
from opscore.agentkit.tools import ToolFault
from opscore.errors import ConfigurationError
from opscore.remote import UrlPolicy

TURNS: dict[str, Any] = {}


@script("built-in")
def answer(request: Any) -> Any:
    return TURNS["main"](request)


def agent(*tools: str, **values: Any) -> LLMAgent:
    return LLMAgent(agent_id="a", model="scripted:built-in", tools=tools, **values)


def results(one: LLMAgent, means: Means, *wanted: tuple[str, Any]) -> list[ToolResult]:
    TURNS["main"] = replies(*(calls(each) for each in wanted), "done")
    record = InMemory()
    context = Context.for_testing(run_id="run-1")
    came = call(Attempt(one, record, means).as_function, {"goal": "g"}, context, 20)
    assert came == Completed("done")
    return [step for step in record.steps if isinstance(step, ToolResult)]


# --- Files ---------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of run-1, with a secret beside its folder."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "run-2").mkdir()
    return Files(tmp_path / "root", "run-1")


def test_a_file_is_written_read_and_listed(files: Files) -> None:
    assert files.list() == {}
    assert files.write("a.txt", "one") == "Wrote 3 bytes."
    files.write("deep/er/b.txt", "héllo")
    files.write("a.txt", "two!")
    assert files.list() == {"a.txt": 4, "deep/er/b.txt": 6}
    assert (files.read("a.txt"), files.read("deep/er/b.txt", 1)) == ("two!", "éllo")


PATHS = [
    *("", ".", "..", "/etc/passwd", "../run-2/x", "a/../../secret", "a//b", "a/", "./a"),
    *("a\0b", "a\nb", ".writing-x", "x" * 101, "/".join("abcdefghi")),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_a_path_that_leads_elsewhere_is_refused(
    files: Files, tmp_path: Path, path: str, write: bool
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ToolFault, match="path"):
        files.write(path, "x") if write else files.read(path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("above", [True, False], ids=["a folder", "the file"])
def test_a_symbolic_link_is_not_followed(
    files: Files, tmp_path: Path, write: bool, above: bool
) -> None:
    files.write("a.txt", "one")
    link = tmp_path / "root" / "run-1" / "link"
    link.symlink_to(tmp_path if above else tmp_path / "secret")
    path = "link/secret" if above else "link"
    if write and not above:  # the link is what is replaced
        files.write(path, "mine")
        assert not link.is_symlink()
    else:
        with pytest.raises(ToolFault):
            files.write(path, "x") if write else files.read(path)
    assert (tmp_path / "secret").read_text() == "secret"
    assert "link/secret" not in files.list()


def test_a_run_whose_folder_is_a_link_has_no_files(files: Files, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "run-1").symlink_to(tmp_path)
    for attempt in (lambda: files.read("secret"), lambda: files.write("secret", "x")):
        with pytest.raises(ToolFault):
            attempt()
    assert (tmp_path / "secret").read_text() == "secret"


def test_what_is_no_file_is_not_read(files: Files, tmp_path: Path) -> None:
    files.write("folder/a.txt", "one")
    os.mkfifo(tmp_path / "root" / "run-1" / "pipe")
    for path in ("folder", "pipe", "nope", "nope/nope"):
        with pytest.raises(ToolFault) as refused:
            files.read(path)
        assert str(tmp_path) not in str(refused.value)
    with pytest.raises(ToolFault):
        files.write("folder", "x")
    with pytest.raises(ToolFault):
        files.write("folder/a.txt/b", "x")
    assert files.list() == {"folder/a.txt": 3}


def test_files_have_limits(files: Files) -> None:
    with pytest.raises(ToolFault, match="at most 262,144 bytes, not 262,146"):
        files.write("large", "é" * (MAX_FILE_BYTES // 2 + 1))
    for number in range(MAX_FILES):
        files.write(f"{number}", "x")
    with pytest.raises(ToolFault, match="at most 64 files"):
        files.write("more", "x")
    files.write("1", "again")
    assert len(files.list()) == MAX_FILES


def test_the_folder_of_another_run_is_another_one(tmp_path: Path) -> None:
    Files(tmp_path, "one").write("a", "1")
    assert Files(tmp_path, "two").list() == {}


def test_an_agent_has_the_files_of_its_run(tmp_path: Path) -> None:
    one = agent("write_file", "read_file", "list_files")
    told = results(
        one,
        Means(files=tmp_path),
        ("write_file", {"path": "a", "text": "x" * 100_000}),
        ("read_file", {"path": "a"}),
        ("read_file", {"path": "a", "offset": 99_999}),
        ("list_files", {}),
        ("read_file", {"path": "../x"}),
    )
    written, read, rest, listed, refused = told
    assert written.content == "Wrote 100,000 bytes."
    assert read.content.endswith("x\n[cut: 34,464 bytes more]")
    assert (rest.content, listed.content) == ("x", '{"a": 100000}')
    assert refused.is_error
    assert (tmp_path / "run-1" / "a").stat().st_mode & 0o777 == 0o600


# --- Pages ---------------------------------------------------------------------------------------


PAGES: dict[str, tuple[Any, ...]] = {
    "/text": (200, "text/plain; charset=latin-1", "héllo".encode("latin-1")),
    "/json": (404, "application/json", b'{"a": 1}'),
    "/image": (200, "image/png", b"\x89PNG"),
    "/long": (200, "text/html", b"y" * 200_000),
    "/packed": (200, "text/plain", b"x", {"Content-Encoding": "gzip"}),
}
PLACES = {
    "/near": "text",
    "/round": "http://{host}/round",
    "/away": "http://other.example/x",
    "/inside": "http://169.254.169.254/latest",
    "/file": "file:///etc/passwd",
}


class Site(BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        seen: list[Any] = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.path, self.headers["Host"], dict(self.headers)))
        if self.path == "/slow":
            self.server.released.wait(20)  # type: ignore[attr-defined]
        elif self.path in PAGES:
            self._say(*PAGES[self.path])
        else:
            place = PLACES[self.path].format(host=self.headers["Host"])
            self._say(302, "", b"", {"Location": place})

    def _say(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | (more or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.seen, server.released = [], threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join(5)


def resolve(host: str, port: int, **_: Any) -> Any:
    """The site is the public `site.example`; `rebound.example` leads to it by a private address."""
    if host not in ("site.example", "rebound.example"):
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


POLICY = UrlPolicy(("site.example",))


def fetch(
    site: ThreadingHTTPServer,
    path: str,
    host: str = "site.example",
    allows: Callable[[str], bool] = lambda host: host.endswith(".example"),
    seconds: float = 10,
) -> Page:
    url = f"http://{host}:{site.server_port}{path}"
    return pages.fetch(POLICY, url, allows, seconds=seconds, max_bytes=65536, resolve=resolve)


def test_a_page_is_got_with_its_status_and_kind(site: ThreadingHTTPServer) -> None:
    page = fetch(site, "/json")
    assert (page.status, page.content_type, page.body) == (404, "application/json", b'{"a": 1}')
    _, host, headers = site.seen[-1]  # type: ignore[attr-defined]
    assert host == f"site.example:{site.server_port}"
    assert not {"Authorization", "Cookie", "X-OpsCore-Signature"} & set(headers)


def test_of_a_long_page_the_beginning_is_kept(site: ThreadingHTTPServer) -> None:
    page = fetch(site, "/long")
    assert (len(page.body), page.is_cut) == (65536, True)


def test_a_redirect_is_followed_and_told(site: ThreadingHTTPServer) -> None:
    page = fetch(site, "/near")
    assert (page.status, page.url.rpartition("/")[2]) == (200, "text")


@pytest.mark.parametrize(
    ("path", "host", "reason"),
    [
        ("/text", "other.test", "The host other.test is not among those you may ask"),
        ("/text", "rebound.example", "leads to 127.0.0.1, no public address"),
        ("/text", "127.0.0.1", "is not on the public network"),
        ("/text", "localhost", "is not on the public network"),
        ("/text", "2130706433", "is an address in disguise"),
        ("/text", "u:p@site.example", "must hold no credentials"),
        ("/text", "gone.example", "Name or service not known"),
        ("/away", "site.example", "Name or service not known"),
        ("/inside", "site.example", "is not on the public network"),
        ("/file", "site.example", "must begin with http:// or https://"),
        ("/round", "site.example", "is redirected more than 5 times"),
        ("/packed", "site.example", "The page is encoded (gzip)"),
    ],
)
def test_a_page_that_may_not_or_cannot_be_got_is_a_tools_error(
    site: ThreadingHTTPServer, path: str, host: str, reason: str
) -> None:
    with pytest.raises(ToolFault) as refused:
        fetch(site, path, host)
    assert reason in str(refused.value)


def test_a_redirect_to_a_host_that_is_not_allowed_is_not_followed(
    site: ThreadingHTTPServer,
) -> None:
    with pytest.raises(ToolFault, match=r"The host other\.example is not among those"):
        fetch(site, "/away", allows=lambda host: host == "site.example")


def test_a_page_that_takes_too_long_is_a_tools_error(site: ThreadingHTTPServer) -> None:
    with pytest.raises(ToolFault, match="did not answer in time"):
        fetch(site, "/slow", seconds=0.5)


@contextmanager
def no_one_listens() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_page_of_a_server_that_is_away_is_a_tools_error() -> None:
    with no_one_listens() as port, pytest.raises(ToolFault, match="could not be had"):
        url = f"http://site.example:{port}/"
        pages.fetch(POLICY, url, lambda _: True, seconds=5, max_bytes=10, resolve=resolve)


def test_an_agent_gets_text_and_is_told_of_what_is_none(site: ThreadingHTTPServer) -> None:
    def get(url: str, allows_host: Callable[[str], bool], **values: Any) -> Page:
        return pages.fetch(POLICY, url, allows_host, resolve=resolve, **values)

    one = agent("http_get", permissions=Permissions(hosts=("Site.*",)))
    base = f"http://site.example:{site.server_port}"
    paths = ("text", "image", "long")
    wanted = [("http_get", {"url": f"{base}/{path}"}) for path in paths]
    wanted.append(("http_get", {"url": "http://elsewhere.example/"}))
    text, image, long, refused = results(one, Means(fetch=get), *wanted)
    assert text.content == f"{base}/text\nstatus 200, text/plain; charset=latin-1\n\nhéllo"
    assert image.content.endswith("status 200, image/png\n\n[4 bytes, no text]")
    assert long.content.startswith(f"{base}/long\nstatus 200, text/html\n\nyyyy")
    assert "[cut" in long.content[-60:]
    assert refused.is_error and "elsewhere.example is not among" in refused.content


# --- Declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "values", "fault"),
    [
        ("http_get", {}, "has http_get, and may get nothing: give permissions.hosts"),
        ("http_get", {"permissions": Permissions(hosts=("*",))}, "this process does not offer"),
        ("read_file", {}, "set OPSCORE_FILES to a folder"),
        ("write_file", {}, "set OPSCORE_FILES to a folder"),
        ("list_files", {}, "set OPSCORE_FILES to a folder"),
    ],
)
def test_what_an_agent_cannot_have_is_told_when_a_worker_starts(
    tool: str, values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_means([agent(tool, **values)], Means())
    assert str(refused.value).count("LLMAgent('a') has ") == 1
    assert fault in str(refused.value)


def test_a_tool_that_may_take_longer_than_a_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"the tool http_get, which may take 30 s"):
        agent("http_get", limits=Limits(call_seconds=20))


def test_an_agent_has_no_built_in_tool_that_it_does_not_name(tmp_path: Path) -> None:
    one = LLMAgent(agent_id="a", model="scripted:built-in")
    assert "built-in" in SCRIPTS
    (refused,) = results(one, Means(files=tmp_path), ("list_files", {}))
    assert refused.content == "There is no tool 'list_files'; there are: none."
