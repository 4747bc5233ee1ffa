"""A card's recipe: where the crop is in an image, and how its pixels become the model's input.

Published recipes resize the whole image so that its short side is `resize`, or squash it, or fit it
into a box, and then cut the centre out. Here the crop is found first, and only its pixels are
resampled, with the same filter, scale and position. So the rest is never computed: an image of
1×4000 does not become one of 256×1024000.

If `_resample.c` was built, the pixels are those of the published way, bit for bit. Else Pillow
resamples the crop, and few values differ, by a level or two at most, because its `box` is in single
precision (docs/design.md).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from PIL import Image

from imagemill.pipeline.decoding import resample_part
from imagemill.records import BadImage, Centre, Interpolation, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imagemill.records import Recipe

FILTERS = {item: Image.Resampling[item.name] for item in Interpolation}

_SUPPORT = {
    Interpolation.NEAREST: 0.0,
    Interpolation.BOX: 0.5,
    Interpolation.BILINEAR: 1.0,
    Interpolation.HAMMING: 1.0,
    Interpolation.BICUBIC: 2.0,
    Interpolation.LANCZOS: 3.0,
}
"""Half the width of the filter, in pixels of the coarser of source and result."""
_ADDED_UP = 2**20
"""Longest axis over which `nearest` adds up positions one by one."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored image into the displayed one; 1 and everything else:
nothing.
"""

_MIRRORED, _UPSIDE_DOWN = frozenset({2, 3, 6, 7}), frozenset({3, 4, 7, 8})
"""EXIF orientations by what is done to the displayed axes; from 5 on they are swapped as well."""


class Span(Struct, frozen=True):
    """One axis of the crop."""

    length: int
    """Of the whole axis of the image, pixels."""
    resized: int
    """Length of the whole axis after resizing."""
    skipped: int
    """Pixels of the resized axis before the crop."""
    count: int
    """Pixels of the resized axis in the crop."""
    first: int = 0
    """Pixels of the border before the crop."""

    @property
    def start(self) -> float:
        """Where the crop begins in the image, pixels."""
        return self.skipped * self.length / self.resized

    @property
    def stop(self) -> float:
        """Where the crop ends in the image, pixels."""
        return (self.skipped + self.count) * self.length / self.resized


class Crop(Struct, frozen=True):
    """Which part of a displayed image becomes the model's input, and where in it."""

    x: Span
    y: Span


class Part(Struct, frozen=True):
    """Which pixels of a stored image are needed for its crop."""

    crop: Crop
    scale: int
    """By how much the image may be scaled down while it is decoded."""
    width: int
    """Of the stored image at this scale, pixels."""
    height: int
    """Of the stored image at this scale, pixels."""
    displayed: tuple[int, int, int, int]
    """Left, top, right and bottom in the displayed image at this scale."""
    stored: tuple[int, int, int, int]
    """The same in the stored image at this scale."""


@functools.lru_cache(1024)  # many images have the size of another one
def needed(width: int, height: int, orientation: int, recipe: Recipe, scaled: bool) -> Part:
    """Return which part of a stored image of this size is needed.

    Args:
        width, height: of the stored image, pixels.
        orientation: which way up it is displayed.
        recipe: how it becomes the model's input.
        scaled: whether its decoder can scale it by powers of two.
    """
    displayed = turned_size(width, height, orientation)
    scale = shrink(*displayed, recipe) if scaled else 1
    width, height = -(-width // scale), -(-height // scale)
    crop = locate(*displayed, recipe)
    box = region(crop, recipe, scale)
    stored = turned_region(box, orientation, *turned_size(width, height, orientation))
    return Part(crop, scale, width, height, box, stored)


def locate(width: int, height: int, recipe: Recipe) -> Crop:
    """Return the crop of an image of this displayed size. `Centre` says which pixels it begins
    at.
    """
    to_width, to_height = resized(width, height, recipe)
    return Crop(
        _span(width, to_width, recipe.width, recipe.centre),
        _span(height, to_height, recipe.height, recipe.centre),
    )


def resized(width: int, height: int, recipe: Recipe) -> tuple[int, int]:
    """Return width and height of the whole image after resizing.

    As in torchvision's `Resize(int)` and in transformers, the long side becomes `int(resize * long
    / short)`. As in timm's `ResizeKeepRatio(longest=1)`, both sides of an image that is fitted into
    a box are divided by the same ratio and rounded.
    """
    match recipe.resize:
        case None:
            return width, height
        case int(side):
            longer = int(side * max(width, height) / min(width, height))
            return (side, longer) if width <= height else (longer, side)
        case (box_width, box_height) if recipe.pad:
            ratio = max(width / box_width, height / box_height)
            # timm refuses an image that is so thin that one side would be rounded to 0.
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        case squashed:
            return squashed


def _span(length: int, resized: int, size: int, centre: Centre) -> Span:
    if resized < size:
        missing = size - resized
        before = missing // 2 if centre is Centre.TORCHVISION else (missing + 1) // 2
        return Span(length, resized, 0, resized, before)
    extra = resized - size
    # `round` as torchvision spells it: halves go to the even neighbour.
    skipped = round(extra / 2.0) if centre is Centre.TORCHVISION else extra // 2
    return Span(length, resized, skipped, size)


def shrink(width: int, height: int, recipe: Recipe) -> int:
    """Return the power of two (1, 2, 4, 8) by which a JPEG of this displayed size may be scaled
    while it is decoded.

    The short side stays at least twice the length it is resized to, and with a box both sides do.
    So the filter still decides: scaling to just above the target costs a point of top-1
    (docs/performance.md). Without resizing there is nothing to scale, and `nearest` picks pixels
    that scaling would blend.
    """
    if recipe.resize is None or recipe.interpolation is Interpolation.NEAREST:
        return 1
    to_width, to_height = resized(width, height, recipe)
    times = min(width // to_width, height // to_height)
    return next((factor for factor in (8, 4, 2) if times >= factor * 2), 1)


def region(crop: Crop, recipe: Recipe, scale: int = 1) -> tuple[int, int, int, int]:
    """Return the pixels of the displayed image that the crop needs: left, top, right, bottom, with
    the margin that the filter reaches into. `scale` is by how much the image was scaled down when
    it was decoded.
    """
    left, right = _reach(crop.x, recipe, scale)
    top, bottom = _reach(crop.y, recipe, scale)
    return left, top, right, bottom


def _reach(span: Span, recipe: Recipe, scale: int) -> tuple[int, int]:
    start, stop, length = span.start / scale, span.stop / scale, -(-span.length // scale)
    shrinking = max(1.0, (stop - start) / span.count)
    margin = _SUPPORT[recipe.interpolation] * shrinking + 2 if recipe.resize is not None else 0
    return max(0, math.floor(start - margin)), min(length, math.ceil(stop + margin))


def turned_region(
    box: tuple[int, int, int, int], orientation: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """Translate a box of the displayed image, of this displayed size, into the stored one."""
    left, top, right, bottom = box
    if orientation in _MIRRORED:
        left, right = width - right, width - left
    if orientation in _UPSIDE_DOWN:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


_MAX_RESIZED = 2**31 - 1
"""Pixels of one side, of Pillow's and our resampling."""
_MAX_NATIVE = 2**24
"""Pixels of one side, of our resampling: float32 counts no further."""
NATIVE = resample_part is not None
"""Whether the vectorised resampler was built."""


def resample(
    pixels: NDArray[np.uint8],
    crop: Crop,
    recipe: Recipe,
    out: NDArray[np.uint8],
    *,
    left: int = 0,
    top: int = 0,
    scale: int = 1,
) -> None:
    """Resample the crop of a displayed image into `out`.

    Args:
        pixels: RGB, uint8 (H, W, 3): the displayed image, or a part of it.
        crop: as `locate` found it for the whole image at full size.
        out: uint8 (height, width, 3); written in full, the border included.
        left, top: where in the whole image the pixels begin, pixels of the image.
        scale: by how much the image was scaled down when it was decoded.

    Raises:
        BadImage: the whole image would be longer than Pillow's largest one.
    """
    x, y = crop.x, crop.y
    if (x.count, y.count) != (recipe.width, recipe.height):
        out[:] = _rgb(recipe.fill)  # the border
        out = out[y.first : y.first + y.count, x.first : x.first + x.count]
    if recipe.resize is None:
        column, row = x.skipped - left, y.skipped - top
        out[:] = pixels[row : row + y.count, column : column + x.count]
    elif recipe.interpolation is Interpolation.NEAREST:
        out[:] = pixels[np.ix_(_nearest(y) - top, _nearest(x) - left)]
    elif (longest := max(x.resized, y.resized)) > _MAX_RESIZED:
        raise BadImage(Status.UNSUPPORTED, f"it would be resized to {longest:,} pixels")
    elif NATIVE and max(x.length, y.length) < _MAX_NATIVE:
        if pixels.strides[1:] != (3, 1):  # turned
            pixels = np.ascontiguousarray(pixels)
        goal = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
        across = (x.length / scale, x.resized, x.skipped, left)
        down = (y.length / scale, y.resized, y.skipped, top)
        resample_part(pixels, across, down, recipe.interpolation, _down_first(crop), goal)
        if goal is not out:
            out[:] = goal
    else:
        height, width = pixels.shape[:2]
        box = (
            max(0.0, x.start / scale - left),
            max(0.0, y.start / scale - top),
            min(float(width), x.stop / scale - left),
            min(float(height), y.stop / scale - top),
        )
        out[:] = np.asarray(_resize(Image.fromarray(pixels), crop, recipe, box))


@functools.cache
def _rgb(colour: str) -> tuple[int, int, int]:
    """Return the three bytes of `#rrggbb`."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def _resize(
    image: Image.Image, crop: Crop, recipe: Recipe, box: tuple[float, float, float, float]
) -> Image.Image:
    """Return the box, resampled by Pillow along one axis after the other."""
    width, height = crop.x.count, crop.y.count
    kind = FILTERS[recipe.interpolation]
    across = (box[0], 0, box[2])
    if _down_first(crop):
        image = image.resize((image.width, height), kind, (0, box[1], image.width, box[3]))
        return image.resize((width, height), kind, (*across, height))
    image = image.resize((width, image.height), kind, (*across, image.height))
    return image.resize((width, height), kind, (0, box[1], width, box[3]))


def _down_first(crop: Crop) -> bool:
    """Return whether rows are resampled before columns, which decides how a fifth of the values are
    rounded.

    This is what Pillow 13 does if the whole image loses more than twice as many rows as columns.
    Asked to resample the crop alone, it would decide by the crop.
    """
    return crop.y.length - crop.y.resized > max(0, 2 * (crop.x.length - crop.x.resized))


def _nearest(span: Span) -> NDArray[np.intp]:
    """Which pixels of the source `nearest` picks, added up as Pillow does it: where two are equally
    near, its rounding decides.
    """
    first, step = span.skipped, span.length / span.resized
    if span.resized > _ADDED_UP:
        return ((np.arange(first, first + span.count) + 0.5) * step).astype(np.intp)
    steps = np.full(first + span.count, step)
    steps[0] = step / 2
    return np.add.accumulate(steps)[first:].astype(np.intp)


def turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return width and height of the displayed image for those of the stored one, or the other way
    round: turning swaps them, or it does not.
    """
    return (height, width) if orientation >= 5 else (width, height)


def turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn a stored image, uint8 (H, W, 3), into the displayed one as `TURNS` does; a view."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _MIRRORED:
        pixels = pixels[:, ::-1]
    if orientation in _UPSIDE_DOWN:
        pixels = pixels[::-1]
    return pixels
