"""How much memory traffic a program needs at least, and how much a GPU's memory allows.

Most image classifiers are bound by memory on a GPU, not by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from imagemill.pipeline.backends.torch.operators import Tensor
from imagemill.pipeline.backends.torch.program import Program, Step

_VIEWS: Final = ("Transpose", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity")
"""Steps that move no bytes, at least as long as the layout allows it."""
_COPIED: Final = 2**28
"""Bytes that are copied to measure the rate: more than any GPU's caches hold."""
_REPETITIONS: Final = 10


def count_bytes(program: Program, width: int) -> int:
    """Return how many bytes a batch moves if every step reads its inputs and writes its outputs
    once; arguments as for `bytes_of_steps`.
    """
    return sum(moved for _, moved in bytes_of_steps(program, width))


def bytes_of_steps(program: Program, width: int) -> Iterator[tuple[Step, int]]:
    """Yield each step that moves something, with the bytes that it reads and writes.

    Args:
        program: with the shapes of one batch.
        width: bytes of a number in the session's precision.
    """
    reduced = {name for step in program.steps if step.is_reduced for name in step.outputs}

    def size(name: str, *, is_reduced: bool) -> int:
        value: Tensor = program.values[name]
        each = width if is_reduced and value.is_floating_point() else value.element_size()
        return int(value.numel()) * each

    for step in program.steps:
        if step.kind not in _VIEWS:
            moved = 0
            for name in filter(None, (*step.inputs, *step.outputs)):
                is_weight = program.is_constant(name) and step.is_reduced
                moved += size(name, is_reduced=is_weight or name in reduced)
            yield step, moved


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
