"""Encoded pictures → pixels, or the reason why not.

The contract:

- `decode` never raises for what is in a picture: whatever its bytes, the answer is a `Decoded`, with pixels or with a status and one line.
- The answer depends on bytes, recipe and limits alone, bit for bit: not on the thread, the process or what was decoded before.
- Nothing is decoded whose header promises more than `max_pixels`, and no more than `max_bytes` are looked at.
- No other program is run and no file is opened, whatever the picture asks for: formats that are scripts (EPS, WMF, PDF) are refused.
- Fast decoding does not change answers. A JPEG goes through simplejpeg (libjpeg-turbo; at full size its RGB is Pillow's, bit for bit),
  scaled in the DCT only while its short side stays at least twice the target. What simplejpeg refuses, even if recoverable, Pillow
  decides on, so that a picture that Pillow reads is ok, and one that it does not read has Pillow's reason.

How pictures become RGB: as Pillow's `convert("RGB")` does it (alpha is dropped, not blended), but for two things that it clips.
16-bit grey keeps its high byte, as 16-bit RGB does in Pillow. 32-bit integers and floats are taken as 8-bit, 16-bit or 0 to 1 where the
picture's extremes fit that, and are stretched between its extremes where not. Of an animation it is the first frame.
TIFF is turned by Pillow itself as its orientation says, whatever the recipe.

Importing this sets up Pillow for the process: its own limit against decompression bombs follows ours (for pictures within pictures,
as in ICO), and its warnings are silenced, because `warnings.catch_warnings` is not safe among threads.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import struct
import threading
import time
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from imagemill.images import preprocess
from imagemill.records import Decoded, Limits, Recipe, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FAULTS_VARIABLE", "FORMATS", "decode", "decode_into"]

COMMON_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Those that Pillow loads first; the rest cost 50 ms of imports, once, when the first such picture comes."""

FORMATS = (
    *COMMON_FORMATS,
    *("WEBP", "TIFF", "AVIF", "JPEG2000", "PSD", "ICO", "ICNS", "CUR", "DDS", "QOI", "DIB", "BLP", "DCX", "FLI", "FTEX", "GBR"),
    *("IM", "MSP", "PCD", "PCX", "PIXAR", "SGI", "SUN", "XBM", "XPM", "XVTHUMB", "SPIDER", "TGA"),
)
"""What is decoded: Pillow's raster formats, in the order in which they are tried (those without a magic number last).

Left out on purpose: EPS, WMF, EMF and PDF (programs to be run, or the system's renderer), BUFR, GRIB, HDF5 and MPEG (Pillow only
recognises them), FITS (its compressed form inflates without bounds), IPTC, IMT and McIdas (recognised by next to nothing, so that
other files pass for them).
"""

PLUGINS = {"HEIF": ("pillow_heif", "register_heif_opener", "pillow-heif"), "JXL": ("pillow_jxl", None, "pillow-jxl-plugin")}
"""Formats that need a package: its module, what registers it with Pillow (None: importing does), and its name for pip."""

REFUSED = {
    "PDF": (b"%PDF",),
    "EPS": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "WMF": (b"\xd7\xcd\xc6\x9a\x00\x00", b"\x01\x00\x00\x00l\x00\x00\x00", b"\x01\x00\x00\x00\x58\x00\x00\x00"),
    "SVG": (b"<svg",),
    "FITS": (b"SIMPLE  =",),
    "HDF5": (b"\x89HDF\r\n\x1a\n",),
    "GRIB": (b"GRIB",),
    "BUFR": (b"BUFR",),
    "MPEG": (b"\x00\x00\x01\xb3",),
}
"""Formats that are recognised in order to say that they are not decoded."""

FAULTS_VARIABLE = "IMAGEMILL_TEST_DECODER_FAULTS"
"""For tests only. Where this is set, a picture that contains `imagemill-test-crash` ends the process by SIGSEGV,
`imagemill-test-hang` sleeps for ever, and `imagemill-test-oom` runs out of memory."""

_BMFF_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_TOO_LARGE = ("Decompressed data too large", "Too much memory used in text chunks", "decompression bomb")
_CUT = ("truncated", "Truncated", "unexpected end", "not enough", "buffer is not large enough", "EOF", "broken PNG file (chunk b'')")
_UNSUPPORTED = ("nsupported", "not supported", "nimplemented", "not implemented", "not available", "cannot handle", "Unknown compression")
_MAX_SEGMENTS = 10_000
_ORIENTATION = 0x0112

_setup = threading.Lock()
_registered: set[str] = set()


class _Refusal(Exception):  # noqa: N818 - not an error of the program but a status
    """A picture that is not decoded, and why."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(status, error)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """What the header of a JPEG says."""

    width: int
    height: int
    layers: int
    bits: int
    frame: int
    """The marker of its frame header: 0xC0 baseline, 0xC2 progressive, 0xC9 and 0xCA arithmetic, …"""
    orientation: int

    @property
    def ordinary(self) -> bool:
        return self.bits == 8 and self.layers in {1, 3} and self.frame in {0xC0, 0xC1, 0xC2}


def decode(data: bytes, recipe: Recipe, limits: Limits) -> Decoded:
    """Decode and preprocess one picture. Safe among threads; the heavy parts release the GIL.

    Returns: `pixels` is a new uint8 (size, size, 3) array, or None with status and error; `width` and `height` are known as soon as the
    header can be read, even if the rest cannot.
    """
    return decode_into(data, recipe, limits, np.empty((recipe.size, recipe.size, 3), np.uint8))


def decode_into(data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8]) -> Decoded:
    """Decode and preprocess one picture into a place of a batch.

    Args:
        data: the encoded picture.
        recipe: how it becomes the model's input.
        limits: `max_pixels` and `max_bytes` are kept here; `max_seconds` is for those who can end a process.
        out: uint8 (size, size, 3), any strides. Whether or not the picture is ok, it may have been written to.

    Returns: as `decode`, with `pixels` being `out`.
    """
    if not data:
        return Decoded(None, Status.EMPTY, "the file is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        return Decoded(None, Status.TOO_LARGE, f"{len(data)} bytes are more than the budget of {limits.max_bytes} bytes per picture")
    seen = _Seen()
    try:
        if FAULTS_VARIABLE in os.environ:
            _fault(data)
        _prepare_pillow(limits)
        jpeg = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
        if jpeg is not None:
            seen.width, seen.height = _turned_size(jpeg.width, jpeg.height, jpeg.orientation if recipe.exif else 1)
            _check_budget(jpeg.width, jpeg.height, limits)
        if jpeg is None or not jpeg.ordinary or not _decode_jpeg(data, jpeg, recipe, out):
            _decode_with_pillow(data, recipe, limits, out, seen)
    except _Refusal as refusal:
        return Decoded(None, refusal.status, refusal.error, seen.width, seen.height)
    except MemoryError:
        return Decoded(None, Status.TOO_LARGE, "not enough memory to decode it", seen.width, seen.height)
    except Exception as error:  # plugins raise anything at all on damaged files
        return Decoded(None, _judge(error, data), _one_line(error), seen.width, seen.height)
    return Decoded(out, Status.OK, None, seen.width, seen.height)


@dataclass(slots=True)
class _Seen:
    """What was learnt of a picture before it failed."""

    width: int | None = None
    height: int | None = None


# The fast path


def _decode_jpeg(data: bytes, jpeg: _Jpeg, recipe: Recipe, out: NDArray[np.uint8]) -> bool:
    """Decode with simplejpeg; False where it refuses, which leaves it to Pillow."""
    factor = preprocess.shrink(jpeg.width, jpeg.height, recipe)
    stored = (-(-jpeg.width // factor), -(-jpeg.height // factor))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=stored[1], min_width=stored[0], min_factor=factor)
    except MemoryError:
        raise
    except Exception:  # it raises ValueError and others; all of them mean: ask Pillow
        return False
    if pixels.shape != (stored[1], stored[0], 3):
        return False
    orientation = jpeg.orientation if recipe.exif else 1
    crop = preprocess.locate(*_turned_size(jpeg.width, jpeg.height, orientation), recipe)
    width, height = _turned_size(*stored, orientation)
    box = preprocess.region(_shrunk(crop, factor), recipe, width, height)
    left, top, right, bottom = preprocess.turned_region(box, orientation, width, height)
    part = preprocess.turn(pixels[top:bottom, left:right], orientation)
    preprocess.resample(part, crop, recipe, out, left=box[0], top=box[1], scale=factor)
    return True


def _shrunk(crop: preprocess.Crop, factor: int) -> preprocess.Crop:
    if factor == 1:
        return crop
    x, y = (preprocess.Span(span.start / factor, span.stop / factor, span.first, span.count) for span in (crop.x, crop.y))
    return preprocess.Crop(x, y)


def _jpeg_header(data: bytes) -> _Jpeg | None:
    """Read size, kind and orientation; None where anything is unusual, which leaves it to Pillow."""
    frame: tuple[int, int, int, int, int] | None = None
    exif = xmp = None
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at : at + 1] != b"\xff" or at + 4 > len(data):
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # markers without a length, none of which belongs here
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
    return _Jpeg(width, height, layers, bits, marker, _orientation(exif, xmp))


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """Read the orientation as Pillow's `getexif` does: from EXIF or else from XMP; 1 where both are silent or broken."""
    found = _exif_orientation(exif) if exif else None
    if found is None and xmp and (match := re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)):
        found = int(match[2])
    return found if found in preprocess.TURNS else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Read the orientation from an EXIF block; the usual case by hand (1 µs), the rest by Pillow (100 µs)."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[6:10])
    if order is not None and len(exif) >= 16:
        start = 6 + struct.unpack_from(order + "I", exif, 10)[0]
        if start + 2 <= len(exif):
            count = struct.unpack_from(order + "H", exif, start)[0]
            tag = struct.pack(order + "H", _ORIENTATION)
            entries = [at for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12) if exif[at : at + 2] == tag]
            if not entries and start + 2 + 12 * count <= len(exif):
                return None
            if len(entries) == 1 and struct.unpack_from(order + "HI", exif, entries[0] + 2) == (3, 1):
                return int(struct.unpack_from(order + "H", exif, entries[0] + 8)[0])
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        found = parsed.get(_ORIENTATION)
    except Exception:  # broken EXIF is no reason to refuse a picture
        return None
    return found if isinstance(found, int) else None


# Everything else


def _decode_with_pillow(data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8], seen: _Seen) -> None:
    image = _open(data, limits, seen)
    try:
        turns_itself = image.format == "TIFF"  # Pillow does it when it loads, and gives the turned size before
        orientation = 1 if turns_itself or not recipe.exif else _pillow_orientation(image)
        seen.width, seen.height = _turned_size(*image.size, orientation)
        _check_budget(*image.size, limits)
        if turns_itself:
            _check_tiles(image, limits)
        if image.format == "PNG":
            _check_png_sums(data)
        image.load()
        if not turns_itself and recipe.exif:
            orientation = _pillow_orientation(image)  # of a PNG it may come after the pixels
        seen.width, seen.height = width, height = _turned_size(*image.size, orientation)
        _check_budget(width, height, limits)
        crop = preprocess.locate(width, height, recipe)
        box = preprocess.region(crop, recipe, width, height)
        part = _to_rgb(image, preprocess.turned_region(box, orientation, width, height))
        if orientation in preprocess.TURNS:
            part = part.transpose(preprocess.TURNS[orientation])
        preprocess.resample(part, crop, recipe, out, left=box[0], top=box[1])
    finally:
        image.close()


def _open(data: bytes, limits: Limits, seen: _Seen) -> ImageFile.ImageFile:
    """Find the plugin that reads these bytes, as `Image.open` does, which would hide the reason where there is none."""
    prefix = data[:16]
    expected = _recognise(data)
    if expected == "WEBP":
        _check_webp(data, limits, seen)
    reason: Exception | None = None
    for name in _candidates(expected):
        if name not in Image.OPEN and name not in COMMON_FORMATS:
            with _setup:
                Image.init()
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        try:
            if accept is not None and accept(prefix) is not True:  # a string says that the codec is missing
                continue
            image = factory(io.BytesIO(data), "")
            if min(image.size) > 0:
                return image
        except (MemoryError, Image.DecompressionBombError):
            raise
        except Exception as error:  # plugins raise anything at all on damaged files
            if name == expected:
                reason = error
    raise _why_not(data, expected, reason, limits)


def _candidates(expected: str | None) -> tuple[str, ...]:
    if expected in PLUGINS:
        return (expected,) if _register(expected) else ()
    if expected in REFUSED:
        return ()
    return FORMATS if expected is None else (expected, *(name for name in FORMATS if name != expected))


def _register(name: str) -> bool:
    """Load the plugin of a format, where it is installed."""
    module, register, _ = PLUGINS[name]
    with _setup:
        if name not in _registered:
            try:
                plugin = importlib.import_module(module)
            except ImportError:
                return False
            if register is not None:
                getattr(plugin, register)()
            _registered.add(name)
    return True


def _recognise(data: bytes) -> str | None:
    """Name the format by its magic number, where that is long enough to be sure."""
    for name, magics in _MAGIC.items():
        if data.startswith(magics):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return "HEIF" if data[8:12] in _BMFF_HEIF and b"avif" not in data[8:64] else "AVIF" if data[8:12] in {b"avif", b"avis"} else None
    if data[:5] == b"<?xml" and b"<svg" in data[:1024]:
        return "SVG"
    return None


_MAGIC: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "PSD": (b"8BPS",),
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n"),
    "ICNS": (b"icns",),
    "QOI": (b"qoif",),
    "DDS": (b"DDS ",),
    "JXL": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"),
    **REFUSED,
}


def _why_not(data: bytes, expected: str | None, reason: Exception | None, limits: Limits) -> _Refusal:
    if expected is None:
        return _Refusal(Status.NOT_AN_IMAGE, f"no picture format begins like this: {data[:16]!r}")
    if expected in PLUGINS:
        _, _, package = PLUGINS[expected]
        if expected not in _registered:
            return _Refusal(Status.UNSUPPORTED, f"{expected} needs a package that is not installed: pip install {package}")
    elif expected in REFUSED:
        return _Refusal(Status.UNSUPPORTED, f"{expected} is not among the formats that are decoded")
    elif reason is None:
        return _Refusal(Status.UNSUPPORTED, f"the installed Pillow cannot decode {expected}: pip install --upgrade pillow")
    if expected == "JPEG" and (jpeg := _jpeg_header(data)) is not None and not jpeg.ordinary:
        _check_budget(jpeg.width, jpeg.height, limits)
        return _Refusal(Status.UNSUPPORTED, f"this JPEG has {jpeg.bits} bits and {jpeg.layers} layers, frame type SOF{jpeg.frame - 0xC0}")
    assert reason is not None or expected in PLUGINS
    error = reason or SyntaxError("not identified by its plugin")
    return _Refusal(_judge(error, data), f"broken {expected} header: {_one_line(error)}")


def _pillow_orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to refuse a picture
        return 1
    return found if isinstance(found, int) and found in preprocess.TURNS else 1


def _to_rgb(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of a loaded picture and make it RGB; what is stretched is stretched by the extremes of the whole."""
    image.info.pop("transparency", None)  # dropped either way, and with a palette Pillow warns
    whole = box == (0, 0, *image.size)
    part: Image.Image = image if whole else image.crop(box)
    if image.mode.startswith("I;16"):
        bits = _tiff_bits(image)
        return _grey((np.asarray(part) >> (bits - 8)).clip(0, 255))
    if image.mode == "I":
        low, high = (int(value) for value in image.getextrema())  # type: ignore[arg-type]  # one band, so two numbers
        values = np.asarray(part)
        if low >= 0 and high <= 0xFFFF:
            return _grey(values >> 8 if high > 0xFF or image.format == "PPM" else values)
        return _grey(np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))))
    if image.mode == "F":
        return _grey(_stretched(np.asarray(image), box))
    if image.mode in {"La", "RGBa"}:
        part = part.convert("LA" if image.mode == "La" else "RGBA")
    return part.convert("RGB")


def _stretched(values: NDArray[np.float32], box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    left, top, right, bottom = box
    part = values[top:bottom, left:right].astype(np.float64)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low == high:
        high = low + 1
    scaled = (np.nan_to_num(part, nan=low, posinf=high, neginf=low) - low) * (255.0 / (high - low))
    return np.rint(scaled)


def _grey(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _tiff_bits(image: Image.Image) -> int:
    """Tell how many bits a 16-bit grey value really has: TIFF has 12 as well."""
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(258) if tags is not None else None
    return bits[0] if isinstance(bits, tuple) and bits and bits[0] in {12, 16} else 16


# Budgets and reasons


def _prepare_pillow(limits: Limits) -> None:
    half = max(1, limits.max_pixels // 2)  # Pillow raises at twice its limit
    if half != Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = half
    # catch_warnings, pytest's for one, takes the filter away with it; so it is looked for each time (0.2 µs)
    if not any(entry is _silence for entry in warnings.filters[:3]):
        with _setup:
            filters: Any = warnings.filters  # a list, in spite of its stub
            if _silence not in filters:
                filters.insert(0, _silence)
                warnings._filters_mutated()  # type: ignore[attr-defined]


_silence: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

Image.preinit()


def _check_budget(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise _Refusal(
            Status.TOO_LARGE,
            f"{width}×{height} are {width * height} pixels, more than the budget of {limits.max_pixels} pixels per picture",
        )


def _check_tiles(image: Image.Image, limits: Limits) -> None:
    """Refuse a TIFF whose tiles are larger than the budget, however small the picture: libtiff decodes whole tiles."""
    tags: Any = getattr(image, "tag_v2", {})
    width, height = tags.get(322), tags.get(323)
    if isinstance(width, int) and isinstance(height, int):
        _check_budget(width, height, limits)


def _check_webp(data: bytes, limits: Limits, seen: _Seen) -> None:
    """Check a WebP's size before Pillow opens it: up to 12.x it makes room for the whole canvas twice by then."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", body, 6))
    elif kind == b"VP8X":
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L" and body[0] == 0x2F:
        packed = int.from_bytes(body[1:5], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        return
    seen.width, seen.height = width, height
    _check_budget(width, height, limits)


def _check_png_sums(data: bytes) -> None:
    """Check what Pillow does not: the sums of the pixels' chunks. A file that ends before them is left to Pillow."""
    at = 8
    view = memoryview(data)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data) or kind == b"IEND":
            return
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise _Refusal(Status.CORRUPT, f"broken PNG file: wrong checksum of the IDAT chunk at byte {at}")
        at = end + 4


def _judge(error: BaseException, data: bytes) -> Status:
    text = str(error)
    if isinstance(error, Image.DecompressionBombError) or any(sign in text for sign in _TOO_LARGE):
        return Status.TOO_LARGE
    if isinstance(error, NotImplementedError) or any(sign in text for sign in _UNSUPPORTED):
        return Status.UNSUPPORTED
    ends = (EOFError, IndexError, struct.error)
    if isinstance(error, ends) or isinstance(error.__cause__, ends) or any(sign in text for sign in _CUT) or _is_cut(data):
        return Status.TRUNCATED
    return Status.CORRUPT


def _is_cut(data: bytes) -> bool:
    """Tell from a broken file's own account of its length whether its end is missing."""
    if data[:3] == b"\xff\xd8\xff":
        return b"\xff\xd9" not in data[-1024:] and b"\xff\xda" not in data
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 8 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            if kind == b"IEND":
                return False
            if not kind.isalpha():
                return False
            at += 12 + length
        return True
    if data[:4] == b"RIFF" and len(data) >= 8:
        return int(struct.unpack_from("<I", data, 4)[0]) + 8 > len(data) + 1
    if data[:2] == b"BM" and len(data) >= 6:
        return int(struct.unpack_from("<I", data, 2)[0]) > len(data)
    if data[4:8] == b"ftyp" or data[4:8] == b"jP  ":
        at = 0
        while at + 8 <= len(data):
            length = int(struct.unpack_from(">I", data, at)[0])
            if length < 8:
                return False
            at += length
        return at != len(data)
    return False


def _one_line(error: BaseException) -> str:
    """Say an exception in one line that is the same each time: no addresses, no more than 300 characters."""
    text = re.sub(r"<(\S+)[^<>]* at 0x[0-9a-fA-F]+>", r"<\1>", " ".join(str(error).split()))
    return (text or type(error).__name__)[:300]


def _turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _fault(data: bytes) -> None:
    """Fail as tests ask for; see FAULTS_VARIABLE."""
    if b"imagemill-test-crash" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)  # the signal may take another thread first
    if b"imagemill-test-hang" in data:
        while True:
            time.sleep(3600)
    if b"imagemill-test-oom" in data:
        [np.empty(1 << doubling, np.uint8) for doubling in range(20, 63)]  # never written to, so it costs address space only
