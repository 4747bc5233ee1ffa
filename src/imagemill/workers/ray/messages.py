"""The messages between the launcher's machine and the actors on the nodes of a Ray cluster.

RayPool                       actor, with a NodeAgent
hello(backends) ─────────────►
                ◄───────────── Identity
prepare(Assignment) ─────────►
                ◄───────────── Checked, or Failed    the model is sent with a second `prepare`,
                                                      if the node lacks it
turn(messages) ──────────────►
                ◄───────────── Report, or Failed      as soon as the worker has sent something
end() ───────────────────────►
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from imagemill.records import DeviceSpec, Job
from imagemill.system.processes import Failed
from imagemill.workers.protocol import Died, Done, Idle, Ready, Want, WorkerStatus
from imagemill.workers.ray.nodes import Place


class Identity(Struct, frozen=True):
    """What decides the last bits of a machine's answers."""

    versions: Mapping[str, str]
    """Library → version."""
    vector_units: str
    """Of the processor."""


class ModelFile(Struct, frozen=True):
    """One file of the model."""

    name: str
    sha256: str


class Sample(Struct, frozen=True):
    """A planned image as the launcher's machine reads it."""

    source: int
    """Position of its source."""
    path: bytes
    locator: bytes
    sha256: str
    """Of its encoded bytes."""


class Assignment(Struct, frozen=True):
    """What a node agent needs to know to begin."""

    job: Job
    """The frozen job."""
    device: DeviceSpec
    """The number of its `cores` counts; the node chooses which."""
    place: Place
    launch: str
    """The expected content of `JobPaths.launch`."""
    plan_nonces: tuple[str, ...]
    sources: tuple[str, ...]
    """Those that the uncommitted shards have images of."""
    model: tuple[ModelFile, ...]
    """The file to compile, then the files beside it that it reads."""
    samples: tuple[Sample, ...]


class Checked(Struct, frozen=True):
    """The node passed its checks."""

    lacks_model: bool
    """Whether the model must be sent before the worker can start."""


class Restart(Struct, frozen=True):
    """Tells a node agent to start its worker again."""


class Report(Struct, frozen=True):
    """The result of one turn."""

    messages: tuple[Ready | Want | Idle | Done | Failed | Died, ...]
    status: WorkerStatus
