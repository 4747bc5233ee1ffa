"""Decode and preprocess alone, on one core: imagemill and other ways, against Pillow's
decode–resize–crop.

    python benchmarks/decode.py FOLDER [--limit 100] [--rounds 5] [--bicubic]

prints, for the JPEGs of FOLDER and for 4000×3000 images made from eight of them, milliseconds an
image (the median of interleaved rounds), the ratio to Pillow, and how far the pixels are from
Pillow's. A way whose library is not installed is left out.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import simplejpeg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from imagemill.pipeline.decoding import preprocess
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Interpolation, Limits, Recipe
from reference import reference_pixels

if TYPE_CHECKING:
    from collections.abc import Callable

    Way = Callable[[bytes, Recipe], np.ndarray]

try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

try:
    import cv2
except ImportError:
    cv2 = None


def pillow(data: bytes, recipe: Recipe) -> np.ndarray:
    return reference_pixels(Image.open(io.BytesIO(data)), recipe)


def imagemill(data: bytes, recipe: Recipe) -> np.ndarray:
    decoded = decode(data, recipe, Limits())
    assert decoded.pixels is not None, decoded.error
    return decoded.pixels


def _crop(
    image: Image.Image,
    recipe: Recipe,
    crop: preprocess.Crop,
    scale: float,
    gap: float | None = None,
) -> np.ndarray:
    left, top = crop.x.start / scale, crop.y.start / scale
    box = (left, top, crop.x.stop / scale, crop.y.stop / scale)
    return np.asarray(
        image.resize(
            (recipe.width, recipe.height),
            preprocess.FILTERS[recipe.interpolation],
            box=box,
            reducing_gap=gap,
        )
    )


def pillow_box(data: bytes, recipe: Recipe) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return _crop(image, recipe, preprocess.locate(*image.size, recipe), 1)


def pillow_draft_twice(data: bytes, recipe: Recipe) -> np.ndarray:
    return _pillow_draft(data, recipe, 2)


def pillow_draft_once(data: bytes, recipe: Recipe) -> np.ndarray:
    return _pillow_draft(data, recipe, 1)


def _pillow_draft(data: bytes, recipe: Recipe, times: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    crop = preprocess.locate(*image.size, recipe)
    assert isinstance(recipe.resize, int)
    drafted = image.draft("RGB", (times * recipe.resize, times * recipe.resize))
    scale = image.decoderconfig[0] if drafted else 1
    return _crop(image.convert("RGB"), recipe, crop, scale, gap=2.0)


def simplejpeg_pillow(data: bytes, recipe: Recipe) -> np.ndarray:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    return _crop(
        Image.fromarray(pixels),
        recipe,
        preprocess.locate(pixels.shape[1], pixels.shape[0], recipe),
        1,
    )


def simplejpeg_cykooz(data: bytes, recipe: Recipe) -> np.ndarray:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    height, width = pixels.shape[:2]
    crop = preprocess.locate(width, height, recipe)
    left, top, right, bottom = preprocess.region(crop, recipe)
    source = cykooz_resizer.ImageData(
        right - left,
        bottom - top,
        cykooz_resizer.PixelType.U8x3,
        pixels[top:bottom, left:right].tobytes(),
    )
    result = cykooz_resizer.ImageData(recipe.width, recipe.height, cykooz_resizer.PixelType.U8x3)
    bicubic = recipe.interpolation is Interpolation.BICUBIC
    kind = cykooz_resizer.FilterType.catmull_rom if bicubic else cykooz_resizer.FilterType.bilinear
    box = cykooz_resizer.CropBox(
        crop.x.start - left,
        crop.y.start - top,
        min(crop.x.stop, right) - crop.x.start - 1e-9,
        min(crop.y.stop, bottom) - crop.y.start - 1e-9,
    )
    options = cykooz_resizer.ResizeOptions(cykooz_resizer.ResizeAlg.convolution(kind), False, box)
    cykooz_resizer.Resizer().resize(source, result, options)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(recipe.height, recipe.width, 3)


def opencv_area(data: bytes, recipe: Recipe) -> np.ndarray:
    pixels = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    crop = preprocess.locate(pixels.shape[1], pixels.shape[0], recipe)
    rows, columns = (
        slice(round(crop.y.start), round(crop.y.stop)),
        slice(round(crop.x.start), round(crop.x.stop)),
    )
    return cv2.resize(
        pixels[rows, columns], (recipe.width, recipe.height), interpolation=cv2.INTER_AREA
    )


def decoding_alone(data: bytes, recipe: Recipe) -> np.ndarray:
    del recipe
    return simplejpeg.decode_jpeg(data, "RGB")


def large(images: list[bytes], count: int = 8) -> list[bytes]:
    """4000×3000 JPEGs made from some of the images."""
    made = []
    for data in images[:: max(1, len(images) // count)][:count]:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").resize(
            (4000, 3000), Image.Resampling.BICUBIC
        ).save(buffer, "JPEG", quality=88)
        made.append(buffer.getvalue())
    return made


def measure(images: list[bytes], recipe: Recipe, ways: list[Way], rounds: int) -> dict[Way, float]:
    """Milliseconds an image: of each way the median of `rounds`, in which all ways take turns."""
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for way in ways:
        way(images[0], recipe)
    for _, way in itertools.product(range(rounds), ways):
        began = time.perf_counter()
        for data in images:
            way(data, recipe)
        seconds[way].append(time.perf_counter() - began)
    return {way: 1000 * statistics.median(took) / len(images) for way, took in seconds.items()}


def distance(images: list[bytes], recipe: Recipe, way: Way) -> str:
    differences = [np.abs(way(data, recipe).astype(int) - pillow(data, recipe)) for data in images]
    means = [difference.mean() for difference in differences]
    most = max(difference.max() for difference in differences)
    return f"mean {np.mean(means):.3f}, worst image's mean {max(means):.3f}, max {most}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--limit", type=int, default=100, help="images at most, taken evenly from the folder"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bicubic", action="store_true")
    arguments = parser.parse_args()
    recipe = Recipe(
        interpolation=Interpolation.BICUBIC if arguments.bicubic else Interpolation.BILINEAR
    )
    files = sorted(
        path for path in arguments.folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
    )
    images = [
        path.read_bytes()
        for path in files[:: max(1, len(files) // arguments.limit)][: arguments.limit]
    ]
    if not images:
        parser.error(f"no JPEG files in {arguments.folder}")
    ways: list[Way] = [
        pillow,
        imagemill,
        pillow_box,
        pillow_draft_twice,
        pillow_draft_once,
        simplejpeg_pillow,
        decoding_alone,
    ]
    if cykooz_resizer is not None:
        ways.insert(-1, simplejpeg_cykooz)
    if cv2 is not None:
        cv2.setNumThreads(1)
        ways.insert(-1, opencv_area)
    print(f"{recipe.interpolation}, Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}")
    for title, those in (
        (f"{len(images)} images of {arguments.folder.name}", images),
        ("4000×3000", large(images)),
    ):
        print(f"\n{title}\n{'':20}{'ms':>8}{'× Pillow':>10}   levels from Pillow")
        took = measure(those, recipe, ways, arguments.rounds)
        for way in ways:
            apart = "" if way is decoding_alone else distance(those, recipe, way)
            print(f"{way.__name__:20}{took[way]:8.2f}{took[pillow] / took[way]:10.2f}   {apart}")


if __name__ == "__main__":
    main()
