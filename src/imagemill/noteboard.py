"""Where each decoding thread notes the picture it is at, in memory that the launcher reads even after the worker has died.

One slot per thread: index of the picture (-1: none) and the monotonic clock when it began, in nanoseconds (0: not timed).
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass

SLOTS = 256
_SLOT = struct.Struct("<qq")
SIZE = SLOTS * _SLOT.size


@dataclass(frozen=True, slots=True)
class Note:
    """What one thread was at."""

    index: int
    since_ns: int


class Noteboard:
    """A view of the shared file `descriptor`, which holds `SIZE` bytes."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)

    def clear(self) -> None:
        """Empty every slot."""
        for slot in range(SLOTS):
            self.done(slot)

    def at(self, slot: int, index: int, *, timed: bool = True) -> None:
        """Note that thread `slot` begins the picture `index`."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, index, time.monotonic_ns() if timed else 0)

    def done(self, slot: int) -> None:
        """Note that thread `slot` is at no picture."""
        _SLOT.pack_into(self._memory, slot * _SLOT.size, -1, 0)

    def notes(self) -> list[Note]:
        """What the threads are at, or were when they died."""
        found = (Note(*_SLOT.unpack_from(self._memory, slot * _SLOT.size)) for slot in range(SLOTS))
        return [note for note in found if note.index >= 0]
