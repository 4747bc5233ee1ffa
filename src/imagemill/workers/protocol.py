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

from msgspec import Struct

from imagemill.records import Clock, DeviceSpec, Job, Receipt


class Begin(Struct, frozen=True):
    """The first message: the job and the device."""

    job: Job
    device: DeviceSpec


class Ready(Struct, frozen=True):
    """The session is compiled."""

    pid: int
    """Of the worker's process."""


class Want(Struct, frozen=True):
    """A request for a lease, answered at once."""


class Pause(Struct, frozen=True):
    """The answer that there is no lease for now."""


class Idle(Struct, frozen=True):
    """Nothing is in flight."""


class Done(Struct, frozen=True):
    """A part was committed."""

    receipt: Receipt
    clock: Clock
