"""Runs a program on CPU cores: a thread per batch, as the ONNX Runtime session does."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imagemill.pipeline.backends.torch.program import Loaded


class CpuRunner:
    """Computes several batches at once, each on its own cores.

    PyTorch's own threads wait in busy loops at every layer, so one core per batch is faster than
    all cores for each batch, and leaves the cores to the decoding threads.

    Args:
        program: loaded on the CPU.
        cores: how many it may use.
        in_flight: batches that may be started before the first is finished; 0: two per core.
    """

    def __init__(self, program: Loaded, cores: int, in_flight: int) -> None:
        self.in_flight = in_flight or 2 * cores
        at_work = min(cores, self.in_flight)
        threads = max(1, cores // at_work)
        self._program = program
        # OpenMP keeps the number per thread, so it is set in each of them.
        self._pool = ThreadPoolExecutor(at_work, "session", lambda: torch.set_num_threads(threads))

    def start(self, pixels: NDArray[np.uint8]) -> Any:
        """Start a batch; returns what `finish` is called with."""
        return self._pool.submit(self._compute, pixels)

    def finish(self, ticket: Future[list[NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
        """Return a batch's outputs, which are the caller's own."""
        return ticket.result()

    def drop(self, ticket: Future[list[NDArray[np.float32]]]) -> None:
        """Wait for a batch whose outputs nobody needs."""
        if not ticket.cancel():
            ticket.exception()

    def _compute(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [values.numpy() for values in self._program(as_tensor(pixels))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def as_tensor(pixels: NDArray[np.uint8]) -> Any:
    """Return an array as a tensor, copied only if PyTorch does not take it: if it is read-only, or
    turned around, as a reversed batch of one image is.
    """
    is_plain = pixels.flags.writeable and min(pixels.strides) > 0
    return torch.from_numpy(pixels if is_plain else pixels.copy(order="C"))
