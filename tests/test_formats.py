"""What naming formats promises: a valid file is read to the right pixels or `unsupported` by name,
never `corrupt` or `not_an_image`.
"""

from __future__ import annotations

import gzip
import re
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image

import helpers
import sample_images
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.decoding.formats import FORMATS, PLUGINS
from imagemill.records import Limits, Recipe, Status
from reference import reference_pixels

RECIPE, LIMITS = Recipe(32, 32, None), Limits()
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
PIXELS = np.asarray(sample_images.photograph(40, 36))
FTYP = b"\0\0\0\x18ftyp"


def refused(data: bytes) -> str:
    decoded = decode(data, RECIPE, LIMITS)
    assert decoded.status is Status.UNSUPPORTED, (decoded.status, decoded.error)
    assert decoded.error is not None
    return decoded.error


def check(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    decoded = decode(data, RECIPE, LIMITS)
    assert decoded.status is Status.OK, (decoded.status, decoded.error)
    assert decoded.pixels is not None
    reference = reference_pixels(
        Image.fromarray(np.ascontiguousarray(expected).astype(np.uint8)), RECIPE
    )
    assert np.abs(decoded.pixels.astype(int) - reference).max() <= tolerance


def bmp(
    bits: int,
    rows: bytes,
    *,
    palette: bytes = b"",
    colours: int = 0,
    compression: int = 0,
    masks: tuple[int, ...] = (),
) -> bytes:
    """A BMP of 32×32 by hand."""
    extra = struct.pack(f"<{len(masks)}I", *masks) + palette
    header = struct.pack(
        "<IiiHHIIiiII", 40, 32, 32, 1, bits, compression, len(rows), 0, 0, colours, 0
    )
    start = 14 + len(header) + len(extra)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + extra + rows


def icon(colours: int) -> bytes:
    """An icon of 32×32 and 4 bits, whose palette begins with black and white."""
    palette = b"\0\0\0\0\xff\xff\xff\0".ljust(4 * colours, b"\x33")
    dib = bytearray(bmp(4, bytes(512), palette=palette, colours=colours)[14:])
    struct.pack_into("<i", dib, 8, 64)  # with its mask
    entry = struct.pack("<BBBBHHII", 32, 32, colours, 0, 1, 4, len(dib) + 128, 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + dib + bytes(128)


def tga(
    kind: int, depth: int, body: bytes, *, flags: int = 0, colours: int = 0, palette: int = 0
) -> bytes:
    """A TGA of 40×36 by hand; the body holds its palette, too."""
    return (
        struct.pack(
            "<BBBHHBHHHHBB", 0, colours > 0, kind, 0, colours, palette, 0, 0, 40, 36, depth, flags
        )
        + body
    )


def psd(bits: int, mode: int, channels: int, *, compression: int = 0) -> bytes:
    """A PSD of 4×4 by hand."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, channels, 4, 4, bits, mode)
    return header + bytes(12) + struct.pack(">H", compression) + bytes(16 * channels * bits // 8)


def pcx(image: Image.Image | None = None) -> bytes:
    return sample_images.encode(image or Image.fromarray(PIXELS), "PCX")


def monochrome_pcx() -> bytes:
    return sample_images.encode(Image.fromarray(PIXELS).convert("1"), "PCX")


def dcx(*pages: bytes) -> bytes:
    """A DCX of PCX files, behind a table of full length."""
    starts = [4 + 4 * 1024 + sum(map(len, pages[:number])) for number in range(len(pages))]
    table = struct.pack(f"<{len(starts)}I", *starts).ljust(4 * 1024, b"\0")
    return b"\xb1\x68\xde\x3a" + table + b"".join(pages)


def sun(depth: int, kind: int) -> bytes:
    """A Sun raster of 41×36 by hand."""
    rows = bytes(36 * (-(-41 * depth // 16) * 2))
    head = struct.pack(">8I", 0x59A66A95, 41, 36, depth, len(rows), kind, 0, 0)
    return head + rows


def narrow_jpeg2000(bits: int, channels: int) -> bytes:
    """A real JPEG 2000 of other than 8 bits, white in one half."""
    samples = np.zeros((36, 40, channels), np.uint16 if bits > 8 else np.uint8)
    samples[:18] = (1 << bits) - 1
    data: bytes = imagecodecs.jpeg2k_encode(
        samples.squeeze(), bitspersample=bits, codecformat="jp2", level=0, reversible=True
    )
    return data


def jpeg2000(channels: list[tuple[int, int, int]]) -> bytes:
    """The header of a JPEG 2000 code stream: (bits, across, down) for each channel."""
    size = struct.pack(">HIIIIIIIIH", 0, 40, 36, 0, 0, 40, 36, 0, 0, len(channels)) + b"".join(
        struct.pack("BBB", bits - 1, across, down) for bits, across, down in channels
    )
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size + bytes(64)


def big_jpeg(marker: int = 0xC0, height: int = 48) -> bytes:
    return sample_images.jpeg_patched(marker=marker, height=height)


def xpm(colour: str) -> bytes:
    return (
        '/* XPM */\nstatic char *x[] = {\n"2 2 2 1",\n"a c #102030",\n"b c'
        f' {colour}",\n"ab",\n"ba"\n}};\n'.encode()
    )


NAMED = {
    "JPEG-LS": lambda: imagecodecs.jpegls_encode(PIXELS),
    "JPEG XR": lambda: imagecodecs.jpegxr_encode(PIXELS),
    "Radiance HDR": lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 36 +X 40\n" + bytes(5760),
    "OpenEXR": lambda: b"v/1\x01\x02\0\0\0channels\0chlist\0" + bytes(99),
    "DPX": lambda: b"SDPX\0\0\x08\0V2.0" + bytes(2048),
    "Cineon": lambda: b"\x80\x2a\x5f\xd7" + bytes(2048),
    "PAM": (
        lambda: b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + bytes(12)
    ),
    "PFM in colour": lambda: b"PF\n2 2\n-1.0\n" + bytes(48),
    "FITS": lambda: b"SIMPLE  =                    T".ljust(2880),
    "DICOM": lambda: bytes(128) + b"DICM" + bytes(99),
    "NIfTI": lambda: struct.pack("<i", 348).ljust(344, b"\0") + b"n+1\0" + bytes(99),
    "camera raw (Canon CR3)": lambda: FTYP + b"crx \0\0\0\x01crx isom" + bytes(99),
    "camera raw (Olympus ORF)": lambda: b"IIRO\x08\0\0\0" + bytes(99),
    "camera raw (Fujifilm RAF)": lambda: b"FUJIFILMCCD-RAW 0201" + bytes(99),
    "camera raw (Panasonic RW2)": lambda: b"IIU\0\x18\0\0\0" + bytes(99),
    "ANI": lambda: b"RIFF\x40\0\0\0ACONanih" + bytes(56),
    "IFF": lambda: b"FORM\0\0\0\x40ILBMBMHD" + bytes(56),
    "WMF": lambda: b"\x01\0\x09\0\0\x03" + bytes(99),
    "EMF": lambda: struct.pack("<II", 1, 108) + bytes(32) + b" EMF" + bytes(99),
    "MNG": lambda: b"\x8aMNG\r\n\x1a\n" + bytes(99),
    "PNG for iOS (CgBI)": (
        lambda: (
            b"\x89PNG\r\n\x1a\n"
            + sample_images.chunk(b"CgBI", b"P\0 \x02")
            + sample_images.png(4, 4)[8:]
        )
    ),
    "PICT": (
        lambda: (
            bytes(512)
            + struct.pack(">HHHHH", 0, 0, 0, 9, 9)
            + b"\x00\x11\x02\xff\x0c\x00"
            + bytes(99)
        )
    ),
    "WBMP": lambda: b"\0\0\x09\x09" + b"\xaa" * 18,
    "XWD": lambda: struct.pack(">IIIII", 101, 7, 2, 24, 9).ljust(101, b"\0") + bytes(99),
    "XCF (GIMP)": lambda: b"gimp xcf v011\0" + bytes(99),
    "PSB (large Photoshop document)": lambda: b"8BPS\0\x02" + bytes(99),
    "SVG": (
        lambda: (
            b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- drawn by hand -->\n"
            + b"<!-- "
            + b"x" * 2000
            + b" -->"
            + SVG
        )
    ),
    "SVG compressed with gzip": lambda: gzip.compress(SVG),
    "FITS compressed with gzip": lambda: gzip.compress(
        b"SIMPLE  =                    T".ljust(2880)
    ),
    "PSD with 16-bit RGB pixels": lambda: psd(16, 3, 3),
    "PSD with 32-bit grey pixels": lambda: psd(32, 1, 1),
    "PSD with 8-bit multichannel pixels": lambda: psd(8, 7, 3),
    "PSD with ZIP compression": lambda: psd(8, 3, 3, compression=2),
    "Unsupported BMP bitfields layout": lambda: bmp(
        16, bytes(2048), compression=3, masks=(0xF00, 0xF0, 0xF)
    ),
    "Unsupported BMP pixel depth (2)": lambda: bmp(2, bytes(256), palette=bytes(16)),
    "Unsupported BMP compression (4)": lambda: bmp(
        24, b"\x20\1\2\3\0\0" * 32 + b"\0\1", compression=4
    ),
    "Unsupported BMP compression (6)": lambda: bmp(
        32, bytes(4096), compression=6, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    ),
    "OS/2 icon, pointer or bitmap array": (
        lambda: b"BA" + struct.pack("<IIHH", 40, 0, 32, 32) + bmp(24, bytes(3072))
    ),
    "TGA of type 1 with 8 bits and a palette of 15 bits": lambda: tga(
        1, 8, bytes(8 + 1440), colours=4, palette=15
    ),
    "TGA of type 2 with 15 bits": lambda: tga(2, 15, bytes(2880)),
    "TGA of type 32": lambda: tga(32, 8, bytes(99 + 768), colours=256, palette=24),
    "PCX of version 5 with 4 bits in 1 plane": lambda: (
        struct.pack("<BBBBHHHH", 10, 5, 1, 4, 0, 0, 9, 9).ljust(65, b"\0") + b"\1\x05" + bytes(99)
    ),
    "PCX without compression": lambda: pcx()[:2] + b"\0" + pcx()[3:],
    "DCX: PCX without compression": lambda: dcx(pcx()[:2] + b"\0" + pcx()[3:]),
    "PCX of two colours other than black and white": lambda: (
        monochrome_pcx()[:16] + b"\xff\xff\xff\0\0\0" + monochrome_pcx()[22:]
    ),
    "SUN raster of 1 bit with a palette": lambda: sun(1, 1)[:24] + struct.pack(">II6x", 1, 6),
    "SUN raster of 32 bits": lambda: sun(32, 1),
    "SUN raster of packed rows with an odd number of bytes": lambda: sun(8, 2),
    "ICO of 4 or 8 bits with a palette of black and white": lambda: icon(2),
    "JBIG": lambda: b"\0\0\1\0" + struct.pack(">III", 40, 36, 36) + bytes(99),
    "VIPS": lambda: b"\x08\xf2\xa6\xb6" + bytes(99),
    "CALS": lambda: b"srcdocid: NONE".ljust(2048),
    "sixel": lambda: b'\x1bP0;0;0q"1;1;40;36#0;2;0;0;0-\x1b\\',
    "XISF": lambda: b"XISF0100" + bytes(99),
    "JPEG 2000 with 1 channel of 1 bit": lambda: narrow_jpeg2000(1, channels=1),
    "JPEG 2000 with 1 channel of 9 bits": lambda: narrow_jpeg2000(9, channels=1),
    "JPEG 2000 with 3 channels of 4 bits": lambda: narrow_jpeg2000(4, channels=3),
    "JPEG 2000 with 3 channels of 16 bits": lambda: jpeg2000([(16, 1, 1)] * 3),
    "JPEG 2000 with 1 channel sampled at 2×2": lambda: jpeg2000([(8, 2, 2)]),
    "JPEG 2000 with 3 channels sampled at 2×2": lambda: jpeg2000([(8, 2, 2)] * 3),
    "JPEG 2000 with colour space number 14": lambda: (
        b"\0\0\0\x0cjP  \r\n\x87\n"
        + struct.pack(">I4sBBBI", 15, b"colr", 1, 0, 0, 14)
        + jpeg2000([(8, 1, 1)] * 3)
    ),
    "JPEG with fractional sampling": (
        lambda: sample_images.jpeg(subsampling=0).replace(
            b"\x03\x01\x11\0\x02\x11\x01", b"\x03\x01\x33\0\x02\x22\x01"
        )
    ),
    "ICNS without an icon in 24-bit colour": (
        lambda: b"icns" + struct.pack(">I4sI", 16 + 256, b"ICN#", 8 + 256) + bytes(256)
    ),
    "XPM2": lambda: b"! XPM2\n2 2 1 1\na c #ffffff\naa\naa\n",
    "XBM of X10": lambda: (
        b"#define x_width 16\n#define x_height 1\nstatic short x_bits[] = {\n 0x0f0f };\n"
    ),
    "hierarchical JPEG": lambda: big_jpeg(marker=0xC5),
    "JPEG whose height follows its first scan (DNL)": lambda: big_jpeg(height=0),
    "XPM with colours by name": lambda: xpm("dark olive green"),
    "XPM whose colours have other than 8 bits": lambda: xpm("#ffff80000000"),
}


@pytest.mark.parametrize("name", NAMED)
def test_valid_files_are_unsupported_by_name(name: str) -> None:
    """A valid file of a format or variant that is not decoded is `unsupported`, and the error names
    it.
    """
    assert name.removeprefix("DCX: ") in refused(NAMED[name]())


@pytest.mark.parametrize(
    "data",
    [
        b"BMW is a maker of cars and motorcycles, based in Munich.",
        b"<!DOCTYPE html><html><body>" + SVG + b"</body></html>",
        b"<?xml version='1.0'?><note>no drawing in here</note>",
        gzip.compress(b"just text", mtime=0),
        b"\x1f\x8b\x08 not really gzip",
        b"\0\0\x09\x09" + b"\xaa" * 17,
        FTYP + b"isom\0\0\0\0mp41avc1" + bytes(99),
    ],
)
def test_other_files_are_not_images(data: bytes) -> None:
    """What merely resembles an image format is still `not_an_image`."""
    decoded = decode(data, RECIPE, LIMITS)
    assert decoded.status is Status.NOT_AN_IMAGE, decoded.error
    assert decoded.error is not None
    assert decoded.error.startswith("not a known image format (first bytes: b")


def test_a_bmp_without_an_offset_to_its_pixels_is_read() -> None:
    """They follow its palette, however few colours that has."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (11, 3)).astype(np.uint8)
    values = rng.integers(0, 11, (32, 32)).astype(np.uint8)
    table = np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()
    data = bmp(8, values[::-1].tobytes(), palette=table, colours=11)
    check(data[:10] + bytes(4) + data[14:], colours[values])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("palette", ["black and white", "few greys", "colours"])
def test_small_bmp_palettes_are_read(palette: str, bits: int) -> None:
    """A BMP of 4 or 8 bits is read whatever its palette; Pillow takes one of two or sixteen greys
    for another depth.
    """
    count = {"black and white": 2, "few greys": 16, "colours": 11}[palette]
    rng = np.random.default_rng(bits)
    colours = {
        "black and white": np.array([[0] * 3, [255] * 3]),
        "few greys": np.repeat(np.arange(16)[:, None], 3, axis=1),
        "colours": rng.integers(0, 256, (11, 3)),
    }[palette].astype(np.uint8)
    values = rng.integers(0, count, (32, 32)).astype(np.uint8)
    rows = values if bits == 8 else values[:, ::2] << 4 | values[:, 1::2]
    table = np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()
    check(bmp(bits, rows[::-1].tobytes(), palette=table, colours=count), colours[values])


def test_an_icon_of_other_palettes_is_read() -> None:
    """Only one whose whole palette is black and white is refused."""
    check(icon(16), np.zeros((32, 32, 3)))


@pytest.mark.parametrize("origin", ["lower left", "lower right", "upper left", "upper right"])
def test_tga_origin_is_obeyed(origin: str) -> None:
    """A TGA is read from the corner that its descriptor names."""
    stored = PIXELS[::-1] if origin.startswith("lower") else PIXELS
    stored = stored[:, ::-1] if origin.endswith("right") else stored
    flags = 0x20 * origin.startswith("upper") + 0x10 * origin.endswith("right")
    check(tga(2, 24, stored[:, :, ::-1].tobytes(), flags=flags), PIXELS)


def test_tga_of_16_bit_palette_is_read() -> None:
    """A TGA whose palette has 16-bit colours (5 bits per channel) is read."""
    rng = np.random.default_rng(5)
    table = rng.integers(0, 32, (16, 3))
    values = rng.integers(0, 16, (36, 40)).astype(np.uint8)
    packed = (table[:, 0] << 10 | table[:, 1] << 5 | table[:, 2]).astype("<u2").tobytes()
    check(
        tga(1, 8, packed + values.tobytes(), flags=0x20, colours=16, palette=16),
        table[values] * 255 // 31,
        tolerance=1,
    )


def test_16_bit_grey_jpeg_2000_is_read() -> None:
    """Grey JPEG 2000 of 16 bits keeps its high byte, white included."""
    grey = np.linspace(0, 65535, 36 * 40).astype(np.uint16).reshape(36, 40)
    data = sample_images.encode(Image.fromarray(grey), "JPEG2000")
    check(data, np.repeat((grey >> 8)[:, :, None], 3, axis=2))


def test_16_bit_colour_png_is_read() -> None:
    """A PNG of 16-bit colour keeps its high bytes."""
    wide = PIXELS.astype(np.uint16) * 257
    check(imagecodecs.png_encode(wide), PIXELS)


@pytest.mark.parametrize("extra", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_extra_channels_of_a_packed_psd_change_nothing(mode: str, extra: int) -> None:
    """Saved selections and spot colours of a PSD leave its colours alone."""
    image = Image.fromarray(PIXELS).convert(mode)
    stored = np.atleast_3d(np.asarray(image))
    planes = [*stored.transpose(2, 0, 1), *[np.full((36, 40), 77, np.uint8)] * extra]
    planes = [255 - plane for plane in planes] if mode == "CMYK" else planes
    rows = [bytes([len(row) - 1]) + row.tobytes() for plane in planes for row in plane]
    number = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, len(planes), 36, 40, 8, number) + bytes(12)
    lengths = b"".join(struct.pack(">H", len(row)) for row in rows)
    data = header + b"\0\1" + lengths + b"".join(rows)
    check(data, np.asarray(image.convert("RGB")))
    if extra == 0:  # a damaged number of channels, as Pillow reads it
        check(data[:12] + b"\0\x05" + data[14:], np.asarray(image.convert("RGB")))
    behind_colours = len(data) - sum(map(len, rows[36 * stored.shape[2] :]))
    assert decode(data[: behind_colours - 50], RECIPE, LIMITS).status is Status.TRUNCATED


def test_a_black_and_white_pcx_is_read() -> None:
    """With the palette that says so, and without one."""
    data = monochrome_pcx()
    expected = np.asarray(Image.fromarray(PIXELS).convert("1").convert("RGB"))
    for palette in (bytes(6), b"\0\0\0\xff\xff\xff"):
        check(data[:16] + palette + data[22:], expected)


def test_the_first_page_of_a_dcx_has_its_own_palette() -> None:
    """The first of several pages of a DCX is read with its own palette, not with the last one's."""
    first = Image.fromarray(PIXELS).quantize(200)
    last = Image.fromarray(PIXELS[::-1, :, ::-1].copy()).quantize(30)
    check(dcx(pcx(first), pcx(last)), np.asarray(first.convert("RGB")))


def test_an_offset_at_which_no_page_begins_ends_no_page_of_a_dcx() -> None:
    """A damaged table: Pillow reads the first page to its end."""
    image = Image.fromarray(PIXELS)
    data = bytearray(dcx(pcx(image)))
    inside = next(at for at in range(4 + 4 * 1024 + 200, len(data)) if data[at] != 0x0A)
    data[8:12] = struct.pack("<I", inside)
    check(bytes(data), PIXELS)


def test_a_dcx_page_without_its_palette_is_truncated() -> None:
    page = pcx(Image.fromarray(PIXELS).quantize(200))
    for data in (dcx(page[:-769]), dcx(page[:-769], page)):
        assert decode(data, RECIPE, LIMITS).status is Status.TRUNCATED


SPELT = {"JPEG2000": "JPEG 2000", "XVTHUMB": "XV thumbnails", "JXL": "JPEG XL"}
"""Pillow's name → that of docs/formats.md, if it is another."""


@pytest.mark.parametrize("name", [*FORMATS, *PLUGINS])
def test_the_page_names_every_format_that_is_read(name: str) -> None:
    """In the first column of its table."""
    page = (helpers.PROJECT / "docs" / "formats.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]*\w[^|]* \|", page, re.M)
    assert re.search(rf"\b{SPELT.get(name, name)}\b", "\n".join(rows), re.I)
