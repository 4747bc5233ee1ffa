"""Compare the decoding speed of two versions of imagemill, format by format.

    python benchmarks/decode_formats.py OTHER/src [--images DIR] [--rounds 20]

OTHER/src is the other version's `src`. One process per version decodes the same images in turn, so
that other work on the machine hits both alike. Prints CPU milliseconds per image, the median over
the rounds, and the ratio of this version to the other: above 1 is slower.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = (640, 480)
FORMATS: dict[str, tuple[str, str, dict[str, object]]] = {
    "JPEG": ("RGB", "JPEG", {"quality": 90}),
    "PNG": ("RGB", "PNG", {}),
    "PNG metadata": ("RGB", "PNG", {"dpi": (72, 72), "icc_profile": bytes(3000)}),
    "PNG RGBA": ("RGBA", "PNG", {}),
    "PNG small": ("RGB", "PNG", {}),
    "WEBP": ("RGB", "WEBP", {}),
    "GIF": ("P", "GIF", {}),
    "BMP": ("RGB", "BMP", {}),
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
}


def encoded(folder: Path | None) -> dict[str, list[bytes]]:
    """Return a few images in each format: photographs of the folder, or noise on gradients."""
    if folder is not None:
        files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
        )[:8]
        images = [Image.open(path).convert("RGB").resize(SIZE) for path in files]
    else:
        rng = np.random.default_rng(0)
        coarse = [
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE)
            for _ in range(8)
        ]
        images = [
            Image.fromarray(
                np.asarray(image) // 2 + rng.integers(0, 24, (SIZE[1], SIZE[0], 3), np.uint8)
            )
            for image in coarse
        ]
    made: dict[str, list[bytes]] = {}
    for name, (mode, file_format, options) in FORMATS.items():
        for image in images:
            buffer = io.BytesIO()
            image.resize((64, 48) if name.endswith("small") else SIZE).convert(mode).save(
                buffer, file_format, **options
            )
            made.setdefault(name, []).append(buffer.getvalue())
    return made


def serve() -> None:
    """Decode what arrives, and answer with the CPU seconds that it took."""
    import time

    try:
        from imagemill.pipeline.decoding.decode import decode
    except ModuleNotFoundError:  # versions until November 2026
        from imagemill.images.decode import decode  # type: ignore[no-redef]
    from imagemill.records import Limits, Recipe

    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        began = time.process_time()
        for data in batch:
            assert decode(data, Recipe(), Limits()).error is None
        pickle.dump(time.process_time() - began, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def start(source: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def ask(process: subprocess.Popen[bytes], batch: list[bytes]) -> float:
    to: IO[bytes] | None = process.stdin
    assert to is not None
    assert process.stdout is not None
    pickle.dump(batch, to)
    to.flush()
    seconds: float = pickle.load(process.stdout)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    versions = [start(ROOT / "src"), start(arguments.other.resolve())]
    print(f"{'format':14}{'this, ms':>10}{'other, ms':>11}{'ratio':>8}")
    for name, images in encoded(arguments.images).items():
        batch = images * (20 if name.endswith("small") else 1)
        rounds = []
        for turn in range(arguments.rounds + 1):  # the first is a warm-up; who begins alternates
            order = (0, 1) if turn % 2 else (1, 0)
            seconds = {which: ask(versions[which], batch) for which in order}
            rounds.append((seconds[0], seconds[1]))
        del rounds[0]
        this, other = (
            1000 * statistics.median(pair[which] for pair in rounds) / len(batch)
            for which in (0, 1)
        )
        ratio = statistics.median(one / two for one, two in rounds)
        print(f"{name:14}{this:10.3f}{other:11.3f}{ratio:8.3f}")
    for process in versions:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
