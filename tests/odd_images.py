"""Images of odd sizes that need nothing but NumPy, so that the scripts that make golden files in
other environments and the tests have the same ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES = ((301, 227), (227, 383), (641, 299))
"""Width and height."""
ANSWERED = (*SIZES, (53, 37))
"""Those that the model folders in tests/fixtures/folders were asked about."""


def odd_image(width: int, height: int) -> NDArray[np.uint8]:
    """Blocks of 7×5 pixels over a gradient, and noise: uint8 (height, width, 3), RGB."""
    rng = np.random.Generator(np.random.PCG64(width * 1000 + height))
    blocks = rng.integers(0, 160, (-(-height // 5), -(-width // 7), 3), np.uint8)
    image: NDArray[Any] = blocks.repeat(5, axis=0).repeat(7, axis=1)[:height, :width].astype(int)
    image[..., 0] += 60 * np.arange(width) // width
    image[..., 1] += 60 * np.arange(height)[:, None] // height
    image += rng.integers(0, 36, image.shape, np.uint8)
    return image.astype(np.uint8)


def sampled(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return about 16 rows and columns of an image (height, width, 3), spread over all of it."""
    rows, columns = (max(1, side // 16) for side in pixels.shape[:2])
    return pixels[::rows, ::columns]
