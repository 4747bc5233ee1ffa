"""Two nodes of unequal speed: what each holds and does over time. The fast one must never be idle
while shards remain.

    python benchmarks/ray_unequal.py --images DIR --models-dir DIR [--model efficientnet_lite0]
    [--count 1000] [--load 3]

Two raylets, of one core each. Beside the second node's worker, --load processes do nothing but
count on its core, so that it gets a part of it. Every lease, and every moment in which a worker had
no shard, is noted by the launcher; the timeline shows both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(ROOT / "benchmarks")]

from ray_engines import links  # noqa: E402

from imagemill.records import Lease, Settings  # noqa: E402
from imagemill.runner import run  # noqa: E402
from imagemill.workers.leases import Leases  # noqa: E402
from imagemill.workers.protocol import Done, Event, Lost, Pause  # noqa: E402
from imagemill.workers.ray.pool import RayPool  # noqa: E402
from ray_nodes import cluster  # noqa: E402

_COLUMNS = 60
_NICE = "15"
"""Ray's own for workers: beside what runs with a higher priority they would get nothing."""


class Notes:
    """When each device got leases and committed them, and how many shards were waiting then."""

    def __init__(self) -> None:
        self.hands: dict[str, list[tuple[float, int]]] = {}
        """Moments at which the number of shards in flight changed."""
        self.waiting: list[tuple[float, int]] = []

    def watch(self) -> None:
        """Record what passes between the launcher, its pool and its leases."""
        send, receive, lease_next = RayPool.send, RayPool.receive, Leases.next
        notes = self

        def sending(pool: RayPool, device: str, message: Lease | Pause) -> None:
            if isinstance(message, Lease):
                notes._change(device, time.monotonic(), 1)
            send(pool, device, message)

        def receiving(pool: RayPool, seconds: float) -> list[Event]:
            found = list(receive(pool, seconds))
            for one in found:
                if isinstance(one.message, Done):
                    notes._change(one.device, time.monotonic(), -1)
                assert not isinstance(one.message, Lost), one
            return found

        def leasing(leases: Leases, *arguments: Any) -> Lease | None:
            lease = lease_next(leases, *arguments)
            waiting = sum(map(len, (leases._isolated, *leases._queues.values())))
            notes.waiting.append((time.monotonic(), waiting))
            return lease

        for kind, name, way in (
            (RayPool, "send", sending),
            (RayPool, "receive", receiving),
            (Leases, "next", leasing),
        ):
            setattr(kind, name, way)

    def _change(self, device: str, now: float, by: int) -> None:
        hand = self.hands.setdefault(device, [])
        hand.append((now, (hand[-1][1] if hand else 0) + by))

    def idle_s(self, device: str, until: float) -> float:
        """Seconds in which a device had no shard, from its first lease on, while shards were
        waiting.
        """
        changes = [*self.hands[device], (until, 0)]
        return sum(
            max(0.0, min(end, until) - start)
            for (start, held), (end, _) in pairwise(changes)
            if held == 0
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--load", type=int, default=3, metavar="N")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= 2, "two cores are needed"
    notes = Notes()
    notes.watch()
    loads: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="imagemill-unequal-") as name:
        source = links(asked.images, Path(name) / "images", asked.count)
        os.sched_setaffinity(0, cores[:1])
        try:
            with cluster(num_cpus=1, node_name="fast") as nodes:
                os.sched_setaffinity(0, cores[1:2])
                nodes.add(num_cpus=1, node_name="slow")
                loads = [
                    subprocess.Popen(
                        ["nice", "-n", _NICE, sys.executable, "-c", "while True: pass"]
                    )
                    for _ in range(asked.load)
                ]
                os.sched_setaffinity(0, cores)
                os.environ |= {
                    "RAY_ADDRESS": nodes.address,
                    "IMAGEMILL_MODELS": str(asked.models_dir),
                }
                summary = run.run(
                    Settings(
                        sources=(str(source),),
                        output=str(Path(name) / "out"),
                        model=asked.model,
                        precision="fp32",
                        devices="cpu",
                        engine="ray",
                        shard_size=asked.shard_size,
                        preflight=False,
                        report=False,
                    )
                )
                log = (Path(name) / "out" / "logs" / "launcher.log").read_text()
        finally:
            for load in loads:
                load.kill()
                load.wait()
    named = {
        line.split()[4]: line.split(" is on node ")[1].split()[0]
        for line in log.splitlines()
        if " is on node " in line
    }
    first = min(hand[0][0] for hand in notes.hands.values())
    last = max(hand[-1][0] for hand in notes.hands.values())
    none_left = next(when for when, count in notes.waiting if count == 0)
    width = (last - first) / _COLUMNS
    print(
        f"{summary.images} images in shards of {asked.shard_size}, {last - first:.1f} s,"
        f" {width:.2f} s a column"
    )
    print("a figure: so many shards in flight; a dot: none")
    for device, hand in sorted(notes.hands.items()):
        shown = ""
        for column in range(_COLUMNS):
            end = first + (column + 1) * width
            held = [count for when, count in hand if when <= end]
            shown += str(held[-1]) if held and held[-1] else "."
        images = next(one.images for one in summary.devices if one.name == device)
        print(f"{named[device]:>5} {device} {shown} {images} images")
    print(
        " " * (12 + int((none_left - first) / width))
        + f"^ the last shard was leased at {none_left - first:.1f} s"
    )
    for device in sorted(notes.hands):
        idle = notes.idle_s(device, none_left)
        most = max(count for _, count in notes.hands[device])
        print(
            f"{named[device]}: idle {idle:.3f} s of {none_left - first:.1f} s while shards"
            f" remained; at most {most} shards in flight"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
