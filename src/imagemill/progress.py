"""What a run shows while it runs: a live display on a terminal or in a notebook, plain lines elsewhere.

`Pace` turns what the launcher tells into rates and the time that is left; every display shows its `Estimate`. Everything goes to stderr,
in ASCII, so that no encoding of a log can spoil it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TextIO

from imagemill.pipeline.stopwatch import bound_by
from imagemill.records import Clock, Progress

_PLAIN_EVERY_S = 10.0
_PLAIN_AT_MOST_EVERY_S = 600.0
_PLAIN_SHARE = 0.05
"""Of the time so far, after which a log file gets its next line: a night's job leaves some hundred of them."""
_WINDOW_SHARE = 0.5
"""Of the time so far, that a rate is taken over: the longer the job, the calmer; a change of pace is followed after as long again."""
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
_DEVICES = 16
"""Lines of devices at most."""
_NOTEBOOK_WIDTH = 110
"""Columns, in the font of a notebook's output."""
_WIDE = 100
"""Columns from which on the whole job has one line."""
_AROUND = 8
"""Lines of a terminal that are kept free of devices."""


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print to stderr, or `stream`. Where nobody reads it any more the job goes on: what it has to say is in its log."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=stream or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m07s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def statuses(failed: Mapping[str, int]) -> str:
    """Failures by kind, most frequent first."""
    return ", ".join(f"{count:,} {status}" for status, count in sorted(failed.items(), key=lambda item: (-item[1], item[0])))


# ── how fast, and how long ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Estimate:
    """How far a job is, how fast it goes, and how long it will take."""

    total: int
    """Pictures of the job."""
    done: int
    """That have their answers, by this invocation or earlier ones."""
    saved: int
    """Of these: in committed parts, safe whatever happens."""
    state: str
    """`starting`, `first pictures under way` or `running`."""
    rate: float | None
    """images/s of this invocation, lately; None where nothing can be said yet."""
    left_s: float | None
    """Seconds until the last picture has its answer; None where nothing can be said."""
    still_s: float
    """Since the last answer of any device."""
    devices: Mapping[str, float | None]
    """images/s by device."""
    bottleneck: str | None
    """What bounded the last 10 to 20 s; None where nothing can be said yet."""


class _Count:
    """One device's count of answers over time: the moments at which it moved, thinned where there are many."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._rows: list[int] = []
        self._last = 0
        self._lost = 0
        self._undisturbed_s = -1.0

    def disturbed(self, now_s: float) -> None:
        """Something that ends soon takes of the device's time: no rate is taken from what comes until then."""
        self._undisturbed_s = now_s

    def add(self, now_s: float, rows: int) -> None:
        """Note the count. One that became less has lost work to a death; to do it again takes its time like any other."""
        if rows < self._last:
            self._lost += self._last - rows
        elif rows > self._last:
            self._times.append(now_s)
            self._rows.append(rows + self._lost)
        self._last = rows
        if len(self._times) > _POINTS:
            keep = range(len(self._times) - 1, -1, -2)
            self._times, self._rows = [self._times[i] for i in keep][::-1], [self._rows[i] for i in keep][::-1]

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
        """Rows/s over the later part of its time, from one step to another, so that it is exact where steps come evenly. The first step
        only starts the clock: before it the way filled up, or something else took of the device's time. Where the next step is overdue, the
        rate is what it would be had it come now."""
        first = bisect_right(self._times, self._undisturbed_s)
        if first >= len(self._times) or self._times[-1] - self._times[first] < _TELLING_S:
            return None
        window_s = max(_WINDOW_S, _WINDOW_SHARE * (self._times[-1] - self._times[first]))
        base = max(first, bisect_right(self._times, self._times[-1] - window_s) - 1)
        rows = self._rows[-1] - self._rows[base]
        seconds = self._times[-1] - self._times[base]
        overdue = (rows + self.lump) / max(now_s - self._times[base], 1e-9)
        return min(rows / seconds, overdue)

    def under_way(self, now_s: float, rate: float | None) -> float:
        """Rows that should have come since the last step, at most one step's."""
        return min(self.lump, (rate or 0.0) * max(0.0, now_s - self.moved_s))


class Pace:
    """Turns the progress of one invocation into estimates: nothing but what it is given decides them.

    Args:
        total: pictures of the job.
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
            if progress.sampling:
                count.disturbed(now_s)
            rates[name] = count.rate(now_s)
        through = sum(progress.devices.values())
        left = max(0, self._total - self._resumed - through)
        rate, left_s = self._left(progress, rates, left)
        return Estimate(
            total=self._total,
            done=self._resumed + through,
            saved=self._resumed + progress.rows,
            state="running" if through else "first pictures under way" if progress.ready else "starting",
            rate=rate,
            left_s=left_s,
            still_s=max(0.0, now_s - max((count.moved_s for count in self._counts.values()), default=0.0)) if through else 0.0,
            devices=rates,
            bottleneck=self._bottleneck(now_s, progress.clock),
        )

    def _left(self, progress: Progress, rates: Mapping[str, float | None], left: int) -> tuple[float | None, float | None]:
        """The rate of the devices that have work, and the seconds it takes them, at least those of the one with most in hand."""
        now_s = progress.since_first_lease_s
        is_last = left <= sum(progress.leased.values())  # then the devices without a lease stay idle
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
        slowest = max((progress.leased.get(name, 0) - under_way[name]) / speed[name] for name in at_work if speed[name] > 0)
        return sum(speed.values()), max(0.0, slowest, (left - sum(under_way.values())) / sum(speed.values()))

    def _bottleneck(self, now_s: float, clock: Clock) -> str | None:
        if not self._looks or now_s - self._looks[-1][0] >= _INTERVAL_S:
            self._looks = [*self._looks[-1:], (now_s, clock)]
        before_s, before = self._looks[0]
        # A death takes back what the dead worker's clock had shown.
        lately = Clock(*(max(0, getattr(clock, name) - getattr(before, name)) for name in Clock.__slots__))
        return bound_by(lately, now_s - before_s) if lately.pictures else None


# ── as text ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def clauses(estimate: Estimate) -> list[str]:
    """What is to be said of the whole job, the most important first."""
    share = 100 * estimate.done // max(estimate.total, 1)
    said = [f"{estimate.done:,} of {estimate.total:,} ({share} %)"]
    if estimate.state != "running":
        said.append(estimate.state)
    elif estimate.rate is not None and estimate.left_s is not None:
        said += [f"{estimate.rate:,.1f} images/s", f"{duration(estimate.left_s)} left"]
    if estimate.still_s >= _STILL_S:
        said.append(f"no answer for {duration(estimate.still_s)}")
    if estimate.bottleneck and estimate.state == "running":
        said.append(f"bounded by {estimate.bottleneck}")
    return said


def failures(failed: Mapping[str, int]) -> list[str]:
    """What is to be said of the pictures without an answer; nothing where there are none."""
    if not failed:
        return []
    first, *rest = statuses(failed).split(", ")
    return [f"{sum(failed.values()):,} failed: {first}", *rest]


def packed(said: Iterable[str], width: int) -> list[str]:
    """Clauses as lines of at most `width` columns, broken between clauses."""
    lines: list[str] = []
    for clause in said:
        if lines and len(lines[-1]) + 2 + len(clause) <= width - 1:
            lines[-1] += f", {clause}"
        else:
            if lines:
                lines[-1] += ","
            lines.append(clause)
    return lines


def device_lines(progress: Progress, estimate: Estimate, width: int, most: int) -> list[str]:
    """A line per device, several beside each other where there is room, at most `most` lines; what all others make together."""
    names = list(progress.devices)
    longest = max(map(len, names), default=0)
    cells = []
    for name in names:
        rate = estimate.devices.get(name)
        speed = f"{rate:>9,.1f} images/s" if rate is not None else f"{'-':>9} images/s"
        restarts = progress.restarts.get(name, 0)
        again = f", {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
        cells.append(f"{name:<{longest}} {progress.devices[name]:>11,} images {speed}{again}")
    cell_width = max(map(len, cells), default=0) + 2
    across = max(1, min(width // cell_width, -(-len(cells) // 4)))
    rest: list[str] = []
    if len(cells) > most * across:
        room = max(1, most - 1) * across
        others = names[room:]
        made, speed_of = sum(progress.devices[name] for name in others), sum(estimate.devices.get(name) or 0.0 for name in others)
        rest = [f"  and {len(others):,} more: {made:,} images, {speed_of:,.1f} images/s"]
        cells = cells[:room]
    down = -(-len(cells) // across)
    rows = ["".join(f"  {cell:<{cell_width - 2}}" for cell in cells[row::down]).rstrip() for row in range(down)]
    return rows + rest


# ── displays ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Display(Protocol):
    """Shows the progress of one invocation."""

    def __call__(self, progress: Progress) -> None:
        """Show it, if it is time to."""

    def close(self) -> None:
        """The workers are gone."""


class PlainProgress:
    """A line now and then, for log files: often at first, rarely later."""

    def __init__(self, total: int, resumed: int, stream: TextIO | None = None) -> None:
        self._pace = Pace(total, resumed)
        self._stream = stream or sys.stderr
        self._begun = self._next = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """See `Display`."""
        estimate = self._pace.add(progress)
        now = time.monotonic()
        if now < self._next or not progress.since_first_lease_s:
            return
        self._next = now + min(_PLAIN_AT_MOST_EVERY_S, max(_PLAIN_EVERY_S, _PLAIN_SHARE * (now - self._begun)))
        tell(", ".join([*clauses(estimate), *failures(progress.failed_by_status)]), self._stream)

    def close(self) -> None:
        """See `Display`."""


class LiveProgress:
    """A display that renews itself in place: a bar, the whole job, then the devices."""

    def __init__(self, total: int, resumed: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._pace = Pace(total, resumed)
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def __call__(self, progress: Progress) -> None:
        """See `Display`."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        estimate = self._pace.add(progress)
        width, height = self._console.size
        lines = text(progress, estimate, width, min(_DEVICES, max(1, height - _AROUND)))
        bar = Table.grid(expand=True)  # a bar of its own would not end its line
        bar.add_row(ProgressBar(total=max(estimate.total, 1), completed=estimate.done, complete_style="green", finished_style="green"))
        self._live.update(Group(bar, *(Text(line, overflow="crop", no_wrap=True) for line in lines)))

    def close(self) -> None:
        """See `Display`."""
        self._live.stop()


class NotebookProgress:
    """The same text below a notebook's cell, renewed in place."""

    def __init__(self, total: int, resumed: int) -> None:
        self._pace = Pace(total, resumed)
        self._handle: Any = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        """See `Display`."""
        estimate = self._pace.add(progress)
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 1.0
        shown = {"text/plain": "\n".join(text(progress, estimate, _NOTEBOOK_WIDTH, _DEVICES))}
        if self._handle is None:
            self._handle = importlib.import_module("IPython.display").display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def close(self) -> None:
        """See `Display`."""


class DownloadProgress:
    """How far a download is: one line renewed in place on a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._begun = self._next = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Show it, if it is time to. `done` and `total` are bytes; what an earlier try left counts as done, but not into the rate."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = done, now
        live = self._stream.isatty()
        finished = done == total
        if now < self._next and not (live and finished):
            return
        self._next = now + (0.2 if live else _PLAIN_EVERY_S)
        rate = (done - self._first) / max(now - self._begun, 1e-3)
        of_all = f" of {total / 2**20:,.1f} MiB ({100 * done / max(total, 1):.0f} %)" if total else " MiB"
        left = f", {duration((total - done) / rate)} left" if total and rate else ""
        text = f"{done / 2**20:,.1f}{of_all}, {rate / 2**20:,.1f} MiB/s{left}"
        tell(f"\r\x1b[K{text}" if live else text, self._stream, end="\n" if finished or not live else "")


def text(progress: Progress, estimate: Estimate, width: int, most: int) -> list[str]:
    """The whole display but its bar, in lines of at most `width` columns.

    Args:
        progress: as the launcher tells it.
        estimate: what `Pace` makes of it.
        width: columns, at least some 60.
        most: lines of devices at most.
    """
    done, *pace = clauses(estimate)
    parts = [[done, f"{estimate.saved:,} saved", *pace]] if width >= _WIDE else [[done, f"{estimate.saved:,} saved"], pace]
    said = [line for part in parts for line in packed(part, width)]  # in parts, so that no figure that gets longer moves the others
    return said + packed(failures(progress.failed_by_status), width) + device_lines(progress, estimate, width, most)


def display(total: int, resumed: int) -> Display:
    """The display that fits where stderr goes."""
    if in_notebook():
        return NotebookProgress(total, resumed)
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        return LiveProgress(total, resumed)
    return PlainProgress(total, resumed)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
