"""The text of `imagemill partition` and `imagemill sort`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagemill.display.results import format_skipped
from imagemill.display.text import format_statuses
from imagemill.errors import counted

if TYPE_CHECKING:
    from imagemill.arrange.partition import Partitioned
    from imagemill.arrange.sort import Sorted


def format_partitioned(made: Partitioned) -> str:
    """Return the outcome as text."""
    least, most = min(made.partitions), max(made.partitions)
    size = f"{least:,}" if least == most else f"{least:,} or {most:,}"
    what = "copies" if made.link == "copy" else f"{made.link} links"
    lines = [
        f"{counted(made.images, 'image')} in {counted(len(made.partitions), 'partition')} of"
        f" {size}: {made.output}"
        f" ({made.made:,} {what} made)"
    ]
    if made.skipped_by_suffix:
        lines.append(f"skipped: {format_skipped(made.skipped_by_suffix, 0, 0, 0)}")
    return "\n".join(lines)


def format_sorted(outcome: Sorted, *, dry_run: bool = False) -> str:
    """Return the outcome as text: the largest folders, and what was left out."""
    count = len(outcome.folders)
    verb = "would be sorted" if dry_run else "sorted"
    lines = [
        f"{counted(outcome.images, 'image')} {verb} into {counted(count, 'folder')}: {outcome.into}"
    ]
    if not dry_run:
        kind = "copy" if outcome.link == "copy" else f"{outcome.link} link"
        kinds = kind if outcome.made == 1 else "copies" if kind == "copy" else f"{kind}s"
        lines[0] += f" ({outcome.made:,} new {kinds}"
        lines[0] += f", {outcome.removed:,} old ones removed)" if outcome.removed else ")"
    largest = list(outcome.folders.items())[:10]
    width = max((len(f"{number:,}") for _, number in largest), default=0)
    lines += [f"  {number:>{width},}  {folder}" for folder, number in largest]
    if count > len(largest):
        lines.append(f"  … and {count - len(largest):,} more folders")
    if outcome.left_out:
        lines.append(f"left out: {format_statuses(dict(outcome.left_out))}")
    if outcome.unreadable:
        lines.append(f"{outcome.unreadable:,} cannot be read now: {outcome.first_unreadable[0]}")
    return "\n".join(lines)
