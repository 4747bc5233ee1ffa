"""Sessions: one compiled model on one device. `open_session` picks the class by the device's
backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module, metadata
from typing import Any

from msgspec import Struct

from imagemill.pipeline.backends.base import Found, Session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import DeviceSpec, Precision, SessionSpec

_FP32, _FP16, _BF16, _INT8 = Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8


class Backend(Struct, frozen=True):
    """One row of the registry."""

    session: str
    """Module and class below `imagemill.pipeline.backends`, imported when asked for."""
    kinds: Mapping[str, tuple[Precision, ...]]
    """Kinds of devices that it drives → precisions that it computes in there."""
    anywhere: tuple[str, ...] = ()
    """Kinds that every machine has; others are looked for with the class's `found`."""
    libraries: tuple[str, ...] = ()
    """Distributions whose versions decide its answers, as far as they are installed."""


_NVIDIA = ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

BACKENDS: dict[str, Backend] = {
    "openvino": Backend(
        "openvino:OpenVinoSession",
        {"cpu": (_FP32, _BF16, _INT8), "gpu": (_FP32, _FP16), "npu": (_FP16,)},
        ("cpu",),
        ("openvino",),
    ),
    "torch": Backend(
        "torch.session:TorchSession",
        {"cuda": (_FP32, _FP16, _BF16), "cpu": (_FP32, _BF16)},
        libraries=("torch", *_NVIDIA),
    ),
    "onnxruntime": Backend(
        "onnxruntime:OnnxRuntimeSession",
        dict.fromkeys(("cpu", "cuda", "rocm", "coreml"), (_FP32,)),
        libraries=("onnxruntime", "onnxruntime-gpu", "onnxruntime-migraphx", *_NVIDIA),
    ),
    "popart": Backend("popart.session:PopartSession", {"ipu": (_FP32, _FP16)}),
    "null": Backend("null:NullSession", {"null": (_FP32, _BF16)}, ("null",)),
}
"""Backend → what it is. A further one is one file and one line here. If a device is given without a
backend, the first one that drives its kind is used.
"""

INDEPENDENT = ("openvino", "onnxruntime", "null")
"""Engines (see `DeviceSpec.engine`) whose answers do not depend on the batch size: their tests
compare them bit for bit.
"""


def depends_on_batch(engines: str) -> bool:
    """Return whether answers depend on the batch size and on the model of the device.

    Args:
        engines: of devices, joined by `+`, such as `Frozen.backend`.
    """
    return any(engine not in INDEPENDENT for engine in engines.split("+"))


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed; nothing is imported."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def library_versions(backend: str) -> dict[str, str]:
    """Return the versions of the installed libraries that decide a backend's answers."""
    return installed_versions(BACKENDS[backend].libraries)


def open_session(spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> Session:
    """Compile a model for a device and return its session.

    Raises:
        DeviceError: the device is not to be had. ModelError: the model cannot be compiled.
    """
    session: Session = _class(device.backend)(spec, device, clock)
    return session


def look_for(backend: str, kind: str) -> Found:
    """What of a kind of devices is here, as a backend sees it. Imports the backend's module."""
    found: Found = _class(backend).found(kind)
    return found


def _class(backend: str) -> Any:
    module, name = BACKENDS[backend].session.split(":")
    return getattr(import_module(f"imagemill.pipeline.backends.{module}"), name)
