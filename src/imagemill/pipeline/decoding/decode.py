"""Encoded images → pixels, or the reason why not.

The contract:

- `decode` never raises for what is in an image: whatever its bytes, the answer is a `Decoded`, with
  pixels or with a status and one line.
- The answer depends on bytes, recipe and limits alone, bit for bit: not on the thread, the process
  or what was decoded before.
- Nothing is decoded whose header promises more than `max_pixels`, and no more than `max_bytes` are
  looked at.
- No other program is run and no file is opened, whatever the image asks for: formats that are
  scripts (EPS, WMF, PDF) are refused.
- Fast decoding does not change answers (docs/design.md). What simplejpeg refuses, even if
  recoverable, Pillow decides on, so that every error is Pillow's.

    bytes ─► jpeg (header) ─► ordinary: here, by simplejpeg ─┬─► preprocess (crop, resample)
                          └─► all else: pillow ──────────────┘   ─► pixels
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from imagemill.pipeline.decoding import pillow, preprocess
from imagemill.pipeline.decoding.jpeg import Header, read_header
from imagemill.pipeline.decoding.refusals import Seen, check_budget, judge, one_line
from imagemill.records import BadImage, Decoded, Limits, Recipe, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray


def decode(
    data: bytes,
    recipe: Recipe,
    limits: Limits,
    out: NDArray[np.uint8] | None = None,
    *,
    partial: bool = False,
) -> Decoded:
    """Decode and preprocess one image. Safe among threads; the heavy parts release the GIL.

    Args:
        data: the encoded image.
        recipe: how it becomes the model's input.
        limits: `max_pixels` and `max_bytes` are kept here; `max_seconds` is for those who can end a
            process.
        out: place for the pixels, uint8 (height, width, 3), any strides. Whether or not the image
            is ok, it may have been written to. None: a new array.
        partial: whether a truncated image is ok if Pillow can decode its beginning. Only for a
            process of its own, because Pillow's setting holds for all threads.

    Returns: `pixels` is `out`, or None with status and error; `width` and `height` are known as
    soon as the header can be read, even if the rest cannot.
    """
    if not data:
        return Decoded(None, Status.EMPTY, "the file is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        return Decoded(
            None,
            Status.TOO_LARGE,
            f"{len(data)} bytes are more than the budget of {limits.max_bytes} bytes per image",
        )
    if out is None:
        out = np.empty((recipe.height, recipe.width, 3), np.uint8)
    seen = Seen()
    try:
        pillow.prepare(partial=partial)
        jpeg = read_header(data) if data[:3] == b"\xff\xd8\xff" else None
        if jpeg is not None:
            seen.width, seen.height = preprocess.turned_size(
                jpeg.width, jpeg.height, jpeg.orientation if recipe.exif else 1
            )
            check_budget(jpeg.width, jpeg.height, limits)
        if jpeg is None or not jpeg.ordinary or not _decode_jpeg(data, jpeg, recipe, out):
            pillow.decode(data, recipe, limits, out, seen)
    except BadImage as bad:
        status, text, *_ = bad.args  # the first bytes of a file may hold spaces
        return Decoded(None, status, text, seen.width, seen.height)
    except MemoryError:
        return Decoded(
            None, Status.TOO_LARGE, "not enough memory to decode it", seen.width, seen.height
        )
    except Exception as error:  # plugins raise anything at all on damaged files
        return Decoded(None, judge(error, data), one_line(error), seen.width, seen.height)
    return Decoded(out, Status.OK, None, seen.width, seen.height)


def _decode_jpeg(data: bytes, jpeg: Header, recipe: Recipe, out: NDArray[np.uint8]) -> bool:
    """Decode with simplejpeg; False where it refuses, which leaves it to Pillow."""
    orientation = jpeg.orientation if recipe.exif else 1
    part = preprocess.needed(jpeg.width, jpeg.height, orientation, recipe, True)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=part.height, min_width=part.width, min_factor=part.scale
        )
    except MemoryError:
        raise
    except Exception:  # it raises ValueError and others; all of them mean: ask Pillow
        return False
    if pixels.shape != (part.height, part.width, 3):
        return False
    left, top, right, bottom = part.stored
    pixels = preprocess.turn(pixels[top:bottom, left:right], orientation)
    left, top, *_ = part.displayed
    preprocess.resample(pixels, part.crop, recipe, out, left=left, top=top, scale=part.scale)
    return True
