"""Makes odd and hostile images as bytes, for every test that needs some. Nothing here is read from
a disk.

photograph(640, 480)                    a smooth RGB image that looks a little like a photograph
encode(photograph(64, 48), "PNG")       the same, as a file's bytes
jpeg(64, 48, orientation=6)             a JPEG that is to be turned
HOSTILE["png-bomb"]()                   (bytes, the status that must come of them)
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image, with some texture and no symmetry: every turn and every shift of it looks
    different.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )
    noise = rng.standard_normal(smooth.shape, np.float32)
    return Image.fromarray((smooth + 6 * noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    if file_format == "PNG":
        options = {"compress_level": 1, **options}  # several times as fast as the default
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


@functools.lru_cache(4_096)
def jpeg(
    width: int = 64,
    height: int = 48,
    *,
    orientation: int | None = None,
    seed: int = 0,
    **options: Any,
) -> bytes:
    """A JPEG; with an orientation, width and height are those stored, not those displayed."""
    if orientation is not None:
        options["exif"] = exif(orientation)
    return encode(photograph(width, height, seed), "JPEG", **{"quality": 92, **options})


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """One chunk of a PNG, with its own or another checksum."""
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 0,
    rows: bytes = b"\0",
    extra: bytes = b"",
) -> bytes:
    """A PNG by hand: any size in the header, whatever the pixels are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def png_with_wrong_sum(kind: bytes = b"IDAT") -> bytes:
    """A sound PNG but for one checksum."""
    data = encode(photograph(40, 30), "PNG")
    at = data.index(kind)
    end = at + 4 + struct.unpack_from(">I", data, at - 4)[0]
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


def png_with_wrong_deflate(at: int = 60) -> bytes:
    """A PNG whose compressed pixels are damaged and whose checksums are right."""
    data = bytearray(encode(photograph(40, 30), "PNG"))
    start = data.index(b"IDAT")
    end = start + 4 + struct.unpack_from(">I", data, start - 4)[0]
    data[start + at] ^= 0xFF
    data[end : end + 4] = struct.pack(">I", zlib.crc32(data[start:end]))
    return bytes(data)


def gif_bomb() -> bytes:
    """A GIF whose header promises 4 gigapixels."""
    return encode(photograph(8, 8), "GIF").replace(
        struct.pack("<HH", 8, 8), struct.pack("<HH", 65535, 65535)
    )


def tiff(
    width: int, height: int, tags: dict[int, tuple[int, int]] | None = None, body: bytes = bytes(64)
) -> bytes:
    """An 8-bit grey TIFF by hand; further tags as {tag: (type, value)} replace or join its own."""
    entries: dict[int, tuple[int, int]] = {
        256: (4, width),
        257: (4, height),
        258: (3, 8),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, 1),
        278: (4, height),
        279: (4, len(body)),
        **(tags or {}),
    }
    directory = struct.pack("<H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        directory += struct.pack("<HHI", tag, kind, 1) + (
            struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)
        )
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + struct.pack("<I", 0)


def webp_bomb() -> bytes:
    """A WebP whose header promises 268 megapixels."""
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16383).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def ico_bomb() -> bytes:
    """An icon of 16×16 that holds a PNG of 30000×30000."""
    inner = png(30_000, 30_000)
    return (
        struct.pack("<HHH", 0, 1, 1)
        + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
        + inner
    )


def jpeg_patched(**fields: int) -> bytes:
    """A JPEG with another frame header: width, height, bits or marker (0xC0 is baseline, 0xC9
    arithmetic).
    """
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 1] = fields.get("marker", 0xC0)
    data[at + 4] = fields.get("bits", 8)
    struct.pack_into(">HH", data, at + 5, fields.get("height", 48), fields.get("width", 64))
    return bytes(data)


def animated_gif() -> bytes:
    """A GIF of three frames; the first is `photograph(50, 40)`."""
    frames = [photograph(50, 40, seed) for seed in range(3)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


HOSTILE: dict[str, Callable[[], tuple[bytes, str]]] = {
    "empty": lambda: (b"", "empty"),
    "text": lambda: (b"These are not the bytes you are looking for.\n" * 9, "not_an_image"),
    "zeros": lambda: (bytes(1000), "not_an_image"),
    "one-byte": lambda: (b"\xff", "not_an_image"),
    "html": lambda: (b"<!DOCTYPE html><title>404 Not Found</title>", "not_an_image"),
    "jpeg-cut": lambda: (half(jpeg(640, 480)), "truncated"),
    "jpeg-header-cut": lambda: (jpeg()[:40], "truncated"),
    "jpeg-magic-only": lambda: (b"\xff\xd8\xff", "truncated"),
    "jpeg-12-bit": lambda: (jpeg_patched(bits=12), "unsupported"),
    "jpeg-bomb": lambda: (jpeg_patched(width=65500, height=65500), "too_large"),
    "progressive-jpeg-cut": lambda: (half(jpeg(640, 480, progressive=True)), "truncated"),
    "png-cut": lambda: (half(encode(photograph(200, 100), "PNG")), "truncated"),
    "png-header-cut": lambda: (encode(photograph(20, 10), "PNG")[:20], "truncated"),
    "png-wrong-sum": lambda: (png_with_wrong_sum(), "corrupt"),
    "png-wrong-header-sum": lambda: (png_with_wrong_sum(b"IHDR"), "corrupt"),
    "png-bomb": lambda: (png(60_000, 60_000), "too_large"),
    "png-wrong-deflate": lambda: (png_with_wrong_deflate(), "corrupt"),
    "gif-cut": lambda: (half(encode(photograph(200, 100), "GIF")), "truncated"),
    "gif-bomb": lambda: (gif_bomb(), "too_large"),
    "tiff-cut": lambda: (half(encode(photograph(200, 100), "TIFF")), "truncated"),
    "tiff-bomb": lambda: (tiff(100_000, 100_000), "too_large"),
    "tiff-tile-bomb": lambda: (
        tiff(16, 16, {322: (4, 100_000), 323: (4, 100_000), 324: (4, 8), 325: (4, 64)}),
        "too_large",
    ),
    "webp-cut": lambda: (half(encode(photograph(200, 100), "WEBP")), "truncated"),
    "webp-bomb": lambda: (webp_bomb(), "too_large"),
    "ico-bomb": lambda: (ico_bomb(), "too_large"),
    "bmp-cut": lambda: (half(encode(photograph(200, 100), "BMP")), "truncated"),
    "heic": lambda: (
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64),
        "corrupt",
    ),
    "jpeg-xr": lambda: (b"II\xbc\x01" + bytes(64), "unsupported"),
    "pdf": lambda: (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "unsupported"),
    "eps": lambda: (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported"),
    "svg": lambda: (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "unsupported",
    ),
    "fits": lambda: (b"SIMPLE  =                    T".ljust(2880), "unsupported"),
}
"""Name → what makes (bytes, the status that must come of them under the default limits)."""
