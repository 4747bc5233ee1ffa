"""A Parquet file with images in it, `FILE.parquet` or `FILE.parquet#COLUMN`: one image a row, as
bytes in a column.

The column is a struct with `bytes` and `path`, as 🤗 datasets write it, or plain binary. A row's
path is its number and, after a slash, its name in the table: `00000017/cat.jpg`. Its locator holds
row group, row, and the checksum of the footer it was listed from, so that no image of another table
is read under these names.

Within a row group Parquet can only be read forward, in batches, and the last batches are kept for
threads that are behind. docs/sources.md says what that costs.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import heapq
import json
import math
import os
import stat
import struct
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from imagemill.errors import SourceError, counted
from imagemill.pipeline.sources import locations
from imagemill.pipeline.sources.base import Skipped, matcher, shown, too_large
from imagemill.pipeline.sources.files import retried
from imagemill.pipeline.sources.kept import NOTHING, Keeper
from imagemill.records import AS_GIVEN, Access, BadImage, Entry, Filters, KeptType, Status
from imagemill.system import storage

_KNOWN_NAMES = (
    "image img images image photo jpg jpeg png webp bytes image_bytes img_bytes image_data data"
    " content".split()
)
"""Names that a column of images goes by."""
_LOCATOR = struct.Struct(">III")
"""Row group, row in it, CRC-32 of the footer; so that locators sort as the rows do."""
_BATCH_BYTES = 4 * 2**20
_KEPT_BYTES = 32 * 2**20
_DICTIONARY_ROWS = 32
"""Rows of a batch that may be one large image each time, as in tables of questions about images."""
_BUFFER_BYTES = 4 * 2**20
_LISTED_ROWS = 4_096
_KEPT_ROWS = 1_024
"""Read at once of the kept columns, whose texts may be long."""
_OPEN_TABLES, _OPEN_ROW_GROUPS = 2, 2


@dataclass(eq=False)
class ParquetSource:
    """A Parquet file whose rows hold images, or paths or URLs of images."""

    position: int
    """Of the source in the command."""
    location: bytes
    """Path or URL of the table."""
    column: str | None = None
    """Which one holds the images; None: it is found by its name and type."""
    access: Access = AS_GIVEN
    """Where the table is now, and how images beside it are asked for."""
    keeper: Keeper = NOTHING
    """Packs the columns that are kept."""

    def __post_init__(self) -> None:
        column = f"#{self.column}" if self.column is not None else ""
        self.name = shown(self.location) + column

    def entries(self, filters: Filters, skipped: Skipped) -> Iterator[Entry]:
        """Yield the rows. Only the footer is read, the names if the table has them, and the columns
        that are kept; the sizes are not known.
        """
        wanted = matcher(filters)
        with opening(self.name, self.access.at(self.location)) as opened:
            column = image_column(opened.file.schema_arrow, self.name, self.column)
            kept = kept_columns(opened.file.schema_arrow, self.name, self.keeper)
            row = 0
            for group in range(opened.file.metadata.num_row_groups):
                rows = opened.file.metadata.row_group(group).num_rows
                names = opened.values(group, column.path) if column.path else repeat(None, rows)
                packed = opened.kept(group, kept, self.name, self.keeper)
                for number, (name, values) in enumerate(zip(names, packed, strict=True)):
                    path = b"%08d" % row + (b"/" + name if name else b"")
                    row += 1
                    if wanted(name or path):
                        yield Entry(
                            self.position,
                            path,
                            -1,
                            locator=_LOCATOR.pack(group, number, opened.checksum),
                            kept=values,
                        )
                    else:
                        skipped.by_filter += 1

    def fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:
        """Return the bytes of a row's image, in the table or at the path that it holds."""
        return retried(
            lambda: self._fetch(path, locator, max_bytes), "the table was listed but is gone"
        )

    def _fetch(self, path: bytes, locator: bytes, max_bytes: int) -> bytes:
        group, row, checksum = _LOCATOR.unpack(locator)
        with _OPENING:  # so that threads that fetch at once share one table
            table = _table(self.access.at(self.location), self.column, self.name)
        image = table.image(group, row, checksum)
        if image is None:
            name = path.partition(b"/")[2]
            if not name:
                raise BadImage(Status.MISSING, "the table has neither bytes nor a path in this row")
            return locations.fetch_beside(self.location, name, max_bytes, self.access)
        if image.size > max_bytes:
            raise too_large(image.size, max_bytes)
        data: bytes = image.to_pybytes()
        return data


# ── which column ──────────────────────────────────────────────────────────────────────────────────


class ImageColumn(Struct, frozen=True):
    """Where in a table the images are."""

    data: str
    """Dotted name of the column of bytes."""
    path: str | None
    """Dotted name of the column with their names."""


def image_column(schema: Any, name: str, asked: str | None) -> ImageColumn:
    """Find the column of images.

    Args:
        schema: of the table, a `pyarrow.Schema`.
        name: of the source, for messages.
        asked: the column that the user named; None: the one that 🤗 datasets noted as images, else
        the one whose type and name fit.

    Raises:
        SourceError: there is none, or several.
    """
    kinds = {field.name: plain_type(field.type) for field in schema}
    held = ", ".join(f"{column} ({format_type(kind)})" for column, kind in kinds.items())
    if len(kinds) < len(schema):
        raise SourceError(
            f"source {name} has two columns of one name, so neither can be chosen:"
            f" {', '.join(schema.names)}."
        )
    if asked is not None and asked not in kinds:
        raise SourceError(f"source {name}: the table has no column {asked!r}. Its columns: {held}.")
    fitting = (
        [asked]
        if asked is not None
        else _noted_as_images(schema) or [key for key, kind in kinds.items() if has_bytes(kind)]
    )
    if not fitting:  # the error names the type of the column
        fitting = [column for column in _KNOWN_NAMES if column in kinds][:1]
    if not fitting:
        raise SourceError(
            f"source {name} has no column of image bytes. Its columns: {held}. A column of paths is"
            f" read with @{name}#COLUMN."
        )
    known = [column for column in fitting if column in _KNOWN_NAMES]
    if len(fitting) > 1 and len(known) != 1 and "image" not in known:
        raise SourceError(
            f"source {name} has several columns that may be images: {', '.join(fitting)}. Name one:"
            f" {name}#{fitting[0]}."
        )
    chosen = fitting[0] if len(fitting) == 1 else "image" if "image" in known else known[0]
    kind = kinds[chosen]
    bare = name.removesuffix(f"#{asked}") if asked is not None else name
    if is_text(kind):
        raise SourceError(
            f"source {name}: column {chosen!r} holds text, not the bytes of images. If these are"
            f" paths: @{bare}#{chosen}."
        )
    if not has_bytes(kind):
        raise SourceError(
            f"source {name}: column {chosen!r} holds {format_type(kind)}, not the bytes of images."
            f" Its columns: {held}."
        )
    if not pa.types.is_struct(kind):
        return ImageColumn(chosen, None)
    has_path = kind.get_field_index("path") >= 0 and is_text(plain_type(kind.field("path").type))
    return ImageColumn(f"{chosen}.bytes", f"{chosen}.path" if has_path else None)


def _noted_as_images(schema: Any) -> list[str]:
    """The columns that 🤗 datasets call `Image` in what they note about a table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [
            column
            for column, feature in features.items()
            if feature.get("_type") == "Image" and column in schema.names
        ]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


# ── types of columns ──────────────────────────────────────────────────────────────────────────────


def plain_type(kind: Any) -> Any:
    """Return a column's type without its dictionary or extension."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def is_text(kind: Any) -> bool:
    """Return whether a type is text, of whatever width."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_bytes(kind: Any) -> bool:
    """Return whether a type is bytes, of whatever width."""
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def has_bytes(kind: Any) -> bool:
    """Return whether a type can hold images: bytes, or a struct with such a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return is_bytes(plain_type(kind.field("bytes").type))
    return is_bytes(kind)


def format_type(kind: Any) -> str:
    """Return a type's name for messages."""
    if pa.types.is_struct(kind):
        return f"struct of {', '.join(field.name for field in kind)}"
    return str(kind)


def kept_columns(schema: Any, name: str, keeper: Keeper) -> dict[str, Any]:
    """Return the kept columns of a table with the Arrow types that their values are cast to.

    Whole numbers become int64, floats double, and what has a text form but no such type, such as
    timestamps and decimals, text.

    Raises:
        SourceError: a column holds bytes or is nested, or has another type in another source.
    """
    found = {}
    for column in keeper.add_columns(f"source {name}", schema.names):
        kind = plain_type(schema.field(column).type)
        if is_bytes(kind) or not _has_text_form(kind):
            raise SourceError(
                f"--keep {column}: source {name} holds {format_type(kind)} there. Only text,"
                " numbers and booleans can be kept."
            )
        found[column] = pa.string()
        if pa.types.is_null(kind):
            continue
        kept = KeptType.TEXT
        if pa.types.is_boolean(kind):
            kept = KeptType.BOOLEAN
        elif pa.types.is_integer(kind) and kind != pa.uint64():
            kept = KeptType.WHOLE
        elif pa.types.is_floating(kind):
            kept = KeptType.FLOAT
        keeper.add_type(f"source {name}", column, kept)
        found[column] = pa.type_for_alias(kept.value)
    return found


def _has_text_form(kind: Any) -> bool:
    """Return whether Arrow can write the values of a type as text, which lists cannot be."""
    try:
        pa.array([], kind).cast(pa.string())
    except pa.ArrowException:
        return False
    return True


def plain_values(array: Any, goal: Any) -> list[Any]:
    """Return the values of a column as one of the types of `kept_columns`."""
    array = plain_array(array)
    if pa.types.is_string(goal) and is_text(array.type):
        texts = array.cast(pa.large_binary()).to_pylist()  # perhaps not UTF-8
        return [
            None if text is None else text.decode("utf-8", "backslashreplace") for text in texts
        ]
    found: list[Any] = array.cast(goal).to_pylist()
    return found


def plain_array(array: Any) -> Any:
    """Return a column without its dictionary or extension."""
    if isinstance(array.type, pa.BaseExtensionType):
        return plain_array(array.storage)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


# ── an open table ─────────────────────────────────────────────────────────────────────────────────


class OpenTable:
    """A Parquet file opened for reading forward; nothing of it is mapped or read ahead. Raises:
    OSError, ArrowException.
    """

    def __init__(self, location: bytes) -> None:
        if storage.is_url(location):
            with _patient():
                blob = storage.open_blob(location)
            self._bytes: Any = pa.PythonFile(_BlobReader(blob), mode="r")
        else:
            if not stat.S_ISREG(os.stat(location).st_mode):  # noqa: PTH116 - bytes; a FIFO would be waited for
                raise OSError(errno.EINVAL, "is not a regular file")
            self._bytes = pa.OSFile(location)
        self.checksum = self._footer_checksum()
        """CRC-32 of the footer, which names the places, sizes and bounds of everything in the
        file.
        """
        self.file: Any = pq.ParquetFile(self._bytes, pre_buffer=False, buffer_size=_BUFFER_BYTES)

    def __enter__(self) -> OpenTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._bytes.close()

    def _footer_checksum(self) -> int:
        size = self._bytes.size()
        self._bytes.seek(max(0, size - 8))
        end = self._bytes.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] not in (b"PAR1", b"PARE") or length + 12 > size:
            raise pa.ArrowInvalid("it has no Parquet footer, so it is cut short or no Parquet file")
        self._bytes.seek(size - 8 - length)
        return zlib.crc32(self._bytes.read(length))

    def _record_batches(self, group: int, columns: list[str], rows: int) -> Iterator[Any]:
        """Yield the rows of one row group, as many as the footer says, `rows` at a time. Raises:
        OSError, ArrowException.
        """
        left = self.file.metadata.row_group(group).num_rows
        for batch in self.file.iter_batches(
            batch_size=rows, row_groups=[group], columns=columns, use_threads=False
        ):
            yield batch
            left -= batch.num_rows
        if left:
            values = counted(left, "value")
            raise pa.ArrowInvalid(f"row group {group} lacks {values} of {', '.join(columns)}")

    def batches(self, group: int, column: str, rows: int) -> Iterator[Any]:
        """One column of one row group, `rows` at a time, as arrays of bytes without struct,
        dictionary or extension.
        """
        for batch in self._record_batches(group, [column], rows):
            # `a` also brings a column `a.b`.
            is_whole = column in batch.schema.names
            array = batch.column(column if is_whole else column.rpartition(".")[0])
            if pa.types.is_struct(array.type):
                (array,) = array.flatten()
            array = plain_array(array)
            # Text that is not UTF-8 stays as it is.
            yield array if is_bytes(array.type) else array.cast(pa.large_binary())

    def values(self, group: int, column: str) -> Iterator[bytes | None]:
        """The values of one column of one row group. Raises: OSError, ArrowException."""
        for array in self.batches(group, column, _LISTED_ROWS):
            yield from array.to_pylist()

    def kept(
        self, group: int, columns: dict[str, Any], name: str, keeper: Keeper
    ) -> Iterator[bytes]:
        """Yield the packed values of each row of one row group.

        Args:
            group: its number.
            columns: as `kept_columns` returns them.
            name: of the source, for messages.
            keeper: packs them.

        Raises:
            OSError, ArrowException. SourceError: a value cannot be kept.
        """
        if not columns:
            yield from repeat(b"", self.file.metadata.row_group(group).num_rows)
            return
        for batch in self._record_batches(group, list(columns), _KEPT_ROWS):
            values = [plain_values(batch.column(column), goal) for column, goal in columns.items()]
            for row in zip(*values, strict=True):
                yield keeper.pack(f"source {name}", dict(zip(columns, row, strict=True)))


class _BlobReader(storage.BlobFile):
    """A blob for Arrow: without the copies that `io.RawIOBase` makes, and with failures that cannot
    be taken for damage.
    """

    def read(self, size: int = -1) -> bytes:
        """Return as many bytes as asked for, unless the blob ends."""
        with _patient():
            data = self._blob.read_at(self._at, size if size >= 0 else self._blob.size - self._at)
        self._at += len(data)
        return data


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Have failures of a store be none that may pass by themselves: its client has tried for long
    enough.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            errno.EPROTO if error.errno in (None, errno.EIO) else error.errno,
            error.strerror or str(error),
        ) from error


@contextlib.contextmanager
def opening(name: str, location: bytes) -> Iterator[OpenTable]:
    """Open a table to list it. Raises: SourceError, for whatever goes wrong with it in there."""
    try:
        with OpenTable(location) as opened:
            yield opened
    except (OSError, pa.ArrowException) as error:
        what = "cannot be read" if _is_failure(error) else "is damaged"
        raise SourceError(
            f"source {name} {what}: {_reason(error)}. Give a whole Parquet file, or leave it out."
        ) from error


def _is_failure(error: BaseException) -> bool:
    """Whether reading failed, and what was read is not at fault: Arrow's own complaints have no
    number.
    """
    return isinstance(error, pa.ArrowMemoryError) or (
        isinstance(error, OSError) and error.errno is not None
    )


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


class _RowGroup:
    """The images of one row group, read forward as far as was asked for; the last few batches are
    kept.
    """

    def __init__(self, opened: OpenTable, group: int, column: str) -> None:
        self._opened, self._group, self._column = opened, group, column
        about = opened.file.metadata.row_group(group)
        leaves = [about.column(leaf) for leaf in range(about.num_columns)]
        leaves = [leaf for leaf in leaves if leaf.path_in_schema == column]
        size = sum(leaf.total_uncompressed_size for leaf in leaves)
        self._batch_rows = min(max(_BATCH_BYTES * about.num_rows // max(size, 1), 1), 1_024)
        if any(leaf.has_dictionary_page for leaf in leaves):  # values may be stored once for many
            self._batch_rows = min(self._batch_rows, _DICTIONARY_ROWS)
        self._begin()

    def _begin(self) -> None:
        self._damage: str | None = None
        self._coming = self._opened.batches(self._group, self._column, self._batch_rows)
        self._kept: deque[tuple[int, Any]] = deque()
        self._next = 0

    def at(self, row: int) -> Any:
        """One image as an Arrow buffer; None where it is null. Raises: BadImage where the table is
        damaged; OSError, ArrowException.
        """
        if self._kept and row < self._kept[0][0]:
            # a thread that is further behind than what is kept, or rows in another order
            self._begin()
        while row >= self._next:
            if self._damage is not None:
                raise BadImage(Status.CORRUPT, self._damage)
            try:
                batch = next(self._coming, None)
            except (OSError, pa.ArrowException) as error:
                if _is_failure(error):
                    raise
                self._damage = (
                    f"the table is damaged from row {self._next} of row group {self._group} on:"
                    f" {_reason(error)}"
                )
                continue
            if batch is None:  # an error that is no damage, such as a lack of memory, ended it
                self._begin()
                continue
            self._kept.append((self._next, batch))
            self._next += len(batch)
            while len(self._kept) > 2 and sum(kept.nbytes for _, kept in self._kept) > _KEPT_BYTES:
                self._kept.popleft()
        first, batch = next(item for item in self._kept if row < item[0] + len(item[1]))
        return batch[row - first].as_buffer()


class _Table:
    """One table as this process reads it. Safe to use from many threads, which are served in the
    order of their rows.
    """

    def __init__(self, location: bytes, column: str | None, name: str) -> None:
        self._location, self._asked, self._name = location, column, name
        self._opened: OpenTable | None = None
        self._column = ""
        self._groups: OrderedDict[int, _RowGroup] = OrderedDict()
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, int]] = []
        self._busy = False
        self._failed_at, self._failure = -math.inf, (0, "")

    def image(self, group: int, row: int, checksum: int) -> Any:
        """The bytes in one row as an Arrow buffer; None where it is null. Raises: BadImage; OSError
        where reading failed.
        """
        asked = time.monotonic()
        with self._turn((group, row, threading.get_ident())):
            if self._failed_at > asked:
                # Or all who waited would try in turn, each as long as a store is waited for.
                raise OSError(*self._failure)
            try:
                return self._row_group(group, checksum).at(row)
            except (OSError, pa.ArrowException, SourceError) as error:
                self._opened = None
                self._groups.clear()
                if not _is_failure(error):
                    raise BadImage(
                        Status.READ_ERROR,
                        f"the table was changed since it was listed: {_reason(error)}",
                    ) from error
                number = getattr(error, "errno", None) or errno.ENOMEM
                self._failed_at, self._failure = (
                    time.monotonic(),
                    (number, f"the table: {_reason(error)}"),
                )
                raise OSError(*self._failure) from error

    @contextlib.contextmanager
    def _turn(self, place: tuple[int, int, int]) -> Iterator[None]:
        """Wait until nobody else reads and none of those who wait wants an earlier row.

        A plain lock is unfair: of eight threads that did nothing but fetch, one fell behind what is
        kept every 400 rows, and the row group was begun again.
        """
        with self._changed:
            heapq.heappush(self._waiting, place)
            self._changed.wait_for(lambda: not self._busy and self._waiting[0] == place)
            heapq.heappop(self._waiting)
            self._busy = True
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _row_group(self, group: int, checksum: int) -> _RowGroup:
        if self._opened is None or self._opened.checksum != checksum:
            self._groups.clear()
            self._column = ""
            self._opened = OpenTable(self._location)
        if self._opened.checksum != checksum:
            raise BadImage(
                Status.READ_ERROR,
                "the table was replaced since it was listed: its footer is another",
            )
        if not self._column:
            self._column = image_column(
                self._opened.file.schema_arrow, self._name, self._asked
            ).data
        if group not in self._groups:
            self._groups[group] = _RowGroup(self._opened, group, self._column)
        self._groups.move_to_end(group)
        if len(self._groups) > _OPEN_ROW_GROUPS:
            self._groups.popitem(last=False)
        return self._groups[group]


_OPENING = threading.Lock()


_table = functools.lru_cache(maxsize=_OPEN_TABLES)(_Table)
"""Returns a table, opened when the first image is fetched. A process keeps few open."""
