"""One job, readable top to bottom: open or resume → plan → launch → close.

`run` is all that the command line and the Python API call. What a job is frozen as (`job.json`) is `Frozen`, below.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill import codec, devices, layout, ledger, plan, sources
from imagemill.errors import JobMismatchError, OutputError, SourceError, TooManyBadError, UsageError
from imagemill.images import DECODER
from imagemill.launcher import Launcher, Outcome, Progress
from imagemill.layout import JobPaths
from imagemill.models import bundle, registry
from imagemill.records import (
    Bundle,
    Card,
    Clock,
    DeviceSpec,
    DeviceSummary,
    Job,
    Limits,
    Precision,
    Receipt,
    Saved,
    Settings,
    Shard,
    Status,
    Summary,
)
from imagemill.sources import Filters, Skipped
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.quantizing import Prepared

DEFAULT_MODEL = "resnext101_32x4d"
DEFAULT_BATCH_SIZE = 4
_FORMAT = 1
_NAMED_NEW = 10


@dataclass(frozen=True, slots=True)
class Frozen:
    """`job.json`: the job as it was frozen. Written last of what a start writes, so its presence says that the plan is whole."""

    format: int
    created: str
    job: Job
    devices: str
    filters: Filters
    limit: int | None
    shard_size: int
    pictures: int
    groups: int
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int
    skipped_by_filter: int
    backend: str
    variant_sha256: str | None = None
    """Of the quantised variant that the job runs in; None where it runs in the bundle's own weights."""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `--dry-run` found; nothing was written."""

    images: int
    shard_size: int
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int
    skipped_by_filter: int
    first: tuple[str, ...]
    """Paths of the first pictures."""


class Watcher:
    """What a caller may want to hear while a job runs; this one wants nothing."""

    def say(self, message: str) -> None:
        """One line for the user."""

    def download(self, done: int, total: int | None) -> None:
        """A model is being downloaded: bytes so far, and in all where known."""

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:  # noqa: ARG002 - for those who override it
        """The job starts: `resumed` of `total` pictures are done. Returns what is told of the progress."""
        return lambda _: None

    def end(self) -> None:
        """The workers are gone."""


def run(settings: Settings, watcher: Watcher | None = None) -> Summary:
    """Classify every picture of the sources, one row each, resuming what an earlier call began.

    Returns:
        the summary, also written to `summary.json`.

    Raises:
        UsageError: settings that make no sense, or that contradict the frozen job. DeviceError, ModelError, SourceError: before
        anything was written. OutputError, WorkerError, TooManyBadError, Interrupted: the job can be resumed.
    """
    watcher = watcher or Watcher()
    _check(settings)
    paths = JobPaths(Path(settings.output).absolute(), Path(settings.log_dir).absolute() if settings.log_dir else None)
    frozen = read_frozen(paths)
    if frozen and frozen.job.log_dir and not settings.log_dir:
        paths = replace(paths, log_dir=Path(frozen.job.log_dir))
    chosen = devices.resolve(settings.devices or (frozen.devices if frozen else "auto"))
    _backend(chosen, settings.allow_mixed)
    if frozen is None:
        _refuse_foreign(paths)
        with_model = _resolve_model(settings, watcher)
    with layout.locked(paths):
        frozen = read_frozen(paths)  # again: another launcher may have frozen it before we held the lock
        paths.sweep()
        for folder in (paths.predictions, paths.plan, paths.logs):
            layout.make_folder(folder)
        with _logging_to(paths.launcher_log):
            frozen = _freeze(settings, paths, chosen, with_model, watcher) if frozen is None else _resume(settings, frozen, chosen, watcher)
            return _carry_out(settings, frozen, paths, chosen, watcher)


def _carry_out(settings: Settings, frozen: Frozen, paths: JobPaths, chosen: Sequence[DeviceSpec], watcher: Watcher) -> Summary:
    """Launch what is left of a frozen job and close its ledger."""
    shards = plan.shards(paths.plan)
    if sum(shard.count for shard in shards) != frozen.pictures:
        raise OutputError(f"{paths.plan} does not hold the {frozen.pictures} pictures of job.json. Start anew in another --output.")
    done = ledger.committed(paths, shards)
    if settings.retry_failed is not None:
        again = ledger.shards_with(paths, shards, settings.retry_failed)
        watcher.say(f"retrying {len(again)} of {len(done)} finished shards")
        done -= again
    left = [shard for shard in shards if shard.number not in done]
    if not left and (summary := read_summary(paths)):
        return _report_finished(frozen, paths, summary, watcher)
    paths.summary.unlink(missing_ok=True)
    resumed = sum(shard.count for shard in shards if shard.number in done)
    if done:
        watcher.say(f"resuming: {resumed:,} of {frozen.pictures:,} pictures are done")
    guard = _bad_fraction_guard(settings.max_bad_fraction, frozen.pictures, paths, shards, done)
    tick = watcher.begin(frozen.pictures, resumed)
    try:
        outcome = Outcome(devices={d.name: 0 for d in chosen}, restarts={d.name: 0 for d in chosen})
        if left:
            launcher = Launcher(
                frozen.job,
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
    tally = ledger.close(paths, shards, frozen.job.sources, frozen.job.plan_id, frozen.job.answer_id, outcome.receipts)
    summary = _summarise(frozen, paths, shards, done, outcome, tally, chosen)
    layout.write_whole(paths.summary, codec.dumps(summary))
    return summary


# Open or resume.


def _check(settings: Settings) -> None:
    """Settings that can be judged alone. Raises: UsageError."""
    for name in ("batch_size", "top_k", "shard_size", "limit", "max_pixels", "max_bytes"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{_flag(name)} {value}: must be at least 1.")
    for name in ("num_workers", "batches_per_step"):
        value = getattr(settings, name)
        if value is not None and not 1 <= value <= 256:
            raise UsageError(f"{_flag(name)} {value}: must be from 1 to 256.")
    if settings.max_bad_fraction is not None and not 0 <= settings.max_bad_fraction <= 1:
        raise UsageError(f"--max-bad-fraction {settings.max_bad_fraction}: must be from 0 to 1.")
    if settings.max_seconds is not None and not settings.max_seconds > 0:  # NaN neither
        raise UsageError(f"--max-seconds {settings.max_seconds}: must be more than 0.")
    for flag, values, known in (("--save", settings.save, list(Saved)), ("--retry-failed", settings.retry_failed, list(Status))):
        for value in values or ():
            if value not in known or value == Status.OK:
                hint = " Write --retry-failed=STATUS, with an equals sign, or alone and last." if flag == "--retry-failed" else ""
                raise UsageError(f"{flag} {value}: not known. Known: {', '.join(item for item in known if item != Status.OK)}.{hint}")
    if settings.precision not in (None, "auto", *Precision):
        raise UsageError(f"--precision {settings.precision}: not known. Known: auto, {', '.join(Precision)}.")
    if settings.engine != "local":
        raise UsageError(f"--engine {settings.engine}: only local is supported by this version.")
    if not settings.sources:
        raise UsageError("give at least one SOURCE: a folder or a picture.")
    for source in settings.sources:
        sources.resolve(source)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_foreign(paths: JobPaths) -> None:
    """Raises: OutputError if the folder holds something that no start of ours has left."""
    try:
        names = {entry.name for entry in paths.root.iterdir()}
        foreign = sorted(names - paths.ours())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise OutputError(f"--output {paths.root} is a file, or lies below one. Give a folder.") from error
    except OSError as error:
        raise OutputError(f"--output {paths.root} cannot be looked into: {error.strerror}. Give another --output.") from error
    if foreign:
        raise OutputError(f"--output {paths.root} is not empty and not an imagemill job (it holds {foreign[0]!r}). Give a new folder.")


def _resolve_model(settings: Settings, watcher: Watcher) -> Bundle:
    models_dir = Path(settings.models_dir) if settings.models_dir else bundle.default_models_dir()
    found = registry.resolve(settings.model or DEFAULT_MODEL, models_dir, say=watcher.say, progress=watcher.download)
    bundle.verify_hash(found)
    return found


def _freeze(settings: Settings, paths: JobPaths, chosen: Sequence[DeviceSpec], model: Bundle, watcher: Watcher) -> Frozen:
    """List the sources, cut the plan, resolve what was left to us, and write it all down."""
    shutil.rmtree(paths.plan)
    layout.make_folder(paths.plan)
    filters = Filters(settings.include or (), settings.exclude or (), settings.all_files or False)
    skipped = Skipped()
    listed = plan.spool(_listing(settings, filters, skipped, paths.root), paths.spool)
    by_group = listed.groups == len(chosen) > 1
    shard_size = settings.shard_size or plan.auto_shard_size(listed.pictures, len(chosen))
    plan.cut(paths.spool, paths.plan, shard_size, by_group=by_group)
    paths.spool.unlink()
    if listed.groups > 1 and len(chosen) > 1 and not by_group:
        watcher.say(
            f"note: the sources have {listed.groups} sub-folders for {len(chosen)} devices: shards are dealt without regard to folders"
        )
    if settings.preprocess == "center-crop":
        model = replace(model, card=replace(model.card, recipe=replace(model.card.recipe, resize=None)))
    prepared = _prepare(settings, paths, chosen, model, listed.pictures, watcher)
    job = _job(settings, paths, chosen, model, prepared, shard_size, filters)
    frozen = Frozen(
        format=_FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        job=job,
        devices=settings.devices or "auto",
        filters=filters,
        limit=settings.limit,
        shard_size=shard_size,
        pictures=listed.pictures,
        groups=listed.groups if by_group else 1,
        skipped_by_suffix=dict(sorted(skipped.by_suffix.items())),
        skipped_hidden=skipped.hidden,
        skipped_by_filter=skipped.by_filter,
        backend=_backend(chosen, settings.allow_mixed),
        variant_sha256=prepared.sha256,
        versions={"imagemill": __version__},
    )
    layout.write_whole(paths.job, codec.dumps(frozen))
    return frozen


def _job(
    settings: Settings,
    paths: JobPaths,
    chosen: Sequence[DeviceSpec],
    model: Bundle,
    prepared: Prepared,
    shard_size: int,
    filters: Filters,
) -> Job:
    card = model.card
    resolved = tuple(sources.resolve(source) for source in settings.sources)
    save = tuple(sorted({Saved(item) for item in settings.save or ()}, reverse=True))
    top_k = settings.top_k or 5
    return Job(
        output=str(paths.root),
        sources=resolved,
        model_file=str(prepared.model_file.absolute()),
        card=card,
        precision=prepared.precision,
        variant=prepared.variant,
        batch_size=settings.batch_size or DEFAULT_BATCH_SIZE,
        batches_per_step=settings.batches_per_step or 0,
        num_workers=settings.num_workers or 0,
        top_k=top_k,
        save=save,
        limits=_limits(settings, Limits()),
        plan_id=plan_id(resolved, filters, settings.limit, shard_size),
        answer_id=answer_id(card, prepared, _backend(chosen, settings.allow_mixed), top_k, save),
        cache_dir=str(model.dir.absolute() / "compiled"),
        log_dir=str(paths.logs) if settings.log_dir else None,
    )


def _prepare(settings: Settings, paths: JobPaths, chosen: Sequence[DeviceSpec], model: Bundle, pictures: int, watcher: Watcher) -> Prepared:
    """Resolve the precision, on the job's own pictures where something must be measured."""
    from imagemill import quantizing  # brings NumPy and the decoder, which a repeated command can do without

    def entries() -> Iterator[plan.Entry]:
        for shard in plan.shards(paths.plan):
            for row in plan.read(paths.plan, shard):
                yield plan.Entry(row.source, row.path, row.size)

    resolved = [sources.resolve(source) for source in settings.sources]
    return quantizing.prepare(
        settings.precision, model, resolved, entries, pictures, chosen=chosen, limits=_limits(settings, Limits()), say=watcher.say
    )


def plan_id(resolved: Sequence[str], filters: Filters, limit: int | None, shard_size: int) -> str:
    """Hash of what decides the listing."""
    return _hash(list(resolved), asdict(filters), limit, shard_size)


def answer_id(card: Card, prepared: Prepared, backend: str, top_k: int, save: Sequence[Saved]) -> str:
    """Hash of what decides an answer."""
    weights = [card.sha256, prepared.precision, prepared.variant, prepared.sha256]
    return _hash(weights, codec.to_plain(card.recipe), card.scores, list(card.labels), DECODER, backend, top_k, list(save))


def _limits(settings: Settings, otherwise: Limits) -> Limits:
    return Limits(*(getattr(settings, name) or getattr(otherwise, name) for name in ("max_pixels", "max_bytes", "max_seconds")))


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _backend(chosen: Sequence[DeviceSpec], allow_mixed: bool) -> str:
    backends = sorted({device.backend for device in chosen})
    if len(backends) > 1 and not allow_mixed:
        raise UsageError(
            f"--devices mixes the backends {' and '.join(backends)}, whose answers differ in the last bits. Add --allow-mixed."
        )
    return "+".join(backends)


def _resume(settings: Settings, frozen: Frozen, chosen: Sequence[DeviceSpec], watcher: Watcher) -> Frozen:
    """The frozen job with what may differ today. Raises: JobMismatchError, naming both values of what may not."""
    job = frozen.job
    asked_sources = tuple(sources.resolve(source) for source in settings.sources)
    pairs: list[tuple[str, object, object]] = [
        ("SOURCE", list(job.sources), list(asked_sources)),
        ("--include", list(frozen.filters.include), settings.include and list(settings.include)),
        ("--exclude", list(frozen.filters.exclude), settings.exclude and list(settings.exclude)),
        ("--all-files", frozen.filters.all_files, settings.all_files),
        ("--limit", frozen.limit, settings.limit),
        ("--shard-size", frozen.shard_size, settings.shard_size),
        ("--top-k", job.top_k, settings.top_k),
        ("--save", sorted(job.save), settings.save and sorted(settings.save)),
        ("--precision", job.precision.value, None if settings.precision == "auto" else settings.precision),
        ("backend", frozen.backend, _backend(chosen, settings.allow_mixed)),
        ("--preprocess", "center-crop" if job.card.recipe.resize is None else "card", settings.preprocess),
    ]
    if settings.model is not None:
        card = _resolve_model(settings, watcher).card
        pairs.append(("--model", f"{job.card.name} ({job.card.sha256[:12]})", f"{card.name} ({card.sha256[:12]})"))
    for flag, was, asked in pairs:
        if asked is not None and asked != was:
            what = "plan id" if flag in ("SOURCE", "--include", "--exclude", "--all-files", "--limit", "--shard-size") else "answer id"
            raise JobMismatchError(
                f"{settings.output} was started with {flag} {was}, now {flag} {asked} is asked for: that would change its {what}. "
                "Leave it out to resume, or give another --output."
            )
    if not Path(job.model_file).is_file():
        raise OutputError(f"the job's model {job.model_file} is gone. Bring it back: `imagemill get-model {job.card.name}`.")
    bundle.verify_hash(Bundle(Path(job.model_file).parent, job.card))
    if frozen.variant_sha256 is not None:
        from imagemill import quantizing

        quantizing.verify_variant(Path(job.model_file), frozen.variant_sha256)
    job = replace(
        job,
        output=str(Path(settings.output).absolute()),
        limits=_limits(settings, job.limits),
        batch_size=settings.batch_size or job.batch_size,
        batches_per_step=settings.batches_per_step or job.batches_per_step,
        num_workers=settings.num_workers or job.num_workers,
        log_dir=settings.log_dir or job.log_dir,
    )
    return replace(frozen, job=job)


# Listing.


def _listing(settings: Settings, filters: Filters, skipped: Skipped, output: Path | None) -> Iterator[plan.Entry]:
    resolved = [sources.resolve(source) for source in settings.sources]
    return islice(_entries(resolved, filters, skipped, output), settings.limit)


def _entries(resolved: Sequence[str], filters: Filters, skipped: Skipped, output: Path | None) -> Iterator[plan.Entry]:
    """All sources one after another; their sub-folders are counted on."""
    offset = 0
    for source in sources.open_all(resolved, output):
        highest = offset
        for entry in source.entries(filters, skipped):
            highest = max(highest, offset + entry.group)
            yield replace(entry, group=offset + entry.group)
        offset = highest + 1


def dry_run(settings: Settings) -> DryRun:
    """List the sources and say what a job would be; nothing is written to the output."""
    _check(settings)
    chosen = devices.resolve(settings.devices or "auto")
    filters, skipped = Filters(settings.include or (), settings.exclude or (), settings.all_files or False), Skipped()
    first: list[str] = []

    def noting(entries: Iterator[plan.Entry]) -> Iterator[plan.Entry]:
        for entry in entries:
            if len(first) < _NAMED_NEW:
                first.append(sources.shown(entry.path))
            yield entry

    with tempfile.TemporaryDirectory(prefix="imagemill-") as folder:
        listed = plan.spool(noting(_listing(settings, filters, skipped, Path(settings.output))), Path(folder) / "listing")
    shard_size = settings.shard_size or plan.auto_shard_size(listed.pictures, len(chosen))
    by_suffix = dict(sorted(skipped.by_suffix.items()))
    return DryRun(listed.pictures, shard_size, by_suffix, skipped.hidden, skipped.by_filter, tuple(first))


def _report_finished(frozen: Frozen, paths: JobPaths, summary: Summary, watcher: Watcher) -> Summary:
    """Nothing is left to do: say so, and name what is new in the sources since."""
    watcher.say(f"finished already: {summary.images:,} pictures in {paths.predictions}")
    try:
        count, names = _new_in_source(frozen, paths)
    except SourceError as error:
        watcher.say(f"what is new in the source is not known: {error}")
        count, names = 0, []
    if count:
        more = f" and {count - len(names):,} more" if count > len(names) else ""
        watcher.say(
            f"{count:,} pictures are new in the source since the plan was frozen: {', '.join(names)}{more}. Run them into another --output."
        )
    return replace(summary, new_in_source=count, resumed_shards=summary.shards, seconds=0.0, images_per_second=None)


def _new_in_source(frozen: Frozen, paths: JobPaths) -> tuple[int, list[str]]:
    """How many pictures the sources hold that the plan does not, and the first of their names; both are read in order, side by side."""
    ordered = [source.ordered for source in sources.open_all(frozen.job.sources)]

    def keyed(rows: Iterable[plan.PlannedRow | plan.Entry]) -> Iterator[tuple[tuple[int, object], bytes]]:
        for number, row in enumerate(rows):
            yield (row.source, row.path.split(b"/") if ordered[row.source] else number), row.path

    planned = keyed(row for shard in plan.shards(paths.plan) for row in plan.read(paths.plan, shard))
    count, names = 0, list[str]()
    next_planned = next(planned, None)
    for key, path in keyed(_entries(frozen.job.sources, frozen.filters, Skipped(), paths.root)):
        while next_planned is not None and next_planned[0] < key:
            next_planned = next(planned, None)
        if next_planned is None and frozen.limit is not None:
            break  # beyond the limit nothing is new
        if next_planned is None or next_planned[0] != key:
            count += 1
            if len(names) < _NAMED_NEW:
                names.append(sources.shown(path))
    return count, names


# Watching and closing.


def _bad_fraction_guard(
    fraction: float | None, pictures: int, paths: JobPaths, shards: Sequence[Shard], done: set[int]
) -> Callable[[Receipt], None]:
    """Ends the job once more than `fraction` of all its pictures are known to be bad."""
    if fraction is None:
        return lambda _: None
    bad = sum(sum(ledger.examine(paths.part(s.number)).failed_by_status.values()) for s in shards if s.number in done)

    def check() -> None:
        if bad > fraction * pictures:
            raise TooManyBadError(
                f"{bad:,} of {pictures:,} pictures are bad, more than --max-bad-fraction {fraction:g} allows. "
                "See the status and error columns; repeat the command with a larger fraction, or without it, to resume."
            )

    def guard(receipt: Receipt) -> None:
        nonlocal bad
        bad += receipt.failed
        check()

    check()
    return guard


def _summarise(
    frozen: Frozen,
    paths: JobPaths,
    shards: Sequence[Shard],
    done: set[int],
    outcome: Outcome,
    tally: ledger.Tally,
    chosen: Sequence[DeviceSpec],
) -> Summary:
    rows = sum(outcome.devices.values())
    seconds = outcome.seconds

    def rate(count: int) -> float | None:
        return round(count / seconds, 3) if count and seconds else None

    bottleneck, rates, advice = judge(list(outcome.clocks.values()), rows, seconds, _threads(frozen.job, chosen))
    return Summary(
        images=tally.images,
        ok=tally.images - tally.failed,
        failed=tally.failed,
        failed_by_status=tally.failed_by_status,
        skipped_by_suffix=frozen.skipped_by_suffix,
        shards=len(shards),
        resumed_shards=len(done),
        seconds=round(seconds, 3),
        images_per_second=rate(rows),
        model=frozen.job.card.name,
        precision=frozen.job.precision.value,
        bottleneck=bottleneck,
        devices=tuple(
            DeviceSummary(d.name, outcome.devices[d.name], rate(outcome.devices[d.name]), outcome.restarts[d.name]) for d in chosen
        ),
        output=str(paths.root),
        rates=rates,
        advice=advice,
        skipped_hidden=frozen.skipped_hidden,
        skipped_by_filter=frozen.skipped_by_filter,
    )


def _threads(job: Job, chosen: Sequence[DeviceSpec]) -> int:
    return sum(job.num_workers or len(device.cores) for device in chosen)


def judge(clocks: Sequence[Clock], rows: int, seconds: float, threads: int) -> tuple[str | None, dict[str, float], str | None]:
    """What bounded a run, the rates its clocks suggest (images/s, all devices), and what to change.

    The loop of each worker either waits for pictures, waits for the session, or writes; the largest of the three sums names the bottleneck,
    and where it waited for pictures, the larger of reading and decoding does.
    """
    if not rows or not clocks or not seconds:
        return None, {}, None
    total = Clock(*(sum(getattr(clock, name) for clock in clocks) for name in Clock.__slots__))
    waits = {"compute": total.compute, "write": total.write, ("read" if total.read > total.decode else "decode"): total.starved}
    bottleneck = max(waits, key=lambda name: waits[name])
    rates = {"achieved": round(rows / seconds, 3)}
    if total.read + total.decode:
        rates["decode_only"] = round(total.pictures * threads / (total.read + total.decode), 3)
    computing = seconds * len(clocks) - total.starved - total.write
    if computing > 0 and total.compute:
        rates["compute_only"] = round(rows * len(clocks) / computing, 3)
    advice = {
        "compute": "a lower precision or one more device would help",
        "decode": "more cores, or smaller pictures, would help; more --num-workers if cores are idle",
        "read": "more --num-workers, or storage that answers faster, would help",
        "write": "a faster disk, larger shards, or fewer --save columns would help",
    }[bottleneck]
    return bottleneck, rates, advice


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How far a job is."""

    images: int
    done: int
    shards: int
    shards_done: int
    failed_by_status: Mapping[str, int]
    running: bool
    complete: bool


def status(paths: JobPaths, frozen: Frozen) -> JobStatus:
    """Count what is committed; reads only, so it is safe beside a running job."""
    shards = plan.shards(paths.plan)
    done = ledger.committed(paths, shards)
    failed: Counter[str] = Counter()
    for shard in shards:
        if shard.number in done:
            failed.update(ledger.examine(paths.part(shard.number)).failed_by_status)
    return JobStatus(
        images=frozen.pictures,
        done=sum(shard.count for shard in shards if shard.number in done),
        shards=len(shards),
        shards_done=len(done),
        failed_by_status=dict(sorted(failed.items())),
        running=layout.is_locked(paths),
        complete=len(done) == len(shards) and paths.summary.is_file(),
    )


def verify(paths: JobPaths, frozen: Frozen, *, quarantine: bool = False) -> tuple[list[ledger.Problem], list[Path]]:
    """Check a whole job against its plan; with `quarantine` move damaged parts aside.

    Returns:
        the problems, none if the job is complete and sound; and where damaged parts went.

    Raises:
        OutputError: quarantine is asked for while a run is at work on the folder.
    """
    shards = plan.shards(paths.plan)
    problems = list(ledger.verify(paths, shards, frozen.job.plan_id, frozen.job.answer_id))
    if sum(shard.count for shard in shards) != frozen.pictures:
        problems.append(ledger.Problem(None, paths.plan, f"does not hold the {frozen.pictures} pictures of job.json"))
    if not quarantine:
        return problems, []
    with layout.locked(paths):
        return problems, ledger.quarantine(paths, problems)


def read_frozen(paths: JobPaths) -> Frozen | None:
    """The frozen job of an output folder; None where there is none. Raises: OutputError where it cannot be read."""
    try:
        plain = json.loads(paths.job.read_bytes())
        written = plain.get("format") if isinstance(plain, dict) else None
        if written != _FORMAT:
            raise OutputError(f"{paths.job} has format {written}, this version of imagemill reads {_FORMAT}.")
        return codec.from_plain(Frozen, plain)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{paths.job} cannot be read: {error}. Give another --output.") from error


def read_summary(paths: JobPaths) -> Summary | None:
    """The summary of a finished job, or None."""
    try:
        return codec.from_plain(Summary, json.loads(paths.summary.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


class _LogFile(logging.FileHandler):
    """A log that goes without what it cannot write: a full disk is told once, by what needs it, and ends no job for a line of log."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # of opening it
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Say nothing."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _logging_to:  # noqa: N801 - reads as the verb it is
    """Send this package's log to a file, and nowhere else, for a while."""

    def __init__(self, path: Path) -> None:
        self._handler = _LogFile(path, delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def __enter__(self) -> None:
        logger = logging.getLogger("imagemill")
        self._before = (logger.level, logger.propagate)
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("imagemill")
        logger.removeHandler(self._handler)
        logger.level, logger.propagate = self._before
        self._handler.close()
