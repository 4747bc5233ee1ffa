"""Time, memory and size of `imagemill report` for jobs of very different length, in one table.

    python benchmarks/report.py --sizes 1000 100000 1000000
    python benchmarks/report.py --sizes 1000000 --run
    python benchmarks/report.py --sizes 1000000 --before ../imagemill-before/src --rounds 3

With --run each job is one that `imagemill run` really did, with the null session: a list that names
5,000 small files over and over, one in a hundred of them broken; a million images take some 8
minutes on 2 cores. Without it the jobs are written through the plan and the sink that every job
goes through, with made-up answers: classes as unequal as in photographs, probabilities between 0
and 1, one image in a hundred failed. With --before, another version makes the page of the same job
in alternation with this one. The images that the gallery shows are real files both ways.
Memory is the peak of the resident set of the process that makes the page (VmHWM), without its
disposable decoder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import harness  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402
from imagemill import records  # noqa: E402
from imagemill.job import plan  # noqa: E402
from imagemill.job.open_job import OpenJob  # noqa: E402
from imagemill.job.paths import JobPaths  # noqa: E402
from imagemill.pipeline import sources  # noqa: E402
from imagemill.pipeline.backends import devices  # noqa: E402
from imagemill.pipeline.sink import Sink  # noqa: E402
from imagemill.records import (  # noqa: E402
    Batch,
    Outputs,
    Row,
    Settings,
    Shard,
    Status,
    Summary,
    TopK,
)
from imagemill.runner import run  # noqa: E402
from imagemill.system import serialization  # noqa: E402

_FILES = 50
_SMALL_FILES = 5_000
_FAILED_EVERY = 100
_CLASSES = 1000
_K = 5


def run_job(folder: Path, count: int) -> Path:
    """Run a job of `count` images with the null session; returns the output folder."""
    output, source = folder / f"out-{count}", folder / f"images-{count}.txt"
    with source.open("w") as lines:
        lines.writelines(f"small/{number % _SMALL_FILES:04d}.jpg\n" for number in range(count))
    begun = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "imagemill",
            "run",
            f"@{source}",
            "--output",
            output,
            "--model",
            "null",
            "--devices",
            "null",
            "--no-report",
        ],
        env=helpers.environment(IMAGEMILL_MODELS=str(folder / "models")),
        check=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    failed = json.loads((output / "summary.json").read_bytes())["failed_by_status"]
    print(
        f"  a run of {count:,}: {time.monotonic() - begun:.0f} s, failed {failed}",
        file=sys.stderr,
        flush=True,
    )
    return output


def make_job(folder: Path, count: int) -> Path:
    """A job of `count` images with all of its parts, made up; returns the output folder."""
    output, source = folder / f"out-{count}", folder / f"images-{count}.txt"
    with source.open("w") as lines:
        lines.writelines(f"files/{number % _FILES:02d}.jpg\n" for number in range(count))
    os.environ["IMAGEMILL_MODELS"] = str(folder / "models")
    small = folder / "small.txt"
    small.write_text(f"files/{0:02d}.jpg\n")
    run.run(
        Settings((f"@{small}",), str(output), model="null", devices="null", report=False)
    )  # job.json, to be stretched
    paths = JobPaths(output)
    frozen = OpenJob.open(output).frozen
    shard_size = plan.auto_shard_size(count, 1)
    frozen = replace(
        frozen,
        job=replace(frozen.job, sources=(f"@{source}",)),
        images=count,
        shard_size=shard_size,
    )
    paths.job.write_bytes(serialization.encode(frozen))
    for path in (*paths.plan.iterdir(), *paths.predictions.iterdir()):
        path.unlink()
    entries = (
        records.Entry(0, f"files/{number % _FILES:02d}.jpg".encode(), -1) for number in range(count)
    )
    plan.spool(entries, paths.spool)
    plan.cut(paths.spool, paths.plan, shard_size, by_group=False)
    paths.spool.unlink()
    sink = Sink(frozen.job, "null", {"numpy": np.__version__})
    shards = plan.shards(paths.plan)
    receipts = [
        part.commit() for shard in shards for part in sink.write(*answers(shard, f"@{source}"))
    ]
    tally = OpenJob.open(output).close(receipts, partial(sources.as_line, frozen.job.sources))
    summary = Summary(
        tally.images, tally.images - tally.failed, tally.failed, tally.failed_by_status, {}, len(shards), 0, 0.0, None, "null", "fp32",
        None, (), str(output), machine=devices.machine(),
    )  # fmt: skip
    paths.summary.write_bytes(serialization.encode(summary))
    return output


def answers(shard: Shard, source: str) -> tuple[Batch, TopK]:
    """Made-up answers to the images of a shard."""
    rng = np.random.default_rng(shard.number)
    failed = rng.random(shard.count) < 0.01
    filled = int((~failed).sum())
    slots = np.where(failed, -1, np.cumsum(~failed) - 1)

    def rows() -> Iterator[Row]:
        for place in range(shard.count):
            index = shard.first + place
            status, error = (
                (Status.TRUNCATED, "made up: the file ends early")
                if failed[place]
                else (Status.OK, None)
            )
            yield Row(
                index,
                shard,
                source,
                f"files/{index % _FILES:02d}.jpg",
                status,
                error,
                640,
                480,
                int(slots[place]),
            )

    first = (rng.zipf(1.3, filled) - 1) % _CLASSES
    class_ids = ((first[:, None] + np.arange(_K)) % _CLASSES).astype(np.int32)
    top = rng.beta(2, 0.8, filled)
    probabilities = (top[:, None] * 0.5 ** np.arange(_K)).astype(np.float32)
    pixels = np.zeros((0, 1, 1, 3), np.uint8)
    return Batch(pixels, filled, tuple(rows())), TopK(
        class_ids,
        probabilities,
        np.full(filled, _K, np.intp),
        Outputs(np.zeros((filled, 0), np.float32)),
    )


def measure(output: Path, source: Path) -> tuple[float, float, float]:
    """Seconds, MiB and MB of page, by the version whose `src` folder this is."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "imagemill", "report", str(output)],
        env=helpers.environment(PYTHONPATH=str(source)),
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return (
        time.monotonic() - begun,
        usage.ru_maxrss / 1024,
        (output / "report.html").stat().st_size / 1e6,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument(
        "--run",
        action="store_true",
        help="run the jobs with the null session instead of making up their answers",
    )
    parser.add_argument("--before", type=Path, help="the src folder of another, built version")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parsed = parser.parse_args()
    versions = {"before": parsed.before} if parsed.before else {}
    versions["this"] = ROOT / "src"
    with tempfile.TemporaryDirectory(prefix="imagemill-report-", dir=parsed.folder) as name:
        folder = Path(name)
        harness.null_bundle(folder / "models", classes=_CLASSES, size=224)
        (folder / "files").mkdir()
        for number in range(_FILES):
            (folder / "files" / f"{number:02d}.jpg").write_bytes(
                sample_images.jpeg(640, 480, seed=number)
            )
        if parsed.run:
            (folder / "small").mkdir()
            for number in range(_SMALL_FILES):
                data = sample_images.jpeg(8, 8, seed=number)
                (folder / "small" / f"{number:04d}.jpg").write_bytes(
                    data if (number + 1) % _FAILED_EVERY else sample_images.half(data)
                )
        print(
            "| version |      rows | seconds | peak MiB | page MB"
            " |\n|---------|----------:|--------:|---------:|--------:|",
            flush=True,
        )
        for size in parsed.sizes:
            output = run_job(folder, size) if parsed.run else make_job(folder, size)
            for _, (version, source) in itertools.product(range(parsed.rounds), versions.items()):
                seconds, mebibytes, megabytes = measure(output, source)
                print(
                    f"| {version:7} | {size:9,} | {seconds:7.1f} | {mebibytes:8.0f} |"
                    f" {megabytes:7.2f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
