"""The text of `imagemill bench`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagemill.errors import counted

if TYPE_CHECKING:
    from imagemill.bench.records import BenchReport, Rates


def format_report(report: BenchReport) -> str:
    """Return the report as text."""
    count = report.settings.iterations
    lines = [
        f"{report.model} in {report.precision}, batches of {report.batch_size}, median of"
        f" {counted(count, 'iteration')}"
    ]
    for name in ("compute_only", "transfer_only", "decode_only", "end_to_end"):
        rates: Rates | None = getattr(report, name)
        if rates is None:
            continue
        images = report.images_per_iteration[name.replace("transfer", "compute")]
        spread = f"({rates.min:,.1f} to {rates.max:,.1f}; {images:,} images each)"
        lines.append(f"{name.replace('_', ' '):<13} {rates.median:>9,.1f} images/s {spread}")
        if len(rates.devices) > 1:
            lines += [
                f"  {device:<11} {rate:>9,.1f} images/s" for device, rate in rates.devices.items()
            ]
    lines += _format_figures(report)
    if report.advice:
        lines.append(
            f"bounded by {report.bound}: {report.advice}" if report.bound else report.advice
        )
    return "\n".join(lines)


def _format_figures(report: BenchReport) -> Iterator[str]:
    """Yield a line for each figure that is known."""
    found = report.device
    if found is None:
        return
    names = list(report.compute_only.devices)
    which = names[0] if len(names) == 1 else "the devices"
    if found.busy is not None:
        yield f"{which} computed for {found.busy:.0%} of the time end to end"
    if found.memory_limit and found.bytes_per_image and found.bytes_per_s:
        yield (
            f"compute only is {report.compute_only.median / found.memory_limit:.0%} of the"
            f" {found.memory_limit:,.1f} images/s that memory allows:"
            f" {found.bytes_per_image / 1e6:,.1f} MB per image,"
            f" {found.bytes_per_s / 1e9:,.1f} GB/s"
        )
    if found.cores_needed is not None and "such cores" not in (report.advice or ""):
        need = "needs" if len(names) == 1 else "need"
        yield f"{which} {need} {found.cores_needed:,} such cores to be fed with these images"
