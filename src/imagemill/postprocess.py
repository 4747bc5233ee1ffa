"""From scores to the k most probable classes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import BadLogitsError, ClassCountError
from imagemill.records import Batch, Card, Outputs, Scores, TopK


def top_k(batch: Batch, outputs: Outputs, card: Card, k: int) -> TopK:
    """Pick the k most probable classes of each picture of a batch.

    Args:
        batch: names the pictures, for the message.
        outputs: logits float32 (filled, classes); filled may be 0.
        card: says what the scores are, and how many classes there are.
        k: at most this many; fewer where there are fewer classes.

    Returns:
        class ids and probabilities, most probable first; ties in the float32 probability go by class id.

    Raises:
        BadLogitsError: a NaN or an infinity, or the wrong number of rows.
        ClassCountError: another number of classes than labels.
    """
    scores = outputs.logits
    if scores.ndim != 2 or len(scores) != batch.filled:
        raise BadLogitsError(f"{card.name} returned an array of shape {scores.shape} for a batch of {batch.filled}; rebuild the bundle.")
    if scores.shape[1] != len(card.labels):
        raise ClassCountError(f"{card.name} returns {scores.shape[1]} classes, its card has {len(card.labels)} labels. Mend card.json.")
    if not np.isfinite(scores).all():
        bad = _rows_of(batch)[int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])]
        raise BadLogitsError(
            f"{card.name} returned a NaN or an infinity for {bad}. The weights or the precision are unsound: try --precision fp32."
        )
    probabilities = to_probabilities(scores, card.scores)
    remaining = probabilities.copy()
    count = min(k, scores.shape[1])
    class_ids = np.empty((len(scores), count), np.int32)
    rows = np.arange(len(scores))
    for place in range(count):  # k passes of argmax: it returns the first of equals, which is the lowest class id
        class_ids[:, place] = best = remaining.argmax(axis=1) if len(scores) else 0
        remaining[rows, best] = -1.0
    return TopK(class_ids, np.take_along_axis(probabilities, class_ids.astype(np.intp), axis=1), outputs)


def to_probabilities(scores: NDArray[np.float32], kind: Scores) -> NDArray[np.float32]:
    """Scores (n, classes) as probabilities, float32; each row on its own, so that a batch's size changes no bit."""
    if kind is Scores.SOFTMAX:
        return scores.astype(np.float32, copy=True)
    wide = scores.astype(np.float64)
    if kind is Scores.SIGMOID:
        return (0.5 * (1.0 + np.tanh(0.5 * wide))).astype(np.float32)
    if wide.size:
        wide -= wide.max(axis=1, keepdims=True)
    exponential = np.exp(wide)
    exponential /= exponential.sum(axis=1, keepdims=True)
    return exponential.astype(np.float32)


def _rows_of(batch: Batch) -> list[str]:
    """Path of each filled slot."""
    named: Iterable[tuple[int, str]] = ((row.slot, row.path) for row in batch.rows if row.slot >= 0)
    return [path for _, path in sorted(named)]
