"""MLPerf's LoadGen, Offline scenario: the industry's own load generator drives a session, times it, and keeps its own logs.

bench                                   bench worker
Offline(performance) ─────────────────► LoadGen ─ samples ─► session ─ class ids ─► LoadGen ─ DIR/performance/run_N/mlperf_log_*
Offline(accuracy) ────────────────────► the same, each picture once, answers logged:          DIR/accuracy/mlperf_log_*

Rounds of compute only, as `bench` measures them, come in between, so that both meet the machine in the same state.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from imagemill import batching, devices, freezing
from imagemill.bench import measure
from imagemill.bench.records import BenchSettings
from imagemill.errors import OutputError, UsageError
from imagemill.measuring.crew import Crew
from imagemill.measuring.loadgen import ALONE
from imagemill.measuring.records import Compute, Decode, Measured, Offline
from imagemill.models import bundle, registry
from imagemill.records import DeviceSpec, Job

if TYPE_CHECKING:
    pass

MIN_DURATION_S = 10.0
"""How long a performance run should take; MLPerf's rules for submissions want 600."""
LOG_DIR = "imagemill-loadgen"
_PICTURES = 64
"""In LoadGen's library of samples where `--limit` does not say."""
_HEADROOM = 1.5
"""A run is planned for this many times the rate that was measured, so that it does not end too early where the machine speeds up."""


@dataclass(frozen=True, slots=True)
class LoadGenReport:
    """What LoadGen said, and what bench measured in between."""

    model: str
    precision: str
    device: str
    backend: str
    batch_size: int
    pictures: int
    """In LoadGen's library of samples."""
    min_duration_s: float
    valid: bool
    """Whether LoadGen calls every performance run VALID."""
    samples_per_second: float
    """As LoadGen measured; the median over the iterations."""
    runs: tuple[float, ...]
    compute_only: float
    """images/s as `bench` measures them; the median over the iterations."""
    rounds: tuple[float, ...]
    share: float
    """Median over the iterations of LoadGen's rate over the one that `bench` measured right before it."""
    answers: int
    """In LoadGen's accuracy log."""
    answers_as_alone: int
    """Of these, how many are the class that the session gives in the plain order of the pictures; LoadGen shuffles them."""
    log_dir: str


def run(settings: BenchSettings, say: measure.Say = lambda _: None) -> LoadGenReport:
    """Run the Offline scenario against one device's session: `iterations` performance runs and an accuracy run.

    Raises:
        UsageError: settings that make no sense, or LoadGen is not installed. OutputError: its logs cannot be written. Others as `bench.run`
        raises them.
    """
    minimum_s = MIN_DURATION_S if settings.min_duration is None else settings.min_duration
    if not 0 < minimum_s <= 86_400:
        raise UsageError(f"--min-duration {minimum_s:g}: must be more than 0 seconds, and a day at most.")
    if util.find_spec("mlperf_loadgen") is None:
        raise UsageError("bench --loadgen needs MLPerf's LoadGen, which is not installed: pip install 'imagemill[loadgen]'.")
    measure.check(settings)
    chosen = devices.resolve(settings.devices or "auto")
    if len(chosen) != 1:
        raise UsageError(f"--devices {settings.devices}: LoadGen drives one session at a time. Name one device.")
    logs = Path(settings.log_dir or LOG_DIR).absolute()
    with tempfile.TemporaryDirectory(prefix="imagemill-loadgen-") as folder:
        job, pictures = _what(settings, chosen, Path(folder), say)
        say(f"compiling {job.card.name} in {job.precision} for {chosen[0].name}")
        with Crew(job, chosen) as crew:
            return _drive(settings, crew, chosen[0], job, pictures, minimum_s, logs, say)


def _what(settings: BenchSettings, chosen: Sequence[DeviceSpec], folder: Path, say: measure.Say) -> tuple[Job, Decode | None]:
    """The job whose session is driven, and its pictures; None: noise."""
    if not settings.synthetic:
        found = measure.pictures(settings, chosen, folder, settings.limit or _PICTURES, say)
        return found.job, found
    models_dir = Path(settings.models_dir) if settings.models_dir else bundle.default_models_dir()
    model = registry.resolve(settings.model or freezing.DEFAULT_MODEL, models_dir, say=say)
    return batching.resolved(measure.synthetic_job(settings, model, chosen), chosen), None


def _drive(
    settings: BenchSettings,
    crew: Crew,
    device: DeviceSpec,
    job: Job,
    pictures: Decode | None,
    minimum_s: float,
    logs: Path,
    say: measure.Say,
) -> LoadGenReport:
    library = settings.limit or _PICTURES

    def offline(folder: Path, rate: float, *, accuracy: bool) -> Measured:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--log-dir {logs}: {folder} cannot be made: {error.strerror}. Give another folder.") from error
        order = Offline(str(folder), minimum_s, rate * _HEADROOM, library, pictures, accuracy)
        return crew.measure({device.name: order})[device.name]

    (order,) = measure.compute_orders(settings, crew, [device]).values()
    rate = crew.measure({device.name: order})[device.name].images_per_second
    lasting = Compute(max(order.batches, round(minimum_s * rate / job.batch_size)))
    rounds: list[float] = []
    runs: list[float] = []
    valid: list[str] = []
    for number in range(1, settings.iterations + 1):
        rounds.append(crew.measure({device.name: lasting})[device.name].images_per_second)
        folder = logs / "performance" / f"run_{number}"
        offline(folder, max(rate, *rounds, *runs), accuracy=False)
        summary = _summary(folder)
        runs.append(float(summary["Samples per second"]))
        valid.append(summary["Result is"])
        rates = f"LoadGen {runs[-1]:,.1f} samples/s, {valid[-1]}; compute {rounds[-1]:,.1f} images/s"
        say(f"iteration {number} of {settings.iterations}: {rates}")
    found = offline(logs / "accuracy", rate, accuracy=True)
    answers = _answers(logs / "accuracy")
    alone = json.loads((logs / "accuracy" / ALONE).read_text())
    return LoadGenReport(
        model=job.card.name,
        precision=job.precision.value,
        device=device.name,
        backend=device.engine,
        batch_size=job.batch_size,
        pictures=found.pictures,
        min_duration_s=minimum_s,
        valid=all(result == "VALID" for result in valid),
        samples_per_second=median(runs),
        runs=tuple(runs),
        compute_only=round(median(rounds), 3),
        rounds=tuple(round(one, 3) for one in rounds),
        share=round(median(ours / theirs for ours, theirs in zip(runs, rounds, strict=True)), 4),
        answers=len(answers),
        answers_as_alone=sum(alone[index] == class_id for index, class_id in answers),
        log_dir=str(logs),
    )


_SUMMARY, _ACCURACY = "mlperf_log_summary.txt", "mlperf_log_accuracy.json"
"""Beside LoadGen's own logs: the class of each picture of its library, in order."""


def _summary(folder: Path) -> dict[str, str]:
    """What LoadGen's summary says, by name."""
    lines = (folder / _SUMMARY).read_text().splitlines()
    return {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}


def _answers(folder: Path) -> list[tuple[int, int]]:
    """Index in the library and class id of each answer in LoadGen's accuracy log."""
    log = json.loads((folder / _ACCURACY).read_text())
    return [(entry["qsl_idx"], int.from_bytes(bytes.fromhex(entry["data"]), "little")) for entry in log]


def told(report: LoadGenReport) -> str:
    """The report for people."""
    return "\n".join(
        [
            f"{report.model} in {report.precision} on {report.device} ({report.backend}), batches of {report.batch_size}, LoadGen Offline, "
            f"{report.min_duration_s:g} s at least, {report.pictures} pictures",
            f"LoadGen       {report.samples_per_second:>9,.1f} samples/s ({min(report.runs):,.1f} to {max(report.runs):,.1f}), "
            f"{'VALID' if report.valid else 'INVALID'}",
            f"compute only  {report.compute_only:>9,.1f} images/s ({min(report.rounds):,.1f} to {max(report.rounds):,.1f}); "
            f"LoadGen reaches {report.share:.1%} of it",
            f"accuracy mode {report.answers_as_alone:>9,} of {report.answers:,} answers are those of the pictures in order",
            f"logs: {report.log_dir}",
        ]
    )
