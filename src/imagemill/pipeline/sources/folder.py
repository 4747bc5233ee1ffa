"""A folder of images, or one image file: recursive, in a stable order, links followed without
loops.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import heapq
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import IO

from imagemill.errors import SourceError
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES, Skipped, matcher, shown, suffix_of
from imagemill.pipeline.sources.files import read_file
from imagemill.records import Entry, Filters
from imagemill.system.files import output_errors

_NAMES_IN_MEMORY = 10_000
_FOLDER, _LINK, _OTHER = b"d", b"l", b"o"
"""What the folder that lists an entry says of it, without a look at the entry itself."""
_LEADS_NOWHERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
"""Errors of a link that ends in nothing. Any other error says that something is there and cannot be
reached now.
"""
_PERMIT = "Give it permission"
_CHECK_DISK = "Check the disk or the mount"
_REMEDIES = {
    errno.EACCES: _PERMIT,
    errno.EPERM: _PERMIT,
    errno.ENOENT: "It was removed or moved meanwhile: run the command again",
    errno.ENAMETOOLONG: (
        "Its path is longer than the system allows: give a folder below it as a source of its own"
    ),
    errno.EIO: _CHECK_DISK,
    errno.ESTALE: _CHECK_DISK,
    errno.ENOTCONN: _CHECK_DISK,
    errno.ETIMEDOUT: _CHECK_DISK,
    errno.EHOSTDOWN: _CHECK_DISK,
}
_LONGEST_SHOWN = 300
_UNTYPEABLE = re.compile(r"['\udc80-\udcff]")
"""What a pattern between single quotes cannot hold: quotes, and bytes that are not UTF-8."""


class FolderSource:
    """A folder, or one file. `root` is absolute; `skip`, the job's output, is never entered."""

    def __init__(self, position: int, root: bytes, skip: os.stat_result | None = None) -> None:
        self.name = shown(root)
        self._position = position
        self._root = root
        self._skip = (skip.st_dev, skip.st_ino) if skip else None
        self._prefix = os.path.join(root, b"")  # noqa: PTH118 - bytes, for names that are not UTF-8

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the images. A source that is itself a file is planned whatever its suffix."""
        try:
            found = os.stat(self._root)  # noqa: PTH116
        except OSError as error:
            raise SourceError(
                f"source {self.name} cannot be read: {error.strerror}. Give a folder or an image."
            ) from error
        if not stat.S_ISDIR(found.st_mode):
            yield Entry(self._position, b"", found.st_size)
            return
        wanted = matcher(filters)
        group = -1
        for path, size, is_first_of_folder in self._walk(found, filters, skipped, wanted):
            group += is_first_of_folder
            yield Entry(self._position, path, size, max(group, 0))

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the path says it
        """Return the bytes of one file."""
        return read_file(self._prefix + path if path else self._root, max_bytes)

    def _walk(
        self,
        root: os.stat_result,
        filters: Filters,
        skipped: Skipped,
        wanted: Callable[[bytes], bool],
    ) -> Iterator[tuple[bytes, int, bool]]:
        """Yield (path, size, whether it is the first image of a folder right below the root),
        sorted by name in each folder.
        """
        # A stack of our own: folders may lie deeper than calls.
        levels = [(b"", (root.st_dev, root.st_ino), self._names(b""))]
        outside = self._folders_above()
        fresh = False
        while levels:
            folder, _, names = levels[-1]
            record = next(names, None)
            if record is None:
                levels.pop()
                continue
            name, _, kind = record.partition(b"\0")
            path = folder + b"/" + name if folder else name
            if name.startswith(b"."):
                skipped.hidden += 1
                continue
            suffix = suffix_of(name)
            found: os.stat_result | None = None
            try:
                found = os.stat(self._prefix + path)  # noqa: PTH116
            except OSError as error:
                # A file, or what is named like an image, gets a row that says so. A folder
                # would be lost with its images.
                may_be_folder = kind == _FOLDER or (kind == _LINK and suffix not in IMAGE_SUFFIXES)
                if may_be_folder and wanted(path + b"/"):
                    if kind == _FOLDER or error.errno not in _LEADS_NOWHERE:
                        what = (
                            "folder {} cannot be listed"
                            if kind == _FOLDER
                            else "link {}, which may lead to a folder, cannot be followed"
                        )
                        raise self._not_listed(path, error, what) from error
                    if not filters.all_files:
                        skipped.add_broken_link(shown(self._prefix + path))
                        continue
            inside = found is not None and stat.S_ISDIR(found.st_mode)
            if suffix in IMAGE_SUFFIXES or (filters.all_files and not inside):
                if wanted(path):
                    yield (
                        path,
                        found.st_size if found is not None and stat.S_ISREG(found.st_mode) else -1,
                        fresh and len(levels) > 1,
                    )
                    fresh = fresh and len(levels) == 1
                else:
                    skipped.by_filter += 1
            elif not inside:
                skipped.add_suffix(suffix)
            if inside and found is not None:
                identity = (found.st_dev, found.st_ino)
                loops = identity in outside or any(identity == above for _, above, _ in levels)
                if not loops and identity != self._skip and wanted(path + b"/"):
                    fresh = fresh or len(levels) == 1
                    levels.append((path, identity, self._names(path)))

    def _folders_above(self) -> set[tuple[int, int]]:
        """Identities of the folders above the source: a link to one of them would lead to its
        neighbours, and back to it.
        """
        found = set()
        for folder in Path(os.fsdecode(os.path.realpath(self._root))).parents:
            with contextlib.suppress(OSError):
                about = folder.stat()
                found.add((about.st_dev, about.st_ino))
        return found

    def _names(self, folder: bytes) -> Iterator[bytes]:
        """The records of a folder, see `_sorted_names`. Raises: SourceError."""
        try:
            return iter(_sorted_names(self._prefix + folder if folder else self._root))
        except OSError as error:
            raise self._not_listed(folder, error) from error

    def _not_listed(
        self, folder: bytes, error: OSError, what: str = "folder {} cannot be listed"
    ) -> SourceError:
        """Return the error for a folder, or a link that may lead to one: without it the images
        there would be lost.
        """
        where, pattern = shown(self._prefix + folder), os.fsdecode(folder)
        remedy = _REMEDIES.get(error.errno or 0, "Fix the cause and run the command again")
        if len(where) > _LONGEST_SHOWN:
            where, otherwise = f"{where[:_LONGEST_SHOWN]}…", ", or leave it out with --exclude"
        else:
            otherwise = (
                f", or leave it out with --exclude '{_UNTYPEABLE.sub('?', glob.escape(pattern))}/'"
                if folder
                else ""
            )
        return SourceError(f"{what.format(where)}: {error.strerror or error}. {remedy}{otherwise}.")


def _sorted_names(folder: bytes) -> Iterable[bytes]:
    """Return a record for each entry of a folder, `NAME\\0KIND`, sorted by the bytes of the names,
    which hold no NUL.

    Above 10,000 of them sorted runs go to one temporary file and are merged from there.
    """
    with os.scandir(folder) as scan:
        records = (entry.name + b"\0" + _kind(entry) for entry in scan)
        chunk = sorted(islice(records, _NAMES_IN_MEMORY))
        if len(chunk) < _NAMES_IN_MEMORY:
            return chunk
        return _merged(chunk, records)


def _kind(entry: os.DirEntry[bytes]) -> bytes:
    """Return what an entry is; an entry whose file system does not say, and cannot be asked, counts
    as a link: it may lead anywhere.
    """
    try:
        if entry.is_dir(follow_symlinks=False):
            return _FOLDER
        return _LINK if entry.is_symlink() else _OTHER
    except OSError:
        return _LINK


def _merged(chunk: list[bytes], records: Iterator[bytes]) -> Iterator[bytes]:
    where = f"cannot sort the names of a folder in {tempfile.gettempdir()}"
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the merge reads it
    try:
        starts = [0]
        while chunk:
            with output_errors(where, "Free space there, or set TMPDIR."):
                file.writelines(record + b"/" for record in chunk)  # no name holds a slash
                file.flush()
            starts.append(file.tell())
            chunk = sorted(islice(records, _NAMES_IN_MEMORY))
    except BaseException:
        file.close()
        raise
    return _merging(file, starts)


def _merging(file: IO[bytes], starts: list[int]) -> Iterator[bytes]:
    with file:
        yield from heapq.merge(*(_names_of(file, start, end) for start, end in pairwise(starts)))


def _names_of(file: IO[bytes], start: int, end: int, block_bytes: int = 8_192) -> Iterator[bytes]:
    """The records of one run, read by position: the runs share the file."""
    rest = b""
    while start < end:
        block = os.pread(file.fileno(), min(block_bytes, end - start), start)
        start += len(block)
        *names, rest = (rest + block).split(b"/")
        yield from names
