"""Mutate encoded images of all formats, and compare the decoder's verdict with plain Pillow's.

Plain Pillow is a fresh `Image.open` and one `load` in the same process, turned by
`ImageOps.exif_transpose`. `compare` tells how the two differ; a difference is explained by one of
EXCEPTIONS or is a fault. benchmarks/mutate_images.py runs thousands of mutations.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tifffile
from PIL import Image, ImageOps

import encoded
from imagemill.pipeline.decoding.decode import decode
from imagemill.pipeline.decoding.formats import FORMATS
from imagemill.records import Decoded, Limits, Recipe, Status
from reference import reference_pixels

RECIPE = Recipe(64, 64, resize=None)
"""Larger than the samples: every pixel is compared."""
LIMITS = Limits(max_pixels=1_000_000)
JPEG_TOLERANCE = 3
_PNG = b"\x89PNG\r\n\x1a\n"


# Mutations


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the file with one kind of damage; in half of the cases with checksums that fit the
    damage.
    """
    damaged = rng.choice([_flip, _flip, _flip, _cut, _cut, _zero, _remove, _insert, _number])(
        bytearray(data), rng
    )
    if rng.random() < 0.5:
        damaged = repair_sums(damaged)
    return damaged


def mutate_png_pixels(data: bytes, rng: random.Random) -> bytes:
    """Return a PNG whose scan lines are damaged before compression, so that every checksum is
    right.
    """
    chunks = _chunks(data)
    rows = bytearray(zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT")))
    damaged = rng.choice([_flip, _cut, _zero, _remove])(rows, rng)
    made = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    made.insert(
        next((at for at, chunk in enumerate(chunks) if chunk[0] == b"IDAT"), 0),
        (b"IDAT", zlib.compress(damaged)),
    )
    return _PNG + b"".join(encoded.chunk(kind, body) for kind, body in made)


def _place(size: int, rng: random.Random) -> int:
    """An offset: every other one in the header."""
    return rng.randrange(min(size, rng.choice([150, 600, size, size])))


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        data[_place(len(data), rng)] ^= (
            1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
        )
    return bytes(data)


def _cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(
        data[: rng.randrange(1, len(data))]
        if rng.random() < 0.5
        else data[: -rng.randrange(1, min(len(data), 40))]
    )


def _zero(data: bytearray, rng: random.Random) -> bytes:
    at, length = _place(len(data), rng), rng.choice([1, 4, 50, 4096])
    data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def _remove(data: bytearray, rng: random.Random) -> bytes:
    at = _place(len(data), rng)
    del data[at : at + rng.choice([1, 2, 4, 60])]
    return bytes(data)


def _insert(data: bytearray, rng: random.Random) -> bytes:
    at = _place(len(data), rng)
    data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 60]))
    return bytes(data)


def _number(data: bytearray, rng: random.Random) -> bytes:
    """Overwrite a number by a large, small or negative one."""
    size, order = rng.choice([2, 4]), rng.choice(["big", "little"])
    at = _place(max(1, len(data) - size), rng)
    data[at : at + size] = rng.choice(
        [0, 1, 2, 3, 255, 256, 65535, 2 ** (8 * size - 1), 2 ** (8 * size) - 1]
    ).to_bytes(size + 4, order)[4 if order == "big" else 0 :][:size]
    return bytes(data)


def repair_sums(data: bytes) -> bytes:
    """Return a PNG with right checksums: CRC-32 of every chunk, and Adler-32 of the pixels if they
    inflate.
    """
    if not data.startswith(_PNG):
        return data
    at, made = len(_PNG), [_PNG]
    chunks: list[tuple[bytes, bytes]] = []
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    stream = b"".join(body for kind, body in chunks if kind == b"IDAT")
    last = max((number for number, chunk in enumerate(chunks) if chunk[0] == b"IDAT"), default=-1)
    try:
        inflater = zlib.decompressobj(-15)
        rows = inflater.decompress(stream[2:]) + inflater.flush()
        if inflater.eof and len(inflater.unused_data) == 4 and len(chunks[last][1]) >= 4:
            chunks[last] = (b"IDAT", chunks[last][1][:-4] + struct.pack(">I", zlib.adler32(rows)))
    except zlib.error:
        pass
    made += [encoded.chunk(kind, body) for kind, body in chunks]
    return b"".join(made) + data[at:]


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    at, chunks = len(_PNG), []
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


# The reference


@dataclass(frozen=True)
class Reference:
    """What plain Pillow makes of a file: RGB of the displayed image, or an error."""

    format: str | None = None
    pixels: np.ndarray | None = None
    error: str = ""
    area: int = 0


def reference(data: bytes) -> Reference:
    Image.init()
    formats = [name for name in Image.ID if name in FORMATS]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow means to drop IM
            image = Image.open(io.BytesIO(data), formats=formats)
            image.load()
    except Exception as error:
        return Reference(error=f"{type(error).__name__}: {error}")
    name = image.format
    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(action="ignore"),
    ):  # broken EXIF: displayed as stored
        image = ImageOps.exif_transpose(image)
    pixels = reference_pixels(displayed(image), RECIPE)
    return Reference(name, pixels, area=image.width * image.height)


def displayed(image: Image.Image) -> Image.Image:
    """Map to 8-bit RGB as docs/formats.md says."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
        return Image.fromarray(
            (values >> 8 if image.format == "PPM" or values.max() > 255 else values).astype(
                np.uint8
            )
        )
    if image.mode in {"I", "F"}:
        with np.errstate(invalid="ignore"):  # some NaN
            values = values.astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if image.mode == "F" and low >= 0 and high <= 255:
            low, high = 0.0, 1.0 if high <= 1 else 255.0
        with np.errstate(all="ignore"):
            scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (
                255 / ((high - low) or 1)
            )
        return Image.fromarray(np.rint(scaled).astype(np.uint8))
    image.info.pop("transparency", None)
    if image.mode in {"La", "RGBa"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


# The comparison


def is_png_metadata(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    """Whether Pillow reads the same pixels once the metadata is gone."""
    if not data.startswith(_PNG) or decoded.status is not Status.OK:
        return False
    made, has_pixels = _PNG, False
    for (kind, body), sound in zip(_chunks(data), _sound(data), strict=True):
        has_pixels |= kind == b"IDAT"
        wanted = {b"tRNS", b"eXIf"} if has_pixels else {b"tRNS", b"eXIf", b"acTL", b"fcTL"}
        if kind[:1].isupper() or (kind in wanted and sound):
            made += encoded.chunk(kind, body)
        if kind == b"IEND":
            break
    return _same(decoded, reference(made))


def _sound(data: bytes) -> list[bool]:
    at, sound = len(_PNG), []
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        sound.append(
            data[at + 8 + length : at + 12 + length]
            == struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        )
        at += 12 + length
    return sound


def is_png_sum(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    return (
        decoded.status is Status.CORRUPT
        and "wrong checksum of the IDAT chunk" in str(decoded.error)
        and repair_sums(data) != data
    )


def is_png_frame(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    """Whether a PNG holds later frames of an animation, but no IDAT, which would be its image."""
    kinds = {kind for kind, _ in _chunks(data)} if data.startswith(_PNG) else set()
    return decoded.status is Status.CORRUPT and b"fdAT" in kinds and b"IDAT" not in kinds


def is_pcx_palette(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    return (
        decoded.status is Status.TRUNCATED
        and "before its palette" in str(decoded.error)
        and data[-769:-768] != b"\x0c"
    )


def is_bmp_palette(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    """Whether only pixels differ that Pillow shows in black, in a BMP of fewer colours than its
    depth allows.
    """
    if (
        data[:2] != b"BM"
        or decoded.pixels is None
        or expected.pixels is None
        or struct.unpack_from("<I", data, 46)[0] >= 256
    ):
        return False
    differ = (decoded.pixels != expected.pixels).any(axis=2)
    return not expected.pixels[differ].any()


def is_psd_channels(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    """Whether a PSD says that it has more channels than its colours need, and Pillow reads it.

    RGB with four channels does not count: Pillow knows it.
    """
    if data[:4] != b"8BPS" or expected.pixels is None:
        return False
    channels, mode = struct.unpack_from(">H10xH", data, 12)
    return bool(channels > {3: 4, 4: 4, 9: 3}.get(mode, 1))


def is_tiff_tags(data: bytes, decoded: Decoded, expected: Reference) -> bool:
    """Return whether Pillow alone reads a TIFF with damaged tags, or alone refuses it.

    tifffile decides. It reads the file as it is, or with the bits per sample at its end made whole.
    Strips that are missing are `truncated`, although both fill them in, and so is a palette image
    without its number of bits, of which both read one.
    """
    if data[:2] not in {b"II", b"MM"}:
        return False
    if expected.pixels is not None:
        return decoded.status is not Status.OK and (
            re.search("where the size needs|tag 258 is missing", str(decoded.error)) is not None
            or not _read_by_tifffile(data)
        )
    if decoded.status is not Status.OK or not re.search("cannot identify|decoder", expected.error):
        return False
    return _read_by_tifffile(data) or _read_by_tifffile(data + b"\x08\0" * 32)


def _read_by_tifffile(data: bytes) -> bool:
    try:
        return bool(tifffile.imread(io.BytesIO(data)).size)
    except Exception:  # it raises many kinds on damaged files
        return False


EXCEPTIONS: dict[str, tuple[str, Callable[[bytes, Decoded, Reference], bool]]] = {
    "PNG metadata": (
        (
            "Pillow refuses a PNG for metadata that is damaged or large; viewers show it, as its"
            " pixels are whole"
        ),
        is_png_metadata,
    ),
    "PNG checksum": (
        (
            "Pillow does not compare the CRC-32 of IDAT; a wrong one means damage, even if the"
            " pixels inflate"
        ),
        is_png_sum,
    ),
    "PNG frame": (
        "Pillow shows the second frame of an animated PNG whose first one is gone",
        is_png_frame,
    ),
    "PCX palette": (
        "Pillow shows a PCX that ends before its palette as grey, in wrong colours",
        is_pcx_palette,
    ),
    "BMP palette": (
        "Pillow shows pixels beyond a BMP's declared palette in black; other readers do not",
        is_bmp_palette,
    ),
    "PSD channels": (
        "Pillow takes the row lengths of a PSD's further channels for pixels",
        is_psd_channels,
    ),
    "TIFF tags": (
        (
            "Pillow and tifffile disagree about a TIFF with damaged tags, and we agree with tifffile;"
            " or both fill in strips that are missing"
        ),
        is_tiff_tags,
    ),
}
"""Name → why the verdicts may differ, and what tells that they differ for this reason."""


def _same(decoded: Decoded, expected: Reference) -> bool:
    if decoded.pixels is None or expected.pixels is None:
        return False
    apart = np.abs(decoded.pixels.astype(int) - expected.pixels).max()
    return bool(apart <= (JPEG_TOLERANCE if expected.format in {"JPEG", "MPO"} else 0))


def compare(data: bytes) -> tuple[Decoded, str | None]:
    """Decode a file both ways.

    Returns:
        our verdict, and how it differs from Pillow's: None, the name of an exception, or a
        description that begins with `FAULT`.
    """
    decoded, expected = decode(data, RECIPE, LIMITS), reference(data)
    if decoded.status is Status.OK and expected.pixels is None:
        found = f"FAULT ok, Pillow refuses: {expected.error}"
    elif decoded.status is Status.TOO_LARGE and expected.area > LIMITS.max_pixels:
        return decoded, None
    elif decoded.status not in {Status.OK, Status.UNSUPPORTED} and expected.pixels is not None:
        found = f"FAULT {decoded.status} ({decoded.error}), Pillow reads {expected.format}"
    elif decoded.status is Status.OK and not _same(decoded, expected):
        apart = np.abs(decoded.pixels.astype(int) - expected.pixels)
        found = (
            f"FAULT pixels differ from Pillow's {expected.format} by up to {apart.max()},"
            f" {(apart > 0).mean():.0%} of them"
        )
    else:
        return decoded, None
    return decoded, next(
        (name for name, (_, holds) in EXCEPTIONS.items() if holds(data, decoded, expected)), found
    )


def cases(count: int, seed: int) -> list[tuple[str, bytes]]:
    """Return this many mutations of the samples in turn, each with the name of its sample."""
    rng = random.Random(seed)
    names = [
        name
        for name in encoded.SAMPLES
        for _ in range(3 if name.startswith(("PNG", "JPEG ", "WEBP")) else 1)
    ]
    made = []
    for number in range(count):
        name = names[number % len(names)]
        data = encoded.SAMPLES[name]()
        pixels = name.startswith("PNG") and name != "PNG animated" and rng.random() < 0.3
        made.append((name, mutate_png_pixels(data, rng) if pixels else mutate(data, rng)))
    return made
