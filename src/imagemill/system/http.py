"""HTTP(S) requests: kept connections, proxies, TLS, redirects and passwords.

Proxies come from the environment (`HTTPS_PROXY`, `NO_PROXY`, …). Certificates are always verified.
User names and passwords come from `~/.netrc` only. Redirects never lead from https to http.
"""

from __future__ import annotations

import functools
import netrc
import os
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from http.client import responses
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    InvalidHeader,
    LocationParseError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    SSLError,
)
from urllib3.exceptions import TimeoutError as NoAnswerError

from imagemill.system import userdirs
from imagemill.system.interruptible import set_answer
from imagemill.system.messages import one_line
from imagemill.system.retry import RetryPolicy
from imagemill.version import __version__

Answer = urllib3.BaseHTTPResponse
_KEPT_CONNECTIONS = 1_024
"""Of one host: more than a process has decoding threads, each of which has one at a time."""
CHUNK_BYTES = 2**18
_MAX_HOSTS = 64
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpError(Exception):
    """A request that failed. The text is one line."""

    def __init__(self, reason: str, *, is_temporary: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.is_temporary = is_temporary
        """Whether another attempt may succeed."""
        self.wait_s = wait_s
        """Pause before the next attempt that the server asked for."""


class UnreachableError(HttpError):
    """No connection to a server or proxy could be made."""


class CutError(HttpError):
    """The connection ended before the body did."""


class StatusError(HttpError):
    """The server answered with a status that is not a success."""

    def __init__(self, code: int, reason: str, wait_s: float) -> None:
        super().__init__(reason, is_temporary=code in _TEMPORARY, wait_s=wait_s)
        self.code = code


class Client:
    """Connections that requests of many threads share.

    Args:
        connect_deadline: whether `RetryPolicy.connect_s` limits resolving the name, connecting to
            all of a host's addresses and the TLS handshake together. Else it limits each address.
    """

    def __init__(self, *, connect_deadline: bool = False) -> None:
        self._connect_deadline = connect_deadline
        self._trusted = ssl.create_default_context()
        self._pool = functools.cache(self._new_pool)
        self._lock = threading.Lock()

    @contextmanager
    def get(self, url: str, policy: RetryPolicy, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Yield the successful answer to a GET request, its body unread. Follow redirects.

        Raises:
            HttpError: also for errors while the caller reads the body.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            with self._answer(url, policy, headers) as answer:
                target = answer.headers.get("Location")
                if target is None or answer.status not in _REDIRECTS:
                    _check_status(answer)
                    yield answer
                    return
                url = _redirected(url, target)
                if (size := announced_bytes(answer)) is not None and size <= CHUNK_BYTES:
                    answer.drain_conn()  # keeps the connection for the next request
        raise HttpError(f"more than {_MAX_REDIRECTS} redirects", is_temporary=False)

    @contextmanager
    def _answer(
        self, url: str, policy: RetryPolicy, headers: Mapping[str, str]
    ) -> Iterator[Answer]:
        answer = None
        try:
            try:
                answer = self._send(url, policy, headers)
            except (OSError, ValueError) as error:
                if isinstance(error, HTTPError):
                    raise
                raise HttpError(one_line(error), is_temporary=isinstance(error, OSError)) from error
            yield answer
        except HTTPError as error:
            raise _translated(error, in_body=answer is not None) from error
        finally:
            if answer is not None:  # one read to its end has returned its connection already
                answer.close()
                answer.release_conn()

    def _send(self, url: str, policy: RetryPolicy, headers: Mapping[str, str]) -> Answer:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        if not host:
            raise HttpError("the URL names no host", is_temporary=False)
        fields = {"User-Agent": f"imagemill/{__version__}", "Accept-Encoding": "identity"}
        fields |= headers
        if (password := netrc_passwords().get(host)) is not None:
            fields |= urllib3.make_headers(basic_auth=password)
        with self._lock:
            pool = self._pool(_proxy(scheme, host))
        return pool.request(
            "GET",
            url,
            headers=fields,
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=policy.connect_s, read=policy.silence_s),
        )

    def _new_pool(self, proxy: str | None) -> urllib3.PoolManager:
        options: dict[str, Any] = {
            "maxsize": _KEPT_CONNECTIONS,
            "ssl_context": self._trusted,
        }
        if proxy is None:
            pool = urllib3.PoolManager(_MAX_HOSTS, **options)
        else:
            user = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
            fields = urllib3.make_headers(proxy_basic_auth=user) if user else None
            pool = urllib3.ProxyManager(proxy, _MAX_HOSTS, proxy_headers=fields, **options)
        if self._connect_deadline:
            pool.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return pool


class _DeadlineMixin(HTTPConnection):
    """Connects in a daemon thread: resolving has no timeout, and each address its own."""

    def connect(self) -> None:
        done: Future[None] = Future()
        call = (done, super().connect)
        threading.Thread(target=set_answer, args=call, name="connect", daemon=True).start()
        try:
            done.result(self.timeout)
        except (ssl.SSLCertVerificationError, NewConnectionError):
            raise
        except (TimeoutError, ConnectTimeoutError) as error:
            raise NewConnectionError(self, f"no connection within {self.timeout:g} s") from error
        except (OSError, HTTPError) as error:
            raise NewConnectionError(self, one_line(error)) from error


class _DeadlineHttp(_DeadlineMixin, HTTPConnection):
    pass


class _DeadlineHttps(_DeadlineMixin, HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _DeadlineHttp


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _DeadlineHttps


def announced_bytes(answer: Answer) -> int | None:
    """Return the length of a body that its header names, if any."""
    length = answer.headers.get("Content-Length") or ""
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None


def _redirected(url: str, target: str) -> str:
    try:
        target = urljoin(url, target)
    except ValueError as error:
        raise HttpError(str(error), is_temporary=False) from error
    old, new = urlsplit(url).scheme, urlsplit(target).scheme
    if new not in ("http", "https") or (old, new) == ("https", "http"):
        raise HttpError(
            f"redirected from {old} to {new}, which is not followed", is_temporary=False
        )
    return target


def _check_status(answer: Answer) -> None:
    if 200 <= answer.status < 300:
        return
    phrase = responses.get(answer.status, answer.reason or "")
    text = f"the server answers {answer.status} {phrase}"
    raise StatusError(answer.status, text.rstrip(), _retry_after(answer))


def _retry_after(answer: Answer) -> float:
    """Return the seconds in a `Retry-After` header, which holds a number or a date."""
    try:
        return urllib3.Retry().get_retry_after(answer) or 0.0
    except (InvalidHeader, ValueError, OverflowError):  # neither a number nor a date
        return 0.0


def _proxy(scheme: str, host: str) -> str | None:
    """Return the proxy that the environment names for a host."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


@functools.cache
def netrc_passwords() -> dict[str, str]:
    """Return `user:password` by host from `$NETRC` or `~/.netrc`.

    The default entry is left out, because it would tell a password to any server.
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


def _translated(error: HTTPError, in_body: bool) -> HttpError:
    """Return the error that callers see for one of urllib3's."""
    inner = error.original_error if isinstance(error, ProxyError) else error
    if isinstance(inner, NewConnectionError):  # which counts as a timeout
        cause = inner.__cause__
        text = getattr(cause, "strerror", None) or inner._message
        return UnreachableError(f"{inner.conn.host} cannot be reached: {text}")
    if isinstance(inner, SSLError):
        cause = inner.args[0] if inner.args else inner
        text = f"no secure connection: {getattr(cause, 'verify_message', None) or cause}"
        return HttpError(text, is_temporary=in_body)
    if isinstance(inner, LocationParseError):
        return HttpError(one_line(inner), is_temporary=False)
    if isinstance(inner, NoAnswerError):
        return HttpError("no answer in time")
    if isinstance(inner, ProtocolError):
        cut = next((each for each in inner.args if isinstance(each, IncompleteRead)), None)
        if cut is not None:
            total = cut.partial + (cut.expected or 0)
            return CutError(f"the connection was cut after {cut.partial} of {total} bytes")
    return HttpError(one_line(inner))
