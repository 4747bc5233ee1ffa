"""What the header of a JPEG says: its size, its kind, and which way up it is."""

from __future__ import annotations

import re
import struct

from msgspec import Struct
from PIL import Image

from imagemill.pipeline.decoding import preprocess

_MAX_SEGMENTS = 10_000
ORIENTATION = 0x0112


class Header(Struct, frozen=True):
    """What the header of a JPEG says."""

    width: int
    height: int
    layers: int
    bits: int
    frame: int
    """The marker of its frame header: 0xC0 baseline, 0xC2 progressive, 0xC9 and 0xCA arithmetic,
    …
    """
    orientation: int

    @property
    def ordinary(self) -> bool:
        """Whether libjpeg-turbo decodes it to 8-bit grey or colour."""
        return self.bits == 8 and self.layers in {1, 3} and self.frame in {0xC0, 0xC1, 0xC2}


def read_header(data: bytes) -> Header | None:
    """Read size, kind and orientation; None where anything is unusual, which leaves it to
    Pillow.
    """
    frame: tuple[int, int, int, int, int] | None = None
    exif = xmp = None
    at, last = 2, len(data) - 4
    for _ in range(_MAX_SEGMENTS):
        if at > last or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        # Markers without a length, none of which belongs here.
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            if frame is not None or length < 8 or at + 10 > len(data):
                return None
            frame = (*struct.unpack_from(">BHHB", data, at + 4), marker)
        elif marker == 0xE1:
            if data.startswith(b"Exif\0\0", at + 4):
                if exif is not None:
                    return None
                exif = data[at + 4 : at + 2 + length]
            elif data.startswith(b"http://ns.adobe.com/xap/1.0/\0", at + 4):
                xmp = data[at + 4 : at + 2 + length]
        at += 2 + length
    else:
        return None
    if frame is None or not frame[1] or not frame[2]:
        return None
    bits, height, width, layers, marker = frame
    return Header(width, height, layers, bits, marker, find_orientation(exif, xmp))


def find_orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """Read the orientation as Pillow's `getexif` does: from EXIF or else from XMP; 1 where both are
    silent or broken.
    """
    found = _exif_orientation(exif) if exif else None
    if found is None and xmp and (match := re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)):
        found = int(match[2])
    return found if found in preprocess.TURNS else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Read the orientation from an EXIF block; the usual case by hand (1 µs), the rest by Pillow
    (100 µs).
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[6:10])
    if order is not None and len(exif) >= 16:
        start = 6 + struct.unpack_from(order + "I", exif, 10)[0]
        if start + 2 <= len(exif):
            count = struct.unpack_from(order + "H", exif, start)[0]
            tag = struct.pack(order + "H", ORIENTATION)
            entries = [
                at
                for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12)
                if exif[at : at + 2] == tag
            ]
            if not entries and start + 2 + 12 * count <= len(exif):
                return None
            if len(entries) == 1 and struct.unpack_from(order + "HI", exif, entries[0] + 2) == (
                3,
                1,
            ):
                return int(struct.unpack_from(order + "H", exif, entries[0] + 8)[0])
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        found = parsed.get(ORIENTATION)
    except Exception:  # broken EXIF is no reason to refuse an image
        return None
    return found if isinstance(found, int) else None
