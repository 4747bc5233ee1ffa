"""Measure compute only, decode only and end to end, in turn, so that all meet the machine in the
same state.

Compute only and decode only use the session and the feed of `imagemill run`, in processes like its
workers. End to end is `run` itself, into a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from msgspec.structs import replace

from imagemill.bench.batch_search import find_batch_size
from imagemill.bench.bottleneck import Setup, find_bottleneck
from imagemill.bench.device_figures import device_figures, on_cpu
from imagemill.bench.messages import Compute, Decode, Measured
from imagemill.bench.pool import MeasuringPool
from imagemill.bench.records import SEARCH, BenchReport, BenchSettings, Rates
from imagemill.display import observer
from imagemill.errors import DeviceMemoryError, Interrupted, SourceError, UsageError, counted
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle, resolve, variants
from imagemill.pipeline.backends import automatic, devices
from imagemill.records import Bundle, DeviceSpec, Lease, Precision, SessionSpec, Settings, Summary
from imagemill.runner import dry_run
from imagemill.runner import run as runner
from imagemill.runner.freeze import versions_of
from imagemill.runner.settings import DEFAULT_MODEL, check_setting
from imagemill.system import cpu
from imagemill.system.messages import Notify
from imagemill.tuning import batch_size, on_gpus, precisions

COMPUTE_S = 2.0
"""Length of an iteration of compute only without `--batches-per-step`."""
END_TO_END_S = 10.0
"""Length of an iteration end to end without `--limit`."""
_MAX_IN_FLIGHT = 256
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
    if isinstance(settings.batch_size, str) and settings.batch_size != SEARCH:
        raise UsageError(
            f"--batch-size {settings.batch_size}: must be a number of images, or `{SEARCH}`."
        )
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
    models_dir = Path(settings.models_dir) if settings.models_dir else bundle.default_models_dir()
    model = resolve.resolve(settings.model or DEFAULT_MODEL, models_dir, notify=notify)
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
    return BenchReport(
        model=spec.card.name,
        precision=spec.precision.value,
        batch_size=spec.batch_size,
        images_per_iteration={"compute_only": _images(rounds[-1])},
        compute_only=_rates(rounds),
        machine=machine(),
        versions=versions_of(chosen) | pool.versions,
        settings=settings,
        batch_sizes=batch_sizes,
        transfer_only=_transfer_rates(rounds),
        device=device_figures(pool.traffic, chosen),
    )


def synthetic_session(
    settings: BenchSettings, model: Bundle, chosen: Sequence[DeviceSpec]
) -> SessionSpec:
    """Return the specification of a session that is measured without images."""
    precision, file = _precision(settings.precision, model, chosen)
    return SessionSpec(
        model_file=str(file.absolute()),
        card=model.card,
        precision=precision,
        batch_size=_batch_size(settings) or 0,
        batches_per_step=min(settings.batches_per_step or 0, _MAX_IN_FLIGHT),
        cache_dir=str(model.dir.absolute() / "compiled"),
        synthetic=True,
    )


def _precision(
    asked: str | None, model: Bundle, chosen: Sequence[DeviceSpec]
) -> tuple[Precision, Path]:
    """The precision and its file; `auto` is what the bundle's results allow, as in a run that is
    too short for a new result.
    """
    devices.check_precision(asked, chosen)
    if asked in (None, "auto"):
        if gpus := on_gpus.checked(chosen):
            return on_gpus.find_accepted(model, gpus[0])[0], model.dir / bundle.MODEL
        if not precisions.are_checked(chosen):
            return Precision.FP32, model.dir / bundle.MODEL
        choice = precisions.choose(model, 0)
        return choice.precision, choice.model_file
    precision = Precision(asked)
    if precision is not Precision.INT8:
        return precision, model.dir / bundle.MODEL
    precisions.refuse_int8(model.card)
    file = variants.int8_file(model.dir, variants.read(model.dir).int8)
    if file is None:
        raise UsageError(
            f"--precision int8: {model.card.name} has no int8 variant yet. Make one: imagemill"
            f" quantize {bundle.typed(model)} --images SOURCE."
        )
    return precision, file


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
    first = _first_run(_run_settings(settings, chosen, folder / "first", few), notify)
    limit = settings.limit or max(
        _MIN_IMAGES, math.ceil(END_TO_END_S * (first.images_per_second or 0.0))
    )
    job = OpenJob.open(folder / "first").frozen.job
    spec, batch_sizes = _with_batch_size(job.session, settings, chosen, notify)
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
    compute, decode_only, end_to_end = report.compute_only, _rates(decoded), _summarised(achieved)
    cores = {core for device in chosen for core in device.cores}
    read = sum(found.read_s for found in _flatten(decoded))
    bound, advice = find_bottleneck(
        compute.median,
        decode_only.median,
        end_to_end.median,
        read_share=read / (sum(found.decode_s for found in _flatten(decoded)) + read),
        setup=Setup(
            precision=spec.precision,
            hardware=_faster_precisions(chosen),
            threads=sum(job.num_workers or len(device.cores) for device in chosen),
            cores=len(cores),
            shared_cores=on_cpu(chosen),
        ),
    )
    needed = len(cores) * compute.median / decode_only.median
    return replace(
        report,
        images_per_iteration={
            **report.images_per_iteration,
            "decode_only": _images(decoded[-1]),
            "end_to_end": achieved[-1].images,
        },
        decode_only=decode_only,
        end_to_end=end_to_end,
        bound=bound,
        advice=advice,
        device=device_figures(pool.traffic, chosen, achieved, cores=needed),
    )


def _faster_precisions(chosen: Sequence[DeviceSpec]) -> list[Precision]:
    """Return the precisions that the devices compute faster than fp32, fastest last."""
    if on_cpu(chosen):
        found = [one for one in (Precision.BF16, Precision.INT8) if cpu.unit(one, cpu.flags())]
    else:
        found = [Precision.FP16]
    return [one for one in found if one in devices.precisions(chosen)]


def _first_run(settings: Settings, notify: Notify) -> Summary:
    first = runner.run(settings, _Forwarder(notify))
    if not first.ok:
        raise SourceError(
            f"none of the first {counted(first.images, 'image')} of"
            f" {', '.join(settings.sources)} can be read. Give other images."
        )
    return first


def _run_settings(
    settings: BenchSettings, chosen: Sequence[DeviceSpec], output: Path, limit: int
) -> Settings:
    same = ("sources", "model", "models_dir", "devices", "precision", "num_workers")
    in_flight = (
        min(settings.batches_per_step, _MAX_IN_FLIGHT) if settings.batches_per_step else None
    )
    asked = {name: getattr(settings, name) for name in same}
    run = Settings(
        **asked,
        output=str(output),
        batch_size=_batch_size(settings),
        limit=limit,
        batches_per_step=in_flight,
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


class _Forwarder(observer.Watcher):
    """Forwards the messages of a run."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify

    def notify(self, message: str) -> None:
        """Forward the message."""
        self._notify(message)


# Rates.


def _images(found: Mapping[str, Measured]) -> int:
    return sum(one.images for one in found.values())


def _total(found: Mapping[str, Measured]) -> float:
    """Return images/s of all devices, from the first one's start to the last one's end."""
    return _images(found) / (
        max(one.ended_s for one in found.values()) - min(one.begun_s for one in found.values())
    )


def _transfer_rates(rounds: Sequence[Mapping[str, Measured]]) -> Rates | None:
    if not all(found.transfer_s for found in _flatten(rounds)):
        return None
    per_device = {
        name: [found[name].images / found[name].transfer_s for found in rounds]
        for name in rounds[0]
    }
    return _summarise_rates(
        [sum(rates) for rates in zip(*per_device.values(), strict=True)], per_device
    )


def _flatten(rounds: Sequence[Mapping[str, Measured]]) -> list[Measured]:
    return [one for found in rounds for one in found.values()]


def _rates(rounds: Sequence[Mapping[str, Measured]]) -> Rates:
    per_device = {name: [found[name].images_per_second for found in rounds] for name in rounds[0]}
    return _summarise_rates([_total(found) for found in rounds], per_device)


def _achieved(summary: Summary) -> float:
    return summary.images_per_second or 0.0


def _summarised(runs: Sequence[Summary]) -> Rates:
    names = [device.name for device in runs[0].devices]
    per_device = {
        name: [d.images_per_second or 0.0 for one in runs for d in one.devices if d.name == name]
        for name in names
    }
    return _summarise_rates([_achieved(one) for one in runs], per_device)


def _summarise_rates(rates: Sequence[float], per_device: Mapping[str, Sequence[float]]) -> Rates:
    of_devices = {name: round(median(found), 3) for name, found in per_device.items()}
    return Rates(
        round(median(rates), 3),
        round(min(rates), 3),
        round(max(rates), 3),
        tuple(round(rate, 3) for rate in rates),
        of_devices,
    )


def machine() -> dict[str, str]:
    """Return what the figures depend on, as a job's summary has it, and the processor's vector
    units.
    """
    return devices.machine() | {"vector_units": " ".join(cpu.vector_units(cpu.flags()))}
