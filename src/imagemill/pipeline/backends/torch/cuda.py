"""Runs a program on an NVIDIA GPU: pinned memory, copies beside the computation, one CUDA graph.

    pinned ─ copy in ─► slot ─► graph input ═ graph ═► graph outputs ─► slot ─ copy out ─► pinned
           stream 1          stream 2                             stream 3

No GPU has run this module yet. The tests run it on a stand-in for `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import DeviceLostError
from imagemill.pipeline.backends.torch.operators.node import Tensor
from imagemill.pipeline.backends.torch.program import Loaded, as_tensor
from imagemill.pipeline.stopwatch import Stopwatch

SLOTS: Final = 3
"""Batches in flight: one is copied in, one computes, one is copied out."""
_WARM_UP: Final = 3
"""Runs before the graph is captured, in which libraries choose kernels and take workspace."""
_COPIED: Final = 2**28
"""Bytes that are copied to measure the rate: more than any GPU's caches hold."""
_REPETITIONS: Final = 10


def prepare() -> None:
    """Make PyTorch's arithmetic on a GPU repeatable, and exactly as wide as the precision says.

    fp32 is never TF32, sums in half precision are not split, and kernels are chosen by rule, not by
    a stopwatch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for place in (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends.cuda.matmul):
        place.fp32_precision = "ieee"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def open_card(number: int) -> tuple[Any, str]:
    """Return PyTorch's interface to GPUs, and how it spells one of them. Tests put a stand-in
    here.
    """
    torch.cuda.set_device(number)  # else some calls would take memory on card 0
    return torch.cuda, f"cuda:{number}"


class _Slot(Struct):
    """Memory of one batch in flight, and the events that mark its way."""

    pinned: Tensor
    pixels: Tensor
    outputs: list[Tensor]
    found: list[Tensor]
    """Pinned memory of the outputs."""
    sent: Any
    copied: Any
    begun: Any
    computed: Any
    fetched: Any
    done: Any


class CudaRunner:
    """One program on one GPU. All memory is taken when it is made.

    Args:
        program: loaded on the device.
        shape: of a batch, uint8.
        cuda: `torch.cuda`, or a stand-in.
        device: as PyTorch spells it.
        in_flight: batches that may be started before the first is finished; 0: three.
        clock: records how long the GPU computed and copied, by its own events.
    """

    def __init__(
        self,
        program: Loaded,
        shape: Sequence[int],
        cuda: Any,
        device: str,
        in_flight: int = 0,
        *,
        clock: Stopwatch | None = None,
    ) -> None:
        self.in_flight = in_flight or SLOTS
        self._cuda, self._program, self._clock = cuda, program, clock or Stopwatch()
        self._streams = [cuda.Stream(device) for _ in range(3)]
        self._pixels = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
        with torch.inference_mode(), cuda.stream(self._streams[1]):
            for _ in range(_WARM_UP):
                self._outputs = program(self._pixels)
        cuda.synchronize()
        self._graph = self._captured()
        self._slots = [self._slot() for _ in range(self.in_flight)]
        self._free = deque(self._slots)

    def _captured(self) -> Any:
        graph = self._cuda.CUDAGraph()
        with (
            torch.inference_mode(),
            self._cuda.graph(graph, stream=self._streams[1], capture_error_mode="thread_local"),
        ):
            self._outputs = self._program(self._pixels)
        return graph

    def _slot(self) -> _Slot:
        def pinned(like: Tensor) -> Tensor:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._cuda.is_available())

        return _Slot(
            pinned(self._pixels),
            torch.empty_like(self._pixels),
            [torch.empty_like(values) for values in self._outputs],
            [pinned(values) for values in self._outputs],
            *(self._cuda.Event(blocking=True, enable_timing=True) for _ in range(6)),
        )

    def start(self, pixels: NDArray[np.uint8]) -> _Slot:
        """Start a batch; returns what `finish` is called with. At most `in_flight` may be
        started.
        """
        slot, (inward, compute, outward) = self._free.popleft(), self._streams
        slot.pinned.copy_(as_tensor(pixels))
        with torch.inference_mode(), lost_if_it_fails():
            with self._cuda.stream(inward):
                slot.sent.record(inward)
                slot.pixels.copy_(slot.pinned, non_blocking=True)
                slot.copied.record(inward)
            with self._cuda.stream(compute):
                compute.wait_event(slot.copied)
                slot.begun.record(compute)
                self._pixels.copy_(slot.pixels)
                self._graph.replay()
                for goal, values in zip(slot.outputs, self._outputs, strict=True):
                    goal.copy_(values)
                slot.computed.record(compute)
            with self._cuda.stream(outward):
                outward.wait_event(slot.computed)
                slot.fetched.record(outward)
                for pinned, values in zip(slot.found, slot.outputs, strict=True):
                    pinned.copy_(values, non_blocking=True)
                slot.done.record(outward)
        return slot

    def finish(self, ticket: _Slot) -> list[NDArray[np.float32]]:
        """Return a batch's outputs, which are the caller's own. Waiting occupies no core."""
        with lost_if_it_fails():
            ticket.done.synchronize()
        self._clock.add("device", ticket.begun.elapsed_time(ticket.computed) / 1000)
        copies = ticket.sent.elapsed_time(ticket.copied), ticket.fetched.elapsed_time(ticket.done)
        self._clock.add("transfer", sum(copies) / 1000)
        found = [values.numpy().copy() for values in ticket.found]
        self._free.append(ticket)
        return found

    def close(self) -> None:
        """Let go of the GPU's memory."""
        self._graph = None
        self._slots.clear()
        self._free.clear()
        self._outputs = []


def measure_copies(cuda: Any, device: str) -> float:
    """Return the rate in bytes/s at which a GPU copies within its memory, reads plus writes.

    Args:
        cuda: `torch.cuda`, or a stand-in.
        device: as PyTorch spells it.
    """
    free, _ = cuda.mem_get_info(device)
    count = max(1, min(_COPIED, free // 4))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    stream = cuda.Stream(device)
    begun, ended = (cuda.Event(blocking=True, enable_timing=True) for _ in range(2))
    cuda.synchronize()
    with cuda.stream(stream):
        copied.copy_(source)  # the first one is slower
        begun.record(stream)
        for _ in range(_REPETITIONS):
            copied.copy_(source)
        ended.record(stream)
    ended.synchronize()
    seconds = begun.elapsed_time(ended) / 1000
    return float(2 * count * _REPETITIONS / seconds)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the GPU's memory does not suffice: PyTorch's own, or the
    one of CUDA's libraries.
    """
    signs = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


@contextlib.contextmanager
def lost_if_it_fails() -> Iterator[None]:
    """Turn an error of the CUDA driver into the loss of the device: after one, a process cannot use
    the GPU again.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if is_out_of_memory(error):
            raise
        raise DeviceLostError(f"the GPU failed: {str(error).splitlines()[0]}") from error
