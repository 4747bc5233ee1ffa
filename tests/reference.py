"""Preprocessing as it is published, for comparison with ours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagemill.pipeline.decoding.preprocess import FILTERS, resized
from imagemill.records import Centre, Recipe


def reference_pixels(image: Image.Image, recipe: Recipe) -> NDArray[np.uint8]:
    """Resize the whole RGB image and cut its centre out or surround it; return uint8 (height,
    width, 3).
    """
    image = image.convert("RGB")
    if recipe.resize is not None:
        image = image.resize(resized(*image.size, recipe), FILTERS[recipe.interpolation])
    width, height = max(image.width, recipe.width), max(image.height, recipe.height)
    whole = Image.new("RGB", (width, height), recipe.fill)
    missing = np.subtract((width, height), image.size)
    extra = np.subtract((width, height), (recipe.width, recipe.height))
    if recipe.centre is Centre.TORCHVISION:
        before, first = missing // 2, [int(round(item / 2.0)) for item in extra]  # noqa: RUF046 - as torchvision spells it
    else:
        before, first = -(-missing // 2), list(extra // 2)
    whole.paste(image, tuple(map(int, before)))
    left, top = map(int, first)
    return np.asarray(whole.crop((left, top, left + recipe.width, top + recipe.height)))
