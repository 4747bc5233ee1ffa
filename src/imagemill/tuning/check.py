"""The accuracy check of faster precisions: decode, calibrate, compare with fp32, and write the
results to the bundle's `accuracy.json`.

`check_process` runs it in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from imagemill.errors import ModelError
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.models.variants import (
    Attempt,
    Calibration,
    Comparison,
    PrecisionRecord,
    Precisions,
)
from imagemill.pipeline import sources, top_k
from imagemill.pipeline.backends import openvino_rewrites
from imagemill.pipeline.decoding import DECODER
from imagemill.pipeline.decoding.pillow import limit_pillow
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import (
    AS_GIVEN,
    Access,
    Batch,
    Bundle,
    DeviceSpec,
    Entry,
    IsolationReason,
    Limits,
    PlannedImage,
    Precision,
    Recipe,
    SessionSpec,
    Shard,
)
from imagemill.system import cpu, serialization
from imagemill.tuning import accuracy, quantize

Say = Callable[[str], None]

SPEEDUP: Final[Mapping[Precision, float]] = {Precision.INT8: 3.9, Precision.BF16: 2.0}
"""Over fp32, compute only, at best (docs/performance.md)."""
_CALIBRATING: Final = 2.0
"""Quantising costs as much as this many fp32 images for each that it calibrates on:
resnext101_32x4d, 300 images in 48 s at 12.5/s.
"""
_STARTING_S: Final = 12.0
"""Importing, converting and compiling."""
_PROBE_S: Final = 2.0
_SLACK_S: Final = 60.0
_PRESETS: Final = ("performance", "mixed")
_WORST: Final = (0.05, 0.15)
"""Shares of the layers that the third and fourth attempt leave in fp32."""
_LOOKED_AT: Final = 8
"""Images that the layers' sensitivities are measured on."""
_SORTED_RUN: Final = 64
_WARM_UP: Final = 8
"""Batches computed before a rate is measured."""
_LONG_ENOUGH_S: Final = 0.5
"""Shorter passes say nothing about a rate."""


@dataclass(frozen=True, slots=True)
class AccuracyCheck:
    """What to try, and on what."""

    bundle: Bundle
    """With the recipe that the job uses."""
    sources: tuple[str, ...]
    entries: tuple[Entry, ...]
    """Spread evenly over the listing; some more than are needed, since some cannot be read."""
    cores: tuple[int, ...]
    limits: Limits
    precisions: tuple[Precision, ...]
    """To try, in this order."""
    calibration: int
    """Images to calibrate on."""
    held_out: int
    """Other images to compare on."""
    attempts: int = 4
    """Ways of quantising to try at most, as long as none is accepted."""
    images: int | None = None
    """Of the job that must gain more than the accuracy check costs, and needs one precision only.
    None: check all precisions, whatever it costs.
    """
    batch_size: int = 4
    isolate: bool = False
    """Decode every image in a disposable process."""
    access: Access = AS_GIVEN
    known: Precisions = field(default_factory=Precisions)
    """The bundle's records when the accuracy check was asked for."""


def instruction_set(flags: set[str] | None = None) -> str:
    """The widest int8 or bf16 unit of the processor: answers, and so results, may differ between
    processors that differ in it.
    """
    flags = cpu.flags() if flags is None else flags
    return next(iter(cpu.vector_units(flags)), "plain")


def spent_images(precision: Precision, calibration: int, held_out: int, speedup: float) -> float:
    """Return the cost of checking a precision, in fp32 images: calibrating, and computing the
    held-out images in fp32 and in the precision.
    """
    calibrating = _CALIBRATING * calibration if precision is Precision.INT8 else 0.0
    return calibrating + held_out * (1 + 1 / speedup)


def gained_images(images: int, speedup: float) -> float:
    """What a job gains from a precision, in fp32 images. Decoding is the same in both, and so plays
    no part.
    """
    return images * (1 - 1 / speedup)


def is_worthwhile(
    precision: Precision,
    images: int,
    calibration: int,
    held_out: int,
    *,
    rate: float = 0.0,
    speedup: float | None = None,
) -> bool:
    """Return whether a job saves more time with a precision than its accuracy check takes.

    Args:
        precision: bf16 or int8.
        images: of the job.
        calibration: images to calibrate on.
        held_out: images to compare on.
        rate: fp32 images/s of the model alone. 0 asks whether it could pay for the slowest of
        models.
        speedup: over fp32; None: as much as the units can.
    """
    speedup = speedup or SPEEDUP[precision]
    return (
        gained_images(images, speedup)
        > spent_images(precision, calibration, held_out, speedup) + _STARTING_S * rate
    )


def split(available: int, calibration: int, held_out: int) -> tuple[list[int], list[int]]:
    """Divide positions 0 … available−1 between calibration and comparison: disjoint, both spread
    evenly, the same every time.

    Where there are more than both need, both get spares in proportion; where there are fewer,
    calibration gets up to four fifths. Both lists come shuffled with a fixed seed, so that stopping
    early leaves out no part of the listing.
    """
    wanted = calibration + held_out
    share = (
        available * calibration // wanted
        if available >= wanted > 0
        else min(calibration, max(min(available, 1), available * 4 // 5))
    )
    first = [
        place
        for place in range(available)
        if (place + 1) * share // available > place * share // available
    ]
    chosen = set(first)
    rest = [place for place in range(available) if place not in chosen]
    shuffled = [np.random.default_rng(0).permutation(places).tolist() for places in (first, rest)]
    return shuffled[0], shuffled[1]


def identity(entries: Iterable[Entry], count: int, bundle: Bundle) -> str:
    """Hash of what decides a set of pixel arrays: paths, sizes, how many at most, recipe and
    decoder.
    """
    state = hashlib.sha256(
        json.dumps([count, serialization.to_plain(bundle.card.recipe), DECODER]).encode()
    )
    for entry in entries:
        state.update(b"%d\0%b\0%d\n" % (entry.source, entry.path, entry.size))
    return state.hexdigest()[:16]


def carry_out(
    asked: AccuracyCheck,
    say: Say = lambda _: None,
    at: Callable[[float | None], None] = lambda _: None,
) -> dict[str, PrecisionRecord]:
    """Try the precisions in turn and write each result to the bundle's `accuracy.json`.

    Held in memory: the calibration and held-out images, 150 KB each at 224×224, and fp32's answers
    to the latter.

    Args:
        asked: what to measure.
        say: takes lines for the user.
        at: told before each step how long it may take at most, seconds; None: not known.

    Returns:
        precision → record, of those that were tried or found measured already. Empty where trying
        does not pay.

    Raises:
        ModelError: the model cannot be compiled or quantised, or the bundle cannot be written.
        BadLogitsError: fp32 itself returns NaN for every image.
    """
    at(None)
    with variants.locked(asked.bundle.dir):
        now = variants.read(asked.bundle.dir)
        if asked.images is not None and now != asked.known:
            return {}  # another process wrote results while this one waited: the caller reads them
        return _Run(asked, now, say, at).carry_out()


def calibration_pixels(asked: AccuracyCheck) -> list[NDArray[np.uint8]]:
    """Decode what an accuracy check would calibrate on: uint8 (1, height, width, 3) each."""
    return _Run(asked, Precisions(), lambda _: None, lambda _: None).calibration_pixels()


@dataclass(frozen=True, slots=True)
class _Candidate:
    scheme: quantize.Scheme
    file: Path
    key: str
    comparison: Comparison
    rate: float
    """images/s, compute only."""


class _Measurements:
    """The images of one accuracy check, decoded, and the answers and rates of its precisions."""

    def __init__(
        self, asked: AccuracyCheck, now: Precisions, say: Say, at: Callable[[float | None], None]
    ) -> None:
        self._asked, self._now, self._say, self._at = asked, now, say, at
        self._onnx = asked.bundle.dir / bundles.MODEL
        calibration = asked.calibration if Precision.INT8 in asked.precisions else 0
        first, rest = split(len(asked.entries), calibration, asked.held_out)
        self._first, self._rest = (
            [asked.entries[place] for place in first],
            [asked.entries[place] for place in rest],
        )
        self._held_out = identity(self._rest, asked.held_out, asked.bundle)
        self._calibrated_on = identity(self._first, calibration, asked.bundle)

    def _rate(self, precision: Precision, pixels: Sequence[NDArray[np.uint8]]) -> float:
        """images/s, compute only."""
        self._at(None)
        batches = list(self._batches(pixels))
        with self._session(precision, self._onnx) as session:
            for _ in session.stream(batches[:_WARM_UP]):
                pass
            begun, done = time.perf_counter(), 0

            def enough() -> Iterator[Batch]:
                while time.perf_counter() - begun < _PROBE_S:
                    yield from batches[:_WARM_UP]

            for batch, _ in session.stream(enough()):
                done += batch.filled
            return done / (time.perf_counter() - begun)

    # Images.

    def _pixels(self, entries: Sequence[Entry], wanted: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the first `wanted` of the entries that can be decoded, uint8 (1, height, width, 3)
        each.
        """
        asked = self._asked
        patience_s = (4 if asked.isolate else 1) * asked.limits.max_seconds + _SLACK_S
        opened = sources.open_all(asked.sources, access=asked.access)
        nowhere = Shard(0, 0, len(entries), 0, "", 0)

        def images() -> Iterator[PlannedImage]:
            for index, entry in enumerate(_nearly_in_order(entries)):
                fetch = partial(
                    opened[entry.source].fetch, entry.path, entry.locator, asked.limits.max_bytes
                )
                name = opened[entry.source].name
                yield PlannedImage(
                    index,
                    nowhere,
                    name,
                    entry.path,
                    entry.size,
                    fetch,
                    IsolationReason.CRASH if asked.isolate else None,
                )

        limit_pillow(asked.limits)
        with Feed(
            asked.bundle.card.recipe, asked.limits, 1, len(asked.cores), None, Stopwatch()
        ) as feed:
            self._at(patience_s)
            for batch in feed.batches(images()):
                self._at(patience_s)
                if batch.filled and wanted > 0:
                    wanted -= 1
                    yield (
                        batch.pixels.copy()
                    )  # it is kept for long, whatever becomes of the feed's buffer
                if wanted <= 0:
                    return

    def _batches(self, pixels: Sequence[NDArray[np.uint8]]) -> Iterator[Batch]:
        """Fixed-size batches, the last one padded."""
        size = self._asked.batch_size
        for start in range(0, len(pixels), size):
            some = pixels[start : start + size]
            padding = [np.zeros_like(some[0])] * (size - len(some))
            yield Batch(np.concatenate([*some, *padding]), len(some), ())

    # Answers.

    @contextlib.contextmanager
    def _session(self, precision: Precision, file: Path) -> Iterator[Any]:
        from imagemill.pipeline.backends import open_session

        asked = self._asked
        spec = SessionSpec(str(file), asked.bundle.card, precision, asked.batch_size)
        session = open_session(
            spec, DeviceSpec("cpu#check", "cpu", "openvino", asked.cores), Stopwatch()
        )
        try:
            if precision is Precision.FP32:
                top_k.check_model(session.stream, spec)
            yield session
        finally:
            session.close()

    def _answers(
        self, precision: Precision, file: Path, pixels: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.float32], float]:
        """Logits, float32 (n, classes), and images/s; 0 where there are too few images to tell."""
        with self._session(precision, file) as session:
            for _ in session.stream(islice(self._batches(pixels), _WARM_UP)):
                pass
            begun = time.perf_counter()
            logits = [outputs.logits for _, outputs in session.stream(self._batches(pixels))]
            seconds = time.perf_counter() - begun
        if not logits:
            return np.zeros((0, len(self._asked.bundle.card.labels)), np.float32), 0.0
        return np.concatenate(logits), len(pixels) / seconds if seconds > _LONG_ENOUGH_S else 0.0

    def _compare(
        self,
        precision: Precision,
        pixels: Sequence[NDArray[np.uint8]],
        reference: NDArray[np.float32],
        file: Path,
    ) -> tuple[Comparison, float]:
        answers, rate = self._answers(precision, file, pixels)
        comparison = accuracy.compare(reference, answers, self._asked.bundle.card.scores)
        self._say(f"{precision}: {accuracy.format_comparison(comparison)}")
        return comparison, rate


class _Run(_Measurements):
    """One accuracy check under the bundle's lock; `now` is the bundle's `accuracy.json`."""

    def carry_out(self) -> dict[str, PrecisionRecord]:
        asked = self._asked
        records: dict[str, PrecisionRecord] = {}
        for precision in asked.precisions:
            if reused := self._noted(precision):
                self._say(f"{precision} was measured on these very images already")
                records[precision.value] = reused
        wanted = [precision for precision in asked.precisions if precision.value not in records]
        if not wanted:
            return records
        pixels = self.calibration_pixels() if Precision.INT8 in wanted else []
        if asked.images is not None and not (
            wanted := self._worthwhile(wanted, pixels, asked.images)
        ):
            return records
        held_out = list(self._pixels(self._rest, asked.held_out))
        self._at(None)
        reference, rate = self._answers(Precision.FP32, self._onnx, held_out)
        for precision in wanted:
            compare = partial(self._compare, precision, held_out, reference)
            record = (
                self._int8(pixels, compare) if precision is Precision.INT8 else self._bf16(compare)
            )
            faster = record.images_per_second
            records[precision.value] = record = replace(
                record,
                fp32_images_per_second=round(rate, 2),
                speedup=round(faster / rate, 2) if faster and rate else None,
                kept=not self._says_less(precision, record),
            )
            if not record.kept:
                self._say(
                    f"{precision}: the bundle keeps its result on more images, and what it was"
                    " made on"
                )
                if record.file:
                    self._remove_unnamed(self._asked.bundle.dir / record.file)
                continue
            self._now = variants.write(asked.bundle.dir, **{precision.value: record})
            if record.comparison.accepted and asked.images is not None:
                break
        return records

    def calibration_pixels(self) -> list[NDArray[np.uint8]]:
        return list(self._pixels(self._first, self._asked.calibration))

    def _says_less(self, precision: Precision, record: PrecisionRecord) -> bool:
        """Whether a record on too few images would take the place of one that holds here and was
        accepted, or rests on more of them.
        """
        before = self._now.get(precision)
        if before is None or not record.comparison.reason.startswith(accuracy.TOO_FEW):
            return False
        return (
            (before.comparison.accepted or before.comparison.images > record.comparison.images)
            and _circumstances(before) == _circumstances(record)
            and (precision is not Precision.INT8 or self._has_file(before))
        )

    def _has_file(self, record: PrecisionRecord) -> bool:
        return variants.int8_file(self._asked.bundle.dir, record) is not None

    def _noted(self, precision: Precision) -> PrecisionRecord | None:
        """Return the bundle's record if it is of the same images, versions and processor, and its
        file is unchanged.
        """
        record = self._now.get(precision)
        now = (quantize.versions(), instruction_set(), self._asked.bundle.card.recipe)
        if record is None or record.held_out != self._held_out or _circumstances(record) != now:
            return None
        if record.group_channels != openvino_rewrites.wanted(precision, cpu.flags()):
            return None
        if not accuracy.is_current(record.comparison, self._asked.bundle.card):
            return None
        if precision is Precision.INT8 and (
            record.calibration is None
            or record.calibration.id != self._calibrated_on
            or not self._has_file(record)
        ):
            return None
        return record

    def _worthwhile(
        self, wanted: Sequence[Precision], pixels: Sequence[NDArray[np.uint8]], images: int
    ) -> list[Precision]:
        """Measure for some seconds, and keep the precisions that pay. bf16 is measured, not
        believed: on Intel processors whose AMX is switched off its instructions are there and
        slower than fp32's (0.55 × with resnext101_32x4d, OpenVINO 2026.4, 2026-11).
        """
        asked = self._asked
        some = list(pixels[: 16 * asked.batch_size]) or list(
            self._pixels(self._rest, 16 * asked.batch_size)
        )
        if not some:
            return []
        rate = self._rate(Precision.FP32, some)
        speedups = {precision: SPEEDUP[precision] for precision in wanted}
        if Precision.BF16 in wanted:
            speedups[Precision.BF16] = self._rate(Precision.BF16, some) / rate
        kept = [
            p
            for p in wanted
            if is_worthwhile(
                p, images, asked.calibration, asked.held_out, rate=rate, speedup=speedups[p]
            )
        ]
        for precision, speedup in speedups.items():
            if precision in kept:
                spent = (
                    spent_images(precision, asked.calibration, asked.held_out, speedup) / rate
                    + _STARTING_S
                )
                gained = gained_images(images, speedup) / rate
                self._say(
                    f"{precision} could save {gained:,.0f} s, finding out whether it answers as"
                    f" fp32 does takes about {spent:,.0f} s"
                )
            elif precision is Precision.BF16 and speedup < 1:
                self._say(
                    f"bf16 is not tried: it makes {speedup:.2f} times the images/s of fp32 on this"
                    " processor"
                )
            else:
                self._say(
                    f"{precision} is not tried: finding out whether it answers as fp32 does would"
                    " take longer than it saves"
                )
        return kept

    # Precisions.

    def _record(self, comparison: Comparison, rate: float) -> PrecisionRecord:
        return PrecisionRecord(
            comparison,
            self._held_out,
            quantize.versions(),
            instruction_set(),
            self._asked.bundle.card.recipe,
            images_per_second=round(rate, 2),
        )

    def _bf16(self, compare: Callable[[Path], tuple[Comparison, float]]) -> PrecisionRecord:
        channels = openvino_rewrites.wanted(Precision.BF16, cpu.flags())
        return replace(self._record(*compare(self._onnx)), group_channels=channels)

    def _int8(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        compare: Callable[[Path], tuple[Comparison, float]],
    ) -> PrecisionRecord:
        """Quantise until the accuracy check accepts or the attempts are used up; keep the best."""
        tried: list[_Candidate] = []
        kept: _Candidate | None = None
        while len(tried) < self._asked.attempts:
            scheme = self._scheme(kept, len(tried), pixels)
            if any(scheme == item.scheme for item in tried):
                break  # nothing is left to try
            try:
                candidate = self._attempt(scheme, pixels, compare)
            except ModelError as error:
                if kept is None:
                    raise
                self._say(f"int8: that way fails: {error}")
                break
            tried.append(candidate)
            if kept is None or _goodness(candidate) > _goodness(kept):
                kept, candidate = candidate, kept or candidate
            if candidate is not kept:
                self._remove_unnamed(candidate.file)
            if tried[-1].comparison.accepted or tried[-1].comparison.reason.startswith(
                accuracy.TOO_FEW
            ):
                break
        assert kept is not None
        return replace(
            self._record(kept.comparison, kept.rate),
            file=kept.file.name,
            key=kept.key,
            sha256=variants.digest(kept.file),
            preset=kept.scheme.preset,
            ignored=kept.scheme.ignored,
            calibration=Calibration(self._calibrated_on, len(pixels)),
            tried=tuple(
                Attempt(
                    item.scheme.preset,
                    item.scheme.ignored,
                    item.comparison.agreement,
                    item.comparison.wilson_low,
                    round(item.rate, 2),
                )
                for item in tried
            ),
        )

    def _scheme(
        self, best: _Candidate | None, number: int, pixels: Sequence[NDArray[np.uint8]]
    ) -> quantize.Scheme:
        """What to try next: the fastest way, then asymmetric activations, then the better of both
        with its worst layers in fp32; at last with more of them, and those that feed them.
        """
        if best is None or number < len(_PRESETS):
            return quantize.Scheme(_PRESETS[number])
        ranked = quantize.sensitivities(self._onnx, best.file, pixels[:_LOOKED_AT])
        again = number > len(_PRESETS)
        worst = {name for name, _ in ranked[: max(1, round(_WORST[again] * len(ranked)))]}
        if again:
            worst.update(quantize.feeders(best.file, worst))
        return quantize.Scheme(best.scheme.preset, tuple(sorted(worst.union(best.scheme.ignored))))

    def _attempt(
        self,
        scheme: quantize.Scheme,
        pixels: Sequence[NDArray[np.uint8]],
        compare: Callable[[Path], tuple[Comparison, float]],
    ) -> _Candidate:
        but = f", {len(scheme.ignored)} sensitive layers in fp32" if scheme.ignored else ""
        self._say(f"int8: quantising on {len(pixels):,} images, preset {scheme.preset}{but}")
        self._at(None)
        key = quantize.key(self._asked.bundle.card.sha256, self._calibrated_on, scheme)
        model = quantize.quantize(
            self._onnx, pixels, len(pixels), preset=scheme.preset, ignored=scheme.ignored
        )
        file = quantize.save(model, self._asked.bundle.dir, f"int8-{key}")
        del model
        comparison, rate = compare(file)
        return _Candidate(scheme, file, key, comparison, rate)

    def _remove_unnamed(self, file: Path) -> None:
        """Remove an attempt's files, unless the bundle's record names them: jobs may use them."""
        if self._now.int8 is None or file.name != self._now.int8.file:
            variants.remove(file)


def _circumstances(record: PrecisionRecord) -> tuple[Mapping[str, str], str, Recipe]:
    return record.versions, record.instruction_set, record.recipe


def _nearly_in_order(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Shuffled entries, sorted in short runs: a table whose rows are read forward is then passed
    through once a run, not once an image.
    """
    for start in range(0, len(entries), _SORTED_RUN):
        yield from sorted(
            entries[start : start + _SORTED_RUN],
            key=lambda entry: (entry.source, entry.locator, entry.path),
        )


def _goodness(candidate: _Candidate) -> tuple[float, float]:
    return candidate.comparison.wilson_low, -candidate.comparison.mean_probability_difference
