"""Rates and the time left, from rows as they are answered."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from imagemill.pipeline.stopwatch import bound_by
from imagemill.records import Clock, Progress

_WINDOW_SHARE = 0.5
"""Of the time so far, that a rate is taken over: the longer the job, the calmer; a change of pace
is followed after as long again.
"""

_WINDOW_S = 15.0
"""At least."""

_TELLING_S = 2.0
"""Of answers, before a rate is told."""

_POINTS = 512

_LUMPS = 4

_INTERVAL_S = 10.0
"""Between looks at the clocks; the bottleneck is that of the last one or two intervals."""

_STILL_S = 30.0
"""After so long without any answer it is said."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How far a job is, how fast it goes, and how long it will take."""

    total: int
    """Images of the job."""
    done: int
    """That have their answers, by this invocation or earlier ones."""
    saved: int
    """Of these: in committed parts, safe whatever happens."""
    state: str
    """`starting`, `first images under way` or `running`."""
    rate: float | None
    """images/s of this invocation, lately; None where nothing can be said yet."""
    left_s: float | None
    """Seconds until the last image has its answer; None where nothing can be said."""
    still_s: float
    """Since the last answer of any device."""
    devices: Mapping[str, float | None]
    """images/s by device."""
    bottleneck: str | None
    """What bounded the last 10 to 20 s; None where nothing can be said yet."""


class _Count:
    """One device's count of answers over time: the moments at which it moved, thinned where there
    are many.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._rows: list[int] = []
        self._last = 0
        self._lost = 0

    def add(self, now_s: float, rows: int) -> None:
        """Note the count. One that became less has lost work to a death; to do it again takes its
        time like any other.
        """
        if rows < self._last:
            self._lost += self._last - rows
        elif rows > self._last:
            self._times.append(now_s)
            self._rows.append(rows + self._lost)
        self._last = rows
        if len(self._times) > _POINTS:
            keep = range(len(self._times) - 1, -1, -2)
            self._times, self._rows = (
                [self._times[i] for i in keep][::-1],
                [self._rows[i] for i in keep][::-1],
            )

    @property
    def moved_s(self) -> float:
        """When it last moved."""
        return self._times[-1] if self._times else 0.0

    @property
    def lump(self) -> int:
        """How many answers come at once: the largest of the last few steps."""
        recent = self._rows[-_LUMPS - 1 :]
        return max((after - before for before, after in pairwise(recent)), default=0)

    def rate(self, now_s: float) -> float | None:
        """Rows/s over the later part of its time, from one step to another, so that it is exact
        where steps come evenly. The first step only starts the clock: before it the way filled up,
        or something else took of the device's time. Where the next step is overdue, the rate is
        what it would be had it come now.
        """
        if not self._times or self._times[-1] - self._times[0] < _TELLING_S:
            return None
        window_s = max(_WINDOW_S, _WINDOW_SHARE * (self._times[-1] - self._times[0]))
        base = max(0, bisect_right(self._times, self._times[-1] - window_s) - 1)
        rows = self._rows[-1] - self._rows[base]
        seconds = self._times[-1] - self._times[base]
        overdue = (rows + self.lump) / max(now_s - self._times[base], 1e-9)
        return min(rows / seconds, overdue)

    def under_way(self, now_s: float, rate: float | None) -> float:
        """Rows that should have come since the last step, at most one step's."""
        return min(self.lump, (rate or 0.0) * max(0.0, now_s - self.moved_s))


class Pace:
    """Turns the progress of one invocation into estimates: nothing but what it is given decides
    them.

    Args:
        total: images of the job.
        resumed: of these, done before; they count as done, but not into any rate.
    """

    def __init__(self, total: int, resumed: int) -> None:
        self._total, self._resumed = total, resumed
        self._counts: dict[str, _Count] = {}
        self._looks: list[tuple[float, Clock]] = []

    def add(self, progress: Progress) -> Estimate:
        """Take the next progress, and say how things are now."""
        now_s = progress.since_first_lease_s
        rates: dict[str, float | None] = {}
        for name, rows in progress.devices.items():
            count = self._counts.setdefault(name, _Count())
            count.add(now_s, rows)
            rates[name] = count.rate(now_s)
        through = sum(progress.devices.values())
        left = max(0, self._total - self._resumed - through)
        rate, left_s = self._left(progress, rates, left)
        return Estimate(
            total=self._total,
            done=self._resumed + through,
            saved=self._resumed + progress.rows,
            state=(
                "running" if through else "first images under way" if progress.ready else "starting"
            ),
            rate=rate,
            left_s=left_s,
            still_s=(
                max(
                    0.0,
                    now_s - max((count.moved_s for count in self._counts.values()), default=0.0),
                )
                if through
                else 0.0
            ),
            devices=rates,
            bottleneck=self._bottleneck(now_s, progress.clock),
        )

    def _left(
        self, progress: Progress, rates: Mapping[str, float | None], left: int
    ) -> tuple[float | None, float | None]:
        """The rate of the devices that have work, and the seconds it takes them, at least those of
        the one with most in hand.
        """
        now_s = progress.since_first_lease_s
        is_last = left <= sum(
            progress.leased.values()
        )  # then the devices without a lease stay idle
        at_work = [name for name in rates if not is_last or progress.leased.get(name)]
        known = [rate for name in at_work if (rate := rates[name]) is not None]
        if not left:
            rate = sum(rate or 0.0 for rate in rates.values())
            return rate or None, 0.0
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return None, None
        speed = {name: mean if rates[name] is None else rates[name] or 0.0 for name in at_work}
        under_way = {name: self._counts[name].under_way(now_s, speed[name]) for name in at_work}
        slowest = max(
            (progress.leased.get(name, 0) - under_way[name]) / speed[name]
            for name in at_work
            if speed[name] > 0
        )
        return sum(speed.values()), max(
            0.0, slowest, (left - sum(under_way.values())) / sum(speed.values())
        )

    def _bottleneck(self, now_s: float, clock: Clock) -> str | None:
        if not self._looks or now_s - self._looks[-1][0] >= _INTERVAL_S:
            self._looks = [*self._looks[-1:], (now_s, clock)]
        before_s, before = self._looks[0]
        # A death takes back what the dead worker's clock had shown.
        lately = Clock(
            *(max(0, getattr(clock, name) - getattr(before, name)) for name in Clock.__slots__)
        )
        return bound_by(lately, now_s - before_s) if lately.images else None
