"""The CPU of this machine, as far as the system tells."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Container
from pathlib import Path

_UNITS = ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp")
_CPUINFO = Path("/proc/cpuinfo")


def flags(cpuinfo: Path = _CPUINFO) -> set[str]:
    """Instruction-set flags, as Linux names them; empty where unknown."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


def vector_units(known: Container[str]) -> list[str]:
    """Those of a processor's flags that name the units which libraries choose their kernels by, widest first."""
    return [name for name in _UNITS if name in known]


def name(cpuinfo: Path = _CPUINFO) -> str:
    """Its name for people."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
