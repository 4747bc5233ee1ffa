"""What the vector and matrix units of this machine can do at most: compiles limit.c and runs it on
all usable cores.

    python benchmarks/limit.py [--rounds 5] [--seconds 0.5] [--gop-per-image 16.0] [--json]

Prints Gop/s in fp32, bf16 and int8, and where the processor has AMX in bf16 and int8 with it
(median over rounds, all interleaved), and what that is in images/s for a model of so many
operations an image: 16.0 for resnext101_32x4d (8.0 GMAC). Needs gcc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

KINDS = ("fp32", "bf16", "int8", "bf16-amx", "int8-amx")
SOURCE = Path(__file__).with_name("limit.c")
LACKS = 3


class Limit:
    """The compiled loop, for as long as it is held open.

    `measure(kind, seconds)` returns Gop/s over all usable cores; None where the processor lacks the
    instructions.
    """

    def __enter__(self) -> Limit:
        self._folder = tempfile.TemporaryDirectory(prefix="imagemill-limit-")
        self._binary = Path(self._folder.name) / "limit"
        command = ["gcc", "-O3", "-march=native", "-pthread", "-o", str(self._binary), str(SOURCE)]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            sys.exit("limit.py needs gcc: install it, or leave the limit out")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def measure(self, kind: str, seconds: float) -> float | None:
        done = subprocess.run(
            [str(self._binary), kind, str(seconds)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == LACKS:
            return None
        done.check_returncode()
        return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--gop-per-image", type=float, default=16.0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with Limit() as limit:
        for _ in range(asked.rounds):
            for kind in KINDS:
                if (gop := limit.measure(kind, asked.seconds)) is not None:
                    found[kind].append(gop)
    report = {
        kind: {
            "gop_per_second": median(runs),
            "min": min(runs),
            "max": max(runs),
            "images_per_second": median(runs) / asked.gop_per_image,
        }
        for kind, runs in found.items()
        if runs
    }
    if asked.json:
        print(json.dumps(report))
        return
    for kind, row in report.items():
        spread = f"({row['min']:,.0f} to {row['max']:,.0f})"
        print(
            f"{kind:<8}  {row['gop_per_second']:>8,.0f} Gop/s {spread:<20}"
            f" {row['images_per_second']:>7,.1f} images/s"
        )


if __name__ == "__main__":
    main()
