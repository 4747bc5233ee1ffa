"""Image processors: the pixels and the normalisation are those of transformers and timm.

golden/make_processors.py made the arrays with these libraries; golden/processors/cases.json has the
files that the processors were made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sample_images
from imagemill.models.card import Color, ReadCard
from imagemill.models.folders import timm_config
from imagemill.models.folders.json_file import Document
from imagemill.models.folders.processors import MODEL_TYPES, PROCESSORS, read_processor
from imagemill.models.preprocessing import with_recipe
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Limits
from odd_images import SIZES, odd_image, sampled

GOLDEN = Path(__file__).parent / "golden/processors"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
DIFFERENT = 1e-3
"""Share of the values of a case that may be one level off: where a crop begins, and so the weights
of the filter, are not rounded as for the whole image.
"""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for path in GOLDEN.glob("*.npz"):
        with np.load(path) as file:
            arrays |= dict(file)
    return arrays


def kind_of(case: dict[str, Any]) -> str:
    name: str = case["preprocessor"]["image_processor_type"]
    return name.removesuffix("Fast").removesuffix("ImageProcessor")


def read(case: dict[str, Any]) -> ReadCard:
    if "config" in case:
        return timm_config.read_timm(Document(Path("config.json"), case["config"]))
    document = Document(Path("preprocessor_config.json"), case["preprocessor"])
    return read_processor(document, kind_of(case))


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_the_librarys(name: str, golden: dict[str, Any]) -> None:
    found, recipe = with_recipe(read(CASES[name]))
    is_bgr = found.card.color is Color.BGR
    differences = []
    for number, (width, height) in enumerate(SIZES):
        image = sample_images.encode(Image.fromarray(odd_image(width, height)), "PNG")
        pixels = decode(image, recipe, Limits()).pixels
        assert pixels is not None
        expected = golden[f"{name}/{number}"]
        ours = sampled(pixels[..., ::-1] if is_bgr else pixels)
        assert ours.shape == expected.shape
        differences.append(np.abs(ours.astype(int) - expected.astype(int)).ravel())
    off = np.concatenate(differences)
    assert off.max() <= 1
    if CASES[name].get("library") != "torchvision":  # whose floats are rounded once, not twice
        assert (off > 0).mean() <= DIFFERENT


@pytest.mark.parametrize("name", CASES)
def test_the_normalisation_is_the_librarys(name: str, golden: dict[str, Any]) -> None:
    card = read(CASES[name]).card
    levels = 255 if card.scale == 1 else 1
    mean, std = (np.array(values, np.float64) * levels for values in (card.mean, card.std))
    for level, image in ((0, "black"), (255, "white")):
        assert (level - mean) / std == pytest.approx(golden[f"{name}/{image}"], abs=1e-5)


def test_the_table_has_every_processor() -> None:
    shown = {kind_of(case) for case in CASES.values() if "preprocessor" in case}
    assert set(PROCESSORS) == shown
    assert set(MODEL_TYPES.values()) == set(PROCESSORS)


def test_the_origins_name_every_value() -> None:
    for case in CASES.values():
        origins = read(case).origins
        assert {"size", "resize", "centre", "scale", "mean", "std"} <= set(origins)
