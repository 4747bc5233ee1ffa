"""One image from the web: a GET over a connection that is kept, tried again where the error may
pass.

Redirects are followed, a few, never from https to http. Proxies are taken from the environment
(`HTTPS_PROXY`, `NO_PROXY`, …), certificates are always verified. A user name and password come from
`~/.netrc` alone: in a URL they would be written into every row.
"""

from __future__ import annotations

import email.utils
import functools
import netrc
import os
import random
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    SSLError,
    TimeoutError,
)

from imagemill.errors import SourceError
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system import userdirs
from imagemill.version import __version__

CONNECTIONS_PER_HOST = 8
"""Of one process, that is: of one device. In all it has no more than it has decoding threads."""
_HOSTS = 64
"""Connections are kept to so many hosts."""
_REDIRECTS = 5
_CHUNK = 2**18
_GONE = frozenset({404, 410})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Patience:
    """When an image is given up: before the 60 s of --max-seconds are over, so that an outage is a
    row and not a dead worker.
    """

    tries: int = 6
    seconds: float = 35.0
    """After so long no further try is begun."""
    pause_s: float = 0.2
    """Before the second try; doubles with each."""
    longest_pause_s: float = 10.0
    """Also where the server asks for more by `Retry-After`."""
    connect_s: float = 5.0
    silence_s: float = 15.0
    """A connection without a byte for so long counts as dead."""


PATIENCE = Patience()
PROBING = Patience(tries=3, seconds=8.0, connect_s=3.0, silence_s=5.0)
"""For the question whether a source is there, asked before anything begins."""


class HttpSource:
    """One image at a URL."""

    ordered = False

    def __init__(self, position: int, url: str, user_agent: str | None = None) -> None:
        self.name = url
        self._url = url
        self._user_agent = user_agent
        self._position = position

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:  # noqa: ARG002 - what is named is wanted
        """See `Source.entries`. It is planned whatever its suffix."""
        yield Entry(self._position, b"", -1)

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - it is one image
        """See `Source.fetch`."""
        return fetch(self._url, max_bytes, user_agent=self._user_agent)


def look(url: str, user_agent: str | None) -> None:
    """See that a server answers to a URL. Raises: SourceError."""
    try:
        _patiently(url, None, PROBING, user_agent)
    except BadImage as bad:
        raise SourceError(
            f"source {url} cannot be read: {bad.error.removeprefix('cannot be read: ')}. Look at"
            " the address."
        ) from bad


def fetch(
    url: str, max_bytes: int, patience: Patience | None = None, user_agent: str | None = None
) -> bytes:
    """Read what is at a URL.

    Args:
        url: http or https.
        max_bytes: more than this is `too_large`; no more is read.
        patience: when to give up; None: as `PATIENCE` says.
        user_agent: what the requests call themselves; None: imagemill and its version.

    Raises:
        BadImage: `missing` (404, 410), `too_large`, `truncated` where each try ended early, or
        `read_error`.
    """
    return _patiently(url, max_bytes, patience or PATIENCE, user_agent)


class _Again(Exception):  # noqa: N818 - not an error yet
    """This try failed in a way that another may not."""

    def __init__(self, status: Status, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.wait_s = wait_s


def _patiently(
    url: str, max_bytes: int | None, patience: Patience, user_agent: str | None
) -> bytes:
    begun = time.monotonic()
    failures = 0
    while True:
        try:
            return _get(url, max_bytes, patience, user_agent)
        except _Again as problem:
            failures += 1
            pause_s = patience.pause_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - threads that failed together
            pause_s = min(max(pause_s, problem.wait_s), patience.longest_pause_s)
            if failures >= patience.tries or time.monotonic() + pause_s - begun > patience.seconds:
                text = (
                    f"cannot be read: {problem}, after {failures}"
                    f" {'tries' if failures > 1 else 'try'}"
                )
                raise BadImage(problem.status, text) from problem
            time.sleep(pause_s)


def _get(url: str, max_bytes: int | None, patience: Patience, user_agent: str | None) -> bytes:
    """One try, redirects followed. With no `max_bytes` nothing is read but the headers. Raises:
    BadImage, _Again.
    """
    for _ in range(_REDIRECTS + 1):
        with _answer(url, patience, user_agent) as answer:
            goal = answer.headers.get("Location")
            if goal is not None and answer.status in (301, 302, 303, 307, 308):
                url = _redirected(url, goal)
                announced = answer.headers.get("Content-Length") or ""
                if announced.isdigit() and int(announced) <= _CHUNK:
                    answer.drain_conn()  # keeps the connection for the next redirect
                continue
            _judge(answer)
            return b"" if max_bytes is None else _body(answer, max_bytes)
    raise BadImage(Status.READ_ERROR, f"cannot be read: more than {_REDIRECTS} redirects")


@contextmanager
def _answer(
    url: str, patience: Patience, user_agent: str | None
) -> Iterator[urllib3.BaseHTTPResponse]:
    """A server's answer, its body not yet read. Raises: BadImage, _Again."""
    headers = {
        "User-Agent": user_agent or f"imagemill/{__version__}",
        "Accept": "image/*,*/*;q=0.8",
        "Accept-Encoding": "identity",
    }
    answer = None
    try:
        parts = urlsplit(url)
        if (entry := _netrc_file().get(parts.hostname or "")) is not None:
            headers |= urllib3.make_headers(basic_auth=entry)
        answer = _pool(_proxy(parts.scheme, parts.hostname or "")).request(
            "GET",
            url,
            headers=headers,
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=patience.connect_s, read=patience.silence_s),
            pool_timeout=patience.seconds,
        )
        yield answer
    except ProtocolError as error:
        cut = next((inner for inner in error.args if isinstance(inner, IncompleteRead)), None)
        if cut is not None:
            text = (
                f"the connection was cut after {cut.partial} of {cut.partial + (cut.expected or 0)}"
                " bytes"
            )
            raise _Again(Status.TRUNCATED, text) from error
        raise _Again(Status.READ_ERROR, _reason(error)) from error
    except (SSLError, LocationParseError) as error:
        raise BadImage(Status.READ_ERROR, f"cannot be read: {_reason(error)}") from error
    except ValueError as error:
        raise BadImage(Status.READ_ERROR, f"cannot be read: {error}") from error
    except NewConnectionError as error:  # which counts as a timeout
        raise _Again(
            Status.READ_ERROR,
            f"no connection: {getattr(error.__cause__, 'strerror', None) or error}",
        ) from error
    except TimeoutError as error:
        raise _Again(Status.READ_ERROR, "no answer in time") from error
    except (HTTPError, OSError) as error:
        raise _Again(Status.READ_ERROR, _reason(error)) from error
    finally:
        if (
            answer is not None
        ):  # a connection whose body was read to its end has gone back by itself, and is kept
            answer.close()
            answer.release_conn()  # a closed one leaves its place to the next


def _redirected(url: str, goal: str) -> str:
    goal = urljoin(url, goal)
    scheme = urlsplit(goal).scheme
    if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
        raise BadImage(
            Status.READ_ERROR,
            f"cannot be read: redirected from {urlsplit(url).scheme} to {scheme}, which is not"
            " followed",
        )
    return goal


def _judge(answer: urllib3.BaseHTTPResponse) -> None:
    """Pass an answer that holds what was asked for. Raises: BadImage, _Again."""
    if 200 <= answer.status < 300:
        return
    name = next(
        (status.phrase for status in HTTPStatus if status == answer.status), answer.reason or ""
    )
    text = f"the server answers {answer.status} {name}".rstrip()
    if answer.status in _PASSING:
        raise _Again(Status.READ_ERROR, text, _retry_after(answer.headers.get("Retry-After")))
    raise BadImage(
        Status.MISSING if answer.status in _GONE else Status.READ_ERROR, f"cannot be read: {text}"
    )


def _body(answer: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    announced = answer.headers.get("Content-Length") or ""
    if announced.isdigit() and int(announced) > max_bytes:
        raise BadImage(
            Status.TOO_LARGE, f"has {announced} bytes, more than --max-bytes {max_bytes}"
        )
    pieces, got = [], 0
    while piece := answer.read(_CHUNK):
        pieces.append(piece)
        got += len(piece)
        if got > max_bytes:
            raise BadImage(Status.TOO_LARGE, f"has more bytes than --max-bytes {max_bytes}")
    return b"".join(pieces)


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks for, by a number or a date; 0 where it asks for none."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@functools.cache
def _pool(proxy: str | None) -> urllib3.PoolManager:
    """The connections of this process; threads wait where there are as many to one host as there
    may be.
    """
    trusted = ssl.create_default_context()
    if proxy is None:
        return urllib3.PoolManager(
            _HOSTS, maxsize=CONNECTIONS_PER_HOST, block=True, ssl_context=trusted
        )
    named = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    headers = urllib3.make_headers(proxy_basic_auth=named) if named else None
    return urllib3.ProxyManager(
        proxy,
        _HOSTS,
        proxy_headers=headers,
        maxsize=CONNECTIONS_PER_HOST,
        block=True,
        ssl_context=trusted,
    )


def _proxy(scheme: str, host: str) -> str | None:
    """The proxy that the environment names for a host."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


@functools.cache
def _netrc_file() -> dict[str, str]:
    """`user:password` by host, of `$NETRC`, else `~/.netrc`; not its default entry, which would
    tell a password to any server.
    """
    home = userdirs.home()
    file = os.environ.get("NETRC") or (home and home / ".netrc")
    if file is None:
        return {}
    try:
        hosts = netrc.netrc(os.fspath(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return {}
    return {
        host: f"{login}:{password}"
        for host, (login, _, password) in hosts.items()
        if host != "default"
    }


def _reason(error: BaseException) -> str:
    """One line of what urllib3 says."""
    if isinstance(error, SSLError):
        inner = error.args[0] if error.args else error
        return f"no secure connection: {getattr(inner, 'verify_message', None) or inner}"
    if isinstance(error, ProxyError):
        return f"the proxy cannot be reached: {error}"
    return " ".join(str(error).split())[:300] or type(error).__name__
