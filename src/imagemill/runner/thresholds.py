"""The minimum probability of a job: one number, or a threshold for each label from a file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from imagemill.errors import UsageError, counted
from imagemill.models.labels import read_text
from imagemill.records import Card, Settings


def min_probability_of(settings: Settings, card: Card) -> float | tuple[float, ...] | None:
    """Return the minimum probability of the settings: one number, or one per class of the model.

    Raises:
        UsageError: the file cannot be read, or does not fit the labels. The message names the line.
    """
    given = settings.min_probability
    if not isinstance(given, str):
        return None if given is None else float(given)
    return read_file(Path(given), card.labels)


def read_file(file: Path, labels: Sequence[str]) -> tuple[float, ...]:
    """Return the threshold of each label, in their order.

    Args:
        file: CSV, as `read_text` reads it; its header names the columns `label` and `threshold`,
            others are ignored. It has one line for each label. Classes with the same label share a
            threshold.
        labels: one per class.

    Raises:
        UsageError: the file cannot be read, or does not fit the labels. The message names the line.
    """
    where = f"--min-probability {file}"
    remedy = "Give a number from 0 to 1, or a CSV file with the columns label and threshold."
    text = read_text(file, where, remedy)
    rows = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    known, found = set(labels), dict[str, float]()
    try:
        if not {"label", "threshold"} <= set(rows.fieldnames or ()):
            raise UsageError(f"{where}: its first line must name the columns label and threshold.")
        for row in rows:
            label, value, problem = row["label"], _threshold(row["threshold"]), ""
            if label not in known:
                problem = f"{label!r} is not a label of the model"
            elif label in found:
                problem = f"{label!r} has a threshold already"
            elif value is None:
                problem = f"the threshold {row['threshold']!r} is not a number from 0 to 1"
            if value is None or problem:
                raise UsageError(f"{where}: line {rows.line_num}: {problem}.")
            found[label] = value
    except csv.Error as error:
        raise UsageError(f"{where}: line {rows.line_num}: {error}.") from error
    if missing := [label for label in dict.fromkeys(labels) if label not in found]:
        raise UsageError(
            f"{where} has no threshold for {len(missing):,} of {len(known):,} labels, the first of"
            f" them {missing[0]!r}. Add a line for each."
        )
    return tuple(found[label] for label in labels)


def _threshold(text: str) -> float | None:
    """Return a threshold; None if it is not a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def describe(value: float | Sequence[float] | None) -> str | None:
    """Return a text that identifies a minimum probability, or the thresholds of the labels."""
    if value is None or isinstance(value, float | int):
        return None if value is None else repr(value).removesuffix(".0")
    if not value:
        return "without a threshold"
    digest = hashlib.sha256(",".join(map(repr, value)).encode()).hexdigest()[:12]
    span = f"from {min(value):g} to {max(value):g} (sha256 {digest})"
    return f"with {counted(len(value), 'threshold')} {span}"
