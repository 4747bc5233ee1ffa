"""S4: each convolution of the network in every way that PyTorch offers, and where a batch's time
goes.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation
from limits import layers, program_of
from stage import Stage, noise

from imagemill.pipeline.backends.torch import cuda
from imagemill.pipeline.backends.torch.fusions import FusedConv
from imagemill.pipeline.backends.torch.program import Program, Step

_WIDTHS = (8, 16, 32, 64)
"""Channels of a group, after narrower groups were merged with zeros between them."""
_STEMS = (4, 8)
"""Channels of an image, after it was padded with zeros."""
_CLOSE = 0.02
"""How far a way may lie from the plain one, as a share of the largest number."""


@dataclass(frozen=True)
class Shape:
    """A convolution with what follows it."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    pad: int
    groups: int
    adds: bool
    relu: bool

    @classmethod
    def of(cls, program: Program, step: Step) -> Shape:
        conv = step.call
        assert isinstance(conv, FusedConv)
        x, weight = (program.shape(name or "") for name in step.inputs[:2])
        settings = conv.settings
        stride, pad = settings.strides[0], settings.before[0]
        return cls(x, weight, stride, pad, settings.group, conv.adds, conv.activation == "Relu")


def convolutions(stage: Stage) -> None:
    """S4: layers.csv with each shape and way; kernels.csv and a trace of three batches."""
    spec = stage.spec(stage.large, stage.card.half)
    counts: Counter[Shape] = Counter()
    moved = {}
    program = program_of(spec)
    for layer in layers(program, itemsize=2):
        if layer.step.kind == "Conv":
            shape = Shape.of(program, layer.step)
            counts[shape] += 1
            moved[shape] = layer.bytes
    dtype = torch.float16 if stage.card.is_gpu else torch.bfloat16
    rows: list[dict[str, Any]] = []
    cuda.prepare()
    with (stage.out / "layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("input,weight,stride,groups,adds,relu,count,way,us,gb_s,note".split(","))
        for shape, count in counts.items():
            for way, us, note in _ways(stage, shape, dtype):
                rate = "" if us is None else round(moved[shape] / us / 1000, 1)
                what = ("x".join(map(str, shape.x)), "x".join(map(str, shape.weight)))
                settings = (shape.stride, shape.groups, shape.adds, shape.relu, count)
                writer.writerow((*what, *settings, way, us, rate, note))
                rows.append({"shape": shape, "way": way, "us": us})
            file.flush()
    stage.put(**_summary(rows, counts))
    stage.attempt("profile", lambda: _profile(stage))


def _ways(
    stage: Stage, shape: Shape, dtype: torch.dtype
) -> Iterator[tuple[str, float | None, str]]:
    """Yield each way's name, its microseconds if it computes the same, and else why not."""
    place, last = stage.card.place, torch.channels_last
    torch.manual_seed(0)
    x = torch.randn(shape.x, device=place).to(dtype, memory_format=last)
    weight = (torch.randn(shape.weight, device=place) * 0.05).to(dtype, memory_format=last)
    bias = torch.randn(shape.weight[0], device=place).to(dtype)
    rest = (shape.stride, shape.pad, 1, shape.groups)
    plain = F.conv2d(x, weight, bias, *rest)
    other = torch.randn_like(plain) if shape.adds else None

    def conv(x: Any, weight: Any, groups: int) -> Callable[[], Any]:
        z = other if other is None else other.contiguous(memory_format=_layout(x))

        def compute() -> Any:
            made = F.conv2d(x, weight, bias, shape.stride, shape.pad, 1, groups)
            if z is not None:
                made.add_(z)
            return made.relu_() if shape.relu else made

        return compute

    ways = {
        "nhwc": conv(x, weight, shape.groups),
        "nchw": conv(x.contiguous(), weight.contiguous(), shape.groups),
    }
    if shape.relu:
        ways["fused"] = _fused(x, weight, bias, other, shape)
    if shape.weight[2:] == (1, 1) and shape.stride == shape.groups == 1 and shape.relu:
        ways["addmm"] = _addmm(x, weight, bias, other)
    channels, width = shape.x[1], shape.weight[1]
    for wider in (one for one in _WIDTHS if width < one <= channels and channels % one == 0):
        if wider % width == 0:
            merged = _merge(weight, shape.groups, wider)
            ways[f"groups of {wider}"] = conv(x, merged, channels // wider)
    for channels in _STEMS if shape.x[1] == 3 else ():
        wide_x = F.pad(x, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=last)
        wide_w = F.pad(weight, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=last)
        ways[f"{channels} channels"] = conv(wide_x, wide_w, 1)
    with torch.inference_mode():
        expected = ways["nhwc"]().float()
        for name, call in ways.items():
            yield name, *_measure(stage, call, expected)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
        yield "nhwc, by stopwatch", *_measure(stage, ways["nhwc"], expected)
        cuda.prepare()


def _layout(x: Any) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _measure(
    stage: Stage, call: Callable[[], Any], expected: torch.Tensor
) -> tuple[float | None, str]:
    try:
        apart = (call().float() - expected).abs().max() / expected.abs().max()
    except RuntimeError as error:  # the library has no such kernel, which is an answer
        return None, " ".join(str(error).split())[:80]
    if not apart <= _CLOSE:
        return None, f"differs by {float(apart):.2g}"
    return round(stage.seconds(call, 0.02) * 1e6, 1), ""


def _fused(x: Any, weight: Any, bias: Any, other: Any, shape: Shape) -> Callable[[], Any]:
    pair = ([shape.stride] * 2, [shape.pad] * 2, [1, 1])
    if other is None:
        return lambda: torch.cudnn_convolution_relu(x, weight, bias, *pair, shape.groups)
    return lambda: torch.cudnn_convolution_add_relu(
        x, weight, other, 1.0, bias, *pair, shape.groups
    )


def _addmm(x: Any, weight: Any, bias: Any, other: Any) -> Callable[[], Any]:
    """Return a convolution of single pixels as a matrix product with the sum and ReLU in it."""
    count, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    matrix = weight.reshape(len(weight), channels).t()

    def planes(made: Any) -> Any:
        return made.view(count, height, width, -1).permute(0, 3, 1, 2)

    if other is None:
        return lambda: planes(torch._addmm_activation(bias, rows, matrix))
    return lambda: planes(torch.addmm(bias, rows, matrix)).add_(other).relu_()


def _merge(weight: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Return the weights of fewer groups, of `width` channels each, with zeros between those that
    were merged.
    """
    each, narrow = len(weight) // groups, weight.shape[1]
    made = weight.new_zeros(len(weight), width, *weight.shape[2:])
    for group in range(groups):
        start = group * narrow % width
        some = slice(group * each, (group + 1) * each)
        made[some, start : start + narrow] = weight[some]
    return made.contiguous(memory_format=torch.channels_last)


def _summary(rows: list[dict[str, Any]], counts: Counter[Shape]) -> dict[str, Any]:
    """Return the milliseconds of all convolutions by way, with the plain one where a way does not
    exist, and of the best mixture of ways whose choice does not depend on a stopwatch at the start.
    """
    times: dict[Shape, dict[str, float]] = {}
    for row in rows:
        if row["us"] is not None:
            times.setdefault(row["shape"], {})[row["way"]] = row["us"]
    names = {row["way"] for row in rows}
    total = {
        name: sum(counts[shape] * ways.get(name, ways["nhwc"]) for shape, ways in times.items())
        for name in sorted(names)
    }
    by_rule = {name for name in names if "stopwatch" not in name}
    total["best"] = sum(
        counts[shape] * min(us for name, us in ways.items() if name in by_rule)
        for shape, ways in times.items()
    )
    shares = {name: round(value / total["nhwc"], 3) for name, value in total.items()}
    return {"ms": {name: round(value / 1000, 3) for name, value in total.items()}, "shares": shares}


def _profile(stage: Stage) -> None:
    """Write what the card computes in three batches, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    spec = stage.spec(stage.large, stage.card.half)
    session = stage.session(spec)
    list(session.stream(noise(spec)))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if stage.card.is_gpu else [])]
    with profile(activities=kinds) as found:
        list(session.stream(islice(noise(spec), 3)))
        stage.synchronize()
    session.close()
    found.export_chrome_trace(str(stage.out / "trace.json.gz"))
    side = "device" if stage.card.is_gpu else "cpu"
    events = sorted(
        ((getattr(one, f"self_{side}_time_total"), one) for one in found.key_averages()),
        key=lambda pair: -pair[0],
    )
    with (stage.out / "kernels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kernel", "count", "us"))
        writer.writerows((one.key, one.count, round(us, 1)) for us, one in events if us > 0)
    stage.put(profiled_us=round(sum(us for us, _ in events)))
