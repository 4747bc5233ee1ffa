"""HEIC, which phones write: read with the extra `heif`, and without it a row that names the
extra.
"""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image

import sample_images
from imagemill.pipeline.decoding import pillow
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Limits, Recipe, Status
from reference import reference_pixels

RECIPE = Recipe(32, 32, 40)


def heic(orientation: int = 1) -> bytes:
    """A HEIC that says how it is turned both in its own way and in EXIF, as phones do."""
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x112] = orientation
    file = io.BytesIO()
    image = pillow_heif.from_pillow(sample_images.photograph(90, 60))
    image.save(file, exif=exif.tobytes(), quality=95)
    return file.getvalue()


def test_a_heic_is_read() -> None:
    """To the pixels that Pillow's plugin gives."""
    data = heic()
    decoded = decode(data, RECIPE, Limits())
    assert (decoded.status, decoded.width, decoded.height) == (Status.OK, 90, 60)
    assert decoded.pixels is not None
    expected = reference_pixels(Image.open(io.BytesIO(data)).convert("RGB"), RECIPE)
    assert np.array_equal(decoded.pixels, expected)


def test_a_heic_is_turned_once() -> None:
    decoded = decode(heic(orientation=6), Recipe(90, 60, None), Limits())
    assert (decoded.status, decoded.width, decoded.height) == (Status.OK, 60, 90)
    assert decoded.pixels is not None
    turned = sample_images.photograph(90, 60).transpose(Image.Transpose.ROTATE_270)
    assert np.abs(decoded.pixels - np.asarray(turned).astype(int)).mean() < 10


def test_half_a_heic_is_a_row() -> None:
    data = heic()
    decoded = decode(data[: len(data) // 2], RECIPE, Limits())
    assert decoded.status in (Status.TRUNCATED, Status.CORRUPT)
    assert decoded.error


def test_a_heic_bomb_is_refused_undecoded() -> None:
    decoded = decode(heic(), RECIPE, Limits(max_pixels=100))
    assert (decoded.status, decoded.width) == (Status.TOO_LARGE, 90)


def test_a_heic_that_shows_a_part_of_a_bomb_is_refused_undecoded() -> None:
    """The whole image is decoded, whatever part of it is shown."""
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (1002, 751))).save(file)
    data = bytearray(file.getvalue())
    part = data.index(b"clap") + 4
    struct.pack_into(">8I", data, part, 90, 1, 60, 1, 0, 1, 0, 1)
    decoded = decode(bytes(data), RECIPE, Limits(max_pixels=10_000))
    assert (decoded.status, decoded.width, decoded.height) == (Status.TOO_LARGE, 90, 60)
    assert "1002×752 are 753504 pixels" in str(decoded.error)
    assert decode(bytes(data), RECIPE, Limits()).status is Status.OK


def test_a_heic_beyond_its_decoder_is_not_corrupt() -> None:
    """libheif refuses more than 2^30 pixels, whatever the budget."""
    data = bytearray(heic())
    struct.pack_into(">II", data, data.index(b"ispe") + 8, 40_000, 40_000)
    for limits in (Limits(), Limits(max_pixels=10**10)):
        assert decode(bytes(data), RECIPE, limits).status is Status.TOO_LARGE


def test_without_the_extra_the_row_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    monkeypatch.setattr(pillow, "_registered", set())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoded = decode(data, RECIPE, Limits())
    assert (decoded.status, decoded.error) == (
        Status.UNSUPPORTED,
        "HEIF needs a package that is not installed: pip install 'imagemill[heif]'",
    )
