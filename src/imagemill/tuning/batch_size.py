"""The default batch size: a rule by precision and processor. It affects speed, not results."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Final

from imagemill.records import DeviceSpec, Precision, SessionSpec
from imagemill.system import cpu

_DEFAULT: Final = 4
_FP32: Final = 2
_AMX: Final = 8


def resolved(spec: SessionSpec, devices: Sequence[DeviceSpec]) -> SessionSpec:
    """Return the specification with a batch size: its own, or the rule's if it has none (0)."""
    return (
        spec
        if spec.batch_size
        else replace(spec, batch_size=rule(spec.precision, devices, cpu.flags()))
    )


def rule(precision: Precision, devices: Sequence[DeviceSpec], flags: Container[str]) -> int:
    """Return the number of images per batch for a precision on these devices.

    4 is within a few per cent of the best for resnext101_32x4d in int8 and bf16. With AMX, 8 makes
    the session 7 to 8 % faster and a job 2 to 3 %. In fp32, whose images fill the caches sooner, 2
    is as fast or up to 3 % faster, and for EfficientNet-Lite0 5 to 12 % (docs/performance.md).
    `imagemill bench --batch-size search` finds the fastest for one model on one machine.

    Args:
        precision: of the job.
        devices: of the job.
        flags: of the processor, as /proc/cpuinfo spells them.
    """
    if not all((device.kind, device.backend) == ("cpu", "openvino") for device in devices):
        return _DEFAULT
    if precision is Precision.FP32:
        return _FP32
    return _AMX if (cpu.unit(precision, flags) or "").startswith("amx_") else _DEFAULT
