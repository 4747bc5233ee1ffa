"""CPU time of a worker per tiny image, of two checkouts of imagemill in alternation.

    python benchmarks/worker_cpu.py OTHER_CHECKOUT [--images 20000] [--rounds 5]

The images are those of `million.py`: 8×8 pixels, JPEG and PNG. The null device computes next to
nothing, so the worker's own work is measured: reading, decoding, batches, rows. Each checkout runs
with its own `.venv/bin/python`.

Each round runs a short and a long job of each checkout, and the first checkout to run changes every
round. CPU time per image is the difference of the two jobs, because imports and the first image of
each format are paid once. Figures are medians over the rounds; each ratio is the median of the
ratios of the rounds. On a loaded machine only the CPU time is comparable.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import million

SHORT = 2_000
"""Images of the short job."""


def measure(folder: Path, checkout: Path, images: int) -> tuple[float, float]:
    """Return the worker's CPU time per image in microseconds, and its images/s."""
    short = million.measure(folder, SHORT, "null:1", checkout)
    long = million.measure(folder, images, "null:1", checkout)
    return 1e6 * (long.cpu_s[1] - short.cpu_s[1]) / (images - SHORT), long.rate


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="checkout to compare with, with a .venv")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    checkouts = {"this": million.ROOT, "other": asked.other.resolve()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="imagemill-worker-") as name:
        folder = Path(name)
        million.harness.null_bundle(folder / "models", classes=1000, size=8)
        for number in range(asked.rounds):
            for version in sorted(checkouts, reverse=bool(number % 2)):
                found[version].append(measure(folder, checkouts[version], asked.images))
    print("| of one worker | this | other | this / other |\n|---|---|---|---|")
    for place, what in enumerate(("µs of CPU time per image", "images/s")):
        this, other = ([round_[place] for round_ in found[version]] for version in checkouts)
        ratio = median(a / b for a, b in zip(this, other, strict=True))
        print(f"| {what} | {median(this):,.1f} | {median(other):,.1f} | {ratio:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
