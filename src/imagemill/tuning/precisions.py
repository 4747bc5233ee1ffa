"""The precision that a job runs in, and the model file for it.

`prepare` reads the results in the bundle's `accuracy.json` and lets `check` measure missing ones.
`auto` does so only if the job saves more time than the accuracy check takes.

    auto       int8 if accepted ─► else bf16 if accepted ─► else fp32
               on NVIDIA GPUs fp16, else bf16, else fp32; fp32 if decoding is slower anyway
    explicit   obeyed; its figures are printed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import ImagemillError, Interrupted, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models import variants
from imagemill.models.variants import PrecisionRecord
from imagemill.pipeline.backends import devices
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
from imagemill.system.messages import Notify
from imagemill.tuning import accuracy, check, check_process, on_gpus, quantize
from imagemill.tuning.check import AccuracyCheck, usable
from imagemill.tuning.images import calibration_share

CALIBRATION: Final = 300
"""Images that int8 is calibrated on."""
HELD_OUT: Final = accuracy.MIN_IMAGES
_SHOWN_OF: Final = 50
"""An explicit precision is compared on one image in so many, so that its figures cost little beside
the job.
"""
_FEWEST: Final = 50


class ChosenPrecision(Struct, frozen=True):
    """What a job is to be frozen with."""

    precision: Precision
    variant: str
    """`Job.variant`: `model`, or `int8-<hash>`."""
    model_file: Path
    """`Job.model_file`."""
    sha256: str | None = None
    """Of a variant's files, for `verify_variant` when the job is resumed; None for `model.onnx`,
    which the card's own sum covers.
    """
    lines: tuple[str, ...] = ()
    """Messages about the choice."""
    candidates: tuple[Precision, ...] = ()
    """Faster precisions without a result, whose accuracy check may be worthwhile."""


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
    notify: Notify = lambda _: None,
) -> ChosenPrecision:
    """Resolve a `--precision` setting, quantising and measuring if necessary.

    Args:
        setting: `auto`, or a precision; None means auto.
        bundle: its card with the recipe that the job uses.
        sources_of_job: resolved, as entries number them.
        entries: lists the job's images; called only if some are needed, and walked over once, in
            bounded memory.
        images: number of the job's images.
        chosen: the job's devices.
        limits: budgets of one image.
        access: where the sources are now, and how they are asked for.
        notify: takes a line for the user.

    Raises:
        UsageError: the devices do not all compute in it, or int8 of a network without a head, which
            nothing can check. ModelError, WorkerError: an explicit int8 cannot be made; `auto`
            prints the reason and continues in fp32.
    """
    devices.check_precision(setting, chosen)
    is_auto = setting in (None, "auto")
    asked = Precision.FP32 if is_auto else Precision(str(setting))
    if asked is Precision.INT8:
        check_int8(bundle)
    plain = _chosen(bundle, asked, None)
    gpus = on_gpus.checked(chosen)
    can_be_checked = is_auto if gpus else are_checked(chosen)
    if not can_be_checked or setting in (Precision.FP32, Precision.FP16):
        return plain
    if not bundle.card.has_head:
        line = f"precision {asked}: {_not_defined(bundle.card)}"
        notify(line)
        return replace(plain, lines=(line,))
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
    if gpus:
        base = replace(base, gpus=gpus, calibration=0, images=images)
        precision, *lines = on_gpus.choose(base, entries, notify)
        found = _chosen(bundle, precision, None, *lines)
    elif is_auto:
        found = _automatic(base, entries, images, notify)
    else:
        found = _explicit(asked, base, entries, images, notify)
    for line in found.lines:
        notify(line)
    return found


def without_images(
    setting: str | None,
    bundle: Bundle,
    chosen: Sequence[DeviceSpec],
    notify: Notify = lambda _: None,
) -> ChosenPrecision:
    """Return the precision of a session outside a job: accepted before, or asked for.

    Raises:
        UsageError: the devices do not compute in it, or there is no int8 model for this machine.
    """
    devices.check_precision(setting, chosen)
    if setting == Precision.INT8:
        refuse_int8(bundle.card)
        if usable(bundle, Precision.INT8) is None:
            raise UsageError(
                f"precision int8: {bundle.card.name} has no int8 variant for this machine. Make it:"
                f" `imagemill quantize {bundles.typed(bundle)} --images SOURCE`."
            )
    return prepare(setting, bundle, (), tuple, 0, chosen=chosen, notify=notify)


def _chosen(
    bundle: Bundle, precision: Precision, record: PrecisionRecord | None, *lines: str
) -> ChosenPrecision:
    """Return what a job in a precision is frozen with: the record's file, or the model's own."""
    name, sha256 = (record.file, record.sha256) if record else (None, None)
    file = bundle.dir / (name or bundles.MODEL)
    return ChosenPrecision(precision, file.stem, file, sha256, lines)


def refuse_int8(card: Card) -> None:
    """Raise UsageError if nothing can show whether int8 keeps fp32's answers."""
    if not card.has_head:  # how far an embedding may move depends on its use
        raise UsageError(f"int8 is not possible: {_not_defined(card)}. Use fp32.")


def check_int8(bundle: Bundle) -> None:
    """Raise UsageError or ModelError if the bundle has no int8 model and none can be made."""
    refuse_int8(bundle.card)
    if usable(bundle, Precision.INT8) is None:
        quantize.check_installed()


def _not_defined(card: Card) -> str:
    return (
        f"{card.name} has no classes, so it is not defined when a faster precision answers as fp32"
        " does"
    )


def are_checked(chosen: Sequence[DeviceSpec]) -> bool:
    """Return whether the results that a bundle keeps are about these devices: they are made by
    OpenVINO on the CPU.
    """
    return all(device.engine == "openvino" for device in chosen)


def verify_variant(model_file: Path, sha256: str | None) -> None:
    """Compare a variant's files with the hash that the job was frozen with; None: nothing to
    compare.

    Raises:
        ModelError: they changed, or are missing.
    """
    if sha256 is None:
        return
    try:
        found = variants.digest(model_file)
    except OSError as error:
        raise ModelError(
            f"{model_file}, which the job was started with, cannot be read: {error.strerror}. Start"
            " the job again in another --output."
        ) from error
    if found != sha256:
        raise ModelError(
            f"{model_file} is not the file that the job was started with: its sha256 is {found},"
            f" was {sha256}. Start the job again in another --output."
        )


def choose(bundle: Bundle, images: int, failure: str | None = None) -> ChosenPrecision:
    """Return the fastest precision that the bundle's results allow; nothing is measured.

    Args:
        bundle: its card with the recipe that the job uses.
        images: of the job; decides which accuracy checks may be worthwhile.
        failure: why an accuracy check failed, for the line.
    """
    refused: list[str] = []
    unchecked: list[Precision] = []
    candidates: list[Precision] = []
    without_units: list[Precision] = []
    for precision in (Precision.INT8, Precision.BF16):
        cost, gain = check.cost_and_gain(precision, images, CALIBRATION, HELD_OUT)
        record = usable(bundle, precision)
        if record and record.comparison.accepted:
            if check.is_fast(record):
                line = ". ".join([f"precision {precision}: {record.comparison.reason}", *refused])
                return _chosen(bundle, precision, record, line)
            refused.append(
                f"{precision} is not used: it keeps fp32's answers but makes only"
                f" {record.speedup:.2f} times its images/s"
            )
        elif record and record.comparison.is_verdict:
            refused.append(f"{precision} is not used: {record.comparison.reason}")
        elif cpu.unit(precision, cpu.flags()) is None:
            without_units.append(precision)
        elif precision is Precision.INT8 and not quantize.is_installed():
            if gain > cost:
                refused.append(f"int8 may be faster, and needs {quantize.INSTALL}")
        else:
            unchecked.append(precision)
            candidates += [precision] if gain > cost else []
    if without_units:
        refused.append(f"This processor has no units that make {' or '.join(without_units)} faster")
    if unchecked and failure is None:
        failure = (
            f"{' and '.join(unchecked)} not checked, because that would take longer than it saves"
            f" here. `imagemill quantize {bundles.typed(bundle)} --images SOURCE` does it once for"
            " all jobs"
        )
    line = ". ".join(["precision fp32" + (f": {failure}" if failure else ""), *refused])
    return replace(_chosen(bundle, Precision.FP32, None, line), candidates=tuple(candidates))


def _automatic(
    base: AccuracyCheck, entries: Callable[[], Iterable[Entry]], images: int, notify: Notify
) -> ChosenPrecision:
    """Choose the precision of a job that asks for `auto`. An error of the accuracy check costs the
    job nothing but the faster precision.
    """
    choice = choose(base.bundle, images)
    if not choice.candidates:
        return choice
    failure = None
    try:
        known = variants.read(base.bundle.dir)
        asked = replace(base, precisions=choice.candidates, images=images, known=known)
        check_process.in_child(asked.with_sample(entries()), notify)
    except Interrupted:
        raise
    except ImagemillError as error:
        failure = f"the accuracy check failed: {error}"
    return choose(base.bundle, images, failure=failure)


def _explicit(
    precision: Precision,
    base: AccuracyCheck,
    entries: Callable[[], Iterable[Entry]],
    images: int,
    notify: Notify,
) -> ChosenPrecision:
    """Choose a precision that was asked for. A short accuracy check makes a missing result, and
    makes int8 again that was calibrated on few images.
    """
    bundle = base.bundle
    record = usable(bundle, precision)
    held_out = min(HELD_OUT, max(_FEWEST, images // _SHOWN_OF))
    has_more = record is not None and _has_more(record, images, held_out)
    if record is None and images == 0:
        return _chosen(bundle, precision, None)  # nothing to calibrate on, and nothing to classify
    if has_more or (record is None and (precision is Precision.INT8 or images >= HELD_OUT)):
        quick = replace(base, precisions=(precision,), held_out=held_out)
        if record and record.calibration:
            few = record.calibration.images
            notify(
                f"int8 was calibrated on {few:,} image{'s' * (few != 1)}; this job has more, so it"
                " is made again"
            )
        try:
            made = check_process.in_child(quick.with_sample(entries()), notify)
            record = made[precision.value]
        except ImagemillError as error:
            if record is None or isinstance(error, Interrupted):
                raise
            notify(f"{precision} is not calibrated again: {error}")
        if not record.kept:
            record = usable(bundle, precision)  # the one that the bundle keeps instead
    if record is None:
        line = (
            f"{precision}: not compared with fp32 yet; `imagemill quantize {bundles.typed(bundle)}"
            " --images SOURCE` does that"
        )
        return _chosen(bundle, precision, None, line)
    lines = [f"precision {precision}: {format_record(record)}"]
    if not record.comparison.accepted:
        lines.append(
            f"{precision} is used because it was asked for; `auto` would not use it:"
            f" {record.comparison.reason}"
        )
    return _chosen(bundle, precision, record, *lines)


def _has_more(record: PrecisionRecord, images: int, held_out: int) -> bool:
    """Return whether a job can calibrate int8 on at least twice as many images as a record that was
    not accepted. Twice: so it happens few times, and unreadable images do not cause it.
    """
    if record.comparison.accepted or record.calibration is None or not quantize.is_installed():
        return False
    share = calibration_share(images, CALIBRATION, held_out)
    return min(CALIBRATION, share) >= 2 * record.calibration.images


def format_record(record: PrecisionRecord) -> str:
    """Return a record's figures in one line."""
    faster = f", {record.speedup:.2f} times the images/s of fp32" if record.speedup else ""
    return accuracy.format_comparison(record.comparison) + faster
