"""The lock of an output folder: one launcher at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from imagemill.errors import OutputError
from imagemill.job.paths import JobPaths
from imagemill.system.files import cannot_write, make_folder, writing

_LOCK_DELAYS_S = (0.01, 0.05, 0.2)
"""Delays between tries: `is_locked` in another process may hold the lock for a moment."""


@contextlib.contextmanager
def locked(paths: JobPaths) -> Iterator[None]:
    """Keep other launchers out of the output folder. The kernel releases the lock however this
    process ends.

    Raises:
        OutputError: another launcher holds the lock, or the folder cannot be written to.
    """
    is_held = False
    while not is_held:
        make_folder(paths.root)
        with writing(paths.lock):
            handle = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _acquire(handle, paths)
            # A launcher whose job was refused has removed the file that was opened here.
            is_held = _is_at(handle, paths.lock)
            if is_held:
                yield
        finally:
            os.close(handle)


def _acquire(handle: int, paths: JobPaths) -> None:
    for delay_s in (*_LOCK_DELAYS_S, None):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise cannot_write(paths.lock, error) from error
            if delay_s is None:
                raise OutputError(
                    f"{paths.output} is in use by another imagemill run. Wait for it or stop"
                    f" it; see `imagemill status {paths.output}`."
                ) from error
            time.sleep(delay_s)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def is_locked(paths: JobPaths) -> bool:
    """Return whether a launcher is using this folder now."""
    try:
        handle = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
