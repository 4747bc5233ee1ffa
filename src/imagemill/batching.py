"""How many pictures a batch holds where nobody has said it. No answer depends on it, speed does, by up to a fifth (docs/performance.md).

    --batch-size N ─► obeyed
    auto           ─► what an earlier probe found here ─► else, where it pays, a probe ─► else a rule

Which size is best no rule foretells: it hangs on the model, the precision and the caches of the processor. A probe measures the rule's size
against half and twice of it, and goes on as long as that gains. What it finds is kept beside the compiled models of the bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Final

from imagemill import codec, layout, processor
from imagemill.errors import ImagemillError, Interrupted
from imagemill.records import DeviceSpec, Job, Precision

if TYPE_CHECKING:
    from imagemill.measuring.crew import Crew
    from imagemill.measuring.records import Compute

FILE: Final = "batch-sizes.json"
"""Below `Job.cache_dir`."""
_FORMAT: Final = 1
_RULE: Final = 4
_RULE_FP32: Final = 2
_RULE_AMX: Final = 8
_MOST_ON_CPU: Final = 64
_MOST: Final = 512
_NOT_PROBED: Final = ("null", "ipu", "npu")
"""Kinds of devices: one computes nothing, one compiles for minutes, one has been seen by nobody here."""
_WORTH_LOOKING: Final = 30_000
"""Pictures of a job from which a first look at the model's speed, some 2 s, is taken."""
_COST_S: Final = 25.0
"""Of a whole probe: two other sizes at least, each compiled once."""
_GAIN: Final = 0.04
"""What a probe is taken to bring: it was 0 to 12 % (docs/performance.md)."""
_LARGER_MUST_GAIN: Final = 0.01
"""Neighbouring rounds differ by about a per cent; smaller batches take less memory, and less of caches that neighbours share."""
_HANDING_OVER_S: Final = 2e-3
"""What a batch more costs a job, in seconds of a core, and a probe, in which nothing is decoded, does not see: EfficientNet-Lite0 in
batches of 2 and 1 instead of 4 made 1.20 and 1.20 times the images/s compute only and 1.05 and 1.00 times end to end in fp32, 1.07 and
0.98 and 0.97 and 0.89 in bf16, which are 1 to 6 ms (docs/performance.md, "Batch sizes")."""
_ROUNDS: Final = 5
_ROUND_S: Final = 0.6
_COMPARING_S: Final = 12.0
"""After this many seconds three rounds must do: on slow processors a single batch takes long."""
_PATIENCE_S: Final = 600.0
"""A process that probes and says nothing for so long hangs; a worker's patience (docs/faults.md)."""
_LIBRARIES: Final = {"openvino": "openvino", "onnxruntime": "onnxruntime", "tensorrt": "onnxruntime"}

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of one model on one set of devices."""

    batch_size: int | None
    """The best one; None: only the rule's has been measured yet, for a job that was too short for more."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Size → images/s, compute only."""
    about: Mapping[str, str] = field(default_factory=dict)
    """For people: what was measured, on what, when."""


def resolved(job: Job, chosen: Sequence[DeviceSpec], pictures: int | None = 0, say: Say = lambda _: None) -> Job:
    """Give a job its batch size, if it has none.

    Args:
        job: `batch_size` 0 leaves it open.
        chosen: its devices; where a probe may be made, of this machine.
        pictures: of the job, which must gain more than a probe costs; None: make one whatever it costs; 0: make none.
        say: takes lines for the user.

    Raises:
        Interrupted, KeyboardInterrupt: while probing. What goes wrong in a probe costs nothing but the probe.
    """
    if job.batch_size:
        return job
    known = look_up(job, chosen)
    if known and known.batch_size:
        return replace(job, batch_size=known.batch_size)
    fallback = replace(job, batch_size=rule(job.precision, chosen, processor.flags()))
    if pictures == 0 or any(device.kind in _NOT_PROBED for device in chosen):
        return fallback
    if pictures is not None and not (_may_pay(known, pictures) if known else pictures >= _WORTH_LOOKING):
        return fallback
    try:
        found = _probe(fallback, chosen, pictures, say)
    except Interrupted:
        raise
    except ImagemillError as error:
        say(f"batch sizes could not be compared: {error}")
        return fallback
    _keep(job, chosen, found)
    return replace(job, batch_size=found.batch_size or fallback.batch_size)


def rule(precision: Precision, chosen: Sequence[DeviceSpec], flags: Container[str]) -> int:
    """Pictures per batch where nothing has been measured.

    4 is within some per cent of the best for resnext101_32x4d in int8 and bf16, but with AMX, whose work on 4 pictures is done too soon:
    there the session makes 7 to 8 % more images/s with 8, and a job 2 to 3 %. In fp32, whose pictures fill the caches sooner, 2 is as good
    or up to 3 % better, and for EfficientNet-Lite0 5 to 12 % (docs/performance.md).

    Args:
        precision: of the job.
        chosen: its devices.
        flags: of the processor.
    """
    if not all((device.kind, device.backend) == ("cpu", "openvino") for device in chosen):
        return _RULE
    if precision is Precision.FP32:
        return _RULE_FP32
    return _RULE_AMX if (processor.unit(precision, flags) or "").startswith("amx_") else _RULE


# ── the probe ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _may_pay(known: Kept, pictures: int) -> bool:
    rate = max(known.rates.values(), default=0.0)
    return not rate or _pays(pictures, rate)


def _pays(pictures: int, rate: float) -> bool:
    return _GAIN * pictures / rate > _COST_S


def _probe(job: Job, chosen: Sequence[DeviceSpec], pictures: int | None, say: Say) -> Kept:
    """Measure the job's batch size, and where that may pay others. Raises: ImagemillError where not even that one can be measured."""
    first = job.batch_size
    with _Climb(job, chosen) as climb:
        if pictures is not None and not _pays(pictures, rate := climb.rate()):
            return Kept(None, {str(first): round(rate, 2)}, _about(job, chosen))
        say(f"finding the fastest batch size, once for this model on this machine: about {_COST_S:.0f} s")
        while climb.size > 1 and climb.gains(climb.size // 2):
            pass
        while climb.size >= first and climb.size * 2 <= _most(chosen) and climb.gains(climb.size * 2):
            pass
        rates, size = climb.rates, climb.size
    told = ", ".join(f"{rate:,.1f} with {size}" for size, rate in sorted(rates.items()))
    best = max(rates, key=lambda tried: rates[tried])
    why = "; smaller ones gain less than handing over more of them costs a job" if best < size else ""
    why = "; larger ones gain less than a per cent" if best > size else why
    say(f"batches of {size}: {told} (images/s, compute only{why})")
    return Kept(size, {str(size): round(rate, 2) for size, rate in sorted(rates.items())}, _about(job, chosen))


class _Climb:
    """The best batch size so far, with the processes that compute in it."""

    def __init__(self, job: Job, chosen: Sequence[DeviceSpec]) -> None:
        self._job = replace(job, cache_dir=None)  # what turns out to be slower is not worth its room on the disk
        self._chosen = chosen
        self.size = job.batch_size
        self.rates: dict[int, float] = {}
        """Size → images/s, as last measured."""
        self._crew = self._open(self.size)
        try:
            self._orders = _orders(self._crew)
        except BaseException:
            self._crew.close()
            raise

    def __enter__(self) -> _Climb:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._crew.close()

    def rate(self) -> float:
        """images/s of all devices, at a first glance."""
        self.rates[self.size] = _rate(self._crew, self._orders)
        return self.rates[self.size]

    def gains(self, size: int) -> bool:
        """Measure another size and the best one in turn; the other is the best from now on if a job gains from it."""
        try:
            other = self._open(size)
        except Interrupted:
            raise
        except ImagemillError as error:  # the memory of a device may not do
            _log.info("batches of %d cannot be tried: %s", size, error)
            return False
        try:
            orders, begun = _orders(other), time.monotonic()
            pairs: list[tuple[float, float]] = []
            while len(pairs) < _ROUNDS and (len(pairs) < 3 or time.monotonic() - begun < _COMPARING_S):
                pairs.append((_rate(self._crew, self._orders), _rate(other, orders)))
            self.rates |= {self.size: median(ours for ours, _ in pairs), size: median(theirs for _, theirs in pairs)}
            if median(theirs / ours for ours, theirs in pairs) < 1 + self._must_gain(size):
                return False
            self._crew, self._orders, self.size, other = other, orders, size, self._crew
            return True
        finally:
            other.close()

    def _must_gain(self, size: int) -> float:
        if size > self.size:
            return _LARGER_MUST_GAIN
        more_batches_a_second = self.rates[self.size] * (1 / size - 1 / self.size)
        return _HANDING_OVER_S * more_batches_a_second / sum(max(1, len(device.cores)) for device in self._chosen) - _LARGER_MUST_GAIN

    def _open(self, size: int) -> Crew:
        from imagemill.measuring.crew import Crew

        return Crew(replace(self._job, batch_size=size), self._chosen, patience_s=_PATIENCE_S)


def _orders(crew: Crew) -> Mapping[str, Compute]:
    """What a round is: about `_ROUND_S`, at least a batch for each stream."""
    crew.warm_up(1)
    return crew.orders(_ROUND_S, fewest=1)


def _rate(crew: Crew, orders: Mapping[str, Compute]) -> float:
    return sum(found.images_per_second for found in crew.measure(orders).values())


def _most(chosen: Sequence[DeviceSpec]) -> int:
    return min(_MOST_ON_CPU if device.kind == "cpu" else _MOST for device in chosen)


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def look_up(job: Job, chosen: Sequence[DeviceSpec]) -> Kept | None:
    """What is kept of a job's model on these devices of this machine; None: nothing, or nothing that can be read."""
    if job.cache_dir is None:
        return None
    return _read(Path(job.cache_dir) / FILE).get(_key(job, chosen))


def _read(file: Path) -> dict[str, Kept]:
    try:
        plain = json.loads(file.read_bytes())
        if plain["format"] != _FORMAT:
            return {}
        found = {key: codec.from_plain(Kept, value) for key, value in plain["found"].items()}
        return {key: kept for key, kept in found.items() if _makes_sense(kept)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _makes_sense(kept: Kept) -> bool:
    size = kept.batch_size
    return (size is None or (type(size) is int and 1 <= size <= _MOST)) and all(rate > 0 for rate in kept.rates.values())


def _keep(job: Job, chosen: Sequence[DeviceSpec], found: Kept) -> None:
    """Note what was found; where the folder cannot be written to, it is found again next time."""
    if job.cache_dir is None:
        return
    file = Path(job.cache_dir) / FILE
    every = {key: codec.to_plain(value) for key, value in (_read(file) | {_key(job, chosen): found}).items()}
    with contextlib.suppress(OSError, ImagemillError):
        file.parent.mkdir(parents=True, exist_ok=True)
        layout.write_whole(file, json.dumps({"format": _FORMAT, "found": every}, indent=1).encode())


def _key(job: Job, chosen: Sequence[DeviceSpec]) -> str:
    """Hash of what decides speed: the model, its precision, the devices, the processor and the libraries' versions."""
    libraries = sorted({_LIBRARIES.get(device.backend, device.backend) for device in chosen})
    devices = [[device.kind, device.backend, len(device.cores)] for device in chosen]
    values = [job.card.sha256, job.variant, job.precision, devices, processor.identity(), *map(_version, libraries)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _about(job: Job, chosen: Sequence[DeviceSpec]) -> dict[str, str]:
    return {
        "model": f"{job.card.name}, {job.variant}",
        "precision": job.precision.value,
        "devices": ", ".join(f"{device.name}@{device.backend} with {len(device.cores)} cores" for device in chosen),
        "processor": processor.name(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
