"""Writes TIFF files of every layout with tifffile, and says what each of them shows.

for cell in cells(): cell.name, cell.write()                  the grid shown(data)
uint8 (H, W, 3), by tifffile and the documented mapping to 8 bits
"""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from PIL import Image

from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Limits, Recipe, Status
from reference import reference_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH, HEIGHT = 37, 35
TYPES = (
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
)
PHOTOMETRICS = {
    "miniswhite": 1,
    "minisblack": 1,
    "rgb": 3,
    "palette": 1,
    "separated": 4,
    "cielab": 3,
    "ycbcr": 3,
    "mask": 1,
}
BYTE_CODECS = (None, "lzw", "zlib", "deflate", "packbits", "lzma", "zstd")
OTHER_CODECS = ("jpeg", "webp", "jpeg2000", "jpegxl", "jpegxr", "lerc", "png")
EXTRA: dict[str, tuple[str, ...]] = {
    "none": (),
    "unspecified": ("unspecified",),
    "associated": ("assocalpha",),
    "unassociated": ("unassalpha",),
    "two": ("unassalpha", "unspecified"),
}


@dataclass(frozen=True)
class Cell:
    """One file of the grid."""

    dtype: str
    photometric: str
    order: str = "<"
    compression: str | None = None
    planar: bool = False
    tiled: bool = False
    predictor: bool = False
    extra: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    values: str = "wide"

    @property
    def name(self) -> str:
        """Return the cell's coordinates in one word."""
        layout = (
            "planar" if self.planar else "contig",
            "tile" if self.tiled else "strip",
            "predictor" if self.predictor else "plain",
        )
        words = (
            "little" if self.order == "<" else "big",
            self.dtype,
            self.photometric,
            self.compression or "none",
            *layout,
            self.extra,
        )
        return "-".join((*words, self.values, *map(str, self.options)))

    @property
    def must_be_read(self) -> bool:
        """Whether `unsupported` would be a regression."""
        if self.predictor and self.compression in {None, "packbits"}:
            return False
        plain = self.photometric in {
            "miniswhite",
            "minisblack",
            "rgb",
            "separated",
        } or self.dtype in {"uint8", "uint16"}
        return (
            self.compression in BYTE_CODECS
            and plain
            and self.photometric not in {"mask", "cielab", "ycbcr"}
        )

    def array(self) -> np.ndarray:
        """Return the samples, (samples, H, W) if planar, else (H, W, samples)."""
        rng = np.random.default_rng(7)
        samples = PHOTOMETRICS[self.photometric] + len(EXTRA[self.extra])
        kind = np.dtype(self.dtype)
        if self.photometric == "cielab" and self.dtype == "uint8":  # colours that sRGB has
            light, a, b = (
                np.linspace(*ends, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
                for ends in ((90, 200), (-20, 20), (20, -20))
            )
            array = np.dstack([light, a, b, *[light] * (samples - 3)]).astype(int).astype(np.uint8)
            return np.ascontiguousarray(np.moveaxis(array, 2, 0)) if self.planar else array
        smooth = (
            np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[:, :, None] * 5
            + np.arange(samples) * 60
        )
        if kind.kind == "f":
            unit = (smooth % 256 + rng.random(smooth.shape)) / 256
            values = {"unit": unit, "byte": unit * 255, "wide": unit * 30_000 - 5_000}[self.values]
        else:
            info = np.iinfo(kind)
            span = {"byte": min(255, info.max), "word": min(65535, info.max), "wide": info.max}[
                self.values
            ]
            low = info.min if self.values == "wide" else 0
            values = (smooth % 256) / 256 * (float(span) - float(low)) + float(low)
        array = values.astype(kind)
        return np.ascontiguousarray(np.moveaxis(array, 2, 0)) if self.planar else array

    def write(self) -> bytes:
        """Return the file."""
        buffer = io.BytesIO()
        options = {
            "compression": self.compression,
            "predictor": self.predictor or None,
            "metadata": None,
            "software": False,
        }
        array = self.array()
        samples = array.shape[0 if self.planar else 2]
        if samples == 1:
            array = array[0] if self.planar else array[:, :, 0]
        else:
            options["planarconfig"] = "separate" if self.planar else "contig"
        options |= {"tile": (16, 32)} if self.tiled else {"rowsperstrip": 8}
        if self.photometric == "palette":
            size = 2 ** (8 * array.itemsize)
            options["colormap"] = np.random.default_rng(3).integers(
                0, 65536, (3, size), dtype=np.uint16
            )
        if EXTRA[self.extra]:
            options["extrasamples"] = EXTRA[self.extra]
        if self.photometric == "ycbcr":
            options["subsampling"] = (1, 1)
        photometric = 4 if self.photometric == "mask" else self.photometric
        with tifffile.TiffWriter(
            buffer, byteorder=self.order, bigtiff=self.options.get("bigtiff", False)
        ) as writer:
            tags = {"extratags": self.options["extratags"]} if "extratags" in self.options else {}
            writer.write(array, photometric=photometric, **options, **tags)
            for _ in range(self.options.get("pages", 0)):
                writer.write(array[::-1, ::-1], photometric=photometric, **options)
        return buffer.getvalue()


def cells() -> Iterator[Cell]:
    """Yield the grid: every type and photometric interpretation with each pair of the other
    properties that interact.
    """
    product = itertools.product
    layouts = list(product("<>", (False, True), (False, True)))
    for dtype, photometric in product(TYPES, PHOTOMETRICS):
        if photometric == "palette" and dtype not in {"uint8", "uint16"}:
            continue
        for (order, planar, tiled), compression in product(layouts, (None, "lzw")):
            yield Cell(dtype, photometric, order, compression, planar, tiled)
        for order, compression in product("<>", ("zlib", "packbits", "zstd")):
            yield Cell(
                dtype, photometric, order, compression, planar=order == "<", tiled=order == ">"
            )
        for order, planar in product("<>", (False, True)):
            yield Cell(
                dtype, photometric, order, "lzw", planar=planar, tiled=planar, predictor=True
            )
        for order, extra, planar in product(
            "<>", [name for name in EXTRA if name != "none"], (False, True)
        ):
            yield Cell(
                dtype, photometric, order, "lzw" if planar else None, planar=planar, extra=extra
            )
        for compression in OTHER_CODECS:
            yield Cell(dtype, photometric, "<", compression)
    for dtype, photometric, order in product(TYPES, ("miniswhite", "minisblack", "rgb"), "<>"):
        for values in ("unit", "byte") if dtype.startswith("float") else ("byte", "word"):
            yield Cell(dtype, photometric, order, "lzw", values=values)
        yield Cell(dtype, photometric, order, options={"bigtiff": True})
        yield Cell(dtype, photometric, order, options={"pages": 2})
        for turn in range(2, 9):
            yield Cell(dtype, photometric, order, options={"extratags": [(274, 3, 1, turn, True)]})


def product_cells() -> Iterator[Cell]:
    """Yield the whole product of all properties, some 90,000 files."""
    layouts = itertools.product(
        (*BYTE_CODECS, *OTHER_CODECS), (False, True), (False, True), (False, True), EXTRA
    )
    for (
        (compression, planar, tiled, predictor, extra),
        dtype,
        photometric,
        order,
    ) in itertools.product(layouts, TYPES, PHOTOMETRICS, "<>"):
        if photometric != "palette" or dtype in {"uint8", "uint16"}:
            yield Cell(dtype, photometric, order, compression, planar, tiled, predictor, extra)


def shown(data: bytes) -> np.ndarray:
    """Return what the first image of a TIFF shows: tifffile's array → photometric interpretation →
    8 bits; alpha is dropped.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        array, photometric, alpha = (
            page.asarray(),
            int(page.photometric),
            tuple(int(value) for value in page.extrasamples),
        )
        if photometric == 6 and int(page.compression) == 7:
            photometric = 2  # tifffile has converted it
        if page.samplesperpixel == 1:
            array = array[:, :, None]
        elif int(page.planarconfig) == 2:
            array = np.moveaxis(array, 0, 2)
        turn, colormap, bits = page.tags.get(274), page.colormap, page.bitspersample
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}[photometric]
    if photometric == 3:
        pixels = np.moveaxis(colormap, 0, 1)[array[:, :, 0]] >> 8
    elif photometric == 8:
        pixels = lab(array[:, :, :3])
    else:
        pixels = mapped(array[:, :, :colours], bits)
        if photometric == 0:
            pixels = 255 - pixels
        if photometric == 5:
            pixels = np.asarray(
                Image.frombytes(
                    "CMYK", pixels.shape[1::-1], pixels.astype(np.uint8).tobytes()
                ).convert("RGB")
            )
        if photometric == 6:
            pixels = np.asarray(
                Image.frombytes(
                    "YCbCr", pixels.shape[1::-1], pixels.astype(np.uint8).tobytes()
                ).convert("RGB")
            )
        if alpha[:1] == (1,) and photometric in {0, 1, 2} and array.dtype.kind != "i":
            opacity = mapped(array[:, :, colours : colours + 1], bits, low=0).astype(int)
            pixels = np.where(
                opacity > 0,
                np.minimum(255, 255 * pixels.astype(int) // np.maximum(1, opacity)),
                pixels,
            )
    if turn is not None:
        pixels = turned(pixels, int(turn.value))
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def mapped(values: np.ndarray, bits: int, low: float | None = None) -> np.ndarray:
    """Map an image's samples to 0…255 as documented, without the code under test."""
    if values.dtype == bool:
        return values * 255
    if values.dtype.kind == "u" and bits <= 8:
        return values.astype(int) * 255 // (2**bits - 1)
    if values.dtype.kind == "u" and bits <= 16:
        return values >> (bits - 8)
    whole = low is not None and values.dtype.kind == "u"  # alpha
    low, high = (
        float(values.min()) if low is None else low,
        float(np.iinfo(values.dtype).max if whole else values.max()),
    )
    if values.dtype.kind != "f" and low >= 0 and high <= 65535:
        return values.astype(int) >> (8 if high > 255 else 0)
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        return np.rint(values.astype(float) * (255 if high <= 1 else 1)).clip(0, 255)
    return np.rint((values.astype(np.longdouble) - low) * 255 / (np.longdouble(high) - low)).clip(
        0, 255
    )


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels as TIFF's tag 274 says."""
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    pixels = pixels[:, ::-1] if orientation in {2, 3, 6, 7} else pixels
    return pixels[::-1] if orientation in {3, 4, 7, 8} else pixels


def lab(values: np.ndarray) -> np.ndarray:
    """Convert CIELAB of TIFF (L 0…255, a and b signed) to sRGB by the formula, with the white D50
    adapted after Bradford.
    """
    light = values[:, :, 0].astype(float) / 2.55
    a, b = (values[:, :, band].astype(np.int8).astype(float) for band in (1, 2))
    y = (light + 16) / 116
    bent = np.stack([y + a / 500, y, y - b / 200], axis=2)
    xyz = np.where(bent > 6 / 29, bent**3, (bent - 4 / 29) * 3 * (6 / 29) ** 2) * [
        0.9642,
        1.0,
        0.8249,
    ]
    linear = (
        xyz
        @ np.array(
            [
                [3.1338561, -1.6168667, -0.4906146],
                [-0.9787684, 1.9161415, 0.033454],
                [0.0719453, -0.2289914, 1.4052427],
            ]
        ).T
    )
    linear = linear.clip(0, 1)
    return np.rint(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    )


def write(cell: Cell) -> bytes | None:
    """Return the file of a cell, or None if tifffile cannot write this combination."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cell.write()
    except Exception:  # it refuses combinations with many types of exceptions
        return None


def compare(cell: Cell) -> str:
    """Return `ok` or `unsupported`, which are right, or `not written`; anything else says what is
    wrong.
    """
    data = write(cell)
    if data is None:
        return "not written"
    decoded = decode(data, _RECIPE, Limits())
    if decoded.status is not Status.OK or decoded.pixels is None:
        expected = decoded.status is Status.UNSUPPORTED and not cell.must_be_read
        return "unsupported" if expected else f"{decoded.status}: {decoded.error}"
    reference = reference_pixels(Image.fromarray(shown(data)), _RECIPE)
    apart = int(np.abs(decoded.pixels.astype(int) - reference).max())
    return "ok" if apart <= (cell.photometric == "cielab") else f"{apart} levels apart"


_RECIPE = Recipe(33, 33, None)


def by_hand(
    values: np.ndarray,
    bits: int,
    *,
    photometric: int = 1,
    order: str = "<",
    deflate: bool = False,
    tags: dict[int, Any] | None = None,
) -> bytes:
    """Return a TIFF of one strip with unsigned samples (H, W, samples) of any number of bits;
    `tags` replace or join its own.

    A tag is a number or a tuple of numbers, stored as LONG.
    """
    height, width, samples = values.shape
    planes = (values[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    if bits not in {8, 16, 32, 64}:
        rows = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    else:
        rows = values.astype(f"{order}u{bits // 8}").tobytes()
    body = zlib.compress(rows) if deflate else rows
    found: dict[int, Any] = {
        **{
            256: width,
            257: height,
            258: (bits,) * samples,
            259: 8 if deflate else 1,
            262: photometric,
            273: 8,
            277: samples,
            278: height,
        },
        **{279: len(body), **(tags or {})},
    }
    return assemble(found, body, order)


def assemble(tags: dict[int, Any], body: bytes, order: str = "<") -> bytes:
    """Return a TIFF whose strips are `body`, at byte 8."""
    body += b"\0" * (len(body) % 2)
    at, arrays, entries = 8 + len(body), b"", b""
    for tag, value in sorted(tags.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + (
            packed if len(numbers) == 1 else struct.pack(order + "I", at + len(arrays))
        )
        arrays += packed if len(numbers) > 1 else b""
    header = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, at + len(arrays))
    return header + body + arrays + struct.pack(order + "H", len(tags)) + entries + bytes(4)
