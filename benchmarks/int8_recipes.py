"""Which recipe of post-training quantisation keeps a model's answers?

    python benchmarks/int8_recipes.py PHOTOGRAPHS --model NAME… [--recipe NAME…] [--calibration N…]
    [--seeds 3] [--held-out N] [--also DIR] [--models-dir DIR] [--json FILE] [--speed] [--pages]
    [--simulate] [--min-area SHARE]

For each seed, a third of the photographs is for calibration and the others are held out, so no
photograph is in both. Calibration images are the photographs, those of `--also`, and random crops
of both (70 to 100 % of the area, see `--min-area`; half of them mirrored), until there are enough.
The held-out images are some crops of each other photograph, at least 1,000 in all. The table shows
top-1 agreement with fp32 on these crops with its 95 % interval, and on the uncropped held-out
photographs. Crops of one photograph are not independent, so the interval is narrower than one of as
many photographs. `--pages` draws 300 pages of text, turned by quarters, instead of photographs.

`--speed` also measures fp32 and the faster precision in turn, seven times for 0.7 s each, and
prints both images/s. Seconds are CPU time of quantising. Results that are already in FILE are not
computed again. `--simulate` computes int8 models in fp32, with the values that int8 can hold: what
a processor with int8 units computes, on one that has none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from imagemill.pipeline.backends import open_session, openvino_rewrites
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Limits, Precision, SessionSpec
from imagemill.system import cpu
from imagemill.system.openvino_library import load_openvino, new_core
from imagemill.tuning import accuracy, quantize

ov = load_openvino()
ACCURATE = {"fast_bias_correction": False}
FULL = {"overflow": "DISABLE"}
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "imagemill": {},
    "performance": {},
    "mixed": {"preset": "mixed"},
    "performance accurate": ACCURATE,
    "mixed accurate": {"preset": "mixed", **ACCURATE},
    "half performance accurate": {**ACCURATE, "overflow": "ENABLE"},
    "half performance accurate control": {**ACCURATE, "overflow": "ENABLE", "max_drop": 0.01},
    "full performance": FULL,
    "full mixed": {"preset": "mixed", **FULL},
    "full performance accurate": {**ACCURATE, **FULL},
    "full mixed accurate": {"preset": "mixed", **ACCURATE, **FULL},
    "full performance accurate smoothing": {**ACCURATE, **FULL, "model_type": "transformer"},
    "full performance accurate minmax": {**ACCURATE, **FULL, "range": "MINMAX"},
    "full performance accurate histogram": {**ACCURATE, **FULL, "range": "HISTOGRAM"},
    "full performance accurate control": {**ACCURATE, **FULL, "max_drop": 0.01},
}
"""`imagemill`: what `imagemill quantize` does. `full` and `half`: the range that all weights use;
by default that of the first layer is halved. `control`: layers return to fp32 until 99 % of 300
other crops of photographs for calibration agree. `smoothing`: as NNCF does transformers, which
imagemill does to networks with attention.
"""
COMPILE_MODEL = ov.Core.compile_model
SIMULATED = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
COUNT = 300
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
    rates: tuple[float, float] | None
    """Images/s in fp32 and in the precision, compute only."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--model", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["imagemill"])
    parser.add_argument("--calibration", nargs="+", type=int, default=[COUNT])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=1000, metavar="N", help="crops at least")
    parser.add_argument("--models-dir", type=Path, default=bundles.default_models_dir())
    parser.add_argument("--also", type=Path, help="more photographs to calibrate on")
    parser.add_argument("--min-area", type=float, default=0.7, help="of a crop (default: 0.7)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--simulate", action="store_true")
    given = parser.parse_args()
    if given.simulate:
        simulate()
    known = read(given.json)
    for seed in range(given.seeds):
        for name in given.model:
            bundle = resolve.resolve(name, given.models_dir, notify=lambda _: None)
            wanted = [
                (recipe, count)
                for recipe in given.recipe
                for count in ([0] if recipe == "bf16" else given.calibration)
                if (name, recipe, count, seed) not in known
            ]
            if not wanted:
                continue
            images = Images.of(given, bundle, seed, COUNT + max(count for _, count in wanted))
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


def simulate() -> None:
    """Let NNCF compute quantised models in fp32 too, when it corrects biases."""

    def compiled(core: Any, model: Any, device_name: Any = "CPU", config: Any = None) -> Any:
        return COMPILE_MODEL(core, model, device_name, {**(config or {}), **SIMULATED})

    ov.Core.compile_model = compiled


def read(file: Path | None) -> set[tuple[str, str, int, int]]:
    if file is None or not file.exists():
        return set()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["model"], row["recipe"], row["calibration"], row["seed"]) for row in rows}


@dataclass(frozen=True)
class Images:
    photographs: int
    calibration: Pixels
    """Those beyond the first ones are crops."""
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

        @functools.lru_cache(maxsize=1)
        def original(source: Any) -> Image.Image:
            if given.pages:
                return page(seed * 1000 + source).rotate(90 * (source % 4), expand=True)
            return Image.open(source).convert("RGB")

        def load(source: Any, *, cropped: bool) -> NDArray[np.uint8]:
            image, data = original(source), io.BytesIO()
            (crop(image, rng, given.min_area) if cropped else image).save(data, "JPEG", quality=95)
            decoded = decode(data.getvalue(), bundle.card.recipe, Limits())
            assert decoded.pixels is not None
            return decoded.pixels[None]

        def load_calibration(numbers: range) -> Pixels:
            return [load(first[n % len(first)], cropped=n >= len(first)) for n in numbers]

        # In this order, so that the held-out crops do not depend on `wanted`.
        calibration = load_calibration(range(COUNT))
        each = -(-given.held_out // len(rest))
        crops = [load(one, cropped=True) for one in rest for _ in range(each)]
        uncropped = [load(one, cropped=False) for one in rest]
        calibration += load_calibration(range(COUNT, wanted))
        return cls(len(first) + len(rest), calibration, crops, uncropped)


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
        begun, precision, file = time.process_time(), Precision.BF16, bundle.dir / bundles.MODEL
        if recipe != "bf16":
            precision = Precision.INT8
            model = (
                quantize.quantize(file, images.calibration[:count])
                if recipe == "imagemill"
                else quantised(bundle, images.calibration, count, RECIPES[recipe])
            )
            file = quantize.save(model, Path(folder))
            del model
        seconds = time.process_time() - begun
        found = [
            accuracy.compare(before, answers(bundle, file, precision, some), bundle.card.scores)
            for before, some in zip(fp32, (images.crops, images.uncropped), strict=True)
        ]
        rates = None
        if given.speed and seed == 0:
            rates = measure_rates(bundle, file, precision, images.crops)
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
        rates,
    )


def quantised(bundle: Bundle, pixels: Pixels, count: int, recipe: dict[str, Any]) -> Any:
    """Quantise a model; constants are folded first, as imagemill does."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    options = {"preset": "performance", **recipe}
    advanced: dict[str, Any] = {}
    if (estimator := options.pop("range", None)) is not None:
        advanced["activations_range_estimator_params"] = getattr(
            RangeEstimatorParametersSet, estimator
        )
    if (overflow := options.pop("overflow", None)) is not None:
        advanced["overflow_fix"] = getattr(nncf.OverflowFix, overflow)
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    options["preset"] = nncf.QuantizationPreset(options["preset"])
    parameters = nncf.AdvancedQuantizationParameters(**advanced)
    file = bundle.dir / bundles.MODEL
    calibration = nncf.Dataset(pixels[:count])
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars
        model = ov.convert_model(str(file), input=list(pixels[0].shape))
        name = next(iter(model.input(0).get_names()))
        if "max_drop" not in options:
            made = nncf.quantize(
                model, calibration, subset_size=count, advanced_parameters=parameters, **options
            )
        else:
            others = pixels[count:]
            top = answers(bundle, file, Precision.FP32, others).argmax(axis=1)
            made = nncf.quantize_with_accuracy_control(
                model,
                calibration,
                nncf.Dataset(list(zip(others, top, strict=True)), lambda item: item[0]),
                share_of_fp32,
                subset_size=count,
                advanced_quantization_parameters=parameters,
                **options,
            )
    openvino_rewrites.merge(ov, made, 16, "i8")
    made.reshape({name: [-1, *pixels[0].shape[1:]]})
    return made


def share_of_fp32(model: Any, items: Any) -> tuple[float, list[float]]:
    same = [float(model(pixels)[0].argmax() == top) for pixels, top in items]
    return float(np.mean(same)), same


@contextlib.contextmanager
def opened(bundle: Bundle, file: Path, precision: Precision) -> Iterator[Callable[[Any], Any]]:
    cores = tuple(cpu.usable_cores())
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
    if precision is Precision.INT8 and ov.Core.compile_model is not COMPILE_MODEL:
        from openvino.passes import ConstantFolding, Manager

        core = new_core()
        model = core.read_model(str(file))
        folding = Manager()
        folding.register_pass(ConstantFolding())  # else weights are converted for every image
        folding.run_passes(model)
        compiled = core.compile_model(model, "CPU", SIMULATED)
        return np.concatenate([compiled(image)[0] for image in pixels])
    with opened(bundle, file, precision) as stream:
        return np.concatenate([outputs.logits.copy() for _, outputs in stream(batches(pixels))])


def measure_rates(
    bundle: Bundle, faster: Path, precision: Precision, pixels: Pixels
) -> tuple[float, float]:
    some = list(batches(pixels[: 8 * BATCH]))
    with (
        opened(bundle, bundle.dir / bundles.MODEL, Precision.FP32) as fp32,
        opened(bundle, faster, precision) as fast,
    ):
        turns = [(rate(fp32, some), rate(fast, some)) for _ in range(8)]
    before, after = zip(*turns[1:], strict=True)  # the first turn warms up
    return round(statistics.median(before), 1), round(statistics.median(after), 1)


def rate(stream: Callable[[Any], Any], some: Sequence[Batch]) -> float:
    begun, done = time.perf_counter(), 0

    def repeated() -> Iterator[Batch]:
        while time.perf_counter() - begun < 0.7:
            yield from some

    for batch, _ in stream(repeated()):
        done += batch.filled
    return done / (time.perf_counter() - begun)


def format_row(row: Row) -> str:
    speed = f" | {row.rates[0]} → {row.rates[1]}" if row.rates else " |"
    return (
        f"| {row.model} | {row.recipe} | {row.calibration} | {row.seed} | {row.agreement:.4f} of"
        f" {row.crops} ({row.low:.4f}–{row.high:.4f}) | {row.uncropped_agreement:.4f} of"
        f" {row.uncropped} | {row.flips_where_sure} of {row.sure} |"
        f" {row.probability_difference:.4f} | {row.seconds:.0f} s{speed} |"
    )


if __name__ == "__main__":
    main()
