"""The workers as the launcher sees them, wherever they are: what it hears of them, and what it can
tell them.

A crew drives one worker process per device, each under a `Supervisor`: those of this machine
(`engines.local`), or those of a cluster (`engines.ray_crew`). It deals nothing and decides nothing;
it carries the words of `wire` to and fro, and tells what befell its workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imagemill.records import Clock, DeviceSpec, Lease
from imagemill.system.processes import Failed
from imagemill.workers import protocol


@dataclass(frozen=True, slots=True)
class Died:
    """A worker's process is gone; who watched it has seen how. It is started again when the crew is
    told to.
    """

    pid: int
    how: str
    """The end of a sentence about it: `was killed by SIGKILL`, `ended with exit code 1`."""
    ready: bool
    """Whether its session had been compiled."""
    noted: tuple[int, ...]
    """Indices of the images that its decoding threads were at; none where it was not ready."""
    timed_out: tuple[int, ...]
    """Those for whose sake it was killed."""
    last_words: str
    """The end of its log, for people."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone together with whoever watched it; the crew has it again as soon as that is
    possible.
    """

    why: str
    with_machine: bool
    """Its machine is gone too: that says nothing against what the worker did."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is being started on a device that the launcher has not heard of, or not lately."""

    device: DeviceSpec


@dataclass(frozen=True, slots=True)
class Heard:
    """Something that was heard of one device's worker."""

    device: str
    message: (
        protocol.Ready
        | protocol.Want
        | protocol.Idle
        | protocol.Done
        | Failed
        | Died
        | Lost
        | Joined
    )


@dataclass(frozen=True, slots=True)
class Told:
    """How far a worker's process is, as its noteboard says."""

    rows: int = 0
    """That have their answers, committed or not, since the process began."""
    clock: Clock = field(default_factory=Clock)


class Crew(Protocol):
    """The workers of one launch."""

    def begin(self, most: int) -> Sequence[DeviceSpec]:
        """Start at most so many workers, at least one. Returns: their devices."""
        ...

    def wait(self, seconds: float) -> Sequence[Heard]:
        """What was heard, in order, as soon as there is something; nothing where nothing was for so
        long.
        """
        ...

    def answer(self, device: str, message: Lease | protocol.Pause) -> None:
        """Send a lease to a worker that is idle, or either to one that wants one."""
        ...

    def restart(self, device: str) -> None:
        """Start a worker again that has died."""
        ...

    def told(self, device: str) -> Told:
        """How far its process is."""
        ...

    def end(self) -> None:
        """All is committed: let the workers end."""
        ...

    def kill(self) -> None:
        """Let no worker outlive this call."""
        ...
