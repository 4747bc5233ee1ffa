"""Sums of where a worker's time goes, which any thread may add to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from msgspec.structs import astuple

from imagemill.pipeline.heartbeat import Heartbeat
from imagemill.records import Clock

T = TypeVar("T")

SHORT_S = 5.0
"""In less time than this, start-up and the last batch weigh too much to name a bottleneck."""


def total(clocks: Iterable[Clock]) -> Clock:
    """Return the sums of several clocks."""
    return Clock(*map(sum, zip(*map(astuple, clocks), strict=True)))


def bound_by(clock: Clock, seconds: float) -> str | None:
    """Return what bounded the time of a clock: `compute`, `write`, `read` or `decode`; None if
    `seconds` are too short to tell.

    It is decided by who waited for whom. The loop of a worker waits for images, waits for the
    session, or writes, and the longest of the three names the bottleneck. If the loop waited for
    images, reading or decoding took the longer time. But if the CPU decodes and computes, decoding
    may be slow only because the session takes the cores: then the stage that used more CPU time is
    the bottleneck. Only times of our own threads are compared, never the machine's, so other
    processes do not change the answer.

    Args:
        clock: sums over all workers.
        seconds: the time in which they were taken.
    """
    longest = max(clock.compute, clock.write, clock.starved)
    if seconds < SHORT_S or longest <= 0:
        return None
    if longest == clock.compute:
        return "compute"
    if longest == clock.write:
        return "write"
    # Decoding waits for nothing else, and reading waits as much for them.
    waiting_for_cores = max(0.0, clock.decode_wall - clock.decode)
    if clock.read - waiting_for_cores > clock.decode_wall:
        return "read"
    return "compute" if clock.session_cpu > clock.decode else "decode"


class Stopwatch:
    """Sums of seconds by name, and counts of images and rows.

    Args:
        heartbeat: publishes them to the launcher; None: nothing does.
        on_cpu: the session computes on the CPU, in threads of this process.
    """

    def __init__(self, heartbeat: Heartbeat | None = None, *, on_cpu: bool = False) -> None:
        self._lock = threading.Lock()
        self._heartbeat = heartbeat
        self._on_cpu = on_cpu
        self._process_begun: float | None = None
        self._loop_begun = self._loop_cpu = self._decoders_cpu = 0.0
        self._rows = 0
        names = "read decode starved compute write decode_wall device transfer".split()
        self._seconds = dict.fromkeys(names, 0.0)
        self._images = self._recomputed = 0

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to one of the sums of `Clock`."""
        with self._lock:
            self._seconds[name] += seconds

    def image(self, read_s: float, decode_s: float, decode_wall_s: float, cpu_s: float) -> None:
        """Count one image.

        Args:
            read_s: wall time of reading it.
            decode_s: CPU time of decoding it.
            decode_wall_s: wall time of decoding it.
            cpu_s: CPU time of its thread since the last image.
        """
        with self._lock:
            self._seconds["read"] += read_s
            self._seconds["decode"] += decode_s
            self._seconds["decode_wall"] += decode_wall_s
            self._decoders_cpu += cpu_s
            self._images += 1

    def recompute(self) -> None:
        """Count one image that overflowed fp16 and was computed again in fp32."""
        self._recomputed += 1

    def through(self, rows: int) -> None:
        """Count rows with an answer. Call it in the thread that runs the loop."""
        self._rows += rows
        self._loop_cpu = time.thread_time() - self._loop_begun
        if self._heartbeat is not None:
            self._heartbeat.publish(self._rows, self.read())

    def timing(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items, and add to `name` the time spent waiting for each but the first.

        The wait for the first item is excluded, because the pipeline fills up meanwhile.
        """
        iterator = iter(items)
        is_first = True
        if self._process_begun is None:  # excludes the time of compiling the model
            self._process_begun, self._loop_begun = time.process_time(), time.thread_time()
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

    def read(self) -> Clock:
        """Return the sums so far."""
        with self._lock:
            session_cpu = 0.0
            if self._on_cpu and self._process_begun is not None:
                # The CPU time of this process that no other thread of ours has used.
                session_cpu = max(
                    0.0,
                    time.process_time() - self._process_begun - self._decoders_cpu - self._loop_cpu,
                )
            return Clock(
                **self._seconds,
                session_cpu=session_cpu,
                images=self._images,
                recomputed=self._recomputed,
            )
