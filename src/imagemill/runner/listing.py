"""All sources of a job as one listing, and the same listing some time later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from imagemill import records
from imagemill.display.results import format_skipped
from imagemill.errors import SourceError, UsageError
from imagemill.job import plan
from imagemill.pipeline import sources
from imagemill.pipeline.sources.base import ARCHIVES, Skipped, Source, shown
from imagemill.pipeline.sources.kept import Keeper, resolve_kept
from imagemill.records import Access, Filters, Settings, is_below
from imagemill.runner.difference import Difference, Named, compare
from imagemill.system import storage

if TYPE_CHECKING:
    from imagemill.job.open_job import OpenJob


def entries(
    opened: Iterable[Source], filters: Filters, skipped: Skipped
) -> Iterator[records.Entry]:
    """Yield the images of sources one after another. Their sub-folders are counted on."""
    offset = 0
    for source in opened:
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
    settings: Settings,
    skipped: Skipped,
    keeper: Keeper,
    output: Path | None,
    index_dir: Path | None = None,
) -> Iterator[records.Entry]:
    """Return the images of new settings, in plan order. Raises: SourceError."""
    opened = sources.open_all(settings.sources, output, index_dir, access_of(settings), keeper)
    return islice(entries(opened, filters_of(settings), skipped), settings.limit)


def keeper_of(settings: Settings) -> Keeper:
    """Return a keeper of the columns that the settings keep. Raises: UsageError."""
    return Keeper(resolve_kept(settings.keep or ()))


def check_sources(given: Sequence[str], settings: Settings) -> None:
    """Raise SourceError or UsageError if a source of these settings, as `sources.resolve` returns
    it, does not exist or is of an unknown kind.
    """
    access = access_of(settings)
    sources.check(given, access)
    sources.check_kinds(
        [sources.relocated(source, access) for source in given],
        all_files=bool(settings.all_files),
    )


class Relisting(Struct, frozen=True):
    """A new listing of sources of a job, compared with its plan."""

    added: tuple[str, ...]
    """Sources of the command that the job does not have, in its order."""
    images: int
    """How many images the sources of the command hold."""
    difference: Difference
    skipped: Skipped
    """What was left out of the added sources. The job has counts of the others."""
    notes: tuple[str, ...]
    """On what was not found, see `Skipped.notes`."""


def list_again(
    settings: Settings, job: OpenJob, spooled: Path, index_dir: Path | None = None
) -> Relisting:
    """List the sources of a command into the file `spooled`, and compare them with a job's plan.

    Sources that the job has come first, in the job's order, then the others. So the limit counts
    images that the job has, too.

    Raises:
        SourceError: a source cannot be listed. OutputError: the listing cannot be written.
    """
    asked, access = settings.sources, access_of(settings)
    given, known = frozenset(asked), job.frozen.job.sources
    names = [{source, sources.relocated(source, access)} for source in known]
    named = [place for place, either in enumerate(names) if not either.isdisjoint(given)]
    all_names = frozenset().union(*names)
    added = tuple(dict.fromkeys(source for source in asked if source not in all_names))
    check_sources([*(known[place] for place in named), *added], settings)
    keeper = Keeper(frozen=job.first.job.keep)
    opened = sources.open_all((*known, *added), job.paths.root, index_dir, access, keeper)
    filters, skipped, skipped_before = filters_of(settings), Skipped(), Skipped()
    found = chain(
        entries([opened[place] for place in named], filters, skipped_before),
        entries(opened[len(known) :], filters, skipped),
    )
    listed = plan.spool(islice(found, settings.limit), spooled)
    places = {*named, *range(len(known), len(opened))}
    difference = compare(job, opened, places, spooled, listed.images)
    if settings.limit is not None or any(one.filters != filters for one in job.generations):
        difference = replace(difference, missing=Named())  # they may be left out, not gone
    notes = (*skipped_before.notes(), *skipped.notes())
    return Relisting(added, listed.images, difference, skipped, notes)


def refuse_empty(settings: Settings, output: Path | None) -> None:
    """List as far as the first image, so that an empty job ends before anything is written or
    downloaded. Raises: SourceError, also if a single list or table lacks a column that is kept.

    A list that can be read only once, such as `@/dev/stdin`, is left to the listing proper.
    """
    skipped, keeper = Skipped(), keeper_of(settings)
    if not all(map(sources.can_be_read_again, settings.sources)):
        return
    if next(listing(settings, skipped, keeper, output), None) is None:
        raise no_images(settings, skipped)
    if len(settings.sources) == 1 and sources.names_others(settings.sources[0]):
        keeper.kept()


def no_images(settings: Settings, skipped: Skipped) -> SourceError:
    """Return the error for sources without an image: what was skipped, why, and what to do."""
    given = settings.sources
    left_out = format_skipped(
        skipped.by_suffix, skipped.hidden, skipped.by_filter, skipped.broken_links
    )
    remedies = []
    is_filtered = bool(settings.include or settings.exclude)
    if is_filtered:
        remedies.append("Change --include or --exclude.")
    if pattern := next(
        (pattern for suffix, pattern in ARCHIVES.items() if skipped.by_suffix[suffix]), None
    ):
        remedies.append(_open_them(given, pattern))
    elif skipped.by_suffix:
        remedies.append("Add --all-files to take files of any suffix.")
    if skipped.broken_links:
        remedies.append(
            f"First broken link: {skipped.first_broken_link}. Mount the disk it leads to."
        )
    if skipped.hidden and not remedies:
        remedies.append("Names that begin with a dot are never taken: rename them.")
    nothing = "It is empty." if len(given) == 1 else "They are empty."
    # A folder that --exclude names is not looked into, so nothing in it was counted.
    if is_filtered:
        nothing = "Nothing is left after --include and --exclude."
    what = f"Skipped: {left_out}." if left_out else nothing
    if not left_out and not is_filtered and any(map(os.path.isdir, given)):
        remedies.append("Check the path, and that its disk is mounted.")
    return SourceError(
        " ".join([f"no images found in {_named(given)}, so no job was started.", what, *remedies])
    )


def _named(resolved: Sequence[str]) -> str:
    if len(resolved) > 1:
        return f"the {len(resolved):,} sources"
    return shown(os.fsencode(resolved[0]))


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


def at_new_places(
    opened: OpenJob, moved: Iterable[tuple[str, str]], user_agent: str | None = None
) -> OpenJob:
    """Return a job whose sources are read as `--moved` and `--user-agent` say.

    Raises:
        UsageError: `--moved` makes no sense.
    """
    access = Access(sources.resolve_moved(moved), user_agent)
    check_moved(opened.frozen.job.sources, access, opened.all_rows())
    return opened.with_access(access)


def check_moved(resolved: Sequence[str], access: Access, rows: Iterable[plan.PlannedRow]) -> None:
    """Raise UsageError unless each old place of `--moved` is the place of a source, or of an image
    that a list or table names. The rows of the plan are read until each place was found.
    """
    files = [os.fsencode(sources.without_column(source)) for source in resolved]
    left = {old for old, _ in access.moved if not any(is_below(file, old) for file in files)}
    named = {number for number, source in enumerate(resolved) if sources.names_others(source)}
    if left and named:
        for row in rows:
            if row.source not in named:
                continue
            with contextlib.suppress(ValueError):
                location = storage.beside(
                    files[row.source], sources.named_path(resolved[row.source], row.path)
                )
                left = {old for old in left if not is_below(location, old)}
            if not left:
                return
    if left:
        raise UsageError(
            f"--moved {min(left)}=…: nothing in this job is there. Give an old place as job.json"
            f" names it: {_named(resolved)}."
        )
