"""Architectures: the networks that imagemill builds from a checkpoint's arrays.

arrays ─► recognise ─► Architecture ─► fitted (names, shapes checked) ─► build ─► ONNX
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from imagemill.errors import CheckpointError, counted, printable
from imagemill.models.architectures import efficientnet_lite, graph, resnet
from imagemill.models.architectures.efficientnet_lite import EfficientNetLite
from imagemill.models.architectures.graph import Array
from imagemill.models.architectures.resnet import ResNet

Architecture: TypeAlias = ResNet | EfficientNetLite
"""A network: knows its parameters and turns a checkpoint's arrays into ONNX. Both classes have the
same methods.
"""
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    **efficientnet_lite.ARCHITECTURES,
    **resnet.ARCHITECTURES,
}
"""Those with published weights, by name, for 1,000 classes. `recognise` knows others too."""
_NAMES: Final = 3
"""Parameters that an error names."""


def recognise(arrays: Mapping[str, Array], wanted: str | None = None) -> Architecture:
    """Return the architecture of a checkpoint, with the number of classes of its head.

    Other networks may have the same parameters: timm's `resnetblur50` has those of `resnet50`. If
    the name of the network is known, compare it with that of the result.

    Args:
        arrays: name → array, as `checkpoints.checkpoint.read` returns them.
        wanted: name of an architecture that is chosen if several fit.

    Raises:
        CheckpointError: the arrays are those of no known architecture, those of another one than
            `wanted`, or those of several and none of them is wanted. Names what to type.
    """
    found: list[Architecture] = [*resnet.recognise(arrays), *efficientnet_lite.recognise(arrays)]
    for model in found:
        if model.name == wanted:
            return model
    if wanted is not None and is_known(wanted):
        for model in found:
            raise CheckpointError(
                f"The weights are those of {model.name}, not of {wanted}. Give another NAME."
            )
        # raises, and lists what does not fit
        fitted(ARCHITECTURES[wanted.removeprefix("tf_")], arrays)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"The weights fit {' and '.join(model.name for model in found)}, which differ only in"
            " what weights do not show: tf_ networks were trained in TensorFlow and are padded as"
            " there. Begin NAME with the right one, for example"
            f" {found[0].name}.mine."
        )
    first = ", ".join(printable(name, 80) for name in list(arrays)[:_NAMES])
    raise CheckpointError(
        f"The weights ({len(arrays)} parameters: {first}, …) are those of no architecture that"
        f" imagemill builds: {', '.join(ARCHITECTURES)}. Export the model to ONNX, and give"
        " --model file.onnx instead."
    )


def fitted(architecture: Architecture, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return a checkpoint's arrays under the architecture's own names of parameters, in its order.

    Raises:
        CheckpointError: parameters are missing, extra or misshapen; lists them under the names that
        the file uses.
    """
    shapes, called = architecture.shapes(), architecture.called(arrays)
    graph.check(arrays, {called(name): shape for name, shape in shapes.items()}, architecture.name)
    return {name: arrays[called(name)] for name in shapes}


def is_known(name: str) -> bool:
    """Return whether a network of this name, as timm and torchvision spell it, can be built."""
    return name in ARCHITECTURES or name.removeprefix("tf_") in efficientnet_lite.ARCHITECTURES


def describe(architecture: Architecture) -> str:
    """Return one line on an architecture that was recognised."""
    classes = counted(architecture.classes, "class") if architecture.classes else "no classifier"
    return f"{architecture.name}, {classes}, recognised from the weights' names and shapes"
