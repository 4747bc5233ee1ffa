"""How long `imagemill run` takes to start, and to find that there is nothing left to do.

    python benchmarks/startup.py --model resnext101_32x4d [--precision int8] [--rounds 5] [--json]

One image, made here. After a first run, which compiles the model and leaves it in the cache, each
round measures, from the start of the command: when a worker is ready, as launcher.log tells; when
the first part is there, which holds the answer of the first logits and so comes after them; when
the command ends; and how long the same command takes when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

POLL_S = 0.002


def image(path: Path) -> None:
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def first_run(command: list[str], output: Path) -> dict[str, float]:
    """Seconds from the start of a new job to its events."""
    log, parts = output / "logs" / "launcher.log", output / "predictions"
    found: dict[str, float] = {}
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if "worker_ready_s" not in found and log.is_file() and " is ready " in log.read_text():
            found["worker_ready_s"] = time.monotonic() - begun
        if "first_part_s" not in found and any(parts.glob("part-*.parquet")):
            found["first_part_s"] = time.monotonic() - begun
        time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return found | {"end_s": time.monotonic() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnext101_32x4d")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="imagemill-startup-") as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        image(folder / "images" / "one.jpg")
        for number in range(asked.rounds + 1):
            output = folder / str(number)
            command = [
                sys.executable,
                "-m",
                "imagemill",
                "run",
                str(folder / "images"),
                "--output",
                str(output),
            ]
            command += ["--model", asked.model, "--precision", asked.precision]
            found = first_run(command, output)
            begun = time.monotonic()
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            rounds.append(found | {"repeat_s": time.monotonic() - begun})
    rounds = rounds[1:]
    report = {name: round(median(one[name] for one in rounds), 3) for name in rounds[0]}
    if asked.json:
        print(json.dumps(report | {"rounds": rounds}))
        return
    for name, seconds in report.items():
        print(f"{name.removesuffix('_s').replace('_', ' '):<14} {seconds:.2f} s")


if __name__ == "__main__":
    main()
