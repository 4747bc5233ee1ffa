"""Numbers, durations, failures and progress as text."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TextIO

from imagemill.display.pace import Estimate
from imagemill.errors import counted
from imagemill.records import Progress

_STALLED_S = 30.0
"""From this time on without any result, the display says so."""
_MIN_COLUMNS = 20
_ONE_LINE_COLUMNS = 100
"""In a display of this width, the state of the whole job takes one line, else two."""


def print_line(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print to stderr, or to `stream`. If its reader is gone, the text is dropped and the job goes
    on: the log holds every message too.
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=stream or sys.stderr, flush=True)


def print_message(text: str) -> None:
    """Print to stderr, in lines that fit into a terminal."""
    print_line(fit_to(text, sys.stderr))


def fit_to(text: str, stream: TextIO | None) -> str:
    """Return a text for a stream: as it is, for `grep`, unless the stream is a terminal."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream else 0
    except (OSError, ValueError, AttributeError):  # no terminal, or closed, or a replacement
        return text
    return fit(text, width) if width else text


def fit(text: str, width: int) -> str:
    """Break long lines between words. Commands in backticks, paths and URLs stay in one piece, so
    that they can be copied.
    """
    whole = re.sub(r"`[^`\n]*`", lambda found: found[0].replace(" ", "\0"), text)
    lines = []
    for line in whole.split("\n"):
        indent = line[: len(line) - len(line.lstrip())] + "  "
        lines += textwrap.wrap(
            line,
            max(width - 1, _MIN_COLUMNS),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines).replace("\0", " ")


def format_duration(seconds: float) -> str:
    """Return seconds for people, such as `42s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_statuses(failed: Mapping[str, int]) -> str:
    """Return failures by status, most frequent first, such as `2 corrupt, 1 empty`."""
    return ", ".join(
        f"{count:,} {status}"
        for status, count in sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    )


def job_parts(estimate: Estimate) -> list[str]:
    """Return the state of the whole job in parts, the most important first, such as
    `600 of 1,100 images (54 %)`, `50.0 images/s`, `12s elapsed` and `10s left`.
    """
    share = 100 * estimate.done // max(estimate.total, 1)
    parts = [f"{estimate.done:,} of {counted(estimate.total, 'image')} ({share} %)"]
    if estimate.state != "running":
        parts.append(estimate.state)
    if estimate.rate is not None:
        parts.append(f"{estimate.rate:,.1f} images/s")
    if estimate.elapsed_s >= 1:
        parts.append(f"{format_duration(estimate.elapsed_s)} elapsed")
    if estimate.left_s is not None and estimate.state == "running":
        parts.append(f"{format_duration(estimate.left_s)} left")
    if estimate.stalled_s >= _STALLED_S:
        parts.append(f"no result for {format_duration(estimate.stalled_s)}")
    if estimate.bottleneck and estimate.state == "running":
        parts.append(f"bounded by {estimate.bottleneck}")
    return parts


def failure_parts(failed: Mapping[str, int]) -> list[str]:
    """Return the failures in parts, such as `3 failed: 2 corrupt` and `1 empty`."""
    if not failed:
        return []
    first, *rest = format_statuses(failed).split(", ")
    return [f"{sum(failed.values()):,} failed: {first}", *rest]


def format_lines(
    progress: Progress, estimate: Estimate, width: int, max_device_lines: int
) -> list[str]:
    """Return everything a live display shows below its bar, in lines of at most `width` columns
    (at least 60).
    """
    done, *pace = job_parts(estimate)
    saved = [done, f"{estimate.saved:,} saved"]
    # In fixed groups, so that a figure that gets longer does not move the others.
    groups = [saved + pace] if width >= _ONE_LINE_COLUMNS else [saved, pace]
    groups.append(failure_parts(progress.failed_by_status))
    lines = [line for parts in groups for line in wrap_parts(parts, width)]
    return lines + device_lines(progress, estimate, width, max_device_lines)


def wrap_parts(parts: Iterable[str], width: int) -> list[str]:
    """Join parts by commas into lines of at most `width` columns, broken between parts."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width - 1:
            lines[-1] += f", {part}"
        else:
            if lines:
                lines[-1] += ","
            lines.append(part)
    return lines


def device_lines(progress: Progress, estimate: Estimate, width: int, max_lines: int) -> list[str]:
    """Return a cell for each device, several on a line if there is room, in at most `max_lines`
    lines. If there are more devices, the last line sums up the others.
    """
    names = list(progress.devices)
    longest = max(map(len, names), default=0)
    cells = []
    for name in names:
        rate = estimate.devices.get(name)
        speed = f"{rate:>9,.1f} images/s" if rate is not None else f"{'-':>9} images/s"
        restarts = progress.restarts.get(name, 0)
        again = f", {counted(restarts, 'restart')}" if restarts else ""
        if name in progress.retired:
            again = ", retired"
        cells.append(f"{name:<{longest}} {progress.devices[name]:>11,} images {speed}{again}")
    cell_width = max(map(len, cells), default=0) + 2
    across = max(1, min(width // cell_width, -(-len(cells) // 4)))
    rest: list[str] = []
    if len(cells) > max_lines * across:
        room = max(1, max_lines - 1) * across
        others = names[room:]
        images = sum(progress.devices[name] for name in others)
        rate = sum(estimate.devices.get(name) or 0.0 for name in others)
        rest = [f"  and {len(others):,} more: {counted(images, 'image')}, {rate:,.1f} images/s"]
        cells = cells[:room]
    down = -(-len(cells) // across)
    rows = [
        "".join(f"  {cell:<{cell_width - 2}}" for cell in cells[row::down]).rstrip()
        for row in range(down)
    ]
    return rows + rest
