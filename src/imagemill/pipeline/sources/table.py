"""A list of images in a table, `@FILE.csv`, `@FILE.tsv` or `@FILE.parquet`: a path or URL in each
row of one column.

`@FILE.csv#COLUMN` names the column. Relative paths are relative to the table's own folder, as in a
list of lines. CSV is UTF-8 with a header; bytes that are not UTF-8 stay as they are, for names that
are not either. An empty cell is a `missing` row: none is lost.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from imagemill.errors import SourceError, counted
from imagemill.pipeline.sources import locations
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES, Skipped, matcher, shown
from imagemill.pipeline.sources.kept import NOTHING, Keeper
from imagemill.records import AS_GIVEN, Access, BadImage, Entry, Filters, KeptType, Status
from imagemill.system import storage

SEPARATORS = {b".csv": ",", b".tsv": "\t"}
PATH_COLUMNS = (
    "path file_path filepath file filename file_name image_path image_file img_path url image_url"
    " uri image".split()
)
"""Names that a column of paths goes by; the first that is there is taken."""
_LONGEST_CELL = 2**24
"""Characters of a cell of a text file. With a quote too many, the rest of the file is one cell."""
_COLUMN = re.compile(r"(.+?\.(?:parquet|csv|tsv))#(.+)", re.IGNORECASE | re.DOTALL)


def split_column(location: str) -> tuple[str, str | None]:
    """`FILE.parquet#COLUMN` as file and column; what has no such ending, or is there with it, is a
    file alone.
    """
    match = _COLUMN.fullmatch(location)
    if match is None or (not storage.is_url(location) and os.path.lexists(location)):
        return location, None
    return match[1], match[2]


def is_table(location: str) -> bool:
    """Whether a list of images is a table, by its suffix."""
    return location.lower().endswith((".csv", ".tsv", ".parquet"))


@dataclass(eq=False)
class TableSource:
    """A CSV or Parquet table of paths and URLs. Each row is planned, whatever its suffix."""

    position: int
    """Of the source in the command."""
    location: bytes
    """Path or URL of the table."""
    column: str | None = None
    """Which one holds the paths; None: the only one, or one that goes by a known name."""
    access: Access = AS_GIVEN
    """Where table and images are now, and how they are asked for."""
    keeper: Keeper = NOTHING
    """Packs the columns that are kept."""

    def __post_init__(self) -> None:
        column = f"#{self.column}" if self.column is not None else ""
        self.name = "@" + shown(self.location) + column

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the rows in the order of the table; their sizes are not known."""
        wanted = matcher(filters)
        suffix = self.location[-4:].lower()
        cells = (
            self._from_text(SEPARATORS[suffix]) if suffix in SEPARATORS else self._from_parquet()
        )
        for row, (cell, kept) in enumerate(cells, 1):
            if not cell:
                yield Entry(self.position, b"", -1, locator=b"%d" % row, kept=kept)
                continue
            locations.check(self.location, cell, f"source {self.name}, row {row}")
            if wanted(cell):
                yield Entry(self.position, cell, -1, kept=kept)
            else:
                skipped.by_filter += 1

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:
        """Return the bytes of a row's image. The locator of an empty cell is its row's number."""
        if not path:
            raise BadImage(Status.MISSING, f"the table's cell is empty: row {locator.decode()}")
        return locations.fetch_beside(self.location, path, max_bytes, self.access)

    def _from_text(self, separator: str) -> Iterator[tuple[bytes, bytes]]:
        """Yield the column's cells of a CSV or TSV file, with the kept ones of their rows. A row of
        no cells is an empty line, and passed over.
        """
        remedy = "Give a table with a column of paths."
        # Python's own limit, 131,072, is the process's: it may rise, but no other code's may fall.
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
        with locations.listing(self.name, self.location, self.access, "", remedy) as lines:
            reader = csv.reader(lines, delimiter=separator, strict=True)
            try:
                yield from self._cells(reader)
            except csv.Error as error:
                raise SourceError(
                    f"source {self.name}, line {reader.line_num}: cannot be read: {error}. Correct"
                    " the line."
                ) from error

    def _cells(self, reader: Any) -> Iterator[tuple[bytes, bytes]]:
        header = next(reader, None)
        if not header:
            raise SourceError(f"source {self.name} is empty. Its first line must name its columns.")
        place = header.index(self.path_column(header))
        origin = f"source {self.name}"
        columns = self.keeper.add_columns(origin, header)
        kept = {column: header.index(column) for column in columns}
        for column in kept:
            self.keeper.add_type(origin, column, KeptType.TEXT)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise SourceError(
                    f"source {self.name}, line {reader.line_num}: has"
                    f" {counted(len(cells), 'cell')}, the header names"
                    f" {counted(len(header), 'column')}. Correct the line; cells that"
                    " hold a separator are quoted."
                )
            values = {column: cells[at] or None for column, at in kept.items()}
            path = cells[place].encode("utf-8", "surrogateescape")
            yield path, self.keeper.pack(origin, values)

    def _from_parquet(self) -> Iterator[tuple[bytes | None, bytes]]:
        """Yield the column's cells of a Parquet file, with the kept ones of their rows."""
        from imagemill.pipeline.sources import parquet  # brings pyarrow

        with parquet.opening(self.name, self.access.at(self.location)) as opened:
            schema: Any = opened.file.schema_arrow
            column = self.path_column(schema.names)
            kind = parquet.plain_type(schema.field(column).type)
            if not parquet.is_text(kind) and not parquet.is_bytes(kind):
                hint = (
                    f" If these are images: {self.name.removeprefix('@')}."
                    if parquet.has_bytes(kind)
                    else ""
                )
                raise SourceError(
                    f"source {self.name}: column {column!r} holds"
                    f" {parquet.format_type(kind)}, not paths.{hint}"
                )
            kept = parquet.kept_columns(schema, self.name, self.keeper)
            for group in range(opened.file.metadata.num_row_groups):
                yield from zip(
                    opened.values(group, column),
                    opened.kept(group, kept, self.name, self.keeper),
                    strict=True,
                )

    def path_column(self, columns: list[str]) -> str:
        """Return the column of paths among the columns of the table. Raises: SourceError."""
        held = ", ".join(map(repr, columns))
        if self.column is not None:
            found = self.column
        elif len(columns) == 1:
            found = columns[0]
            if (
                PurePosixPath(found).suffix.lower() in IMAGE_SUFFIXES
                or "/" in found
                or ";" in found
                or "\t" in found
            ):
                raise SourceError(
                    f"source {self.name}: its first line, {held}, looks like no column's name. The"
                    " first line must name the columns, set apart by commas in .csv and by tabs in"
                    " .tsv; a plain list of paths is named .txt."
                )
        else:
            found = next((name for name in PATH_COLUMNS if name in columns), "")
        if not found:
            raise SourceError(
                f"source {self.name} has several columns: {held}. Name the one of the paths:"
                f" {self.name}#{columns[0]}."
            )
        if columns.count(found) != 1:
            how_often = "has no column" if found not in columns else "has several columns"
            raise SourceError(
                f"source {self.name}: the table {how_often} {found!r}. Its columns: {held}."
            )
        return found
