"""The feed: threads decode images, which become batches in plan order.

It runs ahead of the session, within a limit.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.decoding.isolated import IsolatedDecoder
from imagemill.pipeline.heartbeat import SLOTS, Heartbeat
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

    The threads share one queue, and each takes the next image as soon as it can. So a slow image
    holds up no other, and each thread of a slow source has a request in flight. A caller that asks
    for a batch sleeps until its last image is decoded, instead of waking for each one.

    Args:
        recipe: defines the pixels.
        limits: budgets of one image.
        batch_size: places in a batch.
        workers: decoding threads; `heartbeat.SLOTS` if there are more.
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
        workers = min(workers, SLOTS)
        self._recipe = recipe
        self._batch_size = batch_size
        self._ahead = 2 * batch_size + 2 * workers
        self._heartbeat = heartbeat or Heartbeat(-1)
        self._decoders = _Decoders(recipe, limits, self._heartbeat, clock)
        threads = [
            threading.Thread(target=self._decoders.run, args=(slot,), name="decode", daemon=True)
            for slot in range(workers)
        ]
        # Also if nobody closes the feed, which the threads do not know; at the latest at exit.
        self._end = weakref.finalize(self, self._decoders.end, threads)
        for thread in threads:
            thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._decoders.isolated.close()

    def batches(self, images: Iterable[PlannedImage]) -> Iterator[Batch]:
        """Yield batches in plan order; each image is one row of one batch. The last batch may be
        part filled.

        Reads ahead of what it yields by two batches and two images a thread, whatever the number of
        images.

        Raises:
            RuntimeError: the feed is closed.
        """
        window: deque[_Task] = deque()
        places = _Places(self._batch_size, self._recipe.height, self._recipe.width)
        coming = iter(images)
        wake: _Wake = SimpleQueue()
        rows: list[Row] = []
        while True:
            for image in itertools.islice(coming, self._ahead - len(window)):
                task = _Task(image, places.take(len(window)))
                window.append(task)
                self._decoders.add(task)
            if rows and (places.is_full or len(rows) >= 16 * self._batch_size or not window):
                self._heartbeat.mark_batch()
                yield Batch(*places.batch(), tuple(rows))
                rows = []
            if not window:
                return
            wanted = min(self._batch_size - places.filled, 16 * self._batch_size - len(rows))
            tasks = [window.popleft() for _ in range(min(wanted, len(window)))]
            tasks[-1].result(wake)  # all of them are needed, and it is probably the last one
            for task in tasks:
                image, decoded = task.image, task.result(wake)
                slot = places.settle(decoded.pixels, task.out)
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
                        image.kept,
                    )
                )


_Wake: TypeAlias = "SimpleQueue[None]"


class _Task:
    """An image that a thread decodes or will decode."""

    __slots__ = ("decoded", "error", "image", "out", "wake")

    def __init__(self, image: PlannedImage, out: NDArray[np.uint8] | None) -> None:
        self.image = image
        self.out = out
        self.decoded: Decoded | None = None
        self.error: BaseException | None = None
        self.wake: _Wake | None = None

    def result(self, wake: _Wake) -> Decoded:
        """Wait for the decoded image. Raises: what stopped its thread from decoding it.

        Args:
            wake: where the decoding threads wake the caller.
        """
        if self.decoded is None:
            self.wake = wake
            while self.decoded is None:
                if self.error is not None:
                    raise self.error
                wake.get()  # perhaps late, for an earlier image
        return self.decoded


class _Decoders:
    """What the decoding threads of a feed share."""

    def __init__(
        self, recipe: Recipe, limits: Limits, heartbeat: Heartbeat, clock: Stopwatch
    ) -> None:
        self._recipe = recipe
        self._limits = limits
        self._heartbeat = heartbeat
        self._clock = clock
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._is_open = True
        self._cpu = [0.0] * SLOTS
        """CPU time of each thread up to the end of its last image."""
        self.isolated = IsolatedDecoder()

    def add(self, task: _Task) -> None:
        """Have a thread decode an image. Raises: RuntimeError after `end`."""
        self._tasks.put(task)
        self._check_open()  # last, because `end` in another thread may have missed this task

    def end(self, threads: list[threading.Thread]) -> None:
        """Let the threads end, each after the image that it works on, and wait for that."""
        self._is_open = False
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            # One of them may drop the last reference to a feed; one that cannot start is not alive.
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("the feed is closed")

    def run(self, slot: int) -> None:
        """Decode images until `end`. Faults of an image are part of the result."""
        while (task := self._tasks.get()) is not None:
            try:
                self._check_open()
                task.decoded = self._decode(slot, task.image, task.out)
            except BaseException as error:  # raised where the result is wanted
                task.error = error
            wake = task.wake
            del task  # else a waiting thread would keep a batch in memory
            if wake is not None:
                wake.put(None)

    def _decode(self, slot: int, image: PlannedImage, out: NDArray[np.uint8] | None) -> Decoded:
        """Read and decode one image, into `out` or a new array."""
        if image.isolation is IsolationReason.HUNG_READ:
            return Decoded(
                None,
                Status.TIMEOUT,
                f"reading or decoding it took more than --max-seconds {self._limits.max_seconds:g},"
                " twice",
            )
        self._heartbeat.mark_image(slot, image.index)
        begun, cpu_begun = time.perf_counter(), self._cpu[slot]
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
                # `IsolatedDecoder` keeps the time limit itself.
                self._heartbeat.mark_image(slot, image.index, timed=False)
                return self.isolated.decode(data, self._recipe, self._limits, image.isolation)
            return decode(data, self._recipe, self._limits, out)
        except BadImage as bad:
            return Decoded(None, bad.status, bad.error, bad.width, bad.height)
        finally:
            self._heartbeat.clear_image(slot)
            ended, cpu_ended = time.perf_counter(), time.thread_time()
            self._cpu[slot] = cpu_ended
            read, decoding = fetched or (ended, cpu_ended)  # reading failed, which took time too
            self._clock.image(
                read - begun, cpu_ended - decoding, ended - read, cpu_ended - cpu_begun
            )


class _Places:
    """Gives images places in batches, before they are decoded.

    Each image gets the place that it has if no image before it fails, and is decoded into it. If
    one fails, the images behind it that have a place already should each have an earlier one.
    `settle` copies them there. Nobody else writes to that place any more, because it was given to
    an earlier image, which is settled. Until the last of them is settled, new images get no place:
    they are decoded into arrays of their own, and copied, too.

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

    @property
    def is_full(self) -> bool:
        """Whether every place of the first batch is settled."""
        return self.filled == self._size

    def take(self, before: int) -> NDArray[np.uint8] | None:
        """Return a place for the next image, uint8 (height, width, 3); None: it needs an array of
        its own. `before` others are not settled yet.
        """
        if self._astray:
            return None
        self._taken += 1
        batch, place = divmod(self.filled + before, self._size)
        out: NDArray[np.uint8] = self._batch(batch)[place]
        return out

    def settle(self, pixels: NDArray[np.uint8] | None, out: NDArray[np.uint8] | None) -> int:
        """Put the earliest image that is not settled where it belongs.

        Args:
            pixels: the decoded image; None: it failed.
            out: what `take` returned for it.

        Returns:
            its slot in the first batch; -1 if it failed.
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
