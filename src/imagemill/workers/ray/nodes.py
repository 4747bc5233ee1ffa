"""The nodes of a Ray cluster, and what a `--devices` argument means on them. Nothing here asks
Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagemill.pipeline.backends import devices
from imagemill.records import DeviceSpec

_GPUS = ("cuda", "rocm")
"""Kinds of devices that Ray counts as GPU; cores it counts as CPU, all others as resources of the
kind's own name.
"""
_ON_CORES = ("cpu", "null")


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster."""

    id: str
    name: str
    """For people: address, or the name it was given, and the beginning of its id."""
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Place:
    """Room for one worker on a node."""

    node: Node
    kind: str
    backend: str
    index: int
    """Which of its kind it is on its node."""
    order: int
    """Which of all workers on its node."""
    of: int
    """How many workers the node has."""
    cpus: float
    """Of the node's, for this worker."""

    @property
    def key(self) -> tuple[str, str, int]:
        """Tells it from all others."""
        return self.node.id, self.kind, self.index

    def device(self, number: int) -> DeviceSpec:
        """The device there, under a name that is its own in the whole cluster. Ray shows a worker
        its GPU alone, which so is number 0.
        """
        number_here = 0 if self.kind in (*_ON_CORES, *_GPUS) else self.index
        return DeviceSpec(
            f"{self.kind}#{number}",
            self.kind,
            self.backend,
            tuple(range(max(1, int(self.cpus)))),
            number_here,
        )

    def resources(self) -> dict[str, Any]:
        """What Ray is asked for."""
        wanted: dict[str, Any] = {"num_cpus": self.cpus}
        if self.kind in _GPUS:
            wanted["num_gpus"] = 1
        elif self.kind not in _ON_CORES:
            wanted["resources"] = {self.kind: 1}
        return wanted


def places(node: Node, asked: Sequence[devices.Asked]) -> list[Place]:
    """What a `--devices` argument means on a node: on each the same, as far as it goes.

    `cpu` is one worker with all CPUs that the node gives Ray, `cpu:N` are N that share them; `cuda`
    is one worker for each of its GPUs, and `cuda:0,1` for two of them; `ipu:N` are as many of its
    resource `ipu`, N at most. A node that offers nothing of a kind has none.
    """
    cpus = int(node.resources.get("CPU", 0))
    found: list[tuple[str, str, int]] = []
    for item in asked:
        there = int(node.resources.get("GPU" if item.kind in _GPUS else item.kind, 0))
        if item.kind in _ON_CORES:
            count = item.processes(cpus) if cpus else 0
        elif item.ids.isdecimal() and item.kind == "ipu":
            count = min(there, int(item.ids))
        elif item.kind == "ipu":
            count = min(there, 1)
        else:
            count = min(there, len(item.ids.split(",")) if item.ids else there)
        before = sum(kind == item.kind for kind, _, _ in found)
        found += [(item.kind, item.backend, before + number) for number in range(count)]
    return [
        Place(node, kind, backend, index, order, len(found), share)
        for order, ((kind, backend, index), share) in enumerate(
            zip(found, _shares(cpus, len(found)), strict=True)
        )
    ]


def _shares(cpus: int, processes: int) -> list[float]:
    """CPUs of each process: whole ones as even as they go, as Ray wants them; parts of one where
    there are more processes than CPUs.
    """
    if processes > cpus:
        return [cpus / processes] * processes
    return (
        [float(len(share)) for share in devices.split_cores(list(range(cpus)), processes)]
        if processes
        else []
    )


def offer(node: Node) -> str:
    """What a node has, for people."""
    counted = {
        name: amount
        for name, amount in node.resources.items()
        if ":" not in name and "memory" not in name
    }
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(counted.items())) or "nothing"
