"""The precision that a job runs in, and the model file for it.

`prepare` serves `run --precision`, `quantize_bundle` serves `imagemill quantize`. Both read the
results in the bundle's `accuracy.json` and let `check` measure missing ones. `auto` does so only
if the job saves more time than the accuracy check takes.

    auto       int8 if accepted ─► else bf16 if accepted ─► else fp32; each step is said
    explicit   obeyed; its figures are said
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from imagemill.errors import ImagemillError, Interrupted, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.models.variants import PrecisionRecord
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices, openvino_rewrites
from imagemill.pipeline.sources import Filters, Skipped
from imagemill.records import (
    AS_GIVEN,
    Access,
    Bundle,
    Card,
    DeviceSpec,
    Entry,
    Limits,
    Precision,
)
from imagemill.system import cpu
from imagemill.tuning import accuracy, check, check_process, quantize
from imagemill.tuning.check import AccuracyCheck, Say

CALIBRATION: Final = 300
"""Images that int8 is calibrated on."""
HELD_OUT: Final = accuracy.MIN_IMAGES
_SPARE: Final = 1.25
"""Images picked for each that is needed, since some cannot be read."""
_MIN_SPEEDUP: Final = 1.05
"""Measured speed-up from which an accepted precision is used."""
_SHOWN_OF: Final = 50
"""An explicit precision is compared on one image in so many, so that its figures cost little beside
the job.
"""
_FEWEST: Final = 50


@dataclass(frozen=True, slots=True)
class Choice:
    """What the bundle's results allow a job that asks for `auto`."""

    precision: Precision
    variant: str
    """`model` or `int8-<key>`."""
    model_file: Path
    sha256: str | None = None
    """See `Prepared.sha256`."""
    reasons: tuple[str, ...] = ()
    """Why, and why not the faster ones; one line each."""
    candidates: tuple[Precision, ...] = ()
    """Faster ones without a result, whose accuracy check may be worthwhile."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a job is to be frozen with."""

    precision: Precision
    variant: str
    """`Job.variant`."""
    model_file: Path
    """`Job.model_file`."""
    sha256: str | None = None
    """Of a variant's files, for `verify_variant` when the job is resumed; None for `model.onnx`,
    which the card's own sum covers.
    """
    lines: tuple[str, ...] = ()
    """All that was said on the way; also told to `say` at once."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `imagemill quantize` found."""

    bundle: str
    images: int
    """That the sources hold."""
    precisions: Mapping[str, PrecisionRecord] = field(default_factory=dict)


def _silent(_: str) -> None:
    """Say nothing."""


# ── what a job runs in ────────────────────────────────────────────────────────────────────────────


def prepare(
    setting: str | None,
    bundle: Bundle,
    sources_of_job: Sequence[str],
    entries: Callable[[], Iterable[Entry]],
    images: int,
    *,
    chosen: Sequence[DeviceSpec],
    limits: Limits | None = None,
    access: Access = AS_GIVEN,
    say: Say = _silent,
) -> Prepared:
    """Resolve a `--precision` setting, quantising and measuring where that is needed.

    Args:
        setting: `auto`, or a precision; None means auto.
        bundle: its card with the recipe that the job uses.
        sources_of_job: resolved, as entries number them.
        entries: lists the job's images; called only if some are needed, and walked over once, in
        bounded memory.
        images: how many these are.
        chosen: the job's devices.
        limits: budgets of one image.
        access: where the sources are now, and how they are asked for.
        say: takes a line for the user.

    Raises:
        UsageError: the devices do not all compute in it, or int8 of a network without a head,
        which nothing can check. ModelError, WorkerError: an explicit int8
        cannot be made; `auto` says so and goes on in fp32.
    """
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        say(line)

    base = AccuracyCheck(
        bundle=bundle,
        sources=tuple(sources_of_job),
        entries=(),
        cores=devices.cores_here(chosen),
        limits=limits or Limits(),
        precisions=(),
        calibration=CALIBRATION,
        held_out=HELD_OUT,
        access=access,
    )
    devices.check_precision(setting, chosen)
    if setting == Precision.INT8:
        refuse_int8(bundle.card)
    if setting in (Precision.FP32, Precision.FP16) or not are_checked(chosen):
        precision = Precision.FP32 if setting in (None, "auto") else Precision(setting)
        return Prepared(precision, "model", bundle.dir / bundles.MODEL)
    if not accuracy.is_defined(bundle.card):
        precision = Precision.FP32 if setting in (None, "auto") else Precision(setting)
        tell(f"precision {precision}: {_not_defined(bundle.card)}")
        return Prepared(precision, "model", bundle.dir / bundles.MODEL, lines=tuple(lines))
    if setting in (None, "auto"):
        choice = _automatic(base, entries, images, tell)
    else:
        choice = _explicit(Precision(setting), base, entries, images, tell)
    return Prepared(
        choice.precision, choice.variant, choice.model_file, choice.sha256, tuple(lines)
    )


def refuse_int8(card: Card) -> None:
    """Raise UsageError if nothing can show whether int8 answers as fp32 does."""
    if not accuracy.is_defined(card):
        raise UsageError(f"int8 is not possible: {_not_defined(card)}. Use fp32.")


def _not_defined(card: Card) -> str:
    return (
        f"{card.name} has no classes, so it is not defined when a faster precision answers as fp32"
        " does"
    )


def are_checked(chosen: Sequence[DeviceSpec]) -> bool:
    """Whether the results that a bundle keeps are about these devices: they are made by OpenVINO
    on the CPU.
    """
    return all((device.kind, device.backend) == ("cpu", "openvino") for device in chosen)


def verify_variant(model_file: Path, sha256: str | None) -> None:
    """Compare a variant's files with the sum that the job was frozen with; None: nothing to
    compare.

    Raises:
        ModelError: they changed, or are gone.
    """
    if sha256 is None:
        return
    try:
        found = variants.digest(model_file)
    except OSError as error:
        raise ModelError(
            f"{model_file}, which the job was started with, cannot be read: {error.strerror}. Start"
            " anew."
        ) from error
    if found != sha256:
        raise ModelError(
            f"{model_file} is not the file that the job was started with: its sha256 is {found},"
            f" was {sha256}. Start anew."
        )


def choose(bundle: Bundle, images: int, flags: set[str] | None = None) -> Choice:
    """Pick the fastest precision that the bundle's results allow; nothing is measured.

    A result counts if it is of this recipe, OpenVINO version and kind of processor, and its file
    is whole.

    Args:
        bundle: its card with the recipe that the job uses.
        images: of the job; decides what is worth trying.
        flags: of the processor; None looks them up.
    """
    flags = cpu.flags() if flags is None else flags
    reasons: list[str] = []
    worth: list[Precision] = []
    for precision in (Precision.INT8, Precision.BF16):
        record = usable(bundle, precision, flags)
        if record and record.comparison.accepted:
            if record.speedup is not None and record.speedup < _MIN_SPEEDUP:
                reasons.append(
                    f"{precision} is not used: it answers as fp32 does but makes only"
                    f" {record.speedup:.2f} times its images/s"
                )
                continue
            reasons.append(f"{precision} is used: {record.comparison.reason}")
            return replace(
                _chosen(bundle, precision, record),
                reasons=tuple(reasons),
                candidates=tuple(worth),
            )
        if record and record.comparison.images >= accuracy.MIN_IMAGES:
            reasons.append(f"{precision} is not used: {record.comparison.reason}")
        elif cpu.unit(precision, flags) is None:
            reasons.append(f"{precision} is not used: this processor has no units for it")
        elif record and not check.is_worthwhile(precision, images, CALIBRATION, HELD_OUT):
            reasons.append(
                f"{precision} is not used: {record.comparison.reason}; `imagemill quantize` on more"
                " images decides"
            )
        elif not check.is_worthwhile(precision, images, CALIBRATION, HELD_OUT):
            reasons.append(
                f"{precision} is not used: {images:,} images are too few for trying it to pay;"
                " `imagemill quantize` measures whether it answers as fp32 does, and keeps the"
                " result"
            )
        else:
            worth.append(precision)
    return Choice(
        Precision.FP32, "model", bundle.dir / bundles.MODEL, None, tuple(reasons), tuple(worth)
    )


def usable(
    bundle: Bundle, precision: Precision, flags: set[str] | None = None
) -> PrecisionRecord | None:
    """Return the bundle's record of a precision if it counts on this machine, else None.

    It counts if it is of this recipe, OpenVINO version and kind of processor, and its int8 file is
    unchanged. A record holds for any background: a background changes few images and none of the
    arithmetic.

    Raises:
        ModelError: `accuracy.json` cannot be read.
    """
    flags = cpu.flags() if flags is None else flags
    record = variants.read(bundle.dir).get(precision)
    if (
        record is None
        or record.versions.get("openvino") != quantize.versions().get("openvino")
        or replace(record.recipe, background=None) != replace(bundle.card.recipe, background=None)
        or record.instruction_set != check.instruction_set(flags)
        or record.group_channels != openvino_rewrites.wanted(precision, flags)
        or not accuracy.is_current(record.comparison, bundle.card)
    ):
        return None
    if precision is Precision.INT8 and variants.int8_file(bundle.dir, record) is None:
        return None
    return record


def _chosen(bundle: Bundle, precision: Precision, record: PrecisionRecord) -> Choice:
    if record.file is None:
        return Choice(precision, "model", bundle.dir / bundles.MODEL)
    variant = record.file.removesuffix(".xml")
    return Choice(precision, variant, bundle.dir / record.file, record.sha256)


def _automatic(
    base: AccuracyCheck, entries: Callable[[], Iterable[Entry]], images: int, say: Say
) -> Choice:
    """See `prepare`. What goes wrong with a faster precision costs the job nothing but that
    precision.
    """
    choice = choose(base.bundle, images)
    if choice.candidates:
        some, _ = thin(entries(), _wanted(base))
        known = variants.read(base.bundle.dir)
        say(f"measuring whether {' or '.join(choice.candidates)} would save time")
        try:
            check_process.in_child(
                replace(
                    base,
                    entries=tuple(some),
                    precisions=choice.candidates,
                    images=images,
                    known=known,
                ),
                say,
            )
        except Interrupted:
            raise
        except ImagemillError as error:
            say(f"no faster precision could be tried: {error}")
        choice = choose(base.bundle, images)
    for reason in choice.reasons:
        say(reason)
    if choice.precision is Precision.FP32:
        say("precision fp32")
    return choice


def _explicit(
    precision: Precision,
    base: AccuracyCheck,
    entries: Callable[[], Iterable[Entry]],
    images: int,
    say: Say,
) -> Choice:
    """Choose a precision that was asked for; a short accuracy check makes a missing result."""
    bundle = base.bundle
    record = usable(bundle, precision)
    if record is None and images == 0:
        return Choice(
            precision, "model", bundle.dir / bundles.MODEL
        )  # nothing to calibrate on, and nothing to classify
    if record is None and (precision is Precision.INT8 or images >= HELD_OUT):
        held_out = min(HELD_OUT, max(_FEWEST, images // _SHOWN_OF))
        quick = replace(base, precisions=(precision,), held_out=held_out, attempts=1)
        some, _ = thin(entries(), _wanted(quick))
        record = check_process.in_child(replace(quick, entries=tuple(some)), say)[precision.value]
    elif record is not None:
        say(f"{precision}: {format_record(record)}")
    if record is None:
        say(
            f"{precision}: not compared with fp32 yet; `imagemill quantize {bundle.card.name}"
            " --images SOURCE` does that"
        )
        return Choice(precision, "model", bundle.dir / bundles.MODEL)
    if not record.comparison.accepted:
        say(
            f"{precision} is used because it was asked for; `auto` would not use it:"
            f" {record.comparison.reason}"
        )
    return _chosen(bundle, precision, record)


def _wanted(base: AccuracyCheck) -> int:
    return round(_SPARE * (base.calibration + base.held_out))


def thin(entries: Iterable[Entry], wanted: int) -> tuple[list[Entry], int]:
    """Pick at least `wanted` entries, evenly spread over a listing of unknown length; all of a
    shorter one.

    Every 2^k-th is kept, k growing with the listing, so that never more than twice as many are
    held. Returns them, and how many there were.
    """
    kept: list[Entry] = []
    step = 1
    count = 0
    for entry in entries:
        if count % step == 0:
            kept.append(entry)
            if len(kept) >= 2 * max(wanted, 1):
                kept = kept[::2]
                step *= 2
        count += 1
    return kept, count


# ── imagemill quantize ────────────────────────────────────────────────────────────────────────────


def quantize_bundle(
    bundle: Bundle,
    given: Sequence[str],
    *,
    chosen: Sequence[DeviceSpec],
    filters: Filters | None = None,
    calibration: int = CALIBRATION,
    held_out: int = HELD_OUT,
    attempts: int = 4,
    limits: Limits | None = None,
    say: Say = _silent,
) -> Report:
    """Make the int8 variant of a bundle and measure it, and bf16 where the processor has it,
    against fp32.

    The results are written to the bundle's `accuracy.json`, whatever they are. Repeating the
    call measures nothing again.

    Args:
        bundle: the model.
        given: sources, as on the command line.
        chosen: devices; all their cores are used by one process.
        filters: which entries of the sources are images.
        calibration: images to calibrate on.
        held_out: other images to compare on; 1,000 at least for a result that `auto` follows.
        attempts: ways of quantising to try, as long as none is accepted.
        limits: budgets of one image.
        say: takes a line for the user.

    Raises:
        UsageError: numbers that make no sense, sources without images, or a network without a
        head. ModelError, SourceError,
        WorkerError.
    """
    refuse_int8(bundle.card)
    for name, value in (("--calibration", calibration), ("--held-out", held_out)):
        if not 1 <= value <= 100_000:
            raise UsageError(f"{name} {value}: must be from 1 to 100,000.")
    resolved = sources.resolve(given)
    sources.check_kinds(resolved, all_files=filters is not None and filters.all_files)
    base = AccuracyCheck(
        bundle=bundle,
        sources=resolved,
        entries=(),
        cores=devices.cores_here(chosen),
        limits=limits or Limits(),
        precisions=(
            Precision.INT8,
            *([Precision.BF16] if cpu.unit(Precision.BF16, cpu.flags()) else []),
        ),
        calibration=calibration,
        held_out=held_out,
        attempts=attempts,
    )
    some, images = thin(_listing(resolved, filters or Filters()), _wanted(base))
    if not images:
        raise UsageError(
            f"{', '.join(given)} holds no images. Give a folder of images like those that will be"
            " classified."
        )
    found = check_process.in_child(replace(base, entries=tuple(some)), say)
    return Report(str(bundle.dir), images, found)


def _listing(resolved: Sequence[str], filters: Filters) -> Iterator[Entry]:
    skipped = Skipped()
    for source in sources.open_all(resolved):
        yield from source.entries(filters, skipped)


def format_record(record: PrecisionRecord) -> str:
    """Return a record's figures in one line."""
    comparison = record.comparison
    faster = f"; {record.speedup:.2f} × the images/s of fp32" if record.speedup else ""
    return (
        f"{'accepted' if comparison.accepted else 'not accepted'} ({comparison.reason}):"
        f" {accuracy.format_comparison(comparison)}{faster}"
    )


def report_lines(report: Report) -> list[str]:
    """A report for people."""
    lines = []
    for precision, record in report.precisions.items():
        lines.append(f"{precision}: {format_record(record)}")
        for item in record.tried:
            but = f", {len(item.ignored)} layers in fp32" if item.ignored else ""
            lines.append(
                f"  tried preset {item.preset}{but}: agreement {item.agreement:.4f}, lower bound"
                f" {item.wilson_low:.4f}"
            )
        if not record.kept:
            lines.append("  not kept: what was accepted before, on more images, stays")
        elif record.file:
            lines.append(f"  kept {record.file} in {report.bundle}")
    return lines
