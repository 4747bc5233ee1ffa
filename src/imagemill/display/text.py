"""Numbers, durations and failures as text for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

from imagemill.display.pace import _STILL_S, Estimate
from imagemill.records import Progress


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print to stderr, or `stream`. Where nobody reads it any more the job goes on: what it has to
    say is in its log.
    """
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
    return ", ".join(
        f"{count:,} {status}"
        for status, count in sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    )


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
    """What is to be said of the images without an answer; nothing where there are none."""
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
    """A line per device, several beside each other where there is room, at most `most` lines; what
    all others make together.
    """
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
        made, speed_of = (
            sum(progress.devices[name] for name in others),
            sum(estimate.devices.get(name) or 0.0 for name in others),
        )
        rest = [f"  and {len(others):,} more: {made:,} images, {speed_of:,.1f} images/s"]
        cells = cells[:room]
    down = -(-len(cells) // across)
    rows = [
        "".join(f"  {cell:<{cell_width - 2}}" for cell in cells[row::down]).rstrip()
        for row in range(down)
    ]
    return rows + rest
