"""Rates and the time left, estimated from the number of results over time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise

from msgspec import Struct
from msgspec.structs import astuple

from imagemill.pipeline.stopwatch import bound_by
from imagemill.records import Clock, Progress

_WINDOW_SHARE = 0.5
"""Share of the time so far over which a rate is taken. The longer the job, the steadier the rate; a
change of pace is followed after as long again.
"""
_MIN_WINDOW_S = 15.0
_MIN_RATE_S = 2.0
"""How long results must have come before a rate is given."""
_MAX_POINTS = 512
"""Points kept for each device; of more, every second one is dropped."""
_RECENT_STEPS = 4
_INTERVAL_S = 10.0
"""Between snapshots of the clocks. The bottleneck is that of the last one or two intervals."""


class Estimate(Struct, frozen=True):
    """How far a job is, how fast it goes, and how long it will take."""

    total: int
    """Images of the job."""
    done: int
    """Images with a result, from this invocation or earlier ones."""
    saved: int
    """Images in committed parts, which are safe whatever happens."""
    state: str
    """`starting`, `first images in progress`, `running` or `finished`."""
    elapsed_s: float
    """Seconds since the first lease of this invocation."""
    rate: float | None
    """images/s of this invocation, recently; None before it is known."""
    left_s: float | None
    """Seconds until the last image has its result; None before it is known."""
    stalled_s: float
    """Seconds since the last result of any device."""
    devices: Mapping[str, float | None]
    """images/s by device."""
    bottleneck: str | None
    """What bounded the last 10 to 20 s; None if it is not known."""


class _Count:
    """One device's count of results over time: the moments at which it grew, thinned out if there
    are many.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._rows: list[int] = []
        self._last = 0
        self._lost = 0

    def add(self, now_s: float, rows: int) -> None:
        """Add the current count. A smaller one than before means that a worker died: its lost work
        is done again and takes its time like any other.
        """
        if rows < self._last:
            self._lost += self._last - rows
        elif rows > self._last:
            self._times.append(now_s)
            self._rows.append(rows + self._lost)
        self._last = rows
        if len(self._times) > _MAX_POINTS:
            # From the end, so that the newest point is kept.
            self._times, self._rows = self._times[::-1][::2][::-1], self._rows[::-1][::2][::-1]

    @property
    def last_step_s(self) -> float:
        """When the count last grew."""
        return self._times[-1] if self._times else 0.0

    @property
    def largest_step(self) -> int:
        """How many results come at once: the largest of the last few steps."""
        recent = self._rows[-_RECENT_STEPS - 1 :]
        return max((after - before for before, after in pairwise(recent)), default=0)

    def rate(self, now_s: float) -> float | None:
        """Return rows/s over the later part of the time; None before it is known.

        It is taken from one step to another, so it is exact if steps come evenly. The first step
        only starts the clock: the time before it filled the pipeline. If the next step is overdue,
        the rate is what it would be if the step came now.
        """
        if not self._times or self._times[-1] - self._times[0] < _MIN_RATE_S:
            return None
        window_s = max(_MIN_WINDOW_S, _WINDOW_SHARE * (self._times[-1] - self._times[0]))
        base = max(0, bisect_right(self._times, self._times[-1] - window_s) - 1)
        rows = self._rows[-1] - self._rows[base]
        seconds = self._times[-1] - self._times[base]
        overdue = (rows + self.largest_step) / max(now_s - self._times[base], 1e-9)
        return min(rows / seconds, overdue)

    def in_progress(self, now_s: float, rate: float) -> float:
        """Return how many rows are due since the last step, at most one step's."""
        return min(self.largest_step, rate * max(0.0, now_s - self.last_step_s))


class Pace:
    """Turns the progress of one invocation into estimates. They depend on nothing else.

    Args:
        total: images of the job.
        resumed: images done by earlier invocations. They count as done, but not into any rate.
    """

    def __init__(self, total: int, resumed: int) -> None:
        self._total, self._resumed = total, resumed
        self._counts: dict[str, _Count] = {}
        self._snapshots: list[tuple[float, Clock]] = []

    def add(self, progress: Progress) -> Estimate:
        """Add the latest progress and return the estimate that follows."""
        now_s = progress.since_first_lease_s
        rates: dict[str, float | None] = {}
        for name, rows in progress.devices.items():
            count = self._counts.setdefault(name, _Count())
            count.add(now_s, rows)
            rates[name] = count.rate(now_s)
        done = sum(progress.devices.values())
        rate, left_s = self._left(progress, rates, max(0, self._total - self._resumed - done))
        last_step_s = max((count.last_step_s for count in self._counts.values()), default=0.0)
        state = "first images in progress" if progress.ready else "starting"
        if done:
            is_finished = self._resumed + progress.rows >= self._total
            state = "finished" if is_finished else "running"
        return Estimate(
            total=self._total,
            done=self._resumed + done,
            saved=self._resumed + progress.rows,
            state=state,
            elapsed_s=now_s,
            rate=rate,
            left_s=left_s,
            stalled_s=max(0.0, now_s - last_step_s) if done else 0.0,
            devices=rates,
            bottleneck=self._bottleneck(now_s, progress.clock),
        )

    def _left(
        self, progress: Progress, rates: Mapping[str, float | None], left: int
    ) -> tuple[float | None, float | None]:
        """Return the rate of the devices that have work and the seconds until all of it is done,
        which are at least those of the device with most work.
        """
        now_s = progress.since_first_lease_s
        if not left:
            return sum(rate or 0.0 for rate in rates.values()) or None, 0.0
        # If everything is leased, devices without a lease stay idle.
        all_leased = left <= sum(progress.leased.values())
        busy = [name for name in rates if not all_leased or progress.leased.get(name)]
        known = [rate for name in busy if (rate := rates[name]) is not None]
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return None, None
        # A device that has no rate yet is taken to be as fast as the others.
        speeds = {name: mean if (rate := rates[name]) is None else rate for name in busy}
        due = {name: self._counts[name].in_progress(now_s, speeds[name]) for name in busy}
        slowest_s = max(
            (progress.leased.get(name, 0) - due[name]) / speed
            for name, speed in speeds.items()
            if speed > 0
        )
        speed = sum(speeds.values())
        return speed, max(0.0, slowest_s, (left - sum(due.values())) / speed)

    def _bottleneck(self, now_s: float, clock: Clock) -> str | None:
        if not self._snapshots or now_s - self._snapshots[-1][0] >= _INTERVAL_S:
            self._snapshots = [*self._snapshots[-1:], (now_s, clock)]
        before_s, before = self._snapshots[0]
        # The clock of a worker that died no longer counts, so a sum may become smaller.
        recent = Clock(
            *(max(0, new - old) for new, old in zip(astuple(clock), astuple(before), strict=True))
        )
        return bound_by(recent, now_s - before_s) if recent.images else None
