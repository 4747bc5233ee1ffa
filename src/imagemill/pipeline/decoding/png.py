"""PNG files before Pillow reads them: drop the metadata, read the orientation, check the checksums.

Pillow refuses a PNG because of its metadata: a text or colour profile above 1 MB, a wrong checksum,
a field that is too short. Viewers show such a file, since metadata (most *ancillary* chunks)
changes no pixel. So Pillow gets only the chunks that do.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from imagemill.pipeline.decoding.jpeg import find_orientation
from imagemill.pipeline.decoding.refusals import Refusal
from imagemill.records import Status

MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_INFLATED = 1 << 20
"""Bytes of a compressed text that are searched for an orientation: programs write it near the
start.
"""
_PIXELS = {b"tRNS", b"acTL", b"fcTL"}
"""Ancillary chunks that change pixels: transparency, and where the first frame of an animation
lies. Dropped if the checksum is wrong.
"""
_RAW_EXIF = b"Raw profile type exif"
_XMP = b"XML:com.adobe.xmp"


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    """Offset of the chunk's length field."""
    end: int
    """Offset of the next chunk."""

    @property
    def is_ancillary(self) -> bool:
        return bool(self.kind[0] & 0x20)


class Stripped(NamedTuple):
    """A PNG without its metadata."""

    data: bytes
    """The very object that was given, if it has no metadata."""
    orientation: int
    cut: Refusal | None
    """Set if the file ends within its metadata, after the pixels."""


def strip(data: bytes, want_orientation: bool) -> Stripped:
    """Drop the metadata and read the EXIF orientation. Damage to critical chunks is left for the
    decoder to find.
    """
    kept: list[memoryview] = []
    view, copied = memoryview(data), 0
    metadata: dict[bytes, bytes] = {}
    pixels_at = end = cut = None
    for chunk in _chunks(data):
        if pixels_at is not None and chunk.kind != b"IDAT":
            end = end or chunk.start  # Pillow reads no pixels after the first run of IDAT
            if chunk.kind == b"fcTL":  # the next frame of an animation
                break
        if chunk.kind == b"IDAT":
            pixels_at = pixels_at or chunk.start
        if not chunk.is_ancillary:
            continue
        if chunk.end > len(data):
            if end is not None and chunk.end - 4 > len(data):
                cut = Refusal(
                    Status.TRUNCATED,
                    f"truncated PNG file: it ends within the {chunk.kind.decode()} chunk at byte"
                    f" {chunk.start}",
                )
            break  # if the pixels are missing, Pillow says so
        is_sound = _has_right_sum(view, chunk)
        if is_sound and want_orientation:
            _collect(chunk.kind, data, chunk, metadata)
        if end is None and not (is_sound and chunk.kind in _PIXELS):
            kept.append(view[copied : chunk.start])
            copied = chunk.end
    if end is not None and data[end + 4 : end + 8] != b"IEND":
        kept += [view[copied:end], memoryview(b"\0\0\0\0IEND\xaeB`\x82")]
    elif kept:
        kept.append(view[copied:])
    return Stripped(b"".join(kept) if kept else data, _orientation(metadata), cut)


def check_sums(data: bytes) -> None:
    """Check what Pillow does not: the checksums of the pixels. A file that ends before them is left
    to Pillow.

    Raises:
        Refusal: a checksum is wrong.
    """
    view = memoryview(data)
    for chunk in _chunks(data):
        if chunk.end > len(data):
            return
        if chunk.kind == b"IDAT" and not _has_right_sum(view, chunk):
            raise Refusal(
                Status.CORRUPT,
                f"broken PNG file: wrong checksum of the IDAT chunk at byte {chunk.start}",
            )


def bit_depth(data: bytes) -> int:
    """Return the bits per sample of a PNG that Pillow has opened."""
    return data[24]


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Yield the chunks up to IEND. The last one may end beyond the file."""
    at = len(MAGIC)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not re.match(rb"\w{4}", kind):
            return
        yield _Chunk(kind, at, at + 12 + length)
        if kind == b"IEND":
            return
        at += 12 + length


def _has_right_sum(view: memoryview, chunk: _Chunk) -> bool:
    expected: int = struct.unpack_from(">I", view, chunk.end - 4)[0]
    return zlib.crc32(view[chunk.start + 4 : chunk.end - 4]) == expected


def _collect(kind: bytes, data: bytes, chunk: _Chunk, metadata: dict[bytes, bytes]) -> None:
    """Keep the content of a chunk that can hold an orientation."""
    start, end = chunk.start + 8, chunk.end - 4
    if kind == b"eXIf":
        metadata[kind] = data[start:end]
    for key in (_RAW_EXIF, _XMP):
        if kind not in {b"tEXt", b"zTXt", b"iTXt"} or not data.startswith(key + b"\0", start):
            continue
        body = data[start + len(key) + 1 : end]
        is_compressed = kind == b"zTXt" or (kind == b"iTXt" and body[:1] == b"\x01")
        if kind == b"zTXt":
            body = body[1:]
        elif kind == b"iTXt":
            body = body[2:].split(b"\0", 2)[-1]
        if is_compressed:
            try:
                body = zlib.decompressobj().decompress(body, _MAX_INFLATED)
            except zlib.error:
                continue
        metadata[key] = body


def _orientation(metadata: dict[bytes, bytes]) -> int:
    exif = metadata.get(b"eXIf")
    if (
        exif is None and _RAW_EXIF in metadata
    ):  # ImageMagick: a line each with the name and the length, then hexadecimal digits
        try:
            exif = bytes.fromhex("".join(metadata[_RAW_EXIF].decode("latin-1").split("\n")[3:]))
        except ValueError:
            exif = None
    if exif is not None:
        exif = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")
    return find_orientation(exif, metadata.get(_XMP))
