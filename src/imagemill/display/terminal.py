"""What a run shows while it runs: a live display on a terminal or in a notebook, plain lines
elsewhere.

`Pace` turns what the launcher tells into rates and the time that is left; every display shows its
`Estimate`. Everything goes to stderr, in ASCII, so that no encoding of a log can spoil it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any, Protocol, TextIO

from imagemill.display.pace import Estimate, Pace
from imagemill.display.text import clauses, device_lines, duration, failures, packed, tell
from imagemill.records import Progress

_PLAIN_EVERY_S = 10.0
_PLAIN_AT_MOST_EVERY_S = 600.0
_PLAIN_SHARE = 0.05
"""Of the time so far, after which a log file gets its next line: a night's job leaves some hundred
of them.
"""
_DEVICES = 16
"""Lines of devices at most."""
_NOTEBOOK_WIDTH = 110
"""Columns, in the font of a notebook's output."""
_WIDE = 100
"""Columns from which on the whole job has one line."""
_AROUND = 8
"""Lines of a terminal that are kept free of devices."""


# ── how fast, and how long ────────────────────────────────────────────────────────────────────────


# ── as text ───────────────────────────────────────────────────────────────────────────────────────


# ── displays ──────────────────────────────────────────────────────────────────────────────────────


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
        self._next = now + min(
            _PLAIN_AT_MOST_EVERY_S, max(_PLAIN_EVERY_S, _PLAIN_SHARE * (now - self._begun))
        )
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
        bar.add_row(
            ProgressBar(
                total=max(estimate.total, 1),
                completed=estimate.done,
                complete_style="green",
                finished_style="green",
            )
        )
        self._live.update(
            Group(bar, *(Text(line, overflow="crop", no_wrap=True) for line in lines))
        )

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
            self._handle = importlib.import_module("IPython.display").display(
                shown, raw=True, display_id=True
            )
        else:
            self._handle.update(shown, raw=True)

    def close(self) -> None:
        """See `Display`."""


class DownloadProgress:
    """How far a download is: one line renewed in place on a terminal, a line now and then
    elsewhere.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._begun = self._next = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Show it, if it is time to. `done` and `total` are bytes; what an earlier try left counts
        as done, but not into the rate.
        """
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = done, now
        live = self._stream.isatty()
        finished = done == total
        if now < self._next and not (live and finished):
            return
        self._next = now + (0.2 if live else _PLAIN_EVERY_S)
        rate = (done - self._first) / max(now - self._begun, 1e-3)
        of_all = (
            f" of {total / 2**20:,.1f} MiB ({100 * done / max(total, 1):.0f} %)"
            if total
            else " MiB"
        )
        left = f", {duration((total - done) / rate)} left" if total and rate else ""
        text = f"{done / 2**20:,.1f}{of_all}, {rate / 2**20:,.1f} MiB/s{left}"
        tell(
            f"\r\x1b[K{text}" if live else text,
            self._stream,
            end="\n" if finished or not live else "",
        )


def text(progress: Progress, estimate: Estimate, width: int, most: int) -> list[str]:
    """The whole display but its bar, in lines of at most `width` columns.

    Args:
        progress: as the launcher tells it.
        estimate: what `Pace` makes of it.
        width: columns, at least some 60.
        most: lines of devices at most.
    """
    done, *pace = clauses(estimate)
    parts = (
        [[done, f"{estimate.saved:,} saved", *pace]]
        if width >= _WIDE
        else [[done, f"{estimate.saved:,} saved"], pace]
    )
    said = [
        line for part in parts for line in packed(part, width)
    ]  # in parts, so that no figure that gets longer moves the others
    return (
        said
        + packed(failures(progress.failed_by_status), width)
        + device_lines(progress, estimate, width, most)
    )


def display(total: int, resumed: int) -> Display:
    """The display that fits where stderr goes."""
    if in_notebook():
        return NotebookProgress(total, resumed)
    if (
        sys.stderr is not None
        and sys.stderr.isatty()
        and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    ):
        return LiveProgress(total, resumed)
    return PlainProgress(total, resumed)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
