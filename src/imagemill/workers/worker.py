"""The child process of one device: a session, and `run_shards` over its leases.

Its supervisor starts it with one argument, the descriptor of the heartbeat.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from imagemill.pipeline.heartbeat import Heartbeat
from imagemill.records import Lease
from imagemill.system import processes, without_pandas
from imagemill.system.processes import Stop
from imagemill.workers import protocol

_log = logging.getLogger("imagemill.workers.worker")


def main() -> int:
    """Run one worker until the launcher stops it or is gone."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    heartbeat = Heartbeat(int(sys.argv[3]))
    begin = connection.recv()
    assert isinstance(begin, protocol.Begin)
    if not begin.device.floating:
        processes.pin_to_cores(begin.device.cores)
    without_pandas.hide_pandas()
    # These import libraries that count the cores they may use, so the affinity is set first.
    from imagemill.pipeline.backends import depends_on_batch, installed_versions, open_session
    from imagemill.pipeline.decoding.pillow import limit_pillow
    from imagemill.pipeline.feed import Feed
    from imagemill.pipeline.run_shards import run_shards
    from imagemill.pipeline.session_checks import check_exactness, check_model
    from imagemill.pipeline.sink import Sink
    from imagemill.pipeline.stopwatch import Stopwatch

    job, device = begin.job, begin.device
    clock = Stopwatch(heartbeat, on_cpu=device.kind == "cpu")
    _log.info(
        "device %s, cores %s, precision %s", device.name, list(device.cores), job.session.precision
    )
    heartbeat.reset()
    limit_pillow(job.limits)
    session = open_session(job.session, device, clock)
    check_model(session.stream, job.session)
    if depends_on_batch(device.engine):
        check_exactness(session.stream, job.session, device.name, allow_inexact=job.allow_inexact)
    spent = clock.read()  # the rates exclude the check's random images
    for name in ("compute", "device", "transfer"):
        clock.add(name, -getattr(spent, name))
    workers = job.num_workers or len(device.cores)
    versions = session.versions | {"python": platform.python_version()}
    versions |= installed_versions(("numpy", "pillow", "simplejpeg"))
    sink = Sink(job, device.engine, versions)
    gc.freeze()
    connection.send(protocol.Ready(os.getpid()))
    recipe, batch_size = job.session.card.recipe, job.session.batch_size
    with Feed(recipe, job.limits, batch_size, workers, heartbeat, clock) as feed:
        images, begun = 0, time.perf_counter()
        while leases := _next_run(connection):
            for receipt in run_shards(leases, session, feed, sink, job, clock):
                connection.send(protocol.Done(receipt, clock.read()))
                images += receipt.rows
            connection.send(protocol.Idle())
        seconds = time.perf_counter() - begun
        _log.info(
            "done: %d images in %.1f s, %.1f images/s",
            images,
            seconds,
            images / seconds if seconds else 0.0,
        )
    session.close()


def _next_run(connection: Connection) -> Iterator[Lease] | None:
    """Wait for a lease and return the run that it begins; None if the worker is to stop."""
    message = connection.recv()
    while isinstance(message, protocol.Pause):
        message = connection.recv()
    return None if isinstance(message, Stop) else _leases(connection, message)


def _leases(connection: Connection, first: Lease) -> Iterator[Lease]:
    """Yield the leases of a run, and ask for each further one, until the launcher has none for now.

    The launcher answers at once, so images in flight do not wait for long.
    """
    message: Lease | protocol.Pause | Stop = first
    while isinstance(message, Lease):
        yield message
        connection.send(protocol.Want())
        message = connection.recv()
    if isinstance(message, Stop):
        raise EOFError
