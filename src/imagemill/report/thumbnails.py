"""Thumbnails: small WebP files of what the model saw of an image, fetched and decoded again.

No image and no source can harm the report: bytes are fetched by threads that may hang, and decoded
in a process that may die. All thumbnails share one deadline. An image that is late, missing or
damaged has a reason instead. Of a truncated image, the thumbnail shows what could be decoded.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from PIL import Image

from imagemill.errors import ImagemillError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import sources
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.records import BadImage, Limits, Status

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imagemill.report.figures import ImageRow

SIDE = 224
"""Longest side of a thumbnail, pixels."""
_QUALITIES = (50, 35, 20, 0)
"""At 50, a photograph takes about 5 kB: fewer than as a JPEG of 160 pixels at 78."""
_MAX_THUMBNAIL_BYTES = 16_384
"""136 thumbnails are then at most 3 MB in base 64."""
_MAX_IMAGE_BYTES = 64 * 2**20
_MAX_IMAGE_PIXELS = 2**30
"""Larger images have no thumbnail."""
_FETCHERS = 4
_MAX_DECODING_S = 5.0
SECONDS = 60.0
"""Time limit for all thumbnails together."""


class Thumbnail(Struct, frozen=True):
    """A WebP file, or the reason why there is none."""

    webp: bytes = b""
    width: int = 0
    height: int = 0
    reason: str = ""


class _Fetched(Struct, frozen=True):
    image: ImageRow
    data: bytes = b""
    reason: str = ""
    resized: bool = False
    """Whether the size of the file has changed since it was listed."""


def make(
    job: OpenJob,
    images: Sequence[ImageRow],
    seconds: float = SECONDS,
) -> dict[int, Thumbnail]:
    """Return a thumbnail of each of these images.

    Args:
        job: the job, whose recipe the images are prepared by.
        images: rows whose status is ok or truncated.
        seconds: time limit for all of them.

    Returns:
        one for every image, by index.
    """
    made: dict[int, Thumbnail] = {}
    deadline = time.monotonic() + seconds
    limits, recipe = job.frozen.job.limits, job.frozen.job.session.card.recipe
    limits = Limits(  # the images were within the job's, which may have been raised meanwhile
        max_pixels=max(limits.max_pixels, _MAX_IMAGE_PIXELS),
        max_bytes=_MAX_IMAGE_BYTES,
        max_seconds=min(limits.max_seconds, _MAX_DECODING_S),
    )
    fetching = _Fetching(job, images, limits.max_bytes)
    with IsolatedDecoder() as decoder, contextlib.closing(fetching):
        while len(made) < len(images) and (fetched := fetching.next(deadline)):
            image = fetched.image
            if fetched.reason:
                made[image.index] = Thumbnail(reason=fetched.reason)
                continue
            is_partial = image.status == Status.TRUNCATED
            try:
                decoded = decoder.decode(fetched.data, recipe, limits, partial=is_partial)
            except ImagemillError as error:
                made[image.index] = Thumbnail(reason=str(error))
                continue
            if decoded.pixels is None:
                made[image.index] = Thumbnail(reason=decoded.error or decoded.status)
            elif is_partial and (decoded.pixels == decoded.pixels[0, 0]).all():
                made[image.index] = Thumbnail(reason="nothing of it could be decoded")
            elif fetched.resized or (decoded.width, decoded.height) != (image.width, image.height):
                made[image.index] = Thumbnail(reason="the image changed after it was classified")
            else:
                made[image.index] = encode(decoded.pixels)
    late = Thumbnail(reason=f"not ready within {seconds:g} s for all thumbnails")
    return {image.index: made.get(image.index, late) for image in images}


def encode(pixels: NDArray[np.uint8]) -> Thumbnail:
    """Return a WebP file of at most `SIDE` by `SIDE` pixels.

    Args:
        pixels: uint8 (H, W, 3), RGB.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality)
        data = buffer.getvalue()
        if len(data) <= _MAX_THUMBNAIL_BYTES:
            break
    return Thumbnail(data, image.width, image.height)


class _Fetching:
    """Fetches images a few at a time, in daemon threads: if a source hangs, so does its thread
    only.
    """

    def __init__(self, job: OpenJob, images: Iterable[ImageRow], max_bytes: int) -> None:
        frozen = job.frozen.job
        self._opened = sources.open_all(
            frozen.sources, index_dir=job.paths.plan, access=frozen.access
        )
        self._max_bytes = max_bytes
        self._wanted: queue.SimpleQueue[tuple[ImageRow, plan.PlannedRow]] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[_Fetched] = queue.SimpleQueue()
        self._room = threading.Semaphore(_FETCHERS)
        self._closed = False
        rows = _planned(job, images)
        for image, row in rows:
            self._wanted.put((image, row))
        for _ in range(min(_FETCHERS, len(rows))):
            threading.Thread(target=self._work, daemon=True, name="thumbnail").start()

    def next(self, deadline: float) -> _Fetched | None:
        """Return another image; None after the deadline."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        try:
            fetched = self._fetched.get(timeout=left_s)
        except queue.Empty:
            return None
        self._room.release()
        return fetched

    def close(self) -> None:
        self._closed = True
        self._room.release(_FETCHERS)

    def _work(self) -> None:
        while True:
            self._room.acquire()
            try:
                image, row = self._wanted.get_nowait()
            except queue.Empty:
                self._room.release()
                return
            if self._closed:
                return
            self._fetched.put(self._fetch(image, row))

    def _fetch(self, image: ImageRow, row: plan.PlannedRow) -> _Fetched:
        try:
            data = self._opened[row.source].fetch(row.path, row.locator, self._max_bytes)
        except BadImage as bad:
            return _Fetched(
                image,
                reason=(
                    f"{bad.status}: {bad.error}" if bad.status is not Status.MISSING else bad.error
                ),
            )
        except Exception as error:  # of whatever kind, the report goes on without this image
            return _Fetched(image, reason=f"{type(error).__name__}: {error}")
        return _Fetched(image, data, resized=row.size >= 0 and len(data) != row.size)


def _planned(job: OpenJob, images: Iterable[ImageRow]) -> list[tuple[ImageRow, plan.PlannedRow]]:
    """Return images with their rows of the plan, which locate their bytes."""
    by_shard: dict[int, list[ImageRow]] = {}
    for image in images:
        by_shard.setdefault(image.shard, []).append(image)
    found = []
    for number, here in by_shard.items():
        shard = job.shards[number]
        rows = job.rows(shard)
        found += [(image, rows[image.index - shard.first]) for image in here]
    return found
