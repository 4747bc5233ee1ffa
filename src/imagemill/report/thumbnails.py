"""Thumbnails of images, fetched and decoded again from where they lay: what the model saw of them,
as small JPEGs.

Nothing that an image or its source does harms the report: bytes are fetched by threads that may
hang, and decoded in a process that may die. All have one deadline; what is late, gone or broken has
a reason instead.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from imagemill.errors import ImagemillError
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import sources
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.records import BadImage, Status

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imagemill.report.figures import Told

SIDE = 160
"""Of a thumbnail, pixels at most."""
_QUALITIES = (78, 60, 40, 20)
_MOST_BYTES = 16_384
"""Of one thumbnail: ninety-six of them are 2 MB in base 64."""
_FETCHED_BYTES = 64 * 2**20
"""Of an image that is fetched for the sake of a thumbnail."""
_FETCHERS = 4
_DECODING_S = 5.0
SECONDS = 60.0
"""For all thumbnails together."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A JPEG, or why there is none."""

    jpeg: bytes = b""
    width: int = 0
    height: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Fetched:
    told: Told
    data: bytes = b""
    reason: str = ""
    resized: bool = False
    """Whether the image has another size than when it was listed."""


def make(
    job: OpenJob,
    images: Sequence[Told],
    seconds: float = SECONDS,
) -> dict[int, Thumbnail]:
    """Make a thumbnail of each of these images.

    Args:
        job: the job, whose recipe the images are prepared by.
        images: rows whose status is ok.
        seconds: for all of them.

    Returns:
        by index, one for every image.
    """
    made: dict[int, Thumbnail] = {}
    deadline = time.monotonic() + seconds
    limits = job.frozen.job.limits
    limits = replace(
        limits,
        max_bytes=min(limits.max_bytes, _FETCHED_BYTES),
        max_seconds=min(limits.max_seconds, _DECODING_S),
    )
    fetching = _Fetching(job, images, limits.max_bytes)
    with IsolatedDecoder() as decoder, contextlib.closing(fetching):
        while len(made) < len(images) and (fetched := fetching.next(deadline)):
            told = fetched.told
            if fetched.reason:
                made[told.index] = Thumbnail(reason=fetched.reason)
                continue
            try:
                decoded = decoder.decode(fetched.data, job.frozen.job.card.recipe, limits)
            except ImagemillError as error:
                made[told.index] = Thumbnail(reason=str(error))
                continue
            if decoded.pixels is None:
                made[told.index] = Thumbnail(reason=decoded.error or decoded.status)
            elif fetched.resized or (decoded.width, decoded.height) != (told.width, told.height):
                made[told.index] = Thumbnail(reason="the image has changed since it was classified")
            else:
                made[told.index] = encode(decoded.pixels)
    late = Thumbnail(reason=f"it could not be had within {seconds:g} s for all")
    return {told.index: made.get(told.index, late) for told in images}


def encode(pixels: NDArray[np.uint8]) -> Thumbnail:
    """A JPEG of at most `SIDE` by `SIDE` pixels. Args: pixels: uint8 (H, W, 3), RGB."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MOST_BYTES:
            break
    return Thumbnail(data, image.width, image.height)


class _Fetching:
    """Fetches images a few at a time, in threads that end with the process if their source never
    answers.
    """

    def __init__(self, job: OpenJob, images: Iterable[Told], max_bytes: int) -> None:
        frozen = job.frozen.job
        self._opened = sources.open_all(frozen.sources, aside=job.paths.plan, access=frozen.access)
        self._max_bytes = max_bytes
        self._wanted: queue.SimpleQueue[tuple[Told, plan.PlannedRow]] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[_Fetched] = queue.SimpleQueue()
        self._room = threading.Semaphore(_FETCHERS)
        self._closed = False
        rows = _planned(job, images)
        for told, row in rows:
            self._wanted.put((told, row))
        for _ in range(min(_FETCHERS, len(rows))):
            threading.Thread(target=self._work, daemon=True, name="thumbnail").start()

    def next(self, deadline: float) -> _Fetched | None:
        """Another image; None: the deadline is over."""
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
                told, row = self._wanted.get_nowait()
            except queue.Empty:
                self._room.release()
                return
            if self._closed:
                return
            self._fetched.put(self._fetch(told, row))

    def _fetch(self, told: Told, row: plan.PlannedRow) -> _Fetched:
        try:
            data = self._opened[row.source].fetch(row.path, row.locator, self._max_bytes)
        except BadImage as bad:
            return _Fetched(
                told,
                reason=(
                    f"{bad.status}: {bad.error}" if bad.status is not Status.MISSING else bad.error
                ),
            )
        except Exception as error:  # whatever it is, the report goes on without this image
            return _Fetched(told, reason=f"{type(error).__name__}: {error}")
        return _Fetched(told, data, resized=row.size >= 0 and len(data) != row.size)


def _planned(job: OpenJob, images: Iterable[Told]) -> list[tuple[Told, plan.PlannedRow]]:
    """Return images with their rows of the plan, which know them byte for byte."""
    by_shard: dict[int, list[Told]] = {}
    for told in images:
        by_shard.setdefault(told.shard, []).append(told)
    found = []
    for number, here in by_shard.items():
        shard = job.shards[number]
        rows = job.rows(shard)
        found += [(told, rows[told.index - shard.first]) for told in here]
    return found
