"""A job in a memory control group that is too small for some of its images: the kernel kills
workers, and no row is lost.

    python benchmarks/oom.py --limit-mib 2200           as root: it makes a control group, and
    removes it again

Small images, and among them PNG files of 13,000×13,000 pixels that decode to half a gigabyte each,
on the null device with two decoding threads. One such image fits into the limit, two at once do
not. Prints how often the kernel killed, and what the rows say; fails where a row is missing or a
small image's answer is not that of a run without a limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import harness  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402

_SIDE = 13_000


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group (v1's memory controller, or v2) of at most `limit` bytes, swap not
    counted.
    """
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"imagemill-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def kills(group: Path) -> int:
    """How often the kernel has killed in the group."""
    file = (
        group / "memory.oom_control"
        if (group / "memory.oom_control").exists()
        else group / "memory.events"
    )
    return next(
        int(line.split()[1])
        for line in file.read_text().splitlines()
        if line.startswith("oom_kill ")
    )


def rows(output: Path) -> dict[str, tuple[str, object]]:
    return {row["path"]: (row["status"], row["class_id"]) for row in helpers.rows(output)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-mib", type=int, default=2200)
    parser.add_argument("--large", type=int, default=6, help="how many large images")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-oom-") as name:
        folder = Path(name)
        source = folder / "images"
        source.mkdir()
        for number in range(200):
            (source / f"{number:03d}.jpg").write_bytes(sample_images.jpeg(40, 36, seed=number))
        Image.new("RGB", (_SIDE, _SIDE), (9, 99, 199)).save(source / "100-large.png")
        for number in range(1, parsed.large):
            os.link(source / "100-large.png", source / f"100-large-{number}.png")
        env = helpers.environment(IMAGEMILL_MODELS=str(harness.null_bundle(folder / "models")))
        command = [
            sys.executable,
            "-m",
            "imagemill",
            "run",
            str(source),
            "--model",
            "null",
            "--devices",
            "null",
            "--num-workers",
            "2",
        ]
        subprocess.run(
            [*command, "--output", str(folder / "free")], env=env, check=True, capture_output=True
        )
        with memory_group(parsed.limit_mib * 2**20) as group:
            script = f"echo $$ > {group}/cgroup.procs && exec " + " ".join(
                [*command, "--output", str(folder / "tight"), "--json"]
            )
            done = subprocess.run(
                ["sh", "-c", script], env=env, check=False, capture_output=True, text=True
            )
            killed = kills(group)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        summary = json.loads(done.stdout)
        free, tight = rows(folder / "free"), rows(folder / "tight")
        assert free.keys() == tight.keys()
        assert all(tight[path] == answer for path, answer in free.items() if "large" not in path)
        print(
            f"oom: limit {parsed.limit_mib} MiB, {killed} kills by the kernel,"
            f" {summary['devices'][0]['restarts']} restarts: {len(tight)} images, one row each; the"
            f" large ones: {dict(Counter(s for p, (s, _) in tight.items() if 'large' in p))}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
