"""Decode suspects in a process that may die of it.

`IsolatedDecoder` keeps one child process, which decodes one image at a time with the very `decode`
that workers use, so pixels are the same bit for bit. An image that kills its child, or takes longer
than `max_seconds`, is tried once more, alone in a brand-new child; if that fails too, the image is
a row that says so. The child's memory is bounded, it writes no core file,
and it dies with its parent: at the end of its standard input, by Linux's parent-death signal, or by
its own alarm.

On the pipe, both ways, a message is two lengths (32 and 64 bits, big-endian), a head in JSON and a
body of bytes:

    child  → parent   {"ready": true}                                         no body
    parent → child    {"recipe": {…}, "limits": {…}}                          the encoded image
    child  → parent   {"status": …, "error": …, "width": …, "height": …}      the pixels, or nothing
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from imagemill.errors import WorkerError
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Decoded, Limits, Recipe, Status
from imagemill.system import processes, serialization

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["IsolatedDecoder"]

_LENGTHS = struct.Struct(">IQ")
_START_SECONDS = 60.0
"""For a child to import its libraries; usually it takes 0.3 s."""
_STARTS = 3
_PIECE = 1 << 20
_BASE_BYTES = 1 << 30
_BYTES_PER_PIXEL = 24
"""What a decoder may use at most: for a 32-bit float image there are the file, the floats, their
mask, and the finite ones.
"""
_ALARM_MARGIN = 10.0


class _Failed(Exception):  # noqa: N818 - of the child, and caught here
    """The child did not answer."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class IsolatedDecoder:
    """Decodes images that are suspected of killing or hanging their decoder. Safe among threads,
    one image at a time.

    The child is started with the first image and kept between images. Close it, or use this as a
    context manager.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes, recipe: Recipe, limits: Limits, why: str = "crash") -> Decoded:
        """Decode one image as `decode.decode` does, in the child.

        Args:
            data: the encoded image.
            recipe: how it becomes the model's input.
            limits: all three are kept; `max_seconds` by killing the child.
            why: why this image is suspected, `crash` or `timeout`; told in the error of one that
            fails here too.

        Returns: as `decode.decode`, or with status `crashed_decoder` or `timeout`.

        Raises:
            WorkerError: children cannot be started.
        """
        with self._lock:
            try:
                return self._attempt(data, recipe, limits)
            except _Failed:
                self._discard()
            try:
                return self._attempt(data, recipe, limits)
            except _Failed as failed:
                self._discard()
                return Decoded(
                    None,
                    failed.status,
                    f"{failed.error}, twice in a process of its own (suspected of: {why})",
                )

    def close(self) -> None:
        """End the child. Closing twice does no harm; decoding again starts another."""
        with self._lock:
            self._discard()

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _attempt(self, data: bytes, recipe: Recipe, limits: Limits) -> Decoded:
        if self._child is not None and not self._child.serves(limits):
            self._discard()
        for start in range(_STARTS):
            if self._child is not None:
                break
            started = _Child(limits)
            try:
                started.receive(time.monotonic() + _START_SECONDS)
                self._child = started
            except _Failed as failed:
                started.kill()
                if start == _STARTS - 1:
                    raise WorkerError(
                        f"the disposable decoder cannot be started, {_STARTS} times running:"
                        f" {failed.error}"
                    ) from None
            except BaseException:
                started.kill()
                raise
        assert self._child is not None
        try:
            return self._child.decode(data, recipe, limits)
        except _Failed:
            raise
        except BaseException:  # Ctrl-C for one: what is still in the pipe belongs to nobody
            self._discard()
            raise

    def _discard(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """The parent's end of one child process."""

    def __init__(self, limits: Limits) -> None:
        self._bytes = _address_space(limits)
        self._process = subprocess.Popen(
            processes.command("imagemill.pipeline.decoding.isolated", os.getpid(), self._bytes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the launcher
            env=processes.environment() | {"OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in = self._process.stdin
        self._out = self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)

    def serves(self, limits: Limits) -> bool:
        return self._bytes == _address_space(limits)

    def decode(self, data: bytes, recipe: Recipe, limits: Limits) -> Decoded:
        head = json.dumps({"recipe": asdict(recipe), "limits": asdict(limits)}).encode()
        deadline = time.monotonic() + limits.max_seconds
        try:
            self._send(_LENGTHS.pack(len(head), len(data)) + head, deadline)
            self._send(data, deadline)
            answer, body = self.receive(deadline)
        except _Failed as failed:
            if failed.status is Status.TIMEOUT:
                raise _Failed(
                    Status.TIMEOUT, f"decoding took more than {limits.max_seconds:g} s"
                ) from None
            raise
        pixels = (
            np.frombuffer(body, np.uint8).reshape(recipe.size, recipe.size, 3) if body else None
        )
        return Decoded(
            pixels, Status(answer["status"]), answer["error"], answer["width"], answer["height"]
        )

    def receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        """Read one message. Raises `_Failed` if the child dies or the deadline passes."""
        head, body = _LENGTHS.unpack(self._read(_LENGTHS.size, deadline))
        return json.loads(self._read(head, deadline)), self._read(body, deadline)

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._in, selectors.EVENT_WRITE, deadline)
            try:
                view = view[os.write(self._in.fileno(), view[:_PIECE]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._dead() from None

    def _read(self, count: int, deadline: float) -> bytearray:
        data = bytearray()
        while len(data) < count:
            self._wait(self._out, selectors.EVENT_READ, deadline)
            try:
                piece = os.read(self._out.fileno(), min(_PIECE, count - len(data)))
            except BlockingIOError:
                continue
            if not piece:
                raise self._dead()
            data += piece
        return data

    def _wait(self, pipe: Any, event: int, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _Failed(Status.TIMEOUT, "the disposable decoder did not answer in time")

    def _dead(self) -> _Failed:
        """Say how the child ended, whose pipe is closed."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return _Failed(Status.CRASHED_DECODER, "the decoder closed its pipe")
        if code == -signal.SIGALRM:
            return _Failed(Status.TIMEOUT, "decoding took too long")
        if code >= 0:
            return _Failed(Status.CRASHED_DECODER, f"the decoder ended with exit code {code}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return _Failed(Status.CRASHED_DECODER, f"the decoder was killed by {name}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()


def _address_space(limits: Limits) -> int:
    """How many bytes of address space a child gets."""
    return _BASE_BYTES + _BYTES_PER_PIXEL * limits.max_pixels + 3 * limits.max_bytes


# The child


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    _answer(answers, {"ready": True})
    while lengths := requests.read(_LENGTHS.size):
        head_size, body_size = _LENGTHS.unpack(lengths)
        head, data = json.loads(requests.read(head_size)), requests.read(body_size)
        limits, recipe = Limits(**head["limits"]), serialization.from_plain(Recipe, head["recipe"])
        signal.setitimer(
            signal.ITIMER_REAL, limits.max_seconds + _ALARM_MARGIN
        )  # for a parent that is gone, or is itself stopped
        decoded = decode(data, recipe, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer = {
            "status": decoded.status,
            "error": decoded.error,
            "width": decoded.width,
            "height": decoded.height,
        }
        _answer(answers, answer, b"" if decoded.pixels is None else decoded.pixels.tobytes())


def _answer(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(head).encode()
    answers.write(_LENGTHS.pack(len(text), len(body)) + text + body)
    answers.flush()


def _confine(parent: int, address_space: int) -> None:
    """Bound what this process may do to the machine, and tie it to its parent's life."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(
        ValueError, OSError
    ):  # macOS has no such limit; a stricter one may be set already
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    processes.end_with(parent)


def main() -> int:
    """Be the child."""
    _confine(int(sys.argv[1]), int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)
    return 0
