"""The feed: pictures in plan order become batches, decoded by threads, ahead of the session but never far."""

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

from imagemill.images.decode import decode
from imagemill.images.isolated import IsolatedDecoder
from imagemill.noteboard import Noteboard
from imagemill.records import BadPicture, Batch, Card, Decoded, Limits, Picture, Row, Status
from imagemill.stopwatch import Stopwatch

_log = logging.getLogger(__name__)

SUSPECTED_READ = "hung_read"
"""A suspect whose very reading hung twice: it is not touched again."""


class Feed:
    """Decodes pictures on `workers` threads and packs them into batches of fixed size.

    Args:
        card: its recipe says what a pixel array is.
        limits: budgets of one picture.
        batch_size: places in a batch.
        workers: decoding threads, at most the slots of a noteboard.
        board: where the threads note what they are at; None: nowhere.
        clock: told what reading and decoding took.
    """

    def __init__(self, card: Card, limits: Limits, batch_size: int, workers: int, board: Noteboard | None, clock: Stopwatch) -> None:
        self._recipe = card.recipe
        self._limits = limits
        self._batch_size = batch_size
        self._ahead = 2 * batch_size + 2 * workers
        self._board = board
        self._clock = clock
        self._slots = itertools.count()
        self._thread = threading.local()
        self._pool = ThreadPoolExecutor(workers, "decode", initializer=self._take_slot)
        self._isolated: IsolatedDecoder | None = None
        self._isolated_lock = threading.Lock()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._isolated is not None:
            self._isolated.close()

    def batches(self, pictures: Iterable[Picture]) -> Iterator[Batch]:
        """Yield batches in plan order; each picture is one row of one batch. The last batch may be part filled.

        Reads ahead of what it yields by two batches and two pictures a thread, whatever the number of pictures.
        """
        window: deque[tuple[Picture, Future[Decoded]]] = deque()
        coming = iter(pictures)
        pixels = self._empty()
        rows: list[Row] = []
        filled = 0
        while True:
            for picture in itertools.islice(coming, self._ahead - len(window)):
                window.append((picture, self._pool.submit(self._decode, picture)))
            if not window:
                break
            picture, future = window.popleft()
            decoded = future.result()
            slot = -1
            if decoded.pixels is not None:
                pixels[filled] = decoded.pixels
                slot, filled = filled, filled + 1
            path = picture.path.decode("utf-8", "backslashreplace")
            size = (decoded.width, decoded.height)
            rows.append(Row(picture.index, picture.shard, picture.source, path, decoded.status, decoded.error, *size, slot))
            if filled == self._batch_size or len(rows) >= 16 * self._batch_size:
                if self._board is not None:
                    self._board.beat()
                yield Batch(pixels, filled, tuple(rows))
                pixels, rows, filled = self._empty(), [], 0
        if rows:
            yield Batch(pixels, filled, tuple(rows))

    def _empty(self) -> np.ndarray:
        return np.zeros((self._batch_size, self._recipe.size, self._recipe.size, 3), np.uint8)

    def _take_slot(self) -> None:
        self._thread.slot = next(self._slots)

    def _decode(self, picture: Picture) -> Decoded:
        """One picture on a decoding thread: never raises for the picture's own faults."""
        if picture.suspect == SUSPECTED_READ:
            return Decoded(None, Status.TIMEOUT, f"reading or decoding it took more than --max-seconds {self._limits.max_seconds:g}, twice")
        slot = self._thread.slot
        if self._board is not None:
            self._board.at(slot, picture.index)
        begun = fetched = time.perf_counter()
        decoding = time.thread_time()
        try:
            data = picture.fetch()
            fetched, decoding = time.perf_counter(), time.thread_time()
            if 0 <= picture.size != len(data):
                _log.warning("%r changed since it was listed: %d bytes, now %d", picture.path, picture.size, len(data))
            if picture.suspect is not None:
                if self._board is not None:
                    self._board.at(slot, picture.index, timed=False)  # the disposable process has a clock of its own
                return self._decode_alone(data, picture.suspect)
            return decode(data, self._recipe, self._limits)
        except BadPicture as bad:
            return Decoded(None, bad.status, bad.error, bad.width, bad.height)
        finally:
            if self._board is not None:
                self._board.done(slot)
            self._clock.picture(fetched - begun, time.thread_time() - decoding)

    def _decode_alone(self, data: bytes, why: str) -> Decoded:
        with self._isolated_lock:
            if self._isolated is None:
                self._isolated = IsolatedDecoder()
            return self._isolated.decode(data, self._recipe, self._limits, why)
