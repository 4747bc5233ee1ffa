"""Map samples of more than 8 bits, signed samples and floats to 8 bits, as docs/formats.md says.
NaN becomes the lowest value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def extremes(blocks: Iterable[NDArray[Any]]) -> tuple[float, float]:
    """Return the lowest and the highest finite value of an image that is given in blocks, as Python
    numbers; 0 and 0 if there is none.
    """
    found: list[Any] = []
    for block in blocks:
        ends = [block.min().item(), block.max().item()]
        if not np.isfinite(ends).all():
            finite = block[np.isfinite(block)]
            ends = [finite.min().item(), finite.max().item()] if finite.size else []
        found += ends
    return (min(found), max(found)) if found else (0, 0)


def to_8_bits(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map integers or floats of an image to 8 bits. The extremes are the image's; values beyond
    them are clipped.
    """
    if values.dtype.kind != "f" and low >= 0 and high <= 0xFFFF:
        return (values >> 8 if high > 0xFF else values).astype(np.uint8)
    if low >= 0 and high <= 1:
        low, high = 0, 1
    elif low >= 0 and high <= 0xFF:
        low, high = 0, 0xFF
    elif low == high:
        high = low + 1
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # of a signalling NaN
            offset = values.astype(np.float64)
        if not math.isfinite(255 * (high - low)):  # as with extreme 64-bit floats
            offset, low, high = offset / 512, low / 512, high / 512
        offset -= low
    else:  # modulo 2**64, which is exact for all integers
        offset = (values.astype(np.uint64) - np.uint64(int(low) % 2**64)).astype(np.float64)
    offset *= 255
    offset /= high - low
    np.nan_to_num(np.rint(offset, out=offset), copy=False, nan=0)
    return offset.clip(0, 255, out=offset).astype(np.uint8)
