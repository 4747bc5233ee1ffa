"""The comparison of a faster precision with fp32, on images that calibration did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import counted
from imagemill.models.variants import TOO_FEW, Comparison, Flip, TrueAccuracy
from imagemill.pipeline.top_k import most_probable, to_probabilities
from imagemill.records import Precision, Scores
from imagemill.system.statistics import wilson

MIN_IMAGES: Final = 1_000
"""Minimum number of held-out images for an accepted precision."""
MIN_AGREEMENT: Final[Mapping[Precision, float]] = {
    Precision.INT8: 0.97,
    Precision.BF16: 0.95,
    Precision.FP16: 0.95,
}
"""Minimum lower end of the agreement's 95 % Wilson interval, by default. bf16 and fp16 cannot be
made better by calibration, and change fewer answers (docs/performance.md).
"""
MAX_FLIPS: Final = 20
"""Number of images with another answer that are named."""
SURE: Final = 0.1
"""fp32 is sure of an image if no probability would have to change by more than this for another
answer: its two largest ones differ by more, or all lie further from `PRESENT`.
"""
PRESENT: Final = 0.5
"""Probability from which a multi-label model is taken to see a class. The check must not depend on
the thresholds of one job, because its result is kept for all jobs.
"""
TOP_1: Final = "top-1 class"
SET: Final = f"set of classes from probability {PRESENT:g}"
_NOT_EXCLUSIVE: Final = 0.05
"""Probabilities whose sum is further from 1 than this are not those of exclusive classes. Quantised
softmaxes are within it.
"""


def _is_multi_label(probabilities: NDArray[np.float32], scores: Scores) -> bool:
    """Return whether each class has a probability of its own, as a single one always has. A wrapped
    graph that ends in its own sigmoid says `softmax`, since its scores are probabilities already,
    but they do not sum to 1.
    """
    if probabilities.shape[1] == 1:
        return True
    if scores is Scores.SOFTMAX:
        sums = probabilities.sum(axis=1, dtype=np.float64)
        return bool((np.abs(sums - 1) > _NOT_EXCLUSIVE).any())
    return scores is Scores.SIGMOID


def agree(
    before: NDArray[np.float32], after: NDArray[np.float32], *, multi_label: bool
) -> NDArray[np.bool_]:
    """Return for each image whether two arrays of probabilities, (n, classes), give one answer.

    Exclusive classes: the most probable class is the same. Of a multi-label model the set of
    classes from probability `PRESENT` is the same; if it is empty, the most probable class, too.
    The most probable class alone says little there: of several classes near 1, noise decides which
    comes first. With a single score, it is from `PRESENT` in both or in neither.
    """
    is_first_same = most_probable(before, 1)[:, 0] == most_probable(after, 1)[:, 0]
    if not multi_label:
        return np.asarray(is_first_same)
    present = before >= PRESENT
    is_set_same = (present == (after >= PRESENT)).all(axis=1)
    return np.asarray(is_set_same & (present.any(axis=1) | is_first_same))


def _is_sure(probabilities: NDArray[np.float32], *, multi_label: bool) -> NDArray[np.bool_]:
    """Return for each image whether every other answer is further away than `SURE`."""
    images, classes = probabilities.shape
    is_first_sure = np.zeros(images, bool)
    if classes > 1:
        two = np.partition(probabilities, classes - 2, axis=1)[:, -2:]
        is_first_sure = two[:, 1] - two[:, 0] > SURE
    if not multi_label:
        return is_first_sure
    are_all_sure = (np.abs(probabilities - PRESENT) > SURE).all(axis=1)
    has_present = (probabilities >= PRESENT).any(axis=1)
    return np.asarray(are_all_sure & (has_present | is_first_sure | (classes == 1)))


def compare(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    scores: Scores = Scores.LOGITS,
    *,
    min_agreement: float = MIN_AGREEMENT[Precision.INT8],
    names: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Comparison:
    """Return how a candidate compares with fp32 on the same images. `agree` says what is compared.

    Args:
        reference: fp32's scores, (n, classes), row by row of the same images as the candidate's; n
            may be 0.
        candidate: the faster precision's. A row that is finite in only one of the two counts as
            another answer, and if fp32's is the finite one, refuses the candidate. A row that is
            finite in neither is left out.
        scores: what the numbers are.
        min_agreement: minimum lower end of the interval for an accepted candidate.
        names: of the images, to name those with another answer; none: none are named.
        labels: of the classes.
    """
    known, finite = np.isfinite(reference).all(axis=1), np.isfinite(candidate).all(axis=1)
    compared = known | finite
    places = np.flatnonzero(compared)
    images = len(places)
    if images == 0:
        reason = f"{TOO_FEW}: none, {MIN_IMAGES:,} are needed"
        return Comparison(0, 0.0, 0.0, 1.0, 0, 0, 0.0, False, reason, min_agreement)
    known, finite = known[compared], finite[compared]
    before = to_probabilities(np.where(known[:, None], reference[compared], 0), scores)
    after = to_probabilities(np.where(finite[:, None], candidate[compared], 0), scores)
    both = known & finite
    multi_label = _is_multi_label(before[known], scores)
    same = both & agree(before, after, multi_label=multi_label)
    sure = known & _is_sure(before, multi_label=multi_label)
    top = most_probable(before, 1)[:, 0]
    rows = np.arange(images)
    change = np.abs(before[rows, top].astype(np.float64) - after[rows, top])
    agreed, invalid = int(same.sum()), int((~finite).sum())
    low, high = wilson(agreed, images)
    accepted = not invalid and images >= MIN_IMAGES and low >= min_agreement
    if invalid:  # fp32's answers are finite for all of these
        reason = f"NaN or infinity in the answers to {invalid:,} of {counted(images, 'image')}"
    elif images < MIN_IMAGES:
        reason = f"{TOO_FEW}: {images:,} held out, {MIN_IMAGES:,} are needed"
    else:
        reason = (
            f"its agreement with fp32 is {agreed / images:.4f}, the lower end of the 95 % interval,"
            f" {low:.4f}, {'reaches' if accepted else 'is below'} {min_agreement:g}"
        )
    flipped: list[int] = np.flatnonzero(both & ~same).tolist() if names else []
    surest = sorted(flipped, key=lambda row: -float(before[row, top[row]]))[:MAX_FLIPS]
    return Comparison(
        images=images,
        agreement=agreed / images,
        wilson_low=low,
        wilson_high=high,
        sure=int(sure.sum()),
        flips_where_sure=int((sure & ~same).sum()),
        mean_probability_difference=float(np.where(both, change, 1.0).mean()),
        accepted=accepted,
        reason=reason,
        min_agreement=min_agreement,
        compared=SET if multi_label else TOP_1,
        flips=tuple(
            Flip(
                names[places[row]],
                *_answer(before[row], labels, multi_label=multi_label),
                *_answer(after[row], labels, multi_label=multi_label),
            )
            for row in surest
        ),
    )


def true_accuracy(
    truth: str,
    classes: NDArray[np.int32],
    reference: NDArray[Any],
    candidate: NDArray[Any],
) -> TrueAccuracy:
    """Return how often each of two arrays of scores has the true class, (n,), as the most probable
    one. Images without a true class (below 0) are left out, and an invalid answer is wrong.
    """
    known = classes >= 0
    shares = []
    for scores in (reference, candidate):
        is_right = np.isfinite(scores).all(axis=1) & (scores.argmax(axis=1) == classes)
        shares.append(float(is_right[known].mean()))
    return TrueAccuracy(truth, int(known.sum()), *shares)


def _answer(
    probabilities: NDArray[np.float32], labels: Sequence[str], *, multi_label: bool
) -> tuple[str, float]:
    """Return an image's answer, and the probability of its most probable class."""
    top = most_probable(probabilities[None], 1)[0]
    ids: list[int] = top.tolist()
    if multi_label:
        ids = np.flatnonzero(probabilities >= PRESENT).tolist() or ids
    text = ", ".join(labels[number] if number < len(labels) else str(number) for number in ids)
    return text, round(float(probabilities[top[0]]), 4)


def format_comparison(found: Comparison) -> str:
    """Return a comparison's figures in one line."""
    return (
        f"the same {found.compared} as fp32 for {found.agreement:.4f} of"
        f" {counted(found.images, 'held-out image')} (95 % interval {found.wilson_low:.4f}"
        f" to {found.wilson_high:.4f}), flips where fp32 was sure: {found.flips_where_sure:,} of"
        f" {found.sure:,}, mean probability difference {found.mean_probability_difference:.4f}"
        + _format_true(found.true)
    )


def _format_true(true: TrueAccuracy | None) -> str:
    if true is None:
        return ""
    return (
        f", right answers {true.fp32:.4f} in fp32 and {true.precision:.4f} here, of"
        f" {counted(true.images, 'image')} with a true label"
    )
