"""Grouped convolutions whose groups are narrower than a processor's units: merged, with zeros between them.

A kernel computes 16 output channels at a time, wanted or not, and AMX multiplies rows of 32 bfloat16 values. Merged groups take 2 to 8
times the multiplications, and less time (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def merge(ov: Any, model: Any, channels: int) -> int:
    """Merge narrow groups of grouped convolutions, in place. int8 answers keep every bit; in bf16 sums may be rounded in another order.

    Args:
        ov: the openvino module.
        model: an `openvino.Model`; its grouped convolutions' weights are constants, or int8 constants that are converted and scaled.
            Others are left alone, and so are depthwise ones, which have kernels of their own.
        channels: up to how many a group is merged.

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
        if (found := _weights(source)) is None:
            continue
        narrow, scales = found
        wide = np.zeros((groups // together, together, outputs, together, inputs, *kernel), narrow.dtype)
        for place in range(together):
            wide[:, place, :, place] = narrow.reshape(groups // together, together, outputs, inputs, *kernel)[:, place]
        shape = (groups // together, together * outputs, together * inputs, *kernel)
        weights = ov.opset13.constant(wide.reshape(shape))
        if scales is not None:
            factors = ov.opset13.constant(scales.reshape(shape[0], shape[1], 1, *(1 for _ in kernel)))
            weights = ov.opset13.multiply(ov.opset13.convert(weights, "f32"), factors)
        node.input(1).replace_source_output(weights.output(0))
        changed += 1
    if changed:
        model.validate_nodes_and_infer_types()
    return changed


def _weights(node: Any) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The weights, and for int8 ones the scale of each output channel; None where they are neither of the two known forms."""
    if node.get_type_name() == "Constant":
        return np.asarray(node.data), None
    if node.get_type_name() != "Multiply":
        return None
    converted, scale = (node.input(place).get_source_output().get_node() for place in (0, 1))
    if converted.get_type_name() != "Convert" or scale.get_type_name() != "Constant":
        return None
    constant = converted.input(0).get_source_output().get_node()
    groups, outputs = node.output(0).get_shape()[:2]
    scales = np.asarray(scale.data)
    if constant.get_type_name() != "Constant" or scales.size != groups * outputs:
        return None
    return np.asarray(constant.data), scales
