"""How an image becomes a model's input, and what the model's scores mean: a card.

Checkpoints, model folders and ONNX files end up as one: their readers return a `ReadCard`, which
also says where each value came from. For a custom ONNX file it is also a file, `file.card.json`,
written by hand or by `imagemill wrap`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

from imagemill.errors import ModelError, UsageError, printable
from imagemill.models.folders import json_file
from imagemill.models.labels import read_labels
from imagemill.records import Centre, Interpolation, Scores

SUFFIX: Final = ".card.json"
MAX_SIDE: Final = 65_535
"""Pixels. Larger than the input of any model, and a bound for hostile files."""
_BOX: Final = r"[1-9]\d{0,4}x[1-9]\d{0,4}"
_SHOWN_LABELS: Final = 5

Pixels = Annotated[int, Meta(gt=0, le=MAX_SIDE)]
Number = Annotated[float, Meta(ge=-1e9, le=1e9)]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
Name = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+\Z")]


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


class ModelCard(Struct, frozen=True):
    """What a model's own network does not say.

    Every key is optional and may be null, which means the default named here. `wrap.bundle_for`
    wants `mean`, `std` and `resize` from the card or the file. The descriptions in the annotations
    are what an error message says about a wrong value.
    """

    name: Annotated[Name | None, Meta(description="a text of one line")] = None
    """As results name the model; default: the file's name without `.onnx`."""
    size: Annotated[
        Pixels | Annotated[str, Meta(pattern=rf"^{_BOX}\Z")] | None,
        Meta(description='a number of pixels, or a text such as "320x240" (width, height)'),
    ] = None
    """Width and height of the input, pixels: a number, or `WxH`. Needed only if the file leaves
    them open.
    """
    resize: Annotated[
        Pixels | Annotated[str, Meta(pattern=rf"^(none|pad|(pad )?{_BOX})\Z")] | None,
        Meta(
            description=(
                'a number of pixels, a text such as "224x224" (width, height), "pad",'
                ' "pad 224x224", or "none"'
            )
        ),
    ] = None
    """Length of the short side after resizing; `WxH`: squashed to that; `pad`: fitted into the
    input without changing the ratio of the sides, the rest is filled; `pad WxH`: fitted into that
    box; or `none`. Default: size / 0.875, and the size itself if crop is none.
    """
    crop: Crop = Crop.CENTER
    fill: Annotated[
        Annotated[str, Meta(pattern=r"^#[0-9a-fA-F]{6}\Z")] | None,
        Meta(description='a colour such as "#ffffff"'),
    ] = None
    """Colour of the borders around an image smaller than the input; default: black."""
    centre: Centre = Centre.TORCHVISION
    """Which pixel a crop or a border begins at if the number of pixels is odd."""
    interpolation: Interpolation = Interpolation.BILINEAR
    exif: Annotated[bool, Meta(description="true or false")] = True
    """Whether images are turned as their EXIF orientation says."""
    layout: Layout | None = None
    """Default: as the file's input shape shows it; needed where it does not."""
    color: Color = Color.RGB
    scale: Annotated[typing.Literal[1, 255] | None, Meta(description="1 or 255")] = None
    """1: pixels are divided by 255, and mean and std are on the scale 0 to 1 (the default); 255:
    they are not.
    """
    mean: Annotated[
        tuple[Number, Number, Number] | None,
        Meta(description="three numbers: red, green, blue"),
    ] = None
    """Of red, green and blue, in this order whatever `color` says; default: 0 0 0."""
    std: Annotated[
        tuple[Positive, Positive, Positive] | None,
        Meta(description="three numbers above 0: red, green, blue"),
    ] = None
    """As `mean`; default: 1 1 1."""
    scores: Scores | None = None
    """`logits`: a softmax is still to come; `softmax`: they are probabilities already; `sigmoid`:
    each class has one of its own, which is applied unless the graph ends in it. Default: `softmax`
    or `sigmoid` if the graph ends in one, else `logits`.
    """
    labels: Annotated[
        tuple[str, ...] | str | None, Meta(description="a list of texts, or a file's name")
    ] = None
    """One per class, or the name of a text file beside the card with one a line; default: the
    classes' numbers.
    """
    logits: Annotated[Name | None, Meta(description="a text of one line")] = None
    """Name of the output with the scores; needed if several could be meant. `none`: the model has
    no scores, only an embedding.
    """
    embedding: Annotated[Name | None, Meta(description="a text of one line")] = None
    """Name of the tensor with the features; default: what the last matrix or 1×1 convolution reads,
    if that is unambiguous.
    """
    licence: Annotated[Name, Meta(description="a text of one line")] = "unknown"


class ReadCard(Struct, frozen=True):
    """A card that was read from a model's own files, and where its values came from."""

    card: ModelCard
    origins: Mapping[str, str] = {}
    """Name of a field of the card → where its value came from, for example
    `{"labels": "config.json: id2label"}`.
    """

    def with_values(self, given: Mapping[str, Any], origin: str | None = None) -> ReadCard:
        """Return the card with other values, for example those of the command line.

        Args:
            given: fields of ModelCard by name. None leaves the value as it is.
            origin: where they came from; None: from the flag of each field's name.

        Raises:
            UsageError: a value that its field cannot have.

        Example:
            >>> ReadCard(ModelCard()).with_values({"size": 224}).lines()
            ('size: 224 (--size)',)
        """
        try:
            return self.plus(given, origin)
        except ValueError as error:
            raise UsageError(f"--{error}.") from error

    def plus(self, values: Mapping[str, Any], origin: str | None) -> ReadCard:
        """Return the card with other values, as `with_values`, but of a file.

        Raises:
            ValueError: a value that its field cannot have, see `checked`.
        """
        chosen = {name: checked(name, value) for name, value in values.items() if value is not None}
        origins = {name: origin or f"--{name}" for name in chosen}
        return ReadCard(replace(self.card, **chosen), {**self.origins, **origins})

    def with_card(self, other: ReadCard) -> ReadCard:
        """Return the card with the values of another one, as far as their origin is known."""
        values = {name: getattr(other.card, name) for name in other.origins}
        return ReadCard(replace(self.card, **values), {**self.origins, **other.origins})

    def origin(self, field: str) -> str:
        """Return where a field's value came from."""
        return self.origins.get(field, "default")

    def lines(self) -> tuple[str, ...]:
        """Return one line per value whose origin is known, in the order of the card's fields."""
        return tuple(
            f"{name}: {_shown(getattr(self.card, name))} ({self.origins[name]})"
            for name in ModelCard.__struct_fields__
            if name in self.origins
        )


def _shown(value: object) -> str:
    """Return a value of a card as one short line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        more = ", …" if len(value) > _SHOWN_LABELS else ""
        first = ", ".join(printable(item, 40) for item in value[:_SHOWN_LABELS])
        return f"{len(value):,}: {first}{more}"
    if isinstance(value, tuple):
        return " ".join(f"{item:g}" for item in value)
    return printable(value)


def card_file(file: Path) -> Path:
    """Return where the card of an ONNX file is looked for."""
    return file.with_suffix(SUFFIX)


def read_card(path: Path) -> ReadCard:
    """Read a card, and the labels that it names. The origin of its keys is its file name.

    Raises:
        ModelError: it cannot be read, is no JSON object, or a key is unknown or has a value that it
        cannot have. The message names the key.
    """
    remedy = "Correct it, or make it with `imagemill wrap`."
    try:
        values = json_file.read(path).values
    except ModelError as error:
        raise ModelError(f"{error} {remedy}") from error
    known = ModelCard.__struct_fields__
    if unknown := [key for key in values if key not in known]:
        raise ModelError(
            f"{path} has the unknown key {printable(unknown[0])!r}. Known: {', '.join(known)}."
        )
    try:
        read = ReadCard(ModelCard()).plus(values, path.name)
    except ValueError as error:
        raise ModelError(f"{path}: {error}. {remedy}") from error
    if isinstance(read.card.labels, str):
        labels = read_labels(path.parent / read.card.labels, f"{path}: labels:")
        read = replace(read, card=replace(read.card, labels=labels))
    return read


def card_text(card: ModelCard, chosen: Collection[str]) -> str:
    """Return a card as its file holds it.

    Args:
        card: its values.
        chosen: names of the fields that somebody chose. All others are written as null, so that a
            default never looks like a choice.
    """
    values = {name: value if name in chosen else None for name, value in asdict(card).items()}
    return msgspec.json.format(msgspec.json.encode(values), indent=2).decode() + "\n"


_TYPES: Final[Mapping[str, Any]] = typing.get_type_hints(ModelCard, include_extras=True)


def checked(name: str, value: object) -> Any:
    """Return the value as the field `name` of ModelCard holds it.

    Raises:
        ValueError: the field cannot have this value. The message names the field, the value and
        what it must be, for example "scale is 256; it must be 1 or 255".
    """
    kind = _TYPES[name]
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        shown = printable(repr(value), 80)
    if typing.get_origin(kind) is Annotated:
        raise ValueError(f"{name} is {shown}; it must be {kind.__metadata__[-1].description}")
    (choices,) = [
        item
        for item in (kind, *typing.get_args(kind))
        if isinstance(item, type) and issubclass(item, StrEnum)
    ]
    raise ValueError(f"{name} is {shown}; known: {', '.join(choices)}")


def read_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a command line that were given, labels read from the file that is named.

    Raises:
        UsageError: the file cannot be read.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if isinstance(values.get("labels"), str):
        values["labels"] = read_labels(Path(values["labels"]))
    return values


def box(text: str) -> tuple[int, int] | None:
    """Return width and height of a text such as "224x224"; None if it is not one."""
    if not re.fullmatch(_BOX, text):
        return None
    width, height = text.split("x")
    return int(width), int(height)


def dimensions(size: int | str) -> tuple[int, int]:
    """Return width and height of a card's `size`."""
    if isinstance(size, int):
        return size, size
    found = box(size)
    assert found is not None, "checked when the card was read"
    return found


def as_size(width: int, height: int) -> int | str:
    """Return the `size` of a card.

    Example:
        >>> as_size(224, 224), as_size(320, 240)
        (224, '320x240')
    """
    return width if width == height else f"{width}x{height}"
