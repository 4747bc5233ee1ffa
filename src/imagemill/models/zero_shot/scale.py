"""The two trained numbers between a cosine and a score: `logit_scale` and, of SigLIP, `logit_bias`.

    score = scale * cosine + bias

They belong to neither tower, so they are in neither tower's ONNX file. A repository has them in its
safetensors, where the scale is stored as a logarithm, or in the ONNX file of both towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from msgspec import Struct

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models.custom.outputs import constants, producers

if TYPE_CHECKING:
    import onnx

PUBLISHED_SCALE: Final = 100.0
"""Of every CLIP that OpenAI published: training stopped it there."""
_LARGEST: Final = 1e4
"""Scales and biases of published models lie between 10 and 130, and between -20 and 0."""
_SCORES: Final = ("logits_per_image", "logits_per_text")
"""Outputs of an ONNX file of both towers."""
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_UNCHANGED: Final = ("Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that leave a single number, or the order of the scores' arithmetic, as it is."""


class Scale(Struct, frozen=True):
    """Scale and bias of the scores, and where they came from."""

    scale: float
    bias: float
    origin: str


def find(
    folder: Path, *, has_bias: bool, scale: float | None = None, bias: float | None = None
) -> Scale:
    """Return the scale and bias of a model folder.

    Args:
        folder: may hold safetensors, or ONNX files with both towers.
        has_bias: whether the model is one that has a bias.
        scale: what cosines are multiplied by, not its logarithm; used instead of the files'.
        bias: used instead of the files'.

    Raises:
        UsageError: a number that cannot be meant. ModelError: a file is damaged, or has a number
            that no trained model has, or the model needs a bias and no file has one.
    """
    if scale is not None or bias is not None:
        return _given(scale, bias, has_bias)
    for file in sorted(folder.glob("*.safetensors")):
        if found := _from_safetensors(file, has_bias):
            return found
    for file in both_towers(folder):
        if found := _from_onnx(file, has_bias):
            return found
    if has_bias:
        raise ModelError(
            f"{printable(folder)}: neither a safetensors file nor an ONNX file of both towers has"
            " logit_scale and logit_bias. Give them, as the model's page states them:"
            " --logit-scale N --logit-bias N."
        )
    return Scale(PUBLISHED_SCALE, 0.0, "no file has it; this is that of all published CLIP models")


def both_towers(folder: Path) -> list[Path]:
    """Return the ONNX files that may hold both towers, the smallest first."""
    files = [file for place in (folder / "onnx", folder) for file in place.glob("model*.onnx")]
    return sorted(files, key=lambda file: (file.stat().st_size, file.name))


def _given(scale: float | None, bias: float | None, has_bias: bool) -> Scale:
    if scale is None or (bias is None and has_bias):
        raise UsageError("Give --logit-scale and --logit-bias together: one depends on the other.")
    if bias is not None and not has_bias:
        raise UsageError("--logit-bias: only SigLIP models have one. Leave it out.")
    if not 0 < scale <= _LARGEST or not abs(bias or 0.0) <= _LARGEST:
        raise UsageError(
            f"--logit-scale {scale:g} --logit-bias {bias or 0.0:g}: a scale is above 0 and at most"
            f" {_LARGEST:g}, and so is the size of a bias."
        )
    return Scale(scale, bias or 0.0, "--logit-scale")


def _checked(file: Path, scale: float, bias: float, origin: str) -> Scale:
    if not 0 < scale <= _LARGEST or not abs(bias) <= _LARGEST:
        raise ModelError(
            f"{printable(file)}: logit_scale is {scale:g}, logit_bias is {bias:g}. No trained model"
            " has such numbers. Give the right ones with --logit-scale and --logit-bias."
        )
    return Scale(scale, bias, origin)


# ── safetensors ───────────────────────────────────────────────────────────────────────────────────


def _from_safetensors(file: Path, has_bias: bool) -> Scale | None:
    """Read the two numbers alone: some kilobytes of a file of gigabytes."""
    import ml_dtypes  # noqa: F401 - adds bfloat16 to NumPy
    from safetensors import SafetensorError, safe_open

    values = {}
    try:
        with safe_open(str(file), framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if (known := name.rpartition(".")[2]) in ("logit_scale", "logit_bias"):
                    values[known] = _number(opened, name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{printable(file)} cannot be read: {printable(error)}. Get it again, or give"
            " --logit-scale (and --logit-bias)."
        ) from error
    if "logit_scale" not in values or (has_bias and "logit_bias" not in values):
        return None
    scale = math.exp(min(values["logit_scale"], 100.0))  # beyond that, `_checked` refuses it
    bias = values["logit_bias"] if has_bias else 0.0
    return _checked(file, scale, bias, f"{file.name}: logit_scale")


def _number(opened: Any, name: str) -> float:
    """Return the number in an open safetensors file. Raises: ValueError."""
    part = opened.get_slice(name)
    if math.prod(part.get_shape()) != 1 or part.get_dtype() not in _FLOATS:
        raise ValueError(f"{name.rpartition('.')[2]} is not one floating-point number")
    return float(opened.get_tensor(name).astype(np.float64).item())


# ── ONNX ──────────────────────────────────────────────────────────────────────────────────────────


def _from_onnx(file: Path, has_bias: bool) -> Scale | None:
    """Read the two numbers from the last steps of a graph of both towers."""
    import onnx

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # protobuf's own
        raise ModelError(
            f"{printable(file)} is damaged or not ONNX: {printable(error)}. Get it again, or give"
            " --logit-scale (and --logit-bias)."
        ) from error
    output = next((value.name for value in graph.output if value.name in _SCORES), None)
    if output is None:
        return None
    made_by = producers(graph)
    weights = {
        name: tensor
        for name, tensor in constants(graph).items()
        if math.prod(tensor.dims) == 1 and not tensor.external_data
    }

    scale, bias = None, 0.0
    while (node := made_by.get(output)) is not None:
        if node.op_type in _UNCHANGED:
            output = node.input[0]
            continue
        if node.op_type not in ("Mul", "Add"):
            break
        values = [_constant(name, made_by, weights) for name in node.input]
        if (values[0] is None) == (values[1] is None):
            break
        value, output = (
            (values[0], node.input[1]) if values[0] is not None else (values[1], node.input[0])
        )
        assert value is not None
        if node.op_type == "Add":
            bias += value * (scale or 1.0)
        else:
            scale = value * (scale or 1.0)
    if scale is None or (has_bias and bias == 0.0):
        return None
    return _checked(file, scale, bias if has_bias else 0.0, f"{file.name}: the graph's last steps")


def _constant(
    name: str,
    made_by: Mapping[str, onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    depth: int = 0,
) -> float | None:
    """Return the single number that a tensor always is, or None."""
    from onnx import numpy_helper

    if name in weights:
        return float(numpy_helper.to_array(weights[name]).astype(np.float64).reshape(()))
    node = made_by.get(name)
    if node is None or depth > len(_UNCHANGED) + 2:
        return None
    if node.op_type == "Exp" or node.op_type in _UNCHANGED:
        value = _constant(node.input[0], made_by, weights, depth + 1)
        if value is None or node.op_type != "Exp":
            return value
        return math.exp(min(value, 100.0))
    return None
