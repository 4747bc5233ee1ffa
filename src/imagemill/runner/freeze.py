"""Turn settings into a frozen job: list the sources, cut the plan, write `job.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from msgspec.structs import asdict, replace

from imagemill import records
from imagemill.display.observer import Watcher
from imagemill.job import plan
from imagemill.job.documents import FORMAT, Frozen, read_frozen
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import Store
from imagemill.pipeline.backends import devices
from imagemill.pipeline.backends.devices import backend_of, fixed_facts
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import (
    Bundle,
    DeviceSpec,
    Engine,
    Filters,
    Job,
    Limits,
    SessionSpec,
    Settings,
)
from imagemill.runner import thresholds
from imagemill.runner.listing import (
    access_of,
    check_moved,
    filters_of,
    keeper_of,
    listing,
    no_images,
)
from imagemill.runner.model import classes_kept, saved_outputs, with_recipe
from imagemill.runner.settings import limits_of
from imagemill.system import files, serialization
from imagemill.tuning import batch_size
from imagemill.version import __version__

if TYPE_CHECKING:
    from imagemill.tuning.precisions import ChosenPrecision


def freeze(
    settings: Settings,
    store: Store,
    choose: Callable[[int], tuple[str, Sequence[DeviceSpec]]],
    model: Bundle,
    watcher: Watcher,
) -> OpenJob:
    """List the sources, cut the plan, resolve automatic settings and write `job.json`. `choose`
    returns a `--devices` argument and its devices for a number of images. The model has the labels
    of the settings.

    Raises:
        FileExistsError: another launcher has frozen a job in this object store meanwhile.
        ImagemillError: of listing, quantising or writing.
    """
    paths = store.paths
    paths.plan_nonces.unlink(missing_ok=True)
    files.clear_folder(paths.plan)
    skipped, keeper = Skipped(), keeper_of(settings)
    found = listing(settings, skipped, keeper, paths.root, paths.plan)
    listed = plan.spool(found, paths.spool)
    if not listed.images:
        raise no_images(settings, skipped)
    keep = keeper.kept()
    for note in skipped.notes():
        watcher.notify(note)
    typed, chosen = choose(listed.images)
    by_group = listed.groups == len(chosen) > 1
    shard_size = settings.shard_size or plan.auto_shard_size(listed.images, len(chosen))
    plan.cut(paths.spool, paths.plan, shard_size, by_group=by_group)
    paths.spool.unlink()
    access = access_of(settings)
    check_moved(settings.sources, access, plan.rows(paths.plan))
    model = with_recipe(model, settings)
    prepared = _prepare(settings, paths, chosen, model, listed.images, watcher)
    session = session_of(settings, model, prepared, chosen)
    backend = backend_of(chosen, settings.allow_mixed)
    fixed = fixed_facts(chosen, session.batch_size)
    filters = filters_of(settings)
    job = Job(
        output=paths.output,
        sources=settings.sources,
        session=session,
        variant=prepared.variant,
        num_workers=settings.num_workers or 0,
        top_k=classes_kept(settings, model.card),
        limits=limits_of(settings, Limits()),
        plan_id=plan_id(settings.sources, filters, settings.limit, shard_size),
        answer_id="",
        min_probability=thresholds.min_probability_of(settings, model.card),
        keep=keep,
        allow_inexact=settings.allow_inexact,
        log_dir=str(paths.logs) if settings.log_dir else None,
    )
    job = replace(job, answer_id=answer_id(job, prepared.sha256, backend, fixed))
    frozen = Frozen(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        job=job,
        devices=typed,
        filters=filters,
        limit=settings.limit,
        shard_size=shard_size,
        images=listed.images,
        groups=listed.groups if by_group else 1,
        **skipped.counts(),
        backend=backend,
        variant_sha256=prepared.sha256,
        decoder=DECODER,
        versions=versions_of(chosen),
        vector_units=vector_units_of(settings, chosen),
        fixed=fixed,
        plan_nonce=store.publish_plan(),
    )
    try:
        store.write(paths.job, serialization.encode(frozen), create=True)
    except FileExistsError:
        existing = read_frozen(store)
        if existing is None or existing.plan_nonce != frozen.plan_nonce:
            store.forget_plan(frozen.plan_nonce)
            raise
        # Otherwise it is our own job: only the answer to the first try was lost.
    return OpenJob(store, frozen).with_access(access)


def with_batch_size(opened: OpenJob, size: int, chosen: Sequence[DeviceSpec]) -> OpenJob:
    """Freeze a job again with another batch size, before anything was committed.

    A launcher on another machine that has read the old `job.json` refuses its parts, because their
    answer id differs.
    """
    frozen, job = opened.first, opened.first.job
    session, fixed = replace(job.session, batch_size=size), fixed_facts(chosen, size)
    job = replace(job, session=session)
    job = replace(job, answer_id=answer_id(job, frozen.variant_sha256, frozen.backend, fixed))
    written = replace(frozen, fixed=fixed, job=replace(job, access=records.AS_GIVEN))
    opened.store.write(opened.paths.job, serialization.encode(written))
    return OpenJob(opened.store, replace(written, job=job))


def versions_of(chosen: Sequence[DeviceSpec]) -> dict[str, str]:
    """Return the version of imagemill and those of the libraries that decide answers."""
    return {"imagemill": __version__} | devices.versions_of(device.backend for device in chosen)


def vector_units_of(settings: Settings, chosen: Sequence[DeviceSpec]) -> str:
    """Return the vector units of the processors that compute; empty if they decide nothing, or are
    not known because the nodes of a cluster compute.
    """
    return "" if settings.engine == Engine.RAY else devices.vector_units(chosen)


def session_of(
    settings: Settings, model: Bundle, prepared: ChosenPrecision, chosen: Sequence[DeviceSpec]
) -> SessionSpec:
    """Return what a session of these settings compiles."""
    spec = SessionSpec(
        model_file=str(prepared.model_file.absolute()),
        card=model.card,
        precision=prepared.precision,
        batch_size=settings.batch_size or 0,
        batches_per_step=settings.batches_per_step or 0,
        save=saved_outputs(settings, model.card),
        cache_dir=str(model.dir.absolute() / "compiled"),
    )
    return batch_size.resolved(spec, chosen)


def _prepare(
    settings: Settings,
    paths: JobPaths,
    chosen: Sequence[DeviceSpec],
    model: Bundle,
    images: int,
    watcher: Watcher,
) -> ChosenPrecision:
    """Resolve the precision. If it must be measured, the job's own images are used."""
    # Imports NumPy and the decoder, which a repeated command does not need.
    from imagemill.tuning import precisions

    def entries() -> Iterator[records.Entry]:
        for row in plan.rows(paths.plan):
            yield records.Entry(row.source, row.path, row.size, locator=row.locator)

    return precisions.prepare(
        settings.precision,
        model,
        settings.sources,
        entries,
        images,
        chosen=chosen,
        limits=limits_of(settings, Limits()),
        access=access_of(settings),
        notify=watcher.notify,
    )


def plan_id(resolved: Sequence[str], filters: Filters, limit: int | None, shard_size: int) -> str:
    """Return a hash of everything that decides the listing."""
    return _hash(list(resolved), asdict(filters), limit, shard_size)


def answer_id(job: Job, variant_sha256: str | None, backend: str, fixed: Mapping[str, str]) -> str:
    """Return a hash of everything that decides a job's results. All but the job are fields of
    `Frozen`.
    """
    session, card = job.session, job.session.card
    weights = [card.sha256, session.precision, job.variant, variant_sha256]
    return _hash(
        weights,
        serialization.to_plain(card.recipe),
        card.scores,
        list(card.labels),
        DECODER,
        backend,
        job.top_k,
        [*session.save, *map(str, job.keep)],
        job.min_probability,
        *sorted(fixed.items()),
    )


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
