"""From true values, which are texts, to classes of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.models.labels import imagenet_labels

UNKNOWN = -1
_NUMBER = re.compile(r"0*([0-9]{1,9})(?:\.0+)?")


class Reading(Struct, frozen=True):
    """How the values of one truth are read."""

    kind: str
    """`labels`, `synsets` or `class ids`."""
    class_ids: NDArray[np.int32]
    """Of each value; `UNKNOWN` if the model has no such class."""


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes, in the order of class ids."""
    file = resources.files("imagemill").joinpath("data/imagenet_synsets.txt")
    return tuple(file.read_text(encoding="ascii").split())


def read(values: Sequence[str], labels: Sequence[str], names: Sequence[str] = ()) -> Reading:
    """Return the classes that values mean.

    All values are read in one way: as labels, as synsets or as class ids, whichever knows most of
    them; in a tie, the first of these. Case, underscores and spaces around it make no difference
    to a label, unless two labels would be equal then. A label of several classes means none.

    Args:
        values: the different true values.
        labels: the model's labels, by class id.
        names: values that a table has instead of the numbers 0, 1, …
    """
    folded = [_fold(label) for label in labels]
    fold = _fold if len(set(folded)) == len(set(labels)) else str.strip
    by_label = {fold(label): number for number, label in enumerate(labels)}
    for label, count in Counter(map(fold, labels)).items():
        if count > 1:
            del by_label[label]
    synsets = imagenet_synsets() if _has_imagenet_order(labels) else ()
    by_synset = {synset: number for number, synset in enumerate(synsets)}
    by_name = {name: number for number, name in enumerate(names)}

    def by_number(value: str) -> int:
        found = _NUMBER.fullmatch(value.strip())
        number = by_name.get(value, int(found[1]) if found else UNKNOWN)
        return number if number < len(labels) else UNKNOWN

    readings = [
        Reading("labels", _array(by_label.get(fold(value), UNKNOWN) for value in values)),
        Reading("synsets", _array(by_synset.get(value.strip(), UNKNOWN) for value in values)),
        Reading("class ids", _array(by_number(value) for value in values)),
    ]
    return max(readings, key=lambda reading: int((reading.class_ids != UNKNOWN).sum()))


def _array(class_ids: Iterable[int]) -> NDArray[np.int32]:
    return np.fromiter(class_ids, np.int32)


def _fold(label: str) -> str:
    return " ".join(label.replace("_", " ").casefold().split())


def _has_imagenet_order(labels: Sequence[str]) -> bool:
    """Return whether the classes are ImageNet's, in their usual order: there are 1,000, and most
    labels begin as ours do, or they are mere numbers.
    """
    if len(labels) != len(imagenet_synsets()):
        return False
    if all(label == str(number) for number, label in enumerate(labels)):
        return True
    usual = (_fold(label.partition("(")[0]) for label in imagenet_labels())
    alike = sum(_fold(label).startswith(name) for label, name in zip(labels, usual, strict=True))
    return alike > len(labels) // 2
