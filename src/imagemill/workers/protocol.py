"""The messages between launcher and worker, pickled over one socket pair per worker, and the events
that a pool of workers reports.

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

from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct, field

from imagemill.records import Clock, DeviceSpec, Job, Receipt
from imagemill.system.processes import Failed

if TYPE_CHECKING:
    from imagemill.workers.local import LocalPool
    from imagemill.workers.ray.pool import RayPool

WorkerPool: TypeAlias = "LocalPool | RayPool"
"""The launcher's view of its workers, wherever they run. `LocalPool` says what the methods promise.

A pool runs one worker process per device, each under a `Supervisor`. It forwards the messages
below and reports exits. The launcher makes all scheduling decisions.
"""


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


class Died(Struct, frozen=True):
    """A worker's process ended, as its supervisor saw. `WorkerPool.restart` starts it again."""

    pid: int
    reason: str
    """The end of a sentence about it: `was killed by SIGKILL`, `ended with exit code 1`."""
    active: tuple[int, ...]
    """Indices of the images that its decoding threads worked on; empty if it was not ready."""
    timed_out: tuple[int, ...]
    """Those of them that it was killed for."""
    log_tail: str
    """The last lines of its log, with a heading."""


class Lost(Struct, frozen=True):
    """A worker is gone together with its supervisor. The pool replaces it as soon as it can."""

    reason: str
    with_machine: bool
    """Whether its machine is gone too, so that the worker's own work is not to blame."""


class Joined(Struct, frozen=True):
    """A worker is being started on a new device, or again on one that was lost."""

    device: DeviceSpec


class Event(Struct, frozen=True):
    """A message from one device's worker, or news about it."""

    device: str
    message: Ready | Want | Idle | Done | Failed | Died | Lost | Joined


class WorkerStatus(Struct, frozen=True):
    """How far a worker's process is, according to its heartbeat."""

    rows: int = 0
    """Rows with an answer since the process began, committed or not."""
    clock: Clock = field(default_factory=Clock)
