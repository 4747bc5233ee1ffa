"""Decode quarantined images in a process that may die of them.

`IsolatedDecoder` keeps one child process, which decodes one image at a time with the same `decode`
that workers use, so pixels are the same bit for bit. If an image kills its child, or takes longer
than `max_seconds`, it is tried once more in a new child. If that fails too, the image gets a row
that says so. The child's memory is bounded, it writes no core file, and it ends with its parent: by
Linux's parent-death signal, at the end of its connection, or by its own alarm.

parent                        child
address space in bytes ──────►
                      ◄────── "ready"
(Recipe, Limits, partial) ───►
the encoded image ───────────►
                      ◄────── Decoded
"""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from typing import Any

from msgspec.structs import replace

from imagemill.errors import WorkerError
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.decoding.pillow import limit_pillow
from imagemill.records import Decoded, IsolationReason, Limits, Recipe, Status
from imagemill.system import processes
from imagemill.system.processes import Child, ChildError

_STDERR = 2
_START_SECONDS = 60.0
"""How long a child may take to import its libraries; usually it takes 0.3 s."""
_STARTS = 3
_BASE_BYTES = 1 << 30
_BYTES_PER_PIXEL = 24
"""Upper bound of a decoder's memory: for a 32-bit float image it holds the file, the floats, their
mask, and the finite ones.
"""
_ALARM_MARGIN = 10.0
_FAILED = (Status.CRASHED_DECODER, Status.TIMEOUT)


class IsolatedDecoder:
    """Decodes images that may kill or hang their decoder. Thread-safe; one image at a time.

    The child is started with the first image and kept between images. Close the decoder, or use it
    as a context manager.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._address_space = 0

    def decode(
        self,
        data: bytes,
        recipe: Recipe,
        limits: Limits,
        reason: IsolationReason = IsolationReason.CRASH,
        *,
        partial: bool = False,
    ) -> Decoded:
        """Decode one image as `decode.decode` does, in the child.

        Args:
            data: the encoded image.
            recipe: how it becomes the model's input.
            limits: all three are kept; `max_seconds` by killing the child.
            reason: why the image is quarantined; part of the error if it fails here too.
            partial: whether a truncated image is ok if its beginning can be decoded.

        Returns: as `decode.decode`, or with status `crashed_decoder` or `timeout`.

        Raises:
            WorkerError: children cannot be started.
        """
        with self._lock:
            for _ in range(2):
                decoded = self._attempt(data, recipe, limits, partial)
                if decoded.status not in _FAILED:
                    return decoded
        why = f"{decoded.error}, twice in a process of its own (quarantined for: {reason})"
        return replace(decoded, error=why)

    def close(self) -> None:
        """End the child. Closing twice is allowed; decoding again starts another child."""
        with self._lock:
            self._discard()

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(self, data: bytes, recipe: Recipe, limits: Limits, partial: bool) -> Decoded:
        """Decode an image. If the child dies of it or is killed for it, the status is `_FAILED`."""
        child = self._get_child(_address_space(limits))
        out_of_time = threading.Event()

        def give_up() -> None:
            out_of_time.set()
            child.kill()

        # A killed child closes its connection, which ends a blocked send as well as the receive.
        timer = threading.Timer(limits.max_seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            child.send((recipe, limits, partial))
            with contextlib.suppress(OSError):  # the child is dead, which receive reports
                child.connection.send_bytes(data)
            answer = child.receive()
            assert isinstance(answer, Decoded)
            return answer
        except ChildError as died:
            self._discard()
            if out_of_time.is_set() or signal.SIGALRM.name in str(died):
                why = f"decoding took more than {limits.max_seconds:g} s"
                return Decoded(None, Status.TIMEOUT, why)
            return Decoded(None, Status.CRASHED_DECODER, f"the decoder {died}")
        except BaseException:  # such as Ctrl-C: the next image must not get this one's answer
            self._discard()
            raise
        finally:
            timer.cancel()

    def _get_child(self, address_space: int) -> Child:
        """Return a child with this address space; start one if needed. Raises: WorkerError."""
        if self._child is not None and self._address_space == address_space:
            return self._child
        self._discard()
        reason = ""
        for _ in range(_STARTS):
            self._child = Child(
                "imagemill.pipeline.decoding.isolated",
                log=_STDERR,
                variables={"OPENBLAS_NUM_THREADS": "1"},
            )
            self._address_space = address_space
            try:
                self._child.send(address_space)
                self._child.receive(_START_SECONDS)
                return self._child
            except ChildError as died:
                reason = str(died)
                self._discard()
            except BaseException:
                self._discard()
                raise
        raise WorkerError(
            f"the process that decodes quarantined images failed to start {_STARTS} times in a row;"
            f" the last time it {reason}."
        )

    def _discard(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def _address_space(limits: Limits) -> int:
    """Return how many bytes of address space a child gets."""
    return _BASE_BYTES + _BYTES_PER_PIXEL * limits.max_pixels + 3 * limits.max_bytes


def _serve(connection: Any) -> None:
    """Decode images until the parent closes the connection."""
    _confine(connection.recv())
    connection.send("ready")
    while True:
        recipe, limits, partial = connection.recv()
        data = connection.recv_bytes()
        # The alarm is for a parent that is itself stopped.
        signal.setitimer(signal.ITIMER_REAL, limits.max_seconds + _ALARM_MARGIN)
        limit_pillow(limits)
        decoded = decode(data, recipe, limits, partial=partial)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(decoded)


def _confine(address_space: int) -> None:
    """Limit what this process may do to the machine."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # macOS has no such limit; a stricter one may be set already.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


def main() -> int:
    """Run the child process."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(processes.connect_to_parent())
    return 0
