"""The course of one job, top to bottom: freeze or resume → launch → close.

The command line and the Python API call `run`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from imagemill import records, report
from imagemill.display import observer
from imagemill.errors import (
    Interrupted,
    JobMismatchError,
    OutputError,
    SourceError,
    UsageError,
    counted,
)
from imagemill.job import documents, ledger, lock, plan
from imagemill.job.columns import row_path
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import automatic, devices
from imagemill.pipeline.backends.devices import backend_of
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources import Skipped
from imagemill.records import (
    DeviceSpec,
    DryRun,
    Precision,
    Progress,
    Settings,
    Shard,
    Summary,
)
from imagemill.runner import (
    append,
    attempts,
    freeze,
    listing,
    model,
    preflight,
    resume,
    summarise,
)
from imagemill.runner.difference import MAX_NAMES, Difference
from imagemill.runner.settings import check_settings
from imagemill.system import files, serialization
from imagemill.version import __version__
from imagemill.workers.launcher import Launcher, Outcome
from imagemill.workers.machines import Machines, connect

_log = logging.getLogger(__name__)


def run(settings: Settings, watcher: observer.Watcher | None = None) -> Summary:
    """Classify every image of the sources, one row each. Resume the job if an earlier call began
    it.

    Returns:
        the summary, also written to `summary.json`.

    Raises:
        UsageError: invalid settings, or settings that contradict the frozen job.
        DeviceError, ModelError, SourceError: before anything was written.
        OutputError, WorkerError, TooManyBadError, Interrupted: the job can be resumed.
    """
    watcher = watcher or observer.Watcher()
    check_settings(settings)
    with contextlib.closing(
        connect(settings.engine, watcher.notify, allow_mixed=settings.allow_mixed)
    ) as machines:
        return _run(settings, machines, watcher)


def _run(settings: Settings, machines: Machines, watcher: observer.Watcher) -> Summary:
    opened = OpenJob.find(settings.output, settings.log_dir)
    store = opened.store if opened else open_store(_paths_of(settings))
    if settings.devices == automatic.CPU:
        settings = replace(settings, devices=None)
    asked = settings.devices or (
        opened.frozen.devices
        if opened
        else machines.automatic(None, settings.precision, lambda _: None)
    )
    chosen = machines.devices(asked)
    backend_of(chosen, settings.allow_mixed)

    def choose(images: int) -> tuple[str, Sequence[DeviceSpec]]:
        typed = settings.devices or machines.automatic(images, settings.precision, watcher.notify)
        return typed, chosen if typed == asked else machines.devices(typed)

    if opened is None:
        devices.check_precision(settings.precision, chosen)
        store.check_unused()
        listing.check_sources(sources.resolve(settings.sources), settings)
        listing.refuse_empty(settings, store.paths.root)
        with_model = model.resolve_model(settings, watcher)
        bundle.verify_hash(with_model)
        if settings.precision == Precision.INT8:
            from imagemill.tuning import precisions  # imports NumPy

            precisions.check_int8(model.with_recipe(with_model, settings))
    paths = store.paths
    made = paths.unmade()
    with lock.locked(paths):
        # Another launcher may have changed the job before this one held the lock.
        opened = OpenJob.find(settings.output, settings.log_dir) or opened
        hasty, found = False, None
        try:
            paths.sweep()
            for folder in (paths.predictions, paths.plan, paths.logs):
                files.make_folder(folder)
            with observer.logging_to(paths.launcher_log):
                is_new = opened is None
                if opened is None:
                    try:
                        opened = freeze.freeze(settings, store, choose, with_model, watcher)
                    except FileExistsError:
                        # In an object store, a launcher on another machine was faster.
                        opened, is_new = OpenJob.find(settings.output, settings.log_dir), False
                        assert opened is not None
                if settings.devices is None and opened.frozen.devices != asked:
                    chosen = machines.devices(opened.frozen.devices)
                if not is_new:
                    opened = resume.resume(settings, opened, chosen, watcher)
                    known = (*opened.frozen.job.sources, *sources.resolve(settings.sources))
                    listing.check_moved(known, opened.first.job.access, opened.all_rows())
                    files.remove_folder(paths.generation(len(opened.generations) + 1))
                    if settings.append:
                        _check_remaining(opened, chosen)
                        opened, found = append.append(settings, opened, chosen, watcher)

                def attempt(job: OpenJob, on: Sequence[DeviceSpec], is_resumed: bool) -> Summary:
                    return _carry_out(
                        settings, job, machines, on, watcher, is_resumed=is_resumed, found=found
                    )

                def fall_back() -> tuple[OpenJob, Sequence[DeviceSpec]]:
                    nonlocal opened
                    cpus = machines.devices(automatic.CPU)
                    store.remove(paths.job)
                    opened = None
                    again = (settings, store, lambda _: (automatic.CPU, cpus), with_model, watcher)
                    opened = freeze.freeze(*again)
                    return opened, cpus

                return attempts.attempt_until_it_fits(
                    attempt,
                    (opened, chosen),
                    settings,
                    watcher,
                    is_new=is_new,
                    fall_back=fall_back if _may_fall_back(settings, opened) else None,
                )
        except (KeyboardInterrupt, Interrupted):
            hasty = True
            raise
        finally:
            if opened is None:  # refused before it was frozen
                paths.discard(made)
            else:
                store.publish_logs(hasty=hasty)


def _may_fall_back(settings: Settings, opened: OpenJob) -> bool:
    """Return whether `auto` chose the GPUs of a job that the CPU can process as well."""
    is_choice = settings.devices is None and opened.frozen.devices != automatic.CPU
    return is_choice and settings.precision in (None, "auto", Precision.FP32, Precision.BF16)


def _paths_of(settings: Settings) -> JobPaths:
    return JobPaths.of(settings.output, settings.log_dir)


def _carry_out(
    settings: Settings,
    opened: OpenJob,
    machines: Machines,
    chosen: Sequence[DeviceSpec],
    watcher: observer.Watcher,
    *,
    is_resumed: bool = False,
    found: Difference | None = None,
) -> Summary:
    """Process the remaining shards of a job, close its ledger and write its summary. `found` is how
    the sources differed from the plan before this command appended to it.
    """
    store, paths, frozen = opened.store, opened.paths, opened.frozen
    job = frozen.job
    done = opened.committed()
    if settings.retry_failed is not None:
        again = opened.shards_with(settings.retry_failed)
        images = sum(shard.count for shard in opened.shards if shard.number in again)
        watcher.notify(
            f"computing again: {counted(images, 'image')}, those in shards with failures"
        )
        done -= again
    left = [shard for shard in opened.shards if shard.number not in done]
    if is_resumed:
        _check_remaining(opened, chosen, left)
    if not left and (summary := _read_summary(opened)):
        ledger.check_sizes(store)
        if settings.report and not store.exists(paths.report):  # it was interrupted
            report.attempt(opened, watcher.notify)
        return _report_finished(settings, opened, summary, watcher, found)
    store.remove(paths.summary)
    store.remove(paths.retired)
    resumed = sum(shard.count for shard in opened.shards if shard.number in done)
    if done:
        watcher.notify(f"resuming: {resumed:,} of {frozen.images:,} images are done")
    guard = summarise.bad_fraction_guard(settings.max_bad_fraction, opened, done)
    outcome = Outcome(devices={d.name: 0 for d in chosen}, restarts={d.name: 0 for d in chosen})
    sampled = left if settings.preflight and not is_resumed else []
    shown = watcher.begin(frozen.images, resumed)
    write_retired = summarise.retired_writer(store)
    write_pace = summarise.pace_writer(paths, frozen.images, resumed)
    try:
        with preflight.Sampler(job, sampled, chosen, watcher.notify) as sampler:

            def tick(progress: Progress) -> None:
                sampler(progress)
                shown(progress)
                write_retired(progress)
                write_pace(progress)

            if left:
                launcher = Launcher(
                    machines.pool(opened, chosen, left),
                    chosen,
                    left,
                    groups=frozen.groups,
                    grace_s=settings.grace_s,
                    on_tick=tick,
                    notify=watcher.notify,
                    on_receipt=guard,
                )
                outcome = launcher.run()
    finally:
        watcher.end()
        with contextlib.suppress(OSError):
            paths.pace.unlink(missing_ok=True)
    paths.sweep()  # workers that died have left temporary files
    tally = opened.close(outcome.receipts, partial(sources.as_line, job.sources))
    if tally.unlisted:
        watcher.notify(
            f"{counted(tally.unlisted, 'failed image')} {'is' if tally.unlisted == 1 else 'are'} in"
            " archives or tables: not in failed.txt, but --retry-failed processes them again"
        )
    summary = replace(
        summarise.summarise(opened, done, outcome, tally, (*chosen, *outcome.joined)),
        preflight=sampler.found,
    )
    summary = _with_difference(summary, settings, found)
    store.write(paths.summary, serialization.encode(summary))
    if settings.report:
        report.attempt(opened, watcher.notify)
    if job.session.card.origin.get("source") == "random":
        watcher.notify(
            f"note: {job.session.card.name} has random weights: its predictions mean nothing"
        )
    return summary


def _read_summary(opened: OpenJob) -> Summary | None:
    """Return the summary, or None if it must be written again. One of fewer images is from another
    launcher, which closed the job while images were appended to it.
    """
    try:
        summary = documents.read_summary(opened.store)
    except OutputError as error:
        _log.warning("%s", error)
        return None
    return summary if summary and summary.images == opened.frozen.images else None


def _check_remaining(
    opened: OpenJob, chosen: Sequence[DeviceSpec], left: Sequence[Shard] | None = None
) -> None:
    """Check that the remaining images of a resumed job can be processed as the first ones of their
    generation were. A new job was checked before it was frozen; on a finished job none of this
    matters. Before images are appended, this is checked too: if different generations needed
    different decoders, no version could finish the job.

    Args:
        opened: the job.
        chosen: the devices.
        left: the shards to process; default: those that are not committed.

    Raises:
        JobMismatchError: another decoder, device or library. SourceError, without which every
        remaining image would become a `missing` row. OutputError, ModelError: the model is missing
        or changed.
    """
    if left is None:
        done = opened.committed()
        left = [shard for shard in opened.shards if shard.number not in done]
    if not left:
        return
    for generation in {shard.plan_file: opened.generation_of(shard) for shard in left}.values():
        _check_decoder(generation, opened.paths.output)
        _check_fixed(generation, opened, chosen)
    try:
        sources.check(opened.sources_of(left), opened.first.job.access)
    except SourceError as error:
        raise SourceError(f"{error} If it has moved, add --moved OLD=NEW.") from error
    model.verify_model(opened.first)


def _check_decoder(generation: documents.Frozen | documents.Appended, output: str) -> None:
    """Raise JobMismatchError if this version decodes images differently from the one that froze
    the generation: one answer id would stand for two kinds of answers.
    """
    if generation.decoder != DECODER:
        began = generation.versions.get("imagemill", "another version")
        raise JobMismatchError(
            f"{output} was started with decoder {generation.decoder} (imagemill {began}),"
            f" this is decoder {DECODER} (imagemill {__version__}). Images may be decoded"
            f" differently. Continue with imagemill {began}, or give another --output."
        )


def _check_fixed(
    generation: documents.Frozen | documents.Appended,
    opened: OpenJob,
    chosen: Sequence[DeviceSpec],
) -> None:
    """Raise JobMismatchError if answers would differ in the last bits, because of another model of
    the device or another version of a library.
    """
    now = devices.fixed_facts(chosen, opened.first.job.session.batch_size)
    for what in sorted(generation.fixed.keys() | now.keys()):
        was, found = generation.fixed.get(what, "none"), now.get(what, "none")
        if was != found:
            raise JobMismatchError(
                f"{opened.paths.output} was started with {what} {was}, this is {what} {found},"
                " whose answers differ in the last bits. Continue where it was started, or give"
                " another --output."
            )


def dry_run(settings: Settings) -> DryRun:
    """List the sources and return what a job would be, or with `append` what would be added to it.
    Nothing is written to the output.
    """
    check_settings(settings)
    opened = OpenJob.find(settings.output, settings.log_dir)
    extended = opened if settings.append else None
    typed = settings.devices or (extended.frozen.devices if extended else automatic.CPU)
    with contextlib.closing(connect(settings.engine, lambda _: None)) as machines:
        chosen = machines.devices(typed)
    if extended:
        return _dry_append(settings, extended, chosen)
    store = open_store(_paths_of(settings))
    if opened is None:
        store.check_unused()
    resolved = sources.resolve(settings.sources)
    listing.check_sources(resolved, settings)
    skipped, keeper = Skipped(), listing.keeper_of(settings)
    first: list[str] = []

    def noting(entries: Iterator[records.Entry]) -> Iterator[records.Entry]:
        for entry in entries:
            if len(first) < MAX_NAMES:
                first.append(sources.shown(row_path(resolved[entry.source], entry.path)))
            yield entry

    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        listed = plan.spool(
            noting(listing.listing(settings, skipped, keeper, store.paths.root)),
            Path(folder) / "listing",
        )
    if not listed.images:
        raise listing.no_images(settings, skipped)
    keeper.kept()
    notes = list(skipped.notes())
    if typed == automatic.CPU:
        now = machines.automatic(listed.images, settings.precision, notes.append)
        chosen = chosen if now == typed else machines.devices(now)
    shard_size = settings.shard_size or plan.auto_shard_size(listed.images, len(chosen))
    return DryRun(
        images=listed.images,
        shard_size=shard_size,
        skipped_by_suffix=dict(sorted(skipped.by_suffix.items())),
        skipped_hidden=skipped.hidden,
        skipped_by_filter=skipped.by_filter,
        first=tuple(first),
        skipped_broken_links=skipped.broken_links,
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
        skipped_by_suffix=dict(sorted(found.skipped.by_suffix.items())),
        skipped_hidden=found.skipped.hidden,
        skipped_by_filter=found.skipped.by_filter,
        first=found.difference.new.names,
        skipped_broken_links=found.skipped.broken_links,
        notes=(*found.notes, *append.describe(found, settings)),
        append=True,
    )


def _report_finished(
    settings: Settings,
    opened: OpenJob,
    summary: Summary,
    watcher: observer.Watcher,
    found: Difference | None,
) -> Summary:
    """Say that the job is finished, and name images that are new in the sources since, unless this
    command has looked for them already.
    """
    paths = opened.paths
    images, where = counted(summary.images, "image"), paths.shown(paths.predictions)
    watcher.notify(f"already finished: {images} in {where}")
    if not settings.append:
        try:
            again = listing.list_again(settings, opened, paths.spool)
        except (SourceError, UsageError, OutputError) as error:
            watcher.notify(f"images that are new in the source are not known: {error}")
        else:
            found = again.difference
            for line in append.describe(again, settings):
                watcher.notify(line)
        paths.sweep()
    summary = replace(
        summary,
        output=paths.output,
        resumed_shards=summary.shards,
        seconds=0.0,
        images_per_second=None,
    )
    return _with_difference(summary, settings, found)


def _with_difference(summary: Summary, settings: Settings, found: Difference | None) -> Summary:
    """Return the summary with what is known of how the sources differ from the plan."""
    found = found or Difference(bytearray())
    new = found.new.count
    return replace(
        summary,
        new_in_source=0 if settings.append else new,
        appended=new if settings.append else 0,
        changed_in_source=found.changed.count,
        missing_in_source=found.missing.count,
    )
