"""The last layer of a model whose classes are words, as ONNX nodes behind its image tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError, printable
from imagemill.system.openvino_library import new_core

if TYPE_CHECKING:
    import onnx

EMBEDDING: Final = "classes/embedding"
"""Tensor with the normalised embedding of an image."""
LOGITS: Final = "classes/logits"
"""Output with the scores."""


def features(file: Path, model: onnx.ModelProto, output: str) -> int | None:
    """Return the length of an image tower's embeddings; None if it is not known before it runs.

    Raises:
        ModelError: the tower has no such output, or it is not one embedding per image.
    """
    values = {value.name: value for value in model.graph.output}
    if output not in values:
        raise ModelError(
            f"{printable(file)} returns {printable(', '.join(values))}; an image tower of such a"
            f" model returns {output}. Export it again, with its projection."
        )
    dims = values[output].type.tensor_type.shape.dim
    if values[output].type.tensor_type.HasField("shape") and len(dims) != 2:
        raise ModelError(
            f"{printable(file)}: {output} has {len(dims)} dimensions; it must be (images,"
            " features)."
        )
    return (dims[1].dim_value if dims else 0) or _inferred(file, output)


def _inferred(file: Path, output: str) -> int | None:
    """Return the length that follows from the graph's weights; None if it does not."""
    try:
        model = new_core().read_model(str(file))
        last = model.output(output).get_partial_shape()[1]
    except RuntimeError:  # OpenVINO's own; running the wrapped model will tell what is wrong
        return None
    return last.get_length() if last.is_static else None


def add(model: onnx.ModelProto, output: str, weights: NDArray[np.float32], bias: float) -> None:
    """Let an image tower return scores instead of embeddings, in place.

    Args:
        model: the image tower.
        output: its output with one embedding (n, features) per image.
        weights: float32 (features, classes): the classes' embeddings times the scale.
        bias: what is added to every score.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(weights, "classes/weights"))
    nodes = [
        ("Cast", [output], "classes/float32", {"to": TensorProto.FLOAT}),
        ("LpNormalization", ["classes/float32"], EMBEDDING, {"axis": 1, "p": 2}),
        ("MatMul", [EMBEDDING, "classes/weights"], LOGITS, {}),
    ]
    if bias:
        # One per class: NNCF corrects the biases of a quantised layer class by class.
        biases = np.full(weights.shape[1], bias, np.float32)
        graph.initializer.append(numpy_helper.from_array(biases, "classes/bias"))
        nodes[-1] = (*nodes[-1][:2], "classes/cosines", {})
        nodes.append(("Add", ["classes/cosines", "classes/bias"], LOGITS, {}))
    for kind, inputs, name, attributes in nodes:
        graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["n", weights.shape[1]])
    )
