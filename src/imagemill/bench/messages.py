"""Messages between `imagemill bench` and the processes that measure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from imagemill.records import DeviceSpec, Job, Lease, MemoryTraffic, SessionSpec

# parent                        process that measures
# Begin ───────────────────────►
#       ◄─────────────────────── Ready, or Failed
# Compute, Decode ─────────────►
#       ◄─────────────────────── Measured, or Failed
# Stop ────────────────────────►


class Begin(Struct, frozen=True):
    """The first message: what to compile, and for which device."""

    spec: SessionSpec
    device: DeviceSpec


class Ready(Struct, frozen=True):
    """The session is compiled."""

    versions: Mapping[str, str] = {}
    traffic: MemoryTraffic | None = None
    """What the device's memory allows; None if that is not known."""


class Compute(Struct, frozen=True):
    """Send this many synthetic batches through the session."""

    batches: int


class Decode(Struct, frozen=True):
    """Decode these shards into batches and discard them."""

    job: Job
    leases: tuple[Lease, ...]


class Measured(Struct, frozen=True):
    """How long one order took."""

    images: int
    begun_s: float
    """Monotonic clock, which all processes of a machine share."""
    ended_s: float
    transfer_s: float = 0.0
    """Copies between host and device; 0 if the device does not tell."""

    @property
    def images_per_second(self) -> float:
        """Rate of this process."""
        return self.images / (self.ended_s - self.begun_s)
