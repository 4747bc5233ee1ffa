"""What the metadata of an ONNX file say about its labels and preprocessing.

    names, imgsz, task            ultralytics
    character                     PaddlePaddle (one label a line)
    labels, classes, …            other exporters
    Image.BitmapPixelFormat, Image.NominalPixelRange
                                  ONNX's own keys (Azure Custom Vision, Windows ML)
    license

Metadata come from strangers: lengths are bounded, nothing is evaluated, and a label with a control
character is an error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models.card import Color, ModelCard, ReadCard, as_size
from imagemill.models.labels import check_labels
from imagemill.records import Interpolation

if TYPE_CHECKING:
    import onnx

_MAX_TEXT: Final = 8 * 2**20
"""Characters of one value."""
_WRAP: Final = (
    "Give the labels once: imagemill wrap {name} --labels FILE. FILE has one label per line, in the"
    " order of the classes."
)
_LABEL_KEYS: Final = (
    *("names", "character", "labels", "label_names", "class_names", "class_labels"),
    *("classes", "categories", "id2label"),
)
"""In the order in which they are tried."""
_STRING: Final = r"""(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")"""
_FLAT: Final = re.compile(
    rf"\s*[\[({{]\s*+(?:(?:(?:\d{{1,7}}|{_STRING})\s*+:\s*+)?+{_STRING}\s*+,?+\s*+)*+[\])}}]\s*"
)
"""A Python list, tuple or dict of texts, without anything nested. `ast.literal_eval` may only see
this: it is slow, or runs out of memory, on deeply nested text.
"""
_TASKS: Final = ("classify", "detect", "segment", "semantic", "pose", "obb")
_RANGES: Final[Mapping[str, tuple[int, float, float]]] = {
    "NominalRange_0_255": (255, 0.0, 1.0),
    "Normalized_0_1": (1, 0.0, 1.0),
    "Normalized_1_1": (1, 0.5, 0.5),
}
"""Value of Image.NominalPixelRange → scale, mean and deviation of every channel."""


def read_metadata(name: str, model: onnx.ModelProto, *, with_labels: bool = True) -> ReadCard:
    """Return what the metadata of an ONNX file say.

    Args:
        name: the file's name, for messages.
        model: the file's content.
        with_labels: False: others are given, so those of the file are not read.

    Raises:
        ModelError: a known key has a value that makes no sense. UsageError: the file is of a task
        other than classification. The message names the key.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    read = ReadCard(ModelCard())

    def take(key: str, **found: Any) -> None:
        nonlocal read
        try:
            read = read.plus(found, f"metadata: {key}")
        except ValueError as error:
            raise ModelError(f"{name}: its metadata key {key} is wrong: {error}.") from error

    unread: list[str] = []
    for key in _LABEL_KEYS if with_labels else ():
        text = entries.get(key, "")
        if (found := read_labels(name, key, text)) is not None:
            take(key, labels=found)
            break
        if text.strip() and not text.strip().isdecimal():  # a number counts the classes
            unread.append(key)
    if unread and read.card.labels is None:
        raise ModelError(
            f"{name}: its metadata key {unread[0]} is '{printable(entries[unread[0]], 80)}', which"
            f" is not a list of labels. {_WRAP.format(name=name)}"
        )
    if entries.get("imgsz"):
        take("imgsz", size=_size(name, entries["imgsz"]))
    if (task := entries.get("task")) in _TASKS and {"names", "imgsz"} & set(entries):
        if task != "classify":
            raise UsageError(
                f"{name} was exported for the task {task!r} (metadata: task), and imagemill runs"
                " classifiers only. Export a classifier (yolo…-cls)."
            )
        if read.card.size is not None:
            # `classify_transforms` of ultralytics' data/augment.py, which resizes the short side of
            # an image to a square input's side, and squashes it to an input that is not square
            take("task classify", interpolation=Interpolation.BILINEAR, color=Color.RGB, scale=1)
            take("task classify", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
            take("task classify", resize=read.card.size, crop="center")
    if (color := entries.get("Image.BitmapPixelFormat", "")[:3].upper()) in list(Color):
        take("Image.BitmapPixelFormat", color=color)
    if (scaling := _RANGES.get(entries.get("Image.NominalPixelRange", ""))) is not None:
        scale, mean, std = scaling
        take("Image.NominalPixelRange", scale=scale, mean=(mean,) * 3, std=(std,) * 3)
    if licence := entries.get("license", "").strip():
        take("license", licence=printable(licence))
    return read


def _size(name: str, text: str) -> int | str:
    """Return the size that `imgsz` says: "224", or "[224, 320]" (height, width)."""
    sides = (
        re.findall(r"\d+", text) if re.fullmatch(r"\s*[\[(]?[\d\s,]{1,40}[\])]?\s*", text) else []
    )
    if len(sides) not in (1, 2):
        raise ModelError(
            f"{name}: its metadata key imgsz is '{printable(text, 80)}', which is not one or two"
            " numbers."
        )
    height, width = int(sides[0]), int(sides[-1])
    return as_size(width, height)


def read_labels(name: str, key: str, text: str) -> tuple[str, ...] | None:
    """Return the labels of a metadata value: a list, or a dict by class number, as JSON or as
    Python writes it; or several lines, one label a line. None if the value is neither.

    Raises:
        ModelError: a label is missing, too long, or has a control character, or there are too many.

    Example:
        >>> read_labels("net.onnx", "names", "{0: 'cat', 1: 'dog'}")
        ('cat', 'dog')
    """
    where = f"{name}: its metadata key {key}"
    if len(text) > _MAX_TEXT:
        raise ModelError(f"{where} has {len(text):,} characters, at most {_MAX_TEXT:,} are read.")
    stripped = text.strip()
    found: Any
    if stripped[:1] in ("[", "{", "("):
        found = _literal(stripped)
        if isinstance(found, dict):
            numbered = {str(number): label for number, label in found.items()}
            found = [numbered.get(str(number)) for number in range(len(numbered))]
    elif "\n" in stripped:
        found = [line.strip() for line in stripped.split("\n")]
    else:
        return None
    if not found or not all(isinstance(item, str) for item in found):
        raise ModelError(
            f"{where} is not a list of labels, nor labels numbered from 0:"
            f" '{printable(text, 80)}'. {_WRAP.format(name=name)}"
        )
    return check_labels(where, found)


def _literal(text: str) -> Any:
    """Return a list or dict of texts; None if it is not one."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    if not _FLAT.fullmatch(text):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
