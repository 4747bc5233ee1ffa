"""MLPerf's LoadGen, Offline scenario, on one imagemill session: its own clock, its own logs, its
own verdict.

    pip install 'mlcommons-loadgen>=5'
    python benchmarks/loadgen.py --model efficientnet_lite0 --min-duration 60 --log-dir logs

First a performance run, then an accuracy run in which each answer, in LoadGen's shuffled order, is
compared with the one that the session gives for the same images in order. The images are noise:
decoding is not part of it. MLPerf's rules for submissions want 600 s.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import numpy as np

from imagemill.bench.measure import synthetic_session
from imagemill.bench.records import BenchSettings
from imagemill.models import bundle, resolve
from imagemill.pipeline.backends import devices, open_session
from imagemill.pipeline.backends.base import Session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Recipe
from imagemill.tuning.batch_size import resolved

IMAGES = 64
"""In LoadGen's library of samples."""
HEADROOM = 1.5
"""A run is planned for this many times the measured rate, because the machine may speed up."""


class Driven:
    """A session as LoadGen's system under test, over a library of noise."""

    def __init__(self, session: Session, batch_size: int, recipe: Recipe) -> None:
        self.session, self.size = session, batch_size
        shape = (IMAGES, recipe.height, recipe.width, 3)
        self.library = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self.failures: list[Exception] = []

    def class_ids(self, indices: Sequence[int]) -> list[int]:
        """The session's answers for images of the library, in the order given."""
        found: list[int] = []
        self._stream(indices, lambda _, ids: found.extend(ids.tolist()))
        return found

    def issue(self, samples: Sequence[Any]) -> None:
        """Answer LoadGen's samples. An exception must not cross LoadGen, which would end the
        process: it waits for every answer.
        """
        waiting = deque(samples)

        def answer(count: int, ids: np.ndarray) -> None:
            answers = ids.astype(np.int32)  # kept until LoadGen has copied them
            address = answers.ctypes.data
            group = [waiting.popleft() for _ in range(count)]
            lg.QuerySamplesComplete(
                [
                    lg.QuerySampleResponse(s.id, address + 4 * place, 4)
                    for place, s in enumerate(group)
                ]
            )

        try:
            self._stream([sample.index for sample in samples], answer)
        except Exception as error:
            self.failures.append(error)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in waiting])

    def _stream(self, indices: Sequence[int], take: Callable[[int, np.ndarray], None]) -> None:
        for batch, outputs in self.session.stream(
            self._batch(indices[at : at + self.size]) for at in range(0, len(indices), self.size)
        ):
            take(batch.filled, outputs.logits.argmax(axis=1))

    def _batch(self, indices: Sequence[int]) -> Batch:
        pixels = np.zeros((self.size, *self.library.shape[1:]), np.uint8)
        pixels[: len(indices)] = self.library[list(indices)]
        return Batch(pixels, len(indices), ())


def run(
    driven: Driven, folder: Path, min_duration_s: float, rate: float, *, accuracy: bool
) -> dict[str, str]:
    """One run of the Offline scenario; returns LoadGen's summary by name."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, logging = lg.TestSettings(), lg.LogSettings()
    settings.scenario = lg.TestScenario.Offline
    settings.mode = lg.TestMode.AccuracyOnly if accuracy else lg.TestMode.PerformanceOnly
    settings.offline_expected_qps = rate * HEADROOM
    settings.min_duration_ms = round(1000 * min_duration_s)
    logging.log_output.outdir = str(folder)
    logging.log_output.copy_summary_to_stdout = False
    logging.enable_trace = False
    system = lg.ConstructSUT(driven.issue, lambda: None)
    samples = lg.ConstructQSL(IMAGES, IMAGES, lambda _: None, lambda _: None)
    try:
        lg.StartTestWithLogSettings(system, samples, settings, logging)
    finally:
        lg.DestroyQSL(samples)
        lg.DestroySUT(system)
    if driven.failures:
        raise driven.failures[0]
    lines = (folder / "mlperf_log_summary.txt").read_text().splitlines()
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in lines)
        if colon
    }


def perform(driven: Driven, folder: Path, min_duration_s: float, rate: float) -> dict[str, str]:
    """Return the summary of a performance run of at least `min_duration_s`, planned for `rate`.

    `rate` was measured within milliseconds and can be too low by any factor, on a machine that does
    something else meanwhile. A run that ends too early is repeated with twice as many samples.
    """
    while True:
        summary = run(driven, folder, min_duration_s, rate, accuracy=False)
        if summary["Min duration satisfied"] == "Yes":
            return summary
        rate = 2 * max(rate, float(summary["Samples per second"]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnext101_32x4d")
    parser.add_argument("--models-dir", type=Path, default=bundle.default_models_dir())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--min-duration", type=float, default=10.0, help="seconds")
    parser.add_argument("--log-dir", type=Path, default=Path("imagemill-loadgen"))
    asked = parser.parse_args()
    (device,) = devices.resolve(asked.device)
    settings = BenchSettings(synthetic=True, model=asked.model, precision=asked.precision)
    spec = resolved(
        synthetic_session(settings, resolve.resolve(asked.model, asked.models_dir), [device]),
        [device],
    )
    driven = Driven(open_session(spec, device, Stopwatch()), spec.batch_size, spec.card.recipe)
    in_order = driven.class_ids(range(IMAGES))  # warms up, too
    begun = time.monotonic()
    driven.class_ids(range(IMAGES))
    rate = IMAGES / (time.monotonic() - begun)
    summary = perform(driven, asked.log_dir / "performance", asked.min_duration, rate)
    run(driven, asked.log_dir / "accuracy", asked.min_duration, rate, accuracy=True)
    log = json.loads((asked.log_dir / "accuracy" / "mlperf_log_accuracy.json").read_text())
    same = sum(
        in_order[entry["qsl_idx"]] == int.from_bytes(bytes.fromhex(entry["data"]), "little")
        for entry in log
    )
    print(
        f"{spec.card.name} in {spec.precision} on {device.name} ({device.engine}), batches of"
        f" {spec.batch_size}"
    )
    print(
        f"LoadGen: {float(summary['Samples per second']):,.1f} samples/s, {summary['Result is']};"
        f" the session just before: {rate:,.1f}"
    )
    print(
        f"accuracy mode: {same} of {len(log)} answers are those of the images in order; logs:"
        f" {asked.log_dir}"
    )
    return 0 if summary["Result is"] == "VALID" and same == len(log) else 1


if __name__ == "__main__":
    raise SystemExit(main())
