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

from PIL import Image

from imagemill.pipeline.decoding.jpeg import find_orientation
from imagemill.records import BadImage, Status

MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_INFLATED = 1 << 20
"""Bytes of a compressed text that are searched for an orientation: programs write it near the
start.
"""
_PIXELS = {b"tRNS", b"acTL", b"fcTL"}
"""Ancillary chunks that change pixels: transparency, and where the first frame of an animation
lies. Dropped if the checksum is wrong.
"""
_is_kind = re.compile(rb"\w{4}").match
_ANCILLARY = 0x20
"""Bit of the first letter of the kinds of chunks that are not critical."""
_MODES = {
    (8, colour, 0, 0, 0): mode for colour, mode in ((0, "L"), (2, "RGB"), (4, "LA"), (6, "RGBA"))
}
"""Bit depth, colour type, compression, filter and interlacing → the mode of the image."""
_SMALL = 65_536
"""Bytes of a small file."""
_RAW_EXIF = b"Raw profile type exif"
_XMP = b"XML:com.adobe.xmp"


class Stripped(NamedTuple):
    """A PNG without its metadata."""

    data: bytes
    """The very object that was given, if it has no metadata."""
    orientation: int
    damage: BadImage | None
    """What Pillow does not find: a wrong checksum of pixels, or an end within the metadata behind
    them.
    """


def strip(data: bytes, want_orientation: bool) -> Stripped:
    """Drop the metadata, read the EXIF orientation, and check the checksums of the pixels. Other
    damage to critical chunks is left for the decoder to find.
    """
    kept: list[memoryview] = []
    view, copied = memoryview(data), 0
    metadata: dict[bytes, bytes] = {}
    pixels_at = end = next_frame = damage = None
    for kind, start, after in _chunks(data):
        if pixels_at is not None and kind != b"IDAT":
            end = end or start  # Pillow reads no pixels after the first run of IDAT
            if kind == b"fcTL":  # of an animation
                next_frame = start
        if kind == b"IDAT":
            pixels_at = pixels_at or start
            if damage is None and after <= len(data) and not _has_right_sum(view, start, after):
                text = f"broken PNG file: wrong checksum of the IDAT chunk at byte {start}"
                damage = BadImage(Status.CORRUPT, text)
        if next_frame is not None or not kind[0] & _ANCILLARY:
            continue
        if after > len(data):
            if end is not None and after - 4 > len(data):
                text = f"it ends within the {kind.decode()} chunk at byte {start}"
                damage = damage or BadImage(Status.TRUNCATED, f"truncated PNG file: {text}")
            break  # if the pixels are missing, Pillow says so
        is_sound = _has_right_sum(view, start, after)
        if is_sound and want_orientation:
            _collect(kind, data, start + 8, after - 4, metadata)
        if end is None and not (is_sound and kind in _PIXELS):
            kept.append(view[copied:start])
            copied = after
    if end is not None and data[end + 4 : end + 8] != b"IEND":
        kept += [view[copied:end], memoryview(b"\0\0\0\0IEND\xaeB`\x82")]
    elif kept:
        kept.append(view[copied:])
    return Stripped(b"".join(kept) if kept else data, _orientation(metadata), damage)


def read_small(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode a small and simple PNG: 8 bits per sample, no palette, not interlaced, and no chunk
    but header, pixels and end.

    Pillow's decoder does it without Pillow's reader of files, which takes longer than decoding so
    few pixels. The reader decides on everything unusual or damaged.

    Args:
        data: the file without metadata.
        max_pixels: the most pixels that are decoded here.

    Returns:
        the image, or None, which leaves it to Pillow's reader.
    """
    if len(data) > _SMALL or data[8:16] != b"\0\0\0\rIHDR":
        return None
    view, pixels, kind, after = memoryview(data), [], b"", 0
    for kind, start, after in _chunks(data):
        if kind == b"IDAT":
            pixels.append(view[start + 8 : after - 4])
        elif start != len(MAGIC) and kind != b"IEND":
            return None
    if kind != b"IEND" or after != len(data) or not _has_right_sum(view, len(MAGIC), 33):
        return None
    width, height, *form = struct.unpack_from(">2I5B", data, 16)
    mode = _MODES.get(tuple(form))
    if mode is None or not 0 < width * height <= max_pixels:
        return None
    try:
        return Image.frombytes(mode, (width, height), b"".join(pixels), "zip", mode, 0)
    except ValueError:  # damaged
        return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the chunks up to IEND: kind, offset of the length field, and offset of the next chunk.
    The last one may end beyond the file.
    """
    at = len(MAGIC)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if not _is_kind(kind):
            return
        yield kind, at, at + 12 + length
        if kind == b"IEND":
            return
        at += 12 + length


def _has_right_sum(view: memoryview, start: int, after: int) -> bool:
    expected: int = struct.unpack_from(">I", view, after - 4)[0]
    return zlib.crc32(view[start + 4 : after - 4]) == expected


def _collect(kind: bytes, data: bytes, start: int, end: int, metadata: dict[bytes, bytes]) -> None:
    """Keep the content of a chunk that can hold an orientation."""
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
    if exif is None and _RAW_EXIF in metadata:
        # ImageMagick: a line each with the name and the length, then hexadecimal digits.
        try:
            exif = bytes.fromhex("".join(metadata[_RAW_EXIF].decode("latin-1").split("\n")[3:]))
        except ValueError:
            exif = None
    if exif is not None:
        exif = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")
    return find_orientation(exif, metadata.get(_XMP))
