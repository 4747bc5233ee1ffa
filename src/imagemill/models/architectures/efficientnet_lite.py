"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excite and with ReLU6, so that small
devices and int8 can run it.

Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019,
arXiv:1905.11946; the Lite variants are described in TensorFlow's TPU repository. Trained in
TensorFlow, hence its "same" padding: an even image and a stride of 2 put the odd pixel of padding
at the bottom and right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imagemill.models.architectures import graph

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

SIZE: Final = 224
STEM: Final = 32
FEATURES: Final = 1280
_STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first, expansion, channels."""


class _Block(NamedTuple):
    at: str
    kernel: int
    stride: int
    expansion: int
    channels: int
    out: int


def _blocks() -> Iterator[_Block]:
    number, channels = 0, STEM
    for blocks, kernel, stride, expansion, out in _STAGES:
        for block in range(blocks):
            yield _Block(
                f"_blocks.{number}", kernel, stride if block == 0 else 1, expansion, channels, out
            )
            number, channels = number + 1, out


@dataclass(frozen=True, slots=True)
class EfficientNetLite0:
    """The smallest of the family; takes RGB images of 224×224."""

    classes: int = 1000
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    """RGB, on the scale 0 to 255."""
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    """RGB, on the scale 0 to 255."""

    @property
    def name(self) -> str:
        """`efficientnet_lite0`."""
        return "efficientnet_lite0"

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return graph.count(self.shapes())

    def shapes(self) -> graph.Shapes:
        """Names, as `efficientnet-lite-pytorch` spells them, and shapes, in the order of the
        network.
        """
        shapes: graph.Shapes = {
            "_conv_stem.weight": (STEM, 3, 3, 3),
            **graph.batch_norm("_bn0", STEM),
        }
        for b in _blocks():
            wide = b.channels * b.expansion
            if b.expansion > 1:
                shapes |= {
                    f"{b.at}._expand_conv.weight": (wide, b.channels, 1, 1),
                    **graph.batch_norm(f"{b.at}._bn0", wide),
                }
            shapes |= {
                f"{b.at}._depthwise_conv.weight": (wide, 1, b.kernel, b.kernel),
                **graph.batch_norm(f"{b.at}._bn1", wide),
            }
            shapes |= {
                f"{b.at}._project_conv.weight": (b.out, wide, 1, 1),
                **graph.batch_norm(f"{b.at}._bn2", b.out),
            }
        shapes |= {
            "_conv_head.weight": (FEATURES, _STAGES[-1][-1], 1, 1),
            **graph.batch_norm("_bn1", FEATURES),
        }
        return shapes | {"_fc.weight": (self.classes, FEATURES), "_fc.bias": (self.classes,)}

    def random(self, seed: int) -> dict[str, Array]:
        """Make stand-in weights by seed."""
        return graph.random_arrays(self.shapes(), seed)

    def build(self, arrays: Mapping[str, Array]) -> onnx.ModelProto:
        """Turn a checkpoint's arrays into ONNX.

        Raises:
            CheckpointError: parameters are missing, extra or misshapen; lists them.
        """
        graph.check(arrays, self.shapes(), self.name)
        g = graph.Graph(arrays, epsilon=1e-3)
        bounds = [g.weight("zero", np.array(0.0)), g.weight("six", np.array(6.0))]

        def relu6(x: str) -> str:
            return g.node("Clip", [x, *bounds], f"{x}.relu6")

        x = g.normalise("pixels", self.mean, self.std)
        x = relu6(g.conv(x, "_conv_stem", "_bn0", stride=2, pads=_same(SIZE, 3, 2)))
        extent = SIZE // 2
        for b in _blocks():
            y = x
            if b.expansion > 1:
                y = relu6(g.conv(y, f"{b.at}._expand_conv", f"{b.at}._bn0"))
            pads = _same(extent, b.kernel, b.stride)
            y = relu6(
                g.conv(
                    y,
                    f"{b.at}._depthwise_conv",
                    f"{b.at}._bn1",
                    stride=b.stride,
                    pads=pads,
                    group=b.channels * b.expansion,
                )
            )
            y = g.conv(y, f"{b.at}._project_conv", f"{b.at}._bn2")
            x = g.node("Add", [y, x], b.at) if b.stride == 1 and b.channels == b.out else y
            extent //= b.stride
        g.classify(relu6(g.conv(x, "_conv_head", "_bn1")), "_fc.weight", "_fc.bias")
        return g.model(self.name, SIZE, self.classes, FEATURES)


def _same(extent: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's "same" padding of a square plane: top, left, bottom, right; the odd pixel goes
    below and right.
    """
    total = max((-(-extent // stride) - 1) * stride + kernel - extent, 0)
    return (total // 2, total // 2, total - total // 2, total - total // 2)
