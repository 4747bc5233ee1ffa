"""Which format a file has: what is decoded, what is refused by name, and how each begins.

A valid file of a format that is not decoded is `unsupported`, never `corrupt` or `not_an_image`.
"""

from __future__ import annotations

import re
import struct
import zlib

from imagemill.errors import counted

COMMON_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Those that Pillow loads first; the rest cost 50 ms of imports, once, when the first such image
comes.
"""

FORMATS = (
    *COMMON_FORMATS,
    *"WEBP TIFF AVIF JPEG2000 PSD ICO ICNS CUR DDS QOI DIB BLP DCX FLI FTEX GBR".split(),
    *"IM MSP PCD PCX PIXAR SGI SUN XBM XPM XVTHUMB SPIDER TGA".split(),
)
"""What is decoded: Pillow's raster formats, in the order in which they are tried (those without a
magic number last).

Left out on purpose: EPS, WMF, EMF and PDF (programs to be run, or the system's renderer), BUFR,
GRIB, HDF5 and MPEG (Pillow only recognises them), FITS (its compressed form inflates without
bounds), IPTC, IMT and McIdas (recognised by next to nothing, so that other files pass for them).
"""

PLUGINS = {
    "HEIF": ("pillow_heif", "register_heif_opener", "heif"),
    "JXL": ("pillow_jxl", None, "jxl"),
}
"""Formats that need a package: its module, what registers it with Pillow (None: importing does),
and the extra of imagemill that installs it.
"""

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

MAGIC: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    # TIFF and BigTIFF. Pillow also takes the last two, which are wrong.
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*"),
    "PSD": (b"8BPS",),
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n"),
    "ICO": (b"\0\0\1\0",),
    "ICNS": (b"icns",),
    "QOI": (b"qoif",),
    "DDS": (b"DDS ",),
    "JXL": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"),
    "SGI": (b"\x01\xda",),
    "SUN": (b"\x59\xa6\x6a\x95",),
    "PCX": tuple(
        bytes((10, version, packed, bits))
        for version in (0, 2, 3, 4, 5)
        for packed in (0, 1)
        for bits in (1, 2, 4, 8)
    ),
    "XPM": (b"/* XPM */",),
    **REFUSED,
}
"""Format → what its files begin with, if that is specific enough to be sure."""

_HEIF_BRANDS = set(
    b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 miaf avci avcs jpeg j2ki".split()
)
_IFF_KINDS = {b"ILBM", b"PBM ", b"ACBM", b"DEEP", b"CIMG", b"RGB8", b"RGBN"}
_OS2_KINDS = {b"IC", b"CI", b"PT", b"CP"}
_BMP_HEADERS = {12, 40, 52, 56, 108, 124, *range(16, 65, 4)}
_WBMP = re.compile(rb"\0\0([\x80-\xff]{0,3}[\0-\x7f])([\x80-\xff]{0,3}[\0-\x7f])", re.DOTALL)
_INFLATED = 4096


def recognise(data: bytes) -> str | None:
    """Name the format by its first bytes or its structure, if they are specific enough to be
    sure.
    """
    names = (name for name, magics in MAGIC.items() if data.startswith(magics))
    return next(names, None) or _by_structure(data)


def _by_structure(data: bytes) -> str | None:
    """Name the format of a file by its structure, if its first bytes alone do not tell."""
    if data[:2] == b"BM" and len(data) >= 18 and u32(data, 14) in _BMP_HEADERS:
        return "BMP"
    if data[:2] in _OS2_KINDS and len(data) >= 18 and u32(data, 14) in {12, 64}:
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
        and u32(data, 4, ">") == 7
        and 100 <= u32(data, 0, ">") <= 400
        and u32(data, 8, ">") <= 2
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


def u32(data: bytes, at: int, order: str = "<") -> int:
    """Return the 32-bit number at an offset. Raises: struct.error."""
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
    found = next(names, None) or _by_structure(inner)
    return f"{found} compressed with gzip" if found else None


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
