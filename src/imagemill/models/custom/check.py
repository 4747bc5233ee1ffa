"""Run a wrapped model once and judge its answers: `run_twice`, then `judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models import bundle as bundles
from imagemill.models.custom.graph import Plan
from imagemill.records import Bundle, Scores
from imagemill.system.openvino_library import new_core

_TOLERANCE: Final = 1e-3
"""Between an image's scores beside one neighbour and beside another, as a share of the largest
score.
"""
_NEAR_ONE: Final = 0.05
"""How far the probabilities of a softmax may be from a sum of 1: those of a quantised one are
rounded.
"""
Answers = list[dict[str, NDArray[np.float32]]]


class Findings(Struct, frozen=True):
    """What a check run found."""

    classes: int
    """0: the model has no scores."""
    features: int
    """Length of the embedding; 0: there is none."""
    notes: tuple[str, ...] = ()
    """For people."""


def run_twice(made: Bundle, plan: Plan) -> Answers:
    """Return the answers to two random images, and the answers to the second of them twice.

    Raises:
        ModelError: the model cannot be run on two images at once.
    """
    shape = (2, plan.recipe.height, plan.recipe.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[1] //= 2
    try:
        return answers(made.dir / bundles.MODEL, [pixels, pixels[[1, 1]]])
    except Exception as error:  # OpenVINO's front end has kinds of its own
        reason = printable(str(error).strip().splitlines()[-1].rstrip("."), 500)
        if plan.batch is None:
            raise ModelError(
                f"{plan.file.name} cannot be run on a batch of 2: {reason}. Export it again, with"
                " an open batch."
            ) from error
        raise ModelError(
            f"{plan.file.name} was exported for batches of {plan.batch} and does not bear others:"
            f" {reason}. Export it with an open batch: dynamic_axes or dynamic_shapes of"
            " torch.onnx.export."
        ) from error


def answers(model_file: Path, batches: Sequence[NDArray[np.uint8]]) -> Answers:
    """Run a model in fp32 on a few batches of one shape and return its logits and embedding by
    name.

    Raises:
        RuntimeError: OpenVINO's, where it cannot read, compile or run the model.
    """
    core = new_core()
    model = core.read_model(str(model_file))
    model.reshape({"pixels": list(batches[0].shape)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for batch in batches:
        result = compiled({"pixels": batch})
        found.append(
            {
                name: np.array(values)
                for port, values in result.items()
                for name in port.get_names() & {"logits", "embedding"}
            }
        )
    return found


def judge(plan: Plan, answers: Answers) -> Findings:
    """Return what the answers of `run_twice` say about a model.

    Raises:
        ModelError: the answers have the wrong shape, are not finite, or depend on the other images
        of a batch. UsageError: they are not what the card says.
    """
    name, main = plan.file.name, "embedding" if plan.head.tensor is None else "logits"
    found = answers[0][main]
    expected = 2 if plan.two_classes else plan.head.classes
    if len(found) != 2 or (main == "logits" and expected not in (None, found.shape[1])):
        what = "scores are (n, classes)" if main == "logits" else "an embedding is (n, features)"
        raise ModelError(
            f"{name}: {plan.head.tensor or main} has the shape {found.shape} for 2 images; {what}."
        )
    valid, valid_again = (_valid(answer) for answer in answers)
    if not valid.any():
        bad = next(output for output, values in answers[0].items() if not np.isfinite(values).all())
        raise ModelError(
            f"{name} returns NaN or infinity ({bad}) for random images. Check --mean, --std and"
            " --scale."
        )
    again = np.where(valid_again[:, None], answers[1][main], 0)
    found = np.where(valid[:, None], found, 0)
    slack = _TOLERANCE * max(1e-6, float(np.abs(found).max()))
    if (valid_again != valid[1]).any() or float(np.abs(again - found[1]).max()) > slack:
        raise ModelError(
            f"{name} answers differently to one image beside different neighbours, so its answers"
            " could not be relied on. Export it in evaluation mode, with an open batch."
        )
    notes = _judge_scores(plan, found[valid]) if main == "logits" else []
    if not valid.all():
        notes.append(
            "note: it returned NaN or infinity for one of two random images; a job reports such"
            " images as invalid_output"
        )
    classes = found.shape[1] if main == "logits" else 0
    return Findings(classes, _features(plan, answers[0], classes), tuple(notes))


def _features(plan: Plan, answer: Mapping[str, NDArray[np.float32]], classes: int) -> int:
    """Return the length of the embedding; 0 if its shape is not the one that the last layer
    reads.
    """
    if plan.features is None:
        return 0
    features, (images, length) = plan.features, answer["embedding"].shape
    fits = features.classes in (None, classes) and features.features in (None, length)
    return length if features.certain or (fits and images == 2) else 0


def _valid(answer: Mapping[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Tell for each of two images whether all of its outputs are finite."""
    rows = [np.isfinite(values).all(axis=1) for values in answer.values() if len(values) == 2]
    return np.asarray(np.logical_and.reduce(rows))


def _judge_scores(plan: Plan, scores: NDArray[np.float32]) -> list[str]:
    """Compare scores (n, classes) with what the card says they are, and return notes.

    Raises:
        UsageError: they are something else.
    """
    name, classes = plan.file.name, scores.shape[1]
    kind = plan.bundle_scores if plan.two_classes else plan.scores
    ends_in = None if plan.two_classes else plan.head.ends_in
    if classes == 1 and kind is not Scores.SIGMOID:
        raise UsageError(
            f"{name} returns one score per image, and a softmax over one class is 1.0 for every"
            " image. Add --scores sigmoid, which makes the score the probability of that class, or"
            " --labels with two labels, of which the second one is that class."
        )
    within = bool((scores >= 0).all() and (scores <= 1 + _TOLERANCE).all())
    sums = scores.sum(axis=1, dtype=np.float64)
    farthest = float(sums[np.abs(sums - 1).argmax()])
    if kind is Scores.SOFTMAX:
        if not within:
            raise UsageError(
                f"{name} returns scores from {scores.min():.4g} to {scores.max():.4g}, no"
                " probabilities. Leave --scores out."
            )
        if abs(farthest - 1) > _NEAR_ONE:
            if ends_in == "Softmax":
                raise UsageError(
                    f"{name}: its Softmax is not over the classes: an image's scores sum to"
                    f" {farthest:.4g}. Correct its axis."
                )
            return [
                f"note: an image's scores sum to {farthest:.4g}, not 1; they are written as"
                " they are"
            ]
    elif (
        kind is Scores.SIGMOID
        and classes > 1
        and np.abs(np.exp(scores).sum(axis=1, dtype=np.float64) - 1).max() < _TOLERANCE
    ):
        raise UsageError(
            f"{name} returns logarithms of probabilities, as LogSoftmax does, so --scores sigmoid"
            " cannot be right. Leave --scores out."
        )
    elif within and ends_in is None:
        if classes > 1 and abs(farthest - 1) < _TOLERANCE:
            raise UsageError(
                f"{name}: the scores of each image lie between 0 and 1 and sum to 1, so they are"
                " probabilities already, not logits. Add --scores softmax."
            )
        if classes > 1:
            return [
                "note: scores lie between 0 and 1; if they are probabilities already, --scores"
                " softmax says so"
            ]
        return [
            "note: the score lies between 0 and 1; if it is a probability already, export the model"
            " without its last step"
        ]
    return []
