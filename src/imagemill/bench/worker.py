"""The child process that measures one device.

It runs the session and the feed of `imagemill.workers.worker` separately, on the same cores. It is
started by `imagemill.bench.pool`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from imagemill.bench.messages import Begin, Compute, Decode, Measured, Ready
from imagemill.records import DeviceSpec, SessionSpec
from imagemill.system import processes
from imagemill.system.processes import Stop

if TYPE_CHECKING:
    from imagemill.pipeline.backends.base import Session
    from imagemill.pipeline.stopwatch import Stopwatch
    from imagemill.records import Batch

_DISTINCT_BATCHES = 4


def main() -> int:
    """Carry out orders until the parent sends `Stop` or is gone."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    begin = connection.recv()
    assert isinstance(begin, Begin)
    processes.pin_to_cores(begin.device.cores)
    # These import libraries that count the cores they may use, so the affinity is set first.
    from imagemill.pipeline.backends import open_session
    from imagemill.pipeline.backends.base import QueuedSession
    from imagemill.pipeline.stopwatch import Stopwatch

    clock = Stopwatch()
    session = open_session(begin.spec, begin.device, clock)
    traffic = session.memory_traffic() if isinstance(session, QueuedSession) else None
    batches = _synthetic(begin.spec)
    gc.freeze()
    connection.send(Ready(session.versions, traffic))
    while not isinstance(order := connection.recv(), Stop):
        match order:
            case Compute(count):
                connection.send(_compute(session, islice(batches, count), clock))
            case Decode():
                connection.send(_decode(order, begin.device))
            case _:
                raise AssertionError(order)
    session.close()


def _synthetic(spec: SessionSpec) -> Iterator[Batch]:
    """Yield full batches of noise without end; a few are repeated, so making them takes no time."""
    import numpy as np

    from imagemill.records import Batch

    shape = (spec.batch_size, spec.card.recipe.height, spec.card.recipe.width, 3)
    noise = np.random.default_rng(0)
    return cycle(
        [
            Batch(noise.integers(0, 256, shape, np.uint8), spec.batch_size, ())
            for _ in range(_DISTINCT_BATCHES)
        ]
    )


def _compute(session: Session, batches: Iterator[Batch], clock: Stopwatch) -> Measured:
    begun, before = time.monotonic(), clock.read().transfer
    images = sum(batch.filled for batch, _ in session.stream(batches))
    return Measured(images, begun, time.monotonic(), transfer_s=clock.read().transfer - before)


def _decode(order: Decode, device: DeviceSpec) -> Measured:
    from imagemill.pipeline import read
    from imagemill.pipeline.feed import Feed
    from imagemill.pipeline.stopwatch import Stopwatch

    job = order.job
    threads = job.num_workers or len(device.cores)
    spec = job.session
    with Feed(spec.card.recipe, job.limits, spec.batch_size, threads, None, Stopwatch()) as feed:
        begun = time.monotonic()
        images = sum(len(batch.rows) for batch in feed.batches(read.read(order.leases, job)))
        return Measured(images, begun, time.monotonic())
