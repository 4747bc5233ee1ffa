"""The course of one job, top to bottom: freeze or resume → launch → close.

The command line and the Python API call `run`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from imagemill import report
from imagemill.display import observer
from imagemill.errors import Interrupted, OutputError, SourceError, UsageError, counted
from imagemill.job import documents, ledger, lock
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import automatic, devices
from imagemill.pipeline.backends.devices import backend_of
from imagemill.records import DeviceSpec, Precision, Progress, Settings, Summary
from imagemill.runner import append, attempts, freeze, listing, model, preflight, resume, summarise
from imagemill.runner.difference import Difference
from imagemill.runner.settings import check_settings
from imagemill.system import files, serialization
from imagemill.workers.launcher import Launcher
from imagemill.workers.machines import Machines, connect
from imagemill.workers.tally import Outcome

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
    settings = check_settings(settings)
    with contextlib.closing(
        connect(settings.engine, watcher.notify, allow_mixed=settings.allow_mixed)
    ) as machines:
        return _run(settings, machines, watcher)


def _run(settings: Settings, machines: Machines, watcher: observer.Watcher) -> Summary:
    opened = OpenJob.find(settings.output, settings.log_dir)
    store = opened.store if opened else open_store(JobPaths.of(settings.output, settings.log_dir))
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
        listing.check_sources(settings.sources, settings)
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
                    known = (*opened.frozen.job.sources, *settings.sources)
                    listing.check_moved(known, opened.first.job.access, opened.all_rows())
                    files.remove_folder(paths.generation(len(opened.generations) + 1))
                    if settings.append:
                        done = opened.committed()
                        left = [shard for shard in opened.shards if shard.number not in done]
                        resume.check_remaining(opened, chosen, left)
                        opened, found = append.append(settings, opened, chosen, watcher)

                def fall_back() -> tuple[OpenJob, Sequence[DeviceSpec]]:
                    nonlocal opened
                    cpus = machines.devices(automatic.CPU)
                    store.remove(paths.job)
                    opened = None
                    again = (settings, store, lambda _: (automatic.CPU, cpus), with_model, watcher)
                    opened = freeze.freeze(*again)
                    return opened, cpus

                return attempts.attempt_until_it_fits(
                    partial(
                        _carry_out,
                        settings=settings,
                        machines=machines,
                        watcher=watcher,
                        found=found,
                    ),
                    opened,
                    chosen,
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


def _carry_out(
    opened: OpenJob,
    chosen: Sequence[DeviceSpec],
    is_resumed: bool,
    *,
    settings: Settings,
    machines: Machines,
    watcher: observer.Watcher,
    found: Difference | None,
) -> Summary:
    """Process the remaining shards of a job, close its ledger and write its summary. `found` is how
    the sources differed from the plan before this command appended to it.
    """
    store, paths, frozen = opened.store, opened.paths, opened.frozen
    job = frozen.job
    done, again = opened.committed(), set[int]()
    if settings.retry_failed is not None:
        again = opened.shards_with(settings.retry_failed)
        watcher.notify(
            f"computing again: the failed images of {counted(len(again), 'shard')}. Rows that are"
            " ok stay as they are"
        )
        done -= again
    left = [
        replace(shard, is_retried=shard.number in again)
        for shard in opened.shards
        if shard.number not in done
    ]
    if is_resumed:
        resume.check_remaining(opened, chosen, left)
    if not left and (summary := _read_summary(opened)):
        ledger.check_sizes(store)
        if settings.report and not store.exists(paths.report):  # it was interrupted
            report.attempt(opened, watcher.notify)
        return _report_finished(settings, opened, summary, watcher, found)
    store.remove(paths.summary)
    store.remove(paths.retired)
    if settings.retry_failed is not None:
        store.remove(paths.manifest)
        store.remove(paths.score)  # both are of rows that change
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
        with preflight.Sampler(job, sampled, watcher.notify) as sampler:

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
    as_line = partial(sources.as_line, job.sources, access=job.access)
    totals = opened.close(outcome.receipts, as_line)
    if totals.unlisted:
        are = "is" if totals.unlisted == 1 else "are"
        watcher.notify(
            f"{counted(totals.unlisted, 'failed image')} {are} in archives or tables: not in"
            " failed.txt, but --retry-failed processes them again"
        )
    summary = replace(
        summarise.summarise(opened, done, outcome, totals, (*chosen, *outcome.joined)),
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
    watcher.notify("already finished")
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
