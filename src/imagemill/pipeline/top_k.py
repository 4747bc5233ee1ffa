"""From scores to the k most probable classes, and what to do with scores that are NaN or
infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from imagemill.errors import BadLogitsError, ClassCountError, counted
from imagemill.records import Batch, Outputs, Precision, Scores, SessionSpec, Status, TopK


def top_k(
    batch: Batch,
    outputs: Outputs,
    spec: SessionSpec,
    k: int,
    min_probability: float | Sequence[float] | None = None,
) -> tuple[Batch, TopK]:
    """Return the k most probable classes of each image of a batch.

    Args:
        batch: the images.
        outputs: logits float32 (filled, classes); filled may be 0.
        spec: of the session; its card says what the scores are and how many classes there are.
        k: at most this many; fewer if there are fewer classes.
        min_probability: keeps a class only if its probability, as float32, is at least this; one
            number, or one per class. None keeps all classes.

    Returns:
        the batch, and class ids and probabilities, most probable first; ties in the float32
        probability go by class id. An image whose scores or embedding contain NaN or infinity
        becomes an `invalid_output` row of the batch, without a slot.

    Raises:
        BadLogitsError: the wrong number of rows.
        ClassCountError: another number of classes than labels.
    """
    scores, card = outputs.logits, spec.card
    if scores.ndim != 2 or len(scores) != batch.filled:
        raise BadLogitsError(
            f"{card.name} returned an array of shape {scores.shape} for a batch of {batch.filled};"
            " rebuild the bundle."
        )
    if scores.shape[1] != len(card.labels):
        raise ClassCountError(
            f"{card.name} returns {counted(scores.shape[1], 'class')}, its card has"
            f" {counted(len(card.labels), 'label')}. Fix card.json."
        )
    valid = valid_rows(outputs)
    if not valid.all():
        batch = _with_invalid_rows(batch, valid, spec.precision)
        # These classes are not written; NaN would only cause warnings.
        scores = np.where(valid[:, None], scores, np.float32(0))
    probabilities = to_probabilities(scores, card.scores)
    candidates, counts = probabilities, np.full(len(scores), min(k, scores.shape[1]), np.intp)
    if min_probability is not None:
        kept = probabilities >= np.asarray(min_probability, np.float32)
        candidates = np.where(kept, probabilities, np.float32(-1))
        counts = np.minimum(counts, kept.sum(axis=1))
    class_ids = most_probable(candidates, k)
    best = probabilities[np.arange(len(class_ids))[:, None], class_ids]
    return batch, TopK(class_ids, best, counts, outputs)


def most_probable(probabilities: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Return the ids of the k most probable classes of each image, int32 (n, k).

    Ties go by class id. The accuracy check of a faster precision compares these ids, too.

    Args:
        probabilities: float32 (n, classes).
        k: number of classes; fewer are returned if there are fewer.
    """
    remaining = probabilities.copy()
    images, classes = probabilities.shape
    class_ids = np.empty((images, min(k, classes)), np.int32)
    rows = np.arange(images)
    # argmax returns the first of equal values, which has the lowest class id.
    for place in range(min(k, classes)):
        class_ids[:, place] = best = remaining.argmax(axis=1)
        remaining[rows, best] = -1.0
    return class_ids


def valid_rows(outputs: Outputs) -> NDArray[np.bool_]:
    """Return for each row whether all of its outputs are finite, bool (n,)."""
    valid: NDArray[np.bool_] = np.asarray(np.isfinite(outputs.logits).all(axis=1))
    if outputs.embedding is not None:
        valid &= np.asarray(np.isfinite(outputs.embedding).all(axis=1))
    return valid


def _with_invalid_rows(batch: Batch, valid: NDArray[np.bool_], precision: Precision) -> Batch:
    """Return the batch with an `invalid_output` row for each image without a valid output."""
    advice = (
        "this model cannot classify it; try another one"
        if precision is Precision.FP32
        else "try a new job with --precision fp32"
    )
    error = f"the model returned NaN or infinity for this image in {precision}; {advice}"
    rows = list(batch.rows)
    for place, row in enumerate(rows):
        if row.slot >= 0 and not valid[row.slot]:
            rows[place] = replace(row, status=Status.INVALID_OUTPUT, error=error, slot=-1)
    return replace(batch, rows=tuple(rows))


def to_probabilities(scores: NDArray[np.float32], kind: Scores) -> NDArray[np.float32]:
    """Scores (n, classes) as probabilities, float32; each row on its own, so that a batch's size
    changes no bit.
    """
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
