"""All sources of a job as one listing, and what of it a plan does not know yet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill import records
from imagemill.display.results import format_skipped
from imagemill.errors import SourceError, UsageError
from imagemill.job import plan
from imagemill.pipeline import sources
from imagemill.pipeline.sources import Filters, Skipped
from imagemill.records import AS_GIVEN, Access, Settings, is_below
from imagemill.system import storage

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob

_NAMED = 10
_SHARD_SUFFIXES = {
    ".tar": "*.tar",
    ".gz": "*.tar.gz",
    ".tgz": "*.tgz",
    ".zip": "*.zip",
    ".parquet": "*.parquet",
}
"""Suffixes of archives and tables that a source may hold unopened → the pattern that names them as
sources.
"""


def entries(
    resolved: Sequence[str],
    filters: Filters,
    skipped: Skipped,
    output: Path | None,
    aside: Path | None = None,
    access: Access = AS_GIVEN,
) -> Iterator[records.Entry]:
    """All sources one after another; their sub-folders are counted on. `aside`, `access`: see
    `sources.open_all`.
    """
    offset = 0
    for source in sources.open_all(resolved, output, aside, access):
        highest, is_empty = offset, True
        for entry in source.entries(filters, skipped):
            highest, is_empty = max(highest, offset + entry.group), False
            yield replace(entry, group=offset + entry.group)
        offset = highest + 1
        if is_empty:
            skipped.add_empty_source(source.name)


def filters_of(settings: Settings) -> Filters:
    """Return the filters that the settings mean."""
    return Filters(settings.include or (), settings.exclude or (), settings.all_files or False)


def listing(
    settings: Settings, skipped: Skipped, output: Path | None, aside: Path | None = None
) -> Iterator[records.Entry]:
    """The images of new settings, in plan order. Raises: SourceError."""
    resolved = sources.resolve(settings.sources)
    return islice(
        entries(resolved, filters_of(settings), skipped, output, aside, access_of(settings)),
        settings.limit,
    )


def refuse_empty(settings: Settings, output: Path | None) -> None:
    """List as far as the first image, so that an empty job ends before anything is written or
    downloaded. Raises: SourceError.

    A list that can be read only once, such as `@/dev/stdin`, is left to the listing proper.
    """
    resolved = sources.resolve(settings.sources)
    skipped = Skipped()
    if (
        all(map(sources.can_be_read_again, resolved))
        and next(listing(settings, skipped, output), None) is None
    ):
        raise no_images(settings, skipped)


def no_images(settings: Settings, skipped: Skipped) -> SourceError:
    """Return the error for sources without an image: what was skipped, why, and what to do."""
    resolved = sources.resolve(settings.sources)
    where = (
        sources.shown(os.fsencode(resolved[0]))
        if len(resolved) == 1
        else f"the {len(resolved):,} sources"
    )
    left_out = format_skipped(
        skipped.by_suffix, skipped.hidden, skipped.by_filter, skipped.broken_links
    )
    remedies = []
    is_filtered = bool(settings.include or settings.exclude)
    if is_filtered:
        remedies.append("Change --include or --exclude.")
    if pattern := next(
        (pattern for suffix, pattern in _SHARD_SUFFIXES.items() if skipped.by_suffix[suffix]), None
    ):
        remedies.append(_open_them(resolved, pattern))
    elif skipped.by_suffix:
        remedies.append("Add --all-files to take files of any suffix.")
    if skipped.broken_links:
        remedies.append(
            f"First broken link: {skipped.first_broken_link}. Mount the disk it leads to."
        )
    if skipped.hidden and not remedies:
        remedies.append("Names that begin with a dot are never taken: rename them.")
    nothing = "It is empty." if len(resolved) == 1 else "They are empty."
    if (
        is_filtered
    ):  # a folder that --exclude names is not looked into, so nothing in it was counted
        nothing = "Nothing is left after --include and --exclude."
    what = f"Skipped: {left_out}." if left_out else nothing
    if not left_out and not is_filtered and any(map(os.path.isdir, resolved)):
        remedies.append("Check the path, and that its disk is mounted.")
    return SourceError(
        " ".join([f"no images found in {where}, so no job was started.", what, *remedies])
    )


def _open_them(resolved: Sequence[str], pattern: str) -> str:
    """How to give archives and tables that lie in a source as sources."""
    folder = next((item for item in resolved if os.path.isdir(item)), None)  # noqa: PTH112
    if folder is not None:
        return (
            "Archives and tables in a folder are sources of their own. Give them by name, such as"
            f" {folder}/{pattern}, not the folder."
        )
    prefix = next(
        (item for item in resolved if storage.is_object(item) and not sources.is_opened(item)), None
    )
    if prefix is not None:
        example = f"'{prefix}/{pattern.replace('*', 'NAME-{000000..000099}')}'"
        return (
            "Archives and tables below a prefix are sources of their own. Give them by name, such"
            f" as {example}, not the prefix."
        )
    return "Archives and tables inside an archive are not opened. Unpack it."


def access_of(settings: Settings) -> Access:
    """Return how the sources of these settings are read. Raises: UsageError."""
    return Access(sources.resolve_moved(settings.moved or ()), settings.user_agent)


def check_moved(resolved: Sequence[str], access: Access, plan_folder: Path) -> None:
    """See that each old place of `--moved` is the place of a source, or of an image that a list or
    table names.

    Args:
        resolved: the sources.
        access: with the places.
        plan_folder: of the listing, which is read until each place was found.

    Raises: UsageError.
    """
    files = [os.fsencode(sources.without_column(source)) for source in resolved]
    left = {old for old, _ in access.moved if not any(is_below(file, old) for file in files)}
    named = {number for number, source in enumerate(resolved) if sources.names_others(source)}
    if left and named:
        for row in (
            row
            for shard in plan.shards(plan_folder)
            for row in plan.read(plan_folder, shard)
            if row.source in named
        ):
            with contextlib.suppress(ValueError):
                location = storage.beside(
                    files[row.source], sources.named_path(resolved[row.source], row.path)
                )
                left = {old for old in left if not is_below(location, old)}
            if not left:
                return
    if left:
        where = (
            f"the {len(resolved):,} sources"
            if len(resolved) > 1
            else sources.shown(os.fsencode(resolved[0]))
        )
        raise UsageError(
            f"--moved {min(left)}=…: nothing in this job is there. Give an old place as job.json"
            f" names it: {where}."
        )


def new_in_source(job: OpenJob) -> tuple[int, list[str]]:
    """Return how many images the sources hold that the plan does not, and the first of their
    names. Sources and plan are read in order, side by side.
    """
    frozen = job.frozen
    ordered = [source.ordered for source in sources.open_all(frozen.job.sources)]
    if ordered != [
        source.ordered for source in sources.open_all(frozen.job.sources, access=frozen.job.access)
    ]:
        raise SourceError(
            "a folder moved to an object store, or back, which lists images in another order."
        )

    def keyed(
        rows: Iterable[plan.PlannedRow | records.Entry],
    ) -> Iterator[tuple[tuple[int, object], bytes]]:
        source, number = -1, 0
        for row in rows:
            source, number = (
                row.source,
                (number + 1 if row.source == source else 0),
            )  # of its own source: another may have grown
            place = {True: row.path.split(b"/"), "whole": row.path, False: number}[
                ordered[row.source]
            ]
            yield (row.source, place), row.path

    planned = keyed(row for shard in job.shards for row in job.rows(shard))
    count, names = 0, list[str]()
    next_planned = next(planned, None)
    for key, path in keyed(
        entries(
            frozen.job.sources, frozen.filters, Skipped(), job.paths.root, access=frozen.job.access
        )
    ):
        while next_planned is not None and next_planned[0] < key:
            next_planned = next(planned, None)
        if next_planned is None and frozen.limit is not None:
            break  # beyond the limit nothing is new
        if next_planned is None or next_planned[0] != key:
            count += 1
            if len(names) < _NAMED:
                names.append(sources.shown(path))
    return count, names
