"""Sort the images of a job into one folder per label: `imagemill sort`.

    INTO/LABEL/name.jpg            a hard link, symbolic link or copy of each image
    INTO/_failed/STATUS/name.jpg   with `--failed`
    INTO/sorted.csv                where each image is, and why; written before the images, so that
                                   the same command continues after a stop

Rows are read in plan order, three times: to find names that several images have, to write
`sorted.csv`, and to make the files. In memory are eight bytes per image.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from imagemill.arrange import names
from imagemill.arrange.links import Link, Maker, names_in
from imagemill.arrange.names import MANIFEST
from imagemill.errors import OutputError, UsageError, printable
from imagemill.job import plan
from imagemill.job.columns import names_of
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import sources
from imagemill.records import BadImage, Status
from imagemill.system import files, storage
from imagemill.system.messages import Notify

_COLUMNS = ("file", "index", "source", "path", "status", "class_id", "label", "probability")
_TEMPORARY = b".imagemill-sort.tmp"
MAX_FOLDERS = 10_000
_TEXT_OR_WHOLE = re.compile("(large_)?string|u?int")
"""Arrow's names of such types."""
_FETCHING = 16
"""Images outside of folders, in archives or behind URLs, that are read at a time."""
_ANY_SIZE = 2**62
_NAMED = 5


class Choice(Struct, frozen=True):
    """Which images are sorted, and by what."""

    by: str = "label"
    """`label`, or another column of text or whole numbers."""
    min_probability: float | None = None
    """Images that are `ok` but less certain are left out."""
    failed: bool = False
    """Failed images go to `_failed/STATUS`; they are left out otherwise."""


ALL_LABELS = Choice()


class Sorted(Struct, frozen=True):
    """The outcome of `sort`."""

    into: str
    images: int
    """In folders now; with a dry run, afterwards."""
    folders: Mapping[str, int]
    """Number of images by folder, the largest first."""
    made: int = 0
    """Links or copies that this call made; the others existed already."""
    removed: int = 0
    """Files of an earlier call that do not belong there any more."""
    link: Link | None = None
    left_out: Mapping[str, int] = {}
    """Number of images that were not chosen, by reason."""
    unreadable: int = 0
    """Images that were chosen and cannot be read now."""
    first_unreadable: tuple[str, ...] = ()
    missing: int = 0
    """Images of the job that have no row yet."""


class _Image(Struct, frozen=True):
    """An image that was chosen."""

    row: Mapping[str, Any]
    planned: plan.PlannedRow
    folder: str
    name: str

    @property
    def file(self) -> str:
        return f"{self.folder}/{self.name}"


def sort(
    job: OpenJob,
    into: Path,
    choice: Choice = ALL_LABELS,
    link: Link | None = None,
    *,
    dry_run: bool = False,
    log: Notify = lambda _: None,
) -> Sorted:
    """Put the images of a job into one folder per label. Originals are never moved or changed.

    The same call again continues an interrupted one, adds the rows that are new, and removes its
    own files that do not belong there any more. Each file appears whole or not at all.

    Args:
        job: finished or not; the rows that exist are sorted.
        into: the folder; new, empty, or made by an earlier call.
        choice: which images, and by which column.
        link: None makes hard links, or symbolic ones if hard links are impossible. Images in
        archives, in tables and behind URLs are always copied.
        dry_run: return what would be done, and write nothing.
        log: is called with one line at a time.

    Raises:
        UsageError: an unknown column, or `into` holds other files or is inside a source or the job.
        OutputError: `into` cannot be written.
        PartError: a part is damaged.
    """
    into = into.absolute()
    _check_place(job, into)
    chosen = _Chosen(job, choice)
    if not chosen.rows:
        raise OutputError(f"{job.shortfall(0)}, then sort again.")
    before = _hashes(row["file"] or "" for row in _rows_before(into))
    keys = _hashes(image.file for image in chosen.images())
    counts: Counter[str] = Counter()
    for image in _named(chosen, keys):
        counts[image.folder] += 1
        if not _among(image.file, before) and os.path.lexists(into / image.file):
            raise OutputError(
                f"{into / image.file} exists and was not made by `imagemill sort`. Move it away."
            )
    outcome = Sorted(
        str(into),
        counts.total(),
        dict(counts.most_common()),
        left_out=dict(sorted(chosen.left_out.items())),
        missing=job.frozen.images - chosen.rows,
    )
    if outcome.missing:
        log(f"{job.shortfall(chosen.rows)}, then sort again to add the others.")
    if dry_run:
        return outcome
    files.make_folder(into)
    for left in into.glob(f".{MANIFEST}.*"):  # by a call that was killed
        left.unlink(missing_ok=True)
    removed = _remove_stale(into, _named(chosen, keys))
    _write_manifest(into, _named(chosen, keys))
    maker = Maker(link, log, _TEMPORARY)
    unreadable, lost = _make(job, into, _named(chosen, keys), maker)
    if unreadable:
        kept = (image for image in _named(chosen, keys) if image.planned.index not in unreadable)
        _write_manifest(into, kept)
    return replace(
        outcome,
        images=outcome.images - len(unreadable),
        folders=dict((counts - lost).most_common()),
        made=maker.made,
        removed=removed,
        link=maker.link,
        unreadable=len(unreadable),
        first_unreadable=tuple(list(unreadable.values())[:_NAMED]),
    )


def _check_place(job: OpenJob, into: Path) -> None:
    """Raise UsageError if the folder is inside a source or the job, OutputError if it holds files
    that no earlier call made.
    """
    real = os.path.realpath(into)
    places = {job.paths.root: "the job"}
    for source in job.frozen.job.sources:
        location = sources.relocated(source, job.frozen.job.access)
        if not location.startswith("@") and not storage.is_url(location):
            places[Path(location)] = f"the source {printable(location)}"
    for place, what in places.items():
        folder = os.path.realpath(place)
        if place.is_dir() and os.path.commonpath([real, folder]) == folder:
            raise UsageError(f"--into {into} is inside {what}. Give another folder.")
    found = names_in(into, f"--into {into}")
    others = [name for name in found if not name.startswith(f".{MANIFEST}.")]
    if others and MANIFEST not in others:
        raise UsageError(
            f"--into {into} is not empty and not made by `imagemill sort` (it holds"
            f" {printable(others[0])!r}). Give a new folder."
        )


class _Chosen:
    """The images that are sorted, in plan order, and how many are not."""

    def __init__(self, job: OpenJob, choice: Choice) -> None:
        self._job, self._choice = job, choice
        self._shards = job.committed_shards()
        self.rows = sum(shard.count for shard in self._shards)
        self.left_out: Counter[str] = Counter()
        self._column = "class_id" if choice.by == "label" else choice.by
        self._folders = names.folders(self._values())

    def _values(self) -> Iterable[tuple[Any, str]]:
        """Return every value that images may be sorted by, and what people call it."""
        by, frozen = self._choice.by, self._job.frozen.job
        if by == "label":
            if not frozen.session.card.has_head:
                raise UsageError("--by label: the model has no classes. Sort --by another column.")
            return enumerate(frozen.session.card.labels)
        if by == "status":
            return [(status.value, status.value) for status in Status]
        if by not in (known := names_of(frozen)):
            raise UsageError(f"--by {by}: the job has no such column. It has {', '.join(known)}.")
        distinct: dict[Any, str] = {}
        for _, table in self._job.tables(self._shards, [by]):
            if not _TEXT_OR_WHOLE.match(str(table[by].type)):
                raise UsageError(f"--by {by}: the column holds neither text nor whole numbers.")
            distinct |= {value: str(value) for value in table[by].unique().to_pylist()}
            if len(distinct) > MAX_FOLDERS:
                raise UsageError(
                    f"--by {by}: the column has more than {MAX_FOLDERS:,} values, and each would"
                    " be a folder."
                )
        distinct.pop(None, None)
        return distinct.items()

    def images(self) -> Iterator[_Image]:
        """Yield the chosen images with the names that they would have alone in their folders."""
        left_out: Counter[str] = Counter()
        columns = list(dict.fromkeys([*_COLUMNS[1:], self._column]))
        for shard, table in self._job.tables(self._shards, columns):
            for row, planned in zip(table.to_pylist(), self._job.rows(shard), strict=True):
                folder, reason = self._folder(row)
                if folder is None:
                    left_out[reason] += 1
                else:
                    path = planned.path or os.fsencode(row["source"]).partition(b"?")[0]
                    yield _Image(row, planned, folder, names.file_name(path))
        self.left_out = left_out

    def _folder(self, row: Mapping[str, Any]) -> tuple[str | None, str]:
        """Return the folder of a row, or None; and the reason if it has none."""
        choice, is_ok, probability = self._choice, row["status"] == Status.OK, row["probability"]
        if not is_ok and choice.by != "status":
            return f"{names.FAILED}/{row['status']}" if choice.failed else None, "failed"
        least = choice.min_probability
        if is_ok and least is not None and (probability is None or probability < least):
            return None, "less certain"
        article = "an" if choice.by[0] in "aeiou" else "a"
        return self._folders.get(row[self._column]), f"without {article} {choice.by}"


def _named(chosen: _Chosen, keys: NDArray[np.int64]) -> Iterator[_Image]:
    """Yield the chosen images with their final names. Where several images have one name, all but
    the first get their index behind it.
    """
    repeated = set(keys[1:][keys[1:] == keys[:-1]].tolist())
    taken: set[int] = set()
    for image in chosen.images():
        key = _hash(image.file)
        if key in repeated:
            if key in taken:
                stem, dot, suffix = image.name.rpartition(".")
                mark = f"~{image.planned.index}"
                while True:
                    name = f"{stem}{mark}.{suffix}" if dot else f"{image.name}{mark}"
                    image = replace(image, name=name)  # noqa: PLW2901
                    if not _among(image.file, keys):
                        break
                    mark = f"~{mark}"  # an image of its own has this name
            taken.add(key)
        yield image


def _hash(file: str) -> int:
    return hash(names.fold(file))


def _hashes(found: Iterable[str]) -> NDArray[np.int64]:
    """Return a hash of each file's name, sorted. They are those of this process alone."""
    return np.sort(np.fromiter(map(_hash, found), np.int64))


def _among(file: str, hashes: NDArray[np.int64]) -> bool:
    wanted = _hash(file)
    place = np.searchsorted(hashes, wanted)
    return bool(place < len(hashes) and hashes[place] == wanted)


def _identity(row: Mapping[str, Any]) -> str:
    """Return which image a row of the manifest says a file is."""
    place = row["path"] or f"#{row['index']}"
    return f"{row['file']}\0{row['source']}\0{place}"


def _rows_before(into: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the manifest that an earlier call wrote. Raises: OutputError."""
    try:
        with (into / MANIFEST).open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != _COLUMNS:
                raise OutputError(
                    f"{into / MANIFEST} was not made by `imagemill sort`. Give a new folder."
                )
            yield from rows
    except FileNotFoundError:
        return
    except (OSError, UnicodeError, csv.Error) as error:
        raise OutputError(
            f"{into / MANIFEST} cannot be read: {error}. Give a new folder."
        ) from error


def _remove_stale(into: Path, images: Iterable[_Image]) -> int:
    """Remove files of an earlier call that no image has now, or another image than then; return
    how many. So each file that stays is the image that the next manifest will say.
    """
    kept, removed = _hashes(_identity({**image.row, "file": image.file}) for image in images), 0
    root = os.path.realpath(into)
    for row in _rows_before(into):
        file = row["file"] or ""
        path = into / file
        if _among(_identity(row), kept) or not os.path.realpath(path.parent).startswith(
            f"{root}{os.sep}"
        ):
            continue
        try:
            path.unlink()
            removed += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            raise files.cannot_write(path, error) from error
        for folder in path.parents:
            if folder == into:
                break
            try:
                folder.rmdir()
            except OSError:  # it holds other files
                break
    return removed


def _write_manifest(into: Path, images: Iterable[_Image]) -> None:
    to_text: Any = SimpleNamespace(write=str)  # `writerow` returns what `write` returns
    plain = csv.writer(to_text, lineterminator="\n")
    quoted = csv.writer(to_text, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def lines() -> Iterator[str]:
        yield plain.writerow(_COLUMNS)
        for image in images:
            cells = [image.file, *(image.row[name] for name in _COLUMNS[1:])]
            has_return = any("\r" in cell for cell in cells if isinstance(cell, str))
            yield (quoted if has_return else plain).writerow(cells)

    encoded = (line.encode("utf-8", "backslashreplace") for line in lines())
    files.write_whole(into / MANIFEST, encoded)


def _make(
    job: OpenJob, into: Path, images: Iterable[_Image], maker: Maker
) -> tuple[dict[int, str], Counter[str]]:
    """Make the files that are missing. If an original is gone, its hard link or copy stays.

    Returns:
        the images that cannot be read, index → why; and how many of each folder they are.
    """
    frozen = job.frozen.job
    opened = sources.open_all(frozen.sources, index_dir=job.paths.plan, access=frozen.access)
    unreadable: dict[int, str] = {}
    lost: Counter[str] = Counter()
    waiting: deque[tuple[_Image, Future[bytes]]] = deque()

    def finish(most: int) -> None:
        while len(waiting) > most:
            image, future = waiting.popleft()
            try:
                maker.write(future.result(), os.fsencode(into / image.file))
            except BadImage as bad:
                if not (into / image.file).is_file():  # else it stays what it is
                    fail(image, f"{bad.status}: {bad.error}")

    def fail(image: _Image, why: str) -> None:
        lost[image.folder] += 1
        unreadable[image.planned.index] = printable(f"{image.row['path']}: {why}")

    with ThreadPoolExecutor(_FETCHING) as pool:
        try:
            for image in images:
                target, planned = os.fsencode(into / image.file), image.planned
                line = sources.as_line(frozen.sources, planned.source, planned.path, frozen.access)
                place = line and frozen.access.at(line)
                if place is None or storage.is_url(place):
                    if not maker.has_copy(target, planned.size):
                        source = opened[planned.source]
                        is_ok = image.row["status"] == Status.OK  # of any size, as it was read
                        limit = _ANY_SIZE if is_ok else frozen.limits.max_bytes
                        fetched = pool.submit(source.fetch, planned.path, planned.locator, limit)
                        waiting.append((image, fetched))
                        finish(_FETCHING)
                elif os.path.isfile(place):  # noqa: PTH113 - bytes
                    maker.make(place, target)
                elif not os.path.isfile(target):  # noqa: PTH113 - a link to nowhere, or nothing
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(target)  # noqa: PTH108
                    was_there = image.row["status"] == Status.OK
                    then = "it was there" if was_there else "it could not be read either"
                    fail(image, f"missing: {then} when it was classified")
            finish(0)
        finally:
            pool.shutdown(cancel_futures=True)
    return unreadable, lost
