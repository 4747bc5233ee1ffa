"""Images in an object store: `s3://bucket/prefix`, listed as it comes in the order of the keys'
bytes, or one object.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from imagemill.errors import SourceError
from imagemill.pipeline.sources.base import Skipped, chooser
from imagemill.records import BadImage, Entry, Filters, Status
from imagemill.system import storage
from imagemill.system.retry import RetryPolicy

_REMEDIES = {
    errno.ENOENT: "Check the names of bucket and key.",
    errno.EINVAL: "Rename the object, or copy it to another key.",
    errno.EACCES: "Give credentials that may list and read it.",
}
_REMEDY = "Check the network, AWS_ENDPOINT_URL and AWS_REGION, and repeat the command."


class ObjectSource:
    """An object that is an image, or the images below a prefix. `url` ends without a slash."""

    def __init__(self, position: int, url: str) -> None:
        self.name = url
        self._url = url
        self._position = position

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the images. A source that is itself an object is planned whatever its suffix."""
        try:
            size = _look(self._url, None)
            if size is not None:
                yield Entry(self._position, b"", size)
            else:
                yield from self._below(filters, skipped)
        except OSError as error:
            raise cannot_read(self._url, error) from error

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the path says it
        """Return the bytes of one object."""
        return fetch(f"{self._url}/{os.fsdecode(path)}" if path else self._url, max_bytes)

    def _below(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        chosen = chooser(filters, skipped)
        top, group = b"", -1
        for key, size in storage.open_bucket(self._url).list():
            path = key.encode()
            if chosen(path):
                folder = path.partition(b"/")[0] if b"/" in path else top
                group, top = group + (folder != top), folder
                yield Entry(self._position, path, size, max(group, 0))


def fetch(url: str, max_bytes: int) -> bytes:
    """Read one object, by one request. Raises: BadImage; what an outage leaves is a
    `read_error`.
    """
    bucket, key = storage.split(url)
    if not storage.is_place(bucket):
        raise BadImage(Status.READ_ERROR, f"cannot be read: {storage.NO_PLACE}")
    try:
        return storage.open_bucket(bucket).read(key, max_bytes)
    except FileNotFoundError as error:
        raise BadImage(Status.MISSING, f"the object is not there: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            size = str(error.strerror).partition(",")[0]
            raise BadImage(
                Status.TOO_LARGE, f"{size}, more than --max-bytes {max_bytes}"
            ) from error
        raise BadImage(Status.READ_ERROR, f"cannot be read: {error.strerror}") from error


def look(url: str) -> None:
    """Raise SourceError if there is no object at a URL, and none below it."""
    try:
        _look(url, storage.PROBING)
    except OSError as error:
        raise cannot_read(url, error) from error


def cannot_read(url: str, error: OSError) -> SourceError:
    """Return the error for a source that cannot be read."""
    return SourceError(
        f"source {url} cannot be read: {error.strerror}. {_REMEDIES.get(error.errno or 0, _REMEDY)}"
    )


def _look(url: str, policy: RetryPolicy | None) -> int | None:
    """Bytes of an object, or None: other objects are below it. Raises: SourceError, OSError."""
    size = None
    bucket, key = storage.split(url)
    if key:
        try:
            size = storage.open_bucket(bucket, policy).open(key).size
        except (FileNotFoundError, PermissionError):
            size = None  # credentials may allow to list but not to read
    if not size and next(storage.open_bucket(url, policy).list(), None) is not None:
        return None
    if size is None:
        raise SourceError(
            f"source {url} cannot be read: there is no such object, and none below it."
            f" {_REMEDIES[errno.ENOENT]}"
        )
    return size
