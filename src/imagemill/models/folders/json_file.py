"""The files of a model folder of transformers or timm: their names, and how JSON is read that may
come from anybody.

Size, depth and types are checked before a value is used. A message names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from imagemill.errors import ModelError, counted, printable
from imagemill.models.labels import check_labels
from imagemill.system import serialization

T = TypeVar("T")

CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
"""Where transformers 5 puts the keys of `preprocessor_config.json`, below `image_processor`, if the
model has a tokenizer too.
"""
GRAPHS: Final = (
    "onnx/vision_model.onnx",
    "vision_model.onnx",
    "onnx/model.onnx",
    "model.onnx",
)
"""In this order. A folder with a vision tower has both towers in `model.onnx`, which wants text."""
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
"""Says which file holds which parameter, if there are several."""
MAX_BYTES: Final = 64 * 2**20
"""Of a JSON file. A million labels fit; those of ImageNet-21k take 2 MB."""


class Document(Struct, frozen=True):
    """A JSON object that was read from a file."""

    file: Path
    values: dict[str, Any]
    prefix: str = ""
    """What messages put before a key, if the object is inside another one."""

    def record(self, kind: type[T]) -> T:
        """Return the object's known keys as a record. Other keys are ignored.

        Raises:
            ModelError: a key has a value that it cannot have.
        """
        try:
            return serialization.from_plain(kind, self.values)
        except (ValueError, OverflowError) as problem:
            raise self.error(self.prefix + str(problem)) from None

    def inner(self, key: str) -> Document:
        """Return the object below a key, as a document of the same file.

        Raises:
            ModelError: the value is not an object.
        """
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.error(f"{key}: expected `object`, got `{type(value).__name__}`")
        return Document(self.file, value, f"{self.prefix}{key}.")

    def origin(self, *keys: str) -> str:
        """Return where values come from, for people: the file and the keys."""
        return f"{self.file.name}: {', '.join(self.prefix + key for key in keys)}"

    def error(self, what: str) -> ModelError:
        """Return an error that names the file."""
        return ModelError(f"{printable(self.file)}: {printable(what, 500)}.")


def read(file: Path) -> Document:
    """Return the JSON object that a file holds.

    Raises:
        ModelError: the file cannot be read, is too large, or holds no JSON object.
    """
    shown = printable(file)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ModelError(f"{shown} is larger than {MAX_BYTES:,} bytes, too large for a config.")
        values = json.loads(data, object_pairs_hook=_unique)
    except OSError as error:
        raise ModelError(f"{shown} cannot be read: {error.strerror}.") from error
    except RecursionError:
        raise ModelError(f"{shown} is nested too deeply for a config.") from None
    except ValueError as error:
        raise ModelError(f"{shown} is not valid JSON: {printable(error)}.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{shown} is not a JSON object.")
    return Document(file, values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return values


def numbered_labels(
    document: Document, key: str, found: Mapping[str, str | int]
) -> tuple[str, ...]:
    """Return labels in the order of their classes' numbers.

    Raises:
        ModelError: a number is missing, or as `check_labels`.
    """
    names = []
    for number in range(len(found)):
        label = found.get(str(number))
        if label is None:
            raise document.error(
                f"{key} has {counted(len(found), 'label')}, but none for class {number}: its"
                f" keys must be 0 to {len(found) - 1}"
            )
        names.append(str(label))
    return check_labels(f"{printable(document.file)}: {key}", names, may_be_blank=True)


def inside(folder: Path, name: str) -> Path | None:
    """Return a file of a model folder; None if there is no such file.

    A link may lead to another file of the folder, and in the Hub's cache to a file in `blobs`.

    Raises:
        ModelError: it is a link to elsewhere.
    """
    file = folder / name
    try:
        if not file.is_file():
            return None
        home, target = folder.resolve(), file.resolve()
    except OSError as error:
        raise ModelError(f"{printable(file)} cannot be read: {error.strerror}.") from error
    blobs = home.parent.parent / "blobs"
    cached = home.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not cached and not target.is_relative_to(home):
        raise ModelError(
            f"{printable(file)} is a link to outside its folder. Copy the file into the folder, if"
            " you trust it."
        )
    return file
