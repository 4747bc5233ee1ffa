"""Continue a frozen job: what may differ from its first start, and what is refused."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from msgspec.structs import replace

from imagemill.display.observer import Watcher
from imagemill.errors import JobMismatchError, ModelError, SourceError
from imagemill.job.documents import Appended, Frozen, Generation
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.models import bundle
from imagemill.models.labels import read_labels
from imagemill.pipeline import sources
from imagemill.pipeline.backends import depends_on_batch, devices
from imagemill.pipeline.backends.devices import backend_of
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources.kept import resolve_kept
from imagemill.records import DeviceSpec, Kept, SessionSpec, Settings, Shard
from imagemill.runner import thresholds
from imagemill.runner.listing import access_of
from imagemill.runner.model import describe_labels, identify, is_local, resolve_model, verify_model
from imagemill.runner.settings import SETTINGS, Effect, limits_of, parse_colour
from imagemill.version import __version__

_MAX_COMMAND = 1_000
"""Characters of a command that is printed to be copied."""
_REMEDY = "Leave it out or give the old value"


def resume(
    settings: Settings, opened: OpenJob, chosen: Sequence[DeviceSpec], watcher: Watcher
) -> OpenJob:
    """Return a frozen job with the settings that may change. With `append`, those that select
    images and cut them into shards may change, too.

    Raises:
        JobMismatchError: a setting that must not change differs. The message names both values.
    """
    frozen = opened.first
    compared = _compare(settings, frozen, chosen, watcher)
    if not settings.append:
        compared = chain(_compare_selection(settings, opened), compared)
    for name, was, asked in compared:
        effect = SETTINGS[name].effect
        is_given = asked is not None or effect is Effect.LISTING
        if asked == was or not is_given or effect is Effect.NOTHING:
            continue
        flag = "backend" if name == "devices" else SETTINGS[name].flag
        if effect is Effect.LIMITS:
            watcher.notify(f"{flag} was {was:,} and is now {asked:,}, for the remaining images")
            continue
        remedy = _remedy(flag, was, asked) if effect is Effect.LISTING else _REMEDY
        old, new = _format_flag(flag, was), _format_flag(flag, asked)
        if isinstance(was, list) and isinstance(asked, list) and len(old + new) > _MAX_COMMAND:
            old, new = _first_difference(flag, was, asked)
        raise JobMismatchError(
            f"{opened.paths.output} was started with {old}, now {new} is asked for. {remedy} to"
            " continue this job, or give another --output."
        )
    job = frozen.job
    job = replace(
        job,
        output=JobPaths.of(settings.output).output,
        limits=limits_of(settings, job.limits),
        access=access_of(settings),
        session=replace(
            job.session,
            batch_size=settings.batch_size or job.session.batch_size,
            batches_per_step=settings.batches_per_step or job.session.batches_per_step,
        ),
        num_workers=settings.num_workers or job.num_workers,
        allow_inexact=settings.allow_inexact or job.allow_inexact,
        log_dir=settings.log_dir or job.log_dir,
    )
    return OpenJob(opened.store, replace(frozen, job=job), opened.appended)


def check_remaining(opened: OpenJob, chosen: Sequence[DeviceSpec], left: Sequence[Shard]) -> None:
    """Check that the remaining images of a resumed job can be processed as the first ones of their
    generation were. A new job was checked before it was frozen; on a finished job none of this
    matters. Before images are appended, this is checked too: if different generations needed
    different decoders, no version could finish the job.

    Raises:
        JobMismatchError: another decoder, device or library. SourceError, without which every
        remaining image would become a `missing` row. OutputError, ModelError: the model is missing
        or changed.
    """
    if not left:
        return
    for generation in {shard.plan_file: opened.generation_of(shard) for shard in left}.values():
        _check_decoder(generation, opened.paths.output)
        _check_fixed(generation, opened, chosen)
    try:
        sources.check(opened.sources_of(left), opened.first.job.access)
    except SourceError as error:
        raise SourceError(f"{error} If it has moved, add --moved OLD=NEW.") from error
    verify_model(opened.first)


def _check_decoder(generation: Generation, output: str) -> None:
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


def _check_fixed(generation: Generation, opened: OpenJob, chosen: Sequence[DeviceSpec]) -> None:
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


def command_of(job: OpenJob) -> str:
    """Return a command that continues a job; empty if it would be too long to type. Settings that
    it leaves out stay as they are.
    """
    first = job.first
    selection: dict[str, object] = {
        "SOURCE": list(first.command),
        "--include": list(first.filters.include),
        "--exclude": list(first.filters.exclude),
        "--all-files": first.filters.all_files,
        "--limit": first.limit,
        "--output": [job.paths.output],
    }
    words = [_format_flag(flag, value) for flag, value in selection.items() if value]
    command = " ".join(["imagemill run", *words]).replace(" SOURCE ", " ", 1)
    return command if len(command) <= _MAX_COMMAND else ""


def _compare_selection(settings: Settings, opened: OpenJob) -> Iterator[tuple[str, object, object]]:
    """Yield what decides the listing and its shards, as it was for the generation whose command
    is most like this one, and as it is asked for now.

    So the first command continues a job, and the last one without `--append` does, too.
    """
    asked, access = settings.sources, access_of(settings)

    def compared(frozen: Frozen | Appended) -> list[tuple[str, object, object]]:
        moved = tuple(sources.relocated(source, access) for source in frozen.command)
        now = frozen.command if asked == moved else asked  # at their old or at their new place
        filters = frozen.filters
        return [
            ("sources", list(frozen.command), list(now)),
            ("include", sorted(filters.include), sorted(settings.include or ())),
            ("exclude", sorted(filters.exclude), sorted(settings.exclude or ())),
            ("all_files", filters.all_files, bool(settings.all_files)),
            ("limit", frozen.limit, settings.limit),
            ("shard_size", frozen.shard_size, settings.shard_size or frozen.shard_size),
        ]

    def likeness(frozen: Frozen | Appended) -> list[bool]:
        return [was == now for _, was, now in compared(frozen)]

    yield from compared(max(opened.generations, key=likeness))


def _compare(
    settings: Settings, frozen: Frozen, chosen: Sequence[DeviceSpec], watcher: Watcher
) -> Iterator[tuple[str, object, object]]:
    """Yield each frozen setting, its value then, and the value asked for now (None: not given).

    The settings that are cheap to compare come first: the last ones may read or wrap a model.
    """
    job, session = frozen.job, frozen.job.session
    card, recipe = session.card, session.card.recipe
    yield "top_k", job.top_k, settings.top_k
    yield "save", sorted(session.save), None if settings.save is None else sorted({*settings.save})
    names = resolve_kept(settings.keep or ())
    keep = sorted(str(Kept(*pair)) for pair in names.items())
    yield "keep", sorted(map(str, job.keep)), None if settings.keep is None else keep
    asked_precision = None if settings.precision == "auto" else settings.precision
    yield "precision", session.precision.value, asked_precision
    yield "devices", frozen.backend, backend_of(chosen, settings.allow_mixed)
    if depends_on_batch(frozen.backend):
        yield "batch_size", session.batch_size, settings.batch_size
    if settings.preprocess is not None and not _is_never_resized(session):
        preprocess = "center-crop" if recipe.resize is None else "card"
        yield "preprocess", preprocess, settings.preprocess
    background = settings.background and parse_colour(settings.background)
    yield "background", recipe.background, background
    if settings.model is not None and not is_local(settings) and settings.model != card.name:
        yield "model", card.name, settings.model  # before anything is downloaded
    elif settings.model is not None:
        asked = resolve_model(replace(settings, labels=None, min_probability=None), watcher).card
        yield "model", identify(card), identify(asked)
    if settings.min_probability is not None:
        was = thresholds.describe(job.min_probability)
        now = thresholds.min_probability_of(settings, card)
        yield "min_probability", was, thresholds.describe(now)
    if settings.labels is not None:
        labels = read_labels(Path(settings.labels))
        yield "labels", describe_labels(card.labels), describe_labels(labels)
    yield "max_pixels", job.limits.max_pixels, settings.max_pixels
    yield "max_bytes", job.limits.max_bytes, settings.max_bytes
    yield "max_seconds", job.limits.max_seconds, settings.max_seconds


def _is_never_resized(session: SessionSpec) -> bool:
    """Return whether the model itself crops without resizing, so that `--preprocess` changes
    nothing.
    """
    try:
        return bundle.load(Path(session.model_file).parent).card.recipe.resize is None
    except ModelError:  # the command ends with it
        return False


def _first_difference(flag: str, was: list[object], asked: list[object]) -> Iterator[str]:
    """Yield what to print of two long lists: how many values they have, and the first that
    differs.
    """
    place = next(
        (at for at, pair in enumerate(zip(was, asked, strict=False)) if pair[0] != pair[1]),
        min(len(was), len(asked)),
    )
    for values in (was, asked):
        one = shlex.quote(str(values[place])) if place < len(values) else "none"
        yield f"{len(values):,} × {flag} (no. {place + 1:,}: {one})"


def _remedy(flag: str, was: object, asked: object) -> str:
    if flag == "SOURCE":
        moved = "If the sources have moved, add --moved OLD=NEW"
        add = "To add images of other sources, add --append"
        return f"{moved}. {add}. Give the same sources in the same order"
    if not was:
        return f"Leave out {flag}"
    return f"{'Write' if asked else 'Add'} {_format_flag(flag, was)}"


def _format_flag(flag: str, value: object) -> str:
    """Return a flag with its value as you would type it."""
    if not value:
        return f"no {flag}"
    if value is True:
        return flag
    if isinstance(value, list):
        words = [shlex.quote(str(item)) for item in value]
        return " ".join(
            [flag, *words] if flag == "SOURCE" else [f"{flag} {word}" for word in words]
        )
    return f"{flag} {value}"
