"""Score a job: compare its rows with true labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from imagemill.errors import OutputError, UsageError, printable
from imagemill.job.open_job import OpenJob
from imagemill.scoring import figures, matching, truth, values
from imagemill.scoring.figures import TrueClasses
from imagemill.scoring.matching import TrueValues
from imagemill.scoring.record import Score
from imagemill.system import serialization

_NAMED = 5
"""Unknown labels that a message names."""


def score(job: OpenJob, given: str) -> Score:
    """Return how accurate the rows of a job are.

    Args:
        job: finished or not; only its committed shards are scored.
        given: a value of `--truth`.

    Raises:
        UsageError: the truth has no valid form, does not fit the job, or knows no image; or the
            model has no classes. SourceError: a table or archive cannot be read.
        OutputError: no row exists yet. PartError: a part is damaged.
    """
    wanted, frozen = truth.parse(given), job.frozen.job
    card = frozen.session.card
    if not card.has_head:
        raise UsageError(f"{card.name} has no classes, only an embedding: no row can be right.")
    if len(card.labels) < 2:
        raise UsageError(f"{card.name} has one class only: every row would be right.")
    shards = job.committed_shards()
    rows = sum(shard.count for shard in shards)
    if not rows:
        raise OutputError(f"{job.shortfall(0)}, then score again.")
    found = matching.find(job, shards, wanted)
    reading = values.read(found.values, card.labels, found.names)
    is_known = reading.class_ids[found.codes] != values.UNKNOWN
    if not is_known.any():
        raise UsageError(_none_known(found, card.labels, given))
    true = TrueClasses.of(found.indices[is_known], reading.class_ids[found.codes[is_known]])
    notes = [*found.notes, *_notes(found, reading, len(card.labels))]
    if rows < job.frozen.images:
        notes.append(f"note: {job.shortfall(rows)}, then score again.")
    counted = figures.gather(job, shards, true)
    why = figures.omitted(job, true, counted)
    readable = counted.labelled - counted.failed
    has_classes, has_top5 = "classes" not in why, "top5" not in why
    classes, macro, weighted = (
        figures.by_class(counted, card.labels) if has_classes else ((), None, None)
    )
    cells = zip(*(part.tolist() for part in counted.confusion()), strict=True)
    return Score(
        output=job.paths.output,
        model=card.name,
        truth=given,
        read_as=reading.kind,
        matched_by=found.matched_by,
        plan_id=frozen.plan_id,
        answer_id=frozen.answer_id,
        images=job.frozen.images,
        rows=rows,
        labelled=counted.labelled,
        failed=counted.failed,
        failed_by_status=dict(sorted(counted.failed_by_status.items())),
        unclassified=counted.unclassified,
        top1=figures.share(counted.correct, counted.labelled),
        top1_readable=figures.share(counted.correct, readable),
        top5=figures.share(counted.correct_in_top5, counted.labelled) if has_top5 else None,
        top5_readable=figures.share(counted.correct_in_top5, readable) if has_top5 else None,
        macro=macro,
        weighted=weighted,
        calibration=figures.calibration(counted) if "calibration" not in why else None,
        classes=classes,
        confusion=tuple(
            (true_id, predicted if predicted >= 0 else None, images)
            for true_id, predicted, images in (cells if has_classes else ())
        ),
        confusions=figures.confusions(job, shards, true, counted, card.labels)
        if has_classes
        else (),
        omitted=why,
        notes=tuple(notes),
    )


def _none_known(found: TrueValues, labels: Sequence[str], given: str) -> str:
    return (
        f"--truth {given}: the model knows none of the labels {_first(found.values)}. Its"
        f" labels are {_first(labels)}, its class ids 0 to {len(labels) - 1}."
    )


def _first(texts: Sequence[str]) -> str:
    more = ", …" if len(texts) > _NAMED else ""
    return printable(", ".join(map(repr, texts[:_NAMED]))) + more


def _notes(found: TrueValues, reading: values.Reading, classes: int) -> Iterator[str]:
    """Yield what users should know of how labels are read."""
    is_unknown = reading.class_ids == values.UNKNOWN
    used = np.bincount(found.codes, minlength=len(found.values))
    unknown = [found.values[at] for at in np.flatnonzero(is_unknown & (used > 0))]
    if unknown:
        is_one_off = reading.kind == "class ids" and str(classes) in unknown
        hint = ". Class ids start at 0" if is_one_off and "0" not in found.values else ""
        yield (
            f"note: labels that are not among the model's {reading.kind}: {len(unknown):,}"
            f" ({_first(unknown)}); images with them, not scored: {int(used[is_unknown].sum()):,}"
            f"{hint}"
        )


def save(job: OpenJob, found: Score) -> None:
    """Write `score.json`, which the report shows. Raises: OutputError."""
    job.store.write(job.paths.score, json.dumps(found.to_dict()).encode() + b"\n")


def read(job: OpenJob) -> Score | None:
    """Return the score that `save` wrote; None if there is none, or if it is of other rows or
    cannot be read.
    """
    try:
        data = job.store.read(job.paths.score)
        found = serialization.decode(data, Score, "score.json", OutputError)
    except (OSError, OutputError):
        return None
    ids = job.frozen.job.plan_id, job.frozen.job.answer_id
    return found if (found.plan_id, found.answer_id) == ids else None
