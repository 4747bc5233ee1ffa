"""Time and peak memory of `imagemill score` for jobs of very different length, in one table.

    python benchmarks/score_rows.py --sizes 100000 1000000 10000000

The parts are made up: 1,000 classes, five of them kept per image, seven of eight images right, one
in a hundred failed. The truth is by folders, by a CSV file in another order, and by a Parquet file
in another order. Memory is the peak of the resident set of the process that scores (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
from msgspec.structs import replace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import harness  # noqa: E402

import helpers  # noqa: E402
import made_jobs  # noqa: E402
from imagemill.job import columns, plan  # noqa: E402
from imagemill.models import bundle  # noqa: E402
from imagemill.records import Settings  # noqa: E402
from imagemill.system import serialization  # noqa: E402

_CLASSES, _K = 1_000, 5
_SHARDS_PER_FILE = 200


def paths_of(indices: Any) -> list[str]:
    """The path of each image, which has its true label as a folder."""
    return [
        f"batch-{index % 97:02d}/{true:03d}/IMG_{index:08d}.jpg"
        for index, true in zip(indices.tolist(), true_classes(indices).tolist(), strict=True)
    ]


def true_classes(indices: Any) -> Any:
    return (indices * 2_654_435_761 >> 7) % _CLASSES


def make_job(folder: Path, count: int) -> Path:
    """Make a job of `count` images with all of its parts; return the output folder."""
    output, source = folder / f"out-{count}", folder / "images"
    settings = Settings((str(source),), str(output), "null", str(folder), "null", top_k=_K)
    job = made_jobs.frozen_job(settings, bundle.load(folder / "null"))
    card = job.frozen.job.session.card
    labels = tuple(f"{number:03d}" for number in range(_CLASSES))
    session = replace(job.frozen.job.session, card=replace(card, labels=labels))
    frozen = replace(job.first, images=count, job=replace(job.frozen.job, session=session))
    job.paths.job.write_bytes(serialization.encode(frozen))
    for file in job.paths.plan.iterdir():
        file.unlink()
    size = plan.auto_shard_size(count, 1)
    writer: Any = None
    for number, first in enumerate(range(0, count, size)):
        indices = np.arange(first, min(first + size, count))
        paths = paths_of(indices)
        if number % _SHARDS_PER_FILE == 0:
            if writer:
                writer.close()
            name = f"plan-00000-{number // _SHARDS_PER_FILE:05d}.parquet"
            writer = pq.ParquetWriter(job.paths.plan / name, plan.SCHEMA, compression="zstd")
        listed = [indices, np.zeros(len(indices), np.int32), [p.encode() for p in paths]]
        listed += [np.full(len(indices), -1), *[[b""] * len(indices)] * 2]
        arrays = [pa.array(a, t.type) for a, t in zip(listed, plan.SCHEMA, strict=True)]
        writer.write_table(pa.table(arrays, schema=plan.SCHEMA), row_group_size=len(indices))
        write_part(job, number, indices, paths, str(source), labels)
    writer.close()
    return output


def write_part(
    job: Any, number: int, indices: Any, paths: list[str], source: str, labels: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(number)
    rows = len(indices)
    failed = rng.random(rows) < 0.01
    shift = np.where(rng.random(rows) < 0.875, 0, rng.integers(0, _CLASSES, rows))
    ids = (true_classes(indices)[:, None] + shift[:, None] + np.arange(_K)) % _CLASSES
    probabilities = (rng.beta(2, 0.8, rows)[:, None] * 0.5 ** np.arange(_K)).astype(np.float32)
    kept = ids[~failed].astype(np.int32).reshape(-1)
    names = pa.array(labels)
    structs = pa.StructArray.from_arrays(
        [kept, names.take(pa.array(kept)), probabilities[~failed].reshape(-1)],
        fields=list(columns._TOP_K),
    )
    offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, _K))])
    top_1 = pa.array(ids[:, 0], pa.int32(), mask=failed)
    arrays = [
        pa.array(indices),
        pa.array([source] * rows),
        pa.array(paths),
        pa.array(np.where(failed, "corrupt", "ok")),
        pa.array(["made up"] * rows, mask=~failed),
        top_1,
        names.take(top_1),
        pa.array(probabilities[:, 0], mask=failed),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, mask=pa.array(failed)),
        pa.array([640] * rows, pa.int32()),
        pa.array([480] * rows, pa.int32()),
    ]
    metadata = {"imagemill.shard": str(number), "imagemill.answer_id": job.frozen.job.answer_id}
    table = pa.table(arrays, schema=pa.schema(columns._COLUMNS, metadata=metadata))
    pq.write_table(table, job.paths.part(number), compression="zstd")


def make_truth(folder: Path, count: int) -> tuple[Path, Path]:
    """Write the true labels in random order, as CSV and as Parquet."""
    schema = pa.schema([("path", pa.string()), ("label", pa.int64())])
    order = np.random.default_rng(1).permutation(count)
    text, packed = folder / f"truth-{count}.csv", folder / f"truth-{count}.parquet"
    with pv.CSVWriter(text, schema) as lines, pq.ParquetWriter(packed, schema) as writer:
        for start in range(0, count, 2**18):
            indices = order[start : start + 2**18]
            table = pa.table([paths_of(indices), true_classes(indices)], schema=schema)
            lines.write_table(table)
            writer.write_table(table)
    return text, packed


def measure(output: Path, truth: str) -> tuple[float, float, float, Any]:
    """Seconds, seconds of CPU time, MiB and the score."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "imagemill", "score", output, "--truth", truth, "--json"],
        env=helpers.environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    seconds = time.monotonic() - begun
    cpu = usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss / 1024, json.loads(printed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-score-", dir=parsed.folder) as name:
        folder = Path(name)
        harness.null_bundle(folder, classes=_CLASSES, size=224)
        helpers.fill(folder / "images", {"one.jpg": b""})
        print("|       rows | truth   | seconds | CPU s | peak MiB | top-1 |", flush=True)
        print("|-----------:|---------|--------:|------:|---------:|------:|", flush=True)
        for size in parsed.sizes:
            output = make_job(folder, size)
            text, packed = make_truth(folder, size)
            truths = {"folders": "folders", "CSV": f"@{text}", "Parquet": f"@{packed}"}
            for kind, truth in truths.items():
                seconds, cpu, mebibytes, found = measure(output, truth)
                print(
                    f"| {size:10,} | {kind:7} | {seconds:7.1f} | {cpu:5.0f} | {mebibytes:8.0f} |"
                    f" {found['top1']['value']:.3f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
