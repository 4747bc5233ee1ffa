"""The machines that run a job's workers: this one, or a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import automatic, devices
from imagemill.records import DeviceSpec, Engine, Shard
from imagemill.system.messages import Notify
from imagemill.workers.local import LocalPool
from imagemill.workers.pool import WorkerPool


class Machines(Protocol):
    """What an engine provides: devices, and a pool of workers on them."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """Return the devices that a `--devices` argument names. Raises: UsageError, DeviceError."""
        ...

    def automatic(self, images: int | None, precision: str | None, notify: Notify) -> str:
        """Return the `--devices` argument that `auto` means for a new job; see
        `automatic.choose`.
        """
        ...

    def pool(
        self, job: OpenJob, chosen: Sequence[DeviceSpec], remaining: Sequence[Shard]
    ) -> WorkerPool:
        """Return a pool for the uncommitted shards of a frozen job."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class ThisMachine:
    """The `Machines` of `--engine local`."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """Implement `Machines.devices`."""
        return devices.resolve(spec)

    def automatic(self, images: int | None, precision: str | None, notify: Notify) -> str:
        """Implement `Machines.automatic`."""
        return automatic.choose(images, precision, notify)

    def pool(
        self,
        job: OpenJob,
        chosen: Sequence[DeviceSpec],
        remaining: Sequence[Shard],  # noqa: ARG002 - only a cluster samples their images
    ) -> WorkerPool:
        """Implement `Machines.pool`."""
        return LocalPool(job.frozen.job, chosen)

    def close(self) -> None:
        """Implement `Machines.close`."""


def connect(engine: str, notify: Notify, *, allow_mixed: bool = False) -> Machines:
    """Connect to the machines of an engine.

    Args:
        engine: `local` or `ray`.
        notify: receives lines for the user.
        allow_mixed: allow machines that differ in versions or vector units, which may change the
            last bits of results.

    Raises:
        UsageError: Ray is not installed. DeviceError: the cluster cannot be reached.
    """
    if engine == Engine.LOCAL:
        return ThisMachine()
    from imagemill.workers.ray.cluster import Cluster  # needs Ray

    return Cluster(notify, allow_mixed=allow_mixed)
