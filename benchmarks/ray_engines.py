"""`--engine ray` on one node against the local engine on the same cores, and against the same job
by Ray Data, in two ways.

    python benchmarks/ray_engines.py --images DIR --models-dir DIR [--model efficientnet_lite0]
    [--count 1500] [--rounds 3]

    local       imagemill run --devices cpu
    ray         imagemill run --devices cpu --engine ray, on a cluster of one node with the same cores
    pool        our own run_shards as a class in Ray Data's actor pool: map_batches over the shards,
                one shard a task
    documented  Ray Data + ONNX Runtime as Ray's guide to batch inference does it
                (benchmarks/peers/ray_data.py)

All in fp32, over the same --count images (the folder's, over and over), in turn, for some rounds;
medians. *steady* is images/s without the start: for the first three from the first lease to the
last commit, for the last as the peer counts it. *whole* is over the time of the whole process. A
cluster runs for `ray` and `pool` before their clock starts, as it would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import helpers  # noqa: E402
from ray_nodes import cluster  # noqa: E402

if TYPE_CHECKING:
    from imagemill.records import DeviceSpec, Job

_SETTLES_S = 10.0
"""A cluster's own processes are busy for some seconds after it has started."""
KINDS = ("local", "ray", "pool", "documented")


def links(images: Path, goal: Path, count: int) -> Path:
    """A folder of `count` links to the JPEG files of another."""
    goal.mkdir()
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for number in range(count):
        (goal / f"{number:06d}.jpg").symlink_to(found[number % len(found)].resolve())
    return goal


def imagemill(
    engine: str, source: Path, output: Path, asked: argparse.Namespace, env: dict[str, str]
) -> tuple[float, float]:
    begun = time.monotonic()
    options = [
        "--model",
        asked.model,
        "--devices",
        "cpu",
        "--precision",
        "fp32",
        "--no-preflight",
        "--no-report",
        "--json",
    ]
    options += ["--engine", engine]
    result = helpers.finish(
        helpers.start("run", source, "--output", output, *options, env=env), timeout=3600
    )
    assert result.code == 0, result
    return result.json["images_per_second"], asked.count / (time.monotonic() - begun)


def pool(
    source: Path, output: Path, asked: argparse.Namespace, env: dict[str, str]
) -> tuple[float, float]:
    begun = time.monotonic()
    command = [
        sys.executable,
        __file__,
        "--images",
        str(source),
        "--model",
        asked.model,
        "--pool",
        str(output),
    ]
    found = json.loads(
        subprocess.run(
            command, env=env, check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
    )
    return found["steady"], asked.count / (time.monotonic() - begun)


def documented(source: Path, asked: argparse.Namespace) -> tuple[float, float]:
    script = ROOT / "benchmarks" / "peers" / "ray_data.py"
    options = [
        "--images",
        str(source),
        "--model-dir",
        str(asked.models_dir / asked.model),
        "--concurrency",
        str(asked.sessions),
    ]
    command = [
        sys.executable,
        str(script),
        *options,
        "--threads",
        str(max(1, len(os.sched_getaffinity(0)) // asked.sessions)),
    ]
    begun = time.monotonic()
    found = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return found["steady_images_per_second"], asked.count / (time.monotonic() - begun)


def once(kind: str, source: Path, output: Path, asked: argparse.Namespace) -> tuple[float, float]:
    """One of the four, once: steady and whole images/s."""
    env = helpers.environment(IMAGEMILL_MODELS=str(asked.models_dir))
    if kind == "documented":
        return documented(source, asked)
    if kind == "local":
        return imagemill("local", source, output, asked, env)
    spare = (
        1 if kind == "pool" else 0
    )  # Ray Data's own reading task wants one, though it has nothing to do
    with cluster(num_cpus=len(os.sched_getaffinity(0)) + spare) as nodes:
        env["RAY_ADDRESS"] = nodes.address
        time.sleep(_SETTLES_S)
        return (
            imagemill("ray", source, output, asked, env)
            if kind == "ray"
            else pool(source, output, asked, env)
        )


# ── run_shards in Ray Data's actor pool ───────────────────────────────────────────────────────────


class Shards:
    """One session; a task is one shard. Between two tasks the way of the data runs empty."""

    def __init__(self, job: Job, device: DeviceSpec) -> None:
        from imagemill.pipeline.backends import open_session
        from imagemill.pipeline.feed import Feed
        from imagemill.pipeline.sink import Sink
        from imagemill.pipeline.stopwatch import Stopwatch
        from imagemill.system import processes

        processes.pin_to_cores(device.cores)
        self._job, self._clock = job, Stopwatch()
        self._session = open_session(job.session, device, self._clock)
        self._sink = Sink(job, device.engine, self._session.versions)
        self._feed = Feed(
            job.session.card.recipe,
            job.limits,
            job.session.batch_size,
            len(device.cores),
            None,
            self._clock,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        from imagemill.job import plan
        from imagemill.job.paths import JobPaths
        from imagemill.pipeline.run_shards import run_shards
        from imagemill.records import Lease

        begun = time.monotonic()
        every = plan.shards(JobPaths.of(self._job.output).plan)
        leases = [Lease(every[number]) for number in batch["id"]]
        rows = sum(
            receipt.rows
            for receipt in run_shards(
                leases, self._session, self._feed, self._sink, self._job, self._clock
            )
        )
        return {"rows": [rows], "begun": [begun], "ended": [time.monotonic()]}


def run_pool(source: str, output: str, model: str) -> None:
    """The child that is Ray Data's driver: freeze a job, have its shards mapped, print one line."""
    import ray

    from imagemill.display import observer
    from imagemill.job.paths import JobPaths
    from imagemill.job.store import open_store
    from imagemill.pipeline.backends import devices
    from imagemill.records import Settings
    from imagemill.runner import freeze
    from imagemill.runner.model import resolve_model
    from imagemill.system import files

    settings = Settings(
        sources=(source,), output=output, model=model, precision="fp32", devices="cpu"
    )
    chosen, store = devices.resolve("cpu"), open_store(JobPaths.of(output))
    paths = store.paths
    for folder in (paths.plan, paths.predictions):
        files.make_folder(folder)
    watcher = observer.Watcher()
    found = resolve_model(settings, watcher)
    opened = freeze.freeze(settings, store, lambda _: ("cpu", chosen), found, watcher)
    frozen = opened.frozen
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    count = len(opened.shards)
    mapped = ray.data.range(count, override_num_blocks=count).map_batches(
        Shards,
        fn_constructor_kwargs={"job": frozen.job, "device": chosen[0]},
        batch_size=1,
        concurrency=1,
        num_cpus=len(chosen[0].cores),
    )
    rows = mapped.take_all()
    assert sum(row["rows"] for row in rows) == frozen.images
    seconds = max(row["ended"] for row in rows) - min(row["begun"] for row in rows)
    print(json.dumps({"steady": frozen.images / seconds}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models-dir", type=Path, metavar="DIR")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(KINDS), help="of the four, joined by commas")
    parser.add_argument(
        "--sessions",
        type=int,
        default=1,
        metavar="N",
        help="of the documented way; they share the cores",
    )
    parser.add_argument("--pool", metavar="OUTPUT", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.pool:
        run_pool(str(asked.images), asked.pool, asked.model)
        return 0
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in asked.only.split(",")}
    with tempfile.TemporaryDirectory(prefix="imagemill-ray-") as name:
        folder = Path(name)
        source = links(asked.images, folder / "images", asked.count)
        for number in range(asked.rounds):
            for kind, rates in found.items():
                rates.append(once(kind, source, folder / f"{kind}-{number}", asked))
                print(
                    f"round {number + 1}: {kind:10} steady {rates[-1][0]:8.1f}, whole"
                    f" {rates[-1][1]:8.1f} images/s",
                    flush=True,
                )
    base = {
        kind: (median(rate for rate, _ in rates), median(rate for _, rate in rates))
        for kind, rates in found.items()
    }
    print(f"\n{asked.model} fp32, {asked.count} images, {cores} cores, median of {asked.rounds}\n")
    print("|            | steady images/s | whole images/s | steady against local |")
    print("|------------|----------------:|---------------:|---------------------:|")
    for kind, (steady, whole) in base.items():
        print(
            f"| {kind:10} | {steady:15.1f} | {whole:14.1f} |"
            f" {steady / base.get('local', (steady, 0))[0]:20.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
