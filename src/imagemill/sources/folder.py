"""A folder of pictures, or one picture file: recursive, in a stable order, links followed without loops."""

from __future__ import annotations

import contextlib
import heapq
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import IO

from imagemill.errors import SourceError
from imagemill.plan import Entry
from imagemill.sources.base import IMAGE_SUFFIXES, Filters, Skipped, matcher, shown
from imagemill.sources.files import read_file

_NAMES_IN_MEMORY = 10_000


class FolderSource:
    """See the module's docstring. `root` is absolute; `skip` is a folder that is never entered: the job's own output."""

    ordered = True

    def __init__(self, position: int, root: bytes, skip: os.stat_result | None = None) -> None:
        self.name = shown(root)
        self._position = position
        self._root = root
        self._skip = (skip.st_dev, skip.st_ino) if skip else None
        self._prefix = os.path.join(root, b"")  # noqa: PTH118 - bytes, for names that are not UTF-8

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """See `Source.entries`. A source that is itself a file is planned whatever its suffix."""
        try:
            found = os.stat(self._root)  # noqa: PTH116
        except OSError as error:
            raise SourceError(f"source {self.name} cannot be read: {error.strerror}. Give a folder or a picture.") from error
        if not stat.S_ISDIR(found.st_mode):
            yield Entry(self._position, b"", found.st_size)
            return
        wanted = matcher(filters)
        group = -1
        for path, size, is_first_of_folder in self._walk(found, filters, skipped, wanted):
            group += is_first_of_folder
            yield Entry(self._position, path, size, max(group, 0))

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:  # noqa: ARG002 - the path says it
        """See `Source.fetch`."""
        return read_file(self._prefix + path if path else self._root, max_bytes)

    def _walk(
        self, root: os.stat_result, filters: Filters, skipped: Skipped, wanted: Callable[[bytes], bool]
    ) -> Iterator[tuple[bytes, int, bool]]:
        """Yield (path, size, whether it is the first picture of a folder right below the root), sorted by name in each folder."""
        levels = [(b"", (root.st_dev, root.st_ino), iter(self._names(b"")))]  # a stack of our own: folders may lie deeper than calls
        outside = self._folders_above()
        fresh = False
        while levels:
            folder, _, names = levels[-1]
            name = next(names, None)
            if name is None:
                levels.pop()
                continue
            path = folder + b"/" + name if folder else name
            if name.startswith(b"."):
                skipped.hidden += 1
                continue
            try:
                found: os.stat_result | None = os.stat(self._prefix + path)  # noqa: PTH116
            except OSError:
                found = None  # a link that leads nowhere or to itself, or a file gone since: its row will say so
            inside = found is not None and stat.S_ISDIR(found.st_mode)
            suffix = os.path.splitext(name)[1].lower().decode("utf-8", "backslashreplace")  # noqa: PTH122
            if suffix in IMAGE_SUFFIXES or (filters.all_files and not inside):
                if wanted(path):
                    yield path, found.st_size if found is not None and stat.S_ISREG(found.st_mode) else -1, fresh and len(levels) > 1
                    fresh = fresh and len(levels) == 1
                else:
                    skipped.by_filter += 1
            elif not inside:
                skipped.by_suffix[suffix] += 1
            if inside and found is not None:
                identity = (found.st_dev, found.st_ino)
                loops = identity in outside or any(identity == above for _, above, _ in levels)
                if not loops and identity != self._skip and wanted(path + b"/"):
                    fresh = fresh or len(levels) == 1
                    levels.append((path, identity, iter(self._names(path))))

    def _folders_above(self) -> set[tuple[int, int]]:
        """Identities of the folders that the source lies in: a link to one of them would lead to its neighbours, and back to it."""
        found = set()
        for folder in Path(os.fsdecode(os.path.realpath(self._root))).parents:
            with contextlib.suppress(OSError):
                about = folder.stat()
                found.add((about.st_dev, about.st_ino))
        return found

    def _names(self, folder: bytes) -> Iterable[bytes]:
        """The sorted names in a folder. Raises: SourceError."""
        try:
            return _sorted_names(self._prefix + folder if folder else self._root)
        except OSError as error:
            where = shown(self._prefix + folder)
            otherwise = f", or leave it out with --exclude '{shown(folder)}/'" if folder else ""
            raise SourceError(f"folder {where} cannot be listed: {error.strerror}. Give it permission{otherwise}.") from error


def _sorted_names(folder: bytes) -> Iterable[bytes]:
    """The names in a folder, sorted as bytes; above 10,000 of them sorted runs go to one temporary file and are merged from there."""
    with os.scandir(folder) as scan:
        names = (entry.name for entry in scan)
        chunk = sorted(islice(names, _NAMES_IN_MEMORY))
        if len(chunk) < _NAMES_IN_MEMORY:
            return chunk
        return _merged(chunk, names)


def _merged(chunk: list[bytes], names: Iterator[bytes]) -> Iterator[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the merge reads it
    starts = [0]
    while chunk:
        file.writelines(name + b"\0" for name in chunk)
        starts.append(file.tell())
        chunk = sorted(islice(names, _NAMES_IN_MEMORY))
    file.flush()
    return _merging(file, starts)


def _merging(file: IO[bytes], starts: list[int]) -> Iterator[bytes]:
    with file:
        yield from heapq.merge(*(_names_of(file, start, end) for start, end in pairwise(starts)))


def _names_of(file: IO[bytes], start: int, end: int, block_bytes: int = 8_192) -> Iterator[bytes]:
    """The names of one run, read by position: the runs share the file."""
    rest = b""
    while start < end:
        block = os.pread(file.fileno(), min(block_bytes, end - start), start)
        start += len(block)
        *names, rest = (rest + block).split(b"\0")
        yield from names
