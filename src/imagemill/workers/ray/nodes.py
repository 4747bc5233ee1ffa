"""The nodes of a Ray cluster, and what a `--devices` argument means on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from imagemill.pipeline.backends import devices
from imagemill.records import DeviceSpec
from imagemill.system import cpu

_GPUS = ("cuda", "rocm")
"""Kinds of devices that Ray counts as GPU. It counts cores as CPU, and any other kind as a resource
of that name.
"""
_ON_CORES = ("cpu", "null")


class Node(Struct, frozen=True):
    """A live node of the cluster."""

    id: str
    name: str
    """For people: its given name or address, and the start of its id."""
    resources: Mapping[str, float]


class Place(Struct, frozen=True):
    """Room for one worker on a node."""

    node: Node
    kind: str
    backend: str
    index: int
    """Position among the workers of its kind on the node."""
    order: int
    """Position among all workers on the node."""
    of: int
    """Number of workers on the node."""
    cpus: float
    """CPUs of the node for this worker."""

    @property
    def key(self) -> tuple[str, str, int]:
        """A key that no other place has."""
        return self.node.id, self.kind, self.index

    def device(self, number: int) -> DeviceSpec:
        """Return the device here, with a number that is unique in the cluster.

        Ray shows a worker only its own GPU, which therefore is number 0.
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
        """Return the resources to request from Ray."""
        wanted: dict[str, Any] = {"num_cpus": self.cpus}
        if self.kind in _GPUS:
            wanted["num_gpus"] = 1
        elif self.kind not in _ON_CORES:
            wanted["resources"] = {self.kind: 1}
        return wanted


def places(node: Node, asked: Sequence[devices.Asked]) -> list[Place]:
    """Return the places that a `--devices` argument means on a node.

    `cpu` is one worker with all CPUs that the node offers Ray, and `cpu:N` are N workers that share
    them. `cuda` is one worker for each GPU, and `cuda:0,1` is two of these. `ipu:N` are at most N
    workers, each with one of the node's resource `ipu`.
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
    """Return the CPUs of each process, divided evenly.

    Ray wants whole CPUs; if there are more processes than CPUs each gets a fraction.
    """
    if processes > cpus:
        return [cpus / processes] * processes
    shares = cpu.split_cores(list(range(cpus)), processes) if processes else []
    return [float(len(share)) for share in shares]


def offer(node: Node) -> str:
    """Describe what a node offers, for people."""
    counted = {
        name: amount
        for name, amount in node.resources.items()
        if ":" not in name and "memory" not in name
    }
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(counted.items())) or "nothing"
