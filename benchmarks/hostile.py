"""Classify a corpus of mutated images and look at the end: one row each, neighbours unharmed.

    python benchmarks/hostile.py --files 5000 --seed 1

Every format that the decoder knows, mutated: bits flipped, files cut, headers of one format before
the body of another, sizes in headers changed, and bombs in PNG, GIF, TIFF, WebP, JPEG and ICO. A
good image follows every third bad one; the good ones alone are classified in a run of their own,
and must have the very same answers beside the bad ones. The last line is the result; the seed is
printed before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import harness  # noqa: E402
from PIL import Image, features  # noqa: E402

import helpers  # noqa: E402
import sample_images  # noqa: E402

MAX_PIXELS = 1_000_000
_BOMBS = [name for name in sample_images.HOSTILE if name.endswith("bomb")]
_OTHERS = [name for name in sample_images.HOSTILE if not name.endswith("bomb")]


def originals() -> dict[str, list[bytes]]:
    """Sound images by suffix: all formats that can be both written here and read, some of them in
    several forms.
    """
    colour, small = sample_images.photograph(70, 50, 1), sample_images.photograph(32, 32, 2)
    grey, palette, alpha = colour.convert("L"), colour.convert("P"), colour.convert("RGBA")
    made: dict[str, list[tuple[Image.Image, str, dict[str, object]]]] = {
        "jpg": (
            [
                (colour, "JPEG", {"quality": q, "progressive": p})
                for q in (60, 92)
                for p in (False, True)
            ]
            + [
                (grey, "JPEG", {}),
                (colour.convert("CMYK"), "JPEG", {}),
                (colour, "JPEG", {"exif": sample_images.exif(6)}),
            ]
        ),
        "png": [
            (image, "PNG", {}) for image in (colour, grey, palette, alpha, colour.convert("1"))
        ],
        "gif": [(palette, "GIF", {}), (palette, "GIF", {"interlace": 0})],
        "bmp": [(colour, "BMP", {}), (palette, "BMP", {})],
        "tif": [
            (colour, "TIFF", {"compression": c})
            for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ],
        "webp": [(colour, "WEBP", {"quality": 80}), (alpha, "WEBP", {"lossless": True})],
        "jp2": [(colour, "JPEG2000", {})],
        "ico": [
            (small, "ICO", {"sizes": [(32, 32)]}),
            (small, "ICO", {"sizes": [(32, 32)], "bitmap_format": "bmp"}),
        ],
        "icns": [(small, "ICNS", {})],
        "ppm": [(colour, "PPM", {}), (grey, "PPM", {})],
        "pcx": [(colour, "PCX", {})],
        "sgi": [(colour, "SGI", {})],
        "tga": [(colour, "TGA", {"compression": "tga_rle"})],
        "dds": [(colour, "DDS", {})],
        "im": [(colour, "IM", {})],
        "xbm": [(colour.convert("1"), "XBM", {})],
        "msp": [(colour.convert("1"), "MSP", {})],
        "blp": [(palette, "BLP", {})],
    }
    if features.check("avif"):
        made["avif"] = [(colour, "AVIF", {"quality": 60, "speed": 10})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow will stop writing some of them one day
        found = {
            suffix: [sample_images.encode(image, kind, **options) for image, kind, options in forms]
            for suffix, forms in made.items()
        }
    found["gif"].append(sample_images.animated_gif())
    found["tif"].append(sample_images.tiff(8, 8))
    return found


def flip(data: bytes, rng: random.Random, _other: bytes) -> bytes:
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.5 else min(len(data), 64)  # headers are where it hurts
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random, _: bytes) -> bytes:
    start = rng.randrange(len(data)) if rng.random() < 0.2 else 0
    return data[start : rng.randrange(start, len(data) + 1)]


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The head of one, the rest of another."""
    return other[: rng.randrange(1, 64)] + data[rng.randrange(0, 64) :]


def resize(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """Other numbers where a size may stand: 16 or 32 bits, either order, in the first 200 bytes."""
    changed = bytearray(data + bytes(4))  # the file may be shorter than the number
    at = rng.randrange(max(1, min(len(data), 200) - 4))
    value = rng.choice(
        (0, 1, 2, 255, 256, 32_767, 32_768, 65_535, 100_000, 2**31 - 1, 2**31, 2**32 - 1)
    )
    layout = rng.choice(("<H", ">H", "<I", ">I"))
    struct.pack_into(layout, changed, at, value & (0xFFFF if layout[1] == "H" else 0xFFFFFFFF))
    return bytes(changed[: len(data)])


def shuffle(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """A block moved, doubled or taken out."""
    one, two = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        (
            data[:one] + data[two:],
            data[:two] + data[one:],
            data[:one] + data[one:two][::-1] + data[two:],
        )
    )


MUTATIONS: list[Callable[[bytes, random.Random, bytes], bytes]] = [
    flip,
    flip,
    cut,
    splice,
    resize,
    resize,
    shuffle,
]


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` mutated files as (name, content), the same for the same seed and libraries."""
    rng = random.Random(seed)
    sound = originals()
    suffixes = sorted(sound)
    special = {name: sample_images.HOSTILE[name]()[0] for name in (*_BOMBS, *_OTHERS)}
    for number in range(count):
        if number % 20 == 0:
            name = _BOMBS[number // 20 % len(_BOMBS)]
            data, suffix = special[name], name.split("-")[0]
            if number // 20 >= len(_BOMBS):
                data = flip(data, rng, b"")
        elif number % 20 == 10:
            name = _OTHERS[number // 20 % len(_OTHERS)]
            data, suffix = special[name], "jpg"
        else:
            suffix = suffixes[number % len(suffixes)]
            data = rng.choice(sound[suffix])
            other = rng.choice(sound[rng.choice(suffixes)])
            for _ in range(rng.choice((1, 1, 1, 2))):
                data = rng.choice(MUTATIONS)(data, rng, other) if data else data
        yield f"{number:06d}-bad.{suffix}", data


@dataclass(frozen=True)
class Report:
    """What a hostile run was."""

    seed: int
    files: int
    good: int
    statuses: dict[str, int]
    restarts: int
    seconds: float

    def __str__(self) -> str:
        statuses = ", ".join(
            f"{count} {status}"
            for status, count in sorted(self.statuses.items(), key=lambda item: -item[1])
        )
        return (
            f"hostile: {self.files} mutated files, seed {self.seed}, {self.seconds:.0f} s: one row"
            f" each ({statuses}); {self.good} good neighbours unchanged; {self.restarts} worker"
            " restarts"
        )


def hostile(folder: Path, count: int, seed: int) -> Report:
    """Run the corpus below `folder`. Raises: AssertionError where a promise is broken."""
    begun = time.monotonic()
    bad, good = folder / "all", folder / "good"
    for name, data in mutated(count, seed):
        path = bad / f"{int(name[:6]) // 1000:03d}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if int(name[:6]) % 3 == 0:
            neighbour = sample_images.jpeg(40, 36, seed=int(name[:6]) % 500, quality=80)
            for root in (bad, good):
                path = root / f"{int(name[:6]) // 1000:03d}" / f"{name[:6]}-good.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(neighbour)
    env = helpers.environment(
        IMAGEMILL_MODELS=str(harness.null_bundle(folder / "models", classes=100))
    )
    arguments = [
        "--model",
        "null",
        "--devices",
        "null:2",
        "--max-pixels",
        MAX_PIXELS,
        "--max-seconds",
        "20",
        "--json",
    ]
    limit_s = 120 + count / 10  # ten files a second, a fiftieth of the usual rate
    result = helpers.finish(
        helpers.start("run", bad, "--output", folder / "out", "--all-files", *arguments, env=env),
        limit_s,
    )
    assert result.code == 0, result
    calm = helpers.finish(
        helpers.start("run", good, "--output", folder / "calm", *arguments, env=env), limit_s
    )
    assert calm.code == 0, calm
    harness.assert_complete(folder / "out")
    rows, undisturbed = helpers.by_path(folder / "out"), helpers.by_path(folder / "calm")
    files = {str(path.relative_to(bad)) for path in bad.rglob("*") if path.is_file()}
    assert rows.keys() == files, rows.keys() ^ files
    assert {path: row for path, row in rows.items() if path.endswith("-good.jpg")} == undisturbed
    assert all(row["status"] == "ok" for row in undisturbed.values())
    mutants = [row for path, row in rows.items() if "-bad." in path]
    assert len(mutants) == count
    statuses = Counter(row["status"] for row in mutants)
    assert all(
        (row["error"] is None) == (row["status"] == "ok") == (row["label"] is not None)
        for row in mutants
    )
    restarts = sum(device["restarts"] for device in result.json["devices"])
    return Report(seed, count, len(undisturbed), dict(statuses), restarts, time.monotonic() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument(
        "--seed", type=int, default=None, help="default: from the system, and printed"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work, and leave everything (default: a temporary folder)",
    )
    parsed = parser.parse_args()
    seed = parsed.seed if parsed.seed is not None else int.from_bytes(os.urandom(4))
    print(f"seed {seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = parsed.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="imagemill-hostile-"))
        )
        print(hostile(folder, parsed.files, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
