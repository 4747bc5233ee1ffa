"""Intervals of shares."""

from __future__ import annotations

from math import sqrt
from typing import Final

_Z95: Final = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    E. B. Wilson: Probable inference, the law of succession, and statistical inference, JASA 22
    (1927). Without trials it is (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = (
        _Z95 / (1 + z2 / trials) * sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    )
    # At the ends the interval touches 0 or 1; rounding must not take it past the share itself.
    return (0.0 if successes == 0 else min(share, centre - half)), (
        1.0 if successes == trials else max(share, centre + half)
    )
