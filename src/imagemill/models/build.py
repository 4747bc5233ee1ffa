"""Build a bundle from a checkpoint's arrays.

arrays, architecture ─► parameters checked ─► ONNX ─┐
card: preprocessing, labels, scores, licence ───────┴─► bundle
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from imagemill.errors import ClassCountError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import mistaken
from imagemill.models.architectures import Architecture, fitted
from imagemill.models.architectures.graph import Array
from imagemill.models.card import Color, ModelCard, ReadCard
from imagemill.models.labels import imagenet_labels
from imagemill.models.preprocessing import normalisation, with_normalisation, with_recipe
from imagemill.records import Bundle, Card, Recipe, Scores
from imagemill.system.messages import Notify

Origin = Mapping[str, str | int | bool | None]


def build(
    folder: Path,
    architecture: Architecture,
    arrays: Mapping[str, Array],
    read: ReadCard,
    origin: Origin,
    *,
    top1: float | None = None,
    notify: Notify,
) -> Bundle:
    """Build the bundle of a checkpoint's arrays.

    Args:
        folder: the bundle's, which is made if it is missing.
        architecture: as `architectures.recognise` returned it for the arrays.
        arrays: name → array, as `checkpoints.checkpoint.read` returned them.
        read: name, preprocessing, labels, scores and licence, and where they came from. Without a
            name the model is called like the folder, and without a size the images have the usual
            one of the architecture.
        origin: of the weights, for the bundle's card: `source`, `file`, `sha256`, …
        top1: published accuracy, per cent.
        notify: takes one line at a time: each value and where it came from.

    Raises:
        CheckpointError: the arrays do not fit the architecture, or are damaged.
        UsageError: a value does not fit the architecture. ClassCountError: the labels do not.
        ModelError: the bundle cannot be written.

    Example:
        >>> arrays = checkpoint.read(Path("model.safetensors"))
        >>> read = ReadCard(ModelCard(size=224, resize=256, labels=("jay", "owl")))
        >>> build(Path("birds"), recognise(arrays), arrays, read, {"source": "file"}, notify=print)
    """
    arrays = fitted(architecture, arrays)
    if architecture.classes == 1 and len(read.card.labels or ()) == 2:
        architecture = _with_two_classes(architecture, arrays)
        origin_of_scores = "one score and two labels: it is the score of the second"
        read = read.with_values({"scores": Scores.LOGITS}, origin_of_scores)
    read = _labelled(architecture, read)
    if read.card.size is None:
        read = read.with_values(
            {"size": architecture.recipe.height}, f"usual for {architecture.name}"
        )
    read = with_normalisation(architecture.name, read, channels=3, takes_bytes=False)
    read, recipe = with_recipe(read)
    card = read.card
    mean, std = normalisation(card)
    for line in read.lines():
        notify(line)
    if card.color is Color.BGR:
        arrays[architecture.stem] = arrays[architecture.stem][:, ::-1]
    bundle_card = Card(
        name=card.name or folder.name,
        architecture=architecture.name,
        labels=tuple(card.labels or ()),
        recipe=recipe,
        mean=mean,
        std=std,
        sha256="",
        licence=card.licence,
        origin=origin,
        parameters=architecture.parameters,
        scores=_scores(architecture, card),
        normalised="normalised",
        outputs=("logits", "embedding") if architecture.classes else ("embedding",),
        top1=top1,
    )
    return bundles.write(folder, bundle_card, architecture.build(arrays, recipe, mean, std))


def usual(
    architecture: Architecture, recipe: Recipe | None = None, given: Mapping[str, Any] | None = None
) -> ReadCard:
    """Return the preprocessing that an architecture's weights are usually trained with, changed by
    what the command line says.

    Args:
        architecture: says size, mean and deviation.
        recipe: of the publication that the weights are from; None: the architecture's.
        given: fields of ModelCard by name.

    Raises:
        UsageError: a value that its field cannot have.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    recipe = recipe or architecture.recipe
    divisor = 1 if given.get("scale") == 255 else 255
    values = {
        "size": recipe.height,
        "interpolation": recipe.interpolation,
        "mean": tuple(value / divisor for value in architecture.mean),
        "std": tuple(value / divisor for value in architecture.std),
    }
    if "size" not in given and "crop" not in given:
        values["resize"] = recipe.resize
    read = ReadCard(ModelCard()).with_values(values, f"usual for {architecture.name}")
    return read.with_values(given)


def _with_two_classes(architecture: Architecture, arrays: dict[str, Array]) -> Architecture:
    """Return the architecture with a first class whose score is always 0, so that the softmax of
    both scores is the sigmoid of the second. The arrays are changed.
    """
    for part in ("weight", "bias"):
        name = f"{architecture.head}.{part}"
        arrays[name] = np.concatenate([np.zeros_like(arrays[name]), arrays[name]])
    return replace(architecture, classes=2)


def _labelled(architecture: Architecture, read: ReadCard) -> ReadCard:
    """Return the card with one label per class. Raises: ClassCountError."""
    classes, labels = architecture.classes, read.card.labels
    if classes == 0 and not labels:
        return read
    if labels is None and classes == 1000:
        return read.with_values(
            {"labels": imagenet_labels()}, "ImageNet's, because there are 1,000 classes"
        )
    if labels is None:
        numbers = tuple(str(number) for number in range(classes))
        return read.with_values({"labels": numbers}, "the classes' numbers; no labels were given")
    if len(labels) != classes:
        origin = read.origins.get("labels", "--labels")
        if classes == 0:
            raise ClassCountError(
                f"{architecture.name} has no classes here, its result is an embedding. Leave the"
                f" labels out ({origin})."
            )
        raise ClassCountError(mistaken.label_count(origin, labels, architecture.name, classes))
    return read


def _scores(architecture: Architecture, card: ModelCard) -> Scores:
    """Return what the network's outputs are. Raises: UsageError."""
    if card.scores is Scores.SOFTMAX:
        raise UsageError(
            f"--scores softmax: {architecture.name} returns logits, to which imagemill applies a"
            " softmax. Leave --scores out."
        )
    if architecture.classes == 1 and card.scores is not Scores.SIGMOID:
        raise UsageError(
            f"{architecture.name} has one class here, and a softmax over one class is 1.0 for every"
            " image. Add --scores sigmoid, which makes the score the probability of that class, or"
            " --labels with two labels, the second of which is that class."
        )
    return card.scores or Scores.LOGITS
