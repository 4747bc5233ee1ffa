"""What decoding promises: any bytes become pixels or a reason, the same ones everywhere, and close
to Pillow's.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image, ImageFile, ImageOps

import encoded
import mutations
import sample_images
from imagemill.pipeline.decoding import decode as decode_module
from imagemill.pipeline.decoding import formats, pillow, png, preprocess, tiff
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Decoded, Interpolation, Limits, Recipe, Status
from reference import reference_pixels

RECIPE, LIMITS = Recipe(), Limits()
SMALL = Recipe(32, 32, 36)


def ok(data: bytes, recipe: Recipe = RECIPE) -> np.ndarray:
    decoded = decode(data, recipe, LIMITS)
    assert decoded.status is Status.OK, decoded.error
    assert decoded.error is None
    assert decoded.pixels is not None
    assert decoded.pixels.shape == (recipe.height, recipe.width, 3)
    assert decoded.pixels.dtype == np.uint8
    return decoded.pixels


def sound(decoded: Decoded) -> None:
    """What holds of every answer."""
    assert (
        (decoded.pixels is None) == (decoded.status is not Status.OK) == (decoded.error is not None)
    )
    assert decoded.error is None or (
        decoded.error and "\n" not in decoded.error and " at 0x" not in decoded.error
    )


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("name", sample_images.HOSTILE)
def test_bad_image_has_its_status(name: str) -> None:
    """A bad image is reported with its kind, in one line, without raising or warning."""
    data, status = sample_images.HOSTILE[name]()
    decoded = decode(data, RECIPE, LIMITS)
    sound(decoded)
    assert decoded.status == status, decoded.error
    assert decoded == decode(data, RECIPE, LIMITS), "the same words each time"


@pytest.mark.parametrize(
    "name", ["jpeg-cut", "png-cut", "webp-cut", "tiff-cut", "jpeg-bomb", "png-bomb", "webp-bomb"]
)
def test_size_is_known_from_the_header(name: str) -> None:
    """Width and height are known as soon as the header can be read, even if the rest cannot."""
    decoded = decode(sample_images.HOSTILE[name]()[0], RECIPE, LIMITS)
    assert decoded.pixels is None
    assert decoded.width
    assert decoded.height


FORMATS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {},
    "AVIF": {"quality": 100},
    "ICO": {"sizes": [(100, 80)]},
    "DDS": {},
    "QOI": {},
    "PCX": {},
    "SGI": {},
    "TGA": {},
    "IM": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_decoded(name: str) -> None:
    """Every raster format that Pillow writes is read, and its pixels are the image's."""
    if name not in Image.SAVE:
        Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {name}")
    image = sample_images.photograph(100, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow means to drop IM
        data = sample_images.encode(image, name, **FORMATS[name])
        reference = reference_pixels(Image.open(io.BytesIO(data)), RECIPE)
    assert apart(ok(data), reference) <= 2
    decoded = decode(data, RECIPE, LIMITS)
    assert (decoded.width, decoded.height) == (100, 80)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_mode_becomes_rgb_as_pillow_converts(mode: str) -> None:
    """Grey, palette, alpha, CMYK and 1-bit become RGB as `convert("RGB")` makes them; alpha is
    dropped.
    """
    image = sample_images.photograph(300, 270).convert(mode)
    data = sample_images.encode(image, "JPEG" if mode == "CMYK" else "PNG")
    assert apart(ok(data), reference_pixels(Image.open(io.BytesIO(data)), RECIPE)) <= 1


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_palette_is_quiet(transparency: int | bytes) -> None:
    """A palette with transparency is decoded as without, and Pillow's warning about it does not get
    out.
    """
    image = sample_images.photograph(60, 60).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(
        ok(sample_images.encode(image, "PNG", transparency=transparency)),
        ok(sample_images.encode(image, "PNG")),
    )


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    """16-bit grey keeps its high byte; Pillow's own conversion used to clip at 255."""
    grey = np.linspace(0, 65535, 300 * 300).astype(np.uint16).reshape(300, 300)
    expected = np.repeat((grey >> 8).astype(np.uint8)[38:262, 38:262, None], 3, axis=2)
    for name in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(
            ok(sample_images.encode(Image.fromarray(grey), name), Recipe(resize=None)), expected
        ), name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5], [1.0, 0.25]], np.float32), [[0, 128], [255, 64]]),
        (np.array([[0.0, 200.0], [100.0, 7.0]], np.float32), [[0, 200], [100, 7]]),
        (np.array([[-1.0, 1.0], [0.0, np.nan]], np.float32), [[0, 255], [128, 0]]),
        (
            np.array([[0, 0x7F800001], [0x42C80000, 0]], np.uint32).view(np.float32),
            [[0, 0], [100, 0]],
        ),
        (np.array([[5.5e9, 5.5e9], [5.5e9, np.inf]], np.float32), [[0, 0], [0, 255]]),
        (np.array([[0, 255], [7, 8]], np.int32), [[0, 255], [7, 8]]),
        (np.array([[0, 65535], [256, 300]], np.int32), [[0, 255], [1, 1]]),
        (np.array([[-100, 410], [0, 200]], np.int32), [[0, 255], [50, 150]]),
    ],
)
def test_32_bit_values_are_scaled(values: np.ndarray, expected: list[list[int]]) -> None:
    """Floats and 32-bit integers are taken as 0 to 1, 8-bit or 16-bit where they fit, and stretched
    where not.
    """
    pixels = ok(sample_images.encode(Image.fromarray(values), "TIFF"), Recipe(2, 2, None))
    assert pixels[:, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *itertools.product(("JPEG", "PNG", "WEBP", "TIFF"), ((320, 240), (241, 320))),
        ("JPEG", (1100, 1300)),  # scaled in the DCT
    ],
)
def test_exif_orientation_is_applied(name: str, orientation: int, size: tuple[int, int]) -> None:
    """An image that is to be turned gives what the turned image gives, and the size as
    displayed.
    """
    options = {"quality": 95} if name in {"JPEG", "WEBP"} else {}
    data = sample_images.encode(
        sample_images.photograph(*size), name, exif=sample_images.exif(orientation), **options
    )
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode(data, RECIPE, LIMITS)
    assert decoded.pixels is not None
    assert (decoded.width, decoded.height) == turned.size
    scaled = name == "JPEG" and min(size) >= 1024
    assert np.abs(decoded.pixels.astype(int) - reference_pixels(turned, RECIPE)).mean() < (
        3 if scaled else 0.3
    )


def test_exif_orientation_can_be_left_alone() -> None:
    """Where the recipe does not turn, the orientation changes nothing."""
    turned, plain = sample_images.jpeg(90, 60, orientation=6), sample_images.jpeg(90, 60)
    recipe = Recipe(exif=False)
    assert np.array_equal(ok(turned, recipe), ok(plain, recipe))
    assert decode(turned, recipe, LIMITS).width == 90


@given(
    block=st.binary(max_size=120)
    | st.binary(max_size=90).map(lambda tail: b"Exif\0\0II*\0\x08\0\0\0" + tail)
)
@settings(max_examples=200, deadline=None)
def test_broken_exif_costs_nothing(block: bytes) -> None:
    """Whatever is in the EXIF block, the image is decoded, turned as Pillow would turn it."""
    data = sample_images.jpeg(20, 14)
    segment = b"Exif\0\0" + block.removeprefix(b"Exif\0\0")
    data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    decoded = decode(data, SMALL, LIMITS)
    assert decoded.status is Status.OK
    image = Image.open(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pillow.orientation_of(image)
    assert (decoded.width, decoded.height) == ((14, 20) if expected >= 5 else (20, 14))


CASES = Path(__file__).with_name("cases")


def test_damaged_png_pixels_are_never_ok() -> None:
    """A PNG whose compressed pixels are damaged under right checksums has Pillow's verdict: no
    image with black rows is ok.
    """
    judged = Counter()
    for at in range(2, 1500, 13):
        data = sample_images.png_with_wrong_deflate(at)
        decoded, difference = mutations.compare(data)
        assert difference is None, at
        judged[decoded.status] += 1
    assert judged[Status.CORRUPT] > 80, judged
    decoded = decode((CASES / "png_broken_deflate_crc_ok.png").read_bytes(), RECIPE, LIMITS)
    assert (decoded.status, decoded.error) == (
        Status.CORRUPT,
        "broken data stream when reading image file",
    )


@pytest.mark.process
def test_mutated_images_are_judged_as_pillow_judges_them() -> None:
    """Of mutated files of all formats, none is ok that Pillow refuses, none is refused that it
    reads, and the pixels are the same.
    """
    found = [(name, mutations.compare(data)[1]) for name, data in mutations.cases(600, 7)]
    assert [
        case for case in found if case[1] is not None and case[1] not in mutations.EXCEPTIONS
    ] == []


def test_mutations_cover_every_format() -> None:
    """A sample of each format that is decoded is there, whole, and read by that format's plugin."""
    read = {mutations.reference(make()).format for make in encoded.SAMPLES.values()}
    assert {str(name).upper() for name in read} - {"MPO"} == set(formats.FORMATS)


def test_the_size_is_checked_before_the_pixels_are_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No format is decoded before its size is checked, nor a second time, which would be silent
    after an error.
    """
    events: list[str] = []
    load, check = ImageFile.ImageFile.load, pillow.check_budget

    def noted_load(image: ImageFile.ImageFile) -> object:
        if image.tile:
            events.append("load")
        return load(image)

    def noted_check(width: int, height: int, limits: Limits) -> None:
        events.append("check")
        check(width, height, limits)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted_load)
    monkeypatch.setattr(pillow, "check_budget", noted_check)
    monkeypatch.setattr(tiff, "check_budget", noted_check)
    for name, make in encoded.SAMPLES.items():
        events.clear()
        decode(make(), SMALL, LIMITS)
        assert events.count("load") <= 1, name
        # simplejpeg decodes JPEGs; Pillow decodes icons as it opens them, within its own limit
        assert name.split()[0] in {"JPEG", "MPO", "ICO"} or events[0] == "check", name


def test_settings_of_others_do_not_hide_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that tells Pillow to load truncated images does not change what imagemill
    answers.
    """
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("PNG", "GIF", "BMP", "TGA"):
        data = encoded.SAMPLES[name]()
        assert decode(data[: len(data) * 2 // 3], SMALL, LIMITS).status is Status.TRUNCATED, name


def test_the_reason_of_a_plugin_is_reported() -> None:
    """A file that its plugin recognises and refuses has the plugin's reason; no later plugin
    guesses at it.
    """
    data = bytearray(encoded.SAMPLES["BMP"]())
    data[14] = 7
    decoded = decode(bytes(data), SMALL, LIMITS)
    assert decoded.status is Status.UNSUPPORTED
    assert str(decoded.error).endswith("Unsupported BMP header type (7)")
    data = bytearray(encoded.SAMPLES["PCD"]())
    data[:3] = b"\0\0\2"  # a cursor's
    data[4] = 1
    with pytest.raises(OSError, match="Unsupported BMP header type"):
        Image.open(io.BytesIO(data))
    assert decode(bytes(data), SMALL, LIMITS).status is Status.UNSUPPORTED


def test_a_damaged_icon_is_recognised() -> None:
    """An icon that is cut short is truncated, not a file of no known format."""
    data = encoded.SAMPLES["ICO"]()
    assert decode(data[: len(data) // 2], SMALL, LIMITS).status is Status.TRUNCATED


def test_a_pcx_without_its_palette_is_truncated() -> None:
    """A PCX that is cut within the palette at its end is not shown in grey; one that declares
    itself grey is.
    """
    data = encoded.SAMPLES["PCX palette"]()
    decoded = decode(data[:-100], SMALL, LIMITS)
    assert (decoded.status, decoded.error) == (
        Status.TRUNCATED,
        "truncated PCX file: it ends before its palette of 256 colours",
    )
    grey = bytearray(data[:-769])
    grey[68] = 2
    ok(bytes(grey), SMALL)


_DECODE_BOMBS = """
import resource, sys
from pathlib import Path
from typing import Any
import encoded
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Limits, Recipe

def peak_mebibytes():
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
    # ru_maxrss would begin with the memory of the process that started this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10

for make in encoded.SAMPLES.values():  # all plugins are loaded, and every decoder has run
    decode(make(), Recipe(), Limits())
bombs = {name: make() for name, make in encoded.BOMBS.items()}
bombs["a real PNG"] = Path(sys.argv[1]).read_bytes()
before = peak_mebibytes()
for name, data in bombs.items():
    decoded = decode(data, Recipe(), Limits())
    print(name, decoded.status, peak_mebibytes() - before, sep="\t")
"""


@pytest.mark.process
def test_bombs_are_refused_undecoded() -> None:
    """Of every format, an image beyond the pixel budget is `too_large` at the cost of reading its
    header: memory stays as it was.
    """
    path = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    ran = subprocess.run(
        [sys.executable, "-c", _DECODE_BOMBS, str(CASES / "png_625Mpx_bomb.png")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    reported = [line.split("\t") for line in ran.stdout.splitlines()]
    assert {name: status for name, status, _ in reported if status != "too_large"} == {}
    assert {name: mebibytes for name, _, mebibytes in reported if int(mebibytes) > 32} == {}
    assert len(reported) == len(encoded.BOMBS) + 1


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        ((15_000, 15_000), Limits()),
        ((20_000, 20_000), Limits()),
        ((40_000, 3), Limits(max_pixels=9)),
    ],
)
def test_avif_beyond_its_decoder_is_not_corrupt(size: tuple[int, int], limit: Limits) -> None:
    """An AVIF larger than its decoder allows is `too_large`, or `unsupported` if the budget allows
    it.
    """
    old, new = (b"ispe" + struct.pack(">III", 0, *side) for side in ((encoded.W, encoded.H), size))
    data = encoded.SAMPLES["AVIF"]().replace(old, new)
    decoded = decode(data, SMALL, limit)
    assert (decoded.status, decoded.width, decoded.height) == (Status.TOO_LARGE, *size)
    if size != (15_000, 15_000):
        decoded = decode(data, SMALL, Limits(max_pixels=10**9))
        assert decoded.status is Status.UNSUPPORTED
        assert (
            decoded.error
            == f"{size[0]}×{size[1]}: the AVIF decoder reads at most 32768 a side and 2^28 pixels"
        )


# PNG metadata


def with_chunks(*extra: bytes, after: bool = False) -> bytes:
    """A PNG with further chunks, before or after the pixels."""
    data = sample_images.encode(sample_images.photograph(50, 40), "PNG")
    at = data.index(b"IEND") - 4 if after else 33
    return data[:at] + b"".join(extra) + data[at:]


_NOISE = random.Random(0).randbytes(1_300_000)
_WORDS = b"many words " * 200_000
METADATA: dict[str, tuple[bytes, Callable[[], bytes]]] = {
    "a large colour profile": (b"iCCP", lambda: b"icc\0\0" + zlib.compress(_NOISE, 1)),
    "a profile that inflates to 64 MiB": (
        b"iCCP",
        lambda: b"icc\0\0" + zlib.compress(bytes(64 << 20)),
    ),
    "a profile of another compression": (b"iCCP", lambda: b"icc\0\7" + b"profile"),
    "a large text": (b"zTXt", lambda: b"Comment\0\0" + zlib.compress(_WORDS)),
    "a text that inflates to 64 MiB": (
        b"zTXt",
        lambda: b"Comment\0\0" + zlib.compress(bytes(64 << 20)),
    ),
    "a large international text": (b"iTXt", lambda: b"Comment\0\1\0en\0\0" + zlib.compress(_WORDS)),
    "plain text of 70 MB": (b"tEXt", lambda: b"Comment\0" + bytes(70_000_000)),
    "large EXIF": (b"eXIf", lambda: _NOISE),
    "a short gamma": (b"gAMA", lambda: b"\0"),
    "an unknown kind": (b"prVt", lambda: _NOISE),
}


@pytest.mark.parametrize("name", METADATA)
def test_png_metadata_costs_nothing(name: str) -> None:
    """A PNG is ok whatever its metadata is, large or compressed to a bomb, before or after the
    pixels.
    """
    kind, make = METADATA[name]
    metadata, plain = sample_images.chunk(kind, make()), ok(with_chunks())
    assert np.array_equal(ok(with_chunks(metadata)), plain)
    assert np.array_equal(ok(with_chunks(metadata, after=True)), plain)


@pytest.mark.parametrize(
    "kind", "iCCP tEXt zTXt iTXt eXIf gAMA cHRM sRGB pHYs tIME tRNS bKGD acTL fcTL prVt".split()
)
def test_a_wrong_checksum_of_metadata_costs_nothing(kind: str) -> None:
    """A PNG is ok if a chunk that it can do without has a wrong checksum."""
    metadata = sample_images.chunk(kind.encode(), b"data\0\0 of metadata", 12345)
    for after in (False, True):
        assert np.array_equal(ok(with_chunks(metadata, after=after)), ok(with_chunks()))


def test_a_large_profile_of_a_real_png_is_read() -> None:
    """A PNG with a colour profile of 1.2 MB, as scanners write it, is ok."""
    ok((CASES / "png_icc_1200kB.png").read_bytes())


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_wrong_checksum_of_what_makes_the_pixels_is_corrupt(kind: bytes) -> None:
    """Header, palette and pixels with a wrong checksum are refused."""
    data = bytearray(sample_images.encode(sample_images.photograph(50, 40).convert("P"), "PNG"))
    at = data.index(kind)
    data[at + 4 + struct.unpack_from(">I", data, at - 4)[0]] ^= 1
    assert decode(bytes(data), RECIPE, LIMITS).status is Status.CORRUPT


def test_a_png_without_metadata_is_not_copied() -> None:
    """What Pillow reads is the very object that was given, if there is nothing to drop."""
    for data in (with_chunks(), encoded.SAMPLES["PNG palette tRNS"]()):
        assert png.strip(data, want_orientation=True)[0] is data


def raw(channels: int, lines: int = 5) -> bytes:
    """Lines of 7 pixels, each with another filter of PNG."""
    values = np.random.default_rng(0).integers(0, 256, (lines, 7 * channels), np.uint8)
    return b"".join(bytes([number % 5]) + line.tobytes() for number, line in enumerate(values))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("background", [None, "#ff0000"])
def test_a_small_png_has_the_pixels_of_pillows_reader(
    colour: int, channels: int, background: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sample_images.png(7, 5, colour=colour, rows=raw(channels))
    assert png.read_small(data, 35) is not None
    recipe = replace(RECIPE, background=background)
    small = decode(data, recipe, LIMITS)
    monkeypatch.setattr(png, "_SMALL", 0)
    assert png.read_small(data, 35) is None
    read = decode(data, recipe, LIMITS)
    assert small.pixels is not None
    np.testing.assert_array_equal(small.pixels, read.pixels)
    assert (small.status, small.width, small.height) == (read.status, 7, 5)


def with_header_byte(at: int) -> bytes:
    """A small PNG with a 1 in one byte of its header, and the right checksum."""
    header = _SMALL_PNG[12:at] + b"\1" + _SMALL_PNG[at + 1 : 29]
    return _SMALL_PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + _SMALL_PNG[33:]


_SMALL_PNG = sample_images.png(7, 5, colour=2, rows=raw(3))
LEFT_TO_PILLOW = {
    "16 bits": sample_images.png(7, 5, depth=16, colour=2, rows=raw(6)),
    "4 bits": sample_images.png(14, 5, depth=4, rows=raw(1)),
    "a palette": sample_images.png(
        7, 5, colour=3, rows=raw(1), extra=sample_images.chunk(b"PLTE", bytes(768))
    ),
    "a transparent colour": sample_images.png(
        7, 5, colour=2, rows=raw(3), extra=sample_images.chunk(b"tRNS", bytes(6))
    ),
    "too many pixels": sample_images.png(7, 6, colour=2, rows=raw(3, 6)),
    "no pixels": sample_images.png(0, 5, colour=2, rows=raw(3)),
    "cut pixels": _SMALL_PNG[:-30],
    "something after the end": _SMALL_PNG + b"\0",
    "no end": _SMALL_PNG[:-12],
    "interlacing": with_header_byte(28),
    "an unknown filter": with_header_byte(27),
    "an unknown compression": with_header_byte(26),
    "a wrong checksum of the header": _SMALL_PNG[:32]
    + bytes([_SMALL_PNG[32] ^ 1])
    + _SMALL_PNG[33:],
    "broken pixels": sample_images.png_with_wrong_deflate(),
}


@pytest.mark.parametrize("name", LEFT_TO_PILLOW)
def test_every_other_png_is_left_to_pillows_reader(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has its verdict."""
    data = LEFT_TO_PILLOW[name]
    assert png.read_small(data, 1200 if name == "broken pixels" else 35) is None
    found = decode(data, RECIPE, LIMITS)
    monkeypatch.setattr(png, "read_small", lambda *_: None)
    expected = decode(data, RECIPE, LIMITS)
    assert replace(found, pixels=None) == replace(expected, pixels=None)
    np.testing.assert_array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("after", [False, True])
def test_a_png_that_ends_within_its_metadata_is_truncated(after: bool) -> None:
    """A file that ends within a chunk is cut short, even if its pixels are whole."""
    data = with_chunks(sample_images.chunk(b"tEXt", b"Comment\0 and words"), after=after)
    decoded = decode(data[: data.index(b"words")], RECIPE, LIMITS)
    assert (decoded.status, decoded.width, decoded.height) == (
        Status.TRUNCATED,
        50 if after else None,
        40 if after else None,
    )


_XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/>' + b" " * 1_200_000 + b"</x:xmpmeta>"
_EXIF6 = sample_images.exif(6).removeprefix(b"Exif\0\0")
_RAW = b"\nexif\n%8d\n" % len(sample_images.exif(6)) + sample_images.exif(6).hex().encode() + b"\n"
ORIENTATIONS = {
    "EXIF": sample_images.chunk(b"eXIf", _EXIF6),
    "EXIF with a prefix": sample_images.chunk(b"eXIf", sample_images.exif(6)),
    "XMP": sample_images.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP),
    "compressed XMP": sample_images.chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(_XMP)
    ),
    "EXIF of ImageMagick": sample_images.chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_RAW)
    ),
    "plain EXIF of ImageMagick": sample_images.chunk(b"tEXt", b"Raw profile type exif\0" + _RAW),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_png_orientation_is_found(name: str, after: bool) -> None:
    """The orientation of a PNG is read from EXIF, XMP or ImageMagick's text, of any size, before or
    after the pixels.
    """
    data = with_chunks(ORIENTATIONS[name], after=after)
    decoded = decode(data, RECIPE, LIMITS)
    assert (decoded.status, decoded.width, decoded.height) == (Status.OK, 40, 50)
    turned = sample_images.encode(
        sample_images.photograph(50, 40).transpose(Image.Transpose.ROTATE_270), "PNG"
    )
    assert np.array_equal(ok(data), ok(turned))
    assert decode(data, Recipe(exif=False), LIMITS).width == 50


@pytest.mark.parametrize(
    "broken",
    [
        sample_images.chunk(b"eXIf", _EXIF6, 99),
        sample_images.chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        sample_images.chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 2\nzz\n"),
        sample_images.chunk(b"zTXt", b"Raw profile type exif\0\0not deflate"),
        sample_images.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1"),
    ],
)
def test_a_broken_png_orientation_turns_nothing(broken: bytes) -> None:
    """Metadata that is damaged says nothing about the orientation."""
    assert decode(with_chunks(broken), RECIPE, LIMITS).width == 50


# Transparency

RED = "#ff0000"


def on_red(data: bytes) -> np.ndarray:
    """The image at its own size, blended onto red."""
    size = max(Image.open(io.BytesIO(data)).size)
    return ok(data, Recipe(size, size, None, background=RED))


def squared(pixels: np.ndarray) -> np.ndarray:
    """Pad to a square with black, as a recipe without resizing does."""
    side = max(pixels.shape[:2])
    lacking = [side - length for length in pixels.shape[:2]]
    return np.pad(pixels, [(gap // 2, (gap + 1) // 2) for gap in lacking] + [(0, 0)])


def blended(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The textbook's formula, in floating point."""
    share = alpha.astype(float)[:, :, None] / 255
    return np.rint(rgb * share + np.array([255.0, 0, 0]) * (1 - share))


def transparent() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An RGBA image whose alpha takes all values, with its colours and its alpha."""
    rgb = sample_images.photograph(32, 32, 5)
    alpha = np.arange(1024, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    image = rgb.convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    return image, np.asarray(rgb), alpha


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {}),
        ("ICO", {"sizes": [(32, 32)]}),
        ("TGA", {}),
        ("DDS", {}),
        ("QOI", {}),
        ("JPEG2000", {}),
        ("SGI", {}),
    ],
)
def test_alpha_is_blended_onto_the_background(name: str, options: dict[str, object]) -> None:
    """With a background colour, transparent pixels show it, in every format with an alpha channel;
    without, alpha is dropped.
    """
    image, rgb, alpha = transparent()
    data = sample_images.encode(image, name, **options)
    assert apart(on_red(data), blended(rgb, alpha)) <= 1
    assert np.array_equal(ok(data, Recipe(32, 32, None)), rgb)


@pytest.mark.parametrize(
    "name",
    [
        "AVIF alpha",
        "WEBP alpha",
        "ICNS raw",
        "ICO bitmap",
        "GBR alpha",
        "PSD alpha",
        "DDS DXT5",
        "TGA packed",
        "GIF transparent",
    ],
)
def test_every_kind_of_alpha_follows_pillows(name: str) -> None:
    """With a background colour the answer is Pillow's RGBA, blended."""
    data = encoded.SAMPLES[name]()
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image.load()
    rgba = np.asarray(image.convert("RGBA"))
    assert (rgba[:, :, 3] < 255).any() or name == "ICO bitmap"
    assert apart(on_red(data), squared(blended(rgba[:, :, :3], rgba[:, :, 3]))) <= 1


def test_grey_with_alpha_is_blended() -> None:
    """Grey with alpha, 8-bit and 16-bit, straight and premultiplied."""
    image, _, alpha = transparent()
    grey = image.convert("LA")
    expected = blended(np.repeat(np.asarray(grey)[:, :, :1], 3, axis=2), alpha)
    assert apart(on_red(sample_images.encode(grey, "PNG")), expected) <= 1
    samples = np.asarray(grey).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    assert apart(on_red(sample_images.png(32, 32, depth=16, colour=4, rows=rows)), expected) <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_blended(mode: str) -> None:
    """Colours that are multiplied by their alpha already are not multiplied twice."""
    image, _, alpha = transparent()
    straight = image.convert("LA" if mode == "La" else "RGBA")
    premultiplied = straight.convert(mode)
    rgb = np.asarray(straight.convert("RGBA"))[:, :, :3]
    part = pillow._blend(premultiplied, (0, 0, 32, 32), RED, b"")
    assert apart(np.asarray(part), blended(rgb, alpha)) <= 2


def test_palette_with_alpha_is_blended() -> None:
    """The mode PA, and a palette whose transparency is one index or a table."""
    image, _, alpha = transparent()
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=60)
    rgb, index = np.asarray(palette.convert("RGB")), np.asarray(palette)
    table = bytes(range(0, 240, 4))
    assert (
        apart(
            on_red(sample_images.encode(palette, "PNG", transparency=table)),
            blended(rgb, np.frombuffer(table, np.uint8)[index]),
        )
        <= 1
    )
    keyed = blended(rgb, np.where(index == 7, 0, 255))
    assert (index == 7).any()
    assert apart(on_red(sample_images.encode(palette, "PNG", transparency=7)), keyed) <= 1
    assert np.array_equal(
        ok(sample_images.encode(palette, "PNG", transparency=7), Recipe(32, 32, None)), rgb
    )
    both = palette.convert("PA")
    both.putalpha(Image.fromarray(alpha))
    assert (
        apart(np.asarray(pillow._blend(both, (0, 0, 32, 32), RED, b"")), blended(rgb, alpha)) <= 1
    )


@pytest.mark.parametrize(
    ("depth", "colour", "samples", "key", "expected"),
    [
        (1, 0, [0, 1], [1], [(0, 0, 0), None]),
        (1, 0, [0, 1], [0], [None, (255, 255, 255)]),
        (2, 0, [0, 1, 2, 3], [1], [(0, 0, 0), None, (170, 170, 170), (255, 255, 255)]),
        (4, 0, [5, 10], [5], [None, (170, 170, 170)]),
        (8, 0, [85, 5], [5], [(85, 85, 85), None]),
        (16, 0, [0x0102, 0x0103], [0x0102], [None, (1, 1, 1)]),
        (8, 2, [1, 2, 3, 1, 2, 4], [1, 2, 3], [None, (1, 2, 4)]),
        (16, 2, [0x101, 2, 3, 0x102, 2, 3], [0x101, 2, 3], [None, (1, 0, 0)]),
        (16, 2, [0x101, 2, 3, 0x102, 2, 3], [1, 2, 3], [(1, 0, 0), (1, 0, 0)]),
    ],
)
def test_the_transparent_colour_of_a_png_is_exact(
    depth: int,
    colour: int,
    samples: list[int],
    key: list[int],
    expected: list[tuple[int, int, int] | None],
) -> None:
    """Only pixels that equal the transparent colour at the bit depth of the file show the
    background.
    """
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(
        -(-len(bits) // 8), "big"
    )
    trns = sample_images.chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in key))
    data = sample_images.png(len(expected), 1, depth=depth, colour=colour, rows=row, extra=trns)
    shown = on_red(data)[(len(expected) - 1) // 2].tolist()
    assert shown == [list(pixel or (255, 0, 0)) for pixel in expected]


def test_the_background_is_applied_before_resizing_and_turning() -> None:
    """The blended image is what is turned, cropped and resized."""
    image = encoded.alpha()
    data = sample_images.encode(image, "PNG", exif=sample_images.exif(6))
    flat = Image.new("RGB", image.size, RED)
    flat.paste(image, mask=image)
    recipe = Recipe(20, 20, 24, background=RED)
    assert np.array_equal(
        ok(data, recipe),
        ok(
            sample_images.encode(flat, "PNG", exif=sample_images.exif(6)),
            replace(recipe, background=None),
        ),
    )


def test_opaque_images_do_not_change_with_a_background() -> None:
    """A background changes nothing about an image without transparency."""
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PNG grey 16"):
        data = encoded.SAMPLES[name]()
        assert np.array_equal(ok(data, replace(SMALL, background=RED)), ok(data, SMALL)), name


def test_a_black_icon_on_nothing_shows_on_white() -> None:
    """A black drawing on a transparent ground is all black unless it is put on a background."""
    data = (CASES / "icon_black_circle_on_transparent.png").read_bytes()
    assert ok(data).max() == 0
    white = ok(data, replace(RECIPE, background="#ffffff"))
    assert (white.min(), white.max()) == (0, 255)


def test_animation_gives_its_first_frame() -> None:
    """Of an animated image the first frame counts."""
    first = sample_images.encode(sample_images.photograph(50, 40), "GIF")
    assert apart(ok(sample_images.animated_gif()), ok(first)) <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 60_000)])
@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_extreme_shapes_are_decoded(name: str, size: tuple[int, int]) -> None:
    """The resized image is never made: one of 1×4000 would be 256×1024000."""
    ok(sample_images.encode(Image.new("RGB", size, (10, 200, 30)), name))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    recipe=st.sampled_from(
        [
            RECIPE,
            Recipe(interpolation=Interpolation.BICUBIC),
            Recipe(resize=None),
            Recipe(260, 260, 250),
            Recipe(96, 160, (160, 96), pad=True, fill="#ffffff"),
            Recipe(64, 448, (512, 80)),
        ]
    ),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    grey=st.booleans(),
)
def test_any_unscaled_jpeg_is_pillows(
    width: int, height: int, recipe: Recipe, subsampling: int, progressive: bool, grey: bool
) -> None:
    """A JPEG of any size below the scaling limit has the pixels of Pillow's decode, resize and
    crop.
    """
    image = sample_images.photograph(width, height).convert("L" if grey else "RGB")
    data = sample_images.encode(
        image,
        "JPEG",
        quality=90,
        progressive=progressive,
        **({} if grey else {"subsampling": subsampling}),
    )
    pixels = ok(data, recipe)
    scaled = preprocess.shrink(width, height, recipe) > 1
    too_large = isinstance(recipe.resize, int) and max(width, height) >= 40 * min(width, height)
    if not scaled and not too_large:
        assert apart(pixels, reference_pixels(Image.open(io.BytesIO(data)), recipe)) == 0


@pytest.mark.parametrize("size", [(1024, 1024), (1500, 1100), (1900, 2401)])
def test_scaled_jpeg_is_close_to_pillows(size: tuple[int, int]) -> None:
    """A JPEG scaled in the DCT stays within a level of Pillow's in the mean."""
    data = sample_images.encode(sample_images.photograph(*size), "JPEG", quality=90)
    reference = reference_pixels(Image.open(io.BytesIO(data)), RECIPE)
    assert np.abs(ok(data).astype(int) - reference).mean() < 1


def test_full_size_jpeg_is_bit_identical_to_pillows() -> None:
    """Without resampling, simplejpeg's pixels are Pillow's."""
    data = sample_images.jpeg(300, 301, subsampling=2)
    assert np.array_equal(
        ok(data, Recipe(resize=None)),
        reference_pixels(Image.open(io.BytesIO(data)), Recipe(resize=None)),
    )


def test_a_jpeg_without_its_end_marker_is_judged_as_pillow_judges_it() -> None:
    """simplejpeg refuses it. It is ok if Pillow reads it, which depends on its last bytes, and else
    truncated.
    """
    found = Counter()
    for seed in range(30):
        data = sample_images.jpeg(300, 301, seed=seed)[:-2]
        with pytest.raises(ValueError, match="Premature end"):
            simplejpeg.decode_jpeg(data)
        decoded = decode(data, RECIPE, LIMITS)
        found[decoded.status] += 1
        try:
            expected = reference_pixels(Image.open(io.BytesIO(data)), RECIPE)
        except OSError:
            assert decoded.status is Status.TRUNCATED
        else:
            assert decoded.pixels is not None, decoded.error
            assert apart(decoded.pixels, expected) <= 1
    assert set(found) == {Status.OK, Status.TRUNCATED}


def test_byte_budget() -> None:
    """More bytes than `max_bytes` are not looked at."""
    data = sample_images.jpeg()
    decoded = decode(data, RECIPE, Limits(max_bytes=len(data) - 1))
    assert decoded.status is Status.TOO_LARGE
    assert (
        decoded.error
        == f"{len(data)} bytes are more than the budget of {len(data) - 1} bytes per image"
    )
    assert decode(data, RECIPE, Limits(max_bytes=len(data))).status is Status.OK


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_pixel_budget(name: str) -> None:
    """One pixel more than `max_pixels` is `too_large`, exactly `max_pixels` is not."""
    data = sample_images.encode(sample_images.photograph(64, 48), name)
    decoded = decode(data, RECIPE, Limits(max_pixels=64 * 48 - 1))
    assert (decoded.status, decoded.width, decoded.height) == (Status.TOO_LARGE, 64, 48)
    assert decoded.error == "64×48 are 3072 pixels, more than the budget of 3071 pixels per image"
    assert decode(data, RECIPE, Limits(max_pixels=64 * 48)).status is Status.OK


@pytest.mark.parametrize(
    ("owner", "function"), [(decode_module, "read_header"), (simplejpeg, "decode_jpeg")]
)
def test_out_of_memory_is_a_row(owner: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that there is no memory for is `too_large`, whichever step needs the memory."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(owner, function, fail)
    decoded = decode(sample_images.jpeg(), RECIPE, LIMITS)
    assert (decoded.status, decoded.error) == (Status.TOO_LARGE, "not enough memory to decode it")


def test_pixels_can_go_into_a_batch() -> None:
    """With `out`, `decode` writes to its place of a batch, all of it, and to no other."""
    batch = np.full((3, 224, 224, 3), 77, np.uint8)
    for data in (
        sample_images.jpeg(),
        sample_images.encode(sample_images.photograph(40, 30), "PNG"),
    ):
        decoded = decode(data, RECIPE, LIMITS, batch[1])
        assert decoded.pixels is not None
        assert np.shares_memory(decoded.pixels, batch)
        assert np.array_equal(batch[1], ok(data))
        assert (batch[[0, 2]] == 77).all()


def corpus() -> list[bytes]:
    whole = [
        sample_images.encode(sample_images.photograph(70, 50), name)
        for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA")
    ]
    whole += [
        sample_images.encode(sample_images.photograph(70, 50), "TIFF", compression=kind)
        for kind in ("jpeg", "tiff_lzw", "tiff_deflate")
    ]
    return [
        *whole,
        sample_images.jpeg(1100, 1040, orientation=8),
        sample_images.animated_gif(),
        sample_images.jpeg(40, 50, progressive=True),
    ]


def test_threads_give_the_same_bits() -> None:
    """Eight threads at once, in any order, answer what one does, bad images included."""
    jobs = (corpus() + [make()[0] for make in sample_images.HOSTILE.values()]) * 4
    alone = [decode(data, RECIPE, LIMITS) for data in jobs]
    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    with ThreadPoolExecutor(8) as pool:
        together = dict(
            zip(order, pool.map(lambda at: decode(jobs[at], RECIPE, LIMITS), order), strict=True)
        )
    for at, one in enumerate(alone):
        other = together[at]
        assert (one.status, one.error, one.width, one.height) == (
            other.status,
            other.error,
            other.width,
            other.height,
        )
        assert (one.pixels is None and other.pixels is None) or np.array_equal(
            one.pixels, other.pixels
        )


@pytest.mark.process
def test_decoding_releases_the_gil() -> None:
    """While a large image is decoded, another thread runs several times."""
    data = sample_images.encode(sample_images.photograph(3000, 2400), "JPEG")
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    most = 0
    for _ in range(200):  # until the other thread gets a core in time
        before = ticks
        ok(data, Recipe(resize=None))
        if (most := max(most, ticks - before)) >= 5:
            break
    stop.set()
    thread.join()
    assert most >= 5


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=300),
    magic=st.sampled_from([b"", *(magic for kinds in formats.MAGIC.values() for magic in kinds)]),
)
def test_random_bytes_never_raise(data: bytes, magic: bytes) -> None:
    """Any bytes at all, also behind any magic number, become an answer."""
    sound(decode(magic + data, SMALL, Limits(max_pixels=1_000_000)))


@pytest.mark.process
@pytest.mark.parametrize("which", range(14))
def test_mutated_images_never_raise(which: int) -> None:
    """Flipped bits, cuts and splices of any format become an answer, the same one each time, and no
    warning gets out.
    """
    originals = corpus()
    rng = random.Random(which)
    for _ in range(60):
        data = bytearray(originals[which])
        for _ in range(rng.choice([0, 1, 3, 20])):
            data[rng.randrange(len(data) if rng.random() < 0.5 else min(200, len(data)))] = (
                rng.randrange(256)
            )
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.2:
            data[rng.randrange(len(data) + 1) :] = rng.choice(originals)[rng.randrange(30) :]
        decoded = decode(bytes(data), SMALL, Limits(max_pixels=4_000_000))
        sound(decoded)
        assert decode(bytes(data), SMALL, Limits(max_pixels=4_000_000)).error == decoded.error


PHOTOGRAPHS = os.environ.get("IMAGEMILL_PHOTOGRAPHS", "")


@pytest.mark.process
@pytest.mark.skipif(not PHOTOGRAPHS, reason="IMAGEMILL_PHOTOGRAPHS names no folder of photographs")
@pytest.mark.parametrize("interpolation", list(Interpolation))
def test_photographs_are_pillows(interpolation: Interpolation) -> None:
    """Real photographs stay, in the mean of each, within half a level of Pillow's (a whole one
    where scaled in the DCT).
    """
    recipe = Recipe(interpolation=interpolation)
    files = sorted(
        path for path in Path(PHOTOGRAPHS).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
    )
    assert files
    for path in files if interpolation is Recipe().interpolation else files[::5]:
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        scaled = preprocess.shrink(*image.size, recipe) > 1
        reference = reference_pixels(ImageOps.exif_transpose(image), recipe)
        assert np.abs(ok(data, recipe).astype(int) - reference).mean() < (1 if scaled else 0.5), (
            path.name
        )


@pytest.mark.parametrize(
    ("recipe", "status"),
    [
        (Recipe(8, 8, resize=(8, 8)), Status.OK),
        (Recipe(8, 8, resize=256), Status.UNSUPPORTED),
        (Recipe(1, 8, resize=None), Status.OK),
    ],
)
def test_a_very_long_image_is_read_or_unsupported(recipe: Recipe, status: Status) -> None:
    """Beyond what float32 counts, Pillow resamples. Beyond 2³¹ pixels neither does."""
    wide = Image.new("RGB", (2**24 + 8, 1), (200, 100, 50))
    file = io.BytesIO()
    wide.save(file, "PNG", compress_level=1)
    decoded = decode(file.getvalue(), recipe, LIMITS)
    assert decoded.status is status, decoded.error
    if decoded.pixels is not None:
        whole = wide.resize((8, 8), Image.Resampling.BILINEAR) if recipe.resize else wide
        assert (decoded.pixels == np.asarray(whole)[: recipe.height, :8]).all()
    else:
        assert decoded.error == "it would be resized to 4,294,969,344 pixels"
