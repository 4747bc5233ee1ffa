"""The user's own directories: home and cache, also for users who have none, as in containers that
run with any user id.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

from imagemill.errors import UsageError


def home() -> Path | None:
    """Return the home directory; None if HOME is not set and the user has no passwd entry."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expand(path: str) -> Path:
    """Return a path with a leading `~` replaced by the home directory. Raises: UsageError."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: cannot find the home directory. Set HOME, or write the path without ~."
        ) from error


def cache() -> Path:
    """Return imagemill's cache folder: below `$XDG_CACHE_HOME`, else below the home directory.

    A user without a home directory, or who may not write there, gets a private folder below the
    temporary directory.

    Raises:
        UsageError: that folder belongs to another user, or others may write to it.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "imagemill"
    if folder := home():
        folder = folder / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "imagemill"
        nearest = next(
            path
            for path in (folder, *folder.parents)
            if path == path.parent or os.access(path, os.F_OK)
        )
        if nearest == folder or os.access(nearest, os.W_OK):
            return folder
    return _private()


def _private() -> Path:
    """Make the folder below the temporary directory, or check that nobody else could have put files
    there. Raises: UsageError.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"imagemill-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if (
            stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.geteuid()
            and not found.st_mode & 0o022
        ):
            return folder
        why = f"{folder} is not a private folder of this user"
    except OSError as error:
        why = f"no temporary folder can be used either ({error.strerror})"
    raise UsageError(
        f"no cache folder: there is no home directory to write to, and {why}. Set XDG_CACHE_HOME or"
        " IMAGEMILL_MODELS."
    )
