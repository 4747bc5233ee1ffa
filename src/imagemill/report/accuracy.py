"""What the page shows of a job's score."""

from __future__ import annotations

from msgspec import Struct

from imagemill.job.open_job import OpenJob
from imagemill.report import figures
from imagemill.report.figures import ImageRow
from imagemill.scoring import score
from imagemill.scoring.record import ClassScore, Confusion, Score

CONFUSIONS = 8
"""Confusions that the page shows with their images, the most frequent ones."""


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


def gather(job: OpenJob) -> Accuracy:
    """Return what `score.json` says of a job. Raises: PartError if a part is damaged."""
    found = score.read(job)
    if found is None:
        return Accuracy(None)
    top = found.confusions[:CONFUSIONS]
    done = job.committed()
    ends = {shard.first: shard.first + shard.count for shard in job.shards if shard.number in done}
    wanted = {index for confusion in top for index in confusion.examples}
    rows = figures.read_rows(
        job, {index for index in wanted if any(a <= index < b for a, b in ends.items())}
    )
    wrong = [item for item in found.classes if item.correct < item.support]
    wrong.sort(key=lambda item: (item.correct - item.support, item.class_id))
    return Accuracy(
        found,
        tuple(
            (confusion, tuple(rows[index] for index in confusion.examples if index in rows))
            for confusion in top
        ),
        tuple(wrong[: figures.CLASSES]),
    )
