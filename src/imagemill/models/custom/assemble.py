"""Make a custom graph the graph of a bundle.

    pixels uint8 (n, h, w, 3) → [grey | BGR] → float → [NCHW] → − mean → ÷ deviation → the custom
    graph → `logits` (n, classes), `embedding` (n, features)

The custom graph's tensors keep their names behind a prefix. Opset and IR version are kept. Nodes
that neither output depends on are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError, printable
from imagemill.models import bundle as bundles
from imagemill.models.architectures.graph import Nodes
from imagemill.models.card import Color, Layout
from imagemill.models.custom.graph import STANDARD_DOMAINS, Plan
from imagemill.models.custom.outputs import (
    Tokens,
    constant_tensors,
    constants,
    inner_graphs,
    live_nodes,
)
from imagemill.models.preprocessing import normalisation
from imagemill.records import Scores

if TYPE_CHECKING:
    import onnx

_PREFIX: Final = "onnx/"
_OURS: Final = "imagemill/"
_LUMA: Final = (19_595, 38_470, 7_471)
"""Weights of red, green and blue in Pillow's mode L, in 65,536ths."""


def assemble(model: onnx.ModelProto, plan: Plan) -> None:
    """Turn the custom model into the wrapped one, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    if plan.batch is not None:
        _open_batch(plan.file.name, graph, plan.batch)
    _keep_what_is_needed(model, plan)
    _pool_globally(graph, max(plan.recipe.height, plan.recipe.width))
    _rename(graph)
    for tensor in graph.initializer:
        if not tensor.raw_data and tensor.data_type != TensorProto.STRING:
            # as bundle.write counts and moves them
            array = _array(plan.file.name, tensor)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    opset = max(entry.version for entry in model.opset_import)
    builder = Nodes()
    _normalise(builder, plan, opset)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*builder.nodes, *nodes])
    builder.nodes.clear()
    outputs = _outputs(builder, plan, opset)
    graph.node.extend(builder.nodes)
    graph.initializer.extend(builder.weights)
    goal = _PREFIX + plan.input
    kept = [tensor for tensor in graph.input if tensor.name != goal]
    for field in (graph.input, graph.output, graph.value_info, graph.quantization_annotation):
        del field[:]
    shape = ["n", plan.recipe.height, plan.recipe.width, 3]
    graph.input.extend([helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape), *kept])
    graph.output.extend(
        helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", count])
        for output, count in outputs
    )
    others = [entry for entry in model.metadata_props if entry.key != bundles.DATA_SHA256]
    del model.metadata_props[:]
    model.metadata_props.extend(others)


def _normalise(builder: Nodes, plan: Plan, opset: int) -> None:
    """Add the nodes between `pixels` and the custom graph's input."""
    from onnx import TensorProto

    card, at = plan.card, "pixels"
    order = [2, 1, 0] if card.color is Color.BGR else [0, 1, 2]
    if plan.channels == 1:
        at = _grey(builder, at, opset)
        order = [0]
    elif card.color is Color.BGR:
        indices = builder.weight(_OURS + "bgr", np.array(order, np.int64))
        at = builder.node("Gather", [at, indices], _OURS + "reordered", axis=3)
    if not plan.takes_bytes and plan.channels == 3:
        at = builder.node("Cast", [at], _OURS + "floats", to=TensorProto.FLOAT)
    if card.layout is Layout.NCHW:
        at = builder.node("Transpose", [at], _OURS + "planes", perm=[0, 3, 1, 2])
    if not plan.takes_bytes:
        shape = (1, -1, 1, 1) if card.layout is Layout.NCHW else (1, 1, 1, -1)
        mean, std = (
            np.array([values[place] for place in order], np.float32).reshape(shape)
            for values in normalisation(card)
        )
        at = builder.node("Sub", [at, builder.weight(_OURS + "mean", mean)], _OURS + "centred")
        at = builder.node("Div", [at, builder.weight(_OURS + "std", std)], "normalised")
    builder.node("Cast", [at], _PREFIX + plan.input, to=plan.type)


def _grey(builder: Nodes, pixels: str, opset: int) -> str:
    """Add Pillow's conversion to mode L, (19595 R + 38470 G + 7471 B + 32768) >> 16.

    All numbers stay below 2**24, so int32 and float32 are exact. There is no Div of integers,
    because OpenVINO's CPU plugin rounds it. The remainder is subtracted first, so that the division
    is exact in bfloat16 too.
    """
    from onnx import TensorProto

    at = builder.node("Cast", [pixels], _OURS + "integers", to=TensorProto.INT32)
    luma = builder.weight(_OURS + "luma", np.array(_LUMA, np.int32))
    at = builder.node("Mul", [at, luma], _OURS + "weighted")
    if opset >= 13:  # before, the axes were an attribute
        axes = builder.weight(_OURS + "axes", np.array([3], np.int64))
        at = builder.node("ReduceSum", [at, axes], _OURS + "sum", keepdims=1)
    else:
        at = builder.node("ReduceSum", [at], _OURS + "sum", axes=[3], keepdims=1)
    half = builder.weight(_OURS + "half", np.array(2**15, np.int32))
    at = builder.node("Add", [at, half], _OURS + "rounded")
    if opset >= 10:
        unit = builder.weight(_OURS + "unit", np.array(2**16, np.int32))
        rest = builder.node("Mod", [at, unit], _OURS + "remainder")
        at = builder.node("Sub", [at, rest], _OURS + "multiple")
    at = builder.node("Cast", [at], _OURS + "wide", to=TensorProto.FLOAT)
    scale = builder.weight(_OURS + "share", np.array(2.0**-16, np.float32))
    at = builder.node("Mul", [at, scale], _OURS + "grey")
    return at if opset >= 10 else builder.node("Floor", [at], _OURS + "whole")


def _outputs(builder: Nodes, plan: Plan, opset: int) -> list[tuple[str, int | str]]:
    """Add the nodes between the custom graph and our outputs; return the outputs' names and
    lengths.
    """
    from onnx import TensorProto

    found: list[tuple[str, int | str]] = []
    if plan.head.tensor is not None:
        at = builder.node("Flatten", [_PREFIX + plan.head.tensor], _OURS + "logits", axis=1)
        if plan.two_classes:
            score = builder.node("Cast", [at], _OURS + "score", to=TensorProto.FLOAT)
            at = _two_classes(builder, score, plan)
        builder.node("Cast", [at], "logits", to=TensorProto.FLOAT)
        found.append(("logits", 2 if plan.two_classes else plan.head.classes or "classes"))
    if plan.features is not None:
        at = _PREFIX + plan.features.tensor
        if plan.features.tokens is Tokens.FIRST:
            first = builder.weight(_OURS + "first", np.array(0, np.int64))
            at = builder.node("Gather", [at, first], _OURS + "token", axis=1)
        elif plan.features.tokens is Tokens.MEAN:
            at = _mean_of_tokens(builder, at, opset)
        at = builder.node("Flatten", [at], _OURS + "embedding", axis=1)
        builder.node("Cast", [at], "embedding", to=TensorProto.FLOAT)
        found.append(("embedding", plan.features.features or "features"))
    return found


def _mean_of_tokens(builder: Nodes, tokens: str, opset: int) -> str:
    name = _OURS + "pooled"
    if opset >= 18:  # before, the axes were an attribute
        axes = builder.weight(_OURS + "tokens", np.array([1], np.int64))
        return builder.node("ReduceMean", [tokens, axes], name, keepdims=0)
    return builder.node("ReduceMean", [tokens], name, axes=[1], keepdims=0)


def _two_classes(builder: Nodes, score: str, plan: Plan) -> str:
    """Add [1 - p, p] for a probability, or [0, x] for a logit; its softmax is the same."""
    if plan.bundle_scores is Scores.LOGITS:
        zero = builder.weight(_OURS + "zero", np.array(0, np.float32))
        other = builder.node("Mul", [score, zero], _OURS + "other")
    else:
        one = builder.weight(_OURS + "one", np.array(1, np.float32))
        other = builder.node("Sub", [one, score], _OURS + "other")
    return builder.node("Concat", [other, score], _OURS + "both", axis=1)


def _keep_what_is_needed(model: onnx.ModelProto, plan: Plan) -> None:
    """Drop the nodes that neither output depends on, such as a ZipMap after the scores."""
    wanted = [item for item in (plan.head.tensor, plan.features and plan.features.tensor) if item]
    live = live_nodes(model.graph, wanted)
    if len(live) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(live)
    standard = [entry for entry in model.opset_import if entry.domain in STANDARD_DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(standard)


def _pool_globally(graph: onnx.GraphProto, side: int) -> None:
    """Turn average pools with a window larger than the image into global ones.

    transformers' EfficientNet ends in such a pool. OpenVINO does not take it.
    """
    for node in graph.node:
        if node.op_type != "AveragePool":
            continue
        values = {item.name: list(item.ints) for item in node.attribute}
        if min(values.get("kernel_shape") or [0]) >= side and not any(values.get("pads", ())):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]


def _rename(graph: onnx.GraphProto) -> None:
    """Put the prefix before every tensor's name, those of inner graphs included, so that none
    clashes with ours.
    """

    def prefixed(names: Any) -> list[str]:
        return [_PREFIX + name if name else name for name in names]

    for node in graph.node:
        for field in (node.input, node.output):
            names = prefixed(field)
            del field[:]
            field.extend(names)
        node.name = _PREFIX + node.name if node.name else node.name
        for inner in inner_graphs(node):
            _rename(inner)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = _PREFIX + value.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = _PREFIX + sparse.values.name


def _array(name: str, tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return a tensor's numbers. Raises: ModelError."""
    from onnx import numpy_helper

    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # onnx's and NumPy's own
        constant = printable(tensor.name.removeprefix(_PREFIX))
        raise ModelError(
            f"{name} is damaged: the constant {constant} has not the numbers that its shape"
            f" promises ({printable(error)}). Export it again."
        ) from error


def _open_batch(name: str, graph: onnx.GraphProto, batch: int) -> None:
    """Let reshapes to a fixed batch keep whatever batch comes; whether that was all, the check run
    tells.
    """
    from onnx import numpy_helper

    fixed, _ = constant_tensors(graph)
    known = constants(graph)
    for number, node in enumerate(graph.node):
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[0] in fixed:
            continue
        if node.input[1] not in known:
            continue
        shape = _array(name, known[node.input[1]]).copy()
        if shape.ndim == 1 and len(shape) > 1 and shape[0] == batch and 0 not in shape:
            shape[0] = 0  # as the input has it
            for place, attribute in reversed(list(enumerate(node.attribute))):
                if attribute.name == "allowzero":
                    del node.attribute[place]
            graph.initializer.append(numpy_helper.from_array(shape, f"{_OURS}opened{number}"))
            node.input[1] = f"{_OURS}opened{number}"
