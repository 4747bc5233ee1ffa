"""How well the display knows how long a job will take.

    python benchmarks/eta.py --images DIR [--model efficientnet_lite0] [--models-dir DIR]
    [--precision fp32] [--count 3000] [--devices cpu] [--rounds 2] [--kinds whole resumed]
    [--stop-at 0.4] [--latency 0.2] [--num-workers N] [--json]

Runs a job over links to the images of DIR, and takes down at every tick what the display would
show: `display.pace.Pace`, fed as the display feeds it. At each moment the prediction of the whole
time is the time so far plus the time left as displayed; its error is a share of the time that the
run really took, from the launch of the workers to their end. Each round is a whole run and one that
is stopped at --stop-at and resumed: of that the resumed part alone is judged. `others` is the share
of the machine's CPU time that other processes took meanwhile (Linux): beside other work the errors
tell of that work too. `preflight` is the time that the preflight estimated, over the time from the
first lease to the last commit. With --latency the images come from a server of this process's that takes its time for each, log-normal
around so many seconds: such a job is bounded by reading, and hardly minds what else the machine
does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from imagemill.display.observer import Watcher
from imagemill.display.pace import Pace
from imagemill.errors import Interrupted
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES
from imagemill.records import Progress, Settings
from imagemill.runner import run

TENTHS = [number / 10 for number in range(1, 10)]


@dataclass(slots=True)
class Seen:
    """One tick: seconds since the launch, and what the display says."""

    at_s: float
    left_s: float | None
    rate: float | None


@dataclass
class Recorder(Watcher):
    """Takes down what the display would show; may stop the job."""

    stop_at: float | None = None
    ticks: list[Seen] = field(default_factory=list)
    begun: float = 0.0
    took_s: float = 0.0
    others: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
        pace = Pace(total, resumed)
        self.begun = time.monotonic()
        self.others = -foreign_cpu_s()

        def tick(progress: Progress) -> None:
            estimate = pace.add(progress)
            self.ticks.append(Seen(time.monotonic() - self.begun, estimate.left_s, estimate.rate))
            if self.stop_at is not None and estimate.done >= self.stop_at * total:
                self.stop_at = None
                os.kill(os.getpid(), signal.SIGINT)

        return tick

    def end(self) -> None:
        self.took_s = time.monotonic() - self.begun
        self.others = (self.others + foreign_cpu_s()) / (self.took_s * (os.cpu_count() or 1))


def foreign_cpu_s() -> float:
    """CPU time that processes which are not ours have used since the machine started; exact once
    our children have ended.
    """
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - our_cpu_s()


def our_cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in ours)


def judged(recorder: Recorder) -> dict[str, object]:
    """The worst error from the first tenth on, and its course."""
    took_s = recorder.took_s
    estimates = [
        (seen.at_s, (seen.at_s + seen.left_s - took_s) / took_s)
        for seen in recorder.ticks
        if seen.left_s is not None
    ]
    late = [(at_s, error) for at_s, error in estimates if at_s >= took_s / 10]
    worst = max(late, key=lambda item: abs(item[1]))
    times = [at_s for at_s, _ in estimates]
    course = {
        f"{tenth:.1f}": round(
            estimates[min(bisect_left(times, tenth * took_s), len(estimates) - 1)][1], 3
        )
        for tenth in TENTHS
    }
    rates = {
        f"{tenth:.1f}": next((s.rate for s in recorder.ticks if s.at_s >= tenth * took_s), None)
        for tenth in TENTHS
    }
    return {
        "seconds": round(took_s, 1),
        "worst_error": round(worst[1], 3),
        "worst_at": round(worst[0] / took_s, 2),
        "first_told_at": round(times[0] / took_s, 3),
        "others": round(recorder.others, 3),
        "course": course,
        "images_per_second": {tenth: rate and round(rate, 1) for tenth, rate in rates.items()},
    }


def links(folder: Path, images: Path, count: int) -> None:
    """`count` links to the images below a folder, in an order that mixes them."""
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    for number in range(count):
        original = found[number % len(found)]
        (folder / f"{number:06d}{original.suffix}").symlink_to(original.resolve())


class Slow(BaseHTTPRequestHandler):
    """Serves the files of a folder, each after a while."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, latency_s: float, *arguments: object) -> None:
        self.folder, self.latency_s = folder, latency_s
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        time.sleep(random.Random(self.path).lognormvariate(0, 0.7) * self.latency_s)
        data = (self.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A worker that was stopped has closed its connection."""


def served(folder: Path, latency_s: float, goal: Path) -> str:
    """Start serving a folder of images; returns the list of their URLs as a source."""
    server = Server(("127.0.0.1", 0), partial(Slow, folder, latency_s))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = sorted(path.name for path in folder.iterdir())
    goal.write_text("".join(f"http://127.0.0.1:{server.server_port}/{name}\n" for name in names))
    return f"@{goal}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--models-dir")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--devices", default="cpu")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--kinds", nargs="+", choices=("whole", "resumed"), default=("whole", "resumed")
    )
    parser.add_argument("--stop-at", type=float, default=0.4)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    report: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="imagemill-eta-") as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        links(folder, asked.images, asked.count)
        source = (
            served(folder, asked.latency, Path(temporary) / "urls.txt")
            if asked.latency
            else str(folder)
        )
        for number in range(asked.rounds):
            for kind in asked.kinds:
                settings = Settings(
                    sources=(source,),
                    output=str(Path(temporary) / f"{kind}-{number}"),
                    model=asked.model,
                    models_dir=asked.models_dir,
                    precision=asked.precision,
                    devices=asked.devices,
                    num_workers=asked.num_workers,
                    report=False,
                )
                if kind == "resumed":
                    with contextlib.suppress(Interrupted):
                        run.run(settings, Recorder(stop_at=asked.stop_at))
                recorder = Recorder()
                summary = run.run(settings, recorder)
                report.append({"run": kind} | judged(recorder))
                if (estimated := summary.preflight) is not None and estimated.seconds:
                    report[-1]["preflight"] = round(estimated.seconds / summary.seconds, 3)
                if not asked.json:
                    print(json.dumps(report[-1]), flush=True)
    if asked.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
