"""What the recipe promises: the crop alone, resampled, is the published way's crop."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import sample_images
from imagemill.pipeline.decoding import preprocess
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Centre, Interpolation, Limits, Recipe
from reference import reference_pixels

RECIPES = st.builds(
    Recipe,
    height=st.sampled_from([7, 32, 224]),
    width=st.sampled_from([7, 40, 224]),
    pad=st.booleans(),
    fill=st.sampled_from(["#000000", "#fe7f01"]),
    centre=st.sampled_from(Centre),
    resize=st.sampled_from(
        [None, 5, 32, 33, 250, 256, (32, 32), (256, 256), (300, 40), (224, 251)]
    ),
    interpolation=st.sampled_from(Interpolation),
)


def difference(image: Image.Image, recipe: Recipe) -> int:
    crop = preprocess.locate(*image.size, recipe)
    left, top, right, bottom = preprocess.region(crop, recipe)
    part = np.asarray(image.crop((left, top, right, bottom)))
    out = np.full((recipe.height, recipe.width, 3), 77, np.uint8)
    preprocess.resample(part, crop, recipe, out, left=left, top=top)
    return int(np.abs(out.astype(int) - reference_pixels(image, recipe)).max())


@pytest.mark.process
@settings(max_examples=150, deadline=None)
@given(width=st.integers(2, 700), height=st.integers(2, 700), recipe=RECIPES)
def test_any_image_is_cropped_as_published(width: int, height: int, recipe: Recipe) -> None:
    """For any size and recipe, resampling the crop alone gives the bits of Pillow's steps: resize
    everything, then crop or surround.
    """
    assert difference(sample_images.photograph(width, height), recipe) == 0


@pytest.mark.parametrize(("width", "height"), [(482, 778), (467, 746), (778, 482)])
def test_the_axes_are_resampled_in_the_order_of_the_whole_image(width: int, height: int) -> None:
    """Pillow, asked for the crop alone, would begin with the other axis, and a fifth of the values
    would be rounded otherwise.
    """
    recipe = Recipe(224, 224, 256, interpolation=Interpolation.BICUBIC)
    image = sample_images.photograph(width, height)
    out = np.empty((224, 224, 3), np.uint8)
    preprocess.resample(np.asarray(image), preprocess.locate(width, height, recipe), recipe, out)
    assert np.array_equal(out, reference_pixels(image, recipe))


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
    recipe = Recipe(96, 96, (96, 96), interpolation=interpolation)
    expected = np.asarray(image.resize((96, 96), Image.Resampling[interpolation.name]))
    out = np.empty((96, 96, 3), np.uint8)
    preprocess.resample(np.asarray(image), preprocess.locate(width, height, recipe), recipe, out)
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
    recipe = Recipe(96, 96, (127, 131), interpolation=interpolation)
    assert difference(sample_images.photograph(2 * width + 1, 2 * height + 1), recipe) == 0


def test_the_image_is_squashed_and_its_centre_cut_out() -> None:
    """Width comes first: the left half of an image twice as wide as the crop is as far as the
    crop's left edge.
    """
    wide = Image.new("RGB", (40, 10), "white")
    wide.paste("black", (0, 0, 20, 10))
    recipe = Recipe(8, 8, (16, 8), interpolation=Interpolation.NEAREST)
    out = np.empty((8, 8, 3), np.uint8)
    preprocess.resample(np.asarray(wide), preprocess.locate(40, 10, recipe), recipe, out)
    assert out[:, :4].max() == 0
    assert out[:, 4:].min() == 255


def torchvision_centre(side: int, size: int) -> tuple[int, int]:
    """`CenterCrop`, and timm's `center_crop_or_pad`: the padding before, and the crop's begin."""
    before = (size - side) // 2 if size > side else 0
    return before, int(round((max(side, size) - size) / 2.0))  # noqa: RUF046 - as they spell it


def transformers_centre(side: int, size: int) -> tuple[int, int]:
    """`image_transforms.center_crop`: the padding before, and the crop's begin."""
    first = (side - size) // 2
    if first >= 0 and first + size <= side:
        return 0, first
    before = math.ceil((max(size, side) - side) / 2)
    return before, max(0, first + before)


SIDES = st.integers(1, 3000)


@given(side=SIDES, size=st.integers(1, 600), centre=st.sampled_from(Centre))
def test_the_centre_is_theirs(side: int, size: int, centre: Centre) -> None:
    """Crop and border begin at the pixel where torchvision, timm or transformers begin them."""
    crop = preprocess.locate(side, side, Recipe(size, size, None, centre=centre))
    reference = torchvision_centre if centre is Centre.TORCHVISION else transformers_centre
    assert (crop.x.first, crop.x.start) == reference(side, size)
    assert (crop.x.count, crop.x.stop - crop.x.start) == (min(side, size), min(side, size))
    assert crop.x == crop.y


@given(width=SIDES, height=SIDES, short=st.integers(1, 600))
def test_a_short_side_is_resized_as_torchvision_and_transformers_do_it(
    width: int, height: int, short: int
) -> None:
    """`_compute_resized_output_size` and `get_resize_output_image_size`: the long side is cut
    off to an integer.
    """
    least, most = (width, height) if width <= height else (height, width)
    other = int(short * most / least)
    expected = (short, other) if width <= height else (other, short)
    assert preprocess.resized(width, height, Recipe(1, 1, short)) == expected


@given(width=SIDES, height=SIDES, box_width=st.integers(1, 600), box_height=st.integers(1, 600))
def test_a_box_is_filled_as_timm_and_ultralytics_do_it(
    width: int, height: int, box_width: int, box_height: int
) -> None:
    """timm's `ResizeKeepRatio(longest=1)` and `CenterCropOrPad`; ultralytics' `LetterBox` comes to
    the same, except where a side falls exactly between two pixels and where it would vanish.
    """
    recipe = Recipe(box_height, box_width, (box_width, box_height), pad=True)
    found = preprocess.resized(width, height, recipe)

    ratio_height, ratio_width, longest = height / box_height, width / box_width, 1.0
    ratio = max(ratio_height, ratio_width) * longest + min(ratio_height, ratio_width) * 0.0
    timm = tuple(max(1, round(side * 1.0 / ratio)) for side in (width, height))
    assert found == timm
    assert found[0] == box_width or found[1] == box_height

    least = min(box_height / height, box_width / width)
    unpadded = width * least, height * least
    crop = preprocess.locate(width, height, recipe)
    for span, side, box in ((crop.x, unpadded[0], box_width), (crop.y, unpadded[1], box_height)):
        if abs(side % 1 - 0.5) > 1e-6 and side >= 0.5:
            assert (span.first, span.count) == (round((box - round(side)) / 2 - 0.1), round(side))


def test_an_image_is_fitted_into_a_box_and_its_centre_cut_out() -> None:
    """timm's border mode with a crop share below 1: the box is larger than the input."""
    recipe = Recipe(8, 8, (10, 10), True, "#ff0000", interpolation=Interpolation.NEAREST)
    out = np.empty((8, 8, 3), np.uint8)
    wide = Image.new("RGB", (20, 8), "white")
    preprocess.resample(np.asarray(wide), preprocess.locate(20, 8, recipe), recipe, out)
    assert (out[2:6] == 255).all()
    assert (out[[0, 1, 6, 7]] == (255, 0, 0)).all()


def test_no_resize_copies_pixels() -> None:
    """Without a resize the centre is copied, not computed, and missing pixels are black."""
    for size in [(300, 250), (224, 224), (100, 300), (5, 5)]:
        assert difference(sample_images.photograph(*size), Recipe(resize=None)) == 0


def test_padding_is_black_and_central() -> None:
    """An image smaller than the crop is in the middle of black, the odd pixel at the end, as
    torchvision pads.
    """
    out = np.full((8, 8, 3), 77, np.uint8)
    recipe = Recipe(8, 8, None)
    preprocess.resample(
        np.full((2, 3, 3), 255, np.uint8), preprocess.locate(3, 2, recipe), recipe, out
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
    assert preprocess.shrink(width, height, Recipe(100, 100, (256, 128))) == factor


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), recipe=RECIPES)
def test_scaling_never_leaves_less_than_twice_the_target(
    width: int, height: int, recipe: Recipe
) -> None:
    """Of any recipe and image: what the filter reads is at least twice what it writes, or the image
    is not scaled; and the next larger factor would leave less.
    """
    factor = preprocess.shrink(width, height, recipe)
    to_width, to_height = preprocess.resized(width, height, recipe)
    assert factor == 1 or (width >= 2 * factor * to_width and height >= 2 * factor * to_height)
    if recipe.resize is None or recipe.interpolation is Interpolation.NEAREST:
        assert factor == 1
    elif factor < 8:
        # One more of a long side: `resized` has rounded it down.
        least = 4 * factor
        assert width < least * (to_width + 1) or height < least * (to_height + 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_scaled_by_its_displayed_size(orientation: int) -> None:
    """A box is wide, the stored JPEG is high: turned, it can be scaled; as it is stored, not."""
    turned = orientation >= 5
    size = (512, 1024) if turned else (1024, 512)
    exif = Image.Exif()
    exif[274] = orientation
    data = sample_images.encode(sample_images.photograph(*size), "JPEG", quality=95, exif=exif)
    recipe = Recipe(128, 256, (256, 128))
    factors = list[int]()
    with pytest.MonkeyPatch.context() as patched:
        real = simplejpeg.decode_jpeg
        patched.setattr(
            simplejpeg,
            "decode_jpeg",
            lambda *args, **options: (
                factors.append(options["min_factor"]),
                real(*args, **options),
            )[1],
        )
        decoded = decode(data, recipe, Limits())
    assert factors == [2]
    assert decoded.pixels is not None
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    difference = np.abs(decoded.pixels.astype(int) - reference_pixels(image, recipe))
    assert difference.mean() < 1


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
