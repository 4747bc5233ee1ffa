"""The images of an accuracy check: chosen from all of the sources, decoded, none of them twice."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imagemill.pipeline import sources
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    AS_GIVEN,
    Access,
    Bundle,
    Entry,
    IsolationReason,
    Limits,
    PlannedImage,
    Recipe,
    Shard,
)
from imagemill.system import serialization

_SLACK_S: Final = 60.0
_SORTED_RUN: Final = 64


class Image(NamedTuple):
    """A decoded image."""

    source: str
    name: str
    """Its path in its source."""
    pixels: NDArray[np.uint8]
    """uint8 (1, height, width, 3), RGB."""


def sample(entries: Iterable[Entry], count: int) -> tuple[list[Entry], int]:
    """Return `count` entries, chosen at random from a listing of any length, and its length. The
    choice is the same every time. All entries of a shorter listing are returned, shuffled.
    """
    rng = random.Random(0)  # noqa: S311 - nothing secret
    chosen: list[Entry] = []
    listed = 0
    for listed, entry in enumerate(entries, 1):
        if len(chosen) < count:
            chosen.append(entry)
        elif (place := rng.randrange(listed)) < count:
            chosen[place] = entry
    rng.shuffle(chosen)
    return chosen, listed


def calibration_share(available: int, calibration: int, held_out: int) -> int:
    """Return how many of the available images calibration gets: in proportion to the images that
    calibration and comparison need. If there are too few for both, it gets up to four fifths.
    """
    wanted = calibration + held_out
    if available >= wanted > 0:
        return available * calibration // wanted
    return min(calibration, max(min(available, 1), available * 4 // 5))


def identity(
    entries: Iterable[Entry], count: int, bundle: Bundle, sources_of: Sequence[str]
) -> str:
    """Return a hash of what decides a set of pixel arrays: sources, paths, places in an archive or
    table, sizes, how many at most, recipe and decoder.
    """
    state = hashlib.sha256(
        json.dumps([count, serialization.to_plain(bundle.card.recipe), DECODER]).encode()
    )
    for entry in entries:
        source = sources_of[entry.source]
        state.update(repr((source, entry.path, entry.locator, entry.size)).encode())
    return state.hexdigest()[:16]


class Decoder:
    """Decodes images of some sources, and leaves out content that it has returned before.

    Args:
        sources_of: resolved, as entries number them.
        recipe: the model's preprocessing.
        limits: budgets of one image.
        threads: number of decoding threads.
        access: where the sources are now, and how they are asked for.
        isolate: decode every image in a process of its own.
        at: is called before each image with the seconds that it may take.
    """

    def __init__(
        self,
        sources_of: Sequence[str],
        recipe: Recipe,
        limits: Limits,
        threads: int,
        *,
        access: Access = AS_GIVEN,
        isolate: bool = False,
        at: Callable[[float | None], None] = lambda _: None,
    ) -> None:
        self._sources = sources.open_all(sources_of, access=access)
        self._recipe, self._limits, self._threads = recipe, limits, threads
        self._isolated = IsolationReason.CRASH if isolate else None
        self._patience_s = (4 if isolate else 1) * limits.max_seconds + _SLACK_S
        self._at = at
        self._seen: set[bytes] = set()
        self.duplicates = 0
        """Number of images left out because another one has the same pixels."""

    def decode(self, entries: Sequence[Entry], wanted: int) -> Iterator[Image]:
        """Yield the first `wanted` of the entries that can be decoded and are new."""
        from imagemill.pipeline.decoding.pillow import limit_pillow  # Pillow takes long to import
        from imagemill.pipeline.feed import Feed

        limit_pillow(self._limits)
        # Batches of one image.
        with Feed(self._recipe, self._limits, 1, self._threads, None, Stopwatch()) as feed:
            self._at(self._patience_s)
            for batch in feed.batches(self._planned(entries)):
                if wanted <= 0:
                    return
                self._at(self._patience_s)
                if not batch.filled:
                    continue
                digest = hashlib.sha256(batch.pixels.data).digest()
                if digest in self._seen:
                    self.duplicates += 1
                    continue
                self._seen.add(digest)
                wanted -= 1
                row = next(row for row in batch.rows if row.slot >= 0)
                # The feed may reuse its buffer.
                yield Image(row.source, row.path, batch.pixels.copy())

    def _planned(self, entries: Sequence[Entry]) -> Iterator[PlannedImage]:
        nowhere = Shard(0, 0, len(entries), 0, "", 0)
        for index, entry in enumerate(_nearly_in_order(entries)):
            source = self._sources[entry.source]
            fetch = partial(source.fetch, entry.path, entry.locator, self._limits.max_bytes)
            yield PlannedImage(
                index, nowhere, source.name, entry.path, entry.size, fetch, self._isolated
            )


def _nearly_in_order(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield shuffled entries, sorted in short runs: a table whose rows are read forward is then
    passed through once a run, not once an image.
    """
    for start in range(0, len(entries), _SORTED_RUN):
        yield from sorted(
            entries[start : start + _SORTED_RUN],
            key=lambda entry: (entry.source, entry.locator, entry.path),
        )
