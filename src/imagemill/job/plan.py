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
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from imagemill.errors import OutputError
from imagemill.records import Entry, Shard
from imagemill.system.files import sync, writing

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
    values = map(attrgetter(*_SPOOL_SCHEMA.names), entries)
    with (
        writing(path),
        pa.OSFile(os.fsencode(path), "wb") as file,
        pa.ipc.new_file(file, _SPOOL_SCHEMA) as writer,
    ):
        while rows := list(islice(values, _SPOOL_ROWS)):
            arrays = list(map(pa.array, zip(*rows, strict=True), _SPOOL_SCHEMA.types))
            writer.write_batch(pa.record_batch(arrays, schema=_SPOOL_SCHEMA))
            images += len(rows)
            for *_, group_of_row in rows:
                groups, group = groups + (group_of_row != group), group_of_row
            rows.clear()  # before the next ones are read
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
    index = first
    # Not mapped: pages of a mapping count as ours, and there may be gigabytes of them.
    with writing(folder), pa.OSFile(os.fsencode(spooled)) as listing:
        shards = _shards(pa.ipc.open_file(listing), kept, shard_size, by_group=by_group)
        in_files = groupby(shards, lambda shard: (shard[0], shard[1] // _SHARDS_PER_FILE))
        for number, ((group, _), in_file) in enumerate(in_files):
            path = folder / f"plan-{group:05d}-{number:05d}.parquet"
            with (
                pa.OSFile(os.fsencode(path), "wb") as file,  # its name may not be UTF-8
                pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
            ):
                for _, _, rows in in_file:
                    count = rows.num_rows
                    indices = pa.array(range(index, index + count), pa.int64())
                    columns = rows.select(SCHEMA.names[1:]).add_column(0, "index", indices)
                    writer.write_table(columns, row_group_size=count)
                    index += count
            sync(path)
        sync(folder)


def _shards(
    reader: pa.RecordBatchFileReader,
    kept: bytes | bytearray | None,
    shard_size: int,
    *,
    by_group: bool,
) -> Iterator[tuple[int, int, pa.Table]]:
    """Yield the group of each shard, its number in the group, and its images."""
    for group, runs in groupby(_runs(reader, kept, by_group=by_group), lambda run: run[0]):
        number, pending = 0, _SPOOL_SCHEMA.empty_table()
        for _, rows in runs:
            pending = pa.concat_tables([pending, rows]).combine_chunks()
            while pending.num_rows >= shard_size:
                yield group, number, pending.slice(0, shard_size)
                number, pending = number + 1, pending.slice(shard_size)
        if pending.num_rows:
            yield group, number, pending


def _runs(
    reader: pa.RecordBatchFileReader, kept: bytes | bytearray | None, *, by_group: bool
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the planned images of the listing in order, as tables of one group each."""
    for number in range(reader.num_record_batches):
        table = pa.Table.from_batches([reader.get_batch(number)])
        if kept is not None:
            place = number * _SPOOL_ROWS
            mask = kept[place : place + table.num_rows]
            table = table.filter(pa.array(map(bool, mask), pa.bool_()))
        start = 0
        for group, run in groupby(table["group"].to_pylist() if by_group else [0] * len(table)):
            count = len(list(run))
            yield group, table.slice(start, count)
            start += count


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
    if isinstance(error, FileNotFoundError):
        return OutputError(
            f"{path} is missing. If the output was moved or its disk unmounted, bring it back and"
            " repeat the command. The plan cannot be rebuilt."
        )
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
