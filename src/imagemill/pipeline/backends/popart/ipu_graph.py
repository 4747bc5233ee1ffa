"""A bundle's graph as PopART wants it: cut where normalisation ends, of one batch size, with the
wanted outputs alone.

    pixels ─ Cast, Transpose, Sub, Div ─► normalised ═╪═► normalised ─ Conv … Gemm ─► logits
                  on the host, as a table             cut        what the IPU computes

What lies before the cut turns each byte into one number that depends on its channel alone. So the
host needs no arithmetic but a table of 3 × 256 numbers, made here by running that very piece of the
graph: the same numbers as everywhere else, bit for bit, before they are rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.records import Card

if TYPE_CHECKING:
    import onnx

OPSETS: Final = range(6, 12)
"""What PopART 3.4 reads."""
IR_VERSION: Final = 6
"""The newest that it reads."""


class Cut(Struct, frozen=True):
    """The graph behind the cut, and what stands in for the graph before it."""

    model: bytes
    """A whole ONNX file: one float32 input, (batch, 3, height, width) or (batch, height, width, 3),
    and the wanted outputs in their order.
    """
    opset: int
    convolutions: tuple[str, ...]
    """Names of the outputs of all convolutions."""
    channels_last: bool
    """Whether the input is (batch, height, width, 3)."""
    order: tuple[int, int, int]
    """The input's channel k is made of this one of R, G and B."""
    table: NDArray[np.float32]
    """float32 (3, 256): what a byte of the input's channel k becomes."""


def cut(model_file: Path, card: Card, batch_size: int, outputs: Sequence[str]) -> Cut:
    """Read a bundle's model and cut it.

    Args:
        model_file: a bundle's `model.onnx`.
        card: its card; names the tensor where normalisation ends.
        batch_size: to which the batch is fixed.
        outputs: names of the wanted outputs, as `names_of_outputs` returns them.

    Raises:
        ModelError: PopART cannot read such a model, or its normalisation is not one that the host
        can do.
    """
    import onnx
    from onnx import TensorProto, helper, shape_inference

    remedy = "Use --devices cpu."
    if card.normalised is None:
        raise ModelError(
            f"{card.name} cannot run on an IPU: its card names no tensor where normalisation ends"
            f" (`normalised`). {remedy}"
        )
    try:
        model = onnx.load(str(model_file), load_external_data=False)
    except Exception as error:  # protobuf's classes share no public base
        raise ModelError(
            f"{model_file} cannot be read: {str(error).strip() or type(error).__name__}"
        ) from error
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ModelError(
            f"{card.name} cannot run on an IPU: PopART reads models of up to 2 GiB, and its weights"
            f" are more. {remedy}"
        )
    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0
    )
    before = _between(model.graph, card.input, [card.normalised], card.name)
    after = _between(model.graph, card.normalised, outputs, card.name)
    others = sorted({node.domain for node in after if node.domain not in ("", "ai.onnx")})
    if opset not in OPSETS or others or model.functions or model.graph.sparse_initializer:
        what = f"operators of {', '.join(others)}" if others else f"opset {opset}"
        raise ModelError(
            f"{card.name} cannot run on an IPU: it has {what}, PopART reads opset {OPSETS[0]} to"
            f" {OPSETS[-1]}. Export it again with opset {OPSETS[-1]}, or use --devices cpu."
        )
    height, width = card.recipe.height, card.recipe.width
    pixels = helper.make_tensor_value_info(card.input, TensorProto.UINT8, ["n", height, width, 3])
    channels_last, order, table = _table(
        _model(model, before, pixels, [card.normalised], None), card
    )
    shape = [batch_size, height, width, 3] if channels_last else [batch_size, 3, height, width]
    small = _model(
        model,
        after,
        helper.make_tensor_value_info(card.normalised, TensorProto.FLOAT, shape),
        outputs,
        batch_size,
    )
    # A cast to float32 of what is float32 would stay one when all else becomes float16.
    if casts := [
        node
        for node in small.graph.node
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT
    ]:
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in shape_inference.infer_shapes(small).graph.value_info
        }
        types[card.normalised] = TensorProto.FLOAT
        for node in casts:
            if types.get(node.input[0]) == TensorProto.FLOAT:
                node.op_type = "Identity"
                del node.attribute[:]
    convolutions = tuple(node.output[0] for node in after if node.op_type == "Conv")
    return Cut(small.SerializeToString(), opset, convolutions, channels_last, order, table)


def _between(
    graph: onnx.GraphProto, start: str, ends: Sequence[str], name: str
) -> list[onnx.NodeProto]:
    """The nodes that make `ends` of `start`, in the graph's order. Raises: ModelError where other
    inputs are needed for it.
    """
    makers = {output: node for node in graph.node for output in node.output}
    weights = {
        tensor.name
        for tensor in (*graph.initializer, *(value.values for value in graph.sparse_initializer))
    }
    wanted, seen = list(ends), {start}
    while wanted:
        tensor = wanted.pop()
        if tensor in seen or tensor in weights or not tensor:
            continue
        seen.add(tensor)
        if tensor not in makers:
            raise ModelError(
                f"{name} cannot run on an IPU: its {', '.join(ends)} cannot be had from {start!r}"
                " alone. Use --devices cpu."
            )
        wanted += makers[tensor].input
    return [node for node in graph.node if seen.intersection(node.output) - {start}]


def _model(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    start: onnx.ValueInfoProto,
    ends: Sequence[str],
    batch_size: int | None,
) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    used = {name for node in nodes for name in node.input}
    declared = {value.name: value for value in model.graph.output}
    outputs = []
    for name in ends:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        if name in declared:
            value.CopyFrom(declared[name])
            if batch_size is not None:
                value.type.tensor_type.shape.dim[0].dim_value = batch_size
        outputs.append(value)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, model.graph.name or "model", [start], outputs, weights)
    opsets = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return helper.make_model(
        graph, producer_name="imagemill", ir_version=IR_VERSION, opset_imports=opsets
    )


def _table(
    head: onnx.ModelProto, card: Card
) -> tuple[bool, tuple[int, int, int], NDArray[np.float32]]:
    """Find out what the graph before the cut does to bytes, by running it. Returns: see `Cut`."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(head)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        (values,) = evaluator.run(None, {card.input: pixels})
        return np.asarray(values, np.float32)

    height, width = card.recipe.height, card.recipe.width
    count = -(-256 // (height * width))
    every_byte = np.resize(np.arange(256, dtype=np.uint8), (count, height, width))
    black = np.zeros((count, height, width, 3), np.uint8)
    dark = run(black)
    channels_last = dark.shape == black.shape
    axis = 3 if channels_last else 1
    order, table = [0, 0, 0], np.zeros((3, 256), np.float32)
    for colour in range(3):
        pixels = black.copy()
        pixels[..., colour] = every_byte
        values = run(pixels)
        for channel in range(3):
            made = values.take(channel, axis)
            if (made != dark.take(channel, axis)).any():
                order[channel] = colour
                table[channel] = made.reshape(-1)[:256]
    noise = np.random.default_rng(0).integers(0, 256, black.shape, np.uint8)
    expected = np.stack([table[channel][noise[..., order[channel]]] for channel in range(3)], axis)
    found = run(noise)
    if found.shape != expected.shape or (found != expected).any():
        raise ModelError(
            f"{card.name} cannot run on an IPU: {card.normalised!r}, where its normalisation ends,"
            " is not made of each byte by itself. Use --devices cpu."
        )
    return channels_last, (order[0], order[1], order[2]), table
