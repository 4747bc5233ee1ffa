"""Compare two checkouts of imagemill: the same rows bit for bit, and speed in alternation.

    python benchmarks/compare_versions.py OTHER_CHECKOUT --images DIR [--rounds 5] [--work-dir WORK]

Each checkout runs with its own `.venv/bin/python`, and has its own models and caches in WORK. int8
models are quantised by each version on the images of DIR.

Rows: the images of DIR in fp32, bf16 and int8, with logits. All columns but `error`, whose wording
may change, must be equal. The exit code is 1 if they are not.

Speed: both versions take turns, the first to run changes every round, and the ratio is the median
of the ratios of the rounds. A ratio above 1 means that this checkout is faster than the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SMALL = "efficientnet_lite0"
PRECISIONS = ("fp32", "bf16", "int8")
BATCH_SIZE = 4
TINY_IMAGES = 20_000
POLL_S = 0.002


@dataclass(frozen=True)
class Version:
    """A checkout, with models and caches of its own."""

    name: str
    checkout: Path
    home: Path

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start `imagemill ARGUMENTS`; its messages go to a file."""
        environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        environment |= {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "IMAGEMILL_MODELS": str(self.home / "models"),
        }
        command = [self.checkout / ".venv" / "bin" / "python", "-P", "-m", "imagemill", *arguments]
        with (self.home / "output.txt").open("wb") as output:
            return subprocess.Popen(
                list(map(str, command)), env=environment, stdout=output, stderr=output
            )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a command; exit with its messages if it failed."""
        if process.wait():
            sys.exit(f"{self.name}: {process.args!r}\n{(self.home / 'output.txt').read_text()}")

    def run(self, *arguments: object) -> str:
        """Run `imagemill ARGUMENTS` to its end, and return what it printed."""
        self.finish(self.start(*arguments))
        return (self.home / "output.txt").read_text()

    def classify(self, source: Path, *flags: object, model: str = SMALL) -> float:
        """Return the wall-clock seconds of one new job."""
        shutil.rmtree(self.home / "out", ignore_errors=True)
        begun = time.perf_counter()
        self.run(*self._job(source, model), *flags)
        return time.perf_counter() - begun

    def first_part(self, source: Path) -> float:
        """Return the seconds from the start of a new job to its first committed part."""
        shutil.rmtree(self.home / "out", ignore_errors=True)
        parts = self.home / "out" / "predictions"
        begun = time.perf_counter()
        process = self.start(*self._job(source, SMALL), "--precision", "fp32", "--shard-size", 64)
        while not any(parts.glob("part-*.parquet")) and process.poll() is None:
            time.sleep(POLL_S)
        seconds = time.perf_counter() - begun
        self.finish(process)
        return seconds

    def help(self) -> float:
        """Return the seconds of `imagemill --help`."""
        begun = time.perf_counter()
        self.run("--help")
        return time.perf_counter() - begun

    def _job(self, source: Path, model: str) -> tuple[object, ...]:
        options = ("--batch-size", BATCH_SIZE, "--no-report")
        return ("run", source, "--output", self.home / "out", "--model", model, *options)

    def rows(self) -> pa.Table:
        """Return the rows of the last job, in the order of the plan."""
        parts = sorted((self.home / "out" / "predictions").glob("part-*.parquet"))
        return pa.concat_tables(map(pq.read_table, parts)).replace_schema_metadata()

    def prepare(self, model: str, images: Path, calibration: int) -> None:
        """Make a model and its int8 variant, unless an earlier run made them in the same way. Speed
        does not depend on weights, so those of large models are random.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        done, way = self.home / f"{model}.done", f"{calibration} images of {images}"
        if done.exists() and done.read_text() == way:
            return
        shutil.rmtree(self.home / "models" / model, ignore_errors=True)
        self.run("get-model", model, *(() if model == SMALL else ("--random-weights", 0)))
        counts = ("--calibration", calibration, "--held-out", 50)
        self.run("quantize", model, "--images", images, *counts)
        done.write_text(way)


def differences(one: pa.Table, other: pa.Table) -> list[str]:
    """Return the columns that differ, `error` left out, with the number of rows."""
    if one.schema != other.schema or len(one) != len(other):
        return [f"{len(one)} rows of {one.schema.names}, {len(other)} of {other.schema.names}"]
    found = []
    for name in one.schema.names:
        # As text, because NaN equals nothing; repr of a float tells every bit of it.
        pairs = zip(one[name].to_pylist(), other[name].to_pylist(), strict=True)
        if name != "error" and (count := sum(repr(a) != repr(b) for a, b in pairs)):
            found.append(f"{name} in {count} of {len(one)} rows")
    return found


def compare_rows(versions: list[Version], images: Path) -> bool:
    """Print whether the rows are equal in each precision, and return whether all are."""
    same = True
    for precision in PRECISIONS:
        tables = []
        for version in versions:
            version.classify(
                images, "--precision", precision, "--devices", "cpu:1", "--save", "logits"
            )
            tables.append(version.rows())
        found = differences(*tables)
        same = same and not found
        print(
            f"rows {precision}: {len(tables[0])} images, {'; '.join(found) or 'equal'}", flush=True
        )
    return same


def links(folder: Path, images: Path, count: int) -> Path:
    """Fill a folder with `count` links to the files below another one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = sorted(
        path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not found:
        sys.exit(f"{images}: no .jpg, .jpeg or .png")
    for number in range(count):
        original = found[number % len(found)]
        (folder / f"{number:06d}{original.suffix}").symlink_to(original.resolve())
    return folder


def tiny_images(folder: Path) -> Path:
    """Return a folder of a few images of 16 by 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(50):
        Image.new("RGB", (16, 16), (number * 5, 100, 200)).save(folder / f"{number}.jpg")
    return folder


def compare_speed(
    versions: list[Version], images: Path, work: Path, asked: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """Return seconds and ratios by the name of what was measured."""
    counts, model = asked.counts, asked.large
    large = links(work / "large", images, counts[0])
    small = links(work / "small", images, counts[1])
    tiny = links(work / "tiny", tiny_images(work / "pixels"), counts[2])
    int8, bf16 = ("--precision", "int8"), ("--precision", "bf16")
    acts: dict[str, Callable[[Version], float]] = {
        f"{model} int8, {counts[0]} images": lambda one: one.classify(large, *int8, model=model),
        f"{SMALL} bf16, {counts[1]} images": lambda one: one.classify(small, *bf16),
        f"null device, {counts[2]} tiny images": lambda one: one.classify(
            tiny, "--devices", "null"
        ),
        "--help": Version.help,
        "first committed part": lambda one: one.first_part(small),
    }
    report: dict[str, dict[str, object]] = {}
    for name, act in acts.items():
        seconds: dict[str, list[float]] = {version.name: [] for version in versions}
        for version in versions:  # compiled models and file caches are warm in every round
            act(version)
        for number in range(asked.rounds):
            for version in versions if number % 2 else versions[::-1]:
                seconds[version.name].append(act(version))
        pairs = zip(seconds["this"], seconds["other"], strict=True)
        ratio = median(other / this for this, other in pairs)
        report[name] = {"ratio": round(ratio, 3), "seconds": seconds}
        print(
            f"| {name} | {median(seconds['this']):.2f} s | {median(seconds['other']):.2f} s"
            f" | {ratio:.3f} |",
            flush=True,
        )
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="checkout to compare with, with a .venv")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("rows", "speed"), help="default: both")
    parser.add_argument(
        "--large",
        default="resnext101_32x4d",
        metavar="MODEL",
        help="model whose int8 speed is compared (default: %(default)s)",
    )
    parser.add_argument("--calibration", type=int, default=100, help="images (default: 100)")
    parser.add_argument(
        "--counts",
        type=int,
        nargs=3,
        default=(200, 2000, TINY_IMAGES),
        metavar="N",
        help="images of the three jobs (default: 200 2000 20000)",
    )
    parser.add_argument("--work-dir", type=Path, help="keep models and caches here for next time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    asked = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="imagemill-compare-") as temporary:
        work = (asked.work_dir or Path(temporary)).resolve()
        versions = [
            Version("this", here, work / "home-this"),
            Version("other", asked.other.resolve(), work / "home-other"),
        ]
        images = asked.images.resolve()
        models = {SMALL} if asked.only == "rows" else {SMALL, asked.large}
        for version in versions:
            for model in sorted(models):
                version.prepare(model, images, asked.calibration)
        same = asked.only == "speed" or compare_rows(versions, images)
        if asked.only != "rows":
            print("| what | this | other | speed of this / other |\n|---|---|---|---|", flush=True)
            report = compare_speed(versions, images, work, asked)
            if asked.json:
                asked.json.write_text(json.dumps(report, indent=1))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
