"""Sources: where pictures come from. `open_all` makes them, `read` turns leases into pictures that fetch themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from imagemill import plan
from imagemill.errors import SourceError, UsageError
from imagemill.layout import JobPaths
from imagemill.records import Job, Lease, Picture
from imagemill.sources.base import Filters, Skipped, Source, shown
from imagemill.sources.folder import FolderSource
from imagemill.sources.list import ListSource

__all__ = ["Filters", "Skipped", "Source", "check", "open_all", "read", "resolve", "shown"]


def resolve(argument: str) -> str:
    """The source argument as it is frozen: an absolute path, or `@` and that of a list. Raises: UsageError."""
    if "://" in argument:
        raise UsageError(f"source {argument}: URLs cannot be read yet. Give a folder, a picture, or @LIST.")
    at = "@" if argument.startswith("@") else ""
    return at + os.path.abspath(argument.removeprefix("@"))  # noqa: PTH100 - links stay as they were given


def open_all(sources: Iterable[str], output: Path | None = None) -> list[Source]:
    """Make the sources of a job; `output` is left out of what they list."""
    skip = os.stat(output) if output is not None and output.is_dir() else None  # noqa: PTH116
    return [_open(position, source, skip) for position, source in enumerate(sources)]


def check(sources: Iterable[str]) -> None:
    """See that the sources as such are there, before anything is begun. Raises: SourceError."""
    for source in sources:
        path = source.removeprefix("@")
        if not os.path.exists(path):  # noqa: PTH110
            raise SourceError(f"source {shown(os.fsencode(source))} cannot be read: No such file or directory. Give a folder or a picture.")


def _open(position: int, source: str, skip: os.stat_result | None) -> Source:
    if source.startswith("@"):
        return ListSource(position, os.fsencode(source[1:]))
    return FolderSource(position, os.fsencode(source), skip)


def read(leases: Iterable[Lease], job: Job) -> Iterator[Picture]:
    """The pictures of leased shards, in plan order, each ready to be fetched. Raises: OutputError where the plan is damaged."""
    opened = open_all(job.sources)
    folder = JobPaths(Path(job.output)).plan
    for lease in leases:
        for row in plan.read(folder, lease.shard):
            source = opened[row.source]
            suspect = lease.suspects.get(row.index) or ("crash" if lease.isolate else None)
            fetch = partial(source.fetch, row.path, job.limits.max_bytes)
            yield Picture(row.index, lease.shard, source.name, row.path, row.size, fetch, suspect)
