"""Messages between `imagemill bench` and the processes that measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imagemill.records import DeviceSpec, Job, Lease, MemoryTraffic, SessionSpec

# parent                        process that measures
# Begin ───────────────────────►
#       ◄─────────────────────── Ready, or Failed
# Compute, Decode ─────────────►
#       ◄─────────────────────── Measured, or Failed
# Stop ────────────────────────►


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: what to compile, and for which device."""

    spec: SessionSpec
    device: DeviceSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """The session is compiled."""

    backend: str
    versions: Mapping[str, str] = field(default_factory=dict)
    traffic: MemoryTraffic | None = None
    """What the device's memory allows; None if that is not known."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Send this many synthetic batches through the session."""

    batches: int


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode these shards into batches and discard them."""

    job: Job
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """How long one order took."""

    images: int
    begun_s: float
    """Monotonic clock, which all processes of a machine share."""
    ended_s: float
    read_s: float = 0.0
    """Summed over decoding threads: fetching bytes."""
    decode_s: float = 0.0
    """Summed over decoding threads: CPU time of decoding."""
    transfer_s: float = 0.0
    """Copies between host and device; 0 if the device does not tell."""

    @property
    def images_per_second(self) -> float:
        """Rate of this process."""
        return self.images / (self.ended_s - self.begun_s)
