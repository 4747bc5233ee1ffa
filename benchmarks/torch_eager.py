"""The torch backend on one CPU core, against PyTorch's own eager execution and OpenVINO.

    python benchmarks/torch_eager.py --models DIR [--model resnext101_32x4d] [--rounds 5]

Needs the extras `torch` and `export` (for timm). All three compute the same architecture with random
weights, in batches of 4, on one thread, in alternation. Printed are images per second of CPU time,
medians over the rounds, and the ratios of the medians.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch

from imagemill.models import get
from imagemill.pipeline.backends import open_session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Precision, SessionSpec

SIZE = 4
"""Images in a batch."""
SECONDS = 4.0
"""Each measurement takes about as long."""
TIMM = {"efficientnet_lite0": "tf_efficientnet_lite0"}
"""Our name → timm's, if they differ."""


def eager(name: str, dtype: torch.dtype, pixels: np.ndarray) -> Callable[[], object]:
    """Return a call that computes a batch with timm's network, channels-last."""
    network = timm.create_model(TIMM.get(name, name), pretrained=False).eval()
    network = network.to(dtype=dtype, memory_format=torch.channels_last)
    mean, std = (torch.full((1, 3, 1, 1), value) for value in (123.0, 58.0))

    def compute() -> None:
        with torch.inference_mode():
            planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
            network(((planes - mean) / std).to(dtype)).float().numpy()

    return compute


def session(
    bundle: Bundle, backend: str, precision: Precision, pixels: np.ndarray
) -> Callable[[], object]:
    """Return a call that computes a batch with one of imagemill's sessions."""
    spec = SessionSpec(str(bundle.dir / "model.onnx"), bundle.card, precision, SIZE)
    opened = open_session(spec, DeviceSpec("cpu#0", "cpu", backend, (0,)), Stopwatch())
    batch = Batch(pixels, SIZE, ())
    return lambda: deque(opened.stream([batch]), maxlen=0)


def rate(compute: Callable[[], object]) -> float:
    """Return images per second of CPU time, which other work on the machine changes less."""
    count, begun = 0, time.process_time()
    while (passed := time.process_time() - begun) < SECONDS:
        compute()
        count += SIZE
    return count / passed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", default="resnext101_32x4d")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bundle = get.get(asked.model, asked.models, random_seed=0)
    recipe = bundle.card.recipe
    shape = (SIZE, recipe.height, recipe.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for precision, dtype in ((Precision.FP32, torch.float32), (Precision.BF16, torch.bfloat16)):
        candidates = {
            "torch backend": session(bundle, "torch", precision, pixels),
            "PyTorch eager": eager(asked.model, dtype, pixels),
            "OpenVINO": session(bundle, "openvino", precision, pixels),
        }
        for compute in candidates.values():
            compute()
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(asked.rounds):
            for name, compute in candidates.items():
                rates[name].append(rate(compute))
        ours, *others = (median(values) for values in rates.values())
        print(f"{asked.model}, {precision}, {asked.rounds} rounds, 1 thread, batches of {SIZE}")
        for name, values in rates.items():
            print(
                f"  {name:14} {median(values):7.2f} images/s ({min(values):.2f}-{max(values):.2f})"
            )
        print(f"  to eager {ours / others[0]:.2f}, to OpenVINO {ours / others[1]:.2f}")


if __name__ == "__main__":
    main()
