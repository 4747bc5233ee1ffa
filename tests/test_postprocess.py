"""From scores to the k most probable classes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from imagemill.errors import BadLogitsError, ClassCountError
from imagemill.postprocess import to_probabilities, top_k
from imagemill.records import Batch, Outputs, Row, Scores, Shard, Status, TopK
from tiny import CLASSES, TINY_CARD

SHARD = Shard(0, 0, 99, 0, "plan", 0)


def ask(scores: Any, k: int = 5, kind: Scores = Scores.LOGITS) -> TopK:
    scores = np.asarray(scores, np.float32)
    rows = tuple(Row(n, SHARD, "s", f"{n}.jpg", Status.OK, None, 1, 1, n) for n in range(len(scores)))
    batch = Batch(np.zeros((len(scores), 1, 1, 3), np.uint8), len(scores), rows)
    return top_k(batch, Outputs(scores), replace(TINY_CARD, scores=kind), k)


def test_most_probable_first() -> None:
    """Class ids in falling order of probability, which is the softmax of the logits."""
    logits = [[0.0, 3, 1, 2, -1, -2, -3, -4, -5, -6]]
    top = ask(logits, 3)
    total = sum(math.exp(x) for x in logits[0])
    assert top.class_ids.tolist() == [[1, 3, 2]]
    assert top.probabilities[0].tolist() == pytest.approx([math.exp(x) / total for x in (3, 2, 1)], rel=1e-6)
    assert (top.class_ids.dtype, top.probabilities.dtype) == (np.int32, np.float32)


def test_ties_go_by_class_id() -> None:
    """Of equal probabilities the lower class id comes first, also where only the float32 is equal."""
    assert ask([[1.0] * CLASSES], 4).class_ids.tolist() == [[0, 1, 2, 3]]
    assert ask([[0, 7, 0, 7, 0, 0, 7, 0, 0, 0]], 5).class_ids.tolist() == [[1, 3, 6, 0, 2]]
    assert ask([[100.0, 0, 0, 0, 0, 0, 0, 0, 0, 1e-9]], 3).class_ids.tolist() == [[0, 1, 2]]


def test_never_more_than_there_are_classes() -> None:
    """k beyond the number of classes gives all of them, each once."""
    top = ask(np.random.default_rng(0).normal(size=(3, CLASSES)), 1_000)
    assert top.class_ids.shape == (3, CLASSES)
    assert all(sorted(row) == list(range(CLASSES)) for row in top.class_ids.tolist())


def test_an_empty_batch_has_no_rows() -> None:
    """A batch in which nothing is filled is passed through."""
    assert ask(np.empty((0, CLASSES)), 5).class_ids.shape == (0, 5)


@examples(max_examples=60)
@given(
    scores=arrays(np.float32, (6, CLASSES), elements=st.floats(-80, 80, width=32)), kind=st.sampled_from([Scores.LOGITS, Scores.SIGMOID])
)
def test_each_row_is_on_its_own(scores: np.ndarray, kind: Scores) -> None:
    """Any row's answer is bit for bit the one it has alone; probabilities fall, and are what the order goes by."""
    together = ask(scores, CLASSES, kind)
    for number, row in enumerate(scores):
        alone = ask(row[None], CLASSES, kind)
        assert alone.class_ids[0].tolist() == together.class_ids[number].tolist()
        assert alone.probabilities[0].tobytes() == together.probabilities[number].tobytes()
    for ids, probabilities in zip(together.class_ids.tolist(), together.probabilities.tolist(), strict=True):
        ranked = list(zip(probabilities, ids, strict=True))
        assert ranked == sorted(ranked, key=lambda pair: (-pair[0], pair[1]))
        assert all(0 <= probability <= 1 for probability in probabilities)


def test_huge_logits_do_not_overflow() -> None:
    """Softmax is shifted by its largest logit."""
    assert ask([[3e38, -3e38] + [0.0] * 8], 2).probabilities.tolist() == [[1.0, 0.0]]


def test_scores_that_are_probabilities_stay_as_they_are() -> None:
    """A model that ends in softmax or sigmoid is not squashed twice; sigmoid scores are, once, each on its own."""
    scores = np.float32([[0.25, 0.5, 0.125, 0.125, 0, 0, 0, 0, 0, 0]])
    assert ask(scores, 2, Scores.SOFTMAX).probabilities.tolist() == [[0.5, 0.25]]
    assert to_probabilities(np.float32([[0.0, 100.0, -1000.0]]), Scores.SIGMOID).tolist() == [[0.5, 1.0, 0.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_is_one_clear_error_that_names_the_picture(bad: float) -> None:
    """A NaN or an infinity is no answer: it ends the job and says whose."""
    scores = np.zeros((3, CLASSES), np.float32)
    scores[1, 4] = bad
    with pytest.raises(BadLogitsError) as caught:
        ask(scores)
    assert str(caught.value) == (
        "tiny returned a NaN or an infinity for 1.jpg. The weights or the precision are unsound: try --precision fp32."
    )


def test_another_number_of_classes_than_labels_names_both() -> None:
    """No label is guessed."""
    with pytest.raises(ClassCountError, match=r"^tiny returns 7 classes, its card has 10 labels\. Mend card\.json\.$"):
        ask(np.zeros((2, 7)))


def test_another_number_of_rows_than_pictures_is_refused() -> None:
    """Answers are never paired with names by luck."""
    batch = Batch(np.zeros((4, 1, 1, 3), np.uint8), 3, ())
    with pytest.raises(BadLogitsError, match=r"an array of shape \(2, 10\) for a batch of 3"):
        top_k(batch, Outputs(np.zeros((2, CLASSES), np.float32)), TINY_CARD, 5)
