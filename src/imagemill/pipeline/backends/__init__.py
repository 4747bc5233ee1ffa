"""Sessions: one compiled model on one device. `open_session` picks the class by the device's
backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from imagemill.errors import DeviceError
from imagemill.pipeline.backends.base import Found, Session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import DeviceSpec, Precision, SessionSpec

_FP32, _FP16, _BF16, _INT8 = Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of the registry."""

    session: str
    """Module and class below `imagemill.pipeline.backends`, imported when asked for."""
    kinds: Mapping[str, tuple[Precision, ...]]
    """Kinds of devices that it drives → precisions that it computes in there."""
    anywhere: tuple[str, ...] = ()
    """Kinds that every machine has; others are looked for with the class's `found`."""


BACKENDS: dict[str, Backend] = {
    "openvino": Backend(
        "openvino:OpenVinoSession",
        {"cpu": (_FP32, _BF16, _INT8), "gpu": (_FP32, _FP16), "npu": (_FP16,)},
        ("cpu",),
    ),
    "torch": Backend(
        "torch.session:TorchSession",
        {"cuda": (_FP32, _FP16, _BF16), "cpu": (_FP32, _BF16)},
    ),
    "onnxruntime": Backend(
        "onnxruntime:OnnxRuntimeSession",
        dict.fromkeys(("cpu", "cuda", "rocm", "coreml", "directml"), (_FP32,)),
    ),
    "popart": Backend("popart.session:PopartSession", {"ipu": (_FP32, _FP16)}),
    "null": Backend("null:NullSession", {"null": (_FP32, _BF16)}, ("null",)),
}
"""Backend → what it is; a further one is one file and one line here. Where none is named, a kind's
first is meant.
"""


def open_session(spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> Session:
    """Compile a model for a device and return its session.

    Raises:
        DeviceError: no such backend, or its device is not to be had. ModelError: the model cannot
        be compiled.
    """
    if device.backend not in BACKENDS:
        raise DeviceError(f"backend {device.backend} is not known. Known: {', '.join(BACKENDS)}.")
    session: Session = _class(device.backend)(spec, device, clock)
    return session


def look_for(backend: str, kind: str) -> Found:
    """What of a kind of devices is here, as a backend sees it. Imports the backend's module."""
    found: Found = _class(backend).found(kind)
    return found


def _class(backend: str) -> Any:
    module, name = BACKENDS[backend].session.split(":")
    return getattr(import_module(f"imagemill.pipeline.backends.{module}"), name)
