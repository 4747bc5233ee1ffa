"""Where each decoding thread notes the image it is at, in memory that the launcher reads even after
the worker has died.

A word of its own counts the batches that the feed has handed on: where it stands still while no
thread decodes, the session hangs. Others hold how far the worker is: rows that have their answers,
and the sums of its stopwatch. Each is stored on its own, so a reader may see words of two batches;
nothing but the display depends on them.
One slot per thread: index of the image (-1: none) and the monotonic clock when it began, in
nanoseconds (0: not timed). Both are stored as aligned 64-bit words, one store each, and in an order
in which a reader in between sees no image with another one's clock.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from typing import IO

from imagemill.records import Clock

SLOTS = 256
_SUMS = ("read", "decode", "starved", "compute", "write", "decode_wall", "session_cpu")
_PULSE = 2 * SLOTS
_ROWS = _PULSE + 1
_CLOCK = _ROWS + 1
SIZE = 8 * (_CLOCK + len(_SUMS) + 1)


def shared_file() -> IO[bytes]:
    """A file of `SIZE` bytes for a board, in memory where the system can: a full disk must not be
    met by a write to a mapping (SIGBUS).
    """
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("imagemill-noteboard"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(bytes(SIZE))
    file.flush()
    return file


@dataclass(frozen=True, slots=True)
class Note:
    """What one thread was at."""

    index: int
    since_ns: int


class Noteboard:
    """A view of the shared file `descriptor`, which holds `SIZE` bytes."""

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, SIZE)).cast("q")

    def clear(self) -> None:
        """Empty every slot."""
        for slot in range(SLOTS):
            self.done(slot)

    def at(self, slot: int, index: int, *, timed: bool = True) -> None:
        """Note that thread `slot` begins the image `index`."""
        self._words[2 * slot + 1] = 0
        self._words[2 * slot] = index
        if timed:
            self._words[2 * slot + 1] = time.monotonic_ns()

    def done(self, slot: int) -> None:
        """Note that thread `slot` is at no image."""
        self._words[2 * slot + 1] = 0
        self._words[2 * slot] = -1

    def beat(self) -> None:
        """Count one more batch that is handed on."""
        self._words[_PULSE] += 1

    @property
    def pulse(self) -> int:
        """How many batches were handed on."""
        return self._words[_PULSE]

    def tell(self, rows: int, clock: Clock) -> None:
        """Let the launcher see how many rows have their answers, and where the time went."""
        for place, name in enumerate(_SUMS, _CLOCK):
            self._words[place] = int(1e9 * getattr(clock, name))
        self._words[_CLOCK + len(_SUMS)] = clock.images
        self._words[_ROWS] = rows

    @property
    def rows(self) -> int:
        """How many rows have their answers, committed or not."""
        return self._words[_ROWS]

    @property
    def clock(self) -> Clock:
        """Where the time went so far."""
        sums = {name: self._words[place] / 1e9 for place, name in enumerate(_SUMS, _CLOCK)}
        return Clock(**sums, images=self._words[_CLOCK + len(_SUMS)])

    def notes(self) -> list[Note]:
        """What the threads are at, or were when they died."""
        found = (Note(self._words[2 * slot], self._words[2 * slot + 1]) for slot in range(SLOTS))
        return [note for note in found if note.index >= 0]
