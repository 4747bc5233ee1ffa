"""Which devices this machine offers, and what a `--devices` argument means."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections import Counter
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from imagemill.errors import DeviceError, UsageError
from imagemill.records import DeviceSpec

DEFAULT_BACKENDS = {"cpu": "openvino", "null": "null"}
_ITEM = re.compile(r"(?P<kind>[a-z]+)(?::(?P<ids>[0-9,]+))?(?:@(?P<backend>[a-z]+))?")
_BACKENDS = {"cpu": ("openvino",), "null": ("null",)}
_PLANNED = {
    "cuda": "GPUs are not supported by this version of imagemill. Use --devices cpu.",
    "ipu": "Graphcore IPUs are not supported by this version of imagemill. Use --devices cpu.",
}


def usable_cores() -> list[int]:
    """The CPU cores this process may use, by number: its affinity, cut to the cgroup's quota."""
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    quota = cgroup_quota()
    return cores if quota is None else cores[: max(1, min(len(cores), ceil(quota)))]


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the cgroup (v2, or v1's cpu controller) grants, the least over its ancestors; None: no limit."""
    quotas = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        base = root if controllers == "" else root / controllers
        folder = base / name.lstrip("/")
        for place in (folder, *folder.parents):
            quotas.append(_quota_of(place))
            if place == base:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def resolve(spec: str) -> tuple[DeviceSpec, ...]:
    """Turn a `--devices` argument into devices.

    `auto`, `cpu`, `cpu:N`, `null:N`, joined by `+`; `@backend` after one picks its backend. Cores are split between the CPU processes of
    the whole list, as evenly as they go; where there are more processes than cores, they take turns.

    Raises:
        UsageError: it is misspelt. DeviceError: the device is not to be had.
    """
    asked: list[tuple[str, str, int]] = []
    for item in spec.split("+"):
        match = _ITEM.fullmatch("cpu" if item == "auto" else item)
        if not match:
            raise UsageError(f"--devices {spec}: {item!r} is not a device. Write auto, cpu, or cpu:N, joined by +.")
        kind, ids, backend = match["kind"], match["ids"], match["backend"]
        if kind in _PLANNED:
            raise DeviceError(f"--devices {spec}: {_PLANNED[kind]}")
        if kind not in _BACKENDS:
            raise UsageError(f"--devices {spec}: {kind!r} is not a kind of device. Known: auto, {', '.join(_BACKENDS)}.")
        backend = backend or DEFAULT_BACKENDS[kind]
        if backend not in _BACKENDS[kind]:
            raise UsageError(f"--devices {spec}: {kind} has no backend {backend!r}. Known: {', '.join(_BACKENDS[kind])}.")
        if ids is not None and (not ids.isdecimal() or not 1 <= int(ids) <= 512):
            raise UsageError(f"--devices {spec}: {kind}:N takes one number from 1 to 512, not {ids}.")
        asked += [(kind, backend, 0)] * int(ids or 1)
    shares = split_cores(usable_cores(), len(asked))
    numbers: Counter[str] = Counter()
    devices = []
    for (kind, backend, device_id), cores in zip(asked, shares, strict=True):
        devices.append(DeviceSpec(f"{kind}#{numbers[kind]}", kind, backend, cores, device_id))
        numbers[kind] += 1
    return tuple(devices)


def split_cores(cores: list[int], processes: int) -> list[tuple[int, ...]]:
    """Deal cores to processes: neighbouring runs whose lengths differ by at most one, or one core each in turn."""
    if processes >= len(cores):
        return [(cores[number % len(cores)],) for number in range(processes)]
    least, more = divmod(len(cores), processes)
    ends = [number * least + min(number, more) for number in range(processes + 1)]
    return [tuple(cores[start:end]) for start, end in pairwise(ends)]


def offers() -> list[dict[str, Any]]:
    """What this machine offers, for `imagemill devices`: `devices` (what to type), `what` it is, and `notes`."""
    cores = usable_cores()
    flags = processor_flags()
    precisions = ["fp32"] + (["bf16"] if flags & {"avx512_bf16", "amx_bf16"} else []) + ["int8"]
    units = [name for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2") if name in flags]
    quota = cgroup_quota()
    notes = [
        f"cores {', '.join(map(str, cores))}" + (f" (cgroup quota: {quota:g})" if quota is not None else ""),
        f"backend openvino, precisions with hardware support: {', '.join(precisions)}",
        "`auto` means this: one process, all cores",
    ]
    if units:
        notes.insert(1, f"vector units: {', '.join(units)}")
    return [{"devices": "cpu", "what": f"{len(cores)} of {os.cpu_count()} cores, {processor_name()}", "notes": notes}]


def machine() -> dict[str, str]:
    """What this machine is, for provenance."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor_name(),
        "cores": f"{len(usable_cores())} of {os.cpu_count()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "python": platform.python_version(),
    }


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction-set flags of the processor, as Linux names them; empty where unknown."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name for people."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
