"""Bytes at rest, wherever they lie: files opened for reading at any place, by many threads at once.

`open_blob` takes a local path or an object's URL; archives and tables are read through what it returns, so that a zip on a disk and a zip
in an object store are read by the same lines.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from typing import Protocol


class Blob(Protocol):
    """A file or object opened for random access. Safe to read from many threads."""

    size: int
    """Bytes."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer only where the blob ends. Raises: OSError, FileNotFoundError where it is gone."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LocalBlob:
    """A regular file of a file system."""

    def __init__(self, path: bytes) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._handle)
            raise OSError(0, "is not a regular file")
        self.size = found.st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Blob.read_at`."""
        pieces = []
        while length > 0 and (piece := os.pread(self._handle, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """See `Blob.close`."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()


class Store(Protocol):
    """A place in an object store below which objects have keys, `/` between their parts. Safe to use from many threads."""

    url: str
    """`s3://bucket/prefix`, without a slash at its end."""

    def list(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Keys (relative to `url`) that begin with `below`, in the order of their bytes, and their sizes. Raises: OSError."""
        ...

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """One whole object, or its first `max_bytes`, by one request. Raises: FileNotFoundError, PermissionError, OSError."""
        ...

    def open(self, key: str) -> Blob:
        """An object for random access. Raises: FileNotFoundError, PermissionError, OSError."""
        ...

    def put(self, key: str, data: bytes | memoryview, *, create: bool = False) -> None:
        """Write one object; others see all of it or nothing. With `create` only where none is there.

        Raises: FileExistsError: `create`, and it is there. OSError: it could not be written, after some tries.
        """
        ...

    def remove(self, key: str) -> None:
        """Remove one object, if it is there. Raises: OSError."""
        ...


def is_url(location: str | bytes) -> bool:
    """Whether a location is a URL and not a path."""
    return b"://" in location if isinstance(location, bytes) else "://" in location


def open_blob(location: bytes) -> Blob:
    """Open a local path, or a URL. Raises: OSError."""
    return LocalBlob(location)


class BlobFile(io.RawIOBase):
    """A blob as a file object, for libraries that want one; wrap it in `io.BufferedReader`. One thread at a time."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob = blob
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """See `io.RawIOBase.readinto`."""
        data = self._blob.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
