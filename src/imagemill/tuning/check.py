"""The accuracy check of faster precisions: decode, calibrate, compare with fp32, and write the
results to the bundle's `accuracy.json`.

`check_process` runs it in a process of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from imagemill.errors import counted
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.models.variants import Calibration, PrecisionRecord
from imagemill.pipeline.backends import library_versions, openvino_rewrites
from imagemill.pipeline.session_checks import check_model
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    AS_GIVEN,
    Access,
    Batch,
    Bundle,
    DeviceSpec,
    Entry,
    Limits,
    Precision,
    SessionSpec,
)
from imagemill.system import cpu
from imagemill.system.messages import Notify
from imagemill.tuning import accuracy, quantize
from imagemill.tuning.images import Decoder, Image, calibration_share, identity, sample

SPEEDUP: Final[Mapping[Precision, float]] = {Precision.INT8: 3.9, Precision.BF16: 2.0}
"""Over fp32, compute only, at best (docs/performance.md)."""
_CALIBRATING: Final = 3.0
"""Quantising costs about as much as this many fp32 images for each calibration image:
resnext101_32x4d 2, EfficientNet-Lite0 5 (CPU time, 2026-11-28).
"""
_STARTING_S: Final = 12.0
"""Importing, converting and compiling."""
_PROBE_S: Final = 2.0
_WARM_UP: Final = 8
"""Batches computed before a rate is measured."""
MIN_SPEEDUP: Final = 1.05
"""Measured speed-up from which an accepted precision is used."""
_LONG_ENOUGH_S: Final = 0.5
"""Shorter passes give no rate."""


class AccuracyCheck(Struct, frozen=True):
    """What to check, and on what."""

    bundle: Bundle
    """With the recipe that the job uses."""
    sources: tuple[str, ...]
    entries: tuple[Entry, ...]
    """Shuffled; more than are needed, since some cannot be read or are duplicates."""
    cores: tuple[int, ...]
    limits: Limits
    precisions: tuple[Precision, ...]
    """To check, in this order."""
    calibration: int
    """Images to calibrate on."""
    held_out: int
    """Other images to compare on."""
    min_agreement: float | None = None
    """Minimum lower end of the agreement's interval; None: each precision's default."""
    images: int | None = None
    """Of the job that must gain more than the accuracy check costs, and needs one precision only.
    None: check all precisions, whatever it costs.
    """
    truth: str | None = None
    """Where true labels are, as `--truth` says it."""
    batch_size: int = 4
    gpus: tuple[DeviceSpec, ...] = ()
    """The job's GPUs, all of one model; the first one is checked. Empty: the CPU is."""
    isolate: bool = False
    """Decode every image in a process of its own."""
    access: Access = AS_GIVEN
    known: Mapping[str, PrecisionRecord] = {}
    """The bundle's records when the accuracy check was asked for."""

    @property
    def wanted(self) -> int:
        """Number of entries to choose from the sources: twice as many as are needed, since some
        cannot be read and some are duplicates.
        """
        return 2 * (self.calibration + self.held_out)

    def with_sample(self, entries: Iterable[Entry]) -> AccuracyCheck:
        """Return the check with entries chosen from a listing of any length."""
        return replace(self, entries=tuple(sample(entries, self.wanted)[0]))


def cost_and_gain(
    precision: Precision,
    images: int,
    calibration: int,
    held_out: int,
    *,
    rate: float = 0.0,
    speedup: float | None = None,
) -> tuple[float, float]:
    """Return what checking a precision costs and what a job gains from the precision.

    Decoding takes the same time in both, so it plays no part.

    Args:
        precision: bf16 or int8.
        images: of the job.
        calibration: images to calibrate on.
        held_out: images to compare on, in fp32 and in the precision.
        rate: fp32 images/s of the model alone. 0 leaves out the time to start, as if the model were
            the slowest of all.
        speedup: over fp32; None: as much as the units can.

    Returns:
        both as numbers of fp32 images.
    """
    slower = 1 / (speedup or SPEEDUP[precision])
    calibrating = _CALIBRATING * calibration if precision is Precision.INT8 else 0.0
    return calibrating + held_out * (1 + slower) + _STARTING_S * rate, images * (1 - slower)


def carry_out(
    asked: AccuracyCheck,
    notify: Notify = lambda _: None,
    at: Callable[[float | None], None] = lambda _: None,
) -> dict[str, PrecisionRecord]:
    """Check the precisions in turn and write each result to the bundle's `accuracy.json`.

    Held in memory: the calibration and held-out images, 150 KB each at 224×224, and fp32's answers
    to the latter.

    Args:
        asked: what to check.
        notify: takes lines for the user.
        at: is called before each step with the seconds that it may take at most; None: not known.

    Returns:
        precision → record, of those that were checked now or before. Empty if no check is
        worthwhile.

    Raises:
        ModelError: the model cannot be compiled or quantised, or the bundle cannot be written.
        BadLogitsError: fp32 itself returns NaN for every image.
    """
    at(None)
    with variants.locked(asked.bundle.dir):
        now = variants.read(asked.bundle.dir)
        if asked.images is not None and not asked.gpus and now != asked.known:
            return {}  # another process wrote results while this one waited: the caller reads them
        from imagemill.tuning.on_gpus import GpuRun  # a subclass of `Run`

        return (GpuRun if asked.gpus else Run)(asked, now, notify, at).carry_out()


class Run:
    """One accuracy check under the bundle's lock; `now` is the bundle's `accuracy.json`."""

    def __init__(
        self,
        asked: AccuracyCheck,
        now: Mapping[str, PrecisionRecord],
        notify: Notify,
        at: Callable[[float | None], None],
    ) -> None:
        self._asked, self._now, self._notify, self._at = asked, now, notify, at
        self._onnx = asked.bundle.dir / bundles.MODEL
        calibration = asked.calibration if Precision.INT8 in asked.precisions else 0
        first = calibration_share(len(asked.entries), calibration, asked.held_out)
        self._first, self._rest = asked.entries[:first], asked.entries[first:]
        bundle, sources = asked.bundle, asked.sources
        self._held_out = identity(self._rest, asked.held_out, bundle, sources)
        self._calibrated_on = identity(self._first, calibration, bundle, sources)
        self._decoder = Decoder(
            asked.sources,
            asked.bundle.card.recipe,
            asked.limits,
            len(asked.cores),
            access=asked.access,
            isolate=asked.isolate,
            at=at,
        )

    def carry_out(self) -> dict[str, PrecisionRecord]:
        """Check the precisions; see the function of this name."""
        asked = self._asked
        records: dict[str, PrecisionRecord] = {}
        for precision in asked.precisions:
            if reused := self._reused(precision):
                self._note(f"{precision} was checked on these images before")
                records[precision.value] = reused
        wanted = [precision for precision in asked.precisions if precision.value not in records]
        if not wanted:
            return records
        if asked.images is not None and not (wanted := self._worthwhile(wanted, asked.images)):
            return records
        pixels: list[NDArray[np.uint8]] = []
        if Precision.INT8 in wanted:
            decoded = self._decoder.decode(self._first, asked.calibration)
            pixels = [image.pixels for image in decoded]
        held_out = list(self._decoder.decode(self._rest, asked.held_out))
        if self._decoder.duplicates:
            self._note(f"{self._decoder.duplicates:,} duplicate images were left out")
        if asked.truth:
            from imagemill.scoring.images import parse, true_classes  # imports PyArrow

            places = [(image.source, image.name) for image in held_out]
            self._true = true_classes(parse(asked.truth), places, asked.bundle.card.labels)
        reference, rate = self._answers(Precision.FP32, self._onnx, held_out)
        before = {file.name for file in asked.bundle.dir.glob("int8-*.xml")}
        for precision in wanted:
            record = self._check(precision, pixels, held_out, reference, rate)
            records[precision.value] = record
            if record.kept:
                name = record_name(precision, *asked.gpus[:1])
                self._now = variants.write(asked.bundle.dir, **{name: record})
            elif record.file and record.file not in before:  # else jobs may use it
                variants.remove(asked.bundle.dir / record.file)
            if record.comparison.accepted and asked.images is not None:
                break
        return records

    def _note(self, line: str) -> None:
        """Tell the user of `imagemill quantize` a detail. A job has one line before the check, and
        one after it.
        """
        if self._asked.images is None:
            self._notify(line)

    def _reused(self, precision: Precision) -> PrecisionRecord | None:
        """Return the bundle's record if it is of the same images, versions and processor, and its
        file is unchanged.
        """
        record, asked = self._usable(precision), self._asked
        if record is None or record.held_out != self._held_out:
            return None
        found = record.comparison
        if found.min_agreement != self._min_agreement(precision) or (
            asked.truth and (found.true is None or found.true.truth != asked.truth)
        ):
            return None
        if precision is Precision.INT8 and self._file_of_these_images() is None:
            return None
        return record

    def _file_of_these_images(self) -> Path | None:
        """Return the bundle's int8 file if it was made as this accuracy check would make it."""
        record = self._usable(Precision.INT8)
        if (
            record is None
            or record.file is None
            or record.calibration is None
            or record.calibration.id != self._calibrated_on
            or record.versions != quantize.versions()
        ):
            return None
        return self._asked.bundle.dir / record.file

    def _usable(self, precision: Precision) -> PrecisionRecord | None:
        asked = self._asked
        return usable(asked.bundle, precision, asked.gpus[0] if asked.gpus else None, self._now)

    def _min_agreement(self, precision: Precision) -> float:
        asked = self._asked.min_agreement
        return accuracy.MIN_AGREEMENT[precision] if asked is None else asked

    def _worthwhile(self, wanted: Sequence[Precision], images: int) -> list[Precision]:
        """Measure for some seconds, and return the precisions that are worth a check. bf16 is
        measured, not believed: on Intel processors whose AMX is switched off its instructions are
        there and slower than fp32's (0.55 × with resnext101_32x4d, OpenVINO 2026.4, 2026-11).
        """
        asked, rate = self._asked, self._rate(Precision.FP32)
        kept, lines = [], []
        for precision in wanted:
            speedup = SPEEDUP[precision]
            if precision is Precision.BF16:
                speedup = self._rate(Precision.BF16) / rate
            cost, gain = cost_and_gain(
                precision, images, asked.calibration, asked.held_out, rate=rate, speedup=speedup
            )
            if gain > cost:
                kept.append(precision)
                lines.append(
                    f"{precision} (takes about {cost / rate:,.0f} s, could save"
                    f" {gain / rate:,.0f} s)"
                )
        if kept:
            self._notify(
                f"checking whether {asked.bundle.card.name} keeps its answers in"
                f" {', else '.join(lines)}; later jobs use the result"
            )
        return kept

    def _rate(self, precision: Precision) -> float:
        """Return images/s, compute only, on random images."""
        self._at(None)
        recipe, size = self._asked.bundle.card.recipe, self._asked.batch_size
        shape = (size, recipe.height, recipe.width, 3)
        batch = Batch(np.random.default_rng(0).integers(0, 256, shape, np.uint8), size, ())
        with self._session(precision, self._onnx) as session:
            for _ in session.stream([batch] * _WARM_UP):
                pass
            begun, done = time.perf_counter(), 0

            def repeated() -> Iterator[Batch]:
                while time.perf_counter() - begun < _PROBE_S:
                    yield batch

            for some, _ in session.stream(repeated()):
                done += some.filled
            return done / (time.perf_counter() - begun)

    def _check(
        self,
        precision: Precision,
        pixels: Sequence[NDArray[np.uint8]],
        held_out: Sequence[Image],
        reference: NDArray[np.float32],
        fp32_rate: float,
    ) -> PrecisionRecord:
        asked, file = self._asked, self._onnx
        if precision is Precision.INT8:
            file = self._quantise(pixels)
        answers, rate = self._answers(precision, file, held_out)
        found = accuracy.compare(
            reference,
            answers,
            asked.bundle.card.scores,
            min_agreement=self._min_agreement(precision),
            names=[image.name for image in held_out],
            labels=asked.bundle.card.labels,
        )
        if asked.truth:
            measured = accuracy.true_accuracy(asked.truth, self._true, reference, answers)
            found = replace(found, true=measured)
        card = asked.bundle.card
        versions, unit, group_channels = _circumstances(precision, *asked.gpus[:1])
        rates = (round(rate, 2), round(fp32_rate, 2))
        record = PrecisionRecord(
            found, self._held_out, card.sha256, versions, unit, card.recipe, group_channels, *rates
        )
        if precision is Precision.INT8:
            record = replace(
                record,
                file=file.name,
                sha256=variants.digest(file),
                calibration=Calibration(self._calibrated_on, len(pixels)),
            )
        return replace(record, kept=not self._has_better(precision, record))

    def _quantise(self, pixels: Sequence[NDArray[np.uint8]]) -> Path:
        if file := self._file_of_these_images():
            return file
        self._note(f"quantising on {counted(len(pixels), 'image')}")
        self._at(None)
        return quantize.save(quantize.quantize(self._onnx, pixels), self._asked.bundle.dir)

    def _has_better(self, precision: Precision, record: PrecisionRecord) -> bool:
        """Return whether a record of too few images must not replace the bundle's: that one was
        accepted, or calibrated on more images, or on as many and compared on more.
        """
        if record.comparison.is_verdict or (before := self._usable(precision)) is None:
            return False
        return _rank(before) > _rank(record)

    @contextlib.contextmanager
    def _session(self, precision: Precision, file: Path) -> Iterator[Any]:
        from imagemill.pipeline.backends import open_session

        asked = self._asked
        spec = SessionSpec(str(file), asked.bundle.card, precision, asked.batch_size)
        device = DeviceSpec("cpu#check", "cpu", "openvino", asked.cores)
        device = asked.gpus[0] if asked.gpus else device
        with contextlib.closing(open_session(spec, device, Stopwatch())) as session:
            if precision is Precision.FP32:
                check_model(session.stream, spec)
            yield session

    def _answers(
        self, precision: Precision, file: Path, images: Sequence[Image]
    ) -> tuple[NDArray[np.float32], float]:
        """Return logits, float32 (n, classes), and images/s; 0 if there are too few images."""
        self._at(None)
        if not images:
            return np.zeros((0, len(self._asked.bundle.card.labels)), np.float32), 0.0
        with self._session(precision, file) as session:
            for _ in session.stream(islice(self._batches(images), _WARM_UP)):
                pass
            begun = time.perf_counter()
            logits = [outputs.logits for _, outputs in session.stream(self._batches(images))]
            seconds = time.perf_counter() - begun
        return np.concatenate(logits), len(images) / seconds if seconds > _LONG_ENOUGH_S else 0.0

    def _batches(self, images: Sequence[Image]) -> Iterator[Batch]:
        """Yield fixed-size batches, the last one padded."""
        size = self._asked.batch_size
        for start in range(0, len(images), size):
            some = [image.pixels for image in images[start : start + size]]
            padding = [np.zeros_like(some[0])] * (size - len(some))
            yield Batch(np.concatenate([*some, *padding]), len(some), ())


def _rank(record: PrecisionRecord) -> tuple[bool, int, int]:
    """Return what orders records, the better one last."""
    calibrated_on = record.calibration.images if record.calibration else 0
    return record.comparison.accepted, calibrated_on, record.comparison.images


def record_name(precision: Precision, gpu: DeviceSpec | None = None) -> str:
    """Return the name of a precision's record in `accuracy.json`."""
    return precision.value if gpu is None else f"{precision} on {gpu.model}"


def usable(
    bundle: Bundle,
    precision: Precision,
    gpu: DeviceSpec | None = None,
    records: Mapping[str, PrecisionRecord] | None = None,
) -> PrecisionRecord | None:
    """Return the bundle's record of a precision if it is of this model, preprocessing, library
    version and kind of processor or GPU, and its int8 file is unchanged; else None.

    It holds for any background: a background changes few images and none of the arithmetic.

    Args:
        bundle: its card with the recipe that the job uses.
        precision: of the record.
        gpu: the record's device; None: the CPU.
        records: of the bundle; None: read now.

    Raises:
        ModelError: `accuracy.json` cannot be read.
    """
    records = variants.read(bundle.dir) if records is None else records
    record = records.get(record_name(precision, gpu))
    if record is None:
        return None
    versions, unit, group_channels = _circumstances(precision, gpu)
    decisive = versions if gpu else ("openvino",)
    holds = (
        record.model == bundle.card.sha256
        and replace(record.recipe, background=None) == replace(bundle.card.recipe, background=None)
        and all(record.versions.get(name) == versions.get(name) for name in decisive)
        and record.instruction_set == unit
        and record.group_channels == group_channels
    )
    if holds and precision is Precision.INT8:
        holds = variants.int8_file(bundle.dir, record) is not None
    return record if holds else None


def is_fast(record: PrecisionRecord) -> bool:
    """Return whether a precision makes enough images/s to be used, or was not measured."""
    return record.speedup is None or record.speedup >= MIN_SPEEDUP


def _circumstances(
    precision: Precision, gpu: DeviceSpec | None = None
) -> tuple[Mapping[str, str], str, int]:
    """Return what a record depends on beside the model, because answers differ with it: library
    versions, the processor's widest unit or the model of the GPU, and the width of merged groups.
    """
    if gpu is not None:
        return library_versions(gpu.backend), gpu.model, 0
    group_channels = openvino_rewrites.wanted(precision, cpu.flags())
    unit = next(iter(cpu.vector_units(cpu.flags())), "plain")
    return quantize.versions(), unit, group_channels
