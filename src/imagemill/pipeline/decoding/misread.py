"""Variants of formats that Pillow cannot read, or reads to wrong pixels: each is named, so that it
becomes `unsupported`, or its bytes are corrected before Pillow gets them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import partial
from itertools import takewhile

import numpy as np

from imagemill.errors import counted
from imagemill.pipeline.decoding.formats import u32

_DCX = b"\xb1\x68\xde\x3a"
_MONOCHROME = {bytes(6), b"\0\0\0\xff\xff\xff"}
"""Palettes of a PCX of 1 bit that mean black and white, the first by being left out."""
_ODD_COLOUR = re.compile(
    rb'"[^"\n]{1,8}?\sc\s+#([\da-f]{3}|[\da-f]{9}|[\da-f]{12})["\s]', re.IGNORECASE
)
"""A colour of an XPM with other than 8 bits per channel."""


def variant(name: str | None, data: bytes) -> str | None:
    """Name the variant of a format if it is one that Pillow cannot read, or reads to wrong pixels;
    None for the others.
    """
    try:
        match name:
            case "JPEG":
                return _jpeg(data)
            case "JPEG2000":
                return _jpeg2000(data)
            case "PNG" if data[12:16] == b"CgBI":
                return "PNG for iOS (CgBI)"
            case "PSD":
                return _psd(data)
            case "SUN":
                width, depth, kind, palette = (u32(data, at, ">") for at in (4, 12, 20, 28))
                if depth == 32:
                    return "SUN raster of 32 bits"
                if depth == 1 and palette:
                    return "SUN raster of 1 bit with a palette"
                if kind == 2 and -(-width * depth // 8) % 2:
                    return "SUN raster of packed rows with an odd number of bytes"
            case "ICO" if data[4:6] == b"\0\0" and data[6:8] != b"\0\0":
                return "JBIG"
            case "ICO" if any(map(partial(_is_misread, data), _icons(data))):
                return "ICO of 4 or 8 bits with a palette of black and white"
            case "PCX" if data[2] == 0:
                return "PCX without compression"
            case "PCX":
                bits, planes = data[3], data[65]
                is_coloured = data[1] in {2, 5} and data[16:22] not in _MONOCHROME
                if (bits, planes) == (1, 1) and is_coloured:
                    return "PCX of two colours other than black and white"
                known = {(1, 1), (1, 2), (1, 4)} | ({(8, 1), (8, 3)} if data[1] == 5 else set())
                if (bits, planes) not in known:
                    found = f"{counted(bits, 'bit')} in {counted(planes, 'plane')}"
                    return f"PCX of version {data[1]} with {found}"
            case "XPM" if _ODD_COLOUR.search(data[:1_000_000]):
                return "XPM whose colours have other than 8 bits per channel"
    except (struct.error, IndexError):  # it is cut off, which its decoder says better
        pass
    return None


def full_palette(data: bytes) -> bytes:
    """Return a BMP of 4 or 8 bits whose header promises 256 colours. With fewer, Pillow takes some
    palettes for another depth. Where the header leaves no room for a palette, it stays as it is.
    """
    if len(data) < 54 or u32(data, 14) < 40 or u32(data, 10) <= 14 + u32(data, 14):
        return data
    bits, colours = int.from_bytes(data[28:30], "little"), u32(data, 46)
    if bits not in {4, 8} or colours > 1 << bits or colours == 256:
        return data
    return data[:46] + struct.pack("<I", 256) + data[50:]


def without_extra_channels(data: bytes) -> bytes:
    """Return a packed PSD whose table of row lengths has the colours alone. Pillow takes the
    lengths of further channels for pixels.
    """
    try:
        at = _psd_pixels(data)
        compression = struct.unpack_from(">H", data, at)[0]
    except struct.error:
        return data
    channels, height, mode = struct.unpack_from(">HI6xH", data, 12)
    used = 4 if (channels, mode) == (4, 3) else {3: 3, 4: 4, 9: 3}.get(mode, 1)
    if compression != 1 or channels <= used:
        return data
    kept, end = at + 2 + 2 * used * height, at + 2 + 2 * channels * height
    table = data[at + 2 : kept]
    lengths = np.frombuffer(table[: len(table) // 2 * 2], ">u2")
    if kept + int(lengths.sum(dtype=np.int64)) == len(data):  # the number of channels is damaged
        return data
    return data[:kept] + data[end:]


def first_page(data: bytes) -> bytes:
    """Return the first PCX file of a DCX, which Pillow would give the palette of the last one.
    Return anything else as it is. An offset at which no PCX file begins is damage, and ends none.
    """
    if not data.startswith(_DCX) or len(data) < 8:
        return data
    table = data[4 : 4 + 4 * min(1024, len(data) // 4 - 1)]
    pages = [page for (page,) in takewhile(any, struct.iter_unpack("<I", table))]
    if not pages or data[pages[0] : pages[0] + 1] != b"\n":
        return data
    others = [page for page in pages if page > pages[0] and data[page : page + 1] == b"\n"]
    return data[pages[0] : min(others, default=len(data))]


def _jpeg(data: bytes) -> str | None:
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xF7:
            return "JPEG-LS"
        if marker in {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE}:
            return "hierarchical JPEG"
        if 0xC0 <= marker <= 0xCB and marker not in {0xC4, 0xC8}:
            if data[at + 5 : at + 7] == b"\0\0":
                return "JPEG whose height follows its first scan (DNL)"
            factors = [divmod(data[at + 11 + 3 * layer], 16) for layer in range(data[at + 9])]
            fractional = any(
                0 in sides or any(max(sides) % side for side in sides)
                for sides in zip(*factors, strict=True)
            )
            return "JPEG with fractional sampling" if fractional else None
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _jpeg2000(data: bytes) -> str | None:
    """Refuse what Pillow reads to wrong pixels: the brightest colours of more than 8 bits become 0,
    white of fewer bits becomes grey, and subsampled ones fill a corner.
    """
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0:
        return None
    colours = data.find(b"colr\x01", 0, at)
    known = {12, 16, 17, 18}  # CMYK, sRGB, grey, YCC
    if colours >= 0 and (space := u32(data, colours + 7, ">")) not in known:
        return f"JPEG 2000 with colour space number {space}"
    count = struct.unpack_from(">H", data, at + 40)[0]
    channels = [
        struct.unpack_from("BBB", data, at + 42 + 3 * index) for index in range(min(count, 64))
    ]
    depths = {(bits & 0x7F) + 1 for bits, _, _ in channels}
    if not depths <= ({8, *range(10, 17)} if count == 1 else {8}):
        return (
            f"JPEG 2000 with {counted(count, 'channel')} of"
            f" {'/'.join(map(str, sorted(depths)))} bit{'s' * (depths != {1})}"
        )
    steps = [(across, down) for _, across, down in channels]
    if steps[:1] == [(1, 1)] and (count == 3 or len(set(steps)) == 1):
        return None
    sampled = ", ".join(f"{across}×{down}" for across, down in steps)
    return f"JPEG 2000 with {counted(count, 'channel')} sampled at {sampled}"


def _icons(data: bytes) -> Iterator[int]:
    """Yield where each icon of an ICO begins."""
    for number in range(int.from_bytes(data[4:6], "little")):
        yield u32(data, 18 + 16 * number)


def _is_misread(data: bytes, at: int) -> bool:
    """Tell whether Pillow takes an icon of 4 or 8 bits for one of 1 bit, because of its palette."""
    head = data[at : at + 48]
    return (
        len(head) == 48
        and head[14] in {4, 8}
        and u32(head, 32) == 2
        and (head[40:43], head[44:47]) == (bytes(3), b"\xff\xff\xff")
    )


_PSD_MODES = {
    0: "bitmap",
    1: "grey",
    2: "indexed",
    3: "RGB",
    4: "CMYK",
    7: "multichannel",
    8: "duotone",
    9: "Lab",
}


def _psd(data: bytes) -> str | None:
    if data[4:6] == b"\0\x02":
        return "PSB (large Photoshop document)"
    bits, mode = struct.unpack_from(">HH", data, 22)
    if mode == 7 or (mode in _PSD_MODES and bits in {1, 16, 32} and (mode, bits) != (0, 1)):
        return f"PSD with {bits}-bit {_PSD_MODES[mode]} pixels"
    compression = struct.unpack_from(">H", data, _psd_pixels(data))[0]
    return "PSD with ZIP compression" if compression in {2, 3} else None


def _psd_pixels(data: bytes) -> int:
    """Return where the composite of a PSD begins, with its compression."""
    at = 26
    for _ in range(3):  # colours, resources, layers
        at += 4 + u32(data, at, ">")
    return at
