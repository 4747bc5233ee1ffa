"""Sources: where images come from. `open_all` makes them.

    folder/, image.jpg      folder.py
    @paths.txt                list.py       a path or URL a line
    @paths.csv#column         table.py      a path or URL a row, .tsv and .parquet too
    images.parquet#column   parquet.py    bytes in a column, here or in an object store
    images.zip              zip.py        here or in an object store
    images.tar, .tar.gz     tar.py        the same
    s3://bucket/prefix        objects.py    all below it, or one object
    https://host/image.jpg  http.py

A further kind is one file with a class behind the `Source` protocol, and a branch in `_open` or
`_open_here`. If it has a suffix, `is_opened`, `_READ_IN_PIECES` and `kinds.py` have it, too.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath

from imagemill.errors import SourceError, UsageError
from imagemill.pipeline.sources import kinds, objects
from imagemill.pipeline.sources.base import IMAGE_SUFFIXES, Source, shown
from imagemill.pipeline.sources.folder import FolderSource
from imagemill.pipeline.sources.kept import NOTHING, Keeper
from imagemill.pipeline.sources.list import ListSource
from imagemill.pipeline.sources.parquet import ParquetSource
from imagemill.pipeline.sources.table import TableSource, is_table, split_column
from imagemill.pipeline.sources.tar import SUFFIXES as TAR_SUFFIXES
from imagemill.pipeline.sources.tar import TarSource
from imagemill.pipeline.sources.zip import ZipSource
from imagemill.records import AS_GIVEN, Access
from imagemill.system import interruptible, storage
from imagemill.system.files import absolute

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_EXPANDED = 100_000
_READ_IN_PIECES = (".zip", ".tar", ".tar.gz", ".tgz", ".parquet")


def resolve(arguments: Iterable[str]) -> tuple[str, ...]:
    """Return source arguments as they are frozen: paths are absolute and braces expanded, URLs and
    a leading `@` stay. Raises: UsageError.
    """
    return tuple(_absolute(item) for argument in arguments for item in _expanded(argument))


def _absolute(argument: str) -> str:
    location = argument.removeprefix("@")
    at = "@" if argument.startswith("@") else ""
    if storage.is_url(location) and not storage.is_file_url(location):
        return at + _url(location, is_list=bool(at))
    return at + _absolute_path(location)


def _absolute_path(location: str) -> str:
    """Return the path that a path or a `file:` URL means; links stay as they were given."""
    try:
        if storage.is_file_url(location):
            location = os.fsdecode(storage.local_path(os.fsencode(location)))
    except ValueError as error:
        raise UsageError(f"source {location}: {error}.") from error
    found = absolute(location)
    # What `link/..` means is frozen as it is now.
    return os.path.realpath(found) if ".." in found.parts else str(found)


def resolve_moved(moved: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return `--moved` as `Access` wants it: absolute paths and URLs. Raises: UsageError."""
    pairs: list[tuple[str, str]] = []
    for pair in moved:
        if not all(pair):
            raise UsageError(
                f"--moved {'='.join(pair)}: write --moved OLD=NEW, with a path or URL on both"
                " sides."
            )
        old, new = (_place(side.removeprefix("@")) for side in pair)
        if any(old == other for other, _ in pairs):
            raise UsageError(
                f"--moved {'='.join(pair)}: {pair[0]} is given twice. Give one new place."
            )
        pairs.append((old, new))
    return tuple(pairs)


def _place(location: str) -> str:
    if storage.is_file_url(location) or not storage.is_url(location):
        location = _absolute_path(location)
    return location.rstrip("/")


def relocated(source: str, access: Access) -> str:
    """Return a source argument, as `resolve` spells it, where it is now."""
    at = "@" if source.startswith("@") else ""
    location, column = split_column(source.removeprefix("@"))
    end = f"#{column}" if column is not None else ""
    return at + os.fsdecode(access.at(os.fsencode(location))) + end


def _url(url: str, *, is_list: bool) -> str:
    """A URL as it is frozen: as it was given, without a slash at the end of a place in an object
    store.
    """
    scheme, _, rest = url.partition("://")
    if storage.names_password(url):
        raise UsageError(f"source {scheme}://…@{rest.partition('@')[2]}: {storage.NO_PASSWORDS}")
    if not rest.strip("/"):
        raise UsageError(f"source {url}: names no host or bucket.")
    if storage.is_object(url):
        return url.rstrip("/")
    if scheme not in ("http", "https"):
        raise UsageError(
            f"source {url}: {scheme} is none of http, https, {', '.join(storage.SCHEMES)}."
        )
    path = rest.partition("?")[0].partition("#")[0].lower()
    if not is_list and (path.endswith(("/", *_READ_IN_PIECES)) or "/" not in path):
        raise UsageError(
            f"source {url}: only single images are read over {scheme}. Download it, or list its"
            " images' URLs in a file: @FILE."
        )
    return url


def _expanded(argument: str) -> list[str]:
    """`{000..099}` and `{a,b}` as WebDataset and shells write them; a name that is there as it
    stands is taken as it stands.
    """
    location = argument.removeprefix("@")
    if not storage.is_url(location) and os.path.lexists(location):
        return [argument]
    pieces: list[list[str]] = []
    count, end = 1, 0
    for match in _BRACES.finditer(argument):
        first, last, words = match.groups()
        if first is None:
            choices = words.split(",")
        else:
            step = 1 if int(last) >= int(first) else -1
            if abs(int(last) - int(first)) >= _MOST_EXPANDED:
                raise UsageError(
                    f"source {argument}: {match[0]} means more than {_MOST_EXPANDED:,} sources."
                    " Give a list: @FILE."
                )
            width = len(first) if first.startswith("0") or last.startswith("0") else 0
            choices = [
                str(number).zfill(width) for number in range(int(first), int(last) + step, step)
            ]
        count *= len(choices)
        pieces += [[argument[end : match.start()]], choices]
        end = match.end()
    if count > _MOST_EXPANDED:
        raise UsageError(
            f"source {argument}: means {count:,} sources, more than {_MOST_EXPANDED:,}. Give a"
            " list: @FILE."
        )
    return ["".join(parts) for parts in product(*pieces, [argument[end:]])]


def open_all(
    sources: Iterable[str],
    output: Path | None = None,
    index_dir: Path | None = None,
    access: Access = AS_GIVEN,
    keeper: Keeper = NOTHING,
) -> list[Source]:
    """Make the sources of a job.

    Args:
        sources: as `resolve` spells them.
        output: a folder that is left out of what they list: the job's own.
        index_dir: a folder in which a source may keep what it learnt while listing, for the
            processes that fetch; the plan's. None: it must learn it again.
        access: where the sources are now, and how they are asked for. They keep their names.
        keeper: packs the columns of tables and archives that are kept.
    """
    skip = os.stat(output) if output is not None and output.is_dir() else None  # noqa: PTH116
    return [
        _open(position, source, skip, index_dir, access, keeper)
        for position, source in enumerate(sources)
    ]


def check(sources: Iterable[str], access: Access = AS_GIVEN) -> None:
    """See that the sources as such are there, before anything is begun. Raises: SourceError."""
    urls = []
    for source in (relocated(source, access) for source in sources):
        path, _ = split_column(source.removeprefix("@"))
        if storage.is_url(path):
            urls.append(path)
            continue
        try:
            os.stat(path)  # noqa: PTH116
        except OSError as error:
            raise _cannot_read(source, error) from error
    # Thousands may have come of one pair of braces.
    interruptible.run_all(partial(_look, user_agent=access.user_agent), urls)


def _cannot_read(source: str, error: OSError) -> SourceError:
    place = source.removeprefix("@")
    why = error.strerror
    if isinstance(error, FileNotFoundError) and os.path.islink(place):  # noqa: PTH114
        why = f"it is a link to {shown(os.fsencode(os.readlink(place)))}, which does not exist"  # noqa: PTH115
    give = "a list of images" if source.startswith("@") else "a folder or an image"
    return SourceError(f"source {shown(os.fsencode(source))} cannot be read: {why}. Give {give}.")


def check_kinds(sources: Iterable[str], *, all_files: bool) -> None:
    """See that sources which are single files are images, and lists are text. Reads at most the
    first bytes of each.

    Args:
        sources: as `resolve` spells them.
        all_files: whether a file of any kind counts as an image.

    Raises:
        UsageError: a file is of another kind. The message says how to give it. SourceError: it
        cannot be read.
    """
    interruptible.run_all(partial(_check_kind, all_files=all_files), sources)


def _check_kind(source: str, all_files: bool) -> None:
    location, _ = split_column(source.removeprefix("@"))
    is_list = source.startswith("@")
    if is_list and location.lower().endswith(".parquet"):
        return  # its reader judges it
    if not is_list and (
        all_files or is_opened(source) or PurePosixPath(location).suffix.lower() in IMAGE_SUFFIXES
    ):
        return
    name = shown(os.fsencode(source))
    if storage.is_object(location):
        head = _head_of_object(location)
        if head is None:
            return
    elif storage.is_url(location):
        head = None  # a page is not fetched for this
    else:
        try:
            found = os.stat(location)  # noqa: PTH116
            if stat.S_ISDIR(found.st_mode):
                if is_list:
                    raise UsageError(f"source {name} is a folder, not a list. Leave out the @.")
                return
            if not stat.S_ISREG(found.st_mode):
                if is_list:
                    return  # a pipe can be read only once
                raise UsageError(
                    f"source {name} is not a regular file. Give a folder, an image file, or a list:"
                    " @FILE."
                )
            with open(location, "rb") as file:  # noqa: PTH123 - as it was given
                head = file.read(kinds.HEAD_BYTES)
        except OSError as error:
            raise _cannot_read(source, error) from error
    if not is_list:
        kinds.refuse_file(name, head)
    elif head is not None:
        kinds.refuse_list(name, head)


def _head_of_object(url: str) -> bytes | None:
    """The first bytes of an object; None: it is a prefix, or may not be read, of which `check` and
    the rows speak.
    """
    bucket, key = storage.split(url)
    if not key:
        return None
    try:
        opened = storage.open_bucket(bucket, storage.PROBING).open(key)
        return opened.read_at(0, kinds.HEAD_BYTES) or None
    except OSError:
        return None


def is_opened(source: str) -> bool:
    """Whether a source is an archive or a table by its name, so that its content is listed."""
    is_tar = TAR_SUFFIXES.search(source) is not None
    return is_tar or split_column(source)[0].lower().endswith((".parquet", ".zip"))


def can_be_read_again(source: str) -> bool:
    """Whether a source can be listed twice: not a list that comes out of a pipe."""
    location, _ = split_column(source.removeprefix("@"))
    return not source.startswith("@") or storage.is_url(location) or os.path.isfile(location)  # noqa: PTH113


def _look(url: str, user_agent: str | None) -> None:
    if storage.is_object(url):
        objects.look(url)
    else:
        from imagemill.pipeline.sources import http  # its library is heavy, and rarely needed

        http.look(url, user_agent)


def _open(
    position: int,
    source: str,
    skip: os.stat_result | None = None,
    index_dir: Path | None = None,
    access: Access = AS_GIVEN,
    keeper: Keeper = NOTHING,
) -> Source:
    location, column = split_column(source.removeprefix("@"))
    if source.startswith("@"):
        if is_table(location):
            return TableSource(position, os.fsencode(location), column, access, keeper)
        return ListSource(position, os.fsencode(source[1:]), access)
    at = access.at(os.fsencode(location))
    if location.lower().endswith(".parquet") and not os.path.isdir(at):  # noqa: PTH112
        return ParquetSource(position, os.fsencode(location), column, access, keeper)
    opened = _open_here(position, relocated(source, access), skip, index_dir, access, keeper)
    opened.name = shown(os.fsencode(source))
    return opened


def _open_here(
    position: int,
    source: str,
    skip: os.stat_result | None,
    index_dir: Path | None,
    access: Access,
    keeper: Keeper,
) -> Source:
    """Open a source where it is now."""
    if source.lower().endswith(".zip") and not os.path.isdir(source):  # noqa: PTH112 - a URL is none
        return ZipSource(position, os.fsencode(source))
    if TAR_SUFFIXES.search(source) and not os.path.isdir(source):  # noqa: PTH112
        return TarSource(position, os.fsencode(source), index_dir, keeper)
    if storage.is_object(source):
        return objects.ObjectSource(position, source)
    if storage.is_url(source):
        from imagemill.pipeline.sources import http

        return http.HttpSource(position, source, access.user_agent)
    return FolderSource(position, os.fsencode(source), skip)


def without_column(source: str) -> str:
    """Return the path or URL of a source, without `@` and `#COLUMN`."""
    return split_column(source.removeprefix("@"))[0]


def names_others(source: str) -> bool:
    """Return whether a source is a list or table whose lines name images elsewhere."""
    return source.startswith("@") or without_column(source).lower().endswith(".parquet")


def named_path(source: str, path: bytes) -> bytes:
    """Return what a list or table wrote for an image, from its path in the plan."""
    return path if source.startswith("@") else path.partition(b"/")[2]


def as_line(
    resolved: Sequence[str], position: int, path: bytes, access: Access = AS_GIVEN
) -> bytes | None:
    """Return the line of a list that means this image of a source; None if it is inside an archive
    or table, which no line can name. `access` says where the source is now.
    """
    source = resolved[position]
    if isinstance(_open(0, source, access=access), ZipSource | TarSource | ParquetSource):
        return None
    if source.startswith("@"):
        return storage.beside(os.fsencode(without_column(source)), path) if path else None
    return os.path.join(os.fsencode(source), path) if path else os.fsencode(source)  # noqa: PTH118
