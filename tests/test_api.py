"""The Python API: `imagemill.run` and `imagemill.load`."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import itertools
import json
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import fields, replace
from PIL import Image, ImageOps, ImageSequence

import helpers
import imagemill
import sample_images
from imagemill import api
from imagemill.errors import ModelError, UsageError
from imagemill.models import bundle, get
from imagemill.pipeline.backends.null import NullSession
from imagemill.records import Limits, Recipe, Settings
from pth_files import write_legacy
from test_models_golden import GOLDEN, arrays_of, recipe
from tiny import TINY_CARD, tiny_model


@pytest.fixture(scope="module")
def classifier(lite0: Any) -> Iterator[imagemill.Classifier]:
    """EfficientNet-Lite0, with logits and embedding."""
    with imagemill.load(
        "efficientnet_lite0",
        models_dir=lite0.dir.parent,
        precision="fp32",
        save=["logits", "embedding"],
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(models_dir: Path) -> Iterator[imagemill.Classifier]:
    """A quick classifier whose every logit depends on the pixels; 2 images a batch and 2 decoding
    threads on any machine.
    """
    options: dict[str, Any] = {
        "batch_size": 2,
        "num_workers": 2,
        "limits": Limits(max_pixels=1_000_000, max_bytes=2_000_000),
    }
    with imagemill.load(
        "tiny", models_dir=models_dir, precision="fp32", save="logits", **options
    ) as opened:
        yield opened


def columns(prediction: imagemill.Prediction) -> dict[str, Any]:
    """A prediction as a row of a job spells it."""
    found = {
        name: getattr(prediction, name)
        for name in ("status", "error", "class_id", "label", "probability", "width", "height")
    }
    found["top_k"] = [dataclasses.asdict(answer) for answer in prediction.top_k] or None
    for name in ("logits", "embedding"):
        value = getattr(prediction, name)
        found[name] = None if value is None else value.tolist()
    return found


@pytest.mark.process
def test_importing_is_cheap() -> None:
    """`import imagemill` brings none of the libraries; what is exported is there when it is
    touched, and nothing else is.
    """
    program = """
import sys, imagemill
heavy = {"numpy", "PIL", "openvino", "onnx", "pyarrow", "rich", "imagemill.api", "imagemill.errors", "imagemill.records"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "run" in dir(imagemill)
assert issubclass(imagemill.UsageError, imagemill.ImagemillError)
assert "numpy" not in sys.modules
for name in imagemill.__all__:
    assert getattr(imagemill, name) is not None
try:
    imagemill.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, env=helpers.environment()
    )


def test_every_error_is_exported() -> None:
    """All exceptions of errors.py can be caught as `imagemill.NAME`."""
    from imagemill import errors

    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ImagemillError)
    }
    assert names <= set(imagemill.__all__)


def test_run_takes_every_setting() -> None:
    """Each field of Settings is a keyword of the same name and default, and the other way round."""
    keywords = {
        name: value.default for name, value in inspect.signature(imagemill.run).parameters.items()
    }
    settings = {item.name: item.default for item in fields(Settings)}
    assert keywords.pop("progress") is False
    assert settings.pop("dry_run") is False
    assert set(keywords) == set(settings)
    for name in set(settings) - {"sources", "output", "retry_failed"}:
        assert keywords[name] == settings[name], name


@pytest.mark.process
def test_a_run_is_the_command_line_s(jpegs: Callable[..., Path], tmp_path: Path) -> None:
    """The same rows, the same summary; again it resumes; a different setting is refused as
    there.
    """
    folder = jpegs(5, **{"bad.jpg": b"text"})
    made = imagemill.run(
        folder,
        tmp_path / "out",
        model="tiny",
        devices="null",
        save="logits",
        exclude=["001.*"],
        retry_failed=True,
    )
    assert (made.images, made.ok, made.failed) == (5, 4, 1)
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["ok"] == 4
    assert (
        imagemill.run(
            [str(folder)], str(tmp_path / "out"), model="tiny", devices="null", exclude="001.*"
        ).resumed_shards
        > 0
    )
    assert len(helpers.rows(tmp_path / "out")[0]["logits"]) == 10
    with pytest.raises(imagemill.JobMismatchError, match="--top-k 5, now --top-k 2"):
        imagemill.run(folder, tmp_path / "out", top_k=2, devices="null", exclude="001.*")
    with pytest.raises(imagemill.SourceError):
        imagemill.run(tmp_path / "nowhere", tmp_path / "other", model="tiny", devices="null")


@pytest.mark.process
def test_a_run_leaves_signals_alone_and_works_in_threads(
    jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Handlers are as before, no matter what set them; two threads may run two jobs at once."""
    folder = jpegs(4)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    imagemill.run(folder, tmp_path / "main", model="tiny", devices="null")
    summaries = []
    threads = [
        threading.Thread(
            target=lambda n=number: summaries.append(
                imagemill.run(folder, tmp_path / str(n), model="tiny", devices="null")
            )
        )
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.ok for summary in summaries] == [4, 4]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.process
def test_progress_is_shown_when_it_is_asked_for(
    jpegs: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On stderr; without it a run says nothing at all."""
    imagemill.run(jpegs(2), tmp_path / "out", model="tiny", devices="null")
    assert capfd.readouterr() == ("", "")
    imagemill.run(jpegs(2), tmp_path / "out", model="tiny", devices="null", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "already finished" in err


@pytest.mark.process
def test_predictions_are_the_rows_of_a_run(
    classifier: imagemill.Classifier, lite0: Any, tmp_path: Path
) -> None:
    """Good images and bad ones of many kinds: every column is the same, bit for bit, from paths,
    from bytes and from binary files.
    """
    good = {
        "wide.jpg": sample_images.jpeg(1300, 600),
        "tall.png": sample_images.encode(sample_images.photograph(70, 300), "PNG"),
        "grey.jpg": sample_images.encode(sample_images.photograph(99, 80).convert("L"), "JPEG"),
        "turned.jpg": sample_images.jpeg(200, 90, orientation=6),
        "turned.png": sample_images.encode(
            sample_images.photograph(90, 60), "PNG", exif=sample_images.exif(8)
        ),
        "turned.tif": sample_images.encode(
            sample_images.photograph(90, 60), "TIFF", exif=sample_images.exif(5)
        ),
        "deep.png": sample_images.encode(
            Image.fromarray(np.linspace(0, 65535, 4800).astype(np.uint16).reshape(60, 80)), "PNG"
        ),
        "palette.gif": sample_images.animated_gif(),
    }
    bad = {"cut.jpg": sample_images.jpeg(300, 200)[:900], "text.jpg": b"text", "empty.jpg": b""}
    folder = helpers.fill(tmp_path / "in", good | bad)
    made = imagemill.run(
        folder,
        tmp_path / "out",
        model="efficientnet_lite0",
        models_dir=lite0.dir.parent,
        precision="fp32",
        devices="cpu",
        save=["logits", "embedding"],
    )
    assert (made.ok, made.failed) == (8, 3)
    rows = helpers.rows(tmp_path / "out")
    expected = [
        {name: value for name, value in row.items() if name not in ("index", "source", "path")}
        for row in rows
    ]
    found = classifier.predict([folder / row["path"] for row in rows])
    assert [columns(item) for item in found] == expected
    found = classifier.predict([(folder / row["path"]).read_bytes() for row in rows])
    assert [columns(item) for item in found] == expected

    def files() -> Iterator[Any]:
        for row in rows:
            with (folder / row["path"]).open("rb") as file:
                yield file

    assert [columns(item) for item in classifier.predict(files())] == expected
    assert [
        columns(item)
        for item in classifier.stream(
            io.BytesIO((folder / row["path"]).read_bytes()) for row in rows
        )
    ] == expected


def test_pixels_are_prepared_as_the_same_image_in_a_file(classifier: imagemill.Classifier) -> None:
    """RGB arrays, grey arrays, views, batches of them and Pillow's images answer as a PNG of the
    same pixels does.
    """
    image = sample_images.photograph(321, 234)
    grey = image.convert("L")
    (colour,) = classifier.predict(sample_images.encode(image, "PNG"))
    (plain,) = classifier.predict(sample_images.encode(grey, "PNG"))
    pixels = np.asarray(image)
    shifted = np.zeros((300, 400, 3), np.uint8)
    shifted[20:254, 30:351] = pixels
    masked = np.ma.masked_array(pixels, pixels > 100)
    found = classifier.predict(
        [pixels, shifted[20:254, 30:351], masked, image, np.asarray(grey), grey]
    )
    assert [columns(item) for item in found] == [
        columns(item) for item in (colour, colour, colour, colour, plain, plain)
    ]
    assert [columns(item) for item in classifier.predict(np.stack([pixels, pixels]))] == [
        columns(colour)
    ] * 2
    assert [columns(item) for item in classifier.predict(pixels)] == [columns(colour)]
    assert (colour.width, colour.height) == (321, 234)
    assert colour.status == "ok"
    assert isinstance(colour.status, imagemill.Status)
    assert len(colour.top_k) == 5
    assert colour.top_k[0] == imagemill.Answer(colour.class_id, colour.label, colour.probability)  # type: ignore[arg-type]


def displayed(image: Image.Image) -> bytes:
    """What an image displays, as a PNG: made by Pillow, apart from modes that its `convert` clips
    or does not know.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA"}:
        image = image.convert("RGBA" if image.mode in {"PA", "RGBa"} else "RGB")
    return sample_images.encode(image, "PNG")


def in_mode(mode: str) -> Image.Image:
    """An image of a mode, with an alpha channel that varies where the mode has one."""
    image = sample_images.photograph(50, 40)
    values = np.asarray(image.convert("L"))
    image.putalpha(Image.fromarray(values // 2 + 100))
    if mode.startswith("I;16"):
        order = {"I;16": "<", "I;16L": "<", "I;16B": ">", "I;16N": "="}[mode]
        data = (values.astype(np.uint16) * 257 - 90).astype(order + "u2").tobytes()
        return Image.frombytes(mode, image.size, data)
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = bytes(range(16))
        return image
    if mode in {"La", "PA"}:
        return image.convert("LA").convert(mode)
    return (
        image.convert("RGB").convert("LAB")
        if mode == "LAB"
        else image.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    )


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I;16",
    "I;16B",
    "I;16L",
    "I;16N",
)


def test_a_pillow_image_is_what_it_displays(small: imagemill.Classifier) -> None:
    """In every mode, turned by its EXIF or not: bit for bit the answer to a PNG of the displayed
    pixels; the image stays as it is.
    """
    assert (
        small.predict(in_mode("P"))[0].status == "ok"
    )  # Pillow warns of its transparency, and warnings are errors here
    images = []
    for mode, orientation in itertools.product(MODES, (None, 6, 7)):
        image = in_mode(mode)
        if orientation is not None:
            image.getexif()[0x0112] = orientation
        images.append(image)
    before = [
        (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()))
        for image in images
    ]
    found = [columns(item) for item in small.predict(images)]
    assert found == [
        columns(item) for item in small.predict([displayed(image) for image in images])
    ]
    assert before == [
        (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif()))
        for image in images
    ]
    assert [(item["width"], item["height"]) for item in found[:3]] == [(50, 40), (40, 50), (40, 50)]
    assert len({tuple(item["logits"]) for item in found[:3]}) == 3


def lossless(file_format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    return sample_images.encode(
        sample_images.photograph(60, 44) if image is None else image, file_format, **options
    )


def numbers(kind: str, low: float, high: float) -> bytes:
    """A TIFF of 32-bit numbers."""
    return lossless(
        "TIFF", Image.fromarray(np.linspace(low, high, 2640).reshape(44, 60).astype(kind))
    )


OPENED: dict[str, Callable[[], bytes]] = {
    "png": lambda: lossless("PNG"),
    "png, turned": lambda: lossless("PNG", exif=sample_images.exif(6)),
    "png, 16 bits": lambda: lossless("PNG", in_mode("I;16")),
    "png, palette": lambda: lossless("PNG", in_mode("P")),
    "tiff, turned": lambda: lossless("TIFF", exif=sample_images.exif(8)),
    "tiff, 16 bits, turned": lambda: lossless("TIFF", in_mode("I;16"), exif=sample_images.exif(5)),
    "webp, turned": lambda: lossless("WEBP", lossless=True, exif=sample_images.exif(3)),
    "gif": sample_images.animated_gif,
    "jpeg, turned": lambda: sample_images.jpeg(60, 44, orientation=7),
    "jpeg, CMYK": lambda: lossless("JPEG", in_mode("CMYK")),
    "float, 0 to 1": lambda: numbers("f4", 0, 1),
    "float, 0 to 255": lambda: numbers("f4", 0, 255),
    "float, beyond": lambda: numbers("f4", -300, 1e6),
    "int32, 8 bits": lambda: numbers("i4", 0, 255),
    "int32, 16 bits": lambda: numbers("i4", 0, 65535),
    "int32, beyond": lambda: numbers("i4", -70_000, 1_000_000),
}


def test_a_pillow_image_answers_as_the_file_it_was_opened_from(small: imagemill.Classifier) -> None:
    """Loaded or not yet; numbers of 32 bits, which PNG has not, are stretched as those of a file
    are, and not clipped.
    """
    data = {name: make() for name, make in OPENED.items()}
    expected = {
        name: columns(item)
        for name, item in zip(data, small.predict(list(data.values())), strict=True)
    }
    opened = [Image.open(io.BytesIO(item)) for item in data.values()]
    for _ in range(2):
        assert dict(zip(data, map(columns, small.predict(opened)), strict=True)) == expected
    assert {item["status"] for item in expected.values()} == {"ok"}


def broken_png() -> bytes:
    """A PNG with a damaged zlib stream under the right checksum: Pillow's first `load` raises, and
    its second succeeds.
    """
    data = sample_images.encode(sample_images.photograph(96, 96), "PNG")
    at = data.index(b"IDAT")
    (length,) = struct.unpack_from(">I", data, at - 4)
    stream = bytearray(data[at + 4 : at + 4 + length])
    stream[length // 2 : length // 2 + 16] = bytes(16)
    return data[: at - 4] + sample_images.chunk(b"IDAT", bytes(stream)) + data[at + 8 + length :]


def opened_then_closed(close: str) -> Image.Image:
    file = io.BytesIO(sample_images.jpeg())
    image = Image.open(file)
    (file if close == "file" else image).close()
    return image


BAD: dict[str, tuple[Callable[[], Any], str, str]] = {
    "cut jpeg": (
        lambda: Image.open(io.BytesIO(sample_images.half(sample_images.jpeg(200, 100)))),
        "truncated",
        "truncated",
    ),
    "cut png": (
        lambda: Image.open(io.BytesIO(sample_images.half(lossless("PNG")))),
        "truncated",
        "truncated",
    ),
    "cut gif": (
        lambda: Image.open(io.BytesIO(sample_images.half(lossless("GIF")))),
        "truncated",
        "truncated",
    ),
    "broken png": (lambda: Image.open(io.BytesIO(broken_png())), "corrupt", "data stream"),
    "closed image": (lambda: opened_then_closed("image"), "read_error", "closed image"),
    "closed under it": (lambda: opened_then_closed("file"), "read_error", "closed file"),
    "no width": (lambda: Image.new("RGB", (0, 5)), "empty", "it has no pixels: 0×5"),
    "no height": (lambda: np.zeros((0, 4, 3), np.uint8), "empty", "it has no pixels: 4×0"),
    "large": (lambda: Image.new("RGB", (1001, 1000)), "too_large", "budget of 1000000 pixels"),
    "large array": (
        lambda: np.zeros((1000, 1001), np.uint8),
        "too_large",
        "budget of 1000000 pixels",
    ),
    "bomb": (
        lambda: opened_without_limit(sample_images.png(50_000, 50_000)),
        "too_large",
        "budget of 1000000 pixels",
    ),
    "closed file": (
        lambda: closed(io.BytesIO(sample_images.jpeg())),
        "read_error",
        "cannot be read: I/O operation on closed file",
    ),
    "failing file": (
        lambda: Reader(b"", OSError(5, "Input/output error")),
        "read_error",
        "cannot be read: Input/output error",
    ),
    "waiting file": (lambda: Reader(b"", None), "read_error", "non-blocking"),
    "empty file": (lambda: io.BytesIO(), "empty", "0 bytes"),
    "large bytes": (
        lambda: bytes(2_000_001),
        "too_large",
        "has 2000001 bytes, more than --max-bytes 2000000",
    ),
    "large view": (
        lambda: memoryview(bytes(2_000_001)),
        "too_large",
        "has 2000001 bytes, more than --max-bytes 2000000",
    ),
    "released view": (lambda: released(memoryview(b"abc")), "read_error", "released memoryview"),
    "odd name": (lambda: "\ud800.jpg", "missing", "its name cannot be encoded"),
}


def opened_without_limit(data: bytes) -> Image.Image:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        return Image.open(io.BytesIO(data))


def closed(file: Any) -> Any:
    file.close()
    return file


def released(view: memoryview) -> memoryview:
    view.release()
    return view


class Reader:
    """A binary file of the least kind: it has `read`, gives little at a time, and ends in an error
    or in None if one is given.
    """

    def __init__(self, data: bytes, end: BaseException | bytes | None = b"") -> None:
        self.data = data
        self.end = end
        self.given = 0

    def read(self, size: int) -> bytes | None:
        piece = self.data[self.given : self.given + min(size, 1000)]
        self.given += len(piece)
        if not piece and isinstance(self.end, BaseException):
            raise self.end
        return piece or self.end  # type: ignore[return-value]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_costs_its_own_prediction(small: imagemill.Classifier, name: str) -> None:
    """Its neighbours are answered, and the same object is as bad the second time."""
    make, status, error = BAD[name]
    bad, good = make(), sample_images.jpeg()
    found = small.predict([good, bad, bad, good])
    assert [item.status for item in found] == ["ok", status, status, "ok"]
    assert error in str(found[1].error)
    assert found[1].error == found[2].error
    assert columns(found[0]) == columns(found[3])


def test_a_limit_of_the_user_in_pillow_is_left_alone(
    small: imagemill.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicting does not change it, whatever limit the classifier has."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345_678)
    data = sample_images.encode(sample_images.photograph(40, 30), "PNG")
    image = Image.open(io.BytesIO(data))
    assert [found.status for found in small.predict([data, image])] == ["ok", "ok"]
    assert Image.MAX_IMAGE_PIXELS == 12_345_678


def test_the_size_of_a_bad_pillow_image_is_the_displayed_one(small: imagemill.Classifier) -> None:
    """As it is for a file."""
    data = (
        sample_images.half(sample_images.jpeg(200, 100, orientation=6)),
        sample_images.half(lossless("TIFF", exif=sample_images.exif(6))),
    )
    images = [Image.open(io.BytesIO(item)) for item in data]
    found = small.predict(images)
    assert [(item.status, item.width, item.height) for item in found] == [
        ("truncated", 100, 200),
        ("truncated", 44, 60),
    ]


def test_pixels_have_no_size_in_bytes(models_dir: Path) -> None:
    """The limit of bytes is for encoded images: 10,000 pixels are no 100 bytes, and are
    answered.
    """
    with imagemill.load("tiny", precision="fp32", limits=Limits(max_bytes=100)) as opened:
        image = sample_images.photograph(100, 100)
        found = opened.predict(
            [image, np.asarray(image), image.convert("F"), sample_images.encode(image, "PNG")]
        )
    assert [item.status for item in found] == ["ok", "ok", "ok", "too_large"]


def test_a_binary_file_of_any_make_is_one_image(
    small: imagemill.Classifier, tmp_path: Path
) -> None:
    """Buffered, raw, in memory, spooled, in a zip, or of another make; from its position on; also
    alone, and line breaks split nothing.
    """
    data = sample_images.encode(sample_images.photograph(60, 50), "PNG") + b"\n\n"
    (expected,) = small.predict(data)
    helpers.fill(tmp_path, {"a.png": data, "b.bin": b"header" + data})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", data)
    with (
        (tmp_path / "a.png").open("rb") as buffered,
        (tmp_path / "a.png").open("rb", buffering=0) as raw,
        (tmp_path / "b.bin").open("rb") as further,
        tempfile.SpooledTemporaryFile() as spooled,
        tempfile.NamedTemporaryFile() as named,
        zipfile.ZipFile(tmp_path / "a.zip") as archive,
        archive.open("a.png") as member,
    ):
        further.seek(6)
        for file in (spooled, named):
            file.write(data)
            file.seek(0)
        files = [
            buffered,
            raw,
            further,
            spooled,
            named,
            member,
            io.BytesIO(data),
            Reader(data),
            io.BufferedReader(io.BytesIO(data)),
        ]  # type: ignore[type-var]
        assert [columns(item) for item in small.predict(files)] == [columns(expected)] * len(files)
        for single in (buffered, raw, member, io.BytesIO(data), Reader(data)):
            if hasattr(single, "seek"):
                single.seek(0)
            assert [columns(item) for item in small.predict(single)] == [columns(expected)]  # type: ignore[arg-type]


def test_bad_files_answer_alike_however_they_are_given(
    small: imagemill.Classifier, tmp_path: Path
) -> None:
    """By path, as bytes and as a binary file: the same status, error and size."""
    bad = {
        name: make()[0] for name, make in sample_images.HOSTILE.items() if "bomb" not in name
    }  # these are slow
    helpers.fill(tmp_path, bad)
    expected = [columns(item) for item in small.predict([tmp_path / name for name in bad])]
    assert [columns(item) for item in small.predict(list(bad.values()))] == expected
    assert [
        columns(item) for item in small.predict([io.BytesIO(data) for data in bad.values()])
    ] == expected
    assert not any(item["status"] == "ok" for item in expected)


def test_buffers_of_any_make_are_their_bytes(small: imagemill.Classifier) -> None:
    """Also those that lie scattered in memory."""
    data = sample_images.jpeg()
    scattered = bytearray(2 * len(data))
    scattered[::2] = data
    found = small.predict([data, bytearray(data), memoryview(data), memoryview(scattered)[::2]])
    assert [columns(item) for item in found] == [columns(found[0])] * 4
    assert found[0].status == "ok"


def test_no_more_of_a_file_is_read_than_the_limit(small: imagemill.Classifier) -> None:
    """A file that never ends is `too_large` after one byte too many."""

    class Endless:
        given = 0

        def read(self, size: int) -> bytes:
            self.given += size
            return bytes(size)

    file = Endless()
    (found,) = small.predict(file)
    assert (found.status, found.error) == ("too_large", "has more than --max-bytes 2000000 bytes")
    assert file.given == 2_000_001


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            np.zeros((4, 4, 3)),
            (
                r"is an array of float64 \(4, 4, 3\)\. Give uint8 \(H, W, 3\), RGB, or \(H, W\),"
                r" grey, or a Pillow image\."
            ),
        ),
        (np.zeros((4, 4, 4), np.uint8), r"is an array of uint8 \(4, 4, 4\)\."),
        (np.zeros((4, 4), np.uint16), r"is an array of uint16 \(4, 4\)\."),
        (np.zeros((4, 4), bool), r"is an array of bool \(4, 4\)\."),
        (np.zeros(4, np.uint8), r"is an array of uint8 \(4,\)\."),
        (np.array(["a.jpg"]), r"is an array of <U5 \(1,\)\."),
        (7, r"is of type int\. Give a path, encoded bytes, a binary file, or pixels\."),
        (None, r"is of type NoneType\."),
        (io.StringIO("text"), r'is a file opened in text mode\. Open it with mode "rb"\.'),
    ],
)
def test_what_is_no_image_is_a_clear_error(
    small: imagemill.Classifier, item: Any, message: str
) -> None:
    """A mistake of the caller's program ends the call; of a list nothing is read before."""
    file = io.BytesIO(sample_images.jpeg())
    with pytest.raises(imagemill.UsageError, match="item 1 " + message):
        small.predict([file, item])
    assert file.tell() == 0
    with pytest.raises(imagemill.UsageError, match="item 0 " + message):
        small.predict(item)
    answers = small.stream(iter([sample_images.jpeg(), item]))
    assert next(answers).status == "ok"
    with pytest.raises(imagemill.UsageError, match="item 1 " + message):
        next(answers)


def test_other_files_than_binary_ones_are_refused(
    small: imagemill.Classifier, tmp_path: Path
) -> None:
    """A text file is seen at once; one of another make when it is read. A list within a list is not
    an image.
    """
    (tmp_path / "a.txt").write_text("a.jpg\nb.jpg\n")
    with (
        (tmp_path / "a.txt").open() as file,
        pytest.raises(imagemill.UsageError, match="item 0 is a file opened in text mode"),
    ):
        small.predict(file)
    with tempfile.NamedTemporaryFile("w+") as named:
        named.write("text")
        named.seek(0)
        with pytest.raises(
            imagemill.UsageError, match=r"item 0 is a file whose read\(\) returned str, not bytes"
        ):
            small.predict(named)  # type: ignore[arg-type]
    with pytest.raises(imagemill.UsageError, match="item 0 is of type list"):
        small.predict([["a.jpg"]])  # type: ignore[list-item]


def test_missing_files_and_no_items(classifier: imagemill.Classifier, tmp_path: Path) -> None:
    """A path where nothing is becomes a prediction that says so; nothing in gives nothing out."""
    found = classifier.predict(tmp_path / "gone.jpg")
    assert [(item.status, item.error, item.top_k, item.logits) for item in found] == [
        ("missing", "there is no such file", (), None)
    ]
    (address,) = classifier.predict("https://example.com/a.jpg")
    assert address.error == "is a URL: download it, and give its bytes"
    (odd,) = classifier.predict("a\0b.jpg")
    assert (odd.status, odd.error) == (
        "missing",
        "there can be no such file: its name holds a null character",
    )
    assert classifier.predict([]) == []


@pytest.mark.process
def test_threads_may_share_a_classifier(classifier: imagemill.Classifier) -> None:
    """Each gets the answers to its own images, in order."""
    data = [
        [sample_images.jpeg(60 + item, 50, seed=10 * thread + item) for item in range(6)]
        for thread in range(3)
    ]
    expected = [[item.logits.tolist() for item in classifier.predict(items)] for items in data]
    found: dict[int, list[Any]] = {}

    def ask(number: int) -> None:
        for _ in range(3):
            found[number] = [item.logits.tolist() for item in classifier.predict(data[number])]  # type: ignore[union-attr]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == expected


def test_a_nan_costs_its_own_prediction(models_dir: Path) -> None:
    """The image's prediction is `invalid_output`, without class and saved arrays; the others of the
    call are answered.
    """
    white, other = np.full((32, 32, 3), 255, np.uint8), np.asarray(sample_images.photograph(32, 32))
    with imagemill.load("spoilt", precision="fp32", save=("logits", "embedding")) as opened:
        *good, bad = opened.predict([other] * 9 + [white])
        assert good == opened.predict([other]) * 9
    assert good[0].status == "ok"
    assert (bad.status, bad.class_id, bad.label, bad.probability, bad.top_k) == (
        "invalid_output",
        None,
        None,
        None,
        (),
    )
    assert bad.logits is bad.embedding is None
    assert bad.error is not None
    assert bad.error.startswith("the model returned NaN or infinity for this image in fp32")


def test_a_model_that_answers_nan_for_everything_is_not_loaded(tmp_path: Path) -> None:
    """`load` raises: no image would get an answer."""
    bundle.write(
        tmp_path / "broken", replace(TINY_CARD, name="broken"), tiny_model(spoil="everything")
    )
    with pytest.raises(
        imagemill.BadLogitsError, match="broken returns NaN or infinity in fp32 for every image"
    ):
        imagemill.load(tmp_path / "broken", precision="fp32")


@pytest.mark.parametrize(
    "error", [KeyError("mine"), RuntimeError("mine"), KeyboardInterrupt("mine")]
)
def test_a_failing_iteration_does_not_spoil_the_next_call(
    small: imagemill.Classifier, error: BaseException
) -> None:
    """What the caller's own generator raises passes through."""

    def items() -> Iterator[bytes]:
        yield sample_images.jpeg()
        raise error

    with pytest.raises(type(error), match="mine"):
        small.predict(items())
    assert small.predict(sample_images.jpeg())[0].status == "ok"


def test_a_stream_answers_in_order_while_items_still_come(small: imagemill.Classifier) -> None:
    """Of an endless iterable too, at most a few batches behind it; bad images are predictions in
    their places.
    """
    taken = 0

    def items() -> Iterator[Any]:
        nonlocal taken
        for taken in itertools.count():
            yield sample_images.jpeg(30 + taken, 40) if taken % 3 else b"text"

    ahead = 8 + 2 * (small._ahead + 2)  # the images decoded ahead, and two a batch
    answers = small.stream(items())
    for number in range(60):
        found = next(answers)
        assert (found.status, found.width) == (
            ("ok", 30 + number) if number % 3 else ("not_an_image", None)
        )
        assert taken <= number + ahead * 3 / 2
    answers.close()  # type: ignore[attr-defined]


@pytest.mark.process
def test_a_stream_and_predict_keep_few_images_in_memory(small: imagemill.Classifier) -> None:
    """Of arrays, images and bytes that are made one by one: as many as are decoded ahead, not
    all.
    """

    def items(count: int) -> Iterator[Any]:
        for number in range(count):
            pixels = np.full((500, 600, 3), number, np.uint8)
            yield (
                pixels,
                Image.fromarray(pixels),
                sample_images.encode(Image.fromarray(pixels), "BMP"),
            )[number % 3]

    def peak(count: int, call: Callable[[Any], Any]) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert len(list(call(items(count)))) == count
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        for call in (small.predict, small.stream):
            assert peak(60, call) < 30 * 900_000
    finally:
        tracemalloc.stop()


def test_items_may_be_closed_or_used_again_once_the_next_is_asked_for(
    small: imagemill.Classifier, tmp_path: Path
) -> None:
    """An array that is filled again, a frame that moves on, a file that its generator closes: each
    is what it was when it was given.
    """
    helpers.fill(
        tmp_path,
        {
            f"{number}.png": sample_images.encode(sample_images.photograph(40, 30, number), "PNG")
            for number in range(12)
        },
    )
    paths = sorted(tmp_path.glob("*.png"))
    expected = [columns(item) for item in small.predict(paths)]

    def arrays() -> Iterator[Any]:
        pixels = np.empty((30, 40, 3), np.uint8)
        for path in paths:
            pixels[:] = np.asarray(Image.open(path))
            yield pixels
        pixels[:] = 0

    def images() -> Iterator[Any]:
        for path in paths:
            with Image.open(path) as image:
                yield image

    def buffers() -> Iterator[Any]:
        buffer = bytearray()
        for path in paths:
            buffer[:] = path.read_bytes()
            yield memoryview(buffer).toreadonly() if path == paths[-1] else buffer

    for items in (arrays, images, buffers):
        assert [columns(item) for item in small.stream(items())] == expected, items.__name__
    frames = Image.open(io.BytesIO(sample_images.animated_gif()))
    assert (
        len({item.logits.tobytes() for item in small.predict(ImageSequence.Iterator(frames))}) == 3
    )  # type: ignore[union-attr]


def test_what_an_iterable_raises_comes_after_the_answers_before_it(
    small: imagemill.Classifier,
) -> None:
    """Nothing that was given is lost."""

    def items() -> Iterator[bytes]:
        for number in range(5):
            yield sample_images.jpeg(30 + number, 40)
        raise KeyError("mine")

    found = []
    with pytest.raises(KeyError, match="mine"):
        for prediction in small.stream(items()):
            found.append(prediction.width)
    assert found == [30, 31, 32, 33, 34]


def test_a_stream_that_is_left_early_lets_go(small: imagemill.Classifier) -> None:
    """Its iterable is closed and its images are freed; the classifier goes on."""
    ended, references = [], []

    def items() -> Iterator[Any]:
        try:
            while True:
                pixels = np.zeros((40, 50, 3), np.uint8)
                references.append(weakref.ref(pixels))
                yield pixels
        finally:
            ended.append(True)

    for prediction in small.stream(items()):
        assert prediction.status == "ok"
        break
    assert ended == [True]
    assert small.predict(sample_images.jpeg())[0].status == "ok"
    assert not [reference for reference in references if reference() is not None]


def test_streams_and_calls_do_not_wait_for_each_other(small: imagemill.Classifier) -> None:
    """Two streams in turn, a call from another thread while they are open, and a call within a
    stream's own iterable.
    """
    data = [sample_images.jpeg(60, 50, seed=seed) for seed in range(30)]
    expected = [columns(item) for item in small.predict(data)]
    first, second = small.stream(data), small.stream(reversed(data))
    assert [columns(next(first)) for _ in range(5)] == expected[:5]
    found = [(columns(next(second)), columns(next(first))) for _ in range(20)]
    assert found == list(zip(expected[:9:-1], expected[5:25], strict=True))
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.extend(small.predict(data)), daemon=True)
    thread.start()
    thread.join(300)
    assert [columns(item) for item in other] == expected
    inner = (item for item in data if small.predict(item)[0].status == "ok")
    assert [columns(item) for item in small.stream(inner)] == expected
    assert [columns(item) for item in first] == expected[25:]


def test_a_stream_of_one_item_or_none(small: imagemill.Classifier) -> None:
    """A single item is one, as for `predict`."""
    assert [item.status for item in small.stream(sample_images.jpeg())] == ["ok"]
    assert [item.status for item in small.stream("gone.jpg")] == ["missing"]
    assert list(small.stream(iter(()))) == []


def test_closing_ends_a_stream_with_a_clear_error(models_dir: Path) -> None:
    """At its next answer, and also if its own iterable closes the classifier; a thread that waits
    for an answer is not left waiting.
    """
    opened = imagemill.load("tiny", precision="fp32")
    answers = opened.stream(itertools.repeat(sample_images.jpeg()))
    next(answers)
    opened.close()
    with pytest.raises(imagemill.UsageError, match="is closed"):
        next(answers)
    with pytest.raises(imagemill.UsageError, match="is closed"):
        opened.stream([])

    opened = imagemill.load("tiny", precision="fp32")

    def items() -> Iterator[bytes]:
        for number in itertools.count():
            if number == 100:
                opened.close()
            yield sample_images.jpeg()

    with pytest.raises(imagemill.UsageError, match="is closed"):
        opened.predict(items())

    opened = imagemill.load("tiny", precision="fp32")
    begun, ended = threading.Event(), []

    def ask() -> None:
        def endless() -> Iterator[bytes]:
            while True:
                yield sample_images.jpeg()
                begun.set()

        with pytest.raises(imagemill.UsageError, match="is closed"):
            opened.predict(endless())
        ended.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert begun.wait(300)
    opened.close()
    thread.join(300)
    assert ended == [True]


def test_closing_while_a_batch_is_computed_ends(
    monkeypatch: pytest.MonkeyPatch, models_dir: Path
) -> None:
    """The batch is answered, and then the device's thread ends."""
    begun = threading.Event()

    class Slow(NullSession):
        def stream(self, batches: Any) -> Any:
            for answer in super().stream(batches):
                begun.set()
                helpers.until(opened._device._work.qsize)  # the request to end is in the queue
                yield answer

    monkeypatch.setattr(api, "open_session", Slow)
    monkeypatch.setattr(
        api, "check_model", lambda *_: None
    )  # which would stream before there is a classifier
    opened = imagemill.load("tiny", device="null")
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(next(opened.stream(sample_images.jpeg()))), daemon=True
    )
    asking.start()
    assert begun.wait(300)
    closing = threading.Thread(target=opened.close, daemon=True)
    closing.start()
    for thread in (closing, asking):
        thread.join(300)
        assert not thread.is_alive()
    assert [item.status for item in found] == ["ok"]


def test_a_session_that_fails_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, models_dir: Path
) -> None:
    """The call that met the failure raises it, and the next is answered; if it cannot be opened,
    each call says so.
    """
    state, lost = "well", threading.Event()

    class Failing(NullSession):
        def stream(self, batches: Any) -> Any:
            for answer in (answers := super().stream(batches)):
                if (
                    state == "gone"
                ):  # it was opened before, for a batch that nobody waited for any more
                    raise ModelError("not to be had")
                if state == "lost":
                    if not lost.is_set():
                        lost.set()
                        helpers.until(opened._device._work.qsize)
                        next(answers)  # a second batch is in flight
                        yield answer
                    raise ModelError("lost")
                yield answer

    def opened_session(*arguments: Any) -> Any:
        if state == "gone":
            raise ModelError("not to be had")
        return Failing(*arguments)

    monkeypatch.setattr(api, "open_session", opened_session)
    items = [sample_images.jpeg()] * 100
    with imagemill.load("tiny", device="null", batch_size=1) as opened:
        state = "lost"
        with pytest.raises(ModelError, match="lost"):
            opened.predict(items)
        state = "gone"
        with pytest.raises(ModelError, match="not to be had"):
            opened.predict(items)
        state = "well"
        assert [item.status for item in opened.predict(items)] == ["ok"] * 100


@pytest.mark.process
def test_a_forked_child_must_load_its_own(models_dir: Path) -> None:
    """At once, and not by hanging: each use says so, closing does nothing, the child ends by
    itself, and its own classifier works.
    """
    program = """
import itertools, os, signal, sys
import imagemill, sample_images

with imagemill.load("tiny", precision="fp32") as opened:
    answers = opened.stream(itertools.repeat(sample_images.jpeg()))
    expected = next(answers)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends it if it hangs
        for use in (lambda: opened.predict(sample_images.jpeg()), lambda: opened.stream([]), lambda: next(answers)):
            try:
                use()
            except imagemill.UsageError as error:
                assert f"opened in process {os.getppid()} and is used in process {os.getpid()}" in str(error), error
                assert "load it in the child" in str(error), error
            else:
                raise AssertionError("a forked child was answered")
        opened.close()
        with imagemill.load("tiny", precision="fp32") as own:
            assert own.predict(sample_images.jpeg()) == [expected]
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert next(answers) == expected
    assert opened.predict(sample_images.jpeg()) == [expected]
"""
    environment = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    environment["PYTHONPATH"] += f":{helpers.PROJECT / 'tests'}"
    subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:This process:DeprecationWarning",
            "-c",
            program,
        ],
        check=True,
        env=environment,
    )


def test_a_classifier_that_is_dropped_lets_go_of_its_device(models_dir: Path) -> None:
    """Without `close` too: the device's thread, and with it the session, goes with the last
    reference.
    """

    def device_threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "device"}

    before = device_threads()
    opened = imagemill.load("tiny", precision="fp32")
    opened.predict(sample_images.jpeg())
    (own,) = device_threads() - before
    del opened
    gc.collect()
    own.join()


@pytest.mark.process
def test_a_classifier_that_nobody_closes_does_not_keep_its_process(models_dir: Path) -> None:
    """With a stream open or not."""
    program = """
import itertools, imagemill, sample_images
opened = imagemill.load("tiny", precision="fp32")
answers = opened.stream(itertools.repeat(sample_images.jpeg()))
assert next(answers).status == "ok"
"""
    environment = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    environment["PYTHONPATH"] += f":{helpers.PROJECT / 'tests'}"
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert made.stderr == b""


def test_a_closed_classifier_says_so(models_dir: Path) -> None:
    """Closing twice does nothing; labels and name stay known."""
    opened = imagemill.load("tiny", precision="auto", top_k=2)
    assert len(opened.predict(sample_images.jpeg())[0].top_k) == 2
    opened.close()
    opened.close()
    assert (opened.name, opened.precision, len(opened.labels)) == ("tiny", "fp32", 10)
    with pytest.raises(imagemill.UsageError, match="is closed"):
        opened.predict(sample_images.jpeg())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu:2"}, r"device cpu:2 names 2 devices; a classifier runs on one"),
        (
            {"precision": "int8"},
            (
                r"tiny has no int8 variant for this machine\. Make it: `imagemill quantize tiny"
                r" --images SOURCE`"
            ),
        ),
        ({"precision": "fp8"}, r"--precision fp8: not known"),
        ({"save": "everything"}, r"--save everything: not known"),
        ({"top_k": 0}, r"--top-k 0: must be at least 1"),
        ({"top_k": "5"}, r"--top-k 5: must be a whole number, not str"),
        ({"model": "nothing_like_it"}, r"No model is called nothing_like_it"),
    ],
)
def test_load_refuses_what_makes_no_sense(
    changes: dict[str, Any], message: str, models_dir: Path
) -> None:
    """With one clear line, as the command line does."""
    with pytest.raises(imagemill.UsageError, match=message):
        imagemill.load(**({"model": "tiny"} | changes))


def test_own_labels(models_dir: Path, tmp_path: Path) -> None:
    """`labels` names a file, as `--labels` does; another count is refused with both named."""
    helpers.fill(
        tmp_path,
        {"ten.txt": b"\n".join(b"%d!" % number for number in range(10)), "two.txt": b"a\nb\n"},
    )
    with imagemill.load("tiny", precision="fp32", labels=tmp_path / "ten.txt") as opened:
        (found,) = opened.predict(sample_images.jpeg())
    assert found.label == f"{found.class_id}!"
    with pytest.raises(
        imagemill.ClassCountError, match=r"two\.txt has 2 labels, but .* has 10 classes"
    ):
        imagemill.load("tiny", labels=tmp_path / "two.txt")


@pytest.mark.process
def test_saved_embeddings_are_the_published_implementations(tmp_path: Path) -> None:
    """`--save embedding`, all the way from a checkpoint to Parquet: what torchvision hands to its
    classifier, and its logits.
    """
    name = "torchvision_resnext50_32x4d"
    checkpoint = write_legacy(tmp_path / "weights.pth", arrays_of(name))
    made = get.get("resnext50_32x4d.golden", tmp_path / "models", from_file=checkpoint)
    assert made.card.recipe == Recipe()
    folder = helpers.fill(
        tmp_path / "in",
        {
            f"{n}.png": sample_images.encode(Image.fromarray(item), "PNG")
            for n, item in enumerate(recipe.pixels())
        },
    )
    imagemill.run(
        folder,
        tmp_path / "out",
        model=made.dir,
        precision="fp32",
        devices="cpu",
        preprocess="center-crop",
        save=["embedding", "logits"],
    )
    rows = helpers.rows(tmp_path / "out")
    for column in ("embedding", "logits"):
        found = np.array([row[column] for row in rows], np.float32)
        np.testing.assert_allclose(
            found, np.load(GOLDEN / f"{name}.{column}.npy"), rtol=0, atol=1e-3
        )


def test_the_layer_of_the_api_is_as_documented() -> None:
    """Everything public has a docstring."""
    for name in api.__all__:
        assert getattr(api, name).__doc__, name


@pytest.mark.process
def test_the_documentation_s_examples_run(
    lite0: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of docs/python.md, in order, in a folder with `photos/a.jpg` and
    `photos/b.jpg`.
    """
    helpers.fill(
        tmp_path / "photos",
        {"a.jpg": sample_images.jpeg(seed=1), "b.jpg": sample_images.jpeg(seed=2)},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEMILL_MODELS", str(lite0.dir.parent))
    text = (helpers.PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {"__name__": "example"})


def test_the_documented_fields_are_those_of_a_prediction() -> None:
    """In the order of the code."""
    text = (helpers.PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    table = text.partition("| `Prediction` |")[2].partition("\n\n")[0]
    reported = [
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.partition("|")[2].partition("|")[0])
    ]
    assert reported == [item.name for item in dataclasses.fields(imagemill.Prediction)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limits": {"max_pixels": 9}}, "limits: must be imagemill.Limits, not dict."),
        ({"device": ""}, "--devices '': is empty."),
        ({"precision": True}, "--precision True: must be a str, not bool."),
    ],
)
def test_load_refuses_values_of_a_wrong_type(
    given: dict[str, Any], message: str, models_dir: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        imagemill.load("tiny", models_dir=models_dir, **given)
    assert message in str(caught.value)


def test_no_device_is_the_usual_one(models_dir: Path) -> None:
    with imagemill.load("tiny", device=None, models_dir=models_dir) as classifier:  # type: ignore[arg-type]
        assert classifier.labels


def test_a_transparent_colour_of_16_bits_is_blended_in_pillows_images_too(
    models_dir: Path,
) -> None:
    """As in the bytes of the same PNG."""
    grey = Image.fromarray(np.full((40, 40), 40_000, np.uint16))
    file = io.BytesIO()
    grey.save(file, "PNG", transparency=40_000)
    with imagemill.load("tiny", models_dir=models_dir, background="#ff0000") as classifier:
        of_bytes = classifier.predict(file.getvalue())
        of_image = classifier.predict(Image.open(io.BytesIO(file.getvalue())))
    assert of_image == of_bytes
