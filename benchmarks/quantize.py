"""How fast fp32, bf16 and int8 are in the same session, and which kernels int8 runs as.

    python benchmarks/quantize.py [--model resnext101_32x4d] [--calibration 32] [--rounds 5]
    [--seconds 4] [IMAGES]

The bundle is copied to a temporary folder and quantised there, on IMAGES (a folder) or on noise;
then the three precisions take turns, `--seconds` each, `--rounds` times, all cores, no decoding. It
prints medians in images/s, their ratios to fp32, and every convolution of int8 that does not run as
int8. For the accuracy check, use `imagemill quantize MODEL --images SOURCE`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from imagemill.models import bundle as bundles
from imagemill.pipeline import sources
from imagemill.pipeline.backends import open_session
from imagemill.pipeline.backends.base import Session
from imagemill.pipeline.sources.base import Skipped
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Filters, Limits, Precision, SessionSpec
from imagemill.system import cpu
from imagemill.system.openvino_library import new_core
from imagemill.tuning import images, quantize


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", help="folder to calibrate on (default: noise)")
    parser.add_argument("--model", default="resnext101_32x4d")
    parser.add_argument("--models-dir", type=Path, default=bundles.default_models_dir())
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-bench-") as folder:
        measure(given, Path(folder))


def measure(given: argparse.Namespace, folder: Path) -> None:
    for file in (given.models_dir / given.model).glob("[cm]*.*"):
        shutil.copy(file, folder)
    bundle = bundles.load(folder)
    card, cores = bundle.card, tuple(cpu.usable_cores())
    pixels = calibration_pixels(given, bundle, cores)
    begun = time.perf_counter()
    model = quantize.quantize(folder / "model.onnx", pixels)
    print(f"calibrated on {len(pixels)} images in {time.perf_counter() - begun:.1f} s")
    int8 = quantize.save(model, folder)
    del model
    options = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    request = new_core().compile_model(str(int8), "CPU", options).create_infer_request()
    request.infer([pixels[0]])
    found = [item for item in request.profiling_info if item.node_type.endswith("Convolution")]
    for (layer, kernel), count in sorted(
        Counter((item.node_type, item.exec_type) for item in found).items()
    ):
        print(f"  {count:4} × {layer:<18} {kernel}")
    for item in found:
        if not item.exec_type.upper().endswith("_I8"):
            print(f"  not int8: {item.node_name} ({item.exec_type})")

    files = {
        Precision.FP32: folder / "model.onnx",
        Precision.BF16: folder / "model.onnx",
        Precision.INT8: int8,
    }
    shape = (given.batch_size, card.recipe.height, card.recipe.width, 3)
    batch = Batch(
        np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), given.batch_size, ()
    )

    def opened(precision: Precision) -> Session:
        spec = SessionSpec(str(files[precision]), card, precision, given.batch_size)
        session = open_session(spec, DeviceSpec("cpu#0", "cpu", "openvino", cores), Stopwatch())
        for _ in session.stream([batch] * 4):
            pass
        return session

    sessions = {precision: opened(precision) for precision in files}

    def run(precision: Precision) -> float:
        """images/s of one turn."""
        begun = time.perf_counter()

        def batches():
            while time.perf_counter() - begun < given.seconds:
                yield batch

        done = sum(outputs.logits.shape[0] for _, outputs in sessions[precision].stream(batches()))
        return done / (time.perf_counter() - begun)

    rates: dict[Precision, list[float]] = {precision: [] for precision in files}
    for _ in range(given.rounds):
        for precision in files:
            rates[precision].append(run(precision))
    medians = {precision: statistics.median(values) for precision, values in rates.items()}
    for precision, values in rates.items():
        ratio = medians[precision] / medians[Precision.FP32]
        print(
            f"{precision:<5} {medians[precision]:8.1f} images/s  {ratio:5.2f} × fp32  "
            f" ({', '.join(f'{value:.1f}' for value in values)})"
        )


def calibration_pixels(
    given: argparse.Namespace, bundle: Bundle, cores: tuple[int, ...]
) -> list[np.ndarray]:
    if given.images is None:
        rng, recipe = np.random.default_rng(0), bundle.card.recipe
        return [
            rng.integers(0, 256, (1, recipe.height, recipe.width, 3), dtype=np.uint8)
            for _ in range(given.calibration)
        ]
    resolved = sources.resolve([given.images])
    listing = sources.open_all(resolved)[0].entries(Filters(), Skipped())
    chosen, _ = images.sample(listing, 2 * given.calibration)
    decoder = images.Decoder(resolved, bundle.card.recipe, Limits(), len(cores))
    return [image.pixels for image in decoder.decode(chosen, given.calibration)]


if __name__ == "__main__":
    main()
