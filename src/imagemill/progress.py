"""What a run shows while it runs: a live display on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TextIO

from imagemill.launcher import Progress

_PLAIN_EVERY_S = 10.0


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


def statuses(failed: dict[str, int]) -> str:
    """Failures by kind, most frequent first."""
    return ", ".join(f"{count} {status}" for status, count in sorted(failed.items(), key=lambda item: (-item[1], item[0])))


class PlainProgress:
    """A line now and then, for log files."""

    def __init__(self, total: int, resumed: int, stream: TextIO | None = None) -> None:
        self._total, self._resumed = total, resumed
        self._stream = stream or sys.stderr
        self._next = time.monotonic()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def __call__(self, progress: Progress) -> None:
        """Show it, if it is time to."""
        now = time.monotonic()
        if now < self._next or not progress.since_first_lease_s:
            return
        self._next = now + _PLAIN_EVERY_S
        tell(line(progress, self._total, self._resumed), self._stream)


class LiveProgress:
    """A display that renews itself in place: the whole job, then a line per device."""

    def __init__(self, total: int, resumed: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._total, self._resumed = total, resumed
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Renew the display."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        lines: list[ProgressBar | Text] = [
            ProgressBar(total=max(self._total, 1), completed=self._resumed + progress.rows),
            Text(line(progress, self._total, self._resumed), overflow="ellipsis", no_wrap=True),
        ]
        for name, rows in list(progress.devices.items())[:16]:
            rate = rows / progress.since_first_lease_s if progress.since_first_lease_s else 0.0
            restarts = f", {progress.restarts[name]} restarts" if progress.restarts[name] else ""
            lines.append(Text(f"  {name:<10} {rows:>9,} images {rate:>9,.1f} images/s{restarts}", overflow="ellipsis", no_wrap=True))
        self._live.update(Group(*lines))


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


def line(progress: Progress, total: int, resumed: int) -> str:
    """The whole job in one line."""
    done = resumed + progress.rows
    rate = progress.rows / progress.since_first_lease_s if progress.since_first_lease_s else 0.0
    if not progress.rows:
        state = "starting" if not progress.ready else "first shards under way"
    else:
        state = f"{rate:,.1f} images/s, {duration((total - done) / rate)} left"
    failed = f", {statuses(progress.failed_by_status)}" if progress.failed_by_status else ""
    return f"{done:,} of {total:,} ({100 * done / max(total, 1):.0f} %), {state}{failed}"


def display(total: int, resumed: int, *, quiet: bool = False) -> PlainProgress | LiveProgress:
    """The display that fits where stderr goes."""
    if not quiet and sys.stderr.isatty():
        return LiveProgress(total, resumed)
    return PlainProgress(total, resumed)
