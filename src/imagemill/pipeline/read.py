"""The first stage: leased shards become planned images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from msgspec.structs import replace

from imagemill.job import ledger, plan
from imagemill.job.columns import row_path
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline.sources import open_all
from imagemill.records import IsolationReason, Job, Lease, PlannedImage


def read(leases: Iterable[Lease], job: Job) -> Iterator[PlannedImage]:
    """Yield the images of leased shards in plan order, ready to be fetched.

    Of a retried shard, the images are those whose rows are not ok, and its `count` is theirs. If
    all are ok, a worker has died between its commit and its receipt: one image makes another
    receipt.

    Raises:
        OutputError: the plan is damaged, or the part of a retried shard.
    """
    paths = JobPaths.of(job.output)
    folder, store = paths.plan, open_store(paths)
    opened = open_all(job.sources, index_dir=folder, access=job.access)
    for lease in leases:
        shard, rows = lease.shard, plan.read(folder, lease.shard)
        if shard.is_retried and not store.exists(paths.part(shard.number)):
            shard = replace(shard, is_retried=False)
        if shard.is_retried:
            (before,) = ledger.tables(store, [shard.number], ["status"])
            rows = [rows[place] for place in np.flatnonzero(~ledger.are_ok(before))] or rows[:1]
            shard = replace(shard, count=len(rows))
        for row in rows:
            source = opened[row.source]
            reason = lease.quarantined.get(row.index)
            if reason is None and lease.isolate:
                reason = IsolationReason.CRASH
            fetch = partial(source.fetch, row.path, row.locator, job.limits.max_bytes)
            path = row_path(job.sources[row.source], row.path)
            yield PlannedImage(
                row.index, shard, source.name, path, row.size, fetch, reason, row.kept
            )
