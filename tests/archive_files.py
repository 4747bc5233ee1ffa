"""Makes archives for tests, sound ones by the standard library and odd ones by hand, and reads
sources as a job would.

pack(folder, "tar.gz", {"a.jpg": b"…"})       the path of an archive zip_by_hand([Member(b"a.jpg",
b"…", flags=1)])  a zip whose directory says anything about its members; read(source)
every planned member: its bytes, or the status of its row
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imagemill.pipeline.sources import open_all
from imagemill.pipeline.sources.base import Skipped, Source
from imagemill.records import BadImage, Entry, Filters

KINDS = ("zip", "tar", "tar.gz", "webdataset")


def pack(folder: Path, kind: str, files: Mapping[str, bytes], name: str = "images") -> str:
    """Pack files, in order, into `folder/NAME.KIND`; a WebDataset is three tars named by braces.
    Returns the source to give.
    """
    if kind == "webdataset":
        items = list(files.items())
        for number, start in enumerate(range(0, len(items), -(-len(items) // 3))):
            pack(
                folder,
                "tar",
                dict(items[start : start + -(-len(items) // 3)]),
                f"{name}-{number:03d}",
            )
        return str(folder / f"{name}-{{000..002}}.tar")
    path = folder / f"{name}.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in files.items():
                archive.writestr(member, data)
    else:
        path.write_bytes(tar(files, "w:gz" if kind == "tar.gz" else "w"))
    return str(path)


def tar(files: Mapping[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these files, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_member(
    name: str, data: bytes = b"", kind: bytes = b"0", link: str = "", size: int | None = None
) -> bytes:
    """Header and data of one member, without the end of an archive."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data) if size is None else size
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)
"""Of a tar."""


@dataclass(frozen=True)
class Member:
    """One member of a zip made by hand; None stands for the true value."""

    name: bytes
    data: bytes
    method: int = 0
    packed: bytes | None = None
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    flags: int = 0
    local_name: bytes | None = None
    offset: int | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    mode: int = 0


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def zip_by_hand(
    members: Iterable[Member], *, comment: bytes = b"", count: int | None = None, disk: int = 0
) -> bytes:
    """A zip whose directory says what its arguments say."""
    body, directory, number = bytearray(), bytearray(), 0
    for member in members:
        number += 1
        packed = (
            (deflated(member.data) if member.method == 8 else member.data)
            if member.packed is None
            else member.packed
        )
        size = len(member.data) if member.size is None else member.size
        packed_size = len(packed) if member.packed_size is None else member.packed_size
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        common = (member.flags, member.method, 0, 0, crc, packed_size, size)
        offset = len(body) if member.offset is None else member.offset
        local_name = member.name if member.local_name is None else member.local_name
        body += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, *common, len(local_name), len(member.local_extra)
        )
        body += local_name + member.local_extra + packed
        lengths = (len(member.name), len(member.extra), 0, 0, 0)
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 3 << 8, 20, *common, *lengths, member.mode << 16, offset
        )
        directory += member.name + member.extra
    reported = (number if count is None else count) % 65_536
    end = struct.pack(
        "<4s4H2LH",
        b"PK\5\6",
        disk,
        disk,
        reported,
        reported,
        len(directory),
        len(body),
        len(comment),
    )
    return bytes(body + directory) + end + comment


def listed(
    path: Path | str, filters: Filters | None = None, index_dir: Path | None = None
) -> tuple[Source, list[Entry], Skipped]:
    """A source, its entries, and what it left out."""
    (source,) = open_all([str(path)], index_dir=index_dir)
    skipped = Skipped()
    return source, list(source.entries(filters or Filters(), skipped)), skipped


def fetched(source: Source, entry: Entry, max_bytes: int = 2**20) -> bytes | str:
    """The bytes of a member, or `STATUS: error`."""
    try:
        return source.fetch(entry.path, entry.locator, max_bytes)
    except BadImage as bad:
        return f"{bad.status}: {bad.error}"


def read(
    path: Path | str, filters: Filters | None = None, max_bytes: int = 2**20
) -> list[tuple[bytes, bytes | str]]:
    """Every planned member of a source: its path, and its bytes or `STATUS: error`."""
    source, entries, _ = listed(path, filters)
    found = [(entry.path, fetched(source, entry, max_bytes)) for entry in entries]
    for entry, (_, data) in zip(entries, found, strict=True):
        assert isinstance(data, str) or entry.size in (-1, len(data))
    return found
