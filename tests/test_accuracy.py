"""The accuracy check: when a faster precision may stand in for fp32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.records import Precision, Scores
from imagemill.system.statistics import wilson
from imagemill.tuning import accuracy

# Successes, trials, 95 % interval, as scipy.stats.binomtest(…).proportion_ci(method="wilson") of
# SciPy 1.17 gives it.
SCIPY = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (980, 1000, 0.9693, 0.9870),
    (963, 1000, 0.9494, 0.9730),
]


def answers(agree: int, images: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a reference that is sure of class 0, and of a candidate with the same top-1 for the
    first `agree` images.
    """
    reference = np.zeros((images, classes), np.float32)
    reference[:, 0] = 3
    candidate = reference.copy()
    candidate[agree:, 1] = 4
    return reference, candidate


@pytest.mark.parametrize(("successes", "trials", "low", "high"), SCIPY)
def test_wilson_gives_the_intervals_of_scipy(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.process
@given(st.integers(0, 5000), st.data())
def test_wilson_holds_the_share_and_lies_in_the_unit_interval(
    trials: int, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= high <= 1
    if trials:
        assert low <= successes / trials <= high
        mirrored = wilson(trials - successes, trials)
        assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@given(st.integers(1, 3000), st.data())
def test_more_agreement_never_lowers_the_bound(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials - 1))
    assert wilson(successes, trials)[0] <= wilson(successes + 1, trials)[0]


@pytest.mark.parametrize(
    ("agree", "accepted"), [(1000, True), (981, True), (980, False), (964, False)]
)
def test_int8_needs_981_of_1000_and_bf16_964(agree: int, accepted: bool) -> None:
    """The lower end of the interval, not the agreement itself, must reach 0.97 or 0.95."""
    comparison = accuracy.compare(*answers(agree, 1000))
    assert comparison.accepted is accepted
    assert comparison.agreement == agree / 1000
    assert comparison.flips_where_sure == 1000 - agree
    assert ("reaches 0.97" if accepted else "is below 0.97") in comparison.reason
    bound = accuracy.MIN_AGREEMENT[Precision.BF16]
    assert accuracy.compare(*answers(agree, 1000), min_agreement=bound).accepted
    assert not accuracy.compare(*answers(963, 1000), min_agreement=bound).accepted


@pytest.mark.parametrize("images", [0, 1, 999])
def test_too_few_images_are_never_accepted_however_alike(images: int) -> None:
    comparison = accuracy.compare(*answers(images, images))
    assert not comparison.accepted
    assert not comparison.is_verdict


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from(Scores))
def test_fp32_agrees_with_itself(images: int, classes: int, seed: int, scores: Scores) -> None:
    reference = np.random.default_rng(seed).normal(0, 4, (images, classes)).astype(np.float32)
    comparison = accuracy.compare(reference, reference.copy(), scores)
    assert (
        comparison.agreement,
        comparison.flips_where_sure,
        comparison.mean_probability_difference,
    ) == (
        1,
        0,
        0,
    )


@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_figures_are_those_counted_one_by_one(images: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 2, (images, classes)).astype(np.float32)
    candidate = (reference + rng.normal(0, 1, reference.shape)).astype(np.float32)
    same = sure = flips = 0
    difference = 0.0
    for before, after in zip(reference.astype(float), candidate.astype(float), strict=True):
        p = np.exp(before) / np.exp(before).sum()
        q = np.exp(after) / np.exp(after).sum()
        top = int(np.argmax(p))
        agrees = top == int(np.argmax(q))
        same += agrees
        second, first = sorted(p)[-2:]
        sure += first - second > accuracy.SURE
        flips += first - second > accuracy.SURE and not agrees
        difference += abs(p[top] - q[top])
    comparison = accuracy.compare(reference, candidate)
    assert (comparison.agreement, comparison.sure, comparison.flips_where_sure) == (
        same / images,
        sure,
        flips,
    )
    assert comparison.mean_probability_difference == pytest.approx(difference / images, abs=1e-6)


def test_a_flip_where_fp32_was_not_sure_is_counted_apart() -> None:
    reference = np.float32([[1.0, 0.99, 0.0], [5.0, 0.0, 0.0]])
    candidate = np.float32([[0.99, 1.0, 0.0], [0.0, 5.0, 0.0]])
    comparison = accuracy.compare(reference, candidate)
    assert (comparison.agreement, comparison.sure, comparison.flips_where_sure) == (0, 1, 1)


def test_nan_in_the_candidate_refuses_it() -> None:
    reference, candidate = answers(2000, 2000)
    candidate[7, 3] = np.nan
    comparison = accuracy.compare(reference, candidate)
    assert not comparison.accepted
    assert comparison.reason == "NaN or infinity in the answers to 1 of 2,000 images"
    few = accuracy.compare(reference[:8], candidate[:8])
    assert few.is_verdict
    assert not few.accepted


def test_an_answer_where_fp32_has_none_is_another_answer() -> None:
    """As for any other disagreement the share decides."""
    reference, candidate = answers(1000, 1000)
    reference[0, 0] = np.inf
    comparison = accuracy.compare(reference, candidate)
    assert (comparison.accepted, comparison.images, comparison.agreement, comparison.sure) == (
        True,
        1000,
        0.999,
        999,
    )
    assert comparison.mean_probability_difference == pytest.approx(0.001)
    reference[:100, 0] = np.nan
    assert not accuracy.compare(reference, candidate).accepted


def test_images_without_an_answer_in_either_are_left_out() -> None:
    """They say nothing about the candidate, and do not count as held-out images."""
    reference, candidate = answers(1000, 1000)
    reference[:3, 0], candidate[:3, 1] = np.nan, np.inf
    comparison = accuracy.compare(reference, candidate)
    assert (comparison.images, comparison.agreement, comparison.accepted) == (997, 1.0, False)
    assert not comparison.is_verdict
    assert accuracy.compare(np.full((4, 3), np.nan), np.full((4, 3), np.nan)).images == 0


def test_the_telling_names_every_figure() -> None:
    text = accuracy.format_comparison(accuracy.compare(*answers(980, 1000)))
    assert "0.9800 of 1,000 held-out images (95 % interval 0.9693 to 0.9870)" in text
    assert "flips where fp32 was sure: 20 of 1,000, mean probability difference" in text


def test_near_ties_are_broken_as_in_the_results() -> None:
    """Scores that differ may be the same float32 probability; then the lower class id is the
    answer in the results, so both models agree.
    """
    reference = np.tile(np.float32([31, 30, -5]), (1000, 1))
    candidate = np.tile(np.float32([30, 31, -5]), (1000, 1))
    comparison = accuracy.compare(reference, candidate, Scores.SIGMOID)
    assert comparison.accepted
    assert comparison.agreement == 1


def test_images_with_another_answer_are_named_those_that_fp32_was_surest_of_first() -> None:
    reference = np.float32([[5, 0, 0], [1, 0, 0], [0, 9, 0], [3, 0, 0]])
    candidate = np.float32([[0, 5, 0], [0, 0, 1], [0, 9, 0], [3, np.nan, 0]])
    found = accuracy.compare(
        reference, candidate, names=["a", "b", "c", "d"], labels=["cat", "dog", "owl"]
    )
    assert found.agreement == 0.25  # d has no answer in the candidate, so none is shown
    assert [(one.image, one.fp32, one.answer) for one in found.flips] == [
        ("a", "cat", "dog"),
        ("b", "cat", "owl"),
    ]
    assert (found.flips[0].fp32_probability, found.flips[0].probability) == (0.9867, 0.9867)
    many = accuracy.compare(*answers(900, 1000), names=[str(number) for number in range(1000)])
    assert len(many.flips) == accuracy.MAX_FLIPS


def test_a_multi_label_models_other_answer_is_its_set_of_classes() -> None:
    before, after = logit([[0.9, 0.8, 0.1]]), logit([[0.9, 0.4, 0.1]])
    found = accuracy.compare(
        before, after, Scores.SIGMOID, names=["a"], labels=["cat", "dog", "owl"]
    )
    assert [(one.fp32, one.answer) for one in found.flips] == [("cat, dog", "cat")]


# ── what an answer is ─────────────────────────────────────────────────────────────────────────────


def logit(probabilities: object) -> np.ndarray:
    values = np.asarray(probabilities, np.float64)
    return np.log(values / (1 - values)).astype(np.float32)


@pytest.mark.parametrize(
    ("before", "after", "agrees"),
    [
        # Which of two sure classes comes first does not matter.
        ([0.99, 0.98, 0.1], [0.98, 0.99, 0.1], True),
        # A class that appears, or disappears.
        ([0.9, 0.2, 0.1], [0.9, 0.6, 0.1], False),
        ([0.9, 0.6, 0.1], [0.9, 0.4, 0.1], False),
        # Nothing is left of the set, though the most probable class is the same.
        ([0.6, 0.2, 0.1], [0.4, 0.2, 0.1], False),
        ([0.4, 0.2, 0.1], [0.6, 0.2, 0.1], False),
        # No class is present: then the most probable one counts.
        ([0.4, 0.2, 0.1], [0.3, 0.25, 0.1], True),
        ([0.4, 0.2, 0.1], [0.3, 0.35, 0.1], False),
        # One score: present or not.
        ([0.7], [0.6], True),
        ([0.7], [0.4], False),
        ([0.2], [0.4], True),
    ],
)
def test_a_multi_label_model_is_compared_by_its_set_of_classes(
    before: list[float], after: list[float], agrees: bool
) -> None:
    """From probability 0.5. The same if a wrapped graph ends in its sigmoid, so that its scores
    are probabilities that do not sum to 1.
    """
    comparison = accuracy.compare(logit([before]), logit([after]), Scores.SIGMOID)
    assert comparison.agreement == agrees
    assert comparison.compared == "set of classes from probability 0.5"
    if sum(before) > 1.1:
        raw = accuracy.compare(np.float32([before]), np.float32([after]), Scores.SOFTMAX)
        assert (raw.agreement, raw.compared) == (agrees, comparison.compared)
    assert "the same set of classes from probability 0.5 as fp32" in accuracy.format_comparison(
        comparison
    )


@pytest.mark.parametrize(
    ("before", "sure"),
    [
        ([0.9, 0.8, 0.1], True),
        ([0.9, 0.55, 0.1], False),
        ([0.3, 0.1, 0.1], True),
        ([0.3, 0.25, 0.1], False),
        ([0.3], True),
        ([0.45], False),
    ],
)
def test_fp32_is_sure_of_a_set_if_no_class_is_near_the_bound(
    before: list[float], sure: bool
) -> None:
    """And of the most probable class, where that counts."""
    assert accuracy.compare(logit([before]), logit([before]), Scores.SIGMOID).sure == sure


def test_exclusive_probabilities_are_checked_by_the_most_probable_class() -> None:
    """Also those of a quantised softmax, whose sum is not quite 1, and of a sigmoid that was
    turned into two classes.
    """
    before, after = np.float32([[0.45, 0.35, 0.22]]), np.float32([[0.52, 0.3, 0.2]])
    comparison = accuracy.compare(before, after, Scores.SOFTMAX)
    assert (comparison.agreement, comparison.compared) == (1, "top-1 class")
    two = accuracy.compare(np.float32([[0.4, 0.6]]), np.float32([[0.6, 0.4]]), Scores.SOFTMAX)
    assert (two.agreement, two.compared) == (0, "top-1 class")


def test_a_single_score_is_compared_with_the_bound_however_sure_fp32_is() -> None:
    """A file that ends in a sigmoid says `softmax`, and fp32 may be near 1 for every image."""
    before = np.full((1_000, 1), 0.97, np.float32)
    found = accuracy.compare(before, np.full_like(before, 0.1), Scores.SOFTMAX, min_agreement=0.97)
    assert (found.agreement, found.accepted) == (0, False)
