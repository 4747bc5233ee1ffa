"""ResNeXt: a residual network whose 3×3 convolutions are split into groups (their number is the
cardinality).

Xie, Girshick, Dollár, Tu, He: Aggregated Residual Transformations for Deep Neural Networks, CVPR
2017, arXiv:1611.05431.
`resnext101_32x4d` reads: 101 layers, cardinality 32, 4 channels per group in the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from imagemill.models.architectures import graph

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

BLOCKS: Final = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks per stage, by depth."""
FEATURES: Final = 2048
_CADENE: Final = {
    "conv1": "0.0",
    "bn1": "0.1",
    "conv2": "0.3",
    "bn2": "0.4",
    "conv3": "1",
    "bn3": "2",
}
"""Where Cadene's nested containers keep what torchvision calls conv1, bn1, …"""


@dataclass(frozen=True, slots=True)
class ResNeXt:
    """One member of the family; takes RGB images of 224×224."""

    depth: int
    """50 or 101."""
    cardinality: int
    """Groups of each 3×3 convolution."""
    base_width: int
    """Channels per group in the first stage; doubles with each stage."""
    classes: int = 1000
    mean: tuple[float, float, float] = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    """RGB, on the scale 0 to 255."""
    std: tuple[float, float, float] = (0.229 * 255, 0.224 * 255, 0.225 * 255)
    """RGB, on the scale 0 to 255."""

    @property
    def name(self) -> str:
        """As publishers spell it: `resnext101_32x4d`."""
        return f"resnext{self.depth}_{self.cardinality}x{self.base_width}d"

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return graph.count(self.shapes())

    def shapes(self) -> graph.Shapes:
        """Names, as torchvision, timm and WSL spell them, and shapes, in the order of the
        network.
        """
        shapes: graph.Shapes = {"conv1.weight": (64, 3, 7, 7), **graph.batch_norm("bn1", 64)}
        channels = 64
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            width, out = self.cardinality * self.base_width * 2**stage, 256 * 2**stage
            for block in range(blocks):
                at = f"layer{stage + 1}.{block}"
                shapes |= {
                    f"{at}.conv1.weight": (width, channels, 1, 1),
                    **graph.batch_norm(f"{at}.bn1", width),
                }
                shapes |= {
                    f"{at}.conv2.weight": (width, width // self.cardinality, 3, 3),
                    **graph.batch_norm(f"{at}.bn2", width),
                }
                shapes |= {
                    f"{at}.conv3.weight": (out, width, 1, 1),
                    **graph.batch_norm(f"{at}.bn3", out),
                }
                if block == 0:
                    shapes |= {
                        f"{at}.downsample.0.weight": (out, channels, 1, 1),
                        **graph.batch_norm(f"{at}.downsample.1", out),
                    }
                channels = out
        return shapes | {"fc.weight": (self.classes, FEATURES), "fc.bias": (self.classes,)}

    def random(self, seed: int) -> dict[str, Array]:
        """Make stand-in weights by seed, under torchvision's names."""
        return graph.random_arrays(self.shapes(), seed, quiet=(".bn3.weight",))

    def build(self, arrays: Mapping[str, Array]) -> onnx.ModelProto:
        """Turn a checkpoint's arrays into ONNX.

        Args:
            arrays: name → array under torchvision's or Cadene's names.

        Raises:
            CheckpointError: parameters are missing, extra or misshapen; lists them under the names
            that the file uses.
        """
        shapes = self.shapes()
        if is_cadene(arrays):
            graph.check(
                arrays, {cadene_name(name): shape for name, shape in shapes.items()}, self.name
            )
            arrays = {name: arrays[cadene_name(name)] for name in shapes}
        else:
            graph.check(arrays, shapes, self.name)
        return self._graph(arrays)

    def _graph(self, arrays: Mapping[str, Array]) -> onnx.ModelProto:
        g = graph.Graph(arrays, epsilon=1e-5)
        x = g.normalise("pixels", self.mean, self.std)
        x = g.node("Relu", [g.conv(x, "conv1", "bn1", stride=2, pads=(3, 3, 3, 3))], "stem")
        x = g.node(
            "MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
        )
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for block in range(blocks):
                at = f"layer{stage + 1}.{block}"
                stride = 2 if block == 0 and stage > 0 else 1
                y = g.node("Relu", [g.conv(x, f"{at}.conv1", f"{at}.bn1")], f"{at}.relu1")
                y = g.conv(
                    y,
                    f"{at}.conv2",
                    f"{at}.bn2",
                    stride=stride,
                    pads=(1, 1, 1, 1),
                    group=self.cardinality,
                )
                y = g.conv(g.node("Relu", [y], f"{at}.relu2"), f"{at}.conv3", f"{at}.bn3")
                if block == 0:
                    x = g.conv(x, f"{at}.downsample.0", f"{at}.downsample.1", stride=stride)
                x = g.node("Relu", [g.node("Add", [y, x], f"{at}.sum")], at)
        g.classify(x, "fc.weight", "fc.bias")
        return g.model(self.name, 224, self.classes, FEATURES)


def is_cadene(arrays: Mapping[str, Array]) -> bool:
    """Tell whether the names are those of Cadene's `pretrainedmodels`."""
    return any(name.startswith(("features.", "last_linear.")) for name in arrays)


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


ARCHITECTURES: Final = {
    model.name: model
    for model in (
        ResNeXt(50, 32, 4),
        ResNeXt(101, 32, 4),
        ResNeXt(101, 32, 8),
        ResNeXt(101, 32, 16),
        ResNeXt(101, 32, 32),
        ResNeXt(101, 32, 48),
        ResNeXt(101, 64, 4),
    )
}
"""Every member that somebody published weights for, by name."""
