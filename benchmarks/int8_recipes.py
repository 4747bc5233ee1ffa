"""Which recipe of post-training quantisation keeps a model's answers?

    python benchmarks/int8_recipes.py PHOTOGRAPHS --model NAME… [--recipe NAME…] [--calibration N…]
    [--seeds 3] [--also DIR] [--models-dir DIR] [--json FILE] [--speed] [--pages]
    [--min-area SHARE]

For each seed, a third of the photographs is for calibration and the others are held out, so no
photograph is in both. Calibration images are the photographs, those of `--also`, and random crops
of both (70 to 100 % of the area, see `--min-area`; half of them mirrored), until there are enough.
The held-out images are some crops of each other photograph, at least 1,000 in all. The table shows
top-1 agreement with fp32 on these crops with its 95 % interval, and on the uncropped held-out
photographs. Crops of one photograph are not independent, so the interval is narrower than one of as
many photographs. `--pages` draws 300 pages of text, turned by quarters, instead of photographs.

`--speed` also measures fp32 and int8 in turn, three times for 0.7 s each, and prints the ratio.
Seconds depend on what else runs. Results that are already in FILE are not computed again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imagemill.models import bundle as bundles
from imagemill.models import resolve
from imagemill.pipeline.backends import devices, open_session, openvino_rewrites
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Limits, Precision, SessionSpec
from imagemill.tuning import accuracy, quantize

RECIPES: dict[str, dict[str, Any]] = {
    "performance": {},
    "mixed": {"preset": "mixed"},
    "performance accurate": {"fast_bias_correction": False},
    "mixed accurate": {"preset": "mixed", "fast_bias_correction": False},
    "full performance": {"full": True},
    "full mixed": {"preset": "mixed", "full": True},
    "full performance accurate": {"fast_bias_correction": False, "full": True},
    "full mixed accurate": {"preset": "mixed", "fast_bias_correction": False, "full": True},
    "full performance accurate minmax": {
        "fast_bias_correction": False,
        "full": True,
        "range": "MINMAX",
    },
    "full performance accurate histogram": {
        "fast_bias_correction": False,
        "full": True,
        "range": "HISTOGRAM",
    },
    "full performance accurate transformer": {
        "fast_bias_correction": False,
        "full": True,
        "model_type": "transformer",
    },
}
"""`full`: weights use their full range, which needs a processor with int8 units."""
HELD_OUT = 1000
BATCH = 4
Pixels = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Row:
    model: str
    recipe: str
    calibration: int
    seed: int
    photographs: int
    agreement: float
    low: float
    high: float
    crops: int
    uncropped_agreement: float
    uncropped: int
    flips_where_sure: int
    sure: int
    probability_difference: float
    seconds: float
    speedup: float | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--model", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument(
        "--recipe", nargs="+", choices=RECIPES, default=["full performance accurate"]
    )
    parser.add_argument("--calibration", nargs="+", type=int, default=[300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models-dir", type=Path, default=bundles.default_models_dir())
    parser.add_argument("--also", type=Path, help="more photographs to calibrate on")
    parser.add_argument("--min-area", type=float, default=0.7, help="of a crop (default: 0.7)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--pages", action="store_true")
    given = parser.parse_args()
    known = read(given.json)
    for seed in range(given.seeds):
        for name in given.model:
            bundle = resolve.resolve(name, given.models_dir, notify=lambda _: None)
            wanted = [
                (recipe, count)
                for recipe in given.recipe
                for count in given.calibration
                if (name, recipe, count, seed) not in known
            ]
            if not wanted:
                continue
            images = Images.of(given, bundle, seed, max(count for _, count in wanted))
            fp32 = [
                answers(bundle, bundle.dir / bundles.MODEL, Precision.FP32, some)
                for some in (images.crops, images.uncropped)
            ]
            for recipe, count in wanted:
                row = measure(given, name, bundle, recipe, count, seed, images, fp32)
                print(format_row(row), flush=True)
                if given.json:
                    with given.json.open("a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")


def read(file: Path | None) -> set[tuple[str, str, int, int]]:
    if file is None or not file.exists():
        return set()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["model"], row["recipe"], row["calibration"], row["seed"]) for row in rows}


@dataclass(frozen=True)
class Images:
    photographs: int
    calibration: Pixels
    crops: Pixels
    uncropped: Pixels

    @classmethod
    def of(cls, given: argparse.Namespace, bundle: Bundle, seed: int, wanted: int) -> Images:
        rng = np.random.default_rng(seed)
        sources: list[Any] = list(range(300)) if given.pages else jpegs(given.photographs)
        order = rng.permutation(len(sources)).tolist()
        third = len(order) // 3
        first = [sources[place] for place in order[:third]]
        if given.also and not given.pages:
            first = rng.permutation([*first, *jpegs(given.also)]).tolist()
        rest = [sources[place] for place in order[third:]]

        def load(source: Any, *, cropped: bool) -> NDArray[np.uint8]:
            if given.pages:
                image = page(seed * 1000 + source).rotate(90 * (source % 4), expand=True)
            else:
                image = Image.open(source).convert("RGB")
            data = io.BytesIO()
            (crop(image, rng, given.min_area) if cropped else image).save(data, "JPEG", quality=95)
            decoded = decode(data.getvalue(), bundle.card.recipe, Limits())
            assert decoded.pixels is not None
            return decoded.pixels[None]

        return cls(
            len(first) + len(rest),
            [load(first[n % len(first)], cropped=n >= len(first)) for n in range(wanted)],
            [load(one, cropped=True) for one in rest for _ in range(-(-HELD_OUT // len(rest)))],
            [load(one, cropped=False) for one in rest],
        )


def jpegs(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*.[jJ][pP]*[gG]"))


def crop(image: Image.Image, rng: np.random.Generator, min_area: float) -> Image.Image:
    """Return a random part of at least `min_area` of the area, half of the time mirrored."""
    area, ratio = (
        rng.uniform(min_area, 1) * image.width * image.height,
        np.exp(rng.uniform(-0.29, 0.29)),
    )
    width = min(image.width, round(float(np.sqrt(area * ratio))))
    height = min(image.height, round(float(np.sqrt(area / ratio))))
    left, top = (
        int(rng.integers(0, whole - part + 1))
        for whole, part in ((image.width, width), (image.height, height))
    )
    part = image.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def page(seed: int) -> Image.Image:
    """Return a page of text whose words are made of random letters."""
    rng = np.random.default_rng(seed)
    size, letters = int(rng.integers(18, 41)), list("etaoinshrdlucmfwypvbgk")
    image = Image.new("RGB", (620, 800), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for top in range(40, 740, int(size * 1.5)):
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(12)]
        line = " ".join(words).capitalize()[: int(rng.integers(45, 65))]
        draw.text((40, top), line, font=font, fill="black")
    return image


def measure(
    given: argparse.Namespace,
    name: str,
    bundle: Bundle,
    recipe: str,
    count: int,
    seed: int,
    images: Images,
    fp32: Sequence[NDArray[np.float32]],
) -> Row:
    with tempfile.TemporaryDirectory(prefix="imagemill-recipes-") as folder:
        begun = time.perf_counter()
        model = quantised(bundle.dir / bundles.MODEL, images.calibration[:count], RECIPES[recipe])
        seconds = time.perf_counter() - begun
        file = quantize.save(model, Path(folder), "int8-recipe")
        del model
        found = [
            accuracy.compare(
                before, answers(bundle, file, Precision.INT8, some), bundle.card.scores
            )
            for before, some in zip(fp32, (images.crops, images.uncropped), strict=True)
        ]
        speedup = None
        if given.speed and seed == 0:
            speedup = measure_speedup(bundle, file, images.crops)
    crops, uncropped = found
    return Row(
        name,
        recipe,
        count,
        seed,
        images.photographs,
        crops.agreement,
        crops.wilson_low,
        crops.wilson_high,
        crops.images,
        uncropped.agreement,
        uncropped.images,
        crops.flips_where_sure,
        crops.sure,
        crops.mean_probability_difference,
        round(seconds, 1),
        speedup,
    )


def quantised(model_file: Path, pixels: Pixels, recipe: dict[str, Any]) -> Any:
    """Quantise a model; constants are folded first, as imagemill does."""
    import nncf
    import openvino as ov
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    options = {"preset": "performance", **recipe}
    advanced: dict[str, Any] = {}
    if (estimator := options.pop("range", None)) is not None:
        advanced["activations_range_estimator_params"] = getattr(
            RangeEstimatorParametersSet, estimator
        )
    if options.pop("full", False):
        advanced["overflow_fix"] = nncf.OverflowFix.DISABLE
    options["preset"] = nncf.QuantizationPreset(options["preset"])
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars
        model = ov.convert_model(str(model_file), input=list(pixels[0].shape))
        name = next(iter(model.input(0).get_names()))
        made = nncf.quantize(
            model,
            nncf.Dataset(pixels),
            subset_size=len(pixels),
            advanced_parameters=nncf.AdvancedQuantizationParameters(**advanced),
            **options,
        )
    openvino_rewrites.merge(ov, made, 16, "i8")
    made.reshape({name: [-1, *pixels[0].shape[1:]]})
    return made


@contextlib.contextmanager
def opened(bundle: Bundle, file: Path, precision: Precision) -> Iterator[Callable[[Any], Any]]:
    cores = tuple(devices.usable_cores())
    spec = SessionSpec(str(file), bundle.card, precision, BATCH)
    session = open_session(spec, DeviceSpec("cpu#0", "cpu", "openvino", cores), Stopwatch())
    try:
        yield session.stream
    finally:
        session.close()


def batches(pixels: Pixels) -> Iterator[Batch]:
    for start in range(0, len(pixels), BATCH):
        some = pixels[start : start + BATCH]
        padding = [np.zeros_like(some[0])] * (BATCH - len(some))
        yield Batch(np.concatenate([*some, *padding]), len(some), ())


def answers(bundle: Bundle, file: Path, precision: Precision, pixels: Pixels) -> Any:
    with opened(bundle, file, precision) as stream:
        return np.concatenate([outputs.logits.copy() for _, outputs in stream(batches(pixels))])


def measure_speedup(bundle: Bundle, int8: Path, pixels: Pixels) -> float:
    some = list(batches(pixels[: 8 * BATCH]))
    with (
        opened(bundle, bundle.dir / bundles.MODEL, Precision.FP32) as fp32,
        opened(bundle, int8, Precision.INT8) as fast,
    ):
        ratios = []
        for _ in range(4):
            before, after = rate(fp32, some), rate(fast, some)
            ratios.append(after / before)
    return round(statistics.median(ratios[1:]), 2)  # the first turn warms up


def rate(stream: Callable[[Any], Any], some: Sequence[Batch]) -> float:
    begun, done = time.perf_counter(), 0

    def repeated() -> Iterator[Batch]:
        while time.perf_counter() - begun < 0.7:
            yield from some

    for batch, _ in stream(repeated()):
        done += batch.filled
    return done / (time.perf_counter() - begun)


def format_row(row: Row) -> str:
    speed = f" | {row.speedup:.2f}" if row.speedup else " |"
    return (
        f"| {row.model} | {row.recipe} | {row.calibration} | {row.seed} | {row.agreement:.4f} of"
        f" {row.crops} ({row.low:.4f}–{row.high:.4f}) | {row.uncropped_agreement:.4f} of"
        f" {row.uncropped} | {row.flips_where_sure} of {row.sure} |"
        f" {row.probability_difference:.4f} | {row.seconds:.0f} s{speed} |"
    )


if __name__ == "__main__":
    main()
