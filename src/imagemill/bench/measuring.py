"""Processes that measure: the session and the feed of a run's worker, on the same cores, each
alone.

MeasuringPool ─► one process per device, which compiles the job's model
     ─► orders: compute so many batches | decode these shards

`imagemill bench` measures with them.
"""
