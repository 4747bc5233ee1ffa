"""S0 and S1: what the machine is, what the card can do at most, and what limit that sets to a
network.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from stage import Stage, shape_of

from imagemill.pipeline.backends import devices
from imagemill.pipeline.backends.torch.program import Program, Step, read
from imagemill.records import Precision, SessionSpec
from imagemill.system import cpu

_LIBRARIES = (
    "imagemill torch torchvision timm triton onnx onnxruntime numpy pillow simplejpeg pyarrow"
    " nvidia-cublas nvidia-cudnn-cu13 nvidia-cudnn-cu12"
)


def facts(stage: Stage) -> None:
    """S0: versions, the card, the processor, and what the later stages need."""
    devices.resolve(stage.card.of_sessions)  # raises, and says what is missing
    found = {}
    for name in _LIBRARIES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    stage.put(versions=found | {"python": platform.python_version()})
    stage.put(
        cpu=cpu.name(),
        cores=len(cpu.usable_cores()),
        cudnn=torch.backends.cudnn.version() if stage.card.is_gpu else None,
        has_fused_convolution=hasattr(torch, "cudnn_convolution_relu"),
        has_native_resampling=bool(
            importlib.util.find_spec("imagemill.pipeline.decoding._resample")
        ),
        compiler=shutil.which("cc") or shutil.which("gcc"),
    )
    if stage.card.is_gpu:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        stage.put(
            card=properties.name,
            processors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            free_gb=round(free / 1e9, 1),
            total_gb=round(total / 1e9, 1),
        )
    for command in (("lscpu",), ("nvidia-smi",)):
        if shutil.which(command[0]):
            text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            print(text, flush=True)
    stage.imagemill("devices")


def limits(stage: Stage) -> None:
    """S1: copies and matrix products at full speed, and transfers to and from the card."""
    count = 2**20 if stage.is_tiny else 2**30
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=stage.card.place)
    copied = torch.empty_like(source)
    stage.put(copy_gb_s=_rate(2 * count, stage.seconds(partial(copied.copy_, source))))
    size = 128 if stage.is_tiny else 8192
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("tf32", torch.float32),
    ):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        one, two = (torch.randn(size, size, device=stage.card.place).to(dtype) for _ in range(2))
        each = stage.seconds(partial(torch.matmul, one, two))
        stage.put(tflop_s={name: _rate(2 * size**3 / 1000, each)})
    megabytes = 1 if stage.is_tiny else 256
    for kind in ("pinned", "pageable"):
        pinned = kind == "pinned" and stage.card.is_gpu
        host = torch.ones(megabytes * 10**6, dtype=torch.uint8, pin_memory=pinned)
        there = host.to(stage.card.place)
        put = stage.seconds(partial(there.copy_, host, non_blocking=True))
        get = stage.seconds(partial(host.copy_, there, non_blocking=True))
        rates = {f"to the card, {kind}": put, f"from the card, {kind}": get}
        stage.put(transfer_gb_s={name: _rate(len(host), each) for name, each in rates.items()})


def _rate(amount: float, seconds: float) -> float:
    """Return giga per second."""
    return float(f"{amount / seconds / 1e9:.4g}")


@dataclass(frozen=True)
class Layer:
    """What a step of a program moves and computes at least."""

    step: Step
    bytes: int
    """Inputs read once and outputs written once."""
    flops: int


def layers(program: Program, itemsize: int) -> Iterator[Layer]:
    """Yield the steps of a program that move something.

    Args:
        program: its shapes are those of one batch.
        itemsize: bytes of a number in the precision of its products.
    """
    for step, moved in program.bytes_of_steps(itemsize):
        yield Layer(step, moved, _flops(program, step))


def _flops(program: Program, step: Step) -> int:
    if step.kind not in ("Conv", "Gemm", "Linear"):
        return 0
    weight, made = program.shape(step.inputs[1] or ""), program.shape(step.outputs[0])
    if step.kind == "Conv":
        return 2 * math.prod(made) * math.prod(weight[1:])
    return 2 * made[0] * math.prod(weight)


def program_of(spec: SessionSpec) -> Program:
    """Read a session's network."""
    return read(Path(spec.model_file), spec.card.input, shape_of(spec), ("logits",))


def memory_limit(stage: Stage, spec: SessionSpec) -> dict[str, Any]:
    """Return what S1's rates allow a network: `images_s` if each layer takes as long as its bytes
    or its products, whichever is slower, with its `mb` and `gflop` per image.
    """
    tflop_s, copy = stage.figure("S1", "tflop_s"), stage.figure("S1", "copy_gb_s")
    itemsize = 4 if spec.precision is Precision.FP32 else 2
    found = list(layers(program_of(spec), itemsize))
    limit = {
        "mb": round(sum(layer.bytes for layer in found) / spec.batch_size / 1e6, 1),
        "gflop": round(sum(layer.flops for layer in found) / spec.batch_size / 1e9, 2),
    }
    if tflop_s and copy:
        peak = tflop_s[spec.precision] * 1e12
        seconds = sum(max(layer.bytes / (copy * 1e9), layer.flops / peak) for layer in found)
        limit["images_s"] = round(spec.batch_size / seconds)
    return limit
