"""Where a worker's time goes: a few sums, added to from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from imagemill.noteboard import Noteboard
from imagemill.records import Clock

T = TypeVar("T")


def total(clocks: Iterable[Clock]) -> Clock:
    """The sums of several clocks."""
    every = list(clocks)
    return Clock(*(sum(getattr(clock, name) for clock in every) for name in Clock.__slots__))


def bound_by(clock: Clock, seconds: float = 0.0, decoders: int = 0) -> str:
    """What bounded the time of a clock: `compute`, `write`, `read` or `decode`.

    The loop of a worker either waits for pictures, waits for the session, or writes; the largest of the three sums names it, and where it
    waited for pictures, the larger of reading and decoding does. But where decoding and computing share the cores, a session waits for
    pictures also because its own threads have taken the decoders' time: if these got less than half of it, computing was the bound.

    Args:
        clock: sums over all workers.
        seconds: in which they came about.
        decoders: cores that may decode at once and compute too; 0: the devices compute by themselves, or it is not known.
    """
    waits = {"compute": clock.compute, "write": clock.write, ("read" if clock.read > clock.decode else "decode"): clock.starved}
    bound = max(waits, key=lambda name: waits[name])
    return "compute" if bound == "decode" and clock.decode < decoders * seconds / 2 else bound


class Stopwatch:
    """Sums of seconds by name, and counts of pictures and rows.

    Args:
        board: where the launcher sees them; None: nowhere.
    """

    def __init__(self, board: Noteboard | None = None) -> None:
        self._lock = threading.Lock()
        self._board = board
        self._rows = 0
        self._seconds = {"read": 0.0, "decode": 0.0, "starved": 0.0, "compute": 0.0, "write": 0.0}
        self._pictures = 0
        self._begun = time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to one of the sums of `Clock`."""
        with self._lock:
            self._seconds[name] += seconds

    def picture(self, read_s: float, decode_s: float) -> None:
        """Count one picture and the time that reading and decoding it took."""
        with self._lock:
            self._seconds["read"] += read_s
            self._seconds["decode"] += decode_s
            self._pictures += 1

    def through(self, rows: int) -> None:
        """Count rows that have their answers."""
        self._rows += rows
        if self._board is not None:
            self._board.tell(self._rows, self.read())

    def timing(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Pass items on, adding to `name` the time that was spent waiting for each but the first: until then the way fills up."""
        iterator = iter(items)
        is_first = True
        while True:
            begun = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                if not is_first:
                    self.add(name, time.perf_counter() - begun)
                is_first = False
            yield item

    def elapsed(self) -> float:
        """Seconds since this watch was made."""
        return time.perf_counter() - self._begun

    def read(self) -> Clock:
        """The sums so far."""
        with self._lock:
            return Clock(**self._seconds, pictures=self._pictures)
