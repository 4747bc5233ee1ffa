"""What a `--devices` argument means, and what follows from the devices of a job."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from math import ceil

from msgspec import Struct

from imagemill.errors import DeviceError, UsageError
from imagemill.pipeline.backends import (
    BACKENDS,
    depends_on_batch,
    installed_versions,
    library_versions,
    look_for,
    nvidia,
)
from imagemill.pipeline.backends.base import Found
from imagemill.records import DeviceSpec, Precision
from imagemill.system import cpu

_ITEM = re.compile(r"(?P<kind>[a-z]+)(?::(?P<ids>[0-9,]+))?(?:@(?P<backend>[a-z]+))?")
COUNTED = ("cpu", "ipu", "null")
"""Kinds of which `kind:N` means N processes or devices, chosen by the system or the backend. Of all
other kinds, `kind:I,J` means the devices with these ids.
"""
_MOST = 512
CORES_EACH = 16
"""Of one of `auto`'s processes: what Python does for each image is done under one lock a process,
which ends at 4,000 to 6,000 images/s (docs/performance.md).
"""
WHAT = {
    "cuda": "NVIDIA GPUs",
    "gpu": "Intel GPUs",
    "npu": "Intel NPU",
    "ipu": "Graphcore IPUs",
    "rocm": "AMD GPUs",
    "coreml": "Apple Neural Engine and GPU",
}
"""For people, in the order of display."""


def cores_here(chosen: Iterable[DeviceSpec]) -> tuple[int, ...]:
    """The cores of these devices, for work beside theirs; all that this process may use if they
    are on other machines.
    """
    usable = cpu.usable_cores()
    return tuple(
        core for core in usable if any(core in device.cores for device in chosen)
    ) or tuple(usable)


class Asked(Struct, frozen=True):
    """One item of a `--devices` argument."""

    kind: str
    ids: str
    """What was typed after the colon: a number for kinds in `COUNTED`, else ids joined by commas.
    Empty if nothing was typed; `auto` if the item is `auto`.
    """
    backend: str

    def processes(self, cores: int) -> int:
        """How many processes an item means that asks for a number of them, on a machine of so many
        cores.
        """
        return ceil(cores / CORES_EACH) if self.ids == "auto" else int(self.ids or 1)


def parse(spec: str) -> list[Asked]:
    """What a `--devices` argument asks for, item by item; nothing is looked for. Raises: UsageError
    where it is misspelt.
    """
    return [Asked(*_parse(spec, item)) for item in spec.split("+")]


def resolve(spec: str) -> tuple[DeviceSpec, ...]:
    """Turn a `--devices` argument into devices, and look whether they are there.

    `auto`, a CPU process for every 16 cores; `cpu`, `cpu:N`, `ipu:N`, `null:N`; `cuda` for all of
    them and `cuda:I,J` by id, and so with `gpu`, `npu`, …; joined by `+`; `@backend` after one
    picks its backend. Cores are split between the processes of the whole list, as evenly as they
    go, those near a GPU first to its process; where there are more processes than cores, they take
    turns.

    Raises:
        UsageError: it is misspelt. DeviceError: the device is not to be had; says what is missing,
        and the line to type.
    """
    asked = parse(spec)  # all of it before anything is looked for
    cores = cpu.usable_cores()
    found: dict[tuple[str, str], Found] = {}
    places: list[tuple[str, str, int]] = []
    for item in asked:
        kind, ids, backend = item.kind, item.ids, item.backend
        if kind not in BACKENDS[backend].anywhere and (kind, backend) not in found:
            found[kind, backend] = search(kind, backend)
            if missing := found[kind, backend].missing:
                raise DeviceError(
                    f"--devices {spec}: {missing}"
                    + ("" if kind == "cpu" else " Until then: --devices cpu.")
                )
        here = found.get((kind, backend), Found()).devices
        if kind in COUNTED:
            taken = sum(place[0] == kind for place in places)
            chosen = list(range(taken, taken + item.processes(len(cores))))
        else:
            chosen = [int(number) for number in ids.split(",")] if ids else list(range(len(here)))
        for number in chosen:
            # How many IPUs are free shows when they are attached to.
            if kind not in COUNTED and number >= len(here):
                there = ", ".join(f"{place} ({name})" for place, name in enumerate(here))
                raise DeviceError(
                    f"--devices {spec}: there is no {kind} {number} here; there are: {there}."
                )
            if any(place[0] == kind and place[2] == number for place in places):
                raise UsageError(f"--devices {spec}: {kind} {number} is named twice.")
            places.append((kind, backend, number))
    identities = [nvidia.identify(number) if kind == "cuda" else None for kind, _, number in places]
    shares = cpu.share_cores(cores, [nvidia.near_cores(identity) for identity in identities])
    return tuple(
        DeviceSpec(
            f"{kind}#{number}",
            kind,
            backend,
            share,
            0 if kind in ("cpu", "null") else number,
            _model(kind, number, found.get((kind, backend), Found())),
            uuid=identity.uuid if identity else "",
        )
        for (kind, backend, number), share, identity in zip(places, shares, identities, strict=True)
    )


def _model(kind: str, number: int, found: Found) -> str:
    """Return the name of a device's hardware."""
    if kind == "cpu":
        return cpu.name()
    names = found.devices
    return names[number] if number < len(names) else next(iter(names), "")


def _parse(spec: str, item: str) -> tuple[str, str, str]:
    """One item as kind, ids and backend. Raises: UsageError."""
    match = _ITEM.fullmatch("cpu" if item == "auto" else item)
    if not match:
        raise UsageError(
            f"--devices {spec}: {item!r} is not a device. Write auto, cpu, cpu:N, cuda:I,J or"
            " ipu:N, joined by +."
        )
    kind, ids, backend = match["kind"], match["ids"] or "", match["backend"]
    ids = "auto" if item == "auto" else ids
    kinds = list(dict.fromkeys(known for row in BACKENDS.values() for known in row.kinds))
    if kind not in kinds:
        raise UsageError(
            f"--devices {spec}: {kind!r} is not a kind of device. Known: auto, {', '.join(kinds)}."
        )
    backends = backends_of(kind)
    if backend and backend not in backends:
        raise UsageError(
            f"--devices {spec}: {kind} has no backend {backend!r}. Known: {', '.join(backends)}."
        )
    if kind in COUNTED:
        if ids not in ("", "auto") and not (ids.isdecimal() and 1 <= int(ids) <= _MOST):
            raise UsageError(
                f"--devices {spec}: {kind}:N takes one number from 1 to {_MOST}, not {ids}."
            )
    elif ids and not all(number.isdecimal() and int(number) < _MOST for number in ids.split(",")):
        raise UsageError(
            f"--devices {spec}: {kind}:I,J takes ids from 0 to {_MOST - 1}, joined by commas, not"
            f" {ids}."
        )
    return kind, ids, backend or backends[0]


def backends_of(kind: str) -> list[str]:
    """Return the backends that drive a kind of devices, the default first."""
    return [name for name, row in BACKENDS.items() if kind in row.kinds]


def search(kind: str, backend: str) -> Found:
    """Return what a backend finds. If its library fails, that is what is missing."""
    try:
        return look_for(backend, kind)
    except Exception as error:  # whatever another library, half installed, raises
        return Found(
            (),
            f"Looking for {WHAT.get(kind, kind)} by {backend} failed: {type(error).__name__}:"
            f" {error}.",
        )


def precisions(chosen: Sequence[DeviceSpec]) -> tuple[Precision, ...]:
    """The precisions that all of these devices compute in."""
    return tuple(
        one
        for one in Precision
        if all(one in BACKENDS[device.backend].kinds[device.kind] for device in chosen)
    )


def check_precision(setting: str | None, chosen: Sequence[DeviceSpec]) -> None:
    """Compare a `--precision` setting, None for `auto`, with what the devices compute in.

    Raises:
        UsageError: one of them does not; names it, and what all of them do.
    """
    wanted = Precision.FP32 if setting in (None, "auto") else Precision(setting)
    common = precisions(chosen)
    if wanted in common:
        return
    other = next(d for d in chosen if wanted not in BACKENDS[d.backend].kinds[d.kind])
    asked = "auto starts from fp32" if setting in (None, "auto") else wanted
    remedy = (
        f"Use --precision {' or '.join(common)}."
        if common
        else "The devices share no precision: give each a job of its own."
    )
    raise UsageError(
        f"--precision {asked}: {other.kind}@{other.backend} does not compute in it. {remedy}"
    )


def machine() -> dict[str, str]:
    """What this machine is, for provenance."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": cpu.name(),
        "cores": f"{len(cpu.usable_cores())} of {os.cpu_count()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "python": platform.python_version(),
    }


def versions_of(backends: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed libraries that decide answers: those that decode, and
    those of these backends.
    """
    found = installed_versions(("pillow", "simplejpeg", "numpy"))
    for backend in sorted(set(backends)):
        found |= library_versions(backend)
    return found


def vector_units(chosen: Sequence[DeviceSpec]) -> str:
    """Return the vector units of this machine's processor if they decide answers of these devices;
    else nothing.
    """
    if all(depends_on_batch(device.engine) for device in chosen):
        return ""
    return " ".join(cpu.vector_units(cpu.flags()))


def fixed_facts(chosen: Sequence[DeviceSpec], batch_size: int) -> dict[str, str]:
    """Return what decides the last bits of answers besides model, precision and backend.

    It is empty on CPUs with OpenVINO or ONNX Runtime, whose answers depend on none of it. On all
    other devices these are the model of the device, the versions of the libraries and the batch
    size.
    """
    bound = [device for device in chosen if depends_on_batch(device.engine)]
    if not bound:
        return {}
    facts = {"batch size": str(batch_size)}
    facts["device"] = ", ".join(sorted({device.model for device in bound}))
    for backend in sorted({device.backend for device in bound}):
        facts |= library_versions(backend)
    return facts


def backend_of(chosen: Sequence[DeviceSpec], allow_mixed: bool) -> str:
    """Return the backends of the devices, as the answer id names them. Raises: UsageError if
    several backends or models are mixed and that is not allowed.
    """
    backends = sorted({device.engine for device in chosen})
    if len(backends) > 1 and not allow_mixed:
        raise UsageError(
            f"--devices mixes the backends {' and '.join(backends)}, whose answers differ in the"
            " last bits. Add --allow-mixed."
        )
    models = sorted({device.model for device in chosen if depends_on_batch(device.engine)})
    if len(models) > 1 and not allow_mixed:
        raise UsageError(
            f"--devices mixes {' and '.join(models)}, whose answers differ in the last bits. Add"
            " --allow-mixed, or name devices of one model."
        )
    return "+".join(backends)
