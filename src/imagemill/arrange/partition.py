"""Divide a folder of images into one sub-folder per device: `imagemill partition`.

    OUTPUT/0 … OUTPUT/N-1              consecutive images of the listing, in equal numbers plus or
                                       minus one; an image keeps its relative path
    OUTPUT/.imagemill-partition.json   the data folder and N; written first, so that an interrupted
                                       partition is recognised

The folder source lists the images: `imagemill run OUTPUT` classifies the same images as `imagemill
run DATA_DIR`. The listing is held in memory, about 200 bytes per image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from msgspec import Struct

from imagemill.arrange.links import Link, Maker, names_in
from imagemill.errors import OutputError, SourceError, UsageError
from imagemill.pipeline.sources.base import Skipped, shown
from imagemill.pipeline.sources.folder import FolderSource
from imagemill.records import Filters
from imagemill.system import files
from imagemill.system.messages import Notify

MARKER = ".imagemill-partition.json"
MAX_PARTITIONS = 512
_TEMPORARY = b".imagemill-partition.tmp"


class Partitioned(Struct, frozen=True):
    """The outcome of `partition`."""

    output: str
    images: int
    partitions: tuple[int, ...]
    """Number of images in each sub-folder."""
    made: int
    """Links or copies that this call made; the others existed already."""
    link: Link
    """Kind of links; `symbolic` also if hard links were impossible."""
    skipped_by_suffix: Mapping[str, int]
    skipped_hidden: int


def partition(
    data_dir: str,
    partitions: int,
    output: str,
    link: Link | None = None,
    log: Notify = lambda _: None,
) -> Partitioned:
    """Distribute the images of a folder, searched recursively, to sub-folders.

    The same call again continues an interrupted one: it makes missing files, replaces wrong ones
    and changes nothing else. Each file appears whole or not at all. A path that is not a regular
    file (a broken link, a FIFO) becomes a symbolic link, so that its row can say what is wrong.

    Args:
        data_dir: the folder.
        partitions: number of sub-folders, 1 to 512.
        output: the output folder; new, empty, or a partition of the same images into as many.
        link: None makes hard links, or symbolic ones if hard links are impossible.
        log: is called with one line at a time.

    Raises:
        UsageError: wrong arguments, or the output holds other files.
        SourceError: there are no images.
        OutputError: the output is not a partition of these images, or cannot be written.
    """
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise UsageError(f"--partitions {partitions}: must be from 1 to {MAX_PARTITIONS}.")
    source, target = Path(data_dir).absolute(), Path(output).absolute()
    if source.is_file():
        raise UsageError(f"--data-dir {data_dir} is a file. Give a folder.")
    if source.exists() and target.exists() and source.samefile(target):
        raise UsageError(f"--output {output} is the data folder itself. Give another folder.")
    _check_output(target, source, partitions)
    images, skipped = _images(source, target)
    if not images:
        raise SourceError(f"--data-dir {data_dir} holds no images. Give a folder that does.")
    for note in skipped.notes():
        log(note)
    least, more = divmod(len(images), partitions)
    ends = [number * least + min(number, more) for number in range(partitions + 1)]
    shares = [images[start:end] for start, end in pairwise(ends)]
    _check_partitions(target, shares)
    files.make_folder(target)
    marker = {
        "data_dir": os.fsencode(source).decode("utf-8", "backslashreplace"),
        "partitions": partitions,
    }
    files.write_whole(target / MARKER, json.dumps(marker).encode())
    maker = Maker(link, log, _TEMPORARY)
    for number, share in enumerate(shares):
        files.make_folder(target / str(number))
        for path in share:
            maker.make(
                os.path.join(os.fsencode(source), path),  # noqa: PTH118
                os.path.join(os.fsencode(target / str(number)), path),  # noqa: PTH118
            )
    by_suffix = dict(sorted(skipped.by_suffix.items()))
    counts = tuple(map(len, shares))
    return Partitioned(
        str(target), len(images), counts, maker.made, maker.link, by_suffix, skipped.hidden
    )


def _images(source: Path, target: Path) -> tuple[list[bytes], Skipped]:
    """Return the paths of the images in listing order, and what was skipped. Folders with names
    like images are searched, but are not images themselves.
    """
    skipped = Skipped()
    skip = target.stat() if target.is_dir() else None
    root = os.fsencode(source)
    images = [
        entry.path
        for entry in FolderSource(0, root, skip).entries(Filters(), skipped)
        if entry.size >= 0 or not os.path.isdir(os.path.join(root, entry.path))  # noqa: PTH112, PTH118 - bytes
    ]
    return images, skipped


def _check_output(target: Path, source: Path, partitions: int) -> None:
    """Raise OutputError unless the output is new, empty, or a partition of the same folder into as
    many sub-folders.
    """
    names = names_in(target, f"--output {target}")
    if not names:
        return
    try:
        marker = json.loads((target / MARKER).read_bytes())
        found = (str(marker["data_dir"]), int(marker["partitions"]))
    except FileNotFoundError:
        raise UsageError(
            f"--output {target} is not empty and not made by `imagemill partition` (it holds"
            f" {names[0]!r}). Give a new folder."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{target / MARKER} cannot be read: {error}. Give a new folder."
        ) from error
    asked = (os.fsencode(source).decode("utf-8", "backslashreplace"), partitions)
    if found != asked:
        raise OutputError(
            f"--output {target} holds {found[0]} in {found[1]} partitions, now {asked[0]} in"
            f" {asked[1]} is asked for. Remove it, or give another folder."
        )
    unrecognised = [
        name
        for name in names
        if name != MARKER
        and not name.startswith(f".{MARKER}")
        and name not in map(str, range(partitions))
    ]
    if unrecognised:
        raise OutputError(
            f"--output {target} also holds {unrecognised[0]!r}, which `imagemill partition` did not"
            " make. Move it away."
        )


def _check_partitions(target: Path, shares: Sequence[Sequence[bytes]]) -> None:
    """Raise OutputError if a partition holds a file of another one, because images were added or
    removed since.
    """
    for number, share in enumerate(shares):
        folder = os.fsencode(target / str(number))
        expected = set(share)
        for path in _files(folder):
            if path not in expected:
                raise OutputError(
                    f"{target} holds {shown(path)} in partition {number}, where it does not belong"
                    " now: the images changed since it was made. Remove it, or give another"
                    " folder."
                )


def _files(folder: bytes) -> Iterator[bytes]:
    """Yield the relative paths of all files in a folder, and remove our temporary files."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)  # noqa: PTH118
            if name == _TEMPORARY:
                os.unlink(path)  # noqa: PTH108
            elif not files.is_system_file(os.fsdecode(name)):
                yield os.path.relpath(path, folder)
        # os.walk lists links to folders as folders; `partition` makes none
