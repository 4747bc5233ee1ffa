"""Rate, memory and cost per image of jobs of very different length, in one table.

    python benchmarks/million.py --sizes 10000 100000 1000000

Tiny images (8×8 JPEG and PNG; hard links to a few files, in folders of 1,000) on the null device,
so that what is measured is everything but the model: listing, leasing, reading, decoding,
committing, closing the ledger. Memory is the peak of the resident set (VmHWM) of the launcher and
of the largest worker. CPU is user and system time, read from /proc while they run: of the whole job
in seconds, and for each further image, which is the job's less that of a job of 1,000 images, where
all is paid that is paid once (imports, the first image of each format, the first shard).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import harness  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402

_FOLDER = 1000
_START = 1000
"""Images of the job that the others are compared with."""
_MOST_LINKS = 60_000
"""ext4 allows 65,000 links to one file."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Watched:
    """The last reading of /proc of one process."""

    peak_kib: int = 0
    cpu_s: float = 0.0

    def look(self, pid: int) -> None:
        with contextlib.suppress(OSError, IndexError, StopIteration):
            root = Path(f"/proc/{pid}")
            fields = (root / "stat").read_text().rpartition(")")[2].split()
            line = next(
                line
                for line in (root / "status").read_text().splitlines()
                if line.startswith("VmHWM:")
            )
            self.cpu_s, self.peak_kib = (
                (int(fields[11]) + int(fields[12])) / _TICKS,
                int(line.split()[1]),
            )


@dataclass(frozen=True)
class Measured:
    """One line of the table."""

    images: int
    seconds: float
    listing_s: float
    rate: float
    launcher: Watched
    workers: dict[int, Watched]

    @property
    def cpu_s(self) -> tuple[float, float]:
        """Of the launcher, and of all workers."""
        return self.launcher.cpu_s, sum(worker.cpu_s for worker in self.workers.values())

    def row(self, start: Measured) -> str:
        memory = [
            peak / 1024
            for peak in (
                self.launcher.peak_kib,
                max(worker.peak_kib for worker in self.workers.values()),
            )
        ]
        further = self.images - start.images
        cpu = [
            1e6 * (seconds - least) / further
            for seconds, least in zip(self.cpu_s, start.cpu_s, strict=True)
        ]
        cells = [
            f"{self.images:9,}",
            f"{self.seconds:7.1f}",
            f"{self.listing_s:7.1f}",
            f"{self.rate:8,.0f}",
        ]
        cells += [
            f"{memory[0]:12.1f}",
            f"{memory[1]:10.1f}",
            f"{self.cpu_s[0]:10.2f}",
            f"{self.cpu_s[1]:9.2f}",
            f"{cpu[0]:13.1f}",
            f"{cpu[1]:12.1f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = """\
|  images | seconds | listing | images/s | launcher MiB | worker MiB | launcher s | workers s | launcher each | workers each |
|----------:|--------:|--------:|---------:|-------------:|-----------:|-----------:|----------:|--------------:|-------------:|"""
"""CPU in seconds, and in microseconds for each further image."""


def make_images(folder: Path, count: int, first: int = 0) -> None:
    """Links to a few files, named so that no two are alike; `first` is how many there are."""
    folder.mkdir(parents=True, exist_ok=first > 0)
    originals = folder.parent / "originals"
    originals.mkdir(exist_ok=True)
    kinds = []
    for seed in range(max(16, count // _MOST_LINKS + 1)):
        image = sample_images.photograph(8, 8, seed)
        suffix, kind = (".jpg", "JPEG") if seed % 2 else (".png", "PNG")
        original = originals / f"{folder.name}-{seed}{suffix}"
        original.write_bytes(sample_images.encode(image, kind))
        kinds.append((str(original), suffix))
    for start in range(first, first + count, _FOLDER):
        inside = f"{folder}/{start // _FOLDER:06d}"
        Path(inside).mkdir()
        for number in range(start, min(start + _FOLDER, first + count)):
            file, suffix = kinds[number % len(kinds)]
            os.link(file, f"{inside}/{number:09d}{suffix}")


def measure(folder: Path, count: int, devices: str, checkout: Path | None = None) -> Measured:
    """Run one job over `count` images below `folder`, which are made if they are missing.

    Args:
        folder: has the models, and gets images and output.
        count: number of images.
        devices: of the job.
        checkout: of the imagemill to run, with a .venv of its own; None: the imported one.
    """
    source, output = folder / f"images-{count}", folder / f"out-{count}"
    shutil.rmtree(output, ignore_errors=True)
    if not source.exists():
        make_images(source, count)
    env = helpers.environment(IMAGEMILL_MODELS=str(folder / "models"))
    if checkout is not None:
        del env["PYTHONPATH"]
    command = [
        sys.executable if checkout is None else str(checkout / ".venv" / "bin" / "python"),
        "-P",
        "-m",
        "imagemill",
        "run",
        str(source),
        "--output",
        str(output),
        "--model",
        "null",
        "--devices",
        devices,
        "--no-preflight",
        "--no-report",
        "--json",
    ]
    begun = time.monotonic()
    listing = 0.0
    launcher, workers = Watched(), dict[int, Watched]()
    with (folder / "stdout").open("w+b") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=env)
        while process.poll() is None:
            launcher.look(process.pid)
            for pid in harness.children(process.pid):
                workers.setdefault(pid, Watched()).look(pid)
            if not listing and (output / "job.json").exists():
                listing = time.monotonic() - begun
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        assert process.returncode == 0, f"exit code {process.returncode}"
        out.seek(0)
        summary = helpers.Result(0, out.read().decode(), "").json
    assert (summary["images"], summary["ok"]) == (count, count), summary
    return Measured(count, seconds, listing, summary["images_per_second"], launcher, workers)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--devices", default="null:1")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work, on a file system that has hard links (default: a temporary folder)",
    )
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-million-", dir=parsed.folder) as name:
        folder = Path(name)
        harness.null_bundle(folder / "models", classes=1000, size=8)
        start = measure(folder, _START, parsed.devices)
        cpu = " and ".join(f"{seconds:.2f} s" for seconds in start.cpu_s)
        print(
            f"a job of {_START:,} images: {start.seconds:.1f} s; CPU of launcher and worker {cpu}\n"
        )
        print(HEADER, flush=True)
        for size in parsed.sizes:
            print(measure(folder, size, parsed.devices).row(start), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
