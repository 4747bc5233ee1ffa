"""Narrow groups of grouped convolutions are merged, and answer as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from imagemill.models.architectures import resnet
from imagemill.pipeline.backends import open_session, openvino_rewrites
from imagemill.pipeline.backends.openvino import fold_constants
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Card, DeviceSpec, Precision, Recipe, SessionSpec
from imagemill.system import cpu
from imagemill.system.openvino_library import load_openvino, new_core
from imagemill.tuning import quantize

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 224, 224, 3), dtype=np.uint8)
NARROW = [(32, 4, 4), (32, 8, 8), (32, 16, 16), (32, 32, 32)]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ResNeXt with one block a stage, whose groups have 4, 8, 16 and 32 channels."""
    monkeypatch.setitem(resnet.BLOCKS, 14, (1, 1, 1, 1))
    built = resnet.ResNet(14, 32, 4)
    model = built.build(built.random(0), Recipe(), built.mean, built.std)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def shapes(model: Any) -> list[tuple[int, ...]]:
    """Groups, output and input channels of each grouped convolution."""
    return [
        tuple(node.input(1).get_shape()[:3])
        for node in model.get_ordered_ops()
        if node.get_type_name() == "GroupConvolution"
    ]


def logits(model: Any) -> NDArray[np.float32]:
    compiled = new_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(row[None])["logits"] for row in PIXELS[:3]])


@pytest.mark.process
def test_int8_answers_keep_every_bit(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 and 8 channels become groups of 16 when a model is quantised."""
    wide = quantize.quantize(network, [row[None] for row in PIXELS[:3]])
    with monkeypatch.context() as patched:
        patched.setattr(openvino_rewrites, "merge", lambda *_: 0)
        narrow = quantize.quantize(network, [row[None] for row in PIXELS[:3]])
    assert shapes(narrow) == NARROW
    assert shapes(wide) == [(8, 16, 16), (16, 16, 16), (32, 16, 16), (32, 32, 32)]
    np.testing.assert_array_equal(logits(narrow), logits(wide))


@pytest.mark.process
def test_fp32_answers_stay_what_they_are(network: Path) -> None:
    ov = load_openvino()
    model = new_core().read_model(network)
    before = logits(model)
    assert openvino_rewrites.merge(ov, model, 32, "f32") == 0, (
        "weights behind arithmetic are left alone"
    )
    fold_constants(model)
    assert openvino_rewrites.merge(ov, model, 32, "f32") == 3
    assert shapes(model) == [(4, 32, 32), (8, 32, 32), (16, 32, 32), (32, 32, 32)]
    assert openvino_rewrites.merge(ov, model, 32, "f32") == 0
    np.testing.assert_allclose(
        logits(model), before, rtol=1e-4, atol=1e-4 * float(np.abs(before).max())
    )


def test_depthwise_and_odd_groups_are_left_alone() -> None:
    """A group of one channel has kernels of its own; 3 groups cannot be halved."""
    ov = load_openvino()
    ops = ov.opset13
    entry = ops.parameter([1, 12, 8, 8], np.float32)
    one = ops.constant(np.ones((12, 1, 1, 3, 3), np.float32))
    three = ops.constant(np.ones((3, 4, 4, 3, 3), np.float32))
    at = entry
    for weights in (one, three):
        at = ops.group_convolution(at, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    model = ov.Model([at], [entry])
    assert openvino_rewrites.merge(ov, model, 8, "f32") == 0
    assert shapes(model) == [(12, 1, 1), (3, 4, 4)]


@pytest.mark.parametrize(
    ("precision", "flags", "channels"),
    [
        (Precision.BF16, {"amx_bf16", "avx512_bf16"}, 32),
        (Precision.BF16, {"avx512_bf16"}, 0),
        (Precision.FP32, {"amx_bf16"}, 0),
        (Precision.INT8, {"amx_bf16"}, 0),
    ],
)
def test_groups_are_merged_where_that_gains(
    precision: Precision, flags: set[str], channels: int
) -> None:
    assert openvino_rewrites.wanted(precision, flags) == channels


@pytest.mark.process
@pytest.mark.parametrize("flags", [set(), {"amx_bf16"}], ids=["as it is", "merged"])
def test_bf16_answers_are_alike_in_any_batch(
    network: Path, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged as for AMX, on whatever processor this is: bit for bit the same alone, beside others
    and in a part of a batch.

    (Where the processor knows no bfloat16, OpenVINO computes in fp32.)
    """
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    merged: list[int] = []
    monkeypatch.setattr(openvino_rewrites, "merge", noting(openvino_rewrites.merge, merged))
    labels = tuple(map(str, range(1000)))
    card = Card(
        "narrow", "resnext", labels, Recipe(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "", "-", {}
    )

    def answers(batch_size: int) -> NDArray[np.float32]:
        spec = SessionSpec(str(network), card, Precision.BF16, batch_size)
        opened = open_session(spec, DeviceSpec("cpu#0", "cpu", "openvino", (0,)), Stopwatch())
        batches = []
        for start in range(0, 12, batch_size):
            pixels = np.zeros((batch_size, 224, 224, 3), np.uint8)
            filled = min(batch_size, 12 - start)
            pixels[:filled] = PIXELS[start : start + filled]
            batches.append(Batch(pixels, filled, ()))
        return np.concatenate([outputs.logits for _, outputs in opened.stream(batches)])

    alone = answers(1)
    np.testing.assert_array_equal(alone, answers(4))
    np.testing.assert_array_equal(alone, answers(5))
    assert merged == ([3, 3, 3] if flags else [])


def noting(call: Callable[..., int], noted: list[int]) -> Callable[..., int]:
    def noted_call(*arguments: Any) -> int:
        noted.append(call(*arguments))
        return noted[-1]

    return noted_call
