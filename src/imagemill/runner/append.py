"""Add images to a frozen job: list the sources again, and freeze what is new as a further
generation of the plan.

The steps of one `--append`, each of which may be the last one before a crash:

1. The sources are listed to a temporary file, and compared with the plan.
2. The new images are cut into shards, in a folder of the generation's own below `plan/`.
3. The generation's document is written. From here on the images belong to the job.

The next start removes a folder without a document. Repeating the command lists again, and finds
those images new, or finds them in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from imagemill.display.observer import Watcher
from imagemill.errors import JobMismatchError, OutputError
from imagemill.job import documents, ledger, plan
from imagemill.job.documents import FORMAT, Appended
from imagemill.job.open_job import OpenJob
from imagemill.pipeline.backends import devices
from imagemill.pipeline.decoding import DECODER
from imagemill.records import DeviceSpec, Settings
from imagemill.runner import freeze, listing, model
from imagemill.runner.difference import Difference, Named
from imagemill.system import files, serialization


def append(
    settings: Settings, opened: OpenJob, chosen: Sequence[DeviceSpec], watcher: Watcher
) -> tuple[OpenJob, Difference]:
    """List the sources of the settings, and add the images that a job does not have. Nothing that
    exists is changed, neither rows nor the plan.

    Returns:
        the job with these images, and how the listing differed from its plan.

    Raises:
        JobMismatchError: answers may differ from those of the last generation, and that is not
        allowed. ImagemillError: of listing or writing.
    """
    while True:
        _refuse_strays(opened)
        number, spooled = len(opened.generations) + 1, opened.paths.spool
        folder = opened.paths.generation(number)
        files.clear_folder(folder)
        found = listing.list_again(settings, opened, spooled, folder)
        appended = None
        if found.difference.new.count:
            try:
                appended = _freeze(settings, opened, chosen, found, spooled)
            except FileExistsError:
                # In an object store, a launcher on another machine has appended meanwhile.
                opened = _reopened(opened)
                continue
        else:
            files.remove_folder(folder)
        spooled.unlink()
        for line in (*found.notes, *describe(found, settings)):
            watcher.notify(line)
        if appended is not None:
            opened = OpenJob(opened.store, opened.first, (*opened.appended, appended))
        return opened, found.difference


def describe(found: listing.Relisting, settings: Settings) -> Iterator[str]:
    """Yield a line each on the new, the changed and the missing images of a listing, if there are
    any.
    """
    new, changed, missing = found.difference.new, found.difference.changed, found.difference.missing
    if settings.append and not new.count:
        yield f"nothing to append: the job has all {found.images:,} listed images"
    elif settings.append:
        yield f"{_count(new, 'new image', 'new images')}: {new}"
    elif new.count:
        yield (
            f"{_count(new, 'image is', 'images are')} new in the source since the plan was frozen:"
            f" {new}. Add --append to classify them."
        )
    if changed.count:
        yield (
            f"{_count(changed, 'image has', 'images have')} another size than when planned:"
            f" {changed}. Rows are kept. To classify changed images again, give them as sources to"
            " a run into another --output."
        )
    if missing.count:
        are = "image of the job is", "images of the job are"
        yield f"{_count(missing, *are)} no longer in its sources: {missing}. Rows are kept."


def _count(named: Named, one: str, several: str) -> str:
    return f"{named.count:,} {one if named.count == 1 else several}"


def _refuse_strays(opened: OpenJob) -> None:
    """Raise OutputError if there are parts of shards that the plan does not have, such as those of
    a generation whose document was removed. New shards would get their numbers.
    """
    strays = ledger.existing_parts(opened.store).keys() - {shard.number for shard in opened.shards}
    if strays and len(_reopened(opened).appended) == len(opened.appended):
        part = opened.paths.shown(opened.paths.part(min(strays)))
        raise OutputError(
            f"{part} does not belong to any shard of this plan, so nothing can be appended. Run"
            f" `imagemill verify --quarantine {opened.paths.output}`, then repeat the command."
        )


def _reopened(opened: OpenJob) -> OpenJob:
    """Return the job with the generations that it has now."""
    return OpenJob(opened.store, opened.first, documents.read_appended(opened.store))


def _freeze(
    settings: Settings,
    opened: OpenJob,
    chosen: Sequence[DeviceSpec],
    found: listing.Relisting,
    spooled: Path,
) -> Appended:
    """Cut the new images of a listing into shards, and write the generation's document last.

    Raises:
        FileExistsError: in an object store, another launcher has written the document.
    """
    store, paths, difference = opened.store, opened.paths, found.difference
    number = len(opened.generations) + 1
    _refuse_mixing(settings, opened, chosen)
    model.verify_model(opened.first)
    shard_size = settings.shard_size or plan.auto_shard_size(difference.new.count, len(chosen))
    plan.cut(
        spooled,
        paths.generation(number),
        shard_size,
        by_group=False,
        first=opened.frozen.images,
        kept=difference.is_new,
    )
    first, before = opened.first, opened.generations[-1]
    fixed = devices.fixed_facts(chosen, first.job.session.batch_size)
    answer_id = before.answer_id
    if (before.decoder, before.fixed) != (DECODER, fixed):
        answer_id = freeze.answer_id(first.job, first.variant_sha256, first.backend, fixed)
    nonce = store.publish_plan(number)
    paths.gather_indices(number)
    files.make_folder(paths.appended)
    with files.output_errors(f"cannot write {paths.root}"):
        for folder in (paths.plan, paths.root):  # so that the document does not outlive its plan
            files.sync(folder)
    appended = Appended(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=settings.sources,
        sources=found.added,
        filters=listing.filters_of(settings),
        limit=settings.limit,
        shard_size=shard_size,
        images=difference.new.count,
        answer_id=answer_id,
        decoder=DECODER,
        versions=freeze.versions_of(chosen),
        vector_units=freeze.vector_units_of(settings, chosen),
        fixed=fixed,
        plan_nonce=nonce,
        **found.skipped.counts(),
    )
    try:
        store.write(paths.appended_document(number), serialization.encode(appended), create=True)
    except FileExistsError:
        if documents.read_appended(store)[number - 2].plan_nonce != nonce:
            store.forget_plan(nonce, number)
            raise
        # Otherwise it is our own: only the answer to the first try was lost.
    return appended


def _refuse_mixing(settings: Settings, opened: OpenJob, chosen: Sequence[DeviceSpec]) -> None:
    """Raise JobMismatchError if answers may differ from those of the last generation, in their last
    bits at least, unless `allow_mixed` is set.
    """
    if settings.allow_mixed:
        return
    before = opened.generations[-1]
    fixed = devices.fixed_facts(chosen, opened.first.job.session.batch_size)
    units = freeze.vector_units_of(settings, chosen)
    versions = freeze.versions_of(chosen)
    # What was installed since decides nothing, or it is in `fixed`.
    known = (before.versions.keys() & versions.keys()) - {"imagemill"}
    pairs = [("decoder", before.decoder, DECODER)]
    pairs += [(name, before.versions[name], versions[name]) for name in sorted(known)]
    pairs += [
        (name, before.fixed.get(name, "none"), fixed.get(name, "none"))
        for name in sorted(before.fixed.keys() | fixed.keys())
    ]
    if before.vector_units and units:
        pairs.append(("vector units", before.vector_units, units))
    for what, was, now in pairs:
        if was != now:
            raise JobMismatchError(
                f"the last images of {opened.paths.output} were added with {what} {was}, this is"
                f" {what} {now}. Answers may differ in the last bits. Add --allow-mixed, or give"
                " the new images another --output."
            )
