"""The child process of one device: a session, and run_shards over its leases.

Started by its supervisor with the arguments SOCKET PARENT_PID NOTEBOARD; ends with it, whatever
ends it.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

from imagemill.pipeline.heartbeat import Noteboard
from imagemill.records import Lease
from imagemill.system import processes
from imagemill.system.processes import Stop
from imagemill.workers import protocol

_log = logging.getLogger("imagemill.workers.worker")


def main() -> int:
    """Run one worker until the launcher stops it, or is gone."""
    return processes.run_child(_work)


def _work(connection: Connection) -> None:
    board = Noteboard(int(sys.argv[3]))
    begin = connection.recv()
    assert isinstance(begin, protocol.Begin)
    if not begin.device.floating:
        processes.keep_to(begin.device.cores)
    # Only now, with the affinity set, are the libraries imported that count the cores they find.
    from imagemill.pipeline import top_k
    from imagemill.pipeline.backends import open_session
    from imagemill.pipeline.decoding.pillow import limit_pillow
    from imagemill.pipeline.feed import Feed
    from imagemill.pipeline.run_shards import run_shards
    from imagemill.pipeline.sink import Sink
    from imagemill.pipeline.stopwatch import Stopwatch

    job, device, clock = (
        begin.job,
        begin.device,
        Stopwatch(board, on_cpu=begin.device.kind == "cpu"),
    )
    _log.info("device %s, cores %s, precision %s", device.name, list(device.cores), job.precision)
    board.clear()
    limit_pillow(job.limits)
    session = open_session(job, device, clock)
    top_k.check_model(session.stream, job)
    clock.add("compute", -clock.read().compute)  # random images are no part of the job's rates
    workers = job.num_workers or len(device.cores)
    sink = Sink(job, session.backend, session.versions | _decoder_versions())
    gc.freeze()
    connection.send(protocol.Ready(os.getpid()))
    with Feed(job.card, job.limits, job.batch_size, workers, board, clock) as feed:
        images, begun = 0, clock.elapsed()
        inbox = _Inbox(connection)
        while inbox.wait():
            for receipt in run_shards(inbox.leases(), session, feed, sink, job, clock):
                connection.send(protocol.Done(receipt, clock.read()))
                images += receipt.rows
            connection.send(protocol.Idle())
        seconds = clock.elapsed() - begun
        _log.info(
            "done: %d images in %.1f s, %.1f images/s",
            images,
            seconds,
            images / seconds if seconds else 0.0,
        )
    session.close()


class _Inbox:
    """The launcher's messages as leases. The first lease of a run is waited for, further ones are
    asked for.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._first: Lease | None = None

    def wait(self) -> bool:
        """Wait for the first lease of a run; False: stop."""
        message = self._connection.recv()
        while isinstance(message, protocol.Pause):
            message = self._connection.recv()
        if isinstance(message, Stop):
            return False
        assert isinstance(message, Lease)
        self._first = message
        return True

    def leases(self) -> Iterator[Lease]:
        """The leases of a run, until the launcher has none for now. It answers at once, so nothing
        in flight waits for long.
        """
        assert self._first is not None
        yield self._first
        while True:
            self._connection.send(protocol.Want())
            message = self._connection.recv()
            if isinstance(message, Stop):
                raise EOFError
            if isinstance(message, protocol.Pause):
                return
            yield message


def _decoder_versions() -> dict[str, str]:
    import numpy
    import PIL
    import simplejpeg

    return {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": str(getattr(simplejpeg, "__version__", "")),
    }
