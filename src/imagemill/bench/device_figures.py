"""What devices other than the CPU tell of themselves: how busy they are, what their memory allows,
and how many cores they would need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median

from imagemill.bench.records import BenchReport, DeviceFigures
from imagemill.records import DeviceSpec, MemoryTraffic, Summary


def on_cpu(chosen: Sequence[DeviceSpec]) -> bool:
    """Return whether computing and decoding use the same cores."""
    return all(device.kind in ("cpu", "null") for device in chosen)


def device_figures(
    traffic: Mapping[str, MemoryTraffic],
    chosen: Sequence[DeviceSpec],
    runs: Sequence[Summary] = (),
    *,
    cores: float | None = None,
) -> DeviceFigures | None:
    """Return the figures of a bench; None on CPUs.

    Args:
        traffic: device → what its memory allows.
        chosen: the devices.
        runs: the iterations end to end.
        cores: how many cores would decode as fast as the devices compute; None: unknown.
    """
    if on_cpu(chosen):
        return None
    shares = [[device.busy for device in run.devices if device.busy is not None] for run in runs]
    known = [mean(each) for each in shares if each]
    limits = [one.bytes_per_s / one.bytes_per_image for one in traffic.values()]
    is_known = len(limits) == len(chosen)
    return DeviceFigures(
        busy=round(median(known), 3) if known else None,
        memory_limit=round(sum(limits), 3) if is_known else None,
        bytes_per_image=max(one.bytes_per_image for one in traffic.values()) if is_known else None,
        bytes_per_s=sum(one.bytes_per_s for one in traffic.values()) if is_known else None,
        cores_needed=math.ceil(cores) if cores else None,
    )


def format_figures(report: BenchReport) -> Iterator[str]:
    """Yield a line for each figure that is known."""
    found = report.device
    if found is None:
        return
    names = list(report.compute_only.devices)
    which = names[0] if len(names) == 1 else "the devices"
    if found.busy is not None:
        yield f"{which} computed for {found.busy:.0%} of the time end to end"
    if found.memory_limit and found.bytes_per_image and found.bytes_per_s:
        yield (
            f"compute only is {report.compute_only.median / found.memory_limit:.0%} of the"
            f" {found.memory_limit:,.1f} images/s that memory allows:"
            f" {found.bytes_per_image / 1e6:,.1f} MB per image,"
            f" {found.bytes_per_s / 1e9:,.1f} GB/s"
        )
    if found.cores_needed is not None:
        need = "needs" if len(names) == 1 else "need"
        yield f"{which} {need} {found.cores_needed:,} such cores to be fed with these images"
