"""`imagemill bench --batch-size search`: the fastest batch size of a model on this machine, compute
only.

Starts at the rule's size and compares it with half and twice as many images, in alternating rounds,
for as long as that gains.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from msgspec.structs import replace

from imagemill.bench.messages import Compute
from imagemill.bench.pool import MeasuringPool
from imagemill.errors import ImagemillError, Interrupted
from imagemill.records import DeviceSpec, SessionSpec
from imagemill.system.messages import Notify

MAX_ON_CPU: Final = 64
MAX_ON_OTHER_DEVICES: Final = 512
_MIN_GAIN: Final = 0.01
"""A larger batch must be this much faster: neighbouring rounds differ by about 1 %, and smaller
batches take less memory.
"""
_ROUNDS: Final = 5
_ROUND_S: Final = 0.6
_COMPARISON_S: Final = 12.0
"""After this time three rounds must do: on slow processors a single batch takes long."""
_REPLY_TIMEOUT_S: Final = 600.0

_log = logging.getLogger(__name__)


def find_batch_size(
    spec: SessionSpec, devices: Sequence[DeviceSpec], notify: Notify
) -> tuple[int, Mapping[int, float]]:
    """Measure batch sizes, beginning with the specification's own.

    Returns:
        the fastest size, the smaller one if two differ by less than 1 %; and images/s of every size
        tried, compute only.

    Raises:
        ImagemillError: the first size cannot be measured.
    """
    first = spec.batch_size
    most = min(MAX_ON_CPU if device.kind == "cpu" else MAX_ON_OTHER_DEVICES for device in devices)
    with _Search(spec, devices) as search:
        while search.size > 1 and search.improves(search.size // 2):
            pass
        while search.size >= first and search.size * 2 <= most and search.improves(search.size * 2):
            pass
        size, rates = search.size, dict(sorted(search.rates.items()))
    notify(
        f"batch size {size}; images/s, compute only: "
        + ", ".join(f"{rate:,.1f} with {tried}" for tried, rate in rates.items())
    )
    return size, rates


class _Search:
    """The best batch size so far, with the processes that compute in it."""

    def __init__(self, spec: SessionSpec, devices: Sequence[DeviceSpec]) -> None:
        # Compiled models of rejected sizes would only take disk space.
        self._spec = replace(spec, cache_dir=None)
        self._devices = devices
        self.size = spec.batch_size
        self.rates: dict[int, float] = {}
        """Batch size → images/s, as last measured."""
        self._pool = self._open(self.size)
        try:
            self._orders = _orders(self._pool)
            self.rates[self.size] = _rate(self._pool, self._orders)
        except BaseException:
            self._pool.close()
            raise

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def improves(self, size: int) -> bool:
        """Compare another size with the best one in alternating rounds, and make it the best one if
        it is faster.
        """
        try:
            other = self._open(size)
        except Interrupted:
            raise
        except ImagemillError as error:  # the device's memory may be too small
            _log.info("batches of %d cannot be tried: %s", size, error)
            return False
        try:
            orders, begun = _orders(other), time.monotonic()
            pairs: list[tuple[float, float]] = []
            while len(pairs) < _ROUNDS and (
                len(pairs) < 3 or time.monotonic() - begun < _COMPARISON_S
            ):
                pairs.append((_rate(self._pool, self._orders), _rate(other, orders)))
            self.rates |= {
                self.size: median(best for best, _ in pairs),
                size: median(tried for _, tried in pairs),
            }
            gain = median(tried / best for best, tried in pairs) - 1
            if gain < (_MIN_GAIN if size > self.size else -_MIN_GAIN):
                return False
            self._pool, self._orders, self.size, other = other, orders, size, self._pool
            return True
        finally:
            other.close()

    def _open(self, size: int) -> MeasuringPool:
        spec = replace(self._spec, batch_size=size)
        return MeasuringPool(spec, self._devices, patience_s=_REPLY_TIMEOUT_S)


def _orders(pool: MeasuringPool) -> Mapping[str, Compute]:
    """Return what one round computes: about `_ROUND_S` seconds, at least one batch for each
    stream.
    """
    pool.warm_up(1)
    return pool.orders(_ROUND_S, fewest=1)


def _rate(pool: MeasuringPool, orders: Mapping[str, Compute]) -> float:
    return sum(found.images_per_second for found in pool.measure(orders).values())
