"""Every format but the ordinary JPEG, by Pillow: which plugin reads it, how its pixels become RGB,
and what is refused.

How images become RGB: as Pillow's `convert("RGB")` does it, but for what it clips (docs/formats.md)
and alpha (docs/design.md). TIFF has a reader of its own (`tiff`), which turns it as its orientation
says, whatever the recipe.

Pillow's warnings are silenced for the process, because `warnings.catch_warnings` is not safe among
threads, and a user's `-W error` would make them errors of images.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile

from imagemill.errors import counted
from imagemill.pipeline.decoding import png, preprocess, tiff
from imagemill.pipeline.decoding.formats import (
    COMMON_FORMATS,
    FORMATS,
    PLUGINS,
    guess,
    recognise,
)
from imagemill.pipeline.decoding.jpeg import ORIENTATION, read_header
from imagemill.pipeline.decoding.misread import (
    first_page,
    full_palette,
    variant,
    without_extra_channels,
)
from imagemill.pipeline.decoding.refusals import Seen, check_budget, judge, one_line
from imagemill.pipeline.decoding.scaling import extremes, to_8_bits
from imagemill.records import BadImage, Limits, Recipe, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_setup = threading.Lock()
_registered: set[str] = set()
_silence: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

Image.preinit()


def decode(data: bytes, recipe: Recipe, limits: Limits, out: NDArray[np.uint8], seen: Seen) -> None:
    """Decode and preprocess one image into a place of a batch, and note its size as soon as it is
    known. May raise anything.
    """
    data = first_page(data)
    is_png = data.startswith(png.MAGIC)
    file, orientation, damage = png.strip(data, recipe.exif) if is_png else (data, 1, None)
    image = png.read_small(file, limits.max_pixels) if is_png else None
    image = image or _open(file, limits, seen)
    try:
        # Pillow does it when it loads, and gives the turned size before.
        turns_itself = image.format == "TIFF"
        if recipe.exif and not turns_itself and not is_png:
            orientation = orientation_of(image)
        seen.width, seen.height = preprocess.turned_size(*image.size, orientation)
        check_budget(*image.size, limits)
        if image.format == "HEIF":
            check_budget(*_coded_size(data), limits)
        area = image.width * image.height
        if damage is not None:
            raise damage
        is_grey_pcx = image.format == "PCX" and image.mode == "L"
        if is_grey_pcx and data[-769:-768] != b"\x0c" and data[68] != 2:
            # Pillow takes it for grey.
            raise BadImage(
                Status.TRUNCATED, "truncated PCX file: it ends before its palette of 256 colours"
            )
        if image.format == "JXL" and image.mode == "LA" and len(vars(image)["_data"]) > 2 * area:
            raise _refused("JPEG XL with grey and alpha of more than 8 bits")
        image.load()  # once: after an error the second call is silent and leaves black pixels
        seen.width, seen.height = width, height = preprocess.turned_size(*image.size, orientation)
        check_budget(width, height, limits)
        part = preprocess.needed(*image.size, orientation, recipe, False)
        if recipe.background is not None and image.has_transparency_data:
            pixels = _blend(image, part.stored, recipe.background, file)
        else:
            pixels = _to_rgb(image, part.stored)
        turned = preprocess.turn(np.asarray(pixels), orientation)
        left, top, *_ = part.displayed
        preprocess.resample(turned, part.crop, recipe, out, left=left, top=top)
    finally:
        image.close()


# Which format it is


def _open(data: bytes, limits: Limits, seen: Seen) -> Image.Image:
    """Find the plugin that reads these bytes, as `Image.open` does, which would hide the reason
    where there is none.
    """
    prefix = data[:16]
    expected = recognise(data)
    if expected == "TIFF":
        return tiff.read(data, limits, seen)
    if (name := variant(expected, data)) is not None:
        raise _refused(name)
    if expected == "BMP":
        data = full_palette(data)
    if expected == "PSD":
        data = without_extra_channels(data)
    if expected == "WEBP":
        _check_webp(data, limits, seen)
    if expected == "JXL":
        check_budget(*_jxl_size(data), limits)  # its plugin decodes as it opens
    reason: Exception | None = None
    for name in _candidates(expected, data):
        if name not in Image.OPEN and name not in COMMON_FORMATS:
            with _setup:
                Image.init()
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        try:
            # A string says that the codec is missing.
            if accept is not None and accept(prefix) is not True:
                continue
            image = factory(io.BytesIO(data), "")
            if min(image.size) > 0:
                return image
        except (MemoryError, Image.DecompressionBombError):
            raise
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            # Another format, as far as the plugin can tell.
            if name == expected:
                reason = error
        except Exception as error:
            # Its format, but damaged or not supported; `Image.open` stops here too.
            expected, reason = name, error
            break
    raise _why_not(data, expected, reason, limits, seen)


def _candidates(expected: str | None, data: bytes) -> tuple[str, ...]:
    if expected in PLUGINS:
        return (expected,) if _register(expected) else ()
    if expected is not None and expected not in FORMATS:
        return ()
    if expected is not None:
        return (expected,)
    # Pillow takes every text that begins with "BM" for a BMP, whose header is then far too long.
    is_text = data[:2] == b"BM" and int.from_bytes(data[14:18], "little") >= 2**16
    return tuple(name for name in FORMATS if name != "BMP" or not is_text)


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


def _why_not(
    data: bytes, expected: str | None, reason: Exception | None, limits: Limits, seen: Seen
) -> BadImage:
    if expected is None:
        if (name := guess(data)) is not None:
            return _refused(name)
        return BadImage(
            Status.NOT_AN_IMAGE, f"not a known image format (first bytes: {data[:16]!r})"
        )
    if expected in PLUGINS:
        _, _, extra = PLUGINS[expected]
        if expected not in _registered:
            return BadImage(
                Status.UNSUPPORTED,
                f"{expected} needs a package that is not installed: pip install"
                f" 'imagemill[{extra}]'",
            )
    elif expected not in FORMATS:
        return _refused(expected)
    elif reason is None:
        return BadImage(
            Status.UNSUPPORTED,
            f"the installed Pillow cannot decode {expected}: pip install --upgrade pillow",
        )
    if expected == "JPEG" and (jpeg := read_header(data)) is not None and not jpeg.ordinary:
        check_budget(jpeg.width, jpeg.height, limits)
        return BadImage(
            Status.UNSUPPORTED,
            f"this JPEG has {jpeg.bits} bits and {counted(jpeg.layers, 'layer')}, frame type"
            f" SOF{jpeg.frame - 0xC0}",
        )
    if expected == "AVIF" and any(size := _coded_size(data)):
        seen.width, seen.height = size
        check_budget(*size, limits)
        if max(size) > 2**15 or size[0] * size[1] > 2**28:
            return BadImage(
                Status.UNSUPPORTED,
                f"{size[0]}×{size[1]}: the AVIF decoder reads at most 32768 a side and 2^28 pixels",
            )
    assert reason is not None or expected in PLUGINS
    error = reason or SyntaxError("not identified by its plugin")
    if expected == "XPM" and "cannot read" in str(error):
        return _refused("XPM with colours by name, or without colours")
    if expected == "ICNS" and "No 32bit icon resources" in str(error):
        return _refused("ICNS without an icon in 24-bit colour")
    status = judge(error, data)
    return BadImage(
        status,
        f"{'unsupported' if status is Status.UNSUPPORTED else 'broken'} {expected} header:"
        f" {one_line(error)}",
    )


def _refused(name: str) -> BadImage:
    return BadImage(Status.UNSUPPORTED, f"{name} is not supported: convert it to PNG or JPEG")


# How it becomes RGB


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation that an image of Pillow is still to be turned by."""
    if image.format == "JXL" and not vars(image).get("jpeg"):
        return 1  # libjxl has turned it, unless it is a JPEG packed without loss
    try:
        # A plugin's own `getexif` may decode.
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to refuse an image
        return 1
    return found if isinstance(found, int) and found in preprocess.TURNS else 1


def _to_rgb(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut a box out of a loaded image and make it RGB; what is stretched is stretched by the
    extremes of the whole.
    """
    image.info.pop("transparency", None)  # dropped either way, and with a palette Pillow warns
    whole = box == (0, 0, *image.size)
    part: Image.Image = image if whole else image.crop(box)
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(part) >> 8)
    if image.mode in {"I", "F"}:
        is_ppm = image.mode == "I" and image.format == "PPM"
        low, high = (0, 0xFFFF) if is_ppm else extremes([np.asarray(image)])
        return _grey(to_8_bits(np.asarray(part), low, high))
    if image.mode in {"La", "RGBa"}:
        part = part.convert("LA" if image.mode == "La" else "RGBA")
    return part if part.mode == "RGB" else part.convert("RGB")


def _blend(
    image: Image.Image, box: tuple[int, int, int, int], background: str, file: bytes
) -> Image.Image:
    """Cut a box out of a loaded image and blend it onto a background colour."""
    alpha: Image.Image | None = None
    if image.format == "PNG" and image.mode in {"L", "I;16", "RGB"}:
        alpha = Image.fromarray(_is_opaque(image, box, file))
        part = _to_rgb(image, box)
    else:
        part = image.crop(box)
        if image.mode in {"La", "RGBa"}:
            part = part.convert("LA" if image.mode == "La" else "RGBA")
        part = part.convert("RGBA")
    blended = Image.new("RGB", part.size, background)
    blended.paste(part, mask=alpha or part)
    return blended


def _is_opaque(image: Image.Image, box: tuple[int, int, int, int], file: bytes) -> NDArray[Any]:
    """Compare the pixels of a PNG with its transparent colour, at the bit depth of the file: Pillow
    compares with 8-bit pixels.
    """
    bits = file[24]
    key = np.atleast_1d(image.info["transparency"]) & ((1 << bits) - 1)
    pixels = np.asarray(image.crop(box))
    if bits < 8:
        key = key * (255 // ((1 << bits) - 1))
    elif bits == 16 and image.mode == "RGB":
        # Decoded to the high bytes. Read as little-endian, the low bytes are the high ones.
        with Image.open(io.BytesIO(file), formats=["PNG"]) as other:
            other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]
            pixels = pixels.astype(np.uint16) << 8 | np.asarray(other.crop(box))
    opaque: NDArray[Any] = np.any(pixels.reshape(*pixels.shape[:2], -1) != key, axis=2)
    return opaque


def _grey(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


# Budgets


def limit_pillow(limits: Limits) -> None:
    """Apply `max_pixels` to what Pillow opens by itself: images inside images, as in ICO.

    For processes of our own. In a user's process Pillow keeps the limit that it has there.
    """
    Image.MAX_IMAGE_PIXELS = (limits.max_pixels + 1) // 2  # Pillow raises above twice its limit


def prepare(*, partial: bool = False) -> None:
    """Make errors of truncated images errors, unless they may be `partial`, and silence warnings,
    before each image: code of others may undo it.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = partial
    # catch_warnings, pytest's for one, removes the filter; so look for it each time (0.2 µs)
    if _silence not in warnings.filters[:3]:
        with _setup:
            filters: Any = warnings.filters  # a list, in spite of its stub
            if _silence not in filters:
                filters.insert(0, _silence)
                warnings._filters_mutated()  # type: ignore[attr-defined]


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each outer box of an ISO file, and where its content begins and ends."""
    at = 0
    while at + 16 <= len(data):
        length, kind, long = struct.unpack_from(">I4sQ", data, at)
        start = at + (16 if length == 1 else 8)
        end = at + (long if length == 1 else length) if length else len(data)
        yield kind, start, end
        at = max(end, start)


def _coded_size(data: bytes) -> tuple[int, int]:
    """Return the largest width and height among the properties of an AVIF or HEIF. An AVIF decoder
    does not tell a size that it refuses, and that of HEIF tells the size after cropping.
    """
    meta = next((data[start:end] for kind, start, end in _boxes(data) if kind == b"meta"), b"")
    sizes = [
        struct.unpack_from(">4xII", meta, found.end())
        for found in re.finditer(b"ispe(?=.{12})", meta, re.DOTALL)
    ]
    return max(sizes, default=(0, 0), key=lambda size: size[0] * size[1])


def _jxl_size(data: bytes) -> tuple[int, int]:
    """Return the width and height in the header of a JPEG XL; smaller ones if the header is cut
    off.
    """
    stream = data[:12] if data.startswith(b"\xff\x0a") else b""
    boxes = _boxes(data)
    while len(stream) < 12 and (box := next(boxes, None)) is not None:
        kind, start, end = box
        if kind in {b"jxlc", b"jxlp"}:  # one box, or several parts
            stream += data[start + 4 * (kind == b"jxlp") : end][:12]
    bits = int.from_bytes(stream[2:12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    height = side()
    ratio = take(3)
    across, down = ((0, 1), (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (height * across // down if ratio else side()), height


def _check_webp(data: bytes, limits: Limits, seen: Seen) -> None:
    """Check a WebP's size before Pillow opens it: up to 12.x it makes room for the whole canvas
    twice by then.
    """
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
    check_budget(width, height, limits)
