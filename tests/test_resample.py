"""The vectorised resampler gives Pillow's pixels, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sample_images
from imagemill.pipeline.decoding import pillow, preprocess
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Interpolation, Limits, Recipe

RECIPES = [
    Recipe(224, 224, 256, interpolation=Interpolation.BILINEAR),
    Recipe(224, 224, 256, interpolation=Interpolation.BICUBIC),
    Recipe(32, 32, 33, interpolation=Interpolation.BICUBIC),
    Recipe(50, 90, (90, 60), True, "#7f0102", interpolation=Interpolation.BICUBIC),
]


def test_it_is_built_here() -> None:
    """Where the tests run there is a compiler, so the fast path is the one under test."""
    assert preprocess.NATIVE


FILTERS = [item for item in Interpolation if item is not Interpolation.NEAREST]


@given(
    st.tuples(*[st.integers(1, 400)] * 2),
    st.tuples(*[st.integers(1, 200)] * 2),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.sampled_from(FILTERS),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_part_is_that_of_pillows_whole(
    size: tuple[int, int],
    to_size: tuple[int, int],
    places: tuple[float, float, float, float],
    interpolation: Interpolation,
    seed: int,
    harsh: bool,
) -> None:
    """Any size and content, any part of the result, any filter: the bits of Pillow's `resize` of the
    whole image, although only the part of it that the filter reaches is given.
    """
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    if harsh:
        pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))
    whole = Image.fromarray(pixels).resize(to_size, preprocess.FILTERS[interpolation])
    spans = []
    for axis in (0, 1):
        first = int(places[axis] * (to_size[axis] - 1))
        count = 1 + int(places[axis + 2] * (to_size[axis] - first - 1))
        spans.append(preprocess.Span(size[axis], to_size[axis], first, count))
    crop = preprocess.Crop(*spans)
    recipe = Recipe(crop.y.count, crop.x.count, to_size, interpolation=interpolation)
    left, top, right, bottom = preprocess.region(crop, recipe)
    out = np.empty((crop.y.count, crop.x.count, 3), np.uint8)
    preprocess.resample(pixels[top:bottom, left:right], crop, recipe, out, left=left, top=top)
    rows = slice(crop.y.skipped, crop.y.skipped + crop.y.count)
    columns = slice(crop.x.skipped, crop.x.skipped + crop.x.count)
    assert np.array_equal(out, np.asarray(whole)[rows, columns])


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from(RECIPES),
    st.integers(0, 2**32 - 1),
)
def test_without_it_values_differ_little(
    width: int, height: int, recipe: Recipe, seed: int
) -> None:
    """Pillow's `box` is in single precision: few values are rounded to a neighbour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    crop = preprocess.locate(width, height, recipe)
    fast, slow = (np.empty((recipe.height, recipe.width, 3), np.uint8) for _ in range(2))
    preprocess.resample(pixels, crop, recipe, fast)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preprocess, "NATIVE", False)
        preprocess.resample(pixels, crop, recipe, slow)
    difference = np.abs(fast.astype(int) - slow)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.1


def test_a_view_with_gaps_is_read_where_it_lies() -> None:
    """A part of a larger image needs no copy, and nothing beside it is read."""
    whole = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    part = whole[20:280, 30:390]
    out = np.empty((224, 224, 3), np.uint8)
    x, y = (360.0, 224, 0, 0), (260.0, 224, 0, 0)
    preprocess.resample_part(part, x, y, "bilinear", False, out)
    assert np.array_equal(
        out, np.asarray(Image.fromarray(part).resize((224, 224), Image.Resampling.BILINEAR))
    )


WHOLE = (10.0, 5, 0, 0)


@pytest.mark.parametrize(
    ("shape", "x", "y", "name", "out_shape"),
    [
        ((10, 10, 4), WHOLE, WHOLE, "box", (5, 5, 3)),
        ((10, 10), WHOLE, WHOLE, "box", (5, 5, 3)),
        ((0, 10, 3), WHOLE, WHOLE, "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, WHOLE, "box", (5, 0, 3)),
        ((10, 10, 3), WHOLE, WHOLE, "box", (6, 5, 3)),
        ((10, 10, 3), WHOLE, WHOLE, "nearest", (5, 5, 3)),
        ((10, 10, 3), (float("nan"), 5, 0, 0), WHOLE, "box", (5, 5, 3)),
        ((10, 10, 3), (float("inf"), 5, 0, 0), WHOLE, "box", (5, 5, 3)),
        ((10, 10, 3), (0.0, 5, 0, 0), WHOLE, "box", (5, 5, 3)),
        ((10, 10, 3), (8.0, 5, 0, 0), WHOLE, "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (10.0, 0, 0, 0), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (10.0, 5, -1, 0), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (10.0, 5, 1, 0), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (20.0, 5, 0, -1), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (20.0, 5, 0, 2**30), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (20.0, 20, 0, 5), "box", (5, 5, 3)),
        ((10, 10, 3), WHOLE, (20.0, 20, 12, 5), "box", (5, 5, 3)),
    ],
)
def test_what_it_is_not_made_for_is_refused(
    shape: tuple[int, ...], x: Any, y: Any, name: str, out_shape: tuple[int, ...]
) -> None:
    """Wrong shapes, filters and places are errors, never reads beyond the image."""
    source, out = np.zeros(shape, np.uint8), np.zeros(out_shape, np.uint8)
    with pytest.raises(ValueError, match="must"):
        preprocess.resample_part(source, x, y, name, False, out)


@pytest.mark.parametrize("offset", [0, 5, 40, 90])
@pytest.mark.parametrize("down_first", [True, False])
def test_a_part_that_is_not_enough_is_not_read_beyond(offset: int, down_first: bool) -> None:
    """Whatever part of the image is given for a result that lies elsewhere."""
    source, out = np.full((10, 10, 3), 9, np.uint8), np.empty((20, 20, 3), np.uint8)
    axis = (100.0, 30, 5, offset)
    preprocess.resample_part(source, axis, axis, "lanczos", down_first, out)
    assert set(np.unique(out)) <= set(range(13))


@pytest.mark.parametrize("size", [(640, 480), (90, 70), (1300, 1200)])
def test_an_ordinary_jpeg_goes_the_fast_way_alone(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """simplejpeg decodes it once, and the vectorised resampler resamples it once. Pillow does
    neither, and nothing is done twice.
    """
    data, calls = sample_images.jpeg(*size), list[str]()

    def counted(owner: object, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *args, **options: (calls.append(name), function(*args, **options))[1],
        )

    counted(preprocess, "resample_part")
    counted(simplejpeg, "decode_jpeg")
    counted(pillow, "decode")
    counted(Image, "open")
    counted(Image, "fromarray")
    counted(Image.Image, "resize")
    assert decode(data, RECIPES[0], Limits()).error is None
    assert calls == ["decode_jpeg", "resample_part"]
