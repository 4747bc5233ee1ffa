"""Continue a frozen job: what may differ from its first start, and what is refused."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from imagemill.display.observer import Watcher
from imagemill.errors import JobMismatchError
from imagemill.job.documents import Frozen
from imagemill.job.paths import JobPaths
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends.devices import backend_of
from imagemill.records import (
    DeviceSpec,
    Settings,
)
from imagemill.runner.freeze import _limits
from imagemill.runner.listing import access_of
from imagemill.runner.model import describe_labels, identify, is_local, resolve_model
from imagemill.runner.settings import flag_of, parse_colour


def resume(
    settings: Settings, frozen: Frozen, chosen: Sequence[DeviceSpec], watcher: Watcher
) -> Frozen:
    """The frozen job with what may differ today. Raises: JobMismatchError, naming both values of
    what may not.
    """
    job, access = frozen.job, access_of(settings)
    asked_sources = sources.resolve(settings.sources)
    if asked_sources == tuple(sources.relocated(source, access) for source in job.sources):
        asked_sources = job.sources  # they may be given where they were, or where they are now
    selection: list[
        tuple[str, object, object]
    ] = [  # a flag that is absent selects too: without --limit all images are meant
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
                how = (
                    "If the sources have moved, add --moved OLD=NEW. Give the same sources in the"
                    " same order"
                )
            elif was and asked:
                how = f"Write {_spelt(flag, was)}"
            raise _mismatch(
                settings, _spelt(flag, was), _spelt(flag, asked), f"{how} to continue this job"
            )
    pairs: list[tuple[str, object, object]] = [
        ("--shard-size", frozen.shard_size, settings.shard_size),
        ("--top-k", job.top_k, settings.top_k),
        ("--save", sorted(job.save), settings.save and sorted(settings.save)),
        (
            "--precision",
            job.precision.value,
            None if settings.precision == "auto" else settings.precision,
        ),
        ("backend", frozen.backend, backend_of(chosen, settings.allow_mixed)),
        (
            "--preprocess",
            "center-crop" if job.card.recipe.resize is None else "card",
            settings.preprocess,
        ),
        (
            "--background",
            job.card.recipe.background,
            settings.background and parse_colour(settings.background),
        ),
    ]
    if settings.model is not None and not is_local(settings) and settings.model != job.card.name:
        pairs.append(("--model", job.card.name, settings.model))  # before anything is downloaded
    elif settings.model is not None:
        card = resolve_model(replace(settings, labels=None), watcher).card
        pairs.append(("--model", identify(job.card), identify(card)))
    if settings.labels is not None:
        pairs.append(
            (
                "--labels",
                describe_labels(job.card.labels),
                describe_labels(bundle.read_labels(Path(settings.labels))),
            )
        )
    for flag, was, asked in pairs:
        if asked is not None and asked != was:
            raise _mismatch(
                settings,
                _spelt(flag, was),
                _spelt(flag, asked),
                "Leave it out to continue this job",
            )
    limits = _limits(settings, job.limits)
    for name in ("max_pixels", "max_bytes", "max_seconds"):
        was, now = getattr(job.limits, name), getattr(limits, name)
        if was != now:
            watcher.say(
                f"{flag_of(name)} was {was:,}, and is {now:,} this time: it holds for the images"
                " that are left"
            )
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
    return JobMismatchError(
        f"{settings.output} was started with {was}, now {asked} is asked for. {remedy}, or give"
        " another --output."
    )


def _spelt(flag: str, value: object) -> str:
    """Return a flag as you would type it."""
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
