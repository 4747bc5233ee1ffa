"""Name the formats and variants that are not decoded, so that a valid file is `unsupported` and
never `corrupt` or `not_an_image`.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import takewhile

import numpy as np

from imagemill.errors import counted

REFUSED: dict[str, tuple[bytes, ...]] = {
    "PDF": (b"%PDF",),
    "EPS": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "WMF": (b"\xd7\xcd\xc6\x9a\x00\x00", b"\x01\x00\x09\x00\x00\x03", b"\x02\x00\x09\x00\x00\x03"),
    "EMF": (b"\x01\0\0\0\x58\0\0\0", b"\x01\0\0\0\x64\0\0\0", b"\x01\0\0\0\x6c\0\0\0"),
    "FITS": (b"SIMPLE  =",),
    "HDF5": (b"\x89HDF\r\n\x1a\n",),
    "HDF4": (b"\x0e\x03\x13\x01",),
    "GRIB": (b"GRIB",),
    "BUFR": (b"BUFR",),
    "MPEG": (b"\x00\x00\x01\xb3",),
    "Radiance HDR": (b"#?RADIANCE", b"#?RGBE"),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "DPX": (b"SDPX", b"XPDS"),
    "Cineon": (b"\x80\x2a\x5f\xd7",),
    "JPEG XR": (b"II\xbc\x00", b"II\xbc\x01"),
    "JPEG XS": (b"\xff\x10\xff\x50",),
    "JBIG2": (b"\x97JB2\r\n\x1a\n",),
    "WSQ": (b"\xff\xa0\xff",),
    "MNG": (b"\x8aMNG\r\n\x1a\n",),
    "JNG": (b"\x8bJNG\r\n\x1a\n",),
    "FLIF": (b"FLIF",),
    "BPG": (b"BPG\xfb",),
    "DjVu": (b"AT&TFORM",),
    "MIFF": (b"id=ImageMagick",),
    "PAM": (b"P7\n", b"P7\r\n"),
    "PFM in colour": (b"PF\n", b"PF\r", b"PF ", b"PF4"),
    "XPM2": (b"! XPM2",),
    "PGX": (b"PG ML", b"PG LM"),
    "VIFF": (b"\xab\x01",),
    "VIPS": (b"\x08\xf2\xa6\xb6", b"\xb6\xa6\xf2\x08"),
    "CALS": (b"srcdocid:",),
    "sixel": (b"\x1bP",),
    "XISF": (b"XISF0100",),
    "VICAR": (b"LBLSIZE=",),
    "PDS": (b"PDS_VERSION_ID",),
    "NITF": (b"NITF0", b"NSIF0"),
    "NRRD": (b"NRRD000",),
    "ERDAS Imagine": (b"EHFA_HEADER_TAG",),
    "MrSID": (b"msid",),
    "XCF (GIMP)": (b"gimp xcf",),
    "PSP (Paint Shop Pro)": (b"Paint Shop Pro Image File",),
    "CLIP (Clip Studio)": (b"CSFCHUNK",),
    "farbfeld": (b"farbfeld",),
    "KTX": (b"\xabKTX 11\xbb", b"\xabKTX 20\xbb"),
    "PVR": (b"PVR\x03",),
    "ASTC": (b"\x13\xab\xa1\x5c",),
    "VTF": (b"VTF\0",),
    "Softimage PIC": (b"\x53\x80\xf6\x34",),
    "MDI": (b"EP*\0",),
    "OS/2 icon, pointer or bitmap array": (b"BA\x28\0\0\0",),
    "camera raw (Olympus ORF)": (b"IIRO", b"IIRS", b"MMOR"),
    "camera raw (Panasonic RW2)": (b"IIU\0",),
    "camera raw (Fujifilm RAF)": (b"FUJIFILMCCD-RAW",),
    "camera raw (Canon CRW)": (b"II\x1a\0\0\0HEAPCCDR",),
    "camera raw (Sigma X3F)": (b"FOVb",),
    "camera raw (Minolta MRW)": (b"\0MRM",),
    "camera raw (Phase One IIQ)": (b"IIIITwaR", b"MMMMRawT"),
}
"""Formats that are not decoded → what their files begin with."""

_HEIF_BRANDS = set(
    b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 miaf avci avcs jpeg j2ki".split()
)
_IFF_KINDS = {b"ILBM", b"PBM ", b"ACBM", b"DEEP", b"CIMG", b"RGB8", b"RGBN"}
_DCX = b"\xb1\x68\xde\x3a"
_MONOCHROME = {bytes(6), b"\0\0\0\xff\xff\xff"}
"""Palettes of a PCX of 1 bit that mean black and white, the first by being left out."""
_ODD_COLOUR = re.compile(
    rb'"[^"\n]{1,8}?\sc\s+#([\da-f]{3}|[\da-f]{9}|[\da-f]{12})["\s]', re.IGNORECASE
)
"""A colour of an XPM with other than 8 bits per channel."""
_OS2_KINDS = {b"IC", b"CI", b"PT", b"CP"}
_BMP_HEADERS = {12, 40, 52, 56, 108, 124, *range(16, 65, 4)}
_WBMP = re.compile(rb"\0\0([\x80-\xff]{0,3}[\0-\x7f])([\x80-\xff]{0,3}[\0-\x7f])", re.DOTALL)
_INFLATED = 4096


def recognise(data: bytes) -> str | None:
    """Name the format of a file by its structure, if its first bytes alone do not tell."""
    if data[:2] == b"BM" and len(data) >= 18 and _u32(data, 14) in _BMP_HEADERS:
        return "BMP"
    if data[:2] in _OS2_KINDS and len(data) >= 18 and _u32(data, 14) in {12, 64}:
        return "OS/2 icon, pointer or bitmap array"
    if data[:4] == b"RIFF" and data[8:12] in {b"WEBP", b"ACON"}:
        return "WEBP" if data[8:12] == b"WEBP" else "ANI (animated cursor)"
    if data[:4] in {b"FORM", b"FOR4"} and data[8:12] in _IFF_KINDS:
        return "IFF"
    if data[4:8] == b"ftyp":
        brands = {
            data[8:12],
            *(data[at : at + 4] for at in range(16, min(int.from_bytes(data[:4]), 256), 4)),
        }
        for name, known in (
            ("AVIF", {b"avif", b"avis"}),
            ("camera raw (Canon CR3)", {b"crx "}),
            ("HEIF", _HEIF_BRANDS),
        ):
            if brands & known:
                return name
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[344:348] in {b"n+1\0", b"ni1\0"}:
        return "NIfTI"
    if data[:7] == b"#define" and re.search(rb"\bshort\s+\w+_bits\s*\[", data[:_INFLATED]):
        return "XBM of X10 (16-bit words)"
    if data[:3] == b"\x1f\x8b\x08":
        return _in_gzip(data)
    return "SVG" if _is_svg(data[:_INFLATED]) else None


def guess(data: bytes) -> str | None:
    """Name the format of a file that no decoder accepts, by headers that other files might have by
    chance.
    """
    if data[522:528] == b"\x00\x11\x02\xff\x0c\x00" or (
        data[522:524] == b"\x11\x01" and not any(data[:512])
    ):
        return "PICT"
    if (
        len(data) >= 100
        and _u32(data, 4, ">") == 7
        and 100 <= _u32(data, 0, ">") <= 400
        and _u32(data, 8, ">") <= 2
    ):
        return "XWD"
    if (wide := _WBMP.match(data)) is not None:
        width, height = (
            sum((byte & 0x7F) << 7 * at for at, byte in enumerate(reversed(number)))
            for number in wide.groups()
        )
        if width and height and len(data) == wide.end() + -(-width // 8) * height:
            return "WBMP"
    return _tga(data)


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
                width, depth, kind, palette = (_u32(data, at, ">") for at in (4, 12, 20, 28))
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
                    depth = f"{counted(bits, 'bit')} in {counted(planes, 'plane')}"
                    return f"PCX of version {data[1]} with {depth}"
            case "XPM" if _ODD_COLOUR.search(data[:1_000_000]):
                return "XPM whose colours have other than 8 bits per channel"
    except (struct.error, IndexError):  # it is cut off, which its decoder says better
        pass
    return None


def full_palette(data: bytes) -> bytes:
    """Return a BMP of 4 or 8 bits whose header promises 256 colours. With fewer, Pillow takes some
    palettes for another depth.
    """
    if len(data) < 54 or _u32(data, 14) < 40 or _u32(data, 10) == 14 + _u32(data, 14):
        return data
    bits, colours = int.from_bytes(data[28:30], "little"), _u32(data, 46)
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
    Return anything else as it is.
    """
    if not data.startswith(_DCX) or len(data) < 8:
        return data
    table = data[4 : 4 + 4 * min(1024, len(data) // 4 - 1)]
    pages = [page for (page,) in takewhile(any, struct.iter_unpack("<I", table))]
    if not pages or data[pages[0] : pages[0] + 1] != b"\n":
        return data
    return data[pages[0] : min((page for page in pages if page > pages[0]), default=len(data))]


def _u32(data: bytes, at: int, order: str = "<") -> int:
    return int(struct.unpack_from(order + "I", data, at)[0])


def _is_svg(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf")
    if head[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        text = head.decode("utf-16", "ignore").encode()
    begins = re.match(rb"\s*<(\?xml|!--|!DOCTYPE\s+svg|([\w.-]+:)?svg[\s>/])", text)
    has_tag = re.search(rb"<([\w.-]+:)?svg[\s>/]", text)
    return begins is not None and has_tag is not None and b"<html" not in text


def _in_gzip(data: bytes) -> str | None:
    try:
        inner = zlib.decompressobj(31).decompress(data, _INFLATED)
    except zlib.error:
        return None
    names = (name for name, magics in REFUSED.items() if inner.startswith(magics))
    found = next(names, None) or recognise(inner)
    return f"{found} compressed with gzip" if found else None


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
    if colours >= 0 and (space := _u32(data, colours + 7, ">")) not in known:
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
        yield _u32(data, 18 + 16 * number)


def _is_misread(data: bytes, at: int) -> bool:
    """Tell whether Pillow takes an icon of 4 or 8 bits for one of 1 bit, because of its palette."""
    head = data[at : at + 48]
    return (
        len(head) == 48
        and head[14] in {4, 8}
        and _u32(head, 32) == 2
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
        at += 4 + _u32(data, at, ">")
    return at


def _tga(data: bytes) -> str | None:
    if len(data) < 18:
        return None
    colormap, kind, _, colours, palette, _, _, width, height, depth, flags = struct.unpack_from(
        "<xBBHHBHHHHBB", data
    )
    plausible = (
        colormap in {0, 1}
        and kind in {1, 2, 3, 9, 10, 11, 32, 33}
        and width
        and height
        and depth in {8, 15, 16, 24, 32}
        and flags < 0x40
    )
    coherent = (
        (palette in {15, 16, 24, 32} and colours > 0)
        if colormap
        else (colours == 0 and palette == 0 and kind not in {1, 9})
    )
    if not (plausible and coherent):
        return "TGA" if data.endswith(b"TRUEVISION-XFILE.\0") else None
    return f"TGA of type {kind} with {counted(depth, 'bit')}" + (
        f" and a palette of {palette} bits" if colormap else ""
    )
