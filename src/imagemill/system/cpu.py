"""The CPU of this machine, as far as the system tells."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Final

from imagemill.records import Precision

_UNITS = (
    "amx_int8",
    "amx_bf16",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "avx512f",
    "avx2",
    "i8mm",
    "asimddp",
)
_FASTER: Final[Mapping[Precision, tuple[str, ...]]] = {
    Precision.INT8: ("amx_int8", "avx512_vnni", "avx_vnni"),
    Precision.BF16: ("amx_bf16", "avx512_bf16"),
}
_CPUINFO = Path("/proc/cpuinfo")


def flags(cpuinfo: Path = _CPUINFO) -> set[str]:
    """Instruction-set flags, as Linux names them; empty where unknown."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


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
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
