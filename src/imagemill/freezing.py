"""From settings to a frozen job (`job.json`), new or resumed."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill import records
from imagemill.display.observer import Watcher
from imagemill.errors import ClassCountError, JobMismatchError, OutputError, UsageError
from imagemill.job import plan, store
from imagemill.job.paths import JobPaths
from imagemill.listing import access_of, check_moved, filters_of, listing, no_images
from imagemill.models import bundle, registry
from imagemill.pipeline import sources
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources import Filters, Skipped
from imagemill.records import (
    Bundle,
    Card,
    DeviceSpec,
    Engine,
    Job,
    Limits,
    Precision,
    Saved,
    Settings,
    Shard,
    Status,
)
from imagemill.system import files, serialization
from imagemill.tuning import batch_size
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.tuning.precisions import Prepared

DEFAULT_MODEL = "resnext101_32x4d"
_FORMAT = 1
_MOST = 2**48
"""Of whatever is counted: beyond all pictures there are, and what a byte or an address takes of it still fits into 64 bits."""


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
    plan_nonce: str = ""
    """Which plan in an object store is this job's; see `home`."""
    skipped_broken_links: int = 0


def read_frozen(paths: JobPaths) -> Frozen | None:
    """The frozen job of an output folder; None where there is none. Raises: OutputError where it cannot be read."""
    try:
        plain = json.loads(store.read(paths, paths.job))
        written = plain.get("format") if isinstance(plain, dict) else None
        if written != _FORMAT:
            raise OutputError(f"{paths.shown(paths.job)} has format {written}, this version of imagemill reads {_FORMAT}.")
        return serialization.from_plain(Frozen, plain)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        remedy = "Repeat the command once the store answers, or give" if paths.url else "Give"
        raise OutputError(f"{paths.shown(paths.job)} cannot be read: {store.reason(error)}. {remedy} another --output.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{paths.shown(paths.job)} cannot be read: {error}. Give another --output.") from error


def check(settings: Settings) -> None:
    """Settings that can be judged alone. Raises: UsageError."""
    for name in ("batch_size", "top_k", "shard_size", "limit", "max_pixels", "max_bytes"):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, int):
            raise UsageError(f"{_flag(name)} {value!r}: must be a whole number.")
        if value is not None and value < 1:
            raise UsageError(f"{_flag(name)} {value}: must be at least 1.")
        if value is not None and value > _MOST:
            raise UsageError(f"{_flag(name)} {value}: must be at most {_MOST}.")
    for name in ("num_workers", "batches_per_step"):
        value = getattr(settings, name)
        if value is not None and not 1 <= value <= 256:
            raise UsageError(f"{_flag(name)} {value}: must be from 1 to 256.")
    if settings.max_bad_fraction is not None and not 0 <= settings.max_bad_fraction <= 1:
        raise UsageError(f"--max-bad-fraction {settings.max_bad_fraction}: must be from 0 to 1.")
    if not settings.grace_s >= 0:
        raise UsageError(f"--grace {settings.grace_s}: must be at least 0.")
    if settings.max_seconds is not None and not settings.max_seconds > 0:  # NaN neither
        raise UsageError(f"--max-seconds {settings.max_seconds}: must be more than 0.")
    for flag, values, known in (("--save", settings.save, list(Saved)), ("--retry-failed", settings.retry_failed, list(Status))):
        for value in values or ():
            if value not in known or value == Status.OK:
                hint = " Write --retry-failed=STATUS, with an equals sign, or alone and last." if flag == "--retry-failed" else ""
                raise UsageError(f"{flag} {value}: not known. Known: {', '.join(item for item in known if item != Status.OK)}.{hint}")
    if settings.precision not in (None, "auto", *Precision):
        raise UsageError(f"--precision {settings.precision}: not known. Known: auto, {', '.join(Precision)}.")
    if settings.engine not in list(Engine):
        raise UsageError(f"--engine {settings.engine}: not known. Known: {', '.join(Engine)}.")
    if settings.background is not None:
        parse_colour(settings.background)
    if not settings.sources:
        raise UsageError("give at least one SOURCE: a folder or a picture.")
    sources.resolve(settings.sources)
    access_of(settings)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_foreign(paths: JobPaths) -> None:
    """Raises: OutputError if the folder holds something that no start of ours has left."""
    if paths.url:
        if key := store.foreign(paths):
            raise OutputError(f"--output {paths.url} is not empty and not an imagemill job (it holds {key!r}). Give a new prefix.")
        return
    try:
        names = {entry.name for entry in paths.root.iterdir()}
        foreign = sorted(name for name in names - paths.ours() if not files.is_system_file(name))
    except FileNotFoundError:
        files.missing_goal(paths.root)
        return
    except NotADirectoryError as error:
        raise OutputError(f"--output {paths.root} is a file, or lies below one. Give a folder.") from error
    except OSError as error:
        raise OutputError(f"--output {paths.root} cannot be looked into: {error.strerror}. Give another --output.") from error
    if foreign:
        raise OutputError(f"--output {paths.root} is not empty and not an imagemill job (it holds {foreign[0]!r}). Give a new folder.")


def resolve_model(settings: Settings, watcher: Watcher) -> Bundle:
    """The bundle that the settings mean, fetched where it lacks, with the labels that they give.

    Raises:
        UsageError: there is no such model, or it cannot give what is to be saved. ClassCountError: the labels do not fit. ModelError.
    """
    models_dir = Path(settings.models_dir) if settings.models_dir else bundle.default_models_dir()
    found = registry.resolve(settings.model or DEFAULT_MODEL, models_dir, say=watcher.say, progress=watcher.download)
    card = found.card
    for saved in settings.save or ():
        if saved not in card.outputs:
            raise UsageError(f"--save {saved}: {card.name} has no such output. Leave it out, or wrap the file again with --{saved} TENSOR.")
    if settings.labels is None:
        return found
    labels = bundle.read_labels(Path(settings.labels))
    if len(labels) != len(card.labels):
        classes = len(card.labels)
        raise ClassCountError(
            f"{bundle.MODEL} returns {classes} classes, {settings.labels} has {len(labels)} lines. "
            f"Give the {classes}-line file with --labels."
        )
    return replace(found, card=replace(card, labels=labels))


def with_recipe(model: Bundle, settings: Settings) -> Bundle:
    """Return the bundle with the preprocessing that the settings change."""
    recipe = model.card.recipe
    if settings.preprocess == "center-crop":
        recipe = replace(recipe, resize=None)
    if settings.background is not None:
        recipe = replace(recipe, background=parse_colour(settings.background))
    return replace(model, card=replace(model.card, recipe=recipe))


def parse_colour(text: str) -> str:
    """Return a colour as `#rrggbb`. Raises: UsageError if it is not an opaque colour."""
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
    except (ValueError, AttributeError) as error:
        raise UsageError(f"--background {text}: not a colour. Give a name such as white, or #rrggbb.") from error
    if alpha not in ([], [255]):
        raise UsageError(f"--background {text}: must be opaque. Give a name such as white, or #rrggbb.")
    return f"#{red:02x}{green:02x}{blue:02x}"


def _identity(card: Card) -> str:
    """A model for people, and for telling it from others: of a wrapped one its own card counts too."""
    return f"{card.name} ({str(card.origin.get('wrapped', card.sha256))[:12]})"


def _told_labels(labels: Sequence[str]) -> str:
    """A list of labels for people, and for telling it from others."""
    digest = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:12]
    return f"of {len(labels)} labels from {labels[0]!r} to {labels[-1]!r} (sha256 {digest})" if labels else "without a label"


def freeze(settings: Settings, paths: JobPaths, chosen: Sequence[DeviceSpec], model: Bundle, watcher: Watcher) -> Frozen:
    """List the sources, cut the plan, resolve what was left to us, and write it all down.

    Raises:
        FileExistsError: in an object store, where another launcher was quicker. Whatever listing, quantising and writing raise.
    """
    paths.plan_nonce.unlink(missing_ok=True)
    files.clear_folder(paths.plan)
    filters = filters_of(settings)
    skipped = Skipped()
    listed = plan.spool(listing(settings, skipped, paths.root, paths.plan), paths.spool)
    if not listed.pictures:
        raise no_images(settings, skipped)
    for note in skipped.notes():
        watcher.say(note)
    by_group = listed.groups == len(chosen) > 1
    shard_size = settings.shard_size or plan.auto_shard_size(listed.pictures, len(chosen))
    plan.cut(paths.spool, paths.plan, shard_size, by_group=by_group)
    paths.spool.unlink()
    access = access_of(settings)
    check_moved(sources.resolve(settings.sources), access, paths.plan)
    if listed.groups > 1 and len(chosen) > 1 and not by_group:
        watcher.say(
            f"note: the sources have {listed.groups} sub-folders for {len(chosen)} devices: shards are dealt without regard to folders"
        )
    model = with_recipe(model, settings)
    prepared = _prepare(settings, paths, chosen, model, listed.pictures, watcher)
    job = batch_size.resolved(_job(settings, paths, chosen, model, prepared, shard_size, filters), chosen)
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
        skipped_broken_links=skipped.broken_links,
        backend=backend_of(chosen, settings.allow_mixed),
        variant_sha256=prepared.sha256,
        versions={"imagemill": __version__},
        plan_nonce=store.publish_plan(paths),
    )
    try:
        store.write(paths, paths.job, serialization.dumps(frozen), create=True)
    except FileExistsError:
        there = read_frozen(paths)
        if there is None or there.plan_nonce != frozen.plan_nonce:  # else it is ours: only the answer to the first try was lost
            store.forget_plan(paths, frozen.plan_nonce)
            raise
    return replace(frozen, job=replace(job, access=access))


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
    resolved = sources.resolve(settings.sources)
    save = tuple(sorted({Saved(item) for item in settings.save or ()}, reverse=True))
    top_k = settings.top_k or 5
    return Job(
        output=paths.output,
        sources=resolved,
        model_file=str(prepared.model_file.absolute()),
        card=card,
        precision=prepared.precision,
        variant=prepared.variant,
        batch_size=settings.batch_size or 0,
        batches_per_step=settings.batches_per_step or 0,
        num_workers=settings.num_workers or 0,
        top_k=top_k,
        save=save,
        limits=_limits(settings, Limits()),
        plan_id=plan_id(resolved, filters, settings.limit, shard_size),
        answer_id=answer_id(card, prepared, backend_of(chosen, settings.allow_mixed), top_k, save),
        cache_dir=str(model.dir.absolute() / "compiled"),
        log_dir=str(paths.logs) if settings.log_dir else None,
    )


def _prepare(settings: Settings, paths: JobPaths, chosen: Sequence[DeviceSpec], model: Bundle, pictures: int, watcher: Watcher) -> Prepared:
    """Resolve the precision, on the job's own pictures where something must be measured."""
    from imagemill.tuning import precisions  # brings NumPy and the decoder, which a repeated command can do without

    def entries() -> Iterator[records.Entry]:
        for shard in plan.shards(paths.plan):
            for row in plan.read(paths.plan, shard):
                yield records.Entry(row.source, row.path, row.size, locator=row.locator)

    resolved = sources.resolve(settings.sources)
    return precisions.prepare(
        settings.precision,
        model,
        resolved,
        entries,
        pictures,
        chosen=chosen,
        limits=_limits(settings, Limits()),
        access=access_of(settings),
        say=watcher.say,
    )


def plan_id(resolved: Sequence[str], filters: Filters, limit: int | None, shard_size: int) -> str:
    """Hash of what decides the listing."""
    return _hash(list(resolved), asdict(filters), limit, shard_size)


def answer_id(card: Card, prepared: Prepared, backend: str, top_k: int, save: Sequence[Saved]) -> str:
    """Hash of what decides an answer."""
    weights = [card.sha256, prepared.precision, prepared.variant, prepared.sha256]
    return _hash(weights, serialization.to_plain(card.recipe), card.scores, list(card.labels), DECODER, backend, top_k, list(save))


def _limits(settings: Settings, otherwise: Limits) -> Limits:
    return Limits(*(getattr(settings, name) or getattr(otherwise, name) for name in ("max_pixels", "max_bytes", "max_seconds")))


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def planned(paths: JobPaths, frozen: Frozen) -> list[Shard]:
    """The shards of a frozen job's plan. Raises: OutputError, where the plan is not there, damaged or another one."""
    store.fetch_plan(paths, frozen.plan_nonce)
    shards = plan.shards(paths.plan)
    if sum(shard.count for shard in shards) != frozen.pictures:
        raise OutputError(
            f"{paths.shown(paths.plan)} does not hold the {frozen.pictures} pictures of job.json. Start anew in another --output."
        )
    return shards


def backend_of(chosen: Sequence[DeviceSpec], allow_mixed: bool) -> str:
    """The backends of the devices, as the answer id names them. Raises: UsageError where several are mixed and that is not allowed."""
    backends = sorted({device.engine for device in chosen})
    if len(backends) > 1 and not allow_mixed:
        raise UsageError(
            f"--devices mixes the backends {' and '.join(backends)}, whose answers differ in the last bits. Add --allow-mixed."
        )
    return "+".join(backends)


def resume(settings: Settings, frozen: Frozen, chosen: Sequence[DeviceSpec], watcher: Watcher) -> Frozen:
    """The frozen job with what may differ today. Raises: JobMismatchError, naming both values of what may not."""
    job, access = frozen.job, access_of(settings)
    asked_sources = sources.resolve(settings.sources)
    if asked_sources == tuple(sources.relocated(source, access) for source in job.sources):
        asked_sources = job.sources  # they may be given where they were, or where they are now
    selection: list[tuple[str, object, object]] = [  # a flag that is absent selects too: without --limit all images are meant
        ("SOURCE", list(job.sources), list(asked_sources)),
        ("--include", sorted(frozen.filters.include), sorted(settings.include or ())),
        ("--exclude", sorted(frozen.filters.exclude), sorted(settings.exclude or ())),
        ("--all-files", frozen.filters.all_files, bool(settings.all_files)),
        ("--limit", frozen.limit, settings.limit),
    ]
    for flag, was, asked in selection:
        if asked != was:
            how = f"Add {_spelt(flag, was)}" if was else f"Leave out {flag}"
            if flag == "SOURCE":
                how = "If the sources have moved, add --moved OLD=NEW. Give the same sources in the same order"
            elif was and asked:
                how = f"Write {_spelt(flag, was)}"
            raise _mismatch(settings, _spelt(flag, was), _spelt(flag, asked), f"{how} to continue this job")
    pairs: list[tuple[str, object, object]] = [
        ("--shard-size", frozen.shard_size, settings.shard_size),
        ("--top-k", job.top_k, settings.top_k),
        ("--save", sorted(job.save), settings.save and sorted(settings.save)),
        ("--precision", job.precision.value, None if settings.precision == "auto" else settings.precision),
        ("backend", frozen.backend, backend_of(chosen, settings.allow_mixed)),
        ("--preprocess", "center-crop" if job.card.recipe.resize is None else "card", settings.preprocess),
        ("--background", job.card.recipe.background, settings.background and parse_colour(settings.background)),
    ]
    if settings.model is not None and not _is_here(settings) and settings.model != job.card.name:
        pairs.append(("--model", job.card.name, settings.model))  # before anything is downloaded
    elif settings.model is not None:
        card = resolve_model(replace(settings, labels=None), watcher).card
        pairs.append(("--model", _identity(job.card), _identity(card)))
    if settings.labels is not None:
        pairs.append(("--labels", _told_labels(job.card.labels), _told_labels(bundle.read_labels(Path(settings.labels)))))
    for flag, was, asked in pairs:
        if asked is not None and asked != was:
            raise _mismatch(settings, _spelt(flag, was), _spelt(flag, asked), "Leave it out to continue this job")
    limits = _limits(settings, job.limits)
    for name in ("max_pixels", "max_bytes", "max_seconds"):
        was, now = getattr(job.limits, name), getattr(limits, name)
        if was != now:
            watcher.say(f"{_flag(name)} was {was:,}, and is {now:,} this time: it holds for the pictures that are left")
    job = replace(
        job,
        output=JobPaths.of(settings.output).output,
        limits=limits,
        access=access,
        batch_size=settings.batch_size or job.batch_size,
        batches_per_step=settings.batches_per_step or job.batches_per_step,
        num_workers=settings.num_workers or job.num_workers,
        log_dir=settings.log_dir or job.log_dir,
    )
    return replace(frozen, job=job)


def _mismatch(settings: Settings, was: str, asked: str, remedy: str) -> JobMismatchError:
    return JobMismatchError(f"{settings.output} was started with {was}, now {asked} is asked for. {remedy}, or give another --output.")


def _spelt(flag: str, value: object) -> str:
    """Return a flag as you would type it."""
    if not value:
        return f"no {flag}"
    if value is True:
        return flag
    if isinstance(value, list):
        words = [shlex.quote(str(item)) for item in value]
        return " ".join([flag, *words] if flag == "SOURCE" else [f"{flag} {word}" for word in words])
    return f"{flag} {value}"


def _is_here(settings: Settings) -> bool:
    """Whether the model that the settings name is on disk."""
    if str(settings.model).endswith(".onnx"):
        return True  # to be wrapped, if it is not; nothing is downloaded for it
    models_dir = Path(settings.models_dir) if settings.models_dir else bundle.default_models_dir()
    return any(bundle.is_bundle(folder) for folder in (models_dir / str(settings.model), Path(str(settings.model))))


def verify_model(frozen: Frozen) -> None:
    """Compare the model's files with what the job was frozen with. Raises: OutputError, ModelError."""
    job = frozen.job
    if not Path(job.model_file).is_file():
        remedy = f"`imagemill get-model {job.card.name}`"
        if job.card.origin.get("source") == "onnx":
            remedy = f"repeat the command with --model {job.card.origin.get('file')}"
        raise OutputError(f"the job's model {job.model_file} is gone. Bring it back: {remedy}.")
    bundle.verify_hash(Bundle(Path(job.model_file).parent, job.card))
    if frozen.variant_sha256 is not None:
        from imagemill.tuning import precisions

        precisions.verify_variant(Path(job.model_file), frozen.variant_sha256)
