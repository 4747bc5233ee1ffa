"""Which image has which true values.

Paths are compared by their hashes, 64 bits of Python's own, in sorted arrays. So ten million images
and a truth in any order take a few hundred megabytes. The chance that any two of ten million paths
share a hash is 3 in a million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import UsageError, printable
from imagemill.job.open_job import OpenJob
from imagemill.records import Shard
from imagemill.scoring import entries, places
from imagemill.scoring.entries import NONE, Codes, Entries, Keyed, Place, hashes
from imagemill.scoring.truth import Truth, TruthKind


class TrueValues(Struct, frozen=True):
    """The true values of a job's rows: pairs of image and value, in the order of the images."""

    indices: NDArray[np.int64]
    """Of the images; an image with several values occurs several times."""
    codes: NDArray[np.int32]
    """Positions in `values`."""
    values: tuple[str, ...]
    names: tuple[str, ...] = ()
    """Values that a table has instead of the numbers 0, 1, …"""
    matched_by: str = ""
    """Of a table: `path`, `full path` or `file name`."""
    notes: tuple[str, ...] = ()


def find(job: OpenJob, shards: Sequence[Shard], truth: Truth) -> TrueValues:
    """Return the true values of the rows of some committed shards.

    Raises:
        UsageError: no image has one, or the truth does not fit the job's sources.
        SourceError: a table or archive cannot be read.
        PartError: a part is damaged.
    """
    if truth.kind in (TruthKind.FOLDERS, TruthKind.REGEX):
        return _from_paths(job, shards, truth)
    if truth.kind is TruthKind.TABLE:
        return _from_table(job, shards, truth)
    of_column = truth.kind is TruthKind.COLUMN
    found = entries.of_column(job, shards, truth) if of_column else entries.of_cls(job, truth)
    pairs = _Pairs(found.entries)
    for shard, sources, paths in _rows(job, shards):
        pairs.join(shard, places.all_of(found.place, sources, paths), paths)
    if not pairs.matched:
        raise UsageError(
            f"--truth {truth.text}: no image of the job has a label there, first:"
            f" {printable(pairs.first)}."
        )
    return pairs.values(found.codes, names=found.names)


def _rows(job: OpenJob, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[str], list[str]]]:
    """Yield the columns `source` and `path` of each shard."""
    for shard, table in job.tables(shards, ("source", "path")):
        yield shard, table["source"].to_pylist(), table["path"].to_pylist()


@dataclass
class _Pairs:
    """Pairs of image and value, and counts of images, as matching goes on."""

    truth: Entries | None = None
    indices: list[NDArray[np.int64]] = field(default_factory=list)
    codes: list[NDArray[np.int32]] = field(default_factory=list)
    images: int = 0
    matched: int = 0
    first: str = ""
    """Path of the first image."""
    first_missing: str = ""
    """Path of the first image without a value."""

    def __post_init__(self) -> None:
        self.used = np.zeros(len(self.truth.keys) if self.truth else 0, bool)
        """Which entries of the truth belong to an image."""

    def add(self, shard: Shard, codes: NDArray[np.int32], paths: Sequence[str]) -> None:
        """Add the images of a shard, with the code of each."""
        has_value = codes != NONE
        self._count(has_value, paths)
        self.indices.append(shard.first + np.flatnonzero(has_value))
        self.codes.append(codes[has_value])

    def join(self, shard: Shard, keys: Sequence[str], paths: Sequence[str]) -> None:
        """Add the images of a shard, with the values that the truth has for their keys."""
        rows, at = self.look_up(keys)
        has_value = np.zeros(len(paths), bool)
        has_value[rows] = True
        self._count(has_value, paths)
        truth = self.truth
        assert truth is not None
        indices, codes = [], []
        while len(rows):  # once for each value of the image with most values
            self.used[at] = True
            indices.append(shard.first + rows)
            codes.append(truth.codes[at])
            has_next = at + 1 < len(truth.keys)
            has_next[has_next] = truth.is_further[at[has_next] + 1]
            rows, at = rows[has_next], at[has_next] + 1
        if indices:
            together = np.concatenate(indices)
            order = np.argsort(together, kind="stable")
            self.indices.append(together[order])
            self.codes.append(np.concatenate(codes)[order])

    def look_up(self, keys: Sequence[str]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the rows that have an entry, and the position of the first one of each."""
        assert self.truth is not None
        known, wanted = self.truth.keys, hashes(keys)
        if not len(known):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        rows = np.flatnonzero(known[at] == wanted)
        return rows, at[rows]

    def _count(self, has_value: NDArray[np.bool_], paths: Sequence[str]) -> None:
        self.first = self.first or next(iter(paths), "")
        self.images += len(paths)
        self.matched += int(has_value.sum())
        if not self.first_missing and not has_value.all():
            self.first_missing = paths[int(np.argmin(has_value))]

    def values(
        self, codes: Codes, notes: Sequence[str] = (), *, names: tuple[str, ...] = (), way: str = ""
    ) -> TrueValues:
        """Return the pairs, with a note about whatever a user may not expect."""
        return TrueValues(
            np.concatenate([*self.indices, np.empty(0, np.int64)]),
            np.concatenate([*self.codes, np.empty(0, np.int32)]),
            codes.values,
            names,
            way,
            (*self._notes(), *notes),
        )

    def _notes(self) -> Iterator[str]:
        if missing := self.images - self.matched:
            yield (
                f"note: images without a true label, not scored: {missing:,} of {self.images:,},"
                f" first: {printable(self.first_missing)}"
            )
        if self.truth is None:
            return
        if self.truth.repeated:
            yield (
                f"note: labels that are given twice and count once: {self.truth.repeated:,}, first:"
                f" {printable(self.truth.first_repeated)}"
            )
        further = self.used & self.truth.is_further
        if further.any():
            several = np.unique(self.truth.keys[further])
            text, labels = self.truth.first_values(further)
            yield (
                f"note: images with several true labels, of which any counts: {len(several):,},"
                f" first: {printable(text)} ({printable(', '.join(labels))})"
            )


def _from_paths(job: OpenJob, shards: Sequence[Shard], truth: Truth) -> TrueValues:
    pairs, codes = _Pairs(), Codes(truth)
    for shard, sources, paths in _rows(job, shards):
        labels = pa.array(labels_in(truth, sources, paths), pa.string())
        pairs.add(shard, codes.of(labels), paths)
    if not pairs.matched:
        what = "is in a folder" if truth.kind is TruthKind.FOLDERS else "matches the pattern"
        raise UsageError(
            f"--truth {truth.text}: no path of the job {what}, first: {printable(pairs.first)}."
        )
    return pairs.values(codes)


def labels_in(truth: Truth, sources: Sequence[str], paths: Sequence[str]) -> Sequence[str | None]:
    """Return the label of each image from its path: FOLDERS or REGEX."""
    if truth.kind is TruthKind.FOLDERS:
        return places.all_of(places.folder_name, sources, paths)
    named = places.all_of(places.relative_path, sources, paths)
    return [truth.label_in(path) for path in named]


# ── tables ────────────────────────────────────────────────────────────────────────────────────────


class Way(Struct, frozen=True):
    """A way to match images with the paths in a table."""

    name: str
    place: Place
    key: Callable[[Truth, str], str]
    """Returns the key of a path in the table."""


WAYS: Final = (
    Way("path", places.relative_path, lambda _, text: text.removeprefix("./")),
    Way("full path", places.full_path, lambda truth, text: places.beside(truth.file, text)),
    Way("file name", places.file_name, lambda _, text: places.file_name("", text)),
)
"""In the order in which they are tried."""


def _from_table(job: OpenJob, shards: Sequence[Shard], truth: Truth) -> TrueValues:
    """Match a table with the images in the way that finds most of them; in a tie, the first.

    A way in which one path of the table means several images, or several paths one image, is not
    used.
    """
    best: tuple[int, Way | None] = (0, None)
    doubts: list[str] = []
    for way in WAYS:
        found, pairs, doubt = _try(job, shards, truth, way)
        if doubt:
            doubts.append(f"by {way.name}, {printable(doubt)} is ambiguous")
        elif pairs.matched > best[0]:
            best = pairs.matched, way
            if pairs.matched == pairs.images or pairs.used.all():
                break
    else:
        if best[1] is None:
            if not (text := found.entries.any_text()):
                raise UsageError(f"--truth {truth.text}: the table has no rows.")
            why = f" ({', and '.join(doubts)}). Write full paths" if doubts else ""
            raise UsageError(
                f"--truth {truth.text}: no path of the table is an image of the job{why}. The"
                f" table has {printable(text)}, the job has"
                f" {printable(pairs.first)}."
            )
        if best[1] is not way:
            way = best[1]
            found, pairs, _ = _try(job, shards, truth, way)
    notes = []
    unused = ~pairs.used & ~found.entries.is_further
    if unused.any():
        where = "the job" if len(shards) == len(job.shards) else "the rows so far"
        notes.append(
            f"note: paths of {truth.file} that are not in {where}: {int(unused.sum()):,}, first:"
            f" {printable(found.entries.first(unused))}"
        )
    return pairs.values(found.codes, notes, names=found.names, way=way.name)


def _try(
    job: OpenJob, shards: Sequence[Shard], truth: Truth, way: Way
) -> tuple[Keyed, _Pairs, str]:
    """Match a table in one way. The last value is a path that is ambiguous in this way, or empty;
    then the pairs are not complete.
    """
    is_name = way.name == "file name"
    found = entries.of_table(truth, partial(way.key, truth), way.place, names_one=is_name)
    pairs = _Pairs(found.entries)
    # A full path is one image, and so is a path if there is one source.
    check = is_name or (way.name == "path" and len(job.frozen.job.sources) > 1)
    owners = np.zeros(len(found.entries.keys) if check else 0, np.int64)
    for shard, sources, paths in _rows(job, shards):
        keys = places.all_of(way.place, sources, paths)
        pairs.join(shard, keys, paths)
        if check:
            rows, at = pairs.look_up(keys)
            images = hashes(places.all_of(places.own_path, sources, paths))[rows]
            is_doubtful = np.isin(found.entries.keys[at], found.entries.ambiguous)
            is_doubtful |= (owners[at] != 0) & (owners[at] != images)
            owners[at] = images
            is_doubtful |= owners[at] != images  # two images of this shard
            if is_doubtful.any():
                return found, pairs, keys[rows[int(np.argmax(is_doubtful))]]
    return found, pairs, ""
