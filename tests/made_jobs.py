"""Finished jobs whose answers a test chooses, made in this process: no worker, no decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from imagemill.display.observer import Watcher
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.models import bundle
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.sink import Sink
from imagemill.pipeline.sources.base import shown
from imagemill.records import Batch, Bundle, Outputs, Row, Settings, Shard, Status, TopK
from imagemill.runner import freeze

Answer = tuple[int, float] | list[tuple[int, float]] | Status
"""Class and probability of the image's only class, those of its top classes, or why it has none."""


def made_job(
    settings: Settings,
    model: Bundle,
    answer: Callable[[bytes], Answer],
    labels: Sequence[str] = (),
) -> OpenJob:
    """Return a job whose every image has the answer that `answer` returns for its path."""
    if labels:
        model = replace(model, card=replace(model.card, labels=tuple(labels)))
    job = frozen_job(settings, model)
    for shard in job.shards:
        write_part(job, shard, answer)
    return job


def frozen_job(settings: Settings, model: Bundle) -> OpenJob:
    """Return a job with a plan and without rows."""
    store = open_store(JobPaths.of(settings.output))
    for folder in (store.paths.plan, store.paths.predictions, store.paths.logs):
        folder.mkdir(parents=True)
    chosen = "null", devices.resolve("null")
    return freeze.freeze(settings, store, lambda _: chosen, model, Watcher())


def write_part(job: OpenJob, shard: Shard, answer: Callable[[bytes], Answer]) -> None:
    """Commit one shard's part."""
    opened = sources.open_all(job.frozen.job.sources)
    rows, found = [], []
    for planned in job.rows(shard):
        given = answer(planned.path)
        failed = given if isinstance(given, Status) else None
        row = Row(
            planned.index,
            shard,
            opened[planned.source].name,
            shown(planned.path),
            failed or Status.OK,
            failed and "because",
            None if failed else 40,
            None if failed else 30,
            -1 if failed else len(found),
            planned.kept,
        )
        rows.append(row)
        if not isinstance(given, Status):
            found.append(given if isinstance(given, list) else [given] if given[0] >= 0 else [])
    k = job.frozen.job.top_k
    ids, probabilities = np.zeros((len(found), k), np.int32), np.zeros((len(found), k), np.float32)
    for place, answers in enumerate(found):
        for rank, (class_id, probability) in enumerate(answers):
            ids[place, rank], probabilities[place, rank] = class_id, probability
    counts = np.array([len(answers) for answers in found], np.intp)
    top = TopK(ids, probabilities, counts, Outputs(np.zeros((len(found), 0), np.float32)))
    batch = Batch(np.zeros((len(found), 1, 1, 3), np.uint8), len(found), tuple(rows))
    for part in Sink(job.frozen.job, "null@null", {}).write(batch, top):
        part.commit()


def settings_of(*places: Path | str, output: Path, models_dir: Path) -> Settings:
    """Return settings for `made_job`."""
    return Settings(
        tuple(map(os.fspath, places)),
        str(output),
        "tiny",
        str(models_dir),
        "null",
        shard_size=4,
        top_k=1,
    )


def tiny(models_dir: Path) -> Bundle:
    """Return the tiny model of the tests."""
    return bundle.load(models_dir / "tiny")
