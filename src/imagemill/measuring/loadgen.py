"""MLPerf's LoadGen in the process that measures: it hands out samples, the session answers them.

The other half, which says what to run and reads the logs, is `bench/loadgen.py`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.errors import SourceError
from imagemill.measuring.records import Measured, Offline
from imagemill.records import Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imagemill.records import Batch
    from imagemill.sessions.base import Session

ALONE = "imagemill_class_ids.json"
"""In the folder of an accuracy run: the class ids that the session gives in the plain order of the pictures."""


def offline(session: Session, job: Job, order: Offline) -> Measured:
    """Let LoadGen drive a session; returns when its logs are written.

    Returns:
        how many pictures its library holds, and when the test began and ended.

    Raises:
        SourceError: none of the pictures can be read. ImagemillError: whatever the session raised.
    """
    import mlperf_loadgen as lg
    import numpy as np

    library = _library(job, order)
    failures: list[Exception] = []

    def issue(samples: Sequence[Any]) -> None:
        waiting = deque(samples)
        try:
            groups = [list(samples[start : start + job.batch_size]) for start in range(0, len(samples), job.batch_size)]
            batches = (_batch(library, [sample.index for sample in group], job.batch_size) for group in groups)
            for group, (_, outputs) in zip(groups, session.stream(batches), strict=True):
                answers = outputs.logits.argmax(axis=1).astype(np.int32)  # kept until LoadGen has copied them
                address = answers.ctypes.data
                lg.QuerySamplesComplete([lg.QuerySampleResponse(s.id, address + 4 * place, 4) for place, s in enumerate(group)])
                for _ in group:
                    waiting.popleft()
        except Exception as error:  # must not cross LoadGen, which would end the process; it waits for every answer
            failures.append(error)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in waiting])

    settings, logging = lg.TestSettings(), lg.LogSettings()
    settings.scenario = lg.TestScenario.Offline
    settings.mode = lg.TestMode.AccuracyOnly if order.accuracy else lg.TestMode.PerformanceOnly
    settings.offline_expected_qps = order.expected_rate
    settings.min_duration_ms = round(1000 * order.min_duration_s)
    logging.log_output.outdir = order.log_dir
    logging.log_output.copy_summary_to_stdout = False
    logging.enable_trace = False
    system = lg.ConstructSUT(issue, lambda: None)
    samples = lg.ConstructQSL(len(library), len(library), lambda _: None, lambda _: None)
    begun = time.monotonic()
    try:
        lg.StartTestWithLogSettings(system, samples, settings, logging)
    finally:
        lg.DestroyQSL(samples)
        lg.DestroySUT(system)
    if failures:
        raise failures[0]
    ended = time.monotonic()
    if order.accuracy:
        size, count = job.batch_size, len(library)
        plain = (_batch(library, range(start, min(start + size, count)), size) for start in range(0, count, size))
        alone = [int(class_id) for _, outputs in session.stream(plain) for class_id in outputs.logits.argmax(axis=1)]
        (Path(order.log_dir) / ALONE).write_text(json.dumps(alone))
    return Measured(len(library), begun, ended)


def _library(job: Job, order: Offline) -> list[NDArray[np.uint8]]:
    """The samples: uint8 (size, size, 3) each; decoded pictures, or noise."""
    import numpy as np

    from imagemill import sources
    from imagemill.images.feed import Feed
    from imagemill.stopwatch import Stopwatch

    if order.pictures is None:
        noise = np.random.default_rng(0)
        return list(noise.integers(0, 256, (order.samples, job.card.recipe.size, job.card.recipe.size, 3), np.uint8))
    with Feed(job.card, job.limits, job.batch_size, max(1, job.num_workers), None, Stopwatch()) as feed:
        batches = feed.batches(sources.read(order.pictures.leases, order.pictures.job))
        found = [picture for batch in batches for picture in batch.pixels[: batch.filled]]
    if not found:
        raise SourceError("none of the pictures can be read. Give other pictures.")
    return found


def _batch(library: Sequence[NDArray[np.uint8]], indices: Sequence[int], size: int) -> Batch:
    import numpy as np

    from imagemill.records import Batch

    pixels = np.zeros((size, *library[0].shape), np.uint8)
    for place, index in enumerate(indices):
        pixels[place] = library[index]
    return Batch(pixels, len(indices), ())
