"""The feed: threads decode images, which become batches in plan order.

It runs ahead of the session, within a limit.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from imagemill.pipeline.decoding.decode import decode, decode_into
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.pipeline.heartbeat import Heartbeat
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    BadImage,
    Batch,
    Decoded,
    IsolationReason,
    Limits,
    PlannedImage,
    Recipe,
    Row,
    Status,
)

_log = logging.getLogger(__name__)


class Feed:
    """Decodes images on `workers` threads and packs them into batches of fixed size.

    Args:
        recipe: defines the pixels.
        limits: budgets of one image.
        batch_size: places in a batch.
        workers: decoding threads, at most `heartbeat.SLOTS`.
        heartbeat: where the threads mark the images they work on; None: nowhere.
        clock: receives the times of reading and decoding.
    """

    def __init__(
        self,
        recipe: Recipe,
        limits: Limits,
        batch_size: int,
        workers: int,
        heartbeat: Heartbeat | None,
        clock: Stopwatch,
    ) -> None:
        self._recipe = recipe
        self._limits = limits
        self._batch_size = batch_size
        self._ahead = 2 * batch_size + 2 * workers
        self._heartbeat = heartbeat
        self._clock = clock
        self._slots = itertools.count()
        self._thread = threading.local()
        self._pool = ThreadPoolExecutor(workers, "decode", initializer=self._take_slot)
        self._isolated: IsolatedDecoder | None = None
        self._isolated_lock = threading.Lock()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._isolated is not None:
            self._isolated.close()

    def batches(self, images: Iterable[PlannedImage]) -> Iterator[Batch]:
        """Yield batches in plan order; each image is one row of one batch. The last batch may be
        part filled.

        Reads ahead of what it yields by two batches and two images a thread, whatever the number of
        images.
        """
        window: deque[tuple[PlannedImage, Future[Decoded], NDArray[np.uint8] | None]] = deque()
        places = _Places(self._batch_size, self._recipe.height, self._recipe.width)
        coming = iter(images)
        rows: list[Row] = []
        while True:
            for image in itertools.islice(coming, self._ahead - len(window)):
                out = places.take(len(window))
                window.append((image, self._pool.submit(self._decode, image, out), out))
            if not window:
                break
            image, future, out = window.popleft()
            decoded = future.result()
            slot = places.settle(decoded.pixels, out)
            path = image.path.decode("utf-8", "backslashreplace")
            size = (decoded.width, decoded.height)
            rows.append(
                Row(
                    image.index,
                    image.shard,
                    image.source,
                    path,
                    decoded.status,
                    decoded.error,
                    *size,
                    slot,
                )
            )
            if places.filled == self._batch_size or len(rows) >= 16 * self._batch_size:
                if self._heartbeat is not None:
                    self._heartbeat.mark_batch()
                yield Batch(*places.batch(), tuple(rows))
                rows = []
        if rows:
            yield Batch(*places.batch(), tuple(rows))

    def _take_slot(self) -> None:
        self._thread.slot = next(self._slots)

    def _decode(self, image: PlannedImage, out: NDArray[np.uint8] | None) -> Decoded:
        """Decode one image on a decoding thread, into `out` or a new array.

        Faults of the image are part of the result, never raised.
        """
        if image.isolation is IsolationReason.HUNG_READ:
            return Decoded(
                None,
                Status.TIMEOUT,
                f"reading or decoding it took more than --max-seconds {self._limits.max_seconds:g},"
                " twice",
            )
        slot = self._thread.slot
        if self._heartbeat is not None:
            self._heartbeat.mark_image(slot, image.index)
        begun, cpu_begun = time.perf_counter(), time.thread_time()
        fetched = None
        try:
            data = image.fetch()
            fetched = time.perf_counter(), time.thread_time()
            if 0 <= image.size != len(data):
                _log.warning(
                    "%r changed since it was listed: %d bytes, now %d",
                    image.path,
                    image.size,
                    len(data),
                )
            if image.isolation is not None:
                if self._heartbeat is not None:
                    # `IsolatedDecoder` keeps the time limit itself.
                    self._heartbeat.mark_image(slot, image.index, timed=False)
                return self._decode_isolated(data, image.isolation)
            return (
                decode(data, self._recipe, self._limits)
                if out is None
                else decode_into(data, self._recipe, self._limits, out)
            )
        except BadImage as bad:
            return Decoded(None, bad.status, bad.error, bad.width, bad.height)
        finally:
            if self._heartbeat is not None:
                self._heartbeat.clear_image(slot)
            ended, cpu_ended = time.perf_counter(), time.thread_time()
            read, decoding = fetched or (ended, cpu_ended)  # reading failed, which took time too
            self._clock.image(
                read - begun, cpu_ended - decoding, ended - read, cpu_ended - cpu_begun
            )

    def _decode_isolated(self, data: bytes, reason: IsolationReason) -> Decoded:
        with self._isolated_lock:
            if self._isolated is None:
                self._isolated = IsolatedDecoder()
            return self._isolated.decode(data, self._recipe, self._limits, reason)


class _Places:
    """Where images go: straight into the batch that each will be in if none before it fails.

    An image that fails takes no place. Those behind it that are being decoded are then one place
    too far, and are copied to where they belong, which is always a place that nobody writes to: it
    was theirs who came before, and these are settled. New ones get no place until the last of them
    is settled.

    Args:
        batch_size: places in a batch.
        height, width: of an image, pixels.
    """

    def __init__(self, batch_size: int, height: int, width: int) -> None:
        self._size = batch_size
        self._shape = (batch_size, height, width, 3)
        self._batches: deque[NDArray[np.uint8]] = deque()
        self._taken = 0
        self._astray = False
        self.filled = 0
        """Places of the first batch that are settled."""

    def take(self, before: int) -> NDArray[np.uint8] | None:
        """Give the next image a place, uint8 (height, width, 3), or None: it needs its own array.
        `before` others are not settled yet.
        """
        if self._astray:
            return None
        self._taken += 1
        batch, place = divmod(self.filled + before, self._size)
        out: NDArray[np.uint8] = self._batch(batch)[place]
        return out

    def settle(self, pixels: NDArray[np.uint8] | None, out: NDArray[np.uint8] | None) -> int:
        """Settle the image that was begun first.

        Args:
            pixels: its own; None: it failed.
            out: what `take` gave it.

        Returns:
            its slot in the first batch; -1: it has none.
        """
        slot = -1
        if pixels is not None:
            slot, self.filled = self.filled, self.filled + 1
            if self._astray or pixels is not out:
                self._batch(0)[slot] = pixels
        if out is not None:
            self._taken -= 1
        self._astray = (self._astray or pixels is None) and self._taken > 0
        return slot

    def batch(self) -> tuple[NDArray[np.uint8], int]:
        """Take the first batch away: its pixels, and how many of its places are filled."""
        pixels, filled = self._batch(0), self.filled
        if filled == self._size:
            self._batches.popleft()
        else:  # images that are being decoded may have places in any of these: they go elsewhere
            self._batches.clear()
            self._astray = self._taken > 0
        self.filled = 0
        return pixels, filled

    def _batch(self, number: int) -> NDArray[np.uint8]:
        while len(self._batches) <= number:
            self._batches.append(np.zeros(self._shape, np.uint8))
        return self._batches[number]
