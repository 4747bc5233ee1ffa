"""One job, readable top to bottom: open or resume → plan → launch → close.

`run` is all that the command line and the Python API call.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from imagemill import records, report
from imagemill.display import observer
from imagemill.errors import Interrupted, JobMismatchError, SourceError, UsageError
from imagemill.job import documents, ledger, lock, plan, store
from imagemill.job.paths import JobPaths
from imagemill.job.store import refuse_foreign
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.backends.devices import backend_of
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources import Skipped
from imagemill.records import (
    DeviceSpec,
    Progress,
    Settings,
    Summary,
)
from imagemill.runner import freeze, listing, model, preflight, resume, summarise
from imagemill.runner.settings import check_settings
from imagemill.system import files, serialization
from imagemill.version import __version__
from imagemill.workers.launcher import Launcher, Outcome
from imagemill.workers.machines import Machines, connect

_NAMED_NEW = 10


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `--dry-run` found; nothing was written."""

    images: int
    shard_size: int
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int
    skipped_by_filter: int
    first: tuple[str, ...]
    """Paths of the first images."""
    skipped_broken_links: int = 0
    notes: tuple[str, ...] = ()
    """What a run would say of broken links and empty sources."""


def run(settings: Settings, watcher: observer.Watcher | None = None) -> Summary:
    """Classify every image of the sources, one row each, resuming what an earlier call began.

    Returns:
        the summary, also written to `summary.json`.

    Raises:
        UsageError: settings that make no sense, or that contradict the frozen job. DeviceError,
        ModelError, SourceError: before anything was written. OutputError, WorkerError,
        TooManyBadError, Interrupted: the job can be resumed.
    """
    watcher = watcher or observer.Watcher()
    check_settings(settings)
    with contextlib.closing(
        connect(settings.engine, watcher.say, allow_mixed=settings.allow_mixed)
    ) as machines:
        return _run(settings, machines, watcher)


def _run(settings: Settings, machines: Machines, watcher: observer.Watcher) -> Summary:
    paths = JobPaths.of(settings.output, settings.log_dir)
    frozen = documents.read_frozen(paths)
    if frozen and frozen.job.log_dir and not settings.log_dir:
        paths = replace(paths, log_dir=Path(frozen.job.log_dir))
    chosen = machines.devices(settings.devices or (frozen.devices if frozen else "auto"))
    backend_of(chosen, settings.allow_mixed)
    if frozen is None:
        devices.check_precision(settings.precision, chosen)
        refuse_foreign(paths)
        _check_sources(settings, paths)
        with_model = model.resolve_model(settings, watcher)
        bundle.verify_hash(with_model)
    with lock.locked(paths):
        frozen = documents.read_frozen(
            paths
        )  # again: another launcher may have frozen it before we held the lock
        paths.sweep()
        for folder in (paths.predictions, paths.plan, paths.logs):
            files.make_folder(folder)
        hasty = False
        try:
            with observer.logging_to(paths.launcher_log):
                if frozen is None:
                    try:
                        frozen = freeze.freeze(settings, paths, chosen, with_model, watcher)
                        return _carry_out(settings, frozen, paths, machines, chosen, watcher)
                    except FileExistsError:
                        # In an object store, a launcher on another machine was faster.
                        frozen = documents.read_frozen(paths)
                        assert frozen is not None
                resumed = resume.resume(settings, frozen, chosen, watcher)
                return _carry_out(
                    settings, resumed, paths, machines, chosen, watcher, is_resumed=True
                )
        except (KeyboardInterrupt, Interrupted):
            hasty = True
            raise
        finally:
            store.publish_logs(paths, hasty=hasty)


def _check_sources(settings: Settings, paths: JobPaths) -> None:
    """See that the sources of a new job exist, are of a kind that is read, and hold an image.
    Raises: SourceError, UsageError.
    """
    resolved = sources.resolve(settings.sources)
    access = listing.access_of(settings)
    sources.check(resolved, access)
    sources.check_kinds(
        [sources.relocated(source, access) for source in resolved],
        all_files=bool(settings.all_files),
    )
    listing.refuse_empty(settings, paths.root)


def _carry_out(
    settings: Settings,
    frozen: documents.Frozen,
    paths: JobPaths,
    machines: Machines,
    chosen: Sequence[DeviceSpec],
    watcher: observer.Watcher,
    *,
    is_resumed: bool = False,
) -> Summary:
    """Launch what is left of a frozen job and close its ledger."""
    shards = documents.planned(paths, frozen)
    done = ledger.committed(paths, shards)
    if settings.retry_failed is not None:
        again = ledger.shards_with(paths, shards, settings.retry_failed)
        watcher.say(f"retrying {len(again)} of {len(done)} finished shards")
        done -= again
    left = [shard for shard in shards if shard.number not in done]
    if is_resumed:
        listing.check_moved(frozen.job.sources, frozen.job.access, paths.plan)
    if left and is_resumed:
        _check_decoder(frozen)
        try:
            sources.check(
                frozen.job.sources, frozen.job.access
            )  # or every image left would become a `missing` row
        except SourceError as error:
            raise SourceError(f"{error} If it has moved, add --moved OLD=NEW.") from error
        model.verify_model(
            frozen
        )  # of a new job it was done before; where nothing is left it does not matter
    if not left and (summary := documents.read_summary(paths)):
        ledger.check_sizes(paths)
        if settings.report and not store.exists(paths, paths.report):  # it was interrupted
            report.attempt(paths, frozen, watcher.say)
        return _report_finished(frozen, paths, summary, watcher)
    store.remove(paths, paths.summary)
    resumed = sum(shard.count for shard in shards if shard.number in done)
    if done:
        watcher.say(f"resuming: {resumed:,} of {frozen.images:,} images are done")
    guard = summarise.bad_fraction_guard(
        settings.max_bad_fraction, frozen.images, paths, shards, done
    )
    outcome = Outcome(devices={d.name: 0 for d in chosen}, restarts={d.name: 0 for d in chosen})
    sampled = left if settings.preflight and not is_resumed else []
    shown = watcher.begin(frozen.images, resumed)
    try:
        with preflight.Sampler(frozen.job, sampled, chosen, watcher.say) as sampler:

            def tick(progress: Progress) -> None:
                sampler(progress)
                shown(progress)

            if left:
                launcher = Launcher(
                    machines.crew(frozen.job, paths, chosen, left, frozen.plan_nonce),
                    chosen,
                    left,
                    groups=frozen.groups,
                    grace_s=settings.grace_s,
                    on_tick=tick,
                    say=watcher.say,
                    on_receipt=guard,
                )
                outcome = launcher.run()
    finally:
        watcher.end()
    paths.sweep()  # once more: workers that died have left their temporary files
    job = frozen.job
    tally = ledger.close(
        paths,
        shards,
        partial(sources.as_line, job.sources),
        job.plan_id,
        job.answer_id,
        outcome.receipts,
    )
    if tally.unlisted:
        watcher.say(
            f"{tally.unlisted:,} failed images lie in archives or tables: not in failed.txt, but"
            " --retry-failed takes them again"
        )
    summary = replace(
        summarise.summarise(
            frozen, paths, shards, done, outcome, tally, (*chosen, *outcome.joined)
        ),
        preflight=sampler.found,
    )
    store.write(paths, paths.summary, serialization.encode(summary))
    if settings.report:
        report.attempt(paths, frozen, watcher.say)
    if frozen.job.card.origin.get("source") == "random":
        watcher.say(
            f"note: {frozen.job.card.name} has random weights: its predictions mean nothing"
        )
    return summary


def _check_decoder(frozen: documents.Frozen) -> None:
    """Raise JobMismatchError if this version decodes images differently from the one that froze
    the job: one answer id would stand for two kinds of answers.
    """
    if frozen.decoder != DECODER:
        began = frozen.versions.get("imagemill", "another version")
        raise JobMismatchError(
            f"{frozen.job.output} was started with decoder {frozen.decoder} (imagemill {began}),"
            f" this is decoder {DECODER} (imagemill {__version__}). Images may be decoded"
            f" differently. Continue with imagemill {began}, or give another --output."
        )


def dry_run(settings: Settings) -> DryRun:
    """List the sources and say what a job would be; nothing is written to the output."""
    check_settings(settings)
    with contextlib.closing(connect(settings.engine, lambda _: None)) as machines:
        chosen = machines.devices(settings.devices or "auto")
    paths = JobPaths.of(settings.output, settings.log_dir)
    if documents.read_frozen(paths) is None:
        refuse_foreign(paths)
    resolved = sources.resolve(settings.sources)
    access = listing.access_of(settings)
    sources.check(resolved, access)
    sources.check_kinds(
        [sources.relocated(source, access) for source in resolved],
        all_files=bool(settings.all_files),
    )
    skipped = Skipped()
    first: list[str] = []

    def noting(entries: Iterator[records.Entry]) -> Iterator[records.Entry]:
        for entry in entries:
            if len(first) < _NAMED_NEW:
                first.append(sources.shown(entry.path))
            yield entry

    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        listed = plan.spool(
            noting(listing.listing(settings, skipped, paths.root)), Path(folder) / "listing"
        )
    if not listed.images:
        raise listing.no_images(settings, skipped)
    shard_size = settings.shard_size or plan.auto_shard_size(listed.images, len(chosen))
    by_suffix = dict(sorted(skipped.by_suffix.items()))
    return DryRun(
        images=listed.images,
        shard_size=shard_size,
        skipped_by_suffix=by_suffix,
        skipped_hidden=skipped.hidden,
        skipped_by_filter=skipped.by_filter,
        first=tuple(first),
        skipped_broken_links=skipped.broken_links,
        notes=tuple(skipped.notes()),
    )


def _report_finished(
    frozen: documents.Frozen, paths: JobPaths, summary: Summary, watcher: observer.Watcher
) -> Summary:
    """Nothing is left to do: say so, and name what is new in the sources since."""
    watcher.say(f"finished already: {summary.images:,} images in {paths.shown(paths.predictions)}")
    try:
        count, names = listing.new_in_source(frozen, paths)
    except (SourceError, UsageError) as error:
        watcher.say(f"what is new in the source is not known: {error}")
        count, names = 0, []
    if count:
        more = f" and {count - len(names):,} more" if count > len(names) else ""
        are = "images are" if count > 1 else "image is"
        watcher.say(
            f"{count:,} {are} new in the source since the plan was frozen:"
            f" {', '.join(names)}{more}. Run them into another --output."
        )
    return replace(
        summary,
        output=paths.output,
        new_in_source=count,
        resumed_shards=summary.shards,
        seconds=0.0,
        images_per_second=None,
    )
