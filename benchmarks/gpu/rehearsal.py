"""The network and the images of a rehearsal on the CPU: everything is there once, and small."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

import sample_images
from imagemill.models import bundle
from imagemill.models.architectures import graph
from tiny import CLASSES, LABELS, TINY_CARD

_CHANNELS = 16
_GROUPS = 4


def write_model(folder: Path) -> None:
    """Write the bundle `tiny`: a stem, a bottleneck with groups and a sum, and a classifier."""
    wide = (_CHANNELS, _CHANNELS, 1, 1)
    kernels: dict[str, tuple[int, ...]] = {
        "stem": (_CHANNELS, 3, 3, 3),
        "conv1": wide,
        "conv2": (_CHANNELS, _CHANNELS // _GROUPS, 3, 3),
        "conv3": wide,
    }
    shapes = {f"{name}.weight": shape for name, shape in kernels.items()}
    for name in kernels:
        shapes |= graph.batch_norm(f"{name}.bn", _CHANNELS)
    shapes |= graph.head("fc", CLASSES, _CHANNELS)
    g = graph.Graph(graph.random_arrays(shapes, 0), epsilon=1e-5)
    around = (1, 1, 1, 1)

    def relu(x: str) -> str:
        return g.node("Relu", [x], f"{x}.relu")

    x = g.normalise("pixels", TINY_CARD.mean, TINY_CARD.std)
    x = relu(g.conv(x, "stem", "stem.bn", stride=2, pads=around))
    y = relu(g.conv(x, "conv1", "conv1.bn"))
    y = relu(g.conv(y, "conv2", "conv2.bn", pads=around, group=_GROUPS))
    y = g.conv(y, "conv3", "conv3.bn")
    g.classify(relu(g.node("Add", [y, x], "sum")), "fc")
    card = replace(TINY_CARD, labels=LABELS)
    bundle.write(folder / "tiny", card, g.model("tiny", TINY_CARD.recipe, CLASSES, _CHANNELS))


def write_images(folder: Path, count: int) -> None:
    """Write small images that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        data = sample_images.jpeg(60, 48, seed=number)
        (folder / f"{number:06d}.jpg").write_bytes(data)
