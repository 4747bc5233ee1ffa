"""The card of a custom ONNX file, `file.card.json`: what such a file does not say itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from imagemill.errors import ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.records import Interpolation, Scores

SUFFIX: Final = ".card.json"


class Layout(StrEnum):
    """Order of the model's input dimensions."""

    NCHW = "NCHW"
    NHWC = "NHWC"


class Color(StrEnum):
    """Order of the model's colour channels."""

    RGB = "RGB"
    BGR = "BGR"


class Crop(StrEnum):
    """What of the resized image the model sees."""

    CENTER = "center"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class OnnxCard:
    """`file.card.json`: what a custom ONNX file does not say itself. Every key is optional; None
    means the default named here.
    """

    name: str | None = None
    """As results name the model; default: the file's name without `.onnx`."""
    size: int | None = None
    """Height and width of the input, pixels; needed only where the file leaves them open."""
    resize: int | str | None = None
    """Length of the short side after resizing; or `WxH`, squashed; or `none`. Default: size /
    0.875, and size × size where crop is none.
    """
    crop: Crop = Crop.CENTER
    interpolation: Interpolation = Interpolation.BILINEAR
    exif: bool = True
    """Whether images are turned as their EXIF orientation says."""
    layout: Layout | None = None
    """Default: as the file's input shape shows it; needed where it does not."""
    color: Color = Color.RGB
    scale: int | None = None
    """1: pixels are divided by 255, and mean and std are on the scale 0 to 1 (the default); 255:
    they are not.
    """
    mean: tuple[float, float, float] | None = None
    """Of red, green and blue, in this order whatever `color` says; default: 0 0 0."""
    std: tuple[float, float, float] | None = None
    """As `mean`; default: 1 1 1."""
    scores: Scores = Scores.LOGITS
    """`logits`: a softmax is still to come; `softmax`: they are probabilities already; `sigmoid`:
    each class has one of its own, which is applied unless the graph ends in it.
    """
    labels: tuple[str, ...] | str | None = None
    """One per class, or the name of a text file beside the card with one a line; default: the
    classes' numbers.
    """
    logits: str | None = None
    """Name of the output with the scores; needed where several could be meant."""
    embedding: str | None = None
    """Name of the tensor with the features; default: what the last matrix or 1×1 convolution reads,
    where that is plain.
    """
    licence: str = "unknown"


def card_file(file: Path) -> Path:
    """Where the card of an ONNX file is looked for."""
    return file.with_suffix(SUFFIX)


def read_card(path: Path) -> OnnxCard:
    """Read a card, and the labels that it names.

    Raises:
        ModelError: it cannot be read, is no JSON object, or a key is unknown or has a value that it
        cannot have; names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{path} cannot be read: {reason}. Mend it, or make it with `imagemill wrap`."
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object. Mend it, or make it with `imagemill wrap`.")
    known = [field.name for field in fields(OnnxCard)]
    if unknown := [key for key in values if key not in known]:
        raise ModelError(f"{path} has the unknown key {unknown[0]!r}. Known: {', '.join(known)}.")
    try:
        card = OnnxCard(**{name: _value(name, value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}. Mend it, or make it with `imagemill wrap`.") from error
    if isinstance(card.labels, str):
        card = replace(card, labels=bundles.read_labels(path.parent / card.labels))
    return card


def card_text(card: OnnxCard) -> str:
    """Spell a card as its file holds it, keys at their default included."""
    return json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"


_CHOICES: Final[Mapping[str, type[StrEnum]]] = {
    "crop": Crop,
    "interpolation": Interpolation,
    "layout": Layout,
    "color": Color,
    "scores": Scores,
}


def _value(name: str, value: Any) -> Any:
    """One value of a card as OnnxCard holds it. Raises: ValueError, naming the key, the value and
    what could stand there.
    """
    if value is None and getattr(OnnxCard(), name) is None:
        return None
    if (kind := _CHOICES.get(name)) is not None:
        if value not in list(kind):
            raise ValueError(f"{name} is {value!r}; known: {', '.join(kind)}")
        return kind(value)
    numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
    good, wanted = {
        "size": (type(value) is int and value > 0, "a number of pixels"),
        "resize": (
            (type(value) is int and value > 0)
            or (isinstance(value, str) and (value == "none" or squashed(value) is not None)),
            'a number of pixels, a text such as "224x224" (width, height), or "none"',
        ),
        "exif": (type(value) is bool, "true or false"),
        "scale": (value in (1, 255) and type(value) is int, "1 or 255"),
        "mean": (
            numbers and len(value) == 3 and bool(np.isfinite(value).all()),
            "three numbers: red, green, blue",
        ),
        "std": (
            numbers and len(value) == 3 and all(0 < item < float("inf") for item in value),
            "three numbers above 0: red, green, blue",
        ),
        "labels": (
            isinstance(value, str)
            or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)),
            "a list of texts, or a file's name",
        ),
    }.get(name, (isinstance(value, str) and value != "", "a text"))
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return tuple(value) if isinstance(value, list) else value


def squashed(text: str) -> tuple[int, int] | None:
    """Width and height of a text such as "224x224"; None if it is none."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return (int(found[1]), int(found[2])) if found else None


def changed(card: OnnxCard, given: Mapping[str, Any]) -> OnnxCard:
    """A card with what the command line says. Raises: UsageError."""
    try:
        return replace(
            card,
            **{name: _value(name, value) for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise UsageError(f"--{error}.") from error
