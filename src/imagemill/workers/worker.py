"""The child process of one device: a session, and run_shards over its leases.

Started by its supervisor with the arguments SOCKET NOTEBOARD LAUNCHER_PID; ends with it, whatever
ends it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

from imagemill import errors
from imagemill.errors import DeviceLostError, ImagemillError
from imagemill.pipeline.heartbeat import Noteboard
from imagemill.records import Lease
from imagemill.system import processes
from imagemill.workers import protocol

_log = logging.getLogger("imagemill.workers.worker")


def main() -> int:
    """Run one worker until the launcher stops it, or is gone."""
    socket, notes, launcher = (int(argument) for argument in sys.argv[1:4])
    processes.end_with(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    warnings.simplefilter(
        "ignore"
    )  # what libraries have to say about an image is its row's business
    connection = Connection(socket)
    try:
        return _work(connection, Noteboard(notes))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _log.warning("the launcher is gone")
        return 1
    except DeviceLostError as error:
        _log.error("%s", error)
        return 1  # the launcher starts it again, as after any other death
    except ImagemillError as error:
        _log.error("%s", error)
        _fail(connection, error)
        return 1
    except MemoryError:
        traceback.print_exc()
        return 1  # as if the kernel had killed it: the launcher restarts and divides
    except Exception as error:
        _log.exception("unexpected")
        _fail(
            connection,
            ImagemillError(
                processes.shortage(error) or f"unexpected {type(error).__name__}: {error}"
            ),
        )
        return 1


def _work(connection: Connection, board: Noteboard) -> int:
    begin = connection.recv()
    assert isinstance(begin, protocol.Begin)
    if not begin.device.floating:
        processes.keep_to(begin.device.cores)
    # Only now, with the affinity set, are the libraries imported that count the cores they find.
    from imagemill.pipeline import top_k
    from imagemill.pipeline.backends import open_session
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
    return 0


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
        if isinstance(message, protocol.Stop):
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
            if isinstance(message, protocol.Stop):
                raise EOFError
            if isinstance(message, protocol.Pause):
                return
            yield message


def _fail(connection: Connection, error: ImagemillError) -> None:
    kind = type(error).__name__ if hasattr(errors, type(error).__name__) else "ImagemillError"
    with contextlib.suppress(OSError):
        is_limit = kind == "ModelError" and (
            processes.is_memory_limited() or processes.shortage(error)
        )
        note = f" (Limits: {processes.limits()}.)" if is_limit else ""
        connection.send(protocol.Failed(kind, f"{error}{note}"))


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
