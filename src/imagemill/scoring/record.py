"""The result of scoring a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class Share(Struct, frozen=True):
    """How many images are right, with the 95 % Wilson interval of the share."""

    correct: int
    images: int
    value: float | None
    """`correct / images`; None without images."""
    low: float
    high: float


class ClassScore(Struct, frozen=True):
    """How right the rows of one class are. Only readable images count."""

    class_id: int
    label: str
    support: int
    """Images of this class."""
    predicted: int
    """Images for which this class is the most probable one."""
    correct: int
    precision: float
    """`correct / predicted`; 0 if the class is never predicted, as in scikit-learn."""
    recall: float
    """`correct / support`; 0 without images."""
    f1: float
    failed: int = 0
    """Images of this class without a result."""


class Average(Struct, frozen=True):
    """Means over the classes that have images or are predicted."""

    precision: float
    recall: float
    f1: float


class Confusion(Struct, frozen=True):
    """Images of one class that are taken for another one."""

    class_id: int
    label: str
    predicted_id: int
    predicted_label: str
    images: int
    examples: tuple[int, ...]
    """The index of a few of these images, the most probable mistakes first."""


class Bin(Struct, frozen=True):
    """Images whose most probable class has a probability in `(low, high]`."""

    low: float
    high: float
    images: int
    probability: float
    """Mean probability; 0 without images."""
    accuracy: float
    """Share of right images; 0 without images."""


class Calibration(Struct, frozen=True):
    """Whether probabilities are shares of right images."""

    error: float
    """Expected calibration error: the mean of |accuracy - probability| over the bins, weighted by
    images.
    """
    bins: tuple[Bin, ...]


class Score(Struct, frozen=True):
    """How accurate the rows of a job are, compared with true labels."""

    output: str
    model: str
    truth: str
    """`--truth` as it was given."""
    read_as: str
    """How its values are read: `labels`, `synsets` or `class ids`."""
    matched_by: str
    """How images are found in a table: `path`, `full path` or `file name`; else empty."""
    plan_id: str
    answer_id: str
    images: int
    """Images of the job."""
    rows: int
    """Images that have a row; fewer than `images` if the job is not finished."""
    labelled: int
    """Images that have a row and a true class of the model. Only these are scored."""
    failed: int
    """Among the labelled images: those without a result."""
    failed_by_status: Mapping[str, int]
    unclassified: int
    """Among the labelled images: those with a result, but without a class of at least the minimum
    probability. They count as wrong.
    """
    top1: Share
    """Over all labelled images; failed ones count as wrong."""
    top1_readable: Share
    """Over the labelled images that have a result."""
    top5: Share | None
    top5_readable: Share | None
    macro: Average | None
    """Mean over the classes."""
    weighted: Average | None
    """Mean over the classes, weighted by support."""
    calibration: Calibration | None
    classes: tuple[ClassScore, ...]
    """By class id; classes without images that are never predicted are left out."""
    confusion: tuple[tuple[int, int | None, int], ...]
    """The cells of the confusion matrix that are not 0: true class id, predicted class id (None: no
    class), number of readable images.
    """
    confusions: tuple[Confusion, ...]
    """The most frequent ones."""
    omitted: Mapping[str, str]
    """Why a figure is not given, by its name."""
    notes: tuple[str, ...]
    """Messages about the truth: unknown labels, missing images, …"""

    def __repr__(self) -> str:
        value = "none" if self.top1.value is None else f"{self.top1.value:.4f}"
        return (
            f"Score(top1={value} [{self.top1.low:.4f}, {self.top1.high:.4f}],"
            f" images={self.labelled:,}, failed={self.failed:,}, model={self.model!r})"
        )

    def omitted_by_reason(self) -> dict[str, str]:
        """Return the names of the figures that are not given, by the reason."""
        names: dict[str, list[str]] = {}
        for name, reason in self.omitted.items():
            names.setdefault(reason, []).append(name)
        return {reason: ", ".join(found) for reason, found in names.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the score as dicts, lists, strings and numbers: what `--json` prints."""
        from imagemill.system import serialization

        plain: dict[str, Any] = serialization.to_plain(self)
        return plain
