"""A status block that a worker shares with its supervisor, readable even after the worker has died.

- One slot per decoding thread: the index of its image (-1: none) and the monotonic clock when it
  began, in nanoseconds (0: no time limit).
- The number of batches that the feed has passed on. If it stands still while no thread decodes, the
  session hangs.
- How far the worker is: rows with an answer, and the sums of its stopwatch.

Each value is an aligned 64-bit word, written by one store. A slot's words are written in an order
that never shows an image with the clock of another. A reader may see other words of two different
batches; only the display uses them.
"""

from __future__ import annotations

import mmap
import time
from typing import IO

from msgspec import Struct

from imagemill.records import Clock
from imagemill.system import files

SLOTS = 256
_SUMS = ("read", "decode", "starved", "compute", "write", "decode_wall", "session_cpu")
_BATCHES = 2 * SLOTS
_ROWS = _BATCHES + 1
_CLOCK = _ROWS + 1
SIZE = 8 * (_CLOCK + len(_SUMS) + 1)


def shared_file() -> IO[bytes]:
    """Return an open file of `SIZE` bytes, in memory if the system can.

    On a full disk a write to a mapped file would kill the process (SIGBUS).
    """
    file = files.in_memory("imagemill-heartbeat")
    file.write(bytes(SIZE))
    file.flush()
    return file


class ActiveImage(Struct, frozen=True):
    """An image that a decoding thread is working on."""

    index: int
    since_ns: int
    """Monotonic clock when it began; 0: no time limit."""


class Heartbeat:
    """The status block in the shared file `descriptor`, which holds `SIZE` bytes; -1: in memory
    that nobody shares.
    """

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, SIZE)).cast("q")

    def reset(self) -> None:
        """Clear every slot."""
        for slot in range(SLOTS):
            self.clear_image(slot)

    def mark_image(self, slot: int, index: int, *, timed: bool = True) -> None:
        """Mark that thread `slot` begins the image `index`."""
        self._words[2 * slot + 1] = 0
        self._words[2 * slot] = index
        if timed:
            self._words[2 * slot + 1] = time.monotonic_ns()

    def clear_image(self, slot: int) -> None:
        """Mark that thread `slot` works on no image."""
        self._words[2 * slot + 1] = 0
        self._words[2 * slot] = -1

    def active_images(self) -> list[ActiveImage]:
        """Return the images that the threads work on, or worked on when they died."""
        words = self._words
        found = (ActiveImage(words[2 * slot], words[2 * slot + 1]) for slot in range(SLOTS))
        return [image for image in found if image.index >= 0]

    def mark_batch(self) -> None:
        """Count one more batch that is passed on."""
        self._words[_BATCHES] += 1

    @property
    def batches(self) -> int:
        """Number of batches that were passed on."""
        return self._words[_BATCHES]

    def publish(self, rows: int, clock: Clock) -> None:
        """Show the launcher how many rows have an answer, and where the time went."""
        for place, name in enumerate(_SUMS, _CLOCK):
            self._words[place] = int(1e9 * getattr(clock, name))
        self._words[_CLOCK + len(_SUMS)] = clock.images
        self._words[_ROWS] = rows

    @property
    def rows(self) -> int:
        """Number of rows with an answer, committed or not."""
        return self._words[_ROWS]

    @property
    def clock(self) -> Clock:
        """Where the time went so far."""
        sums = {name: self._words[place] / 1e9 for place, name in enumerate(_SUMS, _CLOCK)}
        return Clock(**sums, images=self._words[_CLOCK + len(_SUMS)], recomputed=0)
