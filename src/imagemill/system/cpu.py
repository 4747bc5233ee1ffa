"""The CPU of this machine, and how processes share its cores."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Collection, Container, Mapping, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Final

from imagemill.records import Precision

_UNITS = "amx_int8 amx_bf16 avx512_vnni avx512_bf16 avx_vnni avx512f avx2 i8mm asimddp".split()
_FASTER: Final[Mapping[Precision, tuple[str, ...]]] = {
    Precision.INT8: ("amx_int8", "avx512_vnni", "avx_vnni"),
    Precision.BF16: ("amx_bf16", "avx512_bf16"),
}
_CPUINFO = Path("/proc/cpuinfo")


def flags(cpuinfo: Path = _CPUINFO) -> set[str]:
    """Instruction-set flags, as Linux names them; empty where unknown."""
    return set(_value(cpuinfo, "flags", "features").split())


def _value(cpuinfo: Path, *keys: str) -> str:
    """Return the first value of one of these keys; empty if there is none."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(keys):
                return line.partition(":")[2].strip()
    return ""


def vector_units(known: Container[str]) -> list[str]:
    """Those of a processor's flags that name the units which libraries choose their kernels by,
    widest first.
    """
    return [name for name in _UNITS if name in known]


def unit(precision: Precision, known: Container[str]) -> str | None:
    """The flag of the unit that makes a precision faster than fp32, the widest there is; None: the
    processor has none.
    """
    return next((name for name in _FASTER.get(precision, ()) if name in known), None)


def name(cpuinfo: Path = _CPUINFO) -> str:
    """Its name for people."""
    # `platform.processor` would start a process.
    return _value(cpuinfo, "model name") or platform.machine()


def usable_cores() -> list[int]:
    """Return the numbers of the CPU cores that this process may use: those of its affinity, as many
    as the cgroup's quota allows.
    """
    known = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    quota = cgroup_quota()
    return cores if quota is None else cores[: max(1, min(len(cores), ceil(quota)))]


def cgroup_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return how many cores' worth of time the cgroup and its ancestors allow; None: no limit.

    Reads cgroups v2, and the cpu controller of v1.
    """
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


def split_cores(cores: list[int], processes: int) -> list[tuple[int, ...]]:
    """Return the cores of each process: neighbouring ones, whose numbers differ by at most one. If
    there are more processes than cores, each has one core, in turn.
    """
    if processes >= len(cores):
        return [(cores[number % len(cores)],) for number in range(processes)]
    least, more = divmod(len(cores), processes)
    ends = [number * least + min(number, more) for number in range(processes + 1)]
    return [tuple(cores[start:end]) for start, end in pairwise(ends)]


def share_cores(cores: list[int], near: Sequence[Collection[int]]) -> list[tuple[int, ...]]:
    """Return the cores of each process: as many as `split_cores` gives it, near ones first.

    Args:
        cores: to share.
        near: for each process, the cores near its device; empty if none are nearer than others.
    """
    shares = split_cores(cores, len(near))
    if len(near) >= len(cores):
        return shares
    free, chosen = list(cores), [list[int]() for _ in near]
    for node in dict.fromkeys(map(frozenset, near)):
        members = [number for number, others in enumerate(near) if set(others) == node]
        local = [core for core in free if core in node]
        if not local:
            continue
        runs = split_cores(local, len(members))[: len(local)]
        for number, run in zip(members, runs, strict=False):
            chosen[number] = list(run[: len(shares[number])])
            free = [core for core in free if core not in chosen[number]]
    for mine, share in zip(chosen, shares, strict=True):
        while len(mine) < len(share):
            mine.append(free.pop(0))
    return [tuple(sorted(mine)) for mine in chosen]
