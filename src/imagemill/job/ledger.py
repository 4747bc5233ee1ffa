"""The ledger: plan against parts. Which shards are committed, what is in them, and the proof that
every image has exactly one row.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imagemill.errors import PartError
from imagemill.job import plan, store
from imagemill.job.paths import JobPaths
from imagemill.records import Receipt, Shard, Status
from imagemill.system import serialization

_ANSWER_ID = b"imagemill.answer_id"
_SHARD = b"imagemill.shard"


AsLine = Callable[[int, bytes], bytes | None]
"""From a source's position and a path in it to the line of a list that means this image; None if no
line can.
"""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One line of `manifest.json`."""

    rows: int
    failed_by_status: Mapping[str, int]
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`: what the closed ledger found, part by part. Rebuildable from the parts."""

    plan_id: str
    answer_id: str
    parts: Mapping[str, PartRecord]
    """By file name."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The sum over all parts."""

    images: int
    failed_by_status: Mapping[str, int] = field(default_factory=dict)
    unlisted: int = 0
    """Rows whose status is not ok and that `failed.txt` cannot name: they lie in archives or
    tables.
    """

    @property
    def failed(self) -> int:
        """Rows whose status is not ok."""
        return sum(self.failed_by_status.values())


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that `verify` found wrong."""

    shard: int | None
    path: Path
    what: str
    damaged: bool = False
    """Whether the file is there but not to be trusted; `verify --quarantine` moves such files
    aside.
    """


def committed(paths: JobPaths, shards: Iterable[Shard]) -> set[int]:
    """Shards whose part is on disk. A part appears whole or not at all, so its name suffices."""
    return store.parts(paths).keys() & {shard.number for shard in shards}


def shards_with(paths: JobPaths, shards: Iterable[Shard], statuses: Iterable[str]) -> set[int]:
    """Committed shards that hold a row of one of these statuses; with none given, of any but ok."""
    wanted = set(statuses)
    present = store.parts(paths)
    found = set()
    for shard in shards:
        if shard.number in present:
            failed = examine(paths, shard.number).failed_by_status
            if failed and (not wanted or wanted & failed.keys()):
                found.add(shard.number)
    return found


def examine(paths: JobPaths, shard: int, receipt: Receipt | None = None) -> PartRecord:
    """What a part holds. With the receipt of its commit nothing is read again.

    Raises:
        PartError: the part cannot be read.
    """
    if receipt is not None:
        return PartRecord(receipt.rows, receipt.failed_by_status, receipt.sha256, receipt.bytes)
    try:
        data = store.read(paths, paths.part(shard))
        statuses = Counter(
            pq.read_table(pa.BufferReader(data), columns=["status"], use_threads=False)[
                "status"
            ].to_pylist()
        )
    except (OSError, pa.ArrowException) as error:
        raise _damaged(paths, paths.part(shard), error) from error
    rows = statuses.total()
    statuses.pop(Status.OK.value, None)
    return PartRecord(rows, dict(statuses), hashlib.sha256(data).hexdigest(), len(data))


def close(
    paths: JobPaths,
    shards: Sequence[Shard],
    as_line: AsLine,
    plan_id: str,
    answer_id: str,
    receipts: Iterable[Receipt],
) -> Tally:
    """Prove that every shard has its part with one row per image, write the manifest and the list
    of failed images.

    Args:
        paths: of the job.
        shards: of the plan.
        as_line: spells failed images for `failed.txt`.
        plan_id: of the job, for the manifest.
        answer_id: of the job: parts of another one are refused.
        receipts: of the parts committed by this invocation, which need not be read again.

    Raises:
        PartError: a part is missing, damaged, of another job, or has another number of rows than
        its shard.
    """
    by_shard = {receipt.shard: receipt for receipt in receipts}
    parts: dict[str, PartRecord] = {}
    failed: Counter[str] = Counter()
    for shard in shards:
        path = paths.part(shard.number)
        shown = paths.shown(path)
        if shard.number not in by_shard and (problem := _foreign(paths, shard, answer_id)):
            raise PartError(
                f"{shown} {problem}. Run `imagemill verify --quarantine {paths.output}`, then"
                " repeat the run."
            )
        record = examine(paths, shard.number, by_shard.get(shard.number))
        if record.rows != shard.count:
            raise PartError(
                f"{shown} has {record.rows} rows, its shard has {shard.count} images. Run"
                " `imagemill verify --quarantine`."
            )
        parts[path.name] = record
        failed.update(record.failed_by_status)
    store.write(paths, paths.manifest, serialization.encode(Manifest(plan_id, answer_id, parts)))
    listed = 0

    def lines() -> Iterator[bytes]:
        nonlocal listed
        for line in failed_paths(paths, shards, parts, as_line):
            listed += 1
            yield line

    store.write(paths, paths.failed_list, lines())
    return Tally(
        sum(shard.count for shard in shards), dict(sorted(failed.items())), failed.total() - listed
    )


def _opened(paths: JobPaths, path: Path) -> pa.NativeFile:
    """A part to read. Raises: OSError."""
    return pa.BufferReader(store.read(paths, path)) if paths.url else pa.OSFile(os.fsencode(path))


def _damaged(paths: JobPaths, path: Path, error: Exception) -> PartError:
    told = str(error).splitlines()[0]
    return PartError(
        f"{paths.shown(path)} is damaged: {told}. Run `imagemill verify --quarantine`, then repeat"
        " the run."
    )


def check_sizes(paths: JobPaths) -> None:
    """Compare the sizes of a closed job's parts with the manifest's: quick, where `verify` reads
    everything. Raises: PartError.
    """
    manifest = read_manifest(paths)
    sizes = store.sizes(paths) if manifest else {}
    for name, recorded in manifest.parts.items() if manifest else ():
        if (found := sizes.get(name)) is not None and found != recorded.bytes:
            raise PartError(
                f"{paths.shown(paths.predictions / name)} has {found:,} bytes, {recorded.bytes:,}"
                f" were committed. Run `imagemill verify --quarantine {paths.output}`, then repeat"
                " the run."
            )


def rows(paths: JobPaths, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of all parts on disk, in plan order, part by part. Raises: PartError."""
    for table in tables(paths, store.parts(paths), columns):
        yield from table.to_pylist()


def tables(paths: JobPaths, shards: Iterable[int], columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of committed shards, part by part, with these columns in this order. Raises:
    PartError.
    """
    for shard in shards:
        path = paths.part(shard)
        try:
            with _opened(paths, path) as file:
                table = pq.read_table(file, columns=list(columns), use_threads=False).select(
                    list(columns)
                )
        except (OSError, pa.ArrowException, KeyError) as error:
            raise _damaged(paths, path, error) from error
        if what := _misnamed(table.schema.metadata, shard):
            raise PartError(
                f"{paths.shown(path)} {what}. Run `imagemill verify --quarantine {paths.output}`,"
                " then repeat the run."
            )
        yield table


def failed_paths(
    paths: JobPaths, shards: Iterable[Shard], parts: Mapping[str, PartRecord], as_line: AsLine
) -> Iterator[bytes]:
    """Full path or URL of each image without an answer, one a line, as `@FILE` reads them: a name
    with a line break is a JSON string.

    Images inside archives and tables are left out: no line can name them.
    """
    for shard in shards:
        path = paths.part(shard.number)
        if parts[path.name].failed_by_status:
            with _opened(paths, path) as file:
                statuses = pq.read_table(file, columns=["status"], use_threads=False)[
                    "status"
                ].to_pylist()
            for row, status in zip(plan.read(paths.plan, shard), statuses, strict=True):
                if status != Status.OK.value:
                    full = as_line(row.source, row.path)
                    if full is None:
                        continue
                    quoted = b"\n" in full or b"\r" in full
                    yield (
                        json.dumps(os.fsdecode(full)).encode("ascii") if quoted else full
                    ) + b"\n"


def read_manifest(paths: JobPaths) -> Manifest | None:
    """The manifest, or None where there is none or it cannot be read: it can be rebuilt."""
    try:
        return _manifest(json.loads(store.read(paths, paths.manifest)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest(plain: dict[str, object]) -> Manifest:
    parts = plain["parts"]
    if not isinstance(parts, dict):
        raise TypeError("parts is not an object")
    records = {name: serialization.from_plain(PartRecord, record) for name, record in parts.items()}
    return Manifest(str(plain["plan_id"]), str(plain["answer_id"]), records)


def verify(
    paths: JobPaths, shards: Sequence[Shard], plan_id: str, answer_id: str
) -> Iterator[Problem]:
    """Read everything and yield what is wrong: nothing missing, nothing twice, nothing foreign, not
    one byte changed.
    """
    manifest = read_manifest(paths)
    if manifest is None:
        yield Problem(
            None,
            paths.manifest,
            "is missing or cannot be read: the job is not finished, or else repeating the run"
            " rebuilds it",
        )
    elif (manifest.plan_id, manifest.answer_id) != (plan_id, answer_id):
        yield Problem(None, paths.manifest, "belongs to another job")
        manifest = None
    present = store.parts(paths)
    expected = {shard.number for shard in shards}
    for number, path in present.items():
        if number not in expected:
            yield Problem(number, path, "is of no shard of the plan", damaged=True)
    for path in store.strangers(paths):
        yield Problem(
            None,
            path,
            "is no part of this job, and its rows would be read with the others",
            damaged=True,
        )
    for shard in shards:
        path = paths.part(shard.number)
        if shard.number not in present:
            yield Problem(shard.number, path, "is missing")
            continue
        recorded = manifest.parts.get(path.name) if manifest else None
        if what := _unsound(path, shard, answer_id, paths, recorded):
            yield Problem(shard.number, path, what, damaged=True)
    if not store.exists(paths, paths.summary):
        yield Problem(None, paths.summary, "is missing: the job is not finished")


def _unsound(
    path: Path, shard: Shard, answer_id: str, paths: JobPaths, recorded: PartRecord | None
) -> str | None:
    """What is wrong with one part, or None."""
    try:
        data = store.read(paths, path)
        if recorded and hashlib.sha256(data).hexdigest() != recorded.sha256:
            return "is not the file that was committed: its sha256 differs from the manifest's"
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if what := _foreign_metadata(file.schema_arrow.metadata, shard, answer_id):
            return what
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
    if table.num_rows != shard.count:
        return f"has {table.num_rows} rows, its shard has {shard.count} images"
    indices = table["index"].to_pylist()
    if indices != list(range(shard.first, shard.first + shard.count)):
        twice = [index for index, count in Counter(indices).items() if count > 1]
        return (
            f"has image {twice[0]} twice"
            if twice
            else "has other images than its shard, or another order"
        )
    planned = [row.path.decode("utf-8", "backslashreplace") for row in plan.read(paths.plan, shard)]
    if table["path"].to_pylist() != planned:
        return "has other paths than the plan"
    for status, why, label in zip(
        *(table[name].to_pylist() for name in ("status", "error", "label")), strict=True
    ):
        if (status == Status.OK.value) != (why is None) or (status == Status.OK.value) == (
            label is None
        ):
            return "has a row whose status, error and answer contradict each other"
    return None


def _foreign(paths: JobPaths, shard: Shard, answer_id: str) -> str | None:
    try:
        with _opened(paths, paths.part(shard.number)) as file:
            metadata = pq.read_schema(file).metadata
    except FileNotFoundError:
        return "is missing"
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
    return _foreign_metadata(metadata, shard, answer_id)


def _foreign_metadata(
    metadata: Mapping[bytes, bytes] | None, shard: Shard, answer_id: str
) -> str | None:
    metadata = metadata or {}
    if metadata.get(_ANSWER_ID) != answer_id.encode():
        return (
            f"has answer id {metadata.get(_ANSWER_ID, b'none').decode()}, the job has {answer_id}"
        )
    return _misnamed(metadata, shard.number)


def _misnamed(metadata: Mapping[bytes, bytes] | None, shard: int) -> str | None:
    metadata = metadata or {}
    if metadata.get(_SHARD) != str(shard).encode():
        return f"is shard {metadata.get(_SHARD, b'none').decode()} under another shard's name"
    return None


def quarantine(paths: JobPaths, problems: Iterable[Problem]) -> list[Path]:
    """Move damaged parts aside, and with them the summary and manifest that vouched for them.
    Returns where they went.
    """
    moved = []
    for problem in problems:
        if problem.damaged:
            goal = paths.quarantine / f"{problem.path.stem}.{time.time_ns()}{problem.path.suffix}"
            store.move(paths, problem.path, goal)
            moved.append(goal)
    if moved:
        store.remove(paths, paths.summary)
        store.remove(paths, paths.manifest)
    return moved
