"""Tools that are built in: an agent has those it names, as far as its permissions go.

Files: each run has a folder, flat on one disk with those of other runs. A path is walked a name at
a time, following no symbolic link, so that none leads out of the folder, also while others change
it. Hard links and mounts that somebody else puts there are not looked for. Limits hold for writers
one after the other; writers at the same moment may pass them by a file each. Nothing deletes the
folders.
"""

import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from opscore.agentkit.context import Context
from opscore.agentkit.memory import Memory, recall_tool, remember_tool
from opscore.agentkit.tools import TOOL_SECONDS, Tool, ToolFault

if TYPE_CHECKING:
    from opscore.agentkit.llm import LLMAgent
    from opscore.agentkit.running import Means

MAX_PAGE_BYTES = 64 * 1024
"""Of what `http_get` and `read_file` tell a model."""
HTTP_SECONDS = 30.0
MAX_FILE_BYTES = 256 * 1024
MAX_FILES = 64
"""In the folder of a run."""
MAX_NAMES = 8
"""In a path."""
MAX_NAME_BYTES = 100
_TEMPORARY = ".writing-"
"""How names begin of files that are being written."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a URL led to."""

    url: str
    """Behind all redirects."""
    status: int
    content_type: str
    body: bytes
    is_cut: bool = False


class Fetch(Protocol):
    """Gets what a URL leads to; only over hosts that are allowed, and that are no inner ones."""

    def __call__(
        self, url: str, allows_host: Callable[[str], bool], *, seconds: float, max_bytes: int
    ) -> Page:
        """Return the page.

        Raises:
            ToolFault: there is none, and why.
        """


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A built-in tool, which is made for each attempt."""

    make: "Callable[[LLMAgent, Context, Means], Tool]"
    fault: "Callable[[LLMAgent, Means], str | None]"
    """Says, when a worker starts, why an agent cannot have it."""
    seconds: float
    """What a call may take."""


# --- Pages ---------------------------------------------------------------------------------------


def _http_get(agent: "LLMAgent", _context: Context, means: "Means") -> Tool:
    fetch = means.fetch
    assert fetch is not None

    def http_get(url: str) -> str:
        """Get the page, file or API answer at an http or https URL, as text."""
        return _told(
            fetch(
                url,
                agent.permissions.allows_host,
                seconds=HTTP_SECONDS - 2,  # the tool's own end is blunter
                max_bytes=MAX_PAGE_BYTES,
            )
        )

    return _tool(http_get, HTTP_SECONDS)


def _told(page: Page) -> str:
    kind, _, rest = page.content_type.partition(";")
    head = f"{page.url}\nstatus {page.status}, {page.content_type or 'no content type'}"
    is_text = kind.startswith("text/") or any(
        word in kind for word in ("json", "xml", "javascript", "yaml", "urlencoded")
    )
    if page.body and not is_text:
        more = "more than " if page.is_cut else ""
        return f"{head}\n\n[{more}{len(page.body):,} bytes, no text]"
    charset = rest.partition("charset=")[2].partition(";")[0].strip(" \"'") or "utf-8"
    try:
        text = page.body.decode(charset, errors="replace")
    except (LookupError, ValueError):
        text = page.body.decode(errors="replace")
    cut = "\n[cut: there is more]" if page.is_cut else ""
    return f"{head}\n\n{text}{cut}"


def _http_fault(agent: "LLMAgent", means: "Means") -> str | None:
    if not agent.permissions.hosts:
        return "has http_get, and may get nothing: give permissions.hosts, such as *.example.com"
    return None if means.fetch is not None else "has http_get, which this process does not offer"


# --- Files ---------------------------------------------------------------------------------------


class Files:
    """The files of one run."""

    def __init__(self, root: "os.PathLike[str]", run_id: str) -> None:
        self._root, self._run_id = root, run_id

    def read(self, path: str, offset: int = 0) -> str:
        """Return a file's text from a character on.

        Raises:
            ToolFault
        """
        with self._folder(path, make=False) as (folder, name), _telling(path):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(name, flags, dir_fd=folder), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ToolFault(f"{path!r} is no file.")
                text = file.read(MAX_FILE_BYTES + 1).decode(errors="replace")
        return text[max(offset, 0) :]

    def write(self, path: str, text: str) -> str:
        """Write a file, all of it or nothing.

        Raises:
            ToolFault
        """
        data = text.encode(errors="replace")
        if len(data) > MAX_FILE_BYTES:
            raise ToolFault(f"A file has at most {MAX_FILE_BYTES:,} bytes, not {len(data):,}.")
        if path not in (files := self.list()) and len(files) >= MAX_FILES:
            raise ToolFault(f"A run has at most {MAX_FILES} files: write one that is there.")
        with self._folder(path, make=True) as (folder, name), _telling(path):
            new = f"{_TEMPORARY}{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                with open(os.open(new, flags, 0o600, dir_fd=folder), "wb") as file:
                    file.write(data)
                os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(new, dir_fd=folder)
                raise
        return f"Wrote {len(data):,} bytes."

    def list(self) -> dict[str, int]:
        """Return the size of each file, in bytes, by its path."""
        found: dict[str, int] = {}
        folder = os.path.join(self._root, self._run_id)
        with suppress(FileNotFoundError):  # nothing was written yet
            for place, _, names, at in os.fwalk(folder, follow_symlinks=False):
                for name in names:
                    if (size := _size(name, at)) is not None:
                        found[os.path.relpath(os.path.join(place, name), folder)] = size
        return dict(sorted(found.items()))

    @contextmanager
    def _folder(self, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """Open the folder of a path, and yield it with the name of the file in it."""
        *above, name = _names(path)
        with _telling(path):
            if make:
                os.makedirs(self._root, exist_ok=True)
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with _telling(path):
                for one in (self._run_id, *above):
                    folder = _enter(folder, one, make=make)
            yield folder, name
        finally:
            os.close(folder)


def _size(name: str, folder: int) -> int | None:
    """Return a file's size, if it is one, and whole."""
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:  # it went meanwhile
        return None
    is_file = stat.S_ISREG(about.st_mode) and not name.startswith(_TEMPORARY)
    return about.st_size if is_file else None


def _enter(folder: int, name: str, *, make: bool) -> int:
    """Open a folder in a folder, and close that one if all goes well."""
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=folder)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    os.close(folder)
    return inner


def _names(path: str) -> list[str]:
    names = path.split("/")
    for name in names:
        if name in ("", ".", "..") or not name.isprintable() or name.startswith(_TEMPORARY):
            raise ToolFault(f"{path[:200]!r} is no path here: give one such as notes/plan.md.")
        if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ToolFault(f"A name in a path has at most {MAX_NAME_BYTES} bytes.")
    if len(names) > MAX_NAMES:
        raise ToolFault(f"A path has at most {MAX_NAMES} names.")
    return names


@contextmanager
def _telling(path: str) -> Iterator[None]:
    """Tell what the system says, without the place where the folder lies."""
    try:
        yield
    except OSError as error:
        raise ToolFault(f"{path!r}: {error.strerror}.") from None


def _files(context: Context, means: "Means") -> Files:
    assert means.files is not None
    return Files(means.files, context.run_id)


def _read_file(_agent: "LLMAgent", context: Context, means: "Means") -> Tool:
    def read_file(path: str, offset: int = 0) -> str:
        """Read a text file of this run, from a character on."""
        return _files(context, means).read(path, offset)

    return _tool(read_file)


def _write_file(_agent: "LLMAgent", context: Context, means: "Means") -> Tool:
    def write_file(path: str, text: str) -> str:
        """Write a text file of this run, anew; other tasks of the run can read it."""
        return _files(context, means).write(path, text)

    return _tool(write_file)


def _list_files(_agent: "LLMAgent", context: Context, means: "Means") -> Tool:
    def list_files() -> dict[str, int]:
        """List the files of this run, with their sizes in bytes."""
        return _files(context, means).list()

    return _tool(list_files)


def _files_fault(_agent: "LLMAgent", means: "Means") -> str | None:
    if means.files is not None:
        return None
    return "has tools for files, and there is no place for those: set OPSCORE_FILES to a folder"


FILE_SECONDS = 10.0


def _tool(function: Callable[..., Any], seconds: float = FILE_SECONDS) -> Tool:
    name, words = function.__name__, function.__doc__ or ""
    return Tool(name, words, function, seconds, max_bytes=MAX_PAGE_BYTES)


# --- Memory --------------------------------------------------------------------------------------


def _memory(agent: "LLMAgent", means: "Means") -> Memory:
    assert agent.memory is not None  # or its declaration was refused
    return means.memory(agent.agent_id, agent.memory)


def _remember(agent: "LLMAgent", _context: Context, means: "Means") -> Tool:
    return remember_tool(_memory(agent, means))


def _recall(agent: "LLMAgent", _context: Context, means: "Means") -> Tool:
    return recall_tool(_memory(agent, means))


def _no_fault(_agent: "LLMAgent", _means: "Means") -> None:
    """It needs nothing that a worker might not have."""


OF_MEMORY = ("remember", "recall")

BUILT_IN: Mapping[str, BuiltIn] = {
    "http_get": BuiltIn(_http_get, _http_fault, HTTP_SECONDS),
    "read_file": BuiltIn(_read_file, _files_fault, FILE_SECONDS),
    "write_file": BuiltIn(_write_file, _files_fault, FILE_SECONDS),
    "list_files": BuiltIn(_list_files, _files_fault, FILE_SECONDS),
    "remember": BuiltIn(_remember, _no_fault, TOOL_SECONDS),
    "recall": BuiltIn(_recall, _no_fault, TOOL_SECONDS),
}
