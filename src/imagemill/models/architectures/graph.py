"""Small pieces that both model families are built of: a parameter check, and a writer of ONNX nodes
with batch norm folded in.

Opset 11 and IR version 6: the newest that runtimes of 2020, such as the Poplar SDK's, read. (n,
height, width, 3) uint8 pixels go in, `logits` and `embedding` come out; only the batch dimension is
open.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import CheckpointError, printable
from imagemill.records import Recipe

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
Shapes = dict[str, tuple[int, ...]]
Channels = tuple[float, float, float]

OPSET: Final = 11
IR_VERSION: Final = 6
IMAGENET_MEAN: Final = (0.485 * 255, 0.456 * 255, 0.406 * 255)
"""RGB mean of ImageNet, on the scale 0 to 255, as torchvision and timm use it."""
IMAGENET_STD: Final = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""RGB deviation of ImageNet, on the scale 0 to 255."""
LISTED: Final = 20
"""Mismatches listed one by one; the rest is counted."""


def batch_norm(name: str, channels: int) -> Shapes:
    """Names and shapes of a batch norm's parameters."""
    return {
        f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")
    }


def head(name: str, classes: int, features: int) -> Shapes:
    """Names and shapes of a classifier's parameters; none if there are no classes."""
    if classes == 0:
        return {}
    return {f"{name}.weight": (classes, features), f"{name}.bias": (classes,)}


def with_head(
    arrays: Mapping[str, Array], translate: Callable[[str], str], head: str
) -> Callable[[str], str]:
    """Return `translate`, the function from our names of parameters to a file's, changed for a file
    whose classifier has another name than usual: it is the layer with the file's only matrix, as in
    `fc = nn.Sequential(nn.Dropout(), nn.Linear(2048, 10))`, which is `fc.1`.

    Args:
        arrays: the file's, by name.
        translate: the function.
        head: our name of the classifier.
    """
    usual = translate(f"{head}.weight").removesuffix(".weight")
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if f"{usual}.weight" in arrays or len(matrices) != 1:
        return translate
    actual = matrices[0].removesuffix(".weight")

    def called(name: str) -> str:
        found = translate(name)
        return found.replace(usual, actual) if name.startswith(f"{head}.") else found

    return called


def classes(arrays: Mapping[str, Array], head: str) -> int:
    """Return the number of classes of a file whose classifier is called `head`; 0 if it has no
    parameter of it.
    """
    weight = arrays.get(f"{head}.weight")
    if weight is not None and weight.ndim == 2 and len(weight):
        return len(weight)
    return 1000 if any(name.startswith(f"{head}.") for name in arrays) else 0


def count(shapes: Shapes) -> int:
    """Count trained numbers, as publishers do: running statistics are not trained."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if not name.endswith(("running_mean", "running_var"))
    )


def check(arrays: Mapping[str, Array], shapes: Shapes, architecture: str) -> None:
    """Compare a checkpoint's arrays with the architecture's parameters.

    `num_batches_tracked`, which files of 2017 lack and inference does not need, may be there or
    not. So may single numbers of the training, such as its loss, whose names belong to no layer.

    Raises:
        CheckpointError: lists every missing, extra, misshapen and not numeric parameter at once.
    """
    problems = []
    for name, shape in shapes.items():
        if name not in arrays:
            problems.append(f"missing: {name} {shape}")
        elif arrays[name].shape != shape:
            problems.append(
                f"misshapen: {name} is {arrays[name].shape}, {architecture} has {shape}"
            )
        elif arrays[name].dtype.kind != "f":
            problems.append(
                f"of the wrong type: {name} holds {arrays[name].dtype}, not floating-point numbers"
            )
        elif not np.isfinite(arrays[name]).all():
            problems.append(f"damaged: {name} holds NaN or infinity")
        elif name.endswith("running_var") and (arrays[name] < 0).any():
            problems.append(f"damaged: {name} holds a negative variance")
    for name in arrays:
        counter = (
            name.endswith(".num_batches_tracked")
            and f"{name.removesuffix('num_batches_tracked')}running_var" in shapes
        )
        if name not in shapes and not counter and (arrays[name].ndim or "." in name):
            problems.append(f"extra: {printable(name, 80)} {arrays[name].shape}")
    if problems:
        lines = problems[:LISTED] + (
            [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        )
        raise CheckpointError(
            f"The weights do not fit {architecture}: {len(problems)} parameters of {len(shapes)}"
            f" disagree with the file's {len(arrays)}\n  "
            + "\n  ".join(lines)
            + f"\nGive a checkpoint of {architecture}, or export the model to ONNX, and give"
            " --model file.onnx instead."
        )


def random_arrays(shapes: Shapes, seed: int, quiet: tuple[str, ...] = ()) -> dict[str, Array]:
    """Make stand-in weights: the same for the same seed and name on every machine.

    He's initialisation keeps the signal's size from layer to layer. Residual branches would still
    add up, so the batch norms that end one (names that end in `quiet`) scale by 0.25: after 33
    blocks the signal has grown by 33 × 0.25² ≈ 2, not by 2³³.

    Args:
        shapes: name → shape; vectors are batch norms' or biases.
        seed: any integer.
        quiet: ends of the names of batch-norm weights that close a residual branch.
    """
    arrays: dict[str, Array] = {}
    for name, shape in shapes.items():
        rng = np.random.Generator(np.random.PCG64([seed % 2**64, zlib.crc32(name.encode())]))
        if len(shape) > 1:
            gain = 2.0 if len(shape) == 4 else 1.0
            array = rng.standard_normal(shape, dtype=np.float32)
            array *= np.float32(np.sqrt(gain / np.prod(shape[1:])))
            arrays[name] = array
        elif name.endswith("running_var"):
            arrays[name] = np.ones(shape, np.float32)
        elif name.endswith((".running_mean", ".bias")):
            arrays[name] = np.zeros(shape, np.float32)
        else:
            arrays[name] = np.full(shape, 0.25 if name.endswith(quiet) else 1.0, np.float32)
    return arrays


class Nodes:
    """Collects nodes and weights of a graph. Methods take and return tensor names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Add one node and return its output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, array: Array) -> str:
        """Add one constant and return its name."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(array, name))
        return name


class Graph(Nodes):
    """The nodes and weights of one model."""

    def __init__(self, arrays: Mapping[str, Array], epsilon: float) -> None:
        super().__init__()
        self._arrays = arrays
        self._epsilon = epsilon

    def weight(self, name: str, array: Array) -> str:
        """Add one constant, as float32 unless it holds integers."""
        kept = np.ascontiguousarray(array, None if array.dtype.kind == "i" else np.float32)
        return super().weight(name, kept)

    def normalise(self, pixels: str, mean: Channels, std: Channels) -> str:
        """Turn uint8 (n, H, W, 3) into the float32 (n, 3, H, W) tensor `normalised`.

        Kept apart from the first convolution: folded into it, the border's zero padding would stand
        for black instead of the mean.
        """
        floats = self.node("Cast", [pixels], "floats", to=1)
        planes = self.node("Transpose", [floats], "planes", perm=[0, 3, 1, 2])
        centred = self.node(
            "Sub", [planes, self.weight("mean", np.array(mean).reshape(1, 3, 1, 1))], "centred"
        )
        return self.node(
            "Div", [centred, self.weight("std", np.array(std).reshape(1, 3, 1, 1))], "normalised"
        )

    def conv(
        self,
        x: str,
        conv: str,
        norm: str,
        *,
        stride: int = 1,
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        group: int = 1,
    ) -> str:
        """Add a convolution with its batch norm folded in.

        Folding is done in float64: w·γ/√(σ²+ε) and β − μ·γ/√(σ²+ε).

        Args:
            x: float32 (n, C, H, W).
            conv: name of the convolution; its weight is `{conv}.weight`, (out, C / group, k, k).
            norm: name of the batch norm behind it.
            stride: both ways.
            pads: top, left, bottom, right, pixels.
            group: cardinality of a grouped convolution.
        """
        weight = self._arrays[f"{conv}.weight"]
        scale = self._of(norm, "weight") / np.sqrt(self._of(norm, "running_var") + self._epsilon)
        bias = self._of(norm, "bias") - self._of(norm, "running_mean") * scale
        folded = np.empty(weight.shape, np.float32)
        for channel in range(
            len(weight)
        ):  # one at a time: the whole in float64 would double the peak of a 3 GB model
            folded[channel] = weight[channel].astype(np.float64) * scale[channel]
        kernel = weight.shape[2]
        return self.node(
            "Conv",
            [x, self.weight(f"{conv}.weight", folded), self.weight(f"{conv}.bias", bias)],
            conv,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads),
            group=group,
        )

    def _of(self, norm: str, part: str) -> NDArray[np.float64]:
        return self._arrays[f"{norm}.{part}"].astype(np.float64)

    def classify(self, x: str, head: str) -> None:
        """End the graph: average over the plane → `embedding` → matrix → `logits`, if the arrays
        hold the matrix.
        """
        pooled = self.node("GlobalAveragePool", [x], "pooled")
        embedding = self.node("Flatten", [pooled], "embedding", axis=1)
        if f"{head}.weight" not in self._arrays:
            return
        weights = [
            self.weight("classifier.weight", self._arrays[f"{head}.weight"]),
            self.weight("classifier.bias", self._arrays[f"{head}.bias"]),
        ]
        self.node("Gemm", [embedding, *weights], "logits", transB=1)

    def model(self, name: str, recipe: Recipe, classes: int, features: int) -> onnx.ModelProto:
        """Finish: input `pixels` uint8 (n, height, width, 3), outputs `logits` (n, classes), unless
        there are no classes, and `embedding` (n, features).
        """
        from onnx import TensorProto, helper

        pixels = ["n", recipe.height, recipe.width, 3]
        outputs = {"logits": classes, "embedding": features} if classes else {"embedding": features}
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, pixels)],
            [
                helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", length])
                for output, length in outputs.items()
            ],
            self.weights,
        )
        return helper.make_model(
            graph,
            producer_name="imagemill",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
