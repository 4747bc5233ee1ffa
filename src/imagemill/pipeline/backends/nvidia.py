"""NVIDIA GPUs as the driver shows them, without any library of CUDA's."""

from __future__ import annotations

import ctypes
from pathlib import Path

from imagemill.pipeline.backends.base import Found


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
        names.append(name.value.decode(errors="backslashreplace") or f"GPU {number}")
    return Found(tuple(names))
