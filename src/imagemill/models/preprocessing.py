"""Fill in what a card leaves open about preprocessing, and check the values together."""

from __future__ import annotations

from typing import Final

from imagemill.errors import UsageError
from imagemill.models import bundle as bundles
from imagemill.models.card import Crop, ModelCard, ReadCard, box, dimensions
from imagemill.records import Recipe

_CROPPED: Final = 0.875
"""Share of the resized short side that the crop keeps if the card does not say it: 224 of 256."""
Channels = tuple[float, float, float]
"""One number for red, green and blue."""


def with_normalisation(name: str, read: ReadCard, channels: int, *, takes_bytes: bool) -> ReadCard:
    """Fill in scale, mean and std. Raises: UsageError."""
    card = read.card
    if takes_bytes:
        if card.mean is not None or card.std is not None or card.scale == 1:
            raise UsageError(
                f"{name} takes uint8, so it normalises by itself. Leave --mean, --std and --scale 1"
                " out."
            )
        return read if card.scale else read.with_values({"scale": 255}, "the input is uint8")
    values = {"scale": 1, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    read = read.with_values(
        {field: value for field, value in values.items() if getattr(card, field) is None},
        "default",
    )
    for field in ("mean", "std"):
        numbers = getattr(read.card, field)
        shown = " ".join(f"{value:g}" for value in numbers)
        if read.card.scale == 1 and max(map(abs, numbers)) > 1:
            raise UsageError(
                f"--{field} {shown} is on the scale 0 to 255, --scale is 1: pixels from 0 to 1. Add"
                " --scale 255."
            )
        if channels == 1 and len(set(numbers)) != 1:
            raise UsageError(
                f"--{field} {shown}: {name} takes grey images, which have one channel. Give the"
                " same number three times."
            )
    return read


def normalisation(card: ModelCard) -> tuple[Channels, Channels]:
    """Return mean and deviation, RGB, on the scale 0 to 255, of a card whose scale is known."""
    factor = 255.0 if card.scale == 1 else 1.0
    (a, b, c), (d, e, f) = card.mean or (0.0, 0.0, 0.0), card.std or (1.0, 1.0, 1.0)
    return (a * factor, b * factor, c * factor), (d * factor, e * factor, f * factor)


def with_recipe(read: ReadCard) -> tuple[ReadCard, Recipe]:
    """Fill in how images are resized, and return it as a recipe too. Raises: UsageError."""
    card = read.card
    assert card.size is not None
    width, height = dimensions(card.size)
    if card.resize is None:
        chosen = (
            f"{width}x{height}" if card.crop is Crop.NONE else round(min(width, height) / _CROPPED)
        )
        why = "default: size, without a crop" if card.crop is Crop.NONE else "default: size / 0.875"
        read = read.with_values({"resize": chosen}, why)
    card = read.card
    resize: int | tuple[int, int] | None = None
    padded = False
    if isinstance(card.resize, int):
        resize = card.resize
    elif card.resize is not None:
        padded = card.resize.startswith("pad")
        resize = box(card.resize.removeprefix("pad "))
        if card.resize == "pad":
            resize = width, height
    if card.crop is Crop.NONE and resize != (width, height):
        raise UsageError(
            f"--crop none with --resize {card.resize}: without a crop every image must come out"
            f" as {width}x{height}, which is what the model takes. Leave --resize out, or the"
            " crop in."
        )
    recipe = Recipe(
        height=height,
        width=width,
        resize=resize,
        pad=padded,
        fill=card.fill or "#000000",
        centre=card.centre,
        interpolation=card.interpolation,
        exif=card.exif,
    )
    if problem := bundles.cropped_beyond(recipe):
        origin = read.origin("resize")
        raise UsageError(
            f"{'--' if origin == '--resize' else f'{origin}: '}{problem}. Give a --resize of at"
            f" least {min(width, height)}, or leave it out; --crop none takes the whole image,"
            " --resize pad fits it into the input (flags of `wrap` and `get-model`)."
        )
    return read, recipe
