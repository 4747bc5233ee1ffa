"""What an archive of very many small images costs: listing, memory, and resuming a job that is nine
tenths done.

    python benchmarks/archives.py                             a zip of 200,000 members
    python benchmarks/archives.py --kinds zip tar tar.gz

Tiny images (8×8 JPEG and PNG) on the null device, so that what is measured is everything but the
model. For each kind: a job over 2,000 members and one over all; then the last tenth of its parts is
removed and the command repeated, and beside it stands a fresh job over an archive of as many
members as were left to do. Listing is from the command to the frozen job, the start of the
interpreter included; memory is the peak of the resident set (VmHWM) of the launcher and of the
worker.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults"), str(ROOT / "benchmarks")]

import harness  # noqa: E402
from million import Watched  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402

_FEW = 2_000
_FOLDER = 1_000


@dataclass(frozen=True)
class Measured:
    """One command."""

    images: int
    seconds: float
    listing_s: float
    launcher: Watched
    children: dict[int, Watched]

    def row(self, what: str) -> str:
        """Return a line of the table; of the children, the worker is the largest."""
        worker = max(self.children.values(), key=lambda one: one.peak_kib, default=Watched())
        memory = [watched.peak_kib / 1024 for watched in (self.launcher, worker)]
        return (
            f"| {what:22} | {self.images:8,} | {self.listing_s:7.1f} | {self.seconds:7.1f} |"
            f" {memory[0]:12.1f} | {memory[1]:10.1f} |"
        )


HEADER = """\
| job                    | images | listing | seconds | launcher MiB | worker MiB |
|------------------------|---------:|--------:|--------:|-------------:|-----------:|"""


def members(count: int) -> Iterable[tuple[str, bytes]]:
    """Names and bytes of many small images, of sixteen kinds."""
    kinds = [
        (
            sample_images.encode(
                sample_images.photograph(8, 8, seed), "JPEG" if seed % 2 else "PNG"
            ),
            seed % 2,
        )
        for seed in range(16)
    ]
    for number in range(count):
        data, is_jpeg = kinds[number % len(kinds)]
        yield f"{number // _FOLDER:06d}/{number:09d}{'.jpg' if is_jpeg else '.png'}", data


def write_zip(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members(count):
            archive.writestr(name, data)


def write_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members(count):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            archive.members.clear()  # type: ignore[attr-defined]  # else it holds them


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "zip": write_zip,
    "tar": write_tar,
    "tar.gz": write_tar,
}


def run(folder: Path, source: Path, output: Path) -> Measured:
    """Run a job, or what is left of it, and watch its processes."""
    command = [sys.executable, "-m", "imagemill", "run", str(source), "--output", str(output)]
    command += ["--model", "null", "--devices", "null:1", "--json", "--no-report"]
    launcher, children = Watched(), dict[int, Watched]()
    listing, begun = 0.0, time.monotonic()
    with (folder / "stdout").open("w+b") as out:
        env = helpers.environment(IMAGEMILL_MODELS=str(folder / "models"))
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=env)
        while process.poll() is None:
            launcher.look(process.pid)
            for pid in harness.children(process.pid):
                children.setdefault(pid, Watched()).look(pid)
            if not listing and (output / "job.json").exists():
                listing = time.monotonic() - begun
            time.sleep(0.01)
        seconds = time.monotonic() - begun
        assert process.returncode == 0, f"exit code {process.returncode}"
        out.seek(0)
        summary = helpers.Result(0, out.read().decode(), "").json
    assert summary["ok"] == summary["images"], summary
    return Measured(summary["images"], seconds, listing, launcher, children)


def measure(folder: Path, kind: str, count: int) -> None:
    """The four jobs of one kind of archive."""
    archives = {size: folder / f"{size}.{kind}" for size in (_FEW, count // 10, count)}
    for size, path in archives.items():
        WRITERS[kind](path, size)
    print(run(folder, archives[_FEW], folder / f"few-{kind}").row(kind), flush=True)
    output = folder / f"all-{kind}"
    print(run(folder, archives[count], output).row(kind), flush=True)
    parts = sorted((output / "predictions").glob("part-*.parquet"))
    for part in parts[len(parts) - len(parts) // 10 :]:
        part.unlink()
    (output / "summary.json").unlink()
    print(run(folder, archives[count], output).row(f"{kind}, resumed at 90 %"), flush=True)
    print(
        run(folder, archives[count // 10], folder / f"tenth-{kind}").row(f"{kind}, fresh tenth"),
        flush=True,
    )
    mib = archives[count].stat().st_size / 2**20
    print(
        f"\n{kind}: {mib:,.0f} MiB, {count:,} members, {len(parts):,} parts of which"
        f" {len(parts) // 10:,} were left to do\n",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=list(WRITERS), default=["zip"])
    parser.add_argument("--members", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-archives-", dir=parsed.folder) as name:
        folder = Path(name)
        harness.null_bundle(folder / "models", classes=1000, size=8)
        run(folder, _warm(folder), folder / "warm")
        print(HEADER, flush=True)
        for kind in parsed.kinds:
            measure(folder, kind, parsed.members)
    return 0


def _warm(folder: Path) -> Path:
    """A small archive for a first run that nobody counts: it fills the caches of the file
    system.
    """
    write_zip(folder / "warm.zip", 32)
    return folder / "warm.zip"


if __name__ == "__main__":
    sys.exit(main())
