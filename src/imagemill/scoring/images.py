"""True classes of images that belong to no job: `quantize --truth`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imagemill.errors import UsageError
from imagemill.scoring import entries, truth, values
from imagemill.scoring.entries import NONE, Codes, hashes
from imagemill.scoring.matching import WAYS, labels_in
from imagemill.scoring.truth import Truth, TruthKind


def parse(given: str) -> Truth:
    """Return what a value of `--truth` means, if it does not need a job.

    Raises:
        UsageError: it has none of the forms.
    """
    found = truth.parse(given)
    if found.kind in (TruthKind.COLUMN, TruthKind.CLS):
        raise UsageError(
            f"--truth {given}: `quantize` reads folders, regex:PATTERN and @FILE.csv#path,label."
        )
    return found


def true_classes(
    given: Truth, images: Sequence[tuple[str, str]], labels: Sequence[str]
) -> NDArray[np.int32]:
    """Return the class id of each image; `values.UNKNOWN` if it has none that the model knows. Of
    several true labels, the first one in alphabetical order counts.

    Args:
        given: where the true labels are.
        images: source and path of each image, as the columns of these names have them.
        labels: the model's labels, by class id.

    Raises:
        UsageError: no image has a label that the model knows. SourceError: a table cannot be read.
    """
    found, texts, names = _codes(given, images)
    reading = values.read(texts, labels, names)
    classes = np.append(reading.class_ids, np.int32(values.UNKNOWN))[found]  # NONE is the last one
    if (classes == values.UNKNOWN).all():
        first = f", first: {texts[0]!r}" if texts else ""
        raise UsageError(
            f"--truth {given.text}: no image has a label that the model knows{first}. Its labels"
            f" are {', '.join(map(repr, labels[:3]))}, …"
        )
    return np.asarray(classes)


def _codes(
    given: Truth, images: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.int32], tuple[str, ...], tuple[str, ...]]:
    """Return a number for the true value of each image, the values, and names of class ids."""
    if given.kind is not TruthKind.TABLE:
        codes = Codes(given)
        found = labels_in(given, [source for source, _ in images], [path for _, path in images])
        return codes.of(pa.array(found, pa.string())), codes.values, ()
    best = None
    for way in WAYS:
        table = entries.of_table(given, partial(way.key, given), way.place, names_one=False)
        known = dict(
            zip(reversed(table.entries.keys.tolist()), reversed(table.entries.codes), strict=True)
        )
        keys = hashes([way.place(*image) for image in images]).tolist()
        numbers = np.array([known.get(one, NONE) for one in keys], np.int32)
        if best is None or (numbers != NONE).sum() > (best[0] != NONE).sum():
            best = numbers, table.codes.values, table.names
    assert best is not None
    return best
