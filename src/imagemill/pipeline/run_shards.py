"""Read this first: the whole way of the data, in one loop.

    plan ─ shard ─► sources ─ PlannedImage ─► feed ─ Batch ─► session ─ Outputs ─► top_k
         ─► sink ─ Receipt ─► ledger

A worker process runs it over the leases that its launcher sends; an engine of another kind would
run the very same one. Order is the plan's from end to end. Nothing here waits for anything but the
stage before it, so batches may span shards and nothing drains between them; when the leases end,
what is in flight is finished and handed on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from imagemill.pipeline import read, top_k
from imagemill.pipeline.backends.base import Session
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.sink import Sink
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Job, Lease, Receipt


def run_shards(
    leases: Iterable[Lease], session: Session, feed: Feed, sink: Sink, job: Job, clock: Stopwatch
) -> Iterator[Receipt]:
    """Carry leased shards from their images to committed parts.

    Args:
        leases: shards as they come; may block until the next one is known, ends when there is none
        for now.
        session: the compiled model.
        feed: decoding threads; turns images into batches.
        sink: gathers rows until a shard is whole.
        job: the frozen job.
        clock: records where the time went.

    Yields:
        a receipt for each part, after it is durably on disk; in the order of the leases.

    Raises:
        BadLogitsError: the model returned the wrong shape. OutputError: a part cannot be written.
        Images raise nothing: what is wrong with one of them is its row.
    """
    batches = clock.timing("starved", feed.batches(read.read(leases, job)))
    for batch, outputs in session.stream(batches):
        clock.through(len(batch.rows))
        answered, top = top_k.top_k(batch, outputs, job.session, job.top_k, job.min_probability)
        begun = time.perf_counter()
        for part in sink.write(answered, top):
            yield part.commit()
        clock.add("write", time.perf_counter() - begun)
