"""Download one file over HTTP(S): resumable, checked, and whole or not at all.

While it is under way the bytes are in `NAME.partial`, and `NAME.partial.json` says what they are a
part of, so that a later call goes on where this one was cut. The final name appears by a rename
after size and hash are right. Proxies are taken from the environment (`HTTPS_PROXY`, `NO_PROXY`,
…); certificates are always verified.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from imagemill.errors import DownloadError, UsageError
from imagemill.version import __version__

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and in all (None where unknown)."""

MIRROR_VARIABLE: Final = "IMAGEMILL_MIRROR"
CONNECT_S: Final = 3.0
"""Time for resolving a host's name, connecting and the TLS handshake: offline, a command then fails
within 5 s, its start included.
"""
_CHUNK: Final = 2**18
_RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Patience:
    """When to give up."""

    timeout_s: float = 30.0
    """Without a byte for so long, the connection counts as stalled."""
    attempts: int = 6
    """In a row without progress; 1 MiB of it starts the count again. A server that cannot be
    reached at first gets a single one.
    """
    backoff_s: float = 1.0
    """Wait before the second attempt; doubles with each."""
    longest_wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Part:
    """What a `.partial` file is a part of."""

    url: str
    validator: str | None
    """ETag or Last-Modified."""
    total: int | None


class _Again(Exception):  # noqa: N818 - not an error yet
    """This attempt failed in a way that another may not."""

    def __init__(self, reason: str, wait_s: float = 0.0, *, reached: bool = True) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.reached = reached
        """Whether there was a connection."""


class _UnreachableError(OSError):
    """No connection to a server or proxy could be made."""


class _Http(http.client.HTTPConnection):
    """A connection that is made within `CONNECT_S`."""

    def connect(self) -> None:
        _connect(self, super().connect)


class _Https(http.client.HTTPSConnection):
    """The same with TLS."""

    def connect(self) -> None:
        _connect(self, super().connect)


def _connect(connection: http.client.HTTPConnection, connect: Callable[[], None]) -> None:
    """Call `connect` in a daemon thread: name resolution has no timeout, and each of a host's
    addresses gets a whole one.
    """
    done: Future[None] = Future()

    def call() -> None:
        try:
            connect()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, name="connect", daemon=True).start()
    try:
        done.result(CONNECT_S)
    except ssl.SSLCertVerificationError:
        raise
    except TimeoutError as error:
        raise _UnreachableError(
            f"{connection.host} cannot be reached: no connection within {CONNECT_S:g} s"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _UnreachableError(f"{connection.host} cannot be reached: {reason}") from error


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, req, context=ssl.create_default_context())


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it redirects from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def mirrored(url: str) -> str:
    """Return where to fetch `url` from: `$IMAGEMILL_MIRROR/HOST/PATH`, the layout of `wget -x`, or
    `url` itself where it is not set.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return url
    parts = urllib.parse.urlsplit(url)
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}"


def fetch(
    url: str,
    target: Path,
    *,
    sha256_prefix: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    patience: Patience = Patience(),
    max_bytes: int = 16 * 2**30,
) -> str:
    """Download `url` to `target`; return its sha256.

    Args:
        url: http or https.
        target: appears whole, or not at all.
        sha256_prefix: hexadecimal start of the sum it must have; None: any.
        size: bytes it must have; None: as many as the server announces.
        progress: called after every chunk.
        patience: timeouts, attempts and waits.
        max_bytes: more than this is refused.

    Raises:
        UsageError: the URL is not http or https.
        DownloadError: it cannot be reached, is not there, or is not what was expected; says what to
        do.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(
            f"{url!r} cannot be downloaded: give a URL that begins with http:// or https://."
        )
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for fresh in (False, True):
            resumed = _complete(url, partial, size, progress, patience, max_bytes)
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            if sha256_prefix is None or found.startswith(sha256_prefix.lower()):
                partial.replace(target)
                _note(partial).unlink(missing_ok=True)
                return found
            _discard(partial)
            if (
                fresh or not resumed
            ):  # a file glued from two versions gets one more chance, from its first byte
                break
    except OSError as error:
        raise DownloadError(
            f"{target} cannot be written: {error.strerror or error}. Make room or rights there, or"
            " choose another folder with --models-dir."
        ) from error
    raise DownloadError(
        f"{url} sent the wrong file: its sha256 is {found}, it should begin with {sha256_prefix}."
        f" The file was removed. {_remedy(url)}"
    )


def _remedy(url: str) -> str:
    return (
        f"Fetch {url} some other way and give the file with `imagemill get-model NAME --from FILE`,"
        f" name another place with --url URL there, or set {MIRROR_VARIABLE} to a mirror (laid out"
        " as HOST/PATH)."
    )


def _note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)


def _complete(
    url: str,
    partial: Path,
    size: int | None,
    progress: Progress | None,
    patience: Patience,
    max_bytes: int,
) -> bool:
    """Attempt until the partial file is complete; return whether it was glued from more than one
    answer.

    A server that cannot be reached at the first attempt is not tried again: the machine is offline,
    or the address is wrong.
    """
    failures, resumed, reached = 0, False, False
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return _attempt(url, partial, size, progress, patience, max_bytes) or resumed
        except _Again as problem:
            reached = reached or problem.reached
            now = partial.stat().st_size if partial.exists() else 0
            failures = 1 if now >= before + 2**20 else failures + 1
            resumed = resumed or now > 0
            if failures >= patience.attempts or not reached:
                kept = f" {now} bytes are kept; the same command continues there." if now else ""
                count = f" ({failures} attempts)" if failures > 1 else ""
                raise DownloadError(
                    f"{url} cannot be downloaded: {problem}{count}.{kept} {_remedy(url)}"
                ) from problem
            time.sleep(
                min(
                    patience.longest_wait_s,
                    max(problem.wait_s, patience.backoff_s * 2 ** (failures - 1)),
                )
            )


def _attempt(
    url: str,
    partial: Path,
    size: int | None,
    progress: Progress | None,
    patience: Patience,
    max_bytes: int,
) -> bool:
    """Ask once for what is missing, and append it. Returns whether it continued an older part."""
    have, part = _resumable(url, partial)
    headers = {"User-Agent": f"imagemill/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - `fetch` has checked the scheme
        with _opener().open(request, timeout=patience.timeout_s) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0
            elif not have or not _continues(answer.headers.get("Content-Range"), have, part):
                _discard(partial)
                raise _Again("the file at its home has changed meanwhile")
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length is not None and length.isdigit() else None
            _expect(url, partial, total, size, max_bytes)
            _note(partial).write_text(
                json.dumps(asdict(_Part(url, _validator(answer.headers), total)))
            )
            with partial.open("ab" if have else "wb") as file:
                got = _copy(answer, file, have, total, progress, max_bytes)
    except urllib.error.HTTPError as error:
        with error:
            _answer_to(error, url, partial)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
    ) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{url} cannot be trusted: {reason.verify_message}. {_remedy(url)}"
            ) from error
        if isinstance(reason, _UnreachableError):
            raise _Again(str(reason), reached=False) from error
        if isinstance(reason, TimeoutError):
            raise _Again(f"no answer within {patience.timeout_s:g} s") from error
        raise _Again(f"the connection failed ({reason or type(error).__name__})") from error
    else:
        if total is not None and got < total:
            raise _Again(f"the connection was cut after {got} of {total} bytes")
        if got > max_bytes or (size is not None and got != size):
            _discard(partial)
            raise DownloadError(
                f"{url} sent {got} bytes instead of {size or f'at most {max_bytes}'}. The file was"
                f" removed. {_remedy(url)}"
            )
    return have > 0


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https only: urllib's usual one would follow a redirect to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _HttpHandler(),
        _HttpsHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _NoDowngrade(),
    ):
        opener.add_handler(handler)
    return opener


def _resumable(url: str, partial: Path) -> tuple[int, _Part]:
    """Return how many bytes can be kept, and what they belong to."""
    nothing = _Part(url, None, None)
    try:
        part = _Part(**json.loads(_note(partial).read_text()))
        have = partial.stat().st_size
    except (OSError, ValueError, TypeError):
        return 0, nothing
    if part.url != url or (part.total is not None and have >= part.total):
        return 0, nothing
    return have, part


def _continues(content_range: str | None, have: int, part: _Part) -> bool:
    """Check `bytes 100-999/1000` against what is there."""
    unit, _, rest = (content_range or "").partition(" ")
    span, _, total = rest.partition("/")
    same_total = part.total is None or not total.isdigit() or int(total) == part.total
    return unit == "bytes" and span.split("-")[0] == str(have) and same_total


def _validator(headers: http.client.HTTPMessage) -> str | None:
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _expect(url: str, partial: Path, total: int | None, size: int | None, max_bytes: int) -> None:
    if total is None:
        return
    if total > max_bytes or (size is not None and total != size):
        _discard(partial)
        raise DownloadError(
            f"{url} announces {total} bytes instead of {size or f'at most {max_bytes}'}. Nothing"
            f" was kept. {_remedy(url)}"
        )


def _copy(
    answer: Any,
    file: IO[bytes],
    have: int,
    total: int | None,
    progress: Progress | None,
    max_bytes: int,
) -> int:
    while True:
        try:
            chunk = answer.read1(_CHUNK)
        except TimeoutError:
            raise
        except OSError as error:  # told apart from a disk that is full
            raise ConnectionError(error.strerror or str(error)) from error
        if not chunk:
            return have
        file.write(chunk)
        have += len(chunk)
        if progress is not None:
            progress(have, total)
        if have > max_bytes:
            return have


def _answer_to(error: urllib.error.HTTPError, url: str, partial: Path) -> None:
    """Turn an HTTP status into another attempt or into the end."""
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        _discard(partial)
        raise _Again("the file at its home has changed meanwhile") from error
    if error.code in _RETRIED:
        wait = error.headers.get("Retry-After") or ""
        raise _Again(
            f"the server answers {error.code} {error.reason}",
            float(wait) if wait.isdigit() else 0.0,
        ) from error
    raise DownloadError(
        f"{url} cannot be downloaded: the server answers {error.code} {error.reason}."
        f" {_remedy(url)}"
    ) from error
