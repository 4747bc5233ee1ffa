"""The default batch size: a rule by precision, processor and a GPU's memory."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from msgspec.structs import replace

from imagemill.pipeline.backends import nvidia
from imagemill.records import DeviceSpec, Precision, SessionSpec
from imagemill.system import cpu

_DEFAULT: Final = 4
_FP32: Final = 2
_AMX: Final = 8
_GPU: Final = ((12 * 10**9, 256), (6 * 10**9, 128), (3 * 10**9, 64), (0, 16))
"""Free memory in bytes from which a GPU gets batches of this many images."""
_GPU_UNKNOWN: Final = 3 * 10**9
"""What a GPU is taken to have free if the driver does not tell."""


def resolved(spec: SessionSpec, devices: Sequence[DeviceSpec]) -> SessionSpec:
    """Return the specification with a batch size: its own, or the rule's if it has none (0)."""
    if spec.batch_size:
        return spec
    gpus = [device.id for device in devices if device.kind == "cuda"]
    free = [nvidia.free_memory(number) for number in gpus]
    least = min((size for size in free if size is not None), default=None)
    return replace(spec, batch_size=rule(spec.precision, devices, cpu.flags(), least))


def rule(
    precision: Precision,
    devices: Sequence[DeviceSpec],
    flags: Container[str],
    free: int | None = None,
) -> int:
    """Return the number of images per batch for a precision on these devices.

    4 is within a few per cent of the best for resnext101_32x4d in int8 and bf16. With AMX, 8 makes
    the session 7 to 8 % faster and a job 2 to 3 %. In fp32, whose images fill the caches sooner, 2
    is as fast or up to 3 % faster, and for EfficientNet-Lite0 5 to 12 % (docs/performance.md).
    NVIDIA's GPUs need larger ones to be busy; theirs fit the memory that is free, and no GPU has
    measured them yet. `imagemill bench --batch-size search` finds the fastest for one model on one
    machine.

    Args:
        precision: of the job.
        devices: of the job.
        flags: of the processor, as /proc/cpuinfo spells them.
        free: memory of the fullest NVIDIA GPU, bytes; None if that is not known.
    """
    if all(device.kind == "cuda" for device in devices):
        known = _GPU_UNKNOWN if free is None else free
        return next(size for least, size in _GPU if known >= least)
    if not all(device.engine == "openvino" for device in devices):
        return _DEFAULT
    if precision is Precision.FP32:
        return _FP32
    return _AMX if (cpu.unit(precision, flags) or "").startswith("amx_") else _DEFAULT
