"""A score as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagemill.display.text import format_statuses
from imagemill.errors import counted

if TYPE_CHECKING:
    from imagemill.scoring.record import Score, Share

_CONFUSIONS = 10


def format_score(score: Score) -> str:
    """Return the figures of a score, without those of single classes."""
    return "\n".join(_lines(score))


def _lines(score: Score) -> Iterator[str]:
    shares = [("top-1", score.top1, score.top1_readable)]
    if score.top5 and score.top5_readable:
        shares.append(("top-5", score.top5, score.top5_readable))
    for name, over_all, readable in shares:
        yield f"{name}: {_format_share(over_all)}"
        if score.failed:
            yield f"  over readable images: {_format_share(readable)}"
    if score.failed:
        statuses = format_statuses(dict(score.failed_by_status))
        yield f"failed images, which count as wrong: {score.failed:,} ({statuses})"
    if score.unclassified:
        yield (
            f"images without a class of at least the minimum probability, which count as wrong:"
            f" {score.unclassified:,}"
        )
    means = {"over classes": score.macro, "over images": score.weighted}
    for name, average in means.items():
        if average:
            yield (
                f"mean {name}: precision {average.precision:.1%}, recall"
                f" {average.recall:.1%}, F1 {average.f1:.1%}"
            )
    if score.calibration:
        yield f"expected calibration error: {score.calibration.error:.1%}"
    if score.confusions:
        yield "most frequent confusions (true label → predicted label):"
        for found in score.confusions[:_CONFUSIONS]:
            yield f"  {found.images:>6,}  {found.label} → {found.predicted_label}"
    by = f", matched by {score.matched_by}" if score.matched_by else ""
    yield f"truth: {score.truth}, read as {score.read_as}{by}"
    for why, names in score.omitted_by_reason().items():
        yield f"not given: {names}, because {why}"


def _format_share(share: Share) -> str:
    if share.value is None:
        return "not known: no image is readable"
    return (
        f"{share.value:.1%} ({share.correct:,} of {counted(share.images, 'image')}; 95 % interval"
        f" {share.low:.1%} to {share.high:.1%})"
    )
