"""The sink: rows gather and leave as one Parquet part, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace

from imagemill.errors import OutputError
from imagemill.job import ledger
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline import sink as sink_module
from imagemill.pipeline.sink import Part, Sink
from imagemill.pipeline.top_k import top_k
from imagemill.records import (
    Batch,
    Job,
    Limits,
    Outputs,
    Precision,
    Row,
    Saved,
    SessionSpec,
    Shard,
    Status,
)
from tiny import CLASSES, TINY_CARD


def make_job(output: Path, *, top: int = 3, save: tuple[Saved, ...] = ()) -> Job:
    values: dict[str, Any] = {
        "output": str(output),
        "sources": ("/s",),
        "variant": "model",
    }
    numbers = {"num_workers": 0, "top_k": top}
    return Job(
        **values,
        **numbers,
        session=SessionSpec("m", TINY_CARD, Precision.FP32, 4, save=save),
        limits=Limits(),
        plan_id="p" * 16,
        answer_id="a" * 16,
    )


def shards(sizes: Sequence[int]) -> list[Shard]:
    firsts = [0, *itertools.accumulate(sizes)]
    return [
        Shard(number, firsts[number], size, 0, "plan", number) for number, size in enumerate(sizes)
    ]


def image(index: int, shard: Shard, good: bool) -> Row:
    if good:
        return Row(index, shard, "/s", f"{index}.jpg", Status.OK, None, 10 + index, 20, 0)
    return Row(index, shard, "/s", f"{index}.jpg", Status.EMPTY, "has no bytes", None, None, -1)


def logits_of(index: int) -> np.ndarray:
    return np.random.default_rng(index).normal(size=CLASSES).astype(np.float32)


def feed(sink: Sink, job: Job, rows: list[Row], batch_rows: int) -> list[Part]:
    """Push rows through the sink in batches of so many rows."""
    parts = []
    for start in range(0, len(rows), batch_rows):
        slots = itertools.count()
        chosen = tuple(
            replace(row, slot=next(slots)) if row.slot >= 0 else row
            for row in rows[start : start + batch_rows]
        )
        answered = [row.index for row in chosen if row.slot >= 0]
        logits = (
            np.stack([logits_of(index) for index in answered])
            if answered
            else np.empty((0, CLASSES), np.float32)
        )
        outputs = Outputs(logits, logits[:, :4] * 2)
        batch = Batch(np.zeros((batch_rows, 1, 1, 3), np.uint8), len(answered), chosen)
        parts += list(sink.write(*top_k(batch, outputs, job.session, job.top_k)))
    return parts


@examples(max_examples=40)
@given(
    before=st.lists(st.booleans(), min_size=1, max_size=9),
    now=st.dictionaries(st.integers(0, 8), st.booleans(), min_size=1),
)
def test_a_retry_replaces_the_rows_that_are_not_ok(
    tmp_path_factory: pytest.TempPathFactory, before: list[bool], now: dict[int, bool]
) -> None:
    """Whichever rows it has: another worker that was taken for lost may have committed others."""
    job = make_job(tmp_path_factory.mktemp("out"), save=(Saved.EMBEDDING,))
    JobPaths.of(job.output).predictions.mkdir()
    _, shard = shards([4, len(before)])
    old = [image(4 + place, shard, good) for place, good in enumerate(before)]
    (part,) = feed(Sink(job, "null", {}), job, old, 4)
    part.commit()
    chosen = sorted(place for place in now if place < len(before)) or [0]
    again = replace(shard, count=len(chosen), is_retried=True)
    new = [image(4 + place, again, now.get(place, True)) for place in chosen]
    (part,) = feed(Sink(job, "null", {}), job, [replace(row, error="new") for row in new], 4)
    receipt = part.commit()
    ok = [was or (place in chosen and now.get(place, True)) for place, was in enumerate(before)]
    assert (receipt.rows, receipt.failed) == (len(before), ok.count(False))
    (found,) = ledger.tables(open_store(JobPaths.of(job.output)), [1], ["index", "status", "error"])
    assert [(row["index"], row["status"] == "ok") for row in found.to_pylist()] == [
        (4 + place, good) for place, good in enumerate(ok)
    ]
    replaced = [place for place in chosen if not before[place]]
    assert [row["error"] == "new" for row in found.to_pylist()] == [
        place in replaced for place in range(len(before))
    ]


@examples(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    batch_rows=st.integers(1, 9),
    bad=st.sets(st.integers(0, 23)),
)
def test_parts_are_the_same_whatever_the_batches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], batch_rows: int, bad: set[int]
) -> None:
    """Every shard becomes one part as soon as its last row is here; batches may span shards; bad
    rows are null where they should be.
    """
    job = make_job(tmp_path_factory.mktemp("out"), save=(Saved.LOGITS, Saved.EMBEDDING))
    rows = [
        image(shard.first + at, shard, shard.first + at not in bad)
        for shard in shards(sizes)
        for at in range(shard.count)
    ]
    parts = feed(Sink(job, "null", {}), job, rows, batch_rows)
    assert [part.shard.number for part in parts] == list(range(len(sizes)))
    found = [row for part in parts for row in part.table.to_pylist()]
    assert [row["index"] for row in found] == [row.index for row in rows]
    for row in found:
        if row["index"] in bad:
            nulls = (
                "class_id",
                "label",
                "probability",
                "top_k",
                "logits",
                "embedding",
                "width",
                "height",
            )
            assert [row[name] for name in nulls] == [None] * len(nulls)
            assert (row["status"], row["error"]) == ("empty", "has no bytes")
            continue
        logits = logits_of(row["index"])
        assert np.float32(row["logits"]).tobytes() == logits.tobytes()
        assert np.float32(row["embedding"]).tobytes() == (logits[:4] * 2).tobytes()
        assert row["class_id"] == int(logits.argmax()) == row["top_k"][0]["class_id"]
        assert row["label"] == TINY_CARD.labels[row["class_id"]] == row["top_k"][0]["label"]
        assert row["probability"] == row["top_k"][0]["probability"]
        assert len(row["top_k"]) == 3
        assert (row["status"], row["error"], row["width"], row["height"]) == (
            "ok",
            None,
            10 + row["index"],
            20,
        )


def commit(tmp_path: Path, *, bad: bool = False, save: tuple[Saved, ...] = ()) -> tuple[Any, Path]:
    (tmp_path / "predictions").mkdir(exist_ok=True)
    job = make_job(tmp_path, save=save)
    (shard,) = shards([3])
    (part,) = feed(
        Sink(job, "null", {"thing": "1.0"}),
        job,
        [image(n, shard, not bad and n != 1) for n in range(3)],
        8,
    )
    return part, tmp_path / "predictions" / "part-000000.parquet"


def test_the_receipt_is_of_the_file_on_disk(tmp_path: Path) -> None:
    """Rows, failures, bytes and sha256 are those of the part that can be read back."""
    part, path = commit(tmp_path)
    receipt = part.commit()
    data = path.read_bytes()
    assert (receipt.shard, receipt.rows, receipt.failed, receipt.failed_by_status) == (
        0,
        3,
        1,
        {"empty": 1},
    )
    assert (receipt.bytes, receipt.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert pq.read_table(path).equals(part.table)


def test_the_schema_is_what_the_design_says(tmp_path: Path) -> None:
    """Names, types and nullability of every column; ids and versions in the metadata."""
    part, path = commit(tmp_path, save=(Saved.LOGITS,))
    part.commit()
    schema = pq.read_schema(path)
    assert [(f.name, str(f.type), f.nullable) for f in schema] == [
        ("index", "int64", False),
        ("source", "string", False),
        ("path", "string", False),
        ("status", "string", False),
        ("error", "string", True),
        ("class_id", "int32", True),
        ("label", "string", True),
        ("probability", "float", True),
        (
            "top_k",
            "list<element: struct<class_id: int32, label: string, probability: float>>",
            True,
        ),
        ("width", "int32", True),
        ("height", "int32", True),
        ("logits", f"fixed_size_list<element: float>[{CLASSES}]", True),
    ]
    reported = {
        name.decode().removeprefix("imagemill."): value.decode()
        for name, value in schema.metadata.items()
        if b"imagemill" in name
    }
    assert reported["answer_id"] == "a" * 16
    assert (
        reported["shard"],
        reported["backend"],
        reported["precision"],
        reported["versions"],
    ) == (
        "0",
        "null",
        "fp32",
        '{"thing": "1.0"}',
    )


def test_a_shard_without_one_good_image_is_a_part(tmp_path: Path) -> None:
    """Saved columns and answers are null in every row, and their types are those of any other
    part.
    """
    part, path = commit(tmp_path, bad=True, save=(Saved.LOGITS, Saved.EMBEDDING))
    assert part.commit().failed == 3
    table = pq.read_table(path)
    assert (
        table["logits"].null_count
        == table["embedding"].null_count
        == table["top_k"].null_count
        == 3
    )
    assert str(table.schema.field("logits").type).endswith(f"[{CLASSES}]")


def test_every_page_has_a_checksum(tmp_path: Path) -> None:
    """A byte that changes inside a page is noticed by any reader that verifies checksums, without
    our manifest.
    """
    part, path = commit(tmp_path)
    part.commit()
    metadata = pq.read_metadata(path).row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[metadata.data_page_offset + metadata.total_compressed_size - 2] ^= 1
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True).read()


def test_a_repeated_shard_replaces_itself(tmp_path: Path) -> None:
    """The name depends on the shard alone, and the bytes on its rows alone."""
    part, path = commit(tmp_path)
    part.commit()
    before = path.read_bytes()
    commit(tmp_path)[0].commit()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["part-000000.parquet"]


def test_shard_numbers_have_at_least_six_digits(tmp_path: Path) -> None:
    """More than a million shards go on with seven, and are found again in order."""
    paths = JobPaths(tmp_path)
    (tmp_path / "predictions").mkdir()
    assert [paths.part(number).name for number in (0, 42, 1_234_567)] == [
        "part-000000.parquet",
        "part-000042.parquet",
        "part-1234567.parquet",
    ]
    for name in (
        "part-000042.parquet",
        "part-1234567.parquet",
        "part-42.parquet",
        ".part-000001.parquet.9.tmp",
        "part-0000042.parquet",
    ):
        (tmp_path / "predictions" / name).touch()
    assert list(ledger.existing_parts(open_store(paths))) == [42, 1_234_567]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (
            errno.ENOSPC,
            "The disk is full. Free some space, then repeat the command: finished parts are kept.",
        ),
        (
            errno.EDQUOT,
            (
                "The disk quota is used up. Free some space, then repeat the command: finished"
                " parts are kept."
            ),
        ),
        (
            errno.EROFS,
            (
                "The file system is read-only. Give another --output, or remount it and repeat the"
                " command."
            ),
        ),
        (errno.EIO, "Fix the cause and run the command again: finished parts are kept."),
    ],
)
def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    """Neither under the final name nor under a temporary one; the message says what to do."""

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    part, path = commit(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as caught:
        part.commit()
    assert str(caught.value) == f"cannot write {path}: {os.strerror(code)}. {remedy}"
    assert list(path.parent.iterdir()) == []


def test_a_part_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File synced, then renamed, then the folder synced: a crash of the machine leaves the whole
    part or none.
    """
    done = []
    fsync, replace_path = os.fsync, Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            done.append("folder" if os.path.isdir(f"/dev/fd/{handle}") else "file"),
            fsync(handle),
        ),
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, goal: (done.append("rename"), replace_path(self, goal))[1]
    )
    commit(tmp_path)[0].commit()
    assert done == ["file", "rename", "folder"]


def test_a_text_that_utf8_cannot_hold_costs_its_own_row_alone(tmp_path: Path) -> None:
    """An error may quote the image, lone surrogates included: it is written as an escape, and its
    neighbours as ever.
    """
    (tmp_path / "predictions").mkdir()
    job = make_job(tmp_path)
    (shard,) = shards([3])
    rows = [image(number, shard, number != 1) for number in range(3)]
    rows[1] = replace(rows[1], error="cannot identify 'a\udcff\ud800.jpg' — ü")
    (part,) = feed(Sink(job, "null", {}), job, rows, 8)
    part.commit()
    found = pq.read_table(tmp_path / "predictions" / "part-000000.parquet").to_pylist()
    assert [row["error"] for row in found] == [
        None,
        "cannot identify 'a\\udcff\\ud800.jpg' — ü",
        None,
    ]
    assert [row["status"] for row in found] == ["ok", "empty", "ok"]


@pytest.mark.parametrize(
    ("pixels", "written"), [(2**31 - 1, 2**31 - 1), (2**31, None), (0, 0), (-1, None)]
)
def test_sizes_that_the_column_cannot_hold_are_null(
    tmp_path: Path, pixels: int, written: int | None
) -> None:
    """A broken header may promise any width or height: it costs these, not the part."""
    job = make_job(tmp_path)
    (shard,) = shards([2])
    rows = [
        replace(image(0, shard, False), width=pixels, height=7),
        replace(image(1, shard, False), width=7, height=pixels),
    ]
    (part,) = feed(Sink(job, "null", {}), job, rows, 8)
    assert [(row["width"], row["height"]) for row in part.table.to_pylist()] == [
        (written, 7),
        (7, written),
    ]


def test_the_receipt_says_how_long_its_shard_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment when its first row came to the commit: the timeline spreads its rows over
    these seconds.
    """
    (tmp_path / "predictions").mkdir()
    job = make_job(tmp_path)
    sink, (shard,) = Sink(job, "null", {}), shards([3])
    before = time.monotonic()
    assert feed(sink, job, [image(0, shard, True)], 8) == []
    after = time.monotonic()
    (part,) = feed(sink, job, [image(1, shard, True), image(2, shard, True)], 8)
    assert before <= part.since <= after
    monkeypatch.setattr(sink_module, "time", SimpleNamespace(monotonic=lambda: 105.5))
    assert replace(part, since=100.0).commit().seconds == 5.5


def test_columns_whose_values_repeat_have_a_dictionary_and_no_others(tmp_path: Path) -> None:
    """A dictionary of paths or probabilities would only take room."""
    part, path = commit(tmp_path)
    part.commit()
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    named = {column.path_in_schema for column in columns if column.has_dictionary_page}
    assert named == {"source", "status", "error", "label", "top_k.list.element.label"}
