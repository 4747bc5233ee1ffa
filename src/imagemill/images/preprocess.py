"""The card's recipe: where the crop lies in a picture, and how its pixels become the model's.

The published recipes resize the whole picture so that its short side is `resize`, and then cut the centre out. Here the crop is found
first and only it is resampled, with the same filter, at the same scale and at the same place, so that the rest is never computed: a
picture of 1×4000 does not become one of 256×1024000. `by_the_book` is the published way, for tests and benchmarks to compare with.

Two resamplers do it. `resample` is Pillow's own, within one level of `by_the_book`. `resample_pixels`, for JPEGs that simplejpeg decoded,
uses cykooz-resizer where its wheels exist (x86-64, macOS): the same filters in SIMD code, the same bits with every instruction set,
within two levels of Pillow's, and four to five times as fast. Elsewhere it hands over to `resample`. `RESAMPLER` says which it is.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from imagemill.records import Interpolation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imagemill.records import Recipe

try:
    import cykooz_resizer as _cykooz  # type: ignore[import-untyped]
except ImportError:  # no wheel for this platform, Linux on arm64 for one (4.0.1)
    _cykooz = None

RESAMPLER = "pillow" if _cykooz is None else "cykooz"
"""What resamples JPEGs; their pixels depend on it, by two levels at most."""

FILTERS = {Interpolation.BILINEAR: Image.Resampling.BILINEAR, Interpolation.BICUBIC: Image.Resampling.BICUBIC}

_SUPPORT = {Interpolation.BILINEAR: 1.0, Interpolation.BICUBIC: 2.0}
"""Half the width of the filter, in pixels of the coarser of source and result."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored picture into the displayed one; 1 and everything else: nothing."""


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of the crop."""

    start: float
    stop: float
    """Where the crop lies in the source, pixels of the source; within 0 and its length."""
    first: int
    """Of the result, the first pixel that shows the source; those before are black padding."""
    count: int
    """How many pixels of the result show the source."""


@dataclass(frozen=True, slots=True)
class Crop:
    """Which part of a displayed picture becomes the model's input, and where in it."""

    x: Span
    y: Span


def locate(width: int, height: int, recipe: Recipe) -> Crop:
    """Find the crop of a picture of this displayed size.

    The arithmetic is torchvision's: `Resize(int)` makes the long side `int(resize * long / short)`, `CenterCrop` starts at
    `int(round((side - size) / 2.0))` and pads a side that is too short with black, the odd pixel at the end.
    """
    if recipe.resize is None:
        return Crop(_span(width, width, recipe.size), _span(height, height, recipe.size))
    short, long = min(width, height), max(width, height)
    longer = int(recipe.resize * long / short)
    to_width, to_height = (recipe.resize, longer) if width <= height else (longer, recipe.resize)
    return Crop(_span(width, to_width, recipe.size), _span(height, to_height, recipe.size))


def _span(length: int, resized: int, size: int) -> Span:
    if resized < size:
        return Span(0.0, float(length), (size - resized) // 2, resized)
    first = int(round((resized - size) / 2.0))  # noqa: RUF046 - as torchvision spells it
    return Span(first * length / resized, min(float(length), (first + size) * length / resized), 0, size)


def shrink(width: int, height: int, recipe: Recipe) -> int:
    """Say by which power of two (1, 2, 4, 8) a JPEG may be scaled while it is decoded.

    The short side stays at least twice the length it is resized to, so that the filter still has the say: scaling to just above the
    target costs a point of top-1 (docs/performance.md). Without resizing there is nothing to scale.
    """
    if recipe.resize is None:
        return 1
    return next((factor for factor in (8, 4, 2) if min(width, height) >= factor * 2 * recipe.resize), 1)


def region(crop: Crop, recipe: Recipe, width: int, height: int) -> tuple[int, int, int, int]:
    """Tell which pixels of the displayed picture the crop needs: left, top, right, bottom, with the margin that the filter reaches into."""
    left, right = _reach(crop.x, width, recipe)
    top, bottom = _reach(crop.y, height, recipe)
    return left, top, right, bottom


def _reach(span: Span, length: int, recipe: Recipe) -> tuple[int, int]:
    scale = max(1.0, (span.stop - span.start) / span.count)
    margin = _SUPPORT[recipe.interpolation] * scale + 2 if recipe.resize is not None else 0
    return max(0, math.floor(span.start - margin)), min(length, math.ceil(span.stop + margin))


def turned_region(box: tuple[int, int, int, int], orientation: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Translate a box of the displayed picture, of this displayed size, into the stored one."""
    left, top, right, bottom = box
    match orientation:
        case 2:
            return width - right, top, width - left, bottom
        case 3:
            return width - right, height - bottom, width - left, height - top
        case 4:
            return left, height - bottom, right, height - top
        case 5:
            return top, left, bottom, right
        case 6:
            return top, width - right, bottom, width - left
        case 7:
            return height - bottom, width - right, height - top, width - left
        case 8:
            return height - bottom, left, height - top, right
    return box


def resample(
    image: Image.Image, crop: Crop, recipe: Recipe, out: NDArray[np.uint8], *, left: int = 0, top: int = 0, scale: int = 1
) -> None:
    """Resample the crop of a displayed picture into `out`.

    Args:
        image: RGB; the displayed picture, or a part of it.
        crop: as `locate` found it for the whole picture at full size.
        out: uint8 (size, size, 3); written in full, padding included.
        left, top: where in the whole picture the image begins, pixels of the image.
        scale: by how much the image was scaled down when it was decoded.
    """
    if crop.x.count == 0 or crop.y.count == 0:  # a resize to nothing; torchvision refuses such a recipe
        out[:] = 0
        return
    shape = (crop.x.count, crop.y.count)
    if recipe.resize is None:
        x, y = round(crop.x.start) - left, round(crop.y.start) - top
        piece = image if (x, y) == (0, 0) and image.size == shape else image.crop((x, y, x + shape[0], y + shape[1]))
    else:
        box = (
            max(0.0, crop.x.start / scale - left),
            max(0.0, crop.y.start / scale - top),
            min(float(image.width), crop.x.stop / scale - left),
            min(float(image.height), crop.y.stop / scale - top),
        )
        piece = image.resize(shape, FILTERS[recipe.interpolation], box=box)
    if shape == (recipe.size, recipe.size):
        out[:] = np.asarray(piece)
        return
    out[:] = 0
    out[crop.y.first : crop.y.first + shape[1], crop.x.first : crop.x.first + shape[0]] = np.asarray(piece)


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn a stored picture, uint8 (H, W, 3), into the displayed one as `TURNS` does; a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return pixels


def resample_pixels(
    pixels: NDArray[np.uint8], crop: Crop, recipe: Recipe, out: NDArray[np.uint8], *, left: int = 0, top: int = 0, scale: int = 1
) -> None:
    """Resample the crop of a displayed picture into `out`, as `resample` does, with the fastest resampler that there is.

    Args:
        pixels: uint8 (H, W, 3), RGB, any strides; the displayed picture, or a part of it.
        crop, recipe, out, left, top, scale: as `resample` takes them.
    """
    if _cykooz is None or recipe.resize is None or crop.x.count == 0 or crop.y.count == 0:
        resample(Image.fromarray(np.ascontiguousarray(pixels)), crop, recipe, out, left=left, top=top, scale=scale)
        return
    height, width = pixels.shape[:2]
    x, box_width = _within(crop.x, scale, left, width)
    y, box_height = _within(crop.y, scale, top, height)
    source = _cykooz.ImageData(width, height, _cykooz.PixelType.U8x3, pixels.tobytes())
    result = _cykooz.ImageData(crop.x.count, crop.y.count, _cykooz.PixelType.U8x3)
    options = _cykooz.ResizeOptions(_algorithms()[recipe.interpolation], False, _cykooz.CropBox(x, y, box_width, box_height))
    resizer = getattr(_thread, "resizer", None)
    if resizer is None:
        resizer = _thread.resizer = _cykooz.Resizer()
    resizer.resize(source, result, options)
    piece = np.frombuffer(result.get_buffer(), np.uint8).reshape(crop.y.count, crop.x.count, 3)
    if piece.shape != out.shape:
        out[:] = 0
    out[crop.y.first : crop.y.first + crop.y.count, crop.x.first : crop.x.first + crop.x.count] = piece


def _within(span: Span, scale: int, offset: int, length: int) -> tuple[float, float]:
    """Give start and length of the crop in pixels of a part of the picture, never beyond it, not even by rounding."""
    start = max(0.0, span.start / scale - offset)
    extent = min(float(length), span.stop / scale - offset) - start
    return start, extent if start + extent <= length else math.nextafter(extent, 0.0)


@functools.cache
def _algorithms() -> dict[Interpolation, Any]:
    names = {
        Interpolation.BILINEAR: _cykooz.FilterType.bilinear,
        Interpolation.BICUBIC: _cykooz.FilterType.catmull_rom,
    }  # a = -0.5, as Pillow's
    return {name: _cykooz.ResizeAlg.convolution(kind) for name, kind in names.items()}


_thread = threading.local()


def by_the_book(image: Image.Image, recipe: Recipe) -> NDArray[np.uint8]:
    """Preprocess the published way: resize the whole RGB picture, cut its centre out. For comparison only.

    Returns: uint8 (size, size, 3).
    """
    image = image.convert("RGB")
    if recipe.resize is not None:
        short, long = min(image.size), max(image.size)
        longer = int(recipe.resize * long / short)
        size = (recipe.resize, longer) if image.width <= image.height else (longer, recipe.resize)
        image = image.resize(size, FILTERS[recipe.interpolation])
    pixels = np.asarray(image)
    for axis in (0, 1):
        lacking = max(0, recipe.size - pixels.shape[axis])
        pixels = np.pad(pixels, [(lacking // 2, (lacking + 1) // 2) if a == axis else (0, 0) for a in range(3)])
        first = int(round((pixels.shape[axis] - recipe.size) / 2.0))  # noqa: RUF046 - as torchvision spells it
        pixels = pixels.take(range(first, first + recipe.size), axis=axis)
    return pixels
