"""Read the JSON files of a model folder, which may come from anybody.

Size, depth and types are checked before a value is used. A message names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from imagemill.errors import ModelError, counted, printable
from imagemill.system import serialization

T = TypeVar("T")

MAX_BYTES: Final = 32 * 2**20
"""Of a JSON file. The labels of ImageNet-21k take 2 MB."""
MAX_LABELS: Final = 250_000
"""The largest published classifiers have about 200,000 classes."""
MAX_LABEL: Final = 1_000
"""Characters of one label."""


@dataclass(frozen=True, slots=True)
class Document:
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


def check_labels(document: Document, key: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels as a tuple.

    Raises:
        ModelError: there are none or too many, or one is too long or has a control character.
    """
    if not labels:
        raise document.error(f"{key} is empty")
    if len(labels) > MAX_LABELS:
        raise document.error(f"{key} has {len(labels):,} labels; {MAX_LABELS:,} is the limit")
    for number, label in enumerate(labels):
        if len(label) > MAX_LABEL:
            raise document.error(
                f"{key}: label {number} has {len(label):,} characters; {MAX_LABEL:,} is the limit"
            )
        if any(ord(item) < 32 or 127 <= ord(item) < 160 for item in label):
            raise document.error(f"{key}: label {number} has a control character: {label[:50]!r}")
    return tuple(labels)


def numbered_labels(
    document: Document, key: str, found: Mapping[str, str | int]
) -> tuple[str, ...]:
    """Return labels in the order of their classes' numbers.

    Raises:
        ModelError: a number is missing, or as `check_labels`.
    """
    if len(found) > MAX_LABELS:
        raise document.error(f"{key} has {len(found):,} labels; {MAX_LABELS:,} is the limit")
    labels = []
    for number in range(len(found)):
        label = found.get(str(number))
        if label is None:
            raise document.error(
                f"{key} has {counted(len(found), 'label')}, but none for class {number}: its"
                f" keys must be 0 to {len(found) - 1}"
            )
        labels.append(str(label))
    return check_labels(document, key, labels)


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
