"""Small ONNX files, made as they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def silent(_: str) -> None:
    """Say nothing."""


def small(
    *,
    shape: tuple[Any, ...] = ("n", 3, 8, 8),
    kind: int = TensorProto.FLOAT,
    classes: int = 3,
    nodes: list[Any] | None = None,
    outputs: dict[str, list[Any]] | None = None,
    inputs: tuple[str, ...] = ("x",),
    opset: list[Any] | None = None,
    mean: float | None = None,
) -> onnx.ModelProto:
    """A classifier of one matrix over the mean colour, whose tensors have the names that ours have;
    `nodes` stand after it.
    """
    nchw = shape[1] in (1, 3)
    width = 1 if 1 in (shape[1], shape[-1]) and 3 not in (shape[1], shape[-1]) else 3
    values = (
        np.random.default_rng(0).normal(size=(width, classes))
        if mean is None
        else np.full((width, classes), mean)
    )
    weight = numpy_helper.from_array(values.astype(np.float32), "mean")
    axes = [2, 3] if nchw else [1, 2]
    body = [
        helper.make_node("Cast", [inputs[0]], ["std"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["std"], ["pixels"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["pixels", "mean"], ["normalised"]),
        *(nodes or [helper.make_node("Identity", ["normalised"], ["embedding"])]),
    ]
    entries = [helper.make_tensor_value_info(name, kind, shape) for name in inputs]
    exits = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (outputs or {"embedding": ["n", classes]}).items()
    ]
    graph = helper.make_graph(body, "small", entries, exits, [weight])
    return helper.make_model(
        graph, opset_imports=opset or [helper.make_opsetid("", 13)], ir_version=8
    )


def complete(file: Path, **given: Any) -> dict[str, Any]:
    """Return what `wrap` is given, with plain values for what `run` wants to know."""
    kind = onnx.load(str(file), load_external_data=False).graph.input[0].type.tensor_type.elem_type
    plain: dict[str, Any] = {} if given.get("crop") == "none" else {"resize": "none"}
    if kind != TensorProto.UINT8:
        plain |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return plain | given


def saved(model: onnx.ModelProto, folder: Path, name: str = "small.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name


def head(
    *nodes: Any, outputs: dict[str, list[Any]] | None = None, **changes: Any
) -> onnx.ModelProto:
    """A classifier whose last nodes make `y` of `normalised`."""
    return small(nodes=list(nodes), outputs=outputs or {"y": ["n", 3]}, **changes)


def turned(kind: str, **attributes: Any) -> Any:
    """A last node of one kind."""
    return helper.make_node(kind, ["normalised"], ["y"], **attributes)
