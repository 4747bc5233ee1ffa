"""A small random classifier, and a record of a finished run, for tests to share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

import helpers
from imagemill.records import Card, Recipe

CLASSES = 10


SIZE = 32


LABELS = (
    "tench",
    "hen",
    "cock",
    "Über, das",
    'a "quoted" name',
    "line\u2028separator",
    "dog",
    "cat",
    "crème brûlée",
    "last",
)


def tiny_model(
    seed: int = 0,
    spoil: str | None = None,
    *,
    height: int = SIZE,
    width: int = SIZE,
    has_head: bool = True,
) -> onnx.ModelProto:
    """A random classifier: uint8 (n, 32, 32, 3) → logits (n, 10) and embedding (n, 32). `spoil`
    puts a NaN where white images meet it, or, if it is "everything", where every image does.
    Height and width may be other multiples of 32. Without a head the embedding is all.
    """
    features = 16 * (height // 32) * (width // 16)
    rng = np.random.default_rng(seed)

    def constant(name: str, array: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(array), name)

    def weights(*shape: int) -> Any:
        return rng.normal(0, 1.6 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)

    nodes = [
        helper.make_node("Cast", ["pixels"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["normalised"]),
        helper.make_node(
            "Conv",
            ["normalised", "w1", "b1"],
            ["c1"],
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("Clip", ["c1", "low", "high"], ["r1"]),
        helper.make_node(
            "Conv",
            ["r1", "w2", "b2"],
            ["c2"],
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("AveragePool", ["c2"], ["pooled"], kernel_shape=[8, 4], strides=[8, 4]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node(
            "Gemm", ["embedding", "w3", "b3"], ["raw" if spoil else "logits"], transB=1
        ),
    ]
    constants = [
        constant("mean", np.float32([123.0, 117.0, 104.0]).reshape(1, 3, 1, 1)),
        constant("scale", np.float32([1 / 58.0] * 3).reshape(1, 3, 1, 1)),
        *(
            constant(*item)
            for item in (
                ("w1", weights(8, 3, 3, 3)),
                ("b1", 0.1 * weights(8)),
                ("w2", weights(16, 8, 3, 3)),
                ("b2", 0.1 * weights(16)),
            )
        ),
        *(constant(*item) for item in (("low", np.float32(-1)), ("high", np.float32(1)))),
        *(
            constant(*item)
            for item in (("w3", 3 * weights(CLASSES, features)), ("b3", weights(CLASSES, 1)[:, 0]))
        ),
    ]
    if spoil:  # log of a negative number where the whole image is white, 2.42 on average
        nodes += [
            helper.make_node("ReduceMean", ["normalised"], ["level"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Sub", ["limit", "level"], ["below"]),
            helper.make_node("Log", ["below"], ["log"]),
            helper.make_node("Mul", ["log", "zero"], ["nothing"]),
            helper.make_node("Unsqueeze", ["nothing"], ["column"], axes=[1]),
            helper.make_node("Add", ["raw", "column"], ["logits"]),
        ]
        constants += [
            constant("limit", np.float32([2.411 if spoil == "white" else -9])),
            constant("zero", np.float32([0.0])),
        ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", features]),
    ]
    if not has_head:
        del nodes[-1], outputs[0], constants[-2:]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", height, width, 3])],
        outputs,
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    onnx.checker.check_model(model)
    return model


TINY_CARD = Card(
    name="tiny",
    architecture="tiny",
    labels=LABELS,
    recipe=Recipe(SIZE, SIZE, 36),
    mean=(123.0, 117.0, 104.0),
    std=(58.0, 58.0, 58.0),
    sha256="",
    licence="Apache-2.0",
    origin={"source": "file", "file": "tiny", "sha256": "0" * 64, "verified": False},
    parameters=3_000,
    normalised="normalised",
)


WIDE_CARD = replace(
    TINY_CARD,
    name="wide",
    recipe=Recipe(SIZE, 2 * SIZE, (2 * SIZE, SIZE), pad=True, fill="#ffffff"),
)
"""Of `tiny_model(width=64)`: twice as wide as high, letterbox."""
HEADLESS_CARD = replace(TINY_CARD, name="headless", labels=(), outputs=("embedding",))
"""Of `tiny_model(has_head=False)`."""


@dataclass(frozen=True)
class Finished:
    """A finished run of the command line."""

    result: helpers.Result
    output: Path
