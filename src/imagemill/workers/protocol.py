"""What launcher and worker say to each other, over one socket pair per worker. Pickled by
`multiprocessing.connection`.

launcher                      worker
Begin ───────────────────────►
      ◄─────────────────────── Ready
      ◄─────────────────────── Want             it has begun its last lease, or has none
Lease or Pause ──────────────► (at once)        Pause: nothing for now; finish what is in hand
      ◄─────────────────────── Done(receipt)
      ◄─────────────────────── Idle             paused, and nothing in hand any more
Lease or Stop ───────────────►
      ◄─────────────────────── Failed           an error that restarting would not mend
"""

from __future__ import annotations

from dataclasses import dataclass

from imagemill.records import Clock, DeviceSpec, Job, Receipt


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: what to do and on what."""

    job: Job
    device: DeviceSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """The session is compiled."""

    pid: int
    """Of the worker's process."""


@dataclass(frozen=True, slots=True)
class Want:
    """A lease is wanted now."""


@dataclass(frozen=True, slots=True)
class Pause:
    """There is no lease for now."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is in hand."""


@dataclass(frozen=True, slots=True)
class Done:
    """A part was committed."""

    receipt: Receipt
    clock: Clock
