"""JPEG XL: read with the extra `jxl`, turned once, and refused by its header if it is too large."""

from __future__ import annotations

import io
import struct
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image

import sample_images
from imagemill.api.items import fetcher
from imagemill.pipeline.decoding import pillow, preprocess
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Decoded, Limits, Recipe, Status

STORED = sample_images.photograph(40, 36)
SIGNATURE = b"\x00\x00\x00\x0cJXL \r\n\x87\n"


@pytest.fixture
def plugin() -> None:
    pytest.importorskip("pillow_jxl", reason="needs the extra jxl")


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def jxl(orientation: int = 1) -> bytes:
    """A JPEG XL that says how it is turned both in its own header and in EXIF, as cjxl makes it of
    a phone's photograph.
    """
    data = imagecodecs.jpegxl_encode(np.asarray(STORED), lossless=True)
    bits = "".join(f"{byte:08b}"[::-1] for byte in data)
    # signature 16, size 26, all_default 0, extra_fields 0, depth 3, 16-bit buffers 1, channels 2,
    # XYB 1, colour 1; what follows ends at bit 56
    assert bits[42:44] == "00"
    assert bits[55] == "0"
    turned = f"{orientation - 1:03b}"[::-1] + "000"  # neither intrinsic size, preview nor animation
    head = bits[:43] + "1" + turned + bits[44:52] + "1" + bits[52:56]  # 1: the usual tone mapping
    head += "0" * (-len(head) % 8)
    bits = head + bits[56:]
    stream = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    exif = Image.Exif()
    exif[0x112] = orientation
    return (
        SIGNATURE
        + box(b"ftyp", b"jxl \0\0\0\0jxl ")
        + box(b"Exif", bytes(4) + exif.tobytes().removeprefix(b"Exif\0\0"))
        + box(b"jxlc", stream)
    )


def displayed(orientation: int) -> np.ndarray:
    turn = preprocess.TURNS.get(orientation)
    return np.asarray(STORED if turn is None else STORED.transpose(turn))


def decoded_at(data: bytes, expected: np.ndarray) -> Decoded:
    return decode(data, Recipe(*expected.shape[:2], None), Limits())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.usefixtures("plugin")
def test_a_jxl_is_turned_once(orientation: int) -> None:
    """libjxl turns the pixels as the header says; the same orientation in EXIF changes nothing."""
    data, expected = jxl(orientation), displayed(orientation)
    assert np.array_equal(imagecodecs.jpegxl_decode(data), expected)
    decoded = decoded_at(data, expected)
    assert decoded.status is Status.OK, decoded.error
    assert np.array_equal(decoded.pixels, expected)
    with Image.open(io.BytesIO(data)) as image:
        encoded = fetcher(0, image, Recipe(), Limits())()
    assert np.array_equal(decoded_at(encoded, expected).pixels, expected)


@pytest.mark.usefixtures("plugin")
def test_a_jpeg_packed_without_loss_is_turned_once() -> None:
    """Its plugin gives the pixels of the JPEG, which are still to be turned."""
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    STORED.save(file, "JPEG", exif=exif)
    turned = displayed(6)
    decoded = decoded_at(imagecodecs.jpegxl_encode_jpeg(file.getvalue()), turned)
    assert np.array_equal(decoded.pixels, decoded_at(file.getvalue(), turned).pixels)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_of_sample_is_right_or_unsupported(kind: str, channels: int) -> None:
    grey = np.asarray(STORED.convert("L"))
    scale = {"uint8": 1.0, "uint16": 257.0, "float32": 1 / 255}[kind]
    samples = (np.dstack([grey] * channels).squeeze() * scale).astype(kind)
    expected = np.dstack([grey] * 3)
    decoded = decoded_at(imagecodecs.jpegxl_encode(samples, lossless=True), expected)
    if channels == 2 and kind != "uint8":
        assert decoded.status is Status.UNSUPPORTED
        assert "JPEG XL with grey and alpha of more than 8 bits" in str(decoded.error)
    else:
        assert decoded.status is Status.OK
        assert np.array_equal(decoded.pixels, expected)


SIZES = [
    *((1, 1), (8, 8), (3, 700), (257, 3), (5, 9_000)),
    *((600, 500), (256, 192), (300, 200), (640, 360), (500, 400), (512, 256)),
]
"""The second line: of each ratio that a header has a number for."""


@pytest.mark.parametrize(
    ("size", "packed"),
    [
        *((size, "stream") for size in SIZES),
        *(((257, 3), packed) for packed in ("boxes", "parts", "large box")),
    ],
)
def test_the_size_is_checked_before_the_plugin_decodes(
    size: tuple[int, int], packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header gives the size, however it is written. Pillow, whose plugin decodes as it opens,
    is not asked.
    """
    width, height = size
    data = imagecodecs.jpegxl_encode(np.zeros((height, width), np.uint8), effort=1)
    boxes = SIGNATURE + box(b"ftyp", b"jxl \0\0\0\0jxl ") + box(b"Exif", b"jxlc\xff\x0a" + bytes(9))
    data = {
        "stream": data,
        "boxes": boxes + struct.pack(">I4s", 0, b"jxlc") + data,
        "parts": boxes + box(b"jxlp", bytes(4) + data[:3]) + box(b"jxlp", b"\x80\0\0\1" + data[3:]),
        "large box": boxes + struct.pack(">I4sQ", 1, b"jxlc", 16 + len(data)) + data,
    }[packed]
    with monkeypatch.context() as patch:
        patch.setitem(Image.OPEN, "JXL", (pytest.fail, None))
        decoded = decode(data, Recipe(), Limits(max_pixels=width * height - 1))
    assert decoded.status is Status.TOO_LARGE, decoded.error
    assert f"{width}×{height} are" in str(decoded.error)
    assert decode(data, Recipe(), Limits(max_pixels=width * height)).status is not Status.TOO_LARGE


def test_without_the_extra_the_row_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow, "_registered", set())
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    decoded = decoded_at(jxl(), displayed(1))
    assert (decoded.status, decoded.error) == (
        Status.UNSUPPORTED,
        "JXL needs a package that is not installed: pip install 'imagemill[jxl]'",
    )
