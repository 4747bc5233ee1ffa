"""Read the first image of a TIFF file, or say which of its properties is not supported.

TIFF describes its samples by a dozen independent tags. Pillow decodes some combinations to wrong
pixels without an error. So the tags decide, before anything is decoded, who reads a file:

- Pillow: 8-bit and bilevel images, and those compressed as fax or JPEG, in the combinations that
  are tested.
- `_read_samples`: any other layout of integers and floats, if the compression restores bytes (none,
  LZW, Deflate, PackBits, LZMA, ZSTD). It wraps the strips or tiles as an 8-bit grey TIFF, which
  Pillow's libtiff decompresses, and interprets the bytes with numpy.
- Nobody: everything else is `unsupported`, and the error names the property.
  That includes camera raw files, whose first image is a thumbnail.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from imagemill.pipeline.decoding import preprocess
from imagemill.pipeline.decoding.refusals import Seen, check_budget, one_line
from imagemill.pipeline.decoding.scaling import extremes, to_8_bits
from imagemill.pipeline.decoding.tiff_layout import (
    BYTE_CODECS,
    CHANNELS,
    FAX,
    KINDS,
    Layout,
    Tags,
    broken,
    truncated,
)
from imagemill.records import BadImage, Limits, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray


_BYTES_PER_PIXEL = 8
"""Decoded samples may take this many bytes for each pixel of `max_pixels`: enough for 16-bit RGBA
at the limit.
"""
_BLOCK_BYTES = 1 << 22
"""Samples are converted in blocks of rows, so that intermediate arrays stay small beside the
image.
"""
_COMPRESSIONS = {
    "none": {1},
    "CCITT RLE": {2},
    "CCITT fax 3": {3},
    "CCITT fax 4": {4},
    "old-style JPEG": {6},
    "JPEG": {7, 33007},
    "JBIG": {9, 10, 34661},
    "JPEG XR": {22610, 34934},
    "NeXT": {32766},
    "CCITT RLE/W": {32771},
    "PackBits": {32773},
    "ThunderScan": {32809},
    "IT8": {32895, 32896, 32897, 32898},
    "PixarFilm": {32908},
    "PixarLog": {32909},
    "DCS": {32947},
    "JPEG 2000": {33003, 33004, 33005, 34712},
    "SGI Log": {34676, 34677},
    "JBIG2": {34715},
    "LERC": {34887},
    "lossy JPEG": {34892},
    "ZSTD": {34926},
    "WebP": {34927, 50001},
    "PNG": {34933},
    "JPEG XL": {50002, 52546},
}
"""The compressions that an error may have to name, and their numbers."""
_CAMERA_COMPRESSIONS = {
    32767: "Sony",
    32769: "packed raw",
    32770: "Samsung",
    34316: "Panasonic",
    34713: "Nikon",
    65000: "Kodak",
    65535: "Pentax",
}
_CAMERA_PHOTOMETRICS = {32803, 34892}
_MAX_DIRECTORIES = 32
_PREDICTING = {5, 8, 32946, 34925, 50000}
"""Compressions that a predictor applies to. With none and PackBits libtiff ignores it and tifffile
does not.
"""

_PHOTOMETRICS = {
    0: "WhiteIsZero",
    1: "BlackIsZero",
    2: "RGB",
    3: "palette",
    4: "transparency mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELAB",
    9: "ICCLAB",
    10: "ITULAB",
    32803: "color filter array",
    32844: "LogL",
    32845: "LogLUV",
    34892: "linear raw",
    51177: "depth map",
}
_KIND_NAMES = {
    1: "unsigned",
    2: "signed",
    3: "float",
    4: "undefined",
    5: "complex integer",
    6: "complex float",
}
_BITS = {"u": {1, 2, 4, 8, 10, 12, 14, 16, 32, 64}, "i": {8, 16, 32, 64}, "f": {16, 32, 64}}


def read(data: bytes, limits: Limits, seen: Seen) -> Image.Image:
    """Return the first image of a TIFF, loaded and turned as its orientation says, in a mode with 8
    bits per channel.

    Raises: BadImage, and whatever Pillow raises for a damaged file.
    """
    tags = Tags.first(data)
    width, height = tags.one(256), tags.one(257)
    if width < 1 or height < 1:
        raise broken(f"the size is {width}×{height}")
    seen.width, seen.height = preprocess.turned_size(width, height, tags.one(274, 1))
    check_budget(width, height, limits)
    _refuse_camera_raw(tags)
    layout = Layout.of(tags)
    check_budget(layout.segment_width, layout.segment_height, limits)  # libtiff decodes whole tiles
    _check_segments(layout)
    try:
        if _pillow_is_right(layout):
            image: Image.Image = TiffImagePlugin.TiffImageFile(io.BytesIO(data), "")
            image.load()
            return image
        _refuse_unsupported(layout)
        image = _read_samples(data, layout, limits)
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        if layout.is_cut(len(data)):
            raise truncated(one_line(error)) from error
        raise
    turn = preprocess.TURNS.get(tags.one(274, 1))
    image = image if turn is None else image.transpose(turn)
    image.format = "TIFF"
    return image


# Who reads it


def _refuse_camera_raw(tags: Tags) -> None:
    """Refuse camera raw files: their first image is usually a thumbnail, and the photograph needs a
    raw converter.
    """
    maker = "Canon CR2" if tags.data[8:10] == b"CR" else "DNG" if 50706 in tags.values else None
    waiting, done = [tags.following, *tags.values.get(330, ())], 0
    directory: Tags | None = tags
    while maker is None and directory is not None:
        compression = directory.one(259, 1)
        if directory.one(262, 0) in _CAMERA_PHOTOMETRICS or compression in _CAMERA_COMPRESSIONS:
            maker = _CAMERA_COMPRESSIONS.get(compression, "color filter array")
        directory, done = None, done + 1
        while waiting and directory is None and done < _MAX_DIRECTORIES:
            offset = waiting.pop(0)
            try:
                directory = Tags.at(tags.data, tags.order, tags.big, offset)
            except BadImage:  # a later image that is cut off says nothing about the first
                done += 1
    if maker is not None:
        raise BadImage(
            Status.UNSUPPORTED,
            f"camera raw file ({maker}): raw files are not decoded, export them as JPEG or TIFF",
        )


def _check_segments(layout: Layout) -> None:
    if layout.segment_width < 1 or layout.segment_height < 1:
        raise broken(f"tiles of {layout.segment_width}×{layout.segment_height}")
    needed = layout.per_plane * layout.planes
    name = "tiles" if layout.tiled else "strips"
    jpeg = layout.compression == 6  # may be a whole JPEG file that tag 513 points to
    if len(layout.offsets) < needed and not jpeg:
        raise truncated(f"{len(layout.offsets)} {name} where the size needs {needed}")
    if 0 in layout.offsets[:needed] or 0 in layout.counts[:needed]:
        raise BadImage(Status.UNSUPPORTED, f"sparse TIFF: some of its {name} are not stored")


def _pillow_is_right(layout: Layout) -> bool:
    """Tell whether Pillow reads this layout to the right pixels; `tests/test_tiff.py` compares each
    of them with tifffile.
    """
    bits, photometric, extra = set(layout.bits), layout.photometric, layout.extra
    if (
        set(layout.formats) != {1}
        or layout.tags.one(32997, 1) != 1
        or layout.tags.data[:4] == b"MM\0+"
    ):
        return False
    if layout.compression == 6:
        return bits == {8} and photometric == 6 and layout.samples == 3 and not layout.planar
    if photometric not in CHANNELS or layout.samples != layout.channels + len(extra):
        return False
    if layout.compression == 7:
        fits = photometric in ({1, 2} if layout.planar or extra else {0, 1, 2, 5, 6})
        return bits == {8} and fits and extra in {(), (0,), (2,)}
    if bits in ({1}, {4}):
        fits = layout.compression in (BYTE_CODECS | FAX if bits == {1} else {32809})
        return fits and layout.samples == 1 and photometric in {0, 1} and layout.predictor == 1
    if (
        layout.planar
        or layout.fill_order != 1
        or layout.predictor not in {1, 2}
        or layout.compression not in BYTE_CODECS
    ):
        return False
    if layout.predictor == 2 and layout.compression not in _PREDICTING:
        return False
    if bits == {16}:
        return photometric == 2 and extra in {(), (0,), (1,), (2,)}
    if bits != {8}:
        return False
    if photometric in {1, 2}:
        return extra in {(), (0,), (1,), (2,)}
    plain_cmyk = photometric == 5 and layout.tags.one(332, 1) == 1
    wide_palette = photometric == 3 and max(layout.tags.values.get(320, ()), default=0) > 0xFF
    return not extra and (photometric == 0 or plain_cmyk or wide_palette)


def _jpeg_ycbcr(layout: Layout) -> bool:
    """Tell whether YCbCr has the colour matrix and the range that JPEG has, and is not
    subsampled.
    """
    matrix, range_ = (
        [high / low if low else 0 for high, low in zip(values[::2], values[1::2], strict=False)]
        for values in (layout.tags.values.get(529, ()), layout.tags.values.get(532, ()))
    )
    return (
        layout.tags.values.get(530) == (1, 1)
        and (not matrix or np.allclose(matrix, (0.299, 0.587, 0.114), atol=1e-3))
        and (not range_ or range_ == [0, 255, 128, 255, 128, 255])
    )


def _refuse_unsupported(layout: Layout) -> None:
    """Refuse what `_read_samples` cannot read, by the name of the property."""
    number = layout.compression
    names = (name for name, numbers in _COMPRESSIONS.items() if number in numbers)
    name = next(names, f"number {number}")
    photometric = _PHOTOMETRICS.get(layout.photometric, f"number {layout.photometric}")
    bits, kind, depth = layout.bits[0], KINDS.get(layout.formats[0], ""), layout.tags.one(32997, 1)
    sample = (
        f"{'/'.join(map(str, dict.fromkeys(layout.bits)))}-bit"
        f" {_KIND_NAMES.get(layout.formats[0], f'format {layout.formats[0]}')}"
    )
    mixed = len(set(layout.bits)) > 1 or len(set(layout.formats)) > 1
    reason = None
    if layout.compression not in BYTE_CODECS:
        reason = f"{name} compression"
        if layout.compression in {6, 7, 32809} | FAX:
            reason += f" of {sample} {photometric} samples"
    elif layout.photometric not in CHANNELS:
        reason = f"photometric interpretation {photometric}"
    elif mixed or bits not in _BITS.get(kind, ()):
        reason = f"{sample} samples"
    elif (layout.photometric in {6, 8} and (kind, bits) != ("u", 8)) or (
        layout.photometric == 3 and (kind != "u" or bits > 16)
    ):
        reason = f"{sample} {photometric} samples"
    elif layout.photometric == 6 and not _jpeg_ycbcr(layout):
        reason = "YCbCr samples that are subsampled or have a matrix or range other than JPEG's"
    elif layout.photometric == 5 and layout.tags.one(332, 1) != 1:
        reason = f"ink set {layout.tags.one(332)}"
    elif depth != 1:
        reason = f"an image depth of {depth}"
    elif layout.predictor != 1 and layout.compression not in _PREDICTING:
        reason = f"predictor {layout.predictor} and compression {name}"
    elif (
        layout.predictor not in {1, 2, 3}
        or (layout.predictor == 3 and kind != "f")
        or (layout.predictor == 2 and bits % 8)
    ):
        reason = f"predictor {layout.predictor} and {sample} samples"
    if reason is not None:
        raise BadImage(Status.UNSUPPORTED, f"TIFF with {reason} is not supported")
    if layout.samples < layout.channels:
        raise broken(f"{layout.samples} samples per pixel for {photometric}")


# Samples of any layout


def _read_samples(data: bytes, layout: Layout, limits: Limits) -> Image.Image:
    """Read integers and floats of any layout, by numpy."""
    # A tile may be larger than the image.
    pixels_decoded = max(layout.width * layout.height, layout.segment_width * layout.segment_height)
    needed = pixels_decoded * max(1, layout.samples * layout.bits[0] // 8)
    if needed > _BYTES_PER_PIXEL * limits.max_pixels:
        raise BadImage(
            Status.TOO_LARGE,
            f"{layout.width}×{layout.height} pixels of {layout.samples} {layout.bits[0]}-bit"
            f" samples are {needed} bytes, more than the budget of {_BYTES_PER_PIXEL} bytes for"
            f" each of {limits.max_pixels} pixels",
        )
    channels = layout.channels
    alpha = (
        layout.extra[:1] in {(1,), (2,)}
        and layout.samples > channels
        and layout.kind != "i"
        and layout.photometric in {0, 1, 2}
    )
    wanted = channels + alpha
    planes = [_decompress(data, layout, plane) for plane in range(wanted if layout.planar else 1)]
    step = max(1, _BLOCK_BYTES // planes[0].width)
    starts = range(0, layout.height, step)

    def blocks(first: int, last: int) -> Iterator[NDArray[Any]]:
        for start in starts:
            box = (0, start, planes[0].width, min(start + step, layout.height))
            if layout.planar:
                yield np.concatenate(
                    [_samples(np.asarray(plane.crop(box)), layout) for plane in planes[first:last]],
                    axis=2,
                )
            else:
                yield _samples(np.asarray(planes[0].crop(box)), layout)[:, :, first:last]

    pixels = np.empty((layout.height, layout.width, wanted), np.uint8)
    if layout.photometric == 3:
        table = _palette(layout)
        colours = np.empty((layout.height, layout.width, 3), np.uint8)
        for start, block in zip(starts, blocks(0, 1), strict=True):
            colours[start : start + step] = table[block[:, :, 0]]
        return Image.fromarray(colours)
    _to_bytes(layout, lambda: blocks(0, channels), pixels[:, :, :channels], step)
    if alpha:
        _to_bytes(layout, lambda: blocks(channels, wanted), pixels[:, :, channels:], step, low=0)
    if layout.photometric == 0:
        np.subtract(255, pixels[:, :, 0], out=pixels[:, :, 0])
    plain = ("L", "LA", "RGB", "RGBA")[wanted - 1]
    mode = {5: "CMYK", 6: "YCbCr", 8: "LAB"}.get(layout.photometric, plain)
    if alpha and layout.extra[0] == 1:  # the colours are multiplied by alpha already
        mode = mode[:-1] + "a"
    return Image.frombytes(mode, (layout.width, layout.height), pixels.tobytes())


def _to_bytes(
    layout: Layout,
    blocks: Callable[[], Iterator[NDArray[Any]]],
    out: NDArray[np.uint8],
    step: int,
    low: float | None = None,
) -> None:
    """Map blocks of samples to 8 bits; `low` is the lowest value where it does not depend on the
    image.
    """
    bits = layout.bits[0]
    simple = layout.kind == "u" and bits <= 16
    found: tuple[float, float] = (0, 0)
    if not simple:
        found = extremes(blocks()) if low is None or layout.kind == "f" else (0, (1 << bits) - 1)
    for index, block in enumerate(blocks()):
        part = out[index * step : (index + 1) * step]
        if not simple:
            part[:] = to_8_bits(block, found[0] if low is None else low, found[1])
        elif bits > 8:
            part[:] = block >> (bits - 8)
        else:
            part[:] = block * (255 // ((1 << bits) - 1))


def _palette(layout: Layout) -> NDArray[np.uint8]:
    """Return the palette as uint8 (entries, 3)."""
    size = 1 << layout.bits[0]
    table = np.array(layout.tags.values.get(320, ()), np.int64)
    if table.size != 3 * size:
        raise broken(
            f"a palette of {table.size} numbers where {layout.bits[0]} bits need {3 * size}"
        )
    unused_bits = 8 if table.max() > 0xFF else 0  # some programs write 8-bit palettes
    return (table.reshape(3, size).T >> unused_bits).astype(np.uint8)


def _decompress(data: bytes, layout: Layout, plane: int) -> Image.Image:
    """Return the bytes of the rows of one plane, tile beside tile, by Pillow's libtiff: as if they
    were 8-bit grey pixels.
    """
    segments = slice(plane * layout.per_plane, (plane + 1) * layout.per_plane)
    offsets, counts = layout.offsets[segments], layout.counts[segments]
    row = layout.segment_row_bytes
    if layout.compression == 1:  # sizes are known, and the tag with the counts is often wrong
        last = layout.height - (layout.per_plane // layout.across - 1) * layout.segment_height
        rows = [
            last if index >= layout.per_plane - layout.across else layout.segment_height
            for index in range(layout.per_plane)
        ]
        counts = tuple(row * count for count in rows)
    elif len(counts) != len(offsets):
        raise truncated(f"{len(counts)} sizes for {len(offsets)} strips or tiles")
    for offset, count in zip(offsets, counts, strict=True):
        if offset + count > len(data):
            raise truncated(f"{count} bytes at byte {offset} lie beyond the end, {len(data)} bytes")
    width = layout.across * row
    tags: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (layout.height,),
        258: (8,),
        259: (layout.compression,),
        262: (1,),
    }
    tags |= {266: (layout.fill_order,), 277: (1,)}
    if layout.tiled:
        tags |= {322: (row,), 323: (layout.segment_height,), 324: offsets, 325: counts}
    else:
        tags |= {273: offsets, 278: (layout.segment_height,), 279: counts}
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(_with_directory(data, tags)), "")
    # Or Pillow does it, and takes these bytes for pixels, of which it has a limit.
    image.im = Image.new("L", image.size).im
    image.load()
    return image


def _with_directory(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """Return a file whose directory is replaced by another one, behind its data."""
    at = len(data)
    arrays, entries = [], []
    for tag, values in sorted(tags.items()):
        entries.append(
            struct.pack("<HHII", tag, 4, len(values), values[0] if len(values) == 1 else at)
        )
        if len(values) > 1:
            arrays.append(struct.pack(f"<{len(values)}I", *values))
            at += len(arrays[-1])
    head, count = struct.pack("<4sI", b"II*\0", at), struct.pack("<H", len(entries))
    return b"".join((head, data[8:], *arrays, count, *entries, bytes(4)))


def _samples(rows: NDArray[np.uint8], layout: Layout) -> NDArray[Any]:
    """Interpret bytes of rows as samples: (rows, width, samples in a plane), in native byte
    order.
    """
    bits, kind = layout.bits[0], layout.kind
    per_pixel = 1 if layout.planar else layout.samples
    rows = rows.reshape(len(rows), layout.across, -1)
    shape = (*rows.shape[:2], layout.segment_width, per_pixel)
    if bits % 8:
        count = layout.segment_width * per_pixel
        single = np.unpackbits(rows, axis=2)[:, :, : count * bits].reshape(
            *rows.shape[:2], count, bits
        )
        values: NDArray[Any] = (
            single @ (1 << np.arange(bits - 1, -1, -1)).astype(np.uint16)
        ).reshape(shape)
    elif layout.predictor == 3:
        size = bits // 8
        summed = np.add.accumulate(
            rows.reshape(*rows.shape[:2], -1, per_pixel), axis=2, dtype=np.uint8
        )
        # All first bytes, all second bytes, …, the most significant first.
        planes = summed.reshape(*rows.shape[:2], size, -1)
        values = (
            np.ascontiguousarray(planes.swapaxes(2, 3))
            .view(f">f{size}")
            .reshape(shape)
            .astype(f"f{size}")
        )
    else:
        size = bits // 8
        whole = (
            np.ascontiguousarray(rows)
            .view(f"{layout.tags.order}u{size}")
            .reshape(shape)
            .astype(f"u{size}", copy=False)
        )
        if layout.predictor == 2:
            whole = np.add.accumulate(whole, axis=2, dtype=whole.dtype)
        values = whole.view(f"{kind}{size}")
    return values.reshape(len(rows), -1, per_pixel)[:, : layout.width]
