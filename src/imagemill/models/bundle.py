"""Bundles: a model on disk.

    DIR/model.onnx         the graph and, up to 2 GiB, its weights DIR/model.onnx.data    the
    weights of larger models DIR/card.json          everything else that is known about it; written
    last, so a folder without it is no bundle yet DIR/model_6.onnx       a copy whose batch is
    frozen to 6

An ONNX file may name other files to read weights from. `check_external_data` refuses names that
lead out of the folder; it walks over the file's bytes as they lie on disk, so that a foreign file
is looked at before any ONNX library opens it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from imagemill.errors import ModelError, UsageError
from imagemill.records import Bundle, Card, Interpolation, Recipe, Scores
from imagemill.system import userdirs

if TYPE_CHECKING:
    import onnx

MODEL: Final = "model.onnx"
CARD: Final = "card.json"
DATA: Final = "model.onnx.data"
DATA_SHA256: Final = "model.onnx.data.sha256"
"""Key in the ONNX file's metadata, so that the hash of `model.onnx` covers the weights beside
it.
"""
EXTERNAL_FROM: Final = 2**31 - 2**24
"""Bytes of weights from which they go into a file of their own: a protobuf message ends at 2
GiB.
"""


def default_models_dir() -> Path:
    """Return `$IMAGEMILL_MODELS`, else `imagemill/models` in the user's cache folder."""
    if chosen := os.environ.get("IMAGEMILL_MODELS"):
        return userdirs.expand(chosen)
    return userdirs.cache() / "models"


def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet-1k in the order of every published classifier's
    logits.
    """
    text = (
        resources.files("imagemill")
        .joinpath("data/imagenet_labels.txt")
        .read_text(encoding="utf-8")
    )
    return tuple(text.splitlines())


def read_labels(file: Path) -> tuple[str, ...]:
    """Read a list of labels, one a line, in the order of the model's scores; blank lines at the end
    are ignored.

    The text is UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it.

    Raises:
        UsageError: the file cannot be read, is no such text, or has a blank line before its last
        label.
    """
    remedy = "Give a text file in UTF-8 with one label a line."
    try:
        data = file.read_bytes()
        text = data.decode(
            "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--labels {file} cannot be read: {reason}. {remedy}") from error
    if "\0" in text:
        raise UsageError(
            f"--labels {file} is not a text file: it contains null characters. {remedy}"
        )
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(
                f"--labels {file}: line {number} of {len(lines)} is blank, so the labels after it"
                " may be those of other classes. Write the missing label there, or delete the line"
                " if no label is missing."
            )
    return tuple(lines)


def cropped_beyond(recipe: Recipe) -> str | None:
    """Return what is wrong with a recipe that crops more than its resized image has, and so would
    always add black borders; else None.
    """
    resize = recipe.resize
    if resize is None or min(resize if isinstance(resize, tuple) else (resize,)) >= recipe.size:
        return None
    shown = resize if isinstance(resize, int) else f"{resize[0]}x{resize[1]}"
    return (
        f"resize {shown} is smaller than the model's input of {recipe.size}x{recipe.size}, so every"
        " image would get black borders"
    )


def frozen_file(bundle: Bundle, batch_size: int) -> Path:
    """Return where the copy for a fixed batch is or would be."""
    return bundle.dir / f"model_{batch_size}.onnx"


def is_bundle(folder: Path) -> bool:
    """Tell whether the folder holds a finished bundle."""
    return (folder / CARD).is_file()


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def load(folder: Path) -> Bundle:
    """Open a bundle; its weights are not read, see `verify_hash`.

    Raises:
        ModelError: the card or the model is missing or damaged, the card's values make no sense
        together, or the model refers to files outside the folder.
    """
    remedy = f"Remove {folder} and get the model again with imagemill get-model."
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model bundle: it has no {CARD}. Make one with imagemill get-model."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / CARD} cannot be read: {error}. {remedy}") from error
    try:
        card = _card(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(
            f"{folder / CARD} is damaged: {type(error).__name__}: {error}. {remedy}"
        ) from error
    if problem := cropped_beyond(card.recipe):
        raise ModelError(f"{folder / CARD}: {problem}. Correct recipe.resize there.")
    if len(card.labels) == 1 and card.scores is Scores.LOGITS:
        raise ModelError(
            f"{folder / CARD} has one label and the scores are logits: a softmax over one class is"
            ' 1.0 for every image. Change scores to "sigmoid".'
        )
    if not (folder / MODEL).is_file():
        raise ModelError(f"{folder / MODEL} is missing, though {CARD} describes it. {remedy}")
    check_external_data(folder / MODEL)
    return Bundle(folder, card)


def verify_hash(bundle: Bundle) -> None:
    """Read the whole model and compare it with its card.

    Raises:
        ModelError: names both sums; the model changed on disk since it was made.
    """
    _compare(bundle.dir / MODEL, bundle.card.sha256)
    if expected := _metadata(bundle.dir / MODEL).get(DATA_SHA256):
        _compare(bundle.dir / DATA, expected)


def _compare(file: Path, expected: str) -> None:
    try:
        found = sha256(file)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror}. Get the model again with imagemill"
            " get-model."
        ) from error
    if found != expected:
        raise ModelError(
            f"{file} has the sha256 {found}, its card says {expected}. Remove {file.parent} and get"
            " the model again."
        )


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def card_json(card: Card) -> str:
    """Spell a card as `card.json` holds it."""
    return json.dumps(asdict(card), indent=2, ensure_ascii=False, default=dict) + "\n"


def _card(values: Any) -> Card:
    """Check every field's type: a card may have been edited by hand."""
    if not isinstance(values, dict):
        raise TypeError("it is not a JSON object")
    if missing := [f.name for f in fields(Card) if f.name not in values]:
        raise KeyError(f"it lacks {', '.join(missing)}")

    def text(name: str) -> str:
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is not text")
        return str(values[name])

    def texts(name: str) -> tuple[str, ...]:
        if not isinstance(values[name], list) or not all(
            isinstance(item, str) for item in values[name]
        ):
            raise TypeError(f"{name} is not a list of texts")
        return tuple(values[name])

    def colour(name: str) -> tuple[float, float, float]:
        red, green, blue = (float(item) for item in values[name])
        return red, green, blue

    def mapping(name: str) -> dict[str, Any]:
        if not isinstance(values[name], dict):
            raise TypeError(f"{name} is not an object")
        return dict(values[name])

    recipe = mapping("recipe")
    size, resize = recipe["size"], recipe["resize"]
    sides = resize if isinstance(resize, list) else [] if resize is None else [resize]
    if any(type(side) is not int or side < 1 for side in (size, *sides)) or (
        isinstance(resize, list) and len(resize) != 2
    ):
        raise ValueError(f"recipe says size {size!r}, resize {resize!r}")
    if isinstance(resize, list):
        resize = (resize[0], resize[1])
    if type(recipe["exif"]) is not bool:
        raise TypeError("recipe.exif is neither true nor false")
    return Card(
        name=text("name"),
        architecture=text("architecture"),
        labels=texts("labels"),
        recipe=Recipe(
            size=size,
            resize=resize,
            interpolation=Interpolation(recipe["interpolation"]),
            exif=recipe["exif"],
        ),
        mean=colour("mean"),
        std=colour("std"),
        sha256=text("sha256"),
        licence=text("licence"),
        origin=mapping("origin"),
        parameters=int(values["parameters"]),
        scores=Scores(values["scores"]),
        input=text("input"),
        normalised=None if values["normalised"] is None else text("normalised"),
        outputs=texts("outputs"),
        top1=None if values["top1"] is None else float(values["top1"]),
        notes=mapping("notes"),
    )


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def write(
    folder: Path, card: Card, model: onnx.ModelProto, *, external_from: int = EXTERNAL_FROM
) -> Bundle:
    """Write a bundle; the files appear whole, the card last. The model is consumed where its
    weights go into a file of their own.

    Args:
        folder: made where it is missing; an older bundle in it is replaced, its frozen copies
        removed.
        card: its `sha256` is filled in here.
        model: with all weights inside.
        external_from: bytes of weights from which they go into `model.onnx.data`.

    Raises:
        ModelError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / CARD, *folder.glob("model_*.onnx")):
            stale.unlink(missing_ok=True)
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) >= external_from:
            _move_weights_out(folder / DATA, model)
        with _replacing(folder / MODEL) as file:
            file.write(model.SerializeToString())
        card = replace(card, sha256=sha256(folder / MODEL))
        with _replacing(folder / CARD) as file:
            file.write(card_json(card).encode())
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error.strerror}. Make room or rights there, or choose"
            " another folder with --models-dir."
        ) from error
    return Bundle(folder, card)


def _move_weights_out(data: Path, model: onnx.ModelProto) -> None:
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    digest = hashlib.sha256()
    position = 0
    with _replacing(data) as file:
        for tensor in model.graph.initializer:
            padding = b"\0" * (-position % 4096)
            raw = tensor.raw_data
            for piece in (padding, raw):
                file.write(piece)
                digest.update(piece)
            set_external_data(tensor, DATA, position + len(padding), len(raw))
            position += len(padding) + len(raw)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    entry = model.metadata_props.add()
    entry.key, entry.value = DATA_SHA256, digest.hexdigest()


def freeze(bundle: Bundle, batch_size: int) -> Path:
    """Write `model_N.onnx`, whose batch is always N, unless it is there; return its path.

    Raises:
        ModelError: the model cannot be read, or the copy cannot be written.
    """
    if batch_size < 1:
        raise ModelError(
            f"A batch of {batch_size} cannot be frozen. Give --batch-size a number from 1."
        )
    target = frozen_file(bundle, batch_size)
    if target.is_file():
        return target
    import onnx

    model = onnx.load(str(bundle.dir / MODEL), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch_size
    try:
        with _replacing(target) as file:
            file.write(model.SerializeToString())
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written: {error.strerror}. Make room or rights there."
        ) from error
    return target


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that becomes `path` when the block ends well, and
    vanishes otherwise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ── external data ─────────────────────────────────────────────────────────────────────────────────

# Which fields of which ONNX messages can hold a tensor, from onnx.proto: message → field number →
# message.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_METADATA: Final[Mapping[str, Mapping[int, str]]] = {"Model": {14: "Entry"}, "Entry": {}}
_DEEPEST: Final = 100
"""Nesting at which protobuf itself gives up."""


def check_external_data(file: Path) -> None:
    """Refuse an ONNX file whose weights lie outside its own folder; nothing but the file itself is
    opened.

    Raises:
        ModelError: a location is absolute, leads out of the folder (links followed), or is no
        regular file; or the file is damaged.
    """
    folder = file.parent.resolve()

    def entry(key: bytes, value: bytes) -> None:
        if key != b"location":
            return
        location = value.decode("utf-8", "backslashreplace")
        parts = location.replace("\\", "/").split("/")
        if (
            location.startswith(("/", "\\"))
            or ".." in parts
            or ":" in location
            or "\0" in location
            or not location
        ):
            raise ModelError(
                f"{file} refused: it wants weights from {location!r}, outside its folder. Use a"
                " model that you trust."
            )
        target = (folder / location).resolve()
        if not target.is_relative_to(folder):
            raise ModelError(
                f"{file} refused: {location!r}, where it wants weights from, links to outside its"
                " folder."
            )
        if not target.is_file():
            raise ModelError(
                f"{file} is incomplete: {location}, which holds its weights, is not a file beside"
                " it. Copy it there."
            )

    _visit(file, _FIELDS, entry)


def _metadata(file: Path) -> dict[str, str]:
    """Read an ONNX file's metadata, without its weights."""
    found: dict[str, str] = {}
    _visit(
        file,
        _METADATA,
        lambda key, value: found.update(
            {key.decode("utf-8", "replace"): value.decode("utf-8", "replace")}
        ),
    )
    return found


def _visit(
    file: Path, messages: Mapping[str, Mapping[int, str]], entry: Callable[[bytes, bytes], None]
) -> None:
    """Call `entry` with every key and value that `messages` lead to. Raises: ModelError."""
    try:
        with file.open("rb") as opened:
            if opened.seek(0, os.SEEK_END) == 0:
                raise ModelError(f"{file} is empty. Get the model again with imagemill get-model.")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(data, 0, len(data), "Model", messages, entry, 0)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(
            f"{file} is damaged or not ONNX: {error}. Get the model again with imagemill get-model."
        ) from error


def _walk(
    data: mmap.mmap,
    at: int,
    end: int,
    message: str,
    messages: Mapping[str, Mapping[int, str]],
    entry: Callable[[bytes, bytes], None],
    depth: int,
) -> None:
    """Visit every key and value of every `Entry` that is found in one protobuf message."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested deeper than {_DEEPEST}")
    texts: dict[int, list[bytes]] = {1: [], 2: []}
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(data, at, end)
            continue
        if wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(data, at, end)
            if at + length > end:
                raise ValueError(f"it ends inside a field of {length} bytes")
            if inner := messages[message].get(number):
                _walk(data, at, at + length, inner, messages, entry, depth + 1)
            elif message == "Entry" and number in texts:
                texts[number].append(data[at : at + length])
            at += length
        else:
            raise ValueError(f"it has a field of wire type {wire}")
        if at > end:
            raise ValueError("it ends inside a number")
    if texts[1] or texts[2]:  # protobuf takes the last of repeated texts; here every one counts
        for key in texts[1] or [b""]:
            for value in texts[2] or [b""]:
                entry(key, value)


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
        shift += 7
    raise ValueError("it ends inside a number, or holds one that is too long")
