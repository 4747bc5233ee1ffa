"""From three rates to a verdict: which one bounds the job, and what to change; and the report for
people.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagemill.records import Precision

if TYPE_CHECKING:
    from imagemill.bench.records import BenchReport, Rates

WRITE_BOUND_BELOW = 0.8
"""Below this share of the rate that computing and decoding allow together, something else bounds
the job.
"""
CLOSE = 1.25
"""Rates within this factor of each other are called balanced in the advice."""


def together(compute: float, decode: float, *, shared_cores: bool) -> float:
    """The rate that both stages allow, images/s: on the same cores their times add up, else the
    slower one sets it.
    """
    return 1 / (1 / compute + 1 / decode) if shared_cores else min(compute, decode)


def judge(
    compute: float,
    decode: float,
    achieved: float,
    *,
    read_share: float,
    precision: Precision,
    hardware: Sequence[Precision],
    threads: int,
    cores: int,
    shared_cores: bool,
) -> tuple[str, tuple[str, ...]]:
    """Say what bounds a job and what to change.

    Args:
        compute: images/s of the session alone.
        decode: images/s of reading and decoding alone.
        achieved: images/s from files to committed parts.
        read_share: of the time of reading and decoding, the part that reading takes.
        precision: of the session.
        hardware: precisions that the processor computes faster than fp32, fastest last.
        threads: decoding threads of all devices.
        cores: CPU cores of all devices.
        shared_cores: whether computing and decoding use the same cores.

    Returns:
        `compute`, `decode`, `read` or `write`; and pieces of advice, most promising first.
    """
    allowed = together(compute, decode, shared_cores=shared_cores)
    decoding = "read" if read_share > 0.5 else "decode"
    if achieved < WRITE_BOUND_BELOW * allowed:
        share = (
            f"end to end reaches {achieved / allowed:.0%} of the {allowed:,.1f} images/s that"
            " computing and decoding allow together"
        )
        return "write", (
            f"{share}: larger shards, a faster disk, or fewer --save columns",
            "more images: short jobs mostly start and end",
        )
    bound = "compute" if compute <= decode else decoding
    advice = {
        "compute": _faster_compute(precision, hardware),
        "decode": _faster_decode(threads, cores),
        "read": _faster_read(threads),
    }
    second = decoding if bound == "compute" else "compute"
    both = shared_cores and max(compute, decode) < CLOSE * min(compute, decode)
    return bound, tuple(dict.fromkeys(advice[bound] + (advice[second] if both else [])))


def _faster_compute(precision: Precision, hardware: Sequence[Precision]) -> list[str]:
    order = list(Precision)
    lower = [
        found.value for found in reversed(hardware) if order.index(found) > order.index(precision)
    ]
    return ([f"a lower precision: --precision {' or '.join(lower)}"] if lower else []) + [
        "a second device, or more cores"
    ]


def _faster_decode(threads: int, cores: int) -> list[str]:
    more = (
        [f"more decoding workers: there are {threads} for {cores} cores, see --num-workers"]
        if threads < cores
        else []
    )
    return [*more, "more cores", "smaller images"]


def _faster_read(threads: int) -> list[str]:
    return [
        (
            f"more decoding workers, so that more reads are under way: there are {threads}, see"
            " --num-workers"
        ),
        "storage that answers faster",
    ]


def told(report: BenchReport) -> str:
    """The report for people."""
    count = report.settings.iterations
    lines = [
        (
            f"{report.model} in {report.precision}, batches of {report.batch_size}, median of"
            f" {count} iteration{'s' if count != 1 else ''}"
        ),
    ]
    for name in ("compute_only", "decode_only", "end_to_end"):
        rates: Rates | None = getattr(report, name)
        if rates is None:
            continue
        spread = (
            f"({rates.min:,.1f} to {rates.max:,.1f}; {report.images_per_iteration[name]:,} images"
            " each)"
        )
        lines.append(f"{name.replace('_', ' '):<13} {rates.median:>9,.1f} images/s {spread}")
        if len(rates.devices) > 1:
            lines += [
                f"  {device:<11} {rate:>9,.1f} images/s" for device, rate in rates.devices.items()
            ]
    if report.bound:
        lines.append(f"bounded by {report.bound}; what would help: {'; '.join(report.advice)}")
    return "\n".join(lines)
