"""The vectorised resampler gives Pillow's pixels, bit for bit."""

from __future__ import annotations

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


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from(RECIPES),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_image_is_resampled_as_pillow_does_it(
    width: int, height: int, recipe: Recipe, seed: int, harsh: bool
) -> None:
    """Any size, any content: the same bits, whether the image grows or shrinks."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if harsh:
        pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))
    crop = preprocess.locate(width, height, recipe)
    fast, slow = (np.empty((recipe.height, recipe.width, 3), np.uint8) for _ in range(2))
    preprocess.resample(pixels, crop, recipe, fast)
    preprocess.resample(Image.fromarray(pixels), crop, recipe, slow)
    assert np.array_equal(fast, slow)


@given(
    st.tuples(*[st.integers(1, 90)] * 4),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_box_is_resampled_as_pillow_does_it(
    sizes: tuple[int, int, int, int],
    places: tuple[float, float, float, float],
    cubic: bool,
    seed: int,
) -> None:
    """Any box into any size, as long as Pillow goes across before it goes down."""
    width, height, to_width, to_height = sizes
    if height - to_height > max(0, 2 * (width - to_width)):
        return
    left, right = sorted((places[0] * width, places[1] * width))
    top, bottom = sorted((places[2] * height, places[3] * height))
    box = tuple(float(np.float32(value)) for value in (left, top, right, bottom))
    if box[2] - box[0] < 0.01 or box[3] - box[1] < 0.01:
        return
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = np.empty((to_height, to_width, 3), np.uint8)
    preprocess._resample.resample(pixels, box, cubic, out)
    kind = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    assert np.array_equal(
        out, np.asarray(Image.fromarray(pixels).resize((to_width, to_height), kind, box=box))
    )


def test_a_view_with_gaps_is_read_where_it_lies() -> None:
    """A part of a larger image needs no copy, and nothing beside it is read."""
    whole = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    part = whole[20:280, 30:390]
    out = np.empty((224, 224, 3), np.uint8)
    preprocess._resample.resample(part, (0, 0, 360, 260), False, out)
    assert np.array_equal(
        out, np.asarray(Image.fromarray(part).resize((224, 224), Image.Resampling.BILINEAR))
    )


@pytest.mark.parametrize(
    ("shape", "box", "out_shape"),
    [
        ((10, 10, 4), (0, 0, 10, 10), (5, 5, 3)),
        ((10, 10, 3), (0, 0, 10.5, 10), (5, 5, 3)),
        ((10, 10, 3), (-1, 0, 10, 10), (5, 5, 3)),
        ((10, 10, 3), (5, 0, 5, 10), (5, 5, 3)),
        ((10, 10, 3), (0, 0, float("nan"), 10), (5, 5, 3)),
        ((0, 10, 3), (0, 0, 10, 0), (5, 5, 3)),
        ((10, 10, 3), (0, 0, 10, 10), (5, 0, 3)),
        ((10, 10), (0, 0, 10, 10), (5, 5, 3)),
    ],
)
def test_what_it_is_not_made_for_is_refused(
    shape: tuple[int, ...], box: tuple[float, ...], out_shape: tuple[int, ...]
) -> None:
    """Wrong shapes and boxes are errors, never reads beyond the image."""
    with pytest.raises(ValueError, match="must"):
        preprocess._resample.resample(
            np.zeros(shape, np.uint8), box, False, np.zeros(out_shape, np.uint8)
        )


def test_answers_are_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler decodes to the same bits."""
    data = [
        sample_images.jpeg(width, height)
        for width, height in ((640, 480), (480, 640), (1300, 1200), (90, 70))
    ]
    fast = [decode(item, RECIPES[0], Limits()).pixels for item in data]
    monkeypatch.setattr(preprocess, "NATIVE", False)
    slow = [decode(item, RECIPES[0], Limits()).pixels for item in data]
    for one, other in zip(fast, slow, strict=True):
        assert one is not None
        assert other is not None
        assert np.array_equal(one, other)


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

    counted(preprocess._resample, "resample")
    counted(simplejpeg, "decode_jpeg")
    counted(pillow, "decode")
    counted(Image, "open")
    counted(Image, "fromarray")
    counted(Image.Image, "resize")
    assert decode(data, RECIPES[0], Limits()).error is None
    assert calls == ["decode_jpeg", "resample"]
