"""What all peers share: their arguments, their images, plain preprocessing with Pillow, and the one
line that each prints.

Every peer is one process that prints one JSON object as the last line of stdout:

    name                        who images, seconds             all it classified, and the wall
    clock since its process began images_per_second           the two divided: what a user of it
    sees steady_images_per_second    without start-up: the images after the first batch over the
    time after the first batch
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_IMPORTED = time.monotonic()
SIZE, RESIZE = 224, 256


def begun() -> float:
    """When this process began, on the monotonic clock; to a hundredth of a second on Linux, else
    when this module was imported.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK") - (
            time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        )
    except (OSError, ValueError, AttributeError):
        return _IMPORTED


class Meter:
    """Counts batches as they are done."""

    def __init__(self) -> None:
        self.begun = begun()
        self._marks: list[tuple[float, int]] = []

    def done(self, images: int) -> None:
        self._marks.append((time.monotonic(), images))

    def report(self, name: str, **more: Any) -> None:
        """Print the line; call it last."""
        images = sum(count for _, count in self._marks)
        seconds = time.monotonic() - self.begun
        steady = None
        if len(self._marks) > 1:
            steady = (images - self._marks[0][1]) / (self._marks[-1][0] - self._marks[0][0])
        print_line(name, images, seconds, steady, **more)


def print_line(name: str, images: int, seconds: float, steady: float | None, **more: Any) -> None:
    line = {
        "name": name,
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3),
    }
    line["steady_images_per_second"] = None if steady is None else round(steady, 3)
    print(json.dumps(line | more), flush=True)


def arguments(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", metavar="DIR", help="flat folder of JPEG files")
    parser.add_argument(
        "--model-dir",
        metavar="DIR",
        required=True,
        help="bundle with model.onnx, as `imagemill get-model` makes it",
    )
    parser.add_argument("--limit", type=int, help="the first N images only")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for what decodes nothing: how long to compute"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="default: the usable cores",
    )
    return parser


def images(folder: str, limit: int | None = None) -> list[str]:
    found = sorted(
        str(path) for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not found:
        raise SystemExit(f"{folder} holds no JPEG files")
    return found[:limit]


def prepare(image: Any) -> np.ndarray:
    """A Pillow image the usual way: short side to 256, bilinear, centre crop; uint8 (224, 224,
    3).
    """
    from PIL import Image

    image = image.convert("RGB")
    scale = RESIZE / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def load(path: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return prepare(image)


def synthetic(batch_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch_size, SIZE, SIZE, 3), np.uint8)


def in_batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def architecture(model_dir: str) -> str:
    return str(json.loads((Path(model_dir) / "card.json").read_text())["architecture"])
