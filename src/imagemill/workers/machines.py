"""The machines that run a job's workers: this one, or a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import automatic, devices
from imagemill.records import DeviceSpec, Engine, Shard
from imagemill.system.messages import Notify
from imagemill.workers.local import LocalPool

if TYPE_CHECKING:
    from imagemill.workers.ray.cluster import Cluster

Machines: TypeAlias = "ThisMachine | Cluster"
"""What an engine provides: devices, and a pool of workers on them."""


class ThisMachine:
    """The `Machines` of `--engine local`."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        """Return the devices that a `--devices` argument names. Raises: UsageError, DeviceError."""
        return devices.resolve(spec)

    def automatic(self, images: int | None, precision: str | None, notify: Notify) -> str:
        """Return the `--devices` argument that `auto` means for a new job; see
        `automatic.choose`.
        """
        return automatic.choose(images, precision, notify)

    def pool(
        self,
        job: OpenJob,
        chosen: Sequence[DeviceSpec],
        remaining: Sequence[Shard],  # noqa: ARG002 - only a cluster samples their images
    ) -> LocalPool:
        """Return a pool for the uncommitted shards of a frozen job."""
        return LocalPool(job.frozen.job, chosen)

    def close(self) -> None:
        """Disconnect."""


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
    from imagemill.workers.ray.cluster import Cluster

    return Cluster(notify, allow_mixed=allow_mixed)
