"""Samples of a WebDataset: members of a tar that share the name up to its first dot.

`--keep` finds the keys of a sample's `.json` and the content of its `.cls`. The members of a sample
are next to each other, as WebDataset requires.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from imagemill.errors import SourceError
from imagemill.pipeline.sources.base import shown
from imagemill.pipeline.sources.kept import Keeper
from imagemill.records import Entry

_MAX_BYTES: Final = 2**20
_MAX_IMAGES: Final = 10_000
"""Of one sample; they are in memory at once."""


class Member(NamedTuple):
    """A member of an archive."""

    name: bytes
    entry: Entry | None
    """None: it is not planned."""
    data: bytes | None
    """Its content, if `is_wanted`."""


def is_wanted(source: str, name: bytes, size: int, keeper: Keeper) -> bool:
    """Return whether a member may hold values that are kept. Raises: SourceError if it is too
    large for that.
    """
    if not keeper.columns or _split(name)[1] not in (b"json", b"cls"):
        return False
    if size > _MAX_BYTES:
        raise SourceError(
            f"source {source}: member {shown(name)} has {size:,} bytes. --keep reads at most"
            f" {_MAX_BYTES:,}."
        )
    return True


def with_kept(source: str, members: Iterable[Member], keeper: Keeper) -> Iterator[Entry]:
    """Yield the planned members with the kept values of their samples.

    Raises:
        SourceError: a `.json` is not JSON, a value cannot be kept, or a sample has too many images.
    """
    for name, sample in groupby(members, lambda member: _split(member.name)[0]):
        entries: list[Entry] = []
        values: dict[str, Any] = {}
        origin = f"source {source}, sample {shown(name)}"
        for member in sample:
            if member.entry is not None:
                entries.append(member.entry)
            if member.data is not None:
                found = _values(f"source {source}, member {shown(member.name)}", member)
                values = values | found if _is_cls(member.name) else found | values
            if len(entries) > _MAX_IMAGES:
                raise SourceError(
                    f"source {source}: more than {_MAX_IMAGES:,} images are one sample, because"
                    f" their names are the same up to the first dot: {shown(member.name)}. So"
                    " --keep cannot be used with it."
                )
        keeper.add_columns(origin, list(values))
        kept = keeper.pack(origin, values, is_json=True) if entries else b""
        for entry in entries:
            yield replace(entry, kept=kept)


def _values(origin: str, member: Member) -> dict[str, Any]:
    """Return the values that a member holds, by column."""
    assert member.data is not None
    if _is_cls(member.name):
        text = shown(member.data).strip()
        is_whole = text.isascii() and text.removeprefix("-").isdigit()
        return {"cls": int(text) if is_whole else text or None}
    try:
        found = json.loads(member.data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{origin} is not JSON: {error}. --keep reads it.") from error
    return found if isinstance(found, dict) else {}


def _is_cls(name: bytes) -> bool:
    return _split(name)[1] == b"cls"


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Return a member's sample, and its suffix in lower case without the dot."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, suffix = file.partition(b".")
    return folder + slash + stem, suffix.lower()
