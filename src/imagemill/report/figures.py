"""The figures of a report, from one pass over the parts, and what it shows of a score. Memory does
not depend on the number of parts.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from imagemill.errors import printable
from imagemill.job.open_job import OpenJob
from imagemill.records import Status
from imagemill.scoring import score
from imagemill.scoring.record import ClassScore, Confusion, Score

BINS = 20
"""Number of bins in the histogram of probabilities."""
CLASSES = 10
"""Number of classes in the report's table, the most frequent ones."""
LISTED_CLASSES = 2_000
"""Number of classes that the report names with their images, the most frequent ones."""
UNCERTAIN_CLASSES = 5
UNCERTAIN_FROM = 3
"""Images of a class from which on its mean probability says something."""
CERTAIN_IMAGES = 24
"""Images in the gallery that are most certain; as many are least certain."""
SAMPLE_IMAGES = 48
"""Random images in the gallery. A job of so few images shows all of them, in plan order."""
EXAMPLES = 8
"""Failed images that are listed for each status."""
_COUNT_COLUMNS = ("status", "class_id", "probability")
CONFUSIONS = 8
"""Confusions that the page shows with their images, the most frequent ones."""


class ClassCount(Struct, frozen=True):
    """How often a class was the most probable one."""

    class_id: int
    label: str
    images: int
    mean_probability: float


class ImageRow(Struct, frozen=True):
    """The row of one image that the report shows."""

    index: int
    shard: int
    source: str
    path: str
    status: str
    error: str | None
    class_id: int | None
    label: str | None
    probability: float | None
    top_k: tuple[tuple[str, float], ...]
    """Label and probability, most probable first."""
    width: int | None
    height: int | None
    kept: tuple[tuple[str, str], ...] = ()
    """Name and value of the columns of `--keep` that are not null."""


class Figures(Struct, frozen=True):
    """All figures that the parts contain."""

    images: int
    ok: int
    failed_by_status: Mapping[str, int]
    """Most frequent first."""
    classes: tuple[ClassCount, ...]
    """The most frequent ones, at most `LISTED_CLASSES`."""
    uncertain_classes: tuple[ClassCount, ...]
    """Those with the lowest mean probability, of those with at least `UNCERTAIN_FROM` images."""
    classes_seen: int
    unclassified: int
    """Images without a class: none of their classes was probable enough, or the model has none."""
    other_images: int
    """Images of the classes that are not in the table."""
    other_probability: float
    """Their mean probability; 0 if there are none."""
    probabilities: tuple[int, ...]
    """Images per bin of their top-1 probability; `BINS` bins of equal width from 0 to 1."""
    mean_probability: float | None
    examples: Mapping[str, tuple[ImageRow, ...]]
    """Failed images by status, in plan order."""
    most_certain: tuple[ImageRow, ...]
    least_certain: tuple[ImageRow, ...]
    sample: tuple[ImageRow, ...]
    """Other images, chosen at random, in plan order."""
    backend: str = ""
    versions: Mapping[str, str] = {}
    """Versions of the libraries that decided the results."""


class Accuracy(Struct, frozen=True):
    """The score of a job, and images for it."""

    score: Score | None
    """None: the job has none."""
    confusions: tuple[tuple[Confusion, tuple[ImageRow, ...]], ...] = ()
    """The most frequent ones, each with a few images."""
    classes: tuple[ClassScore, ...] = ()
    """Those with most errors, most first."""

    @property
    def examples(self) -> tuple[ImageRow, ...]:
        """All images of the confusions."""
        return tuple(image for _, images in self.confusions for image in images)


class _Smallest:
    """The `count` images with the smallest keys seen so far. Of equal keys, the first ones in the
    plan are kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._keys: NDArray[Any] | None = None
        self.indices = np.empty(0, np.int64)

    def offer(self, keys: NDArray[Any], indices: NDArray[np.int64]) -> None:
        if self._keys is None:
            self._keys = keys[:0]
        elif len(self._keys) == self._count:
            near = keys <= self._keys[-1]
            keys, indices = keys[near], indices[near]
        keys, indices = np.concatenate([self._keys, keys]), np.concatenate([self.indices, indices])
        order = np.lexsort((indices, keys))[: self._count]
        self._keys, self.indices = keys[order], indices[order]


def shuffled(indices: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return a pseudo-random key for each index, which depends on index and seed only.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        x = (indices.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def gather(job: OpenJob) -> Figures:
    """Return the figures of a job's finished parts. Raises: PartError if a part is damaged."""
    labels, seed = job.frozen.job.session.card.labels, int(job.frozen.job.plan_id, 16)
    images = 0
    statuses: Counter[str] = Counter()
    counts, sums = np.zeros(len(labels), np.int64), np.zeros(len(labels))
    bins = np.zeros(BINS, np.int64)
    most, least, sample = (
        _Smallest(CERTAIN_IMAGES),
        _Smallest(CERTAIN_IMAGES),
        _Smallest(2 * CERTAIN_IMAGES + SAMPLE_IMAGES),
    )
    failed: dict[str, _Smallest] = {}
    metadata: Mapping[bytes, bytes] = {}
    for shard, table in job.tables(job.committed_shards(), _COUNT_COLUMNS):
        metadata = metadata or table.schema.metadata or {}
        images += table.num_rows
        here = {
            str(item["values"]): int(item["counts"])
            for item in pc.value_counts(table["status"].combine_chunks()).to_pylist()
        }
        statuses.update(here)
        is_ok = pc.equal(table["status"], Status.OK.value).to_numpy()
        has_class = pc.is_valid(table["class_id"]).to_numpy()
        classified = shard.first + np.flatnonzero(has_class)
        class_ids = table["class_id"].drop_null().to_numpy()
        probabilities = table["probability"].drop_null().to_numpy().astype(np.float64)
        counts += np.bincount(class_ids, minlength=len(labels))
        sums += np.bincount(class_ids, weights=probabilities, minlength=len(labels))
        bins += np.histogram(probabilities, BINS, (0.0, 1.0))[0]
        most.offer(-probabilities, classified)
        least.offer(probabilities, classified)
        indices = shard.first + np.flatnonzero(is_ok)
        sample.offer(shuffled(indices, seed), indices)
        for status in here.keys() - {Status.OK.value}:
            lost = shard.first + np.flatnonzero(pc.equal(table["status"], status).to_numpy())
            failed.setdefault(status, _Smallest(EXAMPLES)).offer(shuffled(lost, seed), lost)
    ok = statuses.pop(Status.OK.value, 0)
    classified_images = int(counts.sum())
    ends = min(CERTAIN_IMAGES, classified_images // 3) if ok > SAMPLE_IMAGES else 0
    chosen_most = most.indices[:ends].tolist()
    chosen_least = [index for index in least.indices.tolist() if index not in chosen_most][:ends]
    ends_shown = {*chosen_most, *chosen_least}
    chosen_sample = sorted(
        [index for index in sample.indices.tolist() if index not in ends_shown][:SAMPLE_IMAGES]
    )
    chosen_failed = {status: sorted(found.indices.tolist()) for status, found in failed.items()}
    rows = read_rows(
        job,
        {
            *ends_shown,
            *chosen_sample,
            *(index for found in chosen_failed.values() for index in found),
        },
    )
    means = sums / np.maximum(counts, 1)

    def named(class_ids: NDArray[Any]) -> tuple[ClassCount, ...]:
        return tuple(
            ClassCount(i, labels[i], int(counts[i]), float(means[i])) for i in class_ids.tolist()
        )

    frequent = np.lexsort((np.arange(len(labels)), -counts))[: np.count_nonzero(counts)]
    enough = np.flatnonzero(counts >= UNCERTAIN_FROM)
    others = frequent[CLASSES:]
    other_images = int(counts[others].sum())
    return Figures(
        images=images,
        ok=ok,
        failed_by_status=dict(sorted(statuses.items(), key=lambda item: (-item[1], item[0]))),
        classes=named(frequent[:LISTED_CLASSES]),
        uncertain_classes=named(enough[np.argsort(means[enough])][:UNCERTAIN_CLASSES])
        if len(enough) > UNCERTAIN_CLASSES
        else (),
        classes_seen=len(frequent),
        unclassified=ok - classified_images,
        other_images=other_images,
        other_probability=float(sums[others].sum() / other_images) if other_images else 0.0,
        probabilities=tuple(bins.tolist()),
        mean_probability=float(sums.sum() / classified_images) if classified_images else None,
        examples={
            status: tuple(rows[index] for index in found) for status, found in chosen_failed.items()
        },
        most_certain=tuple(rows[index] for index in chosen_most),
        least_certain=tuple(rows[index] for index in chosen_least),
        sample=tuple(rows[index] for index in chosen_sample),
        backend=metadata.get(b"imagemill.backend", b"").decode(),
        versions=json.loads(metadata.get(b"imagemill.versions", b"{}")),
    )


def gather_accuracy(job: OpenJob) -> Accuracy:
    """Return what `score.json` says of a job. Raises: PartError if a part is damaged."""
    found = score.read(job)
    if found is None:
        return Accuracy(None)
    top = found.confusions[:CONFUSIONS]
    wanted = {index for confusion in top for index in confusion.examples}
    spans = [range(shard.first, shard.first + shard.count) for shard in job.committed_shards()]
    rows = read_rows(job, {index for index in wanted if any(index in span for span in spans)})
    wrong = [item for item in found.classes if item.correct < item.support]
    wrong.sort(key=lambda item: (item.correct - item.support, item.class_id))
    return Accuracy(
        found,
        tuple(
            (confusion, tuple(rows[index] for index in confusion.examples if index in rows))
            for confusion in top
        ),
        tuple(wrong[:CLASSES]),
    )


def read_rows(job: OpenJob, indices: Iterable[int]) -> dict[int, ImageRow]:
    """Return the rows of some images, by index. Their shards must be committed."""
    shards = job.shards
    firsts = [shard.first for shard in shards]
    by_shard: dict[int, list[int]] = {}
    for index in sorted(indices):
        by_shard.setdefault(bisect_right(firsts, index) - 1, []).append(index)
    found = {}
    kept = [kept.name for kept in job.frozen.job.keep]
    columns = [name for name in ImageRow.__struct_fields__ if name not in ("shard", "kept")] + kept
    tables = job.tables([shards[position] for position in by_shard], columns)
    for wanted, (shard, table) in zip(by_shard.values(), tables, strict=True):
        for row in table.take([index - shard.first for index in wanted]).to_pylist():
            top_k = tuple(
                (answer["label"], answer["probability"]) for answer in row.pop("top_k") or ()
            )
            values = tuple(
                (name, printable(value)) for name in kept if (value := row.pop(name)) is not None
            )
            found[row["index"]] = ImageRow(shard=shard.number, top_k=top_k, kept=values, **row)
    return found
