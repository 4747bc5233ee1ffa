"""What this machine offers, for `imagemill devices`."""

from __future__ import annotations

import os
import sys
from typing import Any

from imagemill.pipeline.backends import BACKENDS, automatic, devices
from imagemill.records import Precision
from imagemill.system import cpu

_ONLY_ON = {"coreml": "darwin", "rocm": "linux"}


def offers() -> list[dict[str, Any]]:
    """What this machine offers, for `imagemill devices`.

    One dict for each kind: `devices` (what to type), `what` it is, `notes`, and `missing`: why it
    cannot be used and the line to type; None where it can.
    """
    found = [_cpu_offer()]
    for kind, what in devices.WHAT.items():
        if not sys.platform.startswith(_ONLY_ON.get(kind, "")):
            continue
        first, *others = devices.backends_of(kind)
        here = devices.search(kind, first)
        if here.missing:
            found.append({"devices": kind, "what": what, "notes": [], "missing": here.missing})
            continue
        computes = ", ".join(BACKENDS[first].kinds[kind])
        notes = [f"backend {first}, precisions: {computes}"]
        for backend in others:
            computes = f"precisions {', '.join(BACKENDS[backend].kinds[kind])}"
            notes.append(f"@{backend}: {devices.search(kind, backend).missing or computes}")
        ids = "1" if kind in devices.COUNTED else ",".join(map(str, range(len(here.devices))))
        names = ", ".join(here.devices)
        found.append({"devices": f"{kind}:{ids}", "what": names, "notes": notes, "missing": None})
    return found


def _automatic(cores: int) -> list[str]:
    """Return what `--devices auto` means here, and why GPUs are not used."""
    unused: list[str] = []
    typed = automatic.choose(None, notify=unused.append)
    processes = devices.parse(automatic.CPU)[0].processes(cores)
    here = (
        "this: one process"
        if processes == 1
        else f"cpu:{processes}: a process for every {devices.CORES_EACH} cores"
    )
    here += ", a stream and a decoding thread on each core"
    if typed != automatic.CPU:
        here = f"{typed} for jobs of {automatic.WORTHWHILE:,} images or more, else {here}"
    return [f"--devices auto means {here}", *unused]


def _cpu_offer() -> dict[str, Any]:
    cores = cpu.usable_cores()
    flags = cpu.flags()
    faster = {
        one: unit for one in (Precision.INT8, Precision.BF16) if (unit := cpu.unit(one, flags))
    }
    if faster:
        precision = (
            f"{', else '.join(faster)}, if the model passed the accuracy check in it; else fp32"
        )
    else:
        precision = "fp32: this processor has no units that make int8 or bf16 faster"
    units = cpu.vector_units(flags)
    quota = cpu.cgroup_quota()
    notes = [
        f"cores {', '.join(map(str, cores))}"
        + (f" (cgroup quota: {quota:g})" if quota is not None else ""),
        f"backend openvino: fp32{''.join(f', {one} by {unit}' for one, unit in faster.items())}",
        "@torch: " + (devices.search("cpu", "torch").missing or "precisions fp32, bf16"),
        "@onnxruntime: " + (devices.search("cpu", "onnxruntime").missing or "precisions fp32"),
        f"--precision auto means {precision}",
        *_automatic(len(cores)),
    ]
    if units:
        notes.insert(1, f"vector units: {', '.join(units)}")
    return {
        "devices": "cpu",
        "what": f"{len(cores)} of {os.cpu_count()} cores, {cpu.name()}",
        "notes": notes,
        "missing": None,
    }
