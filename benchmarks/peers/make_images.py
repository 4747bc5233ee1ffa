"""Makes many images of few, always the same ones: the originals, then crops of them, encoded again.

    python make_images.py --images DIR --output DIR --count 1000

Crops keep 80 to 100 % of each side, so that sizes stay those of the originals, nearly; JPEG quality
90. All JPEG files below DIR serve.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterable
from pathlib import Path


def make(folder: Path, output: Path, numbers: Iterable[int]) -> None:
    """Make the images of these numbers, from 0; several processes can share the work."""
    from PIL import Image

    originals = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not originals:
        raise SystemExit(f"{folder} holds no JPEG files")
    output.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        original = originals[number % len(originals)]
        goal = output / f"{number:06d}-{original.stem}.jpg"
        if goal.exists():
            continue
        partial = goal.with_suffix(".tmp")
        if number < len(originals):
            shutil.copyfile(original, partial)
        else:
            chance = random.Random(number)
            with Image.open(original) as image:
                width, height = (round(side * chance.uniform(0.8, 1.0)) for side in image.size)
                left, top = (
                    chance.randint(0, image.width - width),
                    chance.randint(0, image.height - height),
                )
                image.convert("RGB").crop((left, top, left + width, top + height)).save(
                    partial, "JPEG", quality=90
                )
        partial.rename(goal)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    make(asked.images, asked.output, range(asked.count))


if __name__ == "__main__":
    main()
