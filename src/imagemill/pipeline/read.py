"""The first stage: leased shards become planned images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from imagemill.job import plan
from imagemill.job.columns import row_path
from imagemill.job.paths import JobPaths
from imagemill.pipeline.sources import open_all
from imagemill.records import IsolationReason, Job, Lease, PlannedImage


def read(leases: Iterable[Lease], job: Job) -> Iterator[PlannedImage]:
    """Yield the images of leased shards in plan order, ready to be fetched.

    Raises:
        OutputError: the plan is damaged.
    """
    folder = JobPaths.of(job.output).plan
    opened = open_all(job.sources, index_dir=folder, access=job.access)
    for lease in leases:
        for row in plan.read(folder, lease.shard):
            source = opened[row.source]
            reason = lease.quarantined.get(row.index)
            if reason is None and lease.isolate:
                reason = IsolationReason.CRASH
            fetch = partial(source.fetch, row.path, row.locator, job.limits.max_bytes)
            path = row_path(job.sources[row.source], row.path)
            yield PlannedImage(
                row.index, lease.shard, source.name, path, row.size, fetch, reason, row.kept
            )
