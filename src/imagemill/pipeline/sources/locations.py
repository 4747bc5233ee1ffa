"""Fetch what a line of a list or a cell of a table names: a path, a URL or an object."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from imagemill.errors import SourceError
from imagemill.pipeline.sources import kinds
from imagemill.pipeline.sources.base import shown
from imagemill.pipeline.sources.files import read_file
from imagemill.records import AS_GIVEN, Access, BadImage, Status
from imagemill.system import storage

_LONGEST_LIST = 256 * 2**20


def fetch_beside(file: bytes, path: bytes, max_bytes: int, access: Access) -> bytes:
    """Read the image that a path or URL in a file means. Raises: BadImage."""
    try:
        location = storage.beside(file, path)
    except ValueError as error:
        raise BadImage(Status.READ_ERROR, f"cannot be read: {error}") from error
    return fetch(location, max_bytes, access)


def fetch(location: bytes, max_bytes: int, access: Access = AS_GIVEN) -> bytes:
    """Read an image's encoded bytes, called from many threads at once.

    Args:
        location: an absolute path, or a URL: `http`, `https` or of an object store.
        `storage.beside` makes it of a relative one.
        max_bytes: a longer one is `too_large`; no more than this is read.
        access: where it is now, and how it is asked for.

    Raises:
        BadImage.
    """
    location = access.at(location)
    if b"\0" in location:
        raise BadImage(Status.MISSING, "its name has a NUL byte, so it cannot exist")
    if not storage.is_url(location):
        return read_file(location, max_bytes)
    if storage.names_password(location):
        raise BadImage(Status.READ_ERROR, f"cannot be read: {storage.NO_PASSWORDS}")
    url = location.decode("utf-8", "surrogateescape")
    scheme = url.partition("://")[0]
    if scheme.lower() in ("http", "https"):
        from imagemill.pipeline.sources import http

        return http.fetch(url, max_bytes, user_agent=access.user_agent)
    if storage.is_object(url):
        from imagemill.pipeline.sources import objects

        return objects.fetch(url, max_bytes)
    raise BadImage(
        Status.READ_ERROR,
        f"cannot be read: {scheme} is none of http, https, {', '.join(storage.SCHEMES)}",
    )


def open_text(name: str, location: bytes, access: Access, newline: str) -> TextIO:
    """Open a list for reading it line by line, wherever it lies. Bytes that are not UTF-8 come as
    surrogate escapes.

    Args:
        name: of the source, for errors.
        location: path or URL.
        access: where it is now, and how it is asked for.
        newline: what ends a line, see `io.TextIOWrapper`.

    Raises:
        OSError: it cannot be read. UsageError: it is not text.
    """
    raw = open_bytes(access.at(location), access.user_agent)
    try:
        head = raw.peek(kinds.HEAD_BYTES)[: kinds.HEAD_BYTES]
        kinds.refuse_list(name, head)
        encoding = kinds.encoding_of(head)
        return io.TextIOWrapper(
            raw,
            encoding,
            "surrogateescape" if encoding.startswith("utf-8") else "strict",
            newline=newline,
        )
    except BaseException:
        raw.close()
        raise


@contextmanager
def listing(
    name: str, location: bytes, access: Access, newline: str, remedy: str
) -> Iterator[TextIO]:
    """Open a list as `open_text` does, for a source. Raises: SourceError, UsageError."""
    try:
        with open_text(name, location, access, newline) as lines:
            yield lines
    except UnicodeError as error:
        raise SourceError(f"source {name} cannot be read: {error}. Save it as UTF-8.") from error
    except OSError as error:
        why = error.strerror or error
        raise SourceError(f"source {name} cannot be read: {why}. {remedy}") from error


def check(file: bytes, path: bytes, where: str) -> None:
    """Raise SourceError if what a file lists cannot be an image's path or URL. `where` names the
    line.
    """
    if storage.names_password(path):
        raise SourceError(f"{where}: {storage.NO_PASSWORDS}")
    try:
        storage.beside(file, path)
    except ValueError as error:
        raise SourceError(f"{where}: {shown(path)} cannot be read: {error}.") from error


def open_bytes(location: bytes, user_agent: str | None) -> io.BufferedReader:
    """Open a file at a path or URL. Raises: OSError."""
    if storage.is_object(location):
        return io.BufferedReader(storage.BlobFile(storage.open_blob(location)), 2**20)
    if not storage.is_url(location):
        return open(location, "rb")  # noqa: PTH123 - the caller closes it
    try:
        return io.BufferedReader(
            io.BytesIO(fetch(location, _LONGEST_LIST, Access(user_agent=user_agent)))
        )
    except BadImage as bad:
        raise OSError(errno.EIO, bad.error) from bad
