"""Intervals of shares."""

from __future__ import annotations

from math import sqrt
from typing import Final

_Z95: Final = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    E. B. Wilson: Probable inference, the law of succession, and statistical inference, JASA 22
    (1927). If total is 0 it is (0, 1).
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}")
    if total == 0:
        return 0.0, 1.0
    share, z2 = successes / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # At the ends the interval touches 0 or 1; rounding must not take it past the share itself.
    return (0.0 if successes == 0 else min(share, centre - half)), (
        1.0 if successes == total else max(share, centre + half)
    )
