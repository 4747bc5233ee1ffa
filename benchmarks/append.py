"""Time and memory of `--append` for a large job: listing, comparing with the plan, and freezing.

    python benchmarks/append.py --images 1000000 --new 1000

Links to a few tiny images, in folders of 1,000. The job is frozen and no worker is started, so what
is measured is what a finished job needs before its new images are processed. Each step is a process
of its own. Memory is the peak of its resident set; CPU is user and system time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import million  # also finds the modules of the tests
from msgspec.structs import replace

from imagemill.display.observer import Watcher
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline.backends import devices
from imagemill.records import Settings
from imagemill.runner import append, freeze, model, resume
from imagemill.system import files

harness, helpers = million.harness, million.helpers


def settings_of(folder: Path) -> Settings:
    return Settings(
        (str(folder / "images"),), str(folder / "out"), "null", str(folder / "models"), "null"
    )


def freeze_job(folder: Path) -> int:
    """Freeze a job; return its number of images."""
    settings, watcher, chosen = settings_of(folder), Watcher(), devices.resolve("null")
    store = open_store(JobPaths.of(settings.output))
    files.make_folder(store.paths.predictions)
    bundle = model.resolve_model(settings, watcher)
    return freeze.freeze(settings, store, lambda _: ("null", chosen), bundle, watcher).first.images


def append_to_job(folder: Path) -> int:
    """Append to the job; return the number of new images."""
    settings, watcher, chosen = settings_of(folder), Watcher(), devices.resolve("null")
    settings = replace(settings, append=True)
    opened = resume.resume(settings, OpenJob.open(settings.output), chosen, watcher)
    return append.append(settings, opened, chosen, watcher)[1].new.count


STEPS = {"freeze": freeze_job, "append": append_to_job}


def measure(step: str, folder: Path) -> str:
    """Run one step in this process, and return its line of the table as JSON."""
    begun = time.monotonic()
    images = STEPS[step](folder)
    seconds = time.monotonic() - begun
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    user, system, *_ = os.times()
    return json.dumps([step, images, seconds, user + system, peak_mib])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--new", type=int, default=1_000)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.step:
        print(measure(parsed.step, parsed.folder))
        return 0

    def step(name: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--step", name, "--folder", str(folder)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env=helpers.environment()
        )
        name, images, seconds, cpu_s, peak_mib = json.loads(done.stdout)
        cells = [
            f"{name:6}",
            f"{images:9,}",
            f"{seconds:7.1f}",
            f"{cpu_s:7.1f}",
            f"{peak_mib:8.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)

    with tempfile.TemporaryDirectory(prefix="imagemill-append-", dir=parsed.folder) as name:
        folder = Path(name)
        harness.null_bundle(folder / "models", classes=10, size=8)
        million.make_images(folder / "images", parsed.images)
        print("| step   |    images | seconds |   CPU s | peak MiB |")
        print("|--------|----------:|--------:|--------:|---------:|")
        step("freeze", folder)
        million.make_images(folder / "images", parsed.new, first=parsed.images)
        for _ in range(2):
            step("append", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
