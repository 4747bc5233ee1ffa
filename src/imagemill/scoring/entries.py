"""The entries of a truth: keys of images and their true values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import SourceError, UsageError, printable
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.sources import open_all
from imagemill.pipeline.sources.base import Source
from imagemill.pipeline.sources.parquet import ParquetSource
from imagemill.pipeline.sources.table import PATH_COLUMNS, TableSource
from imagemill.pipeline.sources.tar import TarSource
from imagemill.records import Access, Shard
from imagemill.scoring import places
from imagemill.scoring.tables import Table
from imagemill.scoring.truth import Truth

NONE: Final = -1
"""The code of an image or entry without a true value."""
_MAX_VALUES: Final = 1_000_000
_LABEL_COLUMNS: Final = "label labels class class_id class_name target category synset wnid".split()
"""Names that a column of labels goes by; the first of them in the table is used."""
_LOCATOR_CHECKSUM: Final = slice(-4, None)
"""Where in the locator of a Parquet image the checksum of the footer is."""

Place = Callable[[str, str], str]
"""Returns the key of an image, from the columns `source` and `path`."""
Stream = Callable[[], Iterator[tuple[list[str], Any]]]
"""Yields texts, and their values as an Arrow array of strings or lists; the same each time."""


def hashes(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return a hash of each text."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


class Codes:
    """Numbers for the different values of a truth."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._codes: dict[str, int] = {}

    @property
    def values(self) -> tuple[str, ...]:
        """The values by number."""
        return tuple(self._codes)

    def of(self, array: Any) -> NDArray[np.int32]:
        """Return the number of each string; `NONE` of nulls and blank ones. Raises: UsageError."""
        encoded = array.dictionary_encode()
        numbers = [
            self._codes.setdefault(value, len(self._codes)) if value and value.strip() else NONE
            for value in encoded.dictionary.to_pylist()
        ]
        if len(self._codes) > _MAX_VALUES:
            raise UsageError(
                f"--truth {self._truth.text}: has more than {_MAX_VALUES:,} different labels, such"
                f" as {printable(next(iter(self._codes)))}. Name the column of the labels."
            )
        places_of = pc.fill_null(encoded.indices, len(numbers))
        by_place = np.array([*numbers, NONE], np.int32)  # the last one for nulls
        found: NDArray[np.int32] = by_place[places_of.to_numpy(zero_copy_only=False)]
        return found


class Entries:
    """The entries of a truth, sorted by the hash of the key and by value, each pair once.

    Args:
        stream: yields the texts and their values. It is called again only to name one of them.
        codes: numbers the values.
        key: makes the key of a text.
        names_one: whether different texts with one key mean different images.
    """

    def __init__(
        self,
        stream: Stream,
        codes: Codes,
        key: Callable[[str], str] = str,
        *,
        names_one: bool = False,
    ) -> None:
        self._stream, self._codes = stream, codes
        keys: list[NDArray[np.int64]] = []
        numbers: list[NDArray[np.int32]] = []
        owners: list[NDArray[np.int64]] = []
        for texts, labels in self._flat():
            keys.append(hashes([key(text) if text else "" for text in texts]))
            numbers.append(codes.of(labels))
            if names_one:
                owners.append(hashes(texts))
        all_keys = np.concatenate([*keys, np.empty(0, np.int64)])
        all_codes = np.concatenate([*numbers, np.empty(0, np.int32)])
        keys.clear()
        order = np.lexsort((all_codes, all_keys))
        order = order[(all_codes[order] != NONE) & (all_keys[order] != hash(""))]
        all_keys, all_codes = all_keys[order], all_codes[order]
        is_next = _repeats(all_keys)
        is_repeated = is_next & _repeats(all_codes)
        self.repeated = int(is_repeated.sum())
        """How many entries repeat a key and its value."""
        self.first_repeated = self._text(order[is_repeated].min()) if self.repeated else ""
        self.ambiguous = np.empty(0, np.int64)
        """Keys, sorted, that are several texts although each of these means another image."""
        if names_one:
            self.ambiguous = np.unique(
                all_keys[is_next & ~_repeats(np.concatenate([*owners, all_keys[:0]])[order])]
            )
        self._order = order[~is_repeated]
        self.keys: NDArray[np.int64] = all_keys[~is_repeated]
        self.codes: NDArray[np.int32] = all_codes[~is_repeated]
        self.is_further = _repeats(self.keys)
        """Whether the entry before has the same key."""

    def first(self, chosen: NDArray[np.bool_]) -> str:
        """Return the text of the first of these entries in the order of the truth."""
        return self._text(self._order[chosen].min())

    def first_values(self, chosen: NDArray[np.bool_]) -> tuple[str, list[str]]:
        """Return the text of the first of these entries, and all of its values."""
        at = int(np.flatnonzero(chosen)[np.argmin(self._order[chosen])])
        codes = self.codes[self.keys == self.keys[at]].tolist()
        return self._text(self._order[at]), [self._codes.values[code] for code in codes]

    def any_text(self) -> str:
        """Return the first text; empty if there is none."""
        return next((texts[0] for texts, _ in self._stream() if texts), "")

    def _text(self, position: int) -> str:
        for texts, _ in self._flat():
            if position < len(texts):
                return texts[position]
            position -= len(texts)
        raise SourceError(f"{self.any_text()}: the table has changed while it was read.")

    def _flat(self) -> Iterator[tuple[list[str], Any]]:
        """Yield each text with one value; a list of values becomes as many entries."""
        for texts, labels in self._stream():
            if pa.types.is_list(labels.type):
                rows = pc.list_parent_indices(labels).to_pylist()
                yield [texts[row] for row in rows], labels.flatten()
            else:
                yield texts, labels


def _repeats(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for each value whether the one before is equal."""
    found = np.zeros(len(values), bool)
    found[1:] = values[1:] == values[:-1]
    return found


class Keyed(Struct, frozen=True):
    """Entries, and how the key of an image is made."""

    entries: Entries
    codes: Codes
    place: Place
    names: tuple[str, ...] = ()
    """Values that a table has instead of the numbers 0, 1, …"""


def of_table(truth: Truth, key: Callable[[str], str], place: Place, *, names_one: bool) -> Keyed:
    """Return the entries of `@FILE#path,label`. Raises: SourceError, UsageError."""
    table = Table(f"--truth {truth.file}", truth.file)
    columns = table.columns()
    path = truth.path_column or _known(truth, columns, PATH_COLUMNS, "paths")
    label = truth.label_column or _known(truth, columns, _LABEL_COLUMNS, "labels")

    def stream() -> Iterator[tuple[list[str], Any]]:
        for paths, labels in table.batches(path, label):
            yield [text or "" for text in paths.to_pylist()], labels

    codes = Codes(truth)
    entries = Entries(stream, codes, key, names_one=names_one)
    return Keyed(entries, codes, place, table.class_names(label))


def _known(truth: Truth, columns: Sequence[str], known: Sequence[str], what: str) -> str:
    """Return the column that goes by a known name. Raises: UsageError."""
    for name in known:
        if name in columns:
            return name
    raise UsageError(
        f"--truth {truth.text}: which column holds the {what}? Name both columns:"
        f" @{truth.file}#PATH,LABEL. The columns are {', '.join(map(repr, columns))}."
    )


def of_column(job: OpenJob, shards: Sequence[Shard], truth: Truth) -> Keyed:
    """Return the entries of a column of the job's tables; without tables, of a column that the rows
    keep.

    Raises:
        UsageError: no source is a table. SourceError: one cannot be read, or was replaced.
    """
    column = truth.label_column or ""
    codes = Codes(truth)
    opened = [source for source in _opened(job) if isinstance(source, ParquetSource | TableSource)]
    if not opened and column in (kept.name for kept in job.frozen.job.keep):
        return Keyed(Entries(partial(_rows, job, shards, column), codes), codes, places.own_path)
    if not opened:
        raise UsageError(
            f"--truth {truth.text}: no source of the job is a table, and its rows do not keep this"
            " column."
        )
    tables = {source.name: _table(source, job.frozen.job.access) for source in opened}
    images = {source.name for source in opened if isinstance(source, ParquetSource)}
    _check_unchanged(job, shards, {name: tables[name] for name in images})

    def stream() -> Iterator[tuple[list[str], Any]]:
        for source in opened:
            name, table = source.name, tables[source.name]
            if isinstance(source, TableSource):
                path = source.path_column(table.columns())
                for paths, labels in table.batches(path, column, any_bytes=True):
                    # A row without a path is no image that could be found by it.
                    yield [places.own_path(name, p) if p else "" for p in paths.to_pylist()], labels
                continue
            row = 0
            for (labels,) in table.batches(column):
                numbers = range(row, row + len(labels))
                yield [places.row_number(name, f"{number:08d}") for number in numbers], labels
                row += len(labels)

    def place(source: str, path: str) -> str:
        return (places.row_number if source in images else places.own_path)(source, path)

    names = next(filter(None, (table.class_names(column) for table in tables.values())), ())
    return Keyed(Entries(stream, codes), codes, place, names)


def _rows(job: OpenJob, shards: Sequence[Shard], column: str) -> Iterator[tuple[list[str], Any]]:
    """Yield keys of images, and their values in a column of the rows."""
    for _, table in job.tables(shards, ["source", "path", column]):
        rows = list(zip(table["source"].to_pylist(), table["path"].to_pylist(), strict=True))
        labels = table[column].combine_chunks().cast(pa.string())
        is_row = [bool(path) or not source.startswith("@") for source, path in rows]
        keys = zip(rows, is_row, strict=True)
        yield [places.own_path(*row) if named else "" for row, named in keys], labels


def _table(source: ParquetSource | TableSource, access: Access) -> Table:
    location = os.fsdecode(source.location)
    return Table(location, location, access)


def _check_unchanged(job: OpenJob, shards: Sequence[Shard], tables: dict[str, Table]) -> None:
    """Raise SourceError if a table of images is not the one that was listed."""
    positions = {source.name: position for position, source in enumerate(_opened(job))}
    numbers = {name: positions[name] for name in tables}
    for shard in shards:
        if not numbers:
            return
        first = {row.source: row.locator for row in reversed(job.rows(shard))}
        for name, position in list(numbers.items()):
            if position not in first:
                continue
            checksum = int.from_bytes(first[position][_LOCATOR_CHECKSUM], "big")
            if tables[name].checksum() != checksum:
                raise SourceError(
                    f"{name} was replaced since the job listed it, so its rows may be others."
                    " Give the labels in a file of their own: --truth @FILE.csv#path,label."
                )
            del numbers[name]


def of_cls(job: OpenJob, truth: Truth) -> Keyed:
    """Return the entries of the `.cls` members of the job's tar archives.

    Raises:
        UsageError: no source is a tar archive. SourceError: one cannot be read.
    """
    archives = [source for source in _opened(job) if isinstance(source, TarSource)]
    if not archives:
        raise UsageError(f"--truth {truth.text}: no source of the job is a tar archive.")

    def stream() -> Iterator[tuple[list[str], Any]]:
        for source in archives:
            members = list(source.texts(".cls"))
            texts = [places.sample_key(source.name, name) for name, _ in members]
            yield texts, pa.array([text for _, text in members], pa.string())

    codes = Codes(truth)
    return Keyed(Entries(stream, codes), codes, places.sample_key)


def _opened(job: OpenJob) -> list[Source]:
    frozen = job.frozen.job
    return open_all(frozen.sources, index_dir=job.paths.plan, access=frozen.access)
