"""The results of commands as text for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagemill.display.text import format_duration, format_statuses
from imagemill.errors import counted

if TYPE_CHECKING:
    from imagemill.arrange.partition import Partitioned
    from imagemill.arrange.sort import Sorted
    from imagemill.bench.records import BenchReport, Rates
    from imagemill.job.open_job import JobStatus
    from imagemill.records import Summary
    from imagemill.runner.dry_run import DryRun
    from imagemill.scoring.record import Score, Share

_CONFUSIONS = 10
"""Confusions that `imagemill score` names, the most frequent ones."""
_MAX_MISSING = 10
"""Missing parts that `imagemill verify` names one by one."""


def format_summary(summary: Summary, *, verbose: bool = False) -> str:
    """Return the figures of a finished job; with `verbose`, also the rates that show what decoding
    and computing alone would reach.
    """
    lines = [f"{counted(summary.images, 'image')}: {summary.ok:,} ok, {summary.failed:,} failed"]
    if summary.failed:
        lines[0] += f" ({format_statuses(dict(summary.failed_by_status))})"
    for extra, images in summary.extras.items():
        lines.append(
            f"to read {counted(images, 'failed image')}: pip install 'imagemill[{extra}]', then"
            " run again with --retry-failed=unsupported"
        )
    if skipped := _format_skipped_of(summary):
        lines.append(f"skipped: {skipped}")
    if summary.images_per_second:
        lines += _format_speed(summary, verbose=verbose)
    if summary.recomputed:
        were = "was" if summary.recomputed == 1 else "were"
        lines.append(
            f"{counted(summary.recomputed, 'image')} overflowed fp16 and {were} computed"
            " again in fp32"
        )
    if any(device.name.partition("#")[0] == "null" for device in summary.devices):
        lines.append("note: the null device computes nothing: its predictions are made up")
    # `failed.txt` does not name images in archives and tables, and a report may not be wanted.
    if summary.failed and _has_content(f"{summary.output}/failed.txt"):
        lines.append(f"failed images: {summary.output}/failed.txt")
    if _has_content(f"{summary.output}/report.html"):
        lines.append(f"report: {summary.output}/report.html")
    lines.append(f"results: {summary.output}/predictions")
    lines.append(f"as CSV: `imagemill export {shlex.quote(summary.output)} --to csv`")
    return "\n".join(lines)


def _has_content(place: str) -> bool:
    """Return whether a file is not empty. One in an object store is taken to exist."""
    try:
        return "://" in place or Path(place).stat().st_size > 0
    except OSError:
        return False


def format_skipped(
    by_suffix: Mapping[str, int], hidden: int, by_filter: int, broken_links: int
) -> str:
    """Return what a listing left out as one line, such as `2 .txt, 1 hidden`; empty if nothing."""
    parts = [f"{count:,} {suffix or '(no suffix)'}" for suffix, count in sorted(by_suffix.items())]
    others = {
        "hidden": hidden,
        "by --include or --exclude": by_filter,
        f"broken link{'s' * (broken_links != 1)}": broken_links,
    }
    return ", ".join(parts + [f"{count:,} {what}" for what, count in others.items() if count])


def _format_skipped_of(found: Summary | DryRun) -> str:
    return format_skipped(
        found.skipped_by_suffix,
        found.skipped_hidden,
        found.skipped_by_filter,
        found.skipped_broken_links,
    )


def _format_speed(summary: Summary, *, verbose: bool) -> Iterator[str]:
    yield (
        f"{summary.images_per_second:,.1f} images/s over {summary.seconds:,.1f} s,"
        f" {summary.model} in {summary.precision}"
    )
    for device in summary.devices:
        is_alone = len(summary.devices) == 1
        if is_alone and not (device.busy or device.restarts or device.retired):
            continue  # its images and rate are those of the line above
        restarts = f", {counted(device.restarts, 'restart')}" if device.restarts else ""
        busy = f", computed for {device.busy:.0%} of the time" if device.busy else ""
        yield (
            f"  {device.name}: {counted(device.images, 'image')},"
            f" {device.images_per_second or 0:,.1f} images/s{busy}{restarts}"
        )
        if device.retired:
            yield f"  {device.name} was retired: {device.retired}"
    if summary.bottleneck:
        yield f"bounded by {summary.bottleneck}: {summary.advice}"
    elif verbose:
        yield f"bottleneck: {summary.advice}"
    if not verbose:
        return
    # In a job of a few images an estimate may be lower than what was achieved: leave it out.
    rates = [
        f"{name.replace('_', ' ')} {rate:,.1f}"
        for name, rate in summary.rates.items()
        if rate >= summary.rates["achieved"]
    ]
    yield f"images/s: {', '.join(rates)}"


def format_dry_run(found: DryRun) -> str:
    """Return what a job would process."""
    skipped = _format_skipped_of(found)
    if found.append and not found.images:
        return "nothing to append"
    images = f"{counted(found.images, 'image')}{' to append' if found.append else ''}"
    shards = f"{images}, shards of {found.shard_size:,}"
    return f"{shards}; skipped: {skipped}" if skipped else shards


def format_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a line per row: path, and probability and label or the error."""

    def result(row: Mapping[str, Any]) -> str:
        if row["status"] != "ok":
            return f"{row['status']}: {row['error']}"
        return "no class" if row["label"] is None else f"{row['probability']:6.1%}  {row['label']}"

    return "\n".join(f"  {row['path']:<34} {result(row)}" for row in rows)


def format_status(found: JobStatus, command: str = "") -> str:
    """Return how far a job is. If it must be continued, `command` does that."""
    state = "running" if found.running else "not finished"
    share = 100 * found.done // max(found.images, 1)
    parts = [
        f"{found.done:,} of {counted(found.images, 'image')} saved ({share} %)",
        "finished" if found.complete else state,
    ]
    if found.images_per_second is not None:
        parts.append(f"{found.images_per_second:,.1f} images/s")
    if found.seconds_left is not None:
        parts.append(f"{format_duration(found.seconds_left)} left")
    lines = [", ".join(parts)]
    if not found.complete and not found.running:
        again = f"`{command}`" if command else "run the same command again"
        lines.append(f"to continue: {again}")
    for name, rate in found.devices.items():
        speed = "no rate yet" if rate is None else f"{rate:,.1f} images/s"
        lines.append(f"  {name}: {speed}")
    if found.failed_by_status:
        lines.append(f"failed: {format_statuses(dict(found.failed_by_status))}")
    lines += [f"{name} was retired: {reason}" for name, reason in found.retired.items()]
    return "\n".join(lines)


def format_problems(
    problems: Sequence[Mapping[str, Any]], moved: Iterable[str], images: int
) -> str:
    """Return what `imagemill verify` found, and where it moved damaged parts. What an unfinished
    job lacks is one line.
    """
    from imagemill.job import ledger  # imports PyArrow

    missing = [problem for problem in problems if problem["problem"] == ledger.MISSING]
    ends = [problem for problem in problems if problem["problem"] == ledger.NOT_FINISHED]
    is_finished = not any(problem["path"].endswith("/summary.json") for problem in ends)
    unnamed = missing[_MAX_MISSING:] if is_finished else [*missing, *ends]
    hidden = set(map(id, unnamed))
    named = [problem for problem in problems if id(problem) not in hidden]
    lines = [f"{problem['path']} {problem['problem']}" for problem in named]
    if not is_finished:
        what = counted(len(missing), "part") if missing else "only the summary"
        lines.append(f"not finished, {what} missing: run the same command again to continue")
    elif unnamed:
        lines.append(f"… and {counted(len(unnamed), 'more part')} missing: repeat the run")
    lines += [f"moved to {path}" for path in moved]
    if named:
        lines.append(counted(len(named), "problem"))
    elif not problems:
        lines.append(f"complete and sound: {counted(images, 'image')}, one row each")
    return "\n".join(lines)


def format_devices(offers: Iterable[Mapping[str, Any]]) -> str:
    """Return the devices of this machine, with the reason if one is not usable."""
    lines = []
    for offer in offers:
        missing = offer["missing"]
        lines.append(f"{offer['devices']:<8} {offer['what']}{': not usable' if missing else ''}")
        notes = [missing, *offer["notes"]] if missing else offer["notes"]
        lines += [f"{'':<8} {note}" for note in notes]
    return "\n".join(lines)


def format_score(score: Score) -> str:
    """Return the figures of a score, without those of single classes."""
    return "\n".join(_score_lines(score))


def _score_lines(score: Score) -> Iterator[str]:
    shares = [("top-1", score.top1, score.top1_readable)]
    if score.top5 and score.top5_readable:
        shares.append(("top-5", score.top5, score.top5_readable))
    for name, over_all, readable in shares:
        yield f"{name}: {_format_share(over_all)}"
        if score.failed:
            yield f"  over readable images: {_format_share(readable)}"
    if score.failed:
        statuses = format_statuses(dict(score.failed_by_status))
        yield f"failed images, which count as wrong: {score.failed:,} ({statuses})"
    if score.unclassified:
        yield (
            f"images without a class of at least the minimum probability, which count as wrong:"
            f" {score.unclassified:,}"
        )
    means = {"over classes": score.macro, "over images": score.weighted}
    for name, average in means.items():
        if average:
            yield (
                f"mean {name}: precision {average.precision:.1%}, recall"
                f" {average.recall:.1%}, F1 {average.f1:.1%}"
            )
    if score.calibration:
        yield f"expected calibration error: {score.calibration.error:.1%}"
    if score.confusions:
        yield "most frequent confusions (true label → predicted label):"
        for found in score.confusions[:_CONFUSIONS]:
            yield f"  {found.images:>6,}  {found.label} → {found.predicted_label}"
    by = f", matched by {score.matched_by}" if score.matched_by else ""
    yield f"truth: {score.truth}, read as {score.read_as}{by}"
    for why, names in score.omitted_by_reason().items():
        yield f"not given: {names}, because {why}"


def _format_share(share: Share) -> str:
    if share.value is None:
        return "not known: no image is readable"
    return (
        f"{share.value:.1%} ({share.correct:,} of {counted(share.images, 'image')}; 95 % interval"
        f" {share.low:.1%} to {share.high:.1%})"
    )


def format_partitioned(made: Partitioned) -> str:
    """Return the outcome as text."""
    least, most = min(made.partitions), max(made.partitions)
    size = f"{least:,}" if least == most else f"{least:,} or {most:,}"
    what = "copies" if made.link == "copy" else f"{made.link} links"
    lines = [
        f"{counted(made.images, 'image')} in {counted(len(made.partitions), 'partition')} of"
        f" {size}: {made.output}"
        f" ({made.made:,} {what} made)"
    ]
    if made.skipped_by_suffix:
        lines.append(f"skipped: {format_skipped(made.skipped_by_suffix, 0, 0, 0)}")
    return "\n".join(lines)


def format_sorted(outcome: Sorted, *, dry_run: bool = False) -> str:
    """Return the outcome as text: the largest folders, and what was left out."""
    count = len(outcome.folders)
    verb = "would be sorted" if dry_run else "sorted"
    lines = [
        f"{counted(outcome.images, 'image')} {verb} into {counted(count, 'folder')}: {outcome.into}"
    ]
    if not dry_run:
        lines[0] += f" ({counted(outcome.made, 'new file')}"
        removed = counted(outcome.removed, "old one")
        lines[0] += f", {removed} removed)" if outcome.removed else ")"
    largest = list(outcome.folders.items())[:10]
    width = max((len(f"{number:,}") for _, number in largest), default=0)
    lines += [f"  {number:>{width},}  {folder}" for folder, number in largest]
    if count > len(largest):
        lines.append(f"  … and {count - len(largest):,} more folders")
    if outcome.left_out:
        lines.append(f"left out: {format_statuses(dict(outcome.left_out))}")
    if outcome.unreadable:
        lines.append(f"{outcome.unreadable:,} cannot be read now: {outcome.first_unreadable[0]}")
    return "\n".join(lines)


def format_bench(report: BenchReport) -> str:
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
    lines += _format_device_figures(report)
    if report.advice:
        lines.append(
            f"bounded by {report.bound}: {report.advice}" if report.bound else report.advice
        )
    return "\n".join(lines)


def _format_device_figures(report: BenchReport) -> Iterator[str]:
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
