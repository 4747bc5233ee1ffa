"""No model at all: answers come from a cheap checksum of the pixels. It measures, and tests,
everything but the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from imagemill.pipeline.backends.base import names_of_outputs
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, DeviceSpec, Outputs, SessionSpec

_FEATURES = 8
_WEIGHTS = np.array([8, 4, 2, 1], np.float32)


class NullSession:
    """A session that computes nothing. Answers still depend on every pixel, and on nothing else."""

    def __init__(self, spec: SessionSpec, device: DeviceSpec, clock: Stopwatch) -> None:  # noqa: ARG002 - the constructor that all sessions share
        self.versions: dict[str, str] = {}
        self._classes = len(spec.card.labels)
        self._powers = np.uint64(self._classes) ** np.arange(len(_WEIGHTS), dtype=np.uint64)
        self._names = names_of_outputs(spec)

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        """See `Session.stream`."""
        for batch in batches:
            flat = batch.pixels[: batch.filled].reshape(batch.filled, batch.pixels[0].size)
            sums = flat.view(np.uint64 if flat.shape[1] % 8 == 0 else np.uint8).sum(
                axis=1, dtype=np.uint64
            )
            logits = np.zeros((batch.filled, self._classes), np.float32)
            if self._classes:
                columns = sums[:, None] // self._powers % self._powers[1]
                rows = np.arange(batch.filled)[:, None]
                np.add.at(logits, (rows, columns.astype(np.intp)), _WEIGHTS)
            embedding = None
            if "embedding" in self._names:
                embedding = np.stack(
                    [(sums >> np.uint64(4 * bit)) % np.uint64(16) for bit in range(_FEATURES)],
                    axis=1,
                ).astype(np.float32)
            yield batch, Outputs(logits, embedding)

    def close(self) -> None:
        """See `Session.close`."""
