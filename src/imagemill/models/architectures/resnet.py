"""ResNet and ResNeXt: residual networks of 18 to 152 layers.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
Xie, Girshick, Dollár, Tu, He: Aggregated Residual Transformations for Deep Neural Networks, CVPR
2017, arXiv:1611.05431.

A ResNeXt splits its 3×3 convolutions into groups. Their number is the cardinality, and a ResNet is
a ResNeXt with cardinality 1. `resnext101_32x4d` reads: 101 layers, cardinality 32, 4 channels per
group in the first stage. `wide_resnet50_2` has twice the channels in its 3×3 convolutions.
The stride is on the 3×3 convolution, as in torchvision and timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from imagemill.models.architectures import graph
from imagemill.models.architectures.graph import Array, Channels
from imagemill.records import Recipe

if TYPE_CHECKING:
    import onnx

BLOCKS: Final = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks per stage, by depth."""
BASIC: Final = (18, 34)
"""Depths whose blocks are two 3×3 convolutions; the others have a bottleneck, 1×1, 3×3, 1×1."""
BASE_WIDTH: Final = 64
"""Channels of the 3×3 convolutions in the first stage of a ResNet that is not wide."""
STEM: Final = (64, 3, 7, 7)
"""Shape of the first convolution's weight."""
_CADENE: Final = {
    "conv1": "0.0",
    "bn1": "0.1",
    "conv2": "0.3",
    "bn2": "0.4",
    "conv3": "1",
    "bn3": "2",
}
"""Where Cadene's nested containers keep what torchvision calls conv1, bn1, …"""


class ResNet(Struct, frozen=True):
    """One member of the family; takes RGB images of any size, 224×224 by default."""

    depth: int
    """A key of BLOCKS."""
    cardinality: int = 1
    """Groups of each 3×3 convolution."""
    base_width: int = BASE_WIDTH
    """Channels per group in the first stage; doubles with each stage."""
    classes: int = 1000
    """0: a network without a head, whose only output is the embedding."""

    recipe = Recipe(resize=256)
    """How torchvision prepares images by default."""
    mean = graph.IMAGENET_MEAN
    std = graph.IMAGENET_STD
    stem = "conv1.weight"
    """Name of the first convolution's weight, (out, 3, k, k)."""
    head = "fc"
    """Name of the classifier: its parameters are `fc.weight`, `fc.bias`."""

    @property
    def name(self) -> str:
        """As publishers spell it: `resnet50`, `resnext101_32x4d`, `wide_resnet50_2`."""
        if self.cardinality > 1:
            return f"resnext{self.depth}_{self.cardinality}x{self.base_width}d"
        if self.base_width == BASE_WIDTH:
            return f"resnet{self.depth}"
        return f"wide_resnet{self.depth}_{self.base_width / BASE_WIDTH:g}"

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return graph.count(self.shapes())

    @property
    def features(self) -> int:
        """Length of the embedding."""
        return 512 if self.depth in BASIC else 2048

    def shapes(self) -> graph.Shapes:
        """Return names, as torchvision and timm spell them, and shapes, in the order of the
        network.
        """
        shapes: graph.Shapes = {"conv1.weight": STEM, **graph.batch_norm("bn1", STEM[0])}
        channels = STEM[0]
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for block in range(blocks):
                at = f"layer{stage + 1}.{block}"
                kernels = self._kernels(stage, channels)
                for number, kernel in enumerate(kernels, 1):
                    shapes |= {
                        f"{at}.conv{number}.weight": kernel,
                        **graph.batch_norm(f"{at}.bn{number}", kernel[0]),
                    }
                out = kernels[-1][0]
                if block == 0 and self._is_projected(stage):
                    shapes |= {
                        f"{at}.downsample.0.weight": (out, channels, 1, 1),
                        **graph.batch_norm(f"{at}.downsample.1", out),
                    }
                channels = out
        return shapes | graph.head("fc", self.classes, self.features)

    def random(self, seed: int) -> dict[str, Array]:
        """Return stand-in weights by seed, under torchvision's names."""
        last = ".bn2.weight" if self.depth in BASIC else ".bn3.weight"
        return graph.random_arrays(self.shapes(), seed, quiet=(last,))

    def called(self, arrays: Mapping[str, Array]) -> Callable[[str], str]:
        """Return the function that translates a name of `shapes` into that of a file from
        torchvision, timm, Cadene or transformers.
        """
        return names(arrays)

    def build(
        self, arrays: Mapping[str, Array], recipe: Recipe, mean: Channels, std: Channels
    ) -> onnx.ModelProto:
        """Return the ONNX model of arrays under the names of `shapes`."""
        g = graph.Graph(arrays, epsilon=1e-5)
        x = g.normalise("pixels", mean, std)
        x = g.node("Relu", [g.conv(x, "conv1", "bn1", stride=2, pads=(3, 3, 3, 3))], "stem")
        x = g.node(
            "MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
        )
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for block in range(blocks):
                at = f"layer{stage + 1}.{block}"
                stride = 2 if block == 0 and stage > 0 else 1
                y = self._branch(g, x, at, stride)
                if block == 0 and self._is_projected(stage):
                    x = g.conv(x, f"{at}.downsample.0", f"{at}.downsample.1", stride=stride)
                x = g.node("Relu", [g.node("Add", [y, x], f"{at}.sum")], at)
        g.classify(x, "fc")
        return g.model(self.name, recipe, self.classes, self.features)

    def _branch(self, g: graph.Graph, x: str, at: str, stride: int) -> str:
        """Add the convolutions of a block, without the sum, and return their output's name."""
        around = (1, 1, 1, 1)
        if self.depth in BASIC:
            y = g.conv(x, f"{at}.conv1", f"{at}.bn1", stride=stride, pads=around)
            return g.conv(
                g.node("Relu", [y], f"{at}.relu1"), f"{at}.conv2", f"{at}.bn2", pads=around
            )
        y = g.node("Relu", [g.conv(x, f"{at}.conv1", f"{at}.bn1")], f"{at}.relu1")
        y = g.conv(
            y,
            f"{at}.conv2",
            f"{at}.bn2",
            stride=stride,
            pads=around,
            group=self.cardinality,
        )
        return g.conv(g.node("Relu", [y], f"{at}.relu2"), f"{at}.conv3", f"{at}.bn3")

    def _kernels(self, stage: int, channels: int) -> tuple[tuple[int, int, int, int], ...]:
        """Return the shapes of the convolutions of a block that reads so many channels."""
        width = self.cardinality * self.base_width * 2**stage
        if self.depth in BASIC:
            return (width, channels, 3, 3), (width, width, 3, 3)
        grouped, out = width // self.cardinality, 256 * 2**stage
        return (width, channels, 1, 1), (width, grouped, 3, 3), (out, width, 1, 1)

    def _is_projected(self, stage: int) -> bool:
        """Return whether a stage's first block changes the shape of what it adds to."""
        return stage > 0 or self.depth not in BASIC


def recognise(arrays: Mapping[str, Array]) -> list[ResNet]:
    """Return the member of the family that has a checkpoint's depth, cardinality, width and number
    of classes, if there is one.

    Only what tells members apart is looked at: `architectures.fitted` compares every parameter.
    """
    called = names(arrays)

    def shape(name: str) -> tuple[int, ...]:
        array = arrays.get(called(name))
        return () if array is None else array.shape

    if shape("conv1.weight") != STEM:
        return []
    blocks = []
    for stage in range(1, 5):
        count = 0
        while shape(f"layer{stage}.{count}.conv1.weight"):
            count += 1
        blocks.append(count)
    is_basic = not shape("layer1.0.conv3.weight")
    depth = next(
        (
            depth
            for depth, known in BLOCKS.items()
            if known == tuple(blocks) and (depth in BASIC) == is_basic
        ),
        None,
    )
    if depth is None:
        return []
    classes = graph.classes(arrays, called("fc.weight").removesuffix(".weight"))
    if is_basic:
        return [ResNet(depth, classes=classes)]
    match shape("layer1.0.conv2.weight"):
        case (width, grouped, 3, 3) if grouped > 0 and width > 0 and width % grouped == 0:
            return [ResNet(depth, width // grouped, grouped, classes)]
    return []


def names(arrays: Mapping[str, Array]) -> Callable[[str], str]:
    """Return the function that translates torchvision's name of a parameter into the file's."""
    translate: Callable[[str], str] = str  # torchvision's own
    if is_cadene(arrays):
        translate = cadene_name
    elif any(name.startswith("resnet.") for name in arrays):
        translate = transformers_name
    return graph.with_head(arrays, translate, "fc")


def is_cadene(arrays: Mapping[str, Array]) -> bool:
    """Return whether the names are those of the ResNeXt in Cadene's `pretrainedmodels`."""
    return any(name.startswith("features.") for name in arrays)


def cadene_name(name: str) -> str:
    """Translate torchvision's name of a parameter into Cadene's: `layer1.0.conv1.weight` →
    `features.4.0.0.0.0.0.weight`.
    """
    match name.split("."):
        case ["conv1", part]:
            return f"features.0.{part}"
        case ["bn1", part]:
            return f"features.1.{part}"
        case ["fc", part]:
            return f"last_linear.{part}"
        case [layer, block, "downsample", index, part]:
            return f"features.{int(layer[5:]) + 3}.{block}.0.1.{index}.{part}"
        case [layer, block, piece, part]:
            return f"features.{int(layer[5:]) + 3}.{block}.0.0.{_CADENE[piece]}.{part}"
    raise ValueError(name)


def transformers_name(name: str) -> str:
    """Translate torchvision's name of a parameter into transformers': `layer1.0.conv1.weight` →
    `resnet.encoder.stages.0.layers.0.layer.0.convolution.weight`.
    """
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    match name.split("."):
        case ["fc", part]:
            return f"classifier.1.{part}"
        case [("conv1" | "bn1") as piece, part]:
            return f"resnet.embedder.embedder.{kinds[piece[:-1]]}.{part}"
        case [layer, block, "downsample", index, part]:
            at = f"resnet.encoder.stages.{int(layer[5:]) - 1}.layers.{block}.shortcut"
            return f"{at}.{kinds[index]}.{part}"
        case [layer, block, piece, part]:
            at = f"resnet.encoder.stages.{int(layer[5:]) - 1}.layers.{block}.layer"
            return f"{at}.{int(piece[-1]) - 1}.{kinds[piece[:-1]]}.{part}"
    raise ValueError(name)


ARCHITECTURES: Final = {
    model.name: model
    for model in (
        *(ResNet(depth) for depth in BLOCKS),
        ResNet(50, base_width=128),
        ResNet(101, base_width=128),
        ResNet(50, 32, 4),
        ResNet(101, 32, 4),
        ResNet(101, 32, 8),
        ResNet(101, 32, 16),
        ResNet(101, 32, 32),
        ResNet(101, 32, 48),
        ResNet(101, 64, 4),
    )
}
"""Every member that somebody published weights for, by name."""
