"""Getting pages for LLM agents, over the same checked line as agents behind HTTP are called.

Every address is checked before it is connected to, those of redirects as well; no proxy is used, no
cookie kept, and nothing of ours is sent along.
"""

import socket
import ssl
from collections.abc import Callable
from functools import cache
from time import monotonic
from urllib.parse import urljoin

import httpcore2
import httpx2

from opscore.agentkit.builtin import Page
from opscore.agentkit.context import storable_text
from opscore.agentkit.tools import ToolFault
from opscore.remote import UrlPolicy
from opscore.remote_call import InvalidAnswer, Line, Refused, Resolve

MAX_REDIRECTS = 5
MAX_URL_BYTES = 4096
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": "opscore",
}


def fetch(
    policy: UrlPolicy,
    url: str,
    allows_host: Callable[[str], bool],
    *,
    seconds: float,
    max_bytes: int,
    resolve: Resolve = socket.getaddrinfo,
) -> Page:
    """Return what a URL leads to; of its body so many bytes.

    Raises:
        ToolFault: it may not be asked for, or nothing came in time.
    """
    until = monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        _check(policy, url, allows_host)
        line = Line(policy, resolve, max(until - monotonic(), 0.001))
        try:
            page, location = _get(url, line, max_bytes)
        except (Refused, InvalidAnswer) as error:
            raise ToolFault(str(error)) from None
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise _fault(url, error, is_late=monotonic() >= line.deadline) from None
        finally:
            line.close()
        if page.status not in _REDIRECTS or not location:
            return page
        url = urljoin(url, location)
    raise ToolFault(f"The URL is redirected more than {MAX_REDIRECTS} times.")


def _check(policy: UrlPolicy, url: str, allows_host: Callable[[str], bool]) -> None:
    if len(url) > MAX_URL_BYTES:
        raise ToolFault(f"A URL has at most {MAX_URL_BYTES} characters.")
    if faults := policy.faults(url):
        raise ToolFault(" ".join(faults))
    host = httpx2.URL(url).raw_host.decode().removesuffix(".")
    if not allows_host(host):
        raise ToolFault(f"The host {host} is not among those you may ask (permissions.hosts).")


def _get(url: str, line: Line, max_bytes: int) -> tuple[Page, str]:
    """Return the page, and where it points to if it does."""
    parts = httpx2.URL(url)
    target = httpcore2.URL(
        scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path
    )
    headers = [("Host", parts.netloc.decode()), *_HEADERS.items()]
    connection = httpcore2.HTTPConnection(
        target.origin, ssl_context=_tls(target.scheme), network_backend=line
    )
    with connection.stream("GET", target, headers=headers) as response:
        told = {name.lower().decode(): value.decode("latin-1") for name, value in response.headers}
        encoding = told.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise InvalidAnswer(f"The page is encoded ({encoding[:64]}); ask for another.")
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > max_bytes:
                break
    kind = storable_text(told.get("content-type", ""), 200)
    page = Page(url, response.status, kind, bytes(body[:max_bytes]), len(body) > max_bytes)
    return page, told.get("location", "")


@cache
def _context() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()


def _tls(scheme: bytes) -> ssl.SSLContext | None:
    return _context() if scheme == b"https" else None


def _fault(url: str, error: Exception, *, is_late: bool) -> ToolFault:
    if is_late:
        return ToolFault(f"{url} did not answer in time.")
    reason = storable_text(getattr(error, "strerror", None) or error, 300)
    return ToolFault(f"{url} could not be had: {reason or type(error).__name__}")
