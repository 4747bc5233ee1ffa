"""How one image gets into a folder: as a hard link, a symbolic link or a copy."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from imagemill.errors import OutputError
from imagemill.pipeline.sources.base import shown
from imagemill.system import files
from imagemill.system.messages import Notify

_NO_HARD_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


class Link(StrEnum):
    """How an image is put into a folder."""

    HARD = "hard"
    SYMBOLIC = "symbolic"
    COPY = "copy"


class Maker:
    """A maker of links or copies, which changes to symbolic links if hard links are impossible."""

    def __init__(self, link: Link | None, log: Notify, temporary: bytes) -> None:
        self.link = link or Link.HARD
        self.made = 0
        self._may_fall_back = link is None
        self._log = log
        self._temporary = temporary

    def make(self, source: bytes, target: bytes) -> None:
        """Link or copy one image to `target`, unless it is there already. Raises: OutputError."""
        with files.writing(Path(os.fsdecode(target))):
            kind = self.link if _is_regular(source) else Link.SYMBOLIC
            if self._exists(source, target, kind):
                return
            self._put(source, target, kind)
            self.made += 1

    def write(self, data: bytes, target: bytes) -> None:
        """Write an image that is no file of its own to `target`. Raises: OutputError."""
        with (
            files.writing(Path(os.fsdecode(target))),
            self._replacing(target) as temporary,
            open(temporary, "wb") as file,  # noqa: PTH123
        ):
            file.write(data)
        self.made += 1

    def _put(self, source: bytes, target: bytes, kind: Link) -> None:
        try:
            with self._replacing(target) as temporary:
                if kind is Link.HARD:
                    os.link(os.path.realpath(source), temporary)
                elif kind is Link.SYMBOLIC:
                    os.symlink(source, temporary)  # noqa: PTH211
                else:
                    shutil.copy2(source, temporary)
        except OSError as error:
            if kind is not Link.HARD or error.errno not in _NO_HARD_LINKS:
                raise
            if not self._may_fall_back:
                raise OutputError(
                    f"cannot make {shown(target)} a hard link to {shown(source)}: {error.strerror}."
                    " Use --link symbolic or --link copy."
                ) from error
            self._log(
                f"note: hard links are impossible here ({error.strerror}): making symbolic links"
                " instead; --link copy makes copies"
            )
            self.link = Link.SYMBOLIC
            self._put(source, target, Link.SYMBOLIC)

    @contextlib.contextmanager
    def _replacing(self, target: bytes) -> Iterator[bytes]:
        """Give a temporary name in the folder of `target`, which gets the final name at the end."""
        folder = os.path.dirname(target)  # noqa: PTH120
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103
        temporary = os.path.join(folder, self._temporary)  # noqa: PTH118
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # noqa: PTH108 - a killed call may have left a link to an original
        try:
            yield temporary
            os.replace(temporary, target)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise

    @staticmethod
    def has_copy(target: bytes, size: int) -> bool:
        """Return whether `target` is a regular file of this size; of any size if that is -1."""
        try:
            found = os.lstat(target)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and size in (-1, found.st_size)

    def _exists(self, source: bytes, target: bytes, kind: Link) -> bool:
        try:
            found = os.lstat(target)
        except FileNotFoundError:
            return False
        if kind is Link.SYMBOLIC:
            return stat.S_ISLNK(found.st_mode) and os.readlink(target) == source  # noqa: PTH115
        wanted = os.stat(source)  # noqa: PTH116
        same = (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
        if kind is Link.HARD:
            return same
        alike = (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
        return not same and stat.S_ISREG(found.st_mode) and alike


def names_in(folder: Path, shown_as: str) -> list[str]:
    """Return the names in an output folder, sorted, without those that systems make by themselves;
    none if it does not exist.

    Raises:
        OutputError: it is a file, or below a link to nowhere.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{shown_as} is a file. Give a folder.")
    files.missing_goal(folder)
    found = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - only names are needed
    return sorted(name for name in found if not files.is_system_file(name))


def _is_regular(path: bytes) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return False
