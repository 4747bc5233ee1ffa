"""`--dry-run`: what a job would be."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from imagemill.job import plan
from imagemill.job.columns import row_path
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.pipeline.backends import automatic
from imagemill.pipeline.sources.base import Skipped, shown
from imagemill.records import DeviceSpec, Settings
from imagemill.runner import append, listing
from imagemill.runner.difference import MAX_NAMES
from imagemill.runner.settings import check_settings
from imagemill.workers.machines import connect


class DryRun(Struct, frozen=True):
    """What `--dry-run` found."""

    images: int
    shard_size: int
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int
    skipped_by_filter: int
    first: tuple[str, ...]
    """Paths of the first images."""
    append: bool = False
    """Whether the images would be added to an existing job. Then `images` and `first` are the new
    ones.
    """
    skipped_broken_links: int = 0
    notes: tuple[str, ...] = ()
    """Messages of a run about broken links and empty sources."""


def dry_run(settings: Settings) -> DryRun:
    """List the sources and return what a job would be, or with `append` what would be added to it.
    Nothing is written to the output.
    """
    settings = check_settings(settings)
    opened = OpenJob.find(settings.output, settings.log_dir)
    extended = opened if settings.append else None
    typed = settings.devices or (extended.frozen.devices if extended else automatic.CPU)
    with contextlib.closing(connect(settings.engine, lambda _: None)) as machines:
        chosen = machines.devices(typed)
    if extended:
        return _dry_append(settings, extended, chosen)
    store = open_store(JobPaths.of(settings.output, settings.log_dir))
    if opened is None:
        store.check_unused()
    listing.check_sources(settings.sources, settings)
    skipped, keeper = Skipped(), listing.keeper_of(settings)
    images, first = 0, list[str]()
    for entry in listing.listing(settings, skipped, keeper, store.paths.root):
        images += 1
        if images <= MAX_NAMES:
            path = row_path(settings.sources[entry.source], entry.path)
            first.append(shown(path))
    if not images:
        raise listing.no_images(settings, skipped)
    keeper.kept()
    notes = list(skipped.notes())
    if typed == automatic.CPU:
        now = machines.automatic(images, settings.precision, notes.append)
        chosen = chosen if now == typed else machines.devices(now)
    shard_size = settings.shard_size or plan.auto_shard_size(images, len(chosen))
    return DryRun(
        images=images,
        shard_size=shard_size,
        **skipped.counts(),
        first=tuple(first),
        notes=tuple(notes),
    )


def _dry_append(settings: Settings, opened: OpenJob, chosen: Sequence[DeviceSpec]) -> DryRun:
    """Return what would be added to a job."""
    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        found = listing.list_again(settings, opened, Path(folder) / "listing")
    images = found.difference.new.count
    return DryRun(
        images=images,
        shard_size=settings.shard_size or plan.auto_shard_size(images, len(chosen)),
        **found.skipped.counts(),
        first=found.difference.new.names,
        notes=(*found.notes, *append.describe(found, settings)),
        append=True,
    )
