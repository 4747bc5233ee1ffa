"""The sink: rows of a shard gather here and leave as one Parquet part, whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct, field
from numpy.typing import NDArray

from imagemill.job import ledger
from imagemill.job.columns import _COLUMNS, _TOP_K, names_of
from imagemill.job.paths import JobPaths
from imagemill.job.store import Store, open_store
from imagemill.records import Batch, Job, KeptType, Receipt, Row, Saved, Shard, Status, TopK


class _Open(Struct):
    """A shard some of whose rows are here."""

    shard: Shard
    rows: list[Row] = []
    class_ids: list[NDArray[np.int32]] = []
    probabilities: list[NDArray[np.float32]] = []
    counts: list[NDArray[np.intp]] = []
    saved: dict[Saved, list[NDArray[np.float32]]] = {}
    since: float = field(default_factory=time.monotonic)


class Part(Struct, frozen=True):
    """A shard with all of its rows, not yet on disk."""

    shard: Shard
    table: pa.Table
    store: Store
    since: float

    def commit(self) -> Receipt:
        """Put the part on disk, whole. Raises: OutputError where that fails; nothing stays behind
        then.
        """
        buffer = pa.BufferOutputStream()
        # One row group; dictionaries only where values repeat; checksums on every page.
        pq.write_table(
            self.table,
            buffer,
            compression="zstd",
            row_group_size=max(self.table.num_rows, 1),
            use_dictionary=["source", "status", "error", "label", "top_k.list.element.label"],
            write_page_checksum=True,
        )
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        self.store.write(self.store.paths.part(self.shard.number), memoryview(data))
        statuses = Counter(self.table["status"].to_pylist())
        ok = statuses.pop(Status.OK.value, 0)
        rows = self.table.num_rows
        return Receipt(
            self.shard.number,
            rows,
            rows - ok,
            data.size,
            time.monotonic() - self.since,
            digest,
            dict(statuses),
        )


class Sink:
    """Gathers the rows of one job on one device.

    Args:
        job: the frozen job.
        backend: what computed the answers, as the part's metadata says it.
        versions: of the libraries that decided the answers.
    """

    def __init__(self, job: Job, backend: str, versions: dict[str, str]) -> None:
        self._job = job
        self._store = open_store(JobPaths.of(job.output))
        self._labels = pa.array(job.session.card.labels, pa.string())
        self._open: dict[int, _Open] = {}
        self._metadata = {
            "imagemill.answer_id": job.answer_id,
            "imagemill.plan_id": job.plan_id,
            "imagemill.backend": backend,
            "imagemill.precision": job.session.precision.value,
            "imagemill.versions": json.dumps(versions, sort_keys=True),
        }

    def write(self, batch: Batch, top: TopK) -> Iterator[Part]:
        """Take a batch's rows and yield the parts whose last row was among them. Batches may span
        shards.
        """
        for shard, group in itertools.groupby(batch.rows, attrgetter("shard")):
            if (opened := self._open.get(shard.number)) is None:
                opened = self._open[shard.number] = _Open(shard)
            rows = list(group)
            slots = np.array([row.slot for row in rows if row.slot >= 0], np.intp)
            opened.rows.extend(rows)
            opened.class_ids.append(top.class_ids[slots])
            opened.probabilities.append(top.probabilities[slots])
            opened.counts.append(top.counts[slots])
            for saved in self._job.session.save:
                values = top.outputs.logits if saved is Saved.LOGITS else top.outputs.embedding
                assert values is not None
                opened.saved.setdefault(saved, []).append(values[slots])
            if len(opened.rows) == shard.count:
                del self._open[shard.number]
                table = self._table(opened)
                if shard.is_retried:
                    (before,) = ledger.tables(self._store, [shard.number], names_of(self._job))
                    table = _healed(before, table)
                yield Part(shard, table, self._store, opened.since)

    def _table(self, opened: _Open) -> pa.Table:
        rows = opened.rows
        class_ids = np.concatenate(opened.class_ids)
        probabilities = np.concatenate(opened.probabilities)
        answered = np.fromiter((row.slot >= 0 for row in rows), bool, len(rows))
        place = np.cumsum(answered) - 1  # of each row among the answered ones
        taken = pa.array(np.where(answered, place, 0), pa.int64(), mask=~answered)
        counts = np.zeros(len(rows), np.intp)  # of classes, of each row
        counts[answered] = np.concatenate(opened.counts)
        kept = np.arange(class_ids.shape[1]) < counts[answered][:, None]
        ids, numbers = pa.array(class_ids[kept]), pa.array(probabilities[kept])
        structs = pa.StructArray.from_arrays(
            [ids, self._labels.take(ids), numbers], fields=list(_TOP_K)
        )
        offsets = np.concatenate([[0], np.cumsum(counts)])
        first = pa.array(offsets[:-1], pa.int64(), mask=counts == 0)
        listed = answered if self._job.session.card.has_head else np.zeros(len(rows), bool)
        columns = [
            pa.array([row.index for row in rows], pa.int64()),
            pa.array([row.source for row in rows], pa.string()),
            pa.array([row.path for row in rows], pa.string()),
            pa.array([row.status for row in rows], pa.string()),
            pa.array([_as_utf8(row.error) for row in rows], pa.string()),
            ids.take(first),
            self._labels.take(ids.take(first)),
            numbers.take(first),
            pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), structs, mask=pa.array(~listed)
            ),
            pa.array([_side(row.width) for row in rows], pa.int32()),
            pa.array([_side(row.height) for row in rows], pa.int32()),
        ]
        fields = list(_COLUMNS)
        for kept, array in zip(self._job.keep, self._kept(rows), strict=True):
            columns.append(array)
            fields.append(pa.field(kept.name, array.type))
        for saved, arrays in opened.saved.items():
            values = np.concatenate(arrays).astype(np.float32, copy=False)
            kind = pa.list_(pa.float32(), values.shape[1])
            columns.append(
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind).take(
                    taken
                )
            )
            fields.append(pa.field(saved.value, kind))
        shard = opened.shard
        metadata = self._metadata | {"imagemill.shard": str(shard.number)}
        if shard.answer_id:
            metadata["imagemill.answer_id"] = shard.answer_id
        return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))

    def _kept(self, rows: list[Row]) -> Iterator[pa.Array]:
        """Yield the columns that the job keeps."""
        unpacked = [json.loads(row.kept) if row.kept else None for row in rows]
        for place, kept in enumerate(self._job.keep):
            values = [None if found is None else found[place] for found in unpacked]
            if kept.type is KeptType.FLOAT:  # JSON may hold whole numbers among them
                values = [None if value is None else float(value) for value in values]
            yield pa.array(values, pa.type_for_alias(kept.type.value))


def _healed(before: pa.Table, now: pa.Table) -> pa.Table:
    """Return the rows of a part, with the rows of now in place of those that are not ok."""
    at = now["index"].to_numpy() - before["index"][0].as_py()
    replaces = ~ledger.are_ok(before)[at]
    places = np.arange(before.num_rows)
    places[at[replaces]] = before.num_rows + np.flatnonzero(replaces)
    return pa.concat_tables([before.cast(now.schema), now]).take(pa.array(places))


def _side(pixels: int | None) -> int | None:
    """Width or height as the column can hold it: a broken header may promise anything."""
    return pixels if pixels is not None and 0 <= pixels < 2**31 else None


def _as_utf8(error: str | None) -> str | None:
    """An error as UTF-8 can hold it: it may quote the image."""
    return error if error is None else error.encode("utf-8", "backslashreplace").decode()
