"""int8 models by NNCF's post-training quantisation.

Constants are folded before quantising: the shape arithmetic around the weights of grouped
convolutions otherwise keeps all of them in fp32, 29 % of the time of resnext101_32x4d
(docs/performance.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.models import variants
from imagemill.pipeline.backends import installed_versions, openvino_rewrites
from imagemill.records import Precision
from imagemill.system import cpu, files
from imagemill.system.openvino_library import load_openvino

INSTALL: Final = "pip install 'imagemill[int8]'"
_GROUP_CHANNELS: Final = 16
"""Narrower groups are merged up to this many channels: resnext101_32x4d begins with groups of 4 and
8, which ran at 82 and 185 Gop/s a core where groups of 16 make 485; merged they take 2/3 and 6/7 of
the time, 1.7 % of the whole network (2026-11-22).
"""


def is_installed() -> bool:
    """Return whether NNCF is installed, which only making an int8 model needs."""
    return importlib.util.find_spec("nncf") is not None


def check_installed() -> None:
    """Raise ModelError if no int8 model can be made here."""
    if not is_installed():
        raise ModelError(f"int8 needs a package that is not installed. Type: {INSTALL}")


def versions() -> dict[str, str]:
    """Versions of what decides an int8 model and its answers; no library is imported for it."""
    return {"recipe": "3"} | installed_versions(("openvino", "nncf"))  # the recipe of `quantize`


def _has_unit() -> bool:
    return cpu.unit(Precision.INT8, cpu.flags()) is not None


def _has_attention(model: Any) -> bool:
    """Return whether a network is a transformer: others have at most one softmax, at the end."""
    names = [node.get_type_name() for node in model.get_ops()]
    return names.count("Softmax") > 1 or "ScaledDotProductAttention" in names


def quantize(model_file: Path, pixels: Sequence[NDArray[np.uint8]]) -> Any:
    """Return a model quantised to int8.

    Without int8 units, processors add two products in 16 bits, which overflow unless weights use
    half of their range. NNCF by default halves it in the first layer only, which is not enough
    (docs/performance.md). With units nothing overflows, and the full range changes fewer answers.
    Networks with attention are quantised as NNCF does transformers, which smooths activations over
    channels.

    Args:
        model_file: ONNX; uint8 (n, H, W, 3) goes in, normalisation included.
        pixels: calibration images, uint8 (1, H, W, 3) each; walked over more than once.

    Returns:
        an `openvino.Model` with the same input and outputs; the batch is open.

    Raises:
        ModelError: there is no image, or the model cannot be read or quantised.
    """
    if not pixels:
        raise ModelError(
            f"{model_file} cannot be quantised without images to calibrate on. Give a source that"
            " holds readable images."
        )
    ov = load_openvino()  # first: with telemetry off, which NNCF would send for each call, too
    import nncf

    nncf.set_log_level(logging.ERROR)
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.DISABLE if _has_unit() else nncf.OverflowFix.ENABLE
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars there
            model = ov.convert_model(str(model_file), input=list(pixels[0].shape))
            name = next(iter(model.input(0).get_names()))
            quantised = nncf.quantize(
                model,
                nncf.Dataset(pixels),
                subset_size=len(pixels),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                fast_bias_correction=False,
                model_type=nncf.ModelType.TRANSFORMER if _has_attention(model) else None,
                advanced_parameters=advanced,
            )
        openvino_rewrites.merge(ov, quantised, _GROUP_CHANNELS, "i8")
        quantised.reshape({name: [-1, *pixels[0].shape[1:]]})
    except Exception as error:  # NNCF raises whatever it meets
        raise ModelError(
            f"{model_file} cannot be quantised: {type(error).__name__}:"
            f" {str(error).strip().splitlines()[-1:]}"
        ) from error
    return quantised


def save(model: Any, folder: Path) -> Path:
    """Write a model as `int8-<hash>.xml` and `.bin`, named by their content; each appears whole,
    the .xml last. Returns the path of the .xml.

    Raises:
        ModelError: the folder cannot be written.
    """
    ov = load_openvino()
    try:
        with tempfile.TemporaryDirectory(
            prefix=".int8.", dir=folder, ignore_cleanup_errors=True
        ) as making:
            temporary = Path(making) / "model.xml"
            ov.save_model(model, str(temporary), compress_to_fp16=False)
            target = folder / f"int8-{variants.digest(temporary)[:16]}.xml"
            for suffix in (".bin", ".xml"):
                written = temporary.with_suffix(suffix)
                files.sync(written)
                written.replace(target.with_suffix(suffix))
            files.sync(folder)
    except (OSError, RuntimeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
        )
        raise ModelError(
            f"{folder} cannot be written: {reason}. Make room or rights there, or use --precision"
            " fp32."
        ) from error
    return target
