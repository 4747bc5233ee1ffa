"""What the recipe promises: the crop alone, resampled, is the published way's crop."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pictures
from imagemill.images import preprocess
from imagemill.records import Interpolation, Recipe

RECIPES = st.builds(
    Recipe,
    size=st.sampled_from([7, 32, 224]),
    resize=st.sampled_from([None, 5, 32, 33, 250, 256]),
    interpolation=st.sampled_from(list(Interpolation)),
)


def difference(image: Image.Image, recipe: Recipe) -> int:
    crop = preprocess.locate(*image.size, recipe)
    left, top, right, bottom = preprocess.region(crop, recipe, *image.size)
    part = image.crop((left, top, right, bottom))
    out = np.full((recipe.size, recipe.size, 3), 77, np.uint8)
    preprocess.resample(part, crop, recipe, out, left=left, top=top)
    return int(np.abs(out.astype(int) - preprocess.by_the_book(image, recipe)).max())


@settings(max_examples=150, deadline=None)
@given(width=st.integers(2, 700), height=st.integers(2, 700), recipe=RECIPES)
def test_any_picture_is_cropped_as_published(width: int, height: int, recipe: Recipe) -> None:
    """For any size and recipe, resampling the crop alone is within 2 levels (bicubic: 3) of resizing everything and cropping."""
    allowed = 2 if recipe.interpolation is Interpolation.BILINEAR else 3
    assert difference(pictures.photograph(width, height), recipe) <= allowed


def test_no_resize_copies_pixels() -> None:
    """Without a resize the centre is copied, not computed, and what lacks is black."""
    for size in [(300, 250), (224, 224), (100, 300), (5, 5)]:
        assert difference(pictures.photograph(*size), Recipe(resize=None)) == 0


def test_padding_is_black_and_central() -> None:
    """A picture smaller than the crop lies in the middle of black, the odd pixel at the end, as torchvision pads."""
    out = np.full((8, 8, 3), 77, np.uint8)
    recipe = Recipe(size=8, resize=None)
    preprocess.resample(Image.new("RGB", (3, 2), "white"), preprocess.locate(3, 2, recipe), recipe, out)
    expected = np.zeros((8, 8, 3), np.uint8)
    expected[3:5, 2:5] = 255
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(500, 375, 1), (1023, 4000, 1), (1024, 4000, 2), (4000, 3000, 4), (4096, 4096, 8), (40_000, 40_000, 8), (1, 40_000, 1)],
)
def test_scaling_leaves_twice_the_target(width: int, height: int, factor: int) -> None:
    """A JPEG is scaled in the DCT only while its short side stays at least twice what it is resized to."""
    assert preprocess.shrink(width, height, Recipe()) == factor
    assert preprocess.shrink(width, height, Recipe(resize=None)) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_agrees_with_pillow(orientation: int) -> None:
    """Arrays, and boxes of them, are turned as Pillow turns pictures."""
    image = pictures.photograph(37, 23)
    method = preprocess.TURNS.get(orientation)
    turned = image if method is None else image.transpose(method)
    assert np.array_equal(preprocess.turn(np.asarray(image), orientation), np.asarray(turned))
    box = (3, 5, 11, 20)
    left, top, right, bottom = preprocess.turned_region(box, orientation, *turned.size)
    part = preprocess.turn(np.asarray(image)[top:bottom, left:right], orientation)
    assert np.array_equal(part, np.asarray(turned.crop(box)))


def test_reference_is_pillows_own_resize() -> None:
    """`by_the_book` is what the published recipe's own lines give."""
    image = Image.open(io.BytesIO(pictures.jpeg(500, 375)))
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(preprocess.by_the_book(image, Recipe()), np.asarray(resized)[16:240, 58:282])
