"""The messages between launcher and worker, pickled over one socket pair per worker.

launcher                      worker
Begin ───────────────────────►
      ◄─────────────────────── Ready
      ◄─────────────────────── Want             it has begun its last lease, or has none
Lease or Pause ──────────────► (at once)        Pause: no lease for now; finish those in flight
      ◄─────────────────────── Done(receipt)
      ◄─────────────────────── Idle             it was paused, and nothing is in flight any more
Lease or Stop ───────────────►
      ◄─────────────────────── Failed           an error that a restart would not fix

`Stop` and `Failed` are those of `system.processes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagemill.records import Clock, DeviceSpec, Job, Receipt


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: the job and the device."""

    job: Job
    device: DeviceSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """The session is compiled."""

    pid: int
    """Of the worker's process."""


@dataclass(frozen=True, slots=True)
class Want:
    """A request for a lease, answered at once."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The answer that there is no lease for now."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Done:
    """A part was committed."""

    receipt: Receipt
    clock: Clock
