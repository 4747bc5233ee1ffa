"""Read images from the web: one GET request each, repeated if the error may be temporary."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

from imagemill.errors import SourceError
from imagemill.pipeline.sources.base import Skipped, too_large
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system.http import (
    CHUNK_BYTES,
    Answer,
    Client,
    CutError,
    HttpError,
    StatusError,
    announced_bytes,
)
from imagemill.system.messages import one_line
from imagemill.system.retry import Attempts, RetryPolicy

_MISSING = (404, 410)

READING = RetryPolicy(seconds=35.0)
"""Ends before the 60 s of --max-seconds do, so that an outage is a row and not a dead worker."""
PROBING = RetryPolicy(attempts=3, seconds=8.0, connect_s=3.0, silence_s=5.0)
"""To find out whether a source exists, before anything starts."""

_LOCK = threading.Lock()
_client = functools.cache(Client)


def client() -> Client:
    """Return the HTTP client of this process, the same one each time."""
    with _LOCK:
        return _client()


class HttpSource:
    """One image at a URL."""

    def __init__(self, position: int, url: str, user_agent: str | None = None) -> None:
        self.name = url
        self._url = url
        self._user_agent = user_agent
        self._position = position

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:  # noqa: ARG002 - what is named is wanted
        """Yield the one image, whatever its suffix."""
        yield Entry(self._position, b"", -1)

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - it is one image
        """Return the bytes of the image."""
        return fetch(self._url, max_bytes, user_agent=self._user_agent)


def look(url: str, user_agent: str | None) -> None:
    """Raise SourceError if no server returns what is at a URL."""
    try:
        fetch(url, None, PROBING, user_agent)
    except BadImage as bad:
        raise SourceError(
            f"source {url} cannot be read: {bad.error.removeprefix('cannot be read: ')}. Check"
            " the address."
        ) from bad


def fetch(
    url: str,
    max_bytes: int | None,
    policy: RetryPolicy | None = None,
    user_agent: str | None = None,
) -> bytes:
    """Return what is at a URL. A request is repeated until it succeeds or the policy gives up.

    Args:
        url: http or https.
        max_bytes: more than this is `too_large`; no more is read. None: read only the headers.
        policy: when to give up; None: `READING`.
        user_agent: value of that header; None: imagemill and its version.

    Raises:
        BadImage: `missing` (404, 410), `too_large`, `truncated` if every attempt ended early, or
            `read_error`.
    """
    policy = policy or READING
    headers = {"Accept": "image/*,*/*;q=0.8"}
    if user_agent:
        headers["User-Agent"] = user_agent
    attempts = Attempts(policy)
    while True:
        try:
            with client().get(url, policy, headers) as answer:
                return b"" if max_bytes is None else _body(answer, max_bytes)
        except HttpError as error:
            if not error.is_temporary or not attempts.pause(error.wait_s):
                raise _bad_image(error, attempts.failures) from error


def _bad_image(error: HttpError, failures: int) -> BadImage:
    status = Status.READ_ERROR
    if isinstance(error, CutError):
        status = Status.TRUNCATED
    elif isinstance(error, StatusError) and error.code in _MISSING:
        status = Status.MISSING
    count = f", after {failures} {'tries' if failures > 1 else 'try'}" if error.is_temporary else ""
    return BadImage(status, f"cannot be read: {error}{count}")


def _body(answer: Answer, max_bytes: int) -> bytes:
    if (size := announced_bytes(answer)) is not None and size > max_bytes:
        raise too_large(size, max_bytes)
    pieces, size = [], 0
    try:
        while piece := answer.read(CHUNK_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise BadImage(Status.TOO_LARGE, f"has more bytes than --max-bytes {max_bytes}")
    except ValueError as error:  # such as a chunk of -5 bytes
        raise HttpError(one_line(error)) from error
    return b"".join(pieces)
