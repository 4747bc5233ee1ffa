"""Where the image of a row is, from the columns `source` and `path`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from msgspec import Struct

from imagemill.pipeline.sources import is_opened, names_others, without_column
from imagemill.system import storage
from imagemill.system.files import absolute

T = TypeVar("T")


class _Source(Struct, frozen=True):
    """How paths of one source become places."""

    is_list: bool
    is_table: bool
    """A Parquet table with images: its paths begin with the number of the row."""
    is_archive: bool
    location: str


@lru_cache(maxsize=4_096)
def _source(name: str) -> _Source:
    is_list = name.startswith("@")
    is_table = not is_list and names_others(name)
    return _Source(
        is_list, is_table, is_opened(name) and not is_table and not is_list, without_column(name)
    )


def full_path(source: str, path: str) -> str:
    """Return the absolute path or URL of an image. The path of one that is a source of its own is
    its name in a row, and empty in a listing.

    Example:
        >>> full_path("/data", "cats/1.jpg")
        '/data/cats/1.jpg'
    """
    found = _source(source)
    if found.is_list:
        return beside(found.location, path)
    is_source = not path or path == _without_query(found.location).rpartition("/")[2]
    return found.location if is_source else f"{found.location}/{path}"


def beside(file: str, path: str) -> str:
    """Return the absolute path or URL that a path or URL in a file means, without `..`."""
    try:
        found = storage.beside(file.encode(), path.encode()).decode()
    except ValueError:  # leads above its host
        return path
    return found if "://" in found else str(absolute(found))


def relative_path(source: str, path: str) -> str:
    """Return a path as the column `path` has it; of a single file its name."""
    return path or file_name(source, path)


def file_name(source: str, path: str) -> str:
    """Return the last component of an image's path."""
    return _without_query(full_path(source, path)).rpartition("/")[2]


def folder_name(source: str, path: str) -> str | None:
    """Return the name of the folder that an image is in; None if it is at the top of an archive or
    table.
    """
    found = _source(source)
    if found.is_table:
        path = path.partition("/")[2]
    inside = found.is_table or found.is_archive
    place = path if inside else _without_query(full_path(source, path))
    return place.rpartition("/")[0].rpartition("/")[2] or None


def row_number(source: str, path: str) -> str:
    """Return the part of a path that is its row's number in a table of images."""
    return f"{source}/{path.partition('/')[0]}"


def own_path(source: str, path: str) -> str:
    """Return a key for the path of an image in its source."""
    return f"{source}/{path}"


def sample_key(source: str, path: str) -> str:
    """Return a key for a sample of a WebDataset: the path up to the first dot of the name."""
    folder, slash, name = path.rpartition("/")
    return f"{source}/{folder}{slash}{name.partition('.')[0]}"


def _without_query(place: str) -> str:
    return place.partition("?")[0] if "://" in place else place


def all_of(place: Callable[[str, str], T], sources: Sequence[str], paths: Sequence[str]) -> list[T]:
    """Return the place of each row."""
    return [place(source, path) for source, path in zip(sources, paths, strict=True)]
