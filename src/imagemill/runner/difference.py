"""What a new listing of a job's sources has that its plan has not, and the other way round.

An image is recognised by its source and its path, so the order of the listing does not matter: new
images may sort anywhere. If a path occurs several times in a source, its occurrences are matched in
order. Rows of a table of images are recognised by their names, or by their numbers if it has none.
"""

from __future__ import annotations

import contextlib
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from heapq import nsmallest
from itertools import islice
from pathlib import Path

from msgspec import Struct

from imagemill.errors import printable
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.sources.base import Source, shown
from imagemill.pipeline.sources.parquet import ParquetSource
from imagemill.system import files

MAX_NAMES = 10
"""How many images of each kind are named."""
_KEY_BYTES = 16
"""Of a path's hash: two of 10⁹ paths share one with a probability of 10⁻²¹."""
_RECORD = struct.Struct(f"<{_KEY_BYTES}sqq")
_BUCKET_IMAGES, _MAX_BUCKETS = 100_000, 256
"""A bucket's planned images are in memory at once, some 30 MB. Each bucket needs two open files."""


class Named(Struct, frozen=True):
    """A number of images, and the names of the first ones."""

    count: int = 0
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = self.count - len(self.names)
        return ", ".join(printable(name, 1_000) for name in self.names) + (
            f" and {more:,} more" if more else ""
        )


class Difference(Struct, frozen=True):
    """The difference between a listing and a plan."""

    is_new: bytearray
    """A byte for each image of the listing, 1 if the plan does not have it."""
    new: Named = Named()
    changed: Named = Named()
    """Images whose size is known and is not that in the plan."""
    missing: Named = Named()
    """Images of the plan that are not in the listing."""


def compare(
    job: OpenJob, opened: Sequence[Source], places: set[int], spooled: Path, listed: int
) -> Difference:
    """Return how a spooled listing differs from a job's plan.

    It takes one byte of memory per listed image, and temporary files beside the listing.

    Args:
        job: with the plan.
        opened: the sources of the job, and further ones that are in the listing.
        places: the positions of the listed sources.
        spooled: the listing.
        listed: how many images it has.

    Raises:
        OutputError: the plan cannot be read, or temporary files cannot be written.
    """
    tables = {place for place, source in enumerate(opened) if isinstance(source, ParquetSource)}

    def key(source: int, path: bytes) -> bytes:
        name = (path.partition(b"/")[2] if source in tables else b"") or path
        return blake2b(b"%d/%b" % (source, name), digest_size=_KEY_BYTES).digest()

    is_new = bytearray(listed)
    changed, missing = _Smallest(), _Smallest()
    count = min(1 + job.frozen.images // _BUCKET_IMAGES, _MAX_BUCKETS)
    with (
        files.output_errors(f"cannot write to {spooled.parent}"),
        contextlib.ExitStack() as opened_files,
    ):
        planned, found = (_Buckets(count, spooled.parent, opened_files) for _ in range(2))
        for row in job.all_rows():
            if row.source in places:
                planned.add(key(row.source, row.path), row.index, row.size)
        for number, (source, path, size) in enumerate(plan.spooled_rows(spooled)):
            found.add(key(source, path), number, size)
        for bucket in range(count):
            known: dict[bytes, list[tuple[int, int]]] = {}
            for hashed, index, size in reversed(list(planned.read(bucket))):
                known.setdefault(hashed, []).append((index, size))
            for hashed, number, size in found.read(bucket):
                if not (rows := known.get(hashed)):
                    is_new[number] = 1
                    continue
                index, was = rows.pop()
                if size != was and min(size, was) >= 0:
                    changed.add(index)
            for rows in known.values():
                for index, _ in rows:
                    missing.add(index)

    def name(source: int, path: bytes) -> str:
        return shown(path) or opened[source].name

    def in_plan(number: int) -> str:
        row = job.row(number)
        return name(row.source, row.path)

    first = islice(re.finditer(b"\1", is_new), MAX_NAMES)
    names = (name(*plan.spooled_row(spooled, match.start())) for match in first)
    return Difference(
        is_new,
        Named(is_new.count(1), tuple(names)),
        changed.named(in_plan),
        missing.named(in_plan),
    )


class _Smallest:
    """Counts numbers, and keeps the smallest ones."""

    def __init__(self) -> None:
        self._count = 0
        self._kept: list[int] = []

    def add(self, number: int) -> None:
        self._count += 1
        self._kept.append(number)
        if len(self._kept) > 100 * MAX_NAMES:
            self._kept = nsmallest(MAX_NAMES, self._kept)

    def named(self, name: Callable[[int], str]) -> Named:
        return Named(self._count, tuple(map(name, nsmallest(MAX_NAMES, self._kept))))


class _Buckets:
    """Records of a key and two numbers, spread over temporary files by their keys, so that the
    records of one file fit into memory.
    """

    def __init__(self, count: int, folder: Path, opened_files: contextlib.ExitStack) -> None:
        self._files = [
            opened_files.enter_context(
                tempfile.TemporaryFile(prefix=".", suffix=".tmp", dir=folder)  # noqa: SIM115
            )
            for _ in range(count)
        ]

    def add(self, key: bytes, first: int, second: int) -> None:
        file = self._files[int.from_bytes(key[:4]) % len(self._files)]
        file.write(_RECORD.pack(key, first, second))

    def read(self, bucket: int) -> Iterator[tuple[bytes, int, int]]:
        """Return the records of one bucket, in the order in which they were added."""
        self._files[bucket].seek(0)
        return _RECORD.iter_unpack(self._files[bucket].read())
