"""The figures of a score, from the parts and the true classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import counted
from imagemill.job.open_job import OpenJob
from imagemill.records import Scores, Shard, Status
from imagemill.scoring.record import Average, Bin, Calibration, ClassScore, Confusion, Share
from imagemill.system.statistics import wilson

BINS: Final = 15
"""Of the calibration, of equal width from 0 to 1."""
TOP: Final = 5
CONFUSIONS: Final = 20
"""The most frequent confusions that are named."""
EXAMPLES: Final = 3
"""Images that are named for each of them."""
_NO_CLASS: Final = -1
_MAX_SUM: Final = 1.05
"""Probabilities of exclusive classes do not sum to more than this, quantised ones included."""
_IDS, _PROBABILITIES = "top_k.list.element.class_id", "top_k.list.element.probability"
_PENDING_CELLS: Final = 2**20


class TrueClasses(Struct, frozen=True):
    """The true classes of a job's images: pairs, sorted by image and class, each pair once."""

    indices: NDArray[np.int64]
    class_ids: NDArray[np.int32]

    @classmethod
    def of(cls, indices: NDArray[np.int64], class_ids: NDArray[np.int32]) -> TrueClasses:
        """Sort the pairs of an image, and drop those that repeat one. Indices are sorted."""
        if not (indices[1:] == indices[:-1]).any():
            return cls(indices, class_ids)
        order = np.lexsort((class_ids, indices))
        indices, class_ids = indices[order], class_ids[order]
        is_new = np.ones(len(indices), bool)
        is_new[1:] = (indices[1:] != indices[:-1]) | (class_ids[1:] != class_ids[:-1])
        return cls(indices[is_new], class_ids[is_new])

    @property
    def has_several(self) -> bool:
        """Whether an image has several classes."""
        return bool((self.indices[1:] == self.indices[:-1]).any())

    def of_shard(self, shard: Shard) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Return rows of a shard, counted from 0, and a true class of each."""
        ends = [shard.first, shard.first + shard.count]
        start, end = np.searchsorted(self.indices, ends)
        return (self.indices[start:end] - shard.first).astype(np.intp), self.class_ids[start:end]


@dataclass
class Figures:
    """Counts of labelled images, added up over the parts."""

    classes: int
    labelled: int = 0
    unclassified: int = 0
    failed_by_status: Counter[str] = field(default_factory=Counter)
    correct: int = 0
    correct_in_top5: int = 0
    max_sum: float = 0.0
    """The largest sum of the probabilities of an image."""

    def __post_init__(self) -> None:
        self.bin_images = np.zeros(BINS, np.int64)
        self.bin_correct = np.zeros(BINS, np.int64)
        self.bin_probability = np.zeros(BINS)
        self.failed_by_class = np.zeros(self.classes, np.int64)
        self._cells = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []

    @property
    def failed(self) -> int:
        """Labelled images without a result."""
        return self.failed_by_status.total()

    def add(self, shard: Shard, table: Any, truth: TrueClasses) -> None:
        """Add the labelled rows of a part."""
        rows, class_ids = truth.of_shard(shard)
        is_labelled = np.zeros(shard.count, bool)
        is_labelled[rows] = True
        is_ok = pc.equal(table["status"], Status.OK.value).to_numpy() & is_labelled
        predicted, probability = _predicted(table)
        has_class = is_ok & (predicted != _NO_CLASS)
        is_correct = np.zeros(shard.count, bool)
        is_correct[rows[predicted[rows] == class_ids]] = True
        self.labelled += int(is_labelled.sum())
        self.correct += int(is_correct.sum())
        self.unclassified += int((is_ok & ~has_class).sum())
        lost = table["status"].filter(pa.array(is_labelled & ~is_ok))
        for item in pc.value_counts(lost.combine_chunks()).to_pylist():
            self.failed_by_status[item["values"]] += item["counts"]
        failed = class_ids[~is_ok[rows]]
        self.failed_by_class += np.bincount(failed, minlength=self.classes)
        if "top_k" in table.column_names:
            self._add_top(table["top_k"].combine_chunks(), rows, class_ids)
        self._add_bins(probability[has_class], is_correct[has_class])
        read = is_ok[rows]
        self._add_cells(class_ids[read], predicted[rows[read]])

    def _add_top(self, top: Any, rows: NDArray[np.intp], class_ids: NDArray[np.int32]) -> None:
        lengths = pc.fill_null(pc.list_value_length(top), 0).to_numpy()
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        values = top.flatten()
        ids = values.field("class_id").to_numpy()
        is_first = place < TOP
        keys = owner[is_first] * self.classes + ids[is_first]
        is_hit = np.isin(keys, rows * self.classes + class_ids)
        self.correct_in_top5 += len(np.unique(owner[is_first][is_hit]))
        if values.type.get_field_index("probability") >= 0 and len(owner):
            sums = np.bincount(owner, values.field("probability").to_numpy().astype(np.float64))
            self.max_sum = max(self.max_sum, float(sums.max()))

    def _add_bins(self, probability: NDArray[np.float64], is_correct: NDArray[np.bool_]) -> None:
        number = np.clip(np.ceil(probability * BINS).astype(np.intp) - 1, 0, BINS - 1)
        self.bin_images += np.bincount(number, minlength=BINS)
        self.bin_correct += np.bincount(number[is_correct], minlength=BINS)
        self.bin_probability += np.bincount(number, probability, BINS)

    def _add_cells(self, class_ids: NDArray[np.int32], predicted: NDArray[np.int32]) -> None:
        self._pending.append(_cell(class_ids, predicted, self.classes))
        if sum(map(len, self._pending)) > max(_PENDING_CELLS, len(self._cells)):
            self._merge()

    def _merge(self) -> None:
        here = np.concatenate([*self._pending, np.empty(0, np.int64)])
        cells, counts = np.unique(here, return_counts=True)
        self._pending.clear()
        together = np.concatenate([self._cells, cells])
        self._cells, at = np.unique(together, return_inverse=True)
        self._counts = np.bincount(at, np.concatenate([self._counts, counts])).astype(np.int64)

    def confusion(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells of the confusion matrix: true class, predicted class (-1: none), images;
        sorted by the first two.
        """
        self._merge()
        return self._cells // (self.classes + 1), self._cells % (self.classes + 1) - 1, self._counts


def _cell(
    class_ids: NDArray[np.int32], predicted: NDArray[np.int32], classes: int
) -> NDArray[np.int64]:
    """Return the number of each cell of the confusion matrix; its first column is `no class`."""
    return class_ids.astype(np.int64) * (classes + 1) + predicted + 1


def _predicted(table: Any) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return class id (-1: none) and probability of each row."""
    ids = pc.fill_null(table["class_id"], _NO_CLASS).to_numpy()
    return ids, pc.fill_null(table["probability"], 0.0).to_numpy().astype(np.float64)


def gather(job: OpenJob, shards: Sequence[Shard], truth: TrueClasses) -> Figures:
    """Return the figures of some committed shards. Raises: PartError."""
    card = job.frozen.job.session.card
    columns = ["status", "class_id", "probability"]
    if job.frozen.job.top_k >= TOP:
        columns.append(_IDS)
    if card.scores is Scores.SOFTMAX:
        columns += [_IDS, _PROBABILITIES]
    figures = Figures(len(card.labels))
    for shard, table in job.tables(shards, list(dict.fromkeys(columns))):
        figures.add(shard, table, truth)
    return figures


def share(correct: int, images: int) -> Share:
    """Return a share with its interval."""
    return Share(correct, images, correct / images if images else None, *wilson(correct, images))


def calibration(figures: Figures) -> Calibration:
    """Return whether probabilities are shares of right images."""
    images = np.maximum(figures.bin_images, 1)
    probability, accuracy = figures.bin_probability / images, figures.bin_correct / images
    weights = figures.bin_images / max(figures.bin_images.sum(), 1)
    columns = (figures.bin_images, probability, accuracy)
    bins = tuple(
        Bin(number / BINS, (number + 1) / BINS, *(column[number].item() for column in columns))
        for number in range(BINS)
    )
    return Calibration(float(np.sum(weights * np.abs(accuracy - probability))), bins)


def by_class(
    figures: Figures, labels: Sequence[str]
) -> tuple[tuple[ClassScore, ...], Average, Average]:
    """Return the figures of each class, and their mean, plain and weighted by support."""
    true, predicted, counts = figures.confusion()
    classes = len(labels)
    support = np.bincount(true, counts, classes)
    has_class = predicted >= 0
    chosen = np.bincount(predicted[has_class], counts[has_class], classes)
    is_right = true == predicted
    correct = np.bincount(true[is_right], counts[is_right], classes)
    precision, recall = _divide(correct, chosen), _divide(correct, support)
    f1 = _divide(2 * correct, chosen + support)
    whole = [values.astype(np.int64) for values in (support, chosen, correct)]
    columns = [*whole, precision, recall, f1, figures.failed_by_class]
    scores = tuple(
        ClassScore(number, labels[number], *(column[number].item() for column in columns))
        for number in np.flatnonzero(support + chosen + figures.failed_by_class).tolist()
    )
    counted = (support + chosen) > 0
    triple = [values[counted] for values in (precision, recall, f1)]
    weights = support[counted] / max(support.sum(), 1)
    macro = Average(*(float(values.mean()) if len(values) else 0.0 for values in triple))
    return scores, macro, Average(*(float((values * weights).sum()) for values in triple))


def _divide(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.zeros(len(above))
    np.divide(above, below, out=found, where=below > 0)
    return found


def confusions(
    job: OpenJob,
    shards: Sequence[Shard],
    truth: TrueClasses,
    figures: Figures,
    labels: Sequence[str],
) -> tuple[Confusion, ...]:
    """Return the most frequent confusions, each with its most probable mistakes. Raises:
    PartError.
    """
    true, predicted, counts = figures.confusion()
    wrong = np.flatnonzero((true != predicted) & (predicted >= 0))
    top = wrong[np.argsort(-counts[wrong], kind="stable")[:CONFUSIONS]]
    wanted = _cell(true[top].astype(np.int32), predicted[top].astype(np.int32), len(labels))
    examples: dict[int, list[tuple[float, int]]] = {int(cell): [] for cell in wanted}
    columns = ("status", "class_id", "probability")
    for shard, table in job.tables(shards if examples else [], columns):
        rows, class_ids = truth.of_shard(shard)
        ids, probability = _predicted(table)
        cells = _cell(class_ids, ids[rows], len(labels))
        for at in np.flatnonzero(np.isin(cells, wanted)).tolist():
            found = examples[int(cells[at])]
            found.append((-float(probability[rows[at]]), int(shard.first + rows[at])))
            found.sort()
            del found[EXAMPLES:]
    return tuple(
        Confusion(
            int(true[at]),
            labels[true[at]],
            int(predicted[at]),
            labels[predicted[at]],
            int(counts[at]),
            tuple(index for _, index in examples[int(cell)]),
        )
        for at, cell in zip(top, wanted, strict=True)
    )


def omitted(job: OpenJob, truth: TrueClasses, figures: Figures) -> Mapping[str, str]:
    """Return why figures are not defined for this job, by their names."""
    frozen, found = job.frozen.job, dict[str, str]()
    card = frozen.session.card
    if frozen.min_probability is not None:
        found["top5"] = "--min-probability has dropped classes"
        found["calibration"] = "--min-probability has dropped classes"
    elif frozen.top_k < TOP < len(card.labels):
        found["top5"] = f"the job keeps {counted(frozen.top_k, 'class')} per image (--top-k)"
    elif len(card.labels) <= TOP:
        found["top5"] = f"the model has only {counted(len(card.labels), 'class')}"
    why = ""
    if card.scores is Scores.SIGMOID or figures.max_sum > _MAX_SUM:
        why = "the model gives each class a probability of its own"
    elif truth.has_several:
        why = "images have several true labels"
    if why:
        found |= dict.fromkeys(("classes", "confusion", "calibration"), why)
    return found
