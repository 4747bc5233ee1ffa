"""What the recipe promises: the crop alone, resampled, is the published way's crop."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample_images
from imagemill.pipeline.decoding import preprocess
from imagemill.records import Interpolation, Recipe
from reference import reference_pixels

RECIPES = st.builds(
    Recipe,
    size=st.sampled_from([7, 32, 224]),
    resize=st.sampled_from(
        [None, 5, 32, 33, 250, 256, (32, 32), (256, 256), (300, 40), (224, 251)]
    ),
    interpolation=st.sampled_from(
        [item for item in Interpolation if item not in (Interpolation.NEAREST, Interpolation.BOX)]
    ),
)
LEVELS = {
    Interpolation.BILINEAR: 2,
    Interpolation.HAMMING: 2,
    Interpolation.BICUBIC: 3,
    Interpolation.LANCZOS: 4,
}


def difference(image: Image.Image, recipe: Recipe) -> int:
    crop = preprocess.locate(*image.size, recipe)
    left, top, right, bottom = preprocess.region(crop, recipe, *image.size)
    part = image.crop((left, top, right, bottom))
    out = np.full((recipe.size, recipe.size, 3), 77, np.uint8)
    preprocess.resample(part, crop, recipe, out, left=left, top=top)
    return int(np.abs(out.astype(int) - reference_pixels(image, recipe)).max())


@settings(max_examples=150, deadline=None)
@given(width=st.integers(2, 700), height=st.integers(2, 700), recipe=RECIPES)
def test_any_image_is_cropped_as_published(width: int, height: int, recipe: Recipe) -> None:
    """For any size and recipe, resampling the crop alone is within a few levels of resizing
    everything and cropping.
    """
    assert (
        difference(sample_images.photograph(width, height), recipe) <= LEVELS[recipe.interpolation]
    )


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 300),
    height=st.integers(2, 300),
    interpolation=st.sampled_from(list(Interpolation)),
)
def test_a_squashed_image_is_pillows_own_resize(
    width: int, height: int, interpolation: Interpolation
) -> None:
    """Squashed to just the model's size, by any of the six filters: Pillow's `resize`, bit for
    bit.
    """
    image = sample_images.photograph(width, height)
    recipe = Recipe(size=96, resize=(96, 96), interpolation=interpolation)
    expected = np.asarray(image.resize((96, 96), Image.Resampling[interpolation.name]))
    for given_as in (image, np.asarray(image)):
        out = np.empty((96, 96, 3), np.uint8)
        preprocess.resample(given_as, preprocess.locate(width, height, recipe), recipe, out)
        assert np.array_equal(out, expected)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    interpolation=st.sampled_from([Interpolation.NEAREST, Interpolation.BOX]),
)
def test_filters_with_hard_edges_are_cropped_as_published(
    width: int, height: int, interpolation: Interpolation
) -> None:
    """`nearest` and `box` too pick the pixels that Pillow picks; odd sizes, where no edge of the
    filter falls on that of a pixel.
    """
    recipe = Recipe(size=96, resize=(127, 131), interpolation=interpolation)
    assert difference(sample_images.photograph(2 * width + 1, 2 * height + 1), recipe) <= 1


def test_the_image_is_squashed_and_its_centre_cut_out() -> None:
    """Width comes first: the left half of an image twice as wide as the crop is as far as the
    crop's left edge.
    """
    wide = Image.new("RGB", (40, 10), "white")
    wide.paste("black", (0, 0, 20, 10))
    recipe = Recipe(size=8, resize=(16, 8), interpolation=Interpolation.NEAREST)
    out = np.empty((8, 8, 3), np.uint8)
    preprocess.resample(wide, preprocess.locate(40, 10, recipe), recipe, out)
    assert out[:, :4].max() == 0
    assert out[:, 4:].min() == 255


def test_no_resize_copies_pixels() -> None:
    """Without a resize the centre is copied, not computed, and what lacks is black."""
    for size in [(300, 250), (224, 224), (100, 300), (5, 5)]:
        assert difference(sample_images.photograph(*size), Recipe(resize=None)) == 0


def test_padding_is_black_and_central() -> None:
    """An image smaller than the crop lies in the middle of black, the odd pixel at the end, as
    torchvision pads.
    """
    out = np.full((8, 8, 3), 77, np.uint8)
    recipe = Recipe(size=8, resize=None)
    preprocess.resample(
        Image.new("RGB", (3, 2), "white"), preprocess.locate(3, 2, recipe), recipe, out
    )
    expected = np.zeros((8, 8, 3), np.uint8)
    expected[3:5, 2:5] = 255
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [
        (500, 375, 1),
        (1023, 4000, 1),
        (1024, 4000, 2),
        (4000, 3000, 4),
        (4096, 4096, 8),
        (40_000, 40_000, 8),
        (1, 40_000, 1),
    ],
)
def test_scaling_leaves_twice_the_target(width: int, height: int, factor: int) -> None:
    """A JPEG is scaled in the DCT only while its short side stays at least twice what it is resized
    to.
    """
    assert preprocess.shrink(width, height, Recipe()) == factor
    assert preprocess.shrink(width, height, Recipe(resize=None)) == 1
    assert preprocess.shrink(width, height, Recipe(interpolation=Interpolation.NEAREST)) == 1


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [
        (1023, 4000, 1),
        (4000, 511, 1),
        (1024, 512, 2),
        (4096, 1024, 4),
        (4000, 9000, 4),
        (4096, 2048, 8),
    ],
)
def test_scaling_leaves_twice_both_sides_of_a_squashed_image(
    width: int, height: int, factor: int
) -> None:
    """It is squashed to 256×128: neither side is scaled to less than twice that."""
    assert preprocess.shrink(width, height, Recipe(size=100, resize=(256, 128))) == factor


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_agrees_with_pillow(orientation: int) -> None:
    """Arrays, and boxes of them, are turned as Pillow turns images."""
    image = sample_images.photograph(37, 23)
    method = preprocess.TURNS.get(orientation)
    turned = image if method is None else image.transpose(method)
    assert np.array_equal(preprocess.turn(np.asarray(image), orientation), np.asarray(turned))
    box = (3, 5, 11, 20)
    left, top, right, bottom = preprocess.turned_region(box, orientation, *turned.size)
    part = preprocess.turn(np.asarray(image)[top:bottom, left:right], orientation)
    assert np.array_equal(part, np.asarray(turned.crop(box)))


def test_reference_is_pillows_own_resize() -> None:
    """`reference_pixels` is what the published recipe's own lines give."""
    image = Image.open(io.BytesIO(sample_images.jpeg(500, 375)))
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(reference_pixels(image, Recipe()), np.asarray(resized)[16:240, 58:282])
