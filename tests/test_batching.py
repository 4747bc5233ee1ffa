"""The batch size of a job that names none."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from batches import make_spec
from imagemill.pipeline.backends import nvidia
from imagemill.records import Bundle, DeviceSpec, Precision
from imagemill.system import cpu
from imagemill.tuning import batch_size


@pytest.mark.parametrize(
    ("precision", "flags", "backend", "size"),
    [
        (Precision.INT8, {"amx_int8"}, "openvino", 8),
        (Precision.BF16, {"amx_int8", "amx_bf16"}, "openvino", 8),
        (Precision.BF16, {"amx_int8", "avx512_bf16"}, "openvino", 4),
        (Precision.INT8, {"avx512_vnni"}, "openvino", 4),
        (Precision.FP32, {"amx_int8", "amx_bf16"}, "openvino", 2),
        (Precision.FP32, {"avx512_vnni"}, "onnxruntime", 4),
        (Precision.FP32, {"amx_int8"}, "null", 4),
    ],
)
def test_by_rule_batches_are_larger_with_matrix_units_and_smaller_in_fp32(
    precision: Precision, flags: set[str], backend: str, size: int
) -> None:
    assert batch_size.rule(precision, [DeviceSpec("cpu#0", "cpu", backend, (0, 1))], flags) == size


def test_a_size_that_was_asked_for_is_obeyed(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule only fills in what nobody said."""
    monkeypatch.setattr(cpu, "flags", lambda *_: {"avx2"})
    device = DeviceSpec("cpu#0", "cpu", "openvino", (0, 1))
    job = make_spec(tiny, batch_size=0, precision=Precision.INT8)
    assert batch_size.resolved(job, [device]).batch_size == 4
    assert batch_size.resolved(replace(job, batch_size=7), [device]).batch_size == 7


@pytest.mark.parametrize(
    ("free", "size"),
    [(80 * 10**9, 256), (12 * 10**9, 256), (8 * 10**9, 128), (4 * 10**9, 64), (10**9, 16)],
)
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_batches_of_a_gpu_fit_the_memory_that_is_free(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, free: int, size: int, backend: str
) -> None:
    """Of the fullest of them; where the driver does not tell, a small card is assumed."""
    devices = [DeviceSpec(f"cuda#{number}", "cuda", backend, (0,), number) for number in (0, 1)]
    job = make_spec(tiny, batch_size=0)
    monkeypatch.setattr(nvidia, "free_memory", lambda number: (96 * 10**9, free)[number])
    assert batch_size.resolved(job, devices).batch_size == size
    monkeypatch.setattr(nvidia, "free_memory", lambda _number: None)
    assert batch_size.resolved(job, devices).batch_size == 64
