"""What a job costs besides its images, by the number of these: listing, plan, ledger, and what is
read of them at each start.

    python benchmarks/scaling.py --sizes 100000 1000000 10000000 [--folder DIR]

Every step is imagemill's own function over made-up images, in a process of its own, so that its
peak memory (VmHWM) is its own. An image is a name of some 30 bytes in folders of a thousand. Parts
are written by the real sink, with made-up answers (top-5 of 1,000 classes), as one worker would;
shards are of the size that `auto` gives. Bytes are those on disk. --requests instead counts, over
the proxy of the tests, the requests that a job with source and output in an object store makes, by
kind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from imagemill.job.paths import JobPaths
    from imagemill.records import Entry, Job

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

_FOLDER = 1_000
_CLASSES = 1_000
_DEVICES = 8
_MILLION = 1e6


# ── the steps, each in a process of its own ───────────────────────────────────────────────────────


def _entries(images: int) -> Iterator[Entry]:
    from imagemill.records import Entry

    for number in range(images):
        yield Entry(
            0, b"folder-%06d/image-%09d.jpg" % (number // _FOLDER, number), 100_000 + number % 1_000
        )


def _paths(folder: Path) -> JobPaths:
    from imagemill.job.paths import JobPaths
    from imagemill.system import files

    paths = JobPaths(folder / "job")
    for one in (paths.plan, paths.predictions):
        files.make_folder(one)
    return paths


def spool(folder: Path, images: int) -> None:
    """The listing as it comes, into a file."""
    from imagemill.job import plan

    plan.spool(_entries(images), _paths(folder).spool)


def cut(folder: Path, images: int) -> None:
    """The listing into shards."""
    from imagemill.job import plan

    paths = _paths(folder)
    plan.cut(paths.spool, paths.plan, plan.auto_shard_size(images, _DEVICES), by_group=False)


def shards(folder: Path, images: int) -> None:
    """What every start reads: the footers of the plan."""
    from imagemill.job import plan

    assert sum(shard.count for shard in plan.shards(_paths(folder).plan)) == images


def parts(folder: Path, _: int) -> None:
    """All answers, through the real sink."""
    import harness
    import numpy as np

    from imagemill.job import plan
    from imagemill.pipeline.sink import Sink
    from imagemill.records import Batch, Outputs, Row, Status, TopK

    paths = _paths(folder)
    harness.null_bundle(folder / "models", classes=_CLASSES, size=8)
    from imagemill.models import bundle

    card = bundle.load(folder / "models" / "null").card
    job = _job(folder)
    job = replace(job, session=replace(job.session, card=card), output=str(paths.root))
    sink = Sink(job, "null", {})
    rng = np.random.default_rng(0)
    for shard in plan.shards(paths.plan):
        rows = tuple(
            Row(row.index, shard, "/photos", row.path.decode(), Status.OK, None, 640, 480, place)
            for place, row in enumerate(plan.read(paths.plan, shard))
        )
        ids = rng.integers(0, _CLASSES, (len(rows), 5), np.int32)
        top = TopK(
            ids,
            rng.random((len(rows), 5), np.float32),
            np.full(len(rows), 5, np.intp),
            Outputs(np.zeros((0, 0), np.float32)),
        )
        for part in sink.write(Batch(np.zeros((0, 8, 8, 3), np.uint8), len(rows), rows), top):
            part.commit()


def committed(folder: Path, _: int) -> None:
    """What a resumed start asks: which parts are there."""
    from imagemill.job import ledger, plan
    from imagemill.job.store import open_store

    paths = _paths(folder)
    every = plan.shards(paths.plan)
    parts = ledger.existing_parts(open_store(paths))
    assert all(shard.number in parts for shard in every)


def close(folder: Path, images: int) -> None:
    """Closing the ledger of a job that this launcher has run to its end, with its receipts."""
    from imagemill.job import ledger, plan
    from imagemill.job.store import open_store
    from imagemill.records import Receipt

    paths = _paths(folder)
    every = plan.shards(paths.plan)
    receipts = [Receipt(shard.number, shard.count, 0, 50_000, 1.0, "0" * 64) for shard in every]
    assert (
        ledger.close(
            open_store(paths), every, _job(folder), receipts, lambda _, path: b"/photos/" + path
        ).images
        == images
    )


def reread(folder: Path, images: int) -> None:
    """Closing it where all parts are of earlier launches: each is read."""
    from imagemill.job import ledger, plan
    from imagemill.job.store import open_store

    paths = _paths(folder)
    tally = ledger.close(
        open_store(paths),
        plan.shards(paths.plan),
        _job(folder),
        (),
        lambda _, path: b"/photos/" + path,
    )
    assert tally.images == images


def verify(folder: Path, _: int) -> None:
    """`imagemill verify`: every byte."""
    from imagemill.job import ledger, plan
    from imagemill.job.store import open_store

    paths = _paths(folder)
    every = plan.shards(paths.plan)
    found = [
        problem
        for problem in ledger.verify(open_store(paths), every, _job(folder))
        if problem.shard is not None
    ]
    assert not found, found[:3]


def _job(folder: Path) -> Job:
    from imagemill.records import Card, Job, Limits, Precision, Recipe, SessionSpec

    card = Card("null", "null", (), Recipe(), (0, 0, 0), (1, 1, 1), "", "", {})
    return Job(
        str(folder / "job"),
        ("/photos",),
        SessionSpec("", card, Precision.FP32, 4),
        "model",
        1,
        5,
        Limits(),
        "plan",
        "answer",
    )


STEPS: tuple[Callable[[Path, int], None], ...] = (
    spool,
    cut,
    shards,
    parts,
    committed,
    close,
    reread,
    verify,
)


def run_step(name: str, folder: Path, images: int) -> None:
    """Do one step in this process and print what it cost."""
    step = next(step for step in STEPS if step.__name__ == name)
    import imagemill.job.ledger  # noqa: F401 - the libraries are not the step's

    begun, cpu = time.monotonic(), time.process_time()
    step(folder, images)
    seconds, cpu_s = time.monotonic() - begun, time.process_time() - cpu
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mib": int(peak[1]) / 1024}))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, images: int) -> None:
    """All steps for one size, a line of the table each."""
    from imagemill.job import plan

    size = plan.auto_shard_size(images, _DEVICES)
    for step in STEPS:
        command = [
            sys.executable,
            __file__,
            "--step",
            step.__name__,
            "--folder",
            str(folder),
            "--sizes",
            str(images),
        ]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        }
        found = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        )
        per = 1e6 * found["cpu_s"] / images
        cells = (
            f"{images:>11,}",
            f"{step.__name__:9}",
            f"{found['seconds']:8.2f}",
            f"{per:12.2f}",
            f"{found['peak_mib']:8.1f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    job = folder / "job"
    kinds = {"listing": job / "plan" / ".listing.arrow.tmp"}
    listing = kinds["listing"].stat().st_size / images
    planned = (_bytes(job / "plan") - kinds["listing"].stat().st_size) / images
    print(
        f"  {-(-images // size):,} shards of {size:,}; bytes an image: spooled {listing:.1f}, plan"
        f" {planned:.1f}, parts {_bytes(job / 'predictions') / images:.1f}; manifest"
        f" {(job / 'manifest.json').stat().st_size / 2**20:.1f} MiB\n",
        flush=True,
    )


# ── requests ──────────────────────────────────────────────────────────────────────────────────────


def requests(images: int, shard_size: int) -> None:
    """Run one job with source and output in a store, and its finished repeat, and count what the
    store was asked.
    """
    import contextlib

    import harness

    import helpers
    import s3
    import sample_images as made

    seen: Counter[str] = Counter()

    class Counting(s3._Handler):
        def note(self) -> s3.Request:
            kind = "LIST" if self.command == "GET" and "list-type" in self.path else self.command
            of_output = re.search(r"[/=]job(?:/|%2F)?([^&?]*)", self.path)
            seen[
                f"{kind}"
                f" {re.sub('[0-9].*', '…', of_output[1]) or 'output' if of_output else 'source'}"
            ] += 1
            return s3.Request(0, self.command, self.path)

        def fault(self, _: s3.Request) -> None:
            return None

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagemill-scaling-")))
        endpoint = stack.enter_context(s3.serving())
        os.environ.update(s3.environment(endpoint))
        bucket = s3.new_bucket(endpoint)
        bucket.fill({f"photos/{n:04d}.jpg": made.jpeg(24, 24, seed=n % 16) for n in range(images)})
        Counting.upstream = int(endpoint.rpartition(":")[2])
        server = s3.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
        server.daemon_threads = True
        s3.threading.Thread(target=server.serve_forever, daemon=True).start()
        harness.null_bundle(folder / "models")
        env = helpers.environment(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.server_address[1]}",
            XDG_CACHE_HOME=str(folder / "cache"),
            IMAGEMILL_MODELS=str(folder / "models"),
        )
        command = [
            "run",
            f"{bucket.url}/photos",
            "--output",
            f"{bucket.url}/job",
            "--model",
            "null",
            "--devices",
            "null:1",
        ]
        command += ["--shard-size", str(shard_size), "--no-preflight", "--no-report"]
        for what in ("the job", "the same command again"):
            seen.clear()
            result = helpers.imagemill_cli(*command, env=env)
            assert result.code == 0, result
            print(
                f"{what}: {images:,} images, shards of {shard_size}: {sum(seen.values()):,}"
                " requests"
            )
            for kind, count in sorted(seen.items()):
                print(f"  {count:6,}  {kind}")
        server.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument(
        "--requests",
        type=int,
        nargs=2,
        metavar=("IMAGES", "SHARD_SIZE"),
        help="count requests to an object store",
    )
    parser.add_argument("--step", choices=[step.__name__ for step in STEPS], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if asked.step:
        run_step(asked.step, asked.folder, asked.sizes[0])
        return 0
    if asked.requests:
        requests(*asked.requests)
        return 0
    print("|    images | step      |  seconds | CPU µs/image | peak MiB |")
    print("|------------:|-----------|---------:|-------------:|---------:|")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(prefix="imagemill-scaling-", dir=asked.folder) as name:
            measure(Path(name), size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
