"""What reading TIFF promises: the right image or the true reason, never a wrong image."""

from __future__ import annotations

import io
import itertools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import sample_images
import tiff_files
from imagemill.pipeline.decoding.decode import decode
from imagemill.records import Decoded, Limits, Recipe, Status
from reference import reference_pixels

RECIPE, LIMITS = Recipe(33, 33, None), Limits()
CASES = Path(__file__).parent / "cases"


def answer(data: bytes) -> Decoded:
    return decode(data, RECIPE, LIMITS)


def cropped(pixels: np.ndarray) -> np.ndarray:
    return reference_pixels(
        Image.fromarray(
            np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8))
        ),
        RECIPE,
    )


def check(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    decoded = answer(data)
    assert decoded.status is Status.OK, decoded.error
    assert decoded.pixels is not None
    assert np.abs(decoded.pixels.astype(int) - cropped(expected)).max() <= tolerance


def refused(data: bytes) -> str:
    decoded = answer(data)
    assert decoded.status is Status.UNSUPPORTED, (decoded.status, decoded.error)
    assert decoded.error is not None
    return decoded.error


@pytest.mark.process
def test_grid_is_right_or_unsupported() -> None:
    """Every seventh file of the grid is read as tifffile reads it, or is unsupported;
    `benchmarks/tiff_grid.py` tries them all.
    """
    wrong, read = [], 0
    for cell in itertools.islice(tiff_files.cells(), 0, None, 7):
        verdict = tiff_files.compare(cell)
        read += verdict == "ok"
        if verdict not in {"ok", "unsupported", "not written"}:
            wrong.append((cell.name, verdict))
    assert not wrong
    assert read > 300


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("tiff_*.tif")))
def test_small_files_that_failed_are_read(name: str) -> None:
    """Files that were once scrambled or called corrupt are read as tifffile reads them."""
    data = (CASES / name).read_bytes()
    check(data, tiff_files.shown(data))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("photometric", [0, 1, 2, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
def test_any_number_of_bits_is_read(bits: int, photometric: int, deflate: bool, order: str) -> None:
    """Unsigned samples of 1 to 16 bits are scaled to 8 bits, in any photometric interpretation and
    byte order.
    """
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 1 << bits, (35, 37, 3 if photometric == 2 else 1))
    palette = rng.integers(0, 65536, 3 << bits)
    tags = {320: tuple(map(int, palette))} if photometric == 3 else {}
    data = tiff_files.by_hand(
        values, bits, photometric=photometric, order=order, deflate=deflate, tags=tags
    )
    if photometric == 3:
        expected = palette.reshape(3, -1).T[values[:, :, 0]] >> 8
    else:
        expected = values * 255 // ((1 << bits) - 1) if bits <= 8 else values >> (bits - 8)
        expected = 255 - expected if photometric == 0 else expected
    check(data, expected)


def test_palette_of_8_bit_colours_is_read() -> None:
    """A palette whose colours were written as 0…255, instead of 0…65535, is not black."""
    values = np.random.default_rng(1).integers(0, 256, (35, 37, 1))
    palette = np.random.default_rng(2).integers(0, 256, 768)
    data = tiff_files.by_hand(values, 8, photometric=3, tags={320: tuple(map(int, palette))})
    check(data, palette.reshape(3, -1).T[values[:, :, 0]])


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fax_is_read(compression: str, photometric: int) -> None:
    """Bilevel images compressed as fax are read, black on white and white on black."""
    image = Image.fromarray(np.add.outer(np.arange(35), np.arange(37)) % 7 < 3)
    data = sample_images.encode(image, "TIFF", compression=compression, tiffinfo={262: photometric})
    check(data, np.asarray(image)[:, :, None] * 255)


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_fill_order_is_obeyed(bits: int, photometric: int, deflate: bool, fill_order: int) -> None:
    """Fill order 2 reverses the bits of each byte of the file's strips."""
    values = np.random.default_rng(1).integers(0, 1 << bits, (35, 37, 1))
    plain = tiff_files.by_hand(values, bits, photometric=photometric, deflate=deflate)
    size = struct.unpack_from("<I", plain, 4)[0] - 8
    strip = np.unpackbits(np.frombuffer(plain[8 : 8 + size], np.uint8)).reshape(-1, 8)[
        :, :: 3 - 2 * fill_order
    ]
    data = plain[:8] + np.packbits(strip).tobytes() + plain[8 + size :]
    entries = struct.unpack_from("<I", plain, 4)[0] + 2
    at = next(
        at for at in range(entries, len(data), 12) if struct.unpack_from("<H", data, at)[0] == 277
    )  # has the default value
    data = data[:at] + struct.pack("<HHII", 266, 4, 1, fill_order) + data[at + 12 :]
    expected = values * 255 // ((1 << bits) - 1)
    check(data, expected if photometric else 255 - expected)


@pytest.mark.parametrize("bits", [1, 4, 12])
def test_tiles_of_partial_bytes_are_read(bits: int) -> None:
    """Tiles whose samples are not whole bytes are put side by side at the right pixel."""
    values = np.random.default_rng(1).integers(0, 1 << bits, (48, 48))
    tiles = [
        values[top : top + 16, left : left + 16] for top in (0, 16, 32) for left in (0, 16, 32)
    ]
    bodies = [
        np.packbits(
            ((tile[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
        ).tobytes()
        for tile in tiles
    ]
    starts = tuple(8 + len(bodies[0]) * index for index in range(9))
    tags = {
        256: 37,
        257: 35,
        258: bits,
        259: 1,
        262: 1,
        277: 1,
        322: 16,
        323: 16,
        324: starts,
        325: (len(bodies[0]),) * 9,
    }
    expected = values[:35, :37, None]
    check(
        tiff_files.assemble(tags, b"".join(bodies)),
        expected * 255 // ((1 << bits) - 1) if bits < 8 else expected >> 4,
    )


@pytest.mark.parametrize(("mode", "tag"), [("RGB", 258), ("LA", 258), ("LA", 277)])
def test_samples_and_their_bits_are_not_guessed(mode: str, tag: int) -> None:
    """One sample of one bit is the default, which only black and white can mean."""
    data = sample_images.encode(sample_images.photograph(44, 36).convert(mode), "TIFF")
    at = data.index(struct.pack("<HH", tag, 3))
    decoded = decode(data[: at + 4] + bytes(4) + data[at + 8 :], RECIPE, Limits())
    assert decoded.error == f"truncated TIFF file: tag {tag} is missing"
    assert decoded.status is Status.TRUNCATED


@pytest.mark.parametrize("photometric", [1, 2, 6])
def test_old_jpeg_is_right_or_unsupported(photometric: int) -> None:
    """A TIFF with old-style JPEG compression is read if it is YCbCr, and unsupported otherwise."""
    jpeg = sample_images.jpeg(40, 36, subsampling=0)
    tags = {
        256: 40,
        257: 36,
        258: (8, 8, 8),
        259: 6,
        262: photometric,
        273: 8,
        277: 3,
        278: 36,
        279: len(jpeg),
        512: 1,
        513: 8,
        514: len(jpeg),
    }
    data = tiff_files.assemble({**tags, 530: (1, 1)}, jpeg)
    if photometric == 6:
        check(data, np.asarray(Image.open(io.BytesIO(jpeg))), tolerance=1)
    else:
        assert "old-style JPEG compression" in refused(data)


def test_large_tags_cost_nothing() -> None:
    """Tags that are not needed are not read, however large: Photoshop and microscopes store
    megabytes in them.
    """
    plain = tiff_files.by_hand(np.zeros((35, 37, 1)), 16)
    large = tiff_files.by_hand(np.zeros((35, 37, 1)), 16, tags={37724: tuple(range(300_000))})
    tracemalloc.start()
    peaks = []
    for data in (plain, large):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert answer(data).status is Status.OK
        peaks.append(tracemalloc.get_traced_memory()[1] - before - 3 * len(data))
    tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


def test_small_image_in_a_huge_tile_is_too_large() -> None:
    """The budget counts the bytes of a tile, which libtiff decodes whole, not those of the image
    alone.
    """
    tags = {
        256: 16,
        257: 16,
        258: (32,) * 4,
        259: 8,
        262: 2,
        277: 4,
        322: 3000,
        323: 3000,
        324: 8,
        325: 64,
        338: 0,
    }
    decoded = decode(tiff_files.assemble(tags, bytes(64)), RECIPE, Limits(max_pixels=10_000_000))
    assert decoded.status is Status.TOO_LARGE, decoded.error


def test_constant_image_of_wide_samples_is_read() -> None:
    """An image of one value, which cannot be stretched, is read."""
    for value in (-5, 1 << 20):
        check(
            sample_images.encode(Image.fromarray(np.full((35, 37), value, np.int32)), "TIFF"),
            np.zeros((35, 37, 1)),
        )


SAMPLE_TAGS = {
    "complex": ({339: 6}, 64, "64-bit complex float samples"),
    "undefined": ({339: 4}, 8, "8-bit undefined samples"),
    "24-bit": ({}, 24, "24-bit unsigned samples"),
    "mixed": ({258: (5, 6, 5), 277: 3, 262: 2}, 16, "5/6-bit unsigned samples"),
    "LogLUV": ({262: 32845, 277: 3, 339: 2}, 16, "photometric interpretation LogLUV"),
    "mask": ({262: 4}, 1, "photometric interpretation transparency mask"),
    "ICCLAB": ({262: 9, 277: 3}, 8, "photometric interpretation ICCLAB"),
    "16-bit CIELAB": ({262: 8, 277: 3}, 16, "16-bit unsigned CIELAB samples"),
    "subsampled": ({262: 6, 277: 3, 530: (2, 2)}, 8, "YCbCr samples that are subsampled"),
    "inks": ({262: 5, 277: 4, 332: 2}, 8, "ink set 2"),
    "volume": ({32997: 3}, 8, "image depth of 3"),
    "PackBits": ({259: 32773, 317: 2}, 8, "predictor 2 and compression PackBits"),
    "predictor": ({259: 8, 317: 34892}, 8, "predictor 34892"),
    "LERC": ({259: 34887}, 32, "LERC compression"),
    "JPEG 2000": ({259: 34712}, 8, "JPEG 2000 compression"),
    "WebP": ({259: 50001, 262: 2, 277: 3}, 8, "WebP compression"),
    "JPEG XL": ({259: 50002}, 8, "JPEG XL compression"),
    "SGI Log": ({259: 34676, 262: 32844}, 16, "SGI Log compression"),
    "JBIG": ({259: 34661}, 1, "JBIG compression"),
    "JPEG of 12 bits": ({259: 7}, 12, "JPEG compression of 12-bit unsigned BlackIsZero samples"),
    "unknown": ({259: 61234}, 8, "number 61234 compression"),
    "sparse": ({273: 0, 279: 0}, 8, "sparse TIFF"),
    "DNG": ({50706: 0x01040000}, 8, "camera raw file (DNG)"),
    "sensor": ({262: 32803}, 16, "camera raw file (color filter array)"),
    "linear raw": ({262: 34892, 277: 3}, 16, "camera raw file (color filter array)"),
    "Nikon": ({259: 34713}, 12, "camera raw file (Nikon)"),
}


@pytest.mark.parametrize("name", SAMPLE_TAGS)
def test_other_layouts_are_unsupported_by_name(name: str) -> None:
    """A valid TIFF that is not read is `unsupported`, and the error names the property that is to
    blame.
    """
    tags, bits, reason = SAMPLE_TAGS[name]
    samples = int(tags.get(277, 1))
    data = tiff_files.by_hand(np.zeros((35, 37, samples)), bits, tags=tags)
    assert reason in refused(data)


@pytest.mark.parametrize("samples", [1, 3])
def test_without_a_photometric_interpretation_nothing_is_guessed(samples: int) -> None:
    """A reader that takes white for 0 there, as Pillow does, shows a negative."""
    data = tiff_files.by_hand(np.zeros((35, 37, samples)), 8, tags={262: 2 if samples == 3 else 1})
    tag = struct.pack("<HHI", 262, 4, 1)
    assert data.count(tag) == 1
    renamed = data.replace(tag, struct.pack("<HHI", 263, 4, 1))  # Threshholding, which says nothing
    assert "without a photometric interpretation" in refused(renamed)


@pytest.mark.parametrize("link", ["following", "sub-directory"])
def test_thumbnail_of_a_raw_file_is_no_answer(link: str) -> None:
    """A camera raw file is unsupported although its first image, a thumbnail, could be read."""
    data = tiff_files.by_hand(
        np.zeros((35, 37, 3)),
        8,
        photometric=2,
        tags={330: 0xAAAAAAAA} if link == "sub-directory" else {},
    )
    raw = tiff_files.by_hand(np.zeros((35, 37, 1)), 16, photometric=32803)
    (inner,) = struct.unpack_from("<I", raw, 4)
    pointer = struct.pack("<I", len(data))
    assert answer(data).status is Status.OK or link == "sub-directory"
    data = (
        data.replace(struct.pack("<I", 0xAAAAAAAA), pointer)
        if link == "sub-directory"
        else data[:-4] + pointer
    )
    assert "camera raw file" in refused(data + raw[inner:])


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd", "jpeg"])
@pytest.mark.parametrize(
    ("dtype", "planar"), [("uint8", False), ("uint16", True), ("float32", False)]
)
def test_cut_tiff_is_truncated(dtype: str, planar: bool, compression: str | None) -> None:
    """A TIFF that ends early is `truncated`, wherever it is cut and whichever reader it gets."""
    data = tiff_files.write(tiff_files.Cell(dtype, "rgb", compression=compression, planar=planar))
    if data is None:
        assert compression == "jpeg"
        return
    assert answer(data).status in {Status.OK, Status.UNSUPPORTED}
    for end in {9, 100, len(data) // 2, len(data) - 40}:
        decoded = answer(data[:end])
        assert decoded.status is Status.TRUNCATED or (compression == "jpeg" and end > 200), (
            end,
            decoded.error,
        )


def test_samples_have_a_budget() -> None:
    """Samples that would take more than 8 bytes for each of `max_pixels` are `too_large` before
    they are decompressed.
    """
    data = tiff_files.by_hand(np.zeros((35, 37, 4)), 32, photometric=2, tags={338: 0})
    assert decode(data, RECIPE, Limits(max_pixels=35 * 37 * 2)).status is Status.OK
    decoded = decode(data, RECIPE, Limits(max_pixels=35 * 37 * 2 - 1))
    assert decoded.status is Status.TOO_LARGE
    assert decoded.error is not None
    assert decoded.error.startswith(
        "37×35 pixels of 4 32-bit samples are 20720 bytes, more than the budget of 8 bytes for"
        " each of"
    )


@pytest.mark.parametrize("which", range(6))
def test_mutated_tags_never_raise(which: int) -> None:
    """Whatever the tags of a TIFF say, the answer is a status or an image, without a crash."""
    cells = [
        ("uint8", "rgb"),
        ("uint16", "miniswhite"),
        ("float32", "rgb"),
        ("int16", "minisblack"),
        ("uint8", "palette"),
        ("uint32", "rgb"),
    ]
    data = tiff_files.Cell(
        *cells[which], compression="lzw", planar=bool(which % 2), tiled=which > 2
    ).write()
    rng = np.random.default_rng(which)
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            broken[int(rng.integers(4, 200))] = int(rng.integers(0, 256))
        decoded = decode(bytes(broken), RECIPE, Limits(max_pixels=1_000_000))
        assert (decoded.pixels is None) == (decoded.status is not Status.OK)


def test_wrong_version_mark_is_still_a_tiff() -> None:
    """A TIFF whose version number is in the other byte order, which Pillow accepts, gets the same
    checks.
    """
    values = np.random.default_rng(1).integers(0, 65536, (35, 37, 3))
    data = tiff_files.by_hand(values, 16, photometric=2)
    check(data[:2] + b"\0*" + data[4:], values >> 8)


def test_extreme_values_are_stretched() -> None:
    """The widest floats and integers, and integers that differ by little beside their size, are
    stretched like any others.
    """
    biggest = np.finfo(np.float64).max
    ramp = np.linspace(0, 1, 35 * 37).reshape(35, 37)
    offset = np.arange(35 * 37).reshape(35, 37) % 256
    for values, expected in (
        ((ramp * 2 - 1) * biggest, np.rint(ramp * 255)),
        (offset.astype(np.uint64) + np.uint64(2**63), offset),
        (offset.astype(np.int64) - 2**62, offset),
        (np.where(ramp > 0.5, np.nan, ramp * 2), np.where(ramp > 0.5, 0, np.rint(ramp * 510))),
    ):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values)
        check(buffer.getvalue(), expected[:, :, None], tolerance=1)
