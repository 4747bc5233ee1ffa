"""Kill the workers and launchers of one job at random moments, let it finish, and compare it with a
job that nobody disturbed.

    python benchmarks/chaos.py --images 3000 --kills 100 --seed 1

Every kill is a SIGKILL to a real process: the launcher, one of its workers, or a worker's
disposable decoder. A launcher that is dead is started again, as an operator would. After the last
kill one quiet run finishes the job. Then there must be exactly one row per image, and every part
must equal the undisturbed job's byte for byte. Reading is slowed down (from outside) so that there
is something to kill. The last line is the result; the seed and every kill are printed before, so
that a failure can be reported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import harness  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402

SLOW_READS = """
if WORKER:
    def slow(module):
        fetch = module.FolderSource.fetch
        def slowed(self, path, locator, max_bytes):
            time.sleep(float(os.environ["CHAOS_READ_SECONDS"]))
            return fetch(self, path, locator, max_bytes)
        module.FolderSource.fetch = slowed
    after_import("imagemill.pipeline.sources.folder", slow)
"""
_MOST_KILLS_RUNNING = 6
"""Kills of workers between two of the launcher's: three in a row before any is ready would end the
job by rights, which is allowed here, but wastes a start.
"""


@dataclass
class Report:
    """What a chaos run was."""

    seed: int
    images: int
    kills: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    shards: int = 0
    seconds: float = 0.0
    committed_under_fire: int = 0

    def __str__(self) -> str:
        killed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return (
            f"chaos: {self.kills.total()} kills ({killed}), seed {self.seed}, {self.launches}"
            f" launches, {self.seconds:.0f} s: {self.images} images, one row each, {self.shards}"
            f" parts ({self.committed_under_fire} committed under fire) equal byte for byte to an"
            " undisturbed run's"
        )


def make_images(folder: Path, count: int) -> None:
    """Small images, all different, some of them bad, in two folders."""
    for number in range(count):
        data = sample_images.jpeg(40 + number % 7, 36, seed=number, quality=80)
        if number % 50 == 7:
            data = sample_images.half(data)
        elif number % 50 == 23:
            data = b"not an image"
        path = folder / f"{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def chaos(
    folder: Path, count: int, kills: int, seed: int, notify: Callable[[str], None] = print
) -> Report:
    """Run one job under fire below `folder`. Raises: AssertionError where a promise is broken."""
    source, calm, output = folder / "images", folder / "calm", folder / "out"
    make_images(source, count)
    models = harness.null_bundle(folder / "models")
    arguments = [
        "run",
        source,
        "--model",
        "null",
        "--devices",
        "null:2",
        "--num-workers",
        "2",
        "--shard-size",
        "8",
        "--json",
    ]
    quiet = helpers.environment(IMAGEMILL_MODELS=str(models))
    result = helpers.imagemill_cli(*arguments, "--output", calm, env=quiet)
    assert result.code == 0, result

    rng, report, begun = random.Random(seed), Report(seed, count), time.monotonic()
    # Four threads read. Some half of the time no worker is ready; a kill comes every 0.8 s on
    # average. The last shard is held, so that the job does not end before the last kill.
    slow = harness.Hold(
        folder,
        count - 8,
        SLOW_READS,
        IMAGEMILL_MODELS=str(models),
        CHAOS_READ_SECONDS=str(round(4 * 0.5 * kills / count, 4)),
    ).environment
    workers_killed = 0
    launcher: subprocess.Popen[bytes] | None = None
    with (folder / "launcher.err").open("ab") as errors:
        try:
            while report.kills.total() < kills:
                if launcher is None or launcher.poll() is not None:
                    assert launcher is None or launcher.returncode != 0, (
                        f"the job ended after {report.kills.total()} kills: too few images"
                    )
                    harness.assert_sound_so_far(output)
                    launcher = _launch([*arguments, "--output", output], slow, errors)
                    report.launches += 1
                    workers_killed = 0
                time.sleep(rng.uniform(0.0, 1.6))
                if report.kills.total() >= kills // 2:  # on a slow machine none may be ready yet
                    running = launcher
                    helpers.until(
                        lambda running=running: helpers.parts(output) or running.poll() is not None,
                        seconds=600,
                    )
                workers = harness.children(launcher.pid)
                decoders = [pid for worker in workers for pid in harness.children(worker)]
                choice = rng.random()
                if choice < 0.3 or workers_killed >= _MOST_KILLS_RUNNING:
                    kind, pid = "launchers", launcher.pid
                elif decoders and choice < 0.5:
                    kind, pid = "decoders", rng.choice(decoders)
                elif workers:
                    kind, pid = "workers", rng.choice(workers)
                else:
                    kind, pid = "launchers", launcher.pid
                if launcher.poll() is None and harness.kill(pid):
                    report.kills[kind] += 1
                    workers_killed += kind == "workers"
                    notify(
                        f"{time.monotonic() - begun:7.2f} s  kill {report.kills.total():3}:"
                        f" {kind[:-1]} {pid}"
                    )
                if kind == "launchers":
                    launcher.wait()
        finally:
            if launcher is not None and launcher.poll() is None:
                launcher.kill()
                launcher.wait()
    report.committed_under_fire = harness.assert_sound_so_far(output)
    assert report.committed_under_fire, "nothing was committed under fire: nothing was shown"
    result = helpers.imagemill_cli(*arguments, "--output", output, env=quiet)
    assert result.code == 0, result
    report.launches += 1
    rows = harness.assert_complete(output)
    assert rows.num_rows == count
    harness.assert_same(output, calm)
    report.shards, report.seconds = len(harness.part_sums(output)), time.monotonic() - begun
    return report


def _launch(
    arguments: list[object], env: dict[str, str], errors: object
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "imagemill", *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=env
    )  # type: ignore[call-overload]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, default=None, help="default: from the system, and printed"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work, and leave everything (default: a temporary folder)",
    )
    parsed = parser.parse_args()
    seed = parsed.seed if parsed.seed is not None else int.from_bytes(os.urandom(4))
    print(f"seed {seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = parsed.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="imagemill-chaos-"))
        )
        print(chaos(folder, parsed.images, parsed.kills, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
