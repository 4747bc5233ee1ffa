"""The plan: the frozen listing of a job's images, cut into shards, in listing order.

A plan has one or more generations. The first is the frozen job; `--append` adds further ones, each
in a folder of its own (`plan/000002/`). Shards and images are counted on from one to the next.

A generation is Parquet files with the columns `index`, `source`, `path` (bytes), `size`, `locator`
and `kept`, the values of `--keep`. Every row group is one shard. So the shards are known from the
files' footers, and a worker reads only the rows of its shard. The whole listing is never in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from imagemill.errors import OutputError
from imagemill.records import Entry, Shard
from imagemill.system.files import cannot_write, sync_file, sync_folder

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("source", pa.int32()),
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("locator", pa.binary()),
        ("kept", pa.binary()),
    ]
)
_SPOOL_SCHEMA = pa.schema([*list(SCHEMA)[1:], pa.field("group", pa.int32())])
_SPOOL_ROWS = 4_096
_SHARDS_PER_FILE = 200
"""A writer keeps about 8 KiB per shard until the file is closed, and a reader reads as much."""
_MIN_SHARD_SIZE, _MAX_SHARD_SIZE, _MAX_SHARDS = 32, 1_024, 10_000


class PlannedRow(Struct, frozen=True):
    """One row of the plan."""

    index: int
    source: int
    path: bytes
    size: int
    locator: bytes = b""
    kept: bytes = b""


class Listing(Struct, frozen=True):
    """The counts of a spooled listing."""

    images: int
    groups: int


def auto_shard_size(images: int, devices: int, least: int = _MIN_SHARD_SIZE) -> int:
    """Return how many images a shard has: an eighth of a device's share, between 32 and 1,024.
    Above ten million images shards are larger.
    """
    size = min(max(images // (8 * devices), least), _MAX_SHARD_SIZE)
    return max(size, -(-images // _MAX_SHARDS))


def spool(entries: Iterable[Entry], path: Path) -> Listing:
    """Write a listing to the file `path` as it arrives. Memory does not grow with it.

    Raises:
        OutputError: it cannot be written.
    """
    images, groups, group = 0, 0, -1
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])

    def flush(writer: pa.RecordBatchFileWriter) -> None:
        writer.write_batch(
            pa.record_batch(
                [pa.array(c, t.type) for c, t in zip(columns, _SPOOL_SCHEMA, strict=True)],
                schema=_SPOOL_SCHEMA,
            )
        )
        for column in columns:
            column.clear()

    try:
        with (
            pa.OSFile(os.fsencode(path), "wb") as file,
            pa.ipc.new_file(file, _SPOOL_SCHEMA) as writer,
        ):
            for entry in entries:
                for column, value in zip(
                    columns,
                    (entry.source, entry.path, entry.size, entry.locator, entry.kept, entry.group),
                    strict=True,
                ):
                    column.append(value)
                images += 1
                groups, group = groups + (entry.group != group), entry.group
                if len(columns[0]) == _SPOOL_ROWS:
                    flush(writer)
            flush(writer)
    except OSError as error:
        raise cannot_write(path, error) from error
    return Listing(images, groups)


def cut(
    spooled: Path,
    folder: Path,
    shard_size: int,
    *,
    by_group: bool,
    first: int = 0,
    kept: bytes | bytearray | None = None,
) -> None:
    """Cut a spooled listing into shards in `folder`.

    Files are named `plan-GGGGG-NNNNN.parquet` by group and order, so that sorting the names gives
    the listing order.

    Args:
        spooled: the file that `spool` wrote.
        folder: of the generation.
        shard_size: images per shard.
        by_group: whether shards also end where a group ends.
        first: index of the first image.
        kept: a byte for each image of the listing, 1 if it is planned; None: all are.

    Raises:
        OutputError: it cannot be written.
    """
    writer: pq.ParquetWriter | None = None
    opened: pa.OSFile | None = None
    shards_in_file = files = 0
    index, group = first, -1

    def close() -> None:
        nonlocal writer, opened
        if writer is not None and opened is not None:
            writer.close()
            opened.close()
            writer = opened = None

    def write_shard(rows: pa.Table) -> None:
        nonlocal writer, opened, shards_in_file, files, index
        if writer is None or shards_in_file == _SHARDS_PER_FILE:
            close()
            path = folder / f"plan-{max(group, 0):05d}-{files:05d}.parquet"
            opened = pa.OSFile(os.fsencode(path), "wb")  # the folder's name may not be UTF-8
            writer = pq.ParquetWriter(opened, SCHEMA, compression="zstd")
            files, shards_in_file = files + 1, 0
        count = rows.num_rows
        numbered = rows.select(SCHEMA.names[1:]).add_column(
            0, "index", pa.array(range(index, index + count), pa.int64())
        )
        writer.write_table(numbered, row_group_size=count)
        shards_in_file, index = shards_in_file + 1, index + count

    try:
        # Not mapped: pages of a mapping count as ours, and there may be gigabytes of them.
        with pa.OSFile(os.fsencode(spooled)) as file:
            pending = _SPOOL_SCHEMA.empty_table()
            for run_group, rows in _runs(pa.ipc.open_file(file), kept, by_group=by_group):
                if run_group != group:
                    if pending.num_rows:
                        write_shard(pending)
                        pending = _SPOOL_SCHEMA.empty_table()
                    close()
                    group = run_group
                pending = pa.concat_tables([pending, rows]).combine_chunks()
                start = 0
                while pending.num_rows - start >= shard_size:
                    write_shard(pending.slice(start, shard_size))
                    start += shard_size
                pending = pending.slice(start)
            if pending.num_rows:
                write_shard(pending)
            close()
        for path in folder.glob("plan-*.parquet"):
            sync_file(path)
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _runs(
    reader: pa.RecordBatchFileReader, kept: bytes | bytearray | None, *, by_group: bool
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the planned images of the listing in order, as tables of one group each."""
    for number in range(reader.num_record_batches):
        table = pa.Table.from_batches([reader.get_batch(number)])
        if kept is not None:
            place = number * _SPOOL_ROWS
            mask = kept[place : place + table.num_rows]
            if 1 not in mask:
                continue
            table = table.filter(pa.array(map(bool, mask), pa.bool_()))
        if not by_group:
            yield 0, table
            continue
        groups = table["group"].to_pylist()
        start = 0
        for end in range(1, len(groups) + 1):
            if end == len(groups) or groups[end] != groups[start]:
                yield groups[start], table.slice(start, end - start)
                start = end


def spooled_rows(spooled: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield source, path and size of each image of a spooled listing."""
    with pa.OSFile(os.fsencode(spooled)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            columns = (batch[name].to_pylist() for name in ("source", "path", "size"))
            yield from zip(*columns, strict=True)


def spooled_row(spooled: Path, number: int) -> tuple[int, bytes]:
    """Return source and path of one image of a spooled listing."""
    with pa.OSFile(os.fsencode(spooled)) as file:
        batch = pa.ipc.open_file(file).get_batch(number // _SPOOL_ROWS)
        row = batch.slice(number % _SPOOL_ROWS, 1)
        return row["source"][0].as_py(), row["path"][0].as_py()


def shards(folder: Path, answer_ids: Sequence[str] = ("",)) -> list[Shard]:
    """Return every shard of the plan, in order, from the footers of its files.

    Args:
        folder: of the first generation; further ones are below it.
        answer_ids: of each generation, as `Shard.answer_id`.

    Raises:
        OutputError: a plan file is damaged or missing.
    """
    found: list[Shard] = []
    first = 0
    for number, answer_id in enumerate(answer_ids, 1):
        below = "" if number == 1 else f"{number:06d}/"
        for path in sorted((folder / below).glob("plan-*.parquet")):
            metadata = _metadata(path)
            name, group = f"{below}{path.name}", int(path.name.split("-")[1])
            for row_group in range(metadata.num_row_groups):
                count = metadata.row_group(row_group).num_rows
                found.append(Shard(len(found), first, count, group, name, row_group, answer_id))
                first += count
    return found


def sources_of(folder: Path, shards: Iterable[Shard]) -> set[int]:
    """Return the positions of the sources that shards have images of, from the footers of the
    plan's files. Positions between two of one shard's are taken for its sources too.
    """
    found: set[int] = set()
    for name, in_file in groupby(shards, lambda shard: shard.plan_file):
        metadata = _metadata(folder / name)
        for shard in in_file:
            column = metadata.row_group(shard.row_group).column(SCHEMA.get_field_index("source"))
            found.update(range(column.statistics.min, column.statistics.max + 1))
    return found


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        with pa.OSFile(os.fsencode(path)) as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"{path} is damaged: {error}. The plan cannot be rebuilt; start again in another --output."
    )


def read(folder: Path, shard: Shard) -> list[PlannedRow]:
    """Return the rows of one shard. Raises: OutputError."""
    path = folder / shard.plan_file
    try:
        with pa.OSFile(os.fsencode(path)) as opened, pq.ParquetFile(opened) as file:
            table = file.read_row_group(shard.row_group).select(SCHEMA.names)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    columns = (table[name].to_pylist() for name in SCHEMA.names)
    return [PlannedRow(*row) for row in zip(*columns, strict=True)]


def rows(folder: Path) -> Iterator[PlannedRow]:
    """Yield the rows of a job's first generation. Raises: OutputError."""
    for shard in shards(folder):
        yield from read(folder, shard)
