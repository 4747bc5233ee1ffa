"""EfficientNet-Lite0 to Lite4: EfficientNet without squeeze-and-excite and with ReLU6, so that
small devices and int8 can run it.

Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019,
arXiv:1905.11946; the Lite variants are described in TensorFlow's TPU repository.

There are two of each. One was trained in TensorFlow, hence its "same" padding: an even image and a
stride of 2 put the odd pixel of padding at the bottom and right. timm calls it
`tf_efficientnet_lite0`, and its own `efficientnet_lite0` is padded as usual in PyTorch. Their
parameters have the same names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from msgspec import Struct

from imagemill.models.architectures import graph
from imagemill.models.architectures.graph import Array, Channels
from imagemill.records import Interpolation, Recipe

if TYPE_CHECKING:
    import onnx

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
"""Of Lite0: blocks, kernel, stride of the first, expansion, channels."""
_SCALES: Final = (
    (1.0, 1.0, 224),
    (1.0, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 280),
    (1.4, 1.8, 300),
)
"""Of Lite0 to Lite4: factor of the channels, factor of the blocks, size of the images."""
_BORDER: Final = 32
"""Pixels that the resized image is larger than the part that is cut out of it."""
_TIMM: Final = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_TIMM_FIRST: Final = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
"""In the first block, which does not expand."""
_TIMM_OTHER: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class _Block(NamedTuple):
    at: str
    """As `efficientnet-lite-pytorch` spells it: `_blocks.4`."""
    timm: str
    """As timm spells it: `blocks.2.1`."""
    kernel: int
    stride: int
    expansion: int
    channels: int
    out: int


class EfficientNetLite(Struct, frozen=True):
    """One member of the family; takes RGB images of any size, by default of its own."""

    number: int
    """0 to 4."""
    classes: int = 1000
    """0: a network without a head, whose only output is the embedding."""
    is_timm: bool = False
    """Whether its parameters have timm's names."""
    is_tensorflow: bool = True
    """Whether it was trained in TensorFlow."""

    features = FEATURES
    """Length of the embedding."""
    stem = "_conv_stem.weight"
    """Name of the first convolution's weight, (out, 3, k, k)."""
    head = "_fc"
    """Name of the classifier: its parameters are `_fc.weight`, `_fc.bias`."""

    @property
    def name(self) -> str:
        """The name that goes with this spelling of the parameters: `efficientnet_lite0`, and timm's
        `tf_efficientnet_lite0`.
        """
        prefix = "tf_" if self.is_timm and self.is_tensorflow else ""
        return f"{prefix}efficientnet_lite{self.number}"

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return graph.count(self.shapes())

    @property
    def recipe(self) -> Recipe:
        """The publisher's. TensorFlow resizes bilinearly and without antialiasing, to which
        Pillow's bicubic filter comes closer than its bilinear one.
        """
        size = _SCALES[self.number][2]
        return Recipe(size, size, size + _BORDER, interpolation=Interpolation.BICUBIC)

    @property
    def mean(self) -> tuple[float, float, float]:
        """RGB, on the scale 0 to 255."""
        return (127.0, 127.0, 127.0) if self.is_tensorflow else graph.IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, float, float]:
        """RGB, on the scale 0 to 255."""
        return (128.0, 128.0, 128.0) if self.is_tensorflow else graph.IMAGENET_STD

    def shapes(self) -> graph.Shapes:
        """Return names, as `efficientnet-lite-pytorch` spells them, and shapes, in the order of the
        network.
        """
        shapes: graph.Shapes = {
            "_conv_stem.weight": (STEM, 3, 3, 3),
            **graph.batch_norm("_bn0", STEM),
        }
        out = STEM
        for b in self._blocks():
            wide, out = b.channels * b.expansion, b.out
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
                f"{b.at}._project_conv.weight": (out, wide, 1, 1),
                **graph.batch_norm(f"{b.at}._bn2", out),
            }
        shapes |= {
            "_conv_head.weight": (FEATURES, out, 1, 1),
            **graph.batch_norm("_bn1", FEATURES),
        }
        return shapes | graph.head("_fc", self.classes, FEATURES)

    def random(self, seed: int) -> dict[str, Array]:
        """Return stand-in weights by seed."""
        return graph.random_arrays(self.shapes(), seed)

    def build(
        self, arrays: Mapping[str, Array], recipe: Recipe, mean: Channels, std: Channels
    ) -> onnx.ModelProto:
        """Return the ONNX model of arrays under the names of `shapes`."""
        g = graph.Graph(arrays, epsilon=1e-3 if self.is_tensorflow else 1e-5)
        bounds = [g.weight("zero", np.array(0.0)), g.weight("six", np.array(6.0))]
        extent = (recipe.height, recipe.width)

        def relu6(x: str) -> str:
            return g.node("Clip", [x, *bounds], f"{x}.relu6")

        def conv(x: str, at: str, norm: str, kernel: int, stride: int, group: int = 1) -> str:
            nonlocal extent
            pads = self._pads(extent, kernel, stride)
            extent = (-(-extent[0] // stride), -(-extent[1] // stride))
            return g.conv(x, at, norm, stride=stride, pads=pads, group=group)

        x = g.normalise("pixels", mean, std)
        x = relu6(conv(x, "_conv_stem", "_bn0", 3, 2))
        for b in self._blocks():
            y, wide = x, b.channels * b.expansion
            if b.expansion > 1:
                y = relu6(g.conv(y, f"{b.at}._expand_conv", f"{b.at}._bn0"))
            y = relu6(conv(y, f"{b.at}._depthwise_conv", f"{b.at}._bn1", b.kernel, b.stride, wide))
            y = g.conv(y, f"{b.at}._project_conv", f"{b.at}._bn2")
            x = g.node("Add", [y, x], b.at) if b.stride == 1 and b.channels == b.out else y
        g.classify(relu6(g.conv(x, "_conv_head", "_bn1")), "_fc")
        return g.model(self.name, recipe, self.classes, FEATURES)

    def _blocks(self) -> Iterator[_Block]:
        width, depth, _ = _SCALES[self.number]
        number, channels = 0, STEM
        for stage, (blocks, kernel, stride, expansion, out) in enumerate(_STAGES):
            is_end = stage in (0, len(_STAGES) - 1)  # the ends have one block in all sizes
            for block in range(blocks if is_end else math.ceil(blocks * depth)):
                yield _Block(
                    f"_blocks.{number}",
                    f"blocks.{stage}.{block}",
                    kernel,
                    stride if block == 0 else 1,
                    expansion,
                    channels,
                    _scaled(out, width),
                )
                number, channels = number + 1, _scaled(out, width)

    def called(self, arrays: Mapping[str, Array]) -> Callable[[str], str]:
        """Return the function that translates a name of `shapes` into that of a file:
        `efficientnet-lite-pytorch`'s or timm's.
        """
        blocks = {b.at: b for b in self._blocks()}

        def in_timm(name: str) -> str:
            match name.rsplit(".", 2):
                case [at, piece, part]:
                    pieces = _TIMM_OTHER if blocks[at].expansion > 1 else _TIMM_FIRST
                    return f"{blocks[at].timm}.{pieces[piece]}.{part}"
                case [piece, part]:
                    return f"{_TIMM[piece]}.{part}"
            raise ValueError(name)

        return graph.with_head(arrays, in_timm if self.is_timm else str, "_fc")

    def _pads(self, extent: tuple[int, int], kernel: int, stride: int) -> tuple[int, int, int, int]:
        """Return the padding of a plane (height, width): top, left, bottom, right, pixels."""
        if not self.is_tensorflow:
            return (kernel // 2,) * 4
        top, bottom = _same(extent[0], kernel, stride)
        left, right = _same(extent[1], kernel, stride)
        return top, left, bottom, right


def _same(extent: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's "same" padding of one side; the odd pixel goes behind it."""
    total = max((-(-extent // stride) - 1) * stride + kernel - extent, 0)
    return total // 2, total - total // 2


def _scaled(channels: int, factor: float) -> int:
    """Return a number of channels times a factor, rounded to a multiple of 8 that is no less than
    90 % of it.
    """
    exact = channels * factor
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def recognise(arrays: Mapping[str, Array]) -> list[EfficientNetLite]:
    """Return the members of the family that a checkpoint's parameters fit: two under timm's names.

    Only what tells members apart is looked at: `architectures.fitted` compares every parameter.
    """
    is_timm = "conv_stem.weight" in arrays
    if not is_timm and "_conv_stem.weight" not in arrays:
        return []
    for number in range(len(_SCALES)):
        model = EfficientNetLite(number, is_timm=is_timm)
        called = model.called(arrays)
        *_, last = model._blocks()
        wanted = {
            f"{last.at}._project_conv.weight": (last.out, last.channels * last.expansion, 1, 1),
            "_conv_head.weight": (FEATURES, last.out, 1, 1),
        }
        if all(
            called(name) in arrays and arrays[called(name)].shape == shape
            for name, shape in wanted.items()
        ):
            classes = graph.classes(arrays, called("_fc.weight").removesuffix(".weight"))
            ways = (True, False) if is_timm else (True,)
            return [EfficientNetLite(number, classes, is_timm, way) for way in ways]
    return []


ARCHITECTURES: Final = {model.name: model for model in map(EfficientNetLite, range(len(_SCALES)))}
"""Every member, by name."""
