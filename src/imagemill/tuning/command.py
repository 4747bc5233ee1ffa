"""`imagemill quantize`: make a bundle's int8 model, compare it and bf16 with fp32, and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from imagemill.errors import UsageError, counted
from imagemill.models.variants import PrecisionRecord
from imagemill.pipeline import sources
from imagemill.pipeline.backends import devices
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import Bundle, DeviceSpec, Entry, Filters, Limits, Precision
from imagemill.system import cpu
from imagemill.system.messages import Notify
from imagemill.tuning import accuracy, check_process, precisions, quantize
from imagemill.tuning.check import AccuracyCheck
from imagemill.tuning.images import sample

_NAMED_FLIPS: Final = 5


class Report(Struct, frozen=True):
    """What `imagemill quantize` found."""

    bundle: str
    images: int
    """Number of images in the sources."""
    automatic: Precision
    """What `auto` uses now."""
    precisions: Mapping[str, PrecisionRecord]


def quantize_bundle(
    bundle: Bundle,
    given: Sequence[str],
    *,
    chosen: Sequence[DeviceSpec],
    calibration: int = precisions.CALIBRATION,
    held_out: int = precisions.HELD_OUT,
    min_agreement: float | None = None,
    truth: str | None = None,
    notify: Notify = lambda _: None,
) -> Report:
    """Make the int8 variant of a bundle, and compare it with fp32, and bf16 if the processor has
    it.

    The results are written to the bundle's `accuracy.json`, accepted or not. Repeating the call
    measures nothing again.

    Args:
        bundle: the model.
        given: sources, as on the command line.
        chosen: devices; all their cores are used by one process.
        calibration: number of images to calibrate on.
        held_out: number of other images to compare on; an accepted result needs 1,000.
        min_agreement: minimum lower end of the agreement's 95 % interval; None: see
            `accuracy.MIN_AGREEMENT`.
        truth: where true labels of the images are, as `--truth` says it.
        notify: takes a line for the user.

    Raises:
        UsageError: numbers that make no sense, sources without images, or a network without a head.
        ModelError, SourceError, WorkerError.
    """
    precisions.refuse_int8(bundle.card)
    quantize.check_installed()
    for name, value in (("--calibration", calibration), ("--held-out", held_out)):
        if not 1 <= value <= 100_000:
            raise UsageError(f"{name} {value}: must be from 1 to 100,000.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g}: must be from 0 to 1.")
    if truth is not None:
        from imagemill.scoring.images import parse  # imports PyArrow

        parse(truth)
    resolved = sources.resolve(given)
    sources.check_kinds(resolved, all_files=False)
    base = AccuracyCheck(
        bundle=bundle,
        sources=resolved,
        entries=(),
        cores=devices.cores_here(chosen),
        limits=Limits(),
        precisions=(
            Precision.INT8,
            *([Precision.BF16] if cpu.unit(Precision.BF16, cpu.flags()) else []),
        ),
        calibration=calibration,
        held_out=held_out,
        min_agreement=min_agreement,
        truth=truth,
    )
    some, images = sample(listing(resolved), base.wanted)
    if not images:
        raise UsageError(
            f"{', '.join(given)} holds no images. Give a folder of images like those that will be"
            " classified."
        )
    notify(
        f"{counted(images, 'image')} found; {calibration:,} are needed to calibrate int8 and"
        f" {max(held_out, precisions.HELD_OUT):,} others, all different, to accept it"
    )
    found = check_process.in_child(replace(base, entries=tuple(some)), notify)
    return Report(str(bundle.dir), images, precisions.choose(bundle, 0).precision, found)


def listing(resolved: Sequence[str]) -> Iterator[Entry]:
    """Yield the images of resolved sources. Raises: SourceError."""
    skipped = Skipped()
    for source in sources.open_all(resolved):
        yield from source.entries(Filters(), skipped)


def report_lines(report: Report) -> list[str]:
    """Return a report for people, which ends with the line about int8."""
    lines = []
    for precision, record in reversed(list(report.precisions.items())):
        found = record.comparison
        lines.append(f"{precision}: {accuracy.format_comparison(found)}")
        lines += [
            f"  {flip.image}: {flip.fp32} ({flip.fp32_probability:.2f}) in fp32,"
            f" {flip.answer} ({flip.probability:.2f}) in {precision}"
            for flip in found.flips[:_NAMED_FLIPS]
        ]
        if not record.kept:
            lines.append("  not kept: what was accepted before, on more images, stays")
        elif record.file:
            lines.append(f"  kept {record.file} in {report.bundle}")
        rates = ""
        if record.speedup:
            rates = (
                f"{record.fp32_images_per_second:,.1f} → {record.images_per_second:,.1f} images/s, "
            )
        lines.append(
            f"fp32 → {precision}: {rates}agreement {found.agreement:.4f}, "
            + ("accepted" if found.accepted else f"not accepted ({found.reason})")
        )
    is_new = all(record.kept for record in report.precisions.values())
    uses = f"uses {report.automatic} from now on" if is_new else f"still uses {report.automatic}"
    lines[-1] += f". `--precision auto` {uses}"
    return lines
