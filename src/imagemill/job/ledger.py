"""The ledger: compares the parts with the plan.

It knows which shards are committed and what is in them, and proves that every image has exactly one
row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import OutputError, PartError, counted
from imagemill.job import documents, plan
from imagemill.job.columns import row_path
from imagemill.job.documents import Manifest, PartRecord
from imagemill.job.store import Store
from imagemill.records import Job, Receipt, Shard, Status
from imagemill.system import files, serialization

T = TypeVar("T")

MISSING = "is missing"
NOT_FINISHED = "is missing: the job is not finished"
"""Problems of a part, and of what is written when a job is finished."""

_ANSWER_ID = b"imagemill.answer_id"
_SHARD = b"imagemill.shard"
_EXTRA = re.compile(r"needs a package that is not installed: pip install 'imagemill\[(\w+)\]'")
"""Finds the extra in the error of an image that it would read."""


AsLine = Callable[[int, bytes], bytes | None]
"""Takes a source's position and a path in it.

Returns the line of a list that names this image; None if no line can.
"""


class Totals(Struct, frozen=True):
    """The sum over all parts."""

    images: int
    failed_by_status: Mapping[str, int] = {}
    unlisted: int = 0
    """Failed images that `failed.txt` cannot name, because they are in archives or tables."""
    extras: Mapping[str, int] = {}
    """Extras that would read failed images → how many."""

    @property
    def failed(self) -> int:
        """How many images have a status other than ok."""
        return sum(self.failed_by_status.values())


class Problem(Struct, frozen=True):
    """Something wrong that `verify` found."""

    shard: int | None
    path: Path
    what: str
    damaged: bool = False
    """The file exists but cannot be trusted; `verify --quarantine` moves it away."""


def existing_parts(store: Store) -> dict[int, Path]:
    """Return every existing part by shard number, whatever its content."""
    return store.paths.parts_among(store.names(store.paths.predictions))


def examine(store: Store, shard: int, receipt: Receipt | None = None) -> PartRecord:
    """Return what a part holds. Nothing is read if the receipt of its commit is given.

    Raises:
        PartError: the part cannot be read.
    """
    if receipt is not None:
        return PartRecord(receipt.rows, receipt.failed_by_status, receipt.sha256, receipt.bytes)
    path = store.paths.part(shard)
    try:
        data = store.read(path)
        statuses = Counter(
            pq.read_table(pa.BufferReader(data), columns=["status"], use_threads=False)[
                "status"
            ].to_pylist()
        )
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(store, path, error) from error
    rows = statuses.total()
    statuses.pop(Status.OK.value, None)
    return PartRecord(rows, dict(statuses), hashlib.sha256(data).hexdigest(), len(data))


def close(
    store: Store, shards: Sequence[Shard], job: Job, receipts: Iterable[Receipt], as_line: AsLine
) -> Totals:
    """Prove that every shard has its part with one row per image; write the manifest and the list
    of failed images. The arguments are those of `OpenJob.close`.
    """
    by_shard = {receipt.shard: receipt for receipt in receipts}
    parts: dict[str, PartRecord] = {}
    failed: Counter[str] = Counter()
    for shard in shards:
        path = store.paths.part(shard.number)
        if shard.number not in by_shard and (
            problem := _check_schema(store, shard, shard.answer_id or job.answer_id)
        ):
            raise _part_error(store, path, problem)
        record = examine(store, shard.number, by_shard.get(shard.number))
        if record.rows != shard.count:
            raise _part_error(
                store,
                path,
                f"has {counted(record.rows, 'row')}, its shard has {counted(shard.count, 'image')}",
            )
        parts[path.name] = record
        failed.update(record.failed_by_status)
    store.write(
        store.paths.manifest, serialization.encode(Manifest(job.plan_id, job.answer_id, parts))
    )
    listed, extras = 0, Counter[str]()

    def lines() -> Iterator[bytes]:
        nonlocal listed
        for line in failed_paths(store, shards, parts, as_line, extras):
            listed += 1
            yield line

    store.write(store.paths.failed_list, lines())
    return Totals(
        sum(shard.count for shard in shards),
        dict(sorted(failed.items())),
        failed.total() - listed,
        dict(sorted(extras.items())),
    )


def _part_error(store: Store, path: Path, problem: str) -> PartError:
    return PartError(
        f"{store.paths.shown(path)} {problem}. Run `imagemill verify --quarantine"
        f" {store.paths.output}`, then repeat the run."
    )


def _unreadable(store: Store, path: Path, error: Exception) -> PartError:
    """Return the error for a part that raised one as it was read. If reading failed, the part may
    be sound; Arrow's own complaints have no number.
    """
    if isinstance(error, FileNotFoundError):
        return _part_error(store, path, MISSING)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        why = files.reason(error) if isinstance(error, OSError) else "not enough memory"
        return PartError(
            f"{store.paths.shown(path)} cannot be read: {why}. Repeat the command when it can:"
            " finished parts are kept."
        )
    return _part_error(store, path, f"is damaged: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check_sizes(store: Store) -> None:
    """Compare the sizes of a finished job's parts with the manifest. This is quick; `verify` reads
    everything. Raises: PartError.
    """
    try:
        manifest = documents.read_manifest(store)
    except OutputError:
        manifest = None  # `verify` reports it
    if manifest is None:
        return
    sizes = store.sizes()
    for name, recorded in manifest.parts.items():
        if (found := sizes.get(name)) is not None and found != recorded.bytes:
            raise _part_error(
                store,
                store.paths.predictions / name,
                f"has {found:,} bytes, {recorded.bytes:,} were committed",
            )


def tables(store: Store, shards: Iterable[int], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield one table per committed shard, with these columns in this order. Raises: PartError.

    A column may be one field of a list: `top_k.list.element.class_id` is a column `top_k` with that
    field alone.
    """
    for shard in shards:
        path = store.paths.part(shard)
        try:
            with store.open(path) as file, pq.ParquetFile(file) as part:
                there = part.schema_arrow.names  # a kept column may have a dot in its name
                names = (name if name in there else name.partition(".")[0] for name in columns)
                table = part.read(columns=list(columns), use_threads=False)
                table = table.select(list(dict.fromkeys(names)))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise _unreadable(store, path, error) from error
        if what := _check_shard_number(table.schema.metadata, shard):
            raise _part_error(store, path, what)
        yield table


def are_ok(rows: pa.Table) -> NDArray[np.bool_]:
    """Return which rows of a part are ok: bool (rows,)."""
    return np.array([status == Status.OK.value for status in rows["status"].to_pylist()], bool)


def failed_paths(
    store: Store,
    shards: Iterable[Shard],
    parts: Mapping[str, PartRecord],
    as_line: AsLine,
    extras: Counter[str],
) -> Iterator[bytes]:
    """Yield the full path or URL of each failed image, one a line, as `@FILE` reads them.

    A name with a line break becomes a JSON string. Images inside archives and tables are left out,
    because no line can name them. Count in `extras` those that an extra would read.
    """
    for shard in shards:
        path = store.paths.part(shard.number)
        if parts[path.name].failed_by_status:
            (table,) = tables(store, [shard.number], ["status", "error"])
            statuses = table["status"].to_pylist()
            for error in table["error"].drop_null().to_pylist():
                extras.update(_EXTRA.findall(error))
            for row, status in zip(plan.read(store.paths.plan, shard), statuses, strict=True):
                if status == Status.OK.value or (line := as_line(row.source, row.path)) is None:
                    continue
                if any(byte in line for byte in b"\n\r\0"):
                    line = json.dumps(os.fsdecode(line)).encode("ascii")
                yield line + b"\n"


def _unrecognised(store: Store) -> list[Path]:
    """Return Parquet files in `predictions/` that are not parts, but that readers of the folder
    would read too.
    """
    known = {path.name for path in existing_parts(store).values()}
    names = sorted(
        name for name in store.sizes() if name.endswith(".parquet") and name not in known
    )
    return [store.paths.predictions / name for name in names if not Path(name).name.startswith(".")]


def verify(store: Store, shards: Sequence[Shard], job: Job) -> Iterator[Problem]:
    """Read all parts and yield every problem: missing, duplicated, mismatched or unrecognised parts
    and rows, and any changed byte.
    """
    manifest, problem = _try_reading(documents.read_manifest, store, store.paths.manifest)
    if manifest is None:
        yield Problem(None, store.paths.manifest, problem)
    elif (manifest.plan_id, manifest.answer_id) != (job.plan_id, job.answer_id):
        yield Problem(None, store.paths.manifest, "belongs to another job")
        manifest = None
    present = existing_parts(store)
    expected = {shard.number for shard in shards}
    for number, path in present.items():
        if number not in expected:
            yield Problem(number, path, "does not belong to any shard of this plan", damaged=True)
    for path in _unrecognised(store):
        yield Problem(
            None,
            path,
            "is not a part of this job, but readers of the folder would read its rows too",
            damaged=True,
        )
    for shard in shards:
        path = store.paths.part(shard.number)
        if shard.number not in present:
            yield Problem(shard.number, path, MISSING)
            continue
        recorded = manifest.parts.get(path.name) if manifest else None
        try:
            what = _find_damage(store, shard, job, recorded)
        except (OSError, MemoryError) as error:  # the part may be sound
            why = files.reason(error) if isinstance(error, OSError) else "not enough memory"
            yield Problem(shard.number, path, f"cannot be read: {why}")
            continue
        if what:
            yield Problem(shard.number, path, what, damaged=True)
    summary, problem = _try_reading(documents.read_summary, store, store.paths.summary)
    if summary is None:
        yield Problem(None, store.paths.summary, problem)


def _try_reading(
    read: Callable[[Store], T | None], store: Store, path: Path
) -> tuple[T | None, str]:
    """Return a document, or None and what is wrong with it."""
    try:
        return read(store), NOT_FINISHED
    except OutputError as error:
        return None, str(error).removeprefix(f"{store.paths.shown(path)} ").rstrip(".")


def _find_damage(store: Store, shard: Shard, job: Job, recorded: PartRecord | None) -> str | None:
    """Return what is wrong with one part, or None."""
    path = store.paths.part(shard.number)
    data = store.read(path)
    try:
        if recorded and hashlib.sha256(data).hexdigest() != recorded.sha256:
            return "is not the file that was committed: its sha256 differs from the manifest's"
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        answer_id = shard.answer_id or job.answer_id
        if what := _check_metadata(file.schema_arrow.metadata, shard, answer_id):
            return what
        table = file.read(use_threads=False)
        table.validate(full=True)
    except MemoryError:
        raise
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read: {_first_line(error)}"
    if table.num_rows != shard.count:
        return (
            f"has {counted(table.num_rows, 'row')}, its shard has {counted(shard.count, 'image')}"
        )
    import pyarrow.compute as pc  # which a job does without

    indices = table["index"].to_pylist()
    if indices != list(range(shard.first, shard.first + shard.count)):
        twice = [index for index, count in Counter(indices).items() if count > 1]
        if twice:
            return f"has image {twice[0]} twice"
        return "has other images than its shard, or another order"
    for row, found in zip(
        plan.read(store.paths.plan, shard), table["path"].to_pylist(), strict=True
    ):
        planned = row_path(job.sources[row.source], row.path).decode("utf-8", "backslashreplace")
        if found != planned:
            return "has other paths than the plan"
    columns = (
        table["status"],
        table["error"],
        table["label"],
        pc.list_value_length(table["top_k"]),
    )
    for status, why, label, classes in zip(
        *(column.to_pylist() for column in columns), strict=True
    ):
        # A network without a head has no classes, and a minimum probability may leave none.
        is_ok, has_label = status == Status.OK.value, bool(classes)
        if (
            is_ok != (why is None)
            or has_label != (label is not None)
            or not (is_ok or classes is None)
        ):
            return "has a row whose status, error and answer contradict each other"
    return None


def _check_schema(store: Store, shard: Shard, answer_id: str) -> str | None:
    try:
        with store.open(path := store.paths.part(shard.number)) as file:
            metadata = pq.read_schema(file).metadata
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(store, path, error) from error
    return _check_metadata(metadata, shard, answer_id)


def _check_metadata(
    metadata: Mapping[bytes, bytes] | None, shard: Shard, answer_id: str
) -> str | None:
    metadata = metadata or {}
    if metadata.get(_ANSWER_ID) != answer_id.encode():
        return (
            f"has answer id {metadata.get(_ANSWER_ID, b'none').decode()}, the job has {answer_id}"
        )
    return _check_shard_number(metadata, shard.number)


def _check_shard_number(metadata: Mapping[bytes, bytes] | None, shard: int) -> str | None:
    metadata = metadata or {}
    if metadata.get(_SHARD) != str(shard).encode():
        return f"is shard {metadata.get(_SHARD, b'none').decode()} under another shard's name"
    return None


def quarantine(store: Store, problems: Iterable[Problem]) -> list[Path]:
    """Move damaged parts to `quarantine/`, and remove the summary and manifest that list them.
    Return where the parts are now.
    """
    moved = []
    for problem in problems:
        if problem.damaged:
            goal = (
                store.paths.quarantine
                / f"{problem.path.stem}.{time.time_ns()}{problem.path.suffix}"
            )
            store.move(problem.path, goal)
            moved.append(goal)
    if moved:
        store.remove(store.paths.summary)
        store.remove(store.paths.manifest)
    return moved
