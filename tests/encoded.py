"""One small encoded image or more of every format that is decoded, built in memory.

SAMPLES["PNG palette tRNS"]()     the bytes of a file; the first word is Pillow's name of the format
"""

from __future__ import annotations

import functools
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

import sample_images
from sample_images import chunk, encode, exif, photograph, png

W, H = 44, 36
"""Size of most samples: small, so that thousands of mutations are decoded in a minute, and not
square.
"""


def colour(seed: int = 1) -> Image.Image:
    return photograph(W, H, seed)


def alpha() -> Image.Image:
    image = colour().convert("RGBA")
    image.putalpha(photograph(W, H, 9).convert("L"))
    return image


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(colour().convert("L"), np.uint16) * 257 + 3)


def palette() -> Image.Image:
    return colour().convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


def metadata_png() -> bytes:
    """A PNG with many kinds of metadata before and after the pixels."""
    data = encode(colour(), "PNG", icc_profile=bytes(range(256)) * 4, exif=exif(6), dpi=(72, 72))
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"tEXt", b"Title\0a photograph")
    extra += chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words " * 50)) + chunk(
        b"iTXt", b"Author\0\0\0en\0\0nobody"
    )
    return data[:33] + extra + data[33:-12] + chunk(b"tEXt", b"Software\0none") + data[-12:]


def interlaced_png() -> bytes:
    """A grey PNG with Adam7 interlacing."""
    pixels = np.asarray(colour().convert("L"))
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = [
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in pixels[top::down, left::right]
    ]
    data = bytearray(png(W, H, rows=b"".join(rows)))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def psd(*, packed: bool, image: Image.Image | None = None) -> bytes:
    """A flat PSD file; `packed`: compressed by PackBits, literal runs only."""
    pixels = np.asarray(image or colour())
    height, width, channels = pixels.shape
    planes = [pixels[:, :, channel] for channel in range(channels)]
    if packed:
        rows = [
            b"".join(bytes([len(run) - 1]) + run for run in _cut(row.tobytes(), 100))
            for plane in planes
            for row in plane
        ]
        body = b"".join(struct.pack(">H", len(row)) for row in rows) + b"".join(rows)
    else:
        body = b"".join(plane.tobytes() for plane in planes)
    head = struct.pack(">4sH6sHIIHH", b"8BPS", 1, b"", channels, height, width, 8, 3)
    return head + struct.pack(">III", 0, 0, 0) + struct.pack(">H", packed) + body


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def dcx() -> bytes:
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + encode(colour(), "PCX")


def cur() -> bytes:
    """A cursor: an icon's bitmap under a cursor's header."""
    icon = bytearray(encode(photograph(32, 32), "ICO", sizes=[(32, 32)], bitmap_format="bmp"))
    icon[2] = 2
    return bytes(icon)


def icns(*, raw: bool) -> bytes:
    """An icon of macOS: 32 by 32 pixels as a PNG, or as raw channels and a mask."""
    image = photograph(32, 32, 2)
    parts = (
        [(b"il32", image.tobytes()), (b"l8mk", image.convert("L").tobytes())]
        if raw
        else [(b"icp5", encode(image, "PNG"))]
    )
    body = b"".join(kind + struct.pack(">I", 8 + len(data)) + data for kind, data in parts)
    return b"icns" + struct.pack(">I", 8 + len(body)) + body


def fli() -> bytes:
    """A FLI file of one frame, each line of which is one literal run or more."""
    brun = b"".join(bytes([1, 256 - len(row)]) + row for row in _cut(palette().tobytes(), W))
    subchunk = struct.pack("<IH", 6 + len(brun), 15) + brun
    frame = struct.pack("<IHH8s", 16 + len(subchunk), 0xF1FA, 1, b"") + subchunk
    head = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, W, H, 8, 0, 10)
    return head.ljust(128, b"\0") + frame


def ftex(*, packed: bool) -> bytes:
    pixels = colour().tobytes()
    body = encode(alpha(), "DDS", pixel_format="DXT1")[128:] if packed else pixels
    return (
        struct.pack("<4siiiiiii", b"FTEX", 0, W, H, 1, 1, 0 if packed else 1, 32)
        + struct.pack("<i", len(body))
        + body
    )


def gbr(image: Image.Image) -> bytes:
    depth = len(image.getbands())
    return (
        struct.pack(">IIIII4sI", 33, 2, *image.size, depth, b"GIMP", 10)
        + b"name\0"
        + image.tobytes()
    )


def pcd() -> bytes:
    """A Photo CD: only its base image of 768 by 512 pixels matters."""
    rng = np.random.default_rng(0)
    body = rng.integers(60, 190, 768 * 512 * 3 // 2, np.uint8).tobytes()
    return bytes(2048) + b"PCD_".ljust(2048 * 95, b"\0") + body


def pixar() -> bytes:
    head = bytearray(1024)
    head[:4] = b"\x80\xe8\0\0"
    struct.pack_into("<HH4xHH", head, 416, H, W, 14, 2)
    return bytes(head) + colour().tobytes()


def sun(*, packed: bool) -> bytes:
    rows = [row + b"\0" * (-len(row) % 2) for row in _cut(colour().tobytes("raw", "BGR"), 3 * W)]
    body = b"".join(rows)
    if packed:
        body = body.replace(b"\x80", b"\x80\0")
    return struct.pack(">8I", 0x59A66A95, W, H, 24, len(body), 2 if packed else 1, 0, 0) + body


def xpm() -> bytes:
    small = colour().convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    colours = np.asarray(small.getpalette()).reshape(-1, 3)[:32]
    lines = [
        f"{W} {H} 32 1",
        *(
            f"{chr(65 + at)} c #{red:02x}{green:02x}{blue:02x}"
            for at, (red, green, blue) in enumerate(colours)
        ),
    ]
    lines += ["".join(chr(65 + value) for value in row) for row in np.asarray(small)]
    text = ",\n".join(f'"{line}"' for line in lines)
    return f"/* XPM */\nstatic char *image[] = {{\n{text}\n}};\n".encode().replace(b'"\\"', b'"a"')


def xvthumb() -> bytes:
    return b"P7 332\n#IMGINFO:none\n#END_OF_COMMENTS\n%d %d 255\n" % (W, H) + palette().tobytes()


def bmp_rle8() -> bytes:
    """A BMP compressed by run lengths."""
    plain = bytearray(encode(palette(), "BMP"))
    start = struct.unpack_from("<I", plain, 10)[0]
    rows = _cut(palette().tobytes(), W)[::-1]
    body = (
        b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in rows) + b"\0\1"
    )
    struct.pack_into("<I", plain, 30, 1)
    struct.pack_into("<I", plain, 34, len(body))
    struct.pack_into("<I", plain, 2, start + len(body))
    return bytes(plain[:start]) + body


def plain_pnm(kind: int) -> bytes:
    image = colour().convert({1: "1", 2: "L", 3: "RGB"}[kind])
    values = np.asarray(image).astype(int).ravel()
    head = f"P{kind}\n{W} {H}\n" + ("" if kind == 1 else "255\n")
    return (
        head + "\n".join(str(1 - value if kind == 1 else value) for value in values) + "\n"
    ).encode()


def blp2() -> bytes:
    """A BLP2 texture with a palette, without alpha."""
    small = palette()
    colours = np.zeros((256, 4), np.uint8)
    used = np.asarray(small.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(used), :3] = used[:, ::-1]
    offset = 148 + 1024
    head = struct.pack("<4sIBBBBII", b"BLP2", 1, 1, 0, 0, 0, W, H)
    sizes = struct.pack("<16I", offset, *[0] * 15) + struct.pack("<16I", W * H, *[0] * 15)
    return head + sizes + colours.tobytes() + small.tobytes()


def _saved(make: Callable[[], Image.Image], name: str, **options: Any) -> Callable[[], bytes]:
    def build() -> bytes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow means to drop IM
            return encode(make(), name, **options)

    return functools.cache(build)


def _animated(name: str) -> bytes:
    frames = [colour(seed) for seed in range(3)]
    return encode(frames[0], name, save_all=True, append_images=frames[1:])


def _grey() -> Image.Image:
    return colour().convert("L")


def _bits() -> Image.Image:
    return colour().convert("1")


def _small() -> Image.Image:
    return photograph(32, 32, 2)


SAMPLES: dict[str, Callable[[], bytes]] = {
    "JPEG": _saved(colour, "JPEG", quality=90),
    "JPEG progressive": _saved(colour, "JPEG", quality=70, progressive=True),
    "JPEG grey": _saved(_grey, "JPEG"),
    "JPEG CMYK": _saved(lambda: colour().convert("CMYK"), "JPEG"),
    "JPEG turned": _saved(colour, "JPEG", exif=exif(6)),
    "JPEG restarts": _saved(colour, "JPEG", restart_marker_rows=1),
    "MPO": lambda: _animated("MPO"),
    "PNG": _saved(colour, "PNG"),
    "PNG grey": _saved(_grey, "PNG"),
    "PNG alpha": _saved(alpha, "PNG"),
    "PNG palette tRNS": _saved(palette, "PNG", transparency=bytes(range(64))),
    "PNG bits": _saved(_bits, "PNG"),
    "PNG grey 16": _saved(grey16, "PNG"),
    "PNG metadata": metadata_png,
    "PNG interlaced": interlaced_png,
    "PNG animated": lambda: _animated("PNG"),
    "GIF": _saved(palette, "GIF"),
    "GIF transparent": _saved(palette, "GIF", transparency=3),
    "GIF animated": lambda: _animated("GIF"),
    "BMP": _saved(colour, "BMP"),
    "BMP palette": _saved(palette, "BMP"),
    "BMP bits": _saved(_bits, "BMP"),
    "BMP RLE": bmp_rle8,
    "DIB": _saved(colour, "DIB"),
    "PPM": _saved(colour, "PPM"),
    "PPM grey": _saved(_grey, "PPM"),
    "PPM grey 16": _saved(grey16, "PPM"),
    "PPM bits": _saved(_bits, "PPM"),
    "PPM plain": lambda: plain_pnm(3),
    "PPM plain grey": lambda: plain_pnm(2),
    "PPM plain bits": lambda: plain_pnm(1),
    "PPM float": _saved(lambda: colour().convert("F"), "PPM"),
    "WEBP": _saved(colour, "WEBP", quality=80),
    "WEBP lossless": _saved(alpha, "WEBP", lossless=True),
    "WEBP alpha": _saved(alpha, "WEBP", quality=80, exif=exif(3)),
    "WEBP animated": lambda: _animated("WEBP"),
    "TIFF": _saved(colour, "TIFF"),
    "TIFF LZW": _saved(colour, "TIFF", compression="tiff_lzw"),
    "TIFF deflate": _saved(colour, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF packbits": _saved(colour, "TIFF", compression="packbits"),
    "TIFF JPEG": _saved(colour, "TIFF", compression="jpeg"),
    "TIFF fax": _saved(_bits, "TIFF", compression="group4"),
    "AVIF": _saved(colour, "AVIF", quality=80),
    "AVIF alpha": _saved(alpha, "AVIF", quality=80),
    "JPEG2000": _saved(colour, "JPEG2000"),
    "JPEG2000 stream": _saved(_grey, "JPEG2000", no_jp2=True),
    "PSD": lambda: psd(packed=False),
    "PSD packed": lambda: psd(packed=True),
    "PSD alpha": lambda: psd(packed=True, image=alpha()),
    "ICO": _saved(_small, "ICO", sizes=[(32, 32)]),
    "ICO bitmap": _saved(_small, "ICO", sizes=[(32, 32)], bitmap_format="bmp"),
    "ICNS": lambda: icns(raw=False),
    "ICNS raw": lambda: icns(raw=True),
    "CUR": cur,
    "DDS": _saved(colour, "DDS"),
    "DDS alpha": _saved(alpha, "DDS"),
    "DDS DXT1": _saved(alpha, "DDS", pixel_format="DXT1"),
    "DDS DXT5": _saved(alpha, "DDS", pixel_format="DXT5"),
    "QOI": _saved(colour, "QOI"),
    "QOI alpha": _saved(alpha, "QOI"),
    "BLP": _saved(palette, "BLP", blp_version="BLP1"),
    "BLP 2": blp2,
    "DCX": dcx,
    "FLI": fli,
    "FTEX": lambda: ftex(packed=False),
    "FTEX DXT1": lambda: ftex(packed=True),
    "GBR": lambda: gbr(_grey()),
    "GBR alpha": lambda: gbr(alpha()),
    "IM": _saved(colour, "IM"),
    "MSP": _saved(_bits, "MSP"),
    "PCD": functools.cache(pcd),
    "PCX": _saved(colour, "PCX"),
    "PCX palette": _saved(palette, "PCX"),
    "PIXAR": pixar,
    "SGI": _saved(colour, "SGI"),
    "SGI packed": lambda: sgi_packed(),
    "SUN": lambda: sun(packed=False),
    "SUN packed": lambda: sun(packed=True),
    "XBM": _saved(_bits, "XBM"),
    "XPM": xpm,
    "XVTHUMB": xvthumb,
    "SPIDER": _saved(lambda: colour().convert("F"), "SPIDER"),
    "TGA": _saved(colour, "TGA"),
    "TGA packed": _saved(alpha, "TGA", compression="tga_rle"),
    "TGA palette": _saved(palette, "TGA"),
}


def sgi_packed() -> bytes:
    """An SGI file compressed by run lengths, literal runs only."""
    pixels = np.asarray(colour())
    rows = [
        b"".join(bytes([0x80 | len(run)]) + run for run in _cut(row.tobytes(), 100)) + b"\0"
        for row in _planes(pixels)
    ]
    offset, starts = 512 + 8 * len(rows), []
    for row in rows:
        starts.append(offset)
        offset += len(row)
    head = struct.pack(">HBBHHHH", 474, 1, 1, 3, W, H, 3).ljust(512, b"\0")
    return (
        head
        + struct.pack(f">{len(rows)}I", *starts)
        + struct.pack(f">{len(rows)}I", *map(len, rows))
        + b"".join(rows)
    )


def _planes(pixels: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(row) for channel in range(3) for row in pixels[::-1, :, channel]]


# Headers that promise 400 megapixels

_SIDE = 20_000


def _patched(name: str, **fields: tuple[str, int]) -> bytes:
    """A sample with another width and height in its header, each given as a `struct` format and an
    offset.
    """
    data = bytearray(SAMPLES[name]())
    for form, at in fields.values():
        struct.pack_into(form, data, at, _SIDE)
    return bytes(data)


def _replaced(name: str, old: bytes, new: bytes) -> bytes:
    data = SAMPLES[name]()
    assert data.count(old) >= 1
    return data.replace(old, new)


def inner_png_icns() -> bytes:
    inner = png(_SIDE, _SIDE)
    return (
        b"icns"
        + struct.pack(">I", 16 + len(inner))
        + b"icp5"
        + struct.pack(">I", 8 + len(inner))
        + inner
    )


def inner_jpeg2000_icns() -> bytes:
    inner = jpeg2000_bomb()
    return (
        b"icns"
        + struct.pack(">I", 16 + len(inner))
        + b"ic08"
        + struct.pack(">I", 8 + len(inner))
        + inner
    )


def jpeg2000_bomb() -> bytes:
    data = bytearray(SAMPLES["JPEG2000 stream"]())
    struct.pack_into(">II", data, 8, _SIDE, _SIDE)
    struct.pack_into(">II", data, 24, _SIDE, _SIDE)
    return bytes(data)


def frame_gif() -> bytes:
    """A GIF whose screen is small and whose first frame is not."""
    data = bytearray(SAMPLES["GIF"]())
    at = data.index(b",\0\0\0\0" + struct.pack("<HH", W, H))
    struct.pack_into("<HH", data, at + 5, _SIDE, _SIDE)
    return bytes(data)


def apng_bomb() -> bytes:
    frame = struct.pack(">IIIIIHHBB", 0, _SIDE, _SIDE, 0, 0, 1, 1, 0, 0)
    return png(
        _SIDE,
        _SIDE,
        rows=bytes(_SIDE * 2),
        extra=chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(b"fcTL", frame),
    )


def msp_bomb() -> bytes:
    data = bytearray(_patched("MSP", width=("<H", 4), height=("<H", 6)))
    struct.pack_into(
        "<H", data, 24, struct.unpack_from("<H", data, 24)[0] ^ W ^ H
    )  # the XOR of the header's words is 0
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png(_SIDE, _SIDE),
    "PNG 16-bit colour": lambda: png(_SIDE, _SIDE, depth=16, colour=6),
    "APNG": apng_bomb,
    "GIF": lambda: _patched("GIF", width=("<H", 6), height=("<H", 8)),
    "GIF frame": frame_gif,
    "BMP": lambda: _patched("BMP", width=("<i", 18), height=("<i", 22)),
    "BMP RLE": lambda: _patched("BMP RLE", width=("<i", 18), height=("<i", 22)),
    "DIB": lambda: _patched("DIB", width=("<i", 4), height=("<i", 8)),
    "PPM": lambda: _replaced("PPM", b"44 36", b"20000 20000"),
    "PPM plain": lambda: _replaced("PPM plain", b"44 36", b"20000 20000"),
    "PFM": lambda: _replaced("PPM float", b"44 36", b"20000 20000"),
    "WEBP": sample_images.webp_bomb,
    "JXL": lambda: (  # width and height of 20,000, each 0, 2 (of 2 bits), then 18 bits
        b"\xff\x0a" + (2 << 1 | 19_999 << 3 | 2 << 24 | 19_999 << 26).to_bytes(12, "little")
    ),
    "AVIF": lambda: _replaced(
        "AVIF",
        b"ispe" + struct.pack(">III", 0, W, H),
        b"ispe" + struct.pack(">III", 0, _SIDE, _SIDE),
    ),
    "JPEG": lambda: sample_images.jpeg_patched(width=_SIDE, height=_SIDE),
    "JPEG CMYK": lambda: _replaced(
        "JPEG CMYK", b"\x08" + struct.pack(">HH", H, W), b"\x08" + struct.pack(">HH", _SIDE, _SIDE)
    ),
    "JPEG2000": lambda: _replaced(
        "JPEG2000", b"ihdr" + struct.pack(">II", H, W), b"ihdr" + struct.pack(">II", _SIDE, _SIDE)
    ),
    "JPEG2000 stream": jpeg2000_bomb,
    "TIFF": lambda: sample_images.tiff(_SIDE, _SIDE),
    "PSD": lambda: _patched("PSD", height=(">I", 14), width=(">I", 18)),
    "ICO": sample_images.ico_bomb,
    "ICO bitmap": lambda: _patched("ICO bitmap", width=("<i", 26), height=("<i", 30)),
    "ICNS": inner_png_icns,
    "ICNS JPEG2000": inner_jpeg2000_icns,
    "CUR": lambda: _patched("CUR", width=("<i", 26), height=("<i", 30)),
    "DDS": lambda: _patched("DDS", height=("<I", 12), width=("<I", 16)),
    "DDS DXT1": lambda: _patched("DDS DXT1", height=("<I", 12), width=("<I", 16)),
    "QOI": lambda: _patched("QOI", width=(">I", 4), height=(">I", 8)),
    "BLP": lambda: _patched("BLP", width=("<I", 12), height=("<I", 16)),
    "BLP 2": lambda: _patched("BLP 2", width=("<I", 12), height=("<I", 16)),
    "DCX": lambda: _patched("DCX", width=("<H", 20), height=("<H", 22)),
    "PCX": lambda: _patched("PCX", width=("<H", 8), height=("<H", 10)),
    "FLI": lambda: _patched("FLI", width=("<H", 8), height=("<H", 10)),
    "FTEX": lambda: _patched("FTEX", width=("<i", 8), height=("<i", 12)),
    "GBR": lambda: _patched("GBR", width=(">I", 8), height=(">I", 12)),
    "IM": lambda: _replaced("IM", b"44*36", b"20000*20000"),
    "MSP": msp_bomb,
    "PIXAR": lambda: _patched("PIXAR", height=("<H", 416), width=("<H", 418)),
    "SGI": lambda: _patched("SGI", width=(">H", 6), height=(">H", 8)),
    "SUN": lambda: _patched("SUN", width=(">I", 4), height=(">I", 8)),
    "XBM": (
        lambda: _replaced("XBM", b"im_width 44", b"im_width 20000").replace(
            b"im_height 36", b"im_height 20000"
        )
    ),
    "XPM": lambda: _replaced("XPM", b'"44 36', b'"20000 20000'),
    "XVTHUMB": lambda: _replaced("XVTHUMB", b"\n44 36", b"\n20000 20000"),
    "SPIDER": lambda: _patched("SPIDER", height=("<f", 4), width=("<f", 44)),
    "TGA": lambda: _patched("TGA", width=("<H", 12), height=("<H", 14)),
    "TGA packed": lambda: _patched("TGA packed", width=("<H", 12), height=("<H", 14)),
}
"""Name → a small file whose header promises more pixels than the budget."""
