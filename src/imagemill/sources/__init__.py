"""Sources: where pictures come from. `open_all` makes them, `read` turns leases into pictures that fetch themselves.

    folder/, picture.jpg      folder.py
    @paths.txt                list.py       a path or URL a line

A further kind is one file with a class behind the `Source` Protocol, and one line in `_open`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from imagemill import plan
from imagemill.errors import SourceError, UsageError
from imagemill.layout import JobPaths
from imagemill.records import Job, Lease, Picture
from imagemill.sources.base import Filters, Skipped, Source, shown
from imagemill.sources.folder import FolderSource
from imagemill.sources.list import ListSource

__all__ = ["Filters", "Skipped", "Source", "check", "open_all", "read", "resolve", "shown"]

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_EXPANDED = 100_000


def resolve(arguments: Iterable[str]) -> tuple[str, ...]:
    """The source arguments as they are frozen: absolute paths, URLs, `@` and that of a list; braces expanded. Raises: UsageError."""
    return tuple(_absolute(item) for argument in arguments for item in _expanded(argument))


def _absolute(argument: str) -> str:
    if "://" in argument:
        raise UsageError(f"source {argument}: URLs cannot be read yet. Give a folder, a picture, or @LIST.")
    at = "@" if argument.startswith("@") else ""
    return at + os.path.abspath(argument.removeprefix("@"))  # noqa: PTH100 - links stay as they were given


def _expanded(argument: str) -> list[str]:
    """`{000..099}` and `{a,b}` as WebDataset and shells write them; a name that is there as it stands is taken as it stands."""
    if "://" not in argument and os.path.lexists(argument.removeprefix("@")):
        return [argument]
    pieces: list[list[str]] = []
    count, end = 1, 0
    for match in _BRACES.finditer(argument):
        first, last, words = match.groups()
        if first is None:
            choices = words.split(",")
        else:
            step = 1 if int(last) >= int(first) else -1
            if abs(int(last) - int(first)) >= _MOST_EXPANDED:
                raise UsageError(f"source {argument}: {match[0]} means more than {_MOST_EXPANDED:,} sources. Give a list: @FILE.")
            width = len(first) if first.startswith("0") or last.startswith("0") else 0
            choices = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
        count *= len(choices)
        pieces += [[argument[end : match.start()]], choices]
        end = match.end()
    if count > _MOST_EXPANDED:
        raise UsageError(f"source {argument}: means {count:,} sources, more than {_MOST_EXPANDED:,}. Give a list: @FILE.")
    return ["".join(parts) for parts in product(*pieces, [argument[end:]])]


def open_all(sources: Iterable[str], output: Path | None = None, aside: Path | None = None) -> list[Source]:
    """Make the sources of a job.

    Args:
        sources: as `resolve` spells them.
        output: a folder that is left out of what they list: the job's own.
        aside: a folder in which a source may keep what it learnt while listing, for the processes that fetch; the plan's. None: it must
            learn it again.
    """
    skip = os.stat(output) if output is not None and output.is_dir() else None  # noqa: PTH116
    return [_open(position, source, skip, aside) for position, source in enumerate(sources)]


def check(sources: Iterable[str]) -> None:
    """See that the sources as such are there, before anything is begun. Raises: SourceError."""
    for source in sources:
        path = source.removeprefix("@")
        if not os.path.exists(path):  # noqa: PTH110
            raise SourceError(f"source {shown(os.fsencode(source))} cannot be read: No such file or directory. Give a folder or a picture.")


def _open(position: int, source: str, skip: os.stat_result | None, aside: Path | None) -> Source:  # noqa: ARG001
    if source.startswith("@"):
        return ListSource(position, os.fsencode(source[1:]))
    return FolderSource(position, os.fsencode(source), skip)


def read(leases: Iterable[Lease], job: Job) -> Iterator[Picture]:
    """The pictures of leased shards, in plan order, each ready to be fetched. Raises: OutputError where the plan is damaged."""
    folder = JobPaths(Path(job.output)).plan
    opened = open_all(job.sources, aside=folder)
    for lease in leases:
        for row in plan.read(folder, lease.shard):
            source = opened[row.source]
            suspect = lease.suspects.get(row.index) or ("crash" if lease.isolate else None)
            fetch = partial(source.fetch, row.path, row.locator, job.limits.max_bytes)
            yield Picture(row.index, lease.shard, source.name, row.path, row.size, fetch, suspect)
