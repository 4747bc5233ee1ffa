"""From scores to the k most probable classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace

from imagemill.errors import BadLogitsError, ClassCountError
from imagemill.pipeline.session_checks import check_model
from imagemill.pipeline.top_k import to_probabilities, top_k
from imagemill.records import (
    Batch,
    Outputs,
    Precision,
    Row,
    Scores,
    SessionSpec,
    Shard,
    Status,
    TopK,
)
from tiny import CLASSES, HEADLESS_CARD, TINY_CARD

SHARD = Shard(0, 0, 99, 0, "plan", 0)


def spec(scores: Scores = Scores.LOGITS, precision: Precision = Precision.FP32) -> SessionSpec:
    return SessionSpec("m", replace(TINY_CARD, scores=scores), precision, 2)


def ask(scores: Any, k: int = 5, kind: Scores = Scores.LOGITS, min_probability: Any = None) -> TopK:
    scores = np.asarray(scores, np.float32)
    rows = tuple(
        Row(n, SHARD, "s", f"{n}.jpg", Status.OK, None, 1, 1, n) for n in range(len(scores))
    )
    batch = Batch(np.zeros((len(scores), 1, 1, 3), np.uint8), len(scores), rows)
    return top_k(batch, Outputs(scores), spec(kind), k, min_probability)[1]


def test_most_probable_first() -> None:
    """Class ids in falling order of probability, which is the softmax of the logits."""
    logits = [[0.0, 3, 1, 2, -1, -2, -3, -4, -5, -6]]
    top = ask(logits, 3)
    total = sum(math.exp(x) for x in logits[0])
    assert top.class_ids.tolist() == [[1, 3, 2]]
    assert top.probabilities[0].tolist() == pytest.approx(
        [math.exp(x) / total for x in (3, 2, 1)], rel=1e-6
    )
    assert (top.class_ids.dtype, top.probabilities.dtype) == (np.int32, np.float32)


def test_ties_go_by_class_id() -> None:
    """Of equal probabilities the lower class id comes first, also where only the float32 is
    equal.
    """
    assert ask([[1.0] * CLASSES], 4).class_ids.tolist() == [[0, 1, 2, 3]]
    assert ask([[0, 7, 0, 7, 0, 0, 7, 0, 0, 0]], 5).class_ids.tolist() == [[1, 3, 6, 0, 2]]
    assert ask([[100.0, 0, 0, 0, 0, 0, 0, 0, 0, 1e-9]], 3).class_ids.tolist() == [[0, 1, 2]]


def test_never_more_than_there_are_classes() -> None:
    """k beyond the number of classes gives all of them, each once."""
    top = ask(np.random.default_rng(0).normal(size=(3, CLASSES)), 1_000)
    assert top.class_ids.shape == (3, CLASSES)
    assert all(sorted(row) == list(range(CLASSES)) for row in top.class_ids.tolist())


def kept(top: TopK) -> list[list[int]]:
    """The classes of each image, without the padding."""
    rows = zip(top.class_ids.tolist(), top.counts.tolist(), strict=True)
    return [ids[:count] for ids, count in rows]


def test_only_classes_of_the_minimum_probability_are_kept() -> None:
    """The bound itself is enough, up to k are kept, and an image may have none. Ties still go by
    class id.
    """
    scores = np.float32([[0.7, 0.1, 0.9, 0.7, 0, 0, 0, 0, 0, 0], [0.1] * CLASSES])
    assert kept(ask(scores, 5, Scores.SOFTMAX, 0.7)) == [[2, 0, 3], []]
    assert kept(ask(scores, 2, Scores.SOFTMAX, 0.7)) == [[2, 0], []]
    assert kept(ask(scores, 5, Scores.SOFTMAX, 0.0)) == [[2, 0, 3, 1, 4], [0, 1, 2, 3, 4]]
    assert kept(ask(scores, 5, Scores.SOFTMAX)) == [[2, 0, 3, 1, 4], [0, 1, 2, 3, 4]]
    assert kept(ask(scores[:0], 5, Scores.SOFTMAX, 0.7)) == []


def test_each_class_has_its_own_threshold() -> None:
    """A class that is less probable than another may be kept, and the other one not."""
    scores = np.float32([[0.7, 0.1, 0.9, 0.7, 0, 0, 0, 0, 0, 0]])
    thresholds = [0.8, 0.1, 0.95, 0.6, *[0.5] * 6]
    top = ask(scores, 5, Scores.SOFTMAX, thresholds)
    assert kept(top) == [[3, 1]]
    assert top.probabilities[0, :2].tolist() == scores[0, [3, 1]].tolist()


@examples(max_examples=60)
@given(
    scores=arrays(np.float32, (4, CLASSES), elements=st.floats(-9, 9, width=32)),
    thresholds=st.one_of(
        st.floats(0, 1), st.lists(st.floats(0, 1), min_size=CLASSES, max_size=CLASSES)
    ),
    k=st.integers(1, CLASSES + 1),
)
def test_thresholds_only_leave_classes_out(scores: np.ndarray, thresholds: Any, k: int) -> None:
    """What is kept is the full list without the classes below their threshold, cut at k."""
    everything = ask(scores, CLASSES, Scores.SIGMOID)
    bounds = np.broadcast_to(np.float32(thresholds), CLASSES)
    top = ask(scores, k, Scores.SIGMOID, thresholds)
    for row, ids in enumerate(kept(top)):
        ranked = zip(everything.class_ids[row].tolist(), everything.probabilities[row], strict=True)
        assert ids == [class_id for class_id, p in ranked if p >= bounds[class_id]][:k]


def test_a_network_without_a_head_has_no_classes() -> None:
    """Its embedding alone says whether an output is valid."""
    embedding = np.float32([[1, 2], [3, math.nan]])
    rows = tuple(Row(n, SHARD, "s", f"{n}.jpg", Status.OK, None, 1, 1, n) for n in range(2))
    batch = Batch(np.zeros((2, 1, 1, 3), np.uint8), 2, rows)
    outputs = Outputs(np.empty((2, 0), np.float32), embedding)
    headless = SessionSpec("m", HEADLESS_CARD, Precision.FP32, 2)
    found, top = top_k(batch, outputs, headless, 0)
    assert [row.status for row in found.rows] == [Status.OK, Status.INVALID_OUTPUT]
    assert kept(top) == [[], []]


def test_an_empty_batch_has_no_rows() -> None:
    """A batch in which nothing is filled is passed through."""
    assert ask(np.empty((0, CLASSES)), 5).class_ids.shape == (0, 5)


@examples(max_examples=60)
@given(
    scores=arrays(np.float32, (6, CLASSES), elements=st.floats(-80, 80, width=32)),
    kind=st.sampled_from([Scores.LOGITS, Scores.SIGMOID]),
)
def test_each_row_is_on_its_own(scores: np.ndarray, kind: Scores) -> None:
    """Any row's answer is bit for bit the one it has alone; probabilities fall, and are what the
    order goes by.
    """
    together = ask(scores, CLASSES, kind)
    for number, row in enumerate(scores):
        alone = ask(row[None], CLASSES, kind)
        assert alone.class_ids[0].tolist() == together.class_ids[number].tolist()
        assert alone.probabilities[0].tobytes() == together.probabilities[number].tobytes()
    for ids, probabilities in zip(
        together.class_ids.tolist(), together.probabilities.tolist(), strict=True
    ):
        ranked = list(zip(probabilities, ids, strict=True))
        assert ranked == sorted(ranked, key=lambda pair: (-pair[0], pair[1]))
        assert all(0 <= probability <= 1 for probability in probabilities)


def test_huge_logits_do_not_overflow() -> None:
    """Softmax is shifted by its largest logit."""
    assert ask([[3e38, -3e38] + [0.0] * 8], 2).probabilities.tolist() == [[1.0, 0.0]]


def test_scores_that_are_probabilities_stay_as_they_are() -> None:
    """A model that ends in softmax or sigmoid is not squashed twice; sigmoid scores are, once, each
    on its own.
    """
    scores = np.float32([[0.25, 0.5, 0.125, 0.125, 0, 0, 0, 0, 0, 0]])
    assert ask(scores, 2, Scores.SOFTMAX).probabilities.tolist() == [[0.5, 0.25]]
    assert to_probabilities(np.float32([[0.0, 100.0, -1000.0]]), Scores.SIGMOID).tolist() == [
        [0.5, 1.0, 0.0]
    ]


FP32_ERROR = (
    "the model returned NaN or infinity for this image in fp32; this model cannot classify it; try"
    " another one"
)
BF16_ERROR = (
    "the model returned NaN or infinity for this image in bf16; try a new job with --precision fp32"
)


@pytest.mark.parametrize("kind", Scores)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("precision", "error"), [(Precision.FP32, FP32_ERROR), (Precision.BF16, BF16_ERROR)]
)
def test_an_invalid_output_is_the_row_of_its_image_alone(
    bad: float, kind: Scores, precision: Precision, error: str
) -> None:
    """NaN or infinity is an `invalid_output` row with advice that fits the precision; the
    neighbours' rows and answers keep every bit.
    """
    scores = np.random.default_rng(0).random((3, CLASSES), np.float32)
    clean = ask(scores, kind=kind)
    scores[1, 4] = bad
    rows = tuple(Row(n, SHARD, "s", f"{n}.jpg", Status.OK, None, 5, 6, n) for n in range(3))
    batch = Batch(np.zeros((4, 1, 1, 3), np.uint8), 3, rows)
    found, top = top_k(batch, Outputs(scores), spec(kind, precision), 5)
    assert found.rows == (
        rows[0],
        replace(rows[1], status=Status.INVALID_OUTPUT, error=error, slot=-1),
        rows[2],
    )
    for slot in (0, 2):
        assert top.class_ids[slot].tolist() == clean.class_ids[slot].tolist()
        assert top.probabilities[slot].tobytes() == clean.probabilities[slot].tobytes()


def test_an_invalid_embedding_is_an_invalid_output() -> None:
    """An embedding that holds NaN is not written beside a class, as if it were sound; failed rows
    between the images change nothing.
    """
    embedding = np.float32([[1, 2], [3, math.nan]])
    slots = (0, -1, 1)
    rows = tuple(
        Row(n, SHARD, "s", f"{n}.jpg", Status.OK if slot >= 0 else Status.EMPTY, None, 1, 1, slot)
        for n, slot in enumerate(slots)
    )
    batch = Batch(np.zeros((2, 1, 1, 3), np.uint8), 2, rows)
    found, _ = top_k(batch, Outputs(np.zeros((2, CLASSES), np.float32), embedding), spec(), 5)
    assert [(row.status.value, row.slot) for row in found.rows] == [
        ("ok", 0),
        ("empty", -1),
        ("invalid_output", -1),
    ]


def check(precision: Precision, is_valid: Callable[[Batch], bool]) -> int:
    """Check a model that answers numbers where `is_valid` says so, else NaN. Returns the number of
    batches that it was asked.
    """
    asked = []

    def stream(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        for batch in batches:
            asked.append(batch)
            yield (
                batch,
                Outputs(
                    np.full(
                        (batch.filled, CLASSES), 0.0 if is_valid(batch) else math.nan, np.float32
                    )
                ),
            )

    check_model(
        stream,
        spec(precision=precision),
    )
    return len(asked)


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [
        (
            Precision.FP32,
            (
                "Its weights are damaged, or its normalisation (mean, std, scale) is wrong: get the"
                " model again, or use another one."
            ),
        ),
        (Precision.INT8, "Use --precision fp32 and a new --output folder."),
    ],
)
def test_a_model_without_one_valid_output_is_an_error(precision: Precision, remedy: str) -> None:
    """It names model and precision, and never advises the precision that is in use."""
    with pytest.raises(BadLogitsError) as caught:
        check(precision, lambda batch: False)
    assert (
        str(caught.value)
        == f"tiny returns NaN or infinity in {precision} for every image: tried on 8 random images"
        f" before the first of yours. {remedy}"
    )


def test_a_model_with_a_valid_output_is_none() -> None:
    """One batch is enough for a sound model; one that fails on bright and on dark images but
    answers others is not refused.
    """
    assert check(Precision.FP32, lambda batch: True) == 1
    assert (
        check(Precision.FP32, lambda batch: batch.pixels.min() > 90 and batch.pixels.max() < 170)
        > 1
    )


def test_another_number_of_classes_than_labels_names_both() -> None:
    """No label is guessed."""
    with pytest.raises(
        ClassCountError,
        match=r"^tiny returns 7 classes, its card has 10 labels\. Fix card\.json\.$",
    ):
        ask(np.zeros((2, 7)))


def test_another_number_of_rows_than_images_is_refused() -> None:
    """Answers are never paired with names by luck."""
    batch = Batch(np.zeros((4, 1, 1, 3), np.uint8), 3, ())
    with pytest.raises(BadLogitsError, match=r"an array of shape \(2, 10\) for a batch of 3"):
        top_k(batch, Outputs(np.zeros((2, CLASSES), np.float32)), spec(), 5)
