"""Displays of a running job: a live one on a terminal or in a notebook, plain lines elsewhere.

`Pace` turns the launcher's `Progress` into an `Estimate`, and every display shows the same text of
it. Everything goes to stderr, in ASCII, which every encoding of a log can hold.
"""

from __future__ import annotations

import html
import importlib
import os
import sys
import time
from typing import Any, TextIO, final

from imagemill.display.pace import Estimate, Pace
from imagemill.display.text import (
    failure_parts,
    format_duration,
    format_lines,
    job_parts,
    print_line,
)
from imagemill.records import Progress

_PLAIN_S = 10.0
"""Between lines in a log file at first. Later a line comes after `_PLAIN_SHARE` more of the time so
far, so a job of a night leaves some hundred lines.
"""
_MAX_PLAIN_S = 600.0
_PLAIN_SHARE = 0.05
_MAX_DEVICE_LINES = 16
_NOTEBOOK_COLUMNS = 110
"""Width of the output of a notebook's cell, in its font."""
_RESERVED_LINES = 8
"""Lines of a terminal that are kept free of devices."""


class Display:
    """Shows the progress of one job. Call it with every `Progress`, then close it."""

    _pause_s = 0.0
    """How long what is shown stays."""

    def __init__(self, total: int, resumed: int) -> None:
        self._pace = Pace(total, resumed)
        self._begun_s = self._next_s = time.monotonic()
        self._latest: tuple[Progress, Estimate] | None = None

    def __call__(self, progress: Progress) -> None:
        """Show the progress, if it is time to."""
        self._latest = progress, self._pace.add(progress)
        if time.monotonic() >= self._next_s:
            self.show(*self._latest)
            self._next_s = time.monotonic() + self._pause_s

    def show(self, progress: Progress, estimate: Estimate) -> None:
        """Show the progress and what `Pace` estimates from it."""
        raise NotImplementedError

    def close(self) -> None:
        """Show the end state."""
        if self._latest:
            self.show(*self._latest)


@final
class PlainDisplay(Display):
    """Lines for log files, frequent at first and rare later. The last one is the end state."""

    def __init__(self, total: int, resumed: int, stream: TextIO | None = None) -> None:
        super().__init__(total, resumed)
        self._stream = stream or sys.stderr
        self._printed = ""

    def show(self, progress: Progress, estimate: Estimate) -> None:
        """Print a line, unless it is the last one again or there is nothing to tell yet."""
        line = ", ".join([*job_parts(estimate), *failure_parts(progress.failed_by_status)])
        if progress.since_first_lease_s and line != self._printed:
            self._printed = line
            print_line(line, self._stream)
            wait_s = max(_PLAIN_S, _PLAIN_SHARE * (time.monotonic() - self._begun_s))
            self._pause_s = min(_MAX_PLAIN_S, wait_s)


@final
class TerminalDisplay(Display):
    """A display that rich redraws in place: a bar, the whole job, then the devices."""

    def __init__(self, total: int, resumed: int) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(total, resumed)
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, progress: Progress, estimate: Estimate) -> None:
        """Hand the new text to rich, which draws it four times a second."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width, height = self._console.size
        device_lines = min(_MAX_DEVICE_LINES, max(1, height - _RESERVED_LINES))
        lines = format_lines(progress, estimate, width, device_lines)
        bar = Table.grid(expand=True)  # outside a table a bar does not end its line
        bar.add_row(
            ProgressBar(
                max(estimate.total, 1),
                estimate.done,
                complete_style="green",
                finished_style="green",
            )
        )
        self._live.update(
            Group(bar, *(Text(line, overflow="crop", no_wrap=True) for line in lines))
        )

    def close(self) -> None:
        """Remove the display."""
        self._live.stop()


@final
class NotebookDisplay(Display):
    """A bar and the same text below a notebook's cell, renewed in place once a second.

    rich needs ipywidgets for this, which many notebook servers do not have. `<progress>` is HTML.
    """

    _pause_s = 1.0

    def __init__(self, total: int, resumed: int) -> None:
        super().__init__(total, resumed)
        display = importlib.import_module("IPython.display").display
        self._handle: Any = display({"text/plain": "starting"}, raw=True, display_id=True)

    def show(self, progress: Progress, estimate: Estimate) -> None:
        """Replace bar and text."""
        lines = format_lines(progress, estimate, _NOTEBOOK_COLUMNS, _MAX_DEVICE_LINES)
        text = "\n".join(lines)
        bar = (
            f'<progress style="width:100%" max="{max(estimate.total, 1)}"'
            f' value="{estimate.done}"></progress><pre>{html.escape(text)}</pre>'
        )
        self._handle.update({"text/plain": text, "text/html": bar}, raw=True)


@final
class DownloadDisplay:
    """One line about a download: renewed in place on a terminal, now and then elsewhere.

    Call it with the bytes so far and in all; None if the size is not known. Bytes of an earlier
    attempt count as done, but not into the rate.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._first: tuple[float, int] | None = None
        self._next_s = 0.0

    def __call__(self, done: int, total: int | None) -> None:
        """Print the line, if it is time to or the download is complete."""
        now_s, is_live = time.monotonic(), self._stream.isatty()
        self._first = self._first or (now_s, done)
        if now_s < self._next_s and done != total:
            return
        self._next_s = now_s + (0.2 if is_live else _PLAIN_S)
        rate = (done - self._first[1]) / max(now_s - self._first[0], 1e-3)
        size = f" of {total / 2**20:,.1f} MiB ({done / total:.0%})" if total else " MiB"
        left = f", {format_duration((total - done) / rate)} left" if total and rate else ""
        line = f"{done / 2**20:,.1f}{size}, {rate / 2**20:,.1f} MiB/s{left}"
        end = "" if is_live and done != total else "\n"
        print_line(f"\r\x1b[K{line}" if is_live else line, self._stream, end)


def make_display(total: int, resumed: int) -> Display:
    """Return the display that fits the place where stderr goes."""
    if in_notebook():
        return NotebookDisplay(total, resumed)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if is_terminal and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        return TerminalDisplay(total, resumed)
    return PlainDisplay(total, resumed)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
