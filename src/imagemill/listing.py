"""All sources of a job as one listing, and what of it a plan does not know yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill import plan, sources
from imagemill.layout import JobPaths
from imagemill.records import (
    Settings,
)
from imagemill.sources import Filters, Skipped

if TYPE_CHECKING:
    from imagemill.freezing import Frozen

_NAMED = 10


def entries(
    resolved: Sequence[str], filters: Filters, skipped: Skipped, output: Path | None, aside: Path | None = None
) -> Iterator[plan.Entry]:
    """All sources one after another; their sub-folders are counted on. `aside`: see `sources.open_all`."""
    offset = 0
    for source in sources.open_all(resolved, output, aside):
        highest = offset
        for entry in source.entries(filters, skipped):
            highest = max(highest, offset + entry.group)
            yield replace(entry, group=offset + entry.group)
        offset = highest + 1


def listing(settings: Settings, filters: Filters, skipped: Skipped, output: Path | None, aside: Path | None = None) -> Iterator[plan.Entry]:
    """The pictures of new settings, in plan order. Raises: SourceError."""
    resolved = sources.resolve(settings.sources)
    return islice(entries(resolved, filters, skipped, output, aside), settings.limit)


def new_in_source(frozen: Frozen, paths: JobPaths) -> tuple[int, list[str]]:
    """How many pictures the sources hold that the plan does not, and the first of their names; both are read in order, side by side."""
    ordered = [source.ordered for source in sources.open_all(frozen.job.sources)]

    def keyed(rows: Iterable[plan.PlannedRow | plan.Entry]) -> Iterator[tuple[tuple[int, object], bytes]]:
        source, number = -1, 0
        for row in rows:
            source, number = row.source, number + 1 if row.source == source else 0  # of its own source: another may have grown
            place = {True: row.path.split(b"/"), "whole": row.path, False: number}[ordered[row.source]]
            yield (row.source, place), row.path

    planned = keyed(row for shard in plan.shards(paths.plan) for row in plan.read(paths.plan, shard))
    count, names = 0, list[str]()
    next_planned = next(planned, None)
    for key, path in keyed(entries(frozen.job.sources, frozen.filters, Skipped(), paths.root)):
        while next_planned is not None and next_planned[0] < key:
            next_planned = next(planned, None)
        if next_planned is None and frozen.limit is not None:
            break  # beyond the limit nothing is new
        if next_planned is None or next_planned[0] != key:
            count += 1
            if len(names) < _NAMED:
                names.append(sources.shown(path))
    return count, names
