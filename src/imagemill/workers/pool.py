"""The worker pool: the launcher's view of its workers, wherever they run.

A pool runs one worker process per device, each under a `Supervisor`: on this machine
(`workers.local`) or on the nodes of a cluster (`workers.ray.pool`). It forwards the messages of
`workers.protocol` and reports exits. The launcher makes all scheduling decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct, field

from imagemill.records import Clock, DeviceSpec, Lease
from imagemill.system.processes import Failed
from imagemill.workers.protocol import Done, Idle, Pause, Ready, Want


class Died(Struct, frozen=True):
    """A worker's process ended, as its supervisor saw. `WorkerPool.restart` starts it again."""

    pid: int
    reason: str
    """The end of a sentence about it: `was killed by SIGKILL`, `ended with exit code 1`."""
    ready: bool
    """Whether its session was compiled."""
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


class WorkerPool(Protocol):
    """The workers of one launch."""

    def start(self, limit: int) -> Sequence[DeviceSpec]:
        """Start at least one and at most `limit` workers, and return their devices."""
        ...

    def receive(self, seconds: float) -> Sequence[Event]:
        """Return events in order, as soon as there are any; nothing if none came in `seconds`."""
        ...

    def send(self, device: str, message: Lease | Pause) -> None:
        """Send a lease to an idle worker, or either message to one that sent `Want`."""
        ...

    def restart(self, device: str) -> None:
        """Start the process of a worker that died again."""
        ...

    def retire(self, device: str) -> bool:
        """Kill a worker for good. Return whether others are left, or were started for it."""
        ...

    def status(self, device: str) -> WorkerStatus:
        """Return how far a worker's process is."""
        ...

    def stop(self) -> None:
        """Let the workers end by themselves, once everything is committed."""
        ...

    def kill(self) -> None:
        """Kill all workers; none outlives this call."""
        ...
