"""Other ways to run a program on a GPU, which device.py compares with the one that jobs use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from imagemill.pipeline.backends.torch.cuda import CudaRunner
from imagemill.pipeline.backends.torch.fusions import FusedConv
from imagemill.pipeline.backends.torch.operators.node import Call, Tensor
from imagemill.pipeline.backends.torch.program import Loaded

_CLOSE = 0.02
"""How far cuDNN's fused call may lie from the plain one, as a share of the largest number."""


class WithoutGraph(CudaRunner):
    """Launches each kernel of each batch from Python."""

    def _captured(self) -> Any:
        return self

    def replay(self) -> None:
        self._outputs = self._program(self._pixels)


def use_cudnn(loaded: Loaded) -> None:
    """Have the next run of a program choose for each convolution whether cuDNN computes sum and
    ReLU inside it.

    Jobs do not use that until a card has shown that it is faster and as repeatable: cuDNN does not
    promise it.
    """
    for step in loaded.steps:
        step.call = partial(_choose, step, step.call)


def _choose(step: Any, call: Call, *given: Tensor | None) -> Any:
    step.call = with_cudnn(call, given)
    return step.call(*given)


def with_cudnn(call: Call, given: Sequence[Tensor | None]) -> Call:
    """Return a convolution with sum and ReLU in one kernel of cuDNN, if cuDNN has one for it and it
    computes the same; else the call itself.

    Args:
        call: a step's call.
        given: example inputs on the GPU.
    """
    if not isinstance(call, FusedConv) or call.activation != "Relu" or given[2] is None:
        return call
    settings = call.settings
    if settings.rank != 2 or settings.before != settings.after:
        return call

    def fused(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
        rest = (bias, settings.strides, settings.before, settings.dilations, settings.group)
        if other is None:
            return torch.cudnn_convolution_relu(x, weight, *rest)
        return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, *rest)

    try:
        found, plain = fused(*given), call(*given)
    except RuntimeError:  # cuDNN has no such kernel
        return call
    apart = (found.float() - plain.float()).abs().max()
    return fused if bool(apart <= _CLOSE * plain.float().abs().max()) else call
