"""What imagemill adds around decoding and computing.

    python benchmarks/overhead.py --images DIR [--model efficientnet_lite0] [--repeat 4] [--rounds
    5] [--json]

1. The null session computes nothing, so `run` with it should reach the decode-only rate: `imagemill
   bench --devices null`, interleaved.
2. CPU time per image of the launcher's process while workers run, of the ledger, and of the sink,
   each on its own. The launcher and the ledger are timed inside a real run, around their calls; the
   sink writes the rows of that run once more, in this process, with nothing beside it, so that the
   threads of its libraries are counted too.

--repeat gives the folder several times as a source: the more images, the less the start counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from imagemill import bench
from imagemill.job import ledger, plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.pipeline import read, top_k
from imagemill.pipeline.backends import devices, open_session
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.sink import Sink
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Lease, Settings
from imagemill.runner import run as runner
from imagemill.system import cpu, files
from imagemill.workers.launcher import Launcher


class Spent:
    """CPU seconds of this process, by name, of the calls that were wrapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun

        return timed


def launcher_and_ledger(settings: Settings) -> tuple[int, dict[str, float]]:
    """Run a job; returns its images, and CPU seconds of the launcher and the ledger."""
    spent = Spent()

    class Timed(Launcher):
        run = spent.around("launcher", Launcher.run)

    kept = Launcher, ledger.existing_parts, ledger.close
    runner.Launcher, ledger.existing_parts, ledger.close = (  # type: ignore[attr-defined, misc]
        Timed,
        spent.around("ledger", ledger.existing_parts),
        spent.around("ledger", ledger.close),
    )
    try:
        summary = runner.run(settings)
    finally:
        runner.Launcher, ledger.existing_parts, ledger.close = kept  # type: ignore[attr-defined, misc]
    return summary.images, spent.seconds


def sink_alone(output: Path, folder: Path) -> float:
    """CPU seconds of writing the rows of a finished job once more, elsewhere."""
    frozen = OpenJob.open(output).frozen
    job, clock = frozen.job, Stopwatch()
    device = devices.resolve("null")[0]
    session = open_session(job.session, device, clock)
    leases = map(Lease, plan.shards(JobPaths(output).plan))
    spec, threads = job.session, len(cpu.usable_cores())
    with Feed(spec.card.recipe, job.limits, spec.batch_size, threads, None, clock) as feed:
        rows = [
            top_k.top_k(replace(batch, pixels=batch.pixels[:0]), outputs, spec, job.top_k)
            for batch, outputs in session.stream(feed.batches(read.read(leases, job)))
        ]
    files.make_folder(JobPaths(folder).predictions)
    sink = Sink(replace(job, output=str(folder)), device.engine, session.versions)
    begun = time.process_time()
    for batch, top in rows:
        for part in sink.write(batch, top):
            part.commit()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    folders = (asked.images,) * asked.repeat
    measured = bench.run(
        bench.BenchSettings(
            folders,
            model=asked.model,
            devices="null",
            iterations=asked.rounds,
            limit=10**9,
            batches_per_step=8,
        )
    )
    assert measured.decode_only is not None
    assert measured.end_to_end is not None
    with tempfile.TemporaryDirectory(prefix="imagemill-overhead-") as folder:
        output = Path(folder) / "out"
        images, spent = launcher_and_ledger(
            Settings(
                sources=folders,
                output=str(output),
                model=asked.model,
                devices="null",
                preflight=False,
                report=False,
            )
        )
        spent["sink"] = sink_alone(output, Path(folder) / "again")
    each = {name: round(1e6 * seconds / images, 2) for name, seconds in spent.items()}
    report: dict[str, Any] = {
        "images": images,
        "decode_only": measured.decode_only.median,
        "end_to_end": measured.end_to_end.median,
        "ratio": round(measured.end_to_end.median / measured.decode_only.median, 4),
        "cpu_us_per_image": each | {"together": round(sum(each.values()), 2)},
    }
    if asked.json:
        print(json.dumps(report))
        return
    print(
        f"run with the null session {report['end_to_end']:,.1f}, decode only"
        f" {report['decode_only']:,.1f} images/s: {report['ratio']:.3f}"
    )
    print(
        "CPU per image: "
        + ", ".join(f"{name} {value:.1f} us" for name, value in report["cpu_us_per_image"].items())
    )


if __name__ == "__main__":
    main()
