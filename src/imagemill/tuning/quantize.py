"""int8 models by NNCF's post-training quantisation.

Constants are folded before quantising: the shape arithmetic around the weights of grouped
convolutions otherwise keeps all of them in fp32, 29 % of the time of resnext101_32x4d
(docs/performance.md). `kernels` shows what runs in int8.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.pipeline.backends import openvino_rewrites
from imagemill.system import files
from imagemill.system.openvino_library import load_openvino

_LAYERS: Final = ("Convolution", "GroupConvolution", "MatMul")
_FQ_INPUTS: Final = 5
_GROUP_CHANNELS: Final = 16
"""Narrower groups are merged up to this many channels: resnext101_32x4d begins with groups of 4 and
8, which ran at 82 and 185 Gop/s a core where groups of 16 make 485; merged they take 2/3 and 6/7 of
the time, 1.7 % of the whole network (2026-11-22).
"""
_STEPS_TO_FQ: Final = 4
"""NNCF may put a quantiser above a pooling, reshaping or transposing layer instead of right before
the convolution.
"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to quantise."""

    preset: str = "performance"
    """`performance`: symmetric everywhere; `mixed`: asymmetric activations."""
    ignored: tuple[str, ...] = ()
    """Layers, by name, that stay in fp32."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one layer ran as."""

    layer: str
    type: str
    """`Convolution`, `GroupConvolution`, …"""
    kernel: str
    """OpenVINO's name for it, `brgconv_avx512_I8`; ends in the precision, for the first layer in
    lower case with AMX.
    """


def _libraries() -> tuple[Any, Any]:
    """Import OpenVINO and NNCF with telemetry off: both would otherwise send events when imported,
    and NNCF for each call.
    """
    openvino = load_openvino()
    import nncf

    nncf.set_log_level(logging.ERROR)
    return openvino, nncf


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a variant; nothing is imported for it."""
    found = {}
    for name in ("openvino", "nncf"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def key(model_sha256: str, calibration: str, scheme: Scheme) -> str:
    """Name a variant by what decides it: the model, the calibration set's identity, the scheme, and
    the libraries' versions.
    """
    values = [
        model_sha256,
        calibration,
        scheme.preset,
        list(scheme.ignored),
        _GROUP_CHANNELS,
        sorted(versions().items()),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def quantize(
    model_file: Path,
    pixels: Iterable[NDArray[np.uint8]],
    subset_size: int,
    *,
    preset: str = "performance",
    ignored: Sequence[str] = (),
) -> Any:
    """Quantise a model to int8.

    Args:
        model_file: ONNX; uint8 (n, H, W, 3) goes in, normalisation included.
        pixels: calibration images, uint8 (1, H, W, 3) each; walked over more than once.
        subset_size: how many of them to use at most.
        preset: `performance` or `mixed`.
        ignored: names of layers to leave in fp32.

    Returns:
        an `openvino.Model` with the same input and outputs; the batch is open.

    Raises:
        ModelError: there is no image, or the model cannot be read or quantised.
    """
    ov, nncf = _libraries()
    items = list(pixels)[:subset_size]
    if not items:
        raise ModelError(
            f"{model_file} cannot be quantised without images to calibrate on. Give a source that"
            " holds readable images."
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars there
            model = ov.convert_model(str(model_file), input=list(items[0].shape))
            name = next(iter(model.input(0).get_names()))
            quantised = nncf.quantize(
                model,
                nncf.Dataset(items),
                subset_size=len(items),
                preset=nncf.QuantizationPreset(preset),
                ignored_scope=nncf.IgnoredScope(names=list(ignored)) if ignored else None,
            )
        openvino_rewrites.merge(ov, quantised, _GROUP_CHANNELS, "i8")
        quantised.reshape({name: [-1, *items[0].shape[1:]]})
    except Exception as error:  # NNCF raises whatever it meets
        raise ModelError(
            f"{model_file} cannot be quantised: {type(error).__name__}:"
            f" {str(error).strip().splitlines()[-1:]}"
        ) from error
    return quantised


def save(model: Any, folder: Path, name: str) -> Path:
    """Write a model as `name.xml` and `name.bin`; each appears whole, the .xml last. Returns the
    path of the .xml.

    Raises:
        ModelError: the folder cannot be written.
    """
    ov = load_openvino()
    target = folder / f"{name}.xml"
    temporary = folder / f".{name}.{os.getpid()}.tmp.xml"
    try:
        ov.save_model(model, str(temporary), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            written = temporary.with_suffix(suffix)
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(target.with_suffix(suffix))
        files.sync_folder(folder)
    except (OSError, RuntimeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
        )
        raise ModelError(
            f"{target} cannot be written: {reason}. Make room or rights there, or use --precision"
            " fp32."
        ) from error
    finally:
        for suffix in (".bin", ".xml"):
            with contextlib.suppress(OSError):
                temporary.with_suffix(suffix).unlink(missing_ok=True)
    return target


def kernels(model: Path | Any, batch_size: int = 1) -> tuple[Kernel, ...]:
    """Run a model once and tell which kernel each convolution ran as.

    Args:
        model: a file or an `openvino.Model` (which is left with a fixed batch).
        batch_size: images in the run.
    """
    ov = load_openvino()
    core = ov.Core()
    found = core.read_model(str(model)) if isinstance(model, Path) else model
    entry = found.input(0)
    shape = [batch_size, *(int(side.get_length()) for side in list(entry.get_partial_shape())[1:])]
    found.reshape({next(iter(entry.get_names())): shape})
    request = core.compile_model(
        found, "CPU", {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    ).create_infer_request()
    request.infer([np.zeros(shape, np.uint8)])
    return tuple(
        Kernel(item.node_name, item.node_type, item.exec_type)
        for item in request.profiling_info
        if item.node_type.endswith("Convolution")
    )


def sensitivities(
    model_file: Path, quantised_file: Path, pixels: Sequence[NDArray[np.uint8]]
) -> list[tuple[str, float]]:
    """Rank layers by how much of their input the quantiser before them destroys, the worst first.

    Of every channel the quantiser's error is set against the channel's own power, and the mean over
    the channels is taken: one loud channel that makes the step too coarse for all the others shows,
    though it hides them in the sum.

    Args:
        model_file: the model in fp32.
        quantised_file: what `quantize` made of it.
        pixels: a few images, uint8 (1, H, W, 3) each.

    Returns:
        name and mean noise-to-signal ratio, of the layers whose input is quantised.
    """
    ov = load_openvino()
    core = ov.Core()
    model = ov.convert_model(str(model_file), input=list(pixels[0].shape))
    here = {node.get_friendly_name(): node for node in model.get_ops()}
    measured: list[tuple[str, Any, list[Any]]] = []
    for node in core.read_model(str(quantised_file)).get_ordered_ops():
        if node.get_type_name() not in _LAYERS or (found := _quantiser_of(node)) is None:
            continue
        source = found.input(0).get_source_output()
        twin = here.get(source.get_node().get_friendly_name())
        constants = [
            found.input(place).get_source_output().get_node() for place in range(1, _FQ_INPUTS)
        ]
        if (
            twin is not None
            and twin.get_output_size() == 1
            and all(node.get_type_name() == "Constant" for node in constants)
        ):
            levels = int(found.get_attributes()["levels"])
            measured.append(
                (
                    node.get_friendly_name(),
                    twin,
                    [levels, *(constant.data for constant in constants)],
                )
            )
    # One output a tensor, though several layers may read it.
    tensors = {twin.get_friendly_name(): twin for _, twin, _ in measured}
    probe = ov.Model(
        [ov.opset13.result(twin.output(0)) for twin in tensors.values()],
        model.get_parameters(),
        "probe",
    )
    compiled = core.compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    sums = {name: 0.0 for name, _, _ in measured}
    for item in pixels:
        outputs = compiled(item)
        values = {name: outputs[place] for place, name in enumerate(tensors)}
        for name, twin, ranges in measured:
            sums[name] += _noise(values[twin.get_friendly_name()], ranges)
    return sorted(
        ((name, total / len(pixels)) for name, total in sums.items()), key=lambda pair: -pair[1]
    )


def feeders(model_file: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Name the layers whose results reach the named ones without passing another layer.

    Keeping a layer in fp32 may not be enough: the one that computes its loud channel may lose the
    quiet ones by itself.
    """
    model = load_openvino().Core().read_model(str(model_file))
    wanted = set(names)
    coming = [
        node.input(0).get_source_output().get_node()
        for node in model.get_ops()
        if node.get_friendly_name() in wanted
    ]
    found, seen = [], set()
    while coming:
        node = coming.pop()
        if (name := node.get_friendly_name()) in seen:
            continue
        seen.add(name)
        if node.get_type_name() in _LAYERS:
            found.append(name)
        else:
            coming += [port.get_source_output().get_node() for port in node.inputs()]
    return tuple(sorted(set(found) - wanted))


def _quantiser_of(node: Any) -> Any | None:
    """The FakeQuantize that a layer's first input comes from, or None."""
    for _ in range(_STEPS_TO_FQ):
        node = node.input(0).get_source_output().get_node()
        if node.get_type_name() == "FakeQuantize":
            return node
        if node.get_type_name() in ("Parameter", "Constant", *_LAYERS):
            return None
    return None


def _noise(values: NDArray[Any], ranges: Sequence[Any]) -> float:
    """Mean over channels (axis 1) of the quantisation error's power by the channel's; FakeQuantize
    as OpenVINO defines it.
    """
    levels, low, high, out_low, out_high = ranges
    x = values.astype(np.float64)
    steps = np.round((np.clip(x, low, high) - low) / np.maximum(high - low, 1e-30) * (levels - 1))
    error = steps / (levels - 1) * (out_high - out_low) + out_low - x
    axes = tuple(axis for axis in range(x.ndim) if axis != 1) if x.ndim > 1 else ()
    power = (x**2).sum(axis=axes)
    heard = power > 0
    return float(((error**2).sum(axis=axes)[heard] / power[heard]).mean()) if heard.any() else 0.0
