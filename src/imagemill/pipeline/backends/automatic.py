"""What `--devices auto` means for a new job: NVIDIA GPUs, or the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Final

from imagemill.errors import counted
from imagemill.pipeline.backends import BACKENDS, devices, nvidia
from imagemill.records import Precision
from imagemill.system.messages import Notify

CPU: Final = "auto"
"""The `--devices` argument in `job.json` if `auto` means the CPU. A resumed job resolves it again,
so it may continue with another number of cores.
"""
WORTHWHILE: Final = 1_000
"""Images from which a job uses a GPU. Its start takes an estimated 4 to 8 s (importing PyTorch,
taking memory, recording a graph). In 5 s, 16 cores compute about 1,000 images of resnext101_32x4d
in fp32.
"""
_CAPABILITY: Final = (7, 0)
"""Of the first GPUs with tensor cores, and the oldest that today's PyTorch supports."""
_FREE: Final = 2 * 10**9
"""Bytes of free memory below which no job is tried: CUDA itself takes about 0.5 GB, and the
smallest batches of a large network about 1 GB.
"""
_KIND: Final = "cuda"


def choose(
    images: int | None, precision: str | None = None, notify: Notify = lambda _: None
) -> str:
    """Return the `--devices` argument that `auto` means: all usable GPUs of the best model, if the
    job is worth their start, else the CPU.

    Args:
        images: of the job; None: many.
        precision: the `--precision` setting. If only GPUs or only the CPU compute in it, this
            decides.
        notify: receives one line for each model of GPU that is not used, with the reason and what
            to type.
    """
    found = nvidia.find_gpus()
    if not found.devices:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        if found.missing and not hidden and nvidia.is_card_here():
            notify(f"an NVIDIA GPU is not used: {found.missing}")
        return CPU
    reasons = _reasons(found.devices, images, precision)
    unused = Counter((found.devices[number], reason) for number, reason in reasons.items())
    for (name, reason), count in unused.items():
        are = "is" if count == 1 else f"(× {count}) are"
        notify(f"{name} {are} not used: {reason}")
    chosen = [number for number in range(len(found.devices)) if number not in reasons]
    if not chosen:
        return CPU
    return _KIND if len(chosen) == len(found.devices) else spell(chosen)


def spell(numbers: Iterable[int]) -> str:
    """Return the `--devices` argument for some GPUs."""
    return f"{_KIND}:{','.join(map(str, numbers))}"


def _reasons(names: tuple[str, ...], images: int | None, precision: str | None) -> dict[int, str]:
    """Return why GPUs are not used, by number; those that are used are absent."""
    every = range(len(names))
    backend = devices.backends_of(_KIND)[0]
    if missing := devices.search(_KIND, backend).missing:
        return dict.fromkeys(every, missing)
    traits = [nvidia.traits(number) for number in every]
    reasons = {
        number: reason
        for number in every
        if (reason := _unusable(number, traits[number].capability))
    }
    usable = [number for number in every if number not in reasons]
    asked = None if precision in (None, "auto") else Precision(precision)
    if asked and asked not in BACKENDS[backend].kinds[_KIND]:
        return reasons | dict.fromkeys(usable, f"it does not compute in {asked}.")
    only_there = asked and asked not in BACKENDS[devices.backends_of("cpu")[0]].kinds["cpu"]
    if images is not None and images < WORTHWHILE and not only_there:
        few = f"for {counted(images, 'image')} its start takes too long."
        few += f" To use it: --devices {_KIND}"
        return reasons | dict.fromkeys(usable, few)
    best = max(usable, key=lambda number: traits[number].rank, default=None)
    return reasons | {
        number: f"its last bits differ from those of {names[best]}, which is faster. To use it in a"
        f" job of its own: --devices {spell([number])}"
        for number in usable
        if best is not None and names[number] != names[best]
    }


def _unusable(number: int, capability: tuple[int, int]) -> str | None:
    if capability < _CAPABILITY:
        needed, found = ("{}.{}".format(*pair) for pair in (_CAPABILITY, capability))
        return f"its compute capability is {found}, and {needed} is needed."
    free = nvidia.free_memory(number)
    if free is not None and free < _FREE:
        return (
            f"{free / 1e9:.1f} GB of its memory are free, and {_FREE / 1e9:.0f} are needed. Free"
            f" memory, or try it: --devices {spell([number])}"
        )
    return None
