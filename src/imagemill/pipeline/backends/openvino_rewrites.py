"""Grouped convolutions whose groups are narrower than a processor's units: merged, with zeros
between them.

A kernel computes 16 output channels at a time, wanted or not, and AMX multiplies rows of 32
bfloat16 values. Merged groups take 2 to 8 times the multiplications, and less time
(docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

import numpy as np

from imagemill.records import Precision


def wanted(precision: Precision, flags: Container[str]) -> int:
    """Up to how many channels a CPU session merges groups before compiling; 0: not at all.

    In bf16 with AMX it gains a tenth of resnext101_32x4d's images/s; without AMX nothing in bf16,
    and nothing in fp32. int8 variants come merged as they are.
    """
    return 32 if precision is Precision.BF16 and "amx_bf16" in flags else 0


def merge(ov: Any, model: Any, channels: int, element_type: Literal["f32", "i8"]) -> int:
    """Merge narrow groups of grouped convolutions, in place. int8 answers keep every bit; in bf16
    sums may be rounded in another order.

    Args:
        ov: the openvino module.
        model: an `openvino.Model`. Depthwise convolutions are left alone: they have kernels of
        their own.
        channels: up to how many a group is merged.
        element_type: of the weights that are meant: `f32`, constants; `i8`, constants that are
            converted and scaled. In a quantised model those that stayed in fp32 are left alone.

    Returns:
        how many layers were changed.
    """
    changed = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupConvolution":
            continue
        source = node.input(1).get_source_output().get_node()
        groups, outputs, inputs, *kernel = (int(side) for side in source.output(0).get_shape())
        together = channels // max(inputs, outputs)
        if inputs == 1 or together <= 1 or groups % together:
            continue
        if (found := _weights(source, element_type)) is None:
            continue
        narrow, scales = found
        wide = np.zeros(
            (groups // together, together, outputs, together, inputs, *kernel), narrow.dtype
        )
        for place in range(together):
            wide[:, place, :, place] = narrow.reshape(
                groups // together, together, outputs, inputs, *kernel
            )[:, place]
        shape = (groups // together, together * outputs, together * inputs, *kernel)
        weights = ov.opset13.constant(wide.reshape(shape))
        if scales is not None:
            factors = ov.opset13.constant(
                scales.reshape(shape[0], shape[1], 1, *(1 for _ in kernel))
            )
            weights = ov.opset13.multiply(ov.opset13.convert(weights, "f32"), factors)
        node.input(1).replace_source_output(weights.output(0))
        changed += 1
    if changed:
        model.validate_nodes_and_infer_types()
    return changed


def _weights(node: Any, element_type: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The weights, and for int8 ones the scale of each output channel; None where they are not of
    that type and form.
    """
    scales = None
    groups, outputs = node.output(0).get_shape()[:2]
    if element_type == "i8":
        if node.get_type_name() != "Multiply":
            return None
        node, scale = (node.input(place).get_source_output().get_node() for place in (0, 1))
        if node.get_type_name() != "Convert" or scale.get_type_name() != "Constant":
            return None
        node, scales = node.input(0).get_source_output().get_node(), np.asarray(scale.data)
        if scales.size != groups * outputs:
            return None
    if (
        node.get_type_name() != "Constant"
        or node.get_element_type().get_type_name() != element_type
    ):
        return None
    return np.asarray(node.data), scales
