"""NVIDIA GPUs as the driver shows them, without any library of CUDA's."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from imagemill.pipeline.backends.base import Found
from imagemill.records import DeviceSpec

_PROCESSORS: Final = 16
_MEMORY_CLOCK: Final = 36
_BUS_WIDTH: Final = 37
_MAJOR: Final = 75
_MINOR: Final = 76
"""The driver's numbers of a GPU's attributes: multiprocessors, memory clock in kHz, width of the
memory bus in bits, and the two parts of the compute capability.
"""
_PCI: Final = Path("/sys/bus/pci/devices")
_VENDOR: Final = "0x10de"


def find_gpus() -> Found:
    """Return the GPUs that the NVIDIA driver shows to this process, in the order of their ids."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        here = "" if Path("/dev/nvidiactl").exists() else " and /dev/nvidiactl is not there"
        return Found(
            (),
            f"No NVIDIA driver: libcuda.so.1 cannot be loaded{here}. Install it: `nvidia-smi`"
            " must list the GPU.",
        )
    count, code = ctypes.c_int(), driver.cuInit(0)
    code = code or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        said = f"answers with error {code}" if code else "shows none"
        return Found(
            (), f"No NVIDIA GPU: the driver {said}. See `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        )
    names = []
    for number in range(count.value):
        name = ctypes.create_string_buffer(100)
        driver.cuDeviceGetName(name, 100, number)
        text = name.value.decode(errors="backslashreplace") or f"GPU {number}"
        # A part of a GPU has the name of the whole one, but fewer multiprocessors.
        names.append(f"{text} ({_attribute(driver, _PROCESSORS, number)} SMs)")
    return Found(tuple(names))


class Traits(Struct, frozen=True):
    """What decides whether `auto` uses a GPU."""

    capability: tuple[int, int]
    """Compute capability: (9, 0) for an H100."""
    rank: tuple[int, int]
    """Larger for a faster GPU: memory bandwidth, which bounds most networks, then
    multiprocessors.
    """


def traits(number: int) -> Traits:
    """Return the traits of a GPU that `find_gpus` found."""
    driver = ctypes.CDLL("libcuda.so.1")

    read = partial(_attribute, driver, number=number)
    bandwidth = read(_MEMORY_CLOCK) * read(_BUS_WIDTH)
    return Traits((read(_MAJOR), read(_MINOR)), (bandwidth, read(_PROCESSORS)))


def is_card_here(pci: Path = _PCI) -> bool:
    """Return whether an NVIDIA GPU is in this machine, with or without a driver."""
    for device in pci.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _VENDOR and kind.startswith("0x03"):  # a display or 3D controller
            return True
    return False


def _attribute(driver: ctypes.CDLL, attribute: int, number: int) -> int:
    """Return an attribute of a GPU; 0 if the driver does not know it."""
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
    return max(0, value.value)


def free_memory(number: int) -> int | None:
    """Return the free memory of a GPU in bytes, or None if the driver does not tell.

    Unlike a question to CUDA, this takes no memory on the GPU.
    """
    sizes = (ctypes.c_ulonglong * 3)()
    with _in_nvml(number) as found:
        if found is None or found.library.nvmlDeviceGetMemoryInfo(found.handle, sizes):
            return None
    return int(sizes[1])  # total, free, used


class Identity(Struct, frozen=True):
    """Which GPU it is, whatever this process sees of the others."""

    uuid: str
    """As CUDA_VISIBLE_DEVICES takes it: `GPU-…`, or `MIG-…` for a part of a GPU."""
    pci: str
    """Its address, as Linux names it: `0000:3b:00.0`; empty if the driver does not tell."""


def identify(number: int) -> Identity | None:
    """Return the identity of a GPU that `find_gpus` found, or None if the driver does not tell."""
    with _in_nvml(number) as found:
        if found is None:
            return None
        text = ctypes.create_string_buffer(32)
        ask = getattr(found.driver, "cuDeviceGetPCIBusId", None)
        known = ask is not None and ask(text, len(text), number) == 0
        return Identity(found.uuid, text.value.decode().lower() if known else "")


def near_cores(identity: Identity | None, pci: Path = _PCI) -> set[int]:
    """Return the CPU cores on a GPU's own node, empty if that is not known."""
    try:
        text = (pci / identity.pci / "local_cpulist").read_text() if identity else ""
        ranges = [part.partition("-") for part in text.strip().split(",") if part]
        return {n for low, _, high in ranges for n in range(int(low), int(high or low) + 1)}
    except (OSError, ValueError):
        return set()


def pinned(device: DeviceSpec) -> tuple[DeviceSpec, Mapping[str, str]]:
    """Return a device as a process of its own sees it, and the environment of that process.

    The process sees no other GPU, so it can neither take memory on one nor count differently. Any
    other device stays as it is.
    """
    if not device.uuid:
        return device, {}
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": device.uuid}
    return replace(device, id=0), variables


class _InNvml(Struct, frozen=True):
    driver: ctypes.CDLL
    library: ctypes.CDLL
    handle: ctypes.c_void_p
    uuid: str


@contextlib.contextmanager
def _in_nvml(number: int) -> Iterator[_InNvml | None]:
    """Look a GPU up in NVML by its UUID, because NVML counts all GPUs and CUDA the visible ones."""
    try:
        driver, library = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    raw, handle = ctypes.create_string_buffer(16), ctypes.c_void_p()
    # Of a part of a GPU, the first version returns the whole one's.
    ask = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
    if driver.cuInit(0) or ask(raw, number) or library.nvmlInit_v2():
        yield None
        return
    try:
        names = [f"{kind}-{UUID(bytes=raw.raw)}" for kind in ("GPU", "MIG")]
        for name in names:
            if library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) == 0:
                yield _InNvml(driver, library, handle, name)
                return
        yield None
    finally:
        library.nvmlShutdown()
