"""An image that a caller gives to a classifier, and its encoded bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from PIL import Image

from imagemill.errors import UsageError
from imagemill.pipeline.decoding import pillow, preprocess
from imagemill.pipeline.decoding.refusals import check_budget, judge, one_line
from imagemill.pipeline.sources.files import read_file
from imagemill.records import BadImage, Limits, Recipe, Status

if TYPE_CHECKING:
    from typing import Protocol

    from numpy.typing import NDArray

    class BinaryFile(Protocol):
        """Any object whose `read` returns bytes."""

        def read(self, size: int, /) -> bytes | bytearray | memoryview | None:
            """Return up to `size` bytes, none at the end."""
            ...


Item: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile | NDArray[np.uint8] |"
    " Image.Image"
)
"""An image: a path, encoded bytes, a binary file, a Pillow image, or pixels, uint8 (H, W, 3), RGB,
or (H, W), grey.
"""
_PIXELS: Final = "Give uint8 (H, W, 3), RGB, or (H, W), grey, or a Pillow image"
_BAD: Final = "imagemill_bad"
"""Attribute that marks a Pillow image as undecodable: its next `load` may silently succeed with
wrong pixels.
"""
_CHUNK: Final = 2**20
"""Bytes per read of a binary file: some files allocate a buffer of the requested size even if they
are short.
"""


def several(items: Any) -> Iterable[Any]:
    """Return items, a single one in a list. Files, arrays and strings are iterable, but single
    items.
    """
    single = isinstance(items, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    single = single or callable(getattr(items, "read", None))
    single = single or (isinstance(items, np.ndarray) and items.ndim != 4)
    return [items] if single or not isinstance(items, Iterable) else items


def check_type(number: int, item: Any) -> None:
    """Raise UsageError if an item cannot be an image."""
    if isinstance(item, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return
    if isinstance(item, np.ndarray):
        colour = item.ndim == 3 and item.shape[2] == 3
        if item.dtype != np.uint8 or not (colour or item.ndim == 2):
            raise UsageError(f"item {number} is an array of {item.dtype} {item.shape}. {_PIXELS}.")
    elif isinstance(item, io.TextIOBase):
        raise UsageError(f'item {number} is a file opened in text mode. Open it with mode "rb".')
    elif not callable(getattr(item, "read", None)):
        raise UsageError(
            f"item {number} is of type {type(item).__name__}. Give a path, encoded bytes, a binary"
            " file, or pixels."
        )


def fetcher(number: int, item: Any, recipe: Recipe, limits: Limits) -> Callable[[], bytes]:
    """Return a function that returns the encoded bytes of an item. Raises: UsageError."""
    if isinstance(item, str | os.PathLike):
        return partial(_read_path, os.fspath(item), limits.max_bytes)
    check_type(number, item)
    try:
        return partial(bytes, _encoded(number, item, recipe, limits))
    except BadImage as bad:
        return partial(_refuse, bad.status, bad.error, bad.width, bad.height)


def _encoded(number: int, item: Any, recipe: Recipe, limits: Limits) -> bytes:
    """Return the encoded bytes of an item that is not a path. Pixels become PPM, so that they are
    prepared like every image. Raises: BadImage, UsageError.
    """
    if isinstance(item, bytes | bytearray | memoryview):
        return _read_buffer(item, limits.max_bytes)
    if isinstance(item, Image.Image):
        return _read_image(item, recipe, limits)
    if isinstance(item, np.ndarray):
        height, width = item.shape[:2]
        _check_size(width, height, limits)
        return _ppm(np.asarray(item))  # of a masked array, the values under its mask
    return _read_binary(number, item, limits.max_bytes)


def _refuse(status: Status, error: str, width: int | None, height: int | None) -> bytes:
    raise BadImage(status, error, width, height)


def _read_path(path: str | bytes, max_bytes: int) -> bytes:
    try:
        return _read_buffer(read_file(os.fsencode(path), max_bytes), max_bytes)
    except BadImage as bad:
        if bad.status is Status.MISSING:
            is_url = "://" in os.fsdecode(path)
            why = "is a URL: download it, and give its bytes" if is_url else "there is no such file"
            raise BadImage(Status.MISSING, why) from bad
        raise
    except ValueError as error:
        cannot_encode = isinstance(error, UnicodeEncodeError)
        why = "cannot be encoded" if cannot_encode else "holds a null character"
        raise BadImage(Status.MISSING, f"there can be no such file: its name {why}") from error


def _read_buffer(data: bytes | bytearray | memoryview, max_bytes: int) -> bytes:
    try:
        size = memoryview(data).nbytes
        if size > max_bytes:
            raise BadImage(Status.TOO_LARGE, f"has {size} bytes, more than --max-bytes {max_bytes}")
        return bytes(data)
    except ValueError as error:  # a memoryview that was released
        raise BadImage(Status.READ_ERROR, _why(error)) from error


def _why(error: Exception) -> str:
    return f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"


def _read_binary(number: int, file: BinaryFile, max_bytes: int) -> bytes:
    """Read a file from its position to its end, but at most one byte more than allowed."""
    chunks: list[bytes] = []
    left = max_bytes + 1
    while left > 0:
        try:
            chunk = file.read(min(left, _CHUNK))
        except Exception as error:  # a file of any make may raise anything
            raise BadImage(Status.READ_ERROR, _why(error)) from error
        if chunk is None:
            raise BadImage(
                Status.READ_ERROR, "cannot be read: it is in non-blocking mode and has no data yet"
            )
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise UsageError(
                f"item {number} is a file whose read() returned {type(chunk).__name__}, not bytes."
                " Open it in binary mode."
            )
        if not chunk:
            return b"".join(chunks)
        chunks.append(bytes(chunk))
        left -= len(chunks[-1])
    raise BadImage(Status.TOO_LARGE, f"has more than --max-bytes {max_bytes} bytes")


def _read_image(image: Image.Image, recipe: Recipe, limits: Limits) -> bytes:
    """Encode what a Pillow image displays. Raises: BadImage."""
    _check_size(*image.size, limits)
    bad: tuple[Status, str] | None = vars(image).get(_BAD)
    if bad is None:
        try:
            pillow.prepare()
            image.load()
            orientation = pillow.orientation_of(image) if recipe.exif else 1
            return _encode_image(
                image.transpose(preprocess.TURNS[orientation]) if orientation > 1 else image,
                keep_alpha=recipe.background is not None,
            )
        except MemoryError:
            bad = (Status.TOO_LARGE, "not enough memory to decode it")
        except Exception as error:  # plugins raise anything at all on damaged files
            if "closed" in str(error) or getattr(error, "strerror", None):
                bad = (Status.READ_ERROR, _why(error))
            else:
                bad = vars(image)[_BAD] = (judge(error, b""), one_line(error))
    # Pillow has turned a TIFF's size already.
    orientation = 1 if image.format == "TIFF" or not recipe.exif else pillow.orientation_of(image)
    raise BadImage(*bad, *preprocess.turned_size(*image.size, orientation))


def _encode_image(image: Image.Image, *, keep_alpha: bool) -> bytes:
    """Encode a loaded image so that decoding it gives what a PNG of it gives. PNG has no 32-bit
    numbers, so these become a TIFF. Without `keep_alpha` transparency is dropped, as decoding would
    do, and the image need not be compressed.
    """
    if image.mode in {"I", "F"}:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, "TIFF")
        return buffer.getvalue()
    if image.mode.startswith("I;16") and not (keep_alpha and image.has_transparency_data):
        return _ppm((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"La", "RGBa"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if keep_alpha and image.has_transparency_data:
        buffer = io.BytesIO()
        shown = image.convert("RGBA") if image.mode == "PA" else image  # PNG has no such mode
        shown.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    return _ppm(np.asarray(image.convert("L" if image.mode in {"1", "L"} else "RGB")))


def _check_size(width: int, height: int, limits: Limits) -> None:
    if not width or not height:
        raise BadImage(Status.EMPTY, f"it has no pixels: {width}×{height}", width, height)
    check_budget(width, height, limits)


def _ppm(pixels: NDArray[np.uint8]) -> bytes:
    height, width = pixels.shape[:2]
    return b"P%d %d %d 255\n" % (6 if pixels.ndim == 3 else 5, width, height) + pixels.tobytes()
