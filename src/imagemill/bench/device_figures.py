"""What devices other than the CPU tell of themselves: how busy they are, what their memory allows,
and how many cores they would need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

from imagemill.bench.records import DeviceFigures
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
