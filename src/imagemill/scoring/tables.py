"""Columns of CSV, TSV and Parquet files, a batch of rows at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
from msgspec import Struct

from imagemill.errors import ImagemillError, SourceError, UsageError
from imagemill.pipeline.sources import locations, parquet
from imagemill.pipeline.sources.table import SEPARATORS
from imagemill.records import AS_GIVEN, Access

_ROWS = 65_536
_BLOCK_BYTES = 4 * 2**20


class Table(Struct, frozen=True):
    """A CSV, TSV or Parquet file."""

    name: str
    """As messages show it."""
    location: str
    """Path or URL."""
    access: Access = AS_GIVEN

    def columns(self) -> list[str]:
        """Return the names of the columns. Raises: SourceError."""
        with self._errors():
            if self._separator is None:
                with self._open_parquet() as opened:
                    return list(opened.file.schema_arrow.names)
            with self._open_text() as lines:
                header = next(csv.reader(lines, delimiter=self._separator), None)
        if not header:
            raise SourceError(f"{self.name} is empty. Its first line must name its columns.")
        return header

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return the names that 🤗 datasets notes for the numbers in a column; () if there are
        none.
        """
        if self._separator is not None:
            return ()
        with self._errors(), self._open_parquet() as opened:
            metadata = opened.file.schema_arrow.metadata or {}
        try:
            feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
            return tuple(map(str, feature.get("feature", feature)["names"]))
        except (KeyError, ValueError, TypeError, AttributeError):
            return ()

    def checksum(self) -> int:
        """Return the CRC-32 of a Parquet file's footer."""
        with self._errors(), self._open_parquet() as opened:
            return opened.checksum

    def batches(self, *columns: str, any_bytes: bool = False) -> Iterator[list[Any]]:
        """Yield some columns, as string arrays or lists of strings; row numbers are consecutive.

        Args:
            columns: their names.
            any_bytes: show bytes that are not UTF-8 as `\\xNN`, instead of raising.

        Raises:
            SourceError: the file cannot be read, a column is missing or twice, or a text is not
                UTF-8.
        """
        header = self.columns()
        for column in columns:
            if header.count(column) != 1:
                how_many = "has no column" if column not in header else "has several columns"
                raise SourceError(
                    f"{self.name} {how_many} {column!r}. Its columns:"
                    f" {', '.join(map(repr, header))}."
                )
        names = {column: self.class_names(column) for column in columns}
        start = 0
        with self._errors():
            for batch in self._read(columns):
                yield [
                    self._texts(batch.column(column), start, names[column], any_bytes=any_bytes)
                    for column in columns
                ]
                start += batch.num_rows

    def _read(self, columns: Sequence[str]) -> Iterator[Any]:
        if self._separator is None:
            with self._open_parquet() as opened:
                yield from opened.file.iter_batches(
                    batch_size=_ROWS, columns=list(dict.fromkeys(columns)), use_threads=False
                )
            return
        with self._open_text() as lines:
            encoding = lines.encoding
        with locations.open_bytes(self._at, self.access.user_agent) as raw:
            yield from pv.open_csv(
                pa.PythonFile(raw, mode="r"),
                pv.ReadOptions(
                    use_threads=False,
                    block_size=_BLOCK_BYTES,
                    encoding="utf8" if encoding == "utf-8-sig" else encoding,
                ),
                pv.ParseOptions(delimiter=self._separator, newlines_in_values=True),
                pv.ConvertOptions(
                    include_columns=list(dict.fromkeys(columns)),
                    column_types=dict.fromkeys(columns, pa.binary()),
                ),
            )

    def _texts(self, array: Any, start: int, names: tuple[str, ...], *, any_bytes: bool) -> Any:
        """Return values as strings: whole numbers without a decimal point, numbers with names by
        their names, and lists as lists of strings.
        """
        array = parquet.plain_array(array)
        kind = array.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            texts = self._texts(array.flatten(), start, names, any_bytes=any_bytes)
            ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(array), 0).cast(pa.int32()))
            offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
            return pa.ListArray.from_arrays(offsets, texts)
        if pa.types.is_floating(kind) and pc.all(pc.equal(pc.round(array), array)).as_py():
            array = array.cast(pa.int64(), safe=False)  # pandas' numbers in a column with gaps
        if names and pa.types.is_integer(array.type):
            known = pc.and_(pc.greater_equal(array, 0), pc.less(array, len(names)))
            named = pa.array(names).take(pc.if_else(known, array, None))
            return pc.coalesce(named, array.cast(pa.string()))
        try:
            return array.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if not parquet.is_bytes(kind):
                raise SourceError(
                    f"{self.name}: a column of {parquet.format_type(kind)} holds no labels or"
                    " paths."
                ) from error
        if any_bytes:
            return pa.array(_shown(value) for value in array.to_pylist())
        row, value = next(
            (row, value)
            for row, value in zip(count(start + 1), array.to_pylist(), strict=False)
            if value is not None and not _is_utf8(value)
        )
        raise SourceError(
            f"{self.name} is not UTF-8: row {row:,} has {_shown(value)!r}. Save it as UTF-8."
        )

    @property
    def _separator(self) -> str | None:
        """The mark between cells; None for Parquet."""
        return SEPARATORS.get(self.location[-4:].lower().encode())

    @property
    def _at(self) -> bytes:
        return self.access.at(self.location.encode("utf-8", "surrogateescape"))

    def _open_text(self) -> Any:
        return locations.open_text(
            self.name, self.location.encode("utf-8", "surrogateescape"), self.access, ""
        )

    def _open_parquet(self) -> parquet.OpenTable:
        return parquet.OpenTable(self._at)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn whatever goes wrong while reading into one line."""
        try:
            yield
        except (UsageError, SourceError) as error:
            raise type(error)(str(error).removeprefix("source ")) from error
        except ImagemillError:
            raise
        except (OSError, ValueError, pa.ArrowException, csv.Error) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
            raise SourceError(f"{self.name} cannot be read: {reason}.") from error


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")
