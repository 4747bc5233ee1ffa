"""Scales, lines and shares of a bar, computed from numbers for the template to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec import Struct

from imagemill.records import Clock, DeviceSummary, Throughput

WIDTH, HEIGHT = 1000.0, 100.0
"""Size of a chart in its own coordinates, which the page stretches."""
_TICKS = 4
_MIN_SECONDS = 2.0
"""The axis of a shorter job would repeat its labels."""
_LINES = 6
"""If there are more devices than this, all their lines look alike."""


class Line(Struct, frozen=True):
    """One line of a chart."""

    name: str
    style: str
    """Its class in the style sheet."""
    path: str
    """An SVG path."""


class RateChart(Struct, frozen=True):
    """images/s over time."""

    lines: tuple[Line, ...]
    ticks: tuple[float, ...]
    """Labels of the vertical axis, from the top to 0."""
    times: tuple[float, ...]
    """Labels of the horizontal axis, seconds."""
    rows: tuple[tuple[float, float, tuple[float, ...]], ...]
    """Of the table below the chart: from and to, in seconds, and images/s of each line."""


class Share(Struct, frozen=True):
    """A piece of a bar."""

    style: str
    start: float
    """Percent of the bar."""
    width: float


def ceiling(value: float) -> float:
    """Return the smallest number not below the value whose quarter is round; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        step * power
        for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10)
        if step * power >= value * (1 - 1e-9)
    )


def rates(throughput: Throughput, seconds: float) -> RateChart | None:
    """Return the chart of a job's throughput; None if no image was saved, or the job was short."""
    buckets = max((len(counts) for counts in throughput.images), default=0)
    if not buckets or seconds < _MIN_SECONDS:
        return None
    ends = [
        min((number + 1) * throughput.bucket_s, max(seconds, (buckets - 0.5) * throughput.bucket_s))
        for number in range(buckets)
    ]
    starts = [number * throughput.bucket_s for number in range(buckets)]
    devices = {
        name: [
            count / (end - start) for count, start, end in zip(counts, starts, ends, strict=True)
        ]
        for name, counts in zip(throughput.devices, throughput.images, strict=True)
    }
    together = {"all devices": [sum(values) for values in zip(*devices.values(), strict=True)]}
    series = (together if len(devices) > 1 else {}) | devices
    top = ceiling(max(max(values) for values in series.values()))

    def path(values: Sequence[float]) -> str:
        steps: list[str] = []
        for value, start, end in zip(values, starts, ends, strict=True):
            height = HEIGHT * (1 - value / top)
            steps.append(
                f"{'L' if steps else 'M'}{WIDTH * start / ends[-1]:.1f}"
                f" {height:.2f}H{WIDTH * end / ends[-1]:.1f}"
            )
        return "".join(steps)

    def style(position: int) -> str:
        position -= len(devices) > 1
        return "all" if position < 0 else f"c{position}" if len(devices) <= _LINES else "many"

    return RateChart(
        lines=tuple(
            Line(name, style(position), path(values))
            for position, (name, values) in enumerate(series.items())
        ),
        ticks=tuple(top * (_TICKS - number) / _TICKS for number in range(_TICKS + 1)),
        times=tuple(ends[-1] * number / _TICKS for number in range(_TICKS + 1)),
        rows=tuple(
            (starts[n], ends[n], tuple(values[n] for values in series.values()))
            for n in range(buckets)
        ),
    )


PIECES: Mapping[str, tuple[str, str]] = {
    "starved": ("waiting for images", "c1"),
    "compute": ("waiting for the model", "c0"),
    "write": ("writing results", "c2"),
    "other": ("starting and the rest", "rest"),
}
"""The pieces of a worker's time: field of `Clock` → name and class in the style sheet."""


def shares(device: DeviceSummary, seconds: float) -> tuple[Share, ...]:
    """Return where a worker's time went, from the first image to the last result saved."""
    clock = device.clock or Clock()
    spent = {name: getattr(clock, name) for name in ("starved", "compute", "write")}
    whole = max(seconds, sum(spent.values()), 1e-9)
    spent["other"] = max(0.0, whole - sum(spent.values()))
    found, start = [], 0.0
    for name, (_, style) in PIECES.items():
        width = 100 * spent[name] / whole
        found.append(Share(style, round(start, 3), round(width, 3)))
        start += width
    return tuple(found)
