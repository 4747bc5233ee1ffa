"""Read one file of a file system. Temporary errors are retried, others become a row."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from imagemill.pipeline.sources.base import too_large
from imagemill.records import BadImage, Status
from imagemill.system.retry import Attempts, RetryPolicy

_TEMPORARY_ERRORS = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY}
_TEMPORARY_ERRORS |= {errno.EINTR, errno.ENFILE, errno.EMFILE}
_PIECE = 2**20
_READING = RetryPolicy(attempts=5, seconds=5.0, pause_s=0.1)
"""About a second. An object store that fails has been tried for longer, and is not tried again."""


def read_file(path: bytes, max_bytes: int) -> bytes:
    """Return the bytes of an image's file. Temporary errors are retried for about a second.

    Raises:
        BadImage: `missing`, `too_large`, or `read_error`, which everything but a regular file is.
    """
    return retried(
        lambda: _read(path, max_bytes), "the file was listed but is gone, or its link leads nowhere"
    )


def retried(read: Callable[[], bytes], gone: str) -> bytes:
    """Call `read` until it succeeds, for about a second while its errors are temporary.

    `gone` is the error of a `missing` row.

    Raises:
        BadImage: `missing`, or `read_error`.
    """
    attempts = Attempts(_READING)
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno in _TEMPORARY_ERRORS and attempts.pause():
                continue
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise BadImage(Status.MISSING, gone) from error
            raise BadImage(
                Status.READ_ERROR, f"cannot be read: {error.strerror or error}"
            ) from error


def _read(path: bytes, max_bytes: int) -> bytes:
    """Read a regular file; never waits on a FIFO. Raises: OSError, BadImage."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            kind = {
                stat.S_IFDIR: "a folder",
                stat.S_IFIFO: "a FIFO",
                stat.S_IFSOCK: "a socket",
            }.get(stat.S_IFMT(found.st_mode), "a device")
            raise BadImage(Status.READ_ERROR, f"is {kind}, not a regular file")
        if found.st_size > max_bytes:
            raise too_large(found.st_size, max_bytes)
        # A file that ends where it should needs no second read to show it.
        data = os.read(handle, found.st_size + 1)
        if len(data) != found.st_size:
            data = b"".join((data, *iter(lambda: os.read(handle, _PIECE), b"")))
        return data
    finally:
        os.close(handle)
