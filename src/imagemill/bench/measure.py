"""Measure compute only, decode only and end to end, in turn, so that all meet the machine in the
same state.

Compute only and decode only use the session and the feed of `imagemill run`, in processes like its
workers. End to end is `run` itself, into a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median

from msgspec.structs import replace

from imagemill.bench.batch_search import find_batch_size
from imagemill.bench.messages import Compute, Decode, Measured
from imagemill.bench.pool import MeasuringPool
from imagemill.bench.records import SEARCH, BenchReport, BenchSettings, DeviceFigures, Rates
from imagemill.display import observer
from imagemill.errors import DeviceMemoryError, Interrupted, SourceError, UsageError, counted
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle, resolve
from imagemill.pipeline.backends import automatic, devices
from imagemill.records import (
    Bundle,
    DeviceSpec,
    Lease,
    MemoryTraffic,
    SessionSpec,
    Settings,
    Summary,
)
from imagemill.runner import dry_run
from imagemill.runner import run as runner
from imagemill.runner.freeze import versions_of
from imagemill.runner.settings import DEFAULT_MODEL, check_setting
from imagemill.system import cpu
from imagemill.system.messages import Notify
from imagemill.tuning import batch_size, precisions

COMPUTE_S = 2.0
"""Length of an iteration of compute only without `--batches-per-step`."""
END_TO_END_S = 10.0
"""Length of an iteration end to end without `--limit`."""
_MIN_IMAGES = 64


def run(settings: BenchSettings, notify: Notify = lambda _: None) -> BenchReport:
    """Return the rates that the settings ask for, and what bounds a job.

    Args:
        settings: either `synthetic`, or at least one source.
        notify: receives one line of progress at a time.

    Raises:
        UsageError: the settings make no sense together. DeviceError, ModelError, SourceError: a
        device, the model or a source is not available. WorkerError: a measuring process died.
    """
    check(settings)
    typed = settings.devices or automatic.CPU
    if typed == automatic.CPU:
        typed = automatic.choose(None, settings.precision, notify)
    chosen = devices.resolve(typed)
    if len({device.engine for device in chosen}) > 1:
        raise UsageError(f"--devices {typed}: several backends. Measure each by itself.")
    if typed == automatic.CPU:
        typed = f"cpu:{len(chosen)}"  # so that the measured runs do not choose again
    settings = replace(settings, devices=typed)
    try:
        if settings.synthetic:
            return _synthetic(settings, chosen, notify)
        with tempfile.TemporaryDirectory(prefix="imagemill-bench-") as folder:
            return _with_sources(settings, chosen, Path(folder), notify)
    except DeviceMemoryError as error:
        short = error.__cause__ if isinstance(error.__cause__, DeviceMemoryError) else error
        raise DeviceMemoryError(f"{short} Free memory, or give a smaller --batch-size.") from error
    except Interrupted as stopped:  # its message is about the measured job
        raise Interrupted(
            "measuring was stopped, and has no result.", stopped.exit_code
        ) from stopped


def check(settings: BenchSettings) -> None:
    """Raise a UsageError if the settings make no sense together."""
    if settings.synthetic and settings.sources:
        raise UsageError(
            f"--synthetic needs no images, but {settings.sources[0]} was given. Leave one of them"
            " out."
        )
    if settings.synthetic and (settings.limit or settings.num_workers):
        raise UsageError(
            "--limit and --num-workers are for images. Leave them out with --synthetic."
        )
    if not settings.synthetic and not settings.sources:
        raise UsageError(
            "give a SOURCE to measure decoding and computing, or --synthetic to measure computing"
            " alone."
        )
    if settings.iterations < 1:
        raise UsageError(f"--iterations {settings.iterations}: must be at least 1.")
    if settings.batch_size != SEARCH:
        check_setting("batch_size", settings.batch_size)
    for name in ("batches_per_step", "num_workers", "limit", "precision"):
        check_setting(name, getattr(settings, name))


def _batch_size(settings: BenchSettings) -> int | None:
    return settings.batch_size if isinstance(settings.batch_size, int) else None


def _with_batch_size(
    spec: SessionSpec, settings: BenchSettings, chosen: Sequence[DeviceSpec], notify: Notify
) -> tuple[SessionSpec, Mapping[str, float]]:
    """Return the specification with its own batch size, the rule's, or the fastest one after a
    search, together with the rates of all sizes.
    """
    spec = batch_size.resolved(spec, chosen)
    if settings.batch_size != SEARCH:
        return spec, {}
    notify("finding the fastest batch size")
    size, rates = find_batch_size(spec, chosen, notify)
    return replace(spec, batch_size=size), {
        str(tried): round(rate, 2) for tried, rate in rates.items()
    }


# Without images.


def _synthetic(
    settings: BenchSettings, chosen: Sequence[DeviceSpec], notify: Notify
) -> BenchReport:
    folder = bundle.default_models_dir(settings.models_dir)
    model = resolve.resolve(settings.model or DEFAULT_MODEL, folder, notify=notify)
    spec, batch_sizes = _with_batch_size(
        synthetic_session(settings, model, chosen), settings, chosen, notify
    )
    notify(f"compiling {model.card.name} in {spec.precision} for {counted(len(chosen), 'device')}")
    with MeasuringPool(spec, chosen) as pool:
        orders = _compute_orders(settings, pool, chosen)
        rounds = []
        for number in range(1, settings.iterations + 1):
            rounds.append(pool.measure(orders))
            notify(
                f"iteration {number} of {settings.iterations}: {_total(rounds[-1]):,.1f} images/s"
            )
    return _report(settings, spec, chosen, pool, rounds, batch_sizes)


def _report(
    settings: BenchSettings,
    spec: SessionSpec,
    chosen: Sequence[DeviceSpec],
    pool: MeasuringPool,
    rounds: Sequence[Mapping[str, Measured]],
    batch_sizes: Mapping[str, float],
) -> BenchReport:
    """Return what is known of computing alone."""
    copied = []
    if all(one.transfer_s for found in rounds for one in found.values()):
        copied = [
            {name: one.images / one.transfer_s for name, one in found.items()} for found in rounds
        ]
    return BenchReport(
        model=spec.card.name,
        precision=spec.precision.value,
        batch_size=spec.batch_size,
        images_per_iteration={"compute_only": _images(rounds[-1])},
        compute_only=_measured(rounds),
        machine=machine(),
        versions=versions_of(chosen) | pool.versions,
        settings=settings,
        batch_sizes=batch_sizes,
        transfer_only=_rates([sum(found.values()) for found in copied], copied) if copied else None,
        device=device_figures(pool.traffic, chosen),
    )


def synthetic_session(
    settings: BenchSettings, model: Bundle, chosen: Sequence[DeviceSpec]
) -> SessionSpec:
    """Return the specification of a session that is measured without images."""
    found = precisions.without_images(settings.precision, model, chosen)
    return SessionSpec(
        model_file=str(found.model_file.absolute()),
        card=model.card,
        precision=found.precision,
        batch_size=_batch_size(settings) or 0,
        batches_per_step=settings.batches_per_step or 0,
        cache_dir=str(model.dir.absolute() / "compiled"),
        synthetic=True,
    )


def _compute_orders(
    settings: BenchSettings, pool: MeasuringPool, chosen: Sequence[DeviceSpec]
) -> dict[str, Compute]:
    """Return how many batches each device computes per iteration, after warming them up: the
    number asked for, or as many as take about `COMPUTE_S`.
    """
    pool.warm_up()
    if settings.batches_per_step:
        return {device.name: Compute(settings.batches_per_step) for device in chosen}
    return pool.orders(COMPUTE_S)


# With images.


def _with_sources(
    settings: BenchSettings, chosen: Sequence[DeviceSpec], folder: Path, notify: Notify
) -> BenchReport:
    notify("a short first run, to warm up and to find the length of an iteration")
    few = min(settings.limit or _MIN_IMAGES, _MIN_IMAGES)
    trial = _run_settings(settings, chosen, folder / "first", few)
    first = runner.run(trial, observer.Watcher(notify))
    if not first.ok:
        raise SourceError(
            f"none of the first {counted(first.images, 'image')} of"
            f" {', '.join(settings.sources)} can be read. Give other images."
        )
    limit = settings.limit or max(
        _MIN_IMAGES, math.ceil(END_TO_END_S * (first.images_per_second or 0.0))
    )
    session = OpenJob.open(folder / "first").frozen.job.session
    spec, batch_sizes = _with_batch_size(session, settings, chosen, notify)
    precision = spec.precision.value  # one for all iterations, whatever `auto` may find meanwhile
    measured = replace(settings, batch_size=spec.batch_size, precision=precision)
    computed, decoded, achieved = [], [], []
    with MeasuringPool(spec, chosen) as pool:
        orders = _compute_orders(settings, pool, chosen)
        for number in range(1, settings.iterations + 1):
            output = folder / str(number)
            achieved.append(runner.run(_run_settings(measured, chosen, output, limit)))
            decoded.append(pool.measure(_decode_orders(output, chosen)))
            computed.append(pool.measure(orders))
            rates = (
                f"compute {_total(computed[-1]):,.1f}, decode {_total(decoded[-1]):,.1f}, end to"
                f" end {_achieved(achieved[-1]):,.1f}"
            )
            notify(f"iteration {number} of {settings.iterations}: {rates} images/s")
    report = _report(settings, spec, chosen, pool, computed, batch_sizes)
    decode_only = _measured(decoded)
    end_to_end = _rates(
        map(_achieved, achieved),
        [{one.name: one.images_per_second or 0.0 for one in run.devices} for run in achieved],
    )
    middle = sorted(achieved, key=_achieved)[len(achieved) // 2]
    cores = len({core for device in chosen for core in device.cores})
    needed = cores * report.compute_only.median / decode_only.median
    return replace(
        report,
        images_per_iteration={
            **report.images_per_iteration,
            "decode_only": _images(decoded[-1]),
            "end_to_end": achieved[-1].images,
        },
        decode_only=decode_only,
        end_to_end=end_to_end,
        bound=middle.bottleneck,
        advice=middle.advice,
        device=device_figures(pool.traffic, chosen, achieved, cores=needed),
    )


def _run_settings(
    settings: BenchSettings, chosen: Sequence[DeviceSpec], output: Path, limit: int
) -> Settings:
    same = "sources model models_dir devices precision batches_per_step num_workers".split()
    run = Settings(
        **{name: getattr(settings, name) for name in same},
        output=str(output),
        batch_size=_batch_size(settings),
        limit=limit,
        preflight=False,
        report=False,
    )
    images = dry_run.dry_run(run).images  # each device gets some, even of few
    return replace(run, shard_size=plan.auto_shard_size(images, len(chosen), least=1))


def _decode_orders(output: Path, chosen: Sequence[DeviceSpec]) -> dict[str, Decode]:
    """Return the shards of a finished run, distributed to the devices in turn."""
    opened = OpenJob.open(output)
    by_device = {
        device.name: tuple(map(Lease, opened.shards[position :: len(chosen)]))
        for position, device in enumerate(chosen)
    }
    return {name: Decode(opened.frozen.job, leases) for name, leases in by_device.items() if leases}


# Rates.


def _images(found: Mapping[str, Measured]) -> int:
    return sum(one.images for one in found.values())


def _total(found: Mapping[str, Measured]) -> float:
    """Return images/s of all devices, from the first one's start to the last one's end."""
    return _images(found) / (
        max(one.ended_s for one in found.values()) - min(one.begun_s for one in found.values())
    )


def _achieved(summary: Summary) -> float:
    return summary.images_per_second or 0.0


def _measured(rounds: Sequence[Mapping[str, Measured]]) -> Rates:
    return _rates(
        map(_total, rounds),
        [{name: one.images_per_second for name, one in found.items()} for found in rounds],
    )


def _rates(totals: Iterable[float], rounds: Sequence[Mapping[str, float]]) -> Rates:
    """Return the rates of all devices together, and those of each, by name, in the same rounds."""
    rates = tuple(round(total, 3) for total in totals)
    of_devices = {name: round(median(found[name] for found in rounds), 3) for name in rounds[0]}
    return Rates(round(median(rates), 3), min(rates), max(rates), rates, of_devices)


def device_figures(
    traffic: Mapping[str, MemoryTraffic],
    chosen: Sequence[DeviceSpec],
    runs: Sequence[Summary] = (),
    *,
    cores: float | None = None,
) -> DeviceFigures | None:
    """Return the figures of a bench; None on CPUs.

    Args:
        traffic: device → what its memory allows.
        chosen: the devices.
        runs: the iterations end to end.
        cores: how many cores would decode as fast as the devices compute; None: unknown.
    """
    if all(device.kind in ("cpu", "null") for device in chosen):
        return None
    shares = [[device.busy for device in run.devices if device.busy is not None] for run in runs]
    known = [mean(each) for each in shares if each]
    limits = [one.bytes_per_s / one.bytes_per_image for one in traffic.values()]
    is_known = len(limits) == len(chosen)
    return DeviceFigures(
        busy=round(median(known), 3) if known else None,
        memory_limit=round(sum(limits), 3) if is_known else None,
        bytes_per_image=max(one.bytes_per_image for one in traffic.values()) if is_known else None,
        bytes_per_s=sum(one.bytes_per_s for one in traffic.values()) if is_known else None,
        cores_needed=math.ceil(cores) if cores else None,
    )


def machine() -> dict[str, str]:
    """Return what the figures depend on, as a job's summary has it, and the processor's vector
    units.
    """
    return devices.machine() | {"vector_units": " ".join(cpu.vector_units(cpu.flags()))}
