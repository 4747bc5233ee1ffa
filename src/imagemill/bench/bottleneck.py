"""What bounds a job, from its three rates, and what to change."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from imagemill.records import Precision

WRITE_BOUND_BELOW = 0.8
"""If a job reaches less than this share of the rate that computing and decoding allow together,
writing or starting bounds it.
"""
CLOSE = 1.25
"""If two rates are within this factor of each other, the advice names both."""


class Setup(Struct, frozen=True):
    """What computes and decodes."""

    precision: Precision
    """Of the inference."""
    hardware: Sequence[Precision]
    """Precisions that the devices compute faster than fp32, fastest last."""
    threads: int
    """Decoding threads of all devices."""
    cores: int
    """CPU cores of all devices."""
    shared_cores: bool
    """Whether computing and decoding use the same cores."""


def together(compute: float, decode: float, *, shared_cores: bool) -> float:
    """Return the rate that both stages allow, images/s. On the same cores their times add up, else
    the slower one decides.
    """
    return 1 / (1 / compute + 1 / decode) if shared_cores else min(compute, decode)


def find_bottleneck(
    compute: float, decode: float, achieved: float, *, read_share: float, setup: Setup
) -> tuple[str, tuple[str, ...]]:
    """Return what bounds a job, and what to change.

    Args:
        compute: images/s of inference alone.
        decode: images/s of reading and decoding alone.
        achieved: images/s from files to saved parts.
        read_share: share of reading in the time of reading and decoding.
        setup: what was measured.

    Returns:
        `compute`, `decode`, `read` or `write`, and advice, most promising first.
    """
    allowed = together(compute, decode, shared_cores=setup.shared_cores)
    decoding = "read" if read_share > 0.5 else "decode"
    if achieved < WRITE_BOUND_BELOW * allowed:
        share = (
            f"end to end reaches {achieved / allowed:.0%} of the {allowed:,.1f} images/s that"
            " computing and decoding allow together"
        )
        return "write", (
            f"{share}: larger shards, a faster disk, or fewer --save columns",
            "more images: a short job spends most of its time on starting and ending",
        )
    bound = "compute" if compute <= decode else decoding
    advice = {
        "compute": _faster_compute(setup.precision, setup.hardware),
        "decode": _faster_decode(setup.threads, setup.cores),
        "read": _faster_read(setup.threads),
    }
    second = decoding if bound == "compute" else "compute"
    both = setup.shared_cores and max(compute, decode) < CLOSE * min(compute, decode)
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
    advice = ["more cores", "smaller images"]
    if threads < cores:
        more = f"more decoding threads (--num-workers): there are {threads} for {cores} cores"
        advice.insert(0, more)
    return advice


def _faster_read(threads: int) -> list[str]:
    more = "more decoding threads (--num-workers), which read more images at once"
    return [f"{more}: there are {threads}", "faster storage"]
