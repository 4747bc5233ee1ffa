"""Preprocessing as it is published, for comparison with ours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.pipeline.decoding.preprocess import FILTERS, resized
from imagemill.records import Recipe


def reference_pixels(image: Image.Image, recipe: Recipe) -> NDArray[np.uint8]:
    """Resize the whole RGB image and cut its centre out; return uint8 (size, size, 3)."""
    image = image.convert("RGB")
    if recipe.resize is not None:
        image = image.resize(resized(*image.size, recipe), FILTERS[recipe.interpolation])
    pixels = np.asarray(image)
    for axis in (0, 1):
        missing = max(0, recipe.size - pixels.shape[axis])
        pixels = np.pad(
            pixels, [(missing // 2, (missing + 1) // 2) if a == axis else (0, 0) for a in range(3)]
        )
        first = int(round((pixels.shape[axis] - recipe.size) / 2.0))  # noqa: RUF046 - as torchvision spells it
        pixels = pixels.take(range(first, first + recipe.size), axis=axis)
    return pixels
