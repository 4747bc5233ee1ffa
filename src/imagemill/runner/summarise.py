"""The end of a job: what was bad, what bounded it, and the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from imagemill.errors import TooManyBadError
from imagemill.job import ledger
from imagemill.job.documents import Frozen
from imagemill.job.paths import JobPaths
from imagemill.pipeline import stopwatch
from imagemill.pipeline.backends import devices
from imagemill.records import (
    Clock,
    DeviceSpec,
    DeviceSummary,
    Job,
    Receipt,
    Shard,
    Summary,
)
from imagemill.workers.launcher import Outcome


def bad_fraction_guard(
    fraction: float | None, images: int, paths: JobPaths, shards: Sequence[Shard], done: set[int]
) -> Callable[[Receipt], None]:
    """Ends the job once more than `fraction` of all its images are known to be bad."""
    if fraction is None:
        return lambda _: None
    bad = sum(
        sum(ledger.examine(paths, s.number).failed_by_status.values())
        for s in shards
        if s.number in done
    )

    def check() -> None:
        if bad > fraction * images:
            raise TooManyBadError(
                f"{bad:,} of {images:,} images are bad, more than --max-bad-fraction {fraction:g}"
                " allows. See the status and error columns; repeat the command with a larger"
                " fraction, or without it, to resume."
            )

    def guard(receipt: Receipt) -> None:
        nonlocal bad
        bad += receipt.failed
        check()

    check()
    return guard


def summarise(
    frozen: Frozen,
    paths: JobPaths,
    shards: Sequence[Shard],
    done: set[int],
    outcome: Outcome,
    tally: ledger.Tally,
    chosen: Sequence[DeviceSpec],
) -> Summary:
    """The summary of a closed ledger; `outcome` is what this invocation added."""
    rows = sum(outcome.devices.values())
    seconds = outcome.seconds

    def rate(count: int) -> float | None:
        return round(count / seconds, 3) if count and seconds else None

    failed = sum(receipt.failed for receipt in outcome.receipts)
    threads, cores = _threads(frozen.job, chosen), _shared_cores(chosen)
    bottleneck, rates, advice = judge(
        list(outcome.clocks.values()), rows, seconds, threads, failed=failed, cores=cores
    )
    return Summary(
        images=tally.images,
        ok=tally.images - tally.failed,
        failed=tally.failed,
        failed_by_status=tally.failed_by_status,
        skipped_by_suffix=frozen.skipped_by_suffix,
        shards=len(shards),
        resumed_shards=len(done),
        seconds=round(seconds, 3),
        images_per_second=rate(rows),
        model=frozen.job.card.name,
        precision=frozen.job.precision.value,
        bottleneck=bottleneck,
        devices=tuple(
            DeviceSummary(
                d.name,
                outcome.devices[d.name],
                rate(outcome.devices[d.name]),
                outcome.restarts[d.name],
                outcome.clocks.get(d.name),
            )
            for d in chosen
        ),
        output=paths.output,
        rates=rates,
        advice=advice,
        skipped_hidden=frozen.skipped_hidden,
        skipped_by_filter=frozen.skipped_by_filter,
        skipped_broken_links=frozen.skipped_broken_links,
        throughput=outcome.throughput,
        machine=devices.machine(),
    )


def _threads(job: Job, chosen: Sequence[DeviceSpec]) -> int:
    return sum(job.num_workers or len(device.cores) for device in chosen)


def _shared_cores(chosen: Sequence[DeviceSpec]) -> int:
    """How many cores decode and compute; 0 where devices are more than cores, or are on several
    machines: then that is not known.
    """
    cores = [core for device in chosen for core in device.cores]
    return (
        len(cores)
        if len(set(cores)) == len(cores) and all(device.kind == "cpu" for device in chosen)
        else 0
    )


def judge(
    clocks: Sequence[Clock],
    rows: int,
    seconds: float,
    threads: int,
    *,
    failed: int = 0,
    cores: int = 0,
) -> tuple[str | None, dict[str, float], str | None]:
    """What bounded a run, the rates its clocks suggest (images/s, all devices), and what to change.

    If decoding and computing share the cores, the rate of computing alone follows from the CPU time
    that the session used.

    Args:
        clocks: of the workers.
        rows: made in `seconds`.
        seconds: of the run.
        threads: that decode.
        failed: rows without an answer, which nobody computed.
        cores: that decode and compute; 0: the devices compute by themselves, or it is not known.
    """
    if not rows or not clocks or not seconds:
        return None, {}, None
    total = stopwatch.total(clocks)
    bottleneck = stopwatch.bound_by(total, seconds)
    rates = {"achieved": round(rows / seconds, 3)}
    if total.read + total.decode:
        rates["decode_only"] = round(total.images * threads / (total.read + total.decode), 3)
    at_once, computing = len(clocks), seconds * len(clocks) - total.starved - total.write
    if cores:
        at_once, computing = cores, total.session_cpu
    if computing > 0 and total.compute:
        rates["compute_only"] = round((rows - failed) * at_once / computing, 3)
    if bottleneck is None:
        return (
            None,
            rates,
            (
                f"too short to tell what bounded it: {seconds:.1f} s, less than"
                f" {stopwatch.SHORT_S:g} s"
            ),
        )
    advice = {
        "compute": "a lower precision or one more device would help",
        "decode": "more cores, or smaller images, would help; more --num-workers if cores are idle",
        "read": "more --num-workers, or storage that answers faster, would help",
        "write": "a faster disk, larger shards, or fewer --save columns would help",
    }[bottleneck]
    return bottleneck, rates, advice
