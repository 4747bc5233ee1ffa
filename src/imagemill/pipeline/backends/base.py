"""What a session is: one compiled model on one device, fed with batches and giving back outputs, in
order.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, MemoryTraffic, Outputs, Saved, SessionSpec

_log = logging.getLogger(__name__)


class Found(Struct, frozen=True):
    """The devices of one kind that a backend finds on this machine; returned by a session class's
    static method `found(kind)`.
    """

    devices: tuple[str, ...] = ()
    """What each is, for people, by id."""
    missing: str | None = None
    """Why none can be used: what is missing, and the line to type, in whole sentences; None:
    nothing is missing.
    """

    def lacking(self, missing: str | None) -> Found:
        """Return what was found, or nothing if a library is missing, too."""
        both = [text for text in (self.missing, missing) if text]
        return Found((), " ".join(both)) if both else self


class Session(Protocol):
    """One compiled model on one device; made from a `SessionSpec`, a device and a stopwatch.

    How many batches are in flight is the session's own business: it may take several before it
    gives the first back. A batch in which no place is filled is passed on without being computed.
    """

    versions: dict[str, str]
    """Of the libraries that decide the answers."""

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """Yield each batch with its outputs, in order; ends when the batches end and nothing is in
        flight.

        Args:
            batches: uint8 pixels, all of the shape that the model was compiled for.
        """
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


class QueuedSession:
    """A session that keeps several batches in flight, and yields them in order.

    A subclass starts batches and collects their outputs. What its `_start` returns is the batch's
    ticket.
    """

    _in_flight: int
    """Batches that may be started before the first one is collected."""
    _widths: Sequence[int]
    """Of the outputs, in the order of `_names`."""

    def __init__(self, spec: SessionSpec, clock: Stopwatch) -> None:
        self._clock = clock
        recipe = spec.card.recipe
        self._shape = (spec.batch_size, recipe.height, recipe.width, 3)
        self._names = names_of_outputs(spec)

    def _log_start(self, spec: SessionSpec, device: DeviceSpec) -> None:
        text = "compiled %s for %s: %d batches of %d in flight"
        _log.info(text, spec.model_file, device.name, self._in_flight, spec.batch_size)

    def _start(self, pixels: NDArray[np.uint8]) -> Any:
        """Start a batch, and return its ticket."""
        raise NotImplementedError

    def _collect(self, batch: Batch, ticket: Any) -> list[NDArray[np.float32]]:
        """Wait for a batch, and return its outputs: its own arrays, (filled, width) each."""
        raise NotImplementedError

    def memory_traffic(self) -> MemoryTraffic | None:
        """Return what the device's memory allows; None if it cannot be measured. Takes some 0.1 s
        and up to 512 MiB on the device. Nothing may be in flight.
        """
        return None

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """See `Session.stream`."""
        busy: deque[tuple[Batch, Any]] = deque()
        computing = 0
        try:
            for batch in batches:
                while computing == self._in_flight:
                    first, ticket = busy.popleft()
                    computing -= ticket is not None
                    yield self._finish(first, ticket)
                busy.append((batch, self._start(batch.pixels) if batch.filled else None))
                computing += batch.filled > 0
            while busy:
                yield self._finish(*busy.popleft())
        finally:
            for batch, ticket in busy:  # the stream was broken off
                if ticket is not None:
                    with contextlib.suppress(Exception):  # the first error is the one to raise
                        self._collect(batch, ticket)

    def _finish(self, batch: Batch, ticket: Any) -> tuple[Batch, Outputs]:
        if ticket is None:
            empty = (np.empty((0, width), np.float32) for width in self._widths)
            return batch, make_outputs(self._names, empty)
        begun = time.perf_counter()
        found = self._collect(batch, ticket)
        self._clock.add("compute", time.perf_counter() - begun)
        return batch, make_outputs(self._names, found)


def cannot_compile(spec: SessionSpec, device: DeviceSpec, why: str) -> ModelError:
    """Return the error of a model that a backend does not take."""
    return ModelError(f"{spec.model_file} cannot be compiled for {device.name}: {why}")


def names_of_outputs(spec: SessionSpec) -> list[str]:
    """Return the names of the outputs that a session computes: `logits` if the model has a head;
    `embedding` if it is saved, or if the model has nothing else.
    """
    if not spec.card.has_head:
        return ["embedding"]
    return ["logits", "embedding"] if Saved.EMBEDDING in spec.save else ["logits"]


def make_outputs(names: Sequence[str], values: Iterable[NDArray[np.float32]]) -> Outputs:
    """Return the outputs of a batch, float32 (filled, width) each, which have the names of
    `names_of_outputs`. Without a head, the logits have no classes.
    """
    found = dict(zip(names, values, strict=True))
    embedding = found.get("embedding")
    if embedding is not None and "logits" not in found:
        return Outputs(np.empty((len(embedding), 0), np.float32), embedding)
    return Outputs(found["logits"], embedding)


def describe_memory_shortage(
    device: str, batch_size: int, free: int | None, total: int | None = None, need: int = 0
) -> str:
    """Return the message of a DeviceMemoryError. It says nothing about what to do, which depends on
    whether a job is new, frozen, or none.

    Args:
        device: its name.
        batch_size: images per batch, for which memory was short.
        free: bytes that were free before; None if unknown.
        total: bytes of the device; None if unknown.
        need: bytes that the model and its batches take, estimated; 0 if unknown.
    """
    if free is None:
        return f"{device} has too little free memory for batches of {batch_size}."
    of = f" of {total / 1e9:.1f}" if total else ""
    more = f"about {need / 1e9:.1f} GB" if need > free else "more"
    return f"{device} has {free / 1e9:.1f}{of} GB free, and batches of {batch_size} need {more}."
