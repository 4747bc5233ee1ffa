"""The preflight of a new job: a sample of its images, decoded while the workers start.

A daemon thread reads images chosen at random from the plan and decodes them in an
`IsolatedDecoder`, so an image that crashes or hangs its decoder harms neither the job nor the
display. The launcher calls `Sampler` at each tick. It prints the share of unreadable images once
the sample is complete, and the expected time and size of the results once the job has shown its
rate.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from imagemill.display.pace import Pace
from imagemill.display.text import format_duration, format_statuses
from imagemill.errors import counted
from imagemill.job import plan
from imagemill.job.paths import JobPaths
from imagemill.pipeline import sources
from imagemill.records import BadImage, Job, Preflight, Progress, Saved, Shard, Status
from imagemill.system.statistics import wilson

_log = logging.getLogger(__name__)

MIN_IMAGES: Final = 5_000
"""Smaller jobs have no preflight. Starting the decoder takes 0.35 s of CPU time; with one image in
`_ONE_IN` that is 2 % of 5,000 images at 5 ms each (EfficientNet-Lite0, one Xeon core, 2026-11).
"""
_ONE_IN: Final = 100
_MAX_SAMPLE: Final = 300
_MIN_SAMPLE: Final = 10
"""A smaller sample, cut off by the time limit, is not reported."""
_TIME_LIMIT_S: Final = 20.0
_IMAGE_LIMIT_S: Final = 5.0
"""For decoding one image, so that one image that hangs leaves time for others."""
_SETTLE_S: Final = 5.0
"""How long the rate of the job is measured before it is used for the estimate."""


def sample_size(images: int) -> int:
    """Return how many images of a new job are sampled; 0 for small jobs."""
    return 0 if images < MIN_IMAGES else min(_MAX_SAMPLE, images // _ONE_IN)


class Sampler:
    """Samples the images of a new job, all of whose shards it is given, and prints estimates. Call
    it with every `Progress`.

    A failure of the sample ends the sample only: it is logged, and nothing is raised.
    """

    def __init__(
        self,
        job: Job,
        shards: Sequence[Shard],
        notify: Callable[[str], None],
    ) -> None:
        self._job, self._shards, self._notify = job, shards, notify
        self._images = sum(shard.count for shard in shards)
        self._statuses: list[Status] = []
        self._pace: Pace | None = None
        self._pace_from_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.found: Preflight | None = None
        """The estimates printed so far; None before the first one."""
        if sample_size(self._images):
            self._deadline = time.monotonic() + _TIME_LIMIT_S
            thread = threading.Thread(target=self._sample, name="preflight", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:  # the system has no thread left
                _log.warning("no preflight: %s", error)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(0.5)  # usually ends the decoder; a thread that hangs is left alone

    def __call__(self, progress: Progress) -> None:
        """Print the estimates that can be made now."""
        if self._thread is None:
            return
        if self._pace is None:
            if not self._thread.is_alive() or time.monotonic() > self._deadline:
                self._stop.set()
                self._report_unreadable()
                # The sample slows the workers down, so their rate is measured from now on.
                self._pace = Pace(self._images, 0)
                self._pace_from_s = progress.since_first_lease_s
        elif self.found is not None and self.found.seconds is None:
            self._report_time(self._pace, progress)

    def _sample(self) -> None:
        from imagemill.pipeline.decoding.isolated import IsolatedDecoder  # imports NumPy and Pillow

        job = self._job
        limits = replace(job.limits, max_seconds=min(job.limits.max_seconds, _IMAGE_LIMIT_S))
        firsts = [shard.first for shard in self._shards]
        # At random, so that a sample that is cut off is still spread over the whole plan.
        chosen = random.Random(0).sample(  # noqa: S311 - nothing secret
            range(self._images), sample_size(self._images)
        )
        try:
            folder = JobPaths.of(job.output).plan
            opened = sources.open_all(job.sources, index_dir=folder, access=job.access)
            with IsolatedDecoder() as decoder:
                # Starts it before the clock runs.
                decoder.decode(b"", job.session.card.recipe, limits)
                for index in chosen:
                    if self._stop.is_set():
                        return
                    shard = self._shards[bisect_right(firsts, index) - 1]
                    row = plan.read(folder, shard)[index - shard.first]
                    try:
                        data = opened[row.source].fetch(row.path, row.locator, limits.max_bytes)
                    except BadImage as bad:
                        self._statuses.append(bad.status)
                        continue
                    answer = decoder.decode(data, job.session.card.recipe, limits)
                    self._statuses.append(answer.status)
        except Exception:
            _log.warning("the preflight failed after %d images", len(self._statuses), exc_info=True)

    def _report_unreadable(self) -> None:
        sampled = list(self._statuses)
        if len(sampled) < _MIN_SAMPLE:
            _log.warning("the preflight is not used: only %d images were sampled", len(sampled))
            return
        bad = Counter(status.value for status in sampled if status is not Status.OK)
        low, high = wilson(bad.total(), len(sampled))
        self.found = Preflight(
            sampled=len(sampled),
            unreadable=dict(sorted(bad.items())),
            unreadable_low=round(low, 4),
            unreadable_high=round(high, 4),
        )
        count = f"{bad.total()} unreadable ({format_statuses(bad)})" if bad else "all readable"
        share = f"{100 * low:.1f} to {100 * high:.1f} %" if bad else f"at most {100 * high:.1f} %"
        self._notify(
            f"preflight: {len(sampled)} of {counted(self._images, 'image')} sampled, {count}"
        )
        self._notify(f"preflight: estimated unreadable images: {share} (95 % confidence)")

    def _report_time(self, pace: Pace, progress: Progress) -> None:
        estimate = pace.add(progress)
        settled = progress.since_first_lease_s >= self._pace_from_s + _SETTLE_S
        if not settled or estimate.rate is None or estimate.left_s is None:
            return
        from rich.filesize import decimal

        assert self.found is not None
        seconds, size = progress.since_first_lease_s + estimate.left_s, self._result_bytes()
        self.found = replace(
            self.found,
            images_per_second=round(estimate.rate, 3),
            seconds=round(seconds, 1),
            result_bytes=size,
        )
        results = f", results {decimal(size)}" if size else ""
        self._notify(
            f"preflight: estimated time {format_duration(seconds)} at {estimate.rate:,.1f}"
            f" images/s{results}"
        )

    def _result_bytes(self) -> int | None:
        """Return the estimated size of all parts; None if embeddings of unknown size are saved."""
        if Saved.EMBEDDING in self._job.session.save:
            return None
        ok = self._statuses.count(Status.OK) / len(self._statuses)
        classes = len(self._job.session.card.labels)
        # Approximate bytes after compression: of a row, of each of its top-k classes, of each
        # logit, and of a part without rows.
        logits = 3.7 * classes if Saved.LOGITS in self._job.session.save else 0.0
        row = 25 + ok * (9 * min(self._job.top_k, classes) + logits)
        return round(self._images * row + 5_000 * len(self._shards))
