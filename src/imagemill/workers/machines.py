"""Engines: where the workers of a job are, and who keeps them alive. What they do there is the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from imagemill.job.paths import JobPaths
from imagemill.pipeline.backends import devices
from imagemill.records import DeviceSpec, Engine, Job, Shard
from imagemill.workers.local import LocalCrew
from imagemill.workers.pool import Crew


class Machines(Protocol):
    """Whatever has the devices of a job: this machine, or a cluster."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """What a `--devices` argument means there. Raises: UsageError, DeviceError."""
        ...

    def crew(
        self,
        job: Job,
        paths: JobPaths,
        chosen: Sequence[DeviceSpec],
        left: Sequence[Shard],
        plan_nonce: str,
    ) -> Crew:
        """Workers for the shards that are left of a frozen job."""
        ...

    def close(self) -> None:
        """Let go of them."""
        ...


class ThisMachine:
    """The `Machines` of `--engine local`."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """See `Machines.devices`."""
        return devices.resolve(spec)

    def crew(
        self,
        job: Job,
        paths: JobPaths,  # noqa: ARG002 - a local worker finds them by the job
        chosen: Sequence[DeviceSpec],
        left: Sequence[Shard],  # noqa: ARG002
        plan_nonce: str,  # noqa: ARG002 - its plan is here
    ) -> Crew:
        """See `Machines.crew`."""
        return LocalCrew(job, chosen)

    def close(self) -> None:
        """See `Machines.close`."""


def connect(engine: str, say: Callable[[str], None], *, allow_mixed: bool = False) -> Machines:
    """Have an engine's machines.

    Args:
        engine: `local` or `ray`.
        say: takes a line for the user.
        allow_mixed: whether machines may differ in what decides the last bits of answers.

    Raises:
        UsageError: Ray is not installed. DeviceError: the cluster cannot be reached.
    """
    if engine == Engine.LOCAL:
        return ThisMachine()
    from imagemill.workers.ray.cluster import Cluster  # which needs Ray

    return Cluster(say, allow_mixed=allow_mixed)
