"""NVIDIA GPUs as the driver shows them, without any library of CUDA's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from uuid import UUID

from imagemill.pipeline.backends.base import Found

_PROCESSORS = 16
"""The driver's number for the attribute "multiprocessor count"."""


def find_gpus() -> Found:
    """Return the GPUs that the NVIDIA driver shows to this process, in the order of their ids."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        here = "" if Path("/dev/nvidiactl").exists() else " and /dev/nvidiactl is not there"
        return Found(
            (),
            f"No NVIDIA driver: libcuda.so.1 cannot be loaded{here}. Install it until `nvidia-smi`"
            " lists the GPU.",
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
        processors = ctypes.c_int()  # a part of a GPU has the whole one's name, but fewer of them
        driver.cuDeviceGetAttribute(ctypes.byref(processors), _PROCESSORS, number)
        names.append(f"{text} ({processors.value} SMs)")
    return Found(tuple(names))


def free_memory(number: int) -> int | None:
    """Return the free memory of a GPU in bytes, or None if the driver does not tell.

    Asked of NVML by the GPU's UUID, because NVML counts all GPUs and CUDA only the visible ones.
    Unlike a question to CUDA, this takes no memory on the GPU.
    """
    try:
        driver, library = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    raw = ctypes.create_string_buffer(16)
    if driver.cuInit(0) or driver.cuDeviceGetUuid(raw, number) or library.nvmlInit_v2():
        return None
    sizes = (ctypes.c_ulonglong * 3)()
    handle = ctypes.c_void_p()
    try:
        for kind in ("GPU", "MIG"):  # a part of a GPU has a UUID of its own
            name = f"{kind}-{UUID(bytes=raw.raw)}".encode()
            if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
                continue
            if library.nvmlDeviceGetMemoryInfo(handle, sizes) == 0:
                return int(sizes[1])  # total, free, used
    finally:
        library.nvmlShutdown()
    return None
