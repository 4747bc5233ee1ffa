"""The end of a job: failed images, the bottleneck, and the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from imagemill.display.pace import Pace
from imagemill.errors import TooManyBadError, counted
from imagemill.job.documents import RunningPace, write_pace
from imagemill.job.ledger import Totals
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import Store
from imagemill.pipeline import stopwatch
from imagemill.pipeline.backends import devices
from imagemill.records import Clock, DeviceSpec, DeviceSummary, Progress, Receipt, Summary
from imagemill.system import serialization
from imagemill.workers.tally import Outcome

_PACE_S = 1.0
"""Between writes of `pace.json`."""


def bad_fraction_guard(
    fraction: float | None, job: OpenJob, done: set[int]
) -> Callable[[Receipt], None]:
    """Return a function that takes receipts and ends the job once more than `fraction` of all its
    images have failed. Its error is TooManyBadError.
    """
    if fraction is None:
        return lambda _: None
    images, bad = job.frozen.images, job.failed_by_status(done).total()

    def check() -> None:
        if bad > fraction * images:
            raise TooManyBadError(
                f"{bad:,} of {counted(images, 'image')} failed, more than --max-bad-fraction"
                f" {fraction:g} allows. See the status and error columns; repeat the command with a"
                " larger fraction, or without it, to resume."
            )

    def guard(receipt: Receipt) -> None:
        nonlocal bad
        bad += receipt.failed
        check()

    check()
    return guard


def retired_writer(store: Store) -> Callable[[Progress], None]:
    """Return a function that writes `retired.json` whenever a device was retired."""
    written: dict[str, str] = {}

    def write(progress: Progress) -> None:
        nonlocal written
        if progress.retired != written:
            written = progress.retired
            store.write(store.paths.retired, serialization.encode(written))

    return write


def pace_writer(paths: JobPaths, total: int, resumed: int) -> Callable[[Progress], None]:
    """Return a function that writes how fast the job is, for `imagemill status`, every second. Of
    its `total` images, `resumed` were done by earlier starts.
    """
    pace, next_s = Pace(total, resumed), 0.0

    def write(progress: Progress) -> None:
        nonlocal next_s
        estimate = pace.add(progress)
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _PACE_S
            found = RunningPace(estimate.rate, estimate.left_s, estimate.devices)
            write_pace(paths, found)

    return write


def summarise(
    job: OpenJob,
    done: set[int],
    outcome: Outcome,
    totals: Totals,
    chosen: Sequence[DeviceSpec],
) -> Summary:
    """Return the summary of a finished job; `outcome` is what this invocation added."""
    frozen = job.frozen
    rows = sum(outcome.devices.values())
    seconds = outcome.seconds

    def rate(count: int) -> float | None:
        return round(count / seconds, 3) if count and seconds else None

    def of_device(name: str) -> DeviceSummary:
        clock, images = outcome.clocks.get(name), outcome.devices[name]
        busy = round(clock.device / seconds, 3) if clock and clock.device and seconds else None
        retired = outcome.retired.get(name)
        return DeviceSummary(
            name, images, rate(images), outcome.restarts[name], clock, retired, busy
        )

    failed = sum(receipt.failed for receipt in outcome.receipts)
    threads = sum(frozen.job.num_workers or len(device.cores) for device in chosen)
    cores = _shared_cores(chosen)
    bottleneck, rates, advice = judge(
        list(outcome.clocks.values()), rows, seconds, threads, failed=failed, cores=cores
    )
    return Summary(
        images=totals.images,
        ok=totals.images - totals.failed,
        failed=totals.failed,
        failed_by_status=totals.failed_by_status,
        skipped_by_suffix=frozen.skipped_by_suffix,
        shards=len(job.shards),
        resumed_shards=len(done),
        seconds=round(seconds, 3),
        images_per_second=rate(rows),
        model=frozen.job.session.card.name,
        precision=frozen.job.session.precision.value,
        bottleneck=bottleneck,
        devices=tuple(of_device(device.name) for device in chosen),
        output=job.paths.output,
        rates=rates,
        advice=advice,
        skipped_hidden=frozen.skipped_hidden,
        skipped_by_filter=frozen.skipped_by_filter,
        skipped_broken_links=frozen.skipped_broken_links,
        throughput=outcome.throughput,
        machine=devices.machine(),
        extras=totals.extras,
        recomputed=sum(clock.recomputed for clock in outcome.clocks.values()),
    )


def _shared_cores(chosen: Sequence[DeviceSpec]) -> int:
    """Return how many cores decode and compute; 0 if that is not known, because devices are not
    CPUs or are on several machines.
    """
    cores = [core for device in chosen for core in device.cores]
    is_known = len(set(cores)) == len(cores) and all(device.kind == "cpu" for device in chosen)
    return len(cores) if is_known else 0


def judge(
    clocks: Sequence[Clock],
    rows: int,
    seconds: float,
    threads: int,
    *,
    failed: int = 0,
    cores: int = 0,
) -> tuple[str | None, dict[str, float], str | None]:
    """Return the bottleneck of a run, the rates that its clocks suggest, and what to change.

    Rates are images/s of all devices. If decoding and computing share the cores, the rate of
    computing alone follows from the CPU time that the session used. Else it follows from the time
    that the devices computed, or from the time that the loop waited for them.

    Args:
        clocks: of the workers.
        rows: how many rows the run wrote.
        seconds: how long it took.
        threads: how many threads decode.
        failed: how many rows have no result, and so were not computed.
        cores: how many cores decode and compute; 0: unknown, or the devices compute.
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
    elif total.device and all(clock.device for clock in clocks if clock.images):
        at_once, computing = sum(clock.device > 0 for clock in clocks), total.device
    if computing > 0 and total.compute:
        rates["compute_only"] = round((rows - failed) * at_once / computing, 3)
    if total.transfer:
        rates["transfer_only"] = round((rows - failed) * at_once / total.transfer, 3)
    if bottleneck is None:
        why = f"{seconds:.1f} s, less than {stopwatch.SHORT_S:g} s"
        return None, rates, f"too short to find the bottleneck: {why}"
    more = "cores" if cores else "devices"
    advice = {
        "compute": f"a smaller model, a faster precision or more {more} would help",
        "decode": "more cores, or smaller images, would help; more --num-workers if cores are idle",
        "read": "more --num-workers, or storage that answers faster, would help",
        "write": "a faster disk, larger shards, or fewer --save columns would help",
    }[bottleneck]
    if bottleneck == "decode" and total.device and "compute_only" in rates:
        needed = math.ceil(threads * rates["compute_only"] / rates["decode_only"])
        advice += f"; the devices need {needed:,} such cores to be fed with these images"
    return bottleneck, rates, advice
